"""An event loop without real time or real sockets: when nothing can run, one outstanding thing happens, chosen by the seed.

What is outstanding are bytes on their way (`network.py`) and statements at PostgreSQL (`postgres.py`). Only when there are none
does the clock jump to the next timer. Callbacks run in the order that asyncio gives them; all other order is the seed's. Code
runs in a `Process`, which can be frozen, thawed and killed as a whole: of a killed one nothing runs any more, no `finally`
either, as after SIGKILL.
"""

from __future__ import annotations

import asyncio
import collections
import hashlib
import heapq
import itertools
import random
from asyncio import events
from collections.abc import Callable, Coroutine
from contextvars import ContextVar, copy_context
from typing import Any, Protocol

EPOCH = 1_790_000_000.0  # Unix seconds of the virtual clock's zero
MOST_STEPS = 3_000_000  # of one run: a loop that asks for ever without a pause is a defect


class Outstanding(Protocol):
    """Something outside that may happen now."""

    def ready(self) -> bool: ...
    def step(self) -> None: ...


class Process:
    """What would be one process of the operating system."""

    def __init__(self, name: str, loop: VirtualLoop) -> None:
        self.name, self.state = name, "running"  # running | frozen | dead
        self.held: list[
            asyncio.Handle
        ] = []  # what would run if it were not frozen; of a dead one kept from the collector
        self.connections: dict[Any, None] = {}  # whatever has `cut()`
        self.signals: dict[int, Callable[[], None]] = {}
        self.main: asyncio.Task[Any] | None = None
        self._loop = loop

    @property
    def runs(self) -> bool:
        return self.state == "running"

    def freeze(self) -> None:
        if self.state == "running":
            self.state = "frozen"
            self._loop.note("freeze", self.name)
            for connection in list(self.connections):
                connection.frozen()

    def thaw(self) -> None:
        if self.state == "frozen":
            self.state = "running"
            self._loop.note("thaw", self.name)
            held, self.held = self.held, []
            self._loop.take_back(held)

    def kill(self) -> None:
        """SIGKILL: its sockets close, what it was about to do is not done."""
        if self.state == "dead":
            return
        self.state = "dead"
        self._loop.note("kill", self.name)
        for connection in list(self.connections):
            connection.cut()
        self.connections.clear()


PROCESS: ContextVar[Process | None] = ContextVar("PROCESS", default=None)


class _Task(asyncio.Task):  # type: ignore[type-arg]
    """Hashed by number: sets of tasks are walked in the same order in every run."""

    def __init__(self, *args: Any, number: int, **named: Any) -> None:
        self._number = number
        super().__init__(*args, **named)

    def __hash__(self) -> int:
        return self._number


class _Future(asyncio.Future):  # type: ignore[type-arg]
    def __init__(self, number: int, loop: asyncio.AbstractEventLoop) -> None:
        self._number = number
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number


class Stuck(Exception):
    """Nothing runs, nothing is outstanding, and no timer is set; or something runs for ever at one instant."""


class VirtualLoop(asyncio.BaseEventLoop):
    """`run_until_complete` as usual. `choose` makes the seed's decisions about order; nothing else may use it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.choose = random.Random(f"order {seed}")
        self.now = 0.0
        self.outstanding: dict[Outstanding, None] = {}
        self.steps = 0
        self.trace = hashlib.sha256()
        self.tail: collections.deque[str] = collections.deque(maxlen=400)  # the last of the trace, for people
        self.dump: list[str] | None = None  # all of it, where somebody asked
        self.graveyard: list[Any] = []
        self._numbers = itertools.count(1)
        self.set_task_factory(self._new_task)  # type: ignore[arg-type]

    def _new_task(self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **named: Any) -> _Task:
        return _Task(coro, loop=loop, number=next(self._numbers), **named)

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(next(self._numbers), self)

    def time(self) -> float:
        return self.now

    @property
    def wall(self) -> float:
        return EPOCH + self.now

    def note(self, *words: object) -> None:
        """One thing that happened, into the trace that two runs of one seed must share."""
        line = f"{self.now:.6f} " + " ".join(map(str, words))
        self.trace.update(line.encode() + b"\n")
        self.tail.append(line)
        if self.dump is not None:
            self.dump.append(line)

    # ------------------------------------------------------------------ processes

    def spawn(self, name: str, body: Callable[[], Coroutine[Any, Any, Any]]) -> Process:
        process = Process(name, self)
        context = copy_context()
        context.run(PROCESS.set, process)
        process.main = context.run(lambda: self.create_task(body(), name=name))
        self.note("spawn", name)
        return process

    def outside(self, body: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """A task of the world, whoever asks for it."""
        context = copy_context()
        context.run(PROCESS.set, None)
        return context.run(lambda: self.create_task(body, name=name))

    def take_back(self, handles: list[asyncio.Handle]) -> None:
        self._ready.extend(handles)  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ the heart

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled  # type: ignore[attr-defined]
        while scheduled and (scheduled[0]._cancelled or scheduled[0]._when <= self.now):
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            if not handle._cancelled:
                ready.append(handle)
        if not ready:
            if not self._stopping:  # type: ignore[attr-defined]
                self._idle()
            return
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(PROCESS)
            if process is not None and process.state != "running":
                process.held.append(handle)
                continue
            handle._run()
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise Stuck(f"{MOST_STEPS} turns, and no end: at {self.now:.3f} s of the virtual clock")

    def _idle(self) -> None:
        can = [one for one in self.outstanding if one.ready()]
        if can:
            self.steps += 1
            one = can[0] if len(can) == 1 else can[int(self.choose.random() * len(can))]
            one.step()
            return
        scheduled = self._scheduled  # type: ignore[attr-defined]
        while scheduled:
            handle = scheduled[0]
            process = handle._context.get(PROCESS)
            if handle._cancelled or (process is not None and process.state != "running"):
                heapq.heappop(scheduled)
                handle._scheduled = False
                if not handle._cancelled:
                    process.held.append(handle)
                continue
            self.now = max(self.now, handle._when)
            return
        raise Stuck(f"nothing is left that could happen, at {self.now:.3f} s of the virtual clock")

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def add_signal_handler(self, sig: int, callback: Callable[..., object], *args: object) -> None:
        process, context = PROCESS.get(), copy_context()
        assert process is not None
        process.signals[sig] = lambda: self.call_soon(callback, *args, context=context) and None

    def remove_signal_handler(self, sig: int) -> bool:
        process = PROCESS.get()
        return process is not None and process.signals.pop(sig, None) is not None

    def _process_events(self, event_list: object) -> None:
        raise AssertionError("there are no real events here")

    def _write_to_self(self) -> None:
        return

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        return

    # ------------------------------------------------------------------ connections: who makes them is told

    network: Any = None
    postgres: Any = None

    async def create_server(self, factory: Any, host: Any = None, port: Any = None, **_: Any) -> Any:  # type: ignore[override]
        return self.network.listen(factory, host, port)

    async def sock_connect(self, sock: Any, address: Any) -> None:
        await self.network.connect(sock, address)

    async def create_connection(self, factory: Any, host: Any = None, port: Any = None, **named: Any) -> Any:  # type: ignore[override]
        if named.get("sock") is not None:
            return self.network.connected(factory, named["sock"])
        raise AssertionError("a real connection in a simulated world")

    async def create_unix_connection(self, factory: Any, path: Any = None, **_: Any) -> Any:  # type: ignore[override]
        return self.postgres.connect(factory, path)


def running() -> VirtualLoop:
    loop = events._get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop
