"""A real Ethereum node on this machine: finds or installs Anvil, starts it, and steers its blocks.

Promises that the node dies with the process that started it, whatever kills that, and that its port was free when Anvil took it.
Nothing here knows Loyfin; transactions are built elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from indexer.sandbox.node_packages import NoNodePackages, install

MINIMUM_VERSION = (1, 7, 0)
_TOOLS = Path(__file__).parent / "chain_tools"
_BINARY = "@foundry-rs/anvil-linux-amd64/bin/anvil"

# Starts the program in argv[2:] so that the kernel kills it when its parent dies. A launcher of its own, because running Python
# between fork and exec (preexec_fn) is unsafe beside threads. The parent may have died before prctl: then there is no one to serve.
_DIES_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class NoAnvil(RuntimeError):
    """No usable Anvil; the message says what was tried and what to do."""


class AnvilFailed(RuntimeError):
    """Anvil did not start or stopped by itself; the message ends with its last words."""


class RpcRefused(RuntimeError):
    """The node answered with an error. `data` is the revert's data, where a call was reverted."""

    def __init__(self, method: str, code: int, message: str, data: object) -> None:
        super().__init__(f"{method}: {message} ({code})")
        self.method, self.code, self.message = method, code, message
        self.data = bytes.fromhex(data[2:]) if isinstance(data, str) and data.startswith("0x") else b""


def ensure_anvil(cache: Path | None = None) -> Path:
    """The path of an Anvil 1.7 or newer: `$ANVIL_BIN`, else `anvil` on PATH, else the locked npm package in `cache`
    (default: the user's cache folder), installed on first use. Blocks; seconds the first time. Raises NoAnvil.
    """
    if named := os.environ.get("ANVIL_BIN"):
        version = _version(named)
        if version is None or version < MINIMUM_VERSION:
            raise NoAnvil(f"ANVIL_BIN={named} is {_shown(version)}; {_shown(MINIMUM_VERSION)} or newer is needed")
        return Path(named)
    if (found := shutil.which("anvil")) and (version := _version(found)) and version >= MINIMUM_VERSION:
        return Path(found)
    try:
        binary = install(_TOOLS, cache) / _BINARY
    except NoNodePackages as error:
        raise NoAnvil(f"{error}. Or install Foundry, or name an Anvil in ANVIL_BIN.") from error
    if not binary.exists():
        raise NoAnvil(
            f"no Anvil package for {platform.system()} {platform.machine()}: install Foundry, or name an Anvil in ANVIL_BIN"
        )
    return binary


def _version(binary: str) -> tuple[int, ...] | None:
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", said)
    return tuple(int(part) for part in found.groups()) if found else None


def _shown(version: tuple[int, ...] | None) -> str:
    return "not an Anvil that starts" if version is None else "Anvil " + ".".join(map(str, version))


class JsonRpc:
    """Plain JSON-RPC over HTTP to a node that we trust: the sandbox's own."""

    def __init__(self, url: str, *, timeout: float = 30) -> None:
        self.url = url
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._ids = itertools.count(1)
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def rpc(self, method: str, *params: object) -> Any:
        """The result of one call. Raises RpcRefused, aiohttp.ClientError, TimeoutError."""
        if self._http is None:
            raise RuntimeError("JsonRpc is used outside its `async with`")
        request = {"jsonrpc": "2.0", "id": next(self._ids), "method": method, "params": params}
        async with self._http.post(self.url, json=request) as response:
            answer = await response.json()
        if error := answer.get("error"):
            raise RpcRefused(method, error.get("code", 0), str(error.get("message", "")), error.get("data"))
        return answer["result"]

    async def block_number(self) -> int:
        return int(await self.rpc("eth_blockNumber"), 16)

    async def block(self, at: int | str = "latest") -> dict[str, Any]:
        """A block with the hashes of its transactions; `at` is a number or a tag."""
        found: dict[str, Any] = await self.rpc("eth_getBlockByNumber", hex(at) if isinstance(at, int) else at, False)
        return found


