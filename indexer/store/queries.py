"""What people and programs read: operations, lists of them, and a wallet's balances, in the shapes that HTTP and the
command line print. Every query names the index it leans on; nothing here writes. The state of the installation itself
(heads, leases, gauges) is in `overview.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

import asyncpg
import msgspec

from indexer.model.types import Address, hex0x
from indexer.store import cursors
from indexer.store.connection import Connection
from indexer.store.cursors import BadCursor as BadCursor

MAX_PAGE = 200

Time = Annotated[datetime, msgspec.Meta(tz=True)]


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """A row of an operation's history. `from_state` None: the registration."""

    from_state: str | None = msgspec.field(name="from")
    to_state: str = msgspec.field(name="to")
    generation: int
    cause: str
    detail: msgspec.Raw
    at: Time


class Receipt(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """The brand's word that it handed over, and what became of it."""

    generation: int
    outcome: str
    receipt: msgspec.Raw
    claim: UUID | None
    actor: str
    recorded_at: Time


class Operation(msgspec.Struct, frozen=True, rename="camel", kw_only=True, omit_defaults=False):
    """An operation as `GET /v1/operations` shows it; `history` and `receipts` only where one is asked for."""

    id: UUID
    brand: str
    reference: str
    status: str
    status_at: Time
    generation: int
    requested_at: Time
    registered_at: Time
    cancelled_at: Time | None
    metadata: msgspec.Raw
    legs: msgspec.Raw
    evidence: msgspec.Raw
    waiting_for: msgspec.Raw
    conflicts: msgspec.Raw
    history: list[Transition] | msgspec.UnsetType = msgspec.UNSET
    receipts: list[Receipt] | msgspec.UnsetType = msgspec.UNSET


class Page(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """`next_cursor` None: this was the last."""

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


class BalancePage(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """`next_cursor` None: this was the last."""

    data: list[Balance]
    next_cursor: str | None


class _OperationPosition(msgspec.Struct, frozen=True, array_like=True):
    registered_at: Time
    id: UUID


Int64 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _BalancePosition(msgspec.Struct, frozen=True, array_like=True):
    chain_id: Int64
    loyalty: Annotated[str, msgspec.Meta(pattern="^0x[0-9a-f]{40}$")]
    bucket: Annotated[str, msgspec.Meta(pattern="^[0-9]{1,78}$")]


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
    question = ("operations", brand, reference, sorted(states) if states is not None else None)
    at, after = datetime.max.replace(tzinfo=UTC), UUID(int=2**128 - 1)
    if cursor is not None:
        position = cursors.read(question, cursor, _OperationPosition)
        at, after = position.registered_at, position.id
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
        next_cursor=cursors.write(question, _OperationPosition(page[-1]["registered_at"], page[-1]["id"]))
        if more
        else None,
    )


# ------------------------------------------------------------------------------------------------ balances


async def balances(
    conn: Connection, wallet: Address, *, brand: str | None = None, limit: int = 50, cursor: str | None = None
) -> BalancePage:
    """A page of what a wallet holds, by chain, token contract and bucket. Raises BadCursor."""
    question = ("balances", wallet, brand)
    after = cursors.read(question, cursor, _BalancePosition) if cursor is not None else None
    found = await _balances(conn, wallet, brand, after, limit + 1)
    last = found[limit - 1] if len(found) > limit else None
    return BalancePage(
        data=found[:limit],
        next_cursor=cursors.write(question, _BalancePosition(int(last.chain_id), last.loyalty, last.expires_at))
        if last is not None
        else None,
    )


async def balances_of(conn: Connection, wallet: Address, brand: str | None = None) -> list[Balance]:
    """All that a wallet holds, a row for each programme and bucket that is not zero; `brand` None for every brand's."""
    return await _balances(conn, wallet, brand, None, None)


async def _balances(
    conn: Connection, wallet: Address, brand: str | None, after: _BalancePosition | None, limit: int | None
) -> list[Balance]:
    """The same sum as the view `loyalty.balances`, by way of its function `loyalty.balances_of`, which takes the wallet
    as a parameter: movement_holder_idx, transfer_sender_idx and transfer_recipient_idx serve it."""
    rows = await conn.fetch(
        """
        SELECT chain_id::text, factory, issuer, loyalty_id, loyalty, brand, name, symbol,
               bucket::text AS expires_at, balance::text, source, history_complete
        FROM loyalty.balances_of($1) AS b
        WHERE ($2::text IS NULL OR brand = $2)
          AND ($3::bigint IS NULL OR (b.chain_id, b.loyalty, b.bucket) > ($3, $4::text, $5::text::numeric))
        ORDER BY b.chain_id, b.loyalty, b.bucket LIMIT $6
        """,
        hex0x(wallet),
        brand,
        *((after.chain_id, after.loyalty, after.bucket) if after is not None else (None, None, None)),
        limit,
    )
    return [Balance(**row) for row in rows]
