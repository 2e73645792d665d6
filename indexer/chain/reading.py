"""Reading finalized ranges from one endpoint: what all who read history hold in common, and their way to a node.

Promises that no answer is used which did not come, in one batch, with the header of a block that we hold as finalized: an
endpoint that changes to another chain, or to a reset one, is noticed before anything of it is stored or counts as read, and
so is a backend that is far behind. Where the logs go is the callers'.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from indexer.chain.decode import Decoder
from indexer.chain.integrity import Count, verify_header
from indexer.chain.linkage import Unsettled
from indexer.chain.logs import checked, headers_of, timed, untimed
from indexer.chain.pool import Source
from indexer.chain.rpc import Rpc
from indexer.chain.wire import Log, RawHeader, RawLog
from indexer.config import Chain
from indexer.model.types import BlockRef, Header, Schedule, hex0x
from indexer.store import chains
from indexer.store.coverage import Readers, Verdict
from indexer.store.leases import Lease
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics

SLICE = 250  # logs parsed or decoded at a stretch, a millisecond or two: COPY and the head live on the same event loop


@dataclass(frozen=True, slots=True)
class Task:
    """What one who works on a chain's history is given. `clock` gives monotonic seconds."""

    chain: Chain
    source: Source
    lease: Lease
    wakeups: Wakeups
    decoder: Decoder
    metrics: Metrics | None = None
    clock: Callable[[], float] = time.monotonic

    @property
    def rpc(self) -> Rpc:
        """Whom to ask now: the same throughout one round."""
        return self.source.rpc

    @property
    def count(self) -> Count:
        return self.source.count

    def of(self, source: Source) -> Task:
        """The same work, asked of another."""
        return replace(self, source=source)


def second_readers(task: Task, first: Readers) -> tuple[list[Task], Verdict]:
    """The same task, asked of an endpoint that these blocks were not first read from, and what its reading is worth.

    Where nobody knows who read them first, or everybody did, of two endpoints one after the other. Where there is only one, of it
    once more, later; of none where several witnesses are needed and no other can be asked now. One whose reading was at odds with
    logs that stand is not asked for a while.
    """
    source = task.source
    others = [node for node in source.others if source.pool.live(node)]
    nodes = [node for node in (source.lead, *others) if source.pool.confirms(node)]
    fresh = [node for node in nodes if node.name not in first.endpoints]
    if first.endpoints and fresh:
        return [task.of(source.fixed(fresh[0]))], "second_endpoint"
    if len(nodes) > 1:
        return [task.of(source.fixed(node)) for node in nodes[:2]], "second_endpoint"
    return ([task] if source.pool.quorum == 1 else []), "second_look"


class Ranges:
    """Ranges up to `anchor`, the block that we hold as finalized. Made by `open`, for one pass."""

    def __init__(self, task: Task, schedule: Schedule | None, anchor: BlockRef) -> None:
        self.schedule, self.anchor = schedule, anchor
        self._rpc, self._count = task.rpc, task.count

    @classmethod
    async def open(cls, task: Task) -> Ranges | None:
        """None while nothing is finalized, so that there is nothing to read."""
        state = await chains.load_chain(task.lease.connection, task.chain.chain_id)
        if state is None or state.finalized is None:
            return None
        return cls(task, state.schedule, state.finalized)

    async def logs(self, asked: Collection[bytes], low: int, high: int) -> tuple[list[Log], dict[int, Header]]:
        """All logs of these emitters, checked and in chain order, and headers of those blocks that needed one for its time.

        Raises Unsettled where the endpoint shows another block than ours, or none, at the anchor; RpcError, Lie.
        """
        raws: list[RawLog] = []
        async for part in self._rpc.log_ranges(sorted(asked), low, high, beside=self.anchor.number, count=self._count):
            for header in part.beside:
                self._identify(header)
            raws += part.logs
        headers = (
            {h.number: h for h in await self.headers(numbers)} if (numbers := untimed(raws, self.schedule)) else {}
        )
        logs: list[Log] = []
        for start in range(0, len(raws), SLICE):
            logs += timed(raws[start : start + SLICE], self.schedule, headers, self._count)
            await asyncio.sleep(0)
        return checked(logs, low, high, asked, headers, self._count), headers

    async def headers(self, numbers: list[int]) -> list[Header]:
        """Verified headers at these heights, of the chain that holds our anchor. Raises Unsettled, Lie, RpcError."""
        found = await headers_of(self._rpc, [*numbers, self.anchor.number], self.schedule, self._count)
        self._compare(found.pop())
        return found

    async def same_chain(self) -> None:
        """Raises Unsettled where the endpoint does not hold what we hold as finalized."""
        await self.headers([])

    def _identify(self, raw: RawHeader | None) -> None:
        if raw is None:
            raise Unsettled(
                f"{self._rpc.name} does not know block {self.anchor.number}, which we hold as finalized: no history is read "
                "from it"
            )
        self._compare(verify_header(raw, self.schedule, self.anchor.number, count=self._count))

    def _compare(self, theirs: Header) -> None:
        if theirs.hash != self.anchor.hash:
            raise Unsettled(
                f"{self._rpc.name} shows block {theirs.number} as {hex0x(theirs.hash)}, we hold {hex0x(self.anchor.hash)} as "
                "finalized: no history is read from it"
            )
