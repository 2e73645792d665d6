"""History from a fast local node: the product beside the plain web3 script, on one node and one PostgreSQL.

Both run alone, one after the other, in processes of their own, so processor time and memory are theirs; the node's and
PostgreSQL's are told apart from them.
"""

from __future__ import annotations

import time
from typing import Any

from tests.bench import ours, yardstick
from tests.bench.history import Shape
from tests.bench.measure import Server, alone, machine_cpu, node, postgres, tree_cpu

SAMPLE_BLOCKS = 3_000  # what the yardstick reads; it is too slow for the whole
NOTE = (
    f"The script read a sample of {SAMPLE_BLOCKS:,} blocks; its figures per 100,000 events are extrapolated from it. Where other "
    "programs keep cores busy, events per second of both sides are too low, and their ratio with them."
)


async def run(scale: float, *, durable: bool = True, profile: str | None = None, beside: bool = True) -> dict[str, Any]:
    """The figures of both sides and their ratios. Events are counted in the tables at the end."""
    shape = Shape(blocks=max(1_000, round(100_000 * scale)))
    sample = Shape(blocks=min(shape.blocks, SAMPLE_BLOCKS))
    async with postgres(durable=durable) as server, node(shape) as source:

        async def side(module: str, task: object) -> dict[str, Any]:
            source.calls()
            servers, nodes, all_of_us, began = server.cpu(), tree_cpu(source.pid), machine_cpu(), time.perf_counter()
            figures = await alone(module, task)
            wall, worked = time.perf_counter() - began, machine_cpu() - all_of_us
            figures["postgres_cpu"], figures["node_cpu"] = server.cpu() - servers, tree_cpu(source.pid) - nodes
            ours_alone = figures["whole_cpu"] + figures["postgres_cpu"] + figures["node_cpu"]
            figures["busy_elsewhere"] = max(0.0, worked - ours_alone) / wall
            figures["calls"] = source.calls()
            return _per(figures)

        # the script first: its sample leaves PostgreSQL no work behind, while much was stored after the product's turn
        plain = await _yardstick(side, source.url, server, sample) if beside else None
        product = await side("tests.bench.ours", ours.Task(source.url, server.url, shape, profile))
        result: dict[str, Any] = {"blocks": shape.blocks, "durable": durable, "product": product}
        if plain is not None:
            result |= {"yardstick": plain, "ratios": _ratios(product, plain)}
    return result


async def _yardstick(side: Any, url: str, server: Server, sample: Shape) -> dict[str, Any]:
    figures: dict[str, Any] = await side("tests.bench.yardstick", yardstick.Task(url, server.owner_url, sample.blocks))
    figures["sample"] = True
    return figures


def _per(figures: dict[str, Any]) -> dict[str, Any]:
    events = figures["events"]
    share = 100_000 / events
    return {
        "events": events,
        "seconds": round(figures["seconds"], 3),
        "events_per_second": round(events / figures["seconds"]),
        "cpu_seconds_per_100k": round(figures["cpu"] * share, 2),
        "postgres_cpu_seconds_per_100k": round(figures["postgres_cpu"] * share, 2),
        "node_cpu_seconds_per_100k": round(figures["node_cpu"] * share, 2),
        "peak_mb": round(figures["peak_mb"]),
        "cores_busy_elsewhere": round(figures["busy_elsewhere"], 1),
        **({"idle_mb": round(figures["idle_mb"])} if "idle_mb" in figures else {}),
        "calls": sum(figures["calls"].values()),
        "calls_by_method": figures["calls"],
        "calls_per_100k": round(sum(figures["calls"].values()) * share),
    }


def _ratios(product: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    return {
        "events_per_second": round(product["events_per_second"] / plain["events_per_second"], 1),
        "cpu": round(plain["cpu_seconds_per_100k"] / product["cpu_seconds_per_100k"], 1),
        "cpu_with_postgres": round(_both(plain) / _both(product), 1),
        "calls": round(plain["calls_per_100k"] / max(1, product["calls_per_100k"]), 1),
    }


def _both(figures: dict[str, Any]) -> float:
    return float(figures["cpu_seconds_per_100k"] + figures["postgres_cpu_seconds_per_100k"])


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of text for people."""
    product, plain, ratios = result["product"], result.get("yardstick"), result.get("ratios")
    rows: list[tuple[str, ...]] = [("", "product", "web3 script", "ratio")]

    def row(title: str, key: str, ratio: str | None = None) -> None:
        of_plain = f"{plain[key]:,}" if plain and key in plain else "-"
        of_ratio = f"{ratios[ratio]:g}×" if ratio and ratios else ""
        rows.append((title, f"{product[key]:,}", of_plain, of_ratio))

    row("events read", "events")
    row("events per second", "events_per_second", "events_per_second")
    row("CPU s per 100,000 events, own process", "cpu_seconds_per_100k", "cpu")
    row("CPU s per 100,000 events, PostgreSQL", "postgres_cpu_seconds_per_100k")
    rows.append(("CPU, both together", "", "", f"{ratios['cpu_with_postgres']:g}×" if ratios else ""))
    row("peak memory, MB", "peak_mb")
    row("calls per 100,000 events", "calls_per_100k", "calls")
    row("cores that other programs kept busy", "cores_busy_elsewhere")
    return rows
