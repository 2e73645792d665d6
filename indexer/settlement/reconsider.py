"""Rules that changed: operations that were last looked at under others are looked at again.

Alarms are set by the rules of their day and would ring too late, or too early, under new ones. The fingerprint of the rules
stands beside each brand; whoever settles, after a reload, a restart or a take-over, compares it with its own and touches what
is open, a few at a time, so that news does not wait behind it. What is ready stays ready: rules decide when to promise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from uuid import UUID

import structlog

from indexer.settlement.rules import BrandRules
from indexer.store import brands
from indexer.store.connection import Connection

BATCH = 500  # operations touched in one transaction
LOOKS = 100  # queries of one transaction: a thousand new brands are no long one

log = structlog.get_logger(__name__)


def fingerprint(rule: BrandRules) -> str:
    """The same for equal rules, in every process."""
    return hashlib.sha256(repr(_canonical(asdict(rule))).encode()).hexdigest()[:32]


def _canonical(value: object) -> object:
    match value:
        case dict():
            return [(key, _canonical(child)) for key, child in sorted(value.items())]
        case frozenset() | set():
            return sorted(repr(_canonical(child)) for child in value)
        case list() | tuple():
            return [_canonical(child) for child in value]
    return value


class Reconsideration:
    """One sweep under one set of rules. `step` until `done`; cut short, the next holder begins it anew."""

    def __init__(self, rules: Mapping[str, BrandRules]) -> None:
        self.done = False
        self._rules = rules
        self._changed: dict[str, str] | None = None  # brand → its new fingerprint; None: nobody has looked yet
        self._left: list[tuple[str, str]] = []  # brands and states still to walk through
        self._after: brands.Walked | None = None
        self._alarmed: UUID | None = None
        self._touched = 0

    async def step(self, conn: Connection) -> None:
        """Touches a batch, in the caller's leased transaction."""
        if self._changed is None:
            await self._compare(conn)
        assert self._changed is not None
        room = BATCH
        for _ in range(LOOKS):
            if not self._left or room <= 0:
                break
            brand, state = self._left[-1]
            touched, self._after = await brands.touch_in_state(conn, brand, state, self._after, room)
            room, self._touched = room - touched, self._touched + touched
            if self._after is None:
                self._left.pop()
        if self._left or room <= 0:
            return
        if self._changed:
            touched, self._alarmed = await brands.touch_closed_and_watched(
                conn, list(self._changed), self._alarmed, BATCH
            )
            self._touched += touched
            if self._alarmed is not None:
                return
            await brands.set_rules_seen(conn, self._changed)
            log.info("settling rules are others than before", brands=len(self._changed), operations=self._touched)
        self.done = True

    async def _compare(self, conn: Connection) -> None:
        seen = await brands.rules_seen(conn)
        wanted = {brand: fingerprint(self._rules.get(brand, BrandRules())) for brand in seen}
        self._changed = {brand: mark for brand, mark in wanted.items() if seen[brand] != mark}
        self._left = [(brand, state) for brand in self._changed for state in brands.UNSETTLED]
