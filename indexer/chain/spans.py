"""How much of a chain one endpoint lets through in one eth_getLogs: learnt from its refusals, kept, and lived with.

A limit on blocks is the endpoint's own and only ever tightens; a limit on results is a matter of how dense the blocks are, so
it shrinks on a refusal and grows back on success, apart for filters of different size. Which endpoint to ask, and what a
part is worth once it is here, are decided elsewhere.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Final, NamedTuple, Protocol

import msgspec

from indexer.chain.integrity import Count, logs_of_receipts, verify_header
from indexer.chain.rpc_errors import (
    BadAnswer,
    BeyondHead,
    Kind,
    RangeTooLarge,
    RateLimited,
    RpcError,
    TooManyAddresses,
    TooManyResults,
    Unreachable,
)
from indexer.chain.wire import RawHeader, RawLog, RawReceipt
from indexer.model.types import Hash32, hex0x

Topics = Sequence[Sequence[bytes] | bytes | None]

PATIENCE: Final = 2  # time-outs in a row that are taken for a range too heavy, before they are taken for a sick node; refusals in a row


class Learned(msgspec.Struct, frozen=True):
    """The limits of one endpoint, in a form that can be stored as JSON."""

    max_span: int | None = None  # blocks of one request, inclusive
    dense_spans: dict[str, int] = {}  # by size of the filter; msgspec copies the default
    max_addresses: int = 100
    max_batch: int = 100
    batching: bool = True

    @property
    def firm(self) -> tuple[int | None, int, int, bool]:
        """Those that only tighten: the endpoint's own, whatever the blocks hold."""
        return self.max_span, self.max_addresses, self.max_batch, self.batching

    def tightened(self, other: Learned) -> Learned:
        """The stricter of both where a limit only tightens; how dense blocks are, by ours, and by the other where we do not know."""
        spans = [span for span in (self.max_span, other.max_span) if span is not None]
        return Learned(
            min(spans, default=None),
            other.dense_spans | self.dense_spans,
            min(self.max_addresses, other.max_addresses),
            min(self.max_batch, other.max_batch),
            self.batching and other.batching,
        )


