"""Logins for schema `loyalty`: one that sees and acts for a brand, or one that reads everything.

A login is a role of the server, made with a password that is shown once and never travels (PostgreSQL is given a SCRAM
verifier). What ties it to a brand is a row of `indexer.brand_login`, looked up by session_user. Making and removing one
takes the owner of the database; what a login may do is in `contract/grants.sql`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from datetime import datetime

import asyncpg
import msgspec

from indexer.store.connection import Connection

CONNECTIONS = 20  # of one login at a time: a worker that leaks them must not stop the daemon
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_ITERATIONS = 4096  # PostgreSQL's own default


class BadSqlUser(ValueError):
    """A login that cannot be made or removed as asked; the message says why."""


class SqlUser(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """`brand` None: it reads every brand's rows, and writes nothing."""

    name: str
    brand: str | None
    created_at: datetime | None  # None: not known, of a reader


def scram_verifier(password: str, salt: bytes) -> str:
    """What PostgreSQL keeps of a password (RFC 5802, RFC 7677): given in its place, the password stays here."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, _ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    text = [base64.b64encode(raw).decode() for raw in (salt, stored, server)]
    return f"SCRAM-SHA-256${_ITERATIONS}:{text[0]}${text[1]}:{text[2]}"


async def add(conn: Connection, name: str, brand: str | None, *, connections: int = CONNECTIONS) -> str:
    """Makes a login for a brand, or for every brand's reader (None). Returns its password, the only time it is seen.

    Raises BadSqlUser.
    """
    if _NAME.fullmatch(name) is None:
        raise BadSqlUser(f"{name[:80]!r} is no name for a login: a to z, 0 to 9 and _, 63 at most, no digit first")
    password = secrets.token_urlsafe(24)
    group = "loyalty_reader" if brand is None else "loyalty_brand"
    try:
        async with conn.transaction():
            await _say(
                conn,
                "CREATE ROLE %I LOGIN PASSWORD %L CONNECTION LIMIT %s IN ROLE %I",
                name,
                scram_verifier(password, secrets.token_bytes(16)),
                str(connections),
                group,
            )
            if brand is not None:
                await conn.execute("INSERT INTO indexer.brand_login (login, brand) VALUES ($1, $2)", name, brand)
    except asyncpg.DuplicateObjectError:
        raise BadSqlUser(f"the server has a role {name} already: choose another name") from None
    except asyncpg.UniqueViolationError:
        raise BadSqlUser(f"{name} is tied to a brand already, though the server has no such role: remove it") from None
    except asyncpg.ReservedNameError:
        raise BadSqlUser(f"{name}: PostgreSQL keeps names that begin with pg_ for itself") from None
    except asyncpg.ForeignKeyViolationError:
        raise BadSqlUser(f"there is no brand {brand!r}; brands come from the configuration") from None
    except asyncpg.InsufficientPrivilegeError as error:
        raise _not_the_owner(error) from None
    return password


async def list_users(conn: Connection) -> list[SqlUser]:
    """The logins of brands, then the readers. Those of the daemon and the owner are not among them."""
    rows = await conn.fetch(
        """
        SELECT l.login AS name, l.brand, l.created_at FROM indexer.brand_login l
        UNION ALL
        SELECT r.rolname, NULL, NULL FROM pg_roles r
        WHERE r.rolcanlogin AND NOT r.rolsuper AND pg_has_role(r.oid, 'loyalty_reader', 'MEMBER')
          AND NOT pg_has_role(r.oid, 'loyalty_daemon', 'MEMBER')
        ORDER BY brand NULLS LAST, name
        """
    )
    return [SqlUser(**row) for row in rows]


async def remove(conn: Connection, name: str) -> None:
    """Ends a login that `list_users` shows: it sees nothing from here on, its sessions end, its role goes. Raises BadSqlUser."""
    if name not in {user.name for user in await list_users(conn)}:
        raise BadSqlUser(f"there is no login {name[:80]!r} of a brand or a reader")
    try:
        async with conn.transaction():
            await conn.execute("DELETE FROM indexer.brand_login WHERE login = $1", name)
            there = await conn.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", name)
            if there:
                await _say(conn, "ALTER ROLE %I NOLOGIN", name)
                await _say(conn, "REVOKE loyalty_brand, loyalty_reader FROM %I", name)
                await _say(conn, "GRANT %I TO CURRENT_USER", name)  # else its sessions are not ours to end
        if there:
            await conn.fetch("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = $1", name)
            await _say(conn, "DROP ROLE %I", name)
    except asyncpg.DependentObjectsStillExistError as error:
        raise BadSqlUser(f"{name} may not log in any more, but the role stays: {error}; {error.detail}") from None
    except asyncpg.InsufficientPrivilegeError as error:
        raise _not_the_owner(error) from None


def _not_the_owner(error: asyncpg.PostgresError) -> BadSqlUser:
    return BadSqlUser(
        f"PostgreSQL refuses ({error}): logins are made by the owner of the database, with CREATEROLE and ADMIN OPTION on "
        "loyalty_brand and loyalty_reader; as it: INDEXER_DATABASE__URL=postgresql://owner@… indexer sql-user …"
    )


async def _say(conn: Connection, statement: str, *parts: str) -> None:
    """A statement on roles, which takes no parameters: PostgreSQL itself puts the names and words in."""
    marks = "".join(f", ${number}::text" for number in range(2, len(parts) + 2))
    await conn.execute(await conn.fetchval(f"SELECT format($1{marks})", statement, *parts))
