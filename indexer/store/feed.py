"""The stream of a brand's signals for those who pull: the numbered rows of the outbox, in the order of their numbers.

Nothing is filtered and nothing is left out: what was superseded stands there too, and says by what. All that a question
needs is read in one statement, so that an answer is of one instant. Nothing here waits or writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from indexer.store.connection import Connection


@dataclass(frozen=True, slots=True)
class Entry:
    """A numbered signal. `body` is the webhook's body, with `supersededBy` where a later signal took it back."""

    sequence: int
    body: bytes
    supersedes: UUID | None
    id: UUID


@dataclass(frozen=True, slots=True)
class Extent:
    """A brand's stream: which history it is of, the number from which on all are kept, and the last that was given.

    `oldest` is `last + 1` where nothing is kept. Below it a retention may have left some, with holes between them.
    """

    stream: UUID
    oldest: int
    last: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What follows `after`, as far as asked for."""

    extent: Extent
    after: int
    entries: list[Entry]


# The body as it is sent, down to the last digit: jsonb_set changes nothing but what it adds.
_BODY = """
    CASE WHEN o.superseded_by IS NULL THEN o.payload
         ELSE jsonb_set(o.payload, '{data,supersededBy}', to_jsonb(o.superseded_by::text)) END::text AS body
"""


async def read(
    conn: Connection, brand: str, after: int | None, *, limit: int, max_bytes: int, at_end: bool = False
) -> Reading | None:
    """Up to `limit` signals behind the number `after`, and no more than `max_bytes` of bodies, but one at least.

    `after` None: from the oldest that is kept; `at_end`: from the last on, so none. None: there is no such brand. Whether
    `after` is within the extent is the caller's to see. (brand_pk, outbox_sequence_idx)
    """
    rows = await conn.fetch(
        f"""
        WITH extent AS (
            SELECT i.stream, b.last_sequence AS last, b.forgotten_sequence + 1 AS oldest
            FROM indexer.brand b CROSS JOIN indexer.instance i WHERE b.name = $1
        ), asked AS (
            SELECT *, CASE WHEN $5 THEN last ELSE coalesce($2, oldest - 1) END AS after FROM extent
        )
        SELECT asked.*, page.sequence, page.body, page.supersedes, page.id
        FROM asked LEFT JOIN LATERAL (
            SELECT s.*, sum(octet_length(s.body)) OVER (ORDER BY s.sequence) - octet_length(s.body) AS before
            FROM (
                SELECT o.sequence, o.supersedes, o.id, {_BODY} FROM indexer.outbox o
                WHERE o.brand = $1 AND o.sequence > asked.after ORDER BY o.sequence LIMIT $3
            ) s
        ) page ON page.before < $4
        ORDER BY page.sequence
        """,  # noqa: S608 - a constant of this module
        brand, after, limit, max_bytes, at_end,
    )  # fmt: skip
    if not rows:
        return None
    first = rows[0]
    return Reading(
        Extent(first["stream"], first["oldest"], first["last"]),
        first["after"],
        [
            Entry(row["sequence"], row["body"].encode(), row["supersedes"], row["id"])
            for row in rows
            if row["sequence"] is not None
        ],
    )


async def news(conn: Connection, after: Mapping[str, int], *, limit: int) -> tuple[UUID, dict[str, list[Entry]]]:
    """The stream's identity, and for each brand up to `limit` signals behind the number given for it.

    One statement, one short index scan for each brand. (outbox_sequence_idx)
    """
    rows = await conn.fetch(
        f"""
        SELECT i.stream, page.brand, page.sequence, page.body, page.supersedes, page.id
        FROM indexer.instance i LEFT JOIN LATERAL (
            SELECT asked.brand, s.*
            FROM unnest($1::text[], $2::bigint[]) AS asked (brand, after)
            CROSS JOIN LATERAL (
                SELECT o.sequence, o.supersedes, o.id, {_BODY} FROM indexer.outbox o
                WHERE o.brand = asked.brand AND o.sequence > asked.after ORDER BY o.sequence LIMIT $3
            ) s
        ) page ON true
        ORDER BY page.brand, page.sequence
        """,  # noqa: S608
        list(after), list(after.values()), limit,
    )  # fmt: skip
    found: dict[str, list[Entry]] = {}
    for row in rows:
        if row["brand"] is not None:
            found.setdefault(row["brand"], []).append(
                Entry(row["sequence"], row["body"].encode(), row["supersedes"], row["id"])
            )
    return rows[0]["stream"], found
