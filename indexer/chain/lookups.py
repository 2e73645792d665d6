"""Answers what partners' pollers ask about a transaction: whether this chain holds it, whether it succeeded, what it moved.

Promises that an answer names a block whose header was verified and that our follower does not contradict, with logs that the
header commits to; and that it is looked at again until its block is final, since until then it may be another, or none.
What the answer is worth is the reconciler's.
"""

from __future__ import annotations

from typing import Final

import structlog
from eth_hash.auto import keccak

from indexer.chain.integrity import Lie
from indexer.chain.linkage import Unsettled
from indexer.chain.logs import headers_of
from indexer.chain.pool import Source
from indexer.chain.proof import bloom_of_logs
from indexer.chain.rpc_errors import MethodMissing, RpcError
from indexer.chain.wire import RawLog, RawReceipt, exact_bytes, quantity
from indexer.model.types import Hash32, Header, hex0x
from indexer.store import lookups as store
from indexer.store.connection import Connection
from indexer.store.leases import Lease
from indexer.store.lookups import AnswerRow, Question
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics

TRANSFER: Final = keccak(b"Transfer(address,address,uint256)")
AT_ONCE: Final = 20  # questions between two commits
PAUSE: Final = 2.0  # seconds until a young answer is looked at again; older ones less and less often
IDLE: Final = 2.0  # seconds between looks for questions, when nothing is heard

log = structlog.get_logger(__name__)


async def answer_lookups(
    chain: str, chain_id: int, source: Source, lease: Lease, wakeups: Wakeups, *, metrics: Metrics
) -> None:
    """Until cancelled, or until the lease is lost."""
    seen: set[str] = set()  # what was told
    while True:
        async with lease.transaction() as conn:
            _, finalized = await store.chain_heights(conn, chain_id)
            open_ones = await store.questions(conn, chain_id, finalized, PAUSE, AT_ONCE)
        found: list[tuple[Question, AnswerRow]] = []
        unlearnt: list[bytes] = []  # what is stored of these stays
        for question in open_ones:
            try:
                answer = await _look(source, question, finalized)
            except (RpcError, Lie, Unsettled) as error:
                source.failed(error)
                metrics.lookups.labels(chain, "error").inc()
                if len(seen) < 100 and (told := f"{type(error).__name__} {error}") not in seen:
                    seen.add(told)
                    log.warning("a transaction could not be looked up", chain=chain, reason=str(error))
                unlearnt.append(question.tx_hash)
                continue
            metrics.lookups.labels(chain, _outcome(answer)).inc()
            found.append((question, answer))
        changed = 0
        if open_ones:
            async with lease.transaction() as conn:
                answers = []
                for question, answer in found:
                    agreed = await _agreed(conn, chain_id, question, answer)
                    if agreed is not answer:
                        metrics.lookups.labels(chain, "contradicted").inc()
                    if agreed is None:
                        unlearnt.append(question.tx_hash)
                    else:
                        answers.append(agreed)
                changed = await store.answer(conn, chain_id, answers)
                await store.attempted(conn, chain_id, unlearnt)
        if changed:
            wakeups.poke("facts")
        if len(open_ones) < AT_ONCE:
            await wakeups.wait(("facts", "heads"), IDLE)


async def _agreed(conn: Connection, chain_id: int, question: Question, found: AnswerRow) -> AnswerRow | None:
    """The answer as far as our follower bears it out: one of the two may be behind. None: nothing was learnt."""
    held = None
    if question.block_number is not None:
        held = await store.canonical_hash(conn, chain_id, question.block_number)
    if held is not None and held == question.block_hash != found.block_hash:
        return None  # the block that it was found in stands
    ours = None if found.block_number is None else await store.canonical_hash(conn, chain_id, found.block_number)
    return found if ours in (None, found.block_hash) else AnswerRow(found.tx_hash)


def _outcome(found: AnswerRow) -> str:
    return "absent" if found.block_number is None else "failed" if found.success is False else "held"


