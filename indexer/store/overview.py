"""The state of the installation as the store knows it: heads, history, leases and what waits to be sent. It feeds
`/v1/status`, `indexer status` and the gauges that speak for the whole database. Every query is bounded: it reads one row
a chain, lease, brand or emitter, or stops counting at a limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import msgspec
from prometheus_client import Gauge

from indexer.store import attestations, webhooks
from indexer.store.connection import Connection
from indexer.telemetry import Metrics

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Head(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """One of a chain's three heads. `lag_seconds` is between the block's time and the database's clock, never negative."""

    number: str
    hash: str | None
    time: datetime | None
    lag_seconds: float | None
    seen_at: datetime | None


class History(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """How much of what lies between the emitters' first blocks and finalized is covered, summed over emitters."""

    complete: bool
    emitters: int
    needed_blocks: str
    covered_blocks: str
    ratio: float | None


class Endpoint(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """How an endpoint stood when the chain's follower last looked. `live` ones have a vote, and so have `lagging` ones for as far as they
    are; those do not lead."""

    name: str
    role: Literal["primary", "fallback", "archive"]
    state: Literal["live", "lagging", "stuck", "apart", "failing", "quarantined", "unknown"]
    reason: str | None
    since: str | None = None  # RFC 3339: when it came to stand so
    behind_seconds: int | None = None  # of chain, behind the newest that is on our chain
    head: str | None
    leads: bool  # the one that the follower asks


class Witnesses(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """Whether as many endpoints as are `needed` hold what we hold, up to which block, and how each of several stands.

    Where they do not agree, facts go on and signals wait. A chain with one endpoint lists none.
    """

    needed: int
    agree: bool
    block_number: str | None
    agreed_at: datetime | None
    endpoints: list[Endpoint]


class Chain(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    chain_id: str
    name: str
    active: bool
    mode: str | None
    head: Head | None
    safe: Head | None
    finalized: Head | None
    live: bool  # False: no follower has linked a head lately, and no signal of readiness leaves for this chain
    latch: msgspec.Raw
    witnesses: Witnesses
    history: History


class Lease(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """Who does a task. `held` False: nobody does, or who did has let the time pass."""

    task: str
    holder: UUID | None
    epoch: int
    until: datetime | None
    held: bool


class Unsent(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """The oldest signal of a brand that an endpoint at work still waits for, or that has no number yet."""

    brand: str
    since: datetime
    seconds: float


class Difference(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """What a partner's API says otherwise than the chain, in words."""

    at: datetime
    what: str


class Partner(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A brand's account at a partner. `refused`: what its key is not accepted for, and is asked again by a probe alone."""

    brand: str
    partner: str
    answered_at: datetime | None  # the last usable answer
    problem: str | None
    refused: str | None
    refused_since: datetime | None
    differences: list[Difference]  # the latest of them


class Overview(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    now: datetime
    stream: UUID | None
    schema: str
    postgresql: str
    chains: list[Chain]
    unsent: list[Unsent]
    webhooks: list[webhooks.Endpoint]
    partners: list[Partner]
    leases: list[Lease]


# Blocks that each emitter needs and has, from its first block to finalized. The follower's lane (emitter '\x') speaks for
# each emitter from its `followed_from` on. All multirange arithmetic; coverage has a row or two an emitter.
_HISTORY = """
    SELECT e.chain_id, count(*) AS emitters,
           sum(r.needed)::numeric AS needed, sum(r.covered)::numeric AS covered
    FROM indexer.emitter e
    JOIN indexer.chain c ON c.chain_id = e.chain_id
    LEFT JOIN (
        SELECT chain_id, range_agg(blocks) AS blocks FROM indexer.coverage WHERE emitter = '\\x' GROUP BY chain_id
    ) lane ON lane.chain_id = e.chain_id
    LEFT JOIN (
        SELECT chain_id, emitter, range_agg(blocks) AS blocks FROM indexer.coverage GROUP BY chain_id, emitter
    ) own ON own.chain_id = e.chain_id AND own.emitter = e.address
    CROSS JOIN LATERAL (
        SELECT int8multirange(int8range(e.start_block, greatest(c.finalized_number + 1, e.start_block))) AS blocks
    ) wanted
    CROSS JOIN LATERAL (
        SELECT wanted.blocks * (coalesce(own.blocks, '{}')
               + CASE WHEN e.followed_from IS NULL THEN '{}'::int8multirange
                      ELSE coalesce(lane.blocks, '{}') * int8multirange(int8range(e.followed_from, NULL)) END) AS blocks
    ) had
    CROSS JOIN LATERAL (
        SELECT (SELECT coalesce(sum(upper(x) - lower(x)), 0) FROM unnest(wanted.blocks) x) AS needed,
               (SELECT coalesce(sum(upper(x) - lower(x)), 0) FROM unnest(had.blocks) x) AS covered
    ) r
    WHERE e.active AND c.finalized_number IS NOT NULL
    GROUP BY e.chain_id
"""

# The oldest signal of each brand that an endpoint at work waits for, or that has no number yet: outbox_unnumbered_idx, and
# delivery_waiting_idx for each endpoint. What a stopped endpoint holds is told with the endpoint.
_UNSENT = """
    SELECT brand, min(created_at) AS since, extract(epoch FROM clock_timestamp() - min(created_at))::float8 AS seconds
    FROM (
        SELECT o.brand, o.created_at FROM indexer.outbox o WHERE o.sequence IS NULL
        UNION ALL
        SELECT w.brand, o.created_at FROM indexer.webhook w
        CROSS JOIN LATERAL (
            SELECT d.signal_id FROM indexer.delivery d
            WHERE d.brand = w.brand AND d.webhook = w.name AND d.state = 'pending' AND d.sequence > 0 ORDER BY d.sequence LIMIT 1
        ) first
        JOIN indexer.outbox o ON o.id = first.signal_id -- outbox_id_key
        WHERE w.active AND w.disabled_at IS NULL
    ) waiting
    WHERE $1::text IS NULL OR brand = $1
    GROUP BY brand ORDER BY brand
"""


async def overview(conn: Connection, brand: str | None = None) -> Overview:
    """The installation as of one instant; `brand` narrows what is told of signals to one brand's, and leaves out leases that are
    named for brands (the pollers').
    """
    async with conn.transaction(isolation="repeatable_read", readonly=True):
        row = await conn.fetchrow(
            """
            SELECT clock_timestamp() AS now, (SELECT stream FROM indexer.instance) AS stream,
                   (SELECT version_num FROM indexer.alembic_version) AS schema, current_setting('server_version') AS server
            """
        )
        assert row is not None
        chains = await conn.fetch(
            """
            SELECT chain_id, name, active, mode, latch::text AS latch, history_complete, indexer.is_live(chain) AS live,
                   quorum, indexer.is_agreed(chain) AS agree, agreed_number, agreed_at, endpoints,
                   head_number, head_hash, head_time_ms, head_at, safe_number, safe_hash, safe_time_ms, safe_at,
                   finalized_number, finalized_hash, finalized_time_ms, finalized_at,
                   extract(epoch FROM clock_timestamp()) * 1000 AS now_ms
            FROM indexer.chain ORDER BY name
            """
        )
        history = {entry["chain_id"]: entry for entry in await conn.fetch(_HISTORY)}
        unsent = await conn.fetch(_UNSENT, brand)
        endpoints = await webhooks.list_webhooks(conn, brand)
        partners = await conn.fetch(
            """
            SELECT brand, partner, polled_at AS answered_at, problem, stopped_reason AS refused, stopped_at AS refused_since,
                   coalesce(state -> 'differences', '[]') AS differences
            FROM indexer.partner_account WHERE active AND ($1::text IS NULL OR brand = $1) ORDER BY brand, partner
            """,
            brand,
        )
        leases = await conn.fetch(
            """
            SELECT task, holder, epoch, until, holder IS NOT NULL AND coalesce(until > clock_timestamp(), false) AS held
            FROM indexer.lease WHERE $1::text IS NULL OR task NOT LIKE 'poll:%' ORDER BY task
            """,
            brand,
        )
    return Overview(
        now=row["now"],
        stream=row["stream"],
        schema=row["schema"],
        postgresql=row["server"],
        chains=[_chain(entry, history.get(entry["chain_id"])) for entry in chains],
        unsent=[Unsent(**entry) for entry in unsent],
        webhooks=endpoints,
        partners=[_partner(entry) for entry in partners],
        leases=[Lease(**entry) for entry in leases],
    )


def _partner(row: Any) -> Partner:
    told = [
        Difference(at=datetime.fromtimestamp(float(each["at"]), UTC), what=each["what"]) for each in row["differences"]
    ]
    return Partner(**{**row, "differences": told})


def _chain(row: Any, history: Any) -> Chain:
    needed, covered = (int(history["needed"]), int(history["covered"])) if history is not None else (0, 0)
    return Chain(
        chain_id=str(row["chain_id"]),
        name=row["name"],
        active=row["active"],
        mode=row["mode"],
        head=_head(row, "head"),
        safe=_head(row, "safe"),
        finalized=_head(row, "finalized"),
        live=row["live"],
        latch=msgspec.Raw((row["latch"] or "null").encode()),
        witnesses=Witnesses(
            needed=row["quorum"],
            agree=row["agree"],
            block_number=None if row["agreed_number"] is None else str(row["agreed_number"]),
            agreed_at=row["agreed_at"],
            endpoints=[Endpoint(**each) for each in row["endpoints"] or []],
        ),
        history=History(
            complete=row["history_complete"],
            emitters=history["emitters"] if history is not None else 0,
            needed_blocks=str(needed),
            covered_blocks=str(covered),
            ratio=round(covered / needed, 6) if needed else None,
        ),
    )


def _head(row: Any, which: str) -> Head | None:
    if row[f"{which}_number"] is None:
        return None
    time_ms, hash_ = row[f"{which}_time_ms"], row[f"{which}_hash"]
    return Head(
        number=str(row[f"{which}_number"]),
        hash="0x" + hash_.hex() if hash_ is not None else None,
        time=_EPOCH + timedelta(milliseconds=time_ms) if time_ms is not None else None,
        lag_seconds=round(max(0.0, (float(row["now_ms"]) - time_ms) / 1000), 3) if time_ms is not None else None,
        seen_at=row[f"{which}_at"],
    )


# ------------------------------------------------------------------------------------------------ gauges

# Counting stops here: past it, a gauge says "very many", at a cost that does not grow with history.
COUNT_LIMIT = 100_000
RECENT_MOVEMENTS = 10_000

_OPEN_STATES = ("pending", "submitted", "confirming", "incomplete", "ready", "reverted", "conflict")
_STATES = (*_OPEN_STATES, "fulfilled", "expired", "cancelled")


async def observe_database(conn: Connection, metrics: Metrics) -> None:
    """Sets the gauges that speak for the whole database: for the holder of the lease that reports them, a few times a
    minute. `unmatched` counts among each chain's latest RECENT_MOVEMENTS events, newer than the brand's
    `unmatched_since`; a history is in the view `loyalty.unmatched`.
    """
    brands: list[str] = [row["name"] for row in await conn.fetch("SELECT name FROM indexer.brand ORDER BY name")]
    # operation_state_idx: an index-only scan for each brand and state, ended by the limit
    counted = await conn.fetch(
        """
        SELECT b.name AS brand, s.state, n.operations
        FROM indexer.brand b CROSS JOIN unnest($1::text[]) AS s (state)
        CROSS JOIN LATERAL (
            SELECT count(*) AS operations FROM (
                SELECT FROM indexer.operation o WHERE o.brand = b.name AND o.state = s.state LIMIT $2
            ) capped
        ) n
        """,
        _STATES,
        COUNT_LIMIT,
    )
    for row in counted:
        metrics.operations.labels(row["brand"], row["state"]).set(row["operations"])

    # operation_state_idx: the first entry of each brand and open state
    oldest = await conn.fetch(
        """
        SELECT b.name AS brand, min(o.registered_at) AS since
        FROM indexer.brand b CROSS JOIN unnest($1::text[]) AS s (state)
        CROSS JOIN LATERAL (
            SELECT p.registered_at FROM indexer.operation p WHERE p.brand = b.name AND p.state = s.state
            ORDER BY p.registered_at LIMIT 1
        ) o
        GROUP BY b.name
        """,
        _OPEN_STATES,
    )
    open_since = {row["brand"]: row["since"].timestamp() for row in oldest}
    unsent_since = {row["brand"]: row["since"].timestamp() for row in await conn.fetch(_UNSENT, None)}
    for brand in brands:
        metrics.saw_oldest_open(brand, open_since.get(brand))
        metrics.saw_oldest_unsent(brand, unsent_since.get(brand))
    _observe_endpoints(metrics, brands, await webhooks.list_webhooks(conn))

    exposed = await conn.fetch("SELECT brand, count(*) AS exposures FROM loyalty.exposures GROUP BY brand")
    _set(metrics.exposures, brands, {row["brand"]: row["exposures"] for row in exposed})

    # movement_pk, backwards from each chain's end; claim_log_idx. Below `safe` only: above it a claim may still come.
    unmatched = await conn.fetch(
        """
        SELECT i.brand, count(*) AS unmatched
        FROM indexer.chain c
        CROSS JOIN LATERAL (
            SELECT m.block_number, m.log_index, m.block_hash, m.issuer, m.block_time_ms FROM indexer.movement m
            WHERE m.chain_id = c.chain_id AND m.block_number <= c.safe_number AND m.canonical
            ORDER BY m.block_number DESC, m.log_index DESC LIMIT $1
        ) m
        JOIN indexer.issuer i ON i.address = m.issuer
        JOIN indexer.brand b ON b.name = i.brand
        WHERE m.block_time_ms >= extract(epoch FROM b.unmatched_since) * 1000
          AND NOT EXISTS (
              SELECT FROM indexer.claim k
              WHERE k.chain_id = c.chain_id AND k.block_number = m.block_number AND k.log_index = m.log_index
                AND k.block_hash = m.block_hash)
        GROUP BY i.brand
        """,
        RECENT_MOVEMENTS,
    )
    _set(metrics.unmatched, brands, {row["brand"]: row["unmatched"] for row in unmatched})

    waiting = await attestations.waiting(conn)
    for row in await conn.fetch("SELECT chain_id, name FROM indexer.chain"):
        metrics.unattested.labels(row["name"]).set(waiting.get(row["chain_id"], 0))

    metrics.touched.set(
        await conn.fetchval("SELECT count(*) FROM (SELECT FROM indexer.touched_operation LIMIT $1) capped", COUNT_LIMIT)
    )


def _observe_endpoints(metrics: Metrics, brands: Sequence[str], endpoints: Sequence[webhooks.Endpoint]) -> None:
    """Dead letters, and what stopped endpoints hold: counted apart, so that a pause does not look like a backlog."""
    metrics.webhooks_stopped.clear()
    held: dict[str, float] = {}
    for one in endpoints:
        metrics.dead_letters.labels(one.brand, one.name).set(one.dead_letters)
        if one.state != "active":
            metrics.webhooks_stopped.labels(one.brand, one.name, one.state).set(1)
            if one.oldest_waiting is not None:
                since = one.oldest_waiting.timestamp()
                held[one.brand] = min(held.get(one.brand, since), since)
    for brand in brands:
        metrics.saw_oldest_held(brand, held.get(brand))


def _set(gauge: Gauge, brands: Sequence[str], values: Mapping[str, int]) -> None:
    """A value for each brand: one that has none any more goes back to zero."""
    for brand in brands:
        gauge.labels(brand).set(values.get(brand, 0))
