"""The shop: registers operations, takes signals by the receivers' rule, hands over on `ready`, and remembers it all.

Promises to act as docs/webhooks.md asks of a receiver: nothing twice, nothing late, and the truth is asked for before the
irreversible. Which operations there are, and how each should end, is the story's business.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp

from indexer.sandbox.client import Answered, Client
from indexer.sandbox.receiver import Received

PATIENCE_SECONDS = 90.0  # for anything that the daemon should do
LOOK_SECONDS = 0.2  # between questions about what no signal tells

READY = "operation.ready"
FINALIZED = "operation.finalized"
HINTS = frozenset({"operation.submitted", "operation.confirming", "operation.rejected"})


class Disappointed(RuntimeError):
    """What should have happened to an operation, and what had happened instead when patience ended."""


@dataclass(frozen=True, slots=True)
class End:
    """How an operation should end. `trace`: its signals in order, without hints and `operation.finalized`, which is
    expected once where the end is fulfilled. None as generation or trace: any. `was_final`: what is taken back may have been
    final by then, on the word of a partner."""

    status: str
    generation: int | None = 1
    trace: tuple[str, ...] | None = ("ready", "fulfilled")
    was_final: bool = False


@dataclass(eq=False)
class Order:
    """One operation as the shop sees it. Times are the loop's, in seconds."""

    reference: str
    story: str
    kind: str
    amount: int
    legs: list[dict[str, Any]]
    end: End
    hands_over: bool = True
    evidence_tx: str | None = None  # the only transaction that may settle it
    evidence_record: str | None = None  # the only record of a partner that may
    measured: bool = False  # its way from inclusion to webhook counts
    id: str = ""
    status: str = "new"
    generation: int = 0
    latency_ms: float | None = None
    changed_at: float = 0.0
    signals: list[Received] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def kinds(self) -> str:
        """The kinds of its legs, joined."""
        return "+".join(dict.fromkeys(leg["kind"] for leg in self.legs))

    @property
    def trace(self) -> tuple[str, ...]:
        return tuple(s.type.removeprefix("operation.") for s in self.signals if s.type not in HINTS | {FINALIZED})

    @property
    def last_signal(self) -> str:
        return self.signals[-1].type if self.signals else ""

    def news(self) -> None:
        """Wakes whoever waits for a change."""
        self._news.set()
        self._news = asyncio.Event()

    async def until(self, holds: Callable[[], bool], what: str, patience: float = PATIENCE_SECONDS) -> None:
        """Waits until `holds`. Raises Disappointed."""
        try:
            async with asyncio.timeout(patience):
                while not holds():
                    await self._news.wait()
        except TimeoutError:
            raise Disappointed(f"waited {patience:.0f} s for {what}; {self.described()}") from None

    async def heard(self, kind: str, generation: int | None = None) -> Received:
        """The signal `operation.<kind>`, once it was taken."""

        def found() -> Received | None:
            for signal in self.signals:
                if signal.type == f"operation.{kind}" and generation in (None, signal.generation):
                    return signal
            return None

        of_generation = "" if generation is None else f" of generation {generation}"
        await self.until(lambda: found() is not None, f"{kind}{of_generation}")
        signal = found()
        assert signal is not None
        return signal

    def described(self) -> str:
        return f"{self.status}, generation {self.generation}, signals: {', '.join(self.trace) or 'none'}"


