"""The database's disk is full: whoever writes fails and says so, the others go on, and when there is space again nothing is
lost and nothing is there twice. A trigger raises SQLSTATE 53100, as PostgreSQL does when it cannot extend a file.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
from structlog.testing import capture_logs

from indexer.api.problems import of_exception
from indexer.store.database import Database
from tests.fake_node import FakeNode
from tests.following import created, eventually, issued, transferred
from tests.simulation.world import World

FULL = 'could not extend file "base/16384/24576": No space left on device'


@asynccontextmanager
async def full_disk(owner_dsn: str, table: str, operation: str = "INSERT") -> AsyncIterator[None]:
    """For the body, rows of one table cannot be written."""
    owner = await asyncpg.connect(owner_dsn)
    try:
        await owner.execute(
            f"""
            CREATE FUNCTION public.disk_is_full() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                RAISE EXCEPTION USING ERRCODE = '53100', MESSAGE = '{FULL}', HINT = 'Check free disk space.';
            END $$;
            CREATE TRIGGER disk_is_full BEFORE {operation} ON indexer.{table}
                FOR EACH STATEMENT EXECUTE FUNCTION public.disk_is_full();
            """
        )
        yield
        await owner.execute("DROP FUNCTION public.disk_is_full() CASCADE")
    finally:
        await owner.close()


async def failed(world: World, task: str) -> bool:
    """At least twice: the first failure, and one after the back-off."""
    return world.sample("loop_restarts_total", task=task, error="DiskFullError") >= 2


@pytest.mark.parametrize(
    ("task", "table", "operation"),
    [
        ("follow", "movement", "INSERT"),
        ("follow", "block", "INSERT"),
        ("follow", "coverage", "INSERT"),
        ("follow", "chain", "UPDATE"),
        ("follow", "touched_blocks", "INSERT"),
        ("settle", "claim", "INSERT"),
        ("settle", "outbox", "INSERT"),
        ("settle", "touched_operation", "DELETE"),
        ("number", "brand", "UPDATE"),
    ],
)
@pytest.mark.parametrize("socket", [True, False], ids=["socket", "polling"])
async def test_a_loop_that_cannot_write_says_so_and_loses_nothing(
    database: Database, owner_dsn: str, socket: bool, task: str, table: str, operation: str
) -> None:
    async with FakeNode() as node:
        world = World(database, node, socket=socket, confidence="included")
        node.mine([created(1)], 3)
        async with world.running():
            await world.caught_up()
            references = [await world.register(n) for n in range(3)]
            with capture_logs() as logs:
                async with full_disk(owner_dsn, table, operation):
                    for n in range(3):
                        node.mine([issued(n), transferred()])
                    await eventually(lambda: failed(world, task), what=f"{task} fails")
                    assert FULL in await world.problem(task, "DiskFullError")
                    # the process stands, and so do the loops that have nothing to write there
                    assert world.supervisor is not None
                    restarted = {name for name, state in world.supervisor.tasks.items() if state.restarts}
                    assert restarted - ({"history"} if task == "follow" else set()) == {
                        task
                    }  # history stores facts too
                for reference in references:
                    await world.reaches(reference, "ready")
            await world.intact()
            assert [await world.trace(reference) for reference in references] == [["ready"]] * 3
            assert len(await database.pool.fetch("SELECT * FROM indexer.claim")) == 3
        told = [entry for entry in logs if entry["event"] == "task failed"]
        assert told and all("No space left on device" in entry["error"] for entry in told)
        assert not any(entry["exc_info"] for entry in told), "a traceback says less than the server's own words"
        pauses = [entry["retry_seconds"] for entry in told if entry["task"] == task]
        assert pauses[:3] == [0.25, 0.5, 1.0][: len(pauses)]


async def test_history_that_cannot_be_written_is_not_covered(database: Database, owner_dsn: str) -> None:
    async with FakeNode() as node:
        world = World(database, node, confidence="included")
        node.mine([created(1), *[issued(n) for n in range(300)]], 20)  # enough for COPY
        node.set_tags(safe=18, finalized=18)
        async with full_disk(owner_dsn, "movement"):
            async with world.running():
                reference = await world.register(299)
                await eventually(lambda: failed(world, "history"))
                assert await database.pool.fetchval("SELECT count(*) FROM indexer.coverage WHERE emitter <> ''") == 0
                assert await database.pool.fetchval("SELECT count(*) FROM indexer.programme") == 0
        async with world.running():
            await world.reaches(reference, "ready")
            await world.intact()


async def test_leases_that_cannot_be_renewed_are_taken_again(database: Database, owner_dsn: str) -> None:
    """The lease itself is a row that is updated: every loop steps down, and comes back."""
    async with FakeNode() as node:
        world = World(database, node, confidence="included")
        node.mine([created(1)], 3)
        async with world.running(lease_seconds=1.0):
            await world.caught_up()
            reference = await world.register(1)
            async with full_disk(owner_dsn, "lease", "UPDATE"):
                await eventually(lambda: failed(world, "follow"))
                node.mine([issued(1)], 3)
            await world.reaches(reference, "ready")
            await world.caught_up()
            await world.intact()
            assert await world.trace(reference) == ["ready"]


async def test_a_brand_hears_that_it_may_try_again(database: Database, owner_dsn: str) -> None:
    """A registration on a full disk is refused for now, not for good, and nothing of it stays."""
    async with FakeNode() as node:
        world = World(database, node)
        async with world.running():
            await world.caught_up()
            async with full_disk(owner_dsn, "operation"):
                with pytest.raises(asyncpg.DiskFullError) as caught:
                    await world.register(1)
                answer = of_exception(caught.value, "r-1")
                assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            assert await database.pool.fetchval("SELECT count(*) FROM indexer.leg") == 0
            assert await world.state(await world.register(1)) == "pending"
