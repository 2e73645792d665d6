"""What every poller of an account does alike: count what is odd, keep its health in the store, wake the reconciler.

Promises that each kind of oddity moves a counter of its own, and that a partner's failure is told once, not at every attempt.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

import asyncpg
import structlog

from indexer.partners.client import Client
from indexer.partners.credential import Clock
from indexer.partners.reading import Drift, alike, completed, storable
from indexer.store import partner_accounts as accounts
from indexer.store import partners as store
from indexer.store.leases import Lease
from indexer.store.partner_accounts import Account
from indexer.store.partners import Current, RecordRow, Stored, TransferRow
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics

HEALTH_SECONDS: Final = 30.0  # between writings of a health that did not change
TRIES: Final = 3  # of a transaction that waits for another in a circle
CLOCK_SKEW_MS: Final = 10_000  # ahead of our clock: more is told; nothing relies on it

log = structlog.get_logger(__name__)

Found = TypeVar("Found")

#: What is odd in a partner's answers: the label of one counter.
Oddity = Literal[
    "page_drift",  # pages moved while they were read, and were read again (F111)
    "duplicate",  # one record twice in a page (F112)
    "disorder",  # not in the order that is promised (F112)
    "late",  # a record that is older than a look that did not show it (F112)
    "changed",  # a record says something else than before (F113)
    "unsettled",  # … and its evidence does not count any more, or elsewhere (F113)
    "type",  # a number as a string, or the other way round (F114)
    "missing_field",  # a field that was there before (F114)
    "unknown_word",  # of an enumeration (F114)
    "unreadable",  # a value that is none (F114)
    "quarantined",  # a row, or an answer, that cannot be used at all (F114)
    "clock_skew",  # a record from the future (F115)
    "empty_list",  # nothing, where something was (F116)
    "missing",  # a record that a full sweep lacked (F118)
    "withdrawn",  # … and the second one too (F118)
    "returned",  # a record that had been missing (F118)
    "foreign",  # evidence that another brand's account has shown
    "difference",  # Loyfin's API and the chain do not say the same
]
MOST_TOLD: Final = 1000  # kinds of news of one account
_OF_VALUES: Final = {
    "type": "numbers came as strings, or strings as numbers: they are read all the same",
    "unreadable": "values came that cannot be read",
}
_OF_DRIFT: Final[dict[str, Oddity]] = {
    "type": "type",
    "missing": "missing_field",
    "word": "unknown_word",
    "unreadable": "unreadable",
}


@dataclass(slots=True)
class Desk:
    """One account's poller at work under its lease: where it asks, writes and counts."""

    account: Account
    client: Client
    lease: Lease
    wakeups: Wakeups
    metrics: Metrics
    clock: Clock
    _health: tuple[str | None, str | None] | None = None
    _health_at: float = 0.0
    _ahead: float = 0.0  # the database's clock less ours, seconds
    told: set[str] = field(default_factory=set)
    _refused: str | None = None  # as it was logged last
    _troubles: set[str] = field(default_factory=set)  # kinds that were logged since all was well

    def count(self, oddity: Oddity, times: int = 1) -> None:
        if times:
            self.metrics.partner_oddities.labels(*self.account, oddity).inc(times)

    def count_drift(self, drift: Drift) -> None:
        """Counted; and each kind told once, missing fields by name: it is how a changed API shows first."""
        for kind, times in drift.items():
            self.count(_OF_DRIFT[kind], times)
            if times and kind in _OF_VALUES:
                self._tell_once(_OF_VALUES[kind])
        for name in sorted(drift.gone):
            self._tell_once("a field is missing that was there before: what it said stays", field=name[:80])

    def _tell_once(self, event: str, **more: str) -> None:
        told = " ".join((event, *more.values()))
        if told not in self.told and len(self.told) < MOST_TOLD:
            self.told.add(told)
            log.warning(event, **self._who, **more)

    def count_stored(self, stored: Stored) -> None:
        self.count("changed", stored.changed)
        self.count("unsettled", stored.unsettled)
        self.count("missing", stored.missing)
        self.count("withdrawn", stored.withdrawn)
        self.count("returned", stored.returned)
        self.count("foreign", stored.foreign)
        if stored.foreign and "foreign" not in self.told:
            self.told.add("foreign")
            log.error(
                "another brand's account shows the same records: they are evidence for that brand alone", **self._who
            )
        if stored.unsettled:
            log.warning("evidence changed or is gone", **self._who, records=stored.unsettled)

    def quarantine(self, why: str) -> None:
        """A row that cannot be used: counted, and each reason told once."""
        self.count("quarantined")
        self._tell_once("a record cannot be used", reason=why)

    @property
    def _who(self) -> dict[str, str]:
        return {"partner": self.account.partner, "brand": self.account.brand}

    # ---------------------------------------------------------------- time

    @property
    def wall(self) -> float:
        """Unix seconds by the database's clock, as near as we know it."""
        return self.clock.wall() + self._ahead

    def of_wall(self, then: float) -> float:
        """A Unix time of the database as one of the schedule's clock."""
        return self.clock.now() - (self.wall - then)

    async def set_clock(self, conn: asyncpg.Connection) -> None:
        self._ahead = await accounts.clock(conn) - self.clock.wall()

    # ---------------------------------------------------------------- the store

    async def write(self, body: Callable[[asyncpg.Connection, Stored], Awaitable[Found]]) -> Found:
        """A leased transaction; what the body adds to the Stored is touched before it commits, counted and told after.

        The body is begun anew where it and somebody else waited for each other (PostgreSQL ends one of the two): it goes by what
        it reads in the transaction, and by what a partner's answer holds.
        """
        for left in reversed(range(TRIES)):
            stored = Stored()
            try:
                async with self.lease.transaction() as conn:
                    found = await body(conn, stored)
                    await store.take_over(conn, self.account, stored)
                    await store.touch_partner_legs(conn, self.account.brand, stored.touched)
                break
            except asyncpg.DeadlockDetectedError:
                if not left:
                    raise
        if stored.touched:
            self.wakeups.poke("facts")
        self.count_stored(stored)
        return found

    async def note_health(self) -> None:
        """Writes how the account fares where that changed, or was written long ago."""
        health = self.client.health
        now, state = self.clock.now(), (health.problem, health.refused)
        if self._health == state and now - self._health_at < HEALTH_SECONDS:
            return
        self._tell_health()
        ago = None if health.answered_at is None else max(0.0, self.clock.wall() - health.answered_at)
        async with self.lease.transaction() as conn:
            await accounts.note_health(conn, self.account, *state, ago)
        self.metrics.partner_refused.labels(*self.account).set(health.refused is not None)
        self._health, self._health_at = state, now

    def _tell_health(self) -> None:
        """Each refusal and each kind of trouble is logged once, until all is well again."""
        health = self.client.health
        if health.refused is not None:
            if health.refused != self._refused:
                log.error("the partner does not accept the key", **self._who, reason=health.refused)
        elif health.problem is not None:
            if (kind := health.kind or health.problem) not in self._troubles:
                self._troubles.add(kind)
                log.warning("the partner does not answer well", **self._who, reason=health.problem)
        elif self._refused is not None or self._troubles:
            self._troubles.clear()
            log.info("the partner answers again", **self._who)
        self._refused = health.refused

    def unknown_word(self, where: str, word: str, hint: str | None = None) -> None:
        """A word of an enumeration that is not configured: told once."""
        more = {} if hint is None else {"hint": hint}
        self._tell_once("a word is not known, and settles nothing", field=where, word=word, **more)

    def record(
        self,
        record_id: str,
        raw: Any,
        known: Current | None,
        wallet: str,
        scope: str | None,
        since_ms: int | None,
        read: Callable[[Any, Drift, bool], tuple[int | None, tuple[TransferRow, ...] | None]],
    ) -> RecordRow:
        """One row of a listing beside what is stored of it; without evidence, and counted, where nothing can be made of it.

        `read` gives the record's own time and the evidence in it, None where it does not know what the record speaks of; told whether evidence without a time of its own is undated. That
        it is where the record was there at the first look; else it came after `since_ms`, the look before the record was first seen,
        however long it was queued then. Drift counts where a record is new or says something new,
        not at every look.
        """
        drift = Drift()
        received = storable(raw)
        document = received if known is None else completed(received, known.raw, drift)
        news = known is None or not alike(document, known.raw)
        after_ms = since_ms if known is None else known.after_ms
        time_ms: int | None = None
        transfers: tuple[TransferRow, ...] | None = None
        try:
            time_ms, transfers = read(document, Drift(), after_ms is None)
        except ValueError as why:
            self.quarantine(str(why))
        if known is None or received != known.raw:  # else it was counted when it came
            with suppress(ValueError):
                read(raw, drift, after_ms is None)
        self.count_drift(drift)
        if news and time_ms is not None and time_ms > self.wall * 1000 + CLOCK_SKEW_MS:
            self.count("clock_skew")
        version = None if not news else known.version + 1 if known is not None else 1
        return RecordRow(
            record_id,
            version,
            document,
            known.wallet if known is not None else wallet,
            time_ms,
            transfers or (),
            scope,
            after_ms,
            transfers is not None,
        )
