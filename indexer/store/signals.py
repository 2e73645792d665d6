"""The outbox and its endpoints: signals in, numbers given, deliveries fanned out, webhooks kept as configured.

A signal becomes visible outside only with its number, gapless per brand in the order of insertion (promise 4). Numbering
is a transaction of its own, so a brand's transaction that stays open delays nobody. Every function works inside the
caller's transaction; what becomes of a delivery afterwards is told in `deliveries.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import msgspec

from indexer.model.signal import HINTS, Signal
from indexer.store.connection import Connection

# The reason of a webhook that a person stopped for a while: deliveries are still made for it, and wait.
PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class Numbered:
    """What one round of numbering did: how many signals by brand, and how many deliveries they became."""

    signals: dict[str, int]
    deliveries: int


@dataclass(frozen=True, slots=True)
class WebhookRow:
    """An endpoint as the store knows it. Its URL and secrets stay in the configuration."""

    brand: str
    name: str
    events: tuple[str, ...]


async def append(conn: Connection, signals: Sequence[Signal]) -> list[UUID]:
    """Puts signals into the outbox in the order given, and marks what they supersede. Returns the ids that are new.

    Belongs in the transaction of the transitions. An id is derived from what the signal says, so appending one twice is
    appending it once. Call it once per transaction (the superseded rows are locked in
    position order, as the sequencer locks them).
    """
    if not signals:
        return []
    new = await conn.fetch(
        # ON CONFLICT leans on outbox_id_key; the ORDER BY gives positions in the caller's order
        """
        INSERT INTO indexer.outbox (id, brand, aggregatetype, aggregateid, type, payload, generation, supersedes)
        SELECT id, brand, aggregatetype, aggregateid, type, payload::jsonb, generation, supersedes
          FROM unnest($1::uuid[], $2::text[], $3::text[], $4::uuid[], $5::text[], $6::text[], $7::int[], $8::uuid[])
               WITH ORDINALITY AS s(id, brand, aggregatetype, aggregateid, type, payload, generation, supersedes, nth)
         ORDER BY nth
        ON CONFLICT (id) DO NOTHING
        RETURNING id
        """,
        [s.id for s in signals],
        [s.brand for s in signals],
        [s.aggregatetype for s in signals],
        [s.aggregateid for s in signals],
        [s.type for s in signals],
        [msgspec.json.encode(s.payload).decode() for s in signals],
        [s.generation for s in signals],
        [s.supersedes for s in signals],
    )
    superseding = [s for s in signals if s.supersedes is not None]
    if superseding:
        await conn.execute(
            # by outbox_id_key
            """
            WITH pair AS (
              SELECT * FROM unnest($1::uuid[], $2::uuid[]) AS pair(id, supersedes)
            ), held AS (
              SELECT o.position, pair.id FROM indexer.outbox o JOIN pair ON o.id = pair.supersedes
               WHERE o.superseded_by IS NULL ORDER BY o.position FOR UPDATE OF o
            )
            UPDATE indexer.outbox o SET superseded_by = held.id FROM held WHERE o.position = held.position
            """,
            [s.id for s in superseding],
            [s.supersedes for s in superseding],
        )
    if new:
        await conn.execute("SELECT pg_notify('indexer_settled', '')")
    return [row["id"] for row in new]


async def number(conn: Connection, *, limit: int = 1000) -> Numbered:
    """Numbers up to `limit` committed signals in the order of their insertion, and makes their deliveries.

    One statement: the counters' row locks keep even two unfenced sequencers from giving a number twice or leaving one
    out. An operation's signals are inserted under that operation's row lock, so their positions are in commit order;
    a row that commits late (another brand's, another operation's) is simply numbered later.
    """
    row = await conn.fetchrow(
        # outbox_unnumbered_idx finds the work, whatever the size of the outbox; webhook by its primary key's brand
        """
        WITH fresh AS (
          SELECT position, brand FROM indexer.outbox WHERE sequence IS NULL ORDER BY position LIMIT $1 FOR UPDATE
        ), counter AS (
          UPDATE indexer.brand b SET last_sequence = b.last_sequence + n.signals
            FROM (SELECT brand, count(*) AS signals FROM fresh GROUP BY brand) n
           WHERE b.name = n.brand
          RETURNING b.name, b.last_sequence - n.signals AS base
        ), ranked AS (
          SELECT f.position, c.base + row_number() OVER (PARTITION BY f.brand ORDER BY f.position) AS sequence
            FROM fresh f JOIN counter c ON c.name = f.brand
        ), numbered AS (
          UPDATE indexer.outbox o
             SET sequence = r.sequence,
                 payload = jsonb_set(
                   jsonb_set(o.payload, '{data,sequence}', to_jsonb(r.sequence)),
                   '{data,stream}', to_jsonb((SELECT stream FROM indexer.instance)::text))
            FROM ranked r WHERE o.position = r.position
          RETURNING o.id, o.brand, o.aggregateid, o.type, o.sequence
        ), fanned AS (
          INSERT INTO indexer.delivery (brand, webhook, signal_id, aggregateid, sequence, type)
          SELECT n.brand, w.name, n.id, n.aggregateid, n.sequence, n.type
            FROM numbered n JOIN indexer.webhook w ON w.brand = n.brand
           WHERE w.active AND (w.disabled_at IS NULL OR w.disabled_reason = $3) AND w.after_sequence < n.sequence
             -- a pattern never includes a hint: hints go where they are named
             AND EXISTS (
               SELECT FROM unnest(w.events) AS pattern
                WHERE pattern = n.type
                   OR (right(pattern, 1) = '*' AND starts_with(n.type, left(pattern, -1)) AND n.type <> ALL ($2)))
          ON CONFLICT DO NOTHING
          RETURNING 1
        )
        SELECT (SELECT coalesce(jsonb_object_agg(brand, signals), '{}')::text
                  FROM (SELECT brand, count(*) AS signals FROM numbered GROUP BY brand) AS by_brand) AS signals,
               (SELECT count(*) FROM fanned) AS deliveries
        """,
        limit,
        sorted(HINTS),
        PAUSED,
    )
    assert row is not None
    signals: dict[str, int] = msgspec.json.decode(row["signals"], type=dict[str, int])
    if signals:
        await conn.execute("SELECT pg_notify('indexer_numbered', '')")
    return Numbered(signals, row["deliveries"])


async def sync_webhooks(conn: Connection, webhooks: Sequence[WebhookRow]) -> None:
    """Makes the table say what the configuration says. A new endpoint starts at now; so does one that comes back.

    A removed endpoint keeps its pending deliveries, unsent: a slip in the configuration must not cost signals.
    The brands must exist.
    """
    names = [w.name for w in webhooks]
    brands = [w.brand for w in webhooks]
    await conn.execute(
        """
        INSERT INTO indexer.webhook AS w (brand, name, events, after_sequence)
        SELECT c.brand, c.name, ARRAY(SELECT jsonb_array_elements_text(c.events::jsonb)), b.last_sequence
          FROM unnest($1::text[], $2::text[], $3::text[]) AS c(brand, name, events)
          JOIN indexer.brand b ON b.name = c.brand
        ON CONFLICT (brand, name) DO UPDATE
           SET events = excluded.events, active = true,
               after_sequence = CASE WHEN w.active THEN w.after_sequence ELSE excluded.after_sequence END
        """,
        brands,
        names,
        [msgspec.json.encode(w.events).decode() for w in webhooks],
    )
    await conn.execute(
        """
        UPDATE indexer.webhook SET active = false
         WHERE active AND (brand, name) NOT IN (SELECT * FROM unnest($1::text[], $2::text[]))
        """,
        brands,
        names,
    )


async def pause_webhook(conn: Connection, brand: str, name: str) -> bool:
    """Holds an endpoint's deliveries until it is enabled again. False: there is no such endpoint."""
    return await _changed(
        conn,
        """
        UPDATE indexer.webhook SET disabled_at = clock_timestamp(), disabled_reason = $3
         WHERE brand = $1 AND name = $2 AND active RETURNING 1
        """,
        brand,
        name,
        PAUSED,
    )


