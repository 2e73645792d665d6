"""SIGHUP: the file is the truth. What may change does so under way, the rest is refused, and a broken file changes nothing."""

from __future__ import annotations

import base64
import signal
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from standardwebhooks import Webhook as Verifier

from indexer.model.types import hex0x
from indexer.store.database import Database
from tests.acceptance.test_process import Endpoint, Systemd
from tests.acceptance.world import Daemon, Ledger, World, until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]

NEW_SECRET = "whsec_" + base64.b64encode(b"another secret, after a rotation").decode()


class Watched(Endpoint):
    """An endpoint that knows how often it was asked."""

    asked = 0

    async def _answer(self, request: web.Request) -> web.Response:
        self.asked += 1
        return await super()._answer(request)


class File:
    """The daemon's file, changed and read again."""

    def __init__(self, world: World, daemon: Daemon, systemd: Systemd) -> None:
        self.world, self.daemon, self.systemd = world, daemon, systemd
        self.path, self.text = world.config, world.config.read_text()

    async def reload(self, text: str) -> dict[str, Any]:
        """Writes the file, sends SIGHUP, and waits until systemd hears that it is over. The new /v1/status of configuration."""
        self.path.write_text(text)
        self.systemd.listen()
        ready = self.systemd.heard.count("READY=1")
        self.daemon.send(signal.SIGHUP)
        await self.systemd.hears("READY=1", times=ready + 1)
        found: dict[str, Any] = (await self.world.status(self.daemon))["process"]["configuration"]
        return found


def changed(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


async def test_a_reload_changes_what_may_change_and_refuses_the_rest(
    ledger: Ledger, database: Database, tmp_path: Path
) -> None:
    async with World.of(ledger, database, tmp_path) as world, Watched.open() as endpoint:
        endpoint.node = ledger.anvil
        world.config.write_text(changed(world.config.read_text(), ('confidence = "safe"', 'confidence = "finalized"')))
        with Systemd.listening() as systemd:
            daemon = await world.start(environ={"NOTIFY_SOCKET": systemd.address})
            await systemd.hears("READY=1")
            file = File(world, daemon, systemd)
            await world.settles("before")
            large = world.action(5_000)
            await world.register("large", large.action)

            # ---- a file that cannot be used changes nothing and says everything
            broken = await file.reload(
                changed(file.text, ('name = "shop"', 'nane = "shop"'), ("pool_size = 6", "pool_size = 0"))
            )
            assert {"brands[0].webhooks[0].nane", "brands[0].webhooks[0].name", "database.pool_size"} == set(
                broken["problems"]
            )
            assert broken["refused"] == [] and broken["readAt"] > broken["appliedAt"]
            (said,) = daemon.said("the configuration cannot be used: the one before stays in effect")
            assert len(said["problems"]) == 3
            await world.settles("in spite of it")

            # ---- an issuer that is waited for is not given away, nor anything else of that file applied
            other = f'\n[[brands]]\nname = "petal"\nissuers = ["{hex0x(ledger.brand.address)}"]\n'
            moved = await file.reload(
                changed(
                    file.text,
                    (f'["{hex0x(ledger.brand.address)}"]', "[]"),
                    ('confidence = "finalized"', 'confidence = "included"'),
                )
                + other
            )
            assert moved["problems"] == ["brands"]
            assert await database.pool.fetchval("SELECT count(*) FROM indexer.brand WHERE name = 'petal'") == 0

            # ---- the whole of it: policies, another endpoint, a new secret, a new brand, a webhook more; some of it refused
            await world.submit(large)

            async def confirming() -> bool:
                return (await world.states()).get("large") == "confirming"

            await until(confirming, lambda: f"seen, and not deep enough; {daemon.last_words()}")
            before = await _epochs(database)
            (tmp_path / "secret").write_text(NEW_SECRET)
            world.shop._verifier = Verifier(NEW_SECRET)
            applied = await file.reload(
                changed(
                    file.text,
                    ('confidence = "finalized"', 'confidence = "included"'),
                    (f'url = "{ledger.anvil.url}"', f'url = "{endpoint.url}"'),
                    ("lease_seconds = 2.0", "lease_seconds = 3.0"),
                    ('listen = "127.0.0.1:0"', 'listen = "127.0.0.1:1"'),
                )
                + f'\n[[brands]]\nname = "petal"\nissuers = ["{hex0x(ledger.customers[0].address)}"]\n'
                + f'[[brands.webhooks]]\nname = "books"\nurl = "{world.shop.url}"\nsecrets = ["{NEW_SECRET}"]\n'
                + 'allow = ["127.0.0.0/8"]\ntimeout_seconds = 1\n'
            )
            assert applied["problems"] == []
            assert {one["where"]: bool(one["reason"]) for one in applied["refused"]} == {
                "database.lease_seconds": True,
                "http.listen": True,
            }
            assert len(daemon.said("not applied")) == 2
            ready = await world.shop.hears("large", "ready")
            assert ready.body["data"]["evidence"][0]["confidence"] != "finalized"
            rows = await database.pool.fetch("SELECT brand, name FROM indexer.webhook WHERE active ORDER BY brand")
            assert [tuple(row) for row in rows] == [("bloom", "shop"), ("petal", "books")]

            # what did not change was not disturbed; what did was, once
            after = await _epochs(database)
            chain = {f"{task}:{ledger.anvil.chain_id}" for task in ("follow", "history", "verify")}
            assert {task for task in after if after[task] != before[task]} == {"settle", *chain}
            assert not daemon.said("task failed")
            asked = endpoint.asked
            await world.settles("after", 5_000)
            assert endpoint.asked > asked

            reloads = [word for word in systemd.heard if word.startswith("RELOADING=1\nMONOTONIC_USEC=")]
            assert len(reloads) == 3 and all(word.rpartition("=")[2].isdigit() for word in reloads)
            text = daemon.log.read_text()
            assert (
                "whsec_" not in text.replace("whsec_[redacted]", "") and NEW_SECRET.removeprefix("whsec_") not in text
            )
            assert await daemon.stop() == 0
        expected = {"before": "ready", "in spite of it": "ready", "large": "ready", "after": "ready"}
        assert await world.states() == expected and world.shop.forged == []


async def _epochs(database: Database) -> dict[str, int]:
    return {row["task"]: row["epoch"] for row in await database.pool.fetch("SELECT task, epoch FROM indexer.lease")}
