"""A world in which one named fault is struck, several times, and nothing else goes wrong: to see which metrics move.

The same seed without the fault is the measure of what moves anyhow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, ClassVar

from aiohttp import web

from tests import movements
from tests.movements import Figure
from tests.receiver import Received
from tests.simulation.seeded import faults
from tests.simulation.seeded.partners import Partners
from tests.simulation.seeded.story import Tx
from tests.simulation.seeded.temper import CALM, Temper
from tests.simulation.seeded.world import World

RARE = 0.1  # of records that are gone for ever: where all are gone, an empty list is not believed
TIMES = 6  # that it is struck
BY_STATEMENT = frozenset(
    {
        "F90 killed at COMMIT",
        "F90 killed in a transaction",
        "F91 COMMIT lost",
        "F91 COMMIT unacknowledged",
        "F92 serialization failure",
        "F92 deadlock",
        "F94 frozen in a transaction",
        "F96 disk full",
    }
)
BY_SOCKET = ("F80", "F81", "F84", "F85", "F68 sockets cut")  # of no effect in a world that polls


OF_LOGS = ("F3", "F40", "F41", "F42", "F43", "F44")  # … that is told of heads: it reads receipts


class Alone(World):
    """`fault` is struck, as all seeds strike it; "" for the world beside it."""

    fault: ClassVar[str] = ""
    beside: ClassVar[str] = ""  # the fault whose undisturbed world this is

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        about = self.fault or self.beside
        if about.startswith(BY_SOCKET):
            self.polling = False
        if about.startswith(OF_LOGS):
            self.polling = True
        if about in faults.AMONG_OTHERS:
            self.endpoints = 3
        self.partners = Partners(self) if about in faults.OF_PARTNERS else None
        self.due = 0  # accidents at statements that wait for one

    def temperament(self, seed: int) -> Temper:
        return CALM

    def troubles(self, until: float) -> list[Coroutine[Any, Any, None]]:
        self.sick_receiver = self.slow_receiver = 0.0
        if movements.current is not None:
            movements.current.forget_ages()  # of the way to the first head
        if self.partners and self.fault == "F112 late":
            for partner in self.partners.both:
                partner.weather.late_by = (65.0, 90.0)  # late is what a minute's overlap does not find
        going = [self.commerce(until), *([self.partners.trade(until)] if self.partners else [])]
        return [*going, self.strikes(until)] if self.fault else going

    async def strikes(self, until: float) -> None:
        name = self.fault
        # partners are traded with at the beginning
        pause = 3.0 if self.partners else (until - self.loop.now) / (TIMES + 1)
        for number in range(TIMES):
            if number or name not in faults.OF_THE_CHAIN:  # the first while history is filled
                await asyncio.sleep(self.illness.uniform(0.5, 1.0) * pause)
            if name.startswith(OF_LOGS):
                self.story.send(Tx(self.story.action().log()))
            if name in faults.FAULTS:
                await faults.inflict(self, self.nodes[0 if number % 2 else number // 2 % len(self.nodes)], name)
            elif name in faults.OF_THE_CHAIN:
                await self._news()
                await self.shake(name)
            elif self.partners is not None:
                weather = name.partition(" ")[2]
                for partner in self.partners.both:
                    self.strike(name)
                    partner.weather.begin(weather, chance=RARE if weather == "deleted" else 0.4)
                await asyncio.sleep(6.0)
                for partner in self.partners.both:
                    partner.weather.end()
            elif name in BY_STATEMENT or name in faults.RECEIVERS:
                self.due += 1
            else:
                alive = [process for process in self.processes if process.runs]
                if alive:
                    self.befall(alive[0], name)

    async def _news(self) -> None:
        """Waits, not for long, until one of the newest blocks holds something that can be undone."""
        for _ in range(30):
            if any(block.hash in self.story.by_block for block in self.story.chain.canonical[-8:]):
                return
            await asyncio.sleep(0.2)

    async def answer(self, received: Received) -> web.StreamResponse | bytes | None:
        if self.calm or not self.due or self.fault not in faults.RECEIVERS:
            return await super().answer(received)
        self.due -= 1
        if self.fault == "F124 slow answer":
            self.strike(self.fault)
            await asyncio.sleep(9.0)
            return await super().answer(received)
        return await self.mistreat(received, self.fault.partition(" ")[0].replace("dropped", "drop"))

    def accident(self, sql: str, chance: float, *, in_transaction: bool) -> str | None:
        commits = sql.startswith("COMMIT")
        at_commit = self.fault in ("F90 killed at COMMIT", "F92 serialization failure") or self.fault.startswith(
            "F91 C"
        )
        fits = commits if at_commit else in_transaction and not commits
        if self.fault not in BY_STATEMENT or not self.due or not fits:
            return None
        self.due -= 1
        return self.fault


def world_of(fault: str, beside: str) -> type[Alone]:
    return type("Alone", (Alone,), {"fault": fault, "beside": beside})


def kind_of(fault: str) -> object:
    """Of worlds that are the same without their faults."""
    return (
        fault.startswith(BY_SOCKET),
        fault.startswith(OF_LOGS),
        fault in faults.AMONG_OTHERS,
        fault in faults.OF_PARTNERS,
    )


def names() -> list[str]:
    return sorted(faults.NAMES)


def moved(figure: Figure, undisturbed: float, struck: float) -> bool:
    """Ages go up and down by themselves: they must have gone a second further."""
    return struck > undisturbed + (1.0 if figure.name.endswith("_seconds") else 0.0)
