"""The outbox: signals in, numbers given, deliveries fanned out, and what a person asks of either.

A signal becomes visible outside only with its number, gapless per brand in the order of insertion (promise 4). Numbering
is a transaction of its own, so a brand's transaction that stays open delays nobody. Every function works inside the
caller's transaction; what becomes of a delivery afterwards is told in `deliveries.py`, of an endpoint in `webhooks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import msgspec

from indexer.model.signal import HINTS, Signal
from indexer.store.connection import Connection
from indexer.store.webhooks import GONE

# Whether endpoint `w` wants signal `o`; $2 are the hints. A pattern never includes a hint: hints go where they are named.
_WANTED = """
    EXISTS (
      SELECT FROM unnest(w.events) AS pattern
       WHERE pattern = o.type
          OR (right(pattern, 1) = '*' AND starts_with(o.type, left(pattern, -1)) AND o.type <> ALL ($2)))
"""

STATES = ("pending", "delivered", "superseded", "dropped", "dead")
MAX_LIST = 1000


class Delivery(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """What became of a signal at one endpoint. `next_at`: of the next attempt, or by when the one under way has ended.
    `awaits`: 'latch:8453' or 'live:8453' while nothing is sent because that chain is in doubt.
    """

    webhook: str
    state: str
    attempts: int
    next_at: datetime | None
    awaits: str | None
    begun_at: datetime | None
    ended_at: datetime | None
    status: int | None
    error: str | None


class AttemptMade(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """One attempt whose end was recorded; `answer` is the first bytes of the body, controls escaped."""

    webhook: str
    number: int
    begun_at: datetime
    seconds: float
    status: int | None
    error: str | None
    answer: str | None


class Listed(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A signal of the outbox and its deliveries; `attempts` only where one signal is asked for."""

    id: UUID
    brand: str
    sequence: int | None
    type: str
    operation_id: UUID | None
    generation: int
    supersedes: UUID | None
    superseded_by: UUID | None
    created_at: datetime
    deliveries: list[Delivery]
    attempts: list[AttemptMade] | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True)
class Numbered:
    """What one round of numbering did: how many signals by brand, and how many deliveries they became."""

    signals: dict[str, int]
    deliveries: int


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
         WHERE NOT EXISTS (SELECT FROM indexer.forgotten_signal f WHERE f.id = s.id) -- sent, and deleted since
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
        f"""
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
                   jsonb_set(o.payload, '{{data,sequence}}', to_jsonb(r.sequence)),
                   '{{data,stream}}', to_jsonb((SELECT stream FROM indexer.instance)::text))
            FROM ranked r WHERE o.position = r.position
          RETURNING o.id, o.brand, o.aggregateid, o.type, o.sequence
        ), fanned AS (
          INSERT INTO indexer.delivery (brand, webhook, signal_id, aggregateid, sequence, type)
          SELECT o.brand, w.name, o.id, o.aggregateid, o.sequence, o.type
            FROM numbered o JOIN indexer.webhook w ON w.brand = o.brand
           WHERE w.active AND w.disabled_as IS DISTINCT FROM $3 AND w.after_sequence < o.sequence AND {_WANTED}
          ON CONFLICT DO NOTHING
          RETURNING 1
        )
        SELECT (SELECT coalesce(jsonb_object_agg(brand, signals), '{{}}')::text
                  FROM (SELECT brand, count(*) AS signals FROM numbered GROUP BY brand) AS by_brand) AS signals,
               (SELECT count(*) FROM fanned) AS deliveries
        """,  # noqa: S608 - a constant of ours
        limit,
        sorted(HINTS),
        GONE,
    )
    assert row is not None
    signals: dict[str, int] = msgspec.json.decode(row["signals"], type=dict[str, int])
    if signals:
        await conn.execute("SELECT pg_notify('indexer_numbered', '')")
    return Numbered(signals, row["deliveries"])


async def redeliver(conn: Connection, signal_id: UUID, *, webhook: str | None = None) -> list[str]:
    """Sends a numbered signal again to one endpoint of its brand, or to all that want its type. Returns their names.

    The id stays, so a receiver that took it once ignores it. A superseded `ready` is closed again, never sent. An
    attempt under way is left alone.
    """
    rows = await conn.fetch(
        f"""
        INSERT INTO indexer.delivery AS d (brand, webhook, signal_id, aggregateid, sequence, type)
        SELECT o.brand, w.name, o.id, o.aggregateid, o.sequence, o.type
          FROM indexer.outbox o JOIN indexer.webhook w ON w.brand = o.brand
         WHERE o.id = $1 AND o.sequence IS NOT NULL AND w.active AND coalesce(w.name = $3, {_WANTED})
        ON CONFLICT (brand, webhook, signal_id) DO UPDATE
           SET state = 'pending', attempts = 0, next_at = clock_timestamp(), error = NULL
         WHERE d.state <> 'pending' OR d.begun_at IS NULL OR d.ended_at IS NOT NULL
        RETURNING d.webhook
        """,  # noqa: S608 - a constant of ours
        signal_id,
        sorted(HINTS),
        webhook,
    )
    if rows:
        await conn.execute("SELECT pg_notify('indexer_numbered', '')")
    return [row["webhook"] for row in rows]


