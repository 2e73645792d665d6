"""A shop behind a gateway that answers pages: what a status says counts, what the page says does not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web
from structlog.testing import capture_logs

from indexer.store.database import Database
from tests.fake_node import FakeNode
from tests.following import created, eventually, issued
from tests.simulation.world import World


@dataclass
class Shop:
    """A brand's endpoint that answers HTML, with the statuses of its script; 200 when that is through."""

    statuses: list[int]
    url: str = ""

    def __post_init__(self) -> None:
        self.ids: list[str] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.ids.append(request.headers["webhook-id"])
        status = self.statuses.pop(0) if self.statuses else 200
        return web.Response(
            status=status, text=f"<html><body>{'we are down ' * 10_000}</body></html>", content_type="text/html"
        )

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Shop]:
        app = web.Application()
        app.router.add_post("/", self.answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
            yield self
        finally:
            await runner.cleanup()


async def test_a_webhook_that_answers_html(database: Database) -> None:
    """An error's page is a failure and is tried again; a page with 200 is an acknowledgement."""
    async with FakeNode() as node, Shop([502, 404]).open() as shop:
        world = World(database, node, confidence="included")
        node.mine([created(1)], 2)
        webhook = {"name": "shop", "url": shop.url, "events": ["operation.ready"]}
        with capture_logs() as logs:
            async with world.running(webhooks=[webhook]):
                await world.caught_up()
                await world.register(1)
                node.mine([issued(1)])

                async def delivered() -> bool:
                    row = await database.pool.fetchrow("SELECT state, attempts, status FROM indexer.delivery")
                    return row is not None and tuple(row) == ("delivered", 3, 200)

                await eventually(delivered)
                assert world.sample("deliveries_total", brand="bloom", webhook="shop", outcome="delivered") == 1
                assert world.sample("deliveries_total", brand="bloom", webhook="shop", outcome="failed") == 2
        assert len(shop.ids) == 3 and len(set(shop.ids)) == 1
        told = [entry for entry in logs if entry["event"] == "delivery_failed"]
        assert [(entry["attempt"], entry["reason"], entry["webhook"]) for entry in told] == [
            (1, "HTTP 502", "shop"),
            (2, "HTTP 404", "shop"),
        ]
        assert "we are down" not in str(logs)
