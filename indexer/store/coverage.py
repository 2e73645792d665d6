"""Which blocks were asked for, of which emitters, with which verdict: the SQL of the `coverage` table.

Ranges are inclusive on both ends in Python and live as multiranges in PostgreSQL, which does all arithmetic. The emitter
`HEAD_LANE` stands for the follower's filter and speaks for an emitter from that emitter's `followed_from` on. What to do
about a gap is left to `chain/coverage.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import asyncpg

from indexer.store.connection import Connection

HEAD_LANE = b""
Verdict = Literal["receipts_root", "gate", "second_endpoint", "second_look", "unverified"]


@dataclass(frozen=True, slots=True)
class Span:
    """Blocks `low` to `high`, both included."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Covered:
    """One emitter's claim on a range: asked for, and stored in the same transaction."""

    emitter: bytes
    low: int
    high: int
    verdict: Verdict


def _spans(multirange: Sequence[Any]) -> list[Span]:
    """From asyncpg's Ranges, which PostgreSQL normalises to [low, high)."""
    return [Span(r.lower if r.lower is not None else 0, r.upper - 1) for r in multirange]


async def cover(conn: asyncpg.Connection, chain_id: int, claims: Sequence[Covered]) -> None:
    """Adds the claims. What is better than `unverified` also takes the range out of `unverified`.

    A second reading of a whole range also takes the place of `gate` in it: at an endpoint without receipts, single
    unverified blocks would leave that multirange in a thousand pieces. It is a second one only where there was a first: a
    block in between that nobody had read before stays a gap.
    """
    if not claims:
        return
    arrays = (
        [c.emitter for c in claims],
        [c.verdict for c in claims],
        [c.low for c in claims],
        [c.high for c in claims],
    )
    # coverage_pk: a row per emitter and verdict, however many ranges it has
    await conn.execute(
        """
        INSERT INTO indexer.coverage AS c (chain_id, emitter, verdict, blocks)
        SELECT $1, claim.emitter, claim.verdict,
               CASE WHEN claim.verdict NOT IN ('second_look', 'second_endpoint') THEN range_agg(int8range(low, high, '[]'))
                    ELSE range_agg(int8range(low, high, '[]')) * coalesce((
                        SELECT range_agg(k.blocks) FROM indexer.coverage AS k WHERE k.chain_id = $1 AND k.emitter = claim.emitter), '{}')
               END
        FROM unnest($2::bytea[], $3::text[], $4::bigint[], $5::bigint[]) AS claim (emitter, verdict, low, high)
        GROUP BY claim.emitter, claim.verdict
        ON CONFLICT (chain_id, emitter, verdict) DO UPDATE SET blocks = c.blocks + excluded.blocks
        """,
        chain_id,
        *arrays,
    )
    if any(c.verdict != "unverified" for c in claims):
        await conn.execute(
            """
            UPDATE indexer.coverage AS c SET blocks = c.blocks - better.blocks
            FROM (
                SELECT emitter, verdict, range_agg(int8range(low, high, '[]')) AS blocks
                FROM unnest($2::bytea[], $3::text[], $4::bigint[], $5::bigint[]) AS claim (emitter, verdict, low, high)
                WHERE verdict <> 'unverified' GROUP BY emitter, verdict
            ) AS better
            WHERE c.chain_id = $1 AND c.emitter = better.emitter AND c.blocks && better.blocks
              AND (c.verdict = 'unverified' OR (c.verdict = 'gate' AND better.verdict IN ('second_look', 'second_endpoint'))
                   OR (c.verdict = 'second_look' AND better.verdict = 'second_endpoint'))
            """,
            chain_id,
            *arrays,
        )


async def note_reader(conn: asyncpg.Connection, chain_id: int, endpoint: str, low: int, high: int) -> None:
    """Blocks low … high were read from this endpoint (first_reading_pk: a row an endpoint)."""
    await conn.execute(
        """
        INSERT INTO indexer.first_reading AS r (chain_id, endpoint, blocks)
        VALUES ($1, $2, int8multirange(int8range($3, $4, '[]')))
        ON CONFLICT (chain_id, endpoint) DO UPDATE SET blocks = r.blocks + excluded.blocks
        """,
        chain_id,
        endpoint,
        low,
        high,
    )


