"""A budget as the partner counts it: so many requests in any second, wherever on its way a request may have been held up.

A request arrives somewhere between its sending and its answer. So it takes one of as many places as a second may hold, and the
place is free again a second after the *answer*: two requests that had one place after the other arrived a second apart, whatever
their ways took. That costs throughput: places ÷ (1 + seconds of an answer). Pure: times come in, nothing here waits.
"""

from __future__ import annotations

import heapq
from math import floor
from typing import Final

UNDER_WAY: Final = 5.0  # seconds after we broke a request off within which it still arrives, or never
DRIFT: Final = 0.001  # of the window: two clocks run apart by less


class Budget:
    """`rate` requests a second; below one, a request in `1 / rate` seconds. A fraction beyond whole requests is not used.

    Times are in seconds of the caller's clock.
    """

    def __init__(self, rate: float) -> None:
        self.allow(rate)
        self._under_way = 0
        self._held: list[float] = []  # a heap: until when the places of requests that have ended are taken
        self._next = 0.0

    def allow(self, rate: float) -> None:
        self.rate = rate
        self._places = max(1, floor(rate))
        self._window = max(1.0, 1 / rate) * (1 + DRIFT)

    def opening(self, now: float) -> float:
        """From when on the next request may go, as far as is known now; at `now` at the earliest."""
        while self._held and self._held[0] <= now:
            heapq.heappop(self._held)
        at = max(now, self._next)
        if self._under_way + len(self._held) >= self._places:
            # what is under way now holds its place for a window at least
            at = max(at, min(self._held[0] if self._held else float("inf"), now + self._window))
        return at

    def take(self, now: float) -> None:
        """A request goes now: evenly spaced, as nobody likes bursts."""
        self._under_way += 1
        self._next = now + self._window / self._places

    def over(self, now: float, *, broken_off: bool) -> None:
        """It has ended: answered, refused, or its connection was ended at the other end. Or we broke it off, and it may still be under way."""
        self._under_way -= 1
        heapq.heappush(self._held, now + self._window + (UNDER_WAY if broken_off else 0.0))

    def inherit(self, now: float, idle: float) -> None:
        """Another process asked with the same key until `idle` seconds ago, and nobody knows what of it is under way."""
        self._next = max(self._next, now + self._window + UNDER_WAY - idle)
