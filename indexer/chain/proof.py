"""The arithmetic of a block's commitments: header hashes and blooms, recomputed from what a node says.

Promises the values that an execution client computes, on every era of the OP stack, on Ethereum and on Anvil; raises
ValueError where the node's hex is none. Judges nothing: `integrity` compares.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from eth_hash.auto import keccak

from indexer.chain.wire import RawHeader, RawLog, RawReceipt, exact_bytes, quantity

# What is hashed, in order; the size of a byte string, 0 for a quantity, None for bytes of any length. Eras add at the
# end and take nothing away, so "the fields present" is the right list for every one (facts/base.md, section 2).
_HASHED: tuple[tuple[str, int | None], ...] = (
    ("parent_hash", 32),
    ("sha3_uncles", 32),
    ("miner", 20),
    ("state_root", 32),
    ("transactions_root", 32),
    ("receipts_root", 32),
    ("logs_bloom", 256),
    ("difficulty", 0),
    ("number", 0),
    ("gas_limit", 0),
    ("gas_used", 0),
    ("timestamp", 0),
    ("extra_data", None),
    ("mix_hash", 32),
    ("nonce", 8),
    ("base_fee_per_gas", 0),
    ("withdrawals_root", 32),
    ("blob_gas_used", 0),
    ("excess_blob_gas", 0),
    ("parent_beacon_block_root", 32),
    ("requests_hash", 32),
)
_ALWAYS = 15  # fields that every era has


def _rlp(payload: bytes, short: int) -> bytes:
    """Payload behind its RLP length prefix; `short` is 0x80 for a string, 0xc0 for a list."""
    if len(payload) < 56:
        return bytes([short + len(payload)]) + payload
    size = len(payload).to_bytes((len(payload).bit_length() + 7) // 8, "big")
    return bytes([short + 55 + len(size)]) + size + payload


def _rlp_string(value: bytes) -> bytes:
    return value if len(value) == 1 and value[0] < 0x80 else _rlp(value, 0x80)


def header_hash(raw: RawHeader) -> bytes:
    """keccak256 of the header's RLP, of the fields present. Raises ValueError for a missing or malformed field."""
    parts = []
    for position, (name, size) in enumerate(_HASHED):
        value: str | None = getattr(raw, name)
        if value is None:
            if position < _ALWAYS:
                raise ValueError(f"no {name} in the header")
            continue
        if size == 0:
            number = quantity(value)
            raw_bytes = number.to_bytes((number.bit_length() + 7) // 8, "big")
        else:
            raw_bytes = exact_bytes(value, (len(value) - 2) // 2 if size is None else size)
        parts.append(_rlp_string(raw_bytes))
    return keccak(_rlp(b"".join(parts), 0xC0))


@lru_cache(maxsize=1 << 14)
def bloom_bits(item: bytes) -> int:
    """The three bits that an address or topic sets in a bloom, which is read as a big-endian integer."""
    digest = keccak(item)
    bits = 0
    for at in (0, 2, 4):
        bits |= 1 << (int.from_bytes(digest[at : at + 2], "big") & 2047)
    return bits


def bloom_admits(bloom: bytes, items: Iterable[bytes]) -> bool:
    """Whether a log with all of these (address, topics) may be in the block. False is certain, True is not."""
    held = int.from_bytes(bloom, "big")
    return all(held & bits == bits for bits in map(bloom_bits, items))


def bloom_of_logs(logs: Iterable[RawLog]) -> bytes:
    """The bloom of these logs: a receipt's, or a block's. Raises ValueError on malformed hex."""
    held = 0
    for log in logs:
        held |= bloom_bits(exact_bytes(log.address, 20))
        for topic in log.topics:
            held |= bloom_bits(exact_bytes(topic, 32))
    return held.to_bytes(256, "big")


def bloom_of(receipts: Iterable[RawReceipt]) -> bytes:
    """The bloom that a block with these receipts has, from their logs. Raises ValueError on malformed hex."""
    return bloom_of_logs(log for receipt in receipts for log in receipt.logs)
