"""The faults of partner APIs, F110 to F118 of the catalogue: each a name with a chance, a beginning and an end.

Promises that a fault strikes only while it is switched on, by the seed alone, and that every stroke is counted. What a stroke
does to a record's truth is the partner's business; what it does to an answer's bytes is here.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from email.utils import formatdate
from typing import Any

from indexer.sandbox.partners.wire import Reply, answer, encoded

#: Every fault by name, with its code in the catalogue.
FAULTS: Mapping[str, str] = {
    "server_error": "F110",
    "rate_limited": "F110",  # 429, by turns with no Retry-After, with seconds, with a date
    "silence": "F110",  # no answer at all
    "dropped": "F110",  # the connection is closed: an outage where it always strikes
    "html": "F110",  # a page for people, by turns with 502 and with 200
    "endless_body": "F110",
    "cut_off": "F110",  # half a document
    "page_drift": "F111",  # a stranger's record arrives while pages are read
    "duplicates": "F112",
    "disorder": "F112",
    "late": "F112",  # a record is listed long after its time
    "reincluded": "F113",  # after it was read: another transaction, as good as the first
    "turned": "F113",  # after it was read: failed after all
    "unknown_word": "F114",
    "missing_field": "F114",
    "retyped": "F114",  # numbers as strings and strings as numbers
    "clock_skew": "F115",
    "empty_list": "F116",
    "expired": "F117",  # 401
    "forbidden": "F117",  # 403
    "deleted": "F118",  # after it was read: gone for good
    "blinking": "F118",  # absent from one listing, back in the next
}
CODES = tuple(sorted(set(FAULTS.values())))

ENDLESS = 200 * 1024 * 1024
HTML = b"<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body><h1>Bad Gateway</h1></body></html>"

Path = tuple[str, ...]  # into a document; "*" stands for every element of a list


@dataclass(frozen=True, slots=True)
class Spell:
    """A fault that may strike: with what chance, and from when until when (Unix seconds)."""

    chance: float
    since: float
    until: float


@dataclass(frozen=True, slots=True)
class Frailty:
    """Where a document may drift: fields that may be missing, numbers that may change type, words that may be new."""

    optional: tuple[Path, ...] = ()
    numbers: tuple[Path, ...] = ()
    words: Mapping[Path, str] | None = None


class Weather:
    """What goes wrong at one partner. `struck` counts by name; `retry_after` and `late_by` are in seconds."""

    def __init__(self, seed: str, clock: Callable[[], float]) -> None:
        self._rng, self._clock = random.Random(seed), clock  # noqa: S311 - faults by the seed
        self._spells: dict[str, Spell] = {}
        self._late: dict[str, float] = {}
        self.struck: Counter[str] = Counter()
        self.retry_after = 1
        self.late_by = (5.0, 60.0)
        self.skew = 30.0

    # ---- switches

    def begin(self, *faults: str, chance: float = 1.0, since: float | None = None, until: float | None = None) -> None:
        """Switches faults on, by name or by code. Raises ValueError."""
        started = -float("inf") if since is None else since
        for name in self._named(faults):
            self._spells[name] = Spell(chance, started, float("inf") if until is None else until)

    def end(self, *faults: str) -> None:
        """Switches off; all of them where none is named. What was done to the truth stays done."""
        for name in self._named(faults) if faults else tuple(self._spells):
            self._spells.pop(name, None)

    @staticmethod
    def _named(faults: tuple[str, ...]) -> Iterator[str]:
        for fault in faults:
            found = [name for name, code in FAULTS.items() if fault in (name, code)]
            if not found:
                raise ValueError(f"no fault is called {fault}: there are {', '.join((*CODES, *FAULTS))}")
            yield from found

    def active(self, fault: str) -> bool:
        spell = self._spells.get(fault)
        return spell is not None and spell.since <= self._clock() < spell.until

    def strikes(self, fault: str) -> bool:
        """Draws; counted where it strikes."""
        if not self.active(fault) or self._rng.random() >= self._spells[fault].chance:
            return False
        self.struck[fault] += 1
        return True

    # ---- answers

    def refused(self) -> Reply | None:
        """A refusal at the door, before anything is done; None on a good day."""
        if self.strikes("expired"):
            return answer({"message": "Invalid API Key"}, 401)
        if self.strikes("forbidden"):
            return answer({"title": "Forbidden", "status": 403, "detail": "the key lacks the action"}, 403)
        if self.strikes("rate_limited"):
            return limited(self.struck["rate_limited"], self._clock(), self.retry_after)
        return None

    def lost(self) -> Reply | None:
        """What comes instead of an answer; None on a good day."""
        if self.strikes("dropped"):
            return Reply(0, fate="dropped")
        if self.strikes("silence"):
            return Reply(0, fate="silent")
        if self.strikes("server_error"):
            status = self._rng.choice((500, 502, 503, 504))
            return answer({"title": "Internal error", "status": status}, status)
        if self.strikes("html"):
            status = (502, 200)[self.struck["html"] % 2]
            return Reply(status, HTML, {"Content-Type": "text/html; charset=utf-8"})
        if self.strikes("endless_body"):
            return Reply(200, b'{"data": [', {"Content-Type": "application/json"}, padding=ENDLESS)
        return None

    def torn(self, reply: Reply) -> Reply:
        """The reply, or its first half with the length of the half."""
        if len(reply.body) > 2 and self.strikes("cut_off"):
            return Reply(reply.status, reply.body[: len(reply.body) // 2], reply.headers, reply.delay)
        return reply

    # ---- records

    def hides(self, record: str) -> bool:
        """Whether a record that should be listed isn't, this time: late where it never was listed before, or blinking."""
        now = self._clock()
        if record not in self._late:
            self._late[record] = now + self._rng.uniform(*self.late_by) if self.strikes("late") else now
        return now < self._late[record] or self.strikes("blinking")

    def jumbled(self, records: list[Any]) -> list[Any]:
        """With repetitions, and out of order."""
        if records and self.strikes("duplicates"):
            records = list(records)
            for record in self._rng.sample(records, min(3, len(records))):
                records.insert(self._rng.randrange(len(records) + 1), record)
        if len(records) > 1 and self.strikes("disorder"):
            records = self._rng.sample(records, len(records))
        return records

    def time(self, at: float) -> float:
        """As the partner's clock has it."""
        if self.active("clock_skew"):
            self.struck["clock_skew"] += 1
            return at + self.skew
        return at

    def drifted(self, document: dict[str, Any], frailty: Frailty) -> dict[str, Any]:
        """The document as a new version of the API might write it; changed in place."""
        if frailty.words and self.strikes("unknown_word"):
            path = self._rng.choice(list(frailty.words))
            for holder, key in places(document, path):
                if holder.get(key) is not None:
                    holder[key] = frailty.words[path]
        if frailty.numbers and self.strikes("retyped"):
            for path in frailty.numbers:
                for holder, key in places(document, path):
                    holder[key] = _retyped(holder.get(key))
        if frailty.optional and self.strikes("missing_field"):
            for holder, key in places(document, self._rng.choice(frailty.optional)):
                holder.pop(key, None)
        return document


def limited(number: int, now: float, seconds: int) -> Reply:
    """429, by turns with no Retry-After, with seconds and with an HTTP date (RFC 9110, 10.2.3)."""
    told = ({}, {"retry_after": str(seconds)}, {"retry_after": formatdate(now + seconds, usegmt=True)})[number % 3]
    return answer({"title": "Too Many Requests", "status": 429}, 429, **told)


def places(document: Any, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every place that the path names, where its way is not broken by a null."""
    first, *rest = path
    if first == "*":
        for element in document if isinstance(document, list) else ():
            yield from places(element, tuple(rest))
    elif isinstance(document, dict) and first in document:
        if rest:
            yield from places(document[first], tuple(rest))
        else:
            yield document, first


def _retyped(value: Any) -> Any:
    """A number as a string, a numeric string as a number; anything else as it is."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | Decimal):
        return encoded(value).decode()
    if isinstance(value, str):
        try:
            number = Decimal(value)
        except InvalidOperation:
            return value
        return int(number) if number == number.to_integral_value() else number
    return value
