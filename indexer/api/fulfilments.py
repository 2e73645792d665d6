"""`/v1/fulfilments`: work for several workers of one brand. A claim is an operation that is one worker's alone to hand over
until its lease ends; `POST /v1/operations/{id}/fulfil` with the claim ends it well.

Who may claim what, and what a lapsed claim means, is decided by the contract functions.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from indexer.api import shapes
from indexer.api.auth import brand_asked
from indexer.api.bodies import json_response
from indexer.api.contract import Answer, Call, Endpoint, NoQuery, given
from indexer.api.problems import CONFLICT, NOT_FOUND
from indexer.api.state import DATABASE
from indexer.store import functions

MAX_CLAIMS = 100

_Lease = Annotated[int, Meta(ge=1, le=3600, description="seconds from now, by the database's clock")]


class ClaimRequest(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """How many to take, for how long, and who takes them. `brand` is for tokens of all brands; absent: of any."""

    consumer: shapes.Consumer
    max: Annotated[int, Meta(ge=1, le=MAX_CLAIMS)] = 1
    lease_seconds: _Lease = 60
    brand: shapes.BrandName | UnsetType = UNSET


class RenewRequest(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    lease_seconds: _Lease = 60


class ReleaseRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nothing, or an empty object."""


class Claims(msgspec.Struct, frozen=True):
    """Oldest ready first. Empty: nothing waits that nobody has."""

    data: list[functions.Claimed]


async def claim(call: Call[NoQuery, ClaimRequest]) -> web.Response:
    body = call.body
    brand = brand_asked(call.token, given(body.brand))
    async with call.request.app[DATABASE].pool.acquire() as conn:
        claims = await functions.claim_fulfilments(conn, brand, body.consumer, body.max, body.lease_seconds)
    return json_response(Claims(claims))


async def renew(call: Call[NoQuery, RenewRequest]) -> web.Response:
    claim_id = call.path_id("claim")
    async with call.request.app[DATABASE].pool.acquire() as conn:
        return json_response(await functions.renew_claim(conn, call.token.brand, claim_id, call.body.lease_seconds))


async def release(call: Call[NoQuery, ReleaseRequest]) -> web.Response:
    claim_id = call.path_id("claim")
    async with call.request.app[DATABASE].pool.acquire() as conn:
        return json_response(await functions.release_claim(conn, call.token.brand, claim_id))


ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/v1/fulfilments/claim",
        name="claimFulfilments",
        summary="Takes ready operations, for one worker alone",
        scope="fulfil",
        body=ClaimRequest,
        example={"consumer": "packing-desk-2", "max": 5, "leaseSeconds": 120},
        handler=claim,
        answers={
            200: Answer(
                "The operations that are the worker's now; perhaps none.",
                shapes.with_parts(
                    Claims,
                    data=list[shapes.with_parts(functions.Claimed, legs=list[shapes.Leg], metadata=dict[str, Any])],  # type: ignore[misc]
                ),
                links={
                    "renewClaim": {"claim": "$response.body#/data/0/claim"},
                    "releaseClaim": {"claim": "$response.body#/data/0/claim"},
                },
            )
        },
    ),
    Endpoint(
        method="POST",
        path="/v1/fulfilments/{claim}/renew",
        name="renewClaim",
        summary="Holds on to a claim",
        scope="fulfil",
        body=RenewRequest,
        body_optional=True,
        handler=renew,
        answers={200: Answer("The claim's new end.", functions.Renewed)},
        problems=(NOT_FOUND, CONFLICT),
    ),
    Endpoint(
        method="POST",
        path="/v1/fulfilments/{claim}/release",
        name="releaseClaim",
        summary="Gives a claimed operation back",
        scope="fulfil",
        body=ReleaseRequest,
        body_optional=True,
        handler=release,
        answers={200: Answer("It is free again, or had ended before.", functions.Released)},
        problems=(NOT_FOUND,),
    ),
)
