"""Decoded logs as they are stored, for comparison with a new reading: whole rows, log by log.

Promises that what PostgreSQL gives back equals what a decoder would hand over for the same log. Reads alone; what a
difference means is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from indexer.store.connection import Connection
from indexer.store.event_tables import EVENT_TABLES
from indexer.store.facts import Place, Row, Rows

#: The rows that one log became: (field of `Rows`, columns), in the order of the tables and, in a batch, of its items.
Reading = list[tuple[str, Row]]

_BLOCK, _LOG_INDEX, _BLOCK_HASH, EMITTER, CANONICAL = (
    EVENT_TABLES["movements"].columns.index(column)
    for column in ("block_number", "log_index", "block_hash", "emitter", "canonical")
)
_SELECT = {
    field: f"SELECT {', '.join(table.columns)} FROM indexer.{table.name} "  # noqa: S608 - the names are ours
    "WHERE chain_id = $1 AND block_number BETWEEN $2 AND $3 AND canonical AND emitter = ANY($4::bytea[]) "
    f"ORDER BY {', '.join(column for column in table.key if column != 'chain_id')}"
    for field, table in EVENT_TABLES.items()
}


async def readings(
    conn: Connection, chain_id: int, emitters: Sequence[bytes], low: int, high: int
) -> dict[Place, Reading]:
    """Canonical logs of the emitters in a range. Each table by its primary key."""
    found: dict[Place, Reading] = {}
    for field in EVENT_TABLES:
        for record in await conn.fetch(_SELECT[field], chain_id, low, high, list(emitters)):
            row = tuple(record)
            found.setdefault(_place(row), []).append((field, row))
    return found


def as_stored(rows: Rows) -> dict[Place, Reading]:
    """The same of freshly decoded rows."""
    found: dict[Place, Reading] = {}
    for field in EVENT_TABLES:
        for row in getattr(rows, field):
            plain = (*row[:-1], msgspec.json.decode(row[-1])) if field == "programme_events" else row
            found.setdefault(_place(row), []).append((field, plain))
    return found


def emitter_of(reading: Reading) -> bytes:
    emitter: bytes = reading[0][1][EMITTER]
    return emitter


def only_raw(reading: Reading) -> bool:
    """Whether the log was kept as it came, because nobody could read it."""
    return all(field == "raw_logs" for field, _ in reading)


def differing(ours: Reading, theirs: Reading) -> list[str]:
    """The columns in which two readings of one log differ; `kind of event` where they went into different tables."""
    if [field for field, _ in ours] != [field for field, _ in theirs]:
        return ["kind of event"]
    columns: dict[str, None] = {}
    for (field, mine), (_, other) in zip(ours, theirs, strict=True):
        pairs: Iterable[tuple[str, Any, Any]] = zip(EVENT_TABLES[field].columns, mine, other, strict=True)
        columns |= {name: None for name, a, b in pairs if a != b}
    return list(columns)


def _place(row: Row) -> Place:
    return Place(row[_BLOCK], row[_BLOCK_HASH], row[_LOG_INDEX])
