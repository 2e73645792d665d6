"""Partner legs from registration to signal: what partners' records settle, undo, hint at and leave unmatched, in a real database.

Records are put into the store as the pollers would; what is under test is what registration and the reconciler make of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
import pytest

from indexer.api import shapes
from indexer.model.confidence import Level, Policy
from indexer.model.evidence import transfer_id
from indexer.model.matching import WalletRules
from indexer.model.signal import instant
from indexer.model.standing import PartnerRules
from indexer.settlement.loop import tell_unmatched_records
from indexer.settlement.rules import BrandRules, PartnerAccount
from indexer.store.signals import number
from tests.world import BRAND, CHAIN, FACTORY, ISSUER, World, digest, hexa, problem

HOUR_MS = 3_600_000
WALLET = WalletRules(skew_ms=60_000, window_ms=HOUR_MS)
ALICE, BOB = "GALICE", "GBOB"
TX = digest("tx")


def rules(*policies: Policy, hold: bool = False, contract: str | None = "0x70", **given: Any) -> dict[str, BrandRules]:
    wallet = WalletRules(WALLET.skew_ms, WALLET.window_ms, hold)
    account = PartnerAccount(wallet, PartnerRules(**given), contract)
    return {BRAND: BrandRules(policies, WALLET, {"keyban": account, "qiibee": account})}


class PartnerWorld(World):
    """The small world with accounts at Keyban and qiibee, and hands to write what their pollers would."""

    async def found(self) -> None:
        await super().found()
        await self.conn.executemany(
            "INSERT INTO indexer.partner_account (brand, partner) VALUES ($1, $2)",
            [(BRAND, "loyfin"), (BRAND, "keyban"), (BRAND, "qiibee")],
        )

    async def record(self, record_id: str = "o1", kind: str = "keyban.mint", **given: Any) -> UUID:
        """One record as last read: a time in seconds from now, `stood` seconds of standing unchanged."""
        partner = kind.partition(".")[0]
        terms: dict[str, Any] = {
            "wallet": ALICE, "token": None, "amount": 250, "at": 0.0, "undated": False, "status": "succeeded", "stood": 0.0,
            "network": "StellarTestnet" if partner == "keyban" else None, "chain_id": None, "tx": "ab" * 32, "withdrawn": False, "seen": 0.0,
        } | given  # fmt: skip
        identity = transfer_id(partner, kind, record_id, terms["wallet"])
        await self.conn.execute(
            """
            INSERT INTO indexer.partner_transfer AS t (id, brand, partner, kind, record_id, wallet, token, amount, amount_text, time_ms,
                undated, status, network, chain_id, tx_hash, tx_hashes, block_number, first_seen_at, settled_at, seen_at, withdrawn_at)
            SELECT $1, $2, $3, $4, $5, $6, $7, $8, $8::numeric::text,
                   CASE WHEN $9::float8 IS NOT NULL THEN (extract(epoch FROM now) * 1000 + $9 * 1000)::bigint END, $10, $11, $12, $13, $14,
                   CASE WHEN $14::text IS NULL THEN '{}' ELSE ARRAY[$14::text] END, 7, now + $17 * interval '1 second',
                   now, now + $15 * interval '1 second', CASE WHEN $16 THEN now END
            FROM (SELECT clock_timestamp() AS now) AS c
            ON CONFLICT (id) DO UPDATE SET amount = excluded.amount, status = excluded.status, tx_hashes = excluded.tx_hashes,
                settled_at = excluded.settled_at, seen_at = excluded.seen_at, withdrawn_at = excluded.withdrawn_at
            """,
            identity, BRAND, partner, kind, record_id, terms["wallet"], terms["token"], terms["amount"], terms["at"], terms["undated"],
            terms["status"], terms["network"], terms["chain_id"], terms["tx"], terms["stood"], terms["withdrawn"], terms["seen"],
        )  # fmt: skip
        await self.touch_all()
        return identity

    async def touch_all(self) -> None:
        await self.conn.execute("INSERT INTO indexer.touched_operation (operation_id) SELECT id FROM indexer.operation")

    async def hint(self, leg: dict[str, Any], status: str, reason: str | None = None, record_id: str = "128") -> None:
        await self.conn.execute(
            """
            INSERT INTO indexer.partner_hint (brand, partner, record_id, chain_id, factory, kind, issuer, nonce, status, reason)
            VALUES ($1, 'loyfin', $2, $3, $4, $5, $6, $7, $8, $9)
            ON CONFLICT (brand, partner, record_id) DO UPDATE SET status = excluded.status, reason = excluded.reason
            """,
            BRAND, record_id, CHAIN, FACTORY, leg["kind"], ISSUER, bytes.fromhex(leg["nonce"][2:]), status, reason,
        )  # fmt: skip
        await self.touch_all()

    async def answer(
        self,
        block: int | None,
        value: int = 250,
        success: bool = True,
        block_hash: bytes | None = None,
        *,
        tx: bytes = TX,
        to: str = "0xa1",
        token: str = "0x70",
    ) -> None:
        """The chain room's answer about a transaction."""
        moved = [{"token": token, "from": "0x00", "to": to, "value": str(value)}]
        await self.conn.execute(
            """
            INSERT INTO indexer.chain_lookup (chain_id, tx_hash, answered_at, block_number, block_hash, success, transfer)
            VALUES ($1, $2, clock_timestamp(), $3, $4, $5, $6)
            ON CONFLICT (chain_id, tx_hash) DO UPDATE SET block_number = excluded.block_number, block_hash = excluded.block_hash,
                success = excluded.success, transfer = excluded.transfer, answered_at = excluded.answered_at
            """,
            CHAIN, tx, block, block_hash or (None if block is None else digest("a", block)), success, moved,
        )  # fmt: skip
        await self.touch_all()

    async def said(self, operation: UUID, kind: str) -> list[dict[str, Any]]:
        rows = await self.conn.fetch(
            "SELECT payload -> 'data' AS data FROM indexer.outbox WHERE aggregateid = $1 AND type = $2 ORDER BY position",
            operation,
            f"operation.{kind}",
        )
        return [row["data"] for row in rows]


