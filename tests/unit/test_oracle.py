"""The oracle's own proof: it is silent about what is right, and every rule bites when it is broken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import pytest
from eth_abi.abi import encode
from eth_hash.auto import keccak

from tests.oracle import (
    FINALIZED,
    FULFILLED,
    READY,
    RESTORED,
    REVERTED,
    Basis,
    Delivery,
    Demand,
    Event,
    Expiry,
    Facts,
    Final,
    Handed,
    Moment,
    Ready,
    Told,
    judge_deliveries,
    judge_expired,
    judge_facts,
    judge_ready,
    judge_received,
    judge_signals,
    judge_states,
    judge_trace,
    settled_after,
)
from tests.truth import Contracts, _announced, _load_events, facts_of

OPERATION = UUID(int=1)
EXPIRED, CONFLICT, CONFIRMING = "operation.expired", "operation.conflict", "operation.confirming"


def story(*types: str) -> list[Told]:
    """A right trace of these types: generations, numbers and what is superseded filled in as they should be."""
    told: list[Told] = []
    generation, standing = 0, None
    for position, kind in enumerate(types):
        generation += kind in (READY, RESTORED)
        supersedes = standing if kind == REVERTED else None
        id = uuid5(OPERATION, str(position))
        told.append(Told(id, kind, OPERATION, generation, supersedes, position + 1, "bloom", None, float(position)))
        standing = id if kind in (READY, RESTORED) else standing
    return told


LIFE = story(CONFIRMING, READY, FULFILLED, REVERTED, RESTORED, FINALIZED)
END = Final("fulfilled", 2, (Handed(1, 1.5),))


@pytest.mark.parametrize(
    ("types", "final"),
    [
        ((), Final("pending", 0)),
        ((READY,), Final("ready", 1)),
        ((READY, REVERTED), Final("reverted", 1)),
        ((READY, REVERTED), Final("pending", 1)),
        ((READY, REVERTED, READY, FULFILLED), Final("fulfilled", 2, (Handed(2, 2.5),))),
        ((READY, REVERTED, RESTORED), Final("fulfilled", 2, (Handed(1, 0.5),))),
        ((READY, REVERTED, CONFLICT), Final("conflict", 1)),
        ((EXPIRED, CONFLICT, READY), Final("ready", 1)),
        ((EXPIRED, CONFLICT), Final("expired", 0)),  # its evidence came and went again: told once each
        ((CONFIRMING, CONFIRMING), Final("pending", 0)),
    ],
)
def test_a_right_trace_is_passed_over_in_silence(types: tuple[str, ...], final: Final) -> None:
    assert judge_trace(story(*types), final) == []
    assert judge_trace(LIFE, END) == []


def broken(position: int, **changed: Any) -> list[Told]:
    return [replace(told, **changed) if at == position else told for at, told in enumerate(LIFE)]


@pytest.mark.parametrize(
    ("trace", "final", "word"),
    [
        (broken(3, supersedes=UUID(int=9)), END, "names"),
        (broken(3, supersedes=None), END, "names"),
        ([told for told in LIFE if told.type != REVERTED], END, "nothing has taken back"),
        (story(REVERTED), Final("reverted", 0), "takes back what does not stand"),
        (story(READY, REVERTED, REVERTED), Final("reverted", 1), "takes back what does not stand"),
        (story(READY, READY), Final("ready", 2), "nothing has taken back"),
        (LIFE, replace(END, receipts=()), "nothing to restore"),
        (LIFE, replace(END, receipts=(Handed(2, 9.0),)), "nothing to restore"),
        (LIFE, replace(END, receipts=(Handed(1, 4.5),)), "nothing to restore"),
        (story(READY, REVERTED, READY), Final("ready", 2, (Handed(1, 0.5),)), "handed over already"),
        (story(READY, FULFILLED), Final("fulfilled", 1), "without a standing ready"),
        (story(FULFILLED), Final("pending", 0, (Handed(1),)), "without a standing ready"),
        (story(READY, CONFLICT), Final("ready", 1), "no reverted came first"),
        (story(EXPIRED, READY), Final("ready", 1), "without a conflict between"),
        (story(FINALIZED), Final("pending", 0), "while nothing is ready"),
        (broken(0, supersedes=UUID(int=9)), END, "supersedes something"),
        (broken(4, generation=1), END, "is generation 1, after 1"),
        (broken(5, id=LIFE[0].id), END, "told 2 times"),
        (broken(5, sequence=2), END, "out of order"),
        (broken(1, status="pending"), END, "says the operation is pending"),
        (LIFE, replace(END, state="pending"), "stands"),
        (LIFE, replace(END, state="ready"), "fulfilled told"),
        (story(READY), Final("fulfilled", 1, (Handed(1),)), "fulfilled told"),
        (story(), Final("ready", 0), "nothing stands"),
        (story(), Final("reverted", 0), "nobody was told"),
        (story(), Final("expired", 0), "nobody was told"),
        (story(READY), Final("ready", 2), "the last one told is 1"),
    ],
)
def test_every_rule_of_a_trace_bites(trace: list[Told], final: Final, word: str) -> None:
    assert any(word in wrong for wrong in judge_trace(trace, final)), judge_trace(trace, final)


def test_numbers_have_no_gap_per_brand_and_every_signal_has_its_operation() -> None:
    assert judge_signals(LIFE, {OPERATION: END}) == []
    assert any("gap" in wrong for wrong in judge_signals(broken(5, sequence=7), {OPERATION: END}))
    assert any("unknown operation" in wrong for wrong in judge_signals(LIFE, {}))
    unmatched = Told(UUID(int=5), "settlement.unmatched", UUID(int=6), sequence=7, brand="bloom")
    assert judge_signals([*LIFE, unmatched], {OPERATION: END}) == []
    other = replace(unmatched, brand="other")
    assert any("brand other" in wrong for wrong in judge_signals([*LIFE, other], {OPERATION: END}))
    twice = judge_signals([*LIFE, replace(unmatched, id=LIFE[0].id)], {OPERATION: END})
    assert any("told 2 times" in wrong for wrong in twice)


def test_what_was_received_came_in_order_and_was_really_told() -> None:
    a, b, c, one, two = (UUID(int=n) for n in (10, 11, 12, 1, 2))
    known = {a, b, c}
    assert judge_received([(b, two, 2), (a, one, 1), (a, one, 1), (c, one, 3), (a, one, 1)], known) == []
    assert "came after" in judge_received([(c, one, 3), (a, one, 1)], known)[0]
    assert "not in the outbox" in judge_received([(a, one, 1)], {b})[0]


def test_states_by_reference() -> None:
    assert judge_states({"a": "ready", "b": {"pending", "reverted"}}, {"a": "ready", "b": "reverted"}) == []
    assert judge_states({"a": "ready"}, {"a": "pending"}) == ["a is pending, expected ready"]
    assert judge_states({"a": "ready"}, {}) == ["a is missing, expected ready"]
    assert judge_states({}, {"a": "ready"}) == ["a was never asked about"]


# --------------------------------------------------------------------------- ready

EVENT = Event(b"\x01", 0, 100, 20_000, {"amount": "250", "holder": "0x40"})
AT = (EVENT.block_hash, EVENT.log_index)


def moment(at: float, *, there: bool = True, head_ms: int = 20_000, safe: int = 0, finalized: int = 0) -> Moment:
    return Moment(at, {AT: EVENT} if there else {}, head_ms, safe, finalized)


def ready(at: float, demand: Demand, reference: str = "r", **terms: str) -> Ready:
    return Ready(reference, at, (Basis({"amount": "250"} | terms, *AT, demand),))


@pytest.mark.parametrize(
    ("demand", "enough", "short"),
    [
        (Demand("included"), moment(5), moment(5, there=False)),
        (Demand("confirmed", 4), moment(5, head_ms=24_000), moment(5, head_ms=23_999)),
        (Demand("confirmed", 4), moment(5, safe=100), moment(5, safe=99)),
        (Demand("safe"), moment(5, safe=100), moment(5, safe=99, head_ms=10**9)),
        (Demand("finalized"), moment(5, safe=100, finalized=100), moment(5, safe=100, finalized=99)),
    ],
)
def test_ready_only_while_the_truth_held_the_evidence_deep_enough(
    demand: Demand, enough: Moment, short: Moment
) -> None:
    assert judge_ready([ready(6, demand)], [moment(0, there=False), enough], grace=1) == []
    assert any("too early" in wrong for wrong in judge_ready([ready(6, demand)], [short], grace=1))


def test_what_was_true_a_moment_ago_counts_only_within_the_grace() -> None:
    truth = [moment(0), moment(5, there=False)]
    assert judge_ready([ready(5.4, Demand("included"))], truth, grace=0.5) == []
    assert judge_ready([ready(5.6, Demand("included"))], truth, grace=0.5) != []
    assert judge_ready([ready(-1, Demand("included"))], truth, grace=0.5) == ["r was ready before the truth begins"]


def test_other_terms_never_make_ready_unless_a_person_decided() -> None:
    other = ready(1, Demand("included"), holder="0x41")
    assert "holder differ" in judge_ready([other], [moment(0)], grace=1)[0]
    decided = replace(other, legs=tuple(replace(leg, decided=True) for leg in other.legs))
    assert judge_ready([decided], [moment(0)], grace=1) == []


def test_one_event_never_makes_two_ready() -> None:
    pair = [ready(1, Demand("included"), "a"), ready(2, Demand("included"), "b")]
    assert judge_ready(pair, [moment(0)], grace=9) == ["one event made both a and b ready"]
    twice = replace(pair[0], legs=pair[0].legs * 2)
    assert judge_ready([twice], [moment(0)], grace=9) == ["a: one event settles two legs"]


# --------------------------------------------------------------------------- deliveries


DELIVERED = Delivery(UUID(int=7), OPERATION, 1, READY, "delivered", 1, (10.0,), 10.0)


def test_what_a_dispatcher_says_is_held_against_what_arrived() -> None:
    def wrong(one: Delivery, *received: UUID, dead_allowed: bool = True, **taken_back: float) -> str:
        back = {UUID(int=7): taken_back["at"]} if taken_back else {}
        return "; ".join(judge_deliveries([one], received, back, most_attempts=3, dead_allowed=dead_allowed))

    id = UUID(int=7)
    assert wrong(DELIVERED, id) == ""
    assert "never arrived" in wrong(DELIVERED)
    assert "still waiting" in wrong(replace(DELIVERED, state="pending"), id)
    assert wrong(replace(DELIVERED, state="dead", attempts=3)) == ""
    assert "dead letter after 2" in wrong(replace(DELIVERED, state="dead", attempts=2))
    assert "dead letter" in wrong(replace(DELIVERED, state="dead", attempts=3), dead_allowed=False)
    assert "attempted 4 times" in wrong(replace(DELIVERED, attempts=4), id)
    assert "no hint" in wrong(replace(DELIVERED, state="dropped"))
    assert wrong(replace(DELIVERED, state="dropped", type=CONFIRMING)) == ""
    superseded = replace(DELIVERED, state="superseded", attempts=0, begun=(), last_begun=None)
    assert wrong(superseded, at=11) == ""
    assert "nothing took it back" in wrong(superseded)
    assert "without an attempt" in wrong(superseded, id, at=11)
    assert wrong(replace(superseded, begun=(10.0,), last_begun=10.0), id, at=11) == ""
    assert "after it was taken back" in wrong(replace(superseded, begun=(12.0,), last_begun=12.0), id, at=11)
    refused = judge_deliveries([DELIVERED], [id], {}, most_attempts=3, dead_allowed=False, taken=())
    assert "refused each time" in "; ".join(refused)
    assert not judge_deliveries([DELIVERED], [id], {}, most_attempts=3, dead_allowed=False, taken=[id])


def test_expired_only_after_finalized_blocks_have_passed_the_deadline() -> None:
    truth = [moment(10.0, finalized=50), moment(20.0, finalized=101)]

    def wrong(at: float, until: int | None) -> str:  # block n is of second n
        return "; ".join(judge_expired([Expiry("order-1", at, until)], truth, lambda number: 1000 * number))

    assert wrong(20.0, 100) == "" == wrong(15.0, 49)
    assert "51.0 s before" in wrong(15.0, 100)
    assert "had no deadline" in wrong(20.0, None)


def test_who_follows_the_receivers_rule_goes_by_the_highest_number() -> None:
    ready, reverted = (
        replace(told, status=word) for told, word in zip(LIFE[1:4:2], ("ready", "reverted"), strict=True)
    )
    assert not settled_after([])
    assert settled_after([ready]) and not settled_after([ready, reverted])
    assert not settled_after([reverted, ready])  # the ready came late: it is ignored


# --------------------------------------------------------------------------- facts


def test_facts_missing_made_up_or_changed_are_named() -> None:
    key, other = ("movement", b"\x01", 0, 0), ("movement", b"\x02", 3, 0)
    truth: Facts = {key: {"block_number": 7, "amount": 1}}
    assert judge_facts(truth, {key: {"block_number": 7, "amount": 1, "more": 2}}) == []
    assert judge_facts(truth, {})[0].startswith("missing: movement in block 7")
    assert judge_facts({}, {other: {"block_number": 8}})[0].startswith("made up: movement in block 8")
    assert judge_facts(truth, {key: {"block_number": 7, "amount": 2}})[0].endswith("amount is 2, 1 in truth")


FACTORY, TOKEN, ISSUER, STRANGER = b"\xfa" * 20, b"\x70" * 20, b"\x15" * 20, b"\x66" * 20
PROGRAMME, NONCE = b"\x1d" * 32, b"\x01" * 32
EVENTS = _load_events(Path(__file__).parents[2] / "contracts_abi")


def a_log(name: str, emitter: bytes, block: int, index: int, /, **values: Any) -> dict[str, Any]:
    ((topic0, event),) = [(topic, event) for topic, event in EVENTS.items() if event.name == name]
    topics = [topic0] + [encode([kind], [values[n]]) for n, kind, indexed in event.inputs if indexed]
    rest = [(kind, values[n]) for n, kind, indexed in event.inputs if not indexed]
    return {
        "address": "0x" + emitter.hex(),
        "topics": ["0x" + topic.hex() for topic in topics],
        "data": "0x" + encode([kind for kind, _ in rest], [value for _, value in rest]).hex(),
        "blockNumber": hex(block),
        "blockHash": "0x" + keccak(bytes([block])).hex(),
        "transactionHash": "0x" + keccak(bytes([block, index])).hex(),
        "transactionIndex": "0x0",
        "logIndex": hex(index),
    }


def created(block: int = 1) -> dict[str, Any]:
    texts = dict.fromkeys(("name", "symbol", "media", "description", "contractURI", "tokenURI"), "x")
    whose = {"factory": FACTORY, "issuer": ISSUER, "loyaltyId": PROGRAMME, "loyalty": TOKEN}
    return a_log("LoyaltyProgramCreated", FACTORY, block, 1, **whose, **texts)


def issued(emitter: bytes, block: int = 2, **changed: Any) -> dict[str, Any]:
    terms: dict[str, Any] = {"factory": FACTORY, "issuer": ISSUER, "loyaltyId": PROGRAMME, "loyalty": TOKEN}
    terms |= {"to": STRANGER, "tokenId": 0, "amount": 5, "nonce": NONCE, "operationHash": bytes(32), "data": b""}
    return a_log("PointsIssued", emitter, block, 0, **(terms | changed))


@pytest.mark.parametrize(
    ("log", "stored"),
    [
        (issued(FACTORY), True),
        (issued(TOKEN), True),
        (issued(TOKEN, block=1), True),  # before the announcement, in its block
        (issued(TOKEN, block=0), False),  # still a stranger
        (issued(TOKEN, issuer=STRANGER), False),
        (issued(FACTORY, factory=STRANGER), False),
        (issued(STRANGER), False),
    ],
)
def test_the_truth_knows_who_may_speak(log: dict[str, Any], stored: bool) -> None:
    contracts = Contracts(frozenset([FACTORY]))
    logs = [log, created()]
    facts = facts_of(logs, EVENTS, contracts, _announced(logs, EVENTS, contracts))
    movements = [fields for key, fields in facts.items() if key[0] == "movement"]
    assert len(movements) == stored
    assert [key[0] for key in facts if key[0] != "movement"] == ["programme"]
    if movements:
        assert (movements[0]["amount"], movements[0]["operation_hash"], movements[0]["holder"]) == (5, None, STRANGER)


def test_a_batch_becomes_a_row_an_item_and_an_unknown_topic_a_raw_log() -> None:
    parties = {"loyalty": TOKEN, "operator": ISSUER, "from": ISSUER, "to": STRANGER}
    batch = a_log("LoyaltyBatchTransfer", TOKEN, 2, 0, **parties, tokenIds=(0, 7), amounts=(1, 2))
    strange = batch | {"topics": ["0x" + "99" * 32], "logIndex": "0x9"}
    contracts = Contracts(frozenset([FACTORY]))
    logs = [created(), batch, strange]
    facts = facts_of(logs, EVENTS, contracts, _announced(logs, EVENTS, contracts))
    items = {key[3]: (fields["bucket"], fields["amount"]) for key, fields in facts.items() if key[0] == "transfer"}
    assert items == {0: (0, 1), 1: (7, 2)}
    assert [key[2] for key in facts if key[0] == "raw_log"] == [9]
