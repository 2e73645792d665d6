"""`indexer audit`, `replay` and `redecode`: having finalized blocks read, or kept logs decoded, again.

The command asks through the database, and whoever fills the chain's history carries it out: a daemon that runs, or, where
none does, the command itself under the same lease. So it may be said beside a live daemon, interrupted, and said again.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from indexer import terminal
from indexer.commands.wiring import (
    FAILED,
    TRY_AGAIN,
    USAGE,
    ConfigOption,
    EmbeddedOption,
    Failure,
    JsonOption,
    load_config,
)
from indexer.config import Chain, Config
from indexer.store import chains, embedded, rereads
from indexer.store.database import Database
from indexer.store.leases import LeaseLost, Leases
from indexer.store.rereads import Kind, Reread
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics, configure_logging

LOOK_SECONDS = 0.3  # between looks at how far it is

ChainArgument = Annotated[str, typer.Argument(help="The chain's name in the configuration.")]
FromOption = Annotated[int, typer.Option("--from", min=0, help="The first block.")]
ToOption = Annotated[int | None, typer.Option("--to", min=0, help="The last block; default: the finalized one.")]
WaitOption = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Whether to wait for the end, and show the way there.")
]


def audit(
    chain: ChainArgument,
    first: FromOption,
    last: ToOption = None,
    repair: Annotated[bool, typer.Option("--repair", help="Put right what differs.")] = False,
    wait: WaitOption = True,
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read finalized blocks again, and compare with what is stored. Exits 1 on a difference, repaired or not."""
    done = _ask(config, is_embedded, chain, "repair" if repair else "audit", first, last, wait, as_json)
    if wait and not done["ok"]:
        raise typer.Exit(FAILED)


