"""How final a piece of evidence is, whatever its source: a chain's ladder, or a partner's place on it.

Pure: a function of the evidence, the chains' heads, what is configured about a partner, and now. The partners' place is
design section 5, "Confidence of partners"; a rung is None where the evidence does not count yet at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil

from indexer.model.confidence import Alarm, Heads, Level, Policy, alarms_for, level_of, reached
from indexer.model.evidence import KEYBAN, QIIBEE, Movement, PartnerTransfer, Status

AnyEvidence = Movement | PartnerTransfer
Block = tuple[int, int, bytes]  # chain, number, hash
LOOK_AGAIN_MS = 15_000  # it has stood long enough by the clock, and nobody has read it since


@dataclass(frozen=True, slots=True)
class PartnerRules:
    """What the configuration says about a brand's account at one partner. Times in milliseconds."""

    require_success: bool = False  # Keyban: finalized only where `success` is true
    finalized_after_ms: int | None = None  # Keyban, on a ledger that is neither Stellar nor followed; None: never
    settle_after_ms: int = 60_000  # qiibee: how long a successful transaction must stand unchanged


@dataclass(frozen=True, slots=True)
class Attestation:
    """What speaks for a block: how many endpoints were seen to hold it, and what its receipts prove.

    `proof`: receipts_root | cannot_verify | None (not tried, or not yet with success); `reason` why not. `asked`: somebody looks.
    """

    witnesses: int = 0
    proof: str | None = None
    reason: str | None = None
    asked: bool = False


_NOTHING = Attestation()


