"""Following the head: real PostgreSQL, a fake node on real sockets, and the truth of its chain to compare with."""

from __future__ import annotations

import asyncio

import pytest

from indexer.chain.linkage import FinalityViolation
from indexer.chain.schedule import ScheduleMismatch, WrongChain
from indexer.model.types import Hash32, Schedule
from indexer.store import chains, coverage
from indexer.store.database import Database
from tests.fake_node import FakeNode
from tests.following import (
    caught_up,
    chain_config,
    created,
    eventually,
    filling,
    following,
    head_of,
    history_filled,
    issued,
    noise,
    stored,
    transferred,
    truth,
)

MODES = pytest.mark.parametrize("socket", [True, False], ids=["socket", "polling"])


@MODES
async def test_stores_what_the_chain_says(database: Database, socket: bool) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 3)
        async with following(database, node, chain_config(node, socket=socket)):
            await caught_up(database, node)
            for n in range(20):
                node.mine([issued(n), noise(n)])
                node.mine([transferred()] if n % 3 == 0 else [])
                await asyncio.sleep(0.005)
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)
            assert len(await stored(database)) == 1 + 20 + 7


@MODES
@pytest.mark.parametrize("depth", [1, 2, 10, 130])
async def test_a_reorganisation_unconfirms_and_follows(database: Database, socket: bool, depth: int) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 3)
        for n in range(depth + 5):
            node.mine([issued(n)])
        async with following(database, node, chain_config(node, socket=socket)):
            await caught_up(database, node)
            before = await stored(database)
            node.reorganise(depth, [[issued(1000 + n), transferred()] for n in range(depth + 1)])
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)
            assert len(before - await stored(database)) == depth
            # rows stay: what was undone is kept as not canonical
            gone = await database.pool.fetchval("SELECT count(*) FROM indexer.movement WHERE NOT canonical")
            assert gone == depth
            touched = await database.pool.fetchrow("SELECT min(from_block), max(to_block) FROM indexer.touched_blocks")
            assert tuple(touched) == (1, node.chain.head.number)


@MODES
async def test_a_branch_that_returns_is_canonical_again(database: Database, socket: bool) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 2)
        for n in range(6):
            node.mine([issued(n)])
        branch_a = node.chain.head.hash
        async with following(database, node, chain_config(node, socket=socket)):
            await caught_up(database, node)
            first = await stored(database)
            node.reorganise(4, [[issued(100)], [], [issued(101)], [], []])
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain) != first
            node.chain.switch_to(branch_a)
            node.mine()
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain) == first


@MODES
async def test_reorganisations_in_quick_succession(database: Database, socket: bool) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 2)
        for n in range(20):
            node.mine([issued(n)])
        async with following(database, node, chain_config(node, socket=socket)):
            await caught_up(database, node)
            nonce = 100
            for depth in (3, 1, 7, 7, 2, 12, 1):
                nonce += 50
                node.reorganise(depth, [[issued(nonce + n)] for n in range(depth + 1)])
                if depth % 2:
                    await asyncio.sleep(0.003)
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)


@MODES
async def test_a_chain_that_gets_shorter(database: Database, socket: bool) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 2)
        for n in range(10):
            node.mine([issued(n)])
        async with following(database, node, chain_config(node, socket=socket)):
            await caught_up(database, node)
            node.reorganise(8, [[issued(50)], []])
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)


async def test_a_log_that_cannot_be_read_is_a_lie_and_is_counted(database: Database) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 2)
        checks: list[tuple[str, str]] = []
        async with following(database, node, chain_config(node, socket=False), checks=checks):
            await caught_up(database, node)
            lie = node.lie(
                "eth_getLogs", lambda _, logs: [log | {"data": log["data"][:-1]} for log in logs], times=None
            )
            node.mine([issued(1)])
            await eventually(lambda: asyncio.sleep(0, ("logs_parse", "fail") in checks))
            lie.times = 0
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)


@MODES
async def test_a_reorganisation_while_nobody_looks(database: Database, socket: bool) -> None:
    """F10: it is found at the next start, and followed as if it had been seen."""
    async with FakeNode() as node:
        node.mine([created(1)], 2)
        for n in range(12):
            node.mine([issued(n)])
        chain = chain_config(node, socket=socket)
        async with following(database, node, chain):
            await caught_up(database, node)
        node.reorganise(10, [[issued(100 + n)] for n in range(7)])
        node.mine([issued(200)], 20)
        async with following(database, node, chain):
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)
        gone = await database.pool.fetchval("SELECT count(*) FROM indexer.movement WHERE NOT canonical")
        assert gone == 10


