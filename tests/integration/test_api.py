"""The HTTP contract over real sockets and a real database: health, status, metrics and operations, with hostile callers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest

from indexer.api import app as api_app
from indexer.store import tokens
from indexer.store.database import Database
from tests.api_world import FACTORY, ISSUER, Api, populate, registration, running, token_for
from tests.conftest import Postgres


@pytest.fixture
async def api(database: Database) -> AsyncIterator[Api]:
    everything = await populate(database)
    async with running(database) as running_api:
        running_api.token = everything
        yield running_api


@pytest.fixture(scope="module")
async def one_database(postgres: Postgres) -> AsyncIterator[Database]:
    async with postgres.fresh_database() as name, await Database.connect(postgres.url(name)) as database:
        yield database


@pytest.fixture(scope="module")
async def refusing(one_database: Database) -> AsyncIterator[Api]:
    """One server for all that is refused and leaves nothing behind."""
    everything = await populate(one_database)
    async with running(one_database) as running_api:
        running_api.token = everything
        yield running_api


# ------------------------------------------------------------------------------------------------ health


async def test_healthz_and_readyz_need_no_token(api: Api) -> None:
    api.token = None
    assert (await api.call("GET", "/healthz"))[:2] == (200, {"status": "ok"})
    status, body, headers = await api.call("GET", "/readyz")
    assert (status, body["status"], [check["name"] for check in body["checks"]]) == (
        200,
        "ready",
        ["database", "schema", "process"],
    )
    assert headers["Cache-Control"] == "no-store" and headers["Server"] == "indexer"


async def test_unready_says_why_and_health_stays(api: Api) -> None:
    api.process.reasons.append("the configuration is not loaded")
    status, body, _ = await api.call("GET", "/readyz")
    assert (status, body["status"]) == (503, "unready")
    assert body["checks"][-1]["reason"] == "the configuration is not loaded"
    assert (await api.call("GET", "/healthz"))[0] == 200


async def test_an_older_schema_is_not_ready(api: Api, owner_dsn: str) -> None:
    import asyncpg

    owner = await asyncpg.connect(owner_dsn)
    try:
        await owner.execute("UPDATE indexer.alembic_version SET version_num = '9999'")
    finally:
        await owner.close()
    status, body, _ = await api.call("GET", "/readyz")
    assert status == 503
    assert "9999" in body["checks"][1]["reason"] and body["checks"][0]["ok"]


async def test_without_a_database_the_process_lives_and_says_so(database: Database, api: Api) -> None:
    secret = api.token
    assert secret
    await database.pool.close()
    assert (await api.call("GET", "/healthz"))[0] == 200
    status, body, _ = await api.call("GET", "/readyz")
    assert status == 503 and [check["ok"] for check in body["checks"]] == [False, False, True]
    assert "postgresql://" not in json.dumps(body)
    status, body, headers = await api.call("GET", "/v1/operations")
    assert status == 503 and headers["Retry-After"] == "1"


async def test_status_shows_heads_leases_and_the_process(api: Api) -> None:
    status, body, _ = await api.call("GET", "/v1/status")
    assert status == 200
    (chain,) = body["chains"]
    assert chain["chainId"] == "8453" and chain["head"]["number"] == "9007199254740993"
    assert chain["head"]["time"].endswith(".200000Z") or chain["head"]["time"].endswith(".2Z")
    assert chain["safe"] is None and chain["latch"] is None and chain["history"]["complete"] is False
    assert [(lease["task"], lease["held"], lease["epoch"]) for lease in body["leases"]] == [
        ("number", False, 1),
        ("settle", True, 3),
    ]
    assert body["process"] == {"wakeups": "polling", "version": "0.1.0", "tasks": ["settle"]}
    assert UUID(body["stream"]) and body["schema"] and body["unsent"] == []


async def test_metrics_are_prometheus_text_and_count_requests(api: Api) -> None:
    await api.call("GET", "/healthz")
    await api.call("GET", "/no/such/path/" + "x" * 50)
    api.token = None
    status, text, headers = await api.call("GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    assert 'loyalty_http_requests_total{method="GET",route="/healthz",status="200"} 1.0' in text
    assert 'loyalty_http_requests_total{method="GET",route="none",status="404"} 1.0' in text
    assert "no/such" not in text


# ------------------------------------------------------------------------------------------------ problems


async def test_everything_that_fails_is_a_problem(api: Api) -> None:
    assert (await api.call("GET", "/nowhere"))[0] == 404
    status, _, headers = await api.call("DELETE", "/v1/operations")
    assert status == 405 and headers["Allow"] == "GET, HEAD, POST"
    assert (await api.call("POST", "/v1/operations", raw=b"{" + b" " * 70_000 + b"}"))[0] == 413
    status, problem, _ = await api.call(
        "POST", "/v1/operations", raw=b"brand=bloom", headers={"Content-Type": "application/x-www-form-urlencoded"}
    )
    assert status == 415 and "application/json" in problem["detail"]
    assert (await api.call("GET", f"/v1/operations/{uuid4()}"))[0] == 404
    assert (await api.call("GET", "/v1/operations/not-an-id"))[0] == 404
    assert (await api.call("POST", f"/v1/operations/{uuid4()}/cancel"))[0] == 404


async def test_a_request_id_is_kept_or_made(api: Api) -> None:
    assert (await api.call("GET", "/healthz", headers={"X-Request-Id": "abc-1"}))[2]["X-Request-Id"] == "abc-1"
    made = (await api.call("GET", "/nowhere", headers={"X-Request-Id": "no spaces\tplease"}))[2]["X-Request-Id"]
    assert made != "no spaces\tplease" and len(made) == 32


async def test_a_defect_is_a_500_that_tells_nothing(api: Api, database: Database, owner_dsn: str) -> None:
    import asyncpg

    owner = await asyncpg.connect(owner_dsn)
    try:
        await owner.execute("ALTER TABLE indexer.history RENAME TO lost")
    finally:
        await owner.close()
    status, problem, _ = await api.call("POST", "/v1/operations", body=registration())
    assert status == 500
    assert "history" not in json.dumps(problem) and problem["requestId"] in problem["detail"]


HOSTILE = {
    "nothing": b"",
    "half": b'{"brand": "bloom"',
    "not utf-8": b'{"brand": "\xff"}',
    "utf-16": '{"brand": "bloom"}'.encode("utf-16"),
    "a list": b"[]",
    "a number": b"1",
    "nul": b'{"brand": "bloom", "reference": "a\\u0000b", "legs": []}',
    "nul in a key": b'{"brand": "bloom", "a\\u0000": 1}',
    "lone surrogate": b'{"brand": "bloom", "reference": "\\ud800", "legs": []}',
    "lone surrogate in metadata": b'{"brand": "bloom", "reference": "x", "metadata": {"\\udfff": 1}, "legs": []}',
    "deep": b'{"metadata": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "rather deep": b'{"metadata": ' + b'{"a":' * 40 + b"1" + b"}" * 41,
    "huge integer": b'{"brand": "bloom", "generation": 1' + b"0" * 5000 + b"}",
    "huge exponent": b'{"brand": "bloom", "metadata": {"a": 1e131071}}',
    "tiny exponent": b'{"brand": "bloom", "metadata": {"a": 1e-99999999999999999999}}',
    "nan": b'{"brand": "bloom", "metadata": {"a": NaN}}',
    "duplicate key": b'{"brand": "bloom", "brand": "rose"}',
    "bom": b"\xef\xbb\xbf{}",
    "control characters": b'{"brand": "bl\x01oom"}',
    "trailing": b'{"brand": "bloom"} {}',
}


@pytest.mark.parametrize("path", ["/v1/operations", "/v1/operations/{}/fulfil", "/v1/operations/{}/resolve"])
async def test_hostile_bodies_are_refused_cleanly(refusing: Api, path: str) -> None:
    for name, raw in HOSTILE.items():
        status, problem, _ = await refusing.call("POST", path.format(uuid4()), raw=raw)
        assert status == 400 and "body" in problem["detail"], (name, problem)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"brand": 1}, "brand"),
        ({"brand": "tulip"}, "brand"),
        ({"brand": None}, "brand"),
        ({"reference": ""}, "reference"),
        ({"reference": "x" * 201}, "reference"),
        ({"reference": "a\nb"}, "reference"),
        ({"reference": ["x"]}, "reference"),
        ({"metadata": [1]}, "metadata"),
        ({"metadata": {"a": "x" * 9000}}, "metadata"),
        ({"requestedAt": "yesterday"}, "requestedAt"),
        ({"requestedAt": "2026-02-31T00:00:00Z"}, "requestedAt"),
        ({"legs": []}, "legs"),
        ({"legs": "none"}, "legs"),
        ({"legs": [1]}, "legs[0]"),
        ({"legs": [{}] * 17}, "legs"),
        ({"dead line": 1}, "operation"),
    ],
)
async def test_registrations_that_cannot_be_are_422(refusing: Api, change: dict[str, Any], field: str) -> None:
    status, problem, _ = await refusing.call("POST", "/v1/operations", body=registration(**change))
    assert (status, problem.get("field")) == (422, field), problem


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"chainId": "1"}, 422),
        ({"chainId": 1e30}, 422),
        ({"chainId": "99999999999999999999999999"}, 422),
        ({"factory": "0x" + "00" * 20}, 422),
        ({"holder": "alice"}, 422),
        ({"amount": "-1"}, 422),
        ({"amount": "0"}, 422),
        ({"amount": 2.5}, 422),
        ({"amount": str(2**256)}, 422),
        ({"nonce": None}, 422),
        ({"kind": "keyban.mint"}, 422),
        ({"amuont": "1"}, 422),
        ({"issuer": "0x" + "16" * 20}, 403),
        ({"issuer": "0x" + "99" * 20}, 403),
    ],
)
async def test_legs_that_cannot_be_are_refused(refusing: Api, change: dict[str, Any], expected: int) -> None:
    body = registration()
    body["legs"][0] |= change
    status, problem, _ = await refusing.call("POST", "/v1/operations", body=body)
    assert status == expected, problem
    assert problem["field"].startswith("legs[0]")


# ------------------------------------------------------------------------------------------------ operations


async def test_registering_is_201_then_200_then_409(api: Api) -> None:
    body = registration()
    status, operation, headers = await api.call("POST", "/v1/operations", body=body)
    assert status == 201 and headers["Location"] == f"/v1/operations/{operation['id']}"
    assert (operation["brand"], operation["reference"], operation["status"]) == ("bloom", "redemption-8841", "pending")
    assert operation["requestedAt"] == "2026-11-21T10:00:00Z" and operation["generation"] == 0
    assert operation["cancelledAt"] is None and operation["receipts"] == [] and operation["evidence"] == []
    (leg,) = operation["legs"]
    assert (leg["issuer"], leg["factory"], leg["match"], leg["amount"]) == (ISSUER, FACTORY, "nonce", "250")
    assert [(entry["from"], entry["to"]) for entry in operation["history"]] == [(None, "pending")]

    again = {**body, "requestedAt": "2026-11-21T10:00:00Z", "legs": [{**body["legs"][0], "amount": 250}]}
    status, same, _ = await api.call("POST", "/v1/operations", body=again)
    assert (status, same["id"]) == (200, operation["id"])

    status, problem, _ = await api.call("POST", "/v1/operations", body={**body, "metadata": {}})
    assert (status, problem["id"], problem["differs"]) == (409, operation["id"], ["metadata"])
    status, problem, _ = await api.call("POST", "/v1/operations", body={**body, "reference": "another"})
    assert (status, problem["reference"]) == (409, "redemption-8841")

    assert (await api.call("GET", f"/v1/operations/{operation['id']}"))[1] == operation


async def test_the_same_registration_many_times_at_once_is_one_operation(api: Api, database: Database) -> None:
    body = registration()
    answers = await asyncio.gather(*(api.call("POST", "/v1/operations", body=body) for _ in range(12)))
    assert sorted(status for status, _, _ in answers) == [200] * 11 + [201]
    assert await database.pool.fetchval("SELECT count(*) FROM indexer.operation") == 1
    assert await database.pool.fetchval("SELECT count(*) FROM indexer.leg") == 1


async def test_numbers_in_metadata_come_back_to_the_last_digit(api: Api) -> None:
    text = json.dumps(registration()).replace('"8841", "exact": 1.1', '"8841", "exact": 1.10000000000000000001')
    status, operation, _ = await api.call("POST", "/v1/operations", raw=text.encode())
    assert status == 201
    url = f"{api.base}/v1/operations/{operation['id']}"
    async with api.session.get(url, headers={"Authorization": f"Bearer {api.token}"}) as answer:
        assert '"exact": 1.10000000000000000001' in await answer.text()


async def test_listing_pages_newest_first_and_filters(api: Api, database: Database) -> None:
    for n in range(7):
        brand = {"brand": "rose"} if n == 3 else {}
        body = registration(f"r{n}", **brand)
        body["legs"][0]["issuer"] = "0x" + "16" * 20 if n == 3 else ISSUER
        assert (await api.call("POST", "/v1/operations", body=body))[0] == 201
    await database.pool.execute("UPDATE indexer.operation SET state = 'ready' WHERE reference IN ('r1', 'r5')")

    async def walk(query: str) -> list[str]:
        found, cursor = [], ""
        while True:
            status, page, _ = await api.call("GET", f"/v1/operations?limit=2{query}{cursor}")
            assert status == 200 and len(page["data"]) <= 2
            found += [operation["reference"] for operation in page["data"]]
            assert all("history" not in operation for operation in page["data"])
            if page["nextCursor"] is None:
                return found
            cursor = f"&cursor={page['nextCursor']}"

    assert await walk("") == ["r6", "r5", "r4", "r3", "r2", "r1", "r0"]
    assert await walk("&brand=bloom") == ["r6", "r5", "r4", "r2", "r1", "r0"]
    assert await walk("&state=ready") == ["r5", "r1"]
    assert await walk("&state=ready,pending&brand=bloom") == ["r6", "r5", "r4", "r2", "r1", "r0"]
    assert await walk("&state=fulfilled") == []
    assert await walk("&reference=r3") == ["r3"]
    assert await walk("&reference=r3&brand=bloom") == []
    assert await walk("&reference=r5&state=pending") == []
    await database.pool.execute("UPDATE indexer.operation SET registered_at = '2026-01-01Z'")  # ties
    assert sorted(await walk("")) == ["r0", "r1", "r2", "r3", "r4", "r5", "r6"]
    assert sorted(await walk("&state=ready,pending")) == ["r0", "r1", "r2", "r3", "r4", "r5", "r6"]


@pytest.mark.parametrize(
    "query",
    [
        "limit=0", "limit=201", "limit=x", "limit=-1", "state=done", "state=", "cursor=abc", "cursor=", "cursor=%ff",
        "cursor=AAAA", "cursor=" + "f" * 32, "refrence=a", "brand=bloom&brand=rose", "reference=%00", "limit=%D9%A1",
    ],
)  # fmt: skip
async def test_a_query_that_is_not_understood_is_400(refusing: Api, query: str) -> None:
    assert (await refusing.call("GET", f"/v1/operations?{query}"))[0] == 400


async def test_cancel_is_recorded_once_and_answers_the_last_second(api: Api, database: Database) -> None:
    body = registration()
    body["legs"][0] |= {"deadline": "1900000000", "expiresAt": "1800000000"}
    operation = (await api.call("POST", "/v1/operations", body=body))[1]
    path = f"/v1/operations/{operation['id']}"
    for sent in (None, {}):
        status, answer, _ = await api.call("POST", f"{path}/cancel", body=sent)
        assert (status, answer) == (200, {"outcome": "accepted", "executableUntil": "1800000000"})
    assert (await api.call("GET", path))[1]["cancelledAt"].endswith("Z")
    assert (await api.call("POST", f"{path}/cancel", body={"why": 1}))[0] == 422
    await database.pool.execute("UPDATE indexer.operation SET state = 'ready', cancelled_at = NULL, generation = 1")
    status, problem, _ = await api.call("POST", f"{path}/cancel")
    assert (status, problem["type"]) == (409, "urn:loyalty:problem:conflict")


async def test_fulfil_is_idempotent_and_a_reverted_generation_is_recorded_and_409(api: Api, database: Database) -> None:
    operation = (await api.call("POST", "/v1/operations", body=registration()))[1]
    path = f"/v1/operations/{operation['id']}"
    assert (await api.call("POST", f"{path}/fulfil", body={"generation": 1}))[0] == 409  # never was ready
    await database.pool.execute("UPDATE indexer.operation SET state = 'ready', generation = 1")
    for repeated in (False, True):
        status, answer, _ = await api.call("POST", f"{path}/fulfil", body={"generation": 1, "receipt": {"no": 7}})
        assert (status, answer) == (200, {"outcome": "fulfilled", "generation": 1, "repeated": repeated})
    await database.pool.execute("UPDATE indexer.operation SET state = 'reverted', generation = 2")
    for repeated in (False, True):
        status, problem, _ = await api.call("POST", f"{path}/fulfil", body={"generation": 2})
        assert (status, problem["type"]) == (409, "urn:loyalty:problem:reverted")
        assert (problem["outcome"], problem["generation"], problem["repeated"]) == ("reverted", 2, repeated)
    receipts = (await api.call("GET", path))[1]["receipts"]
    assert [(r["generation"], r["outcome"], r["receipt"]) for r in receipts] == [
        (1, "fulfilled", {"no": 7}),
        (2, "reverted", {}),
    ]
    assert receipts[0]["recordedAt"].endswith("Z")


@pytest.mark.parametrize(
    "body",
    [
        {}, {"generation": "1"}, {"generation": True}, {"generation": 0}, {"generation": 2**31}, {"generation": 1.5},
        {"generation": 1, "receipt": "paid"}, {"generation": 1, "receipt": {"a": "x" * 9000}}, {"generation": 1, "claim": "c"},
        {"generation": 1, "recept": {}}, {"generation": 1, "receipt": None}, {"generation": 1, "claim": str(uuid4())},
    ],
)  # fmt: skip
async def test_a_fulfilment_that_cannot_be_is_422(refusing: Api, one_database: Database, body: dict[str, Any]) -> None:
    operation = (await refusing.call("POST", "/v1/operations", body=registration(uuid4().hex)))[1]
    await one_database.pool.execute("UPDATE indexer.operation SET state = 'ready', generation = 1")
    assert (await refusing.call("POST", f"/v1/operations/{operation['id']}/fulfil", body=body))[0] == 422
    assert await one_database.pool.fetchval("SELECT count(*) FROM indexer.receipt") == 0


async def test_resolve_records_the_decision_and_who_made_it(api: Api, database: Database) -> None:
    operation = (await api.call("POST", "/v1/operations", body=registration()))[1]
    path, evidence = f"/v1/operations/{operation['id']}", str(uuid4())
    decision = {"evidenceId": evidence, "accept": True, "reason": "the customer showed the receipt"}
    status, problem, _ = await api.call("POST", f"{path}/resolve", body=decision)
    assert (status, problem["field"]) == (422, "evidenceId")  # 404 is for what the path names
    await database.pool.execute(
        "UPDATE indexer.operation SET state = 'conflict', detail = $1",
        {"conflicts": [{"leg": 0, "evidenceId": evidence}], "waitingFor": [{"leg": 0}]},
    )
    assert (await api.call("GET", path))[1]["conflicts"] == [{"leg": 0, "evidenceId": evidence}]
    assert (await api.call("POST", f"{path}/resolve", body=decision))[:2] == (200, {"outcome": "recorded"})
    row = await database.pool.fetchrow("SELECT accept, reason, actor, evidence_id FROM indexer.decision")
    assert tuple(row) == (True, decision["reason"], "token operator", UUID(evidence))
    for wrong in ({"accept": "yes"}, {"reason": " "}, {"reason": 1}, {"evidenceId": "x"}, {"actor": "me"}):
        assert (await api.call("POST", f"{path}/resolve", body=decision | wrong))[0] == 422


# ------------------------------------------------------------------------------------------------ who may


async def test_without_a_valid_token_nothing_of_v1_is_told(api: Api) -> None:
    for headers in (
        {},
        {"Authorization": "Basic abc"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer lsi_" + "A" * 43},
        {"Authorization": f"Basic {api.token}"},
    ):
        async with api.session.get(api.base + "/v1/status", headers=headers) as answer:
            assert answer.status == 401 and answer.headers["WWW-Authenticate"].startswith("Bearer")
            assert (await answer.json(content_type="application/problem+json"))["status"] == 401


async def test_scopes_are_demanded_one_by_one(api: Api, database: Database) -> None:
    operation = (await api.call("POST", "/v1/operations", body=registration()))[1]["id"]
    calls = {
        "status": ("GET", "/v1/status"),
        "operations:read": ("GET", f"/v1/operations/{operation}"),
        "operations:write": ("POST", f"/v1/operations/{operation}/cancel"),
        "fulfil": ("POST", f"/v1/operations/{operation}/fulfil"),
        "resolve": ("POST", f"/v1/operations/{operation}/resolve"),
        "signals:read": ("GET", "/v1/signals?brand=bloom"),
        "chain:read": ("GET", "/v1/programs"),
    }
    assert set(calls) == set(tokens.SCOPES)
    for missing, (method, path) in calls.items():
        token = await token_for(database, None, *(scope for scope in tokens.SCOPES if scope != missing))
        status, problem, _ = await api.call(method, path, token=token)
        assert (status, problem["scope"]) == (403, missing)


async def test_a_brands_token_sees_and_moves_its_own_alone(api: Api, database: Database) -> None:
    operation = (await api.call("POST", "/v1/operations", body=registration()))[1]["id"]
    await database.pool.execute("UPDATE indexer.operation SET state = 'ready', generation = 1")
    rose = await token_for(database, "rose")
    path = f"/v1/operations/{operation}"
    decision = {"evidenceId": str(uuid4()), "accept": True, "reason": "mine now"}
    for method, where, body in (
        ("GET", path, None),
        ("POST", f"{path}/cancel", None),
        ("POST", f"{path}/fulfil", {"generation": 1}),
        ("POST", f"{path}/resolve", decision),
    ):
        assert (await api.call(method, where, body=body, token=rose))[0] == 404
    assert (await api.call("POST", "/v1/operations", body=registration("x"), token=rose))[0] == 403
    assert (await api.call("GET", "/v1/operations?brand=bloom", token=rose))[0] == 403
    assert (await api.call("GET", "/v1/operations", token=rose))[1] == {"data": [], "nextCursor": None}
    assert await database.pool.fetchval("SELECT count(*) FROM indexer.receipt") == 0
    assert await database.pool.fetchval("SELECT cancelled_at FROM indexer.operation") is None
    bloom = await token_for(database, "bloom")
    assert len((await api.call("GET", "/v1/operations", token=bloom))[1]["data"]) == 1
    # nor does the state of the installation name anybody else: pollers' leases and tasks carry brands in their names
    await database.pool.execute("INSERT INTO indexer.lease (task) VALUES ('poll:keyban:bloom+rose')")
    api.process.known["tasks"] = {"poll rose keyban": {"problem": "rose's key is refused"}}
    assert "rose" in json.dumps((await api.call("GET", "/v1/status"))[1])
    status, told, _ = await api.call("GET", "/v1/status", token=bloom)
    assert (status, told["process"]) == (200, {"wakeups": "polling", "version": "0.1.0"}) and "rose" not in json.dumps(
        told
    )


# ------------------------------------------------------------------------------------------------ load


async def test_more_requests_than_the_bound_are_told_to_come_again(
    api: Api, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_app, "IN_FLIGHT", 3)
    async with running(database) as small:
        small.token = api.token
        async with database.pool.acquire() as holder, holder.transaction():
            # whoever registers this reference waits for us
            await holder.execute("LOCK TABLE indexer.operation IN EXCLUSIVE MODE")
            waiting = [asyncio.create_task(small.call("POST", "/v1/operations", body=registration())) for _ in range(3)]
            async with asyncio.timeout(60):
                while await holder.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted") < 3:
                    await asyncio.sleep(0.01)
                status, _, headers = await small.call("GET", "/v1/status")
                assert (status, headers["Retry-After"]) == (503, "1")
                assert (await small.call("GET", "/healthz"))[0] == 200
        statuses = sorted([(await task)[0] for task in waiting])
        assert statuses[-1] in (201, 409)
        assert (await small.call("GET", "/v1/status"))[0] == 200


async def test_a_request_that_takes_too_long_ends_as_503(
    api: Api, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_app, "REQUEST_SECONDS", 0.2)
    async with database.pool.acquire() as holder, holder.transaction():
        await holder.execute("LOCK TABLE indexer.operation IN EXCLUSIVE MODE")
        status, problem, _ = await api.call("POST", "/v1/operations", body=registration())
    assert (status, problem["type"]) == (503, "urn:loyalty:problem:unavailable")
    monkeypatch.setattr(api_app, "REQUEST_SECONDS", 15.0)
    assert (await api.call("POST", "/v1/operations", body=registration()))[0] == 201
