"""Several endpoints of one chain: one leads, the next takes over, and nothing is undone, latched or signalled on one's word.

Each node is a FakeNode on the same chain, or on a fork of it; the loops are the daemon's, over a real PostgreSQL.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from indexer.chain import pool as pool_of_endpoints
from indexer.chain.pool import Node, Pool
from indexer.chain.rpc import Rpc
from indexer.commands.wiring import plain
from indexer.config import Chain
from indexer.store import chains
from indexer.store.database import Database
from indexer.store.overview import overview
from indexer.telemetry import Metrics
from indexer.terminal import status_text
from tests.fake_node import FakeChain, FakeNode
from tests.following import FACTORY, caught_up, chain_config, created, eventually, issued, stored, truth
from tests.simulation.world import World

MODES = pytest.mark.parametrize("socket", [True, False], ids=["socket", "polling"])


def several(node: FakeNode, **settings: Any) -> Chain:
    """The configuration of a chain with these nodes as its endpoints, `nodes` in their order."""
    nodes = settings.pop("nodes")
    rpc = [{"url": each.url} | settings.pop(f"rpc{place}", {}) for place, each in enumerate(nodes)]
    return chain_config(node, rpc=rpc, **settings)


@asynccontextmanager
async def nodes_of(chain: FakeChain, count: int) -> AsyncIterator[list[FakeNode]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(FakeNode(chain=chain)) for _ in range(count)]


def world_of(database: Database, nodes: list[FakeNode], **settings: Any) -> World:
    return World(database, nodes[0], **{"confidence": "included"} | settings, chain=several, nodes=nodes)


async def endpoints(world: World) -> dict[str, dict[str, Any]]:
    """How each endpoint stands, by its name."""
    told = await world.database.pool.fetchval("SELECT endpoints FROM indexer.chain")
    return {each["name"]: each for each in told or []}


async def standing(world: World, node: FakeNode, state: str, seconds: float = 60.0) -> str:
    """Waits until the endpoint is said to stand so; the reason."""
    name = f"127.0.0.1:{node.port}"

    async def so() -> bool:
        return (await endpoints(world)).get(name, {}).get("state") == state

    try:
        await eventually(so, seconds)
    except TimeoutError:
        raise AssertionError(f"{name} is not {state}: {await endpoints(world)}") from None
    return str((await endpoints(world))[name]["reason"])


async def agreed(world: World) -> bool:
    return bool(await world.database.pool.fetchval("SELECT indexer.is_agreed(c) FROM indexer.chain c"))


async def agree(world: World, wanted: bool = True) -> None:
    async def so() -> bool:
        return await agreed(world) is wanted

    await eventually(so, what="agreement")


def loyal(chain: FakeChain) -> FakeChain:
    chain.mine([created(1)])
    chain.mine(blocks=4)
    return chain


@MODES
async def test_one_of_two_is_lost_and_comes_back(database: Database, socket: bool) -> None:
    """Facts go on at the other one, a `ready` waits for the second witness, and leaves when it is there."""
    async with nodes_of(loyal(FakeChain()), 2) as (first, second):
        world = world_of(database, [first, second], socket=socket)
        async with world.running():
            await world.caught_up()
            await agree(world)
            one = await world.register(1)
            first.mine([issued(1)])
            await world.reaches(one, "ready")
            await first.stop()
            two = await world.register(2)
            first.mine([issued(2)], 3)
            await caught_up(database, second)
            await agree(world, False)
            assert "no connection" in await standing(world, first, "failing")
            await world.looked()
            assert await world.state(two) == "confirming" and await world.trace(two) == []
            assert world.total("failovers_total") >= 1
            await first.start()
            await world.reaches(two, "ready")
            await world.intact()
            assert await world.trace(two) == ["ready"]


@MODES
async def test_a_minority_fork_undoes_nothing_and_is_put_aside(database: Database, socket: bool) -> None:
    """The endpoint that leads goes over to a branch of its own: two others hold ours, so it is outvoted, with the reason."""
    async with nodes_of(loyal(FakeChain()), 3) as nodes:
        world = world_of(database, nodes, socket=socket)
        async with world.running():
            await world.caught_up()
            await agree(world)
            reference = await world.register(1)
            nodes[0].mine([issued(1)], 2)
            await world.reaches(reference, "ready")
            ours = nodes[0].chain
            fork = ours.fork()
            nodes[0].move_to(fork)
            fork.reorganise(3, [[issued(99)], [], [], []])
            for n in range(5):
                fork.mine()
                ours.mine([issued(10 + n)])
            await caught_up(database, nodes[1])
            reason = await standing(world, nodes[0], "quarantined")
            assert "it shows block" in reason and f"127.0.0.1:{nodes[1].port}" in reason
            assert await stored(database) == truth(ours)
            assert await world.trace(reference) == ["ready"]
            assert world.total("reorganisations_total") == 0
            assert world.sample("endpoint_quarantined", endpoint=f"127.0.0.1:{nodes[0].port}", reason="fork") == 1


@MODES
async def test_two_that_disagree_stop_signals_and_undo_nothing(database: Database, socket: bool) -> None:
    """One against one: no rollback, no signal; when the first comes to the other's branch, both agree and it is followed."""
    async with nodes_of(loyal(FakeChain()), 2) as nodes:
        world = world_of(database, nodes, socket=socket)
        async with world.running():
            await world.caught_up()
            await agree(world)
            ready = await world.register(1)
            nodes[0].mine([issued(1)], 2)
            await world.reaches(ready, "ready")
            ours = nodes[0].chain
            fork = ours.fork()
            nodes[1].move_to(fork)
            fork.reorganise(3, [[issued(2)], [], [], []])
            ours.mine([issued(3)], 2)
            waits = await world.register(3)
            await agree(world, False)
            await caught_up(database, nodes[0])
            await world.looked()
            assert await world.trace(ready) == ["ready"] and await world.trace(waits) == []
            # the first was wrong: it takes over the other's branch, event by event
            ours.reorganise(len(ours.canonical) - 5, [[issued(2)], [], [], []])
            nodes[1].move_to(ours)
            ours.mine(blocks=3)
            await world.caught_up()
            await agree(world)
            await world.reaches(ready, "reverted")
            await world.intact()
            assert await world.trace(ready) == ["ready", "reverted"]


