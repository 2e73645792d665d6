"""The checks on answers: real headers and receipts pass, and every field that is touched is noticed.

The real answers lie beside the checkout (facts/real_rpc); where they are absent those tests say so and are skipped, the
rest runs on a block built here.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import rlp
from eth_hash.auto import keccak
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.chain.integrity import (
    HEADER_CHECKS,
    LINK_CHECKS,
    LOG_CHECKS,
    RECEIPT_CHECKS,
    Lie,
    Outcome,
    bloom_admits,
    bloom_of,
    header_hash,
    logs_of_receipts,
    verify_header,
    verify_links,
    verify_logs,
)
from indexer.chain.runtime import counting_checks
from indexer.chain.wire import BadLog, Log, RawHeader, RawLog, RawReceipt, parse_log
from indexer.model.types import BlockRef, Hash32, Header, Schedule
from indexer.telemetry import Metrics

REAL = Path(__file__).resolve().parents[3] / "shared" / "facts" / "real_rpc"
MAINNET = Schedule(l2_time=1686789347, first_fast_block=53_556_127)


def _captures(folder: str) -> list[Any]:
    found = []
    for path in sorted((REAL / folder).glob("*.json")):
        content = json.loads(path.read_text())
        for place, entry in enumerate(content if isinstance(content, list) else [content]):
            found.append(pytest.param(entry, id=f"{path.stem}-{place}"))
    reason = f"NO REAL ANSWERS: {REAL} is absent, so nothing here was checked against a real node"
    return found or [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=reason))]


def read_header(block: dict[str, Any]) -> RawHeader:
    return msgspec.json.decode(json.dumps(block), type=RawHeader)


def read_receipts(receipts: list[dict[str, Any]]) -> list[RawReceipt]:
    return msgspec.json.decode(json.dumps(receipts), type=list[RawReceipt])


class Tally(Counter[tuple[str, str]]):
    """Counts here, and as the daemon does."""

    def __init__(self) -> None:
        super().__init__()
        self.count = counting_checks(Metrics())

    def __call__(self, check: str, outcome: Outcome) -> None:
        self[check, outcome.value] += 1
        self.count("a node", check, outcome)


# ------------------------------------------------------------------------------------------------ headers

HASHED = [name for name in RawHeader.__struct_fields__ if name not in ("hash", "timestamp_ms")]


@pytest.mark.parametrize("capture", _captures("headers") + _captures("blocks"))
def test_a_real_header_hashes_to_its_name_and_to_no_other_when_touched(capture: dict[str, Any]) -> None:
    raw = read_header(capture["block"])
    header = verify_header(raw, None)
    assert header.hash.hex() == capture["block"]["hash"][2:]
    for name in HASHED:
        value = getattr(raw, name)
        if value is None:
            continue
        touched = msgspec.structs.replace(raw, **{name: value[:-1] + ("1" if value[-1] != "1" else "2")})
        if name == "extra_data" and value == "0x":
            touched = msgspec.structs.replace(raw, extra_data="0x01")
        with pytest.raises(Lie, match="header_hash"):
            verify_header(touched, None)
        with pytest.raises(Lie, match="header_sealed" if name == "number" else "header_hash"):
            verify_header(msgspec.structs.replace(raw, **{name: None}), None)


@pytest.mark.parametrize("capture", _captures("blocks"))
def test_real_base_blocks_are_on_the_schedule(capture: dict[str, Any]) -> None:
    if capture["meta"]["chainId"] != 8453:
        pytest.skip("another chain's schedule")
    raw = read_header(capture["block"])
    tally = Tally()
    header = verify_header(raw, MAINNET, int(capture["block"]["number"], 16), count=tally)
    assert header.time_ms == 1000 * header.time_s
    assert tally["header_schedule", "pass"] == tally["header_asked", "pass"] == 1
    assert tally["header_millis", "skip"] == 1
    with pytest.raises(Lie, match="header_schedule"):
        verify_header(raw, Schedule(l2_time=MAINNET.l2_time + 2, first_fast_block=MAINNET.first_fast_block))


def test_real_linked_headers_link() -> None:
    path = REAL / "headers" / "op-sepolia-26207960-26207962-linked.json"
    if not path.is_file():
        pytest.skip(f"NO REAL ANSWERS: {path} is absent")
    headers = [verify_header(read_header(entry["block"]), None) for entry in json.loads(path.read_text())]
    verify_links(headers)
    verify_links(headers[1:], headers[0].ref)
    with pytest.raises(Lie, match="header_link"):
        verify_links([headers[0], headers[2]])
    with pytest.raises(Lie, match="header_link"):
        verify_links(headers[1:], BlockRef(headers[0].number, Hash32(bytes(32))))


QUANTITIES = {
    "difficulty", "number", "gasLimit", "gasUsed", "timestamp", "baseFeePerGas", "blobGasUsed", "excessBlobGas",
}  # fmt: skip
ERAS = {
    "frontier": 15,
    "london": 16,  # and Bedrock
    "shanghai": 17,  # and Canyon
    "cancun": 20,  # and Ecotone
    "prague": 21,  # and Isthmus, and an Anvil of today
}
FIELDS = [
    "parentHash", "sha3Uncles", "miner", "stateRoot", "transactionsRoot", "receiptsRoot", "logsBloom", "difficulty",
    "number", "gasLimit", "gasUsed", "timestamp", "extraData", "mixHash", "nonce", "baseFeePerGas", "withdrawalsRoot",
    "blobGasUsed", "excessBlobGas", "parentBeaconBlockRoot", "requestsHash",
]  # fmt: skip
SIZES = {"miner": 20, "logsBloom": 256, "nonce": 8}


@settings(deadline=None)
@given(st.sampled_from(sorted(ERAS)), st.data())
def test_headers_of_every_era_hash_as_the_rlp_library_says(era: str, data: st.DataObject) -> None:
    block, parts = {}, []
    for name in FIELDS[: ERAS[era]]:
        if name in QUANTITIES:
            number = data.draw(st.one_of(st.integers(0, 300), st.integers(0, 2**256 - 1)))
            block[name] = hex(number)
            parts.append(rlp.sedes.big_endian_int.serialize(number))
        else:
            size = SIZES.get(name, 32)
            raw = data.draw(st.binary(max_size=60) if name == "extraData" else st.binary(min_size=size, max_size=size))
            block[name] = "0x" + raw.hex()
            parts.append(raw)
    assert header_hash(read_header(block)) == keccak(rlp.encode(parts))


def sealed(number: int = 7, **changes: Any) -> dict[str, Any]:
    """A header whose hash is right, of today's era."""
    block: dict[str, Any] = {name: "0x" + bytes(SIZES.get(name, 32)).hex() for name in FIELDS}
    block |= {name: "0x1" for name in QUANTITIES} | {"number": hex(number), "extraData": "0x", "timestamp": "0x64"}
    block |= changes
    return block | {"hash": "0x" + header_hash(read_header(block)).hex()}


