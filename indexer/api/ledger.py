"""`/v1/programs` and `/v1/balances`: what the chain says of programmes and wallets, a page at a time. A brand's token sees
what belongs to that brand's issuers.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from indexer.api import shapes
from indexer.api.auth import brand_asked
from indexer.api.bodies import json_response
from indexer.api.contract import Answer, Call, Endpoint, given
from indexer.api.problems import BAD_REQUEST, Problem
from indexer.api.state import DATABASE
from indexer.model.types import Address
from indexer.store import cursors, programmes, queries

DEFAULT_PAGE = 50

_AddressText = Annotated[str, Meta(pattern="^0[xX][0-9a-fA-F]{40}$")]
_Brand = Annotated[shapes.BrandName, Meta(description="For tokens of all brands; absent: all.")] | UnsetType
_Limit = Annotated[int, Meta(ge=1, le=queries.MAX_PAGE, description="Entries at most.")]
_Cursor = (
    Annotated[str, Meta(min_length=1, max_length=cursors.MAX_LENGTH, description="`nextCursor` of the page before.")]
    | UnsetType
)


class ProgramsQuery(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    brand: _Brand = UNSET
    chain_id: Annotated[int, Meta(ge=0, le=2**63 - 1, description="Programmes of this chain.")] | UnsetType = UNSET
    issuer: Annotated[_AddressText, Meta(description="Programmes of this issuer.")] | UnsetType = UNSET
    limit: _Limit = DEFAULT_PAGE
    cursor: _Cursor = UNSET


class BalancesQuery(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    wallet: Annotated[_AddressText, Meta(description="Whose balances.")]
    brand: _Brand = UNSET
    limit: _Limit = DEFAULT_PAGE
    cursor: _Cursor = UNSET


async def programs(call: Call[ProgramsQuery, None]) -> web.Response:
    query = call.query
    brand = brand_asked(call.token, given(query.brand))
    async with call.request.app[DATABASE].pool.acquire() as conn:
        try:
            page = await programmes.programs(
                conn,
                brand=brand,
                chain_id=given(query.chain_id),
                issuer=_address(query.issuer) if query.issuer is not UNSET else None,
                limit=query.limit,
                cursor=given(query.cursor),
            )
        except cursors.BadCursor as error:
            raise Problem(BAD_REQUEST, str(error), extra={"field": "cursor"}) from None
    return json_response(page)


async def balances(call: Call[BalancesQuery, None]) -> web.Response:
    query = call.query
    brand = brand_asked(call.token, given(query.brand))
    async with call.request.app[DATABASE].pool.acquire() as conn:
        try:
            page = await queries.balances(
                conn, _address(query.wallet), brand=brand, limit=query.limit, cursor=given(query.cursor)
            )
        except cursors.BadCursor as error:
            raise Problem(BAD_REQUEST, str(error), extra={"field": "cursor"}) from None
    return json_response(page)


def _address(text: str) -> Address:
    return Address(bytes.fromhex(text[2:]))


ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/v1/programs",
        name="listPrograms",
        summary="Loyalty programmes, by chain and token contract",
        scope="chain:read",
        query=ProgramsQuery,
        handler=programs,
        answers={200: Answer("A page of programmes.", programmes.ProgramPage)},
    ),
    Endpoint(
        method="GET",
        path="/v1/balances",
        name="listBalances",
        summary="What a wallet holds, by programme and bucket",
        scope="chain:read",
        query=BalancesQuery,
        handler=balances,
        answers={200: Answer("A page of balances; zero is not listed.", queries.BalancePage)},
    ),
)
