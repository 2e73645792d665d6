"""The demo's chain keeps its promises at any speed: blocks stand still when they should, and what is honestly sent gets through."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from indexer.model.types import Hash32
from indexer.sandbox.actions import sign
from indexer.sandbox.anvil import Anvil
from indexer.sandbox.ledger import BLOCK_SECONDS, BLOOM, CHAIN_ID, CUSTOMERS, DEEPEST, PETALS, SLOTS, Ledger

ANA = CUSTOMERS["ana"]


@pytest.fixture(scope="module")
async def ledger() -> AsyncIterator[Ledger]:
    async with Anvil(chain_id=CHAIN_ID, block_time=BLOCK_SECONDS, slots_in_an_epoch=SLOTS) as node:
        opened = await Ledger.open(node, 1)
        async with opened.mining():
            yield opened


async def issue(ledger: Ledger, amount: int, *, unlucky: bool = False) -> Hash32:
    signed = sign(ledger.issuance(ANA, amount, loyfin=ledger.plain, programme=PETALS), BLOOM)
    return await (ledger.submit_unlucky if unlucky else ledger.submit)(signed)


async def test_blocks_are_held_back_however_long_it_takes(ledger: Ledger) -> None:
    async with ledger.held():
        tx_hash = await issue(ledger, 1, unlucky=True)
        before = await ledger.node.block_number()
        await asyncio.sleep(4 * BLOCK_SECONDS)
        assert await ledger.node.block_number() == before
        await ledger.bury([tx_hash], DEEPEST)
        assert await ledger.node.block_number() == before + DEEPEST
        assert (await ledger.mined(tx_hash)).block_number == before + 1
        await ledger.reorganise([tx_hash])
        assert not await ledger.plain.submitter.knows(tx_hash)
        head = await ledger.node.block_number()
    await ledger.out_of_reach(head)  # blocks come again
    await ledger.send_again(tx_hash)
    await ledger.mined(tx_hash)


async def test_what_waits_behind_a_dropped_transaction_is_mined_all_the_same(ledger: Ledger) -> None:
    """Anvil throws it away when it builds the next block: later than the reorganisation."""
    async with ledger.held():
        unlucky, dropped = await issue(ledger, 1, unlucky=True), await issue(ledger, 1)
        await ledger.bury([unlucky, dropped], 2)
        waiting = [await issue(ledger, 1) for _ in range(3)]
        await ledger.reorganise([unlucky])
    for tx_hash in (dropped, *waiting):
        await ledger.mined(tx_hash)
    assert not await ledger.plain.submitter.knows(unlucky)
