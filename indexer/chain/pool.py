"""Many endpoints of one chain: whom a loop asks, who takes over when that one errs or lies, and who is put aside for a while.

Promises that a step is gathered from one endpoint, that an endpoint of another chain is never asked while another is right,
and that each quarantine has its reason, its end, and leaves at least one endpoint to ask. What endpoints agree on is for
`witnesses.py`; what an answer is worth, for the checks.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal, TypeVar

import structlog

from indexer.chain.hedging import Contender, Credit, Usual, raced
from indexer.chain.integrity import Count, Lie, Observed, Outcome, proven_logs
from indexer.chain.limits import Limits
from indexer.chain.linkage import Unsettled
from indexer.chain.rpc import Rpc
from indexer.chain.rpc_errors import MethodMissing, PrunedHistory, RpcError
from indexer.chain.schedule import BASE, ScheduleMismatch, WrongChain, check_chain_id, check_genesis, discover
from indexer.chain.wire import RawReceipt
from indexer.model.types import BlockRef, Hash32, Header, Schedule
from indexer.telemetry import Metrics

log = structlog.get_logger(__name__)

T = TypeVar("T")
Role = Literal["primary", "fallback", "archive"]
Purpose = Literal["head", "history"]
Why = Literal["lie", "fork", "wrong_chain"]
CountOf = Callable[[str, str, Outcome], None]  # endpoint, check, outcome

ORDER: Final[Mapping[Purpose, tuple[Role, ...]]] = {
    "head": ("primary", "fallback", "archive"),
    "history": ("archive", "primary", "fallback"),
}
QUARANTINE: Final = (60.0, 300.0, 1800.0)  # seconds, by how often
REST: Final = (
    1.0,
    2.0,
    5.0,
    10.0,
    30.0,
)  # seconds that an endpoint is not preferred after an error, by how often in a row
UNFIT: Final = 600.0  # … after one that asking again does not change: too old for it, or no such method
SLOW: Final = (0.0, 5.0, 30.0, 60.0, 300.0)  # seconds without the lead for one that was too slow, by how often
FORGIVEN: Final = 600.0  # … counted anew when it was not for so long
LAG: Final = 10  # seconds of chain that a leader may be behind another endpoint on our chain
KEPT: Final = 512  # headers of blocks with our logs, for whoever proves them
STUCK: Final = 30.0  # seconds without a new block after which an endpoint has no vote


@dataclass(frozen=True, slots=True)
class Seen:
    """What an endpoint showed at one look. `ours` is a block that we hold, at or below its head, and `shows` what it has there."""

    latest: Header
    safe: Header | None
    finalized: Header | None
    ours: BlockRef | None = None
    shows: Hash32 | None = None

    @property
    def holds(self) -> bool:
        return self.ours is not None and self.shows == self.ours.hash

    @property
    def apart(self) -> bool:
        return self.ours is not None and self.shows is not None and self.shows != self.ours.hash


@dataclass(slots=True)
class Slowness:
    """When an endpoint was too slow last, how often since it was forgiven, and until when it is not preferred."""

    at: float
    times: int
    until: float


@dataclass(slots=True, eq=False)
class Node:
    """One endpoint of the pool, and what is known of it. Times are the event loop's."""

    rpc: Rpc
    role: Role = "primary"
    place: int = 0
    head: int = -1  # that it reported last
    peak: int = -1  # … and the highest that it ever did
    advanced_at: float = 0.0
    identified: bool = False  # as our chain, since it last failed
    seen: Seen | None = None
    looked_at: float = 0.0  # when the look was begun that brought it
    usual: Usual = field(default_factory=Usual)  # at the head
    slowness: Slowness | None = None
    trouble: str | None = None  # why the last look failed
    strikes: int = 0  # looks in a row at which it stood apart
    put_aside: tuple[Why, str, float] | None = None  # why, in words, until when
    quarantines: int = 0
    at_odds: tuple[float, int] = (0.0, 0)  # its reading of history was not believed: until when, and how often
    no_receipts: bool = False
    stands: tuple[str, datetime] | None = None  # as was said of it last, and since when
    tags: dict[str, int] = field(default_factory=dict)  # the last height of each

    @property
    def name(self) -> str:
        return self.rpc.name

    async def reaches(self, number: int) -> bool:
        """Whether it has reported a head so high: a node is not asked above it (a gateway answers [] there)."""
        if self.head < number:
            latest = await self.rpc.header("latest")
            if latest is not None and latest.number is not None:
                self.reported(int(latest.number, 16), asyncio.get_running_loop().time())
        return self.head >= number

    def reported(self, head: int, now: float) -> None:
        self.head = head
        if head > self.peak:
            self.peak, self.advanced_at = head, now

    @property
    def time_s(self) -> int:
        """Block time of its head at the last look, in seconds."""
        return 0 if self.seen is None else self.seen.latest.time_s


