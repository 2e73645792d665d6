"""Signals: ids that cannot be made twice, and a payload that any JSON reader takes without losing a digit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest

from indexer.model.confidence import Level
from indexer.model.evidence import Movement, evidence_id
from indexer.model.operation import State
from indexer.model.signal import (
    HINTS,
    OF_STATE,
    READY,
    REVERTED,
    Signal,
    evidence_json,
    instant,
    movement_json,
    operation_signal,
    signal_id,
    unmatched_id,
    unmatched_signal,
)
from indexer.model.types import UINT256_MAX, Address, Hash32

OPERATION = UUID("7d9b3f64-1111-5222-8333-444455556666")
EVIDENCE = [UUID(int=1), UUID(int=2)]
EVENT = Movement(
    84532, Address(b"\xfa" * 20), "loyfin.redemption", Address(b"\x15" * 20), Hash32(b"\x01" * 32), Address(b"\x40" * 20),
    Hash32(b"\x1d" * 32), UINT256_MAX, UINT256_MAX, None, 2**53 + 1, Hash32(b"\x02" * 32), 3, Hash32(b"\x03" * 32), 1_790_000_000_200,
)  # fmt: skip


def a_signal(**given: Any) -> Signal:
    terms: dict[str, Any] = {
        "kind": READY,
        "operation_id": OPERATION,
        "brand": "bloom",
        "reference": "redemption-8841",
        "status": "ready",
        "generation": 1,
        "now_ms": 1_790_000_000_000,
        "causes": EVIDENCE,
        "legs": [],
        "metadata": {"orderId": "8841"},
        "evidence": [],
    }
    return operation_signal(**(terms | given))


def test_an_id_is_of_operation_generation_type_and_causes_and_of_nothing_else() -> None:
    ids = {
        signal_id(OPERATION, 1, READY, EVIDENCE),
        signal_id(OPERATION, 2, READY, EVIDENCE),
        signal_id(OPERATION, 1, REVERTED, EVIDENCE),
        signal_id(OPERATION, 1, READY, EVIDENCE[:1]),
        signal_id(UUID(int=7), 1, READY, EVIDENCE),
    }
    assert len(ids) == 5 and {id.version for id in ids} == {5}
    assert signal_id(OPERATION, 1, READY, EVIDENCE[::-1]) == signal_id(OPERATION, 1, READY, EVIDENCE)
    assert a_signal(now_ms=1, reference="x", metadata={}, evidence=[{}]).id == a_signal().id


def test_ids_never_change_from_one_release_to_the_next() -> None:
    """They are part of the contract: receivers remember them."""
    assert str(signal_id(OPERATION, 1, READY, EVIDENCE)) == "465d0fa4-c6aa-5c98-afaa-f05d2fa0c377"
    assert str(EVENT.id) == "480d5239-7c3f-5f32-9d38-dd860b919cce"
    assert str(unmatched_id(EVENT.id)) == "ad79f89b-6ece-5662-886b-54dbb641c2bc"


def test_evidence_is_the_same_in_whichever_block_it_is_mined() -> None:
    again = replace(EVENT, block_number=1, block_hash=Hash32(b"\x09" * 32), amount=5)
    assert again.id == EVENT.id
    lane = (84532, EVENT.factory, "loyfin.redemption", EVENT.issuer)
    assert evidence_id(*lane, EVENT.nonce) == EVENT.id
    assert evidence_id(1, *lane[1:], EVENT.nonce) != EVENT.id


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_795_255_200_000, "2026-11-21T10:00:00Z"),
        (1_795_255_200_200, "2026-11-21T10:00:00.200Z"),
        (1_795_255_200_001, "2026-11-21T10:00:00.001Z"),
    ],
)
def test_times_are_rfc_3339_in_utc(milliseconds: int, text: str) -> None:
    assert instant(milliseconds) == text


def test_every_millisecond_keeps_its_last_digit() -> None:
    base = 1_795_255_200_000
    for extra in range(1, 1000):
        assert instant(base + extra).endswith(f".{extra:03}Z")


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_no_number_in_a_payload_passes_2_to_the_53() -> None:
    told = [evidence_json(EVENT, 0, "nonce", False, Level.SAFE, "https://explorer.example/"), movement_json(EVENT)]
    assert all(abs(number) < 2**53 for number in numbers(told))
    assert told[0]["blockNumber"] == str(2**53 + 1) and told[1]["amount"] == str(UINT256_MAX)
    assert told[0]["explorerUrl"] == "https://explorer.example/tx/0x" + "03" * 32
    assert json.loads(json.dumps(told)) == told


def test_the_payload_is_the_one_of_the_contract() -> None:
    ready = a_signal()
    reverted = a_signal(kind=REVERTED, status="reverted", causes=[ready.id], supersedes=ready.id)
    assert ready.payload["type"] == ready.type == "operation.ready"
    assert ready.payload["timestamp"] == "2026-09-21T14:13:20Z"
    data = reverted.payload["data"]
    assert (data["id"], data["supersedes"], data["brand"]) == (str(reverted.id), str(ready.id), "bloom")
    assert data["operation"] == {
        "id": str(OPERATION),
        "reference": "redemption-8841",
        "status": "reverted",
        "legs": [],
        "metadata": {"orderId": "8841"},
    }
    assert ready.payload["data"]["supersedes"] is None


def test_unmatched_evidence_is_told_under_an_id_of_its_own() -> None:
    told = unmatched_signal(EVENT, "bloom", 0)
    assert (told.id, told.aggregatetype, told.aggregateid) == (unmatched_id(EVENT.id), "evidence", EVENT.id)
    assert told.payload["data"]["evidence"][0]["operationHash"] is None


def test_states_that_can_be_taken_back_quietly_are_hints_and_the_others_are_not() -> None:
    hinted = {state for state, kind in OF_STATE.items() if kind in HINTS}
    assert hinted == {State.SUBMITTED, State.CONFIRMING}
    assert all(kind == f"operation.{state.value}" for state, kind in OF_STATE.items())
