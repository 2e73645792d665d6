"""Partners' records, read: the samples, every odd spelling that the fact sheets allow for, and whatever else may come."""

from __future__ import annotations

import json
from contextlib import suppress
from decimal import Context, Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.config import Qiibee
from indexer.model.types import Address, BadValue, hash32
from indexer.partners import loyfin, transactions
from indexer.partners.client import _DECODER, problem_of, quotable, retry_after
from indexer.partners.orders import (
    Ledger,
    Unusable,
    order_id,
    order_time,
    page_of,
    parties_of,
    questions_of,
    transfers_of,
)
from indexer.partners.reading import (
    Drift,
    alike,
    amount,
    base_units,
    completed,
    flag,
    instant,
    storable,
    without_people,
)
from indexer.partners.runtime import words_of
from indexer.partners.walk import Walker
from indexer.store.partner_hints import OwnEvent

SAMPLES = Path(__file__).parents[1] / "samples"
STELLAR = Ledger("bloom", "StellarMainnet")
WORDS = words_of(Qiibee.model_validate({"api_key": "k"}))
WALLET = "GCRKV5VQIMXJTYFWFIJ4M726IUWVHW7EJV2A2SSZMO3BO5MI2SBMHNQL"
ISSUER = "GDPDTXUVKD74XYWH7PNPAGOVC2SJAH5G5NG35JIMKEWSFZOKXD5X4LEM"
TX = "709b55bd3da0f5a838125bd0ee20c5bfdd7caba173912d4281cae816b79a201b"


def order(*transfers: dict[str, Any] | None, **given: Any) -> dict[str, Any]:
    nodes = [{"assetTransfer": transfer} for transfer in transfers]
    return {"id": "o1", "orderTransactions": {"nodes": nodes}} | given


def moved(value: Any = "120", **given: Any) -> dict[str, Any]:
    tx = {"id": TX, "blockNumber": "59120310", "date": "2026-11-20T10:28:09.000", "success": True}
    return {"value": value, "fromId": ISSUER, "toId": WALLET, "transaction": tx} | given


def read(row: Any, ledger: Ledger = STELLAR, wallet: str = WALLET, undated: bool = False) -> list[Any]:
    return list(transfers_of(row, wallet, ledger, undated=undated, drift=Drift()))


# --------------------------------------------------------------------------- Keyban


def test_an_order_is_what_its_nodes_say_together() -> None:
    whole = read(
        order(
            moved("120"), moved("30", transaction=moved()["transaction"] | {"id": "1f" * 32, "blockNumber": 59120311})
        )
    )
    assert [(t.kind, t.amount, t.amount_text, t.status) for t in whole] == [("keyban.mint", 150, "150", "succeeded")]
    assert whole[0].tx_hashes == (TX, "1f" * 32) and whole[0].block_number == 59120311
    assert whole[0].time_ms == 1_795_170_489_000
    assert [t.status for t in read(order(moved(), moved(transaction=None)))] == ["pending"]
    failed = moved(transaction=moved()["transaction"] | {"success": False})
    assert [t.status for t in read(order(moved(), failed))] == ["failed"]
    silent = moved()
    del silent["transaction"]["success"]
    assert [t.status for t in read(order(silent))] == ["included"]  # a block number is not success
    assert read(order()) == [] and read(order(None)) == [] and read({"id": 7}) == []


@pytest.mark.parametrize(
    "transfer",
    [
        moved(fromId=None),
        {**moved(), "from": {"id": ISSUER}, "to": {"id": WALLET}, "toId": WALLET},
        {"value": 120, "from": ISSUER, "to": WALLET, "transactionId": TX, "transactionBlockNumber": 59120310, "transaction": {"success": "true"}},
        {"value": Decimal("120.0"), "to": {"address": WALLET}, "transaction": {"hash": TX, "blockNumber": 59120310, "success": True}},
        moved("120.0000000"),
    ],
)  # fmt: skip
def test_every_spelling_of_a_mint(transfer: dict[str, Any]) -> None:
    (found,) = read(order(transfer))
    assert (found.kind, found.amount, found.status, found.tx_hashes) == ("keyban.mint", 120, "succeeded", (TX,))