@asynccontextmanager
async def world_at(dsn: str, given: dict[str, BrandRules]) -> AsyncIterator[PartnerWorld]:
    async with PartnerWorld.at(dsn, given) as world:
        assert isinstance(world, PartnerWorld)
        yield world


def mint(wallet: str = ALICE, amount: str = "250", **given: Any) -> dict[str, Any]:
    return {"kind": "keyban.mint", "walletId": wallet, "amount": amount} | given


def credit(**given: Any) -> dict[str, Any]:
    return mint(kind="qiibee.credit", **given)


# --------------------------------------------------------------------------- registration


async def test_registration_takes_partner_legs_normalises_them_and_says_what_is_wrong(owner_dsn: str) -> None:
    async with world_at(owner_dsn, rules()) as world:
        stated = {"requestedAt": "2026-11-21T10:00:00+01:00"}
        operation = await world.register(
            mint("0xABCDEF", **stated), credit(token=12), mint(), reference="r1", requestedAt="2026-11-21T08:00:00Z"
        )
        request = (await world.operation(operation))["request"]
        assert request["legs"] == [
            {"kind": "keyban.mint", "match": "wallet_amount", "walletId": "0xabcdef", "amount": "250", "requestedAt": "2026-11-21T09:00:00.000000Z"},
            {"kind": "qiibee.credit", "match": "wallet_amount", "walletId": ALICE, "amount": "250", "token": "12"},
            {"kind": "keyban.mint", "match": "wallet_amount", "walletId": ALICE, "amount": "250"},
        ]  # fmt: skip
        legs = await world.conn.fetch("SELECT requested_at, token, chain_id FROM indexer.leg ORDER BY leg")
        assert [row["requested_at"].hour for row in legs] == [9, 8, 8] and legs[1]["token"] == "12"
        again = {"brand": BRAND, "reference": "r1", "requestedAt": "2026-11-21T08:00:00Z", "legs": request["legs"]}
        assert not (await world.conn.fetchval("SELECT loyalty.register_operation($1)", again))["created"]
        assert await world.register(mint(), mint()) != await world.register(mint(), mint()), (
            "equal ones are no duplicates"
        )

        await world.conn.execute("UPDATE indexer.partner_account SET active = false WHERE partner = 'qiibee'")
        for leg, field in (
            (credit(), "kind"),
            (mint(kind="keyban.transfer"), "kind"),
            (mint(kind="stellar.mint"), "kind"),
            (mint(amount="0"), "amount"),
            (mint(amount="2.5"), "amount"),
            (mint(amount=None), "amount"),
            (mint(wallet=""), "walletId"),
            (mint(wallet="a b"), "walletId"),
            (mint(walletId=None), "walletId"),
            (mint(walletId=7), "walletId"),
            (mint(token="12"), ""),
            (mint(nonce="0x00"), ""),
            (mint(match="nonce"), "match"),
            (mint(requestedAt="yesterday"), "requestedAt"),
            (mint(requestedAt="2026-13-41T00:00:00Z"), "requestedAt"),
        ):
            with pytest.raises(asyncpg.PostgresError) as refused:
                await world.register(leg)
            code, detail = problem(refused.value)
            assert (code, detail["field"]) == ("LY422", f"legs[0].{field}".rstrip(".")), leg
        await world.settle()


