"""Three days of webhooks in three seconds: receivers with bad days of every kind, in every order that a seed gives, beside a
healthy one, while operations become ready, are taken back and return, and dispatchers are killed, frozen and drained.

Settling is the reconciler's own, on facts placed by hand; sequencer, dispatcher, HTTP and database are real. The oracle judges.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from aiohttp import web
from standardwebhooks import Webhook as Verifier

from indexer.model.confidence import Level, Policy
from indexer.settlement.reconciler import BrandRules
from indexer.signals import sequencer
from indexer.signals.attempts import SCHEDULE, Endpoint
from indexer.signals.targets import networks
from indexer.signals.webhooks import TASK, Dispatcher
from indexer.store import deliveries, signals, webhooks
from indexer.store.database import Database
from indexer.store.leases import Lease, LeaseLost, Leases
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics
from tests import oracle
from tests.receiver import Received, Receiver, Script, fine
from tests.world import BRAND, World, hexa

SECRET = "whsec_" + "c2lnbmluZyBzZWNyZXQgb2YgdGhlIHRlc3RzIQ=="
COMPRESSED = tuple(pause / 140_000 for pause in SCHEDULE)  # three days and a little: two seconds
ATTEMPTS = len(COMPRESSED) + 1
RULES = {BRAND: BrandRules((Policy(Level.INCLUDED, max_amount=100), Policy(Level.SAFE)))}


async def until(condition: Callable[[], Awaitable[object]], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        await asyncio.sleep(0.02)


# --------------------------------------------------------------------------- what happens to operations


class Story:
    """Operations whose evidence comes and goes. Keeps by when each supersession had surely committed."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.head, self.safe, self.finalized, self.fork = 100, 100, 90, 0
        self.legs: dict[UUID, dict[str, Any]] = {}
        self.mined: dict[UUID, int] = {}
        self.taken_back: dict[UUID, float] = {}
        self.doubted = False

    async def run(self, steps: int) -> None:
        await self.world.heads(head=self.head, safe=self.safe, finalized=self.finalized)
        acts = [self.register] * 4 + [self.mine] * 5 + [self.reorganise] * 3 + [self.fulfil] * 3 + [self.deepen] * 4
        acts += [self.doubt] * 3
        for _ in range(steps):
            await self.rng.choice(acts)()
            if self.rng.random() < 0.8:
                await self.settle()
            await asyncio.sleep(self.rng.random() * 0.02)
        await self.doubt(False)
        for operation in set(self.legs) - set(self.mined):
            if self.rng.random() < 0.7:  # some stay taken back
                await self.mine(operation)
        await self.register()
        await self.mine(list(self.legs)[-1])  # this one stands, whatever else does
        await self.settle()
        self.safe = self.head
        await self.world.heads(safe=self.safe)
        await self.settle()

    async def register(self) -> None:
        leg = self.world.leg(nonce=hexa(self.world.nonce()), amount=str(self.rng.choice((50, 500))))
        self.legs[await self.world.register(leg)] = leg

    async def mine(self, operation: UUID | None = None) -> None:
        waiting = sorted(set(self.legs) - set(self.mined))
        if operation is None and waiting:
            operation = self.rng.choice(waiting)
        self.head += 1
        if operation is not None:
            await self.world.event(self.head, self.legs[operation], fork=f"fork {self.fork}")
            self.mined[operation] = self.head
        await self.world.heads(head=self.head)

    async def reorganise(self) -> None:
        self.head = max(self.finalized, self.head - self.rng.randint(1, 6))
        self.safe, self.fork = min(self.safe, self.head), self.fork + 1
        self.mined = {operation: block for operation, block in self.mined.items() if block <= self.head}
        await self.world.orphan(self.head)
        await self.world.heads(head=self.head)

    async def fulfil(self) -> None:
        ready = await self.world.conn.fetch(
            "SELECT id, generation FROM indexer.operation WHERE state = 'ready' ORDER BY id"
        )
        if ready:
            chosen = self.rng.choice(ready)
            await self.world.fulfil(chosen["id"], chosen["generation"])

    async def deepen(self) -> None:
        self.safe = max(self.safe, self.head - self.rng.randint(0, 2))
        self.finalized = max(self.finalized, min(self.safe, self.head - 8))
        await self.world.heads(safe=self.safe, finalized=self.finalized)

    async def doubt(self, doubted: bool | None = None) -> None:
        """For a while nobody knows whether the chain's blocks still stand."""
        self.doubted = not self.doubted if doubted is None else doubted
        await self.world.conn.execute(
            "UPDATE indexer.chain SET head_at = clock_timestamp() + CASE WHEN $1 THEN -1 ELSE 1 END * interval '1 hour'",
            self.doubted,
        )
        if not self.doubted:  # it ends with a head that was linked
            self.head += 1
            await self.world.heads(head=self.head)

    async def settle(self) -> None:
        await self.world.settle()
        rows = await self.world.conn.fetch(
            "SELECT id, extract(epoch FROM clock_timestamp())::float8 AS now FROM indexer.outbox WHERE superseded_by IS NOT NULL"
        )
        for row in rows:
            self.taken_back.setdefault(row["id"], row["now"])


