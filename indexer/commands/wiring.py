"""What every command shares: its options, the configuration and a database behind it, and how it fails.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 75 try again (a database or chain that does not answer yet).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, TypeVar
from uuid import UUID

import msgspec
import typer

from indexer import terminal
from indexer.config import Config, load
from indexer.store import embedded, queries, schema
from indexer.store.connection import Connection
from indexer.store.database import Database

DONE, FAILED, USAGE, TRY_AGAIN = 0, 1, 2, 75
Result = TypeVar("Result")
_EXACT = msgspec.json.Decoder(float_hook=Decimal)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="indexer.toml (default: INDEXER_CONFIG, ./, /etc/indexer/).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
EmbeddedOption = Annotated[bool, typer.Option("--embedded", help="The PostgreSQL that runs under state_dir.")]
LogOption = Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")]


class Failure(Exception):
    """A command that cannot do what it was asked; the message says why and what to do."""

    def __init__(self, message: str, code: int = FAILED, detail: Any = None) -> None:
        super().__init__(message)
        self.code, self.detail = code, detail


def load_config(path: Path | None, embedded_database: bool) -> Config:
    """The configuration, its warnings told."""
    config = load(path, os.environ, embedded=embedded_database)
    for warning in config.warnings:
        terminal.warn(str(warning))
    return config


async def with_database(config: Config, is_embedded: bool, work: Callable[[Connection], Awaitable[Result]]) -> Result:
    """What `work` makes of one connection to a database whose schema is this version's."""
    url = embedded.url_of(config.state_dir) if is_embedded else config.database.url
    direct_url = None if is_embedded else config.database.direct_url
    async with await Database.connect(url, direct_url, pool_size=1) as database, database.pool.acquire() as conn:
        await schema.check(conn)
        return await work(conn)


def on_database(path: Path | None, is_embedded: bool, work: Callable[[Connection], Awaitable[Result]]) -> Result:
    return asyncio.run(with_database(load_config(path, is_embedded), is_embedded, work))


async def resolve_operation_id(conn: Connection, given: str) -> UUID:
    """An operation's id from itself or from a brand's reference."""
    try:
        if await queries.brand_of(conn, UUID(given)) is not None:
            return UUID(given)
    except ValueError:
        pass
    page = await queries.operations(conn, reference=given, limit=2)
    if len(page.data) != 1:
        raise Failure(f"{'no' if not page.data else 'more than one'} operation with reference {given!r}")
    return page.data[0].id


def plain(value: object) -> Any:
    """A struct of the store as JSON values; raw JSON inside it read again, a brand's numbers to the last digit."""
    return _EXACT.decode(msgspec.json.encode(value))
