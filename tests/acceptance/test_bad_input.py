"""What a person meets who gives the daemon something bad: an endpoint that is not there, the wrong chain, an address without a
contract, texts of megabytes, a full disk. Each ends in words that say what to do or in a count, the process
stands, and once the cause is gone nothing is missing.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest

from indexer.model.types import Address, Hash32, hex0x
from indexer.sandbox.actions import Metadata
from indexer.sandbox.contracts import artefact
from indexer.sandbox.loyfin import create_program, deploy_look_alike, speak, speak_long_name
from indexer.sandbox.transactions import Party
from indexer.store import tokens
from indexer.store.database import Database
from tests.acceptance.world import Daemon, Ledger, World, until
from tests.fake_node import FakeNode
from tests.following import FACTORY, ISSUER, created, issued, stored, transferred, truth
from tests.simulation.world import leg_of

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]

KEY = "k3y0fTheProvider-1234567890"  # in the path of the endpoint's URL, where providers put it
FULL = "could not extend file: No space left on device"


class Installation:
    """A daemon as a process, on a fake node."""

    def __init__(self, daemon: Daemon, database: Database, token: str) -> None:
        self.daemon, self.database = daemon, database
        self._headers = {"Authorization": f"Bearer {token}"}

    async def ask(self, method: str, path: str, **body: Any) -> tuple[int, str, Any]:
        """Status, the Retry-After, and the body."""
        async with aiohttp.ClientSession(headers=self._headers) as http:
            async with http.request(method, f"{self.daemon.base}{path}", json=body or None) as response:
                text = path == "/metrics"
                found = await response.text() if text else await response.json(content_type=None)
                return response.status, response.headers.get("Retry-After", ""), found

    async def metric(self, name: str, *labels: str) -> float:
        """The sum of the samples that carry these labels."""
        _, _, text = await self.ask("GET", "/metrics")
        lines = [
            line
            for line in text.splitlines()
            if line.startswith(f"loyalty_{name}{{") and all(label in line for label in labels)
        ]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    async def problem(self, task: str) -> str | None:
        """What /v1/status says of a loop that failed."""
        _, _, seen = await self.ask("GET", "/v1/status")
        found = seen["process"]["tasks"].get(task, {}).get("problem")
        return None if found is None else str(found)

    async def register(self, nonce: int) -> tuple[int, str, Any]:
        return await self.ask("POST", "/v1/operations", brand="bloom", reference=f"op-{nonce}", legs=[leg_of(nonce)])

    async def settled(self, nonce: int) -> None:
        async def ready() -> bool:
            found = await self.database.pool.fetchval(
                "SELECT status FROM loyalty.operations WHERE reference = $1", f"op-{nonce}"
            )
            return bool(found == "ready")

        await until(ready, lambda: f"op-{nonce} is ready; {self.daemon.last_words()}")

    async def complete(self, node: FakeNode) -> None:
        async def equal() -> bool:
            return await stored(self.database) == truth(node.chain)

        await until(equal, lambda: f"the facts are the chain's; {self.daemon.last_words()}")


@asynccontextmanager
async def installed(
    database: Database, node: FakeNode, folder: Path, *, chain_id: int = 84532
) -> AsyncIterator[Installation]:
    config = folder / "indexer.toml"
    config.write_text(
        f"""
