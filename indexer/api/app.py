"""The HTTP server: routes, and what every request passes through (an id, a bound on how many, a time limit, problems as
JSON, counting). What a resource does is in the module of its subject.

Speaks plain HTTP/1.1, for a reverse proxy or a local caller: TLS, and slow or malformed senders of headers, are the
proxy's business.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from indexer.api import health, operations
from indexer.api.auth import AUTHENTICATOR
from indexer.api.bodies import MAX_BODY
from indexer.api.health import StatusSource
from indexer.api.problems import Problem, of_exception
from indexer.api.state import DATABASE, STATUS, WAKEUPS
from indexer.config import Http
from indexer.store.database import Database
from indexer.store.tokens import Authenticator
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics

REQUEST_SECONDS = 15.0
IN_FLIGHT = 64  # requests to /v1 at once; beyond, 503: a queue would only grow older
SHUTDOWN_SECONDS = 5.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

log = structlog.get_logger(__name__)


def create_app(database: Database, metrics: Metrics, status: StatusSource, wakeups: Wakeups) -> web.Application:
    """The application: nothing in it reads the configuration, so a reload needs no new one."""
    app = web.Application(
        middlewares=[_Passage(metrics).middleware, _Bound(IN_FLIGHT).middleware], client_max_size=MAX_BODY
    )
    app[DATABASE], app[STATUS], app[WAKEUPS] = database, status, wakeups
    app[AUTHENTICATOR] = Authenticator(database.pool)
    app.add_routes(
        [
            web.get("/healthz", health.healthz),
            web.get("/readyz", health.readyz),
            web.get("/metrics", health.metrics_handler(metrics.registry)),
            web.get("/v1/status", health.status),
            *operations.routes(),
        ]
    )
    app.on_response_prepare.append(_common_headers)
    return app


@asynccontextmanager
async def serve(app: web.Application, http: Http) -> AsyncIterator[tuple[str, int]]:
    """Listens for as long as the body runs; yields host and port (a free one where the configuration says 0).

    At the end, requests under way have SHUTDOWN_SECONDS. Raises OSError where the address is taken.
    """
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        site = web.TCPSite(runner, http.host, http.port)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield host, port
    finally:
        await runner.cleanup()


async def _common_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "indexer"
    response.headers["X-Content-Type-Options"] = "nosniff"


def _route(request: web.Request) -> str:
    """The route's pattern: a label, and fit for logs, whatever the path was."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "none"


class _Passage:
    """The outermost step: every answer has an id and is counted, every failure is a problem in JSON."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        stated = request.headers.get("X-Request-Id", "")
        request_id = stated if _REQUEST_ID.fullmatch(stated) else uuid4().hex
        route, started = _route(request), time.perf_counter()
        method = request.method if request.method in _METHODS else "other"
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            response: web.StreamResponse
            try:
                response = await handler(request)
            except Exception as error:
                problem = of_exception(error, request_id)
                problem.extra["requestId"] = request_id
                response = problem.response()
            seconds = time.perf_counter() - started
            self._metrics.http_requests.labels(route, method, str(response.status)).inc()
            self._metrics.http_seconds.labels(route).observe(seconds)
            log.debug("answered", route=route, method=method, status=response.status, seconds=round(seconds, 4))
        response.headers["X-Request-Id"] = request_id
        return response


class _Bound:
    """At most `limit` requests to /v1 at once, none longer than REQUEST_SECONDS; health and metrics pass."""

    def __init__(self, limit: int) -> None:
        self._limit, self._running = limit, 0

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.path.startswith("/v1/"):
            return await handler(request)
        if self._running >= self._limit:
            raise Problem(503, "too many requests at once; repeat this one", headers={"Retry-After": "1"})
        self._running += 1
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                return await handler(request)
        finally:
            self._running -= 1
