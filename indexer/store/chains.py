"""Where following a chain stands: its row, its held headers, its emitters, the tags and the latch.

Every function works on the connection it is given; the writing ones belong inside a leased transaction and never begin or
commit by themselves. Facts, and the cursor that speaks for them, are moved by `facts.commit_step` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import asyncpg

from indexer.model.types import Address, BlockRef, Hash32, Header, Schedule
from indexer.store.connection import Connection


@dataclass(frozen=True, slots=True)
class ChainState:
    """The chain's row: where following stands. `cursor` is the last block that is in head coverage."""

    chain_id: int
    genesis_hash: Hash32 | None
    schedule: Schedule | None
    cursor: BlockRef | None
    cursor_time_ms: int | None
    safe: BlockRef | None
    finalized: BlockRef | None
    finalized_time_ms: int | None
    latch: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Emitter:
    """A contract whose logs count: `followed_from` is the first block whose head coverage speaks for it.

    As configured, one for each factory that it may speak for; as loaded, one for each address, `factory` the first of them.
    """

    address: Address
    kind: Literal["factory", "hub", "token"]
    factory: Address
    start_block: int
    followed_from: int | None = None


@dataclass(frozen=True, slots=True)
class Programme:
    """A token and the only programme that it may speak for."""

    token: Address
    factory: Address
    issuer: Address
    loyalty_id: Hash32


# --------------------------------------------------------------------------- reading


def _ref(number: int | None, block_hash: bytes | None) -> BlockRef | None:
    return None if number is None or block_hash is None else BlockRef(number, Hash32(block_hash))


async def load_chain(conn: Connection, chain_id: int) -> ChainState | None:
    row = await conn.fetchrow(
        """
        SELECT genesis_hash, schedule, head_number, head_hash, head_time_ms, safe_number, safe_hash,
               finalized_number, finalized_hash, finalized_time_ms, latch
        FROM indexer.chain WHERE chain_id = $1
        """,
        chain_id,
    )
    if row is None:
        return None
    schedule = row["schedule"]
    return ChainState(
        chain_id=chain_id,
        genesis_hash=None if row["genesis_hash"] is None else Hash32(row["genesis_hash"]),
        schedule=None if schedule is None else Schedule(schedule["l2_time"], schedule["first_fast_block"]),
        cursor=_ref(row["head_number"], row["head_hash"]),
        cursor_time_ms=row["head_time_ms"],
        safe=_ref(row["safe_number"], row["safe_hash"]),
        finalized=_ref(row["finalized_number"], row["finalized_hash"]),
        finalized_time_ms=row["finalized_time_ms"],
        latch=row["latch"],
    )


async def load_emitters(conn: asyncpg.Connection, chain_id: int) -> list[Emitter]:
    """The active ones: who is in the filters."""
    rows = await conn.fetch(
        """
        SELECT address, kind, factory, start_block, followed_from FROM indexer.emitter
        WHERE chain_id = $1 AND active ORDER BY start_block, address
        """,
        chain_id,
    )
    return [
        Emitter(Address(r["address"]), r["kind"], Address(r["factory"]), r["start_block"], r["followed_from"])
        for r in rows
    ]


async def load_speakers(conn: asyncpg.Connection, chain_id: int) -> dict[bytes, frozenset[bytes]]:
    """The configured contracts, and the factories that each may speak for."""
    rows = await conn.fetch(
        """
        SELECT r.address, array_agg(r.factory) AS factories
        FROM indexer.emitter_role AS r JOIN indexer.emitter AS e ON e.chain_id = r.chain_id AND e.address = r.address AND e.active
        WHERE r.chain_id = $1 GROUP BY r.address
        """,
        chain_id,
    )
    return {r["address"]: frozenset(r["factories"]) for r in rows}


async def any_unfollowed(conn: asyncpg.Connection, chain_id: int) -> bool:
    """Whether some active emitter is not yet said to be in the follower's filter: history found it."""
    return bool(
        await conn.fetchval(
            "SELECT EXISTS (SELECT FROM indexer.emitter WHERE chain_id = $1 AND active AND followed_from IS NULL)",
            chain_id,
        )
    )


