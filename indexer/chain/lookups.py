"""Answers what partners' pollers ask about a transaction: whether this chain holds it, whether it succeeded, what it moved.

Promises that an answer names a block whose header was verified and that our follower does not contradict, with logs that the
header commits to; and that it is looked at again until its block is final, since until then it may be another, or none.
What the answer is worth is the reconciler's.
"""

from __future__ import annotations

from typing import Final

import structlog
from eth_hash.auto import keccak

from indexer.chain.integrity import Count, Lie, logs_of_receipts
from indexer.chain.linkage import Unsettled
from indexer.chain.logs import headers_of
from indexer.chain.proof import bloom_of_logs
from indexer.chain.rpc import Rpc
from indexer.chain.rpc_errors import MethodMissing, RpcError
from indexer.chain.wire import RawLog, RawReceipt, exact_bytes, quantity
from indexer.model.types import Hash32, Header, hex0x
from indexer.store import lookups as store
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
    chain: str, chain_id: int, rpc: Rpc, lease: Lease, wakeups: Wakeups, *, metrics: Metrics, count: Count | None = None
) -> None:
    """Until cancelled, or until the lease is lost."""
    seen: set[str] = set()  # what was told
    while True:
        async with lease.transaction() as conn:
            _, finalized = await store.chain_heights(conn, chain_id)
            open_ones = await store.questions(conn, chain_id, finalized, PAUSE, AT_ONCE)
        answers: list[AnswerRow] = []
        failed: list[bytes] = []
        known = {question.tx_hash: question for question in open_ones}
        for question in open_ones:
            try:
                found = await _look(rpc, question, finalized, count)
            except (RpcError, Lie, Unsettled) as error:
                metrics.lookups.labels(chain, "error").inc()
                if len(seen) < 100 and (told := f"{type(error).__name__} {error}") not in seen:
                    seen.add(told)
                    log.warning("a transaction could not be looked up", chain=chain, reason=str(error))
                failed.append(question.tx_hash)
                continue
            metrics.lookups.labels(chain, _outcome(found)).inc()
            answers.append(found)
        changed = 0
        if answers or failed:
            async with lease.transaction() as conn:
                for position, found in enumerate(answers):
                    was = known[found.tx_hash]
                    if found.block_number is None and was.block_number is not None:
                        if await store.canonical_hash(conn, chain_id, was.block_number) == was.block_hash:
                            # the block that it was found in stands: who does not know the transaction is behind
                            metrics.lookups.labels(chain, "contradicted").inc()
                            failed.append(found.tx_hash)
                        continue
                    ours = None
                    if found.block_number is not None:
                        ours = await store.canonical_hash(conn, chain_id, found.block_number)
                    if ours is not None and ours != found.block_hash:
                        # the follower holds another block there: one of the two is behind, so nothing is known now
                        metrics.lookups.labels(chain, "contradicted").inc()
                        answers[position] = AnswerRow(found.tx_hash)
                changed = await store.answer(conn, chain_id, [a for a in answers if a.tx_hash not in failed])
                await store.attempted(conn, chain_id, failed)
        if changed:
            wakeups.poke("facts")
        if len(open_ones) < AT_ONCE:
            await wakeups.wait(("facts", "heads"), IDLE)


def _outcome(found: AnswerRow) -> str:
    return "absent" if found.block_number is None else "failed" if found.success is False else "held"


async def _look(rpc: Rpc, question: Question, finalized: int, count: Count | None) -> AnswerRow:
    tx = Hash32(question.tx_hash)
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
    receipt = await _committed(rpc, header, tx, receipt, count)
    try:
        moved = [transfer for entry in receipt.logs if (transfer := _transfer(entry)) is not None]
        success = quantity(receipt.status or "0x0") == 1
    except ValueError as why:
        raise Lie("receipt_parse", f"receipt of {hex0x(tx)}: {why}") from None
    return AnswerRow(tx, number, block_hash, success, moved, final=number <= finalized)


async def _committed(rpc: Rpc, header: Header, tx: Hash32, receipt: RawReceipt, count: Count | None) -> RawReceipt:
    """The receipt as the block's own receipts have it; where a node has no such method, one that its bloom admits."""
    try:
        receipts = await rpc.receipts(header.hash)
    except MethodMissing:
        receipts = None
    if receipts is not None:
        logs_of_receipts(header, receipts, count=count)
        for each in receipts:
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
