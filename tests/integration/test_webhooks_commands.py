"""`indexer webhooks` and `indexer signals`, as a person at night uses them: what waits where, why, and sending it again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from aiohttp import web
from standardwebhooks import Webhook as Verifier
from typer.testing import CliRunner, Result

from indexer.cli import app
from indexer.commands.wiring import USAGE, Failure
from indexer.model.signal import Signal
from indexer.store import signals, webhooks
from indexer.store.database import Database
from indexer.store.webhooks import WebhookRow
from tests.receiver import Received, Receiver

SECRET = "whsec_" + "c2lnbmluZyBzZWNyZXQgb2YgdGhlIHRlc3RzIQ=="


@dataclass
class Desk:
    """The command line, with a configuration on this test's database."""

    config: Path
    database: Database
    receiver: Receiver

    async def run(self, *words: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, app, [*words, "--config", str(self.config)])

    async def says(self, *words: str, code: int = 0) -> str:
        done = await self.run(*words)
        assert done.exit_code == code, (done.output, done.exception)
        return done.stdout

    async def answers(self, *words: str, code: int = 0) -> Any:
        return json.loads(await self.says(*words, "--json", code=code))

    async def refuses(self, *words: str, code: int = 1) -> str:
        done = await self.run(*words)
        assert isinstance(done.exception, Failure), (done.output, done.exception)
        assert done.exception.code == code
        return str(done.exception)

    async def commit(self, *types: str, operation: UUID | None = None) -> list[Signal]:
        new = []
        for kind in types:
            id, of = uuid4(), operation or uuid4()
            new.append(Signal(id, "bloom", "operation", of, kind, {"type": kind, "data": {"id": str(id)}}, 1))
        async with self.database.pool.acquire() as conn, conn.transaction():
            await signals.append(conn, new)
            await signals.number(conn)
        return new


@pytest.fixture
async def desk(database: Database, dsn: str, tmp_path: Path) -> AsyncIterator[Desk]:
    config = tmp_path / "indexer.toml"
    async with Receiver().open() as receiver:
        config.write_text(
            f"""
state_dir = "{tmp_path}"
[database]
url = "{dsn}"
[[brands]]
name = "bloom"
[[brands.webhooks]]
name = "shop"
url = "{receiver.url}/secret-in-the-path-0123456789"
secrets = ["{SECRET}"]
allow = ["127.0.0.0/8"]
[[brands.webhooks]]
name = "guarded"
url = "https://127.0.0.1.nip.example.invalid:{receiver.url.rpartition(":")[2]}/"
secrets = ["{SECRET}"]
timeout_seconds = 2
"""
        )
        async with database.pool.acquire() as conn:
            await conn.execute("INSERT INTO indexer.brand (name) VALUES ('bloom')")
            await webhooks.sync_webhooks(
                conn, [WebhookRow("bloom", "shop", ("operation.*",)), WebhookRow("bloom", "books", ("*",))]
            )
        yield Desk(config, database, receiver)


async def test_webhooks_are_listed_paused_and_enabled(desk: Desk) -> None:
    await desk.commit("operation.ready", "operation.ready")
    rows = {row["name"]: row for row in (await desk.answers("webhooks", "list"))["data"]}
    assert {name: (row["state"], row["waiting"]) for name, row in rows.items()} == {
        "books": ("active", 2),
        "shop": ("active", 2),
    }
    assert rows["shop"]["oldestWaiting"] is not None
    assert (await desk.answers("webhooks", "list", "--brand", "nobody"))["data"] == []
    assert "bloom/shop is paused" in await desk.says("webhooks", "pause", "bloom", "shop")
    assert "paused by hand" in await desk.says("webhooks", "list")
    assert "webhook bloom/shop is PAUSED: paused by hand; 2 wait" in await desk.says("status")
    assert "bloom/shop is enabled" in await desk.says("webhooks", "enable", "bloom", "shop")
    assert "paused" not in await desk.says("webhooks", "list")
    assert "webhooks list" in await desk.refuses("webhooks", "pause", "bloom", "nowhere")


async def test_a_test_goes_the_way_of_every_delivery_and_tells_what_came_back(desk: Desk) -> None:
    told = await desk.answers("webhooks", "test", "bloom", "shop")
    assert (told["taken"], told["status"], told["reason"]) == (True, 204, None)
    (request,) = desk.receiver.requests
    assert Verifier(SECRET).verify(request.body, request.headers)["type"] == "webhook.test"

    async def refuse(_: Received) -> web.Response:
        return web.Response(status=403, text="\x1b[31mnot you")

    desk.receiver.script = refuse
    said = await desk.says("webhooks", "test", "bloom", "shop", code=1)
    assert "did not take it: HTTP 403" in said and "\\x1b[31mnot you" in said
    assert "secret-in-the-path" not in said
    told = await desk.answers("webhooks", "test", "bloom", "guarded", code=1)
    assert told["status"] is None and "could not be resolved" in told["reason"]
    assert "bloom/shop, bloom/guarded" in await desk.refuses("webhooks", "test", "bloom", "nowhere", code=USAGE)
    assert len(desk.receiver.requests) == 2


