"""Partner legs against the book: rule 4 of the design's section 5, over generated registrations and partner histories.

The oracle reads the rule a second time, slowly: it tries every pairing of a group and compares how many legs of the group settle,
never which of two equal records settles which of two equal legs.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID, uuid5

import pytest

from indexer.model.evidence import NAMESPACE_EVIDENCE, Check, Look, Moved, PartnerTransfer, Status, transfer_id
from indexer.model.matching import Claim, Decision, LegKey, Matching, WalletRules
from indexer.model.operation import LegFacts, PartnerLeg, Situation, situation
from indexer.model.pairing import paired, rivalry
from indexer.model.partner_matching import match_partners
from indexer.model.types import Hash32

NAMESPACE = UUID("8f14e45f-ceea-4e7a-9b0c-6d5a3f3f1a02")
SETTLES, HOLDS = "settles", "holds"
WINDOW = WalletRules(skew_ms=1_000, window_ms=3_000)
RULES = {
    (brand, partner): replace(WINDOW, hold=brand == HOLDS)
    for brand in (SETTLES, HOLDS)
    for partner in ("keyban", "qiibee")
}
CASES = 1_000


def a_leg(number: int = 0, index: int = 0, at: int = 0, **given: Any) -> PartnerLeg:
    terms: dict[str, Any] = {
        "operation_id": uuid5(NAMESPACE, str(number)),
        "index": index,
        "brand": SETTLES,
        "kind": "keyban.mint",
        "wallet": "GALICE",
        "amount": 100,
        "token": None,
        "requested_at_ms": at,
        "registered_at_ms": at,
    }
    return PartnerLeg(**(terms | given))


def a_record(record: str = "o1", at: int | None = 0, **given: Any) -> PartnerTransfer:
    terms: dict[str, Any] = {
        "brand": SETTLES,
        "kind": "keyban.mint",
        "record_id": record,
        "wallet": "GALICE",
        "token": None,
        "amount": 100,
        "status": Status.SUCCEEDED,
        "first_seen_ms": 0,
        "stated_ms": at,
    } | given
    return PartnerTransfer(partner=terms["kind"].partition(".")[0], **terms)


def settled_by(matching: Matching, legs: Iterable[PartnerLeg], records: Iterable[PartnerTransfer]) -> dict[int, str]:
    """Position of the leg → record id, for what settled."""
    by_id = {record.id: record.record_id for record in records}
    at = {leg.key: position for position, leg in enumerate(legs)}
    return {at[key]: by_id[claim.evidence_id] for key, claim in matching.claims.items()}


# --------------------------------------------------------------------------- worlds


@dataclass
class History:
    """What a partner would answer at each look, oldest first; each a complete listing, in the order of its pages."""

    legs: list[PartnerLeg]
    looks: list[list[PartnerTransfer]]
    decisions: list[Decision] = field(default_factory=list)
    window: WalletRules = WINDOW


def a_status(rng: random.Random) -> Status:
    return rng.choice([Status.SUCCEEDED, Status.SUCCEEDED, Status.SUCCEEDED, *list(Status)])


def a_history(rng: random.Random) -> History:
    brand, kind = rng.choice([SETTLES, SETTLES, HOLDS]), rng.choice(["keyban.mint", "qiibee.credit"])
    choices: list[list[str | None]] = [[None], [None], ["7"], ["7", "8"]] if kind == "qiibee.credit" else [[None]]
    tokens = rng.choice(choices)
    wallets, amounts = ["a", "b"][: rng.randint(1, 2)], [100, 200][: rng.randint(1, 2)]

    def terms() -> dict[str, Any]:
        return {
            "brand": brand if rng.random() < 0.95 else SETTLES,
            "kind": kind if rng.random() < 0.9 else rng.choice(["keyban.mint", "keyban.burn", "qiibee.credit"]),
            "wallet": rng.choice(wallets),
            "amount": rng.choice(amounts),
            "token": rng.choice(tokens),
        }

    legs = []
    for number in range(rng.randint(1, 5)):
        released = rng.random() < 0.1
        legs += [
            a_leg(number, index, rng.randint(0, 5) * 1_000, released=released, **terms())
            for index in range(rng.choice([1, 1, 1, 2]))
        ]
    records: dict[str, PartnerTransfer] = {}
    looks: list[list[PartnerTransfer]] = []
    for look in range(rng.randint(2, 5)):
        for name in [f"o{len(records) + n}" for n in range(rng.randint(0, 3))]:  # late rows bear times of before
            dated = rng.random() < 0.8
            at, seen = rng.randint(0, 7) * 1_000, look * 2_000
            records[name] = a_record(
                name, at if dated else None, undated=not dated and look == 0, first_seen_ms=seen, status=a_status(rng), **terms()
            )  # fmt: skip
        for name in list(records):
            chance = rng.random()
            if chance < 0.1:
                records[name] = replace(records[name], withdrawn=not records[name].withdrawn)
            elif chance < 0.25:
                records[name] = replace(records[name], status=rng.choice(list(Status)))
            elif chance < 0.3:
                records[name] = replace(records[name], amount=rng.choice([*amounts, None]))
        page = [*records.values(), *rng.choices(list(records.values()), k=rng.randint(0, 2) if records else 0)]
        rng.shuffle(page)
        looks.append(page)
    decisions = []
    if records and rng.random() < 0.3:
        for _ in range(rng.randint(1, 2)):
            leg, record = rng.choice(legs), rng.choice(list(records.values()))
            decisions.append(Decision(leg.operation_id, record.id, leg.index, rng.random() < 0.5))
    return History(legs, looks, decisions)


# --------------------------------------------------------------------------- the book


def word_of(history: History, leg: PartnerLeg, record: PartnerTransfer) -> bool | None:
    """What the last decision on the record says to the leg's operation."""
    verdicts = [d for d in history.decisions if (d.operation_id, d.evidence_id) == (leg.operation_id, record.id)]
    return verdicts[-1].accept if verdicts else None


