"""Whom to poll next, and when: a budget of requests spent where something is due.

Pure: times come in as seconds of one clock, nothing here waits. Promises that a wallet with something new is due at once and
then every few seconds, that the pause grows with the age of what is waited for, and that nobody starves: of those that are
due, the one that has been due longest goes first, so however many there are, each gets its turn in one round of all.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

FRESH: Final = 60.0  # seconds after a registration for which the pace is the quickest
SLOWEST: Final = 300.0  # seconds between looks at what has been open for long
IDLE_SHARE: Final = 10  # where wallets with open legs are due, every tenth look may go to one without


@dataclass(frozen=True, slots=True)
class Watch:
    """A wallet that something is expected at. Times in seconds of the schedule's clock."""

    wallet: str
    newest: float  # when the youngest open leg was registered
    open_legs: int = 1


def pause(poll: float, age: float) -> float:
    """Seconds until the next look at what has been open for `age` seconds: `poll` at first, a twelfth of the age later."""
    return max(poll, min(SLOWEST, age / 12)) if age > FRESH else poll


@dataclass(slots=True)
class _Entry:
    watch: Watch
    due: float
    failures: int = 0
    away: bool = False  # being looked at
    looked_at: float | None = None


@dataclass(slots=True)
class Schedule:
    """Wallets with open legs, by when they are due. `poll` in seconds."""

    poll: float
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _heap: list[tuple[float, int, str]] = field(default_factory=list)
    _order: int = 0
    _taken: int = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def wallets(self) -> Iterable[str]:
        return self._entries.keys()

    def watch(self, watches: Iterable[Watch], now: float, looked: Mapping[str, float] | None = None) -> bool:
        """What is open now, all of it. New legs make their wallet due at once. `looked`: last looks before a restart.

        True when somebody became due earlier than was planned.
        """
        wanted = {watch.wallet: watch for watch in watches}
        for wallet in self._entries.keys() - wanted.keys():
            del self._entries[wallet]  # its place in the heap is passed over
        sooner = False
        for wallet, watch in wanted.items():
            entry = self._entries.get(wallet)
            if entry is None:
                last = (looked or {}).get(wallet)
                due = now if last is None or last < watch.newest else last + pause(self.poll, now - watch.newest)
                entry = self._entries[wallet] = _Entry(watch, due, looked_at=last)
                self._push(entry)
                sooner = True
                continue
            fresher = watch.newest > entry.watch.newest
            entry.watch = watch
            # a wallet that has waited for its turn keeps its place: being registered again and again never delays it
            if fresher and not entry.away and entry.due > now:
                entry.due = max(now, self._soonest(entry))
                self._push(entry)
                sooner = True
        return sooner

    def _soonest(self, entry: _Entry) -> float:
        """Registrations in quick succession at one wallet do not make it looked at more often than `poll`."""
        return entry.looked_at + self.poll if entry.looked_at is not None and not entry.failures else 0.0

    def due(self) -> float | None:
        """When the next wallet is due; None: nothing is planned."""
        self._clean()
        return self._heap[0][0] if self._heap else None

    def take(self, now: float) -> str | None:
        """The wallet that has been due longest, if any is; it stays away until `done` or `failed`."""
        self._clean()
        if not self._heap or self._heap[0][0] > now:
            return None
        _, _, wallet = heapq.heappop(self._heap)
        self._entries[wallet].away = True
        self._taken += 1
        return wallet

    @property
    def idle_turn(self) -> bool:
        """Whether, among wallets that are due, one without open legs may go now."""
        return self._taken % IDLE_SHARE == 0

    def done(self, wallet: str, now: float) -> None:
        """It was looked at, and the answer stored."""
        entry = self._entries.get(wallet)
        if entry is None:
            return
        entry.away, entry.failures, entry.looked_at = False, 0, now
        entry.due = now + pause(self.poll, now - entry.watch.newest)
        self._push(entry)

    def failed(self, wallet: str, now: float) -> None:
        """It could not be looked at: later, and later still when that goes on, since others can."""
        entry = self._entries.get(wallet)
        if entry is None:
            return
        entry.away = False
        entry.failures += 1
        entry.due = now + min(SLOWEST, pause(self.poll, now - entry.watch.newest) * 2 ** min(entry.failures - 1, 10))
        self._push(entry)

    def put_back(self, wallet: str) -> None:
        """It was not looked at, through no fault of its own: it keeps its place."""
        entry = self._entries.get(wallet)
        if entry is not None:
            entry.away = False
            self._push(entry)

    def recovered(self, now: float) -> None:
        """The partner answers again: what waited longer because it did not, waits no longer than usual."""
        for entry in self._entries.values():
            if entry.failures:
                entry.failures = 0
                if not entry.away and entry.due > now + self.poll:
                    entry.due = now + self.poll
                    self._push(entry)

    def late(self, now: float) -> int:
        """How many are due."""
        return sum(1 for entry in self._entries.values() if not entry.away and entry.due <= now)

    def oldest_wait(self, now: float) -> float:
        """Seconds for which the one that waits longest has been due."""
        due = self.due()
        return max(0.0, now - due) if due is not None else 0.0

    def _push(self, entry: _Entry) -> None:
        self._order += 1
        heapq.heappush(self._heap, (entry.due, self._order, entry.watch.wallet))
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [item for item in self._heap if self._valid(item)]
            heapq.heapify(self._heap)

    def _valid(self, item: tuple[float, int, str]) -> bool:
        entry = self._entries.get(item[2])
        return entry is not None and not entry.away and entry.due == item[0]

    def _clean(self) -> None:
        while self._heap and not self._valid(self._heap[0]):
            heapq.heappop(self._heap)
