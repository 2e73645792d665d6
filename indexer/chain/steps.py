"""One step along the chain, gathered and checked but not yet stored: headers, decoded events, and the verdict on each block.

Promises that every event of a step is bound by hash to a header in it, and that tokens announced in the step were listened
to from their first block on. By headers, a block is excluded by its bloom or derived from its receipts (`gate`); by ranges
it is only asked for (`unverified`). Linking and storing are the follower's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from indexer.chain.decode import Decoded, Decoder, Speakers
from indexer.chain.integrity import Lie, Outcome
from indexer.chain.linkage import Unsettled
from indexer.chain.logs import checked, headers_of, malformed, timed
from indexer.chain.pool import Node, Source
from indexer.chain.proof import bloom_bits
from indexer.chain.rpc import Rpc
from indexer.chain.rpc_errors import MethodMissing, RpcError, UnknownBlock
from indexer.chain.wire import Log, RawLog, quantity
from indexer.model.types import BlockRef, Header, Schedule
from indexer.store.coverage import Verdict

How = Literal[
    "proven", "whole", "by address"
]  # a block was read: by receipts that make the root in its header, by others, or without
READY = (0.05, 0.1, 0.2, 0.4, 0.8)  # seconds to wait for receipts of a block that was just announced (F30, F83)


@dataclass(frozen=True, slots=True)
class Step:
    """What to commit: `headers` ascending, the last one the new cursor; `covered` as (verdict, low, high)."""

    headers: list[Header]
    rows: Decoded
    covered: list[tuple[Verdict, int, int]]
    filter: frozenset[bytes]
    proven: frozenset[int] = frozenset()  # blocks whose receipts make the root in their header
    read_from: tuple[str, ...] = ()  # who showed these blocks at their heights: the socket's are nobody's here

    @property
    def head(self) -> Header:
        return self.headers[-1]


class Gate:
    """Whether a block may hold a log that we want, by its bloom: a configured emitter, or a token with a topic we know.

    A block that is refused certainly holds none. (A token's log with a topic that nobody knows is not looked for here.)
    """

    def __init__(self, configured: Iterable[bytes], tokens: Iterable[bytes], topics: Iterable[bytes]) -> None:
        self._configured = [bloom_bits(address) for address in configured]
        self._tokens = [bloom_bits(address) for address in tokens]
        self._topics = [bloom_bits(topic) for topic in topics]

    def admits(self, header: Header) -> bool:
        bloom = int.from_bytes(header.bloom, "big")
        if not bloom:
            return False
        return any(bloom & bits == bits for bits in self._configured) or (
            any(bloom & bits == bits for bits in self._topics) and any(bloom & bits == bits for bits in self._tokens)
        )


class Gatherer:
    """Gathers steps, each from the endpoint that leads. `speakers` and `filter` are the follower's to keep up to date.

    `filter` holds whose logs are asked for: every speaker, and tokens whose announcement was orphaned and may return.
    """

    def __init__(self, source: Source, decoder: Decoder, schedule: Schedule | None) -> None:
        self.source, self.schedule = source, schedule
        self._decoder, self._count = decoder, source.count
        self.speakers = Speakers(0, ())
        self.filter: frozenset[bytes] = frozenset()

    @property
    def rpc(self) -> Rpc:
        return self.source.rpc

    # --------------------------------------------------------------------- every header

    async def by_headers(self, headers: Sequence[Header]) -> Step:
        """Linked headers, each passed through the gate; blocks that it admits are read whole, by hash."""
        wanted = self.filter
        logs: dict[int, list[Log]] = {}
        how: dict[int, How] = {}
        while True:
            gate = Gate(self.speakers.speaks_for, wanted.difference(self.speakers.speaks_for), self._decoder.topics)
            admitted = [header for header in headers if header.number not in logs and gate.admits(header)]
            for header, found in zip(admitted, await self._read_all(admitted, wanted), strict=True):
                logs[header.number], how[header.number] = found
            # what strangers say with our topics goes along: the decoder counts it, and stores none of it
            kept = [
                log
                for number in sorted(logs)
                for log in logs[number]
                if log.address in wanted or (log.topics and log.topics[0] in self._decoder.topics)
            ]
            rows = self._decoder.decode(kept, self.speakers)
            new = {token.token for token in rows.tokens} - wanted
            if not new:
                break
            wanted |= new
            # by address: blocks that were asked without the new tokens are asked again
            first = min(token.block_number for token in rows.tokens)
            logs = {number: found for number, found in logs.items() if number < first or how[number] != "by address"}
        # logs that were asked for by address, or that came in receipts which no root proves, are one endpoint's word
        proven = frozenset(number for number in logs if how[number] == "proven")
        gated = proven.union(h.number for h in headers if h.number not in logs)
        return Step(
            list(headers),
            rows,
            _merged((("gate" if h.number in gated else "unverified"), h.number) for h in headers),
            wanted,
            proven,
        )

    async def _read_all(self, headers: Sequence[Header], wanted: frozenset[bytes]) -> list[tuple[list[Log], How]]:
        """What `_read` gives of each, all at once, all of one endpoint: where one of its answers is late, of the next."""
        if not headers:
            return []

        async def read(node: Node) -> list[tuple[list[Log], How]]:
            return await asyncio.gather(*(self._read(node, header, wanted) for header in headers))

        return await self.source.ask(read)

    async def _read(self, node: Node, header: Header, wanted: frozenset[bytes]) -> tuple[list[Log], How]:
        """All logs of a block from its receipts, where there is no such method, the wanted ones by its hash."""
        lie: Lie | None = None
        for pause in (*(READY[:1] if self.source.others else READY), None):
            try:
                found = await self._ask(node, header, wanted)
            except Lie as wrong:  # counted where it was found; receipts that are not ready are the commonest of them
                lie, reason = wrong, str(wrong)
            else:
                if found is not None:
                    counted = self.source.pool.counting(node.name)
                    return timed(found[0], self.schedule, {header.number: header}, counted), found[1]
                lie, reason = None, "the node does not hold it yet"
            if pause is not None:
                await asyncio.sleep(pause)
        if lie is not None and self.source.others:
            raise lie  # asked again elsewhere before there is a verdict
        raise Unsettled(f"{node.name}: receipts of block {header.number}: {reason}")

    async def _ask(self, node: Node, header: Header, wanted: frozenset[bytes]) -> tuple[list[RawLog], How] | None:
        with suppress(MethodMissing):
            answer = await self.source.receipts(header, node)
            if answer is None:
                return None
            receipts, unproven = answer
            return [log for receipt in receipts for log in receipt.logs], "whole" if unproven else "proven"
        try:
            raws = await self._of(node, header, wanted)
        except UnknownBlock:
            return None
        for other in self.source.others_than(node) if not raws else ():
            # the header admits a log and the answer is empty: nobody's word alone settles that
            with suppress(RpcError, Lie):
                raws = await self._of(other, header, wanted)
                break
        return raws, "by address"

    async def _of(self, node: Node, header: Header, wanted: frozenset[bytes]) -> list[RawLog]:
        """Logs of the block by its hash. Raises Lie where they are none of it, or not those that were asked for."""
        raws = await node.rpc.logs_of(header.hash, sorted(wanted))
        held = {header.number: header}
        counted = self.source.pool.counting(node.name)
        checked(timed(raws, self.schedule, held, counted), header.number, header.number, wanted, held, counted)
        return raws

    # --------------------------------------------------------------------- ranges

    async def by_range(
        self, cursor: BlockRef, end: Header, raws: Sequence[RawLog], only: frozenset[bytes] | None = None
    ) -> Step:
        """The logs of cursor+1 … end, bound to the headers of their blocks; what fits none is asked for again by hash.

        `only`: those that were asked for, where that is not the whole filter. Raises Unsettled when the chain moved under the range.
        """
        wanted, headers = self.filter if only is None else only, {end.number: end}
        logs = await self._bind(cursor, end, raws, wanted, headers)
        while True:
            rows = self._decoder.decode(logs, self.speakers)
            new = {token.token for token in rows.tokens} - wanted
            if not new:
                break
            first = min(token.block_number for token in rows.tokens if token.token in new)
            wanted |= new
            more = await self.rpc.logs_adaptive(sorted(new), first, end.number)
            logs = [*logs, *await self._bind(cursor, end, more, frozenset(new), headers)]
        ordered = [headers[number] for number in sorted(headers)]
        covered: list[tuple[Verdict, int, int]] = [("unverified", cursor.number + 1, end.number)]
        return Step(ordered, rows, covered, wanted, read_from=(self.rpc.name,))

    async def _bind(
        self,
        cursor: BlockRef,
        end: Header,
        raws: Sequence[RawLog],
        wanted: frozenset[bytes],
        headers: dict[int, Header],
    ) -> list[Log]:
        """Fetches the headers of the logs' blocks, into `headers`, and keeps what fits them."""
        if not raws:
            return []
        try:
            numbers = sorted({quantity(raw.block_number or "") for raw in raws} - headers.keys())
        except ValueError as error:
            raise malformed(f"block number: {error}", self._count) from None
        if outside := [number for number in numbers if not cursor.number < number <= end.number]:
            self._count("logs_range", Outcome.FAIL)
            raise Lie("logs_range", f"a log of block {outside[0]} is outside {cursor.number + 1}…{end.number}")
        # The ends again, in the same breath: had the chain moved meanwhile, one of them would show it.
        answers = await self.source.ask_on(lambda node: self._headers(node, [*numbers, end.number, cursor.number]))
        if answers[-1].ref != cursor or answers[-2].ref != end.ref:
            raise Unsettled(f"the chain moved while blocks {cursor.number + 1} to {end.number} were read")
        headers.update({header.number: header for header in answers[:-2]})
        self.source.pool.keep([*answers[:-2], end])
        fitting, misfits = [], set()
        for raw in raws:
            header = headers[quantity(raw.block_number or "")]
            if raw.block_hash is not None and raw.block_hash.lower() == "0x" + header.hash.hex():
                fitting.append(raw)
            else:
                misfits.add(header)
        for header in misfits:
            self._count("logs_bound", Outcome.FAIL)
            try:
                again = await self.rpc.logs_of(header.hash, sorted(wanted))
            except UnknownBlock:
                raise Unsettled(f"{self.rpc.name} does not know block {header.number} by its hash") from None
            fitting = [raw for raw in fitting if quantity(raw.block_number or "") != header.number] + again
        logs = timed(fitting, self.schedule, headers, self._count)
        return checked(logs, cursor.number + 1, end.number, wanted, headers, self._count)

    async def _headers(self, node: Node, numbers: Sequence[int]) -> list[Header]:
        return await headers_of(node.rpc, numbers, self.schedule, self.source.pool.counting(node.name))


def _merged(blocks: Iterable[tuple[Verdict, int]]) -> list[tuple[Verdict, int, int]]:
    """Neighbours with one verdict as one range."""
    merged: list[tuple[Verdict, int, int]] = []
    for verdict, number in blocks:
        if merged and merged[-1][0] == verdict and merged[-1][2] == number - 1:
            merged[-1] = (verdict, merged[-1][1], number)
        else:
            merged.append((verdict, number, number))
    return merged
