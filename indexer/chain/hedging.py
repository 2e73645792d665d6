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
Contender = tuple[Coroutine[Any, Any, T], "Usual"]  # a question, and how long its endpoint takes

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
    first: Contender[T], another: Callable[[], Contender[T] | None], no_answer: tuple[type[Exception], ...]
) -> tuple[T, int]:
    """The answer that comes first, and whose it is: 0 for `first`, 1 for the one that was begun next, and so on.

    `another` is begun when a request of the one begun last is late, or it has ended with one of the errors `no_answer`, which decide
    nothing while somebody else may still answer; where all end so, the first's is raised. None: nobody else may be asked now (looked
    at again after as long). Without being late, the first is alone.
    """
    tasks: list[asyncio.Task[T]] = []

    def begin(question: Coroutine[Any, Any, T], usual: Usual) -> Stopwatch:
        watch, context = Stopwatch(usual), copy_context()
        context.run(_WATCH.set, watch)
        tasks.append(asyncio.create_task(question, context=context))
        return watch

    watch = begin(*first)
    due: asyncio.Task[Any] = asyncio.create_task(watch.late.wait())
    try:
        while True:
            running = {task for task in tasks if not task.done()}
            await asyncio.wait({*running, due}, return_when=asyncio.FIRST_COMPLETED)
            for place, task in enumerate(tasks):
                if task.done() and not isinstance(task.exception(), no_answer):
                    return task.result(), place
            alone, ended = len(tasks) == 1, tasks[-1].done()
            if (ended and alone) or not (ended or due.done()):
                if all(task.done() for task in tasks):
                    return tasks[0].result(), 0
                continue
            due.cancel()
            if (found := another()) is not None:
                watch = begin(*found)
                due = asyncio.create_task(watch.late.wait())
            elif all(task.done() for task in tasks):
                return tasks[0].result(), 0
            else:
                due = asyncio.create_task(asyncio.sleep(watch.seconds))
    finally:
        for each in (*tasks, due):
            each.cancel()
        await asyncio.gather(*tasks, due, return_exceptions=True)
