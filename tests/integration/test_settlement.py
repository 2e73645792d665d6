"""The rules of settling, row by row of the design's section 5, over real facts in a real database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import UUID, uuid5

import asyncpg
import pytest

from indexer.model.confidence import Level, Policy
from indexer.model.matching import WalletRules
from indexer.model.operation import NAMESPACE_OPERATION
from indexer.settlement.rules import BrandRules
from tests.world import BASE_MS, BRAND, CHAIN, ISSUER, World, digest, hexa, problem

INCLUDED = {BRAND: BrandRules((Policy(Level.INCLUDED),))}


@pytest.fixture
async def world(owner_dsn: str) -> AsyncIterator[World]:
    async with World.at(owner_dsn) as made:
        yield made


def deadline(block: int) -> str:
    """The whole second that a block's time lies in."""
    return str((BASE_MS + 200 * block) // 1000)


async def test_the_operation_id_is_uuid5_of_brand_and_reference(world: World) -> None:
    for reference in ("redemption-8841", "ünïcode ✓ " + "x" * 150, "a"):
        operation = await world.register(world.leg(nonce=hexa(world.nonce())), reference=reference)
        assert operation == uuid5(NAMESPACE_OPERATION, f"{BRAND}/{reference}")


async def test_ready_waits_for_safe_by_default_and_is_signalled_once(world: World) -> None:
    leg = world.leg(nonce=hexa(world.nonce()))
    operation = await world.register(leg)
    assert await world.settle() == []
    await world.event(100, leg)
    await world.heads(head=120, safe=90)
    assert await world.settle() == ["operation.confirming"]
    await world.heads(safe=99)
    assert await world.settle() == []
    await world.heads(safe=100)
    assert await world.settle() == ["operation.ready"]
    await world.heads(safe=500, finalized=100)
    assert await world.settle() == ["operation.finalized"]
    assert await world.state(operation) == "ready"


@pytest.mark.parametrize(
    ("policy", "head", "safe", "ready"),
    [
        (Policy(Level.INCLUDED), 100, 0, True),
        (Policy(Level.CONFIRMED, seconds=10), 149, 0, False),
        (Policy(Level.CONFIRMED, seconds=10), 150, 0, True),
        (Policy(Level.CONFIRMED, seconds=3600), 150, 100, True),
        (Policy(Level.SAFE), 400, 99, False),
        (Policy(Level.FINALIZED), 400, 300, False),
    ],
)
async def test_the_policy_decides_how_deep(owner_dsn: str, policy: Policy, head: int, safe: int, ready: bool) -> None:
    async with World.at(owner_dsn, {BRAND: BrandRules((policy,))}) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        await world.event(100, leg)
        await world.heads(head=head, safe=safe)
        await world.settle()
        assert await world.state(operation) == ("ready" if ready else "confirming")


async def test_the_first_policy_that_applies_counts(owner_dsn: str) -> None:
    rules = BrandRules((Policy(Level.INCLUDED, max_amount=100), Policy(Level.FINALIZED)))
    async with World.at(owner_dsn, {BRAND: rules}) as world:
        small, large = (
            world.leg(nonce=hexa(world.nonce()), amount="100"),
            world.leg(nonce=hexa(world.nonce()), amount="101"),
        )
        operations = [await world.register(small), await world.register(large)]
        await world.event(5, small)
        await world.event(6, large)
        await world.heads(head=10, safe=10)
        await world.settle()
        assert [await world.state(operation) for operation in operations] == ["ready", "confirming"]


async def test_reverted_follows_ready_when_its_block_is_orphaned_and_ready_returns_with_the_next_generation(
    owner_dsn: str,
) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        await world.event(100, leg)
        await world.heads(head=101)
        await world.settle()
        await world.orphan(99)
        assert await world.settle() == ["operation.reverted"]
        assert await world.state(operation) == "reverted"
        await world.event(102, leg, fork="b")
        assert await world.settle() == ["operation.ready"]
        row = await world.operation(operation)
        assert (row["state"], row["generation"]) == ("ready", 2)
        signals = await world.conn.fetch(
            "SELECT id, type, supersedes, superseded_by, generation FROM indexer.outbox ORDER BY position"
        )
        ready, reverted, again = signals
        assert reverted["supersedes"] == ready["id"] and ready["superseded_by"] == reverted["id"]
        assert again["superseded_by"] is None and [s["generation"] for s in signals] == [1, 1, 2]


async def test_the_same_block_returning_gives_a_new_ready_and_not_the_old_one(owner_dsn: str) -> None:
    """F07: A → B → A."""
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        for _ in range(3):
            await world.event(100, leg)
            await world.settle()
            await world.orphan(99)
            await world.settle()
        assert await world.trace(operation) == ["ready", "reverted"] * 3
        assert len({row["id"] for row in await world.conn.fetch("SELECT id FROM indexer.outbox")}) == 6


async def test_mined_again_within_one_commit_stays_ready(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        await world.event(100, leg)
        await world.settle()
        await world.orphan(99)
        await world.event(101, leg, fork="b")
        assert await world.settle() == []
        assert (await world.operation(operation))["detail"]["evidence"][0]["blockNumber"] == "101"


async def test_fulfilled_then_orphaned_is_an_exposure_and_its_return_is_restored_not_ready(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        await world.event(100, leg)
        await world.settle()
        assert await world.fulfil(operation, 1) == "fulfilled"
        assert await world.settle() == ["operation.fulfilled"]
        await world.orphan(99)
        assert await world.settle() == ["operation.reverted"]
        await world.event(103, leg, fork="b")
        assert await world.settle() == ["operation.restored"]
        assert await world.trace(operation) == ["ready", "fulfilled", "reverted", "restored"]
        row = await world.operation(operation)
        assert (row["state"], row["generation"]) == ("fulfilled", 2)


async def test_a_receipt_for_a_generation_taken_back_is_recorded_and_answered_reverted(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        await world.event(100, leg)
        await world.settle()
        await world.orphan(99)
        await world.settle()
        assert await world.fulfil(operation, 1) == "reverted"
        await world.settle()
        assert await world.state(operation) == "reverted"  # an exposure: handed out, and no longer settled
        await world.event(103, leg, fork="b")
        assert await world.settle() == ["operation.restored"]
        assert await world.trace(operation) == ["ready", "reverted", "restored"]


async def test_fulfil_is_idempotent_and_refuses_what_was_never_ready(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        with pytest.raises(asyncpg.PostgresError) as refused:
            await world.fulfil(operation, 1)
        assert problem(refused.value)[0] == "LY409"
        await world.event(100, leg)
        await world.settle()
        for _ in range(3):
            assert await world.fulfil(operation, 1) == "fulfilled"
            await world.settle()
        assert await world.trace(operation) == ["ready", "fulfilled"]


async def test_ready_with_a_receipt_that_loses_its_evidence_was_fulfilled_first(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        await world.event(100, leg)
        await world.settle()
        await world.fulfil(operation, 1)
        await world.orphan(99)
        await world.settle()
        assert await world.trace(operation) == ["ready", "fulfilled", "reverted"]


async def test_gone_for_good_is_pending_again(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        await world.event(100, leg)
        await world.settle()
        await world.orphan(99)
        await world.settle()
        await world.heads(head=200, safe=150, finalized=99)
        await world.settle()
        assert await world.state(operation) == "reverted"
        await world.heads(finalized=100)
        await world.settle()
        assert await world.state(operation) == "pending"
        assert (await world.cancel(operation))["executableUntil"] is None
        assert await world.settle() == ["operation.cancelled"]


async def test_confirming_falls_back_to_pending_without_a_word_that_matters(world: World) -> None:
    leg = world.leg(nonce=hexa(world.nonce()))
    operation = await world.register(leg)
    await world.event(100, leg)
    await world.settle()
    await world.orphan(99)
    await world.settle()
    assert await world.walked(operation) == ["pending", "confirming", "pending"]
    assert await world.trace(operation) == ["confirming"]


# --------------------------------------------------------------------------- identity and matching


@pytest.mark.parametrize("term", ["amount", "holder", "loyaltyId", "expiresAt", "operationHash"])
async def test_other_terms_under_the_nonce_are_a_conflict(owner_dsn: str, term: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()), operationHash=hexa(digest("h")))
        operation = await world.register(leg)
        other = {"amount": "251", "holder": hexa(b"\x41" * 20), "loyaltyId": hexa(b"\x1e" * 32), "expiresAt": "1900000000",
                 "operationHash": hexa(digest("other"))}  # fmt: skip
        await world.event(100, leg, **{term: other[term]})
        assert await world.settle() == ["operation.conflict"]
        conflict = (await world.operation(operation))["detail"]["conflicts"][0]
        assert [difference["term"] for difference in conflict["differences"]] == [term]


async def test_a_conflict_accepted_becomes_ready_by_decision(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        await world.event(100, leg, amount="200")
        await world.settle()
        await world.decide(operation, await world.conflicting(operation), True)
        assert await world.settle() == ["operation.ready"]
        assert (await world.operation(operation))["detail"]["evidence"][0]["basis"] == "decision"


async def test_a_conflict_dismissed_is_pending_and_one_whose_event_is_orphaned_too(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        legs = [world.leg(nonce=hexa(world.nonce())) for _ in range(2)]
        operations = [await world.register(leg) for leg in legs]
        for leg in legs:
            await world.event(100 + legs.index(leg), leg, amount="200")
        await world.settle()
        await world.decide(operations[0], await world.conflicting(operations[0]), False)
        await world.settle()
        assert [await world.state(o) for o in operations] == ["pending", "conflict"]
        await world.orphan(100)
        await world.settle()
        assert [await world.state(o) for o in operations] == ["pending", "pending"]


async def test_a_foreign_issuer_with_a_copied_hash_and_nonce_touches_nothing(owner_dsn: str) -> None:
    """Promise 1: anyone can copy a public hash."""
    async with World.at(owner_dsn, INCLUDED) as world:
        nonce, operation_hash = hexa(world.nonce()), hexa(digest("h"))
        by_nonce = await world.register(world.leg(nonce=nonce))
        by_hash = await world.register(world.leg(operationHash=operation_hash))
        for changed in ({"issuer": hexa(b"\x66" * 20)}, {"factory": hexa(b"\x67" * 20)}, {"kind": "loyfin.issuance"}):
            await world.event(
                100 + len(changed["issuer"]) if "issuer" in changed else 300,
                world.leg(nonce=nonce, operationHash=operation_hash),
                **changed,
            )
        await world.settle()
        assert [await world.state(by_nonce), await world.state(by_hash)] == ["pending", "pending"]


async def test_a_retry_has_the_same_hash_and_a_new_nonce(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        shared = hexa(digest("h"))
        first, retry = (
            world.leg(nonce=hexa(world.nonce()), operationHash=shared),
            world.leg(nonce=hexa(world.nonce()), operationHash=shared),
        )
        operations = [await world.register(first), await world.register(retry)]
        await world.event(100, retry)
        await world.settle()
        assert [await world.state(o) for o in operations] == ["pending", "ready"]


async def test_two_buckets_under_one_hash_are_two_legs(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        shared = hexa(digest("h"))
        legs = [world.leg(operationHash=shared, expiresAt=bucket, amount="100") for bucket in ("0", "1900000000")]
        operation = await world.register(*legs)
        await world.event(100, legs[1], index=1)
        await world.settle()
        assert await world.state(operation) == "confirming"
        await world.event(101, legs[0])
        assert await world.settle() == ["operation.ready"]
        assert {e["basis"] for e in (await world.operation(operation))["detail"]["evidence"]} == {"operation_hash"}


async def test_the_oldest_of_several_equal_legs_settles_and_says_ambiguous(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(operationHash=hexa(digest("h")))
        operations = [await world.register(leg) for _ in range(3)]
        for number in range(2):
            await world.event(100 + number, leg)
            await world.settle()
        assert [await world.state(o) for o in operations] == ["ready", "ready", "pending"]
        detail = (await world.operation(operations[0]))["detail"]
        assert detail["evidence"][0]["ambiguous"] is True


async def test_a_hash_with_other_terms_conflicts_only_where_it_can_mean_one_operation(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        one, two = world.leg(operationHash=hexa(digest("one"))), world.leg(operationHash=hexa(digest("two")))
        alone = await world.register(one)
        pair = [await world.register(two), await world.register(two)]
        await world.event(100, one, amount="1")
        await world.event(101, two, amount="1")
        await world.settle()
        assert await world.state(alone) == "conflict"
        assert [await world.state(o) for o in pair] == ["pending", "pending"]


async def test_a_second_event_of_one_identity_settles_nothing(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()), operationHash=hexa(digest("h")))
        operation = await world.register(leg)
        waiting = await world.register(world.leg(operationHash=hexa(digest("h"))))
        await world.event(100, leg)
        await world.event(101, leg)
        await world.settle()
        assert [await world.state(operation), await world.state(waiting)] == ["ready", "pending"]


async def test_by_wallet_and_amount_the_whole_group_is_paired_in_order_of_time(owner_dsn: str) -> None:
    rules = {BRAND: BrandRules((Policy(Level.INCLUDED),), WalletRules(skew_ms=0, window_ms=60_000))}
    async with World.at(owner_dsn, rules) as world:
        leg = world.leg(match="wallet_amount")
        times = ["2026-09-21T14:13:20Z", "2026-09-21T14:13:30Z", "2026-09-21T14:20:00Z"]  # BASE_MS is …13:20
        operations = [await world.register(leg, requestedAt=at) for at in times]
        await world.event(60, leg)  # 12 s after the base: both of the first two could mean it
        await world.settle()
        assert [await world.state(o) for o in operations] == ["ready", "pending", "pending"]
        await world.event(70, leg)
        await world.settle()
        assert [await world.state(o) for o in operations] == ["ready", "ready", "pending"]


async def test_hold_leaves_ambiguous_pairs_to_a_person(owner_dsn: str) -> None:
    rules = {BRAND: BrandRules((Policy(Level.INCLUDED),), WalletRules(hold=True))}
    async with World.at(owner_dsn, rules) as world:
        leg = world.leg(match="wallet_amount")
        operations = [await world.register(leg, requestedAt="2026-09-21T14:13:20Z") for _ in range(2)]
        await world.event(60, leg)
        await world.settle()
        assert {await world.state(o) for o in operations} == {"pending"}
        held = [o for o in operations if (await world.operation(o))["detail"]["conflicts"]]
        holder = held[0]
        await world.decide(holder, await world.conflicting(holder), True)
        await world.settle()
        assert await world.state(holder) == "ready"


async def test_registration_refuses_what_cannot_identify_and_what_is_not_the_brands(world: World) -> None:
    nonce = hexa(world.nonce())
    await world.register(world.leg(nonce=nonce), reference="first")
    await world.add_brand("other", b"\x99" * 20)
    cases = [
        ("LY422", world.leg()),
        ("LY422", world.leg(operationHash=hexa(bytes(32)))),
        ("LY422", world.leg(nonce=nonce, match="wallet_amount")),
        ("LY403", world.leg(nonce=nonce, issuer=hexa(b"\x99" * 20))),
        ("LY409", world.leg(nonce=nonce)),
        ("LY422", world.leg(nonce=nonce, chainId="1")),
        ("LY422", world.leg(nonce=nonce, factory=hexa(b"\x01" * 20))),
        ("LY422", world.leg(nonce="0x12")),
        ("LY422", world.leg(nonce=nonce, amount="0")),
        ("LY422", world.leg(nonce=nonce, amount=str(2**256))),
        ("LY422", world.leg(nonce=nonce, amount="-1")),
        ("LY422", world.leg(nonce=nonce, amount="1e3")),
        ("LY422", world.leg(nonce=nonce, dead_line="5")),
        ("LY422", world.leg(kind="keyban.mint", nonce=nonce)),
    ]
    for code, leg in cases:
        with pytest.raises(asyncpg.PostgresError) as refused:
            await world.register(leg)
        assert problem(refused.value)[0] == code, (leg, refused.value)
    with pytest.raises(asyncpg.PostgresError) as refused:
        await world.register(world.leg(nonce=nonce))
    assert problem(refused.value)[1]["reference"] == "first"


async def test_registration_is_idempotent_after_normalising_and_refuses_a_different_one(world: World) -> None:
    nonce = world.nonce()
    first = await world.register(world.leg(nonce=hexa(nonce)), reference="r")
    again = await world.register(
        world.leg(nonce="0x" + nonce.hex().upper(), chainId=84532, deadline="0"), reference="r"
    )
    assert first == again
    with pytest.raises(asyncpg.PostgresError) as refused:
        await world.register(world.leg(nonce=hexa(nonce), amount="251"), reference="r")
    assert problem(refused.value)[0] == "LY409" and problem(refused.value)[1]["differs"] == ["legs"]


async def test_absurd_numbers_are_kept_exactly(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        most = str(2**256 - 1)
        leg = world.leg(nonce=hexa(world.nonce()), amount=most, expiresAt=most, deadline=most)
        operation = await world.register(leg)
        await world.event(100, leg)
        assert await world.settle() == ["operation.ready"]
        assert (await world.operation(operation))["request"]["legs"][0]["amount"] == most


async def test_registered_after_its_event_is_ready_at_once(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        await world.event(100, leg)
        await world.settle()
        await world.register(leg)
        assert await world.settle() == ["operation.ready"]


# --------------------------------------------------------------------------- expiry


async def test_expired_only_when_finalized_covered_history_has_passed_the_second(world: World) -> None:
    leg = world.leg(nonce=hexa(world.nonce()), deadline=deadline(100))
    operation = await world.register(leg)
    await world.heads(head=1000, safe=900, finalized=104)  # block 104 still lies in the deadline's second
    await world.cover(0, 1000)
    assert await world.settle() == []
    await world.heads(finalized=105)
    assert await world.settle() == ["operation.expired"]
    assert await world.state(operation) == "expired"


@pytest.mark.parametrize(("low", "high", "verdict"), [(0, 104, "gate"), (1, 200, "gate"), (0, 200, "unverified")])
async def test_a_gap_or_an_unverified_range_never_expires(world: World, low: int, high: int, verdict: str) -> None:
    leg = world.leg(nonce=hexa(world.nonce()), deadline=deadline(100))
    operation = await world.register(leg)
    await world.heads(head=1000, safe=900, finalized=200)
    await world.heads(finalized=104)
    await world.heads(finalized=200)
    await world.cover(low, high, verdict)
    await world.settle()
    assert await world.state(operation) == "pending"


async def test_requested_after_its_own_deadline_expires_only_on_history_that_reaches_the_deadline(world: World) -> None:
    """A late registration, stated as of now, of an action that could be executed long before: history there is not filled yet."""
    await world.conn.execute(
        "UPDATE indexer.chain SET schedule = $1", {"l2_time": BASE_MS // 1000, "first_fast_block": 0}
    )
    leg = world.leg(nonce=hexa(world.nonce()), deadline=deadline(100))
    operation = await world.register(leg, requestedAt="2026-09-21T15:13:20Z")  # an hour after block 0
    await world.heads(head=20_000, safe=19_500, finalized=19_000)
    await world.cover(15_000, 20_000)
    await world.settle()
    assert await world.state(operation) == "pending"
    await world.cover(0, 20_000)
    await world.conn.execute("INSERT INTO indexer.touched_operation (operation_id) VALUES ($1)", operation)
    assert await world.settle() == ["operation.expired"]


async def test_the_event_in_the_last_second_settles_and_the_bucket_bounds_too(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()), deadline=deadline(100))
        bucket = world.leg(nonce=hexa(world.nonce()), expiresAt=deadline(100))
        settled, expired = await world.register(leg), await world.register(bucket)
        await world.event(104, leg)
        await world.heads(head=1000, safe=900, finalized=200)
        await world.cover(0, 1000)
        await world.settle()
        assert [await world.state(settled), await world.state(expired)] == ["ready", "expired"]


async def test_nothing_expires_beside_an_event_that_waits_for_witnesses(owner_dsn: str) -> None:
    """A mismatching event is there; only who holds its block is not known yet. Once known, it is a conflict; gone, it expires."""
    async with World.at(owner_dsn, INCLUDED) as world:
        await world.conn.execute(
            "UPDATE indexer.chain SET quorum = 2, agreed_number = 1000, agreed_at = clock_timestamp()"
        )
        legs = [world.leg(operationHash=hexa(digest(n)), deadline=deadline(100)) for n in range(3)]
        by_nonce = world.leg(nonce=hexa(world.nonce()), deadline=deadline(100))
        alone, undone = await world.register(legs[0]), await world.register(legs[1])
        beside = await world.register(legs[2], by_nonce)  # the second leg's time passes without any event
        for place, leg in enumerate(legs):
            await world.event(70 + place, leg, amount="1")
        await world.heads(head=1000, safe=900, finalized=200)
        await world.cover(0, 1000)
        assert await world.settle() == []
        assert [await world.state(o) for o in (alone, undone, beside)] == ["pending"] * 3
        asked = await world.conn.fetchval("SELECT count(*) FROM indexer.attestation WHERE next_at IS NOT NULL")
        assert asked == 3

        await world.conn.execute("UPDATE indexer.movement SET canonical = false WHERE block_number = 71")
        await world.conn.execute("UPDATE indexer.attestation SET witnesses = '{a,b}', next_at = NULL")
        await world.touch_blocks(70, 72)
        await world.settle()
        assert [await world.state(o) for o in (alone, undone, beside)] == ["conflict", "expired", "conflict"]


async def test_nothing_expires_beside_an_event_that_is_held_for_a_person(owner_dsn: str) -> None:
    rules = {BRAND: BrandRules((Policy(Level.INCLUDED),), WalletRules(hold=True))}
    async with World.at(owner_dsn, rules) as world:
        leg = world.leg(match="wallet_amount")
        late = [world.leg(nonce=hexa(world.nonce()), deadline=deadline(100)) for _ in range(2)]
        operations = [await world.register(leg, each, requestedAt="2026-09-21T14:13:20Z") for each in late]
        await world.event(60, leg)
        await world.heads(head=1000, safe=900, finalized=200)
        await world.cover(0, 1000)
        assert await world.settle() == []
        await world.decide(operations[0], await world.conflicting(operations[0]), True)
        await world.settle()
        assert [await world.state(o) for o in operations] == ["incomplete", "expired"]


async def test_nothing_expires_beside_an_event_that_a_neighbour_has_to_give_up(owner_dsn: str) -> None:
    """Registered late, of an earlier request: the first event is its own, and the neighbour that holds it gets the second."""
    async with World.at(owner_dsn, INCLUDED) as world:
        leg, missing = world.leg(match="wallet_amount", deadline=deadline(100)), world.leg(nonce=hexa(world.nonce()))
        neighbour = await world.register(leg, missing, requestedAt="2026-09-21T14:13:22Z")
        await world.event(60, leg)
        await world.event(61, leg)
        await world.heads(head=1000, safe=900, finalized=200)
        await world.cover(0, 1000)
        await world.settle()
        assert await world.state(neighbour) == "confirming"
        late = await world.register(leg, requestedAt="2026-09-21T14:13:20Z")
        assert await world.settle() == ["operation.ready", "operation.finalized"]
        assert [await world.state(o) for o in (neighbour, late)] == ["confirming", "ready"]
        claims = await world.conn.fetch("SELECT operation_id, block_number FROM indexer.claim")
        assert dict(map(tuple, claims)) == {late: 60, neighbour: 61}


async def test_a_deadline_beyond_2_to_the_40_never_expires(world: World) -> None:
    leg = world.leg(nonce=hexa(world.nonce()), deadline=str(2**40 + 1))
    operation = await world.register(leg)
    await world.heads(head=10_000, safe=9_000, finalized=8_000)
    await world.cover(0, 10_000)
    await world.settle()
    assert await world.state(operation) == "pending"


async def test_evidence_after_expiry_or_cancelling_is_a_conflict_until_decided(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        late, cancelled = (
            world.leg(nonce=hexa(world.nonce()), deadline=deadline(100)),
            world.leg(nonce=hexa(world.nonce())),
        )
        operations = [await world.register(late), await world.register(cancelled)]
        await world.cancel(operations[1])
        await world.heads(head=1000, safe=900, finalized=200)
        await world.cover(0, 1000)
        await world.settle()
        assert [await world.state(o) for o in operations] == ["expired", "cancelled"]
        await world.event(500, late)
        await world.event(501, cancelled)
        await world.settle()
        assert [await world.state(o) for o in operations] == ["conflict", "conflict"]
        await world.decide(operations[0], await world.conflicting(operations[0]), True)
        await world.decide(operations[1], await world.conflicting(operations[1]), False)
        await world.settle()
        assert [await world.state(o) for o in operations] == ["ready", "cancelled"]


async def test_a_nonce_given_free_by_expiry_may_be_stated_again(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        first = await world.register(leg)
        await world.cancel(first)
        await world.settle()
        second = await world.register(leg)
        await world.event(100, leg)
        await world.settle()
        assert [await world.state(first), await world.state(second)] == ["cancelled", "ready"]


async def test_incomplete_when_one_leg_settled_and_the_other_expired_and_ready_if_it_settles_after_all(
    owner_dsn: str,
) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        first, second = (
            world.leg(nonce=hexa(world.nonce())),
            world.leg(nonce=hexa(world.nonce()), deadline=deadline(100)),
        )
        operation = await world.register(first, second)
        await world.event(50, first)
        await world.heads(head=1000, safe=900, finalized=200)
        await world.cover(0, 1000)
        await world.settle()
        assert await world.state(operation) == "incomplete"
        await world.event(99, second)  # a second look found it after all
        assert "operation.ready" in await world.settle()


# --------------------------------------------------------------------------- the rest


async def test_cancel_is_refused_once_ready_and_says_until_when_it_can_execute(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()), deadline="1900000000", expiresAt="1900000001")
        operation = await world.register(leg)
        assert (await world.cancel(operation))["executableUntil"] == "1900000000"
        done = world.leg(nonce=hexa(world.nonce()))
        ready = await world.register(done)
        await world.event(100, done)
        await world.settle()
        with pytest.raises(asyncpg.PostgresError) as refused:
            await world.cancel(ready)
        assert problem(refused.value)[0] == "LY409"


async def test_ready_turns_to_conflict_through_reverted_when_mined_again_with_other_terms(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        await world.event(100, leg)
        await world.settle()
        await world.orphan(99)
        await world.event(101, leg, fork="b", amount="1")
        await world.settle()
        assert await world.trace(operation) == ["ready", "reverted", "conflict"]


async def test_unmatched_evidence_is_told_once_at_safe_and_not_while_contested(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        await world.event(100, world.leg())
        contested = world.leg(nonce=hexa(world.nonce()))
        await world.register(contested)
        await world.event(101, contested, amount="1")
        await world.event(102, world.leg(), issuer=hexa(b"\x66" * 20))
        await world.heads(head=200, safe=99)
        await world.settle()
        assert await world.unmatched() == 0
        await world.heads(safe=150)
        assert await world.unmatched() == 1
        await world.unmatched()
        assert await world.conn.fetchval("SELECT count(*) FROM indexer.outbox WHERE type = 'settlement.unmatched'") == 1


async def test_more_unmatched_events_in_one_block_than_one_look_takes_stop_nothing(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        for index in range(5):
            await world.event(100, world.leg(), index=index)
        await world.event(101, world.leg())
        await world.heads(head=200, safe=150)
        await world.settle()
        assert [await world.unmatched(limit=2) for _ in range(3)] == [5, 1, 0]


async def test_evidence_found_late_below_the_cursor_is_told_too(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        await world.heads(head=200, safe=150)
        await world.unmatched()
        await world.event(100, world.leg())
        await world.settle()
        assert await world.unmatched() == 1


async def test_a_latched_chain_signals_nothing(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        await world.event(100, leg)
        await world.conn.execute("""UPDATE indexer.chain SET latch = '{"why": "test"}'""")
        assert await world.settle() == []
        assert await world.state(operation) == "pending"


async def test_nothing_is_promised_before_the_follower_has_linked_a_head(owner_dsn: str) -> None:
    """Promise 1 after a restart: blocks that were stored may have been undone while nobody looked."""
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(nonce=hexa(world.nonce()))
        operation = await world.register(leg)
        await world.event(100, leg)
        lease = "INSERT INTO indexer.lease (task, epoch, until) VALUES ($1, 2, clock_timestamp() + interval '1 hour')"
        await world.conn.execute(lease, f"follow:{CHAIN}")
        await world.conn.execute("UPDATE indexer.chain SET linked_epoch = 1")
        assert await world.settle() == []
        await world.conn.execute(
            "UPDATE indexer.chain SET linked_epoch = 2, head_at = clock_timestamp() - interval '1 minute'"
        )
        await world.conn.execute("INSERT INTO indexer.touched_operation (operation_id) VALUES ($1)", operation)
        assert await world.settle() == []
        await world.conn.execute("UPDATE indexer.chain SET head_at = clock_timestamp()")
        await world.conn.execute("INSERT INTO indexer.touched_operation (operation_id) VALUES ($1)", operation)
        assert await world.settle() == ["operation.ready"]


async def test_reverted_does_not_wait_for_a_live_follower(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        leg = world.leg(operationHash=hexa(digest("h")))
        operation = await world.register(leg)
        await world.event(100, leg)
        await world.settle()
        await world.orphan(99)
        await world.event(101, leg, fork="b")  # another signed action, under the same hash
        await world.conn.execute("UPDATE indexer.chain SET head_at = NULL")
        assert await world.settle() == ["operation.reverted"]
        await world.heads(head=200)  # the next head that is linked rings for whoever waits: nobody has to ask again
        await world.conn.execute("UPDATE indexer.chain SET head_at = clock_timestamp()")
        assert await world.settle() == ["operation.ready"]
        assert await world.state(operation) == "ready"


async def test_an_open_transaction_of_a_brand_holds_up_nobody_else(owner_dsn: str) -> None:
    async with World.at(owner_dsn, INCLUDED) as world:
        legs = [world.leg(nonce=hexa(world.nonce())) for _ in range(3)]
        operations = [await world.register(leg) for leg in legs]
        await world.event(100, legs[0])
        await world.settle()
        brand = await asyncpg.connect(owner_dsn)
        try:
            transaction = brand.transaction()
            await transaction.start()
            await brand.fetchval("SELECT loyalty.fulfil($1, 1, '{}')", operations[0])
            await world.event(101, legs[1])
            await world.event(102, legs[2])
            await world.conn.execute("INSERT INTO indexer.touched_operation (operation_id) VALUES ($1)", operations[0])
            async with world.conn.transaction():
                from indexer.settlement.reconciler import reconcile

                await reconcile(world.conn, world.rules, {}, batch=2)
            assert [await world.state(o) for o in operations] == ["ready", "ready", "ready"]
            await transaction.commit()
        finally:
            await brand.close()
        await world.settle()
        assert await world.state(operations[0]) == "fulfilled"


async def test_a_foreign_uuid_is_no_operation(world: World) -> None:
    for call in ("SELECT loyalty.cancel($1)", "SELECT loyalty.fulfil($1, 1, '{}')"):
        with pytest.raises(asyncpg.PostgresError) as refused:
            await world.conn.fetchval(call, UUID(int=1))
        assert problem(refused.value)[0] == "LY404"
    assert hexa(ISSUER).startswith("0x15")


@pytest.mark.parametrize("amount", ["250", "1"], ids=["equal terms", "other terms"])
async def test_an_event_that_nobody_holds_takes_no_other_ones_place(world: World, amount: str) -> None:
    """History as one endpoint tells it has an event with the same nonce in an older block: the true one keeps its leg, and that
    block is asked about."""
    leg = world.leg(nonce=hexa(world.nonce()), amount="250")
    await world.conn.execute("UPDATE indexer.chain SET quorum = 2, agreed_number = 1000, agreed_at = clock_timestamp()")
    operation = await world.register(leg)
    await world.event(100, leg)
    await world.conn.execute(
        "INSERT INTO indexer.attestation (chain_id, number, hash, proof, witnesses) VALUES ($1, 100, $2, 'receipts_root', '{one,two}')",
        CHAIN,
        digest("a", 100),
    )
    await world.heads(head=1000, safe=900, finalized=99)
    assert await world.settle() == ["operation.ready"]
    await world.event(50, leg, fork="made up", amount=amount)
    assert await world.settle() == [] and await world.state(operation) == "ready"
    assert (
        await world.conn.fetchval("SELECT count(*) FROM indexer.attestation WHERE number = 50 AND next_at IS NOT NULL")
        == 1
    )
    # enough endpoints hold it after all: it is the first, and the other one repeats it
    await world.conn.execute(
        "UPDATE indexer.attestation SET proof = 'receipts_root', witnesses = '{one,two}' WHERE number = 50"
    )
    await world.touch_blocks(50, 50)
    told = await world.settle()
    assert told == (["operation.finalized"] if amount == "250" else ["operation.reverted", "operation.conflict"])


async def test_a_conflict_waits_for_the_proof_of_its_event(world: World) -> None:
    """The only endpoint may have altered an amount: its receipts say, and until then nobody is told."""
    leg = world.leg(nonce=hexa(world.nonce()), amount="250")
    await world.conn.execute("UPDATE indexer.chain SET proof = 'required'")
    operation = await world.register(leg)
    await world.event(100, leg, amount="1")
    await world.heads(head=200, safe=150)
    assert await world.settle() == []
    proven = "UPDATE indexer.attestation SET proof = 'receipts_root', next_at = NULL WHERE number = 100 AND next_at IS NOT NULL RETURNING true"
    assert await world.conn.fetchval(proven)
    await world.touch_blocks(100, 100)
    assert await world.settle() == ["operation.conflict"]
    assert await world.state(operation) == "conflict"
