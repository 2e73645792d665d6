"""One client for every partner: GET a JSON document, within a budget that all pollers of one key share.

Promises a document or a named error that says what came instead, in words that hold neither the key nor a person's name;
bodies and times are capped, redirects not followed. What a document means is left to the pollers, and so is asking again
later: here a request is repeated twice at most.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from email.utils import parsedate_to_datetime
from random import Random
from typing import Any, ClassVar, Final

import msgspec

from indexer.partners.credential import LONGEST_QUIET, PROBE, Clock, Credential, scopes
from indexer.partners.exchange import Exchange, Reply, Unanswered
from indexer.telemetry import redact

ATTEMPTS: Final = 3  # of one request; then its poller decides
REFUSALS_SHOWN: Final = 3
BROKEN_OFF: Final = ("timeout", "cancelled")  # outcomes of ours: the request may arrive all the same

#: (endpoint, outcome, seconds) of every request.
Observe = Callable[[str, str, float], None]


# ------------------------------------------------------------------------------------------------ errors


class PartnerError(Exception):
    """A partner's API did not give what was asked for. `outcome` is the word that metrics count it by."""

    explains_itself: ClassVar[bool] = True

    def __init__(self, who: str, endpoint: str, outcome: str, detail: str, status: int | None = None) -> None:
        said = f"HTTP {status}: {detail}" if status is not None else detail
        super().__init__(f"{who}, {endpoint}: {said}")
        self.endpoint, self.outcome, self.status = endpoint, outcome, status


class Unavailable(PartnerError):
    """It failed, was not reached, or answered something that is no document: the same request may work later."""


class Limited(PartnerError):
    """It asks for quiet, for `retry_after` seconds where it says so."""

    retry_after: float | None = None


class Refused(PartnerError):
    """400, 404, 409, 422 and their like: the same request will be refused again."""


class Denied(PartnerError):
    """401 or 403: the key is not accepted. Nobody asks with it again but for a probe every few minutes.

    `wide`: it means the key or the whole endpoint; else only what was asked about, such as one wallet.
    """

    wide: bool = True


# ------------------------------------------------------------------------------------------------ the client


@dataclass(slots=True)
class Health:
    """How the account fares, for its row in the store and for the log."""

    problem: str | None = None
    kind: str | None = None  # the outcome that the problem is counted by: its words may be others each time
    answered_at: float | None = None  # Unix seconds of the last usable answer
    _refusals: dict[str, tuple[int, str]] = field(default_factory=dict)  # by endpoint ("": every one) the first words
    _subjects: dict[str, float] = field(default_factory=dict)  # scopes of one subject: when it was refused last

    @property
    def refused(self) -> str | None:
        """What stops the key, or some of what is asked with it; the same words for as long as it is the same."""
        shown = sorted(self._refusals)[:REFUSALS_SHOWN]
        return "; ".join(self._refusals[scope][1] for scope in shown) or None

    def worked(self, endpoint: str, at: float, subject: str = "") -> None:
        self.answered_at = at
        # a subject that is not asked about any more is not refused for ever
        gone = [scope for scope, then in self._subjects.items() if at - then > 3 * PROBE]
        for scope in [*gone, *scopes(endpoint, subject)]:
            self._subjects.pop(scope, None)
            self._refusals.pop(scope, None)
        self.forgive(endpoint)

    def forgive(self, endpoint: str) -> None:
        """That endpoint is well, or not needed."""
        self._refusals.pop(endpoint, None)
        self.problem, self.kind = self.refused, "denied" if self._refusals else None

    def note(self, problem: str, kind: str) -> None:
        self.problem, self.kind = problem, kind

    def denied(self, endpoint: str, error: Denied, subject: str, at: float) -> None:
        """401 speaks of the key, 403 of one endpoint, or of one subject there. What is told again, or by a look that was not taken,
        is no news."""
        status = error.status or 401
        scope = "" if status == 401 else endpoint
        if not error.wide:
            scope = scopes(endpoint, subject)[-1]
            self._subjects[scope] = at
        elif scope:
            for each in [each for each in self._subjects if each.startswith(f"{endpoint} ")]:
                del self._subjects[each]
                self._refusals.pop(each, None)
        if scope:
            self._refusals.pop("", None)  # the key itself is accepted
        if self._refusals.get(scope, (0, ""))[0] != status:
            self._refusals[scope] = (status, str(error))
        self.note(self.refused or str(error), "denied")


