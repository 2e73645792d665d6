"""The transactions that store facts: one step or one range, whole or not at all, and again without harm."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from indexer.chain.decode import COLUMNS, Decoded, Decoder, Speakers
from indexer.chain.wire import Log
from indexer.model.types import Address, Hash32, Header
from indexer.store import chains, coverage, facts, stored
from indexer.store.chains import Emitter
from indexer.store.coverage import Covered
from indexer.store.database import Database
from indexer.store.facts import Place
from tests.following import FACTORY, created, issued, token_of, transferred

CHAIN = 84532
DECODER = Decoder.from_abi()
FACTORY_ADDRESS = Address(FACTORY)


@pytest.fixture
async def conn(database: Database) -> AsyncIterator[asyncpg.Connection]:
    session = await database.session("test")
    await chains.ensure_chain(session, CHAIN, "fake", None, None)
    await chains.sync_emitters(session, CHAIN, [Emitter(FACTORY_ADDRESS, "factory", FACTORY_ADDRESS, 0)])
    yield session
    await session.close()


def block_hash(number: int, branch: int = 0) -> Hash32:
    return Hash32(bytes([branch]) + number.to_bytes(31, "big"))


def header(number: int, branch: int = 0, parent_branch: int | None = None) -> Header:
    parent = block_hash(number - 1, branch if parent_branch is None else parent_branch)
    return Header(number, block_hash(number, branch), parent, number, 1000 * number, bytes(256), Hash32(bytes(32)))


def decoded(*logs: tuple[int, int, Any], branch: int = 0) -> Decoded:
    """Rows of (block, log index, log)."""
    return DECODER.decode(
        [
            Log(address, tuple(topics), data, number, block_hash(number, branch), 1000 * number, bytes(32), 0, index)
            for number, index, (address, topics, data) in logs
        ],
        Speakers(CHAIN, [FACTORY]),
    )


async def step(
    conn: asyncpg.Connection, low: int, high: int, rows: Decoded | None = None, **more: Any
) -> facts.Committed:
    branch = more.pop("branch", 0)
    headers = [header(number, branch) for number in range(low, high + 1)]
    async with conn.transaction():
        return await facts.commit_step(
            conn,
            CHAIN,
            head=headers[-1],
            headers=headers,
            rows=rows or Decoded(),
            covered=[("gate", low, high)],
            mode="socket",
            **more,
        )


async def test_columns_are_those_of_the_decoder() -> None:
    assert {facts.EVENT_TABLES[name].name: tuple(columns) for name, columns in facts._COLUMNS.items()} == COLUMNS


async def test_a_step_stores_blocks_events_emitters_coverage_and_cursor(conn: asyncpg.Connection) -> None:
    done = await step(conn, 1, 5, decoded((3, 0, transferred(1)), (3, 1, created(1)), (4, 0, issued(9))))
    assert done.events == 3
    state = await chains.load_chain(conn, CHAIN)
    assert state is not None and state.cursor is not None and state.cursor.number == 5
    token = next(e for e in await chains.load_emitters(conn, CHAIN) if e.kind == "token")
    assert (token.address, token.start_block, token.followed_from) == (token_of(1), 3, 3)
    assert [p.token for p in await chains.load_programmes(conn, CHAIN)] == [token_of(1)]
    assert await chains.load_programmes(conn, CHAIN, 2) == []
    touched = await conn.fetch("SELECT chain_id, from_block, to_block FROM indexer.touched_blocks")
    assert [tuple(row) for row in touched] == [(CHAIN, 3, 4)]
    await step(conn, 6, 8)
    assert await conn.fetchval("SELECT count(*) FROM indexer.touched_blocks") == 1  # nothing came: nothing to look at


async def test_a_token_that_is_announced_later_after_a_reorganisation_speaks_from_there_on(
    conn: asyncpg.Connection,
) -> None:
    """F15: what it logged before, at the same address, is nobody's; a second look that asks from the old block would store it."""
    await step(conn, 1, 5, decoded((3, 0, created(1))))
    await step(conn, 2, 9, decoded((8, 0, created(1)), branch=1), branch=1, orphan_above=1)
    tokens = [e.start_block for e in await chains.load_emitters(conn, CHAIN) if e.kind == "token"]
    assert tokens == [8]
    await step(conn, 10, 12, decoded((11, 0, created(1)), branch=1), branch=1)  # said twice: the first counts
    assert [e.start_block for e in await chains.load_emitters(conn, CHAIN) if e.kind == "token"] == [8]


