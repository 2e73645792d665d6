"""When a second endpoint is asked because the first is slow, and whose answer counts: in virtual time, without a network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from indexer.chain.hedging import under_way
from indexer.chain.integrity import Lie
from indexer.chain.pool import Node, Overtaken, Pool, Seen, Source
from indexer.chain.rpc import Rpc
from indexer.chain.rpc_errors import RpcError, Unreachable
from indexer.model.types import BlockRef, Hash32, Header
from indexer.telemetry import Metrics
from tests.simulation.seeded.loop import VirtualLoop

HASH = Hash32(b"\x01" * 32)


def head(time_s: int = 10) -> Header:
    zero = Hash32(bytes(32))
    return Header(5, HASH, zero, time_s, 1000 * time_s, bytes(256), zero)


class World:
    """Two endpoints, each of which takes `seconds[place]` for a request, and answers with its place."""

    def __init__(self, *seconds: float) -> None:
        self.seconds: list[float | Exception] = list(seconds)
        self.metrics = Metrics()
        self.nodes = [Node(Rpc(f"http://127.0.0.{place + 1}:1"), place=place) for place in range(len(seconds))]
        self.pool = Pool("fake", 84532, self.nodes, quorum=2, metrics=self.metrics)
        self.source: Source = self.pool.source("head")
        self.asked = [0] * len(seconds)
        self.cancelled = [0] * len(seconds)
        self.look()

    def look(self) -> None:
        """All of them were looked at just now, and hold what we hold."""
        for node in self.nodes:
            node.seen = Seen(head(), None, None, BlockRef(5, HASH), HASH)
            node.identified, node.looked_at = True, asyncio.get_running_loop().time()
            node.advanced_at = node.looked_at

    async def answer(self, node: Node) -> int:
        self.asked[node.place] += 1
        seconds = self.seconds[node.place]
        try:
            with under_way():
                await asyncio.sleep(0.1 if isinstance(seconds, Exception) else seconds)
                if isinstance(seconds, Exception):
                    raise seconds
        except asyncio.CancelledError:
            self.cancelled[node.place] += 1
            raise
        return node.place

    async def ask(self, times: int = 1) -> int:
        for _ in range(times):
            found = await self.source.ask(self.answer)
        return found

    def hedged(self, outcome: str, place: int = 0) -> float:
        labels = {"chain": "fake", "endpoint": self.nodes[place].name, "outcome": outcome}
        return self.metrics.registry.get_sample_value("loyalty_hedged_questions_total", labels) or 0.0


def virtually(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        loop = VirtualLoop(1)
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(test())
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def now() -> float:
    return asyncio.get_running_loop().time()


async def taken(question: Awaitable[Any]) -> float:
    """The seconds until the answer."""
    began = now()
    await question
    return now() - began


@virtually
async def test_one_that_hangs_is_overtaken_after_what_is_long_for_it() -> None:
    world = World(0.2, 0.1)
    await world.ask(20)
    assert world.asked == [20, 0]
    world.seconds[0] = 3600.0
    assert await taken(world.ask()) == pytest.approx(3 * 0.2 + 0.1)
    assert world.source.lead is world.nodes[1] and world.cancelled == [1, 0]
    assert world.hedged("overtaken") == 1


@virtually
async def test_where_the_second_hangs_too_the_third_is_asked() -> None:
    """And where the second refuses, the third is asked at once."""
    world = World(3600.0, 3600.0, 0.1)
    assert await taken(world.ask()) == pytest.approx(1.0 + 1.0 + 0.1)
    assert world.source.lead is world.nodes[2] and world.cancelled == [1, 1, 0] and world.hedged("overtaken") == 1
    world = World(3600.0, 0.1, 0.1)
    world.seconds[1] = Unreachable("no", endpoint="", method="", params="")
    assert await taken(world.ask()) == pytest.approx(1.0 + 0.1 + 0.1)
    assert world.source.lead is world.nodes[2]


@virtually
async def test_one_that_is_always_slow_is_only_asked_alone() -> None:
    """Far away is no trouble: what is long is measured by itself."""
    world = World(0.6, 0.1)
    await world.ask(100)
    assert world.asked == [100, 0]


@virtually
async def test_what_is_slow_everywhere_is_not_asked_for_much_more_often() -> None:
    world = World(5.0, 5.0)
    await world.ask(100)
    assert 100 < sum(world.asked) <= 100 + 3 + 10
    assert world.hedged("in_time") == sum(world.asked) - 100


@virtually
async def test_waiting_for_our_own_pace_is_nobodys_slowness() -> None:
    world = World(0.1, 0.1)

    async def paced(node: Node) -> int:
        await asyncio.sleep(9.0)
        return await world.answer(node)

    await world.source.ask(paced)
    assert world.asked == [1, 0]


@virtually
async def test_the_answer_that_is_good_counts_whoever_is_first() -> None:
    """An error of the second decides nothing; one of the first is forgotten for the second's answer; two are the first's."""
    lie, lost = Lie("header_hash", "wrong"), Unreachable("no", endpoint="", method="", params="")
    world = World(1.5, 0.1)
    world.seconds[1] = lie
    assert await world.ask() == 0 and world.source.lead is world.nodes[0]
    assert world.hedged("in_time") == 1

    async def fails_late(node: Node) -> int:
        with under_way():
            await asyncio.sleep(1.2 if node.place == 0 else 1.0)
        if node.place == 0:
            raise lost
        return await world.answer(node)

    world.seconds[1] = 0.1
    assert await world.source.ask(fails_late) == 1 and world.source.lead is world.nodes[1]

    world = World(1.5, 0.1)
    world.seconds[1] = lie

    async def both(node: Node) -> int:
        await world.answer(node)
        raise lost

    with pytest.raises(RpcError) as raised:
        await world.source.ask(both)
    assert raised.value is lost and world.hedged("unanswered") == 1


@virtually
async def test_one_that_is_slow_again_and_again_loses_the_lead_for_longer() -> None:
    """It is back when a look at it has succeeded since, and its time is over; ten minutes later all is forgotten."""
    world = World(3600.0, 0.1)
    quick = world.nodes[1]

    async def back_after() -> float:
        began = now()
        while world.source.lead is quick:
            await asyncio.sleep(1.0)
            world.look()
            world.source.reconsider()
        return now() - began

    away = []
    for _ in range(4):
        await world.ask()
        assert world.source.lead is quick
        await world.ask(20)
        world.source.reconsider()
        assert world.source.lead is quick, "nobody has looked at it since"
        away.append(await back_after())
    assert away == pytest.approx([1.0, 3.0, 28.0, 58.0], abs=1.1), "two seconds less, in which the other was asked"
    await asyncio.sleep(700.0)
    world.look()
    await world.ask()
    assert await back_after() == pytest.approx(1.0, abs=1.1)


@virtually
async def test_a_step_that_was_begun_at_one_endpoint_is_not_ended_at_another() -> None:
    world = World(3600.0, 0.1)
    with pytest.raises(Overtaken):
        await world.source.ask_on(world.answer)
    assert await world.source.ask_on(world.answer) == 1


@virtually
async def test_many_questions_at_once_count_as_one_slowness() -> None:
    """Of twenty, three are asked twice; the others go to who has answered then."""
    world = World(3600.0, 0.1)
    answers = await asyncio.gather(*(world.source.ask(world.answer) for _ in range(20)))
    assert answers == [1] * 20
    assert world.asked == [20, 20] and world.cancelled == [20, 0]
    await asyncio.sleep(1.0)
    world.look()
    world.source.reconsider()
    assert world.source.lead is world.nodes[0], "slow once: back at the next look"


@virtually
async def test_who_is_outvoted_is_not_back_at_once() -> None:
    """Rewound to the last block that all of them hold, nothing tells it from the others: it would lead to its own branch again."""
    world = World(0.1, 0.1, 0.1)
    assert world.source.prefer(world.nodes[1:], "most show another block")
    world.source.reconsider()
    assert world.source.lead is world.nodes[1]
    await asyncio.sleep(1.1)
    world.look()
    world.source.reconsider()
    assert world.source.lead is world.nodes[0]


@virtually
async def test_who_may_not_lead_is_not_asked_instead() -> None:
    """In quarantine, apart, or behind: then the lead is waited for, as with one endpoint."""
    world = World(8.0, 0.1)
    for spoil in ("quarantine", "apart", "behind", "trouble"):
        world.look()
        other = world.nodes[1]
        if spoil == "quarantine":
            world.pool.quarantine(other, "lie", "a lie")
        elif spoil == "apart":
            other.seen = Seen(head(), None, None, BlockRef(5, HASH), Hash32(b"\x02" * 32))
        elif spoil == "behind":
            world.nodes[0].seen = Seen(head(21), None, None, BlockRef(5, HASH), HASH)
        else:
            other.trouble = "no connection"
        assert await world.ask() == 0, spoil
        other.put_aside = other.trouble = None
    alone = Pool.of(world.nodes[0].rpc, 84532)
    assert await alone.source().ask(world.answer) == 0
    assert await world.pool.source("history").ask(world.answer) == 0
    assert world.asked == [6, 0]
