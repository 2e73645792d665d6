"""Maintenance: what is over is forgotten once it is old enough, a little at a time, by one process.

Every chore deletes in short transactions of the lease `maintain`, with a breath between them, and is counted. What may go is
decided in the store; for how long it is kept, by the section `retention`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Final

import structlog

from indexer.config import Retention
from indexer.store import deliveries, lookups, partners, rereads, retention
from indexer.store.connection import Connection
from indexer.store.leases import Lease
from indexer.telemetry import Metrics

TASK: Final = "maintain"

EVERY_SECONDS = 600.0
BATCH = 1000  # rows of one transaction
BREATH_SECONDS = 0.05  # between two of them: the others' statements go first

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Chore:
    """One thing to forget. `days` says for how long it is kept (None: for ever), `batches` yields how many rows each took."""

    what: str  # the label of the metric
    days: Callable[[Retention], float | None]
    batches: Callable[[Lease, timedelta], AsyncIterator[int]]


async def _full(
    forget: Callable[[Connection, timedelta, int], Awaitable[int]], lease: Lease, keep: timedelta
) -> AsyncIterator[int]:
    """As long as there is a full batch to take."""
    gone = BATCH
    while gone >= BATCH:
        async with lease.transaction() as conn:
            gone = await forget(conn, keep, BATCH)
        yield gone


async def _deliveries(conn: Connection, keep: timedelta, limit: int) -> int:
    return await deliveries.forget(conn, keep=keep, limit=limit)


async def _orphans(table: str, conn: Connection, keep: timedelta, limit: int) -> int:
    return await retention.forget_orphans(conn, table, keep, limit)


async def _signals(lease: Lease, keep: timedelta) -> AsyncIterator[int]:
    async with lease.transaction() as conn:
        brands = await retention.brands_with_old_signals(conn, keep)
    for brand in brands:
        seen = BATCH
        while seen >= BATCH:
            async with lease.transaction() as conn:
                forgotten = await retention.forget_signals(conn, brand, keep, BATCH)
            seen = forgotten.seen
            yield forgotten.gone


# In this order: a signal goes after its deliveries. What else grows without end adds a line here and a key to `retention`.
CHORES: Final[Sequence[Chore]] = (
    Chore("deliveries", lambda kept: kept.deliveries_days, partial(_full, _deliveries)),
    *(
        Chore(f"orphaned_{table}", lambda kept: kept.orphans_days, partial(_full, partial(_orphans, table)))
        for table in retention.ORPHANED
    ),
    Chore("signals", lambda kept: kept.signals_days, _signals),
    Chore("partner_versions", lambda kept: kept.versions_days, partial(_full, partners.forget_versions)),
    Chore("lookups", lambda kept: kept.questions_days, partial(_full, lookups.forget)),
    Chore("rereads", lambda kept: kept.questions_days, partial(_full, rereads.forget)),
)


async def maintain(lease: Lease, kept: Retention, metrics: Metrics, *, every: float = EVERY_SECONDS) -> None:
    """Does the chores again and again until cancelled. Raises LeaseLost."""
    while True:
        gone = await do_chores(lease, kept, metrics)
        if gone:
            log.info("forgot what is over", rows=gone)
        await asyncio.sleep(every)


async def do_chores(lease: Lease, kept: Retention, metrics: Metrics) -> dict[str, int]:
    """Every chore once, to its end. Returns how many rows went, by chore."""
    gone: dict[str, int] = {}
    for chore in CHORES:
        days = chore.days(kept)
        if days is None:
            continue
        async for rows in chore.batches(lease, timedelta(days=days)):
            if rows:
                metrics.forgotten.labels(chore.what).inc(rows)
                gone[chore.what] = gone.get(chore.what, 0) + rows
            await asyncio.sleep(BREATH_SECONDS if rows else 0)
    return gone
