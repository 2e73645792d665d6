"""Eight workers of docs/sql.md, killed now and then, hand over ten thousand operations: how fast, and each with one receipt.

The reconciler runs beside them, as in life: what was handed over leaves the state `ready`, and is not searched again.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from indexer.settlement.reconciler import reconcile
from indexer.store import sql_users
from indexer.store.database import Database
from indexer.store.leases import Lease, Leases
from tests.bench.measure import Server, own_cpu, postgres, tree_cpu
from tests.bench.population import BRAND, CHAIN, Population
from tests.sql_workers import Crew

NOTE = "PostgreSQL durable; a hand-over costs a line in a file. Judged: every operation one receipt, no two claims at a time."
WORKERS = 8


async def run(scale: float) -> dict[str, Any]:
    count = max(200, round(10_000 * scale))
    async with postgres() as server:
        owner = await asyncpg.connect(server.owner_url, command_timeout=600)
        try:
            await Population(operations=count, idle=0, movements=count, transfers=0).write(owner)
            # settled long ago, and ready since: nobody has handed over yet
            await owner.execute("DELETE FROM indexer.receipt")
            await owner.execute("UPDATE indexer.operation SET state = 'ready'")
            await owner.execute("UPDATE indexer.chain SET finalized_number = head_number WHERE chain_id = $1", CHAIN)
            await owner.execute("VACUUM ANALYZE")
            return await _work(server, owner, count)
        finally:
            await owner.close()


async def _work(server: Server, owner: asyncpg.Connection, count: int) -> dict[str, Any]:
    password = await sql_users.add(owner, "bench_shop", BRAND)
    parts = urlsplit(server.owner_url)
    login = urlunsplit(parts._replace(netloc=f"bench_shop:{password}@{parts.netloc.rpartition('@')[2]}"))
    with tempfile.TemporaryDirectory(prefix="indexer-bench-") as folder:
        crew = Crew(Path(folder), login, owner)
        async with await Database.connect(server.url) as database, Leases(database).hold("settle") as lease:
            settling = asyncio.create_task(_settle(lease))
            try:
                for _ in range(WORKERS):
                    await crew.start()
                wall, cpu, servers = time.perf_counter(), own_cpu(), server.cpu()
                await crew.work(count, Random(8), kills=40, seconds=600)
                seconds = time.perf_counter() - wall
                spent = {
                    "reconciler_cpu_ms_per_operation": round(1000 * (own_cpu() - cpu) / count, 3),
                    "postgres_cpu_ms_per_operation": round(1000 * (server.cpu() - servers) / count, 3),
                    "workers_cpu_seconds": round(sum(tree_cpu(p.pid) for p in crew.running.values()), 1),
                }
                figures = await crew.judge(count)
                async with asyncio.timeout(60):
                    while await owner.fetchval("SELECT count(*) FROM indexer.operation WHERE state <> 'fulfilled'"):
                        if settling.done():
                            settling.result()
                        await asyncio.sleep(0.1)
            finally:
                await crew.stop()
                settling.cancel()
                await asyncio.gather(settling, return_exceptions=True)
    return {
        "operations": count,
        "operations_per_second": round(count / seconds),
        "seconds": round(seconds, 1),
        **spent,
        **figures,
    }


async def _settle(lease: Lease) -> None:
    while True:
        async with lease.transaction() as conn:
            done = await reconcile(conn, {}, {})
        if not done.operations:
            await asyncio.sleep(0.05)


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        ("hand-overs", ""),
        *((name.replace("_", " "), f"{value:,}") for name, value in result.items()),
    ]
