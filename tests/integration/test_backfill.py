"""History below finalized, and the second look at it: real PostgreSQL, a fake node, the truth of its chain."""

from __future__ import annotations

import asyncio
import random

import pytest

from indexer.chain.backfill import Starts
from indexer.chain.pool import Pool
from indexer.chain.rpc import Rpc
from indexer.store import chains, coverage
from indexer.store.database import Database
from tests.fake_node import FakeNode, Fault
from tests.following import (
    FACTORY,
    FACTORY2,
    caught_up,
    chain_config,
    created,
    eventually,
    filling,
    following,
    history_filled,
    issued,
    noise,
    stored,
    transferred,
    truth,
)


def grow(node: FakeNode, blocks: int, seed: int = 1, factory: bytes = FACTORY) -> None:
    """Programmes that come one after another, and what they and their tokens log."""
    rng, programmes = random.Random(seed), 0
    for n in range(blocks):
        logs = []
        if rng.random() < 0.05 or programmes == 0:
            programmes += 1
            logs.append([transferred(programmes, factory=factory), created(programmes, factory)])
        if rng.random() < 0.4:
            logs.append(issued(seed * 1_000_000 + n, rng.randint(1, programmes), factory=factory))
        if rng.random() < 0.4:
            logs += [transferred(rng.randint(1, programmes), factory=factory), noise(n)]
        node.mine(logs)


async def test_history_and_head_together_are_the_truth(database: Database) -> None:
    async with FakeNode() as node:
        grow(node, 600)
        node.set_tags(safe=550, finalized=500)
        chain = chain_config(node)
        async with following(database, node, chain), filling(database, node, chain):
            await caught_up(database, node)
            await history_filled(database, node.chain_id)
            await eventually(lambda: _equal(stored(database), truth(node.chain)))
            grow(node, 50, seed=2)
            node.set_tags(safe=640, finalized=620)
            await caught_up(database, node)
            await eventually(lambda: finalized(database, 620))
            await history_filled(database, node.chain_id)
            await eventually(lambda: _equal(stored(database), truth(node.chain)))
            assert await database.pool.fetchval("SELECT count(*) FROM indexer.emitter WHERE followed_from IS NULL") == 0


async def test_a_reorganisation_while_history_meets_the_head(database: Database) -> None:
    """F11: what is undone lies above finalized, and history, half read, is as it was."""
    async with FakeNode(max_span=7) as node:
        grow(node, 600)
        node.set_tags(safe=520, finalized=500)
        slow = node.delay("eth_getLogs", 0.1, times=None)
        chain = chain_config(node)
        async with following(database, node, chain), filling(database, node, chain):
            await caught_up(database, node)
            session = await database.session("test")
            try:
                await eventually(lambda: asyncio.sleep(0, slow.hits > 10))
                node.reorganise(60, [[issued(7_000_000 + n)] for n in range(50)])
                assert await coverage.gaps(session, node.chain_id, 500)  # there was history left to read
            finally:
                await session.close()
            slow.times = 0
            await caught_up(database, node)
            await history_filled(database, node.chain_id)
            await eventually(lambda: _equal(stored(database), truth(node.chain)))


async def finalized(database: Database, number: int) -> bool:
    return bool(await database.pool.fetchval("SELECT finalized_number >= $1 FROM indexer.chain", number))


@pytest.mark.parametrize(
    "limits",
    [
        {"max_span": 7},
        {"max_results": 5},
        {"max_addresses": 3},
        {"max_span": 50, "max_results": 11, "max_addresses": 2, "max_batch": 3},
    ],
    ids=str,
)
async def test_history_through_small_limits(database: Database, limits: dict[str, int]) -> None:
    async with FakeNode(**limits) as node:
        grow(node, 300)
        node.set_tags(safe=290, finalized=280)
        chain = chain_config(node)
        async with following(database, node, chain), filling(database, node, chain):
            await history_filled(database, node.chain_id)
            await caught_up(database, node)
            await eventually(lambda: _equal(stored(database), truth(node.chain)))


