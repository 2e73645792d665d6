"""The installation as one history of signals: what must be said and undone when a backup of it was put back.

`restored` is one transaction, and refuses while anybody holds a lease. A restored database remembers less than the world does:
nothing may be promised on it before a head has been linked to it, and nothing that it calls ready may be handed out before the
brand has told again what it handed out since the backup.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import msgspec

from indexer.store.connection import Connection

SHOWN = 100  # operations that are named one by one


class Holder(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A task that a process does, by the lease's own word."""

    task: str
    holder: UUID
    until: datetime


class StillRunning(Exception):
    """Daemons hold leases on this database: stop them first."""

    def __init__(self, holders: Sequence[Holder]) -> None:
        until = max(holder.until for holder in holders)
        tasks = ", ".join(f"{holder.task} (by {holder.holder})" for holder in holders)
        super().__init__(
            f"a daemon works on this database: {tasks}. Stop every daemon (they give their leases back), or wait until the last "
            f"lease of one that died has lapsed, at {until:%Y-%m-%d %H:%M:%S %Z}"
        )
        self.holders = list(holders)


class Held(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """An operation that is ready and not handed out, as far as the database remembers."""

    operation_id: UUID
    brand: str
    reference: str
    generation: int
    ready_at: datetime


class HeldBrand(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A brand whose operations are held: `before` is the restoration, `operations` how many are held just now."""

    brand: str
    before: datetime
    operations: int


class Restored(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """What a restoration did. `last_change`: the newest transition that the backup holds; later ones happened and are forgotten."""

    old_stream: UUID | None
    stream: UUID
    restored_at: datetime
    last_change: datetime | None
    leases: int
    claims: int
    brands: list[HeldBrand]
    held: list[Held]  # SHOWN at the most


async def restored(conn: Connection) -> Restored:
    """Begins a new history: another stream, void leases and claims, no chain live, every brand held. Raises StillRunning."""
    async with conn.transaction():
        # a daemon that asks for a lease now waits for us, and is given the epoch after ours
        rows = await conn.fetch(
            """
            SELECT task, holder, until, until > clock_timestamp() AS running FROM indexer.lease
            WHERE holder IS NOT NULL ORDER BY task FOR UPDATE
            """
        )
        if running := [Holder(task=r["task"], holder=r["holder"], until=r["until"]) for r in rows if r["running"]]:
            raise StillRunning(running)
        old = await conn.fetchval("SELECT stream FROM indexer.instance")
        stream = await conn.fetchval("UPDATE indexer.instance SET stream = gen_random_uuid() RETURNING stream")
        await conn.execute(
            "UPDATE indexer.lease SET holder = NULL, until = NULL, epoch = epoch + 1, sessions = '[]'::jsonb"
        )
        await conn.execute("UPDATE indexer.chain SET linked_epoch = NULL, head_at = NULL")
        claims = await conn.fetchval("SELECT indexer.void_claims()")
        now = await conn.fetchval("SELECT clock_timestamp()")
        # brands that left the configuration too: they may come back
        await conn.execute("UPDATE indexer.brand SET held_before = $1", now)
        return Restored(
            old_stream=old,
            stream=stream,
            restored_at=now,
            last_change=await conn.fetchval("SELECT at FROM indexer.history ORDER BY id DESC LIMIT 1"),
            leases=len(rows),
            claims=claims,
            brands=await held_brands(conn),
            held=await held(conn),
        )


async def held_brands(conn: Connection) -> list[HeldBrand]:
    """Brands that were not released since the last restoration."""
    rows = await conn.fetch(
        """
        SELECT b.name, b.held_before, (SELECT count(*) FROM indexer.held h WHERE h.brand = b.name) AS operations
        FROM indexer.brand b WHERE b.held_before IS NOT NULL ORDER BY b.name
        """
    )
    return [HeldBrand(brand=r["name"], before=r["held_before"], operations=r["operations"]) for r in rows]


async def held(conn: Connection, brand: str | None = None, limit: int = SHOWN) -> list[Held]:
    """Operations that are held now, oldest first."""
    rows = await conn.fetch(
        """
        SELECT operation_id, brand, reference, generation, ready_at FROM indexer.held
        WHERE $1::text IS NULL OR brand = $1 ORDER BY ready_at, operation_id LIMIT $2
        """,
        brand,
        limit,
    )
    return [Held(**row) for row in rows]


async def release(conn: Connection, brand: str | None = None) -> list[HeldBrand]:
    """A person's word that receipts are told again: what is still ready may be claimed. Returns what was held until now."""
    async with conn.transaction():
        released = [one for one in await held_brands(conn) if brand is None or one.brand == brand]
        await conn.execute(
            "UPDATE indexer.brand SET held_before = NULL WHERE name = ANY($1::text[])", [one.brand for one in released]
        )
        if released:
            await conn.execute("SELECT pg_notify('indexer_settled', '')")
    return released