class Anvil(JsonRpc):
    """A running Anvil, as an async context manager.

    `block_time` is in seconds and may be a fraction (0.2, as on Base); None mines one block for each transaction. `safe` and
    `finalized` trail the head by one and two times `slots_in_an_epoch` blocks. No account exists at the start: give balances with
    `set_balance`. Log lines go to `log`; those about each request only where `log_requests` is set.
    """

    def __init__(
        self,
        *,
        chain_id: int = 84532,
        block_time: float | None = None,
        slots_in_an_epoch: int = 2,
        port: int = 0,
        gas_limit: int = 1_000_000_000,
        log: Path | None = None,
        log_requests: bool = False,
        arguments: Sequence[str] = (),
        binary: Path | None = None,
        cache: Path | None = None,
        start_seconds: float = 30,
    ) -> None:
        super().__init__("")
        self.chain_id = chain_id
        self.websocket_url = ""
        self._port, self._log, self._log_requests = port, log, log_requests
        self._binary, self._cache, self._start_seconds = binary, cache, start_seconds
        self._arguments = [
            *("--chain-id", str(chain_id), "--accounts", "0", "--gas-limit", str(gas_limit)),
            *("--slots-in-an-epoch", str(slots_in_an_epoch), "--no-request-size-limit"),
            *(("--block-time", str(block_time)) if block_time is not None else ()),
            *arguments,
        ]
        self._process: asyncio.subprocess.Process | None = None
        self._stack = AsyncExitStack()

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
        binary = self._binary or await asyncio.to_thread(ensure_anvil, self._cache)
        if self._log is None:
            self._log = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="anvil-"))) / "log"
        with self._log.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _DIES_WITH_PARENT, str(os.getpid())),
                *(str(binary), "--port", str(self._port), *self._arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Ctrl-C in a terminal goes to the whole group: when Anvil stops is for its owner to say
                start_new_session=True,
            )
        port = await self._wait_for_port(self._log)
        self.url, self.websocket_url = f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}"
        await super().__aenter__()
        if not self._log_requests:
            await self.rpc("anvil_setLoggingEnabled", False)

    async def _wait_for_port(self, log: Path) -> int:
        """Anvil took any free port, and says which one in its log."""
        assert self._process is not None
        try:
            async with asyncio.timeout(self._start_seconds):
                while True:
                    if port := self._announced_port(log):
                        return port
                    if self._process.returncode is not None:
                        raise AnvilFailed(f"Anvil stopped with {self._process.returncode}: {self._last_words(log)}")
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AnvilFailed(
                f"Anvil did not listen within {self._start_seconds:.0f} s: {self._last_words(log)}"
            ) from None

    @staticmethod
    def _announced_port(log: Path) -> int | None:
        found = re.search(rb"Listening on [\d.]+:(\d+)", log.read_bytes())
        return int(found[1]) if found else None

    @staticmethod
    def _last_words(log: Path) -> str:
        return log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]

    async def _stop(self) -> None:
        await super().__aexit__(None, None, None)
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.terminate()
            try:
                async with asyncio.timeout(10):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        await self._stack.aclose()

    @property
    def pid(self) -> int:
        """The process id of the node."""
        if self._process is None:
            raise RuntimeError("Anvil is not running")
        return self._process.pid

    async def set_balance(self, holder: bytes, wei: int) -> None:
        await self.rpc("anvil_setBalance", "0x" + holder.hex(), hex(wei))

    async def mine(self, blocks: int = 1, *, seconds_apart: int = 1) -> None:
        """Mines so many blocks; the first one holds what waits in the pool."""
        await self.rpc("anvil_mine", hex(blocks), hex(seconds_apart))

    async def mine_now(self) -> None:
        """Mines one block, at the time that the node's clock shows."""
        await self.rpc("evm_mine")

    async def set_automine(self, on: bool) -> None:
        """One block for each transaction, or only on demand (and by interval, if one is set)."""
        await self.rpc("evm_setAutomine", on)

    async def set_interval(self, seconds: int) -> None:
        """One block each so many whole seconds; 0 stops. Fractions exist only as `block_time` at the start."""
        await self.rpc("evm_setIntervalMining", seconds)

    async def set_next_timestamp(self, unix_seconds: int) -> None:
        """The time of the next block; later blocks count on from there."""
        await self.rpc("evm_setNextBlockTimestamp", unix_seconds)

    async def snapshot(self) -> str:
        """An id for `revert`; good for one use."""
        return str(await self.rpc("evm_snapshot"))

    async def revert(self, snapshot: str) -> None:
        """Back to the snapshot. What is mined from here is another branch, of any length."""
        if not await self.rpc("evm_revert", snapshot):
            raise RpcRefused("evm_revert", 0, f"snapshot {snapshot} is unknown or was used", None)

    async def reorg(self, depth: int, transactions: Sequence[tuple[bytes, int]] = ()) -> None:
        """Replaces the last `depth` blocks by as many others; the head's number stays.

        `transactions` are signed ones with the offset (0: the lowest) of the new block that holds each. All others of the replaced
        blocks are dropped: they do not return to the pool. May go below `finalized`.
        """
        clock = await self._clock_offset()
        # Anvil takes the parameters by position only, and sends no `removed` logs to subscribers
        await self.rpc("anvil_reorg", depth, [["0x" + raw.hex(), offset] for raw, offset in transactions])
        # it also sets its clock back to the common ancestor's time, for good: each reorganisation would add to the blocks' delay
        if (lost := clock - await self._clock_offset()) > 0:
            await self.rpc("evm_increaseTime", lost)

    async def _clock_offset(self) -> int:
        """Seconds by which the node's clock is ahead of the machine's."""
        return int(await self.rpc("evm_increaseTime", 0))
