"""What can settle a leg: a Loyfin movement in a block, or a transfer in a partner's records.

Pure values; where they come from is the matter of the chain room and of the pollers. Each kind knows its derived identity,
its order among equals and, where it stands in a block of a chain that we follow, its place there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Protocol
from uuid import UUID, uuid5

from indexer.model.types import Address, Hash32, hex0x

NAMESPACE_EVIDENCE = UUID("0d5f7c0e-2c39-5d86-a5ad-4b9f5cb4b102")

LOYFIN, KEYBAN, QIIBEE = "loyfin", "keyban", "qiibee"
LOYFIN_KINDS = ("loyfin.issuance", "loyfin.redemption")
PARTNER_KINDS = ("keyban.mint", "keyban.burn", "qiibee.credit", "qiibee.debit")
INCOMING = frozenset({"loyfin.issuance", "keyban.mint", "qiibee.credit"})  # the wallet receives


def evidence_id(chain_id: int, factory: bytes, kind: str, issuer: bytes, nonce: bytes) -> UUID:
    """The id of a signed action's execution, whichever block holds it: promise 4 derives signals from it."""
    return uuid5(NAMESPACE_EVIDENCE, f"{chain_id}:{hex0x(factory)}:{kind}:{hex0x(issuer)}:{hex0x(nonce)}")


def transfer_id(partner: str, kind: str, record_id: str, wallet: str) -> UUID:
    """The id of one side of a partner's record as evidence: of partner, kind, the record's own id, and the wallet, since an order
    may move to several. Whose account it was read through is no part of it: what two brands can read is one thing still."""
    return uuid5(NAMESPACE_EVIDENCE, f"{partner}:{kind}:{record_id}:{wallet}")


@dataclass(frozen=True, slots=True)
class Place:
    """A block of a chain that we follow, and the log in it; None where a whole transaction was looked at."""

    chain_id: int
    block_number: int
    block_hash: Hash32
    log_index: int | None = None


class Evidence(Protocol):
    """What matching and settling need of any piece of evidence."""

    @property
    def id(self) -> UUID: ...

    @property
    def kind(self) -> str: ...

    @property
    def time_ms(self) -> int: ...

    @property
    def place(self) -> Place | None: ...


@dataclass(frozen=True)
class Movement:
    """PointsIssued or PointsRedeemed in a canonical block.

    Its identity is (chain, factory, kind, issuer, nonce): the same signed action mined again after a reorganisation is the
    same evidence elsewhere. `bucket` is the event's tokenId and the action's expiresAt.
    """

    chain_id: int
    factory: Address
    kind: str
    issuer: Address
    nonce: Hash32
    holder: Address
    loyalty_id: Hash32
    bucket: int
    amount: int
    operation_hash: Hash32 | None
    block_number: int
    block_hash: Hash32
    log_index: int
    tx_hash: Hash32
    time_ms: int

    @cached_property
    def id(self) -> UUID:
        return evidence_id(self.chain_id, self.factory, self.kind, self.issuer, self.nonce)

    @property
    def lane(self) -> tuple[int, bytes, str, bytes]:
        """Only legs of the same lane are considered (design, section 5)."""
        return (self.chain_id, self.factory, self.kind, self.issuer)

    @property
    def position(self) -> tuple[int, int]:
        """Order on a chain is (number, log index), never time: five blocks share a second."""
        return (self.block_number, self.log_index)

    @property
    def place(self) -> Place:
        return Place(self.chain_id, self.block_number, self.block_hash, self.log_index)


class Status(StrEnum):
    """What a partner's record says of itself."""

    PENDING = "pending"  # no place on a ledger yet
    INCLUDED = "included"  # a place, and no word on success: included is not succeeded
    SUCCEEDED = "succeeded"
    FAILED = "failed"  # final: the record says so


class Check(StrEnum):
    """What our own look at a partner's transaction, on a chain that we follow, makes of it."""

    NEEDLESS = "needless"  # a ledger that we do not follow: the partner's word is all there is
    WAITING = "waiting"  # not looked yet, the chain does not hold it (now), or nobody told us which token to look for
    HOLDS = "holds"
    REFUTED = "refuted"  # it failed, or moves something else


@dataclass(frozen=True, slots=True)
class Moved:
    """An ERC-20 Transfer of a transaction, addresses in lower-case 0x text, the value in base units."""

    token: str
    sender: str
    recipient: str
    value: int


@dataclass(frozen=True, slots=True)
class Look:
    """The chain room's answer about one transaction. `block_number` None: the chain does not hold it (now)."""

    chain_id: int
    tx_hash: str
    block_number: int | None = None
    block_hash: Hash32 | None = None
    success: bool | None = None
    moved: tuple[Moved, ...] = ()


