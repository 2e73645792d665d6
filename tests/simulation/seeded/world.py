"""One seed: a chain, its nodes, the brand's shop, a PostgreSQL, and daemons that are frozen and killed; then the verdict.

The daemons are `indexer.daemon.serve` itself, with its HTTP server, leases and LISTEN. Nothing of the product is replaced but
the clocks, the order of what is outstanding, and time's effect on PostgreSQL.
"""

from __future__ import annotations

import asyncio
import base64
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import asyncpg
from aiohttp import web

from indexer import daemon
from indexer.chain import schedule as schedules
from indexer.config import Config
from indexer.model.types import Hash32, Schedule
from indexer.store.database import Database
from tests import oracle
from tests.fake_node import FakeNode
from tests.following import FACTORY, ISSUER
from tests.movements import Figure
from tests.receiver import Received, Receiver
from tests.simulation.seeded import faults
from tests.simulation.seeded.loop import Process, VirtualLoop
from tests.simulation.seeded.network import Network
from tests.simulation.seeded.partners import Partners
from tests.simulation.seeded.postgres import Link, Server, failure
from tests.simulation.seeded.story import (
    BRAND,
    CHAIN_ID,
    FIRST_FAST,
    Expected,
    Story,
    Tx,
    created,
    hexa,
    rfc3339,
    transferred,
)
from tests.simulation.seeded.temper import Temper, temper_of

SECRET = "whsec_" + base64.b64encode(b"a secret of the simulation's").decode()
ACTIVE = (30.0, 70.0)  # virtual seconds of trouble
QUIET = 400.0  # virtual seconds at most until everything must have come to rest: a second quarantine lasts 300
LEASE = 15.0


@dataclass
class Verdict:
    """What the oracle found, and what happened on the way."""

    seed: int
    wrong: list[str]
    trace: str
    struck: Counter[str] = field(default_factory=Counter)
    moved: dict[Figure, float] = field(default_factory=dict)  # how far each went, where somebody watched
    figures: dict[str, Any] = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)


