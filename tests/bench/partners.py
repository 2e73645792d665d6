"""Keeping up with a partner: ten thousand open Keyban legs over two thousand wallets, at five requests a second.

The poller as the daemon runs it, beside the reconciler, asks a simulated Keyban over HTTP that takes 200 ms for every answer.
Wallets start at rest with open legs; then their orders settle one after the other, and each leg's age at settlement is the
time from its transaction's inclusion to its `ready`. Runs in real time, for about two rounds of all wallets. Fails where the simulator
saw more requests in any second than the budget, where a leg did not settle, or settled later than two rounds would take.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from indexer import daemon
from indexer.config import Config
from indexer.observation import SettlementObserver
from indexer.partners.runtime import PartnerRuntime
from indexer.sandbox.partners.app import Hosted
from indexer.sandbox.partners.keyban import Account, Keyban
from indexer.sandbox.partners.movement import Course
from indexer.settlement import loop as settlement
from indexer.settlement.rules import rules_of
from indexer.store.database import Database
from indexer.store.leases import Leases
from indexer.store.wakeups import Wakeups
from indexer.supervision import Supervisor
from indexer.telemetry import Metrics
from tests.bench.measure import own_cpu, postgres

NOTE = "Age: from inclusion to ready. One process holds the simulator too; it refuses a listing of all wallets."
BRAND, KEY = "bloom", "a-key-of-the-benchmark"
WALLETS, LEGS_EACH, RATE, LATENCY = 2_000, 5, 5.0, 0.2
ROUNDS = 1  # of all wallets, over which settlements are spread


@dataclass
class Found:
    """What was seen while it ran."""

    rss_mb: list[float] = field(default_factory=list)
    ages: list[float] = field(default_factory=list)


async def run(scale: float) -> dict[str, Any]:
    wallets = max(20, round(WALLETS * scale))
    async with postgres() as server, await Database.connect(server.url) as database:
        keyban = Keyban(seed=1, clock=time.time, keys=[KEY], latency=LATENCY)
        keyban.needs_wallet = True  # the cheap way out, one listing of all, is not what is measured
        async with Hosted(keyban) as hosted:
            keyban_section = {
                "url": hosted.url, "api_key": KEY, "network": keyban.network, "requests_per_second": RATE, "window": 86_400,
            }  # fmt: skip
            config = Config.model_validate(
                {"state_dir": "/nonexistent", "brands": [{"name": BRAND, "keyban": keyban_section}]}
            )
            await daemon.apply_configuration(database, config)
            accounts = [keyban.open_account() for _ in range(wallets)]
            await _register(database, accounts)
            return await _watch(database, config, keyban, accounts)


async def _register(database: Database, accounts: list[Account]) -> None:
    """Every wallet with its open legs, of amounts of their own, so that nothing is ambiguous."""
    async with database.pool.acquire() as conn:
        for account in accounts:
            for amount in range(1, LEGS_EACH + 1):
                leg = {"kind": "keyban.mint", "walletId": account.wallet, "amount": str(amount)}
                reference = f"{account.wallet}/{amount}"
                await conn.fetchval(
                    "SELECT loyalty.register_operation($1)", {"brand": BRAND, "reference": reference, "legs": [leg]}
                )


async def _watch(database: Database, config: Config, keyban: Keyban, accounts: list[Account]) -> dict[str, Any]:
    lap = len(accounts) / RATE
    rng = random.Random(1)
    found, memory = Found(), psutil.Process()
    async with _daemon(database, config) as metrics:
        began, cpu = time.time(), own_cpu()
        # all legs' orders, included at moments spread over the rounds; the first look at every wallet comes in between
        for account in accounts:
            for amount in range(1, LEGS_EACH + 1):
                at = rng.uniform(0.0, ROUNDS * lap)
                keyban.mint(account, amount, Course(at, at, at))
        total = len(accounts) * LEGS_EACH
        deadline = time.monotonic() + (ROUNDS + 4) * lap + 60
        settled = 0
        while settled < total and time.monotonic() < deadline:
            await asyncio.sleep(1.0)
            found.rss_mb.append(memory.memory_info().rss / 2**20)
            settled = await database.pool.fetchval("SELECT count(*) FROM indexer.operation WHERE state = 'ready'")
        seconds = time.time() - began
        found.ages = await _ages(database, keyban)
        requests = _requests(metrics)
    ages = sorted(found.ages)
    tenth = max(1, len(found.rss_mb) // 10)
    return {
        "wallets": len(accounts),
        "legs": total,
        "settled": settled,
        "seconds": round(seconds, 1),
        "age_p50_s": round(statistics.median(ages), 1) if ages else None,
        "age_p99_s": round(ages[max(0, round(0.99 * len(ages)) - 1)], 1) if ages else None,
        "age_max_s": round(ages[-1], 1) if ages else None,
        "age_bound_s": round(2 * lap, 1),
        "requests": requests,
        "requests_per_second": round(requests / seconds, 2),
        "most_in_a_second": keyban.peak(1.0),
        "most_in_ten_seconds": keyban.peak(10.0),
        "budget_per_second": RATE,
        "memory_start_mb": round(statistics.median(found.rss_mb[:tenth]), 1),
        "memory_end_mb": round(statistics.median(found.rss_mb[-tenth:]), 1),
        "cpu_s": round(own_cpu() - cpu, 1),
    }


@asynccontextmanager
async def _daemon(database: Database, config: Config) -> AsyncIterator[Metrics]:
    """The tasks of `indexer run` that take part: the account's poller and the reconciler."""
    metrics, wakeups, rng = Metrics(), Wakeups(), random.Random(2)
    async with AsyncExitStack() as stack:
        partners = await stack.enter_async_context(PartnerRuntime.open(config, metrics, wakeups, rng))
        supervisor = Supervisor(Leases(database, ttl=30.0, rng=rng), metrics, rng)
        rules = rules_of(config.brands)
        bodies = dict(partners.tasks)
        bodies["settle"] = lambda lease: settlement.settle(lease, wakeups, rules, {}, SettlementObserver(metrics, {}))
        tasks = [asyncio.create_task(supervisor.keep(name, body), name=name) for name, body in bodies.items()]
        try:
            yield metrics
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _ages(database: Database, keyban: Keyban) -> list[float]:
    """Seconds from each order's inclusion to the transition that made its operation ready."""
    rows = await database.pool.fetch(
        """
        SELECT t.record_id, extract(epoch FROM h.at)::float8 AS ready
        FROM indexer.claim c JOIN indexer.partner_transfer t ON t.id = c.evidence_id
        JOIN indexer.history h ON h.operation_id = c.operation_id AND h.to_state = 'ready'
        """
    )
    return [
        row["ready"] - settles for row in rows if (settles := keyban.movements[row["record_id"]].settles_at) is not None
    ]


def _requests(metrics: Metrics) -> int:
    return int(
        sum(
            sample.value
            for family in metrics.registry.collect()
            for sample in family.samples
            if sample.name == "loyalty_partner_requests_total"
        )
    )


def broken(result: dict[str, Any]) -> list[str]:
    """What was promised and not kept."""
    found = []
    if result["most_in_a_second"] > result["budget_per_second"]:
        found.append(
            f"{result['most_in_a_second']} requests within one second, {result['budget_per_second']:g} allowed"
        )
    if result["settled"] < result["legs"]:
        found.append(f"{result['legs'] - result['settled']} legs did not settle")
    elif result["age_p99_s"] > result["age_bound_s"]:
        found.append(f"age at settlement (p99) {result['age_p99_s']} s, {result['age_bound_s']} s promised")
    return found


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    return [("figure", "value"), *((name.replace("_", " "), str(value)) for name, value in result.items())]
