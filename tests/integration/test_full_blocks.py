"""One block that holds more logs than an endpoint lets through: read by its receipts, wherever blocks are read by ranges."""

from __future__ import annotations

from typing import Any

from indexer.store.database import Database
from tests.fake_node import FakeNode
from tests.following import (
    caught_up,
    chain_config,
    created,
    eventually,
    filling,
    following,
    history_filled,
    issued,
    stored,
    truth,
)

FULL = 40  # logs of the block that is too full
LIMIT = 10


def fill(node: FakeNode) -> int:
    """A block too full, between others; its height."""
    node.mine([created(1)], 3)
    node.mine([issued(1)])
    full = node.mine([issued(100 + n) for n in range(FULL)]).number
    node.mine([issued(2)])
    return full


def wide(params: list[Any]) -> bool:
    """Whether a range of several blocks is asked for."""
    return "fromBlock" in params[0] and params[0]["fromBlock"] != params[0]["toBlock"]


async def stands(database: Database, node: FakeNode) -> None:
    async def there() -> bool:
        return await stored(database) == truth(node.chain)

    await eventually(there, what="the truth")


async def test_history_and_the_second_look_at_it(database: Database) -> None:
    async with FakeNode(max_results=LIMIT) as node:
        full = fill(node)
        node.mine(blocks=10)
        node.set_tags(safe=node.head, finalized=node.head)
        chain = chain_config(node, second_look_seconds=0.1, verify_calls_per_second=1000)
        # the first receipts are not ready: an empty answer is no proof that a block which is too full holds nothing
        node.lie("eth_getBlockReceipts", lambda _, __: [])
        checks: list[tuple[str, str]] = []
        async with (
            following(database, node, chain),
            filling(database, node, chain, checks=checks),
        ):
            await history_filled(database, node.chain_id)
            assert await stored(database) == truth(node.chain)
            assert ("receipts_bloom", "fail") in checks
            # what is lost after the first reading is found again by the second
            await database.pool.execute("UPDATE indexer.movement SET canonical = false WHERE block_number = $1", full)
            await stands(database, node)


async def test_polling(database: Database) -> None:
    async with FakeNode(max_results=LIMIT) as node:
        node.mine(blocks=5)
        async with following(database, node, chain_config(node, socket=False)):
            await caught_up(database, node)
            node.lag = 0
            full = fill(node)
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)
            assert ("eth_getBlockReceipts", ["0x" + node.chain.canonical[full].hash.hex()]) in node.asked


async def test_polling_past_a_range_that_is_too_heavy_for_the_node(database: Database) -> None:
    """Asked again as a whole, it would time out for ever."""
    async with FakeNode() as node:
        node.mine(blocks=5)
        async with following(database, node, chain_config(node, socket=False)):
            await caught_up(database, node)
            node.fail("eth_getLogs", -32000, "execution aborted (timeout = 5s)", times=None, when=wide)
            fill(node)
            await caught_up(database, node)
            assert await stored(database) == truth(node.chain)
