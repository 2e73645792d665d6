"""What is over and old enough is deleted: blocks and events that a reorganisation undid, and signals where a retention is set.

Each function deletes one batch inside the caller's leased transaction and says how many rows it looked at or took; a batch
that is not full is the last. What anything that stands still refers to stays, however old. Deliveries are forgotten in
`deliveries.py`; operations, their history, receipts and decisions are kept for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from indexer.store.connection import Connection
from indexer.store.event_tables import EVENT_TABLES

#: Tables whose rows a reorganisation marks, the headers last: a header stays while an event of its block does.
ORPHANED: Final = (*(table.name for table in EVENT_TABLES.values()), "block")

_BLOCKS = {name: ("block_number", "block_hash", "block_time_ms") for name in ORPHANED} | {
    "block": ("number", "hash", "time_ms")
}
# Of blocks below finalized, and of an age. Not what a claim names: its operation has yet to hear that the event is gone. Nor what
# a promise rested on that was taken back and has not been kept again: a person wants to see it (operation_undone_idx).
_ORPHANS = """
    WITH lost AS MATERIALIZED (
        SELECT (b ->> 'chainId')::bigint AS chain_id, decode(substr(b ->> 'blockHash', 3), 'hex') AS hash
        FROM indexer.operation o CROSS JOIN LATERAL jsonb_array_elements(coalesce(o.detail -> 'lost', '[]')) AS b
        WHERE o.generation > 0 AND o.state NOT IN ('ready', 'fulfilled')),
    old AS MATERIALIZED (
        SELECT e.ctid FROM indexer.chain c CROSS JOIN LATERAL (
            SELECT e.ctid FROM indexer.{table} e
            WHERE e.chain_id = c.chain_id AND NOT e.canonical AND e.{number} < c.finalized_number
              AND e.{time} < (extract(epoch FROM clock_timestamp() - $1::interval) * 1000)::bigint
              AND NOT EXISTS (SELECT FROM indexer.claim k WHERE k.chain_id = e.chain_id AND k.block_number = e.{number}
                              AND k.block_hash = e.{hash})
              AND NOT EXISTS (SELECT FROM lost WHERE lost.chain_id = e.chain_id AND lost.hash = e.{hash})
            ORDER BY e.{number} LIMIT $2) AS e
        LIMIT $2)
    DELETE FROM indexer.{table} e USING old WHERE e.ctid = old.ctid AND NOT e.canonical
"""


async def forget_orphans(conn: Connection, table: str, keep: timedelta, limit: int) -> int:
    """Deletes up to `limit` rows of a table of ORPHANED that are not canonical, in blocks older than `keep`, by their own time.

    <table>_orphan_idx holds those rows alone; claim_log_idx. Returns how many went.
    """
    number, hash_, time = _BLOCKS[table]
    return await _deleted(conn, _ORPHANS.format(table=table, number=number, hash=hash_, time=time), keep, limit)


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A batch of a brand's signals: how many were looked at, and how many of those went."""

    seen: int
    gone: int


async def brands_with_old_signals(conn: Connection, keep: timedelta) -> list[str]:
    """Brands whose first signal above the floor is older than `keep` (outbox_sequence_idx: one row a brand)."""
    rows = await conn.fetch(
        """
        SELECT b.name FROM indexer.brand b CROSS JOIN LATERAL (
            SELECT o.created_at FROM indexer.outbox o WHERE o.brand = b.name AND o.sequence > b.forgotten_sequence
            ORDER BY o.sequence LIMIT 1) AS first
        WHERE first.created_at < clock_timestamp() - $1::interval ORDER BY b.name
        """,
        keep,
    )
    return [row["name"] for row in rows]


async def forget_signals(conn: Connection, brand: str, keep: timedelta, limit: int) -> Forgotten:
    """Walks through a brand's next `limit` signals from its floor up, as long as they are older than `keep`, and deletes those
    that all endpoints are done with and that do not stand. The floor moves behind them.

    What stays below the floor (a standing `ready` or `restored`, what an endpoint still waits for) stays for good. Ids are
    remembered: computing a signal again after it went makes no second one. outbox_sequence_idx, delivery_signal_idx,
    delivery_attempt_signal_idx, operation_pk.
    """
    row = await conn.fetchrow(
        """
        WITH page AS MATERIALIZED (
            SELECT o.position, o.id, o.sequence, o.aggregateid, o.created_at FROM indexer.outbox o JOIN indexer.brand b ON b.name = o.brand
            WHERE o.brand = $1 AND o.sequence > b.forgotten_sequence ORDER BY o.sequence LIMIT $3),
        old AS MATERIALIZED (
            SELECT p.* FROM page p WHERE p.sequence < coalesce(
                (SELECT min(y.sequence) FROM page y WHERE y.created_at >= clock_timestamp() - $2::interval), 9223372036854775807)),
        over AS MATERIALIZED (
            SELECT p.position, p.id FROM old p
            WHERE NOT EXISTS (SELECT FROM indexer.delivery d WHERE d.signal_id = p.id AND d.state = 'pending')
              AND NOT EXISTS (SELECT FROM indexer.operation o WHERE o.id = p.aggregateid AND o.standing_signal = p.id)),
        remembered AS (INSERT INTO indexer.forgotten_signal (id) SELECT id FROM over ON CONFLICT DO NOTHING),
        attempts AS (DELETE FROM indexer.delivery_attempt a USING over WHERE a.signal_id = over.id),
        deliveries AS (DELETE FROM indexer.delivery d USING over WHERE d.signal_id = over.id AND d.state <> 'pending'),
        signals AS (DELETE FROM indexer.outbox o USING over WHERE o.position = over.position RETURNING 1),
        floor AS (
            UPDATE indexer.brand b SET forgotten_sequence = (SELECT max(sequence) FROM old)
            WHERE b.name = $1 AND EXISTS (SELECT FROM old))
        SELECT (SELECT count(*) FROM old) AS seen, (SELECT count(*) FROM signals) AS gone
        """,
        brand,
        keep,
        limit,
    )
    assert row is not None
    return Forgotten(row["seen"], row["gone"])


async def _deleted(conn: Connection, query: str, *args: object) -> int:
    return int((await conn.execute(query, *args)).rpartition(" ")[2])
