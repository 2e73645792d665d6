"""The simulated partners keep the fact sheets: shapes as in the samples, timelines, paging, and every fault by its switch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest

from indexer.sandbox.partners.faults import CODES, ENDLESS, FAULTS
from indexer.sandbox.partners.keyban import Account, Keyban, strkey
from indexer.sandbox.partners.loyfin import LoyfinApi, Mined
from indexer.sandbox.partners.movement import AT_ONCE, LOST, STUCK, Course, Pace
from indexer.sandbox.partners.partner import Partner, Quota
from indexer.sandbox.partners.qiibee import Qiibee
from indexer.sandbox.partners.wire import Reply, Request, encoded

KEY = "the-key"
SAMPLES = Path(__file__).parents[1] / "samples"
ORDERS = "/v1/loyalty/orders"
HISTORY = "/api/admin/transactions"


@dataclass
class Clock:
    now: float = 1_795_170_000.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Bench:
    """The three partners at one clock."""

    clock: Clock = field(default_factory=Clock)
    seed: int = 7

    def __post_init__(self) -> None:
        self.keyban = Keyban(seed=self.seed, clock=self.clock, keys=[KEY])
        self.qiibee = Qiibee(seed=self.seed, clock=self.clock, keys=[KEY])
        self.loyfin = LoyfinApi(seed=self.seed, clock=self.clock)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def get(partner: Partner, path: str, key: str | None = KEY, **query: Any) -> Reply:
    headers = {partner.key_header.lower(): key} if key else {}
    return partner.answer(Request("GET", path, {name: str(value) for name, value in query.items()}, headers))


def post(partner: Partner, path: str, document: object, key: str = KEY) -> Reply:
    return partner.answer(Request("POST", path, {}, {partner.key_header.lower(): key}, encoded(document)))


def orders(bench: Bench, **query: Any) -> list[dict[str, Any]]:
    return list(get(bench.keyban, ORDERS, **query).document()["data"])


def rows(bench: Bench, **query: Any) -> list[dict[str, Any]]:
    return list(get(bench.qiibee, HISTORY, **query).document()["data"]["transactions"])


def shape(value: Any) -> Any:
    """Keys and types of a document; of a list, of its first element."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    return [shape(each) for each in value[:1]] if isinstance(value, list) else type(value).__name__


def settled(order: dict[str, Any]) -> bool:
    return bool(order["orderTransactions"]["nodes"][0]["assetTransfer"]["transaction"])


def action(number: int, **terms: object) -> dict[str, Any]:
    return {
        "issuer": "0x" + "11" * 20,
        "from": "0x" + "22" * 20,
        "loyaltyId": "0x" + "42" * 32,
        "amount": "250",
        "nonce": f"0x{number:064x}",
        "chainId": "8453",
        "verifyingContract": "0x" + "33" * 20,
        "operationHash": f"0x{number + 9000:064x}",
        **terms,
    }


# --------------------------------------------------------------------------- Keyban


def test_a_mint_is_promised_at_once_and_settles_step_by_step(bench: Bench) -> None:
    account = bench.keyban.open_account()
    bench.keyban.pace = Pace(appears=(1, 1), sent=(1, 1), settles=(2, 2))
    minted = post(bench.keyban, f"/v1/loyalty/account/{account.id}/mint", {"amount": 120})
    assert (minted.status, minted.document()) == (201, {"newamount": 120})
    assert orders(bench, walletId=account.wallet) == []
    assert bench.keyban.standing() == []

    bench.clock.pass_by(1)
    (order,) = orders(bench, walletId=account.wallet)
    assert order["orderTransactions"]["nodes"] == []
    bench.clock.pass_by(1)
    (order,) = orders(bench, walletId=account.wallet)
    (node,) = order["orderTransactions"]["nodes"]
    assert node["assetTransfer"]["transaction"] is None
    assert (node["assetTransfer"]["value"], node["assetTransfer"]["toId"]) == ("120", account.wallet)
    bench.clock.pass_by(2)
    (order,) = orders(bench, walletId=account.wallet)
    transaction = order["orderTransactions"]["nodes"][0]["assetTransfer"]["transaction"]
    assert transaction["success"] is True
    assert re.fullmatch(r"[0-9]+", transaction["blockNumber"])
    assert re.fullmatch(r"[0-9a-f]{64}", transaction["id"])
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\.[0-9]{3}", transaction["date"])
    (moved,) = bench.keyban.standing()
    assert (moved.wallet, int(moved.amount), moved.id) == (account.wallet, 120, order["id"])