@dataclass(frozen=True, slots=True)
class Readers:
    """Blocks `low` to `high`, all first read from the same endpoints: none is known where the set is empty."""

    low: int
    high: int
    endpoints: frozenset[str]


async def readers(conn: asyncpg.Connection, chain_id: int, low: int, high: int) -> list[Readers]:
    """Which endpoints these blocks were first read from, in runs of blocks, lowest first (first_reading_pk)."""
    rows = await conn.fetch(
        """
        SELECT endpoint, blocks * int8multirange(int8range($2, $3, '[]')) AS blocks FROM indexer.first_reading
        WHERE chain_id = $1 AND blocks && int8range($2, $3, '[]')
        """,
        chain_id,
        low,
        high,
    )
    spans = [(row["endpoint"], span) for row in rows for span in _spans(row["blocks"])]
    cuts = sorted({low, *(span.low for _, span in spans), *(span.high + 1 for _, span in spans if span.high < high)})
    return [
        Readers(start, end, frozenset(endpoint for endpoint, span in spans if span.low <= start <= span.high))
        for start, end in zip(cuts, [*(cut - 1 for cut in cuts[1:]), high], strict=True)
    ]


async def doubt(conn: asyncpg.Connection, chain_id: int, emitters: Sequence[bytes], low: int, high: int) -> None:
    """What these emitters (HEAD_LANE: the follower's lane) have covered of low … high is `unverified` again, however good its
    verdict was, so that a second look is owed. What was never read stays a gap.
    """
    # coverage_pk: a row per emitter and verdict
    await conn.execute(
        """
        WITH doubted AS (
            SELECT emitter, range_agg(blocks) * int8multirange(int8range($3, $4, '[]')) AS blocks FROM indexer.coverage
            WHERE chain_id = $1 AND emitter = ANY($2::bytea[]) AND verdict <> 'unverified' AND blocks && int8range($3, $4, '[]')
            GROUP BY emitter
        ), taken AS (
            UPDATE indexer.coverage AS c SET blocks = c.blocks - doubted.blocks FROM doubted
            WHERE c.chain_id = $1 AND c.emitter = doubted.emitter AND c.verdict <> 'unverified' AND c.blocks && doubted.blocks
        )
        INSERT INTO indexer.coverage AS c (chain_id, emitter, verdict, blocks)
        SELECT $1, emitter, 'unverified', blocks FROM doubted
        ON CONFLICT (chain_id, emitter, verdict) DO UPDATE SET blocks = c.blocks + excluded.blocks
        """,
        chain_id,
        list(emitters),
        low,
        high,
    )


async def forget_above(conn: asyncpg.Connection, chain_id: int, ancestor: int) -> None:
    """A reorganisation: nothing above `ancestor` was asked of the chain that stands now."""
    await conn.execute(
        """
        UPDATE indexer.first_reading SET blocks = blocks - int8multirange(int8range($2, NULL, '()'))
        WHERE chain_id = $1 AND blocks && int8range($2, NULL, '()')
        """,
        chain_id,
        ancestor,
    )
    # coverage_pk, leading column: a few rows per emitter
    await conn.execute(
        """
        UPDATE indexer.coverage SET blocks = blocks - int8multirange(int8range($2, NULL, '()'))
        WHERE chain_id = $1 AND blocks && int8range($2, NULL, '()')
        """,
        chain_id,
        ancestor,
    )


