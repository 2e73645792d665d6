"""What went wrong with a call, read from whatever the node sent: a few named errors, each with what to do about it.

Providers agree on nothing, so the message decides first, then the data, then the code, then the HTTP status; the cases are
those of facts/rpc_errors.md. Nothing here retries, and no text that leaves shows a URL beyond its host: paths hold API keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Final, Literal


class Kind(StrEnum):
    """What a refusal means, finer than the error classes: the classes say what to do, the kind says why."""

    RANGE = "range"
    RANGE_OR_DEPTH = "range_or_depth"
    RESULTS = "results"
    RESPONSE_SIZE = "response_size"
    DEPTH = "depth"
    NEEDS_ADDRESS = "needs_address"
    TOO_MANY_ADDRESSES = "too_many_addresses"
    RATE_LIMIT = "rate_limit"
    TIMEOUT = "timeout"
    TRANSIENT = "transient"
    UNAVAILABLE = "unavailable"
    UNAVAILABLE_OR_RANGE = "unavailable_or_range"
    BATCH_TOO_LARGE = "batch_too_large"
    UNSUPPORTED = "unsupported"
    CALLER_BUG = "caller_bug"
    BEYOND_HEAD = "beyond_head"
    BLOCK_NOT_FOUND = "block_not_found"
    FINALITY_UNKNOWN = "finality_unknown"
    STATE_MISSING = "state_missing"
    # not said by a node in JSON, but met on the way to it
    UNREACHABLE = "unreachable"
    NOT_JSON = "not_json"
    REDIRECT = "redirect"
    DENIED = "denied"
    MISFIT = "misfit"
    LEFT_OUT = "left_out"  # of a batch
    SILENT = "silent"
    UNKNOWN = "unknown"


class RpcError(Exception):
    """A call failed. `endpoint` is a host, `params` a summary, `detail` the node's own words, shortened and cleaned."""

    explains_itself: ClassVar[bool] = True  # a log needs no traceback
    advice: ClassVar[str] = "look at the endpoint's own status page, or name another endpoint in the configuration"

    def __init__(
        self,
        detail: str,
        *,
        endpoint: str = "",
        method: str = "",
        params: str = "",
        kind: Kind = Kind.UNKNOWN,
        code: int | None = None,
        status: int | None = None,
        suggestion: Suggestion | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail, self.endpoint, self.method, self.params = detail, endpoint, method, params
        self.kind, self.code, self.status = kind, code, status
        self.suggestion = suggestion
        self.retry_after = retry_after  # seconds, where the node named them

    def __str__(self) -> str:
        numbers = [f"code {self.code}"] if self.code is not None else []
        numbers += [f"HTTP {self.status}"] if self.status not in (None, 200) else []
        where = f" ({', '.join(numbers)})" if numbers else ""
        call = f"{self.method}({self.params})" if self.method else "the connection"
        return f"{self.endpoint}: {call}: {self.detail}{where}. {self._advice()}"

    def _advice(self) -> str:
        return self.advice[:1].upper() + self.advice[1:] + "."

    @property
    def suggested(self) -> int | None:
        """The span in blocks, inclusive, that the node says would work; always below the refused one."""
        return None if self.suggestion is None else self.suggestion.span


class Unreachable(RpcError):
    """Nothing usable came back: no connection, a time-out, an overloaded gateway, HTML in place of JSON."""

    advice = "it is asked again after a pause; if this stays, check the address, the network and the provider's status"


class RateLimited(RpcError):
    advice = "calls pause; lower `requests_per_second` of this endpoint, or take a larger plan"

    def _advice(self) -> str:
        wait = "" if self.retry_after is None else f" It asks for {self.retry_after:g} s of quiet."
        return super()._advice() + wait


class RangeTooLarge(RpcError):
    """More blocks than this endpoint takes in one eth_getLogs, however few logs they hold."""

    advice = "the range is asked again in smaller parts"


class TooManyResults(RpcError):
    """More logs or bytes than this endpoint (or our own size limit) lets through for these blocks."""

    advice = "the range is asked again in smaller parts, and a block alone by its receipts"


class TooManyAddresses(RpcError):
    advice = "the address list is asked in smaller parts"


class MethodMissing(RpcError):
    """This endpoint does not offer the method, or not in this form: asking again does not help."""

    advice = "another endpoint, or a plan that offers this method, is needed for what depends on it"


class BeyondHead(RpcError):
    advice = "this node is behind the others; it is asked again when it has caught up"


class UnknownBlock(RpcError):
    advice = "the node does not hold this block (yet, or any more); it is asked again, or another endpoint is"


class PrunedHistory(RpcError):
    """The blocks or their state are too old for this endpoint or plan: neither splitting nor waiting helps."""

    advice = "name an archive endpoint for the history, or a plan that reaches back this far"


class BadAnswer(RpcError):
    """An answer that is not an answer to what was asked."""

    advice = "the answer was thrown away; if it happens again, take this endpoint out of the configuration"


class Refused(RpcError):
    """The node says no for a reason that another try would not change."""

    def _advice(self) -> str:
        match self.kind:
            case Kind.DENIED:
                return "Check the key in the endpoint's URL and the account's plan."
            case Kind.REDIRECT:
                return "Redirects are not followed: put the final URL in the configuration."
            case Kind.NEEDS_ADDRESS:
                return "This endpoint wants fewer or other filters: name another endpoint in the configuration."
        return super()._advice()


class BatchTooLarge(Refused):
    advice = "the calls are sent in smaller batches"


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Blocks that the node says would work: `span` inclusive, from the start of the refused range.

    `firm` where it is the endpoint's own limit; a bracket that fits this one request says nothing about the next.
    """

    span: int
    firm: bool
    first: int | None = None  # where the node named the range itself
    last: int | None = None


@dataclass(frozen=True, slots=True)
class Classified:
    kind: Kind
    suggestion: Suggestion | None = None


# The first pattern that is found decides; so the special stands before the general.
_MESSAGES: Final[tuple[tuple[Kind, re.Pattern[str]], ...]] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        (Kind.TIMEOUT, r"request timeout|gateway time-?out|execution aborted \(timeout|query timeout|timed out"),
        (
            Kind.BATCH_TOO_LARGE,
            r"too many RPC calls in batch|batch (size )?(too large|limit)|maximum batch|batch of more",
        ),
        (Kind.TOO_MANY_ADDRESSES, r"exceed max addresses|\d+ filters\. The current limit|less number of addresses"),
        (Kind.NEEDS_ADDRESS, r"specify an address"),
        (Kind.CALLER_BUG, r"invalid block range params|request (body )?(is )?too (big|large)"),
        (Kind.BEYOND_HEAD, r"beyond current head|block is out of range"),
        (Kind.FINALITY_UNKNOWN, r"(safe|finalized)\W* (block )?not (found|available)|not found: (safe|finalized)"),
        (Kind.STATE_MISSING, r"missing trie node|historical state unavailable|unknown state|state (is )?not available"),
        (Kind.DEPTH, r"archive requests|has been pruned|pruned history|history unavailable|missing historical"),
        (Kind.RANGE_OR_DEPTH, r"ranges over [\d,.]+ blocks are not supported"),
        (Kind.RESPONSE_SIZE, r"response (is )?too (big|large)"),
        (Kind.RESULTS, r"log response size exceeded|exceeds? max results|more than [\d,.]+k? (results|logs)"),
        (
            Kind.RATE_LIMIT,
            r"rate.?limit(?!.*range)|too many requests|capacity|compute units|credits limited|requests per second"
            r"|quota|daily request|throttl|error code: 1015",
        ),
        (Kind.UNAVAILABLE_OR_RANGE, r"no backend is currently healthy"),
        (Kind.UNAVAILABLE, r"backend offline|not healthy to serve|service unavailable"),
        (Kind.TRANSIENT, r"temporary internal error|invalid response|internal server error"),
        (
            Kind.UNSUPPORTED,
            r"not whitelisted|unsupported method|method \S* ?(is )?(not (found|supported|available)|disabled|does not exist)",
        ),
        (
            Kind.RANGE,
            r"(block|blocks|requested)? ?range (is |limit |greater |\d+ )*(too (large|wide)|exceed|larger|bigger|than)"
            r"|limited to (a )?[\d,.]+k? (blocks? )?range|max(imum)? block range|blocks distance|range allowed for"
            r"|(at most|maximum|up to a) [\d,.]+k? blocks?|requested blocks is \d",
        ),
        (
            Kind.BLOCK_NOT_FOUND,
            r"header (for hash )?not found|unknown block number|could not be found|block \S* ?not found",
        ),
    )
)
# Said by several providers with different meanings: the code speaks, then the request.
_AMBIGUOUS: Final = frozenset({"unknown block", "limit exceeded", "invalid params"})

_CODES: Final[dict[int, Kind]] = {
    -32700: Kind.CALLER_BUG,
    -32600: Kind.CALLER_BUG,
    -32601: Kind.UNSUPPORTED,
    -32602: Kind.CALLER_BUG,
    -32603: Kind.TRANSIENT,
    -32001: Kind.BLOCK_NOT_FOUND,
    -32004: Kind.UNSUPPORTED,  # EIP-1474: method not supported
    -32005: Kind.RATE_LIMIT,  # EIP-1474: limit exceeded
    -32614: Kind.RANGE,
    -39001: Kind.FINALITY_UNKNOWN,
    4444: Kind.DEPTH,
    15: Kind.RATE_LIMIT,  # dRPC from here …
    19: Kind.TRANSIENT,
    26: Kind.BLOCK_NOT_FOUND,
    27: Kind.STATE_MISSING,
    30: Kind.TIMEOUT,
    35: Kind.RANGE_OR_DEPTH,  # … to here
    429: Kind.RATE_LIMIT,
    -32010: Kind.UNAVAILABLE,  # proxyd from here on
    -32011: Kind.UNAVAILABLE_OR_RANGE,
    -32012: Kind.RATE_LIMIT,
    -32013: Kind.TRANSIENT,
    -32014: Kind.BATCH_TOO_LARGE,
    -32015: Kind.TIMEOUT,
    -32016: Kind.RATE_LIMIT,
    -32017: Kind.RATE_LIMIT,
    -32018: Kind.UNAVAILABLE,
    -32019: Kind.UNAVAILABLE,
    -32020: Kind.RESPONSE_SIZE,
    -32021: Kind.CALLER_BUG,
    -32022: Kind.RATE_LIMIT,
    -32023: Kind.RATE_LIMIT,
    -32024: Kind.RATE_LIMIT,
}

_CLASSES: Final[dict[Kind, type[RpcError]]] = {
    Kind.RANGE: RangeTooLarge,
    Kind.RANGE_OR_DEPTH: RangeTooLarge,
    Kind.RESULTS: TooManyResults,
    Kind.RESPONSE_SIZE: TooManyResults,
    Kind.DEPTH: PrunedHistory,
    Kind.STATE_MISSING: PrunedHistory,
    Kind.TOO_MANY_ADDRESSES: TooManyAddresses,
    Kind.RATE_LIMIT: RateLimited,
    Kind.TIMEOUT: Unreachable,
    Kind.TRANSIENT: Unreachable,
    Kind.UNAVAILABLE: Unreachable,
    Kind.UNAVAILABLE_OR_RANGE: Unreachable,
    Kind.UNREACHABLE: Unreachable,
    Kind.NOT_JSON: Unreachable,
    Kind.BATCH_TOO_LARGE: BatchTooLarge,
    Kind.UNSUPPORTED: MethodMissing,
    Kind.BEYOND_HEAD: BeyondHead,
    Kind.BLOCK_NOT_FOUND: UnknownBlock,
    Kind.FINALITY_UNKNOWN: UnknownBlock,
    Kind.MISFIT: BadAnswer,
}

LONGEST_WORDS = 4_000  # characters of a refusal that are looked at: no provider's real one comes near
Asked = tuple[int, int] | Literal["by hash"] | None  # the block range that was asked for, if the call had one


def classify(
    message: str, data: str = "", code: int | None = None, status: int | None = None, asked: Asked = None
) -> Classified:
    """What a refusal means, and the range it suggests. `data` is error.data as text (JSON where it was an object)."""
    # a hostile node's megabytes must not hold up the loop
    message, data = message[:LONGEST_WORDS], data[:LONGEST_WORDS]
    span = asked[1] - asked[0] + 1 if isinstance(asked, tuple) and asked[1] >= asked[0] else None
    kind = _kind(message, data, code, status, asked, span)
    if kind is Kind.RANGE_OR_DEPTH:
        stated = _stated(message)
        free_plan = "free plan" in message.lower()  # said whatever the span, to requests of old blocks
        if stated is not None and ((span is None and free_plan) or (span is not None and stated >= span)):
            return Classified(Kind.DEPTH)
    if kind not in (Kind.RANGE, Kind.RANGE_OR_DEPTH, Kind.RESULTS, Kind.RESPONSE_SIZE):
        return Classified(kind)
    suggestion = _suggestion(kind, f"{message} {data}", asked, span)
    if kind is Kind.RANGE and suggestion is None and span is not None and asked != "by hash":
        stated = _stated(message, data)
        if stated is not None and stated >= span:
            return Classified(Kind.DEPTH)  # its own limit is kept: it means how old the blocks are
    return Classified(kind, suggestion)


def error_for(
    message: str,
    data: str = "",
    code: int | None = None,
    status: int | None = None,
    *,
    endpoint: str,
    method: str,
    params: str,
    asked: Asked = None,
    retry_after: float | None = None,
) -> RpcError:
    """The error to raise for what a node said."""
    found = classify(message, data, code, status, asked)
    kind = found.kind
    if asked == "by hash" and kind in (Kind.RANGE, Kind.RANGE_OR_DEPTH):
        kind = Kind.UNSUPPORTED  # there is nothing to split in one block
    said = clean(message) or f"HTTP {status} without a reason"
    return _CLASSES.get(kind, Refused)(
        f"it answered {said!r}" + (f" [{clean(data, 120)}]" if data else ""),
        endpoint=endpoint,
        method=method,
        params=params,
        kind=kind,
        code=code,
        status=status,
        suggestion=found.suggestion,
        retry_after=retry_after,
    )


def clean(text: str, most: int = 240) -> str:
    """A node's words for a log line: one line, no control characters, URLs down to their host, shortened."""
    text = text[:LONGEST_WORDS]
    text = re.sub(r"(\b\w{1,20}://)(?:[^\s/@]*@)?([^\s/?#\"'<>]+)[^\s\"'<>]*", r"\1\2", text)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _kind(message: str, data: str, code: int | None, status: int | None, asked: Asked, span: int | None) -> Kind:
    plain = message.strip().rstrip(".").lower()
    if plain == "limit exceeded" and code == -32005 and isinstance(asked, tuple):
        # BSC's public nodes say so to any eth_getLogs; to one block it can only mean that the method is off
        return Kind.UNSUPPORTED if span == 1 else Kind.RESULTS
    if status == 402:
        return Kind.DENIED  # whatever it says of quotas: waiting does not pay the bill
    for text in (message, data):
        if text and text.strip().rstrip(".").lower() not in _AMBIGUOUS:
            for kind, pattern in _MESSAGES:
                if pattern.search(text):
                    return kind
    if code == -39001:
        return Kind.FINALITY_UNKNOWN
    if "unknown block" in plain:
        return Kind.BLOCK_NOT_FOUND
    if status == 401:
        return Kind.DENIED
    if code is not None and code in _CODES:
        return _CODES[code]
    return of_status(status)


def of_status(status: int | None) -> Kind:
    """What an HTTP status alone says; the last thing that is looked at."""
    match status:
        case 429:
            return Kind.RATE_LIMIT
        case 408 | 504 | 524 | 522:
            return Kind.TIMEOUT
        case 413:
            return Kind.BATCH_TOO_LARGE
        case 401 | 402 | 403:
            return Kind.DENIED
        case int() if 300 <= status < 400:
            return Kind.REDIRECT
        case int() if status >= 500:
            return Kind.UNAVAILABLE
    return Kind.UNKNOWN


_BRACKET: Final = re.compile(r"\[\s*(0x[0-9a-f]+)\s*,\s*(0x[0-9a-f]+)\s*\]", re.IGNORECASE)
_DECIMAL: Final = re.compile(r"retry with the range (\d+)\s*-\s*(\d+)", re.IGNORECASE)
_STATED: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"maximum allowed(?: is|.*? is) (\d[\d,.]*k?)",
        r"limit of (\d[\d,.]*k?)",
        r"range limit (\d[\d,.]*k?)",
        r"max(?:imum)? block range[ =:]*(\d[\d,.]*k?)",
        r"limited to (?:a )?(\d[\d,.]*k?)",
        r"at most (\d[\d,.]*k?)",
        r"maximum (\d[\d,.]*k?)",
        r"up to a (\d[\d,.]*k?) block",
    )
)
_INTEGER: Final = re.compile(r"(?<![\w.])\d[\d,.]*k?\b", re.IGNORECASE)
# Two messages without a number whose limit is known from what clients do: a first guess, never more.
_KNOWN: Final = {"block range too large": 2000, "block range is too wide": 3000}