def test_an_order_has_the_shape_of_the_samples(bench: Bench) -> None:
    account = bench.keyban.open_account()
    bench.keyban.mint(account, 60, AT_ONCE)
    sample = json.loads((SAMPLES / "keyban_orders.json").read_text())["data"]
    (order,) = orders(bench)
    assert shape(order) == shape(
        next(each for each in sample if len(each["orderTransactions"]["nodes"]) == 1 and settled(each))
    )
    assert re.fullmatch("G[A-Z2-7]{55}", account.wallet)
    # the vector of SEP-23
    key = bytes.fromhex("3f0c34bf93ad0d9971d04ccc90f705511c838aad9734a4a2fb0d7a03fc7fe89a")
    assert strkey(key) == "GA7QYNF7SOWQ3GLR2BGMZEHXAVIRZA4KVWLTJJFC7MGXUA74P7UJVSGZ"


def test_orders_fail_with_a_block_number_get_stuck_or_never_come(bench: Bench) -> None:
    account = bench.keyban.open_account()
    failed = bench.keyban.mint(account, 5, Course(0, 0, 1, fails=True))
    stuck = bench.keyban.mint(account, 6, STUCK)
    bench.keyban.mint(account, 7, LOST)
    bench.clock.pass_by(3600)
    shown = {order["id"]: order["orderTransactions"]["nodes"][0]["assetTransfer"] for order in orders(bench)}
    assert shown.keys() == {failed.id, stuck.id}
    assert shown[failed.id]["transaction"]["success"] is False
    assert shown[failed.id]["transaction"]["blockNumber"]
    assert shown[stuck.id]["transaction"] is None
    assert bench.keyban.standing() == []


def test_several_nodes_sum_up_and_are_included_one_after_the_other(bench: Bench) -> None:
    account = bench.keyban.open_account()
    bench.keyban.scale = 7
    bench.keyban.mint(account, 150, Course(0, 0, 2), nodes=[120, 30])
    bench.clock.pass_by(1.6)
    first, second = (node["assetTransfer"] for node in orders(bench)[0]["orderTransactions"]["nodes"])
    assert [first["value"], second["value"]] == ["1200000000", "300000000"]
    assert first["transaction"] and not second["transaction"]
    bench.clock.pass_by(0.4)
    both = [node["assetTransfer"]["transaction"] for node in orders(bench)[0]["orderTransactions"]["nodes"]]
    assert both[0]["id"] != both[1]["id"]
    with pytest.raises(ValueError, match="nodes of 20"):
        bench.keyban.mint(account, 30, nodes=[10, 10])


def test_a_burn_runs_from_the_wallet(bench: Bench) -> None:
    account = bench.keyban.open_account()
    bench.keyban.burn(account, Decimal("12.5"), AT_ONCE)
    transfer = orders(bench)[0]["orderTransactions"]["nodes"][0]["assetTransfer"]
    assert (transfer["fromId"], transfer["toId"], transfer["value"]) == (
        account.wallet,
        bench.keyban.issuer,
        "12.5",
    )


def test_pages_are_capped_filtered_and_counted(bench: Bench) -> None:
    one, two = bench.keyban.open_account(), bench.keyban.open_account()
    for _ in range(12):
        bench.clock.pass_by(1)
        bench.keyban.mint(one, 10, AT_ONCE)
    bench.keyban.mint(two, 10, AT_ONCE)
    assert len(orders(bench)) == 10  # the page's size by default
    document = get(bench.keyban, ORDERS, walletId=one.wallet, currentPage=2, pageSize=10).document()
    assert (len(document["data"]), document["total"]) == (2, 12)
    assert orders(bench, currentPage=3) == []
    newest = [order["id"] for order in orders(bench, walletId=one.wallet, pageSize=100)]
    bench.keyban.order = "oldest"
    assert [order["id"] for order in orders(bench, walletId=one.wallet, pageSize=100)] == newest[::-1]
    bench.keyban.tells_total = False
    assert "total" not in get(bench.keyban, ORDERS).document()
    assert len(orders(bench, walletId="GNOBODY")) == 0


