"""Fixtures of the acceptance ring: a chain that several tests of one worker share, and a world of a test's own on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from indexer.store.database import Database
from tests.acceptance.world import Ledger, World


@pytest.fixture(scope="session")
async def ledger() -> AsyncIterator[Ledger]:
    """For tests that reorganise nothing. It has a burst factory beside Loyfin's."""
    async with Ledger.running(with_burst=True, relayers=80) as running:
        yield running


@pytest.fixture
async def world(ledger: Ledger, database: Database, tmp_path: Path) -> AsyncIterator[World]:
    async with World.of(ledger, database, tmp_path) as own:
        yield own