@MODES
async def test_a_reorganisation_that_both_show_is_followed(database: Database, socket: bool) -> None:
    async with nodes_of(loyal(FakeChain()), 2) as nodes:
        world = world_of(database, nodes, socket=socket)
        async with world.running():
            await world.caught_up()
            await agree(world)
            reference = await world.register(1)
            nodes[0].mine([issued(1)], 2)
            await world.reaches(reference, "ready")
            for depth in (1, 6):
                nodes[0].reorganise(depth, [[issued(50 + depth)]] * (depth + 1))
                nodes[0].mine()
            await world.caught_up()
            await world.reaches(reference, "reverted")
            await world.intact()
            assert await world.trace(reference) == ["ready", "reverted"]


@MODES
async def test_the_second_lags_behind_the_first(database: Database, socket: bool) -> None:
    """What only the first shows is stored, and signalled when the second has come so far; it is not asked above its head."""
    async with nodes_of(loyal(FakeChain()), 2) as nodes:
        nodes[1].lag = 3
        world = world_of(database, nodes, socket=socket)
        async with world.running():
            await world.caught_up()
            await agree(world)
            nodes[0].mine([issued(1)])
            await world.caught_up()
            head = nodes[1].head
            asked = [
                int(params[0], 16)
                for method, params in nodes[1].asked
                if method == "eth_getBlockByNumber" and params[0].startswith("0x")
            ]
            assert asked and max(asked) <= head
            nodes[0].set_tags(safe=5, finalized=3)
            nodes[1].safe, nodes[1].finalized = 2, 1

            async def tags(safe: int, finalized: int) -> bool:
                row = await database.pool.fetchrow("SELECT safe_number, finalized_number FROM indexer.chain")
                return row is not None and tuple(row) == (safe, finalized)

            await eventually(lambda: tags(2, 1), what="the lower of the two tags")
            nodes[1].lag, nodes[1].safe, nodes[1].finalized = 0, -1, -1
            await eventually(lambda: tags(5, 3), what="both tags")


