"""The OpenAPI document and the server say the same: what is served is documented, every documented failure can be provoked,
and schemathesis, which believes the document, finds no answer that it does not allow."""

from __future__ import annotations

import asyncio
import gzip
import logging
import re
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from structlog.testing import capture_logs

from indexer.api import app as api_app
from indexer.api import bodies
from indexer.api.contract import Endpoint
from indexer.store import functions, signals, tokens
from indexer.store.database import Database
from indexer.telemetry import Metrics
from tests.api_world import Api, populate, registration, running, token_for, told

DOCS = Path(__file__).parents[2] / "docs" / "http.md"
ENDPOINTS = {endpoint.name: endpoint for endpoint in api_app.endpoints(Metrics())}


@pytest.fixture
async def api(database: Database) -> AsyncIterator[Api]:
    token = await populate(database)
    async with running(database) as served:
        served.token = token
        yield served


async def ready(api: Api, database: Database, reference: str, **columns: object) -> str:
    """An operation in a state that its facts would have to give it otherwise."""
    status, operation, _ = await api.call("POST", "/v1/operations", body=registration(reference))
    assert status == 201, operation
    state = {"state": "ready", "generation": 1} | columns
    await database.pool.execute(
        "UPDATE indexer.operation SET state = $2, generation = $3, state_at = clock_timestamp() WHERE id = $1",
        operation["id"],
        state["state"],
        state["generation"],
    )
    return str(operation["id"])


# ------------------------------------------------------------------------------------------------ the document


