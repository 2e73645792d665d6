"""`operation.expired` means never: no silence of a node, of ours or of a brand's is taken for absence.

Each story has an operation whose event is there and is hidden, late or out of reach, and mostly one whose event never
comes: the second must expire in the end, so that the first is not spared by an expiry that never works.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from indexer.chain.schedule import BASE
from indexer.model.types import Hash32, Schedule
from indexer.store.database import Database
from tests.fake_node import FakeNode
from tests.following import FACTORY, FACTORY2, chain_config, created, eventually, issued, token_of
from tests.simulation.world import World

HUB = b"\xab" * 20
EVENT, DEADLINE, HEAD, FINALIZED = 15, 20, 40, 35  # blocks; the deadline is that block's second
BLOCKS_2S = {"block_ms": 2000}

Params = list[Any]


def second_of(node: FakeNode, number: int) -> str:
    return str(node.chain.time_ms(number) // 1000)


def ranges_with(number: int) -> Callable[[Params], bool]:
    """Calls of eth_getLogs for a range that holds the block."""

    def asked(params: Params) -> bool:
        query = params[0]
        return "blockHash" not in query and int(query["fromBlock"], 16) <= number <= int(query["toBlock"], 16)

    return asked


def without(number: int) -> Callable[[Params, Any], Any]:
    """The answer less the logs of that block."""
    return lambda _, logs: [log for log in logs if int(log["blockNumber"], 16) != number]


async def to_the_event(node: FakeNode, event: Any) -> None:
    """A programme in block 1, the event in block EVENT, HEAD blocks in all."""
    node.mine([created(1)], EVENT - 1)
    assert node.mine([event], HEAD - EVENT + 1).number == EVENT


async def by_socket(world: World, upto: int) -> None:
    """Mines up to a block, most of it when following by socket has begun."""
    node = world.node

    async def subscribed() -> bool:
        return node.subscribers > 0

    async def heard() -> bool:
        mode = await world.database.pool.fetchval("SELECT mode FROM indexer.chain")
        return node.chain.head.number == upto or bool(mode == "socket")

    await eventually(subscribed)
    while not await heard():
        node.mine()
        await world.caught_up()
    if (missing := upto - node.chain.head.number) > 0:
        node.mine(blocks=missing)
    await world.caught_up()


async def expired_by_mistake(world: World, *references: str) -> list[str]:
    return [each for each in references if "expired" in await world.trace(each)]


# --------------------------------------------------------------------------- polling


async def test_a_log_withheld_from_the_first_reading_is_found_by_the_second_look(database: Database) -> None:
    async with FakeNode(options=BLOCKS_2S) as node:
        world = World(database, node, socket=False)
        withheld = node.lie("eth_getLogs", without(EVENT), times=1, when=ranges_with(EVENT))
        async with world.running():
            due = await world.register(1, deadline=second_of(node, DEADLINE))
            never = await world.register(2, deadline=second_of(node, DEADLINE))
            await to_the_event(node, issued(1))
            await world.caught_up()
            assert withheld.hits == 1
            await world.tags(safe=FINALIZED, finalized=FINALIZED)
            await world.reaches(never, "expired")
            await world.reaches(due, "ready")
            assert await world.trace(due) == ["ready", "finalized"]
            assert await world.trace(never) == ["expired"]
            assert world.sample("second_look_differences_total", chain="fake") == 1
            await world.intact()


async def test_a_log_withheld_until_just_before_the_second_look_causes_no_expiry(database: Database) -> None:
    """… nor does the restart in between: what was not looked at twice is not known to be empty."""
    async with FakeNode(options=BLOCKS_2S) as node:
        world = World(database, node, socket=False)
        node.lie("eth_getLogs", without(EVENT), times=None)
        async with world.running(second_look_seconds=3600.0):
            due = await world.register(1, deadline=second_of(node, DEADLINE))
            never = await world.register(2, deadline=second_of(node, DEADLINE))
            await to_the_event(node, issued(1))
            await world.caught_up()
            await world.tags(safe=FINALIZED, finalized=FINALIZED)
            assert await world.finalized_second() > int(second_of(node, DEADLINE))
            assert await world.verdicts(1, FINALIZED) == {"unverified"}
            await world.looked()
            assert (await world.state(due), await world.state(never)) == ("pending", "pending")
        node.heal()
        async with world.running():
            await world.reaches(due, "ready")
            await world.reaches(never, "expired")
            assert await world.trace(due) == ["ready", "finalized"]
            await world.intact()


async def test_a_programme_whose_announcement_was_withheld_is_found_with_all_that_its_token_said(
    database: Database,
) -> None:
    """The token is in no filter before its announcement is known: its events are read for the first time afterwards."""
    async with FakeNode(options=BLOCKS_2S) as node:
        world = World(database, node, socket=False)
        withheld = node.lie("eth_getLogs", without(1), times=1, when=ranges_with(1))
        async with world.running():
            due = await world.register(1, deadline=second_of(node, DEADLINE))
            await to_the_event(node, issued(1, emitter=token_of(1)))
            await world.caught_up()
            assert withheld.hits == 1
            await world.tags(safe=FINALIZED, finalized=FINALIZED)
            await world.reaches(due, "ready")
            assert await expired_by_mistake(world, due) == []
            await world.intact()


# --------------------------------------------------------------------------- by socket


async def test_a_log_withheld_for_ever_settles_from_the_receipts(database: Database) -> None:
    async with FakeNode(options=BLOCKS_2S) as node:
        world = World(database, node, silent_seconds=30.0)
        node.mine([created(1)])
        node.lie("eth_getLogs", without(EVENT), times=None)
        async with world.running():
            await by_socket(world, EVENT - 1)
            due = await world.register(1, deadline=second_of(node, DEADLINE))
            never = await world.register(2, deadline=second_of(node, DEADLINE))
            node.mine([issued(1)], HEAD - EVENT + 1)
            await world.caught_up()
            await world.tags(safe=FINALIZED, finalized=FINALIZED)
            await world.reaches(due, "ready")
            await world.reaches(never, "expired")
            assert await world.trace(due) == ["ready", "finalized"]
            assert await world.verdicts(EVENT, FINALIZED) == {"gate"}
            await world.intact()


async def test_an_endpoint_without_receipts_gives_no_gate(database: Database) -> None:
    """Its bloom admits the block, its answer by hash is empty, and there are no receipts to settle it: not verified."""
    async with FakeNode(options=BLOCKS_2S) as node:
        world = World(database, node, silent_seconds=30.0)
        node.mine([created(1)])
        node.fail("eth_getBlockReceipts", -32601, "the method eth_getBlockReceipts does not exist", times=None)
        node.lie("eth_getLogs", without(EVENT), times=None)
        async with world.running(second_look_seconds=3600.0):
            await by_socket(world, EVENT - 1)
            due = await world.register(1, deadline=second_of(node, DEADLINE))
            never = await world.register(2, deadline=second_of(node, DEADLINE))
            node.mine([issued(1)], HEAD - EVENT + 1)
            await world.caught_up()
            await world.tags(safe=FINALIZED, finalized=FINALIZED)
            await world.looked()
            assert (await world.state(due), await world.state(never)) == ("pending", "pending")
            assert await world.verdicts(EVENT, EVENT) == {"unverified"}
            assert await world.verdicts(EVENT + 1, FINALIZED) == {"gate"}
        node.heal()
        async with world.running():
            await world.reaches(due, "ready")
            await world.reaches(never, "expired")
            assert await world.trace(due) == ["ready", "finalized"]
            await world.intact()


async def test_receipts_that_leave_the_event_out_stop_following_there(database: Database) -> None:
    async with FakeNode(options=BLOCKS_2S) as node:
        world = World(database, node, silent_seconds=30.0)
        node.mine([created(1)])

        def short(_: Params, receipts: Any) -> Any:
            return [receipt | {"logs": [], "logsBloom": "0x" + "00" * 256} for receipt in receipts]

        async with world.running():
            await by_socket(world, EVENT - 1)
            due = await world.register(1, deadline=second_of(node, DEADLINE))
            node.lie("eth_getBlockReceipts", short, times=None)
            node.hide_logs(times=None)
            node.mine([issued(1)], HEAD - EVENT + 1)
            await eventually(lambda: _lied(world, "receipts_bloom"))
            node.set_tags(safe=FINALIZED, finalized=FINALIZED)
            await world.looked()
            assert await world.database.pool.fetchval("SELECT head_number FROM indexer.chain") == EVENT - 1
            assert await world.state(due) == "pending"
            node.heal()
            await world.caught_up()
            await world.reaches(due, "ready")
            assert await world.trace(due) == ["ready", "finalized"]
            await world.intact()


async def _lied(world: World, check: str) -> bool:
    return world.total("rpc_lies_total", check=check) > 0


# --------------------------------------------------------------------------- our own silence


@pytest.mark.parametrize("socket", [True, False], ids=["socket", "polling"])
async def test_what_happened_while_we_were_away_is_not_taken_for_nothing(database: Database, socket: bool) -> None:
    """So long away that following goes on at the finalized block: the gap is history's, and history is slow in coming."""
    async with FakeNode(options=BLOCKS_2S) as node:
        world = World(database, node, socket=socket)
        node.mine([created(1)], 5)
        async with world.running():
            due = await world.register(1, deadline=second_of(node, DEADLINE))
            never = await world.register(2, deadline=second_of(node, DEADLINE))
            await world.caught_up()
        node.mine(blocks=EVENT - 6)
        assert node.mine([issued(1)], 6000).number == EVENT
        head = node.chain.head.number
        node.set_tags(safe=head - 5, finalized=head - 10)
        refused = node.fail("eth_getLogs", -32603, "temporary internal error", times=None, when=ranges_with(EVENT))
        async with world.running():
            await world.caught_up()
            await world.tags(safe=head - 5, finalized=head - 10)
            await eventually(lambda: _hit(refused))
            await world.looked()
            assert (await world.state(due), await world.state(never)) == ("pending", "pending")
            node.heal()
            await world.reaches(due, "ready")
            await world.reaches(never, "expired")
            assert await world.trace(due) == ["ready", "finalized"]
            await world.intact()


