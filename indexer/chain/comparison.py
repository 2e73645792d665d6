"""A new reading of finalized blocks against what is stored: what is missing, what is too much, what is not the same.

Promises that a range answer alone convicts nobody: a stored log that it leaves out, or tells differently, is looked up in the
block itself, by hash, and stands where it stands there; where the block's receipts prove it, the range answer is counted as a
lie. Nor does it add anything alone where several endpoints are to agree: what it has more is looked up likewise. What to do about a
difference is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import structlog

from indexer.chain import witnesses
from indexer.chain.decode import Decoded, Speakers, Token
from indexer.chain.integrity import Outcome, bloom_admits
from indexer.chain.linkage import Unsettled
from indexer.chain.logs import checked, timed
from indexer.chain.reading import Ranges, Task
from indexer.chain.rpc_errors import MethodMissing, UnknownBlock
from indexer.chain.wire import RawLog
from indexer.model.types import BlockRef, Hash32, Header, hex0x
from indexer.store import facts, stored
from indexer.store.facts import Place, SomeRows
from indexer.store.stored import Reading

log = structlog.get_logger(__name__)

COMPLETE = "logs_complete"  # the check that a range answer leaves out nothing of what is known to stand …
REAL = "logs_real"  # … and the one that it makes up nothing

#: (emitter, block) → whether the block was read for the emitter before: what was not can be no difference.
WasRead = Callable[[bytes, int], bool]


@dataclass(frozen=True, slots=True)
class Difference:
    """One log that is not stored as it was read now. `what`: 'missing' | 'extra' | 'different', in these `columns`."""

    what: str
    place: Place
    emitter: bytes
    columns: list[str] = field(default_factory=list)

    def shown(self) -> dict[str, object]:
        """For reports."""
        told: dict[str, object] = {
            "what": self.what,
            "blockNumber": str(self.place.number),
            "blockHash": hex0x(self.place.block_hash),
            "logIndex": self.place.log_index,
            "emitter": hex0x(self.emitter),
        }
        return told | ({"columns": self.columns} if self.columns else {})


@dataclass(frozen=True, slots=True)
class Findings:
    """What one window brought. `rows` and `withdraw` put the store right; without `settled` the reading is not believed."""

    logs: int
    rows: SomeRows
    withdraw: list[Place]
    tokens: list[Token]
    differences: list[Difference]
    unread: int  # logs of blocks that had not been read for their emitter
    readable: int  # logs kept raw before, which can be read now
    settled: bool

    def count(self, what: str) -> int:
        return sum(difference.what == what for difference in self.differences)


class Comparison:
    """Compares windows. `speakers` is shared with the caller, who teaches it the tokens of what he stored."""

    def __init__(self, task: Task, ranges: Ranges, speakers: Speakers) -> None:
        self._task, self._ranges, self.speakers = task, ranges, speakers

    async def window(self, low: int, high: int, asked: frozenset[bytes], was_read: WasRead) -> Findings:
        """Raises RpcError, Lie, Unsettled."""
        task = self._task
        logs, _ = await self._ranges.logs(asked, low, high)
        rows = task.decoder.decode(logs, self.speakers)
        ours = await stored.readings(task.lease.connection, task.chain.chain_id, sorted(asked), low, high)
        theirs = stored.as_stored(rows)
        missing, doubted = await self._borne_out([place for place in theirs if place not in ours], theirs, asked)
        doubtful = [place for place in ours if ours[place] != theirs.get(place)]
        readable = {place for place in doubtful if place in theirs and self._read_now(ours[place], theirs[place])}
        differences, wrong, kept = [], [], 0
        by_block: dict[tuple[int, bytes], list[Place]] = {}
        for place in doubtful:
            if place not in readable:
                by_block.setdefault((place.number, place.block_hash), []).append(place)
        for (number, block_hash), places in by_block.items():
            standing, proven = await self._standing(
                number, Hash32(block_hash), {p: ours[p] for p in places}, theirs, asked
            )
            kept += len(standing)
            if standing:
                # not proven: without receipts nobody can say which of two readings leaves out
                task.count(COMPLETE, Outcome.FAIL if proven else Outcome.SKIP)
            wrong += [place for place in places if place not in standing]
        unread = {place for place in missing if not was_read(stored.emitter_of(theirs[place]), place.number)}
        for place in sorted([*missing, *wrong]):
            reading = theirs.get(place)
            if place in unread:
                continue
            if reading is None:
                differences.append(Difference("extra", place, stored.emitter_of(ours[place])))
            elif place in ours:
                columns = stored.differing(ours[place], reading)
                differences.append(Difference("different", place, stored.emitter_of(reading), columns))
            else:
                differences.append(Difference("missing", place, stored.emitter_of(reading)))
        if not kept:
            task.count(COMPLETE, Outcome.PASS)
        if kept or doubted:
            log.warning(
                "another reading is at odds with logs that stand: it is not believed, and they are read once more",
                chain=task.chain.name, endpoint=task.rpc.name, from_block=low, to_block=high, logs=kept + doubted,
            )  # fmt: skip
        return Findings(
            logs=len(logs),
            rows=facts.only(rows, {*missing, *readable, *(place for place in wrong if place in theirs)}),
            withdraw=[*readable, *wrong],
            tokens=[] if doubted else rows.tokens,
            differences=differences,
            unread=len(unread),
            readable=len(readable),
            settled=kept == doubted == 0,
        )

    @staticmethod
    def _read_now(ours: Reading, theirs: Reading) -> bool:
        """Whether the log is the same, and only our knowledge has grown: no fault of anybody's."""
        if not stored.only_raw(ours) or stored.only_raw(theirs):
            return False
        width = stored.CANONICAL
        return ours[0][1][:width] == theirs[0][1][:width]

    async def _borne_out(
        self, places: list[Place], theirs: Mapping[Place, Reading], asked: frozenset[bytes]
    ) -> tuple[list[Place], int]:
        """Which of the logs that this reading has more than the store may be stored, and how many may not.

        Where several witnesses are needed, a log is in a block that so many hold, and in the receipts that prove themselves
        against its header; where nobody has receipts, its bloom has room for the log. Raises Unsettled where too few tell of the block.
        """
        pool = self._task.source.pool
        if pool.quorum == 1:
            return places, 0
        good: list[Place] = []
        by_block: dict[tuple[int, bytes], list[Place]] = {}
        for place in places:
            by_block.setdefault((place.number, place.block_hash), []).append(place)
        for (number, block_hash), there in by_block.items():
            verdict = await witnesses.judge(pool, BlockRef(number, Hash32(block_hash)))
            if verdict.undone:  # of a block that is not the chain's
                self._task.count(REAL, Outcome.FAIL)
                continue
            if not verdict.stands:
                raise Unsettled(f"{self._task.rpc.name} has a log of block {number}, which too few endpoints hold")
            (header,) = await self._ranges.headers([number])
            truth = await self._of_block(header, asked) if header.hash == block_hash else {}
            if truth is None:
                real = [place for place in there if self._may_hold(header, theirs[place])]
            else:
                real = [place for place in there if truth.get(place) == theirs[place]]
            if len(real) < len(there):
                self._task.count(REAL, Outcome.FAIL)
            good += real
        return good, len(places) - len(good)

    async def _standing(
        self,
        number: int,
        block_hash: Hash32,
        ours: Mapping[Place, Reading],
        theirs: Mapping[Place, Reading],
        asked: frozenset[bytes],
    ) -> tuple[set[Place], bool]:
        """Which of these stored logs of one block stand as they are stored, or may, whatever the range answer says; and whether
        the block's receipts prove it."""
        (header,) = await self._ranges.headers([number])
        if header.hash != block_hash:
            if any(place in theirs for place in ours):
                raise Unsettled(f"{self._task.rpc.name}: logs of block {number} are of another block than its header")
            if await self._undone(BlockRef(number, block_hash)):
                return set(), False  # of a block that lost
            return set(ours), False
        truth = await self._of_block(header, asked)
        if truth is None:
            # without the block's receipts only the bloom can show absence: an answer without a log is one node's word again
            alone = self._task.source.pool.quorum == 1  # else one node's word is not enough, said twice
            again = await self._again(header, asked) if alone and any(place in theirs for place in ours) else {}
            return {
                place
                for place, reading in ours.items()
                if (again.get(place) != theirs[place] if place in theirs else self._may_hold(header, reading))
            }, False
        return {place for place in ours if truth.get(place) != theirs.get(place)}, True

    async def _undone(self, ours: BlockRef) -> bool:
        """Whether a finalized block of ours is another one: never on the word of one endpoint, where several are to agree."""
        pool = self._task.source.pool
        return pool.quorum == 1 or (await witnesses.judge(pool, ours)).undone

    @staticmethod
    def _may_hold(header: Header, reading: Reading) -> bool:
        return bloom_admits(header.bloom, [stored.emitter_of(reading)])

    async def _of_block(self, header: Header, asked: frozenset[bytes]) -> dict[Place, Reading] | None:
        """What the block holds by its receipts, where these make the root in its header; None where they can't be had, or prove
        nothing: an endpoint can make them so, and alter what a bloom does not show."""
        try:
            answer = await self._task.source.receipts(header)
        except MethodMissing:
            return None
        if answer is None or answer[1] is not None:
            return None
        addresses = {hex0x(address) for address in asked}
        raws = [raw for receipt in answer[0] for raw in receipt.logs if raw.address.lower() in addresses]
        return stored.as_stored(self._decoded(header, raws, asked))

    async def _again(self, header: Header, asked: frozenset[bytes]) -> dict[Place, Reading]:
        """The block's logs by its hash: the third reading of what the first two tell differently."""
        try:
            raws = await self._task.rpc.logs_of(header.hash, sorted(asked))
        except UnknownBlock:
            raise Unsettled(f"{self._task.rpc.name} does not know block {header.number} by its hash") from None
        return stored.as_stored(self._decoded(header, raws, asked))

    def _decoded(self, header: Header, raws: list[RawLog], asked: Collection[bytes]) -> Decoded:
        held = {header.number: header}
        logs = checked(
            timed(raws, self._ranges.schedule, held, self._task.count),
            header.number,
            header.number,
            asked,
            held,
            self._task.count,
        )
        return self._task.decoder.decode(logs, self.speakers)
