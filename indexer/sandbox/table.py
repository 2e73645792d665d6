"""What a person sees of the demo: a live table on a terminal, plain lines elsewhere, and a summary.

Everything goes to the stream it is given; the JSON of `--json` is not its business. It only reads.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from indexer.sandbox.receiver import Received
from indexer.sandbox.shop import Order

_COLOURS = {
    "ready": "green",
    "fulfilled": "bold green",
    "reverted": "bold red",
    "conflict": "bold yellow",
    "incomplete": "yellow",
    "expired": "magenta",
    "cancelled": "dim",
    "confirming": "cyan",
}
_AROUND = 8  # lines of the screen that are not rows: head, totals, margins


class Screen:
    """`step` and `signal` tell; within `live()` a terminal shows the table of what changed last."""

    def __init__(self, stream: TextIO, orders: Mapping[str, Order]) -> None:
        self.console = Console(file=stream, highlight=False, soft_wrap=not stream.isatty())
        self._orders = orders
        self._started = asyncio.get_running_loop().time()
        self._live: Live | None = None
        self._step = ""

    @property
    def seconds(self) -> float:
        """Since the start."""
        return asyncio.get_running_loop().time() - self._started

    def step(self, text: str) -> None:
        """What happens now."""
        self._step = text
        if self._live is None:
            self.console.print(f"{self.seconds:6.1f} s  {text}", markup=False)

    def signal(self, order: Order, signal: Received) -> None:
        """A signal that the shop took. Logged where nobody sees the table."""
        if self._live is None:
            latency = (
                f", {order.latency_ms:.0f} ms" if order.latency_ms is not None and order.trace == ("ready",) else ""
            )
            self.console.print(
                f"{self.seconds:6.1f} s  {order.reference:<18} {signal.type:<22} generation {signal.generation}{latency}",
                markup=False,
            )

    @contextmanager
    def live(self) -> Iterator[None]:
        """Shows the table for as long as the body runs."""
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self._table, console=self.console, refresh_per_second=8, transient=True) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def _table(self) -> RenderableType:
        rows = max(5, self.console.height - _AROUND)
        latest = sorted(self._orders.values(), key=lambda order: order.changed_at, reverse=True)[:rows]
        table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
        for column, side in (
            ("operation", "left"),
            ("kind", "left"),
            ("amount", "right"),
            ("status", "left"),
            ("gen", "right"),
            ("last signal", "left"),
            ("latency", "right"),
            ("story", "left"),
        ):
            table.add_column(column, justify=side, no_wrap=True)  # type: ignore[arg-type]
        for order in sorted(latest, key=lambda order: order.changed_at):
            table.add_row(
                order.reference,
                order.kind,
                str(order.amount),
                Text(order.status, style=_COLOURS.get(order.status, "")),
                str(order.generation or ""),
                order.last_signal.removeprefix("operation."),
                "" if order.latency_ms is None else f"{order.latency_ms:.0f} ms",
                Text(order.story, style="dim"),
            )
        totals = Counter(order.status for order in self._orders.values())
        line = Text(f"{self.seconds:5.1f} s  {len(self._orders)} operations: ", style="bold")
        line.append_text(_joined(totals))
        return Group(table, Text(), line, Text(self._step, style="dim"))

    def summary(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.console.print(line, markup=False)


def _joined(totals: Mapping[str, int]) -> Text:
    text = Text()
    for position, (status, number) in enumerate(sorted(totals.items())):
        text.append(", " if position else "")
        text.append(f"{number} {status}", style=_COLOURS.get(status, ""))
    return text
