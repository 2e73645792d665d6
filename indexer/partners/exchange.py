"""One GET over the wire: a whole answer of a bounded size in a bounded time, or a word for why there is none.

Sends it once and follows no redirect, keeps no cookie, uses no proxy from the environment, and lets no exception through that could
show the URL.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, Self

import aiohttp
from yarl import URL

MAX_BODY: Final = 8 * 2**20  # bytes after decompression; a page of a hundred rows is some 200 kB
TIMEOUT: Final = 20.0  # seconds of one request, from the first byte sent to the last one read


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes


class Unanswered(Exception):
    """No whole answer: `outcome` for metrics, the message for people."""

    def __init__(self, outcome: str, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome


class Exchange(Protocol):
    """One GET over the wire, or within a simulation. Raises Unanswered."""

    async def get(self, path: str, params: Mapping[str, str]) -> Reply: ...


class Http:
    """GET under one base URL with one set of headers."""

    def __init__(
        self, url: str, headers: Mapping[str, str], *, timeout: float = TIMEOUT, max_body: int = MAX_BODY
    ) -> None:
        self._base, self._timeout, self._max_body = URL(url), timeout, max_body
        self._headers = {"Accept": "application/json", "User-Agent": "loyalty-settlement-indexer", **headers}
        self._session: aiohttp.ClientSession | None = None

    @property
    def host(self) -> str:
        base = self._base
        return (base.host or "?") + ("" if base.is_default_port() or base.port is None else f":{base.port}")

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            middlewares=(_once,),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def get(self, path: str, params: Mapping[str, str]) -> Reply:
        assert self._session is not None, "enter first"
        url = URL(f"{str(self._base).rstrip('/')}{path}", encoded=True).update_query(params)
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                return Reply(response.status, response.headers, await self._body(response))
        except TimeoutError:
            raise Unanswered("timeout", f"no whole answer within {self._timeout:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as why:
            raise _unreached(why) from None

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        parts: list[bytes] = []
        size = response.content_length or 0
        if size <= self._max_body:
            size = 0
            async for part in response.content.iter_chunked(65_536):
                size += len(part)
                if size > self._max_body:
                    break
                parts.append(part)
            else:
                return b"".join(parts)
        response.close()  # the rest is not read
        raise Unanswered(
            "too_large", f"HTTP {response.status} with more than {self._max_body // 2**20} MiB, not read to its end"
        )


async def _once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """One request and no second one: aiohttp repeats a GET unseen when a kept connection breaks, which no budget knows of."""
    try:
        return await send(request)
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as why:
        raise _unreached(why) from None


def _unreached(why: Exception) -> Unanswered:
    """In words that cannot hold the URL: aiohttp's own may."""
    match why:
        case aiohttp.ClientConnectorCertificateError():
            error = why.certificate_error  # its own words are the short ones: certificate has expired
            certificate = getattr(error, "verify_message", "") or str(error).split("(_ssl.c")[0].strip()
            return Unanswered("tls", f"its TLS certificate is not valid: {certificate[:160]}")
        case aiohttp.ClientSSLError():
            return Unanswered("tls", "TLS could not be agreed on")
        case aiohttp.ClientConnectorDNSError():
            return Unanswered("unreachable", "its name could not be resolved")
        case aiohttp.ClientConnectorError() | aiohttp.ClientOSError():
            said = f" ({os.strerror(why.errno)})" if why.errno else ""
            return Unanswered("unreachable", f"no connection{said}")
        case aiohttp.ServerDisconnectedError():
            return Unanswered("unreachable", "it closed the connection without an answer")
        case aiohttp.ClientPayloadError():
            return Unanswered("broken", "the answer broke off, or its compression is broken")
        case aiohttp.ClientResponseError():
            return Unanswered("broken", "the answer is not proper HTTP")
    return Unanswered("unreachable", f"the connection failed ({type(why).__name__})")
