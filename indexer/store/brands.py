"""Brands and their issuers as configured, where SQL can see them: an issuer belongs to one brand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

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