def test_direction_is_by_the_watched_wallet() -> None:
    burn = moved(fromId=WALLET, toId=None)
    assert [t.kind for t in read(order(burn))] == ["keyban.burn"]
    assert [t.kind for t in read(order(burn, moved("20")))] == ["keyban.mint", "keyban.burn"]
    assert read(order(moved(fromId=WALLET))) == []  # to itself
    assert read(order(moved(toId=WALLET.lower()))) == []  # the case of a strkey is part of it
    evm = order(moved(toId="0xABCDEF0000000000000000000000000000000001"))
    assert [t.wallet for t in read(evm, wallet="0xabcdef0000000000000000000000000000000001")] == [
        "0xabcdef0000000000000000000000000000000001"
    ]
    with pytest.raises(Unusable, match="to whom"):
        read(order({"value": "1", "transaction": moved()["transaction"]}))
    assert parties_of(order(burn, moved())) == {WALLET, ISSUER}


def test_amounts_are_scaled_exactly_or_not_known() -> None:
    seven = Ledger("bloom", "StellarMainnet", decimals=7)
    assert read(order(moved("0.0000001")), seven)[0].amount == 1
    assert read(order(moved("0.00000001")), seven)[0].amount is None
    assert read(order(moved("1200000000", decimals=7)), seven)[0].amount == 1_200_000_000  # stated: base units already
    assert read(order(moved("1200000000", decimals=6)), seven)[0].amount is None  # the two disagree
    assert read(order(moved("0.5")))[0].amount is None and read(order(moved("0.5")))[0].amount_text == "0.5"
    assert read(order(moved("0.5"), moved("0.5")))[0].amount is None  # each node must be whole
    assert read(order(moved(), moved(tokenId="other")))[0].amount is None  # of two tokens: no sum
    assert read(order(moved(None)))[0].amount is None
    assert read(order(moved(str(2**256 - 1))))[0].amount == 2**256 - 1
    assert read(order(moved(str(2**256))))[0].amount is None
    assert read(order(moved("1e999999999")))[0].amount is None
    assert read(order(moved("-5")))[0].amount is None and read(order(moved("NaN")))[0].amount is None


def test_an_order_names_its_transfers_by_transaction_and_their_own_id() -> None:
    assert read(order(moved(id="a"), moved("30", id="b")))[0].transfers == (f"{TX}/a", f"{TX}/b")
    assert read(order(moved(), moved("30")))[0].transfers == (f"{TX}/120", f"{TX}/30")
    assert read(order(moved(transaction=None)))[0].transfers == ()
    assert read(order(moved(id="a")), Ledger("bloom", "BaseMainnet", chain_id=8453))[0].transfers == ()


def test_time_is_the_record_s_own_or_none() -> None:
    bare = order(moved(transaction={"id": TX, "blockNumber": 1}))
    assert read(bare, undated=True)[0].undated and read(bare)[0].time_ms is None
    assert not read(order(moved()), undated=True)[0].undated
    assert order_time(bare | {"createdAt": "2026-11-20T10:28:09+01:00"}, Drift()) == 1_795_166_889_000


def test_on_a_chain_that_we_follow_hashes_become_questions() -> None:
    base = Ledger("bloom", "BaseMainnet", chain_id=8453)
    (found,) = read(order(moved(transaction={"id": TX.upper(), "blockNumber": 1})), base)
    assert found.tx_hashes == ("0x" + TX,) and found.chain_id == 8453
    assert questions_of([found]) == [(8453, bytes.fromhex(TX))] and questions_of(read(order(moved()))) == []


