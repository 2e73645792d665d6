"""Metrics and logs: every metric is declared here once, every log line leaves through the redaction here.

Promises that labels stay bounded (chains, brands, endpoints and webhooks come from the configuration, the rest are words of
ours) and that no secret reaches a log: not by key, not in a URL, not in a traceback. When to count is left to each room.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, Literal, TextIO
from urllib.parse import urlsplit

import structlog
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

Stage = Literal[
    "registered_to_included",
    "included_to_ready",
    "ready_to_delivered",
    "delivered_to_fulfilled",
    "registered_to_fulfilled",
]
Level = Literal["head", "safe", "finalized"]

#: What `/metrics` answers with.
CONTENT_TYPE = CONTENT_TYPE_LATEST

# From one 200 ms block to a day: `safe` comes after two minutes, `finalized` after twenty, a person after hours.
_SETTLEMENT = (0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 180, 300, 600, 1200, 1800, 3600, 7200, 21_600, 86_400)
_REQUEST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_DEPTH = (1, 2, 5, 10, 50, 130, 600, 2000, 8000, 30_000, 216_000)


class Metrics:
    """The metrics of one process, in a registry of their own. Made once and passed in; `now` gives Unix seconds.

    Ages and lags are computed when they are scraped, so that they keep growing while the loop that feeds them stands still.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._now = now
        self._since: dict[tuple[Gauge, tuple[str, ...]], float] = {}
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

        # ------------------------------------------------------------- settlement
        self.settlement_latency = self._histogram(
            "settlement_latency_seconds",
            "Time of an operation's way, by stage",
            ("brand", "kind", "stage"),
            _SETTLEMENT,
        )
        self.late_registrations = self._counter(
            "late_registrations", "Operations registered after their evidence was in a block", ("brand", "kind")
        )
        self.transitions = self._counter("transitions", "State changes of operations", ("brand", "state"))
        self.ambiguous = self._counter("ambiguous_matches", "Claims that several legs fitted", ("brand", "kind"))
        self.conflicts = self._counter("conflicts", "Operations that went into conflict", ("brand",))
        self.operations = self._gauge("operations", "Operations by state", ("brand", "state"))
        self.unmatched = self._gauge("unmatched", "Evidence that no operation claims", ("brand",))
        self.exposures = self._gauge("exposures", "Operations handed out and no longer settled", ("brand",))
        self.oldest_open = self._gauge("oldest_open_age_seconds", "Age of the oldest open operation", ("brand",))
        self.touched = self._gauge("touched_operations", "Operations waiting to be looked at again")

        # ------------------------------------------------------------- chains
        self.head_number = self._gauge("head_block_number", "Height, by confidence", ("chain", "level"))
        self.head_lag = self._gauge("head_lag_seconds", "Age of the block at that height", ("chain", "level"))
        self.following = self._gauge("following", "1 for the mode that a chain is followed in", ("chain", "mode"))
        self.witnesses = self._gauge("witnesses", "Live endpoints that agree on the head", ("chain",))
        self.latched = self._gauge("finality_violation", "1 while a finality violation is latched", ("chain",))
        self.events = self._counter("events", "Events stored", ("chain", "event"))
        self.lookalikes = self._counter(
            "lookalikes",
            "Logs that only look like our events, of those that were read for our own emitters; strangers' are not asked for",
            ("chain", "reason"),
        )
        self.repeated = self._counter("repeated_events", "Second canonical events of one identity", ("chain", "kind"))
        self.quarantined_logs = self._counter("quarantined_logs", "Logs stored raw: not readable", ("chain", "reason"))
        self.reorganisations = self._counter("reorganisations", "Reorganisations followed", ("chain",))
        self.reorganisation_depth = self._histogram(
            "reorganisation_depth_blocks", "Blocks un-confirmed by a reorganisation", ("chain",), _DEPTH
        )
        self.backfill_blocks = self._counter("backfill_blocks", "Blocks of history covered", ("chain",))
        self.backfill_events = self._counter("backfill_events", "Events found in history", ("chain",))
        self.second_looks = self._counter("second_look_blocks", "Blocks read a second time", ("chain",))
        self.differences = self._counter("second_look_differences", "Logs a second look corrected", ("chain",))
        self.reread_differences = self._counter(
            "reread_differences", "Logs that an audit or a replay read otherwise", ("chain", "finding", "outcome")
        )

        # ------------------------------------------------------------- endpoints and partners
        self.rpc_requests = self._counter("rpc_requests", "JSON-RPC calls, each of a batch", ("endpoint", "method"))
        self.rpc_errors = self._counter("rpc_errors", "JSON-RPC failures, by class", ("endpoint", "error"))
        self.rpc_lies = self._counter("rpc_lies", "Answers proven wrong", ("endpoint", "check"))
        self.rpc_seconds = self._histogram("rpc_seconds", "Time of an HTTP exchange", ("endpoint",), _REQUEST)
        self.proofs = self._counter(
            "block_proofs", "Blocks with claimed events whose receipts were proven, or not", ("chain", "outcome")
        )
        self.unattested = self._gauge(
            "unattested_blocks", "Claimed blocks that wait for witnesses or proof", ("chain",)
        )
        self.failovers = self._counter("failovers", "Times that an endpoint took over", ("chain", "endpoint"))
        self.odd_tags = self._counter(
            "odd_tags", "Tags of an endpoint that went back, or are missing all at once", ("endpoint", "tag", "oddity")
        )
        self.endpoint_behind = self._gauge(
            "endpoint_behind_seconds", "Chain time that its head is behind the newest", ("chain", "endpoint")
        )
        self.hedged = self._counter(
            "hedged_questions",
            "Questions that another endpoint was asked too, as one was slow",
            ("chain", "endpoint", "outcome"),
        )
        self.quarantined_endpoints = self._gauge("endpoint_quarantined", "1 while not trusted", ("endpoint", "reason"))
        self.checks = self._counter("checks", "Checks of answers: pass, skip, fail", ("check", "outcome", "endpoint"))
        self.partner_requests = self._counter(
            "partner_requests", "Partner API calls", ("brand", "partner", "endpoint", "outcome")
        )
        self.partner_seconds = self._histogram(
            "partner_seconds", "Time of a partner's answer", ("partner", "endpoint", "outcome"), _REQUEST
        )
        self.partner_oddities = self._counter(
            "partner_oddities", "What was odd in a partner's answers", ("brand", "partner", "oddity")
        )
        self.partner_refused = self._gauge(
            "partner_key_refused", "1 while a partner does not accept the key", ("brand", "partner")
        )
        self.partner_wallets = self._gauge(
            "partner_open_wallets", "Wallets or users with open legs", ("brand", "partner")
        )
        self.partner_behind = self._gauge(
            "partner_poll_behind_seconds", "How long the wallet that waits longest has been due", ("brand", "partner")
        )
        self.lookups = self._counter("chain_lookups", "Transactions looked up for partners", ("chain", "outcome"))

        # ------------------------------------------------------------- signals
        self.signals = self._counter("signals", "Signals committed, by type", ("brand", "type"))
        self.numbered = self._counter("signals_numbered", "Signals given their sequence", ("brand",))
        self.deliveries = self._counter("deliveries", "Webhook attempts", ("brand", "webhook", "outcome"))
        self.delivery_seconds = self._histogram(
            "delivery_seconds", "Time of an attempt", ("brand", "webhook"), _REQUEST
        )
        self.oldest_unsent = self._gauge(
            "oldest_unsent_age_seconds", "Age of the oldest undelivered signal", ("brand",)
        )
        self.oldest_held = self._gauge(
            "oldest_held_age_seconds", "Age of the oldest signal that a stopped endpoint waits with", ("brand",)
        )
        self.dead_letters = self._gauge("dead_letters", "Deliveries given up", ("brand", "webhook"))
        self.webhooks_stopped = self._gauge(
            "webhook_stopped", "1 while an endpoint gets nothing: paused, failing, gone", ("brand", "webhook", "why")
        )
        self.endpoints_stopped = self._counter(
            "webhook_stops",
            "Endpoints stopped because they failed for too long or are gone",
            ("brand", "webhook", "why"),
        )

        # ------------------------------------------------------------- this process
        self.leases = self._gauge("leases_held", "1 for each task that this process holds", ("task",))
        self.leases_lost = self._counter("leases_lost", "Leases that ended while held", ("task",))
        self.loop_restarts = self._counter("loop_restarts", "Loops restarted after an error", ("task", "error"))
        self.forgotten = self._counter("forgotten_rows", "Rows deleted because they are over and old", ("what",))
        self.listening = self._gauge("listen_connected", "1 while the LISTEN connection stands")
        self.http_requests = self._counter("http_requests", "HTTP requests answered", ("route", "method", "status"))
        self.http_seconds = self._histogram("http_seconds", "Time of an HTTP answer", ("route",), _REQUEST)

    # ------------------------------------------------------------------------- what is more than one line to count

    def observe_latency(self, brand: str, kind: str, stage: Stage, seconds: float) -> None:
        """One stage of one operation, once, after the commit. Evidence older than its registration counts as 0 s."""
        if seconds < 0 and stage == "registered_to_included":
            self.late_registrations.labels(brand, kind).inc()
        self.settlement_latency.labels(brand, kind, stage).observe(max(0.0, seconds))

    def saw_head(self, chain: str, level: Level, number: int, time_ms: int) -> None:
        """A chain's height at one level, with that block's time in Unix milliseconds."""
        self.head_number.labels(chain, level).set(number)
        self._age(self.head_lag, (chain, level), time_ms / 1000)

    def saw_reorganisation(self, chain: str, depth: int) -> None:
        self.reorganisations.labels(chain).inc()
        self.reorganisation_depth.labels(chain).observe(depth)

    def saw_oldest_open(self, brand: str, since: float | None) -> None:
        """Unix seconds at which the brand's oldest open operation was registered; None: none is open."""
        self._age(self.oldest_open, (brand,), since)

    def saw_oldest_unsent(self, brand: str, since: float | None) -> None:
        """Unix seconds at which the brand's oldest undelivered signal was made; None: all are delivered."""
        self._age(self.oldest_unsent, (brand,), since)

    def saw_oldest_held(self, brand: str, since: float | None) -> None:
        """Unix seconds at which the oldest signal was made that waits for a stopped endpoint; None: none does."""
        self._age(self.oldest_held, (brand,), since)

    def forget_database(self) -> None:
        """Drops what describes the whole database: only the holder of the lease reports it."""
        ages = (self.oldest_open, self.oldest_unsent, self.oldest_held)
        counts = (self.operations, self.unmatched, self.exposures, self.dead_letters, self.webhooks_stopped)
        for gauge in (*ages, *counts, self.unattested):
            gauge.clear()
        self._since = {key: since for key, since in self._since.items() if key[0] not in ages}
        self.touched.set(0)

    def exposition(self) -> bytes:
        """The text of `/metrics`, of type CONTENT_TYPE."""
        return generate_latest(self.registry)

    # ------------------------------------------------------------------------- declaring

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"loyalty_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"loyalty_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"loyalty_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _age(self, gauge: Gauge, labels: tuple[str, ...], since: float | None) -> None:
        key = (gauge, labels)
        known = key in self._since
        if since is None:
            if known:
                del self._since[key]
                gauge.remove(*labels)
            gauge.labels(*labels).set(0)
            return
        self._since[key] = since
        if not known:
            gauge.labels(*labels).set_function(lambda: max(0.0, self._now() - self._since.get(key, self._now())))


