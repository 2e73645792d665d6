"""What a query runs on: a session of one's own, or one that the pool lends. asyncpg gives them one interface, two types."""

from __future__ import annotations

from typing import TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionProxy

Connection: TypeAlias = asyncpg.Connection | PoolConnectionProxy
