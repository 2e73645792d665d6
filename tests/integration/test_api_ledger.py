"""Programmes, balances and claims over HTTP: paging, brands, and what a worker is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from indexer.store.database import Database
from tests.api_world import Api, populate, registration, running, token_for

BLOOM, ROSE, NOBODY = ("0x" + digits * 20 for digits in ("15", "16", "99"))
WALLET = "0x" + "A1" * 20


@pytest.fixture
async def api(database: Database) -> AsyncIterator[Api]:
    token = await populate(database)
    async with running(database) as served:
        served.token = token
        yield served


async def walk(api: Api, path: str, limit: int, **more: Any) -> list[dict[str, Any]]:
    """Every entry of every page."""
    found: list[dict[str, Any]] = []
    cursor = ""
    while True:
        status, page, _ = await api.call("GET", f"{path}&limit={limit}{cursor}", **more)
        assert status == 200 and len(page["data"]) <= limit, page
        found += page["data"]
        if page["nextCursor"] is None:
            return found
        assert len(page["data"]) == limit
        cursor = f"&cursor={page['nextCursor']}"


async def test_programmes_and_balances_come_in_pages_to_those_who_may_see_them(api: Api, database: Database) -> None:
    # seven programmes: token n is of issuer n mod 3; each is announced twice, and once in a block that was undone
    await database.pool.execute(
        """
        INSERT INTO indexer.programme (chain_id, block_number, log_index, block_hash, block_time_ms, tx_hash, tx_index, emitter, canonical,
            factory, issuer, loyalty_id, loyalty, name, symbol, media, description, contract_uri, token_uri)
        SELECT 8453, 10 + again, n, '\\x01', 1790000000200, '\\x02', 0, decode(repeat('fa', 20), 'hex'), again >= 0,
               decode(repeat('fa', 20), 'hex'), decode(repeat((ARRAY['15', '16', '99'])[n % 3 + 1], 20), 'hex'),
               decode(repeat('1d', 32), 'hex'), decode(repeat(lpad(n::text, 2, '0'), 20), 'hex'),
               CASE again WHEN 0 THEN 'Petals ' ELSE 'Usurper ' END || n, 'PTL', '', '', '', ''
        FROM generate_series(1, 7) AS n, generate_series(-1, 1) AS again
        """
    )
    await database.pool.execute(
        """
        INSERT INTO indexer.transfer (chain_id, block_number, log_index, block_hash, block_time_ms, tx_hash, tx_index, emitter, canonical,
            item, source, loyalty, operator, sender, recipient, bucket, amount)
        SELECT 8453, 12, n, '\\x03', 1790000000400, '\\x04', 0, decode(repeat(lpad(n::text, 2, '0'), 20), 'hex'), true, (bucket > 0)::int, 'erc1155',
               decode(repeat(lpad(n::text, 2, '0'), 20), 'hex'), decode(repeat('aa', 20), 'hex'), decode(repeat('00', 20), 'hex'),
               decode(repeat('a1', 20), 'hex'), bucket, 2::numeric ^ 200 + n
        FROM generate_series(1, 7) AS n, unnest(ARRAY[0, 1900000000::numeric]) AS bucket WHERE bucket = 0 OR n < 3
        """
    )
    everything = await walk(api, "/v1/programs?", 3)
    assert [entry["name"] for entry in everything] == [f"Petals {n}" for n in range(1, 8)]
    assert everything == await walk(api, "/v1/programs?", 200) == await walk(api, "/v1/programs?chainId=8453", 1)
    first = everything[0]
    assert (first["chainId"], first["blockNumber"], first["issuer"], first["brand"]) == ("8453", "10", ROSE, "rose")
    assert (
        first["createdAt"].startswith("2026-09-")
        and first["createdAt"].endswith("Z")
        and first["loyalty"] == "0x" + "01" * 20
    )
    assert await walk(api, "/v1/programs?chainId=1", 5) == []

    def named(found: list[dict[str, Any]]) -> list[str]:
        return [entry["name"].removeprefix("Petals ") for entry in found]

    for query, expected in (
        ("brand=bloom", ["3", "6"]),
        (f"issuer={BLOOM.upper().replace('X', 'x')}", ["3", "6"]),
        (f"brand=rose&issuer={ROSE}&chainId=8453", ["1", "4", "7"]),
        (f"brand=rose&issuer={BLOOM}", []),
        (f"issuer={NOBODY}", ["2", "5"]),
    ):
        assert (
            named(await walk(api, f"/v1/programs?{query}", 2))
            == named(await walk(api, f"/v1/programs?{query}", 50))
            == expected
        )
    bloom = await token_for(database, "bloom", "chain:read")
    assert named(await walk(api, "/v1/programs?", 1, token=bloom)) == ["3", "6"]
    assert named(await walk(api, f"/v1/programs?issuer={ROSE}", 1, token=bloom)) == []

    held = await walk(api, f"/v1/balances?wallet={WALLET}", 2)
    assert held == await walk(api, f"/v1/balances?wallet={WALLET.lower()}", 200)
    assert [(entry["name"][7:], entry["expiresAt"], int(entry["balance"]) - 2**200) for entry in held] == [
        ("1", "0", 1), ("1", "1900000000", 1), ("2", "0", 2), ("2", "1900000000", 2), ("3", "0", 3), ("4", "0", 4),
        ("5", "0", 5), ("6", "0", 6), ("7", "0", 7),
    ]  # fmt: skip
    assert named(await walk(api, f"/v1/balances?wallet={WALLET}", 1, token=bloom)) == ["3", "6"]
    assert named(await walk(api, f"/v1/balances?wallet={WALLET}&brand=rose", 2)) == ["1", "1", "4", "7"]
    assert await walk(api, f"/v1/balances?wallet={HOLDER_OF_NOTHING}", 2) == []

    # a cursor belongs to its question
    cursor = (await api.call("GET", "/v1/programs?limit=1"))[1]["nextCursor"]
    for path in (
        f"/v1/programs?cursor={cursor}&brand=bloom",
        f"/v1/balances?wallet={WALLET}&cursor={cursor}",
        f"/v1/operations?cursor={cursor}",
        f"/v1/signals?brand=bloom&after={cursor}",
        "/v1/balances",
        "/v1/balances?wallet=alice",
        "/v1/programs?issuer=0x15",
        "/v1/programs?chainId=-1",
        "/v1/programs?limit=201",
    ):
        assert (await api.call("GET", path))[0] == 400, path
    assert (await api.call("GET", f"/v1/programs?cursor={cursor}", token=bloom))[0] == 400
    for path in ("/v1/programs?brand=rose", f"/v1/balances?wallet={WALLET}&brand=rose"):
        assert (await api.call("GET", path, token=bloom))[0] == 403


HOLDER_OF_NOTHING = "0x" + "77" * 20


async def test_workers_claim_renew_release_and_fulfil(api: Api, database: Database) -> None:
    async def ready(reference: str, brand: str = "bloom") -> str:
        body = registration(reference, brand=brand)
        body["legs"][0]["issuer"] = BLOOM if brand == "bloom" else ROSE
        operation = (await api.call("POST", "/v1/operations", body=body))[1]
        await database.pool.execute(
            "UPDATE indexer.operation SET state = 'ready', generation = 1, state_at = clock_timestamp() WHERE id = $1",
            operation["id"],
        )
        return str(operation["id"])

    async def claim(token: str | None = None, **body: Any) -> list[dict[str, Any]]:
        status, answer, _ = await api.call(
            "POST", "/v1/fulfilments/claim", body={"consumer": "desk", **body}, token=token
        )
        assert status == 200, answer
        return list(answer["data"])

    ids = [await ready(f"r{n}") for n in range(4)]
    rose = await ready("r9", "rose")
    bloom, other = await token_for(database, "bloom", "fulfil"), await token_for(database, "rose", "fulfil")
    (first,) = await claim(bloom)
    assert (first["operationId"], first["reference"], first["generation"], first["brand"]) == (ids[0], "r0", 1, "bloom")
    assert first["claimedUntil"].endswith("Z") and first["metadata"] == {"orderId": "8841", "exact": 1.1}
    assert first["legs"][0]["amount"] == "250"
    assert [entry["operationId"] for entry in await claim(max=2, brand="bloom")] == ids[1:3]
    assert [entry["operationId"] for entry in await claim(other, max=9)] == [rose]
    (last,) = await claim(max=9)
    assert last["operationId"] == ids[3] and await claim(max=9) == []
    assert (await api.call("POST", "/v1/fulfilments/claim", body={"consumer": "x", "brand": "rose"}, token=bloom))[
        0
    ] == 403

    path = f"/v1/fulfilments/{first['claim']}"
    status, renewed, _ = await api.call("POST", f"{path}/renew", body={"leaseSeconds": 600}, token=bloom)
    assert (status, renewed["outcome"]) == (200, "renewed") and renewed["claimedUntil"] > first["claimedUntil"]
    for act in ("renew", "release"):
        assert (await api.call("POST", f"{path}/{act}", token=other))[0] == 404, "another brand's claim does not exist"
        assert (await api.call("POST", f"/v1/fulfilments/{uuid4()}/{act}"))[0] == 404
        assert (await api.call("POST", f"/v1/fulfilments/none/{act}"))[0] == 404
    for _ in range(2):
        assert (await api.call("POST", f"{path}/release", token=bloom))[0] == 200
    status, problem, _ = await api.call("POST", f"{path}/renew", token=bloom)
    assert (status, problem["outcome"]) == (409, "released")

    (again,) = await claim(bloom)
    assert again["operationId"] == ids[0] and again["claim"] != first["claim"]
    fulfilled = {"generation": 1, "receipt": {"parcel": 1}, "claim": again["claim"]}
    for repeated in (False, True):
        status, answer, _ = await api.call("POST", f"/v1/operations/{ids[0]}/fulfil", body=fulfilled, token=bloom)
        assert (status, answer) == (200, {"outcome": "fulfilled", "generation": 1, "repeated": repeated})
    (receipt,) = (await api.call("GET", f"/v1/operations/{ids[0]}"))[1]["receipts"]
    assert (receipt["actor"], receipt["claim"]) == ("token test", again["claim"])

    for wrong in (
        {}, {"consumer": ""}, {"consumer": "x" * 201}, {"consumer": "a\nb"}, {"consumer": "x", "max": 0}, {"consumer": "x", "max": 101},
        {"consumer": "x", "max": "1"}, {"consumer": "x", "leaseSeconds": 0}, {"consumer": "x", "leaseSeconds": 3601},
        {"consumer": "x", "lease": 5}, {"consumer": "x", "brand": 1},
    ):  # fmt: skip
        assert (await api.call("POST", "/v1/fulfilments/claim", body=wrong))[0] == 422, wrong
