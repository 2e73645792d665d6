"""What a crowd of clients that wait for signals costs: from the commit of a signal to each client, and memory for each.

The server is a process of its own: the HTTP interface and the sequencer as the daemon runs them, on a durable PostgreSQL.
The clients are plain sockets in the process that measures, and share the processors with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import msgspec
import psutil

from indexer.api.app import create_app
from indexer.api.app import serve as serve_http
from indexer.config import Http
from indexer.signals import sequencer
from indexer.store import signals, tokens
from indexer.store.database import Database
from indexer.store.leases import Leases
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics
from tests.api_world import told
from tests.bench.measure import Server, own_cpu, postgres, tree_cpu

NOTE = (
    "Latency: from the return of COMMIT to the last byte at a client; it includes the giving of the number, a transaction "
    "of its own. Server, clients and PostgreSQL share the machine's cores."
)
BRANDS = 10
ROUNDS = 30
SETTLED_SECONDS = 0.25  # between rounds: everybody has asked again


async def run(scale: float) -> dict[str, Any]:
    clients = max(20, round(1_000 * scale))
    async with postgres() as server:
        names = [f"brand-{nth}" for nth in range(BRANDS)]
        owner = await asyncpg.connect(server.owner_url)
        try:
            await owner.executemany("INSERT INTO indexer.brand (name) VALUES ($1)", [(name,) for name in names])
            token, _ = await tokens.add(owner, "bench", None, ["signals:read"])
        finally:
            await owner.close()
        result: dict[str, Any] = {"clients": clients, "rounds": ROUNDS}
        async with _http(server) as (port, process), await Database.connect(server.url) as database:
            result["one_brand"] = await _crowd(database, process, port, token, [names[0]] * clients, names[0])
            spread = [names[nth % BRANDS] for nth in range(clients)]
            # memory is measured once: the second crowd lives in what the first one left
            result["ten_brands"] = await _crowd(database, process, port, token, spread, names[3])
    return result


@dataclass
class _Client:
    """One connection that asks for what comes next, for ever. `heard`: when each signal's answer was complete."""

    port: int
    token: str
    brand: str
    heard: dict[int, float] = field(default_factory=dict)
    asked: int = 0

    async def pull(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            after, wait = "now", 0  # the first answer is where it starts
            while True:
                writer.write(
                    f"GET /v1/signals?brand={self.brand}&wait={wait}&after={after} HTTP/1.1\r\nHost: bench\r\n"
                    f"Authorization: Bearer {self.token}\r\n\r\n".encode()
                )
                self.asked += 1
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().partition("content-length:")[2].split("\r\n")[0])
                body = await reader.readexactly(length)
                at = time.monotonic()
                if not head.startswith("HTTP/1.1 200"):
                    raise RuntimeError(f"{head.splitlines()[0]}: {body[:300]!r}")
                page = msgspec.json.decode(body)
                after, wait = page["nextCursor"], 60
                for entry in page["data"]:
                    self.heard[entry["data"]["sequence"]] = at
        finally:
            writer.close()


async def _crowd(
    database: Database, process: psutil.Process, port: int, token: str, brands: Sequence[str], speaking: str
) -> dict[str, Any]:
    """So many clients, each waiting for its brand; then signals of one brand, one at a time."""
    before = process.memory_info().rss
    clients = [_Client(port, token, brand) for brand in brands]
    concerned = [client for client in clients if client.brand == speaking]
    pulling = [asyncio.create_task(client.pull()) for client in clients]
    try:
        await _until(lambda: all(client.asked > 1 for client in clients), pulling)
        await asyncio.sleep(2)
        rss = process.memory_info().rss - before
        connections = await database.pool.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'indexer'"
        )
        latencies: list[float] = []
        cpu, own, began = tree_cpu(process.pid), own_cpu(), time.monotonic()
        for nth in range(ROUNDS):
            async with database.pool.acquire() as conn:
                async with conn.transaction():
                    await signals.append(conn, [told(speaking, "operation.ready", nth)])
                committed = time.monotonic()
                sequence = None
                while sequence is None:
                    await asyncio.sleep(0.02)
                    sequence = await conn.fetchval(
                        "SELECT max(sequence) FROM indexer.outbox WHERE brand = $1 AND payload -> 'data' -> 'operation' ->> 'reference' = $2",
                        speaking,
                        f"order-{nth}",
                    )
            await _until(lambda told=sequence: all(told in client.heard for client in concerned), pulling)  # type: ignore[misc]
            latencies += [client.heard[sequence] - committed for client in concerned]
            await asyncio.sleep(SETTLED_SECONDS)
        seconds = time.monotonic() - began
    finally:
        for task in pulling:
            task.cancel()
        await asyncio.gather(*pulling, return_exceptions=True)
    latencies.sort()
    return {
        "told": len(concerned),
        "p50_ms": _ms(latencies, 0.5),
        "p99_ms": _ms(latencies, 0.99),
        "worst_ms": _ms(latencies, 1.0),
        "first_ms": _ms(latencies, 0.0),
        "kb_per_client": round(rss / len(clients) / 1024, 1),
        "pool_connections": connections - 1,  # our own
        "server_cpu_ms_per_signal": round(1000 * (tree_cpu(process.pid) - cpu) / ROUNDS, 1),
        "clients_cpu_ms_per_signal": round(1000 * (own_cpu() - own) / ROUNDS, 1),
        "seconds": round(seconds, 1),
    }


def _ms(ordered: Sequence[float], share: float) -> float:
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)


async def _until(condition: Any, pulling: Sequence[asyncio.Task[None]]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            for task in pulling:
                if task.done():
                    await task
            await asyncio.sleep(0.005)


# ------------------------------------------------------------------------------------------------ the server's process


class _Process:
    def unready(self) -> Sequence[str]:
        return []

    def process(self) -> Mapping[str, object]:
        return {}


@asynccontextmanager
async def _http(server: Server) -> AsyncIterator[tuple[int, psutil.Process]]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.pull", server.url, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        async with asyncio.timeout(60):
            port = int(await child.stdout.readline())
        yield port, psutil.Process(child.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def _serve(url: str) -> None:
    metrics = Metrics()
    async with (
        await Database.connect(url) as database,
        Wakeups.listening(database) as wakeups,
        serve_http(create_app(database, metrics, _Process(), wakeups), Http(listen="127.0.0.1:0")) as (_, port),
        Leases(database).hold(sequencer.TASK) as lease,
    ):
        sys.stdout.write(f"{port}\n")
        sys.stdout.flush()
        await sequencer.number(lease, wakeups, metrics)


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of text for people."""
    rows: list[tuple[str, ...]] = [
        ("", "p50 ms", "p99 ms", "kB a client", "server CPU ms a signal", "pool connections")
    ]
    for key, title in {"one_brand": "all of one brand", "ten_brands": "of ten brands, one speaks"}.items():
        crowd = result[key]
        rows.append(
            (
                f"{result['clients']:,} clients wait, {title}: {crowd['told']:,} hear",
                f"{crowd['p50_ms']:g}",
                f"{crowd['p99_ms']:g}",
                f"{crowd['kb_per_client']:g}" if key == "one_brand" else "",
                f"{crowd['server_cpu_ms_per_signal']:g}",
                str(crowd["pool_connections"]),
            )
        )
    return rows


if __name__ == "__main__":
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    asyncio.run(_serve(sys.argv[1]))
