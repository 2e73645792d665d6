"""Audits, replays and redecoding beside a daemon that runs, and by the command alone: what is wrong is named or put right, what
is right is left alone, and no signal leaves twice.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from eth_hash.auto import keccak

from indexer.chain.decode import Decoder
from indexer.store import rereads
from indexer.store.database import Database
from indexer.store.rereads import Kind, Reread
from tests.fake_node import FakeNode, LogSpec
from tests.following import FACTORY, address_word, created, eventually, issued, stored, token_of, transferred, truth
from tests.simulation.world import World

CHAIN = 84532


async def asked(
    database: Database, kind: Kind, low: int = 0, high: int | None = None, abi: bytes | None = None
) -> Reread:
    """A request that is over."""
    async with database.pool.acquire() as conn:
        request = await rereads.ask(conn, CHAIN, kind, low, high, abi)
    found: Reread | None = None

    async def over() -> bool:
        nonlocal found
        async with database.pool.acquire() as conn:
            found = await rereads.find(conn, request)
        return found is not None and found.state not in rereads.OPEN

    await eventually(over, what=kind)
    assert found is not None
    return found


async def told(database: Database) -> list[tuple[Any, ...]]:
    rows = await database.pool.fetch("SELECT id, sequence, type, payload FROM indexer.outbox ORDER BY position")
    return [tuple(row) for row in rows]


async def signalled(world: World, reference: str) -> list[str]:
    return [each for each in await world.trace(reference) if each != "finalized"]


async def tamper(database: Database) -> None:
    """One row too few, one too many, one that is not what the chain says; and a transfer's transaction."""
    execute = database.pool.execute
    await execute("UPDATE indexer.movement SET canonical = false WHERE block_number = 3")
    await execute("UPDATE indexer.movement SET amount = amount + 1 WHERE block_number = 4")
    await execute(
        """
        INSERT INTO indexer.movement SELECT (jsonb_populate_record(m, jsonb_build_object('log_index', 77))).*
        FROM indexer.movement AS m WHERE m.block_number = 5
        """
    )
    await execute("UPDATE indexer.transfer SET tx_hash = $1 WHERE block_number = 6", b"\x09" * 32)


async def grown(node: FakeNode, world: World) -> None:
    """Ten blocks of events, a reorganisation, and all of it finalized."""
    node.mine([created(1)])
    for n in range(1, 9):
        node.mine([issued(n), transferred()])
    await world.caught_up()
    node.reorganise(3, [[issued(7)], [issued(6), transferred()], [], [issued(20)]])
    node.mine(blocks=20)
    await world.caught_up()
    await world.tags(safe=28, finalized=25)


@pytest.mark.parametrize("socket", [True, False], ids=["socket", "polling"])
async def test_a_replay_of_everything_sends_nothing_twice(
    database: Database, monkeypatch: pytest.MonkeyPatch, socket: bool
) -> None:
    """After ready, fulfilled, reverted, restored and unmatched; the daemon is stopped in the middle and goes on."""
    monkeypatch.setattr("indexer.chain.rereading.FIRST_WINDOW", 4)
    monkeypatch.setattr("indexer.chain.rereading.LARGEST_WINDOW", 4)
    async with FakeNode() as node:
        world = World(database, node, socket=socket, confidence="included")
        async with world.running(unmatched_quiet_ms=0):
            references = [await world.register(n) for n in (2, 6, 7, 8)]
            node.mine([created(1)])
            for n in range(1, 9):
                node.mine([issued(n), transferred()])
            for reference in references:
                await world.reaches(reference, "ready")
            async with database.pool.acquire() as conn:
                await conn.execute("SELECT loyalty.fulfil(id, 1, '{}') FROM indexer.operation WHERE reference = 'op-7'")
            node.reorganise(3, [[issued(7)], [issued(6), transferred()], [], [issued(20)]])
            node.mine(blocks=20)
            await world.reaches("op-8", "reverted")
            await world.reaches("op-7", "fulfilled")
            await world.caught_up()
            await world.tags(safe=28, finalized=25)
            await eventually(lambda: _unmatched(world, 5))
            await world.looked()
            await world.intact()
        before, facts = await told(database), await stored(database)
        node.delay("eth_getLogs", 0.1, times=None)
        async with world.running(unmatched_quiet_ms=0):
            await world.caught_up()
            going = asyncio.create_task(asked(database, "replay"))
            await eventually(lambda: _begun(database))
        node.heal()
        async with world.running(unmatched_quiet_ms=0):
            done = await going
            assert done.state == "done" and (done.low, done.high) == (0, 25)
            assert done.report["blocks"] == 26 and not done.report["differences"] and not done.report["unsettled"]
            await world.looked()
            await world.intact()
            assert await told(database) == before and await stored(database) == facts


