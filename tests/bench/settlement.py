"""What settling costs: from registration to a numbered signal, and a pass when there is nothing to do beside much history.

First, so many operations are registered one by one through the SQL contract and settled by events that are there already.
Then a database with idle operations and a long history shows what a pass costs: it should follow what changed alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import msgspec

from indexer.settlement.loop import tell_unmatched
from indexer.settlement.reconciler import reconcile
from indexer.store import functions, operations, signals
from indexer.store.database import Database
from indexer.store.leases import Lease, Leases
from tests.bench.measure import Server, own_cpu, own_peak_mb, postgres
from tests.bench.population import BLOCK_MS, BRAND, CHAIN, ISSUER, KIND, LOYALTY_ID, Population, nonce, wallet

NOTE = "One connection, one process; PostgreSQL durable, as `indexer run --embedded` starts it."
ROUNDS = 30


async def run(scale: float) -> dict[str, Any]:
    async with postgres() as server:
        settling = await _throughput(server, max(200, round(10_000 * scale)))
    async with postgres() as server:
        idle = await _idle(server, max(1_000, round(100_000 * scale)), max(10_000, round(1_000_000 * scale)))
    return {"settling": settling, "idle": idle}


async def _populate(server: Server, population: Population) -> None:
    owner = await asyncpg.connect(server.owner_url, command_timeout=3600)
    try:
        await population.write(owner)
    finally:
        await owner.close()


def _request(i: int) -> str:
    leg = {
        "kind": KIND,
        "chainId": str(CHAIN),
        "issuer": "0x" + ISSUER.hex(),
        "holder": "0x" + wallet(i).hex(),
        "loyaltyId": "0x" + LOYALTY_ID.hex(),
        "amount": str(1 + i),
        "nonce": "0x" + nonce(i).hex(),
    }
    return msgspec.json.encode({"brand": BRAND, "reference": f"order-{i}", "legs": [leg]}).decode()


async def _throughput(server: Server, count: int) -> dict[str, Any]:
    await _populate(server, Population(operations=0, idle=0, movements=count, transfers=0))
    stages: dict[str, Any] = {}

    async def stage(name: str, work: Callable[[], Awaitable[int]]) -> None:
        wall, cpu, servers = time.perf_counter(), own_cpu(), server.cpu()
        done = max(1, await work())
        stages[name] = {
            "operations": done,
            "operations_per_second": round(done / (time.perf_counter() - wall)),
            "cpu_ms_per_operation": round(1000 * (own_cpu() - cpu) / done, 3),
            "postgres_cpu_ms_per_operation": round(1000 * (server.cpu() - servers) / done, 3),
        }

    async with await Database.connect(server.url) as database, Leases(database).hold("settle") as lease:

        async def register() -> int:
            async with database.pool.acquire() as conn:
                for i in range(count):
                    await functions.register_operation(conn, _request(i))
            return count

        async def settle() -> int:
            ready = 0
            for _ in range(count):  # each pass takes many: it has come to rest long before
                async with lease.transaction() as conn:
                    done = await reconcile(conn, {}, {})
                ready += sum(signal.type == "operation.ready" for signal in done.signals)
                if ready >= count or (not done.backlog and not done.operations):
                    break
            return ready

        async def number() -> int:
            told = 0
            while True:
                async with lease.transaction() as conn:
                    numbered = await signals.number(conn)
                if not numbered.signals:
                    return told
                told += numbered.signals[BRAND]

        await stage("register", register)
        await stage("settle", settle)
        await stage("number", number)
    if stages["settle"]["operations"] != count:
        raise SystemExit(f"{stages['settle']['operations']} of {count} operations became ready")
    return {"operations": count, **stages, "peak_mb": round(own_peak_mb())}


async def _idle(server: Server, idle: int, movements: int) -> dict[str, Any]:
    population = Population(operations=idle, idle=idle, movements=movements, transfers=0)
    await _populate(server, population)
    result: dict[str, Any] = {"operations": idle, "movements": movements}
    async with await Database.connect(server.url) as database, Leases(database).hold("settle") as lease:

        async def nothing(_: asyncpg.Connection, __: int) -> None:
            pass

        async def block(conn: asyncpg.Connection, nth: int) -> None:
            """A block with two old events was stored: the reconciler spreads it."""
            await conn.execute(
                "INSERT INTO indexer.touched_blocks (chain_id, from_block, to_block) VALUES ($1, $2, $2)",
                CHAIN,
                1 + nth,
            )

        async def head(conn: asyncpg.Connection, nth: int) -> None:
            """All heads move: no alarm is due."""
            await conn.execute(
                """
                UPDATE indexer.chain SET head_number = head_number + 1, head_time_ms = head_time_ms + $2,
                    safe_number = safe_number + 1, finalized_number = finalized_number + 1, finalized_time_ms = finalized_time_ms + $2
                WHERE chain_id = $1
                """,
                CHAIN,
                BLOCK_MS,
            )

        async def touched(conn: asyncpg.Connection, nth: int) -> None:
            rows = await conn.fetch("SELECT id FROM indexer.operation ORDER BY id OFFSET $1 LIMIT 1", nth)
            await operations.touch(conn, [row["id"] for row in rows])

        result["nothing_changed_ms"] = await _pass(lease, nothing)
        result["heads_moved_ms"] = await _pass(lease, head)
        result["unmatched_ms"] = await _unmatched(lease)
        result["a_block_came_ms"] = await _pass(lease, block)
        result["an_operation_touched_ms"] = await _pass(lease, touched)
    return result


async def _pass(lease: Lease, before: Callable[[asyncpg.Connection, int], Awaitable[None]]) -> float:
    """Median milliseconds of a pass, its transaction included."""
    times = []
    for nth in range(ROUNDS):
        async with lease.transaction() as conn:
            await before(conn, nth)
        began = time.perf_counter()
        async with lease.transaction() as conn:
            await reconcile(conn, {}, {})
        times.append(time.perf_counter() - began)
    return round(1000 * statistics.median(times), 2)


async def _unmatched(lease: Lease) -> float:
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        async with lease.transaction() as conn:
            await tell_unmatched(conn, 0)
        times.append(time.perf_counter() - began)
    return round(1000 * statistics.median(times), 2)


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of text for people."""
    settling, idle = result["settling"], result["idle"]
    rows: list[tuple[str, ...]] = [("", "per second", "CPU ms each, own", "CPU ms each, PostgreSQL")]
    titles = {"register": "registered by SQL", "settle": "settled: claim, ready, history", "number": "signals numbered"}
    for key, title in titles.items():
        stage = settling[key]
        rows.append(
            (
                f"{stage['operations']:,} {title}",
                f"{stage['operations_per_second']:,}",
                f"{stage['cpu_ms_per_operation']:g}",
                f"{stage['postgres_cpu_ms_per_operation']:g}",
            )
        )
    rows.append(("", "", "", ""))
    rows.append((f"beside {idle['operations']:,} idle operations and {idle['movements']:,} events", "ms", "", ""))
    for key, title in {
        "nothing_changed_ms": "a pass, nothing changed",
        "heads_moved_ms": "a pass, all heads moved",
        "a_block_came_ms": "a pass, a block came with events",
        "an_operation_touched_ms": "a pass, one operation touched",
        "unmatched_ms": "the hunt for unmatched evidence",
    }.items():
        rows.append((title, f"{idle[key]:g}", "", ""))
    return rows
