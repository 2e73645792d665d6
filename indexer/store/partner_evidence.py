"""Partners' facts as the settling room reads them: legs that wait for records, the records, our looks at chains, hints.

Reads and holds, in the caller's transaction; the pollers write these tables (`partners.py`). A group is what is paired at once:
brand, kind, wallet and amount. What a `ready` has left on is settled, and is not read again for others' sake.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

import asyncpg

from indexer.model.evidence import Hint, Look, Moved, PartnerTransfer, Status
from indexer.model.operation import Leg, PartnerLeg
from indexer.model.types import Address, Hash32
from indexer.store.connection import Connection

PARTNER_LEG = """
    l.operation_id, l.leg, o.brand, l.kind, l.wallet_id, l.amount, l.token, l.released,
    (extract(epoch FROM l.requested_at) * 1000)::bigint AS requested_ms,
    (extract(epoch FROM o.registered_at) * 1000)::bigint AS registered_ms
"""
TRANSFER = """
    t.id, t.brand, t.partner, t.kind, t.record_id, t.wallet, t.token, t.amount, t.time_ms, t.after_ms, t.undated, t.status, t.network,
    t.chain_id, t.tx_hash, t.tx_hashes, t.block_number, t.transfers, t.withdrawn_at,
    (extract(epoch FROM t.first_seen_at) * 1000)::bigint AS first_seen_ms,
    (extract(epoch FROM t.settled_at) * 1000)::bigint AS settled_ms, (extract(epoch FROM t.seen_at) * 1000)::bigint AS seen_ms
