"""Schema `loyalty`, as programs that are not ours read it: the views on real rows, documented, and found by index."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from decimal import Decimal
from itertools import count
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import pytest

from indexer.model.types import Address
from indexer.store import queries, sql_users
from indexer.store.database import Database
from indexer.store.overview import observe_database, overview
from indexer.telemetry import Metrics

CHAIN = 8453
FACTORY, ISSUER, STRANGER, TOKEN = (bytes([n]) * 20 for n in (0xFA, 0x15, 0x99, 0x70))
LOYALTY_ID = bytes([0x1D]) * 32
ALICE, BOB, ZERO = bytes([0xA1]) * 20, bytes([0xB0]) * 20, bytes(20)


def hex0x(raw: bytes) -> str:
    return "0x" + raw.hex()


@dataclass
class World:
    """Writes facts as the followers do, each log in a block of its own."""

    conn: Any
    numbers: count[int]

    def _log(self, emitter: bytes, canonical: bool, number: int | None = None) -> dict[str, Any]:
        number = number or next(self.numbers)
        return {
            "chain_id": CHAIN,
            "block_number": number,
            "log_index": next(self.numbers),
            "block_hash": number.to_bytes(32, "big"),
            "block_time_ms": 1_790_000_000_000 + number * 200,
            "tx_hash": number.to_bytes(32, "little"),
            "tx_index": 0,
            "emitter": emitter,
            "canonical": canonical,
        }

    async def _insert(self, table: str, row: dict[str, Any]) -> dict[str, Any]:
        columns = ", ".join(row)
        marks = ", ".join(f"${n}" for n in range(1, len(row) + 1))
        await self.conn.execute(f"INSERT INTO indexer.{table} ({columns}) VALUES ({marks})", *row.values())
        return row

    async def programme(self, *, token: bytes = TOKEN, issuer: bytes = ISSUER, name: str = "Petals") -> None:
        texts = dict.fromkeys(("symbol", "media", "description", "contract_uri", "token_uri"), "")
        where = {"factory": FACTORY, "issuer": issuer, "loyalty_id": LOYALTY_ID, "loyalty": token}
        await self._insert("programme", self._log(FACTORY, True) | where | {"name": name} | texts)

    async def movement(
        self,
        kind: str,
        holder: bytes,
        amount: int,
        *,
        emitter: bytes = FACTORY,
        issuer: bytes = ISSUER,
        token: bytes = TOKEN,
        bucket: int = 0,
        nonce: bytes | None = None,
        canonical: bool = True,
    ) -> dict[str, Any]:
        terms = {
            "kind": f"loyfin.{kind}",
            "factory": FACTORY,
            "issuer": issuer,
            "loyalty_id": LOYALTY_ID,
            "loyalty": token,
            "holder": holder,
            "bucket": bucket,
            "amount": amount,
            "nonce": nonce or uuid4().bytes * 2,
            "operation_hash": None,
            "data": b"",
        }
        return await self._insert("movement", self._log(emitter, canonical) | terms)

    async def transfer(
        self,
        sender: bytes,
        recipient: bytes,
        amount: int,
        *,
        source: str = "loyfin",
        emitter: bytes = FACTORY,
        token: bytes = TOKEN,
        bucket: int = 0,
        canonical: bool = True,
        number: int | None = None,
    ) -> int:
        row = self._log(emitter, canonical, number) | {
            "item": 0,
            "source": source,
            "loyalty": token,
            "operator": sender,
            "sender": sender,
            "recipient": recipient,
            "bucket": bucket,
            "amount": amount,
        }
        await self._insert("transfer", row)
        return int(row["block_number"])

    async def operation(self, reference: str, state: str, generation: int = 0, brand: str = "bloom") -> UUID:
        identity = uuid4()
        await self.conn.execute(
            """INSERT INTO indexer.operation (id, brand, reference, request, requested_at, requested_at_stated, state, generation)
               VALUES ($1, $2, $3, $4::text::jsonb, now(), false, $5, $6)""",
            identity, brand, reference, json.dumps({"legs": [{"kind": "loyfin.redemption"}]}), state, generation,
        )  # fmt: skip
        return identity

    async def claim(self, operation: UUID, row: dict[str, Any]) -> None:
        await self.conn.execute(
            """INSERT INTO indexer.claim (operation_id, leg, evidence_id, chain_id, block_number, log_index, block_hash, basis)
               VALUES ($1, 0, $2, $3, $4, $5, $6, 'nonce')""",
            operation, uuid4(), CHAIN, row["block_number"], row["log_index"], row["block_hash"],
        )  # fmt: skip

    async def receipt(self, operation: UUID, generation: int, outcome: str = "fulfilled") -> None:
        await self.conn.execute(
            "INSERT INTO indexer.receipt (operation_id, generation, outcome, actor) VALUES ($1, $2, $3, 'shop')",
            operation, generation, outcome,
        )  # fmt: skip

    async def balances(self, wallet: bytes) -> dict[tuple[str, int], Decimal]:
        """By token and bucket: as the view says, which the function and the query must agree with."""
        rows = await self.conn.fetch(
            "SELECT loyalty, bucket, balance FROM loyalty.balances WHERE holder = $1", hex0x(wallet)
        )
        found = {(row["loyalty"], int(row["bucket"])): row["balance"] for row in rows}
        asked = await queries.balances_of(self.conn, Address(wallet))
        assert {(b.loyalty, int(b.expires_at)): Decimal(b.balance) for b in asked} == found
        return found


@pytest.fixture
async def world(database: Database) -> Any:
    async with database.pool.acquire() as conn:
        await conn.execute(
            """
            INSERT INTO indexer.brand (name, unmatched_since) VALUES ('bloom', '2020-01-01Z'), ('rose', '2020-01-01Z');
            INSERT INTO indexer.chain (chain_id, name, head_number, head_time_ms, head_at, safe_number, finalized_number, mode)
            VALUES (8453, 'base', 10000, 1790000000000, clock_timestamp() + interval '1 day', 5000, 2000, 'polling')
            """
        )
        await conn.execute("INSERT INTO indexer.issuer (address, brand) VALUES ($1, 'bloom')", ISSUER)
        made = World(conn, count(1000))
        await made.programme()
        yield made


KEY = (hex0x(TOKEN), 0)


async def test_balances_are_issues_less_redemptions_and_transfers(world: World) -> None:
    await world.movement("issuance", ALICE, 100)
    await world.movement("redemption", ALICE, 30)
    await world.transfer(ALICE, BOB, 20)
    await world.transfer(BOB, BOB, 5)  # to oneself
    await world.movement("issuance", ALICE, 7, bucket=1_900_000_000)
    assert await world.balances(ALICE) == {KEY: 50, (hex0x(TOKEN), 1_900_000_000): 7}
    assert await world.balances(BOB) == {KEY: 20}
    assert await world.balances(STRANGER) == {}


async def test_balances_count_canonical_rows_alone(world: World) -> None:
    await world.movement("issuance", ALICE, 100)
    await world.movement("redemption", ALICE, 100, canonical=False)
    await world.transfer(ALICE, BOB, 40, canonical=False)
    assert await world.balances(ALICE) == {KEY: 100}
    assert await world.balances(BOB) == {}


async def test_balances_skip_loyfin_transfers_that_repeat_issues_and_redemptions(world: World) -> None:
    await world.movement("issuance", ALICE, 100)
    await world.transfer(ZERO, ALICE, 100)
    await world.movement("redemption", ALICE, 25)
    await world.transfer(ALICE, ZERO, 25)
    assert await world.balances(ALICE) == {KEY: 75}
    assert await world.balances(ZERO) == {}


async def test_balances_take_erc1155_where_a_token_has_it_and_never_both(world: World) -> None:
    await world.movement("issuance", ALICE, 100)
    await world.transfer(ZERO, ALICE, 100, source="erc1155", emitter=TOKEN)
    await world.transfer(ALICE, BOB, 10)
    await world.transfer(ALICE, BOB, 10, source="erc1155", emitter=TOKEN)
    await world.transfer(BOB, ZERO, 4, source="erc1155", emitter=TOKEN)  # a burn that no Loyfin event tells
    assert await world.balances(ALICE) == {KEY: 90}
    assert await world.balances(BOB) == {KEY: 6}
    source = await world.conn.fetchval("SELECT DISTINCT source FROM loyalty.balances")
    assert source == "erc1155"


async def test_an_orphaned_erc1155_transfer_does_not_change_the_source(world: World) -> None:
    await world.movement("issuance", ALICE, 100)
    await world.transfer(ZERO, ALICE, 999, source="erc1155", emitter=TOKEN, canonical=False)
    assert await world.balances(ALICE) == {KEY: 100}


async def test_an_event_that_token_and_factory_both_log_counts_once(world: World) -> None:
    nonce = uuid4().bytes * 2
    await world.movement("issuance", ALICE, 100, nonce=nonce)
    await world.movement("issuance", ALICE, 100, nonce=nonce, emitter=TOKEN)
    number = await world.transfer(ALICE, BOB, 10)
    await world.transfer(ALICE, BOB, 10, emitter=TOKEN, number=number)
    await world.transfer(ALICE, BOB, 1, emitter=TOKEN)  # in a transaction of its own: another transfer
    await world.programme(name="announced twice")
    assert await world.balances(ALICE) == {KEY: 89}
    assert await world.balances(BOB) == {KEY: 11}
    assert await world.conn.fetchval("SELECT string_agg(name, ',') FROM loyalty.programs") == "Petals"


async def test_a_negative_balance_is_shown(world: World) -> None:
    await world.movement("redemption", ALICE, 2**256 - 1)
    assert await world.balances(ALICE) == {KEY: Decimal(-(2**256 - 1))}
    balance = (await queries.balances_of(world.conn, Address(ALICE)))[0]
    assert (balance.balance, balance.history_complete) == (str(-(2**256 - 1)), False)


async def test_balances_of_other_issuers_carry_no_brand(world: World) -> None:
    other = bytes([0x77]) * 20
    await world.programme(token=other, issuer=STRANGER)
    await world.movement("issuance", ALICE, 1)
    await world.movement("issuance", ALICE, 2, token=other, issuer=STRANGER)
    assert {b.brand: b.balance for b in await queries.balances_of(world.conn, Address(ALICE))} == {
        "bloom": "1",
        None: "2",
    }
    assert [b.balance for b in await queries.balances_of(world.conn, Address(ALICE), "bloom")] == ["1"]


async def test_balances_of_refuses_what_is_no_wallet(world: World) -> None:
    with pytest.raises(asyncpg.PostgresError, match="40 hex digits") as caught:
        await world.conn.fetch("SELECT * FROM loyalty.balances_of('alice')")
    assert caught.value.sqlstate == "LY422"


async def test_one_wallet_operation_or_signal_is_found_by_index(world: World, owner_dsn: str) -> None:
    """The plan at a size where it matters: no sequential scan of a table that grows."""
    await world.conn.execute(
        """
        INSERT INTO indexer.movement (chain_id, block_number, log_index, block_hash, block_time_ms, tx_hash, tx_index, emitter,
            kind, factory, issuer, loyalty_id, loyalty, holder, bucket, amount, nonce, data)
        SELECT 8453, 100000 + n, 0, sha256(n::text::bytea), 1790000000000, sha256(n::text::bytea), 0, $1, 'loyfin.issuance', $1, $2,
               $3, $4, substr(sha256((n % 3000)::text::bytea), 1, 20), 0, 1, sha256(n::text::bytea), ''
        FROM generate_series(1, 20000) n
        """,
        FACTORY, ISSUER, LOYALTY_ID, TOKEN,
    )  # fmt: skip
    await world.conn.execute(
        """
        INSERT INTO indexer.transfer (chain_id, block_number, log_index, item, block_hash, block_time_ms, tx_hash, tx_index, emitter,
            source, loyalty, operator, sender, recipient, bucket, amount)
        SELECT 8453, 100000 + n, 1, 0, sha256(n::text::bytea), 1790000000000, sha256(n::text::bytea), 0, $1, 'loyfin', $2, $1,
               substr(sha256((n % 3000)::text::bytea), 1, 20), substr(sha256((n % 2999)::text::bytea), 1, 20), 0, 1
        FROM generate_series(1, 20000) n
        """,
        FACTORY, TOKEN,
    )  # fmt: skip
    await world.conn.execute(
        """
        INSERT INTO indexer.operation (id, brand, reference, request, requested_at, requested_at_stated, state)
        SELECT gen_random_uuid(), CASE n % 2 WHEN 0 THEN 'bloom' ELSE 'rose' END, n::text, '{"legs": []}', now(), false, 'pending'
        FROM generate_series(1, 20000) n
        """
    )
    await world.conn.execute(
        """
        INSERT INTO indexer.outbox (id, brand, aggregatetype, aggregateid, type, payload, sequence)
        SELECT gen_random_uuid(), o.brand, 'operation', o.id, 'operation.submitted', '{}', o.reference::int FROM indexer.operation o
        """
    )
    owner = await asyncpg.connect(owner_dsn)
    name = f"test_{secrets.token_hex(6)}"
    try:
        await owner.execute("ANALYZE")
        login = urlsplit(owner_dsn)._replace(
            netloc=f"{name}:{await sql_users.add(owner, name, 'bloom')}@{urlsplit(owner_dsn).netloc.rpartition('@')[2]}"
        )
        brand = await asyncpg.connect(urlunsplit(login))
        try:
            scanned = {f"daemon: {query}": await _scanned(world.conn, query) for query in (*INDEXED, *PRIVATE)}
            scanned |= {f"a brand: {query}": await _scanned(brand, query) for query in INDEXED}
        finally:
            await brand.close()
    finally:
        await sql_users.remove(owner, name)
        await owner.close()
    assert {query: tables for query, tables in scanned.items() if tables} == {}


# Behind security_barrier a condition reaches the indexes where its operator is known not to leak: those of uuid, text and
# bigint are. None names the brand: a brand's login need not.
NOBODY = "'00000000-0000-0000-0000-000000000000'"
INDEXED = (
    "SELECT * FROM loyalty.operations WHERE reference = '78'",
    "SELECT * FROM loyalty.operations WHERE brand = 'bloom' AND reference = '78'",
    f"SELECT * FROM loyalty.operations WHERE id = {NOBODY}",
    f"SELECT * FROM loyalty.settlements WHERE operation_id = {NOBODY}",
    f"SELECT * FROM loyalty.exposures WHERE operation_id = {NOBODY}",
    "SELECT * FROM loyalty.exposures",
    "SELECT * FROM loyalty.pending_fulfilments",
    f"SELECT * FROM loyalty.pending_fulfilments WHERE operation_id = {NOBODY}",
    f"SELECT * FROM loyalty.issuances WHERE operation_id = {NOBODY}",
    f"SELECT * FROM loyalty.redemptions WHERE operation_id = {NOBODY}",
    "SELECT * FROM loyalty.issuances WHERE chain_id = 8453 AND block_number BETWEEN 100100 AND 100200",
    "SELECT * FROM loyalty.redemptions WHERE chain_id = 8453 AND block_number BETWEEN 100100 AND 100200",
    "SELECT * FROM loyalty.unmatched WHERE chain_id = 8453 AND block_number BETWEEN 100100 AND 100200",
    "SELECT * FROM loyalty.transfers WHERE chain_id = 8453 AND block_number BETWEEN 100100 AND 100200",
    "SELECT * FROM loyalty.signals WHERE sequence > 5 AND sequence <= 25 ORDER BY sequence",
    "SELECT * FROM loyalty.signals WHERE brand = 'bloom' AND sequence > 19900 ORDER BY sequence LIMIT 10",
    f"SELECT * FROM loyalty.signals WHERE operation_id = {NOBODY}",
)
PRIVATE = (  # the body of loyalty.balances_of
    """
    SELECT * FROM indexer.holding b WHERE wallet = '\\xa1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1'
    AND (b.brand = ANY (ARRAY(SELECT v.brand FROM indexer.visible_brand v)) OR (SELECT v.keeper OR v.reader FROM indexer.viewer v))
    """,
)
LARGE = {"movement", "transfer", "operation", "outbox"}


async def _scanned(conn: Any, query: str) -> set[str]:
    """Which tables of 20,000 rows would be read from end to end."""
    plan = await conn.fetchval("EXPLAIN (FORMAT JSON) " + query)
    return _sequential(json.loads(plan) if isinstance(plan, str) else plan) & LARGE


def _sequential(plan: Any) -> set[str]:
    if isinstance(plan, list):
        return set().union(*map(_sequential, plan))
    if not isinstance(plan, dict):
        return set()
    own = {plan["Relation Name"]} if plan.get("Node Type") == "Seq Scan" else set()
    return own.union(*map(_sequential, plan.values()))


async def test_settlements_pending_exposures_and_unmatched_tell_apart(world: World, owner_dsn: str) -> None:
    settled = await world.movement("redemption", ALICE, 10)
    await world.movement("redemption", ALICE, 11)
    await world.movement("redemption", ALICE, 12, issuer=STRANGER)
    await world.movement("redemption", ALICE, 13, canonical=False)
    ready = await world.operation("ready", "ready", 1)
    await world.claim(ready, settled)
    handed = await world.operation("ready, receipt under way", "ready", 1)
    await world.receipt(handed, 1)
    exposed = await world.operation("exposed", "reverted", 2)
    await world.receipt(exposed, 1)
    await world.receipt(exposed, 2, "reverted")
    fulfilled = await world.operation("fulfilled", "fulfilled", 1)
    await world.receipt(fulfilled, 1)

    settlements = await world.conn.fetch("SELECT * FROM loyalty.settlements")
    assert [(s["reference"], s["confidence"], s["amount"]) for s in settlements] == [("ready", "finalized", 10)]
    assert settlements[0]["tx_hash"] == hex0x(settled["tx_hash"])
    pending = await world.conn.fetch("SELECT reference, generation FROM loyalty.pending_fulfilments")
    assert [tuple(row) for row in pending] == [("ready", 1)]
    exposures = await world.conn.fetch("SELECT reference, fulfilled_generation, outcome FROM loyalty.exposures")
    assert [tuple(row) for row in exposures] == [("exposed", 2, "reverted")]
    unmatched = await world.conn.fetch("SELECT brand, amount, before_unmatched_since FROM loyalty.unmatched")
    assert [tuple(row) for row in unmatched] == [("bloom", 11, False)]
    assert await world.conn.fetchval("SELECT operation_id FROM loyalty.redemptions WHERE amount = 10") == ready
    assert await world.conn.fetchval("SELECT count(*) FROM loyalty.redemptions") == 3
    assert await world.conn.fetchval("SELECT count(*) FROM loyalty.issuances") == 0
    assert (
        await world.conn.fetchval("SELECT legs -> 0 ->> 'kind' FROM loyalty.operations LIMIT 1") == "loyfin.redemption"
    )

    metrics = Metrics()
    await observe_database(world.conn, metrics)
    value = metrics.registry.get_sample_value
    assert value("loyalty_operations", {"brand": "bloom", "state": "ready"}) == 2
    assert value("loyalty_operations", {"brand": "rose", "state": "ready"}) == 0
    assert value("loyalty_exposures", {"brand": "bloom"}) == 1
    assert value("loyalty_unmatched", {"brand": "bloom"}) == 1
    assert value("loyalty_oldest_open_age_seconds", {"brand": "bloom"}) is not None
    assert value("loyalty_oldest_unsent_age_seconds", {"brand": "bloom"}) == 0
    await world.claim(await world.operation("late", "confirming"), (await _row(world, 11)))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await world.conn.execute("DELETE FROM indexer.receipt")  # not even the daemon
    owner = await asyncpg.connect(owner_dsn)
    await owner.execute("DELETE FROM indexer.receipt")
    await owner.close()
    await observe_database(world.conn, metrics)
    assert value("loyalty_unmatched", {"brand": "bloom"}) == 0
    assert value("loyalty_exposures", {"brand": "bloom"}) == 0


async def _row(world: World, amount: int) -> dict[str, Any]:
    row = await world.conn.fetchrow("SELECT * FROM indexer.movement WHERE amount = $1", Decimal(amount))
    return dict(row)


async def test_only_numbered_signals_are_visible_and_the_oldest_unsent_is_known(world: World) -> None:
    operation = await world.operation("a", "ready", 1)
    for sequence in (1, None):
        await world.conn.execute(
            """INSERT INTO indexer.outbox (id, brand, aggregatetype, aggregateid, type, payload, sequence)
               VALUES (gen_random_uuid(), 'bloom', 'operation', $1, 'operation.ready', '{}', $2)""",
            operation, sequence,
        )  # fmt: skip
    signals = await world.conn.fetch("SELECT sequence, operation_id FROM loyalty.signals")
    assert [tuple(row) for row in signals] == [(1, operation)]
    assert [unsent.brand for unsent in (await overview(world.conn)).unsent] == ["bloom"]
    await world.conn.execute("UPDATE indexer.outbox SET sequence = 2 WHERE sequence IS NULL")
    assert (await overview(world.conn)).unsent == []
    await world.conn.execute(
        "INSERT INTO indexer.webhook (brand, name, events) VALUES ('bloom', 'shop', '{operation.*}')"
    )
    await world.conn.execute(
        """INSERT INTO indexer.delivery (brand, webhook, signal_id, aggregateid, sequence, type)
           SELECT brand, 'shop', id, aggregateid, sequence, type FROM indexer.outbox"""
    )
    first = await world.conn.fetchval("SELECT created_at FROM indexer.outbox WHERE sequence = 1")
    assert [unsent.since for unsent in (await overview(world.conn)).unsent] == [first]
    assert (await overview(world.conn, "rose")).unsent == []


async def test_history_is_measured_over_emitters(world: World) -> None:
    """Two emitters from block 1 to 2,000 (finalized): one covered to 1,000, the other by the follower's lane from 1,501."""
    token = bytes([0x70]) * 20
    await world.conn.execute(
        """INSERT INTO indexer.emitter (chain_id, address, kind, factory, start_block, followed_from)
           VALUES (8453, $1, 'factory', $1, 1, NULL), (8453, $2, 'token', $1, 1, 1501)""",
        FACTORY, token,
    )  # fmt: skip
    await world.conn.execute(
        """INSERT INTO indexer.coverage (chain_id, emitter, verdict, blocks) VALUES
           (8453, '\\x', 'gate', '{[1200,9001)}'), (8453, $1, 'unverified', '{[1,800)}'), (8453, $1, 'second_look', '{[500,1001)}')""",
        FACTORY,
    )  # fmt: skip
    seen = await overview(world.conn)
    history = seen.chains[0].history
    assert (history.emitters, history.needed_blocks, history.covered_blocks) == (2, "4000", "1500")
    assert (history.ratio, history.complete) == (0.375, False)
    head = seen.chains[0].head
    assert head is not None and head.number == "10000" and head.hash is None and head.lag_seconds is not None
    status = await world.conn.fetchrow("SELECT * FROM loyalty.sync_status")
    assert (status["name"], status["head_number"], status["latched"], status["stream"]) == (
        "base",
        10000,
        False,
        seen.stream,
    )


async def test_every_view_and_column_is_documented(world: World) -> None:
    silent = await world.conn.fetch(
        """
        SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum >= 0
        WHERE c.relnamespace = 'loyalty'::regnamespace AND c.relkind = 'v' AND col_description(c.oid, a.attnum) IS NULL
        UNION ALL
        SELECT relname, NULL FROM pg_class
        WHERE relnamespace = 'loyalty'::regnamespace AND relkind = 'v' AND obj_description(oid, 'pg_class') IS NULL
        """
    )
    assert [tuple(row) for row in silent] == []


async def test_strangers_may_neither_read_nor_call(world: World) -> None:
    public = await world.conn.fetch(
        """
        SELECT relname::text FROM pg_class WHERE relnamespace = 'loyalty'::regnamespace AND has_table_privilege('pg_monitor', oid, 'SELECT')
        UNION ALL
        SELECT proname FROM pg_proc WHERE pronamespace = 'loyalty'::regnamespace AND has_function_privilege('pg_monitor', oid, 'EXECUTE')
        """
    )
    assert [row[0] for row in public] == []
