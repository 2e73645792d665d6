"""A poller at its desk: a real database, a held lease, and a simulated partner on a socket. Nothing runs by itself but what a
test starts: looks are taken one by one.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import asyncpg
from pydantic import SecretStr

from indexer.config import Qiibee
from indexer.partners.account import Desk
from indexer.partners.client import Client
from indexer.partners.credential import Clock, Credential
from indexer.partners.exchange import Http
from indexer.partners.keyban import KeybanPoller
from indexer.partners.orders import Ledger
from indexer.partners.qiibee import QiibeePoller
from indexer.partners.runtime import words_of
from indexer.sandbox.partners.app import Hosted
from indexer.sandbox.partners.partner import Partner
from indexer.store import partner_accounts as accounts
from indexer.store.database import Database
from indexer.store.leases import Leases
from indexer.store.partner_accounts import Account, OpenWallet
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics

BRAND = "bloom"
KEY = "test-key-of-some-length"
WORDS = words_of(Qiibee(api_key=SecretStr(KEY)))  # as the defaults have it


@dataclass
class Time:
    """The partner's clock and the desk's: real, and moved on at will."""

    ahead: float = 0.0

    def now(self) -> float:
        return time.time() + self.ahead


@dataclass
class Office:
    desk: Desk
    database: Database
    hosted: Hosted
    metrics: Metrics
    time: Time
    requests: list[tuple[str, str]] = field(default_factory=list)

    @property
    def account(self) -> Account:
        return self.desk.account

    async def register(self, *legs: dict[str, Any], reference: str) -> UUID:
        request = {"brand": BRAND, "reference": reference, "legs": list(legs)}
        async with self.database.pool.acquire() as conn:
            return UUID((await conn.fetchval("SELECT loyalty.register_operation($1)", request))["id"])

    async def rows(self, query: str, *args: object) -> list[asyncpg.Record]:
        async with self.database.pool.acquire() as conn:
            return list(await conn.fetch(query, *args))

    async def transfers(self) -> list[dict[str, Any]]:
        rows = await self.rows("SELECT * FROM indexer.partner_transfer ORDER BY first_seen_at, record_id, kind")
        return [dict(row) for row in rows]

    async def wallet(self, name: str) -> OpenWallet:
        async with self.database.pool.acquire() as conn:
            waiting = await accounts.open_wallets(conn, self.account)
            found = next((each for each in waiting if each.wallet == name), None)
        assert found is not None, f"{name} has no open legs"
        return found

    async def touched(self) -> set[UUID]:
        """Operations queued for the reconciler since the last call."""
        return {row[0] for row in await self.rows("DELETE FROM indexer.touched_operation RETURNING operation_id")}

    def oddities(self) -> dict[str, float]:
        return counted(self.metrics, "loyalty_partner_oddities_total", "oddity")

    def outcomes(self) -> dict[str, float]:
        return counted(self.metrics, "loyalty_partner_requests_total", "outcome")

    def keyban(
        self, ledger: Ledger | None = None, *, sweep_gap: float = 0.0, keep: float = 0.0, poll: float = 5.0
    ) -> KeybanPoller:
        return KeybanPoller(self.desk, ledger or Ledger(BRAND, "StellarTestnet"), poll, keep=keep, sweep_gap=sweep_gap)

    def qiibee(self, settle_after: float = 0.0) -> QiibeePoller:
        return QiibeePoller(self.desk, 10.0, settle_after, WORDS, sweep_every=0.0)


def counted(metrics: Metrics, name: str, label: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            if sample.name == name and sample.value:
                found[sample.labels[label]] = found.get(sample.labels[label], 0) + sample.value
    return found


@asynccontextmanager
async def office(
    database: Database,
    partner: Partner,
    time: Time,
    *,
    name: str,
    base: str = "",
    header: str = "X-Api-Key",
    rate: float = 10_000.0,
    timeout: float = 20.0,
    max_body: int = 8 * 2**20,
) -> AsyncIterator[Office]:
    """`partner` served over HTTP, and a desk with a client for it. Waits of the client take no time."""
    account = Account(BRAND, name)
    metrics, wakeups = Metrics(), Wakeups()

    async def skip(seconds: float) -> None:
        clock_ahead[0] += seconds

    clock_ahead = [0.0]
    clock = Clock(now=lambda: time.now() + clock_ahead[0], wall=time.now, sleep=skip)
    async with AsyncExitStack() as stack:
        async with database.pool.acquire() as conn:
            await conn.execute("INSERT INTO indexer.brand (name) VALUES ($1) ON CONFLICT DO NOTHING", BRAND)
            await accounts.sync_accounts(conn, [account])
        hosted = await stack.enter_async_context(Hosted(partner, base))
        http = await stack.enter_async_context(Http(hosted.url, {header: KEY}, timeout=timeout, max_body=max_body))
        rng = random.Random(7)
        requests: list[tuple[str, str]] = []

        def observe(endpoint: str, outcome: str, seconds: float) -> None:
            requests.append((endpoint, outcome))
            metrics.partner_requests.labels(*account, endpoint, outcome).inc()

        client = Client(
            f"{name} account of {BRAND}",
            http,
            Credential(rate, clock, rng),
            clock=clock,
            rng=rng,
            observe=observe,
            secrets=(KEY,),
        )
        lease = await stack.enter_async_context(Leases(database, ttl=30.0).hold(f"poll:{name}:{BRAND}"))
        desk = Desk(account, client, lease, wakeups, metrics, clock)
        yield Office(desk, database, hosted, metrics, time, requests)


@asynccontextmanager
async def at_work(desk: Desk, poller: KeybanPoller) -> AsyncIterator[None]:
    """The poller's own loop, until the body ends; then it is stopped between two transactions, which keeps the lease."""
    running = asyncio.create_task(poller.run())
    try:
        yield
    finally:
        async with desk.lease._busy:
            running.cancel()
        await asyncio.gather(running, return_exceptions=True)
