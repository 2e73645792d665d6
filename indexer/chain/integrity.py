"""Whether an answer may be believed: each check is a registered value that passes, is skipped or fails, and is counted.

Promises that a Header is one whose hash was recomputed, and that logs and receipts fit the question, themselves and the
headers that we hold. A skip is not a pass. That receipts are complete is only as sure as the header's bloom makes it; who
is asked again, and when a node is put aside, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Generic, TypeVar

from indexer.chain.proof import (
    KNOWN_TYPES,
    bloom_admits,
    bloom_bits,
    bloom_of,
    bloom_of_logs,
    header_hash,
    receipt_type,
    receipts_root,
)
from indexer.chain.wire import INT8_MAX, Log, RawHeader, RawLog, RawReceipt, exact_bytes, quantity
from indexer.model.types import BlockRef, Hash32, Header, Schedule, hex0x

__all__ = [
    "HEADER_CHECKS",
    "LINK_CHECKS",
    "LOG_CHECKS",
    "RECEIPT_CHECKS",
    "Check",
    "Count",
    "Lie",
    "Outcome",
    "bloom_admits",
    "bloom_bits",
    "bloom_of",
    "header_hash",
    "logs_of_receipts",
    "proven_logs",
    "verify_header",
    "verify_links",
    "verify_logs",
]


class Outcome(StrEnum):
    PASS = "pass"  # noqa: S105
    SKIP = "skip"  # the answer lacks what the check looks at
    FAIL = "fail"


Count = Callable[[str, Outcome], None]
Subject = TypeVar("Subject")


class Lie(Exception):
    """An answer that contradicts itself, its question, or what we hold. `check` is the metric's label."""

    explains_itself: ClassVar[bool] = True

    def __init__(self, check: str, what: str) -> None:
        super().__init__(f"{check}: {what}")
        self.check, self.what = check, what


class Skip(Exception):
    """Raised by a check that has nothing to look at."""


@dataclass(frozen=True, slots=True)
class Check(Generic[Subject]):
    """One check. `run` returns what is wrong, None where all is well, and raises Skip (or ValueError: bad hex)."""

    id: str
    run: Callable[[Subject], str | None]


@dataclass(frozen=True, slots=True)
class Observed:
    """A count under which a failed check rejects nothing: for finding out whether the checks fit a chain, or a new release of it."""

    count: Count

    def __call__(self, check: str, outcome: Outcome) -> None:
        self.count(check, outcome)


def _run(checks: Iterable[Check[Subject]], subject: Subject, count: Count | None) -> None:
    for check in checks:
        outcome, wrong = Outcome.PASS, None
        try:
            if (wrong := check.run(subject)) is not None:
                outcome = Outcome.FAIL
        except Skip:
            outcome = Outcome.SKIP
        except ValueError as error:
            outcome, wrong = Outcome.FAIL, str(error)
        if count is not None:
            count(check.id, outcome)
        if wrong is not None and not isinstance(count, Observed):
            raise Lie(check.id, wrong)


# ------------------------------------------------------------------------------------------------ headers


@dataclass(frozen=True, slots=True)
class HeaderAnswer:
    """A header, the number or hash that was asked for (None: a tag or a subscription), and the chain's schedule."""

    raw: RawHeader
    asked: int | bytes | None
    schedule: Schedule | None

    @property
    def number(self) -> int:
        return quantity(self.raw.number or "")

    @property
    def time_s(self) -> int:
        return quantity(self.raw.timestamp or "")


def _sealed(answer: HeaderAnswer) -> str | None:
    # A pending block has no number, and on Base once had a zero hash (base#3274); since base-reth a real one may come.
    if answer.raw.number is None or answer.raw.hash is None or not any(exact_bytes(answer.raw.hash, 32)):
        return f"block {answer.raw.number} with hash {answer.raw.hash} is not sealed"
    return None


