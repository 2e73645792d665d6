"""The daemon as a process: what it tells systemd, how it stops, which exit codes it ends with, and what a broken loop does to the others."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from indexer.sandbox.anvil import Anvil
from indexer.store.database import Database
from tests.acceptance.world import Daemon, Ledger, World, until
from tests.conftest import Postgres
from tests.receiver import Received, Receiver, fine

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]


# --------------------------------------------------------------------------- stopping


async def test_sigterm_drains_and_hands_over_at_once(ledger: Ledger, database: Database, tmp_path: Path) -> None:
    lease = 10.0
    async with World.of(ledger, database, tmp_path, lease_seconds=lease) as world:
        first = await world.start()
        await world.settles("one")
        second = await world.start()
        await second.says("listening")
        holder = (await world.status(first))["process"]["holder"]

        world.shop.pause = 0.8  # an attempt is under way when the signal comes
        await world.settles("two")
        before = time.monotonic()
        assert await first.stop(seconds=lease) == 0
        assert first.said("stopped") and not first.said("task failed")
        assert holder not in {str(found) for found in (await world.holders()).values()}  # given back, not left to lapse
        successor = (await world.status(second))["process"]["holder"]

        async def taken_over() -> bool:
            return {str(found) for found in (await world.holders()).values()} == {successor}

        await until(taken_over, lambda: f"the second leads; {second.last_words()}", pause=0.02)
        assert time.monotonic() - before < lease
        world.shop.pause = 0.0
        await world.settles("three")
        await world.judge({"one": "ready", "two": "ready", "three": "ready"})


async def test_sigterm_lets_an_attempt_end_and_a_kill_repeats_it_under_its_id(
    ledger: Ledger, database: Database, tmp_path: Path
) -> None:
    async def slow(received: Received) -> web.Response:
        await asyncio.sleep(1.5)
        return await fine(received)

    async with Receiver(slow).open() as slow_one:
        more = f"""