def equal_terms(leg: PartnerLeg, record: PartnerTransfer) -> bool:
    return (
        (leg.brand, leg.kind, leg.wallet, leg.amount) == (record.brand, record.kind, record.wallet, record.amount)
        and leg.token in (None, record.token)
        and not record.withdrawn
        and record.status in (Status.INCLUDED, Status.SUCCEEDED)
    )


def may_settle(history: History, leg: PartnerLeg, record: PartnerTransfer) -> bool:
    """By the rules, without anybody's word."""
    at = record.stated_ms if record.stated_ms is not None else record.first_seen_ms
    return (
        equal_terms(leg, record)
        and not record.undated
        and leg.requested_at_ms - history.window.skew_ms <= at <= leg.requested_at_ms + history.window.window_ms
        and word_of(history, leg, record) is not False
    )


def most(legs: Sequence[PartnerLeg], fits: Callable[[PartnerLeg], Sequence[UUID]], used: frozenset[UUID]) -> int:
    """The most legs that can settle at once: every choice is tried."""
    if not legs:
        return 0
    first, rest = legs[0], legs[1:]
    best = most(rest, fits, used)
    for record in fits(first):
        if record not in used:
            best = max(best, 1 + most(rest, fits, used | {record}))
    return best


def hold_to_the_book(
    history: History, records: dict[UUID, PartnerTransfer], before: list[Claim], now: Matching
) -> None:
    legs = {leg.key: leg for leg in history.legs}
    # promise 2: one to one
    assert len({claim.evidence_id for claim in now.claims.values()}) == len(now.claims)
    # promise 1: nothing settles but by its terms and in its window, or by a person's word
    fixed: dict[LegKey, UUID] = {}
    for key, claim in now.claims.items():
        leg, record = legs[key], records[claim.evidence_id]
        assert claim.leg == key and equal_terms(leg, record) and word_of(history, leg, record) is not False
        stood = any(c.leg == key and c.evidence_id == record.id and (c.final or c.basis == "decision") for c in before)
        if claim.basis == "decision":
            assert stood or word_of(history, leg, record) is True
        elif not stood:
            assert may_settle(history, leg, record)
        if claim.basis == "decision" or claim.final:
            fixed[key] = record.id
    # what a `ready` has left on stands as long as its record says the same
    for claim in before:
        leg, found = legs[claim.leg], records.get(claim.evidence_id)
        if claim.final and found is not None and equal_terms(leg, found) and word_of(history, leg, found) is not False:
            assert now.claims[claim.leg].evidence_id == claim.evidence_id and now.claims[claim.leg].final
    # each group settles as many as it can, beside what stands; held ones count: a person will say which
    groups: dict[tuple[bool, object], list[PartnerLeg]] = defaultdict(list)
    for leg in history.legs:
        if leg.key not in fixed:
            groups[(leg.released, leg.group)].append(leg)
    for (released, _), group in groups.items():
        # closed operations come last, and take what nobody else could
        gone = set(fixed.values())
        if released:
            gone |= {claim.evidence_id for key, claim in now.claims.items() if not legs[key].released}
            held = [key for key in now.held if not legs[key].released]
            gone |= {r.id for r in records.values() if any(may_settle(history, legs[key], r) for key in held)}
        free = [r for r in records.values() if r.id not in gone]

        def fits(leg: PartnerLeg, free: list[PartnerTransfer] = free) -> list[UUID]:
            return [r.id for r in free if may_settle(history, leg, r)]

        done = sum(leg.key in now.claims or leg.key in now.held for leg in group)
        assert done == most(group, fits, frozenset()), "a group settles as many as it can"
        for leg in group:
            settled, choices = leg.key in now.claims, fits(leg)
            lonely = len(choices) == 1 and all(choices[0] not in fits(other) for other in group if other != leg)
            if lonely:
                assert settled and not now.claims[leg.key].ambiguous, "no tie, no doubt"
            if settled and leg.brand == HOLDS:
                assert not now.claims[leg.key].ambiguous, "a tie is a person's to decide"
            if leg.key in now.held:
                assert leg.brand == HOLDS and not settled
    # what is offered to a person could be accepted, and what is hinted settles nothing
    for key, offers in now.offers.items():
        assert key not in now.claims and all(equal_terms(legs[key], records[o.evidence.id]) for o in offers)
    assert not set(now.submitted) & set(now.claims) and not set(now.failed) & (set(now.claims) | set(now.submitted))


