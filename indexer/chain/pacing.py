"""How fast one endpoint is asked: no faster than configured, slower once it says that this was too much, and up again.

Promises that what was refused is not tried again at once: the pace falls below it, comes back near it within seconds, and
passes it only slowly, faster the longer nothing is refused. Times are in seconds of the caller's clock; nothing here waits.
"""

from __future__ import annotations

from collections import deque
from typing import Final

SLOWEST: Final = 0.2  # calls a second
WINDOW: Final = 1.0  # seconds: what providers count in
BURST: Final = 0.5  # seconds of calls that may go at a stretch
FALL: Final = 0.5  # of what was refused, where nothing else is known …
DIP: Final = 0.8  # … and where it was near what had been refused before
NEAR: Final = 0.9  # of what was refused: up to there quickly
RECOVERY: Final = 0.1  # growth in a second below that
PROBE: Final = 0.002  # growth in a second above it …
DOUBLING: Final = 60.0  # … doubled after every so many seconds without a refusal …
FASTEST_PROBE: Final = 0.05  # … up to this
FORGET: Final = 8.0  # times what was refused: without a limit of ours, there is none any more


class Pace:
    """The pace of one endpoint. `limit` is the configured one in calls a second; without it, none until the first refusal."""

    def __init__(self, limit: float | None = None) -> None:
        self.rate = limit
        self._limit = limit
        self._due = 0.0  # when all that was booked would be sent at an even pace
        self._sent: deque[tuple[float, int]] = deque()  # of the last window
        self._refused: float | None = None  # calls a second that were too much
        self._fell = self._grew = 0.0

    @property
    def at_once(self) -> int | None:
        """How many calls may travel together: a larger batch would be refused however long it had waited."""
        return None if self.rate is None else max(4, int(self.rate * BURST))

    def book(self, calls: int, now: float) -> float:
        """Takes so many calls' turn; the seconds to wait for it."""
        if self.rate is None:
            wait = 0.0
        else:
            self._due = max(self._due, now) + calls / self.rate
            wait = max(0.0, self._due - max(BURST, 1 / self.rate) - now)
        self._sent.append((now + wait, calls))
        while self._sent[0][0] < now - WINDOW:
            self._sent.popleft()
        return wait

    def refused(self, now: float) -> None:
        """The endpoint says that it is asked too often. What it says of calls that were under way together counts once."""
        if self._refused is not None and now - self._fell < WINDOW:
            return
        seen = max(1, sum(calls for at, calls in self._sent if now - WINDOW <= at <= now)) / WINDOW
        too_much = seen if self.rate is None else min(seen, self.rate)
        near = self._refused is not None and too_much < 1.2 * self._refused
        self._refused = too_much
        self.rate = max(SLOWEST, too_much * (DIP if near else FALL))
        self._due = self._fell = self._grew = now

    def answered(self, now: float) -> None:
        """An answer that refused nothing: the pace may grow."""
        if self._refused is None or self.rate is None or now <= self._grew:
            return
        if self.rate < NEAR * self._refused:
            growth = RECOVERY
        else:
            growth = min(FASTEST_PROBE, PROBE * 2 ** ((now - self._fell) / DOUBLING))
        self.rate *= (1 + growth) ** min(now - self._grew, 10.0)
        self._grew = now
        if self._limit is not None and self.rate >= self._limit:
            self.rate, self._refused = self._limit, None
        elif self._limit is None and self.rate > FORGET * self._refused:
            self.rate = self._refused = None
