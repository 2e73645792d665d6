"""`indexer restored`: said once after a backup of the database was put back, before any daemon is started on it.

It makes the database a new history and holds what may have been handed out since the backup. What a person must do then is
printed, and told at length in docs/operating.md.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
import typer

from indexer import terminal
from indexer.commands.wiring import (
    USAGE,
    ConfigOption,
    EmbeddedOption,
    Failure,
    JsonOption,
    load_config,
    on_database,
    plain,
    with_database,
)
from indexer.config import Config
from indexer.store import instance, schema
from indexer.store.connection import Connection
from indexer.store.database import Database
from indexer.store.embedded import EmbeddedPostgres

NEXT = """\
What to do now:
  1. Start the daemons. They follow the chains again; nothing is promised before a head has been linked.
  2. Register again what was registered since the backup; the same again changes nothing.
  3. Tell again what was handed out since the backup: POST /v1/operations/{id}/fulfil, or loyalty.fulfil, without a claim, with
     the generation that the operation has now. An answer "was never ready" means not yet: say it again later.
  4. Look at what is left with `indexer restored --held`, then let claims begin with `indexer restored --release`.
  5. Tell consumers of signals: the stream is new. Revoke again the tokens that were revoked since the backup."""


def restored(
    held: Annotated[
        bool, typer.Option("--held", help="Change nothing: list what is held since the last time.")
    ] = False,
    release: Annotated[
        bool, typer.Option("--release", help="Receipts are told again: what is still ready may be claimed.")
    ] = False,
    brand: Annotated[str | None, typer.Option(help="With --held or --release: of this brand alone.")] = None,
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say that a backup of the database was put back: renews the stream, and holds claims until --release."""
    if (held and release) or (brand is not None and not (held or release)):
        raise Failure("--held or --release, one of them; --brand goes with either", USAGE)
    if held:
        _held(brand, config, is_embedded, as_json)
    elif release:
        _release(brand, config, is_embedded, as_json)
    else:
        try:
            tree = load_config(config, is_embedded)
            done = asyncio.run(_in_embedded(tree) if is_embedded else with_database(tree, False, instance.restored))
        except instance.StillRunning as error:
            raise Failure(str(error), detail={"leases": msgspec.to_builtins(error.holders)}) from None
        terminal.answer(plain(done), as_json, _restored_text)


async def _in_embedded(config: Config) -> instance.Restored:
    """The embedded server runs with the daemon, which must not run yet: it is started for us alone, and migrated as `run` does."""
    async with EmbeddedPostgres(config.state_dir) as postgres:
        await schema.migrate(postgres.dsn("indexer_owner"))
        url = postgres.dsn("indexer")
        async with await Database.connect(url, pool_size=1) as database, database.pool.acquire() as conn:
            return await instance.restored(conn)


def _held(brand: str | None, config: Any, is_embedded: bool, as_json: bool) -> None:
    async def look(conn: Connection) -> dict[str, Any]:
        brands = [one for one in await instance.held_brands(conn) if brand in (None, one.brand)]
        return {"brands": plain(brands), "data": plain(await instance.held(conn, brand))}

    terminal.answer(on_database(config, is_embedded, look), as_json, _held_text)


def _release(brand: str | None, config: Any, is_embedded: bool, as_json: bool) -> None:
    released = on_database(config, is_embedded, lambda conn: instance.release(conn, brand))
    if brand is not None and not released:
        raise Failure(f"brand {brand!r} is not held")
    terminal.answer(
        {"released": plain(released)},
        as_json,
        lambda d: "\n".join(
            [f"{one['brand']}: {one['operations']} operations may be claimed" for one in d["released"]]
            or ["nothing was held"]
        ),
    )


def _restored_text(done: dict[str, Any]) -> str:
    counts = sum(one["operations"] for one in done["brands"])
    return "\n".join(
        [
            f"The stream is {done['stream']} now; it was {done['oldStream']}.",
            f"The newest change that the backup holds is of {done['lastChange'] or 'no time'}.",
            f"{done['leases']} leases and {done['claims']} claims of before are void.",
            f"{counts} operations are ready and not handed out, as far as this database remembers; all that settles by "
            f"evidence from before {done['restoredAt']} is held.",
            *_lines(done["held"], counts),
            NEXT,
        ]
    )


def _held_text(found: dict[str, Any]) -> str:
    if not found["brands"]:
        return "nothing is held"
    heads = [f"{one['brand']}: {one['operations']} held, from before {one['before']}" for one in found["brands"]]
    return "\n".join([*heads, *_lines(found["data"], sum(one["operations"] for one in found["brands"]))])


def _lines(held: list[dict[str, Any]], count: int) -> list[str]:
    lines = [
        f"  {one['operationId']}  {one['brand']}  {one['reference']}  generation {one['generation']}, ready {one['readyAt']}"
        for one in held
    ]
    return [*lines, f"  … and {count - len(held)} more"] if count > len(held) else lines