class Client:
    """One account at a partner. `who` names it in errors (`keyban account of bloom`), `secrets` never appear in them."""

    def __init__(
        self,
        who: str,
        exchange: Exchange,
        credential: Credential,
        *,
        clock: Clock,
        rng: Random,
        observe: Observe,
        secrets: tuple[str, ...] = (),
        attempts: int = ATTEMPTS,
    ) -> None:
        self.who, self.credential, self.health = who, credential, Health()
        self._exchange, self._clock, self._rng = exchange, clock, rng
        self._observe, self._secrets, self._attempts = observe, secrets, attempts

    async def get(self, endpoint: str, path: str, params: Mapping[str, str] | None = None, subject: str = "") -> Any:
        """The JSON document at `path`; fractions come as Decimal. `endpoint` is a word of ours for metrics; `subject` whom the
        question is about, where a 403 may mean that one alone.

        Raises Unavailable, Limited, Refused, Denied.
        """
        attempt = 1
        while True:
            try:
                document = await self._once(endpoint, path, params or {}, subject)
            except Unavailable:
                if attempt == self._attempts:
                    self.credential.failed()
                    raise
                await self._clock.sleep(self.credential.backoff(attempt))
            except Limited:
                if attempt == self._attempts:
                    raise
            else:
                return document
            attempt += 1

    async def _once(self, endpoint: str, path: str, params: Mapping[str, str], subject: str) -> Any:
        if (refusal := self.credential.stopped(endpoint, subject)) is not None:
            denied = Denied(self.who, endpoint, "stopped", "the key was refused and is not used", refusal.status)
            denied.wide = refusal.wide
            raise self._noted(denied, subject)
        if (quiet := await self.credential.turn()) is not None:
            why = (
                "it asked for quiet"
                if self.credential.asked_for_quiet
                else "it failed again and again, and is left alone"
            )
            limited = Limited(self.who, endpoint, "quiet", f"{why}, for another {quiet:.0f} s")
            if self.health.problem is None:  # else what it said is the better news
                self.health.note(why, limited.outcome)
            limited.retry_after = quiet
            raise limited
        started, outcome = self._clock.now(), "cancelled"
        try:
            document = self._read(endpoint, await self._exchange.get(path, params), subject)
            outcome = "ok"
        except Unanswered as why:
            outcome = why.outcome
            raise self._noted(Unavailable(self.who, endpoint, outcome, str(why)), subject) from None
        except PartnerError as error:
            outcome = error.outcome
            raise self._noted(error, subject) from None
        finally:
            self.credential.over(broken_off=outcome in BROKEN_OFF)
            self._observe(endpoint, outcome, self._clock.now() - started)
        self.credential.worked(endpoint, subject)
        self.health.worked(endpoint, self._clock.wall(), subject)
        return document

    def _noted(self, error: PartnerError, subject: str) -> PartnerError:
        if isinstance(error, Denied):
            self.health.denied(error.endpoint, error, subject, self._clock.wall())
        else:
            self.health.note(str(error), error.outcome)
        return error

    def _read(self, endpoint: str, reply: Reply, subject: str) -> Any:
        status = reply.status
        if 200 <= status < 300:
            try:
                return _DECODER.decode(reply.body)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ArithmeticError):
                raise Unavailable(self.who, endpoint, "not_json", self._unreadable(reply), status) from None
        said = self._said(reply) or "no words"
        if status in (401, 403):
            wide = self.credential.denied(endpoint, status, subject)
            what = "the key is not accepted" + ("" if wide else f" for {subject[:80]}")
            denied = Denied(self.who, endpoint, "denied", f"{what}: {said}", status)
            denied.wide = wide
            raise denied
        if status == 429:
            limited = Limited(self.who, endpoint, "rate_limited", said, status)
            limited.retry_after = self._retry_after(reply)
            self.credential.limited(limited.retry_after)
            raise limited
        if status >= 500 or status == 408:
            if (wait := self._retry_after(reply)) is not None:
                self.credential.limited(wait)
            raise Unavailable(self.who, endpoint, "server_error", said, status)
        if 300 <= status < 400:
            raise Refused(
                self.who, endpoint, "redirect", "it redirects, which is not followed: correct the url", status
            )
        raise Refused(self.who, endpoint, "not_found" if status == 404 else "refused", said, status)

    def _unreadable(self, reply: Reply) -> str:
        """What came where a JSON document should have."""
        kind, size = _kind(reply), len(reply.body)
        if not reply.body.strip():
            return "an empty body"
        if "json" in kind:
            return f"{kind} that is no JSON, or broke off: {size} bytes"
        return f"no JSON but {kind}: {self._said(reply)}"

    def _retry_after(self, reply: Reply) -> float | None:
        return retry_after(reply.headers.get("Retry-After"), reply.headers.get("Date"), self._clock.wall())

    def _said(self, reply: Reply) -> str:
        """What a body says to people, short, without markup, secrets or mail addresses."""
        words = problem_of(reply.body)
        if words is None:
            words = quotable(reply.body, _kind(reply))
        words = _MAIL.sub("…@…", redact(words, self._secrets))
        words = " ".join("".join(c if c.isprintable() else " " for c in words).split())
        return words if len(words) <= 200 else words[:199] + "…"


