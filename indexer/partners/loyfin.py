"""Loyfin's API: hints about signed actions that are under way or refused, and a cross-check of events that we hold.

The chain decides: nothing here settles or ends anything, and everything else works with this off or dead. Promises that a
difference between what the API and the chain say is counted and shown, and that no signature is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog

from indexer.model.types import Address, BadValue, address, hash32, hex0x
from indexer.partners.account import Desk
from indexer.partners.client import Denied, Limited, PartnerError, Refused
from indexer.partners.orders import Unusable
from indexer.partners.reading import Drift, identifier, instant, storable, table, whole
from indexer.partners.schedule import SLOWEST, pause
from indexer.store import partner_accounts as accounts
from indexer.store import partner_hints as hints
from indexer.store import partners as store
from indexer.store.connection import Connection
from indexer.store.partner_hints import HintRow, OwnEvent
from indexer.store.partners import RecordRow

LIMIT: Final = 100
PAGES: Final = 20  # of one listing in one look; where it is longer, the next look goes on from there
STATUSES: Final = ("submitted", "rejected", "cancelled")
WAIT: Final = 15.0
CHECKED_AT_ONCE: Final = 10  # receipts compared in one look
SHOWN: Final = 20  # differences that the account's row keeps
_HINTS: Final = {
    "pending": "pending",
    "submitted": "submitted",
    "mined": "mined",
    "rejected": "rejected",
    "cancelled": "rejected",
    "canceled": "rejected",
}
_KINDS: Final = {"issuance": "loyfin.issuance", "redemption": "loyfin.redemption"}

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Cursored:
    """One page: `next` None at the end."""

    rows: Sequence[Any]
    next: str | None


def page_of(document: Any) -> Cursored:
    """The rows of `{items, page: {nextCursor, hasMore}}`. Raises Unusable."""
    rows = table(document).get("items")
    if not isinstance(rows, list):
        raise Unusable("an answer without a list in `items`")
    page = table(table(document).get("page"))
    cursor = identifier(page.get("nextCursor"))
    return Cursored(rows, cursor if page.get("hasMore", cursor is not None) is not False else None)


def hint_of(row: Any, drift: Drift) -> HintRow | None:
    """A signed action; None for a status that nobody knows. Raises Unusable, BadValue."""
    given = table(row)
    record = identifier(given.get("id"))
    if record is None:
        raise Unusable("an operation without an id")
    kind, status = _KINDS.get(str(given.get("kind"))), _HINTS.get(str(given.get("status")))
    chain_id = whole(given.get("chainId"), drift)
    if kind is None or status is None:
        drift["word"] += 1
        return None
    if chain_id is None or not 0 < chain_id < 2**63:
        raise Unusable(f"operation {record[:60]} names no chain")
    operation_hash = given.get("operationHash")
    relay = given.get("relayTxHash")
    found = hash32(operation_hash) if operation_hash is not None else None
    return HintRow(
        record_id=record,
        chain_id=chain_id,
        factory=address(given.get("verifyingContract"), "verifyingContract"),
        kind=kind,
        issuer=address(given.get("issuer"), "issuer"),
        nonce=hash32(given.get("nonce"), "nonce"),
        operation_hash=found if found is not None and any(found) else None,
        status=status,
        reason=_reason(given) if status == "rejected" else None,
        relay_tx_hash=hash32(relay) if relay is not None else None,
    )


def _read(row: Any, drift: Drift, _: bool) -> tuple[int | None, tuple[()]]:
    """A record's own time, no evidence; what is odd about it is counted. Raises Unusable, BadValue."""
    hint_of(row, drift)
    return instant(table(row).get("createdAt"), drift), ()


def _reason(row: Any) -> str | None:
    """Why it was refused, from whichever field says so; a cancelled one says that."""
    for key in ("reason", "rejectionReason", "error", "message"):
        if isinstance(row.get(key), str) and row[key].strip():
            return " ".join(row[key].split())[:200]
    return "cancelled" if str(row.get("status")).startswith("cancel") else None


