"""API tokens: shown once, stored as a hash, bound to a brand and scopes, gone soon after they are revoked."""

from __future__ import annotations

import hashlib
from uuid import uuid4

import pytest

from indexer.store import tokens
from indexer.store.database import Database


@pytest.fixture
async def brand(database: Database) -> str:
    await database.pool.execute("INSERT INTO indexer.brand (name) VALUES ('bloom')")
    return "bloom"


async def test_a_token_is_shown_once_and_stored_as_its_hash(database: Database, brand: str) -> None:
    async with database.pool.acquire() as conn:
        secret, token = await tokens.add(conn, "shop", brand, ["fulfil", "operations:read", "fulfil"])
        stored = await conn.fetchrow("SELECT hash, api_token::text AS whole FROM indexer.api_token")
        assert stored is not None
        assert secret.startswith("lsi_") and len(secret) == 47
        assert stored["hash"] == hashlib.sha256(secret.encode()).digest()
        assert secret not in stored["whole"]
        assert token.scopes == ("fulfil", "operations:read")
        assert await tokens.list_tokens(conn) == [token]


async def test_what_cannot_be_made_is_said(database: Database, brand: str) -> None:
    async with database.pool.acquire() as conn:
        with pytest.raises(tokens.BadToken, match="unknown scopes: everything"):
            await tokens.add(conn, "shop", brand, ["everything"])
        with pytest.raises(tokens.BadToken, match="none given"):
            await tokens.add(conn, "shop", brand, [])
        with pytest.raises(tokens.BadToken, match="no brand 'rose'"):
            await tokens.add(conn, "shop", "rose", ["status"])
        with pytest.raises(tokens.BadToken, match="printable"):
            await tokens.add(conn, "line\nbreak", None, ["status"])
        assert await tokens.list_tokens(conn) == []


async def test_authentication_knows_its_tokens_and_no_others(database: Database, brand: str) -> None:
    async with database.pool.acquire() as conn:
        secret, token = await tokens.add(conn, "shop", brand, ["status"])
    known = tokens.Authenticator(database.pool)
    assert await known.authenticate(secret) == token
    for other in ("", "lsi_", secret[:-1], secret + "A", secret.swapcase(), "lsi_" + "A" * 43, "\ud800" * 47, "\x00"):
        assert await known.authenticate(other) is None


async def test_a_revoked_token_ends_within_the_cache_time(database: Database, brand: str) -> None:
    now = 1000.0
    known = tokens.Authenticator(database.pool, clock=lambda: now)
    async with database.pool.acquire() as conn:
        secret, token = await tokens.add(conn, "shop", None, ["status"])
        assert token.brand is None
        assert await known.authenticate(secret) == token
        assert await tokens.revoke(conn, token.id)
        assert not await tokens.revoke(conn, token.id)
        assert not await tokens.revoke(conn, uuid4())
        assert (await tokens.list_tokens(conn))[0].revoked_at is not None
    now += tokens.TTL + 0.1
    assert await known.authenticate(secret) is None
    assert await tokens.Authenticator(database.pool).authenticate(secret) is None
    assert tokens.TTL <= 5
