"""Chain facts: decoded events, and the transactions that store them together with the cursor or coverage that speaks for them.

Every function works on the connection it is given; the writing ones belong inside a leased transaction and never begin or
commit by themselves. `commit_step` and `commit_range` also queue the touched blocks for the reconciler, and notify; what
the facts mean is left to it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import asyncpg
import msgspec

from indexer.model.types import Header
from indexer.store import attestations, chains, coverage
from indexer.store.coverage import HEAD_LANE, Covered, Verdict
from indexer.store.event_tables import EVENT_TABLES

Row = tuple[Any, ...]

_COLUMNS = {field: list(table.columns) for field, table in EVENT_TABLES.items()}
_KEY = {field: ", ".join(table.key) for field, table in EVENT_TABLES.items()}
_BLOCK, _LOG_INDEX, _BLOCK_HASH = (  # the leading columns are the same everywhere
    _COLUMNS["movements"].index(column) for column in ("block_number", "log_index", "block_hash")
)
_UNDOING = 3600.0  # seconds for one statement, however deep: cut off, it would begin anew for ever. The lease is kept meanwhile
_SMALL = 200  # rows up to which single upserts in a pipeline beat COPY

# The names come from the declaration, never from outside. A row that returns (the branch won after all) is canonical again.
_ON_CONFLICT = {
    name: f"ON CONFLICT ({_KEY[name]}) DO UPDATE SET canonical = true WHERE NOT {table.name}.canonical"
    for name, table in EVENT_TABLES.items()
}
_UPSERT = {
    name: f"INSERT INTO indexer.{table.name} ({', '.join(_COLUMNS[name])}) "  # noqa: S608
    f"VALUES ({', '.join(f'${i + 1}' for i in range(len(_COLUMNS[name])))}) {_ON_CONFLICT[name]}"
    for name, table in EVENT_TABLES.items()
}
# Another reading corrects what the first answer got wrong beside the place.
_REPAIR = {
    name: _UPSERT[name].partition(" ON CONFLICT")[0]
    + f" ON CONFLICT ({_KEY[name]}) DO UPDATE SET {', '.join(f'{c} = excluded.{c}' for c in _COLUMNS[name])}"
    for name in EVENT_TABLES
}
_UNSTAGE = {
    name: f"INSERT INTO indexer.{table.name} ({', '.join(_COLUMNS[name])}) "  # noqa: S608
    f"SELECT DISTINCT ON ({_KEY[name]}) {', '.join(_COLUMNS[name])} FROM stage_{table.name} {_ON_CONFLICT[name]}"
    for name, table in EVENT_TABLES.items()
}


class Rows(Protocol):
    """Decoded logs as tuples in the column order of `event_tables.py`: what a decoder hands over."""

    @property
    def programmes(self) -> Sequence[Row]: ...
    @property
    def movements(self) -> Sequence[Row]: ...
    @property
    def transfers(self) -> Sequence[Row]: ...
    @property
    def programme_events(self) -> Sequence[Row]: ...
    @property
    def raw_logs(self) -> Sequence[Row]: ...


@dataclass(frozen=True, slots=True)
class Committed:
    """What one step changed, for metrics and logs."""

    events: int
    orphaned_blocks: int = 0
    orphaned_events: int = 0


class Place(NamedTuple):
    """Where a log stands: unique on a chain, whatever the log says."""

    number: int
    block_hash: bytes
    log_index: int


@dataclass(frozen=True, slots=True)
class SomeRows:
    """A part of decoded rows."""

    programmes: Sequence[Row]
    movements: Sequence[Row]
    transfers: Sequence[Row]
    programme_events: Sequence[Row]
    raw_logs: Sequence[Row]


def only(rows: Rows, wanted: Collection[Place]) -> SomeRows:
    """The rows of these logs."""
    return SomeRows(
        *(
            [r for r in getattr(rows, name) if Place(r[_BLOCK], r[_BLOCK_HASH], r[_LOG_INDEX]) in wanted]
            for name in EVENT_TABLES
        )
    )


# --------------------------------------------------------------------------- writing facts


async def commit_step(
    conn: asyncpg.Connection,
    chain_id: int,
    *,
    head: Header,
    headers: Sequence[Header],
    rows: Rows,
    covered: Sequence[tuple[Verdict, int, int]],
    mode: Literal["socket", "polling"],
    orphan_above: int | None = None,
    agreed: bool = True,
    proven: Collection[int] = (),
    read_from: Sequence[str] = (),
) -> Committed:
    """One step of the follower: un-confirm what a reorganisation undid, store the new blocks, move the cursor to `head`.

    `covered` are (verdict, low, high) of the head lane. `agreed`: as many endpoints hold our chain as must. `proven`: blocks whose
    receipts were proven on the way; `read_from`: who showed these blocks at their heights. Readers see the old branch or the new one, never a hole.
    """
    orphaned_blocks, orphaned_events, low, high = 0, 0, None, None
    if orphan_above is not None:
        orphaned_blocks, orphaned_events, low, high = await _unconfirm(conn, chain_id, orphan_above)
        await coverage.forget_above(conn, chain_id, orphan_above)
        await attestations.forget_above(conn, chain_id, orphan_above)
    numbers = await store_events(conn, chain_id, rows, followed=True)
    if rows.movements:
        blocks = {(row[_BLOCK], row[_BLOCK_HASH]): row[_BLOCK] in proven for row in rows.movements}
        await attestations.note(conn, chain_id, blocks, read_from)
    if numbers:
        low = min(numbers if low is None else (*numbers, low))
        high = max(numbers if high is None else (*numbers, high))
    await coverage.cover(conn, chain_id, [Covered(HEAD_LANE, a, b, verdict) for verdict, a, b in covered])
    for endpoint in read_from:
        for _, a, b in covered:
            await coverage.note_reader(conn, chain_id, endpoint, a, b)
    await chains.store_headers(conn, chain_id, headers)
    await conn.execute(
        """
        UPDATE indexer.chain SET head_number = $2, head_hash = $3, head_time_ms = $4, head_at = clock_timestamp(), mode = $5,
            linked_epoch = CASE WHEN $6 THEN (SELECT epoch FROM indexer.lease WHERE task = 'follow:' || $1::bigint) ELSE -1 END
        WHERE chain_id = $1
        """,
        chain_id,
        head.number,
        head.hash,
        head.time_ms,
        mode,
        agreed,
    )
    await _announce(conn, chain_id, low, high, heads=True)
    return Committed(len(numbers), orphaned_blocks, orphaned_events)


async def commit_range(
    conn: asyncpg.Connection,
    chain_id: int,
    *,
    rows: Rows,
    covered: Sequence[Covered],
    headers: Sequence[Header] = (),
    withdraw: Sequence[Place] = (),
    repair: bool = False,
    touch: tuple[int, int] | None = None,
    read_from: str | None = None,
) -> Committed:
    """A range of one's own, beside the head lane: events and the coverage that speaks for them.

    `withdraw` names stored logs that another reading proved wrong: they stop being canonical, but for those that are among
    the rows as well. `repair`: rows that are there already are overwritten. `touch`: blocks to look at again, changed or not.
    `read_from`: the endpoint, where this is a first reading.
    """
    gone = await _withdraw(conn, chain_id, withdraw) if withdraw else 0
    numbers = await store_events(conn, chain_id, rows, followed=False, repair=repair)
    if headers:
        await chains.store_headers(conn, chain_id, headers)
    await coverage.cover(conn, chain_id, covered)
    if read_from is not None and covered:
        low, high = min(c.low for c in covered), max(c.high for c in covered)
        await coverage.note_reader(conn, chain_id, read_from, low, high)
    touched = [*numbers, *(number for number, _, _ in withdraw), *(touch or ())]
    await _announce(conn, chain_id, min(touched, default=None), max(touched, default=None), heads=False)
    return Committed(len(numbers), orphaned_events=gone)


async def touch(conn: asyncpg.Connection, chain_id: int, low: int, high: int) -> None:
    """Has the operations that these blocks bear on looked at again."""
    await _announce(conn, chain_id, low, high, heads=False)


async def store_events(
    conn: asyncpg.Connection, chain_id: int, rows: Rows, *, followed: bool, repair: bool = False
) -> list[int]:
    """Stores decoded rows and makes the tokens of new programmes emitters. Answers the rows' block numbers.

    `followed`: the caller's filter, or its second fetch, included these tokens from their first block on.
    """
    numbers: list[int] = []
    for name in EVENT_TABLES:
        batch: Sequence[Row] = getattr(rows, name)
        if not batch:
            continue
        numbers.extend(row[_BLOCK] for row in batch)
        if name == "programme_events":  # args are JSON already: the connection's codec shall not quote them again
            batch = [(*row[:-1], msgspec.Raw(row[-1].encode())) for row in batch]
        if repair or len(batch) <= _SMALL:
            await conn.executemany((_REPAIR if repair else _UPSERT)[name], batch)
        else:
            await _copy(conn, name, batch)
    if rows.programmes:
        await _new_tokens(conn, chain_id, rows.programmes, followed)
    return numbers


async def _copy(conn: asyncpg.Connection, name: str, batch: Sequence[Row]) -> None:
    """COPY straight into the table; where some rows are there already, through a temporary one."""
    table = EVENT_TABLES[name].name
    try:
        async with conn.transaction():  # a savepoint
            await conn.copy_records_to_table(table, schema_name="indexer", columns=_COLUMNS[name], records=batch)
    except asyncpg.UniqueViolationError:
        await conn.execute(f"CREATE TEMP TABLE stage_{table} (LIKE indexer.{table} INCLUDING DEFAULTS) ON COMMIT DROP")
        await conn.copy_records_to_table(f"stage_{table}", columns=_COLUMNS[name], records=batch)
        await conn.execute(_UNSTAGE[name])
        await conn.execute(f"DROP TABLE stage_{table}")


async def _new_tokens(conn: asyncpg.Connection, chain_id: int, programmes: Sequence[Row], followed: bool) -> None:
    columns = _COLUMNS["programmes"]
    token, factory = columns.index("loyalty"), columns.index("factory")
    first: dict[bytes, tuple[bytes, int]] = {}
    for row in programmes:
        if row[token] not in first or row[_BLOCK] < first[row[token]][1]:
            first[row[token]] = (row[factory], row[_BLOCK])
    # A configured factory or hub that announces itself stays what it is. A token speaks from its first canonical announcement
    # on, which a reorganisation may have moved up (F15); programme_token_idx.
    await conn.execute(
        """
        INSERT INTO indexer.emitter AS e (chain_id, address, kind, factory, start_block, followed_from)
        SELECT $1, token, 'token', factory, block, CASE WHEN $5 THEN block END
        FROM unnest($2::bytea[], $3::bytea[], $4::bigint[]) AS found (token, factory, block)
        ON CONFLICT (chain_id, address) DO UPDATE
        SET start_block = least(excluded.start_block, (
                SELECT min(p.block_number) FROM indexer.programme AS p
                WHERE p.chain_id = e.chain_id AND p.loyalty = e.address AND p.canonical)),
            followed_from = least(e.followed_from, excluded.followed_from), active = true
        WHERE e.kind = 'token'
        """,
        chain_id,
        list(first),
        [f for f, _ in first.values()],
        [b for _, b in first.values()],
        followed,
    )


async def _unconfirm(conn: asyncpg.Connection, chain_id: int, ancestor: int) -> tuple[int, int, int | None, int | None]:
    """Marks blocks and events above `ancestor`; answers (blocks, events, lowest and highest block with such an event).

    One statement at any depth: 216,000 headers and 100,000 events are seconds for PostgreSQL and nothing for us, while in batches
    readers would see states that no chain ever had (docs/performance.md).
    """
    # block_canonical_idx; the primary keys of the event tables
    row = await conn.fetchrow(
        """
        WITH undone AS (
            UPDATE indexer.block SET canonical = false WHERE chain_id = $1 AND number > $2 AND canonical RETURNING number
        ), p AS (
            UPDATE indexer.programme SET canonical = false WHERE chain_id = $1 AND block_number > $2 AND canonical RETURNING block_number
        ), m AS (
            UPDATE indexer.movement SET canonical = false WHERE chain_id = $1 AND block_number > $2 AND canonical RETURNING block_number
        ), t AS (
            UPDATE indexer.transfer SET canonical = false WHERE chain_id = $1 AND block_number > $2 AND canonical RETURNING block_number
        ), e AS (
            UPDATE indexer.programme_event SET canonical = false WHERE chain_id = $1 AND block_number > $2 AND canonical RETURNING block_number
        ), r AS (
            UPDATE indexer.raw_log SET canonical = false WHERE chain_id = $1 AND block_number > $2 AND canonical RETURNING block_number
        ), gone AS (
            SELECT block_number FROM p UNION ALL SELECT block_number FROM m UNION ALL SELECT block_number FROM t
            UNION ALL SELECT block_number FROM e UNION ALL SELECT block_number FROM r
        )
        SELECT (SELECT count(*) FROM undone) AS blocks, count(*) AS events, min(block_number) AS low, max(block_number) AS high FROM gone
        """,
        chain_id,
        ancestor,
        timeout=_UNDOING,
    )
    assert row is not None
    # what was agreed on of the branch that lost says nothing of the other
    await conn.execute(
        "UPDATE indexer.chain SET agreed_number = $2 WHERE chain_id = $1 AND agreed_number > $2", chain_id, ancestor
    )
    # safe is monotone but for this: what was safe on the branch that lost is not safe
    await conn.execute(
        """
        UPDATE indexer.chain AS c SET safe_number = b.number, safe_hash = b.hash, safe_time_ms = b.time_ms
        FROM (
            SELECT number, hash, time_ms FROM indexer.block
            WHERE chain_id = $1 AND number <= $2 AND canonical ORDER BY number DESC LIMIT 1
        ) AS b
        WHERE c.chain_id = $1 AND c.safe_number > $2
        """,
        chain_id,
        ancestor,
    )
    return row["blocks"], row["events"], row["low"], row["high"]


async def _withdraw(conn: asyncpg.Connection, chain_id: int, logs: Sequence[Place]) -> int:
    arrays = ([n for n, _, _ in logs], [h for _, h, _ in logs], [i for _, _, i in logs])
    total = 0
    for table in EVENT_TABLES.values():
        # the primary key, by block number
        status = await conn.execute(
            f"""
            UPDATE indexer.{table.name} AS e SET canonical = false
            FROM unnest($2::bigint[], $3::bytea[], $4::int[]) AS wrong (number, hash, log_index)
            WHERE e.chain_id = $1 AND e.block_number = wrong.number AND e.log_index = wrong.log_index
              AND e.block_hash = wrong.hash AND e.canonical
            """,  # noqa: S608 — the table's name is ours
            chain_id,
            *arrays,
        )
        total += int(status.rpartition(" ")[2])
    return total


async def _announce(conn: asyncpg.Connection, chain_id: int, low: int | None, high: int | None, *, heads: bool) -> None:
    """Queues the touched blocks for the reconciler, and wakes whoever listens."""
    if low is not None:
        await conn.execute(
            "INSERT INTO indexer.touched_blocks (chain_id, from_block, to_block) VALUES ($1, $2, $3)",
            chain_id,
            low,
            high,
        )
        await conn.execute("NOTIFY indexer_facts")
    if heads:
        await conn.execute("NOTIFY indexer_heads")
