"""The simulated partners on real sockets: keys, problems, latency, silence, torn connections and bodies without end."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator

import aiohttp
import pytest

from indexer.sandbox.partners.app import Hosted
from indexer.sandbox.partners.faults import ENDLESS
from indexer.sandbox.partners.keyban import Keyban
from indexer.sandbox.partners.loyfin import LoyfinApi
from indexer.sandbox.partners.movement import AT_ONCE
from indexer.sandbox.partners.qiibee import BASE, Qiibee

NOW = 1_795_170_000.0
KEY = "the-key"


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session:
        yield session


@pytest.fixture
async def keyban() -> AsyncIterator[tuple[Keyban, str]]:
    async with Hosted(Keyban(seed=1, clock=lambda: NOW, keys=[KEY])) as hosted:
        assert isinstance(hosted.partner, Keyban)
        yield hosted.partner, hosted.url


async def test_all_three_answer_over_http(http: aiohttp.ClientSession, keyban: tuple[Keyban, str]) -> None:
    partner, url = keyban
    account = partner.open_account()
    headers = {"X-Api-Key": KEY}
    mint = f"{url}/v1/loyalty/account/{account.id}/mint"
    async with http.post(mint, json={"amount": 250}, headers=headers) as answer:
        assert (answer.status, await answer.json()) == (201, {"newamount": 250})
    partner.mint(account, 40, AT_ONCE)
    query = {"walletId": account.wallet, "currentPage": "1", "pageSize": "10"}
    async with http.get(f"{url}/v1/loyalty/orders", params=query, headers=headers) as answer:
        document = await answer.json()
    assert document["data"][0]["orderTransactions"]["nodes"][0]["assetTransfer"]["value"] == "40"
    async with http.get(f"{url}/v1/loyalty/orders", params={"pageSize": "101"}, headers=headers) as answer:
        assert (answer.status, answer.content_type) == (400, "application/problem+json")
    async with http.get(f"{url}/v1/loyalty/orders") as answer:
        assert answer.status == 401
    assert [call.status for call in partner.calls] == [201, 200, 400, 401]

    qiibee = Qiibee(seed=1, clock=lambda: NOW, keys=[KEY])
    user = qiibee.enrol("a user/1")
    qiibee.credit(user, 25, AT_ONCE)
    async with Hosted(qiibee, BASE) as hosted:
        async with http.get(f"{hosted.url}/transactions", headers=headers) as answer:
            (row,) = (await answer.json())["data"]["transactions"]
            assert row["amount_received"] == "25.00000"
        async with http.get(f"{hosted.url}/users/a%20user%2F1/balances", headers=headers) as answer:
            assert answer.status == 200
            assert (await answer.json())["data"][0]["balance"] == 25

    loyfin = LoyfinApi(seed=1, clock=lambda: NOW)
    loyfin.stranger()
    async with Hosted(loyfin) as hosted, http.get(f"{hosted.url}/operations", params={"kind": "issuance"}) as answer:
        assert (await answer.json())["page"] == {"limit": 25, "nextCursor": None, "hasMore": False}


async def test_silence_and_torn_connections_end_with_the_client(
    http: aiohttp.ClientSession, keyban: tuple[Keyban, str]
) -> None:
    partner, url = keyban
    partner.weather.begin("silence")
    with pytest.raises(TimeoutError):
        async with http.get(url, headers={"X-Api-Key": KEY}, timeout=aiohttp.ClientTimeout(total=0.3)):
            pass
    partner.weather.end()
    partner.weather.begin("dropped")
    with pytest.raises(aiohttp.ClientConnectionError):
        async with http.get(url, headers={"X-Api-Key": KEY}):
            pass
    partner.weather.end()
    partner.weather.begin("html")
    async with http.get(url, headers={"X-Api-Key": KEY}) as answer:
        assert answer.content_type == "text/html"
    partner.weather.end()
    partner.latency = 0.2
    started = asyncio.get_running_loop().time()
    async with http.get(f"{url}/health/ready", headers={"X-Api-Key": KEY}) as answer:
        assert answer.status == 200
    assert asyncio.get_running_loop().time() - started >= 0.2


async def test_a_body_without_end_costs_us_no_memory_and_stops_with_the_client(http: aiohttp.ClientSession) -> None:
    partner = Keyban(seed=1, clock=lambda: NOW)
    partner.weather.begin("endless_body")
    async with Hosted(partner) as hosted:
        tracemalloc.start()
        try:
            read = 0
            async with http.get(hosted.url) as answer:
                async for piece in answer.content.iter_chunked(65_536):
                    read += len(piece)
                    if read > 4 * 1024 * 1024:
                        break
                answer.close()
            assert tracemalloc.get_traced_memory()[1] < 20 * 1024 * 1024
        finally:
            tracemalloc.stop()
        assert hosted.sent < ENDLESS / 4
