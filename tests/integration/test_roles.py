"""An address may be a factory and the hub of another: who waits for whose coverage, and what a new role makes of the old one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from indexer.chain.emitters import configured_emitters, load_speakers
from indexer.config import Chain
from indexer.store import chains, coverage
from indexer.store.coverage import HEAD_LANE, Covered, Span
from indexer.store.database import Database
from tests.world import BASE_MS, CHAIN, FACTORY, World, hexa

BOTH = b"\xb0" * 20  # a factory of its own, and the hub of FACTORY


@pytest.fixture
async def world(owner_dsn: str) -> AsyncIterator[World]:
    async with World.at(owner_dsn) as made:
        yield made


def chain(*factories: tuple[bytes, int, bytes | None]) -> Chain:
    named = [
        {"address": "0x" + address.hex(), "start_block": start} | ({"event_hub": "0x" + hub.hex()} if hub else {})
        for address, start, hub in factories
    ]
    return Chain.model_validate(
        {"name": "sandbox", "chain_id": CHAIN, "rpc": [{"url": "http://127.0.0.1:1"}], "factories": named}
    )


async def test_expiry_waits_for_a_hub_that_is_a_factory_too(world: World) -> None:
    conn = world.conn
    await chains.sync_emitters(conn, CHAIN, configured_emitters(chain((FACTORY, 0, BOTH), (BOTH, 50, None))))
    assert {e.address: e.start_block for e in await chains.load_emitters(conn, CHAIN)} == {FACTORY: 0, BOTH: 0}
    operation = await world.register(
        world.leg(factory=hexa(FACTORY), nonce=hexa(world.nonce()), deadline=str(BASE_MS // 1000 + 20))
    )
    await world.heads(head=1000, safe=900, finalized=200)
    await coverage.cover(conn, CHAIN, [Covered(FACTORY, 0, 300, "gate")])
    await world.settle()
    assert await world.state(operation) == "pending"
    await coverage.cover(conn, CHAIN, [Covered(BOTH, 40, 300, "gate")])  # its own start is not the other's
    await world.settle()
    assert await world.state(operation) == "pending"
    await coverage.cover(conn, CHAIN, [Covered(BOTH, 0, 39, "gate")])
    await conn.execute("INSERT INTO indexer.touched_operation (operation_id) SELECT id FROM indexer.operation")
    assert await world.settle() == ["operation.expired"]


async def test_expiry_does_not_wait_for_the_hub_of_another_factory(world: World) -> None:
    other = b"\xc0" * 20
    emitters = configured_emitters(chain((FACTORY, 0, None), (other, 0, BOTH)))
    await chains.sync_emitters(world.conn, CHAIN, emitters)
    operation = await world.register(
        world.leg(factory=hexa(FACTORY), nonce=hexa(world.nonce()), deadline=str(BASE_MS // 1000 + 20))
    )
    await world.heads(head=1000, safe=900, finalized=200)
    await coverage.cover(world.conn, CHAIN, [Covered(FACTORY, 0, 300, "gate")])
    await world.conn.execute("INSERT INTO indexer.touched_operation (operation_id) SELECT id FROM indexer.operation")
    assert await world.settle() == ["operation.expired"]
    assert await world.state(operation) == "expired"


async def test_what_was_read_before_a_role_was_given_is_read_again(database: Database) -> None:
    conn = await database.session("test")
    try:
        await chains.ensure_chain(conn, CHAIN, "sandbox", None, None)
        await chains.sync_emitters(conn, CHAIN, configured_emitters(chain((BOTH, 10, None))))
        await chains.set_followed(conn, CHAIN, [(await chains.load_emitters(conn, CHAIN))[0].address], 60)
        claims = [Covered(BOTH, 10, 59, "gate"), Covered(HEAD_LANE, 60, 90, "gate")]
        await coverage.cover(conn, CHAIN, claims)
        assert await coverage.gaps(conn, CHAIN, 90) == {}
        # the same again changes nothing; that it speaks for another makes all of it new
        await chains.sync_emitters(conn, CHAIN, configured_emitters(chain((BOTH, 10, None))))
        assert await coverage.gaps(conn, CHAIN, 90) == {}
        two = configured_emitters(chain((BOTH, 10, None), (FACTORY, 20, BOTH)))
        await chains.sync_emitters(conn, CHAIN, two)
        assert await coverage.gaps(conn, CHAIN, 90) == {BOTH: [Span(10, 90)], FACTORY: [Span(20, 90)]}
        assert await chains.any_unfollowed(conn, CHAIN)
        speakers = await load_speakers(conn, CHAIN)
        assert speakers.speaks_for == {BOTH: frozenset({BOTH, FACTORY}), FACTORY: frozenset({FACTORY})}
        # away for a while, it keeps what was read while it could say the same
        await coverage.cover(conn, CHAIN, [Covered(BOTH, 10, 90, "gate"), Covered(FACTORY, 20, 90, "gate")])
        await chains.sync_emitters(conn, CHAIN, [])
        assert (await load_speakers(conn, CHAIN)).addresses == frozenset()
        await chains.sync_emitters(conn, CHAIN, two)
        assert await coverage.gaps(conn, CHAIN, 95) == {BOTH: [Span(91, 95)], FACTORY: [Span(91, 95)]}
    finally:
        await conn.close()
