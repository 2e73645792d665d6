"""The pull stream over real sockets: gapless, in order, exactly the webhooks' bodies; and a crowd that waits for free."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from indexer.api import app as api_app
from indexer.api import signals as api_signals
from indexer.api import tail as api_tail
from indexer.api.tail import TAILS
from indexer.store import signals
from indexer.store.database import DISCONNECTED, Database
from indexer.store.wakeups import Wakeups
from tests.api_world import Api, populate, running, token_for, told


class Outbox:
    """Commits signals as the reconciler does and numbers them as the sequencer does, on a connection of its own."""

    def __init__(self, conn: asyncpg.Connection) -> None:
        self.conn = conn
        self.count = 0

    async def commit(self, brand: str, kind: str = "operation.ready", **more: Any) -> UUID:
        self.count += 1
        new = told(brand, kind, self.count, **more)
        async with self.conn.transaction():
            await signals.append(self.conn, [new])
        return new.id

    async def number(self) -> None:
        async with self.conn.transaction():
            await signals.number(self.conn)

    async def announce(self, brand: str, times: int = 1, **more: Any) -> list[UUID]:
        made = [await self.commit(brand, **more) for _ in range(times)]
        await self.number()
        return made


@pytest.fixture
async def api(database: Database) -> AsyncIterator[Api]:
    token = await populate(database)
    async with Wakeups.listening(database) as wakeups, running(database, wakeups) as served:
        served.token = token
        yield served


@pytest.fixture
async def outbox(database: Database) -> AsyncIterator[Outbox]:
    conn = await database.session("outbox")
    try:
        yield Outbox(conn)
    finally:
        await conn.close()


async def pull(api: Api, query: str, **more: Any) -> tuple[list[dict[str, Any]], str]:
    status, page, _ = await api.call("GET", f"/v1/signals?{query}", **more)
    assert status == 200, page
    assert set(page) == {"data", "nextCursor"}
    return page["data"], page["nextCursor"]


def numbers(page: list[dict[str, Any]]) -> list[int]:
    return [entry["data"]["sequence"] for entry in page]


async def until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)


# ------------------------------------------------------------------------------------------------ what is in it


async def test_the_stream_is_gapless_in_order_and_word_for_word_what_webhooks_carry(
    api: Api, database: Database, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = (await outbox.announce("bloom"))[0]
    await outbox.announce("rose", 3)
    await outbox.commit("bloom", kind="operation.reverted", supersedes=first)
    assert numbers((await pull(api, "brand=bloom"))[0]) == [1], "what has no number is not there"
    await outbox.announce("bloom", 5)

    found, cursor = [], ""
    while True:
        page, after = await pull(api, f"brand=bloom&limit=2{cursor}")
        if not page:
            break
        found, cursor = found + page, f"&after={after}"
        assert len(page) <= 2
    assert numbers(found) == [1, 2, 3, 4, 5, 6, 7]
    assert f"&after={(await pull(api, f'brand=bloom{cursor}'))[1]}" == cursor, "nothing new, the same cursor"
    stored = await database.pool.fetch(
        "SELECT payload, superseded_by FROM indexer.outbox WHERE brand = 'bloom' ORDER BY sequence"
    )
    assert found[1:] == [row["payload"] for row in stored[1:]]
    assert found[0]["data"].pop("supersededBy") == found[1]["data"]["id"] == str(stored[0]["superseded_by"])
    assert found[0] == stored[0]["payload"] and found[1]["data"]["supersedes"] == str(first)

    # a token of one brand needs no `brand`, and has one stream
    rose = await token_for(database, "rose", "signals:read")
    assert (
        numbers((await pull(api, "", token=rose))[0])
        == numbers((await pull(api, "brand=rose", token=rose))[0])
        == [1, 2, 3]
    )
    assert (await api.call("GET", "/v1/signals?brand=bloom", token=rose))[0] == 403
    assert (await api.call("GET", f"/v1/signals?{cursor[1:]}", token=rose))[0] == 400
    assert (await api.call("GET", "/v1/signals"))[0] == 400
    assert (await api.call("GET", "/v1/signals?brand=tulip"))[0] == 404
    for wrong in (
        "wait=61",
        "wait=-1",
        "wait=x",
        "limit=0",
        "limit=501",
        "after=",
        "after=abc",
        "until=3",
        "after=" + "A" * 40,
    ):
        assert (await api.call("GET", f"/v1/signals?brand=bloom&{wrong}"))[0] == 400, wrong

    # from now on; and an answer ends early where signals are large, but holds one at least
    nothing, now = await pull(api, "brand=bloom&after=now")
    await outbox.announce("bloom", 3, note="x" * 3000)
    monkeypatch.setattr(api_signals, "PAGE_BYTES", 4000)
    assert nothing == [] and numbers((await pull(api, f"brand=bloom&after={now}"))[0]) == [8]
    monkeypatch.setattr(api_signals, "PAGE_BYTES", 10)
    assert numbers((await pull(api, f"brand=bloom&after={now}"))[0]) == [8]


async def test_a_cursor_of_another_history_or_below_the_floor_says_so(
    api: Api, database: Database, outbox: Outbox
) -> None:
    await outbox.announce("bloom", 4)
    page, start = await pull(api, "brand=bloom&limit=1")
    _, end = await pull(api, f"brand=bloom&after={start}")
    empty, _ = await pull(api, f"brand=bloom&after={end}&wait=0")
    assert numbers(page) == [1] and empty == []

    # a retention took the first three
    await database.pool.execute("DELETE FROM indexer.outbox WHERE sequence <= 3")
    await database.pool.execute("UPDATE indexer.brand SET forgotten_sequence = 3 WHERE name = 'bloom'")
    status, problem, _ = await api.call("GET", f"/v1/signals?brand=bloom&after={start}")
    assert (status, problem["type"], problem["oldest"]) == (410, "urn:loyalty:problem:gone", 4)
    assert numbers((await pull(api, f"brand=bloom&after={problem['cursor']}"))[0]) == [4]
    assert numbers((await pull(api, "brand=bloom"))[0]) == [4]
    assert (await pull(api, f"brand=bloom&after={end}"))[0] == []

    # a backup that knew fewer was put back, and nobody said so: the cursor is beyond the end
    await database.pool.execute(
        "UPDATE indexer.brand SET last_sequence = 3, forgotten_sequence = 0 WHERE name = 'bloom'"
    )
    await database.pool.execute("DELETE FROM indexer.outbox WHERE brand = 'bloom'")
    async with running(database) as restarted:
        restarted.token = api.token
        status, problem, _ = await restarted.call("GET", f"/v1/signals?brand=bloom&after={end}&wait=5")
        assert (status, problem["type"]) == (409, "urn:loyalty:problem:other-history")

    # and said: another stream. Somebody who waits hears it too
    await database.pool.execute("UPDATE indexer.brand SET last_sequence = 4 WHERE name = 'bloom'")
    waiting = asyncio.create_task(api.call("GET", f"/v1/signals?brand=bloom&after={end}&wait=60"))
    await until(lambda: api.app[TAILS].waiting == 1)
    await database.pool.execute("UPDATE indexer.instance SET stream = gen_random_uuid()")
    await database.pool.execute("NOTIFY indexer_numbered")
    status, problem, _ = await waiting
    assert (status, problem["type"]) == (409, "urn:loyalty:problem:other-history")
    assert (await pull(api, f"brand=bloom&after={problem['cursor']}"))[0] == []
    assert problem["stream"] == str(await database.pool.fetchval("SELECT stream FROM indexer.instance"))


# ------------------------------------------------------------------------------------------------ waiting


async def test_a_crowd_waits_without_connections_and_hears_at_once(
    api: Api, database: Database, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_app, "IN_FLIGHT", 3)
    monkeypatch.setattr(api_app, "WAITERS", 121)
    monkeypatch.setattr(api_signals, "READERS", 2)
    monkeypatch.setattr(api_tail, "LISTENING_SECONDS", 3600)  # whoever listens has nothing but NOTIFY to wake him
    await outbox.announce("bloom", 2)
    async with AsyncExitStack() as stack:
        crowd = await stack.enter_async_context(running(database, Wakeups()))  # hears nothing: it must look by itself
        listening = await stack.enter_async_context(Wakeups.listening(database))
        heard = await stack.enter_async_context(running(database, listening))
        crowd.token = heard.token = api.token
        _, end = await pull(heard, "brand=bloom")
        _, other = await pull(heard, "brand=rose&after=now")
        waiting = [asyncio.create_task(pull(heard, f"brand=bloom&after={end}&wait=60")) for _ in range(100)]
        bystanders = [asyncio.create_task(pull(heard, f"brand=rose&after={other}&wait=60")) for _ in range(20)]
        deaf = asyncio.create_task(pull(crowd, f"brand=bloom&after={end}&wait=60"))
        await until(lambda: heard.app[TAILS].waiting == 120 and crowd.app[TAILS].waiting == 1)
        pool = database.pool
        assert pool.get_idle_size() == pool.get_size(), "nobody who waits holds a connection"
        assert (await heard.call("GET", "/v1/status"))[0] == 200, "waiting clients do not count as requests at work"
        one_more = asyncio.create_task(pull(heard, f"brand=rose&after={other}&wait=60"))
        await until(lambda: heard.app[TAILS].waiting == 121)
        status, problem, headers = await heard.call("GET", "/v1/signals?brand=rose")
        assert (status, headers["Retry-After"]) == (503, "5"), problem

        await outbox.announce("bloom")
        pages = await asyncio.gather(*waiting)
        assert all(numbers(page) == [3] for page, _ in pages)
        assert numbers((await deaf)[0]) == [3]
        assert heard.app[TAILS].waiting == 21 and not any(task.done() for task in bystanders)
        # whoever comes back from here is answered from memory, the store is not asked again
        async with pool.acquire() as held, held.transaction():
            await held.execute("LOCK TABLE indexer.outbox IN ACCESS EXCLUSIVE MODE")
            again = await asyncio.gather(*(pull(heard, f"brand=bloom&after={end}") for _ in range(50)))
            assert all(numbers(page) == [3] for page, _ in again)

        # time runs out: nothing, and the same cursor
        page, after = await pull(heard, f"brand=bloom&after={pages[0][1]}&wait=1")
        assert (page, after) == ([], pages[0][1])

        # the process stops: everybody is answered, with the cursor to go on with elsewhere
        await asyncio.gather(heard.stop(), crowd.stop())
        rest = await asyncio.gather(*bystanders, one_more)
        assert all(page == ([], other) for page in rest)


async def test_who_leaves_or_does_not_read_costs_nothing_any_more(
    api: Api, database: Database, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_app, "WAITERS", 20)
    monkeypatch.setattr(api_app, "SEND_SECONDS", 0.5)
    monkeypatch.setattr(api_signals, "PAGE_BYTES", 64 * 1024 * 1024)
    async with running(database) as small:
        small.token = api.token
        host, port = small.base.removeprefix("http://").split(":")
        _, end = await pull(small, "brand=bloom&after=now")

        async def ask(path: str, receive: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            sock = socket.socket()
            if receive is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
            reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {small.token}\r\n\r\n".encode())
            await writer.drain()
            return reader, writer

        left = [await ask(f"/v1/signals?brand=bloom&after={end}&wait=60") for _ in range(20)]
        await until(lambda: small.app[TAILS].waiting == 20)
        assert (await small.call("GET", "/v1/signals?brand=bloom"))[0] == 503
        for _, writer in left:
            writer.transport.abort()
        await until(lambda: small.app[TAILS].waiting == 0)
        assert (await small.call("GET", "/v1/signals?brand=bloom"))[0] == 200

        # an answer that nobody takes: the connection is cut, and no connection to the database was kept for it
        await database.pool.execute(
            """
            INSERT INTO indexer.outbox (id, brand, aggregatetype, aggregateid, type, payload, sequence)
            SELECT gen_random_uuid(), 'bloom', 'operation', gen_random_uuid(), 'operation.ready',
                   jsonb_build_object('data', jsonb_build_object('sequence', n, 'much', repeat('x', 60000))), n
            FROM generate_series(1, 400) AS n
            """
        )
        await database.pool.execute("UPDATE indexer.brand SET last_sequence = 400 WHERE name = 'bloom'")
        deaf, writer = await ask("/v1/signals?brand=bloom&limit=500", receive=4096)
        deaf._transport.pause_reading()  # type: ignore[attr-defined]
        await until(lambda: database.pool.get_idle_size() == database.pool.get_size())
        cut = small.metrics.http_requests.labels("/v1/signals", "GET", "200")
        await until(lambda: cut._value.get() >= 3)
        deaf._transport.resume_reading()  # type: ignore[attr-defined]
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await deaf.readexactly(400 * 60000)
        writer.transport.abort()


async def test_clients_that_come_and_go_miss_nothing_while_connections_break(
    api: Api, database: Database, outbox: Outbox
) -> None:
    """Writers, a reader whose connections are ended under it, and clients with every kind of patience."""
    rng = random.Random(11)
    total = {"bloom": 50, "rose": 30}
    killer = await database.session("killer")

    async def write() -> None:
        left = [brand for brand, count in total.items() for _ in range(count)]
        rng.shuffle(left)
        superseded: dict[str, UUID] = {}
        while left:
            for _ in range(rng.randint(1, 5)):
                if left:
                    brand = left.pop()
                    before = superseded.pop(brand, None) if rng.random() < 0.5 else None
                    kind = "operation.reverted" if before else "operation.ready"
                    made = await outbox.commit(brand, kind=kind, supersedes=before)
                    if not before:
                        superseded[brand] = made
            await outbox.number()
            await asyncio.sleep(rng.random() * 0.03)

    async def breakage() -> None:
        while not writer.done():
            with suppress(asyncpg.PostgresError, *DISCONNECTED):
                await killer.execute(
                    """
                    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                    WHERE datname = current_database() AND application_name LIKE 'indexer%' AND usename = current_user
                    """
                )
            await asyncio.sleep(0.25)

    async def read(brand: str, seed: int) -> list[dict[str, Any]]:
        mine, found, after = random.Random(seed), [], ""
        while len(found) < total[brand]:
            query = f"brand={brand}&limit={mine.choice([2, 5, 50])}&wait={mine.choice([0, 1, 5])}{after}"
            try:
                async with asyncio.timeout(mine.choice([0.02, 30, 30])):
                    status, page, _ = await api.call("GET", f"/v1/signals?{query}")
            except TimeoutError:
                continue
            if status == 503:  # a connection was ended under it
                continue
            assert status == 200, page
            found += page["data"]
            after = f"&after={page['nextCursor']}"
            if mine.random() < 0.3:
                await asyncio.sleep(mine.random() * 0.05)
        return found

    async with asyncio.timeout(60):
        readers = [asyncio.create_task(read(brand, seed)) for brand in total for seed in range(5)]
        writer = asyncio.create_task(write())
        await breakage()
        await writer
        await killer.close()
        for task in readers:
            found = await task
            brand = found[0]["data"]["brand"]
            assert numbers(found) == list(range(1, total[brand] + 1))
            page, _ = await pull(api, f"brand={brand}&limit=500")
            for got, stands in zip(found, page, strict=True):
                late = {
                    key: value for key, value in stands["data"].items() if key != "supersededBy" or key in got["data"]
                }
                assert got["data"] == late