async def _unmatched(world: World, number: int) -> bool:
    return len(await world.unmatched()) == number


async def _begun(database: Database) -> bool:
    return bool(await database.pool.fetchval("SELECT next_block > 0 FROM indexer.reread"))


async def test_an_audit_names_what_differs_and_a_repair_puts_it_right(database: Database) -> None:
    async with FakeNode() as node:
        world = World(database, node, confidence="included", second_look_seconds=3600.0)
        async with world.running():
            references = [await world.register(n) for n in (2, 3)]  # in blocks 3 and 4
            await grown(node, world)
            for reference in references:
                await world.reaches(reference, "ready")
            assert (await asked(database, "audit")).report["differences"] == []
            await tamper(database)
            wrong = await stored(database)
            audit = await asked(database, "audit", 2, 9)
            found = [(d["what"], d["blockNumber"], d.get("columns")) for d in audit.report["differences"]]
            assert found == [
                ("missing", "3", None), ("different", "4", ["amount"]), ("extra", "5", None), ("different", "6", ["tx_hash"]),
            ]  # fmt: skip
            assert (audit.report["repaired"], audit.report["blocks"]) == (0, 8)
            assert await stored(database) == wrong  # it only looked,
            assert "unverified" in await world.verdicts(3, 6)  # and nothing rests on these blocks until they are right
            await world.looked()
            assert await signalled(world, "op-2") == ["ready", "reverted"]
            assert await signalled(world, "op-3") == ["ready", "reverted", "conflict"]
            repair = await asked(database, "repair")
            assert repair.report["repaired"] == 4
            for reference in references:
                await world.reaches(reference, "ready")
            await world.intact()
            assert await signalled(world, "op-2") == ["ready", "reverted", "ready"]
            assert (await asked(database, "audit")).report["differences"] == []
            assert world.total("reread_differences_total", outcome="repaired") == 4


