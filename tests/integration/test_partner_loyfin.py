"""Loyfin's API from a simulated one: hints about actions under way or refused, and receipts beside our own events."""

from __future__ import annotations

import json
import random
from contextlib import suppress

import pytest

from indexer.commands.wiring import plain
from indexer.model.types import Address
from indexer.partners import loyfin
from indexer.partners.client import Denied, PartnerError, Refused, Unavailable
from indexer.partners.credential import PROBE
from indexer.partners.loyfin import LIMIT, LoyfinPoller
from indexer.partners.orders import Unusable
from indexer.sandbox.partners.faults import FAULTS
from indexer.sandbox.partners.loyfin import LoyfinApi, Mined, Stored
from indexer.sandbox.partners.wire import Reply, Request, answer
from indexer.store.database import Database
from indexer.store.overview import overview
from indexer.terminal import status_text
from tests.partner_office import BRAND, Time, office
from tests.world import ISSUER, World, hexa


def action(leg: dict[str, str]) -> dict[str, str]:
    return {
        "issuer": leg["issuer"], "from": leg["holder"], "loyaltyId": leg["loyaltyId"], "amount": leg["amount"], "nonce": leg["nonce"],
        "operationHash": leg.get("operationHash", "0x" + "00" * 32), "chainId": leg["chainId"], "verifyingContract": "0x" + "fa" * 20,
    }  # fmt: skip


async def test_hints_come_and_go_and_differences_are_shown(database: Database, dsn: str) -> None:
    time = Time()
    api = LoyfinApi(seed=2, clock=time.now)
    async with World.at(dsn) as world, office(database, api, time, name="loyfin") as desk:
        rng = random.Random(1)
        legs = [world.leg(nonce=hexa(rng.randbytes(32)), operationHash=hexa(rng.randbytes(32))) for _ in range(3)]
        operations = [await world.register(leg, reference=f"r{n}") for n, leg in enumerate(legs)]
        stored = [api.store("redemption", action(leg), "0x5157")[0] for leg in legs]
        for _ in range(120):
            api.stranger()  # of other brands: pages of them
        poller = LoyfinPoller(desk.desk, [Address(ISSUER)], 15.0)
        await desk.touched()
        api.submitted(stored[0], "0x" + "0a" * 32)
        api.ended(stored[1], "cancelled")
        await poller.look()
        hints = {row["record_id"]: row for row in await desk.rows("SELECT * FROM indexer.partner_hint")}
        assert {(h["status"], h["reason"]) for h in hints.values()} == {("submitted", None), ("rejected", "cancelled")}
        assert await desk.touched() == set(operations[:2])
        assert "5157" not in json.dumps([r[0] for r in await desk.rows("SELECT raw FROM indexer.partner_record")])
        await poller.look()
        assert await desk.touched() == set()

        # the first is mined: our follower holds the event, and the API says another block
        await world.event(5, legs[0])
        await world.heads(head=9, safe=9, finalized=9)
        await database.pool.execute(
            "INSERT INTO indexer.touched_operation (operation_id) SELECT id FROM indexer.operation"
        )
        told = await world.settle()
        assert "operation.ready" in told
        await database.pool.execute(
            "UPDATE indexer.outbox SET sequence = position WHERE brand = $1", BRAND
        )  # as the sequencer does
        ours = (await desk.rows("SELECT * FROM indexer.movement"))[0]
        api.mined(stored[0], Mined("0x" + ours["tx_hash"].hex(), 77, 0, "0x" + "70" * 20))
        await poller.cross_check()
        assert desk.oddities()["difference"] == 1
        state = (await desk.rows("SELECT state FROM indexer.partner_account WHERE partner = 'loyfin'"))[0][0]
        assert "block 77 in the API, 5 on the chain" in state["differences"][0]["what"]
        await poller.cross_check()
        assert desk.oddities()["difference"] == 1  # each is told once

        # a person sees it in the status, beside what is refused
        api.keys.add("another key")
        with pytest.raises(Denied):
            await poller.look()
        await desk.desk.note_health()
        async with database.pool.acquire() as conn:
            seen = await overview(conn)
            assert (await overview(conn, "rose")).partners == []
        (account,) = seen.partners
        assert account.refused is not None and "401" in account.refused and account.answered_at is not None
        assert [each.what for each in account.differences] == [state["differences"][0]["what"]]
        text = status_text(plain(seen))
        assert "loyfin account of bloom: REFUSED since" in text and "block 77 in the API, 5 on the chain" in text
        assert ": operations: HTTP 401" in text, "and whose it is is said once"
        api.keys.clear()
        time.ahead += PROBE + 1
        await poller.look()
        api.weather.begin("server_error")
        with pytest.raises(Unavailable):
            await poller.look()
        await desk.desk.note_health()
        async with database.pool.acquire() as conn:
            text = status_text(plain(await overview(conn)))
        assert "loyfin account of bloom: operations: HTTP 5" in text and "(it answered well last at 20" in text


