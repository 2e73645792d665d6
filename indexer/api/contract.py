"""What an endpoint is: one declaration of method, path, scope, query, body, answers and problems, from which both the route
that serves it and its entry in the OpenAPI document are made. So neither can say what the other does not do.

A handler gets a `Call`: who asks, the query and the body as the declared structs. Which endpoints there are is told by the
modules of their subjects.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar
from uuid import UUID, uuid4

import msgspec
from aiohttp import HttpVersion11, web

from indexer.api.auth import authenticated
from indexer.api.bodies import read_object, shaped
from indexer.api.problems import (
    BAD_REQUEST,
    EXPECTATION_FAILED,
    FORBIDDEN,
    INTERNAL,
    NOT_FOUND,
    NOT_JSON,
    TIMEOUT,
    TOO_LARGE,
    UNAUTHORIZED,
    UNAVAILABLE,
    UNPROCESSABLE,
    Kind,
    Problem,
)
from indexer.store.tokens import Token

Q = TypeVar("Q")
B = TypeVar("B")
T = TypeVar("T")

_UUID = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No parameters: whatever stands in the query is refused."""


def given(value: T | msgspec.UnsetType) -> T | None:
    """What was stated, or None."""
    return None if isinstance(value, msgspec.UnsetType) else value


@dataclass(frozen=True, slots=True)
class Call(Generic[Q, B]):
    """One request that passed the gate. `body` is None where the endpoint declares none; `text` is the body as it came."""

    request: web.Request
    query: Q
    body: B
    text: str
    _token: Token | None

    @property
    def token(self) -> Token:
        assert self._token is not None, "the endpoint declares no scope"
        return self._token

    def path_id(self, name: str = "id") -> UUID:
        """A UUID of the path. What is not one names nothing: Problem 404."""
        text = self.request.match_info[name]
        if _UUID.fullmatch(text) is None:
            raise Problem(NOT_FOUND, f"no such {name}" if name != "id" else "no such operation")
        return UUID(text)


Handler = Callable[[Call[Any, Any]], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A success (or, for readiness, its opposite): its shape, and when it comes. `shape` None: text that is not JSON.

    `links`: which endpoints go on from here, with the parameters that this answer holds, as OpenAPI's runtime expressions.
    """

    when: str
    shape: Any
    headers: tuple[str, ...] = ()
    content_type: str = "application/json"
    links: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """`scope` None: no token is asked for. `judged_by_store`: the body goes to a contract function, which decides what
    is wrong with it; it reaches the handler as the parsed object. `waits`: the answer may be held back until there is news.
    """

    method: str
    path: str
    name: str
    summary: str
    handler: Handler
    answers: Mapping[int, Answer]
    scope: str | None = None
    query: type[msgspec.Struct] = NoQuery
    body: type[msgspec.Struct] | None = None
    body_optional: bool = False
    judged_by_store: bool = False
    example: Mapping[str, Any] | None = None
    waits: bool = False
    problems: Sequence[Kind] = ()
    # parameter of the query → whether it is a list; worked out once: to ask msgspec takes milliseconds
    _known: Mapping[str, bool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        fields = msgspec.structs.fields(self.query)
        object.__setattr__(self, "_known", {entry.encode_name: "tuple[" in str(entry.type) for entry in fields})

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Every problem that this endpoint may answer with, by status."""
        found = list(self.problems)
        if self.path.startswith("/v1/"):
            found += [BAD_REQUEST, INTERNAL, UNAVAILABLE]
        if self.scope is not None:
            found += [UNAUTHORIZED, FORBIDDEN]
        if self.body is not None:
            found += [TIMEOUT, TOO_LARGE, NOT_JSON, UNPROCESSABLE]
        return tuple(sorted(dict.fromkeys(found), key=lambda kind: (kind.status, kind.slug)))

    def route(self) -> web.RouteDef:
        method = web.get if self.method == "GET" else partial(web.route, self.method)
        return method(self.path, self._serve, expect_handler=_expected)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        token = await authenticated(request, self.scope) if self.scope is not None else None
        query = shaped(self._parameters(request), self.query, refusal=BAD_REQUEST, strict=False)
        body: Any = None
        text = ""
        if self.body is not None:
            body, text = await read_object(request, optional=self.body_optional)
            if not self.judged_by_store:
                body = shaped(body, self.body)
        return await self.handler(Call(request, query, body, text, token))

    def _parameters(self, request: web.Request) -> dict[str, Any]:
        """The query's parameters, each once and known: a misspelt filter must not silently show everything."""
        if not self.path.startswith("/v1/"):
            return {}
        known, found = self._known, dict[str, Any]()
        for key, value in request.query.items():
            if key not in known:
                hint = f"known are {', '.join(known)}" if known else "none is known here"
                raise Problem(BAD_REQUEST, f"no parameter is called {key[:60]!r}; {hint}")
            if key in found:
                raise Problem(BAD_REQUEST, f"{key} stands twice", extra={"field": key})
            if "\x00" in value or not _is_text(value):
                raise Problem(BAD_REQUEST, f"{key} is not text", extra={"field": key})
            found[key] = value.split(",") if known[key] else value
        return found


async def _expected(request: web.Request) -> web.StreamResponse | None:
    """Answers an `Expect`, before any middleware has seen the request: aiohttp's own refusal is no problem+json."""
    if request.headers["Expect"].lower() != "100-continue":
        return Problem(EXPECTATION_FAILED, "only 100-continue can be expected").response(uuid4().hex)
    if request.version == HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # nothing of the answer has been sent
    return None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
