"""The outbox and its numbers: gapless, in order, held up by nobody; and whose endpoints a signal becomes due at."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from indexer.model.signal import Signal
from indexer.signals.sequencer import TASK, number
from indexer.store import deliveries, signals, webhooks
from indexer.store.database import Database
from indexer.store.leases import Leases
from indexer.store.wakeups import Wakeups
from indexer.store.webhooks import WebhookRow
from indexer.telemetry import Metrics


def signal(brand: str, operation: UUID, kind: str = "operation.ready", supersedes: UUID | None = None) -> Signal:
    identity = uuid4()
    data: dict[str, Any] = {"id": str(identity), "brand": brand, "operation": {"id": str(operation), "legs": []}}
    payload = {"type": kind, "timestamp": "2026-11-21T10:00:00Z", "data": data}
    return Signal(identity, brand, "operation", operation, kind, payload, 1, supersedes)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


async def commit(database: Database, *new: Signal) -> None:
    async with database.pool.acquire() as conn, conn.transaction():
        await signals.append(conn, new)


async def numbered(database: Database) -> signals.Numbered:
    async with database.pool.acquire() as conn, conn.transaction():
        return await signals.number(conn)


async def sync(database: Database, *rows: WebhookRow) -> None:
    async with database.pool.acquire() as conn, conn.transaction():
        await webhooks.sync_webhooks(conn, rows)


async def due_at(database: Database, webhook: str = "shop") -> list[str]:
    rows = await database.pool.fetch(
        "SELECT type FROM indexer.delivery WHERE webhook = $1 ORDER BY brand, sequence", webhook
    )
    return [row["type"] for row in rows]


@pytest.fixture
async def brands(database: Database) -> AsyncIterator[tuple[str, ...]]:
    names = ("acme", "bloom", "corner")
    await database.pool.executemany("INSERT INTO indexer.brand (name) VALUES ($1)", [(name,) for name in names])
    yield names


async def test_numbers_are_gapless_and_in_order_with_concurrent_writers_and_crashes(
    database: Database, brands: tuple[str, ...]
) -> None:
    rng = random.Random(7)
    operations = [(rng.choice(brands), uuid4()) for _ in range(24)]
    locks = {operation: asyncio.Lock() for _, operation in operations}  # as the reconciler locks an operation's row
    kept: dict[UUID, list[UUID]] = {operation: [] for _, operation in operations}
    writing = True

    async def write(seed: int) -> None:
        mine = random.Random(seed)
        for _ in range(25):
            brand, operation = mine.choice(operations)
            new = [signal(brand, operation) for _ in range(mine.randint(1, 3))]
            async with locks[operation], database.pool.acquire() as conn:
                transaction = conn.transaction()
                await transaction.start()
                await signals.append(conn, new)
                await asyncio.sleep(mine.random() / 200)
                if mine.random() < 0.2:
                    await transaction.rollback()
                    continue
                await transaction.commit()
            kept[operation] += [s.id for s in new]

    async def count(seed: int) -> None:
        mine = random.Random(seed)
        while writing:
            async with database.pool.acquire() as conn:
                transaction = conn.transaction()
                await transaction.start()
                await signals.number(conn, limit=mine.randint(1, 20))
                # a sequencer that dies before its commit leaves no gap
                await (transaction.rollback() if mine.random() < 0.3 else transaction.commit())

    counters = [asyncio.create_task(count(seed)) for seed in (100, 101)]  # two: not even the fence is relied on
    await asyncio.gather(*(write(seed) for seed in range(6)))
    writing = False
    await asyncio.gather(*counters)
    while (await numbered(database)).signals:
        pass

    rows = await database.pool.fetch("SELECT id, brand, aggregateid, sequence, payload FROM indexer.outbox")
    assert {row["id"] for row in rows} == {identity for ids in kept.values() for identity in ids}
    stream = await database.pool.fetchval("SELECT stream FROM indexer.instance")
    for brand in brands:
        sequences = sorted(row["sequence"] for row in rows if row["brand"] == brand)
        assert sequences == list(range(1, len(sequences) + 1))
        last = await database.pool.fetchval("SELECT last_sequence FROM indexer.brand WHERE name = $1", brand)
        assert last == len(sequences)
    for operation, ids in kept.items():
        in_order = sorted((row for row in rows if row["aggregateid"] == operation), key=lambda row: row["sequence"])
        assert [row["id"] for row in in_order] == ids
    for row in rows:
        assert row["payload"]["data"]["sequence"] == row["sequence"]
        assert row["payload"]["data"]["stream"] == str(stream)


async def test_an_open_transaction_of_a_brand_holds_up_nobody(database: Database, brands: tuple[str, ...]) -> None:
    late, prompt, other = (signal("acme", uuid4()), signal("acme", uuid4()), signal("bloom", uuid4()))
    async with database.pool.acquire() as conn:
        transaction = conn.transaction()
        await transaction.start()
        await signals.append(conn, [late])
        # and it holds the brand's row as an uncommitted registration does
        await conn.execute("SELECT FROM indexer.brand WHERE name = 'acme' FOR KEY SHARE")
        await commit(database, prompt, other)
        async with asyncio.timeout(60):
            assert (await numbered(database)).signals == {"acme": 1, "bloom": 1}
        await transaction.commit()
    assert (await numbered(database)).signals == {"acme": 1}
    rows = await database.pool.fetch("SELECT id FROM indexer.outbox WHERE brand = 'acme' ORDER BY sequence")
    assert [row["id"] for row in rows] == [prompt.id, late.id]


async def test_a_signal_appended_twice_is_there_once_and_marks_what_it_supersedes(
    database: Database, brands: tuple[str, ...]
) -> None:
    operation = uuid4()
    ready = signal("acme", operation)
    reverted = signal("acme", operation, "operation.reverted", supersedes=ready.id)
    async with database.pool.acquire() as conn, conn.transaction():
        assert await signals.append(conn, [ready, reverted]) == [ready.id, reverted.id]
        assert await signals.append(conn, [ready, reverted]) == []
    rows = await database.pool.fetch("SELECT id, superseded_by FROM indexer.outbox ORDER BY position")
    assert [tuple(row) for row in rows] == [(ready.id, reverted.id), (reverted.id, None)]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (("operation.*",), ["operation.ready", "operation.reverted"]),
        (("*",), ["operation.ready", "operation.reverted", "settlement.unmatched"]),
        (("settlement.*", "operation.reverted"), ["operation.reverted", "settlement.unmatched"]),
        (("operation.*", "operation.submitted"), ["operation.submitted", "operation.ready", "operation.reverted"]),
    ],
)
async def test_patterns_choose_and_hints_are_sent_only_where_they_are_named(
    database: Database, brands: tuple[str, ...], events: tuple[str, ...], expected: list[str]
) -> None:
    await sync(database, WebhookRow("acme", "shop", events))
    kinds = ("operation.submitted", "operation.confirming", "operation.rejected", "operation.ready")
    await commit(
        database, *(signal("acme", uuid4(), kind) for kind in (*kinds, "operation.reverted", "settlement.unmatched"))
    )
    await commit(database, signal("bloom", uuid4()))  # another brand's never
    await numbered(database)
    assert await due_at(database) == expected


async def test_an_endpoint_starts_at_now_and_one_that_was_removed_or_disabled_gets_nothing_new(
    database: Database, brands: tuple[str, ...]
) -> None:
    async def one() -> None:
        await commit(database, signal("acme", uuid4()))
        await numbered(database)

    shop = WebhookRow("acme", "shop", ("operation.*",))
    await one()
    await sync(database, shop)
    assert await due_at(database) == []
    await one()
    assert len(await due_at(database)) == 1
    await sync(database)  # removed
    await one()
    await sync(database, shop)  # and back: what was pending stays, what was missed is missed
    assert len(await due_at(database)) == 1
    async with database.pool.acquire() as conn:
        assert await webhooks.pause_webhook(conn, "acme", "shop")
        await one()
        assert len(await due_at(database)) == 2  # waits for it
        assert await webhooks.enable_webhook(conn, "acme", "shop")
        assert not await webhooks.enable_webhook(conn, "acme", "nowhere")
        await conn.execute("UPDATE indexer.webhook SET disabled_at = now(), disabled_as = 'gone'")
        await one()
        assert len(await due_at(database)) == 2


async def test_the_loop_numbers_at_once_when_told_and_steps_down_with_its_lease(
    database: Database, brands: tuple[str, ...]
) -> None:
    metrics = Metrics()
    async with Wakeups.listening(database) as wakeups:
        while wakeups.status != "listening":
            await asyncio.sleep(0.01)
        async with Leases(database).hold(TASK) as lease:
            loop = asyncio.create_task(number(lease, wakeups, metrics, sweep=60))
            try:
                new = signal("acme", uuid4())
                await commit(database, new)

                async def seen() -> bool:
                    query = "SELECT sequence FROM indexer.outbox WHERE id = $1"
                    return await database.pool.fetchval(query, new.id) == 1

                await until(seen, seconds=10)  # its sweep is a minute away: the NOTIFY of `append` woke it
            finally:
                loop.cancel()
                await asyncio.gather(loop, return_exceptions=True)
    assert metrics.registry.get_sample_value("loyalty_signals_numbered_total", {"brand": "acme"}) == 1


async def test_no_query_reads_a_whole_growing_table(database: Database, brands: tuple[str, ...]) -> None:
    await sync(database, WebhookRow("acme", "shop", ("*",)))
    async with database.pool.acquire() as conn, conn.transaction():
        await conn.execute(
            """
            INSERT INTO indexer.outbox (id, brand, aggregatetype, aggregateid, type, payload, sequence)
            SELECT gen_random_uuid(), 'acme', 'operation', gen_random_uuid(), 'operation.ready', '{"data": {}}', n
              FROM generate_series(1, 100000) n
            """
        )
        await conn.execute(
            """
            INSERT INTO indexer.delivery (brand, webhook, signal_id, aggregateid, sequence, type, state, next_at)
            SELECT brand, 'shop', id, aggregateid, sequence, type,
                   CASE WHEN sequence % 2 = 0 THEN 'pending' ELSE 'delivered' END, now() + interval '1 hour'
              FROM indexer.outbox
            """
        )
        await conn.execute("UPDATE indexer.brand SET last_sequence = 100000 WHERE name = 'acme'")
    await commit(database, *(signal("acme", uuid4()) for _ in range(20)))
    room = [deliveries.Room("acme", "shop", 8, 10.0)]

    async def scans(conn: asyncpg.Connection) -> dict[str, int]:
        rows = await conn.fetch(
            "SELECT relname, seq_scan, seq_tup_read FROM pg_stat_xact_user_tables WHERE relname IN ('outbox', 'delivery')"
        )
        return {row["relname"]: row["seq_tup_read"] for row in rows}

    async with database.pool.acquire() as conn:
        async with conn.transaction():
            before = await scans(conn)
            assert (await signals.number(conn)).deliveries == 20
            assert await scans(conn) == before
        async with conn.transaction():
            before = await scans(conn)
            turn = await deliveries.begin(conn, room)
            assert len(turn.attempts) == 8
            await deliveries.next_due(conn, room)
            await deliveries.record(
                conn, [deliveries.Outcome(attempt, "delivered", 200, None) for attempt in turn.attempts]
            )
            assert await scans(conn) == before
