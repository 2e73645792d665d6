"""A brand's accounts at all three partners, each simulator on a socket of this machine and at one clock.

Promises URLs and keys that a configuration can name, and to know when the evidence of a signal was really settled. What is
minted, burned or credited is left to whoever tells a story.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

import aiohttp

from indexer.sandbox.partners.app import Hosted
from indexer.sandbox.partners.keyban import Account, Keyban
from indexer.sandbox.partners.loyfin import LoyfinApi
from indexer.sandbox.partners.movement import Pace
from indexer.sandbox.partners.qiibee import BASE, Qiibee, User

KEYBAN_KEY, QIIBEE_KEY = "keyban-sandbox-key", "qiibee-sandbox-key"
KEYBAN_PACE = Pace(appears=(0.1, 0.5), sent=(0.1, 0.5), settles=(0.5, 2.0))
QIIBEE_PACE = Pace(appears=(0.1, 0.5), sent=(0.0, 0.2), settles=(0.3, 1.5))


class PartnerRefused(RuntimeError):
    """A partner did not take what the shop asked for."""


@dataclass(frozen=True)
class Accounts:
    """The partners, and where they listen."""

    keyban: Keyban
    qiibee: Qiibee
    loyfin: LoyfinApi
    keyban_url: str
    qiibee_url: str
    loyfin_url: str
    http: aiohttp.ClientSession

    @classmethod
    @asynccontextmanager
    async def open(cls, seed: int) -> AsyncIterator[Self]:
        keyban = Keyban(seed=seed, clock=time.time, keys=[KEYBAN_KEY], pace=KEYBAN_PACE)
        qiibee = Qiibee(seed=seed, clock=time.time, keys=[QIIBEE_KEY], pace=QIIBEE_PACE)
        loyfin = LoyfinApi(seed=seed, clock=time.time)
        async with AsyncExitStack() as stack:
            urls = [
                (await stack.enter_async_context(Hosted(partner, base))).url
                for partner, base in ((keyban, ""), (qiibee, BASE), (loyfin, ""))
            ]
            http = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)))
            yield cls(keyban, qiibee, loyfin, urls[0], urls[1], urls[2], http)

    # ---- as a brand's back office asks

    async def ask_mint(self, account: Account, amount: int) -> str:
        """The optimistic balance that Keyban answers with: a promise, no settlement. Raises PartnerRefused."""
        answer = await self._post(
            f"{self.keyban_url}/v1/loyalty/account/{account.id}/mint", {"amount": amount}, "X-Api-Key", KEYBAN_KEY
        )
        return str(answer["newamount"])

    async def ask_qiibee(self, user: User, kind: str, amount: int) -> None:
        """`kind`: credit_points or debit_points. Accepted, and that is all that is said. Raises PartnerRefused."""
        wish = {"user_auth_id": user.auth_id, "type": kind, "amount": str(amount), "token_id": self.qiibee.token.id}
        await self._post(f"{self.qiibee_url}/transactions", {"transaction": wish}, "X-API-KEY", QIIBEE_KEY)

    async def _post(self, url: str, document: Mapping[str, Any], header: str, key: str) -> dict[str, Any]:
        async with self.http.post(url, json=document, headers={header: key}) as response:
            if response.status >= 300:
                raise PartnerRefused(f"{response.status}: {(await response.text())[:200]}")
            answer: dict[str, Any] = await response.json()
            return answer

    # ---- what is known

    def settled_at(self, evidence: Mapping[str, Any]) -> float | None:
        """The loop's time at which a partner's record had really settled; None where it isn't a partner's."""
        partner = {"keyban": self.keyban, "qiibee": self.qiibee}.get(str(evidence.get("provider")))
        moved = partner.movements.get(str(evidence.get("recordId"))) if partner else None
        if moved is None or moved.settles_at is None:
            return None
        return asyncio.get_running_loop().time() - (time.time() - moved.settles_at)
