"""What surrounds a batch of operations: their legs, their rivals' legs, and every fact that can bear on them.

Promises that whoever is looked at first, the picture that matching sees is the same: rivals, their evidence and the rivals of
those are followed until nothing new turns up. Partners' records are read by `partner_evidence.py`; nothing here decides.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg
import msgspec

from indexer.model.evidence import Hint, Movement, PartnerTransfer
from indexer.model.matching import Claim, Decision
from indexer.model.operation import AnyLeg, Leg, PartnerLeg, State
from indexer.model.standing import Attestation, Block
from indexer.model.types import Address, Hash32
from indexer.store import partner_evidence
from indexer.store.attestations import attestation_of
from indexer.store.connection import Connection
from indexer.store.operations import Operation


@dataclass(slots=True)
class Neighbourhood:
    """Everything that can bear on a batch of operations: their legs and their rivals' legs, evidence, claims, decisions."""

    operations: dict[UUID, Operation]
    legs: list[Leg]
    movements: list[Movement]
    claims: list[Claim]
    decisions: list[Decision]
    contested: set[tuple[UUID, int, UUID]]  # (operation, leg, evidence) that the rivals' records name as contested
    partner_legs: list[PartnerLeg] = field(default_factory=list)
    transfers: list[PartnerTransfer] = field(default_factory=list)
    hints: list[Hint] = field(default_factory=list)
    # what speaks for the movements' blocks, as it was when they were read or before: what a proof puts right commits with it
    attested: dict[Block, Attestation] = field(default_factory=dict)
    set_aside: list[Movement] = field(default_factory=list)  # canonical, and not to be matched for the time being


_LEG = """
    l.operation_id, l.leg, o.brand, l.kind, l.match, l.chain_id, l.factory, l.issuer, l.holder, l.loyalty_id, l.bucket, l.amount,
    l.deadline, l.nonce, l.operation_hash, l.released, (extract(epoch FROM l.requested_at) * 1000)::bigint AS requested_ms,
    (extract(epoch FROM o.registered_at) * 1000)::bigint AS registered_ms
"""
MOVEMENT = """
    m.chain_id, m.factory, m.kind, m.issuer, m.nonce, m.holder, m.loyalty_id, m.bucket, m.amount, m.operation_hash,
    m.block_number, m.block_hash, m.log_index, m.tx_hash, m.block_time_ms
"""


def _leg(row: asyncpg.Record) -> Leg:
    return Leg(
        operation_id=row["operation_id"],
        index=row["leg"],
        brand=row["brand"],
        kind=row["kind"],
        match=row["match"],
        chain_id=row["chain_id"],
        factory=Address(row["factory"]),
        issuer=Address(row["issuer"]),
        holder=Address(row["holder"]),
        loyalty_id=Hash32(row["loyalty_id"]),
        bucket=int(row["bucket"]),
        amount=int(row["amount"]),
        deadline=int(row["deadline"]),
        nonce=row["nonce"],
        operation_hash=row["operation_hash"],
        requested_at_ms=row["requested_ms"],
        registered_at_ms=row["registered_ms"],
        released=row["released"],
    )


def movement_of(row: asyncpg.Record) -> Movement:
    return Movement(
        chain_id=row["chain_id"],
        factory=Address(row["factory"]),
        kind=row["kind"],
        issuer=Address(row["issuer"]),
        nonce=Hash32(row["nonce"]),
        holder=Address(row["holder"]),
        loyalty_id=Hash32(row["loyalty_id"]),
        bucket=int(row["bucket"]),
        amount=int(row["amount"]),
        operation_hash=row["operation_hash"],
        block_number=row["block_number"],
        block_hash=Hash32(row["block_hash"]),
        log_index=row["log_index"],
        tx_hash=Hash32(row["tx_hash"]),
        time_ms=row["block_time_ms"],
    )