def test_wrong_requests_get_problems_in_both_shapes(bench: Bench) -> None:
    account = bench.keyban.open_account()
    too_many = [get(bench.keyban, ORDERS, pageSize=101) for _ in range(2)]
    assert [reply.status for reply in too_many] == [400, 400]
    assert {reply.headers["Content-Type"] for reply in too_many} == {"application/problem+json"}
    guide, client = (reply.document()["errors"][0] for reply in too_many)
    assert guide == {"path": "pageSize", "code": "max_value", "message": "must be <= 100"}
    assert client == {"field": "pageSize", "message": "must be <= 100"}
    assert get(bench.keyban, ORDERS, currentPage=0).status == 400
    assert get(bench.keyban, ORDERS, **{"filters[0][field]": "status"}).status == 400
    assert post(bench.keyban, f"/v1/loyalty/account/{account.id}/mint", {"amount": 0}).status == 422
    assert post(bench.keyban, "/v1/loyalty/account/nobody/mint", {"amount": 1}).status == 404
    bench.keyban.needs_wallet = True
    assert get(bench.keyban, ORDERS).status == 400
    assert (get(bench.keyban, ORDERS, key=None).status, get(bench.keyban, ORDERS, key="other").status) == (401, 401)
    assert account.promised == 0


def test_on_an_evm_network_an_order_names_the_transaction_it_was_placed_in(bench: Bench) -> None:
    keyban = Keyban(seed=1, clock=bench.clock, network="BaseSepolia")
    account = keyban.open_account()
    assert re.fullmatch("0x[0-9a-f]{40}", account.wallet)
    order = keyban.mint(account, 9, STUCK)
    bench.clock.pass_by(5)
    keyban.place(order.id, [("0x" + "aa" * 32, 77, "0x" + "bb" * 32)])
    (shown,) = get(keyban, ORDERS, None).document()["data"]
    transaction = shown["orderTransactions"]["nodes"][0]["assetTransfer"]["transaction"]
    assert (transaction["id"], transaction["blockNumber"]) == ("0x" + "aa" * 32, "77")
    assert keyban.standing() == [order]


# --------------------------------------------------------------------------- qiibee


def test_a_credit_is_accepted_pends_and_succeeds(bench: Bench) -> None:
    qiibee = bench.qiibee
    user = qiibee.enrol("member 1")
    qiibee.pace = Pace(appears=(1, 1), sent=(1, 1), settles=(2, 2))
    wish = {"user_auth_id": "member 1", "type": "credit_points", "amount": "25", "token_id": qiibee.token.id}
    accepted = post(qiibee, HISTORY, {"transaction": wish})
    assert (accepted.status, accepted.document()) == (202, {})
    assert rows(bench) == []
    bench.clock.pass_by(1)
    (row,) = rows(bench, user_auth_id="member 1")
    assert (row["status"], row["tx_hash"], row["amount_received"]) == ("pending", None, "25.00000")
    assert qiibee.balance(user) == 0
    bench.clock.pass_by(3)
    (row,) = rows(bench)
    assert row["status"] == "success"
    assert re.fullmatch("0x[0-9a-f]{64}", row["tx_hash"])
    assert qiibee.balance(user) == 25
    debit = {**wish, "type": "debit_points", "amount": 26}
    assert post(qiibee, HISTORY, {"transaction": debit}).status == 400
    assert post(qiibee, HISTORY, {"transaction": {**debit, "amount": 5}}).status == 202
    assert post(qiibee, HISTORY, {"transaction": {**wish, "type": "gift"}}).status == 400
    assert post(qiibee, HISTORY, {"transaction": {**wish, "amount": "NaN"}}).status == 400
    assert post(qiibee, HISTORY, {"transaction": {**wish, "user_auth_id": "no"}}).status == 404