FAST = Schedule(l2_time=60, first_fast_block=5)  # block 7 is at 70,400 ms


def test_millisecond_times_come_from_the_schedule() -> None:
    block = sealed(timestamp=hex(70), timestampMs=hex(70_400))
    tally = Tally()
    assert verify_header(read_header(block), FAST, 7, count=tally).time_ms == 70_400
    assert {outcome for _, outcome in tally} == {"pass"}
    assert verify_header(read_header(block), None).time_ms == 70_000


@pytest.mark.parametrize(
    ("block", "asked", "check"),
    [
        (sealed() | {"number": None}, None, "header_sealed"),
        (sealed() | {"hash": None}, None, "header_sealed"),
        (sealed() | {"hash": "0x" + "00" * 32}, None, "header_sealed"),
        (sealed() | {"hash": "0x" + "01" * 32}, None, "header_hash"),
        (sealed() | {"hash": "0x01"}, None, "header_sealed"),
        (sealed() | {"gasUsed": "0xzz"}, None, "header_hash"),
        (sealed() | {"logsBloom": "0x00"}, None, "header_hash"),
        (sealed() | {"mixHash": None}, None, "header_hash"),
        (sealed(timestamp=hex(70)), 8, "header_asked"),
        (sealed(timestamp=hex(70)), b"\x01" * 32, "header_asked"),
        (sealed(timestamp=hex(71)), 7, "header_schedule"),
        (sealed(timestamp=hex(70), timestampMs=hex(70_200)), 7, "header_millis"),
    ],
)
def test_a_lying_header_is_named_by_the_check_that_caught_it(
    block: dict[str, Any], asked: int | bytes | None, check: str
) -> None:
    tally = Tally()
    with pytest.raises(Lie) as caught:
        verify_header(read_header(block), FAST, asked, count=tally)
    assert caught.value.check == check
    assert tally[check, "fail"] == 1


