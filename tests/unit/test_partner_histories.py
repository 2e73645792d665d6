"""Promises 1 and 2 from a partner's answers to the pairing: histories as simulated partners would show them, page by page and in
bad weather, read and parsed as the pollers do it, and held against the truth that the simulators keep.

The store's bookkeeping is kept in memory here; `test_partner_rounds` has a real one. Groups are compared, never which of two
equal records settles which of two equal legs.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

import msgspec
import pytest

from indexer.model.evidence import PartnerTransfer, Status
from indexer.model.matching import Claim, Matching, WalletRules
from indexer.model.partner_matching import match_partners
from indexer.partners.account import Desk
from indexer.partners.credential import Clock
from indexer.partners.orders import Ledger, Page, order_time, page_of
from indexer.partners.orders import transfers_of as order_transfers
from indexer.partners.reading import Drift, without_people
from indexer.partners.transactions import history_of, row_id, row_time, scrubbed
from indexer.partners.transactions import transfers_of as row_transfers
from indexer.partners.walk import Walk, Walker
from indexer.sandbox.partners.keyban import Account, Keyban
from indexer.sandbox.partners.movement import AT_ONCE, Course, Movement
from indexer.sandbox.partners.qiibee import BASE, Qiibee, User
from indexer.sandbox.partners.wire import Request
from indexer.store.partner_accounts import Account as PolledAccount
from indexer.store.partner_listings import SWEEPS_UNTIL_GONE
from indexer.store.partners import Current, TransferRow
from indexer.telemetry import Metrics
from tests.partner_office import WORDS
from tests.unit.test_partner_matching import HOLDS, SETTLES, History, a_leg, hold_to_the_book

CASES = 1_000
BEGAN = 1_800_000_000.0
WINDOW = WalletRules(skew_ms=60_000, window_ms=600_000)
RULES = {
    (brand, partner): replace(WINDOW, hold=brand == HOLDS)
    for brand in (SETTLES, HOLDS)
    for partner in ("keyban", "qiibee")
}
DECODER = msgspec.json.Decoder(float_hook=Decimal)
#: What may strike, and how often in a round of bad weather.
WEATHER = {
    "page_drift": 0.5, "duplicates": 0.5, "disorder": 0.5, "late": 0.3, "retyped": 0.5, "missing_field": 0.5, "unknown_word": 0.3,
    "empty_list": 0.3, "blinking": 0.2, "turned": 0.2, "reincluded": 0.2, "deleted": 0.2,
}  # fmt: skip

METRICS = Metrics()  # one for all: who counts here is not what is held


@dataclass
class Shelf:
    """What the store would hold of one account: versions, evidence, and how often a record was missing."""

    desk: Desk
    records: dict[str, Current] = field(default_factory=dict)
    transfers: dict[UUID, PartnerTransfer] = field(default_factory=dict)
    looked_ms: dict[str, int] = field(default_factory=dict)  # by wallet: the last complete look

    def keep(self, wallet: str, rows: dict[str, Any], now_ms: int, read: Any, *, complete: bool, scoped: bool) -> None:
        for record, raw in rows.items():
            known = self.records.get(record)
            row = self.desk.record(record, raw, known, wallet, None, self.looked_ms.get(wallet), read)
            self.records[record] = Current((known.version if known else 0) + 1, row.raw, row.wallet, 0, row.after_ms)
            for transfer in row.transfers:
                self.transfers[transfer.id] = self.as_read(transfer, row.after_ms, now_ms)
            told = {transfer.id for transfer in row.transfers}
            for silent in [t for t in self.transfers.values() if t.record_id == record and t.id not in told]:
                if row.readable and silent.status is not Status.FAILED and (not scoped or silent.wallet == wallet):
                    self.transfers[silent.id] = replace(silent, status=Status.PENDING, amount=None)
        if not complete:
            return
        self.looked_ms[wallet] = now_ms
        for record, current in self.records.items():
            if current.wallet == wallet and record not in rows:
                self.records[record] = replace(current, missing=current.missing + 1)
                if current.missing + 1 >= SWEEPS_UNTIL_GONE:
                    for lost in [t for t in self.transfers.values() if t.record_id == record]:
                        self.transfers[lost.id] = replace(lost, withdrawn=True)

    def as_read(self, row: TransferRow, after_ms: int | None, now_ms: int) -> PartnerTransfer:
        was = self.transfers.get(row.id)
        if was is not None and row.doubtful and row.status != "failed":
            return was
        after_ms = None if row.undated else after_ms
        stated = row.time_ms if row.time_ms is not None else after_ms if was is None else was.stated_ms
        account = self.desk.account
        return PartnerTransfer(
            brand=account.brand,
            partner=account.partner,
            kind=row.kind,
            record_id=row.record_id,
            wallet=row.wallet,
            token=row.token,
            amount=row.amount,
            status=Status(row.status),
            first_seen_ms=now_ms if was is None else was.first_seen_ms,
            stated_ms=stated,
            undated=(row.undated if was is None else was.undated) and row.time_ms is None,
            dateless=row.time_ms is None and (after_ms is not None if was is None else was.dateless),
        )


class Case:
    """One brand's account at one partner, its legs, and what became of them."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.at = BEGAN
        self.partner: Keyban | Qiibee
        self.calm = False
        self.tells = True  # whether something failed, or has turned
        if rng.random() < 0.6:
            self.partner = Keyban(seed=seed, clock=lambda: self.at)
            self.partner.tells_total = rng.random() < 0.8
            self.partner.tells_success = self.tells = rng.random() < 0.8
        else:
            self.partner = Qiibee(seed=seed, clock=lambda: self.at)
        partner = self.partner
        self.name = "keyban" if isinstance(partner, Keyban) else "qiibee"
        self.kinds = (
            ("keyban.mint", "keyban.burn") if isinstance(partner, Keyban) else ("qiibee.credit", "qiibee.debit")
        )
        self.owners: list[Account | User] = [
            partner.open_account() if isinstance(partner, Keyban) else partner.enrol() for _ in range(rng.randint(1, 2))
        ]
        self.amounts = [10, 20][: rng.randint(1, 2)]
        partner.stranger = self.move  # type: ignore[method-assign]
        self.brand = rng.choice([SETTLES, SETTLES, HOLDS])
        clock = Clock(now=lambda: self.at, wall=lambda: self.at)
        desk = Desk(
            PolledAccount(self.brand, self.name), cast(Any, None), cast(Any, None), cast(Any, None), METRICS, clock
        )
        self.shelf = Shelf(desk)
        self.history = History([], [], window=WINDOW)
        self.walker = Walker()
        self.walker.size = rng.choice([3, 5, 100])
        self.stored: list[Claim] = []

    @staticmethod
    def wallet_of(owner: Account | User) -> str:
        return owner.wallet if isinstance(owner, Account) else owner.auth_id

    # ---- what happens

    def move(self, course: Course = AT_ONCE) -> Movement:
        rng, owner, amount = self.rng, self.rng.choice(self.owners), self.rng.choice(self.amounts)
        incoming = rng.random() < 0.8
        if isinstance(self.partner, Keyban):
            assert isinstance(owner, Account)
            if incoming and amount == 20 and rng.random() < 0.3:
                return self.partner.mint(owner, amount, course, nodes=(15, 5))
            return (self.partner.mint if incoming else self.partner.burn)(owner, amount, course)
        assert isinstance(owner, User)
        return (self.partner.credit if incoming else self.partner.debit)(owner, amount, course)

    def register(self) -> None:
        rng = self.rng
        now_ms = int(self.at * 1000)
        asked_ms = now_ms - (rng.randint(0, 300_000) if rng.random() < 0.3 else 0)
        leg = a_leg(
            len(self.history.legs), 0, asked_ms, brand=self.brand, kind=self.kinds[rng.random() < 0.2],
            wallet=self.wallet_of(rng.choice(self.owners)), amount=rng.choice(self.amounts), registered_at_ms=now_ms,
        )  # fmt: skip
        self.history.legs.append(leg)

    def course(self) -> Course:
        rng = self.rng
        chance = rng.random()
        if chance < 0.05:
            return Course(None, None, None)
        appears = rng.uniform(-90, 60)
        sent = appears + rng.uniform(0, 30)
        return Course(
            appears, sent, None if chance < 0.1 else sent + rng.uniform(0, 60), fails=chance > 0.9 and self.tells
        )

    def something_happens(self) -> None:
        rng, partner = self.rng, self.partner
        self.at += rng.uniform(5, 120)
        for step in rng.choices((self.register, lambda: self.move(self.course())), k=rng.randint(1, 5)):
            step()
        for moved in partner.movements.values():
            if (
                isinstance(partner, Keyban)
                and moved.settles_at != self.at
                and moved.id not in self.shelf.records
                and rng.random() < 0.3
            ):
                partner.dateless.add(moved.id)
            if moved.deleted_at is not None and rng.random() < 0.3:
                moved.deleted_at = None

    # ---- how it is read

    @property
    def believes_nothing(self) -> bool:
        """An empty answer alone says nothing, but for one that stays so for long."""
        return not self.shelf.records or self.calm

    async def look(self) -> None:
        now_ms = int(self.at * 1000)
        if isinstance(self.partner, Keyban):
            for owner in self.owners:
                await self._look_at_orders(self.wallet_of(owner), now_ms)
            return
        request = Request("GET", f"{BASE}/transactions", {"limit": "100", "offset": "0"})
        page = history_of(DECODER.decode(self.partner.answer(request).body), Drift())
        rows = {row_id(row): scrubbed(row) for row in page.rows}

        def read(row: Any, drift: Drift, undated: bool) -> Any:
            return row_time(row, drift), row_transfers(row, WORDS, undated=undated, drift=drift)

        self.shelf.keep("", rows, now_ms, read, complete=bool(rows) or self.believes_nothing, scoped=False)

    async def _look_at_orders(self, wallet: str, now_ms: int) -> None:
        ledger = Ledger(self.brand, "StellarTestnet")

        async def fetch(page: int, size: int) -> Page:
            query = {"walletId": wallet, "currentPage": str(page), "pageSize": str(size)}
            reply = self.partner.answer(Request("GET", "/v1/loyalty/orders", query))
            return page_of(DECODER.decode(reply.body), Drift())

        def read(row: Any, drift: Drift, undated: bool) -> Any:
            return order_time(row, drift), order_transfers(row, wallet, ledger, undated=undated, drift=drift)

        walk: Walk = await self.walker.walk(fetch)
        rows = {record: without_people(raw) for record, raw in walk.rows.items()}
        complete = walk.complete and (bool(rows) or self.believes_nothing)
        self.shelf.keep(wallet, rows, now_ms, read, complete=complete, scoped=True)

    # ---- what is held

    def settle(self) -> Matching:
        """One pass: what the rules make of what was read, held to the book; some become ready."""
        transfers = list(self.shelf.transfers.values())
        self.history.looks = [transfers]
        now = match_partners(self.history.legs, transfers, self.stored, rules=RULES)
        standing = {t.id: t for t in transfers if not t.withdrawn}
        hold_to_the_book(self.history, standing, self.stored, now)
        for claim in now.claims.values():
            moved = self.partner.movements[standing[claim.evidence_id].record_id]
            assert moved.included(self.at), "never before it was there"
            # inclusion alone is what an order says whose `success` is left out
            assert not moved.fails or standing[claim.evidence_id].status is Status.INCLUDED
        # other orders of pages and of legs, and everything twice, are the same facts
        legs, again = list(self.history.legs), [*transfers, *transfers]
        self.rng.shuffle(legs)
        self.rng.shuffle(again)
        assert match_partners(legs, again, self.stored, rules=RULES) == now
        self.stored = [replace(claim, final=claim.final or self.rng.random() < 0.4) for claim in now.claims.values()]
        return now

    def hold_to_the_truth(self, now: Matching) -> None:
        """What counts is what has really moved; and what has settled, by group, is as much of it as can."""
        found: dict[tuple[str, str, int], set[str]] = defaultdict(set)
        for transfer in self.shelf.transfers.values():
            if transfer.counts and transfer.amount is not None:
                found[transfer.kind, transfer.wallet, transfer.amount].add(transfer.record_id)
                moved = self.partner.movements[transfer.record_id]
                at = moved.settles_at if self.name == "keyban" else moved.appears_at
                assert at is not None
                if not transfer.undated and not transfer.dateless:
                    assert abs(transfer.time_ms - at * 1000) <= 1_000
        truth: dict[tuple[str, str, int], set[str]] = defaultdict(set)
        for moved in self.partner.standing():
            truth[moved.kind, moved.wallet, int(moved.amount)].add(moved.id)
        assert found == truth
        claimed = Counter(self.shelf.transfers[claim.evidence_id].record_id for claim in now.claims.values())
        assert max(claimed.values(), default=1) == 1


