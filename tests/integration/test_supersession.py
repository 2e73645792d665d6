"""No attempt of a `ready` begins after its supersession committed, however the two transactions lie: both want the signal's row.

The interleavings are made, not hoped for: a row policy holds the dispatcher's statement between its snapshot and its locks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

import asyncpg
import pytest

from indexer.model.signal import READY, REVERTED, Signal
from indexer.store import deliveries, signals, webhooks
from indexer.store.database import Database
from indexer.store.deliveries import Attempt, Outcome, Room, Turn
from tests.world import World, hexa

ROOMS = [Room("bloom", "shop", 8, 10.0)]
GATE = 7237


def signal(kind: str, operation: UUID, supersedes: Signal | None = None) -> Signal:
    identity = uuid4()
    payload = {"type": kind, "data": {"id": str(identity)}}
    return Signal(identity, "bloom", "operation", operation, kind, payload, 1, supersedes.id if supersedes else None)


async def told(conn: asyncpg.Connection, *new: Signal) -> None:
    await signals.append(conn, new)
    await signals.number(conn)


@pytest.fixture
async def ready(database: Database) -> Signal:
    """A `ready` that is due at the shop."""
    new = signal(READY, uuid4())
    async with database.pool.acquire() as conn, conn.transaction():
        await conn.execute("INSERT INTO indexer.brand (name) VALUES ('bloom')")
        await webhooks.sync_webhooks(conn, [webhooks.WebhookRow("bloom", "shop", ("operation.*",))])
        await told(conn, new)
    return new


@pytest.fixture
async def dispatcher(database: Database) -> AsyncIterator[asyncpg.Connection]:
    async with database.pool.acquire() as conn:
        yield conn


@pytest.fixture
async def reconciler(database: Database) -> AsyncIterator[asyncpg.Connection]:
    async with database.pool.acquire() as conn:
        yield conn


def begun(turn: Turn) -> list[UUID]:
    return [attempt.signal_id for attempt in turn.attempts]


async def take_all(conn: asyncpg.Connection) -> list[Attempt]:
    """Turns until there is nothing to do, each attempt delivered. Returns the attempts."""
    made: list[Attempt] = []
    while (turn := await deliveries.begin(conn, ROOMS)).progress:
        await deliveries.record(conn, [Outcome(attempt, "delivered", 204, None) for attempt in turn.attempts])
        made += turn.attempts
    return made


@asynccontextmanager
async def held_at_its_snapshot(owner_dsn: str, looking: asyncpg.Connection) -> AsyncIterator[None]:
    """What `looking` executes next stops between its snapshot and the first row it locks, until the body ends."""
    owner = await asyncpg.connect(owner_dsn)
    try:
        await owner.execute(
            f"""
            CREATE FUNCTION indexer.gate() RETURNS boolean LANGUAGE plpgsql AS $$
            BEGIN
                IF pg_backend_pid() = {looking.get_server_pid()} THEN
                    PERFORM pg_advisory_lock_shared({GATE}), pg_advisory_unlock_shared({GATE});
                END IF;
                RETURN true;
            END $$;
            GRANT EXECUTE ON FUNCTION indexer.gate() TO loyalty_daemon;
            CREATE POLICY gate ON indexer.delivery USING (indexer.gate());
            ALTER TABLE indexer.delivery ENABLE ROW LEVEL SECURITY;
            SELECT pg_advisory_lock({GATE});
            """
        )
        yield
        await owner.execute(f"SELECT pg_advisory_unlock({GATE})")
    finally:
        await owner.close()


async def waits_at_the_gate(conn: asyncpg.Connection) -> None:
    async with asyncio.timeout(60):
        while not await conn.fetchval(
            "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)"
        ):
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("then", ["commits", "rolls back"])
async def test_a_supersession_during_the_dispatchers_look_is_seen(
    owner_dsn: str, ready: Signal, dispatcher: asyncpg.Connection, reconciler: asyncpg.Connection, then: str
) -> None:
    async with held_at_its_snapshot(owner_dsn, dispatcher):
        looking = asyncio.create_task(deliveries.begin(dispatcher, ROOMS))
        await waits_at_the_gate(reconciler)
        change = reconciler.transaction()
        await change.start()
        await signals.append(reconciler, [signal(REVERTED, ready.aggregateid, ready)])
        await (change.commit() if then == "commits" else change.rollback())
    turn = await looking
    if then == "rolls back":
        assert begun(turn) == [ready.id]
    else:
        assert (begun(turn), [closed.signal_id for closed in turn.closed]) == ([], [ready.id])


async def test_a_supersession_that_has_not_committed_is_waited_for_by_nobody_else(
    ready: Signal, dispatcher: asyncpg.Connection, reconciler: asyncpg.Connection
) -> None:
    other = signal(READY, uuid4())
    change = reconciler.transaction()
    await change.start()
    await signals.append(reconciler, [signal(REVERTED, ready.aggregateid, ready)])
    await told(dispatcher, other)
    async with asyncio.timeout(60):  # it goes on with what is free, and comes back for the rest
        assert [attempt.signal_id for attempt in await take_all(dispatcher)] == [other.id]
        assert await deliveries.next_due(dispatcher, ROOMS) <= 0  # type: ignore[operator]
    await change.commit()
    await signals.number(reconciler)
    assert await take_all(dispatcher) == []
    states = await dispatcher.fetch(
        "SELECT state, begun_at FROM indexer.delivery WHERE aggregateid = $1", ready.aggregateid
    )
    assert [tuple(row) for row in states] == [("superseded", None)] * 2


async def test_a_reconciler_that_stands_still_with_many_holds_up_nobody_else(
    ready: Signal, dispatcher: asyncpg.Connection, reconciler: asyncpg.Connection
) -> None:
    many = [ready, *(signal(READY, uuid4()) for _ in range(50))]  # more than an endpoint takes in a turn
    await told(dispatcher, *many[1:])
    other = signal(READY, uuid4())
    await told(dispatcher, other)
    change = reconciler.transaction()
    await change.start()
    await signals.append(reconciler, [signal(REVERTED, one.aggregateid, one) for one in many])
    assert [attempt.signal_id for attempt in await take_all(dispatcher)] == [other.id]
    await change.rollback()
    assert {attempt.signal_id for attempt in await take_all(dispatcher)} == {one.id for one in many}


async def test_a_supersession_waits_for_an_attempt_that_is_being_put_on_record_and_follows_it(
    ready: Signal, dispatcher: asyncpg.Connection, reconciler: asyncpg.Connection
) -> None:
    reverted = signal(REVERTED, ready.aggregateid, ready)
    record = dispatcher.transaction()
    await record.start()
    turn = await deliveries.begin(dispatcher, ROOMS)
    assert begun(turn) == [ready.id]
    with pytest.raises(asyncpg.LockNotAvailableError):
        async with reconciler.transaction():
            await reconciler.execute("SET LOCAL lock_timeout = '100ms'")
            await signals.append(reconciler, [reverted])
    await record.commit()
    await told(reconciler, reverted)
    # it was begun first: so it may have arrived, and is followed by what takes it back
    await deliveries.record(dispatcher, [Outcome(attempt, "pending", 500, "HTTP 500") for attempt in turn.attempts])
    assert [attempt.signal_id for attempt in await take_all(dispatcher)] == [reverted.id]


async def test_a_brands_open_transaction_holds_up_no_attempt(owner_dsn: str, dispatcher: asyncpg.Connection) -> None:
    async with World.at(owner_dsn) as world:
        await webhooks.sync_webhooks(world.conn, [webhooks.WebhookRow("bloom", "shop", ("operation.*",))])
        operation = await world.register(world.leg(nonce=hexa(world.nonce())))
        new: Sequence[Signal] = [signal(READY, operation)]
        await told(dispatcher, *new)
        await world.conn.execute("UPDATE indexer.operation SET state = 'ready', generation = 1")
        async with world.conn.transaction():
            assert await world.fulfil(operation, 1) == "fulfilled"  # … and then the brand's program goes to lunch
            async with asyncio.timeout(60):
                assert begun(await deliveries.begin(dispatcher, ROOMS)) == [new[0].id]