@MODES
async def test_the_leader_of_two_falls_far_behind(database: Database, socket: bool) -> None:
    """A node whose head is below ours undoes nothing, and the other one leads."""
    async with nodes_of(loyal(FakeChain()), 2) as nodes:
        world = world_of(database, nodes, socket=socket)
        async with world.running():
            nodes[0].mine([issued(1)], 10)
            await world.caught_up()
            await agree(world)
            nodes[0].lag = 12
            nodes[0].mine([issued(2)], 10)
            await caught_up(database, nodes[1])
            assert await stored(database) == truth(nodes[1].chain)
            assert world.total("reorganisations_total") == 0


async def most_behind(world: World, chain: FakeChain, seconds: float) -> int:
    """Mines ten blocks a second, every fifth with an event; how far the follower was behind at most."""
    most, due = 0, asyncio.get_running_loop().time()
    for n in range(int(seconds * 10)):
        chain.mine([issued(1000 + n)] if n % 5 == 0 else [])
        due += 0.1
        await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
        head = await world.database.pool.fetchval("SELECT head_number FROM indexer.chain")
        most = max(most, chain.head.number - head)
    return most


@pytest.mark.parametrize(("socket", "trouble"), [(True, "hangs"), (False, "hangs"), (False, "is slow")])
async def test_a_leader_that_does_not_answer_in_time_is_overtaken(
    database: Database, socket: bool, trouble: str
) -> None:
    """A request at the head that waits for longer than usual goes to the next endpoint too, long before its time is over."""
    async with nodes_of(loyal(FakeChain(block_ms=200)), 3) as nodes:
        world = world_of(database, nodes, socket=socket)
        async with world.running():
            await world.caught_up()
            await agree(world)
            await most_behind(world, nodes[0].chain, 1.0)
            if trouble == "hangs":
                nodes[0].hang("*", times=None)
            else:
                nodes[0].delay("*", 8.0, times=None)
            reference = await world.register(1)
            nodes[0].mine([issued(1)])
            assert await most_behind(world, nodes[0].chain, 3.0) <= 20
            await world.reaches(reference, "ready", 5.0)
            reference, asked = await world.register(2), nodes[0].calls["eth_chainId"]
            nodes[0].mine([issued(2)])
            await world.reaches(reference, "ready", 5.0)
            assert nodes[0].calls["eth_chainId"] == asked, "as the first witness, it would be waited for"
            name = f"127.0.0.1:{nodes[0].port}"
            assert world.sample("hedged_questions_total", chain="fake", endpoint=name, outcome="overtaken") >= 1
            assert world.total("rpc_lies_total") == 0 and world.total("reorganisations_total") == 0
            nodes[0].heal()
            await world.intact()


@MODES
@pytest.mark.parametrize("liars", [1, 2], ids=["one shows it", "two show it"])
async def test_a_finality_violation_is_latched_only_when_enough_show_it(
    database: Database, socket: bool, liars: int
) -> None:
    async with nodes_of(loyal(FakeChain()), 3) as nodes:
        world = world_of(database, nodes, socket=socket)
        async with world.running():
            nodes[0].mine(blocks=20)
            await world.caught_up()
            await agree(world)
            await world.tags(safe=15, finalized=12)
            ours = nodes[0].chain
            other = ours.fork()
            other.reorganise(18, [[]] * 25)
            other.safe, other.finalized = 20, 16
            for node in nodes[:liars]:
                node.move_to(other)
            for _ in range(5):
                ours.mine()
                other.mine()
            if liars == 1:
                assert "it shows block" in await standing(world, nodes[0], "quarantined")
                await caught_up(database, nodes[1])
                assert await database.pool.fetchval("SELECT latch FROM indexer.chain") is None
            else:
                await world.problem("follow", "FinalityViolation", "finality violation on fake")
                latch = await database.pool.fetchval("SELECT latch FROM indexer.chain")
                names = [f"127.0.0.1:{node.port}" for node in nodes]
                assert latch["theirs"]["endpoints"] == names[:2] and latch["ours"]["endpoints"] == names[2:]
                assert latch["ours"]["number"] == 12 and latch["ours"]["hash"] == "0x" + ours.canonical[12].hash.hex()


