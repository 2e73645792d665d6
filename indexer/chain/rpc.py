"""One endpoint of an EVM chain over JSON-RPC: what the follower and the backfill ask of a node, and nothing else.

Promises answers of the right shape to the request that was sent, and a named error for whatever went wrong; paces itself,
bounds its concurrency and the size of a body, and never shows the URL. It does not believe: what logs, receipts and headers
say is checked by `integrity`, and disagreement between endpoints is for whoever holds several. It never retries a refusal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from random import Random
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

import msgspec

from indexer.chain.integrity import Count
from indexer.chain.rpc_errors import (
    Asked,
    BadAnswer,
    BatchTooLarge,
    BeyondHead,
    Kind,
    MethodMissing,
    Refused,
    RpcError,
    UnknownBlock,
    Unreachable,
)
from indexer.chain.spans import Learned, LogRange, SpanLimits, Topics
from indexer.chain.transport import Call, Observe, Transport
from indexer.chain.wire import RawHeader, RawLog, RawReceipt
from indexer.model.types import BadValue, Hash32, hash32, hex0x

T = TypeVar("T")
Tag = Literal["latest", "safe", "finalized"]

BATCH: Final = 100  # items of one batch; proxyd's own default limit
ADDRESSES: Final = 100  # of one eth_getLogs
_ABREAST: Final = 8  # calls of a batch that had to be sent apart
# not about the call, but about the endpoint
_FOR_ALL: Final = frozenset(
    {Kind.DENIED, Kind.REDIRECT, Kind.UNREACHABLE, Kind.NOT_JSON, Kind.TIMEOUT, Kind.RATE_LIMIT}
)


class Poll(msgspec.Struct, frozen=True):
    """What one polling batch brought. Without `end` the node does not hold the range yet, and `logs` is empty."""

    latest: RawHeader
    cursor: RawHeader | None
    end: RawHeader | None
    logs: list[RawLog]


class Rpc:
    """One endpoint. `url` may hold a key and is never shown; `name` is what is shown instead (default: its host).

    `requests_per_second` paces (each item of a batch counts; less where the endpoint says that it is too much), `timeout` is in seconds and covers one request from the first
    byte sent to the last byte read, `max_body` in bytes after decompression. `observe(endpoint, method, outcome, seconds)`
    hears of every request, and once more, with no seconds, of what turns out to be wrong with its answer: an item of a batch that failed or is
    missing, null for a block that was asked for, another block than that. Every method raises RpcError subclasses and nothing else; reading ranges, a Lie besides.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        requests_per_second: float | None = None,
        timeout: float = 10.0,
        max_body: int = 64 * 2**20,
        concurrency: int = 8,
        rng: Random | None = None,
        observe: Observe | None = None,
    ) -> None:
        self.url = url  # for whoever must tell endpoints apart; never to be shown
        self._transport = Transport(
            url,
            name=name,
            requests_per_second=requests_per_second,
            timeout=timeout,
            max_body=max_body,
            concurrency=concurrency,
            rng=rng or Random(),  # noqa: S311 - jitter, not a secret
            observe=observe,
        )
        self.name = self._transport.name
        self.limits = SpanLimits(max_addresses=ADDRESSES, max_batch=BATCH)

    def __repr__(self) -> str:
        return f"<Rpc {self.name}>"

    async def __aenter__(self) -> Self:
        await self._transport.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._transport.close()

    @property
    def learned(self) -> Learned:
        """The limits found so far, to be kept over a restart; assign what was kept."""
        return self.limits.learned

    @learned.setter
    def learned(self, kept: Learned) -> None:
        self.limits.learned = kept

    # ── single questions ──────────────────────────────────────────────────────────────────────────────────────────

    async def chain_id(self) -> int:
        call: Call[str] = Call("eth_chainId", [], str)
        text = await self._transport.call(call)
        return _quantity(text, self._misfit(call, "a chain id"))

    async def genesis_hash(self) -> Hash32:
        call = _header_call(0)
        header = await self._header(call, 0)
        if header is None:
            raise UnknownBlock("it holds no block 0", endpoint=self.name, method=call.method, params=call.summary)
        return hash32(header.hash)

    async def header(self, at: int | Hash32 | Tag) -> RawHeader | None:
        """The header at a height, of a hash, or of a tag; None where the node says that it holds no such block.

        The five ways in which nodes say so of `safe` and `finalized` (null, -32000, -32001, -39001, and -32602 of those
        that never heard of the tag) are one answer here.
        """
        return await self._header(_header_call(at), at)

    async def headers(self, numbers: Sequence[int]) -> list[RawHeader | None]:
        """Headers of several heights, in their order, a batch at a time."""
        found: list[RawHeader | None] = []
        start = 0
        while start < len(numbers):
            part = numbers[start : start + self._batch_size]
            calls = [_header_call(number) for number in part]
            for number, call, answer in zip(part, calls, await self._batch(calls), strict=True):
                found.append(self._checked_header(call, number, answer))
            start += len(part)
        return found

    async def logs(
        self, addresses: Sequence[bytes], from_block: int, to_block: int, topics: Topics | None = None
    ) -> list[RawLog]:
        """Logs of these emitters in a range (inclusive, both given as heights), in one request as it stands."""
        return await self._transport.call(_logs_call(addresses, from_block, to_block, topics))

    async def logs_beside(
        self, addresses: Sequence[bytes], from_block: int, to_block: int, topics: Topics | None, number: int
    ) -> tuple[list[RawLog], RawHeader | None]:
        """As `logs`, and the header at `number` out of the same batch; after them, where the node takes no batches.

        The header shows which chain the logs are of, and None that the node does not hold that block: whoever asks knows
        its hash.
        """
        ask, beside = _logs_call(addresses, from_block, to_block, topics), _header_call(number)
        if not self.limits.batching or self.limits.max_batch < 2:
            logs = await self._transport.call(ask)
            return logs, await self._header(beside, number)
        answers = await self._batch([ask, beside])
        if isinstance(answers[0], RpcError):
            raise answers[0]
        return answers[0], self._checked_header(beside, number, answers[1])

    async def logs_of(
        self, block_hash: Hash32, addresses: Sequence[bytes], topics: Topics | None = None
    ) -> list[RawLog]:
        """Logs of these emitters in one block, by its hash: UnknownBlock where the node does not hold it."""
        found: list[RawLog] = []
        for part in _chunks(addresses, self.limits.max_addresses):
            query = {"blockHash": hex0x(block_hash)} | _filter(part, topics)
            summary = f"block {_short(block_hash)}, {_emitters(part)}"
            call: Call[list[RawLog]] = Call("eth_getLogs", [query], list[RawLog], summary, "by hash")
            logs = await self._transport.call(call)
            found += logs
        return found

    async def receipts(self, block_hash: Hash32) -> list[RawReceipt] | None:
        """All receipts of a block, by its hash; None where the node does not hold it. MethodMissing is common."""
        call: Call[list[RawReceipt] | None] = Call(
            "eth_getBlockReceipts", [hex0x(block_hash)], list[RawReceipt] | None, f"block {_short(block_hash)}"
        )
        try:
            receipts = await self._transport.call(call)
        except UnknownBlock:
            return None
        if receipts is None:
            self._transport.found(call, Kind.BLOCK_NOT_FOUND)
        return receipts

    async def receipt(self, tx_hash: Hash32) -> RawReceipt | None:
        """The receipt of a transaction; None where the node knows of none: never sent, still waiting, or lost."""
        call: Call[RawReceipt | None] = Call(
            "eth_getTransactionReceipt", [hex0x(tx_hash)], RawReceipt | None, f"transaction {_short(tx_hash)}"
        )
        found = await self._transport.call(call)
        if found is not None and found.transaction_hash.lower() != hex0x(tx_hash):
            raise self._misfit(call, "that transaction")(f"transaction {found.transaction_hash[:80]}")
        return found

    async def has_code(self, address: bytes, at: int | Literal["latest"]) -> bool:
        """Whether a contract stands at the address in that block. PrunedHistory where the state is gone."""
        where = at if isinstance(at, str) else hex(at)
        call: Call[str] = Call("eth_getCode", [hex0x(address), where], str, f"{hex0x(address)} at {at}")
        code = await self._transport.call(call)
        if not code.startswith("0x"):
            raise self._misfit(call, "code")(code)
        return len(code) > 2

    # ── several at once ───────────────────────────────────────────────────────────────────────────────────────────

    async def poll(self, cursor: int, to: int, addresses: Sequence[bytes]) -> Poll:
        """The head, the headers of `cursor` and `to`, and the logs of cursor+1 … to, in one batch where the node can.

        With `to` at the cursor, or without addresses, no logs are asked for. A gateway may answer the items from
        different backends: an end that is null takes the logs with it.
        """
        heads: list[int | Hash32 | Tag] = ["latest", cursor, to]
        calls: list[Call[Any]] = [_header_call(at) for at in heads]
        if to > cursor and addresses:
            calls.append(_logs_call(addresses, cursor + 1, to, None))
        answers = await self._batch(calls)
        latest, at_cursor, end = (
            self._checked_header(call, at, answer)
            for at, call, answer in zip(heads, calls[:3], answers[:3], strict=True)
        )
        if latest is None:
            raise self._misfit(calls[0], "the head")("null")
        logs: list[RawLog] = []
        if end is not None and len(answers) == 4:
            if isinstance(answers[3], RpcError):
                raise answers[3]
            logs = answers[3]
        return Poll(latest, at_cursor, end, logs)

    async def heads(self) -> list[RawHeader | None]:
        """Latest, safe and finalized, in one batch where the node can. None: no such block."""
        wanted: list[Tag] = ["latest", "safe", "finalized"]
        calls = [_header_call(at) for at in wanted]
        answers = await self._batch(calls)
        return [self._checked_header(call, at, answer) for call, at, answer in zip(calls, wanted, answers, strict=True)]

    def log_ranges(
        self,
        addresses: Sequence[bytes],
        from_block: int,
        to_block: int,
        topics: Topics | None = None,
        beside: int | None = None,
        count: Count | None = None,
    ) -> LogRange:
        """`async for part in rpc.log_ranges(…)`: the range in parts that this endpoint answers, each complete, in order.

        Each part is (from_block, to_block, logs, beside). A part that was given is done; an error leaves the rest unasked.
        `beside` is a height: every request for logs brings its header along, as `logs_beside` does.
        """
        return LogRange(self, self.limits, addresses, from_block, to_block, topics, beside, count)

    async def logs_adaptive(
        self,
        addresses: Sequence[bytes],
        from_block: int,
        to_block: int,
        topics: Topics | None = None,
        count: Count | None = None,
    ) -> list[RawLog]:
        """All logs of the range, whatever limits the endpoint has: by parts, and a full block alone by its receipts."""
        parts = self.log_ranges(addresses, from_block, to_block, topics, count=count)
        return [log async for part in parts for log in part.logs]

    # ── asking ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _batch(self, calls: Sequence[Call[Any]]) -> list[Any]:
        """An answer or an RpcError for each call, in their order; smaller batches, or none, where the node wants it."""
        answers: list[Any] = []
        while len(answers) < len(calls):
            size = min(self._batch_size, len(calls) - len(answers))
            part = calls[len(answers) : len(answers) + size]
            if size == 1 or not self.limits.batching:
                answers += await self._apart(part)
                continue
            try:
                got = await self._transport.batch(part)
            except BatchTooLarge:
                self.limits.max_batch = max(1, size // 2)
                continue
            except (MethodMissing, BadAnswer, Refused, Unreachable) as refusal:
                if refusal.kind in _FOR_ALL and refusal.kind is not Kind.NOT_JSON:
                    raise
                apart = await self._apart(part)
                answers += apart
                # what works apart and was refused together: a node without batches (a garbled answer proves nothing, and
                # a range that is too heavy is too heavy alone)
                works = not any(isinstance(answer, RpcError) for answer in apart)
                if works and (isinstance(refusal, Refused | MethodMissing) or (refusal.status or 200) >= 400):
                    self.limits.batching = False
                continue
            # an item that the answer left out is asked alone: gateways cut batches up and lose parts of them
            lost = [call for call, answer in zip(part, got, strict=True) if answer is Transport.MISSING]
            found = iter(await self._apart(lost))
            answers += [next(found) if answer is Transport.MISSING else answer for answer in got]
        return answers

    @property
    def _batch_size(self) -> int:
        return min(self.limits.max_batch, self._transport.pace.at_once or self.limits.max_batch)

    async def _apart(self, calls: Sequence[Call[Any]]) -> list[Any]:
        """As `_batch`, in requests of one call."""
        answers: list[Any] = []
        for part in _chunks(calls, _ABREAST):
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._either(call)) for call in part]
            answers += [task.result() for task in tasks]
            for answer in answers[-len(part) :]:
                if isinstance(answer, RpcError) and answer.kind in _FOR_ALL:
                    raise answer  # it would be the same for the rest
        return answers

    async def _either(self, call: Call[Any]) -> Any:
        try:
            return await self._transport.call(call)
        except RpcError as error:
            return error

    # ── believing nothing ─────────────────────────────────────────────────────────────────────────────────────────

    async def _header(self, call: Call[RawHeader | None], at: int | Hash32 | Tag) -> RawHeader | None:
        try:
            answer: RawHeader | RpcError | None = await self._transport.call(call)
        except RpcError as error:
            answer = error
        return self._checked_header(call, at, answer)

    def _checked_header(self, call: Call[Any], at: int | Hash32 | Tag, answer: Any) -> RawHeader | None:
        if isinstance(answer, UnknownBlock | BeyondHead):
            return None
        if isinstance(answer, RpcError):
            no_such_tag = answer.code in (-32000, -32001, -39001, -32602) and isinstance(answer, Refused)
            if at in ("safe", "finalized") and no_such_tag:
                return None
            raise answer
        if answer is None:  # as if it had said so in one of the other ways
            self._transport.found(call, Kind.FINALITY_UNKNOWN if at in ("safe", "finalized") else Kind.BLOCK_NOT_FOUND)
            return None
        header: RawHeader = answer
        misfit = self._misfit(call, "that block")
        try:
            own = hash32(header.hash)
        except BadValue as why:
            raise misfit(str(why)) from None
        number = _quantity(header.number, misfit)
        if (isinstance(at, int) and number != at) or (isinstance(at, bytes) and own != at):
            raise misfit(f"block {number} ({_short(own)})")
        return header

    def _misfit(self, call: Call[Any], wanted: str) -> Callable[[str], BadAnswer]:
        def error(got: str) -> BadAnswer:
            self._transport.found(call, Kind.MISFIT)
            return BadAnswer(
                f"asked for {wanted}, it answered {got}",
                endpoint=self.name,
                method=call.method,
                params=call.summary,
                kind=Kind.MISFIT,
            )

        return error


