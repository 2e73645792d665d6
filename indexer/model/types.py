"""Addresses, hashes, amounts, block references and a chain's schedule: the words that every room speaks.

Bytes inside, lower-case 0x hex and decimal strings at the edges. Nothing here touches the world.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

Address = NewType("Address", bytes)  # 20 bytes
Hash32 = NewType("Hash32", bytes)  # 32 bytes
ChainId = NewType("ChainId", int)
BlockNumber = NewType("BlockNumber", int)
Amount = NewType("Amount", int)  # base units, 0 … 2**256 - 1
Millis = NewType("Millis", int)  # Unix time in milliseconds

UINT256_MAX = 2**256 - 1
ZERO_HASH = Hash32(bytes(32))
ZERO_ADDRESS = Address(bytes(20))


class BadValue(ValueError):
    """A value from outside that is not what it should be: `what` it was meant to be, and `why` it is not."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")
        self.what, self.why = what, why


def _from_hex(text: object, size: int, what: str) -> bytes:
    if not isinstance(text, str) or not text.startswith(("0x", "0X")):
        raise BadValue(what, f"expected 0x and {size * 2} hex digits, got {str(text)[:80]!r}")
    try:
        raw = bytes.fromhex(text[2:])
    except ValueError:
        raise BadValue(what, f"not hexadecimal: {text[:80]!r}") from None
    if len(raw) != size or len(text) != 2 + 2 * size:
        raise BadValue(what, f"expected {size} bytes, got {len(raw)}")
    return raw


def address(text: object, what: str = "address") -> Address:
    """20 bytes from 0x hex of any case. Raises BadValue."""
    return Address(_from_hex(text, 20, what))


def hash32(text: object, what: str = "hash") -> Hash32:
    """32 bytes from 0x hex of any case. Raises BadValue."""
    return Hash32(_from_hex(text, 32, what))


def uint256(text: object, what: str = "amount") -> Amount:
    """An integer 0 … 2**256-1 from a decimal string or an int (not a bool, not a float). Raises BadValue."""
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise BadValue(what, f"expected a decimal string, got {str(text)[:80]!r}")
    if isinstance(text, str) and not (text.isascii() and text.isdigit() and len(text) <= 78):
        raise BadValue(what, f"expected a decimal string of at most 78 digits, got {text[:80]!r}")
    value = int(text)
    if not 0 <= value <= UINT256_MAX:
        raise BadValue(what, "does not fit a uint256")
    return Amount(value)


def hex0x(raw: bytes) -> str:
    """Lower-case 0x hex, as everything leaves the house."""
    return "0x" + raw.hex()


@dataclass(frozen=True, slots=True)
class BlockRef:
    """A block's identity: number and hash together, never the number alone."""

    number: int
    hash: Hash32


@dataclass(frozen=True, slots=True)
class Header:
    """What following needs of a block header. `time_ms` comes from the schedule where the chain has one."""

    number: int
    hash: Hash32
    parent_hash: Hash32
    time_s: int
    time_ms: int
    bloom: bytes  # 256 bytes
    receipts_root: Hash32

    @property
    def ref(self) -> BlockRef:
        return BlockRef(self.number, self.hash)


@dataclass(frozen=True, slots=True)
class Schedule:
    """When each block of a Base chain is due (facts/base.md, section 1).

    T_ms(n) = 1000*(l2_time + 2n) before the first fast (Denim) block, then 200 ms a block. `first_fast_block` is read
    from the chain at start, never shipped as an article of faith.
    """

    l2_time: int  # seconds
    first_fast_block: int

    def time_ms(self, number: int) -> int:
        if number < self.first_fast_block:
            return 1000 * (self.l2_time + 2 * number)
        return 1000 * (self.l2_time + 2 * self.first_fast_block) + 200 * (number - self.first_fast_block)

    def first_block_at_or_after(self, time_ms: int) -> int:
        """The lowest block number whose time is not before `time_ms`."""
        fast_ms = 1000 * (self.l2_time + 2 * self.first_fast_block)
        if time_ms <= fast_ms:
            return max(0, -(-(time_ms - 1000 * self.l2_time) // 2000))
        return self.first_fast_block + -(-(time_ms - fast_ms) // 200)
