"""No hot query reads a growing table from end to end: their plans on a hundred thousand rows, and what they really read.

The store's functions run on a connection that explains each statement first, as the planner sees it with its parameters
and as the generic plan that a prepared statement may get, and then compares the table's counters before and after. A
function in the database is judged by the counters alone.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import msgspec
import pytest

from indexer.model.evidence import evidence_id
from indexer.model.signal import READY, REVERTED, Signal
from indexer.model.types import Address, Hash32, Header
from indexer.settlement.loop import tell_unmatched, tell_unmatched_records
from indexer.settlement.reconciler import reconcile
from indexer.store import (
    chains,
    coverage,
    deliveries,
    expiry,
    facts,
    feed,
    functions,
    lookups,
    neighbourhood,
    operations,
    overview,
    partner_accounts,
    partner_evidence,
    partner_hints,
    partner_listings,
    partners,
    programmes,
    queries,
    signals,
    stored,
    webhooks,
)
from indexer.store.coverage import Covered
from indexer.telemetry import Metrics
from tests.bench.population import (
    BASE_MS,
    BLOCK_MS,
    BRAND,
    CHAIN,
    FACTORY,
    GROWING,
    ISSUER,
    KIND,
    LOYALTY_ID,
    TOKEN,
    Population,
    block_hash,
    nonce,
    operation_id,
    wallet,
)
from tests.conftest import Postgres

POPULATION = Population(operations=60_000, idle=30_000, transfers=50_000)
LARGE = 20_000  # rows: below, a scan from end to end may well be the best plan; and what one statement may read
PLANNING = 50.0  # in units of cost: more than PostgreSQL reckons for planning any of these

pytestmark = [pytest.mark.timeout(300)]


class Watched:
    """A connection that refuses plans with a sequential scan on a growing table. Looks like asyncpg's to the store."""

    def __init__(self, conn: asyncpg.Connection) -> None:
        self.conn = conn
        self.found: list[str] = []
        self.statements = 0
        self._large: frozenset[str] = frozenset()

    async def execute(self, sql: str, *args: Any) -> str:
        async with self._judged(sql, args):
            return str(await self.conn.execute(sql, *args))

    async def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        async with self._judged(sql, rows[0]):
            await self.conn.executemany(sql, rows)

    async def fetch(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        async with self._judged(sql, args):
            return await self.conn.fetch(sql, *args)

    async def fetchrow(self, sql: str, *args: Any, timeout: float | None = None) -> asyncpg.Record | None:
        async with self._judged(sql, args):
            return await self.conn.fetchrow(sql, *args, timeout=timeout)

    async def fetchval(self, sql: str, *args: Any) -> Any:
        async with self._judged(sql, args):
            return await self.conn.fetchval(sql, *args)

    async def copy_records_to_table(self, *args: Any, **more: Any) -> Any:
        return await self.conn.copy_records_to_table(*args, **more)

    def transaction(self, **_: Any) -> Any:
        return self.conn.transaction()  # a savepoint: the isolation is that of the test's own transaction

    @asynccontextmanager
    async def _judged(self, sql: str, args: Sequence[Any]) -> AsyncIterator[None]:
        if sql.lstrip().split(None, 1)[0] in ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH"):
            self.statements += 1
            sizes = "SELECT relname FROM pg_class WHERE reltuples > $1 AND relnamespace = 'indexer'::regnamespace"
            self._large = frozenset(row["relname"] for row in await self.conn.fetch(sizes, LARGE))
            await self._explain(sql, args)
        before = await self._counters()
        yield
        for table, read in (await self._counters()).items():
            if read - before.get(table, 0) > LARGE:
                self.found.append(f"{read - before.get(table, 0)} rows of {table} read by\n{sql}")

    async def _explain(self, sql: str, args: Sequence[Any]) -> None:
        own = _tree(await self.conn.fetchval(f"EXPLAIN (FORMAT JSON) {sql}", *args))
        self.found += [f"plan: {problem} in\n{sql}" for problem in problems(own, self._large)]
        await self.conn.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        await self.conn.execute(f"PREPARE watched AS {sql}")
        given = f"({', '.join(['NULL'] * len(args))})" if args else ""
        generic = _tree(await self.conn.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE watched{given}"))
        await self.conn.execute("DEALLOCATE watched; SET LOCAL plan_cache_mode = auto")
        # PostgreSQL takes the generic plan only where it looks no dearer than planning anew each time
        if generic["Total Cost"] <= own["Total Cost"] + PLANNING:
            self.found += [f"generic plan: {problem} in\n{sql}" for problem in problems(generic, self._large)]

    async def _counters(self) -> dict[str, int]:
        """Rows read so far in this transaction, by table."""
        rows = await self.conn.fetch(
            """
            SELECT relname, seq_tup_read + coalesce(idx_tup_fetch, 0) AS read FROM pg_stat_xact_user_tables
            WHERE schemaname = 'indexer' AND relname = ANY ($1)
            """,
            GROWING,
        )
        return {row["relname"]: row["read"] for row in rows}


def _tree(plan: Any) -> dict[str, Any]:
    tree: dict[str, Any] = (json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]
    return tree


def problems(plan: dict[str, Any], large: Collection[str], limited: bool = False) -> list[str]:
    """Sequential scans of growing tables in a plan, and index scans of them that nothing narrows and no LIMIT ends."""
    found = []
    kind, table = plan["Node Type"], plan.get("Relation Name")
    if table in GROWING and table in large:
        if kind == "Seq Scan" and (plan.get("Filter") or not limited):
            found.append(f"sequential scan of {table} (about {plan['Plan Rows']} rows)")
        elif plan.get("Index Name") in large and not plan.get("Index Cond") and not limited:
            found.append(f"the whole of {plan['Index Name']} of {table} read")
    # what sorts or gathers reads all of its input, whatever limits its output
    limited = kind == "Limit" or (limited and kind in ("LockRows", "Nested Loop", "Result", "Subquery Scan"))
    for child in plan.get("Plans", []):
        found += problems(child, large, limited)
    return found


@pytest.fixture(scope="module")
async def populated(postgres: Postgres) -> AsyncIterator[str]:
    """A database with a past; each test works in a transaction that is rolled back."""
    async with postgres.fresh_database() as name:
        conn = await asyncpg.connect(postgres.owner_url(name), command_timeout=300)
        try:
            # a worker of autovacuum belongs to the superuser, and the database could not be dropped under it
            for table in GROWING:
                await conn.execute(f"ALTER TABLE indexer.{table} SET (autovacuum_enabled = false)")
            await POPULATION.write(conn)
        finally:
            await conn.close()
        yield postgres.owner_url(name)


@pytest.fixture
async def conn(populated: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(populated)
    await connection.set_type_codec(
        "jsonb",
        schema="pg_catalog",
        format="binary",
        encoder=lambda value: b"\x01" + msgspec.json.encode(value),
        decoder=lambda data: msgspec.json.decode(data[1:]),
    )
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield connection
    finally:
        await transaction.rollback()
        await connection.close()


@pytest.fixture
async def watched(conn: asyncpg.Connection) -> AsyncIterator[Any]:
    watched = Watched(conn)
    yield watched
    assert watched.statements, "nothing was asked"
    assert not watched.found, "\n\n".join(watched.found)


def header(number: int) -> Header:
    return Header(
        number,
        Hash32(block_hash(number)),
        Hash32(block_hash(number - 1)),
        (BASE_MS + BLOCK_MS * number) // 1000,
        BASE_MS + BLOCK_MS * number,
        bytes(256),
        Hash32(bytes(32)),
    )


def leg(i: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": KIND,
        "chainId": str(CHAIN),
        "issuer": "0x" + ISSUER.hex(),
        "holder": "0x" + "44" * 20,
        "loyaltyId": "0x" + LOYALTY_ID.hex(),
        "amount": "250",
        "nonce": "0x" + nonce(i).hex(),
    } | more


async def touch(conn: asyncpg.Connection, first: int, count: int) -> None:
    await conn.execute(
        "INSERT INTO indexer.touched_operation (operation_id) SELECT unnest($1::uuid[])",
        [operation_id(i) for i in range(first, first + count)],
    )


def signal(kind: str, i: int, supersedes: UUID | None = None) -> Signal:
    return Signal(uuid4(), BRAND, "operation", operation_id(i), kind, {"type": kind, "data": {}}, 2, supersedes)


# --------------------------------------------------------------------------- settling


async def test_a_pass_of_the_reconciler(watched: Watched, conn: asyncpg.Connection) -> None:
    await conn.execute(
        "INSERT INTO indexer.touched_blocks (chain_id, from_block, to_block) SELECT $1, n, n + 1 FROM generate_series(1, 1000) AS n",
        CHAIN,
    )
    await touch(conn, 100, 150)  # fulfilled long ago
    await touch(conn, POPULATION.settled, 150)  # waiting for evidence
    done = await reconcile(watched, {}, {})  # type: ignore[arg-type]
    assert done.operations


async def test_a_pass_that_settles_and_reverts(watched: Watched, conn: asyncpg.Connection) -> None:
    waiting = POPULATION.settled + 5  # matched by nonce
    await conn.execute(
        """
        INSERT INTO indexer.movement SELECT chain_id, block_number, log_index + 100, block_hash, block_time_ms, tx_hash, tx_index, emitter,
            canonical, kind, factory, issuer, loyalty_id, loyalty, holder, bucket, amount, sha256(convert_to('waits ' || $1::int, 'UTF8')), NULL, data
        FROM indexer.movement WHERE nonce = $2
        """,
        waiting,
        nonce(waiting),
    )
    await conn.execute("UPDATE indexer.movement SET canonical = false WHERE nonce = $1", nonce(3))
    await conn.execute(
        "UPDATE indexer.leg SET (holder, amount) = (SELECT holder, amount FROM indexer.movement WHERE nonce = $2) WHERE operation_id = $1",
        operation_id(waiting),
        nonce(waiting),
    )
    await touch(conn, waiting, 1)
    await touch(conn, 3, 1)
    done = await reconcile(watched, {}, {})  # type: ignore[arg-type]
    assert {operation.reference for operation, _, _ in done.transitions} == {f"op-{waiting}", "op-3"}


async def test_an_idle_pass(watched: Watched) -> None:
    done = await reconcile(watched, {}, {})  # type: ignore[arg-type]
    assert not done.operations and not done.backlog


async def test_alarms_that_ring(watched: Watched, conn: asyncpg.Connection) -> None:
    await conn.execute(
        "UPDATE indexer.alarm SET threshold = 1 WHERE operation_id = $1", operation_id(POPULATION.settled)
    )
    done = await reconcile(watched, {}, {})  # type: ignore[arg-type]
    assert done.operations == 1


async def test_deep_queues(watched: Watched, conn: asyncpg.Connection) -> None:
    await touch(conn, 0, 100_000)
    await conn.execute(
        "INSERT INTO indexer.touched_blocks (chain_id, from_block, to_block) SELECT $1, n, n FROM generate_series(1, 100000) AS n",
        CHAIN,
    )
    await conn.execute("ANALYZE indexer.touched_operation, indexer.touched_blocks")
    assert await operations.spread_touched_blocks(watched) == 100  # type: ignore[arg-type]
    assert len(await operations.take_touched(watched, 200)) == 200  # type: ignore[arg-type]


async def test_expiry_is_proven(watched: Watched, conn: asyncpg.Connection) -> None:
    around = await neighbourhood.load(watched, [operation_id(POPULATION.settled)])  # type: ignore[arg-type]
    assert await expiry.watched_since(watched, around.legs)  # type: ignore[arg-type]
    assert await expiry.highest_time_ms(watched, CHAIN, 40_000) is not None  # type: ignore[arg-type]
    await expiry.first_block_since(watched, CHAIN, BASE_MS)  # type: ignore[arg-type]


async def test_partner_legs_and_their_records(watched: Watched, conn: asyncpg.Connection) -> None:
    """Forty thousand legs over five thousand wallets, as many records, half of them settled."""
    await conn.execute("INSERT INTO indexer.partner_account (brand, partner) VALUES ($1, 'keyban')", BRAND)
    await conn.execute(
        """
        INSERT INTO indexer.leg (operation_id, leg, kind, match, amount, wallet_id, requested_at)
        SELECT id, 1, 'keyban.mint', 'wallet_amount', 100 + n % 3, 'w' || n % 5000, to_timestamp(n)
        FROM (SELECT id, row_number() OVER (ORDER BY id) AS n FROM indexer.operation) AS o WHERE n <= 40000
        """
    )
    await conn.execute(
        """
        INSERT INTO indexer.partner_transfer (id, brand, partner, kind, record_id, wallet, amount, time_ms, status, network, tx_hashes,
            chain_id, transfers, tx_hash, first_seen_at, settled_at)
        SELECT gen_random_uuid(), $1, 'keyban', 'keyban.mint', 'o' || n, 'w' || n % 5000, 100 + n % 3, n * 1000, 'succeeded', 'BaseSepolia',
            ARRAY['0x' || encode(sha256(n::text::bytea), 'hex')], $2, ARRAY['t/' || n], '0x' || encode(sha256(n::text::bytea), 'hex'),
            to_timestamp(n), to_timestamp(n) FROM generate_series(1, 40000) AS n
        """,
        BRAND,
        CHAIN,
    )
    await conn.execute("UPDATE indexer.partner_transfer SET unmatched_look_at = NULL WHERE time_ms % 2000 = 0")
    await conn.execute("ANALYZE indexer.leg, indexer.partner_transfer, indexer.claim")
    ids = [
        row["operation_id"]
        for row in await conn.fetch("SELECT operation_id FROM indexer.leg WHERE leg = 1 ORDER BY wallet_id LIMIT 100")
    ]
    around = await neighbourhood.load(watched, ids)  # type: ignore[arg-type]
    assert len(around.partner_legs) >= 100 and len(around.transfers) >= 50
    await conn.execute("INSERT INTO indexer.touched_operation (operation_id) SELECT unnest($1::uuid[])", ids)
    await conn.execute("ANALYZE indexer.touched_operation")
    await reconcile(watched, {}, {})  # type: ignore[arg-type]
    await tell_unmatched_records(watched, {}, 0)  # type: ignore[arg-type]
    await partner_evidence.spoken_for_beside(watched, around.transfers)  # type: ignore[arg-type]
    for view in ("settlements", "partner_orders"):
        where = "operation_id = $1"
        await watched.fetch(f"SELECT * FROM loyalty.{view} WHERE {where}", ids[0])
    await _pollers(watched, conn)


async def _pollers(watched: Watched, conn: asyncpg.Connection) -> None:
    """What pollers and look-ups ask and write, and retention, on those records: each with a version that was superseded."""
    await conn.execute(
        """
        INSERT INTO indexer.partner_record (brand, partner, record_id, version, raw, wallet, time_ms, seen_at, current)
        SELECT $1, 'keyban', 'o' || n, v, '{}', 'w' || n % 5000, n * 1000, to_timestamp(1e9 + n), v = 2
        FROM generate_series(1, 15000) AS n, generate_series(1, 2) AS v
        """,
        BRAND,
    )
    await conn.execute(
        """
        INSERT INTO indexer.partner_wallet (brand, partner, wallet, first_look_at, last_look_at, next_look_at)
        SELECT $1, 'keyban', 'w' || n, to_timestamp(n), to_timestamp(n), to_timestamp(n) FROM generate_series(0, 20999) AS n
        """,
        BRAND,
    )
    await conn.execute(
        """
        INSERT INTO indexer.chain_lookup (chain_id, tx_hash, answered_at, block_number, block_hash, success, transfer, final)
        SELECT $1, sha256(n::text::bytea), to_timestamp(n), n, sha256(n::text::bytea), true, '[]', n > 100
        FROM generate_series(1, 21000) AS n
        """,
        CHAIN,
    )
    await conn.execute("ANALYZE indexer.partner_record, indexer.partner_wallet, indexer.chain_lookup")
    db: Any = watched
    account = partner_accounts.Account(BRAND, "keyban")
    wallet = "w17"
    known = await partner_listings.known_of(db, account, wallet)
    assert len(known.records) == 3
    current = await partners.current_records(db, account, known.records)
    assert {each.version for each in current.values()} == {2}
    await partner_listings.oldest_restless_ms(db, account, datetime.now(UTC).timestamp() - 3600.0)
    await partner_listings.resting(db, account, list(known.records), 60.0)
    transfer = partners.TransferRow(
        uuid4(), "keyban.mint", "new", wallet, None, 100, "100", 1, False, "succeeded", "BaseSepolia", CHAIN, ("0x" + "cd" * 32,), 7
    )  # fmt: skip
    stored = await partners.store_records(db, account, [partners.RecordRow("new", 1, {}, wallet, 1, (transfer,))])
    assert stored.new == 1
    await partners.take_over(
        db, account._replace(brand="another"), partners.Stored(others=[partners.Foreign(transfer, None, True)])
    )
    assert await partner_evidence.hold(db, {transfer.id: BRAND}) == {transfer.id}
    await partner_listings.still_there(db, account, wallet, list(known.records), 60.0)
    for _ in range(2):
        stored = await partner_listings.sweep(db, account, wallet, ["new"], 0, 10**12)
    assert stored.withdrawn == 3
    await partners.touch_partner_legs(db, BRAND, [("keyban.mint", wallet)])
    assert len(await partner_accounts.idle_wallets(db, account, 50)) == 50
    await partner_accounts.looked(db, account, [wallet], 1.0, swept=True, news=False)
    await partner_accounts.put_off(db, account, wallet)
    await lookups.ask_chain(db, [(CHAIN, b"\x07" * 32)])
    await lookups.attempted(db, CHAIN, [b"\x07" * 32])
    assert await lookups.questions(db, CHAIN, 10, 2.0, 20)
    await lookups.canonical_hash(db, CHAIN, 5)
    await lookups.answer(db, CHAIN, [lookups.AnswerRow(b"\x07" * 32, 5, bytes(32), True, [])])
    assert await partners.forget_versions(db, timedelta(days=30), 500) == 500
    left = await conn.fetch("SELECT current, count(*) FROM indexer.partner_record GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in left] == [(False, 14_500), (True, 15_001)], "the last version of a record stays"
    oldest = await conn.fetchval("SELECT min(seen_at) FROM indexer.partner_record WHERE NOT current")
    assert oldest == datetime.fromtimestamp(1e9 + 501, UTC), "the oldest went"


async def test_unmatched_evidence_is_told(watched: Watched) -> None:
    await tell_unmatched(watched, 0)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- signals


async def test_signals_are_appended_and_numbered(watched: Watched) -> None:
    first = [signal(READY, i) for i in range(50)]
    await signals.append(watched, first)  # type: ignore[arg-type]
    await signals.append(watched, [signal(REVERTED, 0, first[0].id)])  # type: ignore[arg-type]
    numbered = await signals.number(watched)  # type: ignore[arg-type]
    assert numbered.signals == {BRAND: 51} and numbered.deliveries == 51


async def test_deliveries_begin_and_end(watched: Watched, conn: asyncpg.Connection) -> None:
    await signals.append(conn, [signal(READY, i) for i in range(500)])
    await signals.number(conn)
    await conn.execute(
        "UPDATE indexer.delivery SET next_at = now() WHERE state = 'pending'"
    )  # the clock stands still in here
    rooms = [deliveries.Room(BRAND, "shop", 50, 10.0)]
    turn = await deliveries.begin(watched, rooms)  # type: ignore[arg-type]
    assert len(turn.attempts) == 50
    await deliveries.next_due(watched, rooms)  # type: ignore[arg-type]
    await deliveries.recall(watched)  # type: ignore[arg-type]
    outcomes = [deliveries.Outcome(attempt, "delivered", 200, None) for attempt in turn.attempts]
    assert len(await deliveries.record(watched, outcomes)) == 50  # type: ignore[arg-type]


async def test_a_signal_is_sent_again(watched: Watched, conn: asyncpg.Connection) -> None:
    signal_id = await conn.fetchval("SELECT id FROM indexer.outbox WHERE brand = $1 AND sequence = 77", BRAND)
    assert await signals.redeliver(watched, signal_id) == ["shop"]  # type: ignore[arg-type]
    await signals.show_signal(watched, signal_id)  # type: ignore[arg-type]
    await signals.redeliver_dead(watched, BRAND, "shop")  # type: ignore[arg-type]


async def test_endpoints_and_what_they_got(watched: Watched, conn: asyncpg.Connection) -> None:
    await conn.execute("UPDATE indexer.delivery SET state = 'dead' WHERE sequence % 1000 = 0")
    await webhooks.list_webhooks(watched)  # type: ignore[arg-type]
    for state in (None, "pending", "dead", "delivered"):
        await signals.list_signals(watched, state=state)  # type: ignore[arg-type]
    await signals.list_signals(watched, brand=BRAND)  # type: ignore[arg-type]
    await signals.list_signals(watched, operation=operation_id(5))  # type: ignore[arg-type]
    await deliveries.forget(watched, keep=timedelta(days=30), limit=100)  # type: ignore[arg-type]
    await deliveries.forget(watched, keep=timedelta(0), limit=100)  # type: ignore[arg-type]
    await webhooks.enable_webhook(watched, BRAND, "shop")  # type: ignore[arg-type]


# --------------------------------------------------------------------------- facts of a chain


def movement_row(number: int, index: int) -> tuple[Any, ...]:
    place = (CHAIN, number, index, block_hash(number), BASE_MS + BLOCK_MS * number, nonce(number), 0, FACTORY, True)
    parties = (KIND, FACTORY, ISSUER, LOYALTY_ID, TOKEN, b"\x44" * 20)
    return (*place, *parties, 0, 250, block_hash(number + index), None, b"")


class Rows:
    programmes = transfers = programme_events = raw_logs = ()

    def __init__(self, *movements: tuple[Any, ...]) -> None:
        self.movements = movements


async def test_a_step_and_a_reorganisation_are_committed(watched: Watched) -> None:
    head = POPULATION.head
    new = [header(number) for number in range(head + 1, head + 11)]
    rows = Rows(*(movement_row(h.number, 0) for h in new))
    await facts.commit_step(
        watched,  # type: ignore[arg-type]
        CHAIN, head=new[-1], headers=new, rows=rows, covered=[("gate", head + 1, head + 10)], mode="socket",
    )  # fmt: skip
    done = await facts.commit_step(
        watched,  # type: ignore[arg-type]
        CHAIN, head=new[-1], headers=new[-2:], rows=Rows(movement_row(head + 9, 1)),
        covered=[("gate", head + 9, head + 10)], mode="socket", orphan_above=head + 8,
    )  # fmt: skip
    assert done.orphaned_events == 2


async def test_a_range_is_committed_and_mended(watched: Watched) -> None:
    rows = Rows(*(movement_row(number, 50) for number in range(1, 1001)))
    covered = [Covered(FACTORY, 1, 1000, "unverified"), Covered(FACTORY, 1, 500, "second_look")]
    done = await facts.commit_range(
        watched,  # type: ignore[arg-type]
        CHAIN, rows=rows, covered=covered, headers=[header(7)], withdraw=[(9, block_hash(9), 0)],
    )  # fmt: skip
    assert (done.events, done.orphaned_events) == (1000, 1)
    assert await stored.readings(watched, CHAIN, [FACTORY], 1, 1000)  # type: ignore[arg-type]


async def test_following_starts_moves_and_prunes(watched: Watched) -> None:
    conn: Any = watched
    await chains.load_chain(conn, CHAIN)
    await chains.load_emitters(conn, CHAIN)
    await chains.load_programmes(conn, CHAIN)
    assert await chains.held(conn, CHAIN, 5) is not None
    assert await chains.held_at_or_below(conn, CHAIN, 5) is not None
    await chains.set_tags(conn, CHAIN, header(POPULATION.head), header(POPULATION.head - 1))
    assert await chains.prune_headers(conn, CHAIN, POPULATION.head - 900, POPULATION.head - 500)
    await coverage.gaps(conn, CHAIN, 1000)
    await coverage.unverified(conn, CHAIN, 1000)
    assert await coverage.covered_until(conn, CHAIN, [FACTORY], 5) is not None


# --------------------------------------------------------------------------- what people and programs ask


READS: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "one operation": lambda conn: queries.operation(conn, operation_id(5)),
    "its brand": lambda conn: queries.brand_of(conn, operation_id(5)),
    "all operations": lambda conn: queries.operations(conn),
    "a brand's operations": lambda conn: queries.operations(conn, brand=BRAND),
    "operations by state": lambda conn: queries.operations(conn, brand=BRAND, states=["pending", "ready"]),
    "operations by reference": lambda conn: queries.operations(conn, reference="op-77"),
    "programmes": lambda conn: programmes.programs(conn),
    "a brand's programmes": lambda conn: programmes.programs(conn, brand=BRAND),
    "an issuer's programmes": lambda conn: programmes.programs(conn, issuer=Address(ISSUER)),
    "a page of the stream": lambda conn: feed.read(conn, BRAND, 30_000, limit=100, max_bytes=10**6),
    "the stream from its start": lambda conn: feed.read(conn, BRAND, None, limit=100, max_bytes=10**6),
    "the stream from now on": lambda conn: feed.read(conn, BRAND, None, limit=100, max_bytes=10**6, at_end=True),
    "news of the stream": lambda conn: feed.news(conn, {BRAND: 59_990, "other": 0}, limit=100),
    "a page of a wallet's balances": lambda conn: queries.balances(conn, Address(wallet(7))),
    "a wallet's balances": lambda conn: queries.balances_of(conn, Address(wallet(7))),
    "the newest that waits at Loyfin": lambda conn: partner_hints.newest_waiting(conn, BRAND),
    "the overview": lambda conn: overview.overview(conn),
}


@pytest.mark.parametrize("read", READS)
async def test_what_is_read(watched: Watched, read: str) -> None:
    await READS[read](watched)


async def test_gauges(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    # fewer than in life: against so small a table of claims, ten thousand look-ups would be the dearer way
    monkeypatch.setattr(overview, "RECENT_MOVEMENTS", 500)
    await overview.observe_database(watched, Metrics())  # type: ignore[arg-type]


async def test_a_page_far_back(watched: Watched) -> None:
    page = await queries.operations(watched, brand=BRAND, limit=200)  # type: ignore[arg-type]
    for _ in range(3):
        page = await queries.operations(watched, brand=BRAND, limit=200, cursor=page.next_cursor)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- functions of the database


async def test_functions_of_the_contract(watched: Watched, conn: asyncpg.Connection) -> None:
    request = {"brand": BRAND, "reference": "new", "requestedAt": datetime.now(UTC).isoformat(), "legs": [leg(10**9)]}
    registered = await functions.register_operation(watched, json.dumps(request))  # type: ignore[arg-type]
    assert registered.created
    with pytest.raises(asyncpg.PostgresError, match="nonce"):  # the search for who holds the nonce
        async with conn.transaction():
            taken = {**request, "reference": "taken", "legs": [leg(5)]}
            await functions.register_operation(watched, json.dumps(taken))  # type: ignore[arg-type]
    await functions.cancel(watched, registered.id)  # type: ignore[arg-type]
    await functions.fulfil(watched, operation_id(7), 1, "{}")  # type: ignore[arg-type]
    evidence = evidence_id(CHAIN, FACTORY, KIND, ISSUER, nonce(10**9))
    await conn.execute(
        "UPDATE indexer.operation SET detail = $2 WHERE id = $1",
        operation_id(POPULATION.settled),
        {"conflicts": [{"leg": 0, "evidenceId": str(evidence)}]},
    )
    await functions.resolve(watched, operation_id(POPULATION.settled), evidence, True, "looked into it", "anna")  # type: ignore[arg-type]


VIEWS = {
    "what to hand over": ("SELECT * FROM loyalty.pending_fulfilments WHERE brand = $1 LIMIT 100", BRAND),
    "signals after a number": (
        "SELECT * FROM loyalty.signals WHERE brand = $1 AND sequence > 80000 ORDER BY sequence LIMIT 100",
        BRAND,
    ),
    "an operation by reference": ("SELECT * FROM loyalty.operations WHERE brand = $1 AND reference = 'op-5'", BRAND),
    "the state of syncing": ("SELECT * FROM loyalty.sync_status WHERE $1 <> ''", BRAND),
}


@pytest.mark.parametrize("view", VIEWS)
async def test_views_of_the_contract(watched: Watched, view: str) -> None:
    await watched.fetch(*VIEWS[view])
