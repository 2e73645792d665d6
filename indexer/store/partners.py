"""Facts from partners as the pollers write them: versions of records, and the transfers in them.

Every function works inside the caller's leased transaction and neither begins nor commits. What it changes it also queues for
the reconciler, and notifies; what a record means was decided by the poller, what it settles is the reconciler's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from operator import itemgetter
from typing import Any
from uuid import UUID

import asyncpg

from indexer.store.connection import Connection
from indexer.store.partner_accounts import OPEN, Account

SETTLED = ("included", "succeeded")
# What a leg of the brand that read it first did not settle by meanwhile, it may never: out of its window, or without a time.
FIRST_CHOICE = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Current:
    """The last stored version of a record."""

    version: int
    raw: Any
    wallet: str
    missing: int
    after_ms: int | None  # the last look that lacked it; None: it was there at the first


@dataclass(frozen=True, slots=True)
class TransferRow:
    """Evidence in a record: the columns of `partner_transfer` that a partner speaks of."""

    id: UUID
    kind: str
    record_id: str
    wallet: str
    token: str | None
    amount: int | None
    amount_text: str | None
    time_ms: int | None
    undated: bool
    status: str
    network: str | None
    chain_id: int | None
    tx_hashes: tuple[str, ...]
    block_number: int | None
    doubtful: bool = False  # what it says of amount, transaction or outcome cannot be read
    transfers: tuple[str, ...] = ()  # what it names on a ledger that we do not follow

    @property
    def place(self) -> tuple[object, ...]:
        """What must not change while it is settled."""
        return (self.status, self.tx_hashes, self.amount)

    @property
    def rest(self) -> tuple[object, ...]:
        return (self.token, self.amount_text, self.network, self.chain_id, self.block_number, self.transfers)


@dataclass(frozen=True, slots=True)
class RecordRow:
    """A record as read, with the evidence in it. `version` is the new one, or None where it says what it said before.

    `scope` is whose evidence was looked for in it: a listing by wallet speaks of that wallet's side alone.
    """

    record_id: str
    version: int | None
    raw: Any
    wallet: str
    time_ms: int | None
    transfers: tuple[TransferRow, ...]
    scope: str | None = None
    after_ms: int | None = None  # evidence in it without a time of its own came after this
    readable: bool = True  # else nothing is known now of the evidence in it, and what is stored stays


@dataclass(slots=True)
class Stored:
    """What a listing changed."""

    new: int = 0
    changed: int = 0
    unsettled: int = 0  # evidence that counted and does not any more, or elsewhere
    returned: int = 0  # records that had been missing
    missing: int = 0
    withdrawn: int = 0
    foreign: int = 0  # evidence that another brand's account has shown: it is that brand's
    touched: set[tuple[str, str]] = field(default_factory=set)  # (kind, wallet)
    others: list[Foreign] = field(
        default_factory=list
    )  # evidence that another brand's account has shown: `take_over` sees to it

    def __iadd__(self, other: Stored) -> Stored:
        for name in ("new", "changed", "unsettled", "returned", "missing", "withdrawn", "foreign"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.touched |= other.touched
        self.others += other.others
        return self


@dataclass(frozen=True, slots=True)
class Foreign:
    """Evidence in a record, and another brand's row of it."""

    transfer: TransferRow
    after_ms: int | None
    news: bool  # the record says something that it did not say before


# --------------------------------------------------------------------------- records


async def current_records(conn: Connection, account: Account, record_ids: Collection[str]) -> dict[str, Current]:
    """What is stored of these. partner_record_current_idx."""
    rows = await conn.fetch(
        """
        SELECT record_id, version, raw, wallet, missing, after_ms FROM indexer.partner_record
        WHERE brand = $1 AND partner = $2 AND record_id = ANY ($3::text[]) AND current
        """,
        account.brand,
        account.partner,
        list(record_ids),
    )
    return {row[0]: Current(*row[1:]) for row in rows}


