"""The partners' place on the ladder: design section 5, "Confidence of partners", case by case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from indexer.model.confidence import Alarm, Heads, Level, Policy
from indexer.model.evidence import Look, Moved, PartnerTransfer, Status
from indexer.model.standing import LOOK_AGAIN_MS, PartnerRules, Standing
from indexer.model.types import Hash32

TX, ALICE, CHAIN = "0x" + "ab" * 32, "0xa1", 8453
SAFE, FINALIZED = Policy(Level.SAFE), Policy(Level.FINALIZED)


def a_record(kind: str = "keyban.mint", **given: Any) -> PartnerTransfer:
    terms: dict[str, Any] = {
        "brand": "bloom",
        "partner": kind.partition(".")[0],
        "record_id": "o1",
        "wallet": ALICE,
        "token": None,
        "amount": 100,
        "status": Status.SUCCEEDED,
        "first_seen_ms": 1_000,
        "settled_ms": 1_000,
        "seen_ms": 1_000,
        "network": "StellarMainnet",
        "tx_hashes": (TX,),
    }
    return PartnerTransfer(kind=kind, **(terms | given))


def standing(now_ms: int = 1_000, *heads: Heads, **rules: Any) -> Standing:
    given = PartnerRules(**rules)
    return Standing({h.chain_id: h for h in heads}, {("bloom", p): given for p in ("keyban", "qiibee")}, now_ms)


@pytest.mark.parametrize("network", ["StellarMainnet", "StellarTestnet", "stellarquickstart"])
def test_a_closed_ledger_of_stellar_is_final(network: str) -> None:
    for status in (Status.INCLUDED, Status.SUCCEEDED):
        assert standing().level(a_record(network=network, status=status)) is Level.FINALIZED
    assert standing().reached(FINALIZED, a_record(network=network))


def test_require_success_insists_on_the_word() -> None:
    strict = standing(require_success=True, finalized_after_ms=0)
    for network in ("StellarMainnet", "StarknetMainnet"):
        assert strict.level(a_record(network=network, status=Status.INCLUDED)) is Level.INCLUDED
        assert strict.level(a_record(network=network)) is Level.FINALIZED
    assert strict.alarms(SAFE, a_record(status=Status.INCLUDED)) == [], "no time makes it final"


@pytest.mark.parametrize(
    "given", [{"status": Status.PENDING}, {"status": Status.FAILED}, {"withdrawn": True}, {"amount": None}]
)
def test_what_does_not_count_has_no_rung(given: dict[str, Any]) -> None:
    assert standing().level(a_record(**given)) is None
    assert not standing().reached(Policy(Level.INCLUDED), a_record(**given))


def test_another_network_is_included_and_final_after_it_was_seen_to_stand() -> None:
    never = standing(finalized_after_ms=None)
    record = a_record(network="StarknetMainnet", seen_ms=10**9)
    assert never.level(record) is Level.INCLUDED and never.alarms(SAFE, record) == []
    after = standing(now_ms=5_000, finalized_after_ms=10_000)
    assert after.level(a_record(network="x", seen_ms=10_999)) is Level.INCLUDED
    assert after.level(a_record(network="x", seen_ms=11_000)) is Level.FINALIZED
    assert after.alarms(SAFE, a_record(network="x")) == [Alarm(0, "clock_ms", 11_000)]
    # the time is over, and nobody has read it since: it is not final, and looked at again
    late = standing(now_ms=20_000, finalized_after_ms=10_000)
    assert not late.reached(SAFE, a_record(network="x"))
    assert late.alarms(SAFE, a_record(network="x")) == [Alarm(0, "clock_ms", 20_000 + LOOK_AGAIN_MS)]


def test_qiibee_is_final_on_its_word_after_settle_after_and_with_a_hash() -> None:
    rules = standing(settle_after_ms=60_000)
    for kind in ("qiibee.credit", "qiibee.debit"):
        assert rules.level(a_record(kind, network=None)) is Level.INCLUDED
        assert rules.level(a_record(kind, network=None, seen_ms=61_000)) is Level.FINALIZED
        assert rules.level(a_record(kind, network=None, seen_ms=61_000, tx_hashes=())) is Level.INCLUDED
    assert standing(settle_after_ms=0).reached(FINALIZED, a_record("qiibee.credit"))


def test_on_a_chain_that_we_follow_the_ladder_is_the_chains() -> None:
    look = Look(CHAIN, TX, 50, Hash32(bytes(32)), True, (Moved("0x70", "0x00", ALICE, 100),))
    record = a_record(network="BaseMainnet", chain_id=CHAIN, looks=(look,), stated_ms=500, contract="0x70")
    unseen = a_record(network="BaseMainnet", chain_id=CHAIN)
    for safe, final, level in ((49, 40, Level.INCLUDED), (50, 40, Level.SAFE), (60, 50, Level.FINALIZED)):
        heads = Heads(CHAIN, 100, 2_000, safe, final)
        assert standing(0, heads).level(record) is level
        assert standing(0, heads).level(unseen) is None, "before our own look it is nothing, whatever the partner says"
        for contract in (None, "0x71"):
            other = replace(record, contract=contract)
            assert standing(0, heads).level(other) is None and not standing(0, heads).reached(SAFE, other)
    heads = Heads(CHAIN, 100, 5_999, 49, 40)
    confirmed = Policy(Level.CONFIRMED, seconds=5)
    assert not standing(0, heads).reached(confirmed, record), (
        "from when it was seen, if that is later than its own time"
    )
    assert standing(0, Heads(CHAIN, 100, 6_000, 49, 40)).reached(confirmed, record)
    assert standing(0, heads).alarms(confirmed, record) == [
        Alarm(CHAIN, "head_time_ms", 6_000),
        Alarm(CHAIN, "safe_number", 50),
    ]
    assert standing(0, heads).alarms(SAFE, record) == [Alarm(CHAIN, "safe_number", 50)]
    assert standing(0, heads).alarms(FINALIZED, record) == [Alarm(CHAIN, "finalized_number", 50)]
    assert standing(0, heads).alarms(SAFE, unseen) == [], "the answer to our question touches the operation"


def test_confirmed_of_a_ledger_that_we_do_not_follow_is_its_finality() -> None:
    confirmed = Policy(Level.CONFIRMED, seconds=1)
    assert standing().reached(confirmed, a_record())
    assert not standing(10**9).reached(confirmed, a_record(network="StarknetMainnet"))
