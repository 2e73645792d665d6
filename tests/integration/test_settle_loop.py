"""The settling loop: one operation that cannot be worked out stops nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import asyncpg
import pytest

from indexer.settlement import desk, loop
from indexer.store.database import Database
from indexer.store.leases import Leases
from indexer.store.wakeups import Wakeups
from tests.fake_node import FakeNode
from tests.following import created, issued
from tests.integration.test_partner_legs import PartnerWorld, mint, rules
from tests.integration.test_settlement import INCLUDED
from tests.loops import at_work
from tests.simulation import world as daemons
from tests.world import World, hexa


class Nobody:
    def transition(self, operation: Any, to: Any, movements: Sequence[Any], now_ms: int) -> None: ...

    def signalled(self, signal: Any) -> None: ...

    def repeated(self, movement: Any) -> None: ...


async def test_an_operation_that_cannot_be_worked_out_is_put_off_and_the_others_go_on(
    database: Database, owner_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        legs = [world.leg(nonce=hexa(world.nonce())) for _ in range(5)]
        operations = [await world.register(leg) for leg in legs]
        for block, leg in enumerate(legs):
            await world.event(100 + block, leg)
        settle = desk.Desk.settle

        async def stumbling(self: Any, operation: Any) -> None:
            if operation.id == operations[2]:
                raise KeyError("a defect of ours")
            await settle(self, operation)

        monkeypatch.setattr(desk.Desk, "settle", stumbling)
        settling = at_work(
            Leases(database, ttl=10), loop.TASK, lambda lease: loop.settle(lease, Wakeups(), INCLUDED, {}, Nobody())
        )
        async with settling, asyncio.timeout(60):
            while [await world.state(o) for o in operations].count("ready") < 4:
                await asyncio.sleep(0.05)
            while not await world.conn.fetchval("SELECT count(*) FROM indexer.alarm WHERE axis = 'clock_ms'"):
                await asyncio.sleep(0.05)
        assert await world.state(operations[2]) == "pending"
        assert (
            await world.conn.fetchval("SELECT operation_id FROM indexer.alarm WHERE axis = 'clock_ms'") == operations[2]
        )


async def test_an_ambiguous_claim_is_counted_when_it_makes_ready(database: Database) -> None:
    """Two operations wait under one hash: the older is settled, and the metric says that another fitted too."""
    async with FakeNode() as node:
        world = daemons.World(database, node, confidence="included")
        node.mine([created(1)], 3)
        leg = {key: value for key, value in daemons.leg_of(1).items() if key != "nonce"}
        async with world.running():
            await world.caught_up()
            for reference in ("older", "younger"):
                request = {"brand": daemons.BRAND, "reference": reference, "legs": [leg]}
                await database.pool.fetchval("SELECT loyalty.register_operation($1)", request)
            node.mine([issued(1)], 2)
            await world.reaches("older", "ready")
            assert world.sample("ambiguous_matches_total", brand=daemons.BRAND, kind="loyfin.issuance") == 1
            assert await world.state("younger") == "pending"


async def test_a_pass_that_waited_for_another_session_in_a_circle_is_begun_anew(
    database: Database, owner_dsn: str
) -> None:
    async with PartnerWorld.at(owner_dsn, rules()) as world, World.at(owner_dsn, found=False) as other:
        assert isinstance(world, PartnerWorld)
        operation = await world.register(mint())
        evidence = await world.record()
        crossing = other.conn.transaction()
        await crossing.start()
        await other.conn.execute("SELECT FROM indexer.partner_transfer WHERE id = $1 FOR UPDATE", evidence)
        settling = at_work(
            Leases(database, ttl=10), loop.TASK, lambda lease: loop.settle(lease, Wakeups(), rules(), {}, Nobody())
        )
        async with settling, asyncio.timeout(60):
            while not await database.pool.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            ):
                await asyncio.sleep(0.01)
            # the pass holds the operation and wants the evidence; of the two it has waited longer, and is ended; if not, it goes on
            with suppress(asyncpg.DeadlockDetectedError):
                await other.conn.execute("SELECT FROM indexer.operation WHERE id = $1 FOR UPDATE", operation)
                assert await world.state(operation) == "pending"
            await crossing.rollback()
            while await world.state(operation) != "ready":
                await asyncio.sleep(0.05)
        assert await world.conn.fetchval("SELECT epoch FROM indexer.lease WHERE task = 'settle'") == 1
