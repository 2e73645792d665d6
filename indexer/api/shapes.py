"""The shapes of JSON that the contract speaks of and that no other struct holds: what a registration looks like, and what
stands in the parts of an operation and of a signal that are stored and passed on as JSON.

They describe: the OpenAPI document is made from them, and nothing is read through them. New fields may appear in answers.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

Address = Annotated[str, Meta(pattern="^0x[0-9a-f]{40}$", description="20 bytes, lower-case hex")]
Hash = Annotated[str, Meta(pattern="^0x[0-9a-f]{64}$", description="32 bytes, lower-case hex")]
Decimal = Annotated[str, Meta(pattern="^[0-9]+$", description="an unsigned integer in decimal")]
Signed = Annotated[str, Meta(pattern="^-?[0-9]+$", description="an integer in decimal")]
BrandName = Annotated[str, Meta(min_length=1, max_length=200, description="a brand of the configuration")]
# Text that the store can hold: NUL is refused before anything looks at a body.
Text = Annotated[str, Meta(pattern="^[^\\u0000]*$")]
Consumer = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=200,
        pattern="^[^\\u0000-\\u001f\\u007f-\\u009f]*$",
        description="who works; for people",
    ),
]

_AnyAddress = Annotated[str, Meta(pattern="^0[xX][0-9a-fA-F]{40}$")]
_AnyHash = Annotated[str, Meta(pattern="^0[xX][0-9a-fA-F]{64}$")]
_AnyUint = Annotated[str, Meta(pattern="^[0-9]{1,78}$")] | Annotated[int, Meta(ge=0)]

Kind = Literal["loyfin.issuance", "loyfin.redemption"]


# ------------------------------------------------------------------------------------------------ registering


class LegRegistration(Struct, frozen=True, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """One movement of value to wait for. It is identified by `nonce`, else by a non-zero `operationHash`, else by
    `"match": "wallet_amount"`. Numbers are uint256, in base units or Unix seconds (0: never)."""

    kind: Kind
    chain_id: _AnyUint
    issuer: _AnyAddress
    holder: _AnyAddress
    loyalty_id: _AnyHash
    amount: _AnyUint
    factory: _AnyAddress | None = None
    expires_at: _AnyUint | None = None
    deadline: _AnyUint | None = None
    nonce: _AnyHash | None = None
    operation_hash: _AnyHash | None = None
    match: Literal["nonce", "operation_hash", "wallet_amount"] | None = None


class Registration(Struct, frozen=True, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """What a brand waits for, under its own reference. The same again, after normalising, is the same operation."""

    brand: str
    reference: Annotated[str, Meta(min_length=1, max_length=200, pattern="^[^\\u0000-\\u001f\\u007f-\\u009f]*$")]
    legs: Annotated[list[LegRegistration], Meta(min_length=1, max_length=16)]
    requested_at: Annotated[datetime, Meta(tz=True, description="when the customer asked")] | None = None
    metadata: Annotated[dict[str, Any], Meta(description="at most 8 kB; returned as it came")] | None = None


# ------------------------------------------------------------------------------------------------ an operation's parts


class Leg(Struct, frozen=True, rename="camel", kw_only=True):
    """A leg after normalising."""

    kind: str
    match: str
    amount: Decimal
    chain_id: Decimal | UnsetType = UNSET
    factory: Address | UnsetType = UNSET
    issuer: Address | UnsetType = UNSET
    holder: Address | UnsetType = UNSET
    loyalty_id: Hash | UnsetType = UNSET
    expires_at: Decimal | UnsetType = UNSET
    deadline: Decimal | UnsetType = UNSET
    nonce: Hash | UnsetType | None = UNSET
    operation_hash: Hash | UnsetType | None = UNSET


class Evidence(Struct, frozen=True, rename="camel", kw_only=True):
    """What settles a leg: `basis` says why they belong together, `confidence` how final it is."""

    leg: int
    evidence_id: UUID
    basis: str
    ambiguous: bool
    confidence: str
    chain_id: Decimal | UnsetType = UNSET
    block_number: Decimal | UnsetType = UNSET
    block_hash: Hash | UnsetType = UNSET
    block_time: datetime | UnsetType = UNSET
    tx_hash: Hash | UnsetType = UNSET
    log_index: int | UnsetType = UNSET
    explorer_url: str | UnsetType | None = UNSET


class Difference(Struct, frozen=True):
    """A term on which a leg and a piece of evidence do not agree."""

    term: str
    expected: str
    found: str


class Conflict(Struct, frozen=True, rename="camel", kw_only=True):
    """Evidence that a person has to decide about: `POST …/resolve` with its `evidenceId`."""

    leg: int
    evidence_id: UUID
    differences: list[Difference] | UnsetType = UNSET


class Waiting(Struct, frozen=True):
    """What a leg still waits for."""

    leg: int


# ------------------------------------------------------------------------------------------------ a signal


class SignalOperation(Struct, frozen=True, kw_only=True):
    """The operation at the moment of the signal."""

    id: UUID
    reference: str
    status: str
    legs: list[Leg]
    metadata: dict[str, Any]


class SignalData(Struct, frozen=True, rename="camel", kw_only=True):
    """`sequence` counts the brand's signals without a gap. `supersededBy` stands where a later signal took this one back."""

    id: UUID
    stream: UUID
    brand: str
    sequence: Annotated[int, Meta(ge=1)]
    generation: int
    supersedes: UUID | None
    evidence: list[dict[str, Any]]
    superseded_by: UUID | UnsetType = UNSET
    operation: SignalOperation | UnsetType = UNSET


class Signal(Struct, frozen=True):
    """The body of a webhook, as docs/webhooks.md describes it."""

    type: str
    timestamp: datetime
    data: SignalData


class SignalPage(Struct, frozen=True, rename="camel"):
    """`nextCursor` is never null: it is where to go on, also when there was nothing."""

    data: list[Signal]
    next_cursor: str


# ------------------------------------------------------------------------------------------------ answers with stored JSON


def with_parts(struct: type[Struct], **parts: Any) -> type[Struct]:
    """The same struct for the document: fields that pass stored JSON on (`msgspec.Raw`) have the shapes named here."""
    fields: list[Any] = []
    for entry in msgspec.structs.fields(struct):
        shape = parts.pop(entry.name, entry.type)
        assert shape is not msgspec.Raw, f"{struct.__name__}.{entry.name} has no shape"
        if entry.required:
            fields.append((entry.name, shape, msgspec.field(name=entry.encode_name)))
        else:
            fields.append((entry.name, shape, msgspec.field(default=entry.default, name=entry.encode_name)))
    assert not parts, f"{struct.__name__} has no {', '.join(parts)}"
    return msgspec.defstruct(struct.__name__, fields, kw_only=True, namespace={"__doc__": struct.__doc__})


# ------------------------------------------------------------------------------------------------ an example

REGISTRATION: dict[str, Any] = {
    "brand": "bloom",
    "reference": "redemption-8841",
    "requestedAt": "2026-11-21T10:00:00Z",
    "metadata": {"orderId": "8841"},
    "legs": [
        {
            "kind": "loyfin.redemption",
            "chainId": "8453",
            "issuer": "0x" + "15" * 20,
            "holder": "0x" + "a1" * 20,
            "loyaltyId": "0x" + "1d" * 32,
            "amount": "250",
            "deadline": "1795000000",
            "nonce": "0x" + "5e" * 32,
        }
    ],
}
