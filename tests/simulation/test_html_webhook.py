"""A shop behind a gateway that answers pages: what a status says counts, what the page says does not."""

from __future__ import annotations

from aiohttp import web
from structlog.testing import capture_logs

from indexer.store.database import Database
from tests.fake_node import FakeNode
from tests.following import created, eventually, issued
from tests.receiver import Received, Receiver
from tests.simulation.world import World


async def test_a_webhook_that_answers_html(database: Database) -> None:
    """An error's page is a failure and is tried again; a page with 200 is an acknowledgement."""
    statuses = iter([502, 404])

    async def page(_: Received) -> web.Response:
        text = f"<html><body>{'we are down ' * 10_000}</body></html>"
        return web.Response(status=next(statuses, 200), text=text, content_type="text/html")

    async with FakeNode() as node, Receiver(page).open() as shop:
        world = World(database, node, confidence="included")
        node.mine([created(1)], 2)
        webhook = {"name": "shop", "url": f"{shop.url}/", "events": ["operation.ready"]}
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
        assert len(shop.requests) == 3 and len({request.id for request in shop.requests}) == 1
        told = [entry for entry in logs if entry["event"] == "delivery_failed"]
        assert [(entry["attempt"], entry["reason"], entry["webhook"]) for entry in told] == [
            (1, "HTTP 502", "shop"),
            (2, "HTTP 404", "shop"),
        ]
        assert "we are down" not in str(logs)
