"""New heads of a chain over a websocket: one subscription, one connection, headers as the node sends them.

Promises a header, or an error that says why there is none: Silent when nothing came for too long (a socket can stay open and
say nothing for ever), Unreachable when it closed. It neither reconnects nor skips nor reorders: repeated heads, gaps and
heads of another branch are passed on, for the follower's links to find.
"""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Final, Self

import aiohttp
import msgspec
from yarl import URL

from indexer.chain.rpc_errors import Kind, RpcError, Unreachable, clean, error_for
from indexer.chain.transport import UNREADABLE, ErrorBody, host_of, reason
from indexer.chain.wire import RawHeader

MAX_MESSAGE: Final = 2**17  # bytes: a header is some 2 kB, and hundreds of them may wait
EARLY: Final = 64  # heads that are kept of those that come before the subscription is answered
_SUBSCRIBE: Final = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "eth_subscribe", "params": ["newHeads"]})


class Silent(Unreachable):
    """The socket is open, and no head came for `seconds`."""

    advice = (
        "the chain is polled over HTTP until the socket speaks again; if this stays, check the websocket's provider"
    )

    def __init__(self, seconds: float, *, endpoint: str) -> None:
        super().__init__(
            f"no new head for {seconds:g} s",
            endpoint=endpoint,
            method="eth_subscribe",
            params="newHeads",
            kind=Kind.SILENT,
        )
        self.seconds = seconds


class _Note(msgspec.Struct):
    result: RawHeader | None = None


class _Message(msgspec.Struct):
    """An answer to our one request, or a notification; never both."""

    id: int | str | None = None
    method: str | None = None
    params: _Note | None = None
    result: msgspec.Raw = msgspec.Raw(b"")
    error: ErrorBody | None = None


_DECODER: Final = msgspec.json.Decoder(_Message)


class HeadStream:
    """`async with HeadStream(url) as heads: async for header in heads: …`; ends only with an RpcError.

    `silent_seconds` without a usable head is Silent; `timeout` in seconds is for connecting and subscribing;
    `max_message` in bytes. `discarded` counts messages that were no heads: garbage, other notifications, headers
    without a number, hash or parent.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        silent_seconds: float = 5.0,
        timeout: float = 10.0,
        max_message: int = MAX_MESSAGE,
    ) -> None:
        try:
            self._url = URL(url)
        except ValueError:
            raise ValueError("a websocket's url cannot be read (it is not shown, as it may hold a key)") from None
        if self._url.scheme not in ("ws", "wss") or not self._url.host:
            raise ValueError("a websocket's url must begin with ws:// or wss:// and name a host")
        self.name = name or host_of(self._url)
        self.discarded = 0
        self._silent_seconds, self._timeout, self._max_message = silent_seconds, timeout, max_message
        self._session: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._early: list[RawHeader] = []  # heads that overtook the answer to the subscription

    def __repr__(self) -> str:
        return f"<HeadStream {self.name}>"

    async def __aenter__(self) -> Self:
        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(self._redirected)
        self._session = aiohttp.ClientSession(
            trust_env=False, cookie_jar=aiohttp.DummyCookieJar(), trace_configs=[trace]
        )
        try:
            async with asyncio.timeout(self._timeout):
                self._socket = await self._session.ws_connect(
                    self._url,
                    timeout=aiohttp.ClientWSTimeout(ws_close=2.0),
                    max_msg_size=self._max_message,
                )
                await self._socket.send_str(_SUBSCRIBE)
                await self._subscribed()
        except TimeoutError:
            await self._close()
            raise self._unreachable(f"no subscription within {self._timeout:g} s", Kind.TIMEOUT) from None
        except aiohttp.WSServerHandshakeError as why:
            await self._close()
            raise self._refused("", None, why.status) from None
        except (aiohttp.ClientError, OSError, ValueError) as why:
            await self._close()
            raise self._unreachable(reason(why)) from None
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RawHeader:
        if self._early:
            return self._early.pop(0)
        try:
            async with asyncio.timeout(self._silent_seconds):
                while True:
                    message = await self._message()
                    head = None if message is None else self._head(message)
                    if head is not None:
                        return head
                    self.discarded += 1
        except TimeoutError:
            raise Silent(self._silent_seconds, endpoint=self.name) from None

    async def _subscribed(self) -> None:
        while True:
            message = await self._message()
            if message is None:
                self.discarded += 1
            elif message.error is not None:
                raise self._refused(message.error.message or "", message.error.code, None)
            elif message.id == 1:
                return
            elif (head := self._head(message)) is not None and len(self._early) < EARLY:
                self._early.append(head)

    async def _message(self) -> _Message | None:
        """The next message; None for one that is not JSON-RPC."""
        assert self._socket is not None, "enter the stream first"
        received = await self._socket.receive()
        match received.type:
            case aiohttp.WSMsgType.TEXT | aiohttp.WSMsgType.BINARY:
                try:
                    return _DECODER.decode(received.data)
                except UNREADABLE:
                    return None
            case aiohttp.WSMsgType.ERROR:
                raise self._unreachable(f"the socket broke ({type(received.data).__name__})")
        code = self._socket.close_code
        if code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG:
            raise self._unreachable(f"it sent a message of more than {self._max_message} bytes", Kind.RESPONSE_SIZE)
        said = clean(received.extra, 80) if isinstance(received.extra, str) and received.extra else ""
        raise self._unreachable(f"it closed the socket (code {code})" + (f": {said!r}" if said else ""))

    @staticmethod
    def _head(message: _Message) -> RawHeader | None:
        # a gateway that changes its node behind the socket also changes the subscription's id: there is only one here
        if message.method != "eth_subscription" or message.params is None:
            return None
        head = message.params.result
        if head is None or None in (head.number, head.hash, head.parent_hash):
            return None
        return head

    def _refused(self, message: str, code: int | None, status: int | None) -> RpcError:
        return error_for(message, "", code, status, endpoint=self.name, method="eth_subscribe", params="newHeads")

    def _unreachable(self, detail: str, kind: Kind = Kind.UNREACHABLE) -> Unreachable:
        return Unreachable(detail, endpoint=self.name, method="eth_subscribe", params="newHeads", kind=kind)

    async def _redirected(self, *event: object) -> None:
        raise self._refused("", None, 302)  # aiohttp would follow

    async def _close(self) -> None:
        if self._socket is not None:
            await self._socket.close()
            self._socket = None
        if self._session is not None:
            await self._session.close()
            self._session = None
