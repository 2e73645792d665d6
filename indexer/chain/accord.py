"""Whether the endpoints of a followed chain agree, as the store and the log are told: with the looks of `witnesses.py`, and the lead that follows from them.

Promises that one look in the middle of a reorganisation is no disagreement, and that what is lasting is said once.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Final

import structlog

from indexer.chain import witnesses
from indexer.chain.linkage import Unsettled
from indexer.chain.pool import LAG, Node, Source
from indexer.model.types import BlockRef, Header
from indexer.store import chains
from indexer.store.leases import Lease
from indexer.telemetry import Metrics

log = structlog.get_logger(__name__)

FIRST_LOOK: Final = 5.0  # seconds in which several endpoints shall agree on where to begin


class Accord:
    """Of the endpoints that one follower asks. With one endpoint there is nothing to tell."""

    def __init__(self, chain: str, chain_id: int, source: Source, lease: Lease, metrics: Metrics | None) -> None:
        self._chain, self._chain_id = chain, chain_id
        self._source, self._lease, self._metrics = source, lease, metrics
        self._disagreed = 0  # looks in a row at which too few agreed
        self._agreed: bool | None = None  # None: not said yet
        self._stood: tuple[BlockRef, Node] | None = None  # the cursor when it was told last, and who led from then on

    @property
    def stands(self) -> bool:
        """Whether as many as must hold our chain."""
        return self._source.pool.quorum == 1 or bool(self._agreed)

    async def first(self) -> Header | None:
        """The finalized block that enough of several hold, as soon as they were looked at."""
        pool = self._source.pool
        if not pool.several:
            return None
        loop = asyncio.get_running_loop()
        until = loop.time() + FIRST_LOOK
        while loop.time() < until:
            if (found := await witnesses.agreed(pool, "finalized")) is not None:
                return found
            await asyncio.sleep(0.05)
        log.warning(
            "the endpoints agree on no finalized block: following begins on the word of one, and signals wait",
            chain=self._chain,
            endpoint=self._source.rpc.name,
        )
        return None

    async def tell(self, cursor: BlockRef, cursor_time_s: int | None) -> None:
        """What the latest looks say together, into the store; the best of the endpoints leads. `cursor`: how far following is."""
        pool = self._source.pool
        if not pool.several:
            return
        found = witnesses.agreement(pool)
        self._leave_who_stands_still(found.holders, cursor, cursor_time_s)
        self._source.reconsider()
        if found.height is None and len(found.apart) >= pool.quorum:
            self._source.prefer(found.apart, "most are on another branch")
        now = datetime.now(UTC)
        told = [pool.told(node, now) | {"leads": node is self._source.lead} for node in pool.nodes]
        self._disagreed = 0 if found.height is not None else self._disagreed + 1
        async with self._lease.transaction() as conn:
            await chains.set_agreement(conn, self._chain_id, found.height, told, lost=self._disagreed > 1)
        agrees = found.height is not None
        if self._agreed is not agrees and (agrees or self._disagreed > 1):
            self._agreed = agrees
            names = [node.name for node in found.holders]
            if agrees:
                log.info("endpoints agree", chain=self._chain, block=found.height, endpoints=names)
            else:
                log.warning(
                    "too few endpoints agree: facts go on, signals wait",
                    chain=self._chain,
                    needed=pool.quorum,
                    agree=names,
                    endpoints={each["name"]: each["reason"] or each["state"] for each in told},
                )
        if self._metrics is not None:
            self._metrics.witnesses.labels(self._chain).set(len(found.holders))

    def _leave_who_stands_still(self, holders: list[Node], cursor: BlockRef, cursor_time_s: int | None) -> None:
        """A lead that shows new blocks when it is looked at, and none of them when it is followed: a cache in between, or a liar."""
        times = sorted((node.time_s for node in holders), reverse=True)[self._source.pool.quorum - 1 :]
        stands = self._stood == (cursor, self._source.lead)  # whoever took over meanwhile has not had its turn
        if stands and cursor_time_s is not None and times and times[0] - cursor_time_s > LAG:
            behind = f"{times[0] - cursor_time_s} s behind"
            self._source.failed(
                Unsettled(f"{self._source.rpc.name} led no further than block {cursor.number}, {behind}")
            )
        self._stood = cursor, self._source.lead