def differences(kind: str, rows: Iterable[Any], ours: Sequence[OwnEvent], issuers: frozenset[Address]) -> list[str]:
    """What the API's receipts of one operationHash say otherwise than the chain, in words. What it lacks is no difference."""
    by_nonce = {(event.chain_id, event.nonce): event for event in ours if event.kind == kind}
    found = []
    for row in rows:
        given, quiet = table(row), Drift()
        try:
            if address(given.get("issuer")) not in issuers:
                continue
            nonce, tx = hash32(given.get("nonce")), hash32(given.get("txHash"))
        except BadValue as why:
            found.append(f"a receipt that cannot be read: {why}")
            continue
        event = by_nonce.get((whole(given.get("chainId"), quiet) or 0, nonce))
        if event is None:
            found.append(f"{kind} with nonce {hex0x(nonce)} is in the API and not on the chain that we follow")
            continue
        theirs = {
            "transaction": tx,
            "block": whole(given.get("blockNumber"), quiet),
            "log index": whole(given.get("logIndex"), quiet),
            "amount": whole(given.get("amount"), quiet),
        }
        own = {
            "transaction": event.tx_hash,
            "block": event.block_number,
            "log index": event.log_index,
            "amount": event.amount,
        }
        for term, value in theirs.items():
            if value is not None and value != own[term]:
                found.append(
                    f"{kind} with nonce {hex0x(nonce)}: {term} {_shown(value)} in the API, {_shown(own[term])} on the chain"
                )
    return found


def _shown(value: object) -> str:
    return hex0x(value) if isinstance(value, bytes) else str(value)


