"""Two daemons on one database, and the leader freezes where it hurts: the other takes over, and nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.acceptance.world import LEASE_SECONDS, Daemon, World, until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]

# Events of one block. So few are stored one by one; of so many, with COPY, a part has reached the server when it stops.
FEW, MANY = 100, 2_000
# A lease lasts so long, is looked at by others every third of it (half as much again at the most), and then a daemon on a
# busy machine must still do what there is to do.
TAKEN_OVER = LEASE_SECONDS + LEASE_SECONDS / 2 + 12.0


async def leads(world: World, daemon: Daemon) -> str:
    """The daemon's holder id, once it holds every lease that there is."""
    holder = (await world.status(daemon))["process"]["holder"]

    async def holds_all() -> bool:
        holders = {str(found) for found in (await world.holders()).values()}
        return holders == {holder}

    await until(holds_all, lambda: f"{holder} leads; {daemon.last_words()}")
    return str(holder)


async def following(world: World) -> int:
    """The server's number of the session that follows the chain."""
    return int(
        await world.database.pool.fetchval(
            "SELECT sessions -> 0 ->> 'pid' FROM indexer.lease WHERE task = 'follow:84532'"
        )
    )


async def caught(world: World, session: int) -> str:
    """Where the frozen process's session of following stands, as the server sees it."""
    row = await world.database.pool.fetchrow(
        "SELECT a.state, coalesce(c.tuples_processed, 0) AS copied FROM pg_stat_activity a"
        " LEFT JOIN pg_stat_progress_copy c USING (pid) WHERE a.pid = $1",
        session,
    )
    if row is None:
        return "gone"
    return "copy" if row["copied"] else "open" if row["state"] == "idle in transaction" else str(row["state"])


@pytest.mark.parametrize("where", ["idle", "open", "copy", "commit"])
async def test_a_frozen_leader_is_replaced_and_steps_down(world: World, tmp_path: Path, where: str) -> None:
    trigger = tmp_path / "freeze"
    frozen = await world.start(
        program=(sys.executable, str(Path(__file__).with_name("frozen_daemon.py")), where, str(trigger))
    )
    await frozen.says("listening")
    holder = await leads(world, frozen)
    session = await following(world)
    other = await world.start()
    await other.says("listening")
    await world.settles("before")
    large = world.action(250)
    await world.register("large", large.action)
    await world.submit(large)

    # events are under way when it stops: whoever leads then must store them, once
    trigger.touch()
    signed = world.action(60)
    await world.register("meanwhile", signed.action)
    await asyncio.gather(world.submit(signed), world.ledger.burst(MANY if where == "copy" else FEW))
    await frozen.stopped()
    at = time.monotonic()
    # "gone": on a machine so slow that the server, or the other daemon, was here first
    assert await caught(world, session) in ("open" if where == "commit" else where, "gone")

    async def taken_over() -> bool:
        return holder not in {str(found) for found in (await world.holders()).values()}

    await until(taken_over, lambda: f"the other leads; {other.last_words()}")
    new = await leads(world, other)
    assert time.monotonic() - at < TAKEN_OVER
    await world.shop.hears("meanwhile", "ready")
    await world.settles("after")

    frozen.send(signal.SIGCONT)
    await frozen.says("stepped down", task="follow:84532")
    await world.settles("thawed")
    await world.ledger.burst(FEW)

    async def stepped_down() -> bool:
        tasks = (await world.status(frozen))["process"]["tasks"]
        return {task["state"] for task in tasks.values()} == {"waiting"}

    await until(stepped_down, lambda: f"every task of the first waits; {frozen.last_words()}")
    assert {str(found) for found in (await world.holders()).values()} == {new}

    await world.judge({name: "ready" for name in ("before", "meanwhile", "after", "thawed", "large")})
    assert await frozen.stop() == 0
    assert await other.stop() == 0
