"""Reading again beside a daemon that runs, on a real chain: nothing differs, and nobody hears anything twice."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.acceptance.world import CONSOLE, World, until


async def command(world: World, *arguments: str) -> tuple[int, dict[str, Any]]:
    process = await asyncio.create_subprocess_exec(
        *(*CONSOLE, *arguments, "--config", str(world.config), "--json"), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    return process.returncode or 0, json.loads(out)


async def test_a_replay_from_the_first_block_beside_the_daemon(world: World) -> None:
    daemon = await world.start()
    await daemon.says("listening")
    small, large = await asyncio.gather(world.settles("small"), world.settles("large", 250))

    async def finalized() -> bool:
        told = await world.database.pool.fetchval("SELECT finalized_number FROM indexer.chain")
        return told is not None and told > max(
            int(each.body["data"]["evidence"][0]["blockNumber"]) for each in (small, large)
        )

    await until(finalized, "finalized evidence")

    async def told() -> list[Any]:
        rows = await world.database.pool.fetch(
            "SELECT id FROM indexer.outbox WHERE type = 'operation.ready' ORDER BY 1"
        )
        return [row["id"] for row in rows]

    before = await told()
    (replayed, replay), (audited, audit), (checked, check) = await asyncio.gather(
        command(world, "replay", "sandbox", "--from", "0"),
        command(world, "audit", "sandbox", "--from", "0"),
        command(world, "config", "check", "--online"),
    )
    assert (replayed, audited, checked) == (0, 0, 0), (replay, audit, check)
    assert replay["ok"] and audit["ok"] and replay["logs"] > 0 and int(replay["toBlock"]) > 0
    (chain,) = check["chains"]
    assert chain["endpoints"][0]["receipts"] and chain["websocket"]["first_head_seconds"] is not None
    await world.settles("after")
    assert len(await told()) == len(before) + 1
    assert all(len(world.shop.heard(reference, "ready")) == 1 for reference in ("small", "large"))
