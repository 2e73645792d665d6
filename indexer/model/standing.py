"""How final a piece of evidence is, whatever its source: a chain's ladder, or a partner's place on it.

Pure: a function of the evidence, the chains' heads, what is configured about a partner, and now. The partners' place is
design section 5, "Confidence of partners"; a rung is None where the evidence does not count yet at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from indexer.model.confidence import Alarm, Heads, Level, Policy, alarms_for, level_of, reached
from indexer.model.evidence import KEYBAN, QIIBEE, Movement, PartnerTransfer, Status

AnyEvidence = Movement | PartnerTransfer
LOOK_AGAIN_MS = 15_000  # it has stood long enough by the clock, and nobody has read it since


@dataclass(frozen=True, slots=True)
class PartnerRules:
    """What the configuration says about a brand's account at one partner. Times in milliseconds."""

    require_success: bool = False  # Keyban: finalized only where `success` is true
    finalized_after_ms: int | None = None  # Keyban, on a ledger that is neither Stellar nor followed; None: never
    settle_after_ms: int = 60_000  # qiibee: how long a successful transaction must stand unchanged


@dataclass(frozen=True)
class Standing:
    """Everything that the rungs depend on. `partners` by (brand, partner)."""

    heads: Mapping[int, Heads]
    partners: Mapping[tuple[str, str], PartnerRules] = field(default_factory=dict)
    now_ms: int = 0

    def level(self, evidence: AnyEvidence) -> Level | None:
        """The rung that evidence stands on now; None while it counts for nothing."""
        if isinstance(evidence, Movement):
            return level_of(evidence, self.on(evidence.chain_id))
        if not evidence.counts:
            return None
        if evidence.chain_id is not None:
            place = evidence.place
            return None if place is None else _rung(place.block_number, self.on(place.chain_id))
        return Level.FINALIZED if self._final(evidence) else Level.INCLUDED

    def reached(self, policy: Policy, evidence: AnyEvidence) -> bool:
        """Whether evidence is as final as the policy demands."""
        if isinstance(evidence, Movement):
            return reached(policy, evidence, self.on(evidence.chain_id))
        level = self.level(evidence)
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
        """When evidence that has not reached its policy should be looked at again: at the first of these."""
        if isinstance(evidence, Movement):
            return alarms_for(policy, evidence)
        if evidence.chain_id is not None:
            place = evidence.place
            if place is None:
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


def _rung(block_number: int, heads: Heads) -> Level:
    if block_number <= heads.finalized_number:
        return Level.FINALIZED
    return Level.SAFE if block_number <= heads.safe_number else Level.INCLUDED


def _confirmed_ms(policy: Policy, transfer: PartnerTransfer) -> int:
    """Block time of the head at which a looked-up transfer has so many seconds on top: from when we saw it, if that was later."""
    return max(transfer.time_ms, transfer.settled_ms or 0) + ceil(policy.seconds * 1000)
