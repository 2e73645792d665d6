"""The command line: verbs are parsed here, wired to the rooms, and answered for people or, with --json, for programs.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 75 try again (a database or chain that does not answer yet).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn
from uuid import UUID

import asyncpg
import msgspec
import typer

from indexer import terminal
from indexer.commands import checking, rereading, restored, signals, sql_users, webhooks
from indexer.commands.wiring import (
    FAILED,
    TRY_AGAIN,
    USAGE,
    ConfigOption,
    EmbeddedOption,
    Failure,
    JsonOption,
    LogOption,
    load_config,
    on_database,
    plain,
    resolve_operation_id,
)
from indexer.config import Config, ConfigProblems, json_schema, load
from indexer.model.operation import State
from indexer.store import chains, embedded, functions, overview, queries, schema, tokens
from indexer.store.brands import IssuerMoved
from indexer.store.connection import Connection
from indexer.store.database import DatabaseUnavailable
from indexer.store.programs import EmbeddedError
from indexer.telemetry import configure_logging

app = typer.Typer(
    name="indexer",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
operations_app = typer.Typer(help="Operations that brands wait for.", no_args_is_help=True)
tokens_app = typer.Typer(help="Tokens for the HTTP API.", no_args_is_help=True)
config_app = typer.Typer(help="The configuration.", no_args_is_help=True)
app.add_typer(operations_app, name="operations")
app.add_typer(tokens_app, name="tokens")
app.add_typer(signals.app, name="signals")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(config_app, name="config")
app.command()(restored.restored)
app.command()(rereading.audit)
app.command()(rereading.replay)
app.command()(rereading.redecode)
app.add_typer(sql_users.app, name="sql-user")


# ------------------------------------------------------------------------------------------------ running


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"indexer {version('loyalty-settlement-indexer')}")
        raise typer.Exit


@app.callback()
def _indexer(
    asked: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Follows loyalty ledgers, settles the operations that brands registered, and signals when to fulfil."""


@app.command()
def run(
    config: ConfigOption = None,
    embedded_database: Annotated[
        bool, typer.Option("--embedded", help="Run PostgreSQL under state_dir too: for trials and small shops.")
    ] = False,
    log_level: LogOption = "info",
) -> None:
    """Run the daemon until SIGTERM."""
    from indexer.daemon import serve  # only this verb needs every room

    tree = load_config(config, embedded_database)
    configure_logging(level=log_level, secrets=tree.secrets())

    def reread() -> Config:
        again = load(config, os.environ, embedded=embedded_database)
        # of both readings: attempts under way still use what was rotated out
        configure_logging(level=log_level, secrets=[*tree.secrets(), *again.secrets()])
        return again

    with terminal.backfill_progress() as progress:
        asyncio.run(serve(tree, embedded=embedded_database, progress=progress, reread=reread))


@app.command()
def demo(
    as_json: JsonOption = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running and print the URLs.")] = False,
    seed: Annotated[int, typer.Option(help="Of the story's nonces and amounts.")] = 1,
) -> None:
    """A whole loyalty world on this machine: a chain, a database, the daemon, a shop, and eighty operations."""
    from indexer.sandbox.demo import run_demo

    raise typer.Exit(asyncio.run(run_demo(as_json=as_json, keep=keep, seed=seed)))


