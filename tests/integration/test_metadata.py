"""A brand's own words come back as they were given, on every way out: numbers to the last digit, and nothing in between
reads them as floats.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest
from typer.testing import CliRunner

from indexer.cli import app
from indexer.model.confidence import Level, Policy
from indexer.settlement.rules import BrandRules
from indexer.store import deliveries, feed, queries, signals, webhooks
from tests.world import BRAND, World, hexa, problem

RULES = {BRAND: BrandRules((Policy(Level.INCLUDED),))}
# As a brand writes it, and as it comes back: an exponent is written out, all else is as it was.
GIVEN = (
    '{"big": 900719925474099312345678901234567890, "price": 1.10, "fine": 0.30000000000000004000001, "whole": 1.0,'
    ' "thousand": 1e3, "odd": 1.50E+2, "small": 1.5e-7, "text": "1.10", "deep": [{"below": -12345678901234567890.5}]}'
)
BACK = (
    '{"big": 900719925474099312345678901234567890, "price": 1.10, "fine": 0.30000000000000004000001, "whole": 1.0,'
    ' "thousand": 1000, "odd": 150, "small": 0.00000015, "text": "1.10", "deep": [{"below": -12345678901234567890.5}]}'
)


def words(text: str | bytes) -> object:
    """Parsed with every number as its sign, digits and scale."""
    return json.loads(text, parse_float=lambda number: Decimal(number).as_tuple(), parse_int=str)


@pytest.fixture
async def world(owner_dsn: str) -> AsyncIterator[World]:
    async with World.at(owner_dsn, RULES) as world:
        yield world


async def register(world: World, leg: dict[str, object], metadata: str, reference: str = "r") -> tuple[UUID, bool]:
    request = json.dumps({"brand": BRAND, "reference": reference, "legs": [leg], "metadata": None})
    answer = await world.conn.fetchval(
        "SELECT loyalty.register_operation($1::text::jsonb)", request.replace("null", metadata)
    )
    return UUID(answer["id"]), answer["created"]


async def test_metadata_and_receipts_come_back_to_the_last_digit_on_every_way_out(
    world: World, dsn: str, tmp_path: Path
) -> None:
    conn = world.conn
    config = tmp_path / "indexer.toml"
    config.write_text(f'state_dir = "{tmp_path}"\n[database]\nurl = "{dsn}"\n')

    async def command(*line: str) -> str:
        done = await asyncio.to_thread(CliRunner().invoke, app, [*line, "--json", "--config", str(config)])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stdout

    await webhooks.sync_webhooks(conn, [webhooks.WebhookRow(BRAND, "shop", ("operation.*",))])
    leg = world.leg(nonce=hexa(world.nonce()))
    operation, _ = await register(world, leg, GIVEN)
    await world.event(5, leg)
    await world.heads(head=5)
    assert await world.settle() == ["operation.ready"]
    await command("operations", "fulfil", "r", "--generation", "1", "--receipt", GIVEN)
    assert await world.settle() == ["operation.fulfilled"]
    await signals.number(conn)

    turn = await deliveries.begin(conn, [deliveries.Room(BRAND, "shop", 8, 10.0)])
    reading = await feed.read(conn, BRAND, None, limit=10, max_bytes=1_000_000)
    shown = await queries.operation(conn, operation)
    assert reading is not None and shown is not None
    row = await conn.fetchrow("SELECT metadata::text, request::text FROM indexer.operation")
    in_sql = await conn.fetchval("SELECT metadata::text FROM loyalty.operations")
    signalled = await conn.fetch("SELECT payload::text FROM loyalty.signals")
    assert row is not None and len(turn.attempts) == 1 and len(reading.entries) == len(signalled) == 2
    ways = {
        "stored": words(row["metadata"]),
        "HTTP": words(bytes(shown.metadata)),
        "SQL": words(in_sql),
        "command": (printed := words(await command("operations", "show", "r")))["metadata"],  # type: ignore[index]
        "webhook": words(turn.attempts[0].body)["data"]["operation"]["metadata"],  # type: ignore[index]
        **{f"pull {nth}": words(e.body)["data"]["operation"]["metadata"] for nth, e in enumerate(reading.entries)},  # type: ignore[index]
        **{f"view {nth}": words(s["payload"])["data"]["operation"]["metadata"] for nth, s in enumerate(signalled)},  # type: ignore[index]
    }
    assert {way: found for way, found in ways.items() if found != words(BACK)} == {}
    assert [words(bytes(receipt.receipt)) for receipt in shown.receipts] == [words(BACK)]  # type: ignore[union-attr]
    assert printed["receipts"][0]["receipt"] == words(BACK)  # type: ignore[index]


async def test_one_number_written_twice_is_one_registration_and_neighbours_beyond_a_float_are_two(world: World) -> None:
    leg = world.leg(nonce=hexa(world.nonce()))
    first = await register(world, leg, '{"n": 1.0, "big": 9007199254740993}')
    for same in ('{"big": 9007199254740993, "n": 1}', '{"n": 10e-1, "big": 9007199254740993.0}'):
        assert await register(world, leg, same) == (first[0], False), same
    # what was registered first stays
    assert await world.conn.fetchval("SELECT metadata ->> 'n' FROM loyalty.operations") == "1.0"
    for other in (
        '{"n": 1, "big": 9007199254740992}',
        '{"n": "1", "big": 9007199254740993}',
        '{"n": 1.0000000000000000001, "big": 9007199254740993}',
    ):
        with pytest.raises(asyncpg.PostgresError) as refused:
            await register(world, leg, other)
        code, detail = problem(refused.value)
        assert (code, detail["differs"]) == ("LY409", ["metadata"]), other
