"""Calls of the functions of schema `loyalty`, the only writers of what a brand or a person says.

Each is one statement, committed when it returns. A refusal is a PostgreSQL error with SQLSTATE LY400, LY403, LY404, LY409
or LY422 and a JSON object in its detail; what the words mean is in `contract/functions.sql`.
"""

from __future__ import annotations

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


async def register_operation(conn: Connection, request: str) -> Registered:
    """`request`: the registration as JSON text, passed on as it came."""
    answer = await conn.fetchval("SELECT loyalty.register_operation($1::text::jsonb)::text", request)
    return msgspec.json.decode(answer, type=Registered)


async def cancel(conn: Connection, operation_id: UUID) -> Cancelled:
    answer = await conn.fetchval("SELECT loyalty.cancel($1)::text", operation_id)
    return msgspec.json.decode(answer, type=Cancelled)


async def fulfil(
    conn: Connection, operation_id: UUID, generation: int, body: str, claim: UUID | None = None
) -> Fulfilled:
    """`body`: JSON text of an object whose `receipt`, if any, is recorded as it came."""
    answer = await conn.fetchval(
        "SELECT loyalty.fulfil($1, $2, $3::text::jsonb -> 'receipt', $4)::text", operation_id, generation, body, claim
    )
    return msgspec.json.decode(answer, type=Fulfilled)


async def resolve(
    conn: Connection, operation_id: UUID, evidence_id: UUID, accept: bool, reason: str, actor: str
) -> Resolved:
    answer = await conn.fetchval(
        "SELECT loyalty.resolve($1, $2, $3, $4, $5)::text", operation_id, evidence_id, accept, reason, actor
    )
    return msgspec.json.decode(answer, type=Resolved)
