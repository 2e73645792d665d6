"""A loop that is told to stop stops, also when news come in the same moment."""

from __future__ import annotations

import asyncio

import pytest

from indexer.signals.webhooks import Dispatcher
from indexer.store.database import Database
from indexer.store.leases import Leases
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics


@pytest.mark.parametrize("steps", range(6))
async def test_the_dispatcher_stops_while_it_is_being_woken(database: Database, steps: int) -> None:
    """So many turns of the event loop lie between the news and the stop."""
    dispatcher = Dispatcher([], metrics=Metrics(), sweep=5.0)

    async def deliver() -> None:
        async with Leases(database).hold("deliver") as lease:
            await dispatcher.run(lease, Wakeups())

    task = asyncio.create_task(deliver())
    async with asyncio.timeout(60):
        while not await database.pool.fetchval("SELECT count(*) FROM indexer.lease WHERE holder IS NOT NULL"):
            await asyncio.sleep(0.01)
    for _ in range(3):  # let it come to rest
        await asyncio.sleep(0.05)
    dispatcher.configure([])
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=3)
    assert done, "the stop was overlooked"
    assert task.cancelled()
    await dispatcher.close()
