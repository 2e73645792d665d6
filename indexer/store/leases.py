"""Leases: one process at a time does a task, and what it writes it writes as the holder or not at all.

Promises, by the database's clock alone: an epoch has one holder; a transaction of `Lease.transaction` commits only while
no later epoch has begun; a take-over ends the sessions of the holder before, since a frozen process may hold locks for
ever (the design, section 3). What the tasks do, and when they start, is the daemon's business.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import ClassVar

import asyncpg

from indexer.store.database import DISCONNECTED, Database

# Ends the sessions that the holder of the seen epoch recorded, and says which are left. `started` tells a backend from a
# later one with the same number; it is hidden from other roles. The epoch keeps us off a winner that came in between.
_END_SESSIONS = """
    SELECT a.pid, a.backend_start IS NULL AS hidden,
           CASE WHEN a.backend_start IS NOT NULL THEN pg_terminate_backend(a.pid) END
      FROM indexer.lease l
     CROSS JOIN LATERAL jsonb_to_recordset(l.sessions) AS s(pid int, started timestamptz, role text)
      JOIN pg_stat_activity a ON a.pid = s.pid AND a.usename = s.role
     WHERE l.task = $1 AND l.epoch = $2 AND (a.backend_start = s.started OR a.backend_start IS NULL)
"""

# Directly before COMMIT. FOR SHARE waits for a take-over under way and holds off the next one until we have committed;
# a plain read would see the old epoch and let us commit beside the new one. Primary key.
_FENCE = "SELECT 1 FROM indexer.lease WHERE task = $1 AND epoch = $2 AND holder = $3 FOR SHARE"

_RENEW = """
    UPDATE indexer.lease SET until = clock_timestamp() + $4 * interval '1 second'
     WHERE task = $1 AND epoch = $2 AND holder = $3 AND until > clock_timestamp()
    RETURNING epoch
"""

# Only on the epoch that was seen: of two that saw it lapse, one wins. `holder = $3`: an epoch of our own that nobody here holds.
_TAKE = """
    UPDATE indexer.lease
       SET holder = $3, epoch = epoch + 1, until = clock_timestamp() + $4 * interval '1 second', released_at = NULL,
           sessions = (SELECT jsonb_build_array(jsonb_build_object('pid', pid, 'started', backend_start, 'role', usename))
                         FROM pg_stat_activity WHERE pid = pg_backend_pid())
     WHERE task = $1 AND epoch = $2 AND (holder IS NULL OR holder = $3 OR until <= clock_timestamp())
    RETURNING epoch
"""

_RELEASE = """
    UPDATE indexer.lease SET holder = NULL, until = NULL, released_at = clock_timestamp()
     WHERE task = $1 AND epoch = $2 AND holder = $3
"""

# Primary key. `idle`: a holder that is gone may have worked until the lease lapsed; of one that a restoration voided nothing is known.
_SEEN = """
    SELECT epoch, holder, holder IS NOT NULL AND until > clock_timestamp() AS held,
           CASE WHEN epoch > 0 THEN greatest(
               0, coalesce(extract(epoch FROM clock_timestamp() - coalesce(released_at, until)), 0))::float8 END AS idle
      FROM indexer.lease WHERE task = $1
