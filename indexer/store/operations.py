"""Operations as the reconciler reads and writes them: what was touched, the facts around it, and the new state.

Every function takes the connection of a leased transaction and neither begins nor commits. Nothing here decides: matching
and states are the model's. Other writers reach operations only through schema `loyalty`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import asyncpg

from indexer.model.confidence import Alarm, Heads
from indexer.model.evidence import Movement
from indexer.model.matching import Claim, Decision
from indexer.model.operation import Leg, State
from indexer.model.types import Address, Hash32, Schedule
from indexer.store.connection import Connection


@dataclass(slots=True)
class Operation:
    """An operation as stored, with its own legs."""

    id: UUID
    brand: str
    reference: str
    request: dict[str, Any]
    metadata: dict[str, Any]
    state: State
    generation: int
    registered_at_ms: int
    requested_at_ms: int
    requested_at_stated: bool
    cancelled: bool
    detail: dict[str, Any]
    standing_signal: UUID | None
    finalized_generation: int
    receipts: dict[int, str] = field(default_factory=dict)  # generation → outcome
    fulfilled_at_ms: int | None = None  # of the last receipt
    delivered_at_ms: int | None = None  # first delivery of the standing signal, where there is a receipt
    legs: list[Leg] = field(default_factory=list)


@dataclass(slots=True)
class Neighbourhood:
    """Everything that can bear on a batch of operations: their legs and their rivals' legs, movements, claims, decisions."""

    operations: dict[UUID, Operation]
    legs: list[Leg]
    movements: list[Movement]
    claims: list[Claim]
    decisions: list[Decision]
    contested: set[tuple[UUID, int, UUID]]  # (operation, leg, evidence) that the rivals' records name as contested


@dataclass(frozen=True, slots=True)
class StoredClaim:
    claim: Claim
    movement: Movement


@dataclass(frozen=True, slots=True)
class HistoryRow:
    operation_id: UUID
    from_state: State
    to_state: State
    generation: int
    cause: str
    detail: dict[str, Any]


@dataclass(slots=True)
class Changes:
    """What one pass of the reconciler writes, all in one transaction."""

    operations: list[Operation] = field(default_factory=list)
    moved: set[UUID] = field(default_factory=set)  # whose state changed: state_at is set anew
    unclaimed: list[tuple[UUID, int]] = field(default_factory=list)
    claimed: list[StoredClaim] = field(default_factory=list)
    released: list[UUID] = field(default_factory=list)
    history: list[HistoryRow] = field(default_factory=list)
    alarms: dict[UUID, list[Alarm]] = field(default_factory=dict)
    touched: set[UUID] = field(default_factory=set)  # neighbours that must be looked at again


async def now_ms(conn: Connection) -> int:
    """The database's clock, Unix milliseconds: the only clock that leases, alarms and transitions go by."""
    return int(await conn.fetchval("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint"))


async def heads(conn: Connection) -> dict[int, Heads]:
    rows = await conn.fetch(
        """
        SELECT c.chain_id, c.head_number, c.head_time_ms, c.safe_number, c.finalized_number, c.finalized_time_ms,
               c.latch IS NOT NULL AS latched, indexer.is_live(c) AS live
        FROM indexer.chain c
        """
    )
    return {
        row["chain_id"]: Heads(
            row["chain_id"],
            _or(row["head_number"], -1),
            _or(row["head_time_ms"], 0),
            _or(row["safe_number"], -1),
            _or(row["finalized_number"], -1),
            _or(row["finalized_time_ms"], 0),
            row["latched"],
            row["live"],
        )
        for row in rows
    }


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


# --------------------------------------------------------------------------- what to look at


