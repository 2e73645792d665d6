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

_Moment = Annotated[datetime, Meta(tz=True)]
_Handle = Annotated[str, Meta(min_length=1, max_length=200, pattern="^[^\\u0000-\\u0020\\u007f-\\u009f]*$")]
_TokenId = Annotated[str, Meta(min_length=1, max_length=100, pattern="^[^\\u0000-\\u0020\\u007f-\\u009f]*$")]

Kind = Literal["loyfin.issuance", "loyfin.redemption", "keyban.mint", "keyban.burn", "qiibee.credit", "qiibee.debit"]


# ------------------------------------------------------------------------------------------------ registering


class _Leg(Struct, frozen=True, rename="camel", forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    """What each kind of leg is a subclass of: `kind` tells them apart."""


class _LoyfinLeg(_Leg, frozen=True, rename="camel", forbid_unknown_fields=True, kw_only=True):
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


class _PartnerLeg(_Leg, frozen=True, rename="camel", forbid_unknown_fields=True, kw_only=True):
    wallet_id: Annotated[_Handle, Meta(description="the partner's own name of the wallet or user; hex has no case")]
    amount: _AnyUint
    requested_at: Annotated[_Moment, Meta(description="when this value was asked for; else the operation's")] | None = (
        None
    )
    match: Literal["wallet_amount"] | UnsetType = UNSET


_LOYFIN = """ It is identified by `nonce`, else by a non-zero `operationHash`, else by `"match": "wallet_amount"`. Numbers are
    uint256, in base units or Unix seconds (0: never)."""
_PARTNER = " Nothing names its record beforehand: it is matched by wallet, amount and time."


class LoyfinIssuanceLeg(_LoyfinLeg, frozen=True, kw_only=True, tag="loyfin.issuance"):
    __doc__ = "Points issued on chain." + _LOYFIN


class LoyfinRedemptionLeg(_LoyfinLeg, frozen=True, kw_only=True, tag="loyfin.redemption"):
    __doc__ = "Points redeemed on chain." + _LOYFIN


class KeybanMintLeg(_PartnerLeg, frozen=True, kw_only=True, tag="keyban.mint"):
    __doc__ = "Points that Keyban mints into a wallet." + _PARTNER


class KeybanBurnLeg(_PartnerLeg, frozen=True, kw_only=True, tag="keyban.burn"):
    __doc__ = "Points that Keyban burns from a wallet." + _PARTNER


class _QiibeeLeg(_PartnerLeg, frozen=True, kw_only=True):
    token: (
        Annotated[_TokenId, Meta(description="qiibee's id of the token, where the brand has several")] | int | None
    ) = None


class QiibeeCreditLeg(_QiibeeLeg, frozen=True, kw_only=True, tag="qiibee.credit"):
    __doc__ = "Tokens that qiibee credits to a user." + _PARTNER


class QiibeeDebitLeg(_QiibeeLeg, frozen=True, kw_only=True, tag="qiibee.debit"):
    __doc__ = "Tokens that qiibee takes from a user." + _PARTNER


LegRegistration = (
    LoyfinIssuanceLeg | LoyfinRedemptionLeg | KeybanMintLeg | KeybanBurnLeg | QiibeeCreditLeg | QiibeeDebitLeg
)


class Registration(Struct, frozen=True, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """What a brand waits for, under its own reference. The same again, after normalising, is the same operation."""

    brand: str
    reference: Annotated[str, Meta(min_length=1, max_length=200, pattern="^[^\\u0000-\\u001f\\u007f-\\u009f]*$")]
    legs: Annotated[list[LegRegistration], Meta(min_length=1, max_length=16)]
    requested_at: Annotated[datetime, Meta(tz=True, description="when the customer asked")] | None = None
    metadata: (
        Annotated[dict[str, Any], Meta(description="at most 8 kB; returned as it came, numbers to the last digit")]
        | None
    ) = None


# ------------------------------------------------------------------------------------------------ an operation's parts


class Leg(Struct, frozen=True, rename="camel", kw_only=True):
    """A leg after normalising: one of Loyfin's with its chain, a partner's with `walletId`."""

    kind: Kind
    match: Literal["nonce", "operation_hash", "wallet_amount"]
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
    wallet_id: str | UnsetType = UNSET
    token: str | UnsetType = UNSET
    requested_at: datetime | UnsetType = UNSET


Confidence = Literal["included", "safe", "finalized"]
Basis = Literal["nonce", "operation_hash", "wallet_amount", "decision"]
Proof = Literal["receipts_root", "cannot_verify", "none", "chain", "partner"]
Provider = Literal["keyban", "qiibee", "loyfin"]


class _Source(Struct, frozen=True, rename="camel", kw_only=True):
    """Where a piece of evidence is: an event in its block, or a partner's record (`provider`, `recordId`)."""

    evidence_id: UUID
    chain_id: Decimal | UnsetType | None = UNSET
    block_number: (
        Annotated[Decimal, Meta(description="of a partner's record its place on the ledger, in the partner's words")]
        | UnsetType
        | None
    ) = UNSET
    block_hash: Hash | UnsetType | None = UNSET
    block_time: datetime | UnsetType = UNSET
    tx_hash: (
        Annotated[str, Meta(description="0x hex; where no chain is named, as the partner spells it")] | UnsetType | None
    ) = UNSET
    log_index: int | UnsetType = UNSET
    provider: Provider | UnsetType = UNSET
    record_id: str | UnsetType = UNSET
    network: Annotated[str, Meta(description="as the partner calls it")] | UnsetType | None = UNSET
    status: Literal["pending", "included", "succeeded", "failed"] | UnsetType = UNSET
    record_time: datetime | UnsetType | None = UNSET


class Evidence(_Source, frozen=True, rename="camel", kw_only=True):
    """What settles a leg: `basis` says why they belong together, `confidence` how final it is, `witnesses` how many endpoints
    were seen to hold its block, and `proof` whether its receipts make the header's root; of a partner's record, whether our own
    look at its `chain` says so or the word of the `partner`."""

    leg: int
    basis: Basis
    ambiguous: bool
    confidence: (
        Annotated[
            Confidence,
            Meta(
                description="null while a partner's transfer is not found on its chain, or too few endpoints hold its block"
            ),
        ]
        | None
    )
    explorer_url: str | UnsetType | None = UNSET
    witnesses: int | UnsetType = UNSET
    proof: Proof | UnsetType = UNSET
    proof_reason: Annotated[str, Meta(description="why the block is not proven, or not yet")] | UnsetType = UNSET
    tx_hashes: list[str] | UnsetType = UNSET


class _Any(_Source, frozen=True, rename="camel", kw_only=True):
    """Evidence with its own terms, or as it settles a leg."""

    kind: Kind | UnsetType = UNSET
    amount: Decimal | UnsetType | None = UNSET
    factory: Address | UnsetType = UNSET
    issuer: Address | UnsetType = UNSET
    holder: Address | UnsetType = UNSET
    loyalty_id: Hash | UnsetType = UNSET
    expires_at: Decimal | UnsetType = UNSET
    nonce: Hash | UnsetType = UNSET
    operation_hash: Hash | UnsetType | None = UNSET
    wallet_id: str | UnsetType = UNSET
    token: str | UnsetType | None = UNSET
    undated: Annotated[bool, Meta(description="without a time of its own: settles by decision alone")] | UnsetType = (
        UNSET
    )
    basis: Basis | UnsetType = UNSET
    ambiguous: bool | UnsetType = UNSET
    confidence: Confidence | UnsetType | None = UNSET
    explorer_url: str | UnsetType | None = UNSET
    witnesses: int | UnsetType = UNSET
    proof: Proof | UnsetType = UNSET
    proof_reason: Annotated[str, Meta(description="why the block is not proven, or not yet")] | UnsetType = UNSET
    tx_hashes: list[str] | UnsetType = UNSET


class Difference(Struct, frozen=True):
    """A term on which a leg and a piece of evidence do not agree."""

    term: str
    expected: str
    found: str


class Conflict(_Any, frozen=True, rename="camel", kw_only=True):
    """Evidence that a person has to decide about: `POST …/resolve` with its `evidenceId`. It comes with its terms or, where it
    is `late` (settled after the operation was closed), as it would settle the leg."""

    leg: int
    differences: list[Difference]
    late: bool | UnsetType = UNSET


class UnderWay(Struct, frozen=True, rename="camel", kw_only=True):
    """A partner's record that is accepted and not on a ledger yet."""

    provider: Provider
    record_id: str


class Refusal(UnderWay, frozen=True, rename="camel", kw_only=True):
    """What a partner calls rejected, cancelled or failed. It ends nothing."""

    reason: str


class Waiting(Struct, frozen=True, kw_only=True):
    """What a leg still waits for: its evidence, more `confidence` in it (`seconds`: on top), or a person's decision."""

    leg: int
    confidence: Literal["included", "confirmed", "safe", "finalized"]
    wanted: Literal["evidence", "confidence", "decision"] = msgspec.field(name="for")
    seconds: float | UnsetType = UNSET
    rejected: list[Refusal] | UnsetType = UNSET
    submitted: UnderWay | UnsetType = UNSET
    reason: Annotated[str, Meta(description="why it cannot come, where that is known")] | UnsetType = UNSET


# ------------------------------------------------------------------------------------------------ a signal


class SignalOperation(Struct, frozen=True, kw_only=True):
    """The operation at the moment of the signal."""

    id: UUID
    reference: str
    status: str
    legs: list[Leg]
    metadata: dict[str, Any]


class SignalEvidence(_Any, frozen=True, rename="camel", kw_only=True):
    """As in an operation, with `leg` and `basis`; that of `settlement.unmatched` has its terms instead."""

    leg: int | UnsetType = UNSET


class Lost(Struct, frozen=True, rename="camel", kw_only=True):
    """What a promise rested on: a block, or a partner's record as it had stood since `settledAt`."""

    chain_id: Decimal | UnsetType = UNSET
    block_number: Decimal | UnsetType = UNSET
    block_hash: Hash | UnsetType = UNSET
    provider: Provider | UnsetType = UNSET
    record_id: str | UnsetType = UNSET
    evidence_id: UUID | UnsetType = UNSET
    settled_at: datetime | UnsetType | None = UNSET


class SignalData(Struct, frozen=True, rename="camel", kw_only=True):
    """`sequence` counts the brand's signals without a gap. `supersededBy` stands where a later signal took this one back.
    `lost` is of `operation.reverted`, `conflicts` of `operation.conflict`, and what follows them of `operation.rejected`."""

    id: UUID
    stream: UUID
    brand: str
    sequence: Annotated[int, Meta(ge=1)]
    generation: int
    supersedes: UUID | None
    evidence: list[SignalEvidence]
    superseded_by: UUID | UnsetType = UNSET
    operation: SignalOperation | UnsetType = UNSET
    lost: list[Lost] | UnsetType = UNSET
    conflicts: list[Conflict] | UnsetType = UNSET
    final: bool | UnsetType = UNSET
    leg: int | UnsetType = UNSET
    provider: Provider | UnsetType = UNSET
    record_id: str | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    executable_until: Decimal | UnsetType | None = UNSET


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
