"""qiibee's transactions, polled: one listing for the whole account, newest first, read by offset while it grows.

Promises that every look reads back until a whole page is known and at rest, and past what may still change; that sweeps with a
fixed end compare everything in between; and that only what two of them lacked is withdrawn. What a row means is
`transactions`' business.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from indexer.partners.account import Desk
from indexer.partners.client import Denied, Limited, PartnerError, Unavailable
from indexer.partners.orders import Unusable
from indexer.partners.reading import Drift
from indexer.partners.schedule import SLOWEST, pause
from indexer.partners.transactions import (
    History,
    Words,
    history_of,
    row_id,
    row_time,
    scrubbed,
    transfers_of,
    unknown_status,
)
from indexer.store import partner_accounts as accounts
from indexer.store import partner_listings as listings
from indexer.store import partners as store
from indexer.store.connection import Connection

LIMIT: Final = 100  # never more: what the API does with more is not stated
OVERLAP: Final = 10  # rows that two pages share: rows of one second have no order
WALKS: Final = 12  # of a range that keeps moving
MOST_PAGES: Final = 20_000
SWEEP_EVERY: Final = 600.0  # seconds between sweeps of the horizon, while something is open or was lately
HORIZON: Final = 2 * 86_400.0  # seconds that a sweep reaches back, but for once a day, when it reads everything
WHOLE_EVERY: Final = 86_400.0
EMPTY_ALONE: Final = 21_600.0  # seconds until an empty account is believed, where there were rows
PATIENCE: Final = 10  # times that one page of a sweep is waited for
RESTLESS: Final = 3600.0  # seconds for which every look reaches back to a row that may still change; then sweeps do
WAIT: Final = 15.0
GATHER: Final = 1.0  # seconds that registrations are gathered for


@dataclass(slots=True)
class Reading:
    """A range, read: its rows bear the number `walk` or a later one in the store. However long it is, no page is kept here."""

    walk: int
    empty: bool = True
    whole: bool = False  # everything that the question asked for, as it stood at one time


class QiibeePoller:
    """One brand's account. `settle_after`: seconds for which a success must stand unchanged."""

    def __init__(
        self, desk: Desk, poll: float, settle_after: float, words: Words, *, sweep_every: float = SWEEP_EVERY
    ) -> None:
        self._desk, self._poll, self._keep, self._sweep_every = desk, poll, settle_after, sweep_every
        self._words = words
        self._newest: float | None = None  # registration of the youngest open leg, of the schedule's clock
        self._oldest_ms: int | None = None  # what the oldest open leg's request bears as its time
        self._failures = 0
        self._page_at_a_time = asyncio.Lock()  # an answer is stored before the next is asked for: the later one counts

    async def run(self) -> None:
        """Until cancelled, or until the lease is lost. Sweeps go on beside the looks: a long history keeps nobody waiting."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._look_on())
            group.create_task(self._sweep_on())

    async def _look_on(self) -> None:
        desk = self._desk
        while True:
            await self._refresh()
            try:
                await self.look()
                self._failures = 0
            except (PartnerError, Unusable) as error:
                self._failures += 1
                self._note(error)
                wait = error.retry_after if isinstance(error, Limited) else None
                due = desk.clock.now() + (wait or (WAIT if isinstance(error, Denied) else self._pause()))
            else:
                due = desk.clock.now() + self._pause()
            await desk.note_health()
            await self._wait_until(due)

    async def _sweep_on(self) -> None:
        desk = self._desk
        while True:
            try:
                await self.sweep_if_due()
            except (PartnerError, Unusable) as error:
                self._note(error)
                await desk.note_health()
                await desk.clock.sleep(WAIT)
            await desk.clock.sleep(min(WAIT, max(self._sweep_every, GATHER)))

    def _note(self, error: PartnerError | Unusable) -> None:
        if isinstance(error, Unusable):
            self._desk.quarantine(str(error))
            self._desk.client.health.note(str(error), "unusable")

    def _pause(self) -> float:
        now = self._desk.clock.now()
        wait = SLOWEST if self._newest is None else pause(self._poll, now - self._newest)
        return min(SLOWEST, wait * 2.0 ** min(self._failures, 6))

    async def _wait_until(self, due: float) -> None:
        """Sleeps; what is newly open (registered, or taken back by a sweep) brings the next look nearer, but not so near that many
        registrations would spend the budget."""
        desk = self._desk
        began = desk.clock.now()
        while (left := due - desk.clock.now()) > 0:
            if await desk.wakeups.wait("registered", min(left, WAIT)):
                await desk.clock.sleep(min(GATHER, left))
            if not self._failures:
                await self._refresh()
                due = min(due, began + self._pause())

    async def _refresh(self) -> None:
        desk = self._desk
        async with desk.lease.transaction() as conn:
            await desk.set_clock(conn)
            waiting = await accounts.open_wallets(conn, desk.account)
        self._newest = max((desk.of_wall(each.newest) for each in waiting), default=None)
        self._oldest_ms = min((each.oldest_ms for each in waiting), default=None)
        desk.metrics.partner_wallets.labels(*desk.account).set(len(waiting))

    # ---------------------------------------------------------------- looks

    async def look(self) -> None:
        """The newest rows, each page stored as it comes: back until a whole page is known and at rest, and past the oldest that may
        still change. The first look goes back to what the oldest open leg can be about; the rest of the history is the sweep's."""
        desk = self._desk
        began = desk.wall
        async with desk.lease.transaction() as conn:
            state = await accounts.account_state(conn, desk.account)
            restless = await listings.oldest_restless_ms(conn, desk.account, began - RESTLESS)
        last: float | None = state.get("last_look")
        offset, before = 0, None
        for _ in range(MOST_PAGES):
            async with self._page_at_a_time:
                page = await self._page(offset, {})
                if before is not None and page.total not in (None, before):
                    desk.count("page_drift")  # rows slid down and come twice; those that slid up are the sweep's
                before = page.total
                rows = self._rows(page)
                if not offset and not rows and last is not None:
                    await self._empty()
                ended = len(page.rows) < LIMIT or (page.total is not None and offset + len(page.rows) >= page.total)
                ended = ended or await self._enough(rows, restless, began if last is None else None)
                await self._store(rows, state, last, {"last_look": began} if ended else {})
            if ended:
                break
            offset += len(page.rows) - OVERLAP

    async def _enough(self, rows: dict[str, Any], restless_ms: int | None, first: float | None) -> bool:
        """`first`: when the first look of all began, of which everything is new."""
        times = [time for row in rows.values() if (time := row_time(row, Drift())) is not None]
        if first is not None:
            floor_ms = int(first * 1000) if self._oldest_ms is None else min(int(first * 1000), self._oldest_ms)
            return bool(times) and min(times) < floor_ms - HORIZON * 1000
        if restless_ms is not None and (not times or min(times) >= restless_ms):
            return False
        async with self._desk.lease.transaction() as conn:
            resting = await listings.resting(conn, self._desk.account, list(rows), self._keep)
        return bool(rows) and resting == len(rows)

    async def _empty(self) -> None:
        async with self._desk.lease.transaction() as conn:
            if (await listings.known_of(conn, self._desk.account, "", limit=1)).records:
                self._desk.count("empty_list")

    async def _page(self, offset: int, span: dict[str, str]) -> History:
        drift = Drift()
        params = {"limit": str(LIMIT), "offset": str(offset), **span}
        page = history_of(await self._desk.client.get("transactions", "/transactions", params), drift)
        self._desk.count_drift(drift)
        return page

    def _rows(self, page: History) -> dict[str, Any]:
        """The usable rows of a page, scrubbed; what is odd about their order is counted."""
        found: dict[str, Any] = {}
        latest: int | None = None
        disorder = False
        for raw in page.rows:
            try:
                record = row_id(raw)
            except Unusable as why:
                self._desk.quarantine(str(why))
                continue
            if record in found:
                self._desk.count("duplicate")
            row = scrubbed(raw)
            time = row_time(row, Drift())
            disorder |= time is not None and latest is not None and time > latest
            latest = time if time is not None else latest
            found[record] = row
        self._desk.count("disorder", int(disorder))
        return found

    async def _store(
        self,
        rows: dict[str, Any],
        state: dict[str, Any],
        last: float | None,
        times: dict[str, float] | None = None,
        walk: int | None = None,
    ) -> int:
        """A page's rows, with the note of the look where that is its end. `last`: the look before, whose rows are not late.

        `walk`: the number that they are marked with. Answers how many did not bear it yet.
        """
        desk, words = self._desk, self._words
        for row in rows.values():
            if (word := unknown_status(row, words)) is not None:
                desk.unknown_word("status", word, "name it in success, pending or failed of [brands.qiibee]")
        # looks read the newest page alone: what has no time of its own came after the history was last read whole
        whole = state.get("swept_whole")
        since_ms = None if whole is None else int(whole * 1000)

        async def body(conn: Connection, stored: store.Stored) -> tuple[list[store.RecordRow], int]:
            known = await store.current_records(conn, desk.account, rows.keys())
            found = [
                desk.record(
                    record,
                    row,
                    known.get(record),
                    "",
                    None,
                    since_ms,
                    lambda row, drift, undated: (
                        row_time(row, drift),
                        transfers_of(row, words, undated=undated, drift=drift),
                    ),
                )
                for record, row in rows.items()
            ]
            stored += await store.store_records(conn, desk.account, found)
            stored += await listings.still_there(conn, desk.account, "", list(rows), self._keep)
            fresh = 0
            if walk is not None:
                fresh = await listings.mark(conn, desk.account, rows.keys(), walk)
                await accounts.save_state(conn, desk.account, {"walk": walk})
            if times:
                await accounts.save_state(conn, desk.account, times)
            return found, fresh

        found, fresh = await desk.write(body)
        if last is not None:
            late = (last - 60) * 1000
            desk.count("late", sum(1 for r in found if r.version == 1 and r.time_ms is not None and r.time_ms < late))
        return fresh

    # ---------------------------------------------------------------- sweeps

    async def sweep_if_due(self) -> None:
        """Reads a range with a fixed end, whole: what is missing from two of them is withdrawn."""
        desk = self._desk
        async with desk.lease.transaction() as conn:
            state = await accounts.account_state(conn, desk.account)
        if "last_look" not in state:
            return  # what is waited for is read first
        now = desk.wall
        swept, whole = state.get("swept", 0.0), state.get("swept_whole", 0.0)
        everything = now - whole >= WHOLE_EVERY
        gap = self._sweep_every if self._newest is not None else 6 * self._sweep_every
        if not everything and now - swept < gap:
            return
        since = None if everything else now - HORIZON
        reading = await self._range(since, now, state)
        since_ms = None if since is None else int(since) * 1000

        async def body(conn: Connection, stored: store.Stored) -> None:
            if reading.whole and (not reading.empty or now - swept >= EMPTY_ALONE):
                stored += await listings.sweep(conn, desk.account, "", reading.walk, since_ms, int(now) * 1000)
            times = {"swept": now} | ({"swept_whole": now} if everything else {})
            await accounts.save_state(conn, desk.account, times)

        await desk.write(body)

    async def _range(self, since: float | None, until: float, state: dict[str, Any]) -> Reading:
        """Every row between two times, stored page by page, and read again until all that is counted was seen.

        The end is fixed, so nothing new slides in; but rows of one second have another order in every answer, and what one
        walk misses at the edge of a page the next one shows. Which were seen is marked in the store.
        """
        span = {"to_time": _iso(until)} | ({"from_time": _iso(since)} if since is not None else {})
        walk, read = int(state.get("walk", 0)) + 1, 0
        reading = Reading(walk)
        for _ in range(WALKS):
            offset, total, moved, unusable = 0, None, False, 0
            for _ in range(MOST_PAGES):
                page, fresh = await self._page_after_all(offset, span, state, walk)
                total = page.total if total is None else total
                moved = moved or page.total not in (None, total)
                unusable += sum(1 for row in page.rows if not _has_id(row))
                read += fresh
                if len(page.rows) < LIMIT:
                    break
                offset += len(page.rows) - OVERLAP
            reading.empty = reading.empty and not read
            if not moved and not unusable and total in (None, read):
                reading.whole = True
                return reading
            if unusable:
                return reading  # what has no id may be any that is missing
            self._desk.count("page_drift")
            if moved or (total is not None and read > total):
                walk, read = walk + 1, 0  # something went meanwhile: what was read before says nothing of now
        return reading

    async def _page_after_all(
        self, offset: int, span: dict[str, str], state: dict[str, Any], walk: int
    ) -> tuple[History, int]:
        """A page of a long walk, stored, and how many of its rows that walk had not shown before: what fails for a while is no reason to begin again."""
        failures = 0
        while True:
            try:
                async with self._page_at_a_time:
                    page = await self._page(offset, span)
                    return page, await self._store(self._rows(page), state, None, walk=walk)
            except (Limited, Unavailable) as error:
                failures += 1
                if failures > PATIENCE:
                    raise
                wait = error.retry_after if isinstance(error, Limited) else None
                await self._desk.clock.sleep(max(WAIT, wait or 0.0))


def _has_id(row: Any) -> bool:
    try:
        row_id(row)
    except Unusable:
        return False
    return True


def _iso(at: float) -> str:
    return datetime.fromtimestamp(int(at), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
