"""What a seed makes happen on the chain and at the brand: registrations, signed actions, reorganisations, and the truth of it all.

The truth is kept beside the product, in plain Python: which events are canonical, how deep they are, and from when to when.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from tests.fake_node import Block, FakeChain, TxSpec
from tests.following import FACTORY, FACTORY2, ISSUER, created, issued, loyalty_id, noise, token_of, transferred
from tests.oracle import Demand, Event, Facts, Moment
from tests.simulation.seeded.loop import EPOCH, VirtualLoop
from tests.simulation.seeded.temper import Temper
from tests.truth import Contracts, _announced, _load_events, facts_of

CHAIN_ID = 84532
BRAND = "bloom"
FIRST_FAST = 20
ABI = Path(__file__).parents[3] / "contracts_abi"
EVENTS = _load_events(ABI)
CREATED = created(1)[1][0]
CONTRACTS = Contracts(frozenset([FACTORY]))


def hexa(raw: bytes) -> str:
    return "0x" + raw.hex()


@dataclass(eq=False)
class Action:
    """One signed action: what its event will say, if it is ever mined."""

    nonce: int
    programme: int
    amount: int
    holder: bytes
    redeem: bool
    deadline: int = 0  # Unix seconds; after it the contract refuses

    @property
    def hash(self) -> bytes:
        return hashlib.sha256(b"op%d" % self.nonce).digest()

    def log(self) -> Any:
        return issued(
            self.nonce, self.programme, self.amount, redeem=self.redeem, holder=self.holder, operation_hash=self.hash
        )

    def terms(self) -> dict[str, Any]:
        """As a leg states them."""
        return {
            "kind": "loyfin.redemption" if self.redeem else "loyfin.issuance",
            "chainId": str(CHAIN_ID),
            "factory": hexa(FACTORY),
            "issuer": hexa(ISSUER),
            "holder": hexa(self.holder),
            "loyaltyId": hexa(loyalty_id(self.programme)),
            "amount": str(self.amount),
            "expiresAt": "0",
            "deadline": str(self.deadline),
        }


@dataclass
class Tx:
    """A transaction on its way into blocks: it may be undone, and come again, or not."""

    spec: TxSpec
    deadline: int = 0
    actions: tuple[Action, ...] = ()


@dataclass(eq=False)
class Expected:
    """One operation of the brand, and what has been done with it."""

    reference: str
    legs: list[dict[str, Any]]
    demand: Demand
    id: str = ""
    cancelled: bool = False
    receipts: set[int] = field(default_factory=set)  # of generations that were ready
    requested_at: str | None = None


class Story:
    """The chain lives by the virtual clock. `calm` ends everything that would disturb the end."""

    def __init__(self, loop: VirtualLoop, seed: int, temper: Temper) -> None:
        self.loop, self.rng, self.temper = loop, random.Random(f"story {seed}"), temper
        rng = self.rng
        self.past = 20 + 5 * rng.choice([4, 20, 60])
        self.chain = FakeChain(
            CHAIN_ID, time_s=int(EPOCH) - 2 * FIRST_FAST - (self.past - FIRST_FAST) // 5, first_fast_block=FIRST_FAST, deposits=True
        )  # fmt: skip
        self.demand = rng.choice(
            [Demand("included"), Demand("confirmed", 3.0), Demand("safe"), Demand("safe"), Demand("finalized")]
        )
        if temper.restless and self.demand.confidence == "finalized":  # nothing could be undone
            self.demand = Demand("included")
        self.safe_lag, self.finalized_lag = rng.randint(10, 40), rng.randint(60, 200)
        self.finality_stands = temper.slow_finality
        self.operations: list[Expected] = []
        self.moments: list[Moment] = []
        self.events: dict[tuple[bytes, int], Event] = {}
        self.by_block: dict[bytes, dict[tuple[bytes, int], Event]] = {}
        self.txs: dict[bytes, list[Tx]] = {}  # by block hash
        self.waiting: list[tuple[float, Tx]] = []  # not before (virtual seconds)
        self.signed: list[Action] = []
        self.nonces = iter(range(1, 1_000_000))
        self.holders = [bytes([0x40 + i]) * 20 for i in range(3)]
        self.halted = False
        self.done = asyncio.Event()
        self.programmes = 2
        self.tokens = {token_of(n): n for n in range(1, 60)}
        self.reorganised = 0
        self.deepest = 0

    # ------------------------------------------------------------------ the chain

    def found(self) -> None:
        """The chain's past, with events that nobody waits for yet."""
        rng = self.rng
        while self.chain.head.number < self.past:
            n = self.chain.head.number
            txs: list[Tx] = []
            if n == 2:
                txs = [Tx(created(1)), Tx(noise())]
            elif n == 5:
                txs = [Tx([transferred(2), created(2), transferred(2)])]  # a token that speaks before its factory does
            elif n > 5 and rng.random() < 0.06:
                txs = [Tx(self.action().log())]
            elif n > 5 and rng.random() < 0.05:
                txs = [Tx(rng.choice([transferred(1), transferred(2), self.lookalike()]))]
            self.mine(txs)
        head = self.chain.head.number
        self.chain.safe, self.chain.finalized = max(0, head - self.safe_lag), max(0, head - self.finalized_lag)
        self.remember()

    def action(self, **given: Any) -> Action:
        rng = self.rng
        fields: dict[str, Any] = {
            "nonce": next(self.nonces),
            "programme": rng.randint(1, self.programmes),
            "amount": rng.choice([10, 20, 250]),
            "holder": rng.choice(self.holders),
            "redeem": rng.random() < 0.5,
        }
        self.signed.append(Action(**{**fields, **given}))
        return self.signed[-1]

    def lookalike(self) -> Any:
        """What somebody else says in our words: another factory, or a stranger, about a nonce of ours."""
        nonce, choice = self.rng.randint(1, 60), self.rng.random()
        if choice < 0.3:
            return issued(nonce, 1, 10, FACTORY2)
        if choice < 0.6:
            return issued(nonce, 1, 10, FACTORY, emitter=b"\x66" * 20)
        return issued(nonce, 2, 10, FACTORY, emitter=token_of(1))  # a token that speaks for another programme

    def mine(self, txs: list[Tx]) -> Block:
        number = len(self.chain.canonical)
        second = self.chain.time_ms(number) // 1000
        txs = [tx if self._possible(tx, txs) else Tx([], tx.deadline) for tx in txs]
        kept = [
            tx if not tx.deadline or second <= tx.deadline else Tx([], tx.deadline) for tx in txs
        ]  # too late: refused
        block = self.chain.mine([tx.spec for tx in kept])
        self.txs[block.hash] = kept
        self._learn(block)
        return block

    def _possible(self, tx: Tx, beside: list[Tx]) -> bool:
        """A token that was not made yet, on this branch, can do nothing."""
        speakers = {log[0] for log in _logs_of(tx)} & self.tokens.keys()
        if not speakers:
            return True
        made = [log for other in beside for log in _logs_of(other)]
        for number in self.chain.loud:
            made += self.chain.canonical[number].entries
        there = {(log[0], log[1][0], log[1][-1]) for log in made if log[1]}
        return all((FACTORY, CREATED, loyalty_id(self.tokens[token])) in there for token in speakers)

    def _learn(self, block: Block) -> None:
        """The movements of a block, as the chain itself tells them."""
        found: dict[tuple[bytes, int], Event] = {}
        for address, topics, encoded in block.entries:
            if address != FACTORY or len(topics) != 4:
                continue
            log = msgspec.json.decode(encoded)
            for (_, _, index, _), fields in facts_of([log], EVENTS, CONTRACTS, {}).items():
                if "kind" not in fields:
                    continue
                terms = {
                    "kind": fields["kind"],
                    "factory": hexa(fields["factory"]),
                    "issuer": hexa(fields["issuer"]),
                    "holder": hexa(fields["holder"]),
                    "loyaltyId": hexa(fields["loyalty_id"]),
                    "amount": str(fields["amount"]),
                    "expiresAt": str(fields["bucket"]),
                    "nonce": hexa(fields["nonce"]),
                    "operationHash": hexa(fields["operation_hash"]) if fields["operation_hash"] else None,
                }
                found[block.hash, index] = Event(
                    block.hash, index, block.number, self.chain.time_ms(block.number), terms
                )
        if found:
            self.by_block[block.hash] = found
            self.events = {**self.events, **found}

    def remember(self) -> None:
        self.moments.append(
            Moment(
                round(self.loop.wall, 6),
                self.events,
                self.chain.time_ms(self.chain.head.number),
                self.chain.safe or 0,
                self.chain.finalized or 0,
            )
        )

    def send(self, tx: Tx, after: float = 0.0) -> None:
        self.waiting.append((self.loop.now + after, tx))

    async def live(self) -> None:
        """Blocks as they fall due, for ever."""
        due_tags = self.loop.now
        while True:
            due = self.chain.time_ms(len(self.chain.canonical)) / 1000 - EPOCH
            if due > self.loop.now or self.halted:
                await asyncio.sleep(max(due - self.loop.now, 0.2))
            if self.halted:
                continue
            while self.chain.time_ms(len(self.chain.canonical)) / 1000 - EPOCH <= self.loop.now + 1e-9:
                ready = [tx for at, tx in self.waiting if at <= self.loop.now]
                self.waiting = [each for each in self.waiting if each[0] > self.loop.now]
                self.mine(ready)
            if self.loop.now >= due_tags:
                due_tags = self.loop.now + self.rng.choice([2.0, 5.0, 9.0])
                self.raise_tags()
            self.remember()

    def raise_tags(self) -> None:
        head = self.chain.head.number
        self.chain.safe = max(self.chain.safe or 0, head - self.safe_lag)
        if self.rng.random() < 0.6 and not self.finality_stands:
            self.chain.finalized = min(self.chain.safe, max(self.chain.finalized or 0, head - self.finalized_lag))

    def reorganise(self, depth: int, grow: int = 0, *, again: float = 0.75) -> None:
        """The newest blocks are undone, not below finalized. Their transactions come again elsewhere, refused, or never."""
        rng = self.rng
        depth = min(depth, self.chain.head.number - (self.chain.finalized or 0) - 1)
        if depth < 1:
            return
        self.reorganised += 1
        self.deepest = max(self.deepest, depth)
        ancestor = self.chain.head.number - depth
        lost: list[Tx] = []
        for block in self.chain.canonical[ancestor + 1 :]:
            lost += [tx for tx in self.txs.get(block.hash, []) if tx.spec]
            self._forget(block)
        self.chain._salt += 1
        self.chain._cut(ancestor + 1)
        self.chain.safe = min(self.chain.safe or 0, ancestor)
        blocks: list[list[Tx]] = [[] for _ in range(max(0, depth + grow))]
        for tx in lost:
            fate = rng.random()
            if fate < again:
                (rng.choice(blocks) if blocks and rng.random() < 0.8 else blocks_later(self)).append(tx)
            elif fate < again + 0.1 and blocks:
                rng.choice(blocks).append(Tx([], tx.deadline))  # included, and reverted
        told, self.chain.followers = self.chain.followers, [] if self.temper.terse else self.chain.followers
        for place, txs in enumerate(blocks):
            rng.shuffle(txs)
            if place == len(blocks) - 1:
                self.chain.followers = told
            self.mine(txs)
        self.chain.followers = told
        self.loop.note("reorganised", depth, grow)
        self.remember()

    def wishes(self) -> list[Any]:
        """Logs that would settle what nothing on the chain settles, for somebody to dream of."""
        there = {event.terms["nonce"] for event in self.events.values()}
        return [action.log() for action in self.signed[-12:] if hexa(action.nonce.to_bytes(32, "big")) not in there][
            -4:
        ]

    def depth_of_an_event(self, rng: random.Random | None = None) -> int:
        """How deep a reorganisation must be to begin with a block that holds a movement, the newest one or any; 0 where there
        is none to undo."""
        floor = self.chain.finalized or 0
        found = [event.block_number for event in self.events.values() if event.block_number > floor + 1]
        return self.chain.head.number - (rng.choice(found) if rng else max(found)) + 1 if found else 0

    def _forget(self, block: Block) -> None:
        if block.hash in self.by_block:
            self.events = {key: event for key, event in self.events.items() if key[0] != block.hash}

    async def there_and_back(self) -> None:
        """A → B → A: the first branch wins after all, within a second or two."""
        head = self.chain.head
        depth = min(self.rng.choice([1, 2, 5]), head.number - (self.chain.finalized or 0) - 1)
        if depth < 1:
            return
        self.reorganise(depth, again=0.5)
        await asyncio.sleep(self.rng.choice([0.0, 0.1, 0.7, 2.0]))
        if (self.chain.finalized or 0) >= head.number - depth:
            return
        fork = head.number - depth
        for block in self.chain.canonical[fork + 1 :]:
            self._forget(block)
        self.chain.switch_to(head.hash)
        self.chain.safe = min(self.chain.safe or 0, fork)
        self.waiting = []
        for block in self.chain.canonical[fork + 1 :]:
            if block.hash in self.by_block:
                self.events = {**self.events, **self.by_block[block.hash]}
        self.loop.note("there and back", depth)
        self.remember()

    # ------------------------------------------------------------------ the end

    def truth(self) -> Facts:
        """What the canonical rows must be, up to the head."""
        logs = [
            msgspec.json.decode(encoded)
            for number in self.chain.loud
            for _, _, encoded in self.chain.canonical[number].entries
        ]
        return facts_of(logs, EVENTS, CONTRACTS, _announced(logs, EVENTS, CONTRACTS))

    def expected(self, operation: Expected) -> set[str]:
        """The states that the truth allows at rest, when all of it is safe: what is not finalized may stay undecided."""
        states = self._expected(operation)
        if self.finality_stands and not states & {"ready", "fulfilled"}:
            states |= {"reverted"}  # what it rested on may come back
        return states

    def _expected(self, operation: Expected) -> set[str]:
        settled = conflict = 0
        dead = False
        now = self.chain.time_ms(self.chain.finalized or 0) // 1000
        for leg in operation.legs:
            kind, nonce, digest = leg["kind"], leg.get("nonce"), leg.get("operationHash")
            events = [event for event in self.events.values() if event.terms["kind"] == kind]
            if nonce is not None:
                found = [event for event in events if event.terms["nonce"] == nonce]
            elif digest is not None:
                found = [event for event in events if event.terms["operationHash"] == digest]
            else:
                found = [e for e in events if e.terms["amount"] == leg["amount"] and e.terms["holder"] == leg["holder"]]
            equal = [
                event for event in found if all(event.terms.get(k) == v for k, v in leg.items() if k in event.terms)
            ]
            if "match" in leg and bool(equal) and len(self.twins_of(leg)) > len(equal):
                return {"ready", "fulfilled", "pending", "reverted"}  # one of several: `judge_twins` counts them
            settled += bool(equal)
            conflict += bool(found) and not equal and "match" not in leg
            dead |= not found and leg["deadline"] != "0" and int(leg["deadline"]) < now
        if conflict:  # a leg by hash that is closed already has no conflict any more (rule 3)
            return (
                {"conflict", "cancelled"} if operation.cancelled and "nonce" not in operation.legs[0] else {"conflict"}
            )
        if operation.cancelled:
            return {"conflict"} if settled else {"cancelled"}
        if settled == len(operation.legs):
            return {"fulfilled"} if operation.receipts else {"ready"}
        if settled:
            return {"incomplete"} if dead else {"reverted"} if operation.receipts else {"confirming"}
        return {"expired"} if dead else {"reverted"} if operation.receipts else {"pending"}

    def twins_of(self, leg: dict[str, Any]) -> list[Expected]:
        """The operations of one leg that wait for the same as this one, by wallet and amount."""
        terms = ("kind", "holder", "loyaltyId", "amount", "match")
        return [
            each
            for each in self.operations
            if len(each.legs) == 1 and all(each.legs[0].get(term) == leg.get(term) for term in terms)
        ]

    def judge_twins(self, states: dict[str, str]) -> list[str]:
        """Of those that only wallet, amount and time tell, as many are settled as there are movements."""
        wrong = []
        for operation in self.operations:
            leg = operation.legs[0]
            twins = self.twins_of(leg) if "match" in leg else []
            if len(twins) < 2 or twins[0] is not operation:
                continue
            found = [
                e for e in self.events.values() if all(e.terms.get(k) == v for k, v in leg.items() if k in e.terms)
            ]
            settled = [each.reference for each in twins if states.get(each.reference) in ("ready", "fulfilled")]
            if len(settled) != min(len(found), len(twins)):
                wrong.append(f"{len(found)} movements for {[each.reference for each in twins]} settle {settled}")
        return wrong


def _logs_of(tx: Tx) -> list[Any]:
    return list(tx.spec) if isinstance(tx.spec, list) else [tx.spec]


def blocks_later(story: Story) -> list[Tx]:
    """A place for one transaction that comes again in a later block."""

    class Later(list):  # type: ignore[type-arg]
        def append(self, tx: Tx) -> None:
            story.send(tx, story.rng.uniform(0.2, 6.0))

    return Later()


def rfc3339(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).isoformat().replace("+00:00", "Z")


__all__ = ["BRAND", "CHAIN_ID", "Action", "Expected", "Story", "Tx", "created", "rfc3339", "token_of", "transferred"]
