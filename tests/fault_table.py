"""docs/faults.md as data: which scenarios play a fault, and which metrics must move when they do.

A figure is a sample's name, with the labels that tell this fault from others. Scenarios that stand after "besides" play the fault
too, and are about something else than its figure: nothing is held against them.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from tests.movements import Figure

CHECKOUT = Path(__file__).parents[1]
_FIGURE = re.compile(r"`((?:loyalty|process)_\w+)(?:\{([^}]*)\})?`( falls)?")


@dataclass(frozen=True)
class Row:
    code: str
    what: str
    shown_by: tuple[str, ...]  # seeded faults, and tests as path::name or path::name[parameter]
    besides: tuple[str, ...]
    figures: tuple[Figure, ...]  # at least one of them moves in each of `shown_by`
    says: str  # the last column

    @property
    def scenarios(self) -> tuple[str, ...]:
        return self.shown_by + self.besides


def _row(line: str) -> Row:
    code, what, played, says = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
    shown_by, _, besides = played.partition("besides ")
    figures = tuple(
        Figure(name, tuple(re.findall(r'(\w+)="([^"]*)"', labels or "")), "falls" if falls else "grows")
        for name, labels, falls in _FIGURE.findall("" if says.startswith("nothing") else says)
    )
    return Row(
        code,
        what,
        tuple(re.findall(r"`([^`]+)`", shown_by)),
        tuple(re.findall(r"`([^`]+)`", besides)),
        figures,
        says,
    )


@functools.cache
def rows() -> tuple[Row, ...]:
    lines = (CHECKOUT / "docs/faults.md").read_text().splitlines()
    return tuple(_row(line) for line in lines if re.match(r"\| F\d", line))


@functools.cache
def shown() -> dict[str, tuple[tuple[Figure, ...], ...]]:
    """By seeded fault or test: for each row that it shows, the figures of which one must move."""
    found: dict[str, tuple[tuple[Figure, ...], ...]] = {}
    for row in rows():
        for name in row.shown_by if row.figures else ():
            found[name] = (*found.get(name, ()), row.figures)
    return found


def wanted_of_test(node_id: str) -> tuple[tuple[Figure, ...], ...]:
    """Of one run of a test, by pytest's node id: figures that are asked of all its parameters, and of the last one's value."""
    name, _, parameter = node_id.removesuffix("]").partition("[")
    return shown().get(name, ()) + shown().get(f"{name}[{parameter.rpartition('-')[2]}]", ())
