"""The generated decoders against eth_abi, and what becomes of a log's hex on its way to a row."""

from __future__ import annotations

import json
import time
from typing import Any

import eth_abi.codec
import eth_abi.decoding
import eth_abi.registry
import msgspec
import pytest
from eth_abi.abi import decode as abi_decode
from eth_abi.abi import encode
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from indexer.chain.codegen import DOCUMENTED, INFERRED, Event, Undecodable, abi_directory, compile_event
from indexer.chain.decode import COLUMNS, MAX_DATA, MAX_TEXT, Decoded, Decoder, Speakers
from indexer.chain.wire import BadLog, Log, RawLog, parse_log
from indexer.store import tables

UINT256_MAX = 2**256 - 1
ABIS: list[dict[str, Any]] = [
    entry for name in (DOCUMENTED, INFERRED) for entry in json.loads((abi_directory() / name).read_text())
]
EVENTS = {abi["name"]: compile_event(abi) for abi in ABIS}

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


# ------------------------------------------------------------------------------------------------ the oracle: eth_abi


def _oracle_codec() -> eth_abi.codec.ABICodec:
    registry = eth_abi.registry.registry.copy()
    registry.unregister_decoder("string")
    registry.register_decoder("string", eth_abi.decoding.StringDecoder("replace"), label="string")
    return eth_abi.codec.ABICodec(registry)


ORACLE = _oracle_codec()
REFUSED = "refused"


def _plain(kind: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_plain(kind.rpartition("[")[0], item) for item in value)
    return bytes.fromhex(value[2:]) if kind == "address" else value


def oracle(abi: dict[str, Any], topics: tuple[bytes, ...], data: bytes) -> Any:
    """What eth_abi makes of it: a tuple in the ABI's order, or REFUSED."""
    indexed = [item for item in abi["inputs"] if item["indexed"]]
    body = [item for item in abi["inputs"] if not item["indexed"]]
    if len(topics) != len(indexed) + 1:
        return REFUSED
    try:
        heads = iter([ORACLE.decode([item["type"]], topic)[0] for item, topic in zip(indexed, topics[1:], strict=True)])
        tails = iter(ORACLE.decode([item["type"] for item in body], data))
    except Exception:
        return REFUSED
    return tuple(_plain(item["type"], next(heads if item["indexed"] else tails)) for item in abi["inputs"])


def ours(event: Event, topics: tuple[bytes, ...], data: bytes) -> Any:
    try:
        return event.decode(topics, data)
    except Undecodable:
        return REFUSED


# ------------------------------------------------------------------------------------------------ payloads


def values_of(kind: str) -> st.SearchStrategy[Any]:
    if kind.endswith("[]"):
        return st.lists(values_of(kind[:-2]), max_size=5)
    if kind.startswith("uint"):
        return st.one_of(st.integers(0, 2 ** int(kind[4:]) - 1), st.just(2 ** int(kind[4:]) - 1))
    if kind.startswith("int"):
        return st.integers(-(2 ** (int(kind[3:]) - 1)), 2 ** (int(kind[3:]) - 1) - 1)
    if kind == "address":
        return st.binary(min_size=20, max_size=20).map(lambda raw: "0x" + raw.hex())
    if kind == "bool":
        return st.booleans()
    if kind == "bytes":
        return st.binary(max_size=100)
    if kind == "string":
        return st.text(max_size=60)
    return st.binary(min_size=int(kind[5:]), max_size=int(kind[5:]))


