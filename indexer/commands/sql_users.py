"""`indexer sql-user`: logins for schema `loyalty`, made as the owner of the database."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar
from urllib.parse import quote, unquote_plus, urlsplit, urlunsplit

import typer

from indexer import terminal
from indexer.commands.wiring import USAGE, ConfigOption, EmbeddedOption, Failure, JsonOption, load_config, plain
from indexer.store import embedded, schema, sql_users
from indexer.store.connection import Connection
from indexer.store.database import open_session

app = typer.Typer(help="Logins that read and act through SQL. Run as the owner of the database.", no_args_is_help=True)
Result = TypeVar("Result")
# of a URL's query: who logs in, and what with
OWNERS = frozenset({"user", "password", "passfile", "service", "servicefile", "sslcert", "sslkey", "sslpassword"})


def _as_owner(
    path: Path | None, is_embedded: bool, work: Callable[[Connection], Awaitable[Result]]
) -> tuple[Result, str]:
    """What `work` made of the owner's session, and the URL that it was opened with."""
    tree = load_config(path, is_embedded)
    url = (
        embedded.url_of(tree.state_dir, "indexer_owner")
        if is_embedded
        else tree.database.direct_url or tree.database.url
    )

    async def run() -> Result:
        conn = await open_session(url, "indexer:sql-user")
        try:
            await schema.check(conn)
            return await work(conn)
        finally:
            await conn.close()

    try:
        return asyncio.run(run()), url
    except sql_users.BadSqlUser as error:
        raise Failure(str(error)) from None


def _for(url: str, name: str, password: str) -> str:
    """The same place for another login, without whatever the owner's says of the owner."""
    parts = urlsplit(url)
    where = parts.netloc.rpartition("@")[2]
    place = [pair for pair in parts.query.split("&") if unquote_plus(pair.partition("=")[0]) not in OWNERS]
    return urlunsplit(parts._replace(netloc=f"{name}:{quote(password)}@{where}", query="&".join(place)))


@app.command("add")
def add_user(
    name: Annotated[str, typer.Argument(help="The login: a to z, 0 to 9 and _.")],
    brand: Annotated[str | None, typer.Option(help="It sees and acts for this brand alone.")] = None,
    reader: Annotated[bool, typer.Option("--reader", help="It reads every brand's rows, and writes nothing.")] = False,
    connections: Annotated[
        int, typer.Option(min=1, max=1000, help="How many it may have open.")
    ] = sql_users.CONNECTIONS,
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a login for a brand, or a reader, and print its URL with the password, the only time that it is seen."""
    if (brand is None) != reader:
        raise Failure("say --brand BRAND or --reader, one of them", USAGE)
    password, url = _as_owner(
        config, is_embedded, lambda conn: sql_users.add(conn, name, brand, connections=connections)
    )
    made = {"name": name, "brand": brand, "password": password, "url": _for(url, name, password)}
    terminal.answer(made, as_json, lambda d: d["url"])


@app.command("list")
def list_users(config: ConfigOption = None, is_embedded: EmbeddedOption = False, as_json: JsonOption = False) -> None:
    """The logins of brands, and the readers."""
    rows, _ = _as_owner(config, is_embedded, sql_users.list_users)
    terminal.answer({"data": [plain(row) for row in rows]}, as_json, terminal.sql_users_text)


@app.command("remove")
def remove_user(
    name: str, config: ConfigOption = None, is_embedded: EmbeddedOption = False, as_json: JsonOption = False
) -> None:
    """End a login at once, its open sessions too."""
    _as_owner(config, is_embedded, lambda conn: sql_users.remove(conn, name))
    terminal.answer({"name": name, "removed": True}, as_json, lambda d: f"{d['name']} is gone")
