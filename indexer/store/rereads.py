"""What people asked to have read or decoded again: the table `reread`, and logs that were kept raw.

A request outlives the process that carries it out: how far it is, and what was found, is written in the transaction of what
was stored. Whoever advances a request holds the lease of the chain's history; anybody may ask, look, and cancel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal
from uuid import UUID

import asyncpg

from indexer.store.connection import Connection

Kind = Literal["audit", "repair", "replay", "redecode"]
OPEN = ("waiting", "running")


@dataclass(frozen=True, slots=True)
class Reread:
    """One request. Blocks are inclusive; `high` None: finalized, as it is when the work begins."""

    id: UUID
    chain_id: int
    kind: Kind
    low: int
    high: int | None
    abi: bytes | None
    state: Literal["waiting", "running", "done", "failed", "cancelled"]
    next_block: int | None
    report: dict[str, Any]
    trouble: str | None


_COLUMNS = "id, chain_id, kind, from_block, to_block, abi, state, next_block, report, trouble"


def _reread(row: asyncpg.Record) -> Reread:
    return Reread(*(row[column.strip()] for column in _COLUMNS.split(",")))


async def ask(
    conn: Connection, chain_id: int, kind: Kind, low: int, high: int | None, abi: bytes | None = None
) -> UUID:
    """Puts a request, and wakes whoever fills the chain's history."""
    made: UUID = await conn.fetchval(
        "INSERT INTO indexer.reread (chain_id, kind, from_block, to_block, abi) VALUES ($1, $2, $3, $4, $5) RETURNING id",
        chain_id,
        kind,
        low,
        high,
        abi,
    )
    await conn.execute("NOTIFY indexer_rereads")
    return made


async def find(conn: Connection, request: UUID) -> Reread | None:
    row = await conn.fetchrow(f"SELECT {_COLUMNS} FROM indexer.reread WHERE id = $1", request)  # noqa: S608
    return None if row is None else _reread(row)


async def cancel(conn: Connection, request: UUID) -> bool:
    """Ends a request that is not done; what it stored stays."""
    return bool(
        await conn.fetchval(
            """
            UPDATE indexer.reread SET state = 'cancelled', ended_at = clock_timestamp()
            WHERE id = $1 AND state IN ('waiting', 'running') RETURNING true
            """,
            request,
        )
    )


async def forget(conn: Connection, keep: timedelta, limit: int) -> int:
    """Deletes requests that ended longer ago than `keep` (reread_ended_idx). At most `limit`; answers how many went."""
    status = await conn.execute(
        """
        DELETE FROM indexer.reread WHERE id = ANY (ARRAY (
            SELECT id FROM indexer.reread WHERE ended_at < (SELECT clock_timestamp() - $1::interval) ORDER BY ended_at LIMIT $2))
          AND state IN ('done', 'failed', 'cancelled')
        """,
        keep,
        limit,
    )
    return int(status.rpartition(" ")[2])


async def any_open(conn: Connection, chain_id: int) -> bool:
    """Whether something is asked for (reread_open_idx)."""
    return bool(
        await conn.fetchval(
            "SELECT EXISTS (SELECT FROM indexer.reread WHERE chain_id = $1 AND state IN ('waiting', 'running'))",
            chain_id,
        )
    )


async def oldest_open(conn: Connection, chain_id: int) -> Reread | None:
    row = await conn.fetchrow(
        f"""
        SELECT {_COLUMNS} FROM indexer.reread
        WHERE chain_id = $1 AND state IN ('waiting', 'running') ORDER BY requested_at LIMIT 1
        """,  # noqa: S608
        chain_id,
    )
    return None if row is None else _reread(row)


async def begin(conn: Connection, request: UUID, high: int) -> None:
    """From now on it runs, up to `high`."""
    await conn.execute(
        """
        UPDATE indexer.reread SET state = 'running', to_block = $2, next_block = from_block, begun_at = clock_timestamp(), trouble = NULL
        WHERE id = $1 AND state = 'waiting'
        """,
        request,
        high,
    )


async def advance(conn: Connection, request: UUID, next_block: int, report: Mapping[str, Any], *, done: bool) -> bool:
    """How far it is, in the transaction of what was stored. False where it was cancelled: the transaction shall not count it."""
    return bool(
        await conn.fetchval(
            """
            UPDATE indexer.reread SET next_block = $2, report = $3, trouble = NULL,
                state = CASE WHEN $4 THEN 'done' ELSE state END, ended_at = CASE WHEN $4 THEN clock_timestamp() END
            WHERE id = $1 AND state = 'running' RETURNING true
            """,
            request,
            next_block,
            dict(report),
            done,
        )
    )


async def fail(conn: Connection, request: UUID, reason: str) -> None:
    await conn.execute(
        """
        UPDATE indexer.reread SET state = 'failed', trouble = $2, ended_at = clock_timestamp()
        WHERE id = $1 AND state IN ('waiting', 'running')
        """,
        request,
        reason,
    )


async def hold_up(conn: Connection, chain_id: int, reason: str) -> None:
    """What the chain's open requests wait for: for whoever looks."""
    await conn.execute(
        "UPDATE indexer.reread SET trouble = $2 WHERE chain_id = $1 AND state IN ('waiting', 'running')",
        chain_id,
        reason,
    )


async def raw_logs(conn: Connection, chain_id: int, first: int, upto: int, limit: int) -> list[asyncpg.Record]:
    """Canonical logs of blocks `first` to `upto` that nobody could read, in chain order: at least `limit` if there are as
    many, and whole blocks (raw_log_pk)."""
    return await conn.fetch(
        """
        SELECT block_number, log_index, block_hash, block_time_ms, tx_hash, tx_index, emitter, topics, data FROM indexer.raw_log
        WHERE chain_id = $1 AND block_number BETWEEN $2 AND $3 AND canonical AND reason IN ('unknown_topic', 'undecodable')
        ORDER BY block_number FETCH FIRST ($4) ROWS WITH TIES
        """,
        chain_id,
        first,
        upto,
        limit,
    )


async def drop_raw(conn: Connection, chain_id: int, logs: Sequence[tuple[int, bytes, int]]) -> None:
    """Logs (block, its hash, log index) that were read after all: their rows are in other tables now (raw_log_pk)."""
    await conn.execute(
        """
        DELETE FROM indexer.raw_log AS r USING unnest($2::bigint[], $3::bytea[], $4::int[]) AS moved (number, hash, log_index)
        WHERE r.chain_id = $1 AND r.block_number = moved.number AND r.log_index = moved.log_index AND r.block_hash = moved.hash
          AND r.reason IN ('unknown_topic', 'undecodable')
        """,
        chain_id,
        [number for number, _, _ in logs],
        [block_hash for _, block_hash, _ in logs],
        [index for _, _, index in logs],
    )
