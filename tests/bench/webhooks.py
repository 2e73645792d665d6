"""What a webhook costs: how many a second a local receiver gets, and one signal's way beside millions of old ones.

First, operations' signals wait, and a dispatcher starts: a receiver in another process counts. Then an outbox is filled with
signals that were delivered long ago, and a new one goes its way step by step, a transaction each, as the loops take them.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
from aiohttp import web

from indexer.model.signal import Signal
from indexer.signals.attempts import Endpoint
from indexer.signals.targets import networks
from indexer.signals.webhooks import TASK, Dispatcher
from indexer.store import deliveries, feed, schema, signals, webhooks
from indexer.store.database import Database
from indexer.store.leases import Lease, Leases
from indexer.store.wakeups import Wakeups
from indexer.store.webhooks import WebhookRow
from indexer.telemetry import Metrics
from tests.bench.measure import Server, own_cpu, own_peak_mb, postgres

NOTE = "The receiver answers 204 at once, from another process of this machine; PostgreSQL durable, as --embedded starts it."
BRAND = "bloom"
SECRET = "whsec_" + "c2lnbmluZyBzZWNyZXQgb2YgdGhlIHRlc3RzIQ=="
ROUNDS = 200


async def run(scale: float) -> dict[str, Any]:
    async with postgres() as server, _receiver() as url:
        sending = {name: await _sending(server, url, name, max(200, round(5_000 * scale))) for name in ("one", "four")}
    async with postgres() as server:
        cost = await _cost(server, max(10_000, round(10_000_000 * scale)))
    return {"sending": sending, "cost": cost, "peak_mb": round(own_peak_mb())}


# --------------------------------------------------------------------------- webhooks a second


@asynccontextmanager
async def _receiver() -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.webhooks", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            port = int(await process.stdout.readline())
        yield f"http://127.0.0.1:{port}/"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def serve() -> None:
    """The receiver's process: prints its port, and answers until it is killed."""

    async def take(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=204)

    async def forever() -> None:
        app = web.Application()
        app.router.add_post("/", take)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        sys.stdout.write(f"{runner.addresses[0][1]}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()

    asyncio.run(forever())


def _signal() -> Signal:
    identity, operation = uuid4(), uuid4()
    leg = {
        "kind": "loyfin.redemption",
        "chainId": "8453",
        "holder": "0x" + "40" * 20,
        "amount": "250",
        "nonce": "0x" + "11" * 32,
    }
    data = {
        "id": str(identity),
        "brand": BRAND,
        "generation": 1,
        "supersedes": None,
        "operation": {"id": str(operation), "reference": f"order-{operation}", "status": "ready", "legs": [leg]},
        "evidence": [{"leg": 0, "basis": "nonce", "txHash": "0x" + "22" * 32, "blockHash": "0x" + "33" * 32}],
    }
    payload = {"type": "operation.ready", "timestamp": "2026-11-21T10:00:00Z", "data": data}
    return Signal(identity, BRAND, "operation", operation, "operation.ready", payload, 1)


async def _sending(server: Server, url: str, name: str, count: int) -> dict[str, Any]:
    """`one` endpoint, or `four` that each get every signal."""
    copies = {"one": 1, "four": 4}[name]
    endpoints = [Endpoint(BRAND, f"{name}-{n}", url, (SECRET,), allow=networks(["127.0.0.0/8"])) for n in range(copies)]
    async with await Database.connect(server.url) as database:
        pool = database.pool
        await pool.execute("INSERT INTO indexer.brand (name) VALUES ($1) ON CONFLICT DO NOTHING", BRAND)
        async with pool.acquire() as conn, conn.transaction():
            await webhooks.sync_webhooks(conn, [WebhookRow(e.brand, e.name, e.events) for e in endpoints])
            await signals.append(conn, [_signal() for _ in range(count)])
            while (await signals.number(conn)).signals:
                pass
        await pool.execute("ANALYZE indexer.outbox, indexer.delivery")
        dispatcher = Dispatcher(endpoints, metrics=Metrics())
        began, cpu, servers = time.perf_counter(), own_cpu(), server.cpu()
        async with Wakeups.listening(database) as wakeups, Leases(database).hold(TASK) as lease:
            running = asyncio.create_task(dispatcher.run(lease, wakeups))
            while await pool.fetchval("SELECT EXISTS (SELECT FROM indexer.delivery WHERE state = 'pending')"):
                await asyncio.sleep(0.1)
            wall = time.perf_counter() - began
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        await dispatcher.close()
        attempts = await pool.fetchval(
            "SELECT count(*) FROM indexer.delivery_attempt WHERE webhook = ANY ($1)", [e.name for e in endpoints]
        )
    sent = count * copies
    return {
        "webhooks": sent,
        "attempts": attempts,
        "per_second": round(sent / wall),
        "cpu_ms_each": round(1000 * (own_cpu() - cpu) / sent, 3),
        "postgres_cpu_ms_each": round(1000 * (server.cpu() - servers) / sent, 3),
    }


# --------------------------------------------------------------------------- one signal's way


@asynccontextmanager
async def _without_indexes(owner: asyncpg.Connection, *tables: str) -> AsyncIterator[None]:
    """Rows go in bare, and the indexes are built by sorting: a tenth of the time at ten million."""
    rows = await owner.fetch(
        """
        SELECT i.indrelid::regclass AS of, i.indexrelid::regclass AS name, c.conname, pg_get_constraintdef(c.oid) AS rule,
               pg_get_indexdef(i.indexrelid) AS definition
          FROM pg_index i LEFT JOIN pg_constraint c ON c.conindid = i.indexrelid AND c.conrelid = i.indrelid
         WHERE i.indrelid = ANY ($1::text[]::regclass[])
        """,
        [f"indexer.{table}" for table in tables],
    )
    for row in rows:
        bare = (
            f"ALTER TABLE {row['of']} DROP CONSTRAINT {row['conname']}" if row["rule"] else f"DROP INDEX {row['name']}"
        )
        await owner.execute(bare)
    yield
    await owner.execute("SET maintenance_work_mem = '512MB'")
    for row in rows:
        rule = f"ALTER TABLE {row['of']} ADD CONSTRAINT {row['conname']} {row['rule']}"
        await owner.execute(rule if row["rule"] else row["definition"])


async def _fill(server: Server, count: int) -> None:
    """Signals that were delivered to two endpoints long ago; three for each operation."""
    owner = await asyncpg.connect(server.owner_url, command_timeout=7200)
    try:
        await owner.execute("SET synchronous_commit = off")
        async with _without_indexes(owner, "outbox", "delivery"):
            await _insert(owner, count)
        await owner.execute("INSERT INTO indexer.brand (name, last_sequence) VALUES ($1, $2)", BRAND, count)
        await owner.execute("VACUUM ANALYZE")
    finally:
        await owner.close()


async def _insert(owner: asyncpg.Connection, count: int) -> None:
    for first in range(1, count + 1, 500_000):
        last = min(count, first + 499_999)
        await owner.execute(
            f"""
                INSERT INTO indexer.outbox (id, brand, aggregatetype, aggregateid, type, payload, generation, sequence, created_at)
                SELECT md5('signal ' || n)::uuid, '{BRAND}', 'operation', md5('operation ' || n / 3)::uuid, 'operation.ready',
                       jsonb_build_object('type', 'operation.ready', 'data', jsonb_build_object('sequence', n,
                         'operation', jsonb_build_object('reference', 'order-' || n, 'holder', md5(n::text) || md5(n::text)))),
                       1, n, now() - interval '100 days' + n * interval '0.5 second'
                  FROM generate_series({first}, {last}) n
                """
        )
        await owner.execute(
            f"""
                INSERT INTO indexer.delivery (brand, webhook, signal_id, aggregateid, sequence, type, state, attempts, next_at, begun_at, ended_at, status)
                SELECT '{BRAND}', webhook, md5('signal ' || n)::uuid, md5('operation ' || n / 3)::uuid, n, 'operation.ready',
                       'delivered', 1, at, at, at, 204
                  FROM generate_series({first}, {last}) n, unnest('{{shop,books}}'::text[]) AS webhook,
                       LATERAL (SELECT now() - interval '100 days' + n * interval '0.5 second' AS at) AS time
                """
        )


async def _cost(server: Server, count: int) -> list[dict[str, Any]]:
    """Median milliseconds of each transaction on a signal's way to two endpoints, in an empty database and in a full one of the
    same server, by turns: what the disk and the machine do besides, they do to both.
    """
    began = time.perf_counter()
    await _fill(server, count)
    filled = time.perf_counter() - began
    async with _another(server) as bare, _Way.on(bare, 0) as empty, _Way.on(server, count) as full:
        for _ in range(ROUNDS):
            await empty.go()
            await full.go()
    return [
        {"signals_before": way.first, "fill_seconds": round(filled if way is full else 0), **way.medians()}
        for way in (empty, full)
    ]


@asynccontextmanager
async def _another(server: Server) -> AsyncIterator[Server]:
    """A database more on the same server, with nothing in it."""
    owner = await asyncpg.connect(server.owner_url)
    try:
        await owner.execute("CREATE DATABASE bare")
    finally:
        await owner.close()
    bare = Server(
        *(urlunsplit(urlsplit(url)._replace(path="/bare")) for url in (server.url, server.owner_url)), server.pid
    )
    await schema.migrate(bare.owner_url)
    owner = await asyncpg.connect(bare.owner_url)
    try:
        await owner.execute("INSERT INTO indexer.brand (name) VALUES ($1)", BRAND)
    finally:
        await owner.close()
    yield bare


class _Way:
    """A signal's way to two endpoints, step by step, a transaction each, as the loops take them."""

    def __init__(self, lease: Lease, first: int) -> None:
        self.first = self.last = first
        self._lease = lease
        self._rooms = [deliveries.Room(BRAND, name, 8, 10.0) for name in ("shop", "books")]
        self._times: dict[str, list[float]] = {}

    @classmethod
    @asynccontextmanager
    async def on(cls, server: Server, first: int) -> AsyncIterator[_Way]:
        async with await Database.connect(server.url) as database, Leases(database).hold(TASK) as lease:
            way = cls(lease, first)
            async with lease.transaction() as conn:
                rows = [WebhookRow(BRAND, room.webhook, ("operation.*",)) for room in way._rooms]
                await webhooks.sync_webhooks(conn, rows)
            yield way

    async def _timed(self, step: str, work: Callable[[asyncpg.Connection], Awaitable[Any]]) -> Any:
        started = time.perf_counter()
        async with self._lease.transaction() as conn:
            done = await work(conn)
        self._times.setdefault(step, []).append(time.perf_counter() - started)
        return done

    async def go(self) -> None:
        new, self.last = _signal(), self.last + 1
        started = time.perf_counter()
        await self._timed("append", lambda conn: signals.append(conn, [new]))
        await self._timed("number", signals.number)
        turn = await self._timed("begin", lambda conn: deliveries.begin(conn, self._rooms))
        if len(turn.attempts) != 2:
            raise SystemExit(f"{len(turn.attempts)} attempts began, and there are two endpoints")
        ended = [deliveries.Outcome(attempt, "delivered", 204, None) for attempt in turn.attempts]

        async def record(conn: asyncpg.Connection) -> None:
            await deliveries.record(conn, ended)
            await webhooks.weigh(conn, ended, {})

        await self._timed("record", record)
        self._times.setdefault("all", []).append(time.perf_counter() - started)
        page = lambda conn: feed.read(conn, BRAND, self.last - 1, limit=100, max_bytes=65536)  # noqa: E731
        if [entry.id for entry in (await self._timed("pull", page)).entries] != [new.id]:
            raise SystemExit("a client that pulls does not get the new signal")

    def medians(self) -> dict[str, float]:
        return {f"{step}_ms": round(1000 * statistics.median(seen), 2) for step, seen in self._times.items()}


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of text for people."""
    rows: list[tuple[str, ...]] = [("", "per second", "CPU ms each, own", "CPU ms each, PostgreSQL")]
    for name, sent in result["sending"].items():
        rows.append(
            (
                f"{sent['webhooks']:,} webhooks to {name} endpoint{'s' if name != 'one' else ''}",
                f"{sent['per_second']:,}",
                f"{sent['cpu_ms_each']:g}",
                f"{sent['postgres_cpu_ms_each']:g}",
            )
        )
    rows.append(("", "", "", ""))
    empty, full = result["cost"]
    rows.append(
        (
            "a signal to two endpoints, ms",
            f"beside {empty['signals_before']:,}",
            f"beside {full['signals_before']:,}",
            "ratio",
        )
    )
    for step, title in {
        "append": "put into the outbox",
        "number": "numbered, deliveries made",
        "begin": "attempts judged and put on record",
        "record": "their ends recorded",
        "all": "all four",
        "pull": "read by a client that pulls",
    }.items():
        before, beside = empty[f"{step}_ms"], full[f"{step}_ms"]
        rows.append((title, f"{before:g}", f"{beside:g}", f"{beside / before:.2f} ×"))
    return rows


if __name__ == "__main__":
    serve()
