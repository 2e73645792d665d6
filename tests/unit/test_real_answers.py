"""Real blocks and headers of real nodes: each check that a capture names holds, and no committed byte can change unnoticed.

They lie beside the checkout (facts/real_rpc); without them these tests say so and are skipped. What the product checks is
checked by its own functions; transactions, which it never asks for, by the trie alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from eth_hash.auto import keccak

from indexer.chain.integrity import Lie, Outcome, bloom_of, header_hash, logs_of_receipts, verify_header
from indexer.chain.proof import receipts_root
from indexer.chain.wire import RawHeader, RawReceipt
from indexer.model.types import Header, Schedule
from tests.fake_node import rlp, trie_root

REAL = Path(__file__).resolve().parents[3] / "shared" / "facts" / "real_rpc"
MAINNET = Schedule(l2_time=1686789347, first_fast_block=53_556_127)
HASHED = [name for name in RawHeader.__struct_fields__ if name not in ("hash", "timestamp_ms")]


class Capture:
    def __init__(self, entry: dict[str, Any]) -> None:
        self.meta, self.block = entry["meta"], entry["block"]
        self.raw = msgspec.convert(self.block, RawHeader)
        self.receipts = msgspec.convert(entry.get("receipts", []), list[RawReceipt])

    @property
    def header(self) -> Header:
        return verify_header(self.raw, None)

    def passed(self) -> set[str]:
        """The product's checks on the block's receipts that had something to look at."""
        seen: dict[str, Outcome] = {}
        logs_of_receipts(self.header, self.receipts, count=seen.__setitem__)
        return {check for check, outcome in seen.items() if outcome is Outcome.PASS}


def _captures() -> list[Any]:
    found = []
    for folder in ("headers", "blocks"):
        for path in sorted((REAL / folder).glob("*.json")):
            content = json.loads(path.read_text())
            for place, entry in enumerate(content if isinstance(content, list) else [content]):
                found.append(pytest.param(Capture(entry), id=f"{path.stem}-{place}"))
    reason = f"NO REAL ANSWERS: {REAL} is absent, so nothing here was checked against a real node"
    return found or [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=reason))]


def _transaction(shown: dict[str, Any]) -> bytes:
    """A transaction as it is hashed, from how a node shows it: legacy, EIP-1559, deposit."""

    def field(name: str) -> Any:
        value = shown[name]
        if name in ("to", "from", "input", "sourceHash"):
            return b"" if value is None else bytes.fromhex(value[2:])
        return value if isinstance(value, list) else int(value, 16)

    def fields(*names: str) -> list[Any]:
        return [field(name) for name in names]

    signature = ("v", "r", "s")
    match shown["type"]:
        case "0x0":
            return rlp(fields("nonce", "gasPrice", "gas", "to", "value", "input", *signature))
        case "0x2":
            fees = ("maxPriorityFeePerGas", "maxFeePerGas", "gas", "to", "value", "input", "accessList")
            return b"\x02" + rlp(fields("chainId", "nonce", *fees, *signature))
        case "0x7e":  # never a system transaction since Regolith
            return b"\x7e" + rlp([*fields("sourceHash", "from", "to", "mint", "value", "gas"), 0, field("input")])
    raise AssertionError(shown["type"])


def _transactions(capture: Capture) -> list[bytes]:
    if "rawTransactions" in capture.block:
        return [bytes.fromhex(raw[2:]) for raw in capture.block["rawTransactions"]]
    return [_transaction(shown) for shown in capture.block["transactions"]]


def _header_hash(capture: Capture) -> None:
    assert "0x" + header_hash(capture.raw).hex() == capture.block["hash"]


def _tx_hashes(capture: Capture) -> None:
    said = [shown["hash"] if isinstance(shown, dict) else shown for shown in capture.block["transactions"]]
    assert ["0x" + keccak(raw).hex() for raw in _transactions(capture)] == said
    assert [receipt.transaction_hash for receipt in capture.receipts] == said


def _transactions_root(capture: Capture) -> None:
    assert "0x" + trie_root(_transactions(capture)).hex() == capture.block["transactionsRoot"]


def _receipts_root(capture: Capture) -> None:
    assert receipts_root(capture.receipts) == capture.header.receipts_root
    assert "receipts_root" in capture.passed()


def _receipt_blooms(capture: Capture) -> None:
    assert "receipts_own_bloom" in capture.passed()


def _logs_bloom(capture: Capture) -> None:
    assert bloom_of(capture.receipts) == capture.header.bloom
    assert "receipts_bloom" in capture.passed()


def _gas(capture: Capture) -> None:
    used = [int(receipt.cumulative_gas_used or "", 16) for receipt in capture.receipts]
    assert used == sorted(set(used)) and used[-1] == int(capture.block["gasUsed"], 16)


def _indices(capture: Capture) -> None:
    assert {"receipts_bound", "receipts_order", "receipts_log_order"} <= capture.passed()


def _deposit_fields(capture: Capture) -> None:
    """From Canyon on nonce and version are hashed; before, neither is, shown or not."""
    deposits = [place for place, receipt in enumerate(capture.receipts) if receipt.type == "0x7e"]
    assert deposits[0] == 0
    for place in deposits:
        receipt = capture.receipts[place]
        for other in ({"deposit_nonce": "0x1"}, {"deposit_nonce": "0x1", "deposit_receipt_version": None}):
            touched = list(capture.receipts)
            touched[place] = msgspec.structs.replace(receipt, **other)
            hashed = receipt.deposit_receipt_version is not None
            assert (receipts_root(touched) != capture.header.receipts_root) == hashed


def _base_clock(capture: Capture) -> None:
    verify_header(capture.raw, MAINNET)
    with pytest.raises(Lie, match="header_schedule"):
        verify_header(capture.raw, Schedule(MAINNET.l2_time + 2, MAINNET.first_fast_block))


CHECKS: dict[str, Callable[[Capture], None]] = {
    "headerHash": _header_hash,
    "txHashes": _tx_hashes,
    "transactionsRoot": _transactions_root,
    "receiptsRoot": _receipts_root,
    "receiptBlooms": _receipt_blooms,
    "logsBloom": _logs_bloom,
    "gas": _gas,
    "indices": _indices,
    "depositFields": _deposit_fields,
    "baseClock": _base_clock,
}


@pytest.mark.parametrize("capture", _captures())
def test_each_check_that_a_capture_names_holds(capture: Capture) -> None:
    assert capture.meta["verifies"]
    for name in capture.meta["verifies"]:
        CHECKS[name](capture)


def touched(text: str) -> list[str]:
    """Versions of a hex string with one byte altered (its lower digit, so that no leading zero comes or goes unseen)."""
    digits = range(len(text) - 1, 1, -2)
    return [text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :] for at in digits]


@pytest.mark.parametrize("capture", _captures())
def test_every_altered_byte_of_a_hashed_field_is_noticed(capture: Capture) -> None:
    altered = 0
    for name in HASHED:
        value = getattr(capture.raw, name)
        for other in touched(value) if value is not None else ():
            with pytest.raises(Lie, match="header_hash"):
                verify_header(msgspec.structs.replace(capture.raw, **{name: other}), None)
            altered += 1
    assert altered >= 256 + 6 * 32 + 20 + 8  # the bloom, the words, the miner, the nonce
    for other in touched(capture.block["hash"]):
        with pytest.raises(Lie, match="header_hash"):
            verify_header(msgspec.structs.replace(capture.raw, hash=other), None)
