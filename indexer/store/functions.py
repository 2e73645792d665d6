"""Calls of the functions of schema `loyalty`, the only writers of what a brand or a person says.

Each is one statement, committed when it returns. A refusal is a PostgreSQL error with SQLSTATE LY400, LY403, LY404, LY409
or LY422 and a JSON object in its detail; what the words mean is in `contract/functions.sql`.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

import msgspec

from indexer.store.connection import Connection


class Registered(msgspec.Struct, frozen=True):
    id: UUID
    created: bool  # False: the same was registered before


class Cancelled(msgspec.Struct, frozen=True, rename="camel"):
    outcome: str  # 'accepted'
    executable_until: str | None  # Unix seconds; None: nothing bounds it


class Fulfilled(msgspec.Struct, frozen=True):
    outcome: str  # 'fulfilled' | 'reverted' | 'claim_lapsed': recorded in any case
    generation: int
    repeated: bool


class Resolved(msgspec.Struct, frozen=True):
    outcome: str  # 'recorded'


class Claimed(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """An operation that is the consumer's alone to hand over until `claimed_until`, by the database's clock."""

    claim: UUID
    operation_id: UUID
    brand: str
    reference: str
    generation: int
    claimed_until: datetime
    ready_at: datetime
    legs: msgspec.Raw
    metadata: msgspec.Raw


class Renewed(msgspec.Struct, frozen=True, rename="camel"):
    outcome: str  # 'renewed'
    claimed_until: datetime


class Released(msgspec.Struct, frozen=True):
    outcome: str  # 'released' | 'ended': it had ended before (lapsed, released, taken by another, fulfilled)


async def register_operation(conn: Connection, request: str) -> Registered:
    """`request`: the registration as JSON text, passed on as it came."""
    answer = await conn.fetchval("SELECT loyalty.register_operation($1::text::jsonb)::text", request)
    return msgspec.json.decode(answer, type=Registered)


async def cancel(conn: Connection, operation_id: UUID) -> Cancelled:
    answer = await conn.fetchval("SELECT loyalty.cancel($1)::text", operation_id)
    return msgspec.json.decode(answer, type=Cancelled)


async def fulfil(
    conn: Connection,
    operation_id: UUID,
    generation: int,
    body: str,
    claim: UUID | None = None,
    *,
    actor: str | None = None,
) -> Fulfilled:
    """`body`: JSON text of an object whose `receipt`, if any, is recorded as it came. `actor`: who says so (1 to 200
    characters), where it is not the login itself."""
    answer = await conn.fetchval(
        "SELECT indexer.fulfil(indexer.acting_brand(), $1, $2, $3::text::jsonb -> 'receipt', $4, coalesce($5, session_user))::text",
        operation_id,
        generation,
        body,
        claim,
        actor,
    )
    return msgspec.json.decode(answer, type=Fulfilled)


async def claim_fulfilments(
    conn: Connection, brand: str | None, consumer: str, max_count: int, lease_seconds: float
) -> list[Claimed]:
    """Up to `max_count` (1 to 1000) ready operations of `brand` (None: of any) that nobody has claimed or handed over,
    oldest ready first, now claimed for `consumer` (1 to 200 characters) for `lease_seconds` (1 to 3600)."""
    rows = await conn.fetch(
        """
        SELECT claim, operation_id, brand, reference, generation, claimed_until, ready_at, legs::text AS legs, metadata::text AS metadata
        FROM indexer.claim_fulfilments($1, $2, $3, $4)
        """,
        brand,
        consumer,
        max_count,
        timedelta(seconds=lease_seconds),
    )
    return [
        Claimed(**{**row, "legs": msgspec.Raw(row["legs"].encode()), "metadata": msgspec.Raw(row["metadata"].encode())})
        for row in rows
    ]


async def renew_claim(conn: Connection, brand: str | None, claim: UUID, lease_seconds: float) -> Renewed:
    """Holds on for `lease_seconds` (1 to 3600) from now. LY404: not a claim of `brand`'s; LY409: it has ended, stop."""
    answer = await conn.fetchval(
        "SELECT indexer.renew_claim($1, $2, $3)::text", brand, claim, timedelta(seconds=lease_seconds)
    )
    return msgspec.json.decode(answer, type=Renewed)


async def release_claim(conn: Connection, brand: str | None, claim: UUID) -> Released:
    """Gives the operation back to whoever claims next. Idempotent. LY404: not a claim of `brand`'s."""
    answer = await conn.fetchval("SELECT indexer.release_claim($1, $2)::text", brand, claim)
    return msgspec.json.decode(answer, type=Released)


async def resolve(
    conn: Connection, operation_id: UUID, evidence_id: UUID, accept: bool, reason: str, actor: str
) -> Resolved:
    answer = await conn.fetchval(
        "SELECT loyalty.resolve($1, $2, $3, $4, $5)::text", operation_id, evidence_id, accept, reason, actor
    )
    return msgspec.json.decode(answer, type=Resolved)
