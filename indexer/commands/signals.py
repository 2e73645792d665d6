"""`indexer signals`: what was signalled, what became of it at each endpoint, and sending it again."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

import typer

from indexer import terminal
from indexer.commands.wiring import (
    USAGE,
    ConfigOption,
    EmbeddedOption,
    Failure,
    JsonOption,
    on_database,
    plain,
    resolve_operation_id,
)
from indexer.store import signals
from indexer.store.connection import Connection

app = typer.Typer(help="Signals and their deliveries.", no_args_is_help=True)


@app.command("list")
def list_signals(
    config: ConfigOption = None,
    brand: Annotated[str | None, typer.Option(help="Of this brand alone.")] = None,
    operation: Annotated[str | None, typer.Option(help="Of this operation alone: its id, or its reference.")] = None,
    state: Annotated[
        str | None, typer.Option(help=f"With a delivery that is {', '.join(signals.STATES)}; dead: a dead letter.")
    ] = None,
    webhook: Annotated[str | None, typer.Option(help="With --state or --operation: at this endpoint.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=signals.MAX_LIST)] = 50,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Signals, the newest first, with what became of each at every endpoint. `--state dead` lists the dead letters."""
    if state is not None and state not in signals.STATES:
        raise Failure(f"no such state: {state}; known are {', '.join(signals.STATES)}", USAGE)
    if webhook is not None and state is None and operation is None:
        raise Failure("--webhook narrows --state or --operation; say one of them too", USAGE)

    async def find(conn: Connection) -> list[signals.Listed]:
        one = None if operation is None else await resolve_operation_id(conn, operation)
        return await signals.list_signals(
            conn, brand=brand, operation=one, webhook=webhook, state=state, limit=limit + 1
        )

    rows = on_database(config, is_embedded, find)
    document = {"data": [plain(row) for row in rows[:limit]], "more": len(rows) > limit}
    terminal.answer(document, as_json, terminal.signals_text)


@app.command("show")
def show_signal(
    signal_id: Annotated[UUID, typer.Argument(help="The signal's id: the webhook-id of its requests.")],
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """One signal with its deliveries and every attempt: when, how long, which status, and how the answer began."""
    found = on_database(config, is_embedded, lambda conn: signals.show_signal(conn, signal_id))
    if found is None:
        raise Failure(f"no signal {signal_id}")
    terminal.answer(plain(found), as_json, terminal.signal_text)


@app.command("redeliver")
def redeliver(
    signal_id: Annotated[UUID | None, typer.Argument(help="The signal's id.")] = None,
    webhook: Annotated[str | None, typer.Option(help="At this endpoint; default: all that want its type.")] = None,
    dead: Annotated[bool, typer.Option("--dead", help="All dead letters of --brand at --webhook.")] = False,
    brand: Annotated[str | None, typer.Option(help="With --dead: the brand.")] = None,
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send a signal again, under its id and with a fresh schedule. A `ready` that was taken back is not sent again."""
    if dead == (signal_id is not None) or (dead and (brand is None or webhook is None)):
        raise Failure("say the ID of a signal, or --dead --brand BRAND --webhook NAME", USAGE)
    if dead:
        assert brand is not None and webhook is not None
        count = on_database(config, is_embedded, lambda conn: signals.redeliver_dead(conn, brand, webhook))
        terminal.answer(
            {"brand": brand, "webhook": webhook, "redelivered": count},
            as_json,
            lambda d: f"{d['redelivered']} dead letters of {brand}/{webhook} go out again",
        )
        return
    assert signal_id is not None
    names = on_database(config, is_embedded, lambda conn: signals.redeliver(conn, signal_id, webhook=webhook))
    if not names:
        raise Failure(
            f"signal {signal_id} goes nowhere: it does not exist or has no number yet, no such endpoint wants it, "
            "or an attempt is under way"
        )
    terminal.answer(
        {"id": str(signal_id), "webhooks": names}, as_json, lambda d: f"goes out again to {', '.join(d['webhooks'])}"
    )