# --------------------------------------------------------------------------- receivers


@dataclass
class Shop:
    """A receiver that follows the documented rule: it stores what it can verify, by the last sequence of each operation."""

    receiver: Receiver = field(default_factory=Receiver)
    taken: dict[UUID, list[UUID]] = field(default_factory=lambda: defaultdict(list))  # by operation
    last: dict[UUID, int] = field(default_factory=lambda: defaultdict(int))
    down: bool = False

    def take(self, received: Received) -> None:
        Verifier(SECRET).verify(received.body, received.headers)
        operation = UUID(received.operation)
        if received.sequence > self.last[operation]:
            self.last[operation] = received.sequence
            self.taken[operation].append(received.id)

    async def healthy(self, received: Received) -> web.StreamResponse:
        self.take(received)
        return await fine(received)

    async def recovers(self) -> None:
        self.receiver.script = self.healthy
        await self.returns()

    async def returns(self) -> None:
        """Listens again, and is no better for it."""
        if self.down:
            await self.receiver.revive()
            self.down = False

    def received(self) -> list[tuple[UUID, UUID, int]]:
        return [(r.id, UUID(r.operation), r.sequence) for r in self.receiver.requests]


def status(code: int, **headers: str) -> Script:
    async def answer(_: Received) -> web.Response:
        return web.Response(
            status=code, text="<html>\x1b[2J we are down", headers={k.replace("_", "-"): v for k, v in headers.items()}
        )

    return answer


async def hang(_: Received) -> web.Response:
    await asyncio.sleep(60)
    return web.Response()


async def drop(_: Received) -> None:
    return None


async def garbage(_: Received) -> bytes:
    return b"\x00\xff<html>this is no HTTP</html>\r\n\r\n"


BAD_DAYS: dict[str, Script | None] = {
    "dies": None,
    "hangs": hang,
    "500": status(500),
    "429": status(429, Retry_After="0"),
    "301": status(301, Location="/elsewhere"),
    "410": status(410),
    "drops": drop,
    "garbage": garbage,
    "accepts and times out": hang,
}


async def bad_days(shop: Shop, rng: random.Random, *, gone: bool) -> None:
    """One bad day after another, for ever."""

    async def accept(received: Received) -> web.StreamResponse:
        shop.take(received)
        return await hang(received)

    days = [day for day in BAD_DAYS if gone or day != "410"]
    while True:
        rng.shuffle(days)
        for day in days:
            shop.receiver.script = accept if day == "accepts and times out" else BAD_DAYS[day] or drop
            await shop.returns()
            if day == "dies":
                await shop.receiver.die()
                shop.down = True
            await asyncio.sleep(rng.uniform(0.05, 0.2))


# --------------------------------------------------------------------------- dispatchers


