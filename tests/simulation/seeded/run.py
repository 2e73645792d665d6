"""One seed in a process of its own: `play` makes the database, runs the world, and returns the verdict."""

from __future__ import annotations

from tests.simulation.seeded import virtual_time  # isort: skip  - before the product

import asyncio
import logging
import os
import sys
import traceback
import warnings

import asyncpg
import structlog

from indexer.signals.webhooks import Dispatcher
from indexer.store import schema
from tests.simulation.seeded.loop import Stuck, VirtualLoop
from tests.simulation.seeded.postgres import Server
from tests.simulation.seeded.world import Verdict, World, figures

SCHEDULE = (1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0)  # three days of attempts, compressed


TEMPLATE = "template_seeds"


async def prepare(owner: str) -> None:
    """The database that every seed's is copied from."""
    await _execute(owner.format("postgres"), f"CREATE DATABASE {TEMPLATE}")
    await schema.migrate(owner.format(TEMPLATE))


async def _execute(url: str, *statements: str) -> None:
    conn = await asyncpg.connect(url)
    try:
        for statement in statements:
            await conn.execute(statement)
    finally:
        await conn.close()


def play(
    seed: int, owner: str, daemon: str, *, verbose: bool = False, lines: bool = False, made: type[World] = World
) -> Verdict:
    """`owner` and `daemon` are URLs with {} for the database's name. Leaves nothing behind but the process's memory."""
    name = f"seed_{os.getpid()}"
    asyncio.run(
        _execute(
            owner.format("postgres"),
            f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY FILE_COPY",
        )
    )
    virtual_time.seeded_identifiers(seed)
    warnings.simplefilter("ignore")
    if verbose:
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    else:
        logging.disable(logging.CRITICAL)
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    Dispatcher.__init__.__kwdefaults__["schedule"] = SCHEDULE
    loop = VirtualLoop(seed)
    if lines:
        loop.dump = []
    asyncio.set_event_loop(loop)
    loop.postgres = Server(loop, seed)
    world: list[World] = []

    async def whole() -> list[str]:
        await loop.postgres.open(owner.format(name))
        world.append(made(loop, seed, daemon.format(name)))
        return await world[0].run()

    try:
        wrong = loop.run_until_complete(whole())
    except Stuck as stuck:
        wrong = [f"stuck: {stuck}"]
    except Exception:
        wrong = [traceback.format_exc()]
    verdict = Verdict(seed, wrong, loop.trace.hexdigest(), tail=list(loop.dump or loop.tail))
    if world:
        verdict.struck, verdict.figures = world[0].struck, figures(world[0])
    return verdict


async def drop(pid: int, owner: str) -> None:
    """What `play` in the process `pid` has left."""
    await _execute(owner.format("postgres"), f"DROP DATABASE IF EXISTS seed_{pid} WITH (FORCE)")
