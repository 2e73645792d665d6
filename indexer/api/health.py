"""Whether this process lives and can serve, and how the whole installation stands.

`/healthz` says that the event loop turns; `/readyz` that database, schema and configuration are as they must be;
`/v1/status` shows heads, leases and what waits; `/metrics` the registry. The first two and the metrics need no token and
tell nothing of a brand's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import asyncpg
import msgspec
import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler

from indexer.api.bodies import json_response
from indexer.api.contract import Answer, Call, Endpoint, NoQuery
from indexer.api.state import DATABASE, STATUS, WAKEUPS
from indexer.store import schema
from indexer.store.database import Database
from indexer.store.overview import Overview, overview

READY_SECONDS = 2.0

log = structlog.get_logger(__name__)


class StatusSource(Protocol):
    """What this process knows of itself, and the store cannot tell."""

    def unready(self) -> Sequence[str]:
        """Why this process cannot serve, apart from the database: such as a configuration that is not loaded."""
        ...

    def process(self) -> Mapping[str, object]:
        """This process in JSON, camelCase: version, holder, since when, tasks, endpoints by host. No secrets, no URLs."""
        ...


class Check(msgspec.Struct, frozen=True):
    name: str
    ok: bool
    reason: str | None = None


class Health(msgspec.Struct, frozen=True):
    status: Literal["ok"] = "ok"


class Readiness(msgspec.Struct, frozen=True):
    """`reason` says what is wrong where a check is not `ok`."""

    status: Literal["ready", "unready"]
    checks: list[Check]


class Status(Overview, frozen=True, rename="camel", kw_only=True):
    """The installation as the database knows it, and this process: version, holder, tasks, how wake-ups are heard."""

    process: dict[str, Any]


async def healthz(call: Call[NoQuery, None]) -> web.Response:
    """That this answer came is the answer: it passed through the event loop."""
    return json_response(Health())


async def readyz(call: Call[NoQuery, None]) -> web.Response:
    app = call.request.app
    reasons = list(app[STATUS].unready())
    checks = [
        *await _database_checks(app[DATABASE]),
        Check("process", not reasons, "; ".join(reasons) or None),
    ]
    ready = all(check.ok for check in checks)
    return json_response(Readiness("ready" if ready else "unready", checks), 200 if ready else 503)


async def _database_checks(database: Database) -> list[Check]:
    """Reasons are for anyone who can reach the port: no host, no user, no error of the server."""
    try:
        async with asyncio.timeout(READY_SECONDS):
            async with database.pool.acquire() as conn:
                await schema.check(cast(asyncpg.Connection, conn))
    except schema.SchemaMismatch as error:
        return [Check("database", True), Check("schema", False, str(error))]
    except TimeoutError:
        reason = f"no answer within {READY_SECONDS:.0f} s"
    except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
        log.warning("not ready: the database refuses", error=type(error).__name__)
        reason = "the database does not answer"
    else:
        return [Check("database", True), Check("schema", True)]
    return [Check("database", False, reason), Check("schema", False, "unknown while the database does not answer")]


async def status(call: Call[NoQuery, None]) -> web.Response:
    app = call.request.app
    async with app[DATABASE].pool.acquire() as conn:
        seen = await overview(conn, call.token.brand)
    own = {"wakeups": app[WAKEUPS].status, **app[STATUS].process()}
    if call.token.brand is not None:  # tasks, and what is wrong with a file, are named for every brand
        own = {key: own[key] for key in ("wakeups", "version", "holder", "startedAt") if key in own}
    return json_response(Status(**msgspec.structs.asdict(seen), process=own))


def _metrics(registry: CollectorRegistry) -> Callable[[Call[NoQuery, None]], Awaitable[web.StreamResponse]]:
    answer = make_aiohttp_handler(registry)

    async def metrics(call: Call[NoQuery, None]) -> web.StreamResponse:
        return await answer(call.request)

    return metrics


def endpoints(registry: CollectorRegistry) -> tuple[Endpoint, ...]:
    return (
        Endpoint(
            method="GET",
            path="/healthz",
            name="health",
            summary="Whether the event loop turns",
            handler=healthz,
            answers={200: Answer("It does.", Health)},
        ),
        Endpoint(
            method="GET",
            path="/readyz",
            name="readiness",
            summary="Whether this process can serve: database, schema and configuration",
            handler=readyz,
            answers={200: Answer("It can.", Readiness), 503: Answer("It cannot; the checks say why.", Readiness)},
        ),
        Endpoint(
            method="GET",
            path="/metrics",
            name="metrics",
            summary="Prometheus text, or OpenMetrics by `Accept`",
            handler=_metrics(registry),
            answers={200: Answer("Every metric of this process.", None, content_type="text/plain")},
        ),
        Endpoint(
            method="GET",
            path="/v1/status",
            name="status",
            summary="Heads and their lag, history, leases, what waits to be sent, this process",
            scope="status",
            handler=status,
            answers={200: Answer("How the installation stands now.", Status)},
        ),
    )
