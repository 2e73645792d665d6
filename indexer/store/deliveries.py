"""What is due at which endpoint, in which order, and what became of it: the dispatcher's two transactions.

Promises: an operation's signals are attempted at an endpoint one at a time, in the order of their numbers; a `ready` that
was taken back is not attempted again; an attempt is on record before it begins. `next_at` of an attempt under way is
when it must have ended, so a successor of a dispatcher that died takes up its attempts then and not before. What rests on
a chain in doubt is set aside, whatever its time, and costs nothing until `recall` finds the doubt gone. Only the holder of
the lease `deliver` calls `recall`, `begin` and `record`, inside its leased transactions; what a response means is not decided
here, nor (`webhooks.py`) what it says of the endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal
from uuid import UUID

import asyncpg

from indexer.model.signal import FULFILLED, HINTS, READY, RESTORED, REVERTED
from indexer.store.connection import Connection

# Seconds between the end of an attempt's allowance and the moment from which another may begin.
MARGIN = 1.0


@dataclass(frozen=True, slots=True)
class Room:
    """How many attempts may begin at an endpoint now, and how many seconds each may take."""

    brand: str
    webhook: str
    free: int
    timeout: float


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt that is on record and may be made. `body` is exactly what the outbox holds."""

    brand: str
    webhook: str
    signal_id: UUID
    type: str
    number: int  # 1 for the first
    replay: bool  # asked for by a person after it had been dealt with
    body: str


@dataclass(frozen=True, slots=True)
class Closed:
    """A delivery that ended without another attempt: 'superseded', or 'dropped' for a late hint."""

    brand: str
    webhook: str
    signal_id: UUID
    type: str
    state: str


