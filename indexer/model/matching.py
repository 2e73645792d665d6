"""Which evidence settles which leg: the table of design section 5, over one neighbourhood of legs and movements.

Promises: claims are one to one; evidence of another lane (chain, factory, kind, issuer) never touches a leg, whatever
hash it carries; the same facts give the same pairing. A stored claim stands while its evidence is canonical; only those by
wallet and amount are paired anew until a `ready` has left. What settles partner legs is told in `partner_matching.py`;
loading the neighbourhood and storing claims is the settlement room's work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from indexer.model.evidence import Movement, PartnerTransfer
from indexer.model.operation import Leg

LegKey = tuple[UUID, int]


@dataclass(frozen=True, slots=True)
class Claim:
    """A piece of evidence and the leg that it settles. `final`: a `ready` that rests on it has left."""

    leg: LegKey
    evidence_id: UUID
    basis: str  # nonce | operation_hash | wallet_amount | decision
    ambiguous: bool = False
    final: bool = False


@dataclass(frozen=True, slots=True)
class Conflict:
    """Evidence of our own issuer that belongs to a leg and does not agree with it, or that several legs could mean."""

    leg: LegKey
    evidence: Movement | PartnerTransfer
    differences: tuple[tuple[str, str, str], ...]  # (term, expected, found); empty: ambiguous, and held for a decision


@dataclass(frozen=True, slots=True)
class Decision:
    operation_id: UUID
    evidence_id: UUID
    leg: int
    accept: bool


@dataclass(frozen=True, slots=True)
class WalletRules:
    """How a brand's legs by wallet and amount are paired. Milliseconds; `hold`: ambiguous ones wait for a decision."""

    skew_ms: int = 120_000
    window_ms: int = 86_400_000
    hold: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """A partner's record that says failed (or that our own look refutes), and may be about this leg.

    `certain`: the record is final, and there is one for every leg that it can mean.
    """

    evidence: PartnerTransfer
    certain: bool


@dataclass(slots=True)
class Matching:
    claims: dict[LegKey, Claim] = field(default_factory=dict)
    conflicts: dict[LegKey, Conflict] = field(default_factory=dict)
    held: dict[LegKey, Conflict] = field(default_factory=dict)  # ambiguous, and the brand said `hold`
    repeated: list[Movement] = field(default_factory=list)  # a second event with one identity: settles nothing
    # of partner legs without a claim: what a person may accept, what is under way, what failed
    offers: dict[LegKey, list[Conflict]] = field(default_factory=dict)
    submitted: dict[LegKey, PartnerTransfer] = field(default_factory=dict)
    failed: dict[LegKey, Failure] = field(default_factory=dict)

    def __or__(self, other: Matching) -> Matching:
        """Two matchings of legs that have no lane in common."""
        return Matching(
            self.claims | other.claims,
            self.conflicts | other.conflicts,
            self.held | other.held,
            self.repeated + other.repeated,
            self.offers | other.offers,
            self.submitted | other.submitted,
            self.failed | other.failed,
        )


def first_of_identity(movements: Iterable[Movement]) -> tuple[dict[UUID, Movement], list[Movement]]:
    """The first canonical movement of each identity, and those that repeat one."""
    first: dict[UUID, Movement] = {}
    repeated: list[Movement] = []
    for movement in sorted(movements, key=lambda m: m.position):
        if first.setdefault(movement.id, movement) is not movement:
            repeated.append(movement)
    return first, repeated


def match(
    legs: Sequence[Leg],
    movements: Sequence[Movement],
    stored: Sequence[Claim] = (),
    decisions: Sequence[Decision] = (),
    rules: Mapping[str, WalletRules] | None = None,
) -> Matching:
    """Pairs legs and canonical movements. `stored` claims may name evidence that is gone: those are dropped."""
    table = _Table(legs, movements, decisions, rules or {})
    table.keep_stored(stored)
    table.by_decision(decisions)
    table.by_nonce()
    table.by_hash()
    table.by_wallet()
    return table.result


