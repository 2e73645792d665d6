"""The head of one chain and its reorganisations: heads → link → reorganised? → fetch → check → commit.

Promises that what is stored as canonical is one chain down to finalized, that each commit leaves facts and cursor in step,
and that a node which merely lags undoes nothing. It decides nothing about operations; history below finalized is filled by
`backfill.py`, behind the head.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping

import structlog
from msgspec.structs import replace

from indexer.chain import linkage
from indexer.chain.decode import Decoder
from indexer.chain.feed import HeadFeed, Heads
from indexer.chain.integrity import Count, Lie, verify_header
from indexer.chain.linkage import FinalityViolation, Reorganised, Unsettled
from indexer.chain.logs import headers_of
from indexer.chain.pool import LAG, Node, Overtaken, Source
from indexer.chain.position import Mode, Position
from indexer.chain.rpc import Poll, Rpc
from indexer.chain.rpc_errors import BeyondHead, RpcError
from indexer.chain.schedule import BASE
from indexer.chain.spans import asks_for_less
from indexer.chain.steps import Gatherer
from indexer.chain.wire import RawHeader
from indexer.config import Chain
from indexer.model.types import BlockRef, Hash32, Header, Schedule
from indexer.store.leases import Lease
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics

log = structlog.get_logger(__name__)

GROUP = 25  # heads of one commit: five seconds of Base
FILL = 100  # headers asked for at once to close a gap
RANGE = 2_000  # blocks of one polling batch: what Base's own endpoint takes
FAR = 500  # blocks behind: from here on ranges are cheaper than headers
PATIENCE = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds before asking again, by how often it failed
MOVING = 3  # … of which so many at most while the chain moves, or answers do not fit: a second
DISTRUST = 5  # failures in a row after which one round is polled although the socket speaks (it may be another chain's)


async def follow(
    chain: Chain,
    source: Source,
    heads: Heads | None,
    lease: Lease,
    wakeups: Wakeups,
    decoder: Decoder,
    *,
    metrics: Metrics | None = None,
    schedules: Mapping[tuple[int, Hash32], Schedule] = BASE,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Follows until cancelled, asking whoever leads in `source`: when it errs or lies, the next one takes over at once.

    `heads` opens a subscription; None polls. `clock` gives monotonic seconds.

    Raises LeaseLost, WrongChain and ScheduleMismatch (not to be retried), FinalityViolation (after latching it), RpcError
    where the chain can't be identified at start. Everything transient is waited out.
    """
    position = await Position.open(chain, source, lease, decoder, wakeups, metrics=metrics, schedules=schedules)
    follower = _Follower(chain, source, position)
    feed = HeadFeed(chain.name, heads)
    failures, patience, tags_due = 0, 0, clock()
    async with feed.running():
        while True:
            try:
                if failures:
                    await asyncio.sleep(PATIENCE[min(failures - 1, patience)])
                await source.identify()
                if clock() >= tags_due:
                    await position.look_at_tags()
                    tags_due = clock() + chain.tags_seconds
                busy = follower.behind(follower.listens(feed, failures))
                wait = 0.0 if busy else min(chain.poll_seconds, max(0.0, tags_due - clock()))
                follower.announced(await feed.next(GROUP, wait))
                before = position.cursor
                if follower.listens(feed, failures):
                    await follower.advance()
                else:
                    await follower.poll()
                failures = 0
                if position.cursor != before:
                    source.worked()
            except Reorganised as reorganised:
                if await position.undone(reorganised.ancestor):
                    await position.rewind(reorganised.ancestor)
                else:
                    failures, patience = failures + 1, MOVING
            except FinalityViolation as violation:
                # an endpoint that serves another chain now contradicts nothing of ours: WrongChain, and no latch
                source.lead.identified = False
                await source.identify()
                if (shown := await position.sides(violation)) is not None:
                    await position.latch(shown)
                    raise shown from None
                failures, patience = failures + 1, MOVING
            except Overtaken as overtaken:
                log.debug("begun again elsewhere", chain=chain.name, reason=str(overtaken))
            except (Unsettled, Lie, RpcError) as trouble:
                if source.failed(trouble):
                    continue
                failures += 1
                patience = len(PATIENCE) - 1 if isinstance(trouble, RpcError) else MOVING
                log.log(
                    logging.WARNING if failures in (3, 10, 100) else logging.DEBUG,
                    "asking again",
                    chain=chain.name,
                    reason=str(trouble),
                )


