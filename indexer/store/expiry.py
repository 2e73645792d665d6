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
