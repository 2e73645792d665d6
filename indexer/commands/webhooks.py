"""`indexer webhooks`: how endpoints are, and pausing, enabling and testing one.

A test goes the way that every delivery goes, through the guard of the addresses, from the machine that it is asked on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from indexer import terminal
from indexer.commands.wiring import (
    FAILED,
    USAGE,
    ConfigOption,
    EmbeddedOption,
    Failure,
    JsonOption,
    load_config,
    on_database,
    plain,
)
from indexer.signals.attempts import Endpoint, Reply, printable, send_test
from indexer.signals.targets import system_lookup
from indexer.signals.webhooks import endpoints_of
from indexer.store import webhooks
from indexer.store.connection import Connection

app = typer.Typer(help="Endpoints that signals are posted to.", no_args_is_help=True)

Brand = Annotated[str, typer.Argument(help="The brand's name in the configuration.")]
Name = Annotated[str, typer.Argument(help="The webhook's name in the configuration.")]


@app.command("list")
def list_webhooks(
    brand: Annotated[str | None, typer.Option(help="Of this brand alone.")] = None,
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Every endpoint: at work, paused, failing or gone; what waits for it, and its dead letters."""
    rows = on_database(config, is_embedded, lambda conn: webhooks.list_webhooks(conn, brand))
    terminal.answer({"data": [plain(row) for row in rows]}, as_json, terminal.webhooks_text)


@app.command("enable")
def enable_webhook(
    brand: Brand,
    name: Name,
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take up an endpoint again that was paused, failed for too long or answered 410. What waits for it goes at once."""
    _switch(config, is_embedded, as_json, brand, name, "enabled", webhooks.enable_webhook)


@app.command("pause")
def pause_webhook(
    brand: Brand,
    name: Name,
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Hold an endpoint's deliveries; they go on being made, and go out when it is enabled."""
    _switch(config, is_embedded, as_json, brand, name, "paused", webhooks.pause_webhook)


def _switch(
    config: Path | None,
    is_embedded: bool,
    as_json: bool,
    brand: str,
    name: str,
    done: str,
    switch: Callable[[Connection, str, str], Awaitable[bool]],
) -> None:
    if not on_database(config, is_embedded, lambda conn: switch(conn, brand, name)):
        raise Failure(f"no webhook {brand}/{name} is configured; `indexer webhooks list` shows them")
    terminal.answer({"brand": brand, "webhook": name, "is": done}, as_json, lambda d: f"{brand}/{name} is {done}")


@app.command("test")
def test_webhook(
    brand: Brand,
    name: Name,
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send a signed `webhook.test` from here, and tell what came back. Exits 1 when it was not taken. Needs no database."""
    tree = load_config(config, is_embedded)
    found = [one for one in endpoints_of(tree.brands) if (one.brand, one.name) == (brand, name)]
    if not found:
        known = ", ".join(f"{one.brand}/{one.name}" for one in endpoints_of(tree.brands)) or "none"
        raise Failure(f"no webhook {brand}/{name} in the configuration; there is {known}", USAGE)
    reply = asyncio.run(_try(found[0]))
    outcome = {
        "brand": brand,
        "webhook": name,
        "taken": reply.taken,
        "status": reply.status,
        "reason": reply.reason,
        "seconds": round(reply.seconds, 3),
        "answer": printable(reply.answer),
    }
    terminal.answer(outcome, as_json, _test_text)
    if not reply.taken:
        raise typer.Exit(FAILED)


async def _try(endpoint: Endpoint) -> Reply:
    threads = ThreadPoolExecutor(1, "resolve")
    try:
        return await send_test(endpoint, system_lookup(threads), time.time)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _test_text(outcome: dict[str, Any]) -> str:
    what = f"{outcome['brand']}/{outcome['webhook']}"
    said = f"; it said: {outcome['answer']}" if outcome["answer"] else ""
    if outcome["taken"]:
        return f"{what} took it: HTTP {outcome['status']} after {outcome['seconds']:g} s{said}"
    return f"{what} did not take it: {outcome['reason']}, after {outcome['seconds']:g} s{said}"
