"""Learned limits over a restart: no refusal is met twice, nothing that is stored shows a URL, and nothing is believed for ever."""

from __future__ import annotations

import msgspec
import pytest

from indexer.chain.limits import EVERY, Limits
from indexer.chain.rpc import Rpc
from indexer.chain.spans import Learned
from indexer.store.database import Database
from indexer.store.leases import Leases
from tests.fake_node import FakeNode
from tests.following import (
    FACTORY,
    caught_up,
    chain_config,
    created,
    eventually,
    following,
    history_filled,
    issued,
)
from tests.simulation.world import World

CHAIN = 84532


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_what_was_learnt_is_there_after_a_restart(database: Database) -> None:
    clock = Clock()
    async with FakeNode(max_span=7, max_batch=10) as node:
        for n in range(40):
            node.mine([issued(n)])
        url = node.url + "v2/a-secret-key"
        async with Rpc(url) as rpc, Leases(database).hold("follow:84532") as lease:
            limits = Limits(CHAIN, [rpc], clock)
            await limits.load(lease.connection)
            assert len(await rpc.logs_adaptive([FACTORY], 0, 40)) == 40
            await rpc.headers(range(30))
            learned = rpc.learned
            assert learned.max_span == 7 and learned.max_batch <= 10
            await limits.save(lease)  # too soon: it is written seldom
            assert await rows(database) == []
            clock.now += EVERY
            await limits.save(lease)
            (stored,) = await rows(database)
            assert "secret" not in str(stored) and "v2" not in str(stored)
            await database.pool.execute("UPDATE indexer.endpoint_limits SET endpoint = 'nobody wrote here'")
            clock.now += EVERY
            await limits.save(lease)  # nothing changed
            assert (await rows(database))[0]["endpoint"] == "nobody wrote here"
        refused = node.calls["eth_getLogs"]
        async with Rpc(url) as again, Rpc(node.url + "v2/another-key") as other:
            async with database.pool.acquire() as conn:
                await Limits(CHAIN, [again, other]).load(conn)
            assert again.learned == learned
            assert other.learned == Learned()  # another key may be another plan
            assert len(await again.logs_adaptive([FACTORY], 0, 40)) == 40
        assert node.calls["eth_getLogs"] - refused == 6


async def test_a_limit_that_only_tightens_is_found_out_anew_after_a_week(database: Database) -> None:
    clock = Clock()
    kept = Learned(max_span=10, dense_spans={"1": 50}, max_batch=5)
    async with Rpc("http://127.0.0.1:1/") as rpc, Leases(database).hold("follow:84532") as lease:
        limits = Limits(CHAIN, [rpc], clock)
        await limits.load(lease.connection)
        rpc.learned = kept
        clock.now += EVERY
        await limits.save(lease)
        await database.pool.execute("UPDATE indexer.endpoint_limits SET firm_at = firm_at - interval '6 days'")
        rpc.learned = msgspec.structs.replace(kept, dense_spans={"1": 70})  # density alone makes no limit younger
        clock.now += EVERY
        await limits.save(lease)
        async with Rpc(rpc.url) as again:
            await Limits(CHAIN, [again]).load(lease.connection)
            assert again.learned == rpc.learned
        await database.pool.execute("UPDATE indexer.endpoint_limits SET firm_at = firm_at - interval '2 days'")
        async with Rpc(rpc.url) as again:
            await Limits(CHAIN, [again]).load(lease.connection)
            assert again.learned == Learned(dense_spans={"1": 70})


async def test_what_another_process_stored_tightens_ours(database: Database) -> None:
    clock = Clock()
    async with Rpc("http://127.0.0.1:1/") as rpc, Leases(database).hold("follow:84532") as lease:
        limits = Limits(CHAIN, [rpc], clock)
        await limits.load(lease.connection)
        rpc.learned = Learned(max_span=100, dense_spans={"1": 50, "2": 9}, max_batch=5, batching=False)
        clock.now += EVERY
        await limits.save(lease)
        async with Rpc(rpc.url) as ours:
            ours.learned = Learned(max_span=2_000, dense_spans={"1": 60}, max_addresses=50)
            await Limits(CHAIN, [ours]).load(lease.connection)
            assert ours.learned == Learned(100, {"1": 60, "2": 9}, 50, 5, False)


async def rows(database: Database) -> list[dict[str, object]]:
    return [dict(row) for row in await database.pool.fetch("SELECT * FROM indexer.endpoint_limits")]


async def test_a_daemon_that_starts_again_asks_for_no_more_than_went_through(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexer.chain.limits.EVERY", 0.0)
    async with FakeNode(max_span=7) as node:
        node.mine([created(1)], 3)
        for n in range(60):
            node.mine([issued(n)])
        node.set_tags(safe=60, finalized=50)
        world = World(database, node)
        async with world.running():
            await world.caught_up()
            await history_filled(database, CHAIN)

            async def kept() -> bool:
                return any(row["limits"]["max_span"] == 7 for row in await rows(database))

            await eventually(kept)
        node.asked.clear()
        for n in range(60, 90):
            node.mine([issued(n)])
        node.set_tags(safe=85, finalized=80)
        async with world.running():
            await world.caught_up()
            await history_filled(database, CHAIN)
            await world.intact()
        asked = [params[0] for method, params in node.asked if method == "eth_getLogs" and "fromBlock" in params[0]]
        assert asked
        assert max(int(query["toBlock"], 16) - int(query["fromBlock"], 16) for query in asked) < 7


async def test_a_daemon_learns_by_polling_too(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's own range is what most plans limit."""
    monkeypatch.setattr("indexer.chain.limits.EVERY", 0.0)
    async with FakeNode(max_span=5) as node:
        node.mine(blocks=5)
        async with following(database, node, chain_config(node, socket=False)):
            await caught_up(database, node)
            node.mine([issued(1)], 40)
            await caught_up(database, node)

            async def kept() -> bool:
                return any(row["limits"]["max_span"] == 5 for row in await rows(database))

            await eventually(kept)
            node.asked.clear()
            node.mine([issued(2)], 40)
            await caught_up(database, node)
        asked = [params[0] for method, params in node.asked if method == "eth_getLogs"]
        assert asked and max(int(query["toBlock"], 16) - int(query["fromBlock"], 16) for query in asked) < 5
