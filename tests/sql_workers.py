"""Workers of the SQL contract as processes: exactly as docs/sql.md prints them, started, killed and judged.

What a worker hands over is written to a file of its own, a line an operation, before it says so to the database.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import asyncpg

from indexer.store import programs

DOCUMENT = Path(__file__).parents[1] / "docs" / "sql.md"

HAND_OVER_SH = """#!/bin/sh
echo "$1" >> handed.$PPID
echo "{\\"by\\": \\"$PPID\\"}"
"""
HAND_OVER_PY = """import os

async def hand_over(row):
    with open(f"handed.{os.getpid()}", "a") as file:
        file.write(f"{row['operation_id']}\\n")
    return {"by": str(os.getpid())}
"""


def documented(language: str) -> str:
    """The only block of a language in docs/sql.md."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return str(found)


def psql_folder() -> Path | None:
    """Where psql is: PostgreSQL's own programs; None where they come without."""
    folder = programs.find_folder()
    return folder if (folder / "psql").exists() else None


async def make_ready(owner: asyncpg.Connection, brand: str, count: int) -> None:
    """So many operations that are ready, as the reconciler leaves them."""
    await owner.execute(
        """
        INSERT INTO indexer.operation (id, brand, reference, request, requested_at, requested_at_stated, state, state_at, generation)
        SELECT indexer.operation_id($1, 'order no ' || n), $1, 'order no ' || n, '{"legs": []}', now(), false, 'ready',
               now() - (1000000 - n) * interval '1 ms', 1
        FROM generate_series(1, $2) n
        """,
        brand,
        count,
    )


@dataclass
class Crew:
    """Processes of one kind that compete for one brand's operations."""

    folder: Path
    url: str
    owner: asyncpg.Connection
    language: str = "python"
    running: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)  # by the name of its sessions
    killed: int = 0

    def __post_init__(self) -> None:
        (self.folder / "worker").write_text(documented(self.language))
        (self.folder / "shop.py").write_text(HAND_OVER_PY)
        (self.folder / "hand-over").write_text(HAND_OVER_SH)
        (self.folder / "hand-over").chmod(0o755)

    async def start(self) -> None:
        path = os.environ.get("PATH", os.defpath)
        if (folder := psql_folder()) is not None:
            path = f"{folder}{os.pathsep}{path}"
        command = ["bash"] if self.language == "sh" else [sys.executable]
        name = f"worker_{self.killed + len(self.running)}"
        self.running[name] = await asyncio.create_subprocess_exec(
            *command,
            str(self.folder / "worker"),
            cwd=self.folder,
            env={
                **os.environ,
                "DATABASE_URL": f"{self.url}{'&' if '?' in self.url else '?'}application_name={name}",
                "PATH": path,
                "PYTHONPATH": str(self.folder),
            },
            start_new_session=True,
        )

    async def kill(self, name: str) -> None:
        """SIGKILL, and time passes for what it held: at once, by moving its claims' end, when its last word has been heard."""
        process = self.running.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        self.killed += 1
        async with asyncio.timeout(60):
            while await self.owner.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name):
                await asyncio.sleep(0.005)
        await self.owner.execute(
            """
            UPDATE indexer.fulfilment_claim SET claimed_until = clock_timestamp()
            WHERE ended_at IS NULL AND claimed_until > clock_timestamp() AND consumer LIKE '%-' || $1::int
            """,
            process.pid,
        )

    async def work(self, count: int, random: Random, kills: int, seconds: float) -> None:
        """Until `count` operations have a receipt; `kills` times one of them is killed and another takes its place."""
        at = sorted(random.sample(range(1, count), kills))
        async with asyncio.timeout(seconds):
            while (done := await self.owner.fetchval("SELECT count(*) FROM indexer.receipt")) < count:
                for process in self.running.values():
                    assert process.returncode is None, f"a worker ended by itself, with {process.returncode}"
                if at and done >= at[0]:
                    at.pop(0)
                    await self.kill(random.choice(sorted(self.running)))
                    await self.start()
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        for process in self.running.values():
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    def handed(self) -> Counter[str]:
        """How often each operation was handed over."""
        return Counter(line for path in self.folder.glob("handed.*") for line in path.read_text().split())

    async def judge(self, count: int) -> dict[str, int]:
        """Every operation handed over, each with one receipt, claims of one never at the same time. Returns figures."""
        handed = self.handed()
        assert len(handed) == count, f"{count - len(handed)} were never handed over"
        again = {operation: times for operation, times in handed.items() if times > 1}
        # a killed worker is between handing over and saying so with one operation at most
        assert sum(times - 1 for times in again.values()) <= self.killed, again
        row = await self.owner.fetchrow(
            """
            SELECT count(*) AS receipts, count(DISTINCT operation_id) AS operations, count(*) FILTER (WHERE outcome <> 'fulfilled') AS other,
                   count(*) FILTER (WHERE claim IS NULL) AS unclaimed FROM indexer.receipt
            """
        )
        assert row is not None and tuple(row) == (count, count, 0, 0), row
        overlaps = await self.owner.fetchval(
            """
            SELECT count(*) FROM indexer.fulfilment_claim a JOIN indexer.fulfilment_claim b USING (operation_id)
            WHERE a.id < b.id AND tstzrange(a.claimed_at, least(a.ended_at, a.claimed_until))
                               && tstzrange(b.claimed_at, least(b.ended_at, b.claimed_until))
            """
        )
        assert overlaps == 0
        assert (
            await self.owner.fetchval("SELECT count(*) FROM indexer.fulfilment_claim WHERE second_receipt IS NOT NULL")
            == 0
        )
        by = await self.owner.fetch("SELECT receipt ->> 'by' AS worker, count(*) AS n FROM indexer.receipt GROUP BY 1")
        claims = await self.owner.fetchval("SELECT count(*) FROM indexer.fulfilment_claim")
        return {"workers": len(by), "handed_twice": len(again), "killed": self.killed, "claims": claims}
