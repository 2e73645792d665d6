"""Long, random lives of a brand on a restless chain, settled step by step and judged by the oracle.

Every story is seeded: a failure names its seed and is the same again. A small reading of the design's rules, for operations
of one leg each, says after each step where every operation must stand.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from indexer.model.confidence import Level, Policy
from indexer.settlement.reconciler import reconcile
from indexer.settlement.rules import BrandRules
from indexer.store.signals import number
from tests.oracle import Basis, Demand, Event, Moment, Ready, judge_database, judge_ready, judge_states, read_signals
from tests.world import BASE_MS, BRAND, World, digest, hexa

TERMS = ("kind", "issuer", "holder", "loyaltyId", "amount")
DEMANDS = {
    "included": (Policy(Level.INCLUDED), Demand("included")),
    "confirmed": (Policy(Level.CONFIRMED, seconds=4), Demand("confirmed", 4)),
    "safe": (Policy(Level.SAFE), Demand("safe")),
    "finalized": (Policy(Level.FINALIZED), Demand("finalized")),
}
HASHES = [digest("shared", number) for number in range(3)]


@dataclass
class Mined:
    """An event of the true chain: where, in which fork, under which terms."""

    block: int
    index: int
    fork: str
    terms: dict[str, Any]

    @property
    def block_hash(self) -> bytes:
        return digest(self.fork, self.block)


@dataclass
class Expected:
    """One single-leg operation with a nonce of its own, and where the design says it stands."""

    id: UUID
    leg: dict[str, Any]
    state: str = "pending"
    receipts: bool = False
    cancelled: bool = False
    closed: bool = False
    lost_at: int = -1
    verdicts: dict[str, bool] = field(default_factory=dict)

    def look(self, event: Mined | None, deep: bool, dead: bool, finalized: int) -> None:
        """What one look makes of the facts: section 5's table, for one leg."""
        equal = event is not None and all(event.terms.get(term) == self.leg.get(term) for term in TERMS)
        word = self.verdicts.get("event")
        standing = self.state in ("ready", "fulfilled")
        accepted = event is not None and word is True
        claimed = event is not None and word is not False and (equal or accepted)
        settled = claimed and deep
        if standing and self.receipts:
            self.state = "fulfilled"
        if standing and not settled:
            self.state = "reverted"
        differs = event is not None and word is None and not equal
        late = settled and (self.closed or self.cancelled) and not accepted
        if differs or late:
            self.state = "conflict"
        elif settled:
            self.state = "fulfilled" if self.receipts else "ready"
        elif self.state in ("expired", "cancelled"):
            pass
        elif self.cancelled:
            self.state, self.closed = "cancelled", True
        elif self.closed:
            self.state = "expired"
        elif claimed:
            self.state = self.state if self.state == "reverted" and self.receipts else "confirming"
        elif dead:
            self.state, self.closed = "expired", True
        elif self.state == "reverted":
            if not self.receipts and finalized >= self.lost_at:
                self.state = "pending"
        else:
            self.state = "pending"
        if self.state in ("ready", "fulfilled") and event is not None:
            self.lost_at = event.block