async def load(conn: Connection, ids: Sequence[UUID]) -> Neighbourhood:
    """The operations, and everything that matching needs around them (see model/matching.py)."""
    operations = {
        row["id"]: Operation(
            id=row["id"],
            brand=row["brand"],
            reference=row["reference"],
            request=row["request"],
            metadata=msgspec.Raw(row["metadata"].encode()),
            state=State(row["state"]),
            generation=row["generation"],
            registered_at_ms=row["registered_ms"],
            requested_at_ms=row["requested_ms"],
            requested_at_stated=row["requested_at_stated"],
            cancelled=row["cancelled_at"] is not None,
            detail=row["detail"],
            standing_signal=row["standing_signal"],
            finalized_generation=row["finalized_generation"],
        )
        for row in await conn.fetch(
            """
            SELECT id, brand, reference, request, metadata::text AS metadata, state, generation, requested_at_stated, cancelled_at, detail, standing_signal,
                   finalized_generation, (extract(epoch FROM registered_at) * 1000)::bigint AS registered_ms,
                   (extract(epoch FROM requested_at) * 1000)::bigint AS requested_ms
            FROM indexer.operation WHERE id = ANY($1::uuid[])
            """,
            ids,
        )
    }
    for row in await conn.fetch(
        """
        SELECT r.operation_id, r.generation, r.outcome, (extract(epoch FROM r.recorded_at) * 1000)::bigint AS at_ms,
               (SELECT (extract(epoch FROM min(d.ended_at)) * 1000)::bigint FROM indexer.delivery d
                WHERE d.signal_id = o.standing_signal AND d.state = 'delivered') AS delivered_ms
        FROM indexer.receipt r JOIN indexer.operation o ON o.id = r.operation_id
        WHERE r.operation_id = ANY($1::uuid[]) ORDER BY r.recorded_at
        """,  # delivery_signal_idx
        ids,
    ):
        operation = operations[row["operation_id"]]
        operation.receipts[row["generation"]] = row["outcome"]
        operation.fulfilled_at_ms, operation.delivered_at_ms = row["at_ms"], row["delivered_ms"]

    legs = {leg.key: leg for leg in await _legs_of(conn, ids)}
    partner_legs = {leg.key: leg for leg in await partner_evidence.partner_legs_of(conn, ids)}
    own: list[AnyLeg] = [*legs.values(), *partner_legs.values()]
    for leg in sorted(own, key=lambda leg: leg.index):
        operations[leg.operation_id].legs.append(leg)
    hints = await partner_evidence.hints_for(conn, list(legs.values())) if legs else []
    transfers: list[PartnerTransfer] = []
    if partner_legs:
        # a group names everything that can bear on its legs: nothing further turns up
        groups = {leg.group for leg in partner_legs.values()}
        partner_legs |= {leg.key: leg for leg in await partner_evidence.rival_legs(conn, groups)}
        transfers = await partner_evidence.transfers_for(conn, groups, ids)
    # Rivals, their events, the rivals of those, until nothing new turns up: whoever is looked at first, the picture that
    # matching sees is the same. Other lanes are left out, so that copied nonces and hashes join nothing together.
    movements: dict[tuple[int, Hash32, int], Movement] = {}
    attested: dict[Block, Attestation] = {}
    fresh = list(legs.values())
    while fresh:
        lanes = {leg.lane for leg in legs.values()}
        found = {
            (m.chain_id, m.block_hash, m.log_index): m
            for m in await _movements_for(conn, fresh, attested)
            if m.lane in lanes
        }
        new = [m for key, m in found.items() if key not in movements]
        movements |= found
        rivals = {leg.key: leg for leg in await _rivals(conn, new, fresh) if leg.lane in lanes}
        fresh = [leg for key, leg in rivals.items() if key not in legs]
        legs |= rivals
    keys = list({key[0] for key in [*legs, *partner_legs]})
    claims = await _claims_of(conn, keys, [*(m.id for m in movements.values()), *(t.id for t in transfers)])
    decisions = [
        Decision(row["operation_id"], row["evidence_id"], row["leg"], row["accept"])
        for row in await conn.fetch(
            """
            SELECT operation_id, evidence_id, leg, accept FROM indexer.decision
            WHERE operation_id = ANY($1::uuid[]) ORDER BY decided_at, id
            """,
            keys,
        )
    ]
    contested = await _contested_by(conn, [key for key in keys if key not in operations])
    return Neighbourhood(
        operations,
        list(legs.values()),
        list(movements.values()),
        claims,
        decisions,
        contested,
        list(partner_legs.values()),
        transfers,
        hints,
        attested,
    )


async def _legs_of(conn: Connection, ids: Sequence[UUID]) -> list[Leg]:
    rows = await conn.fetch(
        f"SELECT {_LEG} FROM indexer.leg l JOIN indexer.operation o ON o.id = l.operation_id WHERE l.operation_id = ANY($1::uuid[]) AND l.chain_id IS NOT NULL",  # noqa: S608
        ids,
    )
    return [_leg(row) for row in rows]


async def _movements_for(
    conn: Connection, legs: Sequence[Leg], attested: dict[Block, Attestation] | None = None
) -> list[Movement]:
    """Canonical movements by nonce (movement_nonce_idx), hash (movement_operation_hash_idx) or wallet (movement_holder_idx). What
    speaks for their blocks (attestation_pk) goes into `attested`, out of the same statement, and so as old as they are."""
    wallets = [leg for leg in legs if leg.match == "wallet_amount"]
    rows = await conn.fetch(
        f"""
        SELECT m.*, a.witnesses, a.proof, a.reason, a.next_at IS NOT NULL AS open FROM (
        SELECT {MOVEMENT} FROM indexer.movement m WHERE m.canonical AND m.nonce = ANY($1::bytea[])
        UNION ALL
        SELECT {MOVEMENT} FROM indexer.movement m WHERE m.canonical AND m.operation_hash = ANY($2::bytea[])
        UNION ALL
        SELECT {MOVEMENT} FROM unnest($3::bytea[], $4::bytea[], $5::numeric[], $6::numeric[]) AS w (holder, loyalty_id, bucket, amount)
        JOIN indexer.movement m ON m.holder = w.holder AND m.loyalty_id = w.loyalty_id AND m.bucket = w.bucket AND m.amount = w.amount
        WHERE m.canonical
        ) AS m LEFT JOIN indexer.attestation a ON a.chain_id = m.chain_id AND a.number = m.block_number AND a.hash = m.block_hash
        """,  # noqa: S608
        [leg.nonce for leg in legs if leg.nonce is not None],
        [leg.operation_hash for leg in legs if leg.match == "operation_hash"],
        [leg.holder for leg in wallets],
        [leg.loyalty_id for leg in wallets],
        [leg.bucket for leg in wallets],
        [leg.amount for leg in wallets],
    )
    if attested is not None:
        for row in rows:
            attested.setdefault((row["chain_id"], row["block_number"], row["block_hash"]), attestation_of(row))
    return [movement_of(row) for row in rows]


