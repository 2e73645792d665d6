"""qiibee's transactions from a simulated partner on a socket into a real store; and nobody's name with them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from indexer.partners import qiibee as qiibee_module
from indexer.partners.client import Refused
from indexer.partners.qiibee import Reading
from indexer.partners.schedule import SLOWEST
from indexer.sandbox.partners.movement import AT_ONCE, Course
from indexer.sandbox.partners.qiibee import BASE, Qiibee
from indexer.sandbox.partners.wire import Reply, Request, answer
from indexer.store.database import Database
from tests.partner_office import KEY, Time, office


def credit(auth_id: str, amount: int) -> dict[str, str]:
    return {"kind": "qiibee.credit", "walletId": auth_id, "amount": str(amount)}


async def test_transactions_become_evidence_change_vanish_and_leave_no_name(database: Database) -> None:
    time = Time()
    partner = Qiibee(seed=5, clock=time.now, keys=[KEY])
    ada, ben = partner.enrol(), partner.enrol()
    async with office(database, partner, time, name="qiibee", base=BASE, header="X-API-KEY") as desk:
        poller = desk.qiibee(settle_after=0.4)
        operation = await desk.register(credit(ada.auth_id, 25), reference="a")
        pending = partner.credit(ada, 25, Course(0.0, 0.0, None))
        done = partner.credit(ada, 25, AT_ONCE)
        debit = partner.debit(ben, 100, AT_ONCE)
        partner.credit(ben, 15, Course(0.0, 0.0, 0.0, fails=True))
        partner.other_event("points_to_rewards", ben, 5)
        await poller.look()
        found = {t["record_id"]: t for t in await desk.transfers()}
        assert (found[done.id]["status"], int(found[done.id]["amount"])) == ("succeeded", 25)
        assert found[done.id]["wallet"] == ada.auth_id and found[done.id]["token"] == str(partner.token.id)
        assert found[pending.id]["status"] == "pending"
        assert (found[debit.id]["kind"], int(found[debit.id]["amount"])) == ("qiibee.debit", 100)
        assert len(found) == 4  # a reward is kept as a record and is no evidence
        assert await desk.touched() == {operation}

        # it must stand for a while; when it has, the reconciler hears of it, once
        await poller.look()
        assert await desk.touched() == set()
        while True:
            await poller.look()
            row = {t["record_id"]: t for t in await desk.transfers()}[done.id]
            if (row["seen_at"] - row["settled_at"]).total_seconds() >= 0.4:
                break
        assert await desk.touched() == {operation}
        await poller.look()
        assert await desk.touched() == set()

        # changed: another hash un-settles and settles anew; another word un-settles
        done.inclusion += 1
        await poller.look()
        again = {t["record_id"]: t for t in await desk.transfers()}[done.id]
        assert again["tx_hash"] != row["tx_hash"] and again["settled_at"] > row["settled_at"]
        done.turned_at = time.now()
        await poller.look()
        assert {t["record_id"]: t for t in await desk.transfers()}[done.id]["status"] == "failed"
        assert desk.oddities()["unsettled"] == 2

        # gone: after two sweeps
        time.ahead += 2  # a sweep speaks of what is older than its end
        debit.deleted_at = time.now()
        for expected in (None, "withdrawn"):
            await poller.sweep_if_due()
            gone = {t["record_id"]: t for t in await desk.transfers()}[debit.id]["withdrawn_at"]
            assert (gone is not None) is (expected is not None)

        stored = json.dumps([row[0] for row in await desk.rows("SELECT raw FROM indexer.partner_record")])
        for user in (ada, ben):
            for word in ("email", "first_name", "id"):
                assert user.person[word] not in stored
        assert "Muster" not in stored and ada.auth_id in stored
        versions = await desk.rows("SELECT record_id, count(*) FROM indexer.partner_record GROUP BY 1 ORDER BY 2 DESC")
        assert versions[0][1] <= 3  # a token's status, which moves by itself, makes no version


async def test_ties_and_inserts_while_paging_lose_nothing(database: Database) -> None:
    time = Time()
    partner = Qiibee(seed=6, clock=time.now, keys=[KEY])
    users = [partner.enrol() for _ in range(5)]
    async with office(database, partner, time, name="qiibee", base=BASE, header="X-API-KEY") as desk:
        poller = desk.qiibee()
        for number in range(320):  # whole seconds, all of them the same
            partner.credit(users[number % 5], number + 1, AT_ONCE)
        partner.weather.begin("page_drift", "duplicates", "disorder")
        await poller.look()
        partner.weather.end()
        time.ahead += 2
        await poller.sweep_if_due()
        found = {t["record_id"] for t in await desk.transfers()}
        assert found == set(partner.movements)
        assert desk.oddities()["page_drift"] and desk.oddities()["duplicate"]


async def test_each_oddity_moves_a_counter_and_takes_nothing_back(database: Database) -> None:
    time = Time()
    partner = Qiibee(seed=8, clock=time.now, keys=[KEY])
    user = partner.enrol()
    async with office(database, partner, time, name="qiibee", base=BASE, header="X-API-KEY") as desk:
        poller = desk.qiibee()
        for amount in range(1, 20):
            time.ahead += 1
            partner.credit(user, amount, AT_ONCE)
        await poller.look()
        settled = sorted((t["record_id"], t["status"], t["amount"]) for t in await desk.transfers())
        for fault, counter in [
            ("retyped", "type"),
            ("missing_field", "missing_field"),
            ("disorder", "disorder"),
            ("duplicates", "duplicate"),
            ("empty_list", "empty_list"),
        ]:
            partner.weather.begin(fault)
            for _ in range(6):  # one of several fields drifts at a time
                await poller.look()
                if desk.oddities().get(counter):
                    break
            partner.weather.end()
            assert desk.oddities().get(counter), (fault, desk.oddities())
        await poller.look()
        assert sorted((t["record_id"], t["status"], t["amount"]) for t in await desk.transfers()) == settled
        assert "unsettled" not in desk.oddities()

        # words that nobody knows: an event of a new type is kept, a row of a new status is neither settled nor failed
        partner.weather.begin("unknown_word")
        for _ in range(12):
            await poller.look()
        partner.weather.end()
        assert desk.oddities()["unknown_word"]
        assert {t["status"] for t in await desk.transfers()} <= {"succeeded", "pending"}
        await poller.look()
        assert sorted((t["record_id"], t["status"], t["amount"]) for t in await desk.transfers()) == settled


async def test_an_event_of_a_type_that_nobody_knows_takes_nothing_back(database: Database) -> None:
    time = Time()
    partner = Qiibee(seed=8, clock=time.now, keys=[KEY])
    user = partner.enrol()
    async with office(database, partner, time, name="qiibee", base=BASE, header="X-API-KEY") as desk:
        poller = desk.qiibee()
        partner.credit(user, 25, AT_ONCE)
        await poller.look()
        before = await desk.transfers()
        original = partner._row
        for change in (
            {"loyalty_event_type": "points_v2"},
            {"amount_received": "twenty-five"},
            {"tx_hash": ["0x1"]},
            {"status": 200},
            {"user_to": {"auth_id": ["x"]}, "user": None},
        ):
            partner._row = lambda each, change=change: original(each) | change  # type: ignore[method-assign, misc]
            await poller.look()
            assert await desk.transfers() == before
        assert "unsettled" not in desk.oddities()


async def test_the_first_look_stores_what_it_has_read_and_a_long_history_keeps_nobody_waiting(
    database: Database,
) -> None:
    time = Time()
    partner = Qiibee(seed=9, clock=time.now, keys=[KEY])
    user = partner.enrol()
    async with office(database, partner, time, name="qiibee", base=BASE, header="X-API-KEY") as desk:
        poller = desk.qiibee()
        for points, many, ago in ((1, 400, 5 * 86_400), (2, 250, 0)):
            for number in range(many):
                at = float(number - many - ago)
                partner.credit(user, points, Course(at, at, at))
        original = partner.route
        offsets: list[str] = []

        def third_fails(request: Request) -> Reply:
            offsets.append(request.query.get("offset", ""))
            return original(request) if len(offsets) < 3 else Reply(400, b"{}")

        partner.route = third_fails  # type: ignore[method-assign]
        with pytest.raises(Refused):
            await poller.look()
        assert len(await desk.transfers()) == 190, "two pages, that share ten rows"
        partner.route = original  # type: ignore[method-assign]
        asked = len(desk.requests)
        await poller.look()
        assert len(desk.requests) - asked == 3, "back to what an open leg can be about"
        assert len([t for t in await desk.transfers() if t["amount"] == 2]) == 250
        await poller.look()
        assert len(desk.requests) - asked == 4
        time.ahead += 2
        await poller.sweep_if_due()
        assert len(await desk.transfers()) == 650


async def test_a_row_without_a_time_is_as_old_as_the_last_whole_reading(database: Database) -> None:
    time = Time()
    partner = Qiibee(seed=10, clock=time.now, keys=[KEY])
    user = partner.enrol()
    async with office(database, partner, time, name="qiibee", base=BASE, header="X-API-KEY") as desk:
        poller = desk.qiibee()
        original = partner._row
        partner._row = lambda each: original(each) | {"inserted_at": None}  # type: ignore[method-assign]
        first = partner.credit(user, 25, AT_ONCE)
        await poller.look()
        time.ahead += 2
        await poller.sweep_if_due()
        (swept,) = await desk.rows("SELECT (state -> 'swept_whole')::float8 FROM indexer.partner_account")
        time.ahead += 2
        second = partner.credit(user, 25, AT_ONCE)
        await poller.look()
        found = {t["record_id"]: t for t in await desk.transfers()}
        assert found[first.id]["undated"] and found[first.id]["time_ms"] is None
        assert not found[second.id]["undated"]
        assert found[second.id]["after_ms"] == found[second.id]["time_ms"] == int(swept[0] * 1000)

        # gone, it is missed by those sweeps that read everything
        first.deleted_at = time.now()
        for _ in range(2):
            time.ahead += 90_000
            await poller.sweep_if_due()
        gone = {t["record_id"]: t["withdrawn_at"] is not None for t in await desk.transfers()}
        assert gone == {first.id: True, second.id: False}


async def test_a_row_without_an_id_may_be_any_that_is_missing(database: Database) -> None:
    time = Time()
    partner = Qiibee(seed=11, clock=time.now, keys=[KEY])
    user = partner.enrol()
    async with office(database, partner, time, name="qiibee", base=BASE, header="X-API-KEY") as desk:
        poller = desk.qiibee()
        partner.credit(user, 25, AT_ONCE)
        await poller.look()
        time.ahead += 2
        original = partner._history

        def nameless(request: Request) -> Reply:
            document = original(request).document()
            document["data"].pop("total_tx_count")
            for row in document["data"]["transactions"]:
                del row["id"]
            return answer(document)

        partner._history = nameless  # type: ignore[method-assign]
        for _ in range(3):
            await poller.sweep_if_due()
        assert [t["withdrawn_at"] for t in await desk.transfers()] == [None]
        assert desk.oddities()["quarantined"] >= 3 and "missing" not in desk.oddities()


async def test_an_answer_that_was_long_under_way_never_writes_over_a_later_one(database: Database) -> None:
    time = Time()
    partner = Qiibee(seed=12, clock=time.now, keys=[KEY])
    user = partner.enrol()
    async with office(database, partner, time, name="qiibee", base=BASE, header="X-API-KEY") as desk:
        poller = desk.qiibee()
        made = partner.credit(user, 25, Course(0.0, 0.0, None))
        await poller.look()
        time.ahead += 2
        original = partner._history
        asked = asyncio.Event()

        def slow_sweeps(request: Request) -> Reply:
            reply = original(request)
            if "to_time" not in request.query:
                return reply
            asked.set()
            return replace(reply, delay=0.3)

        partner._history = slow_sweeps  # type: ignore[method-assign]
        sweep = asyncio.create_task(poller.sweep_if_due())
        await asked.wait()
        made.settles_at = time.now()
        await poller.look()
        await sweep
        assert [t["status"] for t in await desk.transfers()] == ["succeeded"]
        assert "unsettled" not in desk.oddities()


async def test_what_a_sweep_showed_is_marked_in_the_store_and_a_change_meanwhile_loses_no_mark(
    database: Database,
) -> None:
    time = Time()
    partner = Qiibee(seed=13, clock=time.now, keys=[KEY])
    user = partner.enrol()
    async with office(database, partner, time, name="qiibee", base=BASE, header="X-API-KEY") as desk:
        poller = desk.qiibee()
        made = [partner.credit(user, 25, Course(at - 300.0, at - 300.0, None)) for at in range(230)]
        lost = made.pop()
        await poller.look()
        time.ahead += 2
        original = partner._history
        pages = 0

        def moving(request: Request) -> Reply:
            """Behind the first page one of its rows goes; and every row changes while the sweep is under way."""
            nonlocal pages
            pages += "to_time" in request.query
            if pages == 2:
                lost.deleted_at = time.now()
                for each in made:
                    each.settles_at = time.now()
            return original(request)

        partner._history = moving  # type: ignore[method-assign]
        before = poller._range

        async def looked_at_the_end(*args: Any) -> Reading:
            found = await before(*args)
            await desk.rows("UPDATE indexer.partner_record SET raw = raw || '{\"x\": 1}'")
            await poller.look()  # every row says something new, and is a new version
            return found

        poller._range = looked_at_the_end  # type: ignore[method-assign]
        for walks, gone in ((2, 0), (3, 0), (4, 1)):  # what one walk of a sweep showed, that sweep did not lack
            await poller.sweep_if_due()
            rows = await desk.rows("SELECT record_id, swept, missing FROM indexer.partner_record WHERE current")
            assert {row[2] for row in rows if row[0] != lost.id} == {0}
            assert {row[0]: row[1] for row in rows if row[1] == walks}.keys() == {each.id for each in made}
            assert len([t for t in await desk.transfers() if t["withdrawn_at"] is not None]) == gone


async def test_what_is_open_again_is_looked_at_though_nobody_registered_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep takes back what had settled while the looks rest: they go on at once, not when their long rest is over."""
    monkeypatch.setattr(qiibee_module, "WAIT", 0.05)
    time = Time()
    partner = Qiibee(seed=12, clock=time.now, keys=[KEY])
    async with office(database, partner, time, name="qiibee", base=BASE, header="X-API-KEY") as desk:
        await desk.rows("UPDATE indexer.partner_account SET active = true")
        poller = desk.qiibee()
        poller._poll = 0.2
        await poller._refresh()
        resting = asyncio.create_task(poller._wait_until(desk.desk.clock.now() + SLOWEST))
        await desk.register(credit(partner.enrol().auth_id, 10), reference="taken back")  # nobody is told
        await asyncio.wait_for(resting, 20)
