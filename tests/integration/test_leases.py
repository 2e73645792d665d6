"""Leases on a real PostgreSQL, with a holder in another process that is frozen where it hurts most.

Run as a program, this file is that holder: `test_leases.py <url> <where to stand still>`.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import asyncpg
import pytest
from asyncpg.transaction import Transaction

from indexer.store import schema
from indexer.store.database import Database
from indexer.store.embedded import EmbeddedPostgres
from indexer.store.leases import Lease, LeaseLost, Leases, SessionsWillNotEnd
from indexer.supervision import Supervisor
from indexer.telemetry import Metrics

Start = Callable[[str], Awaitable[asyncio.subprocess.Process]]
TASK = "follow:8453"
TTL = 1.0


async def write(connection: asyncpg.Connection, chain_id: int) -> None:
    """A stand-in for facts: a row per commit, told apart by its chain."""
    await connection.execute(
        "INSERT INTO indexer.touched_blocks (chain_id, from_block, to_block) VALUES ($1, 1, 1)", chain_id
    )


async def written(database: Database) -> list[int]:
    rows = await database.pool.fetch("SELECT chain_id FROM indexer.touched_blocks ORDER BY id")
    return [row["chain_id"] for row in rows]


async def sessions_of(database: Database, task: str) -> list[int]:
    rows = await database.pool.fetch(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1",
        f"indexer:{task}",
    )
    return [row["pid"] for row in rows]


async def taken_over(database: Database) -> Lease:
    """The lease, as soon as the holder's has lapsed; long enough not to need renewing."""
    async with asyncio.timeout(60):
        while (lease := await Leases(database, ttl=60).acquire(TASK)) is None:
            await asyncio.sleep(0.05)
    return lease


# --------------------------------------------------------------------------- the holder in another process


def stand_still() -> None:
    """Say so, and block the whole process until a line comes: what a freeze looks like from inside."""
    print("still", flush=True)
    sys.stdin.readline()


async def _rows_without_end() -> AsyncIterator[tuple[int, int, int]]:
    for block in range(5_000):
        yield 3, block, block
    stand_still()
    yield 3, 5_000, 5_000


async def _hold_and_stand_still(lease: Lease, where: str) -> None:
    async with lease.transaction() as connection:
        await write(connection, 1)
    if where == "idle":
        stand_still()
    async with lease.transaction() as connection:
        await write(connection, 2)
        if where == "open":
            stand_still()
        if where == "copy":
            await connection.copy_records_to_table(
                "touched_blocks",
                schema_name="indexer",
                columns=["chain_id", "from_block", "to_block"],
                records=_rows_without_end(),
            )
        if where == "commit":
            commit = Transaction.commit

            async def commit_late(transaction: Transaction) -> None:
                stand_still()  # checked, and not yet committed
                await commit(transaction)

            Transaction.commit = commit_late
    print("committed", flush=True)


async def _be_the_holder(url: str, where: str) -> None:
    async with await Database.connect(url) as database:
        try:
            async with Leases(database, ttl=TTL).hold(TASK) as lease:
                await _hold_and_stand_still(lease, where)
        except LeaseLost:
            print("lost", flush=True)