async def gaps(conn: asyncpg.Connection, chain_id: int, upto: int) -> dict[bytes, list[Span]]:
    """Per active emitter, what is covered by no verdict at all in [start_block, upto]; emitters without a gap are left out."""
    rows = await conn.fetch(
        """
        WITH lane AS (
            SELECT coalesce(range_agg(blocks), '{}') AS blocks FROM indexer.coverage WHERE chain_id = $1 AND emitter = ''
        ), own AS (
            SELECT emitter, range_agg(blocks) AS blocks FROM indexer.coverage WHERE chain_id = $1 GROUP BY emitter
        ), gap AS (
            SELECT e.address,
                   int8multirange(int8range(e.start_block, $2, '[]'))
                   - coalesce(own.blocks, '{}')
                   - CASE WHEN e.followed_from IS NULL THEN '{}'::int8multirange
                          ELSE lane.blocks * int8multirange(int8range(e.followed_from, NULL)) END AS missing
            FROM indexer.emitter AS e CROSS JOIN lane LEFT JOIN own ON own.emitter = e.address
            WHERE e.chain_id = $1 AND e.active AND e.start_block <= $2
        )
        SELECT address, missing FROM gap WHERE NOT isempty(missing)
        """,
        chain_id,
        upto,
    )
    return {row["address"]: _spans(row["missing"]) for row in rows}


async def unverified(
    conn: asyncpg.Connection, chain_id: int, upto: int, *, elsewhere: bool = False
) -> dict[bytes, list[Span]]:
    """Per emitter (HEAD_LANE included), the `unverified` blocks up to `upto`: what a second look is still owed for. `elsewhere`:
    also what only the endpoint that read it first has read again, now that there is another."""
    rows = await conn.fetch(
        """
        SELECT c.emitter, range_agg(c.blocks) * int8multirange(int8range(NULL, $2, '[]')) AS owed
        FROM indexer.coverage AS c LEFT JOIN indexer.emitter AS e ON e.chain_id = c.chain_id AND e.address = c.emitter
        WHERE c.chain_id = $1 AND (c.verdict = 'unverified' OR ($3 AND c.verdict = 'second_look')) AND (c.emitter = '' OR e.active)
          AND c.blocks && int8range(NULL, $2, '[]')
        GROUP BY c.emitter
        """,
        chain_id,
        upto,
        elsewhere,
    )
    return {row["emitter"]: _spans(row["owed"]) for row in rows}


async def covered_until(
    conn: Connection, chain_id: int, emitters: Sequence[bytes], from_block: int, *, several: bool = False
) -> int | None:
    """The highest block B such that [from_block, B] is covered, better than `unverified`, for each of the emitters: where a chain has
    several witnesses, not by one endpoint alone, however often it was asked.

    Blocks before an emitter's start_block count as covered. None: `from_block` itself is not covered for one of them, or
    one is unknown. What `operation.expired` rests on.
    """
    if not emitters:
        return None
    row = await conn.fetchrow(
        """
        WITH lane AS (
            SELECT coalesce(range_agg(blocks), '{}') AS blocks FROM indexer.coverage
            WHERE chain_id = $1 AND emitter = '' AND verdict <> ALL ($4::text[])
        ), own AS (
            SELECT emitter, range_agg(blocks) AS blocks FROM indexer.coverage
            WHERE chain_id = $1 AND emitter = ANY($2::bytea[]) AND verdict <> ALL ($4::text[]) GROUP BY emitter
        ), known AS (
            SELECT e.address,
                   int8multirange(int8range(NULL, e.start_block))
                   + coalesce(own.blocks, '{}')
                   + CASE WHEN e.followed_from IS NULL THEN '{}'::int8multirange
                          ELSE lane.blocks * int8multirange(int8range(e.followed_from, NULL)) END AS blocks
            FROM indexer.emitter AS e CROSS JOIN lane LEFT JOIN own ON own.emitter = e.address
            WHERE e.chain_id = $1 AND e.address = ANY($2::bytea[])
        )
        SELECT min(upper(r) - 1) AS until, count(*) AS emitters FROM known, unnest(known.blocks) AS r WHERE r @> $3::bigint
        """,
        chain_id,
        list(emitters),
        from_block,
        ["unverified", *(["second_look"] if several else [])],
    )
    assert row is not None
    return int(row["until"]) if row["emitters"] == len(set(emitters)) else None
