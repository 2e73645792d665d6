"""Who may speak: the table of loyfin.md 5.1, tried from every side that an impostor could come from."""

from __future__ import annotations

import json
from typing import Any

import pytest
from eth_abi.abi import encode

from indexer.chain.codegen import DOCUMENTED, INFERRED, abi_directory, compile_event
from indexer.chain.decode import Decoded, Decoder, Speakers, Token
from indexer.chain.wire import Log

ABIS = {abi["name"]: abi for name in (DOCUMENTED, INFERRED) for abi in json.loads((abi_directory() / name).read_text())}
DECODER = Decoder.from_abi()

FACTORY, RIVAL, HUB, FOREIGN = (bytes([n]) * 20 for n in (0xF1, 0xF2, 0x4B, 0xFF))  # FOREIGN is not configured
ISSUER, OTHER_ISSUER, HOLDER = (bytes([n]) * 20 for n in (0x11, 0x12, 0x40))
TOKEN, OTHER_TOKEN, STRANGER = (bytes([n]) * 20 for n in (0x71, 0x72, 0x66))
ID, OTHER_ID = b"\x01" * 32, b"\x02" * 32
TEXTS = ("n", "s", "m", "d", "c", "t")


def log_of(name: str, emitter: bytes, *values: Any, block: int = 100, index: int = 0) -> Log:
    abi = ABIS[name]
    given = [
        (item, "0x" + value.hex() if item["type"] == "address" else value)
        for item, value in zip(abi["inputs"], values, strict=True)
    ]
    topics = [encode([item["type"]], [value]) for item, value in given if item["indexed"]]
    body = [(item["type"], value) for item, value in given if not item["indexed"]]
    data = encode([kind for kind, _ in body], [value for _, value in body])
    number = block.to_bytes(32, "big")
    return Log(emitter, (compile_event(abi).topic0, *topics), data, block, number, 1000 * block, number, 0, index)


def created(
    emitter: bytes,
    factory: bytes = FACTORY,
    token: bytes = TOKEN,
    issuer: bytes = ISSUER,
    block: int = 100,
    index: int = 0,
) -> Log:
    return log_of("LoyaltyProgramCreated", emitter, factory, issuer, ID, token, *TEXTS, block=block, index=index)


def issued(
    emitter: bytes,
    factory: bytes = FACTORY,
    issuer: bytes = ISSUER,
    loyalty_id: bytes = ID,
    token: bytes = TOKEN,
    block: int = 100,
    index: int = 0,
    kind: str = "PointsIssued",
) -> Log:
    terms = (factory, issuer, loyalty_id, token, HOLDER, 0, 5, bytes(31) + b"\1", bytes(32), b"")
    return log_of(kind, emitter, *terms, block=block, index=index)


def moved(emitter: bytes, token: bytes = TOKEN, block: int = 100, index: int = 0) -> Log:
    return log_of("LoyaltyTransfer", emitter, token, HOLDER, HOLDER, ISSUER, 0, 5, block=block, index=index)


def speakers() -> Speakers:
    known = {TOKEN: (FACTORY, ISSUER, ID), OTHER_TOKEN: (RIVAL, OTHER_ISSUER, OTHER_ID)}
    return Speakers(8453, [FACTORY, RIVAL], {HUB: [FACTORY]}, known)


def decode(*logs: Log, to: Speakers | None = None) -> Decoded:
    return DECODER.decode(logs, to or speakers())


def nothing(out: Decoded) -> bool:
    return not (out.programmes or out.movements or out.transfers or out.programme_events or out.raw_logs or out.tokens)


@pytest.mark.parametrize("kind", ["PointsIssued", "PointsRedeemed"])
@pytest.mark.parametrize("emitter", [FACTORY, HUB, TOKEN], ids=["factory", "hub", "token"])
def test_factory_hub_and_the_programmes_own_token_may_tell_of_its_movements(emitter: bytes, kind: str) -> None:
    out = decode(issued(emitter, kind=kind))
    assert len(out.movements) == 1
    assert not out.lookalikes


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (issued(STRANGER), "unknown_emitter"),
        (issued(FOREIGN, factory=FOREIGN), "unknown_emitter"),
        (issued(FACTORY, factory=FOREIGN), "foreign_factory"),
        (issued(FACTORY, factory=RIVAL), "foreign_factory"),
        (issued(HUB, factory=RIVAL), "foreign_factory"),  # the rival does not name this hub
        (issued(HUB, factory=FOREIGN), "foreign_factory"),
        (issued(TOKEN, factory=RIVAL), "foreign_programme"),
        (issued(TOKEN, issuer=OTHER_ISSUER), "foreign_programme"),
        (issued(TOKEN, loyalty_id=OTHER_ID), "foreign_programme"),
        (issued(TOKEN, token=OTHER_TOKEN), "foreign_programme"),
        (issued(OTHER_TOKEN), "foreign_programme"),
        (created(STRANGER), "unknown_emitter"),
        (created(FACTORY, factory=RIVAL), "foreign_factory"),
        (created(TOKEN, token=STRANGER), "foreign_programme"),
        (created(OTHER_TOKEN), "foreign_programme"),
        (moved(STRANGER), "unknown_emitter"),
        (moved(STRANGER, token=STRANGER), "unknown_emitter"),
        (moved(OTHER_TOKEN), "foreign_token"),
        (moved(RIVAL), "foreign_factory"),
        (moved(HUB, token=OTHER_TOKEN), "foreign_factory"),
        (log_of("LoyaltyMetadataUpdated", OTHER_TOKEN, TOKEN, 0, "u", "u"), "foreign_token"),
        (log_of("LoyaltyAdminOperation", STRANGER, TOKEN, ISSUER, ID, ID), "unknown_emitter"),
        (log_of("LoyaltyBatchTransfer", RIVAL, TOKEN, HOLDER, HOLDER, ISSUER, [0], [5]), "foreign_factory"),
    ],
)
def test_a_lookalike_is_counted_and_dropped(log: Log, reason: str) -> None:
    out = decode(log)
    assert out.lookalikes == {reason: 1}
    assert nothing(out)