# --------------------------------------------------------------------------- settling


async def test_a_mint_on_stellar_settles_is_signalled_with_its_record_and_shown_in_the_views(owner_dsn: str) -> None:
    async with world_at(owner_dsn, rules()) as world:
        operation = await world.register(mint())
        assert await world.settle() == []
        await world.record("pending", status="pending")
        assert await world.settle() == ["operation.submitted"]
        identity = await world.record("pending")
        await world.record("another wallet", wallet=BOB)
        await world.record("another amount", amount=251)
        await world.record("another direction", kind="keyban.burn")
        await world.record("too early", at=-120.0)
        assert await world.settle() == ["operation.ready", "operation.finalized"]
        ready = (await world.said(operation, "ready"))[0]
        (entry,) = ready["evidence"]
        assert entry["recordTime"] is not None and entry.pop("recordTime")
        assert entry == {
            "leg": 0, "evidenceId": str(identity), "basis": "wallet_amount", "ambiguous": False, "confidence": "finalized",
            "provider": "keyban", "recordId": "pending", "network": "StellarTestnet", "status": "succeeded", "proof": "partner",
            "chainId": None, "blockNumber": "7", "blockHash": None, "txHash": "ab" * 32, "txHashes": ["ab" * 32], "explorerUrl": None,
        }  # fmt: skip
        row = await world.conn.fetchrow("SELECT * FROM loyalty.settlements WHERE operation_id = $1", operation)
        assert row is not None
        assert (row["kind"], row["provider"], row["record_id"], row["wallet_id"]) == (
            "keyban.mint",
            "keyban",
            "pending",
            ALICE,
        )
        assert (row["confidence"], row["amount"], row["final"], row["issuer"]) == ("finalized", 250, True, None)
        orders = await world.conn.fetch("SELECT record_id, operation_id FROM loyalty.partner_orders")
        assert len(orders) == 5 and {o["record_id"] for o in orders if o["operation_id"]} == {"pending"}
        lost = await world.conn.fetch("SELECT record_id FROM loyalty.unmatched")
        assert {r["record_id"] for r in lost} == {"another wallet", "another amount", "another direction", "too early"}


async def test_two_equal_mints_settle_two_equal_operations_one_to_one_and_say_that_they_chose(owner_dsn: str) -> None:
    async with world_at(owner_dsn, rules()) as world:
        operations = [await world.register(mint()) for _ in range(2)]
        await world.record("o1", at=1.0)
        await world.settle()
        assert sorted([await world.state(o) for o in operations]) == ["pending", "ready"]
        await world.record("o2", at=2.0)
        await world.settle()
        told = [(await world.said(o, "ready"))[0]["evidence"][0] for o in operations]
        assert {entry["recordId"] for entry in told} == {"o1", "o2"} and told[0]["ambiguous"]


async def test_a_withdrawn_record_unsettles_and_its_return_is_the_next_generation(owner_dsn: str) -> None:
    async with world_at(owner_dsn, rules()) as world:
        operation = await world.register(mint())
        await world.record()
        await world.settle()
        settled = await world.conn.fetchval(
            "SELECT extract(epoch FROM settled_at) * 1000 FROM indexer.partner_transfer"
        )
        await world.record(withdrawn=True)
        assert await world.settle() == ["operation.reverted"]
        assert await world.state(operation) == "pending", "two sweeps were sure of it"
        lost = (await world.said(operation, "reverted"))[0]["lost"]
        assert lost == [
            {
                "provider": "keyban",
                "recordId": "o1",
                "evidenceId": str(transfer_id("keyban", "keyban.mint", "o1", ALICE)),
                "settledAt": instant(round(settled)),
            }
        ]
        await world.record()
        await world.settle()
        assert (await world.operation(operation))["generation"] == 2
        await world.fulfil(operation, 2)
        for changed in ({"status": "failed"}, {"amount": 251}, {"amount": None, "status": "pending"}):
            await world.settle()
            await world.record(**changed)
            await world.settle()
            assert await world.state(operation) == "reverted", "an exposure, whatever the record became"
            await world.record()
            await world.settle()
            assert await world.state(operation) == "fulfilled"
        told = [kind for kind in await world.trace(operation) if kind in ("ready", "reverted", "restored")]
        assert told == ["ready", "reverted", "ready", *["reverted", "restored"] * 3]


