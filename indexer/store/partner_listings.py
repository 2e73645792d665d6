"""What a partner's listing should hold: which records are known, which of them rest, and which are missing until they are withdrawn.

Every function works inside the caller's leased transaction and neither begins nor commits; what it changes is noted in `Stored`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from indexer.store.connection import Connection
from indexer.store.partner_accounts import Account
from indexer.store.partners import SETTLED, Stored

SWEEPS_UNTIL_GONE = 2  # full sweeps in a row that lack a record: then it is withdrawn


@dataclass(frozen=True, slots=True)
class Known:
    """What a wallet's listing should hold: how many records, and which of them do not rest yet."""

    records: frozenset[str]
    restless: frozenset[str]


async def known_of(conn: Connection, account: Account, wallet: str, limit: int | None = None) -> Known:
    """partner_record_wallet_idx and partner_transfer_record_idx. A record rests when all its evidence has succeeded or failed."""
    rows = await conn.fetch(
        """
        SELECT r.record_id, EXISTS (
            SELECT FROM indexer.partner_transfer t WHERE t.brand = $1 AND t.partner = $2 AND t.record_id = r.record_id)
          AND NOT EXISTS (
            SELECT FROM indexer.partner_transfer t WHERE t.brand = $1 AND t.partner = $2 AND t.record_id = r.record_id
              AND t.status NOT IN ('succeeded', 'failed')) AS rests
        FROM indexer.partner_record r WHERE r.brand = $1 AND r.partner = $2 AND r.wallet = $3 AND r.current AND r.missing < $4
        LIMIT $5
        """,
        account.brand,
        account.partner,
        wallet,
        SWEEPS_UNTIL_GONE,
        limit,
    )
    return Known(frozenset(r[0] for r in rows), frozenset(r[0] for r in rows if not r[1]))


async def oldest_restless_ms(conn: Connection, account: Account, since: float) -> int | None:
    """The time of the oldest evidence, first seen after `since` (Unix seconds), that has neither succeeded nor failed.

    partner_transfer_page_idx: it takes a time that the planner can see, so the database's clock is not asked here.
    """
    found = await conn.fetchval(
        """
        SELECT min(t.time_ms) FROM indexer.partner_transfer t
        WHERE t.brand = $1 AND t.partner = $2 AND t.status IN ('pending', 'included') AND t.withdrawn_at IS NULL
          AND t.first_seen_at > to_timestamp($3::float8)
        """,
        account.brand,
        account.partner,
        since,
    )
    return None if found is None else int(found)


async def resting(conn: Connection, account: Account, record_ids: Sequence[str], keep: float) -> int:
    """How many of these are stored and at rest: their evidence failed, or has stood for `keep` seconds."""
    return int(
        await conn.fetchval(
            """
            SELECT count(*) FROM indexer.partner_record r
            WHERE r.brand = $1 AND r.partner = $2 AND r.record_id = ANY ($3::text[]) AND r.current AND r.missing = 0
              AND NOT EXISTS (
                SELECT FROM indexer.partner_transfer t WHERE t.brand = $1 AND t.partner = $2 AND t.record_id = r.record_id
                  AND NOT (t.status = 'failed' OR (t.status = 'succeeded' AND t.seen_at >= t.settled_at + make_interval(secs => $4))))
            """,
            account.brand,
            account.partner,
            list(record_ids),
            keep,
        )
    )


async def still_there(conn: Connection, account: Account, record_ids: Sequence[str], keep: float) -> Stored:
    """Records that a listing held: they are not missing (any more).

    `keep`: seconds for which evidence must stand unchanged before it is final; until then it is noted that it was seen.
    """
    stored = Stored()
    status = await conn.execute(
        """
        UPDATE indexer.partner_record SET missing = 0
        WHERE brand = $1 AND partner = $2 AND record_id = ANY ($3::text[]) AND current AND missing > 0
        """,
        account.brand,
        account.partner,
        list(record_ids),
    )
    stored.returned = int(status.rpartition(" ")[2])
    if keep > 0:
        rows = await conn.fetch(
            """
            UPDATE indexer.partner_transfer SET seen_at = clock_timestamp()
            WHERE brand = $1 AND partner = $2 AND record_id = ANY ($3::text[]) AND withdrawn_at IS NULL
              AND settled_at IS NOT NULL AND seen_at < settled_at + make_interval(secs => $4)
            RETURNING kind, wallet, seen_at >= settled_at + make_interval(secs => $4) AS stood
            """,
            account.brand,
            account.partner,
            list(record_ids),
            keep,
        )
        stored.touched |= {(row[0], row[1]) for row in rows if row[2]}
    return stored


async def sweep(
    conn: Connection,
    account: Account,
    wallet: str,
    seen: Collection[str],
    since_ms: int | None = None,
    until_ms: int | None = None,
) -> Stored:
    """A complete listing held `seen` and nothing else: what it should have held and didn't is missing, at last withdrawn.

    `since_ms`, `until_ms`: it spoke of records with times between, both exclusive; without `since_ms` also of those without a time
    that were read before its end. partner_record_wallet_idx.
    """
    stored = Stored()
    rows = await conn.fetch(
        """
        UPDATE indexer.partner_record SET missing = least(missing + 1, 1000)
        WHERE brand = $1 AND partner = $2 AND wallet = $3 AND current
          AND ($5::bigint IS NULL OR time_ms > $5)
          AND ($6::bigint IS NULL OR time_ms < $6 OR (time_ms IS NULL AND seen_at < to_timestamp($6 / 1000.0)))
          AND record_id NOT IN (SELECT unnest($4::text[]))
        RETURNING record_id, missing
        """,
        account.brand,
        account.partner,
        wallet,
        list(seen),
        since_ms,
        until_ms,
    )
    stored.missing = sum(row[1] < SWEEPS_UNTIL_GONE for row in rows)
    gone = [row[0] for row in rows if row[1] == SWEEPS_UNTIL_GONE]
    if gone:
        stored.withdrawn = len(gone)
        lost = await conn.fetch(
            """
            UPDATE indexer.partner_transfer SET withdrawn_at = clock_timestamp()
            WHERE brand = $1 AND partner = $2 AND record_id = ANY ($3::text[]) AND withdrawn_at IS NULL
            RETURNING kind, wallet, status
            """,
            account.brand,
            account.partner,
            gone,
        )
        stored.unsettled = sum(row[2] in SETTLED for row in lost)
        stored.touched |= {(row[0], row[1]) for row in lost}
    return stored
