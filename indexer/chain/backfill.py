"""The history of one chain: filled, looked at a second time, and said to be complete only where that can be shown.

Promises that `history_complete` is never claimed by default: every block since each contract's proven creation was asked
for. The work itself is `pipeline.py`, `second_look.py`, and `rereading.py` for what a person asked for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from uuid import UUID

import structlog

from indexer.chain.decode import Decoder
from indexer.chain.integrity import Lie
from indexer.chain.linkage import Unsettled
from indexer.chain.pipeline import PARALLEL, Backfill, Progress
from indexer.chain.pool import Source
from indexer.chain.reading import Ranges, Task
from indexer.chain.rereading import Rereading
from indexer.chain.rpc_errors import RateLimited, RpcError, Unreachable
from indexer.chain.second_look import SecondLook
from indexer.config import Chain
from indexer.model.types import hex0x
from indexer.store import chains, coverage, rereads
from indexer.store.leases import Lease
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics

log = structlog.get_logger(__name__)


async def fill_history(
    chain: Chain,
    source: Source,
    lease: Lease,
    wakeups: Wakeups,
    decoder: Decoder,
    *,
    metrics: Metrics | None = None,
    progress: Callable[[str, int, int, int], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    parallel: int = PARALLEL,
) -> None:
    """Fills gaps below finalized whenever there are any, and takes second looks in between. Until cancelled.

    `progress(chain, blocks_done, blocks_total, events)` hears of each window. Raises LeaseLost; what is transient is
    waited out and logged.
    """

    def report(now: Progress) -> None:
        if progress is not None:
            progress(chain.name, now.blocks_done, now.blocks_total, now.events)

    task = Task(chain, source, lease, wakeups, decoder, metrics, clock)
    starts = Starts(chain, source, lambda: same_chain(task))
    second, rereading = SecondLook(task), Rereading(task)
    failures = 0
    await source.pool.limits.load(lease.connection)
    while True:
        backfill = Backfill(task, report=report, parallel=parallel)
        try:
            await same_chain(task)
            worked = await backfill.run()
            await second.look()  # what `expired` waits for; the rest of this round is for the views and for people
            worked |= await rereading.work()
            await _say_complete(task, starts)
            await source.pool.limits.save(lease)
            failures = 0
            if worked:
                source.worked()
        except (Unsettled, Lie, RpcError) as trouble:
            if source.failed(trouble):
                continue
            worked = False
            failures += 1
            log.warning("history waits", chain=chain.name, reason=str(trouble))
            await rereading.waits_for(str(trouble))
        if failures:
            await asyncio.sleep(min(chain.tags_seconds * 2 ** min(failures, 4), 60))
        elif not worked:
            await wakeups.wait("rereads", chain.tags_seconds)


async def carry_out(task: Task, request: UUID) -> None:
    """Works on what people asked to have read again until this request is over: where no daemon does. Raises LeaseLost."""
    rereading = Rereading(task)
    failures = 0
    while (asked := await rereads.find(task.lease.connection, request)) is not None and asked.state in rereads.OPEN:
        try:
            await same_chain(task)
            await rereading.work()
            failures = 0
        except (Unsettled, Lie, RpcError) as trouble:
            if task.source.failed(trouble):
                continue
            failures += 1
            await rereading.waits_for(str(trouble))
            await asyncio.sleep(min(task.chain.tags_seconds * 2 ** min(failures, 4), 60))


async def same_chain(task: Task) -> None:
    """Makes sure that the endpoint holds what we hold as finalized, and so all below it: ranges alone would not show it.

    Raises WrongChain, Unsettled.
    """
    if (state := await chains.load_chain(task.lease.connection, task.chain.chain_id)) is not None:
        task.source.pool.genesis = state.genesis_hash or task.source.pool.genesis
    await task.source.identify_again()
    ranges = await Ranges.open(task)
    if ranges is not None:
        await ranges.same_chain()


async def _say_complete(task: Task, starts: Starts) -> None:
    proven = await starts.proven()
    chain_id = task.chain.chain_id
    async with task.lease.transaction() as conn:
        state = await chains.load_chain(conn, chain_id)
        if state is None or state.finalized is None:
            return
        complete = proven and not await coverage.gaps(conn, chain_id, state.finalized.number)
        await chains.set_history_complete(conn, chain_id, complete)


class Starts:
    """Whether each factory's `start_block` misses nothing: no code stood at its address in the block before."""

    def __init__(self, chain: Chain, source: Source, same_chain: Callable[[], Awaitable[None]] | None = None) -> None:
        """`same_chain` raises where the endpoint is not our chain's any more: its word of code is worth nothing then."""
        self._chain, self._source, self._same_chain = chain, source, same_chain
        self._known: dict[tuple[bytes, int], bool] = {}
        self._absent: set[bytes] = set()

    async def proven(self) -> bool:
        """Asked once per factory and process. False where it can't be shown: history may be incomplete, and says so."""
        for factory in self._chain.factories:
            for address in (factory.address, factory.event_hub):
                # a hub may be older than its factory: it says nothing of the factory before that
                first = factory.start_block if address == factory.address else 0
                if address is not None and (address, first) not in self._known:
                    known = await self._check(address, first)
                    if known is None:
                        return False  # nothing there (yet): asked again
                    if self._same_chain is not None:
                        await self._same_chain()
                    self._known[address, first] = known
        return all(self._known.values())

    async def _check(self, address: bytes, start_block: int) -> bool | None:
        if not await self._source.rpc.has_code(address, "latest"):
            if address not in self._absent:
                self._absent.add(address)
                log.warning(
                    "no contract at a configured address: check the address and the chain, in [[chains]] factories",
                    chain=self._chain.name,
                    address=hex0x(address),
                )
            return None
        if start_block == 0:
            return True
        try:
            early = await self._source.rpc.has_code(address, start_block - 1)
        except (Unreachable, RateLimited):
            raise
        except RpcError:  # each client has its own words for state that it no longer keeps
            log.info(
                "cannot show that the contract did not exist before its start_block: the endpoint keeps no state that old",
                chain=self._chain.name,
                address=hex0x(address),
            )
            return False
        if early:
            log.warning(
                "the contract existed before its start_block: lower start_block, or history stays incomplete",
                chain=self._chain.name,
                address=hex0x(address),
                start_block=start_block,
            )
        return not early
