"""Signals: their types, their derived ids, and the payload that leaves the house (design, section 8).

An id is a function of (operation, generation, type, cause), so computing twice cannot make a second signal. Numbers that
can pass 2^53 travel as decimal strings, bytes as lower-case 0x hex, times as RFC 3339 UTC.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid5

from indexer.model.confidence import Level
from indexer.model.evidence import Movement, PartnerTransfer
from indexer.model.operation import State
from indexer.model.types import hex0x

READY = "operation.ready"
REVERTED = "operation.reverted"
REJECTED = "operation.rejected"
RESTORED = "operation.restored"
FULFILLED = "operation.fulfilled"
FINALIZED = "operation.finalized"
UNMATCHED = "settlement.unmatched"
HINTS = frozenset({"operation.submitted", "operation.confirming", REJECTED})

# The signal of entering a state; `ready` and `fulfilled` have their own rules in the reconciler.
OF_STATE: dict[State, str] = {
    State.SUBMITTED: "operation.submitted",
    State.CONFIRMING: "operation.confirming",
    State.EXPIRED: "operation.expired",
    State.INCOMPLETE: "operation.incomplete",
    State.CONFLICT: "operation.conflict",
    State.CANCELLED: "operation.cancelled",
}


@dataclass(frozen=True, slots=True)
class Signal:
    """A row of the outbox, before it has its number."""

    id: UUID
    brand: str
    aggregatetype: str  # operation | evidence
    aggregateid: UUID
    type: str
    payload: dict[str, Any]
    generation: int = 0
    supersedes: UUID | None = None


def signal_id(operation_id: UUID, generation: int, kind: str, causes: Iterable[object]) -> UUID:
    """UUIDv5 in the operation's own namespace; `causes` are the identities of the evidence or decisions behind it."""
    return uuid5(operation_id, f"{generation}:{kind}:" + ",".join(sorted(str(cause) for cause in causes)))


def unmatched_id(evidence: UUID) -> UUID:
    return uuid5(evidence, UNMATCHED)


def instant(milliseconds: int) -> str:
    """RFC 3339 UTC, to the millisecond where there is one."""
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    text = moment.isoformat(timespec="milliseconds" if milliseconds % 1000 else "seconds")
    return text.replace("+00:00", "Z")


def evidence_json(
    movement: Movement, leg: int, basis: str, ambiguous: bool, level: Level | None, explorer: str | None = None
) -> dict[str, Any]:
    """One entry of `evidence`. `confidence` is null while too few endpoints were seen to hold its block."""
    return {
        "leg": leg,
        "evidenceId": str(movement.id),
        "basis": basis,
        "ambiguous": ambiguous,
        "confidence": level.word if level else None,
        "chainId": str(movement.chain_id),
        "blockNumber": str(movement.block_number),
        "blockHash": hex0x(movement.block_hash),
        "blockTime": instant(movement.time_ms),
        "txHash": hex0x(movement.tx_hash),
        "logIndex": movement.log_index,
        "explorerUrl": f"{explorer.rstrip('/')}/tx/{hex0x(movement.tx_hash)}" if explorer else None,
    }


def partner_evidence_json(
    transfer: PartnerTransfer, leg: int, basis: str, ambiguous: bool, level: Level | None, explorer: str | None = None
) -> dict[str, Any]:
    """One entry of `evidence` from a partner's records. `confidence` is null while our own look at its chain is missing;
    `proof` says on whose word it stands."""
    place = transfer.place
    hashes = list(transfer.tx_hashes)
    return {
        "leg": leg,
        "evidenceId": str(transfer.id),
        "basis": basis,
        "ambiguous": ambiguous,
        "confidence": level.word if level else None,
        "provider": transfer.partner,
        "recordId": transfer.record_id,
        "network": transfer.network,
        "status": transfer.status.value,
        "proof": "chain" if place else "partner",
        "chainId": str(place.chain_id) if place else None,
        "blockNumber": str(place.block_number) if place else _decimal(transfer.block_number),
        "blockHash": hex0x(place.block_hash) if place else None,
        "recordTime": instant(transfer.time_ms),
        "txHash": hashes[0] if hashes else None,
        "txHashes": hashes,
        "explorerUrl": f"{explorer.rstrip('/')}/tx/{hashes[0]}" if explorer and place and hashes else None,
    }


