"""Loyalty programmes for those who read: each as its first canonical announcement described it, a page at a time."""

from __future__ import annotations

import msgspec

from indexer.model.types import Address, hex0x
from indexer.store import cursors
from indexer.store.connection import Connection
from indexer.store.queries import Int64, Time


class Program(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A loyalty programme, as its first announcement described it. The texts are the issuer's: do not trust them."""

    chain_id: str
    loyalty: str  # the programme's token contract
    factory: str
    issuer: str
    loyalty_id: str
    brand: str | None  # of the issuer; None: no brand here has it
    name: str
    symbol: str
    media: str
    description: str
    contract_uri: str
    token_uri: str
    block_number: str
    created_at: Time
    tx_hash: str


class ProgramPage(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """`next_cursor` None: this was the last."""

    data: list[Program]
    next_cursor: str | None


class _ProgramPosition(msgspec.Struct, frozen=True, array_like=True):
    chain_id: Int64
    loyalty: bytes


# A programme, without the announcements that repeat it: the first canonical one counts. (programme_token_idx)
_PROGRAM = """
    p.chain_id, p.loyalty, p.factory, p.issuer, p.loyalty_id, i.brand, p.name, p.symbol, p.media, p.description,
    p.contract_uri, p.token_uri, p.block_number, to_timestamp(p.block_time_ms / 1000.0) AS created_at, p.tx_hash
"""
_FIRST = """
    p.canonical AND NOT EXISTS (
        SELECT 1 FROM indexer.programme e
        WHERE e.chain_id = p.chain_id AND e.loyalty = p.loyalty AND e.canonical
          AND (e.block_number, e.log_index) < (p.block_number, p.log_index))
"""


async def programs(
    conn: Connection,
    *,
    brand: str | None = None,
    chain_id: int | None = None,
    issuer: Address | None = None,
    limit: int = 50,
    cursor: str | None = None,
) -> ProgramPage:
    """A page of programmes by chain and token contract; `brand` None: those of issuers that no brand has, too.

    Raises BadCursor.
    """
    question = ("programs", brand, chain_id, issuer)
    after = cursors.read(question, cursor, _ProgramPosition) if cursor is not None else _ProgramPosition(0, b"")
    if brand is None and issuer is None:
        # programme_token_idx, from the cursor on
        rows = await conn.fetch(
            f"""
            SELECT {_PROGRAM} FROM indexer.programme p LEFT JOIN indexer.issuer i ON i.address = p.issuer
            WHERE (p.chain_id, p.loyalty) > ($1, $2) AND p.chain_id = coalesce($3, p.chain_id) AND {_FIRST}
            ORDER BY p.chain_id, p.loyalty LIMIT $4
            """,  # noqa: S608 - constants of this module
            after.chain_id, after.loyalty, chain_id, limit + 1,
        )  # fmt: skip
    else:
        # programme_issuer_idx, once for each chain and issuer; an issuer's programmes are few enough to sort
        rows = await conn.fetch(
            f"""
            SELECT {_PROGRAM}
            FROM (SELECT address FROM indexer.issuer WHERE brand = $3
                  UNION SELECT $4::bytea WHERE $3::text IS NULL) who (address)
            CROSS JOIN indexer.chain c
            JOIN indexer.programme p ON p.chain_id = c.chain_id AND p.issuer = who.address
            LEFT JOIN indexer.issuer i ON i.address = p.issuer
            WHERE (p.chain_id, p.loyalty) > ($1, $2) AND p.issuer = coalesce($4, p.issuer)
              AND c.chain_id = coalesce($5, c.chain_id) AND {_FIRST}
            ORDER BY p.chain_id, p.loyalty LIMIT $6
            """,  # noqa: S608
            after.chain_id, after.loyalty, brand, issuer, chain_id, limit + 1,
        )  # fmt: skip
    page = rows[:limit]
    return ProgramPage(
        data=[
            Program(
                **{
                    **row,
                    **{name: str(row[name]) for name in ("chain_id", "block_number")},
                    **{name: hex0x(row[name]) for name in ("loyalty", "factory", "issuer", "loyalty_id", "tx_hash")},
                }
            )
            for row in page
        ],
        next_cursor=cursors.write(question, _ProgramPosition(page[-1]["chain_id"], page[-1]["loyalty"]))
        if len(rows) > limit
        else None,
    )
