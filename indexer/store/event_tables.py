"""The tables of decoded logs as the bulk writer needs them: names, columns in order, primary keys.

Written out here because the daemon's start must not wait for SQLAlchemy to be imported; `tables.py` declares the same, and a
test compares the two. Decoders hand over tuples in this order.
"""

from __future__ import annotations

from typing import Final, NamedTuple

_PLACE: Final = (
    "chain_id",
    "block_number",
    "log_index",
    "block_hash",
    "block_time_ms",
    "tx_hash",
    "tx_index",
    "emitter",
    "canonical",
)
_KEY: Final = ("chain_id", "block_number", "log_index", "block_hash")


class EventTable(NamedTuple):
    """A table of schema `indexer`: every one begins with where the log was seen."""

    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...] = _KEY


def _events(name: str, *columns: str, key: tuple[str, ...] = _KEY) -> EventTable:
    return EventTable(name, (*_PLACE, *columns), key)


_PROGRAMME: Final = ("name", "symbol", "media", "description", "contract_uri", "token_uri")

#: By the fields of `Decoded`, and in their order.
EVENT_TABLES: Final = {
    "programmes": _events("programme", "factory", "issuer", "loyalty_id", "loyalty", *_PROGRAMME),
    "movements": _events(
        "movement",
        *("kind", "factory", "issuer", "loyalty_id", "loyalty", "holder", "bucket", "amount", "nonce"),
        *("operation_hash", "data"),
    ),
    "transfers": _events(
        "transfer",
        *("item", "source", "loyalty", "operator", "sender", "recipient", "bucket", "amount"),
        key=("chain_id", "block_number", "log_index", "item", "block_hash"),
    ),
    "programme_events": _events("programme_event", "loyalty", "event", "args"),
    "raw_logs": _events("raw_log", "topics", "data", "reason", "error"),
}