def _suggestion(kind: Kind, text: str, asked: Asked, span: int | None) -> Suggestion | None:
    for pattern, base in ((_BRACKET, 16), (_DECIMAL, 10)):
        if found := pattern.search(text):
            first, last = int(found[1], base), int(found[2], base)
            fits = first <= last
            if isinstance(asked, tuple) and span is not None:
                # two providers on Base suggest the refused range itself: only a strict prefix is a step forward
                fits = fits and first == asked[0] and last < asked[1]
            if fits:
                return Suggestion(last - first + 1, kind is Kind.RANGE, first, last)
    if kind in (Kind.RESULTS, Kind.RESPONSE_SIZE):
        return None  # numbers in these messages count logs or bytes
    stated = _stated(text) or _KNOWN.get(text.strip().lower())
    if stated is None or stated < 1 or (span is not None and stated >= span):
        return None
    return Suggestion(stated, True)


def _stated(*texts: str) -> int | None:
    text = _DECIMAL.sub("", _BRACKET.sub("", " ".join(texts)))
    for pattern in _STATED:
        if found := pattern.search(text):
            return _number(found[1])
    integers = _INTEGER.findall(text)
    return _number(integers[-1]) if integers else None


def _number(text: str) -> int | None:
    digits = re.sub(r"[,.]", "", text.lower().removesuffix("k"))
    if not digits:
        return None
    return int(digits) * (1000 if text[-1] in "kK" else 1)