[[brands.webhooks]]
name = "slow"
url = "{slow_one.url}/"
secret_files = ["{tmp_path}/secret"]
events = ["operation.ready"]
allow = ["127.0.0.0/8"]
timeout_seconds = 2
"""
        async with World.of(ledger, database, tmp_path, lease_seconds=2.5, more=more) as world:
            daemon = await world.start()
            await world.settles("one")

            async def asked(times: int) -> None:
                async def so_often() -> bool:
                    return len(slow_one.requests) == times

                await until(so_often, f"the slow receiver was asked {times} times", pause=0.01)

            async def delivered(count: int) -> None:
                async def so_many() -> bool:
                    rows = await database.pool.fetch("SELECT state FROM indexer.delivery WHERE webhook = 'slow'")
                    return [row["state"] for row in rows] == ["delivered"] * count

                await until(so_many, f"{count} deliveries at the slow receiver")

            await asked(1)
            query = "SELECT state, attempts, status FROM indexer.delivery WHERE webhook = 'slow'"
            assert tuple(await database.pool.fetchrow(query)) == ("pending", 1, None)
            assert await daemon.stop() == 0
            assert tuple(await database.pool.fetchrow(query)) == ("delivered", 1, 204)
            assert not daemon.said("attempts_cut_off")

            daemon = await world.start()
            await world.settles("two")  # what is due is sent, and what arrived is not sent again
            await asked(2)
            await daemon.kill()
            await world.start()
            await delivered(2)
            first, second, again = (request.id for request in slow_one.requests)
            assert first != second == again
            assert slow_one.overlaps == 0


async def test_sigterm_while_it_starts_ends_it(world: World) -> None:
    daemon = await world.start()
    daemon.send(signal.SIGTERM)
    assert await daemon.ended() in (0, -signal.SIGTERM)
    later = await world.start()
    await later.says("listening")
    assert await later.stop() == 0


async def test_lost_sessions_are_opened_again(world: World) -> None:
    daemon = await world.start()
    await world.settles("before")
    ended = await world.database.pool.fetchval(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()"
        " AND application_name LIKE 'indexer:%'"
    )
    assert ended > 0
    await world.settles("after")
    await world.judge({"before": "ready", "after": "ready"})
    assert daemon.process.returncode is None
    assert await daemon.stop() == 0


# --------------------------------------------------------------------------- systemd


class Systemd:
    """The other end of sd_notify(3)."""

    def __init__(self, ear: socket.socket, address: str) -> None:
        self.address, self.heard = address, list[str]()
        self._ear = ear

    @classmethod
    @contextmanager
    def listening(cls) -> Iterator[Systemd]:
        # pytest's own folders may be longer than a socket's name can be
        with (
            tempfile.TemporaryDirectory(prefix="notify-") as folder,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear,
        ):
            address = f"{folder}/socket"
            ear.bind(address)
            ear.setblocking(False)
            yield cls(ear, address)

    def listen(self) -> list[str]:
        """What is new."""
        new: list[str] = []
        while True:
            try:
                new.append(self._ear.recv(4096).decode())
            except BlockingIOError:
                self.heard += new
                return new

    async def hears(self, message: str, times: int = 1) -> None:
        async def told() -> bool:
            self.listen()
            return self.heard.count(message) >= times

        await until(told, lambda: f"{message}; heard {self.heard}")


async def test_systemd_hears_ready_alive_and_stopping(world: World) -> None:
    with Systemd.listening() as systemd:
        daemon = await world.start(environ={"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "600000"})
        await systemd.hears("READY=1")
        assert daemon.base is not None  # whoever is told so may connect
        async with aiohttp.ClientSession(daemon.base) as http, http.get("/readyz") as answer:
            assert answer.status == 200, await answer.text()
        await systemd.hears("WATCHDOG=1", times=3)

        daemon.send(signal.SIGSTOP)  # what hangs is not alive
        await daemon.stopped()
        systemd.listen()
        await asyncio.sleep(1.2)
        assert systemd.listen() == []
        daemon.send(signal.SIGCONT)
        await systemd.hears("WATCHDOG=1", times=systemd.heard.count("WATCHDOG=1") + 1)

        assert "STOPPING=1" not in systemd.heard
        daemon.send(signal.SIGTERM)
        await systemd.hears("STOPPING=1")
        assert await daemon.ended() == 0
        assert systemd.heard[0] == "READY=1" and systemd.heard.count("READY=1") == 1


# --------------------------------------------------------------------------- exit codes


def written(folder: Path, url: str, more: str = "") -> Path:
    path = folder / "indexer.toml"
    path.write_text(f'state_dir = "{folder}"\n[database]\nurl = "{url}"\n[http]\nlisten = "127.0.0.1:0"\n{more}')
    return path


async def test_a_wrong_configuration_ends_with_2_and_names_every_problem(tmp_path: Path, dsn: str) -> None:
    config = written(tmp_path, dsn, 'lisen = "x"\n[[chains]]\nname = "one"\nchain_id = "many"\nrpc = []\n')
    async with Daemon.running(config) as daemon:
        assert await daemon.ended() == 2
        for problem in ("lisen", "chains[0].chain_id", "chains[0].rpc"):
            assert problem in daemon.last_words()
        assert "Traceback" not in daemon.last_words()


async def test_a_missing_configuration_ends_with_2(tmp_path: Path) -> None:
    async with Daemon.running(tmp_path / "nowhere.toml") as daemon:
        assert await daemon.ended() == 2
        assert "nowhere.toml" in daemon.last_words() and "Traceback" not in daemon.last_words()


async def test_an_older_schema_ends_with_2_and_names_migrate(tmp_path: Path, postgres: Postgres) -> None:
    async with postgres.fresh_database(migrated=False) as name:
        async with Daemon.running(written(tmp_path, postgres.url(name))) as daemon:
            assert await daemon.ended() == 2
            assert "indexer migrate" in daemon.last_words() and "Traceback" not in daemon.last_words()


async def test_a_refused_login_ends_with_2(tmp_path: Path, dsn: str) -> None:
    wrong = re.sub(r"//([^:/@]+):[^@]*@", r"//\1:not-the-password@", dsn)
    assert wrong != dsn
    async with Daemon.running(written(tmp_path, wrong)) as daemon:
        assert await daemon.ended() == 2
        assert "not-the-password" not in daemon.last_words() and "Traceback" not in daemon.last_words()


async def test_an_unreachable_database_ends_with_75(tmp_path: Path) -> None:
    with socket.socket() as bound:  # and not listening: nobody else gets the port meanwhile
        bound.bind(("127.0.0.1", 0))
        url = f"postgresql://indexer:secret-word@127.0.0.1:{bound.getsockname()[1]}/indexer"
        async with Daemon.running(written(tmp_path, url)) as daemon:
            assert await daemon.ended() == 75
            assert "secret-word" not in daemon.last_words() and "Traceback" not in daemon.last_words()


# --------------------------------------------------------------------------- a loop that fails


class Endpoint:
    """An RPC endpoint that is down (HTTP 503) until `node` is given; then it passes everything on to it."""

    def __init__(self) -> None:
        self.node: Anvil | None = None
        self.url = ""

    @classmethod
    @asynccontextmanager
    async def open(cls) -> AsyncIterator[Endpoint]:
        endpoint = cls()
        app = web.Application()
        app.router.add_post("/", endpoint._answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
            yield endpoint
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        if self.node is None:
            return web.Response(status=503, text="<html>down for maintenance</html>", content_type="text/html")
        async with aiohttp.ClientSession() as http:
            async with http.post(
                self.node.url, data=await request.read(), headers={"Content-Type": "application/json"}
            ) as got:
                return web.Response(status=got.status, body=await got.read(), content_type="application/json")


async def test_a_loop_that_fails_says_so_and_the_others_go_on(
    ledger: Ledger, database: Database, tmp_path: Path
) -> None:
    dead, task = "http://127.0.0.1:9/", "follow:84533"
    async with Endpoint.open() as endpoint:
        more = f"""