async def test_the_served_document_is_what_the_routes_were_made_from(api: Api) -> None:
    api.token = None
    status, document, headers = await api.call("GET", "/openapi.json")
    assert (status, document["openapi"]) == (200, "3.1.0") and headers["Content-Type"].startswith("application/json")
    served = {
        (route.method, route.resource.canonical)
        for route in api.app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    documented = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert documented == served == {(endpoint.method, endpoint.path) for endpoint in ENDPOINTS.values()}
    for endpoint in ENDPOINTS.values():
        operation = document["paths"][endpoint.path][endpoint.method.lower()]
        assert operation["operationId"] == endpoint.name
        assert ("security" in operation) == (endpoint.scope is not None) == endpoint.path.startswith("/v1/")
        assert endpoint.scope is None or endpoint.scope in tokens.SCOPES
        assert set(operation["responses"]) == {
            str(status) for status in (*endpoint.answers, *(kind.status for kind in endpoint.kinds))
        }
    references = set(re.findall(r'"#/components/schemas/(\w+)"', str(document).replace("'", '"')))
    assert references <= set(document["components"]["schemas"])


def test_the_pages_for_people_name_every_path_scope_parameter_and_problem() -> None:
    text = DOCS.read_text()
    for endpoint in ENDPOINTS.values():
        assert f"`{endpoint.method} {endpoint.path}`" in text, endpoint.path
        assert endpoint.scope is None or f"`{endpoint.scope}`" in text
        for kind in endpoint.kinds:
            assert f"`{kind.slug}`" in text, kind.slug
    for scope in tokens.SCOPES:
        assert f"`{scope}`" in text, scope


# ------------------------------------------------------------------------------------------------ failures


class Scene:
    """What the provocations act on."""

    def __init__(self, api: Api, owner: asyncpg.Connection) -> None:
        self.api, self.owner = api, owner
        self.ids: dict[str, str] = {}
        self.cursors: dict[str, str] = {}
        self.defective: Api
        self.without_database: Api

    def path(self, endpoint: Endpoint) -> str:
        return endpoint.path.replace("{id}", self.ids["ready"]).replace("{claim}", self.ids["claim"])

    async def ask(self, endpoint: Endpoint, path: str | None = None, **more: Any) -> tuple[int, str]:
        """Status and kind of the answer."""
        api = more.pop("api", self.api)
        if endpoint.body is not None and not {"body", "raw"} & set(more):
            more["body"] = {} if endpoint.body_optional else dict(endpoint.example or {})
        status, body, _ = await api.call(endpoint.method, path or self.path(endpoint), **more)
        return status, body["type"].rpartition(":")[2] if "type" in body else ""

    async def half_a_body(self, endpoint: Endpoint) -> tuple[int, str]:
        host, port = self.api.base.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            head = f"{endpoint.method} {self.path(endpoint)} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.api.token}\r\n"
            writer.write(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
            await writer.drain()
            answer = (await reader.readuntil(b"}")).decode()
        finally:
            writer.close()
        return int(answer.split()[1]), answer.partition("urn:loyalty:problem:")[2].partition('"')[0]


Provocation = Callable[[Scene, Endpoint], Awaitable[tuple[int, str]]]

# What goes wrong the same way everywhere.
EVERYWHERE: dict[str, Provocation] = {
    "bad-request": lambda scene, endpoint: scene.ask(endpoint, scene.path(endpoint) + "?nonsense=1"),
    "unauthorized": lambda scene, endpoint: scene.ask(endpoint, token="lsi_" + "A" * 43),
    "forbidden": lambda scene, endpoint: scene.ask(endpoint, token=scene.ids[f"without {endpoint.scope}"]),
    "not-found": lambda scene, endpoint: scene.ask(endpoint, re.sub(r"\{\w+\}", str(uuid4()), endpoint.path)),
    "timeout": lambda scene, endpoint: scene.half_a_body(endpoint),
    "too-large": lambda scene, endpoint: scene.ask(endpoint, raw=b" " * 70_000),
    "not-json": lambda scene, endpoint: scene.ask(endpoint, raw=b"{}", headers={"Content-Type": "text/plain"}),
    "unprocessable": lambda scene, endpoint: scene.ask(endpoint, body={"nonsense": 1}),
    "internal": lambda scene, endpoint: scene.ask(endpoint, api=scene.defective),
    "unavailable": lambda scene, endpoint: scene.ask(endpoint, api=scene.without_database),
}


def at(path: str, **more: Any) -> Provocation:
    """A request to a path with the scene's ids and cursors put in."""
    return lambda scene, endpoint: scene.ask(endpoint, path.format(**scene.ids, **scene.cursors), **more)


async def _conflicting(scene: Scene, endpoint: Endpoint) -> tuple[int, str]:
    assert endpoint.example is not None
    assert (await scene.ask(endpoint))[0] == 201
    return await scene.ask(endpoint, body={**endpoint.example, "metadata": {"other": "terms"}})


async def _lapsed(scene: Scene, endpoint: Endpoint) -> tuple[int, str]:
    await scene.owner.execute("UPDATE indexer.fulfilment_claim SET claimed_until = now() - interval '1 second'")
    return await scene.ask(endpoint, body={"generation": 1, "claim": scene.ids["claim"]})


# What goes wrong in its own way.
ONE_BY_ONE: dict[tuple[str, str], Provocation] = {
    ("registerOperation", "conflict"): _conflicting,
    ("cancelOperation", "conflict"): at("/v1/operations/{ready}/cancel"),
    ("fulfilOperation", "conflict"): at("/v1/operations/{ready}/fulfil", body={"generation": 7}),
    ("fulfilOperation", "reverted"): at("/v1/operations/{reverted}/fulfil", body={"generation": 1}),
    ("fulfilOperation", "claim-lapsed"): _lapsed,
    ("resolveOperation", "not-found"): at(
        f"/v1/operations/{uuid4()}/resolve", body={"evidenceId": str(uuid4()), "accept": True, "reason": "seen"}
    ),
    ("resolveOperation", "conflict"): at(
        "/v1/operations/{fulfilled}/resolve", body={"evidenceId": str(uuid4()), "accept": True, "reason": "seen"}
    ),
    ("renewClaim", "conflict"): at("/v1/fulfilments/{released}/renew"),
    ("listSignals", "not-found"): at("/v1/signals?brand=tulip"),
    ("listSignals", "other-history"): at("/v1/signals?brand=bloom&after={beyond}"),
    ("listSignals", "gone"): at("/v1/signals?brand=bloom&after={forgotten}"),
}


async def test_every_documented_failure_can_be_provoked(
    api: Api, database: Database, dsn: str, owner_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.1)
    owner = await asyncpg.connect(owner_dsn)
    scene = Scene(api, owner)
    for scope in tokens.SCOPES:
        others = [other for other in tokens.SCOPES if other != scope]
        scene.ids[f"without {scope}"] = await token_for(database, None, *others)
    scene.ids["ready"] = await ready(api, database, "ready")
    scene.ids["reverted"] = await ready(api, database, "reverted", state="reverted")
    scene.ids["fulfilled"] = await ready(api, database, "fulfilled", state="fulfilled")
    async with database.pool.acquire() as conn:
        (claim,) = await functions.claim_fulfilments(conn, "bloom", "test", 5, 600)
        scene.ids["claim"] = str(claim.claim)
        await ready(api, database, "released")
        (released,) = await functions.claim_fulfilments(conn, None, "test", 5, 600)
        await functions.release_claim(conn, None, released.claim)
        scene.ids["released"] = str(released.claim)
        async with conn.transaction():
            await signals.append(conn, [told("bloom", "operation.ready", nth) for nth in range(3)])
            await signals.number(conn)
        scene.cursors["forgotten"] = (await api.call("GET", "/v1/signals?brand=bloom&limit=1"))[1]["nextCursor"]
        scene.cursors["beyond"] = (await api.call("GET", "/v1/signals?brand=bloom"))[1]["nextCursor"]
        await conn.execute("UPDATE indexer.brand SET last_sequence = 2, forgotten_sequence = 2 WHERE name = 'bloom'")

    async with (
        AsyncExitStack() as stack,
        await Database.connect(dsn) as closed,
        running(closed) as scene.without_database,
    ):
        scene.without_database.token = api.token
        await closed.pool.close()
        async with running(database) as scene.defective:
            stack.enter_context(capture_logs())  # a traceback for people takes seconds to draw
            scene.defective.token = api.token
            todo = [(endpoint, kind) for endpoint in ENDPOINTS.values() for kind in endpoint.kinds]
            # the last one leaves nothing to ask
            for endpoint, kind in sorted(todo, key=lambda pair: pair[1].slug == "internal"):
                provoke = ONE_BY_ONE.get((endpoint.name, kind.slug)) or EVERYWHERE[kind.slug]
                if kind.slug == "internal":
                    await owner.execute("ALTER TABLE IF EXISTS indexer.api_token RENAME TO lost")
                assert await provoke(scene, endpoint) == (kind.status, kind.slug), (endpoint.name, kind.slug)
    await owner.close()


async def test_bytes_that_are_not_http_are_a_problem_too(api: Api) -> None:
    host, port = api.base.removeprefix("http://").split(":")
    for nonsense in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a client that speaks TLS\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nBad Header: 1\r\n\r\n",
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ):
        with socket.create_connection((host, int(port))) as plain:
            plain.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(plain, nonsense)
            answer = b""
            while piece := await loop.sock_recv(plain, 65536):
                answer += piece
        head, _, body = answer.partition(b"\r\n\r\n")
        assert re.match(rb"HTTP/1.\d 400 ", head) and b"application/problem+json" in head and b"aiohttp" not in head
        assert b'"type":"urn:loyalty:problem:bad-request"' in body and b"Traceback" not in body


@pytest.mark.parametrize(("expected", "status"), [("100-continue", "100"), ("nonsense", "417")])
async def test_what_a_client_expects_is_met_or_refused_as_a_problem(api: Api, expected: str, status: str) -> None:
    host, port = api.base.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(
            f"POST /v1/operations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.token}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: 2\r\nExpect: {expected}\r\n\r\n".encode()
        )
        async with asyncio.timeout(60):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.split()[1].decode() == status
            writer.write(b"{}")
            rest = head + await reader.read()
    finally:
        writer.close()
    assert b"application/problem+json" in rest and (b"expectation-failed" in rest) == (status == "417")


# no time in it: a test's name is the same in every process
GZIPPED = gzip.compress(b"{}", mtime=0)
BOMB = b"a bomb"  # made when it is thrown


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ("Content-Encoding: deflate", GZIPPED, 400),
        ("Content-Encoding: gzip", b"{}", 400),
        ("Content-Encoding: br", b"{}", 400),
        ("Content-Encoding: gzip", BOMB, 413),  # a bomb is measured by what it becomes
        ("Transfer-Encoding: chunked", b"zz\r\n{}\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: chunked", b"2\r\n{}GARBAGE\r\n0\r\n\r\n", 400),
        ("Content-Length: 2\r\nTransfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n\r\n", 400),
        ("Content-Length: 2\r\nContent-Length: 3", b"{} ", 400),
        ("Content-Length: -1", b"", 400),
    ],
)
async def test_bodies_that_are_not_what_their_headers_say_are_refused(
    api: Api, headers: str, body: bytes, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = api.base.removeprefix("http://").split(":")
    body = gzip.compress(bytes(200_000_000), 1) if body is BOMB else body
    length = "" if "Length" in headers or "Transfer" in headers else f"Content-Length: {len(body)}\r\n"
    head = (
        f"POST /v1/operations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.token}\r\n"
        f"Content-Type: application/json\r\n{headers}\r\n{length}\r\n"
    )
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(head.encode() + body)
        async with asyncio.timeout(60):
            answer = await reader.readuntil(b"}")
    finally:
        writer.close()
    assert answer.split()[1] == str(expected).encode(), answer
    assert b"application/problem+json" in answer and b"Traceback" not in answer
    assert (await api.call("GET", "/healthz"))[0] == 200
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []  # no defect of ours


# ------------------------------------------------------------------------------------------------ schemathesis

# A request that follows the document may still be refused: a cursor has to be one of ours, a brand and an issuer have to be
# configured, NUL cannot be stored. Everything else that follows it has to be accepted.
CONFIGURATION = """
continue-on-failure = true
headers = {{ Authorization = "Bearer {token}" }}
request-timeout = 20.0
warnings = false
[parameters]
"path.id" = "{ready}"
"path.claim" = "{claim}"
"query.wait" = 0
[generation]
database = "none"
deterministic = true
max-examples = 6
[phases.coverage]
unexpected-methods = ["DELETE"]
[phases.stateful]
generation.max-examples = 2
max-steps = 4
[[operations]]
include-operation-id = ["listOperations", "listPrograms", "listBalances", "listSignals"]
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 404, 409]
[[operations]]
include-operation-id = "registerOperation"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 403, 409, 422]
[[operations]]
include-operation-id = ["fulfilOperation", "resolveOperation"]
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 404, 409, 422]
"""


async def test_schemathesis_finds_nothing(api: Api, database: Database, tmp_path: Path) -> None:
    known = await ready(api, database, "ready")
    async with database.pool.acquire() as conn:
        (claim,) = await functions.claim_fulfilments(conn, "bloom", "test", 5, 600)
        async with conn.transaction():
            await signals.append(conn, [told("bloom", "operation.ready", nth) for nth in range(3)])
            await signals.number(conn)
    configuration = tmp_path / "schemathesis.toml"
    configuration.write_text(CONFIGURATION.format(token=api.token, claim=claim.claim, ready=known))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(configuration), "run", "--no-color"),
        *("--exclude-path", "/metrics", f"{api.base}/openapi.json"),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    said = output.decode()
    assert process.returncode == 0, said
    assert "No issues found" in said and not re.search(r"\b5\d\d\b Internal", said), said
