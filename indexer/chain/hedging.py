"""When another endpoint is asked the same, because the one that leads takes too long, and whose answer is taken then.

Promises that what is too long is learnt from the endpoint itself, within bounds; that waiting for our own pace is nobody's slowness;
that whoever loses is cancelled; and that few questions are asked twice, however slow everything is. Who else may be asked, and who
leads afterwards, is the pool's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, Final, TypeVar

T = TypeVar("T")

SAMPLES: Final = 64  # requests that are remembered of each endpoint
ENOUGH: Final = 8  # … of which so many say what is usual
TIMES: Final = 3.0  # how much longer than 95 of 100 of them is too long,
LEAST, MOST, UNKNOWN = 0.5, 2.0, 1.0  # seconds: never sooner, never later, and where too few are remembered
BURST: Final = 3.0  # questions that may be asked twice in a row
SHARE: Final = 0.1  # … and of all questions, in the long run


class Usual:
    """How long one endpoint takes for a request at the head, in seconds."""

    def __init__(self) -> None:
        self._taken: deque[float] = deque(maxlen=SAMPLES)

    def took(self, seconds: float) -> None:
        """So long, or at least so long where it was not waited for."""
        self._taken.append(seconds)

    @property
    def patience(self) -> float:
        """For how long a request is waited for before another endpoint is asked, too."""
        if len(self._taken) < ENOUGH:
            return UNKNOWN
        return min(MOST, max(LEAST, TIMES * sorted(self._taken)[int(0.95 * len(self._taken))]))


class Credit:
    """So many questions may be asked twice: a share of all, and a few at once. What is slow everywhere is not asked for more often."""

    def __init__(self) -> None:
        self._left = BURST

    def earn(self) -> None:
        self._left = min(BURST, self._left + SHARE)

    def spend(self) -> bool:
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class Stopwatch:
    """Of the requests of one question: sets `late` once one of them has been under way for too long."""

    def __init__(self, usual: Usual) -> None:
        self.late = asyncio.Event()
        self.seconds = usual.patience
        self._usual = usual

    @contextmanager
    def request(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        began, alarm = loop.time(), loop.call_later(self.seconds, self.late.set)
        try:
            yield
        except Exception:  # refused, or failed: that is no measure. One that was given up is
            raise
        except BaseException:
            self._usual.took(loop.time() - began)
            raise
        else:
            self._usual.took(loop.time() - began)
        finally:
            alarm.cancel()


_WATCH: ContextVar[Stopwatch | None] = ContextVar("watch", default=None)


@contextmanager
def under_way() -> Iterator[None]:
    """Around each request, from when it may leave: whoever watches the question that it belongs to hears of it."""
    watch = _WATCH.get()
    if watch is None:
        yield
        return
    with watch.request():
        yield


async def raced(
    first: Coroutine[Any, Any, T],
    usual: Usual,
    second: Callable[[], Coroutine[Any, Any, T] | None],
    no_answer: tuple[type[Exception], ...],
) -> tuple[T, bool]:
    """The answer of `first`, or of `second` where that comes sooner: (answer, whether it is the second's).

    `second` is begun when a request of `first` is late; None: nobody else may be asked now (looked at again after as long). One of
    the errors `no_answer` decides nothing while the other may still answer; where both end so, the first's is raised.
    """
    watch = Stopwatch(usual)
    context = copy_context()
    context.run(_WATCH.set, watch)
    leading = asyncio.create_task(first, context=context)
    late = asyncio.create_task(watch.late.wait())
    other: asyncio.Task[T] | None = None
    try:
        await asyncio.wait({leading, late}, return_when=asyncio.FIRST_COMPLETED)
        while not leading.done() and other is None:
            if (begun := second()) is not None:
                other = asyncio.create_task(begun)
            else:
                await asyncio.wait({leading}, timeout=watch.seconds)
        if other is None:
            return leading.result(), False
        await asyncio.wait({leading, other}, return_when=asyncio.FIRST_COMPLETED)
        if leading.done():
            if not isinstance(leading.exception(), no_answer):
                return leading.result(), False
            await asyncio.wait({other})
        if not isinstance(other.exception(), no_answer):
            return other.result(), True
        return await leading, False
    finally:
        tasks = [task for task in (leading, late, other) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