@pytest.mark.parametrize("changed", [{"tx": "cd" * 32}, {"status": "included"}])
async def test_a_stricter_policy_takes_nothing_back_and_a_record_that_changes_does(
    owner_dsn: str, changed: dict[str, Any]
) -> None:
    async with world_at(owner_dsn, rules(Policy(Level.INCLUDED))) as world:
        operation, other = await world.register(mint()), await world.register(mint(BOB))
        await world.record(network="EthereumAnvil")  # on a ledger that nobody follows a record is never final
        assert await world.settle() == ["operation.ready"]
        world.rules = rules(Policy(Level.FINALIZED))
        await world.record("o2", network="EthereumAnvil", wallet=BOB)
        assert await world.settle() == ["operation.confirming"]
        assert [await world.state(o) for o in (operation, other)] == ["ready", "confirming"], "for what comes after it"
        # nor is it taken back once handed over, however often it is looked at
        await world.fulfil(operation, 1)
        await world.settle()
        assert await world.state(operation) == "fulfilled"
        await world.record(network="EthereumAnvil", **changed)
        assert await world.settle() == ["operation.reverted"], "what was promised is not there as it was"
        assert (await world.said(operation, "reverted"))[0]["lost"][0]["recordId"] == "o1"


async def test_qiibee_stands_for_settle_after_and_a_change_begins_anew(owner_dsn: str) -> None:
    async with world_at(owner_dsn, rules(settle_after_ms=60_000)) as world:
        operation = await world.register(credit(token="12"))
        await world.record("706", "qiibee.credit", token="13", stood=61.0)
        await world.record("707", "qiibee.credit", token="12")
        assert await world.settle() == ["operation.confirming"]
        alarm = await world.conn.fetchrow("SELECT axis, threshold FROM indexer.alarm")
        settled = await world.conn.fetchval(
            "SELECT extract(epoch FROM settled_at) * 1000 FROM indexer.partner_transfer WHERE record_id = '707'"
        )
        assert (
            alarm is not None and alarm["axis"] == "clock_ms" and abs(alarm["threshold"] - int(settled) - 60_000) <= 1
        )
        await world.record("707", "qiibee.credit", token="12", stood=61.0)
        assert await world.settle() == ["operation.ready", "operation.finalized"]
        await world.record("707", "qiibee.credit", token="12", tx="cd" * 32)
        await world.settle()
        assert await world.walked(operation) == ["pending", "confirming", "ready", "reverted", "confirming"]


async def test_what_has_no_time_of_its_own_waits_for_a_person(owner_dsn: str) -> None:
    async with world_at(owner_dsn, rules()) as world:
        operation = await world.register(mint())
        identity = await world.record(at=None, undated=True)
        assert await world.settle() == [] and await world.state(operation) == "pending"
        detail = (await world.operation(operation))["detail"]
        assert detail["waitingFor"] == [{"leg": 0, "confidence": "safe", "for": "decision"}]
        assert detail["conflicts"][0]["undated"] and detail["conflicts"][0]["evidenceId"] == str(identity)
        await world.decide(operation, identity, True)
        assert await world.settle() == ["operation.ready", "operation.finalized"]
        assert (await world.said(operation, "ready"))[0]["evidence"][0]["basis"] == "decision"


async def test_a_record_without_a_time_that_came_later_has_the_time_it_was_first_seen(owner_dsn: str) -> None:
    async with world_at(owner_dsn, rules()) as world:
        operation = await world.register(mint())
        await world.record(at=None)
        await world.settle()
        assert await world.state(operation) == "ready"


async def test_a_record_without_a_time_at_a_wallet_that_was_seldom_read_is_a_persons_to_decide(owner_dsn: str) -> None:
    async with world_at(owner_dsn, rules()) as world:
        operation = await world.register(mint())
        # made between a look of a week ago and the first that showed it, and nobody knows when
        record = await world.record(at=-7 * 86_400.0)
        await world.conn.execute("UPDATE indexer.partner_transfer SET after_ms = time_ms")
        await world.settle()
        assert await world.state(operation) == "pending"
        assert await world.conflicting(operation) == str(record)
        await world.decide(operation, record, True)
        assert "operation.ready" in await world.settle()


