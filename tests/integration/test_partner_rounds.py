"""Registrations and partner histories through the whole way: simulated partners on sockets, the pollers' looks, a real store and the
reconciler. Rounds of bad weather over many customers, each of whose wallets is a case of its own; then the truth, by groups.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path

from indexer.model.confidence import Level, Policy
from indexer.partners.client import PartnerError
from indexer.sandbox.partners.keyban import Keyban
from indexer.sandbox.partners.movement import Course
from indexer.sandbox.partners.partner import Partner
from indexer.sandbox.partners.qiibee import BASE, Qiibee
from indexer.sandbox.partners.wire import JSON, Reply
from indexer.store.database import Database
from tests.integration.test_partner_legs import rules, world_at
from tests.oracle import judge_database
from tests.partner_office import KEY, Time, office

SAMPLES = Path(__file__).parents[1] / "samples"
WALLETS, MEMBERS, ROUNDS = 25, 12, 3
AMOUNTS = (10, 20)
WEATHER = {
    "page_drift": 0.5, "duplicates": 0.5, "disorder": 0.5, "late": 0.3, "retyped": 0.5, "missing_field": 0.5, "unknown_word": 0.3,
    "empty_list": 0.3, "blinking": 0.2, "turned": 0.1, "reincluded": 0.1, "deleted": 0.1, "server_error": 0.1, "cut_off": 0.1,
}  # fmt: skip
DAY = 90_000.0  # seconds, and a bit: an empty answer is believed, and qiibee's history read whole

Group = tuple[str, str, int]  # kind, wallet, amount


async def test_rounds_of_registrations_and_histories_settle_what_stands_one_to_one(
    database: Database, dsn: str
) -> None:
    time, rng = Time(), random.Random(3)
    keyban = Keyban(seed=3, clock=time.now, keys=[KEY])
    qiibee = Qiibee(seed=3, clock=time.now, keys=[KEY])
    partners: tuple[Partner, ...] = (keyban, qiibee)
    owners = [keyban.open_account() for _ in range(WALLETS)]
    members = [qiibee.enrol() for _ in range(MEMBERS)]
    legs: Counter[Group] = Counter()

    def course() -> Course:
        chance, appears = rng.random(), rng.uniform(-60, 30)
        sent = appears + rng.uniform(0, 20)
        return Course(appears, sent, None if chance < 0.1 else sent + rng.uniform(0, 30), fails=chance > 0.9)

    async with (
        world_at(dsn, rules(Policy(Level.INCLUDED))) as world,
        office(database, keyban, time, name="keyban") as orders,
        office(database, qiibee, time, name="qiibee", base=BASE, header="X-API-KEY") as history,
    ):
        await world.conn.execute("UPDATE indexer.partner_account SET active = true")
        by_wallet, whole = orders.keyban(), history.qiibee()

        async def wait(kind: str, wallet: str, amount: int) -> None:
            legs[kind, wallet, amount] += 1
            await world.register({"kind": kind, "walletId": wallet, "amount": str(amount)})

        async def trade() -> None:
            for owner in owners:
                for _ in range(rng.randint(0, 2)):
                    kind, amount = rng.choice(("keyban.mint", "keyban.mint", "keyban.burn")), rng.choice(AMOUNTS)
                    if rng.random() < 0.8:
                        await wait(kind, owner.wallet, amount)
                    if rng.random() < 0.8:
                        (keyban.mint if kind == "keyban.mint" else keyban.burn)(owner, amount, course())
            for member in members:
                for _ in range(rng.randint(0, 2)):
                    kind, amount = rng.choice(("qiibee.credit", "qiibee.debit")), rng.choice(AMOUNTS)
                    if rng.random() < 0.8:
                        await wait(kind, member.auth_id, amount)
                    if rng.random() < 0.8:
                        (qiibee.credit if kind == "qiibee.credit" else qiibee.debit)(member, amount, course())

        async def at_any_rate(look: Callable[[], Awaitable[None]]) -> None:
            try:
                await look()
            except PartnerError:
                assert any(partner.weather.struck for partner in partners)

        async def look_at_everything() -> None:
            for owner in rng.sample(owners, len(owners)):
                wallet = await orders.wallet(owner.wallet)
                await at_any_rate(lambda wallet=wallet: by_wallet.look(wallet))  # type: ignore[misc]
            await at_any_rate(whole.look)
            await at_any_rate(whole.sweep_if_due)

        async def claims() -> dict[Group, set[str]]:
            found: dict[Group, set[str]] = defaultdict(set)
            for row in await world.conn.fetch(
                "SELECT t.kind, t.wallet, t.amount, t.record_id FROM indexer.claim c JOIN indexer.operation o ON o.id = c.operation_id"
                " JOIN indexer.partner_transfer t ON t.id = c.evidence_id WHERE o.state = 'ready'"
            ):
                found[row["kind"], row["wallet"], int(row["amount"])].add(row["record_id"])
            return found

        for owner in owners:  # something that never settles keeps everybody under watch
            await wait("keyban.mint", owner.wallet, 999)
        for _ in range(ROUNDS):
            await trade()
            time.ahead += rng.uniform(10, 60)
            for partner in partners:
                for fault in rng.sample(sorted(WEATHER), 5):
                    partner.weather.begin(fault, chance=WEATHER[fault])
            await look_at_everything()
            for partner in partners:
                partner.weather.end()
            await world.settle()

        for _ in range(3):
            time.ahead += DAY
            await look_at_everything()
            await world.settle()
        standing: dict[Group, set[str]] = defaultdict(set)
        for partner in partners:
            for moved in partner.standing():
                standing[moved.kind, moved.wallet, int(moved.amount)].add(moved.id)
        settled = await claims()
        for group, registered in legs.items():
            assert settled.get(group, set()) <= standing[group], f"{group}: on something that does not stand"
            assert len(settled.get(group, ())) == min(registered, len(standing[group])), group
        assert settled.keys() <= legs.keys() and sum(map(len, settled.values())) > WALLETS
        assert await judge_database(world.conn) == []

        # the same history in other pages and another order: nothing is new
        signals = await world.conn.fetchval("SELECT count(*) FROM indexer.outbox")
        versions = await world.conn.fetchval("SELECT count(*) FROM indexer.partner_record")
        keyban.order = "oldest"
        by_wallet._walker.size = 4
        await world.conn.execute("DELETE FROM indexer.touched_operation")
        await look_at_everything()
        assert await orders.touched() == set()
        await world.touch_all()
        assert await world.settle() == [] and await claims() == settled
        assert await world.conn.fetchval("SELECT count(*) FROM indexer.outbox") == signals
        assert await world.conn.fetchval("SELECT count(*) FROM indexer.partner_record") == versions


async def test_the_samples_settle_what_they_show_and_nothing_else(database: Database, dsn: str) -> None:
    """The recorded answers, byte for byte, in place of a simulator's."""
    time = Time()
    keyban, qiibee = Keyban(seed=1, clock=time.now, keys=[KEY]), Qiibee(seed=1, clock=time.now, keys=[KEY])
    for partner, name in ((keyban, "keyban_orders"), (qiibee, "qiibee_transactions")):
        body = (SAMPLES / f"{name}.json").read_bytes()
        partner.route = lambda _, body=body: Reply(200, body, {"Content-Type": JSON})  # type: ignore[method-assign, misc]
    wallet = "GCRKV5VQIMXJTYFWFIJ4M726IUWVHW7EJV2A2SSZMO3BO5MI2SBMHNQL"
    ada, ben = "0d6c6a53-0c0e-4c8e-9b0b-6f0f5b6f1a10", "b7a0b1c9-5a63-4a0f-8f2a-1d2c3b4a5e60"
    expected = {
        ("keyban.mint", wallet, 150, "2026-11-20T10:20:00Z"): "ready",  # two transfers that sum up
        ("keyban.burn", wallet, 40, "2026-11-20T10:20:00Z"): "ready",
        ("keyban.mint", wallet, 60, "2026-11-20T10:20:00Z"): "pending",  # in a block, and failed
        ("keyban.mint", wallet, 75, "2026-11-20T10:20:00Z"): "pending",  # under way, since nobody knows when
        ("keyban.mint", wallet, 40, "2026-11-20T10:20:00Z"): "pending",  # the other way
        ("keyban.mint", wallet, 120, "2026-11-20T10:20:00Z"): "pending",  # one transfer of two
        ("qiibee.credit", ada, 25, "2026-11-20T10:40:00Z"): "submitted",
        ("qiibee.debit", ada, 100, "2026-11-20T10:40:00Z"): "ready",
        ("qiibee.debit", ada, 10, "2026-11-20T10:30:00Z"): "pending",  # an exchange
        ("qiibee.debit", ben, 50, "2026-11-20T09:50:00Z"): "pending",  # a reward
        ("qiibee.credit", ben, 15, "2026-11-19T16:20:00Z"): "ready",  # one that failed, one that did not
        ("qiibee.credit", ben, 15, "2026-11-20T16:20:00Z"): "pending",  # another day
    }
    async with (
        world_at(dsn, rules(Policy(Level.INCLUDED))) as world,
        office(database, keyban, time, name="keyban") as orders,
        office(database, qiibee, time, name="qiibee", base=BASE, header="X-API-KEY") as history,
    ):
        await world.conn.execute("UPDATE indexer.partner_account SET active = true")
        operations = {
            await world.register({"kind": kind, "walletId": who, "amount": str(amount)}, requestedAt=at): state
            for (kind, who, amount, at), state in expected.items()
        }
        for _ in range(2):
            await orders.keyban().look(await orders.wallet(wallet))
            await history.qiibee().look()
            await world.settle()
            time.ahead += DAY
        states = {row["id"]: row["state"] for row in await orders.rows("SELECT id, state FROM indexer.operation")}
        told = [(*terms, states[operation]) for operation, terms in zip(operations, expected, strict=True)]
        assert told == [(*terms, state) for terms, state in expected.items()]
        assert await judge_database(world.conn) == []
        assert not orders.oddities() and not history.oddities(), "they are as documented"