async def enable_webhook(conn: Connection, brand: str, name: str) -> bool:
    """Lets an endpoint's deliveries go on, the waiting ones at once. False: there is no such endpoint."""
    found = await _changed(
        conn,
        """
        UPDATE indexer.webhook SET disabled_at = NULL, disabled_reason = NULL
         WHERE brand = $1 AND name = $2 AND active RETURNING 1
        """,
        brand,
        name,
    )
    if found:
        await conn.execute("SELECT pg_notify('indexer_numbered', '')")
    return found


async def redeliver(conn: Connection, signal_id: UUID, *, webhook: str | None = None) -> list[str]:
    """Sends a numbered signal again to one endpoint of its brand, or to all. Returns the endpoints' names.

    The id stays, so a receiver that took it once ignores it. A superseded `ready` is closed again, never sent. An
    attempt under way is left alone.
    """
    rows = await conn.fetch(
        """
        INSERT INTO indexer.delivery AS d (brand, webhook, signal_id, aggregateid, sequence, type)
        SELECT o.brand, w.name, o.id, o.aggregateid, o.sequence, o.type
          FROM indexer.outbox o JOIN indexer.webhook w ON w.brand = o.brand
         WHERE o.id = $1 AND o.sequence IS NOT NULL AND w.active AND ($2::text IS NULL OR w.name = $2)
        ON CONFLICT (brand, webhook, signal_id) DO UPDATE
           SET state = 'pending', attempts = 0, next_at = clock_timestamp(), error = NULL
         WHERE d.state <> 'pending' OR d.begun_at IS NULL OR d.ended_at IS NOT NULL
        RETURNING d.webhook
        """,
        signal_id,
        webhook,
    )
    if rows:
        await conn.execute("SELECT pg_notify('indexer_numbered', '')")
    return [row["webhook"] for row in rows]


async def forget_deliveries(conn: Connection, *, keep: timedelta, limit: int = 5000) -> int:
    """Deletes up to `limit` deliveries that ended longer ago than `keep`. Signals stay. Returns how many went."""
    rows = await conn.fetch(
        """
        DELETE FROM indexer.delivery WHERE ctid = ANY (ARRAY(
          SELECT ctid FROM indexer.delivery WHERE state <> 'pending' AND ended_at < now() - $1::interval LIMIT $2))
        RETURNING 1
        """,
        keep,
        limit,
    )
    return len(rows)


async def _changed(conn: Connection, query: str, *args: object) -> bool:
    return await conn.fetchval(query, *args) is not None
