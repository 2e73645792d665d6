"""Settling rules that change while operations are open: who waits is looked at again, and nothing promised is taken back."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from indexer.model.confidence import Level, Policy
from indexer.model.matching import WalletRules
from indexer.settlement import reconsider
from indexer.settlement.reconsider import Reconsideration, fingerprint
from indexer.settlement.rules import BrandRules
from tests.world import BASE_MS, BRAND, World, hexa

INCLUDED, SAFE, FINALIZED = (
    {BRAND: BrandRules((Policy(level),))} for level in (Level.INCLUDED, Level.SAFE, Level.FINALIZED)
)


async def sweep(world: World, rules: Mapping[str, BrandRules]) -> int:
    """The whole of it, in its batches. Returns how many batches touched something."""
    world.rules = dict(rules)
    reconsideration = Reconsideration(rules)
    batches = 0
    while not reconsideration.done:
        before = await world.conn.fetchval("SELECT count(*) FROM indexer.touched_operation")
        async with world.conn.transaction():
            await reconsideration.step(world.conn)
        batches += await world.conn.fetchval("SELECT count(*) FROM indexer.touched_operation") > before
    return batches


def test_a_fingerprint_is_of_the_rules_alone() -> None:
    bases = ["nonce", "operation_hash", "wallet_amount"]
    first = BrandRules((Policy(Level.SAFE, bases=frozenset(bases)),), WalletRules())
    again = BrandRules((Policy(Level.SAFE, bases=frozenset(reversed(bases))),), WalletRules())
    others = [
        BrandRules((Policy(Level.SAFE),)),
        BrandRules((Policy(Level.FINALIZED, bases=frozenset(bases)),)),
        BrandRules((Policy(Level.SAFE, bases=frozenset(bases)),), WalletRules(hold=True)),
        BrandRules((Policy(Level.SAFE, issuer=b"\x15" * 20, bases=frozenset(bases)),)),
        BrandRules(),
    ]
    assert fingerprint(first) == fingerprint(again)
    assert len({fingerprint(rule) for rule in (first, *others)}) == 1 + len(others)


async def test_what_waits_is_settled_by_the_new_rules_and_what_is_ready_stays(
    owner_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconsider, "BATCH", 3)
    async with World.at(owner_dsn, INCLUDED) as world:
        await world.add_brand("petal", b"\x16" * 20)
        legs = [world.leg(nonce=hexa(world.nonce())) for _ in range(9)]
        await sweep(world, FINALIZED)
        operations = [await world.register(leg) for leg in legs]
        for index, leg in enumerate(legs[:8]):
            await world.event(100, leg, index=index)
        cancelled = operations[7]
        await world.settle()
        await world.cancel(cancelled)
        await world.heads(head=200, safe=150)
        await world.settle()
        assert [await world.state(one) for one in operations] == ["confirming"] * 7 + ["cancelled", "pending"]

        # looser: nobody would ring these before block 100 is finalized
        assert await sweep(world, SAFE) >= 3
        told = await world.settle()
        assert sorted(told) == ["operation.conflict"] + ["operation.ready"] * 7  # the cancelled one settled after all
        assert [await world.state(one) for one in operations] == ["ready"] * 7 + ["conflict", "pending"]
        assert await sweep(world, SAFE) == 0  # another holder with the same rules

        # stricter: what was promised is not taken back, ready and fulfilled alike; what comes is held to the new rules
        await world.fulfil(operations[0], 1)
        await world.settle()
        assert await sweep(world, FINALIZED) > 0
        await world.settle()
        states = [await world.state(one) for one in operations]
        assert states == ["fulfilled"] + ["ready"] * 6 + ["cancelled", "pending"]  # a conflict is no promise
        await world.event(110, legs[8])
        assert await world.settle() == ["operation.confirming"]

        # evidence that does go takes it back all the same, and what is mined again must be as deep as is demanded now
        await world.orphan(99)
        assert (await world.settle()).count("operation.reverted") == 7
        await world.event(160, legs[0], fork="b")
        await world.event(161, legs[1], fork="b")
        assert await world.settle() == ["operation.confirming"]  # the fulfilled one waits in silence
        await world.heads(head=300, safe=200, finalized=170)
        assert sorted(await world.settle()) == [
            *("operation.finalized", "operation.finalized", "operation.ready", "operation.restored")
        ]


async def test_a_window_that_changes_pairs_anew_what_is_not_promised(owner_dsn: str) -> None:
    narrow = {BRAND: BrandRules((Policy(Level.INCLUDED),), WalletRules(skew_ms=0, window_ms=1_000))}
    wide = {BRAND: BrandRules((Policy(Level.INCLUDED),), WalletRules(skew_ms=0, window_ms=3_600_000))}
    async with World.at(owner_dsn, narrow) as world:
        await sweep(world, narrow)
        leg = world.leg(match="wallet_amount")
        operation = await world.register(leg, requestedAt="2026-09-21T14:13:20Z")
        assert BASE_MS == 1_790_000_000_000
        await world.event(100, leg)
        await world.settle()
        assert await world.state(operation) == "pending"
        await sweep(world, wide)
        assert await world.settle() == ["operation.ready"]
        await sweep(world, narrow)
        assert await world.settle() == []
