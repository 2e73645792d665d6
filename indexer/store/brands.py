"""Brands and their issuers as configured, where SQL can see them: an issuer belongs to one brand.

Also under which settling rules a brand's operations were last looked at, and the way through those that other rules concern.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from indexer.model.types import Address, hex0x
from indexer.store.connection import Connection


@dataclass(frozen=True, slots=True)
class ConfiguredBrand:
    """`unmatched_since`: evidence older than this is never signalled as unmatched; None: since first configured."""

    name: str
    issuers: tuple[Address, ...]
    unmatched_since: datetime | None


class IssuerMoved(Exception):
    """The configuration gives an issuer to a brand, and the database knows it as another's with open operations."""

    def __init__(self, issuer: bytes, was: str, becomes: str, open_operations: int) -> None:
        super().__init__(
            f"issuer {hex0x(issuer)} belongs to brand {was}, which waits for {open_operations} of its operations; "
            f"settle or cancel those before giving it to {becomes}"
        )


async def sync_brands(conn: Connection, brands: Sequence[ConfiguredBrand]) -> None:
    """Makes the tables say what the configuration says. Brands that left it stay, inactive. Raises IssuerMoved."""
    await conn.execute(
        """
        INSERT INTO indexer.brand AS b (name, unmatched_since)
        SELECT name, coalesce(since, clock_timestamp()) FROM unnest($1::text[], $2::timestamptz[]) AS c (name, since)
        ON CONFLICT (name) DO UPDATE SET active = true
        """,
        [brand.name for brand in brands],
        [brand.unmatched_since for brand in brands],
    )
    await conn.execute(
        """
        UPDATE indexer.brand b SET unmatched_since = c.since FROM unnest($1::text[], $2::timestamptz[]) AS c (name, since)
        WHERE b.name = c.name AND c.since IS NOT NULL AND b.unmatched_since <> c.since
        """,
        [brand.name for brand in brands],
        [brand.unmatched_since for brand in brands],
    )
    await conn.execute(
        "UPDATE indexer.brand SET active = false WHERE name <> ALL ($1::text[])", [brand.name for brand in brands]
    )
    wanted: Mapping[Address, str] = {issuer: brand.name for brand in brands for issuer in brand.issuers}
    moved = await conn.fetchrow(
        """
        SELECT i.address, i.brand, w.brand AS becomes,
               (SELECT count(*) FROM indexer.leg l JOIN indexer.operation o ON o.id = l.operation_id
                WHERE l.issuer = i.address AND o.state IN ('pending', 'submitted', 'confirming', 'incomplete', 'ready', 'reverted', 'conflict')) AS open
        FROM indexer.issuer i JOIN unnest($1::bytea[], $2::text[]) AS w (address, brand) ON w.address = i.address AND w.brand <> i.brand
        """,
        list(wanted),
        list(wanted.values()),
    )
    if moved is not None and moved["open"]:
        raise IssuerMoved(moved["address"], moved["brand"], moved["becomes"], moved["open"])
    await conn.execute("DELETE FROM indexer.issuer WHERE address <> ALL ($1::bytea[])", list(wanted))
    await conn.execute(
        """
        INSERT INTO indexer.issuer (address, brand) SELECT * FROM unnest($1::bytea[], $2::text[])
        ON CONFLICT (address) DO UPDATE SET brand = excluded.brand
        """,
        list(wanted),
        list(wanted.values()),
    )


# --------------------------------------------------------------------------- rules that changed

# States in which rules still decide something; `ready` and `fulfilled` have been promised.
UNSETTLED: Final = ("pending", "submitted", "confirming", "incomplete", "conflict", "reverted")

Walked = tuple[datetime, UUID]  # registered_at and id of the last operation
_FIRST: Final[Walked] = (datetime(1970, 1, 1, tzinfo=UTC), UUID(int=0))


async def rules_seen(conn: Connection) -> dict[str, str | None]:
    """By brand, the fingerprint of the rules that all its open operations were looked at under."""
    return {row["name"]: row["rules"] for row in await conn.fetch("SELECT name, rules FROM indexer.brand")}


async def set_rules_seen(conn: Connection, marks: Mapping[str, str]) -> None:
    await conn.execute(
        "UPDATE indexer.brand b SET rules = m.rules FROM unnest($1::text[], $2::text[]) AS m (name, rules) WHERE b.name = m.name",
        list(marks),
        list(marks.values()),
    )


async def touch_in_state(
    conn: Connection, brand: str, state: str, after: Walked | None, limit: int
) -> tuple[int, Walked | None]:
    """Touches a brand's next operations in a state, oldest registration first. Returns how many, and where to go on."""
    rows = await conn.fetch(
        # operation_state_idx
        """
        WITH page AS MATERIALIZED (
            SELECT id, registered_at FROM indexer.operation
            WHERE brand = $1 AND state = $2 AND (registered_at, id) > ($3, $4) ORDER BY registered_at, id LIMIT $5),
        touched AS (INSERT INTO indexer.touched_operation (operation_id) SELECT id FROM page)
        SELECT registered_at, id FROM page ORDER BY registered_at, id
        """,
        brand,
        state,
        *(after or _FIRST),
        limit,
    )
    return len(rows), (rows[-1]["registered_at"], rows[-1]["id"]) if len(rows) == limit else None


async def touch_closed_and_watched(
    conn: Connection, brands: Sequence[str], after: UUID | None, limit: int
) -> tuple[int, UUID | None]:
    """Of the next operations with alarms, touches the brands' expired and cancelled ones: their evidence still grows older."""
    row = await conn.fetchrow(
        # alarm_pk, operation_pk
        """
        WITH page AS MATERIALIZED (
            SELECT DISTINCT operation_id FROM indexer.alarm WHERE operation_id > $2 ORDER BY operation_id LIMIT $3),
        touched AS (
            INSERT INTO indexer.touched_operation (operation_id)
            SELECT o.id FROM page JOIN indexer.operation o ON o.id = page.operation_id
            WHERE o.brand = ANY($1::text[]) AND o.state IN ('expired', 'cancelled') RETURNING 1)
        SELECT (SELECT count(*) FROM touched) AS touched, (SELECT count(*) FROM page) AS seen,
               (SELECT operation_id FROM page ORDER BY operation_id DESC LIMIT 1) AS last
        """,
        list(brands),
        after or UUID(int=0),
        limit,
    )
    assert row is not None
    return row["touched"], row["last"] if row["seen"] == limit else None