async def test_an_endpoint_of_another_chain_is_put_aside_and_all_of_them_are_an_error(database: Database) -> None:
    async with nodes_of(loyal(FakeChain()), 2) as nodes, FakeNode(chain_id=1) as stranger, FakeNode() as reset:
        reset.move_to(loyal(FakeChain(time_s=1_700_000_000)))  # the same id, and another genesis
        world = world_of(database, [stranger, reset, *nodes], websocket=nodes[0].ws_url, chain_id=84532)
        async with world.running():
            nodes[0].mine([issued(1)])
            await caught_up(database, nodes[0])
            assert "serves chain 1" in await standing(world, stranger, "quarantined")
            assert "another chain under the same id" in await standing(world, reset, "quarantined")
            await agree(world)
            assert await stored(database) == truth(nodes[0].chain)
        alone = world_of(database, [stranger, reset], socket=False, chain_id=84532)
        async with alone.running():
            await alone.problem("follow", "WrongChain")


async def test_trouble_that_several_loops_notice_counts_once() -> None:
    """The follower, history and the looks all meet another chain at one endpoint: it is aside for a minute, not for half an hour."""
    metrics, (sick, well) = Metrics(), (Node(Rpc(f"http://127.0.0.1:{port}")) for port in (1, 2))
    pool = Pool("fake", 84532, [sick, well], quorum=2, metrics=metrics)
    now = asyncio.get_running_loop().time

    def aside() -> float:
        assert sick.put_aside is not None and not pool.usable(sick)
        return sick.put_aside[2] - now()

    assert pool.quarantine(sick, "lie", "a lie")
    for _ in range(3):
        assert pool.quarantine(sick, "wrong_chain", "it serves chain 1")
    assert aside() <= 60.0
    sick.put_aside = ("lie", "a lie", now())  # its time is over
    assert pool.usable(sick)
    gauge = metrics.registry.get_sample_value
    assert gauge("loyalty_endpoint_quarantined", {"endpoint": sick.name, "reason": "lie"}) == 0
    assert gauge("loyalty_endpoint_quarantined", {"endpoint": sick.name, "reason": "wrong_chain"}) in (None, 0)
    assert pool.quarantine(sick, "wrong_chain", "it serves chain 1") and 60.0 < aside() <= 300.0
    assert not pool.quarantine(well, "lie", "a lie"), "somebody must be left to ask"


@pytest.mark.parametrize(
    ("method", "check"),
    [("eth_getBlockByNumber", "header_hash"), ("eth_getBlockReceipts", "receipts_bloom")],
)
async def test_an_answer_that_fails_a_check_is_asked_again_elsewhere(
    database: Database, monkeypatch: pytest.MonkeyPatch, method: str, check: str
) -> None:
    """The leader lies about headers or receipts: the other takes over, and the liar is put aside with the check; later it
    is on probation."""
    monkeypatch.setattr(pool_of_endpoints, "QUARANTINE", (1.0,))

    def lie(_: Any, answer: Any) -> Any:
        if isinstance(answer, list):
            return answer[:-1]
        return answer and answer | {"gasUsed": "0x7"}

    async with nodes_of(loyal(FakeChain()), 2) as nodes:
        world = world_of(database, nodes, socket=method == "eth_getBlockReceipts")
        async with world.running():
            await world.caught_up()
            await agree(world)
            nodes[0].lie(method, lie, times=None)
            for n in range(4):
                nodes[0].mine([issued(n)])
                await caught_up(database, nodes[1])
            name = f"127.0.0.1:{nodes[0].port}"
            assert world.sample("rpc_lies_total", endpoint=name, check=check) >= 1
            if check != "header_hash":  # a header that fails at each look is trouble already; it has no vote
                assert check in await standing(world, nodes[0], "quarantined")
            else:
                assert check in await standing(world, nodes[0], "failing")
            nodes[0].heal()
            await standing(world, nodes[0], "live")
            await agree(world)
            await world.intact()


