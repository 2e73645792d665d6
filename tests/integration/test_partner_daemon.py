"""The daemon and simulated partners, everything real between: from a registration to a ready operation, whatever the weather."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any
from uuid import UUID

import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner

from indexer.cli import app
from indexer.config import Config
from indexer.daemon import apply_configuration, serve
from indexer.partners import budget as budget_module
from indexer.partners.balances import partner_balances
from indexer.sandbox.partners.app import Hosted
from indexer.sandbox.partners.faults import CODES
from indexer.sandbox.partners.keyban import Keyban
from indexer.sandbox.partners.loyfin import LoyfinApi
from indexer.sandbox.partners.movement import AT_ONCE, Course, Pace
from indexer.sandbox.partners.qiibee import BASE, Qiibee
from indexer.store.database import Database
from tests.integration import test_views as views
from tests.partner_office import BRAND, KEY

pytestmark = pytest.mark.xdist_group("partner-daemon")


def configured(dsn: str, tmp: Any, *others: dict[str, Any], **partners: dict[str, Any]) -> Config:
    """One brand with these sections, and whole `others`."""
    return Config.model_validate(
        {
            "state_dir": str(tmp),
            "database": {"url": dsn, "lease_seconds": 5},
            "http": {"listen": "127.0.0.1:0"},
            "brands": [{"name": BRAND, "policies": [{"confidence": "included"}], **partners}, *others],
        }
    )


@asynccontextmanager
async def running(config: Config, reread: Callable[[], Config] | None = None) -> AsyncIterator[None]:
    """`serve` until the body ends."""
    stop, up = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(serve(config, announce=lambda *_: up.set(), stop=stop, reread=reread))
    try:
        waiting = asyncio.create_task(up.wait())
        await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        yield
    finally:
        stop.set()
        await asyncio.wait_for(task, 20)


async def test_balances_are_asked_for_on_demand_and_shown_in_one_table(
    database: Database, dsn: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyban = Keyban(seed=1, clock=time.time, keys=[KEY])
    qiibee = Qiibee(seed=2, clock=time.time, keys=[KEY])
    account, user = keyban.open_account(), qiibee.enrol()
    for amount in range(1, 121):
        keyban.mint(account, amount, AT_ONCE)
    keyban.burn(account, 60, AT_ONCE)
    keyban.mint(account, 5, Course(0.0, 0.0, None))  # promised, and not there
    qiibee.credit(user, 25, AT_ONCE)
    async with Hosted(keyban) as k, Hosted(qiibee, BASE) as q:
        sections = {
            "keyban": {"url": k.url, "api_key": KEY, "network": "StellarTestnet", "requests_per_second": 100},
            "qiibee": {"url": q.url, "api_key": KEY, "requests_per_second": 100},
        }
        config = Config.model_validate({"state_dir": str(tmp_path), "brands": [{"name": BRAND, **sections}]})
        found = await partner_balances(config, keyban=account.wallet, qiibee=user.auth_id)
        assert [(row.partner, row.balance, row.source, row.problem) for row in found] == [
            ("keyban", str(120 * 121 // 2 - 60), "orders", None),
            ("qiibee", "25", "provider", None),
        ]
        assert await partner_balances(config, keyban=account.wallet, brand="other") == []
        (nothing,) = await partner_balances(config, qiibee=qiibee.enrol().auth_id)
        assert (nothing.balance, nothing.problem) == ("0", None)  # an account that holds nothing is an account

        # one holder, three ledgers, one table
        async with database.pool.acquire() as conn:
            ledger = views.World(conn, count(1000))
            await conn.execute("INSERT INTO indexer.chain (chain_id, name) VALUES ($1, 'base')", views.CHAIN)
            await conn.execute("INSERT INTO indexer.brand (name) VALUES ($1)", BRAND)
            await conn.execute("INSERT INTO indexer.issuer (address, brand) VALUES ($1, $2)", views.ISSUER, BRAND)
            await ledger.programme(name="Petals")
            await ledger.movement("issuance", views.ALICE, 4321)
        written = tmp_path / "indexer.toml"
        written.write_text(
            f'state_dir = "{tmp_path}"\n[database]\nurl = "{dsn}"\n[[brands]]\nname = "{BRAND}"\n'
            + "".join(
                f"[brands.{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items())
                for name, section in sections.items()
            )
        )
        monkeypatch.setenv("COLUMNS", "200")
        words = ["balances", "0x" + views.ALICE.hex(), "--keyban", account.wallet, "--qiibee", user.auth_id]
        words += ["--config", str(written)]
        shown = await asyncio.to_thread(CliRunner().invoke, app, words)
        assert shown.exit_code == 0, (shown.output, shown.exception)
        lines = [line for line in shown.stdout.splitlines() if any(f" {n} " in line for n in ("4321", "7200", "25"))]
        assert ["Petals" in lines[0], "keyban" in lines[1], "qiibee" in lines[2]] == [True] * 3 and len(lines) == 3
        told = json.loads((await asyncio.to_thread(CliRunner().invoke, app, [*words, "--json"])).stdout)
        assert [row["balance"] for row in [*told["data"], *told["partners"]]] == ["4321", "7200", "25"]
        qiibee.weather.begin("expired")
        (refused,) = await partner_balances(config, qiibee=user.auth_id)
        assert refused.balance is None and refused.problem is not None and "the key is not accepted" in refused.problem


async def register(database: Database, reference: str, *legs: dict[str, str]) -> UUID:
    request = {"brand": BRAND, "reference": reference, "legs": list(legs)}
    async with database.pool.acquire() as conn:
        return UUID((await conn.fetchval("SELECT loyalty.register_operation($1)", request))["id"])


async def settled(database: Database, count: int, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while await database.pool.fetchval("SELECT count(*) FROM indexer.operation WHERE state = 'ready'") < count:
            await asyncio.sleep(0.1)


async def test_legs_of_every_partner_settle_in_any_weather(database: Database, dsn: str, tmp_path: Any) -> None:
    pace = Pace((0.1, 0.3), (0.1, 0.3), (0.1, 0.5))
    keyban = Keyban(seed=1, clock=time.time, keys=[KEY], pace=pace)
    qiibee = Qiibee(seed=2, clock=time.time, keys=[KEY], pace=pace)
    loyfin = LoyfinApi(seed=3, clock=time.time)
    loyfin.weather.begin("dropped")  # dead from the beginning to the end
    accounts, users = [keyban.open_account() for _ in range(3)], [qiibee.enrol() for _ in range(3)]
    async with Hosted(keyban) as k, Hosted(qiibee, BASE) as q, Hosted(loyfin) as api:
        sections = {
            "keyban": {"url": k.url, "api_key": KEY, "network": "StellarTestnet", "poll": 0.3, "requests_per_second": 50},
            "qiibee": {"url": q.url, "api_key": KEY, "poll": 0.3, "settle_after": 0.3, "requests_per_second": 50},
            "loyfin": {"url": api.url, "poll": 1},
        }  # fmt: skip
        async with running(configured(dsn, tmp_path, **sections)):
            for number, (account, user) in enumerate(zip(accounts, users, strict=True)):
                keyban.mint(account, 10 + number)
                qiibee.credit(user, 20 + number)
                mint = {"kind": "keyban.mint", "walletId": account.wallet, "amount": str(10 + number)}
                credit = {"kind": "qiibee.credit", "walletId": user.auth_id, "amount": str(20 + number)}
                await register(database, f"good-{number}", mint, credit)
            await settled(database, 3, 30)

            # every fault of the catalogue at once, but for the key that expires: that stops an account for minutes
            never_taken_back = ("turned", "deleted", "endless_body", "silence")
            for partner in (keyban, qiibee):
                partner.weather.begin(*(code for code in CODES if code != "F117"), chance=0.08)
                partner.weather.end(*never_taken_back)
                partner.weather.late_by = (0.2, 1.0)
            for number, (account, user) in enumerate(zip(accounts, users, strict=True)):
                keyban.burn(account, 30 + number, Course(0.1, 0.2, 0.4))
                qiibee.debit(user, 40 + number, Course(0.1, 0.2, 0.4))
                burn = {"kind": "keyban.burn", "walletId": account.wallet, "amount": str(30 + number)}
                debit = {"kind": "qiibee.debit", "walletId": user.auth_id, "amount": str(40 + number)}
                await register(database, f"bad-{number}", burn, debit)
            async with asyncio.timeout(60):
                while min(sum(partner.weather.struck.values()) for partner in (keyban, qiibee)) < 10:
                    await asyncio.sleep(0.1)
            for partner in (keyban, qiibee):
                partner.weather.end()
            await settled(database, 6, 40)
            told = await database.pool.fetchval("SELECT problem FROM indexer.partner_account WHERE partner = 'loyfin'")
            assert told is None or "no connection" in told or "broke" in told  # None: nothing was asked of it
        bases = await database.pool.fetch("SELECT DISTINCT basis FROM indexer.claim")
        assert [row[0] for row in bases] == ["wallet_amount"]


async def test_a_restart_stays_within_the_budget(
    database: Database, dsn: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who begins knows nothing of what was asked a moment ago, but that somebody may have."""
    monkeypatch.setattr(budget_module, "UNDER_WAY", 0.5)
    keyban = Keyban(seed=1, clock=time.time, keys=[KEY])
    keyban.needs_wallet = True
    async with Hosted(keyban) as k:
        section = {"url": k.url, "network": "StellarTestnet", "api_key": KEY, "requests_per_second": 1}
        config = configured(dsn, tmp_path, keyban=section)
        await apply_configuration(database, config)
        for number in range(20):
            mint = {"kind": "keyban.mint", "walletId": keyban.open_account().wallet, "amount": "10"}
            await register(database, f"m{number}", mint)
        for wanted in (2, 4, 6):
            async with running(config), asyncio.timeout(20):
                while len(keyban.calls) < wanted:
                    await asyncio.sleep(0.01)
    assert keyban.peak(1.0) == 1


