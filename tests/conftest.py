"""Fixtures that every ring shares: one real PostgreSQL per worker, one fresh migrated database per test.

`TEST_DATABASE_URL` (a role that may create roles and databases) replaces the embedded server, `INDEXER_PG_BIN` its
programs: so the matrix of PostgreSQL 15 to 18 runs.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from hypothesis import HealthCheck, settings

from indexer.store import schema
from indexer.store.database import Database
from indexer.store.embedded import EmbeddedPostgres
from tests import fault_table, movements

# py_ecc, which comes with the sandbox's signatures, raises the limit to where nested JSON overflows the stack of the process;
# the daemon never imports it (test_startup.py).
_limit = sys.getrecursionlimit()
import py_ecc  # noqa: E402, F401

sys.setrecursionlimit(_limit)

# the same examples on every run, however busy the machine is; `--hypothesis-profile default` looks for new ones
settings.register_profile(
    "same", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")

_ROOM = 4 * 2**30  # bytes; a worker needs some hundred megabytes

_FOREIGN_ROLES = """
DO $$
DECLARE wanted text;
BEGIN
  PERFORM pg_advisory_xact_lock(7237);
  FOREACH wanted IN ARRAY ARRAY['loyalty_daemon', 'loyalty_reader', 'loyalty_brand'] LOOP
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN EXECUTE format('CREATE ROLE %I', wanted); END IF;
  END LOOP;
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'indexer_test') THEN
    CREATE ROLE indexer_test LOGIN PASSWORD 'indexer_test' IN ROLE loyalty_daemon, loyalty_reader;
  END IF;
END $$
"""


@pytest.fixture(autouse=True)
def moves_what_the_table_of_faults_says(request: pytest.FixtureRequest) -> Iterator[None]:
    """docs/faults.md names metrics beside tests: they move while the test runs, or it fails."""
    wanted = fault_table.wanted_of_test(request.node.nodeid)
    if not wanted:
        yield
        return
    with movements.watched() as seen:
        yield
    assert not (still := seen.still(wanted)), f"docs/faults.md says that these move here, and they did not: {still}"


@dataclass
class Postgres:
    """A server for tests: `url(database)` is the daemon's, `owner_url(database)` creates and migrates."""

    _daemon: str
    _owner: str
    pid: int | None  # of the embedded postmaster
    _template: str | None = None
    _names: itertools.count[int] = field(default_factory=itertools.count)
    _run: str = field(default_factory=lambda: secrets.token_hex(4))

    def url(self, database: str) -> str:
        return urlunsplit(urlsplit(self._daemon)._replace(path=f"/{database}"))

    def owner_url(self, database: str) -> str:
        return urlunsplit(urlsplit(self._owner)._replace(path=f"/{database}"))

    async def execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self._owner)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    async def migrated_template(self) -> str:
        """The database that every test's is copied from; migrated once per worker."""
        if self._template is None:
            name = f"template_{self._run}"
            await self.execute(f"CREATE DATABASE {name}")
            await schema.migrate(self.owner_url(name))
            self._template = name
        return self._template

    async def drop_template(self) -> None:
        if self._template is not None:
            await self.execute(f"DROP DATABASE {self._template} WITH (FORCE)")

    @asynccontextmanager
    async def fresh_database(self, *, migrated: bool = True) -> AsyncIterator[str]:
        """The name of a database that nobody else uses, dropped at the end."""
        name = f"test_{self._run}_{next(self._names)}"
        template = await self.migrated_template() if migrated else "template1"
        await self.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        try:
            yield name
        finally:
            with suppress(asyncpg.PostgresConnectionError, OSError):  # a test may have killed the server
                await self._drop(name)

    async def _drop(self, name: str) -> None:
        """Also while an autovacuum worker is in it, which is not the owner's to end: it leaves by itself."""
        for pause in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2):
            try:
                return await self.execute(f"DROP DATABASE {name} WITH (FORCE)")
            except asyncpg.InsufficientPrivilegeError:
                await asyncio.sleep(pause)
        await self.execute(f"DROP DATABASE {name}")  # without FORCE the server itself asks the worker to leave


def _memory() -> Path | None:
    """Where files live in memory, if there is room: a database is a thousand small files, and each test has one of its own."""
    memory = Path("/dev/shm")
    try:
        found = os.statvfs(memory)
    except OSError:
        return None
    roomy = found.f_bavail * found.f_frsize >= _ROOM and not found.f_flag & os.ST_NOEXEC  # it holds the programs too
    return memory if roomy and os.access(memory, os.W_OK) else None


@pytest.fixture(scope="session")
async def postgres() -> AsyncIterator[Postgres]:
    """One server per worker: embedded with fsync off, dying with this process; or the one of TEST_DATABASE_URL."""
    if given := os.environ.get("TEST_DATABASE_URL"):
        parts = urlsplit(given)
        host = parts.netloc.rpartition("@")[2]
        daemon = urlunsplit(parts._replace(netloc=f"indexer_test:indexer_test@{host}"))
        server = Postgres(daemon, given, None)
        await server.execute(_FOREIGN_ROLES)
        try:
            yield server
        finally:
            await server.drop_template()
        return
    # short, and open to the account that runs the server
    state = Path(tempfile.mkdtemp(prefix="indexer-test-", dir=_memory()))
    state.chmod(0o711)
    try:
        async with EmbeddedPostgres(
            state,
            durable=False,
            settings={"shared_buffers": "64MB", "max_connections": "200", "max_wal_size": "256MB"},
        ) as embedded:
            yield Postgres(embedded.dsn("indexer"), embedded.dsn("indexer_owner"), embedded.pid)
    finally:
        shutil.rmtree(state, ignore_errors=True)


@pytest.fixture
async def database_name(postgres: Postgres) -> AsyncIterator[str]:
    """The name of this test's own migrated database."""
    async with postgres.fresh_database() as name:
        yield name


@pytest.fixture
def dsn(postgres: Postgres, database_name: str) -> str:
    """The daemon's URL of this test's own migrated database (no superuser, not the owner)."""
    return postgres.url(database_name)


@pytest.fixture
def owner_dsn(postgres: Postgres, database_name: str) -> str:
    """The owner's URL of the same database: for migrations, roles and what the daemon may not do."""
    return postgres.owner_url(database_name)


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    """A Database on this test's own migrated database."""
    async with await Database.connect(dsn) as connected:
        yield connected
