"""The schema's version: bringing a database up to ours, and refusing to work on one that is not.

Alembic keeps the version in `indexer.alembic_version`; the migrations lie in `migrations/` of the checkout and in
`indexer/migrations` of the wheel. What the migrations contain is theirs.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

# Two replicas that migrate at once: the second waits, and finds nothing to do.
_MIGRATING = 0x6C6F79616C7479  # 'loyalty'
LOCK_SECONDS = 60.0  # any login may take an advisory lock: nobody waits for ever without a word

_HOLDER = f"""
    SELECT format('backend %s of login %s', a.pid, a.usename) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
     WHERE l.locktype = 'advisory' AND l.granted AND l.classid = {_MIGRATING >> 32} AND l.objid = {_MIGRATING & 0xFFFFFFFF}
       AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""  # noqa: S608 - a number of ours

_STATED = re.compile(r"^(revision|down_revision)\b[^=\n]*= *(?:None|[\"']([^\"']*)[\"'])", re.MULTILINE)


class MigrationFailed(Exception):
    """PostgreSQL refused a migration, and nothing of it was stored: the message is PostgreSQL's."""


class MigrationBusy(Exception):
    """Somebody else has held the lock of migrations for too long."""


class SchemaMismatch(Exception):
    """The database's schema is not the one that this version works on: `found` and `expected` are revisions."""

    def __init__(self, message: str, found: str | None, expected: str) -> None:
        super().__init__(message)
        self.found, self.expected = found, expected


class SchemaBehind(SchemaMismatch):
    def __init__(self, found: str | None, expected: str) -> None:
        state = f"is at revision {found}" if found else "is empty"
        super().__init__(
            f"the database schema {state}, this version needs {expected}: run `indexer migrate`", found, expected
        )


class SchemaAhead(SchemaMismatch):
    def __init__(self, found: str, expected: str) -> None:
        super().__init__(
            f"the database schema is at revision {found}, which this version (at {expected}) does not know: a newer "
            "version ran `indexer migrate`; run that version, or a newer one",
            found,
            expected,
        )


def migrations_folder() -> Path:
    """Where the migrations lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


@cache
def _revisions() -> tuple[str, ...]:
    """All revisions that this version knows, the head first. There is one line of them.

    Read from the scripts' own words: importing Alembic would cost every start of the daemon half a second.
    """
    later: dict[str | None, str] = {}  # by the revision before
    for script in (migrations_folder() / "versions").glob("*.py"):
        said = dict(_STATED.findall(script.read_text()))
        later[said["down_revision"] or None] = said["revision"]
    line: list[str] = []
    while (revision := later.get(line[-1] if line else None)) is not None:
        line.append(revision)
    return tuple(reversed(line))


def head() -> str:
    """The revision that this version works on."""
    return _revisions()[0]


async def migrate(url: str, revision: str = "head") -> None:
    """Bring the schema to `revision`: `head`, a later one by name, or an earlier one (`base` removes everything).

    `url` is the owner's, and reaches PostgreSQL directly. Raises DatabaseUnavailable, MigrationFailed,
    MigrationBusy, SchemaAhead.
    """
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    from indexer.store.database import open_session

    async def connect() -> asyncpg.Connection:
        return await open_session(url, "indexer:migrate", command_timeout=None)

    if revision not in ("head", "base", *_revisions()):
        raise MigrationFailed(f"no revision {revision!r}: known are head, base, {', '.join(_revisions())}")
    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            await _lock(connection)
            await connection.run_sync(_migrate, revision)
    except DBAPIError as error:
        raise MigrationFailed(f"the migration failed and changed nothing: {error.orig}") from error
    finally:
        await engine.dispose()


async def _lock(connection: AsyncConnection) -> None:
    """The lock of migrations, for the session. Raises MigrationBusy."""
    from sqlalchemy.exc import DBAPIError

    try:
        await connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(LOCK_SECONDS * 1000)}")
        await connection.exec_driver_sql(f"SELECT pg_advisory_lock({_MIGRATING})")
        await connection.commit()
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != asyncpg.LockNotAvailableError.sqlstate:
            raise
        await connection.rollback()
        holder = (await connection.exec_driver_sql(_HOLDER)).scalar() or "somebody"
        raise MigrationBusy(
            f"{holder} has held the lock of migrations for {LOCK_SECONDS:g} s: where that is a migration, wait for it and try "
            "again; else end that session (pg_terminate_backend)"
        ) from None


def _migrate(connection: Connection, revision: str) -> None:
    from alembic import command
    from alembic.migration import MigrationContext

    found = MigrationContext.configure(connection, opts={"version_table_schema": "indexer"}).get_current_revision()
    connection.commit()
    if found is not None and found not in _revisions():
        raise SchemaAhead(found, head())
    config = _config()
    config.attributes["connection"] = connection
    known = _revisions()  # newest first
    target = known[0] if revision == "head" else revision
    back = target == "base" or (found is not None and target in known and known.index(target) > known.index(found))
    (command.downgrade if back else command.upgrade)(config, target)


async def check(connection: asyncpg.Connection | asyncpg.pool.PoolConnectionProxy) -> None:
    """Compare the database's revision with ours. Raises SchemaBehind, SchemaAhead."""
    try:
        found: str | None = await connection.fetchval("SELECT version_num FROM indexer.alembic_version")
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        found = None
    except asyncpg.InsufficientPrivilegeError:
        raise SchemaMismatch(
            "this login may not read the schema: run `indexer migrate` as the owner of the database if that was not done, "
            "and as the owner GRANT loyalty_daemon, loyalty_reader TO this login",
            None,
            head(),
        ) from None
    if found == head():
        return
    if found is None or found in _revisions():
        raise SchemaBehind(found, head())
    raise SchemaAhead(found, head())