async def spread_touched_blocks(conn: Connection, limit: int = 100) -> int:
    """Turns ranges of blocks whose facts came or went into operations to look at. Returns how many ranges were taken.

    movement_pk serves the range; leg_any_nonce_idx, leg_operation_hash_idx and leg_wallet_idx the joins; claim_log_idx the
    claims that the range holds (their event may be gone); OFFSET 0 keeps each look-up one, where the planner, which cannot know
    how short the ranges are, would rather read the tables from end to end. Evidence that arrives below the cursor of unmatched evidence and
    is new enough to be signalled moves that cursor back: the signal's id is derived, so looking twice sends nothing twice.
    """
    rows = await conn.fetch(
        """
        DELETE FROM indexer.touched_blocks WHERE id IN (
            SELECT id FROM indexer.touched_blocks ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED)
        RETURNING chain_id, from_block, to_block
        """,
        limit,
    )
    if not rows:
        return 0
    ranges = (
        [row["chain_id"] for row in rows],
        [row["from_block"] for row in rows],
        [row["to_block"] for row in rows],
    )
    await conn.execute(
        """
        WITH ranges AS (SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS r (chain_id, low, high)),
        seen AS MATERIALIZED (
            SELECT DISTINCT m.* FROM ranges r CROSS JOIN LATERAL (
                SELECT m.chain_id, m.factory, m.kind, m.issuer, m.nonce, m.operation_hash, m.holder, m.amount
                FROM indexer.movement m WHERE m.chain_id = r.chain_id AND m.block_number BETWEEN r.low AND r.high OFFSET 0) AS m)
        INSERT INTO indexer.touched_operation (operation_id)
        SELECT l.operation_id FROM seen m CROSS JOIN LATERAL (
            SELECT l.operation_id FROM indexer.leg l
            WHERE l.nonce = m.nonce AND l.chain_id = m.chain_id AND l.factory = m.factory AND l.kind = m.kind AND l.issuer = m.issuer
            OFFSET 0) AS l
        UNION SELECT l.operation_id FROM seen m CROSS JOIN LATERAL (
            SELECT l.operation_id FROM indexer.leg l
            WHERE l.operation_hash = m.operation_hash AND l.chain_id = m.chain_id AND l.factory = m.factory AND l.kind = m.kind
              AND l.issuer = m.issuer AND l.match = 'operation_hash' OFFSET 0) AS l
        UNION SELECT l.operation_id FROM seen m CROSS JOIN LATERAL (
            SELECT l.operation_id FROM indexer.leg l
            WHERE l.holder = m.holder AND l.amount = m.amount AND l.chain_id = m.chain_id AND l.factory = m.factory AND l.kind = m.kind
              AND l.issuer = m.issuer AND l.match = 'wallet_amount' OFFSET 0) AS l
        UNION SELECT c.operation_id FROM ranges r CROSS JOIN LATERAL (
            SELECT c.operation_id FROM indexer.claim c
            WHERE c.chain_id = r.chain_id AND c.block_number BETWEEN r.low AND r.high OFFSET 0) AS c
        """,
        *ranges,
    )
    await conn.execute(
        """
        UPDATE indexer.chain c SET unmatched_cursor = r.low - 1
        FROM (SELECT chain_id, min(low) AS low FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS r (chain_id, low, high)
              WHERE EXISTS (SELECT 1 FROM indexer.movement m WHERE m.chain_id = r.chain_id AND m.block_number BETWEEN r.low AND r.high
                            AND m.block_time_ms >= (SELECT extract(epoch FROM min(unmatched_since)) * 1000 FROM indexer.brand))
              GROUP BY chain_id) AS r
        WHERE c.chain_id = r.chain_id AND c.unmatched_cursor >= r.low
        """,
        *ranges,
    )
    return len(rows)