def test_the_samples() -> None:
    document = _DECODER.decode((SAMPLES / "keyban_orders.json").read_bytes())
    page = page_of(document, Drift())
    found = {order_id(row): read(row) for row in page.rows}
    assert page.total == 5
    said = [[(t.kind, t.amount, t.status) for t in transfers] for transfers in found.values()]
    assert said == [
        [],
        [("keyban.mint", 75, "pending")],
        [("keyban.mint", 60, "failed")],
        [("keyban.burn", 40, "succeeded")],
        [("keyban.mint", 150, "succeeded")],
    ]
    rows = transactions.history_of(_DECODER.decode((SAMPLES / "qiibee_transactions.json").read_bytes()), Drift()).rows
    kept = [transactions.scrubbed(row) for row in rows]
    assert [
        [
            (t.kind, t.amount, t.status, t.wallet[:4])
            for t in transactions.transfers_of(row, WORDS, undated=False, drift=Drift()) or []
        ]
        for row in kept
    ] == [
        [("qiibee.credit", 25, "pending", "0d6c")],
        [("qiibee.debit", 100, "succeeded", "0d6c")],
        [],
        [],
        [("qiibee.credit", 15, "failed", "b7a0")],
        [("qiibee.credit", 15, "succeeded", "b7a0")],
    ]
    assert not any(
        word in json.dumps(storable(kept)) for word in ("Ada", "Muster", "example.test", "che", "first_name")
    )
    problem = problem_of((SAMPLES / "keyban_problem.json").read_bytes())
    assert problem is not None and "pageSize: must be <= 100" in problem


# --------------------------------------------------------------------------- walking pages


async def test_a_listing_is_read_whole_however_it_moves() -> None:
    rows = [{"id": str(n)} for n in range(250)]
    asked: list[tuple[int, int]] = []

    async def fetch(page: int, size: int) -> Any:
        asked.append((page, size))
        if page == 2 and len(asked) < 4:
            rows.insert(0, {"id": f"new{len(asked)}"})
        return page_of({"data": rows[(page - 1) * size : page * size], "total": len(rows)}, Drift())

    walk = await Walker().walk(fetch)
    assert walk.complete and set(walk.rows) == {row["id"] for row in rows} and walk.moved

    async def ignoring_pages(page: int, size: int) -> Any:
        return page_of({"data": rows[:100]}, Drift())

    walk = await Walker().walk(ignoring_pages)
    assert len(walk.rows) == 100 and walk.pages < 20  # an API that ignores the page ends no less

    async def capped(page: int, size: int) -> Any:  # ten at most, said nowhere, and no total
        return page_of(rows[(page - 1) * 10 : page * 10], Drift())

    walk = await Walker().walk(capped)
    assert walk.complete and len(walk.rows) == len(rows)

    async def never_still(page: int, size: int) -> Any:
        rows.insert(0, {"id": f"more{len(rows)}"})
        return page_of({"data": rows[(page - 1) * size : page * size], "total": len(rows)}, Drift())

    stood = {row["id"] for row in rows}
    walk = await Walker().walk(never_still)
    assert not walk.complete and walk.moved >= 3 and stood <= walk.rows.keys(), "what was there is read all the same"
    assert walk.pages <= 4 * 3, "and no more than a few times"

    rows += [{"id": f"long{n}"} for n in range(2_000)]
    stood = {row["id"] for row in rows}
    walk = await Walker().walk(never_still)
    assert not walk.complete and stood <= walk.rows.keys() and walk.pages < 30, "a long one is not read again at once"


# --------------------------------------------------------------------------- qiibee


def test_a_row_s_status_is_its_own_and_a_success_needs_a_transaction() -> None:
    row = {"id": 1, "loyalty_event_type": "credit_points", "status": "success", "tx_hash": "0x1", "token": {"id": 12, "status": "stopped"},
           "amount_received": "25.00000", "user_to": {"auth_id": "u", "email": "a@b.c"}, "inserted_at": "2026-11-20T10:44:02"}  # fmt: skip

    def told(**given: Any) -> list[Any]:
        return [
            (t.status, t.amount, t.wallet, t.token)
            for t in transactions.transfers_of(transactions.scrubbed(row | given), WORDS, undated=False, drift=Drift())
            or []
        ]

    assert told() == [("succeeded", 25, "u", "12")]
    assert told(tx_hash=None) == [("pending", 25, "u", "12")] == told(tx_hash="")
    assert told(status="Reverted")[0][0] == "failed" and told(status="whatever")[0][0] == "pending"
    assert told(status=None)[0][0] == "pending" and told(loyalty_event_type="seasonal_bonus") == []
    assert told(amount_received="0.5")[0][1] is None and told(loyalty_event_type={"a": 1}) == []
    with pytest.raises(Unusable, match="names no user"):
        told(user_to=None)


# --------------------------------------------------------------------------- Loyfin