async def test_a_replacement_of_the_same_height(database: Database) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 5)
        node.mine([issued(1)])
        async with following(database, node, chain_config(node, socket=False)):
            await caught_up(database, node)
            node.reorganise(1, [[issued(2)]])
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)


@MODES
async def test_a_lagging_node_undoes_nothing(database: Database, socket: bool) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 2)
        for n in range(30):
            node.mine([issued(n)])
        node.set_tags(safe=10, finalized=5)
        async with following(database, node, chain_config(node, socket=socket)) as task:
            await caught_up(database, node)
            head = await head_of(database)
            for lag in (1, 5, 27, 31):  # the last one is below our finalized block
                node.lag = lag
                node.repeat_head()
                calls = node.requests
                await eventually(lambda calls=calls: _true(node.requests > calls + 4))
                assert await head_of(database) == head
            assert await database.pool.fetchval("SELECT count(*) FROM indexer.block WHERE NOT canonical") == 0
            node.lag = 0
            node.mine([issued(99)])
            await caught_up(database, node)
            assert await stored(database) == {place for place in truth(node.chain) if place[0] > 5}
            assert not task.done()


async def by_socket(database: Database, node: FakeNode) -> int:
    """Mines empty blocks until one of them was followed by socket, which it returns."""
    async with asyncio.timeout(60):
        while True:
            number = node.mine().number
            await caught_up(database, node)
            if await database.pool.fetchval("SELECT mode FROM indexer.chain") == "socket":
                return number


async def verdict_of(database: Database, number: int) -> list[str]:
    rows = await database.pool.fetch(
        "SELECT verdict FROM indexer.coverage WHERE emitter = '' AND blocks @> $1::bigint ORDER BY verdict", number
    )
    return [row["verdict"] for row in rows]


async def _true(value: bool) -> bool:
    return value


@MODES
async def test_a_break_below_finalized_is_latched(database: Database, socket: bool) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 2)
        for n in range(20):
            node.mine([issued(n)])
        node.set_tags(safe=15, finalized=12)

        async def finalized() -> bool:
            return await database.pool.fetchval("SELECT finalized_number FROM indexer.chain") == 12

        async with following(database, node, chain_config(node, socket=socket), fails=FinalityViolation) as task:
            await caught_up(database, node)
            await eventually(finalized)
            before = await stored(database)
            node.set_tags(safe=0, finalized=0)
            node.reorganise(15)
            node.mine()
            with pytest.raises(FinalityViolation):
                await asyncio.wait_for(asyncio.shield(task), 10)
        latch = await database.pool.fetchval("SELECT latch FROM indexer.chain")
        assert latch["ours"]["number"] == 12 and latch["theirs"]["hash"] != latch["ours"]["hash"]
        assert await stored(database) == before
        async with following(database, node, chain_config(node, socket=socket), fails=FinalityViolation) as task:
            with pytest.raises(FinalityViolation):  # it stays latched
                await asyncio.wait_for(asyncio.shield(task), 10)
        assert await chains.resume(database.pool, node.chain_id, accept_chain=True)  # type: ignore[arg-type]
        async with following(database, node, chain_config(node, socket=socket)):
            node.mine([issued(500)])
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)


async def test_withheld_logs_are_settled_by_receipts(database: Database) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 3)
        async with following(database, node):
            await caught_up(database, node)
            await by_socket(database, node)
            node.hide_logs(times=None)
            node.lie("eth_getBlockReceipts", lambda _, __: [], times=3)  # known block, receipts not ready
            for n in range(10):
                node.mine([issued(n)])
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)
            assert await verdict_of(database, node.chain.head.number) == ["gate"]


async def test_without_receipts_blocks_with_events_are_unverified(database: Database) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 3)
        node.fail("eth_getBlockReceipts", -32601, "rpc method is not whitelisted", times=None)
        async with following(database, node):
            await caught_up(database, node)
            empty = await by_socket(database, node)
            for n in range(4):
                node.mine([issued(n)])
                node.mine([created(2 + n), transferred(2 + n)])
            node.mine([transferred(2)])
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)
            assert await verdict_of(database, empty) == ["gate"]
            assert await verdict_of(database, empty + 1) == ["unverified"]
            assert await verdict_of(database, node.chain.head.number) == ["unverified"]


