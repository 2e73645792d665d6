"""docs/faults.md against what it names: every fault of the catalogue once, seeded faults, tests and metrics that are there.

That the metrics move is held where the faults happen: in each named test (tests/conftest.py), and by `make simulate-faults`.
"""

from __future__ import annotations

import re
import subprocess
import sys

from prometheus_client.metrics import MetricWrapperBase

from indexer.telemetry import Metrics
from tests import fault_table
from tests.fault_table import CHECKOUT

# the numbers of the catalogue: those between are not given
CATALOGUE = [
    *(f"F{n:02}" for n in range(1, 19)), "F15b", "F15c", "F15d", *(f"F{n}" for n in range(20, 26)), *(f"F{n}" for n in range(30, 46)),
    *(f"F{n}" for n in range(50, 59)), *(f"F{n}" for n in range(60, 79)), *(f"F{n}" for n in range(80, 100)),
    *(f"F{n}" for n in range(110, 119)), *(f"F{n}" for n in range(120, 131)),
]  # fmt: skip


def test_every_fault_of_the_catalogue_has_one_row_that_says_something() -> None:
    assert sorted(row.code for row in fault_table.rows()) == sorted(CATALOGUE)
    for row in fault_table.rows():
        if row.says.startswith("cannot occur"):
            assert not row.scenarios and not row.figures, row.code
        elif row.says.startswith("nothing"):
            assert row.scenarios and not row.figures, row.code
        else:
            assert row.shown_by and row.figures, f"{row.code}: no scenario shows its metric"


def test_what_the_table_names_is_there() -> None:
    # in a process of its own: the seeds' modules replace the clocks
    said = subprocess.run(
        [sys.executable, "-c", "from tests.simulation.seeded import virtual_time, faults; print('\\n'.join(sorted(faults.NAMES)))"],
        cwd=CHECKOUT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    seeded = set(said.stdout.splitlines())
    labels: dict[str, set[str]] = {}
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            names = {metric._name + end for end in ("", "_total", "_sum")}
            labels |= {name: set(metric._labelnames) for name in names}
    named: set[str] = set()
    for row in fault_table.rows():
        for name in row.scenarios:
            if "::" in name:
                path, test = name.split("[")[0].split("::")
                assert re.search(rf"def {test}\(", (CHECKOUT / path).read_text()), f"{row.code}: {name}"
            else:
                assert name in seeded, f"{row.code}: {name}"
                named.add(name)
        for figure in row.figures:
            assert figure.name in labels, f"{row.code}: {figure}"
            assert {label for label, _ in figure.labels} <= labels[figure.name], f"{row.code}: {figure}"
    assert {name for name in seeded if re.match(r"F\d", name)} <= named, "seeded faults that the table leaves out"


def test_a_row_is_read_as_it_is_written() -> None:
    row = fault_table._row(
        "| F99 | what | `F99 seeded`; `tests/a.py::test_b[c d]`; besides `tests/a.py::test_e` | "
        '`loyalty_a_total{b="c", d="e"}`, `loyalty_f` falls, and more |'
    )
    assert (row.code, row.shown_by, row.besides) == (
        "F99",
        ("F99 seeded", "tests/a.py::test_b[c d]"),
        ("tests/a.py::test_e",),
    )
    assert [str(figure) for figure in row.figures] == ['loyalty_a_total{b="c", d="e"}', "loyalty_f falls"]
