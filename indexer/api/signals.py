"""`GET /v1/signals`: a brand's signals in order and without a gap, from the one outbox, for those who pull.

The cursor names stream, brand and number. An answer holds what follows it, or, after `wait` seconds, nothing and the same
cursor. A connection is held while the store is read and not a moment longer, at most READERS at once, so that clients
that wait or are slow cost memory only.
"""

from __future__ import annotations

import asyncio
from typing import Annotated
from uuid import UUID

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from indexer.api import shapes
from indexer.api.auth import authenticated, one_brand
from indexer.api.contract import Answer, Call, Endpoint, given
from indexer.api.problems import BAD_REQUEST, GONE, NOT_FOUND, OTHER_HISTORY, Problem
from indexer.api.state import DATABASE
from indexer.api.tail import TAILS
from indexer.store import cursors, feed
from indexer.store.feed import Entry

DEFAULT_PAGE = 100
MAX_PAGE = 500
MAX_WAIT = 60  # seconds
PAGE_BYTES = 512 * 1024  # of bodies; one signal at least
READERS = 4  # connections at once for reading pages
READ_SECONDS = 15.0
_READING: web.AppKey[asyncio.Semaphore] = web.AppKey("signal_readers", asyncio.Semaphore)


class SignalsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    after: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=cursors.MAX_LENGTH,
                description="`nextCursor` of the last answer. Absent: from the oldest signal that is kept. `now`: what comes from now on.",
            ),
        ]
        | UnsetType
    ) = UNSET
    wait: Annotated[
        int, Meta(ge=0, le=MAX_WAIT, description="Seconds to hold the answer back while there is nothing new.")
    ] = 0
    limit: Annotated[
        int, Meta(ge=1, le=MAX_PAGE, description="Signals at most; large ones make an answer end earlier.")
    ] = DEFAULT_PAGE
    brand: Annotated[shapes.BrandName, Meta(description="Needed from a token of all brands.")] | UnsetType = UNSET


class Position(msgspec.Struct, frozen=True, array_like=True):
    """How far somebody is in which history."""

    stream: UUID
    sequence: Annotated[int, Meta(ge=0, le=2**63 - 1)]


async def prepare(app: web.Application) -> None:
    app[_READING] = asyncio.Semaphore(READERS)


async def listing(call: Call[SignalsQuery, None]) -> web.Response:
    query, tails = call.query, call.request.app[TAILS]
    brand = one_brand(call.token, given(query.brand))
    now = asyncio.get_running_loop().time
    until = now() + query.wait
    position = None
    if query.after is not UNSET and query.after != "now":
        try:
            position = cursors.read(("signals", brand), query.after, Position)
        except cursors.BadCursor as error:
            raise Problem(BAD_REQUEST, str(error), extra={"field": "after"}) from None
    while True:
        entries = tails.after(position.stream, brand, position.sequence) if position is not None else None
        if entries is None or position is None or not (entries or query.wait):
            # also for who does not wait: memory hears of a signal a moment after it was numbered
            position, entries = await _read(call, brand, position)
            if not entries:
                tails.begin(position.stream, brand, position.sequence)
        if entries or tails.draining or now() >= until:
            return _page(brand, position, entries, query.limit)
        await tails.news(brand, until - now())
        await authenticated(call.request, "signals:read")  # it may have been revoked meanwhile


async def _read(call: Call[SignalsQuery, None], brand: str, position: Position | None) -> tuple[Position, list[Entry]]:
    """From the store, which alone knows what a cursor is worth. Raises Problem 404, 409, 410."""
    app = call.request.app
    async with asyncio.timeout(READ_SECONDS), app[_READING], app[DATABASE].pool.acquire() as conn:
        reading = await feed.read(
            conn,
            brand,
            position.sequence if position is not None else None,
            limit=call.query.limit,
            max_bytes=PAGE_BYTES,
            at_end=position is None and call.query.after == "now",
        )
    if reading is None:
        raise Problem(NOT_FOUND, f"there is no brand {brand!r}", extra={"field": "brand"})
    extent = reading.extent
    if position is not None and position.stream != extent.stream:
        raise Problem(
            OTHER_HISTORY,
            "the database was restored to an earlier state since this cursor was given: read the operations again, then go on",
            extra={"stream": str(extent.stream), "cursor": _cursor(brand, Position(extent.stream, extent.last))},
        )
    if reading.after > extent.last:
        raise Problem(
            OTHER_HISTORY,
            f"the cursor is beyond the end: the last signal is number {extent.last}",
            extra={"stream": str(extent.stream), "cursor": _cursor(brand, Position(extent.stream, extent.last))},
        )
    if reading.after < extent.oldest - 1:
        raise Problem(
            GONE,
            f"the oldest signal that is kept is number {extent.oldest}; the cursor stands at {reading.after}",
            extra={"oldest": extent.oldest, "cursor": _cursor(brand, Position(extent.stream, extent.oldest - 1))},
        )
    return Position(extent.stream, reading.after), reading.entries


def _cursor(brand: str, position: Position) -> str:
    return cursors.write(("signals", brand), position)


def _page(brand: str, position: Position, entries: list[Entry], limit: int) -> web.Response:
    taken: list[bytes] = []
    size = 0
    for entry in entries[:limit]:
        size += len(entry.body)
        if taken and size > PAGE_BYTES:
            break
        taken.append(entry.body)
        position = Position(position.stream, entry.sequence)
    body = b'{"data":[%b],"nextCursor":"%b"}' % (b",".join(taken), _cursor(brand, position).encode())
    return web.Response(body=body, content_type="application/json", headers={"Cache-Control": "no-store"})


ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/v1/signals",
        name="listSignals",
        summary="A brand's signals in order, without a gap; may be held back until there is one",
        scope="signals:read",
        query=SignalsQuery,
        handler=listing,
        answers={200: Answer("What follows the cursor; perhaps nothing.", shapes.SignalPage)},
        problems=(NOT_FOUND, OTHER_HISTORY, GONE),
        waits=True,
    ),
)