@app.command()
def migrate(
    config: ConfigOption = None,
    revision: Annotated[str, typer.Option(help="A revision, head or base.")] = "head",
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bring the database's schema to this version's. Run it as the owner of the database."""
    tree = load_config(config, is_embedded)
    # the owner's session, and never through a pooler: migrations lock
    url = (
        embedded.url_of(tree.state_dir, "indexer_owner")
        if is_embedded
        else tree.database.direct_url or tree.database.url
    )
    asyncio.run(schema.migrate(url, revision))
    terminal.answer(
        {"schema": revision if revision != "head" else schema.head()}, as_json, lambda d: f"schema is at {d['schema']}"
    )


@app.command()
def status(config: ConfigOption = None, is_embedded: EmbeddedOption = False, as_json: JsonOption = False) -> None:
    """Heads, history, leases and what waits, as the database knows them."""
    seen = on_database(config, is_embedded, overview.overview)
    terminal.answer(msgspec.to_builtins(seen, builtin_types=(msgspec.Raw,)), as_json, terminal.status_text)


@app.command()
def resume(
    chain: Annotated[str, typer.Argument(help="The chain's name in the configuration.")],
    accept_chain: Annotated[
        bool, typer.Option("--accept-chain", help="What the endpoint shows is right: roll back to it.")
    ] = False,
    keep_ours: Annotated[
        bool, typer.Option("--keep-ours", help="What is stored is right: the endpoint was wrong.")
    ] = False,
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Decide on a finality violation, which has stopped a chain's signals. Without a decision, shows both sides."""

    async def decide(conn: Connection) -> overview.Chain:
        found = next((c for c in (await overview.overview(conn)).chains if c.name == chain), None)
        if found is None:
            raise Failure(f"no chain {chain!r}; `indexer status` lists them", USAGE)
        if bytes(found.latch) == b"null":
            raise Failure(f"{chain} has no finality violation")
        if accept_chain != keep_ours:
            async with conn.transaction():
                await chains.resume(conn, int(found.chain_id), accept_chain=accept_chain)
        return found

    seen = plain(on_database(config, is_embedded, decide))
    sides = terminal.latch_text(seen["latch"])
    told = {"chain": chain, "latch": seen["latch"], "decided": "accept-chain" if accept_chain else "keep-ours"}
    if accept_chain == keep_ours:
        terminal.answer({**told, "decided": None}, as_json, lambda _: f"finality violation on {chain}\n{sides}")
        raise Failure("say --accept-chain or --keep-ours, one of them", USAGE)
    terminal.answer(
        told, as_json, lambda d: f"{sides}\n{chain}: {d['decided']}; its follower begins again within half a minute"
    )


@app.command()
def balances(
    wallet: Annotated[str | None, typer.Argument(help="The holder at Loyfin, 0x and 40 hex digits.")] = None,
    keyban: Annotated[str | None, typer.Option(help="The holder's walletId at Keyban: asked there, now.")] = None,
    qiibee: Annotated[str | None, typer.Option(help="The holder's auth_id at qiibee: asked there, now.")] = None,
    brand: Annotated[str | None, typer.Option(help="Only this brand's programmes and accounts.")] = None,
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """What a holder has: at Loyfin from canonical events, at Keyban and qiibee by their word of now."""
    from indexer.model.types import BadValue, address
    from indexer.partners.balances import partner_balances

    if wallet is None and keyban is None and qiibee is None:
        raise Failure("whose balances: give a wallet, --keyban or --qiibee", USAGE)
    data: list[Any] = []
    if wallet is not None:
        try:
            holder = address(wallet, "wallet")
        except BadValue as error:
            raise Failure(str(error), USAGE) from None
        data = on_database(config, is_embedded, lambda conn: queries.balances_of(conn, holder, brand))
    partners: list[Any] = []
    if keyban is not None or qiibee is not None:
        tree = load_config(config, is_embedded)
        partners = asyncio.run(partner_balances(tree, keyban=keyban, qiibee=qiibee, brand=brand))
        if not partners:
            raise Failure("no account at that partner is configured", USAGE)
    document = {"data": msgspec.to_builtins(data), "partners": msgspec.to_builtins(partners)}
    terminal.answer(document, as_json, terminal.balances_text)
    if partners and all(row.balance is None for row in partners):
        raise typer.Exit(TRY_AGAIN)


# ------------------------------------------------------------------------------------------------ operations


@operations_app.command("list")
def list_operations(
    config: ConfigOption = None,
    brand: Annotated[str | None, typer.Option(help="Of this brand alone.")] = None,
    status: Annotated[list[str] | None, typer.Option(help="In these states; may be given again.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=queries.MAX_PAGE)] = 50,
    cursor: Annotated[str | None, typer.Option(help="nextCursor of the page before.")] = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Operations, newest registration first."""
    if unknown := sorted(set(status or ()) - {state.value for state in State}):
        raise Failure(f"no such status: {', '.join(unknown)}; known are {', '.join(State)}", USAGE)
    page = on_database(
        config,
        is_embedded,
        lambda conn: queries.operations(conn, brand=brand, states=status, limit=limit, cursor=cursor),
    )
    terminal.answer(plain(page), as_json, terminal.operations_text)


@operations_app.command("show")
def show_operation(
    operation: Annotated[str, typer.Argument(help="The id, or the brand's reference.")],
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """One operation with its legs, evidence, conflicts, history and receipts."""

    async def find(conn: Connection) -> queries.Operation | None:
        return await queries.operation(conn, await resolve_operation_id(conn, operation))

    found = on_database(config, is_embedded, find)
    if found is None:
        raise Failure(f"no operation {operation}")
    terminal.answer(plain(found), as_json, terminal.operation_text)


@operations_app.command("register")
def register_operation(
    file: Annotated[Path, typer.Argument(help="JSON as for POST /v1/operations; - reads standard input.")],
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Register what a brand waits for. Idempotent by its reference."""
    text = sys.stdin.read() if str(file) == "-" else file.read_text()
    try:
        msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise Failure(f"{'standard input' if str(file) == '-' else file} is not JSON: {error}", USAGE) from None
    done = on_database(config, is_embedded, lambda conn: functions.register_operation(conn, text))
    terminal.answer(
        plain(done), as_json, lambda d: f"{d['id']} {'registered' if d['created'] else 'was registered before'}"
    )


@operations_app.command("cancel")
def cancel_operation(
    operation: str, config: ConfigOption = None, is_embedded: EmbeddedOption = False, as_json: JsonOption = False
) -> None:
    """Record that the brand no longer wants it. A signed action may still be executed until `executableUntil`."""

    async def cancel(conn: Connection) -> functions.Cancelled:
        return await functions.cancel(conn, await resolve_operation_id(conn, operation))

    done = on_database(config, is_embedded, cancel)
    terminal.answer(plain(done), as_json, lambda d: f"accepted; executable until {d['executableUntil'] or 'for ever'}")


@operations_app.command("fulfil")
def fulfil_operation(
    operation: str,
    generation: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="The generation of the ready signal.")],
    receipt: Annotated[str, typer.Option(help="A JSON object, kept with the operation.")] = "{}",
    claim: Annotated[UUID | None, typer.Option(help="Where it was claimed: the claim.")] = None,
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Record that the brand has handed over. Exits 1 when that generation was taken back (it is recorded all the same)."""
    try:
        msgspec.json.decode(receipt)
    except msgspec.DecodeError as error:
        raise Failure(f"--receipt is not JSON: {error}", USAGE) from None

    body = f'{{"receipt": {receipt}}}'  # as it was given, to the last digit

    async def fulfil(conn: Connection) -> functions.Fulfilled:
        return await functions.fulfil(conn, await resolve_operation_id(conn, operation), generation, body, claim)

    done = on_database(config, is_embedded, fulfil)
    terminal.answer(plain(done), as_json, lambda d: f"{d['outcome']} (generation {d['generation']})")
    if done.outcome != "fulfilled":
        raise typer.Exit(FAILED)


@operations_app.command("resolve")
def resolve_operation(
    operation: str,
    reason: Annotated[str, typer.Option(help="Why; kept with the decision.")],
    accept: Annotated[UUID | None, typer.Option(help="This evidence settles it.")] = None,
    dismiss: Annotated[UUID | None, typer.Option(help="This evidence is not its own.")] = None,
    actor: Annotated[str | None, typer.Option(help="Who decides (default: the login name).")] = None,
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Decide on evidence that conflicts, or is ambiguous. `operations show` lists the ids."""
    if (accept is None) == (dismiss is None):
        raise Failure("say --accept EVIDENCE or --dismiss EVIDENCE, one of them", USAGE)
    evidence = accept or dismiss
    assert evidence is not None

    async def resolve(conn: Connection) -> functions.Resolved:
        name = actor or os.environ.get("USER") or f"uid {os.getuid()}"
        return await functions.resolve(
            conn, await resolve_operation_id(conn, operation), evidence, accept is not None, reason, name
        )

    done = on_database(config, is_embedded, resolve)
    terminal.answer(plain(done), as_json, lambda d: d["outcome"])


# ------------------------------------------------------------------------------------------------ tokens


@tokens_app.command("add")
def add_token(
    name: Annotated[str, typer.Argument(help="Whose it is, for the list.")],
    scope: Annotated[list[str], typer.Option(help=f"Of {', '.join(tokens.SCOPES)}; may be given again.")],
    brand: Annotated[str | None, typer.Option(help="Bound to this brand; default: every brand.")] = None,
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a token and print it, the only time that it is seen."""
    token, row = on_database(config, is_embedded, lambda conn: tokens.add(conn, name, brand, scope))
    terminal.answer({**plain(row), "token": token}, as_json, lambda d: d["token"])


@tokens_app.command("list")
def list_tokens(config: ConfigOption = None, is_embedded: EmbeddedOption = False, as_json: JsonOption = False) -> None:
    """Every token, revoked ones too; never the token itself."""
    rows = on_database(config, is_embedded, tokens.list_tokens)
    terminal.answer({"data": [plain(row) for row in rows]}, as_json, terminal.tokens_text)


@tokens_app.command("revoke")
def revoke_token(
    token_id: UUID, config: ConfigOption = None, is_embedded: EmbeddedOption = False, as_json: JsonOption = False
) -> None:
    """End a token; it works for a few seconds more at the most."""
    if not on_database(config, is_embedded, lambda conn: tokens.revoke(conn, token_id)):
        raise Failure(f"no token {token_id}, or it was revoked before")
    terminal.answer({"revoked": str(token_id)}, as_json, lambda d: f"revoked {d['revoked']}")


# ------------------------------------------------------------------------------------------------ configuration


@config_app.command("check")
def check_config(
    config: ConfigOption = None,
    online: Annotated[
        bool, typer.Option("--online", help="Try the endpoints too: who they are, what they answer, what it costs.")
    ] = False,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read the configuration as the daemon would, and print every problem at once."""
    try:
        tree = load(config, os.environ, embedded=is_embedded)
    except ConfigProblems as error:
        if not as_json:
            raise
        terminal.answer({"ok": False, "problems": [vars_of(problem) for problem in error.problems]}, True, str)
        raise typer.Exit(USAGE) from None
    found = [str(warning) for warning in tree.warnings]
    tried = checking.try_endpoints(tree) if online else []
    problems = checking.problems_of(tried)
    terminal.answer(
        {"ok": not problems, "problems": problems, "warnings": found} | ({"chains": tried} if online else {}),
        as_json,
        lambda d: "\n".join(
            [
                *(f"warning: {w}" for w in found),
                *([checking.online_text(tried)] if tried else []),
                "ok" if d["ok"] else f"{len(problems)} problems, named above",
            ]
        ),
    )
    if problems:
        raise typer.Exit(FAILED)


def vars_of(problem: Any) -> dict[str, str]:
    return {"where": problem.where, "what": problem.what, "hint": problem.hint}


@config_app.command("schema")
def config_schema(as_json: JsonOption = False) -> None:
    """The JSON schema of indexer.toml."""
    del as_json  # it is JSON either way
    typer.echo(json.dumps(json_schema(), indent=2))


def _refused(error: asyncpg.PostgresError) -> Failure | None:
    """What schema loyalty's functions refuse, told as they say it."""
    if str(error.sqlstate).startswith("LY"):
        detail = json.loads(error.detail) if error.detail else None
        return Failure(error.message or str(error), FAILED, detail)
    return None


def _fail(message: str, code: int, detail: Any = None) -> NoReturn:
    terminal.complain(message, detail)
    sys.exit(code)


def main() -> None:
    """The console script `indexer`."""
    try:
        app()
    except ConfigProblems as error:
        _fail("the configuration cannot be used:\n" + "\n".join(f"  {problem}" for problem in error.problems), USAGE)
    except (schema.SchemaMismatch, schema.MigrationFailed, IssuerMoved, tokens.BadToken, queries.BadCursor) as error:
        _fail(str(error), USAGE)
    except schema.MigrationBusy as error:
        _fail(str(error), TRY_AGAIN)
    except DatabaseUnavailable as error:
        _fail(str(error), USAGE if error.lasting else TRY_AGAIN)
    except EmbeddedError as error:
        _fail(str(error), TRY_AGAIN if isinstance(error, embedded.AlreadyRunning) else FAILED)
    except asyncpg.PostgresError as error:
        refusal = _refused(error)
        _fail(
            *((str(refusal), refusal.code, refusal.detail) if refusal else (f"the database refused: {error}", FAILED))
        )
    except Failure as error:
        _fail(str(error), error.code, error.detail)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, UnicodeDecodeError) as error:
        _fail(str(error), USAGE)
    except OSError as error:
        _fail(f"{error}", TRY_AGAIN)
    except KeyboardInterrupt:
        sys.exit(130)
