"""What happens in the demo while the chain is calm: some forty operations, good days and bad ones, each with its expected end.

Promises that every story ends with its operations where they should be, or says what was expected and what came instead.
Reorganisations are told in `reorganisations.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from indexer.model.types import hex0x
from indexer.sandbox.author import CONFIRMED_UP_TO, INCLUDED_UP_TO, Author, Draft, Kind
from indexer.sandbox.contracts import artefact
from indexer.sandbox.ledger import BLOOM, COPYCAT, CUSTOMERS, ORCHIDS, PETALS
from indexer.sandbox.loyfin import operation_hash, speak
from indexer.sandbox.shop import Disappointed, End, Order

OPENING = 50_000
DEADLINE_SECONDS = 3
QUICK_REDEMPTIONS, QUICK_ISSUANCES = 16, 4  # even numbers

ANA, BEN, CLEO = CUSTOMERS["ana"], CUSTOMERS["ben"], CUSTOMERS["cleo"]
EXPIRED = End("expired", generation=0, trace=("expired",))


class Stories(Author):
    """Each public coroutine is one story. What rests on shallow blocks is told undisturbed: reorganisations begin after it."""

    async def openings(self, drafts: Sequence[Draft]) -> None:
        """Registered after their events, which are older than the daemon."""
        for number, draft in enumerate(drafts, 1):
            order = self.order(f"opening-{number}", "registered after its event", [draft])
            await self.shop.register(order)
        for number in range(1, len(drafts) + 1):
            await self.shop.ended(self.shop.orders[f"opening-{number}"])

    def opening_drafts(self) -> list[Draft]:
        """Opening balances: what Bloom issued before it had an indexer."""
        return [
            self.draft(f"opening-{number}", "issuance", customer, OPENING)
            for number, customer in enumerate(CUSTOMERS.values(), 1)
        ]

    async def issuances(self) -> None:
        orders = []
        for number, customer in enumerate((ANA, BEN), 1):
            reference = f"issue-{number}"
            draft = self.draft(reference, "issuance", customer, self.amount(reference))
            orders.append(await self.shop.register(self.order(reference, "issuance", [draft])))
            await self.ledger.submit(draft.signed)
        for order in orders:
            await self.shop.ended(order)

    async def through_the_hub(self) -> None:
        """A programme that comes to life while the daemon watches, announced by an event hub."""
        issue = self.draft("hub-issue", "issuance", BEN, OPENING, loyfin=self.ledger.hub)
        order = await self.shop.register(self.order("hub-issue", "a new programme, announced by a hub", [issue]))
        await self.ledger.mined(await self.ledger.submit(issue.signed))
        redeem = self.draft("hub-redeem", "redemption", BEN, self.amount("hub-redeem"), loyfin=self.ledger.hub)
        await self.settle(self.order("hub-redeem", "redemption through the hub", [redeem]), redeem)
        await self.shop.ended(order)

    async def orchids(self) -> None:
        """A programme whose redemptions must be finalized."""
        issue = self.draft("orchid-issue", "issuance", CLEO, OPENING, programme=ORCHIDS)
        order = await self.shop.register(self.order("orchid-issue", "issuance of another programme", [issue]))
        await self.ledger.mined(await self.ledger.submit(issue.signed))
        redeem = self.draft("orchid-redeem", "redemption", CLEO, self.amount("orchid"), programme=ORCHIDS)
        redemption = self.order("orchid-redeem", "policy finalized", [redeem])
        await self.settle(redemption, redeem)
        self._stood_on(redemption, "finalized")
        await self.shop.ended(order)

    async def two_buckets(self) -> None:
        """Points of two buckets redeemed under one hash: two legs, each with its own event."""
        soon = await self.ledger.now() + 30 * 86400
        buckets = {f"bucket-{number}": soon + number * 86400 for number in (1, 2)}
        issued = []
        for reference, expires_at in buckets.items():
            draft = self.draft(reference, "issuance", ANA, 1000, expires_at=expires_at)
            issued.append(await self.shop.register(self.order(reference, "issuance into a bucket", [draft])))
            await self.ledger.mined(await self.ledger.submit(draft.signed))
        shared = operation_hash("two-buckets")
        drafts = [
            self.draft(
                f"two-buckets/{number}",
                "redemption",
                ANA,
                200 + 50 * number,
                expires_at=expires_at,
                match="operation_hash",
                operation_hash=shared,
            )
            for number, expires_at in enumerate(buckets.values(), 1)
        ]
        order = await self.shop.register(self.order("two-buckets", "two buckets under one hash", drafts))
        for draft in reversed(drafts):
            await self.ledger.submit(draft.signed)
        for each in (order, *issued):
            await self.shop.ended(each)
        self._based_on(order, "operation_hash", pieces=2)

    async def twins(self) -> None:
        """Two equal operations under one hash, two events: the older registration takes the older event."""
        shared, amount = operation_hash("twins"), self.amount("twins")
        pairs = []
        for number in (1, 2):
            reference = f"twin-{number}"
            draft = self.draft(reference, "redemption", BEN, amount, match="operation_hash", operation_hash=shared)
            pairs.append(
                (await self.shop.register(self.order(reference, "two equal ones under one hash", [draft])), draft)
            )
        for _, draft in pairs:
            await self.ledger.submit(draft.signed)
        for order, _ in pairs:
            await self.shop.ended(order)

    async def retry(self) -> None:
        """The first action misses its deadline; the second has the same hash and a new nonce."""
        shared, amount = operation_hash("retry"), self.amount("retry")
        deadline = await self.ledger.now() + DEADLINE_SECONDS
        first = self.draft("retry-1", "redemption", ANA, amount, operation_hash=shared, deadline=deadline)
        missed = await self.shop.register(self.order("retry-1", "missed its deadline, tried again", [first], EXPIRED))
        await self.ledger.until_after(deadline)
        tx_hash = await self.ledger.submit(first.signed)
        if (await self.ledger.plain.wait(tx_hash, timeout=60)).succeeded:
            raise Disappointed("the contracts took an action after its deadline")
        second = self.draft("retry-2", "redemption", ANA, amount, operation_hash=shared)
        await self.settle(self.order("retry-2", "the retry: same hash, new nonce", [second]), second)
        await self.shop.ended(missed)

    async def deadline(self) -> None:
        late = await self.ledger.now() + DEADLINE_SECONDS
        draft = self.draft("deadline", "redemption", BEN, self.amount("deadline"), deadline=late)
        order = await self.shop.register(self.order("deadline", "its deadline passes", [draft], EXPIRED))
        await self.shop.ended(order)

    async def half(self) -> None:
        """One leg settles, the other's deadline passes."""
        late = await self.ledger.now() + 2 * DEADLINE_SECONDS  # the other leg is mined well before
        done = self.draft("half/done", "redemption", CLEO, self.amount("half/done"))
        never = self.draft("half/never", "issuance", BEN, self.amount("half/never"), deadline=late)
        end = End("incomplete", generation=0, trace=("incomplete",))
        order = await self.shop.register(self.order("half", "one leg settles, one expires", [done, never], end))
        await self.ledger.submit(done.signed)
        await self.shop.ended(order)

    async def look_alike(self) -> None:
        """A stranger's contract says word for word what the factory will say later."""
        await self._spoken_by_another("look-alike", "a foreign contract says it first", rogue=False)

    async def rogue_token(self) -> None:
        """A real programme's token says it of a programme that is not its own."""
        await self._spoken_by_another("rogue-token", "a token speaks for another programme", rogue=True)

    async def _spoken_by_another(self, reference: str, story: str, *, rogue: bool) -> None:
        plain = self.ledger.plain
        draft = self.draft(reference, "redemption", ANA, self.amount(reference))
        order = await self.shop.register(self.order(reference, story, [draft]))
        speaker = self.ledger.look_alike
        if rogue:
            theirs = self.draft(f"{reference}/theirs", "issuance", CLEO, 1, by=COPYCAT)
            await self.ledger.mined(await self.ledger.submit(theirs.signed))
            token = await plain.loyalty(COPYCAT.address, PETALS.loyalty_id)
            if token is None:
                raise Disappointed("the copycat's programme does not exist")
            speaker = token
        petals = await plain.loyalty(BLOOM.address, PETALS.loyalty_id)
        action = draft.action
        topics, data = artefact("Loyfin").log(
            "PointsRedeemed",
            factory=plain.factory,
            issuer=action.issuer,
            loyaltyId=action.loyalty_id,
            loyalty=petals,
            **{"from": action.holder},
            tokenId=action.expires_at,
            amount=action.amount,
            nonce=action.nonce,
            operationHash=action.operation_hash,
            data=b"",
        )
        said = await self.ledger.mined(await speak(plain.submitter, speaker, topics, data))
        await self.stays_pending_beyond(order, said.block_number)
        await self._settled_by_the_true_one(order, draft)

    async def copied_hash(self) -> None:
        """Another issuer, at the true factory, with our hash, our customer, our programme's id and our amount."""
        ours, lost = "copied-hash", "copied-hash-only"
        drafts = {ours: self.draft(ours, "issuance", ANA, self.amount(ours), match="operation_hash")}
        late = await self.ledger.now() + DEADLINE_SECONDS
        drafts[lost] = self.draft(lost, "issuance", BEN, self.amount(lost), match="operation_hash", deadline=late)
        story = "a foreign issuer copies its hash"
        order = await self.shop.register(self.order(ours, story, [drafts[ours]]))
        never = await self.shop.register(self.order(lost, f"{story}, ours never comes", [drafts[lost]], EXPIRED))
        last = 0
        for reference, draft in drafts.items():
            action = draft.action
            copy = self.draft(
                f"{reference}/copy",
                "issuance",
                ANA if reference == ours else BEN,
                action.amount,
                by=COPYCAT,
                operation_hash=action.operation_hash,
            )
            last = (await self.ledger.mined(await self.ledger.submit(copy.signed))).block_number
        await self.stays_pending_beyond(order, last)
        await self._settled_by_the_true_one(order, drafts[ours])
        await self.shop.ended(never)

    async def _settled_by_the_true_one(self, order: Order, draft: Draft) -> None:
        tx_hash = await self.ledger.submit(draft.signed)
        order.evidence_tx = hex0x(tx_hash)
        await self.ledger.mined(tx_hash)
        await self.shop.ended(order)

    async def mismatch(self) -> None:
        """Fifty points fewer than agreed, under the right nonce: a person accepts it; another one is dismissed."""
        async with self.undisturbed():
            accepted = await self._mismatched(
                "mismatch-accepted", End("fulfilled", 1, ("conflict", "ready", "fulfilled"))
            )
            dismissed = await self._mismatched("mismatch-dismissed", End("cancelled", 0, ("conflict", "cancelled")))
        for order, accept in ((accepted, True), (dismissed, False)):
            (conflict,) = (await self.shop.truth(order))["conflicts"]
            reason = "the customer agreed to fifty fewer" if accept else "not what was agreed"
            await self.shop.client.resolve(order.id, conflict["evidenceId"], accept, reason)
        await self.shop.becomes(dismissed, "pending")
        await self.shop.client.cancel(dismissed.id)
        await self.shop.ended(dismissed)
        await self.shop.ended(accepted)
        self._based_on(accepted, "decision", pieces=1)

    async def _mismatched(self, reference: str, end: End) -> Order:
        amount = self.amount(reference, 400)
        agreed = self.draft(reference, "redemption", BEN, amount)
        signed = self.draft(reference, "redemption", BEN, amount - 50)
        story = f"amounts differ, {'accepted' if end.status == 'fulfilled' else 'dismissed'} by a person"
        order = await self.shop.register(self.order(reference, story, [agreed], end))
        await self.ledger.mined(await self.ledger.submit(signed.signed))
        await order.heard("conflict")
        return order

    async def cancelled(self) -> None:
        draft = self.draft("cancelled", "redemption", CLEO, self.amount("cancelled"))
        end = End("cancelled", 0, ("cancelled",))
        order = await self.shop.register(self.order("cancelled", "cancelled in time", [draft], end))
        await self.shop.client.cancel(order.id)
        await self.shop.ended(order)

    async def cancelled_and_executed(self) -> None:
        """The brand cancels, and somebody submits the signed action all the same."""
        draft = self.draft("executed-anyway", "redemption", CLEO, self.amount("executed-anyway"))
        end = End("conflict", 0, ("cancelled", "conflict"))
        order = await self.shop.register(
            self.order("executed-anyway", "cancelled, and executed all the same", [draft], end)
        )
        await self.shop.client.cancel(order.id)
        await order.heard("cancelled")
        await self.ledger.submit(draft.signed)
        await self.shop.ended(order)

    async def by_wallet(self) -> None:
        draft = self.draft("by-wallet", "redemption", CLEO, self.amount("by-wallet"), match="wallet_amount")
        order = self.order("by-wallet", "matched by wallet and amount", [draft])
        await self.settle(order, draft)
        self._based_on(order, "wallet_amount", pieces=1)

    async def lost_answer(self) -> None:
        """The shop keeps the signal and its answer is lost: it comes again, and nothing is handed over twice."""
        draft = self.draft("lost-answer", "redemption", ANA, self.amount("lost-answer"))
        self.shop.lost_answers.add("lost-answer")
        await self.settle(self.order("lost-answer", "the shop's answer is lost", [draft]), draft)

    async def confirmed(self) -> None:
        """A second of chain on top is enough for these."""
        async with self.undisturbed():
            draft = self.draft(
                "confirmed", "redemption", CLEO, self.amount("confirmed", INCLUDED_UP_TO + 1, CONFIRMED_UP_TO)
            )
            order = await self.shop.register(self.order("confirmed", "policy confirmed, one second", [draft]))
            await self.ledger.submit(draft.signed)
            await order.heard("ready")
        await self.shop.ended(order)

    async def quick(self) -> None:
        """Small amounts, handed over at inclusion, in pairs: their way from block to webhook is measured."""
        drafts: list[tuple[str, Draft]] = []
        orders: list[Order] = []
        async with self.undisturbed():
            kinds: dict[str, Kind] = {f"quick-{n:02}": "redemption" for n in range(1, QUICK_REDEMPTIONS + 1)}
            kinds |= {f"quick-issue-{n}": "issuance" for n in range(1, QUICK_ISSUANCES + 1)}
            for reference, kind in kinds.items():  # signed before: nothing should keep us busy when a webhook comes
                customer = self.chance(f"{reference}/who").choice((ANA, BEN, CLEO))
                amount = self.amount(reference, 5, INCLUDED_UP_TO)
                drafts.append((reference, self.draft(reference, kind, customer, amount)))
                await asyncio.sleep(0)
            for pair in zip(drafts[::2], drafts[1::2], strict=True):
                both = [
                    await self.shop.register(self.order(reference, "policy included", [draft], measured=True))
                    for reference, draft in pair
                ]
                for _, draft in pair:
                    await self.ledger.submit(draft.signed)
                for order in both:
                    await order.heard("ready")
                orders += both
        for order in orders:
            await self.shop.ended(order)

    # ---- what the evidence rests on

    @staticmethod
    def _based_on(order: Order, basis: str, pieces: int) -> None:
        evidence = next(s for s in order.signals if s.type == "operation.ready").data["evidence"]
        bases = [entry["basis"] for entry in evidence]
        if bases != [basis] * pieces:
            raise Disappointed(f"{order.reference} was settled by {', '.join(bases)}, not by {basis}")

    @staticmethod
    def _stood_on(order: Order, confidence: str) -> None:
        evidence = next(s for s in order.signals if s.type == "operation.ready").data["evidence"]
        if {entry["confidence"] for entry in evidence} != {confidence}:
            raise Disappointed(f"{order.reference} was ready before it was {confidence}")