@st.composite
def payloads(draw: st.DrawFn, abi: dict[str, Any]) -> tuple[tuple[bytes, ...], bytes]:
    """An honest encoding, or one that was cut, stretched, overwritten by a telling word, or is plain noise."""
    indexed = [item["type"] for item in abi["inputs"] if item["indexed"]]
    body = [item["type"] for item in abi["inputs"] if not item["indexed"]]
    topics = [bytes(32), *(encode([kind], [draw(values_of(kind))]) for kind in indexed)]
    data = bytearray(encode(body, [draw(values_of(kind)) for kind in body]))
    for _ in range(draw(st.integers(0, 3))):
        harm = draw(st.sampled_from(["cut", "stretch", "word", "byte", "topic", "topics", "noise"]))
        if harm == "cut":
            del data[draw(st.integers(0, len(data))) :]
        elif harm == "stretch":
            data += draw(st.binary(max_size=70))
        elif harm == "word" and len(data) >= 32:
            at = 32 * draw(st.integers(0, len(data) // 32 - 1))
            near = st.integers(0, len(data) + 64)
            telling = st.sampled_from([0, 1, 31, 32, len(data), len(data) - 32, 2**63, 2**64, 2**255, UINT256_MAX])
            data[at : at + 32] = (max(0, draw(st.one_of(near, telling)))).to_bytes(32, "big")
        elif harm == "byte" and data:
            data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
        elif harm == "topic" and len(topics) > 1:
            topics[draw(st.integers(1, len(topics) - 1))] = draw(st.binary(min_size=32, max_size=32))
        elif harm == "topics":
            topics = draw(st.sampled_from([topics[:-1] or topics, [*topics, bytes(32)]]))
        elif harm == "noise":
            data = bytearray(draw(st.binary(max_size=400)))
    return tuple(topics), bytes(data)


@pytest.mark.parametrize("abi", ABIS, ids=[abi["name"] for abi in ABIS])
def test_generated_decoder_agrees_with_eth_abi_on_any_payload(abi: dict[str, Any]) -> None:
    event = EVENTS[abi["name"]]

    @patient
    @given(payloads(abi))
    def agrees(payload: tuple[tuple[bytes, ...], bytes]) -> None:
        assert ours(event, *payload) == oracle(abi, *payload)

    agrees()


POOL = ["address", "bool", "uint8", "uint96", "uint256", "int8", "int40", "int256", "bytes1", "bytes20", "bytes32"]
DYNAMIC = ["bytes", "string", "uint256[]", "address[]", "bool[]", "int16[]", "bytes4[]", "string[]", "uint8[][]"]


@patient
@given(st.data(), st.lists(st.sampled_from(POOL + DYNAMIC), max_size=6), st.lists(st.sampled_from(POOL), max_size=3))
def test_an_event_nobody_has_written_yet_decodes_as_eth_abi_does(
    data: st.DataObject, body: list[str], indexed: list[str]
) -> None:
    kinds = data.draw(st.permutations([(kind, False) for kind in body] + [(kind, True) for kind in indexed]))
    inputs = [{"name": f"a{place}", "type": kind, "indexed": marked} for place, (kind, marked) in enumerate(kinds)]
    abi = {"type": "event", "name": "Later", "inputs": inputs}
    payload = data.draw(payloads(abi))
    assert ours(compile_event(abi), *payload) == oracle(abi, *payload)


def test_tuples_and_fixed_arrays_are_left_to_eth_abi_with_addresses_as_bytes() -> None:
    parts = [{"name": "who", "type": "address"}, {"name": "what", "type": "string"}]
    abi = {
        "type": "event",
        "name": "Odd",
        "inputs": [
            {"name": "pairs", "type": "tuple[]", "components": parts, "indexed": False},
            {"name": "three", "type": "uint8[3]", "indexed": False},
            {"name": "note", "type": "string", "indexed": True},
        ],
    }
    event = compile_event(abi)
    assert event.signature == "Odd((address,string)[],uint8[3],string)"
    data = encode(["(address,string)[]", "uint8[3]"], [[("0x" + "11" * 20, "x")], [1, 2, 3]])
    assert event.decode((event.topic0, b"h" * 32), data) == (((b"\x11" * 20, "x"),), (1, 2, 3), b"h" * 32)
    with pytest.raises(Undecodable):
        event.decode((event.topic0, b"h" * 32), data[:-32])


def test_topic0_is_the_published_one() -> None:
    assert EVENTS["OwnershipTransferred"].topic0.hex().startswith("8be0079c531659141344cd1fd0a4f284")
    assert EVENTS["PointsRedeemed"].topic0.hex() == "8aea331c8367c1e6080530407543c828543c27d5df0f9d32039c95fd27483841"
    assert EVENTS["TransferSingle"].topic0.hex() == "c3d58168c5ae7397731d063d5bbf3d657854427343f4c083240f7aacaa2d0f62"


def test_decoding_a_redemption_is_at_least_eight_times_as_fast_as_eth_abi() -> None:
    event = EVENTS["PointsRedeemed"]
    body = ["address", "address", "uint256", "uint256", "bytes32", "bytes32", "bytes"]
    data = encode(body, ["0x" + "11" * 20, "0x" + "22" * 20, 0, 10**20, b"n" * 32, b"o" * 32, b"order-8841"])
    topics = (event.topic0, bytes(12) + b"f" * 20, bytes(12) + b"i" * 20, b"l" * 32)

    def cost(run: Any, rounds: int) -> float:
        best = float("inf")
        for _ in range(5):
            begun = time.process_time()
            for _ in range(rounds):
                run()
            best = min(best, (time.process_time() - begun) / rounds)
        return best

    theirs = cost(lambda: abi_decode(body, data), 200)  # without the three topics
    assert cost(lambda: event.decode(topics, data), 2000) * 8 <= theirs


# ------------------------------------------------------------------------------------------------ from hex to Log


def raw_log(**changes: Any) -> RawLog:
    plain: dict[str, Any] = {
        "address": "0x" + "aa" * 20,
        "topics": ["0x" + "01" * 32, "0x" + "02" * 32],
        "data": "0x" + "03" * 64,
        "blockNumber": "0x64",
        "blockHash": "0x" + "04" * 32,
        "transactionHash": "0x" + "05" * 32,
        "transactionIndex": "0x7",
        "logIndex": "0x59c",
        "blockTimestamp": "0x6a7a2781",
        "blockTimestampMs": "0x199b2c7a3e8",
        "removed": False,
    }
    return msgspec.json.decode(json.dumps(plain | changes), type=RawLog)


def test_a_log_is_read_whole() -> None:
    assert parse_log(raw_log(), 1_000) == Log(
        b"\xaa" * 20, (b"\x01" * 32, b"\x02" * 32), b"\x03" * 64, 100, b"\x04" * 32, 1_000, b"\x05" * 32, 7, 1436
    )
    assert parse_log(raw_log(address="0x" + "AA" * 20, topics=[], data="0x"), 0).data == b""


@pytest.mark.parametrize(
    "changes",
    [
        {"removed": True},
        {"logIndex": "0xffffffff"},  # an underflow seen in the wild
        {"logIndex": "0x80000000"},
        {"transactionIndex": "0xffffffff"},
        {"blockNumber": "0x8000000000000000"},
        {"logIndex": "0x"},
        {"logIndex": "-0x1"},
        {"logIndex": "0x1_0"},
        {"logIndex": "12"},
        {"logIndex": "0x٣"},
        {"blockNumber": None},
        {"blockHash": None},
        {"transactionHash": None},
        {"transactionIndex": None},
        {"logIndex": None},
        {"data": "0x123"},
        {"data": "0x12 3"},
        {"data": "0xzz"},
        {"data": "1234"},
        {"data": "0xé1"},
        {"address": "0x" + "aa" * 19},
        {"address": "0x" + "aa" * 21},
        {"address": "aa" * 21},
        {"topics": ["0x" + "01" * 31]},
        {"topics": ["0x" + "01" * 31 + " 1"]},
        {"topics": ["01" * 33]},
        {"topics": ["0x" + "01" * 32] * 5},
        {"transactionHash": "0x" + "05" * 31},
        {"transactionHash": "05" * 33},
        {"blockHash": "0x" + "0g" * 32},
    ],
    ids=str,
)
def test_a_log_that_no_honest_node_sends_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadLog):
        parse_log(raw_log(**changes), 1_000)


# ------------------------------------------------------------------------------------------------ from Log to row

FACTORY, ISSUER, TOKEN, HOLDER, OTHER = (bytes([n]) * 20 for n in (0xFA, 0x15, 0x70, 0x40, 0x0E))
LOYALTY_ID, NONCE, HASH = (bytes([n]) * 32 for n in (0x1D, 0x0C, 0x0A))
DECODER = Decoder.from_abi()
WHERE = (8453, 100, 3, b"\x0b" * 32, 1_700_000_000_200, b"\x07" * 32, 2)


def log_of(name: str, emitter: bytes, *values: Any) -> Log:
    """An honest log of the event, by an emitter."""
    abi = next(abi for abi in ABIS if abi["name"] == name)
    given = [
        (item, "0x" + value.hex() if item["type"] == "address" else value)
        for item, value in zip(abi["inputs"], values, strict=True)
    ]
    topics = [encode([item["type"]], [value]) for item, value in given if item["indexed"]]
    body = [(item["type"], value) for item, value in given if not item["indexed"]]
    data = encode([kind for kind, _ in body], [value for _, value in body])
    _, number, index, block_hash, time_ms, tx_hash, tx_index = WHERE
    return Log(emitter, (EVENTS[name].topic0, *topics), data, number, block_hash, time_ms, tx_hash, tx_index, index)


def decode(*logs: Log) -> Decoded:
    return DECODER.decode(logs, Speakers(8453, [FACTORY], tokens={TOKEN: (FACTORY, ISSUER, LOYALTY_ID)}))


def redeemed(amount: int = 250, operation_hash: bytes = HASH, data: bytes = b"order") -> Log:
    terms = (FACTORY, ISSUER, LOYALTY_ID, TOKEN, HOLDER, 0, amount, NONCE, operation_hash, data)
    return log_of("PointsRedeemed", FACTORY, *terms)


@pytest.mark.parametrize("name", COLUMNS)
def test_rows_have_the_columns_of_the_tables(name: str) -> None:
    columns = tuple(column.name for column in tables.metadata.tables[f"indexer.{name}"].columns)
    assert COLUMNS[name] == columns


def test_a_redemption_becomes_a_movement() -> None:
    row = dict(zip(COLUMNS["movement"], decode(redeemed()).movements[0], strict=True))
    assert row == {
        **dict(zip(COLUMNS["movement"], (*WHERE, FACTORY, True), strict=False)),
        "kind": "loyfin.redemption",
        "factory": FACTORY,
        "issuer": ISSUER,
        "loyalty_id": LOYALTY_ID,
        "loyalty": TOKEN,
        "holder": HOLDER,
        "bucket": 0,
        "amount": 250,
        "nonce": NONCE,
        "operation_hash": HASH,
        "data": b"order",
    }


def test_the_largest_integers_survive() -> None:
    terms = (FACTORY, ISSUER, LOYALTY_ID, TOKEN, HOLDER, UINT256_MAX, UINT256_MAX, b"\xff" * 32, HASH, b"")
    row = decode(log_of("PointsIssued", FACTORY, *terms)).movements[0]
    assert row[9] == "loyfin.issuance"
    assert row[15:18] == (UINT256_MAX, UINT256_MAX, b"\xff" * 32)
    event = decode(log_of("AdminEpochUpdated", TOKEN, UINT256_MAX)).programme_events[0]
    assert json.loads(event[-1]) == {"adminEpoch": str(UINT256_MAX)}


def test_the_zero_operation_hash_is_none() -> None:
    assert decode(redeemed(operation_hash=bytes(32))).movements[0][-2] is None


def test_long_data_is_cut_and_the_whole_log_kept_raw() -> None:
    log = redeemed(data=b"x" * (MAX_DATA + 1))
    out = decode(log)
    assert out.movements[0][-1] == b"x" * MAX_DATA
    assert out.raw_logs == [(*WHERE, FACTORY, True, list(log.topics), log.data, "oversized", None)]
    assert decode(redeemed(data=b"x" * MAX_DATA)).raw_logs == []


def test_texts_of_a_programme_are_what_postgres_can_hold() -> None:
    words = ("n\0me", "s", "m" * 5000, "", "ü", "t")
    log = log_of("LoyaltyProgramCreated", FACTORY, FACTORY, ISSUER, LOYALTY_ID, TOKEN, *words)
    log.data = log.data.replace("ü".encode(), b"\xff\xfe")
    out = decode(log)
    row = dict(zip(COLUMNS["programme"], out.programmes[0], strict=True))
    assert row["name"] == "n�me"
    assert row["media"] == "m" * MAX_TEXT
    assert row["description"] == ""
    assert row["contract_uri"] == "��"
    assert [raw[-2] for raw in out.raw_logs] == ["oversized"]
    assert out.raw_logs[0][10] == log.data


def test_a_batch_is_a_row_an_item() -> None:
    out = decode(log_of("LoyaltyBatchTransfer", TOKEN, TOKEN, OTHER, HOLDER, ISSUER, [0, 99], [UINT256_MAX, 1]))
    assert [row[9:] for row in out.transfers] == [
        (0, "loyfin", TOKEN, OTHER, HOLDER, ISSUER, 0, UINT256_MAX),
        (1, "loyfin", TOKEN, OTHER, HOLDER, ISSUER, 99, 1),
    ]
    out = decode(log_of("TransferBatch", TOKEN, OTHER, HOLDER, ISSUER, [7], [1]))
    assert [row[9:] for row in out.transfers] == [(0, "erc1155", TOKEN, OTHER, HOLDER, ISSUER, 7, 1)]


def test_an_empty_batch_is_fine_and_unequal_arrays_are_kept_raw() -> None:
    out = decode(log_of("TransferBatch", TOKEN, OTHER, HOLDER, ISSUER, [], []))
    assert (out.transfers, out.raw_logs) == ([], [])
    for name, lead in (("TransferBatch", ()), ("LoyaltyBatchTransfer", (TOKEN,))):
        out = decode(log_of(name, TOKEN, *lead, OTHER, HOLDER, ISSUER, [1, 2], [3]))
        assert out.transfers == []
        assert out.raw_logs[0][-2:] == ("undecodable", "2 token ids and 1 amounts")


def test_single_transfers_of_both_sources() -> None:
    out = decode(
        log_of("LoyaltyTransfer", TOKEN, TOKEN, OTHER, HOLDER, ISSUER, 5, 6),
        log_of("TransferSingle", TOKEN, OTHER, bytes(20), HOLDER, 5, 6),
    )
    assert [row[9:] for row in out.transfers] == [
        (0, "loyfin", TOKEN, OTHER, HOLDER, ISSUER, 5, 6),
        (0, "erc1155", TOKEN, OTHER, bytes(20), HOLDER, 5, 6),
    ]


def test_other_events_are_kept_by_name_with_their_arguments() -> None:
    out = decode(
        log_of("LoyaltyAdminOperation", TOKEN, TOKEN, ISSUER, b"\x0a" * 32, NONCE),
        log_of("LoyaltyMetadataUpdated", TOKEN, TOKEN, 7, "u\0ri", ""),
        log_of("RoyaltyBpsUpdated", TOKEN, 2**96 - 1),
        log_of("ApprovalForAll", TOKEN, HOLDER, OTHER, True),
        log_of("URI", TOKEN, "https://x", 9),
        log_of("ContractURIUpdated", TOKEN),
    )
    assert [(row[9], row[10], json.loads(row[11])) for row in out.programme_events] == [
        (
            TOKEN,
            "LoyaltyAdminOperation",
            {
                "loyalty": "0x" + TOKEN.hex(),
                "owner": "0x" + ISSUER.hex(),
                "action": "0x" + "0a" * 32,
                "nonce": "0x" + NONCE.hex(),
            },
        ),
        (
            TOKEN,
            "LoyaltyMetadataUpdated",
            {"loyalty": "0x" + TOKEN.hex(), "tokenId": "7", "tokenURI": "u�ri", "contractURI": ""},
        ),
        (TOKEN, "RoyaltyBpsUpdated", {"royaltyBps": str(2**96 - 1)}),
        (
            TOKEN,
            "ApprovalForAll",
            {"account": "0x" + HOLDER.hex(), "operator": "0x" + OTHER.hex(), "approved": True},
        ),
        (TOKEN, "URI", {"value": "https://x", "id": "9"}),
        (TOKEN, "ContractURIUpdated", {}),
    ]
    assert out.raw_logs == []


@pytest.mark.parametrize("name", ["IssuableUpdated", "RedeemableUpdated", "TransferableUpdated"])
@pytest.mark.parametrize("flag", [False, True])
def test_a_flag_is_read_indexed_or_not(name: str, flag: bool) -> None:
    plain = log_of(name, TOKEN, flag)
    indexed = log_of(name, TOKEN, flag)
    indexed.topics, indexed.data = (plain.topics[0], plain.data), b""
    for row in decode(plain, indexed).programme_events:
        assert list(json.loads(row[-1]).values()) == [flag]


def test_inferred_events_are_optional() -> None:
    documented = Decoder.from_abi(inferred=False)
    assert len(documented.topics) == 14
    assert len(DECODER.topics) == 25
    out = documented.decode(
        [log_of("TransferSingle", TOKEN, OTHER, HOLDER, ISSUER, 1, 1)],
        Speakers(8453, [FACTORY], tokens={TOKEN: (FACTORY, ISSUER, LOYALTY_ID)}),
    )
    assert out.transfers == []
    assert [row[-2] for row in out.raw_logs] == ["unknown_topic"]


def test_an_event_that_became_known_needs_a_file_only(tmp_path: Any) -> None:
    for name in (DOCUMENTED, INFERRED):
        (tmp_path / name).write_text((abi_directory() / name).read_text())
    entry = {
        "type": "event",
        "name": "Paused",
        "inputs": [{"name": "account", "type": "address", "indexed": False}],
    }
    (tmp_path / "factory.json").write_text(json.dumps([entry, {"type": "function", "name": "pause", "inputs": []}]))
    decoder = Decoder.from_abi(tmp_path)
    log = log_of("AdminEpochUpdated", FACTORY, 0)
    log.topics, log.data = (compile_event(entry).topic0,), bytes(12) + OTHER
    row = decoder.decode([log], Speakers(1, [FACTORY])).programme_events[0]
    assert row[-2:] == ("Paused", json.dumps({"account": "0x" + OTHER.hex()}, separators=(",", ":")))
    (tmp_path / "factory.json").write_text("{}")
    with pytest.raises(ValueError, match=r"factory\.json"):
        Decoder.from_abi(tmp_path)


def test_what_cannot_be_read_is_kept_with_the_reason() -> None:
    unknown = redeemed()
    unknown.topics = (b"\x99" * 32,)
    anonymous = redeemed()
    anonymous.topics = ()
    short = redeemed()
    short.data = short.data[:-32]
    few = redeemed()
    few.topics = few.topics[:2]
    out = decode(unknown, anonymous, short, few)
    assert [(row[-4], row[-3], *row[-2:]) for row in out.raw_logs] == [
        ([b"\x99" * 32], unknown.data, "unknown_topic", None),
        ([], anonymous.data, "unknown_topic", None),
        (list(short.topics), short.data, "undecodable", "data: longer than the payload"),
        (list(few.topics), few.data, "undecodable", "PointsRedeemed with 2 topics"),
    ]
    assert out.movements == []


@patient
@given(st.sampled_from(ABIS), st.data())
def test_any_payload_of_a_known_emitter_leaves_a_trace(abi: dict[str, Any], data: st.DataObject) -> None:
    """Promise 3 for one log: it becomes rows, or a raw row, or a counted look-alike. And rows hold what COPY takes."""
    topics, payload = data.draw(payloads(abi))
    topics = (EVENTS[abi["name"]].topic0, *topics[1:])
    log = redeemed()
    log.address, log.topics, log.data = data.draw(st.sampled_from([FACTORY, TOKEN])), topics, payload
    out = decode(log)
    rows = [*out.programmes, *out.movements, *out.transfers, *out.programme_events, *out.raw_logs]
    batch = abi["name"] in ("LoyaltyBatchTransfer", "TransferBatch")
    assume(rows or not batch)  # an empty batch moves nothing
    assert rows or out.lookalikes.total() == 1
    for row in rows:
        for cell in row:
            assert not (isinstance(cell, str) and "\0" in cell)
            if isinstance(cell, str):
                cell.encode()
    for row in out.programme_events:
        assert "\\u0000" not in row[-1]
        json.loads(row[-1])
