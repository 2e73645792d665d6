"""Questions about a transaction of a chain that we follow, and the chain's answers: where partners' facts meet it.

Pollers ask, the chain room answers, the reconciler joins. Every function works in the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta

from indexer.store.connection import Connection
from indexer.store.partners import touch_partner_legs


async def ask_chain(conn: Connection, questions: Collection[tuple[int, bytes]]) -> None:
    """Leaves (chain id, transaction hash) for the chain room to answer; those that were asked before stay as they are."""
    if not questions:
        return
    ordered = sorted(set(questions))
    await conn.execute(
        """
        INSERT INTO indexer.chain_lookup (chain_id, tx_hash) SELECT * FROM unnest($1::bigint[], $2::bytea[])
        ON CONFLICT DO NOTHING
        """,
        [chain for chain, _ in ordered],
        [tx for _, tx in ordered],
    )


@dataclass(frozen=True, slots=True)
class Question:
    """A transaction that somebody asked about, with the last answer. `block_number` None: it was not there, or never looked."""

    tx_hash: bytes
    block_number: int | None
    block_hash: bytes | None


async def questions(conn: Connection, chain_id: int, finalized: int, pause: float, limit: int) -> list[Question]:
    """Those that nobody looked at first, then whose turn it is again. chain_lookup_open_idx.

    An answer that is not final is due when its block is, else after `pause` seconds, less and less often up to once a minute;
    a transaction that the chain does not hold up to once an hour: it is never given up.
    """
    rows = await conn.fetch(
        """
        SELECT tx_hash, block_number, block_hash FROM indexer.chain_lookup
        WHERE chain_id = $1 AND NOT final AND (answered_at IS NULL
            OR (block_number <= $2 AND answered_at < clock_timestamp() - make_interval(secs => $3))
            OR answered_at < clock_timestamp() - least(greatest(make_interval(secs => $3), (answered_at - asked_at) / 10),
                CASE WHEN block_number IS NULL THEN interval '1 hour' ELSE interval '1 minute' END))
        ORDER BY answered_at NULLS FIRST LIMIT $4
        """,
        chain_id,
        finalized,
        pause,
        limit,
    )
    return [Question(*row) for row in rows]


async def chain_heights(conn: Connection, chain_id: int) -> tuple[int, int]:
    """Heights of our head and of finalized, as stored; -1 where there is none."""
    row = await conn.fetchrow(
        "SELECT coalesce(head_number, -1), coalesce(finalized_number, -1) FROM indexer.chain WHERE chain_id = $1",
        chain_id,
    )
    return (row[0], row[1]) if row else (-1, -1)


async def canonical_hash(conn: Connection, chain_id: int, number: int) -> bytes | None:
    """The hash that we hold for a height, where we hold its header. block_canonical_idx."""
    found: bytes | None = await conn.fetchval(
        "SELECT hash FROM indexer.block WHERE chain_id = $1 AND number = $2 AND canonical", chain_id, number
    )
    return found


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """What the chain says of a transaction. `block_number` None: it does not hold it now. `moved` as jsonb."""

    tx_hash: bytes
    block_number: int | None = None
    block_hash: bytes | None = None
    success: bool | None = None
    moved: list[dict[str, str]] | None = None
    final: bool = False


async def attempted(conn: Connection, chain_id: int, tx_hashes: Sequence[bytes]) -> None:
    """Nothing was learnt of these: what is stored stays, and others are asked about first."""
    await conn.execute(
        "UPDATE indexer.chain_lookup SET answered_at = clock_timestamp() WHERE chain_id = $1 AND tx_hash = ANY ($2::bytea[])",
        chain_id,
        list(tx_hashes),
    )


async def answer(conn: Connection, chain_id: int, answers: Sequence[AnswerRow]) -> int:
    """Stores answers; operations that wait for a changed one are looked at again. Answers how many changed.

    partner_transfer_tx_idx finds the evidence that rests on them.
    """
    changed: list[bytes] = []
    for each in answers:
        row = await conn.fetchrow(
            """
            UPDATE indexer.chain_lookup AS c SET answered_at = clock_timestamp(), block_number = $3, block_hash = $4, success = $5,
                transfer = $6, final = $7
            FROM (SELECT block_hash, success, answered_at FROM indexer.chain_lookup WHERE chain_id = $1 AND tx_hash = $2) AS was
            WHERE c.chain_id = $1 AND c.tx_hash = $2
            RETURNING (was.block_hash, was.success) IS DISTINCT FROM ($4::bytea, $5::boolean) OR was.answered_at IS NULL
            """,
            chain_id,
            each.tx_hash,
            each.block_number,
            each.block_hash,
            each.success,
            each.moved,
            each.final,
        )
        if row is not None and row[0]:
            changed.append(each.tx_hash)
    if changed:
        rows = await conn.fetch(
            """
            SELECT DISTINCT brand, kind, wallet FROM indexer.partner_transfer
            WHERE chain_id = $1 AND tx_hashes && $2::text[]
            """,
            chain_id,
            ["0x" + tx.hex() for tx in changed],
        )
        for brand in {row[0] for row in rows}:
            await touch_partner_legs(conn, brand, [(row[1], row[2]) for row in rows if row[0] == brand])
            # a claim rests on the block that we found: what stands elsewhere now must be settled anew
            await conn.execute(
                """
                INSERT INTO indexer.touched_operation (operation_id)
                SELECT c.operation_id FROM indexer.partner_transfer t JOIN indexer.claim c ON c.evidence_id = t.id
                WHERE t.brand = $1 AND t.chain_id = $2 AND t.tx_hashes && $3::text[]
                """,
                brand,
                chain_id,
                ["0x" + tx.hex() for tx in changed],
            )
    return len(changed)


async def forget(conn: Connection, keep: timedelta, limit: int) -> int:
    """Deletes answered questions, asked longer ago than `keep`, about transactions that no partner's record names any more.

    They would be looked at again for ever. What is final is not looked at again, and stays: what stands may rest on it.
    At most `limit`; answers how many went. chain_lookup_open_idx, partner_transfer_tx_idx.
    """
    status = await conn.execute(
        """
        DELETE FROM indexer.chain_lookup WHERE ctid = ANY (ARRAY (
            SELECT q.ctid FROM indexer.chain_lookup q
            WHERE NOT q.final AND q.answered_at IS NOT NULL AND q.asked_at < (SELECT clock_timestamp() - $1::interval)
              AND NOT EXISTS (SELECT FROM indexer.partner_transfer t WHERE t.chain_id IS NOT NULL
                              AND t.tx_hashes @> ARRAY['0x' || encode(q.tx_hash, 'hex')])
            LIMIT $2 FOR UPDATE SKIP LOCKED))
        """,
        keep,
        limit,
    )
    return int(status.rpartition(" ")[2])