async def ring_alarms(conn: Connection, chains: Iterable[Heads], clock_ms: int, limit: int = 500) -> int:
    """Moves operations whose alarms are due to `touched_operation`. alarm_due_idx: only what is due is read."""
    axes: list[tuple[int, str, int]] = [(0, "clock_ms", clock_ms)]
    for chain in chains:
        axes += [
            (chain.chain_id, "head_time_ms", chain.head_time_ms),
            (chain.chain_id, "safe_number", chain.safe_number),
            (chain.chain_id, "finalized_number", chain.finalized_number),
            (chain.chain_id, "finalized_time_ms", chain.finalized_time_ms),
        ]
    status = await conn.execute(
        """
        WITH due AS (
            SELECT a.operation_id, a.chain_id, a.axis
            FROM unnest($1::bigint[], $2::text[], $3::bigint[]) AS h (chain_id, axis, value)
            CROSS JOIN LATERAL (
                SELECT operation_id, chain_id, axis FROM indexer.alarm a
                WHERE a.chain_id = h.chain_id AND a.axis = h.axis AND a.threshold <= h.value
                ORDER BY a.threshold LIMIT $4) AS a),
        gone AS (
            DELETE FROM indexer.alarm a USING due
            WHERE a.operation_id = due.operation_id AND a.chain_id = due.chain_id AND a.axis = due.axis
            RETURNING a.operation_id)
        INSERT INTO indexer.touched_operation (operation_id) SELECT DISTINCT operation_id FROM gone
        """,
        [axis[0] for axis in axes],
        [axis[1] for axis in axes],
        [axis[2] for axis in axes],
        limit,
    )
    return int(status.rsplit(" ", 1)[1])


async def take_touched(conn: Connection, limit: int = 200) -> list[UUID]:
    """Locks operations that were touched, oldest touch first, leaving those that somebody else holds.

    The rows of the queue go before any fact is read, so a touch that commits later stays. NO KEY UPDATE: a registration or
    receipt that only refers to the operation does not stand in the way.
    """
    rows = await conn.fetch(
        """
        SELECT o.id FROM indexer.touched_operation t JOIN indexer.operation o ON o.id = t.operation_id
        ORDER BY t.id LIMIT $1 FOR NO KEY UPDATE OF o SKIP LOCKED
        """,
        limit,
    )
    ids = list(dict.fromkeys(row["id"] for row in rows))
    if ids:
        # touched_operation_operation_idx
        await conn.execute("DELETE FROM indexer.touched_operation WHERE operation_id = ANY($1::uuid[])", ids)
    return ids


async def touch(conn: Connection, ids: Iterable[UUID]) -> None:
    await conn.execute("INSERT INTO indexer.touched_operation (operation_id) SELECT unnest($1::uuid[])", list(ids))


# --------------------------------------------------------------------------- facts