async def load_programmes(conn: asyncpg.Connection, chain_id: int, upto: int | None = None) -> list[Programme]:
    """Tokens announced in canonical blocks by factories that are still configured; of two announcements the first.

    `upto`: only what was announced up to that block (a reorganisation above it is being followed).
    """
    rows = await conn.fetch(
        """
        SELECT DISTINCT ON (p.loyalty) p.loyalty, p.factory, p.issuer, p.loyalty_id
        FROM indexer.programme AS p JOIN indexer.emitter AS e ON e.chain_id = p.chain_id AND e.address = p.loyalty AND e.active
        WHERE p.chain_id = $1 AND p.canonical AND ($2::bigint IS NULL OR p.block_number <= $2) ORDER BY p.loyalty, p.block_number, p.log_index
        """,
        chain_id,
        upto,
    )
    return [
        Programme(Address(r["loyalty"]), Address(r["factory"]), Address(r["issuer"]), Hash32(r["loyalty_id"]))
        for r in rows
    ]


async def held(conn: asyncpg.Connection, chain_id: int, number: int) -> BlockRef | None:
    """Our canonical header at exactly this height."""
    # block_canonical_idx
    block_hash = await conn.fetchval(
        "SELECT hash FROM indexer.block WHERE chain_id = $1 AND number = $2 AND canonical", chain_id, number
    )
    return _ref(number, block_hash)


async def held_above(conn: asyncpg.Connection, chain_id: int, number: int) -> BlockRef | None:
    """Our lowest canonical header above this height (block_canonical_idx)."""
    row = await conn.fetchrow(
        "SELECT number, hash FROM indexer.block WHERE chain_id = $1 AND number > $2 AND canonical ORDER BY number LIMIT 1",
        chain_id,
        number,
    )
    return None if row is None else BlockRef(row["number"], Hash32(row["hash"]))


async def held_at_or_below(conn: asyncpg.Connection, chain_id: int, number: int) -> BlockRef | None:
    """Our highest canonical block that is not above this height: of a header, or of an event (history stores no headers)."""
    # block_canonical_idx and the primary keys of the event tables, each read backwards by one row
    row = await conn.fetchrow(
        """
        SELECT number, hash FROM (
            (SELECT number, hash FROM indexer.block
             WHERE chain_id = $1 AND number <= $2 AND canonical ORDER BY number DESC LIMIT 1)
            UNION ALL
            (SELECT block_number, block_hash FROM indexer.movement
             WHERE chain_id = $1 AND block_number <= $2 AND canonical ORDER BY block_number DESC LIMIT 1)
            UNION ALL
            (SELECT block_number, block_hash FROM indexer.transfer
             WHERE chain_id = $1 AND block_number <= $2 AND canonical ORDER BY block_number DESC LIMIT 1)
            UNION ALL
            (SELECT block_number, block_hash FROM indexer.programme
             WHERE chain_id = $1 AND block_number <= $2 AND canonical ORDER BY block_number DESC LIMIT 1)
        ) AS ours ORDER BY number DESC LIMIT 1
        """,
        chain_id,
        number,
    )
    return None if row is None else BlockRef(row["number"], Hash32(row["hash"]))


async def store_headers(conn: asyncpg.Connection, chain_id: int, headers: Iterable[Header]) -> None:
    """Inserts headers as canonical; one that an earlier reorganisation undid and that returns is canonical again."""
    listed = list(headers)
    if listed:
        await conn.execute(
            """
            INSERT INTO indexer.block AS b (chain_id, number, hash, parent_hash, time_ms)
            SELECT $1, * FROM unnest($2::bigint[], $3::bytea[], $4::bytea[], $5::bigint[])
            ON CONFLICT (chain_id, number, hash) DO UPDATE SET canonical = true WHERE NOT b.canonical
            """,
            chain_id,
            [h.number for h in listed],
            [h.hash for h in listed],
            [h.parent_hash for h in listed],
            [h.time_ms for h in listed],
        )


# --------------------------------------------------------------------------- configuration → rows


async def ensure_chain(
    conn: asyncpg.Connection, chain_id: int, name: str, genesis_hash: Hash32 | None, schedule: Schedule | None
) -> None:
    """Writes who the chain is. The genesis hash, once known, stays: comparing it is the caller's check."""
    stated = None if schedule is None else asdict(schedule)
    await conn.execute(
        """
        INSERT INTO indexer.chain AS c (chain_id, name, genesis_hash, schedule) VALUES ($1, $2, $3, $4)
        ON CONFLICT (chain_id) DO UPDATE
        SET name = excluded.name, active = true, genesis_hash = coalesce(c.genesis_hash, excluded.genesis_hash),
            schedule = excluded.schedule
        """,
        chain_id,
        name,
        genesis_hash,
        stated,
    )