async def _hit(fault: Any) -> bool:
    return bool(fault.hits)


@pytest.mark.parametrize("late", [False, True], ids=["registered before", "registered late"])
async def test_an_incomplete_backfill_proves_nothing(database: Database, late: bool) -> None:
    """We begin with an empty database when all is finalized already; the operation is known before us, or comes later."""
    async with FakeNode(options=BLOCKS_2S) as node:
        world = World(database, node)
        await to_the_event(node, issued(1))
        node.set_tags(safe=FINALIZED, finalized=FINALIZED)
        refused = node.fail("eth_getLogs", -32603, "temporary internal error", times=None, when=ranges_with(EVENT))
        async with world.running():
            await world.caught_up()
            if not late:
                due, never = [await world.register(n, deadline=second_of(node, DEADLINE)) for n in (1, 2)]
            await world.tags(safe=FINALIZED, finalized=FINALIZED)
            await eventually(lambda: _hit(refused))
            if late:
                due, never = [await world.register(n, deadline=second_of(node, DEADLINE)) for n in (1, 2)]
            await world.looked()
            assert (await world.state(due), await world.state(never)) == ("pending", "pending")
            node.heal()
            await world.reaches(due, "ready")
            await world.reaches(never, "expired")
            assert await world.trace(due) == ["ready", "finalized"]
            await world.intact()


