"""What a node says, as it says it: headers, logs and receipts of the Ethereum JSON-RPC, typed but not yet believed.

The Raw structs are for msgspec: hex stays hex, unknown keys are ignored, what some node or era leaves out is None.
`parse_log` makes bytes of a log's hex, strictly; whether headers and receipts tell the truth is for `integrity`.
"""

from __future__ import annotations

from binascii import unhexlify
from functools import lru_cache

import msgspec

INT4_MAX = 2**31 - 1
INT8_MAX = 2**63 - 1


class RawHeader(msgspec.Struct, rename="camel", kw_only=True, gc=False):
    """A block header of eth_getBlockBy*, eth_getHeaderBy* or `newHeads`.

    The first group is hashed, in this order, as far as the era has the field (facts/base.md, section 2); the second is
    the node's word about it.
    """

    parent_hash: str | None = None
    sha3_uncles: str | None = None
    miner: str | None = None
    state_root: str | None = None
    transactions_root: str | None = None
    receipts_root: str | None = None
    logs_bloom: str | None = None
    difficulty: str | None = None
    number: str | None = None  # null in a pending block
    gas_limit: str | None = None
    gas_used: str | None = None
    timestamp: str | None = None  # whole seconds
    extra_data: str | None = None
    mix_hash: str | None = None
    nonce: str | None = None
    base_fee_per_gas: str | None = None  # London
    withdrawals_root: str | None = None  # Shanghai, Canyon
    blob_gas_used: str | None = None  # Cancun, Ecotone
    excess_blob_gas: str | None = None
    parent_beacon_block_root: str | None = None
    requests_hash: str | None = None  # Prague, Isthmus

    hash: str | None = None
    timestamp_ms: str | None = None  # base-reth's copy of the schedule; not hashed, so nobody relies on it


class RawLog(msgspec.Struct, rename="camel", kw_only=True, gc=False):
    """A log of eth_getLogs, of a receipt, or of a `logs` subscription."""

    address: str
    topics: tuple[str, ...]
    data: str
    block_number: str | None = None  # null in a pending block, as the five below
    block_hash: str | None = None
    transaction_hash: str | None = None
    transaction_index: str | None = None
    log_index: str | None = None
    block_timestamp: str | None = None  # whole seconds; most nodes since 2024
    removed: bool | None = None


class RawReceipt(msgspec.Struct, rename="camel", kw_only=True, gc=False):
    """A receipt of eth_getBlockReceipts, with all that goes into the receipts trie."""

    transaction_hash: str
    transaction_index: str
    block_hash: str | None = None
    block_number: str | None = None
    type: str | None = None  # absent: legacy
    status: str | None = None
    root: str | None = None  # before Byzantium instead of `status`
    cumulative_gas_used: str | None = None
    logs_bloom: str | None = None
    logs: list[RawLog]
    deposit_nonce: str | None = None
    deposit_receipt_version: str | None = None  # from Canyon on it is hashed, and so is the nonce


class BadLog(ValueError):
    """A log that no honest node sends; the answer it came in is worth nothing."""


class Log(msgspec.Struct, gc=False):
    """A parsed log: bytes, not hex. `block_time_ms` is the caller's word (schedule or header)."""

    address: bytes
    topics: tuple[bytes, ...]
    data: bytes
    block_number: int
    block_hash: bytes
    block_time_ms: int
    tx_hash: bytes
    tx_index: int
    log_index: int


@lru_cache(maxsize=1 << 16)
def quantity(text: str) -> int:
    """A JSON-RPC quantity: 0x and hex digits; leading zeros are let through. Raises ValueError."""
    if text[:2] != "0x" or not (text.isascii() and text[2:].isalnum()) or len(text) > 66:
        raise ValueError(f"not a quantity: {text[:80]!r}")
    return int(text[2:], 16)


def exact_bytes(text: str, size: int) -> bytes:
    """`size` bytes from 0x hex. Raises ValueError."""
    if text[:2] != "0x" or len(text) != 2 + 2 * size:
        raise ValueError(f"expected 0x and {2 * size} hex digits, got {text[:80]!r}")
    return unhexlify(text[2:])  # unlike bytes.fromhex it takes no white space


def _words(texts: tuple[str, ...]) -> tuple[bytes, ...]:
    words = tuple([unhexlify(text[2:]) for text in texts if len(text) == 66 and text[:2] == "0x"])
    if len(words) != len(texts) or len(words) > 4:
        raise ValueError(f"topics are not at most four words: {[text[:80] for text in texts[:5]]}")
    return words


# Emitters and block hashes come again and again, and so do topics: the event, the factory, the issuer, the programme.
_frequent = lru_cache(maxsize=1 << 14)(exact_bytes)
_topics = lru_cache(maxsize=1 << 12)(_words)


def parse_log(raw: RawLog, time_ms: int) -> Log:
    """The Log of one answer's log, strictly. Raises BadLog for what is odd, out of range, pending or `removed`."""
    number, block_hash, tx_hash = raw.block_number, raw.block_hash, raw.transaction_hash
    tx_index, log_index, data = raw.transaction_index, raw.log_index, raw.data
    try:
        if raw.removed:  # eth_getLogs answered with the other fork's undo: graph-node#5661
            raise ValueError("removed is true")
        if number is None or block_hash is None or tx_hash is None or tx_index is None or log_index is None:
            raise ValueError("of no block: pending")
        if data[:2] != "0x":
            raise ValueError(f"data without 0x: {data[:80]!r}")
        if len(tx_hash) != 66 or tx_hash[:2] != "0x":
            raise ValueError(f"transactionHash: expected 32 bytes, got {tx_hash[:80]!r}")
        log = Log(
            _frequent(raw.address, 20),
            _topics(tuple(raw.topics)),
            unhexlify(data[2:]),
            quantity(number),
            _frequent(block_hash, 32),
            time_ms,
            unhexlify(tx_hash[2:]),
            quantity(tx_index),
            quantity(log_index),
        )
    except ValueError as error:  # binascii.Error and a non-ASCII string are ValueErrors too
        raise BadLog(f"log {raw.log_index} of block {raw.block_number} at {raw.address[:80]}: {error}") from None
    if log.log_index > INT4_MAX or log.tx_index > INT4_MAX or max(log.block_number, time_ms) > INT8_MAX:
        # 0xffffffff is a node's underflow, seen in the wild (facts/faults.md F41)
        raise BadLog(
            f"log {raw.log_index} of transaction {raw.transaction_index}, block {raw.block_number}: no index or time"
        )
    return log
