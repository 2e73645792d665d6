"""What happens in the demo when blocks are replaced: gone for good, mined again, and gone after the goods were handed over.

Each act submits, waits for the signals, replaces the blocks, and waits for what must follow. No block comes between, however
long the signals take: the acts go the same way on a slow machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from indexer.model.types import Hash32
from indexer.sandbox.author import INCLUDED_UP_TO
from indexer.sandbox.ledger import DEEPEST
from indexer.sandbox.shop import Disappointed, End, Order
from indexer.sandbox.story import ANA, BEN, CLEO, Stories
from indexer.sandbox.transactions import Party

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
    """An operation on stage, and its transaction."""

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
            ],
            depth=DEEPEST,
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
            ],
            depth=3,
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
            ],
            depth=1,
        )
        await cast.order.heard("reverted")
        truth = await self.shop.truth(cast.order)
        if truth["status"] != "reverted" or len(truth["receipts"]) != 1:
            raise Disappointed(f"expected an exposure: reverted, with a receipt; {cast.order.described()}")
        await self.ledger.send_again(cast.tx_hash)
        await cast.order.heard("restored", generation=2)
        return [cast]

    async def _replaced(self, parts: Sequence[Part], *, depth: int) -> list[Cast]:
        """The parts' operations, after so many blocks were replaced: the lowest of them held their events."""
        async with self.ledger.held():
            cast = [await self._on_stage(part) for part in parts]
            await self.ledger.bury([one.tx_hash for one in cast], depth)
            for part, one in zip(parts, cast, strict=True):
                if part.small:
                    await one.order.heard("fulfilled" if part.hands_over else "ready")
                else:
                    await one.order.until(partial(_seen, one.order), "any signal")
            await self.ledger.reorganise([one.tx_hash for one in cast])
        return cast

    async def _on_stage(self, part: Part) -> Cast:
        reference = part.reference
        amount = self.amount(reference, 5, INCLUDED_UP_TO) if part.small else self.amount(reference)
        deadline = await self.ledger.now() + DEADLINE_SECONDS if part.bounded else 0
        draft = self.draft(reference, "redemption", part.holder, amount, deadline=deadline)
        order = self.order(reference, part.story, [draft], part.end, hands_over=part.hands_over, measured=part.small)
        await self.shop.register(order)
        return Cast(order, await self.ledger.submit_unlucky(draft.signed))