async def test_hints_behind_any_number_of_pages_are_read_and_new_ones_at_once(
    database: Database, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loyfin, "PAGES", 2)
    time = Time()
    api = LoyfinApi(seed=2, clock=time.now)
    async with World.at(dsn) as world, office(database, api, time, name="loyfin") as desk:
        rng = random.Random(1)

        def refused() -> str:
            leg = world.leg(nonce=hexa(rng.randbytes(32)))
            stored = api.store("redemption", action(leg), "0x5157")[0]
            api.ended(stored, "rejected")
            return stored.moved.id

        async def known() -> set[str]:
            return {row[0] for row in await desk.rows("SELECT record_id FROM indexer.partner_hint")}

        poller = LoyfinPoller(desk.desk, [Address(ISSUER)], 15.0)
        for newest_first in (True, False):
            api.newest_first = newest_first
            made = {refused() for _ in range(3 * LIMIT)}
            for number in range(5):
                poller = LoyfinPoller(
                    desk.desk, [Address(ISSUER)], 15.0
                )  # started anew each time: it goes on where it was
                if number == 2:  # nor does an outage set it back
                    api.weather.begin("server_error")
                    with pytest.raises(PartnerError):
                        await poller.look()
                    api.weather.end()
                await poller.look()
            assert made <= await known()
        # what comes while the long listing is still being read is not kept waiting
        api.newest_first = True
        await poller.look()
        asked = len(desk.requests)
        late = refused()
        await poller.look()
        assert late in await known() and len(desk.requests) - asked <= 2 * 2 + 2
        # a cursor that is not good any more costs a round, and loses nothing
        poller._behind = dict.fromkeys(poller._behind or {"x": ""}, "nonsense")
        await poller.look()
        await poller.look()
        assert made <= await known()


async def test_an_issuer_or_a_receipt_that_is_refused_holds_up_no_other(database: Database, dsn: str) -> None:
    time = Time()
    api = LoyfinApi(seed=2, clock=time.now)
    async with World.at(dsn) as world, office(database, api, time, name="loyfin") as desk:
        rng = random.Random(1)
        legs = [world.leg(nonce=hexa(rng.randbytes(32)), operationHash=hexa(rng.randbytes(32))) for _ in range(2)]
        stored = [api.store("redemption", action(leg), "0x5157")[0] for leg in legs]
        for each in stored:
            api.ended(each, "rejected")
        first, original = Address(b"\x00" * 20), api.route
        bad = {legs[0]["operationHash"], "0x" + bytes(first).hex()}

        def route(request: Request) -> Reply:
            return answer({"error": "gone"}, 404) if bad & set(request.query.values()) else original(request)

        api.route = route  # type: ignore[method-assign]
        poller = LoyfinPoller(desk.desk, [first, Address(ISSUER)], 15.0)
        with pytest.raises(Refused):
            await poller.look()
        assert len(await desk.rows("SELECT FROM indexer.partner_hint")) == 2

        for number, leg in enumerate(legs):
            await world.register(leg, reference=f"r{number}")
            await world.event(5 + number, leg)
        await world.heads(head=9, safe=9, finalized=9)
        assert (await world.settle()).count("operation.ready") == 2
        await database.pool.execute("UPDATE indexer.outbox SET sequence = position WHERE brand = $1", BRAND)
        for number, each in enumerate(stored):
            api.mined(each, Mined("0x" + "0b" * 32, 77, number, "0x" + "70" * 20))
        await poller.cross_check()
        assert desk.oddities()["difference"] >= 1
        asked = len(desk.requests)
        await poller.cross_check()
        assert len(desk.requests) == asked, "the refused one is not asked for ever"


#: By fault: what it is counted by, where an answer of Loyfin's API can show it at all.
COUNTED = {
    "server_error": "server_error", "rate_limited": "rate_limited", "dropped": "unreachable", "html": "not_json",
    "endless_body": "too_large", "cut_off": "not_json", "duplicates": "duplicate", "unknown_word": "unknown_word",
    "missing_field": "missing_field", "retyped": "type", "clock_skew": "clock_skew", "expired": "denied", "forbidden": "denied",
}  # fmt: skip


async def test_whatever_loyfins_api_answers_hints_follow_it_and_none_is_lost(database: Database, dsn: str) -> None:
    time, rng = Time(), random.Random(4)
    api = LoyfinApi(seed=4, clock=time.now)
    async with World.at(dsn) as world, office(database, api, time, name="loyfin", max_body=2**18) as desk:
        stored = []

        def more(count: int) -> None:
            for _ in range(count):
                each = api.store("redemption", action(world.leg(nonce=hexa(rng.randbytes(32)))), "0x5157")[0]
                stored.append(each)
                change(each)

        def change(each: Stored) -> None:
            if rng.random() < 0.5:
                api.submitted(each, hexa(rng.randbytes(32)))
            else:
                api.ended(each, rng.choice(("rejected", "cancelled")))

        async def look() -> None:
            with suppress(PartnerError, Unusable):
                await poller.look()

        def seen() -> dict[str, float]:
            return desk.oddities() | desk.outcomes()

        poller = LoyfinPoller(desk.desk, [Address(ISSUER)], 15.0)
        for fault in FAULTS:
            if fault == "silence":
                continue  # as `dropped`, only slower
            more(3)
            before = seen()
            api.weather.begin(fault, chance=0.7)
            for _ in range(4):
                change(rng.choice(stored))
                await look()
            api.weather.end()
            if fault in COUNTED:
                assert seen().get(COUNTED[fault], 0) > before.get(COUNTED[fault], 0), (fault, seen())
            time.ahead += PROBE + 100
            await poller.look()
            hints = {row["record_id"]: row["status"] for row in await desk.rows("SELECT * FROM indexer.partner_hint")}
            assert hints == {e.moved.id: "submitted" if e.status == "submitted" else "rejected" for e in stored}, fault
        assert desk.desk.client.health.problem is None
