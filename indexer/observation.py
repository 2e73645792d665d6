"""What the loops report, turned into metrics: latencies once per transition, after the commit, never on replay."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from indexer.model.evidence import Movement
from indexer.model.operation import State
from indexer.model.signal import READY, RESTORED, Signal
from indexer.model.standing import AnyEvidence
from indexer.store.operations import Operation
from indexer.telemetry import Metrics, Stage

REMEMBERED = 10_000  # repeated events that were told

log = structlog.get_logger(__name__)


class SettlementObserver:
    """The reconciler's observer."""

    def __init__(self, metrics: Metrics, chain_names: dict[int, str]) -> None:
        self._metrics, self._chains = metrics, chain_names
        self._repeats: set[tuple[int, bytes, int]] = set()

    def transition(self, operation: Operation, to: State, evidence: Sequence[AnyEvidence], now_ms: int) -> None:
        metrics, brand = self._metrics, operation.brand
        metrics.transitions.labels(brand, to.value).inc()
        if to is State.CONFLICT:
            metrics.conflicts.labels(brand).inc()
        kind = operation.legs[0].kind if len({leg.kind for leg in operation.legs}) == 1 else "mixed"
        last_ms = max((piece.time_ms for piece in evidence), default=None)
        if to is State.READY and last_ms is not None and operation.generation == 1:
            self._stage(operation, kind, "registered_to_included", last_ms - operation.registered_at_ms)
            self._stage(operation, kind, "included_to_ready", now_ms - max(last_ms, operation.registered_at_ms))
        if to is State.FULFILLED and operation.generation in operation.receipts:
            done_ms = operation.fulfilled_at_ms or now_ms
            self._stage(operation, kind, "registered_to_fulfilled", done_ms - operation.registered_at_ms)
            if operation.delivered_at_ms is not None:
                self._stage(operation, kind, "delivered_to_fulfilled", done_ms - operation.delivered_at_ms)

    def _stage(self, operation: Operation, kind: str, stage: Stage, milliseconds: int) -> None:
        self._metrics.observe_latency(operation.brand, kind, stage, milliseconds / 1000)

    def signalled(self, signal: Signal) -> None:
        self._metrics.signals.labels(signal.brand, signal.type).inc()
        if signal.type in (READY, RESTORED):
            data = signal.payload["data"]
            for told in data["evidence"]:
                if told["ambiguous"]:
                    kind = data["operation"]["legs"][told["leg"]]["kind"]
                    self._metrics.ambiguous.labels(signal.brand, kind).inc()

    def repeated(self, movement: Movement) -> None:
        """A second event of one identity: counted and told once, however often the reconciler comes by."""
        place = (movement.chain_id, movement.block_hash, movement.log_index)
        if place in self._repeats:
            return
        if len(self._repeats) >= REMEMBERED:
            self._repeats.clear()
        self._repeats.add(place)
        name = self._chains.get(movement.chain_id, str(movement.chain_id))
        self._metrics.repeated.labels(name, movement.kind).inc()
        log.warning(
            "a second event of one signed action: it settles nothing",
            chain=name,
            kind=movement.kind,
            block=movement.block_number,
            log_index=movement.log_index,
            tx=movement.tx_hash,
            nonce=movement.nonce,
        )