class _Follower:
    """From announced heads, or from polling, to commits."""

    def __init__(self, chain: Chain, source: Source, position: Position) -> None:
        self._chain, self._source, self._position = chain, source, position
        self._count = source.count
        self._count_announced = source.pool.counting(chain.socket_name or "")  # the socket's lies are its own
        self._gatherer: Gatherer = position.gatherer
        self._heads: deque[Header] = deque(maxlen=512)
        self._latest: int | None = None  # the height of `_asked` at the last poll
        self._asked = source.lead
        self._owed = False  # whoever took over in the middle of a poll told only how far it is: it has more
        self._strange = 0  # announced heads in a row that the lead does not show

    @property
    def _rpc(self) -> Rpc:
        return self._source.rpc

    @property
    def misled(self) -> bool:
        """The socket tells of a branch that the endpoints do not show, or is far behind them: they are polled."""
        ours, lead = self._position.cursor_time_s, self._source.lead.time_s
        return self._strange >= DISTRUST or (ours is not None and lead - ours > LAG)

    def listens(self, feed: HeadFeed, failures: int) -> bool:
        """Whether the next step is made of what the socket tells, and not by polling."""
        return feed.live and failures < DISTRUST and not self.misled

    def behind(self, listening: bool) -> bool:
        """Whether there is work that waits for nothing. Who listens waits for a head: what polls left undone is a gap before it."""
        return bool(self._heads) or (not listening and (self._owed or self._far()))

    # --------------------------------------------------------------------- every header

    def announced(self, raws: list[RawHeader]) -> None:
        """Takes in heads of the socket; a header that is not what it says is counted and dropped (the gap is filled)."""
        for raw in raws:
            try:
                self._heads.append(verify_header(raw, self._position.schedule, count=self._count_announced))
            except Lie as lie:
                log.warning("dropped an announced head", chain=self._chain.name, reason=str(lie))

    async def advance(self, mode: Mode = "socket") -> None:
        """Commits what was announced, in groups. Raises Reorganised, with the heads still waiting."""
        while self._heads:
            self._latest = max(head.number for head in self._heads)
            if self._latest - self._position.cursor.number > FAR:
                await self.catch_up(self._latest - GROUP)
            if linked := await self._linked():
                await self._position.commit(await self._gatherer.by_headers(linked), mode)

    async def _linked(self) -> list[Header]:
        """The next headers that follow the cursor: the waiting ones, or those of a gap before them. Empty: a head was old."""
        cursor, head = self._position.cursor, self._heads[0]
        if head.number <= cursor.number:
            ours = await self._position.held(head.number) if head.number > self._position.floor.number else None
            if ours is not None and ours.hash != head.hash and await self._shown(head):
                raise Reorganised(await linkage.ancestor_of(head, self._position.as_held(), self._rpc))
            self._heads.popleft()  # repeated, or a node that lags: it undoes nothing
            return []
        if head.number > cursor.number + 1:
            return await self._gap(cursor, min(head.number - 1, cursor.number + FILL))
        linked: list[Header] = []
        at = cursor
        while self._heads and len(linked) < GROUP and self._heads[0].parent_hash == at.hash:
            linked.append(self._heads.popleft())
            at = linked[-1].ref
        if not linked:
            if await self._shown(head):
                raise Reorganised(await linkage.ancestor_of(head, self._position.as_held(), self._rpc))
            self._heads.popleft()
        self._strange = 0 if linked else self._strange + 1
        return linked

    async def _shown(self, head: Header) -> bool:
        """Whether the node, asked by number, shows the announced head: a late message of a branch that lost undoes nothing."""

        async def shown(node: Node) -> Header:
            raw = await node.rpc.header(head.number) if await self._reaches(node, head.number) else None
            if raw is None:
                raise Unsettled(f"block {head.number} was announced, and {node.name} does not serve it")
            return verify_header(raw, self._position.schedule, head.number, count=self._counting(node))

        return (await self._source.ask(shown)).hash == head.hash

    async def _gap(self, cursor: BlockRef, high: int) -> list[Header]:
        """Headers of cursor+1 … high, linked to each other. Raises Reorganised when they do not follow the cursor."""

        async def shown(node: Node) -> list[Header]:
            if not await self._reaches(node, high):
                raise Unsettled(f"block {high} was announced, and {node.name} has not come so far")
            wanted = range(cursor.number + 1, high + 1)
            return await headers_of(node.rpc, wanted, self._position.schedule, self._counting(node))

        headers = await self._source.ask(shown)
        for parent, child in itertools.pairwise(headers):
            if child.parent_hash != parent.hash:
                raise Unsettled(f"{self._rpc.name}: block {child.number} does not follow block {parent.number}")
        if headers[0].parent_hash != cursor.hash:
            raise Reorganised(await linkage.ancestor_of(headers[0], self._position.as_held(), self._rpc))
        return headers

    async def _reaches(self, node: Node, number: int) -> bool:
        """With several endpoints, whether this one reported so high a head; the only one is asked in any case."""
        return not self._source.pool.several or await node.reaches(number)

    def _counting(self, node: Node) -> Count | None:
        return self._source.pool.counting(node.name)

    # --------------------------------------------------------------------- ranges

    async def poll(self) -> None:
        """One look at the head without a socket: the range since the cursor, or every header of it."""
        self._strange = 0
        if self._asked is not self._source.lead:
            self._asked, self._latest = self._source.lead, None
        if self._chain.follow == "every-header" and not self._far():
            raw = await self._source.ask(lambda node: node.rpc.header("latest"))
            if raw is None:
                raise Unsettled(f"{self._rpc.name} knows no latest block")
            self._heads.append(verify_header(raw, self._position.schedule, count=self._count))
            await self.advance("polling")
            return
        self._heads.clear()  # of a socket that is silent now
        await self._range()

    async def catch_up(self, to: int) -> None:
        """Up to `to` by ranges."""
        while self._position.cursor.number < to:
            before = self._position.cursor.number
            await self._range(to)
            if self._position.cursor.number == before:
                raise Unsettled(f"blocks up to {to} were announced, and {self._rpc.name} serves none above {before}")

    def _far(self) -> bool:
        return self._latest is None or self._latest - self._position.cursor.number > FAR

    async def _range(self, to: int | None = None) -> None:
        cursor = self._position.cursor
        known = cursor.number if self._latest is None else self._latest
        wanted = sorted(self._gatherer.filter)
        lead = self._source.lead

        async def polled(node: Node) -> tuple[Poll, int]:
            upto = known if to is None else to
            if node is not lead:
                upto = min(upto, node.head)  # that it reported: a range above it may come back empty
            span = min(RANGE, node.rpc.limits.max_span or RANGE)
            high = max(cursor.number, min(upto, cursor.number + span))
            try:
                return await node.rpc.poll(cursor.number, high, wanted), high
            except RpcError as refusal:
                if isinstance(refusal, BeyondHead) or not asks_for_less(refusal):
                    raise
            poll = await node.rpc.poll(cursor.number, high, [])
            logs = await node.rpc.logs_adaptive(wanted, cursor.number + 1, high, count=self._counting(node))
            return replace(poll, logs=logs), high

        try:
            poll, high = await self._source.ask(polled, hedged=known - cursor.number <= FAR)
        except BeyondHead:
            return  # another backend than the one that told its height
        latest = verify_header(poll.latest, self._position.schedule, count=self._count)
        self._asked, self._owed = self._source.lead, self._source.lead is not lead and latest.number > high
        self._latest = latest.number
        self._source.lead.reported(latest.number, asyncio.get_running_loop().time())
        if poll.cursor is None or latest.number < cursor.number:
            await self._lagging(latest)
            return
        if verify_header(poll.cursor, self._position.schedule, cursor.number, count=self._count).hash != cursor.hash:
            raise Reorganised(await linkage.ancestor_below(cursor.number, self._position.as_held(), self._rpc))
        if poll.end is None or high == cursor.number:
            await self._position.keep_mode("polling")
            return
        end = verify_header(poll.end, self._position.schedule, high, count=self._count)
        await self._position.commit(await self._gatherer.by_range(cursor, end, poll.logs), "polling")

    async def _lagging(self, latest: Header) -> None:
        """The node's head is below our cursor: it lags, unless a block that we both should hold is not the same."""
        ours = await self._position.held_at_or_below(latest.number)
        if latest.number <= self._position.floor.number or ours is None:
            return
        theirs = latest if ours.number == latest.number else None
        if theirs is None:
            theirs = (await headers_of(self._rpc, [ours.number], self._position.schedule, self._count))[0]
        if theirs.hash != ours.hash:
            raise Reorganised(await linkage.ancestor_below(ours.number, self._position.as_held(), self._rpc))
