"""What one endpoint refuses for good is asked of another: old blocks, a method it has not, a block too full, addresses it will not take."""

from __future__ import annotations

from typing import Any

import pytest

from indexer.store.database import Database
from tests.fake_node import FakeChain, FakeNode
from tests.following import created, history_filled, issued
from tests.simulation.test_pool import world_of


def old(params: list[Any]) -> bool:
    """Whether logs of history are asked for."""
    return "fromBlock" in params[0] and int(params[0]["fromBlock"], 16) < 40


def single(params: list[Any]) -> bool:
    return bool("fromBlock" in params[0] and params[0]["fromBlock"] == params[0]["toBlock"])


def ranges(params: list[Any]) -> bool:
    return "fromBlock" in params[0]


REFUSALS = [
    pytest.param(
        old, -32602, "Archive requests require a personal token. Get one at: https://example.org", id="too old"
    ),
    pytest.param(ranges, 4444, "pruned history unavailable: requested 3, earliest available 20000000", id="pruned"),
    pytest.param(ranges, -32601, "rpc method is not whitelisted", id="no such method"),
    pytest.param(ranges, -32005, "limit exceeded", id="no such method, said of every range"),
    pytest.param(ranges, -32701, "Please specify an address in your request", id="another filter"),
    pytest.param(ranges, 35, "ranges over 10000 blocks are not supported on free plan", id="a plan's depth"),
]


@pytest.mark.parametrize(("when", "code", "message"), REFUSALS)
async def test_history_is_read_elsewhere(database: Database, when: Any, code: int, message: str) -> None:
    chain = FakeChain()
    async with FakeNode(chain=chain) as first, FakeNode(chain=chain) as second:
        chain.mine([created(1)])
        for n in range(60):
            chain.mine([issued(n)])
        chain.safe = chain.finalized = 50
        first.fail("eth_getLogs", code, message, times=None, when=when)
        world = world_of(database, [first, second], socket=when is old)
        async with world.running():
            await history_filled(database, chain.chain_id)
            await world.caught_up()
            await world.intact()
        assert second.calls["eth_getLogs"] >= 1
        assert first.calls["eth_getLogs"] < 30  # asked now and then at most: it will not change its mind


async def test_history_is_read_elsewhere_while_one_is_not_paid_for(database: Database) -> None:
    chain = FakeChain()
    async with FakeNode(chain=chain) as first, FakeNode(chain=chain) as second:
        chain.mine([created(1)])
        for n in range(60):
            chain.mine([issued(n)])
        chain.safe = chain.finalized = 50
        said = '{"jsonrpc":"2.0","id":null,"error":{"code":-32000,"message":"monthly quota exceeded"}}'
        first.reply("eth_getLogs", said, status=402, times=None)
        world = world_of(database, [first, second], socket=False)
        async with world.running():
            await history_filled(database, chain.chain_id)
            await world.caught_up()
            await world.intact()


async def test_a_block_too_full_for_one_without_receipts_is_read_elsewhere(database: Database) -> None:
    chain = FakeChain()
    async with FakeNode(chain=chain, max_results=10) as first, FakeNode(chain=chain) as second:
        chain.mine([created(1)])
        full = chain.mine([issued(n) for n in range(40)])
        chain.mine(blocks=20)
        chain.safe = chain.finalized = 20
        first.fail("eth_getBlockReceipts", -32601, "the method does not exist/is not available", times=None)
        world = world_of(database, [first, second], socket=False)
        async with world.running():
            await history_filled(database, chain.chain_id)
            await world.intact()
        assert (full.number, second.calls["eth_getLogs"] >= 1) == (2, True)