@dataclass(frozen=True, slots=True)
class Turn:
    """What one look at the queue did. `progress`: look again, there may be more behind it. `set_aside`: something rests on a
    chain in doubt, and waits for `recall`.
    """

    attempts: list[Attempt]
    closed: list[Closed]
    progress: bool
    set_aside: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an attempt, after so many `seconds`. `retry_in`: seconds, when it stays pending. `gone`: the endpoint
    wants no more. `answer`: the first bytes of the body, as text that is safe to print.
    """

    attempt: Attempt
    state: Literal["delivered", "pending", "dead"]
    status: int | None
    error: str | None
    retry_in: float = 0.0
    gone: bool = False
    seconds: float = 0.0
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class FirstReady:
    """A `ready` that reached its first endpoint: how many seconds after it was decided, and the kind of its first leg."""

    brand: str
    kind: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Recalled:
    """How many deliveries came back from being set aside, and whether any are left there."""

    count: int
    waiting: bool


async def recall(conn: asyncpg.Connection, limit: int = 1000) -> Recalled:
    """Takes up again what was set aside for a chain that is not in doubt any more, up to `limit` of them.

    delivery_awaits_idx: two looks for each chain, however many wait.
    """
    row = await conn.fetchrow(
        """
        WITH back AS (
          UPDATE indexer.delivery d SET awaits = NULL WHERE d.awaits IS NOT NULL AND d.ctid = ANY (ARRAY(
            SELECT d.ctid FROM indexer.chain c
             CROSS JOIN LATERAL (VALUES ('latch:' || c.chain_id, true), ('live:' || c.chain_id, indexer.is_live(c))) AS met(word, so)
             CROSS JOIN LATERAL (SELECT d.ctid FROM indexer.delivery d WHERE d.awaits = met.word LIMIT $1) d
             WHERE c.latch IS NULL AND met.so
             LIMIT $1))
          RETURNING 1)
        SELECT (SELECT count(*) FROM back) AS count, EXISTS (SELECT FROM indexer.delivery WHERE awaits IS NOT NULL) AS waiting
        """,
        limit,
    )
    assert row is not None
    return Recalled(row["count"], row["waiting"])


async def begin(conn: asyncpg.Connection, rooms: Sequence[Room]) -> Turn:
    """Judges the oldest pending delivery of each operation with something due, and puts on record what may begin.

    One statement. `due` finds work per endpoint, so that a sick endpoint's backlog hides nobody else's; the head of each
    such operation is judged in its place; what waits behind a head is put off, or set aside, as long as the head is, and called
    when the head is closed, so that nothing is looked at twice in vain. A `reverted` goes with the `ready` that it takes back
    if no attempt of that was ever begun here, unless the brand fulfilled meanwhile on another way: that is an exposure.
    """
    rows = await conn.fetch(
        # due: delivery_due_idx; oldest, busy, operation: delivery_order_idx; outdated, fulfilled: outbox_aggregate_idx
        """
        WITH room AS (
          SELECT * FROM unnest($1::text[], $2::text[], $3::int[], $4::float8[]) AS room(brand, webhook, free, allowance)
        ), due AS (
          SELECT DISTINCT c.brand, c.webhook, c.aggregateid, room.allowance
            FROM room
            JOIN indexer.webhook w ON w.brand = room.brand AND w.name = room.webhook AND w.active AND w.disabled_at IS NULL
           CROSS JOIN LATERAL (
             -- what is being taken back is passed over, not counted: a reconciler that stands still holds up nobody else
             SELECT d.brand, d.webhook, d.aggregateid FROM indexer.delivery d JOIN indexer.outbox o ON o.id = d.signal_id
              WHERE d.brand = room.brand AND d.webhook = room.webhook AND d.state = 'pending' AND d.awaits IS NULL
                AND d.next_at <= now()
              ORDER BY d.next_at LIMIT room.free FOR SHARE OF o SKIP LOCKED) c
        ), head AS (
          SELECT d.brand, d.webhook, d.signal_id, d.aggregateid, d.type, d.attempts, d.next_at, d.begun_at, due.allowance,
                 o.position, o.superseded_by, o.supersedes, o.payload, (
                   SELECT max(b.next_at) FROM indexer.delivery b
                    WHERE b.brand = d.brand AND b.webhook = d.webhook AND b.aggregateid = d.aggregateid
                      AND b.state = 'pending' AND b.begun_at IS NOT NULL AND b.ended_at IS NULL AND b.next_at > now()
                 ) AS busy_until
            FROM due
           CROSS JOIN LATERAL (
             SELECT h.signal_id FROM indexer.delivery h
              WHERE h.brand = due.brand AND h.webhook = due.webhook AND h.aggregateid = due.aggregateid
                AND h.state = 'pending'
              ORDER BY h.sequence LIMIT 1) oldest
            JOIN indexer.delivery d
              ON d.brand = due.brand AND d.webhook = due.webhook AND d.signal_id = oldest.signal_id
            JOIN indexer.outbox o ON o.id = d.signal_id
               -- `append` wants the signal's row for itself to take it back: either it has committed, and is seen here, or it waits
               -- until this attempt is on record; while it is under way, the operation is passed over and looked at again
               FOR UPDATE OF d SKIP LOCKED FOR SHARE OF o SKIP LOCKED
        ), judged AS (
          SELECT h.*, doubt, CASE
              WHEN busy_until IS NOT NULL THEN 'wait'
              WHEN type IN ($6, $7) AND superseded_by IS NOT NULL THEN 'superseded'
              WHEN type = $8 AND EXISTS (
                     SELECT FROM indexer.delivery r JOIN indexer.outbox ro ON ro.id = r.signal_id
                      WHERE r.brand = h.brand AND r.webhook = h.webhook AND r.signal_id = h.supersedes
                        AND r.state = 'superseded' AND r.begun_at IS NULL
                        AND NOT EXISTS (
                          SELECT FROM indexer.outbox f
                           WHERE f.aggregateid = h.aggregateid AND f.position > ro.position AND f.position < h.position
                             AND f.type = $9)) THEN 'superseded'
              WHEN type = ANY ($5) AND EXISTS (
                     SELECT FROM indexer.outbox later
                      WHERE later.aggregateid = h.aggregateid AND later.position > h.position) THEN 'dropped'
              WHEN next_at > now() THEN 'wait'
              WHEN doubt IS NOT NULL THEN 'set aside'
              ELSE 'begin' END AS verdict,
              coalesce(busy_until, CASE WHEN next_at > now() THEN next_at ELSE now() + make_interval(secs => h.allowance) END) AS until
            FROM head h
           CROSS JOIN LATERAL (
             -- a `ready` that was made before a restart waits until somebody has looked whether its blocks still stand
             SELECT min(CASE WHEN c.latch IS NOT NULL THEN 'latch:' ELSE 'live:' END || c.chain_id) AS doubt
               FROM (
                 SELECT l.chain_id FROM indexer.leg l WHERE l.operation_id = h.aggregateid
                 UNION
                 SELECT k.chain_id FROM indexer.claim k WHERE k.operation_id = h.aggregateid -- a partner's record on a chain
               ) e JOIN indexer.chain c ON c.chain_id = e.chain_id
              WHERE (c.latch IS NOT NULL OR h.type IN ($6, $7) AND NOT indexer.is_live(c))) chain
        ), closed AS (
          UPDATE indexer.delivery d SET state = j.verdict, ended_at = now(), awaits = NULL
            FROM judged j
           WHERE d.brand = j.brand AND d.webhook = j.webhook AND d.signal_id = j.signal_id
             AND j.verdict IN ('superseded', 'dropped')
        ), begun AS (
          UPDATE indexer.delivery d
             SET attempts = d.attempts + 1, begun_at = clock_timestamp(), ended_at = NULL, next_at = j.until, awaits = NULL
            FROM judged j
           WHERE d.brand = j.brand AND d.webhook = j.webhook AND d.signal_id = j.signal_id AND j.verdict = 'begin'
        ), operation AS (
          SELECT j.verdict, j.until, j.doubt, j.signal_id AS head, p.* FROM judged j
           CROSS JOIN LATERAL (
             -- OFFSET 0: one look by the index for each operation, however few the planner believes to be pending
             SELECT p.ctid AS place, p.signal_id FROM indexer.delivery p
              WHERE p.brand = j.brand AND p.webhook = j.webhook AND p.aggregateid = j.aggregateid AND p.state = 'pending'
              OFFSET 0) p
        ), moved AS (
          UPDATE indexer.delivery d
             SET awaits = CASE o.verdict WHEN 'set aside' THEN o.doubt WHEN 'superseded' THEN NULL WHEN 'dropped' THEN NULL ELSE d.awaits END,
                 next_at = CASE WHEN o.verdict IN ('wait', 'begin') THEN greatest(d.next_at, o.until)
                                WHEN o.verdict IN ('superseded', 'dropped') AND d.attempts = 0 THEN now()
                                ELSE d.next_at END
            FROM operation o
           WHERE d.ctid = o.place
             AND CASE WHEN o.verdict = 'set aside' THEN d.awaits IS DISTINCT FROM o.doubt
                      WHEN o.verdict = 'wait' THEN d.next_at < o.until
                      WHEN o.signal_id = o.head THEN false -- begun or closed above
                      WHEN o.verdict = 'begin' THEN d.next_at < o.until
                      ELSE d.awaits IS NOT NULL OR d.attempts = 0 AND d.next_at > now() END
        )
        SELECT verdict, brand, webhook, signal_id, type, attempts + 1 AS number,
               attempts = 0 AND begun_at IS NOT NULL AS replay,
               CASE WHEN verdict = 'begin' THEN payload::text END AS body
          FROM judged
        """,
        [room.brand for room in rooms],
        [room.webhook for room in rooms],
        [room.free for room in rooms],
        [room.timeout + MARGIN for room in rooms],
        sorted(HINTS),
        READY,
        RESTORED,
        REVERTED,
        FULFILLED,
    )
    attempts: list[Attempt] = []
    closed: list[Closed] = []
    for row in rows:
        if row["verdict"] == "begin":
            attempts.append(
                Attempt(
                    row["brand"],
                    row["webhook"],
                    row["signal_id"],
                    row["type"],
                    row["number"],
                    row["replay"],
                    row["body"],
                )
            )
        elif row["verdict"] in ("superseded", "dropped"):
            closed.append(Closed(row["brand"], row["webhook"], row["signal_id"], row["type"], row["verdict"]))
    return Turn(attempts, closed, progress=bool(rows), set_aside=any(row["verdict"] == "set aside" for row in rows))


async def next_due(conn: asyncpg.Connection, rooms: Sequence[Room]) -> float | None:
    """Seconds until something falls due at one of these endpoints; None when nothing waits there."""
    seconds: float | None = await conn.fetchval(
        # delivery_due_idx, one row per endpoint
        """
        SELECT extract(epoch FROM min(d.next_at) - clock_timestamp())::float8
          FROM unnest($1::text[], $2::text[]) AS room(brand, webhook)
          JOIN indexer.webhook w ON w.brand = room.brand AND w.name = room.webhook AND w.active AND w.disabled_at IS NULL
         CROSS JOIN LATERAL (
           SELECT next_at FROM indexer.delivery d
            WHERE d.brand = room.brand AND d.webhook = room.webhook AND d.state = 'pending' AND d.awaits IS NULL
            ORDER BY next_at LIMIT 1) d
        """,
        [room.brand for room in rooms],
        [room.webhook for room in rooms],
    )
    return seconds


async def record(conn: asyncpg.Connection, outcomes: Sequence[Outcome]) -> list[FirstReady]:
    """Stores what became of attempts, keeps each as a row of its own, and calls what waited behind a closed delivery.

    Returns the `ready` signals that reached an endpoint for the first time, to be observed after the commit.
    """
    rows = await conn.fetch(
        # delivery_pk, delivery_order_idx; the attempt's number keeps a late outcome from overwriting a later attempt's
        """
        WITH outcome AS (
          SELECT * FROM unnest($1::text[], $2::text[], $3::uuid[], $4::int[], $5::text[], $6::int[], $7::text[],
                               $8::float8[], $9::bool[], $10::float8[], $11::text[])
                   AS o(brand, webhook, signal_id, number, state, status, error, retry_in, replay, seconds, answer)
        ), ended AS (
          UPDATE indexer.delivery d
             SET state = o.state, status = o.status, error = o.error, ended_at = now(), awaits = NULL,
                 next_at = now() + make_interval(secs => o.retry_in)
            FROM outcome o
           WHERE d.brand = o.brand AND d.webhook = o.webhook AND d.signal_id = o.signal_id
             AND d.state = 'pending' AND d.attempts = o.number
          RETURNING d.brand, d.webhook, d.signal_id, d.aggregateid, d.type, d.state, d.begun_at,
                    o.replay, o.number, o.seconds, o.status, o.error, o.answer
        ), kept AS (
          INSERT INTO indexer.delivery_attempt (brand, webhook, signal_id, number, begun_at, seconds, status, error, answer)
          SELECT brand, webhook, signal_id, number, begun_at, seconds, status, error, answer FROM ended ORDER BY begun_at
        ), called AS (
          -- also behind what will not be tried again: a `ready` that was taken back, or a hint, while it was under way
          UPDATE indexer.delivery d SET next_at = now()
            FROM ended e JOIN indexer.outbox o ON o.id = e.signal_id
           CROSS JOIN LATERAL (
             SELECT p.ctid AS place FROM indexer.delivery p
              WHERE p.brand = e.brand AND p.webhook = e.webhook AND p.aggregateid = e.aggregateid AND p.state = 'pending'
                AND p.signal_id <> e.signal_id OFFSET 0) p
           WHERE d.ctid = p.place AND d.attempts = 0 AND d.next_at > now()
             AND (e.state <> 'pending' OR o.superseded_by IS NOT NULL OR e.type = ANY ($13))
        )
        SELECT DISTINCT ON (e.signal_id) e.brand,
               coalesce(o.payload #>> '{data,operation,legs,0,kind}', 'unknown') AS kind,
               greatest(0, extract(epoch FROM now() - o.created_at))::float8 AS seconds
          FROM ended e JOIN indexer.outbox o ON o.id = e.signal_id
         WHERE e.type = $12 AND e.state = 'delivered' AND NOT e.replay
           AND NOT EXISTS (
             SELECT FROM indexer.delivery other
              WHERE other.signal_id = e.signal_id AND other.webhook <> e.webhook AND other.state = 'delivered')
        """,
        [o.attempt.brand for o in outcomes],
        [o.attempt.webhook for o in outcomes],
        [o.attempt.signal_id for o in outcomes],
        [o.attempt.number for o in outcomes],
        [o.state for o in outcomes],
        [o.status for o in outcomes],
        [o.error for o in outcomes],
        [o.retry_in for o in outcomes],
        [o.attempt.replay for o in outcomes],
        [o.seconds for o in outcomes],
        [o.answer for o in outcomes],
        READY,
        sorted(HINTS),
    )
    return [FirstReady(row["brand"], row["kind"], row["seconds"]) for row in rows]


async def forget(conn: Connection, *, keep: timedelta, limit: int = 5000) -> int:
    """Deletes up to `limit` rows older than `keep`: deliveries that ended (dead letters too), attempts, and what an
    endpoint that was removed from the configuration left unsent. Signals stay. Returns how many went: `limit` means that
    there may be more.
    """
    gone = await _deleted(
        conn,
        # delivery_ended_idx; a row that is asked for again meanwhile has another ctid, and stays
        """
        DELETE FROM indexer.delivery WHERE state <> 'pending' AND ctid = ANY (ARRAY(
          SELECT d.ctid FROM unnest('{delivered,superseded,dropped,dead}'::text[]) AS ended(state)
           CROSS JOIN LATERAL (
             SELECT d.ctid FROM indexer.delivery d
              WHERE d.state <> 'pending' AND d.state = ended.state AND d.ended_at < now() - $1::interval
              ORDER BY d.ended_at LIMIT $2) d
           LIMIT $2))
        """,
        keep,
        limit,
    )
    if gone < limit:
        gone += await _deleted(
            conn,
            # delivery_attempt_pk: the oldest rows have the lowest ids
            """
            DELETE FROM indexer.delivery_attempt WHERE begun_at < now() - $1::interval AND id = ANY (ARRAY(
              SELECT id FROM indexer.delivery_attempt ORDER BY id LIMIT $2))
            """,
            keep,
            limit - gone,
        )
    if gone < limit:
        gone += await _deleted(
            conn,
            # delivery_waiting_idx, for each endpoint that is gone
            """
            DELETE FROM indexer.delivery WHERE state = 'pending' AND ctid = ANY (ARRAY(
              SELECT d.ctid FROM indexer.webhook w
               CROSS JOIN LATERAL (
                 SELECT d.ctid FROM indexer.delivery d
                  WHERE d.brand = w.brand AND d.webhook = w.name AND d.state = 'pending' AND d.sequence > 0
                    AND d.next_at < now() - $1::interval LIMIT $2) d
               WHERE NOT w.active LIMIT $2))
            """,
            keep,
            limit - gone,
        )
    return gone


async def _deleted(conn: Connection, query: str, *args: object) -> int:
    return int((await conn.execute(query, *args)).rpartition(" ")[2])
