"""What the endpoints of a pool agree on: the heights of the tags, the block at a height, and who stands apart.

Promises that with two or more endpoints nothing is agreed that one of them says alone, that an endpoint without a vote (failing,
stuck, in quarantine) is not counted, and that one which has not come so far holds nothing there. Looks are taken in the background, one
loop an endpoint, so that one which hangs holds up nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, Literal

import structlog

from indexer.chain.integrity import Lie, verify_header
from indexer.chain.pool import Node, Pool, Seen
from indexer.chain.rpc_errors import RpcError
from indexer.chain.schedule import WrongChain
from indexer.model.types import BlockRef, Hash32, Header, hex0x

log = structlog.get_logger(__name__)

ASK_SECONDS: Final = 3.0  # for one question beside the looks: who does not answer in time holds nothing
STRIKES: Final = 3  # looks in a row at which an endpoint stood apart from an agreed block, before it is put aside


@asynccontextmanager
async def watched(pool: Pool, seconds: float) -> AsyncIterator[None]:
    """Looks at every endpoint, so often, for as long as the body runs. With one endpoint there is nothing to compare."""
    if not pool.several:
        yield
        return
    looks = [asyncio.create_task(_watch(pool, node, seconds), name=f"look at {node.name}") for node in pool.nodes]
    try:
        yield
    finally:
        for look in looks:
            look.cancel()
        await asyncio.gather(*looks, return_exceptions=True)


async def _watch(pool: Pool, node: Node, seconds: float) -> None:
    node.advanced_at = asyncio.get_running_loop().time()
    while True:
        if pool.usable(node):
            try:
                await pool.identify(node)
                await look(pool, node)
                node.trouble = None
                pool.compare(node)
            except WrongChain as wrong:
                pool.quarantine(node, "wrong_chain", str(wrong))
                node.trouble = str(wrong)
            except (RpcError, Lie) as error:
                node.identified, node.trouble = False, str(error)
        await asyncio.sleep(seconds)


async def look(pool: Pool, node: Node) -> None:
    """One look at an endpoint: its heads, and what it has where we hold a block. Raises RpcError, Lie."""
    begun = asyncio.get_running_loop().time()
    count = pool.counting(node.name)
    latest, safe, finalized = (
        None if each is None else verify_header(each, pool.schedule, count=count) for each in await node.rpc.heads()
    )
    if latest is None:
        raise Lie("header_sealed", "it knows no latest block")
    node.reported(latest.number, asyncio.get_running_loop().time())
    pool.tagged(node, "safe", safe)
    pool.tagged(node, "finalized", finalized)
    ours = pool.ours(latest.number)  # as high as it goes: what enough endpoints hold is what `confirmed` counts by
    there: Header | None = latest
    if ours is not None and ours.number != latest.number:
        raw = await node.rpc.header(ours.number)
        there = None if raw is None else verify_header(raw, pool.schedule, ours.number, count=count)
    seen = Seen(latest, safe, finalized, ours, None if there is None else there.hash)
    # what we held when we asked may have been undone since
    still = ours is not None and pool.ours(ours.number) == ours
    node.strikes = node.strikes + 1 if seen.apart and still else 0
    node.seen, node.looked_at = seen, begun


def voters(pool: Pool) -> list[Node]:
    return [node for node in pool.nodes if pool.live(node)]


# --------------------------------------------------------------------- one height


async def shown(pool: Pool, number: int, among: Sequence[Node] | None = None) -> dict[Hash32, list[Node]]:
    """What the endpoints that have a vote show at a height; those that have not come so far, or fail, are left out."""
    nodes = voters(pool) if among is None else list(among)
    hashes = await asyncio.gather(*(_hash_at(pool, node, number) for node in nodes))
    found: dict[Hash32, list[Node]] = {}
    for node, there in zip(nodes, hashes, strict=True):
        if there is not None:
            found.setdefault(there, []).append(node)
    return found


async def _hash_at(pool: Pool, node: Node, number: int) -> Hash32 | None:
    with suppress(RpcError, Lie, TimeoutError):
        async with asyncio.timeout(ASK_SECONDS):
            # by its number at once: whoever has not come so far answers null, and no other block (facts/rpc_errors.md, section 4)
            raw = await node.rpc.header(number)
            if raw is not None:
                header = verify_header(raw, pool.schedule, number, count=pool.counting(node.name))
                node.reported(max(number, node.head), asyncio.get_running_loop().time())
                return header.hash
    return None


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the endpoints stand to a block of ours: who holds it, and who holds which other one."""

    ours: BlockRef
    holders: list[Node]
    theirs: BlockRef | None  # the other block that most show
    against: list[Node]
    quorum: int

    @property
    def undone(self) -> bool:
        """Enough hold the other branch."""
        return len(self.against) >= self.quorum

    @property
    def stands(self) -> bool:
        return len(self.holders) >= self.quorum


