"""The sequencer: committed signals get their number, and with it become visible and due at the endpoints.

Runs under the lease `number`, apart from the transactions that made the signals: a brand's transaction that stays open
holds up nobody's numbers. The rule itself is one statement, in `store/signals.py`.
"""

from __future__ import annotations

from typing import Final

from indexer.store import signals
from indexer.store.leases import Lease
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics

TASK: Final = "number"

BATCH = 1000  # signals a transaction
SWEEP = 1.0  # seconds until the outbox is looked at without a wake-up


async def number(lease: Lease, wakeups: Wakeups, metrics: Metrics, *, sweep: float = SWEEP) -> None:
    """Numbers until cancelled. Raises LeaseLost."""
    while True:
        async with lease.transaction() as conn:
            numbered = await signals.number(conn, limit=BATCH)
        for brand, count in numbered.signals.items():
            metrics.numbered.labels(brand).inc(count)
        if numbered.signals:
            wakeups.poke("numbered")
        if sum(numbered.signals.values()) < BATCH:
            await wakeups.wait("settled", sweep)
