"""Keeps loops running: each under its lease, restarted with back-off when it fails, while the others go on.

A loop that fails says so once per failure, in the log, in a counter and in `/v1/status`. Loops that share something are a
unit: it begins and ends as a whole, and a reload leaves a unit alone whose settings are the same. systemd hears that the
process is ready, reloading, alive and stopping. What the loops do is theirs.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import asyncpg
import structlog

from indexer.store.database import DatabaseUnavailable
from indexer.store.leases import Lease, LeaseLost, Leases
from indexer.telemetry import Metrics

FIRST_PAUSE: Final = 0.25  # seconds
LONGEST_PAUSE: Final = 30.0
WITHOUT_DATABASE: Final = 1.0  # the longest pause while PostgreSQL is away: its return shall not be waited out
GOOD_RUN: Final = 60.0  # a loop that ran so long has recovered: its next failure is a first one

# PostgreSQL is stopping, starting, or not there.
AWAY: Final = (
    DatabaseUnavailable,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.PostgresConnectionError,
)

log = structlog.get_logger(__name__)

Body = Callable[[Lease], Awaitable[None]]


@dataclass(slots=True)
class TaskState:
    """What `/v1/status` shows of one loop of this process."""

    state: str = "waiting"  # waiting (for the lease) | running | failed
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    restarts: int = 0
    failure: str | None = None  # the last one

    def become(self, state: str) -> None:
        self.state, self.since = state, datetime.now(UTC)

    @property
    def problem(self) -> str | None:
        """The last failure, until the loop has gone on well for a while: one that fails again and again looks fine between."""
        recovered = self.state != "failed" and (datetime.now(UTC) - self.since).total_seconds() > GOOD_RUN
        return None if recovered else self.failure


class Supervisor:
    """Restarts what fails. One per process."""

    def __init__(self, leases: Leases, metrics: Metrics, rng: random.Random) -> None:
        self.tasks: dict[str, TaskState] = {}
        self._leases, self._metrics, self._rng = leases, metrics, rng

    async def keep(self, task: str, body: Body) -> None:
        """Holds the lease and runs the body, for ever; ends only by cancellation."""
        state = self.tasks.setdefault(task, TaskState())
        pause = FIRST_PAUSE
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            try:
                state.become("waiting")
                async with self._leases.hold(task) as lease:
                    started = loop.time()
                    state.become("running")
                    self._metrics.leases.labels(task).set(1)
                    log.info("task begins", task=task, epoch=lease.epoch)
                    await body(lease)
                state.failure = None
            except LeaseLost as error:
                state.become("waiting")
                self._metrics.leases_lost.labels(task).inc()
                log.warning("stepped down", task=task, reason=error.why)
            except Exception as error:
                state.become("failed")
                state.failure = f"{type(error).__name__}: {error}"
                self._metrics.loop_restarts.labels(task, type(error).__name__).inc()
                if isinstance(error, AWAY) and not getattr(error, "lasting", False):
                    pause = min(pause, WITHOUT_DATABASE)
                # a full disk, too many connections: the server's own words say it, and no line of ours is to blame
                known = getattr(error, "explains_itself", False) or isinstance(
                    error, (OSError, TimeoutError, asyncpg.InsufficientResourcesError, *AWAY)
                )
                log.error(
                    "task failed", task=task, error=state.failure, retry_seconds=round(pause, 2), exc_info=not known
                )
            finally:
                self._metrics.leases.labels(task).set(0)
            state.restarts += 1
            if loop.time() - started > GOOD_RUN:
                pause = FIRST_PAUSE
            await asyncio.sleep(pause * self._rng.uniform(0.5, 1.0))
            pause = min(pause * 2, LONGEST_PAUSE)

    def forget(self, tasks: Iterable[str]) -> None:
        """These are not kept any more."""
        for task in tasks:
            self.tasks.pop(task, None)


@dataclass(frozen=True, slots=True)
class Unit:
    """Loops that begin and end together. `open` makes what they share and yields their bodies by task."""

    settings: object  # what they were made of: where it is equal, a reload leaves them alone
    open: Callable[[], AbstractAsyncContextManager[Mapping[str, Body]]]


class Units:
    """The units of this process, by name."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._running: dict[str, tuple[Unit, asyncio.Task[None]]] = {}

    async def become(self, wanted: Mapping[str, Unit]) -> list[str]:
        """Ends what is not wanted any more, or not with these settings, and begins what is missing. Returns what began.

        Raises what a unit raises that cannot be opened; the others run.
        """
        await self.stop(
            *(
                name
                for name, (unit, _) in self._running.items()
                if name not in wanted or wanted[name].settings != unit.settings
            )
        )
        opened = {
            name: self._begin(name, unit, asyncio.get_running_loop().create_future())
            for name, unit in wanted.items()
            if name not in self._running
        }
        await asyncio.gather(*opened.values())
        return list(opened)

    async def stop(self, *names: str) -> None:
        """Ends these units, all of them where none is named: each loop finishes or rolls back, and gives its lease back."""
        ending = [self._running.pop(name)[1] for name in names or list(self._running) if name in self._running]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    def _begin(self, name: str, unit: Unit, opened: asyncio.Future[None]) -> asyncio.Future[None]:
        self._running[name] = (unit, asyncio.create_task(self._run(unit, opened), name=name))
        return opened

    async def _run(self, unit: Unit, opened: asyncio.Future[None]) -> None:
        bodies: Mapping[str, Body] = {}
        try:
            async with unit.open() as bodies:
                loops = [
                    asyncio.create_task(self._supervisor.keep(task, body), name=task) for task, body in bodies.items()
                ]
                opened.set_result(None)
                try:
                    # not gather, which would cancel them too: a second cancellation cuts off the giving back of a lease
                    if loops:
                        ended, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
                        for loop in ended:
                            loop.result()
                finally:
                    for loop in loops:
                        loop.cancel()
                    await asyncio.gather(*loops, return_exceptions=True)
        except Exception as error:
            if opened.done():
                raise
            opened.set_exception(error)
        finally:
            opened.cancel()
            self._supervisor.forget(bodies)


def notify(message: str) -> None:
    """Tells systemd (sd_notify(3)): READY=1, STOPPING=1, WATCHDOG=1, STATUS=…. Nothing where there is no systemd."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(message.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            log.warning("systemd does not hear us", reason=str(error))


def notify_reloading() -> None:
    """Says that a reload begins; READY=1 ends it. The time is what Type=notify-reload asks for."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


async def watchdog() -> None:
    """Says WATCHDOG=1 at half the interval that systemd asks for; the event loop that stands still says nothing."""
    interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 1_000_000
    if not interval or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval / 2)
