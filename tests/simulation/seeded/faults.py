"""The seeded lies and failures of nodes, by the names of the catalogue."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fake_node import FakeNode
    from tests.simulation.seeded.world import World

ENDPOINTS = 1
GRACE = 60.0  # seconds within which the truth must have held what was told


def remember(world: World, error: BaseException) -> None:
    world.struck[f"serve failed: {type(error).__name__}"] += 1


async def sicken(world: World, node: FakeNode, until: float) -> None:
    rng = random.Random(f"node {world.seed} {node.port}")
    while world.loop.now < until:
        await asyncio.sleep(rng.expovariate(1 / 4.0))