class SpanLimits:
    """What has been learnt of one endpoint; shared by all who ask it at the same time."""

    def __init__(self, *, max_addresses: int = 100, max_batch: int = 100) -> None:
        self.max_span: int | None = None
        self.dense_spans: dict[str, int] = {}
        self.max_addresses, self.max_batch, self.batching = max_addresses, max_batch, True

    @property
    def learned(self) -> Learned:
        return Learned(self.max_span, dict(self.dense_spans), self.max_addresses, self.max_batch, self.batching)

    @learned.setter
    def learned(self, kept: Learned) -> None:
        self.max_span, self.dense_spans = kept.max_span, dict(kept.dense_spans)
        self.max_addresses, self.max_batch = max(1, kept.max_addresses), max(1, kept.max_batch)
        self.batching = kept.batching

    def span(self, key: str, wanted: int) -> int:
        """How many of the wanted blocks to ask for at once."""
        return max(1, min(wanted, self.max_span or wanted, self.dense_spans.get(key, wanted)))

    def too_wide(self, asked: int, works: int | None) -> None:
        """`asked` blocks were refused for being so many; the node may have said how many would work."""
        limit = max(1, asked // 2 if works is None else works)
        self.max_span = limit if self.max_span is None else min(self.max_span, limit)

    def too_full(self, key: str, asked: int, works: int | None) -> None:
        """`asked` blocks held too much."""
        self.dense_spans[key] = max(1, asked // 2 if works is None else works)

    def went_through(self, key: str, asked: int) -> None:
        """`asked` blocks were answered: if density held us back there, try a little more next time."""
        dense = self.dense_spans.get(key)
        if dense is None or asked < dense:
            return
        grown = dense + max(1, dense // 4)
        if grown >= (self.max_span or 10**6):
            del self.dense_spans[key]  # no longer what holds us back
        else:
            self.dense_spans[key] = grown


def asks_for_less(refusal: RpcError) -> bool:
    """Whether the range as it was asked for may be what is refused: in smaller parts it may go through."""
    heavy = isinstance(refusal, Unreachable) and refusal.kind in (Kind.TIMEOUT, Kind.UNAVAILABLE_OR_RANGE)
    return heavy or isinstance(refusal, RangeTooLarge | TooManyResults | TooManyAddresses)


class Part(NamedTuple):
    """Blocks `from_block` … `to_block`, and all logs in them that the filter lets through, in order of the chain."""

    from_block: int
    to_block: int
    logs: list[RawLog]
    beside: tuple[RawHeader | None, ...] = ()  # one for each request that the logs came in, where one was asked for


class Asks(Protocol):
    """What is needed of the endpoint."""

    name: str

    async def logs(
        self, addresses: Sequence[bytes], from_block: int, to_block: int, topics: Topics | None = None
    ) -> list[RawLog]: ...

    async def logs_beside(
        self, addresses: Sequence[bytes], from_block: int, to_block: int, topics: Topics | None, number: int
    ) -> tuple[list[RawLog], RawHeader | None]: ...

    async def header(self, at: int) -> RawHeader | None: ...

    async def receipts(self, block_hash: Hash32) -> list[RawReceipt] | None: ...


class LogRange:
    """A range of blocks, given in parts as large as the endpoint answers. Iterate it once.

    Raises RpcError, and Lie where the receipts of a block that is too full for one answer are not those of its header.
    """

    def __init__(
        self,
        rpc: Asks,
        limits: SpanLimits,
        addresses: Sequence[bytes],
        from_block: int,
        to_block: int,
        topics: Topics | None = None,
        beside: int | None = None,
        count: Count | None = None,
    ) -> None:
        self._rpc, self._limits, self._number, self._count = rpc, limits, beside, count
        self._beside: list[RawHeader | None] = []  # of the part at hand
        self._addresses, self._topics = list(addresses), topics
        self._at, self._to = from_block, to_block
        # density is a matter of the filter: programmes come one by one, so lists of similar length share what was learnt
        self._key = f"{len(self._addresses).bit_length()}{'' if topics is None else 't'}"
        self._timeouts = self._limited = 0

    def __aiter__(self) -> AsyncIterator[Part]:
        return self._parts()

    async def _parts(self) -> AsyncIterator[Part]:
        while self._at <= self._to and self._addresses:
            last = self._at + self._limits.span(self._key, self._to - self._at + 1) - 1
            self._beside = []
            try:
                logs = await self._ask(last)
            except RpcError as refusal:
                self._learn(refusal, last - self._at + 1)
                if not (isinstance(refusal, TooManyResults) and last == self._at):
                    continue
                logs = await self._from_receipts()
            else:
                self._limits.went_through(self._key, last - self._at + 1)
            self._timeouts = self._limited = 0
            part = Part(self._at, last, logs, tuple(self._beside))
            self._at = last + 1
            yield part

    async def _ask(self, last: int) -> list[RawLog]:
        size = self._limits.max_addresses
        chunks = [self._addresses[start : start + size] for start in range(0, len(self._addresses), size)]
        if len(chunks) == 1:
            return await self._ask_for(chunks[0], last)
        logs: list[RawLog] = []
        for chunk in chunks:
            logs += await self._ask_for(chunk, last)
        return sorted(logs, key=_place)

    async def _ask_for(self, addresses: Sequence[bytes], last: int) -> list[RawLog]:
        if self._number is None:
            return await self._rpc.logs(addresses, self._at, last, self._topics)
        logs, header = await self._rpc.logs_beside(addresses, self._at, last, self._topics, self._number)
        self._beside.append(header)
        return logs

    def _learn(self, refusal: RpcError, asked: int) -> None:
        """Make the next request smaller, or raise the refusal where that would not help."""
        match refusal:
            case RangeTooLarge() if asked > 1:
                self._limits.too_wide(asked, refusal.suggested)
            case TooManyResults():
                if asked > 1:
                    self._limits.too_full(self._key, asked, refusal.suggested)
            case TooManyAddresses() if min(self._limits.max_addresses, len(self._addresses)) > 1:
                self._limits.max_addresses = min(self._limits.max_addresses, len(self._addresses)) // 2
            case Unreachable(kind=Kind.TIMEOUT | Kind.UNAVAILABLE_OR_RANGE) if asked > 1 and self._timeouts < PATIENCE:
                self._timeouts += 1
                self._limits.too_full(self._key, asked, None)
            case RateLimited() if self._limited < PATIENCE:
                self._limited += (
                    1  # the same again: the transport waits as long as the endpoint wants, at a slower pace
                )
            case _:
                raise refusal

    async def _from_receipts(self) -> list[RawLog]:
        """The logs of the one block at hand, which holds more than the endpoint lets through."""
        raw = await self._rpc.header(self._at)
        header = None if raw is None else verify_header(raw, None, self._at, count=self._count)
        receipts = None if header is None else await self._rpc.receipts(header.hash)
        if header is None or receipts is None:
            raise BeyondHead(
                "it holds no receipts of a block whose logs it found too many",
                endpoint=self._rpc.name,
                method="eth_getBlockReceipts",
                params=f"block {self._at}",
                kind=Kind.BLOCK_NOT_FOUND,
            )
        if self._number is not None:
            self._beside.append(await self._rpc.header(self._number))
        addresses = {hex0x(address) for address in self._addresses}
        topics = [
            None
            if choice is None
            else {hex0x(choice)}
            if isinstance(choice, bytes)
            else {hex0x(each) for each in choice}
            for choice in self._topics or ()
        ]
        return [
            log
            for log in logs_of_receipts(header, receipts, count=self._count)
            if log.address.lower() in addresses
            and all(
                choice is None or (at < len(log.topics) and log.topics[at].lower() in choice)
                for at, choice in enumerate(topics)
            )
        ]


def _place(log: RawLog) -> tuple[int, int]:
    try:
        return int(log.block_number or "", 16), int(log.log_index or "", 16)
    except ValueError:
        raise BadAnswer(f"a log without a place: block {log.block_number}, index {log.log_index}") from None
