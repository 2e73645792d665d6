"""The daemon is killed twenty times (SIGKILL) while operations settle and the chain reorganises; at the end the oracle judges.

Story and kills are drawn from one seed, told when it fails; `SEED=…` in the environment plays another one. What the daemon is
in the middle of when it dies is up to the machine: the same seed asks the same questions, it does not repeat a run.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from indexer.model.types import Hash32
from indexer.sandbox.actions import Signed
from indexer.sandbox.anvil import RpcRefused
from indexer.store.database import Database
from tests.acceptance.world import BLOCK_SECONDS, CHAIN_ID, SMALL, Ledger, Received, World, until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]

KILLS = 20
DEEPEST = 10  # blocks of a reorganisation
# A daemon that has just started settles by what the one before it had stored: what it says may be as old as the death.
GRACE = 12.0


@dataclass
class Story:
    """One operation's: what it is, what shall become of it, and what its transaction is."""

    reference: str
    amount: int
    redeem: bool
    # kept: nothing is done to it, but a reorganisation may pass by; remined: into the new branch at once; returned: some
    # blocks later; gone: never again; others have no transaction, or one that does not fit
    fate: str
    fulfil: bool = False
    deadline_in: int | None = None  # seconds
    signed: Signed[Any] | None = None
    tx: Hash32 | None = None

    @property
    def lives(self) -> bool:
        return self.tx is not None and self.fate != "gone"