_DECODER = msgspec.json.Decoder(float_hook=Decimal)
_KEYED = re.compile(r"[\"']\s*:")  # as in an object, wherever it begins
_MAIL = re.compile(r"[^\s@\"'<>]{1,64}@[^\s@\"'<>]+")


def _kind(reply: Reply) -> str:
    kind = reply.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    return kind if re.fullmatch(r"[a-z0-9.+-]+/[a-z0-9.+-]+", kind) else "something of no type"


def quotable(body: bytes, kind: str) -> str:
    """Of a body that is no error document: a page's title or first words, a line of plain text. `kind` is its content type.

    Of JSON nothing: a row that was cut off holds people.
    """
    raw = body[:20_000].decode(errors="replace").lstrip("\ufeff \t\r\n")
    if not raw:
        return ""
    if "json" in kind or raw[0] in '{["' or (_KEYED.search(raw) and not raw.startswith("<")):
        return f"{len(body)} bytes of JSON that cannot be used"
    if "html" not in kind and "xml" not in kind and not raw.startswith("<"):
        return raw.splitlines()[0]
    if title := re.search(r"<title[^>]*>([^<]{1,200})", raw, re.IGNORECASE):
        return title[1]
    shown = re.sub(r"<(script|style)\b.*?(</\1>|\Z)|<!--.*?(-->|\Z)", " ", raw, flags=re.DOTALL | re.IGNORECASE)
    first = re.search(r">\s*([^<>\s][^<>]{0,199})", shown)
    return first[1] if first and not _KEYED.search(first[1]) else "a page without a title"


def problem_of(body: bytes) -> str | None:
    """The words of an error document, in any of the forms seen: RFC 9457, {message}, {error}, {errors}. None: it is none."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ArithmeticError):
        return None
    if isinstance(found, str):
        return found
    if not isinstance(found, dict):
        return None
    words = [found[key] for key in ("title", "detail", "message", "error") if isinstance(found.get(key), str)]
    errors = found.get("errors")
    for item in errors[:5] if isinstance(errors, list) else []:
        if isinstance(item, str):
            words.append(item)
        elif isinstance(item, dict):
            place, what = item.get("path") or item.get("field"), item.get("message") or item.get("code")
            words.append(f"{place}: {what}" if place else str(what))
    return "; ".join(dict.fromkeys(words)) or None


def retry_after(value: str | None, date: str | None, wall: float) -> float | None:
    """Seconds of a Retry-After header in both its forms: a number, or a date read against the server's own clock.

    `wall`: Unix seconds by ours, where the server's is not known.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            then = parsedate_to_datetime(value)
            seconds = then.timestamp() - (parsedate_to_datetime(date).timestamp() if date else wall)
        except (TypeError, ValueError):
            return None
    return min(max(0.0, seconds), LONGEST_QUIET) if seconds == seconds else None