async def test_an_endpoint_that_lies_in_a_replay_takes_nothing_away(database: Database) -> None:
    def altered(_: object, logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [log | {"data": log["data"][:-1] + "1"} if log["blockNumber"] == "0x4" else log for log in logs]

    async with FakeNode() as node:
        world = World(database, node, second_look_seconds=3600.0)
        async with world.running():
            await grown(node, world)
            for lie in (lambda _, logs: logs[2:], altered):
                node.lie("eth_getLogs", lie, times=None)
                done = await asked(database, "replay", 0, 20)
                assert done.report["unsettled"] == [["0", "20"]] and not done.report["differences"]
                node.heal()
                await world.intact()
            done = await asked(database, "replay", 0, 20)
            assert not done.report["unsettled"] and not done.report["differences"]


async def test_what_is_not_finalized_is_not_read_again(database: Database) -> None:
    async with FakeNode() as node:
        world = World(database, node)
        async with world.running():
            await grown(node, world)
            failed = await asked(database, "replay", 26)
            assert failed.state == "failed" and "block 26 is not finalized yet (25 is)" in str(failed.trouble)
            cut = await asked(database, "replay", 20, 900)
            assert (cut.high, cut.report["blocks"]) == (25, 6)


def single_transfer(n: int) -> LogSpec:
    """ERC-1155's own event, which is not documented for Loyfin: read where inferred events are."""
    topics = [keccak(b"TransferSingle(address,address,address,uint256,uint256)"), *[address_word(b"\x40" * 20)] * 3]
    return (token_of(1), topics, (0).to_bytes(32, "big") + n.to_bytes(32, "big"))


async def test_redecoding_moves_what_can_be_read_now(database: Database) -> None:
    count = "SELECT (SELECT count(*) FROM indexer.raw_log WHERE canonical), (SELECT count(*) FROM indexer.transfer WHERE canonical)"
    unknown: LogSpec = (FACTORY, [keccak(b"Unheard()")], b"")
    today = Decoder.from_abi().fingerprint
    async with FakeNode() as node:
        world = World(database, node, second_look_seconds=0.2)
        async with world.running(inferred_events=False):
            node.mine([created(1), unknown])
            for n in range(1, 6):
                node.mine([single_transfer(n), transferred()])
            node.mine(blocks=5)
            await world.caught_up()
            await world.tags(safe=9, finalized=4)
            await world.intact()
            assert tuple(await database.pool.fetchrow(count)) == (6, 5)
            refused = await asked(database, "redecode", abi=today)
            assert refused.state == "failed" and "restart it" in str(refused.trouble)
        async with world.running():
            await world.caught_up()
            done = await asked(database, "redecode", abi=today)
            assert done.report == {"logs": 4, "moved": 3, "left": 1}  # block 5 is not finalized
            assert tuple(await database.pool.fetchrow(count)) == (3, 8)
            await world.tags(safe=9, finalized=8)
            assert (await asked(database, "redecode")).report == {"logs": 3, "moved": 2, "left": 1}
            assert (await asked(database, "redecode")).report == {"logs": 1, "left": 1}
            assert tuple(await database.pool.fetchrow(count)) == (1, 10)
            await world.intact()
            assert (await asked(database, "audit")).report["differences"] == []


# --------------------------------------------------------------------------- the command


async def command(config: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from indexer.cli import main; main()", *arguments, "--config", str(config), "--json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, json.loads(out or b"{}"), err.decode()


async def test_the_command_works_itself_where_no_daemon_runs(database: Database, dsn: str, tmp_path: Path) -> None:
    async with FakeNode() as node:
        world = World(database, node, second_look_seconds=3600.0)
        config = tmp_path / "indexer.toml"
        config.write_text(
            f"""
            [database]
            url = "{dsn}"
            [[chains]]
            name = "fake"
            chain_id = {CHAIN}
            rpc = [{{ url = "{node.url}" }}]
            factories = [{{ address = "0x{FACTORY.hex()}", start_block = 0 }}]
            """
        )
        async with world.running():
            await grown(node, world)
            await world.intact()
            await tamper(database)
        code, report, _ = await command(config, "audit", "fake", "--from", "0", "--to", "25", "--repair")
        assert (code, report["ok"], report["repaired"], report["toBlock"]) == (1, False, 4, "25")
        assert (report["missing"], report["extra"], report["different"]) == (1, 1, 2)
        assert await stored(database) == truth(node.chain)
        code, nothing, said = await command(config, "audit", "fake", "--from", "26")
        assert (code, nothing) == (75, {}) and "block 26 of fake is not finalized yet, 25 is" in said
        code, report, _ = await command(config, "redecode", "fake", "--no-wait")
        assert (code, report["state"]) == (0, "waiting")
        assert await database.pool.fetchval("SELECT count(*) FROM indexer.reread WHERE state = 'waiting'") == 1
        assert not await database.pool.fetchval("SELECT count(*) FROM indexer.lease WHERE holder IS NOT NULL")