state_dir = "{folder}"
[database]
url = "{database.url}"
pool_size = 6
lease_seconds = 5
[http]
listen = "127.0.0.1:0"
[[chains]]
name = "fake"
chain_id = {chain_id}
rpc = [ {{ url = "{node.url}v2/{KEY}" }} ]
factories = [ {{ address = "{hex0x(FACTORY)}", start_block = 0 }} ]
poll_seconds = 0.1
tags_seconds = 0.3
second_look_seconds = 0.5
verify_calls_per_second = 50
[[brands]]
name = "bloom"
issuers = ["{hex0x(ISSUER)}"]
policies = [ {{ confidence = "included" }} ]
"""
    )
    async with database.pool.acquire() as conn:
        token, _ = await tokens.add(conn, "test", None, tokens.SCOPES)
    async with Daemon.running(config) as daemon:
        installation = Installation(daemon, database, token)
        await daemon.says("listening")
        yield installation
        # whatever came: it serves, it stops when it is asked to, and its log shows neither a traceback nor the key
        assert (await installation.ask("GET", "/readyz"))[0] == 200
        assert await daemon.stop() == 0, daemon.last_words()
        text = daemon.log.read_text()
        assert KEY not in text
        assert "Traceback" not in text, text


# --------------------------------------------------------------------------- endpoints


async def test_an_endpoint_that_is_not_there(database: Database, tmp_path: Path) -> None:
    async with FakeNode() as node:
        await node.stop()  # the port is nobody's now
        async with installed(database, node, tmp_path) as installation:
            daemon = installation.daemon
            told = await daemon.says("task failed", task="follow:84532")
            assert "127.0.0.1" in told["error"] and "no connection (Connection refused)" in told["error"]
            assert "check the address, the network and the provider's status" in told["error"]
            assert (await installation.problem("follow:84532") or "").startswith("Unreachable: ")
            assert await installation.metric("loop_restarts_total", 'task="follow:84532"', 'error="Unreachable"') >= 1
            assert await installation.metric("rpc_errors_total", 'error="unreachable"') >= 1
            code, _, answer = await installation.register(1)
            assert code == 201, answer
            node.mine([created(1)])
            node.mine([issued(1), transferred()], 3)
            await node.start()
            await installation.settled(1)
            await installation.complete(node)


async def test_an_endpoint_of_another_chain(database: Database, tmp_path: Path) -> None:
    async with FakeNode(chain_id=1) as node:
        node.mine([created(1)])
        node.mine([issued(1)], 3)
        async with installed(database, node, tmp_path) as installation:
            told = await installation.daemon.says("task failed", task="follow:84532")
            assert "chain 'fake' is configured with chain_id 84532, but 127.0.0.1" in told["error"]
            assert "serves chain 1: correct chain_id or the rpc url" in told["error"]
            assert await installation.problem("follow:84532") == told["error"]
            assert (await installation.register(1))[0] == 201
            assert await stored(database) == set()
            assert await database.pool.fetchval("SELECT head_number FROM indexer.chain") is None
            node.chain_id = node.chain.chain_id = 84532  # as when the URL is corrected
            await installation.settled(1)
            await installation.complete(node)


async def test_an_address_without_a_contract(database: Database, tmp_path: Path) -> None:
    async with FakeNode() as node:
        node.mine(blocks=10)
        node.set_tags(safe=9, finalized=8)
        async with installed(database, node, tmp_path) as installation:

            async def complete() -> bool:
                _, _, seen = await installation.ask("GET", "/v1/status")
                (chain,) = seen["chains"]
                return bool(chain["history"]["complete"])

            told = await installation.daemon.says(
                "no contract at a configured address: check the address and the chain, in [[chains]] factories"
            )
            assert (told["chain"], told["address"], told["level"]) == ("fake", hex0x(FACTORY), "warning")
            assert not await complete()
            node.chain.code[FACTORY] = 0
            node.mine([created(1)])
            node.mine([issued(1)], 3)
            node.set_tags(safe=12, finalized=12)
            assert (await installation.register(1))[0] == 201
            await installation.settled(1)
            await installation.complete(node)
            await until(complete, lambda: f"history is complete; {installation.daemon.last_words()}")


# --------------------------------------------------------------------------- the database


async def test_a_full_disk(database: Database, owner_dsn: str, tmp_path: Path) -> None:
    async with FakeNode() as node:
        node.mine([created(1)], 3)
        async with installed(database, node, tmp_path) as installation:
            assert (await installation.register(1))[0] == 201
            owner = await asyncpg.connect(owner_dsn)
            await owner.execute(
                f"CREATE FUNCTION public.disk_is_full() RETURNS trigger LANGUAGE plpgsql AS"
                f" $$ BEGIN RAISE EXCEPTION USING ERRCODE = '53100', MESSAGE = '{FULL}'; END $$;"
                "CREATE TRIGGER disk_is_full BEFORE INSERT ON indexer.movement EXECUTE FUNCTION public.disk_is_full();"
                "CREATE TRIGGER disk_is_full BEFORE INSERT ON indexer.operation EXECUTE FUNCTION public.disk_is_full();"
            )
            node.mine([issued(1), transferred()])
            node.mine([issued(2)], 3)
            told = await installation.daemon.says("task failed", task="follow:84532")
            assert told["error"] == f"DiskFullError: {FULL}"
            code, retry_after, answer = await installation.register(2)
            assert (code, retry_after) == (503, "1") and "repeat the request" in answer["detail"]
            assert (await installation.ask("GET", "/healthz"))[0] == 200
            await owner.execute("DROP FUNCTION public.disk_is_full() CASCADE")
            await owner.close()
            await installation.settled(1)
            assert (await installation.register(2))[0] == 201
            await installation.settled(2)
            await installation.complete(node)
            signals = await database.pool.fetch("SELECT type FROM loyalty.signals WHERE type = 'operation.ready'")
            assert len(signals) == 2


# --------------------------------------------------------------------------- what anybody can write on a chain


NOT_UTF8 = b"\xff\xfe\xc3\x28 half \xe2\x82"
CONTROLS = "\x00\x1b[2J\x1b]0;owned\x07\r\n\u202e\u2066\ufeff' OR 1=1 -- <script>alert(1)</script>"
EMPTY = {field: "" for field in ("name", "symbol", "media", "description", "contractURI", "tokenURI")}


def token(n: int) -> Address:
    return Address(bytes([0x77, n]) * 10)


async def test_programmes_with_hostile_texts(database: Database, tmp_path: Path) -> None:
    """Anybody may create a programme at a factory and call it what they like. On a real chain, to a real receiver."""
    async with Ledger.running(with_burst=True, relayers=4) as ledger:
        assert ledger.bursting is not None
        submitter, factory, issuer = ledger.loyfin.submitter, ledger.bursting.factory, Party("mallory")
        announce: Callable[..., tuple[list[bytes], bytes]] = artefact("Loyfin").log

        def programme(n: int, **texts: object) -> tuple[list[bytes], bytes]:
            named = {
                "factory": factory,
                "issuer": issuer.address,
                "loyaltyId": Hash32(bytes([n]) * 32),
                "loyalty": token(n),
            }
            return announce("LoyaltyProgramCreated", **named, **EMPTY | texts)

        async with World.of(ledger, database, tmp_path) as world:
            daemon = await world.start()
            await world.settles("before")
            stranger = await deploy_look_alike(submitter)
            megabytes = 4 * 2**20
            sent = [
                await speak_long_name(
                    submitter,
                    factory,
                    issuer=issuer.address,
                    loyalty_id=Hash32(b"\1" * 32),
                    loyalty=token(1),
                    size=megabytes,
                ),
                await speak(submitter, factory, *programme(2, name=NOT_UTF8, symbol=NOT_UTF8)),
                await speak(submitter, factory, *programme(3, name=CONTROLS, description=CONTROLS)),
                await speak(submitter, factory, *programme(4, name="\U0001f4a9" * 5000)),
                await speak(submitter, stranger, *programme(5, name="a stranger's")),
            ]
            for tx_hash in sent:
                assert (await ledger.loyfin.wait(tx_hash)).succeeded
            honest = Metadata(loyalty_id=Hash32(random.Random(7).randbytes(32)), name="An honest programme")
            await create_program(submitter, factory, issuer, honest)
            await world.settles("after")

            rows = await database.pool.fetch(
                "SELECT p.loyalty, p.name, p.description, r.reason, octet_length(r.data) AS kept FROM indexer.programme p"
                " LEFT JOIN indexer.raw_log r USING (chain_id, block_number, log_index, block_hash)"
                " WHERE p.canonical AND p.issuer = $1",
                issuer.address,
            )
            found = {row["loyalty"]: row for row in rows}
            assert found.keys() >= {token(n) for n in range(1, 5)} and token(5) not in found and len(found) == 5
            # capped in the row, and kept whole beside it
            assert found[token(1)]["name"] == "A" * 4096 and found[token(1)]["reason"] == "oversized"
            assert found[token(1)]["kept"] > megabytes
            assert found[token(4)]["name"] == "\U0001f4a9" * 4096 and found[token(4)]["reason"] == "oversized"
            # readable, with the mark of what could not be read in the place of it
            assert found[token(2)]["name"] == NOT_UTF8.decode(errors="replace") and found[token(2)]["reason"] is None
            assert found[token(3)]["name"] == CONTROLS.replace("\0", "\ufffd") == found[token(3)]["description"]
            assert (
                await database.pool.fetchval("SELECT count(*) FROM loyalty.programs WHERE name = 'An honest programme'")
                == 1
            )

            async with aiohttp.ClientSession() as http, http.get(f"{daemon.base}/metrics") as response:
                metrics = (await response.text()).splitlines()
            assert 'loyalty_quarantined_logs_total{chain="sandbox",reason="oversized"} 2.0' in metrics
            log = daemon.log.read_bytes()
            assert b"task failed" not in log and b"\x1b" not in log and b"AAAAAAAA" not in log and b"owned" not in log

            # nothing lost: every log of the two factories is a row
            question = {"address": [hex0x(address) for address, _ in ledger.factories], "fromBlock": "0x0"}
            logs = await ledger.anvil.rpc("eth_getLogs", question)
            there = {
                (int(x["blockNumber"], 16), bytes.fromhex(x["blockHash"][2:]), int(x["logIndex"], 16)) for x in logs
            }
            assert there and there <= await stored(database)

            async def ready() -> dict[str, str]:
                return {"before": "ready", "after": "ready"}

            await world.comes_to_rest(ready, finalized=False)