"""


class LeaseLost(Exception):
    """The task is not ours any more: step down, and begin again from what is stored.

    Raised at COMMIT it leaves open whether the transaction was stored: only what is stored tells.
    """

    def __init__(self, task: str, epoch: int, why: str) -> None:
        super().__init__(f"lost the lease of {task} (epoch {epoch}): {why}")
        self.task, self.epoch, self.why = task, epoch, why


class SessionsWillNotEnd(Exception):
    """Sessions of the holder before are still there, or are not ours to see: `pids`."""

    explains_itself: ClassVar[bool] = True

    def __init__(self, task: str, pids: list[int], why: str) -> None:
        super().__init__(f"cannot take over the lease of {task}: {why} (backends {', '.join(map(str, pids))})")
        self.task, self.pids = task, pids


class Lease:
    """A task held: who, since which epoch, and the session that writes for it.

    `margin`: seconds after `asked` for which it is ours for certain. `idle`: seconds for which nobody had held it before, at least;
    None where nobody ever had.
    """

    def __init__(
        self,
        task: str,
        epoch: int,
        holder: uuid.UUID,
        connection: asyncpg.Connection,
        asked: float,
        margin: float,
        idle: float | None,
    ) -> None:
        self.task = task
        self.epoch = epoch
        self.holder = holder
        self.connection = connection
        self.asked = asked  # the loop's time before the database read its clock: our margin is never the longer one
        self.margin, self.idle = margin, idle
        self._lost: str | None = None
        self._busy = asyncio.Lock()
        self._user: asyncio.Task[object] | None = None

    @property
    def lost(self) -> bool:
        return self._lost is not None

    def lose(self, why: str) -> LeaseLost:
        """Mark as lost; the first reason stays. Returns the error to raise."""
        self._lost = self._lost or why
        return LeaseLost(self.task, self.epoch, self._lost)

    def check(self) -> None:
        """For what no fence guards, directly before it. Raises LeaseLost where another may have taken over while this process slept."""
        if self._lost is None and asyncio.get_running_loop().time() > self.asked + self.margin:
            self.lose("it could not be renewed in time")
        if self._lost is not None:
            raise self.lose(self._lost)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[asyncpg.Connection]:
        """BEGIN, the body, the fence, COMMIT. One at a time per lease: others wait; not to be nested.

        Nothing on the network belongs inside. Raises LeaseLost, after which nothing of the body is stored, save where the
        connection broke during COMMIT itself.
        """
        if self._user is asyncio.current_task():
            raise RuntimeError(f"a transaction of the lease of {self.task} inside another")
        async with self._busy:
            self._user = asyncio.current_task()
            try:
                async with self._fenced() as connection:
                    yield connection
            finally:
                self._user = None

    @asynccontextmanager
    async def _fenced(self) -> AsyncIterator[asyncpg.Connection]:
        if self._lost is not None:
            raise self.lose(self._lost)
        connection = self.connection
        try:
            transaction = connection.transaction(isolation="read_committed")  # the fence must see the latest epoch
            async with self._ended_when_interrupted():
                await transaction.start()
            try:
                yield connection
                if await connection.fetchval(_FENCE, self.task, self.epoch, self.holder) is None:
                    raise self.lose("another holder has taken over")
            except BaseException:
                if not connection.is_closed():
                    # what went wrong is the news, not that the rollback did too
                    with suppress(*DISCONNECTED):
                        async with self._ended_when_interrupted():
                            await transaction.rollback()
                raise
            async with self._ended_when_interrupted():
                await transaction.commit()
        except DISCONNECTED as error:
            if not connection.is_closed():
                raise
            raise self.lose(f"its session ended ({type(error).__name__})") from error

    @asynccontextmanager
    async def _ended_when_interrupted(self) -> AsyncIterator[None]:
        """A BEGIN, ROLLBACK or COMMIT that was cancelled or timed out leaves a session in no known state: end it."""
        try:
            yield
        except (asyncio.CancelledError, TimeoutError):
            self.lose("its session was interrupted at the edge of a transaction")
            self.connection.terminate()
            raise


class Leases:
    """The leases of one process, all under one holder id.

    `ttl` in seconds: how long after the last renewal another may take over. Renewed every third of it; after two thirds
    without a renewal, by our own monotonic clock, we let go.
    """

    def __init__(self, database: Database, *, ttl: float = 15.0, rng: random.Random | None = None) -> None:
        self.holder = uuid.uuid4()
        self.ttl = ttl
        self._database = database
        self._rng = rng or random.Random()  # noqa: S311 - spreads attempts, guards nothing
        # By task, the last epoch that was ours and that nobody here holds any more, for all that the row may say: the database
        # was away when we gave it back, or answered that it was ours into a connection that broke.
        self._let_go: dict[str, int] = {}

    async def acquire(self, task: str) -> Lease | None:
        """One attempt: the lease, or None while another holds it. It is not renewed: `hold` does that.

        An epoch of our own that we have let go is not waited for: its sessions are ended, as any holder's are.
        Raises SessionsWillNotEnd, DatabaseUnavailable, asyncpg's errors.
        """
        pool = self._database.pool
        row = await pool.fetchrow(_SEEN, task)
        if row is None:
            await pool.execute("INSERT INTO indexer.lease (task) VALUES ($1) ON CONFLICT DO NOTHING", task)
            return await self.acquire(task)
        if row["held"] and not (row["holder"] == self.holder and row["epoch"] == self._let_go.get(task)):
            return None
        connection = await self._database.session(
            # whoever may connect may read it: not the brands that a poller's task is named for
            f"indexer:{':'.join(task.split(':')[:2])}",
            # a frozen holder's locks fall before its lease does
            settings={"idle_in_transaction_session_timeout": f"{int(self.ttl * 400)}ms"},
        )
        taking = False
        try:
            await self._end_sessions(connection, task, row["epoch"])
            asked = asyncio.get_running_loop().time()
            taking = True
            epoch = await connection.fetchval(_TAKE, task, row["epoch"], self.holder, self.ttl)
        except BaseException:
            if taking:
                self._let_go[task] = row["epoch"] + 1  # ours, if it was stored
            connection.terminate()
            raise
        if epoch is None:
            await connection.close()
            return None
        return Lease(task, epoch, self.holder, connection, asked, self.ttl * 2 / 3, row["idle"])

    async def _end_sessions(self, connection: asyncpg.Connection, task: str, epoch: int) -> None:
        """End what the holder before wrote with, and wait until it is gone: only then may the epoch rise."""
        deadline = asyncio.get_running_loop().time() + self.ttl
        while rows := await connection.fetch(_END_SESSIONS, task, epoch):
            pids = [row["pid"] for row in rows]
            if any(row["hidden"] for row in rows):
                raise SessionsWillNotEnd(
                    task, pids, "they belong to another database role; all replicas must use the same"
                )
            if asyncio.get_running_loop().time() > deadline:
                raise SessionsWillNotEnd(task, pids, "sessions of the holder before do not end")
            await asyncio.sleep(min(self.ttl / 100, 0.05))

    @asynccontextmanager
    async def hold(self, task: str) -> AsyncIterator[Lease]:
        """Wait until the lease is ours, keep it for the body, release it.

        The body is cancelled and LeaseLost raised when the lease is lost. Raises what `acquire` raises.
        """
        while (lease := await self.acquire(task)) is None:  # noqa: ASYNC110 - what we wait for happens in the database
            # a third of the ttl, spread, so that replicas do not ask in step
            await asyncio.sleep(self.ttl / 3 * self._rng.uniform(0.5, 1.5))
        try:
            async with asyncio.timeout_at(lease.asked + lease.margin) as scope:
                async with self._renewing(lease, scope):
                    yield lease
        except TimeoutError as error:
            if scope.expired():
                raise lease.lose("it could not be renewed in time") from error
            raise
        finally:
            self._let_go[task] = lease.epoch
            await self._release(lease)

    @asynccontextmanager
    async def _renewing(self, lease: Lease, scope: asyncio.Timeout) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def ended(_connection: object) -> None:
            lease.lose("its session ended")
            _move(scope, loop.time())

        lease.connection.add_termination_listener(ended)
        renewal = asyncio.create_task(self._renew(lease, scope), name=f"renew {lease.task}")
        try:
            yield
        finally:
            lease.connection.remove_termination_listener(ended)
            renewal.cancel()
            await asyncio.gather(renewal, return_exceptions=True)

    async def _renew(self, lease: Lease, scope: asyncio.Timeout) -> None:
        """Every third of the ttl, from the pool: the lease's own session may be busy for longer. `scope` is its margin."""
        loop = asyncio.get_running_loop()
        pause = self.ttl / 3
        while True:
            await asyncio.sleep(pause)
            asked = loop.time()
            try:
                async with asyncio.timeout(self.ttl / 3):
                    renewed = await self._database.pool.fetchval(
                        _RENEW, lease.task, lease.epoch, lease.holder, self.ttl
                    )
            except (TimeoutError, asyncpg.PostgresError, *DISCONNECTED):
                pause = self.ttl / 20
                continue
            if renewed is None:
                lease.lose("another holder may have taken over")
                _move(scope, loop.time())
                return
            lease.asked = asked
            _move(scope, asked + lease.margin)
            pause = self.ttl / 3

    async def _release(self, lease: Lease) -> None:
        """Close the session, then say that the task is free; where that fails, it lapses."""
        try:
            async with asyncio.timeout(min(self.ttl / 3, 5.0)):
                await lease.connection.close()
                await self._database.pool.execute(_RELEASE, lease.task, lease.epoch, lease.holder)
        except (TimeoutError, asyncpg.PostgresError, *DISCONNECTED):
            pass
        finally:
            lease.connection.terminate()


def _move(scope: asyncio.Timeout, when: float) -> None:
    """When the body shall be cancelled; too late when it is being cancelled or has ended."""
    with suppress(RuntimeError):
        scope.reschedule(when)
