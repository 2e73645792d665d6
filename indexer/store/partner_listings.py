"""What a partner's listing should hold: which records are known, which of them rest, and which are missing until they are withdrawn.

Every function works inside the caller's leased transaction and neither begins nor commits; what it changes is noted in `Stored`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import asyncpg

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
    """Records that its own listing showed first, and those of others' with evidence for it; those that two sweeps lacked are none.

    partner_record_wallet_idx, partner_transfer_wallet_idx, partner_transfer_record_idx. A record rests when all its evidence has
    succeeded or failed.
    """
    rests = """
        EXISTS (SELECT FROM indexer.partner_transfer t WHERE t.brand = $1 AND t.partner = $2 AND t.record_id = r.record_id)
        AND NOT EXISTS (
            SELECT FROM indexer.partner_transfer t WHERE t.brand = $1 AND t.partner = $2 AND t.record_id = r.record_id
              AND t.status NOT IN ('succeeded', 'failed'))
    """
    rows = await conn.fetch(
        f"""
        SELECT r.record_id, {rests} FROM indexer.partner_record r
        WHERE r.brand = $1 AND r.partner = $2 AND r.wallet = $3 AND r.current AND r.missing < $4
        UNION ALL
        SELECT r.record_id, {rests} FROM indexer.partner_transfer g
        JOIN indexer.partner_record r ON r.brand = $1 AND r.partner = $2 AND r.record_id = g.record_id AND r.current AND r.wallet <> $3
        WHERE g.brand = $1 AND g.partner = $2 AND g.wallet = $3 AND g.missing < $4
        LIMIT $5
        """,  # noqa: S608 - words of ours
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


async def wallets_of(conn: Connection, account: Account, record_ids: Collection[str]) -> list[tuple[str, str]]:
    """(record, wallet) of the evidence in these (partner_transfer_record_idx)."""
    rows = await conn.fetch(
        """
        SELECT DISTINCT record_id, wallet FROM indexer.partner_transfer
        WHERE brand = $1 AND partner = $2 AND record_id = ANY ($3::text[])
        """,
        account.brand,
        account.partner,
        list(record_ids),
    )
    return [(row[0], row[1]) for row in rows]


async def still_there(
    conn: Connection, account: Account, wallet: str, record_ids: Sequence[str], keep: float
) -> Stored:
    """Records that a wallet's listing held: there they are not missing (any more).

    `keep`: seconds for which evidence must stand unchanged before it is final; until then it is noted that it was seen.
    """
    stored = Stored()
    status = await conn.execute(
        """
        UPDATE indexer.partner_record SET missing = 0
        WHERE brand = $1 AND partner = $2 AND record_id = ANY ($3::text[]) AND current AND missing > 0 AND wallet = $4
        """,
        account.brand,
        account.partner,
        list(record_ids),
        wallet,
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


async def mark(conn: Connection, account: Account, record_ids: Collection[str], walk: int) -> int:
    """Notes that a long walk showed these. Answers how many no walk of this number or a later one had shown before."""
    status = await conn.execute(
        """
        UPDATE indexer.partner_record SET swept = $4
        WHERE brand = $1 AND partner = $2 AND record_id = ANY ($3::text[]) AND current AND swept < $4
        """,  # partner_record_current_idx
        account.brand,
        account.partner,
        list(record_ids),
        walk,
    )
    return int(status.rpartition(" ")[2])


async def sweep(
    conn: Connection,
    account: Account,
    wallet: str,
    seen: Collection[str] | int,
    since_ms: int | None = None,
    until_ms: int | None = None,
) -> Stored:
    """A complete listing held `seen` and nothing else: what it should have held and didn't is missing, at last withdrawn.

    `seen`: the records, or the number of the first walk that has marked them. `since_ms`, `until_ms`: it spoke of records with
    times between, both exclusive; without `since_ms` also of those without a time that were read before its end. A wallet's
    listing speaks of that wallet's evidence alone, whichever listing showed the record first. partner_record_wallet_idx.
    """
    stored = Stored()
    ids, walk = ([], seen) if isinstance(seen, int) else (list(seen), None)
    rows = await conn.fetch(
        """
        UPDATE indexer.partner_record SET missing = least(missing + 1, 1000)
        WHERE brand = $1 AND partner = $2 AND wallet = $3 AND current
          AND ($5::bigint IS NULL OR time_ms > $5)
          AND ($6::bigint IS NULL OR time_ms < $6 OR (time_ms IS NULL AND seen_at < to_timestamp($6 / 1000.0)))
          AND record_id NOT IN (SELECT unnest($4::text[])) AND ($7::bigint IS NULL OR swept < $7)
        RETURNING record_id, missing
        """,
        account.brand,
        account.partner,
        wallet,
        ids,
        since_ms,
        until_ms,
        walk,
    )
    stored.missing = sum(row[1] < SWEEPS_UNTIL_GONE for row in rows)
    gone = [row[0] for row in rows if row[1] == SWEEPS_UNTIL_GONE]
    stored.withdrawn = len(gone)
    lost: list[asyncpg.Record] = []
    if gone:
        lost += await conn.fetch(
            """
            UPDATE indexer.partner_transfer SET withdrawn_at = clock_timestamp()
            WHERE brand = $1 AND partner = $2 AND record_id = ANY ($3::text[]) AND withdrawn_at IS NULL AND $4 IN ('', wallet)
            RETURNING kind, wallet, status
            """,
            account.brand,
            account.partner,
            gone,
            wallet,
        )
    if wallet:
        # partner_transfer_wallet_idx, partner_record_current_idx
        guests = await conn.fetch(
            """
            UPDATE indexer.partner_transfer t SET missing = t.missing + 1,
                withdrawn_at = CASE WHEN t.missing + 1 >= $5 THEN clock_timestamp() END
            FROM indexer.partner_record r
            WHERE t.brand = $1 AND t.partner = $2 AND t.wallet = $3 AND t.withdrawn_at IS NULL
              AND t.record_id NOT IN (SELECT unnest($4::text[]))
              AND r.brand = $1 AND r.partner = $2 AND r.record_id = t.record_id AND r.current AND r.wallet <> $3
            RETURNING t.kind, t.wallet, t.status, t.withdrawn_at IS NOT NULL AS gone
            """,
            account.brand,
            account.partner,
            wallet,
            ids,
            SWEEPS_UNTIL_GONE,
        )
        lost += [row for row in guests if row["gone"]]
        stored.withdrawn += sum(row["gone"] for row in guests)
        stored.missing += sum(not row["gone"] for row in guests)
    stored.unsettled = sum(row["status"] in SETTLED for row in lost)
    stored.touched |= {(row["kind"], row["wallet"]) for row in lost}
    return stored
