"""What people asked to have read again: audits, replays and redecoding, a few windows at a time beside the rest of history.

Promises that all of it happens under the fence of the history's lease, that how far it is commits with what it stored, so
that it goes on where it was after a kill, and that facts are put right without a signal sent twice: blocks are touched, and
the reconciler decides. Blocks above finalized are the follower's, and left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import structlog

from indexer.chain.comparison import Comparison, Findings, WasRead
from indexer.chain.coverage import Stride, read_before
from indexer.chain.decode import Speakers
from indexer.chain.emitters import load_speakers
from indexer.chain.integrity import Lie
from indexer.chain.linkage import Unsettled
from indexer.chain.reading import Ranges, Task, second_readers
from indexer.chain.rpc_errors import RpcError
from indexer.chain.wire import Log
from indexer.store import chains, coverage, facts, rereads, stored
from indexer.store.coverage import HEAD_LANE, Covered, Readers, Span
from indexer.store.rereads import Reread

log = structlog.get_logger(__name__)

FIRST_WINDOW = 2_000  # blocks
LARGEST_WINDOW = 100_000
LISTED = 500  # differences that a report names; all are counted
RAW = 1_000  # logs decoded again in one transaction

FINDINGS: Final = ("missing", "extra", "different")


class Cancelled(Exception):
    """The request was cancelled while its window was read: nothing of that window is stored."""


class Rereading:
    """Carries out the open requests of one chain, the oldest first. Used by the task that fills history."""

    def __init__(self, task: Task) -> None:
        self._task, self._chain_id, self._lease = task, task.chain.chain_id, task.lease
        self._strides: dict[object, Stride] = {}

    async def work(self, windows: int = 20) -> bool:
        """So many windows of the oldest request; False where there is none.

        Raises RpcError, Lie, Unsettled, LeaseLost: the request goes on from where it is in a later round.
        """
        request = await rereads.oldest_open(self._lease.connection, self._chain_id)
        if request is None:
            return False
        ranges = await Ranges.open(self._task)
        if ranges is None:
            await self.waits_for("nothing is finalized yet")
            return False
        if request.state == "waiting":
            started = await self._begin(request, ranges.anchor.number)
            if started is None:
                return True
            request = started
        try:
            if request.kind == "redecode":
                await self._decode_again(request)
            else:
                await self._read_again(request, ranges, windows)
        except Cancelled:
            log.info("a request was cancelled", chain=self._task.chain.name, kind=request.kind, request=str(request.id))
        return True

    async def waits_for(self, reason: str) -> None:
        """Tells whoever looks at the open requests why they do not move."""
        async with self._lease.transaction() as conn:
            await rereads.hold_up(conn, self._chain_id, reason)

    async def _begin(self, request: Reread, finalized: int) -> Reread | None:
        """The request as it runs; None where it can't."""
        wrong = None
        if request.low > finalized:
            wrong = f"block {request.low} is not finalized yet ({finalized} is): blocks above are followed, not re-read"
        elif request.abi is not None and request.abi != self._task.decoder.fingerprint:
            wrong = (
                "the daemon that fills this chain's history was started with other ABI files than the command: restart it, "
                "then ask again"
            )
        async with self._lease.transaction() as conn:
            if wrong is not None:
                await rereads.fail(conn, request.id, wrong)
                return None
            await rereads.begin(conn, request.id, finalized if request.high is None else min(request.high, finalized))
            return await rereads.oldest_open(conn, self._chain_id)

    # --------------------------------------------------------------------- audit, replay

    async def _read_again(self, request: Reread, ranges: Ranges, windows: int) -> None:
        conn = self._lease.connection
        emitters = await chains.load_emitters(conn, self._chain_id)
        gaps = await coverage.gaps(conn, self._chain_id, ranges.anchor.number)
        starts: dict[bytes, int] = {e.address: e.start_block for e in emitters}
        speakers = await load_speakers(conn, self._chain_id)
        stride = self._strides.setdefault(request.id, Stride(FIRST_WINDOW, LARGEST_WINDOW))
        assert request.high is not None and request.next_block is not None
        low, report = request.next_block, request.report
        for _ in range(windows):
            high = min(request.high, low + stride.blocks - 1)
            asked = frozenset(address for address, start in starts.items() if start <= high)
            found = await self._elsewhere(ranges, speakers, low, high, asked, read_before(gaps, starts))
            stride.adapt(high - low + 1, found.logs)
            report = _added(report, found, low, high, repaired=request.kind != "audit")
            await self._store(request, found, asked, gaps, (low, high), report)
            for token in found.tokens if request.kind != "audit" else ():
                speakers.learn(token)
            if high == request.high:
                self._strides.pop(request.id)
                return
            low = high + 1

    async def _elsewhere(
        self, ranges: Ranges, speakers: Speakers, low: int, high: int, asked: frozenset[bytes], was_read: WasRead
    ) -> Findings:
        """What another endpoint than the first reading's shows; the one at hand, where none can be asked."""
        runs = await coverage.readers(self._lease.connection, self._chain_id, low, high)
        first = Readers(low, high, frozenset().union(*(run.endpoints for run in runs)))
        tasks, _ = second_readers(self._task, first)
        others = [task for task in tasks if task.source.lead is not self._task.source.lead]
        for task in others[:1]:
            try:
                other = await Ranges.open(task)
                assert other is not None, "something is finalized"
                return await Comparison(task, other, speakers).window(low, high, asked, was_read)
            except (RpcError, Lie, Unsettled) as trouble:
                log.warning(
                    "re-reading at another endpoint failed: the one at hand is asked",
                    chain=self._task.chain.name, endpoint=task.rpc.name, reason=str(trouble),
                )  # fmt: skip
        return await Comparison(self._task, ranges, speakers).window(low, high, asked, was_read)

    async def _store(
        self,
        request: Reread,
        found: Findings,
        asked: frozenset[bytes],
        gaps: Mapping[bytes, Sequence[Span]],
        window: tuple[int, int],
        report: Mapping[str, Any],
    ) -> None:
        low, high = window
        mends = request.kind != "audit"
        async with self._lease.transaction() as conn:
            if mends:
                first_time = [
                    Covered(e, max(low, s.low), min(high, s.high), "unverified")
                    for e in asked
                    for s in gaps.get(e, ())
                    if s.low <= high and s.high >= low
                ]
                await facts.commit_range(
                    conn, self._chain_id, rows=found.rows, covered=first_time, withdraw=found.withdraw, repair=True,
                    touch=window if request.kind == "replay" else None,
                )  # fmt: skip
            if request.kind == "replay":
                await coverage.doubt(conn, self._chain_id, [*asked, HEAD_LANE], low, high)
            elif found.differences:
                # what was wrong, or still is, is looked at once more before anything rests on it
                doubted = {difference.emitter for difference in found.differences}
                numbers = [difference.place.number for difference in found.differences]
                await coverage.doubt(conn, self._chain_id, [*doubted, HEAD_LANE], min(numbers), max(numbers))
            if not await rereads.advance(conn, request.id, high + 1, report, done=high == request.high):
                raise Cancelled
        if mends:
            self._task.wakeups.poke("facts")
        self._tell(request, found, window)

    def _tell(self, request: Reread, found: Findings, window: tuple[int, int]) -> None:
        if not found.differences:
            return
        counts = {what: found.count(what) for what in FINDINGS}
        mends = request.kind != "audit"
        log.error(
            "another reading found differences" + (", and repaired them" if mends else ""),
            chain=self._task.chain.name, endpoint=self._task.rpc.name, kind=request.kind,
            from_block=window[0], to_block=window[1], **counts,
        )  # fmt: skip
        if self._task.metrics is not None:
            for what, number in counts.items():
                self._task.metrics.reread_differences.labels(
                    self._task.chain.name, what, "repaired" if mends else "reported"
                ).inc(number)

    # --------------------------------------------------------------------- redecode

    async def _decode_again(self, request: Reread) -> None:
        """One batch: what can be read now moves from `raw_log` into the tables of its kind."""
        speakers = await load_speakers(self._lease.connection, self._chain_id)
        assert request.high is not None and request.next_block is not None
        async with self._lease.transaction() as conn:
            raws = await rereads.raw_logs(conn, self._chain_id, request.next_block, request.high, RAW)
            logs = [
                Log(
                    raw["emitter"], tuple(raw["topics"]), raw["data"], raw["block_number"], raw["block_hash"],
                    raw["block_time_ms"], raw["tx_hash"], raw["tx_index"], raw["log_index"],
                )
                for raw in raws
            ]  # fmt: skip
            decoded = self._task.decoder.decode(logs, speakers)
            read = {
                place: reading for place, reading in stored.as_stored(decoded).items() if not stored.only_raw(reading)
            }
            # an oversized log keeps a raw row, for another reason: the old one makes room for it
            await rereads.drop_raw(conn, self._chain_id, list(read))
            await facts.commit_range(conn, self._chain_id, rows=facts.only(decoded, read.keys()), covered=[])
            done = len(raws) < RAW
            counts = Counter(request.report) + Counter(logs=len(raws), moved=len(read), left=len(raws) - len(read))
            moved_on = request.high + 1 if done else raws[-1]["block_number"] + 1
            if not await rereads.advance(conn, request.id, moved_on, counts, done=done):
                raise Cancelled
        if read:
            self._task.wakeups.poke("facts")


def _added(report: Mapping[str, Any], found: Findings, low: int, high: int, *, repaired: bool) -> dict[str, Any]:
    """The report with one window more."""
    counts: dict[str, int] = {what: found.count(what) for what in FINDINGS} | {
        "blocks": high - low + 1,
        "logs": found.logs,
        "unread": found.unread,
        "readable": found.readable,
        "repaired": len(found.differences) if repaired else 0,
    }
    listed: list[dict[str, object]] = list(report.get("differences", ()))
    unsettled: list[list[str]] = list(report.get("unsettled", ()))
    if not found.settled:
        unsettled.append([str(low), str(high)])
    shown = [difference.shown() for difference in found.differences[: LISTED - len(listed)]]
    return {
        **{name: number + report.get(name, 0) for name, number in counts.items()},
        "differences": listed + shown,
        "unsettled": unsettled,
    }
