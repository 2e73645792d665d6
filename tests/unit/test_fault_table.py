"""docs/faults.md against what it names: every fault of the catalogue once, seeded faults, tests and metrics that are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from indexer.telemetry import Metrics

CHECKOUT = Path(__file__).parents[2]
# the numbers of the catalogue: those between are not given
CATALOGUE = [
    *(f"F{n:02}" for n in range(1, 19)), "F15b", "F15c", "F15d", *(f"F{n}" for n in range(20, 26)), *(f"F{n}" for n in range(30, 46)),
    *(f"F{n}" for n in range(50, 59)), *(f"F{n}" for n in range(60, 79)), *(f"F{n}" for n in range(80, 100)),
    *(f"F{n}" for n in range(110, 119)), *(f"F{n}" for n in range(120, 131)),
]  # fmt: skip
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (CHECKOUT / "docs/faults.md").read_text().splitlines()
    if re.match(r"\| F\d", line)
]


def test_every_fault_of_the_catalogue_has_one_row_that_says_something() -> None:
    assert sorted(row[0] for row in ROWS) == sorted(CATALOGUE)
    for code, _, played, moves in ROWS:
        assert played.startswith("`") or moves.startswith("cannot occur"), code
        assert moves.startswith(("`loyalty_", "cannot occur", "nothing:", "commits that")), code


def test_what_the_table_names_is_there() -> None:
    # in a process of its own: the seeds' modules replace the clocks
    said = subprocess.run(
        [sys.executable, "-c", "from tests.simulation.seeded import virtual_time, faults; print('\\n'.join(sorted(faults.NAMES)))"],
        cwd=CHECKOUT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    seeded = set(said.stdout.splitlines())
    metrics = {sample.name for family in Metrics().registry.collect() for sample in family.samples}
    metrics |= {family.name + "_total" for family in Metrics().registry.collect() if family.type == "counter"}
    metrics |= {family.name for family in Metrics().registry.collect()}
    named: set[str] = set()
    for code, _, played, moves in ROWS:
        for name in re.findall(r"`([^`]+)`", played):
            if "::" in name:
                path, test = name.split("::")
                assert re.search(rf"def {test}\(", (CHECKOUT / path).read_text()), f"{code}: {name}"
            else:
                assert name in seeded, f"{code}: {name}"
                named.add(name)
        for metric in re.findall(r"`(loyalty_\w+)`", moves):
            assert metric in metrics, f"{code}: {metric}"
    assert {name for name in seeded if re.match(r"F\d", name)} <= named, "seeded faults that the table leaves out"
