"""What can settle a leg: a Loyfin movement in a block. Pure values; where they come from is the chain room's matter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from uuid import UUID, uuid5

from indexer.model.types import Address, Hash32, hex0x

NAMESPACE_EVIDENCE = UUID("0d5f7c0e-2c39-5d86-a5ad-4b9f5cb4b102")


def evidence_id(chain_id: int, factory: bytes, kind: str, issuer: bytes, nonce: bytes) -> UUID:
    """The id of a signed action's execution, whichever block holds it: promise 4 derives signals from it."""
    return uuid5(NAMESPACE_EVIDENCE, f"{chain_id}:{hex0x(factory)}:{kind}:{hex0x(issuer)}:{hex0x(nonce)}")


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
