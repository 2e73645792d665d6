"""When a leg has expired for certain: promise 6, and nothing else.

All of: a finalized block strictly after the last second in which the action could be executed, and every block from the
registration (or the factory's start) to such a block covered, for every emitter that could have spoken, with a verdict
better than `unverified`. Silence of a node, an incomplete backfill or a missing header is no proof, and waits.
"""

from __future__ import annotations

from indexer.model.confidence import Heads
from indexer.model.operation import Leg
from indexer.store import expiry as store
from indexer.store.connection import Connection
from indexer.store.coverage import covered_until
from indexer.store.operations import Operation

# How far before its stated `requestedAt` an operation's event is still looked for: a brand's clock may be ahead.
CLOCK_SKEW_MS = 600_000


async def certainly_expired(conn: Connection, operation: Operation, leg: Leg, heads: Heads, after_ms: int) -> bool:
    """Whether finalized, covered history has passed `after_ms` (Unix ms, the start of the second after the last one)."""
    watched = (await store.watched_since(conn, [leg])).get(leg.key)
    if watched is None:
        return False
    emitters, start_block = watched
    # A stated time later than the deadline itself says nothing of the time when the action could be executed.
    if operation.requested_at_stated and operation.requested_at_ms - CLOCK_SKEW_MS < after_ms:
        since = await store.first_block_since(conn, leg.chain_id, operation.requested_at_ms - CLOCK_SKEW_MS)
        start_block = start_block if since is None else max(start_block, since)
    covered = await covered_until(conn, leg.chain_id, emitters, start_block, several=heads.quorum > 1)
    if covered is None:
        return False
    time_ms = await store.highest_time_ms(conn, leg.chain_id, min(covered, heads.finalized_number))
    return time_ms is not None and time_ms >= after_ms
