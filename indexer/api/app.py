"""The HTTP server: which endpoints there are, and what every request passes through (an id, a bound on how many, time
limits for working and for sending, problems as JSON, counting). What a resource does is in the module of its subject.

Speaks plain HTTP/1.1, for a reverse proxy or a local caller: TLS, and slow or malformed senders of headers, are the
proxy's business.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from indexer.api import fulfilments, health, ledger, openapi, operations, signals, tail
from indexer.api.auth import AUTHENTICATOR
from indexer.api.bodies import MAX_BODY
from indexer.api.contract import Endpoint
from indexer.api.health import StatusSource
from indexer.api.problems import of_exception, of_status, unavailable
from indexer.api.state import DATABASE, STATUS, WAKEUPS
from indexer.config import Http
from indexer.store.database import Database
from indexer.store.tokens import Authenticator
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics

REQUEST_SECONDS = 15.0
IN_FLIGHT = 64  # requests to /v1 at once; beyond, 503: a queue would only grow older
WAITERS = 2_000  # requests that may be held back, on top of these
WAITERS_RETRY = 5  # seconds
SEND_SECONDS = 20.0  # for a client to take an answer
SHUTDOWN_SECONDS = 5.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
SERVER = "indexer"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ID: web.RequestKey[str] = web.RequestKey("request_id", str)

log = structlog.get_logger(__name__)


def endpoints(metrics: Metrics) -> tuple[Endpoint, ...]:
    """Everything that is served."""
    found = (
        *health.endpoints(metrics.registry),
        *operations.ENDPOINTS,
        *fulfilments.ENDPOINTS,
        *signals.ENDPOINTS,
        *ledger.ENDPOINTS,
    )
    return (*found, openapi.endpoint(found))


def create_app(database: Database, metrics: Metrics, status: StatusSource, wakeups: Wakeups) -> web.Application:
    """The application: nothing in it reads the configuration, so a reload needs no new one."""
    served = endpoints(metrics)
    held = frozenset(endpoint.path for endpoint in served if endpoint.waits)
    app = web.Application(
        middlewares=[_Passage(metrics).middleware, _Bound(IN_FLIGHT, WAITERS, held).middleware],
        client_max_size=MAX_BODY,
    )
    app[DATABASE], app[STATUS], app[WAKEUPS] = database, status, wakeups
    app[AUTHENTICATOR] = Authenticator(database.pool)
    app.add_routes([endpoint.route() for endpoint in served])
    app.on_startup.append(signals.prepare)
    app.cleanup_ctx.append(tail.following)
    app.on_shutdown.append(tail.drain)
    app.on_response_prepare.append(_common_headers)
    return app


@asynccontextmanager
async def serve(app: web.Application, http: Http) -> AsyncIterator[tuple[str, int]]:
    """Listens for as long as the body runs; yields host and port (a free one where the configuration says 0).

    At the end, clients that wait for news are answered at once, and requests under way have SHUTDOWN_SECONDS. A request
    ends with its connection. Raises OSError where the address is taken.
    """
    runner = _Runner(app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        site = web.TCPSite(runner, http.host, http.port, backlog=1024)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield host, port
    finally:
        await runner.cleanup()


class _Connection(web.RequestHandler):
    """A connection whose failures outside the application, such as bytes that are not HTTP, are problems too."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer is not None and request.writer.output_size > 0:
            raise ConnectionError("a part of the answer was sent already")
        request_id = uuid4().hex
        if status >= 500:
            log.error("a request failed outside the application", exc_info=exc, request_id=request_id)
        detail = (message or "the request cannot be served").partition("\n")[0].rstrip(": ")[:200]
        response = of_status(status, detail).response(request_id)
        response.headers["Server"] = SERVER
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:
        # a body that is not encoded as its headers say was answered with 400, and is read to its end after that: no defect
        if not isinstance(kw.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **kw)


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=asyncio.get_running_loop(), access_log=None)  # type: ignore[arg-type]


class _Runner(web.AppRunner):
    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(made.request_handler, request_factory=made.request_factory, handler_cancellation=True)


async def _common_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = SERVER
    response.headers["X-Content-Type-Options"] = "nosniff"
    if (request_id := request.get(_ID)) is not None:
        response.headers["X-Request-Id"] = request_id


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
        request_id = request[_ID] = stated if _REQUEST_ID.fullmatch(stated) else uuid4().hex
        route, started = _route(request), time.perf_counter()
        method = request.method if request.method in _METHODS else "other"
        answered = "gone"  # the client left before the answer
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                response: web.StreamResponse
                try:
                    response = await handler(request)
                except Exception as error:
                    response = of_exception(error, request_id).response(request_id)
                answered = str(response.status)
                return response
            finally:
                seconds = time.perf_counter() - started
                self._metrics.http_requests.labels(route, method, answered).inc()
                self._metrics.http_seconds.labels(route).observe(seconds)
                log.debug("answered", route=route, method=method, status=answered, seconds=round(seconds, 4))


class _Bound:
    """At most `limit` requests to /v1 at once, and `waiters` to what may be held back; health and metrics pass.

    None works longer than REQUEST_SECONDS (what may be held back bounds itself), and none takes longer than SEND_SECONDS to
    be taken by the client: a request counts until its answer has left.
    """

    def __init__(self, limit: int, waiters: int, held: frozenset[str]) -> None:
        self._limits = {False: limit, True: waiters}
        self._running = {False: 0, True: 0}
        self._held = held

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.path.startswith("/v1/"):
            return await handler(request)
        waits = _route(request) in self._held
        if self._running[waits] >= self._limits[waits]:
            raise unavailable(
                "too many clients wait for signals" if waits else "too many requests at once; repeat this one",
                WAITERS_RETRY if waits else 1,
            )
        self._running[waits] += 1
        try:
            async with asyncio.timeout(REQUEST_SECONDS + (signals.MAX_WAIT if waits else 0)):
                response = await handler(request)
            await _send(request, response)
            return response
        finally:
            self._running[waits] -= 1


async def _send(request: web.Request, response: web.StreamResponse) -> None:
    """Sends the whole answer. A client that does not take it loses the connection."""
    try:
        async with asyncio.timeout(SEND_SECONDS):
            await response.prepare(request)
            await response.write_eof()
    except TimeoutError:
        log.warning("a client did not take its answer", route=_route(request), seconds=SEND_SECONDS)
        if request.transport is not None:
            request.transport.abort()
