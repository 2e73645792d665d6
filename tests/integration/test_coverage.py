"""Coverage: plans are pure and leave nothing out; the multirange arithmetic agrees with sets of blocks."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer.chain.coverage import Plan, union
from indexer.model.types import Address
from indexer.store import chains, coverage
from indexer.store.chains import Emitter
from indexer.store.coverage import HEAD_LANE, Covered, Span, Verdict
from indexer.store.database import Database

CHAIN = 7
A, B, TOKEN = Address(b"\xaa" * 20), Address(b"\xbb" * 20), Address(b"\xcc" * 20)
VERDICTS: tuple[Verdict, ...] = ("receipts_root", "gate", "second_endpoint", "second_look", "unverified")

spans = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 80)).map(lambda pair: Span(pair[0], pair[0] + pair[1])), max_size=6
).map(union)


def blocks(found: list[Span]) -> set[int]:
    return {number for span in found for number in range(span.low, span.high + 1)}


@given(st.dictionaries(st.binary(min_size=1, max_size=2), spans, max_size=5), st.lists(st.integers(0, 60), min_size=1))
def test_a_plan_asks_each_emitter_for_all_that_it_misses(gaps: dict[bytes, list[Span]], sizes: list[int]) -> None:
    plan, asked, last, n = Plan(gaps), {emitter: set[int]() for emitter in gaps}, -1, 0
    while (window := plan.next(sizes[n % len(sizes)])) is not None:
        n += 1
        assert window.low > last and window.high >= window.low and window.emitters
        assert window.high - window.low < max(1, sizes[(n - 1) % len(sizes)])
        last = window.high
        for emitter in window.emitters:
            asked[emitter] |= set(range(window.low, window.high + 1))
    union_of_all = set().union(*(blocks(found) for found in gaps.values())) if gaps else set()
    for emitter, found in gaps.items():
        assert blocks(found) <= asked[emitter] <= union_of_all
    assert plan.blocks == len(union_of_all)


@pytest.fixture
async def conn(database: Database) -> AsyncIterator[asyncpg.Connection]:
    session = await database.session("test")
    await chains.ensure_chain(session, CHAIN, "seven", None, None)
    yield session
    await session.close()


async def emitters(conn: asyncpg.Connection, *given_: Emitter) -> None:
    await chains.sync_emitters(conn, CHAIN, list(given_))
    for emitter in given_:
        if emitter.followed_from is not None:
            await chains.set_followed(conn, CHAIN, [emitter.address], emitter.followed_from)


async def test_gaps_and_covered_until_agree_with_sets_of_blocks(conn: asyncpg.Connection) -> None:
    rng = random.Random(5)
    known = [
        Emitter(A, "factory", A, 10, 60),
        Emitter(B, "factory", B, 0, None),
        Emitter(TOKEN, "factory", TOKEN, 30, 45),
    ]
    await emitters(conn, *known)
    model: dict[bytes, dict[int, set[Verdict]]] = {e: {} for e in (A, B, TOKEN, HEAD_LANE)}
    for _ in range(60):
        who, verdict = rng.choice([A, B, TOKEN, HEAD_LANE]), rng.choice(VERDICTS)
        low = rng.randint(0, 100)
        high = low + rng.randint(0, 25)
        if rng.random() < 0.12:
            await coverage.forget_above(conn, CHAIN, low)
            for seen in model.values():
                for number in [n for n in seen if n > low]:
                    del seen[number]
        else:
            await coverage.cover(conn, CHAIN, [Covered(who, low, high, verdict)])
            for number in range(low, high + 1):
                if verdict.startswith("second_") and not model[who].get(number):
                    continue  # nobody read it before: this was the first look
                held = model[who].setdefault(number, set())
                held.add(verdict)
                if verdict != "unverified":
                    held.discard("unverified")
                if verdict.startswith("second_"):
                    held.discard("gate")
                if verdict == "second_endpoint":
                    held.discard("second_look")

        def verdicts(emitter: Emitter, number: int) -> set[Verdict]:
            own = model[emitter.address].get(number, set())
            followed = emitter.followed_from is not None and number >= emitter.followed_from
            return own | (model[HEAD_LANE].get(number, set()) if followed else set())

        gaps = await coverage.gaps(conn, CHAIN, 110)
        for emitter in known:
            expected = {n for n in range(emitter.start_block, 111) if not verdicts(emitter, n)}
            assert blocks(gaps.get(emitter.address, [])) == expected
        for wanted in ([known[0]], [known[1], known[2]], known):
            start, several = rng.randint(0, 90), rng.random() < 0.5
            weak = {"unverified", "second_look"} if several else {"unverified"}
            until = start - 1
            while until < 200 and all(until + 1 < e.start_block or verdicts(e, until + 1) - weak for e in wanted):
                until += 1
            found = await coverage.covered_until(conn, CHAIN, [e.address for e in wanted], start, several=several)
            assert found == (until if until >= start else None)
        for elsewhere, weak in ((False, {"unverified"}), (True, {"unverified", "second_look"})):
            owed = await coverage.unverified(conn, CHAIN, 70, elsewhere=elsewhere)
            for address in (A, B, TOKEN, HEAD_LANE):
                assert blocks(owed.get(address, [])) == {
                    n for n, held in model[address].items() if held & weak and n <= 70
                }


async def test_an_unknown_emitter_is_covered_nowhere(conn: asyncpg.Connection) -> None:
    await emitters(conn, Emitter(A, "factory", A, 0, 0))
    await coverage.cover(conn, CHAIN, [Covered(HEAD_LANE, 0, 50, "gate")])
    assert await coverage.covered_until(conn, CHAIN, [A], 5) == 50
    assert await coverage.covered_until(conn, CHAIN, [A, B], 5) is None
    assert await coverage.covered_until(conn, CHAIN, [], 5) is None


async def test_an_emitter_that_left_and_returned_has_a_gap_for_its_absence(conn: asyncpg.Connection) -> None:
    both = [Emitter(A, "factory", A, 0, 0), Emitter(B, "factory", B, 0, 10)]
    await emitters(conn, *both)
    await coverage.cover(conn, CHAIN, [Covered(HEAD_LANE, 0, 50, "gate"), Covered(B, 0, 9, "unverified")])
    await coverage.cover(conn, CHAIN, [Covered(B, 0, 9, "second_look")])
    await emitters(conn, both[0])
    await coverage.cover(conn, CHAIN, [Covered(HEAD_LANE, 51, 80, "gate")])
    await emitters(conn, *both[:1], Emitter(B, "factory", B, 0, 81))
    await coverage.cover(conn, CHAIN, [Covered(HEAD_LANE, 81, 90, "gate")])
    assert await coverage.gaps(conn, CHAIN, 90) == {B: [Span(51, 80)]}
    assert await coverage.covered_until(conn, CHAIN, [B], 0) == 50


async def test_what_is_doubted_is_unverified_again_and_what_was_never_read_stays_a_gap(
    conn: asyncpg.Connection,
) -> None:
    await emitters(conn, Emitter(A, "factory", A, 0, 30))
    await coverage.cover(conn, CHAIN, [Covered(A, 5, 29, "gate"), Covered(HEAD_LANE, 30, 50, "gate")])
    await coverage.doubt(conn, CHAIN, [A, HEAD_LANE], 0, 9)
    await coverage.doubt(conn, CHAIN, [A, HEAD_LANE], 25, 35)
    assert await coverage.unverified(conn, CHAIN, 50) == {A: [Span(5, 9), Span(25, 29)], HEAD_LANE: [Span(30, 35)]}
    assert await coverage.gaps(conn, CHAIN, 50) == {A: [Span(0, 4)]}
    assert await coverage.covered_until(conn, CHAIN, [A], 10) == 24
    await coverage.cover(conn, CHAIN, [Covered(A, 0, 29, "second_look"), Covered(HEAD_LANE, 30, 50, "second_look")])
    assert await coverage.unverified(conn, CHAIN, 50) in ({}, {A: [], HEAD_LANE: []})
    assert await coverage.covered_until(conn, CHAIN, [A], 5) == 50


async def test_readers_come_in_runs_of_blocks(conn: asyncpg.Connection) -> None:
    """A second look asks whoever did not read the blocks first: where endpoints took turns, run by run."""
    for endpoint, low, high in (("one", 0, 9), ("two", 10, 19), ("one", 15, 24), ("two", 40, 49)):
        await coverage.note_reader(conn, CHAIN, endpoint, low, high)
    runs = [(r.low, r.high, sorted(r.endpoints)) for r in await coverage.readers(conn, CHAIN, 5, 45)]
    assert runs == [
        (5, 9, ["one"]), (10, 14, ["two"]), (15, 19, ["one", "two"]), (20, 24, ["one"]), (25, 39, []), (40, 45, ["two"])
    ]  # fmt: skip
    await coverage.forget_above(conn, CHAIN, 17)
    assert [(r.low, r.high, sorted(r.endpoints)) for r in await coverage.readers(conn, CHAIN, 15, 30)] == [
        (15, 17, ["one", "two"]),
        (18, 30, []),
    ]