async def test_a_silent_socket_is_replaced_by_polling_and_taken_up_again(database: Database) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 3)

        async def mode(wanted: str) -> bool:
            return await database.pool.fetchval("SELECT mode FROM indexer.chain") == wanted

        async def mining(wanted: str) -> None:
            async with asyncio.timeout(60):
                n = 1000
                while not await mode(wanted):
                    n += 1
                    node.mine([issued(node.chain.head.number)])
                    await asyncio.sleep(0.05)

        async with following(database, node):
            await mining("socket")
            node.silent = True
            await mining("polling")
            await caught_up(database, node)
            node.silent = False
            await mining("socket")
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)


@MODES
async def test_a_programme_is_heard_from_its_first_block_on(database: Database, socket: bool) -> None:
    async with FakeNode() as node:
        node.mine(blocks=2)
        async with following(database, node, chain_config(node, socket=socket)):
            await caught_up(database, node)
            for n in range(1, 6):
                node.mine([[transferred(n), created(n)], transferred(n)])  # the token logs before its factory
                node.mine([transferred(n)])
                node.mine([transferred(n - 1)] if n > 1 else [])
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)
            rows = await database.pool.fetch(
                "SELECT start_block, followed_from FROM indexer.emitter WHERE kind = 'token'"
            )
            assert len(rows) == 5 and all(row["start_block"] == row["followed_from"] for row in rows)


@MODES
async def test_a_programme_that_is_reorganised_away_and_back(database: Database, socket: bool) -> None:
    async with FakeNode() as node:
        node.mine(blocks=5)
        node.mine([created(1), transferred(1)])
        node.mine([transferred(1)])
        async with following(database, node, chain_config(node, socket=socket)):
            await caught_up(database, node)
            assert len(await stored(database)) == 3
            # the branch without the announcement: the same address means nothing there
            node.reorganise(2, [[transferred(1)], [transferred(1)], []])
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain) == set()
            node.mine([transferred(1), created(1)])
            node.mine([transferred(1)])
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)
            assert len(await stored(database)) == 3


@MODES
async def test_the_chain_moves_while_it_is_read(database: Database, socket: bool) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 3)
        for n in range(8):
            node.mine([issued(n)])
        moved: list[int] = []

        def move(_: object, answer: object) -> object:
            if len(moved) < 6:
                moved.append(1)
                node.reorganise(3, [[issued(1000 * len(moved) + n)] for n in range(4)])
            return answer

        method = "eth_getBlockReceipts" if socket else "eth_getLogs"
        async with following(database, node, chain_config(node, socket=socket)):
            await caught_up(database, node)
            if socket:
                await by_socket(database, node)
            node.lie(method, move, times=None)
            node.mine([issued(500)])
            await eventually(lambda: _true(len(moved) == 6))
            node.heal()
            node.mine()
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)


@MODES
async def test_killed_at_any_point_it_loses_and_doubles_nothing(database: Database, socket: bool) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 3)
        chain = chain_config(node, socket=socket)
        for round_ in range(12):
            async with following(database, node, chain):
                for n in range(5):
                    node.mine([issued(1000 * round_ + n), transferred()])
                    await asyncio.sleep(0.002)
                if round_ % 3 == 2:
                    node.reorganise(4, [[issued(1000 * round_ + 500 + n)] for n in range(3)])
                await asyncio.sleep(0.01 * round_)  # the kill comes at another moment each time
            if round_ % 4 == 3:  # offline
                node.reorganise(6, [[issued(1000 * round_ + 700 + n)] for n in range(8)])
        async with following(database, node, chain):
            node.mine()
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)
            hole = await database.pool.fetchval(
                """SELECT int8multirange(int8range(1, $1, '[]')) - range_agg(blocks) FROM indexer.coverage WHERE emitter = ''""",
                node.chain.head.number,
            )
            assert list(hole) == []


@MODES
async def test_a_deep_reorganisation_in_few_requests(database: Database, socket: bool) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 5)
        node.mine([issued(1)])
        node.mine(blocks=8100)
        node.mine([issued(2)])
        async with following(database, node, chain_config(node, socket=socket)):
            await caught_up(database, node)
            requests = node.requests
            node.reorganise(8000, [[issued(3)]] + [[]] * 8000)
            await caught_up(database, node, 60)
            assert await stored(database) == truth(node.chain)
            assert node.requests - requests < 300


