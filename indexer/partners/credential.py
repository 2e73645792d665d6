"""A key at a partner, and what all pollers that use it share: the budget, the quiet that was asked for, and whether it is accepted.

Promises that the partner never counts more requests than the budget (`budget.py` says how), whoever asked with the key before, and
that what is refused is asked again by a probe alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from indexer.partners.budget import Budget

LONGEST_QUIET: Final = 3600.0  # seconds, whatever a Retry-After says
LONGEST_WAIT: Final = 30.0  # seconds that a request waits for its turn before it says so instead
BACKOFF: Final = 60.0  # seconds, the longest pause that we choose ourselves
PROBE: Final = 300.0  # seconds between looks whether a refused key is accepted again
DOUBTS: Final = 3  # subjects refused in a row (403), none answered between: then it is the endpoint that is refused


@dataclass(frozen=True, slots=True)
class Clock:
    """Time for pollers. `now` in seconds of a clock that only goes forward, `wall` in Unix seconds."""

    now: Callable[[], float] = lambda: asyncio.get_running_loop().time()
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


@dataclass(slots=True)
class Refusal:
    """What a key was refused with, and when it may be tried again."""

    status: int
    probe_at: float
    wide: bool = True


class Credential:
    """What all pollers of one key share: the budget, the quiet that was asked for, and whether it is accepted.

    Who asked first goes first. Every request that `turn` lets go is ended with `over`.
    """

    def __init__(self, rate: float, clock: Clock, rng: Random) -> None:
        self._clock, self._rng = clock, rng
        self._budget = Budget(rate)
        self._still_ours: Callable[[], None] = lambda: None
        self._queue = asyncio.Lock()  # first come, first served
        self._quiet_until = 0.0
        self.asked_for_quiet = False  # whether the quiet was asked for, or is ours after failures
        self._failures = 0  # requests in a row that failed for good, or were told to wait
        self._refused: dict[str, Refusal] = {}  # by endpoint, "" is every one; by endpoint and subject
        self._doubted: dict[str, set[str]] = {}  # by endpoint: subjects that were refused since it last worked

    @property
    def quiet(self) -> float:
        """Seconds for which nothing will be asked."""
        return max(0.0, self._quiet_until - self._clock.now())

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self._budget.rate

    def slower(self, rate: float) -> None:
        """Another account with the same key: the lower budget counts."""
        self._budget.allow(min(self.rate, rate))

    def begin(self, idle: float | None, still_ours: Callable[[], None]) -> None:
        """Asking is up to us now. `idle`: for how many seconds it had been up to nobody; None: it never was anybody's before us.

        `still_ours` raises once it may be up to somebody else: a process that was frozen learns it there, before it asks.
        """
        if idle is not None:
            self._budget.inherit(self._clock.now(), idle)
        self._still_ours = still_ours

    async def turn(self) -> float | None:
        """Waits for a place in the budget, and takes it. Answers seconds of quiet instead where those are too long to wait for."""
        async with self._queue:
            while True:
                now = self._clock.now()
                if self._quiet_until - now > LONGEST_WAIT:
                    return self._quiet_until - now
                at = max(self._budget.opening(now), self._quiet_until)
                if at <= now:
                    self._still_ours()
                    self._budget.take(now)
                    return None
                await self._clock.sleep(at - now)

    def over(self, *, broken_off: bool) -> None:
        """The request that was let go has ended. `broken_off`: by us, and it may still be under way."""
        self._budget.over(self._clock.now(), broken_off=broken_off)

    def stopped(self, endpoint: str, subject: str = "") -> Refusal | None:
        """The refusal that forbids a request now. The first to ask after `PROBE` seconds is let through."""
        now = self._clock.now()
        found = [refusal for scope in scopes(endpoint, subject) if (refusal := self._refused.get(scope)) is not None]
        for refusal in found:
            if now < refusal.probe_at:
                return refusal
        for refusal in found:
            refusal.probe_at = now + PROBE
        return None

    def worked(self, endpoint: str, subject: str = "") -> bool:
        """A usable answer. True when the key had been refused before."""
        self._failures = 0
        self._doubted.pop(endpoint, None)
        was = [self._refused.pop(scope, None) for scope in scopes(endpoint, subject)]
        return any(was)

    def denied(self, endpoint: str, status: int, subject: str = "") -> bool:
        """Whether it means more than the subject. 401 speaks of the key, 403 of what it may read: of the subject alone at first, of
        the endpoint when several in a row are refused."""
        now, scope = self._clock.now(), "" if status == 401 else endpoint
        if scope:
            self._refused.pop("", None)  # the key itself is accepted
        if scope and subject:
            doubted = self._doubted.setdefault(endpoint, set())
            doubted.add(subject)
            if len(doubted) < DOUBTS:
                scope = scopes(endpoint, subject)[-1]
            else:  # none of them was meant alone
                for each in doubted:
                    self._refused.pop(scopes(endpoint, each)[-1], None)
        wide = scope in ("", endpoint)
        self._refused[scope] = Refusal(status, now + PROBE, wide)
        return wide

    def limited(self, retry_after: float | None) -> None:
        """Everyone keeps quiet: as long as was asked for, else longer each time."""
        if retry_after is None:
            self._failures += 1
            self._keep_quiet(max(1.0, self.backoff(self._failures)), asked=True)
            return
        # spread, so that not all come at once
        self._keep_quiet(min(retry_after, LONGEST_QUIET) * (1 + self._rng.random() / 10), asked=True)

    def failed(self) -> None:
        self._failures += 1
        self._keep_quiet(self.backoff(self._failures), asked=False)

    def _keep_quiet(self, seconds: float, *, asked: bool) -> None:
        until = self._clock.now() + seconds
        if until > self._quiet_until:
            self._quiet_until, self.asked_for_quiet = until, asked

    def backoff(self, failures: int) -> float:
        """Seconds, doubling and spread over their upper half."""
        longest: float = min(BACKOFF, 2.0 ** min(failures - 1, 10))
        return longest * (0.5 + self._rng.random() / 2)


def scopes(endpoint: str, subject: str) -> list[str]:
    """What a refusal may be of, the widest first: everything, an endpoint, a subject there."""
    return ["", endpoint, *([f"{endpoint} {subject}"] if subject else [])]
