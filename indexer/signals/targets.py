"""Where a webhook may go: no request leaves for a private address unless that webhook's configuration allows it.

A brand writes the URL, and the daemon stands inside the operator's network: without this guard anyone who may configure
a webhook could reach whatever the daemon can reach. The rule is applied to each address that a name resolves to and
again to the very address a socket connects to, so a name that answers differently the second time gains nothing.
Redirects, proxies and cookies do not exist here. What a response means is `webhooks.py`'s business.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from concurrent.futures import Executor
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Protocol

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

Network = IPv4Network | IPv6Network
Host = IPv4Address | IPv6Address

# The IANA special-purpose registry for IPv4 (RFC 6890 and its updates), plus multicast and the reserved top.
NOT_PUBLIC_V4 = tuple(
    IPv4Network(block)
    for block in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # carriers' NAT, and the overlay networks that borrow it
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local: cloud metadata services
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# IPv6 the other way round: only global unicast is public, less what carries an IPv4 address or none at all.
PUBLIC_V6 = IPv6Network("2000::/3")
NOT_PUBLIC_V6 = tuple(
    IPv6Network(block)
    for block in (
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",
        "2002::/16",  # 6to4: an IPv4 address in disguise
        "3fff::/20",
    )
)

KEEP_ALIVE = (
    4.0  # seconds; below the five after which common servers hang up, so that a POST rarely meets a dead socket
)


class TargetRefused(Exception):
    """A webhook's target is not one that we may connect to. `target` names the host or address, never the whole URL."""

    def __init__(self, target: str, why: str) -> None:
        super().__init__(f"{target}: {why}")
        self.target, self.why = target, why


class Lookup(Protocol):
    """A resolver of names: host and port to `socket.getaddrinfo`'s answers. Raises OSError."""

    async def __call__(self, host: str, port: int) -> Sequence[tuple[Any, ...]]: ...


def system_lookup(executor: Executor) -> Lookup:
    """The system's resolver, in threads of its own: a name server that hangs must not starve the rest of the daemon."""

    async def lookup(host: str, port: int) -> Sequence[tuple[Any, ...]]:
        return await asyncio.get_running_loop().run_in_executor(
            executor, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )

    return lookup


def networks(allow: Sequence[str]) -> tuple[Network, ...]:
    """Parses the networks of a webhook's `allow`. Raises ValueError."""
    return tuple(ip_network(block) for block in allow)


def _plain(host: str) -> Host:
    """The address that packets would really go to: without scope, and IPv4 where IPv6 merely wraps it."""
    found = ip_address(host.partition("%")[0])
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        return found.ipv4_mapped
    return found


def is_public(host: str) -> bool:
    """Whether an address belongs to the public internet."""
    found = _plain(host)
    if isinstance(found, IPv4Address):
        return not any(found in block for block in NOT_PUBLIC_V4)
    return found in PUBLIC_V6 and not any(found in block for block in NOT_PUBLIC_V6)


class Guard:
    """One webhook's rule: the public internet over https, and the networks of `allow` over http or https."""

    def __init__(self, allow: Sequence[Network], *, plain_http: bool) -> None:
        self._allow, self._plain_http = tuple(allow), plain_http

    def check(self, host: str) -> None:
        """Raises TargetRefused unless this address may be connected to."""
        found = _plain(host)
        if any(found.version == block.version and found in block for block in self._allow):
            return
        if self._plain_http:
            raise TargetRefused(host, "plain http goes only to networks in the webhook's `allow`")
        if not is_public(host):
            raise TargetRefused(host, "not a public address; allow its network for this webhook if it is yours")


def check_url(text: str, allow: Sequence[Network]) -> URL:
    """The URL as it will be requested. Raises TargetRefused for what no address could make acceptable."""
    try:
        url = URL(text)
        host = url.host
    except ValueError as error:
        raise TargetRefused("webhook url", f"cannot be read: {error}") from None
    if url.scheme not in ("http", "https") or not host:
        raise TargetRefused(host or "webhook url", "expected http:// or https:// and a host")
    if url.user is not None or url.password is not None:
        raise TargetRefused(host, "a user or password in the URL is not supported: the signature authenticates")
    if url.scheme == "http" and not allow:
        raise TargetRefused(host, "plain http goes only to networks in the webhook's `allow`")
    return url


class _GuardedResolver(AbstractResolver):
    """Resolves and judges in one step: aiohttp connects to what this returns and asks nobody else."""

    def __init__(self, guard: Guard, lookup: Lookup) -> None:
        self._guard, self._lookup = guard, lookup

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        answers = await self._lookup(host, port)
        found = [(answer[0], str(answer[4][0])) for answer in answers if answer[0] in (socket.AF_INET, socket.AF_INET6)]
        if not found:
            raise OSError(None, f"no address for {host}")
        # One bad address among good ones refuses the name: which one a client would try first is luck.
        for _, address in found:
            self._guard.check(address)
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST)
            for kind, address in found
        ]

    async def close(self) -> None:
        return


def open_session(guard: Guard, lookup: Lookup, *, connections: int) -> aiohttp.ClientSession:
    """An HTTP client for one webhook, whose every connection passed the guard. The caller closes it."""

    def guarded_socket(info: tuple[Any, ...]) -> socket.socket:
        # the last gate, at the address itself: literal addresses in URLs never meet the resolver
        guard.check(str(info[4][0]))
        return socket.socket(family=info[0], type=info[1], proto=info[2])

    connector = aiohttp.TCPConnector(
        limit=connections,
        resolver=_GuardedResolver(guard, lookup),
        socket_factory=guarded_socket,
        keepalive_timeout=KEEP_ALIVE,
    )
    return aiohttp.ClientSession(
        connector=connector,
        trust_env=False,
        auto_decompress=False,  # the body is of no interest, a bomb in it even less
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),  # the attempt has its own deadline
        skip_auto_headers=("Accept-Encoding",),
        headers={"Content-Type": "application/json", "User-Agent": "loyalty-settlement-indexer"},
    )