async def sync_chains(conn: Connection, configured: Sequence[tuple[int, str]]) -> None:
    """Makes (chain id, name) of the configuration the active chains, so that operations can be registered on one that no
    endpoint has answered for yet. Who the chain is, `ensure_chain` writes. A name that another chain had is taken from it."""
    await conn.execute(
        """
        UPDATE indexer.chain AS c SET name = c.name || ' (' || c.chain_id || ')'
        FROM unnest($1::bigint[], $2::text[]) AS n (chain_id, name) WHERE c.name = n.name AND c.chain_id <> n.chain_id
        """,
        [chain_id for chain_id, _ in configured],
        [name for _, name in configured],
    )
    await conn.execute(
        """
        INSERT INTO indexer.chain AS c (chain_id, name) SELECT * FROM unnest($1::bigint[], $2::text[])
        ON CONFLICT (chain_id) DO UPDATE SET name = excluded.name, active = true
        """,
        [chain_id for chain_id, _ in configured],
        [name for _, name in configured],
    )
    await conn.execute(
        "UPDATE indexer.chain SET active = false WHERE chain_id <> ALL ($1::bigint[]) AND active",
        [chain_id for chain_id, _ in configured],
    )


async def sync_emitters(conn: Connection, chain_id: int, configured: Sequence[Emitter]) -> None:
    """Makes the configured factories and hubs, and the tokens of these factories, the active emitters.

    One that leaves the configuration keeps what was covered: its share of the head lane becomes its own coverage, and
    `followed_from` is cleared, so that the blocks it misses are a gap if it returns. One that may speak for a further factory
    loses it: what it said of that factory was dropped, so all is read again.
    """
    roles = {(e.address, e.factory): e for e in configured}
    addresses = list(dict.fromkeys(e.address for e in configured))
    factories = [e.address for e in configured if e.kind == "factory"]
    await conn.execute(
        """
        INSERT INTO indexer.coverage AS c (chain_id, emitter, verdict, blocks)
        SELECT $1, e.address, lane.verdict, lane.blocks * int8multirange(int8range(e.followed_from, NULL))
        FROM indexer.emitter AS e JOIN indexer.coverage AS lane ON lane.chain_id = e.chain_id AND lane.emitter = ''
        WHERE e.chain_id = $1 AND e.active AND e.followed_from IS NOT NULL
          AND NOT (e.address = ANY($2::bytea[]) OR (e.kind = 'token' AND e.factory = ANY($3::bytea[])))
        ON CONFLICT (chain_id, emitter, verdict) DO UPDATE SET blocks = c.blocks + excluded.blocks
        """,
        chain_id,
        addresses,
        factories,
    )
    await conn.execute(
        """
        UPDATE indexer.emitter SET active = false, followed_from = NULL
        WHERE chain_id = $1 AND active AND NOT (address = ANY($2::bytea[]) OR (kind = 'token' AND factory = ANY($3::bytea[])))
        """,
        chain_id,
        addresses,
        factories,
    )
    await _sync_roles(conn, chain_id, addresses, list(roles.values()))
    rows = []
    for address in addresses:
        own = [e for e in roles.values() if e.address == address]
        named = next((e for e in own if e.kind == "factory"), own[0])
        rows.append((address, named.kind, named.factory, min(e.start_block for e in own)))
    await conn.execute(
        """
        INSERT INTO indexer.emitter AS e (chain_id, address, kind, factory, start_block)
        SELECT $1, address, kind, factory, start_block
        FROM unnest($2::bytea[], $3::text[], $4::bytea[], $5::bigint[]) AS wanted (address, kind, factory, start_block)
        ON CONFLICT (chain_id, address) DO UPDATE
        SET kind = excluded.kind, factory = excluded.factory, start_block = excluded.start_block, active = true
        """,
        chain_id,
        *([row[column] for row in rows] for column in range(4)),
    )
    await conn.execute(
        "UPDATE indexer.emitter SET active = true WHERE chain_id = $1 AND NOT active AND kind = 'token' AND factory = ANY($2::bytea[])",
        chain_id,
        factories,
    )