def replay(
    chain: ChainArgument,
    first: FromOption,
    last: ToOption = None,
    wait: WaitOption = True,
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read finalized blocks again, put the facts right, and settle anew what rests on them. Sends nothing twice."""
    done = _ask(config, is_embedded, chain, "replay", first, last, wait, as_json)
    if wait and done["unsettled"]:
        raise typer.Exit(FAILED)


def redecode(
    chain: ChainArgument,
    wait: WaitOption = True,
    config: ConfigOption = None,
    is_embedded: EmbeddedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read the logs that were kept raw with the ABI files of today. Restart the daemon first, when files were added."""
    _ask(config, is_embedded, chain, "redecode", 0, None, wait, as_json)


def _ask(
    config: Path | None,
    is_embedded: bool,
    name: str,
    kind: Kind,
    first: int,
    last: int | None,
    wait: bool,
    as_json: bool,
) -> dict[str, Any]:
    if last is not None and last < first:
        raise Failure(f"--to {last} is before --from {first}", USAGE)
    tree = load_config(config, is_embedded)
    chain = next((each for each in tree.chains if each.name == name), None)
    if chain is None:
        known = ", ".join(each.name for each in tree.chains)
        raise Failure(f"no chain {name!r} in the configuration; it has {known or 'none'}", USAGE)
    configure_logging(level="info", secrets=tree.secrets())
    with terminal.backfill_progress(kind) as progress:
        done = asyncio.run(_asked(tree, is_embedded, chain, kind, first, last, wait, progress))
    if done.state == "failed":
        raise Failure(f"{kind} of {name}: {done.trouble}")
    if done.state == "cancelled":
        raise Failure(f"{kind} of {name} was cancelled at block {done.next_block}")
    document = _report(chain, done)
    terminal.answer(document, as_json, _text)
    return document


async def _asked(
    config: Config,
    is_embedded: bool,
    chain: Chain,
    kind: Kind,
    first: int,
    last: int | None,
    wait: bool,
    progress: terminal.BackfillProgress,
) -> Reread:
    from indexer.chain.runtime import ChainRuntime  # the other commands need no chain

    database_url = embedded.url_of(config.state_dir) if is_embedded else config.database.url
    direct_url = None if is_embedded else config.database.direct_url
    async with (
        await Database.connect(database_url, direct_url, pool_size=4) as database,
        ChainRuntime.open(chain, Metrics(), Wakeups(), random.Random()) as runtime,  # noqa: S311 - spreads retries
    ):
        async with database.pool.acquire() as conn:
            state = await chains.load_chain(conn, chain.chain_id)
            if state is None or state.finalized is None:
                raise Failure(f"nothing of {chain.name} is finalized yet: run the daemon first", TRY_AGAIN)
            if first > state.finalized.number:
                raise Failure(
                    f"block {first} of {chain.name} is not finalized yet, {state.finalized.number} is: blocks above are followed, and "
                    "correct themselves",
                    TRY_AGAIN,
                )
            request = await rereads.ask(conn, chain.chain_id, kind, first, last, runtime.fingerprint)
        if not wait:
            return await _look(database, request)
        helping = asyncio.create_task(_help(database, config, chain, runtime, request))
        try:
            return await _watch(database, chain, request, helping, progress)
        except BaseException:
            with suppress(Exception):
                async with asyncio.timeout(5), database.pool.acquire() as conn:
                    await rereads.cancel(conn, request)
            raise
        finally:
            helping.cancel()
            await asyncio.gather(helping, return_exceptions=True)


async def _watch(
    database: Database, chain: Chain, request: UUID, helping: asyncio.Task[None], progress: terminal.BackfillProgress
) -> Reread:
    told = None
    while True:
        seen = await _look(database, request)
        if seen.high is not None and seen.next_block is not None:
            progress(chain.name, seen.next_block - seen.low, seen.high - seen.low + 1, seen.report.get("logs", 0))
        if seen.state not in rereads.OPEN:
            return seen
        if seen.trouble is not None and seen.trouble != told:
            terminal.warn(f"waits: {seen.trouble}")
        told = seen.trouble
        if helping.done():
            helping.result()  # it ends before the request does only by an error
        await asyncio.sleep(LOOK_SECONDS)


async def _look(database: Database, request: UUID) -> Reread:
    async with database.pool.acquire() as conn:
        seen = await rereads.find(conn, request)
    if seen is None:
        raise Failure(f"request {request} is gone from the database")
    return seen


async def _help(database: Database, config: Config, chain: Chain, runtime: Any, request: UUID) -> None:
    """Carries it out where no daemon holds the lease of the chain's history, or when the one that did is gone."""
    leases = Leases(database, ttl=config.database.lease_seconds, rng=random.Random())  # noqa: S311 - spreads retries
    while True:
        try:
            async with leases.hold(f"history:{chain.chain_id}") as lease:
                await runtime.reread(lease, request)
            return
        except LeaseLost:
            continue


def _report(chain: Chain, done: Reread) -> dict[str, Any]:
    head = {
        "request": str(done.id),
        "kind": done.kind,
        "chain": chain.name,
        "chainId": str(chain.chain_id),
        "state": done.state,
        "fromBlock": str(done.low),
        "toBlock": None if done.high is None else str(done.high),
    }
    if done.kind == "redecode":
        counts: dict[str, Any] = {name: done.report.get(name, 0) for name in ("logs", "moved", "left")}
        return {**head, **counts, "ok": True}
    names = ("blocks", "logs", "missing", "extra", "different", "repaired", "unread", "readable")
    counts = {name: done.report.get(name, 0) for name in names}
    found = {name: done.report.get(name, []) for name in ("differences", "unsettled")}
    ok = not (counts["missing"] or counts["extra"] or counts["different"] or found["unsettled"])
    return {**head, **counts, **found, "ok": ok}


def _text(told: dict[str, Any]) -> str:
    where = f"{told['kind']} of {told['chain']}"
    if told["state"] in rereads.OPEN:
        return f"{where} is asked for ({told['request']})"
    if told["kind"] == "redecode":
        return f"{where}: {told['logs']} logs were kept raw; {told['moved']} can be read now and moved, {told['left']} stay"
    found = f"{told['missing']} missing, {told['extra']} too many, {told['different']} different"
    repaired = "" if told["kind"] == "audit" else f"; {told['repaired']} repaired"
    lines = [f"{where}, blocks {told['fromBlock']} to {told['toBlock']}: {told['logs']:,} logs read; {found}{repaired}"]
    if told["unread"]:
        stored = "; they are stored now" if told["kind"] != "audit" else ": history is being filled"
        lines.append(f"  {told['unread']} logs of blocks that had not been read before{stored}")
    for one in told["differences"]:
        columns = f" ({', '.join(one['columns'])})" if "columns" in one else ""
        lines.append(
            f"  {one['what']:<10}block {one['blockNumber']} {one['blockHash']}, log {one['logIndex']} of {one['emitter']}{columns}"
        )
    if (rest := told["missing"] + told["extra"] + told["different"] - len(told["differences"])) > 0:
        lines.append(f"  … and {rest} more")
    if told["kind"] == "audit" and (told["missing"] or told["extra"] or told["different"]):
        lines.append("  nothing was changed: --repair puts it right now, the second look when it comes there")
    for low, high in told["unsettled"]:
        lines.append(
            f"  blocks {low} to {high}: the endpoint's answers contradict each other; nothing was taken from them"
        )
    return "\n".join(lines)