async def test_a_held_tie_waits_for_the_brands_choice(owner_dsn: str) -> None:
    async with world_at(owner_dsn, rules(hold=True)) as world:
        operations = [await world.register(mint()) for _ in range(2)]
        choice = await world.record("o1")
        assert await world.settle() == []
        for operation in operations:
            assert (await world.operation(operation))["detail"]["waitingFor"][0]["for"] == "decision"
        await world.decide(operations[1], choice, True)
        await world.settle()
        assert [await world.state(o) for o in operations] == ["pending", "ready"]
        other = await world.record("o2")
        await world.settle()
        assert [await world.state(o) for o in operations] == ["ready", "ready"], "no tie is left"
        assert other != choice


# --------------------------------------------------------------------------- on a chain that we follow


async def test_on_a_followed_chain_a_transfer_settles_after_our_own_look_and_on_that_chains_ladder(
    owner_dsn: str,
) -> None:
    async with world_at(owner_dsn, rules()) as world:
        operation = await world.register(mint("0xA1"))
        await world.record(wallet="0xa1", network="BaseSepolia", chain_id=CHAIN, tx=hexa(TX))
        await world.heads(head=200, safe=100, finalized=40)
        assert await world.settle() == ["operation.confirming"]
        evidence = (await world.operation(operation))["detail"]["evidence"][0]
        assert evidence["confidence"] is None and evidence["proof"] == "partner", "the partner's word is nothing yet"
        await world.answer(None)
        await world.settle()
        assert await world.state(operation) == "confirming"
        await world.answer(101)
        assert await world.settle() == []
        await world.heads(head=260, safe=101)
        assert await world.settle() == ["operation.ready"]
        evidence = (await world.operation(operation))["detail"]["evidence"][0]
        assert (evidence["confidence"], evidence["proof"], evidence["blockNumber"]) == ("safe", "chain", "101")
        # the block is orphaned: its answer counts no more, although nobody has asked again yet
        await world.conn.execute("UPDATE indexer.block SET canonical = false WHERE number = 101")
        await world.conn.execute(
            "INSERT INTO indexer.block (chain_id, number, hash, parent_hash, time_ms) VALUES ($1, 101, $2, $2, 0)",
            CHAIN,
            digest("b", 101),
        )
        await world.touch_blocks(101, 101)
        assert await world.settle() == ["operation.reverted", "operation.confirming"]
        await world.answer(102)
        await world.heads(safe=102, finalized=102)
        assert await world.settle() == ["operation.ready", "operation.finalized"]
        assert (await world.said(operation, "ready"))[-1]["evidence"][0]["blockNumber"] == "102"


async def test_a_transfer_of_another_token_settles_nothing_and_without_a_token_configured_none_does(
    owner_dsn: str,
) -> None:
    async with world_at(owner_dsn, rules(Policy(Level.INCLUDED), contract=None)) as world:
        operation = await world.register(mint("0xa1"))
        await world.record(wallet="0xa1", network="BaseSepolia", chain_id=CHAIN, tx=hexa(TX))
        await world.heads(head=200, safe=200, finalized=200)
        await world.answer(101)
        await world.settle()
        assert await world.state(operation) == "confirming", "what the chain holds is not what nobody named"
        waiting = (await world.operation(operation))["detail"]["waitingFor"][0]
        assert waiting["for"] == "confidence" and "brands.keyban.token" in waiting["reason"]
        world.rules = rules(Policy(Level.INCLUDED))  # configured now
        await world.answer(101, token="0x71")  # somebody's own token, the same wallet and amount
        assert "operation.ready" not in await world.settle()
        assert await world.state(operation) == "pending"
        await world.answer(101)
        assert "operation.ready" in await world.settle()


