"""The receiver of docs/webhooks.md, as printed there: it takes what we send, through a rotation of secrets with requests under
way, and refuses over HTTP what was tampered with, is too old, or was signed by somebody else.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import pytest
from aiohttp import web
from standardwebhooks import Webhook as Signer

from indexer.model.signal import READY, Signal
from indexer.signals.attempts import Endpoint
from indexer.signals.targets import networks
from indexer.signals.webhooks import TASK, Dispatcher
from indexer.store import signals, webhooks
from indexer.store.database import Database
from indexer.store.leases import Leases
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics
from tests.loops import at_work

DOCUMENT = Path(__file__).parents[2] / "docs" / "webhooks.md"
OLD, NEW, FOREIGN = ("whsec_" + letter * 43 + "=" for letter in "QRS")


@dataclass
class Shop:
    """The documented application on a port, what it took, and a hold on its hand."""

    url: str
    taken: list[tuple[str, Any]]
    arrived: asyncio.Event
    go_on: asyncio.Event


@asynccontextmanager
async def documented(secret: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shop]:
    shop = Shop("", [], asyncio.Event(), asyncio.Event())
    shop.go_on.set()

    async def take(id: str, signal: Any) -> None:
        shop.arrived.set()
        await shop.go_on.wait()
        shop.taken.append((id, signal))

    module = ModuleType("shop")
    module.take = take  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shop", module)
    monkeypatch.setenv("WEBHOOK_SECRET", secret)
    (printed,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "receiver"}
    exec(compile(printed, str(DOCUMENT), "exec"), names)
    runner = web.AppRunner(names["app"], access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        shop.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hooks/loyalty"
        yield shop
    finally:
        await runner.cleanup()


def ready() -> Signal:
    identity, operation = uuid4(), uuid4()
    data = {"id": str(identity), "operation": {"id": str(operation), "reference": "redemption-8841"}}
    payload = {"type": READY, "timestamp": "2026-11-21T10:00:00Z", "data": data}
    return Signal(identity, "bloom", "operation", operation, READY, payload, 1)


async def test_the_documented_receiver_takes_what_is_ours_through_a_rotation_and_nothing_else(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    wakeups = Wakeups()

    async def send(new: Signal) -> None:
        async with database.pool.acquire() as conn, conn.transaction():
            await signals.append(conn, [new])
            await signals.number(conn)
        wakeups.poke("numbered")

    async def delivered(new: Signal) -> None:
        async with asyncio.timeout(60):
            while (
                await database.pool.fetchval("SELECT state FROM indexer.delivery WHERE signal_id = $1", new.id)
                != "delivered"
            ):
                await asyncio.sleep(0.01)

    await database.pool.execute("INSERT INTO indexer.brand (name) VALUES ('bloom')")
    async with documented(OLD, monkeypatch) as shop:

        def endpoint(*secrets: str) -> Endpoint:
            return Endpoint("bloom", "shop", shop.url, secrets, allow=networks(["127.0.0.0/8"]))

        async with database.pool.acquire() as conn:
            await webhooks.sync_webhooks(conn, [webhooks.WebhookRow("bloom", "shop", ("operation.*",))])
        dispatcher = Dispatcher([endpoint(OLD)], metrics=Metrics(), schedule=(0.02,) * 12)
        async with at_work(Leases(database), TASK, lambda lease: dispatcher.run(lease, wakeups)):
            # a request is under way when both secrets are configured, and ends well; the next carries both signatures
            before, between, after = ready(), ready(), ready()
            shop.go_on.clear()
            await send(before)
            await shop.arrived.wait()
            dispatcher.configure([endpoint(NEW, OLD)])
            await send(between)
            shop.go_on.set()
            await delivered(before)
            await delivered(between)
            # the receiver has not changed over when the old one is dropped: it refuses, and is right to
            dispatcher.configure([endpoint(NEW)])
            await send(after)
            async with asyncio.timeout(60):
                while not await database.pool.fetchval("SELECT count(*) FROM indexer.delivery WHERE status = 400"):
                    await asyncio.sleep(0.01)
            assert [UUID(id) for id, _ in shop.taken] == [before.id, between.id]
            dispatcher.configure([endpoint(NEW, OLD)])
            await delivered(after)  # nothing was lost by it
        await dispatcher.close()
        assert [UUID(id) for id, _ in shop.taken] == [before.id, between.id, after.id]
        assert [signal["data"]["sequence"] for _, signal in shop.taken] == [1, 2, 3]

        # what somebody else sends, who has seen all of it
        body = json.dumps(shop.taken[0][1]).encode()

        async def answer(
            body: bytes, *, secret: str = OLD, age: float = 0, signed: bytes | None = None, **more: str
        ) -> int:
            at = datetime.fromtimestamp(int(time.time() - age), UTC)
            id = str(before.id)
            headers = {"webhook-id": id, "webhook-timestamp": str(int(at.timestamp()))}
            headers["webhook-signature"] = Signer(secret).sign(id, at, (signed or body).decode())
            async with (
                aiohttp.ClientSession() as http,
                http.post(shop.url, data=body, headers=headers | more) as response,
            ):
                return response.status

        count = len(shop.taken)
        assert await answer(body.replace(b"8841", b"8842"), signed=body) == 400
        assert await answer(body, age=400) == 400
        assert await answer(body, age=-400) == 400
        assert await answer(body, secret=FOREIGN) == 400
        assert await answer(body, **{"webhook-id": str(uuid4())}) == 400
        assert await answer(body, **{"webhook-timestamp": str(int(time.time()) + 1)}) == 400
        assert await answer(body, **{"webhook-signature": "v1,"}) == 400
        assert len(shop.taken) == count
        assert await answer(body) == 204  # a repetition under the same id: ours to send, the receiver's to know