class Shifts:
    """One dispatcher after the other, each with a new lease; what the one before leaves is what a process leaves."""

    def __init__(self, database: Database, endpoints: list[Endpoint], rng: random.Random, wakeups: Wakeups) -> None:
        self.database, self.endpoints, self.rng, self.wakeups = database, endpoints, rng, wakeups
        self.frozen: list[tuple[asyncio.Task[None], Dispatcher]] = []
        self.count = 0

    async def begin(self) -> None:
        found: list[Lease] = []

        async def taken() -> bool:
            lease = await Leases(self.database, ttl=120).acquire(TASK)
            found.extend([lease] if lease else [])
            return lease is not None

        await until(taken, "the lease")
        (self.lease,) = found
        self.dispatcher = Dispatcher(
            self.endpoints, metrics=Metrics(), schedule=COMPRESSED, rng=random.Random(self.rng.random()), sweep=0.1
        )
        self.task = asyncio.create_task(self.dispatcher.run(self.lease, self.wakeups))

    async def end(self, how: str) -> None:
        self.count += 1
        if (
            how == "frozen"
        ):  # it knows of nothing: its requests go on, and it learns of its successor when they have ended
            self.frozen.append((self.task, self.dispatcher))
        else:
            if how == "drained":
                await self.dispatcher.drain(20)
            assert not self.task.done() or self.task.exception() is None
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
            await self.dispatcher.close()
            self.lease.connection.terminate()
        await self.database.pool.execute("UPDATE indexer.lease SET until = clock_timestamp() WHERE task = $1", TASK)

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        await self.begin()
        try:
            yield
        finally:
            await self.end("drained")
            async with asyncio.timeout(60):
                outcomes = await asyncio.gather(*(task for task, _ in self.frozen), return_exceptions=True)
            for _, dispatcher in self.frozen:
                await dispatcher.close()
            assert all(isinstance(outcome, LeaseLost) for outcome in outcomes), outcomes


