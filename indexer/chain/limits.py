"""The learned limits of a chain's endpoints, over a restart: loaded when a loop starts, stored now and then when they changed.

Promises that a start costs no refusals that were met before, and that a limit which only tightens is not believed for ever: after
RELEARN it is found out anew, at the price of a refusal, since plans change without their URL.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Final

import msgspec

from indexer.chain.rpc import Rpc
from indexer.chain.spans import Learned
from indexer.store import limits as store
from indexer.store.connection import Connection
from indexer.store.leases import Lease

EVERY: Final = 60.0  # seconds between two looks at whether something changed
RELEARN: Final = timedelta(days=7)


class Limits:
    """Of all endpoints of one chain in this process, whichever loops ask them. `clock` gives monotonic seconds."""

    def __init__(self, chain_id: int, endpoints: Sequence[Rpc], clock: Callable[[], float] = time.monotonic) -> None:
        self._chain_id, self._endpoints, self._clock = chain_id, list(endpoints), clock
        self._marks: dict[Rpc, bytes] = {}
        self._stored: dict[Rpc, Learned] = {}
        self._due = 0.0

    async def load(self, conn: Connection) -> None:
        """Takes in what was stored, by this process or another: firm limits tighten ours, the rest fills what we lack."""
        salt = await store.salt(conn)
        kept = await store.load(conn, self._chain_id)
        for rpc in self._endpoints:
            self._marks[rpc] = mark = store.fingerprint(salt, rpc.url)
            if (found := kept.get(mark)) is None:
                continue
            try:
                learned = msgspec.convert(found.limits, Learned)
            except msgspec.ValidationError:
                continue  # of another version: found out anew
            if found.firm_age > RELEARN:
                learned = Learned(dense_spans=learned.dense_spans)
            self._stored[rpc] = learned
            rpc.learned = rpc.learned.tightened(learned)
        self._due = self._clock() + EVERY

    async def save(self, lease: Lease) -> None:
        """Stores what has changed, no more often than every so often. To be called where no transaction is open."""
        if self._clock() < self._due or not self._marks:
            return
        self._due = self._clock() + EVERY
        changed = []
        for rpc in self._endpoints:
            now, before = rpc.learned, self._stored.get(rpc, Learned())
            if now != before:
                changed.append((rpc, now, now.firm != before.firm))
        if not changed:
            return
        async with lease.transaction() as conn:
            await store.save(
                conn,
                self._chain_id,
                [(self._marks[rpc], rpc.name, msgspec.to_builtins(now), firm) for rpc, now, firm in changed],
            )
        self._stored.update({rpc: now for rpc, now, _ in changed})
