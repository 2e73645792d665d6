"""What people and programs read: operations, lists of them, and a wallet's balances, in the shapes that HTTP and the
command line print. Every query names the index it leans on; nothing here writes. The state of the installation itself
(heads, leases, gauges) is in `overview.py`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import msgspec

from indexer.model.types import Address, hex0x
from indexer.store.connection import Connection

MAX_PAGE = 200
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class BadCursor(ValueError):
    """A `cursor` that no answer of ours contained."""


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """A row of an operation's history. `from_state` None: the registration."""

    from_state: str | None = msgspec.field(name="from")
    to_state: str = msgspec.field(name="to")
    generation: int
    cause: str
    detail: msgspec.Raw
    at: datetime


class Receipt(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """The brand's word that it handed over, and what became of it."""

    generation: int
    outcome: str
    receipt: msgspec.Raw
    claim: UUID | None
    actor: str
    recorded_at: datetime


class Operation(msgspec.Struct, frozen=True, rename="camel", kw_only=True, omit_defaults=False):
    """An operation as `GET /v1/operations` shows it; `history` and `receipts` only where one is asked for."""

    id: UUID
    brand: str
    reference: str
    status: str
    status_at: datetime
    generation: int
    requested_at: datetime
    registered_at: datetime
    cancelled_at: datetime | None
    metadata: msgspec.Raw
    legs: msgspec.Raw
    evidence: msgspec.Raw
    waiting_for: msgspec.Raw
    conflicts: msgspec.Raw
    history: list[Transition] | msgspec.UnsetType = msgspec.UNSET
    receipts: list[Receipt] | msgspec.UnsetType = msgspec.UNSET


class Page(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    data: list[Operation]
    next_cursor: str | None


class Balance(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """Points of one wallet in one bucket of one programme. `expires_at` is the bucket (Unix seconds, "0" never);
    integers are decimal strings. A negative balance is shown as it is: it says that history is missing."""

    chain_id: str
    factory: str
    issuer: str
    loyalty_id: str
    loyalty: str
    brand: str | None
    name: str
    symbol: str
    expires_at: str
    balance: str
    source: str  # 'erc1155' or 'loyfin': the events that it was summed from
    history_complete: bool


# Columns of an operation. JSON as text: it is passed on as it was stored, down to the last digit of a number.
_COLUMNS = """
    o.id, o.brand, o.reference, o.state, o.state_at, o.generation, o.requested_at, o.registered_at, o.cancelled_at,
    o.metadata::text AS metadata, (o.request -> 'legs')::text AS legs,
    coalesce(o.detail -> 'evidence', '[]')::text AS evidence,
    coalesce(o.detail -> 'waitingFor', '[]')::text AS waiting_for,
    coalesce(o.detail -> 'conflicts', '[]')::text AS conflicts
"""


def _raw(text: str) -> msgspec.Raw:
    return msgspec.Raw(text.encode())


def _operation(
    row: asyncpg.Record,
    history: list[Transition] | msgspec.UnsetType = msgspec.UNSET,
    receipts: list[Receipt] | msgspec.UnsetType = msgspec.UNSET,
) -> Operation:
    return Operation(
        id=row["id"],
        brand=row["brand"],
        reference=row["reference"],
        status=row["state"],
        status_at=row["state_at"],
        generation=row["generation"],
        requested_at=row["requested_at"],
        registered_at=row["registered_at"],
        cancelled_at=row["cancelled_at"],
        metadata=_raw(row["metadata"]),
        legs=_raw(row["legs"]),
        evidence=_raw(row["evidence"]),
        waiting_for=_raw(row["waiting_for"]),
        conflicts=_raw(row["conflicts"]),
        history=history,
        receipts=receipts,
    )


# ------------------------------------------------------------------------------------------------ operations


async def brand_of(conn: Connection, operation_id: UUID) -> str | None:
    """Whose operation this is; None when there is none. It never changes. (operation_pk)"""
    brand: str | None = await conn.fetchval("SELECT brand FROM indexer.operation WHERE id = $1", operation_id)
    return brand


async def operation(conn: Connection, operation_id: UUID) -> Operation | None:
    """One operation with its history and receipts, all of one instant; None when there is none."""
    async with conn.transaction(isolation="repeatable_read", readonly=True):
        row = await conn.fetchrow(
            f"SELECT {_COLUMNS} FROM indexer.operation o WHERE o.id = $1",  # noqa: S608 - a constant of this module
            operation_id,
        )
        if row is None:
            return None
        # history_operation_idx
        history = await conn.fetch(
            """
            SELECT from_state, to_state, generation, cause, detail::text AS detail, at
            FROM indexer.history WHERE operation_id = $1 ORDER BY id
            """,
            operation_id,
        )
        # receipt_pk
        receipts = await conn.fetch(
            """
            SELECT generation, outcome, receipt::text AS receipt, claim, actor, recorded_at
            FROM indexer.receipt WHERE operation_id = $1 ORDER BY generation
            """,
            operation_id,
        )
    return _operation(
        row,
        [Transition(**{**entry, "detail": _raw(entry["detail"])}) for entry in history],
        [Receipt(**{**entry, "receipt": _raw(entry["receipt"])}) for entry in receipts],
    )


async def operations(
    conn: Connection,
    *,
    brand: str | None = None,
    reference: str | None = None,
    states: Sequence[str] | None = None,
    limit: int = 50,
    cursor: str | None = None,
) -> Page:
    """A page of operations, newest registration first.

    `brand` None looks at every brand, active or not. One short index scan for each brand (and state), merged: the cost
    follows the page, not the table. Raises BadCursor.
    """
    at, after = _read_cursor(cursor) if cursor is not None else (datetime.max.replace(tzinfo=UTC), UUID(int=2**128 - 1))
    if reference is not None:
        # operation_brand_reference_key: at most one a brand
        rows = await conn.fetch(
            f"""
            SELECT {_COLUMNS}
            FROM indexer.brand b JOIN indexer.operation o ON o.brand = b.name AND o.reference = $2
            WHERE b.name = coalesce($1, b.name) AND ($3::text[] IS NULL OR o.state = ANY ($3))
              AND (o.registered_at, o.id) < ($4, $5)
            ORDER BY o.registered_at DESC, o.id DESC LIMIT $6
            """,  # noqa: S608
            brand, reference, states, at, after, limit + 1,
        )  # fmt: skip
    elif states is not None:
        # operation_state_idx, backwards, once for each brand and state
        rows = await conn.fetch(
            f"""
            SELECT {_COLUMNS}
            FROM (
                SELECT page.id, page.registered_at
                FROM indexer.brand b CROSS JOIN unnest($2::text[]) AS s (state)
                CROSS JOIN LATERAL (
                    SELECT p.id, p.registered_at FROM indexer.operation p
                    WHERE p.brand = b.name AND p.state = s.state
                      AND p.registered_at <= $3 AND (p.registered_at, p.id) < ($3, $4)
                    ORDER BY p.registered_at DESC, p.id DESC LIMIT $5
                ) page
                WHERE b.name = coalesce($1, b.name)
                ORDER BY page.registered_at DESC, page.id DESC LIMIT $5
            ) page JOIN indexer.operation o ON o.id = page.id
            ORDER BY page.registered_at DESC, page.id DESC
            """,  # noqa: S608
            brand, states, at, after, limit + 1,
        )  # fmt: skip
    else:
        # operation_page_idx, backwards, once for each brand
        rows = await conn.fetch(
            f"""
            SELECT {_COLUMNS}
            FROM (
                SELECT page.id, page.registered_at
                FROM indexer.brand b
                CROSS JOIN LATERAL (
                    SELECT p.id, p.registered_at FROM indexer.operation p
                    WHERE p.brand = b.name AND (p.registered_at, p.id) < ($2, $3)
                    ORDER BY p.registered_at DESC, p.id DESC LIMIT $4
                ) page
                WHERE b.name = coalesce($1, b.name)
                ORDER BY page.registered_at DESC, page.id DESC LIMIT $4
            ) page JOIN indexer.operation o ON o.id = page.id
            ORDER BY page.registered_at DESC, page.id DESC
            """,  # noqa: S608
            brand, at, after, limit + 1,
        )  # fmt: skip
    page = rows[:limit]
    more = len(rows) > limit
    return Page(
        data=[_operation(row) for row in page],
        next_cursor=_write_cursor(page[-1]["registered_at"], page[-1]["id"]) if more else None,
    )


def _write_cursor(at: datetime, operation_id: UUID) -> str:
    micros = (at - _EPOCH) // timedelta(microseconds=1)
    return base64.urlsafe_b64encode(micros.to_bytes(8, "big", signed=True) + operation_id.bytes).decode()


def _read_cursor(cursor: str) -> tuple[datetime, UUID]:
    try:
        raw = base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True)
        if len(raw) != 24:
            raise BadCursor(cursor)
        return _EPOCH + timedelta(microseconds=int.from_bytes(raw[:8], "big", signed=True)), UUID(bytes=raw[8:])
    except (binascii.Error, UnicodeError, OverflowError, ValueError):
        raise BadCursor("this cursor is not one of ours") from None


# ------------------------------------------------------------------------------------------------ balances


async def balances_of(conn: Connection, wallet: Address, brand: str | None = None) -> list[Balance]:
    """What a wallet holds, a row for each programme and bucket that is not zero; `brand` None for every brand's.

    The same sum as the view `loyalty.balances`, by way of its function `loyalty.balances_of`, which takes the wallet as
    a parameter: movement_holder_idx, transfer_sender_idx and transfer_recipient_idx serve it.
    """
    rows = await conn.fetch(
        """
        SELECT chain_id::text, factory, issuer, loyalty_id, loyalty, brand, name, symbol,
               bucket::text AS expires_at, balance::text, source, history_complete
        FROM loyalty.balances_of($1) WHERE $2::text IS NULL OR brand = $2
        ORDER BY chain_id, loyalty, bucket
        """,
        hex0x(wallet),
        brand,
    )
    return [Balance(**row) for row in rows]