# --------------------------------------------------------------------------- logs

HIDDEN = "[redacted]"

# Keys whose values are secrets whatever they look like. `token` alone is not one: here that is a programme's contract.
_SECRET_KEY = re.compile(
    r"(?:^|[_-])(?:secrets?|passw(?:or)?d|authorization|cookie|credentials?|private[_-]key|signing[_-]key|signature)$"
    r"|api[_-]?key|(?:access|api|auth|bearer|refresh)[_-]token",
    re.IGNORECASE,
)
_URL = re.compile(r"\b([a-z][a-z0-9+.-]*)://([^\s\"'<>|\\^`{}]+)", re.IGNORECASE)
_IN_TEXT = (
    (re.compile(r"whsec_[A-Za-z0-9+/=_-]+"), f"whsec_{HIDDEN}"),
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (
        re.compile(
            r"\b((?:x[_-])?api[_-]?key|password|secret|authorization)([\"']?\s*[=:]\s*[\"']?)(?!Bearer |Basic )[^\s\"',;&}]+",
            re.IGNORECASE,
        ),
        rf"\1\2{HIDDEN}",
    ),
)
_KEY_LIKE = re.compile(r"[A-Za-z0-9_~.=-]{16,}")
_HEX_ID = re.compile(r"0x[0-9a-fA-F]+")  # a hash or an address in an explorer's URL


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without `secrets`, credentials, and the parts of URLs that may be keys."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    if "://" in text:
        text = _URL.sub(lambda match: _redact_url(match[1], match[2]), text)
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


