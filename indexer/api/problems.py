"""Errors as `application/problem+json` (RFC 9457): one shape for everything that is not a success, 404, 405, 413 and 500
included. `type` names the kind of problem and is stable; `detail` is for people. No answer repeats a secret, an SQL text or
a traceback: what is not foreseen is logged under the request's id, and the answer carries that id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import asyncpg
import msgspec
import structlog
from aiohttp import web

log = structlog.get_logger(__name__)

TYPE = "urn:loyalty:problem:"
_STATUS_OF = {"LY400": 400, "LY403": 403, "LY404": 404, "LY409": 409, "LY422": 422}
_TITLES = {
    400: ("bad-request", "The request cannot be read"),
    401: ("unauthorized", "A valid token is needed"),
    403: ("forbidden", "The token does not allow this"),
    404: ("not-found", "There is no such thing"),
    405: ("method-not-allowed", "The resource does not know this method"),
    408: ("timeout", "The request did not arrive in time"),
    409: ("conflict", "The request contradicts what is recorded"),
    411: ("length-required", "The body's length is not stated"),
    413: ("too-large", "The body is too large"),
    415: ("not-json", "The body is not said to be JSON"),
    417: ("expectation-failed", "The expectation cannot be met"),
    422: ("unprocessable", "The request cannot be what it says"),
    500: ("internal", "The request met a defect of this program"),
    503: ("unavailable", "The request cannot be served now"),
}
_OURS = frozenset({"type", "title", "status", "detail"})


class Problem(Exception):
    """Raise it anywhere in a handler; the middleware answers it. `extra` becomes members of the body."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        kind: str | None = None,
        extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.kind = status, detail, kind
        self.extra = {key: value for key, value in (extra or {}).items() if key not in _OURS}
        self.headers = dict(headers or {})

    def response(self) -> web.Response:
        slug, title = _TITLES.get(self.status, ("error", "The request failed"))
        body = {"type": TYPE + (self.kind or slug), "title": title, "status": self.status, "detail": self.detail}
        return web.Response(
            status=self.status,
            body=msgspec.json.encode(body | self.extra),
            content_type="application/problem+json",
            headers=self.headers,
        )


def of_database(error: asyncpg.PostgresError) -> Problem | None:
    """The refusal that a contract function raised; None for an error that is not one."""
    status = _STATUS_OF.get(error.sqlstate or "")
    if status is not None:
        try:
            extra = json.loads(error.detail or "{}")
        except ValueError:
            extra = {}
        return Problem(status, str(error.message), extra=extra if isinstance(extra, dict) else {})
    if isinstance(error, asyncpg.DataError | asyncpg.StatementTooComplexError | asyncpg.ProgramLimitExceededError):
        # a value that PostgreSQL cannot hold and that no check of ours foresaw: the caller's, not a defect
        return Problem(422, "a value in the request cannot be stored")
    return None


def of_exception(error: Exception, request_id: str) -> Problem:
    """What an exception that left a handler means to the caller."""
    again = {"Retry-After": "1"}
    match error:
        case Problem():
            return error
        case web.HTTPException():
            return _of_http(error)
        case asyncpg.PostgresError() if (refused := of_database(error)) is not None:
            return refused
        case asyncpg.DeadlockDetectedError() | asyncpg.SerializationError() | asyncpg.QueryCanceledError():
            return Problem(503, "the database was too busy; nothing was recorded, repeat the request", headers=again)
        case TimeoutError():
            return Problem(503, "the answer took too long; repeat the request, which is idempotent", headers=again)
        case (
            asyncpg.PostgresConnectionError()
            | asyncpg.InternalClientError()
            | asyncpg.InterfaceError()
            | asyncpg.OperatorInterventionError()
            | asyncpg.InsufficientResourcesError()
            | OSError()
        ):
            log.warning("the database does not answer a request", error=type(error).__name__)
            return Problem(503, "the database does not answer; repeat the request", headers=again)
        case _:
            log.error("a request failed", exc_info=error)
            return Problem(500, f"request {request_id}: the log of this process has the reason")


def _of_http(error: web.HTTPException) -> Problem:
    """aiohttp's own refusals: no such route, wrong method, too large a body."""
    match error:
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            detail = f"{error.method[:20]} is not known here; allowed: {allowed}"
            return Problem(405, detail, headers={"Allow": allowed})
        case web.HTTPRequestEntityTooLarge():
            return Problem(413, "a request's body may have 64 kB", headers={"Connection": "close"})
        case web.HTTPNotFound():
            return Problem(404, "no such resource")
        case _:
            return Problem(error.status, error.reason or "the request failed")
