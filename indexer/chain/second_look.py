"""The second look: what is finalized and `unverified` is read again, slowly, and compared with what is stored.

Promises that a log which the first answer left out is stored, that one which no canonical block holds stops being
canonical (never on the word of one range answer alone), and that every difference is counted. Where the two readings can't
be reconciled the range stays `unverified`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import structlog

from indexer.chain.comparison import Comparison, Findings, WasRead
from indexer.chain.coverage import Plan, Window, read_before
from indexer.chain.decode import Speakers
from indexer.chain.emitters import load_speakers
from indexer.chain.integrity import Lie
from indexer.chain.linkage import Unsettled
from indexer.chain.reading import Ranges, Task, second_readers
from indexer.chain.rpc_errors import RpcError
from indexer.store import chains, coverage, facts
from indexer.store.coverage import HEAD_LANE, Covered, Readers, Span, Verdict

log = structlog.get_logger(__name__)

WINDOW = 10_000  # blocks: half an hour of Base
HOLE = 1_000  # blocks between two spans that are read as one


class SecondLook:
    """Owes every `unverified` finalized range one more reading, `second_look_seconds` after it was first noticed.

    When it was noticed is kept in memory alone: a restart only delays.
    """

    def __init__(self, task: Task) -> None:
        self._task, self._chain, self._lease = task, task.chain, task.lease
        self._noticed: Mapping[bytes, Sequence[Span]] = {}
        self._plan: Plan | None = None
        self._due = task.clock()

    async def look(self, windows: int = 20) -> int:
        """Reads again what is due, so many windows at most; the number of differences found.

        Raises RpcError, Lie, Unsettled, LeaseLost: what was looked at stays so, and the rest is looked at in a later round.
        """
        ranges = await Ranges.open(self._task)
        if ranges is None:
            return 0
        if self._plan is None and self._task.clock() >= self._due:
            upto = ranges.anchor.number
            if self._noticed:
                self._plan = Plan({emitter: _joined(spans, upto) for emitter, spans in self._noticed.items()})
            others = any(self._task.source.pool.live(node) for node in self._task.source.others)
            self._noticed = await coverage.unverified(
                self._lease.connection, self._chain.chain_id, upto, elsewhere=others
            )
            self._due = self._task.clock() + self._chain.second_look_seconds
        if self._plan is None:
            return 0
        plan, self._plan = self._plan, None  # a failure leaves the rest to the next round
        emitters = await chains.load_emitters(self._lease.connection, self._chain.chain_id)
        speakers = await load_speakers(self._lease.connection, self._chain.chain_id)
        gaps = await coverage.gaps(self._lease.connection, self._chain.chain_id, ranges.anchor.number)
        was_read = read_before(gaps, {e.address: e.start_block for e in emitters})
        differences = 0
        for _ in range(windows):
            if (window := plan.next(WINDOW)) is None:
                return differences
            asked = set(window.emitters) - {HEAD_LANE}
            if HEAD_LANE in window.emitters:
                asked |= {e.address for e in emitters if e.followed_from is not None and e.followed_from <= window.high}
            runs = await coverage.readers(self._lease.connection, self._chain.chain_id, window.low, window.high)
            for run in runs:
                part = Window(run.low, run.high, window.emitters)
                differences += await self._part(part, run, frozenset(asked), was_read, speakers)
        self._plan = plan
        return differences

    async def _part(
        self, window: Window, first: Readers, asked: frozenset[bytes], was_read: WasRead, speakers: Speakers
    ) -> int:
        """Blocks that were first read from the same endpoints: another one is asked; the number of differences. What could not be
        had stays owed: the next plan has it again."""
        tasks, verdict = second_readers(self._task, first)
        differences, settled = 0, True
        for place, task in enumerate(tasks):
            found = await self._read(task, window, asked, was_read, speakers)
            if found is None:
                break
            settled = settled and found.settled
            if not found.settled and task.source.pool.several:
                task.source.pool.disbelieve(task.source.lead)
            await self._store(task, window, found, verdict if settled and place == len(tasks) - 1 else None)
            for token in found.tokens:
                speakers.learn(token)
            differences += len(found.differences)
            await asyncio.sleep(1 / self._chain.verify_calls_per_second)
        return differences

    async def _read(
        self, task: Task, window: Window, asked: frozenset[bytes], was_read: WasRead, speakers: Speakers
    ) -> Findings | None:
        """What another endpoint shows; None where it can't be had: that is no fault of the one that leads."""
        try:
            ranges = await Ranges.open(task)
            assert ranges is not None, "something is finalized"
            return await Comparison(task, ranges, speakers).window(window.low, window.high, asked, was_read)
        except (RpcError, Lie, Unsettled) as trouble:
            if task.source.lead is self._task.source.lead:
                raise
            log.warning(
                "a second look at another endpoint failed",
                chain=self._chain.name,
                endpoint=task.rpc.name,
                reason=str(trouble),
            )
            return None

    async def _store(self, task: Task, window: Window, found: Findings, verdict: Verdict | None) -> None:
        covered = [Covered(e, window.low, window.high, verdict) for e in window.emitters] if verdict is not None else []
        async with self._lease.transaction() as conn:
            await facts.commit_range(
                conn,
                self._chain.chain_id,
                rows=found.rows,
                covered=covered,
                withdraw=found.withdraw,
                repair=True,
            )
        if found.differences or found.readable:
            self._task.wakeups.poke("facts")
        if found.differences:
            log.error(
                "a second look found differences, and repaired them",
                chain=self._chain.name, endpoint=task.rpc.name, from_block=window.low, to_block=window.high,
                missing=found.count("missing"), extra=found.count("extra"), different=found.count("different"),
            )  # fmt: skip
        if (metrics := self._task.metrics) is not None:
            metrics.second_looks.labels(self._chain.name).inc(window.high - window.low + 1)
            metrics.differences.labels(self._chain.name).inc(len(found.differences))


def _joined(spans: Sequence[Span], upto: int) -> list[Span]:
    """Spans with small holes between them as one: blocks that are better known may be read again, many requests need not."""
    joined: list[Span] = []
    for span in spans:
        if joined and span.low - joined[-1].high <= HOLE:
            joined[-1] = Span(joined[-1].low, span.high)
        elif span.low <= upto:
            joined.append(span)
    return joined
