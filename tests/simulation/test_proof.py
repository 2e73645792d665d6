"""Proof before signal: what an operation settles on is held by enough endpoints and proven by its block's receipts, or it waits."""

from __future__ import annotations

from typing import Any

import pytest

from indexer.store.database import Database
from tests.fake_node import FakeChain, FakeNode, hx
from tests.following import eventually, issued, stored, truth
from tests.simulation.test_pool import agree, loyal, nodes_of, world_of
from tests.simulation.world import World


def word_of(log: dict[str, Any], place: int, value: int) -> dict[str, Any]:
    """The log of `issued` with another word of its data: 3 is the amount, 4 the nonce."""
    data = bytes.fromhex(log["data"][2:])
    return log | {"data": hx(data[: 32 * place] + value.to_bytes(32, "big") + data[32 * place + 32 :])}


async def waits_for(world: World, reference: str, words: str) -> None:
    """Waits until the operation says that it waits for this; no signal has left."""

    async def so() -> bool:
        told = await world.database.pool.fetchval(
            "SELECT detail -> 'waitingFor' FROM indexer.operation WHERE reference = $1", reference
        )
        return any(words in str(each.get("reason")) for each in told or [])

    await eventually(so, what=words)
    assert await world.trace(reference) == []


@pytest.mark.parametrize("socket", [True, False], ids=["socket", "polling"])
async def test_claimed_blocks_are_proven_and_others_cost_nothing(database: Database, socket: bool) -> None:
    """By socket the gate has proven them already; when polling, one look at receipts each: the header is known since the events were read."""
    async with FakeNode() as node:
        world = World(database, node, socket=socket, second_look_seconds=3600.0)
        loyal(node.chain)
        async with world.running():
            await world.caught_up()
            references = [await world.register(n) for n in range(3)]
            for n in range(12):
                node.mine([issued(n)])
            await world.caught_up()
            await world.tags(safe=16, finalized=2)
            for reference in references:
                await world.reaches(reference, "ready")
                (evidence,) = await world.evidence(reference)
                assert (evidence["proof"], evidence["witnesses"], evidence["confidence"]) == (
                    "receipts_root",
                    1,
                    "safe",
                )
            by_hash = [p for m, p in node.asked if m == "eth_getBlockByHash"]
            assert not by_hash, "known since they were read"
            if not socket:
                assert node.calls["eth_getBlockReceipts"] == 3
                assert world.sample("block_proofs_total", chain="fake", outcome="receipts_root") == 3


async def test_an_event_that_the_receipts_do_not_hold_settles_nothing(database: Database) -> None:
    """The only endpoint tells another amount in a range answer: the block's own receipts put it right before anything leaves."""
    async with FakeNode() as node:
        world = World(database, node, socket=False, second_look_seconds=3600.0)
        loyal(node.chain)
        async with world.running():
            await world.caught_up()
            false, true = await world.register(1, amount=1000), await world.register(2)
            node.lie("eth_getLogs", lambda _, logs: [word_of(log, 3, 1000) for log in logs], times=None)
            node.mine([issued(1)])
            await world.caught_up()
            node.heal()
            node.mine([issued(2)])
            await world.caught_up()
            await world.tags(safe=7, finalized=2)
            await world.reaches(true, "ready")
            await world.reaches(false, "conflict")
            assert await world.trace(false) == ["conflict"], "the true amount is another one than it waits for"
            assert await stored(database) == truth(node.chain)
            assert world.sample("block_proofs_total", chain="fake", outcome="repaired") == 1


async def test_without_a_proof_nothing_above_included_leaves(database: Database) -> None:
    async with FakeNode() as node:
        world = World(database, node, socket=False, second_look_seconds=3600.0)
        loyal(node.chain)
        async with world.running():
            await world.caught_up()
            reference = await world.register(1)
            node.lie("eth_getBlockReceipts", lambda _, receipts: receipts[:-1], times=None)
            node.mine([issued(1)])
            await world.caught_up()
            await world.tags(safe=6, finalized=2)
            await waits_for(world, reference, "its block is not proven yet")
            node.heal()
            await world.reaches(reference, "ready")
            (evidence,) = await world.evidence(reference)
            assert evidence["proof"] == "receipts_root" and "proofReason" not in evidence


