"""One endpoint of several lies on purpose, and knows how the others are asked: nothing false leaves, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from indexer.chain.pool import Node, Pool
from indexer.chain.proof import header_hash
from indexer.chain.rpc import Rpc
from indexer.chain.wire import RawHeader
from indexer.model.types import Hash32, Schedule
from indexer.store.database import Database
from tests.fake_node import FakeChain, FakeNode, hx
from tests.following import caught_up, eventually, issued, stored, truth
from tests.simulation.test_pool import agree, endpoints, loyal, nodes_of, world_of
from tests.simulation.test_proof import word_of
from tests.simulation.world import World


async def safe_event(world: World, node: FakeNode) -> str:
    """An operation's reference, once its event was read in a block that is safe, with all endpoints agreed before it."""
    await world.caught_up()
    await agree(world)
    reference = await world.register(1)
    node.mine([issued(1)])
    await world.caught_up()
    await world.tags(safe=6, finalized=2)
    return reference


async def test_blocks_that_one_made_up_confirm_nothing(database: Database) -> None:
    """Headers cost nothing to make: a minute of chain on top of a true block, at the endpoint that leads alone."""
    async with nodes_of(loyal(FakeChain()), 3) as nodes:
        world = world_of(database, nodes, socket=False, confidence="confirmed", seconds=60)
        async with world.running():
            await world.caught_up()
            await agree(world)
            reference = await world.register(1)
            nodes[0].mine([issued(1)])
            await world.caught_up()
            await world.reaches(reference, "confirming")
            ours = nodes[0].chain
            fork = ours.fork()
            nodes[0].move_to(fork)
            fork.mine(blocks=35)
            await caught_up(database, nodes[0])
            await world.looked()
            assert await world.trace(reference) == []
            for _ in range(50):
                ours.mine()
                await asyncio.sleep(0.02)
            await world.reaches(reference, "ready")
            assert await world.trace(reference) == ["ready"]