_LEG = """
    l.operation_id, l.leg, o.brand, l.kind, l.match, l.chain_id, l.factory, l.issuer, l.holder, l.loyalty_id, l.bucket, l.amount,
    l.deadline, l.nonce, l.operation_hash, l.released, (extract(epoch FROM l.requested_at) * 1000)::bigint AS requested_ms,
    (extract(epoch FROM o.registered_at) * 1000)::bigint AS registered_ms
"""
_MOVEMENT = """
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
            metadata=row["metadata"],
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
            SELECT id, brand, reference, request, metadata, state, generation, requested_at_stated, cancelled_at, detail, standing_signal,
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
    for leg in sorted(legs.values(), key=lambda leg: leg.index):
        operations[leg.operation_id].legs.append(leg)
    # Rivals, their events, the rivals of those, until nothing new turns up: whoever is looked at first, the picture that
    # matching sees is the same. Other lanes are left out, so that copied nonces and hashes join nothing together.
    movements: dict[tuple[int, Hash32, int], Movement] = {}
    fresh = list(legs.values())
    while fresh:
        lanes = {leg.lane for leg in legs.values()}
        found = {
            (m.chain_id, m.block_hash, m.log_index): m for m in await _movements_for(conn, fresh) if m.lane in lanes
        }
        new = [m for key, m in found.items() if key not in movements]
        movements |= found
        rivals = {leg.key: leg for leg in await _rivals(conn, new, fresh) if leg.lane in lanes}
        fresh = [leg for key, leg in rivals.items() if key not in legs]
        legs |= rivals
    keys = list({key[0] for key in legs})
    claims = await _claims_of(conn, keys, [m.id for m in movements.values()])
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
    return Neighbourhood(operations, list(legs.values()), list(movements.values()), claims, decisions, contested)


async def _legs_of(conn: Connection, ids: Sequence[UUID]) -> list[Leg]:
    rows = await conn.fetch(
        f"SELECT {_LEG} FROM indexer.leg l JOIN indexer.operation o ON o.id = l.operation_id WHERE l.operation_id = ANY($1::uuid[])",  # noqa: S608
        ids,
    )
    return [_leg(row) for row in rows]


async def _movements_for(conn: Connection, legs: Sequence[Leg]) -> list[Movement]:
    """Canonical movements by nonce (movement_nonce_idx), hash (movement_operation_hash_idx) or wallet (movement_holder_idx)."""
    wallets = [leg for leg in legs if leg.match == "wallet_amount"]
    rows = await conn.fetch(
        f"""
        SELECT {_MOVEMENT} FROM indexer.movement m WHERE m.canonical AND m.nonce = ANY($1::bytea[])
        UNION ALL
        SELECT {_MOVEMENT} FROM indexer.movement m WHERE m.canonical AND m.operation_hash = ANY($2::bytea[])
        UNION ALL
        SELECT {_MOVEMENT} FROM unnest($3::bytea[], $4::bytea[], $5::numeric[], $6::numeric[]) AS w (holder, loyalty_id, bucket, amount)
        JOIN indexer.movement m ON m.holder = w.holder AND m.loyalty_id = w.loyalty_id AND m.bucket = w.bucket AND m.amount = w.amount
        WHERE m.canonical
        """,  # noqa: S608
        [leg.nonce for leg in legs if leg.nonce is not None],
        [leg.operation_hash for leg in legs if leg.match == "operation_hash"],
        [leg.holder for leg in wallets],
        [leg.loyalty_id for leg in wallets],
        [leg.bucket for leg in wallets],
        [leg.amount for leg in wallets],
    )
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


async def watched_since(conn: Connection, legs: Sequence[Leg]) -> dict[tuple[UUID, int], tuple[list[bytes], int]]:
    """For each leg, the emitters that could have spoken for it and the factory's start block (for expiry).

    These are the factory, every hub that may speak for it (one that is a factory of its own, too: emitter_role_pk), and the
    programme's token (programme_issuer_idx).
    """
    rows = await conn.fetch(
        """
        WITH wanted AS (
            SELECT l.* FROM unnest($1::uuid[], $2::int[]) AS w (operation_id, leg)
            JOIN indexer.leg l ON l.operation_id = w.operation_id AND l.leg = w.leg
        ), watched AS (
            SELECT l.operation_id, l.leg, r.address, r.start_block, r.address = r.factory AS is_factory
            FROM wanted l JOIN indexer.emitter_role r ON r.chain_id = l.chain_id AND r.factory = l.factory
            JOIN indexer.emitter e ON e.chain_id = r.chain_id AND e.address = r.address AND e.active
            UNION
            SELECT l.operation_id, l.leg, e.address, NULL, false
            FROM wanted l JOIN indexer.programme p ON p.chain_id = l.chain_id AND p.issuer = l.issuer AND p.loyalty_id = l.loyalty_id
                AND p.factory = l.factory AND p.canonical
            JOIN indexer.emitter e ON e.chain_id = p.chain_id AND e.address = p.loyalty AND e.active
        )
        SELECT operation_id, leg, array_agg(DISTINCT address) AS emitters, min(start_block) FILTER (WHERE is_factory) AS start_block
        FROM watched GROUP BY operation_id, leg HAVING bool_or(is_factory)
        """,
        [leg.operation_id for leg in legs],
        [leg.index for leg in legs],
    )
    return {(row["operation_id"], row["leg"]): (row["emitters"], row["start_block"] or 0) for row in rows}


async def highest_time_ms(conn: Connection, chain_id: int, number: int) -> int | None:
    """Time of the highest canonical header that we hold at or below a number (block_canonical_idx)."""
    found: int | None = await conn.fetchval(
        """
        SELECT time_ms FROM indexer.block WHERE chain_id = $1 AND canonical AND number <= $2 ORDER BY number DESC LIMIT 1
        """,
        chain_id,
        number,
    )
    return found


async def first_block_since(conn: Connection, chain_id: int, time_ms: int) -> int | None:
    """By the chain's schedule, the first block not before a time; None where the chain has no schedule."""
    schedule = await conn.fetchval("SELECT schedule FROM indexer.chain WHERE chain_id = $1", chain_id)
    if schedule is None:
        return None
    return Schedule(schedule["l2_time"], schedule["first_fast_block"]).first_block_at_or_after(time_ms)