def _hash_recomputed(answer: HeaderAnswer) -> str | None:
    # F53; and a proxy that mixes fields of two replicas. Everything that hangs on a header hangs on this.
    ours = header_hash(answer.raw)
    claimed = exact_bytes(answer.raw.hash or "", 32)
    return (
        None if ours == claimed else f"block {answer.raw.number} calls itself {hex0x(claimed)}, hashes to {hex0x(ours)}"
    )


def _as_asked(answer: HeaderAnswer) -> str | None:
    # An answer to somebody else's request (F73), or another fork's block at a height asked by hash (graph-node#490).
    asked = answer.asked
    if asked is None:
        raise Skip
    if isinstance(asked, int):
        return None if answer.number == asked else f"asked for block {asked}, got {answer.number}"
    return (
        None if exact_bytes(answer.raw.hash or "", 32) == asked else f"asked for {hex0x(asked)}, got {answer.raw.hash}"
    )


def _on_schedule(answer: HeaderAnswer) -> str | None:
    # On Base the time of a block is a function of its number (facts/base.md 0.2): a header of another chain, or of a
    # node in another era, shows itself here. If all endpoints fail, the schedule is wrong.
    if answer.schedule is None:
        raise Skip
    due = answer.schedule.time_ms(answer.number) // 1000
    return None if answer.time_s == due else f"block {answer.number} says {answer.time_s} s, the schedule {due} s"


def _millis_on_schedule(answer: HeaderAnswer) -> str | None:
    # base-reth's copy out of tx[1]: not hashed, so never used, but a node that gets it wrong reads another block's body.
    if answer.schedule is None or answer.raw.timestamp_ms is None:
        raise Skip
    due, said = answer.schedule.time_ms(answer.number), quantity(answer.raw.timestamp_ms)
    return None if said == due else f"block {answer.number} says {said} ms, the schedule {due} ms"


HEADER_CHECKS: tuple[Check[HeaderAnswer], ...] = (
    Check("header_sealed", _sealed),
    Check("header_hash", _hash_recomputed),
    Check("header_asked", _as_asked),
    Check("header_schedule", _on_schedule),
    Check("header_millis", _millis_on_schedule),
)


def verify_header(
    raw: RawHeader, schedule: Schedule | None, asked: int | bytes | None = None, *, count: Count | None = None
) -> Header:
    """The Header of a node's header, its hash recomputed. Raises Lie."""
    answer = HeaderAnswer(raw, asked, schedule)
    _run(HEADER_CHECKS, answer, count)
    try:
        number, time_s = answer.number, answer.time_s
        if max(number, 1000 * time_s) > INT8_MAX:  # true to its hash, and nothing that any table holds
            raise ValueError(f"block {number} at {time_s} s")
        return Header(
            number=number,
            hash=Hash32(exact_bytes(raw.hash or "", 32)),
            parent_hash=Hash32(exact_bytes(raw.parent_hash or "", 32)),
            time_s=time_s,
            time_ms=1000 * time_s if schedule is None else schedule.time_ms(number),
            bloom=exact_bytes(raw.logs_bloom or "", 256),
            receipts_root=Hash32(exact_bytes(raw.receipts_root or "", 32)),
        )
    except ValueError as error:  # observed, and yet no header
        raise Lie("header_sealed", str(error)) from None


@dataclass(frozen=True, slots=True)
class HeaderRun:
    """Headers that should follow one another, and the block that the first should follow (None: not known)."""

    headers: Sequence[Header]
    after: BlockRef | None


def _linked(run: HeaderRun) -> str | None:
    # F55: a batch whose elements came from replicas on two forks (proxyd fans a batch out, facts/faults.md P23).
    links = ([run.after] if run.after is not None else []) + [header.ref for header in run.headers]
    if len(links) < 2:
        raise Skip
    for parent, header in zip(links, run.headers[0 if run.after is not None else 1 :], strict=False):
        if header.number != parent.number + 1 or header.parent_hash != parent.hash:
            return (
                f"block {header.number} names parent {hex0x(header.parent_hash)}, "
                f"block {parent.number} is {hex0x(parent.hash)}"
            )
    return None


