"""One chain of the configuration at work in this process: its endpoint, its socket, its decoder, and its two tasks.

Following and filling history run under leases of their own and meet in the store. With several endpoints configured the
first serves; the others wait for the pool that compares them.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol
from uuid import UUID

from indexer.chain.backfill import carry_out, fill_history
from indexer.chain.decode import Decoder
from indexer.chain.follower import follow
from indexer.chain.heads import HeadStream
from indexer.chain.integrity import Outcome
from indexer.chain.lookups import answer_lookups
from indexer.chain.reading import Task
from indexer.chain.rpc import Rpc
from indexer.config import Chain
from indexer.store.leases import Lease
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics


class Progress(Protocol):
    """Hears how far history is: blocks done and to do in this run, and events found."""

    def __call__(self, chain: str, done: int, total: int, events: int) -> None: ...


class ChainRuntime:
    """Made by `open`; `follow` and `fill_history` are bodies for the supervisor."""

    def __init__(self, chain: Chain, rpc: Rpc, metrics: Metrics, wakeups: Wakeups, progress: Progress | None) -> None:
        self.chain_id = chain.chain_id
        self._chain, self._rpc, self._metrics, self._wakeups, self._progress = chain, rpc, metrics, wakeups, progress
        self._decoder = Decoder.from_abi(inferred=chain.inferred_events)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, chain: Chain, metrics: Metrics, wakeups: Wakeups, rng: random.Random, progress: Progress | None = None
    ) -> AsyncIterator[ChainRuntime]:
        endpoint = chain.rpc[0]

        def observe(name: str, method: str, outcome: str, seconds: float) -> None:
            metrics.rpc_requests.labels(name, method).inc()
            metrics.rpc_seconds.labels(name).observe(seconds)
            if outcome != "ok":
                metrics.rpc_errors.labels(name, outcome).inc()

        async with Rpc(endpoint.url, requests_per_second=endpoint.requests_per_second, rng=rng, observe=observe) as rpc:
            yield cls(chain, rpc, metrics, wakeups, progress)

    async def follow(self, lease: Lease) -> None:
        heads = self._heads if self._chain.websocket else None
        await follow(
            self._chain,
            self._rpc,
            heads,
            lease,
            self._wakeups,
            self._decoder,
            metrics=self._metrics,
            count=self._count,
        )

    async def fill_history(self, lease: Lease) -> None:
        await fill_history(
            self._chain,
            self._rpc,
            lease,
            self._wakeups,
            self._decoder,
            metrics=self._metrics,
            count=self._count,
            progress=self._progress,
        )

    @property
    def fingerprint(self) -> bytes:
        """Of the events that are read: `Decoder.fingerprint`."""
        return self._decoder.fingerprint

    async def reread(self, lease: Lease, request: UUID) -> None:
        """What was asked for in table `reread`, until this request is over. Raises WrongChain, LeaseLost."""
        await carry_out(
            Task(self._chain, self._rpc, lease, self._wakeups, self._decoder, self._metrics, self._count), request
        )

    async def answer_lookups(self, lease: Lease) -> None:
        await answer_lookups(
            self._chain.name,
            self.chain_id,
            self._rpc,
            lease,
            self._wakeups,
            metrics=self._metrics,
            count=self._count,
        )

    def _heads(self) -> HeadStream:
        assert self._chain.websocket is not None
        return HeadStream(self._chain.websocket, silent_seconds=self._chain.silent_seconds)

    def _count(self, check: str, outcome: Outcome) -> None:
        self._metrics.checks.labels(check, outcome.value, self._rpc.name).inc()
        if outcome is Outcome.FAIL:
            self._metrics.rpc_lies.labels(self._rpc.name, check).inc()
