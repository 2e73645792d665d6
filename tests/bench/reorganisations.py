"""Deep reorganisations: a branch of thousands of blocks is un-confirmed, another is followed, operations are settled anew.

The chain is true (headers hash and link, blooms and receipts roots hold), made once in memory, and served while it goes on
growing by five blocks a second. A database is first brought to one branch; then the product, in a process of its own, meets the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import msgspec

from indexer import daemon
from indexer.chain.integrity import verify_header
from indexer.chain.wire import RawHeader
from indexer.config import Config
from indexer.store import chains
from indexer.store.coverage import HEAD_LANE, Covered, cover
from indexer.store.database import Database
from tests.bench.measure import Server, alone, postgres
from tests.bench.survivor import Task
from tests.fake_node import FakeChain, FakeNode, hx
from tests.following import FACTORY, ISSUER, created, issued, loyalty_id

NOTE = (
    "Events lie in every 40th block, each with a registered operation; on the new branch they lie seven blocks further, and one in ten "
    "is gone. The database is durable. Peak memory is the product's process, its imports and pools included."
)
DEPTHS = (8_000, 216_000)  # a bad day; the sequencing window
FORK = 300  # the last block of both branches
EVERY, SHIFT = 40, 7
BRAND = "bloom"
BLOCK_SECONDS = 0.2


class Branches:
    """A chain with two branches above FORK: `old` of `depth` blocks, `new` some longer."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.chain = FakeChain(block_ms=200)
        self.chain.code[FACTORY] = 0
        self.chain.mine([created(1)])
        self.chain.mine(blocks=FORK - 1)
        for at in range(1, depth + 1):
            self.chain.mine([issued(at // EVERY)] if at % EVERY == 0 else ())
        self.old = self.chain.head
        moved = [
            [issued(at // EVERY)] if at % EVERY == SHIFT and at > EVERY and (at // EVERY) % 10 else []
            for at in range(1, depth + 11)
        ]
        self.chain.reorganise(depth, moved)
        self.new = self.chain.head

    @property
    def events(self) -> int:
        return self.depth // EVERY

    def show(self, head: bytes, finalized: int) -> None:
        self.chain.switch_to(head)
        self.chain.safe = self.chain.finalized = finalized


async def run(scale: float) -> dict[str, Any]:
    results = []
    for whole in DEPTHS:
        depth = max(400, round(whole * scale))
        branches = await asyncio.to_thread(Branches, depth)
        for socket in (True, False):
            for below in (False, True):
                async with _World.prepared(branches, socket=socket, below=below) as world:
                    results.append(await (world.accepted() if below else world.survived()))
    return {"runs": results}


class _World:
    def __init__(self, branches: Branches, node: FakeNode, server: Server, database: Database, socket: bool) -> None:
        self.branches, self.node, self.server, self.database, self.socket = branches, node, server, database, socket
        self.tree = {
            "state_dir": "/nonexistent",
            "chains": [
                {
                    "name": "bench",
                    "chain_id": node.chain_id,
                    "rpc": [{"url": node.url}],
                    "factories": [{"address": hx(FACTORY), "start_block": 0}],
                    **({"websocket": node.ws_url} if socket else {}),
                }
            ],
            "brands": [{"name": BRAND, "issuers": [hx(ISSUER)], "policies": [{"confidence": "included"}]}],
        }

    @classmethod
    @asynccontextmanager
    async def prepared(cls, branches: Branches, *, socket: bool, below: bool) -> AsyncIterator[_World]:
        """A database that has followed the old branch and made every operation ready; the node shows the new one.

        `below`: the old branch was finalized up to its middle.
        """
        stalled = FORK - 100
        branches.show(branches.old.hash, stalled)
        async with (
            FakeNode(chain=branches.chain, max_span=2_000, max_results=10_000) as node,
            postgres() as server,
            await Database.connect(server.url) as database,
        ):
            world = cls(branches, node, server, database, socket)
            await daemon.apply_configuration(database, Config.model_validate(world.tree))
            await world._register()
            await world._work(branches.old.number)
            if socket:
                await world._hold_every_header()
            if below:
                branches.chain.safe = branches.chain.finalized = world.middle
                await world._work(branches.old.number, finalized=world.middle, pruned=world.middle - 2)
            grown = branches.chain.head.number  # the old branch went on meanwhile
            branches.show(branches.new.hash, world.middle if below else stalled)
            branches.chain.mine(blocks=max(1, grown + 1 - branches.new.number))
            yield world

    @property
    def middle(self) -> int:
        return FORK + self.branches.depth // 2

    async def survived(self) -> dict[str, Any]:
        """Finality had stalled below the fork; afterwards it comes back in one jump."""
        before, target = await self._size(), self.branches.chain.head.number
        seen = await self._work(target)
        after = await self._size()
        last = target - 1
        self.branches.chain.safe = self.branches.chain.finalized = last + 1
        jumped = await self._work(last, finalized=last + 1, pruned=last)
        return {
            **self._titles("survived"),
            **_figures(seen),
            "database_mb_before": before,
            "database_mb_after": after,
            "finality_returns_seconds": round(jumped["over"], 1),
            "finality_returns_peak_mb": round(jumped["peak_mb"]),
            **await self._told(),
        }

    async def accepted(self) -> dict[str, Any]:
        """The new branch leaves ours below finalized: latched, and rolled back when a person accepts it."""
        before, target = await self._size(), self.branches.chain.head.number
        latched = await self._work(target)
        assert latched["latched"], "it did not latch"
        async with self.database.pool.acquire() as conn:
            assert await chains.resume(conn, self.node.chain_id, accept_chain=True)
        seen = await self._work(target, finalized=self.middle)
        return {
            **self._titles("latched, accepted"),
            **_figures(seen),
            "latched_after_seconds": round(latched["seconds"], 1),
            "database_mb_before": before,
            "database_mb_after": await self._size(),
            **await self._told(),
        }

    def _titles(self, kind: str) -> dict[str, Any]:
        return {"depth": self.branches.depth, "mode": "socket" if self.socket else "polling", "kind": kind}

    async def _work(self, target: int, *, finalized: int = 0, pruned: int | None = None) -> dict[str, Any]:
        """The product's process, while the chain goes on; with the calls that it made."""
        old = await self.database.pool.fetchval("SELECT head_hash FROM indexer.chain")
        self.node.calls.clear()
        requests = self.node.requests
        task = Task(self.server.url, self.tree, "" if old is None else old.hex(), target, finalized, pruned)
        growing = asyncio.create_task(self._grow())
        try:
            figures: dict[str, Any] = await alone("tests.bench.survivor", task)
        finally:
            growing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await growing
        return figures | {"requests": self.node.requests - requests, "calls": sum(self.node.calls.values())}

    async def _grow(self) -> None:
        while True:
            await asyncio.sleep(BLOCK_SECONDS)
            self.node.mine()

    async def _register(self) -> None:
        async with self.database.pool.acquire() as conn:
            for nonce in range(1, self.branches.events + 1):
                await conn.fetchval("SELECT loyalty.register_operation($1)", request_of(nonce))

    async def _hold_every_header(self) -> None:
        """As following by socket leaves it: every header above finalized, and the verdict of the gate."""
        blocks = self.branches.chain.canonical[FORK + 1 : self.branches.old.number + 1]
        for start in range(0, len(blocks), 5_000):
            shown = [self.branches.chain.header(block, transactions=False) for block in blocks[start : start + 5_000]]
            headers = [verify_header(msgspec.convert(each, RawHeader), None) for each in shown]
            async with self.database.pool.acquire() as conn, conn.transaction():
                await chains.store_headers(conn, self.node.chain_id, headers)
                low, high = headers[0].number, headers[-1].number
                await cover(conn, self.node.chain_id, [Covered(HEAD_LANE, low, high, "gate")])

    async def _size(self) -> int:
        return round(await self.database.pool.fetchval("SELECT pg_database_size(current_database())") / 2**20)

    async def _told(self) -> dict[str, int]:
        rows: list[asyncpg.Record] = await self.database.pool.fetch(
            "SELECT type, count(*) AS n FROM indexer.outbox WHERE type IN ('operation.ready', 'operation.reverted') GROUP BY 1"
        )
        return {row["type"].partition(".")[2]: row["n"] for row in rows}


def request_of(nonce: int) -> dict[str, Any]:
    """The operation that `issued(nonce)` settles."""
    leg = {
        "kind": "loyfin.issuance",
        "chainId": "84532",
        "factory": hx(FACTORY),
        "issuer": hx(ISSUER),
        "holder": "0x" + "40" * 20,
        "loyaltyId": hx(loyalty_id(1)),
        "amount": "10",
        "nonce": "0x" + nonce.to_bytes(32, "big").hex(),
    }
    return {"brand": BRAND, "reference": f"op-{nonce}", "legs": [leg]}


def _figures(seen: dict[str, Any]) -> dict[str, Any]:
    return {
        "left_seconds": round(seen["left_old_branch"], 1),
        "head_seconds": round(seen["head_reached"], 1),
        "over_seconds": round(seen["over"], 1),
        "slowest_look_seconds": round(seen["slowest_look"], 2),
        "cpu_seconds": round(seen["cpu"], 1),
        "idle_mb": round(seen["idle_mb"]),
        "peak_mb": round(seen["peak_mb"]),
        "requests": seen["requests"],
        "calls": seen["calls"],
    }


ROWS = (
    ("old branch left after, s", "left_seconds"),
    ("head reached after, s", "head_seconds"),
    ("nothing left to do after, s", "over_seconds"),
    ("latched after, s", "latched_after_seconds"),
    ("finality returns in one jump: over after, s", "finality_returns_seconds"),
    ("slowest look at the database meanwhile, s", "slowest_look_seconds"),
    ("CPU s of the process", "cpu_seconds"),
    ("memory before, MB", "idle_mb"),
    ("peak memory, MB", "peak_mb"),
    ("requests", "requests"),
    ("calls", "calls"),
    ("database before, MB", "database_mb_before"),
    ("database after, MB", "database_mb_after"),
    ("signals: ready", "ready"),
    ("signals: reverted", "reverted"),
)


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of text for people: a column for each run."""
    runs = result["runs"]
    rows = [("", *(f"{run['depth']:,} {run['mode']}, {run['kind']}" for run in runs))]
    for title, key in ROWS:
        rows.append((title, *(f"{run[key]:,}" if key in run else "-" for run in runs)))
    return rows