async def test_an_endpoint_that_lags_is_said_to_and_neither_leads_nor_holds_what_it_has_not(database: Database) -> None:
    """The status says by how much and since when; an endpoint that fails is followed by one that keeps up; a tag above its own head counts
    for nothing."""
    async with nodes_of(loyal(FakeChain()), 4) as nodes:
        first, second, third, fourth = nodes
        names = [f"127.0.0.1:{node.port}" for node in nodes]
        world = world_of(database, nodes, socket=False)
        async with world.running():
            first.mine(blocks=20)
            await world.caught_up()
            await agree(world)
            first.lag = 12
            first.mine(blocks=2)
            await caught_up(database, second)
            assert "24 s of chain behind" in await standing(world, first, "lagging")
            told = (await endpoints(world))[names[0]]
            assert told["behind_seconds"] == 24 and told["since"] and not told["leads"]
            assert (await endpoints(world))[names[1]]["behind_seconds"] == 0
            async with database.pool.acquire() as conn:
                text = status_text(plain(await overview(conn)))
            assert f"{names[0]} (primary) lagging since {told['since']}: 24 s of chain behind" in text

            first.mine(blocks=1)
            await caught_up(database, second)
            assert (await endpoints(world))[names[0]]["since"] == told["since"], (
                "it lags since then, though it moves on"
            )
            led = world.sample("failovers_total", chain="fake", endpoint=names[0])
            await second.stop()
            first.mine([issued(1)])
            await caught_up(database, third)
            assert world.sample("failovers_total", chain="fake", endpoint=names[0]) == led

            above = first.head + 3
            first.safe, third.safe, fourth.safe = above, above, above - 8

            async def safe() -> int:
                return int(await database.pool.fetchval("SELECT safe_number FROM indexer.chain") or 0)

            async def counted() -> bool:
                return await safe() >= above - 8

            await eventually(counted, what="the lower of the two tags")
            await world.looked()
            assert await safe() == above - 8


async def test_a_claimed_event_costs_one_call_a_witness_and_one_for_its_proof(database: Database) -> None:
    """Polled: the header is the one that bound the event, and the witness is asked for its block alone, not for its head before."""
    async with nodes_of(loyal(FakeChain()), 3) as nodes:
        world = world_of(database, nodes, socket=False)
        async with world.running():
            await world.caught_up()
            await agree(world)
            references = [await world.register(n) for n in range(5)]
            for n in range(5):
                nodes[0].mine([issued(n)], 2)
                await world.caught_up()
            for reference in references:
                await world.reaches(reference, "ready")

                async def proven(reference: str = reference) -> bool:
                    return (await world.evidence(reference))[0]["proof"] == "receipts_root"

                await eventually(proven, what="proof")
                assert (await world.evidence(reference))[0]["witnesses"] == 2
            calls = sum((Counter(node.calls) for node in nodes), Counter())
            assert calls["eth_getBlockReceipts"] == 5 and calls["eth_getBlockByHash"] == 0
            for node in nodes[1:]:
                heads = Counter(params[0] for method, params in node.asked if method == "eth_getBlockByNumber")
                assert heads["latest"] == heads["safe"], "only looks ask for the head"


