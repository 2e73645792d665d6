"""qiibee's transactions, read: who received or gave how many points, and whether the provider calls it done.

Pure and lenient (facts/qiibee.md, sections 2, 3 and 10). Personal data ends at this door: of a person nothing but the auth_id
is taken, and of the rest only fields that are named here. Promises that a row's status is never its token's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from indexer.model.evidence import QIIBEE, transfer_id
from indexer.partners.orders import Unusable
from indexer.partners.reading import (
    Drift,
    amount,
    base_units,
    identifier,
    instant,
    plain_decimal,
    table,
    text,
    whole,
)
from indexer.store.partners import TransferRow

CREDIT: Final = "qiibee.credit"
DEBIT: Final = "qiibee.debit"
#: loyalty_event_type → leg kind, whose side of the row, and which amount. Other types are kept and settle nothing.
_EVENTS: Final[Mapping[str, tuple[str, tuple[str, str], str]]] = {
    "credit_points": (CREDIT, ("user_to", "user"), "amount_received"),
    "debit_points": (DEBIT, ("user", "user_to"), "points_burned"),
}
_OTHER_EVENTS: Final = frozenset({"exchange", "points_to_external_rewards", "points_to_rewards", "credit_nft"})

_KEPT: Final = (
    "id", "inserted_at", "loyalty_event_type", "status", "tx_hash", "amount_received", "points_burned", "reward_id",
    "exchange_provider",
)  # fmt: skip
_KEPT_OF_TOKEN: Final = ("id", "address", "name", "symbol", "type")


@dataclass(frozen=True, slots=True)
class Words:
    """What a row's `status` means, as configured; lower case, a final `*` stands for any ending."""

    success: tuple[str, ...]
    pending: tuple[str, ...]
    failed: tuple[str, ...]

    def meaning(self, word: object) -> str | None:
        """`success`, `pending` or `failed`; None: nobody knows."""
        given = word.strip().lower() if isinstance(word, str) else ""
        for name in ("failed", "success", "pending"):
            known: tuple[str, ...] = getattr(self, name)
            if any(given == each or (each.endswith("*") and given.startswith(each[:-1])) for each in known):
                return name
        return None


@dataclass(frozen=True, slots=True)
class History:
    """One page of the history. `total`: how many rows match the question."""

    rows: Sequence[Any]
    total: int | None


def history_of(document: Any, drift: Drift) -> History:
    """The rows of `{data: {transactions: […], total_tx_count}}`. Raises Unusable."""
    data = table(document).get("data", document)
    rows = data if isinstance(data, list) else table(data).get("transactions")
    if not isinstance(rows, list):
        raise Unusable("an answer without a list in `data.transactions`")
    total = table(data).get("total_tx_count")
    if isinstance(total, str):
        drift["type"] += 1
    return History(rows, whole(total, Drift()))


def row_id(row: Any) -> str:
    """The id of a row. Raises Unusable."""
    found = identifier(table(row).get("id"))
    if found is None:
        raise Unusable("a transaction without an id")
    return found


def scrubbed(row: Any) -> dict[str, Any]:
    """What may be kept of a row. A field that is not there stays away; one that is null stays null."""
    given = table(row)
    kept = {key: given[key] for key in _KEPT if key in given}
    for side in ("user", "user_to"):
        if side in given:
            kept[side] = {"auth_id": table(given[side]).get("auth_id")} if given[side] is not None else None
    for side in ("brand", "brand_to"):
        if side in given:
            kept[side] = {"id": table(given[side]).get("id")} if given[side] is not None else None
    for side in ("token", "token_to"):
        if side in given:
            token = table(given[side])
            kept[side] = {key: token[key] for key in _KEPT_OF_TOKEN if key in token} if token else None
    return kept


def row_time(row: Any, drift: Drift) -> int | None:
    """Unix milliseconds; UTC, where the row names no zone."""
    return instant(table(row).get("inserted_at"), drift)


def status_of(row: Any, words: Words, drift: Drift) -> str:
    """A success counts with a transaction behind it; a word that nobody knows is not settled and not failed."""
    word = table(row).get("status")
    meaning = words.meaning(word)
    if meaning == "success":
        return "succeeded" if identifier(table(row).get("tx_hash")) else "pending"
    if meaning == "failed":
        return "failed"
    drift["word"] += word is not None and meaning is None
    return "pending"


def unknown_status(row: Any, words: Words) -> str | None:
    """The row's status, cut short, where its meaning is not configured."""
    word = table(row).get("status")
    if word is None or words.meaning(word) is not None:
        return None
    return re.sub(r"[^\w*+. -]", "?", word)[:40] if isinstance(word, str) else f"a {type(word).__name__}"


def transfers_of(row: Any, words: Words, *, undated: bool, drift: Drift) -> tuple[TransferRow, ...] | None:
    """The side of the transaction that a leg may wait for; None for an event that nobody knows. Raises Unusable for a credit or
    debit of nobody."""
    given = table(row)
    event = identifier(given.get("loyalty_event_type")) or ""
    if event not in _EVENTS:
        drift["word"] += bool(event) and event not in _OTHER_EVENTS
        return () if event in _OTHER_EVENTS else None
    kind, sides, field = _EVENTS[event]
    record = row_id(row)
    wallet = next((found for side in sides if (found := identifier(table(given.get(side)).get("auth_id")))), None)
    if wallet is not None and wallet[:2] in ("0x", "0X"):
        wallet = wallet.lower()  # as registrations are: hex has no case
    if wallet is None:
        raise Unusable(f"transaction {record[:60]} names no user")
    vital: Drift = Drift()
    value, tx_hash = amount(given.get(field), vital), text(given.get("tx_hash"), vital)
    said = given.get("status")
    vital["unreadable"] += said is not None and not isinstance(said, str)
    drift.update(vital)
    time_ms = row_time(row, Drift())
    return (
        TransferRow(
            id=transfer_id(QIIBEE, kind, record, wallet),
            kind=kind,
            record_id=record,
            wallet=wallet,
            token=identifier(table(given.get("token")).get("id")),
            amount=None if value is None else base_units(value, 0),
            amount_text=None if value is None else plain_decimal(value),
            time_ms=time_ms,
            undated=undated and time_ms is None,
            status=status_of(row, words, drift),
            network=QIIBEE,
            chain_id=None,
            tx_hashes=(tx_hash,) if tx_hash else (),
            block_number=None,
            doubtful=bool(vital["unreadable"]),
        ),
    )
