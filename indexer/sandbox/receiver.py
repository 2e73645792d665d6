"""The shop's webhook endpoint: a real HTTP server on this machine, which verifies with the public Standard Webhooks package.

Promises that nothing unverified reaches the shop, and that repetitions are told apart by their webhook-id. What a signal
means, and how to answer, is the shop's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

PATH = "/hooks/loyalty"
TEST = "webhook.test"  # of `indexer webhooks test`: about no operation, and without a number


@dataclass(frozen=True, slots=True)
class Received:
    """A verified signal. `at` is the loop's time (seconds) at which its last byte had come; `repeated`: its id came before."""

    id: str
    type: str
    data: Mapping[str, Any]
    at: float
    repeated: bool

    @property
    def reference(self) -> str | None:
        """The operation's, where the signal is about one."""
        operation = self.data.get("operation")
        return str(operation["reference"]) if operation else None

    @property
    def sequence(self) -> int:
        return int(self.data["sequence"])

    @property
    def generation(self) -> int:
        return int(self.data["generation"])


class Receiver:
    """An async context manager. `take` gets each verified signal and answers with an HTTP status."""

    def __init__(self, secret: str, take: Callable[[Received], int]) -> None:
        self._webhook, self._take = Webhook(secret), take
        self._ids: set[str] = set()
        self._runner: web.AppRunner | None = None
        self.url = ""
        self.received = self.verified = self.duplicates = 0

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post(PATH, self._post)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}{PATH}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _post(self, request: web.Request) -> web.Response:
        body = await request.read()  # the bytes, not the parsed JSON
        at = asyncio.get_running_loop().time()
        self.received += 1
        try:
            message = self._webhook.verify(body, dict(request.headers))
        except WebhookVerificationError as error:
            return web.Response(status=400, text=str(error))
        self.verified += 1
        if message["type"] == TEST:
            return web.Response(status=204)
        identity = request.headers["webhook-id"]
        repeated = identity in self._ids
        self.duplicates += repeated
        self._ids.add(identity)
        return web.Response(status=self._take(Received(identity, message["type"], message["data"], at, repeated)))