@MODES
async def test_a_deep_break_below_finalized_is_accepted_in_few_requests(database: Database, socket: bool) -> None:
    """Two thirds of the branch that lost were finalized: latched at once, rolled back when a person says so, history filled."""
    async with FakeNode() as node:
        node.mine([created(1)], 50)
        for n in range(20):
            node.mine([issued(n)], 400)
        fork, lost = 50, node.chain.head.hash
        chain = chain_config(node, socket=socket)

        async def finalized() -> bool:
            row = await database.pool.fetchrow(
                "SELECT b.hash, c.finalized_number FROM indexer.chain c JOIN indexer.block b ON b.number = c.finalized_number AND b.canonical"
            )
            return row is not None and tuple(row) == (node.chain.canonical[6_000].hash, 6_000)

        async with following(database, node, chain, fails=FinalityViolation) as task:
            await caught_up(database, node)
            node.set_tags(safe=6_000, finalized=6_000)
            await eventually(finalized)
            before = await stored(database)
            assert len(before) == 21
            node.reorganise(8_000, [[issued(100 + n)] if n % 400 == 7 else [] for n in range(8_002)])
            with pytest.raises(FinalityViolation):
                await asyncio.wait_for(asyncio.shield(task), 20)
        assert await stored(database) == before and await head_of(database) == (fork + 8_000, lost)
        assert await chains.resume(database.pool, node.chain_id, accept_chain=True)  # type: ignore[arg-type]
        requests = node.requests
        async with following(database, node, chain), filling(database, node, chain):
            await caught_up(database, node)
            await eventually(finalized)
            await history_filled(database, node.chain_id)
            assert node.requests - requests < 300
            assert await stored(database) == truth(node.chain)
            assert len(truth(node.chain)) == 1 + 20


async def test_after_a_long_outage_it_goes_on_from_finalized(database: Database) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 5)
        chain = chain_config(node, socket=False)
        async with following(database, node, chain):
            await caught_up(database, node)
        node.reorganise(2, [[], [issued(1)]])
        node.mine(blocks=9000)
        node.mine([issued(2)])
        node.set_tags(safe=8500, finalized=8000)
        async with following(database, node, chain):
            await caught_up(database, node)
            gaps = await coverage.gaps(database_connection := await database.session("test"), node.chain_id, 8000)
            await database_connection.close()
            assert min(span.low for spans in gaps.values() for span in spans) <= 6
            assert max(span.high for spans in gaps.values() for span in spans) == 8000


@MODES
async def test_tags_only_move_forward_on_our_chain(database: Database, socket: bool) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 30)

        async def tags() -> tuple[int | None, int | None]:
            return tuple(await database.pool.fetchrow("SELECT safe_number, finalized_number FROM indexer.chain"))

        async with following(database, node, chain_config(node, socket=socket)):
            await caught_up(database, node)
            for safe, finalized, expected in (
                (20, 10, (20, 10)),
                (15, 12, (20, 12)),
                (None, None, (20, 12)),
                (14, 22, (22, 22)),
            ):
                node.set_tags(safe=safe, finalized=finalized)
                asked = node.calls["eth_getBlockByNumber"]
                await eventually(lambda asked=asked: _true(node.calls["eth_getBlockByNumber"] > asked + 8))
                await eventually(lambda expected=expected: _equal(tags(), expected))
            node.set_tags(safe=28, finalized=22)
            await eventually(lambda: _equal(tags(), (28, 22)))
            node.reorganise(5, [[]] * 6)
            node.set_tags(safe=22, finalized=22)
            await caught_up(database, node)
            assert (await tags())[0] <= 25  # safe is least(safe, ancestor)


async def _equal(found: object, wanted: object) -> bool:
    return await found == wanted


async def test_headers_below_finalized_are_pruned_down_to_checkpoints(database: Database) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 3)
        async with following(database, node, chain_config(node, follow="every-header")):
            await caught_up(database, node)
            for n in range(25):
                node.mine([issued(n)] if n % 5 == 0 else [], 100)
                await caught_up(database, node)
            node.set_tags(safe=2400, finalized=2300)

            async def pruned() -> bool:
                return await database.pool.fetchval("SELECT count(*) FROM indexer.block WHERE number < 2300") < 20

            await eventually(pruned)
            numbers = {r[0] for r in await database.pool.fetch("SELECT number FROM indexer.block WHERE number <= 2300")}
            assert {999, 1999, 2300} <= numbers
            assert {number for number, _, _ in truth(node.chain) if number < 2300} <= numbers


