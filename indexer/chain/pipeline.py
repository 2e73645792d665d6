"""One pass over the gaps below finalized: they become windows, fetched in parallel, decoded, and stored in the chain's order.

Promises that a window's events, the coverage that speaks for them, and the emitters found in it commit together, after a
second fetch for programmes that were discovered in it or, while it was under way, before it. Memory is bounded by the
windows in flight. What is covered here is `unverified`: the second look improves on it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from indexer.chain.coverage import Plan, Window
from indexer.chain.decode import Decoded, Decoder, Speakers, Token
from indexer.chain.integrity import Count
from indexer.chain.logs import checked, headers_of, timed, untimed
from indexer.chain.position import speakers_of
from indexer.chain.rpc import Rpc
from indexer.chain.wire import Log
from indexer.config import Chain
from indexer.model.types import Header, Schedule
from indexer.store import chains, coverage, facts
from indexer.store.coverage import Covered
from indexer.store.leases import Lease
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics

log = structlog.get_logger(__name__)

PARALLEL = 4  # windows in flight
TARGET = 4_000  # logs of a window: what a COPY likes, and small enough for several to wait
SLICE = 250  # logs parsed or decoded at a stretch, a millisecond or two: COPY and the head live on the same event loop
FIRST_WINDOW = 2_000  # blocks
LARGEST_WINDOW = 200_000
GROW = 4  # times at most, from one window to the next


@dataclass(slots=True)
class Progress:
    """How far history is, for status and logs. Blocks are counted once, whatever the number of emitters."""

    blocks_total: int = 0
    blocks_done: int = 0
    events: int = 0
    seconds: float = 0.0
    at_block: int | None = None

    @property
    def events_per_second(self) -> float:
        return self.events / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None before there is one."""
        if not self.blocks_done:
            return None
        return (self.blocks_total - self.blocks_done) * self.seconds / self.blocks_done


Report = Callable[[Progress], None]


@dataclass(slots=True)
class _Fetched:
    """A window and its logs, timed and checked, not yet decoded: `asked` are the emitters that were in the filter."""

    window: Window
    asked: frozenset[bytes]
    logs: list[Log]
    headers: dict[int, Header] = field(default_factory=dict)


