"""Who a chain is, and when its blocks are due: genesis and schedule, read from the chain itself at start.

Promises that a chain followed today is the one that was followed yesterday, and that millisecond times are used only where
the chain itself shows that it keeps to them. Base's schedule goes by chain id *and* genesis hash: an Anvil with Base's
chain id has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from indexer.chain.integrity import Count, verify_header
from indexer.chain.rpc import Rpc
from indexer.chain.rpc_errors import MethodMissing, PrunedHistory, UnknownBlock
from indexer.model.types import Hash32, Header, Schedule, hash32, hex0x

# facts/base.md, section 1. The first fast (Denim) block is inferred there: it is read from the chain, ± SLACK.
BASE: Mapping[tuple[int, Hash32], Schedule] = {
    (8453, hash32("0xf712aa9241cc24369b143cf6dce85f0902a9731e70d66818a3a5845b296c73dd")): Schedule(
        1686789347, 53_556_127
    ),
    (84532, hash32("0x0dcc9e089e30b90ddfc55be9a37dd15bc551aeee999d2e2b51414c54eaf934e4")): Schedule(
        1695768288, 48_418_656
    ),
}
SLACK = 1


class WrongChain(Exception):
    """The endpoint serves another chain than the configuration, or our database, says. Not to be retried."""

    explains_itself: ClassVar[bool] = True


class ScheduleMismatch(Exception):
    """The chain does not keep the schedule that this version knows for it. Not to be retried."""

    explains_itself: ClassVar[bool] = True


async def check_chain_id(rpc: Rpc, name: str, chain_id: int) -> None:
    """Raises WrongChain. Asked at every start and after each outage: an endpoint may come back as another (F76)."""
    found = await rpc.chain_id()
    if found != chain_id:
        raise WrongChain(
            f"chain {name!r} is configured with chain_id {chain_id}, but {rpc.name} serves chain {found}: "
            "correct chain_id or the rpc url"
        )


async def check_genesis(rpc: Rpc, name: str, known: Hash32 | None) -> Hash32 | None:
    """The genesis hash; None where the endpoint has pruned block 0 (Base's own public one has). Raises WrongChain."""
    try:
        found = await rpc.genesis_hash()
    except (PrunedHistory, UnknownBlock):
        return known
    if known is not None and found != known:
        raise WrongChain(
            f"chain {name!r}: block 0 of {rpc.name} is {hex0x(found)}, in our database it is {hex0x(known)}: another chain "
            "under the same id (a devnet that was reset?); use another database, or the right endpoint"
        )
    return found


async def discover(
    rpc: Rpc,
    chain_id: int,
    genesis: Hash32 | None,
    known: Mapping[tuple[int, Hash32], Schedule] = BASE,
    count: Count | None = None,
) -> Schedule | None:
    """The schedule of the chain, its first fast block as the chain shows it; None for a chain that has none.

    Raises ScheduleMismatch when the chain is a known one and disagrees.
    """
    if genesis is not None:
        stated = known.get((chain_id, genesis))
    else:  # block 0 is pruned: what the newest header shows decides
        stated = next((schedule for (chain, _), schedule in known.items() if chain == chain_id), None)
    if stated is None:
        return None
    raw = await rpc.header("latest")
    if raw is None:
        raise UnknownBlock(
            "it knows no latest block", endpoint=rpc.name, method="eth_getBlockByNumber", params="latest"
        )
    latest = verify_header(raw, None, count=count)
    candidates = [Schedule(stated.l2_time, stated.first_fast_block + d) for d in range(-SLACK, SLACK + 1)]
    around = await _around(rpc, stated.first_fast_block, latest, count)
    fitting = [schedule for schedule in candidates if _fits(schedule, [*around, latest])]
    if latest.number < stated.first_fast_block - SLACK and stated in fitting:
        return stated  # the switch is still ahead: nothing to read yet
    if len(fitting) == 1:
        return fitting[0]
    if genesis is None and not fitting:
        return None
    raise ScheduleMismatch(
        f"chain {chain_id} does not keep the schedule that this version knows: blocks every 2 s from {stated.l2_time}, every "
        f"200 ms from block {stated.first_fast_block} ± {SLACK}; {rpc.name} shows block {latest.number} at {latest.time_s} s "
        f"({'no block' if not fitting else 'more than one'} fits). Either the endpoint is not the chain it says, or a newer "
        "version of the indexer is needed"
    )


async def _around(rpc: Rpc, first_fast: int, latest: Header, count: Count | None) -> list[Header]:
    """Headers on both sides of the switch, as far as the endpoint still has them."""
    numbers = [n for n in range(first_fast - SLACK - 1, first_fast + SLACK + 2) if n <= latest.number]
    if not numbers:
        return []
    try:
        answers = await rpc.headers(numbers)
    except (PrunedHistory, UnknownBlock, MethodMissing):
        return []
    return [
        verify_header(raw, None, asked, count=count)
        for raw, asked in zip(answers, numbers, strict=True)
        if raw is not None
    ]


def _fits(schedule: Schedule, headers: Sequence[Header]) -> bool:
    return all(schedule.time_ms(header.number) // 1000 == header.time_s for header in headers)
