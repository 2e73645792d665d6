"""The ladder of confidence: each rung a comparison of a block with the heads, and an alarm that is never early nor late."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.model.confidence import (
    DEFAULT_POLICY,
    Alarm,
    Heads,
    Level,
    Policy,
    alarms_for,
    demanded,
    level_of,
    reached,
)
from indexer.model.evidence import Movement
from indexer.model.types import Address, Hash32

ISSUER, OTHER = b"\x15" * 20, b"\x16" * 20
PROGRAMME = b"\x1d" * 32


def event(number: int, time_ms: int = 0) -> Movement:
    return Movement(
        1, Address(b"\xfa" * 20), "loyfin.redemption", Address(ISSUER), Hash32(b"\x01" * 32), Address(b"\x40" * 20),
        Hash32(PROGRAMME), 0, 250, None, number, Hash32(b"\x02" * 32), 0, Hash32(b"\x03" * 32), time_ms,
    )  # fmt: skip


def test_the_rungs_are_in_order_and_named_as_the_contract_names_them() -> None:
    assert [level.word for level in sorted(Level)] == ["included", "confirmed", "safe", "finalized"]


@pytest.mark.parametrize(
    ("number", "level"), [(10, Level.FINALIZED), (11, Level.SAFE), (20, Level.SAFE), (21, Level.INCLUDED)]
)
def test_a_head_includes_its_own_block(number: int, level: Level) -> None:
    assert level_of(event(number), Heads(1, 30, 0, 20, 10)) is level


def test_before_anything_is_known_evidence_is_included() -> None:
    assert level_of(event(0), Heads(1)) is Level.INCLUDED
    assert not reached(Policy(Level.SAFE), event(0), Heads(1))


@pytest.mark.parametrize(
    ("head_ms", "safe", "deep"),
    [(9_999, 0, False), (10_000, 0, True), (0, 4, False), (0, 5, True)],
)
def test_confirmed_is_so_many_seconds_on_top_or_safe(head_ms: int, safe: int, deep: bool) -> None:
    policy = Policy(Level.CONFIRMED, seconds=10)
    assert reached(policy, event(5), Heads(1, 100, head_ms, safe, 0)) is deep


def test_the_first_policy_that_applies_counts_and_the_default_is_safe() -> None:
    small, kind, whose = Policy(Level.INCLUDED, max_amount=100), Policy(kind="loyfin.issuance"), Policy(issuer=OTHER)
    certain = Policy(Level.CONFIRMED, loyalty_id=PROGRAMME, bases=frozenset({"nonce"}))
    policies = [small, kind, whose, certain]

    def found(
        amount: int, kind: str = "loyfin.redemption", issuer: bytes = ISSUER, basis: str | None = "nonce"
    ) -> Policy:
        return demanded(policies, kind, issuer, PROGRAMME, amount, basis)

    assert found(100) is small
    assert found(101) is certain
    assert found(101, kind="loyfin.issuance") is kind
    assert found(101, issuer=OTHER) is whose
    assert found(101, basis="wallet_amount") is DEFAULT_POLICY
    assert found(101, basis=None) is DEFAULT_POLICY
    assert DEFAULT_POLICY.level is Level.SAFE


def test_the_alarm_names_the_axis_that_the_policy_waits_for() -> None:
    assert alarms_for(Policy(Level.SAFE), event(7)) == [Alarm(1, "safe_number", 7)]
    assert alarms_for(Policy(Level.FINALIZED), event(7)) == [Alarm(1, "finalized_number", 7)]
    assert alarms_for(Policy(Level.CONFIRMED, seconds=2), event(7, 500)) == [
        Alarm(1, "head_time_ms", 2_500),
        Alarm(1, "safe_number", 7),
    ]


policies = st.builds(Policy, st.sampled_from(Level), st.floats(0, 100, allow_nan=False))


@settings(deadline=None, derandomize=True, database=None)
@given(
    policies,
    st.integers(0, 50),
    st.integers(0, 10_000),
    st.integers(-1, 60),
    st.integers(-1, 60),
    st.integers(0, 120_000),
)
def test_what_has_not_been_reached_has_an_alarm_that_rings_exactly_when_it_is(
    policy: Policy, number: int, time_ms: int, safe: int, finalized: int, head_ms: int
) -> None:
    """An alarm that rings early rings for ever; one that rings late leaves an operation waiting."""
    heads = Heads(1, 100, head_ms, max(safe, finalized), finalized)
    values = {
        "head_time_ms": heads.head_time_ms,
        "safe_number": heads.safe_number,
        "finalized_number": heads.finalized_number,
    }
    evidence = event(number, time_ms)
    rings = any(values[alarm.axis] >= alarm.threshold for alarm in alarms_for(policy, evidence))
    assert policy.level is Level.INCLUDED or rings == reached(policy, evidence, heads)
