"""The arithmetic of a block's commitments: header hashes, blooms and receipts roots, recomputed from what a node says.

Promises the values that an execution client computes, on every era of the OP stack, on Ethereum and on Anvil; raises
ValueError where the node's hex is none. Judges nothing: `integrity` compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


# ------------------------------------------------------------------------------------------------ receipts

_DEPOSIT = 0x7E
# Their receipts are `type || rlp([status, cumulative gas, bloom, logs])`. A type that is not here is tried so too, and its
# failure proves nothing (facts/base.md, section 10.9).
KNOWN_TYPES = frozenset({0, 1, 2, 3, 4, _DEPOSIT})

EMPTY_TRIE = keccak(b"\x80")

# A node of a trie in the making: what lies below, by the nibbles of its key.
_Leaves = Sequence[tuple[tuple[int, ...], bytes]]


def receipts_root(receipts: Sequence[RawReceipt]) -> bytes:
    """The root of the trie that a header commits to, of these receipts in this order.

    The logs' place (block, transaction, indexes) is not hashed, nor is anything that a node adds: only status or state root,
    cumulative gas, blooms as their logs make them, and of each log address, topics and data. Raises ValueError on
    malformed hex, and for a receipt without status, root or gas.
    """
    return _trie_root([_receipt(receipt) for receipt in receipts])


def receipt_type(receipt: RawReceipt) -> int:
    """The EIP-2718 type; 0 where the node names none. Raises ValueError."""
    return 0 if receipt.type is None else quantity(receipt.type)


def _receipt(receipt: RawReceipt) -> bytes:
    if receipt.cumulative_gas_used is None or (receipt.status is None and receipt.root is None):
        raise ValueError(f"the receipt of {receipt.transaction_hash} has no status or no cumulative gas")
    outcome = (
        _rlp_quantity(quantity(receipt.status))
        if receipt.status is not None
        else _rlp_string(exact_bytes(receipt.root or "", 32))
    )
    parts = [
        outcome,
        _rlp_quantity(quantity(receipt.cumulative_gas_used)),
        _rlp_string(bloom_of_logs(receipt.logs)),
        _rlp(b"".join(_log(log) for log in receipt.logs), 0xC0),
    ]
    kind = receipt_type(receipt)
    if kind > 0x7F:
        raise ValueError(f"transaction {receipt.transaction_hash} is of type {kind:#x}: a type has seven bits")
    if kind == _DEPOSIT and receipt.deposit_receipt_version is not None:
        # from Canyon on. Before it the nonce is not hashed, even where a node shows one: the version tells the eras apart
        if receipt.deposit_nonce is None:
            raise ValueError(f"the deposit {receipt.transaction_hash} has a version and no nonce")
        parts += [
            _rlp_quantity(quantity(receipt.deposit_nonce)),
            _rlp_quantity(quantity(receipt.deposit_receipt_version)),
        ]
    body = _rlp(b"".join(parts), 0xC0)
    return bytes([kind]) + body if kind else body


def _log(log: RawLog) -> bytes:
    topics = b"".join(_rlp_string(exact_bytes(topic, 32)) for topic in log.topics)
    data = _rlp_string(exact_bytes(log.data, (len(log.data) - 2) // 2))
    return _rlp(_rlp_string(exact_bytes(log.address, 20)) + _rlp(topics, 0xC0) + data, 0xC0)


def _rlp_quantity(number: int) -> bytes:
    return _rlp_string(number.to_bytes((number.bit_length() + 7) // 8, "big"))


def _trie_root(values: Sequence[bytes]) -> bytes:
    """The root of the Merkle Patricia trie {rlp(index): value}, built at once: nothing is looked up in it later."""
    if not values:
        return EMPTY_TRIE
    leaves = sorted((_nibbles(_rlp_quantity(index)), value) for index, value in enumerate(values))
    return keccak(_trie_node(leaves, 0))


def _trie_node(leaves: _Leaves, depth: int) -> bytes:
    """The RLP of the node above these leaves, whose keys agree before `depth`. No key of a list begins another."""
    first, last = leaves[0][0], leaves[-1][0]
    if len(leaves) == 1:
        return _rlp(_rlp_string(_compact(first[depth:], 0x20)) + _rlp_string(leaves[0][1]), 0xC0)
    shared = depth  # sorted: what the outermost two share, all do
    while first[shared] == last[shared]:
        shared += 1
    if shared > depth:
        return _rlp(_rlp_string(_compact(first[depth:shared], 0x00)) + _reference(_trie_node(leaves, shared)), 0xC0)
    below: list[list[tuple[tuple[int, ...], bytes]]] = [[] for _ in range(16)]
    for leaf in leaves:
        below[leaf[0][depth]].append(leaf)
    slots = [_reference(_trie_node(group, depth + 1)) if group else b"\x80" for group in below]
    return _rlp(b"".join(slots) + b"\x80", 0xC0)


def _reference(node: bytes) -> bytes:
    """A node as its parent holds it: by hash, or as it is where that is shorter."""
    return node if len(node) < 32 else _rlp_string(keccak(node))


def _nibbles(key: bytes) -> tuple[int, ...]:
    return tuple(nibble for byte in key for nibble in (byte >> 4, byte & 15))


def _compact(nibbles: tuple[int, ...], flag: int) -> bytes:
    """Hex-prefix encoding (Yellow Paper, appendix C); flag 0x20 for a leaf."""
    nibbles = ((flag >> 4) + 1, *nibbles) if len(nibbles) % 2 else (flag >> 4, 0, *nibbles)
    return bytes(high << 4 | low for high, low in zip(nibbles[::2], nibbles[1::2], strict=True))
