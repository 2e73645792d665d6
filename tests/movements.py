"""What metrics did while somebody watched: which counters grew, which gauges rose or fell, and how far they went.

A gauge that rose and fell again shows nothing at the end, and an age is only computed when it is asked for: so both are
noted when they are set. A process that died keeps its counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from prometheus_client import Gauge
from prometheus_client.parser import text_string_to_metric_families

from indexer.telemetry import Metrics

Direction = Literal["grows", "falls"]
Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class Figure:
    """One metric as the table of faults names it: a sample's name, the labels that it must have, and where it goes."""

    name: str
    labels: tuple[tuple[str, str], ...] = ()
    direction: Direction = "grows"

    def fits(self, key: Key) -> bool:
        return key[0] == self.name and set(self.labels) <= set(key[1])

    def __str__(self) -> str:
        labels = ", ".join(f'{key}="{value}"' for key, value in self.labels)
        return self.name + (f"{{{labels}}}" if labels else "") + (" falls" if self.direction == "falls" else "")


@dataclass
class Gauged:
    """The life of one gauge under one set of labels. It begins at 0, as a gauge does that nobody has set."""

    value: float = 0.0
    rises: int = 0
    falls: int = 0
    highest: float = 0.0

    def take(self, value: float) -> None:
        self.rises += value > self.value
        self.falls += value < self.value
        self.highest = max(self.highest, value)
        self.value = value


@dataclass
class Movements:
    """What was seen. Sums go over processes, and over the sets of labels that a figure leaves open."""

    metrics: list[Metrics] = field(default_factory=list)
    gauges: dict[tuple[int, Key], Gauged] = field(default_factory=dict)
    scraped: dict[object, dict[Key, float]] = field(
        default_factory=dict
    )  # counters of other processes, as each last said

    def gauged(self, owner: object, name: str, labels: Mapping[str, str], value: float) -> None:
        key = (name, tuple(sorted(labels.items())))
        self.gauges.setdefault((id(owner), key), Gauged()).take(value)

    def scrape(self, text: str, process: object) -> None:
        """What another process's `/metrics` says."""
        counters = self.scraped[process] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if family.type == "gauge":
                    self.gauged(process, sample.name, sample.labels, sample.value)
                else:
                    counters[sample.name, tuple(sorted(sample.labels.items()))] = sample.value

    def counters(self) -> Mapping[Key, float]:
        found: Counter[Key] = Counter()
        for said in self.scraped.values():
            found.update(said)  # type: ignore[arg-type]
        for metrics in self.metrics:
            for family in metrics.registry.collect():
                if family.type in ("counter", "histogram"):
                    for sample in family.samples:
                        found[sample.name, tuple(sorted(sample.labels.items()))] += sample.value  # type: ignore[assignment]
        return found

    def how_far(self, figure: Figure) -> float:
        """How far it moved: what a counter counted, how often a gauge rose or fell, the greatest age in seconds."""
        gauges = [gauged for (_, key), gauged in self.gauges.items() if figure.fits(key)]
        if not gauges:
            return sum(value for key, value in self.counters().items() if figure.fits(key))
        if figure.direction == "falls":
            return sum(gauged.falls for gauged in gauges)
        if figure.name.endswith("_seconds"):
            return max(gauged.highest for gauged in gauges)
        return sum(gauged.rises for gauged in gauges)

    def forget_ages(self) -> None:
        for gauged in self.gauges.values():
            gauged.highest = 0.0

    def still(self, wanted: tuple[tuple[Figure, ...], ...]) -> list[str]:
        """Of each choice of figures of which none moved: what was expected, and what else moved under those names."""
        found = []
        for figures in wanted:
            if not any(map(self.how_far, figures)):
                names = {figure.name for figure in figures}
                others = [Figure(*key) for key, value in self.counters().items() if value and key[0] in names]
                found.append(" or ".join(map(str, figures)) + f"; instead: {', '.join(map(str, others)) or 'nothing'}")
        return found


#: Of the body of `watched` that runs now.
current: Movements | None = None


@contextmanager
def watched() -> Iterator[Movements]:
    """Watches every Metrics that is made in the body."""
    global current
    seen = Movements()
    made, gauge_set, age = Metrics.__init__, Gauge.set, Metrics._age

    def init(self: Metrics, *args: Any, **named: Any) -> None:
        made(self, *args, **named)
        seen.metrics.append(self)

    def set_(self: Gauge, value: float) -> None:
        seen.gauged(self, self._name, dict(zip(self._labelnames, self._labelvalues, strict=True)), value)
        gauge_set(self, value)

    def age_(self: Metrics, gauge: Gauge, labels: tuple[str, ...], since: float | None) -> None:
        before = self._since.get((gauge, labels))
        if before is not None:  # as it was until now
            named = dict(zip(gauge._labelnames, labels, strict=True))
            seen.gauged((self, gauge, labels), gauge._name, named, max(0.0, self._now() - before))
        age(self, gauge, labels, since)

    Metrics.__init__, Gauge.set, Metrics._age = init, set_, age_  # type: ignore[method-assign, assignment]
    current = seen
    try:
        yield seen
    finally:
        current = None
        Metrics.__init__, Gauge.set, Metrics._age = made, gauge_set, age  # type: ignore[method-assign]
