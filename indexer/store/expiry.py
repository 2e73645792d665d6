"""What expiry is proven from: the emitters that could have spoken for a leg, and the times of the blocks that were covered.

Reads only, in the caller's transaction; what counts as certain is `settlement/expiry.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from indexer.model.operation import Leg
from indexer.model.types import Schedule
from indexer.store.connection import Connection


async def watched_since(conn: Connection, legs: Sequence[Leg]) -> dict[tuple[UUID, int], tuple[list[bytes], int]]:
    """For each leg, the emitters that could have spoken for it and the factory's start block (for expiry).

    Every hub of the chain is one: its row names only the first of the factories that it serves.
    """
    rows = await conn.fetch(
        """
        SELECT l.operation_id, l.leg, array_agg(DISTINCT e.address) AS emitters,
               min(e.start_block) FILTER (WHERE e.kind = 'factory') AS start_block
        FROM unnest($1::uuid[], $2::int[]) AS wanted (operation_id, leg)
        JOIN indexer.leg l ON l.operation_id = wanted.operation_id AND l.leg = wanted.leg
        JOIN indexer.emitter e ON e.chain_id = l.chain_id AND e.active
            AND (e.kind = 'hub' OR e.factory = l.factory AND (e.kind = 'factory' OR EXISTS (
                SELECT 1 FROM indexer.programme p WHERE p.chain_id = l.chain_id AND p.issuer = l.issuer AND p.loyalty_id = l.loyalty_id
                AND p.factory = l.factory AND p.loyalty = e.address AND p.canonical)))
        GROUP BY l.operation_id, l.leg HAVING bool_or(e.kind = 'factory')
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
