"""Matching against the book: the rules of the design's section 5, read a second time, simply and slowly.

The worlds are small on purpose: two issuers, two factories, three nonces, two hashes and two amounts collide all the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID, uuid5

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.model.evidence import Movement
from indexer.model.matching import Claim, Conflict, Decision, LegKey, Matching, WalletRules, match
from indexer.model.operation import Leg
from indexer.model.types import Address, Hash32

NAMESPACE = UUID("8f14e45f-ceea-4e7a-9b0c-6d5a3f3f1a01")
FACTORIES = [Address(b"\xfa" * 20), Address(b"\xfb" * 20)]
ISSUERS = [Address(b"\x15" * 20), Address(b"\x16" * 20)]
STRANGER = Address(b"\x66" * 20)
HOLDERS = [Address(b"\x40" * 20), Address(b"\x41" * 20)]
NONCES = [Hash32(bytes([n]) * 32) for n in (1, 2, 3)]
HASHES = [Hash32(b"\xaa" * 32), Hash32(b"\xbb" * 32)]
PROGRAMME = Hash32(b"\x1d" * 32)
SETTLE, HOLD = "settles", "holds"
RULES = {
    SETTLE: WalletRules(skew_ms=1_000, window_ms=3_000),
    HOLD: WalletRules(skew_ms=1_000, window_ms=3_000, hold=True),
}

relaxed = settings(deadline=None, derandomize=True, database=None, max_examples=150)


# --------------------------------------------------------------------------- worlds


def a_leg(**given: Any) -> Leg:
    terms: dict[str, Any] = {
        "operation_id": uuid5(NAMESPACE, "0"),
        "index": 0,
        "brand": SETTLE,
        "kind": "loyfin.redemption",
        "match": "nonce",
        "chain_id": 1,
        "factory": FACTORIES[0],
        "issuer": ISSUERS[0],
        "holder": HOLDERS[0],
        "loyalty_id": PROGRAMME,
        "bucket": 0,
        "amount": 100,
        "deadline": 0,
        "nonce": None,
        "operation_hash": None,
        "requested_at_ms": 0,
        "registered_at_ms": 0,
    }
    return Leg(**(terms | given))


def an_event(**given: Any) -> Movement:
    terms: dict[str, Any] = {
        "chain_id": 1,
        "factory": FACTORIES[0],
        "kind": "loyfin.redemption",
        "issuer": ISSUERS[0],
        "nonce": NONCES[0],
        "holder": HOLDERS[0],
        "loyalty_id": PROGRAMME,
        "bucket": 0,
        "amount": 100,
        "operation_hash": None,
        "block_number": 1,
        "log_index": 0,
    } | given
    number = terms["block_number"]
    where = {
        "block_hash": Hash32(number.to_bytes(32)),
        "tx_hash": Hash32(uuid5(NAMESPACE, f"{number}/{terms['log_index']}").bytes * 2),
        "time_ms": number * 1_000,
    }
    return Movement(**(terms | where))


@dataclass
class Scene:
    legs: list[Leg]
    movements: list[Movement]
    stored: list[Claim] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    def match(self, **changed: Any) -> Matching:
        given: dict[str, Any] = {
            "legs": self.legs,
            "movements": self.movements,
            "stored": self.stored,
            "decisions": self.decisions,
        } | changed
        return match(given["legs"], given["movements"], given["stored"], given["decisions"], RULES)


@st.composite
def operations(draw: st.DrawFn) -> list[Leg]:
    legs: list[Leg] = []
    stated: set[object] = set()
    for number in range(draw(st.integers(1, 4))):
        released = draw(st.integers(0, 5)) == 0
        brand, at = draw(st.sampled_from([SETTLE, SETTLE, HOLD])), draw(st.integers(0, 4)) * 1_000
        own: list[Leg] = []
        for index in range(draw(st.sampled_from([1, 1, 2]))):
            way = draw(st.sampled_from(["nonce", "operation_hash", "wallet_amount"]))
            states_hash = way == "operation_hash" or draw(st.booleans())
            own.append(
                a_leg(
                    operation_id=uuid5(NAMESPACE, str(number)),
                    index=index,
                    brand=brand,
                    match=way,
                    kind=draw(st.sampled_from(["loyfin.redemption"] * 3 + ["loyfin.issuance"])),
                    factory=draw(st.sampled_from([FACTORIES[0], *FACTORIES])),
                    issuer=ISSUERS[0] if brand == SETTLE else draw(st.sampled_from(ISSUERS)),
                    holder=draw(st.sampled_from([HOLDERS[0], *HOLDERS])),
                    bucket=draw(st.sampled_from([0, 0, 7])),
                    amount=draw(st.sampled_from([100, 100, 200])),
                    nonce=draw(st.sampled_from(NONCES)) if way == "nonce" else None,
                    operation_hash=draw(st.sampled_from([HASHES[0], *HASHES])) if states_hash else None,
                    requested_at_ms=at,
                    registered_at_ms=at + number,
                    released=released,
                )
            )
        names = [(leg.lane, leg.nonce) for leg in own if leg.nonce]
        if len(set(names)) < len(names):
            own = own[:1]  # two legs of one operation never name one nonce: refused at registration
            names = names[:1]
        if not released and stated & set(names):
            own = [
                replace(leg, released=True) for leg in own
            ]  # a nonce is free again only once its operation is closed
        elif not released:
            stated |= set(names)
        legs += own
    return legs


@st.composite
def chains(draw: st.DrawFn) -> list[Movement]:
    places = draw(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1)), max_size=7, unique=True))
    return [
        an_event(
            block_number=block,
            log_index=index,
            kind=draw(st.sampled_from(["loyfin.redemption"] * 3 + ["loyfin.issuance"])),
            factory=draw(st.sampled_from([FACTORIES[0], *FACTORIES])),
            issuer=draw(st.sampled_from([ISSUERS[0], *ISSUERS])),
            # beyond the three that legs state, a few that none does
            nonce=draw(st.sampled_from([*NONCES, *(Hash32(bytes([n]) * 32) for n in range(4, 9))])),
            holder=draw(st.sampled_from([HOLDERS[0], *HOLDERS])),
            bucket=draw(st.sampled_from([0, 0, 7])),
            amount=draw(st.sampled_from([100, 100, 200])),
            operation_hash=draw(st.sampled_from([HASHES[0], *HASHES, None])),
        )
        for block, index in places
    ]


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """Legs, events and decisions; and claims that an earlier look left behind, some of them final, some out of date."""
    legs, movements = draw(operations()), draw(chains())
    decisions: dict[object, Decision] = {}
    if movements:
        for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
            leg, movement = draw(st.sampled_from(legs)), draw(st.sampled_from(movements))
            decision = Decision(leg.operation_id, movement.id, leg.index, draw(st.booleans()))
            decisions.setdefault((leg.operation_id, movement.id), decision)
    stored: list[Claim] = []
    if draw(st.booleans()):
        then = draw(st.lists(st.sampled_from(movements), unique=True)) if movements else []
        if draw(st.booleans()):  # one that was there then, and has left the chain
            then.append(an_event(block_number=9, nonce=draw(st.sampled_from(NONCES)), operation_hash=HASHES[0]))
        younger = draw(st.integers(0, 1))
        before = match(legs[: len(legs) - younger], then, rules=RULES)
        stored = [replace(claim, final=draw(st.booleans())) for claim in before.claims.values()]
    return Scene(legs, movements, stored, list(decisions.values()))


# --------------------------------------------------------------------------- the book


Identity = tuple[int, bytes, str, bytes, bytes]


def identity(m: Movement) -> Identity:
    return (m.chain_id, m.factory, m.kind, m.issuer, m.nonce)


def same_lane(leg: Leg, m: Movement) -> bool:
    return (leg.chain_id, leg.factory, leg.kind, leg.issuer) == (m.chain_id, m.factory, m.kind, m.issuer)


def equal_terms(leg: Leg, m: Movement) -> bool:
    return (
        leg.holder == m.holder
        and leg.loyalty_id == m.loyalty_id
        and leg.bucket == m.bucket
        and leg.amount == m.amount
        and (leg.operation_hash is None or leg.operation_hash == m.operation_hash)
    )


def seniority(leg: Leg) -> tuple[bool, int, str, int]:
    return (leg.released, leg.registered_at_ms, str(leg.operation_id), leg.index)


@dataclass
class Verdict:
    claims: dict[LegKey, tuple[UUID, str, bool]] = field(default_factory=dict)
    conflicts: dict[LegKey, UUID] = field(default_factory=dict)
    held: dict[LegKey, UUID] = field(default_factory=dict)
    repeated: list[Movement] = field(default_factory=list)


def by_the_book(scene: Scene) -> Verdict:
    """Section 5, sentence by sentence; quadratic and in no hurry."""
    said = Verdict()
    legs = sorted(scene.legs, key=seniority)
    evidence: list[Movement] = []
    for m in sorted(scene.movements, key=lambda m: (m.block_number, m.log_index)):
        twin = any(identity(m) == identity(other) for other in evidence)
        (said.repeated if twin else evidence).append(m)
    used: set[UUID] = set()
    dismissed = {(d.operation_id, d.evidence_id) for d in scene.decisions if not d.accept}

    def claim(leg: Leg, m: Movement, basis: str, ambiguous: bool = False) -> None:
        said.claims[leg.key] = (m.id, basis, ambiguous)
        used.add(m.id)

    def is_dismissed(leg: Leg, m: Movement) -> bool:
        return (leg.operation_id, m.id) in dismissed

    # what stands: claims by a stated identity while their evidence is there, by wallet once `ready` has left
    for old in scene.stored:
        for leg in legs:
            for m in evidence:
                named = old.leg == leg.key and old.evidence_id == m.id
                stands = named and (old.basis != "wallet_amount" or old.final)
                if stands and not is_dismissed(leg, m) and equal_terms(leg, m):
                    claim(leg, m, old.basis, old.ambiguous)

    # a person's word
    for decision in scene.decisions:
        for leg in legs:
            for m in evidence:
                named = (decision.operation_id, decision.leg) == leg.key and decision.evidence_id == m.id
                if not (named and decision.accept and same_lane(leg, m)):
                    continue
                both_free = leg.key not in said.claims and m.id not in used
                if both_free or said.claims.get(leg.key, (None,))[0] == m.id:
                    claim(leg, m, "decision")

    # rule 1
    for m in evidence:
        stating = [leg for leg in legs if leg.nonce == m.nonce and same_lane(leg, m)]
        if not stating:
            continue
        leg = stating[0]
        if m.id not in used and leg.key not in said.claims and not is_dismissed(leg, m):
            if equal_terms(leg, m):
                claim(leg, m, "nonce")
            else:
                said.conflicts[leg.key] = m.id
        used.add(m.id)  # bound, whatever became of it

    # rule 2
    for m in evidence:
        if m.id in used or m.operation_hash is None:
            continue
        waiting = [
            leg
            for leg in legs
            if leg.match == "operation_hash"
            and leg.key not in said.claims
            and same_lane(leg, m)
            and equal_terms(leg, m)
            and not is_dismissed(leg, m)
        ]
        if waiting:
            claim(waiting[0], m, "operation_hash", len([leg for leg in waiting if not leg.released]) > 1)

    # rule 3
    for m in evidence:
        if m.id in used or m.operation_hash is None:
            continue
        under = [
            leg
            for leg in legs
            if leg.match == "operation_hash"
            and leg.operation_hash == m.operation_hash
            and same_lane(leg, m)
            and not is_dismissed(leg, m)
        ]
        still_open = [leg for leg in under if leg.key not in said.claims and not leg.released]
        meant = {leg.operation_id for leg in still_open}
        equal = any(equal_terms(leg, m) for leg in under)
        # an operation that is in conflict already hears of the next event once the first is decided
        if not equal and len(meant) == 1 and still_open[0].key not in said.conflicts:
            said.conflicts[still_open[0].key] = m.id
            used.add(m.id)

    # rule 4
    wallets = sorted(
        (leg for leg in legs if leg.match == "wallet_amount" and leg.key not in said.claims),
        key=lambda leg: (leg.released, leg.requested_at_ms, str(leg.operation_id), leg.index),
    )
    before = set(used)

    def fits(leg: Leg, m: Movement) -> bool:
        rule = RULES[leg.brand]
        in_time = leg.requested_at_ms - rule.skew_ms <= m.time_ms <= leg.requested_at_ms + rule.window_ms
        return same_lane(leg, m) and equal_terms(leg, m) and in_time and not is_dismissed(leg, m)

    for leg in wallets:
        fitting = [m for m in evidence if m.id not in before and fits(leg, m)]
        free = [m for m in fitting if m.id not in used]
        if not free:
            continue
        m = min(free, key=lambda m: (m.time_ms, m.log_index))
        rivals = [other for other in wallets if not other.released and group(other) == group(leg) and fits(other, m)]
        ambiguous = len(rivals) > 1 or len(fitting) > 1
        if ambiguous and RULES[leg.brand].hold:
            said.held[leg.key] = m.id
        else:
            claim(leg, m, "wallet_amount", ambiguous)
    return said


def group(leg: Leg) -> object:
    return (leg.lane, leg.holder, leg.loyalty_id, leg.bucket, leg.amount)


def as_groups(scene: Scene, claims: dict[LegKey, tuple[UUID, str, bool]]) -> dict[object, object]:
    """Claims by wallet as groups: which legs settled, which evidence settled them; who got which is not compared."""
    groups: dict[object, tuple[set[LegKey], set[UUID], int]] = {}
    by_key = {leg.key: leg for leg in scene.legs}
    for key, (evidence, basis, ambiguous) in claims.items():
        if basis == "wallet_amount":
            legs, events, doubts = groups.get(group(by_key[key]), (set(), set(), 0))
            groups[group(by_key[key])] = (legs | {key}, events | {evidence}, doubts + ambiguous)
    return dict(groups)


def plain(claims: dict[LegKey, Claim]) -> dict[LegKey, tuple[UUID, str, bool]]:
    return {key: (claim.evidence_id, claim.basis, claim.ambiguous) for key, claim in claims.items()}


def not_by_wallet(claims: dict[LegKey, tuple[UUID, str, bool]]) -> dict[LegKey, tuple[UUID, str, bool]]:
    return {key: claim for key, claim in claims.items() if claim[1] != "wallet_amount"}


def contested(conflicts: dict[LegKey, Conflict]) -> dict[LegKey, UUID]:
    return {key: conflict.evidence.id for key, conflict in conflicts.items()}


@relaxed
@given(scenes())
def test_matching_is_what_the_book_says(scene: Scene) -> None:
    found, said = scene.match(), by_the_book(scene)
    claims = plain(found.claims)
    assert not_by_wallet(claims) == not_by_wallet(said.claims)
    assert as_groups(scene, claims) == as_groups(scene, said.claims)
    assert contested(found.conflicts) == said.conflicts
    assert contested(found.held).keys() == said.held.keys()
    assert found.repeated == said.repeated


# --------------------------------------------------------------------------- what holds whatever the world


def lane(thing: Leg | Movement) -> object:
    return (thing.chain_id, thing.factory, thing.kind, thing.issuer)


@relaxed
@given(scenes())
def test_claims_are_one_to_one_and_never_cross_a_lane(scene: Scene) -> None:
    found = scene.match()
    legs = {leg.key: leg for leg in scene.legs}
    events = {m.id: m for m in scene.movements}
    used = Counter(claim.evidence_id for claim in found.claims.values())
    assert not [evidence for evidence, times in used.items() if times > 1]
    for key, claim in found.claims.items():
        assert claim.leg == key
        assert lane(legs[key]) == lane(events[claim.evidence_id])
    for key, conflict in [*found.conflicts.items(), *found.held.items()]:
        assert lane(legs[key]) == lane(conflict.evidence)
        assert key not in found.claims, "a leg that settled conflicts with nothing"
        assert conflict.evidence.id not in used or key in found.held, "what settles one leg conflicts with none"


@relaxed
@given(scenes(), st.randoms(use_true_random=False))
def test_the_order_of_the_facts_does_not_matter(scene: Scene, random: Any) -> None:
    def shuffled(things: Sequence[Any]) -> list[Any]:
        return random.sample(list(things), len(things))

    again = scene.match(legs=shuffled(scene.legs), movements=shuffled(scene.movements), stored=shuffled(scene.stored))
    found = scene.match()
    assert (again.claims, again.conflicts, again.held) == (found.claims, found.conflicts, found.held)
    assert again.repeated == found.repeated


@relaxed
@given(scenes())
def test_matching_again_over_its_own_claims_changes_nothing(scene: Scene) -> None:
    found = scene.match()
    again = scene.match(stored=list(found.claims.values()))
    assert (again.claims, again.conflicts, again.held) == (found.claims, found.conflicts, found.held)


@relaxed
@given(scenes(), st.data())
def test_evidence_of_another_lane_changes_nothing(scene: Scene, data: st.DataObject) -> None:
    """Promise 1: whoever copies nonces and hashes into a lane that is not ours settles nothing and blocks nothing."""
    copied = [
        replace(m, block_number=m.block_number + 100 * data.draw(st.sampled_from([-1, 1])), **data.draw(foreign))
        for m in scene.movements
    ]
    found, again = scene.match(), scene.match(movements=scene.movements + copied)
    assert (again.claims, again.conflicts, again.held) == (found.claims, found.conflicts, found.held)


foreign = st.sampled_from(
    [{"issuer": STRANGER}, {"factory": STRANGER}, {"kind": "keyban.mint"}, {"chain_id": 2}],
)


@relaxed
@given(scenes(), st.data())
def test_evidence_that_goes_takes_only_its_own_claims_along(scene: Scene, data: st.DataObject) -> None:
    found = scene.match()
    stored = [replace(claim, final=True) for claim in found.claims.values()]
    gone = data.draw(st.sets(st.sampled_from([m.id for m in scene.movements]))) if scene.movements else set()
    again = scene.match(movements=[m for m in scene.movements if m.id not in gone], stored=stored)
    for key, claim in found.claims.items():
        if claim.evidence_id in gone:
            assert key not in again.claims or again.claims[key].evidence_id not in gone
        else:
            assert again.claims[key].evidence_id == claim.evidence_id


@relaxed
@given(scenes())
def test_a_dismissed_pair_is_never_made_again_and_an_accepted_one_stands(scene: Scene) -> None:
    found = scene.match()
    events = {m.id: m for m in scene.movements}
    legs = {leg.key: leg for leg in scene.legs}
    for decision in scene.decisions:
        key = (decision.operation_id, decision.leg)
        claimed = {claim.evidence_id for at, claim in found.claims.items() if at[0] == decision.operation_id}
        if not decision.accept:
            assert decision.evidence_id not in claimed
        elif lane(legs[key]) == lane(events[decision.evidence_id]):
            # unless the leg, or the evidence, was spoken for already
            taken = key in found.claims or decision.evidence_id in {c.evidence_id for c in found.claims.values()}
            assert taken


@relaxed
@given(scenes())
def test_a_claim_held_outside_the_neighbourhood_keeps_its_evidence(scene: Scene) -> None:
    elsewhere = (UUID(int=7), 0)
    stored = [Claim(elsewhere, m.id, "nonce", final=True) for m in scene.movements]
    found = scene.match(stored=stored)
    assert not found.claims and not found.conflicts and not found.held


# --------------------------------------------------------------------------- found once


def test_a_hash_whose_other_operation_settles_can_mean_only_the_one_that_is_left() -> None:
    """The event with other terms comes first in the block; the one that settles the second operation comes after it."""
    legs = [
        a_leg(operation_id=uuid5(NAMESPACE, name), match="operation_hash", operation_hash=HASHES[0], amount=amount)
        for name, amount in (("a", 100), ("b", 200))
    ]
    events = [
        an_event(nonce=NONCES[0], operation_hash=HASHES[0], amount=999, block_number=1),
        an_event(nonce=NONCES[1], operation_hash=HASHES[0], amount=200, block_number=2),
    ]
    found = match(legs, events)
    assert contested(found.conflicts) == {legs[0].key: events[0].id}
    assert match(legs, events, list(found.claims.values())).conflicts == found.conflicts


def test_two_stored_claims_on_one_piece_of_evidence_never_both_stand() -> None:
    """The store forbids it; matching does not lean on that."""
    legs = [a_leg(operation_id=uuid5(NAMESPACE, name), nonce=NONCES[0]) for name in "ab"]
    event = an_event()
    found = match(legs, [event], [Claim(leg.key, event.id, "nonce", final=True) for leg in legs])
    assert len(found.claims) == 1


@pytest.mark.parametrize("accept", [True, False])
def test_the_last_word_on_a_pair_counts(accept: bool) -> None:
    leg, event = a_leg(nonce=NONCES[0]), an_event(amount=7)
    words = [Decision(leg.operation_id, event.id, 0, not accept), Decision(leg.operation_id, event.id, 0, accept)]
    found = match([leg], [event], decisions=words)
    assert [claim.basis for claim in found.claims.values()] == (["decision"] if accept else [])
    assert not found.conflicts


def test_the_second_of_one_identity_takes_over_when_the_first_is_gone() -> None:
    leg = a_leg(nonce=NONCES[0])
    first, second = an_event(block_number=1), an_event(block_number=2)
    assert match([leg], [second, first]).repeated == [second]
    found = match([leg], [second], [Claim(leg.key, first.id, "nonce", final=True)])
    assert found.claims[leg.key] == Claim(leg.key, first.id, "nonce", final=True) and not found.repeated


def test_mined_again_with_other_terms_the_stored_claim_falls() -> None:
    leg = a_leg(nonce=NONCES[0])
    event = an_event(block_number=2, amount=1)
    found = match([leg], [event], [Claim(leg.key, event.id, "nonce", final=True)])
    assert not found.claims
    assert [d[0] for d in found.conflicts[leg.key].differences] == ["amount"]
