"""`python -m tests.bench [names…] [--json] [--scale X]`: runs benchmarks one after the other and prints what they found.

Figures depend on the machine and on what else it does, which the report says. Where something was promised whatever the machine does,
and was not kept, it is named and the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
from typing import Any

import msgspec
import structlog
from rich.console import Console
from rich.table import Table

from tests.bench import backfill, following, partners, pull, reorganisations, settlement, webhooks, withholding, workers

BENCHES = {
    "backfill": backfill,
    "following": following,
    "withholding": withholding,
    "reorganisations": reorganisations,
    "settlement": settlement,
    "pull": pull,
    "webhooks": webhooks,
    "workers": workers,
    "partners": partners,
}


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHES)}; default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size, for a quick look")
    parser.add_argument("--no-fsync", action="store_true", help="backfill: with a PostgreSQL that may forget")
    parser.add_argument("--profile", metavar="FILE", help="backfill: cProfile's figures of the product's process")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(BENCHES):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    structlog.configure(
        logger_factory=structlog.PrintLoggerFactory(sys.stderr)
    )  # the product's log is no part of the report
    report: dict[str, Any] = {"machine": machine(), "scale": asked.scale}
    console = Console()
    if not asked.json:
        said = report["machine"]
        console.print(
            f"{said['cores']} cores, load {said['load']} before the start, Python {said['python']}, {said['system']}"
        )
    for name in asked.names or BENCHES:
        if name == "backfill":
            result = asyncio.run(backfill.run(asked.scale, durable=not asked.no_fsync, profile=asked.profile))
        else:
            result = asyncio.run(BENCHES[name].run(asked.scale))
        report[name] = result
        if not asked.json:
            show(console, name, BENCHES[name].table(result), BENCHES[name].NOTE)
    broken = [
        f"{name}: {why}"
        for name, bench in BENCHES.items()
        if name in report and hasattr(bench, "broken")
        for why in bench.broken(report[name])
    ]
    if asked.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n")
    if broken:
        sys.exit("\n".join(broken))


def show(console: Console, title: str, rows: list[tuple[str, ...]], note: str) -> None:
    table = Table(title=title, title_justify="left", caption=note, caption_justify="left")
    for place, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if place == 0 else "right")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
