"""The end of each brand's stream in memory, for those who wait for the next signal.

A thousand clients may wait on one reader: woken by `numbered`, it fetches what is new for the brands that somebody waits
for, once, and everybody is answered from memory. No waiting client has a database connection. What memory does not hold
(an old cursor, a brand that nobody asked for lately, a cursor that may be wrong) is said to be unknown, and the caller
asks the store; nothing here decides that a cursor is bad. Missing a wake-up costs latency: it looks every few seconds.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

import asyncpg
import structlog
from aiohttp import web

from indexer.api.state import DATABASE, WAKEUPS
from indexer.store import feed
from indexer.store.database import DISCONNECTED, Database
from indexer.store.feed import Entry
from indexer.store.wakeups import Wakeups

LISTENING_SECONDS: Final = 5.0  # between looks while NOTIFY is heard
POLLING_SECONDS: Final = 1.0  # and while it is not
RETRY_SECONDS: Final = 1.0
KEEP_SECONDS: Final = 120.0  # a brand's tail after the last client asked: they come back within a wait
KEEP_ENTRIES: Final = 1000
KEEP_BYTES: Final = 2 * 1024 * 1024  # of bodies, for each brand
BATCH: Final = 200

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Tail:
    """The last signals of one brand. `entries` are without gaps and end at `last`."""

    stream: UUID
    last: int
    touched: float
    entries: deque[Entry] = field(default_factory=deque)
    size: int = 0
    waiting: set[asyncio.Future[None]] = field(default_factory=set)

    def add(self, fresh: Sequence[Entry]) -> None:
        for entry in fresh:
            if entry.supersedes is not None and any(known.id == entry.supersedes for known in self.entries):
                # what is kept was read before it was taken back: whoever is so far behind reads it from the store, as it is now
                while self.entries and self._drop().id != entry.supersedes:
                    pass
            self.entries.append(entry)
            self.size += len(entry.body)
            self.last = entry.sequence
        while len(self.entries) > KEEP_ENTRIES or self.size > KEEP_BYTES:
            self._drop()

    def _drop(self) -> Entry:
        entry = self.entries.popleft()
        self.size -= len(entry.body)
        return entry

    def wake(self) -> None:
        for future in self.waiting:
            if not future.done():
                future.set_result(None)


class Tails:
    """What is known of the brands that are waited for, and the waiting."""

    def __init__(self, database: Database, wakeups: Wakeups, clock: Callable[[], float]) -> None:
        self._database, self._wakeups, self._clock = database, wakeups, clock
        self._tails: dict[str, _Tail] = {}
        self.draining = False

    @property
    def waiting(self) -> int:
        return sum(len(tail.waiting) for tail in self._tails.values())

    def after(self, stream: UUID, brand: str, sequence: int) -> list[Entry] | None:
        """What follows, perhaps nothing yet; None where memory cannot tell."""
        tail = self._tails.get(brand)
        if tail is None or tail.stream != stream:
            return None
        tail.touched = self._clock()
        oldest = tail.last - len(tail.entries) + 1
        if not oldest - 1 <= sequence <= tail.last:
            return None
        return [tail.entries[nth] for nth in range(sequence - oldest + 1, len(tail.entries))]

    def begin(self, stream: UUID, brand: str, last: int) -> None:
        """The store said that the brand's stream ends at `last`: from now on its tail is kept here."""
        tail = self._tails.get(brand)
        if tail is None or tail.stream != stream:
            if tail is not None:
                tail.wake()
            self._tails[brand] = _Tail(stream, last, self._clock())
            # what was numbered between that look and this moment had its wake-up already: one more look, from `last` on
            self._wakeups.poke("numbered")

    async def news(self, brand: str, seconds: float) -> None:
        """Returns when there may be something new of a brand that was begun, or after `seconds`, or when draining."""
        tail = self._tails.get(brand)
        if tail is None or self.draining:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        tail.waiting.add(future)
        try:
            async with asyncio.timeout(seconds):
                await future
        except TimeoutError:
            pass
        finally:
            tail.waiting.discard(future)
            tail.touched = self._clock()

    def drain(self) -> None:
        """Everybody is answered now, and nobody waits any more: the process stops."""
        self.draining = True
        for tail in self._tails.values():
            tail.wake()

    async def follow(self) -> None:
        """Keeps the tails up to date until cancelled. A database that is away costs latency only."""
        while True:
            listening = self._wakeups.status == "listening"
            await self._wakeups.wait("numbered", LISTENING_SECONDS if listening else POLLING_SECONDS)
            try:
                while await self._look():
                    pass
            except (asyncpg.PostgresError, *DISCONNECTED) as error:
                log.warning(
                    "waiting clients hear nothing new: the database does not answer", error=type(error).__name__
                )
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:
                log.exception("a look for new signals failed")
                await asyncio.sleep(RETRY_SECONDS)

    async def _look(self) -> bool:
        """Reads what is new. True: there may be more."""
        now = self._clock()
        for brand in [
            name for name, tail in self._tails.items() if not tail.waiting and now - tail.touched > KEEP_SECONDS
        ]:
            del self._tails[brand]
        if not self._tails:
            return False
        asked = {brand: tail.last for brand, tail in self._tails.items()}
        async with self._database.pool.acquire() as conn:
            stream, fresh = await feed.news(conn, asked, limit=BATCH)
        for brand in asked:
            tail, entries = self._tails[brand], fresh.get(brand, [])
            if tail.stream != stream or (entries and entries[-1].sequence != asked[brand] + len(entries)):
                # another history, or some are gone: the store says which, to each one who asks
                del self._tails[brand]
                tail.wake()
            elif entries and tail.last == asked[brand]:
                tail.add(entries)
                tail.wake()
        return any(len(entries) == BATCH for entries in fresh.values())


TAILS: web.AppKey[Tails] = web.AppKey("tails", Tails)


async def following(app: web.Application) -> AsyncIterator[None]:
    """A clean-up context of the application: the tails follow for as long as it serves."""
    tails = app[TAILS] = Tails(app[DATABASE], app[WAKEUPS], asyncio.get_running_loop().time)
    reader = asyncio.create_task(tails.follow(), name="tails")
    try:
        yield
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def drain(app: web.Application) -> None:
    app[TAILS].drain()
