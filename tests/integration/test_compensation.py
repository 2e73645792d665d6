"""Taking back, giving back, and never asking twice: generations, what supersedes what, exposures, and recomputing it all."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from indexer.model.confidence import Level, Policy
from indexer.settlement.rules import BrandRules
from indexer.store.signals import number
from tests.integration.test_settlement_stories import DEMANDS, Story
from tests.oracle import judge_database
from tests.world import BASE_MS, BRAND, World, hexa

RULES = {BRAND: BrandRules((Policy(Level.INCLUDED),))}


async def claims(world: World) -> list[UUID]:
    """What a worker is given now."""
    rows = await world.conn.fetch(
        "SELECT claim, operation_id FROM loyalty.claim_fulfilments('worker', 100, '1 minute')"
    )
    return [row["claim"] for row in rows]


async def waiting(world: World) -> int:
    return int(await world.conn.fetchval("SELECT count(*) FROM loyalty.pending_fulfilments"))


async def exposures(world: World) -> list[tuple[str, int, int, str]]:
    rows = await world.conn.fetch(
        "SELECT status, generation, fulfilled_generation, outcome FROM loyalty.exposures ORDER BY fulfilled_at"
    )
    return [tuple(row) for row in rows]


async def outbox(world: World) -> list[tuple[Any, ...]]:
    """Everything that was ever said, numbered, as it stands."""
    async with world.conn.transaction():
        while (await number(world.conn)).signals:
            pass
    rows = await world.conn.fetch("SELECT * FROM indexer.outbox ORDER BY position")
    return [tuple(row) for row in rows]


async def test_fulfilled_reorganised_and_mined_again(owner_dsn: str) -> None:
    async with World.at(owner_dsn, RULES) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        await world.event(100, leg)
        assert await world.settle() == ["operation.ready"]
        (claim,) = await claims(world)
        told = await world.conn.fetchval("SELECT loyalty.fulfil($1, 1, '{}', $2)", operation, claim)
        assert told["outcome"] == "fulfilled" and await exposures(world) == []
        assert await world.settle() == ["operation.fulfilled"]

        for generation, block in ((1, 100), (2, 103)):  # and once more, of what was given back
            await world.orphan(block - 1)
            assert await world.settle() == ["operation.reverted"]
            assert await exposures(world) == [("reverted", generation, 1, "fulfilled")]
            assert await claims(world) == [] and await waiting(world) == 0
            await world.event(block + 3, leg, fork=f"fork {generation}")
            assert await world.settle() == ["operation.restored"]
            assert await exposures(world) == [] and await claims(world) == [] and await waiting(world) == 0
            assert (await world.operation(operation))["generation"] == generation + 1

        again = await world.conn.fetchval("SELECT loyalty.fulfil($1, 1, '{}', $2)", operation, claim)
        assert again == {"outcome": "fulfilled", "generation": 1, "repeated": True}
        assert await world.settle() == []
        await world.heads(head=200, safe=150, finalized=140)
        assert await world.settle() == ["operation.finalized"]  # of the generation that stands, once
        await world.heads(head=300, safe=250, finalized=240)
        assert await world.settle() == []
        assert await world.trace(operation) == [
            *("ready", "fulfilled", "reverted", "restored", "reverted", "restored", "finalized")
        ]
        assert await world.walked(operation) == [
            *("pending", "ready", "fulfilled", "reverted", "fulfilled", "reverted", "fulfilled")
        ]

        # who takes back whom: each way round, and the last one stands
        await outbox(world)
        said = await world.conn.fetch("SELECT * FROM loyalty.signals ORDER BY sequence")
        ready, _, first, restored, second, last, finalized = said
        assert [(s["supersedes"], s["superseded_by"]) for s in (ready, first)] == [
            (None, first["id"]),
            (ready["id"], None),
        ]
        assert [(s["supersedes"], s["superseded_by"]) for s in (restored, second)] == [
            (None, second["id"]),
            (restored["id"], None),
        ]
        assert last["superseded_by"] is None and finalized["superseded_by"] is None
        assert (await world.operation(operation))["standing_signal"] == last["id"]
        assert [s["payload"]["data"]["supersedes"] for s in (first, second)] == [str(ready["id"]), str(restored["id"])]
        assert [s["generation"] for s in said] == [1, 1, 1, 2, 2, 3, 3]
        assert first["payload"]["data"]["lost"][0]["blockNumber"] == "100"
        assert not await judge_database(world.conn)


async def test_a_receipt_for_what_was_taken_back_is_kept_answered_and_exposed(owner_dsn: str) -> None:
    async with World.at(owner_dsn, RULES) as world:
        legs = [world.leg(nonce=hexa(world.nonce())) for _ in range(2)]
        lost, back = [await world.register(leg) for leg in legs]
        for leg in legs:
            await world.event(100, leg, index=legs.index(leg))
        await world.settle()
        held = await claims(world)
        assert len(held) == 2
        await world.orphan(99)
        await world.settle()
        assert await world.fulfil(lost, 1) == "reverted"  # the shop had handed over when the news reached it
        assert await world.fulfil(lost, 1) == "reverted"
        assert await exposures(world) == [("reverted", 1, 1, "reverted")]
        assert await world.settle() == []

        # the other one is ready again before the late word about its first generation comes
        await world.event(102, legs[1], fork="b", index=1)
        assert await world.settle() == ["operation.ready"]
        assert await world.fulfil(back, 1) == "reverted"
        assert await claims(world) == [] and await waiting(world) == 0  # with any receipt it is given to nobody
        assert await world.settle() == ["operation.fulfilled"]
        assert await exposures(world) == [("reverted", 1, 1, "reverted")]

        await world.event(103, legs[0], fork="b")
        assert await world.settle() == ["operation.restored"]
        assert await exposures(world) == []
        assert await world.trace(lost) == ["ready", "reverted", "restored"]
        assert await world.trace(back) == ["ready", "reverted", "ready", "fulfilled"]
        await outbox(world)
        assert not await judge_database(world.conn)


async def test_recomputing_everything_sends_nothing(owner_dsn: str) -> None:
    """F130: as after `indexer replay` from the first block, and with every memory of what was looked at wiped."""
    async with World.at(owner_dsn, RULES) as world:
        deadline = str((BASE_MS + 200 * 100) // 1000)
        legs = {
            name: world.leg(nonce=hexa(world.nonce()), deadline=deadline if name == "expired" else None)
            for name in ("pending", "ready", "fulfilled", "restored", "reverted", "conflict", "cancelled", "expired")
        }
        operations = {name: await world.register(leg, reference=name) for name, leg in legs.items()}
        early = [name for name in legs if name not in ("pending", "conflict", "cancelled", "expired")]
        for index, name in enumerate(early):
            await world.event(300, legs[name], index=index)
        await world.event(301, legs["conflict"], amount="1")
        await world.event(302, world.leg(), index=7)  # of nobody
        await world.cancel(operations["cancelled"])
        await world.settle()
        for name in ("fulfilled", "restored", "reverted"):
            await world.fulfil(operations[name], 1)
        await world.settle()
        await world.orphan(299)
        await world.settle()
        for index, name in enumerate(["ready", "fulfilled", "restored"]):
            await world.event(310, legs[name], fork="b", index=index)
        await world.event(311, legs["conflict"], fork="b", amount="1")
        await world.event(312, world.leg(), fork="b", index=7)
        await world.cover(0, 400)
        await world.heads(head=500, safe=450, finalized=301)
        await world.settle()
        assert await world.unmatched() == 1
        await world.heads(head=500, safe=450, finalized=400)
        await world.settle()
        states = {name: await world.state(id) for name, id in operations.items()}
        assert states == {
            **{
                name: name for name in ("pending", "ready", "fulfilled", "reverted", "conflict", "cancelled", "expired")
            },
            "restored": "fulfilled",
        }
        before = await outbox(world)
        assert not await judge_database(world.conn)

        for forget in (
            "UPDATE indexer.chain SET unmatched_cursor = NULL",
            "DELETE FROM indexer.alarm",
            "UPDATE indexer.brand SET rules = NULL",
        ):
            await world.conn.execute(forget)
            await recompute(world)
            assert await outbox(world) == before
        assert {name: await world.state(id) for name, id in operations.items()} == states


async def recompute(world: World) -> None:
    """Every operation and every block is looked at again, until there is nothing left to do."""
    await world.touch_blocks(0, 1_000_000)
    assert await world.settle() == []  # which touches every operation once more
    await world.unmatched()
    assert await world.unmatched() == 0


@pytest.mark.parametrize(("seed", "demand"), [(11, "included"), (12, "safe")])
async def test_recomputing_any_story_sends_nothing(owner_dsn: str, seed: int, demand: str) -> None:
    async with World.at(owner_dsn, {BRAND: BrandRules((DEMANDS[demand][0],))}) as world:
        story = Story(world, seed, demand)
        steps = [story.register, story.mine, story.reorganise, story.advance, story.fulfil, story.cancel, story.decide]
        for round_ in range(50):
            for step in story.random.choices(steps, [5, 6, 3, 3, 3, 1, 2], k=2):
                await step()
            await story.settle()
            await world.unmatched()
            if round_ % 10 == 9:
                before = await outbox(world)
                await world.conn.execute("UPDATE indexer.chain SET unmatched_cursor = NULL")
                await world.conn.execute("DELETE FROM indexer.alarm")
                await recompute(world)
                assert await outbox(world) == before
        told = {row[5] for row in before}
        assert {"operation.ready", "settlement.unmatched"} <= told, told
        assert not await judge_database(world.conn)
