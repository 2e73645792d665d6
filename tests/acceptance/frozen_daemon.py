"""`indexer`, made to stop itself (SIGSTOP) exactly where a freeze hurts most: `frozen_daemon.py <where> <trigger> run …`.

The seams are wrapped, then the real command line runs. Nothing happens until the file `<trigger>` exists; it is removed when
the process stops, once, and save for `idle` only the task that follows the head counts. `idle` stops between transactions, `open` inside one that has stored events, `copy` in the middle of
the rows of a COPY, `commit` after the fence of a transaction that has stored events, before its COMMIT.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

from indexer.cli import main
from indexer.store import facts, leases
from indexer.store.leases import Lease

Stop = Callable[[], None]


class Trigger:
    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def armed(self) -> bool:
        return self._path.exists()

    def stop(self) -> None:
        """Stands still until somebody says SIGCONT; nothing when it is not armed."""
        if self.armed:
            self._path.unlink()
            os.kill(os.getpid(), signal.SIGSTOP)


def idle(trigger: Trigger) -> None:
    """At the end of a transaction, when no other is open in this process."""
    under_way: set[int] = set()
    transaction = Lease.transaction

    @asynccontextmanager
    async def counted(lease: Lease) -> AsyncIterator[asyncpg.Connection]:
        under_way.add(id(lease))
        try:
            async with transaction(lease) as connection:
                yield connection
        finally:
            under_way.discard(id(lease))
        if not under_way:
            trigger.stop()

    Lease.transaction = counted  # type: ignore[method-assign]


def follows(connection: asyncpg.Connection) -> bool:
    """Whether it is the session of the follower: history may be storing events of its own at that moment."""
    return str(connection.get_settings().application_name).startswith("indexer:follow:")


def storing_events(told: Callable[[asyncpg.Connection], None]) -> None:
    """Tells of each of the follower's connections whose transaction has just stored events."""
    store_events = facts.store_events

    async def watched(conn: asyncpg.Connection, *args: Any, **how: Any) -> list[int]:
        numbers = await store_events(conn, *args, **how)
        if numbers and follows(conn):
            told(conn)
        return numbers

    facts.store_events = watched


def in_an_open_transaction(trigger: Trigger) -> None:
    storing_events(lambda _conn: trigger.stop())


def in_a_copy(trigger: Trigger) -> None:
    copy = asyncpg.Connection.copy_records_to_table

    async def most_of(records: list[Any]) -> AsyncIterator[Any]:
        for number, record in enumerate(records):
            if number == len(records) * 4 // 5:
                await asyncio.sleep(0.2)  # what was written by now (it is by the half megabyte) goes to the server …
                trigger.stop()  # … which waits for the rest
            yield record

    async def interrupted(self: asyncpg.Connection, table: str, *, records: Iterable[Any], **how: Any) -> str:
        if trigger.armed and follows(self):
            records = most_of(list(records))  # type: ignore[assignment]
        return str(await copy(self, table, records=records, **how))

    asyncpg.Connection.copy_records_to_table = interrupted


def between_fence_and_commit(trigger: Trigger) -> None:
    with_events: weakref.WeakSet[asyncpg.Connection] = weakref.WeakSet()
    storing_events(with_events.add)
    fetchval = asyncpg.Connection.fetchval

    async def fenced(self: asyncpg.Connection, query: str, *args: Any, **how: Any) -> Any:
        found = await fetchval(self, query, *args, **how)
        if query == leases._FENCE:
            if self in with_events:
                trigger.stop()
            with_events.discard(self)
        return found

    asyncpg.Connection.fetchval = fenced


SEAMS = {"idle": idle, "open": in_an_open_transaction, "copy": in_a_copy, "commit": between_fence_and_commit}

if __name__ == "__main__":
    _, where, path, *rest = sys.argv
    SEAMS[where](Trigger(Path(path)))
    sys.argv = ["indexer", *rest]
    main()