async def _sync_roles(conn: Connection, chain_id: int, addresses: Sequence[Address], roles: Sequence[Emitter]) -> None:
    """An address that leaves the configuration keeps its roles: nothing is covered while it is away."""
    columns = ([e.address for e in roles], [e.factory for e in roles], [e.start_block for e in roles])
    await conn.execute(
        """
        DELETE FROM indexer.emitter_role AS r
        WHERE r.chain_id = $1 AND r.address = ANY($2::bytea[])
          AND NOT EXISTS (SELECT FROM unnest($3::bytea[], $4::bytea[]) AS w (address, factory)
                          WHERE w.address = r.address AND w.factory = r.factory)
        """,
        chain_id,
        addresses,
        *columns[:2],
    )
    rows = await conn.fetch(
        """
        INSERT INTO indexer.emitter_role AS r (chain_id, address, factory, start_block)
        SELECT $1, address, factory, start_block FROM unnest($2::bytea[], $3::bytea[], $4::bigint[]) AS w (address, factory, start_block)
        ON CONFLICT (chain_id, factory, address) DO UPDATE SET start_block = excluded.start_block
        RETURNING r.address, (xmax = 0) AS added
        """,
        chain_id,
        *columns,
    )
    if grown := [row["address"] for row in rows if row["added"]]:
        await conn.execute(
            "UPDATE indexer.emitter SET followed_from = NULL WHERE chain_id = $1 AND address = ANY($2::bytea[])",
            chain_id,
            grown,
        )
        await conn.execute(
            "DELETE FROM indexer.coverage WHERE chain_id = $1 AND emitter = ANY($2::bytea[])", chain_id, grown
        )


async def set_followed(conn: asyncpg.Connection, chain_id: int, addresses: Sequence[Address], first: int) -> None:
    """From block `first` on, these are in the follower's filter: the head lane speaks for them."""
    await conn.execute(
        """
        UPDATE indexer.emitter SET followed_from = $3
        WHERE chain_id = $1 AND address = ANY($2::bytea[]) AND followed_from IS NULL AND active
        """,
        chain_id,
        list(addresses),
        first,
    )


# --------------------------------------------------------------------------- tags, latch, pruning


async def set_tags(conn: asyncpg.Connection, chain_id: int, safe: Header | None, finalized: Header | None) -> list[str]:
    """Raises `safe` and `finalized`, each only forward, only up to the cursor, and only onto the chain that we hold.

    Answers the names of the tags that moved. A tag whose hash is not the one we hold at its height is left alone: either a
    reorganisation is on its way to us, or it is a lie.
    """
    moved = []
    # finalized is safe too, whatever a node says of the order of its tags
    for tag, header in (("safe", finalized), ("safe", safe), ("finalized", finalized)):
        if header is None:
            continue
        ours = await held(conn, chain_id, header.number)
        if ours is not None and ours.hash != header.hash:
            continue
        if await conn.fetchval(_RAISE_TAG[tag], chain_id, header.number, header.hash, header.time_ms) is None:
            continue
        if ours is None:
            await store_headers(conn, chain_id, [header])  # the anchor that a later violation is measured against
        if tag not in moved:
            moved.append(tag)
    if moved:
        await conn.execute("NOTIFY indexer_heads")
    return moved


_RAISE_TAG = {
    "safe": """
        UPDATE indexer.chain SET safe_number = $2, safe_hash = $3, safe_time_ms = $4, safe_at = clock_timestamp()
        WHERE chain_id = $1 AND head_number >= $2 AND (safe_number IS NULL OR safe_number < $2) RETURNING true
        """,
    "finalized": """
        UPDATE indexer.chain
        SET finalized_number = $2, finalized_hash = $3, finalized_time_ms = $4, finalized_at = clock_timestamp()
        WHERE chain_id = $1 AND head_number >= $2 AND (finalized_number IS NULL OR finalized_number < $2) RETURNING true
        """,
}


async def set_demands(conn: Connection, chain_id: int, quorum: int, proof: str) -> None:
    """How many endpoints must agree, and what must be proven, before anything is signalled for the chain."""
    await conn.execute(
        """
        UPDATE indexer.chain SET quorum = $2, proof = $3, endpoints = NULL, agreed_number = NULL, agreed_at = NULL
        WHERE chain_id = $1 AND (quorum, proof) <> ($2, $3)
        """,
        chain_id,
        quorum,
        proof,
    )


