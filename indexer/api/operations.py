"""`/v1/operations`: registering, reading, cancelling, fulfilling, deciding.

The contract functions of schema `loyalty` decide what a request means and record it; here a request is only checked for
shape, brand and scope, and their answers are put into HTTP's words. Everything can be repeated safely.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any
from uuid import UUID

import asyncpg
import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from indexer.api import shapes
from indexer.api.auth import brand_asked, may_act_for
from indexer.api.bodies import json_response
from indexer.api.contract import Answer, Call, Endpoint, NoQuery, given
from indexer.api.problems import BAD_REQUEST, CLAIM_LAPSED, CONFLICT, NOT_FOUND, REVERTED, UNPROCESSABLE, Problem
from indexer.api.state import DATABASE, WAKEUPS
from indexer.model.operation import State
from indexer.store import cursors, functions, queries
from indexer.store.tokens import Token

DEFAULT_PAGE = 50


class OperationsQuery(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    reference: Annotated[str, Meta(max_length=200, description="The one with this reference.")] | UnsetType = UNSET
    state: Annotated[tuple[State, ...], Meta(min_length=1, description="In one of these states.")] | UnsetType = UNSET
    brand: Annotated[shapes.BrandName, Meta(description="For tokens of all brands; absent: all.")] | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=queries.MAX_PAGE, description="Entries at most.")] = DEFAULT_PAGE
    cursor: (
        Annotated[
            str, Meta(min_length=1, max_length=cursors.MAX_LENGTH, description="`nextCursor` of the page before.")
        ]
        | UnsetType
    ) = UNSET


class CancelRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nothing, or an empty object."""


