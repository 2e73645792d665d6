"""One chain of the configuration at work in this process: its endpoints, its socket, its decoder, and its tasks.

Following and filling history run under leases of their own and meet in the store. They share the pool of endpoints, and each
asks the one of them that suits it best.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol
from uuid import UUID

from indexer.chain.attesting import attest
from indexer.chain.backfill import carry_out, fill_history
from indexer.chain.decode import Decoder
from indexer.chain.follower import follow
from indexer.chain.heads import HeadStream
from indexer.chain.integrity import Outcome
from indexer.chain.lookups import answer_lookups
from indexer.chain.pool import CountOf, Node, Pool
from indexer.chain.reading import Task
from indexer.chain.rpc import Rpc
from indexer.chain.transport import Observe
from indexer.chain.witnesses import watched
from indexer.config import Chain
from indexer.store.leases import Lease
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics


class Progress(Protocol):
    """Hears how far history is: blocks done and to do in this run, and events found."""

    def __call__(self, chain: str, done: int, total: int, events: int) -> None: ...


def counting_requests(metrics: Metrics) -> Observe:
    """What an endpoint's client tells of, counted."""

    def observe(name: str, method: str, outcome: str, seconds: float | None) -> None:
        if seconds is not None:
            metrics.rpc_requests.labels(name, method).inc()
            metrics.rpc_seconds.labels(name).observe(seconds)
        if outcome != "ok":
            metrics.rpc_errors.labels(name, outcome).inc()

    return observe


def counting_checks(metrics: Metrics) -> CountOf:
    """What the checks of answers tell of, counted."""

    def count(endpoint: str, check: str, outcome: Outcome) -> None:
        metrics.checks.labels(check, outcome.value, endpoint).inc()
        if outcome is Outcome.FAIL:
            metrics.rpc_lies.labels(endpoint, check).inc()

    return count


class ChainRuntime:
    """Made by `open`; `follow` and `fill_history` are bodies for the supervisor."""

    def __init__(self, chain: Chain, pool: Pool, metrics: Metrics, wakeups: Wakeups, progress: Progress | None) -> None:
        self.chain_id = chain.chain_id
        self._chain, self._pool, self._metrics, self._wakeups, self._progress = chain, pool, metrics, wakeups, progress
        self._decoder = Decoder.from_abi(inferred=chain.inferred_events)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, chain: Chain, metrics: Metrics, wakeups: Wakeups, rng: random.Random, progress: Progress | None = None
    ) -> AsyncIterator[ChainRuntime]:
        async with AsyncExitStack() as stack:
            nodes = []
            for place, (name, endpoint) in enumerate(zip(chain.endpoint_names, chain.rpc, strict=True)):
                rpc = Rpc(
                    endpoint.url,
                    name=name,
                    requests_per_second=endpoint.requests_per_second,
                    rng=rng,
                    observe=counting_requests(metrics),
                )
                nodes.append(Node(await stack.enter_async_context(rpc), chain.role_of(place), place))
            pool = Pool(
                chain.name,
                chain.chain_id,
                nodes,
                quorum=chain.quorum,
                count=counting_checks(metrics),
                metrics=metrics,
                observe=chain.integrity == "observe",
            )
            await stack.enter_async_context(watched(pool, chain.tags_seconds))
            yield cls(chain, pool, metrics, wakeups, progress)

    async def follow(self, lease: Lease) -> None:
        heads = self._heads if self._chain.websocket else None
        await follow(
            self._chain,
            self._pool.source("head"),
            heads,
            lease,
            self._wakeups,
            self._decoder,
            metrics=self._metrics,
        )

    async def fill_history(self, lease: Lease) -> None:
        await fill_history(
            self._chain,
            self._pool.source("history"),
            lease,
            self._wakeups,
            self._decoder,
            metrics=self._metrics,
            progress=self._progress,
        )

    @property
    def fingerprint(self) -> bytes:
        """Of the events that are read: `Decoder.fingerprint`."""
        return self._decoder.fingerprint

    async def reread(self, lease: Lease, request: UUID) -> None:
        """What was asked for in table `reread`, until this request is over. Raises WrongChain, LeaseLost."""
        source = self._pool.source("history")
        await carry_out(Task(self._chain, source, lease, self._wakeups, self._decoder, self._metrics), request)

    async def attest(self, lease: Lease) -> None:
        """Who holds the blocks of claimed events, and what their receipts prove."""
        source = self._pool.source("head")
        await attest(Task(self._chain, source, lease, self._wakeups, self._decoder, self._metrics))

    async def answer_lookups(self, lease: Lease) -> None:
        await answer_lookups(
            self._chain.name,
            self.chain_id,
            self._pool.source("head"),
            lease,
            self._wakeups,
            metrics=self._metrics,
        )

    def _heads(self) -> HeadStream:
        assert self._chain.websocket is not None
        return HeadStream(self._chain.websocket, silent_seconds=self._chain.silent_seconds)
