"""Of two endpoints one leaves single logs out of every range of history, without a word: found, repaired, counted, by nobody's hand."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

import pytest

from indexer.store.database import Database
from tests.fake_node import FakeChain
from tests.following import FACTORY, created, eventually, issued, stored, truth
from tests.simulation.test_pool import nodes_of, world_of
from tests.simulation.world import World

BLOCKS, PER_BLOCK, ONE_IN = 300, 4, 40
LOOK_SECONDS = 0.2


def withheld(block_hash: str, index: str) -> bool:
    """The same logs whenever they are asked for."""
    return zlib.crc32(f"{block_hash} {index}".encode()) % ONE_IN == 0


def left_out(_: Any, logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [log for log in logs if not withheld(log["blockHash"], log["logIndex"])]


def history() -> FakeChain:
    chain = FakeChain()
    chain.code[FACTORY] = 1
    chain.mine([created(1)])
    for number in range(BLOCKS):
        chain.mine([issued(number * PER_BLOCK + n) for n in range(PER_BLOCK)])
    chain.mine(blocks=5)
    return chain


async def unverified(world: World) -> int:
    """Finalized blocks that were read once, summed over emitters."""
    await asyncio.sleep(LOOK_SECONDS)
    world.node.mine()  # an endpoint that stands still has no vote
    left = await world.database.pool.fetchval(
        """
        SELECT coalesce(sum(upper(r) - lower(r)), 0)::int FROM indexer.coverage c JOIN indexer.chain h USING (chain_id)
         CROSS JOIN LATERAL unnest(c.blocks * int8multirange(int8range(0, h.finalized_number, '[]'))) r
         WHERE c.verdict = 'unverified'
        """
    )
    complete = await world.database.pool.fetchval("SELECT history_complete FROM indexer.chain")
    return int(left) if complete else BLOCKS


@pytest.mark.parametrize("receipts", [True, False], ids=["receipts", "no receipts"])
@pytest.mark.parametrize("place", [0, 1], ids=["first", "second"])
async def test_logs_that_one_of_two_leaves_out_of_history(database: Database, place: int, receipts: bool) -> None:
    """Read first, it is corrected by the other. Read second, it is not believed, and confirms nothing until it tells the truth."""
    async with nodes_of(history(), 2) as nodes:
        chain = nodes[0].chain
        dropped = sum(withheld("0x" + block.hex(), hex(index)) for _, block, index in truth(chain))
        blocks = len({number for number, block, index in truth(chain) if withheld("0x" + block.hex(), hex(index))})
        assert dropped >= 10
        nodes[0].set_tags(safe=chain.head.number - 2, finalized=chain.head.number - 2)
        withholding = nodes[place].lie("eth_getLogs", left_out, times=None)
        if not receipts:
            for node in nodes:
                node.fail("eth_getBlockReceipts", -32601, "the method does not exist/is not available", times=None)
        world = world_of(database, nodes, socket=False, second_look_seconds=LOOK_SECONDS)
        liar, honest = (f"127.0.0.1:{nodes[which].port}" for which in (place, 1 - place))

        def complete(outcome: str) -> float:
            return world.sample("checks_total", check="logs_complete", outcome=outcome, endpoint=liar)

        async def verified() -> bool:
            return await unverified(world) == 0

        async def caught() -> bool:
            await unverified(world)
            return complete("fail" if receipts else "skip") >= blocks

        async with world.running():
            if place == 0:
                await eventually(verified, what="the second look")
                assert world.total("second_look_differences_total") == dropped
            else:
                await eventually(caught, what="the second look")
                for _ in range(5):
                    assert await unverified(world) >= BLOCKS
                assert complete("fail") + complete("skip") == blocks  # its word is worth nothing: it was asked once
                assert world.total("rpc_lies_total", endpoint=liar) == (blocks if receipts else 0)
        if place == 1:
            nodes[place].faults.remove(withholding)
            async with world.running():
                await eventually(verified, what="the second look, once it tells the truth")
            assert world.total("second_look_differences_total") == 0
        assert await stored(database) == truth(chain)
        assert world.total("rpc_lies_total", endpoint=honest) == 0
        verdicts = await database.pool.fetch(
            "SELECT DISTINCT verdict FROM indexer.coverage WHERE blocks @> 150::bigint AND emitter <> ''"
        )
        assert [row["verdict"] for row in verdicts] == ["second_endpoint"]
