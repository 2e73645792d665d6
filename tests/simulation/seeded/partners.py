"""Keyban and qiibee in a seed's world: their simulators, what the brand waits for there, and the weather.

Each operation has an amount of its own, so that the truth is plain: it is settled while its movement stands, and not otherwise.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from indexer.partners import credential as credential_module
from indexer.sandbox.partners.app import Hosted
from indexer.sandbox.partners.faults import FAULTS as WEATHER
from indexer.sandbox.partners.keyban import Keyban
from indexer.sandbox.partners.movement import Movement, Pace
from indexer.sandbox.partners.partner import Partner
from indexer.sandbox.partners.qiibee import BASE, Qiibee

if TYPE_CHECKING:
    from tests.simulation.seeded.world import World

KEY = "a-key-of-the-simulation"
PACE = Pace(appears=(0.0, 2.0), sent=(0.0, 3.0), settles=(0.0, 6.0), failing=0.1, lost=0.05)
FAULTS = {name: code for name, code in WEATHER.items() if name != "endless_body"}  # 200 MiB: test_partner_weather.py
SETTLED, OPEN = {"ready", "fulfilled"}, {"pending", "submitted", "confirming", "reverted"}


@dataclass
class Waiting:
    """An operation and the movement that it is about."""

    reference: str
    movement: Movement | None


class Partners:
    def __init__(self, world: World) -> None:
        self.world, self.rng = world, random.Random(f"partners {world.seed}")
        credential_module.PROBE = 15.0  # type: ignore[misc]  # a refused key is tried again sooner than in life
        seed = world.seed
        self.keyban = Keyban(seed=seed, clock=time.time, keys=[KEY], pace=PACE)
        self.qiibee = Qiibee(seed=seed, clock=time.time, keys=[KEY], pace=PACE)
        self.accounts = [self.keyban.open_account() for _ in range(3)]
        self.members = [self.qiibee.enrol() for _ in range(2)]
        self.operations: dict[str, Waiting] = {}
        for partner in (self.keyban, self.qiibee):
            partner.weather.late_by = (1.0, 8.0)
        for _ in range(self.rng.choice([0, 120])):
            self.qiibee.stranger()

    @property
    def both(self) -> tuple[Partner, Partner]:
        return self.keyban, self.qiibee

    async def open(self, stack: AsyncExitStack) -> dict[str, Any]:
        """Serves both; their sections of the brand's configuration."""
        keyban = await stack.enter_async_context(Hosted(self.keyban))
        qiibee = await stack.enter_async_context(Hosted(self.qiibee, BASE))
        pace: dict[str, Any] = {"api_key": KEY, "requests_per_second": 10.0, "poll": 3.0}
        return {
            "keyban": pace | {"url": keyban.url, "network": self.keyban.network, "require_success": True},
            "qiibee": pace | {"url": qiibee.url, "settle_after": 2.0},
        }

    async def trade(self, until: float) -> None:
        rng = self.rng
        for number in range(1, rng.randint(3, 10)):
            await asyncio.sleep(rng.expovariate(1 / 4.0))
            if self.world.loop.now > until:
                return
            amount = 500 + number
            kind = rng.choice(["keyban.mint", "keyban.burn", "qiibee.credit", "qiibee.debit"])
            if kind.startswith("keyban"):
                account = rng.choice(self.accounts)
                wallet, move = account.wallet, self.keyban.mint if kind == "keyban.mint" else self.keyban.burn
            else:
                account = rng.choice(self.members)  # type: ignore[assignment]
                wallet = account.auth_id  # type: ignore[attr-defined]
                move = self.qiibee.credit if kind == "qiibee.credit" else self.qiibee.debit  # type: ignore[assignment]
            reference = f"partner-{number}"
            self.operations[reference] = waiting = Waiting(reference, None)
            before, asked = rng.random() < 0.6, rng.random() < 0.9
            if asked and not before:
                waiting.movement = move(account, amount)
            legs = [{"kind": kind, "walletId": wallet, "amount": str(amount)}]
            said = await self.world.tell(
                "SELECT loyalty.register_operation($1)", {"brand": "bloom", "reference": reference, "legs": legs}
            )
            assert said is not None
            if asked and before:
                await asyncio.sleep(rng.choice([0.0, 2.0]))
                waiting.movement = move(account, amount)

    async def storms(self, until: float) -> None:
        """Bad weather at one of them, of one or two kinds, for a while."""
        rng = self.rng
        while self.world.loop.now < until:
            await asyncio.sleep(rng.expovariate(1 / 8.0))
            partner = rng.choice(self.both)
            for fault in rng.sample(sorted(FAULTS), rng.choice([1, 2])):
                self.begin(partner, fault)
            await asyncio.sleep(rng.choice([2.0, 10.0]))
            partner.weather.end()

    def begin(self, partner: Partner, fault: str) -> None:
        self.world.strike(f"{FAULTS[fault]} {fault}")
        rare = fault in ("deleted", "turned", "reincluded")
        partner.weather.begin(fault, chance=0.03 if rare else self.rng.choice([0.2, 0.6]))

    def calm(self) -> None:
        for partner in self.both:
            partner.weather.end()

    def expected(self) -> dict[str, set[str]]:
        now = time.time()
        return {
            reference: SETTLED if one.movement is not None and one.movement.stands(now) else OPEN
            for reference, one in self.operations.items()
        }

    def judge_ready(self, reference: str, at: float) -> list[str]:
        """A `ready` only after its movement had settled."""
        movement = self.operations[reference].movement
        if movement is None or movement.settles_at is None or movement.fails or movement.settles_at > at:
            return [f"{reference} was ready before its points had moved"]
        return []
