"""A pass of the reconciler reads in several statements, and facts are committed between them: what it concludes must have
been true at one instant all the same. Here a lock stops the pass at the worst moment, and the other commit comes in.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from indexer.settlement.reconciler import reconcile
from tests.following import eventually
from tests.world import BASE_MS, World, hexa


@asynccontextmanager
async def stopped_at(world: World, dsn: str, table: str) -> AsyncIterator[World]:
    """A pass of the reconciler, stopped at its first look at the table for as long as the body runs; then it ends.

    Yields the same world over a connection of its own: the chain's side.
    """
    lock, other = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    try:
        await lock.execute(f"BEGIN; LOCK TABLE indexer.{table} IN ACCESS EXCLUSIVE MODE")

        async def a_pass() -> None:
            async with world.conn.transaction():
                await reconcile(world.conn, world.rules, {})

        running = asyncio.create_task(a_pass())

        async def waits() -> bool:
            assert not running.done(), running
            return bool(await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = $1", pid))

        pid = world.conn.get_server_pid()
        await eventually(waits)
        yield World(other, world.rules)
        await lock.execute("COMMIT")
        await running
    finally:
        await lock.close()
        await other.close()


async def test_evidence_that_comes_with_its_coverage_in_the_middle_of_a_pass_is_not_overlooked(dsn: str) -> None:
    """Event and coverage are one commit. A pass that loaded the events before it must not read the coverage after it."""
    async with World.at(dsn) as world:
        nonce = world.nonce()
        leg = world.leg(nonce=hexa(nonce), deadline=str(BASE_MS // 1000 + 10))
        operation = await world.register(leg)
        await world.heads(head=100, safe=90, finalized=80)
        async with stopped_at(world, dsn, "emitter") as chain:
            async with chain.conn.transaction():
                await chain.event(20, leg)
                await chain.cover(0, 100)
        await world.settle()
        assert "expired" not in await world.trace(operation)
        assert await world.state(operation) == "ready"


async def test_heads_of_before_a_reorganisation_say_nothing_of_a_block_after_it(dsn: str) -> None:
    """The action is mined again, at a height that was safe on the branch that lost: included, and no more."""
    async with World.at(dsn) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        await world.heads(head=100, safe=90, finalized=50)
        async with stopped_at(world, dsn, "alarm") as chain:
            async with chain.conn.transaction():
                await chain.orphan(60)
                await chain.event(80, leg, fork="b")
                await chain.heads(head=81)
        assert await world.state(operation) in ("pending", "confirming")
        await world.settle()
        assert await world.state(operation) == "confirming"
        assert "ready" not in await world.trace(operation)