async def test_what_the_chain_refutes_settles_nothing_and_a_latched_chain_waits(owner_dsn: str) -> None:
    async with world_at(owner_dsn, rules(Policy(Level.INCLUDED))) as world:
        operation = await world.register(mint("0xa1"))
        await world.record(wallet="0xa1", network="BaseSepolia", chain_id=CHAIN, tx=hexa(TX))
        await world.answer(5, value=249)
        assert await world.settle() == ["operation.rejected"]
        rejected = (await world.said(operation, "rejected"))[0]
        assert (rejected["final"], rejected["reason"]) == (False, "refuted by the chain")
        await world.answer(5, success=False)
        assert await world.settle() == []
        await world.conn.execute("UPDATE indexer.chain SET latch = '{}'")
        await world.answer(5)
        assert await world.settle() == [] and await world.state(operation) == "pending"
        await world.conn.execute(
            "UPDATE indexer.chain SET latch = NULL, head_at = clock_timestamp() - interval '1 day'"
        )
        await world.touch_all()
        await world.settle()
        assert await world.state(operation) == "pending", "a chain that nobody follows now promises nothing"
        await world.conn.execute("UPDATE indexer.chain SET head_at = clock_timestamp() + interval '1 hour'")
        await world.touch_all()
        await world.settle()
        assert await world.state(operation) == "ready"


async def test_orders_that_name_one_transfer_are_one_movement_also_once_it_is_promised(owner_dsn: str) -> None:
    async with world_at(owner_dsn, rules(Policy(Level.INCLUDED))) as world:

        async def holds(*values: int) -> None:
            moved = [{"token": "0x70", "from": "0x00", "to": "0xa1", "value": str(value)} for value in values]
            await world.conn.execute("UPDATE indexer.chain_lookup SET transfer = $1", moved)

        async def settle_the_rest() -> None:
            await world.conn.execute("DELETE FROM indexer.touched_operation WHERE operation_id = $1", first)
            await world.settle()

        first = await world.register(mint("0xa1"))
        place: dict[str, Any] = {"wallet": "0xa1", "network": "BaseSepolia", "chain_id": CHAIN, "tx": hexa(TX)}
        await world.record("o1", **place)
        await world.answer(5)
        await holds(250, 100)
        assert "operation.ready" in await world.settle()
        second, sum_of_all = await world.register(mint("0xa1")), await world.register(mint("0xa1", amount="350"))
        twin = await world.record("o2", **place)
        await world.record("o3", amount=350, **place)
        await settle_the_rest()
        assert [await world.state(each) for each in (first, second, sum_of_all)] == ["ready", "pending", "pending"]
        with pytest.raises(asyncpg.PostgresError):  # nobody is asked to choose what is taken
            await world.decide(second, twin, True)
        # another transfer of as much is in the transaction after all
        await holds(250, 100, 250)
        await world.touch_all()
        await settle_the_rest()
        assert [await world.state(each) for each in (first, second, sum_of_all)] == ["ready", "ready", "pending"]


async def test_orders_that_name_one_transfer_on_stellar_are_one_movement_too(owner_dsn: str) -> None:
    async with world_at(owner_dsn, rules(Policy(Level.INCLUDED))) as world:
        first = await world.register(mint())
        await world.record("o1")
        await world.conn.execute("UPDATE indexer.partner_transfer SET transfers = '{tx/1}'")
        assert "operation.ready" in await world.settle()
        second, other = await world.register(mint()), await world.register(mint(amount="300"))
        await world.record("o2")
        await world.record("o3", amount=300)
        await world.conn.execute("UPDATE indexer.partner_transfer SET transfers = '{tx/1}'")
        await world.conn.execute("DELETE FROM indexer.touched_operation WHERE operation_id = $1", first)
        await world.settle()
        assert [await world.state(each) for each in (first, second, other)] == ["ready", "pending", "pending"]
        await world.conn.execute("UPDATE indexer.partner_transfer SET transfers = ARRAY['tx/' || record_id]")
        await world.touch_all()
        await world.settle()
        assert [await world.state(each) for each in (first, second, other)] == ["ready"] * 3


# --------------------------------------------------------------------------- several legs, hints, failure


async def test_burn_on_loyfin_then_mint_on_keyban_is_ready_when_both_are_each_at_its_own_confidence(
    owner_dsn: str,
) -> None:
    policies = (Policy(Level.FINALIZED, kind="loyfin.redemption"), Policy(Level.INCLUDED))
    async with world_at(owner_dsn, rules(*policies)) as world:
        burn = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(burn, mint())
        await world.record()
        assert await world.settle() == ["operation.confirming"]
        await world.event(100, burn)
        await world.heads(head=200, safe=150, finalized=99)
        assert await world.settle() == []
        assert (await world.operation(operation))["detail"]["waitingFor"] == [
            {"leg": 0, "confidence": "finalized", "for": "confidence"}
        ]
        await world.heads(finalized=100)
        assert await world.settle() == ["operation.ready", "operation.finalized"]
        entries = (await world.said(operation, "ready"))[0]["evidence"]
        assert [(e["leg"], e["basis"], e.get("provider")) for e in entries] == [
            (0, "nonce", None),
            (1, "wallet_amount", "keyban"),
        ]


