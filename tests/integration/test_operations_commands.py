"""`indexer operations`: what a person may do by hand is what HTTP and SQL do, word for word, and is said in exit codes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from typer.testing import CliRunner, Result

from indexer.cli import app
from indexer.commands.wiring import USAGE, Failure
from indexer.store.database import Database
from tests.api_world import Api, populate, registration, running


@dataclass
class Desk:
    config: Path
    database: Database

    async def run(self, *words: str, given: str | None = None) -> Result:
        line = ["operations", *words, "--config", str(self.config)]
        return await asyncio.to_thread(CliRunner().invoke, app, line, given)

    async def answers(self, *words: str, code: int = 0, given: str | None = None) -> Any:
        done = await self.run(*words, "--json", given=given)
        assert done.exit_code == code, (done.output, done.exception)
        return json.loads(done.stdout)

    async def refused(self, *words: str, given: str | None = None) -> BaseException:
        done = await self.run(*words, given=given)
        assert done.exit_code != 0 and done.exception is not None, done.output
        return done.exception

    async def becomes(self, state: str, generation: int) -> None:
        await self.database.pool.execute("UPDATE indexer.operation SET state = $1, generation = $2", state, generation)


@pytest.fixture
async def desk(database: Database, dsn: str, tmp_path: Path) -> Desk:
    config = tmp_path / "indexer.toml"
    config.write_text(f'state_dir = "{tmp_path}"\n[database]\nurl = "{dsn}"\n')
    return Desk(config, database)


@pytest.fixture
async def api(database: Database) -> AsyncIterator[Api]:
    token = await populate(database)
    async with running(database) as served:
        served.token = token
        yield served


async def test_registered_listed_shown_and_cancelled_by_hand(desk: Desk, api: Api) -> None:
    body = registration()
    made = await desk.answers("register", "-", given=json.dumps(body))
    assert made["created"] is True
    # the same over HTTP is the same
    status, operation, _ = await api.call("POST", "/v1/operations", body=body)
    assert (status, operation["id"]) == (200, made["id"])
    assert (await desk.answers("register", "-", given=json.dumps(body)))["created"] is False
    assert (await desk.answers("show", "redemption-8841"))["id"] == made["id"]
    assert [row["id"] for row in (await desk.answers("list", "--status", "pending"))["data"]] == [made["id"]]
    assert (await desk.answers("list", "--status", "ready"))["data"] == []
    other = await desk.refused("register", "-", given=json.dumps(body | {"metadata": {}}))
    assert getattr(other, "sqlstate", "") == "LY409"
    nonsense = await desk.refused("register", "-", given="{")
    assert isinstance(nonsense, Failure) and nonsense.code == USAGE and "standard input is not JSON" in str(nonsense)
    assert (await desk.run("fulfil", made["id"], "--generation", str(2**31))).exit_code == USAGE
    for wrong in (("list", "--status", "done"), ("show", "nobody"), ("cancel", "nobody")):
        assert isinstance(await desk.refused(*wrong), Failure)
    assert (await desk.answers("cancel", "redemption-8841"))["outcome"] == "accepted"
    assert (await api.call("GET", f"/v1/operations/{made['id']}"))[1]["cancelledAt"] is not None


async def test_a_hand_over_is_one_record_whoever_tells_it_and_how_often(desk: Desk, api: Api) -> None:
    _, operation, _ = await api.call("POST", "/v1/operations", body=registration())
    id, path = operation["id"], f"/v1/operations/{operation['id']}/fulfil"
    never = await desk.refused("fulfil", id, "--generation", "1")
    assert getattr(never, "sqlstate", "") == "LY409"

    await desk.becomes("ready", 1)
    told = await desk.answers("fulfil", "redemption-8841", "--generation", "1", "--receipt", '{"parcel": "JD0146"}')
    assert told == {"outcome": "fulfilled", "generation": 1, "repeated": False}
    again = {**told, "repeated": True}
    assert await desk.answers("fulfil", id, "--generation", "1") == again
    assert (await api.call("POST", path, body={"generation": 1}))[:2] == (200, again)
    said = await desk.database.pool.fetchval("SELECT loyalty.fulfil($1, 1, '{}')", id)
    assert said == again

    # a generation that was taken back: kept, and said, in each one's words
    await desk.becomes("ready", 3)
    told = await desk.answers("fulfil", id, "--generation", "2", "--receipt", '{"no": 7}', code=1)
    assert told == {"outcome": "reverted", "generation": 2, "repeated": False}
    status, problem, _ = await api.call("POST", path, body={"generation": 2})
    assert (status, problem["type"], problem["repeated"]) == (409, "urn:loyalty:problem:reverted", True)
    receipts = (await desk.answers("show", id))["receipts"]
    assert [(one["generation"], one["outcome"], one["receipt"]) for one in receipts] == [
        (1, "fulfilled", {"parcel": "JD0146"}),
        (2, "reverted", {"no": 7}),
    ]

    nonsense = await desk.refused("fulfil", id, "--generation", "3", "--receipt", "{no}")
    assert isinstance(nonsense, Failure) and nonsense.code == USAGE
    for receipt in ("[]", '{"receipt": 1}, "x": {', '"paid"'):  # nothing slips out of its place
        assert not isinstance(
            await desk.refused("fulfil", id, "--generation", "3", "--receipt", receipt), AssertionError
        )
    assert len((await desk.answers("show", id))["receipts"]) == 2


async def test_a_decision_by_hand_names_its_reason_and_its_evidence(desk: Desk, api: Api) -> None:
    _, operation, _ = await api.call("POST", "/v1/operations", body=registration())
    evidence = str(uuid4())
    unknown = await desk.refused("resolve", operation["id"], "--accept", evidence, "--reason", "seen")
    assert getattr(unknown, "sqlstate", "") == "LY404"
    await desk.database.pool.execute(
        "UPDATE indexer.operation SET state = 'conflict', detail = $1",
        {"conflicts": [{"leg": 0, "evidenceId": evidence}]},
    )
    both = await desk.refused("resolve", operation["id"], "--accept", evidence, "--dismiss", evidence, "--reason", "x")
    assert isinstance(both, Failure) and both.code == USAGE
    said = await desk.answers(
        "resolve", operation["id"], "--dismiss", evidence, "--reason", "another customer's", "--actor", "anna"
    )
    assert said == {"outcome": "recorded"}
    row = await desk.database.pool.fetchrow("SELECT accept, reason, actor FROM indexer.decision")
    assert tuple(row) == (False, "another customer's", "anna")
