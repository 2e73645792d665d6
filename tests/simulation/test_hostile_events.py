"""What anybody can have a chain say: events that do not fit their ABI, numbers at their limits, one nonce said twice.

Each ends in a count and a row; the loops go on, and what stands beside it in the block is stored and settles.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from eth_abi.abi import encode
from eth_hash.auto import keccak
from structlog.testing import capture_logs

from indexer.model.evidence import evidence_id
from indexer.model.types import Address
from indexer.store import queries
from indexer.store.database import Database
from tests.fake_node import FakeNode, LogSpec
from tests.following import (
    FACTORY,
    ISSUER,
    address_word,
    chain_config,
    created,
    eventually,
    issued,
    loyalty_id,
    token_of,
    transferred,
)
from tests.simulation.world import HOLDER, World, word

HUB = b"\xab" * 20
MOST = 2**256 - 1
NOW = {"time_s": int(time.time()) - 3600}  # unmatched evidence is judged by the clock
MODES = pytest.mark.parametrize("socket", [True, False], ids=["socket", "polling"])


# --------------------------------------------------------------------------- an ABI that does not fit


def truncated(nonce: int) -> LogSpec:
    """PointsIssued, its data cut in the middle of a word."""
    address, topics, data = issued(nonce)
    return address, topics, data[:100]


def retyped(nonce: int) -> LogSpec:
    """PointsIssued with its addresses where the ABI has numbers: a contract that was changed under the same signature."""
    address, topics, data = issued(nonce)
    return address, topics, b"\xff" * 32 + data[32:]


def another_shape(nonce: int) -> LogSpec:
    """PointsIssued with one argument less indexed."""
    address, topics, data = issued(nonce)
    return address, topics[:3], topics[3] + data


def of_a_newer_version(nonce: int) -> LogSpec:
    """An event that no ABI of ours knows."""
    address, topics, data = issued(nonce)
    return address, [keccak(b"PointsIssuedV2(address,address)"), *topics[1:]], data


@MODES
async def test_events_that_do_not_fit_their_abi_are_counted_and_kept_whole(database: Database, socket: bool) -> None:
    odd = [truncated(1), retyped(2), another_shape(3), of_a_newer_version(4), (FACTORY, [], b"\x01")]
    async with FakeNode() as node:
        world = World(database, node, socket=socket)
        async with world.running():
            await world.caught_up()
            waiting = await world.register(1)
            beside = await world.register(5)
            node.mine([created(1), odd[0], issued(5), *odd[1:], transferred()])
            node.mine(blocks=3)
            node.set_tags(safe=2, finalized=0)
            await world.caught_up()
            await world.reaches(beside, "ready")
            await world.intact()
            assert await world.state(waiting) == "pending"
            rows = await database.pool.fetch(
                "SELECT topics, data, reason, error FROM indexer.raw_log ORDER BY log_index"
            )
            assert [(list(row["topics"]), row["data"]) for row in rows] == [(topics, data) for _, topics, data in odd]
            assert [row["reason"] for row in rows] == ["undecodable"] * 3 + ["unknown_topic"] * 2
            assert [row["error"] for row in rows] == [
                "expected at least 224 bytes of data, got 100",
                "loyalty: does not fit its type",
                "PointsIssued with 3 topics",
                None,
                None,
            ]
            assert world.sample("quarantined_logs_total", chain="fake", reason="undecodable") == 3
            assert world.sample("quarantined_logs_total", chain="fake", reason="unknown_topic") == 2
            assert world.sample("loop_restarts_total", task="follow", error="Undecodable") == 0


async def test_history_quarantines_as_following_does(database: Database) -> None:
    async with FakeNode() as node:
        world = World(database, node)
        node.mine([created(1), truncated(1), of_a_newer_version(2), issued(3)], 10)
        node.set_tags(safe=9, finalized=8)
        async with world.running():
            await world.intact()
            assert world.sample("quarantined_logs_total", chain="fake", reason="undecodable") == 1
            assert world.sample("quarantined_logs_total", chain="fake", reason="unknown_topic") == 1
            await world.reaches(await world.register(3), "ready")


# --------------------------------------------------------------------------- numbers at their limits


def moved(event: str, nonce: int, *, bucket: int, amount: int, data: bytes = b"") -> LogSpec:
    """PointsIssued or PointsRedeemed of programme 1 with every number as given."""
    topic = keccak(event.encode() + b"(address,address,bytes32,address,address,uint256,uint256,bytes32,bytes32,bytes)")
    types = ["address", "address", "uint256", "uint256", "bytes32", "bytes32", "bytes"]
    values = [
        "0x" + token_of(1).hex(),
        "0x" + HOLDER.hex(),
        bucket,
        amount,
        nonce.to_bytes(32, "big"),
        b"\xff" * 32,
        data,
    ]
    return FACTORY, [topic, address_word(FACTORY), address_word(ISSUER), loyalty_id(1)], encode(types, values)


def passed(bucket: int, amount: int) -> LogSpec:
    topic = keccak(b"LoyaltyTransfer(address,address,address,address,uint256,uint256)")
    topics = [topic, address_word(token_of(1)), address_word(HOLDER), address_word(HOLDER)]
    return token_of(1), topics, encode(["address", "uint256", "uint256"], ["0x" + (b"\x41" * 20).hex(), bucket, amount])


@MODES
async def test_the_largest_numbers_settle_and_add_up(database: Database, socket: bool) -> None:
    """Twelve times 2^256 - 1 is more than a uint256, and more than 78 digits: sums must hold it."""
    async with FakeNode(options=NOW) as node:
        world = World(database, node, socket=socket)
        terms: dict[str, Any] = {
            "amount": MOST, "expiresAt": str(MOST), "deadline": str(MOST), "operationHash": "0x" + "ff" * 32,
        }  # fmt: skip
        async with world.running(unmatched_quiet_ms=0):
            await world.caught_up()
            exact = await world.register(MOST, reference="exact", **terms)
            differs = await world.register(MOST - 1, reference="differs", **terms | {"amount": 1})
            events = [moved("PointsIssued", MOST - n, bucket=MOST, amount=MOST, data=b"\xff" * 5000) for n in range(12)]
            node.mine([created(1), *events, *[passed(MOST, MOST)] * 11])
            node.mine(blocks=3)
            node.set_tags(safe=2, finalized=2)
            await world.caught_up()
            await world.reaches(exact, "ready")
            await world.reaches(differs, "conflict")
            await world.intact()
            conflict = await database.pool.fetchval(
                "SELECT conflicts FROM loyalty.operations WHERE reference = 'differs'"
            )
            assert conflict[0]["differences"] == [{"term": "amount", "expected": "1", "found": str(MOST)}]
            payload = await database.pool.fetchval("SELECT payload FROM loyalty.signals WHERE type = 'operation.ready'")
            assert payload["data"]["operation"]["legs"][0]["amount"] == str(MOST)
            assert payload["data"]["operation"]["legs"][0]["deadline"] == str(MOST)
            until = await database.pool.fetchval(
                "SELECT indexer.executable_until(id) FROM indexer.operation WHERE reference = 'exact'"
            )
            assert until is None  # beyond 2^40 is never
            async with database.pool.acquire() as conn:
                of_holder = await queries.balances_of(conn, Address(HOLDER))
                of_other = await queries.balances_of(conn, Address(b"\x41" * 20))
            assert [(row.expires_at, row.balance) for row in of_holder] == [(str(MOST), str(MOST))]
            assert [(row.expires_at, row.balance) for row in of_other] == [(str(MOST), str(11 * MOST))]
            # what is cut (5,000 bytes of data) is kept whole
            assert world.sample("quarantined_logs_total", chain="fake", reason="oversized") == 12
            await eventually(lambda: _told(world, 10))


# --------------------------------------------------------------------------- one nonce, two emitters


def with_hub(node: FakeNode, **settings: Any) -> Any:
    chain = chain_config(node, **settings)
    factory = {"address": "0x" + FACTORY.hex(), "start_block": 0, "event_hub": "0x" + HUB.hex()}
    return chain.model_validate(chain.model_dump() | {"factories": [factory]})


@MODES
@pytest.mark.parametrize("second", [HUB, token_of(1)], ids=["the hub", "the token"])
async def test_a_nonce_said_by_two_emitters_settles_once(database: Database, socket: bool, second: bytes) -> None:
    """Stored both, counted and told once; it settles nothing again, and is nobody's unmatched evidence."""
    async with FakeNode(options=NOW) as node:
        world = World(database, node, socket=socket, chain=with_hub)
        with capture_logs() as logs:
            async with world.running(unmatched_quiet_ms=0):
                await world.caught_up()
                once = await world.register(1)
                node.mine([created(1), issued(1), issued(1, emitter=second)])
                node.mine([issued(1, emitter=second, amount=11), issued(2)], 3)
                node.set_tags(safe=3, finalized=0)
                await world.caught_up()
                await world.reaches(once, "ready")
                own = evidence_id(84532, FACTORY, "loyfin.issuance", ISSUER, bytes.fromhex(word(2)[2:]))
                await eventually(lambda: _told(world))
                for _ in range(3):
                    await world.looked()
                assert await world.unmatched() == [own]
                # another operation that states the same nonce is refused, and one by wallet and amount finds nothing left
                spare = await world.register(
                    7, reference="spare", nonce=None, operationHash=None, match="wallet_amount", amount=11
                )
                await world.looked()
                assert (await world.state(once), await world.state(spare)) == ("ready", "pending")
                assert await world.trace(once) == ["ready"]
                evidence = await world.evidence(once)
                assert [(each["blockNumber"], each["logIndex"]) for each in evidence] == [("1", 1)]
                assert await database.pool.fetchval("SELECT count(*) FROM indexer.movement WHERE canonical") == 4
                assert world.sample("repeated_events_total", chain="fake", kind="loyfin.issuance") == 2
                await world.intact((FACTORY, HUB))
        told = [entry for entry in logs if "second event" in entry["event"]]
        assert [(entry["block"], entry["log_index"]) for entry in told] == [(1, 2), (2, 0)]
        assert {entry["log_level"] for entry in told} == {"warning"}


async def _told(world: World, times: int = 1) -> bool:
    await world.touch()  # unmatched evidence is looked for in every tenth pass
    return len(await world.unmatched()) == times


@MODES
async def test_a_strangers_copy_touches_nothing(database: Database, socket: bool) -> None:
    """Another contract copies nonce and hash of an action that is still waited for; so does a token, for another programme."""
    async with FakeNode() as node:
        world = World(database, node, socket=socket)
        async with world.running():
            await world.caught_up()
            due = await world.register(1)
            node.mine([created(1), created(2)])
            node.mine([issued(1, emitter=b"\x66" * 20), issued(1, n=1, emitter=token_of(2))])
            node.mine(blocks=3)
            node.set_tags(safe=4, finalized=4)
            await world.caught_up()
            await world.looked()
            assert (await world.state(due), await world.evidence(due)) == ("pending", [])
            assert await database.pool.fetchval("SELECT count(*) FROM indexer.movement") == 0
            assert world.sample("lookalikes_total", chain="fake", reason="foreign_programme") == 1
            node.mine([issued(1)])
            node.mine(blocks=2)
            await world.caught_up()
            await world.tags(safe=6, finalized=4)
            await world.reaches(due, "ready")
            assert await world.trace(due) == ["ready"]
