"""The polling schedule and the shared key, on a loop whose time is virtual: fair, bounded, and never above the budget."""

from __future__ import annotations

import asyncio
import itertools
import random
import selectors
from collections.abc import Coroutine, Mapping
from typing import Any

import pytest

from indexer.partners.client import Client, Denied, Limited, Unavailable
from indexer.partners.credential import Clock, Credential
from indexer.partners.exchange import Reply, Unanswered
from indexer.partners.orders import page_of
from indexer.partners.reading import Drift
from indexer.partners.schedule import SLOWEST, Schedule, Watch, pause
from indexer.sandbox.partners.keyban import Keyban
from indexer.sandbox.partners.movement import Course
from indexer.sandbox.partners.wire import Request


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only when nothing else is left to do."""

    def __init__(self) -> None:
        super().__init__(selectors.DefaultSelector())
        self._ahead = 0.0

    def time(self) -> float:
        return self._ahead

    def _run_once(self) -> None:
        if not self._ready:  # type: ignore[attr-defined]
            timers = [timer.when() for timer in self._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
            self._ahead = max(self._ahead, min(timers, default=0.0))
        super()._run_once()  # type: ignore[misc]


def virtually(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main)


def now() -> float:
    return asyncio.get_running_loop().time()


CLOCK = Clock(wall=lambda: 1_800_000_000.0 + now())


class Simulated:
    """A simulated partner as an Exchange: nothing but its latency takes time."""

    def __init__(self, partner: Keyban, key: str) -> None:
        self._partner, self._key = partner, key

    async def get(self, path: str, params: Mapping[str, str]) -> Reply:
        reply = self._partner.answer(Request("GET", path, params, {"x-api-key": self._key}))
        await asyncio.sleep(reply.delay)
        if reply.fate != "answered":
            raise Unanswered("unreachable", "no connection")
        return Reply(reply.status, reply.headers, reply.body)


# --------------------------------------------------------------------------- the schedule alone


def test_the_pause_grows_with_age_and_has_an_end() -> None:
    assert [pause(5, age) for age in (0, 60, 61, 120, 600, 3600, 86_400)] == [5, 5, 61 / 12, 10, 50, 300, SLOWEST]
    assert pause(400, 86_400) == 400  # a slow account stays slow


def test_who_is_registered_is_due_at_once_and_nobody_is_forgotten() -> None:
    schedule = Schedule(5.0)
    schedule.watch([Watch("a", 0.0)], 0.0)
    assert schedule.take(0.0) == "a" and schedule.take(0.0) is None
    schedule.done("a", 1.0)
    assert schedule.due() == 6.0
    assert schedule.watch([Watch("a", 1.5), Watch("b", 1.5)], 2.0)  # a again: not sooner than its pace, b at once
    assert schedule.take(2.0) == "b" and schedule.due() == 6.0
    schedule.failed("b", 2.0)
    schedule.watch([Watch("b", 1.5)], 3.0)  # nothing is open at a any more
    assert len(schedule) == 1 and schedule.due() == 7.0
    schedule.take(7.0)
    schedule.failed("b", 7.0)
    assert schedule.due() == 17.0  # twice as long after the second failure
    schedule.recovered(8.0)
    assert schedule.due() == 13.0
    assert schedule.take(13.0) == "b"
    schedule.put_back("b")
    assert schedule.take(13.0) == "b"


def test_a_wallet_that_is_registered_without_end_starves_nobody() -> None:
    schedule = Schedule(5.0)
    names = [f"w{n}" for n in range(50)]
    looked: dict[str, int] = dict.fromkeys([*names, "busy"], 0)
    at = 0.0
    for step in range(600):
        schedule.watch([*(Watch(name, 0.0) for name in names), Watch("busy", at)], at)
        if (wallet := schedule.take(at)) is not None:
            looked[wallet] += 1
            schedule.done(wallet, at)
        at += 1.0
        assert step or looked
    assert min(looked.values()) >= 5 and looked["busy"] <= 20


def test_after_a_restart_only_what_is_due_is_due() -> None:
    schedule = Schedule(5.0)
    schedule.watch([Watch("old", -4000.0), Watch("new", -1.0)], 0.0, {"old": -10.0, "new": -2.0})
    assert schedule.take(0.0) == "new" and schedule.take(0.0) is None
    assert schedule.due() == 290.0


# --------------------------------------------------------------------------- quiet and refusals


def test_quiet_is_kept_by_all_and_refusals_stop_all_but_a_probe() -> None:
    async def main() -> None:
        partner = Keyban(seed=1, clock=CLOCK.wall, keys=["k"])
        credential = Credential(10.0, CLOCK, random.Random(1))
        counted: list[str] = []

        def client() -> Client:
            return Client(
                "keyban account of bloom",
                Simulated(partner, "k"),
                credential,
                clock=CLOCK,
                rng=random.Random(2),
                observe=lambda _e, outcome, _s: counted.append(outcome),
            )

        one, other = client(), client()
        partner.weather.begin("rate_limited", until=CLOCK.wall() + 5)
        partner.weather.retry_after = 4
        started = now()
        await asyncio.gather(one.get("orders", "/v1/loyalty/orders"), other.get("orders", "/v1/loyalty/orders"))
        assert now() - started >= 4 and counted.count("rate_limited") <= 4
        partner.weather.retry_after = 900
        partner.weather.begin("rate_limited", until=CLOCK.wall() + 3)
        with pytest.raises(Limited):
            while True:  # one of the three forms of 429 says no time
                await one.get("orders", "/v1/loyalty/orders")
        with pytest.raises(Limited) as told:
            await other.get("orders", "/v1/loyalty/orders")
        assert 800 < (told.value.retry_after or 0) < 1000
        await asyncio.sleep(1000)
        partner.weather.end()
        partner.weather.begin("expired")
        asked = len(counted)
        for each in (one, other, one):
            with pytest.raises(Denied):
                await each.get("orders", "/v1/loyalty/orders")
        assert counted[asked:] == ["denied"]
        partner.weather.end()
        await asyncio.sleep(301)
        await one.get("orders", "/v1/loyalty/orders")
        await other.get("orders", "/v1/loyalty/orders")

    virtually(main())


def test_an_outage_is_asked_less_and_less() -> None:
    async def main() -> None:
        partner = Keyban(seed=1, clock=CLOCK.wall, keys=["k"])
        partner.weather.begin("dropped")
        client = Client(
            "keyban account of bloom",
            Simulated(partner, "k"),
            Credential(10.0, CLOCK, random.Random(1)),
            clock=CLOCK,
            rng=random.Random(2),
            observe=lambda *_: None,
        )
        end = now() + 3600
        while now() < end:
            with pytest.raises((Unavailable, Limited)) as told:
                await client.get("orders", "/v1/loyalty/orders")
            if isinstance(told.value, Limited):
                assert "failed again and again" in str(told.value), "it asked for nothing"
            assert client.health.problem is not None and "no connection" in client.health.problem, "the cause stays"
            await asyncio.sleep(5)
        assert len(partner.calls) < 3600 / 60 * 3 * 2.5 + 30

    virtually(main())


# --------------------------------------------------------------------------- ten thousand open legs


def test_ten_thousand_open_legs_over_two_thousand_wallets() -> None:
    """Five requests a second, 200 ms each: the budget holds, nobody starves, p99 of the age at settlement is bounded."""
    wallets, legs, rate = 2000, 5, 5.0

    async def main() -> None:
        rng = random.Random(4)
        partner = Keyban(seed=4, clock=CLOCK.wall, keys=["k"], latency=0.2)
        for _ in range(wallets):
            account = partner.open_account()
            for _ in range(legs):
                partner.mint(account, 10, Course(0.0, 0.0, rng.uniform(5, 60)))
        client = Client(
            "keyban account of bloom",
            Simulated(partner, "k"),
            Credential(rate, CLOCK, rng),
            clock=CLOCK,
            rng=rng,
            observe=lambda *_: None,
        )
        schedule = Schedule(5.0)
        waiting = {account.wallet: legs for account in partner.accounts.values()}
        schedule.watch([Watch(wallet, 0.0, n) for wallet, n in waiting.items()], now())
        ages: list[float] = []
        held = 0

        async def work() -> None:
            nonlocal held
            while waiting:
                wallet = schedule.take(now())
                if wallet is None:
                    await asyncio.sleep(0.2)
                    continue
                query = {"walletId": wallet, "currentPage": "1", "pageSize": "100"}
                rows = page_of(await client.get("orders", "/v1/loyalty/orders", query, wallet), Drift()).rows
                nodes = [row["orderTransactions"]["nodes"][0]["assetTransfer"] for row in rows]
                left = legs - sum(node["transaction"] is not None for node in nodes)
                # its age since it was asked for: longer than since it settled
                ages.extend([now()] * (waiting.get(wallet, 0) - left))
                schedule.done(wallet, now())
                held = max(held, len(schedule._heap))
                if left:
                    waiting[wallet] = left
                elif waiting.pop(wallet, None) and len(waiting) % 50 == 0:
                    schedule.watch([Watch(w, 0.0, n) for w, n in waiting.items()], now())

        await asyncio.gather(*(work() for _ in range(5)))
        assert len(ages) == wallets * legs
        assert sorted(ages)[int(len(ages) * 0.99)] <= 2 * wallets / rate
        asked = [call.at for call in partner.calls]
        assert min(b - a for a, b in itertools.pairwise(asked)) >= 1 / rate - 1e-6 and partner.peak(1.0) <= rate
        assert len(asked) / (asked[-1] - asked[0]) > 0.99 * rate / (1 + partner.latency)
        assert held <= 2 * wallets + 65

    virtually(main())
