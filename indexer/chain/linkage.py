"""How blocks hang together: the named errors that steer following, and the way back to the common ancestor.

Promises that an ancestor is a block which we hold and the node's branch contains, found in bounded memory at any depth,
and that a branch which leaves ours below our finalized block is a violation, never a rollback. What to do about either is
the follower's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from indexer.chain.integrity import Count, verify_header
from indexer.chain.rpc import Rpc
from indexer.model.types import BlockRef, Header, Schedule, hex0x

WALK = 64  # steps back by hash before it is quicker to search by number


class Reorganised(Exception):
    """The node's chain left ours after `ancestor`: the last block that both hold."""

    def __init__(self, ancestor: BlockRef) -> None:
        super().__init__(f"reorganised above block {ancestor.number} {hex0x(ancestor.hash)}")
        self.ancestor = ancestor


class Unsettled(Exception):
    """Answers that do not fit each other or what we hold: as in the middle of a reorganisation. Discarded, asked again."""

    explains_itself: ClassVar[bool] = True


class FinalityViolation(Exception):
    """The node's chain left ours below our finalized block. `ours` and `theirs` are the two sides at one height, `holders` and
    `against` the endpoints that show them."""

    explains_itself: ClassVar[bool] = True

    def __init__(
        self,
        chain: str,
        endpoint: str,
        ours: BlockRef,
        theirs: BlockRef,
        holders: Sequence[str] = (),
        against: Sequence[str] = (),
    ) -> None:
        super().__init__(
            f"finality violation on {chain}: we hold block {ours.number} {hex0x(ours.hash)} as finalized, {endpoint} shows "
            f"block {theirs.number} {hex0x(theirs.hash)}. Signals of this chain are stopped. Find out which side is right, then: indexer resume {chain} "
            "--keep-ours | --accept-chain"
        )
        self.ours, self.theirs = ours, theirs
        self.holders, self.against = list(holders), list(against) or [endpoint]


@dataclass(frozen=True, slots=True)
class Held:
    """What we hold of the chain, down to the floor (the finalized block, or the first one held)."""

    chain: str
    schedule: Schedule | None
    floor: BlockRef
    at: Callable[[int], Awaitable[BlockRef | None]]  # exactly this height
    at_or_below: Callable[[int], Awaitable[BlockRef | None]]
    count: Count | None = None


async def ancestor_of(header: Header, held: Held, rpc: Rpc) -> BlockRef:
    """Walks back by hash from a header that does not link; from WALK steps on searches by number.

    Raises Unsettled (the node does not know a parent, yet or any more), FinalityViolation.
    """
    number, parent = header.number - 1, header.parent_hash
    for _ in range(WALK):
        if number <= held.floor.number:
            if number == held.floor.number and parent == held.floor.hash:
                return held.floor
            raise FinalityViolation(held.chain, rpc.name, held.floor, BlockRef(number, parent))
        ours = await held.at(number)
        if ours is not None and ours.hash == parent:
            return ours
        raw = await rpc.header(parent)
        if raw is None:
            raise Unsettled(
                f"{rpc.name} does not know block {number} {hex0x(parent)}, the parent of one that it announced"
            )
        parent = verify_header(raw, held.schedule, parent, count=held.count).parent_hash
        number -= 1
    return await ancestor_below(number, held, rpc)


async def ancestor_below(conflict: int, held: Held, rpc: Rpc) -> BlockRef:
    """Searches by number for the highest block at or below `conflict` that we and the node both hold.

    Equal hashes at a height mean equality below it, so halving finds it: 18 requests for the sequencing window's 216,000
    blocks. The caller knows that the node's block at `conflict` is not ours.
    """
    best = held.floor
    theirs = await _on_node(best.number, held, rpc)
    if theirs != best:
        raise FinalityViolation(held.chain, rpc.name, best, theirs)
    bottom, top = best.number, conflict - 1  # what we hold up to `bottom` is common, what we hold above `top` is not
    while bottom < top:
        middle = (bottom + top + 1) // 2
        ours = await held.at_or_below(middle)
        if ours is None or ours.number <= bottom:
            bottom = middle  # when polling, not every height is held
        elif await _on_node(ours.number, held, rpc) == ours:
            best, bottom = ours, middle
        else:
            top = ours.number - 1
    return best


async def _on_node(number: int, held: Held, rpc: Rpc) -> BlockRef:
    raw = await rpc.header(number)
    if raw is None:
        # one that shows a higher block has this one: another replica answered
        raise Unsettled(f"{rpc.name} shows a block above {number}, and does not know block {number}")
    return verify_header(raw, held.schedule, number, count=held.count).ref
