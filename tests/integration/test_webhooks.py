"""Deliveries over real sockets: signed, at least once, in order within an operation, and a sick endpoint is alone with it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from aiohttp import web
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError
from structlog.testing import capture_logs

from indexer.model.signal import Signal
from indexer.signals.attempts import Endpoint, Sender, send_test
from indexer.signals.targets import networks, system_lookup
from indexer.signals.webhooks import TASK, Dispatcher
from indexer.store import deliveries, signals, webhooks
from indexer.store.database import Database
from indexer.store.leases import Lease, LeaseLost, Leases
from indexer.store.overview import observe_database, overview
from indexer.store.wakeups import Wakeups
from indexer.store.webhooks import WebhookRow
from indexer.telemetry import Metrics
from tests.loops import at_work
from tests.receiver import Received, Receiver, Script

SECRET = "whsec_" + "c2lnbmluZyBzZWNyZXQgb2YgdGhlIHRlc3RzIQ=="
OLD_SECRET = "whsec_" + "YW4gb2xkZXIgc2VjcmV0IG9mIHRoZSB0ZXN0cw=="
LOOPBACK = networks(["127.0.0.0/8"])
SOON = (0.02,) * 12  # the schedule of three days, compressed
NEVER = (3600.0,) * 12


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver().open() as opened:
        yield opened


async def until(condition: Callable[[], Awaitable[bool] | bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        met = condition()
        if met if isinstance(met, bool) else await met:
            return
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)


@dataclass
class House:
    """The sending side: an outbox in a real database, and dispatchers on it."""

    database: Database
    receiver: Receiver
    metrics: Metrics = field(default_factory=Metrics)
    wakeups: Wakeups = field(default_factory=Wakeups)

    def endpoint(self, name: str = "shop", **changes: Any) -> Endpoint:
        given = {"url": f"{self.receiver.url}/{name}", "secrets": (SECRET,), "allow": LOOPBACK, "timeout": 5.0}
        return Endpoint(brand="bloom", name=name, **{**given, **changes})

    async def configure(self, *endpoints: Endpoint) -> None:
        rows = [WebhookRow(endpoint.brand, endpoint.name, endpoint.events) for endpoint in endpoints]
        async with self.database.pool.acquire() as conn, conn.transaction():
            await webhooks.sync_webhooks(conn, rows)

    @asynccontextmanager
    async def dispatching(
        self, *endpoints: Endpoint, schedule: Sequence[float] = SOON, **options: Any
    ) -> AsyncIterator[Dispatcher]:
        await self.configure(*endpoints)
        dispatcher = Dispatcher(endpoints, metrics=self.metrics, schedule=schedule, **options)
        try:
            async with at_work(Leases(self.database), TASK, lambda lease: dispatcher.run(lease, self.wakeups)):
                yield dispatcher
        finally:
            await dispatcher.close()

    async def commit(self, *new: Signal) -> None:
        async with self.database.pool.acquire() as conn, conn.transaction():
            await signals.append(conn, new)

    async def number(self) -> None:
        async with self.database.pool.acquire() as conn, conn.transaction():
            await signals.number(conn)
        self.wakeups.poke("numbered")

    async def send(self, *new: Signal) -> None:
        await self.commit(*new)
        await self.number()

    async def states(self, webhook: str = "shop") -> dict[UUID, str]:
        rows = await self.database.pool.fetch(
            "SELECT signal_id, state FROM indexer.delivery WHERE webhook = $1", webhook
        )
        return {row["signal_id"]: row["state"] for row in rows}

    async def row(self, signal: Signal, webhook: str = "shop") -> Any:
        return await self.database.pool.fetchrow(
            "SELECT *, next_at - ended_at AS pause FROM indexer.delivery WHERE signal_id = $1 AND webhook = $2",
            signal.id,
            webhook,
        )

    async def settled(self, *expected: Signal, state: str = "delivered", webhook: str = "shop") -> None:
        async def there() -> bool:
            states = await self.states(webhook)
            return all(states.get(signal.id) == state for signal in expected)

        await until(there)


@pytest.fixture
async def house(database: Database, receiver: Receiver) -> House:
    await database.pool.execute("INSERT INTO indexer.brand (name) VALUES ('bloom')")
    return House(database, receiver)


def signal(operation: UUID, kind: str = "ready", supersedes: Signal | None = None) -> Signal:
    identity = uuid4()
    data = {
        "id": str(identity),
        "brand": "bloom",
        "operation": {"id": str(operation), "reference": "Einlösung 8841 €", "legs": [{"kind": "loyfin.redemption"}]},
    }
    payload = {"type": f"operation.{kind}", "timestamp": "2026-11-21T10:00:00Z", "data": data}
    return Signal(
        identity,
        "bloom",
        "operation",
        operation,
        f"operation.{kind}",
        payload,
        1,
        supersedes.id if supersedes else None,
    )


# --------------------------------------------------------------------------- what arrives


async def test_a_receiver_verifies_with_the_public_library_and_tampering_shows(house: House) -> None:
    async with house.dispatching(house.endpoint(secrets=(SECRET, OLD_SECRET))):
        new = signal(uuid4())
        await house.send(new)
        await house.settled(new)
    (request,) = house.receiver.requests
    assert request.headers["content-type"] == "application/json"
    assert request.id == new.id
    for secret in (SECRET, OLD_SECRET):  # during a rotation either one verifies
        payload = Verifier(secret).verify(request.body, request.headers)
    assert payload == request.json
    assert payload["data"]["sequence"] == 1
    assert payload["data"]["operation"]["reference"] == "Einlösung 8841 €"
    stored = await house.database.pool.fetchval("SELECT payload FROM indexer.outbox WHERE id = $1", new.id)
    assert payload == stored

    def refused(body: bytes, secret: str = SECRET, **headers: str) -> None:
        with pytest.raises(WebhookVerificationError):
            Verifier(secret).verify(body, {**request.headers, **headers})

    refused(request.body.replace(b"8841", b"8842"))
    refused(request.body, secret="whsec_" + "bm90IHRoZSByaWdodCBzZWNyZXQgYXQgYWxsIQ==")
    refused(request.body, **{"webhook-timestamp": str(int(time.time()) - 3600)})
    refused(request.body, **{"webhook-id": str(uuid4())})


async def test_a_replayed_request_is_too_old_for_its_receiver(house: House) -> None:
    async with house.dispatching(house.endpoint(), clock=lambda: time.time() - 600):
        new = signal(uuid4())
        await house.send(new)
        await house.settled(new)
    with pytest.raises(WebhookVerificationError, match="too old"):
        Verifier(SECRET).verify(house.receiver.requests[0].body, house.receiver.requests[0].headers)


async def test_the_first_delivery_of_a_ready_is_measured_once(house: House) -> None:
    async with house.dispatching(house.endpoint(), house.endpoint("books")) as _:
        new = signal(uuid4())
        await house.send(new)
        await house.settled(new)
        await house.settled(new, webhook="books")
        async with house.database.pool.acquire() as conn:
            assert await signals.redeliver(conn, new.id, webhook="shop") == ["shop"]
        house.wakeups.poke("numbered")
        await until(lambda: len(house.receiver.types("/shop")) == 2)
        await house.settled(new)
    labels = {"brand": "bloom", "kind": "loyfin.redemption", "stage": "ready_to_delivered"}
    count = house.metrics.registry.get_sample_value("loyalty_settlement_latency_seconds_count", labels)
    assert count == 1
    ids = {request.id for request in house.receiver.requests}
    assert ids == {new.id}


# --------------------------------------------------------------------------- bad days


async def test_every_kind_of_failure_is_repeated_with_the_same_id_and_body_until_it_is_taken(house: House) -> None:
    async def hang(_: Received) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    async def drop(_: Received) -> None:
        return None

    async def status(code: int, **headers: str) -> web.Response:
        return web.Response(status=code, text="<html><h1>Bad gateway</h1>", content_type="text/html", headers=headers)

    bad_days: list[Script] = [
        lambda _: status(500),
        lambda _: status(429),
        lambda _: status(503, **{"Retry-After": "nonsense"}),
        lambda _: status(301, Location="/elsewhere"),
        lambda _: status(307, Location="/elsewhere"),
        lambda _: status(400),
        lambda _: status(404),
        hang,
        drop,
    ]
    days = iter(bad_days)

    async def script(received: Received) -> web.StreamResponse | None:
        day = next(days, None)
        # 200 with a page instead of JSON is a delivery: the body says nothing
        return await (day(received) if day else status(200))

    house.receiver.scripts["/shop"] = script
    new = signal(uuid4())
    async with house.dispatching(house.endpoint(timeout=0.5)):
        await house.send(new)
        await house.settled(new)
    requests = house.receiver.requests
    assert len(requests) == len(bad_days) + 1
    assert {request.path for request in requests} == {"/shop"}  # no redirect was followed
    assert {(request.id, request.body) for request in requests} == {(new.id, requests[0].body)}
    assert house.receiver.overlaps == 0
    assert (await house.row(new))["attempts"] == len(requests)


async def test_an_answer_that_is_not_http_and_a_closed_port_are_failures_with_a_reason(house: House) -> None:
    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"<html>this is no HTTP</html>\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(shout, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    closed = await asyncio.start_server(shout, "127.0.0.1", 0)
    closed_port = closed.sockets[0].getsockname()[1]
    closed.close()
    await closed.wait_closed()
    new = signal(uuid4())
    garbage = house.endpoint("garbage", url=f"http://127.0.0.1:{port}/token-in-path")
    nobody = house.endpoint("nobody", url=f"http://127.0.0.1:{closed_port}/token-in-path")
    untrusted = house.endpoint("untrusted", url=f"https://127.0.0.1:{port}/token-in-path")
    async with house.dispatching(garbage, nobody, untrusted, schedule=NEVER):
        await house.send(new)
        errors = {}
        for name in ("garbage", "nobody", "untrusted"):

            async def told(name: str = name) -> bool:
                errors[name] = (await house.row(new, name))["error"]
                return errors[name] is not None

            await until(told)
    server.close()
    await server.wait_closed()
    assert errors["garbage"] == "the answer was not HTTP"
    assert "cannot connect to 127.0.0.1" in errors["nobody"]
    assert "TLS" in errors["untrusted"] or "closed" in errors["untrusted"]
    assert not any("token-in-path" in error for error in errors.values())


async def test_an_endless_answer_counts_by_its_status_and_costs_no_memory(house: House) -> None:
    async def endless(_: Received) -> web.Response:
        return web.Response(body=b"x" * 5_000_000)

    house.receiver.scripts["/shop"] = endless
    new = signal(uuid4())
    async with house.dispatching(house.endpoint()):
        await house.send(new)
        await house.settled(new)
    assert len(house.receiver.requests) == 1


@pytest.mark.parametrize(("code", "header"), [(429, "120"), (503, "120"), (503, "date")])
async def test_retry_after_is_honoured_in_both_forms(house: House, code: int, header: str) -> None:
    now = time.time()
    value = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now + 121)) if header == "date" else header

    async def busy(_: Received) -> web.Response:
        return web.Response(status=code, headers={"Retry-After": value})

    house.receiver.scripts["/shop"] = busy
    new = signal(uuid4())
    async with house.dispatching(house.endpoint()):
        await house.send(new)

        async def told() -> bool:
            return (await house.row(new))["status"] == code

        await until(told)
    row = await house.row(new)
    assert row["state"] == "pending"
    assert 100 < row["pause"].total_seconds() < 125


async def test_gone_disables_the_endpoint_until_it_is_enabled(house: House) -> None:
    async def gone(_: Received) -> web.Response:
        return web.Response(status=410)

    house.receiver.scripts["/shop"] = gone
    first, second = signal(uuid4()), signal(uuid4())
    async with house.dispatching(house.endpoint(), house.endpoint("books")):
        await house.send(first)

        async def disabled() -> bool:
            query = "SELECT disabled_reason FROM indexer.webhook WHERE name = 'shop' AND disabled_at IS NOT NULL"
            return await house.database.pool.fetchval(query) == "the endpoint answered 410 Gone"

        await until(disabled)
        await house.send(second)
        await house.settled(first, second, webhook="books")
        assert len(house.receiver.types("/shop")) == 1
        assert list(await house.states()) == [first.id]  # nothing is kept for an endpoint that is gone
        house.receiver.scripts.clear()
        async with house.database.pool.acquire() as conn:
            await webhooks.enable_webhook(conn, "bloom", "shop")
        house.wakeups.poke("numbered")
        await house.settled(first)


async def test_a_dead_letter_lets_the_next_go_and_can_be_sent_again(house: House) -> None:
    operation = uuid4()
    first, second = signal(operation), signal(operation, "fulfilled")

    async def refuse_first(received: Received) -> web.Response:
        return web.Response(status=500 if received.id == first.id else 204)

    house.receiver.scripts["/shop"] = refuse_first
    async with house.dispatching(house.endpoint(), schedule=(0.01, 0.01)):
        await house.send(first, second)
        await house.settled(first, state="dead")
        await house.settled(second)
        assert house.receiver.types() == ["operation.ready"] * 3 + ["operation.fulfilled"]
        house.receiver.scripts.clear()
        async with house.database.pool.acquire() as conn:
            assert await signals.redeliver(conn, first.id) == ["shop"]
        house.wakeups.poke("numbered")
        await house.settled(first)


async def test_every_attempt_is_kept_with_its_status_its_time_and_how_the_answer_began(house: House) -> None:
    async def page(_: Received) -> web.Response:
        return web.Response(status=502, body=b"<h1>\x1b[2Jdown\x00</h1>" + b"x" * 2000)

    async def hang(_: Received) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    async def thanks(_: Received) -> web.Response:
        return web.Response(text="thank you")

    scripts = iter([page, hang])
    house.receiver.scripts["/shop"] = lambda received: next(scripts, thanks)(received)
    new = signal(uuid4())
    async with house.dispatching(house.endpoint(timeout=0.5)):
        await house.send(new)
        await house.settled(new)
    async with house.database.pool.acquire() as conn:
        shown = await signals.show_signal(conn, new.id)
        assert await signals.show_signal(conn, uuid4()) is None
    assert shown is not None and isinstance(shown.attempts, list)
    assert [(made.number, made.status, made.error) for made in shown.attempts] == [
        (1, 502, "HTTP 502"),
        (2, None, "no answer within 0.5 s"),
        (3, 200, None),
    ]
    first, second, third = (made.answer for made in shown.attempts)
    assert first is not None and first.startswith("<h1>\\x1b[2Jdown\\x00</h1>xxx") and len(first) < 600
    assert (second, third) == (None, "thank you")
    assert 0.4 < shown.attempts[1].seconds < 5
    assert [made.begun_at for made in shown.attempts] == sorted(made.begun_at for made in shown.attempts)
    (delivery,) = shown.deliveries
    assert (delivery.webhook, delivery.state, delivery.attempts, delivery.next_at) == ("shop", "delivered", 3, None)


async def test_a_long_failing_endpoint_is_paused_says_so_and_loses_nothing(house: House) -> None:
    async def fail(_: Received) -> web.Response:
        return web.Response(status=500)

    house.receiver.scripts["/shop"] = fail
    early = [signal(uuid4()) for _ in range(3)]
    late = [signal(uuid4()) for _ in range(3)]
    shop, pool = house.endpoint(pause_after=0.4), house.database.pool

    async def stopped() -> bool:
        return await pool.fetchval("SELECT disabled_as FROM indexer.webhook WHERE name = 'shop'") == "failing"

    with capture_logs() as logs:
        async with house.dispatching(shop, house.endpoint("books"), schedule=(0.05,) * 100):
            await house.send(*early)
            await until(stopped)
            asked = len(house.receiver.types("/shop"))
            await house.send(*late)
            await house.settled(*early, *late, webhook="books")  # nobody else is concerned
            assert set((await house.states()).values()) == {"pending"} and len(await house.states()) == 6
            assert len(house.receiver.types("/shop")) <= asked + 8  # what was under way; then nothing
            async with pool.acquire() as conn:
                books, told = await webhooks.list_webhooks(conn)
                await observe_database(conn, house.metrics)
                seen = await overview(conn)
            assert (books.state, books.waiting, books.failing_since) == ("active", 0, None)
            assert (told.name, told.state, told.waiting, told.dead_letters) == ("shop", "failing", 6, 0)
            assert told.reason is not None and "have failed, the last one with: HTTP 500" in told.reason
            assert told.since is not None and told.failing_since is not None
            assert (told.since - told.failing_since).total_seconds() >= 0.4 and told.failures >= 10
            # a pause is no backlog, and no secret either
            assert seen.unsent == [] and [one.state for one in seen.webhooks] == ["active", "failing"]
            value = house.metrics.registry.get_sample_value
            assert value("loyalty_oldest_unsent_age_seconds", {"brand": "bloom"}) == 0
            assert (value("loyalty_oldest_held_age_seconds", {"brand": "bloom"}) or 0) > 0
            labels = {"brand": "bloom", "webhook": "shop", "why": "failing"}
            assert value("loyalty_webhook_stopped", labels) == value("loyalty_webhook_stops_total", labels) == 1
            house.receiver.scripts.clear()
            async with pool.acquire() as conn:
                assert await webhooks.enable_webhook(conn, "bloom", "shop")
            house.wakeups.poke("numbered")
            await house.settled(*early, *late)
    assert [entry["webhook"] for entry in logs if entry["event"] == "endpoint_stopped"] == ["shop"]
    row = await pool.fetchrow("SELECT * FROM indexer.webhook WHERE name = 'shop'")
    assert (row["disabled_at"], row["failing_since"], row["failures"]) == (None, None, 0)


async def test_an_endpoint_that_takes_something_now_and_then_is_not_paused(house: House) -> None:
    days = itertools.count(1)

    async def moody(_: Received) -> web.Response:
        return web.Response(status=500 if next(days) % 4 else 204)

    house.receiver.scripts["/shop"] = moody
    async with house.dispatching(house.endpoint(pause_after=0.0)):
        for _ in range(5):
            new = signal(uuid4())
            await house.send(new)
            await house.settled(new)
    assert len(house.receiver.requests) == 20  # of which fifteen failed, three at a time
    row = await house.database.pool.fetchrow("SELECT disabled_as, failing_since, failures FROM indexer.webhook")
    assert tuple(row) == (None, None, 0)


async def test_an_enabled_endpoint_is_tried_at_once_and_from_the_beginning_of_the_schedule(house: House) -> None:
    async def fail(_: Received) -> web.Response:
        return web.Response(status=500)

    house.receiver.scripts["/shop"] = fail
    new = signal(uuid4())
    async with house.dispatching(house.endpoint(), schedule=(0.01, 0.01, 3600.0)):
        await house.send(new)
        await until(lambda: len(house.receiver.requests) == 3)

        async def waits() -> bool:
            row = await house.row(new)
            return row["attempts"] == 3 and row["ended_at"] is not None

        await until(waits)
        async with house.database.pool.acquire() as conn:
            await webhooks.enable_webhook(conn, "bloom", "shop")
        house.wakeups.poke("numbered")
        await until(
            lambda: len(house.receiver.requests) == 5
        )  # its next attempt was an hour away, and the last but one


async def test_what_is_old_is_forgotten_in_batches_and_what_waits_is_kept(house: House) -> None:
    failing, answered = signal(uuid4()), [signal(uuid4()) for _ in range(5)]

    async def script(received: Received) -> web.Response:
        return web.Response(status=500 if received.id == failing.id else 204)

    house.receiver.scripts["/shop"] = script
    pool = house.database.pool
    async with house.dispatching(house.endpoint(), house.endpoint("removed"), schedule=NEVER):
        await house.send(failing, *answered)
        await house.settled(*answered)
        await house.settled(failing, *answered, webhook="removed")
        await until(lambda: len(house.receiver.types()) == 6)
    await house.configure(house.endpoint())  # without "removed", which leaves one unsent
    await pool.execute("UPDATE indexer.delivery SET state = 'pending' WHERE webhook = 'removed' AND sequence = 1")
    await pool.execute("UPDATE indexer.delivery SET next_at = next_at - interval '40 days' WHERE webhook = 'removed'")
    async with pool.acquire() as conn:
        assert await deliveries.forget(conn, keep=timedelta(days=30)) == 1
        assert await deliveries.forget(conn, keep=timedelta(hours=1)) == 0
        await conn.execute(
            "UPDATE indexer.delivery SET ended_at = ended_at - interval '2 hours' WHERE ended_at IS NOT NULL"
        )
        await conn.execute("UPDATE indexer.delivery_attempt SET begun_at = begun_at - interval '2 hours'")
        counts = [await deliveries.forget(conn, keep=timedelta(hours=1), limit=4) for _ in range(7)]
    # ten deliveries that ended, twelve attempts; four at a time
    assert counts == [4, 4, 4, 4, 4, 2, 0]
    assert await house.states() == {failing.id: "pending"}
    assert await pool.fetchval("SELECT count(*) FROM indexer.outbox") == 6
    async with pool.acquire() as conn:
        assert await signals.redeliver(conn, answered[0].id) == ["shop"]  # the signals are all still there


# --------------------------------------------------------------------------- order, and who waits for whom


async def test_an_operations_signals_arrive_in_order_one_at_a_time_while_others_run_beside_it(house: House) -> None:
    operations = [uuid4() for _ in range(12)]
    sent: dict[str, list[UUID]] = defaultdict(list)
    failures = Counter[UUID]()

    async def moody(received: Received) -> web.Response:
        await asyncio.sleep(0.01)
        failures[received.id] += 1
        return web.Response(status=500 if failures[received.id] <= received.id.int % 3 else 200)

    house.receiver.scripts["/shop"] = moody
    async with house.dispatching(house.endpoint(), schedule=(0.005,) * 12):
        everything = []
        for kind in ("ready", "fulfilled", "finalized", "conflict"):
            batch = [signal(operation, kind) for operation in operations]
            everything += batch
            for new in batch:
                sent[str(new.aggregateid)].append(new.id)
            await house.send(*batch)
        await house.settled(*everything)
    assert house.receiver.overlaps == 0
    assert 1 < house.receiver.most_at_once <= 8
    for operation, ids in sent.items():
        arrived = [request.id for request in house.receiver.requests if request.operation == operation]
        assert list(dict.fromkeys(arrived)) == ids  # first arrivals in order
        assert arrived == sorted(arrived, key=ids.index)  # and nothing earlier after something later


async def test_a_sick_endpoint_delays_neither_other_endpoints_nor_other_operations(house: House) -> None:
    sick_operation = uuid4()
    release = asyncio.Event()

    async def hang(_: Received) -> web.Response:
        await release.wait()
        return web.Response()

    async def hang_for_one(received: Received) -> web.Response:
        return await hang(received) if received.operation == str(sick_operation) else web.Response()

    sick = [house.endpoint(f"sick{n}", timeout=30.0) for n in range(9)]  # more than the overall limit bears
    for endpoint in sick:
        house.receiver.scripts[f"/{endpoint.name}"] = hang
    house.receiver.scripts["/shop"] = hang_for_one
    poison = signal(sick_operation)
    backlog = [signal(uuid4()) for _ in range(20)]
    async with house.dispatching(*sick, house.endpoint(timeout=30.0)):
        await house.send(poison, *backlog)
        async with asyncio.timeout(15):  # half of what one hanging request takes
            await house.settled(*backlog)
        late = signal(uuid4())
        await house.send(late)
        async with asyncio.timeout(15):
            await house.settled(late)
        assert (await house.row(poison))["ended_at"] is None
        assert house.receiver.most_at_once <= 64 + 2 * 10
        release.set()


async def test_a_backlog_in_retry_is_not_in_the_way_of_new_signals(house: House) -> None:
    async def fail(_: Received) -> web.Response:
        return web.Response(status=500)

    house.receiver.scripts["/shop"] = fail
    old = [signal(uuid4()) for _ in range(100)]
    behind = [signal(s.aggregateid, "fulfilled") for s in old]
    async with house.dispatching(house.endpoint(), schedule=NEVER):
        await house.send(*old, *behind)
        await until(lambda: len(house.receiver.requests) == 100)
        house.receiver.scripts.clear()
        new = signal(uuid4())
        await house.send(new)
        await house.settled(new)
    assert set(house.receiver.types()) == {"operation.ready"}  # nothing overtook its ready


async def test_numbered_to_posted_is_quick_when_woken(house: House) -> None:
    async with house.dispatching(house.endpoint(), sweep=60):
        new = signal(uuid4())
        await house.send(new)
        await house.settled(new)  # connection open, plans made
        times = []
        for _ in range(20):
            new = signal(uuid4())
            seen = len(house.receiver.requests)
            await house.commit(new)
            await house.number()
            started = time.perf_counter()
            while len(house.receiver.requests) == seen:
                await asyncio.sleep(0)
            times.append(time.perf_counter() - started)
    assert sorted(times)[len(times) // 2] < 10  # a few milliseconds on a quiet machine; never a sweep, which takes 60 s


# --------------------------------------------------------------------------- taken back


async def test_a_ready_superseded_before_its_first_attempt_goes_unsent_with_its_reverted(house: House) -> None:
    operation = uuid4()
    ready = signal(operation)
    reverted = signal(operation, "reverted", supersedes=ready)
    again = signal(operation)
    await house.configure(house.endpoint())
    await house.send(ready)
    await house.commit(reverted)  # committed, and not even numbered yet
    async with house.dispatching(house.endpoint()):
        await house.settled(ready, state="superseded")
        await house.number()
        await house.settled(reverted, state="superseded")
        await house.send(again)
        await house.settled(again)
    assert [request.id for request in house.receiver.requests] == [again.id]
    rows = await house.database.pool.fetch("SELECT id FROM indexer.outbox WHERE sequence IS NOT NULL ORDER BY sequence")
    assert [row["id"] for row in rows] == [ready.id, reverted.id, again.id]  # the pull stream keeps both


async def test_a_ready_superseded_after_an_attempt_began_is_not_sent_again_and_its_reverted_is(house: House) -> None:
    operation = uuid4()
    ready = signal(operation)
    reverted = signal(operation, "reverted", supersedes=ready)
    arrived, answer = asyncio.Event(), asyncio.Event()

    async def slow_failure(received: Received) -> web.Response:
        if received.id == ready.id:
            arrived.set()
            await answer.wait()
            return web.Response(status=500)  # perhaps it took it, perhaps not
        return web.Response()

    house.receiver.scripts["/shop"] = slow_failure
    async with house.dispatching(house.endpoint(), schedule=NEVER):
        await house.send(ready)
        await arrived.wait()
        await house.send(reverted)
        answer.set()
        async with asyncio.timeout(4):  # it waits for the end of the attempt, not for all the time that this might take
            await house.settled(reverted)
        await house.settled(ready, state="superseded")
    assert [request.id for request in house.receiver.requests] == [ready.id, reverted.id]
    assert house.receiver.overlaps == 0


async def test_an_exposure_is_told_even_where_its_ready_was_never_sent(house: House) -> None:
    # the brand fulfilled through SQL while this endpoint was paused; then the evidence went
    operation = uuid4()
    ready = signal(operation)
    fulfilled = signal(operation, "fulfilled")
    reverted = signal(operation, "reverted", supersedes=ready)
    await house.configure(house.endpoint())
    await house.send(ready, fulfilled, reverted)
    async with house.dispatching(house.endpoint()):
        await house.settled(fulfilled, reverted)
        await house.settled(ready, state="superseded")
    assert house.receiver.types() == ["operation.fulfilled", "operation.reverted"]


async def test_a_superseded_ready_is_not_sent_again_on_demand_either(house: House) -> None:
    operation = uuid4()
    ready = signal(operation)
    async with house.dispatching(house.endpoint()):
        await house.send(ready)
        await house.settled(ready)
        reverted = signal(operation, "reverted", supersedes=ready)
        await house.send(reverted)
        await house.settled(reverted)
        async with house.database.pool.acquire() as conn:
            await signals.redeliver(conn, ready.id)
        house.wakeups.poke("numbered")
        await house.settled(ready, state="superseded")
    assert house.receiver.types() == ["operation.ready", "operation.reverted"]


async def test_a_hint_never_blocks_and_a_late_one_is_dropped(house: House) -> None:
    operation = uuid4()
    hint, ready = signal(operation, "submitted"), signal(operation)

    async def refuse_hints(received: Received) -> web.Response:
        return web.Response(status=500 if received.id == hint.id else 204)

    house.receiver.scripts["/shop"] = refuse_hints
    named = house.endpoint(events=("operation.*", "operation.submitted"))
    async with house.dispatching(named, house.endpoint("books"), schedule=NEVER):
        await house.send(hint)
        await until(lambda: house.receiver.types() == ["operation.submitted"])

        async def failed() -> bool:
            return (await house.row(hint))["ended_at"] is not None

        await until(failed)
        await house.send(ready)  # the hint's next attempt is an hour away
        await house.settled(ready)
        await house.settled(hint, state="dropped")
        await house.settled(ready, webhook="books")
    assert house.receiver.types("/books") == ["operation.ready"]  # hints go where they are named


@pytest.mark.parametrize(
    ("doubt", "settled"),
    [
        ("""latch = '{"ours": 1}', head_at = now() + interval '1 hour'""", "latch = NULL"),
        ("head_at = now() - interval '1 minute'", "head_at = now() + interval '1 hour'"),
        ("head_at = now() + interval '1 hour', linked_epoch = 1", "linked_epoch = 2"),
    ],
    ids=["finality violated", "no follower has looked", "the follower gave its lease back"],
)
async def test_no_ready_is_sent_of_a_chain_in_doubt(house: House, doubt: str, settled: str) -> None:
    held, free = uuid4(), uuid4()
    pool = house.database.pool
    await pool.execute("INSERT INTO indexer.chain (chain_id, name) VALUES (8453, 'base')")
    await pool.execute(f"UPDATE indexer.chain SET {doubt}")
    if "linked_epoch" in doubt:
        await pool.execute("INSERT INTO indexer.lease (task, epoch) VALUES ('follow:8453', 1)")
    await pool.execute(
        "INSERT INTO indexer.operation (id, brand, reference, request, requested_at, requested_at_stated)"
        " VALUES ($1, 'bloom', 'r', '{}', now(), false)",
        held,
    )
    await pool.execute(
        "INSERT INTO indexer.leg (operation_id, leg, kind, match, chain_id, amount, requested_at)"
        " VALUES ($1, 0, 'loyfin.redemption', 'nonce', 8453, 1, now())",
        held,
    )
    stopped, sent = signal(held), signal(free)
    async with house.dispatching(house.endpoint()):
        await house.send(stopped, sent)
        await house.settled(sent)
        assert (await house.states())[stopped.id] == "pending"
        if "linked_epoch" in doubt:
            await pool.execute(
                "UPDATE indexer.lease SET epoch = 2, until = now() + '1 hour' WHERE task = 'follow:8453'"
            )
        await pool.execute(f"UPDATE indexer.chain SET {settled}")
        await house.settled(stopped)
    assert [request.id for request in house.receiver.requests] == [sent.id, stopped.id]


async def test_what_a_chain_in_doubt_holds_back_is_looked_at_once_and_not_lost(house: House) -> None:
    pool, rooms = house.database.pool, [deliveries.Room("bloom", "shop", 8, 10.0)]
    await house.configure(house.endpoint())
    await pool.execute("INSERT INTO indexer.chain (chain_id, name) VALUES (8453, 'base'), (10, 'other')")
    operations = [uuid4() for _ in range(20)]
    await pool.executemany(
        "INSERT INTO indexer.operation (id, brand, reference, request, requested_at, requested_at_stated)"
        " VALUES ($1, 'bloom', $2, '{}', now(), false)",
        [(operation, str(operation)) for operation in operations],
    )
    await pool.executemany(
        "INSERT INTO indexer.leg (operation_id, leg, kind, match, chain_id, amount, requested_at)"
        " VALUES ($1, 0, 'loyfin.redemption', 'nonce', 8453, 1, now())",
        [(operation,) for operation in operations],
    )
    ready = [signal(operation) for operation in operations]
    await house.send(*ready, *(signal(operation, "fulfilled") for operation in operations[10:]))

    async def looks() -> tuple[list[UUID], list[UUID], float | None]:
        """Turns until there is nothing to do: what was begun (and taken), what was closed, and when to look again."""
        begun, closed = [], []
        async with pool.acquire() as conn:
            await deliveries.recall(conn)
            while (turn := await deliveries.begin(conn, rooms)).progress:
                begun += [attempt.signal_id for attempt in turn.attempts]
                closed += [entry.signal_id for entry in turn.closed]
                await deliveries.record(conn, [deliveries.Outcome(a, "delivered", 204, None) for a in turn.attempts])
            return begun, closed, await deliveries.next_due(conn, rooms)

    async def mark() -> Any:
        return await pool.fetchval("SELECT array_agg(ctid ORDER BY ctid) FROM indexer.delivery")

    assert await looks() == ([], [], None)
    before = await mark()
    assert await looks() == ([], [], None)
    assert await mark() == before, "what waits for a chain was written to again"

    # what comes new of such an operation is not sent past it, and what takes it back is heard at once
    taken_back = signal(operations[0], "reverted", supersedes=ready[0])
    await house.send(taken_back, signal(operations[1], "fulfilled"))
    assert await looks() == ([], [ready[0].id, taken_back.id], None)
    async with pool.acquire() as conn:
        (shown,) = (await signals.list_signals(conn, operation=operations[2])) or ()
    assert [(one.state, one.awaits, one.next_at) for one in shown.deliveries] == [("pending", "live:8453", None)]

    # the latch holds more back, and its end alone lets no `ready` go
    await pool.execute("""UPDATE indexer.chain SET latch = '{"ours": 1}', head_at = now() + interval '1 hour'""")
    assert await looks() == ([], [], None)
    conflict = signal(operations[0], "conflict")
    await house.send(conflict)
    assert await looks() == ([], [], None)
    await pool.execute("UPDATE indexer.chain SET latch = NULL, head_at = NULL")
    assert await looks() == ([conflict.id], [], None)
    await pool.execute("UPDATE indexer.chain SET head_at = now() + interval '1 hour' WHERE chain_id = 8453")
    begun, closed, due = await looks()
    assert (len(begun), set(begun) >= {one.id for one in ready[1:]}, closed, due) == (30, True, [], None)
    assert (
        await pool.fetchval("SELECT count(*) FROM indexer.delivery WHERE state = 'pending' OR awaits IS NOT NULL") == 0
    )


# --------------------------------------------------------------------------- restarts


async def test_a_drain_records_what_is_under_way_and_begins_nothing_more(house: House) -> None:
    arrived, answer = asyncio.Event(), asyncio.Event()

    async def slow(_: Received) -> web.Response:
        arrived.set()
        await answer.wait()
        return web.Response()

    house.receiver.scripts["/shop"] = slow
    under_way, behind, later = signal(uuid4()), signal(uuid4()), signal(uuid4())
    async with house.dispatching(house.endpoint()) as dispatcher:
        await house.send(under_way)
        await arrived.wait()
        draining = asyncio.create_task(dispatcher.drain(20))
        await asyncio.sleep(0)
        await house.send(behind)
        assert not draining.done()
        answer.set()
        await draining
        # it is recorded before the drain is over: whoever holds the lease next sends it to nobody
        assert (await house.states()) == {under_way.id: "delivered", behind.id: "pending"}
        await house.send(later)
        assert len(house.receiver.requests) == 1
    async with house.dispatching(house.endpoint()):
        await house.settled(behind, later)
    assert Counter(request.id for request in house.receiver.requests) == {under_way.id: 1, behind.id: 1, later.id: 1}


async def test_a_drain_ends_in_its_time_whatever_the_receiver_does(house: House) -> None:
    async def hang(_: Received) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    house.receiver.scripts["/shop"] = hang
    with capture_logs() as logs:
        async with house.dispatching(house.endpoint(timeout=30.0)) as dispatcher:
            await house.send(signal(uuid4()))
            await until(lambda: len(house.receiver.requests) == 1)
            await dispatcher.drain(0.05)
    assert [entry["attempts"] for entry in logs if entry["event"] == "attempts_cut_off"] == [1]


async def test_an_attempt_whose_time_is_over_before_it_begins_sends_nothing(house: House) -> None:
    # a process that stood still between writing the attempt down and making it
    with ThreadPoolExecutor(1) as threads:
        sender = Sender(house.endpoint(), system_lookup(threads), time.time, connections=1)
        reply = await sender.post(uuid4(), "{}", deadline=asyncio.get_running_loop().time() - 0.001)
        await sender.close()
    assert reply.status is None and reply.error is not None and "no answer within" in reply.error
    assert house.receiver.requests == []


async def test_a_dispatcher_killed_in_mid_request_repeats_at_worst_with_the_same_id(house: House) -> None:
    arrived = asyncio.Event()

    async def hang(_: Received) -> web.Response:
        arrived.set()
        await asyncio.sleep(60)
        return web.Response()

    house.receiver.scripts["/shop"] = hang
    operation = uuid4()
    first, second = signal(operation), signal(operation, "fulfilled")
    endpoint = house.endpoint(timeout=1.0)
    async with house.dispatching(endpoint):
        await house.send(first, second)
        await arrived.wait()
    begun = (await house.row(first))["begun_at"]
    assert (await house.row(first))["ended_at"] is None  # nobody wrote down how it ended
    house.receiver.scripts.clear()
    async with house.dispatching(endpoint):
        await house.settled(first, second)
    assert [request.id for request in house.receiver.requests] == [first.id, first.id, second.id]
    again = await house.row(first)
    assert again["attempts"] == 2
    assert (again["begun_at"] - begun).total_seconds() > endpoint.timeout  # never beside the first attempt
    assert house.receiver.overlaps == 0


async def test_a_dispatcher_that_lost_its_lease_sends_nothing_more(house: House) -> None:
    await house.configure(house.endpoint())
    dispatcher = Dispatcher([house.endpoint()], metrics=house.metrics)
    leases = Leases(house.database)
    with pytest.raises(LeaseLost):
        async with leases.hold(TASK) as lease:
            await house.database.pool.execute("UPDATE indexer.lease SET epoch = epoch + 1, holder = gen_random_uuid()")
            await house.send(signal(uuid4()))
            await run_once(dispatcher, lease, house.wakeups)
    await dispatcher.close()
    assert house.receiver.requests == []
    assert set((await house.states()).values()) == {"pending"}
    assert await house.database.pool.fetchval("SELECT max(attempts) FROM indexer.delivery") == 0


async def run_once(dispatcher: Dispatcher, lease: Lease, wakeups: Wakeups) -> None:
    async with asyncio.timeout(60):
        await dispatcher.run(lease, wakeups)


async def test_new_settings_are_taken_while_it_runs(house: House) -> None:
    first, second = signal(uuid4()), signal(uuid4())
    async with house.dispatching(house.endpoint()) as dispatcher:
        await house.send(first)
        await house.settled(first)
        dispatcher.configure([house.endpoint(url=f"{house.receiver.url}/moved", secrets=(OLD_SECRET,))])
        await house.send(second)
        await house.settled(second)
    assert [request.path for request in house.receiver.requests] == ["/shop", "/moved"]
    moved = house.receiver.requests[1]
    Verifier(OLD_SECRET).verify(moved.body, moved.headers)


async def test_a_test_message_is_signed_and_leaves_no_trace(house: House) -> None:
    with ThreadPoolExecutor(1) as threads:
        reply = await send_test(house.endpoint(), system_lookup(threads), time.time)
    assert reply.status == 204
    (request,) = house.receiver.requests
    assert Verifier(SECRET).verify(request.body, request.headers)["type"] == "webhook.test"
    assert await house.states() == {}


async def test_proxies_of_the_environment_are_not_used(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Receiver().open() as proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
            monkeypatch.setenv(name.lower(), proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        new = signal(uuid4())
        async with house.dispatching(house.endpoint()):
            await house.send(new)
            await house.settled(new)
        assert [request.id for request in house.receiver.requests] == [new.id]
        assert proxy.requests == []


async def test_a_private_address_is_never_connected_to_unless_allowed(house: House) -> None:
    new = signal(uuid4())
    async with house.dispatching(
        house.endpoint("https", allow=(), url=house.receiver.url.replace("http", "https")),
        house.endpoint("elsewhere", allow=networks(["10.0.0.0/8"])),
        schedule=NEVER,
    ):
        await house.send(new)
        for name in ("https", "elsewhere"):

            async def told(name: str = name) -> bool:
                error = (await house.row(new, name))["error"]
                return error is not None and "refused to connect to 127.0.0.1" in error

            await until(told)
    assert house.receiver.requests == []
