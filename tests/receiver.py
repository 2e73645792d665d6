"""A brand's endpoint for tests: a real HTTP server that keeps what arrives, and answers by script, path by path."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from aiohttp import web


@dataclass
class Received:
    """A request as it came; `at` in Unix seconds."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float = 0.0

    @property
    def id(self) -> UUID:
        return UUID(self.headers["webhook-id"])

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def type(self) -> str:
        return str(self.json["type"])

    @property
    def operation(self) -> str:
        """The operation's id; nothing for a signal that is of none."""
        return str(self.json["data"].get("operation", {}).get("id", ""))

    @property
    def sequence(self) -> int:
        return int(self.json["data"]["sequence"])


# What to answer; None drops the connection, bytes are written as they are, whatever HTTP says.
Script = Callable[[Received], Awaitable[web.StreamResponse | bytes | None]]


async def fine(_: Received) -> web.Response:
    return web.Response(status=204)


class Receiver:
    """Keeps every request, and counts what runs at the same time. `scripts` by path, `script` for all others."""

    def __init__(self, script: Script = fine) -> None:
        self.requests: list[Received] = []
        self.scripts: dict[str, Script] = {}
        self.script = script
        self.running: Counter[tuple[str, str]] = Counter()
        self.overlaps = 0
        self.most_at_once = 0
        self.url = ""
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Receiver]:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        try:
            await self.revive()
            yield self
        finally:
            await self._runner.cleanup()

    async def revive(self) -> None:
        """Listens, again at the same port."""
        assert self._runner is not None
        port = int(self.url.rpartition(":")[2]) if self.url else 0
        self._site = web.TCPSite(self._runner, "127.0.0.1", port, reuse_address=True)
        await self._site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def die(self) -> None:
        """Stops listening, and breaks what is connected."""
        assert self._runner is not None and self._runner.server is not None and self._site is not None
        await self._site.stop()
        for connection in self._runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        headers = {key.lower(): value for key, value in request.headers.items()}
        received = Received(request.path, headers, await request.read(), time.time())
        self.requests.append(received)
        key = (received.path, received.operation)
        self.running[key] += 1
        self.overlaps += self.running[key] > 1 and received.operation != ""
        self.most_at_once = max(self.most_at_once, self.running.total())
        try:
            answer = await self.scripts.get(received.path, self.script)(received)
        finally:
            self.running[key] -= 1
        if isinstance(answer, web.StreamResponse):
            return answer
        if request.transport is not None:
            if answer is not None:
                request.transport.write(answer)
                request.transport.close()
                await asyncio.sleep(0.01)  # before aiohttp writes a line of its own
            else:
                request.transport.abort()
        return web.Response()

    def types(self, path: str = "/shop") -> list[str]:
        return [request.type for request in self.requests if request.path == path]
