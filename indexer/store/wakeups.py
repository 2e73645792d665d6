"""Wake-ups: a loop that waits hears of news at once, from this process or another, and of nothing by its timeout at last.

They carry no data and decide nothing: a missed one costs latency only, and a needless one a look. Between two waits of a
task on a topic none is missed. Other processes are heard through one LISTEN connection, which reconnects.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Final, Literal

import asyncpg

from indexer.store.database import DISCONNECTED, Database

Topic = Literal["facts", "heads", "settled", "numbered", "registered", "rereads", "asked"]
TOPICS: Final[tuple[Topic, ...]] = ("facts", "heads", "settled", "numbered", "registered", "rereads", "asked")

logger = logging.getLogger(__name__)


def channel(topic: Topic) -> str:
    """The name for NOTIFY and LISTEN. No payload: whoever may connect may listen."""
    return f"indexer_{topic}"


class Wakeups:
    """In-process events per topic, and the ear for those of other processes while `listening` or `listen` runs."""

    def __init__(self) -> None:
        self.status: Literal["listening", "polling"] = "polling"
        self._count: dict[Topic, int] = dict.fromkeys(TOPICS, 0)
        self._waiting: dict[Topic, set[asyncio.Future[None]]] = {topic: set() for topic in TOPICS}
        # what each waiting task has seen: a poke between its work and its wait is not lost
        self._seen: weakref.WeakKeyDictionary[asyncio.Task[object], dict[Topic, int]] = weakref.WeakKeyDictionary()

    def poke(self, *topics: Topic) -> None:
        """Wake all that wait for these; after the commit that made the news."""
        for topic in topics:
            self._count[topic] += 1
            for waiting in self._waiting[topic]:
                if not waiting.done():
                    waiting.set_result(None)

    async def wait(self, topics: Topic | Iterable[Topic], timeout: float) -> bool:
        """True when one was poked since this task last waited for it (at its first wait: ever); False after `timeout` s."""
        wanted: tuple[Topic, ...] = (topics,) if isinstance(topics, str) else tuple(topics)
        task = asyncio.current_task()
        assert task is not None
        seen = self._seen.setdefault(task, {})
        if any(self._count[topic] != seen.get(topic, 0) for topic in wanted):
            await asyncio.sleep(0)  # a loop that is poked without end still lets others run
            news = True
        else:
            news = await self._next(wanted, timeout)
        seen.update((topic, self._count[topic]) for topic in wanted)
        return news

    async def _next(self, topics: tuple[Topic, ...], timeout: float) -> bool:
        waiting = asyncio.get_running_loop().create_future()
        for topic in topics:
            self._waiting[topic].add(waiting)
        try:
            async with asyncio.timeout(timeout):
                await waiting
            return True
        except TimeoutError:
            return False
        finally:
            for topic in topics:
                self._waiting[topic].discard(waiting)

    async def listen(self, database: Database, *, check_seconds: float = 15.0, retry_seconds: float = 1.0) -> None:
        """Hear NOTIFY of other processes until cancelled. Every `check_seconds` the silence is questioned."""
        while True:
            try:
                connection = await database.session("indexer:listen")
                try:
                    await self._hear(connection, check_seconds)
                finally:
                    self.status = "polling"
                    connection.terminate()
            except (asyncpg.PostgresError, *DISCONNECTED) as error:
                logger.warning("not listening for wake-ups, polling instead: %s", error or type(error).__name__)
            await asyncio.sleep(retry_seconds)

    async def _hear(self, connection: asyncpg.Connection, check_seconds: float) -> None:
        ended = asyncio.Event()
        connection.add_termination_listener(lambda _: ended.set())
        by_channel = {channel(topic): topic for topic in TOPICS}
        for name in by_channel:
            await connection.add_listener(name, lambda _connection, _pid, heard, _payload: self.poke(by_channel[heard]))
        self.status = "listening"
        self.poke(*TOPICS)  # what was said while nobody listened
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(check_seconds):
                    await ended.wait()
                raise ConnectionResetError("the LISTEN connection ended")
            await connection.execute("SELECT", timeout=check_seconds)

    @classmethod
    @asynccontextmanager
    async def listening(cls, database: Database) -> AsyncIterator[Wakeups]:
        """Wake-ups that hear other processes for as long as the body runs."""
        wakeups = cls()
        ear = asyncio.create_task(wakeups.listen(database), name="listen")
        try:
            yield wakeups
        finally:
            ear.cancel()
            await asyncio.gather(ear, return_exceptions=True)