async def play(seed: int, seen: Counter[str]) -> None:
    case = Case(seed)
    weather = case.partner.weather
    for _ in range(case.rng.randint(2, 4)):
        case.something_happens()
        if case.rng.random() < 0.7:
            for fault in case.rng.sample(sorted(WEATHER.keys() - (set() if case.tells else {"turned"})), 4):
                weather.begin(fault, chance=WEATHER[fault])
        await case.look()
        weather.end()
        case.settle()
    # calm at last: everything has become what it will, and two listings say so
    case.calm = True
    for _ in range(3):
        case.at += 400
        await case.look()
    now = case.settle()
    case.hold_to_the_truth(now)
    # read once more, in pages of another size and order: nothing is new
    before = dict(case.shelf.transfers)
    if isinstance(case.partner, Keyban):
        case.partner.order = case.rng.choice(["oldest", "shuffled"] if case.walker.size == 100 else ["oldest"])
        case.walker.size = 4 if case.partner.order == "oldest" else 100
    await case.look()
    assert case.shelf.transfers == before
    again = match_partners(case.history.legs, before.values(), case.stored, rules=RULES)
    assert again.claims.keys() == now.claims.keys()
    seen.update(settled=len(now.claims), held=len(now.held), offered=len(now.offers), failed=len(now.failed))
    seen.update("ambiguous" for claim in now.claims.values() if claim.ambiguous)
    seen.update(withdrawn=sum(t.withdrawn for t in before.values()), undated=sum(t.undated for t in before.values()))
    seen.update(dateless=sum(t.dateless for t in before.values()), **weather.struck)


@pytest.mark.parametrize("part", range(4))
def test_histories_of_partners_read_page_by_page_keep_the_promises(part: int) -> None:
    seen: Counter[str] = Counter()

    async def main() -> None:
        for seed in range(part, CASES, 4):
            try:
                await play(seed, seen)
            except (AssertionError, KeyError) as wrong:
                raise AssertionError(f"seed {seed}: {wrong}") from wrong

    asyncio.run(main())
    for what in ("settled", "ambiguous", "held", "offered", "failed", "withdrawn", "undated", "dateless", *WEATHER):
        assert seen[what] >= 4, f"the worlds hold too little of what matters: {what} in {seen}"