"""

Group = tuple[str, str, str, int]  # brand, kind, wallet, amount


def partner_leg_of(row: asyncpg.Record) -> PartnerLeg:
    return PartnerLeg(
        operation_id=row["operation_id"],
        index=row["leg"],
        brand=row["brand"],
        kind=row["kind"],
        wallet=row["wallet_id"],
        amount=int(row["amount"]),
        token=row["token"],
        requested_at_ms=row["requested_ms"],
        registered_at_ms=row["registered_ms"],
        released=row["released"],
    )


async def partner_legs_of(conn: Connection, ids: Sequence[UUID]) -> list[PartnerLeg]:
    """The partner legs of these operations (leg_pk)."""
    rows = await conn.fetch(
        f"""
        SELECT {PARTNER_LEG} FROM indexer.leg l JOIN indexer.operation o ON o.id = l.operation_id
        WHERE l.operation_id = ANY($1::uuid[]) AND l.wallet_id IS NOT NULL
        """,  # noqa: S608
        ids,
    )
    return [partner_leg_of(row) for row in rows]


async def rival_legs(conn: Connection, groups: Iterable[Group]) -> list[PartnerLeg]:
    """Every leg of the groups that no `ready` has left on yet (leg_partner_idx, claim_pk)."""
    rows = await conn.fetch(
        f"""
        SELECT {PARTNER_LEG} FROM unnest($1::text[], $2::text[], $3::text[], $4::numeric[]) AS g (brand, kind, wallet, amount)
        JOIN indexer.leg l ON l.wallet_id = g.wallet AND l.amount = g.amount AND l.kind = g.kind
        JOIN indexer.operation o ON o.id = l.operation_id AND o.brand = g.brand
        WHERE NOT EXISTS (SELECT 1 FROM indexer.claim c WHERE c.operation_id = l.operation_id AND c.leg = l.leg AND c.final)
        """,  # noqa: S608
        *_columns(groups),
    )
    return [partner_leg_of(row) for row in rows]


async def transfers_for(conn: Connection, groups: Iterable[Group], ids: Sequence[UUID]) -> list[PartnerTransfer]:
    """The records of the groups, but for what a `ready` of others than `ids` rests on (partner_transfer_wallet_idx); and whatever
    legs stand on that names the same transactions or transfers: there may be one movement for several records."""
    rows = await conn.fetch(
        f"""
        SELECT {TRANSFER} FROM unnest($1::text[], $2::text[], $3::text[], $4::numeric[]) AS g (brand, kind, wallet, amount)
        JOIN indexer.partner_transfer t ON t.brand = g.brand AND t.wallet = g.wallet AND t.amount = g.amount AND t.kind = g.kind
        WHERE t.withdrawn_at IS NULL AND NOT EXISTS (
            SELECT 1 FROM indexer.claim c WHERE c.evidence_id = t.id AND c.final AND c.operation_id <> ALL ($5::uuid[]))
        """,  # noqa: S608
        *_columns(groups),
        ids,
    )
    beside = await _naming_the_same(
        conn, rows, "(SELECT c.leg FROM indexer.claim c WHERE c.evidence_id = t.id) IS NOT NULL"
    )
    return await transfers_of_rows(conn, [*rows, *beside])


async def spoken_for_beside(conn: Connection, transfers: Sequence[PartnerTransfer]) -> list[PartnerTransfer]:
    """Records that name the same transactions or transfers as these, and settle a leg or were told as unmatched already."""
    rows = await conn.fetch(
        f"SELECT {TRANSFER} FROM indexer.partner_transfer t WHERE t.id = ANY ($1::uuid[])",  # noqa: S608
        [transfer.id for transfer in transfers],
    )
    told = "t.unmatched_look_at IS NULL AND NOT t.undated AND t.status IN ('included', 'succeeded')"
    claimed = "(SELECT c.leg FROM indexer.claim c WHERE c.evidence_id = t.id) IS NOT NULL"
    return await transfers_of_rows(conn, await _naming_the_same(conn, rows, f"({claimed} OR {told})"))


async def _naming_the_same(conn: Connection, rows: Sequence[asyncpg.Record], which: str) -> list[asyncpg.Record]:
    """Rows of other records that name a transaction (on a chain that we follow) or a transfer of these."""
    hashes = {text for row in rows if row["chain_id"] is not None for text in _hashes(row)}
    named = {text for row in rows for text in row["transfers"]}
    found: list[asyncpg.Record] = []
    # partner_transfer_tx_idx, partner_transfer_named_idx; claim_evidence_id_key row by row, whatever the planner expects
    for texts, beside in (
        (hashes, "t.chain_id IS NOT NULL AND t.tx_hashes && $1::text[]"),
        (named, "t.transfers <> '{}'::text[] AND t.transfers && $1::text[]"),
    ):
        if texts:
            found += await conn.fetch(
                f"""
                SELECT {TRANSFER} FROM indexer.partner_transfer t
                WHERE {beside} AND t.id <> ALL ($2::uuid[]) AND t.withdrawn_at IS NULL AND {which}
                """,  # noqa: S608 - words of ours
                list(texts),
                [row["id"] for row in [*rows, *found]],
            )
    return found


async def hold(conn: Connection, wanted: Mapping[UUID, str]) -> set[UUID]:
    """Of these records (→ brand) those that the brand's account shows still, and goes on to until the caller commits.

    To be asked before a claim on them is written: another brand's poller may be about to have them (`partners.take_over`), is
    waited for, and finds the claim afterwards. Pollers of the brand itself are not in the way (partner_transfer_pk).
    """
    rows = await conn.fetch(
        """
        SELECT t.id FROM unnest($1::uuid[], $2::text[]) AS w (id, brand)
        JOIN indexer.partner_transfer t ON t.id = w.id AND t.brand = w.brand FOR KEY SHARE OF t
        """,
        list(wanted),
        list(wanted.values()),
    )
    return {row[0] for row in rows}


def _columns(groups: Iterable[Group]) -> tuple[list[str], list[str], list[str], list[int]]:
    rows = list(groups)
    return [g[0] for g in rows], [g[1] for g in rows], [g[2] for g in rows], [g[3] for g in rows]


async def transfers_of_rows(conn: Connection, rows: Sequence[asyncpg.Record]) -> list[PartnerTransfer]:
    """Records with our looks at their transactions joined to them."""
    hashes = {
        (row["chain_id"], text)
        for row in rows
        if row["chain_id"] is not None
        for text in _hashes(row)
        if _raw(text) is not None
    }
    looks = await _looks(conn, hashes) if hashes else {}
    return [_transfer(row, looks) for row in rows]


def _hashes(row: asyncpg.Record) -> tuple[str, ...]:
    """All transactions of a record; on a chain that we follow in the spelling of that chain."""
    texts = row["tx_hashes"] or ([row["tx_hash"]] if row["tx_hash"] else [])
    return tuple(dict.fromkeys(text.lower() if row["chain_id"] is not None else text for text in texts))


def _raw(tx_hash: str) -> bytes | None:
    try:
        raw = bytes.fromhex(tx_hash.removeprefix("0x"))
    except ValueError:
        return None
    return raw if len(raw) == 32 else None


async def _looks(conn: Connection, hashes: Iterable[tuple[int, str]]) -> dict[tuple[int, str], Look]:
    """Answers of chain_lookup_pk. One whose block is not the canonical one that we hold counts as no answer."""
    wanted = sorted(hashes)
    rows = await conn.fetch(
        """
        SELECT q.chain_id, q.tx_hash, q.block_number, q.block_hash, q.success, q.transfer,
               EXISTS (SELECT 1 FROM indexer.block b WHERE b.chain_id = q.chain_id AND b.number = q.block_number AND b.canonical
                       AND b.hash <> q.block_hash) AS replaced
        FROM unnest($1::bigint[], $2::bytea[]) AS w (chain_id, tx_hash)
        JOIN indexer.chain_lookup q ON q.chain_id = w.chain_id AND q.tx_hash = w.tx_hash
        WHERE q.answered_at IS NOT NULL
        """,
        [chain for chain, _ in wanted],
        [_raw(text) for _, text in wanted],
    )
    spelled = {(chain, _raw(text)): text for chain, text in wanted}
    found: dict[tuple[int, str], Look] = {}
    for row in rows:
        text = spelled[row["chain_id"], row["tx_hash"]]
        if row["block_number"] is None or row["replaced"]:
            found[row["chain_id"], text] = Look(row["chain_id"], text)
        else:
            found[row["chain_id"], text] = Look(
                row["chain_id"],
                text,
                row["block_number"],
                Hash32(row["block_hash"]),
                row["success"],
                tuple(_moved(entry) for entry in row["transfer"] or []),
            )
    return found


def _moved(entry: dict[str, Any]) -> Moved:
    return Moved(str(entry["token"]).lower(), str(entry["from"]).lower(), str(entry["to"]).lower(), int(entry["value"]))


def _transfer(row: asyncpg.Record, looks: dict[tuple[int, str], Look]) -> PartnerTransfer:
    hashes = _hashes(row)
    ours = (looks.get((row["chain_id"], text)) for text in hashes)
    return PartnerTransfer(
        brand=row["brand"],
        partner=row["partner"],
        kind=row["kind"],
        record_id=row["record_id"],
        wallet=row["wallet"],
        token=row["token"],
        amount=None if row["amount"] is None else int(row["amount"]),
        status=Status(row["status"]),
        first_seen_ms=row["first_seen_ms"],
        stated_ms=row["time_ms"],
        undated=row["undated"],
        dateless=row["after_ms"] is not None,
        settled_ms=row["settled_ms"],
        seen_ms=row["seen_ms"],
        network=row["network"],
        chain_id=row["chain_id"],
        tx_hashes=hashes,
        block_number=None if row["block_number"] is None else int(row["block_number"]),
        withdrawn=row["withdrawn_at"] is not None,
        transfers=tuple(row["transfers"]),
        looks=tuple(look for look in ours if look is not None),
    )


async def hints_for(conn: Connection, legs: Sequence[Leg]) -> list[Hint]:
    """What Loyfin's API says of the actions that these legs name (partner_hint_nonce_idx, partner_hint_operation_hash_idx)."""
    rows = await conn.fetch(
        """
        SELECT h.partner, h.record_id, h.chain_id, h.factory, h.kind, h.issuer, h.nonce, h.operation_hash, h.status, h.reason
        FROM indexer.partner_hint h WHERE h.nonce = ANY($1::bytea[])
        UNION
        SELECT h.partner, h.record_id, h.chain_id, h.factory, h.kind, h.issuer, h.nonce, h.operation_hash, h.status, h.reason
        FROM indexer.partner_hint h WHERE h.operation_hash = ANY($2::bytea[])
        """,
        [leg.nonce for leg in legs if leg.nonce is not None],
        [leg.operation_hash for leg in legs if leg.match == "operation_hash"],
    )
    return [
        Hint(
            row["partner"],
            row["record_id"],
            row["chain_id"],
            Address(row["factory"]),
            row["kind"],
            Address(row["issuer"]),
            Hash32(row["nonce"]),
            row["operation_hash"],
            row["status"],
            row["reason"],
        )
        for row in rows
    ]