class Pool:
    """The endpoints of one chain in this process. `quorum`: how many must agree. `ours(n)` is set by whoever follows: a block
    that we hold at or below a height, from memory."""

    def __init__(
        self,
        chain: str,
        chain_id: int,
        nodes: Sequence[Node],
        *,
        quorum: int = 1,
        count: CountOf | None = None,
        metrics: Metrics | None = None,
        observe: bool = False,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.chain, self.chain_id, self.nodes, self.quorum = chain, chain_id, list(nodes), quorum
        self.genesis: Hash32 | None = None
        self.schedule: Schedule | None = None
        self.ours: Callable[[int], BlockRef | None] = lambda _: None
        self._count, self._metrics, self.observe = count, metrics, observe
        self.limits = Limits(chain_id, [node.rpc for node in nodes])
        self._headers: OrderedDict[Hash32, Header] = OrderedDict()
        self._wall = wall

    @classmethod
    def of(cls, rpc: Rpc, chain_id: int, chain: str = "", count: Count | None = None) -> Pool:
        """One endpoint alone."""
        counted = None if count is None else (lambda _, check, outcome: count(check, outcome))
        return cls(chain, chain_id, [Node(rpc)], count=counted)

    @property
    def several(self) -> bool:
        return len(self.nodes) > 1

    def keep(self, headers: Iterable[Header]) -> None:
        """Remembers headers whose hash was recomputed: they are what they are, whoever showed them."""
        if not self.observe:
            self._headers.update({header.hash: header for header in headers})
        while len(self._headers) > KEPT:
            self._headers.popitem(last=False)

    def kept(self, block_hash: Hash32) -> Header | None:
        return self._headers.get(block_hash)

    def counting(self, endpoint: str) -> Count | None:
        """Counts checks as that endpoint's."""
        if (count := self._count) is None:
            return None

        def counted(check: str, outcome: Outcome) -> None:
            count(endpoint, check, outcome)

        return Observed(counted) if self.observe else counted

    def source(self, purpose: Purpose = "head") -> Source:
        ranks = {role: rank for rank, role in enumerate(ORDER[purpose])}
        nodes = sorted(self.nodes, key=lambda node: (ranks[node.role], node.place))
        return Source(self, nodes, hedges=purpose == "head")

    # --------------------------------------------------------------------- who may be asked, and who has a vote

    def usable(self, node: Node) -> bool:
        """Not in quarantine; one whose time is over is on probation from now on."""
        if node.put_aside is None:
            return True
        why, reason, until = node.put_aside
        if asyncio.get_running_loop().time() < until:
            return False
        node.put_aside, node.identified, node.strikes, node.seen = None, False, 0, None
        log.info("an endpoint is on probation", chain=self.chain, endpoint=node.name, was=reason)
        if self._metrics is not None:
            self._metrics.quarantined_endpoints.labels(node.name, why).set(0)
        return True

    def live(self, node: Node) -> bool:
        """Whether it has a vote: looked at with success, advancing, not in quarantine."""
        stuck = asyncio.get_running_loop().time() - node.advanced_at > STUCK
        return self.usable(node) and node.seen is not None and node.trouble is None and not stuck

    def tagged(self, node: Node, tag: Literal["safe", "finalized"], header: Header | None) -> None:
        """Counts a tag that went back, or that an endpoint does not know any more: ours only moves forward, whatever it says."""
        before = node.tags.get(tag)
        if header is not None:
            node.tags[tag] = header.number
        if before is None or self._metrics is None:
            return
        oddity = "missing" if header is None else "backwards" if header.number < before else None
        if oddity is not None:
            self._metrics.odd_tags.labels(node.name, tag, oddity).inc()

    def compare(self, node: Node) -> None:
        """Shows how far its head is behind the newest that was seen; called straight after a look at it."""
        if self._metrics is not None:
            newest = max(other.time_s for other in self.nodes)
            self._metrics.endpoint_behind.labels(self.chain, node.name).set(newest - node.time_s)

    def fit(self, nodes: Iterable[Node]) -> list[Node]:
        """Those of them that may lead at the head: with a vote, on our chain, and not behind the others."""
        on_time = self._on_time()
        return [node for node in nodes if node in on_time and self.behind(node) <= LAG]

    def _on_time(self) -> list[Node]:
        """Those with a vote, on our chain; but for whoever is ahead of the clock, where others are not."""
        holders = [node for node in self.nodes if self.live(node) and node.seen is not None and node.seen.holds]
        return [node for node in holders if node.time_s <= self._wall() + LAG] or holders

    def ahead_of_time(self, header: Header) -> bool:
        """Whether a block is later than the clock, while some endpoint's newest is not: blocks that somebody made in store could lead
        us away from those that are mined. (A clock that is wrong is so for all of them.)"""
        limit = self._wall() + LAG
        return header.time_s > limit and any(self.live(node) and node.time_s <= limit for node in self.nodes)

    def behind(self, node: Node) -> int:
        """Seconds of chain that it is behind the newest of those on our chain, as the last looks at them showed."""
        return max(0, max((n.time_s for n in self._on_time()), default=0) - node.time_s)

    def slow(self, node: Node) -> bool:
        """Whether it was overtaken, until its time is over and a look at it that was begun since then has succeeded."""
        slow = node.slowness
        return slow is not None and (asyncio.get_running_loop().time() < slow.until or node.looked_at <= slow.at)

    def overtaken(self, node: Node) -> None:
        """Another answered sooner than it. What several loops notice meanwhile counts once."""
        if self.slow(node):
            return
        now, before = asyncio.get_running_loop().time(), node.slowness
        times = 1 if before is None or now - before.at > FORGIVEN else before.times + 1
        node.slowness = Slowness(now, times, now + SLOW[min(times, len(SLOW)) - 1])
        node.identified = False

    def standing(self, node: Node) -> tuple[str, str | None]:
        """For status: 'live', 'lagging', 'stuck', 'apart', 'failing', 'quarantined' or 'unknown', and why."""
        if node.put_aside is not None and not self.usable(node):
            return "quarantined", node.put_aside[1]
        if node.trouble is not None:
            return "failing", node.trouble
        if node.seen is None:
            return "unknown", None
        if not self.live(node):
            return "stuck", f"no new block for {STUCK:g} s: it stands at {node.head}"
        if node.seen.apart and node.seen.ours is not None:
            return "apart", f"it shows another block {node.seen.ours.number} than we hold"
        if (behind := self.behind(node)) > LAG:
            return (
                "lagging",
                f"{behind} s of chain behind the newest endpoint: it does not lead, and holds no more than it shows",
            )
        if self.slow(node) and node.slowness is not None:
            return "live", f"slow to answer: others were sooner {node.slowness.times} times of late"
        return "live", None

    def told(self, node: Node, now: datetime) -> dict[str, Any]:
        """How it stands, as the store keeps it."""
        state, reason = self.standing(node)
        if node.stands is None or node.stands[0] != state:
            node.stands = (state, now)
        return {
            "name": node.name,
            "role": node.role,
            "state": state,
            "reason": reason,
            "since": node.stands[1].isoformat(timespec="seconds"),
            "behind_seconds": None if node.seen is None else self.behind(node),
            "head": None if node.head < 0 else str(node.head),
        }

    def quarantine(self, node: Node, why: Why, reason: str) -> bool:
        """Puts an endpoint aside for a while; not the last one that could be asked. Several loops notice the same trouble: one that
        is aside already stays so, for no longer, and is looked at again before it has a vote."""
        if not self.usable(node):
            return True
        if not any(self.usable(other) for other in self.nodes if other is not node):
            return False
        seconds = QUARANTINE[min(node.quarantines, len(QUARANTINE) - 1)]
        node.quarantines += 1
        node.put_aside = (why, reason, asyncio.get_running_loop().time() + seconds)
        log.warning(
            "an endpoint is in quarantine", chain=self.chain, endpoint=node.name, reason=reason, seconds=seconds
        )
        if self._metrics is not None:
            self._metrics.quarantined_endpoints.labels(node.name, why).set(1)
        return True

    def disbelieve(self, node: Node) -> None:
        """Its reading of history is at odds with logs that stand: for a while others are asked to confirm ours. It keeps its
        vote: its headers are as good as before."""
        times = node.at_odds[1]
        node.at_odds = (asyncio.get_running_loop().time() + QUARANTINE[min(times, len(QUARANTINE) - 1)], times + 1)

    def confirms(self, node: Node) -> bool:
        """Whether it may be asked to confirm what another has read."""
        return node.at_odds[0] <= asyncio.get_running_loop().time()

    async def identify(self, node: Node) -> None:
        """That it is our chain, by id and genesis; asked once until it fails. Raises WrongChain, RpcError."""
        if node.identified:
            return
        await check_chain_id(node.rpc, self.chain, self.chain_id)
        found = await check_genesis(node.rpc, self.chain, self.genesis)
        if self.quorum == 1 or (found is not None and (self.chain_id, found) in BASE):
            self.genesis = (
                found  # else it is what enough endpoints show at the start: one could give all others another one
            )
        node.identified = True


#: What the question of one endpoint may end with and decide nothing.
NO_ANSWER: Final = (RpcError, Lie, Unsettled, WrongChain)


class Overtaken(Unsettled):
    """Another endpoint answered sooner, in the middle of a step, and leads now: the step is begun again there."""


class Source:
    """Whom one loop asks: `rpc`, until that one fails. With one endpoint it is always the same. `hedges`: whether `ask` turns to
    another as well where the lead is slow; not where much is read, which would be read twice."""

    def __init__(self, pool: Pool, nodes: Sequence[Node], *, hedges: bool = False) -> None:
        self.pool, self._nodes = pool, list(nodes)
        self.lead = self._nodes[0]
        self._hedges, self._credit = hedges and len(self._nodes) > 1, Credit()
        self._rests: dict[Node, tuple[float, int]] = {}  # until when, and how often it failed in a row
        self._suspect: tuple[Node, Lie] | None = None
        self.count: Count = (
            Observed(self._counted) if pool.observe else self._counted
        )  # as the lead's, whoever leads then

    @property
    def rpc(self) -> Rpc:
        return self.lead.rpc

    def _counted(self, check: str, outcome: Outcome) -> None:
        counted = self.pool.counting(self.lead.name)
        if counted is not None:
            counted(check, outcome)

    def fixed(self, node: Node) -> Source:
        """A source that asks this endpoint alone."""
        return Source(self.pool, [node])

    @property
    def others(self) -> list[Node]:
        """Who could be asked besides, best first."""
        return self.others_than(self.lead)

    def others_than(self, first: Node) -> list[Node]:
        return [node for node in self._nodes if node is not first and self.pool.usable(node)]

    # --------------------------------------------------------------------- taking over

    def failed(self, trouble: Exception) -> bool:
        """The lead erred, lied, or stood alone. True: another one has taken over, and can be asked at once."""
        now = asyncio.get_running_loop().time()
        lead = self.lead
        lead.identified = False
        if isinstance(trouble, Lie):
            self._accuse(lead, trouble)
        self._tire(lead, UNFIT if isinstance(trouble, PrunedHistory | MethodMissing) else None)
        fresh = [node for node in self.others if self._rest_of(node) <= now]
        if fresh:
            quick = [node for node in fresh if not self.pool.slow(node)] or fresh
            self._take_over((self.pool.fit(quick) or quick)[0], str(trouble))
            return True
        if self.others:
            self._take_over(min([lead, *self.others], key=self._rest_of), str(trouble))
        return False

    def worked(self) -> None:
        """The lead has answered what was asked: whoever failed a check at the same question has lied."""
        self._rests.pop(self.lead, None)
        if self._suspect is not None and self._suspect[0] is not self.lead:
            node, lie = self._suspect
            self.pool.quarantine(node, "lie", f"its answer failed the check {lie}; {self.lead.name} passed it")
            self._suspect = None

    def prefer(self, nodes: Iterable[Node], reason: str) -> bool:
        """The best of these takes over, if the lead is none of them: it is outvoted, and rests. Back at a common ancestor nothing tells it
        from the others, and it would lead to its own branch again."""
        fit = [node for node in self._nodes if node in set(nodes) and self.pool.usable(node)]
        if not fit or self.lead in fit:
            return False
        self._tire(self.lead)
        self._take_over(fit[0], reason)
        return True

    def _tire(self, node: Node, seconds: float | None = None) -> None:
        times = self._rests.get(node, (0.0, 0))[1] + 1
        rest = REST[min(times, len(REST)) - 1] if seconds is None else seconds
        self._rests[node] = (asyncio.get_running_loop().time() + rest, times)

    def reconsider(self) -> None:
        """Away from a leader that lags; back to a better endpoint that has rested: a fallback is for the time of need."""
        now = asyncio.get_running_loop().time()
        fit = self.pool.fit(self._nodes)
        newest = max((node.time_s for node in fit), default=0)
        fit = [node for node in fit if node is self.lead or not self.pool.slow(node)] or fit
        if fit and self.lead.seen is not None and newest - self.lead.time_s > LAG:
            self._take_over(fit[0], f"the one before is {newest - self.lead.time_s} s behind")
        elif better := [node for node in fit if self._rest_of(node) <= now and self._before(node)]:
            self._take_over(better[0], "a better endpoint is back")
        elif not self.pool.usable(self.lead) and self.others:
            self._take_over(self.others[0], "the one before is in quarantine")

    def _before(self, node: Node) -> bool:
        return self._nodes.index(node) < self._nodes.index(self.lead)

    def _rest_of(self, node: Node) -> float:
        return self._rests.get(node, (0.0, 0))[0]

    def _take_over(self, node: Node, reason: str) -> None:
        if node is self.lead:
            return
        log.info(
            "another endpoint takes over",
            chain=self.pool.chain,
            endpoint=node.name,
            before=self.lead.name,
            reason=reason,
        )
        if self.pool._metrics is not None:
            self.pool._metrics.failovers.labels(self.pool.chain, node.name).inc()
        self.lead = node

    def _accuse(self, node: Node, lie: Lie) -> None:
        """A check that fails at two endpoints is no lie of either: it is the chain that changed, or we are wrong."""
        if self._suspect is not None and self._suspect[0] is not node and self._suspect[1].check == lie.check:
            self._suspect = None
            return
        self._suspect = (node, lie)

    # --------------------------------------------------------------------- one that is slow

    async def ask(self, question: Callable[[Node], Coroutine[Any, Any, T]], *, hedged: bool = True) -> T:
        """The lead's answer. Where that takes longer than it usually does, the next endpoint is asked as well, once it is known to be our
        chain, and then the one after it: whoever answers first leads from then on, and its answer is taken whole.

        Raises what the lead's question raised, where no other had an answer.
        """
        lead = self.lead
        if not (hedged and self._hedges):
            return await question(lead)
        self._credit.earn()
        asked = [lead]

        async def instead(node: Node) -> T:
            await self.pool.identify(node)
            return await question(node)

        def another() -> Contender[T] | None:
            if (node := self._stand_in(asked)) is None:
                return None
            asked.append(node)
            return instead(node), node.usual

        outcome = "unanswered"
        try:
            answer, place = await raced((question(lead), lead.usual), another, NO_ANSWER)
            outcome = "overtaken" if place else "in_time"
        finally:
            if len(asked) > 1 and self.pool._metrics is not None:
                self.pool._metrics.hedged.labels(self.pool.chain, lead.name, outcome).inc()
        if place and self.lead is lead:  # where it is not, another question has seen to that
            for slow in asked[:place]:
                self.pool.overtaken(slow)
            self._take_over(asked[place], f"it answered sooner than {lead.name}, which takes longer than usual")
        return answer

    async def ask_on(self, question: Callable[[Node], Coroutine[Any, Any, T]]) -> T:
        """As `ask`, in the middle of a step that is gathered from the lead. Raises Overtaken where it leads no more."""
        lead = self.lead
        answer = await self.ask(question)
        if self.lead is not lead:
            raise Overtaken(f"{self.lead.name} answered sooner than {lead.name}")
        return answer

    def _stand_in(self, asked: Collection[Node]) -> Node | None:
        if self.lead not in asked:  # another question has found it
            return self.lead
        now = asyncio.get_running_loop().time()
        for node in self.pool.fit(self._nodes):
            if node not in asked and self._rest_of(node) <= now and not self.pool.slow(node):
                return node if self._credit.spend() else None
        return None

    # --------------------------------------------------------------------- who the chain is

    async def identify(self) -> None:
        """That the lead is our chain. Raises WrongChain where every endpoint is another, RpcError."""
        while True:
            try:
                await self.pool.identify(self.lead)
                return
            except WrongChain as wrong:
                if not self._wrong(wrong):
                    raise

    async def identify_again(self) -> None:
        """The lead's chain id, whatever was known of it, and the rest where that is not known. Raises WrongChain, RpcError."""
        while True:
            try:
                await check_chain_id(self.rpc, self.pool.chain, self.pool.chain_id)
                if self.pool.several:
                    await self.pool.identify(self.lead)
                return
            except WrongChain as wrong:
                if not self._wrong(wrong):
                    raise

    async def introduce(
        self, known: Hash32 | None, schedules: Mapping[tuple[int, Hash32], Schedule]
    ) -> tuple[Hash32 | None, Schedule | None]:
        """Genesis hash and schedule of the chain, by the first endpoint that shows them. `known`: the genesis that we hold.

        Raises WrongChain, ScheduleMismatch (every endpoint contradicts), RpcError, Lie.
        """
        if known is None and self.pool.several:
            known = await self._common_genesis()
        self.pool.genesis = known
        for attempt in range(len(self._nodes)):
            last = attempt == len(self._nodes) - 1
            try:
                self.lead.identified = False
                await self.identify()
                schedule = await discover(self.rpc, self.pool.chain_id, self.pool.genesis, schedules, self.count)
            except (ScheduleMismatch, RpcError, Lie) as error:
                if last or not (self.failed(error) or self.others):
                    raise
            else:
                if schedule is not None and self.pool.quorum > 1:
                    schedule = await self._common_schedule(schedule, schedules)
                self.pool.schedule = schedule
                return self.pool.genesis, schedule
        raise AssertionError("a pool without endpoints")

    async def _common_schedule(self, leads: Schedule, schedules: Mapping[tuple[int, Hash32], Schedule]) -> Schedule:
        """The schedule that enough endpoints keep to: by one that is a block beside it, all others would look like liars. Where so many
        say nothing, the one that we know of, if anybody keeps to it."""
        said = Counter([leads])
        others = [node for node in self._nodes if node is not self.lead]
        for answer in await asyncio.gather(
            *(
                discover(node.rpc, self.pool.chain_id, self.pool.genesis, schedules, self.pool.counting(node.name))
                for node in others
            ),
            return_exceptions=True,
        ):
            if isinstance(answer, Schedule):
                said[answer] += 1
            elif isinstance(answer, BaseException) and not isinstance(answer, ScheduleMismatch | RpcError | Lie):
                raise answer
        (most, votes), *_ = said.most_common(1)
        return most if votes >= self.pool.quorum else next((s for s in said if s in schedules.values()), leads)

    async def _common_genesis(self) -> Hash32 | None:
        """At the very first start, when nothing is held yet: the block 0 that enough endpoints show."""
        found: Counter[Hash32] = Counter()
        answers = await asyncio.gather(*(node.rpc.genesis_hash() for node in self._nodes), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                if not isinstance(answer, RpcError):
                    raise answer
                continue
            found[answer] += 1
        return next((block_hash for block_hash, votes in found.most_common(1) if votes >= self.pool.quorum), None)

    def _wrong(self, wrong: WrongChain) -> bool:
        """Puts the lead aside as another chain's; False where nobody else is left."""
        lead = self.lead
        if not self.others or not self.pool.quarantine(lead, "wrong_chain", str(wrong)):
            return False
        self._take_over(self.others[0], str(wrong))
        return True

    # --------------------------------------------------------------------- asking

    async def receipts(self, header: Header, first: Node | None = None) -> tuple[list[RawReceipt], str | None] | None:
        """The checked receipts of a block, and why its root proves nothing about them; None where the endpoint does not hold it.

        Of `first` (the lead, where nobody is named); where it has no such method, of the next that has: what goes wrong there is no
        fault of its own. Raises RpcError and Lie of the first, MethodMissing where nobody has receipts that can be used.
        """
        absent, first = False, first or self.lead
        for node in (first, *self.others_than(first)):
            if node.no_receipts:
                continue
            try:
                receipts = await node.rpc.receipts(header.hash)
                if receipts is not None:
                    return receipts, proven_logs(header, receipts, count=self.pool.counting(node.name))[1]
                absent = True
            except MethodMissing:
                node.no_receipts = True
            except (RpcError, Lie):
                if node is first:
                    raise
            if node is first and absent:
                break
        if absent:
            return None
        raise MethodMissing("no endpoint offers it", endpoint=first.name, method="eth_getBlockReceipts", params="")