class Backfill:
    """One pass over the gaps that there are now. Made per pass; used by one task."""

    def __init__(
        self,
        chain: Chain,
        rpc: Rpc,
        lease: Lease,
        wakeups: Wakeups,
        decoder: Decoder,
        *,
        metrics: Metrics | None = None,
        count: Count | None = None,
        report: Report | None = None,
        clock: Callable[[], float] = time.monotonic,
        parallel: int = PARALLEL,
    ) -> None:
        self._chain, self._rpc, self._lease, self._wakeups, self._decoder = chain, rpc, lease, wakeups, decoder
        self._metrics, self._count, self._report, self._clock = metrics, count, report, clock
        self._parallel = parallel
        self._schedule: Schedule | None = None
        self._speakers = Speakers(chain.chain_id, ())
        self._found: dict[bytes, Token] = {}  # in this pass
        self._size = FIRST_WINDOW
        self.progress = Progress()

    async def run(self) -> bool:
        """Fills every gap below finalized that was there at the start. True when there was one.

        Raises RpcError, Lie, Unsettled, LeaseLost: what was committed stays, the next pass plans from there.
        """
        state = await chains.load_chain(self._lease.connection, self._chain.chain_id)
        if state is None or state.finalized is None:
            return False
        self._schedule = state.schedule
        gaps = await coverage.gaps(self._lease.connection, self._chain.chain_id, state.finalized.number)
        if not gaps:
            return False
        programmes = await chains.load_programmes(self._lease.connection, self._chain.chain_id)
        self._speakers = speakers_of(self._chain, programmes)
        plan = Plan(gaps)
        self.progress = Progress(blocks_total=plan.blocks)
        began = self._clock()
        await self._windows(plan, began)
        return True

    async def _windows(self, plan: Plan, began: float) -> None:
        """Several windows are fetched while one is decoded and one is stored; stored in order, for discovery's sake."""
        in_flight: deque[asyncio.Task[_Fetched]] = deque()
        storing: asyncio.Task[None] | None = None
        try:
            while True:
                while len(in_flight) < self._parallel and (window := plan.next(self._size)) is not None:
                    in_flight.append(asyncio.create_task(self._fetch(window, self._filter(window))))
                if not in_flight:
                    break
                fetched = await in_flight[0]
                in_flight.popleft()
                rows, emitters = await self._decode(fetched)
                if storing is not None:
                    await storing
                storing = asyncio.create_task(self._store(fetched, rows, emitters, began))
            if storing is not None:
                await storing
        finally:
            abandoned = [*in_flight, *([storing] if storing is not None and not storing.done() else [])]
            for task in abandoned:
                task.cancel()
            await asyncio.gather(*abandoned, return_exceptions=True)

    def _filter(self, window: Window) -> frozenset[bytes]:
        """Who is asked for: those that miss blocks in the window, and tokens found meanwhile."""
        return frozenset(window.emitters) | {t.token for t in self._found.values() if t.block_number <= window.high}

    # --------------------------------------------------------------------- fetching and decoding

    async def _fetch(self, window: Window, asked: frozenset[bytes]) -> _Fetched:
        logs, headers = await self._logs(asked, window.low, window.high)
        self._adapt(window, len(logs))
        return _Fetched(window, asked, logs, headers)

    async def _logs(self, asked: frozenset[bytes], low: int, high: int) -> tuple[list[Log], dict[int, Header]]:
        raws = await self._rpc.logs_adaptive(sorted(asked), low, high)
        numbers = untimed(raws, self._schedule)
        headers = (
            {h.number: h for h in await headers_of(self._rpc, numbers, self._schedule, self._count)} if numbers else {}
        )
        logs: list[Log] = []
        for start in range(0, len(raws), SLICE):
            logs += timed(raws[start : start + SLICE], self._schedule, headers)
            await asyncio.sleep(0)
        return checked(logs, low, high, asked, headers, self._count), headers

    def _adapt(self, window: Window, found: int) -> None:
        blocks = window.high - window.low + 1
        if found > 2 * TARGET:
            self._size = max(1, blocks * TARGET // found)
        elif blocks >= self._size and found < TARGET // 2:
            grown = blocks * min(GROW, TARGET // max(1, found))
            self._size = min(LARGEST_WINDOW, max(self._size, grown))

    async def _decode(self, fetched: _Fetched) -> tuple[Decoded, dict[bytes, int]]:
        """Rows of a window, and from which block on each emitter was asked for: discovery may ask for more."""
        window = fetched.window
        asked = dict.fromkeys(fetched.asked, window.low)
        late = [
            token for token in self._found.values() if token.token not in asked and token.block_number <= window.high
        ]
        while True:
            if late:
                first = max(window.low, min(token.block_number for token in late))
                more, headers = await self._logs(frozenset(token.token for token in late), first, window.high)
                fetched.logs += more
                fetched.headers |= headers
                asked |= {token.token: first for token in late}
            tokens = self._decoder.discover(fetched.logs, self._speakers)
            late = [token for token in tokens if token.token not in asked]
            if not late:
                break
        rows = Decoded(tokens=tokens)
        for start in range(0, len(fetched.logs), SLICE):
            self._decoder.read(fetched.logs[start : start + SLICE], self._speakers, tokens, rows)
            await asyncio.sleep(0)
        for token in tokens:
            self._speakers.learn(token)
            self._found[token.token] = token
        return rows, asked

    # --------------------------------------------------------------------- storing

    async def _store(self, fetched: _Fetched, rows: Decoded, asked: dict[bytes, int], began: float) -> None:
        window = fetched.window
        async with self._lease.transaction() as conn:
            done = await facts.commit_range(
                conn,
                self._chain.chain_id,
                rows=rows,
                headers=list(fetched.headers.values()),
                covered=[Covered(emitter, low, window.high, "unverified") for emitter, low in asked.items()],
            )
        if done.events:
            self._wakeups.poke("facts")
        progress = self.progress
        progress.blocks_done += window.high - window.low + 1
        progress.events += done.events
        progress.at_block = window.high
        progress.seconds = self._clock() - began
        if self._report is not None:
            self._report(progress)
        if self._metrics is not None:
            self._metrics.backfill_blocks.labels(self._chain.name).inc(window.high - window.low + 1)
            self._metrics.backfill_events.labels(self._chain.name).inc(done.events)
            for reason, number in rows.lookalikes.items():
                self._metrics.lookalikes.labels(self._chain.name, reason).inc(number)
            for reason, number in rows.quarantined.items():
                self._metrics.quarantined_logs.labels(self._chain.name, reason).inc(number)
