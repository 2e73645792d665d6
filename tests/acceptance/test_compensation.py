"""Fulfilled, reorganised, mined again: the whole way over a real chain, a daemon and a shop that is never asked twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from indexer.model.types import Hash32
from indexer.store.database import Database
from tests.acceptance.world import CHAIN_ID, Ledger, World, until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]


async def ready(world: World, reference: str) -> tuple[Hash32, str]:
    """An order that the shop was told to hand over: its transaction, and the signal's id."""
    signed = world.action(50)
    await world.register(reference, signed.action)
    tx = await world.submit(signed)
    return tx, str((await world.shop.hears(reference, "ready")).id)


async def exposures(world: World) -> dict[str, str]:
    rows = await world.database.pool.fetch("SELECT reference, outcome FROM loyalty.exposures")
    return {row["reference"]: row["outcome"] for row in rows}


async def claimed(world: World) -> list[Any]:
    rows: list[Any] = await world.database.pool.fetch(
        "SELECT reference FROM indexer.claim_fulfilments(NULL, 'worker', 100, '1 minute')"
    )
    return rows


async def test_fulfilled_reorganised_and_mined_again(database: Database, tmp_path: Path) -> None:
    async with Ledger.running(seed=5, relayers=4) as ledger, World.of(ledger, database, tmp_path) as world:
        daemon = await world.start()
        shop, references = world.shop, ("handed over", "too late")
        transactions = {reference: await ready(world, reference) for reference in references}
        assert await world.fulfil("handed over", 1) == "fulfilled"
        await shop.hears("handed over", "fulfilled")

        # ---- undone: both are taken back, and one of them is out of the house
        await world.observer.look()
        depth = max([await ledger.depth_of(tx) or 1 for tx, _ in transactions.values()]) + 2
        await ledger.anvil.reorg(depth)
        for reference in references:
            reverted = await shop.hears(reference, "reverted")
            assert reverted.body["data"]["supersedes"] == transactions[reference][1]
        assert await exposures(world) == {"handed over": "fulfilled"}
        assert await world.fulfil("too late", 1) == "reverted"  # the news reached the counter too late
        assert await world.fulfil("handed over", 1) == "fulfilled"  # and this was said before
        assert await exposures(world) == {"handed over": "fulfilled", "too late": "reverted"}
        assert await claimed(world) == []

        # ---- mined again
        for tx, _ in transactions.values():
            await ledger.loyfin.submitter.resend(tx)
        for reference in references:
            restored = await shop.hears(reference, "restored")
            assert restored.generation == 2 and restored.body["data"]["supersedes"] is None
        assert await exposures(world) == {} and await claimed(world) == []
        await world.judge(dict.fromkeys(references, "fulfilled"), finalized=True)

        # ---- looked at all over again, as after a replay from the first block: not a word
        pool = database.pool
        said = await pool.fetch("SELECT * FROM indexer.outbox ORDER BY position")
        received = len(shop.received)
        await pool.execute("UPDATE indexer.chain SET unmatched_cursor = NULL")
        await pool.execute("INSERT INTO indexer.touched_operation (operation_id) SELECT id FROM indexer.operation")
        await pool.execute(
            "INSERT INTO indexer.touched_blocks (chain_id, from_block, to_block) SELECT $1, 0, head_number FROM indexer.chain",
            CHAIN_ID,
        )

        async def at_rest() -> bool:
            left = "SELECT (SELECT count(*) FROM indexer.touched_blocks) + (SELECT count(*) FROM indexer.touched_operation)"
            return await pool.fetchval(left) == 0

        await until(at_rest, lambda: f"everything was looked at again; {daemon.last_words()}")
        await ledger.mine_on(5)
        assert await pool.fetch("SELECT * FROM indexer.outbox ORDER BY position") == said
        assert len(shop.received) == received
        for reference in references:
            assert len({got.id for got in shop.heard(reference, "ready")}) == 1
            assert len({got.id for got in shop.heard(reference, "restored")}) == 1
            assert len({got.id for got in shop.heard(reference, "finalized")}) == 1
        assert await daemon.stop() == 0