async def evidence_beside(conn: Connection, leg: Leg, known: Collection[Movement]) -> bool:
    """Whether a canonical movement that can bear on the leg is there and not among the known: it came since they were read."""
    places = {(m.chain_id, m.block_hash, m.log_index) for m in known}
    found = [m for m in await _movements_for(conn, [leg]) if m.lane == leg.lane]
    return any((m.chain_id, m.block_hash, m.log_index) not in places for m in found)


async def _rivals(conn: Connection, movements: Sequence[Movement], legs: Sequence[Leg]) -> list[Leg]:
    """Legs that these movements could settle (leg_any_nonce_idx, leg_operation_hash_idx, leg_wallet_idx) or are claimed for
    (claim_evidence_id_key), and legs that wait under the same hash or for the same wallet and amount."""
    hashes = {m.operation_hash for m in movements if m.operation_hash}
    hashes |= {leg.operation_hash for leg in legs if leg.operation_hash and leg.match == "operation_hash"}
    wallets = {(m.holder, m.loyalty_id, m.bucket, m.amount) for m in movements}
    wallets |= {(leg.holder, leg.loyalty_id, leg.bucket, leg.amount) for leg in legs if leg.match == "wallet_amount"}
    if not movements and not hashes and not wallets:
        return []
    rows = await conn.fetch(
        f"""
        SELECT {_LEG} FROM indexer.leg l JOIN indexer.operation o ON o.id = l.operation_id WHERE l.nonce = ANY($1::bytea[])
        UNION
        SELECT {_LEG} FROM indexer.leg l JOIN indexer.operation o ON o.id = l.operation_id
            WHERE l.operation_hash = ANY($2::bytea[]) AND l.match = 'operation_hash'
        UNION
        SELECT {_LEG} FROM unnest($3::bytea[], $4::bytea[], $5::numeric[], $6::numeric[]) AS w (holder, loyalty_id, bucket, amount)
            JOIN indexer.leg l ON l.holder = w.holder AND l.amount = w.amount AND l.match = 'wallet_amount'
                AND l.loyalty_id = w.loyalty_id AND l.bucket = w.bucket
            JOIN indexer.operation o ON o.id = l.operation_id
        UNION
        SELECT {_LEG} FROM indexer.claim c JOIN indexer.leg l ON l.operation_id = c.operation_id AND l.leg = c.leg
            JOIN indexer.operation o ON o.id = l.operation_id WHERE c.evidence_id = ANY($7::uuid[])
        """,  # noqa: S608
        list({m.nonce for m in movements}),
        list(hashes),
        [wallet[0] for wallet in wallets],
        [wallet[1] for wallet in wallets],
        [wallet[2] for wallet in wallets],
        [wallet[3] for wallet in wallets],
        [m.id for m in movements],
    )
    return [_leg(row) for row in rows]


async def _contested_by(conn: Connection, operations: Sequence[UUID]) -> set[tuple[UUID, int, UUID]]:
    """The conflicts in the records of these operations, but for evidence that only came late (operation_pk)."""
    if not operations:
        return set()
    rows = await conn.fetch(
        """
        SELECT o.id, (e ->> 'leg')::int AS leg, (e ->> 'evidenceId')::uuid AS evidence_id
        FROM indexer.operation o, jsonb_array_elements(coalesce(o.detail -> 'conflicts', '[]')) AS e
        WHERE o.id = ANY($1::uuid[]) AND NOT e ? 'late'
        """,
        operations,
    )
    return {(row["id"], row["leg"], row["evidence_id"]) for row in rows}


async def _claims_of(conn: Connection, operations: Sequence[UUID], evidence: Sequence[UUID]) -> list[Claim]:
    rows = await conn.fetch(
        """
        SELECT operation_id, leg, evidence_id, basis, ambiguous, final FROM indexer.claim WHERE operation_id = ANY($1::uuid[])
        UNION
        SELECT operation_id, leg, evidence_id, basis, ambiguous, final FROM indexer.claim WHERE evidence_id = ANY($2::uuid[])
        """,
        operations,
        evidence,
    )
    return [
        Claim((row["operation_id"], row["leg"]), row["evidence_id"], row["basis"], row["ambiguous"], row["final"])
        for row in rows
    ]