class Shop:
    """An async context manager: what it does in the background ends with it. `orders` is filled by `register`; feed `take`
    with what the receiver verified. `settled_at` tells when a signal's evidence was included, in the loop's time."""

    def __init__(
        self,
        brand: str,
        orders: dict[str, Order],
        settled_at: Callable[[Mapping[str, Any]], float | None],
        tell: Callable[[Order, Received], None],
    ) -> None:
        self.brand, self.orders, self._settled_at, self._tell = brand, orders, settled_at, tell
        self.signals: Counter[str] = Counter()  # verified ones by type, repetitions apart
        self.streams: set[str] = set()
        self.strange: list[str] = []  # what a receiver should never see
        self.lost_answers: set[str] = set()  # references whose next `ready` is stored, and its answer lost on the way
        self._last: dict[str, int] = {}
        self._client: Client | None = None
        self._busy: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._busy:
            task.cancel()
        await asyncio.gather(*self._busy, return_exceptions=True)

    def open(self, client: Client) -> None:
        """Signals may come before; from now on the shop can speak too."""
        self._client = client

    @property
    def client(self) -> Client:
        if self._client is None:
            raise RuntimeError("the shop is not open yet")
        return self._client

    async def register(self, order: Order, *, requested_at: str | None = None) -> Order:
        """Registers the order; what it waits for may have happened already."""
        self.orders[order.reference] = order
        body: dict[str, Any] = {
            "brand": self.brand,
            "reference": order.reference,
            "metadata": {"story": order.story},
            "legs": order.legs,
        }
        if requested_at is not None:
            body["requestedAt"] = requested_at
        answer = await self.client.register(body)
        order.id = answer["id"]
        if order.status == "new":
            order.status, order.changed_at = answer["status"], asyncio.get_running_loop().time()
        order.news()
        return order

    # ---- what comes in

    def take(self, signal: Received) -> int:
        """The receivers' rule. Answers 2xx once the signal is kept."""
        if signal.repeated:
            return 204
        self.signals[signal.type] += 1
        self.streams.add(str(signal.data["stream"]))
        order = self.orders.get(signal.reference or "")
        if order is None:
            self.strange.append(
                f"{signal.type} about {signal.reference or 'no operation'}, which the shop never registered"
            )
            return 204
        if signal.sequence <= self._last.get(order.reference, -1):
            self.strange.append(f"{signal.type} of {order.reference} came out of order")
            return 204
        self._last[order.reference] = signal.sequence
        order.signals.append(signal)
        order.id = signal.data["operation"]["id"]  # it may be here before the answer to the registration
        order.status, order.generation = signal.data["operation"]["status"], signal.generation
        order.changed_at = signal.at
        if signal.type == READY:
            self._ready(order, signal)
        self._tell(order, signal)
        order.news()
        if signal.type == READY and order.reference in self.lost_answers:
            self.lost_answers.discard(order.reference)
            return 503  # kept, and the sender doesn't know
        return 204

    def _ready(self, order: Order, signal: Received) -> None:
        evidence = signal.data["evidence"]
        for key, only in (("txHash", order.evidence_tx), ("recordId", order.evidence_record)):
            settled_by = {str(entry[key]) for entry in evidence if entry.get(key)}
            if only is not None and settled_by != {only}:
                self.strange.append(f"{order.reference} was settled by {', '.join(sorted(settled_by))}, not by {only}")
        settled = [self._settled_at(entry) for entry in evidence]
        if order.measured and signal.generation == 1 and settled:
            # our socket may tell the block later than the daemon's: then nothing was waited for
            order.latency_ms = max(0.0, signal.at - max(signal.at if at is None else at for at in settled)) * 1000
        if order.hands_over:
            task = asyncio.create_task(self._hand_over(order, signal.generation))
            self._busy.add(task)
            task.add_done_callback(self._busy.discard)

    async def _hand_over(self, order: Order, generation: int) -> None:
        """Before the irreversible the truth is asked for: a webhook is news of it."""
        try:
            truth = await self.client.operation(order.id)
            if truth["status"] == "ready" and truth["generation"] == generation:
                await self.fulfil(order, generation)
        except (Answered, TimeoutError, aiohttp.ClientError) as error:
            self.strange.append(f"{order.reference} could not be handed over: {error or type(error).__name__}")

    async def fulfil(self, order: Order, generation: int) -> None:
        """Hands over. A generation taken back meanwhile is recorded all the same: an exposure, which the story may want."""
        try:
            await self.client.fulfil(order.id, generation, {"parcel": f"P-{order.reference}"})
        except Answered as problem:
            if problem.status != 409 or not str(problem.problem.get("type", "")).endswith("reverted"):
                raise

    # ---- what is known

    async def truth(self, order: Order) -> dict[str, Any]:
        """The operation over HTTP; the order is brought up to date with it."""
        answer = await self.client.operation(order.id)
        if (answer["status"], answer["generation"]) != (order.status, order.generation):
            order.status, order.generation = answer["status"], answer["generation"]
            order.changed_at = asyncio.get_running_loop().time()
        order.news()
        return answer

    async def becomes(self, order: Order, status: str) -> dict[str, Any]:
        """The operation, once HTTP shows it in that state: for changes that no signal tells. Raises Disappointed."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while True:
                    answer = await self.truth(order)
                    if answer["status"] == status:
                        return answer
                    await asyncio.sleep(LOOK_SECONDS)
        except TimeoutError:
            raise Disappointed(f"waited {PATIENCE_SECONDS:.0f} s for {status}; {order.described()}") from None

    async def ended(self, order: Order) -> None:
        """Once the order has ended as it should. Raises Disappointed."""
        end = order.end
        if end.trace is not None:
            await order.until(lambda: order.trace == end.trace, f"the signals {', '.join(end.trace) or 'none'}")
        if end.status == "fulfilled":
            await order.heard("finalized")
        await self.becomes(order, end.status)
