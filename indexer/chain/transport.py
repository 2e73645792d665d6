"""JSON-RPC over HTTP to one endpoint: requests out, answers matched to them by id, everything else a named error.

It paces (`pacing.py`), bounds how many requests are under way and how large a body may grow, and keeps quiet for as long as the endpoint
asks. It follows no redirect, uses no proxy from the environment, and lets no exception through that could show the URL.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from itertools import count
from random import Random
from typing import Any, ClassVar, Final, Generic, TypeVar, cast

import aiohttp
import msgspec
from yarl import URL

from indexer.chain.hedging import under_way
from indexer.chain.pacing import Pace
from indexer.chain.rpc_errors import (
    Asked,
    BadAnswer,
    Kind,
    RateLimited,
    Refused,
    RpcError,
    TooManyResults,
    Unreachable,
    clean,
    error_for,
    of_status,
)

T = TypeVar("T")
# endpoint, method, outcome, seconds; None: what was found out later of a request that was told already
Observe = Callable[[str, str, str, float | None], None]
UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)  # the last for JSON nested too deeply
Headers = tuple[str | None, str | None]  # Retry-After, Date

_CODE: Final = re.compile(r"-?[0-9]{1,9}")  # where it comes as a string; Python refuses to read thousands of digits
_LONGEST_QUIET: Final = 3600.0  # seconds; whatever a Retry-After says
_RETRY_BASE: Final = 1.0  # seconds after the first rate limit without a Retry-After; doubles


@dataclass(slots=True)
class Call(Generic[T]):
    """One question: `result` is the msgspec type of the answer, `summary` is how the params are shown to people."""

    method: str
    params: list[Any]
    result: Any  # a type or a union of types, which mypy has no word for
    summary: str = ""
    asked: Asked = None


class ErrorBody(msgspec.Struct):
    code: int | None = None
    message: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"")


class Answer(msgspec.Struct, Generic[T]):
    id: int | str | None = None
    result: T | msgspec.UnsetType = msgspec.UNSET
    error: ErrorBody | None = None


class _Missing:
    pass


@lru_cache(maxsize=64)
def _decoder(result: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(Answer[result])


_ITEMS: Final = msgspec.json.Decoder(list[Answer[msgspec.Raw]])
_ENCODER: Final = msgspec.json.Encoder()


class Transport:
    """The connection to one endpoint. `open` before use, `close` after."""

    MISSING: ClassVar[_Missing] = _Missing()  # in place of an item that a batch left out

    def __init__(
        self,
        url: str,
        *,
        name: str | None,
        requests_per_second: float | None,
        timeout: float,
        max_body: int,
        concurrency: int,
        rng: Random,
        observe: Observe | None,
    ) -> None:
        try:
            self._url = URL(url)
        except ValueError:
            raise ValueError("an endpoint's url cannot be read (it is not shown, as it may hold a key)") from None
        if self._url.scheme not in ("http", "https") or not self._url.host:
            raise ValueError("an endpoint's url must begin with http:// or https:// and name a host")
        self.name = name or host_of(self._url)
        self.pace = Pace(requests_per_second)
        self._timeout, self._max_body = timeout, max_body
        self._concurrency, self._rng, self._observe = concurrency, rng, observe
        self._ids = count(1)
        self._session: aiohttp.ClientSession | None = None
        self._places: asyncio.Semaphore | None = None
        self._quiet_until = 0.0  # of the loop's clock
        self._rate_limits = 0  # in a row

    async def open(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._concurrency),
            timeout=aiohttp.ClientTimeout(total=self._timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            headers={
                "Content-Type": "application/json",
                "Accept": "application/json",
                "Accept-Encoding": "gzip, deflate",
                "User-Agent": "loyalty-settlement-indexer",
            },
        )
        self._places = asyncio.Semaphore(self._concurrency)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def call(self, call: Call[T]) -> T:
        """The result, of the type that was asked for. Raises RpcError."""
        request_id = next(self._ids)
        async with self._turn(1, call):
            status, headers, body = await self._exchange(self._request(call, request_id), call)
            try:
                answer = _decoder(call.result).decode(body)
            except UNREADABLE as why:
                raise self._unreadable(call, status, headers, body, why) from None
            return cast(T, self._read(call, answer, request_id, status, headers))

    async def batch(self, calls: Sequence[Call[Any]]) -> list[Any]:
        """For each call, in their order: its result, its RpcError, or MISSING. Raises RpcError where all failed as one."""
        first = next(self._ids)
        ids = [first] + [next(self._ids) for _ in calls[1:]]
        text = b"[" + b",".join([self._request(call, i) for call, i in zip(calls, ids, strict=True)]) + b"]"
        whole: Call[Any] = Call("batch", [], Any, f"{len(calls)} calls, the first {calls[0].method}")
        async with self._turn(len(calls), whole):
            status, headers, body = await self._exchange(text, whole)
            try:
                items = _ITEMS.decode(body)
            except UNREADABLE as why:
                raise self._unreadable(whole, status, headers, body, why) from None
            by_id = self._by_id(whole, items, status, headers)
            answers = [
                self._item(call, by_id[i], i, status, headers) if i in by_id else self.MISSING
                for call, i in zip(calls, ids, strict=True)
            ]
            if all(answer is self.MISSING for answer in answers):
                raise self._bad(whole, "no answer to any request of the batch")
            for answer in answers:
                if isinstance(answer, RateLimited):
                    raise answer
        for call, answer in zip(calls, answers, strict=True):
            if answer is self.MISSING:
                self.found(call, Kind.LEFT_OUT)
            elif isinstance(answer, RpcError):
                self.found(call, answer.kind)
        return answers

    def found(self, call: Call[Any], kind: Kind) -> None:
        """Tells of a failure that only the answer's content showed: the request as such went well."""
        if self._observe is not None:
            self._observe(self.name, call.method, str(kind), None)

    def _by_id(
        self, whole: Call[Any], items: list[Answer[msgspec.Raw]], status: int, headers: Headers
    ) -> dict[int | str, Answer[msgspec.Raw]]:
        by_id: dict[int | str, Answer[msgspec.Raw]] = {}
        for item in items:
            if item.id is None:
                if item.error is None:
                    raise self._bad(whole, "a result that names no request")
                refusal = self._refusal(whole, item.error, status, headers)
                if len(items) == 1 or isinstance(refusal, RateLimited):
                    raise refusal  # said of the batch as a whole
            elif item.id in by_id:
                raise self._bad(whole, f"two answers to one request (id {clean(str(item.id), 40)})")
            else:
                by_id[item.id] = item
        return by_id

    def _item(self, call: Call[Any], item: Answer[msgspec.Raw], own: int, status: int, headers: Headers) -> Any:
        try:
            raw = self._read(call, item, own, status, headers)
            return msgspec.json.decode(raw, type=call.result)
        except RpcError as error:
            return error
        except UNREADABLE as why:
            return self._bad(call, f"a result of the wrong shape: {why}")

    @staticmethod
    def _request(call: Call[Any], request_id: int) -> bytes:
        return _ENCODER.encode({"jsonrpc": "2.0", "id": request_id, "method": call.method, "params": call.params})

    # ── one HTTP request ──────────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _turn(self, items: int, call: Call[Any]) -> AsyncIterator[None]:
        """A place among the requests under way, when the pace allows so many calls; its outcome is observed."""
        assert self._places is not None, "open() first"
        async with self._places:
            await self._quiet(call)
            loop = asyncio.get_running_loop()
            if (wait := self.pace.book(items, loop.time())) > 0:
                await asyncio.sleep(wait)
                await self._quiet(call)  # somebody else may have been refused meanwhile
            started, outcome = time.monotonic(), "cancelled"
            try:
                with under_way():
                    yield
                outcome = "ok"
                self.pace.answered(loop.time())
            except RpcError as error:
                outcome = str(error.kind)
                raise
            finally:
                if self._observe is not None:
                    self._observe(self.name, call.method, outcome, time.monotonic() - started)

    async def _quiet(self, call: Call[Any]) -> None:
        """Wait until the quiet that the endpoint asked for is over; if that is far off, RateLimited at once."""
        loop = asyncio.get_running_loop()
        while (quiet := self._quiet_until - loop.time()) > 0:
            if quiet > self._timeout:
                raise RateLimited(
                    "it asked for quiet, and was not asked again",
                    endpoint=self.name,
                    method=call.method,
                    params=call.summary,
                    kind=Kind.RATE_LIMIT,
                    retry_after=round(quiet, 1),
                )
            await asyncio.sleep(quiet)

    async def _exchange(self, text: bytes, call: Call[Any]) -> tuple[int, Headers, bytes]:
        assert self._session is not None, "open() first"
        last = False  # no further attempt: an answer has begun, or this is the second
        while True:
            try:
                async with self._session.post(self._url, data=text, allow_redirects=False) as response:
                    last = True
                    body = await self._body(response, call)
                    return response.status, (response.headers.get("Retry-After"), response.headers.get("Date")), body
            except TimeoutError:
                raise self._unreachable(call, f"no whole answer within {self._timeout:g} s", Kind.TIMEOUT) from None
            except (aiohttp.ClientError, OSError, ValueError) as why:
                lost = isinstance(why, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError)
                if last or not lost or isinstance(why, aiohttp.ClientConnectorError):
                    raise self._unreachable(call, reason(why)) from None
                # a kept connection that the server closed while we wrote: every call of ours only reads, so once more
                last = True

    async def _body(self, response: aiohttp.ClientResponse, call: Call[Any]) -> bytes:
        announced = response.content_length or 0
        parts: list[bytes] = []
        size = announced if announced > self._max_body else 0
        if not size:
            async for part in response.content.iter_any():
                size += len(part)
                if size > self._max_body:
                    break
                parts.append(part)
        if size <= self._max_body:
            return b"".join(parts)
        response.close()  # not released: the rest is not to be read
        said = f"an answer of more than {self._max_body // 2**20} MiB, which was not read to its end"
        kind = TooManyResults if call.method == "eth_getLogs" else BadAnswer
        raise kind(
            said, endpoint=self.name, method=call.method, params=call.summary, kind=Kind.RESPONSE_SIZE, status=200
        )

    # ── reading answers ───────────────────────────────────────────────────────────────────────────────────────────

    def _read(self, call: Call[Any], answer: Answer[Any], own: int, status: int, headers: Headers) -> Any:
        if answer.error is not None:
            raise self._refusal(call, answer.error, status, headers)
        if not 200 <= status < 300:
            raise self._said(call, "", "", None, status, _retry_after(*headers))
        if answer.id != own:
            raise self._bad(call, f"an answer to another request (id {clean(str(answer.id), 40)}, not {own})")
        if answer.result is msgspec.UNSET:
            raise self._bad(call, "neither a result nor an error")
        self._rate_limits = 0
        return answer.result

    def _refusal(self, call: Call[Any], body: ErrorBody, status: int, headers: Headers) -> RpcError:
        data = bytes(body.data)
        text = ""
        wait = _retry_after(*headers)
        if data and data != b"null":
            value = msgspec.json.decode(data)
            text = value if isinstance(value, str) else data.decode()
            wait = _backoff_in(value) if wait is None else wait
        return self._said(call, body.message or "", text, body.code, status, wait)

    def _said(
        self, call: Call[Any], message: str, data: str, code: int | None, status: int, wait: float | None
    ) -> RpcError:
        error = error_for(
            message,
            data,
            code,
            status,
            endpoint=self.name,
            method=call.method,
            params=call.summary,
            asked=call.asked,
            retry_after=wait,
        )
        if isinstance(error, RateLimited):
            self._keep_quiet(error.retry_after)
            self.pace.refused(asyncio.get_running_loop().time())
        return error

    def _unreadable(self, call: Call[Any], status: int, headers: Headers, body: bytes, why: Exception) -> RpcError:
        """A body that is not the answer we hoped for: an odd error, HTML, half a JSON, or a result of another shape."""
        try:
            found = msgspec.json.decode(body)
        except UNREADABLE:
            text = clean(body[:2000].decode(errors="replace"), 120)
            if not 200 <= status < 300:
                error = self._said(call, text if "rror code" in text else "", "", None, status, _retry_after(*headers))
                error.detail = f"it answered {text!r} in place of JSON" if text else "it answered nothing"
                if isinstance(error, Refused) and error.kind is Kind.UNKNOWN:
                    return self._unreachable(call, error.detail, Kind.NOT_JSON, status)
                return error
            detail = (
                f"it answered {text!r} in place of JSON" if body.lstrip()[:1] not in (b"{", b"[") else "half a JSON"
            )
            return self._unreachable(call, detail, Kind.NOT_JSON, status)
        if isinstance(found, list) and len(found) == 1:
            found = found[0]
        if isinstance(found, dict):
            error_part = found.get("error") or (found.get("message") if "result" not in found else None)
            if isinstance(error_part, str):
                return self._said(call, error_part, "", None, status, _retry_after(*headers))
            if isinstance(error_part, dict):
                code = error_part.get("code")
                if isinstance(code, str) and _CODE.fullmatch(code):
                    code = int(code)
                data = error_part.get("data")
                text = data if isinstance(data, str) else "" if data is None else msgspec.json.encode(data).decode()
                known = code if isinstance(code, int) else None
                return self._said(
                    call, str(error_part.get("message") or ""), text, known, status, _retry_after(*headers)
                )
        if not 200 <= status < 300 and of_status(status) is not Kind.UNKNOWN:
            return self._said(call, "", "", None, status, _retry_after(*headers))
        return self._bad(call, f"an answer of the wrong shape: {clean(str(why), 120)}")

    def _keep_quiet(self, asked: float | None) -> None:
        if asked is None and self._quiet_until > asyncio.get_running_loop().time():
            return  # said of requests that were under way together, or item by item of one batch
        self._rate_limits = min(self._rate_limits + 1, 6)
        wait = asked if asked is not None else _RETRY_BASE * 2 ** (self._rate_limits - 1)
        wait = min(wait, _LONGEST_QUIET) * (1 + self._rng.random() / 4)  # so that all who wait do not come at once
        self._quiet_until = max(self._quiet_until, asyncio.get_running_loop().time() + wait)

    def _bad(self, call: Call[Any], detail: str) -> BadAnswer:
        return BadAnswer(detail, endpoint=self.name, method=call.method, params=call.summary, kind=Kind.MISFIT)

    def _unreachable(
        self, call: Call[Any], detail: str, kind: Kind = Kind.UNREACHABLE, status: int | None = None
    ) -> Unreachable:
        return Unreachable(
            detail, endpoint=self.name, method=call.method, params=call.summary, kind=kind, status=status
        )