async def test_a_late_registration_finds_what_happened_before_it(database: Database) -> None:
    """Everything is covered and finalized past the deadline when the brand comes: ready or expired, at once and rightly."""
    async with FakeNode(options=BLOCKS_2S) as node:
        world = World(database, node)
        await to_the_event(node, issued(1))
        node.set_tags(safe=FINALIZED, finalized=FINALIZED)
        async with world.running():
            await world.caught_up()
            early = await world.register(3, deadline=second_of(node, DEADLINE))
            await world.reaches(early, "expired")
            due = await world.register(1, deadline=second_of(node, DEADLINE))
            stated = await world.register(
                2,
                deadline=second_of(node, DEADLINE),
                requested_at=datetime.fromtimestamp(node.chain.time_s, UTC).isoformat(),
            )
            await world.reaches(due, "ready")
            await world.reaches(stated, "expired")
            assert await world.trace(due) == ["ready", "finalized"]
            await world.intact()


@pytest.mark.parametrize("of", [FACTORY, FACTORY2], ids=["first factory", "second factory"])
async def test_expiry_waits_for_the_history_of_a_hub_that_was_added_later(database: Database, of: bytes) -> None:
    """The hub speaks for both factories that name it; it was not listened to when the event came."""
    async with FakeNode(options=BLOCKS_2S) as node:

        def with_hub(node: FakeNode, *, hub: bool, **settings: Any) -> Any:
            each = {"start_block": 0} | ({"event_hub": "0x" + HUB.hex()} if hub else {})
            factories = [{"address": "0x" + factory.hex()} | each for factory in (FACTORY, FACTORY2)]
            chain = chain_config(node, **settings)
            return chain.model_validate(chain.model_dump() | {"factories": factories})

        world = World(database, node, chain=with_hub, hub=False)
        node.mine([created(1), created(1, FACTORY2)], EVENT - 1)
        node.mine([issued(1, factory=of, emitter=HUB)], HEAD - EVENT + 1)
        node.set_tags(safe=FINALIZED, finalized=FINALIZED)
        async with world.running():
            await world.caught_up()
            # all is covered for the factories themselves
            control = await world.register(9, deadline=second_of(node, DEADLINE), factory=of)
            await world.reaches(control, "expired")
        refused = node.fail("eth_getLogs", -32603, "temporary internal error", times=None, when=ranges_with(EVENT))
        async with world.running(hub=True):
            await eventually(lambda: _hit(refused))
            due = await world.register(1, deadline=second_of(node, DEADLINE), factory=of)
            never = await world.register(2, deadline=second_of(node, DEADLINE), factory=of)
            await world.looked()
            assert (await world.state(due), await world.state(never)) == ("pending", "pending")
            node.heal()
            await world.reaches(due, "ready")
            await world.reaches(never, "expired")
            assert await world.trace(due) == ["ready", "finalized"]


