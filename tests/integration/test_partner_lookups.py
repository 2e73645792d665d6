"""Questions about a partner's transactions, answered from a chain: held, failed, absent, of a branch that lost; and final at last."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from typing import Any

import asyncpg
import pytest

from indexer.chain import lookups
from indexer.chain.lookups import TRANSFER, answer_lookups
from indexer.chain.pool import Node, Pool
from indexer.chain.rpc import Rpc
from indexer.store.database import Database
from indexer.store.leases import Leases
from indexer.store.lookups import ask_chain
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics
from tests.fake_node import FakeChain, FakeNode, LogSpec
from tests.following import address_word, eventually
from tests.partner_office import BRAND, counted

TOKEN, MINTER, WALLET = b"\x70" * 20, b"\x71" * 20, b"\x40" * 20


def mint(amount: int) -> LogSpec:
    return (TOKEN, [TRANSFER, address_word(MINTER), address_word(WALLET)], amount.to_bytes(32, "big"))


async def test_a_transaction_is_looked_up_until_its_block_is_final(database: Database) -> None:
    chain = FakeChain()
    metrics, wakeups = Metrics(), Wakeups()
    async with FakeNode(chain=chain) as node:
        node.mine(blocks=3)
        held = node.mine([mint(250)])
        tx = held.txs[-1][0]
        await database.pool.execute(
            "INSERT INTO indexer.chain (chain_id, name, head_number, finalized_number) VALUES ($1, 'fake', 4, 0)",
            chain.chain_id,
        )
        await database.pool.execute("INSERT INTO indexer.brand (name) VALUES ($1)", BRAND)
        async with database.pool.acquire() as conn:
            await ask_chain(conn, [(chain.chain_id, tx), (chain.chain_id, tx), (chain.chain_id, b"\x09" * 32)])

        async def run() -> None:
            async with Rpc(node.url, timeout=5) as rpc, Leases(database, ttl=15).hold("lookups:1") as lease:
                source = Pool.of(rpc, chain.chain_id).source()
                await answer_lookups("fake", chain.chain_id, source, lease, wakeups, metrics=metrics)

        async def answer(of: bytes = tx) -> asyncpg.Record:
            row = await database.pool.fetchrow("SELECT * FROM indexer.chain_lookup WHERE tx_hash = $1", of)
            assert row is not None
            return row

        async def poke() -> None:
            """As if the last answers were a minute old."""
            await database.pool.execute(
                "UPDATE indexer.chain_lookup SET answered_at = answered_at - interval '2 minutes'"
            )
            wakeups.poke("heads")

        running = asyncio.create_task(run())
        try:

            async def answered() -> bool:
                return (await answer())["answered_at"] is not None and (await answer(b"\x09" * 32))[
                    "answered_at"
                ] is not None

            await eventually(answered)
            found = await answer()
            assert (found["block_number"], found["block_hash"], found["success"]) == (held.number, held.hash, True)
            assert [dict(m) for m in _moved(found)] == [
                {"token": "0x" + TOKEN.hex(), "from": "0x" + MINTER.hex(), "to": "0x" + WALLET.hex(), "value": "250"}
            ]
            assert not found["final"] and (await answer(b"\x09" * 32))["block_number"] is None

            # a node that does not know it, while its block stands, is behind: the answer stays, whether we hold that block or not
            node.lie("eth_getTransactionReceipt", lambda _, __: None, times=None)
            other = FakeChain(salt=9)
            other.mine(blocks=held.number)
            for doubt in ("error", "contradicted"):
                before = counted(metrics, "loyalty_chain_lookups_total", "outcome").get(doubt, 0)
                await poke()

                async def doubted(doubt: str = doubt, before: float = before) -> bool:
                    return counted(metrics, "loyalty_chain_lookups_total", "outcome").get(doubt, 0) > before

                await eventually(doubted)
                assert (await answer())["block_hash"] == held.hash
                if doubt == "error":
                    await database.pool.execute(
                        "INSERT INTO indexer.block (chain_id, number, hash, parent_hash, time_ms) VALUES ($1, $2, $3, $3, 0)",
                        chain.chain_id,
                        held.number,
                        held.hash,
                    )
                    # … and has another block there
                    node.lie("eth_getBlockByNumber", lambda *_: other.header(other.head), times=None)
            node.heal()
            await database.pool.execute("UPDATE indexer.block SET canonical = false")

            # a reorganisation takes it away, and puts it into another block
            node.reorganise(1, [[]])
            await poke()

            async def absent() -> bool:
                return (await answer())["block_number"] is None

            await eventually(absent)
            again = node.mine([mint(250)])
            await poke()

            async def back() -> bool:
                if (await answer())["block_hash"] != again.hash:
                    await poke()
                return bool((await answer())["block_hash"] == again.hash)

            if again.txs[-1][0] == tx:
                await eventually(back)

            # what our follower contradicts is no answer
            await database.pool.execute(
                "INSERT INTO indexer.block (chain_id, number, hash, parent_hash, time_ms) VALUES ($1, $2, $3, $3, 0)",
                chain.chain_id,
                again.number,
                b"\x0c" * 32,
            )
            async with database.pool.acquire() as conn:
                await ask_chain(conn, [(chain.chain_id, again.txs[-1][0])])
            await poke()

            doubts = counted(metrics, "loyalty_chain_lookups_total", "outcome")["contradicted"]

            async def contradicted() -> bool:
                return counted(metrics, "loyalty_chain_lookups_total", "outcome")["contradicted"] > doubts

            await eventually(contradicted)
            await database.pool.execute("DELETE FROM indexer.block WHERE hash = $1", b"\x0c" * 32)
            await database.pool.execute("UPDATE indexer.chain SET finalized_number = 100")
            await poke()

            async def final() -> bool:
                row = await answer(again.txs[-1][0])
                if not row["final"]:
                    await poke()
                return bool(row["final"] and row["block_hash"] == again.hash)

            await eventually(final)
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


async def test_a_transaction_that_nobody_can_look_up_holds_up_no_other(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "AT_ONCE", 5)
    chain = FakeChain()
    metrics, wakeups = Metrics(), Wakeups()
    async with FakeNode(chain=chain) as node:
        bad = [chain.mine([mint(n + 1)]).txs[-1][0] for n in range(7)]
        good = chain.mine([mint(250)]).txs[-1][0]
        spoilt = {"0x" + tx.hex(): number for number, tx in enumerate(bad)}
        odd: list[dict[str, object]] = [
            {"blockNumber": "0xzz"}, {"blockHash": "0x12"}, {"status": "fine"}, {"logs": [{}]}, {"transactionHash": "0x00"},
            {"logs": None}, {"blockNumber": hex(2**70)},
        ]  # fmt: skip
        node.lie(
            "eth_getTransactionReceipt",
            lambda params, true: true | odd[spoilt[params[0]] % len(odd)] if params[0] in spoilt else true,
            times=None,
        )
        node.lie("eth_getBlockReceipts", lambda _, true: [each | {"status": "fine"} for each in true], times=1)
        await database.pool.execute(
            "INSERT INTO indexer.chain (chain_id, name, head_number, finalized_number) VALUES ($1, 'fake', 30, 0)",
            chain.chain_id,
        )
        async with database.pool.acquire() as conn:
            await ask_chain(conn, [(chain.chain_id, tx) for tx in [*bad, good]])
            # the good one comes last
            await conn.execute(
                "UPDATE indexer.chain_lookup SET answered_at = now() - interval '1 h' WHERE tx_hash = $1", good
            )

        async def run() -> None:
            async with Rpc(node.url, timeout=5) as rpc, Leases(database, ttl=15).hold("lookups:1") as lease:
                await answer_lookups(
                    "fake", chain.chain_id, Pool.of(rpc, chain.chain_id).source(), lease, wakeups, metrics=metrics
                )

        running = asyncio.create_task(run())
        try:

            async def answered() -> bool:
                wakeups.poke("heads")
                return not running.done() and bool(
                    await database.pool.fetchval(
                        "SELECT block_hash IS NOT NULL FROM indexer.chain_lookup WHERE tx_hash = $1", good
                    )
                )

            await eventually(answered)
            assert counted(metrics, "loyalty_chain_lookups_total", "outcome")["error"] >= 5
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


def _moved(row: asyncpg.Record) -> list[dict[str, str]]:
    found: list[dict[str, str]] = row["transfer"]
    return found


async def test_which_transaction_a_receipt_is_of_is_not_for_one_endpoint_to_say(database: Database) -> None:
    """The receipts prove themselves, under the hashes of each other's transactions: two others say otherwise, and are believed."""
    chain = FakeChain()

    def exchanged(_: Any, receipts: Any) -> Any:
        renamed = {
            "0x" + ours.hex(): "0x" + theirs.hex()
            for (ours, _), (theirs, _) in zip(block.txs, block.txs[::-1], strict=True)
        }
        found = [
            each
            | {"transactionHash": renamed[each["transactionHash"]]}
            | {"logs": [log | {"transactionHash": renamed[log["transactionHash"]]} for log in each["logs"]]}
            for each in chain.receipts(block)
        ]
        if isinstance(receipts, list):
            return found
        return next(each for each in found if each["transactionHash"] == receipts["transactionHash"])

    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(FakeNode(chain=chain)) for _ in range(3)]
        block = nodes[0].mine([mint(250), mint(100)])
        for method in ("eth_getBlockReceipts", "eth_getTransactionReceipt"):
            nodes[0].lie(method, exchanged, times=None)
        tx = block.txs[-1][0]
        await database.pool.execute(
            "INSERT INTO indexer.chain (chain_id, name, head_number, finalized_number) VALUES ($1, 'fake', 1, 0)",
            chain.chain_id,
        )
        async with database.pool.acquire() as conn:
            await ask_chain(conn, [(chain.chain_id, tx)])

        async def run() -> None:
            async with AsyncExitStack() as open_ones, Leases(database, ttl=15).hold("lookups:1") as lease:
                rpcs = [await open_ones.enter_async_context(Rpc(node.url, timeout=5)) for node in nodes]
                pool = Pool(
                    "fake", chain.chain_id, [Node(rpc, place=place) for place, rpc in enumerate(rpcs)], quorum=2
                )
                await answer_lookups("fake", chain.chain_id, pool.source(), lease, Wakeups(), metrics=Metrics())

        running = asyncio.create_task(run())
        try:

            async def answered() -> bool:
                return bool(await database.pool.fetchval("SELECT block_number IS NOT NULL FROM indexer.chain_lookup"))

            await eventually(answered)
            found = await database.pool.fetchrow("SELECT * FROM indexer.chain_lookup")
            assert found is not None and [moved["value"] for moved in _moved(found)] == ["100"]
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
