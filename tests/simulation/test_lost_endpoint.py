"""The only endpoint goes away, answers nonsense, or comes back as another chain: the loops wait and say why, nothing wrong is
stored, and what happened meanwhile is not lost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from structlog.testing import capture_logs

from indexer.chain.schedule import WrongChain
from indexer.config import Chain
from indexer.store.database import Database
from tests.fake_node import FakeChain, FakeNode
from tests.following import (
    FACTORY,
    caught_up,
    chain_config,
    created,
    eventually,
    filling,
    following,
    history_filled,
    issued,
    stored,
    transferred,
    truth,
)
from tests.simulation.world import World

MODES = pytest.mark.parametrize("socket", [True, False], ids=["socket", "polling"])
PAGE = "<html><head><title>502 Bad Gateway</title></head><body>cloudflare\x1b[31m</body></html>"


def html(status: int) -> Callable[[FakeNode], None]:
    def sicken(node: FakeNode) -> None:
        node.reply("*", PAGE, status=status, times=None)

    return sicken


def half_a_json(node: FakeNode) -> None:
    node.truncate("*", times=None)


SICK = pytest.mark.parametrize(
    ("sicken", "error", "words"),
    [
        (html(502), "unavailable", "502 Bad Gateway"),
        (html(200), "not_json", "in place of JSON"),
        (half_a_json, "not_json", "half a JSON"),
    ],
    ids=["HTML 502", "HTML 200", "half a JSON"],
)


@MODES
async def test_an_endpoint_that_is_gone_for_a_while(database: Database, socket: bool) -> None:
    async with FakeNode() as node:
        world = World(database, node, socket=socket)
        node.mine([created(1)], 3)
        async with world.running():
            await world.caught_up()
            reference = await world.register(1)
            await node.stop()
            for n in range(1, 6):
                node.mine([issued(n), transferred()], 3)
            node.set_tags(safe=15, finalized=2)
            await eventually(lambda: _counted(world, "unreachable"))
            await node.start()
            await world.caught_up()
            await world.reaches(reference, "ready")
            await world.intact()
            assert await world.trace(reference) == ["ready"]


@SICK
async def test_an_endpoint_that_answers_no_json_for_a_while(
    database: Database, sicken: Callable[[FakeNode], None], error: str, words: str
) -> None:
    async with FakeNode() as node:
        world = World(database, node, socket=False)
        node.mine([created(1)], 3)
        with capture_logs() as logs:
            async with world.running():
                await world.caught_up()
                reference = await world.register(1)
                sicken(node)
                node.mine([issued(1), transferred()], 3)
                node.set_tags(safe=5, finalized=2)
                await eventually(lambda: _counted(world, error))
                await eventually(lambda: _told(logs))
                node.heal()
                await world.caught_up()
                await world.reaches(reference, "ready")
                await world.intact()
        reason = next(entry["reason"] for entry in logs if entry["event"] in ("asking again", "history waits"))
        assert words in reason and reason.isprintable() and "check the address, the network" in reason


@MODES
@pytest.mark.parametrize("seen", [True, False], ids=["outage seen", "outage not seen"])
async def test_an_endpoint_that_comes_back_as_another_chain(database: Database, socket: bool, seen: bool) -> None:
    """A gateway that was given another route: nothing of that chain is taken for ours, nothing is latched for it, and the
    words name both."""
    async with FakeNode() as node:
        world = World(database, node, socket=socket)
        node.mine([created(1)], 3)
        ours, other = node.chain, FakeChain(1, salt=7)
        other.mine([created(1), issued(1)], 30)
        other.safe = other.finalized = 25
        async with world.running():
            await world.caught_up()
            reference = await world.register(1)
            if seen:
                await node.stop()
                await eventually(lambda: _counted(world, "unreachable"))
            node.chain, node.chain_id = other, 1
            try:
                if seen:
                    await node.start()
                said = await world.problem(
                    "follow", "WrongChain", "'fake' is configured with chain_id 84532", "serves chain 1"
                )
                assert "correct chain_id or the rpc url" in said
                assert await database.pool.fetchval("SELECT count(*) FROM indexer.movement") == 0
                assert await database.pool.fetchval("SELECT latch FROM indexer.chain") is None
            finally:
                node.chain, node.chain_id = ours, 84532
            node.mine([issued(1)], 5)
            node.set_tags(safe=7, finalized=2)
            await world.reaches(reference, "ready")
            await world.caught_up()
            await world.intact()
            assert await world.trace(reference) == ["ready"]


@pytest.mark.parametrize("chain_id", [1, 84532], ids=["another id", "the same id, reset"])
async def test_history_is_not_read_from_another_chain(database: Database, chain_id: int) -> None:
    """The daemon is started again with a wrong url: what is stored is neither corrected by that chain nor added to from it."""
    async with FakeNode() as node:
        world = World(database, node, socket=False)
        node.mine([created(1), issued(1)], 30)
        async with world.running(second_look_seconds=3600.0):
            await world.caught_up()
            await world.tags(safe=25, finalized=25)
            here, elsewhere = await world.register(1), await world.register(2)
            await world.reaches(here, "ready")
            await world.looked()
        ours, other = node.chain, FakeChain(chain_id, salt=7)
        other.mine(blocks=3)
        other.mine([created(1), issued(2)], 30)
        other.safe = other.finalized = 28
        node.chain, node.chain_id = other, chain_id
        try:
            with capture_logs() as logs:
                async with world.running(chain_id=84532):
                    await world.problem("follow", "WrongChain")

                    async def history_says_so() -> bool:
                        told = [
                            entry.get("error") or entry.get("reason")
                            for entry in logs
                            if "follow" not in entry.values()
                        ]
                        return any(
                            "serves chain 1:" in str(each) or "no history is read from it" in str(each) for each in told
                        )

                    await eventually(history_says_so)
                    asked = node.calls["eth_chainId"]
                    await eventually(lambda: _asked(node, asked + 6))
                    await world.looked()
                    assert (await world.state(here), await world.state(elsewhere)) == ("ready", "pending")
        finally:
            node.chain, node.chain_id = ours, 84532
        async with world.running():
            await world.caught_up()
            await world.looked()
            await world.intact()
            assert (await world.state(here), await world.state(elsewhere)) == ("ready", "pending")
            assert await world.trace(here) == ["ready", "finalized"]


OTHERS = pytest.mark.parametrize("chain_id", [1, 84532], ids=["another id", "the same id, reset"])


@OTHERS
@pytest.mark.parametrize("batches", [True, False], ids=["batches", "single calls"])
async def test_history_whose_chain_changes_between_two_windows(
    database: Database, monkeypatch: pytest.MonkeyPatch, chain_id: int, batches: bool
) -> None:
    """The route changes in the middle of a pass that began on the right chain: nothing of the other one is stored, and
    nothing of it counts as read."""
    monkeypatch.setattr("indexer.chain.pipeline.FIRST_WINDOW", 10)
    monkeypatch.setattr("indexer.chain.pipeline.LARGEST_WINDOW", 10)
    async with FakeNode() as node:
        node.mine([created(1)])
        for n in range(1, 100):
            node.mine([issued(n), transferred()])
        node.set_tags(safe=95, finalized=90)
        if not batches:
            node.max_batch = 1
        ours, other = node.chain, FakeChain(chain_id, salt=7)
        other.mine(blocks=2)
        other.mine([created(1)])
        for n in range(1, 120):
            other.mine([issued(1000 + n)])
        other.safe = other.finalized = 100
        chain = chain_config(node)
        async with following(database, node, chain):
            await caught_up(database, node)
            await eventually(lambda: _finalized(database, 90))
        swapped = _swap_at(node, 4, other, chain_id)
        await _interrupted(database, node, chain)
        movements = "SELECT block_number, block_hash FROM indexer.movement WHERE canonical AND block_number <= 90"
        rows = await database.pool.fetch(movements)
        assert all(ours.canonical[row["block_number"]].hash == row["block_hash"] for row in rows)
        covered = await database.pool.fetch(
            "SELECT upper(r) - 1 AS high FROM indexer.coverage, unnest(blocks) AS r WHERE emitter <> ''"
        )
        assert swapped() and len(rows) < 89 and all(row["high"] < 90 for row in covered)
        node.chain, node.chain_id = ours, 84532
        async with filling(database, node, chain):
            await history_filled(database, 84532)
        below = [{place for place in places if place[0] <= 90} for places in (await stored(database), truth(ours))]
        assert below[0] == below[1]


async def test_a_second_look_whose_chain_changes_between_two_windows(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other chain leaves out was there, and stays; what it holds is not taken for missing."""
    monkeypatch.setattr("indexer.chain.second_look.WINDOW", 20)
    async with FakeNode() as node:
        node.mine([created(1)])
        for n in range(1, 100):
            node.mine([issued(n)])
        node.set_tags(safe=95, finalized=90)
        ours, other = node.chain, FakeChain(84532, salt=7)
        other.mine(blocks=2)
        other.mine([created(1)])
        for n in range(1, 120):
            other.mine([issued(1000 + n)])
        other.safe = other.finalized = 100
        chain = chain_config(node, second_look_seconds=3600.0)
        async with following(database, node, chain), filling(database, node, chain):
            await caught_up(database, node)
            await eventually(lambda: _finalized(database, 90))
            await history_filled(database, 84532)
            await eventually(lambda: _equal(stored(database), truth(ours)))
        swapped = _swap_at(node, 2, other, 84532)
        looking = chain_config(node, second_look_seconds=0.05, verify_calls_per_second=1000.0)
        await _interrupted(database, node, looking)
        node.chain = ours
        assert swapped()
        assert await stored(database) == truth(ours)
        assert not await database.pool.fetchval(
            "SELECT blocks && int8range(21, 91) FROM indexer.coverage WHERE verdict = 'second_look' AND emitter = $1",
            FACTORY,
        )