def transfer_json(transfer: PartnerTransfer) -> dict[str, Any]:
    """The terms of a partner's record, for what is held, offered or unmatched."""
    return {
        "evidenceId": str(transfer.id),
        "kind": transfer.kind,
        "provider": transfer.partner,
        "recordId": transfer.record_id,
        "walletId": transfer.wallet,
        "token": transfer.token,
        "amount": _decimal(transfer.amount),
        "status": transfer.status.value,
        "undated": transfer.undated,
        "network": transfer.network,
        "blockNumber": _decimal(transfer.block_number),
        "recordTime": None if transfer.undated else instant(transfer.time_ms),
        "txHash": transfer.tx_hashes[0] if transfer.tx_hashes else None,
    }


def terms_json(evidence: Movement | PartnerTransfer) -> dict[str, Any]:
    return movement_json(evidence) if isinstance(evidence, Movement) else transfer_json(evidence)


def _decimal(number: int | None) -> str | None:
    return None if number is None else str(number)


def movement_json(movement: Movement) -> dict[str, Any]:
    """The terms of an event, for conflicts and unmatched evidence."""
    return {
        "evidenceId": str(movement.id),
        "kind": movement.kind,
        "chainId": str(movement.chain_id),
        "factory": hex0x(movement.factory),
        "issuer": hex0x(movement.issuer),
        "holder": hex0x(movement.holder),
        "loyaltyId": hex0x(movement.loyalty_id),
        "expiresAt": str(movement.bucket),
        "amount": str(movement.amount),
        "nonce": hex0x(movement.nonce),
        "operationHash": hex0x(movement.operation_hash) if movement.operation_hash else None,
        "blockNumber": str(movement.block_number),
        "blockHash": hex0x(movement.block_hash),
        "blockTime": instant(movement.time_ms),
        "txHash": hex0x(movement.tx_hash),
        "logIndex": movement.log_index,
    }


def operation_signal(
    *,
    kind: str,
    operation_id: UUID,
    brand: str,
    reference: str,
    status: str,
    generation: int,
    now_ms: int,
    causes: Iterable[object],
    legs: list[dict[str, Any]],
    metadata: object,
    evidence: list[dict[str, Any]],
    supersedes: UUID | None = None,
    extra: dict[str, Any] | None = None,
) -> Signal:
    """A signal about an operation. The sequencer adds `stream` and `sequence` when it numbers it. `metadata` is whatever the
    caller's encoder writes out: a brand's numbers are not ours to read."""
    identity = signal_id(operation_id, generation, kind, causes)
    data = {
        "id": str(identity),
        "brand": brand,
        "generation": generation,
        "supersedes": str(supersedes) if supersedes else None,
        "operation": {
            "id": str(operation_id),
            "reference": reference,
            "status": status,
            "legs": legs,
            "metadata": metadata,
        },
        "evidence": evidence,
        **(extra or {}),
    }
    payload = {"type": kind, "timestamp": instant(now_ms), "data": data}
    return Signal(identity, brand, "operation", operation_id, kind, payload, generation, supersedes)


def unmatched_signal(evidence: Movement | PartnerTransfer, brand: str, now_ms: int) -> Signal:
    """Evidence of a brand's issuer or wallets that no operation claims."""
    identity = unmatched_id(evidence.id)
    data = {
        "id": str(identity),
        "brand": brand,
        "generation": 0,
        "supersedes": None,
        "evidence": [terms_json(evidence)],
    }
    payload = {"type": UNMATCHED, "timestamp": instant(now_ms), "data": data}
    return Signal(identity, brand, "evidence", evidence.id, UNMATCHED, payload)
