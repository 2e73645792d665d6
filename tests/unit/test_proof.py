"""The receipts root: real blocks prove their receipts, and no byte that it commits to can change unnoticed.

The real answers lie beside the checkout (facts/real_rpc); without them those tests say so and are skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.chain.integrity import Lie, Outcome, logs_of_receipts, verify_header
from indexer.chain.proof import EMPTY_TRIE, _trie_root, receipts_root
from indexer.chain.wire import RawHeader, RawLog, RawReceipt
from indexer.model.types import Header
from tests.fake_node import trie_root

REAL = Path(__file__).resolve().parents[3] / "shared" / "facts" / "real_rpc" / "blocks"
BLOCKS = sorted(REAL.glob("*.json"))
real = pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem) for path in BLOCKS]
    or [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=f"NO REAL ANSWERS: {REAL} is absent"))],
)


def read(path: Path) -> tuple[Header, list[RawReceipt], dict[str, Any]]:
    capture = json.loads(path.read_text())
    header = verify_header(msgspec.convert(capture["block"], RawHeader), None)
    return header, msgspec.convert(capture["receipts"], list[RawReceipt]), capture["meta"]


def noticed(header: Header, receipts: list[RawReceipt]) -> bool:
    try:
        logs_of_receipts(header, receipts)
    except Lie:
        return True
    return False


@real
def test_real_receipts_are_proven(path: Path) -> None:
    header, receipts, meta = read(path)
    assert "receiptsRoot" in meta["verifies"]
    assert receipts_root(receipts) == header.receipts_root
    counted: dict[str, Outcome] = {}
    logs_of_receipts(header, receipts, count=counted.__setitem__)
    assert counted["receipts_root"] is Outcome.PASS


def touched(text: str) -> list[str]:
    """Versions of a hex string with one digit changed, in every byte."""
    return [
        text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :]
        for at in range(2, len(text), 2)
        if text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :] != text
    ]


@real
def test_every_altered_byte_under_the_root_is_noticed(path: Path) -> None:
    header, receipts, _ = read(path)

    def with_receipt(place: int, **changes: Any) -> list[RawReceipt]:
        return [msgspec.structs.replace(r, **changes) if i == place else r for i, r in enumerate(receipts)]

    def with_log(place: int, index: int, **changes: Any) -> list[RawReceipt]:
        logs = [
            msgspec.structs.replace(one, **changes) if i == index else one for i, one in enumerate(receipts[place].logs)
        ]
        return with_receipt(place, logs=logs)

    for place, receipt in enumerate(receipts):
        assert receipt.status is not None and receipt.cumulative_gas_used is not None
        assert noticed(header, with_receipt(place, status="0x0" if receipt.status == "0x1" else "0x1"))
        gas = f"0x{int(receipt.cumulative_gas_used, 16):08x}"
        assert all(noticed(header, with_receipt(place, cumulative_gas_used=other)) for other in touched(gas))
        assert noticed(header, with_receipt(place, type="0x2" if receipt.type != "0x2" else "0x0"))
        assert noticed(header, [r for i, r in enumerate(receipts) if i != place])
        if receipt.deposit_receipt_version is not None:
            nonce = f"0x{int(receipt.deposit_nonce or '', 16):016x}"
            assert all(noticed(header, with_receipt(place, deposit_nonce=other)) for other in touched(nonce))
            assert noticed(header, with_receipt(place, deposit_receipt_version="0x2"))
            assert noticed(header, with_receipt(place, deposit_receipt_version=None))
        if receipt.logs_bloom is not None:
            assert all(noticed(header, with_receipt(place, logs_bloom=other)) for other in touched(receipt.logs_bloom))
        for index, log in enumerate(receipt.logs):
            assert all(noticed(header, with_log(place, index, address=other)) for other in touched(log.address))
            assert all(noticed(header, with_log(place, index, data=other)) for other in touched(log.data))
            assert noticed(header, with_log(place, index, data=log.data + "00"))
            for at, topic in enumerate(log.topics):
                for other in touched(topic):
                    topics = tuple(other if i == at else one for i, one in enumerate(log.topics))
                    assert noticed(header, with_log(place, index, topics=topics))
            assert noticed(header, with_receipt(place, logs=[one for i, one in enumerate(receipt.logs) if i != index]))
            # the same log once more leaves no trace in a bloom
            assert receipts_root(with_receipt(place, logs=[*receipt.logs, log])) != header.receipts_root


@pytest.mark.skipif(not BLOCKS, reason=f"NO REAL ANSWERS: {REAL} is absent")
def test_a_nonce_that_regolith_shows_is_not_hashed() -> None:
    header, receipts, _ = read(REAL / "base-mainnet-81636.json")
    assert receipts[0].deposit_nonce is not None and receipts[0].deposit_receipt_version is None
    assert receipts_root(receipts) == header.receipts_root


@pytest.mark.skipif(not BLOCKS, reason=f"NO REAL ANSWERS: {REAL} is absent")
def test_an_unknown_type_cannot_be_verified_and_is_no_lie() -> None:
    header, receipts, _ = read(REAL / "base-mainnet-4999983.json")
    strange = [msgspec.structs.replace(r, type="0x79") if r.type == "0x2" else r for r in receipts]
    assert strange != receipts
    counted: dict[str, Outcome] = {}
    logs_of_receipts(header, strange, count=counted.__setitem__)
    assert counted["receipts_root"] is Outcome.SKIP


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 300), st.integers(1, 80), st.integers(0, 2**32))
def test_the_trie_is_the_other_implementations(count: int, longest: int, seed: int) -> None:
    values = [bytes([1 + (seed + i) % 255]) * (1 + (seed >> 3) * i % longest) for i in range(count)]
    assert _trie_root(values) == trie_root(values)


def test_nothing_has_the_empty_root() -> None:
    assert (
        _trie_root([])
        == EMPTY_TRIE
        == bytes.fromhex("56e81f171bcc55a6ff8345e692c0f86e5b48e01b996cadc001622fb5e363b421")
    )


@pytest.mark.parametrize("count", [1, 2, 16, 17, 55, 56, 127, 128, 129, 255, 256, 257, 1000])
def test_every_length_of_keys(count: int) -> None:
    values = [os.urandom(1 + i % 70) for i in range(count)]
    assert _trie_root(values) == trie_root(values)


LOG = RawLog(address="0x" + "11" * 20, topics=("0x" + "22" * 32,), data="0x")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"status": None}, "no status"),
        ({"cumulative_gas_used": None}, "no cumulative gas"),
        ({"type": "0x80"}, "seven bits"),
        ({"type": "0x7e", "deposit_receipt_version": "0x1"}, "no nonce"),
        ({"status": "one"}, "not a quantity"),
        ({"logs": [msgspec.structs.replace(LOG, data="0x0")]}, "hex digits"),
        ({"logs": [msgspec.structs.replace(LOG, topics=("0x22",))]}, "hex digits"),
    ],
)
def test_what_is_no_receipt_is_said(changes: dict[str, Any], word: str) -> None:
    receipt = RawReceipt(
        transaction_hash="0x" + "33" * 32,
        transaction_index="0x0",
        type="0x2",
        status="0x1",
        cumulative_gas_used="0x5208",
        logs=[LOG],
    )
    receipts_root([receipt])
    with pytest.raises(ValueError, match=word):
        receipts_root([msgspec.structs.replace(receipt, **changes)])


def test_a_receipt_of_before_byzantium() -> None:
    old = RawReceipt(
        transaction_hash="0x" + "33" * 32,
        transaction_index="0x0",
        root="0x" + "44" * 32,
        cumulative_gas_used="0x5208",
        logs=[],
    )
    assert receipts_root([old]) != receipts_root([msgspec.structs.replace(old, root="0x" + "45" * 32)])
