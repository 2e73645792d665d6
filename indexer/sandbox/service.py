"""The product as its users meet it: a configuration file, the daemon as a process, a token from the command line.

Promises that the daemon is started exactly as `indexer run --embedded` starts it, that it ends when this process does, and
that a start that fails says so with the last lines of its log. It knows nothing of what the daemon will be asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from indexer.sandbox.anvil import _DIES_WITH_PARENT

START_SECONDS = 90.0  # initdb and migrations on a slow machine
STOP_SECONDS = 30.0


class ServiceFailed(RuntimeError):
    """The daemon did not start, ended by itself, or a command of it failed."""


def command_line() -> list[str]:
    """The `indexer` of this installation."""
    script = Path(sys.executable).with_name("indexer")
    return [str(script)] if script.exists() else [sys.executable, "-c", "from indexer.cli import main; main()"]


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Service:
    """`indexer run --embedded --config …`, as an async context manager. The log is `<config's folder>/daemon.log`."""

    def __init__(self, config: Path, port: int) -> None:
        self.config, self.log = config, config.with_name("daemon.log")
        self.url = f"http://127.0.0.1:{port}"
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _start(self) -> None:
        first, *rest = command_line()
        launcher = (sys.executable, "-I", "-S", "-c", _DIES_WITH_PARENT, str(os.getpid()))
        with self.log.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                *(*launcher, first, *rest, "run", "--embedded", "--config", str(self.config)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment(),
                # Ctrl-C in a terminal goes to the whole group: when the daemon stops is for us to say
                start_new_session=True,
            )
        await self._wait_until_ready()

    async def _wait_until_ready(self) -> None:
        """Until `/readyz` answers 200. Raises ServiceFailed."""
        assert self._process is not None
        try:
            async with asyncio.timeout(START_SECONDS), aiohttp.ClientSession() as http:
                while True:
                    if self._process.returncode is not None:
                        raise self._ended()
                    with suppress(aiohttp.ClientError):
                        async with http.get(f"{self.url}/readyz") as response:
                            if response.status == 200:
                                return
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise ServiceFailed(
                f"the daemon was not ready within {START_SECONDS:.0f} s:\n{self.last_words()}"
            ) from None

    async def _stop(self) -> None:
        """SIGTERM, so that leases are released and PostgreSQL is shut down; SIGKILL where that does not help."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def ended(self) -> None:
        """Returns never: raises ServiceFailed when the daemon ends by itself."""
        assert self._process is not None
        await self._process.wait()
        raise self._ended()

    def _ended(self) -> ServiceFailed:
        assert self._process is not None
        return ServiceFailed(f"the daemon ended by itself with {self._process.returncode}:\n{self.last_words()}")

    def last_words(self, lines: int = 15) -> str:
        """The end of the daemon's log."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def errors(self, most: int = 5) -> list[str]:
        """The latest different errors in the daemon's log."""
        found: dict[str, None] = {}
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("level") in ("error", "critical"):
                text = ": ".join(str(entry[key]) for key in ("task", "event", "error") if key in entry)
                found.pop(text, None)
                found[text] = None
        return list(found)[-most:]

    async def token(self, name: str, scopes: Sequence[str], brand: str | None = None) -> str:
        """A new API token, by `indexer tokens add`."""
        of_brand = ["--brand", brand] if brand else []
        made = await self.command("tokens", "add", name, *of_brand, *(f"--scope={scope}" for scope in scopes))
        return str(made["token"])

    async def command(self, *arguments: str) -> Any:
        """What a command of `indexer` answers with --json. Raises ServiceFailed."""
        process = await asyncio.create_subprocess_exec(
            *command_line(),
            *arguments,
            *("--embedded", "--json", "--config", str(self.config)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment(),
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                out, complaints = await process.communicate()
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        if process.returncode:
            raise ServiceFailed(f"indexer {' '.join(arguments[:2])}: {complaints.decode(errors='replace').strip()}")
        return json.loads(out)

    @staticmethod
    def _environment() -> dict[str, str]:
        """Ours without INDEXER_* scalars, which would override the file; programs of PostgreSQL may still be named."""
        return {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("INDEXER_") or name == "INDEXER_PG_BIN"
        }