# --------------------------------------------------------------------------- the exact second


@pytest.mark.parametrize("scheduled", [False, True], ids=["seconds alone", "by schedule"])
async def test_no_block_of_the_exact_second_is_too_late(
    database: Database, monkeypatch: pytest.MonkeyPatch, scheduled: bool
) -> None:
    """Five blocks share the deadline's second, and the action may be in any of them: also when those before are finalized."""
    async with FakeNode(options={"first_fast_block": 10}) as node:
        if scheduled:
            genesis = Hash32(node.chain.canonical[0].hash)
            monkeypatch.setitem(BASE, (84532, genesis), Schedule(node.chain.time_s, 10))  # type: ignore[index]
        world = World(database, node, silent_seconds=30.0)
        node.mine([created(1)])
        first = 15  # of five blocks of one second
        deadline = second_of(node, first)
        assert [second_of(node, n) == deadline for n in range(first - 1, first + 6)] == [False, *[True] * 5, False]
        async with world.running():
            await by_socket(world, first - 1)
            due = [await world.register(n, deadline=deadline) for n in range(5)]
            never = await world.register(9, deadline=deadline)
            for n in range(5):
                node.mine([issued(n)])
                await world.caught_up()
                await world.tags(safe=first + n, finalized=first + n)
                assert await world.finalized_second() == int(deadline)
                await world.looked()
                assert [await world.state(each) for each in due] == ["ready"] * (n + 1) + ["pending"] * (4 - n)
                assert await world.state(never) == "pending"
            node.mine()
            await world.caught_up()
            await world.tags(safe=first + 5, finalized=first + 5)
            await world.reaches(never, "expired")
            assert await expired_by_mistake(world, *due) == []
            await world.intact()


async def test_the_bucket_ends_an_operation_as_the_deadline_does_and_no_later_block_counts(database: Database) -> None:
    """The smaller of the two bounds; none at all, or one beyond 2^40, never expires."""
    async with FakeNode(options=BLOCKS_2S) as node:
        world = World(database, node)
        node.mine([created(1)], HEAD)
        node.set_tags(safe=FINALIZED, finalized=FINALIZED)
        async with world.running():
            await world.caught_up()
            bound = second_of(node, DEADLINE)
            ends = await world.register(1, expiresAt=bound, deadline=second_of(node, HEAD + 100))
            open_ended = await world.register(2)
            for_ever = await world.register(3, deadline=str(2**256 - 1), expiresAt=str(2**40 + 1))
            at_finalized = await world.register(4, deadline=second_of(node, FINALIZED))
            await world.reaches(ends, "expired")
            await world.looked()
            assert [await world.state(each) for each in (open_ended, for_ever, at_finalized)] == ["pending"] * 3
            node.mine()
            await world.caught_up()
            await world.tags(safe=FINALIZED + 1, finalized=FINALIZED + 1)
            await world.reaches(at_finalized, "expired")
