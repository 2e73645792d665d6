"""`indexer config check --online`: the endpoints of a configuration, tried before a daemon relies on them."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from indexer.config import Chain, Config


def try_endpoints(config: Config) -> list[dict[str, Any]]:
    """For each chain what its endpoints showed, as JSON values; `problems` empty where all is well."""
    return asyncio.run(_try(config.chains))


async def _try(configured: tuple[Chain, ...]) -> list[dict[str, Any]]:
    from indexer.chain.decode import Decoder  # the other commands need no chain
    from indexer.chain.probe import probe

    probes = await asyncio.gather(
        *(probe(chain, Decoder.from_abi(inferred=chain.inferred_events)) for chain in configured)
    )
    return [asdict(each) | {"problems": each.problems} for each in probes]


def problems_of(chains: list[dict[str, Any]]) -> list[str]:
    return [f"{chain['chain']}: {problem}" for chain in chains for problem in chain["problems"]]


def online_text(chains: list[dict[str, Any]]) -> str:
    """What was seen, endpoint by endpoint, what it costs, and what is wrong."""
    lines: list[str] = []
    for chain in chains:
        lines.append(f"chain {chain['chain']}")
        for seen in chain["endpoints"]:
            age = "" if seen["head_age_seconds"] is None else f", {seen['head_age_seconds']:.0f} s old"
            lines += [
                f"  {seen['endpoint']}",
                f"    chain id   {_shown(seen['chain_id'])}, genesis {_shown(seen['genesis'])}",
                f"    head       {_shown(seen['head'])}{age}; safe {_shown(seen['safe'])}, finalized {_shown(seen['finalized'])}",
                f"    answers    receipts {_shown(seen['receipts'])}, batches {_shown(seen['batches'])}, "
                f"logs of {_shown(seen['largest_span'])} blocks at once",
            ]
            if len(chain["endpoints"]) > 1 and seen["calls_per_day"]:
                lines.append(f"    calls      a day, about: {_by_mode(seen['calls_per_day'])}")
            lines += [f"    remark     {remark}" for remark in seen["remarks"]]
        if (socket := chain["websocket"]) is not None:
            first = socket["first_head_seconds"]
            lines.append(
                f"  websocket {socket['endpoint']}: {'no head' if first is None else f'a head after {first} s'}"
            )
        pace = chain["seconds_per_block"]
        if pace is not None:
            lines.append(f"  a block every {pace:.2g} s")
        lines.append(f"  calls a day, about: {_by_mode(chain['calls_per_day'])}")
        if chain["history_calls"] is not None:
            lines.append(f"  calls for history, once, about: {chain['history_calls']:,}")
        lines += [f"  PROBLEM: {problem}" for problem in chain["problems"]]
    return "\n".join(lines)


def _by_mode(calls: dict[str, int]) -> str:
    return ", ".join(f"{mode} {number:,}" for mode, number in calls.items())


def _shown(value: str | int | bool | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)
