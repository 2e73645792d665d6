"""What happens in the demo when blocks are replaced: gone for good, mined again, and gone after the goods were handed over.

Each act submits, waits for the signals, replaces the blocks while they are at most ten deep, and waits for what must follow.
A machine too slow for that tries again with a fresh operation; the one that came too late ends like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from indexer.model.types import Hash32
from indexer.sandbox.author import INCLUDED_UP_TO, Draft
from indexer.sandbox.shop import Disappointed, End, Order
from indexer.sandbox.story import ANA, BEN, CLEO, Stories
from indexer.sandbox.transactions import Party

ATTEMPTS = 6
DEADLINE_SECONDS = 6  # after the submission; the action is mined well before


@dataclass(frozen=True, slots=True)
class Part:
    """One operation of an act."""

    reference: str
    story: str
    holder: Party
    end: End
    hands_over: bool = True
    bounded: bool = False  # has a deadline
    small: bool = True  # an amount that is handed over at inclusion


@dataclass(frozen=True, slots=True)
class Cast:
    """An operation on stage: mined, and as far as the act needs it."""

    order: Order
    tx_hash: Hash32


def _seen(order: Order) -> bool:
    return bool(order.signals)


class Reorganisations(Stories):
    """The acts follow each other, after all that rests on shallow blocks."""

    async def reorganisations(self) -> None:
        await self.calm.wait()
        gone = await self.gone_for_good()
        again = await self.mined_again()
        exposed = await self.exposure()
        for cast in (*exposed, *again, *gone):
            await self.shop.ended(cast.order)

    async def gone_for_good(self) -> list[Cast]:
        cast = await self._replaced(
            [
                Part(
                    "gone",
                    "reorganised away for good",
                    ANA,
                    End("pending", 1, ("ready", "reverted")),
                    hands_over=False,
                ),
                Part(
                    "gone-bounded",
                    "reorganised away, then its deadline passes",
                    BEN,
                    End("expired", 1, ("ready", "reverted", "expired")),
                    hands_over=False,
                    bounded=True,
                ),
            ]
        )
        for one in cast:
            await one.order.heard("reverted")
        return cast

    async def mined_again(self) -> list[Cast]:
        cast = await self._replaced(
            [
                Part(
                    "again",
                    "reorganised away and mined again",
                    CLEO,
                    End("fulfilled", 2, ("ready", "reverted", "ready", "fulfilled")),
                    hands_over=False,
                ),
                Part(
                    "again-unseen",
                    "reorganised away before it was safe, mined again",
                    ANA,
                    End("fulfilled", 1, ("ready", "fulfilled")),
                    small=False,
                ),
            ]
        )
        taken_back, unseen = cast
        await taken_back.order.heard("reverted")
        taken_back.order.hands_over = True
        for one in cast:
            await self.ledger.send_again(one.tx_hash)
        await taken_back.order.heard("ready", generation=2)
        await self.ledger.mined(unseen.tx_hash)
        return cast

    async def exposure(self) -> list[Cast]:
        (cast,) = await self._replaced(
            [
                Part(
                    "exposure",
                    "reorganised away after it was handed over",
                    BEN,
                    End("fulfilled", 2, ("ready", "fulfilled", "reverted", "restored")),
                )
            ]
        )
        await cast.order.heard("reverted")
        truth = await self.shop.truth(cast.order)
        if truth["status"] != "reverted" or len(truth["receipts"]) != 1:
            raise Disappointed(f"expected an exposure: reverted, with a receipt; {cast.order.described()}")
        await self.ledger.send_again(cast.tx_hash)
        await cast.order.heard("restored", generation=2)
        return [cast]

    async def _replaced(self, parts: Sequence[Part]) -> list[Cast]:
        """The parts' operations, after their blocks were replaced. Raises Disappointed."""
        for attempt in range(1, ATTEMPTS + 1):
            cast = [await self._on_stage(part, attempt) for part in parts]
            for part, one in zip(parts, cast, strict=True):
                if part.small:
                    await one.order.heard("fulfilled" if part.hands_over else "ready")
                else:
                    await one.order.until(partial(_seen, one.order), "any signal")
            if await self.ledger.reorganise([one.tx_hash for one in cast]):
                return cast
            for one in cast:
                await self._too_late(one)
        raise Disappointed(
            f"{ATTEMPTS} times the blocks of {parts[0].reference} were too deep before all signals had come"
        )

    async def _on_stage(self, part: Part, attempt: int) -> Cast:
        reference = part.reference if attempt == 1 else f"{part.reference}-{attempt}"
        amount = self.amount(reference, 5, INCLUDED_UP_TO) if part.small else self.amount(reference)
        deadline = await self.ledger.now() + DEADLINE_SECONDS if part.bounded else 0
        draft: Draft = self.draft(reference, "redemption", part.holder, amount, deadline=deadline)
        order = self.order(reference, part.story, [draft], part.end, hands_over=part.hands_over, measured=part.small)
        await self.shop.register(order)
        tx_hash = await self.ledger.submit_unlucky(draft.signed)
        await self.ledger.mined(tx_hash)
        return Cast(order, tx_hash)

    async def _too_late(self, cast: Cast) -> None:
        """Too deep to be replaced: it ends as if nothing had been planned, whatever became of its neighbours' blocks."""
        order = cast.order
        order.end = replace(order.end, status="fulfilled", generation=None, trace=None)
        order.story += " (came too late)"
        order.hands_over = True
        await self.ledger.send_again(cast.tx_hash)
        truth = await self.shop.truth(order)
        if truth["status"] == "ready":
            await self.shop.fulfil(order, truth["generation"])