LINK_CHECKS: tuple[Check[HeaderRun], ...] = (Check("header_link", _linked),)


def verify_links(headers: Sequence[Header], after: BlockRef | None = None, *, count: Count | None = None) -> None:
    """That verified headers of one answer form a chain, upwards. Raises Lie. (A break between an answer and what we
    hold is a reorganisation, not a lie: leave `after` out there, and compare.)
    """
    _run(LINK_CHECKS, HeaderRun(headers, after), count)


# ------------------------------------------------------------------------------------------------ logs


@dataclass(frozen=True, slots=True)
class LogsAnswer:
    """Parsed logs and the question they answer.

    `topics` as in eth_getLogs: per position None (any) or the accepted words. `held` are the blocks that we hold, by
    number; a Header also lends its bloom.
    """

    logs: Sequence[Log]
    from_block: int
    to_block: int
    addresses: Collection[bytes]
    topics: Sequence[Collection[bytes] | None]
    block_hash: bytes | None
    held: Mapping[int, BlockRef | Header]


def _in_range(answer: LogsAnswer) -> str | None:
    # F37: a gateway's cache that answers with a neighbouring range.
    for log in answer.logs:
        if not answer.from_block <= log.block_number <= answer.to_block:
            return f"{_of(log)} is outside {answer.from_block}…{answer.to_block}"
        if answer.block_hash is not None and log.block_hash != answer.block_hash:
            return f"{_of(log)} is of {hex0x(log.block_hash)}, asked was {hex0x(answer.block_hash)}"
    return None


def _in_filter(answer: LogsAnswer) -> str | None:
    # F38: a node that ignores part of the filter would hand us strangers' events.
    for log in answer.logs:
        if log.address not in answer.addresses:
            return f"{_of(log)} is of {hex0x(log.address)}, which was not asked for"
        for position, accepted in enumerate(answer.topics):
            if accepted is not None and (len(log.topics) <= position or log.topics[position] not in accepted):
                return f"{_of(log)} does not match the filter at topic {position}"
    return None


def _bound(answer: LogsAnswer) -> str | None:
    # Double reorganisation between two calls: logs of B stored under A (geth#16734, the reason for EIP-234; F39, F44).
    if not answer.held:
        raise Skip
    for log in answer.logs:
        held = answer.held.get(log.block_number)
        if held is not None and held.hash != log.block_hash:
            return f"{_of(log)} is of {hex0x(log.block_hash)}, we hold {hex0x(held.hash)}"
    return None


def _one_hash_per_block(answer: LogsAnswer) -> str | None:
    # Within one answer two hashes at one height are two forks (erigon#16861: three answers for one fresh block).
    seen: dict[int, bytes] = {}
    for log in answer.logs:
        if seen.setdefault(log.block_number, log.block_hash) != log.block_hash:
            return f"block {log.block_number} is {hex0x(seen[log.block_number])} and {hex0x(log.block_hash)}"
    return None


def _indexed(answer: LogsAnswer) -> str | None:
    # A wrong transaction hash on a log during a reorganisation (reth#11427), a wrong index for ten minutes (sonic#554).
    by_block: dict[bytes, list[Log]] = {}
    for log in answer.logs:
        by_block.setdefault(log.block_hash, []).append(log)
    for logs in by_block.values():
        logs.sort(key=_log_index)
        hashes: dict[int, bytes] = {}
        indexes: dict[bytes, int] = {}
        highest = 0
        for log in logs:
            if hashes.setdefault(log.tx_index, log.tx_hash) != log.tx_hash:
                return (
                    f"{_of(log)}: transaction {log.tx_index} is {hex0x(hashes[log.tx_index])} and {hex0x(log.tx_hash)}"
                )
            if indexes.setdefault(log.tx_hash, log.tx_index) != log.tx_index:
                return f"{_of(log)}: transaction {hex0x(log.tx_hash)} is {indexes[log.tx_hash]} and {log.tx_index}"
            if log.tx_index < highest:
                return f"{_of(log)}: of transaction {log.tx_index}, after one of transaction {highest}"
            highest = log.tx_index
    return None