async def redeliver_dead(conn: Connection, brand: str, webhook: str) -> int:
    """Takes up all dead letters of an endpoint again, with a fresh schedule, in their order. Returns how many they are."""
    status = await conn.execute(
        # delivery_ended_idx
        """
        UPDATE indexer.delivery SET state = 'pending', attempts = 0, next_at = clock_timestamp(), error = NULL
         WHERE state <> 'pending' AND state = 'dead' AND brand = $1 AND webhook = $2
        """,
        brand,
        webhook,
    )
    found = int(status.rpartition(" ")[2])
    if found:
        await conn.execute("SELECT pg_notify('indexer_numbered', '')")
    return found


# ------------------------------------------------------------------------------------------------ what there is


async def list_signals(
    conn: Connection,
    *,
    brand: str | None = None,
    operation: UUID | None = None,
    webhook: str | None = None,
    state: str | None = None,
    limit: int = 50,
) -> list[Listed]:
    """Signals with their deliveries: the newest first; with `state`, those that have a delivery in it (at `webhook`, where
    that is given), the pending ones oldest first.
    """
    where = (brand, webhook, state)
    if operation is not None:
        # outbox_aggregate_idx
        ids = await conn.fetch(
            """
            SELECT o.id FROM indexer.outbox o
             WHERE o.aggregateid = $1 AND ($2::text IS NULL OR o.brand = $2)
               AND ($3::text IS NULL AND $4::text IS NULL OR EXISTS (
                 SELECT FROM indexer.delivery d
                  WHERE d.signal_id = o.id AND ($3::text IS NULL OR d.webhook = $3) AND ($4::text IS NULL OR d.state = $4)))
             ORDER BY o.position DESC LIMIT $5
            """,
            operation,
            *where,
            limit,
        )
    elif state == "pending":
        # delivery_waiting_idx, for each endpoint
        ids = await conn.fetch(
            """
            SELECT d.signal_id AS id FROM indexer.webhook w
             CROSS JOIN LATERAL (
               SELECT d.signal_id, d.sequence FROM indexer.delivery d
                WHERE d.brand = w.brand AND d.webhook = w.name AND d.state = 'pending' AND d.sequence > 0 ORDER BY d.sequence LIMIT $3) d
             WHERE ($1::text IS NULL OR w.brand = $1) AND ($2::text IS NULL OR w.name = $2)
             GROUP BY d.signal_id ORDER BY min(d.sequence) LIMIT $3
            """,
            brand,
            webhook,
            limit,
        )
    elif state is not None:
        # delivery_ended_idx, backwards
        ids = await conn.fetch(
            """
            SELECT d.signal_id AS id FROM indexer.delivery d
             WHERE d.state <> 'pending' AND d.state = $3
               AND ($1::text IS NULL OR d.brand = $1) AND ($2::text IS NULL OR d.webhook = $2)
             ORDER BY d.ended_at DESC LIMIT $4
            """,
            *where,
            limit,
        )
    elif brand is not None:
        # outbox_sequence_idx, backwards: those without a number come first
        ids = await conn.fetch(
            "SELECT id FROM indexer.outbox WHERE brand = $1 ORDER BY sequence DESC LIMIT $2", brand, limit
        )
    else:
        # outbox_pk, backwards
        ids = await conn.fetch("SELECT id FROM indexer.outbox ORDER BY position DESC LIMIT $1", limit)
    return await _listed(conn, list(dict.fromkeys(row["id"] for row in ids)))


async def show_signal(conn: Connection, signal_id: UUID) -> Listed | None:
    """One signal with its deliveries and every attempt that is still kept, the oldest first."""
    found = await _listed(conn, [signal_id])
    if not found:
        return None
    attempts = await conn.fetch(
        # delivery_attempt_signal_idx
        """
        SELECT webhook, number, begun_at, seconds, status, error, answer
          FROM indexer.delivery_attempt WHERE signal_id = $1 ORDER BY id
        """,
        signal_id,
    )
    return msgspec.structs.replace(found[0], attempts=[AttemptMade(**row) for row in attempts])


async def _listed(conn: Connection, ids: Sequence[UUID]) -> list[Listed]:
    """By outbox_id_key and delivery_signal_idx, in the order given."""
    rows = await conn.fetch(
        """
        SELECT o.id, o.brand, o.sequence, o.type, o.generation, o.supersedes, o.superseded_by, o.created_at,
               CASE WHEN o.aggregatetype = 'operation' THEN o.aggregateid END AS operation_id
          FROM unnest($1::uuid[]) WITH ORDINALITY AS asked(id, nth) JOIN indexer.outbox o ON o.id = asked.id
         ORDER BY asked.nth
        """,
        ids,
    )
    deliveries: dict[UUID, list[Delivery]] = {}
    for row in await conn.fetch(
        """
        SELECT signal_id, webhook, state, attempts, CASE WHEN state = 'pending' AND awaits IS NULL THEN next_at END AS next_at, awaits,
               begun_at, ended_at, status, error
          FROM indexer.delivery WHERE signal_id = ANY ($1::uuid[]) ORDER BY webhook
        """,
        ids,
    ):
        deliveries.setdefault(row["signal_id"], []).append(
            Delivery(**{name: value for name, value in row.items() if name != "signal_id"})
        )
    return [Listed(**row, deliveries=deliveries.get(row["id"], [])) for row in rows]