async def store_records(conn: Connection, account: Account, records: Sequence[RecordRow]) -> Stored:
    """A listing's records: new versions, and the evidence wherever it differs from what is stored.

    Evidence that a record no longer speaks of stops counting; of a record that cannot be read it stays as it was. What another
    brand's account has shown is left alone, and noted.
    """
    stored = Stored()
    ids = [record.record_id for record in records]
    await _store_versions(conn, account, [record for record in records if record.version is not None], stored)
    before = {
        row["id"]: row
        for row in await conn.fetch(
            """
            SELECT id, kind, record_id, wallet, token, amount_text, network, chain_id, block_number, transfers, status, tx_hashes, amount, time_ms,
                   missing, withdrawn_at IS NOT NULL AS withdrawn
            FROM indexer.partner_transfer WHERE brand = $1 AND partner = $2 AND record_id = ANY ($3::text[])
            """,  # partner_transfer_record_idx
            account.brand,
            account.partner,
            ids,
        )
    }
    others = {
        row[0]
        for row in await conn.fetch(
            "SELECT id FROM indexer.partner_transfer WHERE id = ANY ($1::uuid[]) AND brand <> $2",  # partner_transfer_pk
            [transfer.id for record in records for transfer in record.transfers],
            account.brand,
        )
    }
    rows: list[tuple[Any, ...]] = []
    told: set[UUID] = set()
    for record, transfer in ((each, transfer) for each in records for transfer in each.transfers):
        told.add(transfer.id)
        was = before.get(transfer.id)
        after_ms = None if transfer.undated else record.after_ms
        if transfer.id in others:
            stored.others.append(Foreign(transfer, after_ms, record.version is not None))
            continue
        if transfer.doubtful and was is not None and transfer.status != "failed":
            continue  # some of what it says cannot be read: unknown is not undone
        stands = was is not None and not was["withdrawn"] and _place(was) == transfer.place
        if was is not None and stands and _rest(was) == transfer.rest and transfer.time_ms in (None, was["time_ms"]):
            continue
        if was is not None and was["status"] in SETTLED and not stands:
            stored.unsettled += not was["withdrawn"]
        stored.touched.add((transfer.kind, transfer.wallet))
        rows.append(_row(account, transfer, after_ms, stands=stands, taken=False))
    # by id: two brands that store the same new records at the same time wait for each other in one direction
    await conn.executemany(_UPSERT, sorted(rows, key=itemgetter(0)))
    back = [key for key in told & before.keys() if before[key]["missing"]]
    if back:
        await conn.execute(
            "UPDATE indexer.partner_transfer SET missing = 0 WHERE id = ANY ($1::uuid[]) AND brand = $2",
            back,
            account.brand,
        )
        stored.returned += len(back)
    scopes = {record.record_id: record.scope for record in records if record.readable}
    silent = [
        row
        for key, row in before.items()
        if key not in told
        and row["status"] in ("pending", *SETTLED)
        and row["amount_text"] is not None
        and row["record_id"] in scopes
        and scopes[row["record_id"]] in (None, row["wallet"])
    ]
    if silent:
        await conn.execute(
            """
            UPDATE indexer.partner_transfer SET status = 'pending', amount = NULL, amount_text = NULL, settled_at = NULL,
                seen_at = clock_timestamp()
            WHERE id = ANY ($1::uuid[]) AND brand = $2
            """,
            [row["id"] for row in silent],
            account.brand,
        )
        stored.unsettled += sum(row["status"] in SETTLED and not row["withdrawn"] for row in silent)
        stored.touched |= {(row["kind"], row["wallet"]) for row in silent}
    return stored


def _row(
    account: Account, transfer: TransferRow, after_ms: int | None, *, stands: bool, taken: bool
) -> tuple[Any, ...]:
    """Arguments of `_UPSERT`. `stands`: what it settled by is as it was; `taken`: it is another brand's, locked, and free."""
    return (
        transfer.id,
        *account,
        transfer.kind,
        transfer.record_id,
        transfer.wallet,
        transfer.token,
        transfer.amount,
        transfer.amount_text,
        transfer.time_ms,
        transfer.undated,
        transfer.status,
        transfer.network,
        transfer.chain_id,
        transfer.tx_hashes[-1] if transfer.tx_hashes else None,
        list(transfer.tx_hashes),
        transfer.block_number,
        transfer.status in SETTLED,
        stands,
        after_ms,
        list(transfer.transfers),
        taken,
    )


def _place(row: asyncpg.Record) -> tuple[object, ...]:
    return (row["status"], tuple(row["tx_hashes"]), None if row["amount"] is None else int(row["amount"]))


def _rest(row: asyncpg.Record) -> tuple[object, ...]:
    height = None if row["block_number"] is None else int(row["block_number"])
    return (row["token"], row["amount_text"], row["network"], row["chain_id"], height, tuple(row["transfers"]))


