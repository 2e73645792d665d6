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
from indexer.chain.decode import Decoded, Decoder, Speakers
from indexer.chain.integrity import Count, bloom_admits, logs_of_receipts
from indexer.chain.logs import checked, headers_of, timed, untimed
from indexer.chain.position import speakers_of
from indexer.chain.rpc import Rpc
from indexer.chain.rpc_errors import MethodMissing
from indexer.chain.wire import quantity
from indexer.config import Chain
from indexer.store import chains, coverage, facts
from indexer.store.coverage import HEAD_LANE, Covered, Span
from indexer.store.facts import Place
from indexer.store.leases import Lease
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics

log = structlog.get_logger(__name__)

WINDOW = 10_000  # blocks: half an hour of Base


@dataclass(frozen=True, slots=True)
class _Found:
    """What differs in one window: rows to store or correct, logs to withdraw, and whether all of it is settled."""

    rows: Decoded
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
        self._due = clock()

    async def look(self) -> int:
        """Reads again what is due; the number of differences found.

        Raises RpcError, Lie, Unsettled, LeaseLost: what was looked at stays so.
        """
        if self._clock() < self._due:
            return 0
        differences = 0
        if self._noticed:
            differences = await self._read_again(self._noticed)
        state = await chains.load_chain(self._lease.connection, self._chain.chain_id)
        if state is not None and state.finalized is not None:
            self._noticed = await coverage.unverified(
                self._lease.connection, self._chain.chain_id, state.finalized.number
            )
        self._due = self._clock() + self._chain.second_look_seconds
        return differences

    async def _read_again(self, owed: Mapping[bytes, Sequence[Span]]) -> int:
        state = await chains.load_chain(self._lease.connection, self._chain.chain_id)
        assert state is not None
        emitters = await chains.load_emitters(self._lease.connection, self._chain.chain_id)
        speakers = speakers_of(self._chain, await chains.load_programmes(self._lease.connection, self._chain.chain_id))
        plan, differences = Plan(owed), 0
        while (window := plan.next(WINDOW)) is not None:
            asked = set(window.emitters) - {HEAD_LANE}
            if HEAD_LANE in window.emitters:
                asked |= {e.address for e in emitters if e.followed_from is not None and e.followed_from <= window.high}
            found = await self._compare(window, asked, speakers, state.schedule)
            await self._store(window, owed, found)
            for token in found.rows.tokens:
                speakers.learn(token)
            differences += found.missing + len(found.withdrawn)
            await asyncio.sleep(1 / self._chain.verify_calls_per_second)
        return differences

    async def _compare(self, window: Window, asked: set[bytes], speakers: Speakers, schedule: object) -> _Found:
        raws = await self._rpc.logs_adaptive(sorted(asked), window.low, window.high)
        numbers = untimed(raws, self._schedule)
        return _Found(Decoded(), 0, [], True)
