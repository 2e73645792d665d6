"""History from two endpoints, one of which leaves out one log in ten thousand without a word: found, repaired, counted.

The daemon as a process reads it first from that one; the second look asks the other. Neither offers receipts, so two readings
are all that there is to go by.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from indexer.store.database import Database
from tests.acceptance.world import Daemon
from tests.bench.history import CHAIN_ID, FACTORY, Shape
from tests.bench.measure import node, postgres, tree_cpu

ONE_IN = 10_000
GROWING = 1_000  # blocks that come meanwhile: an endpoint that stands still has no vote
PATIENCE = 1_800.0  # seconds
NOTE = "From the start of the process. Its windows of 10,000 blocks are paced by verify_calls_per_second, here at its default."


async def run(scale: float) -> dict[str, Any]:
    shape = Shape(blocks=GROWING + max(1_000, round(100_000 * scale)), per_block=10, growing=GROWING, withheld=ONE_IN)
    upto = shape.blocks - GROWING
    async with postgres() as server, node(shape) as source, await Database.connect(server.url) as database:
        assert source.withholding_url is not None
        with tempfile.TemporaryDirectory(prefix="indexer-bench-") as folder:
            config = Path(folder, "indexer.toml")
            config.write_text(_config(server.url, source.withholding_url, source.url))
            began = time.perf_counter()
            async with Daemon.running(config) as daemon:
                await _until(database, _FILLED)
                filled, first = time.perf_counter() - began, await _stored(database, upto)
                await _until(database, _VERIFIED)
                verified, cpu = time.perf_counter() - began, tree_cpu(daemon.process.pid)
                looks = daemon.said("a second look found differences, and repaired them")
        true = upto * shape.per_block + shape.programmes
        return {
            "logs": true,
            "withheld": sum(at % ONE_IN == ONE_IN // 2 for at in range(true)),
            "missing_after_backfill": true - first,
            "found": sum(look["missing"] for look in looks),
            "missing_in_the_end": true - await _stored(database, upto),
            "backfill_seconds": round(filled, 1),
            "second_look_seconds": round(verified - filled, 1),
            "cpu_seconds": round(cpu, 1),
        }


_FILLED = "SELECT history_complete FROM indexer.chain"
_VERIFIED = """
    SELECT NOT EXISTS (SELECT FROM indexer.coverage c JOIN indexer.chain h USING (chain_id)
     WHERE c.verdict = 'unverified' AND c.emitter <> '' AND c.blocks && int8range(0, $1))
"""


async def _until(database: Database, condition: str) -> None:
    arguments = (
        [] if condition is _FILLED else [await database.pool.fetchval("SELECT finalized_number FROM indexer.chain")]
    )
    async with asyncio.timeout(PATIENCE):
        while not await database.pool.fetchval(condition, *arguments):
            await asyncio.sleep(0.2)


async def _stored(database: Database, upto: int) -> int:
    count: int = await database.pool.fetchval(
        """
        SELECT (SELECT count(*) FROM indexer.movement WHERE canonical AND block_number <= $1)
             + (SELECT count(*) FROM indexer.programme WHERE canonical AND block_number <= $1)
        """,
        upto,
    )
    return count


def _config(database: str, first: str, second: str) -> str:
    return f"""
        state_dir = "/nonexistent"
        [database]
        url = "{database}"
        [http]
        listen = "127.0.0.1:0"
        [[chains]]
        name = "bench"
        chain_id = {CHAIN_ID}
        rpc = [ {{ url = "{first}" }}, {{ url = "{second}" }} ]
        factories = [ {{ address = "0x{FACTORY.hex()}", start_block = 1 }} ]
        second_look_seconds = 1
    """


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of text for people."""
    return [("", ""), *((key.replace("_", " "), f"{value:,}") for key, value in result.items())]