class Story:
    """A brand, a chain and a seeded course of events; `truth` is kept beside the database, in plain Python."""

    def __init__(self, world: World, seed: int, demand: str) -> None:
        self.world, self.random, self.seed = world, random.Random(seed), seed
        self.demand = DEMANDS[demand][1]
        self.own: list[Expected] = []  # by nonce: their state is known at every step
        self.others: list[UUID] = []  # by hash or wallet: judged by the rules of traces alone
        self.legs: list[dict[str, Any]] = []
        self.mined: list[Mined] = []
        self.head, self.safe, self.finalized, self.fork = 0, 0, 0, 0
        self.moments: list[Moment] = []

    # ------------------------------------------------------------------ what may happen

    async def register(self) -> None:
        # deadlines lie a few blocks ahead, or nowhere
        ahead = self.random.choice([None, None, 10, 40])
        last = None if ahead is None else str((BASE_MS + 200 * (self.head + ahead)) // 1000)
        amount = self.random.choice(["100", "250"])
        kind = self.random.choice(["nonce", "nonce", "nonce", "operation_hash", "wallet_amount"])
        if kind == "nonce":
            leg = self.world.leg(nonce=hexa(self.world.nonce()), deadline=last, amount=amount)
            self.own.append(Expected(await self.world.register(leg), leg))
        elif kind == "operation_hash":
            leg = self.world.leg(operationHash=hexa(self.random.choice(HASHES)), amount=amount)
            self.others.append(await self.world.register(leg))
        else:
            leg = self.world.leg(match="wallet_amount", amount=amount)
            requested = datetime.fromtimestamp((BASE_MS + 200 * self.head) // 1000, UTC)
            at = requested.isoformat().replace("+00:00", "Z")
            self.others.append(await self.world.register(leg, requestedAt=at))
        self.legs.append(leg)
        if self.random.random() < 0.3:
            await self.mine()

    async def mine(self) -> None:
        """A new block with the event of some leg: now and then with other terms, or one that is on the chain already."""
        if not self.legs:
            return
        self.head += self.random.randint(1, 4)
        for index in range(self.random.choice([1, 1, 2])):
            terms = dict(self.random.choice(self.legs))
            if self.random.random() < 0.15:
                terms["amount"] = self.random.choice(["1", "250"])
            terms.setdefault("nonce", hexa(self.world.nonce()))
            by_nonce = "match" not in terms and "operationHash" not in terms
            if by_nonce and any(event.terms["nonce"] == terms["nonce"] for event in self.mined):
                continue  # the contract refuses a nonce that was used
            mined = Mined(self.head, index, str(self.fork), terms)
            self.mined.append(mined)
            await self.world.event(mined.block, terms, fork=mined.fork, index=index)
        await self.world.heads(head=self.head)

    async def reorganise(self) -> None:
        """Above some block above finalized everything is undone; some of it is mined again, at once or never."""
        if self.head <= self.finalized:
            return
        ancestor = self.random.randint(self.finalized, self.head - 1)
        lost = [event for event in self.mined if event.block > ancestor]
        self.mined = [event for event in self.mined if event.block <= ancestor]
        self.fork += 1
        await self.world.orphan(ancestor)
        self.safe = min(self.safe, ancestor)
        block = ancestor
        for event in lost:
            if self.random.random() < 0.7:
                block += self.random.randint(1, 2)
                again = Mined(block, event.index, str(self.fork), event.terms)
                self.mined.append(again)
                await self.world.event(again.block, again.terms, fork=again.fork, index=again.index)
        self.head = max(self.head, block)
        await self.world.heads(head=self.head)

    async def advance(self) -> None:
        self.head += self.random.randint(1, 30)
        self.safe = self.random.randint(self.safe, self.head)
        if self.random.random() < 0.5:
            self.finalized = self.random.randint(self.finalized, self.safe)
        await self.world.cover(0, self.head)
        await self.world.heads(head=self.head, safe=self.safe, finalized=self.finalized)

    async def fulfil(self) -> None:
        ready = [operation for operation in self.own if operation.state in ("ready", "reverted", "confirming")]
        for operation in self.random.sample(ready, min(1, len(ready))):
            generation = (await self.world.operation(operation.id))["generation"]
            if generation:
                await self.world.fulfil(operation.id, self.random.randint(1, generation))
                operation.receipts = True
        for other in self.random.sample(self.others, min(1, len(self.others))):
            row = await self.world.operation(other)
            if row["state"] in ("ready", "reverted"):
                await self.world.fulfil(other, row["generation"])

    async def cancel(self) -> None:
        open_ = [operation for operation in self.own if operation.state in ("pending", "confirming")]
        for operation in self.random.sample(open_, min(1, len(open_))):
            await self.world.cancel(operation.id)
            operation.cancelled = True
        for other in self.random.sample(self.others, min(1, len(self.others))):
            if await self.world.state(other) in ("pending", "confirming") and self.random.random() < 0.3:
                await self.world.cancel(other)

    async def decide(self) -> None:
        accept = self.random.random() < 0.5
        contested = [operation for operation in self.own if operation.state == "conflict"]
        for operation in self.random.sample(contested, min(1, len(contested))):
            await self.world.decide(operation.id, await self.world.conflicting(operation.id), accept)
            operation.verdicts["event"] = accept
        for other in self.others:
            row = await self.world.operation(other)
            if row["state"] == "conflict" and row["detail"]["conflicts"]:
                try:
                    await self.world.decide(other, row["detail"]["conflicts"][0]["evidenceId"], accept)
                except asyncpg.PostgresError as refused:
                    assert refused.sqlstate == "LY409"  # it settles another operation by now
                break

    # ------------------------------------------------------------------ settling and judging

    async def settle(self) -> None:
        self.remember()
        small = self.random.choice([1, 2, 3, 200])  # whoever is looked at first, the end is the same
        for _ in range(self.random.randint(0, 4)):
            async with self.world.conn.transaction():
                await reconcile(self.world.conn, self.world.rules, {}, batch=small)
        await self.world.settle()
        for operation in self.own:
            last = operation.leg.get("deadline")
            event = next((m for m in self.mined if m.terms["nonce"] == operation.leg["nonce"]), None)
            # finalized history, which is all covered, has passed the deadline's second
            dead = last is not None and (BASE_MS + 200 * self.finalized) // 1000 > int(last) and self.covered
            operation.look(event, event is not None and self.deep(event), dead, self.finalized)
        actual = {str(o.id): await self.world.state(o.id) for o in self.own}
        assert not judge_states({str(o.id): o.state for o in self.own}, actual)

    @property
    def covered(self) -> bool:
        return self.finalized > 0

    def deep(self, event: Mined) -> bool:
        match self.demand.confidence:
            case "included":
                return True
            case "confirmed":
                return 200 * (self.head - event.block) >= 4_000 or event.block <= self.safe
            case "safe":
                return event.block <= self.safe
        return event.block <= self.finalized

    def remember(self) -> None:
        events = {
            (m.block_hash, m.index): Event(m.block_hash, m.index, m.block, BASE_MS + 200 * m.block, m.terms)
            for m in self.mined
        }
        at = float(len(self.moments))
        self.moments.append(Moment(at, events, BASE_MS + 200 * self.head, self.safe, self.finalized))

    async def told(self) -> list[Ready]:
        """What each `ready` of this step named as its evidence."""
        rows = await self.world.conn.fetch(
            "SELECT o.payload, o.id FROM indexer.outbox o WHERE o.type IN ('operation.ready', 'operation.restored')"
            " AND o.sequence IS NULL ORDER BY o.position"
        )
        found = []
        for row in rows:
            data = row["payload"]["data"]
            legs = data["operation"]["legs"]
            found.append(
                Ready(
                    data["operation"]["reference"],
                    self.moments[-1].at,
                    tuple(
                        Basis(
                            {term: legs[e["leg"]][term] for term in TERMS},
                            bytes.fromhex(e["blockHash"][2:]),
                            e["logIndex"],
                            self.demand,
                            e["basis"] == "decision",
                        )
                        for e in data["evidence"]
                    ),
                )
            )
        return found

    async def judge(self) -> None:
        wrong = judge_ready(await self.told(), self.moments, grace=0.5)
        async with self.world.conn.transaction():
            await number(self.world.conn)
        assert not wrong + await judge_database(self.world.conn)


@pytest.mark.parametrize("demand", DEMANDS)
@pytest.mark.parametrize("seed", range(4))
async def test_a_brands_life_on_a_restless_chain(owner_dsn: str, seed: int, demand: str) -> None:
    async with World.at(owner_dsn, {BRAND: BrandRules((DEMANDS[demand][0],))}) as world:
        story = Story(world, seed, demand)
        steps = [story.register, story.mine, story.reorganise, story.advance, story.fulfil, story.cancel, story.decide]
        weights = [5, 6, 3, 3, 3, 1, 2]
        for _ in range(60):
            for step in story.random.choices(steps, weights, k=story.random.choice([1, 1, 1, 2])):
                await step()
            await story.settle()
            await story.judge()
        told = {signal.type for signal in await read_signals(world.conn)}
        assert "operation.ready" in told


async def test_evidence_lost_below_finalized_does_not_leave_the_operation_reverted(owner_dsn: str) -> None:
    """The orphan and a finalized block beyond it are seen in one look: nothing is left to wait for."""
    async with World.at(owner_dsn, {BRAND: BrandRules((DEMANDS["included"][0],))}) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        await world.event(100, leg)
        await world.settle()
        await world.orphan(99)
        await world.heads(head=200, safe=150, finalized=140)
        assert await world.settle() == ["operation.reverted"]
        assert await world.walked(operation) == ["pending", "ready", "reverted", "pending"]


async def test_a_confirmed_demand_is_met_by_safe_without_waiting_for_its_seconds(owner_dsn: str) -> None:
    async with World.at(owner_dsn, {BRAND: BrandRules((Policy(Level.CONFIRMED, seconds=3600),))}) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        await world.register(leg)
        await world.event(100, leg)
        assert await world.settle() == ["operation.confirming"]
        await world.heads(head=101, safe=100)
        assert await world.settle() == ["operation.ready"]


async def test_evidence_accepted_before_it_is_deep_enough_reopens_a_cancelled_operation(owner_dsn: str) -> None:
    async with World.at(owner_dsn) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        await world.event(100, leg)
        await world.settle()
        await world.cancel(operation)
        await world.settle()
        evidence = (await world.operation(operation))["detail"]["evidence"][0]["evidenceId"]
        await world.decide(operation, evidence, True)
        await world.heads(head=200, safe=150)
        await world.settle()
        assert await world.trace(operation) == ["confirming", "cancelled", "conflict", "ready"]


async def test_one_leg_accepted_after_expiry_leaves_the_operation_incomplete_and_says_so(owner_dsn: str) -> None:
    async with World.at(owner_dsn, {BRAND: BrandRules((DEMANDS["included"][0],))}) as world:
        deadline = str((BASE_MS + 200 * 100) // 1000)
        legs = [world.leg(nonce=hexa(world.nonce()), deadline=deadline) for _ in range(2)]
        operation = await world.register(*legs)
        await world.cover(0, 1000)
        await world.heads(head=1000, safe=900, finalized=200)
        await world.settle()
        await world.event(99, legs[0])  # a second look found it after all
        await world.settle()
        await world.decide(operation, await world.conflicting(operation), True)
        await world.settle()
        assert await world.trace(operation) == ["expired", "conflict", "incomplete"]


async def test_a_closed_operation_says_again_that_it_is_closed_once_its_conflict_is_dismissed(owner_dsn: str) -> None:
    async with World.at(owner_dsn, {BRAND: BrandRules((DEMANDS["included"][0],))}) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        await world.cancel(operation)
        await world.settle()
        await world.event(100, leg)
        await world.settle()
        await world.decide(operation, await world.conflicting(operation), False)
        await world.settle()
        assert await world.trace(operation) == ["cancelled", "conflict", "cancelled"]


# --------------------------------------------------------------------------- neighbours: found by the stories above


async def test_evidence_that_a_dismissal_sets_free_goes_to_the_wallet_that_waits_for_it(owner_dsn: str) -> None:
    async with World.at(owner_dsn, {BRAND: BrandRules((DEMANDS["included"][0],))}) as world:
        leg = world.leg(operationHash=hexa(HASHES[0]))
        by_hash = await world.register(leg)
        by_wallet = await world.register(world.leg(match="wallet_amount"), requestedAt="2026-09-21T14:13:20Z")
        await world.cancel(by_hash)
        await world.settle()
        await world.event(10, leg)
        await world.settle()
        assert [await world.state(o) for o in (by_hash, by_wallet)] == ["conflict", "pending"]
        await world.decide(by_hash, await world.conflicting(by_hash), False)
        await world.settle()
        assert [await world.state(o) for o in (by_hash, by_wallet)] == ["cancelled", "ready"]


async def test_a_hash_goes_before_a_wallet_that_is_not_ready_yet(owner_dsn: str) -> None:
    async with World.at(owner_dsn) as world:
        wallet = await world.register(world.leg(match="wallet_amount"), requestedAt="2026-09-21T14:13:20Z")
        leg = world.leg(operationHash=hexa(HASHES[0]))
        await world.event(10, leg)
        await world.settle()
        assert await world.state(wallet) == "confirming"
        by_hash = await world.register(leg)
        await world.settle()
        assert [await world.state(o) for o in (wallet, by_hash)] == ["pending", "confirming"]


async def test_a_conflict_by_hash_follows_how_many_operations_it_can_mean(owner_dsn: str) -> None:
    async with World.at(owner_dsn, {BRAND: BrandRules((DEMANDS["included"][0],))}) as world:
        leg = world.leg(operationHash=hexa(HASHES[0]))
        first = await world.register(leg)
        await world.event(10, leg, amount="1")
        await world.settle()
        assert await world.state(first) == "conflict"
        second = await world.register(leg)  # now it could mean either
        await world.settle()
        assert [await world.state(o) for o in (first, second)] == ["pending", "pending"]
        await world.cancel(first)
        await world.settle()
        assert [await world.state(o) for o in (first, second)] == ["cancelled", "conflict"]
