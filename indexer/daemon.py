"""The daemon: which loops run, under which leases, and how it starts, drains and stops.

`serve` is the whole life of a process: database, schema, configuration into tables, HTTP, loops; then until a signal. Loops
share nothing in memory but wake-ups, and each restarts alone. What a loop does is its own room's business.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version

import structlog

from indexer import supervision
from indexer.api.app import create_app
from indexer.api.app import serve as serve_http
from indexer.chain.position import configured_emitters
from indexer.chain.runtime import ChainRuntime, Progress
from indexer.config import Config
from indexer.observation import SettlementObserver
from indexer.partners.runtime import PartnerRuntime, accounts_of, asked_chains
from indexer.settlement import loop as settlement
from indexer.settlement.rules import rules_of
from indexer.signals import sequencer, webhooks
from indexer.store import schema
from indexer.store.brands import ConfiguredBrand, sync_brands
from indexer.store.chains import sync_chains, sync_emitters
from indexer.store.database import Database
from indexer.store.embedded import EmbeddedPostgres
from indexer.store.leases import Lease, Leases
from indexer.store.overview import observe_database
from indexer.store.partner_accounts import sync_accounts
from indexer.store.signals import WebhookRow, sync_webhooks
from indexer.store.wakeups import Wakeups
from indexer.supervision import Supervisor, notify
from indexer.telemetry import Metrics

GAUGES_SECONDS = 5.0  # between looks at what describes the whole database

log = structlog.get_logger(__name__)


class Process:
    """What this process knows of itself: for `/readyz` and `/v1/status`."""

    def __init__(self, holder: str) -> None:
        self.started = datetime.now(UTC)
        self.holder = holder
        self.supervisor: Supervisor | None = None
        self.draining = False

    def unready(self) -> list[str]:
        return ["the process is stopping"] if self.draining else []

    def process(self) -> Mapping[str, object]:
        tasks = self.supervisor.tasks if self.supervisor else {}
        return {
            "version": version("loyalty-settlement-indexer"),
            "holder": self.holder,
            "startedAt": self.started.isoformat().replace("+00:00", "Z"),
            "tasks": {
                name: {
                    "state": task.state,
                    "since": task.since.isoformat().replace("+00:00", "Z"),
                    "restarts": task.restarts,
                    "problem": task.problem,
                }
                for name, task in tasks.items()
            },
        }


@asynccontextmanager
async def _database(config: Config, embedded: bool) -> AsyncIterator[Database]:
    """The configured database, its schema checked; or the embedded one, started and migrated."""
    pool_size = config.database.pool_size
    if not embedded:
        async with await Database.connect(
            config.database.url, config.database.direct_url, pool_size=pool_size
        ) as database:
            async with database.pool.acquire() as conn:
                await schema.check(conn)
            yield database
        return
    async with EmbeddedPostgres(config.state_dir) as postgres:
        await schema.migrate(postgres.dsn("indexer_owner"))
        async with await Database.connect(postgres.dsn("indexer"), pool_size=pool_size) as database:
            log.info("embedded PostgreSQL is running", folder=str(config.state_dir))
            yield database


async def apply_configuration(database: Database, config: Config) -> None:
    """Brands, issuers, webhooks, chains and emitters of the file into the tables that SQL looks at."""
    async with database.pool.acquire() as conn, conn.transaction():
        await sync_brands(
            conn, [ConfiguredBrand(brand.name, brand.issuers, brand.unmatched_since) for brand in config.brands]
        )
        await sync_webhooks(
            conn,
            [
                WebhookRow(brand.name, webhook.name, webhook.events)
                for brand in config.brands
                for webhook in brand.webhooks
            ],
        )
        await sync_accounts(conn, [account for account, _, _ in accounts_of(config)])
        await sync_chains(conn, [(chain.chain_id, chain.name) for chain in config.chains])
        for chain in config.chains:
            await sync_emitters(conn, chain.chain_id, configured_emitters(chain))


async def serve(
    config: Config,
    *,
    embedded: bool = False,
    announce: Callable[[str, int], None] | None = None,
    progress: Progress | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Runs until SIGTERM, SIGINT or `stop`. `announce` hears host and port once HTTP listens.

    Raises DatabaseUnavailable, SchemaMismatch, EmbeddedError, IssuerMoved: what cannot be healed by waiting in here.
    """
    stop = stop or asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(
        signal.SIGHUP, lambda: log.warning("SIGHUP is ignored: restart to read the configuration again")
    )
    rng = random.Random()  # noqa: S311 - spreads retries, guards nothing
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(_database(config, embedded))
        await apply_configuration(database, config)
        wakeups = await stack.enter_async_context(Wakeups.listening(database))
        leases = Leases(database, ttl=config.database.lease_seconds, rng=rng)
        process = Process(str(leases.holder))
        supervisor = process.supervisor = Supervisor(leases, metrics, rng)
        chains = [
            await stack.enter_async_context(ChainRuntime.open(chain, metrics, wakeups, rng, progress))
            for chain in config.chains
        ]
        partners = await stack.enter_async_context(PartnerRuntime.open(config, metrics, wakeups, rng))
        dispatcher = webhooks.Dispatcher(webhooks.endpoints_of(config.brands), metrics=metrics, rng=rng)
        stack.push_async_callback(dispatcher.close)
        observer = SettlementObserver(metrics, {chain.chain_id: chain.name for chain in config.chains})
        explorers = {chain.chain_id: chain.explorer for chain in config.chains if chain.explorer}
        rules = rules_of(config.brands)

        app = create_app(database, metrics, process, wakeups)
        host, port = await stack.enter_async_context(serve_http(app, config.http))
        log.info("listening", host=host, port=port)
        if announce is not None:
            announce(host, port)

        bodies: dict[str, supervision.Body] = {
            settlement.TASK: lambda lease: settlement.settle(lease, wakeups, rules, explorers, observer),
            sequencer.TASK: lambda lease: sequencer.number(lease, wakeups, metrics),
            webhooks.TASK: lambda lease: dispatcher.run(lease, wakeups),
            "gauges": partial(_gauges, database, metrics),
        }
        bodies |= partners.tasks
        asked = asked_chains(config)
        for chain in chains:
            if chain.chain_id in asked:
                bodies[f"lookups:{chain.chain_id}"] = chain.answer_lookups
            bodies[f"follow:{chain.chain_id}"] = chain.follow
            bodies[f"history:{chain.chain_id}"] = chain.fill_history
        loops = [asyncio.create_task(supervisor.keep(task, body), name=task) for task, body in bodies.items()]
        loops.append(asyncio.create_task(supervision.watchdog(), name="watchdog"))
        stack.push_async_callback(_drain, loops, process)
        notify("READY=1")
        await stop.wait()


async def _drain(loops: list[asyncio.Task[None]], process: Process) -> None:
    """Stops the loops; each finishes or rolls back its transaction and gives its lease back."""
    process.draining = True
    notify("STOPPING=1")
    log.info("stopping")
    for task in loops:
        task.cancel()
    await asyncio.gather(*loops, return_exceptions=True)
    log.info("stopped")


async def _gauges(database: Database, metrics: Metrics, lease: Lease) -> None:
    """Describes the whole database in this process's metrics, for as long as the lease is held."""
    try:
        while True:
            async with database.pool.acquire() as conn:
                await observe_database(conn, metrics)
            with suppress(TimeoutError):
                await asyncio.sleep(GAUGES_SECONDS)
    finally:
        metrics.forget_database()