async def test_many_windows_in_flight_miss_no_token(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are fetched before those below them are decoded: tokens found there are asked for again."""
    monkeypatch.setattr("indexer.chain.pipeline.FIRST_WINDOW", 9)
    monkeypatch.setattr("indexer.chain.pipeline.LARGEST_WINDOW", 13)
    async with FakeNode() as node:
        grow(node, 500)
        node.set_tags(safe=500, finalized=500)
        chain = chain_config(node)
        async with following(database, node, chain), filling(database, node, chain, parallel=6):
            await history_filled(database, node.chain_id)
            await eventually(lambda: _equal(stored(database), truth(node.chain)))


async def test_history_killed_at_any_point(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexer.chain.pipeline.FIRST_WINDOW", 10)
    monkeypatch.setattr("indexer.chain.pipeline.LARGEST_WINDOW", 10)
    async with FakeNode() as node:
        grow(node, 600)
        node.set_tags(safe=600, finalized=600)
        chain = chain_config(node)
        async with following(database, node, chain):
            await caught_up(database, node)
            for n in range(6):
                async with filling(database, node, chain, ttl=2):
                    await asyncio.sleep(0.02 + 0.02 * n)
            async with filling(database, node, chain, ttl=2):
                await history_filled(database, node.chain_id)
            await eventually(lambda: _equal(stored(database), truth(node.chain)))


async def test_a_factory_added_later_fills_its_history(database: Database) -> None:
    async with FakeNode() as node:
        grow(node, 200)
        grow(node, 200, seed=3, factory=FACTORY2)
        node.set_tags(safe=390, finalized=380)
        chain = chain_config(node)
        async with following(database, node, chain), filling(database, node, chain):
            await history_filled(database, node.chain_id)
            await caught_up(database, node)
            await eventually(lambda: _equal(stored(database), truth(node.chain)))
        both = chain_config(node, factories=(FACTORY, FACTORY2))
        async with following(database, node, both), filling(database, node, both):
            node.mine([issued(77, factory=FACTORY2)])
            node.set_tags(safe=400, finalized=400)
            await caught_up(database, node)
            await eventually(lambda: finalized(database, 400))
            await history_filled(database, node.chain_id)
            assert await stored(database) == truth(node.chain, (FACTORY, FACTORY2))
        # and one that leaves keeps what is stored, and misses what comes meanwhile until it returns
        async with following(database, node, chain), filling(database, node, chain):
            node.mine([issued(78, factory=FACTORY2), transferred(1, factory=FACTORY2)])
            node.mine([issued(79)])
            await caught_up(database, node)
            assert len(await stored(database)) == len(truth(node.chain, (FACTORY, FACTORY2))) - 2
        node.mine(blocks=5)
        node.set_tags(safe=405, finalized=405)
        async with following(database, node, both), filling(database, node, both):
            await caught_up(database, node)
            await eventually(lambda: finalized(database, 405))
            await history_filled(database, node.chain_id)
            assert await stored(database) == truth(node.chain, (FACTORY, FACTORY2))


async def test_no_headers_are_asked_for_when_logs_carry_their_time(database: Database) -> None:
    async with FakeNode() as node:
        grow(node, 200)
        node.set_tags(safe=200, finalized=200)
        chain = chain_config(node, tags_seconds=0.5)
        async with following(database, node, chain), filling(database, node, chain):
            await caught_up(database, node)
            await history_filled(database, node.chain_id)
            asked = {params[0] for method, params in node.asked if method == "eth_getBlockByNumber"}
            assert len(asked) < 10 < len(node.chain.loud)
            off = await database.pool.fetchval(
                "SELECT count(*) FROM indexer.movement WHERE block_time_ms <> $1 + 2000 * block_number",
                1000 * node.chain.time_s,
            )
            assert off == 0


async def test_without_a_time_in_logs_headers_of_their_blocks_are_asked_for(database: Database) -> None:
    def strip(_: object, logs: list[dict[str, object]]) -> list[dict[str, object]]:
        return [{k: v for k, v in log.items() if k != "blockTimestamp"} for log in logs]

    async with FakeNode() as node:
        grow(node, 200)
        node.set_tags(safe=200, finalized=200)
        node.lie("eth_getLogs", strip, times=None)
        chain = chain_config(node)
        async with following(database, node, chain), filling(database, node, chain):
            await history_filled(database, node.chain_id)
            await eventually(lambda: _equal(stored(database), truth(node.chain)))
            off = await database.pool.fetchval(
                "SELECT count(*) FROM indexer.movement WHERE block_time_ms <> $1 + 2000 * block_number",
                1000 * node.chain.time_s,
            )
            assert off == 0


async def test_what_the_first_answer_left_out_is_found_by_the_second_look(database: Database) -> None:
    async with FakeNode() as node:
        grow(node, 300)
        node.set_tags(safe=290, finalized=280)
        node.drop_log(3, times=None)
        chain = chain_config(node, second_look_seconds=3, verify_calls_per_second=50)
        async with following(database, node, chain), filling(database, node, chain):
            await caught_up(database, node)
            await history_filled(database, node.chain_id)
            assert await stored(database) != truth(node.chain)
            node.heal()  # long before anything is read a second time
            node.set_tags(safe=300, finalized=300)
            await eventually(lambda: verified(database))
            assert await stored(database) == truth(node.chain)


async def verified(database: Database) -> bool:
    """Whether everything up to 300 was asked for, and is covered better than `unverified`."""
    session = await database.session("test")
    try:
        state = await chains.load_chain(session, 84532)
        if state is None or state.finalized is None or state.finalized.number < 300:
            return False
        emitters = [e.address for e in await chains.load_emitters(session, 84532)]
        return await coverage.covered_until(session, 84532, emitters, 0) == 300
    finally:
        await session.close()


async def test_what_no_block_holds_is_withdrawn_by_the_second_look(database: Database) -> None:
    async with FakeNode() as node:
        grow(node, 100)
        node.set_tags(safe=100, finalized=100)
        invented: list[int] = []

        def invent(_: object, logs: list[dict[str, object]]) -> list[dict[str, object]]:
            if not logs or invented:
                return logs
            invented.append(1)
            last = {**logs[-1], "logIndex": hex(int(str(logs[-1]["logIndex"]), 16) + 1)}
            return [*logs, last]

        node.lie("eth_getLogs", invent, times=None)
        chain = chain_config(node, second_look_seconds=0.2, verify_calls_per_second=50)
        async with following(database, node, chain), filling(database, node, chain):
            await caught_up(database, node)
            await history_filled(database, node.chain_id)
            await eventually(lambda: _equal(stored(database), truth(node.chain)))
            assert invented
            assert (
                sum(
                    [
                        await database.pool.fetchval(f"SELECT count(*) FROM indexer.{table} WHERE NOT canonical")
                        for table in ("movement", "transfer", "programme_event", "programme", "raw_log")
                    ]
                )
                == 1
            )


async def _equal(found: object, wanted: object) -> bool:
    return await found == wanted


async def test_a_truncated_second_reading_withdraws_nothing(database: Database) -> None:
    async with FakeNode() as node:
        grow(node, 100)
        node.set_tags(safe=100, finalized=100)
        chain = chain_config(node, second_look_seconds=0.1, verify_calls_per_second=50)
        async with following(database, node, chain):
            await caught_up(database, node)
            async with filling(database, node, chain):
                await history_filled(database, node.chain_id)
                hidden: Fault = node.hide_logs(times=None)
                await eventually(lambda: _more(hidden, 3))
                assert await stored(database) == truth(node.chain)
                node.heal()


async def _more(fault: Fault, hits: int) -> bool:
    return fault.hits >= hits


async def test_history_is_complete_only_where_that_is_shown(database: Database) -> None:
    async def complete(wanted: bool) -> bool:
        return await database.pool.fetchval("SELECT history_complete FROM indexer.chain") == wanted

    async with FakeNode() as node:
        node.mine(blocks=10)
        grow(node, 50)
        node.set_tags(safe=50, finalized=50)
        factories = [{"address": "0x" + FACTORY.hex(), "start_block": 8}]
        chain = chain_config(node, factories=()).model_validate(
            chain_config(node, factories=()).model_dump() | {"factories": factories}
        )
        for created_at, shown in ((None, False), (5, False), (8, True)):
            node.chain.code = {} if created_at is None else {FACTORY: created_at}
            async with following(database, node, chain), filling(database, node, chain):
                await history_filled(database, node.chain_id)
                await eventually(lambda shown=shown: complete(shown))
        node.fail("eth_getCode", -32000, "missing trie node", times=None, when=lambda params: params[1] != "latest")
        async with Rpc(node.url) as rpc:
            assert not await Starts(chain, Pool.of(rpc, chain.chain_id).source()).proven()
