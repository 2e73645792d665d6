"""Values from outside are what they should be or refused with a reason; the schedule says when each block is due."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.model.types import UINT256_MAX, BadValue, Schedule, address, hash32, hex0x, uint256

relaxed = settings(deadline=None, derandomize=True, database=None)


@relaxed
@given(st.binary(min_size=20, max_size=20), st.booleans())
def test_an_address_survives_the_way_out_and_in_in_any_case(raw: bytes, upper: bool) -> None:
    text = hex0x(raw)
    assert text == text.lower() and address(text.upper() if upper else text) == raw


@pytest.mark.parametrize(
    "text",
    ["", "0x", "40" * 20, "0x" + "40" * 19, "0x" + "40" * 21, "0x" + "4" * 39, "0x" + "zz" * 20, "0x" + "40 " * 20,
     "0x" + " " + "4" * 39, "0x-" + "4" * 39, b"\x40" * 20, 5, None, True],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: Any) -> None:
    with pytest.raises(BadValue) as refused:
        address(text, "holder")
    assert refused.value.what == "holder" and str(refused.value).startswith("holder: ")


def test_a_hash_is_32_bytes() -> None:
    assert hash32("0x" + "ab" * 32) == b"\xab" * 32
    with pytest.raises(BadValue, match="expected 32 bytes, got 20"):
        hash32("0x" + "ab" * 20)


@pytest.mark.parametrize("given", [0, "0", "250", UINT256_MAX, str(UINT256_MAX), "007"])
def test_a_uint256_is_taken_from_text_or_an_integer(given: str | int) -> None:
    assert uint256(given) == int(given)


@pytest.mark.parametrize(
    "given",
    [-1, UINT256_MAX + 1, str(UINT256_MAX + 1), "-1", "+1", "1.0", "1e3", "", " 1", "1_000", "0x10", "٣", "²", "9" * 79, 1.0, True,
     None, b"1"],
)  # fmt: skip
def test_what_is_no_uint256_is_refused(given: Any) -> None:
    with pytest.raises(BadValue, match=r"^amount: "):
        uint256(given)


# --------------------------------------------------------------------------- the schedule

BASE = Schedule(l2_time=1_686_789_347, first_fast_block=1_000)
FAST_MS = 1000 * (1_686_789_347 + 2_000)


def test_two_seconds_a_block_and_then_five_to_the_second() -> None:
    assert [BASE.time_ms(n) - 1000 * BASE.l2_time for n in (0, 1, 2)] == [0, 2_000, 4_000]
    assert [BASE.time_ms(n) - FAST_MS for n in (998, 999, 1_000, 1_001, 1_005)] == [-4_000, -2_000, 0, 200, 1_000]
    assert len({BASE.time_ms(n) // 1000 for n in range(1_000, 1_005)}) == 1
    assert BASE.time_ms(1_005) // 1000 == BASE.time_ms(1_000) // 1000 + 1


@pytest.mark.parametrize(
    ("time_ms", "number"),
    [
        (0, 0),
        (1000 * BASE.l2_time, 0),
        (1000 * BASE.l2_time + 1, 1),
        (FAST_MS - 2_000, 999),
        (FAST_MS - 1_999, 1_000),
        (FAST_MS, 1_000),
        (FAST_MS + 1, 1_001),
        (FAST_MS + 200, 1_001),
        (FAST_MS + 1_000, 1_005),
    ],
)
def test_the_first_block_at_or_after_a_time(time_ms: int, number: int) -> None:
    assert BASE.first_block_at_or_after(time_ms) == number


schedules = st.builds(Schedule, st.integers(0, 2**33), st.integers(0, 10**9))


@relaxed
@given(schedules, st.integers(0, 2**40))
def test_the_schedule_reads_the_same_both_ways(schedule: Schedule, number: int) -> None:
    time_ms = schedule.time_ms(number)
    assert schedule.first_block_at_or_after(time_ms) == number
    assert schedule.first_block_at_or_after(time_ms + 1) == number + 1
    assert schedule.time_ms(number + 1) > time_ms


@relaxed
@given(schedules, st.integers(-(10**15), 10**15))
def test_the_first_block_is_the_first(schedule: Schedule, time_ms: int) -> None:
    number = schedule.first_block_at_or_after(time_ms)
    assert schedule.time_ms(number) >= time_ms
    assert number == 0 or schedule.time_ms(number - 1) < time_ms
