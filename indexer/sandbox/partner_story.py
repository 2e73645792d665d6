"""What happens in the demo at the partners: Keyban's mints and burns, qiibee's credits and debits, and what goes wrong with them.

Promises, as `story.py` does, that every story ends with its operations where they should be, or says what came instead. What the
partners answer is theirs (`partners/`); how good days turn into bad ones is told here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from indexer.model.types import hex0x
from indexer.sandbox.actions import Issuance
from indexer.sandbox.author import CONFIRMED_UP_TO, FULFILLED, INCLUDED_UP_TO, Author, Draft, Kind
from indexer.sandbox.loyfin import operation_hash
from indexer.sandbox.partners.accounts import Accounts
from indexer.sandbox.partners.keyban import Account
from indexer.sandbox.partners.loyfin import Mined, Stored
from indexer.sandbox.partners.movement import STUCK, Course
from indexer.sandbox.partners.partner import Quota
from indexer.sandbox.partners.qiibee import User
from indexer.sandbox.shop import LOOK_SECONDS, Disappointed, End, Order
from indexer.sandbox.story import ANA, BEN
from indexer.sandbox.transactions import Party

MEASURED = 4  # operations of each kind whose latency is taken
OLD_SECONDS = 12.0  # an open operation of that age is told to a person; in earnest it would be minutes
HOUR = Quota(requests=2, seconds=4.0)  # what a partner's hour of requests is here
STRIKES = 6  # of the storm, until it passes
STORM = ("server_error", "html", "cut_off", "dropped", "endless_body", "duplicates", "disorder")
OPEN = End("pending", generation=0, trace=())
UNDER_WAY = End("submitted", generation=0, trace=())
SOON = Course(0.2, 0.4, 1.0)
PATIENCE_SECONDS = 60.0


class PartnerStories:
    """Each public coroutine is one story. What is measured is told while the partners have good days."""

    def __init__(self, author: Author, accounts: Accounts) -> None:
        self.author, self.shop, self.ledger, self.accounts = author, author.shop, author.ledger, accounts
        self.keyban, self.qiibee, self.loyfin = accounts.keyban, accounts.qiibee, accounts.loyfin
        self.alerts: list[str] = []
        self._measuring = 0
        self._measured = asyncio.Event()

    # ---- writing

    def order(
        self,
        reference: str,
        story: str,
        legs: list[dict[str, Any]],
        end: End = FULFILLED,
        *,
        hands_over: bool = True,
        measured: bool = False,
    ) -> Order:
        kinds = "+".join(dict.fromkeys(leg["kind"].removeprefix("loyfin.") for leg in legs))
        amount = sum(int(leg["amount"]) for leg in legs)
        return Order(reference, story, kinds, amount, legs, end, hands_over=hands_over, measured=measured)

    @asynccontextmanager
    async def _fair_weather(self) -> AsyncIterator[None]:
        """While the body runs the partners have good days; it must be entered at a story's first step.

        It begins when what is measured on the chain has been: two measurements on one machine would each take in the other.
        """
        self._measuring += 1
        try:
            await self.author.calm.wait()
            yield
        finally:
            self._measuring -= 1
            if not self._measuring:
                self._measured.set()

    # ---- good days

    async def keyban_mints(self) -> None:
        """As the tutorial does it: an optimistic balance at once, and the truth in an order later."""
        orders = []
        async with self._fair_weather():
            for number in range(1, MEASURED + 1):
                reference, account = f"keyban-mint-{number}", self.keyban.open_account()
                amount = self.author.amount(reference)
                order = self.order(reference, "minted by Keyban", [_mint(account, amount)], measured=True)
                orders.append(await self.shop.register(order))
                if await self.accounts.ask_mint(account, amount) != str(amount):
                    raise Disappointed(f"{reference}: Keyban promised another balance")
            await self._all_ready(orders)
        for order in orders:
            await self.shop.ended(order)
            self._stands_on(order, "wallet_amount")

    async def keyban_burns(self) -> None:
        """Signed by the customer's own wallet: the shop asks nobody, and waits."""
        orders = []
        async with self._fair_weather():
            for number in range(1, MEASURED + 1):
                reference, account = f"keyban-burn-{number}", self.keyban.open_account()
                amount = self.author.amount(reference, 5, INCLUDED_UP_TO)
                leg = {"kind": "keyban.burn", "walletId": account.wallet, "amount": str(amount)}
                orders.append(
                    await self.shop.register(self.order(reference, "burned by the customer", [leg], measured=True))
                )
                self.keyban.burn(account, amount)
            await self._all_ready(orders)
        for order in orders:
            await self.shop.ended(order)

    async def qiibee_points(self) -> None:
        """Credits, then debits of the same members: accepted with 202, settled by rows of a history."""
        orders = []
        async with self._fair_weather():
            members = [self.qiibee.enrol() for _ in range(MEASURED)]
            for kind, event in (("qiibee.credit", "credit_points"), ("qiibee.debit", "debit_points")):
                half = []
                for number, member in enumerate(members, 1):
                    reference = f"{kind.replace('.', '-')}-{number}"
                    amount = self.author.amount(reference, 5, 50) + (50 if kind == "qiibee.credit" else 0)
                    order = self.order(reference, event, [_points(kind, member, amount)], measured=True)
                    half.append(await self.shop.register(order))
                    await self.accounts.ask_qiibee(member, event, amount)
                await self._all_ready(half)
                orders += half
        for order in orders:
            await self.shop.ended(order)

    async def across(self) -> None:
        """Points move between two ledgers: burned on Loyfin, and only then minted by Keyban."""
        account = self.keyban.open_account()
        burn = self.author.draft("across", "redemption", ANA, 250)
        order = await self.shop.register(
            self.order("across", "burn 250 on Loyfin, then mint 250 on Keyban", [burn.leg, _mint(account, 250)])
        )
        await self.ledger.mined(await self.ledger.submit(burn.signed))
        await order.heard("confirming")
        await self.accounts.ask_mint(account, 250)
        await self.shop.ended(order)
        self._stands_on(order, "nonce", "wallet_amount")

    async def two_transfers(self) -> None:
        """One order, two transfers in two ledgers of Stellar: what counts is their sum."""
        account = self.keyban.open_account()
        order = await self.shop.register(
            self.order("keyban-two-transfers", "120 and 30 make 150", [_mint(account, 150)])
        )
        self.keyban.mint(account, 150, Course(0.2, 0.4, 1.5), nodes=[120, 30])
        await self.shop.ended(order)

    # ---- what matching by wallet and amount has to get right

    async def minted_before(self) -> None:
        """Minted first and registered later; the registration says since when it has been asked for."""
        account, amount = self.keyban.open_account(), self.author.amount("keyban-early")
        asked = datetime.now(UTC)
        moved = self.keyban.mint(account, amount, SOON)
        await _until(lambda: moved.stands(time.time()))
        order = self.order("keyban-early", "minted before it was registered", [_mint(account, amount)])
        order.evidence_record = moved.id
        await self.shop.register(order, requested_at=asked.isoformat())
        await self.shop.ended(order)

    async def undated(self) -> None:
        """Minted before it was registered, and its record tells no time: nobody but a person can say that it is the one."""
        account, amount = self.keyban.open_account(), self.author.amount("keyban-undated")
        moved = self.keyban.mint(account, amount, SOON)
        self.keyban.dateless.add(moved.id)
        await _until(lambda: moved.stands(time.time()))
        order = self.order("keyban-undated", "its record tells no time: a person accepts it", [_mint(account, amount)])
        order.evidence_record = moved.id
        await self.shop.register(order)
        offer = (await self._offered(order))["evidenceId"]
        await self.shop.client.resolve(order.id, offer, accept=True, reason="the customer's statement shows it")
        await self.shop.ended(order)
        self._stands_on(order, "decision")

    async def _offered(self, order: Order) -> dict[str, Any]:
        """What a person may accept for the order, once there is something. Raises Disappointed."""
        for _ in range(int(PATIENCE_SECONDS / LOOK_SECONDS)):
            offers: list[dict[str, Any]] = (await self.shop.truth(order))["conflicts"]
            if offers:
                return offers[0]
            await asyncio.sleep(LOOK_SECONDS)
        raise Disappointed(f"nothing was offered to be accepted; {order.described()}")

    async def twins(self) -> None:
        """Two equal mints to one wallet: each settles one operation, and it is said that they might be exchanged."""
        account, amount = self.keyban.open_account(), self.author.amount("keyban-twins")
        orders = [
            await self.shop.register(
                self.order(f"keyban-twin-{number}", "two equal mints to one wallet", [_mint(account, amount)])
            )
            for number in (1, 2)
        ]
        moved = [self.keyban.mint(account, amount, SOON) for _ in orders]
        for order in orders:
            await self.shop.ended(order)
        evidence = [entry for order in orders for entry in _evidence(order)]
        if {entry["recordId"] for entry in evidence} != {each.id for each in moved}:
            raise Disappointed("one of two equal mints settled both operations")
        if not any(entry["ambiguous"] for entry in evidence):
            raise Disappointed("two equal mints settled two operations, and nothing says that they might be exchanged")

    async def failed(self) -> None:
        """Included in a ledger, without success: a block number is no settlement. A second mint then is."""
        account, amount = self.keyban.open_account(), self.author.amount("keyban-failed")
        order = await self.shop.register(
            self.order("keyban-failed", "included without success, then minted again", [_mint(account, amount)])
        )
        self.keyban.mint(account, amount, Course(0.2, 0.4, 0.8, fails=True))
        await order.heard("rejected")
        if (await self.shop.truth(order))["status"] not in ("pending", "submitted"):
            raise Disappointed(f"a failed transfer ended the operation: {order.described()}")
        second = self.keyban.mint(account, amount, SOON)
        order.evidence_record = second.id
        await self.shop.ended(order)

    async def never(self) -> None:
        """One order that stays without a ledger, and one request that nobody ever sees again: both grow old, and neither fails."""
        stuck, lost = self.keyban.open_account(), self.keyban.open_account()
        registered = time.time()
        first = await self.shop.register(
            self.order("keyban-stuck", "under way for ever", [_mint(stuck, 250)], UNDER_WAY, hands_over=False)
        )
        second = await self.shop.register(
            self.order("keyban-lost", "never seen again", [_mint(lost, 250)], OPEN, hands_over=False)
        )
        # an order without a ledger has no time, and what was there at the first look might be anybody's
        await _until(lambda: self.keyban.listed_for(stuck))
        self.keyban.mint(stuck, 250, STUCK)
        await _until(lambda: time.time() - registered > OLD_SECONDS)
        while (age := await self._oldest_open()) < OLD_SECONDS:
            if time.time() - registered > PATIENCE_SECONDS:
                raise Disappointed(f"the oldest open operation is told to be {age:.0f} s old")
            await asyncio.sleep(0.5)
        self.alerts.append(f"the oldest open operation is {age:.0f} s old (told from {OLD_SECONDS:.0f} s on)")
        for order in (first, second):
            await self.shop.ended(order)

    async def _oldest_open(self) -> float:
        """As an alerting rule would read it, in seconds."""
        return await self.shop.client.metric("loyalty_oldest_open_age_seconds", brand=self.shop.brand) or 0.0

    # ---- what partners take back

    async def reversed(self) -> None:
        """A row that had succeeded says later that it was reverted: what it settled is taken back."""
        member, amount = self.qiibee.enrol(), self.author.amount("qiibee-reversed", 5, 50)
        end = End("pending", 1, ("ready", "reverted"), was_final=True)
        order = await self.shop.register(
            self.order(
                "qiibee-reversed",
                "succeeded, and reverted later",
                [_points("qiibee.credit", member, amount)],
                end,
                hands_over=False,
            )
        )
        # while anything is waited for the history is read often; without, a change waits for the next sweep
        slow = await self.shop.register(
            self.order("qiibee-slow", "settles late", [_points("qiibee.debit", member, amount)])
        )
        moved = self.qiibee.credit(member, amount, SOON)
        await order.heard("ready")
        moved.turned_at = time.time()
        await self.shop.ended(order)
        self.qiibee.debit(member, amount, SOON)
        await self.shop.ended(slow)

    # ---- Loyfin's API, which hints and decides nothing

    async def relayed(self) -> None:
        """Stored with Loyfin and submitted by its relayer: the API's word comes first, the chain's decides."""
        draft = self._hashed("relayed", BEN)
        order = await self.shop.register(self.author.order("relayed", "through Loyfin's API", [draft]))
        stored = self._stored(draft)
        self.loyfin.submitted(stored, "0x" + "5a" * 32)  # by the relayer's word; nobody has mined it yet
        await order.heard("submitted")
        await self._mined(draft, stored)
        await self.shop.ended(order)

    async def rejected_and_mined(self) -> None:
        """The API rejects it, and somebody submits the signed action all the same."""
        reference = "rejected-anyway"
        draft = self._hashed(reference, ANA)
        order = await self.shop.register(
            self.author.order(reference, "rejected by Loyfin's API, and mined all the same", [draft])
        )
        stored = self._stored(draft)
        self.loyfin.ended(stored, "rejected")
        await order.heard("rejected")
        await self._mined(draft, stored)
        await self.shop.ended(order)

    def _hashed(self, reference: str, customer: Party) -> Draft:
        """With an operationHash, by which Loyfin's API lists receipts."""
        return self.author.draft(
            reference,
            "redemption",
            customer,
            self.author.amount(reference),
            operation_hash=operation_hash(reference),
        )

    def _stored(self, draft: Draft) -> Stored:
        kind: Kind = "issuance" if isinstance(draft.action, Issuance) else "redemption"
        return self.loyfin.store(kind, draft.action.json(), hex0x(draft.signed.signature))[0]

    async def _mined(self, draft: Draft, stored: Stored) -> None:
        tx_hash = await self.ledger.submit(draft.signed)
        self.loyfin.submitted(stored, hex0x(tx_hash))
        await self.ledger.out_of_reach((await self.ledger.mined(tx_hash)).block_number)
        event = next(e for e in await self.ledger.plain.events(tx_hash) if e.name in ("PointsIssued", "PointsRedeemed"))
        self.loyfin.mined(
            stored, Mined(hex0x(tx_hash), event.block_number, event.log_index, hex0x(event.fields["loyalty"]))
        )

    # ---- bad days

    async def bad_days(self) -> None:
        """An hour's worth of requests used up, again and again, then a storm of faults: late, and never wrong."""
        await self._measured.wait()
        self.keyban.quota = HOUR
        limited = await self._asked("keyban-limited", "minted in a rate-limited hour")
        await _until(lambda: self.keyban.refused_by_quota > 0)
        await limited[0].heard("ready")
        self.keyban.quota = None
        weather = self.keyban.weather
        weather.begin(*STORM, chance=0.3)
        stormy = await self._asked("keyban-storm", "minted while the API is down, slow or nonsensical")
        await _until(lambda: weather.struck.total() >= STRIKES)
        weather.end()
        for order in (*limited, *stormy):
            await self.shop.ended(order)

    async def _asked(self, reference: str, story: str) -> list[Order]:
        orders = []
        for number in (1, 2):
            name, account = f"{reference}-{number}", self.keyban.open_account()
            amount = self.author.amount(name, CONFIRMED_UP_TO + 1, 900)
            order = await self.shop.register(self.order(name, story, [_mint(account, amount)]))
            order.evidence_record = self.keyban.mint(account, amount, SOON).id
            orders.append(order)
        return orders

    # ---- what the stories share

    async def _all_ready(self, orders: list[Order]) -> None:
        for order in orders:
            await order.heard("ready")

    @staticmethod
    def _stands_on(order: Order, *bases: str) -> None:
        found = tuple(entry["basis"] for entry in _evidence(order))
        if found != bases:
            raise Disappointed(f"{order.reference} was settled by {', '.join(found)}, not by {', '.join(bases)}")


async def _until(holds: Callable[[], bool]) -> None:
    """Raises TimeoutError."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            if holds():
                return
            await asyncio.sleep(0.05)


def _evidence(order: Order) -> list[dict[str, Any]]:
    """What the first `ready` rests on, by leg."""
    found = next(s for s in order.signals if s.type == "operation.ready").data["evidence"]
    return sorted(found, key=lambda entry: int(entry["leg"]))


def _mint(account: Account, amount: int) -> dict[str, Any]:
    return {"kind": "keyban.mint", "walletId": account.wallet, "amount": str(amount)}


def _points(kind: str, member: User, amount: int) -> dict[str, Any]:
    """Without a token: any of the brand's will do."""
    return {"kind": kind, "walletId": member.auth_id, "amount": str(amount)}