async def test_a_failed_mint_is_hinted_leaves_the_other_leg_incomplete_and_settles_after_all(owner_dsn: str) -> None:
    async with world_at(owner_dsn, rules(Policy(Level.INCLUDED))) as world:
        burn = world.leg(nonce=hexa(world.nonce()))
        alone = await world.register(mint(BOB))
        operation = await world.register(burn, mint())
        await world.record("f1", status="failed")
        await world.record("f2", status="failed", wallet=BOB)
        assert await world.settle() == ["operation.rejected"] * 2
        rejected = (await world.said(operation, "rejected"))[0]
        assert {key: rejected[key] for key in ("leg", "provider", "recordId", "reason", "final", "executableUntil")} == {
            "leg": 1, "provider": "keyban", "recordId": "f1", "reason": "failed", "final": False, "executableUntil": None,
        }  # fmt: skip
        assert [await world.state(o) for o in (alone, operation)] == ["pending", "pending"], "nothing ends by it"
        await world.event(100, burn)
        assert await world.settle() == ["operation.incomplete"]
        await world.record("o2", at=1.0)
        assert await world.settle() == ["operation.ready"]
        assert await world.state(alone) == "pending"


async def test_loyfins_api_hints_and_ends_nothing(owner_dsn: str) -> None:
    async with world_at(owner_dsn, rules(Policy(Level.INCLUDED))) as world:
        leg = world.leg(nonce=hexa(world.nonce()), deadline="1900000000")
        other = world.leg(nonce=hexa(world.nonce()))
        operation, untouched = await world.register(leg), await world.register(other)
        await world.hint(leg, "pending")
        assert await world.settle() == []
        await world.hint(leg, "submitted")
        assert await world.settle() == ["operation.submitted"]
        await world.hint(leg, "rejected", "cancelled")
        assert await world.settle() == ["operation.rejected"]
        rejected = (await world.said(operation, "rejected"))[0]
        assert (rejected["final"], rejected["executableUntil"], rejected["reason"]) == (
            False,
            "1900000000",
            "cancelled",
        )
        waiting = (await world.operation(operation))["detail"]["waitingFor"][0]
        assert waiting["rejected"] == [{"provider": "loyfin", "recordId": "128", "reason": "cancelled"}]
        await world.hint(leg | {"nonce": hexa(world.nonce())}, "rejected", record_id="129")
        assert await world.settle() == []
        await world.event(100, leg)
        assert await world.settle() == ["operation.ready"], "the signed action was mined after all"
        assert await world.state(untouched) == "pending"


async def test_a_partner_leg_never_expires_and_one_settled_after_cancelling_is_a_conflict(owner_dsn: str) -> None:
    async with world_at(owner_dsn, rules()) as world:
        operation = await world.register(mint())
        await world.heads(head=10_000_000, safe=10_000_000, finalized=10_000_000)
        await world.cover(0, 10_000_000)
        assert await world.settle() == [] and await world.state(operation) == "pending"
        assert (await world.cancel(operation))["executableUntil"] is None
        assert await world.settle() == ["operation.cancelled"]
        later = await world.register(mint())
        identity = await world.record()
        await world.settle()
        assert [await world.state(o) for o in (operation, later)] == ["cancelled", "ready"], "the open one goes first"
        await world.record("o2")
        await world.settle()
        assert await world.state(operation) == "conflict" and identity is not None


# --------------------------------------------------------------------------- unmatched