# --------------------------------------------------------------------------- writing


async def store(conn: Connection, changes: Changes) -> None:
    """Writes what the pass decided. Claims that go, go first, so that a neighbour can take their evidence at once."""
    if changes.unclaimed:
        await conn.executemany("DELETE FROM indexer.claim WHERE operation_id = $1 AND leg = $2", changes.unclaimed)
    if changes.claimed:
        await conn.executemany(
            """
            INSERT INTO indexer.claim
                (operation_id, leg, evidence_id, chain_id, block_number, log_index, block_hash, basis, ambiguous, final)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
            ON CONFLICT (operation_id, leg) DO UPDATE SET evidence_id = excluded.evidence_id, block_number = excluded.block_number,
                log_index = excluded.log_index, block_hash = excluded.block_hash, basis = excluded.basis,
                ambiguous = excluded.ambiguous, final = excluded.final, claimed_at = clock_timestamp()
            """,
            [
                (*c.claim.leg, c.claim.evidence_id, c.movement.chain_id, c.movement.block_number, c.movement.log_index,
                 c.movement.block_hash, c.claim.basis, c.claim.ambiguous, c.claim.final)
                for c in changes.claimed
            ],
        )  # fmt: skip
    if changes.operations:
        await conn.executemany(
            """
            UPDATE indexer.operation SET state = $2, generation = $3, detail = $4, standing_signal = $5, finalized_generation = $6,
                   state_at = CASE WHEN $7 THEN clock_timestamp() ELSE state_at END
            WHERE id = $1
            """,
            [
                (
                    o.id,
                    o.state.value,
                    o.generation,
                    o.detail,
                    o.standing_signal,
                    o.finalized_generation,
                    o.id in changes.moved,
                )
                for o in changes.operations
            ],
        )
    if changes.released:
        await conn.execute(
            "UPDATE indexer.leg SET released = true WHERE operation_id = ANY($1::uuid[])", changes.released
        )
    if changes.history:
        await conn.executemany(
            """
            INSERT INTO indexer.history (operation_id, from_state, to_state, generation, cause, detail)
            VALUES ($1, $2, $3, $4, $5, $6)
            """,
            [
                (h.operation_id, h.from_state.value, h.to_state.value, h.generation, h.cause, h.detail)
                for h in changes.history
            ],
        )
    if changes.alarms:
        await conn.execute("DELETE FROM indexer.alarm WHERE operation_id = ANY($1::uuid[])", list(changes.alarms))
        await conn.executemany(
            """
            INSERT INTO indexer.alarm AS a (operation_id, chain_id, axis, threshold) VALUES ($1, $2, $3, $4)
            ON CONFLICT (operation_id, chain_id, axis) DO UPDATE SET threshold = least(a.threshold, excluded.threshold)
            """,
            [
                (id, alarm.chain_id, alarm.axis, alarm.threshold)
                for id, alarms in changes.alarms.items()
                for alarm in alarms
            ],
        )
    if changes.touched:
        await touch(conn, changes.touched)


# --------------------------------------------------------------------------- unmatched evidence


UNMATCHED_SPAN = 5_000  # movements that one look reads: a cursor that was set far back stops nobody


