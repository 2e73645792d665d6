"""How the demo ended: what the daemon says over HTTP against what every story should have come to, and the figures.

Promises that `ok` is true only when every operation is where it should be, by a fresh reading, and every webhook verified.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from indexer.sandbox.receiver import Receiver
from indexer.sandbox.shop import FINALIZED, Order, Shop


@dataclass(frozen=True)
class Verdict:
    """`operations` by status and `signals` by type, as read and received; `failures`: what is not as it should be."""

    operations: Mapping[str, int] = field(default_factory=dict)
    signals: Mapping[str, int] = field(default_factory=dict)
    received: int = 0
    verified: int = 0
    duplicates: int = 0
    reorganisations: int = 0
    latencies_ms: Sequence[float] = ()
    failures: Sequence[str] = ()
    complete: bool = False  # the story was told to its end

    @property
    def ok(self) -> bool:
        return self.complete and not self.failures

    def document(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "operations": dict(sorted(self.operations.items())),
            "signals": dict(sorted(self.signals.items())),
            "webhooks": {"received": self.received, "verified": self.verified, "duplicates": self.duplicates},
            "reorganisations": self.reorganisations,
            "latency_ms": {"included_to_received": {"p50": self.latency(0.5), "p99": self.latency(0.99)}},
            "ok": self.ok,
        }

    def latency(self, quantile: float) -> float | None:
        """By nearest rank, in milliseconds; None where nothing was measured."""
        ordered = sorted(self.latencies_ms)
        return round(ordered[max(0, math.ceil(quantile * len(ordered)) - 1)], 1) if ordered else None

    def lines(self, seconds: float) -> list[str]:
        """The summary for people."""
        p50, p99 = self.latency(0.5), self.latency(0.99)
        measured = "nothing was measured" if p50 is None else f"{p50:.0f} ms at the median, {p99:.0f} ms at p99"
        return [
            "",
            f"operations       {sum(self.operations.values())}: {_listed(self.operations)}",
            f"signals          {sum(self.signals.values())}: {_listed(self.signals)}",
            f"webhooks         {self.received} received, {self.verified} verified, {self.duplicates} repeated",
            f"reorganisations  {self.reorganisations}",
            f"latency          {measured}, from a block's arrival to its webhook ({len(self.latencies_ms)} measured)",
            *(f"FAILED           {failure}" for failure in self.failures),
            f"{'ok' if self.ok else 'NOT ok'}, in {seconds:.0f} s",
        ]


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name.removeprefix('operation.')}" for name, number in sorted(counts.items()))


def judge(
    shop: Shop, receiver: Receiver, truths: Iterable[Mapping[str, Any]], reorganisations: int, failed: Sequence[str]
) -> Verdict:
    """`truths`: every operation as HTTP shows it now; `failed`: stories that didn't come to their end, and why."""
    shown = {truth["reference"]: truth for truth in truths}
    failures = list(failed) + list(shop.strange)
    if set(shown) != set(shop.orders):
        failures.append(
            f"registered and not listed, or the reverse: {', '.join(sorted(set(shown) ^ set(shop.orders)))}"
        )
    for reference, order in shop.orders.items():
        if reference in shown:
            failures += _differences(order, shown[reference])
    if receiver.verified != receiver.received:
        failures.append(f"{receiver.received - receiver.verified} webhooks did not verify")
    if receiver.duplicates < 1:
        failures.append("the signal whose answer was lost did not come again")
    if len(shop.streams) != 1:
        failures.append(f"signals of {len(shop.streams)} streams")
    return Verdict(
        operations=Counter(truth["status"] for truth in shown.values()),
        signals=dict(shop.signals),
        received=receiver.received,
        verified=receiver.verified,
        duplicates=receiver.duplicates,
        reorganisations=reorganisations,
        latencies_ms=[order.latency_ms for order in shop.orders.values() if order.latency_ms is not None],
        failures=failures,
        complete=not failed,
    )


def _differences(order: Order, truth: Mapping[str, Any]) -> list[str]:
    end = order.end
    generation = end.generation if end.generation is not None else truth["generation"]
    trace = end.trace if end.trace is not None else order.trace
    finalized = sum(signal.type == FINALIZED for signal in order.signals)
    pairs = (
        ("status", end.status, truth["status"]),
        ("generation", generation, truth["generation"]),
        ("signals", trace, order.trace),
        ("finalized signals", int(end.status == "fulfilled") if end.trace else finalized, finalized),
    )
    return [
        f"{order.reference} ({order.story}): {what} should be {_shown(expected)}, is {_shown(actual)}"
        for what, expected, actual in pairs
        if expected != actual
    ]


def _shown(value: object) -> str:
    return (", ".join(value) or "none") if isinstance(value, tuple) else str(value)
