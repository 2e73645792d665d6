"""When a delivery is tried again, and what each answer means."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from uuid import UUID

import pytest

from indexer.signals.attempts import (
    ANSWER_BYTES,
    JITTER,
    LONGEST_RETRY_AFTER,
    SCHEDULE,
    Reply,
    judge,
    printable,
    retry_after,
)
from indexer.store.deliveries import Attempt, Outcome

NOW = datetime(2026, 11, 21, 10, 0, tzinfo=UTC)
DAY = 86400.0


def outcome(reply: Reply, number: int = 1, seed: int = 1) -> Outcome:
    attempt = Attempt("bloom", "shop", UUID(int=1), "operation.ready", number, replay=False, body="{}")
    return judge(attempt, reply, schedule=SCHEDULE, rng=random.Random(seed), now=NOW)


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_any_2xx_is_a_delivery(status: int) -> None:
    assert outcome(Reply(status)).state == "delivered"


@pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 401, 404, 409, 429, 500, 502, 503, None])
def test_nothing_else_is_a_delivery_nor_the_end(status: int | None) -> None:
    given = outcome(Reply(status, None if status else "no answer within 10 s"))
    assert (given.state, given.gone) == ("pending", False)
    assert given.error
    assert SCHEDULE[0] * (1 - JITTER) <= given.retry_in <= SCHEDULE[0] * (1 + JITTER)


def test_gone_disables_even_on_the_last_attempt() -> None:
    assert outcome(Reply(410)).gone
    last = outcome(Reply(410), number=len(SCHEDULE) + 1)
    assert (last.state, last.gone) == ("pending", True)  # kept for the day the endpoint is enabled again


def test_attempts_go_on_for_about_three_days_with_jitter_and_then_end() -> None:
    totals = set()
    for seed in range(20):
        pauses = [outcome(Reply(500), number, seed * 100 + number).retry_in for number in range(1, len(SCHEDULE) + 1)]
        assert all(
            planned * (1 - JITTER) <= pause <= planned * (1 + JITTER)
            for planned, pause in zip(SCHEDULE, pauses, strict=True)
        )
        totals.add(sum(pauses))
        assert 2.5 * DAY < sum(pauses) < 4 * DAY
    assert len(totals) == 20
    assert outcome(Reply(500), len(SCHEDULE)).state == "pending"
    assert outcome(Reply(500), len(SCHEDULE) + 1).state == "dead"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0),
        ("120", 120),
        (" 7 ", 7),
        ("Sat, 21 Nov 2026 10:02:00 GMT", 120),
        ("Sat, 21 Nov 2026 09:00:00 GMT", 0),  # past
        ("99999999999999999999", LONGEST_RETRY_AFTER),
        ("Sat, 21 Nov 2099 10:00:00 GMT", LONGEST_RETRY_AFTER),
        ("-5", 0),
        ("1.5", 0),
        ("٣", 0),
        ("soon", 0),
        ("", 0),
        ("Sat, 99 Nov 2026 10:02:00 GMT", 0),
    ],
)
def test_retry_after_in_both_forms_capped_and_nonsense_ignored(value: str | None, seconds: float) -> None:
    assert retry_after(value, NOW) == seconds


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_lengthens_a_pause_and_never_shortens_it(status: int) -> None:
    assert outcome(Reply(status, retry_after="300")).retry_in == 300
    assert outcome(Reply(status, retry_after="1"), number=6).retry_in >= SCHEDULE[5] * (1 - JITTER)


def test_retry_after_of_another_status_is_not_an_instruction() -> None:
    assert outcome(Reply(500, retry_after="300")).retry_in < 10


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (b"", ""),
        (b"no such order", "no such order"),
        ("nicht gefunden: Einlösung".encode(), "nicht gefunden: Einlösung"),
        (b"<h1>\r\n\tdown</h1>", "<h1>\\r\\n\\tdown</h1>"),
        (b"\x1b[2J\x07gone\x00", "\\x1b[2J\\x07gone\\x00"),  # no terminal is painted on, and PostgreSQL takes it
        (b"\xff\xfe", "\\xff\\xfe"),
        ("left \u202e right".encode(), "left \\u202e right"),
        (b"x" * 5000, "x" * ANSWER_BYTES),
    ],
)
def test_the_beginning_of_an_answer_is_kept_as_text_that_is_safe_to_print(answer: bytes, kept: str) -> None:
    assert printable(answer) == kept
    assert outcome(Reply(500, answer=answer, seconds=0.25)).answer == (kept or None)
    assert outcome(Reply(500, answer=answer, seconds=0.25)).seconds == 0.25