@asynccontextmanager
async def looping(*work: Awaitable[None]) -> AsyncIterator[list[asyncio.Future[None]]]:
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        yield tasks
        assert not [task.exception() for task in tasks if task.done() and not task.cancelled()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --------------------------------------------------------------------------- the judgement


async def waiting(database: Database, webhook: str) -> int:
    count: int = await database.pool.fetchval(
        "SELECT count(*) FROM indexer.delivery WHERE webhook = $1 AND state = 'pending'", webhook
    )
    return count + await database.pool.fetchval("SELECT count(*) FROM indexer.outbox WHERE sequence IS NULL")


async def misled(conn: asyncpg.Connection, webhook: str, shop: Shop) -> list[str]:
    """Operations about which a receiver that followed the rule believes something else than the outbox says. Where a 410
    left a gap, or a dead letter is still to be sent, it may.
    """
    told = await oracle.read_signals(conn)
    by_id = {signal.id: signal for signal in told}
    states = {one.signal: one.state for one in await oracle.read_deliveries(conn, webhook)}
    wrong = []
    for operation in {signal.operation for signal in told}:
        trace = [signal for signal in told if signal.operation == operation]
        kept = [s for s in trace if s.type not in ("operation.confirming", "operation.submitted")]
        if all(states.get(signal.id) not in (None, "dead") for signal in kept):
            believes, so = (oracle.settled_after(told) for told in ((by_id[id] for id in shop.taken[operation]), trace))
            if believes != so:
                wrong.append(f"{webhook} believes that {operation} is {'' if believes else 'not '}settled")
    return wrong


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_bad_days_of_every_kind_in_any_order(
    owner_dsn: str, database: Database, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "MARGIN", 0.05)
    rng = random.Random(seed)
    shops = {name: Shop() for name in ("well", "sick", "hopeless")}
    async with (
        World.at(owner_dsn, RULES) as world,
        shops["well"].receiver.open(),
        shops["sick"].receiver.open(),
        shops["hopeless"].receiver.open(),
        Wakeups.listening(database) as wakeups,
    ):
        events = {"hopeless": ("operation.ready",)}
        endpoints = [
            Endpoint(
                BRAND,
                name,
                f"{shop.receiver.url}/hook",
                (SECRET,),
                events.get(name, ("operation.*", "operation.confirming")),
                networks(["127.0.0.0/8"]),
                timeout=0.5 if name == "well" else 0.2,
            )
            for name, shop in shops.items()
        ]
        async with database.pool.acquire() as conn, conn.transaction():
            await webhooks.sync_webhooks(conn, [webhooks.WebhookRow(e.brand, e.name, e.events) for e in endpoints])
        shops["well"].receiver.script = shops["well"].healthy
        story = Story(world, rng)
        shifts = Shifts(database, endpoints, rng, wakeups)

        async def enable_what_is_gone() -> None:
            while True:
                await asyncio.sleep(0.15)
                async with database.pool.acquire() as conn:
                    if await conn.fetchval("SELECT disabled_as FROM indexer.webhook WHERE name = 'sick'") == "gone":
                        await webhooks.enable_webhook(conn, BRAND, "sick")
                        wakeups.poke("numbered")

        async def change_shifts(over: asyncio.Event) -> None:
            while not over.is_set():
                await asyncio.sleep(rng.uniform(0.1, 0.5))
                await shifts.end(rng.choice(("killed", "frozen", "frozen", "drained")))
                await shifts.begin()

        async def number() -> None:
            async with Leases(database).hold(sequencer.TASK) as lease:
                await sequencer.number(lease, wakeups, Metrics(), sweep=0.1)

        async with looping(number(), enable_what_is_gone()), shifts.working():
            async with looping(bad_days(shops["sick"], rng, gone=True), bad_days(shops["hopeless"], rng, gone=False)):
                over = asyncio.Event()
                changing = asyncio.create_task(change_shifts(over))
                await story.run(50)
                over.set()
                await changing

                async def well() -> bool:
                    return await waiting(database, "well") == 0

                # the healthy one has everything while the others are still at it
                await until(well, "the healthy endpoint has everything")
                async with database.pool.acquire() as conn:
                    assert (
                        oracle.judge_deliveries(
                            await oracle.read_deliveries(conn, "well"),
                            {id for id, _, _ in shops["well"].received()},
                            story.taken_back,
                            most_attempts=ATTEMPTS,
                            cut_off=shifts.count,
                            dead_allowed=False,
                        )
                        == []
                    )

                async def given_up() -> bool:
                    return await waiting(database, "hopeless") == 0

                # … and what exhausts its schedule is a dead letter, each of a signal that stands
                await until(given_up, "the hopeless endpoint's deliveries end")
            await shops["sick"].recovers()

            async def recovered() -> bool:
                return await waiting(database, "sick") == 0

            await until(recovered, "the sick endpoint has everything")
            async with database.pool.acquire() as conn:
                assert await oracle.judge_database(conn) == []
                known = {signal.id for signal in await oracle.read_signals(conn)}
                for name, shop in shops.items():
                    ended = await oracle.read_deliveries(conn, name)
                    wrong = oracle.judge_received(shop.received(), known)
                    wrong += oracle.judge_deliveries(
                        ended,
                        {id for id, _, _ in shop.received()},
                        story.taken_back,
                        most_attempts=ATTEMPTS,
                        cut_off=shifts.count,
                        dead_allowed=name != "well",
                    )
                    wrong += await misled(conn, name, shop) if name != "hopeless" else []
                    assert not wrong, f"{name}:\n" + "\n".join(wrong)
                    dead = {one.signal for one in ended if one.state == "dead"}
                    listed = await signals.list_signals(conn, webhook=name, state="dead", limit=1000)
                    assert {one.id for one in listed} == dead
                assert dead, "nothing was given up at the endpoint that never answered"

                # asked for again, dead letters arrive, late: who follows the receivers' rule is right all the same
                for name in ("sick", "hopeless"):
                    await shops[name].recovers()
                    await signals.redeliver_dead(conn, BRAND, name)
            wakeups.poke("numbered")

            async def all_sent() -> bool:
                return await waiting(database, "sick") + await waiting(database, "hopeless") == 0

            await until(all_sent, "dead letters are sent again")
            async with database.pool.acquire() as conn:
                assert await misled(conn, "sick", shops["sick"]) == []
                states = {one.signal: one.state for one in await oracle.read_deliveries(conn, "hopeless")}
                assert {states[signal] for signal in dead} <= {"delivered", "superseded"}