class FulfilRequest(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """`generation`: the number that the ready signal carries. `claim`: where the operation was claimed."""

    generation: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    receipt: Annotated[dict[str, Any], Meta(description="the brand's own words, at most 8 kB")] | UnsetType = UNSET
    claim: UUID | None = None


class ResolveRequest(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """A person's decision on a piece of evidence, with a reason for those who ask later."""

    evidence_id: UUID
    accept: bool
    reason: Annotated[shapes.Text, Meta(min_length=1, max_length=500)]


async def register(call: Call[NoQuery, dict[str, Any]]) -> web.Response:
    """201 with the operation when it is new, 200 when the same was registered before, 409 when another was."""
    app = call.request.app
    may_act_for(call.token, call.body.get("brand"))
    async with app[DATABASE].pool.acquire() as conn:
        registered = await functions.register_operation(conn, call.text)
        app[WAKEUPS].poke("registered")
        operation = await queries.operation(conn, registered.id)
    return json_response(operation, 201 if registered.created else 200, {"Location": f"/v1/operations/{registered.id}"})


async def listing(call: Call[OperationsQuery, None]) -> web.Response:
    query = call.query
    states = given(query.state)
    brand = brand_asked(call.token, given(query.brand))
    async with call.request.app[DATABASE].pool.acquire() as conn:
        try:
            page = await queries.operations(
                conn,
                brand=brand,
                reference=given(query.reference),
                states=list(dict.fromkeys(states)) if states is not None else None,
                limit=query.limit,
                cursor=given(query.cursor),
            )
        except queries.BadCursor as error:
            raise Problem(BAD_REQUEST, str(error), extra={"field": "cursor"}) from None
    return json_response(page)


async def show(call: Call[NoQuery, None]) -> web.Response:
    operation_id = call.path_id()
    async with call.request.app[DATABASE].pool.acquire() as conn:
        operation = await queries.operation(conn, operation_id)
    if operation is None or call.token.brand not in (None, operation.brand):
        raise _no_such_operation()
    return json_response(operation)


async def cancel(call: Call[NoQuery, CancelRequest]) -> web.Response:
    """The wish is recorded; the signed action may still be executed until `executableUntil`."""
    app, operation_id = call.request.app, call.path_id()
    async with app[DATABASE].pool.acquire() as conn:
        await _own(conn, call.token, operation_id)
        outcome = await functions.cancel(conn, operation_id)
    app[WAKEUPS].poke("registered")
    return json_response(outcome)


async def fulfil(call: Call[NoQuery, FulfilRequest]) -> web.Response:
    """200 when it stands; 409 `reverted` or `claim-lapsed` when it was recorded and does not: an exposure."""
    app, operation_id, body = call.request.app, call.path_id(), call.body
    async with app[DATABASE].pool.acquire() as conn:
        await _own(conn, call.token, operation_id)
        with _named_in_the_body("claim"):
            outcome = await functions.fulfil(
                conn, operation_id, body.generation, call.text, body.claim, actor=_actor(call.token)
            )
    app[WAKEUPS].poke("registered")
    if outcome.outcome == "fulfilled":
        return json_response(outcome)
    lapsed = outcome.outcome == "claim_lapsed"
    raise Problem(
        CLAIM_LAPSED if lapsed else REVERTED,
        "recorded, but the claim had lapsed: another worker may have handed over too"
        if lapsed
        else "recorded, but the evidence behind this generation is gone: treat the hand-over as an exposure",
        extra={"outcome": outcome.outcome, "generation": outcome.generation, "repeated": outcome.repeated},
    )


async def resolve(call: Call[NoQuery, ResolveRequest]) -> web.Response:
    """A person's decision on a piece of evidence; the actor is the token's name."""
    app, operation_id, body = call.request.app, call.path_id(), call.body
    async with app[DATABASE].pool.acquire() as conn:
        await _own(conn, call.token, operation_id)
        with _named_in_the_body("evidenceId"):
            outcome = await functions.resolve(
                conn, operation_id, body.evidence_id, body.accept, body.reason, _actor(call.token)
            )
    app[WAKEUPS].poke("registered")
    return json_response(outcome)


@contextmanager
def _named_in_the_body(field: str) -> Iterator[None]:
    """The path was found: what does not exist is what this field of the body names. 404 is for the path alone."""
    try:
        yield
    except asyncpg.PostgresError as error:
        if error.sqlstate != "LY404":
            raise
        raise Problem(UNPROCESSABLE, str(error.message), extra={"field": field}) from None


def _actor(token: Token) -> str:
    return f"token {token.name[:150]}"


def _no_such_operation() -> Problem:
    return Problem(NOT_FOUND, "no such operation")


async def _own(conn: Any, token: Token, operation_id: UUID) -> None:
    """What belongs to another brand does not exist for this token; an operation's brand never changes."""
    brand = await queries.brand_of(conn, operation_id)
    if brand is None or token.brand not in (None, brand):
        raise _no_such_operation()


_OPERATION = shapes.with_parts(
    queries.Operation,
    metadata=dict[str, Any],
    legs=list[shapes.Leg],
    evidence=list[shapes.Evidence],
    waiting_for=list[shapes.Waiting],
    conflicts=list[shapes.Conflict],
    history=list[shapes.with_parts(queries.Transition, detail=dict[str, Any])] | UnsetType,  # type: ignore[misc]
    receipts=list[shapes.with_parts(queries.Receipt, receipt=dict[str, Any])] | UnsetType,  # type: ignore[misc]
)
_LINKS = {
    name: {"id": "$response.body#/id"}
    for name in ("showOperation", "cancelOperation", "fulfilOperation", "resolveOperation")
}
_PAGE = shapes.with_parts(queries.Page, data=list[_OPERATION])  # type: ignore[valid-type]

ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/v1/operations",
        name="registerOperation",
        summary="Registers what a brand waits for; the same again is the same operation",
        scope="operations:write",
        body=shapes.Registration,
        judged_by_store=True,
        example=shapes.REGISTRATION,
        handler=register,
        answers={
            200: Answer(
                "The same was registered before; as it is now.", _OPERATION, headers=("Location",), links=_LINKS
            ),
            201: Answer("It is new.", _OPERATION, headers=("Location",), links=_LINKS),
        },
        problems=(CONFLICT,),
    ),
    Endpoint(
        method="GET",
        path="/v1/operations",
        name="listOperations",
        summary="Operations, newest registration first, without history and receipts",
        scope="operations:read",
        query=OperationsQuery,
        handler=listing,
        answers={200: Answer("A page of operations.", _PAGE)},
    ),
    Endpoint(
        method="GET",
        path="/v1/operations/{id}",
        name="showOperation",
        summary="One operation, with its history and receipts: the truth before anything irreversible",
        scope="operations:read",
        handler=show,
        answers={200: Answer("The operation as it is now.", _OPERATION)},
        problems=(NOT_FOUND,),
    ),
    Endpoint(
        method="POST",
        path="/v1/operations/{id}/cancel",
        name="cancelOperation",
        summary="Records that the brand does not want it any more",
        scope="operations:write",
        body=CancelRequest,
        body_optional=True,
        handler=cancel,
        answers={200: Answer("Recorded; it may still be executed until `executableUntil`.", functions.Cancelled)},
        problems=(NOT_FOUND, CONFLICT),
    ),
    Endpoint(
        method="POST",
        path="/v1/operations/{id}/fulfil",
        name="fulfilOperation",
        summary="Records that the brand has handed over",
        scope="fulfil",
        body=FulfilRequest,
        example={"generation": 1, "receipt": {"parcel": "JD0146"}},
        handler=fulfil,
        answers={200: Answer("Recorded, and it stands.", functions.Fulfilled)},
        problems=(NOT_FOUND, CONFLICT, REVERTED, CLAIM_LAPSED),
    ),
    Endpoint(
        method="POST",
        path="/v1/operations/{id}/resolve",
        name="resolveOperation",
        summary="Records a person's decision on a piece of evidence",
        scope="resolve",
        body=ResolveRequest,
        handler=resolve,
        answers={200: Answer("Recorded.", functions.Resolved)},
        problems=(NOT_FOUND, CONFLICT),
    ),
)
