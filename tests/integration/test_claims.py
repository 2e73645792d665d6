"""Claims and receipts: one worker at a time hands an operation over, whoever dies, sleeps or comes too late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from indexer.model.confidence import Level, Policy
from indexer.settlement.rules import BrandRules
from indexer.store import functions
from indexer.store.database import Database
from tests.world import BRAND, ISSUER, World, hexa, problem

INCLUDED = {BRAND: BrandRules((Policy(Level.INCLUDED),))}
OTHER, OTHER_ISSUER = "rose", b"\x99" * 20


@pytest.fixture
async def world(owner_dsn: str) -> AsyncIterator[World]:
    async with World.at(owner_dsn, INCLUDED) as made:
        await made.add_brand(OTHER, OTHER_ISSUER)
        yield made


async def ready(world: World, *blocks: int) -> list[UUID]:
    """Operations that are ready, one for each block, settled one after the other."""
    found = []
    for block in blocks:
        leg = world.leg(nonce=hexa(world.nonce()))
        found.append(await world.register(leg))
        await world.event(block, leg)
        assert await world.settle() == ["operation.ready"]
    return found


async def claim(world: World, count: int = 10, consumer: str = "w", seconds: float = 60) -> dict[UUID, UUID]:
    """Operation → claim, oldest ready first."""
    rows = await world.conn.fetch(
        "SELECT operation_id, claim FROM loyalty.claim_fulfilments($1, $2, make_interval(secs => $3))",
        consumer, count, seconds,
    )  # fmt: skip
    return {row["operation_id"]: row["claim"] for row in rows}


async def fulfil(
    world: World, operation: UUID, generation: int, claim: UUID | None, **receipt: Any
) -> tuple[str, bool]:
    said = await world.conn.fetchval("SELECT loyalty.fulfil($1, $2, $3, $4)", operation, generation, receipt, claim)
    return said["outcome"], said["repeated"]


async def lapse(world: World, claim: UUID) -> None:
    """Lets the claim's time pass, by the database's own column."""
    await world.conn.execute(
        "UPDATE indexer.fulfilment_claim SET claimed_until = clock_timestamp() - interval '1 second' WHERE id = $1",
        claim,
    )


async def refused(world: World, call: str, *given: Any) -> tuple[str, dict[str, Any]]:
    with pytest.raises(asyncpg.PostgresError) as caught:
        await world.conn.fetch(call, *given)
    return problem(caught.value)


async def test_what_is_claimed_is_nobody_elses_until_it_lapses_or_is_released(world: World) -> None:
    first, second, third = await ready(world, 100, 101, 102)
    mine = await claim(world, 2, "anna")
    assert list(mine) == [first, second], "the oldest ready first"
    assert list(await claim(world, 5, "bert")) == [third]
    assert await claim(world, 5, "carl") == {}
    pending = await world.conn.fetch(
        "SELECT operation_id, consumer, claimed_until > now() AS live FROM loyalty.pending_fulfilments ORDER BY ready_at"
    )
    assert [tuple(row) for row in pending] == [(first, "anna", True), (second, "anna", True), (third, "bert", True)]

    assert (await world.conn.fetchval("SELECT loyalty.release_claim($1)", mine[first])) == {"outcome": "released"}
    assert (await world.conn.fetchval("SELECT loyalty.release_claim($1)", mine[first])) == {"outcome": "ended"}
    await lapse(world, mine[second])
    assert await world.conn.fetchval("SELECT count(*) FROM loyalty.pending_fulfilments WHERE consumer IS NULL") == 2
    again = await claim(world, 5, "dora")
    assert list(again) == [first, second] and not set(again.values()) & set(mine.values())
    assert await fulfil(world, first, 1, again[first], parcel="7") == ("fulfilled", False)
    assert await fulfil(world, first, 1, again[first], parcel="7") == ("fulfilled", True)
    receipt = await world.conn.fetchrow("SELECT receipt, claim, actor FROM indexer.receipt")
    assert receipt is not None and (receipt["receipt"], receipt["claim"]) == ({"parcel": "7"}, again[first])
    assert receipt["actor"] == await world.conn.fetchval("SELECT session_user::text")
    assert await claim(world, 5, "emil") == {}, "with a receipt nothing is claimable, settled again or not yet"


async def test_renewing_holds_a_claim_and_says_when_to_stop(world: World) -> None:
    one, two, three = await ready(world, 100, 101, 102)
    claims = await claim(world, seconds=1)
    said = await world.conn.fetchval("SELECT loyalty.renew_claim($1, '10 minutes')", claims[one])
    assert said["outcome"] == "renewed"
    left = datetime.fromisoformat(said["claimedUntil"]) - datetime.now(UTC)
    assert timedelta(minutes=9) < left < timedelta(minutes=11)

    renew = "SELECT loyalty.renew_claim($1, '1 minute')"
    await lapse(world, claims[two])
    assert await refused(world, renew, claims[two]) == (
        "LY409", {"outcome": "claim_lapsed", "status": "ready", "generation": 1},
    )  # fmt: skip
    await fulfil(world, three, 1, None)  # by a webhook's receiver that knows of no claims
    assert (await refused(world, renew, claims[three]))[1]["outcome"] == "fulfilled"
    await world.conn.fetchval("SELECT loyalty.release_claim($1)", claims[one])
    assert (await refused(world, renew, claims[one]))[1]["outcome"] == "released"
    assert (await refused(world, renew, uuid4()))[0] == "LY404"


async def test_a_reverted_operations_claim_is_void_and_its_receipt_is_recorded_as_reverted(world: World) -> None:
    leg = world.leg(operationHash=hexa(b"\x07" * 32))
    operation = await world.register(leg)
    await world.event(100, leg)
    await world.settle()
    old = (await claim(world))[operation]
    await world.orphan(99)
    assert await world.settle() == ["operation.reverted"]
    assert await claim(world) == {}
    said = await refused(world, "SELECT loyalty.renew_claim($1, '1 minute')", old)
    assert said == ("LY409", {"outcome": "reverted", "status": "reverted", "generation": 1})

    await world.event(101, leg, fork="b")
    assert await world.settle() == ["operation.ready"]
    new = (await claim(world))[operation]
    assert new != old, "the old claim is of a generation that is gone"
    assert await fulfil(world, operation, 1, old, parcel="gone") == ("reverted", False)
    assert await fulfil(world, operation, 1, old, parcel="gone") == ("reverted", True)
    # an operation with any receipt is never claimable: the goods have left once
    assert (await refused(world, "SELECT loyalty.renew_claim($1, '1 minute')", new))[0] == "LY409"
    assert await claim(world) == {}
    await world.settle()
    assert await world.state(operation) == "fulfilled"
    assert await world.conn.fetchval("SELECT count(*) FROM indexer.receipt") == 1


async def test_a_lapsed_claim_is_recorded_and_said_and_a_second_hand_over_is_kept(world: World) -> None:
    alone, twice, late = await ready(world, 100, 101, 102)
    slow = await claim(world, 10, "slow")
    for one in slow.values():
        await lapse(world, one)
    # lapsed, and nobody else took it: recorded, and said all the same
    assert await fulfil(world, alone, 1, slow[alone], by="slow") == ("claim_lapsed", False)
    assert await fulfil(world, alone, 1, slow[alone], by="slow") == ("claim_lapsed", True)
    quick = await claim(world, 10, "quick")
    assert set(quick) == {twice, late}
    # another took it and was first: the slow one is told, and what it handed over is not forgotten
    assert await fulfil(world, twice, 1, quick[twice], by="quick") == ("fulfilled", False)
    assert await fulfil(world, twice, 1, slow[twice], by="slow") == ("claim_lapsed", True)
    # another took it and was second: it is the one that must look
    assert await fulfil(world, late, 1, slow[late], by="slow") == ("claim_lapsed", False)
    assert await fulfil(world, late, 1, quick[late], by="quick") == ("claim_lapsed", True)
    kept = await world.conn.fetch(
        "SELECT id, second_receipt FROM indexer.fulfilment_claim WHERE second_receipt IS NOT NULL"
    )
    assert {row["id"]: row["second_receipt"] for row in kept} == {
        slow[twice]: {"by": "slow"},
        quick[late]: {"by": "quick"},
    }
    receipts = await world.conn.fetch("SELECT operation_id, receipt ->> 'by' AS by, outcome FROM indexer.receipt")
    assert sorted((row["by"], row["outcome"]) for row in receipts) == [
        ("quick", "fulfilled"), ("slow", "claim_lapsed"), ("slow", "claim_lapsed"),
    ]  # fmt: skip
    await world.settle()
    assert {await world.state(one) for one in (alone, twice, late)} == {"fulfilled"}


async def test_the_bounds_of_a_claim_are_kept(world: World) -> None:
    await ready(world, 100)
    call = "SELECT * FROM loyalty.claim_fulfilments($1, $2, $3)"
    second = timedelta(seconds=1)
    for given, field in (
        (("", 1, second), "consumer"), ((None, 1, second), "consumer"), (("x" * 201, 1, second), "consumer"),
        (("x" * 1_000_000, 1, second), "consumer"), (("a\nb", 1, second), "consumer"),
        (("w", 0, second), "max_count"), (("w", 1001, second), "max_count"), (("w", None, second), "max_count"),
        (("w", 1, second / 2), "lease"), (("w", 1, timedelta(hours=2)), "lease"), (("w", 1, None), "lease"),
        (("w", 1, -second), "lease"),
    ):  # fmt: skip
        assert await refused(world, call, *given) == ("LY422", {"field": field}), given
    assert len(await claim(world, 1000, "ü" * 200, 3600)) == 1


async def test_twins_for_http_act_for_the_brand_that_they_are_told(world: World, database: Database) -> None:
    mine, other = await ready(world, 100, 101)
    await world.conn.execute("UPDATE indexer.operation SET brand = $2 WHERE id = $1", other, OTHER)
    async with database.pool.acquire() as conn:
        assert await functions.claim_fulfilments(conn, "violet", "http", 5, 60) == []
        (claimed,) = await functions.claim_fulfilments(conn, OTHER, "http", 5, 60)
        assert (claimed.operation_id, claimed.brand, claimed.generation) == (other, OTHER, 1)
        assert bytes(claimed.metadata) == b"{}" and bytes(claimed.legs).startswith(b"[{")
        for call in (
            lambda: functions.renew_claim(conn, BRAND, claimed.claim, 30),
            lambda: functions.release_claim(conn, BRAND, claimed.claim),
        ):
            with pytest.raises(asyncpg.PostgresError) as caught:
                await call()
            assert caught.value.sqlstate == "LY404"
        renewed = await functions.renew_claim(conn, OTHER, claimed.claim, 30)
        assert renewed.outcome == "renewed" and renewed.claimed_until < claimed.claimed_until
        assert (await functions.release_claim(conn, OTHER, claimed.claim)).outcome == "released"
        every = await functions.claim_fulfilments(conn, None, "http", 5, 60)
        assert [one.operation_id for one in every] == [mine, other]
        done = await functions.fulfil(conn, mine, 1, '{"receipt": {"a": 1}}', every[0].claim, actor="token shop")
        assert (done.outcome, done.repeated) == ("fulfilled", False)
        assert (await functions.fulfil(conn, other, 1, "{}")).outcome == "fulfilled"
    actors = await world.conn.fetch("SELECT actor FROM indexer.receipt ORDER BY recorded_at")
    assert actors[0]["actor"] == "token shop" != actors[1]["actor"]


@pytest.mark.parametrize("isolation", ["read_committed", "repeatable_read"])
async def test_two_who_search_at_once_never_get_the_same(world: World, owner_dsn: str, isolation: Any) -> None:
    """The second search began before the first's commit, and takes the row's lock right after it."""
    (operation,) = await ready(world, 100)
    first, second = await asyncpg.connect(owner_dsn), await asyncpg.connect(owner_dsn)
    try:
        call = "SELECT operation_id FROM loyalty.claim_fulfilments($1, 10, '1 minute')"
        async with second.transaction(isolation=isolation):
            await second.fetch("SELECT FROM indexer.operation")  # where there is but one snapshot, it is this
            async with first.transaction():
                assert [row[0] for row in await first.fetch(call, "first")] == [operation]
                # under the lock of the first: passed over, not waited for
                if isolation == "read_committed":
                    assert await second.fetch(call, "second") == []
            if isolation == "read_committed":
                assert await second.fetch(call, "second") == []
            else:
                with pytest.raises(asyncpg.SerializationError):
                    async with second.transaction():
                        await second.fetch(call, "second")
    finally:
        await first.close()
        await second.close()
    assert await world.conn.fetchval("SELECT array_agg(consumer) FROM indexer.fulfilment_claim") == ["first"]


async def test_many_who_compete_share_all_of_it(world: World, owner_dsn: str) -> None:
    await world.conn.execute(
        """
        INSERT INTO indexer.operation (id, brand, reference, request, requested_at, requested_at_stated, state, generation)
        SELECT gen_random_uuid(), $1, n::text, '{"legs": []}', now(), false, 'ready', 1 FROM generate_series(1, 300) n
        """,
        BRAND,
    )
    taken: list[UUID] = []

    async def work() -> None:
        conn = await asyncpg.connect(owner_dsn)
        try:
            while rows := await conn.fetch(
                "SELECT operation_id, claim FROM loyalty.claim_fulfilments('w', 7, '1 minute')"
            ):
                taken.extend(row["operation_id"] for row in rows)
                await conn.executemany("SELECT loyalty.fulfil($1, 1, '{}', $2)", [tuple(row) for row in rows])
        finally:
            await conn.close()

    await asyncio.gather(*(work() for _ in range(6)))
    assert len(taken) == len(set(taken)) == 300
    assert await world.conn.fetchval("SELECT count(*) FROM indexer.receipt WHERE outcome = 'fulfilled'") == 300
    assert ISSUER != OTHER_ISSUER


async def test_a_search_follows_what_is_ready_and_never_history(world: World) -> None:
    """20,000 operations that were handed over, and ten to do."""
    await world.conn.execute(
        """
        WITH made AS (
            INSERT INTO indexer.operation (id, brand, reference, request, requested_at, requested_at_stated, state, state_at, generation)
            SELECT gen_random_uuid(), CASE n % 2 WHEN 0 THEN $1 ELSE $2 END, n::text, '{"legs": []}', now(), false,
                   CASE WHEN n <= 10 THEN 'ready' ELSE 'fulfilled' END, now() + n * interval '1 second', 1
            FROM generate_series(1, 20000) n RETURNING id, state
        )
        INSERT INTO indexer.receipt (operation_id, generation, outcome, actor)
        SELECT id, 1, 'fulfilled', 'shop' FROM made WHERE state = 'fulfilled'
        """,
        BRAND,
        OTHER,
    )
    await world.conn.execute("ANALYZE indexer.operation; ANALYZE indexer.receipt")
    # the counters of a transaction begin with what the session has not reported yet: here, the look-ups of foreign keys
    await world.conn.execute("SELECT pg_stat_force_next_flush()")
    counters = """
        SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::int FROM pg_stat_xact_user_tables
        WHERE relname IN ('operation', 'receipt', 'fulfilment_claim')
    """
    for brand, expected in ((BRAND, 5), (OTHER, 5), (None, 0)):
        async with world.conn.transaction():
            rows = await world.conn.fetch(
                "SELECT reference FROM indexer.claim_fulfilments($1, 'w', 100, '1 minute')", brand
            )
            assert len(rows) == expected
            assert [int(row["reference"]) for row in rows] == sorted(int(row["reference"]) for row in rows)
            assert await world.conn.fetchval(counters) < 200


@pytest.mark.parametrize(
    "doubt",
    [
        "UPDATE indexer.chain SET latch = '{}'",
        "UPDATE indexer.chain SET head_at = now() - interval '1 minute'",
        "UPDATE indexer.chain SET linked_epoch = 1;"
        "INSERT INTO indexer.lease (task, epoch) SELECT 'follow:' || chain_id, 1 FROM indexer.chain",
    ],
    ids=["latched", "not followed", "the follower gave its lease back"],
)
async def test_nothing_is_handed_out_of_a_chain_in_doubt(world: World, doubt: str) -> None:
    (operation,) = await ready(world, 100)
    await world.conn.execute(doubt)
    assert await claim(world) == {}
    assert await world.conn.fetchval("SELECT count(*) FROM loyalty.pending_fulfilments") == 0
    await world.conn.execute("UPDATE indexer.chain SET latch = NULL, head_at = clock_timestamp()")
    await world.conn.execute("UPDATE indexer.lease SET until = clock_timestamp() + interval '1 hour'")
    assert list(await claim(world)) == [operation]


async def test_a_snapshot_of_before_a_hand_over_hands_nothing_out(world: World, owner_dsn: str) -> None:
    (operation,) = await ready(world, 100)
    late = await asyncpg.connect(owner_dsn)
    try:
        await late.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await late.fetchval("SELECT count(*) FROM indexer.operation")  # takes the snapshot
        mine = await claim(world)
        assert await fulfil(world, operation, 1, mine[operation]) == ("fulfilled", False)
        with pytest.raises(asyncpg.SerializationError):
            await late.fetch("SELECT * FROM loyalty.claim_fulfilments('late', 5, interval '1 minute')")
    finally:
        await late.close()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"metadata": {"a": {}}, "_deep": 40}, "metadata"),
        ({"metadata": {"a": 10**300}}, "metadata"),
        ({"requestedAt": "0001-01-01T00:00:00+14:00"}, "requestedAt"),
        ({"requestedAt": "9999-12-31T23:59:59-14:00"}, "requestedAt"),
    ],
    ids=["deep", "digits", "before years", "after years"],
)
async def test_what_no_reader_could_read_again_is_refused(world: World, change: dict[str, Any], field: str) -> None:
    deep = change.pop("_deep", 0)
    given = {"brand": BRAND, "reference": "r", "legs": [world.leg(nonce=hexa(world.nonce()))], **change}
    for _ in range(deep):
        given["metadata"] = {"a": given["metadata"]}
    code, detail = await refused(world, "SELECT loyalty.register_operation($1)", given)
    assert (code, detail["field"]) == ("LY422", field)
