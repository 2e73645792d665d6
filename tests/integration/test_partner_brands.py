"""Brands that read one account at a partner, each with a key of its own, and wait for equal amounts: evidence and claim name one brand.

Whoever reads and whoever settles meet in the database in any order: held apart by hand in the first tests, left to chance under a
seed in the last.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
import pytest

from indexer.partners.account import Desk
from indexer.partners.keyban import KeybanPoller
from indexer.partners.orders import Ledger
from indexer.partners.walk import Walk
from indexer.sandbox.partners.keyban import Keyban
from indexer.sandbox.partners.movement import AT_ONCE
from indexer.settlement.loop import tell_unmatched_records
from indexer.settlement.reconciler import reconcile
from indexer.store.database import Database
from indexer.store.leases import Leases
from indexer.store.partner_accounts import Account, OpenWallet
from tests.partner_office import BRAND, KEY, Office, Time, office

ROSE = "rose"
LEDGER = "StellarTestnet"

# Claims on partners' evidence that another brand's account shows by now.
_ASTRAY = """
    SELECT o.brand AS claims, t.brand AS shows, t.record_id FROM indexer.claim c
    JOIN indexer.operation o ON o.id = c.operation_id JOIN indexer.partner_transfer t ON t.id = c.evidence_id
    WHERE o.brand <> t.brand
"""


def mint(wallet: str, amount: int) -> dict[str, str]:
    return {"kind": "keyban.mint", "walletId": wallet, "amount": str(amount)}


def poller(desk: Desk, *, keep: float = 0.0) -> KeybanPoller:
    return KeybanPoller(desk, Ledger(desk.account.brand, LEDGER), 5.0, keep=keep, sweep_gap=0.0)


def anyone(wallet: str) -> OpenWallet:
    return OpenWallet(wallet, 1, 0.0, 0, None, None, None)


async def register(database: Database, brand: str, leg: dict[str, str], reference: str) -> UUID:
    request = {"brand": brand, "reference": reference, "legs": [leg]}
    return UUID((await database.pool.fetchval("SELECT loyalty.register_operation($1)", request))["id"])


@asynccontextmanager
async def desk_of(database: Database, brand: str, beside: Desk) -> AsyncIterator[Desk]:
    """Another brand's desk at the same partner, with a lease and a session of its own."""
    await database.pool.execute("INSERT INTO indexer.brand (name) VALUES ($1)", brand)
    account = Account(brand, beside.account.partner)
    await database.pool.execute("INSERT INTO indexer.partner_account (brand, partner) VALUES ($1, $2)", *account)
    async with Leases(database, ttl=30.0).hold(f"poll:{account.partner}:{brand}") as lease:
        yield replace(beside, account=account, lease=lease, told=set(), _troubles=set())


