"""The second look: what is finalized and `unverified` is read again, slowly, and compared with what is stored.

Promises that a log which the first answer left out is stored, that one which no canonical block holds stops being
canonical (never on the word of one range answer alone), and that every difference is counted. Where the two readings can't
be reconciled the range stays `unverified`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from indexer.chain.coverage import Plan, Window
from indexer.chain.decode import Decoder, Speakers, Token
from indexer.chain.integrity import Count, bloom_admits, logs_of_receipts
from indexer.chain.logs import checked, headers_of, timed, untimed
from indexer.chain.position import speakers_of
from indexer.chain.rpc import Rpc
from indexer.chain.rpc_errors import MethodMissing
from indexer.chain.wire import quantity
from indexer.config import Chain
from indexer.model.types import Hash32, Schedule
from indexer.store import chains, coverage, facts
from indexer.store.coverage import HEAD_LANE, Covered, Span
from indexer.store.facts import Place, SomeRows
from indexer.store.leases import Lease
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics

log = structlog.get_logger(__name__)

WINDOW = 10_000  # blocks: half an hour of Base
HOLE = 1_000  # blocks between two spans that are read as one


@dataclass(frozen=True, slots=True)
class _Found:
    """What differs in one window: rows to store or correct, logs to withdraw, and whether all of it is settled."""

    rows: SomeRows
    tokens: list[Token]
    missing: int
    withdrawn: list[Place]
    settled: bool


class SecondLook:
    """Owes every `unverified` finalized range one more reading, `second_look_seconds` after it was first noticed.

    When it was noticed is kept in memory alone: a restart only delays.
    """

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._chain, self._rpc, self._lease, self._wakeups, self._decoder = chain, rpc, lease, wakeups, decoder
        self._metrics, self._count, self._clock = metrics, count, clock
        self._noticed: Mapping[bytes, Sequence[Span]] = {}
        self._plan: Plan | None = None
        self._due = clock()

    async def look(self, windows: int = 20) -> int:
        """Reads again what is due, so many windows at most; the number of differences found.

        Raises RpcError, Lie, Unsettled, LeaseLost: what was looked at stays so, and the rest is looked at in a later round.
        """
        state = await chains.load_chain(self._lease.connection, self._chain.chain_id)
        if state is None or state.finalized is None:
            return 0
        if self._plan is None and self._clock() >= self._due:
            upto = state.finalized.number
            if self._noticed:
                self._plan = Plan({emitter: _joined(spans, upto) for emitter, spans in self._noticed.items()})
            self._noticed = await coverage.unverified(self._lease.connection, self._chain.chain_id, upto)
            self._due = self._clock() + self._chain.second_look_seconds
        if self._plan is None:
            return 0
        plan, self._plan = self._plan, None  # a failure leaves the rest to the next round
        emitters = await chains.load_emitters(self._lease.connection, self._chain.chain_id)
        speakers = speakers_of(self._chain, await chains.load_programmes(self._lease.connection, self._chain.chain_id))
        differences = 0
        for _ in range(windows):
            if (window := plan.next(WINDOW)) is None:
                return differences
            asked = set(window.emitters) - {HEAD_LANE}
            if HEAD_LANE in window.emitters:
                asked |= {e.address for e in emitters if e.followed_from is not None and e.followed_from <= window.high}
            found = await self._compare(window, frozenset(asked), speakers, state.schedule)
            await self._store(window, found)
            for token in found.tokens:
                speakers.learn(token)
            differences += found.missing + len(found.withdrawn)
            await asyncio.sleep(1 / self._chain.verify_calls_per_second)
        self._plan = plan
        return differences

    async def _compare(
        self, window: Window, asked: frozenset[bytes], speakers: Speakers, schedule: Schedule | None
    ) -> _Found:
        raws = await self._rpc.logs_adaptive(sorted(asked), window.low, window.high)
        numbers = untimed(raws, schedule)
        headers = {h.number: h for h in await headers_of(self._rpc, numbers, schedule, self._count)} if numbers else {}
        logs = checked(timed(raws, schedule, headers), window.low, window.high, asked, headers, self._count)
        rows = self._decoder.decode(logs, speakers)
        ours = await facts.stored_events(
            self._lease.connection, self._chain.chain_id, sorted(asked), window.low, window.high
        )
        theirs = facts.places(rows)
        wrong = {place for place, tx_hash in theirs.items() if place not in ours or ours[place].tx_hash != tx_hash}
        withdrawn, kept = [], 0
        by_block: dict[tuple[int, bytes], list[Place]] = {}
        for place in ours.keys() - theirs.keys():
            by_block.setdefault((place.number, place.block_hash), []).append(place)
        for (number, block_hash), places in by_block.items():
            standing = await self._standing(number, Hash32(block_hash), {p: ours[p].emitter for p in places}, schedule)
            withdrawn += [place for place in places if place not in standing]
            kept += len(standing)
        if kept:
            log.warning(
                "a second reading left out logs that stand: it is not believed, and read once more",
                chain=self._chain.name, from_block=window.low, to_block=window.high, logs=kept,
            )  # fmt: skip
        return _Found(facts.only(rows, wrong), rows.tokens, len(wrong), withdrawn, kept == 0)

    async def _standing(
        self, number: int, block_hash: Hash32, places: Mapping[Place, bytes], schedule: Schedule | None
    ) -> set[Place]:
        """Which of these logs of one block, absent from a range answer, are there all the same, or may be."""
        header = (await headers_of(self._rpc, [number], schedule, self._count))[0]
        if header.hash != block_hash:
            return set()  # of a block that lost
        try:
            receipts = await self._rpc.receipts(block_hash)
        except MethodMissing:
            # without receipts only the bloom can show absence: an empty answer by hash is one node's word again
            return {place for place, emitter in places.items() if bloom_admits(header.bloom, [emitter])}
        if receipts is None:
            return set(places)
        present = {quantity(raw.log_index or "") for raw in logs_of_receipts(header, receipts, count=self._count)}
        return {place for place in places if place.log_index in present}

    async def _store(self, window: Window, found: _Found) -> None:
        covered = [Covered(e, window.low, window.high, "second_look") for e in window.emitters] if found.settled else []
        async with self._lease.transaction() as conn:
            await facts.commit_range(
                conn, self._chain.chain_id, rows=found.rows, covered=covered, withdraw=found.withdrawn, repair=True
            )
        differences = found.missing + len(found.withdrawn)
        if differences:
            self._wakeups.poke("facts")
            log.error(
                "a second look found differences, and repaired them",
                chain=self._chain.name, endpoint=self._rpc.name, from_block=window.low, to_block=window.high,
                stored=found.missing, withdrawn=len(found.withdrawn),
            )  # fmt: skip
        if self._metrics is not None:
            self._metrics.second_looks.labels(self._chain.name).inc(window.high - window.low + 1)
            self._metrics.differences.labels(self._chain.name).inc(differences)


def _joined(spans: Sequence[Span], upto: int) -> list[Span]:
    """Spans with small holes between them as one: blocks that are better known may be read again, many requests need not."""
    joined: list[Span] = []
    for span in spans:
        if joined and span.low - joined[-1].high <= HOLE:
            joined[-1] = Span(joined[-1].low, span.high)
        elif span.low <= upto:
            joined.append(span)
    return joined