async def set_agreement(
    conn: asyncpg.Connection, chain_id: int, height: int | None, endpoints: Sequence[Mapping[str, Any]], *, lost: bool
) -> None:
    """The highest block of ours that enough endpoints hold (None: too few do), and how each of them stands. `lost`: it is
    not for a moment only that they do not agree."""
    await conn.execute(
        """
        UPDATE indexer.chain SET endpoints = $3, agreed_number = coalesce($2, agreed_number),
            agreed_at = CASE WHEN $2::bigint IS NOT NULL THEN clock_timestamp() WHEN $4 THEN NULL ELSE agreed_at END,
            linked_epoch = CASE WHEN $2::bigint IS NULL AND $4 THEN -1
                WHEN $2 IS NOT NULL AND linked_epoch = -1 THEN (SELECT epoch FROM indexer.lease WHERE task = 'follow:' || $1::bigint)
                ELSE linked_epoch END
        WHERE chain_id = $1
        """,
        chain_id,
        height,
        list(endpoints),
        lost,
    )


async def set_latch(conn: asyncpg.Connection, chain_id: int, latch: Mapping[str, Any]) -> None:
    """Records a finality violation, both sides. The first one stays until a person resumes the chain."""
    await conn.execute(
        "UPDATE indexer.chain SET latch = $2 WHERE chain_id = $1 AND latch IS NULL",
        chain_id,
        dict(latch),
    )
    await conn.execute("NOTIFY indexer_heads")


async def resume(conn: Connection, chain_id: int, *, accept_chain: bool) -> bool:
    """A person's decision on a finality violation; True if there was one.

    Ours is kept: following tries again, and latches again while the node disagrees. The chain's is accepted: nothing counts
    as finalized any more, so that the follower may walk back to the common ancestor as in any reorganisation.
    """
    if accept_chain:
        resumed = await conn.fetchval(
            """
            UPDATE indexer.chain
            SET latch = NULL, safe_number = NULL, safe_hash = NULL, safe_time_ms = NULL, safe_at = NULL,
                finalized_number = NULL, finalized_hash = NULL, finalized_time_ms = NULL, finalized_at = NULL
            WHERE chain_id = $1 AND latch IS NOT NULL RETURNING true
            """,
            chain_id,
        )
    else:
        resumed = await conn.fetchval(
            "UPDATE indexer.chain SET latch = NULL WHERE chain_id = $1 AND latch IS NOT NULL RETURNING true", chain_id
        )
    await conn.execute("NOTIFY indexer_heads")
    return resumed is not None


async def set_mode(conn: asyncpg.Connection, chain_id: int, mode: Literal["socket", "polling"]) -> None:
    await conn.execute(
        "UPDATE indexer.chain SET mode = $2 WHERE chain_id = $1 AND mode IS DISTINCT FROM $2", chain_id, mode
    )


async def set_history_complete(conn: asyncpg.Connection, chain_id: int, complete: bool) -> None:
    """Whether every block since the proven creation of each factory was read: views of balances say so."""
    await conn.execute(
        "UPDATE indexer.chain SET history_complete = $2 WHERE chain_id = $1 AND history_complete <> $2",
        chain_id,
        complete,
    )


async def prune_headers(conn: asyncpg.Connection, chain_id: int, low: int, below: int) -> int:
    """Deletes headers in [low, below) that nobody needs: not of blocks with our events, not the checkpoint of its thousand.

    `below` is at most the finalized number, which itself is held for ever as the anchor.
    """
    status = await conn.execute(
        """
        DELETE FROM indexer.block AS b
        WHERE b.chain_id = $1 AND b.number >= $2 AND b.number < $3
          AND NOT (b.canonical AND NOT EXISTS (
              SELECT FROM indexer.block AS later
              WHERE later.chain_id = $1 AND later.canonical AND later.number > b.number AND later.number < (b.number / 1000 + 1) * 1000
          ))
          AND NOT EXISTS (SELECT FROM indexer.movement AS e WHERE e.chain_id = $1 AND e.block_number = b.number AND e.block_hash = b.hash)
          AND NOT EXISTS (SELECT FROM indexer.programme AS e WHERE e.chain_id = $1 AND e.block_number = b.number AND e.block_hash = b.hash)
          AND NOT EXISTS (SELECT FROM indexer.transfer AS e WHERE e.chain_id = $1 AND e.block_number = b.number AND e.block_hash = b.hash)
          AND NOT EXISTS (SELECT FROM indexer.programme_event AS e WHERE e.chain_id = $1 AND e.block_number = b.number AND e.block_hash = b.hash)
          AND NOT EXISTS (SELECT FROM indexer.raw_log AS e WHERE e.chain_id = $1 AND e.block_number = b.number AND e.block_hash = b.hash)
        """,
        chain_id,
        low,
        below,
    )
    return int(status.rpartition(" ")[2])
