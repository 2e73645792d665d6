"""The budget as the partner counts it: whatever a request's way takes, no second at the other end holds more than are allowed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, cycle, pairwise
from math import floor
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer.partners.client import Client, PartnerError
from indexer.partners.credential import Credential
from indexer.partners.exchange import Reply, Unanswered
from tests.unit.test_partner_schedule import CLOCK, now, virtually

TIMEOUT = 4.0  # seconds, of an answer
BELATED = 5.0  # seconds after we broke a request off within which it may still arrive

Fate = Literal["ok", "missing", "error", "limited", "moved", "reset", "timeout", "cancelled"]
REPLIES: Mapping[str, Reply] = {
    "ok": Reply(200, {}, b'{"data": []}'),
    "missing": Reply(404, {}, b"{}"),
    "error": Reply(503, {"Retry-After": "0"}, b"{}"),
    "limited": Reply(429, {"Retry-After": "0"}, b"{}"),
    "moved": Reply(302, {"Location": "/elsewhere"}, b""),
}


@dataclass(frozen=True)
class Journey:
    """Of one request: seconds until it arrives (after its end, where we broke it off), and from then to its answer."""

    out: float
    back: float
    fate: Fate = "ok"


class Afar:
    """A partner behind a bad road, as an Exchange. `arrivals` in seconds of the loop."""

    def __init__(self, journeys: Iterator[Journey]) -> None:
        self._journeys = journeys
        self.arrivals: list[float] = []

    async def get(self, path: str, params: Mapping[str, str]) -> Reply:
        journey, sent = next(self._journeys), now()
        try:
            async with asyncio.timeout(TIMEOUT):
                if journey.fate in ("timeout", "cancelled"):
                    await asyncio.sleep(TIMEOUT + 1)
                await asyncio.sleep(journey.out + journey.back)
        except TimeoutError:
            self.arrivals.append(now() + journey.out)
            raise Unanswered("timeout", "no whole answer") from None
        except asyncio.CancelledError:
            self.arrivals.append(now() + journey.out)
            raise
        self.arrivals.append(sent + journey.out)
        if journey.fate == "reset":
            raise Unanswered("broken", "the answer broke off")
        return REPLIES[journey.fate]

    def peak(self, seconds: float) -> int:
        """The most arrivals within any stretch of so many seconds."""
        times = sorted(self.arrivals)
        return max((sum(1 for at in times if first <= at < first + seconds) for first in times), default=0)


def client_of(afar: Afar, credential: Credential) -> Client:
    return Client(
        "keyban account of bloom", afar, credential, clock=CLOCK, rng=random.Random(2), observe=lambda *_: None
    )


async def ask(client: Client, patience: float) -> None:
    """One question, given up after so many seconds, whatever state it is in."""
    with suppress(PartnerError, TimeoutError):
        async with asyncio.timeout(patience):
            await client.get("orders", "/v1/loyalty/orders")


async def ask_on(client: Client, patience: float, times: int) -> None:
    for _ in range(times):
        await ask(client, patience)


answered = st.builds(Journey, st.floats(0, 1.9), st.floats(0, 1.9), st.sampled_from(["ok", "ok", "ok", "missing"]))
troubled = st.builds(
    Journey,
    st.floats(0, BELATED),
    st.floats(0, 1.9),
    st.sampled_from(["error", "limited", "moved", "reset", "timeout", "cancelled"]),
)
journeys = st.lists(st.one_of(answered, answered, answered, troubled), min_size=1, max_size=12)
rates = st.sampled_from([0.4, 1.0, 2.5, 5.0, 7.9])


@given(journeys, rates, st.integers(1, 8), st.floats(0.5, 60.0))
def test_no_second_at_the_partner_holds_more_than_are_allowed(
    way: Sequence[Journey], rate: float, askers: int, patience: float
) -> None:
    afar = Afar(cycle(way))

    async def main() -> None:
        client = client_of(afar, Credential(rate, CLOCK, random.Random(1)))
        await asyncio.gather(*(ask_on(client, patience, 40 // askers) for _ in range(askers)))

    virtually(main())
    assert afar.peak(max(1.0, 1 / rate)) <= max(1, floor(rate))


@given(journeys, rates, st.lists(st.tuples(st.floats(0, 20.0), st.floats(0, 8.0)), min_size=1, max_size=3))
def test_nor_when_another_process_goes_on_where_one_was_killed(
    way: Sequence[Journey], rate: float, lives: Sequence[tuple[float, float]]
) -> None:
    afar = Afar(cycle(way))

    async def main() -> None:
        idle: float | None = None
        for life, gap in lives:
            credential = Credential(rate, CLOCK, random.Random(1))
            credential.begin(idle, lambda: None)
            client = client_of(afar, credential)
            askers = [asyncio.create_task(ask_on(client, 60.0, 1000)) for _ in range(4)]
            await asyncio.sleep(life)
            for asker in askers:
                asker.cancel()
            await asyncio.gather(*askers, return_exceptions=True)
            await asyncio.sleep(gap)
            idle = gap

    virtually(main())
    assert afar.peak(max(1.0, 1 / rate)) <= max(1, floor(rate))


@given(st.sampled_from([0.4, 1.0, 2.0, 5.0, 20.0]), st.floats(0, 3.5), st.integers(0, 3))
def test_what_is_allowed_is_used_but_for_the_time_of_the_answers(rate: float, latency: float, trouble: int) -> None:
    """places ÷ (window + latency) requests a second, where enough wait; and after trouble no place is lost for good."""
    broken: list[Journey] = [Journey(1.0, 0.0, fate) for fate in ("timeout", "reset", "moved")][:trouble]
    afar = Afar(chain(broken, cycle([Journey(latency / 3, latency * 2 / 3)])))
    count = 30 * floor(max(1.0, rate))

    async def main() -> None:
        client = client_of(afar, Credential(rate, CLOCK, random.Random(1)))
        await asyncio.gather(*(ask_on(client, 1e6, 15) for _ in range(count // 15)))

    virtually(main())
    cycle_seconds = max(1.0, 1 / rate) + latency
    lost = trouble * (TIMEOUT + BELATED + 70)  # the quiet after failures, and what was broken off
    assert max(afar.arrivals) < count / floor(max(1.0, rate)) * cycle_seconds * 1.01 + lost


@pytest.mark.parametrize("rate", [1.0, 5.0, 50.0])
def test_requests_leave_evenly_and_who_asks_first_goes_first(rate: float) -> None:
    async def main() -> None:
        credential = Credential(rate, CLOCK, random.Random(1))
        went: list[tuple[int, float]] = []

        async def ask_for(number: int) -> None:
            assert await credential.turn() is None
            went.append((number, now()))
            await asyncio.sleep(0.1)
            credential.over(broken_off=False)

        await asyncio.gather(*map(ask_for, range(100)))
        assert [number for number, _ in went] == list(range(100))
        assert min(later - sooner for (_, sooner), (_, later) in pairwise(went)) >= 1 / rate

    virtually(main())


def test_a_request_that_was_broken_off_keeps_its_place_while_it_may_arrive() -> None:
    async def main() -> None:
        credential = Credential(1.0, CLOCK, random.Random(1))
        for broken_off, pause in ((False, 1.0), (True, 1.0 + BELATED)):
            await credential.turn()
            await asyncio.sleep(3.0)
            credential.over(broken_off=broken_off)
            ended = now()
            await credential.turn()
            assert now() - ended == pytest.approx(pause, rel=0.002)
            credential.over(broken_off=False)

    virtually(main())


@pytest.mark.parametrize(("idle", "wait"), [(None, 0.0), (0.0, 6.0), (4.0, 2.0), (60.0, 0.0)])
def test_who_takes_over_waits_for_what_may_still_be_under_way(idle: float | None, wait: float) -> None:
    async def main() -> None:
        credential = Credential(5.0, CLOCK, random.Random(1))
        credential.begin(idle, lambda: None)
        await credential.turn()
        assert now() == pytest.approx(wait, abs=0.01)

    virtually(main())


def test_nobody_asks_with_a_key_that_may_be_up_to_another_process_by_now() -> None:
    class Lost(Exception):
        pass

    def lost() -> None:
        raise Lost

    async def main() -> None:
        afar = Afar(cycle([Journey(0.0, 0.0)]))
        credential = Credential(5.0, CLOCK, random.Random(1))
        credential.begin(None, lost)
        with pytest.raises(Lost):
            await client_of(afar, credential).get("orders", "/v1/loyalty/orders")
        assert afar.arrivals == []

    virtually(main())
