"""Errors as `application/problem+json` (RFC 9457): one shape for everything that is not a success, 404, 405, 413 and 500
included. `type` names the kind of problem and is stable; `detail` is for people. No answer repeats a secret, an SQL text or
a traceback: what is not foreseen is logged under the request's id, and the answer carries that id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg
import msgspec
import structlog
from aiohttp import web

log = structlog.get_logger(__name__)

TYPE = "urn:loyalty:problem:"
CONTENT_TYPE = "application/problem+json"
_OURS = frozenset({"type", "title", "status", "detail"})


@dataclass(frozen=True, slots=True)
class Kind:
    """What may go wrong, as the document and the answers name it. `headers` come with every answer of this kind."""

    status: int
    slug: str
    title: str
    headers: tuple[str, ...] = ()

    @property
    def type(self) -> str:
        return TYPE + self.slug


BAD_REQUEST = Kind(400, "bad-request", "The request cannot be read")
UNAUTHORIZED = Kind(401, "unauthorized", "A valid token is needed", ("WWW-Authenticate",))
FORBIDDEN = Kind(403, "forbidden", "The token does not allow this")
NOT_FOUND = Kind(404, "not-found", "There is no such thing")
METHOD_NOT_ALLOWED = Kind(405, "method-not-allowed", "The resource does not know this method", ("Allow",))
TIMEOUT = Kind(408, "timeout", "The request did not arrive in time")
CONFLICT = Kind(409, "conflict", "The request contradicts what is recorded")
REVERTED = Kind(409, "reverted", "Recorded, and the evidence behind this generation is gone")
CLAIM_LAPSED = Kind(409, "claim-lapsed", "Recorded, and the claim had lapsed")
OTHER_HISTORY = Kind(409, "other-history", "The cursor belongs to another history of signals")
GONE = Kind(410, "gone", "What follows the cursor is not kept any more")
LENGTH_REQUIRED = Kind(411, "length-required", "The body's length is not stated")
TOO_LARGE = Kind(413, "too-large", "The body is too large")
NOT_JSON = Kind(415, "not-json", "The body is not said to be JSON")
EXPECTATION_FAILED = Kind(417, "expectation-failed", "The expectation cannot be met")
UNPROCESSABLE = Kind(422, "unprocessable", "The request cannot be what it says")
INTERNAL = Kind(500, "internal", "The request met a defect of this program")
UNAVAILABLE = Kind(503, "unavailable", "The request cannot be served now", ("Retry-After",))

# The kind of a status that something other than a handler of ours decided on: aiohttp, a contract function.
_BY_STATUS = {
    kind.status: kind
    for kind in (
        *(BAD_REQUEST, UNAUTHORIZED, FORBIDDEN, NOT_FOUND, METHOD_NOT_ALLOWED, TIMEOUT, CONFLICT, GONE),
        *(LENGTH_REQUIRED, TOO_LARGE, NOT_JSON, EXPECTATION_FAILED, UNPROCESSABLE, INTERNAL, UNAVAILABLE),
    )
}
_OF_SQLSTATE = {"LY400": BAD_REQUEST, "LY403": FORBIDDEN, "LY404": NOT_FOUND, "LY409": CONFLICT, "LY422": UNPROCESSABLE}


class ProblemBody(msgspec.Struct, frozen=True, rename="camel"):
    """Why a request failed (RFC 9457). A kind of problem may add members, such as `field`."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str


class Problem(Exception):
    """Raise it anywhere in a handler; the middleware answers it. `extra` becomes members of the body."""

    def __init__(
        self,
        kind: Kind,
        detail: str,
        *,
        extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail
        # `status` is HTTP's in a problem: an operation's goes under another name
        named = {"operationStatus" if key == "status" else key: value for key, value in (extra or {}).items()}
        self.extra = {key: value for key, value in named.items() if key not in _OURS}
        self.headers = dict(headers or {})

    @property
    def status(self) -> int:
        return self.kind.status

    def response(self, request_id: str) -> web.Response:
        body = {"type": self.kind.type, "title": self.kind.title, "status": self.kind.status, "detail": self.detail}
        return web.Response(
            status=self.kind.status,
            body=msgspec.json.encode(body | self.extra | {"requestId": request_id}),
            content_type=CONTENT_TYPE,
            headers={"Cache-Control": "no-store", "X-Request-Id": request_id} | self.headers,
        )


def unavailable(detail: str, seconds: int = 1) -> Problem:
    """503: nothing was recorded, or what was can be repeated; come again after so many seconds."""
    return Problem(UNAVAILABLE, detail, headers={"Retry-After": str(seconds)})


def of_database(error: asyncpg.PostgresError) -> Problem | None:
    """The refusal that a contract function raised; None for an error that is not one."""
    kind = _OF_SQLSTATE.get(error.sqlstate or "")
    if kind is not None:
        try:
            extra = json.loads(error.detail or "{}")
        except ValueError:
            extra = {}
        return Problem(kind, str(error.message), extra=extra if isinstance(extra, dict) else {})
    if isinstance(error, asyncpg.DataError | asyncpg.StatementTooComplexError | asyncpg.ProgramLimitExceededError):
        # a value that PostgreSQL cannot hold and that no check of ours foresaw: the caller's, not a defect
        return Problem(UNPROCESSABLE, "a value in the request cannot be stored")
    return None


def of_exception(error: Exception, request_id: str) -> Problem:
    """What an exception that left a handler means to the caller."""
    match error:
        case Problem():
            return error
        case web.HTTPException():
            return _of_http(error)
        case asyncpg.PostgresError() if (refused := of_database(error)) is not None:
            return refused
        case asyncpg.DeadlockDetectedError() | asyncpg.SerializationError() | asyncpg.QueryCanceledError():
            return unavailable("the database was too busy; nothing was recorded, repeat the request")
        case TimeoutError():
            return unavailable("the answer took too long; repeat the request, which is idempotent")
        case (
            asyncpg.PostgresConnectionError()
            | asyncpg.InternalClientError()
            | asyncpg.InterfaceError()
            | asyncpg.OperatorInterventionError()
            | asyncpg.InsufficientResourcesError()
            | OSError()
        ):
            log.warning("the database does not answer a request", error=type(error).__name__)
            return unavailable("the database does not answer; repeat the request")
        case _:
            log.error("a request failed", exc_info=error)
            return Problem(INTERNAL, f"request {request_id}: the log of this process has the reason")


def of_status(status: int, detail: str) -> Problem:
    """A failure that was decided on outside the handlers: such as bytes that are not HTTP."""
    return Problem(_BY_STATUS.get(status) or Kind(status, "error", "The request failed"), detail)


def _of_http(error: web.HTTPException) -> Problem:
    """aiohttp's own refusals: no such route, wrong method, too large a body."""
    match error:
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            detail = f"{error.method[:20]} is not known here; allowed: {allowed}"
            return Problem(METHOD_NOT_ALLOWED, detail, headers={"Allow": allowed})
        case web.HTTPRequestEntityTooLarge():
            return Problem(TOO_LARGE, "a request's body may have 64 kB", headers={"Connection": "close"})
        case web.HTTPNotFound():
            return Problem(NOT_FOUND, "no such resource")
        case _:
            return of_status(error.status, error.reason or "the request failed")