def test_a_row_shows_people_and_its_token_says_nothing_of_it(bench: Bench) -> None:
    user = bench.qiibee.enrol()
    bench.qiibee.credit(user, 15, AT_ONCE)
    bench.qiibee.other_event("exchange", user, 10)
    seen = [rows(bench) for _ in range(12)]
    credit = next(row for row in seen[0] if row["loyalty_event_type"] == "credit_points")
    sample = json.loads((SAMPLES / "qiibee_transactions.json").read_text())["data"]["transactions"]
    for ours, theirs in (
        (row, next(s for s in sample if s["loyalty_event_type"] == row["loyalty_event_type"])) for row in seen[0]
    ):
        assert ours.keys() == theirs.keys()
        assert ours["token"].keys() == theirs["token"].keys()
        assert (ours["user"] or ours["user_to"]).keys() == (theirs["user"] or theirs["user_to"]).keys()
    assert credit["user_to"]["email"].endswith("@example.test")
    assert credit["user"] is None
    assert credit["token"]["id"] == str(bench.qiibee.token.id)
    assert not credit["token"]["address"].startswith("0x")
    exchange = next(row for row in seen[0] if row["loyalty_event_type"] == "exchange")
    assert exchange["amount_received"] and exchange["points_burned"] and exchange["token_to"]
    assert {row["status"] for page in seen for row in page} == {"success"}
    assert len({row["token"]["status"] for page in seen for row in page}) > 1


def test_history_is_newest_first_with_unstable_ties(bench: Bench) -> None:
    user = bench.qiibee.enrol()
    bench.clock.now = float(int(bench.clock.now))
    for _ in range(8):
        bench.qiibee.credit(user, 10, AT_ONCE)
        bench.clock.pass_by(0.1)
    bench.clock.pass_by(1)
    last = bench.qiibee.credit(user, 10, AT_ONCE)
    orderings = {tuple(row["id"] for row in rows(bench)) for _ in range(6)}
    assert len(orderings) > 1
    assert {ordering[0] for ordering in orderings} == {int(last.id)}
    assert len({row["inserted_at"] for row in rows(bench)}) == 2
    page = get(bench.qiibee, HISTORY, limit=500, offset=7).document()["data"]
    assert (page["limit"], page["offset"], page["total_tx_count"], len(page["transactions"])) == (100, 7, 9, 2)
    inserted = rows(bench)[0]["inserted_at"]
    assert [row["id"] for row in rows(bench, from_time=f"{inserted}Z")] == [int(last.id)]
    assert rows(bench, token_id=bench.qiibee.other.id) == []
    assert get(bench.qiibee, HISTORY, user_auth_id="nobody").status == 404


def test_balances_mix_two_shapes(bench: Bench) -> None:
    user = bench.qiibee.enrol("a/b")
    bench.qiibee.credit(user, 100, AT_ONCE)
    bench.qiibee.debit(user, Decimal("0.5"), AT_ONCE)
    points, badges = get(bench.qiibee, "/api/admin/users/a%2Fb/balances").document()["data"]
    assert (points["balance"], type(points["token"]["id"])) == (99.5, str)
    assert points["token"]["address"].startswith("0x")
    assert "balance" not in badges
    assert (type(badges["token"]["id"]), badges["token"]["type"]) == (int, "erc721")
    assert get(bench.qiibee, "/api/admin/users/nobody/balances").status == 404


# --------------------------------------------------------------------------- Loyfin's API


def test_an_action_is_stored_once_and_followed_to_its_receipt(bench: Bench) -> None:
    api = bench.loyfin
    body = {"redemption": action(1), "signature": "0xab"}
    first, again = post(api, "/redemptions", body), post(api, "/redemptions", body)
    assert (first.status, first.document()["duplicate"]) == (201, False)
    assert (again.status, again.document()["duplicate"]) == (200, True)
    operation = first.document()["operation"]
    assert (operation["status"], operation["holder"], operation["metadata"]) == ("pending", "0x" + "22" * 20, None)
    stored = api.operations[operation["id"]]
    api.ended(stored, "rejected")
    assert get(api, f"/operations/{operation['id']}").document()["status"] == "rejected"
    api.submitted(stored, "0x" + "cc" * 32)
    api.mined(stored, Mined("0x" + "cc" * 32, 900, 3, "0x" + "44" * 20))
    assert get(api, "/operations", status="mined").document()["items"][0]["relayTxHash"] == "0x" + "cc" * 32
    (receipt,) = get(api, "/redemptions", operationHash=action(1)["operationHash"]).document()["items"]
    assert (receipt["blockNumber"], receipt["logIndex"], receipt["from"]) == ("900", 3, "0x" + "22" * 20)
    assert get(api, "/issuances").document()["items"] == []
    assert len(api.standing()) == 1


