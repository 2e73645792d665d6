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
    latencies_ms: Mapping[str, Sequence[float]] = field(default_factory=dict)  # by kinds of legs
    alerts: Sequence[str] = ()  # what a person on call would have been told
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
            "latency_ms": {
                "included_to_received": _quantiles(self._on_chain),
                "by_kind": {kind: _quantiles(each) for kind, each in sorted(self.latencies_ms.items())},
            },
            "alerts": list(self.alerts),
            "ok": self.ok,
        }

    @property
    def _on_chain(self) -> list[float]:
        """Those that rest on blocks alone."""
        kinds = [
            kind for kind in self.latencies_ms if not {"keyban", "qiibee"} & set(kind.replace("+", ".").split("."))
        ]
        return [value for kind in kinds for value in self.latencies_ms[kind]]

    def lines(self, seconds: float) -> list[str]:
        """The summary for people."""
        return [
            "",
            f"operations       {sum(self.operations.values())}: {_listed(self.operations)}",
            f"signals          {sum(self.signals.values())}: {_listed(self.signals)}",
            f"webhooks         {self.received} received, {self.verified} verified, {self.duplicates} repeated",
            f"reorganisations  {self.reorganisations}",
            "latency          from inclusion, in a block or by a partner, to the webhook:",
            *(_measured(kind, each) for kind, each in sorted(self.latencies_ms.items())),
            *(f"alert            {alert}" for alert in self.alerts),
            *(f"FAILED           {failure}" for failure in self.failures),
            f"{'ok' if self.ok else 'NOT ok'}, in {seconds:.0f} s",
        ]


def _quantile(values: Sequence[float], quantile: float) -> float | None:
    """By nearest rank, in milliseconds; None where nothing was measured."""
    ordered = sorted(values)
    return round(ordered[max(0, math.ceil(quantile * len(ordered)) - 1)], 1) if ordered else None


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    return {"p50": _quantile(values, 0.5), "p99": _quantile(values, 0.99)}


def _measured(kind: str, values: Sequence[float]) -> str:
    p50, p99 = _quantile(values, 0.5) or 0.0, _quantile(values, 0.99) or 0.0
    return f"  {kind:<30} {p50:>6.0f} ms at the median, {p99:>6.0f} ms at p99 ({len(values)} measured)"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name.removeprefix('operation.')}" for name, number in sorted(counts.items()))


def judge(
    shop: Shop,
    receiver: Receiver,
    truths: Iterable[Mapping[str, Any]],
    reorganisations: int,
    failed: Sequence[str],
    alerts: Sequence[str] = (),
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
    latencies: dict[str, list[float]] = {}
    for order in shop.orders.values():
        if order.latency_ms is not None:
            latencies.setdefault(order.kinds, []).append(order.latency_ms)
    return Verdict(
        operations=Counter(truth["status"] for truth in shown.values()),
        signals=dict(shop.signals),
        received=receiver.received,
        verified=receiver.verified,
        duplicates=receiver.duplicates,
        reorganisations=reorganisations,
        latencies_ms=latencies,
        alerts=alerts,
        failures=failures,
        complete=not failed,
    )


def _differences(order: Order, truth: Mapping[str, Any]) -> list[str]:
    end = order.end
    generation = end.generation if end.generation is not None else truth["generation"]
    trace = end.trace if end.trace is not None else order.trace
    finalized = sum(signal.type == FINALIZED for signal in order.signals)
    open_end = not end.trace or (end.was_final and finalized == 1)
    pairs = (
        ("status", end.status, truth["status"]),
        ("generation", generation, truth["generation"]),
        ("signals", trace, order.trace),
        ("finalized signals", finalized if open_end else int(end.status == "fulfilled"), finalized),
    )
    return [
        f"{order.reference} ({order.story}): {what} should be {_shown(expected)}, is {_shown(actual)}"
        for what, expected, actual in pairs
        if expected != actual
    ]


def _shown(value: object) -> str:
    return (", ".join(value) or "none") if isinstance(value, tuple) else str(value)