def _header_call(at: int | Hash32 | Tag) -> Call[RawHeader | None]:
    if isinstance(at, bytes):
        return Call("eth_getBlockByHash", [hex0x(at), False], RawHeader | None, f"block {_short(at)}")
    where = at if isinstance(at, str) else hex(at)
    return Call("eth_getBlockByNumber", [where, False], RawHeader | None, f"block {at}")


def _logs_call(addresses: Sequence[bytes], first: int, last: int, topics: Topics | None) -> Call[list[RawLog]]:
    if not 0 <= first <= last:
        raise ValueError(f"not a range of blocks: {first} to {last}")
    query = {"fromBlock": hex(first), "toBlock": hex(last)} | _filter(addresses, topics)
    asked: Asked = (first, last)
    return Call("eth_getLogs", [query], list[RawLog], f"blocks {first} to {last}, {_emitters(addresses)}", asked)


def _filter(addresses: Sequence[bytes], topics: Topics | None) -> dict[str, Any]:
    if not addresses:
        raise ValueError("logs without an address would be those of everybody")
    query: dict[str, Any] = {"address": [hex0x(address) for address in addresses]}
    if topics:
        query["topics"] = [
            None if choice is None else hex0x(choice) if isinstance(choice, bytes) else [hex0x(each) for each in choice]
            for choice in topics
        ]
    return query


def _emitters(addresses: Sequence[bytes]) -> str:
    return hex0x(addresses[0]) if len(addresses) == 1 else f"{len(addresses)} addresses"


def _short(block_hash: bytes) -> str:
    return hex0x(block_hash)[:12] + "…"


def _quantity(text: str | None, misfit: Callable[[str], BadAnswer]) -> int:
    try:
        if text is not None and text.startswith("0x") and len(text) <= 18:
            return int(text, 16)
    except ValueError:
        pass
    raise misfit(f"the number {str(text)[:80]!r}") from None


def _chunks(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
