"""Where new heads come from: the socket while it speaks, nobody while it does not.

Promises that a silent, closed or refused socket is noticed (`live` turns false within its own silence limit) and tried again
in the background without end, and that what piles up is bounded: the oldest heads go first, and the follower fills gaps
anyway. Whether a head is true is not judged here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import structlog

from indexer.chain.rpc_errors import RpcError
from indexer.chain.wire import RawHeader

log = structlog.get_logger(__name__)

#: Makes one subscription to newHeads, a HeadStream: it raises an RpcError when it is silent, lost or refused.
Heads = Callable[[], AbstractAsyncContextManager[AsyncIterable[RawHeader]]]

BACKLOG = 512  # heads: more than a minute and a half of Base
RETRY = (1.0, 2.0, 5.0, 10.0, 30.0)  # seconds between attempts at a socket that does not work


class HeadFeed:
    """The heads that came and were not taken yet. Without `heads` it is never live: the caller polls."""

    def __init__(self, chain: str, heads: Heads | None, retry: tuple[float, ...] = RETRY) -> None:
        self._chain, self._heads, self._retry = chain, heads, retry
        self._waiting: deque[RawHeader] = deque(maxlen=BACKLOG)
        self._news = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None
        self.live = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[HeadFeed]:
        """Listens for as long as the body runs."""
        if self._heads is None:
            yield self
            return
        self._listening = asyncio.create_task(self._listen(self._heads), name=f"heads of {self._chain}")
        try:
            yield self
        finally:
            self._listening.cancel()
            with suppress(asyncio.CancelledError):
                await self._listening

    async def next(self, most: int, timeout: float) -> list[RawHeader]:
        """Up to `most` heads, in the order they came; at once if there are any, none after `timeout` seconds or when the
        socket comes or goes."""
        if self._listening is not None and self._listening.done():
            self._listening.result()  # it never ends but by an error that nobody expected
        if not self._waiting and timeout > 0:
            self._news.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._news.wait()
        return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]

    async def _listen(self, heads: Heads) -> None:
        failures = 0
        while True:
            try:
                async with heads() as stream:
                    async for head in stream:
                        if not self.live:
                            self.live, failures = True, 0
                            log.info("following by socket", chain=self._chain)
                        self._waiting.append(head)
                        self._news.set()
                reason = "it was closed"
            except RpcError as error:
                reason = str(error)
            if self.live:
                self.live = False
                self._waiting.clear()
                self._news.set()
                log.warning("the socket is lost: polling until it is back", chain=self._chain, reason=reason)
            elif failures == 0:
                log.warning("no socket: polling until there is one", chain=self._chain, reason=reason)
            await asyncio.sleep(self._retry[min(failures, len(self._retry) - 1)])
            failures += 1
