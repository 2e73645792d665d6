"""The truth behind a partner's records: what was asked for, what became of it, and when.

Times are Unix seconds of the injected clock; amounts are the partner's points. A partner's answers show this late, in part or
wrongly; an oracle reads it here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class Course:
    """Seconds after the request until its record `appears`, its transaction is `sent`, and it `settles`; None: never.
    `fails`: it is included all the same, without success."""

    appears: float | None = 0.5
    sent: float | None = 1.0
    settles: float | None = 2.0
    fails: bool = False


AT_ONCE = Course(0.0, 0.0, 0.0)
STUCK = Course(settles=None)  # under way for ever
LOST = Course(None, None, None)  # accepted, and never seen again


@dataclass(frozen=True, slots=True)
class Pace:
    """How long things take, in seconds from and to: each step after the one before. `failing`, `stuck` and `lost` are shares."""

    appears: tuple[float, float] = (0.2, 1.5)
    sent: tuple[float, float] = (0.2, 2.0)
    settles: tuple[float, float] = (1.0, 5.0)
    failing: float = 0.0
    stuck: float = 0.0
    lost: float = 0.0

    def draw(self, rng: random.Random) -> Course:
        chance = rng.random()
        appears = rng.uniform(*self.appears)
        sent = appears + rng.uniform(*self.sent)
        settles = sent + rng.uniform(*self.settles)
        if chance < self.lost:
            return LOST
        if chance < self.lost + self.stuck:
            return Course(appears, sent, None)
        return Course(appears, sent, settles, fails=chance < self.lost + self.stuck + self.failing)


@dataclass(eq=False, slots=True)
class Movement:
    """Points that a partner was asked to move. `reference` is the asker's, for the oracle: no answer shows it."""

    id: str
    kind: str  # as the legs name it; others for what no leg can wait for
    wallet: str
    amount: Decimal
    asked_at: float
    appears_at: float | None
    sent_at: float | None
    settles_at: float | None
    fails: bool = False
    reference: str | None = None
    turned_at: float | None = None  # since then it is shown as failed: what had been settled is no longer
    deleted_at: float | None = None
    inclusion: int = 0  # raised when it is included anew, in another transaction

    def begun(self, now: float) -> bool:
        return self.appears_at is not None and self.appears_at <= now

    def under_way(self, now: float) -> bool:
        return self.begun(now) and self.sent_at is not None and self.sent_at <= now

    def included(self, now: float) -> bool:
        """In a block, with success or without."""
        return self.begun(now) and self.settles_at is not None and self.settles_at <= now

    def turned(self, now: float) -> bool:
        return self.turned_at is not None and self.turned_at <= now

    def deleted(self, now: float) -> bool:
        return self.deleted_at is not None and self.deleted_at <= now

    def stands(self, now: float) -> bool:
        """Whether the points have really moved and are still where they went."""
        return self.included(now) and not self.fails and not self.turned(now) and not self.deleted(now)


def movement(
    identity: str,
    kind: str,
    wallet: str,
    amount: Decimal,
    *,
    asked_at: float,
    course: Course,
    reference: str | None = None,
) -> Movement:
    """A movement that takes that course."""

    def at(seconds: float | None) -> float | None:
        return None if seconds is None else asked_at + seconds

    return Movement(
        identity,
        kind,
        wallet,
        amount,
        asked_at,
        at(course.appears),
        at(course.sent),
        at(course.settles),
        course.fails,
        reference,
    )
