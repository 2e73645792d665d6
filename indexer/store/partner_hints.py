"""What Loyfin's API says of signed actions, and what we hold of the same: hints that end nothing, and a cross-check.

Every function works in the caller's transaction; the chain decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from indexer.store.connection import Connection
from indexer.store.partner_accounts import OPEN, Account


@dataclass(frozen=True, slots=True)
class HintRow:
    """A signed action as Loyfin's API shows it."""

    record_id: str
    chain_id: int
    factory: bytes
    kind: str
    issuer: bytes
    nonce: bytes
    operation_hash: bytes | None
    status: str  # pending | submitted | mined | rejected
    reason: str | None
    relay_tx_hash: bytes | None


async def store_hints(conn: Connection, account: Account, hints: Sequence[HintRow]) -> int:
    """Upserts; operations whose hint changed are looked at again. Answers how many changed. Raises nothing of its own."""
    changed: list[tuple[bytes, bytes | None]] = []
    for hint in hints:
        row = await conn.fetchrow(
            """
            INSERT INTO indexer.partner_hint AS h
                (brand, partner, record_id, chain_id, factory, kind, issuer, nonce, operation_hash, status, reason, relay_tx_hash)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
            ON CONFLICT (brand, partner, record_id) DO UPDATE SET status = excluded.status, reason = excluded.reason,
                relay_tx_hash = excluded.relay_tx_hash, seen_at = clock_timestamp()
            WHERE (h.status, h.reason, h.relay_tx_hash) IS DISTINCT FROM (excluded.status, excluded.reason, excluded.relay_tx_hash)
            RETURNING 1
            """,
            *account,
            hint.record_id,
            hint.chain_id,
            hint.factory,
            hint.kind,
            hint.issuer,
            hint.nonce,
            hint.operation_hash,
            hint.status,
            hint.reason,
            hint.relay_tx_hash,
        )
        if row is not None:
            changed.append((hint.nonce, hint.operation_hash))
    if changed:
        # leg_any_nonce_idx, leg_operation_hash_idx
        await conn.execute(
            """
            INSERT INTO indexer.touched_operation (operation_id)
            SELECT o.id FROM indexer.leg l JOIN indexer.operation o ON o.id = l.operation_id
            WHERE l.nonce = ANY ($2::bytea[]) AND o.brand = $1 AND o.state = ANY ($4::text[])
            UNION SELECT o.id FROM indexer.leg l JOIN indexer.operation o ON o.id = l.operation_id
            WHERE l.operation_hash = ANY ($3::bytea[]) AND l.nonce IS NULL AND o.brand = $1 AND o.state = ANY ($4::text[])
            """,
            account.brand,
            [nonce for nonce, _ in changed],
            [found for _, found in changed if found is not None],
            OPEN,
        )
        await conn.execute("NOTIFY indexer_facts")
    return len(changed)


async def newest_waiting(conn: Connection, brand: str) -> float | None:
    """When the newest operation that waits for a Loyfin leg was registered (Unix seconds); None where none waits.

    operation_state_idx backwards, one look for each state however many wait; leg_pk.
    """
    found: float | None = await conn.fetchval(
        """
        SELECT extract(epoch FROM max(newest.registered_at))::float8 FROM unnest($2::text[]) AS s (state)
        CROSS JOIN LATERAL (
            SELECT o.registered_at FROM indexer.operation o
            WHERE o.brand = $1 AND o.state = s.state
              AND EXISTS (SELECT FROM indexer.leg l WHERE l.operation_id = o.id AND l.issuer IS NOT NULL)
            ORDER BY o.registered_at DESC LIMIT 1) AS newest
        """,
        brand,
        OPEN,
    )
    return found


@dataclass(frozen=True, slots=True)
class OwnEvent:
    """A movement as we hold it, for comparing with what Loyfin's API says of it."""

    kind: str
    chain_id: int
    nonce: bytes
    tx_hash: bytes
    log_index: int
    block_number: int
    amount: int


async def own_events(conn: Connection, issuers: Sequence[bytes], operation_hash: bytes) -> list[OwnEvent]:
    """Canonical movements of these issuers under a hash. movement_operation_hash_idx."""
    rows = await conn.fetch(
        """
        SELECT kind, chain_id, nonce, tx_hash, log_index, block_number, amount FROM indexer.movement
        WHERE operation_hash = $2 AND issuer = ANY ($1::bytea[]) AND canonical
        """,
        list(issuers),
        operation_hash,
    )
    return [OwnEvent(row[0], row[1], row[2], row[3], row[4], row[5], int(row[6])) for row in rows]


async def ready_hashes(conn: Connection, brand: str, after: int, limit: int) -> tuple[list[tuple[str, bytes]], int]:
    """(kind, operationHash) of operations that became ready behind sequence `after`, and the sequence that this reaches.

    outbox_sequence_idx; of each signal its operation's legs by primary key.
    """
    rows = await conn.fetch(
        """
        SELECT s.sequence, l.kind, l.operation_hash
        FROM (SELECT sequence, aggregateid, type FROM indexer.outbox WHERE brand = $1 AND sequence > $2 ORDER BY sequence LIMIT $3) AS s
        LEFT JOIN indexer.leg l ON s.type = 'operation.ready' AND l.operation_id = s.aggregateid AND l.operation_hash IS NOT NULL
        ORDER BY s.sequence
        """,
        brand,
        after,
        limit,
    )
    return [(row[1], row[2]) for row in rows if row[2] is not None], max((row[0] for row in rows), default=after)