async def test_what_waits_for_a_chain_says_so(desk: Desk) -> None:
    (one,) = await desk.commit("operation.ready")
    for word, said in {"latch": "the latch of chain 8453 is resolved", "live": "chain 8453 is followed again"}.items():
        await desk.database.pool.execute("UPDATE indexer.delivery SET awaits = $1", f"{word}:8453")
        for words in (("signals", "list", "--state", "pending"), ("signals", "show", str(one.id))):
            assert f"shop pending, 0 attempts: set aside until {said}\n" in await desk.says(*words), words


async def test_signals_are_listed_shown_and_sent_again(desk: Desk) -> None:
    operation = uuid4()
    first, second, third = await desk.commit(
        "operation.ready", "operation.fulfilled", "settlement.unmatched", operation=operation
    )
    pool = desk.database.pool
    everything = await desk.answers("signals", "list")
    assert [row["id"] for row in everything["data"]] == [str(s.id) for s in (third, second, first)]
    assert everything == {"data": everything["data"], "more": False}
    assert [d["webhook"] for d in everything["data"][2]["deliveries"]] == ["books", "shop"]
    page = await desk.answers("signals", "list", "--brand", "bloom", "--limit", "2")
    assert [row["sequence"] for row in page["data"]] == [3, 2] and page["more"]
    assert (await desk.answers("signals", "list", "--brand", "other"))["data"] == []

    await pool.execute(
        "UPDATE indexer.delivery SET state = 'dead', attempts = 13, ended_at = now(), error = 'HTTP 500'"
        " WHERE webhook = 'shop' AND sequence = 1"
    )
    await pool.execute(
        "INSERT INTO indexer.delivery_attempt (brand, webhook, signal_id, number, begun_at, seconds, status, error, answer)"
        " VALUES ('bloom', 'shop', $1, 13, now(), 0.25, 500, 'HTTP 500', 'we are down')",
        first.id,
    )
    dead = await desk.answers("signals", "list", "--state", "dead")
    assert [row["id"] for row in dead["data"]] == [str(first.id)]
    assert (await desk.answers("signals", "list", "--state", "dead", "--webhook", "books"))["data"] == []
    waiting = await desk.answers("signals", "list", "--state", "pending", "--webhook", "shop")
    assert [row["sequence"] for row in waiting["data"]] == [2]
    assert [r["sequence"] for r in (await desk.answers("signals", "list", "--state", "pending"))["data"]] == [1, 2, 3]
    assert "shop dead, 13 attempts: HTTP 500" in " ".join((await desk.says("signals", "show", str(first.id))).split())
    assert "0.250 s  HTTP 500; we are down" in await desk.says("signals", "show", str(first.id))
    assert "1 dead letters" in await desk.says("status")
    assert "no signal" in await desk.refuses("signals", "show", str(uuid4()))

    # one by its id, to all that want its type or to the one that is named; or all that are dead at an endpoint
    sent = await desk.answers("signals", "redeliver", str(first.id))
    assert sorted(sent["webhooks"]) == ["books", "shop"]
    assert (await desk.answers("signals", "redeliver", str(third.id)))["webhooks"] == ["books"]
    assert (await desk.answers("signals", "redeliver", str(third.id), "--webhook", "shop"))["webhooks"] == ["shop"]
    await pool.execute("UPDATE indexer.delivery SET state = 'dead', ended_at = now() WHERE webhook = 'shop'")
    again = await desk.answers("signals", "redeliver", "--dead", "--brand", "bloom", "--webhook", "shop")
    assert again["redelivered"] == 3
    rows = await pool.fetch("SELECT state, attempts FROM indexer.delivery WHERE webhook = 'shop'")
    assert {tuple(row) for row in rows} == {("pending", 0)}

    assert "goes nowhere" in await desk.refuses("signals", "redeliver", str(uuid4()))
    for words in ([], ["--dead"], ["--dead", "--webhook", "shop"], [str(first.id), "--dead"]):
        assert "--dead --brand" in await desk.refuses("signals", "redeliver", *words, code=USAGE)
    assert "known are pending" in await desk.refuses("signals", "list", "--state", "lost", code=USAGE)
    assert "--webhook narrows" in await desk.refuses("signals", "list", "--webhook", "shop", code=USAGE)


async def test_signals_of_an_operation_are_found_by_its_reference(desk: Desk) -> None:
    operation = uuid4()
    await desk.database.pool.execute(
        "INSERT INTO indexer.operation (id, brand, reference, request, requested_at, requested_at_stated)"
        " VALUES ($1, 'bloom', 'redemption-8841', '{\"legs\": []}', now(), false)",
        operation,
    )
    (mine,) = await desk.commit("operation.ready", operation=operation)
    await desk.commit("operation.ready")
    for given in ("redemption-8841", str(operation)):
        found = await desk.answers("signals", "list", "--operation", given)
        assert [row["id"] for row in found["data"]] == [str(mine.id)]
    narrowed = await desk.answers("signals", "list", "--operation", str(operation), "--state", "dead")
    assert narrowed["data"] == []
    assert "no operation" in await desk.refuses("signals", "list", "--operation", "nothing")
