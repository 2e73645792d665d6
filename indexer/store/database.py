"""Connections to PostgreSQL: a pool for short work, sessions of their own for leases and LISTEN.

Promises errors that say what to do and never show a password, time-outs everywhere, JSON as Python values. Whose
transaction a connection serves is the business of `leases.py` and of the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, ClassVar, Final
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg
import msgspec

from indexer.store import schema

CONNECT_SECONDS: Final = 10.0
COMMAND_SECONDS: Final = 60.0
OLDEST_SERVER: Final = 15


class DatabaseUnavailable(Exception):
    """PostgreSQL does not serve us. `lasting`: waiting will not help, a person must change something."""

    explains_itself: ClassVar[bool] = True

    def __init__(self, message: str, *, lasting: bool) -> None:
        super().__init__(message)
        self.lasting = lasting


_POOLED: Final = (
    "a pooler of connections answers, not PostgreSQL itself: name the pooler in [database] url, and in direct_url the server, "
    "for leases and LISTEN"
)

# What a lost session looks like: a server that went away, a backend that was ended, a statement sent into either. Some of
# these have other causes too; where it matters, ask the connection whether it is closed.
DISCONNECTED: Final = (
    OSError,
    DatabaseUnavailable,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # the server's farewell met our next statement half way
)


def place(url: str) -> str:
    """Where a URL points, fit for logs: user, host, port and database, never the password."""
    try:
        parts = urlsplit(url)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        host = parts.hostname or query.get("host", "localhost")
        port = parts.port or query.get("port", 5432)
    except ValueError:
        return "the database URL"
    # a password that was not percent-encoded ends up anywhere: then say nothing of the URL
    if parts.scheme not in ("postgresql", "postgres") or parts.fragment or "@" in parts.path + parts.query:
        return "the database URL"
    user = f" as {unquote(parts.username)}" if parts.username else ""
    return f"{host}:{port}{unquote(parts.path) or '/'}{user}"


def _explained(error: BaseException, url: str) -> DatabaseUnavailable | None:
    """What a failed connection means to the person who configured it; None where it is not about connecting."""
    where = place(url)
    match error:
        case asyncpg.InvalidAuthorizationSpecificationError():
            # no cause: its message may quote what was sent
            return DatabaseUnavailable(f"PostgreSQL at {where} refuses the user or password", lasting=True)
        case asyncpg.InvalidCatalogNameError():
            return DatabaseUnavailable(f"PostgreSQL at {where}: there is no such database; create it", lasting=True)
        case asyncpg.InsufficientPrivilegeError():
            return DatabaseUnavailable(
                f"PostgreSQL at {where}: the user may not connect to this database", lasting=True
            )
        case asyncpg.TooManyConnectionsError():
            return DatabaseUnavailable(
                f"PostgreSQL at {where} has no connection left: raise max_connections or lower [database] pool_size",
                lasting=False,
            )
        case asyncpg.CannotConnectNowError():
            return DatabaseUnavailable(f"PostgreSQL at {where} is starting or stopping", lasting=False)
        case TimeoutError():
            return DatabaseUnavailable(f"PostgreSQL at {where} did not answer in time", lasting=False)
        case asyncpg.ClientConfigurationError() | ValueError():
            return DatabaseUnavailable(
                f"[database] url cannot be read ({where}): expected postgresql://user:password@host:port/database, with "
                "special characters of the password percent-encoded",
                lasting=True,
            )
        case asyncpg.ProtocolViolationError() if "startup parameter" in str(error):
            return DatabaseUnavailable(f"at {where} {_POOLED}", lasting=True)
        case OSError():
            reason = error.strerror or type(error).__name__
            return DatabaseUnavailable(f"cannot reach PostgreSQL at {where}: {reason}", lasting=False)
        case asyncpg.PostgresConnectionError() | asyncpg.InternalClientError():
            return DatabaseUnavailable(f"PostgreSQL at {where} closed the connection", lasting=False)
    return None


def _jsonb_out(value: object) -> bytes:
    return b"\x01" + msgspec.json.encode(value)


def _jsonb_in(data: bytes) -> Any:
    return msgspec.json.decode(data[1:])


async def _prepare(connection: asyncpg.Connection) -> None:
    """JSON travels as Python values; binary, because COPY accepts no text codec."""
    await connection.set_type_codec(
        "jsonb", schema="pg_catalog", format="binary", encoder=_jsonb_out, decoder=_jsonb_in
    )
    await connection.set_type_codec(
        "json", schema="pg_catalog", format="binary", encoder=msgspec.json.encode, decoder=msgspec.json.decode
    )


async def open_session(
    url: str,
    application_name: str,
    *,
    command_timeout: float | None = COMMAND_SECONDS,
    settings: Mapping[str, str] | None = None,
) -> asyncpg.Connection:
    """A connection of one's own, closed by the caller. Raises DatabaseUnavailable."""
    try:
        connection = await asyncpg.connect(
            url,
            timeout=CONNECT_SECONDS,
            command_timeout=command_timeout,
            server_settings={"application_name": application_name, **(settings or {})},
        )
    except Exception as error:
        if (explained := _explained(error, url)) is None:
            raise
        raise explained from None
    return connection


