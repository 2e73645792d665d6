"""A loop of the daemon at work for as long as a test looks at it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from indexer.store.leases import Lease, LeaseLost, Leases


@asynccontextmanager
async def at_work(
    leases: Leases, task: str, loop: Callable[[Lease], Coroutine[Any, Any, None]]
) -> AsyncIterator[asyncio.Task[None]]:
    """Holds the lease, runs the loop, and cancels it when the body ends.

    A loop that is cut off in the middle of a COMMIT loses its lease, as it must: of that nothing is said, of all else it is.
    """
    failed: BaseException | None = None
    over = False
    try:
        async with leases.hold(task) as lease:
            running = asyncio.create_task(loop(lease))
            try:
                yield running
                assert not running.done() or running.exception() is None
            except BaseException as error:
                failed = error
                raise
            finally:
                over = True
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
    except LeaseLost:
        if failed is not None:
            raise failed from None
        if not over:
            raise