def _redact_url(scheme: str, rest: str) -> str:
    """Providers put keys in the path, in the query or before the host: of such a URL only the host is shown."""
    trail = rest[len(rest.rstrip(".,;:)]!?")) :]  # punctuation of the sentence around it
    bare = rest.removesuffix(trail).rpartition("@")[2]  # a raw @ or / in a password does not save it
    try:
        parts = urlsplit(f"//{bare}")
    except ValueError:
        return f"{scheme}://{HIDDEN}{trail}"
    keyed = any(_KEY_LIKE.fullmatch(part) and not _HEX_ID.fullmatch(part) for part in parts.path.split("/"))
    shown = parts.netloc + ("/…" if keyed or parts.query or parts.fragment else parts.path)
    return f"{scheme}://{shown}{trail}"


class Redaction:
    """A structlog processor: every value as plain data, with nothing secret in it. Bytes become 0x hex."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        # the longest first, so that a secret inside another does not leave the rest of it standing
        self._secrets = sorted({secret for secret in secrets if len(secret) >= 6}, key=len, reverse=True)

    def __call__(self, logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        return {key: value if key.startswith("_") else self._entry(key, value) for key, value in event.items()}

    def _entry(self, key: str, value: object) -> object:
        return HIDDEN if value is not None and _SECRET_KEY.search(key) else self._clean(value)

    def _clean(self, value: object) -> object:
        match value:
            case None | bool() | int() | float():
                return value
            case str():
                return redact(value, self._secrets)
            case bytes() | bytearray() | memoryview():
                return "0x" + bytes(value).hex()
            case Mapping():
                return {str(key): self._entry(str(key), child) for key, child in value.items()}
            case list() | tuple() | set() | frozenset():
                return [self._clean(child) for child in value]
            case BaseException():
                return redact(f"{type(value).__name__}: {value}", self._secrets)
            case _:
                return redact(str(value), self._secrets)


def configure_logging(
    json: bool | None = None, level: str = "info", *, secrets: Iterable[str] = (), stream: TextIO | None = None
) -> None:
    """Sends structlog's and the standard library's logs to `stream` (default: stderr), one line an event.

    `json` None: JSON lines, unless the stream is a terminal. `secrets` are replaced wherever they appear, on top of what
    is recognised. May be called again, as after a reload.
    """
    out = stream or sys.stderr
    as_json = not out.isatty() if json is None else json
    number = logging.getLevelNamesMapping()[level.upper()]
    common: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,  # a string, so that the redaction sees tracebacks too; never locals
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(ensure_ascii=False)
        if as_json
        else structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback)
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *common],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, Redaction(secrets), renderer],
        )
    )
    root = logging.getLogger()
    ours = [old for old in root.handlers if isinstance(old.formatter, structlog.stdlib.ProcessorFormatter)]
    root.handlers[:] = [*(old for old in root.handlers if old not in ours), handler]
    root.setLevel(number)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)  # requests are counted, not told one by one
    logging.getLogger("alembic").setLevel(logging.WARNING)  # a migration is told by whoever runs it
    structlog.configure(
        processors=[*common, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