async def test_a_reload_takes_a_new_key_and_new_accounts_and_leaves_the_rest_alone(
    database: Database, dsn: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget_module, "UNDER_WAY", 0.1)

    async def epochs() -> dict[str, int]:
        rows = await database.pool.fetch("SELECT task, epoch FROM indexer.lease WHERE holder IS NOT NULL")
        return {row["task"]: row["epoch"] for row in rows}

    async def accounts() -> set[tuple[str, str]]:
        rows = await database.pool.fetch("SELECT brand, partner FROM indexer.partner_account WHERE active")
        return {tuple(row) for row in rows}

    keyban = Keyban(seed=1, clock=time.time, keys=[KEY, "the-new-key-of-rose"])
    account = keyban.open_account()
    async with Hosted(keyban) as k:
        section = {"url": k.url, "network": "StellarTestnet", "poll": 0.2, "requests_per_second": 50}
        wrong = configured(dsn, tmp_path, keyban=section | {"api_key": "a-key-that-was-revoked"})
        rose = {"name": "rose", "keyban": section | {"api_key": "the-new-key-of-rose"}}
        right = configured(dsn, tmp_path, rose, keyban=section | {"api_key": KEY, "poll": 0.3})
        with capture_logs() as logs:
            async with running(wrong, lambda: right):
                keyban.mint(account, 10)
                await register(database, "m", {"kind": "keyban.mint", "walletId": account.wallet, "amount": "10"})
                async with asyncio.timeout(60):
                    refused = "SELECT stopped_at FROM indexer.partner_account WHERE stopped_at IS NOT NULL"
                    while await database.pool.fetchval(refused) is None or len(await epochs()) < 6:
                        await asyncio.sleep(0.1)
                before = await epochs()
                os.kill(os.getpid(), signal.SIGHUP)
                await settled(database, 1, 20)
                after = await epochs()
                assert await accounts() == {(BRAND, "keyban"), ("rose", "keyban")}
                assert await database.pool.fetchval(refused) is None
        (done,) = [entry for entry in logs if entry["event"] == "the configuration was read again"]
        assert set(done["restarted"]) == {"partners", "settle"}, "a brand more is rules more"
        assert {task for task in before if after.get(task) != before[task]} == {f"poll:keyban:{BRAND}", "settle"}
        assert f"poll:keyban:{BRAND}" in before
