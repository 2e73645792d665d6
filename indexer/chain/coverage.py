"""What to ask next below finalized: from the gaps per emitter to windows of blocks, lowest first. Pure.

Promises that windows, once committed, leave no gap that was there when the plan was made. Lowest first, since a programme
is discovered before its token speaks: one pass then serves factories and tokens alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from indexer.store.coverage import Span


@dataclass(frozen=True, slots=True)
class Window:
    """Blocks `low` to `high` (both included) and the emitters that miss some of them."""

    low: int
    high: int
    emitters: tuple[bytes, ...]


class Plan:
    """The gaps of one pass, handed out as windows of any size the caller finds fit at that moment."""

    def __init__(self, gaps: Mapping[bytes, Sequence[Span]]) -> None:
        self._gaps = {emitter: sorted(spans, key=lambda span: span.low) for emitter, spans in gaps.items() if spans}
        self._missing = union(span for spans in self._gaps.values() for span in spans)
        self._at = 0  # the gap that the next window is cut from
        self._from = self._missing[0].low if self._missing else 0
        self.blocks = sum(span.high - span.low + 1 for span in self._missing)

    def next(self, size: int) -> Window | None:
        """The next window of at most `size` blocks; None when all was handed out.

        An emitter that misses a part of the window is asked for the whole of it: rows are stored once anyway, and tokens
        that begin at different blocks do not cut history into slivers.
        """
        if self._at >= len(self._missing):
            return None
        gap = self._missing[self._at]
        window_high = min(gap.high, self._from + max(1, size) - 1)
        window = Window(self._from, window_high, self._missed_in(self._from, window_high))
        if window_high == gap.high:
            self._at += 1
            self._from = self._missing[self._at].low if self._at < len(self._missing) else 0
        else:
            self._from = window_high + 1
        return window

    def _missed_in(self, low: int, high: int) -> tuple[bytes, ...]:
        return tuple(
            sorted(
                emitter for emitter, spans in self._gaps.items() if any(s.low <= high and s.high >= low for s in spans)
            )
        )


TARGET = 4_000  # logs of a window: what a COPY likes, and small enough for several to wait
GROW = 4  # times at most, from one window to the next


class Stride:
    """How many blocks the next window shall have, from how many logs the last ones held."""

    def __init__(self, first: int, largest: int) -> None:
        self.blocks, self._largest = first, largest

    def adapt(self, blocks: int, found: int) -> None:
        """A window of so many blocks held so many logs."""
        if found > 2 * TARGET:
            self.blocks = max(1, blocks * TARGET // found)
        elif blocks >= self.blocks and found < TARGET // 2:
            grown = blocks * min(GROW, TARGET // max(1, found))
            self.blocks = min(self._largest, max(self.blocks, grown))


def read_before(gaps: Mapping[bytes, Sequence[Span]], starts: Mapping[bytes, int]) -> Callable[[bytes, int], bool]:
    """(emitter, block) → whether the block was asked for and stored: from `start_block` on, and in no gap."""

    def was_read(emitter: bytes, number: int) -> bool:
        start = starts.get(emitter)
        return (
            start is not None and number >= start and not any(s.low <= number <= s.high for s in gaps.get(emitter, ()))
        )

    return was_read


def union(spans: Iterable[Span]) -> list[Span]:
    """Sorted, disjoint, with neighbours joined."""
    joined: list[Span] = []
    for span in sorted(spans, key=lambda span: span.low):
        if joined and span.low <= joined[-1].high + 1:
            joined[-1] = Span(joined[-1].low, max(joined[-1].high, span.high))
        else:
            joined.append(span)
    return joined
