"""Keyban's orders from a simulated partner on a socket into a real store: what is kept, what counts, what is taken back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from indexer.partners.client import Denied, Unavailable
from indexer.partners.credential import DOUBTS, PROBE
from indexer.partners.orders import Ledger
from indexer.partners.walk import Walk
from indexer.sandbox.partners.keyban import Keyban
from indexer.sandbox.partners.movement import AT_ONCE, STUCK, Course
from indexer.sandbox.partners.wire import Reply, Request, answer
from indexer.store.database import Database
from indexer.store.partner_accounts import Account, OpenWallet
from tests.partner_office import BRAND, KEY, Office, Time, at_work, office


def simulator(time: Time, **given: object) -> Keyban:
    return Keyban(seed=3, clock=time.now, keys=[KEY], **given)  # type: ignore[arg-type]


def mint(wallet: str, amount: int) -> dict[str, str]:
    return {"kind": "keyban.mint", "walletId": wallet, "amount": str(amount)}


async def test_orders_become_evidence_change_vanish_and_return(database: Database) -> None:
    time = Time()
    partner = simulator(time)
    account = partner.open_account()
    async with office(database, partner, time, name="keyban") as desk:
        operation = await desk.register(mint(account.wallet, 120), reference="a")
        poller = desk.keyban()
        queued = partner.mint(account, 120, Course(0.0, None, None))
        await poller.look(await desk.wallet(account.wallet))
        assert [t["status"] for t in await desk.transfers()] == []  # queued: no node, no evidence yet

        done = partner.mint(account, 120, AT_ONCE)
        burned = partner.burn(account, 40, AT_ONCE)
        partner.mint(account, 60, Course(0.0, 0.0, 0.0, fails=True))
        await desk.touched()
        await poller.look(await desk.wallet(account.wallet))
        found = {t["record_id"]: t for t in await desk.transfers()}
        assert found[done.id]["status"] == "succeeded" and int(found[done.id]["amount"]) == 120
        assert found[done.id]["time_ms"] is not None and not found[done.id]["undated"]
        assert found[done.id]["tx_hash"] and found[done.id]["settled_at"] is not None
        assert (found[burned.id]["kind"], int(found[burned.id]["amount"])) == ("keyban.burn", 40)
        assert sorted(t["status"] for t in found.values()) == ["failed", "succeeded", "succeeded"]
        assert await desk.touched() == {operation}

        await poller.look(await desk.wallet(account.wallet))
        assert await desk.touched() == set()  # read again, nothing new
        assert len(await desk.rows("SELECT * FROM indexer.partner_record WHERE version > 1")) == 0

        # turned: what had succeeded is failed now
        done.turned_at = time.now()
        await poller.look(await desk.wallet(account.wallet))
        found = {t["record_id"]: t for t in await desk.transfers()}
        assert found[done.id]["status"] == "failed" and found[done.id]["settled_at"] is None
        assert await desk.touched() == {operation}
        assert desk.oddities()["unsettled"] == 1 and desk.oddities()["changed"] >= 1

        # gone: withdrawn after two full sweeps, not after one
        burned.deleted_at = time.now()
        await poller.look(await desk.wallet(account.wallet))
        assert {t["record_id"]: t for t in await desk.transfers()}[burned.id]["withdrawn_at"] is None
        await poller.look(await desk.wallet(account.wallet))
        assert {t["record_id"]: t for t in await desk.transfers()}[burned.id]["withdrawn_at"] is not None
        assert desk.oddities()["withdrawn"] == 1
        burned.deleted_at = None
        await poller.look(await desk.wallet(account.wallet))
        assert {t["record_id"]: t for t in await desk.transfers()}[burned.id]["withdrawn_at"] is None
        assert desk.oddities()["returned"] == 1
        assert queued.id not in found


async def test_every_page_is_read_whatever_the_size_and_values_are_scaled_exactly(database: Database) -> None:
    time = Time()
    partner = simulator(time)
    account = partner.open_account()
    async with office(database, partner, time, name="keyban") as desk:
        await desk.register(mint(account.wallet, 10), reference="a")
        for number in range(230):
            partner.mint(account, Decimal(number + 1) / 4, AT_ONCE)
        await desk.keyban(Ledger(BRAND, "StellarTestnet", decimals=2)).look(await desk.wallet(account.wallet))
        amounts = sorted(int(t["amount"]) for t in await desk.transfers())
        assert amounts == [25 * (number + 1) for number in range(230)]
        # without decimals a fraction is no base unit: kept as received, and no evidence of an integer leg
        await desk.keyban().look(await desk.wallet(account.wallet))
        found = await desk.transfers()
        assert len(found) == 230 and sum(t["amount"] is not None for t in found) == 57
        assert {t["amount_text"] for t in found} >= {"0.25", "57.5"}


async def test_a_transfer_without_a_time_settles_by_decision_only_if_it_was_there_first(database: Database) -> None:
    time = Time()
    partner = simulator(time)
    account = partner.open_account()
    async with office(database, partner, time, name="keyban") as desk:
        await desk.register(mint(account.wallet, 10), reference="a")
        partner.mint(account, 10, AT_ONCE)
        queued = partner.mint(account, 10, Course(0.0, 3600.0, 3600.0))
        poller = desk.keyban()

        original = partner._transaction  # the sheet does not attest `date`: here the API leaves it out

        def without_date(*args: object) -> dict[str, object]:
            found = dict(original(*args))  # type: ignore[arg-type]
            found.pop("date", None)
            return found

        partner._transaction = without_date  # type: ignore[method-assign, assignment]
        await poller.look(await desk.wallet(account.wallet))
        first = (await desk.transfers())[0]
        assert first["undated"] and first["time_ms"] is None
        looked = (await desk.wallet(account.wallet)).last_look
        partner.mint(account, 10, AT_ONCE)
        await poller.look(await desk.wallet(account.wallet))
        first, second = await desk.transfers()
        assert first["undated"] and not second["undated"]
        assert looked is not None and second["time_ms"] == int(looked * 1000)

        # queued at the first look: it was made before that, whenever it is done
        time.ahead = 3700.0
        await poller.look(await desk.wallet(account.wallet))
        done = next(t for t in await desk.transfers() if t["record_id"] == queued.id)
        assert done["status"] == "succeeded" and done["undated"] and done["time_ms"] is None


async def test_a_record_that_cannot_be_read_any_more_takes_nothing_back(database: Database) -> None:
    time = Time()
    partner = simulator(time)
    account = partner.open_account()
    async with office(database, partner, time, name="keyban") as desk:
        await desk.register(mint(account.wallet, 10), reference="a")
        made = partner.mint(account, 10, AT_ONCE)
        poller = desk.keyban()
        await poller.look(await desk.wallet(account.wallet))
        before = await desk.transfers()
        await desk.touched()
        original = partner._node

        def odd(change: Callable[[dict[str, Any]], object]) -> None:
            def node(*args: Any) -> dict[str, Any]:
                found = original(*args)
                change(found["assetTransfer"])
                return found

            partner._node = node  # type: ignore[method-assign]

        for change in (
            lambda transfer: transfer.update(value="12,5 points"),
            lambda transfer: transfer.update(value={"units": 10}),
            lambda transfer: transfer["transaction"].update(blockNumber="soon"),
            lambda transfer: transfer["transaction"].update(success="perhaps"),
            lambda transfer: transfer["transaction"].update(id=["0x1", "0x2"]),
            lambda transfer: transfer.update(toId=["x"]),
            lambda transfer: transfer.update(toId={"wallet": "x"}),
            lambda transfer: transfer.update(transaction=7),
            lambda transfer: transfer.update(fromId=None, toId=None),
        ):
            odd(change)
            await poller.look(await desk.wallet(account.wallet))
            assert await desk.transfers() == before and await desk.touched() == set()
        whole = partner._order
        for nodes in ("none", {"nodes": "none"}, {"nodes": ["none"]}, {"nodes": [{"assetTransfer": "none"}]}):
            partner._order = lambda made, nodes=nodes: whole(made) | {"orderTransactions": nodes}  # type: ignore[method-assign, misc]
            await poller.look(await desk.wallet(account.wallet))
            assert await desk.transfers() == before and await desk.touched() == set(), nodes
        partner._order = whole  # type: ignore[method-assign]
        assert desk.oddities()["unreadable"] >= 8 and desk.oddities()["quarantined"] >= 5
        assert "unsettled" not in desk.oddities()
        # what it says plainly counts, whatever else cannot be read
        made.turned_at = time.now()
        odd(lambda transfer: transfer.update(value="12,5 points"))
        await poller.look(await desk.wallet(account.wallet))
        assert (await desk.transfers())[0]["status"] == "failed"


async def test_one_order_to_two_watched_wallets_is_evidence_for_each(database: Database) -> None:
    time = Time()
    partner = simulator(time)
    one, other = partner.open_account(), partner.open_account()
    async with office(database, partner, time, name="keyban") as desk:
        for account in (one, other):
            await desk.register(mint(account.wallet, 10), reference=account.wallet)
        made = partner.mint(one, 10, AT_ONCE)
        partner._by_wallet[other.wallet] = [made]
        original = partner._order

        def order(moved: Any) -> dict[str, Any]:
            found = original(moved)
            (node,) = found["orderTransactions"]["nodes"]
            twin = node["assetTransfer"] | {"toId": other.wallet, "id": "second"}
            found["orderTransactions"]["nodes"].append({"assetTransfer": twin})
            return found

        partner._order = order  # type: ignore[method-assign]
        poller = desk.keyban()
        for account in (one, other, one):
            await poller.look(await desk.wallet(account.wallet))
        found = await desk.transfers()
        assert {t["wallet"] for t in found} == {one.wallet, other.wallet} and len({t["id"] for t in found}) == 2
        assert {int(t["amount"]) for t in found} == {10}

        # each listing speaks for its own wallet: what two of them lack is gone there, whichever showed the order first
        async def gone() -> set[str]:
            return {t["wallet"] for t in await desk.transfers() if t["withdrawn_at"] is not None}

        for absent, still in ((other, one), (one, other)):
            await desk.touched()
            shown, partner._by_wallet[absent.wallet] = partner._by_wallet[absent.wallet], []
            partner.mint(absent, 5, AT_ONCE)  # the listing is not empty: that would be believed late
            for lacked in (set(), {absent.wallet}, {absent.wallet}):
                for account in (absent, still):
                    await poller.look(await desk.wallet(account.wallet))
                assert await gone() == lacked
            assert len(await desk.touched()) == 1
            partner._by_wallet[absent.wallet] += shown
            await poller.look(await desk.wallet(absent.wallet))
            assert await gone() == set()

        # a listing of everything shows an order that cannot be read to all who knew it
        partner._order = lambda moved: original(moved) | {"orderTransactions": "none"}  # type: ignore[method-assign]
        for _ in range(3):
            walk = Walk(rows={made.id: partner._order(made)}, complete=True)
            await poller._share_out([one.wallet, other.wallet], walk, desk.desk.wall)
        assert made.id not in {t["record_id"] for t in await desk.transfers() if t["withdrawn_at"] is not None}


async def test_what_two_brands_can_read_is_evidence_for_one(database: Database) -> None:
    time = Time()
    partner = simulator(time)
    account = partner.open_account()
    async with office(database, partner, time, name="keyban") as desk:
        await desk.register(mint(account.wallet, 10), reference="a")
        made = partner.mint(account, 10, AT_ONCE)
        await desk.keyban().look(await desk.wallet(account.wallet))
        (before,) = await desk.transfers()

        # a second brand reads the same account, whatever the configuration's check has missed
        rose = Account("rose", "keyban")
        await database.pool.execute("INSERT INTO indexer.brand (name) VALUES ('rose')")
        await database.pool.execute("INSERT INTO indexer.partner_account (brand, partner) VALUES ('rose', 'keyban')")
        desk.desk.account = rose
        poller = desk.keyban(Ledger("rose", "StellarTestnet"))
        wallet = OpenWallet(account.wallet, 1, 0.0, 0, None, None, None)
        for _ in range(3):
            await poller.look(wallet)
        assert await desk.transfers() == [before]
        assert desk.oddities()["foreign"] == 1, "told once"

        # a leg that waits for it may have it, whoever read it first; until a leg stands on it
        leg = mint(account.wallet, 10)
        request = {"brand": "rose", "reference": "r", "legs": [leg]}
        operation = await database.pool.fetchval("SELECT loyalty.register_operation($1)", request)
        await poller.look(wallet)
        assert await desk.transfers() == [before], "whose leg waits too, and who read it first, has the first choice"

        async def a_minute_later() -> None:
            await database.pool.execute(
                "UPDATE indexer.partner_transfer SET settled_at = settled_at - interval '1 minute'"
            )

        await a_minute_later()
        await poller.look(wallet)
        assert [t["brand"] for t in await desk.transfers()] == ["rose"]
        await database.pool.execute(
            "INSERT INTO indexer.claim (operation_id, leg, evidence_id, basis) VALUES ($1, 0, $2, 'wallet_amount')",
            UUID(operation["id"]),
            before["id"],
        )
        desk.desk.account = Account(BRAND, "keyban")
        await a_minute_later()
        await desk.keyban().look(await desk.wallet(account.wallet))
        assert [t["brand"] for t in await desk.transfers()] == ["rose"]
        await database.pool.execute("DELETE FROM indexer.claim")
        await desk.keyban().look(await desk.wallet(account.wallet))
        assert [t["brand"] for t in await desk.transfers()] == [BRAND]
        await database.pool.execute("UPDATE indexer.operation SET state = 'cancelled'")
        desk.desk.account = rose

        # once it is gone from the first brand's account, and nothing stands on it, it may be the second's
        await database.pool.execute("UPDATE indexer.partner_transfer SET withdrawn_at = now()")
        await poller.look(wallet)
        (after,) = await desk.transfers()
        assert (after["brand"], after["id"], after["withdrawn_at"]) == ("rose", before["id"], None)
        assert after["record_id"] == made.id
        assert after["transfers"] == [f"{after['tx_hash']}/{after['tx_hash']}:0"]

        # nor is it kept for an account that nobody has any more
        await database.pool.execute("UPDATE indexer.partner_account SET active = brand <> 'rose'")
        desk.desk.account = Account(BRAND, "keyban")
        await desk.keyban().look(wallet)
        assert [t["brand"] for t in await desk.transfers()] == [BRAND]


@pytest.mark.parametrize(
    ("fault", "counter"),
    [
        ("server_error", "server_error"),
        ("dropped", "unreachable"),
        ("html", "not_json"),
        ("endless_body", "too_large"),
        ("cut_off", "not_json"),
        ("rate_limited", "rate_limited"),
        ("silence", "timeout"),
    ],
)
async def test_a_bad_answer_is_counted_and_loses_nothing(database: Database, fault: str, counter: str) -> None:
    time = Time()
    partner = simulator(time)
    account = partner.open_account()
    async with office(database, partner, time, name="keyban", timeout=1.0, max_body=2**20) as desk:
        await desk.register(mint(account.wallet, 10), reference="a")
        made = partner.mint(account, 10, AT_ONCE)
        partner.weather.begin(fault)
        poller = desk.keyban()
        with pytest.raises(Exception) as caught:
            await poller.look(await desk.wallet(account.wallet))
        assert KEY not in str(caught.value) and "keyban account of bloom, orders" in str(caught.value)
        assert desk.outcomes()[counter] >= 1
        assert desk.hosted.sent < 64 * 2**20  # of the 200 MB nothing like all was taken
        assert not await desk.transfers()
        partner.weather.end()
        await poller.look(await desk.wallet(account.wallet))
        assert [t["record_id"] for t in await desk.transfers()] == [made.id]


async def test_a_refused_key_stops_everything_until_a_probe(database: Database) -> None:
    time = Time()
    partner = simulator(time)
    account = partner.open_account()
    async with office(database, partner, time, name="keyban") as desk:
        await desk.register(mint(account.wallet, 10), reference="a")
        partner.weather.begin("expired")
        poller = desk.keyban()
        for _ in range(3):
            with pytest.raises(Denied):
                await poller.look(await desk.wallet(account.wallet))
        assert desk.outcomes() == {"denied": 1}  # asked once
        await desk.desk.note_health()
        shown = (await desk.rows("SELECT stopped_at, stopped_reason FROM indexer.partner_account"))[0]
        assert shown[0] is not None and "the key" in shown[1] and KEY not in shown[1]
        partner.weather.end()
        with pytest.raises(Denied):
            await poller.look(await desk.wallet(account.wallet))
        time.ahead += 301
        await poller.look(await desk.wallet(account.wallet))
        await desk.desk.note_health()
        assert (await desk.rows("SELECT stopped_at FROM indexer.partner_account"))[0][0] is None


async def test_what_changes_shape_is_read_all_the_same_and_each_oddity_is_counted(database: Database) -> None:
    time = Time()
    partner = simulator(time)
    account = partner.open_account()
    async with office(database, partner, time, name="keyban") as desk:
        await desk.register(mint(account.wallet, 10), reference="a")
        poller = desk.keyban()
        for amount in range(10, 130):
            partner.mint(account, amount, AT_ONCE)
        partner.stranger = lambda: partner.mint(account, 7, AT_ONCE)  # type: ignore[method-assign]

        async def look(*faults: str) -> None:
            partner.weather.begin(*faults)
            # a wallet whose full sweep is due: every page is read
            await poller.look(_due(await desk.wallet(account.wallet)))
            partner.weather.end()

        await look()
        settled = sorted((t["record_id"], t["status"], t["amount"]) for t in await desk.transfers())
        for fault, counter in [
            ("retyped", "type"),
            ("missing_field", "missing_field"),
            ("duplicates", "duplicate"),
            ("page_drift", "page_drift"),
            ("empty_list", "empty_list"),
        ]:
            before = desk.oddities().get(counter, 0)
            await look(fault)
            assert desk.oddities().get(counter, 0) > before, (fault, desk.oddities())
            known = {row[0] for row in settled}
            now = sorted(
                (t["record_id"], t["status"], t["amount"]) for t in await desk.transfers() if t["record_id"] in known
            )
            assert now == settled, fault
        assert "unsettled" not in desk.oddities()
        partner.weather.begin("clock_skew")
        partner.mint(account, 1000, AT_ONCE)
        await look("clock_skew")
        assert desk.oddities()["clock_skew"] >= 1
        partner.weather.begin("late")
        hidden = partner.mint(account, 2000, AT_ONCE)
        await look("late")
        partner.weather.begin("late")
        time.ahead += 200
        await poller.look(_due(await desk.wallet(account.wallet)))
        await poller.look(_due(await desk.wallet(account.wallet)))
        assert hidden.id in {t["record_id"] for t in await desk.transfers()}


def _due(wallet: OpenWallet) -> OpenWallet:
    return replace(wallet, swept=None)


async def test_a_poller_finds_what_is_registered_while_it_runs(database: Database) -> None:
    """The whole loop, at its own pace: registrations wake it, orders are stored, the reconciler is woken."""
    time = Time()
    partner = simulator(time)
    accounts = [partner.open_account() for _ in range(30)]
    async with office(database, partner, time, name="keyban") as desk:
        desk.desk.clock = type(desk.desk.clock)()
        async with at_work(desk.desk, desk.keyban()):
            for number, account in enumerate(accounts):
                partner.mint(account, 10, AT_ONCE if number else STUCK)
                await desk.register(mint(account.wallet, 10), reference=f"r{number}")
            desk.desk.wakeups.poke("registered")
            async with asyncio.timeout(60):
                while len([t for t in await desk.transfers() if t["status"] == "succeeded"]) < 29:
                    await asyncio.sleep(0.05)
            assert "orders_all" in {endpoint for endpoint, _ in desk.requests}  # many were due at once: one listing


async def _settles(desk: Office, wallets: int, within: float = 20.0) -> None:
    """Waits until so many wallets have evidence that counts."""
    async with asyncio.timeout(within):
        while len({t["wallet"] for t in await desk.transfers() if t["status"] == "succeeded"}) < wallets:
            desk.desk.wakeups.poke("registered")
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("status", [403, 404])
async def test_a_wallet_that_is_refused_holds_up_no_other(database: Database, status: int) -> None:
    time = Time()
    partner = simulator(time)
    partner.needs_wallet = True
    accounts = [partner.open_account() for _ in range(12)]
    refused = {account.wallet for account in accounts[:2]}
    async with office(database, partner, time, name="keyban") as desk:
        original = partner._orders

        def orders(request: Request) -> Reply:
            if request.query.get("walletId") in refused:
                return answer({"title": "No", "status": status, "detail": "not this one"}, status)
            return original(request)

        partner._orders = orders  # type: ignore[method-assign]
        for account in accounts:
            partner.mint(account, 10, AT_ONCE)
            await desk.register(mint(account.wallet, 10), reference=account.wallet)
        started = desk.desk.clock.now()
        async with at_work(desk.desk, desk.keyban(poll=0.2)):
            await _settles(desk, 10)
            assert desk.desk.clock.now() - started < 10, "nobody waits for a probe"
            (shown,) = await desk.rows("SELECT problem, stopped_reason FROM indexer.partner_account")
            if status == 403:  # it is told all the same, and not forgotten with the next good answer
                assert sorted(refused)[0] in shown["stopped_reason"] and shown["problem"] == shown["stopped_reason"]
            else:
                assert shown["stopped_reason"] is None
            # the door opens again: nobody has to be asked to look
            refused.clear()
            time.ahead += 400
            await _settles(desk, 12)
            await desk.desk.note_health()
            assert (await desk.rows("SELECT stopped_reason FROM indexer.partner_account"))[0][0] is None


async def test_an_endpoint_that_refuses_everybody_is_asked_by_nobody(database: Database) -> None:
    time = Time()
    partner = simulator(time)
    accounts = [partner.open_account() for _ in range(12)]
    async with office(database, partner, time, name="keyban") as desk:
        for account in accounts:
            await desk.register(mint(account.wallet, 10), reference=account.wallet)
        poller = desk.keyban()
        partner.weather.begin("forbidden")
        for account in accounts:
            with pytest.raises(Denied):
                await poller.look(await desk.wallet(account.wallet))
        assert desk.outcomes() == {"denied": DOUBTS}
        refused = desk.desk.client.health.refused
        assert refused is not None and refused.count("403") == 1, "one endpoint, told once"
        partner.weather.end()
        time.ahead += PROBE + 1
        for account in accounts:
            await poller.look(await desk.wallet(account.wallet))
        assert desk.desk.client.health.refused is None


async def test_listings_that_grow_while_they_are_read_starve_nobody(database: Database) -> None:
    time = Time()
    partner = simulator(time)
    growing = [partner.open_account() for _ in range(3)]
    others = [partner.open_account() for _ in range(12)]
    async with office(database, partner, time, name="keyban") as desk:
        for account in growing:
            for _ in range(1_100):
                partner.mint(account, 7, AT_ONCE)
        original = partner._orders

        def orders(request: Request) -> Reply:
            wallet = request.query.get("walletId")
            for account in growing:
                if wallet in (None, account.wallet):
                    partner.mint(account, 7, AT_ONCE)
            return original(request)

        partner._orders = orders  # type: ignore[method-assign]
        for account in [*growing, *others]:
            await desk.register(mint(account.wallet, 7), reference=account.wallet)
        for account in others:
            partner.mint(account, 7, AT_ONCE)
        async with at_work(desk.desk, desk.keyban(poll=0.2)):
            await _settles(desk, len(growing) + len(others))
            # three of twelve pages, read once; the others go between
            assert len(desk.requests) < 100


async def test_a_listing_of_all_that_never_stands_still_is_given_up_for_one_by_one(database: Database) -> None:
    time = Time()
    partner = simulator(time)
    accounts = [partner.open_account() for _ in range(30)]
    async with office(database, partner, time, name="keyban") as desk:
        for _ in range(270):
            partner.stranger()
        original = partner._orders

        def orders(request: Request) -> Reply:
            if "walletId" not in request.query:
                partner.stranger()
            return original(request)

        partner._orders = orders  # type: ignore[method-assign]
        for account in accounts:
            await desk.register(mint(account.wallet, 7), reference=account.wallet)
            partner.mint(account, 7, AT_ONCE)
        async with at_work(desk.desk, desk.keyban(poll=0.2)):
            async with asyncio.timeout(60):
                while await database.pool.fetchval("SELECT count(*) FROM indexer.partner_wallet") < len(accounts):
                    await asyncio.sleep(0.02)
            await _settles(desk, len(accounts))
            assert [endpoint for endpoint, _ in desk.requests].count("orders_all") <= 3 * 4


async def test_wallets_at_rest_that_cannot_be_read_go_behind_the_others(database: Database) -> None:
    time = Time()
    partner = simulator(time)
    accounts = [partner.open_account() for _ in range(3)]
    async with office(database, partner, time, name="keyban") as desk:
        for account in accounts:
            await database.pool.execute(
                "INSERT INTO indexer.partner_wallet (brand, partner, wallet, first_look_at, last_look_at, next_look_at)"
                " VALUES ($1, 'keyban', $2, now(), now(), now() - interval '1 day')",
                BRAND,
                account.wallet,
            )
        original = partner._orders
        partner._orders = lambda request: (  # type: ignore[method-assign]
            answer({}, 404) if request.query["walletId"] == accounts[0].wallet else original(request)
        )
        poller = desk.keyban()
        while await poller._look_at_idle():
            pass
        assert await database.pool.fetchval("SELECT min(next_look_at) > now() FROM indexer.partner_wallet")


async def test_unavailable_says_what_came_instead(database: Database) -> None:
    time = Time()
    partner = simulator(time)
    account = partner.open_account()
    async with office(database, partner, time, name="keyban") as desk:
        await desk.register(mint(account.wallet, 10), reference="a")
        partner.weather.begin("html")
        with pytest.raises(Unavailable, match="502 Bad Gateway"):
            await desk.keyban().look(await desk.wallet(account.wallet))
        await desk.desk.note_health()
        assert "502 Bad Gateway" in (await desk.rows("SELECT problem FROM indexer.partner_account"))[0][0]
