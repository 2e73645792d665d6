"""What following costs in calls, and whether it stays with a chain of five blocks a second: the daemon as a process, nodes in memory.

A while nothing happens, then every fifth block holds an event that settles an operation at `safe`. What the events cost beyond the
quiet blocks is the price of reading, proving and witnessing them. With three endpoints, too, one of which lies at random, or the first of
which hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

from indexer.store.database import Database
from tests.acceptance.world import Daemon
from tests.bench.measure import postgres, tree_cpu
from tests.bench.reorganisations import BRAND, request_of
from tests.fake_node import FakeChain, FakeNode, Fault, RpcFailure, hx
from tests.following import FACTORY, ISSUER, created, issued

NOTE = (
    "Calls are items of batches, at all endpoints together; a subscription is none. The second look is off, history is filled before. "
    "Blocks behind are seen from outside, ten times a second."
)
BLOCK_SECONDS = 0.2
EVERY = 5  # blocks from one event to the next
SAFE, FINALIZED = 15, 50  # blocks behind the head; both move once a second
QUIET_SECONDS, BUSY_SECONDS = 20.0, 30.0
LIE_SECONDS = 0.2  # from one lie of the liar to the next
#: Endpoints, and what is wrong: the last one lies, or the one that leads accepts every request and answers none, from the first event on.
RUNS = ((1, ""), (3, ""), (3, "one lies"), (3, "the leader hangs"))


async def run(scale: float) -> dict[str, Any]:
    results = []
    for socket in (True, False):
        for endpoints, trouble in RUNS:
            results.append(await _run(socket, endpoints, trouble, max(0.2, scale)))
    return {"runs": results}


async def _run(socket: bool, endpoints: int, trouble: str, scale: float) -> dict[str, Any]:
    async with _World.running(socket, endpoints) as world:
        lies = asyncio.create_task(_lie(world.nodes[-1])) if trouble == "one lies" else None
        try:
            quiet = await world.count(QUIET_SECONDS * scale)
            first = world.nonce
            world.busy = True
            if trouble == "the leader hangs":
                world.nodes[0].hang("*", times=None)
            busy = await world.count(BUSY_SECONDS * scale)
            world.busy = False
            events = world.nonce - first
            await world.all_ready(world.nonce - 1)
        finally:
            if lies is not None:
                lies.cancel()
                await asyncio.gather(lies, return_exceptions=True)
        per_block = sum(quiet.calls.values()) / quiet.blocks
        extra = {m: n - quiet.calls[m] / quiet.blocks * busy.blocks for m, n in busy.calls.items()}
        return {
            "mode": "socket" if socket else "polling",
            "endpoints": endpoints,
            "trouble": trouble,
            "blocks": quiet.blocks + busy.blocks,
            "events": events,
            "ready": await world.ready(),
            "reverted": await world.database.pool.fetchval(
                "SELECT count(*) FROM indexer.outbox WHERE type = 'operation.reverted'"
            ),
            "calls_per_quiet_block": round(per_block, 2),
            "extra_calls_per_event": round(sum(extra.values()) / events, 2),
            "extra_calls_per_event_by_method": {m: round(n / events, 2) for m, n in sorted(extra.items())},
            "receipts_per_event": round(busy.calls["eth_getBlockReceipts"] / events, 2),
            "behind_mean": round((quiet.behind + busy.behind) / 2, 1),
            "behind_most": max(quiet.most, busy.most),
            "cpu_share": round((quiet.cpu + busy.cpu) / (quiet.seconds + busy.seconds), 3),
        }


class _Counted:
    def __init__(self, calls: Counter[str], blocks: int, behind: list[int], cpu: float, seconds: float) -> None:
        self.calls, self.blocks, self.cpu, self.seconds = calls, blocks, cpu, seconds
        self.behind, self.most = sum(behind) / len(behind), max(behind)


class _World:
    def __init__(self, chain: FakeChain, nodes: list[FakeNode], database: Database, daemon: Daemon) -> None:
        self.chain, self.nodes, self.database, self.daemon = chain, nodes, database, daemon
        self.busy, self.nonce = False, 1

    @classmethod
    @asynccontextmanager
    async def running(cls, socket: bool, endpoints: int) -> AsyncIterator[_World]:
        chain = FakeChain(block_ms=200, deposits=True, time_s=int(time.time()) - 60)
        chain.code[FACTORY] = 1
        chain.mine([created(1)], 300)
        async with AsyncExitStack() as stack:
            nodes = [await stack.enter_async_context(FakeNode(chain=chain, max_span=2_000)) for _ in range(endpoints)]
            server = await stack.enter_async_context(postgres())
            database = await stack.enter_async_context(await Database.connect(server.url))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="indexer-bench-")))
            config = folder / "indexer.toml"
            config.write_text(_config(server.url, nodes, socket))
            daemon = await stack.enter_async_context(Daemon.running(config))
            world = cls(chain, nodes, database, daemon)
            mining = asyncio.create_task(world._mine())
            stack.push_async_callback(_ended, mining)
            await world._settled_in()
            yield world

    async def count(self, seconds: float) -> _Counted:
        for node in self.nodes:
            node.calls.clear()
        began, first, cpu = time.perf_counter(), self.chain.head.number, tree_cpu(self.daemon.process.pid)
        behind = []
        while time.perf_counter() - began < seconds:
            head = await self.database.pool.fetchval("SELECT head_number FROM indexer.chain")
            behind.append(self.chain.head.number - head)
            await asyncio.sleep(0.1)
        calls = sum((Counter(node.calls) for node in self.nodes), Counter())
        spent = tree_cpu(self.daemon.process.pid) - cpu
        return _Counted(calls, self.chain.head.number - first, behind, spent, time.perf_counter() - began)

    async def ready(self) -> int:
        found: int = await self.database.pool.fetchval(
            "SELECT count(DISTINCT aggregateid) FROM indexer.outbox WHERE type = 'operation.ready'"
        )
        return found

    async def all_ready(self, count: int) -> None:
        with contextlib.suppress(TimeoutError):  # the report tells how many were
            async with asyncio.timeout(30):
                while await self.ready() < count:
                    await asyncio.sleep(0.1)

    async def _settled_in(self) -> None:
        """Waits until the head is followed and history is filled, and registers what will be settled."""
        async with asyncio.timeout(60):
            while not await self._followed():
                await asyncio.sleep(0.1)
        async with self.database.pool.acquire() as conn:
            for nonce in range(1, 200):
                await conn.fetchval("SELECT loyalty.register_operation($1)", request_of(nonce))
        await asyncio.sleep(3)

    async def _followed(self) -> bool:
        with contextlib.suppress(asyncpg.PostgresError):
            return bool(
                await self.database.pool.fetchval(
                    "SELECT history_complete AND head_number > 300 AND EXISTS (SELECT FROM indexer.brand WHERE name = $1) FROM indexer.chain",
                    BRAND,
                )
            )
        return False

    async def _mine(self) -> None:
        due = time.perf_counter()
        while True:
            number = self.chain.head.number + 1
            if self.busy and number % EVERY == 0:
                self.chain.mine([issued(self.nonce)])
                self.nonce += 1
            else:
                self.chain.mine()
            if number % 5 == 0:
                self.chain.safe, self.chain.finalized = number - SAFE, number - FINALIZED
            due += BLOCK_SECONDS
            await asyncio.sleep(max(0.0, due - time.perf_counter()))


def _config(database: str, nodes: list[FakeNode], socket: bool) -> str:
    endpoints = ", ".join(f'{{ url = "{node.url}" }}' for node in nodes)
    return f"""
        state_dir = "/nonexistent"
        [database]
        url = "{database}"
        [http]
        listen = "127.0.0.1:0"
        [[chains]]
        name = "bench"
        chain_id = {nodes[0].chain_id}
        rpc = [ {endpoints} ]
        {f'websocket = "{nodes[0].ws_url}"' if socket else ""}
        factories = [ {{ address = "{hx(FACTORY)}", start_block = 1 }} ]
        second_look_seconds = 3600
        [[brands]]
        name = "{BRAND}"
        issuers = [ "{hx(ISSUER)}" ]
        policies = [ {{ confidence = "safe" }} ]
    """


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _lie(node: FakeNode) -> None:
    """One lie or failure after the other, whatever is asked next, drawn by lot."""
    rng = random.Random(1)
    while True:
        node.heal()
        node.lag = 0
        rng.choice(LIES)(node, rng)
        await asyncio.sleep(LIE_SECONDS)


def _changed(field: str) -> Callable[[Any, Any], Any]:
    """A header with one hexadecimal digit of a field turned."""

    def lie(_: Any, header: Any) -> Any:
        if not isinstance(header, dict) or field not in header:
            return header
        value = header[field]
        return header | {field: value[:-1] + ("1" if value[-1] != "1" else "2")}

    return lie


def _headers(field: str) -> Callable[[FakeNode, random.Random], object]:
    return lambda node, _: node.lie("eth_getBlockByNumber", _changed(field), times=None)


def _lag(node: FakeNode, rng: random.Random) -> None:
    node.lag = rng.randint(1, 200)


def _fails(method: str, code: int, message: str, status: int = 200) -> Callable[[FakeNode, random.Random], object]:
    return lambda node, _: node.fault(Fault(method, None, error=RpcFailure(code, message), status=status))


def _dropped(_: Any, logs: Any) -> Any:
    return logs[:-1] if isinstance(logs, list) else logs


def _invented(_: Any, logs: Any) -> Any:
    return [*logs, logs[-1] | {"logIndex": "0x63"}] if isinstance(logs, list) and logs else logs


LIES: tuple[Callable[[FakeNode, random.Random], object], ...] = (
    lambda node, _: None,  # the truth, now and then
    _headers("hash"),
    _headers("parentHash"),
    _headers("receiptsRoot"),
    _headers("logsBloom"),
    _headers("timestamp"),
    _lag,
    lambda node, _: node.hide_logs(times=None),
    lambda node, _: node.lie("eth_getLogs", _dropped, times=None),
    lambda node, _: node.lie("eth_getLogs", _invented, times=None),
    lambda node, _: node.lie("eth_getBlockReceipts", lambda _, __: [], times=None),
    lambda node, _: node.lie("eth_getBlockReceipts", lambda _, __: None, times=None),
    lambda node, _: node.lie("eth_getBlockByNumber", lambda _, __: None, times=None),
    lambda node, _: node.lie("eth_chainId", lambda _, __: "0x1", times=None),
    lambda node, _: node.reply("*", "<html>502 Bad Gateway</html>", status=502, times=None),
    lambda node, _: node.truncate("*", times=None),
    lambda node, _: node.delay("*", 2.0, times=None),
    _fails("*", -32016, "over rate limit", 429),
    _fails("*", -32011, "no backend is currently healthy to serve traffic", 503),
    _fails("eth_getBlockReceipts", -32601, "the method does not exist"),
    _fails("eth_getLogs", -32602, "Archive requests require a personal token."),
)


ROWS = (
    ("blocks", "blocks"),
    ("events, each settling an operation", "events"),
    ("… ready at the end", "ready"),
    ("… taken back", "reverted"),
    ("calls per quiet block", "calls_per_quiet_block"),
    ("extra calls per event", "extra_calls_per_event"),
    ("… receipts of blocks among them", "receipts_per_event"),
    ("blocks behind, mean", "behind_mean"),
    ("blocks behind, at most", "behind_most"),
    ("cores of the daemon", "cpu_share"),
)


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of text for people: a column for each run."""
    runs = result["runs"]
    titles = [f"{r['mode']}, {r['endpoints']} endpoint{'s' * (r['endpoints'] > 1)}" for r in runs]
    rows = [
        ("", *(f"{title}{', ' + r['trouble'] if r['trouble'] else ''}" for title, r in zip(titles, runs, strict=True)))
    ]
    return rows + [(title, *(f"{run[key]:,}" for run in runs)) for title, key in ROWS]
