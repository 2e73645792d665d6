"""What all simulated partners share: keys, a quota, the weather, a record of calls, and the truth of their movements.

Promises that the same seed, clock and requests give the same answers. Routes and documents are each partner's own.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from indexer.sandbox.partners.faults import Weather, limited
from indexer.sandbox.partners.movement import Movement
from indexer.sandbox.partners.wire import Reply, Request

CALLS_KEPT = 100_000


@dataclass(frozen=True, slots=True)
class Quota:
    """At most so many answered requests in any stretch of so many seconds, over all keys; then 429 until the first of them lies further back.

    So `peak` counts: who stays within it by that is never refused.
    """

    requests: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Call:
    """A request as it was answered; `status` 0 where no answer came. `at` in Unix seconds."""

    at: float
    method: str
    path: str
    query: str
    status: int


class Partner(ABC):
    """`clock` gives Unix seconds. `keys` are those that open it; none: it asks for none. `latency` in seconds."""

    key_header: str = ""

    def __init__(
        self, *, seed: int, clock: Callable[[], float], keys: Iterable[str] = (), latency: float = 0.0
    ) -> None:
        name = type(self).__name__
        self.clock, self.latency, self.keys = clock, latency, set(keys)
        self.quota: Quota | None = None
        self.rng = random.Random(f"{seed}/{name}")  # noqa: S311 - a sandbox's history, not a secret
        self.weather = Weather(f"{seed}/{name}/weather", clock)
        self.movements: dict[str, Movement] = {}
        self.calls: deque[Call] = deque(maxlen=CALLS_KEPT)
        self.refused_by_quota = 0
        self._admitted: deque[float] = deque()  # times of requests within the quota, of its last stretch

    # ---- requests

    def answer(self, request: Request) -> Reply:
        """One request, at the clock's time."""
        reply = self._answered(request)
        query = "&".join(f"{name}={value}" for name, value in request.query.items())
        self.calls.append(Call(self.clock(), request.method, request.path, query, reply.status))
        return replace(reply, delay=reply.delay + self.latency)

    def _answered(self, request: Request) -> Reply:
        reads = request.method == "GET"
        if (refusal := self.weather.refused() or self._over_quota()) is not None:
            return refusal
        if self.keys and (key := request.headers.get(self.key_header.lower())) not in self.keys:
            return self.unauthorized(missing=key is None)
        if reads and (lost := self.weather.lost()) is not None:
            return lost
        reply = self.weather.torn(self.route(request))
        # what a request that writes asked for is done, and the answer gets lost
        return reply if reads else self.weather.lost() or reply

    def _over_quota(self) -> Reply | None:
        if self.quota is None:
            return None
        now, admitted = self.clock(), self._admitted
        while admitted and now - admitted[0] >= self.quota.seconds:
            admitted.popleft()
        if len(admitted) < self.quota.requests:
            admitted.append(now)
            return None
        self.refused_by_quota += 1
        return limited(self.refused_by_quota, now, max(1, ceil(admitted[0] + self.quota.seconds - now)))

    def peak(self, seconds: float = 1.0) -> int:
        """The most calls within any stretch of so many seconds."""
        times = [call.at for call in self.calls]
        most = first = 0
        for last, at in enumerate(times):
            while at - times[first] >= seconds:
                first += 1
            most = max(most, last - first + 1)
        return most

    @abstractmethod
    def route(self, request: Request) -> Reply:
        """The answer to an admitted request."""

    @abstractmethod
    def unauthorized(self, *, missing: bool) -> Reply:
        """The answer to a missing or a wrong key."""

    @abstractmethod
    def stranger(self) -> Movement:
        """Somebody else's record, listed at once: what makes pages shift while they are read."""

    # ---- records

    def listed(self, movements: Sequence[Movement]) -> list[Movement]:
        """Those of the records, in the partner's order, that this listing shows."""
        if movements and self.weather.strikes("empty_list"):
            return []
        return self.weather.jumbled([each for each in movements if not self.weather.hides(each.id)])

    def drift(self, page: int) -> None:
        """Before a page after the first is cut: something may have come meanwhile."""
        if page > 1 and self.weather.strikes("page_drift"):
            self.stranger()

    def served(self, movements: Iterable[Movement]) -> None:
        """After records were shown as settled: what may become of them once somebody has read them."""
        now = self.clock()
        for each in movements:
            if each.stands(now):
                if self.weather.strikes("deleted"):
                    each.deleted_at = now
                elif self.weather.strikes("turned"):
                    each.turned_at = now
                elif self.weather.strikes("reincluded"):
                    each.inclusion += 1

    def standing(self) -> list[Movement]:
        """What has really moved, as of now."""
        now = self.clock()
        return [each for each in self.movements.values() if each.stands(now)]