[[brands.webhooks]]
name = "dead"
url = "{dead}"
secret_files = ["{tmp_path}/secret"]
allow = ["127.0.0.0/8"]
timeout_seconds = 1
[[chains]]
name = "other"
chain_id = 84533
rpc = [ {{ url = "{endpoint.url}" }} ]
poll_seconds = 0.2
tags_seconds = 0.5
"""
        async with World.of(ledger, database, tmp_path, more=more) as world:
            daemon = await world.start()
            await world.settles("one")

            async def failed_thrice() -> bool:
                return len(daemon.said("task failed", task=task)) >= 3

            await until(failed_thrice, lambda: f"{task} fails; {daemon.last_words()}")
            failures = daemon.said("task failed", task=task)
            pauses = [entry["retry_seconds"] for entry in failures]
            assert pauses[:3] == sorted(set(pauses[:3])), pauses  # each longer than the one before
            assert all("exception" not in entry for entry in failures)  # what explains itself needs no traceback
            tasks = (await world.status(daemon))["process"]["tasks"]
            assert "503" in tasks[task]["problem"] and tasks[task]["restarts"] >= 2
            others = {name: state for name, state in tasks.items() if not name.endswith(":84533")}
            assert {state["state"] for state in others.values()} == {"running"}
            assert {state["problem"] for state in others.values()} == {None}
            async with aiohttp.ClientSession(daemon.base) as http, http.get("/metrics") as answer:
                text = await answer.text()
            assert re.search(rf'^loyalty_loop_restarts_total{{[^}}]*task="{task}"', text, re.MULTILINE)
            await world.settles("two")  # nobody waits for the dead webhook, nor for the dead chain

            async with Anvil(chain_id=84533, block_time=0.2, slots_in_an_epoch=2) as node:
                endpoint.node = node

                async def follows() -> bool:
                    seen = await world.status(daemon)
                    heads = {chain["name"]: chain["head"] for chain in seen["chains"]}
                    return heads["other"] is not None and seen["process"]["tasks"][task]["state"] == "running"

                await until(follows, lambda: f"the other chain is followed; {daemon.last_words()}")
                assert await daemon.stop() == 0
