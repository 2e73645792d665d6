"""Retention on a real database: what is over and old goes, and nothing that anything still refers to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest

from indexer import maintenance
from indexer.config import Retention
from indexer.maintenance import CHORES, TASK, do_chores
from indexer.model.confidence import Level, Policy
from indexer.settlement.rules import BrandRules
from indexer.store import retention
from indexer.store.database import Database
from indexer.store.leases import Lease, LeaseLost, Leases
from indexer.store.signals import number
from indexer.telemetry import Metrics
from tests.oracle import judge_database
from tests.world import BASE_MS, BRAND, CHAIN, FACTORY, World, digest, hexa

RULES = {BRAND: BrandRules((Policy(Level.INCLUDED),))}
KEPT = Retention(deliveries_days=30, orphans_days=30)


@asynccontextmanager
async def holding(database: Database) -> AsyncIterator[Lease]:
    async with Leases(database, ttl=60).hold(TASK) as lease:
        yield lease


async def ids(world: World, query: str) -> set[Any]:
    return {row[0] for row in await world.conn.fetch(query)}


async def test_orphans_go_once_they_are_old_and_nothing_names_them(
    owner_dsn: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "BATCH", 2)  # several batches of each
    async with World.at(owner_dsn, RULES) as world:
        legs = {name: world.leg(nonce=hexa(world.nonce())) for name in ("kept again", "exposed", "stands")}
        operations = {name: await world.register(leg) for name, leg in legs.items()}
        for index, (name, leg) in enumerate(legs.items()):
            await world.event(100 if name != "exposed" else 101, leg, index=index)
        for index in range(5):  # of nobody
            await world.event(102, world.leg(), index=10 + index)
        await world.settle()
        await world.fulfil(operations["exposed"], 1)
        await world.settle()
        await world.orphan(99)
        await world.settle()
        await world.event(105, legs["kept again"], fork="b")
        await world.event(106, legs["stands"], fork="b")
        await world.event(110, world.leg(), fork="b", index=1, canonical=False)  # young by finality
        late = (await world.conn.fetchval("SELECT extract(epoch FROM clock_timestamp())::bigint")) - 86_400 * 29
        await world.conn.execute(  # young by its time
            "UPDATE indexer.movement SET block_time_ms = $1 WHERE block_number = 102 AND log_index = 14", late * 1000
        )
        await world.settle()
        # a claim that names an event which is gone: its operation has not heard of it yet
        await world.event(104, world.leg(), fork="c", index=3, canonical=False)
        await world.conn.execute(
            """
            INSERT INTO indexer.claim (operation_id, leg, evidence_id, chain_id, block_number, log_index, block_hash, basis)
            VALUES ($1, 0, $2, $3, 104, 3, $4, 'nonce')
            """,
            await world.register(world.leg(nonce=hexa(world.nonce()))), uuid4(), CHAIN, digest("c", 104),
        )  # fmt: skip
        for table, more in (("programme", ", factory, issuer, loyalty_id, loyalty, name, symbol, media, description, contract_uri, token_uri"),
                            ("raw_log", ", topics, data, reason"), ("programme_event", ", loyalty, event, args"),
                            ("transfer", ", item, source, loyalty, operator, sender, recipient, bucket, amount")):  # fmt: skip
            values = {
                "programme": "'', '', '', '', '', '', '', '', '', ''", "raw_log": "'{}', '', 'unknown_topic'",
                "programme_event": "'', 'x', '{}'", "transfer": "0, 'loyfin', '', '', '', '', 0, 1",
            }[table]  # fmt: skip
            for canonical in (True, False):
                await world.conn.execute(
                    f"""
                    INSERT INTO indexer.{table} (chain_id, block_number, log_index, block_hash, block_time_ms, tx_hash, tx_index, emitter, canonical{more})
                    VALUES ($1, 102, 50, $2, $3, '', 0, $4, $5, {values})
                    """,
                    CHAIN, digest(canonical, 102), BASE_MS + 200 * 102, FACTORY, canonical,
                )  # fmt: skip
        for number_, fork, canonical in ((102, "a", False), (102, "b", True), (110, "a", False), (101, "a", False)):
            await world.conn.execute(
                "INSERT INTO indexer.block (chain_id, number, hash, parent_hash, time_ms, canonical) VALUES ($1, $2, $3, '', $4, $5)"
                " ON CONFLICT (chain_id, number, hash) DO UPDATE SET canonical = excluded.canonical",
                CHAIN, number_, digest(fork, number_), BASE_MS + 200 * number_, canonical,
            )  # fmt: skip
        # the chain's clock is the test's: sixty days ago, and finalized up to 109
        shift = (
            (await world.conn.fetchval("SELECT extract(epoch FROM clock_timestamp())::bigint")) * 1000
            - 86_400_000 * 60
            - BASE_MS
        )
        for table, column in (
            ("block", "time_ms"),
            *((t, "block_time_ms") for t in retention.ORPHANED if t != "block"),
        ):
            await world.conn.execute(
                f"UPDATE indexer.{table} SET {column} = {column} + $1 WHERE {column} < $2", shift, BASE_MS + 86_400_000
            )
        await world.conn.execute("UPDATE indexer.chain SET finalized_number = 109, head_number = 200")

        everything = "SELECT block_number || '/' || log_index || '/' || canonical FROM indexer.movement"
        metrics = Metrics()
        async with holding(database) as lease:
            gone = await do_chores(lease, KEPT, metrics)
            assert await do_chores(lease, KEPT, metrics) == {}
        # of block 100 what came again, and four of nobody's five; not the exposed one, nor what is young or claimed
        assert gone == {
            "orphaned_movement": 6,
            **{f"orphaned_{table}": 1 for table in ("programme", "transfer", "programme_event", "raw_log", "block")},
        }
        assert await ids(world, everything) == {
            "101/1/false", "102/14/false", "104/3/false", "105/0/true", "106/0/true", "110/1/false",
        }  # fmt: skip
        assert await ids(world, "SELECT number FROM indexer.block WHERE NOT canonical") == {101, 110}
        for table in ("programme", "raw_log", "programme_event", "transfer"):
            assert await ids(world, f"SELECT canonical FROM indexer.{table}") == {True}
        assert metrics.registry.get_sample_value("loyalty_forgotten_rows_total", {"what": "orphaned_movement"}) == 6


async def test_signals_go_only_where_that_is_set_and_never_come_twice(
    owner_dsn: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "BATCH", 3)
    async with World.at(owner_dsn, RULES) as world:
        legs = [world.leg(nonce=hexa(world.nonce())) for _ in range(4)]
        operations = [await world.register(leg) for leg in legs]
        for index, leg in enumerate(legs):
            await world.event(100, leg, index=index)
        await world.settle()
        await world.fulfil(operations[0], 1)
        await world.settle()
        await world.orphan(99)  # ready, fulfilled, and four reverted
        await world.settle()
        await world.event(105, legs[0], fork="b")
        await world.event(106, legs[1], fork="b")
        await world.event(107, world.leg(), fork="b", index=9)  # of nobody
        await world.settle()  # restored, ready
        await world.heads(head=300, safe=200)
        assert await world.unmatched() == 1
        async with world.conn.transaction():
            await number(world.conn)
        said = await world.conn.fetch("SELECT id, sequence, type, aggregateid FROM indexer.outbox ORDER BY sequence")
        assert len(said) == 12
        await world.conn.execute("INSERT INTO indexer.webhook (brand, name, events) VALUES ($1, 'shop', '{*}')", BRAND)
        for row in said:
            state = "pending" if row["sequence"] == 2 else "dead" if row["sequence"] == 3 else "delivered"
            await world.conn.execute(
                """
                INSERT INTO indexer.delivery (brand, webhook, signal_id, aggregateid, sequence, type, state, attempts, ended_at)
                VALUES ($1, 'shop', $2, $3, $4, $5, $6, 1, CASE $6 WHEN 'pending' THEN NULL ELSE clock_timestamp() END)
                """,
                BRAND, row["id"], row["aggregateid"], row["sequence"], row["type"], state,
            )  # fmt: skip
            await world.conn.execute(
                """
                INSERT INTO indexer.delivery_attempt (brand, webhook, signal_id, number, begun_at, seconds)
                VALUES ($1, 'shop', $2, 1, clock_timestamp(), 0.1)
                """,
                BRAND, row["id"],
            )  # fmt: skip
        last_old = 11  # all but the last one
        await world.conn.execute(
            "UPDATE indexer.outbox SET created_at = clock_timestamp() - interval '100 days' WHERE sequence <= $1",
            last_old,
        )
        standing = await ids(world, "SELECT standing_signal FROM indexer.operation WHERE standing_signal IS NOT NULL")
        assert len(standing) == 2

        async with holding(database) as lease:
            assert await do_chores(lease, Retention(), Metrics()) == {}  # unset: for ever
            gone = await do_chores(lease, Retention(deliveries_days=30, signals_days=90), Metrics())
        kept = {row["id"] for row in said if row["sequence"] in (2, 12)} | standing
        assert gone == {"signals": 12 - len(kept)}
        assert await ids(world, "SELECT id FROM indexer.outbox") == kept
        assert await ids(world, "SELECT signal_id FROM indexer.delivery") == kept
        assert await ids(world, "SELECT signal_id FROM indexer.delivery_attempt") == kept
        assert (
            await world.conn.fetchval("SELECT forgotten_sequence FROM indexer.brand WHERE name = $1", BRAND) == last_old
        )
        async with holding(database) as lease:
            assert await do_chores(lease, Retention(deliveries_days=30, signals_days=90), Metrics()) == {}

        # to compute everything again makes none of them again, and the next one has the next number
        await world.conn.execute("UPDATE indexer.chain SET unmatched_cursor = NULL")
        await world.touch_blocks(0, 1_000)
        assert await world.settle() == []
        assert await world.unmatched() == 0
        await world.fulfil(operations[1], 2)
        assert await world.settle() == ["operation.fulfilled"]
        async with world.conn.transaction():
            await number(world.conn)
        assert await world.conn.fetchval("SELECT max(sequence) FROM indexer.outbox") == 13
        assert await world.state(operations[1]) == "fulfilled"


async def test_old_deliveries_go_and_a_lost_lease_stops_it(owner_dsn: str, database: Database) -> None:
    async with World.at(owner_dsn, RULES) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        await world.register(leg)
        await world.event(100, leg)
        await world.settle()
        async with world.conn.transaction():
            await number(world.conn)
        assert not await judge_database(world.conn)
        signal: UUID = await world.conn.fetchval("SELECT id FROM indexer.outbox")
        await world.conn.execute(
            """
            INSERT INTO indexer.delivery (brand, webhook, signal_id, aggregateid, sequence, type, state, ended_at)
            SELECT $1, w.name, $2, $2, 1, 'operation.ready', w.state, clock_timestamp() - w.age * interval '1 day'
            FROM (VALUES ('old', 'delivered', 31), ('dead', 'dead', 31), ('young', 'delivered', 29), ('waiting', 'pending', 31))
                AS w (name, state, age)
            """,
            BRAND,
            signal,
        )
        async with holding(database) as lease:
            lease.lose("for the test")
            with pytest.raises(LeaseLost):
                await do_chores(lease, KEPT, Metrics())
        assert await world.conn.fetchval("SELECT count(*) FROM indexer.delivery") == 4
        async with holding(database) as lease:
            assert await do_chores(lease, KEPT, Metrics()) == {"deliveries": 2}
        assert await ids(world, "SELECT webhook FROM indexer.delivery") == {"young", "waiting"}
        assert await world.conn.fetchval("SELECT count(*) FROM indexer.outbox") == 1  # signals stay


async def test_superseded_versions_and_questions_that_are_over_go(
    owner_dsn: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "BATCH", 2)
    named, nobodys, last, young, open_ = (digest("tx", index) for index in range(5))
    async with World.at(owner_dsn, RULES) as world:
        await world.conn.execute(
            """
            INSERT INTO indexer.partner_record (brand, partner, record_id, version, raw, wallet, current, seen_at, missing)
            SELECT $1, 'keyban', record, version, '{}', 'w', version = 4, clock_timestamp() - age * interval '1 day', missing
            FROM (VALUES ('o1', 1, 99, 0), ('o1', 2, 98, 0), ('o1', 3, 89, 0), ('o1', 4, 1, 0),
                         ('o2', 1, 99, 0), ('o2', 2, 99, 0), ('o2', 4, 97, 2)) AS v (record, version, age, missing)
            """,
            BRAND,
        )
        await world.conn.execute(
            """
            INSERT INTO indexer.partner_transfer (id, brand, partner, kind, record_id, wallet, status, chain_id, tx_hash, tx_hashes)
            VALUES ($1, $2, 'keyban', 'keyban.mint', 'o1', 'w', 'included', $3, $4, ARRAY[$5, $4])
            """,
            uuid4(), BRAND, CHAIN, hexa(named), hexa(digest("another of it")),
        )  # fmt: skip
        await world.conn.executemany(
            """
            INSERT INTO indexer.chain_lookup (chain_id, tx_hash, asked_at, answered_at, final)
            VALUES ($1, $2, clock_timestamp() - $3 * interval '1 day', CASE WHEN $4 THEN clock_timestamp() END, $5)
            """,
            [
                (CHAIN, named, 99, True, False), (CHAIN, digest("another of it"), 99, True, False), (CHAIN, nobodys, 99, True, False),
                (CHAIN, last, 99, True, True), (CHAIN, young, 89, True, False), (CHAIN, open_, 99, False, False),
            ],
        )  # fmt: skip
        await world.conn.execute(
            """
            INSERT INTO indexer.reread (chain_id, kind, from_block, state, trouble, requested_at, ended_at)
            SELECT $1, 'audit', 0, state, name, clock_timestamp() - interval '99 days', clock_timestamp() - age * interval '1 day'
            FROM (VALUES ('a', 'done', 91), ('b', 'failed', 91), ('c', 'cancelled', 91), ('young', 'done', 89),
                         ('runs', 'running', NULL), ('waits', 'waiting', NULL)) AS r (name, state, age)
            """,
            CHAIN,
        )
        async with holding(database) as lease:
            assert await do_chores(lease, Retention(), Metrics()) == {"partner_versions": 4, "lookups": 1, "rereads": 3}
            assert await do_chores(lease, Retention(), Metrics()) == {}
        assert await ids(world, "SELECT record_id || version FROM indexer.partner_record") == {"o13", "o14", "o24"}
        assert await ids(world, "SELECT tx_hash FROM indexer.chain_lookup") == {
            named, digest("another of it"), last, young, open_,
        }  # fmt: skip
        assert await ids(world, "SELECT trouble FROM indexer.reread") == {"young", "runs", "waits"}


def test_every_chore_is_told_apart() -> None:
    names = [chore.what for chore in CHORES]
    assert len(set(names)) == len(names)
    every = Retention(deliveries_days=2, orphans_days=3, signals_days=4, versions_days=5, questions_days=6)
    assert {chore.days(every) for chore in CHORES} == set(every.model_dump().values())