async def test_another_chain_is_refused(database: Database) -> None:
    async with FakeNode(chain_id=10) as node:
        async with following(database, node, chain_config(node, chain_id=8453), fails=WrongChain) as task:
            with pytest.raises(WrongChain, match="10"):
                await asyncio.wait_for(asyncio.shield(task), 10)
        node.mine(blocks=3)
        async with following(database, node):
            await caught_up(database, node)
    async with FakeNode(chain_id=10, options={"salt": 5}) as other:
        async with following(database, other, fails=WrongChain) as task:
            with pytest.raises(WrongChain, match="block 0"):
                await asyncio.wait_for(asyncio.shield(task), 10)


@pytest.mark.parametrize("stated", [39, 40, 41])
async def test_the_first_fast_block_is_read_from_the_chain(database: Database, stated: int) -> None:
    async with FakeNode(options={"first_fast_block": 40, "time_s": 1_700_000_000}) as node:
        node.mine([created(1)], 60)
        known = {(node.chain_id, Hash32(node.chain.canonical[0].hash)): Schedule(1_700_000_000, stated)}
        async with following(database, node, schedules=known):
            await caught_up(database, node)
            node.mine([issued(1)])
            await caught_up(database, node)
            assert await database.pool.fetchval("SELECT schedule FROM indexer.chain") == {
                "l2_time": 1_700_000_000,
                "first_fast_block": 40,
            }
            number, time_ms = await database.pool.fetchrow("SELECT block_number, block_time_ms FROM indexer.movement")
            assert time_ms == node.chain.time_ms(number) and time_ms % 1000


async def test_a_chain_off_its_schedule_is_refused(database: Database) -> None:
    async with FakeNode(options={"first_fast_block": 40, "time_s": 1_700_000_000}) as node:
        node.mine(blocks=60)
        known = {(node.chain_id, Hash32(node.chain.canonical[0].hash)): Schedule(1_700_000_000, 45)}
        async with following(database, node, schedules=known, fails=ScheduleMismatch) as task:
            with pytest.raises(ScheduleMismatch):
                await asyncio.wait_for(asyncio.shield(task), 10)


async def test_a_hash_that_is_unknown_right_after_it_was_announced(database: Database) -> None:
    """F52: the socket is ahead of what answers behind the same name, for the receipts of the new block and for a new branch."""
    async with FakeNode() as node:
        node.mine([created(1)], 3)
        node.mine(blocks=4)
        async with following(database, node):
            await caught_up(database, node)
            await by_socket(database, node)
            unknown = [node.lie(f"eth_getBlock{what}", lambda *_: None, times=2) for what in ("Receipts", "ByHash")]
            node.mine([issued(1)])
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)
            node.reorganise(3, [[issued(2)], [], [issued(3)], []])  # walked back by hash
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)
            assert [fault.times for fault in unknown] == [0, 0], "somebody asked by hash, and heard of nothing"


async def test_heads_are_committed_within_milliseconds(database: Database) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 3)
        async with following(database, node):
            await caught_up(database, node)
            await by_socket(database, node)
            listener = await database.session("test")
            heard: asyncio.Queue[float] = asyncio.Queue()
            loop = asyncio.get_running_loop()
            await listener.add_listener("indexer_heads", lambda *_: heard.put_nowait(loop.time()))
            took = []
            for n in range(20):
                begun = loop.time()
                node.mine([issued(n)] if n % 2 else [])
                while (await head_of(database) or (0,))[0] < node.chain.head.number:
                    await heard.get()
                took.append(loop.time() - begun)
            await listener.close()
            assert sorted(took)[len(took) // 2] < 0.3  # 30 ms where nothing else uses the machine


async def test_a_socket_of_another_chain_stops_nothing(database: Database) -> None:
    async with FakeNode() as node, FakeNode(options={"salt": 9}) as other:
        node.mine([created(1)], 3)
        other.mine(blocks=3)
        async with following(database, node, chain_config(node, websocket=other.ws_url)):
            await caught_up(database, node)
            await eventually(lambda: _true(other.subscribers == 1))
            for n in range(3):
                other.mine()
                node.mine([issued(n)])
                await asyncio.sleep(0.05)
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)