async def test_a_reorganisation_is_one_commit(conn: asyncpg.Connection, database: Database) -> None:
    await step(conn, 1, 10, decoded((1, 0, created(1)), (5, 0, issued(1)), (8, 0, issued(2)), (9, 3, issued(3))))
    await chains.set_tags(conn, CHAIN, header(9), header(4))
    await coverage.cover(conn, CHAIN, [Covered(token_of(1), 1, 10, "unverified")])
    done = await step(conn, 7, 8, decoded((7, 0, issued(2)), branch=1), branch=1, orphan_above=6)
    assert (done.orphaned_blocks, done.orphaned_events, done.events) == (4, 2, 1)
    canonical = await conn.fetch("SELECT block_number, block_hash FROM indexer.movement WHERE canonical ORDER BY 1")
    assert [tuple(row) for row in canonical] == [(5, block_hash(5)), (7, block_hash(7, 1))]
    assert await conn.fetchval("SELECT count(*) FROM indexer.movement") == 4  # rows stay
    state = await chains.load_chain(conn, CHAIN)
    assert state is not None and state.safe is not None and state.finalized is not None
    assert (state.safe.number, state.safe.hash, state.finalized.number) == (6, block_hash(6), 4)
    row = await conn.fetchrow("SELECT from_block, to_block FROM indexer.touched_blocks ORDER BY id DESC LIMIT 1")
    assert tuple(row) == (7, 9)
    lanes = await conn.fetch("SELECT emitter, verdict, blocks FROM indexer.coverage ORDER BY emitter")
    assert [(r["emitter"], r["blocks"][0].upper) for r in lanes] == [(b"", 9), (token_of(1), 7)]
    # and back: the first branch returns, whole
    await step(conn, 7, 10, decoded((8, 0, issued(2)), (9, 3, issued(3))), orphan_above=6)
    canonical = await conn.fetch("SELECT block_number, block_hash FROM indexer.movement WHERE canonical ORDER BY 1")
    assert [tuple(row) for row in canonical] == [(5, block_hash(5)), (8, block_hash(8)), (9, block_hash(9))]
    hashes = await conn.fetch("SELECT number, hash FROM indexer.block WHERE canonical ORDER BY number")
    assert [tuple(row) for row in hashes] == [(n, block_hash(n)) for n in range(1, 11)]


async def test_large_batches_go_by_copy_and_again_without_harm(conn: asyncpg.Connection) -> None:
    rows = decoded((1, 0, created(1)), *((2, index, issued(index)) for index in range(700)))
    async with conn.transaction():
        await facts.commit_range(conn, CHAIN, rows=rows, covered=[Covered(FACTORY, 0, 2, "unverified")])
    assert await conn.fetchval("SELECT count(*) FROM indexer.movement") == 700
    token = next(e for e in await chains.load_emitters(conn, CHAIN) if e.kind == "token")
    assert token.followed_from is None  # the follower has not heard of it yet
    await conn.execute("UPDATE indexer.movement SET canonical = false WHERE log_index < 10")
    more = decoded((1, 0, created(1)), *((2, index, issued(index)) for index in range(900)))
    more.movements += more.movements[:50]  # the same log twice in one answer
    async with conn.transaction():
        await facts.commit_range(conn, CHAIN, rows=more, covered=[Covered(FACTORY, 0, 2, "unverified")])
        await facts.commit_range(conn, CHAIN, rows=more, covered=[Covered(FACTORY, 0, 2, "unverified")])
    assert await conn.fetchval("SELECT count(*) FROM indexer.movement WHERE canonical") == 900


async def test_nothing_of_a_failed_step_is_stored(conn: asyncpg.Connection) -> None:
    await step(conn, 1, 3)
    rows = decoded((4, 0, issued(1)))
    rows.movements.append(rows.movements[0][:-1])  # not a row
    with pytest.raises(asyncpg.InterfaceError):
        await step(conn, 4, 6, rows)
    state = await chains.load_chain(conn, CHAIN)
    assert state is not None and state.cursor is not None and state.cursor.number == 3
    assert await conn.fetchval("SELECT count(*) FROM indexer.movement") == 0
    assert await conn.fetchval("SELECT max(number) FROM indexer.block") == 3


