"""The only endpoint goes away, answers nonsense, or comes back as another chain: the loops wait and say why, nothing wrong is
stored, and what happened meanwhile is not lost.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from structlog.testing import capture_logs

from indexer.store.database import Database
from tests.fake_node import FakeNode
from tests.following import created, eventually, issued, transferred
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
async def test_an_endpoint_that_comes_back_as_another_chain(database: Database, socket: bool) -> None:
    """A gateway that was given another route: nothing of that chain is taken for ours, and the words name both."""
    async with FakeNode() as node:
        world = World(database, node, socket=socket)
        node.mine([created(1)], 3)
        ours = node.chain
        other = ours.fork()
        other.chain_id = 1
        async with world.running():
            await world.caught_up()
            reference = await world.register(1)
            await node.stop()
            node.chain, node.chain_id = other, 1
            other.mine([issued(1)], 5)
            other.safe = other.finalized = 7
            await eventually(lambda: _counted(world, "unreachable"))
            await node.start()
            said = await world.problem(
                "follow", "WrongChain", "'fake' is configured with chain_id 84532", "serves chain 1"
            )
            assert "correct chain_id or the rpc url" in said
            assert await database.pool.fetchval("SELECT count(*) FROM indexer.movement") == 0
            await node.stop()
            node.chain, node.chain_id = ours, 84532
            node.mine([issued(1)], 5)
            node.set_tags(safe=7, finalized=2)
            await node.start()
            await world.reaches(reference, "ready")
            await world.caught_up()
            await world.intact()
            assert await world.trace(reference) == ["ready"]


async def _counted(world: World, error: str) -> bool:
    return world.total("rpc_errors_total", error=error) > 0


async def _told(logs: list[dict[str, object]]) -> bool:
    return any(
        entry["event"] in ("asking again", "history waits") and entry["log_level"] == "warning" for entry in logs
    )
