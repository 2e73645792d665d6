"""The product's side of a deep reorganisation: following, history and settling under real leases, in a process of its own.

It begins on a database that holds one branch, at a node that shows another, and works until nothing is left to do: the head
reached, no gap below finalized, no operation to look at. Or until it has latched, where the branch left ours below finalized.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time

import asyncpg
import msgspec
import structlog

from indexer.chain.linkage import FinalityViolation
from indexer.chain.runtime import ChainRuntime
from indexer.config import Config
from indexer.observation import SettlementObserver
from indexer.settlement.loop import settle
from indexer.settlement.rules import rules_of
from indexer.store import coverage
from indexer.store.database import Database
from indexer.store.leases import Lease, Leases
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics
from tests.bench.measure import own_cpu, own_peak_mb

PATIENCE = 1200.0  # seconds: what takes longer will not end
LOOK = 0.05  # seconds between looks at the database


class Task(msgspec.Struct):
    database: str
    config: dict[str, object]
    old_head: str  # hash of the head that the database begins with, hex
    target: int  # a height to reach
    finalized: int = 0  # a height that finalized must reach
    pruned: int | None = None  # a height whose header nobody needs once it is finalized


class Figures(msgspec.Struct):
    """Seconds are from the start of the loops; None for what was not seen."""

    latched: bool
    seconds: float
    left_old_branch: float | None
    head_reached: float | None
    over: float | None  # nothing is left to do
    slowest_look: float  # at the database, by somebody else, meanwhile
    cpu: float
    idle_mb: float
    peak_mb: float


async def run(task: Task) -> Figures:
    tree = Config.model_validate(task.config)
    chain = tree.chains[0]
    metrics, wakeups, rng = Metrics(), Wakeups(), random.Random(1)
    observer = SettlementObserver(metrics, {chain.chain_id: chain.name})
    async with (
        await Database.connect(task.database) as database,
        ChainRuntime.open(chain, metrics, wakeups, rng) as runtime,
    ):
        leases = Leases(database)

        async def settling(lease: Lease) -> None:
            await settle(lease, wakeups, rules_of(tree.brands), {}, observer)

        async def keep(name: str, body: object) -> None:
            async with leases.hold(name) as lease:
                await body(lease)  # type: ignore[operator]

        idle = own_peak_mb()
        began, cpu = time.perf_counter(), own_cpu()
        watch = _Watch(database.pool, chain.chain_id, task, began)
        follower = asyncio.create_task(keep(f"follow:{chain.chain_id}", runtime.follow))
        others = [
            asyncio.create_task(keep(f"history:{chain.chain_id}", runtime.fill_history)),
            asyncio.create_task(keep("settle", settling)),
        ]
        done = asyncio.create_task(watch.until_over())
        tasks = (follower, done, *others)
        await asyncio.wait(tasks, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        seconds, latched = time.perf_counter() - began, False
        try:
            for each in tasks:
                if each.done():
                    each.result()
        except FinalityViolation:
            latched = True
        if not latched and not done.done():
            raise SystemExit(f"not over after {seconds:.0f} s: {dict(await watch.state())}")
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Figures(
        latched, seconds, watch.left, watch.reached, watch.over, watch.slowest, own_cpu() - cpu, idle, own_peak_mb()
    )


class _Watch:
    """Looks at the database as anybody could, and notes when each thing was so."""

    def __init__(self, pool: asyncpg.Pool, chain_id: int, task: Task, began: float) -> None:
        self._pool, self._chain_id, self._task, self._began = pool, chain_id, task, began
        self.left: float | None = None
        self.reached: float | None = None
        self.over: float | None = None
        self.slowest = 0.0

    async def until_over(self) -> None:
        while True:
            asked = time.perf_counter()
            row = await self.state()
            now = time.perf_counter() - self._began
            self.slowest = max(self.slowest, now + self._began - asked)
            if self.left is None and (row["head_hash"] or b"").hex() != self._task.old_head:
                self.left = now
            if self.reached is None and (row["head_number"] or 0) >= self._task.target and self.left is not None:
                self.reached = now
            finalized = row["finalized_number"] or 0
            there = self.reached is not None and finalized >= self._task.finalized
            if there and not (row["queued"] or row["kept"] or await self._gaps(finalized)):
                self.over = now
                return
            await asyncio.sleep(LOOK)

    async def _gaps(self, finalized: int) -> bool:
        return bool(await coverage.gaps(self._pool, self._chain_id, finalized))  # type: ignore[arg-type]

    async def state(self) -> asyncpg.Record:
        row = await self._pool.fetchrow(
            """
            SELECT c.head_number, c.head_hash, c.finalized_number,
                   (SELECT count(*) FROM indexer.touched_blocks) + (SELECT count(*) FROM indexer.touched_operation) AS queued,
                   EXISTS (SELECT FROM indexer.block b WHERE b.chain_id = $1 AND b.number = $2) AS kept
            FROM indexer.chain c WHERE c.chain_id = $1
            """,
            self._chain_id,
            self._task.pruned,
        )
        assert row is not None
        return row


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # our answer is on stdout
    figures = asyncio.run(run(msgspec.json.decode(sys.argv[1], type=Task)))
    sys.stdout.write(msgspec.json.encode(figures).decode())
