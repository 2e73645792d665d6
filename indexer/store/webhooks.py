"""Endpoints as the store knows them: configured or removed, paused or gone, and for how long nothing has arrived there.

Promises that a slip costs no signals: an endpoint that is paused, by a person or because it has failed for too long, still
gets its deliveries, and they wait; only one that answered 410 gets none. What is due where is told in `deliveries.py`;
URLs and secrets stay in the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import msgspec

from indexer.store.connection import Connection
from indexer.store.deliveries import Outcome

# Why an endpoint is disabled.
PAUSED: Final = "paused"
FAILING: Final = "failing"
GONE: Final = "gone"

# So many attempts must have failed before time alone pauses an endpoint: a quiet one is not judged by two.
LEAST_FAILURES: Final = 10

# Counting what waits stops here.
COUNT_LIMIT: Final = 10_000


@dataclass(frozen=True, slots=True)
class WebhookRow:
    """An endpoint of the configuration."""

    brand: str
    name: str
    events: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stopped:
    """An endpoint that gets nothing more until it is enabled: `why` is 'failing' or 'gone'."""

    brand: str
    webhook: str
    why: str
    reason: str


class Endpoint(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """How an endpoint is. `state`: active, paused (by a person), failing (paused for it), gone (410) or removed (from the
    configuration). `waiting` and `dead_letters` stop at COUNT_LIMIT. `failing_since`: nothing has arrived since then.
    """

    brand: str
    name: str
    events: list[str]
    state: str
    reason: str | None
    since: datetime | None
    failing_since: datetime | None
    failures: int
    waiting: int
    oldest_waiting: datetime | None  # when the oldest signal that waits was made
    dead_letters: int


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
    found = await conn.fetchval(
        """
        UPDATE indexer.webhook
           SET disabled_at = clock_timestamp(), disabled_as = $3, disabled_reason = 'paused by hand'
         WHERE brand = $1 AND name = $2 AND active RETURNING 1
        """,
        brand,
        name,
        PAUSED,
    )
    return found is not None


async def enable_webhook(conn: Connection, brand: str, name: str) -> bool:
    """Lets an endpoint's deliveries go on, at once and with a fresh schedule. False: there is no such endpoint."""
    async with conn.transaction():
        found = await conn.fetchval(
            """
            UPDATE indexer.webhook
               SET disabled_at = NULL, disabled_as = NULL, disabled_reason = NULL, failing_since = NULL, failures = 0
             WHERE brand = $1 AND name = $2 AND active RETURNING 1
            """,
            brand,
            name,
        )
        if found is None:
            return False
        await conn.execute(
            # delivery_order_idx; an attempt under way is left alone. One attempt stays on record: that it was begun matters.
            """
            UPDATE indexer.delivery SET attempts = 1, next_at = clock_timestamp()
             WHERE brand = $1 AND webhook = $2 AND state = 'pending' AND attempts > 0 AND ended_at IS NOT NULL
            """,
            brand,
            name,
        )
        await conn.execute("SELECT pg_notify('indexer_numbered', '')")
    return True


