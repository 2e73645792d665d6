"""What a process costs, and the processes that a benchmark starts: PostgreSQL, the node, and each side of a comparison."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

from indexer.store import schema
from indexer.store.embedded import EmbeddedPostgres
from tests.bench.history import Shape


def own_cpu() -> float:
    """Seconds of processor time of this process so far, its threads included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def own_peak_mb() -> float:
    """The most memory that this process held so far. (ru_maxrss begins at what the parent held when it started us.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def tree_cpu(pid: int) -> float:
    """Seconds of processor time of a process and its children, those that ended and were waited for included."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                spent = process.cpu_times()
                total += spent.user + spent.system + spent.children_user + spent.children_system
    return total


def machine_cpu() -> float:
    """Seconds that all processors of the machine have worked so far, for whomever."""
    spent = psutil.cpu_times()
    return float(spent.user + spent.nice + spent.system + spent.irq + spent.softirq)


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    owner_url: str
    pid: int

    def cpu(self) -> float:
        return tree_cpu(self.pid)


@asynccontextmanager
async def postgres(*, durable: bool = True) -> AsyncIterator[Server]:
    """As `indexer run --embedded` starts it, in a folder of its own, migrated."""
    state = Path(tempfile.mkdtemp(prefix="indexer-bench-"))
    state.chmod(0o711)
    try:
        async with EmbeddedPostgres(state, durable=durable) as embedded:
            await schema.migrate(embedded.dsn("indexer_owner"))
            yield Server(embedded.dsn("indexer"), embedded.dsn("indexer_owner"), embedded.pid)
    finally:
        shutil.rmtree(state, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class NodeProcess:
    """`withholding_url`: of the endpoint that leaves logs out, where the shape asks for one."""

    url: str
    pid: int
    withholding_url: str | None = None

    def calls(self) -> dict[str, int]:
        """What was asked since the last look, by method."""
        body = b'{"jsonrpc":"2.0","id":1,"method":"bench_calls","params":[]}'
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            found: dict[str, int] = msgspec.json.decode(response.read())["result"]
        return found


@asynccontextmanager
async def node(shape: Shape) -> AsyncIterator[NodeProcess]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.node", msgspec.json.encode(shape).decode(), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(600):
            urls = [f"http://127.0.0.1:{int(port)}/" for port in (await process.stdout.readline()).split()]
        yield NodeProcess(urls[0], process.pid, *urls[1:])
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def alone(module: str, task: object) -> Any:
    """Runs `python -m module TASK` to its end: one JSON document in, one out. Its errors go to our stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, msgspec.json.encode(task).decode(), stdout=asyncio.subprocess.PIPE
    )
    try:
        output, _ = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise RuntimeError(f"{module} ended with status {process.returncode}")
    return msgspec.json.decode(output)