def test_a_header_is_found_by_the_hash_it_was_asked_by() -> None:
    block = sealed(timestamp=hex(70))
    assert verify_header(read_header(block), FAST, bytes.fromhex(block["hash"][2:])).number == 7


def test_every_check_has_one_name() -> None:
    names = [check.id for checks in (HEADER_CHECKS, LINK_CHECKS, LOG_CHECKS, RECEIPT_CHECKS) for check in checks]
    assert len(names) == len(set(names))


# ------------------------------------------------------------------------------------------------ receipts and blooms


@pytest.mark.parametrize("capture", _captures("blocks"))
def test_real_receipts_make_the_headers_bloom_and_give_the_blocks_logs(capture: dict[str, Any]) -> None:
    header = verify_header(read_header(capture["block"]), None)
    receipts = read_receipts(capture["receipts"])
    assert bloom_of(receipts) == header.bloom
    tally = Tally()
    logs = logs_of_receipts(header, receipts, count=tally)
    assert len(logs) == sum(len(receipt["logs"]) for receipt in capture["receipts"])
    assert {outcome for _, outcome in tally} == {"pass"}
    for raw in logs:
        log = parse_log(raw, header.time_ms)
        assert bloom_admits(header.bloom, [log.address, *log.topics])
    for receipt in receipts:
        if receipt.logs:
            fewer = [msgspec.structs.replace(one, logs=[]) if one is receipt else one for one in receipts]
            with pytest.raises(Lie):
                logs_of_receipts(header, fewer)


A, B, T1, T2 = b"\xaa" * 20, b"\xbb" * 20, b"\x01" * 32, b"\x02" * 32


def wire_log(index: int, transaction: int, address: bytes = A, topics: tuple[bytes, ...] = (T1,)) -> dict[str, Any]:
    return {
        "address": "0x" + address.hex(),
        "topics": ["0x" + topic.hex() for topic in topics],
        "data": "0x",
        "blockNumber": "0x7",
        "transactionHash": f"0x{transaction + 16:064x}",
        "transactionIndex": hex(transaction),
        "logIndex": hex(index),
        "removed": False,
    }


def block_of(*logs_of_transactions: list[dict[str, Any]]) -> tuple[Header, list[dict[str, Any]]]:
    """A sealed header and the receipts behind its bloom."""
    receipts: list[dict[str, Any]] = [
        {"transactionHash": f"0x{place + 16:064x}", "transactionIndex": hex(place), "blockNumber": "0x7", "logs": logs}
        for place, logs in enumerate(logs_of_transactions)
    ]
    bloom = "0x" + bloom_of(read_receipts(receipts)).hex()
    block = sealed(logsBloom=bloom, timestamp=hex(70))
    for receipt in receipts:
        receipt["blockHash"] = block["hash"]
        receipt["logsBloom"] = "0x" + bloom_of(read_receipts([receipt])).hex()
        for log in receipt["logs"]:
            log["blockHash"] = block["hash"]
    return verify_header(read_header(block), FAST), receipts