async def unmatched_due(
    conn: Connection, chain: Heads, clock_ms: int, quiet_ms: int, limit: int
) -> tuple[list[tuple[str, Movement]], int, bool]:
    """Evidence of our issuers that nothing claims, `safe` and older than `quiet_ms`; the cursor after looking; whether there is
    more to look at now.

    movement_pk serves the range above the cursor: each block is looked at once, UNMATCHED_SPAN movements at a time.
    """
    cursor = await conn.fetchval("SELECT unmatched_cursor FROM indexer.chain WHERE chain_id = $1", chain.chain_id)
    if cursor is None:
        cursor = -1
    until_ms = clock_ms - quiet_ms
    far = await conn.fetchrow(
        """
        SELECT block_number, block_time_ms FROM indexer.movement WHERE chain_id = $1 AND block_number > $2 AND block_number <= $3
        ORDER BY block_number OFFSET $4 LIMIT 1
        """,
        chain.chain_id, cursor, chain.safe_number, UNMATCHED_SPAN,
    )  # fmt: skip
    more = far is not None and far["block_time_ms"] <= until_ms
    upto = far["block_number"] if far is not None and more else chain.safe_number
    rows = await conn.fetch(
        f"""
        SELECT i.brand, {_MOVEMENT} FROM indexer.movement m
        JOIN indexer.issuer i ON i.address = m.issuer JOIN indexer.brand b ON b.name = i.brand AND b.active
        WHERE m.chain_id = $1 AND m.block_number > $2 AND m.block_number <= $3 AND m.block_time_ms <= $4 AND m.canonical
          AND m.block_time_ms >= extract(epoch FROM b.unmatched_since) * 1000
          AND NOT EXISTS (SELECT 1 FROM indexer.claim c WHERE c.chain_id = m.chain_id AND c.block_number = m.block_number
                          AND c.log_index = m.log_index AND c.block_hash = m.block_hash)
        ORDER BY m.block_number FETCH FIRST ($5) ROWS WITH TIES -- whole blocks, however many events they hold
        """,  # noqa: S608
        chain.chain_id, cursor, upto, until_ms, limit,
    )  # fmt: skip
    found = [(row["brand"], movement_of(row)) for row in rows]
    if len(found) >= limit:
        return found, max(movement.block_number for _, movement in found), True
    if more:
        return found, upto, True
    # the highest block that is both safe and old enough; the cursor never runs ahead of what may still change
    reached = await conn.fetchval(
        """
        SELECT max(number) FROM (SELECT number FROM indexer.block WHERE chain_id = $1 AND canonical AND number <= $2 AND time_ms <= $3
                                 ORDER BY number DESC LIMIT 1) AS last
        """,
        chain.chain_id,
        chain.safe_number,
        until_ms,
    )
    return found, max(cursor, _or(reached, -1)), False


async def look_again(conn: Connection, freed: Iterable[Movement]) -> None:
    """Evidence that something spoke for, and nothing does any more: where the cursor has passed it, it goes back before it."""
    lowest: dict[int, int] = {}
    for movement in freed:
        lowest[movement.chain_id] = min(lowest.get(movement.chain_id, movement.block_number), movement.block_number)
    if lowest:
        await conn.execute(
            """
            UPDATE indexer.chain c SET unmatched_cursor = f.low - 1 FROM unnest($1::bigint[], $2::bigint[]) AS f (chain_id, low)
            WHERE c.chain_id = f.chain_id AND c.unmatched_cursor >= f.low
            """,
            list(lowest),
            list(lowest.values()),
        )


async def contested(conn: Connection, movements: Sequence[Movement]) -> set[UUID]:
    """Evidence that some operation names as its conflict: a person decides on it, it is not unmatched."""
    rows = await conn.fetch(
        """
        SELECT DISTINCT e.id::uuid AS id FROM unnest($1::text[]) AS e (id)
        JOIN indexer.leg l ON l.nonce = ANY($2::bytea[]) OR l.operation_hash = ANY($3::bytea[])
        JOIN indexer.operation o ON o.id = l.operation_id
        WHERE o.detail -> 'conflicts' @> jsonb_build_array(jsonb_build_object('evidenceId', e.id))
        """,
        [str(m.id) for m in movements],
        [m.nonce for m in movements],
        [m.operation_hash for m in movements if m.operation_hash],
    )
    return {row["id"] for row in rows}


async def claimed(conn: Connection, evidence: Sequence[UUID]) -> set[UUID]:
    """Which of these identities settle a leg, wherever the event stands that does (claim_evidence_id_key)."""
    rows = await conn.fetch("SELECT evidence_id FROM indexer.claim WHERE evidence_id = ANY($1::uuid[])", evidence)
    return {row["evidence_id"] for row in rows}


async def move_unmatched_cursor(conn: Connection, chain_id: int, cursor: int) -> None:
    await conn.execute("UPDATE indexer.chain SET unmatched_cursor = $2 WHERE chain_id = $1", chain_id, cursor)
