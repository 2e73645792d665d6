"""The daemon: which loops run, under which leases, and how it starts, reloads, drains and stops.

`serve` is the whole life of a process: database, schema, configuration into tables, HTTP, loops; then until a signal. Loops
share nothing in memory but wake-ups, and each restarts alone. What a loop does is its own room's business, and what of a
configuration may change while they run is `reload.py`'s.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext, suppress
from datetime import UTC, datetime
from importlib.metadata import version

import asyncpg
import structlog

from indexer import maintenance, supervision
from indexer.api.app import create_app
from indexer.api.app import serve as serve_http
from indexer.chain.emitters import configured_emitters
from indexer.chain.runtime import ChainRuntime, Progress
from indexer.config import Chain, Config, ConfigProblems, Problem, contradictions
from indexer.observation import SettlementObserver
from indexer.partners.runtime import PartnerRuntime, accounts_of, asked_chains
from indexer.reload import Reading, adopt
from indexer.settlement import loop as settlement
from indexer.settlement.rules import rules_of
from indexer.signals import sequencer, webhooks
from indexer.store import instance, schema
from indexer.store.brands import ConfiguredBrand, IssuerMoved, sync_brands
from indexer.store.chains import set_demands, sync_chains, sync_emitters
from indexer.store.database import DISCONNECTED, Database
from indexer.store.embedded import EmbeddedPostgres
from indexer.store.leases import Lease, Leases
from indexer.store.overview import observe_database
from indexer.store.partner_accounts import sync_accounts
from indexer.store.wakeups import Wakeups
from indexer.store.webhooks import WebhookRow, sync_webhooks
from indexer.supervision import Body, Supervisor, Unit, Units, notify, notify_reloading
from indexer.telemetry import Metrics

DRAIN_SECONDS = 10.0  # at the most, for attempts at webhooks: TimeoutStopSec of the unit leaves room for it
GAUGES_SECONDS = 5.0  # between looks at what describes the whole database

log = structlog.get_logger(__name__)


class Process:
    """What this process knows of itself: for `/readyz` and `/v1/status`."""

    def __init__(self, holder: str) -> None:
        self.started = datetime.now(UTC)
        self.holder = holder
        self.supervisor: Supervisor | None = None
        self.draining = False
        self.reading = Reading()

    def unready(self) -> list[str]:
        return ["the process is stopping"] if self.draining else []

    def process(self) -> Mapping[str, object]:
        tasks = self.supervisor.tasks if self.supervisor else {}
        return {
            "version": version("loyalty-settlement-indexer"),
            "holder": self.holder,
            "startedAt": self.started.isoformat().replace("+00:00", "Z"),
            "configuration": self.reading.told(),
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
            await set_demands(conn, chain.chain_id, chain.quorum, chain.proof)
            await sync_emitters(conn, chain.chain_id, configured_emitters(chain))


async def serve(
    config: Config,
    *,
    embedded: bool = False,
    announce: Callable[[str, int], None] | None = None,
    progress: Progress | None = None,
    stop: asyncio.Event | None = None,
    reread: Callable[[], Config] | None = None,
) -> None:
    """Runs until SIGTERM, SIGINT or `stop`. `announce` hears host and port once HTTP listens.

    `reread` reads the configuration again, on SIGHUP, in a thread; it raises ConfigProblems. Raises DatabaseUnavailable,
    SchemaMismatch, EmbeddedError, IssuerMoved: what cannot be healed by waiting in here.
    """
    stop = stop or asyncio.Event()
    reload = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    rng = random.Random()  # noqa: S311 - spreads retries, guards nothing
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(_database(config, embedded))
        await apply_configuration(database, config)
        await _tell_held(database)
        wakeups = await stack.enter_async_context(Wakeups.listening(database))
        metrics.listening.set_function(lambda: float(wakeups.status == "listening"))
        leases = Leases(database, ttl=config.database.lease_seconds, rng=rng)
        process = Process(str(leases.holder))
        supervisor = process.supervisor = Supervisor(leases, metrics, rng)
        dispatcher = webhooks.Dispatcher(webhooks.endpoints_of(config.brands), metrics=metrics, rng=rng)
        stack.push_async_callback(dispatcher.close)

        app = create_app(database, metrics, process, wakeups)
        host, port = await stack.enter_async_context(serve_http(app, config.http))
        log.info("listening", host=host, port=port)
        if announce is not None:
            announce(host, port)

        works = _Works(database, wakeups, metrics, rng, progress, dispatcher)
        units = Units(supervisor)
        stack.push_async_callback(_drain, units, process, dispatcher)
        await units.become(works.units(config))
        watchdog = asyncio.create_task(supervision.watchdog(), name="watchdog")
        stack.callback(watchdog.cancel)
        reloading = asyncio.create_task(_reloading(config, reread, reload, works, units, process), name="reload")
        stack.callback(reloading.cancel)
        notify("READY=1")
        await stop.wait()


async def _tell_held(database: Database) -> None:
    """Says at every start what waits for a person since a backup was put back."""
    async with database.pool.acquire() as conn:
        for held in await instance.held_brands(conn):
            log.warning(
                "claims are held since a backup was put back",
                brand=held.brand,
                before=held.before.isoformat(),
                operations=held.operations,
                hint="tell the receipts since the backup again, then: indexer restored --release",
            )


class _Works:
    """What the loops of this process are made of: from a configuration to units."""

    def __init__(
        self,
        database: Database,
        wakeups: Wakeups,
        metrics: Metrics,
        rng: random.Random,
        progress: Progress | None,
        dispatcher: webhooks.Dispatcher,
    ) -> None:
        self.database, self.wakeups, self.metrics, self.rng = database, wakeups, metrics, rng
        self.progress, self.dispatcher = progress, dispatcher

    def units(self, config: Config) -> dict[str, Unit]:
        """By name. A unit whose settings are those of the configuration before goes on undisturbed."""
        rules, retention = rules_of(config.brands), config.retention
        explorers = {chain.chain_id: chain.explorer for chain in config.chains if chain.explorer}
        names = {chain.chain_id: chain.name for chain in config.chains}
        observer = SettlementObserver(self.metrics, names)

        async def settle(lease: Lease) -> None:
            await settlement.settle(lease, self.wakeups, rules, explorers, observer)

        async def number(lease: Lease) -> None:
            await sequencer.number(lease, self.wakeups, self.metrics)

        async def deliver(lease: Lease) -> None:
            await self.dispatcher.run(lease, self.wakeups)

        async def gauges(lease: Lease) -> None:
            await _gauges(self.database, self.metrics, lease)

        async def maintain(lease: Lease) -> None:
            await maintenance.maintain(lease, retention, self.metrics)

        units = {
            settlement.TASK: _alone(settlement.TASK, settle, (rules, explorers, names)),
            sequencer.TASK: _alone(sequencer.TASK, number),
            webhooks.TASK: _alone(webhooks.TASK, deliver),  # its endpoints are given to it while it runs
            "gauges": _alone("gauges", gauges),
            maintenance.TASK: _alone(maintenance.TASK, maintain, retention),
        }
        asked = asked_chains(config)
        for chain in config.chains:
            looked_up = chain.chain_id in asked
            units[f"chain:{chain.chain_id}"] = Unit((chain, looked_up), self._chain(chain, looked_up))
        if accounts_of(config):
            sections = [
                (brand.name, brand.issuers, brand.loyfin, brand.keyban, brand.qiibee) for brand in config.brands
            ]
            units["partners"] = Unit((sections, names), self._partners(config))
        return units

    def _chain(self, chain: Chain, looked_up: bool) -> Callable[[], AbstractAsyncContextManager[Mapping[str, Body]]]:
        @asynccontextmanager
        async def opened() -> AsyncIterator[Mapping[str, Body]]:
            async with ChainRuntime.open(chain, self.metrics, self.wakeups, self.rng, self.progress) as runtime:
                bodies: dict[str, Body] = {
                    f"follow:{chain.chain_id}": runtime.follow,
                    f"history:{chain.chain_id}": runtime.fill_history,
                    f"verify:{chain.chain_id}": runtime.attest,
                }
                if looked_up:
                    bodies[f"lookups:{chain.chain_id}"] = runtime.answer_lookups
                yield bodies

        return opened

    def _partners(self, config: Config) -> Callable[[], AbstractAsyncContextManager[Mapping[str, Body]]]:
        @asynccontextmanager
        async def opened() -> AsyncIterator[Mapping[str, Body]]:
            async with PartnerRuntime.open(config, self.metrics, self.wakeups, self.rng) as runtime:
                yield runtime.tasks

        return opened


def _alone(task: str, body: Body, settings: object = None) -> Unit:
    """A unit of one loop that shares nothing."""
    return Unit(settings, lambda: nullcontext({task: body}))


async def _drain(units: Units, process: Process, dispatcher: webhooks.Dispatcher) -> None:
    """Stops the loops; each finishes or rolls back its transaction and gives its lease back. Attempts at webhooks that are
    under way have their time first."""
    process.draining = True
    notify("STOPPING=1")
    log.info("stopping")
    await dispatcher.drain(DRAIN_SECONDS)
    await units.stop()
    log.info("stopped")


# --------------------------------------------------------------------------- the configuration, read again


async def _reloading(
    config: Config,
    reread: Callable[[], Config] | None,
    reload: asyncio.Event,
    works: _Works,
    units: Units,
    process: Process,
) -> None:
    """Reads the configuration again whenever `reload` is set, one time after the other."""
    while True:
        await reload.wait()
        reload.clear()
        notify_reloading()
        try:
            if reread is None:
                log.warning("there is no configuration to read again")
            else:
                config = await _reread(config, reread, works, units, process)
        except Exception:
            log.exception("the configuration was not read again: the one before stays in effect")
        finally:
            notify("READY=1")


async def _reread(
    config: Config, reread: Callable[[], Config], works: _Works, units: Units, process: Process
) -> Config:
    """Puts into effect what the file says now. Returns the configuration in effect: where anything is wrong, the one before."""

    def keep(problems: list[Problem]) -> Config:
        log.error(
            "the configuration cannot be used: the one before stays in effect", problems=[str(p) for p in problems]
        )
        process.reading.failed(problems)
        return config

    try:
        adopted = adopt(config, await asyncio.to_thread(reread))
    except ConfigProblems as error:
        return keep(list(error.problems))
    if problems := contradictions(adopted.config):
        return keep([*adopted.refused, *problems])
    try:
        await apply_configuration(works.database, adopted.config)
    except IssuerMoved as error:
        return keep([Problem("brands", str(error))])
    except (TimeoutError, asyncpg.PostgresError, *DISCONNECTED) as error:
        return keep([Problem("", f"the database does not take it: {error}", "send SIGHUP again")])
    works.dispatcher.configure(webhooks.endpoints_of(adopted.config.brands))
    began = await units.become(works.units(adopted.config))
    for problem in adopted.refused:
        log.warning("not applied", setting=problem.where, reason=problem.what, hint=problem.hint)
    for warning in adopted.config.warnings:
        log.warning("configuration", warning=str(warning))
    process.reading.applied(adopted.refused)
    log.info("the configuration was read again", restarted=began, refused=len(adopted.refused))
    return adopted.config


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