@dataclass(frozen=True)
class PartnerTransfer:
    """A Keyban order, or one side of a qiibee transaction, as last read. Amounts in base units, times in Unix milliseconds.

    `stated_ms` is the record's own time, or else the look before the first that showed it (`dateless` then); `settled_ms` since when it is included or succeeded with this status, hash and amount,
    `seen_ms` when it was last read so: both by our clock. `looks` are our answers about its transactions, each of them, where
    `chain_id` names a chain that we follow. `contract` is the points token there in lower-case 0x text, by configuration: anyone
    can send a token of their own.
    """

    brand: str
    partner: str
    kind: str
    record_id: str
    wallet: str
    token: str | None
    amount: int | None
    status: Status
    first_seen_ms: int
    stated_ms: int | None = None
    undated: bool = False
    dateless: bool = False
    settled_ms: int | None = None
    seen_ms: int = 0
    network: str | None = None
    chain_id: int | None = None
    tx_hashes: tuple[str, ...] = ()
    block_number: int | None = None
    withdrawn: bool = False
    transfers: tuple[
        str, ...
    ] = ()  # on a ledger that we do not follow: what the record names there, each by its own words
    looks: tuple[Look, ...] = ()
    contract: str | None = None

    @cached_property
    def id(self) -> UUID:
        return transfer_id(self.partner, self.kind, self.record_id, self.wallet)

    @property
    def lane(self) -> tuple[str, str]:
        return (self.brand, self.kind)

    @property
    def time_ms(self) -> int:
        """Its own time; where it has none, when it was first seen."""
        return self.first_seen_ms if self.stated_ms is None else self.stated_ms

    @property
    def order(self) -> tuple[int, str]:
        """Among equals by time, then id: the same whichever page it was read from."""
        return (self.time_ms, str(self.id))

    @cached_property
    def _values(self) -> list[tuple[str, int]]:
        """(transaction, value) of what moved to or from the wallet there, of the token whose transfers count."""
        receives = self.kind in INCOMING
        return [
            (look.tx_hash, moved.value)
            for look in self.looks
            if look.chain_id == self.chain_id and look.tx_hash in self.tx_hashes and look.block_number is not None
            for moved in look.moved
            if moved.token == self.contract and (moved.recipient if receives else moved.sender) == self.wallet
        ]

    @cached_property
    def held(self) -> Counter[object]:
        """What its transactions carry for it: on a chain that we follow as far as we looked, transfers by their number; on another
        ledger the transfers that it names, each of them one."""
        side = (self.chain_id, self.kind, self.wallet)
        if self.chain_id is None:
            return Counter((*side, named) for named in set(self.transfers))
        if self.check is Check.HOLDS:
            return Counter((*side, tx, value) for tx, value in self._values)
        return Counter((*side, tx) for tx in self.tx_hashes)  # not looked at: whoever names one of them first has it

    @cached_property
    def drawn(self) -> Counter[object]:
        """Of `held`, what it stands for itself: records that name one transfer are one movement of value."""
        own = [key for key in self.held if isinstance(key, tuple) and key[-1] == self.amount]
        if self.check is Check.HOLDS and len(self.tx_hashes) == 1 and own:
            return Counter(own[:1])
        return self.held

    def left_by(self, drawn: Counter[object]) -> bool:
        """Whether there is a transfer for it beside what others have drawn."""
        return all(drawn[key] + times <= self.held[key] for key, times in self.drawn.items())

    @cached_property
    def check(self) -> Check:
        """Our own look at its transactions, all of them."""
        if self.chain_id is None:
            return Check.NEEDLESS
        looks = {look.tx_hash: look for look in self.looks if look.chain_id == self.chain_id}
        ours = [looks.get(tx_hash) for tx_hash in self.tx_hashes]
        seen = [look for look in ours if look is not None and look.block_number is not None]
        if any(look.success is False for look in seen):
            return Check.REFUTED
        if not ours or len(seen) < len(ours) or any(look.success is None for look in seen):
            return Check.WAITING
        if self.contract is None:
            return Check.WAITING
        values = [value for _, value in self._values]
        # a transaction may carry the transfers of several orders: one of them may be this one's
        one = len(seen) == 1 and self.amount in values
        return Check.HOLDS if self.amount is not None and (one or sum(values) == self.amount) else Check.REFUTED

    @property
    def lacks_contract(self) -> bool:
        """On a chain that we follow, and nobody has configured which token's transfers count there."""
        return self.chain_id is not None and self.contract is None

    @property
    def place(self) -> Place | None:
        """The last block of its transactions, once our own look holds."""
        if self.chain_id is None or self.check is not Check.HOLDS:
            return None
        blocks = [
            (look.block_number, look.block_hash)
            for look in self.looks
            if look.tx_hash in self.tx_hashes and look.block_number is not None and look.block_hash is not None
        ]
        if not blocks:
            return None
        number, block_hash = max(blocks)
        return Place(self.chain_id, number, block_hash)

    @property
    def counts(self) -> bool:
        """Whether it can settle a leg at all: on a ledger, with a known amount, there still, and not refuted by our own look."""
        return (
            not self.withdrawn
            and self.amount is not None
            and self.status in (Status.INCLUDED, Status.SUCCEEDED)
            and self.check is not Check.REFUTED
        )


@dataclass(frozen=True, slots=True)
class Hint:
    """What Loyfin's API says of a signed action. It ends nothing: the action may still be mined."""

    partner: str
    record_id: str
    chain_id: int
    factory: Address
    kind: str
    issuer: Address
    nonce: Hash32
    operation_hash: Hash32 | None
    status: str  # pending | submitted | mined | rejected
    reason: str | None = None

    @property
    def lane(self) -> tuple[int, bytes, str, bytes]:
        return (self.chain_id, self.factory, self.kind, self.issuer)