@pytest.mark.parametrize("socket", [True, False], ids=["socket", "polling"])
async def test_receipts_that_one_makes_unprovable_are_asked_elsewhere(database: Database, socket: bool) -> None:
    """A type that nobody knows, or no cumulative gas: no root can be made of the liar's receipts, and of the others' one can."""

    def strange(_: Any, receipts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [each | {"type": "0x55"} for each in receipts]

    async with nodes_of(loyal(FakeChain()), 2) as nodes:
        nodes[0].lie("eth_getBlockReceipts", strange, times=None)
        world = world_of(database, nodes, socket=socket, confidence="safe", second_look_seconds=3600.0)
        async with world.running():
            reference = await safe_event(world, nodes[0])
            await world.reaches(reference, "ready", 20)
            (evidence,) = await world.evidence(reference)
            assert evidence["proof"] == "receipts_root"


@pytest.mark.parametrize("socket", [True, False], ids=["socket", "polling"])
async def test_an_event_altered_in_receipts_that_cannot_be_proven_settles_nothing(
    database: Database, socket: bool
) -> None:
    """The bloom is the header's, as it says nothing of amounts; `where_possible` believes what cannot be verified, but not one's word."""

    def altered(_: Any, receipts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            each | {"cumulativeGasUsed": None, "logs": [word_of(log, 3, 1000) for log in each["logs"]]}
            for each in receipts
        ]

    async with nodes_of(loyal(FakeChain()), 2) as nodes:
        nodes[0].lie("eth_getBlockReceipts", altered, times=None)
        nodes[0].lie("eth_getLogs", lambda _, logs: [word_of(log, 3, 1000) for log in logs], times=None)
        world = world_of(
            database, nodes, socket=socket, confidence="safe", proof="where_possible", second_look_seconds=3600.0
        )
        async with world.running():
            await world.caught_up()
            await agree(world)
            false, true = await world.register(1, amount=1000), await world.register(2)
            nodes[0].mine([issued(1)])
            nodes[0].mine([issued(2)])
            await world.caught_up()
            await world.tags(safe=7, finalized=2)
            await world.reaches(true, "ready", 20)
            assert "ready" not in await world.trace(false)


async def test_the_gate_does_not_speak_for_receipts_that_prove_nothing(database: Database) -> None:
    """One of two events with one bloom is left out of receipts without cumulative gas: the block is looked at a second time."""

    def left_out(_: Any, receipts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            each | {"cumulativeGasUsed": None}
            for each in receipts
            if len(receipts) < 2 or each["transactionIndex"] == "0x0"
        ]

    async with nodes_of(loyal(FakeChain()), 2) as nodes:
        nodes[0].lie("eth_getBlockReceipts", left_out, times=None)
        world = world_of(database, nodes, socket=True, second_look_seconds=3600.0)
        async with world.running():
            await world.caught_up()
            await agree(world)
            nodes[0].mine([issued(1), issued(2)])
            await world.caught_up()
            assert await world.verdicts(6, 6) == {"unverified"}


@pytest.mark.parametrize("socket", [True, False], ids=["socket", "polling"])
@pytest.mark.parametrize(
    "broken",
    [
        {"type": "zz", "cumulativeGasUsed": None},
        {"type": "0x", "root": "0x"},
        {"status": "0x" + "f" * 80},
        {"logs": [{"address": "0x", "topics": [], "data": "0x"}]},
    ],
)
async def test_odd_receipts_stop_nobody(database: Database, socket: bool, broken: dict[str, Any]) -> None:
    async with nodes_of(loyal(FakeChain()), 3) as nodes:
        nodes[0].lie("eth_getBlockReceipts", lambda _, receipts: [each | broken for each in receipts], times=None)
        world = world_of(database, nodes, socket=socket, confidence="safe", second_look_seconds=3600.0)
        async with world.running():
            reference = await safe_event(world, nodes[0])
            await world.reaches(reference, "ready", 20)
            assert world.supervisor is not None
            assert {name: task.problem for name, task in world.supervisor.tasks.items() if task.problem} == {}


async def test_a_second_reader_makes_up_an_event_with_the_nonce_of_a_settled_one(database: Database) -> None:
    """It would come first, and undo what is ready: what another reader has more is looked for in its block."""
    async with nodes_of(loyal(FakeChain()), 3) as nodes:
        chain = nodes[0].chain
        world = world_of(database, nodes, socket=False, confidence="safe", second_look_seconds=0.2)
        made_up: list[dict[str, Any]] = []

        def more(params: list[Any], logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            low, high = (int(params[0].get(key, "0x0"), 16) for key in ("fromBlock", "toBlock"))
            return made_up + logs if made_up and low <= 4 <= high else logs

        async with world.running():
            reference = await safe_event(world, nodes[0])
            await world.reaches(reference, "ready")
            true = msgspec.json.decode(chain.canonical[6].entries[0][2])
            made_up += [true | {"blockNumber": "0x4", "blockHash": "0x" + "ab" * 32}]
            nodes[1].lie("eth_getLogs", more, times=None)
            nodes[0].set_tags(safe=6, finalized=6)

            async def looked_at() -> bool:
                await asyncio.sleep(0.05)
                nodes[0].mine()
                return "unverified" not in await world.verdicts(1, 6)

            await eventually(looked_at, 20)
            await world.looked()
            assert [t for t in await world.trace(reference) if t != "finalized"] == ["ready"]
            assert await stored(database) == truth(chain)


def resealed(raw: dict[str, Any], **other: str) -> dict[str, Any]:
    """The header with other fields, true to its hash again."""
    raw = raw | other
    return raw | {"hash": hx(header_hash(msgspec.convert(raw, RawHeader)))}


@pytest.mark.parametrize("history", [True, False], ids=["history", "head"])
async def test_times_that_no_table_holds_stop_nobody(database: Database, history: bool) -> None:
    """A header may say any time, and hash to what it says: a lie like another, and the next endpoint is asked."""

    def far(params: list[Any], raw: dict[str, Any]) -> dict[str, Any]:
        return resealed(raw, timestamp="0x" + "f" * 20) if int(raw["number"], 16) >= 6 else raw

    def late(_: Any, logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [log | {"blockTimestamp": "0x" + "f" * 20} for log in logs]

    async with nodes_of(loyal(FakeChain()), 3) as nodes:
        if history:
            nodes[0].set_tags(safe=4, finalized=4)
            nodes[0].lie("eth_getLogs", late, times=None)
        else:
            nodes[0].lie("eth_getBlockByNumber", far, times=None)
        world = world_of(database, nodes, socket=False)
        async with world.running():
            await caught_up(database, nodes[1])
            nodes[1].mine([issued(1)])
            await caught_up(database, nodes[1])
            await world.intact()
            assert world.supervisor is not None
            assert {name: task.problem for name, task in world.supervisor.tasks.items() if task.problem} == {}


async def test_who_is_right_is_not_put_aside_while_another_lags(database: Database) -> None:
    """The leader goes its own way, the third has not come so far yet: it holds our old blocks, and speaks for none of the new ones."""
    async with nodes_of(loyal(FakeChain()), 3) as nodes:
        world = world_of(database, nodes, socket=True)
        async with world.running():
            await world.caught_up()
            await agree(world)
            ours = nodes[0].chain
            fork = ours.fork()
            nodes[0].move_to(fork)
            for behind in range(1, 40):
                nodes[2].lag = min(behind, 20)
                fork.mine()
                ours.mine()
                await asyncio.sleep(0.02)
            told = await endpoints(world)
            assert told[f"127.0.0.1:{nodes[1].port}"]["state"] != "quarantined", told
            nodes[2].lag = 0
            ours.mine()
            await caught_up(database, nodes[1])
            assert await stored(database) == truth(ours)


async def test_a_genesis_that_only_one_shows_is_not_written_down(database: Database) -> None:
    """The first endpoint shows another block 0, another keeps none: what only one says is not written down."""
    async with nodes_of(loyal(FakeChain()), 3) as nodes:
        other = FakeChain(salt=7)
        nodes[0].lie(
            "eth_getBlockByNumber",
            lambda p, raw: other.header(other.canonical[0]) if p[0] == "0x0" else raw,
            times=None,
        )
        nodes[1].lie("eth_getBlockByNumber", lambda p, raw: None if p[0] == "0x0" else raw, times=None)
        world = world_of(database, nodes, socket=False)
        async with world.running():
            await world.caught_up()
            nodes[0].mine([issued(1)])
            await world.caught_up()
            await agree(world)
            told = await endpoints(world)
            assert "quarantined" not in {
                each["state"] for place, each in told.items() if place != f"127.0.0.1:{nodes[0].port}"
            }, told
            known = await database.pool.fetchval("SELECT genesis_hash FROM indexer.chain")
            assert known in (None, nodes[1].chain.canonical[0].hash)


async def test_who_shows_new_blocks_and_leads_to_none_of_them_is_left(database: Database) -> None:
    """Whoever leads answers looks with the newest blocks and polls with old ones."""
    async with nodes_of(loyal(FakeChain()), 3) as nodes:
        chain = nodes[0].chain
        world = world_of(database, nodes, socket=False)
        async with world.running():
            await world.caught_up()
            await agree(world)
            old = chain.header(chain.head)

            def stale(answers: list[Any]) -> Any:
                """A poll asks for the newest block, and twice for the cursor's; a look for other blocks."""
                if [answer.get("result", {}).get("number") for answer in answers[1:]] == [old["number"]] * 2:
                    answers[0]["result"] = old
                return answers

            nodes[0].batch_lie = stale
            for _ in range(60):
                chain.mine()
                await asyncio.sleep(0.05)
            await caught_up(database, nodes[1], 20)


async def test_blocks_made_ahead_of_time_lead_nobody_away(database: Database) -> None:
    """An hour of them, at the endpoint that leads: no other would come so far for an hour, and only then contradict."""
    start = int(time.time()) - 60
    async with nodes_of(loyal(FakeChain(time_s=start, block_ms=200)), 3) as nodes:
        ours = nodes[0].chain
        world = world_of(database, nodes, socket=False)
        async with world.running():
            await world.caught_up()
            await agree(world)
            reference = await world.register(1)
            fork = ours.fork()
            nodes[0].move_to(fork)
            fork.mine(blocks=18_000)
            ours.mine(blocks=10)
            ours.mine([issued(1)])
            await world.reaches(reference, "ready")
            ours.mine()
            await caught_up(database, nodes[1])
            assert await stored(database) == truth(ours)


@pytest.mark.parametrize("count", [2, 3])
async def test_a_schedule_that_only_one_keeps_to_is_not_the_chains(count: int) -> None:
    """The first fast block is read from the chain, a block more or less: by the liar's, all others would be late."""
    honest, beside = (FakeChain(first_fast_block=first) for first in (20, 21))
    known = {(honest.chain_id, Hash32(honest.canonical[0].hash)): Schedule(honest.time_s, 20)}
    for chain in (honest, beside):
        chain.mine(blocks=40)
    async with AsyncExitStack() as stack:
        chains = [beside, honest, honest][:count]
        nodes = [await stack.enter_async_context(FakeNode(chain=chain)) for chain in chains]
        rpcs = [await stack.enter_async_context(Rpc(node.url, timeout=5)) for node in nodes]
        pool = Pool("fake", honest.chain_id, [Node(rpc, place=place) for place, rpc in enumerate(rpcs)], quorum=2)
        _, schedule = await pool.source().introduce(None, known)
        assert schedule == pool.schedule == Schedule(honest.time_s, 20)