class World:
    crash_at: int | None = (
        None  # die at this one of the commit paths' statements, and no other accidents at the database
    )
    quiet = QUIET
    chaos = 1.0  # how many times more often than else statements are lost, refused and died over, and nodes fall ill

    def __init__(self, loop: VirtualLoop, seed: int, url: str) -> None:
        self.loop, self.seed, self.url = loop, seed, url
        self.rng = random.Random(f"world {seed}")
        self.illness = random.Random(f"nodes {seed}")
        self.temper = self.temperament(seed)
        self.story = Story(loop, seed, self.temper)
        self.network = loop.network = Network(
            loop, seed, slow=self.rng.choice([0.1, 0.3, 0.6]), latency=self.rng.choice([0.002, 0.02, 0.1])
        )
        self.server: Server = loop.postgres
        self.struck: Counter[str] = Counter()
        self.processes: list[Process] = []
        self.born = 0
        self.kills = self.statements = 0
        self.nodes: list[FakeNode] = []
        self.liar: FakeNode | None = None
        self.receiver = Receiver(self.answer)
        self.database: Database
        self.config: Config
        self.sick_receiver = 0.0
        self.slow_receiver = 0.0
        self.down = False  # the receiver, for a while
        self.taken: set[UUID] = set()  # signals that were answered with success
        self.duel = False  # the next leader that stores an event shall stand still
        self.calm = False
        self.polling = self.rng.random() < 0.4
        self.endpoints = self.rng.choice([1, 2, 3, 3])
        self.partners = Partners(self) if self.rng.random() < 0.5 else None
        self.sections: dict[str, Any] = {}
        self.handed: set[tuple[str, int]] = set()

    def temperament(self, seed: int) -> Temper:
        return temper_of(seed)

    def strike(self, name: str) -> None:
        """Counts one that happens; docs/faults.md knows it by this name."""
        assert name in faults.NAMES, name
        self.struck[name] += 1

    # ------------------------------------------------------------------ the daemons

    def configuration(self) -> Config:
        story, rng = self.story, self.rng
        chain: dict[str, Any] = {
            "name": "fake",
            "chain_id": CHAIN_ID,
            "rpc": [{"url": node.url} for node in self.nodes],
            "factories": [{"address": hexa(FACTORY), "start_block": 0}],
            "second_look_seconds": rng.choice([0.0, 5.0]),
            "verify_calls_per_second": rng.choice([2.0, 20.0]),
            "tags_seconds": rng.choice([2.0, 5.0]),
        }
        if not self.polling:
            chain["websocket"] = self.nodes[0].ws_url
        demand = {"confidence": story.demand.confidence}
        if story.demand.confidence == "confirmed":
            demand["seconds"] = story.demand.seconds  # type: ignore[assignment]
        brand = {
            "name": BRAND,
            "issuers": [hexa(ISSUER)],
            "policies": [demand],
            "unmatched_since": "2020-01-01T00:00:00Z",
            "webhooks": [
                {
                    "name": "shop",
                    "url": self.receiver.url + "/hook",
                    "secrets": [SECRET],
                    "allow": ["127.0.0.0/8"],
                    "events": ["*"],
                }
            ],
        }
        brand |= self.sections
        return Config.model_validate(
            {
                "state_dir": "/nonexistent",
                "database": {"url": self.url, "lease_seconds": LEASE, "pool_size": 4},
                "http": {"listen": "127.0.0.1:0"},
                "chains": [chain],
                "brands": [brand],
            }
        )

    def start(self) -> Process:
        self.born += 1

        async def life() -> None:
            while True:  # as systemd would
                try:
                    await daemon.serve(self.config)
                    return
                except Exception as error:
                    self.loop.note("serve failed", type(error).__name__)
                    faults.remember(self, error)
                    await asyncio.sleep(1.0)

        process = self.loop.spawn(f"daemon{self.born}", life)
        self.processes.append(process)
        return process

    def kill(self, process: Process) -> None:
        self.kills += 1
        process.kill()
        self.processes.remove(process)

    # ------------------------------------------------------------------ the brand

    async def answer(self, received: Received) -> web.StreamResponse | bytes | None:
        rng = self.rng
        if self.down and not self.calm:
            return await self.mistreat(received, "500")
        if not self.calm and rng.random() < self.slow_receiver:
            self.strike("F124 slow answer")
            await asyncio.sleep(rng.choice([0.5, 5.0, 9.0]))
        lost = not self.calm and rng.random() < self.sick_receiver
        if lost:
            return await self.mistreat(received, rng.choice(["F120", "F122", "F123", "F125", "500", "drop"]))
        self.take(received)
        self.taken.add(received.id)
        return web.Response(status=204)

    async def mistreat(self, received: Received, what: str) -> web.Response | None:
        """One answer that is none, or not the one that it should be."""
        self.strike(next(name for name in faults.RECEIVERS if name.startswith(what)))
        if what == "F120":  # taken, and the answer never comes
            self.take(received)
            await asyncio.sleep(12.0)
        elif what == "F122":
            return web.Response(status=429, headers={"Retry-After": self.rng.choice(["1", "3"])})
        elif what == "F123":
            return web.Response(status=301, headers={"Location": "http://169.254.169.254/"})
        elif what == "F125":
            self.take(received)
            self.taken.add(received.id)
            return web.Response(status=200, text='{"error": "no"}')
        elif what == "500":
            return web.Response(status=500)
        return None

    def take(self, received: Received) -> None:
        """The shop: hands over on `ready`, sooner or later, sometimes never."""
        if received.type != "operation.ready" or self.rng.random() < (0.1 if self.temper.restless else 0.3):
            return
        data = received.json["data"]
        key = (data["operation"]["reference"], int(data["generation"]))
        if key not in self.handed:
            self.handed.add(key)
            self.loop.outside(self.fulfil(*key, data["operation"]["id"]), "fulfil")

    async def fulfil(self, reference: str, generation: int, operation: str) -> None:
        await asyncio.sleep(self.rng.choice([0.0, 0.0, 1.0] if self.temper.restless else [0.0, 1.0, 10.0]))
        said = await self.tell("SELECT loyalty.fulfil($1, $2, $3)", UUID(operation), generation, {"by": "the shop"})
        if said is not None:
            for expected in self.story.operations:
                if expected.reference == reference:
                    expected.receipts.add(generation)

    async def tell(self, query: str, *args: object) -> Any:
        """A call of the brand's, repeated until it is answered; None where it is refused."""
        for _ in range(50):
            try:
                async with self.database.pool.acquire() as conn:
                    return await conn.fetchval(query, *args)
            except (asyncpg.SerializationError, asyncpg.DeadlockDetectedError, asyncpg.LockNotAvailableError):
                await asyncio.sleep(0.5)
            except asyncpg.PostgresError as refused:
                if str(refused.sqlstate).startswith("LY"):
                    return None
                raise
        raise AssertionError("the brand is never answered")

    async def register(self, reference: str, legs: list[dict[str, Any]], requested_at: float | None) -> None:
        expected = Expected(reference, legs, self.story.demand)
        request: dict[str, Any] = {"brand": BRAND, "reference": reference, "legs": legs}
        if requested_at is not None:
            request["requestedAt"] = rfc3339(requested_at)
        said = await self.tell("SELECT loyalty.register_operation($1)", request)
        assert said is not None, request
        expected.id = said["id"]
        self.story.operations.append(expected)

    async def twins(self, number: int) -> None:
        """Two operations that only wallet, amount and time tell, and that are the same in all of it; or nearly."""
        story, rng = self.story, self.rng
        first = story.action(amount=3000 + number)
        same = rng.random() < 0.6
        second = story.action(
            amount=first.amount if same else first.amount + 1,
            programme=first.programme,
            holder=first.holder,
            redeem=first.redeem,
        )
        for place, action in enumerate((first, second)):
            await self.register(f"op-{number}{'ab'[place]}", [action.terms() | {"match": "wallet_amount"}], None)
        for action in rng.choice([(first,), (second,), (first, second), (second, first)]):
            story.send(Tx(action.log(), 0, (action,)), rng.choice([0.0, 2.0, 6.0]))

    async def trade(self, number: int) -> None:
        """One operation: signed, registered, mined, in some order, with some accident."""
        story, rng = self.story, self.rng
        legs, actions = [], []
        deadline = 0 if rng.random() < 0.7 else int(self.loop.wall) + rng.choice([4, 10, 25])
        match = rng.choices(["nonce", "operation_hash", "wallet_amount"], [6, 2, 2])[0]
        count = 2 if rng.random() < 0.15 else 1
        for index in range(count):
            amount = 1000 + 10 * number + index if match == "wallet_amount" else rng.choice([10, 20, 250])
            action = story.action(deadline=deadline, amount=amount)
            leg = action.terms()
            if match == "nonce":
                leg["nonce"] = hexa(action.nonce.to_bytes(32, "big"))
                leg["operationHash"] = hexa(action.hash)
            elif match == "operation_hash":
                leg["operationHash"] = hexa(action.hash)
            else:
                leg["match"] = "wallet_amount"
            if rng.random() < 0.07 and match != "wallet_amount":
                leg["amount"] = str(action.amount + 1)  # not what was signed
                self.strike("other terms")
            legs.append(leg)
            actions.append(action)
        reference = f"op-{number}"
        begun = self.loop.wall
        early = rng.random() < 0.65
        if early:
            await self.register(reference, legs, None if rng.random() < 0.5 else begun - rng.choice([0, 5]))
        for action in actions:
            if rng.random() < 0.9:
                story.send(Tx(action.log(), action.deadline, (action,)), rng.choice([0.0, 0.5, 3.0, 8.0]))
        if not early:
            self.strike("registered late")
            await asyncio.sleep(rng.choice([0.5, 4.0, 15.0]))
            await self.register(reference, legs, begun - 1)
        if rng.random() < 0.1:
            await asyncio.sleep(rng.choice([0.0, 3.0]))
            expected = next(each for each in story.operations if each.reference == reference)
            said = await self.tell("SELECT loyalty.cancel($1)", UUID(expected.id))
            expected.cancelled = said is not None
            self.strike("cancelled")

    # ------------------------------------------------------------------ trouble

    async def commerce(self, until: float) -> None:
        for number in range(1, self.rng.randint(8, 22)):
            trade = self.twins if self.rng.random() < 0.12 else self.trade
            self.loop.outside(trade(number), f"trade {number}")
            if self.rng.random() < 0.15:  # what nobody waits for
                self.story.send(Tx(self.story.action().log()), self.rng.choice([0.0, 5.0]))
            await asyncio.sleep(self.rng.expovariate(1 / 2.5))
            if self.temper.young:
                await self.shake("F15d created and used in one block")
            if self.loop.now > until:
                return

    async def unrest(self, until: float) -> None:
        """The chain's own troubles."""
        rng, restless = self.rng, self.temper.restless
        while self.loop.now < until:
            await asyncio.sleep(rng.expovariate(1 / (4.0 if restless else 6.0)))
            if rng.random() < (0.5 if restless else 0.15):
                self.undo()
            else:
                await self.shake(rng.choices(list(faults.OF_THE_CHAIN), list(faults.OF_THE_CHAIN.values()))[0])

    def undo(self) -> None:
        """A reorganisation that takes something back: from the very block of an event on, or deeper than what is safe."""
        story, rng = self.story, self.rng
        depth = (
            story.depth_of_an_event(story.rng) if rng.random() < 0.6 else int(story.safe_lag * rng.choice([1.2, 2, 3]))
        )
        if depth:
            self.strike(f"F06 reorganisation, {'ten' if depth < 30 else 'deep'}")
            story.reorganise(depth, rng.choice([0, 1, 3]), again=rng.choice([0.5, 0.95]))

    async def shake(self, name: str) -> None:
        """One of the chain's troubles, from its beginning to its end."""
        story, rng = self.story, self.rng
        self.strike(name)
        match name:
            case "F07 there and back":
                await story.there_and_back()
            case "F12 a shorter chain":
                story.reorganise(rng.choice([3, 8]), -rng.choice([1, 3, 8]))
            case "F09 two reorganisations":
                story.reorganise(rng.choice([1, 4]))
                await asyncio.sleep(rng.choice([0.0, 0.05, 0.4]))
                story.reorganise(rng.choice([2, 6]))
            case "F13 replaced at the same height":
                story.reorganise(1, 0)
            case "F14 the chain halts":
                story.halted = True
                await asyncio.sleep(rng.choice([5.0, 40.0]))
                story.halted = False
            case "F15d created and used in one block":
                story.programmes += 1
                n = story.programmes
                log = story.action(programme=n).log()
                story.send(Tx(rng.choice([[transferred(n), created(n), log], [created(n), transferred(n)]])))
                for _ in range(rng.choice([0, 3, 6])):
                    story.send(Tx(transferred(n)), rng.uniform(0.3, 5.0))
                story.send(Tx(story.lookalike()), rng.choice([0.0, 4.0]))
            case _:
                depth = {"one": 1, "two": 2, "ten": 10, "deep": 130}[name.rpartition(" ")[2]]
                story.reorganise(depth, rng.choice([0, 0, 1, 3]))

    async def misfortune(self, until: float) -> None:
        """Processes die, freeze, and lose their sessions."""
        rng = self.rng
        names = (
            "F90 killed",
            "F94 frozen",
            "F95 two leaders",
            "F91 a session ends",
            "stopped in good order",
            "F94 a lease lapses",
        )
        while self.loop.now < until:
            await asyncio.sleep(rng.expovariate(1 / 9.0))
            alive = [process for process in self.processes if process.runs]
            if alive:
                process = rng.choice(alive)
                self.befall(process, rng.choices(names, [4, 2, 2, 3, 1, 1])[0])

    def befall(self, process: Process, name: str) -> None:
        """One accident of one process."""
        rng = self.rng
        if name == "F95 two leaders":
            if len(self.processes) < 2:
                self.strike(name)
                self.start()
            return
        if name == "F91 a session ends":
            if links := [link for link in self.server.links if link.process is process and link.pid]:
                self.strike(name)
                self.server.end(rng.choice(links).pid)
            return
        self.strike(name)
        match name:
            case "F90 killed":
                self.kill(process)
                self._later(rng.choice([0.1, 3.0, 20.0]), self._ensure)
            case "F94 frozen":
                self._freezes(process)
            case "stopped in good order":
                process.signals[signal.SIGTERM]() if signal.SIGTERM in process.signals else None
                self.processes.remove(process)
                self._later(rng.choice([0.5, 5.0]), self._ensure)
            case "F94 a lease lapses":
                self.server.set_clock()
                self.server.ask(
                    "UPDATE indexer.lease SET until = clock_timestamp() - interval '1 second' WHERE task = "
                    f"'{rng.choice(['settle', 'number', 'deliver', f'follow:{CHAIN_ID}', f'history:{CHAIN_ID}'])}'"
                )
            case _:
                raise AssertionError(name)

    async def outages(self, until: float) -> None:
        """The receiver is down, for less time than attempts are made."""
        while self.loop.now < until:
            await asyncio.sleep(self.rng.expovariate(1 / 8.0))
            self.down = True
            await asyncio.sleep(self.rng.choice([5.0, 15.0, 30.0]))
            self.down = False

    async def duels(self, until: float) -> None:
        """Now and then, the next follower that stores an event stands still in the middle of it, or dies."""
        while self.loop.now < until:
            await asyncio.sleep(self.rng.expovariate(1 / 4.0))
            self.duel = True

    def _later(self, seconds: float, act: Any) -> None:
        async def later() -> None:
            await asyncio.sleep(seconds)
            act()

        self.loop.outside(later(), "later")

    def _ensure(self) -> None:
        if not self.processes:
            self.start()

    def meddle(self, link: Link, sql: str) -> str | bytes | None:
        """What the line to the database does to one statement."""
        if self.calm:
            return None
        rng = self.server.rng
        if self.crash_at is not None:
            self.statements += link.status == "T" or sql.startswith("BEGIN")
            if self.statements != 1 + self.crash_at // 2 or self.kills:
                if link.status == "T":
                    self.loop.note("statement", 2 * (self.statements - 1), sql.strip()[:40])
                return None
            self.strike("F90 killed in a transaction")
            self.loop.note("dies at", sql)
            return self._dies(link, after=self.crash_at % 2 == 1)
        if (
            self.duel
            and link.application.startswith("indexer:follow")
            and sql.startswith("INSERT INTO indexer.movement")
        ):
            self.duel = False
            if rng.random() < 0.3:
                return self.at_statement(link, "F90 killed in a transaction")
            self.loop.call_soon(self._stands_still, link)
            return None
        name = self.accident(sql, rng.random() / self.chaos, in_transaction=link.status == "T")
        return None if name is None else self.at_statement(link, name)

    def accident(self, sql: str, chance: float, *, in_transaction: bool) -> str | None:
        """Which accident befalls this statement, if any."""
        if sql.startswith("COMMIT"):
            if chance < 0.004:
                return "F91 COMMIT lost"
            if chance < 0.012:
                return "F91 COMMIT unacknowledged"
            if chance < 0.016:
                return "F90 killed at COMMIT"
            if chance < 0.019:
                return "F92 serialization failure"
        elif in_transaction:
            if chance < 0.0008:
                return "F92 deadlock"
            if chance < 0.0014:
                return "F96 disk full"
            if chance < 0.0022:
                return "F90 killed in a transaction"
            if chance < 0.003:
                return "F94 frozen in a transaction"
        return None

    def at_statement(self, link: Link, name: str) -> str | bytes | None:
        self.strike(name)
        match name:
            case "F91 COMMIT lost":
                return "lost"
            case "F91 COMMIT unacknowledged":
                return "unacknowledged"
            case "F92 serialization failure":
                return failure("40001", "could not serialize access")
            case "F92 deadlock":
                return failure("40P01", "deadlock detected")
            case "F96 disk full":
                return failure("53100", "could not extend file: No space left on device")
            case "F94 frozen in a transaction":
                self.loop.call_soon(self._freezes, link.process)
                return None
            case _:
                return self._dies(link, after=self.server.rng.random() < 0.5)

    def _freezes(self, process: Process) -> None:
        """Stands still where it is, and another may take over."""
        if process in self.processes and process.runs:
            process.freeze()
            if len(self.processes) < 2:
                self.start()
            self._later(self.rng.choice([1.0, 8.0, 40.0]), process.thaw)

    def _stands_still(self, link: Link) -> None:
        """With an event half stored, while another takes over and the event's block is undone; then it goes on."""
        process, task = link.process, link.application.removeprefix("indexer:")
        if process not in self.processes or not process.runs:
            return
        self.strike("F94 frozen in a transaction")
        self.strike("F94 a lease lapses")
        process.freeze()
        if len(self.processes) < 3:  # one that is new asks at once
            self.start()
        self.server.set_clock()
        self.server.ask(
            f"UPDATE indexer.lease SET until = clock_timestamp() - interval '1 second' WHERE task = '{task}'"
        )
        self._later(0.3, lambda: self.story.reorganise(self.story.depth_of_an_event() + 8, 2, again=0.4))
        self._later(self.rng.choice([1.0, 2.0, 4.0]), process.thaw)

    def _dies(self, link: Link, *, after: bool) -> str:
        process = link.process
        assert process is not None

        def die() -> None:
            if process in self.processes and process.state != "dead":
                self.kill(process)
                self._later(self.rng.choice([0.1, 3.0]), self._ensure)

        self.loop.call_soon(die)
        return "unacknowledged" if after else "lost"

    # ------------------------------------------------------------------ one run

    async def run(self) -> list[str]:
        loop, story, rng = self.loop, self.story, self.rng
        async with AsyncExitStack() as stack:
            story.found()
            genesis = Hash32(story.chain.canonical[0].hash)
            schedules.BASE[CHAIN_ID, genesis] = Schedule(story.chain.time_s, FIRST_FAST)  # type: ignore[index]
            for _ in range(self.endpoints):
                self.nodes.append(await stack.enter_async_context(FakeNode(chain=story.chain)))
            await stack.enter_async_context(self.receiver.open())
            if self.partners:
                self.sections = await self.partners.open(stack)
            self.database = await Database.connect(self.url, pool_size=3, check_schema=False)
            self.config = self.configuration()
            self.server.meddle = self.meddle
            tasks = [asyncio.create_task(story.live(), name="chain")]
            self.start()
            if rng.random() < 0.3:
                self.start()
            while not await self.database.pool.fetchval("SELECT count(*) FROM indexer.chain"):
                await asyncio.sleep(0.5)
            until = loop.now + rng.uniform(*ACTIVE)
            self.sick_receiver, self.slow_receiver = rng.choice([0.0, 0.1, 0.4]), rng.choice([0.0, 0.1])
            await asyncio.gather(*(asyncio.create_task(trouble) for trouble in self.troubles(until)))
            wrong = await self.rest()
            for task in tasks:
                task.cancel()
            return wrong

    def troubles(self, until: float) -> list[Coroutine[Any, Any, None]]:
        """What happens at once, until then."""
        troubles = [self.commerce(until), self.unrest(until)]
        if self.rng.random() < 0.75 and self.crash_at is None:
            troubles.append(self.misfortune(until))
        if self.temper.duels and self.crash_at is None:
            troubles.append(self.duels(until))
        if self.temper.outages:
            troubles.append(self.outages(until))
        if self.temper.liar is not None and len(self.nodes) > 1:
            troubles.append(faults.deceive(self, self.temper.liar, until))
        if self.rng.random() < 0.75:
            troubles.append(faults.sicken(self, until))
        if self.partners:
            troubles += [self.partners.trade(until), self.partners.storms(until)]
        return troubles

    async def rest(self) -> list[str]:
        """The faults cease; the chain goes on until all is finalized; then everything must be as the truth says."""
        story = self.story
        self.calm = True
        story.halted = False
        for node in self.nodes:
            await faults.recover(self, node)
        if self.partners:
            self.partners.calm()
        self.network.slow = 0.1
        for process in list(self.processes):
            process.thaw()
        await asyncio.sleep(30.0)
        self._ensure()
        for _ in range(20):
            if not story.waiting:
                break
            await asyncio.sleep(1.0)
        deadline = max((int(leg["deadline"]) for each in story.operations for leg in each.legs), default=0)
        await asyncio.sleep(max(0.0, deadline + 2 - self.loop.wall))
        wrong: list[str] = []
        if story.finality_stands and story.demand.confidence != "finalized":
            # to be right takes no finality, but where only a look at finalized blocks puts a lie right
            wrong = await self.settle(self.judge_claims if self.lied_to else self.judge)
        story.finality_stands = False
        wrong = wrong or await self.settle(self.judge)
        return [*wrong, await self.situation()] if wrong else []

    @property
    def lied_to(self) -> bool:
        """Whether there may be something that only a look at finalized blocks puts right."""
        return self.liar is not None or any(name[:2] in ("F3", "F4", "F5", "F7") for name in self.struck)

    async def judge_claims(self) -> list[str]:
        async with self.database.pool.acquire() as conn:
            return await oracle.judge_claims(conn)

    async def settle(self, judge: Callable[[], Awaitable[list[str]]]) -> list[str]:
        """Blocks in bursts, so that endpoints stay alive and seeds cheap, until all is as it must be: what is not, after a while."""
        story, began, wrong = self.story, self.loop.now, ["never judged"]
        while wrong and self.loop.now < began + self.quiet:
            story.halted = False
            await asyncio.sleep(0.5)
            story.halted = True
            story.chain.safe = story.chain.head.number
            if not story.finality_stands:
                story.chain.finalized = story.chain.safe
            story.remember()
            await asyncio.sleep(9.5)
            wrong = await judge()
        return wrong

    async def situation(self) -> str:
        """For people: where the chain and its tasks stand when a seed has failed."""
        async with self.database.pool.acquire() as conn:
            chain = await conn.fetchrow(
                "SELECT head_number, safe_number, finalized_number, agreed_number, quorum, mode, latch, endpoints FROM indexer.chain"
            )
            leases = await conn.fetch("SELECT task, epoch, until > clock_timestamp() AS held FROM indexer.lease")
        return f"at the end: the chain's head {self.story.chain.head.number}; ours {dict(chain or {})}; leases {[tuple(row) for row in leases]}"

    async def judge(self) -> list[str]:
        story = self.story
        async with self.database.pool.acquire() as conn:
            wrong = oracle.judge_facts(story.truth(), await oracle.read_facts(conn, CHAIN_ID))
            wrong += await oracle.judge_database(conn)
            expected = {each.reference: story.expected(each) for each in story.operations}
            if self.partners:
                expected |= self.partners.expected()
            states = await oracle.read_states(conn, BRAND)
            wrong += oracle.judge_states(expected, states) + story.judge_twins(states)
            told, wrong_partners = await self._told_ready(conn)
            wrong += wrong_partners
            wrong += oracle.judge_ready(told, story.moments, grace=faults.GRACE)
            wrong += await self._judge_reverted(conn)
            wrong += await self._judge_expired(conn)
            wrong += await self._judge_deliveries(conn)
            unnumbered = await conn.fetchval("SELECT count(*) FROM indexer.outbox WHERE sequence IS NULL")
            if unnumbered:
                wrong.append(f"{unnumbered} signals have no number")
        return wrong

    async def _told_ready(self, conn: asyncpg.Connection) -> tuple[list[oracle.Ready], list[str]]:
        rows = await conn.fetch(
            "SELECT payload, extract(epoch FROM created_at)::float8 AS at FROM indexer.outbox"
            " WHERE type IN ('operation.ready', 'operation.restored') ORDER BY position"
        )
        legs = {each.reference: each.legs for each in self.story.operations}
        told, wrong = [], []
        for row in rows:
            data = row["payload"]["data"]
            reference = data["operation"]["reference"]
            if reference not in legs:
                assert self.partners is not None
                wrong += self.partners.judge_ready(reference, row["at"])
                continue
            bases = tuple(
                oracle.Basis(
                    {
                        k: v
                        for k, v in legs[reference][found["leg"]].items()
                        if k not in ("chainId", "deadline", "match")
                    },
                    bytes.fromhex(found["blockHash"][2:]),
                    found["logIndex"],
                    self.story.demand,
                )
                for found in data["evidence"]
            )
            told.append(oracle.Ready(reference, round(row["at"], 6), bases))
        return told, wrong

    async def _judge_reverted(self, conn: asyncpg.Connection) -> list[str]:
        """Nothing is taken back that stood all the time."""
        rows = await conn.fetch(
            "SELECT r.payload, extract(epoch FROM r.created_at)::float8 AS told, extract(epoch FROM t.created_at)::float8 AS taken"
            " FROM indexer.outbox r JOIN indexer.outbox t ON t.supersedes = r.id"
        )
        wrong = []
        for row in rows:
            data = row["payload"]["data"]
            if data["operation"]["reference"].startswith("partner"):
                continue
            blocks = {(bytes.fromhex(each["blockHash"][2:]), each["logIndex"]) for each in data["evidence"]}
            times = [moment for moment in self.story.moments if row["told"] - faults.GRACE <= moment.at <= row["taken"]]
            if all(blocks <= moment.events.keys() for moment in times):
                wrong.append(f"{data['operation']['reference']} was taken back, and its evidence stood all the time")
        return wrong

    async def _judge_expired(self, conn: asyncpg.Connection) -> list[str]:
        rows = await conn.fetch(
            "SELECT payload, extract(epoch FROM created_at)::float8 AS at FROM indexer.outbox"
            " WHERE type IN ('operation.expired', 'operation.incomplete')"
        )
        told = []
        for row in rows:
            data = row["payload"]["data"]
            if data["operation"]["reference"].startswith("partner"):
                continue
            settled = {found["leg"] for found in data["evidence"]}
            ends = [
                int(leg["deadline"])
                for place, leg in enumerate(data["operation"]["legs"])
                if place not in settled and leg["deadline"] != "0"
            ]
            told.append(oracle.Expiry(data["operation"]["reference"], round(row["at"], 6), min(ends, default=None)))
        return oracle.judge_expired(told, self.story.moments, self.story.chain.time_ms)

    async def _judge_deliveries(self, conn: asyncpg.Connection) -> list[str]:
        known = {row["id"] for row in await conn.fetch("SELECT id FROM indexer.outbox")}
        requests = [each for each in self.receiver.requests if each.path == "/hook"]
        received = [(each.id, UUID(each.operation), each.sequence) for each in requests if each.operation]
        wrong = oracle.judge_received(received, known)
        taken_back = {
            row["supersedes"]: row["at"] + LEASE
            for row in await conn.fetch(
                "SELECT supersedes, extract(epoch FROM created_at)::float8 AS at FROM indexer.outbox WHERE supersedes IS NOT NULL"
            )
        }
        wrong += oracle.judge_deliveries(
            await oracle.read_deliveries(conn, "shop"),
            {each.id for each in requests},
            taken_back,
            most_attempts=13,
            cut_off=100,
            dead_allowed=False,
            taken=self.taken,
        )
        if self.receiver.overlaps > 0 and not self.struck["F94 frozen"]:
            wrong.append(f"{self.receiver.overlaps} times two attempts for one operation ran at once")
        return wrong


def figures(world: World) -> dict[str, Any]:
    return {
        "temper": world.temper.words,
        "demand": world.story.demand.confidence,
        "nodes": f"{world.endpoints}{'p' if world.polling else 's'}",
        "virtual_seconds": round(world.loop.now, 1),
        "steps": world.loop.steps,
        "round_trips": world.server.round_trips,
        "blocks": world.story.chain.head.number,
        "operations": len(world.story.operations),
        "reorganised": world.story.reorganised,
        "deepest": world.story.deepest,
        "processes": world.born,
        "kills": world.kills,
        "requests": sum(node.requests for node in world.nodes),
        "deliveries": len(world.receiver.requests),
    }