def _no_two_in_one_place(answer: LogsAnswer) -> str | None:
    # The same log twice says nothing new (F35) and is dropped; two different ones in one place cannot both be true.
    seen: dict[tuple[bytes, int], Log] = {}
    for log in answer.logs:
        if seen.setdefault((log.block_hash, log.log_index), log) != log:
            return f"{_of(log)} comes in two versions"
    return None


def _admitted(answer: LogsAnswer) -> str | None:
    # F54: a log in a block whose bloom has no room for it was made up, or the header was.
    looked = False
    for log in answer.logs:
        held = answer.held.get(log.block_number)
        if isinstance(held, Header):
            looked = True
            if not bloom_admits(held.bloom, (log.address, *log.topics)):
                return f"{_of(log)} is excluded by the block's bloom"
    if not looked:
        raise Skip
    return None


LOG_CHECKS: tuple[Check[LogsAnswer], ...] = (
    Check("logs_range", _in_range),
    Check("logs_filter", _in_filter),
    Check("logs_bound", _bound),
    Check("logs_one_hash", _one_hash_per_block),
    Check("logs_place", _no_two_in_one_place),
    Check("logs_index", _indexed),
    Check("logs_bloom", _admitted),
)


def verify_logs(
    logs: Sequence[Log],
    *,
    from_block: int,
    to_block: int,
    addresses: Collection[bytes],
    topics: Sequence[Collection[bytes] | None] = (),
    block_hash: bytes | None = None,
    held: Mapping[int, BlockRef | Header] | None = None,
    count: Count | None = None,
) -> list[Log]:
    """The logs in chain order, each once. Raises Lie. What is missing can't be seen here: that is the bloom gate's and
    the second look's to find. Give `addresses` and `topics` as sets.
    """
    _run(LOG_CHECKS, LogsAnswer(logs, from_block, to_block, addresses, topics, block_hash, held or {}), count)
    once = {(log.block_number, log.log_index): log for log in logs}
    return [once[place] for place in sorted(once)]


def _log_index(log: Log) -> int:
    return log.log_index


def _of(log: Log) -> str:
    return f"log {log.log_index} of block {log.block_number}"


# ------------------------------------------------------------------------------------------------ receipts


@dataclass(frozen=True, slots=True)
class ReceiptsAnswer:
    """All receipts of the block of a verified header."""

    header: Header
    receipts: Sequence[RawReceipt]


def _receipts_bound(answer: ReceiptsAnswer) -> str | None:
    # Receipts of another fork, served because only the number was looked at (graph-node#490, P8).
    for receipt in answer.receipts:
        bound = [
            (receipt.block_hash, receipt.block_number),
            *((log.block_hash, log.block_number) for log in receipt.logs),
        ]
        for said, number in bound:
            if said is None or exact_bytes(said, 32) != answer.header.hash:
                return f"transaction {receipt.transaction_hash}: of block {said}, not {hex0x(answer.header.hash)}"
            if number is None or quantity(number) != answer.header.number:
                return f"transaction {receipt.transaction_hash}: of block {number}, not {answer.header.number}"
    return None


def _receipts_in_order(answer: ReceiptsAnswer) -> str | None:
    # F56: one receipt missing in the middle moves nothing else, so the places are counted.
    for place, receipt in enumerate(answer.receipts):
        if quantity(receipt.transaction_index) != place:
            return f"receipt {place} is of transaction {receipt.transaction_index}"
    return None


def _receipts_logs_in_order(answer: ReceiptsAnswer) -> str | None:
    # Log indexes run through the block; a log names its own transaction (reth#11427, P5), and is never `removed`.
    place = 0
    for receipt in answer.receipts:
        for log in receipt.logs:
            if log.log_index is None or quantity(log.log_index) != place:
                return f"log {place} of the block has index {log.log_index}"
            if (log.transaction_hash or "").lower() != receipt.transaction_hash.lower():
                return f"log {place} is of {log.transaction_hash}, inside the receipt of {receipt.transaction_hash}"
            if log.transaction_index is None or quantity(log.transaction_index) != quantity(receipt.transaction_index):
                return f"log {place} has transaction index {log.transaction_index}"
            if log.removed:
                return f"log {place} is removed"
            place += 1
    return None