async def test_a_record_that_nothing_claims_is_told_once_it_is_final_and_ten_minutes_old(owner_dsn: str) -> None:
    given = rules(settle_after_ms=60_000)
    async with world_at(owner_dsn, given) as world:

        async def told(quiet_ms: int = 600_000) -> int:
            async with world.conn.transaction():
                return await tell_unmatched_records(world.conn, given, quiet_ms)

        claimed, strange = await world.register(mint()), {"wallet": BOB, "seen": -700.0}
        await world.record("claimed", seen=-700.0)
        await world.record("young", wallet=BOB)
        await world.record("old", at=-700.0, **strange)
        await world.record("history", at=-10.0 * 365 * 86_400, **strange)
        await world.record("undated", at=None, undated=True, **strange)
        await world.record("failed", status="failed", **strange)
        await world.record("unripe", "qiibee.credit", **strange)
        await world.settle()
        assert await told() == 1 and await told() == 0
        row = await world.conn.fetchrow(
            "SELECT payload, brand, aggregateid FROM indexer.outbox WHERE type = 'settlement.unmatched'"
        )
        assert row is not None and row["brand"] == BRAND
        assert row["payload"]["data"]["evidence"][0]["recordId"] == "old"
        # an order that names the transfer of another is no other movement: not beside what settles a leg, nor beside what was told
        await world.record("twin", seen=-700.0)
        await world.record("old twin", at=-700.0, **strange)
        await world.record("stranger", at=-700.0, **strange)
        await world.conn.execute(
            "UPDATE indexer.partner_transfer SET transfers = ARRAY['tx/' || CASE WHEN record_id LIKE '%twin' THEN 1 ELSE 2 END],"
            " unmatched_look_at = least(unmatched_look_at, now()) WHERE record_id ~ 'twin|stranger'"
        )
        await world.conn.execute(
            "UPDATE indexer.partner_transfer SET transfers = '{tx/1}' WHERE record_id IN ('claimed', 'old')"
        )
        assert await told() == 1 and await told() == 0
        rows = await world.conn.fetch(
            "SELECT payload FROM indexer.outbox WHERE type = 'settlement.unmatched' ORDER BY position"
        )
        assert [row["payload"]["data"]["evidence"][0]["recordId"] for row in rows] == ["old", "stranger"]
        await world.record("twin", status="failed", seen=-700.0)
        # what a leg lets go of is looked at again
        await world.conn.execute(
            "UPDATE indexer.partner_transfer SET unmatched_look_at = NULL WHERE record_id = 'claimed'"
        )
        await world.decide(claimed, transfer_id("keyban", "keyban.mint", "claimed", ALICE), False)
        await world.settle()
        assert await told() == 1


# --------------------------------------------------------------------------- words


async def test_what_is_told_of_partners_has_the_documented_shapes(owner_dsn: str) -> None:
    async with world_at(owner_dsn, rules(Policy(Level.INCLUDED))) as world:
        await world.register(
            world.leg(nonce=hexa(world.nonce())), mint(), credit(token=12, requestedAt="2026-11-21T10:00:00Z")
        )
        for wallet in ("w1", "w2", "w3", "w4"):
            await world.register(mint(wallet))
        late = await world.register(mint("w5"))
        await world.record("o1", wallet="w1")
        await world.record("o2", wallet="w2", status="failed")
        await world.record("o3", wallet="w3", at=None, undated=True)
        await world.record("o4", wallet="w4", status="pending")
        await world.settle()
        await world.record("o1", wallet="w1", withdrawn=True)
        await world.cancel(late)
        await world.settle()
        await world.record("o5", wallet="w5")
        await world.settle()
        async with world.conn.transaction():
            await tell_unmatched_records(world.conn, world.rules, 0)
            await number(world.conn)

        def check(told: Any, shape: Any) -> None:
            """It is what the document says, and the document leaves nothing out."""
            read = msgspec.convert(told, shape)
            assert keys(msgspec.to_builtins(read)) == keys(told)

        def keys(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: keys(each) if key != "metadata" else None for key, each in value.items()}
            return [keys(each) for each in value] if isinstance(value, list) else None

        seen = set()
        for row in await world.conn.fetch("SELECT legs, evidence, waiting_for, conflicts FROM loyalty.operations"):
            check(row["legs"], list[shapes.Leg])
            check(row["evidence"], list[shapes.Evidence])
            check(row["waiting_for"], list[shapes.Waiting])
            check(row["conflicts"], list[shapes.Conflict])
            seen |= {key for each in row["waiting_for"] for key in each} | {
                key for each in row["conflicts"] for key in each
            }
        assert seen >= {"submitted", "rejected", "undated", "late"}
        signals = await world.conn.fetch("SELECT type, payload FROM loyalty.signals")
        for row in signals:
            check(row["payload"], shapes.Signal)
        kinds = {"ready", "finalized", "reverted", "rejected", "cancelled", "conflict"}
        assert {row["type"] for row in signals} >= {f"operation.{kind}" for kind in kinds}
