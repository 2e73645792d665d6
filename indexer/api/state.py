"""What the handlers share, under typed keys of the application."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from indexer.store.database import Database
from indexer.store.wakeups import Wakeups

if TYPE_CHECKING:
    from indexer.api.health import StatusSource

DATABASE: web.AppKey[Database] = web.AppKey("database", Database)
WAKEUPS: web.AppKey[Wakeups] = web.AppKey("wakeups", Wakeups)
STATUS: web.AppKey[StatusSource] = web.AppKey("status")
