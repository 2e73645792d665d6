"""Pairs legs and records of one group: as many as there can be, each leg in turn taking its first free record.

Legs and records are positions in the order of pairing; what fits a leg is an ascending sequence of positions, a `range` where
its window alone decides. Pure arithmetic, and fast where a hot wallet has thousands of each: the rules are told elsewhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise


def paired(fitting: Sequence[Sequence[int]], records: int) -> dict[int, int]:
    """Leg → record. `fitting[leg]`: which of `records` fit it.

    Where windows alone decide, that is the pairing by time on both sides, and there is none with more pairs. Where a token or a
    decision makes a leg choosy, an earlier leg makes room if another record fits it too.
    """
    following = list(range(records + 1))  # of each position the next free one, itself if it is free
    holder: dict[int, int] = {}
    chosen: dict[int, int] = {}
    hopeless: set[int] = set()  # records from which a search found no free one: none ever will
    # windows of one length, in order: the first free one is always right
    windows = [own for own in fitting if own]
    simple = all(isinstance(own, range) for own in fitting) and all(
        one[0] <= two[0] and one[-1] <= two[-1] for one, two in pairwise(windows)
    )
    for leg, own in enumerate(fitting):
        free = _first_free(own, following, holder)
        if free is not None:
            holder[free], chosen[leg] = leg, free
            following[free] = free + 1
        elif not simple:
            _make_room(leg, fitting, holder, chosen, hopeless, following)
    return chosen


def _first_free(own: Sequence[int], following: list[int], holder: dict[int, int]) -> int | None:
    if not isinstance(own, range):
        return next((record for record in own if record not in holder), None)
    if not own:
        return None
    found = own.start
    while following[found] != found:
        following[found] = following[following[found]]  # halves the path for whoever comes next
        found = following[found]
    return found if found < own.stop else None


def _make_room(
    leg: int,
    fitting: Sequence[Sequence[int]],
    holder: dict[int, int],
    chosen: dict[int, int],
    hopeless: set[int],
    following: list[int],
) -> None:
    """Breadth first, from a leg over taken records and their holders to a free record: nobody loses theirs."""
    came: dict[int, int] = {}
    queue = deque([leg])
    end: int | None = None
    while queue and end is None:
        asking = queue.popleft()
        for record in fitting[asking]:
            if record in came or record in hopeless:
                continue
            came[record] = asking
            if record not in holder:
                end = record
                break
            queue.append(holder[record])
    if end is None:
        hopeless |= came.keys()
        return
    following[end] = end + 1
    while end is not None:
        asking = came[end]
        gives_up = chosen.get(asking)
        holder[end], chosen[asking] = asking, end
        end = gives_up


def rivalry(fitting: Sequence[Sequence[int]], records: int) -> list[int]:
    """How many legs each record fits."""
    steps = [0] * (records + 1)
    counts = [0] * records
    for own in fitting:
        if isinstance(own, range):
            if own:
                steps[own.start] += 1
                steps[own.stop] -= 1
        else:
            for record in own:
                counts[record] += 1
    running = 0
    for record in range(records):
        running += steps[record]
        counts[record] += running
    return counts