def test_operations_are_read_by_a_cursor_that_shifts_with_nothing(bench: Bench) -> None:
    for number in range(60):
        bench.loyfin.store("redemption", action(number))
    seen: list[str] = []
    query: dict[str, Any] = {}
    while True:
        document = get(bench.loyfin, "/operations", **query).document()
        seen += [item["id"] for item in document["items"]]
        bench.loyfin.stranger()
        if not document["page"]["hasMore"]:
            break
        query["cursor"] = document["page"]["nextCursor"]
    assert document["page"] == {"limit": 25, "nextCursor": None, "hasMore": False}
    assert (len(seen), len(set(seen))) == (60, 60)
    assert len(get(bench.loyfin, "/operations", issuer="0x" + "11" * 20, limit=100).document()["items"]) == 60
    assert get(bench.loyfin, "/operations", limit=101).document()["error"].startswith("limit")
    assert get(bench.loyfin, "/operations", cursor="mine").status == 400
    assert post(bench.loyfin, "/issuances", {"issuance": action(1)}).status == 400
    assert post(bench.loyfin, "/redemptions", {"redemption": action(1, amount="0")}).document()["error"] == (
        "amount must be greater than zero"
    )
    assert get(bench.loyfin, "/operations/999").status == 404


# --------------------------------------------------------------------------- quotas and determinism


def test_a_quota_refuses_until_its_stretch_is_over_and_says_so_in_three_ways(bench: Bench) -> None:
    bench.clock.now = 1_795_170_000.0
    bench.keyban.quota = Quota(2, 10)
    replies = [get(bench.keyban, ORDERS) for _ in range(5)]
    assert [reply.status for reply in replies] == [200, 200, 429, 429, 429]
    told = [reply.headers.get("Retry-After") for reply in replies[2:]]
    assert None in told and "10" in told
    (date,) = [text for text in told if text and text != "10"]
    assert parsedate_to_datetime(date).timestamp() == bench.clock.now + 10
    bench.clock.pass_by(10)
    assert get(bench.keyban, ORDERS).status == 200
    assert (bench.keyban.peak(), bench.keyban.refused_by_quota) == (5, 3)
    bench.clock.pass_by(9)  # a stretch begins wherever it likes: with the request before, this is the second of it
    assert [get(bench.keyban, ORDERS).status for _ in range(2)] == [200, 429]
    bench.clock.pass_by(1)
    assert [get(bench.keyban, ORDERS).status for _ in range(2)] == [200, 429]


def test_the_same_seed_tells_the_same_story(bench: Bench) -> None:
    def story(seed: int) -> list[bytes]:
        told = Bench(Clock(), seed)
        for partner in (told.keyban, told.qiibee):
            partner.weather.begin(*CODES, chance=0.2)
        accounts = [told.keyban.open_account() for _ in range(3)]
        user = told.qiibee.enrol()
        replies = []
        for number in range(40):
            told.clock.pass_by(0.5)
            told.keyban.mint(accounts[number % 3], 10)
            told.qiibee.credit(user, 10)
            replies += [get(told.keyban, ORDERS, pageSize=50).body, get(told.qiibee, HISTORY).body]
        return replies

    assert story(3) == story(3)
    assert story(3) != story(4)


# --------------------------------------------------------------------------- faults


@dataclass
class Struck:
    """A settled mint and credit, their answers on a good day, and the same question with a fault."""

    bench: Bench

    def __post_init__(self) -> None:
        account = self.bench.keyban.open_account()
        user = self.bench.qiibee.enrol("u")
        for _ in range(6):
            self.bench.clock.pass_by(1)
            self.bench.keyban.mint(account, 10, AT_ONCE)
            self.bench.qiibee.credit(user, 10, AT_ONCE)
            stored, _ = self.bench.loyfin.store("redemption", action(len(self.bench.loyfin.operations)))
            self.bench.loyfin.mined(stored, Mined("0x" + "cc" * 32, 900, 3, "0x" + "44" * 20))

    def later_page(self, partner: Partner) -> Callable[[], Reply]:
        if partner is self.bench.keyban:
            return lambda: get(partner, ORDERS, currentPage=2)
        if partner is self.bench.qiibee:
            return lambda: get(partner, HISTORY, offset=1)
        cursor = get(partner, "/operations", limit=1).document()["page"]["nextCursor"]
        return lambda: get(partner, "/operations", cursor=cursor)

    def questions(self) -> Iterable[tuple[Partner, Callable[[], Reply], Callable[[Reply], list[Any]]]]:
        bench = self.bench
        yield bench.keyban, lambda: get(bench.keyban, ORDERS, pageSize=100), lambda r: list(r.document()["data"])
        yield (
            bench.qiibee,
            lambda: get(bench.qiibee, HISTORY),
            lambda r: list(r.document()["data"]["transactions"]),
        )
        yield bench.loyfin, lambda: get(bench.loyfin, "/operations"), lambda r: list(r.document()["items"])


