"""What speaks for a block with events that operations claim: which endpoints hold it, and whether its receipts were proven.

The reconciler asks, whoever verifies the chain answers, and the reconciler reads the answers: facts like any other. A block whose
events nobody claims is never asked about. Every function works on the connection it is given and commits nothing itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import asyncpg

from indexer.model.standing import Attestation, Block
from indexer.store.connection import Connection

RETRY: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds until it is tried again, by how often it was


@dataclass(frozen=True, slots=True)
class Open:
    """A block that is asked about, and what is known of it."""

    block: Block
    witnesses: list[str]
    proof: str | None
    attempts: int


async def ask(conn: Connection, blocks: Collection[Block]) -> None:
    """To be looked at, now (attestation_pk). What waits for its time already is left alone."""
    await conn.execute(
        """
        INSERT INTO indexer.attestation AS a (chain_id, number, hash, next_at)
        SELECT *, clock_timestamp() FROM unnest($1::bigint[], $2::bigint[], $3::bytea[]) AS asked (chain_id, number, hash)
        ON CONFLICT (chain_id, number, hash) DO UPDATE SET next_at = excluded.next_at, attempts = 0 WHERE a.next_at IS NULL
        """,
        *_arrays(blocks),
    )
    await conn.execute("NOTIFY indexer_asked")


async def load(conn: Connection, blocks: Collection[Block]) -> dict[Block, Attestation]:
    """What is known of these blocks (attestation_pk)."""
    rows = await conn.fetch(
        """
        SELECT a.chain_id, a.number, a.hash, a.witnesses, a.proof, a.reason, a.next_at IS NOT NULL AS open
        FROM unnest($1::bigint[], $2::bigint[], $3::bytea[]) AS b (chain_id, number, hash)
        JOIN indexer.attestation a ON a.chain_id = b.chain_id AND a.number = b.number AND a.hash = b.hash
        """,
        *_arrays(blocks),
    )
    return {(r["chain_id"], r["number"], r["hash"]): attestation_of(r) for r in rows}


def attestation_of(row: asyncpg.Record) -> Attestation:
    """Of a row whose columns are null where nobody asked about the block."""
    return Attestation(len(row["witnesses"] or ()), row["proof"], row["reason"], row["open"])


async def due(conn: Connection, chain_id: int, limit: int) -> list[Open]:
    """What is to be looked at now, the longest waiting first (attestation_due_idx)."""
    rows = await conn.fetch(
        """
        SELECT number, hash, witnesses, proof, attempts FROM indexer.attestation
        WHERE chain_id = $1 AND next_at <= clock_timestamp() ORDER BY next_at LIMIT $2
        """,
        chain_id,
        limit,
    )
    return [Open((chain_id, r["number"], r["hash"]), list(r["witnesses"]), r["proof"], r["attempts"]) for r in rows]


async def seconds_to_next(conn: Connection, chain_id: int) -> float | None:
    """Until something is due; None where nothing is open (attestation_due_idx)."""
    found = await conn.fetchval(
        """
        SELECT extract(epoch FROM min(next_at) - clock_timestamp())::float8 FROM indexer.attestation
        WHERE chain_id = $1 AND next_at IS NOT NULL
        """,
        chain_id,
    )
    return None if found is None else max(0.0, float(found))


async def record(
    conn: Connection,
    found: Open,
    witnesses: Sequence[str],
    proof: str | None,
    reason: str | None,
    *,
    settled: bool,
    pause: float | None = None,
) -> bool:
    """Writes what a look brought; unless `settled`, there is another, in `pause` seconds. True where something is known that was not."""
    chain_id, number, block_hash = found.block
    pause = RETRY[min(found.attempts, len(RETRY) - 1)] if pause is None else pause
    changed = await conn.fetchval(
        """
        WITH before AS (
            SELECT witnesses, proof FROM indexer.attestation WHERE chain_id = $1 AND number = $2 AND hash = $3 FOR UPDATE)
        UPDATE indexer.attestation AS a
        SET witnesses = $4, proof = $5, reason = coalesce($6, CASE WHEN a.proof IS NOT DISTINCT FROM $5 THEN a.reason END), attempts = a.attempts + 1,
            next_at = CASE WHEN $7 THEN NULL ELSE clock_timestamp() + make_interval(secs => $8) END
        FROM before WHERE a.chain_id = $1 AND a.number = $2 AND a.hash = $3
        RETURNING before.witnesses IS DISTINCT FROM a.witnesses OR before.proof IS DISTINCT FROM a.proof
        """,
        chain_id,
        number,
        block_hash,
        list(witnesses),
        proof,
        reason,
        settled,
        pause,
    )
    return bool(changed)


async def note(
    conn: asyncpg.Connection,
    chain_id: int,
    blocks: Mapping[tuple[int, bytes], bool],
    witnesses: Sequence[str],
) -> None:
    """What the reading of blocks with movements showed on the way: whether each was proven, and who has them. What could not be
    proven is not noted: that is not for one endpoint to say."""
    listed = list(blocks.items())
    await conn.execute(
        """
        INSERT INTO indexer.attestation (chain_id, number, hash, proof, witnesses)
        SELECT $1, number, hash, CASE WHEN proven THEN 'receipts_root' END, $5::text[]
        FROM unnest($2::bigint[], $3::bytea[], $4::boolean[]) AS read (number, hash, proven)
        ON CONFLICT (chain_id, number, hash) DO NOTHING
        """,
        chain_id,
        [number for (number, _), _ in listed],
        [block_hash for (_, block_hash), _ in listed],
        [proven for _, proven in listed],
        list(witnesses),
    )


async def forget_above(conn: asyncpg.Connection, chain_id: int, ancestor: int) -> None:
    """A reorganisation: who held what above the ancestor says nothing of now. (attestation_pk)"""
    await conn.execute("DELETE FROM indexer.attestation WHERE chain_id = $1 AND number > $2", chain_id, ancestor)


async def waiting(conn: Connection) -> dict[int, int]:
    """Blocks that are asked about and not settled, by chain (attestation_due_idx)."""
    rows = await conn.fetch(
        "SELECT chain_id, count(*) AS blocks FROM indexer.attestation WHERE next_at IS NOT NULL GROUP BY chain_id"
    )
    return {row["chain_id"]: row["blocks"] for row in rows}


def _arrays(blocks: Iterable[Block]) -> tuple[list[int], list[int], list[bytes]]:
    listed = sorted(set(blocks))
    return [b[0] for b in listed], [b[1] for b in listed], [b[2] for b in listed]
