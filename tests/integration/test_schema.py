"""The migrations, on an empty database: up, down, equal to tables.py; and the refusal to work on another schema."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine

from indexer.store import schema
from indexer.store.database import Database, DatabaseUnavailable, open_session
from indexer.store.tables import metadata
from tests.conftest import Postgres


def _difference(connection: Connection) -> list[object]:
    context = MigrationContext.configure(
        connection,
        opts={
            "include_schemas": True,
            "include_name": lambda name, kind, _parents: kind != "schema" or name == "indexer",
            "version_table_schema": "indexer",
            "compare_type": True,
            "compare_server_default": True,
        },
    )
    return list(compare_metadata(context, metadata))


async def _difference_from_tables(url: str) -> list[object]:
    engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda: open_session(url, "test"))
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(_difference)
    finally:
        await engine.dispose()


async def _objects(url: str) -> int:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(
            """
            WITH ours AS (SELECT oid FROM pg_namespace WHERE nspname IN ('indexer', 'loyalty'))
            SELECT (SELECT count(*) FROM pg_proc WHERE pronamespace IN (SELECT oid FROM ours))
                 + (SELECT count(*) FROM pg_class
                     WHERE relnamespace IN (SELECT oid FROM ours) AND relname NOT LIKE 'alembic_version%')
            """
        )
    finally:
        await connection.close()


async def test_migrations_build_what_tables_declares_and_take_it_down_again(postgres: Postgres) -> None:
    async with postgres.fresh_database(migrated=False) as name:
        url = postgres.owner_url(name)
        await schema.migrate(url)
        assert await _difference_from_tables(url) == []
        await schema.migrate(url)  # nothing to do
        await schema.migrate(url, "base")
        assert await _objects(url) == 0
        await schema.migrate(url)
        assert await _difference_from_tables(url) == []


async def test_a_new_database_has_one_stream_and_no_second(database: Database, owner_dsn: str) -> None:
    assert await database.pool.fetchval("SELECT count(*) FROM indexer.instance") == 1
    owner = await asyncpg.connect(owner_dsn)
    try:
        with pytest.raises(asyncpg.UniqueViolationError):
            await owner.execute("INSERT INTO indexer.instance (stream) VALUES (gen_random_uuid())")
    finally:
        await owner.close()


async def test_replicas_that_migrate_at_once_do_not_collide(postgres: Postgres) -> None:
    async with postgres.fresh_database(migrated=False) as name:
        await asyncio.gather(*(schema.migrate(postgres.owner_url(name)) for _ in range(3)))
        assert await _difference_from_tables(postgres.owner_url(name)) == []


async def test_whoever_holds_the_lock_of_migrations_is_named(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "LOCK_SECONDS", 0.2)
    async with postgres.fresh_database(migrated=False) as name:
        other = await asyncpg.connect(postgres.url(name))
        try:
            await other.execute(f"SELECT pg_advisory_lock({0x6C6F79616C7479})")
            with pytest.raises(
                schema.MigrationBusy, match=f"backend {other.get_server_pid()} of login indexer has held"
            ):
                async with asyncio.timeout(30):
                    await schema.migrate(postgres.owner_url(name))
        finally:
            await other.close()
        await schema.migrate(postgres.owner_url(name))


async def test_an_empty_database_is_refused_and_migrate_is_named(postgres: Postgres) -> None:
    async with postgres.fresh_database(migrated=False) as name:
        with pytest.raises(schema.SchemaBehind, match="indexer migrate") as caught:
            await Database.connect(postgres.url(name))
        assert caught.value.found is None


async def test_a_newer_schema_is_refused_by_use_and_by_migrate(dsn: str, owner_dsn: str) -> None:
    owner = await asyncpg.connect(owner_dsn)
    await owner.execute("UPDATE indexer.alembic_version SET version_num = '9999'")
    await owner.close()
    with pytest.raises(schema.SchemaAhead, match="9999"):
        await Database.connect(dsn)
    with pytest.raises(schema.SchemaAhead, match="9999"):
        await schema.migrate(owner_dsn)


async def test_the_daemon_is_neither_superuser_nor_owner(database: Database) -> None:
    row = await database.pool.fetchrow(
        "SELECT rolsuper, rolcreaterole, rolcreatedb FROM pg_roles WHERE rolname = current_user"
    )
    assert tuple(row) == (False, False, False)
    for forbidden in (
        "DROP TABLE indexer.lease",
        "CREATE TABLE loyalty.mine ()",
        "DELETE FROM indexer.alembic_version",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await database.pool.execute(forbidden)


async def test_a_user_who_may_not_migrate_is_told_and_nothing_changes(postgres: Postgres) -> None:
    async with postgres.fresh_database(migrated=False) as name:
        with pytest.raises(schema.MigrationFailed, match="permission denied"):
            await schema.migrate(postgres.url(name))
        assert await _objects(postgres.owner_url(name)) == 0


async def test_a_revision_that_nobody_knows_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(schema.MigrationFailed, match="no revision 'nope': known are head, base, 0001"):
        await schema.migrate("postgresql://indexer@127.0.0.1:1/none", "nope")


async def test_migrating_a_server_that_is_not_there_says_so() -> None:
    with pytest.raises(DatabaseUnavailable, match=r"127\.0\.0\.1:1"):
        await schema.migrate("postgresql://indexer@127.0.0.1:1/none")