@pytest.fixture
def struck(bench: Bench) -> Struck:
    return Struck(bench)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_strikes_when_switched_on_and_only_then(struck: Struck, fault: str) -> None:
    for partner, ask, records in struck.questions():
        before = ask()
        assert before.status == 200 and before.fate == "answered"
        assert len(records(before)) == 6
        assert partner.weather.struck == {}
        partner.weather.begin(fault)
        if fault == "page_drift":  # only where a page is not the first
            struck.later_page(partner)()
        elif fault == "late":  # only what was never listed before
            partner.stranger()
            ask()
        else:
            ask()
        assert set(partner.weather.struck) == {fault}
        partner.weather.end()
        count = partner.weather.struck[fault]
        ask()
        assert partner.weather.struck[fault] == count


def test_transport_faults_spoil_the_answer(struck: Struck) -> None:
    def spoilt(fault: str) -> Reply:
        weather = struck.bench.keyban.weather
        weather.begin(fault)
        reply = get(struck.bench.keyban, ORDERS)
        weather.end(fault)
        return reply

    assert spoilt("server_error").status in (500, 502, 503, 504)
    limits = [spoilt("rate_limited") for _ in range(3)]
    assert {reply.status for reply in limits} == {429}
    assert {reply.headers.get("Retry-After", "")[:1] for reply in limits} >= {"", "1"}
    assert (spoilt("silence").fate, spoilt("dropped").fate) == ("silent", "dropped")
    pages = [spoilt("html") for _ in range(2)]
    assert sorted(reply.status for reply in pages) == [200, 502]
    assert all(reply.body.startswith(b"<!DOCTYPE") for reply in pages)
    endless = spoilt("endless_body")
    assert (endless.padding, len(endless.body) < 100) == (ENDLESS, True)
    with pytest.raises(ValueError):
        json.loads(spoilt("cut_off").body)
    assert (spoilt("expired").status, spoilt("forbidden").status) == (401, 403)


def test_a_mint_whose_answer_is_lost_was_made_and_one_refused_at_the_door_was_not(bench: Bench) -> None:
    account = bench.keyban.open_account()
    path = f"/v1/loyalty/account/{account.id}/mint"
    bench.keyban.weather.begin("silence")
    assert post(bench.keyban, path, {"amount": 10}).fate == "silent"
    assert account.promised == 10
    bench.keyban.weather.end()
    bench.keyban.weather.begin("expired")
    assert post(bench.keyban, path, {"amount": 10}).status == 401
    assert account.promised == 10


def test_record_faults_hide_repeat_and_change_what_is_listed(struck: Struck) -> None:
    keyban = struck.bench.keyban

    def listed(fault: str, *, chance: float = 1.0) -> list[dict[str, Any]]:
        keyban.weather.begin(fault, chance=chance)
        found = orders(struck.bench, pageSize=100)
        keyban.weather.end()
        return found

    calm = listed("page_drift")
    ids = [order["id"] for order in calm]
    assert listed("empty_list") == []
    assert listed("blinking") == []
    assert [order["id"] for order in orders(struck.bench, pageSize=100)] == ids
    repeated = [order["id"] for order in listed("duplicates")]
    assert (len(repeated), set(repeated)) == (9, set(ids))
    assert sorted(order["id"] for order in listed("disorder")) == sorted(ids)
    skewed = listed("clock_skew")
    assert skewed != calm
    assert [order["id"] for order in skewed] == ids

    late = keyban.mint(keyban.open_account(), 3, AT_ONCE)
    keyban.weather.begin("late")
    assert sorted(order["id"] for order in orders(struck.bench, pageSize=100)) == sorted(ids)
    keyban.weather.end()
    struck.bench.clock.pass_by(60)
    assert late.id in [order["id"] for order in orders(struck.bench, pageSize=100)]
    assert len(keyban.standing()) == 7  # nothing of this touched the truth


