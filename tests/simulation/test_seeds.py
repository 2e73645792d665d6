"""A handful of seeds of the simulation (docs/simulation.md): each ends as the truth says, and one played twice is the same to the byte."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def play(*arguments: str, expect: int = 0) -> list[tuple[int, str, str]]:
    """(seed, ok or FAILED, hash of its trace) of each seed, in a process of its own."""
    command = [sys.executable, "-m", "tests.simulation.seeded", "--jobs", "1", *arguments]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == expect, done.stdout[-6000:] + done.stderr[-3000:]
    found = re.findall(r"^seed (\d+): (ok|FAILED) ([0-9a-f]+)", done.stdout, re.MULTILINE)
    return [(int(seed), word, trace) for seed, word, trace in found]


def test_seeds_end_as_the_truth_says_and_twice_in_the_same_way() -> None:
    # short ones: by polling with a node that drops logs, by socket with one that forges them
    played = play("--seed", "32", "--seed", "166", "--seed", "32")
    assert [(seed, word) for seed, word, _ in played] == [(32, "ok"), (166, "ok"), (32, "ok")]
    assert played[0][2] == played[2][2] != played[1][2]


def test_planted_bugs_are_noticed() -> None:
    """Three of those of make simulate-mutants, by the seeds that are on record; without the bug these seeds end well."""
    arguments = ["--mutants", "numbers_with_gaps", "lookalikes_believed", "alarms_forgotten", "--tries", "0"]
    command = [sys.executable, "-m", "tests.simulation.seeded", "--jobs", "1", *arguments]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0 and done.stdout.count("caught by seed") == 3, done.stdout[-3000:] + done.stderr[-2000:]


def test_faults_that_are_struck_alone_move_their_metrics() -> None:
    """Two of make simulate-faults: a refusal, and a trouble of the chain itself."""
    faults = ["F60 rate limited", "F13 replaced at the same height"]
    command = [sys.executable, "-m", "tests.simulation.seeded", "--jobs", "1", "--tries", "4", "--faults", *faults]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0 and done.stdout.count(" → ") == len(faults), done.stdout[-3000:] + done.stderr[-2000:]