@asynccontextmanager
async def session(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    conn = await asyncpg.connect(dsn)
    await conn.set_type_codec(
        "jsonb", schema="pg_catalog", encoder=lambda v: msgspec.json.encode(v).decode(), decoder=msgspec.json.decode
    )
    try:
        yield conn
    finally:
        await conn.close()


async def settle(conn: asyncpg.Connection) -> None:
    """Passes until nothing is left to do."""
    while True:
        async with conn.transaction():
            done = await reconcile(conn, {}, {})
        if not done.operations and not done.backlog:
            return


async def waiting(database: Database) -> int:
    """How many sessions wait for another's lock."""
    return int(
        await database.pool.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    )


async def until(met: Callable[[], Awaitable[bool]], within: float = 20.0) -> None:
    async with asyncio.timeout(within):
        while not await met():
            await asyncio.sleep(0.01)


async def look_and_settle(desks: list[Desk], wallets: list[str], conn: asyncpg.Connection) -> None:
    for desk in desks:
        for wallet in wallets:
            await poller(desk).look(anyone(wallet))
        await settle(conn)


@asynccontextmanager
async def two_brands(
    database: Database,
) -> AsyncIterator[tuple[Office, Desk, Desk, str, list[UUID], Callable[[], object]]]:
    """Bloom and rose wait for ten points at one wallet, where there is one such order; bloom has read it. The last makes another."""
    time = Time()
    partner = Keyban(seed=3, clock=time.now, keys=[KEY])
    account = partner.open_account()
    async with office(database, partner, time, name="keyban") as room:
        bloom = room.desk
        async with desk_of(database, ROSE, bloom) as rose:
            partner.mint(account, 10, AT_ONCE)
            await poller(bloom).look(anyone(account.wallet))
            await a_minute_later(database)
            operations = [await register(database, brand, mint(account.wallet, 10), "r") for brand in (BRAND, ROSE)]
            yield room, bloom, rose, account.wallet, operations, lambda: partner.mint(account, 10, AT_ONCE)


async def a_minute_later(database: Database) -> None:
    """Whoever read it first has had the first choice. What others are writing is left out: nobody is waited for."""
    await database.pool.execute(
        """
        UPDATE indexer.partner_transfer SET settled_at = settled_at - interval '1 minute'
        WHERE id IN (SELECT id FROM indexer.partner_transfer FOR NO KEY UPDATE SKIP LOCKED)
        """
    )


async def states(database: Database, operations: list[UUID]) -> list[str]:
    rows = await database.pool.fetch("SELECT id, state FROM indexer.operation")
    found = {row["id"]: row["state"] for row in rows}
    return [found[operation] for operation in operations]


async def test_what_is_being_claimed_is_not_had_by_another_brand_that_looks_before_the_commit(
    database: Database, dsn: str
) -> None:
    async with two_brands(database) as (room, bloom, rose, wallet, operations, another), session(dsn) as conn:
        settling = conn.transaction()
        await settling.start()
        assert [each.type for each in (await reconcile(conn, {}, {})).signals][:1] == ["operation.ready"]
        async with asyncio.timeout(20):
            await poller(rose).look(anyone(wallet))  # nobody waits for anybody
        await settling.commit()
        assert await database.pool.fetch(_ASTRAY) == []
        await settle(conn)
        assert await states(database, operations) == ["ready", "pending"]
        assert room.oddities()["foreign"] == 1

        # each looks again, and again: it stays so, until there is evidence for the other too
        await look_and_settle([rose, bloom, rose], [wallet], conn)
        assert await states(database, operations) == ["ready", "pending"]
        another()
        await look_and_settle([bloom, rose], [wallet], conn)
        assert await states(database, operations) == ["ready", "ready"]
        assert await database.pool.fetch(_ASTRAY) == []


async def test_what_another_brand_is_having_is_not_claimed_by_whoever_read_it_before(
    database: Database, dsn: str
) -> None:
    async with two_brands(database) as (_, bloom, rose, wallet, operations, _), session(dsn) as conn:
        async with database.pool.acquire() as holder, holder.transaction():
            # the look stops where everything is written: directly before its COMMIT
            await holder.execute("SELECT FROM indexer.lease WHERE task = $1 FOR UPDATE", rose.lease.task)
            look = asyncio.create_task(poller(rose).look(anyone(wallet)))

            async def stopped(sessions: int) -> bool:
                return await waiting(database) >= sessions

            await until(lambda: stopped(1))
            settling = asyncio.create_task(settle(conn))

            async def done_or_stopped() -> bool:
                return settling.done() or await stopped(2)

            await until(done_or_stopped)
        await asyncio.gather(look, settling)
        assert await database.pool.fetch(_ASTRAY) == []
        await settle(conn)
        assert await states(database, operations) == ["pending", "ready"]
        await look_and_settle([bloom], [wallet], conn)
        assert await states(database, operations) == ["pending", "ready"]


async def test_what_a_person_has_accepted_for_an_operation_is_not_had_by_another_brand(
    database: Database, owner_dsn: str
) -> None:
    async with two_brands(database) as (_, _, rose, wallet, operations, _), session(owner_dsn) as owner:
        for accept, brand in ((True, BRAND), (False, ROSE)):
            await owner.execute(
                "INSERT INTO indexer.decision (operation_id, evidence_id, accept, reason, actor)"
                " SELECT $1, id, $2, 'seen', 'anna' FROM indexer.partner_transfer",
                operations[0],
                accept,
            )
            await poller(rose).look(anyone(wallet))
            assert await database.pool.fetchval("SELECT brand FROM indexer.partner_transfer") == brand


async def test_transactions_that_wait_for_each_other_are_begun_anew_and_lose_nothing(
    database: Database, dsn: str
) -> None:
    async with two_brands(database) as (room, bloom, _, wallet, operations, another), session(dsn) as conn:
        another()
        await poller(bloom).look(anyone(wallet))
        await settle(conn)
        first, second = [
            row["id"] for row in await database.pool.fetch("SELECT id FROM indexer.partner_transfer ORDER BY id")
        ]
        for movement in room.hosted.partner.movements.values():
            movement.turned_at = room.time.now()  # both are failed now
        crossing = conn.transaction()
        await crossing.start()
        await conn.execute("UPDATE indexer.partner_transfer SET unmatched_look_at = now() WHERE id = $1", second)
        look = asyncio.create_task(poller(bloom).look(anyone(wallet)))

        async def stopped() -> bool:
            return await waiting(database) == 1

        await until(stopped)
        with suppress(
            asyncpg.DeadlockDetectedError
        ):  # the look has waited longer, and is ended; if not, it goes on as it would
            await conn.execute("UPDATE indexer.partner_transfer SET unmatched_look_at = now() WHERE id = $1", first)
        await crossing.rollback()
        await look
        assert {each["status"] for each in await room.transfers()} == {"failed"}
        assert room.oddities()["unsettled"] == 2
        await settle(conn)
        assert await states(database, operations) == ["pending", "pending"]
        told = await database.pool.fetch(
            "SELECT type FROM indexer.outbox WHERE aggregateid = $1 ORDER BY position", operations[0]
        )
        assert "operation.reverted" in [row["type"] for row in told]


# --------------------------------------------------------------------------- at random


class Holdings:
    """What the account holds: orders by wallet, as its listings show them; made, turned and taken away at random."""

    def __init__(self, rng: random.Random, wallets: list[str], amounts: list[int]) -> None:
        self.rng, self.wallets, self.amounts = rng, wallets, amounts
        self.orders: dict[str, dict[str, dict[str, Any]]] = {wallet: {} for wallet in wallets}
        self.numbers = itertools.count(1)

    def happens(self) -> None:
        wallet = self.rng.choice(self.wallets)
        held = self.orders[wallet]
        chance = self.rng.random()
        if chance < 0.5 or not held:
            self.make(wallet)
        elif chance < 0.7:
            del held[self.rng.choice(sorted(held))]
        else:
            transfer = self.transfer(held[self.rng.choice(sorted(held))])
            transfer["transaction"] |= {"success": not transfer["transaction"]["success"]}

    def make(self, wallet: str) -> None:
        number = next(self.numbers)
        transaction = {
            "id": f"{number:064x}", "blockNumber": number, "success": True, "date": datetime.now(UTC).isoformat()
        }  # fmt: skip
        transfer = {
            "id": f"t{number}", "fromId": "ISSUER", "toId": wallet, "value": str(self.rng.choice(self.amounts)),
            "transaction": transaction,
        }  # fmt: skip
        self.orders[wallet][f"o{number}"] = {
            "id": f"o{number}",
            "orderTransactions": {"nodes": [{"assetTransfer": transfer}]},
        }

    @staticmethod
    def transfer(order: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = order["orderTransactions"]["nodes"][0]["assetTransfer"]
        return found

    def listing(self, wallet: str) -> Walk:
        """Complete, and in whatever order."""
        rows = list(self.orders[wallet].items())
        self.rng.shuffle(rows)
        return Walk(rows=copy.deepcopy(dict(rows)), complete=True)

    def succeeded(self, wallet: str, amount: int) -> int:
        transfers = [self.transfer(order) for order in self.orders[wallet].values()]
        return sum(t["value"] == str(amount) and t["transaction"]["success"] for t in transfers)


@pytest.mark.parametrize("seed", [1, 2])
async def test_whoever_reads_and_settles_at_once_evidence_settles_one_operation_of_the_brand_that_shows_it(
    database: Database, dsn: str, seed: int
) -> None:
    rng = random.Random(seed)
    brands, wallets, amounts = [BRAND, ROSE, "lily"], ["GALICE", "GBOB"], [10, 20]
    ledger = Holdings(rng, wallets, amounts)
    stop, astray = asyncio.Event(), list[Any]()
    time = Time()
    async with AsyncExitStack() as stack:
        room = await stack.enter_async_context(
            office(database, Keyban(seed=3, clock=time.now, keys=[KEY]), time, name="keyban")
        )
        desks = [room.desk]
        for brand in brands[1:]:
            desks.append(await stack.enter_async_context(desk_of(database, brand, room.desk)))
        conns = [await stack.enter_async_context(session(dsn)) for _ in range(3)]
        registered: Counter[tuple[str, int]] = Counter()

        async def look(desk: Desk, wallet: str, reader: KeybanPoller) -> None:
            await reader._store(anyone(wallet), ledger.listing(wallet), desk.wall)

        async def poll(desk: Desk) -> None:
            reader = poller(desk, keep=0.05)
            while not stop.is_set():
                await look(desk, rng.choice(wallets), reader)
                await asyncio.sleep(rng.random() * 0.01)

        async def reconciles(conn: asyncpg.Connection) -> None:
            while not stop.is_set():
                try:
                    async with conn.transaction():
                        await reconcile(conn, {}, {}, batch=rng.choice([1, 3, 20]))
                        await tell_unmatched_records(conn, {}, 0)
                        await asyncio.sleep(rng.random() * 0.02)
                except (asyncpg.DeadlockDetectedError, asyncpg.UniqueViolationError):
                    pass  # as the settling loop has it: begun anew
                await asyncio.sleep(rng.random() * 0.005)

        async def happens() -> None:
            for number in range(75):
                ledger.happens()
                await a_minute_later(database)
                if number % 3 == 0:
                    wallet, amount = rng.choice(wallets), rng.choice(amounts)
                    await register(database, rng.choice(brands), mint(wallet, amount), f"r{number}")
                    registered[wallet, amount] += 1
                await asyncio.sleep(0.012)

        async def watch() -> None:
            while not stop.is_set():
                astray.extend(await conns[2].fetch(_ASTRAY))
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            world = group.create_task(happens())
            for desk in desks:
                group.create_task(poll(desk))
            for conn in conns[:2]:
                group.create_task(reconciles(conn))
            group.create_task(watch())
            await world
            stop.set()
        assert astray == [], f"seed {seed}"
        # quiet now: whoever waits finds what is left
        for _ in range(2 * len(brands)):
            for desk in desks:
                for wallet in wallets:
                    await look(desk, wallet, poller(desk))
                await settle(conns[0])
        assert await database.pool.fetch(_ASTRAY) == []
        rows = await database.pool.fetch(
            """
            SELECT l.wallet_id, l.amount::int, count(*) FROM indexer.claim c JOIN indexer.leg l USING (operation_id, leg)
            JOIN indexer.operation o ON o.id = c.operation_id WHERE o.state = 'ready' GROUP BY 1, 2
            """
        )
        settled = {(row[0], row[1]): row[2] for row in rows}
        expected = {
            (wallet, amount): min(registered[wallet, amount], ledger.succeeded(wallet, amount))
            for wallet in wallets
            for amount in amounts
        }
        assert settled == {group: many for group, many in expected.items() if many}, f"seed {seed}"