async def _store_versions(conn: Connection, account: Account, records: Sequence[RecordRow], stored: Stored) -> None:
    if not records:
        return
    await conn.execute(
        """
        UPDATE indexer.partner_record SET current = false
        WHERE brand = $1 AND partner = $2 AND record_id = ANY ($3::text[]) AND current
        """,
        account.brand,
        account.partner,
        [record.record_id for record in records],
    )
    await conn.executemany(
        """
        INSERT INTO indexer.partner_record (brand, partner, record_id, version, raw, wallet, time_ms, after_ms, swept)
        SELECT $1, $2, $3, $4, $5, $6, $7, $8, coalesce((
            SELECT swept FROM indexer.partner_record WHERE brand = $1 AND partner = $2 AND record_id = $3 AND version = $4 - 1), 0)
        """,
        [(*account, r.record_id, r.version, r.raw, r.wallet, r.time_ms, r.after_ms) for r in records],
    )
    for record in records:
        if record.version == 1:
            stored.new += 1
        else:
            stored.changed += 1


async def take_over(conn: Connection, account: Account, stored: Stored) -> None:
    """Of the evidence that another brand's account has shown, takes what is free; the rest is counted as foreign.

    Free: nothing stands on it and no person has accepted it, and it is gone there, or nobody's account any more, or it counts and a leg
    of this brand's waits for such a one; where one of the other's does too, after a while in which that could have settled by it.
    That is judged under a lock which whoever claims it wants too (`partner_evidence.hold`): a claim that is written and not
    committed keeps it, and what we take is not claimed for the other any more. The last that a poller's transaction does to
    evidence: with the rows of others in hand it waits for nobody, so nobody waits for it in a circle.
    """
    may = await _free(conn, account, stored.others) if stored.others else set()
    if may:
        locked = {
            row[0]: row[1]
            for row in await conn.fetch(
                "SELECT id, brand FROM indexer.partner_transfer WHERE id = ANY ($1::uuid[]) FOR UPDATE SKIP LOCKED",
                list(may),
            )
        }
        # asked in a statement of its own: it sees what was committed before the lock was ours
        may = await _free(conn, account, [each for each in stored.others if each.transfer.id in locked])
        ours = [each for each in stored.others if each.transfer.id in may]
        await conn.executemany(
            _UPSERT, [_row(account, each.transfer, each.after_ms, stands=False, taken=True) for each in ours]
        )
        pairs = {(each.transfer.kind, each.transfer.wallet) for each in ours}
        stored.touched |= pairs
        for brand in {locked[each.transfer.id] for each in ours} - {account.brand}:
            await touch_partner_legs(conn, brand, pairs)
    stored.foreign += sum(each.news for each in stored.others if each.transfer.id not in may)


async def _free(conn: Connection, account: Account, others: Sequence[Foreign]) -> set[UUID]:
    """partner_transfer_pk; claim_evidence_id_key, decision_evidence_idx, partner_account_pk, leg_partner_idx and claim_pk row by row."""

    def counts(transfer: TransferRow) -> bool:  # else it could settle nothing here by itself
        return transfer.status in SETTLED and not transfer.undated

    def waits(brand: str, amount: str) -> str:
        return f"""EXISTS (
            SELECT FROM indexer.leg l JOIN indexer.operation o ON o.id = l.operation_id
            WHERE l.wallet_id = t.wallet AND l.amount = {amount} AND l.kind = t.kind AND o.brand = {brand} AND o.state = ANY ($4::text[])
              AND NOT EXISTS (SELECT FROM indexer.claim c WHERE c.operation_id = l.operation_id AND c.leg = l.leg))"""  # noqa: S608

    rows = await conn.fetch(
        f"""
        SELECT t.id FROM unnest($2::uuid[], $3::numeric[]) AS new (id, amount) JOIN indexer.partner_transfer t ON t.id = new.id
        WHERE t.brand <> $1 AND NOT EXISTS (SELECT FROM indexer.claim c WHERE c.evidence_id = t.id) AND NOT coalesce((
                SELECT d.accept FROM indexer.decision d JOIN indexer.operation o ON o.id = d.operation_id
                WHERE d.evidence_id = t.id AND o.brand = t.brand ORDER BY d.decided_at DESC LIMIT 1), false)
          AND (t.withdrawn_at IS NOT NULL OR NOT EXISTS (
                SELECT FROM indexer.partner_account a WHERE a.brand = t.brand AND a.partner = t.partner AND a.active)
            OR ({waits("$1", "new.amount")} AND (
                coalesce(t.settled_at, t.seen_at) < clock_timestamp() - $5::interval OR NOT {waits("t.brand", "t.amount")})))
        """,  # noqa: S608 - words of ours
        account.brand,
        [each.transfer.id for each in others],
        [each.transfer.amount if counts(each.transfer) else None for each in others],
        OPEN,
        FIRST_CHOICE,
    )
    return {row[0] for row in rows}


