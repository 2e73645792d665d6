"""Keyban's orders, polled: by wallet, where something is waited for; by one listing of all, where that works and is cheaper.

Promises that what a look brought is stored with the note of the look, that every record is seen however pages move, and that
only what two complete listings lacked is withdrawn. What an order is worth is `orders`' and the reconciler's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from math import ceil
from typing import Final
from weakref import WeakValueDictionary

from indexer.partners.account import Desk
from indexer.partners.client import Denied, Limited, PartnerError, Refused, Unavailable
from indexer.partners.orders import (
    Ledger,
    Page,
    Unusable,
    order_time,
    page_of,
    parties_of,
    questions_of,
    transfers_of,
)
from indexer.partners.reading import Drift, without_people
from indexer.partners.schedule import Schedule, Watch
from indexer.partners.walk import Walk, Walker
from indexer.store import lookups
from indexer.store import partner_accounts as accounts
from indexer.store import partner_listings as listings
from indexer.store import partners as store
from indexer.store.connection import Connection
from indexer.store.partner_accounts import OpenWallet

SWEEP_GAP: Final = 30.0  # seconds: looks closer together are one when it comes to what is missing
FULL_EVERY: Final = 600.0  # seconds between complete walks of a wallet whose listing has several pages
EMPTY_GAP: Final = 600.0  # seconds: an empty listing proves little, and only while others are not empty
EMPTY_ALONE: Final = 21_600.0  # … and for so long where there is no other
REFRESH: Final = 15.0  # seconds between looks at who is waited for, when nothing is heard of
IDLE_REFRESH: Final = 60.0
GATHER: Final = 0.25  # seconds that registrations are gathered for, at least
LEAST_WALKERS: Final = 4
MOST_WALKERS: Final = 8
LISTING_AGAIN: Final = 86_400.0  # seconds until a listing without walletId is tried again
LISTING_FROM: Final = 10  # wallets that must be due for it to be tried at all


class KeybanPoller:
    """One brand's account. `keep`: seconds for which evidence must stand unchanged until it is final (0: needless)."""

    def __init__(
        self, desk: Desk, ledger: Ledger, poll: float, *, keep: float = 0.0, sweep_gap: float = SWEEP_GAP
    ) -> None:
        self.schedule = Schedule(poll)
        self._desk, self._ledger, self._keep, self._sweep_gap = desk, ledger, keep, sweep_gap
        self._walker = Walker()
        self._started = desk.wall
        self._open: dict[str, OpenWallet] = {}
        self._idle: list[OpenWallet] = []
        self._idle_due = 0.0
        self._listing_from = 0.0  # when a listing of all may be tried; of the schedule's clock
        self._listing_pages = 1
        self._full_at = float("-inf")  # when any wallet of the account last had records to show
        self._down = False
        self._news = asyncio.Event()
        self._listing = asyncio.Lock()
        self._looks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by wallet, while it is looked at

    async def run(self) -> None:
        """Until cancelled, or until the lease is lost."""
        await self._refresh()
        # several at the lowest pace too: who has many pages is read beside the others, page by page in turn
        walkers = min(MOST_WALKERS, max(LEAST_WALKERS, ceil(self._desk.client.credential.rate)))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            for _ in range(walkers):
                group.create_task(self._look_on())

    # ---------------------------------------------------------------- whom to look at

    async def _watch(self) -> None:
        """Keeps the schedule in step with what is registered, and the account's health in the store."""
        spent = 0.0
        while True:
            if await self._desk.wakeups.wait("registered", REFRESH):
                # where many are registered, looking for them takes a tenth of the time at most
                await asyncio.sleep(max(GATHER, 10 * spent))
            started = self._desk.clock.now()
            await self._refresh()
            spent = self._desk.clock.now() - started

    async def _refresh(self) -> None:
        desk = self._desk
        async with desk.lease.transaction() as conn:
            await desk.set_clock(conn)
            waiting = await accounts.open_wallets(conn, desk.account)
        self._open = {wallet.wallet: wallet for wallet in waiting}
        watches = [Watch(wallet.wallet, desk.of_wall(wallet.newest), wallet.legs) for wallet in waiting]
        looked = {w.wallet: desk.of_wall(w.last_look) for w in waiting if w.last_look is not None}
        now = desk.clock.now()
        if self.schedule.watch(watches, now, looked):
            self._news.set()
        desk.metrics.partner_wallets.labels(*desk.account).set(len(self.schedule))
        desk.metrics.partner_behind.labels(*desk.account).set(self.schedule.oldest_wait(now))
        await desk.note_health()

    async def _look_on(self) -> None:
        desk = self._desk
        while True:
            if await self._look_at_all() or await self._look_at_next() or await self._look_at_idle():
                continue
            self._news.clear()
            due = self.schedule.due()
            wait = REFRESH if due is None else max(0.0, due - desk.clock.now())
            with suppress(TimeoutError):
                async with asyncio.timeout(min(wait, REFRESH)):
                    await self._news.wait()

    async def _look_at_next(self) -> bool:
        desk = self._desk
        wallet = self.schedule.take(desk.clock.now())
        if wallet is None:
            return False
        try:
            await self.look(self._open.get(wallet) or _new(wallet))
        except Limited as error:
            self.schedule.put_back(wallet)
            await self._trouble(error)
        except (PartnerError, Unusable) as error:
            # an outage is everybody's, and over for all at once; a refusal may be of this wallet alone, and stops no other
            self._down = self._down or isinstance(error, Unavailable) or _wide(error)
            self.schedule.failed(wallet, desk.clock.now())
            await self._trouble(error)
        else:
            self.schedule.done(wallet, desk.clock.now())
            if self._down:
                self._down = False
                self.schedule.recovered(desk.clock.now())
        return True

    async def _look_at_idle(self) -> bool:
        """One wallet with nothing open, when it is due and nobody with open legs is (or every tenth time)."""
        desk = self._desk
        now = desk.clock.now()
        due = self.schedule.due()
        if due is not None and due <= now and not self.schedule.idle_turn:
            return False
        if not self._idle:
            if now < self._idle_due:
                return False
            self._idle_due = now + IDLE_REFRESH
            async with desk.lease.transaction() as conn:
                idle = await accounts.idle_wallets(conn, desk.account, 100)
            self._idle = [wallet for wallet in idle if wallet.wallet not in self._open]
            if not self._idle:
                return False
        wallet = self._idle.pop(0)
        try:
            await self.look(wallet)
        except (PartnerError, Unusable) as error:
            if isinstance(error, Limited | Unavailable) or _wide(error):
                self._idle.clear()
            else:
                async with desk.lease.transaction() as conn:
                    await accounts.put_off(conn, desk.account, wallet.wallet)
            await self._trouble(error)
        return True

    async def _trouble(self, error: PartnerError | Unusable) -> None:
        """Told; and where the whole account is meant, a pause that nobody can shorten."""
        desk = self._desk
        if isinstance(error, Unusable):
            desk.quarantine(str(error))
        await desk.note_health()
        if isinstance(error, Limited) and error.retry_after is not None:
            await desk.clock.sleep(min(error.retry_after, REFRESH))
        elif _wide(error):
            await desk.clock.sleep(REFRESH)

    # ---------------------------------------------------------------- one wallet

    async def look(self, wallet: OpenWallet) -> None:
        """One look at one wallet: its orders into the store. Raises PartnerError, Unusable."""
        lock = self._looks.setdefault(wallet.wallet, asyncio.Lock())
        async with lock:  # a look that began earlier never writes over one that began later
            await self._look(wallet)

    async def _look(self, wallet: OpenWallet) -> None:
        desk = self._desk
        began = desk.wall
        # after a start the first look is a full one too: the configuration may say now what a value means
        full = wallet.swept is None or wallet.swept < self._started or began - wallet.swept >= FULL_EVERY
        enough = None
        if not full:
            async with desk.lease.transaction() as conn:
                known = await listings.known_of(conn, desk.account, wallet.wallet)

            def enough(walk: Walk, total: int | None) -> bool:
                """Nothing is new, and all that may still change was read."""
                return (
                    total == len(known.records)
                    and walk.rows.keys() <= known.records
                    and known.restless <= walk.rows.keys()
                )

        async def fetch(page: int, size: int) -> Page:
            return await self._page("orders", {"walletId": wallet.wallet}, page, size, wallet.wallet)

        walk = await self._walker.walk(fetch, enough)
        self._count_walk(walk)
        await self._store(wallet, walk, began)

    async def _page(self, endpoint: str, params: dict[str, str], page: int, size: int, subject: str = "") -> Page:
        params = params | {"currentPage": str(page), "pageSize": str(size)}
        drift = Drift()
        found = page_of(await self._desk.client.get(endpoint, "/v1/loyalty/orders", params, subject), drift)
        self._desk.count_drift(drift)
        return found

    def _count_walk(self, walk: Walk) -> None:
        self._desk.count("page_drift", walk.moved)
        self._desk.count("duplicate", walk.repeated)
        for why in walk.unusable:
            self._desk.quarantine(why)

    async def _store(self, wallet: OpenWallet, walk: Walk, began: float) -> None:
        desk, ledger, name = self._desk, self._ledger, wallet.wallet
        since_ms = None if wallet.first_look is None or wallet.last_look is None else int(wallet.last_look * 1000)

        async def body(conn: Connection, stored: store.Stored) -> tuple[list[store.RecordRow], bool]:
            known = await store.current_records(conn, desk.account, walk.rows.keys())
            rows = [
                desk.record(
                    record,
                    without_people(raw),
                    known.get(record),
                    name,
                    name,
                    since_ms,
                    lambda row, drift, undated: (
                        order_time(row, drift),
                        transfers_of(row, name, ledger, undated=undated, drift=drift),
                    ),
                )
                for record, raw in walk.rows.items()
            ]
            stored += await store.store_records(conn, desk.account, rows)
            stored += await listings.still_there(conn, desk.account, name, list(walk.rows), self._keep)
            swept = walk.complete and await self._sweep(conn, wallet, walk, began, stored)
            if walk.complete:
                news = bool(stored.touched) or wallet.first_look is None or bool(wallet.legs)
                await accounts.looked(conn, desk.account, [name], began, swept=swept, news=news)
            await lookups.ask_chain(conn, questions_of([t for row in rows for t in row.transfers]))
            return rows, swept

        rows, swept = await desk.write(body)
        if since_ms is not None:
            late = since_ms - 60_000
            desk.count("late", sum(1 for r in rows if r.version == 1 and r.time_ms is not None and r.time_ms < late))
        self._remember(wallet, walk, began, swept)

    async def _sweep(
        self, conn: Connection, wallet: OpenWallet, walk: Walk, began: float, stored: store.Stored
    ) -> bool:
        """Whether this complete look counts for what is missing; then that is noted."""
        desk, last = self._desk, wallet.swept
        if walk.rows:
            self._full_at = max(self._full_at, began)
        elif (await listings.known_of(conn, desk.account, wallet.wallet)).records:
            desk.count("empty_list")
            gap = EMPTY_GAP if last is not None and self._full_at > last else EMPTY_ALONE
            if last is None or began - last < gap:
                return False
        if last is not None and began - last < self._sweep_gap:
            return False
        gone = await listings.sweep(conn, desk.account, wallet.wallet, walk.rows.keys())
        stored += gone
        return True

    def _remember(self, wallet: OpenWallet, walk: Walk, began: float, swept: bool) -> None:
        """What the next look at it goes by, until the store is read again."""
        if walk.complete and wallet.wallet in self._open:
            self._open[wallet.wallet] = OpenWallet(
                wallet.wallet,
                wallet.legs,
                wallet.newest,
                wallet.oldest_ms,
                wallet.first_look or began,
                began,
                began if swept else wallet.swept,
            )

    # ---------------------------------------------------------------- all at once

    async def _look_at_all(self) -> bool:
        """One listing instead of many, where so many wallets are due that it is cheaper. False: it was not tried."""
        desk = self._desk
        now = desk.clock.now()
        if self._listing.locked() or now < self._listing_from:
            return False
        late = self.schedule.late(now)
        if late < max(LISTING_FROM, 2 * self._listing_pages):
            return False
        async with self._listing:
            began = desk.wall
            first: Page | None = None

            async def fetch(page: int, size: int) -> Page:
                nonlocal first
                if page == 1 and first is not None:
                    known, first = first, None
                    return known
                return await self._page("orders_all", {}, page, size)

            try:
                first = await fetch(1, self._walker.size)
                if not first.rows or first.total is None:
                    return self._no_listing()  # an empty answer without walletId says nothing of anybody
                self._listing_pages = ceil(first.total / max(1, len(first.rows)))
                if late < 2 * self._listing_pages:
                    return False
                taken = self._take_due()
                try:
                    walk = await self._walker.walk(fetch)
                    self._count_walk(walk)
                    await self._share_out(taken, walk, began)
                except BaseException:
                    for wallet in taken:
                        self.schedule.done(wallet, desk.clock.now() - self.schedule.poll)
                    raise
            except (Refused, Denied, Unusable):
                return self._no_listing()
            except PartnerError as error:
                self._listing_from = desk.clock.now() + FULL_EVERY
                await self._trouble(error)
            return True

    def _no_listing(self) -> bool:
        self._listing_from = self._desk.clock.now() + LISTING_AGAIN
        self._desk.client.health.forgive("orders_all")
        return False

    def _take_due(self) -> list[str]:
        taken = []
        while (wallet := self.schedule.take(self._desk.clock.now())) is not None:
            taken.append(wallet)
        return taken

    async def _share_out(self, taken: Sequence[str], walk: Walk, began: float) -> None:
        """Each wallet gets its rows of the listing, as if it had been asked for alone."""
        desk = self._desk
        wanted = {wallet.lower() if wallet[:2] in ("0x", "0X") else wallet: wallet for wallet in taken}
        shares: dict[str, dict[str, object]] = {wallet: {} for wallet in taken}
        async with desk.lease.transaction() as conn:
            known = await store.current_records(conn, desk.account, walk.rows.keys())
            shown = await listings.wallets_of(conn, desk.account, walk.rows.keys())
        for record, wallet in [*shown, *((record, each.wallet) for record, each in known.items())]:
            if wallet in shares:  # whatever it says now: what cannot be read has not gone
                shares[wallet][record] = walk.rows[record]
        for record, row in walk.rows.items():
            parties = {
                wanted[key]
                for party in parties_of(row)
                if (key := party.lower() if party[:2] in ("0x", "0X") else party) in wanted
            }
            for wallet in parties:
                shares[wallet][record] = row
        if not walk.complete:  # it grows while it is read: whoever waits is asked for alone
            self._listing_from = desk.clock.now() + FULL_EVERY
        for wallet, rows in shares.items():
            share = Walk(rows=dict(rows), complete=walk.complete, pages=0, total=None)
            lock = self._looks.setdefault(wallet, asyncio.Lock())
            async with lock:
                known_wallet = self._open.get(wallet) or _new(wallet)
                if known_wallet.last_look is None or known_wallet.last_look <= began:  # else it was looked at meanwhile
                    await self._store(known_wallet, share, began)
            if walk.complete:
                self.schedule.done(wallet, desk.clock.now())
            else:
                self.schedule.put_back(wallet)
            await asyncio.sleep(0)


def _wide(error: PartnerError | Unusable) -> bool:
    return isinstance(error, Denied) and error.wide


def _new(wallet: str) -> OpenWallet:
    return OpenWallet(wallet, 1, 0.0, 0, None, None, None)
