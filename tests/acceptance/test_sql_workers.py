"""The workers of docs/sql.md, as printed there: they share what is ready, and whoever is killed, each operation has one receipt."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from indexer.store import sql_users
from tests.sql_workers import Crew, make_ready, psql_folder

BRAND = "bloom"


@pytest.fixture
async def owner(owner_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(owner_dsn)
    await connection.execute("INSERT INTO indexer.brand (name) VALUES ($1), ('rose')", BRAND)
    await make_ready(connection, "rose", 50)  # nobody of this crew may touch these
    try:
        yield connection
        assert (
            await connection.fetchval(
                "SELECT count(*) FROM indexer.fulfilment_claim c JOIN indexer.operation o ON o.id = c.operation_id AND o.brand = 'rose'"
            )
            == 0
        )
    finally:
        await connection.close()


@pytest.fixture
async def login(owner: asyncpg.Connection, owner_dsn: str) -> AsyncIterator[str]:
    name = f"test_{secrets.token_hex(6)}"
    password = await sql_users.add(owner, name, BRAND)
    parts = urlsplit(owner_dsn)
    try:
        yield urlunsplit(parts._replace(netloc=f"{name}:{password}@{parts.netloc.rpartition('@')[2]}"))
    finally:
        await sql_users.remove(owner, name)


async def test_workers_killed_at_random_leave_one_receipt_for_each_operation(
    owner: asyncpg.Connection, login: str, tmp_path: Path
) -> None:
    """The same with ten thousand and eight workers: python -m tests.bench workers."""
    await make_ready(owner, BRAND, 600)
    crew = Crew(tmp_path, login, owner)
    try:
        for _ in range(4):
            await crew.start()
        await crew.work(600, Random(4), kills=6, seconds=120)
        figures = await crew.judge(600)
        assert figures["killed"] == 6
    finally:
        await crew.stop()


@pytest.mark.skipif(psql_folder() is None, reason="PostgreSQL's programs come without psql here")
async def test_the_worker_in_psql_does_what_it_says(owner: asyncpg.Connection, login: str, tmp_path: Path) -> None:
    await make_ready(owner, BRAND, 12)
    crew = Crew(tmp_path, login, owner, language="sh")
    try:
        for _ in range(2):
            await crew.start()
        await crew.work(12, Random(4), kills=0, seconds=60)
        await crew.judge(12)
    finally:
        await crew.stop()