class _Table:
    """One run of the rules, in their order. `free` are the movements that no earlier rule bound."""

    def __init__(
        self,
        legs: Sequence[Leg],
        movements: Sequence[Movement],
        decisions: Sequence[Decision],
        rules: Mapping[str, WalletRules],
    ) -> None:
        self.result = Matching()
        self.evidence, self.result.repeated = first_of_identity(movements)
        self.legs = sorted(legs, key=lambda leg: leg.age)
        self.by_key = {leg.key: leg for leg in self.legs}
        self.rules = rules
        self.verdicts = {(d.operation_id, d.evidence_id): d for d in decisions}  # the last one counts
        self.taken: set[UUID] = set()

    def dismissed(self, leg: Leg, movement: Movement) -> bool:
        verdict = self.verdicts.get((leg.operation_id, movement.id))
        return verdict is not None and not verdict.accept

    def settle(self, leg: Leg, movement: Movement, basis: str, ambiguous: bool = False, final: bool = False) -> None:
        self.result.claims[leg.key] = Claim(leg.key, movement.id, basis, ambiguous, final)
        self.taken.add(movement.id)

    def open(self, leg: Leg) -> bool:
        return leg.key not in self.result.claims

    @property
    def free(self) -> list[Movement]:
        return sorted((m for m in self.evidence.values() if m.id not in self.taken), key=lambda m: m.position)

    def keep_stored(self, stored: Sequence[Claim]) -> None:
        """What stands: stored claims whose evidence is canonical and not dismissed."""
        for claim in sorted(stored, key=lambda c: (c.leg[0].bytes, c.leg[1])):
            leg, movement = self.by_key.get(claim.leg), self.evidence.get(claim.evidence_id)
            if leg is None:  # a leg outside this neighbourhood holds it
                self.taken.add(claim.evidence_id)
            elif movement is None or movement.id in self.taken or self.dismissed(leg, movement):
                continue
            elif claim.basis == "wallet_amount" and not claim.final:
                continue  # paired anew, the whole group at once
            elif claim.basis != "decision" and leg.differences(movement):
                continue  # mined again with other terms: no longer what was claimed
            else:
                self.settle(leg, movement, claim.basis, claim.ambiguous, claim.final)

    def by_decision(self, decisions: Sequence[Decision]) -> None:
        """A person's word goes before the rules, in the lane of the leg it names."""
        for decision in self.verdicts.values():
            leg, movement = (
                self.by_key.get((decision.operation_id, decision.leg)),
                self.evidence.get(decision.evidence_id),
            )
            if not decision.accept or leg is None or movement is None or leg.lane != movement.lane:
                continue
            standing = self.result.claims.get(leg.key)
            if standing is None and movement.id not in self.taken:
                self.settle(leg, movement, "decision")
            elif standing is not None and standing.evidence_id == movement.id:
                self.settle(leg, movement, "decision", final=standing.final)

    def by_nonce(self) -> None:
        """Rule 1. A leg with a nonce is bound to the event with that nonce and to no other."""
        by_identity = {(m.lane, m.nonce): m for m in self.evidence.values()}
        bound: set[UUID] = set()
        for leg in self.legs:
            movement = (
                by_identity.get((leg.lane, leg.nonce)) if leg.nonce is not None and leg.match == "nonce" else None
            )
            if movement is None or movement.id in bound:
                continue  # a released leg yields to the open one that states the nonce now
            bound.add(movement.id)
            if movement.id in self.taken or not self.open(leg) or self.dismissed(leg, movement):
                continue
            if differences := leg.differences(movement):
                self.result.conflicts[leg.key] = Conflict(leg.key, movement, tuple(differences))
            else:
                self.settle(leg, movement, "nonce")
        self.taken |= bound

    def by_hash(self) -> None:
        """Rule 2: the oldest open leg with that hash and equal terms. Rule 3: else a conflict of the one operation it can mean.

        Rule 3 waits until rule 2 is through: which legs are open, and whom an event can mean, must not hang on their order.
        """
        under: dict[object, list[Leg]] = defaultdict(list)
        for leg in self.legs:
            if leg.match == "operation_hash":
                under[(leg.lane, leg.operation_hash)].append(leg)

        def meant(movement: Movement) -> list[Leg]:
            legs = under.get((movement.lane, movement.operation_hash), []) if movement.operation_hash else []
            return [leg for leg in legs if not self.dismissed(leg, movement)]

        for movement in self.free:
            waiting = [leg for leg in meant(movement) if self.open(leg) and not leg.differences(movement)]
            if waiting:
                self.settle(waiting[0], movement, "operation_hash", ambiguous=sum(not w.released for w in waiting) > 1)
        for movement in self.free:
            legs = meant(movement)
            others = [leg for leg in legs if self.open(leg) and not leg.released]
            no_equal = all(leg.differences(movement) for leg in legs)
            if (
                no_equal
                and len({leg.operation_id for leg in others}) == 1
                and others[0].key not in self.result.conflicts
            ):
                leg = others[0]
                self.result.conflicts[leg.key] = Conflict(leg.key, movement, tuple(leg.differences(movement)))
                self.taken.add(movement.id)

    def by_wallet(self) -> None:
        """Rule 4. A whole group (lane and terms) is paired at once, sorted by time then id on both sides."""
        groups: dict[object, list[Leg]] = defaultdict(list)
        for leg in self.legs:
            if leg.match == "wallet_amount" and self.open(leg):
                groups[(leg.lane, leg.holder, leg.loyalty_id, leg.bucket, leg.amount)].append(leg)
        for key, legs in groups.items():
            legs.sort(key=lambda leg: (leg.released, leg.requested_at_ms, str(leg.operation_id), leg.index))
            movements = [m for m in self.free if (m.lane, m.holder, m.loyalty_id, m.bucket, m.amount) == key]
            movements.sort(key=lambda m: (m.time_ms, m.position, str(m.id)))
            for leg in legs:
                fitting = [m for m in movements if self.fits(leg, m)]
                choice = next((m for m in fitting if m.id not in self.taken), None)
                if choice is None:
                    continue
                rivals = sum(self.fits(other, choice) for other in legs if not other.released)
                ambiguous = rivals > 1 or len(fitting) > 1
                if ambiguous and self.rules.get(leg.brand, WalletRules()).hold:
                    self.result.held[leg.key] = Conflict(leg.key, choice, ())
                else:
                    self.settle(leg, choice, "wallet_amount", ambiguous=ambiguous)

    def fits(self, leg: Leg, movement: Movement) -> bool:
        """Whether the event lies in the leg's window and no hash or decision speaks against it."""
        rule = self.rules.get(leg.brand, WalletRules())
        early, late = leg.requested_at_ms - rule.skew_ms, leg.requested_at_ms + rule.window_ms
        hash_agrees = leg.operation_hash is None or leg.operation_hash == movement.operation_hash
        return early <= movement.time_ms <= late and hash_agrees and not self.dismissed(leg, movement)
