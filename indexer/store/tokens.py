"""API tokens: who may speak over HTTP, for which brand, with which scopes.

A token is shown once, when it is made; the database keeps its SHA-256 (a token has 256 random bits, so a slow hash would
add nothing). A token is looked up by its hash: no comparison of secrets takes place, so none can leak by its timing.
Revoking takes effect within `TTL` seconds everywhere.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from uuid import UUID, uuid4

import asyncpg
import msgspec

from indexer.store.connection import Connection

SCOPES = ("operations:read", "operations:write", "fulfil", "resolve", "signals:read", "chain:read", "status")
PREFIX = "lsi_"  # so that secret scanners, and people, know one when they see it
TTL = 5.0  # seconds
LOOKUPS = 4  # at once
_FORM = re.compile(r"lsi_[A-Za-z0-9_-]{43}")


class Token(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """What is known of a token; never the token itself. `brand` None: it may act for every brand."""

    id: UUID
    name: str
    brand: str | None
    scopes: tuple[str, ...]
    created_at: datetime
    revoked_at: datetime | None


class BadToken(ValueError):
    """A token that cannot be made as asked."""


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _token(row: asyncpg.Record) -> Token:
    return Token(
        id=row["id"],
        name=row["name"],
        brand=row["brand"],
        scopes=tuple(row["scopes"]),
        created_at=row["created_at"],
        revoked_at=row["revoked_at"],
    )


async def add(conn: Connection, name: str, brand: str | None, scopes: Sequence[str]) -> tuple[str, Token]:
    """Makes a token and returns it, the only time it is seen. Raises BadToken."""
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise BadToken(f"unknown scopes: {', '.join(unknown) or 'none given'}; known are {', '.join(SCOPES)}")
    if not 1 <= len(name) <= 200 or not name.isprintable():
        raise BadToken("a token's name has 1 to 200 printable characters")
    token = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
    try:
        row = await conn.fetchrow(
            """
            INSERT INTO indexer.api_token (id, hash, name, brand, scopes) VALUES ($1, $2, $3, $4, $5)
            RETURNING id, name, brand, scopes, created_at, revoked_at
            """,
            uuid4(),
            _digest(token),
            name,
            brand,
            sorted(set(scopes)),
        )
    except asyncpg.ForeignKeyViolationError:
        raise BadToken(f"there is no brand {brand!r}; brands come from the configuration") from None
    assert row is not None
    return token, _token(row)


async def list_tokens(conn: Connection) -> list[Token]:
    """Every token, revoked ones too, oldest first."""
    rows = await conn.fetch(
        "SELECT id, name, brand, scopes, created_at, revoked_at FROM indexer.api_token ORDER BY created_at, id"
    )
    return [_token(row) for row in rows]


async def revoke(conn: Connection, token_id: UUID) -> bool:
    """Ends a token; False when there is no such token or it was revoked before."""
    row = await conn.fetchrow(
        "UPDATE indexer.api_token SET revoked_at = clock_timestamp() WHERE id = $1 AND revoked_at IS NULL RETURNING id",
        token_id,
    )
    return row is not None


class Authenticator:
    """Answers who a bearer token is, remembering good answers for `ttl` seconds.

    Only good answers are kept, so there are never more of them than tokens; a wrong token of the right form costs one
    look-up by unique index, one of another form nothing. Whoever asks for the same token at the same time waits for one
    look-up: a thousand clients that come back at once must not take the whole pool.
    """

    def __init__(self, pool: asyncpg.Pool, *, ttl: float = TTL, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool, self._ttl, self._clock = pool, ttl, clock
        self._known: dict[bytes, tuple[float, Token]] = {}
        self._looking = asyncio.Semaphore(LOOKUPS)

    async def authenticate(self, token: str) -> Token | None:
        """The token's owner, or None for a token that is unknown or revoked."""
        if _FORM.fullmatch(token) is None:
            return None
        digest = _digest(token)
        if (known := self._remembered(digest)) is not None:
            return known
        async with self._looking:
            if (known := self._remembered(digest)) is not None:  # somebody asked while we waited
                return known
            now = self._clock()  # from before the look-up: an answer is never older than `ttl`
            async with self._pool.acquire() as conn:
                # api_token_hash_key
                row = await conn.fetchrow(
                    """
                    SELECT id, name, brand, scopes, created_at, revoked_at
                    FROM indexer.api_token WHERE hash = $1 AND revoked_at IS NULL
                    """,
                    digest,
                )
            if row is None:
                self._known.pop(digest, None)
                return None
            self._known[digest] = (now + self._ttl, _token(row))
            return self._known[digest][1]

    def _remembered(self, digest: bytes) -> Token | None:
        known = self._known.get(digest)
        return known[1] if known is not None and known[0] > self._clock() else None
