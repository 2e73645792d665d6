"""Whether this process lives and can serve, and how the whole installation stands.

`/healthz` says that the event loop turns; `/readyz` that database, schema and configuration are as they must be;
`/v1/status` shows heads, leases and what waits; `/metrics` the registry. The first two and the metrics need no token and
tell nothing of a brand's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol, cast

import asyncpg
import msgspec
import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler

from indexer.api.auth import authenticated
from indexer.api.bodies import json_response
from indexer.api.state import DATABASE, STATUS, WAKEUPS
from indexer.store import schema
from indexer.store.database import Database
from indexer.store.overview import overview

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


async def healthz(request: web.Request) -> web.Response:
    """That this answer came is the answer: it passed through the event loop."""
    return json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    reasons = list(request.app[STATUS].unready())
    checks = [
        *await _database_checks(request.app[DATABASE]),
        Check("process", not reasons, "; ".join(reasons) or None),
    ]
    ready = all(check.ok for check in checks)
    return json_response({"status": "ready" if ready else "unready", "checks": checks}, 200 if ready else 503)


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


async def status(request: web.Request) -> web.Response:
    token = await authenticated(request, "status")
    async with request.app[DATABASE].pool.acquire() as conn:
        seen = await overview(conn, token.brand)
    own = {"wakeups": request.app[WAKEUPS].status, **request.app[STATUS].process()}
    return json_response({**msgspec.to_builtins(seen, builtin_types=(msgspec.Raw,)), "process": own})


def metrics_handler(registry: CollectorRegistry) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    return make_aiohttp_handler(registry)
