"""How a partner's account fares, as it is logged and stored: once per change, and never with a person's name in it."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from indexer.partners import client as client_module
from indexer.partners.client import Denied, Unavailable
from indexer.partners.credential import PROBE
from indexer.sandbox.partners.keyban import Keyban
from indexer.sandbox.partners.movement import AT_ONCE
from indexer.sandbox.partners.qiibee import BASE, Qiibee
from indexer.store.database import Database
from tests.partner_office import KEY, Office, Time, counted, office


async def _ask(desk: Office, endpoint: str = "transactions") -> str | None:
    """One request and the note of its outcome; the error's words."""
    said = None
    try:
        await desk.desk.client.get(endpoint, "/transactions", {"limit": "100", "offset": "0"})
    except client_module.PartnerError as error:
        said = str(error)
    await desk.desk.note_health()
    return said


async def _row(desk: Office) -> tuple[str | None, str | None]:
    (row,) = await desk.rows("SELECT problem, stopped_reason FROM indexer.partner_account")
    return row["problem"], row["stopped_reason"]


async def test_a_refusal_is_told_once_and_so_is_its_end(database: Database) -> None:
    time = Time()
    partner = Qiibee(seed=5, clock=time.now, keys=[KEY])
    async with office(database, partner, time, name="qiibee", base=BASE, header="X-API-KEY") as desk:
        for fault, rounds in (("expired", 3), ("forbidden", 3)):
            with capture_logs() as logs:
                partner.weather.begin(fault)
                for _ in range(rounds):  # refused; left alone, with other words; and probed
                    assert "not accepted" in (await _ask(desk) or "")
                    for _ in range(3):
                        assert "is not used" in (await _ask(desk) or "")
                    time.ahead += PROBE + 1
                problem, stopped = await _row(desk)
                assert stopped is not None and "not accepted" in stopped and problem == stopped
                assert counted(desk.metrics, "loyalty_partner_key_refused", "partner") == {"qiibee": 1.0}
                if fault == "forbidden":  # it speaks of one endpoint, and the rest goes on
                    assert "not accepted" in (await _ask(desk) or "")
                    partner.weather.end()
                    for _ in range(3):
                        assert await _ask(desk, "balances") is None
                        assert "is not used" in (await _ask(desk) or "")
                    assert (await _row(desk))[1] is not None
                    time.ahead += PROBE + 1
                partner.weather.end()
                assert await _ask(desk) is None
                assert await _row(desk) == (None, None)
            told = [(entry["log_level"], entry["event"]) for entry in logs]
            assert told == [
                ("error", "the partner does not accept the key"),
                ("info", "the partner answers again"),
            ], fault


async def test_trouble_is_told_once_by_kind_until_all_is_well(database: Database) -> None:
    time = Time()
    partner = Qiibee(seed=6, clock=time.now, keys=[KEY])
    async with office(database, partner, time, name="qiibee", base=BASE, header="X-API-KEY") as desk:
        with capture_logs() as logs:
            for _ in range(4):
                partner.weather.begin("server_error")
                await _ask(desk)
                partner.weather.end()
                partner.weather.begin("rate_limited")
                await _ask(desk)
                partner.weather.end()
            time.ahead += 120
            assert await _ask(desk) is None
        kinds = [entry["event"] for entry in logs]
        assert kinds.count("the partner answers again") == 1 and len(kinds) <= 4  # 5xx, 429, and the quiet after it


async def test_a_request_is_sent_once_and_each_time_counted(database: Database) -> None:
    """A kept connection that breaks is no licence to ask again unseen: the partner counts that too."""
    time = Time()
    partner = Qiibee(seed=8, clock=time.now, keys=[KEY])
    async with office(database, partner, time, name="qiibee", base=BASE, header="X-API-KEY") as desk:
        assert await _ask(desk) is None
        partner.weather.begin("dropped")
        assert "it closed the connection without an answer" in (await _ask(desk) or "")
        assert len(partner.calls) == 4 and desk.outcomes() == {"ok": 1.0, "unreachable": 3.0}


async def test_half_a_transaction_is_reported_without_the_person_in_it(database: Database) -> None:
    time = Time()
    partner = Qiibee(seed=7, clock=time.now, keys=[KEY])
    user = partner.enrol()
    for amount in range(1, 4):
        partner.credit(user, amount, AT_ONCE)
    async with office(database, partner, time, name="qiibee", base=BASE, header="X-API-KEY") as desk:
        partner.weather.begin("cut_off")
        with capture_logs() as logs, pytest.raises(Unavailable) as told:
            await desk.qiibee().look()
        await desk.desk.note_health()
        assert desk.outcomes() == {"not_json": 3.0}
        written = f"{told.value} {logs} {await _row(desk)}"
        assert "application/json that is no JSON, or broke off: " in written
        for word in ("email", "first_name", "second_name"):
            assert str(user.person[word]) not in written, word


async def test_a_changed_api_is_told_once_by_what_has_changed(database: Database) -> None:
    time = Time()
    partner = Keyban(seed=9, clock=time.now, keys=[KEY])
    account = partner.open_account()
    for amount in range(1, 9):
        partner.mint(account, amount, AT_ONCE)
    async with office(database, partner, time, name="keyban") as desk:
        await desk.rows("UPDATE indexer.partner_account SET active = true")
        await desk.register({"kind": "keyban.mint", "walletId": account.wallet, "amount": "99"}, reference="m")
        poller = desk.keyban()
        await poller.look(await desk.wallet(account.wallet))
        with capture_logs() as logs:
            partner.weather.begin("retyped", "missing_field")
            for _ in range(20):
                time.ahead += 700
                await poller.look(await desk.wallet(account.wallet))
        fields = [entry["field"] for entry in logs if "a field is missing" in entry["event"]]
        assert {"value", "success", "nodes"} & set(fields) and len(fields) == len(set(fields))
        assert [entry["event"] for entry in logs if "field" not in entry and "reason" not in entry] == [
            "numbers came as strings, or strings as numbers: they are read all the same"
        ]
        assert await desk.rows("SELECT 1 FROM indexer.partner_transfer WHERE status <> 'succeeded'") == []


def test_what_a_denial_says_names_its_status() -> None:
    assert "HTTP 403" in str(Denied("qiibee account of bloom", "balances", "denied", "no", 403))
