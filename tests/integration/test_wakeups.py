"""Wake-ups within a process and between processes, and what is left of them when the database goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import asyncpg

from indexer.store.database import Database
from indexer.store.wakeups import Wakeups, channel


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_waiting_task_is_woken_by_a_poke() -> None:
    wakeups = Wakeups()
    waiting = asyncio.create_task(wakeups.wait("facts", 60))
    await asyncio.sleep(0)
    wakeups.poke("facts")
    assert await asyncio.wait_for(waiting, 5) is True


async def test_nothing_is_missed_between_two_waits_of_one_task() -> None:
    wakeups = Wakeups()
    assert await wakeups.wait("facts", 0) is False
    wakeups.poke("facts")  # while the task works
    assert await wakeups.wait("facts", 60) is True
    assert await wakeups.wait("facts", 0.01) is False  # and it is told once


async def test_every_waiter_is_woken_and_other_topics_sleep_on() -> None:
    wakeups = Wakeups()
    heads = [asyncio.create_task(wakeups.wait("heads", 60)) for _ in range(3)]
    both = asyncio.create_task(wakeups.wait(("facts", "heads"), 60))
    facts = asyncio.create_task(wakeups.wait("facts", 0.2))
    await asyncio.sleep(0)
    wakeups.poke("heads")
    assert await asyncio.gather(*heads, both, facts) == [True, True, True, True, False]


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    wakeups = Wakeups()
    waiting = asyncio.create_task(wakeups.wait("facts", 60))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not any(wakeups._waiting.values())


async def test_a_notify_of_another_process_wakes(database: Database, dsn: str) -> None:
    async with Wakeups.listening(database) as wakeups:
        await until(lambda: wakeups.status == "listening")
        await wakeups.wait("numbered", 60)  # hears at once that it may have missed something
        other = await asyncpg.connect(dsn)
        try:
            async with other.transaction():
                await other.execute(f"NOTIFY {channel('numbered')}")
                assert await wakeups.wait("numbered", 0.2) is False  # not before the commit
            assert await wakeups.wait("numbered", 10) is True
        finally:
            await other.close()
    assert wakeups.status == "polling"


async def test_a_lost_connection_is_told_and_made_anew(database: Database) -> None:
    wakeups = Wakeups()
    ear = asyncio.create_task(wakeups.listen(database, retry_seconds=0.3))
    await until(lambda: wakeups.status == "listening")
    await wakeups.wait("facts", 60)
    await database.pool.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'indexer:listen'"
    )
    await until(lambda: wakeups.status == "polling")
    begun = time.monotonic()
    assert await wakeups.wait("facts", 30) is True  # whatever was said meanwhile is looked for
    assert time.monotonic() - begun < 20
    assert wakeups.status == "listening"
    ear.cancel()
    await asyncio.gather(ear, return_exceptions=True)
