"""Accounts at partners: their pollers' own state and health, and whose wallets are waited for and were looked at when.

Every function works in the caller's transaction. When a wallet is due is decided by the pollers' schedule.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from indexer.store.connection import Connection

IDLE_SECONDS = 3600.0  # soonest next look at a wallet with nothing open; later, a tenth of the time since its last news

# An operation of these states still waits for evidence of its legs.
OPEN = ["pending", "submitted", "confirming", "incomplete", "conflict", "reverted"]


class Account(NamedTuple):
    """A brand's account at a partner: whose rows these are."""

    brand: str
    partner: str


@dataclass(frozen=True, slots=True)
class OpenWallet:
    """A wallet (Keyban's walletId, qiibee's auth_id) with open legs. Times in Unix seconds by the database's clock."""

    wallet: str
    legs: int
    newest: float  # the youngest leg's registration
    oldest_ms: int  # the oldest leg's requestedAt
    first_look: float | None
    last_look: float | None
    swept: float | None


async def sync_accounts(conn: Connection, accounts: Collection[Account]) -> None:
    """Makes the table say which accounts the configuration names."""
    brands, partners = [a.brand for a in accounts], [a.partner for a in accounts]
    await conn.execute(
        """
        INSERT INTO indexer.partner_account AS a (brand, partner)
        SELECT * FROM unnest($1::text[], $2::text[])
        ON CONFLICT (brand, partner) DO UPDATE SET active = true
        """,
        brands,
        partners,
    )
    await conn.execute(
        """
        UPDATE indexer.partner_account a SET active = false
        WHERE active AND NOT EXISTS (
            SELECT FROM unnest($1::text[], $2::text[]) AS w (brand, partner) WHERE w.brand = a.brand AND w.partner = a.partner)
        """,
        brands,
        partners,
    )


async def account_state(conn: Connection, account: Account) -> dict[str, Any]:
    """What the account's poller noted for itself."""
    found = await conn.fetchval(
        "SELECT state FROM indexer.partner_account WHERE brand = $1 AND partner = $2", account.brand, account.partner
    )
    return found or {}


async def save_state(conn: Connection, account: Account, state: Mapping[str, Any]) -> None:
    """Adds to what was noted, in the transaction of the facts that the state speaks for."""
    await conn.execute(
        "UPDATE indexer.partner_account SET state = coalesce(state, '{}') || $3::jsonb WHERE brand = $1 AND partner = $2",
        account.brand,
        account.partner,
        dict(state),
    )


async def note_health(
    conn: Connection, account: Account, problem: str | None, refused: str | None, answered_ago: float | None
) -> None:
    """How the account fares. `answered_ago`: seconds since the last usable answer. Written only where it differs."""
    await conn.execute(
        """
        UPDATE indexer.partner_account SET problem = $3, stopped_reason = $4,
            stopped_at = CASE WHEN $4::text IS NULL THEN NULL ELSE coalesce(stopped_at, clock_timestamp()) END,
            polled_at = coalesce(clock_timestamp() - make_interval(secs => $5), polled_at)
        WHERE brand = $1 AND partner = $2
        """,
        account.brand,
        account.partner,
        problem,
        refused,
        answered_ago,
    )


async def clock(conn: Connection) -> float:
    """Unix seconds by the database's clock."""
    return float(await conn.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8"))


# --------------------------------------------------------------------------- whom to look at


async def open_wallets(conn: Connection, account: Account) -> list[OpenWallet]:
    """Every wallet with open legs at the partner. operation_state_idx, then the primary keys of leg and partner_wallet."""
    rows = await conn.fetch(
        """
        SELECT l.wallet_id, count(*) AS legs, extract(epoch FROM max(o.registered_at))::float8 AS newest,
               (extract(epoch FROM min(l.requested_at)) * 1000)::bigint AS oldest_ms,
               extract(epoch FROM w.first_look_at)::float8 AS first_look, extract(epoch FROM w.last_look_at)::float8 AS last_look,
               extract(epoch FROM w.swept_at)::float8 AS swept
        FROM indexer.operation o
        JOIN indexer.leg l ON l.operation_id = o.id AND l.wallet_id IS NOT NULL AND l.kind = ANY ($3::text[])
        LEFT JOIN indexer.partner_wallet w ON w.brand = o.brand AND w.partner = $2 AND w.wallet = l.wallet_id
        WHERE o.brand = $1 AND o.state = ANY ($4::text[])
        GROUP BY l.wallet_id, w.first_look_at, w.last_look_at, w.swept_at
        """,
        account.brand,
        account.partner,
        kinds_of(account.partner),
        OPEN,
    )
    return [OpenWallet(*row) for row in rows]


def kinds_of(partner: str) -> list[str]:
    return {"keyban": ["keyban.mint", "keyban.burn"], "qiibee": ["qiibee.credit", "qiibee.debit"]}.get(partner, [])


async def idle_wallets(conn: Connection, account: Account, limit: int) -> list[OpenWallet]:
    """Wallets with nothing open whose next look is due, the longest due first. partner_wallet_due_idx."""
    rows = await conn.fetch(
        """
        SELECT wallet, 0, extract(epoch FROM active_at)::float8, 0::bigint, extract(epoch FROM first_look_at)::float8,
               extract(epoch FROM last_look_at)::float8, extract(epoch FROM swept_at)::float8
        FROM indexer.partner_wallet WHERE brand = $1 AND partner = $2 AND next_look_at < (SELECT clock_timestamp())
        ORDER BY next_look_at LIMIT $3
        """,
        account.brand,
        account.partner,
        limit,
    )
    return [OpenWallet(*row) for row in rows]


async def looked(
    conn: Connection, account: Account, wallets: Sequence[str], began: float, *, swept: bool, news: bool
) -> None:
    """A complete look at these wallets began at `began` (Unix seconds); `swept`: it counted for what is missing."""
    await conn.execute(
        """
        INSERT INTO indexer.partner_wallet AS w (brand, partner, wallet, first_look_at, last_look_at, swept_at, next_look_at)
        SELECT $1, $2, wallet, to_timestamp($4), to_timestamp($4), CASE WHEN $5 THEN to_timestamp($4) END,
               clock_timestamp() + make_interval(secs => $7)
        FROM unnest($3::text[]) AS wallet
        ON CONFLICT (brand, partner, wallet) DO UPDATE SET
            first_look_at = coalesce(w.first_look_at, excluded.first_look_at), last_look_at = excluded.last_look_at,
            swept_at = coalesce(excluded.swept_at, w.swept_at),
            active_at = CASE WHEN $6 THEN clock_timestamp() ELSE w.active_at END,
            next_look_at = clock_timestamp() + CASE WHEN $6 THEN make_interval(secs => $7)
                ELSE greatest(make_interval(secs => $7), (clock_timestamp() - w.active_at) / 10) END
        """,
        account.brand,
        account.partner,
        list(wallets),
        began,
        swept,
        news,
        IDLE_SECONDS,
    )


async def put_off(conn: Connection, account: Account, wallet: str) -> None:
    """A wallet with nothing open could not be looked at: others first, it again as if it had been."""
    await conn.execute(
        """
        UPDATE indexer.partner_wallet SET next_look_at = clock_timestamp() + make_interval(secs => $4)
        WHERE brand = $1 AND partner = $2 AND wallet = $3
        """,
        account.brand,
        account.partner,
        wallet,
        IDLE_SECONDS,
    )