def host_of(url: URL) -> str:
    """What may be shown of an endpoint: its host, and the port where it is not the scheme's own."""
    host = url.host or "?"
    return host if url.is_default_port() or url.port is None else f"{host}:{url.port}"


def reason(why: BaseException) -> str:
    """Why a connection failed, in words that cannot hold the URL (aiohttp's own may)."""
    match why:
        case aiohttp.ClientConnectorCertificateError():
            return f"its TLS certificate is not valid ({clean(str(why.certificate_error), 120)})"
        case aiohttp.ClientConnectorSSLError():
            return "TLS could not be agreed on"
        case aiohttp.ClientConnectorDNSError():
            return "its name could not be resolved"
        case aiohttp.ClientConnectorError() | aiohttp.ClientOSError():
            said = os.strerror(why.errno) if why.errno else ""
            connecting = isinstance(why, aiohttp.ClientConnectorError)
            return ("no connection" if connecting else "the connection broke") + (f" ({said})" if said else "")
        case aiohttp.ClientPayloadError():
            return "the answer broke off, or its compression is broken"
        case aiohttp.ClientResponseError():
            return "the answer is not proper HTTP"
    return f"the connection failed ({type(why).__name__})"


def _retry_after(value: str | None, date: str | None) -> float | None:
    """Seconds of a Retry-After header in both its forms: a number, or a date (read against the server's own clock)."""
    if value is None:
        return None
    try:
        return min(max(0.0, float(value)), _LONGEST_QUIET)
    except ValueError:
        pass
    try:
        then = parsedate_to_datetime(value)
        now = parsedate_to_datetime(date) if date else datetime.now(UTC)
        return min(max(0.0, (then - now).total_seconds()), _LONGEST_QUIET)
    except (TypeError, ValueError):
        return None


def _backoff_in(data: Any) -> float | None:
    """Infura says it in the error's data: {"rate": {"backoff_seconds": 30, …}}."""
    rate = data.get("rate") if isinstance(data, dict) else None
    seconds = rate.get("backoff_seconds") if isinstance(rate, dict) else None
    return float(seconds) if isinstance(seconds, int | float) and seconds >= 0 else None
