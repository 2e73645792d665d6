"""What was learnt of each endpoint's limits: the SQL of the table `endpoint_limits`. No URL and no key is in it.

A row is found by a fingerprint of the endpoint's URL that cannot be turned back, salted with the installation's stream: an endpoint
whose URL or key changes is another one. What a limit means is for `chain/limits.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from indexer.store.connection import Connection


@dataclass(frozen=True, slots=True)
class Kept:
    """One endpoint's limits as they were stored. `firm_age`: how long ago those that only tighten last changed."""

    limits: Mapping[str, Any]
    firm_age: timedelta


async def salt(conn: Connection) -> bytes:
    stream = await conn.fetchval("SELECT stream FROM indexer.instance")
    return bytes(stream.bytes)


def fingerprint(salt: bytes, url: str) -> bytes:
    return hashlib.blake2b(url.encode(), key=salt, digest_size=16).digest()


async def load(conn: Connection, chain_id: int) -> dict[bytes, Kept]:
    """By fingerprint. (endpoint_limits_pk)"""
    rows = await conn.fetch(
        """
        SELECT fingerprint, limits, clock_timestamp() - firm_at AS age FROM indexer.endpoint_limits WHERE chain_id = $1
        """,
        chain_id,
    )
    return {row["fingerprint"]: Kept(row["limits"], row["age"]) for row in rows}


async def save(
    conn: Connection, chain_id: int, endpoints: Sequence[tuple[bytes, str, Mapping[str, Any], bool]]
) -> None:
    """Stores (fingerprint, shown name, limits, whether those that only tighten changed) of these endpoints. (endpoint_limits_pk)"""
    await conn.executemany(
        """
        INSERT INTO indexer.endpoint_limits AS e (chain_id, fingerprint, endpoint, limits) VALUES ($1, $2, $3, $4)
        ON CONFLICT (chain_id, fingerprint) DO UPDATE
        SET endpoint = excluded.endpoint, limits = excluded.limits, firm_at = CASE WHEN $5 THEN clock_timestamp() ELSE e.firm_at END
        """,
        [(chain_id, mark, name, dict(limits), firm) for mark, name, limits, firm in endpoints],
    )