async def weigh(
    conn: Connection, outcomes: Sequence[Outcome], patience: Mapping[tuple[str, str], float]
) -> list[Stopped]:
    """What a turn's outcomes say of their endpoints: one that is gone gets nothing more, and one at which everything has
    failed for its `patience` (seconds, by brand and webhook) is paused. Returns those that this stopped.

    Belongs in the transaction that records the outcomes.
    """
    rows = await conn.fetch(
        # webhook_pk; an endpoint that is well is not written to
        """
        WITH outcome AS (
          SELECT brand, webhook, bool_or(arrived) AS arrived, count(*) FILTER (WHERE NOT arrived) AS failures,
                 max(seconds) AS seconds, max(patience) AS patience,
                 max(error) FILTER (WHERE gone) AS gone, (array_agg(error ORDER BY n DESC))[1] AS error
            FROM unnest($1::text[], $2::text[], $3::bool[], $4::bool[], $5::text[], $6::float8[], $7::float8[])
                 WITH ORDINALITY AS o(brand, webhook, arrived, gone, error, seconds, patience, n)
           GROUP BY brand, webhook
        ), scored AS (
          SELECT w.brand, w.name, o.gone, o.error, w.disabled_at IS NULL AS enabled,
                 CASE WHEN o.arrived THEN NULL
                      ELSE coalesce(w.failing_since, now() - make_interval(secs => o.seconds)) END AS failing_since,
                 CASE WHEN o.arrived THEN 0 ELSE w.failures + o.failures END AS failures, o.patience
            FROM outcome o JOIN indexer.webhook w ON w.brand = o.brand AND w.name = o.webhook
           WHERE NOT o.arrived OR o.gone IS NOT NULL OR w.failing_since IS NOT NULL
             FOR UPDATE OF w
        ), verdict AS (
          SELECT s.*, CASE
              WHEN gone IS NOT NULL AND enabled THEN $8
              WHEN enabled AND failures >= $10 AND failing_since < now() - make_interval(secs => patience) THEN $9
              END AS why
            FROM scored s
        )
        UPDATE indexer.webhook w
           SET failing_since = v.failing_since, failures = v.failures,
               disabled_at = CASE WHEN v.why IS NULL THEN w.disabled_at ELSE now() END,
               disabled_as = coalesce(v.why, w.disabled_as),
               disabled_reason = CASE v.why
                 WHEN $8 THEN v.gone
                 WHEN $9 THEN format('all of %s attempts since %s have failed, the last one with: %s', v.failures,
                                     to_char(v.failing_since AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), v.error)
                 ELSE w.disabled_reason END
          FROM verdict v WHERE w.brand = v.brand AND w.name = v.name
        RETURNING w.brand, w.name, v.why, w.disabled_reason
        """,
        [o.attempt.brand for o in outcomes],
        [o.attempt.webhook for o in outcomes],
        [o.state == "delivered" for o in outcomes],
        [o.gone for o in outcomes],
        [o.error for o in outcomes],
        [o.seconds for o in outcomes],
        [patience.get((o.attempt.brand, o.attempt.webhook), float("1e9")) for o in outcomes],
        GONE,
        FAILING,
        LEAST_FAILURES,
    )
    return [Stopped(row["brand"], row["name"], row["why"], row["disabled_reason"]) for row in rows if row["why"]]


async def list_webhooks(conn: Connection, brand: str | None = None) -> list[Endpoint]:
    """Every endpoint, those removed from the configuration too where something still waits for them."""
    rows = await conn.fetch(
        # webhook is as small as the configuration; delivery_waiting_idx, outbox_id_key, delivery_ended_idx
        """
        SELECT w.brand, w.name, w.events, w.disabled_reason AS reason, w.disabled_at AS since, w.failing_since, w.failures,
               CASE WHEN w.active THEN coalesce(w.disabled_as, 'active') ELSE 'removed' END AS state,
               waits.count AS waiting, oldest.created_at AS oldest_waiting, coalesce(dead.count, 0) AS dead_letters
          FROM indexer.webhook w
         CROSS JOIN LATERAL (
           SELECT count(*) FROM (
             SELECT FROM indexer.delivery d
              WHERE d.brand = w.brand AND d.webhook = w.name AND d.state = 'pending' AND d.sequence > 0 LIMIT $2) capped) waits
          LEFT JOIN LATERAL (
           SELECT o.created_at FROM (
             SELECT d.signal_id FROM indexer.delivery d
              WHERE d.brand = w.brand AND d.webhook = w.name AND d.state = 'pending' AND d.sequence > 0 ORDER BY d.sequence LIMIT 1) first
             JOIN indexer.outbox o ON o.id = first.signal_id) oldest ON true
          LEFT JOIN (
           SELECT brand, webhook, count(*) FROM (
             SELECT brand, webhook FROM indexer.delivery WHERE state = 'dead' ORDER BY ended_at DESC LIMIT $2) capped
            GROUP BY brand, webhook) dead ON dead.brand = w.brand AND dead.webhook = w.name
         WHERE ($1::text IS NULL OR w.brand = $1) AND (w.active OR waits.count > 0)
         ORDER BY w.brand, w.name
        """,
        brand,
        COUNT_LIMIT,
    )
    return [Endpoint(**row) for row in rows]
