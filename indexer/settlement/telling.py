"""What is told of an operation: the body of its signals, and what a person reads of it in `GET /v1/operations/{id}`.

Says what the facts of one pass say and decides nothing; which signals leave, and when, is the reconciler's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from indexer.model import signal as signals
from indexer.model.confidence import Level, Policy
from indexer.model.evidence import Hint, Movement, PartnerTransfer
from indexer.model.matching import Claim, Conflict, Matching
from indexer.model.operation import AnyLeg, Leg, State
from indexer.model.signal import Signal
from indexer.model.standing import AnyEvidence, Standing
from indexer.model.types import hex0x
from indexer.store.operations import Operation

Claims = Mapping[int, Claim | None]
NO_CONTRACT = "the points token's contract on this chain is not configured (brands.keyban.token)"


class Teller:
    """One pass's facts, in the words of the contract. `known` is all evidence of the pass by its identity."""

    def __init__(
        self,
        matching: Matching,
        known: Mapping[UUID, AnyEvidence],
        hints: Sequence[Hint],
        standing: Standing,
        explorers: Mapping[int, str],
    ) -> None:
        self.matching, self.known, self.hints = matching, known, hints
        self.standing, self.explorers = standing, explorers

    def signal(
        self,
        operation: Operation,
        kind: str,
        state: State,
        causes: Sequence[object],
        claims: Claims,
        supersedes: UUID | None = None,
        **extra: Any,
    ) -> Signal:
        if state is State.CONFLICT:
            extra["conflicts"] = self.conflicts(operation)
        if kind == signals.REVERTED:
            extra["lost"] = operation.detail.get("lost") or []
        return signals.operation_signal(
            kind=kind,
            operation_id=operation.id,
            brand=operation.brand,
            reference=operation.reference,
            status=state.value,
            generation=operation.generation,
            now_ms=self.standing.now_ms,
            causes=causes,
            legs=operation.request["legs"],
            metadata=operation.metadata,
            evidence=self.evidence(claims),
            supersedes=supersedes,
            extra=extra,
        )

    def evidence(self, claims: Claims) -> list[dict[str, Any]]:
        return [self._entry(index, claim) for index, claim in sorted(claims.items()) if claim is not None]

    def _entry(self, index: int, claim: Claim) -> dict[str, Any]:
        evidence = self.known[claim.evidence_id]
        level = self.standing.level(evidence)
        place = evidence.place
        explorer = self.explorers.get(place.chain_id) if place else None
        if isinstance(evidence, Movement):
            told = signals.evidence_json(evidence, index, claim.basis, claim.ambiguous, level, explorer)
        else:
            told = signals.partner_evidence_json(evidence, index, claim.basis, claim.ambiguous, level, explorer)
        if (held := self.standing.attestation(evidence)) is not None:
            told |= {"witnesses": held.witnesses}
            if isinstance(evidence, Movement):
                told |= {"proof": held.proof or "none"}
            if held.proof != "receipts_root" and held.reason is not None:
                told |= {"proofReason": held.reason}
        return told

    def conflicts(self, operation: Operation) -> list[dict[str, Any]]:
        """What a person can decide on: evidence that differs, that is held, or that is offered for want of a time."""
        told = []
        for leg in operation.legs:
            found = [self.matching.conflicts.get(leg.key), self.matching.held.get(leg.key)]
            told += [_conflict_json(leg, conflict) for conflict in found if conflict is not None]
            told += [_conflict_json(leg, offer) for offer in self.matching.offers.get(leg.key, [])]
        return told

    def rejections(self, leg: AnyLeg) -> list[dict[str, Any]]:
        """What partners call rejected, cancelled or failed about a leg that nothing settles: it ends nothing."""
        if isinstance(leg, Leg):
            until = leg.last_second
            return [
                {
                    "leg": leg.index,
                    "provider": hint.partner,
                    "recordId": hint.record_id,
                    "reason": hint.reason or "rejected",
                    "executableUntil": None if until is None else str(until),
                }
                for hint in self.about(leg)
                if hint.status == "rejected"
            ]
        failure = self.matching.failed.get(leg.key)
        if failure is None:
            return []
        return [
            {
                "leg": leg.index,
                "provider": failure.evidence.partner,
                "recordId": failure.evidence.record_id,
                "reason": "failed" if failure.evidence.status == "failed" else "refuted by the chain",
                "executableUntil": None,
            }
        ]

    def about(self, leg: Leg) -> list[Hint]:
        """The hints about a leg's action: by nonce, else by the hash that it waits under."""
        return sorted(
            (
                hint
                for hint in self.hints
                if hint.lane == leg.lane
                and (
                    hint.nonce == leg.nonce
                    if leg.nonce is not None
                    else leg.match == "operation_hash" and hint.operation_hash == leg.operation_hash
                )
            ),
            key=lambda hint: (hint.partner, hint.record_id),
        )

    def describe(self, operation: Operation, late: bool, claims: Claims, policies: Mapping[int, Policy]) -> None:
        """Writes evidence, conflicts and what is waited for into the operation's detail."""
        evidence = self.evidence(claims)
        conflicts = self.conflicts(operation)
        if late:  # evidence that settled after the operation was closed: a person accepts or dismisses it
            conflicts += [{**entry, "differences": [], "late": True} for entry in evidence]
        operation.detail = {
            "evidence": evidence,
            "conflicts": conflicts,
            "waitingFor": self._waiting(operation, claims, policies),
            "standing": operation.detail.get("standing") or [],
            "lost": operation.detail.get("lost") or [],
            "rejected": operation.detail.get("rejected") or [],
            "blocks": [
                where(self.known[claim.evidence_id]) for _, claim in sorted(claims.items()) if claim is not None
            ],
        }

    def _waiting(self, operation: Operation, claims: Claims, policies: Mapping[int, Policy]) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        for leg in operation.legs:
            claim, policy = claims[leg.index], policies[leg.index]
            demand: dict[str, Any] = {"leg": leg.index, "confidence": policy.level.word}
            if policy.level is Level.CONFIRMED:
                demand["seconds"] = policy.seconds
            if claim is not None:
                promised = operation.state in (State.READY, State.FULFILLED)
                evidence = self.known[claim.evidence_id]
                if not promised and not self.standing.reached(policy, evidence):
                    demand["for"] = "confidence"
                    if isinstance(evidence, PartnerTransfer) and evidence.lacks_contract:
                        demand["reason"] = NO_CONTRACT
                    elif (doubt := self.standing.doubt(evidence, policy.level)) is not None:
                        demand["reason"] = doubt
                    told.append(demand)
                continue
            undecided = (self.matching.held, self.matching.conflicts, self.matching.offers)
            demand["for"] = "decision" if any(leg.key in found for found in undecided) else "evidence"
            if rejections := self.rejections(leg):
                demand["rejected"] = [{k: entry[k] for k in ("provider", "recordId", "reason")} for entry in rejections]
            under_way = self.matching.submitted.get(leg.key)
            if under_way is not None:
                demand["submitted"] = {"provider": under_way.partner, "recordId": under_way.record_id}
            told.append(demand)
        return told


def where(evidence: AnyEvidence) -> dict[str, Any]:
    """What a promise rests on, and what a `reverted` names as lost: a block, or a partner's record as it has stood."""
    place = evidence.place
    if place is not None:
        return {
            "chainId": str(place.chain_id),
            "blockNumber": str(place.block_number),
            "blockHash": hex0x(place.block_hash),
        }
    assert isinstance(evidence, PartnerTransfer)
    return {
        "provider": evidence.partner,
        "recordId": evidence.record_id,
        "evidenceId": str(evidence.id),
        "settledAt": None if evidence.settled_ms is None else signals.instant(evidence.settled_ms),
    }


def _conflict_json(leg: AnyLeg, conflict: Conflict) -> dict[str, Any]:
    return {
        "leg": leg.index,
        **signals.terms_json(conflict.evidence),
        "differences": [
            {"term": term, "expected": ours, "found": theirs} for term, ours, theirs in conflict.differences
        ],
        "ambiguous": not conflict.differences,
    }