# A time that the record did not have before is taken over, and ends `undated`; one that was known is not forgotten.
_UPSERT = """
INSERT INTO indexer.partner_transfer AS t (id, brand, partner, kind, record_id, wallet, token, amount, amount_text, time_ms, after_ms,
    undated, status, network, chain_id, tx_hash, tx_hashes, block_number, settled_at, transfers)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, coalesce($10::bigint, $20::bigint), CASE WHEN $10::bigint IS NULL THEN $20::bigint END,
    $11, $12, $13, $14, $15, $16, $17, CASE WHEN $18 THEN clock_timestamp() END, $21)
ON CONFLICT (id) DO UPDATE SET brand = excluded.brand, token = excluded.token, amount = excluded.amount,
    amount_text = excluded.amount_text, time_ms = coalesce($10::bigint, t.time_ms),
    after_ms = CASE WHEN $10::bigint IS NULL THEN t.after_ms END, undated = t.undated AND $10::bigint IS NULL, status = excluded.status, network = excluded.network,
    chain_id = excluded.chain_id, tx_hash = excluded.tx_hash, tx_hashes = excluded.tx_hashes, block_number = excluded.block_number,
    transfers = excluded.transfers,
    seen_at = clock_timestamp(), settled_at = CASE WHEN $19 THEN t.settled_at ELSE excluded.settled_at END, withdrawn_at = NULL, missing = 0,
    unmatched_look_at = CASE WHEN $19 THEN t.unmatched_look_at ELSE clock_timestamp() END
WHERE t.brand = excluded.brand OR $22::boolean
"""


async def touch_partner_legs(conn: Connection, brand: str, touched: Iterable[tuple[str, str]]) -> None:
    """Operations of the brand with legs of these (kind, wallet) are looked at again: open ones, and those that claim evidence.

    leg_partner_idx. A leg that is settled and undisturbed costs one pass that changes nothing.
    """
    pairs = sorted(set(touched))
    if not pairs:
        return
    await conn.execute(
        """
        INSERT INTO indexer.touched_operation (operation_id)
        SELECT DISTINCT o.id
        FROM unnest($2::text[], $3::text[]) AS seen (kind, wallet)
        JOIN indexer.leg l ON l.wallet_id = seen.wallet AND l.kind = seen.kind
        JOIN indexer.operation o ON o.id = l.operation_id AND o.brand = $1
        WHERE o.state = ANY ($4::text[]) OR l.released OR EXISTS (
            SELECT FROM indexer.claim c JOIN indexer.partner_transfer t ON t.id = c.evidence_id
            WHERE c.operation_id = l.operation_id AND c.leg = l.leg
              AND (t.withdrawn_at IS NOT NULL OR t.seen_at > clock_timestamp() - interval '5 minutes'))
        """,
        brand,
        [kind for kind, _ in pairs],
        [wallet for _, wallet in pairs],
        OPEN,
    )
    await conn.execute("NOTIFY indexer_facts")


async def forget_versions(conn: Connection, keep: timedelta, limit: int) -> int:
    """Deletes versions of records that another has superseded and that were read longer ago than `keep`, the oldest first.

    At most `limit`; answers how many went. The last version of a record stays, and so does the evidence made of any
    (partner_record_age_idx).
    """
    status = await conn.execute(
        """
        DELETE FROM indexer.partner_record WHERE ctid = ANY (ARRAY (
            SELECT ctid FROM indexer.partner_record WHERE NOT current AND seen_at < (SELECT clock_timestamp() - $1::interval)
            ORDER BY seen_at LIMIT $2 FOR UPDATE SKIP LOCKED))
        """,
        keep,
        limit,
    )
    return int(status.rpartition(" ")[2])