async def test_a_second_look_asks_another_endpoint_and_expiry_rests_on_both(database: Database) -> None:
    """The leader hides an event in history and at the head: the other finds it; what both read is `second_endpoint`."""
    async with nodes_of(loyal(FakeChain()), 2) as nodes:
        world = world_of(database, nodes, socket=False)
        nodes[0].mine([issued(1)], 5)
        nodes[0].set_tags(safe=9, finalized=8)
        nodes[0].hide_logs(times=None)
        async with world.running():
            await world.caught_up()
            await agree(world)
            nodes[0].mine([issued(2)], 5)
            await world.caught_up()
            gone = await world.register(7, deadline=str(nodes[0].chain.time_ms(7) // 1000))
            await world.tags(safe=15, finalized=14)
            await world.intact()

            async def both() -> bool:
                found = await world.verdicts(0, 14) | await world.verdicts(0, 14, FACTORY)
                return found <= {"second_endpoint", "gate"} and bool(found)

            await eventually(both, what="second looks")
            assert world.total("second_look_differences_total") >= 2
            await world.reaches(gone, "expired")


async def test_without_the_second_endpoint_nothing_expires(database: Database) -> None:
    """Read twice from one endpoint is one endpoint's word."""
    async with nodes_of(loyal(FakeChain()), 2) as nodes:
        world = world_of(database, nodes, socket=False)
        async with world.running():
            await world.caught_up()
            await agree(world)
            await nodes[1].stop()
            await agree(world, False)
            gone = await world.register(7, deadline=str(nodes[0].chain.time_ms(3) // 1000))
            nodes[0].mine(blocks=10)
            nodes[0].set_tags(safe=14, finalized=12)
            await world.caught_up()
            await world.looked()
            row = await database.pool.fetchrow("SELECT safe_number, finalized_number FROM indexer.chain")
            assert row is not None and tuple(row) == (0, 0), "a tag is agreed on, or stays"
            assert await world.state(gone) == "pending"
            await nodes[1].start()
            await world.reaches(gone, "expired")


async def test_the_status_names_the_endpoints(database: Database) -> None:
    """`/v1/status` and `indexer status`: needed, agreed, and who stands how."""
    async with nodes_of(loyal(FakeChain()), 2) as nodes:
        world = world_of(database, nodes, socket=False)
        async with world.running():
            await world.caught_up()
            await agree(world)
            await nodes[1].stop()
            await agree(world, False)
            async with database.pool.acquire() as conn:
                seen = await overview(conn)
            text = status_text(plain(seen))
            assert "NOT LIVE: signals of readiness wait" in text
            assert "witnesses 2 needed; endpoints DO NOT AGREE: facts go on, signals wait" in text
            assert f"127.0.0.1:{nodes[0].port} (primary, leads) live" in text
            assert f"127.0.0.1:{nodes[1].port} (fallback) failing since " in text and "no connection" in text
            assert world.sample("witnesses", chain="fake") == 1


async def test_the_chain_is_accepted_where_no_endpoint_keeps_block_0(database: Database) -> None:
    """There is no genesis to walk back to, and what we held below was pruned."""
    async with nodes_of(loyal(FakeChain()), 1) as nodes:
        chain = nodes[0].chain
        nodes[0].lie("eth_getBlockByNumber", lambda p, raw: None if p[0] == "0x0" else raw, times=None)
        world = world_of(database, nodes, socket=False)
        chain.mine(blocks=5)
        nodes[0].set_tags(safe=3, finalized=3)
        async with world.running():
            await world.caught_up()
            chain.mine([issued(1)], 5)
            await world.caught_up()
            await world.tags(safe=12, finalized=12)
            chain.reorganise(6, [[issued(2)]] * 8)

            async def latched() -> bool:
                return bool(await database.pool.fetchval("SELECT latch IS NOT NULL FROM indexer.chain"))

            await eventually(latched, 20)
        async with database.pool.acquire() as conn:
            assert await chains.resume(conn, chain.chain_id, accept_chain=True)
        async with world.running():
            chain.mine()
            await caught_up(database, nodes[0], 20)
            assert not await latched()
