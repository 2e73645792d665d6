"""Reading a listing by page numbers that moves while it is read: every page, each record once, and whether that was all of it.

Nothing is known of the order of Keyban's orders (facts/keyban.md, section 10), so a walk never stops at page one because it
looks old; it stops early only where the total, and every record that may still change, are accounted for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from indexer.partners.client import Refused
from indexer.partners.orders import Page, Unusable, order_id

LARGEST: Final = 100  # rows of a page that is asked for
SMALLEST: Final = 10  # what is asked for instead where that is refused
WALKS: Final = 3  # of one listing that keeps moving; then what was read counts, and the listing as incomplete
SHORT: Final = 10  # pages of a listing that is walked again at once: a longer one waits for its next turn, as others wait for theirs
MOST_PAGES: Final = 10_000
_CAPS: Final = frozenset({10, 20, 25, 30, 40, 50})  # a page of exactly so many rows may be cut short by the server

Fetch = Callable[[int, int], Awaitable[Page]]  # (page, size)


@dataclass(slots=True)
class Walk:
    """What a walk brought: rows by id, each as it was read last."""

    rows: dict[str, Any] = field(default_factory=dict)
    complete: bool = False  # the whole listing as it stood at one time
    pages: int = 0
    total: int | None = None
    moved: int = 0  # how often the pages moved
    repeated: int = 0  # records that one page held twice
    unusable: list[str] = field(default_factory=list)


class Walker:
    """Walks listings of one account; learns the page size that it accepts."""

    def __init__(self) -> None:
        self.size = LARGEST

    async def walk(self, fetch: Fetch, enough: Callable[[Walk, int | None], bool] | None = None) -> Walk:
        """The whole listing, walked again while it moves. `enough` may end a walk early (then it is not complete).

        Raises PartnerError, Unusable.
        """
        walk = Walk()
        for _ in range(WALKS):
            before = walk.moved
            ended = await self._once(fetch, walk, enough)
            if walk.moved == before:
                walk.complete = ended and not walk.unusable  # what could not be read has not gone
                break
            if walk.pages > SHORT:
                break
        return walk

    async def _once(self, fetch: Fetch, walk: Walk, enough: Callable[[Walk, int | None], bool] | None) -> bool:
        """One walk from page one, to the end also of a listing that moves meanwhile; True when it came there."""
        seen: dict[str, int] = {}
        first: list[str] = []
        total: int | None = None
        grew = False
        walk.unusable.clear()  # of a walk before
        for number in range(1, MOST_PAGES + 1):
            page = await self._fetch(fetch, number)
            walk.pages += 1
            if total is None:
                total = walk.total = page.total
            elif page.total not in (None, total) and not grew:
                grew = True
                walk.moved += 1
            fresh = 0
            ids: list[str] = []
            for row in page.rows:
                try:
                    record = order_id(row)
                except Unusable as why:
                    walk.unusable.append(str(why))
                    fresh += 1
                    continue
                if record in ids:
                    walk.repeated += 1
                elif record in seen:
                    walk.moved += 1  # it slid over from the page before
                else:
                    fresh += 1
                ids.append(record)
                seen.setdefault(record, number)
                walk.rows[record] = row
            first = first or ids
            counted = len(seen) + len(walk.unusable)
            if self._ended(page, fresh, counted, total):
                if total is not None:
                    walk.moved += len(seen) < total - len(walk.unusable)
                elif number > 1:
                    again = await self._fetch(fetch, 1)
                    walk.pages += 1
                    walk.moved += [row.get("id") for row in again.rows if isinstance(row, dict)][:1] != first[:1]
                return True
            if enough is not None and enough(walk, total):
                return False
        return False

    def _ended(self, page: Page, fresh: int, counted: int, total: int | None) -> bool:
        if not page.rows or not fresh:
            return True
        if total is not None:
            return counted >= total
        return len(page.rows) < self.size and len(page.rows) not in _CAPS

    async def _fetch(self, fetch: Fetch, number: int) -> Page:
        try:
            return await fetch(number, self.size)
        except Refused as refusal:
            if refusal.status not in (400, 422) or self.size == SMALLEST or number > 1:
                raise
            self.size = SMALLEST
            return await fetch(number, self.size)
