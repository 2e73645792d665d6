"""After a backup was put back: a new history, nothing promised unseen, and nothing handed out twice for what was forgotten."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from typer.testing import CliRunner

from indexer.cli import app
from indexer.commands import restored
from indexer.commands.wiring import Failure
from indexer.config import Config
from indexer.model.confidence import Level, Policy
from indexer.settlement.rules import BrandRules
from indexer.store import instance
from indexer.store.database import Database
from indexer.store.leases import LeaseLost, Leases
from indexer.store.signals import number
from tests.conftest import Postgres
from tests.integration.test_partner_legs import PartnerWorld, mint, rules
from tests.world import BASE_MS, BRAND, CHAIN, World, digest, hexa

RULES = {BRAND: BrandRules((Policy(Level.INCLUDED),))}


async def claims(world: World) -> set[UUID]:
    rows = await world.conn.fetch("SELECT operation_id FROM loyalty.claim_fulfilments('worker', 100, '1 minute')")
    return {row["operation_id"] for row in rows}


async def pending(world: World) -> set[UUID]:
    return {
        row["operation_id"] for row in await world.conn.fetch("SELECT operation_id FROM loyalty.pending_fulfilments")
    }


async def numbered(world: World) -> dict[UUID, tuple[int, str]]:
    """By id, the number and the stream of everything said."""
    async with world.conn.transaction():
        await number(world.conn)
    rows = await world.conn.fetch("SELECT id, sequence, payload -> 'data' ->> 'stream' AS stream FROM indexer.outbox")
    return {row["id"]: (row["sequence"], row["stream"]) for row in rows}


async def backup(postgres: Postgres, name: str, copy: str) -> None:
    """As a restore would leave it: a database of its own, as it was at this moment."""
    await postgres.execute(f"CREATE DATABASE {copy} TEMPLATE {name} STRATEGY FILE_COPY")


async def test_what_was_handed_out_since_the_backup_is_not_handed_out_again(
    postgres: Postgres, database_name: str, tmp_path: Path
) -> None:
    copy = f"{database_name}_restored"
    async with World.at(postgres.owner_url(database_name), RULES) as world:
        legs = {
            name: world.leg(nonce=hexa(world.nonce()))
            for name in ("ready", "claimed", "waiting", "reverted", "lost", "new")
        }
        operations = {
            n: await world.register(legs[n], reference=n) for n in ("ready", "claimed", "waiting", "reverted")
        }
        for index, name in enumerate(("ready", "claimed", "reverted")):
            await world.event(100, legs[name], index=index)
        await world.settle()
        await world.fulfil(operations["reverted"], 1)
        await world.settle()
        claim = await world.conn.fetchrow("SELECT * FROM loyalty.claim_fulfilments('worker', 1, '1 hour')")
        if claim["operation_id"] == operations["ready"]:  # ready in the same instant: the id decides
            operations["ready"], operations["claimed"] = operations["claimed"], operations["ready"]
        before = await numbered(world)
    await backup(postgres, database_name, copy)

    # ---- life goes on, and is forgotten: receipts, a registration, a reorganisation
    async with World.at(postgres.owner_url(database_name), RULES, found=False) as world:
        operations["lost"] = await world.register(legs["lost"], reference="lost")
        await world.event(110, legs["waiting"], index=0)
        await world.event(110, legs["lost"], index=1)
        await world.settle()
        for name in ("ready", "claimed", "waiting", "lost"):
            assert await world.fulfil(operations[name], 1) == "fulfilled"
        await world.settle()
        forgotten = await numbered(world)
        (old_stream,) = {stream for _, stream in forgotten.values()}

    # ---- the backup
    url = postgres.url(copy)
    config = tmp_path / "indexer.toml"
    config.write_text(f'state_dir = "{tmp_path}"\n[database]\nurl = "{url}"\n')

    async def indexer(*arguments: str, code: int = 0) -> Any:
        """The command's JSON, or with another exit code its complaint. In a thread: it runs a loop of its own."""
        line = [*arguments, "--json", "--config", str(config)]
        done = await asyncio.to_thread(CliRunner().invoke, app, line)
        if code:
            assert isinstance(done.exception, Failure) and done.exception.code == code, done.output
            return str(done.exception)
        assert done.exit_code == 0, (done.output, done.exception)
        return json.loads(done.stdout)

    try:
        async with await Database.connect(url) as database:
            async with Leases(database, ttl=30).hold("settle"):
                complaint = await indexer("restored", code=1)
                assert "settle" in complaint and "Stop every daemon" in complaint
            ghost = await Leases(database, ttl=3600).acquire("number")  # of the machine that the backup was taken on
            assert ghost is not None
            await database.pool.execute("UPDATE indexer.lease SET until = clock_timestamp() WHERE task = 'number'")

            done = await indexer("restored")
            assert done["oldStream"] == old_stream != done["stream"] and done["claims"] == 1 and done["leases"] == 1
            assert {one["reference"] for one in done["held"]} == {"ready", "claimed"}
            assert done["brands"] == [{"brand": BRAND, "before": done["restoredAt"], "operations": 2}]
            with pytest.raises(LeaseLost):
                async with ghost.transaction():
                    pass
            ghost.connection.terminate()

        async with World.at(postgres.owner_url(copy), RULES, found=False) as world:
            chain = await world.conn.fetchrow("SELECT c.*, indexer.is_live(c) AS live FROM indexer.chain c")
            assert not chain["live"]

            # the worker of before, still at it: its claim is gone, nothing is given, and the view shows nothing
            renewal = "SELECT loyalty.renew_claim($1, '1 minute')"
            with pytest.raises(Exception, match="lapsed"):
                await world.conn.fetchval(renewal, claim["claim"])
            assert await claims(world) == set() == await pending(world)

            # nothing is promised before somebody has looked whether the blocks still stand
            await world.event(110, legs["waiting"], index=0)
            assert await world.settle() == []
            await world.conn.execute("UPDATE indexer.chain SET head_at = clock_timestamp() + interval '1 hour'")
            await world.heads(head=120)
            assert await world.settle() == ["operation.ready"]
            assert await claims(world) == set()  # its evidence is of before: it may have been handed out, and was

            # lost and registered anew: as old as its evidence
            again = await world.register(legs["lost"], reference="lost")
            assert again == operations["lost"]
            await world.event(110, legs["lost"], index=1)
            await world.settle()
            assert await world.state(again) == "ready" and await claims(world) == set()

            # what settles by later evidence is business as ever
            now = await world.conn.fetchval("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")
            fresh = await world.register(legs["new"], reference="new")
            await world.event((now - BASE_MS) // 200 + 50, legs["new"])
            await world.settle()
            assert await claims(world) == {fresh} and await pending(world) == {fresh}

            # ids are what they were; numbers begin again where the backup stood, under another stream
            said = await numbered(world)
            ready = {id for id in said if id in forgotten and id not in before}
            assert len(ready) == 2 and {said[id][1] for id in ready} == {done["stream"]}
            assert min(said[id][0] for id in ready) == max(sequence for sequence, _ in before.values()) + 1
            assert all(said[id] == before[id] for id in before)

            # the brand says again what it handed out; too much does no harm, and the old claim is no use
            assert await world.fulfil(operations["ready"], 1) == "fulfilled"
            assert await world.fulfil(operations["ready"], 1) == "fulfilled"
            assert await world.fulfil(operations["waiting"], 1) == "fulfilled"
            late = await world.conn.fetchval(
                "SELECT loyalty.fulfil($1, 1, '{}', $2)", operations["claimed"], claim["claim"]
            )
            assert late["outcome"] == "claim_lapsed"
            await world.settle()
            shown = await indexer("restored", "--held")
            assert [one["reference"] for one in shown["data"]] == ["lost"] and shown["brands"][0]["operations"] == 1

            assert "not held" in await indexer("restored", "--release", "--brand", "petal", code=1)
            assert (await indexer("restored", "--release", "--brand", BRAND))["released"][0]["operations"] == 1
            assert await indexer("restored", "--held") == {"brands": [], "data": []}
            assert await claims(world) == {operations["lost"]}  # a person has looked: this one was not handed out
            assert "--held or --release" in await indexer("restored", "--held", "--release", code=2)
    finally:
        await postgres.execute(f"DROP DATABASE {copy} WITH (FORCE)")


async def test_a_partners_record_is_held_by_its_own_time_whenever_it_was_read(owner_dsn: str) -> None:
    async with PartnerWorld.at(owner_dsn, rules(Policy(Level.INCLUDED))) as world:
        assert isinstance(world, PartnerWorld)
        names = ("backed up", "waiting", "between", "timeless", "too near", "mined before", "mined after", "after")
        wallets = {name: f"0x{index:02x}" if "mined" in name else f"G{index}" for index, name in enumerate(names)}
        operations = {name: await world.register(mint(wallet), reference=name) for name, wallet in wallets.items()}
        await world.record("backed up", wallet=wallets["backed up"])
        await world.record("waiting", wallet=wallets["waiting"], status="pending", at=600.0)
        await world.settle()
        done = await instance.restored(world.conn)
        assert {one.reference for one in done.held} == {"backed up"}
        await world.conn.execute("UPDATE indexer.chain SET head_at = clock_timestamp() + interval '1 hour'")

        # all of them are read, and settle, after the restoration
        await world.record("waiting", wallet=wallets["waiting"], at=600.0)  # it may have settled, and been lost, before
        await world.record("between", wallet=wallets["between"], at=-30.0)
        await world.record("timeless", wallet=wallets["timeless"], at=None)
        await world.record("too near", wallet=wallets["too near"], at=60.0)  # a partner's clock may be ahead
        now = await world.conn.fetchval("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")
        for name, block in (("mined before", 100), ("mined after", (now - BASE_MS) // 200 + 50)):
            await world.heads(head=block)
            await world.answer(block, tx=digest(name), to=wallets[name])
            await world.record(name, wallet=wallets[name], chain_id=CHAIN, tx=hexa(digest(name)), at=-30.0)
        await world.record("after", wallet=wallets["after"], at=400.0)
        await world.settle()
        assert {await world.state(operation) for operation in operations.values()} == {"ready"}
        free = {operations[name] for name in ("mined after", "after")}
        assert await pending(world) == free == await claims(world)
        assert {one.reference for one in await instance.held(world.conn)} == set(names) - {"mined after", "after"}

        assert len(await instance.release(world.conn)) == 1
        assert await claims(world) == set(operations.values()) - free


async def test_the_embedded_database_is_started_for_it(tmp_path: Path) -> None:
    state = Path(tempfile.mkdtemp(prefix="indexer-test-"))
    state.chmod(0o711)
    try:
        done = await restored._in_embedded(Config(state_dir=state))
        assert done.stream != done.old_stream and done.held == []
    finally:
        shutil.rmtree(state, ignore_errors=True)
