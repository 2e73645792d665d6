"""The daemon behind a pooler of transactions: everything works, leases and LISTEN go past it, and a lost ear costs latency only."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from indexer.model.types import hex0x
from indexer.store.database import Database
from tests.acceptance.world import BRAND, CONSOLE, Ledger, World, until
from tests.pooler import POOLERS, Relay, opened

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]

SESSIONS = 3


@pytest.mark.parametrize("kind", POOLERS)
async def test_a_daemon_behind_a_pooler_of_transactions(
    ledger: Ledger, database: Database, tmp_path: Path, kind: str
) -> None:
    async with (
        World.of(ledger, database, tmp_path) as world,
        opened(kind, database.url, size=SESSIONS) as pooler,
        Relay.before(database.url, whole_sessions=True) as direct,
    ):
        mistaken = await world.start(environ={"INDEXER_DATABASE__URL": pooler.url(database.url)})
        assert await mistaken.ended() == 2 and "direct_url" in mistaken.last_words()
        environ = {
            "INDEXER_DATABASE__URL": pooler.url(database.url),
            "INDEXER_DATABASE__DIRECT_URL": direct.url(database.url),
        }
        daemon = await world.start(environ=environ)
        await daemon.says("listening")

        async def ear(expected: str) -> None:
            async def told() -> bool:
                return bool((await world.status(daemon))["process"]["wakeups"] == expected)

            await until(told, lambda: f"the status says {expected}; {daemon.last_words()}")

        await ear("listening")
        # the whole way, with many at once: HTTP and what is pulled through the pooler, the loops and the ear past it
        signed = [world.action(50 + nth) for nth in range(8)]
        _, start = await world.request("GET", f"/v1/signals?after=now&brand={BRAND}")
        await asyncio.gather(*(world.register(f"order {nth}", one.action) for nth, one in enumerate(signed)))
        await asyncio.gather(*(world.submit(one) for one in signed))
        await asyncio.gather(*(world.shop.hears(f"order {nth}", "ready") for nth in range(len(signed))))
        _, pulled = await world.request(
            "GET", f"/v1/signals?brand={BRAND}&limit=500&wait=2&after={start['nextCursor']}"
        )
        assert {e["data"]["operation"]["reference"] for e in pulled["data"]} >= {f"order {n}" for n in range(8)}
        _, claims = await world.request("POST", "/v1/fulfilments/claim", json={"consumer": "desk", "max": 5})
        assert len(claims["data"]) == 5
        for one in claims["data"]:
            path, words = f"/v1/operations/{one['operationId']}/fulfil", {"generation": 1, "claim": one["claim"]}
            assert (await world.request("POST", path, json=words))[1]["outcome"] == "fulfilled"
        await world.shop.hears(claims["data"][0]["reference"], "fulfilled")
        pooled = await database.pool.fetchval(
            # asyncpg's RESET ALL takes the name away that PgBouncer gave a session
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name IN ('', 'indexer')"
            " AND backend_type = 'client backend'"
        )
        assert 0 < pooled - database.pool.get_size() <= SESSIONS  # the rest is this test's own
        if isinstance(pooler, Relay):
            assert pooler.changes > 20, "no transaction met another session than the one before"

        # commands too
        command = await asyncio.create_subprocess_exec(
            *(*CONSOLE, "operations", "show", "order 1", "--json", "--config", str(world.config)),
            env=os.environ | environ,
            stdout=asyncio.subprocess.PIPE,
        )
        said, _ = await command.communicate()
        assert json.loads(said)["reference"] == "order 1"

        # deaf: nobody new reaches the server, and the ear is cut off; what others write is found all the same
        direct.refusing = True
        await database.pool.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'indexer:listen'"
        )
        await ear("polling")
        late = world.action(70)
        await world.submit(late)
        action = late.action
        leg = {
            "kind": "loyfin.issuance",
            "chainId": str(action.chain_id),
            "factory": hex0x(action.verifying_contract),
            "issuer": hex0x(action.issuer),
            "holder": hex0x(action.holder),
            "loyaltyId": hex0x(action.loyalty_id),
            "amount": "70",
            "nonce": hex0x(action.nonce),
        }
        await database.pool.fetchval(
            "SELECT loyalty.register_operation($1)", {"brand": BRAND, "reference": "late", "legs": [leg]}
        )
        began = time.monotonic()
        await world.shop.hears("late", "ready")
        assert time.monotonic() - began < 15
        assert (await world.status(daemon))["process"]["wakeups"] == "polling"
        direct.refusing = False
        await ear("listening")

        # the pooler loses everybody, as when it is restarted: the daemon goes on
        if isinstance(pooler, Relay):
            pooler.cut()
        await world.settles("after")
        assert not daemon.said("task failed")
        assert await daemon.stop() == 0
