"""Trying an endpoint before it is relied upon: who it is, what it answers, how much at once, and what that will cost.

Promises that nothing is stored, that each question is asked once or, for the span, a few times, and that what fails is said
in words with what to do. Estimates are of a day at the chain's present pace, without history and without retries.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from indexer.chain.decode import Decoder
from indexer.chain.heads import HeadStream
from indexer.chain.integrity import Lie, verify_header
from indexer.chain.rpc import Rpc
from indexer.chain.rpc_errors import MethodMissing, PrunedHistory, RangeTooLarge, RpcError, UnknownBlock
from indexer.chain.schedule import BASE
from indexer.chain.steps import Gate
from indexer.config import Chain
from indexer.config.tree import Endpoint
from indexer.model.types import Header, hex0x

DAY: Final = 86_400
SPANS: Final = (1, 10, 100, 1_000, 2_000, 10_000, 50_000)  # blocks, tried upwards until one is refused
SAMPLE: Final = 100  # newest headers, for the pace and for what the gate lets through
LOOK: Final = 6  # calls of one look at an endpoint, where several witness for each other
SHORT: Final = 30.0  # seconds of chain in one range, below which history costs too much
STALE: Final = 60.0  # seconds behind the clock from which a head is called old


@dataclass(slots=True)
class Seen:
    """What one endpoint showed. `problems` make the check fail, `remarks` cost something; None: could not be found out."""

    endpoint: str
    chain_id: int | None = None
    genesis: str | None = None
    head: int | None = None
    head_age_seconds: float | None = None
    safe: int | None = None
    finalized: int | None = None
    receipts: bool | None = None
    batches: bool | None = None
    largest_span: int | None = None
    calls_per_day: dict[str, int] = field(default_factory=dict)  # by mode of following, what it is asked
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Socket:
    """What the websocket showed: how many seconds until the first head, None where none came."""

    endpoint: str
    first_head_seconds: float | None = None
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Probe:
    """One chain tried: its endpoints, its socket, and estimated JSON-RPC calls a day by mode of following, at all endpoints."""

    chain: str
    endpoints: list[Seen]
    websocket: Socket | None
    seconds_per_block: float | None
    calls_per_day: dict[str, int]
    history_calls: int | None  # once, to read what lies between the factories' first blocks and the head

    @property
    def problems(self) -> list[str]:
        socket = self.websocket.problems if self.websocket else []
        return [problem for each in self.endpoints for problem in each.problems] + socket


async def probe(chain: Chain, decoder: Decoder, *, timeout: float = 10.0) -> Probe:
    """Tries all endpoints of a chain at once. Raises nothing: what fails is in the answer."""
    trials = [_Trial(chain, endpoint, decoder, timeout) for endpoint in chain.rpc]
    seen = await asyncio.gather(*(trial.run() for trial in trials))
    hashes = {each.genesis for each in seen if each.genesis is not None}
    if len(hashes) > 1:
        seen[0].problems.append(
            f"the endpoints are of different chains: their genesis blocks are {', '.join(sorted(hashes))}"
        )
    websocket = None if chain.websocket is None else await _socket(chain, timeout)
    headers = max((trial.headers for trial in trials), key=len)
    pace = _pace(headers)
    spans = [each.largest_span for each in seen if each.largest_span]
    calls = _calls(chain, headers, pace, decoder)
    _share(chain, seen, calls, pace)
    return Probe(
        chain.name,
        list(seen),
        websocket,
        pace,
        {mode: sum(each.calls_per_day[mode] for each in seen) for mode in calls},
        _history(chain, max((each.head or 0 for each in seen), default=0), max(spans, default=0)),
    )


class _Trial:
    def __init__(self, chain: Chain, endpoint: Endpoint, decoder: Decoder, timeout: float) -> None:
        self._chain, self._endpoint, self._decoder, self._timeout = chain, endpoint, decoder, timeout
        self.headers: list[Header] = []

    async def run(self) -> Seen:
        async with Rpc(
            self._endpoint.url, requests_per_second=self._endpoint.requests_per_second, timeout=self._timeout
        ) as rpc:
            seen = Seen(rpc.name)
            for step in (self._identity, self._heads, self._tags, self._receipts, self._spans):
                try:
                    if not await step(rpc, seen):
                        break
                except (RpcError, Lie) as error:
                    seen.problems.append(str(error) if seen.endpoint in str(error) else f"{seen.endpoint}: {error}")
                    if seen.head is None:
                        break  # without a head there is nothing more to ask
            seen.batches = rpc.limits.batching and rpc.limits.max_batch > 1
            if not seen.batches:
                seen.remarks.append(f"{seen.endpoint} takes no batches: each poll costs several requests")
            return seen

    async def _identity(self, rpc: Rpc, seen: Seen) -> bool:
        seen.chain_id = await rpc.chain_id()
        if seen.chain_id != self._chain.chain_id:
            seen.problems.append(
                f"{seen.endpoint} serves chain {seen.chain_id}, not {self._chain.chain_id}: correct chain_id or the rpc url"
            )
            return False
        try:
            genesis = await rpc.genesis_hash()
        except (PrunedHistory, UnknownBlock):
            seen.remarks.append(
                f"{seen.endpoint} keeps no block 0: who it is rests on its chain id and on finalized blocks"
            )
            return True
        seen.genesis = hex0x(genesis)
        known = {chain_id for chain_id, _ in BASE}
        if seen.chain_id in known and (seen.chain_id, genesis) not in BASE:
            seen.remarks.append(
                f"{seen.endpoint} has Base's chain id and another genesis: a devnet, without Base's schedule"
            )
        return True

    async def _heads(self, rpc: Rpc, seen: Seen) -> bool:
        raw = await rpc.header("latest")
        if raw is None:
            seen.problems.append(f"{seen.endpoint} knows no latest block")
            return False
        head = verify_header(raw, None)
        seen.head, seen.head_age_seconds = head.number, round(max(0.0, time.time() - head.time_s), 1)
        if seen.head_age_seconds > STALE:
            seen.remarks.append(f"{seen.endpoint}: the newest block is {seen.head_age_seconds:.0f} s old")
        raws = await rpc.headers(range(max(0, head.number - SAMPLE + 1), head.number + 1))
        self.headers = [verify_header(each, None) for each in raws if each is not None]
        return True

    async def _tags(self, rpc: Rpc, seen: Seen) -> bool:
        for tag in ("safe", "finalized"):
            raw = await rpc.header(tag)
            number = None if raw is None else verify_header(raw, None).number
            setattr(seen, tag, number)
            if number is None:
                seen.problems.append(
                    f"{seen.endpoint} knows no {tag} block: nothing becomes {tag}, and policies that ask for it are never met"
                )
        return True

    async def _receipts(self, rpc: Rpc, seen: Seen) -> bool:
        if not self.headers:
            seen.problems.append(
                f"{seen.endpoint} says that its head is block {seen.head}, and shows no block below it"
            )
            return False
        loud = next((header for header in reversed(self.headers) if any(header.bloom)), self.headers[-1])
        try:
            seen.receipts = await rpc.receipts(loud.hash) is not None
        except MethodMissing:
            seen.receipts = False
        if not seen.receipts:
            seen.remarks.append(
                f"{seen.endpoint} has no eth_getBlockReceipts: blocks at the head are `unverified` until a second look"
            )
        return True

    async def _spans(self, rpc: Rpc, seen: Seen) -> bool:
        addresses: list[bytes] = [factory.address for factory in self._chain.factories] or [b"\0" * 20]
        assert seen.head is not None
        for span in SPANS:
            span = min(span, seen.head + 1)
            try:
                await rpc.logs(addresses[: rpc.limits.max_addresses], seen.head - span + 1, seen.head)
            except RpcError as error:
                if seen.largest_span is None:
                    raise
                if isinstance(error, RangeTooLarge) and (error.suggested or 0) > seen.largest_span:
                    seen.largest_span = error.suggested
                break
            seen.largest_span = span
            if span == seen.head + 1:
                break
        return True


async def _socket(chain: Chain, timeout: float) -> Socket:
    assert chain.websocket is not None
    stream = HeadStream(chain.websocket, silent_seconds=timeout, timeout=timeout)
    seen = Socket(stream.name)
    began = time.monotonic()
    try:
        async with stream:
            head = await anext(stream)
            verify_header(head, None)
            seen.first_head_seconds = round(time.monotonic() - began, 2)
    except (RpcError, Lie) as error:
        seen.problems.append(f"websocket {error}")
    return seen


def _pace(headers: list[Header]) -> float | None:
    if len(headers) < 2:
        return None
    seconds = headers[-1].time_s - headers[0].time_s
    return max(seconds / (headers[-1].number - headers[0].number), 0.05) if seconds else None


def _calls(chain: Chain, headers: list[Header], pace: float | None, decoder: Decoder) -> dict[str, int]:
    """By mode: what following asks the endpoint that leads, with the share of blocks that the gate lets through as in the sample."""
    tags = 0.0 if len(chain.rpc) > 1 else 2 * DAY / chain.tags_seconds
    calls = {"polling": round(4 * DAY / chain.poll_seconds + tags)}
    if pace is None or not headers:
        return calls
    emitters = {a for f in chain.factories for a in (f.address, f.event_hub) if a is not None}
    gate = Gate(emitters, (), decoder.topics)
    admitted = sum(gate.admits(header) for header in headers) / len(headers)
    blocks = DAY / pace
    calls["socket"] = round(blocks * admitted + tags)
    calls["every-header"] = round(blocks * (1 + admitted) + DAY / chain.poll_seconds + tags)
    return calls


def _share(chain: Chain, seen: Sequence[Seen], calls: dict[str, int], pace: float | None) -> None:
    """Gives each endpoint its part, and remarks where its plan is too small for it."""
    rank = {"primary": 0, "fallback": 1, "archive": 2}
    lead = min(range(len(seen)), key=lambda place: (rank[chain.role_of(place)], place))
    looks = round(LOOK * DAY / chain.tags_seconds) if len(seen) > 1 else 0
    mode = "socket" if chain.websocket else "polling" if chain.follow == "auto" else "every-header"
    for place, (endpoint, each) in enumerate(zip(chain.rpc, seen, strict=True)):
        each.calls_per_day = {name: looks + (number if place == lead else 0) for name, number in calls.items()}
        needed = each.calls_per_day.get(mode, 0) / DAY
        if endpoint.requests_per_second is not None and needed > endpoint.requests_per_second:
            each.remarks.append(
                f"{each.endpoint}: following asks about {needed:.1f} calls a second, requests_per_second allows "
                f"{endpoint.requests_per_second:g}: raise poll_seconds or tags_seconds, or take a larger plan"
            )
        if pace is not None and each.largest_span is not None and each.largest_span * pace < SHORT:
            each.remarks.append(
                f"{each.endpoint} answers for {each.largest_span * pace:.2g} s of chain at once: history and outages take very many calls"
            )


def _history(chain: Chain, head: int, span: int) -> int | None:
    starts = [factory.start_block for factory in chain.factories]
    if not span or not starts:
        return None
    return 2 * -(-max(0, head - min(starts)) // span)
