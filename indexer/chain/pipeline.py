"""One pass over the gaps below finalized: they become windows, fetched in parallel, decoded, and stored in the chain's order.

Promises that a window's events, the coverage that speaks for them, and the emitters found in it commit together, after a
second fetch for programmes that were discovered in it or, while it was under way, before it. Memory is bounded by the
windows in flight. What is covered here is `unverified`: the second look improves on it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from indexer.chain.coverage import Plan, Stride, Window
from indexer.chain.decode import Decoded, Speakers, Token
from indexer.chain.emitters import load_speakers
from indexer.chain.reading import SLICE, Ranges, Task
from indexer.chain.wire import Log
from indexer.model.types import Header
from indexer.store import coverage, facts, rereads
from indexer.store.coverage import Covered

log = structlog.get_logger(__name__)

PARALLEL = 4  # windows in flight
FIRST_WINDOW = 2_000  # blocks
LARGEST_WINDOW = 200_000


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

    def __init__(self, task: Task, *, report: Report | None = None, parallel: int = PARALLEL) -> None:
        self._task, self._report, self._parallel = task, report, parallel
        self._chain, self._lease = task.chain, task.lease
        self._speakers = Speakers(task.chain.chain_id, ())
        self._found: dict[bytes, Token] = {}  # in this pass
        self._stride = Stride(FIRST_WINDOW, LARGEST_WINDOW)
        self._interrupted = False
        self.progress = Progress()

    async def run(self) -> bool:
        """Fills every gap below finalized that was there at the start. True when there was one.

        It ends early, between two windows, when a person has asked for something to be read again.
        Raises RpcError, Lie, Unsettled, LeaseLost: what was committed stays, the next pass plans from there.
        """
        ranges = await Ranges.open(self._task)
        if ranges is None:
            return False
        gaps = await coverage.gaps(self._lease.connection, self._chain.chain_id, ranges.anchor.number)
        if not gaps:
            return False
        self._ranges = ranges
        # after the gaps: whoever may speak for more than before has lost his coverage
        self._speakers = await load_speakers(self._lease.connection, self._chain.chain_id)
        plan = Plan(gaps)
        self.progress = Progress(blocks_total=plan.blocks)
        await self._windows(plan, self._task.clock())
        return True

    async def _windows(self, plan: Plan, began: float) -> None:
        """Several windows are fetched while one is decoded and one is stored; stored in order, for discovery's sake."""
        in_flight: deque[asyncio.Task[_Fetched]] = deque()
        storing: asyncio.Task[None] | None = None
        try:
            while True:
                while (
                    len(in_flight) < self._parallel
                    and not self._interrupted
                    and (window := plan.next(self._stride.blocks)) is not None
                ):
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
        logs, headers = await self._ranges.logs(asked, window.low, window.high)
        self._stride.adapt(window.high - window.low + 1, len(logs))
        return _Fetched(window, asked, logs, headers)

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
                more, headers = await self._ranges.logs(frozenset(token.token for token in late), first, window.high)
                fetched.logs += more
                fetched.headers |= headers
                asked |= {token.token: first for token in late}
            tokens = self._task.decoder.discover(fetched.logs, self._speakers)
            late = [token for token in tokens if token.token not in asked]
            if not late:
                break
        rows = Decoded(tokens=tokens)
        for start in range(0, len(fetched.logs), SLICE):
            self._task.decoder.read(fetched.logs[start : start + SLICE], self._speakers, tokens, rows)
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
                read_from=self._task.rpc.name,
            )
            self._interrupted = await rereads.any_open(conn, self._chain.chain_id)
        if done.events:
            self._task.wakeups.poke("facts")
        progress = self.progress
        progress.blocks_done += window.high - window.low + 1
        progress.events += done.events
        progress.at_block = window.high
        progress.seconds = self._task.clock() - began
        if self._report is not None:
            self._report(progress)
        if (metrics := self._task.metrics) is not None:
            metrics.backfill_blocks.labels(self._chain.name).inc(window.high - window.low + 1)
            metrics.backfill_events.labels(self._chain.name).inc(done.events)
            for reason, number in rows.lookalikes.items():
                metrics.lookalikes.labels(self._chain.name, reason).inc(number)
            for reason, number in rows.quarantined.items():
                metrics.quarantined_logs.labels(self._chain.name, reason).inc(number)
