"""Operations as the reconciler queues and writes them: what was touched, whose turn it is, and the new state.

Every function takes the connection of a leased transaction and neither begins nor commits. Nothing here decides: matching
and states are the model's. What surrounds an operation is read in `neighbourhood.py`; other writers reach operations only
through schema `loyalty`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import msgspec

from indexer.model.confidence import Alarm, Heads
from indexer.model.evidence import Place
from indexer.model.matching import Claim
from indexer.model.operation import AnyLeg, State
from indexer.model.standing import Block
from indexer.store import attestations
from indexer.store.connection import Connection


@dataclass(slots=True)
class Operation:
    """An operation as stored, with its own legs."""

    id: UUID
    brand: str
    reference: str
    request: dict[str, Any]
    metadata: msgspec.Raw  # the brand's own words, passed on as they are: nobody here reads a number of theirs
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
    legs: list[AnyLeg] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StoredClaim:
    claim: Claim
    place: Place | None  # of the evidence, where it stands in a block of a chain that we follow


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
    asked: set[Block] = field(default_factory=set)  # blocks that somebody must vouch for


async def now_ms(conn: Connection) -> int:
    """The database's clock, Unix milliseconds: the only clock that leases, alarms and transitions go by."""
    return int(await conn.fetchval("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint"))


async def heads(conn: Connection) -> dict[int, Heads]:
    """Where chains stand (block_canonical_idx). The time of the head is of the highest block that as many endpoints hold as must
    agree: anybody can put blocks of his own on top of a true one, and `confirmed` counts by it."""
    rows = await conn.fetch(
        """
        SELECT c.chain_id, c.head_number, c.safe_number,
               CASE WHEN c.quorum = 1 THEN c.head_time_ms ELSE (
                   SELECT b.time_ms FROM indexer.block b WHERE b.chain_id = c.chain_id AND b.canonical AND b.number <= c.agreed_number
                   ORDER BY b.number DESC LIMIT 1) END AS head_time_ms,
               c.finalized_number, c.finalized_time_ms,
               c.latch IS NOT NULL AS latched, indexer.is_live(c) AS live, indexer.is_agreed(c) AS agreed, c.quorum, c.proof
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
            row["agreed"],
            row["quorum"],
            row["proof"],
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


# --------------------------------------------------------------------------- writing


def _where(place: Place | None) -> tuple[int | None, int | None, int | None, bytes | None]:
    return (place.chain_id, place.block_number, place.log_index, place.block_hash) if place else (None,) * 4


async def store(conn: Connection, changes: Changes) -> None:
    """Writes what the pass decided. Claims that go, go first, so that a neighbour can take their evidence at once."""
    if changes.asked:
        await attestations.ask(conn, changes.asked)
    if changes.unclaimed:
        # claim_pk; a partner's record that settles nothing any more may be unmatched now (partner_transfer_pk)
        await conn.execute(
            """
            WITH gone AS (
                DELETE FROM indexer.claim c USING unnest($1::uuid[], $2::int[]) AS g (operation_id, leg)
                WHERE c.operation_id = g.operation_id AND c.leg = g.leg RETURNING c.evidence_id)
            UPDATE indexer.partner_transfer t SET unmatched_look_at = clock_timestamp() FROM gone WHERE t.id = gone.evidence_id
            """,
            [key[0] for key in changes.unclaimed],
            [key[1] for key in changes.unclaimed],
        )
    if changes.claimed:
        await conn.executemany(
            """
            INSERT INTO indexer.claim
                (operation_id, leg, evidence_id, chain_id, block_number, log_index, block_hash, basis, ambiguous, final)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
            ON CONFLICT (operation_id, leg) DO UPDATE SET evidence_id = excluded.evidence_id, chain_id = excluded.chain_id,
                block_number = excluded.block_number, log_index = excluded.log_index, block_hash = excluded.block_hash, basis = excluded.basis,
                ambiguous = excluded.ambiguous, final = excluded.final, claimed_at = clock_timestamp()
            """,
            [
                (*c.claim.leg, c.claim.evidence_id, *_where(c.place), c.claim.basis, c.claim.ambiguous, c.claim.final)
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
