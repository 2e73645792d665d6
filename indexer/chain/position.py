"""Where following a chain stands: cursor, floor, filter and speakers in memory, and their one way into the store.

Promises that memory never runs ahead of what is committed, except for a rewind: un-confirming the old branch waits for the
first blocks of the new one and is committed with them, so that readers never see a hole.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import structlog

from indexer.chain import witnesses
from indexer.chain.accord import Accord
from indexer.chain.decode import Decoded, Decoder
from indexer.chain.emitters import configured_emitters, load_speakers
from indexer.chain.integrity import verify_header
from indexer.chain.linkage import FinalityViolation, Held, Reorganised, Unsettled, ancestor_below
from indexer.chain.logs import headers_of
from indexer.chain.pool import Source
from indexer.chain.rpc import Rpc
from indexer.chain.schedule import BASE
from indexer.chain.steps import Gatherer, Step
from indexer.config import Chain
from indexer.model.types import Address, BlockRef, Hash32, Header, Schedule, hash32, hex0x
from indexer.store import chains, facts
from indexer.store.coverage import Covered
from indexer.store.leases import Lease
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics

log = structlog.get_logger(__name__)

Mode = Literal["socket", "polling"]
JUMP = 5_000  # blocks below finalized that following still catches up itself; more are history's to fill
ANCHOR = 1_000  # blocks below the head to begin at, where a node knows no finalized block
RECENT = 2_048  # held headers that are remembered without asking the store


def _ref(latched: Mapping[str, Any]) -> BlockRef:
    return BlockRef(latched["number"], hash32(latched["hash"]))


class Position:
    """See the module. Made by `open`; used by one task."""

    def __init__(
        self,
        chain: Chain,
        source: Source,
        lease: Lease,
        wakeups: Wakeups,
        gatherer: Gatherer,
        metrics: Metrics | None,
    ) -> None:
        self.chain, self.gatherer = chain, gatherer
        self._source, self._lease, self._wakeups, self._metrics = source, lease, wakeups, metrics
        self._count = source.count
        self.schedule: Schedule | None = gatherer.schedule
        self.cursor = BlockRef(0, Hash32(b""))
        self.cursor_time_s: int | None = None  # in this process
        self.floor = BlockRef(0, Hash32(b""))  # nothing at or below it is ever undone
        self._finalized: BlockRef | None = None
        self._orphan_above: int | None = None  # a rewind that waits for the first blocks of the new branch
        self._unfollowed: list[Address] = []  # in the filter, but not yet said to be so in the store
        self._recent: OrderedDict[int, BlockRef] = OrderedDict()
        self._mode: Mode | None = None
        self._pruned_to = 0
        self._sampled: BlockRef | None = None
        self._accord = Accord(chain.name, chain.chain_id, source, lease, metrics)

    @property
    def _rpc(self) -> Rpc:
        return self._source.rpc

    # --------------------------------------------------------------------- start

    @classmethod
    async def open(
        cls,
        chain: Chain,
        source: Source,
        lease: Lease,
        decoder: Decoder,
        wakeups: Wakeups,
        *,
        metrics: Metrics | None = None,
        schedules: Mapping[tuple[int, Hash32], Schedule] = BASE,
    ) -> Position:
        """Makes sure who the chain is, writes the configuration's emitters, and finds or makes the cursor.

        Raises WrongChain, ScheduleMismatch, FinalityViolation (a latch that nobody resolved), RpcError, Unsettled.
        """
        state = await chains.load_chain(lease.connection, chain.chain_id)
        genesis, schedule = await source.introduce(None if state is None else state.genesis_hash, schedules)
        if state is not None and state.latch is not None:
            ours, theirs = state.latch["ours"], state.latch["theirs"]
            raise FinalityViolation(chain.name, " and ".join(theirs["endpoints"]), _ref(ours), _ref(theirs))
        await source.pool.limits.load(lease.connection)
        async with lease.transaction() as conn:
            await chains.ensure_chain(conn, chain.chain_id, chain.name, genesis, schedule)
            await chains.set_demands(conn, chain.chain_id, source.pool.quorum, chain.proof)
            await chains.sync_emitters(conn, chain.chain_id, configured_emitters(chain))
        position = cls(chain, source, lease, wakeups, Gatherer(source, decoder, schedule), metrics)
        source.pool.ours = position.remembered
        if state is not None and state.cursor is not None:
            position.cursor = state.cursor
            position._finalized = state.finalized
        else:
            await position._begin()
        await position._find_floor(genesis)
        # what an earlier run left unpruned is near its last finalized block
        position._pruned_to = max(0, (position._finalized or position.cursor).number - 10_000)
        await position._refresh()
        if position._finalized is None:
            await position._take_in()
        if metrics is not None:
            metrics.latched.labels(chain.name).set(0)
            metrics.witnesses.labels(chain.name).set(1)  # with several endpoints, their looks say how many agree
        return position

    async def _begin(self) -> None:
        """The first cursor: the finalized block, so that nothing below it is ever undone by following."""
        agreed = await self._accord.first()
        raw = None if agreed is not None else await self._rpc.header("finalized")
        if agreed is not None:
            anchor = agreed
        elif raw is None:
            latest = await self._rpc.header("latest")
            if latest is None:
                raise Unsettled(f"{self._rpc.name} knows neither a finalized nor a latest block")
            number = max(0, verify_header(latest, self.schedule).number - ANCHOR)
            anchor = (await headers_of(self._rpc, [number], self.schedule, self._count))[0]
        else:
            anchor = verify_header(raw, self.schedule, count=self._count)
        await self._move(anchor)
        log.info("following from here on", chain=self.chain.name, block=anchor.number)

    async def _move(self, to: Header) -> None:
        """The cursor to a finalized block, without claiming what lies between: that is history's to fill."""
        await self.commit(Step([to], Decoded(), [], self.gatherer.filter), "polling")

    async def _find_floor(self, genesis: Hash32 | None) -> None:
        """Finalized; until there is such a block, genesis (also after a person accepted the node's chain). Where no endpoint keeps
        block 0: the block below all that we hold, as enough of them show it."""
        if self._finalized is not None:
            self.floor = self._finalized
        elif genesis is not None:
            self.floor = BlockRef(0, genesis)
        else:
            lowest = await chains.held_above(self._lease.connection, self.chain.chain_id, -1) or self.cursor
            pool, below = self._source.pool, max(0, lowest.number - 1)
            shown = await witnesses.shown(pool, below, pool.nodes)
            agreed = [block_hash for block_hash, nodes in shown.items() if len(nodes) >= pool.quorum]
            self.floor = BlockRef(below, agreed[0]) if agreed else lowest

    async def _refresh(self, upto: int | None = None) -> None:
        """Filter and speakers from the store: at start, after a rewind, and when history found tokens."""
        emitters = await chains.load_emitters(self._lease.connection, self.chain.chain_id)
        self.gatherer.speakers = await load_speakers(self._lease.connection, self.chain.chain_id, upto)
        self.gatherer.filter = frozenset(e.address for e in emitters)
        self._unfollowed = [e.address for e in emitters if e.followed_from is None]

    # --------------------------------------------------------------------- what we hold

    def remembered(self, number: int) -> BlockRef | None:
        """The highest block at or below a height that is in memory."""
        if number >= self.cursor.number:
            return self.cursor
        if (ref := self._recent.get(number)) is not None:
            return ref
        return next((ref for n, ref in reversed(self._recent.items()) if n <= number), None)

    async def held(self, number: int) -> BlockRef | None:
        if number > self.cursor.number:  # after a rewind the store still has the old branch
            return None
        return self._recent.get(number) or await chains.held(self._lease.connection, self.chain.chain_id, number)

    async def held_at_or_below(self, number: int) -> BlockRef | None:
        number = min(number, self.cursor.number)
        return self._recent.get(number) or await chains.held_at_or_below(
            self._lease.connection, self.chain.chain_id, number
        )

    def as_held(self) -> Held:
        return Held(self.chain.name, self.schedule, self.floor, self.held, self.held_at_or_below, self._count)

    # --------------------------------------------------------------------- moving

    async def commit(self, step: Step, mode: Mode) -> None:
        """Stores one step: the un-confirming of an old branch, the new blocks and events, the cursor. One transaction.

        Raises Unsettled for a block of the future that others do not show.
        """
        if self._source.pool.ahead_of_time(step.head):
            raise Unsettled(f"{self._rpc.name} shows block {step.head.number} before its time, {step.head.time_s} s")
        async with self._lease.transaction() as conn:
            done = await facts.commit_step(
                conn,
                self.chain.chain_id,
                head=step.head,
                headers=step.headers,
                rows=step.rows,
                covered=step.covered,
                mode=mode,
                orphan_above=self._orphan_above,
                agreed=self._accord.stands,
                proven=step.proven,
                read_from=step.read_from,
            )
        self._wakeups.poke(*(("facts", "heads") if done.events or done.orphaned_events else ("heads",)))
        if self._orphan_above is not None and self._metrics is not None:
            self._metrics.saw_reorganisation(self.chain.name, done.orphaned_blocks)
        self._orphan_above = None
        self.cursor, self._mode, self.cursor_time_s = step.head.ref, mode, step.head.time_s
        for token in step.rows.tokens:
            self.gatherer.speakers.learn(token)
        self.gatherer.filter = self.gatherer.filter | step.filter
        for header in step.headers:
            self._recent[header.number] = header.ref
        while len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        self._count_step(step, mode)

    async def rewind(self, ancestor: BlockRef) -> None:
        """Back to the common ancestor, in memory; the next commit makes it so in the store."""
        log.info(
            "reorganised", chain=self.chain.name, ancestor=ancestor.number, depth=self.cursor.number - ancestor.number
        )
        self.cursor = ancestor
        self._orphan_above = ancestor.number if self._orphan_above is None else min(self._orphan_above, ancestor.number)
        self._recent = OrderedDict((n, ref) for n, ref in self._recent.items() if n <= ancestor.number)
        self._sampled = None
        await self._refresh(upto=self._orphan_above)

    async def undone(self, ancestor: BlockRef) -> bool:
        """Whether enough endpoints have left our branch above `ancestor`, as the lead says; with one endpoint, it has.

        Where they have not, one that holds what most hold takes over: it outvotes the lead.
        """
        pool = self._source.pool
        if not pool.several or pool.quorum == 1:
            return True
        conflict = await chains.held_above(self._lease.connection, self.chain.chain_id, ancestor.number)
        if conflict is None or conflict.number > self.cursor.number:
            return True  # nothing of ours is undone: a rewind that was agreed on waits for its first blocks
        verdict = await witnesses.judge(pool, conflict)
        if verdict.undone:
            if self._source.lead in verdict.against:
                return True
            self._source.prefer(verdict.against, f"most show another block {conflict.number}")
            return False
        log.warning(
            "endpoints disagree",
            chain=self.chain.name,
            block=conflict.number,
            ours=[node.name for node in verdict.holders],
            others=[node.name for node in verdict.against],
        )
        self._source.prefer(verdict.holders, f"it holds block {conflict.number} as we do")
        return False

    async def sides(self, violation: FinalityViolation) -> FinalityViolation | None:
        """A finality violation that enough endpoints show, with those that show each side; None where they do not."""
        pool = self._source.pool
        if not pool.several or pool.quorum == 1:
            return violation
        verdict = await witnesses.judge(pool, violation.ours)
        if verdict.undone and verdict.theirs is not None:
            return FinalityViolation(
                self.chain.name,
                " and ".join(node.name for node in verdict.against),
                violation.ours,
                verdict.theirs,
                [node.name for node in verdict.holders],
                [node.name for node in verdict.against],
            )
        self._source.prefer(verdict.holders, f"it holds block {violation.ours.number} as we do")
        return None

    async def latch(self, violation: FinalityViolation) -> None:
        """Stores both sides of a finality violation: signals of this chain stop until a person decides."""
        ours, theirs = violation.ours, violation.theirs
        async with self._lease.transaction() as conn:
            await chains.set_latch(
                conn,
                self.chain.chain_id,
                {
                    "ours": {"number": ours.number, "hash": hex0x(ours.hash), "endpoints": violation.holders},
                    "theirs": {"number": theirs.number, "hash": hex0x(theirs.hash), "endpoints": violation.against},
                    "at": datetime.now(UTC).isoformat(timespec="seconds"),
                },
            )
        self._wakeups.poke("heads")
        if self._metrics is not None:
            self._metrics.latched.labels(self.chain.name).set(1)

    async def keep_mode(self, mode: Mode) -> None:
        if self._mode != mode:
            async with self._lease.transaction() as conn:
                await chains.set_mode(conn, self.chain.chain_id, mode)
            self._mode = mode
            self._show_mode(mode)

    # --------------------------------------------------------------------- safe and finalized

    async def look_at_tags(self) -> None:
        """Safe and finalized, tokens that history found, old headers: what is due every few seconds.

        Raises Reorganised, FinalityViolation, Lie, RpcError.
        """
        await self._accord.tell(self.cursor, self.cursor_time_s)
        safe, finalized = await self._tag("safe"), await self._tag("finalized")
        if finalized is not None and finalized.number > self.cursor.number + JUMP:
            await self._jump(finalized)
        if finalized is not None:
            await self._compare_finalized(finalized)
        on_ours = await self._on_our_chain([tag for tag in (safe, finalized) if tag is not None])
        safe, finalized = (tag if tag in on_ours else None for tag in (safe, finalized))
        if safe is not None or finalized is not None:
            async with self._lease.transaction() as conn:
                moved = await chains.set_tags(conn, self.chain.chain_id, safe, finalized)
            if moved:
                self._wakeups.poke("heads")
            if "finalized" in moved and finalized is not None:
                self._finalized = self.floor = finalized.ref
                await self._prune(finalized.number)
            self._show_tags(safe if "safe" in moved else None, finalized if "finalized" in moved else None)
        await self._source.pool.limits.save(self._lease)
        if self._orphan_above is None and await chains.any_unfollowed(self._lease.connection, self.chain.chain_id):
            await self._refresh()
            await self._take_in()

    async def _take_in(self) -> None:
        """Emitters that are new to following (configured, or found by history): what they logged since finalized is read
        now, since history will not reach it before it is finalized; from the next block on the head lane has them."""
        new = frozenset(self._unfollowed)
        if not new:
            return
        rows, headers, covered = Decoded(), [], []
        if self._finalized is not None and self.cursor.number > self.floor.number:
            raws = await self._rpc.logs_adaptive(sorted(new), self.floor.number + 1, self.cursor.number)
            end = (await headers_of(self._rpc, [self.cursor.number], self.schedule, self._count))[0]
            if end.hash != self.cursor.hash:
                raise Unsettled(f"{self._rpc.name}: block {end.number} is not the one that was followed")
            step = await self.gatherer.by_range(self.floor, end, raws, new)
            rows, headers = step.rows, step.headers
            covered = [Covered(e, self.floor.number + 1, self.cursor.number, "unverified") for e in sorted(new)]
        async with self._lease.transaction() as conn:
            done = await facts.commit_range(
                conn,
                self.chain.chain_id,
                rows=rows,
                headers=headers,
                covered=covered,
                read_from=self._rpc.name,
            )
            await chains.set_followed(conn, self.chain.chain_id, self._unfollowed, self.cursor.number + 1)
        self._unfollowed = []
        if done.events:
            self._wakeups.poke("facts")

    async def _tag(self, tag: Literal["safe", "finalized"]) -> Header | None:
        if self._source.pool.several:
            return await witnesses.agreed(self._source.pool, tag)
        raw = await self._rpc.header(tag)
        header = None if raw is None else verify_header(raw, self.schedule, count=self._count)
        self._source.pool.tagged(self._source.lead, tag, header)
        return header

    async def _jump(self, finalized: Header) -> None:
        """After a long outage: on from finalized; what lies between is history's to fill."""
        theirs = (await headers_of(self._rpc, [self.cursor.number], self.schedule, self._count))[0]
        if theirs.hash != self.cursor.hash:
            raise Reorganised(await ancestor_below(self.cursor.number, self.as_held(), self._rpc))
        log.info("far behind", chain=self.chain.name, left_to_history=finalized.number - self.cursor.number)
        await self._move(finalized)

    async def _compare_finalized(self, finalized: Header) -> None:
        """A finalized block that is not ours, where ours is finalized too, is a violation, however old."""
        if self._finalized is None or finalized.number > self._finalized.number:
            return
        ours = await chains.held(self._lease.connection, self.chain.chain_id, finalized.number)
        if ours is not None and ours.hash != finalized.hash:
            raise FinalityViolation(self.chain.name, self._rpc.name, ours, finalized.ref)

    async def _on_our_chain(self, tags: list[Header]) -> list[Header]:
        """Those that are on the chain which we hold: by our own header at that height, else by what the node shows at that
        height and at the cursor. Where a sample of a while ago is not on the node's chain any more: Reorganised."""
        good, open_ones = [], []
        for tag in tags:
            if tag.number > self.cursor.number:
                continue
            ours = await self.held(tag.number)
            if ours is None:
                open_ones.append(tag)
            elif ours.hash == tag.hash:
                good.append(tag)
        # When polling, ranges are linked by their ends alone; an end of some seconds ago must still be there.
        sampled, self._sampled = self._sampled, self.cursor
        if not open_ones and (sampled is None or self._mode == "socket"):
            return good
        references = [ref for ref in (sampled, self.cursor) if ref is not None]
        wanted = [*(t.number for t in open_ones), *(r.number for r in references)]
        try:
            shown = await self._source.ask(
                lambda node: headers_of(node.rpc, wanted, self.schedule, self._source.pool.counting(node.name))
            )
        except Unsettled:  # the node lags
            return good
        for ref, header in zip(references, shown[len(open_ones) :], strict=True):
            if header.hash != ref.hash:
                raise Reorganised(await ancestor_below(ref.number, self.as_held(), self._rpc))
        return good + [tag for tag, header in zip(open_ones, shown, strict=False) if header.hash == tag.hash]

    async def _prune(self, finalized: int) -> None:
        """Headers that nobody needs any more, a thousand heights a transaction."""
        low = self._pruned_to
        while low < finalized:
            below = min(finalized, (low // 1000 + 10) * 1000)
            async with self._lease.transaction() as conn:
                await chains.prune_headers(conn, self.chain.chain_id, low, below)
            low = below
        self._pruned_to = max(0, finalized - finalized % 1000)

    # --------------------------------------------------------------------- metrics

    def _count_step(self, step: Step, mode: Mode) -> None:
        if self._metrics is None:
            return
        metrics, name = self._metrics, self.chain.name
        metrics.saw_head(name, "head", step.head.number, step.head.time_ms)
        self._show_mode(mode)
        for event, rows in (
            ("programme", step.rows.programmes),
            ("movement", step.rows.movements),
            ("transfer", step.rows.transfers),
            ("programme_event", step.rows.programme_events),
            ("raw_log", step.rows.raw_logs),
        ):
            if rows:
                metrics.events.labels(name, event).inc(len(rows))
        for reason, number in step.rows.lookalikes.items():
            metrics.lookalikes.labels(name, reason).inc(number)
        for reason, number in step.rows.quarantined.items():
            metrics.quarantined_logs.labels(name, reason).inc(number)

    def _show_mode(self, mode: Mode) -> None:
        if self._metrics is not None:
            for each in ("socket", "polling"):
                self._metrics.following.labels(self.chain.name, each).set(each == mode)

    def _show_tags(self, safe: Header | None, finalized: Header | None) -> None:
        if self._metrics is not None:
            if safe is not None:
                self._metrics.saw_head(self.chain.name, "safe", safe.number, safe.time_ms)
            if finalized is not None:
                self._metrics.saw_head(self.chain.name, "finalized", finalized.number, finalized.time_ms)
