"""The pace of an endpoint, against a server that counts calls in each second: found, kept near, and found again when it changes."""

from __future__ import annotations

import random
from collections import deque

import pytest

from indexer.chain.pacing import Pace


class Server:
    """Refuses what would be more than `limit` calls within any second."""

    def __init__(self, limit: float) -> None:
        self.limit, self.refused, self.served = limit, 0, 0
        self._seen: deque[tuple[float, int]] = deque()

    def takes(self, calls: int, now: float) -> bool:
        while self._seen and self._seen[0][0] <= now - 1:
            self._seen.popleft()
        if sum(each for _, each in self._seen) + calls > self.limit:
            self.refused += 1
            return False
        self._seen.append((now, calls))
        self.served += calls
        return True


def ask(pace: Pace, server: Server, seconds: float, began: float = 0.0, calls: int = 1) -> float:
    """As fast as the pace lets, for so many seconds; an answer takes 5 ms, and a refusal is followed by a second of quiet."""
    now = began
    while now < began + seconds:
        size = min(calls, pace.at_once or calls)
        now += pace.book(size, now)
        if server.takes(size, now):
            now += 0.005
            pace.answered(now)
        else:
            pace.refused(now)
            now += 1.0
    return now


@pytest.mark.parametrize("limit", [5, 25, 120])
@pytest.mark.parametrize("calls", [1, 4, 100])
@pytest.mark.parametrize("configured", [None, 150.0])
def test_it_settles_below_what_is_refused(limit: int, calls: int, configured: float | None) -> None:
    pace, server = Pace(configured), Server(limit)
    now = ask(pace, server, 30, calls=calls)
    found, server.refused, server.served = server.refused, 0, 0
    assert found < 20
    ask(pace, server, 300, now, calls=calls)
    assert server.refused <= 300 / 20
    assert server.served / 300 > 0.6 * limit


def test_it_grows_back_when_the_endpoint_takes_more() -> None:
    pace, server = Pace(), Server(20)
    now = ask(pace, server, 60)
    server.limit = 100
    now = ask(pace, server, 600, now)
    server.served = 0
    ask(pace, server, 60, now)
    assert server.served / 60 > 60


def test_it_falls_again_when_the_endpoint_takes_less() -> None:
    pace, server = Pace(), Server(100)
    now = ask(pace, server, 60)
    server.limit, server.refused = 10, 0
    now = ask(pace, server, 30, now)
    assert server.refused < 12
    server.refused = server.served = 0
    ask(pace, server, 120, now)
    assert server.refused < 8 and server.served / 120 > 6


def test_it_never_passes_the_configured_pace() -> None:
    pace, server, rng = Pace(25.0), Server(1000), random.Random(1)
    now = 0.0
    for _ in range(200):
        now = ask(pace, server, rng.uniform(0.1, 3), now, calls=rng.choice((1, 7, 60)))
        if rng.random() < 0.1:
            pace.refused(now)
        assert pace.rate is not None and pace.rate <= 25
    assert server.served <= 25 * now + 50


def test_without_a_refusal_there_is_no_pace() -> None:
    pace = Pace()
    assert all(pace.book(100, 0.0) == 0 for _ in range(50))
    assert pace.at_once is None


def test_refusals_of_calls_that_were_under_way_together_count_once() -> None:
    pace = Pace()
    for _ in range(40):
        pace.book(1, 0.5)
    for _ in range(40):
        pace.refused(0.6)
    assert pace.rate == 20


def test_a_limit_that_is_never_met_again_is_forgotten() -> None:
    pace, server = Pace(), Server(5)
    now = ask(pace, server, 20)
    server.limit = 10**9
    for _ in range(60):
        now = ask(pace, server, 20, now)
        if pace.rate is None:
            break
    assert pace.rate is None