@dataclass(frozen=True)
class Standing:
    """Everything that the rungs depend on. `partners` by (brand, partner)."""

    heads: Mapping[int, Heads]
    partners: Mapping[tuple[str, str], PartnerRules] = field(default_factory=dict)
    now_ms: int = 0
    attested: Mapping[Block, Attestation] = field(default_factory=dict)

    # ------------------------------------------------------------------ what speaks for a block

    def attestation(self, evidence: AnyEvidence) -> Attestation | None:
        """Of the block that evidence is in; None where it is in none that we follow. Where one witness is enough, whoever the
        block was read from is it."""
        block = block_of(evidence)
        if block is None:
            return None
        held = self.attested.get(block, _NOTHING)
        return held if held.witnesses or self.on(block[0]).quorum > 1 else replace(held, witnesses=1)

    def doubt(self, evidence: AnyEvidence, level: Level = Level.INCLUDED) -> str | None:
        """Why evidence does not count at this rung, however deep its block is; None where nothing is missing."""
        held = self.attestation(evidence)
        if held is None:
            return None
        place = evidence.place
        assert place is not None
        heads = self.on(place.chain_id)
        if held.witnesses < heads.quorum:
            return f"{held.witnesses} of {heads.quorum} endpoints were seen to hold its block"
        if level > Level.INCLUDED and heads.proof != "off":
            if held.proof is None:
                return "its block is not proven yet" + (f": {held.reason}" if held.reason else "")
            if held.proof == "cannot_verify" and heads.proof == "required":
                return f"its block cannot be verified: {held.reason}"
        return None

    def to_ask(self, evidence: AnyEvidence) -> Block | None:
        """The block that somebody must look at before all is known of it."""
        held, block = self.attestation(evidence), block_of(evidence)
        if held is None or block is None or held.asked:
            return None
        heads = self.on(block[0])
        unproven = held.proof is None or (heads.proof == "required" and held.proof != "receipts_root")
        unknown = held.witnesses < heads.quorum or (heads.proof != "off" and unproven)
        return block if unknown else None

    # ------------------------------------------------------------------ rungs

    def level(self, evidence: AnyEvidence) -> Level | None:
        """The rung that evidence counts at now; None while it counts for nothing."""
        level = self.depth(evidence)
        if level is None or self.doubt(evidence) is not None:
            return None
        return level if self.doubt(evidence, level) is None else Level.INCLUDED

    def depth(self, evidence: AnyEvidence) -> Level | None:
        """The rung of evidence by its place alone, whoever vouches for it; None while it is nowhere."""
        if isinstance(evidence, Movement):
            return level_of(evidence, self.on(evidence.chain_id))
        if not evidence.counts:
            return None
        if evidence.chain_id is not None:
            place = evidence.place
            return None if place is None else _rung(place.block_number, self.on(place.chain_id))
        return Level.FINALIZED if self._final(evidence) else Level.INCLUDED

    def reached(self, policy: Policy, evidence: AnyEvidence) -> bool:
        """Whether evidence is as final as the policy demands, and as much speaks for it as must."""
        return self._deep(policy, evidence) and self.doubt(evidence, policy.level) is None

    def _deep(self, policy: Policy, evidence: AnyEvidence) -> bool:
        if isinstance(evidence, Movement):
            return reached(policy, evidence, self.on(evidence.chain_id))
        level = self.depth(evidence)
        if level is None:
            return False
        if policy.level is Level.CONFIRMED and level < Level.SAFE:
            # so many seconds of chain on top; a partner has no chain, and its word is final or it is not
            place = evidence.place
            if place is None:
                return False
            return self.on(place.chain_id).head_time_ms >= _confirmed_ms(policy, evidence)
        return level >= policy.level

    def alarms(self, policy: Policy, evidence: AnyEvidence) -> list[Alarm]:
        """When evidence that has not reached its policy should be looked at again: at the first of these. What waits for
        witnesses or a proof is touched when they are there."""
        if isinstance(evidence, Movement):
            return [] if self._deep(policy, evidence) else alarms_for(policy, evidence)
        if evidence.chain_id is not None:
            place = evidence.place
            if place is None or self._deep(policy, evidence):
                return []  # our look's answer touches the operation
            number = place.block_number
            if policy.level is Level.CONFIRMED:
                due_ms = _confirmed_ms(policy, evidence)
                return [
                    Alarm(place.chain_id, "head_time_ms", due_ms),
                    Alarm(place.chain_id, "safe_number", number),
                ]
            axis = "finalized_number" if policy.level is Level.FINALIZED else "safe_number"
            return [Alarm(place.chain_id, axis, number)]
        after_ms = self._stands_for_ms(evidence)
        if after_ms is None or evidence.settled_ms is None:
            return []
        due_ms = evidence.settled_ms + after_ms
        return [Alarm(0, "clock_ms", due_ms if due_ms > self.now_ms else self.now_ms + LOOK_AGAIN_MS)]

    def on(self, chain_id: int) -> Heads:
        return self.heads.get(chain_id, Heads(chain_id))

    def _rules(self, transfer: PartnerTransfer) -> PartnerRules:
        return self.partners.get((transfer.brand, transfer.partner), PartnerRules())

    def _stands_for_ms(self, transfer: PartnerTransfer) -> int | None:
        """How long the record must be seen to stand before it is final; None: it will not be, as it is."""
        rules = self._rules(transfer)
        succeeded = transfer.status is Status.SUCCEEDED
        if transfer.partner == QIIBEE:
            return rules.settle_after_ms if succeeded and transfer.tx_hashes else None
        if transfer.partner != KEYBAN or (rules.require_success and not succeeded):
            return None
        # a closed ledger of Stellar is final (facts/keyban.md, section 10)
        stellar = (transfer.network or "").lower().startswith("stellar")
        return 0 if stellar else rules.finalized_after_ms

    def _final(self, transfer: PartnerTransfer) -> bool:
        after_ms = self._stands_for_ms(transfer)
        if after_ms is None:
            return False
        if after_ms == 0:
            return True
        # seen to stand, not left alone: a partner that nobody could ask in between has not confirmed anything
        return transfer.settled_ms is not None and transfer.seen_ms - transfer.settled_ms >= after_ms


def block_of(evidence: AnyEvidence) -> Block | None:
    place = evidence.place
    return None if place is None else (place.chain_id, place.block_number, bytes(place.block_hash))


def _rung(block_number: int, heads: Heads) -> Level:
    if block_number <= heads.finalized_number:
        return Level.FINALIZED
    return Level.SAFE if block_number <= heads.safe_number else Level.INCLUDED


def _confirmed_ms(policy: Policy, transfer: PartnerTransfer) -> int:
    """Block time of the head at which a looked-up transfer has so many seconds on top: from when we saw it, if that was later."""
    return max(transfer.time_ms, transfer.settled_ms or 0) + ceil(policy.seconds * 1000)