class Database:
    """The pool, and the way to sessions of one's own.

    `pool` serves short statements and transactions; `direct_url` is where no pooler of transactions stands between.
    """

    def __init__(self, pool: asyncpg.Pool, url: str, direct_url: str) -> None:
        self.pool = pool
        self.url = url
        self.direct_url = direct_url

    @classmethod
    async def connect(
        cls, url: str, direct_url: str | None = None, *, pool_size: int = 10, check_schema: bool = True
    ) -> Database:
        """Connect, and make sure of server version and schema. Raises DatabaseUnavailable, SchemaMismatch."""
        pooler = direct_url is not None and direct_url != url
        try:
            pool = await asyncpg.create_pool(
                url,
                # no floor: asyncpg 0.32 logs a traceback for each attempt to restore one while the server is down
                min_size=0,
                max_size=pool_size,
                timeout=CONNECT_SECONDS,
                command_timeout=COMMAND_SECONDS,
                init=_prepare,
                # a pooler of transactions gives each one another server session, and knows few settings
                statement_cache_size=0 if pooler else 100,
                server_settings={"application_name": "indexer"}
                | ({} if pooler else {"idle_in_transaction_session_timeout": "60s"}),
            )
        except Exception as error:
            if (explained := _explained(error, url)) is None:
                raise
            raise explained from None
        database = cls(pool, url, direct_url or url)
        try:
            session = await database.session("indexer:check")
            try:
                major = session.get_server_version().major
                if major < OLDEST_SERVER:
                    raise DatabaseUnavailable(
                        f"PostgreSQL at {place(url)} is version {major}: {OLDEST_SERVER} or newer is needed",
                        lasting=True,
                    )
                if session.get_server_pid() != await session.fetchval("SELECT pg_backend_pid()"):
                    # a session that is somebody else's tomorrow holds no lease, and hears nothing
                    raise DatabaseUnavailable(f"at {place(database.direct_url)} {_POOLED}", lasting=True)
                if check_schema:
                    await schema.check(session)
            finally:
                await session.close()
            async with pool.acquire() as connection:
                await connection.execute("SELECT")
        except BaseException as error:
            await database.close()
            if isinstance(error, Exception) and (explained := _explained(error, url)) is not None:
                raise explained from None
            raise
        return database

    async def session(self, application_name: str, *, settings: Mapping[str, str] | None = None) -> asyncpg.Connection:
        """A connection of one's own, past any pooler; the caller closes it. Raises DatabaseUnavailable."""
        connection = await open_session(self.direct_url, application_name, settings=settings)
        await _prepare(connection)
        return connection

    async def close(self) -> None:
        """Wait for what is under way, not for ever."""
        try:
            await self.pool.close()
        except BaseException:
            self.pool.terminate()
            raise

    async def __aenter__(self) -> Database:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
