"""Two endpoints of one real chain, as a provider's two gateways: one is cut off, and comes back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from indexer.store.database import Database
from tests.acceptance.world import Ledger, World, until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]


class Relay:
    """A port that passes on whatever comes to another one, until it is cut."""

    def __init__(self, target: str) -> None:
        self._target = URL(target)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.port = 0

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._target.host, self._target.port)
        self._open |= {writer, back}
        try:
            await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
        finally:
            self._open -= {writer, back}

    @staticmethod
    async def _pass(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                sink.write(data)
                await sink.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            sink.close()


async def test_one_of_two_endpoints_is_cut_off_and_comes_back(database: Database, tmp_path: Path) -> None:
    async with Ledger.running(seed=9, relayers=6) as ledger, World.of(ledger, database, tmp_path) as world:
        relays = [Relay(ledger.anvil.url), Relay(ledger.anvil.url)]
        for relay in relays:
            await relay.listen()
        text = world.config.read_text()
        alone = f'rpc = [ {{ url = "{ledger.anvil.url}" }} ]'
        assert alone in text
        both = ", ".join(f'{{ url = "http://{relay.name}" }}' for relay in relays)
        world.config.write_text(text.replace(alone, f"rpc = [ {both} ]"))
        daemon = await world.start()
        try:

            async def seen() -> dict[str, Any]:
                (chain,) = (await world.status(daemon))["chains"]
                found: dict[str, Any] = chain["witnesses"]
                return found

            async def agree(wanted: bool) -> bool:
                return bool((await seen())["agree"]) is wanted

            await daemon.says("listening")
            await until(lambda: agree(True), "the endpoints agree")
            first = await world.settles("both are there")
            (evidence,) = first.body["data"]["evidence"]
            assert (evidence["witnesses"], evidence["proof"]) == (2, "receipts_root")

            # ---- the one that leads is cut off: the other takes over, facts go on, and a signal waits
            await relays[0].cut()
            signed = world.action(50)
            await world.register("one is cut off", signed.action)
            await world.submit(signed)
            await until(lambda: agree(False), "too few agree")
            await daemon.says("another endpoint takes over", endpoint=relays[1].name)
            await until(lambda: _waits(world, "1 of 2 endpoints"), "the operation says what it waits for")
            assert not world.shop.heard("one is cut off", "ready")
            states = {each["name"]: each["state"] for each in (await seen())["endpoints"]}
            assert states == {relays[0].name: "failing", relays[1].name: "live"}
            before = int((await world.status(daemon))["chains"][0]["head"]["number"])
            await ledger.mine_on(5)

            async def goes_on() -> bool:
                return int((await world.status(daemon))["chains"][0]["head"]["number"]) >= before + 5

            await until(goes_on, "facts go on")

            # ---- it is back: the signal leaves, with both as witnesses
            await relays[0].listen()
            ready = await world.shop.hears("one is cut off", "ready")
            assert ready.body["data"]["evidence"][0]["witnesses"] == 2
            await world.observer.look()
            await world.judge({"both are there": "ready", "one is cut off": "ready"})
            assert await daemon.stop() == 0
        finally:
            for relay in relays:
                await relay.cut()


async def _waits(world: World, words: str) -> bool:
    told = await world.database.pool.fetchval(
        "SELECT waiting_for::text FROM loyalty.operations WHERE reference = 'one is cut off'"
    )
    return words in str(told)