async def _finalized(database: Database, number: int) -> bool:
    return bool(await database.pool.fetchval("SELECT finalized_number >= $1 FROM indexer.chain", number))


async def _equal(found: Awaitable[object], wanted: object) -> bool:
    return await found == wanted


def _swap_at(node: FakeNode, turn: int, other: FakeChain, chain_id: int) -> Callable[[], bool]:
    """The node serves the other chain from its `turn`th answer about logs on; whether it does by now."""
    asked = 0

    def count(_: list[dict[str, str]]) -> bool:
        nonlocal asked
        asked += 1
        if asked == turn:
            node.chain, node.chain_id = other, chain_id
        return False

    node.lie("eth_getLogs", lambda _, logs: logs, times=None, when=count)
    return lambda: asked >= turn


async def _interrupted(database: Database, node: FakeNode, chain: Chain) -> None:
    """History, until it says that it reads nothing from this endpoint."""

    async def said() -> bool:
        return any("no history is read from it" in str(entry.get("reason")) for entry in logs)

    with capture_logs() as logs, suppress(WrongChain):
        async with filling(database, node, chain):
            await eventually(said)
    node.faults.clear()


async def _asked(node: FakeNode, times: int) -> bool:
    return node.calls["eth_chainId"] >= times


async def test_a_chain_id_that_was_wrong_is_corrected_under_the_same_name(database: Database) -> None:
    """The wrong one left a row behind, with the name that the right one takes now."""
    async with FakeNode() as node:
        world = World(database, node)
        node.mine([created(1)])
        async with world.running(chain_id=1):
            await world.problem("follow", "WrongChain", "configured with chain_id 1", "serves chain 84532")
        async with world.running():
            rows = await database.pool.fetch("SELECT chain_id, name, active FROM indexer.chain ORDER BY chain_id")
            assert [tuple(row) for row in rows] == [(1, "fake (1)", False), (84532, "fake", True)]
            node.mine([issued(1)])
            await world.intact()


async def _counted(world: World, error: str) -> bool:
    return world.total("rpc_errors_total", error=error) > 0


async def _told(logs: list[dict[str, object]]) -> bool:
    return any(
        entry["event"] in ("asking again", "history waits") and entry["log_level"] == "warning" for entry in logs
    )