async def test_tags_are_monotone_and_fit_what_we_hold(conn: asyncpg.Connection) -> None:
    await step(conn, 1, 20)
    assert await chains.set_tags(conn, CHAIN, header(10), header(5)) == ["safe", "finalized"]
    assert await chains.set_tags(conn, CHAIN, header(8), header(4)) == []
    assert await chains.set_tags(conn, CHAIN, header(12, branch=1), header(6, branch=1)) == []
    assert await chains.set_tags(conn, CHAIN, header(25), None) == []  # beyond the cursor
    assert await chains.set_tags(conn, CHAIN, None, header(15)) == ["safe", "finalized"]  # finalized is safe
    row = await conn.fetchrow(
        "SELECT safe_number, safe_time_ms, finalized_number, finalized_time_ms FROM indexer.chain"
    )
    assert tuple(row) == (15, 15_000, 15, 15_000)


async def test_pruning_keeps_checkpoints_and_blocks_with_our_events(conn: asyncpg.Connection) -> None:
    await step(conn, 1, 3500, decoded((1, 0, created(1)), (700, 0, issued(1)), (2222, 0, transferred(1))))
    await step(conn, 3400, 3500, branch=1, orphan_above=3399)
    await step(conn, 3401, 3500, decoded((3450, 0, issued(5))), orphan_above=3400)
    removed = await chains.prune_headers(conn, CHAIN, 0, 3300)
    kept = [r[0] for r in await conn.fetch("SELECT number FROM indexer.block WHERE number < 3300 ORDER BY number")]
    assert kept == [1, 700, 999, 1999, 2222, 2999] and removed == 3299 - len(kept)
    assert await conn.fetchval("SELECT count(*) FROM indexer.block WHERE number >= 3300") > 200


async def test_a_withdrawn_log_is_not_canonical_and_a_repaired_one_is_right(conn: asyncpg.Connection) -> None:
    await step(conn, 1, 9, decoded((2, 0, created(1)), (5, 0, issued(1)), (5, 1, issued(2))))
    right = decoded((5, 0, issued(1)))
    right.movements[0] = (*right.movements[0][:5], b"\x07" * 32, *right.movements[0][6:])
    async with conn.transaction():
        await facts.commit_range(
            conn, CHAIN, rows=right, covered=[], withdraw=[Place(5, block_hash(5), 1)], repair=True
        )
    rows = await conn.fetch("SELECT log_index, canonical, tx_hash FROM indexer.movement ORDER BY 1")
    assert [tuple(row) for row in rows] == [(0, True, b"\x07" * 32), (1, False, bytes(32))]
    found = await stored.readings(conn, CHAIN, [FACTORY], 1, 9)
    assert {place[:1] + place[2:] for place in found} == {(2, 0), (5, 0)}


async def test_the_first_latch_stays(conn: asyncpg.Connection) -> None:
    await chains.set_latch(conn, CHAIN, {"ours": {"number": 1}})
    await chains.set_latch(conn, CHAIN, {"ours": {"number": 2}})
    state = await chains.load_chain(conn, CHAIN)
    assert state is not None and state.latch == {"ours": {"number": 1}}


async def test_the_busy_queries_lean_on_indexes(conn: asyncpg.Connection) -> None:
    await conn.execute(
        "INSERT INTO indexer.block (chain_id, number, hash, parent_hash, time_ms) "
        "SELECT $1, n, int8send(n), int8send(n - 1), n FROM generate_series(1, 100000) AS n",
        CHAIN,
    )
    await conn.execute("ANALYZE indexer.block")
    for query in (
        "SELECT hash FROM indexer.block WHERE chain_id = 84532 AND number = 77 AND canonical",
        "SELECT number FROM indexer.block WHERE chain_id = 84532 AND number <= 5 AND canonical ORDER BY number DESC LIMIT 1",
        "UPDATE indexer.block SET canonical = false WHERE chain_id = 84532 AND number > 99990 AND canonical",
    ):
        plan = "\n".join(r[0] for r in await conn.fetch("EXPLAIN " + query))
        assert "Seq Scan" not in plan, plan