class Killer:
    """Kills the daemon at a random moment and starts the next at once, again and again."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng, self.kills = world, rng, 0
        self.peace = asyncio.Lock()  # whoever holds it keeps the daemon of the moment alive

    async def run(self) -> None:
        daemon = self.world.daemons[-1]
        while self.kills < KILLS:
            if self.rng.random() < 0.3:
                await asyncio.sleep(self.rng.uniform(0.2, 2.0))  # while it starts
            else:
                await daemon.says("task begins", task=f"follow:{CHAIN_ID}")
                await asyncio.sleep(self.rng.uniform(0.0, 1.2))  # while it works
            assert daemon.process.returncode is None, f"ended by itself:\n{daemon.last_words()}"
            async with self.peace:
                await daemon.kill()
                self.kills += 1
                daemon = await self.world.start()

    async def reaches(self, kills: int) -> None:
        async def reached() -> bool:
            return self.kills >= kills

        await until(reached, f"{kills} kills", seconds=120)


class Teller:
    """Plays the operations' stories on the chain, and the brand's part over HTTP."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.stories: list[Story] = []
        self.outcomes: dict[str, list[str]] = {}  # of fulfilments, by reference
        self.depths: list[int] = []
        self.undone: list[str] = []  # references of those whose ready the shop had, and whose events never returned
        self._hands: set[asyncio.Task[None]] = set()
        world.shop.on_ready = self._on_ready

    # ---- the brand

    def _on_ready(self, got: Received) -> None:
        if any(story.fulfil for story in self.stories if story.reference == got.operation):
            hand = asyncio.create_task(self._fulfil(got))
            self._hands.add(hand)

    async def _fulfil(self, got: Received) -> None:
        outcome = await self.world.fulfil(got.operation, got.generation)
        self.outcomes.setdefault(got.operation, []).append(outcome)

    async def hands_are_idle(self) -> None:
        """Raises what went wrong in fulfilling."""
        for hand in list(self._hands):
            await hand
            self._hands.discard(hand)

    def new(self, fate: str, **given: Any) -> Story:
        small = self.rng.random() < 0.6
        story = Story(
            reference=f"{len(self.stories):02}-{fate}",
            amount=self.rng.randint(1, SMALL) if small else self.rng.randint(SMALL + 1, 500),
            redeem=self.rng.random() < 0.4,
            fate=fate,
            fulfil=self.rng.random() < 0.5,
        )
        for name, value in given.items():
            setattr(story, name, value)
        self.stories.append(story)
        return story

    async def register(self, story: Story) -> None:
        terms: dict[str, Any] = {}
        if story.deadline_in is not None:
            terms["deadline"] = await self.world.ledger.time() + story.deadline_in
        customer = self.rng.randrange(len(self.world.ledger.customers))
        story.signed = self.world.action(story.amount, redeem=story.redeem, customer=customer, **terms)
        stated = {"amount": str(story.amount + 1)} if story.fate == "misfit" else {}
        await self.world.register(story.reference, story.signed.action, **stated)

    async def submit(self, story: Story) -> None:
        assert story.signed is not None
        story.tx = await self.world.submit(story.signed)

    async def mined(self, *stories: Story) -> None:
        """Waits for them, and sends again what a reorganisation has dropped."""
        submitter = self.world.ledger.loyfin.submitter

        async def all_mined() -> bool:
            for story in stories:
                assert story.tx is not None
                if await submitter.receipt(story.tx) is None:
                    await submitter.resend(story.tx)
                    return False
            return True

        await until(all_mined, lambda: f"mined: {[story.reference for story in stories]}")

    # ---- episodes

    async def plain(self) -> None:
        stories = [self.new("kept") for _ in range(self.rng.randint(1, 2))]
        await asyncio.gather(*(self.register(story) for story in stories))
        for story in stories:
            await self.submit(story)

    async def reorganisation(self) -> None:
        """Whatever the daemon has seen of it."""
        stories = [self.new(self.rng.choice(["remined", "returned", "gone"])) for _ in range(self.rng.randint(2, 3))]
        for story in stories:
            if story.fate == "gone" and self.rng.random() < 0.5:
                story.deadline_in = 12
        await asyncio.gather(*(self.register(story) for story in stories))
        await self._submit_all(stories)
        await asyncio.sleep(self.rng.uniform(0.0, 0.8))
        await self._undo(stories)
        await self._bring_back(stories)

    async def believed(self, killer: Killer) -> None:
        """What the shop was told is undone: gone for ever, or back later, be the goods handed over or not."""
        async with killer.peace:
            await self.world.daemons[-1].says("task begins", task=f"follow:{CHAIN_ID}")
            stories = [
                self.new("gone", amount=self.rng.randint(1, SMALL), fulfil=False),
                self.new("returned", amount=self.rng.randint(1, SMALL), fulfil=True),
                self.new("returned", amount=self.rng.randint(1, SMALL), fulfil=self.rng.random() < 0.5),
            ]
            await asyncio.gather(*(self.register(story) for story in stories))
            await self._submit_all(stories)
            for story in stories:
                await self.world.shop.hears(story.reference, "ready")
            await self._undo(stories)
            settled = await self.settled()
            self.undone += [story.reference for story in stories if not story.lives and story.reference not in settled]
            await asyncio.sleep(self.rng.uniform(0.0, 0.5))
        await self._bring_back(stories)

    async def _submit_all(self, stories: list[Story]) -> None:
        for story in stories:
            await self.submit(story)
            await asyncio.sleep(self.rng.uniform(0, 1) * BLOCK_SECONDS)
        # nothing else may be on its way: the observer has to see all that is undone
        await self.mined(*(story for story in self.stories if story in stories or story.lives))

    async def _undo(self, stories: list[Story]) -> None:
        await self.world.observer.look()
        await self._replace(stories)

    async def _bring_back(self, stories: list[Story]) -> None:
        if any(story.fate == "returned" for story in stories):
            await self.world.ledger.mine_on(self.rng.randint(1, 8))
        await self.mined(*(story for story in self.stories if story.lives))

    async def _replace(self, stories: list[Story]) -> None:
        """Reorganises so deep that their blocks are replaced, as far as ten blocks go."""
        ledger = self.world.ledger
        submitter = ledger.loyfin.submitter
        depths = {story.reference: await ledger.depth_of(story.tx) or 1 for story in stories if story.tx is not None}
        margin = 2  # blocks that may come before the node gets to it
        depth = min(DEEPEST, max(depths.values()) + margin)
        again = [
            (submitter.sent(story.tx).raw, self.rng.randrange(depth))
            for story in stories
            if story.fate == "remined" and story.tx is not None and depths[story.reference] + margin <= depth
        ]
        try:
            await ledger.anvil.reorg(depth, again)
        except RpcRefused:  # it came later than that: one of them was not undone, and cannot be mined twice
            await ledger.anvil.reorg(depth)
        self.depths.append(depth)

    async def tell(self, killer: Killer) -> None:
        """The whole of it, spread over the kills."""
        never = [self.new("never", deadline_in=self.rng.randint(5, 20)) for _ in range(2)]
        cancelled, misfit, early = self.new("cancelled"), self.new("misfit"), self.new("kept")
        episodes = [self.reorganisation] * 4 + [lambda: self.believed(killer)] * 3 + [self.plain] * 3
        self.rng.shuffle(episodes)
        for number, episode in enumerate(episodes):
            await killer.reaches(number * (KILLS - 1) // len(episodes))
            await episode()
            match number:
                case 1:
                    await asyncio.gather(*(self.register(story) for story in [*never, cancelled]))
                case 3:
                    await self.register(misfit)
                    await self.submit(misfit)
                case 5:  # before the brand registers it
                    early.signed = self.world.action(early.amount, redeem=early.redeem)
                    await self.submit(early)
                case 6:
                    code, answer = await self.world.request(
                        "POST", f"/v1/operations/{self.world.operations[cancelled.reference]}/cancel"
                    )
                    assert code == 200, answer
                    assert early.signed is not None
                    await self.world.register(early.reference, early.signed.action)
        await self.mined(*(story for story in self.stories if story.lives))

    # ---- the truth

    async def settled(self) -> set[str]:
        """References whose event stands on the chain."""
        receipts = {
            story.reference: await self.world.ledger.loyfin.submitter.receipt(story.tx)
            for story in self.stories
            if story.tx is not None
        }
        return {reference for reference, receipt in receipts.items() if receipt is not None and receipt.succeeded}

    def expected(self, settled: set[str]) -> dict[str, str]:
        return {story.reference: self._expected(story, story.reference in settled) for story in self.stories}

    def _expected(self, story: Story, settled: bool) -> str:
        handed = bool(self.outcomes.get(story.reference))
        if story.fate == "cancelled":
            return "cancelled"
        if settled:
            return "conflict" if story.fate == "misfit" else "fulfilled" if story.fulfil else "ready"
        if story.deadline_in is not None:
            return "expired"
        return "reverted" if handed else "pending"


async def test_twenty_kills_lose_nothing_and_say_nothing_twice(database: Database, tmp_path: Path) -> None:
    seed = int(os.environ.get("SEED", "7"))
    rng = random.Random(seed)
    try:
        async with Ledger.running(seed=seed) as ledger, World.of(ledger, database, tmp_path) as world:
            killer = Killer(world, random.Random(rng.random()))
            teller = Teller(world, random.Random(rng.random()))
            await world.start()
            began = time.monotonic()
            async with asyncio.TaskGroup() as both:
                both.create_task(killer.run())
                both.create_task(teller.tell(killer))
            assert killer.kills == KILLS
            played = time.monotonic()
            settled = await teller.settled()

            async def expected() -> dict[str, str]:
                await teller.hands_are_idle()
                return teller.expected(settled)

            await world.judge(expected, finalized=True, grace=GRACE)
            for reference in teller.undone:
                assert world.shop.heard(reference, "reverted"), f"{reference} was undone, and the shop was not told"
            told = Counter(got.type.removeprefix("operation.") for got in world.shop.received)
            print(
                f"seed {seed}: {len(teller.stories)} operations, reorganisations {teller.depths}, {dict(told)};"
                f" played {played - began:.0f} s, at rest after {time.monotonic() - played:.0f} s"
            )
            await world.measure(world.daemons[-1])
            assert await world.daemons[-1].stop() == 0
    except BaseException as error:
        error.add_note(f"SEED={seed}")
        raise