@pytest.mark.parametrize("required", [True, False], ids=["required", "where possible"])
async def test_what_cannot_be_verified_is_said(database: Database, required: bool) -> None:
    """A transaction of a type that nobody here knows: its receipt may be hashed otherwise, so nothing is proven."""
    proof = "required" if required else "where_possible"
    async with FakeNode() as node:
        world = World(database, node, socket=False, proof=proof, second_look_seconds=3600.0)
        loyal(node.chain)
        async with world.running():
            await world.caught_up()
            reference = await world.register(1)
            strange = lambda _, receipts: [each | {"type": "0x55"} for each in receipts]  # noqa: E731
            node.lie("eth_getBlockReceipts", strange, times=None)
            node.mine([issued(1)])
            await world.caught_up()
            await world.tags(safe=6, finalized=2)
            if required:
                await waits_for(world, reference, "cannot be verified: ")
            else:
                await world.reaches(reference, "ready")
            (evidence,) = await world.evidence(reference)
            assert evidence["proof"] == "cannot_verify" and "0x55" in evidence["proofReason"]
            assert evidence["confidence"] == ("included" if required else "safe")


async def test_no_endpoint_has_receipts(database: Database) -> None:
    async with FakeNode() as node:
        world = World(database, node)
        loyal(node.chain)
        node.fail("eth_getBlockReceipts", -32601, "the method does not exist/is not available", times=None)
        async with world.running():
            await world.caught_up()
            reference = await world.register(1)
            node.mine([issued(1)])
            await world.caught_up()
            await world.tags(safe=6, finalized=2)
            await waits_for(world, reference, "no endpoint offers eth_getBlockReceipts")


async def test_an_event_that_one_of_two_made_up_signals_nothing(database: Database) -> None:
    """The leader invents an event with other terms under the nonce that a brand waits for: no conflict is told on its word, and the
    true event settles."""
    async with nodes_of(loyal(FakeChain()), 2) as nodes:
        world = world_of(database, nodes, socket=False)
        async with world.running():
            await world.caught_up()
            await agree(world)
            reference = await world.register(1)
            fork = nodes[0].chain.fork()
            true = nodes[0].chain
            nodes[0].move_to(fork)
            fork.mine([issued(1, amount=77)], 2)

            async def seen() -> bool:
                return bool(await database.pool.fetchval("SELECT count(*) FROM indexer.movement WHERE amount = 77"))

            await eventually(seen, what="the made-up event")
            await world.looked()
            assert await world.trace(reference) == []
            nodes[0].move_to(true)
            true.mine([issued(1)], 3)
            await world.reaches(reference, "ready")
            (evidence,) = await world.evidence(reference)
            assert (evidence["witnesses"], evidence["confidence"]) == (2, "included")
            assert await world.trace(reference) == ["ready"]
            await world.intact()


async def test_nothing_unmatched_is_told_on_the_word_of_one(database: Database) -> None:
    """The leader adds an event to a range answer: its block's receipts do not hold it, so only the true one is unmatched."""
    async with nodes_of(loyal(FakeChain()), 2) as nodes:
        world = world_of(database, nodes, socket=False, second_look_seconds=3600.0)
        async with world.running(unmatched_quiet_ms=0):
            await world.caught_up()
            await agree(world)

            def add(_: Any, logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
                made_up = [word_of(log, 4, 5) | {"logIndex": "0x1"} for log in logs]
                return [*logs, *made_up]

            nodes[0].lie("eth_getLogs", add, times=None)
            nodes[0].mine([issued(1)], 3)
            await world.caught_up()
            assert await database.pool.fetchval("SELECT count(*) FROM indexer.movement WHERE canonical") == 2
            await world.tags(safe=8, finalized=2)

            async def told() -> bool:
                world.wakeups.poke("facts")
                return bool(await world.unmatched())

            await eventually(told, 30, "the true event")
            assert await stored(database) == truth(nodes[0].chain)
            assert len(await world.unmatched()) == 1


async def test_observing_counts_and_rejects_nothing(database: Database) -> None:
    """Headers whose hash is another one than their fields make, as after a change of rules: followed, counted, never proven."""
    async with FakeNode() as node:
        world = World(database, node, socket=False, integrity="observe")
        loyal(node.chain)
        async with world.running():
            await world.caught_up()
            for method in ("eth_getBlockByNumber", "eth_getBlockByHash"):
                node.lie(method, lambda _, header: header and header | {"gasUsed": "0x7"}, times=None)
            node.lie("eth_getBlockReceipts", lambda _, receipts: receipts[:-1], times=None)
            reference = await world.register(1)
            node.mine([issued(1)], 2)
            await world.caught_up()
            await world.tags(safe=7, finalized=2)
            assert world.total("rpc_lies_total", check="header_hash") > 0
            await waits_for(world, reference, "cannot be verified")
            (evidence,) = await world.evidence(reference)
            assert "failed and only observed" in evidence["proofReason"]
