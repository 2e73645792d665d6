"""`/v1/operations`: registering, reading, cancelling, fulfilling, deciding.

The contract functions of schema `loyalty` decide what a request means and record it; here a request is only checked for
shape, brand and scope, and their answers are put into HTTP's words. Everything can be repeated safely.
"""

from __future__ import annotations

import re
from typing import Any
from uuid import UUID

from aiohttp import web

from indexer.api.auth import authenticated, may_act_for
from indexer.api.bodies import json_response, read_object, refuse_unknown
from indexer.api.problems import Problem
from indexer.api.state import DATABASE, WAKEUPS
from indexer.model.operation import State
from indexer.store import functions, queries
from indexer.store.tokens import Token

DEFAULT_PAGE = 50
_UUID = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")


def routes() -> list[web.RouteDef]:
    return [
        web.post("/v1/operations", register),
        web.get("/v1/operations", listing),
        web.get("/v1/operations/{id}", show),
        web.post("/v1/operations/{id}/cancel", cancel),
        web.post("/v1/operations/{id}/fulfil", fulfil),
        web.post("/v1/operations/{id}/resolve", resolve),
    ]


async def register(request: web.Request) -> web.Response:
    """201 with the operation when it is new, 200 when the same was registered before, 409 when another was."""
    token = await authenticated(request, "operations:write")
    body, text = await read_object(request)
    may_act_for(token, body.get("brand"))
    async with request.app[DATABASE].pool.acquire() as conn:
        registered = await functions.register_operation(conn, text)
        request.app[WAKEUPS].poke("registered")
        operation = await queries.operation(conn, registered.id)
    return json_response(operation, 201 if registered.created else 200, {"Location": f"/v1/operations/{registered.id}"})


async def listing(request: web.Request) -> web.Response:
    token = await authenticated(request, "operations:read")
    query = _query(request, "reference", "state", "brand", "limit", "cursor")
    brand = query.get("brand")
    may_act_for(token, brand)
    states = None
    if "state" in query:
        states = list(dict.fromkeys(query["state"].split(",")))
        if unknown := [state for state in states if state not in set(State)]:
            raise Problem(
                400, f"no state is called {unknown[0][:40]!r}; known are {', '.join(State)}", extra={"field": "state"}
            )
    limit = query.get("limit", str(DEFAULT_PAGE))
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 4 and 1 <= int(limit) <= queries.MAX_PAGE):
        raise Problem(400, f"limit: expected 1 to {queries.MAX_PAGE}", extra={"field": "limit"})
    async with request.app[DATABASE].pool.acquire() as conn:
        try:
            page = await queries.operations(
                conn,
                brand=token.brand or brand,
                reference=query.get("reference"),
                states=states,
                limit=int(limit),
                cursor=query.get("cursor"),
            )
        except queries.BadCursor as error:
            raise Problem(400, str(error), extra={"field": "cursor"}) from None
    return json_response(page)


async def show(request: web.Request) -> web.Response:
    token = await authenticated(request, "operations:read")
    operation_id = _operation_id(request)
    async with request.app[DATABASE].pool.acquire() as conn:
        operation = await queries.operation(conn, operation_id)
    if operation is None or token.brand not in (None, operation.brand):
        raise _no_such_operation()
    return json_response(operation)


async def cancel(request: web.Request) -> web.Response:
    """The wish is recorded; the signed action may still be executed until `executableUntil`."""
    token = await authenticated(request, "operations:write")
    operation_id = _operation_id(request)
    body, _ = await read_object(request, optional=True)
    refuse_unknown(body)
    async with request.app[DATABASE].pool.acquire() as conn:
        await _own(conn, token, operation_id)
        outcome = await functions.cancel(conn, operation_id)
    request.app[WAKEUPS].poke("registered")
    return json_response(outcome)


async def fulfil(request: web.Request) -> web.Response:
    """200 when it stands; 409 `reverted` or `claim-lapsed` when it was recorded and does not: an exposure."""
    token = await authenticated(request, "fulfil")
    operation_id = _operation_id(request)
    body, text = await read_object(request)
    refuse_unknown(body, "generation", "receipt", "claim")
    generation, claim = body.get("generation"), body.get("claim")
    if isinstance(generation, bool) or not isinstance(generation, int) or not 0 < generation < 2**31:
        raise Problem(
            422, "generation: expected the number that the ready signal carries", extra={"field": "generation"}
        )
    claim_id = None if claim is None else _uuid(claim, "claim")
    async with request.app[DATABASE].pool.acquire() as conn:
        await _own(conn, token, operation_id)
        outcome = await functions.fulfil(conn, operation_id, generation, text, claim_id)
    request.app[WAKEUPS].poke("registered")
    if outcome.outcome == "fulfilled":
        return json_response(outcome)
    raise Problem(
        409,
        "recorded, but the evidence behind this generation is gone: treat the hand-over as an exposure"
        if outcome.outcome == "reverted"
        else "recorded, but the claim had lapsed: another worker may have handed over too",
        kind=outcome.outcome.replace("_", "-"),
        extra={"outcome": outcome.outcome, "generation": outcome.generation, "repeated": outcome.repeated},
    )


async def resolve(request: web.Request) -> web.Response:
    """A person's decision on a piece of evidence; the actor is the token's name."""
    token = await authenticated(request, "resolve")
    operation_id = _operation_id(request)
    body, _ = await read_object(request)
    refuse_unknown(body, "evidenceId", "accept", "reason")
    accept, reason = body.get("accept"), body.get("reason")
    if not isinstance(accept, bool):
        raise Problem(422, "accept: expected true or false", extra={"field": "accept"})
    if not isinstance(reason, str):
        raise Problem(422, "reason: expected a text for those who ask later", extra={"field": "reason"})
    evidence_id = _uuid(body.get("evidenceId"), "evidenceId")
    async with request.app[DATABASE].pool.acquire() as conn:
        await _own(conn, token, operation_id)
        outcome = await functions.resolve(conn, operation_id, evidence_id, accept, reason, f"token {token.name[:150]}")
    request.app[WAKEUPS].poke("registered")
    return json_response(outcome)


def _no_such_operation() -> Problem:
    return Problem(404, "no such operation")


def _operation_id(request: web.Request) -> UUID:
    text = request.match_info["id"]
    if _UUID.fullmatch(text) is None:
        raise _no_such_operation()
    return UUID(text)


def _uuid(value: Any, field: str) -> UUID:
    if not isinstance(value, str) or _UUID.fullmatch(value) is None:
        raise Problem(422, f"{field}: expected a UUID", extra={"field": field})
    return UUID(value)


async def _own(conn: Any, token: Token, operation_id: UUID) -> None:
    """What belongs to another brand does not exist for this token; an operation's brand never changes."""
    if token.brand is not None and await queries.brand_of(conn, operation_id) != token.brand:
        raise _no_such_operation()


def _query(request: web.Request, *known: str) -> dict[str, str]:
    """The query's parameters, each once and known: a misspelt filter must not silently show everything."""
    found: dict[str, str] = {}
    for key, value in request.query.items():
        if key not in known:
            raise Problem(400, f"no parameter is called {key[:60]!r}; known are {', '.join(known)}")
        if key in found:
            raise Problem(400, f"{key} stands twice", extra={"field": key})
        if "\x00" in value or not _is_text(value):
            raise Problem(400, f"{key} is not text", extra={"field": key})
        found[key] = value
    return found


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