def signed(**given: Any) -> dict[str, Any]:
    return {
        "id": "128", "kind": "redemption", "status": "submitted", "chainId": "84532", "verifyingContract": "0x" + "fa" * 20,
        "issuer": "0x" + "15" * 20, "nonce": "0x" + "aa" * 32, "operationHash": "0x" + "00" * 32, "relayTxHash": None,
    } | given  # fmt: skip


def test_hints_of_loyfin_s_api() -> None:
    drift = Drift()
    hint = loyfin.hint_of(signed(), drift)
    assert hint is not None and (hint.kind, hint.status, hint.operation_hash) == (
        "loyfin.redemption",
        "submitted",
        None,
    )
    cancelled = loyfin.hint_of(signed(status="cancelled"), drift)
    assert cancelled is not None and (cancelled.status, cancelled.reason) == ("rejected", "cancelled")
    refused = loyfin.hint_of(signed(status="rejected", error="  nonce\n used "), drift)
    assert refused is not None and refused.reason == "nonce used"
    assert loyfin.hint_of(signed(status="relayed"), drift) is None and drift["word"] == 1
    with pytest.raises(BadValue):
        loyfin.hint_of(signed(nonce="0x12"), drift)
    with pytest.raises(Unusable):
        loyfin.hint_of({"kind": "issuance"}, drift)


def test_differences_between_the_api_and_the_chain_are_named() -> None:
    issuer, nonce = Address(b"\x15" * 20), hash32("0x" + "aa" * 32)
    ours = [OwnEvent("loyfin.redemption", 84532, nonce, b"\x01" * 32, 3, 77, 250)]
    row = {"issuer": "0x" + "15" * 20, "nonce": "0x" + "aa" * 32, "txHash": "0x" + "01" * 32, "chainId": 84532, "blockNumber": "77", "logIndex": 3, "amount": 250}  # fmt: skip

    def told(**given: Any) -> list[str]:
        return loyfin.differences("loyfin.redemption", [row | given], ours, frozenset({issuer}))

    assert told() == [] and told(blockNumber=None) == [] and told(issuer="0x" + "16" * 20, amount=1) == []
    assert "block 78 in the API, 77 on the chain" in told(blockNumber=78)[0]
    assert "not on the chain" in told(nonce="0x" + "bb" * 32)[0]
    assert "cannot be read" in told(txHash="nonsense")[0]


# --------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("word", "meaning"),
    [
        ("success", "success"), (" Success ", "success"), ("SETTLED", "success"), ("successful", None),
        ("processing", "pending"), ("processed", "pending"), ("pending_review", "pending"),
        ("failed", "failed"), ("reverted", "failed"), ("refused-by-bank", "failed"), ("", None), ("ok", None), (7, None),
    ],
)  # fmt: skip
def test_what_a_status_means_is_configured(word: object, meaning: str | None) -> None:
    words = words_of(
        Qiibee.model_validate(
            {"api_key": "k", "success": ["success", "Settled"], "failed": ["failed", "reverted", "refused*"]}
        )
    )
    assert words.meaning(word) == meaning
    drift = Drift()
    row = {"status": word, "tx_hash": "0x1"}
    said = transactions.status_of(row, words, drift)
    assert said == {"success": "succeeded", "failed": "failed"}.get(str(meaning), "pending")
    assert drift["word"] == (meaning is None) and (transactions.unknown_status(row, words) is not None) is (
        meaning is None
    )


def test_a_body_is_quoted_only_where_nobody_can_be_in_it() -> None:
    """A row that was cut off holds people, whatever its content type says."""
    row = b'{"data":{"transactions":[{"id":7,"user":{"first_name":"Ada","second_name":"Lovelace","email":"ada@exam'
    for kind in ("application/json", "text/html", "text/plain", "something of no type"):
        for body in (row, b"\xef\xbb\xbf  " + row, row[40:], b"<html><p>" + row[60:]):
            assert not any(word in quotable(body, kind) for word in ("Ada", "Lovelace", "exam")), (kind, body)
    assert "cannot be used" in quotable(b"Ada Lovelace", "application/problem+json")
    assert quotable(b"<title>502 Bad Gateway</title><p>Ada", "text/html") == "502 Bad Gateway"
    assert (
        quotable(b"<!-- x --><script>var a=1</script><h1>Out\nof order</h1><p>Ada</p>", "text/html") == "Out\nof order"
    )
    assert quotable(b"<br>", "text/html") == "a page without a title"
    assert quotable(b"upstream timed out\nAda Lovelace", "text/plain") == "upstream timed out" and not quotable(
        b"", "x"
    )