def honest() -> tuple[Header, list[dict[str, Any]]]:
    return block_of([], [wire_log(0, 1), wire_log(1, 1, B, (T1, T2))], [wire_log(2, 2, B, ())])


def test_logs_come_out_of_receipts_in_order() -> None:
    header, receipts = honest()
    logs = logs_of_receipts(header, read_receipts(receipts))
    assert [log.log_index for log in logs] == ["0x0", "0x1", "0x2"]


def _other_fork(receipts: list[dict[str, Any]]) -> None:
    receipts[0]["blockHash"] = "0x" + "99" * 32


def _log_of_other_fork(receipts: list[dict[str, Any]]) -> None:
    receipts[1]["logs"][1]["blockHash"] = "0x" + "99" * 32


def _unbound(receipts: list[dict[str, Any]]) -> None:
    receipts[2]["logs"][0]["blockHash"] = None


def _other_height(receipts: list[dict[str, Any]]) -> None:
    receipts[2]["blockNumber"] = "0x8"


def _gone(receipts: list[dict[str, Any]]) -> None:
    del receipts[1]


def _swapped_hash(receipts: list[dict[str, Any]]) -> None:
    receipts[1]["logs"][0]["transactionHash"] = receipts[2]["transactionHash"]


def _swapped_index(receipts: list[dict[str, Any]]) -> None:
    receipts[1]["logs"][0]["transactionIndex"] = "0x2"


def _log_gone(receipts: list[dict[str, Any]]) -> None:
    del receipts[1]["logs"][0]


def _last_log_gone(receipts: list[dict[str, Any]]) -> None:
    receipts[1]["logs"] = receipts[1]["logs"][:1]
    receipts[2]["logs"] = []


def _all_gone(receipts: list[dict[str, Any]]) -> None:
    receipts.clear()


def _underflow(receipts: list[dict[str, Any]]) -> None:
    receipts[1]["logs"][0]["logIndex"] = "0xffffffff"


def _removed(receipts: list[dict[str, Any]]) -> None:
    receipts[1]["logs"][0]["removed"] = True


def _topic(receipts: list[dict[str, Any]]) -> None:
    receipts[1]["logs"][0]["topics"] = ["0x" + "77" * 32]


def _short_topic(receipts: list[dict[str, Any]]) -> None:
    receipts[1]["logs"][0]["topics"] = ["0x77"]


def _own_bloom(receipts: list[dict[str, Any]]) -> None:
    receipts[0]["logsBloom"] = "0x" + "01" * 256


@pytest.mark.parametrize(
    ("harm", "check"),
    [
        (_other_fork, "receipts_bound"),
        (_log_of_other_fork, "receipts_bound"),
        (_unbound, "receipts_bound"),
        (_other_height, "receipts_bound"),
        (_gone, "receipts_order"),
        (_swapped_hash, "receipts_log_order"),
        (_swapped_index, "receipts_log_order"),
        (_log_gone, "receipts_log_order"),
        (_last_log_gone, "receipts_bloom"),
        (_all_gone, "receipts_bloom"),
        (_underflow, "receipts_log_order"),
        (_removed, "receipts_log_order"),
        (_topic, "receipts_bloom"),
        (_short_topic, "receipts_bloom"),
        (_own_bloom, "receipts_own_bloom"),
    ],
)
def test_lying_receipts_are_named_by_the_check_that_caught_them(harm: Any, check: str) -> None:
    header, receipts = honest()
    harm(receipts)
    with pytest.raises(Lie) as caught:
        logs_of_receipts(header, read_receipts(receipts), count=Tally())
    assert caught.value.check == check


def test_a_bloom_excludes_for_certain() -> None:
    header, _ = honest()
    assert bloom_admits(header.bloom, [A, T1])
    assert bloom_admits(header.bloom, [])
    assert not bloom_admits(header.bloom, [A, b"\x55" * 32])
    assert not bloom_admits(bytes(256), [A])


# ------------------------------------------------------------------------------------------------ logs


