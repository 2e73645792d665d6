"""Facts of the repository that no single module can keep: what the wheel holds, what is pinned, what must never be named."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "indexer"


def tracked() -> list[Path]:
    """Files that are in the repository, or would be with `git add`; of an unpacked archive, all that it holds."""
    if shutil.which("git") and (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return [ROOT / name for name in sorted(set(listed.split("\0"))) if name and (ROOT / name).is_file()]
    hidden = {".venv", "__pycache__", "node_modules", "dist", ".git"}
    return sorted(path for path in ROOT.rglob("*") if path.is_file() and not hidden & set(path.relative_to(ROOT).parts))


def texts() -> list[tuple[Path, str]]:
    found = []
    for path in tracked():
        raw = path.read_bytes()
        if b"\0" not in raw[:4096]:
            found.append((path.relative_to(ROOT), raw.decode(errors="replace")))
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the wheel, built from this tree without network."""
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


# --------------------------------------------------------------------------- the wheel


def test_the_wheel_holds_the_whole_package_and_its_data(wheel: set[str]) -> None:
    wanted = {str(path.relative_to(ROOT)) for path in tracked() if path.is_relative_to(PACKAGE)}
    for folder in ("contracts_abi", "migrations"):
        wanted |= {f"indexer/{path.relative_to(ROOT)}" for path in tracked() if path.is_relative_to(ROOT / folder)}
    assert wanted - wheel == set()
    assert "indexer/py.typed" in wheel
    assert any(name.startswith("indexer/contracts_abi/") and name.endswith(".json") for name in wheel)
    assert any(name.startswith("indexer/migrations/versions/") for name in wheel)
    assert any(name.startswith("indexer/store/contract/") and name.endswith(".sql") for name in wheel)
    assert any(name.startswith("indexer/sandbox/") and name.endswith(".json") for name in wheel)


def test_the_wheel_holds_nothing_else(wheel: set[str]) -> None:
    strangers = {name for name in wheel if not name.startswith("indexer/") and ".dist-info/" not in name}
    assert strangers == set()
    assert not [name for name in wheel if "__pycache__" in name or "node_modules" in name or name.endswith(".pyc")]


# --------------------------------------------------------------------------- what is pinned


def requirements(name: str) -> dict[str, str]:
    """Name → version of a hashed requirements file; every entry must be exact and hashed, nothing else may stand there."""
    pinned: dict[str, str] = {}
    text = (ROOT / "requirements" / name).read_text().replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        match = re.fullmatch(
            r"([\w.-]+)(?:\[[\w,.-]+\])?==([\w.+!-]+)(\s*;[^-]*?)?((?:\s+--hash=sha256:[0-9a-f]{64})+)", line
        )
        assert match, f"{name}: not pinned and hashed: {line[:120]}"
        pinned[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    return pinned


def test_requirements_are_exact_and_hashed_and_agree() -> None:
    run, dev = requirements("run.txt"), requirements("dev.txt")
    assert {"run.txt", "dev.txt", "matrix.txt"} == {path.name for path in (ROOT / "requirements").iterdir()}
    assert requirements("matrix.txt")  # only programs for tests/matrix.py; installed with --no-deps
    assert run.items() <= dev.items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    direct = [*project["project"]["dependencies"], *(line for lines in extras.values() for line in lines)]
    for wanted, pinned in ((direct, run), (project["dependency-groups"]["dev"], dev)):
        names = {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", line)[0]).lower() for line in wanted}
        assert names <= set(pinned), f"declared and not pinned: {names - set(pinned)}"


def test_no_package_registry_is_named_and_nothing_is_resolved() -> None:
    hosts = [
        ".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("npmjs", "com"))
    ]
    hosts += [".".join(("yarnpkg", "com")), ".".join(("proxy", "golang", "org")), ".".join(("crates", "io"))]
    options = re.compile(r"^\s*(--(extra-)?index-url|-i\s|--find-links|registry\s*=)", re.MULTILINE)
    for path, text in texts():
        assert not [host for host in hosts if host in text], f"{path} names a package registry"
        if path.parts[0] == "requirements" or path.name in (".npmrc", "pip.conf"):
            assert not options.search(text), f"{path} names an index"
        if path.name == "package-lock.json":
            packages = json.loads(text)["packages"].values()
            assert not [package for package in packages if "resolved" in package], f"{path} holds resolved URLs"
            assert all("integrity" in package for package in packages if "version" in package and "name" not in package)
    assert not (ROOT / "uv.lock").exists(), "uv.lock holds resolved URLs; requirements/*.txt is the lock"


# --------------------------------------------------------------------------- the source


def test_modules_open_with_what_they_are_for() -> None:
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        if tree.body:  # an empty __init__.py says all it has to
            assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"


def test_no_module_is_a_drawer_for_leftovers() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    assert not [path for path in PACKAGE.rglob("*") if path.stem in drawers]


def test_nothing_is_left_for_later() -> None:
    later = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "X" * 3 + r"\b", "NotImplemented" + "Error")))
    for path, text in texts():
        if path.suffix in (".py", ".sql"):
            assert not later.search(text), f"{path} leaves something for later"


def test_no_path_of_one_machine_is_named() -> None:
    # pieces, so that this file does not name them either
    for piece in ("/" + "work/main", "/" + "work/shared", "/" + "root/.pyenv", "/tmp/" + "plan"):
        for path, text in texts():
            assert piece not in text, f"{path} names {piece}"


def test_the_matrix_names_what_is_here_and_what_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "tests/matrix.py", "--list"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    running = ".".join(map(str, sys.version_info[:2]))
    for version in ("3.11", "3.12", "3.13"):
        assert f"HERE     Python {version} " in done.stdout or f"MISSING  Python {version}: " in done.stdout
    if shutil.which(f"python{running}"):
        assert f"HERE     Python {running} " in done.stdout
    for major in (15, 16, 17, 18):
        assert f"x PostgreSQL {major} (" in done.stdout or f"MISSING  PostgreSQL {major}: " in done.stdout


# --------------------------------------------------------------------------- deployment


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_systemd_unit_is_valid_and_tight(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "systemd" / "indexer.service").read_text()
    assert re.search(r"^ExecStart=/opt/indexer/bin/indexer run ", text, re.MULTILINE)
    unit = tmp_path / "indexer.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))  # ours is not installed
    verified = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")  # an unknown key is only printed


def test_the_systemd_unit_knows_the_exit_codes() -> None:
    lines = (ROOT / "deploy" / "systemd" / "indexer.service").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    assert settings["Type"] == "notify" and int(settings["WatchdogSec"]) > 0
    assert settings["StateDirectory"] == "indexer"
    assert settings["RestartPreventExitStatus"] == "2"  # wrong usage or configuration: the same next time
    assert settings["RestartForceExitStatus"] == settings["SuccessExitStatus"] == "75"  # try again


def test_the_changelog_names_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
