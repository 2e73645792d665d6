"""Operations, their legs and their states: the transition table is data, and `steps` walks it.

A state is a function of facts: the evidence of each leg, the brand's wishes and receipts, a person's decisions. Called
again with the same facts, `steps` returns nothing. Reading facts and sending signals is left to others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from indexer.model.evidence import Movement, PartnerTransfer
from indexer.model.types import Address, Hash32

NAMESPACE_OPERATION = UUID("6f7d6b1c-6d0f-5a8e-9c55-0b6b3f6a9e01")  # functions.sql derives the ids
NEVER = 2**40  # a deadline or bucket beyond this second never passes (design, section 5, Expiry)


class State(StrEnum):
    PENDING = "pending"
    SUBMITTED = "submitted"
    CONFIRMING = "confirming"
    READY = "ready"
    FULFILLED = "fulfilled"
    REVERTED = "reverted"
    EXPIRED = "expired"
    INCOMPLETE = "incomplete"
    CONFLICT = "conflict"
    CANCELLED = "cancelled"


_S = State
_FACTS = frozenset(
    {_S.PENDING, _S.SUBMITTED, _S.CONFIRMING, _S.READY, _S.INCOMPLETE, _S.CONFLICT, _S.EXPIRED, _S.CANCELLED}
)

# From each state to which others; the diagram in the docs is drawn from this.
TRANSITIONS: dict[State, frozenset[State]] = {
    _S.PENDING: frozenset(
        {_S.SUBMITTED, _S.CONFIRMING, _S.READY, _S.EXPIRED, _S.INCOMPLETE, _S.CANCELLED, _S.CONFLICT}
    ),
    _S.SUBMITTED: frozenset({_S.CONFIRMING, _S.READY, _S.EXPIRED, _S.INCOMPLETE, _S.CANCELLED, _S.CONFLICT}),
    _S.CONFIRMING: frozenset({_S.PENDING, _S.SUBMITTED, _S.READY, _S.INCOMPLETE, _S.CANCELLED, _S.CONFLICT}),
    _S.INCOMPLETE: _FACTS - {_S.INCOMPLETE},
    _S.EXPIRED: frozenset({_S.CONFLICT}),
    _S.CANCELLED: frozenset({_S.CONFLICT}),
    _S.CONFLICT: _FACTS - {_S.CONFLICT},
    _S.READY: frozenset({_S.REVERTED, _S.FULFILLED}),
    _S.FULFILLED: frozenset({_S.REVERTED}),
    _S.REVERTED: frozenset(
        {_S.CONFIRMING, _S.READY, _S.FULFILLED, _S.PENDING, _S.EXPIRED, _S.INCOMPLETE, _S.CANCELLED, _S.CONFLICT}
    ),
}


@dataclass(frozen=True)
class Leg:
    """One movement of value on Loyfin that an operation waits for. Amounts in base units, times in Unix milliseconds."""

    operation_id: UUID
    index: int
    brand: str
    kind: str
    match: str  # nonce | operation_hash | wallet_amount
    chain_id: int
    factory: Address
    issuer: Address
    holder: Address
    loyalty_id: Hash32
    bucket: int
    amount: int
    deadline: int
    nonce: Hash32 | None
    operation_hash: Hash32 | None
    requested_at_ms: int
    registered_at_ms: int
    released: bool = False  # its operation expired or was cancelled: watched, but last in every queue

    @property
    def key(self) -> tuple[UUID, int]:
        return (self.operation_id, self.index)

    @property
    def lane(self) -> tuple[int, bytes, str, bytes]:
        return (self.chain_id, self.factory, self.kind, self.issuer)

    @property
    def age(self) -> tuple[bool, int, str, int]:
        """The oldest registered goes first; legs of closed operations last."""
        return (self.released, self.registered_at_ms, str(self.operation_id), self.index)

    @property
    def last_second(self) -> int | None:
        """T of design section 5: the smaller non-zero of deadline and bucket, in Unix seconds; None never expires."""
        bounds = [bound for bound in (self.deadline, self.bucket) if 0 < bound <= NEVER]
        return min(bounds, default=None)

    def differences(self, evidence: Movement) -> list[tuple[str, str, str]]:
        """Terms that do not agree, as (term, expected, found). Empty: the terms are equal."""
        pairs: list[tuple[str, object, object]] = [
            ("holder", self.holder, evidence.holder),
            ("loyaltyId", self.loyalty_id, evidence.loyalty_id),
            ("expiresAt", self.bucket, evidence.bucket),
            ("amount", self.amount, evidence.amount),
        ]
        if self.operation_hash is not None:
            pairs.append(("operationHash", self.operation_hash, evidence.operation_hash))
        return [(term, _text(ours), _text(theirs)) for term, ours, theirs in pairs if ours != theirs]


@dataclass(frozen=True)
class PartnerLeg:
    """One movement of value in a partner's records. Amounts in base units, times in Unix milliseconds.

    Nothing names the record beforehand: only wallet, direction, amount and time can match it (rule 4). It never expires.
    """

    operation_id: UUID
    index: int
    brand: str
    kind: str  # keyban.mint | keyban.burn | qiibee.credit | qiibee.debit
    wallet: str
    amount: int
    token: str | None
    requested_at_ms: int
    registered_at_ms: int
    released: bool = False

    @property
    def key(self) -> tuple[UUID, int]:
        return (self.operation_id, self.index)

    @property
    def partner(self) -> str:
        return self.kind.partition(".")[0]

    @property
    def lane(self) -> tuple[str, str]:
        return (self.brand, self.kind)

    @property
    def group(self) -> tuple[str, str, str, int]:
        """Legs and records with the same are paired at once."""
        return (self.brand, self.kind, self.wallet, self.amount)

    @property
    def age(self) -> tuple[bool, int, str, int]:
        """Order of pairing: by time, then id; legs of closed operations last."""
        return (self.released, self.requested_at_ms, str(self.operation_id), self.index)

    def differences(self, evidence: PartnerTransfer) -> list[tuple[str, str, str]]:
        """Terms that do not agree, as (term, expected, found). Empty: the terms are equal."""
        pairs: list[tuple[str, object, object]] = [
            ("walletId", self.wallet, evidence.wallet),
            ("amount", self.amount, evidence.amount),
        ]
        if self.token is not None:
            pairs.append(("token", self.token, evidence.token))
        return [(term, _text(ours), _text(theirs)) for term, ours, theirs in pairs if ours != theirs]


AnyLeg = Leg | PartnerLeg


def _text(value: object) -> str:
    return "0x" + value.hex() if isinstance(value, bytes) else "none" if value is None else str(value)


class Situation(StrEnum):
    """What the facts say, before one asks where the operation stood."""

    PENDING = "pending"
    SUBMITTED = "submitted"
    CONFIRMING = "confirming"
    SETTLED = "settled"
    EXPIRED = "expired"
    INCOMPLETE = "incomplete"
    CONFLICT = "conflict"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class LegFacts:
    """What is known of one leg."""

    evidence: bool = False  # a canonical piece of evidence is claimed for it
    settled: bool = False  # …at the confidence demanded
    decided: bool = False  # …by a person's decision
    conflict: bool = False  # mismatching evidence that nobody has dismissed
    dead: bool = False  # its time has passed without the event, for certain
    submitted: bool = False  # a partner shows it under way
    failed: bool = False  # a final partner record says failed; a later one may still settle it
    contested: bool = (
        False  # evidence that may be the leg's waits: for witnesses, a neighbour, a person; nothing expires beside it
    )


def situation(legs: Sequence[LegFacts], *, cancelled: bool, closed: bool) -> Situation:
    """What the facts of the legs say.

    `cancelled`: the brand wished so. `closed`: the operation ended as expired or cancelled before; evidence that reaches its
    confidence after that is a conflict until a person decides (promise 6 may not be undone in silence). What a person accepted
    counts: all legs settle the operation, some leave it incomplete.
    """
    if any(leg.conflict for leg in legs):
        return Situation.CONFLICT
    if (cancelled or closed) and any(leg.settled and not leg.decided for leg in legs):
        return Situation.CONFLICT
    if all(leg.settled for leg in legs):
        return Situation.SETTLED
    if (cancelled or closed) and any(leg.settled for leg in legs):
        return Situation.INCOMPLETE
    if cancelled:
        return Situation.CANCELLED
    if closed:
        return Situation.EXPIRED
    evidence, dead = any(leg.evidence for leg in legs), any(leg.dead for leg in legs)
    if (dead or any(leg.failed for leg in legs)) and any(leg.settled for leg in legs):
        return Situation.INCOMPLETE
    if dead and not evidence and not any(leg.contested for leg in legs):
        return Situation.EXPIRED
    if evidence:
        return Situation.CONFIRMING
    return Situation.SUBMITTED if any(leg.submitted for leg in legs) else Situation.PENDING


class BadTransition(AssertionError):
    """A step that the table does not know: a defect of ours, never of the facts."""


def steps(
    state: State, facts: Situation, *, receipt: bool, same_evidence: bool = True, gone_for_good: bool = False
) -> list[State]:
    """The states to walk through, in order; empty when the operation already stands where the facts put it.

    `receipt`: the brand has handed over, in whichever generation. `same_evidence`: the evidence is what the standing `ready`
    named. `gone_for_good`: finalized history has passed the blocks that held the lost evidence.
    """
    walked: list[State] = []
    here = state
    while (there := _next(here, facts, receipt, same_evidence, gone_for_good)) is not None:
        if there not in TRANSITIONS[here]:
            raise BadTransition(f"{here} -> {there} on {facts}")
        walked.append(there)
        # what is entered now rests on today's evidence; a receipt alone does not change what it rests on
        same_evidence = same_evidence or (here, there) != (State.READY, State.FULFILLED)
        here = there
    return walked


_OPEN = {
    Situation.PENDING: State.PENDING,
    Situation.SUBMITTED: State.SUBMITTED,
    Situation.CONFIRMING: State.CONFIRMING,
    Situation.SETTLED: State.READY,
    Situation.EXPIRED: State.EXPIRED,
    Situation.INCOMPLETE: State.INCOMPLETE,
    Situation.CONFLICT: State.CONFLICT,
    Situation.CANCELLED: State.CANCELLED,
}
_SETTLED_AFTER_ALL = frozenset({Situation.CONFLICT, Situation.SETTLED, Situation.INCOMPLETE})


def _next(here: State, facts: Situation, receipt: bool, same_evidence: bool, gone_for_good: bool) -> State | None:
    target = _OPEN[facts]
    match here:
        case State.READY:
            if receipt:
                return State.FULFILLED  # the goods are out, whatever the chain does next
            return None if facts is Situation.SETTLED and same_evidence else State.REVERTED
        case State.FULFILLED:
            return None if facts is Situation.SETTLED and same_evidence else State.REVERTED
        case State.REVERTED:
            if facts is Situation.SETTLED:
                return State.FULFILLED if receipt else State.READY
            if facts in (Situation.PENDING, Situation.SUBMITTED):
                return State.PENDING if gone_for_good and not receipt else None
            return None if facts is Situation.CONFIRMING and receipt else target
        case State.EXPIRED | State.CANCELLED:
            # a leg settled after all; where a person accepted it already, conflict is passed through
            return State.CONFLICT if facts in _SETTLED_AFTER_ALL else None
        case State.CONFIRMING if facts is Situation.EXPIRED:
            return State.PENDING  # the evidence is gone first; then time has passed
        case State.SUBMITTED if facts is Situation.PENDING:
            return None  # a partner's silence un-submits nothing (promise 8)
        case _:
            return None if target is here else target