def logs_of(receipts: list[dict[str, Any]]) -> list[Log]:
    return [parse_log(raw, 70_400) for receipt in read_receipts(receipts) for raw in receipt.logs]


def ask(logs: list[Log], **changes: Any) -> list[Log]:
    question: dict[str, Any] = {"from_block": 5, "to_block": 9, "addresses": {A, B}} | changes
    return verify_logs(logs, **question)


def test_honest_logs_come_back_in_order_each_once() -> None:
    header, receipts = honest()
    logs = logs_of(receipts)
    tally = Tally()
    assert ask([logs[2], logs[0], logs[1], logs[0]], held={7: header}, count=tally) == logs
    assert {outcome for _, outcome in tally} == {"pass"}
    assert ask([], count=tally) == []
    assert tally["logs_bound", "skip"] == tally["logs_bloom", "skip"] == 1
    assert ask(logs, held={7: header.ref}, block_hash=header.hash) == logs
    assert ask(logs[:2], topics=[{T1}]) == logs[:2]
    assert ask(logs[1:2], topics=[None, {T2}]) == logs[1:2]


@pytest.mark.parametrize(
    ("changes", "question", "check"),
    [
        ({"block_number": 10}, {}, "logs_range"),
        ({"block_number": 4}, {}, "logs_range"),
        ({}, {"block_hash": b"\x01" * 32}, "logs_range"),
        ({"address": b"\xcc" * 20}, {}, "logs_filter"),
        ({}, {"topics": [{T2}]}, "logs_filter"),
        ({}, {"topics": [None, None, {T1}]}, "logs_filter"),
        ({"block_hash": b"\x09" * 32}, {"held": {7: BlockRef(7, Hash32(b"\x0a" * 32))}}, "logs_bound"),
        ({"block_hash": b"\x09" * 32}, {}, "logs_one_hash"),
        ({"log_index": 1}, {}, "logs_place"),
        ({"data": b"x", "log_index": 1}, {}, "logs_place"),
        ({"tx_hash": b"\x09" * 32}, {}, "logs_index"),
        ({"tx_index": 9}, {}, "logs_index"),
        ({"tx_index": 2, "tx_hash": b"\x09" * 32, "log_index": 0}, {}, "logs_index"),
        ({"tx_index": 3, "tx_hash": b"\x09" * 32}, {}, "logs_index"),
    ],
)
def test_a_lying_log_is_named_by_the_check_that_caught_it(
    changes: dict[str, Any], question: dict[str, Any], check: str
) -> None:
    _, receipts = honest()
    logs = logs_of(receipts)
    logs[0] = msgspec.structs.replace(logs[0], **changes)
    with pytest.raises(Lie) as caught:
        ask(logs, **question, count=Tally())
    assert caught.value.check == check


def test_a_log_that_the_bloom_has_no_room_for_is_a_lie() -> None:
    header, receipts = honest()
    logs = logs_of(receipts)
    logs[0] = msgspec.structs.replace(logs[0], topics=(b"\x55" * 32,))
    assert ask(logs, held={7: header.ref})
    with pytest.raises(Lie, match="logs_bloom"):
        ask(logs, held={7: header})


def test_real_logs_pass() -> None:
    paths = sorted((REAL / "logs").glob("*.json"))
    if not paths:
        pytest.skip(f"NO REAL ANSWERS: {REAL} is absent")
    for path in paths:
        content = json.loads(path.read_text())["logs"]
        raws = msgspec.json.decode(json.dumps(content), type=list[RawLog])
        # the last of one capture was cut in the middle of a byte, somewhere between the node and the sheet
        logs = [parse_log(raw, 0) for raw in raws if len(raw.data) % 2 == 0]
        for raw in raws:
            if len(raw.data) % 2:
                with pytest.raises(BadLog, match="Odd-length"):
                    parse_log(raw, 0)
        block = logs[0].block_number
        assert ask(logs, from_block=block, to_block=block, addresses={log.address for log in logs}) == logs
