"""How the demo's operations are written: what the brand signs, and the leg that the shop registers for it.

Promises that nonces, amounts and customers depend on the seed and the reference alone, in whatever order stories are told. What
happens to the operations is told in `story.py`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from indexer.model.types import Hash32, hex0x
from indexer.sandbox.actions import Issuance, Metadata, Redemption, Signed, sign
from indexer.sandbox.ledger import BLOOM, PETALS, Ledger
from indexer.sandbox.loyfin import Loyfin, operation_hash
from indexer.sandbox.shop import Disappointed, End, Order, Shop
from indexer.sandbox.transactions import Party

# Bloom's policies by amount: see the configuration in `demo.py`.
INCLUDED_UP_TO = 100
CONFIRMED_UP_TO = 200

Kind = Literal["issuance", "redemption"]
Match = Literal["nonce", "operation_hash", "wallet_amount"]

FULFILLED = End("fulfilled")


@dataclass(frozen=True, slots=True)
class Draft:
    """A signed action, and the leg that waits for it."""

    signed: Signed[Any]
    leg: dict[str, Any]

    @property
    def action(self) -> Any:
        return self.signed.action


class Author:
    """Writes orders: what the shop registers and what the brand signs, with nonces and amounts by the seed."""

    def __init__(self, shop: Shop, ledger: Ledger, seed: int) -> None:
        self.shop, self.ledger, self._seed = shop, ledger, seed
        self._disturbable = 0
        self.calm = asyncio.Event()

    def chance(self, reference: str) -> random.Random:
        return random.Random(f"{self._seed}/{reference}")  # noqa: S311 - a story, not a secret

    def amount(self, reference: str, low: int = CONFIRMED_UP_TO + 1, high: int = 900) -> int:
        return self.chance(f"{reference}/amount").randint(low, high)

    def draft(
        self,
        reference: str,
        kind: Kind,
        holder: Party,
        amount: int,
        *,
        loyfin: Loyfin | None = None,
        programme: Metadata = PETALS,
        by: Party = BLOOM,
        match: Match = "nonce",
        **terms: Any,
    ) -> Draft:
        """Signs. `terms` as for `Loyfin.issuance`; the leg names what `match` needs and no more."""
        terms.setdefault("nonce", Hash32(self.chance(reference).randbytes(32)))
        if match == "operation_hash":
            terms.setdefault("operation_hash", operation_hash(reference))
        write = self.ledger.issuance if kind == "issuance" else self.ledger.redemption
        action = write(holder, amount, loyfin=loyfin or self.ledger.plain, programme=programme, by=by, **terms)
        return Draft(sign(action, by), leg_of(action, match))

    def order(
        self,
        reference: str,
        story: str,
        drafts: Sequence[Draft],
        end: End = FULFILLED,
        *,
        hands_over: bool = True,
        measured: bool = False,
    ) -> Order:
        legs = [draft.leg for draft in drafts]
        kinds = {leg["kind"].removeprefix("loyfin.") for leg in legs}
        amount = sum(int(leg["amount"]) for leg in legs)
        return Order(
            reference, story, "+".join(sorted(kinds)), amount, legs, end, hands_over=hands_over, measured=measured
        )

    @asynccontextmanager
    async def undisturbed(self) -> AsyncIterator[None]:
        """While the body runs no reorganisation begins; it must be entered at a story's first step."""
        self._disturbable += 1
        try:
            yield
        finally:
            self._disturbable -= 1
            if not self._disturbable:
                self.calm.set()

    async def settle(self, order: Order, draft: Draft) -> None:
        """The plain way: register, submit, and wait for the end."""
        await self.shop.register(order)
        await self.ledger.mined(await self.ledger.submit(draft.signed))
        await self.shop.ended(order)

    async def stays_pending_beyond(self, order: Order, block: int) -> None:
        """Once that block is safe, with the order still untouched by it. Raises Disappointed."""
        async with asyncio.timeout(90):
            while True:
                (chain,) = (await self.shop.client.status())["chains"]
                if chain["safe"] and int(chain["safe"]["number"]) > block:
                    break
                await asyncio.sleep(0.25)
        truth = await self.shop.truth(order)
        if truth["status"] != "pending" or truth["evidence"] or truth["conflicts"]:
            raise Disappointed(f"evidence of somebody else touched it: {order.described()}")


def leg_of(action: Issuance | Redemption, match: Match) -> dict[str, Any]:
    """The leg that waits for this action, as `POST /v1/operations` takes it."""
    leg: dict[str, Any] = {
        "kind": "loyfin.issuance" if isinstance(action, Issuance) else "loyfin.redemption",
        "chainId": str(action.chain_id),
        "factory": hex0x(action.verifying_contract),
        "issuer": hex0x(action.issuer),
        "holder": hex0x(action.holder),
        "loyaltyId": hex0x(action.loyalty_id),
        "amount": str(action.amount),
        "expiresAt": str(action.expires_at),
        "deadline": str(action.deadline),
    }
    if match == "nonce":
        leg["nonce"] = hex0x(action.nonce)
    if match == "wallet_amount":
        leg["match"] = match
    elif any(action.operation_hash):
        leg["operationHash"] = hex0x(action.operation_hash)
    return leg
