"""Evidence of our issuers and wallets that no operation claims: what is due to be signalled, and how far was looked.

Chain events are looked at block by block behind a cursor; a partner's record has its own time to be looked at again. Every
function works inside the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from uuid import UUID

from indexer.model.confidence import Heads
from indexer.model.evidence import Movement, PartnerTransfer
from indexer.store.connection import Connection
from indexer.store.neighbourhood import MOVEMENT, movement_of
from indexer.store.partner_evidence import TRANSFER, transfers_of_rows

SPAN = 5_000  # movements that one look reads: a cursor that was set far back stops nobody


async def unmatched_due(
    conn: Connection, chain: Heads, clock_ms: int, quiet_ms: int, limit: int
) -> tuple[list[tuple[str, Movement]], int, bool]:
    """Evidence of our issuers that nothing claims, `safe` and older than `quiet_ms`; the cursor after looking; whether there is
    more to look at now.

    movement_pk serves the range above the cursor: each block is looked at once, SPAN movements at a time.
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
        chain.chain_id, cursor, chain.safe_number, SPAN,
    )  # fmt: skip
    more = far is not None and far["block_time_ms"] <= until_ms
    upto = far["block_number"] if far is not None and more else chain.safe_number
    rows = await conn.fetch(
        f"""
        SELECT i.brand, {MOVEMENT} FROM indexer.movement m
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
    return found, max(cursor, -1 if reached is None else reached), False


async def step_back(conn: Connection, freed: Iterable[Movement]) -> None:
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


# --------------------------------------------------------------------------- partners


async def unmatched_transfers(conn: Connection, quiet_ms: int, limit: int) -> list[PartnerTransfer]:
    """Partners' records whose time to be looked at has come, without a claim, whether they count (yet) or not.

    partner_transfer_unmatched_idx. What a leg claims, what has no time of its own, and what is older than the brand's
    `unmatched_since` is put aside first: it is told to nobody. A record is given `quiet_ms` to find its registration. Those that a
    poller is writing have their turn next time: nobody is waited for, and until the commit none of these changes.
    """
    await conn.execute(
        """
        WITH due AS MATERIALIZED (
            SELECT t.id, t.brand, t.undated, t.status, t.time_ms, t.first_seen_at FROM indexer.partner_transfer t
            WHERE t.unmatched_look_at <= (SELECT clock_timestamp()) ORDER BY t.unmatched_look_at LIMIT $1 FOR NO KEY UPDATE SKIP LOCKED)
        UPDATE indexer.partner_transfer t SET unmatched_look_at = NULL
        FROM due JOIN indexer.brand b ON b.name = due.brand
             LEFT JOIN LATERAL (SELECT true AS held FROM indexer.claim c WHERE c.evidence_id = due.id OFFSET 0) AS c ON true
        WHERE t.id = due.id
          AND (due.undated OR due.status = 'failed' OR c.held
               OR coalesce(to_timestamp(due.time_ms / 1000.0), due.first_seen_at) < b.unmatched_since)
        """,
        limit,
    )
    rows = await conn.fetch(
        f"""
        SELECT {TRANSFER} FROM indexer.partner_transfer t JOIN indexer.brand b ON b.name = t.brand AND b.active
        WHERE t.unmatched_look_at <= (SELECT clock_timestamp()) AND t.first_seen_at <= clock_timestamp() - $2 * interval '1 millisecond'
        ORDER BY t.unmatched_look_at LIMIT $1 FOR NO KEY UPDATE OF t SKIP LOCKED
        """,  # noqa: S608
        limit,
        quiet_ms,
    )
    return await transfers_of_rows(conn, rows)


async def offered(conn: Connection, transfers: Sequence[PartnerTransfer]) -> set[UUID]:
    """Records that some operation names as held or offered: a person decides on them (leg_partner_idx)."""
    rows = await conn.fetch(
        """
        SELECT DISTINCT t.id FROM unnest($1::uuid[], $2::text[], $3::text[], $4::numeric[]) AS t (id, wallet, kind, amount)
        JOIN indexer.leg l ON l.wallet_id = t.wallet AND l.kind = t.kind AND l.amount = t.amount
        JOIN indexer.operation o ON o.id = l.operation_id
        WHERE o.detail -> 'conflicts' @> jsonb_build_array(jsonb_build_object('evidenceId', t.id))
        """,
        [t.id for t in transfers],
        [t.wallet for t in transfers],
        [t.kind for t in transfers],
        [t.amount for t in transfers],
    )
    return {row["id"] for row in rows}


async def look_again(conn: Connection, evidence: Sequence[UUID], seconds: float | None) -> None:
    """Sets when these records are looked at again; None: not until a claim on them goes."""
    await conn.execute(
        """
        UPDATE indexer.partner_transfer SET unmatched_look_at = clock_timestamp() + $2 * interval '1 second'
        WHERE id = ANY($1::uuid[])
        """,
        evidence,
        seconds,
    )