def test_retry_after_in_both_forms() -> None:
    assert retry_after("12", None, 0) == 12 and retry_after("1e9", None, 0) == 3600 and retry_after("-3", None, 0) == 0
    date = "Sat, 21 Nov 2026 10:00:30 GMT"
    assert retry_after(date, "Sat, 21 Nov 2026 10:00:00 GMT", 0) == 30
    assert retry_after(date, None, 1_795_255_220.0) == 10
    assert (
        retry_after("soon", None, 0) is None
        and retry_after(None, None, 0) is None
        and retry_after("nan", None, 0) is None
    )


def test_what_is_left_out_says_nothing_and_spelling_is_no_change() -> None:
    known = {"id": "1", "a": {"b": "25.00", "c": None}, "n": [{"x": 1}]}
    drift = Drift()
    merged = completed({"id": 1, "a": {"b": 25}, "n": [{}]}, known, drift)
    assert alike(merged, known) and drift["missing"] == 2
    assert not alike(completed({"a": {"b": None}}, known, Drift()), known)  # a null is a word
    assert not alike({"a": True}, {"a": 1}) and not alike({"a": "x"}, {"a": "y"}) and alike("1.0", 1)


def test_people_are_left_out_and_everything_fits_into_jsonb() -> None:
    row = {
        "user": {"email": "a@b.c"},
        "account": {"firstName": "Ada", "address": "G"},
        "list": [{"phoneNumber": 1, "id": 2}],
    }
    assert without_people(row) == {"account": {"address": "G"}, "list": [{"id": 2}]}
    assert storable({"a\0": "b\0", "n": 2**70, "f": Decimal("1.50")}) == {
        "a\ufffd": "b\ufffd",
        "n": str(2**70),
        "f": "1.50",
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.decimals(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["data", "nodes", WALLET, "success", "120", "0x" + "11" * 32, "credit_points", "submitted", "redemption"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["id", "data", "nodes", "edges", "node", "orderTransactions", "assetTransfer", "transaction", "value", "from", "toId", "token",
                         "decimals", "success", "blockNumber", "date", "transactions", "status", "loyalty_event_type", "user_to", "auth_id",
                         "amount_received", "tx_hash", "items", "page", "nextCursor", "kind", "chainId", "nonce", "issuer", "total"]),
        inner, max_size=8),
    max_leaves=25,
)  # fmt: skip


@settings(max_examples=60)
@given(JSON)
def test_nothing_that_is_json_breaks_a_reader(document: Any) -> None:
    for attempt in (
        lambda: page_of(document, Drift()),
        lambda: read(document),
        lambda: order_time(document, Drift()),
        lambda: transactions.transfers_of(document, WORDS, undated=True, drift=Drift()),
        lambda: transactions.scrubbed(document),
        lambda: transactions.history_of(document, Drift()),
        lambda: loyfin.page_of(document),
        lambda: loyfin.hint_of(document, Drift()),
        lambda: loyfin.differences("loyfin.issuance", [document], [], frozenset()),
    ):
        with suppress(ValueError):  # Unusable, BadValue: told and quarantined
            attempt()
    json.dumps(storable(document))
    for reader in (instant, flag, amount):
        reader(document, Drift())
    assert alike(storable(document), storable(document))


@given(st.integers(0, 10**40), st.integers(0, 30))
def test_scaling_is_exact(value: int, decimals: int) -> None:
    shown = Decimal(value).scaleb(-decimals, Context(prec=200))
    assert base_units(shown, decimals) == value


def test_another_transaction_takes_nothing_over() -> None:
    known = {"id": "o", "nodes": [{"transaction": {"id": "t1", "blockNumber": "5", "success": True}}]}
    merged = completed({"id": "o", "nodes": [{"transaction": {"id": "t2"}}]}, known, Drift())
    assert merged["nodes"][0]["transaction"] == {"id": "t2"}