@pytest.mark.parametrize("part", range(4))
def test_generated_registrations_and_histories_keep_the_promises(part: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(part, CASES, 4):
        rng = random.Random(seed)
        history = a_history(rng)
        stored: list[Claim] = []
        for page in history.looks:
            records = {record.id: record for record in page}
            now = match_partners(history.legs, records.values(), stored, history.decisions, RULES)
            try:
                hold_to_the_book(history, {i: r for i, r in records.items() if not r.withdrawn}, stored, now)
            except (AssertionError, KeyError) as wrong:
                raise AssertionError(f"seed {seed}: {wrong}\n{history}\n{stored}\n{now}") from wrong
            # another order of pages and of legs, and rows read twice, change nothing
            for _ in range(2):
                legs, again = list(history.legs), [*page, *page]
                rng.shuffle(legs)
                rng.shuffle(again)
                assert match_partners(legs, again, stored, history.decisions, RULES) == now, f"seed {seed}"
            seen.update(["settled"] * len(now.claims), held=len(now.held), offered=len(now.offers))
            seen.update(failed=len(now.failed), submitted=len(now.submitted))
            seen.update("ambiguous" for claim in now.claims.values() if claim.ambiguous)
            gone = {claim.leg for claim in stored if claim.final} - set(now.claims)
            seen.update(undone=len(gone))
            # some become ready: what they rest on is final now, and asking once more changes nothing but that
            stored = [replace(c, final=c.final or rng.random() < 0.4) for c in now.claims.values()]
            settled = match_partners(history.legs, page, stored, history.decisions, RULES)
            assert settled.claims.keys() == now.claims.keys(), f"seed {seed}"
            assert (
                match_partners(history.legs, page, list(settled.claims.values()), history.decisions, RULES) == settled
            )
    for what in ("settled", "ambiguous", "held", "offered", "failed", "submitted", "undone"):
        assert seen[what] >= 10, f"the worlds hold too little of what matters: {what} in {seen}"


def test_pairing_finds_as_many_as_there_are_whatever_fits_whom() -> None:
    def best(fitting: list[Sequence[int]], used: frozenset[int] = frozenset()) -> int:
        if not fitting:
            return 0
        own, rest = fitting[0], fitting[1:]
        return max([best(rest, used), *(1 + best(rest, used | {r}) for r in own if r not in used)])

    rng = random.Random(7)
    for case in range(3_000):
        records = rng.randint(0, 5)
        fitting: list[Sequence[int]] = []
        for _ in range(rng.randint(0, 5)):
            low = rng.randint(0, records)
            window = range(low, rng.randint(low, records))
            fitting.append(window if rng.random() < 0.5 else [r for r in window if rng.random() < 0.7])
        pairs = paired(fitting, records)
        assert len(set(pairs.values())) == len(pairs) and all(pairs[leg] in fitting[leg] for leg in pairs), case
        assert len(pairs) == best(fitting), (case, fitting, pairs)
        assert rivalry(fitting, records) == [sum(r in own for own in fitting) for r in range(records)]


# --------------------------------------------------------------------------- cases worth a name


def test_the_identity_of_evidence_is_of_partner_kind_record_and_wallet() -> None:
    assert a_record().id == transfer_id("keyban", "keyban.mint", "o1", "GALICE")
    assert a_record().id == uuid5(NAMESPACE_EVIDENCE, "keyban:keyban.mint:o1:GALICE")
    changed = a_record(amount=7, status=Status.FAILED, tx_hashes=("0x1",))
    assert changed.id == a_record().id, "what changes is a version of the same evidence"
    assert a_record(brand=HOLDS).id == a_record().id, "whoever reads it"
    others = [a_record("o2"), a_record(kind="keyban.burn"), a_record(kind="qiibee.credit")]
    assert len({record.id for record in [a_record(), *others, a_record(wallet="b")]}) == 5, (
        "an order may move to several"
    )


def test_two_orders_that_name_one_transfer_settle_one_leg() -> None:
    look = Look(8453, "0x1", 7, b"\x07" * 32, True, (Moved("0x70", "0x00", "GALICE", 100),))
    legs = [a_leg(0), a_leg(1)]
    records = [a_record(name, chain_id=8453, tx_hashes=("0x1",), looks=(look,), contract="0x70") for name in ("a", "b")]
    assert all(record.counts for record in records)
    once = match_partners(legs, records, rules=RULES)
    assert len(once.claims) == 1
    again = match_partners(legs, records[::-1], list(once.claims.values()), rules=RULES)
    assert again.claims == once.claims
    final = [replace(claim, final=True) for claim in once.claims.values()]
    assert len(match_partners(legs, records, final, rules=RULES).claims) == 1


def test_on_a_ledger_that_nobody_follows_orders_share_the_transfer_that_they_name() -> None:
    legs = [a_leg(0), a_leg(1), a_leg(2, amount=250)]
    once = [a_record("a", transfers=("t/1",)), a_record("b", 100, transfers=("t/1",))]
    both = [*once, a_record("c", amount=250, transfers=("t/1", "t/2"))]
    for records in (once, both, both[::-1]):
        claims = match_partners(legs, records, rules=RULES).claims
        assert [claims[leg.key].ambiguous for leg in legs if leg.key in claims] == [True]
    apart = [a_record("a", transfers=("t/1",)), a_record("b", 100, transfers=("t/2",)), a_record("c", 200)]
    assert len(match_partners(legs[:2], apart, rules=RULES).claims) == 2
    # a person's word moves nothing twice
    final = [replace(claim, final=True) for claim in match_partners(legs[:1], once, rules=RULES).claims.values()]
    word = [Decision(legs[1].operation_id, once[1].id, 0, True)]
    assert len(match_partners(legs, once, final, word, RULES).claims) == 1


def test_equal_mints_are_paired_by_time_and_marked_ambiguous() -> None:
    legs, records = [a_leg(0, at=2_000), a_leg(1, at=1_000)], [a_record("late", 3_000), a_record("early", 1_500)]
    matching = match_partners(legs, records, rules=RULES)
    assert settled_by(matching, legs, records) == {1: "early", 0: "late"}
    assert all(claim.ambiguous for claim in matching.claims.values())


def test_a_record_before_the_registration_settles_within_the_skew_alone() -> None:
    leg = a_leg(at=10_000)
    for at, settles in ((8_999, False), (9_000, True), (13_000, True), (13_001, False)):
        assert bool(match_partners([leg], [a_record(at=at)], rules=RULES).claims) is settles


def test_a_final_claim_stands_although_an_older_record_turns_up() -> None:
    legs, records = [a_leg(0), a_leg(1)], [a_record("o2", 2_000)]
    first = match_partners(legs, records, rules=RULES)
    stored = [replace(claim, final=True) for claim in first.claims.values()]
    records.append(a_record("o1", 500))
    later = match_partners(legs, records, stored, rules=RULES)
    assert len(later.claims) == 2 and later.claims[stored[0].leg] == stored[0]


def test_what_was_not_final_is_paired_anew_when_an_older_record_turns_up() -> None:
    legs, records = [a_leg(0, at=0), a_leg(1, at=500)], [a_record("o2", 2_000)]
    first = match_partners(legs, records, rules=RULES)
    assert settled_by(first, legs, records) == {0: "o2"}
    records.append(a_record("o1", 500))
    later = match_partners(legs, records, list(first.claims.values()), rules=RULES)
    assert settled_by(later, legs, records) == {0: "o1", 1: "o2"}


def test_a_stated_token_is_a_term_and_an_unstated_one_is_none() -> None:
    credit: dict[str, Any] = {"kind": "qiibee.credit"}
    legs = [a_leg(0, token=None, **credit), a_leg(1, token="7", **credit), a_leg(2, token="9", **credit)]
    records = [a_record("a", 100, token="7", **credit), a_record("b", 200, token="8", **credit)]
    matching = match_partners(legs, records, rules=RULES)
    assert settled_by(matching, legs, records) == {1: "a", 0: "b"}


def test_an_undated_record_settles_by_decision_alone() -> None:
    leg, record = a_leg(), a_record(at=None, undated=True)
    offered = match_partners([leg], [record], rules=RULES)
    assert not offered.claims and [offer.evidence for offer in offered.offers[leg.key]] == [record]
    accepted = [Decision(leg.operation_id, record.id, leg.index, True)]
    assert match_partners([leg], [record], decisions=accepted, rules=RULES).claims[leg.key].basis == "decision"
    dismissed = [*accepted, Decision(leg.operation_id, record.id, leg.index, False)]
    assert match_partners([leg], [record], decisions=dismissed, rules=RULES) == Matching()


def test_a_held_tie_shows_every_choice_and_takes_the_one_a_person_makes() -> None:
    legs = [a_leg(0, brand=HOLDS), a_leg(1, brand=HOLDS)]
    records = [a_record("o1", 100, brand=HOLDS), a_record("o2", 200, brand=HOLDS)]
    held = match_partners(legs, records, rules=RULES)
    assert not held.claims
    for leg in legs:
        choices = [held.held[leg.key].evidence, *(offer.evidence for offer in held.offers[leg.key])]
        assert {choice.id for choice in choices} == {record.id for record in records}
    word = [Decision(legs[1].operation_id, records[0].id, 0, True)]
    decided = match_partners(legs, records, decisions=word, rules=RULES)
    assert settled_by(decided, legs, records) == {1: "o1", 0: "o2"}, "one is decided, and no tie is left"
    assert [decided.claims[leg.key].basis for leg in legs] == ["wallet_amount", "decision"]


def test_a_dismissed_record_makes_room_for_the_other() -> None:
    legs, records = [a_leg(0), a_leg(1)], [a_record("o1", 100), a_record("o2", 200)]
    word = [Decision(legs[1].operation_id, records[1].id, 0, False)]
    matching = match_partners(legs, records, decisions=word, rules=RULES)
    assert settled_by(matching, legs, records) == {0: "o2", 1: "o1"}


def test_included_settles_pending_only_hints_and_failed_fails_for_certain_when_nobody_else_is_meant() -> None:
    leg = a_leg()
    assert match_partners([leg], [a_record(status=Status.INCLUDED)], rules=RULES).claims
    pending = match_partners(
        [leg], [a_record(status=Status.PENDING), a_record("o2", status=Status.FAILED)], rules=RULES
    )
    assert leg.key in pending.submitted and not pending.claims and not pending.failed
    assert match_partners([leg], [a_record(status=Status.FAILED)], rules=RULES).failed[leg.key].certain
    two = match_partners([leg, a_leg(1)], [a_record(status=Status.FAILED)], rules=RULES)
    assert [failure.certain for failure in two.failed.values()] == [False], "it may be the other's"
    again = match_partners([leg], [a_record(status=Status.FAILED), a_record("o2", 100)], rules=RULES)
    assert again.claims and not again.failed, "a later record settles it after all"


def test_a_failed_leg_leaves_the_operation_open_until_another_has_settled() -> None:
    failed = LegFacts(failed=True)
    assert situation([failed], cancelled=False, closed=False) is Situation.PENDING
    assert situation([failed, LegFacts(evidence=True)], cancelled=False, closed=False) is Situation.CONFIRMING
    settled = LegFacts(evidence=True, settled=True)
    assert situation([failed, settled], cancelled=False, closed=False) is Situation.INCOMPLETE
    assert situation([failed, LegFacts(dead=True)], cancelled=False, closed=False) is Situation.EXPIRED


# --------------------------------------------------------------------------- our own look

TX = "0x" + "ab" * 32


def looked(
    *values: int, success: bool | None = True, block: int | None = 7, to: str = "0xa1", token: str = "0x70"
) -> Look:
    moved = tuple(Moved(token, "0x00", to, value) for value in values)
    return Look(8453, TX, block, None if block is None else Hash32(bytes(32)), success, moved)


@pytest.mark.parametrize(
    ("looks", "check"),
    [
        ([], Check.WAITING),
        ([looked(100, block=None)], Check.WAITING),
        ([looked(100)], Check.HOLDS),
        ([looked(60, 40)], Check.HOLDS),
        ([looked(100, 250)], Check.HOLDS),
        ([looked(99)], Check.REFUTED),
        ([looked(100, to="0xb0")], Check.REFUTED),
        ([looked(100, token="0x71")], Check.REFUTED),
        ([looked(100, success=False)], Check.REFUTED),
        ([looked()], Check.REFUTED),
    ],
)
def test_on_a_chain_that_we_follow_our_own_look_decides(looks: list[Look], check: Check) -> None:
    record = a_record(wallet="0xa1", chain_id=8453, tx_hashes=(TX,), looks=tuple(looks), contract="0x70")
    unconfigured = replace(record, contract=None)
    assert unconfigured.check is not Check.HOLDS and unconfigured.place is None, "any token may be sent to anybody"
    assert record.check is check and record.counts is (check is not Check.REFUTED)
    assert (record.place is not None) is (check is Check.HOLDS)
    matching = match_partners([a_leg(wallet="0xa1")], [record], rules=RULES)
    assert bool(matching.claims) is record.counts
    if check is Check.REFUTED:
        assert not next(iter(matching.failed.values())).certain, "it is the partner's word against ours"


def test_several_transactions_of_one_order_are_all_looked_at_and_sum_up() -> None:
    other = "0x" + "cd" * 32
    given = {"wallet": "0xa1", "chain_id": 8453, "tx_hashes": (TX, other), "contract": "0x70"}
    record = a_record(looks=(looked(60),), **given)
    assert record.check is Check.WAITING
    second = replace(looked(40, block=9), tx_hash=other)
    both = replace(record, looks=(looked(60), second))
    assert both.check is Check.HOLDS and both.place is not None and both.place.block_number == 9
