"""The HTTP server as tests see it: real sockets on a real database, and a caller that checks what every answer must be."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import aiohttp
from aiohttp import web

from indexer.api.app import create_app, serve
from indexer.config import Http
from indexer.model.signal import Signal, operation_signal
from indexer.store import tokens
from indexer.store.database import Database
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics

ISSUER, FACTORY, HOLDER = "0x" + "15" * 20, "0x" + "fa" * 20, "0x" + "a1" * 20
LOYALTY_ID = "0x" + "1d" * 32


class Process:
    """What the daemon tells of itself."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.known: dict[str, object] = {"version": "0.1.0", "tasks": ["settle"]}

    def unready(self) -> Sequence[str]:
        return self.reasons

    def process(self) -> Mapping[str, object]:
        return self.known


class Api:
    """A running server and a caller with one token."""

    def __init__(
        self, base: str, session: aiohttp.ClientSession, process: Process, metrics: Metrics, app: web.Application
    ) -> None:
        self.base, self.session, self.process, self.metrics, self.app = base, session, process, metrics, app
        self.token: str | None = None
        self.stop: Callable[[], Awaitable[None]]  # as SIGTERM does; the caller stays

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        raw: bytes | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any, Mapping[str, str]]:
        bearer = token or self.token
        sent = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        if body is not None or raw is not None:
            sent["Content-Type"] = "application/json"
        async with self.session.request(
            method,
            self.base + path,
            data=raw if raw is not None else json.dumps(body) if body is not None else None,
            headers=sent | dict(headers or {}),
        ) as answer:
            text = await answer.text()
            if answer.status >= 400 and path != "/readyz":
                assert answer.content_type == "application/problem+json", text
                problem = json.loads(text)
                assert problem["status"] == answer.status and problem["type"].startswith("urn:loyalty:problem:")
                assert problem["title"] and problem["detail"]
                assert problem["requestId"] == answer.headers["X-Request-Id"]
            return answer.status, json.loads(text) if "json" in answer.content_type else text, answer.headers


@asynccontextmanager
async def running(database: Database, wakeups: Wakeups | None = None) -> AsyncIterator[Api]:
    """A server on a free port, until the body ends."""
    metrics, process = Metrics(), Process()
    app = create_app(database, metrics, process, wakeups or Wakeups())
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session, AsyncExitStack() as server:
        host, port = await server.enter_async_context(serve(app, Http(listen="127.0.0.1:0")))
        api = Api(f"http://{host}:{port}", session, process, metrics, app)
        api.stop = server.aclose
        yield api


async def populate(database: Database) -> str:
    """Brands bloom and rose, a chain with a factory, and a token that may do everything for everyone: returned."""
    async with database.pool.acquire() as conn:
        await conn.execute(
            """
            INSERT INTO indexer.brand (name) VALUES ('bloom'), ('rose');
            INSERT INTO indexer.issuer (address, brand) VALUES ('\\x1515151515151515151515151515151515151515', 'bloom'),
                                                               ('\\x1616161616161616161616161616161616161616', 'rose');
            INSERT INTO indexer.partner_account (brand, partner) VALUES ('bloom', 'keyban'), ('bloom', 'qiibee');
            INSERT INTO indexer.chain (chain_id, name, head_number, head_hash, head_time_ms, head_at)
            VALUES (8453, 'base', 9007199254740993, '\\x01', 1790000000200, clock_timestamp() + interval '1 day');
            INSERT INTO indexer.emitter (chain_id, address, kind, factory, start_block)
            VALUES (8453, '\\xfafafafafafafafafafafafafafafafafafafafa', 'factory', '\\xfafafafafafafafafafafafafafafafafafafafa', 1);
            INSERT INTO indexer.lease (task, holder, epoch, until)
            VALUES ('settle', gen_random_uuid(), 3, now() + interval '1 hour'), ('number', NULL, 1, NULL)
            """
        )
        everything, _ = await tokens.add(conn, "operator", None, tokens.SCOPES)
    return everything


async def token_for(database: Database, brand: str | None, *scopes: str) -> str:
    async with database.pool.acquire() as conn:
        return (await tokens.add(conn, "test", brand, scopes or tokens.SCOPES))[0]


def registration(reference: str = "redemption-8841", **changes: Any) -> dict[str, Any]:
    return {
        "brand": "bloom",
        "reference": reference,
        "requestedAt": "2026-11-21T11:00:00+01:00",
        "metadata": {"orderId": "8841", "exact": 1.10},
        "legs": [
            {
                "kind": "loyfin.redemption",
                "chainId": "8453",
                "issuer": ISSUER.upper().replace("0X", "0x"),
                "holder": HOLDER,
                "loyaltyId": LOYALTY_ID,
                "amount": "250",
                "nonce": "0x" + uuid4().hex * 2,
            }
        ],
        **changes,
    }


def told(brand: str, kind: str, nth: int, supersedes: UUID | None = None, note: str = "") -> Signal:
    """A signal as the reconciler makes one."""
    return operation_signal(
        kind=kind,
        operation_id=uuid4(),
        brand=brand,
        reference=f"order-{nth}",
        status="ready",
        generation=1,
        now_ms=1_790_000_000_000 + nth,
        causes=[nth],
        legs=[{"kind": "loyfin.redemption", "match": "nonce", "amount": "250"}],
        metadata={"orderId": nth, "note": note},
        evidence=[],
        supersedes=supersedes,
    )