async def _look(source: Source, question: Question, finalized: int) -> AnswerRow:
    """What as many endpoints say as must agree: which transaction a receipt is of is hashed in no header, so nobody can prove it."""
    needed = source.pool.quorum
    if needed == 1:
        return await _look_at(source, question, finalized)
    answers: list[AnswerRow] = []
    trouble: Exception | None = None
    for node in (source.lead, *source.others):
        try:
            answer = await _look_at(source.fixed(node), question, finalized)
        except (RpcError, Lie, Unsettled) as error:
            trouble = trouble or error
            continue
        answers.append(answer)
        if answers.count(answer) >= needed:
            return answer
    said = f"fewer than {needed} endpoints say the same of transaction {hex0x(question.tx_hash)}"
    raise Unsettled(said + ("" if trouble is None else f"; {trouble}"))


async def _look_at(source: Source, question: Question, finalized: int) -> AnswerRow:
    found = await _found(source, question, finalized)
    if found.block_number is None and question.block_number is not None:
        header = (await headers_of(source.rpc, [question.block_number], None, source.count))[0]
        if header.hash == question.block_hash:
            raise Unsettled(
                f"{source.rpc.name} has block {header.number} and does not know {hex0x(question.tx_hash)} in it now"
            )
    return found


async def _found(source: Source, question: Question, finalized: int) -> AnswerRow:
    tx, rpc, count = Hash32(question.tx_hash), source.rpc, source.count
    receipt = await rpc.receipt(tx)
    if receipt is None or receipt.block_hash is None or receipt.block_number is None:
        return AnswerRow(tx)
    try:
        number, block_hash = quantity(receipt.block_number), exact_bytes(receipt.block_hash, 32)
    except ValueError as why:
        raise Lie("receipt_parse", f"receipt of {hex0x(tx)}: {why}") from None
    header = (await headers_of(rpc, [number], None, count))[0]
    if header.hash != block_hash:
        return AnswerRow(tx)  # of a branch that lost
    receipt = await _committed(source, header, tx, receipt)
    try:
        moved = [transfer for entry in receipt.logs if (transfer := _transfer(entry)) is not None]
        success = quantity(receipt.status or "0x0") == 1
    except ValueError as why:
        raise Lie("receipt_parse", f"receipt of {hex0x(tx)}: {why}") from None
    return AnswerRow(tx, number, block_hash, success, moved, final=number <= finalized)


async def _committed(source: Source, header: Header, tx: Hash32, receipt: RawReceipt) -> RawReceipt:
    """The receipt as the block's own receipts have it; where a node has no such method, one that its bloom admits."""
    try:
        answer = await source.receipts(header)
    except MethodMissing:
        answer = None
    if answer is not None:
        for each in answer[0]:
            if each.transaction_hash.lower() == hex0x(tx):
                return each
        raise Lie(
            "receipt_in_block", f"block {header.number} has no receipt of {hex0x(tx)}, and its receipt says it has"
        )
    try:
        own = int.from_bytes(bloom_of_logs(receipt.logs), "big")
    except ValueError as why:
        raise Lie("receipt_parse", f"receipt of {hex0x(tx)}: {why}") from None
    if own & int.from_bytes(header.bloom, "big") != own:
        raise Lie("receipt_bloom", f"logs of {hex0x(tx)} are not in the bloom of block {header.number}")
    return receipt


def _transfer(entry: RawLog) -> dict[str, str] | None:
    """An ERC-20 Transfer as the store keeps it: lower-case 0x addresses, the value in base units. Raises ValueError."""
    if len(entry.topics) != 3 or exact_bytes(entry.topics[0], 32) != TRANSFER:
        return None
    value = exact_bytes(entry.data, 32)
    sender, recipient = (exact_bytes(topic, 32)[12:] for topic in entry.topics[1:])
    return {
        "token": hex0x(exact_bytes(entry.address, 20)),
        "from": hex0x(sender),
        "to": hex0x(recipient),
        "value": str(int.from_bytes(value, "big")),
    }
