"""The daemon as a process: what it says to systemd, how it stops, how it ends, and what one broken loop does to the others."""

from __future__ import annotations

import pytest

from tests.acceptance.world import World

pytestmark = [pytest.mark.acceptance, pytest.mark.xdist_group("acceptance"), pytest.mark.timeout(180)]


async def test_first(world: World) -> None:
    import time
    t = time.monotonic()
    await world.start()
    got = await world.settles("one")
    print("ready", time.monotonic() - t)
    got = await world.settles("two", 250)
    print("ready", time.monotonic() - t, got)