class LoyfinPoller:
    """One brand's issuers."""

    def __init__(self, desk: Desk, issuers: Sequence[Address], poll: float) -> None:
        self._desk, self._issuers, self._poll = desk, frozenset(issuers), poll
        self._newest: float | None = None
        self._filtered = True  # until the API refuses the status parameter
        self._failures = 0
        # of listings that are longer than one look reads: where it goes on, as the account's row has it; None: not read yet
        self._behind: dict[str, str] | None = None

    async def run(self) -> None:
        """Until cancelled, or until the lease is lost."""
        desk = self._desk
        while True:
            await self._refresh()
            wait = self._pause()
            failed = False
            for part in (self.look, self.cross_check) if self._newest is not None else (self.cross_check,):
                try:
                    await part()
                except (PartnerError, Unusable) as error:
                    failed = True
                    self._note(error)
                    if isinstance(error, Limited) and error.retry_after is not None:
                        wait = max(wait, error.retry_after)
                    elif isinstance(error, Denied):
                        wait = max(wait, WAIT)
            self._failures = self._failures + 1 if failed else 0
            await desk.note_health()
            due = desk.clock.now() + min(max(SLOWEST, wait), wait * 2 ** min(self._failures, 6))
            earliest = desk.clock.now() + self._poll
            while (left := due - desk.clock.now()) > 0:
                if await desk.wakeups.wait("registered", min(left, WAIT)) and not self._failures:
                    due = min(due, max(earliest, desk.clock.now()))

    def _note(self, error: PartnerError | Unusable) -> None:
        if isinstance(error, Unusable):
            self._desk.quarantine(str(error))
            self._desk.client.health.note(str(error), "unusable")

    def _pause(self) -> float:
        if self._newest is None:
            return SLOWEST
        return pause(self._poll, self._desk.clock.now() - self._newest)

    async def _refresh(self) -> None:
        desk = self._desk
        async with desk.lease.transaction() as conn:
            await desk.set_clock(conn)
            registered = await hints.newest_waiting(conn, desk.account.brand)
        self._newest = None if registered is None else desk.of_wall(registered)

    # ---------------------------------------------------------------- hints

    async def look(self) -> None:
        """Hints about the brand's actions into the store. Raises PartnerError, Unusable; what is refused for one issuer is so after
        the others were read."""
        refused: PartnerError | Unusable | None = None
        for issuer in sorted(self._issuers):
            try:
                await self._look_at(hex0x(issuer))
            except (Refused, Unusable, Denied) as error:
                if isinstance(error, Denied) and error.wide:
                    raise
                self._note(error)
                refused = error
        if refused is not None:
            raise refused

    async def _look_at(self, issuer: str) -> None:
        if self._filtered:
            try:
                for status in STATUSES:
                    await self._listing(issuer, {"issuer": issuer, "status": status})
                return
            except Refused as refusal:
                if refusal.status not in (400, 422):
                    raise
                self._filtered = False
        await self._listing(issuer, {"issuer": issuer})

    async def _listing(self, issuer: str, question: dict[str, str]) -> None:
        """Its first pages, as far as they tell anything new, and the next ones of those behind: in whatever order rows come, none is
        passed over, and a long listing holds up nobody. Stored as they come: hints have no order that matters."""
        key = "&".join(question.values())
        if self._behind is None:
            async with self._desk.lease.transaction() as conn:
                kept = (await accounts.account_state(conn, self._desk.account)).get("behind", {})
            ours = {hex0x(each) for each in self._issuers}
            self._behind = {name: cursor for name, cursor in kept.items() if name.partition("&")[0] in ours}
        behind = self._behind.get(key)
        cursor = await self._pages(issuer, question, None, only_news=behind is not None)
        if behind is not None:
            try:
                cursor = await self._pages(issuer, question, behind)
            except Refused:  # a cursor that is not good any more: from the beginning again
                self._desk.count("page_drift")
                cursor = None
        if cursor != behind:
            self._behind = {name: each for name, each in {**self._behind, key: cursor}.items() if each is not None}
            async with self._desk.lease.transaction() as conn:
                await accounts.save_state(conn, self._desk.account, {"behind": self._behind})

    async def _pages(
        self, issuer: str, question: dict[str, str], cursor: str | None, *, only_news: bool = False
    ) -> str | None:
        """At most `PAGES` from a cursor on. Answers where it goes on; None: that was the end."""
        seen = {cursor}
        for _ in range(PAGES):
            params = question | {"limit": str(LIMIT)} | ({"cursor": cursor} if cursor else {})
            page = page_of(await self._desk.client.get("operations", "/operations", params, issuer))
            news = await self._store(page.rows)
            if page.next is None or page.next in seen or not page.rows:
                if page.next in seen and page.next is not None:
                    self._desk.count("page_drift")
                return None
            cursor = page.next
            seen.add(cursor)
            if only_news and not news:
                break
        return cursor

    async def _store(self, rows: Sequence[Any]) -> bool:
        """Whether any of them says something new."""
        desk = self._desk
        found: dict[str, tuple[HintRow | None, Any]] = {}
        for row in rows:
            try:
                hint = hint_of(row, Drift())
                issuer = address(table(row).get("issuer"), "issuer")
            except (Unusable, BadValue) as why:
                desk.quarantine(str(why))
                continue
            if issuer not in self._issuers:
                continue
            record = identifier(table(row).get("id")) or ""
            if record in found:
                desk.count("duplicate")
            if hint is None:  # kept as it came; what it means is not known
                for field, words in (("kind", _KINDS), ("status", _HINTS)):
                    if (word := str(table(row).get(field))) not in words:
                        desk.unknown_word(field, word[:40])
            found[record] = (hint, {key: value for key, value in table(row).items() if key != "signature"})

        async def body(conn: Connection, stored: store.Stored) -> tuple[set[str], int]:
            known = await store.current_records(conn, desk.account, found.keys())
            records: list[RecordRow] = [
                desk.record(record, raw, known.get(record), "", None, None, _read) for record, (_, raw) in found.items()
            ]
            stored += await store.store_records(conn, desk.account, records)
            news = {record.record_id for record in records if record.version is not None}
            changed = await hints.store_hints(
                conn, desk.account, [h for key, (h, _) in found.items() if h and key in news]
            )
            return news, changed

        news, changed = await desk.write(body)
        if changed:
            desk.wakeups.poke("facts")
        return bool(news)

    # ---------------------------------------------------------------- the cross-check

    async def cross_check(self) -> None:
        """Receipts of operations that became ready, as the API has them, beside our own events."""
        desk, brand = self._desk, self._desk.account.brand
        async with desk.lease.transaction() as conn:
            state = await accounts.account_state(conn, desk.account)
            after = int(state.get("checked", 0))
            hashes, reached = await hints.ready_hashes(conn, brand, after, CHECKED_AT_ONCE)
        if reached == after:
            return
        told: list[str] = []
        for kind, operation_hash in hashes:
            endpoint = "issuances" if kind == "loyfin.issuance" else "redemptions"
            params = {"operationHash": hex0x(operation_hash), "limit": str(LIMIT)}
            try:
                page = page_of(await desk.client.get(endpoint, f"/{endpoint}", params))
            except (Refused, Unusable) as error:  # this one cannot be compared; the others can
                self._note(error)
                continue
            async with desk.lease.transaction() as conn:
                ours = await hints.own_events(conn, sorted(self._issuers), operation_hash)
            told += differences(kind, page.rows, ours, self._issuers)
        for difference in told:
            desk.count("difference")
            log.warning("Loyfin's API and the chain differ", brand=brand, difference=difference)
        shown = [*state.get("differences", []), *({"at": int(desk.wall), "what": what} for what in told)][-SHOWN:]
        async with desk.lease.transaction() as conn:
            await accounts.save_state(conn, desk.account, {"checked": reached, "differences": storable(shown)})