def _receipts_own_blooms(answer: ReceiptsAnswer) -> str | None:
    looked = False
    for receipt in answer.receipts:
        if receipt.logs_bloom is not None:
            looked = True
            if exact_bytes(receipt.logs_bloom, 256) != bloom_of_logs(receipt.logs):
                return f"the bloom of transaction {receipt.transaction_hash} is not that of its logs"
    if not looked:
        raise Skip
    return None


def _receipts_bloom(answer: ReceiptsAnswer) -> str | None:
    # The block is known, its receipts are not ready, the answer is [] (erigon#17624, geth#26098); or a log is gone.
    # Equal blooms do not prove the list: a log like another leaves no trace. That takes the receipts root.
    if bloom_of(answer.receipts) != answer.header.bloom:
        return f"the logs of the {len(answer.receipts)} receipts do not make the bloom of block {answer.header.number}"
    return None


def _receipts_root(answer: ReceiptsAnswer) -> str | None:
    # The proof: no receipt and no log of the block can be left out, added or altered (F53, F56). A type of transaction that we do
    # not know may be hashed otherwise; then nothing is proven, and nothing is wrong either.
    types = {
        receipt_type(receipt) for receipt in answer.receipts
    }  # one that is no number is a lie, whatever else is missing
    if any(r.cumulative_gas_used is None or (r.status or r.root) is None for r in answer.receipts):
        raise Skip
    ours = receipts_root(answer.receipts)
    if ours == answer.header.receipts_root:
        return None
    if types - KNOWN_TYPES:
        raise Skip
    return (
        f"the {len(answer.receipts)} receipts of block {answer.header.number} make the root {hex0x(ours)}, "
        f"the header says {hex0x(answer.header.receipts_root)}"
    )


# Cheap and telling first: the proof costs most.
RECEIPT_CHECKS: tuple[Check[ReceiptsAnswer], ...] = (
    Check("receipts_bound", _receipts_bound),
    Check("receipts_order", _receipts_in_order),
    Check("receipts_log_order", _receipts_logs_in_order),
    Check("receipts_bloom", _receipts_bloom),
    Check("receipts_own_bloom", _receipts_own_blooms),
    Check("receipts_root", _receipts_root),
)


def proven_logs(
    header: Header, receipts: Sequence[RawReceipt], *, count: Count | None = None
) -> tuple[list[RawLog], str | None]:
    """As `logs_of_receipts`, and why the receipts root proves nothing about them: None where it proves them. Raises Lie."""
    outcomes: dict[str, Outcome] = {}

    def noted(check: str, outcome: Outcome) -> None:
        outcomes[check] = outcome
        if count is not None:
            count(check, outcome)

    _run(RECEIPT_CHECKS, ReceiptsAnswer(header, receipts), Observed(noted) if isinstance(count, Observed) else noted)
    logs = [log for receipt in receipts for log in receipt.logs]
    if outcomes["receipts_root"] is Outcome.PASS:
        return logs, None
    if failed := [check for check, outcome in outcomes.items() if outcome is Outcome.FAIL]:
        return logs, f"failed and only observed: {', '.join(failed)}"
    unknown = sorted({receipt_type(receipt) for receipt in receipts} - KNOWN_TYPES)
    if unknown:
        return logs, f"transactions of a type that is not known here ({', '.join(hex(kind) for kind in unknown)})"
    return logs, "receipts without status or cumulative gas"


def logs_of_receipts(header: Header, receipts: Sequence[RawReceipt], *, count: Count | None = None) -> list[RawLog]:
    """All logs of the header's block, in order, bound to it by hash. Raises Lie."""
    _run(RECEIPT_CHECKS, ReceiptsAnswer(header, receipts), count)
    return [log for receipt in receipts for log in receipt.logs]
