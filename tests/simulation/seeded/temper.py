"""The temperaments of a seed's world: troubles that last for the whole story, beside those that come and go.

A seed has none, one, or several of them; which ones it has is known without playing it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

#: What one node of several may do all along, by the name of its fault.
LIARS = (
    "F01 stale head",
    "F05 minority fork",
    "F22 tags too high",
    "F33 a log dropped",
    "F40 wrong transaction",
)


@dataclass(frozen=True)
class Temper:
    restless: (
        bool  # reorganisations undo promises again and again, deeper than safe; what was undone mostly comes again
    )
    terse: bool  # sockets tell of a new branch's head alone
    slow_finality: bool  # nothing more becomes finalized while the story lasts, and for a while after it
    outages: bool  # the brand's receiver is down for many seconds at a time
    duels: bool  # leaders stand still in the middle of a commit while their lease lapses and their blocks are undone
    young: bool  # programmes are made all the time, and their tokens speak at once
    liar: str | None  # where there are several nodes: what one of them does all along

    @property
    def words(self) -> str:
        said = [
            name for name in ("restless", "terse", "slow_finality", "outages", "duels", "young") if getattr(self, name)
        ]
        return "+".join([*said, *([self.liar[:3]] if self.liar else [])]) or "calm"


def temper_of(seed: int) -> Temper:
    rng = random.Random(f"temper {seed}")
    return Temper(
        restless=rng.random() < 0.35,
        terse=rng.random() < 0.4,
        slow_finality=rng.random() < 0.25,
        outages=rng.random() < 0.35,
        duels=rng.random() < 0.35,
        liar=rng.choice(LIARS) if rng.random() < 0.5 else None,
        young=rng.random() < 0.25,
    )


CALM = Temper(restless=False, terse=False, slow_finality=False, outages=False, duels=False, young=False, liar=None)