@pytest.fixture
async def other(dsn: str) -> AsyncIterator[Start]:
    """Starts holders in processes of their own, and leaves none behind."""
    started: list[asyncio.subprocess.Process] = []

    async def start(where: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, dsn, where,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def said(process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(60):
        return (await process.stdout.readline()).decode().strip()


@pytest.mark.parametrize("where", ["idle", "open", "copy", "commit"])
async def test_a_frozen_holder_is_replaced_and_steps_down_when_it_thaws(
    other: Start, database: Database, where: str
) -> None:
    process = await other(where)
    assert await said(process) == "still"
    os.kill(process.pid, signal.SIGSTOP)
    before = await database.pool.fetchval("SELECT epoch FROM indexer.lease WHERE task = $1", TASK)

    lease = await taken_over(database)
    assert lease.epoch == before + 1
    assert await sessions_of(database, TASK) == [lease.connection.get_server_pid()]  # its locks fell with its session
    async with lease.transaction() as connection:
        await write(connection, 9)

    os.kill(process.pid, signal.SIGCONT)
    process.stdin.write(b"go\n")
    assert await said(process) == "lost"
    async with lease.transaction() as connection:  # and the one that thawed took nothing from us
        await write(connection, 9)
    await lease.connection.close()
    assert await written(database) == [1, 9, 9]


async def test_the_lease_of_a_killed_holder_is_taken_over_once_it_lapses(other: Start, database: Database) -> None:
    process = await other("open")
    assert await said(process) == "still"
    process.kill()
    async with asyncio.timeout(60), Leases(database, ttl=TTL).hold(TASK) as lease:
        async with lease.transaction() as connection:
            await write(connection, 9)
    assert await written(database) == [1, 9]


# --------------------------------------------------------------------------- within one process


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


@asynccontextmanager
async def row_locked(dsn: str) -> AsyncIterator[None]:
    """Someone sits on the row of the lease: renewals hang."""
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            await connection.fetch("SELECT FROM indexer.lease WHERE task = $1 FOR UPDATE", TASK)
            yield
    finally:
        await connection.close()


async def test_a_held_lease_stays_held_beyond_its_ttl(database: Database) -> None:
    async with Leases(database, ttl=1.5).hold(TASK) as lease:
        deadline = time.monotonic() + 2.0 * 1.5
        rival = Leases(database, ttl=1.5)
        while time.monotonic() < deadline:
            assert await rival.acquire(TASK) is None
            await asyncio.sleep(TTL / 10)
        async with lease.transaction() as connection:
            await write(connection, 1)
    assert await written(database) == [1]


async def test_a_released_lease_is_free_at_once_under_a_new_epoch(database: Database) -> None:
    async with Leases(database, ttl=60).hold(TASK) as first:
        pass
    with at_most(5):
        async with Leases(database, ttl=60).hold(TASK) as second:
            assert second.epoch == first.epoch + 1


async def test_a_lease_says_for_how_long_nobody_had_held_it(database: Database) -> None:
    """So that what goes on outside, where no fence reaches, can wait for what the holder before left under way."""

    async def since(column: str) -> None:
        await database.pool.execute(f"UPDATE indexer.lease SET {column} = {column} - interval '70 seconds'")

    leases = Leases(database, ttl=60)
    async with leases.hold(TASK) as lease:
        assert lease.idle is None
        lease.check()
    async with leases.hold(TASK) as lease:
        assert lease.idle is not None and lease.idle < 60
    await since("released_at")
    lease = await leases.acquire(TASK)  # and nobody renews it
    assert lease is not None and lease.idle is not None and 70 <= lease.idle < 130
    await since("until")
    other = await Leases(database, ttl=60).acquire(TASK)
    assert other is not None and other.idle is not None and 10 <= other.idle < 70
    await other.connection.close()
    lease = Lease(TASK, 1, leases.holder, other.connection, asyncio.get_running_loop().time() - 41, 40, None)
    with pytest.raises(LeaseLost, match="renewed in time"):  # by our own clock: nothing may be done in its name
        lease.check()


async def test_cancelling_the_holder_releases_the_lease(database: Database) -> None:
    held = asyncio.Event()

    async def hold() -> None:
        async with Leases(database, ttl=60).hold(TASK) as lease:
            async with lease.transaction() as connection:
                await write(connection, 1)
                held.set()
                await asyncio.sleep(3600)

    task = asyncio.create_task(hold())
    await held.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    lease = await Leases(database, ttl=60).acquire(TASK)
    assert lease is not None
    await lease.connection.close()
    assert await written(database) == []


async def test_waiting_for_a_lease_can_be_cancelled(database: Database) -> None:
    async with Leases(database, ttl=60).hold(TASK):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3), Leases(database, ttl=0.3).hold(TASK):
                raise AssertionError("two holders")


async def test_of_two_that_see_it_lapse_one_wins(database: Database) -> None:
    attempts = await asyncio.gather(*(Leases(database, ttl=60).acquire(TASK) for _ in range(8)))
    winners = [lease for lease in attempts if lease is not None]
    assert len(winners) == 1
    async with winners[0].transaction() as connection:
        await write(connection, 1)  # and none of the others has ended its session
    await winners[0].connection.close()


async def test_the_fence_alone_refuses_a_commit_under_an_old_epoch(database: Database) -> None:
    lease = await Leases(database, ttl=60).acquire(TASK)
    assert lease is not None
    with pytest.raises(LeaseLost, match="taken over"):
        async with lease.transaction() as connection:
            await write(connection, 1)
            await database.pool.execute("UPDATE indexer.lease SET epoch = epoch + 1")
    with pytest.raises(LeaseLost):
        async with lease.transaction():
            raise AssertionError("a lost lease began a transaction")
    assert await written(database) == []
    await lease.connection.close()


async def test_a_take_over_waits_for_the_commit_that_passed_the_fence(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = await Leases(database, ttl=60).acquire(TASK)
    assert lease is not None
    commit = Transaction.commit
    tried: list[str] = []

    async def commit_late(transaction: Transaction) -> None:
        try:
            await database.pool.execute("UPDATE indexer.lease SET epoch = epoch + 1", timeout=0.3)
        except TimeoutError:
            tried.append("waited")
        await commit(transaction)

    monkeypatch.setattr(Transaction, "commit", commit_late)
    async with lease.transaction() as connection:
        await write(connection, 1)
    assert tried == ["waited"]
    assert await written(database) == [1]
    await lease.connection.close()


async def test_a_lost_session_cancels_the_body(database: Database) -> None:
    with at_most(5), pytest.raises(LeaseLost, match="session ended"):
        async with Leases(database, ttl=60).hold(TASK) as lease:
            await database.pool.execute("SELECT pg_terminate_backend($1)", lease.connection.get_server_pid())
            await asyncio.sleep(3600)


async def test_a_session_lost_inside_a_transaction_is_a_lost_lease(database: Database) -> None:
    with at_most(5), pytest.raises(LeaseLost, match="session ended"):
        async with Leases(database, ttl=60).hold(TASK) as lease:
            async with lease.transaction() as connection:
                await write(connection, 1)
                await database.pool.execute("SELECT pg_terminate_backend($1)", connection.get_server_pid())
                await connection.fetchval("SELECT 1")
    assert await written(database) == []


async def test_a_holder_that_cannot_renew_lets_go_before_another_may_take_over(database: Database, dsn: str) -> None:
    with at_most(3), pytest.raises(LeaseLost, match="renewed"):
        async with Leases(database, ttl=3).hold(TASK):
            async with row_locked(dsn):
                await asyncio.sleep(3600)


async def test_a_holder_learns_that_its_lease_was_taken(database: Database) -> None:
    with at_most(2), pytest.raises(LeaseLost, match="taken over"):
        async with Leases(database, ttl=2).hold(TASK):
            await database.pool.execute("UPDATE indexer.lease SET epoch = epoch + 1")
            await asyncio.sleep(3600)


async def test_the_bodys_own_error_comes_through_and_nothing_is_stored(database: Database) -> None:
    async with Leases(database, ttl=60).hold(TASK) as lease:
        with pytest.raises(ZeroDivisionError):
            async with lease.transaction() as connection:
                await write(connection, 1)
                raise ZeroDivisionError
        async with lease.transaction() as connection:  # the lease is none the worse for it
            await write(connection, 2)
    assert await written(database) == [2]


async def test_transactions_of_one_lease_take_turns_and_do_not_nest(database: Database) -> None:
    async with Leases(database, ttl=60).hold(TASK) as lease:

        async def one(number: int) -> None:
            async with lease.transaction() as connection:
                await write(connection, number)

        await asyncio.gather(*(one(number) for number in range(5)))
        with pytest.raises(RuntimeError, match="inside another"):
            async with lease.transaction():
                async with lease.transaction():
                    raise AssertionError("nested")
    assert sorted(await written(database)) == [0, 1, 2, 3, 4]


async def test_a_cancelled_statement_leaves_the_lease_usable(database: Database) -> None:
    async with Leases(database, ttl=60).hold(TASK) as lease:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), lease.transaction() as connection:
                await connection.execute("SELECT pg_sleep(60)")
        async with lease.transaction() as connection:
            await write(connection, 1)
    assert await written(database) == [1]


async def test_a_later_backend_with_the_recorded_number_is_left_alone(database: Database, dsn: str) -> None:
    """In a container the numbers come round soon."""
    innocent = await asyncpg.connect(dsn)
    try:
        await database.pool.execute(
            "INSERT INTO indexer.lease (task, sessions) VALUES ($1, $2)",
            TASK,
            [{"pid": innocent.get_server_pid(), "started": "2026-01-01T00:00:00+00:00", "role": "indexer"}],
        )
        async with Leases(database, ttl=TTL).hold(TASK):
            assert await innocent.fetchval("SELECT 1") == 1
    finally:
        await innocent.close()


async def test_a_holder_under_another_role_is_named_not_overrun(database: Database, owner_dsn: str) -> None:
    foreign = await asyncpg.connect(owner_dsn)
    try:
        role = await foreign.fetchval("SELECT current_user")
        if await foreign.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user"):
            pytest.skip("a superuser's sessions are seen like all others only by its equals")
        await database.pool.execute(
            "INSERT INTO indexer.lease (task, sessions) VALUES ($1, $2)",
            TASK,
            [{"pid": foreign.get_server_pid(), "started": "2026-01-01T00:00:00+00:00", "role": role}],
        )
        with pytest.raises(SessionsWillNotEnd, match="another database role"):
            await Leases(database, ttl=TTL).acquire(TASK)
    finally:
        await foreign.close()


# --------------------------------------------------------------------------- a database that went away


async def test_an_epoch_of_our_own_that_we_let_go_is_not_waited_for(database: Database) -> None:
    """The row says that it is ours for another hour; the sessions that we wrote with may even live on."""
    leases = Leases(database, ttl=3600)
    async with leases.hold(TASK) as first:
        pass
    ghost = await database.session(f"indexer:{TASK}")  # of ours, on the far side of a network that broke
    await ghost.execute("BEGIN")
    await write(ghost, 1)
    await database.pool.execute(
        """
        UPDATE indexer.lease SET holder = $2, until = clock_timestamp() + interval '1 hour', sessions = (
            SELECT jsonb_build_array(jsonb_build_object('pid', pid, 'started', backend_start, 'role', usename))
            FROM pg_stat_activity WHERE pid = $3) WHERE task = $1
        """,
        TASK,
        leases.holder,
        ghost.get_server_pid(),
    )
    with at_most(10):
        second = await leases.acquire(TASK)
    assert second is not None and second.epoch == first.epoch + 1
    assert await sessions_of(database, TASK) == [second.connection.get_server_pid()]
    assert await leases.acquire(TASK) is None  # held here now: nobody of us takes it from us
    assert await Leases(database, ttl=3600).acquire(TASK) is None
    async with second.transaction() as connection:
        await write(connection, 2)
    await second.connection.close()
    ghost.terminate()
    assert await written(database) == [2]


async def test_a_task_runs_again_as_soon_as_the_database_is_back() -> None:
    """Under a lease of an hour: nothing is left to lapse. Two tasks, of which one holds a transaction open."""
    state = Path(tempfile.mkdtemp(prefix="indexer-test-"))
    state.chmod(0o711)
    try:
        async with EmbeddedPostgres(state, durable=False) as postgres:
            await schema.migrate(postgres.dsn("indexer_owner"))
            url = postgres.dsn("indexer")
            async with await Database.connect(url, pool_size=4) as database:
                begun: dict[str, list[int]] = {"quiet": [], "busy": []}

                async def body(lease: Lease) -> None:
                    begun[lease.task].append(lease.epoch)
                    async with lease.transaction() as connection:
                        if lease.task == "busy":
                            await connection.fetchval("SELECT pg_sleep(3600)")
                    await asyncio.sleep(3600)

                async def epochs(count: int) -> None:
                    async with asyncio.timeout(60):
                        while any(len(seen) < count for seen in begun.values()):
                            await asyncio.sleep(0.02)

                supervisor = Supervisor(Leases(database, ttl=3600), Metrics(), random.Random(1))
                loops = [asyncio.create_task(supervisor.keep(task, body)) for task in begun]
                try:
                    await epochs(1)
                    await postgres.stop()
                    async with EmbeddedPostgres(state, durable=False):
                        await epochs(2)
                        assert all(first < second for first, second in begun.values())
                finally:
                    for task in loops:
                        task.cancel()
                    await asyncio.gather(*loops, return_exceptions=True)
    finally:
        shutil.rmtree(state, ignore_errors=True)


if __name__ == "__main__":
    asyncio.run(_be_the_holder(sys.argv[1], sys.argv[2]))
