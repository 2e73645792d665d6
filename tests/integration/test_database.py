"""Connecting: what comes through as values, and what is said when it fails (never the password)."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

import asyncpg
import pytest

from indexer.store.database import DISCONNECTED, Database, DatabaseUnavailable, place
from indexer.store.embedded import EmbeddedPostgres
from tests.conftest import Postgres
from tests.pooler import POOLERS, opened

SECRET = "hunter2-p4ss"


async def test_json_and_multiranges_come_and_go_as_values(database: Database) -> None:
    value = {"amount": "115792089237316195423570985008687907853269984665640564039457584007913129639935", "n": [1, None]}
    assert await database.pool.fetchval("SELECT $1::jsonb", value) == value
    assert await database.pool.fetchval("SELECT ($1::jsonb)->>'amount'", value) == value["amount"]
    ranges = [asyncpg.Range(1, 5), asyncpg.Range(7, 9)]
    assert await database.pool.fetchval("SELECT $1::int8multirange", ranges) == ranges
    async with database.pool.acquire() as connection:
        await connection.execute("CREATE TEMP TABLE copied (value jsonb)")
        await connection.copy_records_to_table("copied", records=[(value,), ([1, 2],)])
        assert [row["value"] for row in await connection.fetch("SELECT value FROM copied")] == [value, [1, 2]]


@pytest.mark.parametrize(
    ("url", "said", "lasting"),
    [
        (f"postgresql://shop:{SECRET}@127.0.0.1:1/shop", "cannot reach PostgreSQL at 127.0.0.1:1/shop as shop", False),
        (f"postgresql://shop:{SECRET}@nowhere.invalid/shop", "cannot reach PostgreSQL at nowhere.invalid", False),
        (f"postgresql:///shop?host=/nowhere&user=shop&password={SECRET}", "cannot reach PostgreSQL at /nowhere", False),
        (f"postgresql://shop:{SECRET}/slash@127.0.0.1/shop", "percent-encoded", True),
        (f"mysql://shop:{SECRET}@127.0.0.1/shop", "percent-encoded", True),
        (f"shop:{SECRET}", "percent-encoded", True),
        (f"postgresql://shop:12/{SECRET}@127.0.0.1/shop", "", False),
    ],
)
async def test_a_failed_connection_says_where_and_never_the_password(url: str, said: str, lasting: bool) -> None:
    with pytest.raises(DatabaseUnavailable) as caught:
        await Database.connect(url)
    assert said in str(caught.value)
    assert caught.value.lasting is lasting
    assert SECRET not in repr(caught.value) + place(url)
    assert caught.value.__cause__ is None


async def test_a_wrong_password_and_a_missing_database_need_a_person(postgres: Postgres, dsn: str) -> None:
    wrong = dsn.replace(":", f":{SECRET}", 2).replace(f"postgresql:{SECRET}", "postgresql:")
    with pytest.raises(DatabaseUnavailable, match="refuses the user or password") as caught:
        await Database.connect(wrong)
    assert caught.value.lasting and SECRET not in str(caught.value)
    with pytest.raises(DatabaseUnavailable, match="no such database") as caught:
        await Database.connect(postgres.url("missing"))
    assert caught.value.lasting


async def test_a_pool_outlives_the_end_of_its_sessions(database: Database, dsn: str) -> None:
    assert await database.pool.fetchval("SELECT 1") == 1
    other = await asyncpg.connect(dsn)
    await other.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid() AND usename = current_user"
    )
    await other.close()
    async with asyncio.timeout(60):
        while True:
            try:
                assert await database.pool.fetchval("SELECT 1") == 1
                break
            except DISCONNECTED:
                await asyncio.sleep(0.05)


async def test_work_behind_a_pooler_uses_no_prepared_statements_of_another_session(dsn: str) -> None:
    async with await Database.connect(dsn, dsn + ("&" if "?" in dsn else "?") + "application_name=direct") as database:
        assert await database.pool.fetchval("SELECT $1::int", 1) == 1
        async with database.pool.acquire() as connection:
            assert await connection.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE name <> ''") == 0
        session = await database.session("indexer:test")
        assert await session.fetchval("SHOW application_name") == "indexer:test"
        await session.close()


@pytest.mark.parametrize("kind", POOLERS)
async def test_a_pooler_where_the_server_should_be_is_noticed_at_the_start(dsn: str, kind: str) -> None:
    async with opened(kind, dsn) as pooler:
        url = pooler.url(dsn)
        # it is one: what a session was told is unknown to the next
        with pytest.raises(asyncpg.InvalidSQLStatementNameError):
            async with asyncpg.create_pool(url, min_size=2) as pool:
                for _ in range(20):
                    await asyncio.gather(*(pool.fetchval("SELECT $1::int", 1) for _ in range(4)))
        for given in ((url, None), (url, url + ("&" if "?" in url else "?") + "application_name=direct")):
            with pytest.raises(DatabaseUnavailable, match=r"a pooler of connections answers.*direct_url") as caught:
                await Database.connect(*given)
            assert caught.value.lasting
        async with await Database.connect(url, dsn) as database:
            assert await asyncio.gather(*(database.pool.fetchval("SELECT $1::int", n) for n in range(40))) == [
                *range(40)
            ]


async def test_a_pool_whose_server_is_gone_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """asyncpg 0.32 would log a traceback a second while it restores a floor of connections."""
    state = Path(tempfile.mkdtemp(prefix="indexer-test-"))
    state.chmod(0o755)
    try:
        async with EmbeddedPostgres(state, durable=False) as postgres:
            async with await Database.connect(postgres.dsn(), check_schema=False) as database:
                assert await database.pool.fetchval("SELECT 1") == 1
                await postgres.stop()
                for _ in range(3):
                    with pytest.raises(DISCONNECTED):
                        await database.pool.fetchval("SELECT 1")
        assert [record for record in caplog.records if record.name.startswith("asyncpg")] == []
    finally:
        shutil.rmtree(state, ignore_errors=True)