@pytest.mark.parametrize("emitter", [FACTORY, HUB, TOKEN], ids=["factory", "hub", "token"])
def test_shared_events_of_a_token_come_from_it_or_its_factorys_contracts(emitter: bytes) -> None:
    out = decode(moved(emitter), log_of("LoyaltyMetadataUpdated", emitter, TOKEN, 0, "u", "u"))
    assert [row[11] for row in out.transfers] == [TOKEN]
    assert [row[9] for row in out.programme_events] == [TOKEN]
    assert not out.lookalikes


def test_a_hub_may_be_ahead_of_the_history_that_names_the_token() -> None:
    # history is filled behind the head: a transfer dropped here would be covered, and never asked for again
    out = decode(moved(HUB), to=Speakers(8453, [FACTORY], {HUB: [FACTORY]}))
    assert [row[11] for row in out.transfers] == [TOKEN]


def test_events_of_a_contracts_own_state_speak_for_their_emitter() -> None:
    renounced = [
        log_of("OwnershipTransferred", emitter, ISSUER, bytes(20)) for emitter in (TOKEN, FACTORY, HUB, STRANGER)
    ]
    out = decode(*renounced)
    assert [row[9] for row in out.programme_events] == [TOKEN, FACTORY, HUB]
    assert not out.lookalikes  # half the chain emits OwnershipTransferred: a stranger's is not even a look-alike


def test_erc1155_moves_points_only_where_a_token_says_it() -> None:
    single = [log_of("TransferSingle", emitter, HOLDER, HOLDER, ISSUER, 0, 5) for emitter in (TOKEN, FACTORY, STRANGER)]
    out = decode(*single)
    assert [row[11] for row in out.transfers] == [TOKEN]
    assert [(row[9], row[10], json.loads(row[11])["value"]) for row in out.programme_events] == [
        (FACTORY, "TransferSingle", "5")
    ]


def test_a_factory_that_is_its_own_hub_and_a_hub_of_two() -> None:
    both = Speakers(8453, [FACTORY, RIVAL], {HUB: [FACTORY, RIVAL], RIVAL: [FACTORY], FOREIGN: [STRANGER]})
    assert len(decode(issued(HUB), issued(HUB, factory=RIVAL), to=both).movements) == 2
    assert len(decode(issued(RIVAL), issued(RIVAL, factory=RIVAL), to=both).movements) == 2
    assert decode(issued(FOREIGN, factory=STRANGER), to=both).lookalikes == {"foreign_factory": 1}


# ------------------------------------------------------------------------------------------------ discovery


def fresh() -> Speakers:
    return Speakers(8453, [FACTORY, RIVAL], {HUB: [FACTORY]})


@pytest.mark.parametrize("emitter", [FACTORY, HUB], ids=["factory", "hub"])
def test_a_token_may_log_before_its_announcement_in_the_same_block(emitter: bytes) -> None:
    at = fresh()
    out = decode(issued(TOKEN, index=0), moved(TOKEN, index=1), created(emitter, index=2), to=at)
    assert (len(out.movements), len(out.transfers), len(out.programmes)) == (1, 1, 1)
    assert out.tokens == [Token(TOKEN, FACTORY, ISSUER, ID, 100)]
    assert not out.lookalikes


def test_a_later_block_knows_the_token_and_an_earlier_one_does_not() -> None:
    out = decode(
        issued(TOKEN, block=101),
        created(FACTORY, block=100),
        issued(TOKEN, block=99),
        issued(TOKEN, block=100),
        to=fresh(),
    )
    assert [row[1] for row in out.movements] == [101, 100]
    assert out.lookalikes == {"unknown_emitter": 1}


def test_decoding_changes_no_speakers_and_the_caller_teaches_them() -> None:
    at = fresh()
    first = decode(created(FACTORY), to=at)
    again = decode(created(FACTORY), to=at)  # the first was rolled back with its transaction
    assert first.tokens == again.tokens
    assert TOKEN not in at.addresses
    at.learn(first.tokens[0])
    assert at.addresses == {FACTORY, RIVAL, HUB, TOKEN}
    assert decode(created(FACTORY), to=at).tokens == []
    assert len(decode(issued(TOKEN, block=101), to=at).movements) == 1


def test_the_first_announcement_of_a_token_holds() -> None:
    logs = [
        created(FACTORY, issuer=OTHER_ISSUER, block=102),
        created(FACTORY, block=101, index=5),
        created(FACTORY, issuer=OTHER_ISSUER, block=101, index=9),
    ]
    out = decode(*logs, to=fresh())
    assert out.tokens == [Token(TOKEN, FACTORY, ISSUER, ID, 101)]
    assert len(out.programmes) == 3  # a configured factory said so: facts are kept, whatever they are worth


def test_an_impostor_announces_nothing() -> None:
    out = decode(created(STRANGER, factory=FACTORY), created(HUB, factory=RIVAL), issued(TOKEN), to=fresh())
    assert nothing(out)
    assert out.lookalikes == {"unknown_emitter": 2, "foreign_factory": 1}


def test_a_broken_announcement_is_kept_raw_and_teaches_nothing() -> None:
    broken = created(FACTORY)
    broken.data = broken.data[:-64]
    few = created(FACTORY, index=1)
    few.topics = few.topics[:3]
    out = decode(broken, few, to=fresh())
    assert [row[-2] for row in out.raw_logs] == ["undecodable", "undecodable"]
    assert out.tokens == []
