"""Where a webhook may go, and where it may not, however the address is written or the name resolves."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from indexer.signals.targets import Guard, TargetRefused, check_url, is_public, networks, open_session

PRIVATE = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.8",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "::127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd12:3456::1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
]
PUBLIC = ["1.1.1.1", "8.8.8.8", "100.63.255.255", "172.32.0.1", "2606:4700:4700::1111", "2a00:1450:4001::1"]


@pytest.mark.parametrize("host", PRIVATE)
def test_what_is_not_the_public_internet_is_refused(host: str) -> None:
    assert not is_public(host)
    with pytest.raises(TargetRefused):
        Guard((), plain_http=False).check(host)


@pytest.mark.parametrize("host", PUBLIC)
def test_the_public_internet_is_reached_by_https_alone(host: str) -> None:
    assert is_public(host)
    Guard((), plain_http=False).check(host)
    with pytest.raises(TargetRefused, match="plain http"):
        Guard(networks(["10.0.0.0/8"]), plain_http=True).check(host)


def test_allowed_networks_are_reached_in_every_spelling_and_no_others() -> None:
    guard = Guard(networks(["10.0.0.0/8", "fd00::/8"]), plain_http=True)
    for host in ("10.1.2.3", "::ffff:10.1.2.3", "fd00::1"):
        guard.check(host)
    for host in ("11.0.0.1", "192.168.0.1", "127.0.0.1", "fe80::1"):
        with pytest.raises(TargetRefused):
            guard.check(host)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://shop.example/",
        "file:///etc/passwd",
        "/relative",
        "https://",
        "https://user:secret@shop.example/",
        "http://shop.example/",
        "https://[::1",
        "https://shop.example:99999/",
    ],
)
def test_urls_that_no_address_could_make_acceptable(url: str) -> None:
    with pytest.raises(TargetRefused) as refused:
        check_url(url, ())
    assert "secret" not in str(refused.value)


class Names:
    """A name server of the test's: the answers of each lookup in turn, the last one for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers, self.asked = list(answers), 0

    async def __call__(self, host: str, port: int) -> Sequence[tuple[Any, ...]]:
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in answer
        ]


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """A server on the loopback interface, which nothing without permission may reach."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="reached")

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][1]
    await runner.cleanup()


async def post(url: str, names: Names, *allow: str) -> int:
    checked = check_url(url, networks(allow))
    guard = Guard(networks(allow), plain_http=checked.scheme == "http")
    async with open_session(guard, names, connections=2) as session, asyncio.timeout(60):
        async with session.post(checked, data=b"{}", allow_redirects=False) as response:
            return response.status


async def test_an_allowed_network_is_reached_by_name(port: int) -> None:
    names = Names(["127.0.0.1"])
    assert await post(f"http://shop.internal:{port}/", names, "127.0.0.0/8") == 200
    assert names.asked == 1  # what was judged is what was connected to: nobody asked again


async def test_a_name_for_a_private_address_is_refused(port: int) -> None:
    for answer in (["127.0.0.1"], ["::ffff:127.0.0.1"], ["::1"], ["10.0.0.5"]):
        with pytest.raises(TargetRefused):
            await post(f"https://shop.example:{port}/", Names(answer))
        with pytest.raises(TargetRefused):
            await post(f"http://shop.example:{port}/", Names(answer), "192.168.0.0/16")


async def test_one_private_address_among_public_ones_refuses_the_name(port: int) -> None:
    for answer in (["1.1.1.1", "127.0.0.1"], ["127.0.0.1", "1.1.1.1"]):
        with pytest.raises(TargetRefused):
            await post(f"https://shop.example:{port}/", Names(answer))


async def test_a_name_that_changes_its_answer_gains_nothing(port: int) -> None:
    names = Names(["127.0.0.1"], ["127.0.0.2"], ["10.0.0.1"])
    guard = Guard(networks(["127.0.0.1/32"]), plain_http=True)
    url = check_url(f"http://shop.example:{port}/", networks(["127.0.0.1/32"]))
    async with open_session(guard, names, connections=2) as session:
        async with session.post(url, data=b"{}") as response:
            assert response.status == 200
    for _ in range(2):  # a new session resolves anew, and judges anew
        async with open_session(guard, names, connections=2) as session:
            with pytest.raises(TargetRefused):
                async with session.post(url, data=b"{}"):
                    raise AssertionError


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "127.1", "0x7f.0.0.1"])
async def test_a_literal_address_is_judged_without_a_name_server(port: int, host: str) -> None:
    names = Names(["127.0.0.1"])  # what the system would make of the odd spellings
    with pytest.raises((TargetRefused, aiohttp.InvalidURL)):
        await post(f"https://{host}:{port}/", names)


# Signed by itself for shop.example, for a hundred years; it protects nothing.
SELF_SIGNED = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgjbFm9pIHKFgmN6Tb
rSTGp5G4c+dSwBGamTYVMmVwEQmhRANCAAQ57amHkwjKLd44B+f3C6lf9nbywX+l
kpi5RTepu8mxwflIUQ23dSi2CJi3/5h4NZtwjgYcy2uBMGuck22KYjx1
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBnTCCAUSgAwIBAgIUGzl1T1fOyknoyzondNUS+cl6wL4wCgYIKoZIzj0EAwIw
FzEVMBMGA1UEAwwMc2hvcC5leGFtcGxlMCAXDTI2MTEyMjAyMjAxN1oYDzIxMjYx
MDI5MDIyMDE3WjAXMRUwEwYDVQQDDAxzaG9wLmV4YW1wbGUwWTATBgcqhkjOPQIB
BggqhkjOPQMBBwNCAAQ57amHkwjKLd44B+f3C6lf9nbywX+lkpi5RTepu8mxwflI
UQ23dSi2CJi3/5h4NZtwjgYcy2uBMGuck22KYjx1o2wwajAdBgNVHQ4EFgQUjfG1
4rH0zdhbzU7wGMgVhRTxfPMwHwYDVR0jBBgwFoAUjfG14rH0zdhbzU7wGMgVhRTx
fPMwDwYDVR0TAQH/BAUwAwEB/zAXBgNVHREEEDAOggxzaG9wLmV4YW1wbGUwCgYI
KoZIzj0EAwIDRwAwRAIgaOYCeSrklI6W2a2Sj9IV7CnmzT+eKgXFTPNk0QIeBqQC
IE3nxqf5JM9rS1MNsVZEZS54dK9/dRB4G4ESyW8w/xZW
-----END CERTIFICATE-----
"""


async def test_a_certificate_that_nobody_vouches_for_ends_the_attempt_before_anything_is_sent(tmp_path: Path) -> None:
    received: list[bytes] = []
    (tmp_path / "server.pem").write_text(SELF_SIGNED)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read(100))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        url = f"https://shop.example:{server.sockets[0].getsockname()[1]}/"
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await post(url, Names(["127.0.0.1"]), "127.0.0.0/8")
    assert received == []
