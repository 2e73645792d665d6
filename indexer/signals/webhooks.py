"""The dispatcher: every due delivery to its endpoint, at least once, in order within an operation, slow for nobody else.

One coroutine holds the lease's connection and takes turns at the queue: it records what ended and begins what may begin,
in one short transaction, and requests run between the turns. An attempt ends within its allowance, and a successor does
not take it up before, so two attempts of one delivery never overlap, whoever makes them. What may begin is decided in
`store/deliveries.py`, what an answer means in `attempts.py`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final

import structlog

from indexer.config import Brand
from indexer.signals.attempts import SCHEDULE, Endpoint, Reply, Sender, judge, retry_after
from indexer.signals.targets import Lookup, networks, system_lookup
from indexer.store import deliveries
from indexer.store import webhooks as endpoints
from indexer.store.deliveries import Attempt, Outcome, Room
from indexer.store.leases import Lease
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics

TASK: Final = "deliver"

WIDEST = 8  # attempts at once at one endpoint
UNKNOWN = 4  # at one that has not answered yet
NARROWEST = 2  # at one that is silent: it may hang on one signal and still take the others
OVERALL = 64  # attempts at once; beyond it each endpoint keeps its NARROWEST, so that many that hang stop nobody
LONGEST_HOLD = 60.0  # seconds that a 429 may quieten its whole endpoint
SWEEP = 2.0  # seconds until the queue is looked at without a wake-up

log = structlog.get_logger("signals.webhooks")


def endpoints_of(brands: Iterable[Brand]) -> list[Endpoint]:
    """The webhooks of a configuration."""
    return [
        Endpoint(
            brand=brand.name,
            name=webhook.name,
            url=webhook.url,
            secrets=tuple(secret.get_secret_value() for secret in webhook.secrets),
            events=webhook.events,
            allow=networks(webhook.allow),
            timeout=webhook.timeout_seconds,
            pause_after=webhook.pause_after_hours * 3600,
        )
        for brand in brands
        for webhook in brand.webhooks
    ]


class _Line:
    """An endpoint at work: its sender, and how much it bears. Halved by silence, widened by each answer."""

    def __init__(self, sender: Sender) -> None:
        self.sender = sender
        self.endpoint = sender.endpoint
        self.busy = 0
        self.width = UNKNOWN
        self.held_until = 0.0  # the loop's time

    def saw(self, reply: Reply) -> None:
        if reply.status is None:
            self.width = max(NARROWEST, self.width // 2)
        else:
            self.width = min(WIDEST, self.width + 1)


class Dispatcher:
    """Delivers under the lease `deliver`. `configure` may be called at any time, also while it runs."""

    def __init__(
        self,
        given: Sequence[Endpoint],
        *,
        metrics: Metrics,
        schedule: Sequence[float] = SCHEDULE,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.time,
        lookup: Lookup | None = None,
        sweep: float = SWEEP,
    ) -> None:
        self._metrics, self._schedule, self._clock, self._sweep = metrics, tuple(schedule), clock, sweep
        self._rng = rng or random.Random()  # noqa: S311 – jitter, not a secret
        self._threads = ThreadPoolExecutor(32, "resolve")
        self._lookup = lookup or system_lookup(self._threads)
        self._lines: dict[tuple[str, str], _Line] = {}
        self._retired: list[_Line] = []
        self._ended: list[Outcome] = []
        self._patience: dict[tuple[str, str], float] = {}
        self._stirred = asyncio.Event()
        self._draining = False
        self._aside = True  # whether something may wait for a chain in doubt
        self._idle = asyncio.Event()  # nothing is under way, and all that ended is recorded
        self._idle.set()
        self.configure(given)

    def configure(self, given: Sequence[Endpoint]) -> None:
        """Takes the endpoints from now on. Attempts under way end as they began."""
        wanted = {(endpoint.brand, endpoint.name): endpoint for endpoint in given}
        for key, line in list(self._lines.items()):
            if wanted.get(key) != line.endpoint:
                self._retired.append(self._lines.pop(key))
        for key, endpoint in wanted.items():
            if key not in self._lines:
                self._lines[key] = _Line(Sender(endpoint, self._lookup, self._clock, connections=WIDEST))
        self._patience = {key: endpoint.pause_after for key, endpoint in wanted.items()}
        self._stirred.set()

    async def run(self, lease: Lease, wakeups: Wakeups) -> None:
        """Until cancelled. Raises LeaseLost. Requests under way are cut off then, and repeated by the next holder: `drain`
        first where there is time.
        """
        attempts: set[asyncio.Task[None]] = set()
        listener = asyncio.create_task(self._listen(wakeups))
        self._aside = True
        self._ended.clear()  # of a lease held before: their rows are taken up when their allowance ends
        self._idle.clear()
        try:
            while True:
                self._stirred.clear()
                pause = await self._turn(lease, attempts)
                await self._close_retired()
                if self._draining and not attempts and not self._ended:
                    self._idle.set()
                if pause > 0:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(pause):  # wait_for of Python 3.11 may swallow a cancellation
                            await self._stirred.wait()
        finally:
            for task in (listener, *attempts):
                task.cancel()
            await asyncio.gather(listener, *attempts, return_exceptions=True)
            self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Begins no attempt any more, and waits until those under way have ended and are recorded. `run` goes on, idly.

        What is still under way after so many seconds is cut off with `run`, and repeated by the next holder.
        """
        self._draining = True
        self._stirred.set()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            left = sum(line.busy for line in (*self._lines.values(), *self._retired))
            log.warning("attempts_cut_off", attempts=left, after_seconds=seconds)

    async def close(self) -> None:
        """Closes the connections to the endpoints. After `run` has ended."""
        for line in (*self._lines.values(), *self._retired):
            await line.sender.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _listen(self, wakeups: Wakeups) -> None:
        while True:
            # a chain is rid of doubt when its follower has linked a head
            await wakeups.wait(("numbered", "heads") if self._aside else "numbered", self._sweep)
            self._stirred.set()

    async def _turn(self, lease: Lease, attempts: set[asyncio.Task[None]]) -> float:
        """One look at the queue. Returns for how many seconds there is nothing to do unless something stirs."""
        loop = asyncio.get_running_loop()
        started = loop.time()  # before the transaction: an attempt's allowance counts from its record
        rooms, lines = self._rooms(started), dict(self._lines)  # `configure` may change them meanwhile
        ended, self._ended = self._ended, []
        due: float | None = None
        async with lease.transaction() as conn:
            ready = await deliveries.record(conn, ended) if ended else []
            stopped = await endpoints.weigh(conn, ended, self._patience) if ended else []
            if rooms and self._aside:
                self._aside = (await deliveries.recall(conn)).waiting
            turn = await deliveries.begin(conn, rooms) if rooms else deliveries.Turn([], [], progress=False)
            if rooms and not turn.progress:
                due = await deliveries.next_due(conn, rooms)
        self._aside |= turn.set_aside
        for attempt in turn.attempts:
            line = lines[attempt.brand, attempt.webhook]
            line.busy += 1
            task = asyncio.create_task(self._attempt(line, attempt, started + line.endpoint.timeout))
            attempts.add(task)
            task.add_done_callback(attempts.discard)
        for first in ready:
            self._metrics.observe_latency(first.brand, first.kind, "ready_to_delivered", first.seconds)
        for one in stopped:
            log.error("endpoint_stopped", brand=one.brand, webhook=one.webhook, why=one.why, reason=one.reason)
            self._metrics.endpoints_stopped.labels(one.brand, one.webhook, one.why).inc()
        for closed in turn.closed:
            self._metrics.deliveries.labels(closed.brand, closed.webhook, closed.state).inc()
        if turn.progress:
            return 0.0
        # 20 ms at the least: a row that somebody else holds locked stays due, and is not worth a busy loop
        held = [line.held_until - started for line in self._lines.values() if line.held_until > started]
        return min([self._sweep, *held, *([] if due is None else [max(due, 0.02)])])

    def _rooms(self, now: float) -> list[Room]:
        """How many attempts may begin at each endpoint: a share of what is left overall, and at the least its own two."""
        if self._draining:
            return []
        open_lines = [line for line in self._lines.values() if line.held_until <= now and line.busy < line.width]
        left = OVERALL - sum(line.busy for line in (*self._lines.values(), *self._retired))
        share = max(0, left) // max(1, len(open_lines))
        rooms = []
        for line in open_lines:
            free = max(min(line.width - line.busy, share), NARROWEST - line.busy)
            if free > 0:
                rooms.append(Room(line.endpoint.brand, line.endpoint.name, free, line.endpoint.timeout))
        return rooms

    async def _attempt(self, line: _Line, attempt: Attempt, deadline: float) -> None:
        brand, webhook = attempt.brand, attempt.webhook
        try:
            reply = await line.sender.post(attempt.signal_id, attempt.body, deadline=deadline)
        except Exception as error:
            # ours to mend; but one delivery that cannot be made must not stop all others
            log.exception("attempt_broke", brand=brand, webhook=webhook, signal=str(attempt.signal_id))
            reply = Reply(None, f"internal error: {type(error).__name__}")
        finally:
            line.busy -= 1
        line.saw(reply)
        now = datetime.fromtimestamp(self._clock(), UTC)
        try:
            outcome = judge(attempt, reply, schedule=self._schedule, rng=self._rng, now=now)
            if reply.status == 429:
                hold = min(retry_after(reply.retry_after, now), LONGEST_HOLD)
                line.held_until = asyncio.get_running_loop().time() + hold
        except Exception:  # an attempt that is not recorded would be made again and again
            log.exception("answer_broke", brand=brand, webhook=webhook, signal=str(attempt.signal_id))
            reply = Reply(None, "an answer that cannot be judged")
            outcome = judge(attempt, reply, schedule=self._schedule, rng=self._rng, now=now)
        self._metrics.delivery_seconds.labels(brand, webhook).observe(reply.seconds)
        word = "gone" if outcome.gone else "failed" if outcome.state == "pending" else outcome.state
        self._metrics.deliveries.labels(brand, webhook, word).inc()
        if outcome.state != "delivered":
            log.warning(
                "delivery_" + word,
                brand=brand,
                webhook=webhook,
                signal=str(attempt.signal_id),
                type=attempt.type,
                attempt=attempt.number,
                reason=outcome.error,
                retry_in=round(outcome.retry_in, 1) if word == "failed" else None,
            )
        self._ended.append(outcome)
        self._stirred.set()

    async def _close_retired(self) -> None:
        idle = [line for line in self._retired if line.busy == 0]
        self._retired = [line for line in self._retired if line.busy]
        for line in idle:
            await line.sender.close()