def test_records_change_and_vanish_after_they_were_read(struck: Struck) -> None:
    keyban, clock = struck.bench.keyban, struck.bench.clock

    def transactions() -> dict[str, Any]:
        return {
            order["id"]: order["orderTransactions"]["nodes"][0]["assetTransfer"]["transaction"]
            for order in orders(struck.bench, pageSize=100)
        }

    calm = transactions()
    keyban.weather.begin("reincluded")
    assert transactions() == calm  # what was served was true when it was served
    keyban.weather.end()
    moved = transactions()
    assert all(moved[order]["id"] != calm[order]["id"] for order in calm)
    assert len(keyban.standing()) == 6

    keyban.weather.begin("turned", chance=0.5)
    transactions()
    keyban.weather.end()
    standing = {each.id for each in keyban.standing()}
    assert 0 < len(standing) < 6
    assert {order for order, each in transactions().items() if each["success"]} == standing

    keyban.weather.begin("deleted")
    transactions()
    keyban.weather.end()
    clock.pass_by(1)
    assert transactions().keys() == calm.keys() - standing
    assert keyban.standing() == []

    struck.bench.qiibee.weather.begin("turned")
    rows(struck.bench)
    assert {row["status"] for row in rows(struck.bench)} == {"reverted"}


def test_schema_drift_changes_types_words_and_fields(struck: Struck) -> None:
    keyban, qiibee = struck.bench.keyban, struck.bench.qiibee
    calm = get(keyban, ORDERS).document()
    keyban.weather.begin("retyped")
    drifted = get(keyban, ORDERS).document()
    keyban.weather.end()
    assert (calm["total"], drifted["total"]) == (6, "6")
    transfer = drifted["data"][0]["orderTransactions"]["nodes"][0]["assetTransfer"]
    assert (transfer["value"], type(transfer["transaction"]["blockNumber"])) == (10, int)
    assert get(keyban, ORDERS).document() == calm

    qiibee.weather.begin("retyped")
    assert {type(row["id"]) for row in rows(struck.bench)} == {str}
    qiibee.weather.end()
    qiibee.weather.begin("unknown_word")
    words = {
        word
        for _ in range(12)
        for row in rows(struck.bench)
        for word in (row["status"], row["loyalty_event_type"], row["token"]["type"], row["token"]["status"])
    }
    assert words >= {"awaiting_settlement", "seasonal_bonus", "stablecoin", "sunset"}
    qiibee.weather.end()

    def keys(document: Any, at: str = "") -> set[str]:
        if isinstance(document, Mapping):
            return {at} | {key for name, each in document.items() for key in keys(each, f"{at}/{name}")}
        return {key for each in document for key in keys(each, at)} if isinstance(document, list) else {at}

    keyban.weather.begin("missing_field")
    missing = {key for _ in range(30) for key in keys(calm) - keys(get(keyban, ORDERS).document())}
    assert {"/total", "/data/orderTransactions/nodes"} <= missing
    assert "/data/id" not in missing


def test_pages_shift_while_they_are_read(bench: Bench) -> None:
    account: Account = bench.keyban.open_account()
    for _ in range(20):
        bench.keyban.mint(account, 10, AT_ONCE)
        bench.clock.pass_by(1)
    bench.keyban.weather.begin("page_drift")
    pages = [[order["id"] for order in orders(bench, currentPage=page)] for page in (1, 2, 3)]
    assert set(pages[0]) & set(pages[1])  # the stranger pushed a row over the edge
    assert len({order for page in pages for order in page}) == 20
    assert len(bench.keyban.movements) == 22


def test_a_spell_has_a_beginning_and_an_end(bench: Bench) -> None:
    start = bench.clock.now
    bench.keyban.weather.begin("F117", since=start + 10, until=start + 20)
    statuses = []
    for _ in range(4):
        statuses.append(get(bench.keyban, ORDERS).status)
        bench.clock.pass_by(8)
    assert statuses == [200, 200, 401, 200]
    with pytest.raises(ValueError, match="no fault is called F999"):
        bench.keyban.weather.begin("F999")


def test_the_catalogue_of_partner_faults_is_whole() -> None:
    assert tuple(f"F11{digit}" for digit in range(9)) == CODES