async def judge(pool: Pool, ours: BlockRef) -> Verdict:
    """What the endpoints say of a block that we hold."""
    found = await shown(pool, ours.number)
    holders = found.pop(ours.hash, [])
    other = max(found, key=lambda block_hash: len(found[block_hash]), default=None)
    return Verdict(
        ours,
        holders,
        None if other is None else BlockRef(ours.number, other),
        [] if other is None else found[other],
        pool.quorum,
    )


# --------------------------------------------------------------------- tags


async def agreed(pool: Pool, tag: Literal["safe", "finalized"]) -> Header | None:
    """The highest block that enough endpoints hold, all of whom call it (or one above it) by this tag. Who calls a block so that is above
    its own head has no vote: it does not hold it."""
    of: Callable[[Seen], Header | None] = (lambda seen: seen.safe) if tag == "safe" else (lambda seen: seen.finalized)
    votes = [
        (node, header)
        for node in voters(pool)
        if node.seen is not None and (header := of(node.seen)) is not None and header.number <= node.seen.latest.number
    ]
    votes.sort(key=lambda vote: -vote[1].number)
    for place in range(pool.quorum - 1, len(votes)):
        candidate = votes[place][1]
        same = [node for node, header in votes if header.hash == candidate.hash]
        above = [node for node, header in votes if header.number > candidate.number]
        if len(same) < pool.quorum:
            same += (await shown(pool, candidate.number, above)).get(candidate.hash, [])
        if len(same) >= pool.quorum:
            return candidate
    return None


# --------------------------------------------------------------------- the latest looks, together


@dataclass(frozen=True, slots=True)
class Agreement:
    """Where the endpoints stand by their latest looks: the highest block of ours that enough hold, None where too few do."""

    height: int | None
    holders: list[Node]
    apart: list[Node]


def agreement(pool: Pool) -> Agreement:
    """Pure arithmetic on the last looks; puts aside whoever stood apart from an agreed chain for several looks."""
    # a block that was undone since it was looked at says nothing of those that took its place
    live = [
        node
        for node in voters(pool)
        if node.seen is not None and node.seen.ours is not None and pool.ours(node.seen.ours.number) == node.seen.ours
    ]
    holders = [node for node in live if node.seen is not None and node.seen.holds]
    apart = [node for node in live if node.seen is not None and node.seen.apart]
    heights = sorted((node.seen.ours.number for node in holders if node.seen and node.seen.ours), reverse=True)
    height = heights[pool.quorum - 1] if len(heights) >= pool.quorum else None
    if height is not None:
        for node in apart:
            # above it our branch is the word of fewer: it may be that one which is right
            if node.strikes >= STRIKES and node.seen and node.seen.ours and node.seen.ours.number <= height:
                ours, theirs = node.seen.ours, node.seen.shows
                others = ", ".join(each.name for each in holders)
                pool.quarantine(
                    node,
                    "fork",
                    f"it shows block {ours.number} as {'none' if theirs is None else hex0x(theirs)}; "
                    f"{others} hold {hex0x(ours.hash)}",
                )
    return Agreement(height, holders, apart)
