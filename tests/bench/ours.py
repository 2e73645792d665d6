"""One side of the backfill's comparison: the product's own `fill_history` under a real lease, in a process of its own.

The clock runs from the call until every block is covered and committed; connecting and imports are outside.
"""

from __future__ import annotations

import asyncio
import cProfile
import sys
import time
from pathlib import Path

import msgspec
import structlog

from indexer.chain.backfill import fill_history
from indexer.chain.decode import Decoder
from indexer.chain.integrity import verify_header
from indexer.chain.pool import Pool
from indexer.chain.rpc import Rpc
from indexer.config import Chain
from indexer.model.types import Address
from indexer.store import chains, coverage, facts
from indexer.store.database import Database
from indexer.store.leases import Lease, Leases
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics
from tests.bench.history import CHAIN_ID, FACTORY, Shape
from tests.bench.measure import own_cpu, own_peak_mb

PATIENCE = 1200.0  # seconds: what takes longer will not end


class Task(msgspec.Struct):
    node: str
    database: str
    shape: Shape
    profile: str | None = None  # a file for cProfile's figures


class Nothing:
    """Rows of a step without events."""

    programmes = movements = transfers = programme_events = raw_logs = ()


async def found(lease: Lease, rpc: Rpc) -> None:
    """The chain as the follower leaves it at its start: a head that is finalized, and no history."""
    raw = await rpc.header("latest")
    assert raw is not None
    head = verify_header(raw, None)
    genesis = await rpc.genesis_hash()
    async with lease.transaction() as conn:
        await chains.ensure_chain(conn, CHAIN_ID, "bench", genesis, None)
        factory = Address(FACTORY)
        await chains.sync_emitters(conn, CHAIN_ID, [chains.Emitter(factory, "factory", factory, 1)])
        await facts.commit_step(conn, CHAIN_ID, head=head, headers=[head], rows=Nothing(), covered=[], mode="polling")
        await chains.set_tags(conn, CHAIN_ID, head, head)


async def run(task: Task) -> dict[str, float]:
    chain = Chain.model_validate(
        {
            "name": "bench",
            "chain_id": CHAIN_ID,
            "rpc": [{"url": task.node}],
            "factories": [{"address": "0x" + FACTORY.hex(), "start_block": 1}],
            "second_look_seconds": 3600,
        }
    )
    finished = asyncio.Event()

    def progress(_: str, done: int, total: int, events: int) -> None:
        if done >= total:
            finished.set()

    decoder, metrics = Decoder.from_abi(inferred=True), Metrics()

    def count(check: str, outcome: object) -> None:  # as ChainRuntime does
        metrics.checks.labels(check, str(outcome), "bench").inc()

    async with (
        await Database.connect(task.database) as database,
        Rpc(task.node) as rpc,
        Leases(database).hold(f"history:{CHAIN_ID}") as lease,
    ):
        await found(lease, rpc)
        source = Pool.of(rpc, CHAIN_ID, count=count).source("history")
        before_mb = own_peak_mb()
        profiler = cProfile.Profile() if task.profile else None
        if profiler:
            profiler.enable()
        began, cpu = time.perf_counter(), own_cpu()
        filling = asyncio.create_task(
            fill_history(chain, source, lease, Wakeups(), decoder, metrics=metrics, progress=progress)
        )
        waiting = asyncio.create_task(finished.wait())
        await asyncio.wait([filling, waiting], timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        seconds, cpu = time.perf_counter() - began, own_cpu() - cpu
        if profiler and task.profile:
            profiler.disable()
            profiler.dump_stats(Path(task.profile))
        if filling.done():
            filling.result()
        waiting.cancel()
        filling.cancel()
        await asyncio.gather(filling, return_exceptions=True)
        gaps = await coverage.gaps(database.pool, CHAIN_ID, task.shape.blocks)  # type: ignore[arg-type]
        events = await database.pool.fetchval(
            "SELECT (SELECT count(*) FROM indexer.movement) + (SELECT count(*) FROM indexer.programme)"
        )
    if gaps or events != task.shape.events:
        raise SystemExit(f"not the whole history: {events} of {task.shape.events} events, gaps {gaps}")
    return {
        "events": events,
        "seconds": seconds,
        "cpu": cpu,
        "whole_cpu": own_cpu(),
        "peak_mb": own_peak_mb(),
        "idle_mb": before_mb,
    }


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # our answer is on stdout
    answer = asyncio.run(run(msgspec.json.decode(sys.argv[1], type=Task)))
    sys.stdout.write(msgspec.json.encode(answer).decode())
