"""A simulated partner on a socket of this machine: replies with their delays, silences and torn ends as `wire.py` spells them.

Promises to hold nothing of an endless body in memory and to leave no handler behind when it stops.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

from aiohttp import web

from indexer.sandbox.partners.partner import Partner
from indexer.sandbox.partners.wire import Request

BODY_LIMIT = 64 * 1024
PIECE = b" " * 65_536
SILENCE_SECONDS = 600.0  # longer than any client waits


class Hosted:
    """An async context manager around one partner; `base` is the path that its URL ends with."""

    def __init__(self, partner: Partner, base: str = "") -> None:
        self.partner, self._base = partner, base
        self._runner: web.AppRunner | None = None
        self.url = ""
        self.sent = 0  # bytes of bodies

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=BODY_LIMIT)
        app.router.add_route("*", "/{path:.*}", self._answer)
        # a client that hangs up ends its handler: silent answers would outlive every test
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, handler_cancellation=True, shutdown_timeout=0.2
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}{self._base}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        reply = self.partner.answer(
            Request(request.method, request.rel_url.raw_path, dict(request.query), headers, body)
        )
        if reply.delay:
            await asyncio.sleep(reply.delay)
        if reply.fate == "silent":
            await asyncio.sleep(SILENCE_SECONDS)
        if reply.fate != "answered":
            if request.transport is not None:
                request.transport.abort()
            return web.Response()
        if not reply.padding:
            self.sent += len(reply.body)
            return web.Response(status=reply.status, body=reply.body, headers=reply.headers)
        return await self._endless(request, reply.status, reply.body, reply.padding, dict(reply.headers))

    async def _endless(
        self, request: web.Request, status: int, body: bytes, padding: int, headers: dict[str, str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        with suppress(ConnectionError):  # the client had enough
            await response.write(body)
            while padding > 0:
                await response.write(PIECE[:padding])
                padding -= len(PIECE)
                self.sent += len(PIECE)
            await response.write_eof()
        return response
