"""A small world for tests of settling: a brand, a chain, and facts put straight into the store by hand.

What the follower would write is written here in one statement each; what is under test is what the reconciler makes of it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from indexer.settlement.loop import tell_unmatched
from indexer.settlement.reconciler import reconcile
from indexer.settlement.rules import BrandRules

CHAIN = 84532
FACTORY = b"\xfa" * 20
ISSUER = b"\x15" * 20
LOYALTY_ID = b"\x1d" * 32
HOLDER = b"\x40" * 20
TOKEN = b"\x70" * 20
BRAND = "bloom"
BASE_MS = 1_790_000_000_000  # time of block 0; blocks are 200 ms apart


def digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def hexa(raw: bytes) -> str:
    return "0x" + raw.hex()


class World:
    """One database with one brand and one chain whose heads the test moves by hand."""

    def __init__(self, conn: asyncpg.Connection, rules: Mapping[str, BrandRules]) -> None:
        self.conn, self.rules = conn, dict(rules)
        self.numbers = itertools.count(1)
        self.clock_offset_ms = 0

    @classmethod
    @asynccontextmanager
    async def at(
        cls, dsn: str, rules: Mapping[str, BrandRules] | None = None, *, found: bool = True
    ) -> AsyncIterator[World]:
        """`found` False: the database holds a world already."""
        conn = await asyncpg.connect(dsn)
        await conn.set_type_codec(
            "jsonb", schema="pg_catalog", encoder=lambda v: msgspec.json.encode(v).decode(), decoder=msgspec.json.decode
        )
        world = cls(conn, rules or {})
        try:
            if found:
                await world.found()
            yield world
        finally:
            await conn.close()

    async def found(self) -> None:
        await self.conn.execute(
            "INSERT INTO indexer.chain (chain_id, name, head_number, head_time_ms, head_at, safe_number, finalized_number, finalized_time_ms)"
            " VALUES ($1, 'sandbox', 0, $2, clock_timestamp() + interval '1 hour', 0, 0, $2)",
            CHAIN,
            BASE_MS,
        )
        await self.conn.execute(
            "INSERT INTO indexer.emitter (chain_id, address, kind, factory, start_block, followed_from) VALUES ($1, $2, 'factory', $2, 0, 0)",
            CHAIN,
            FACTORY,
        )
        await self.conn.execute(
            "INSERT INTO indexer.emitter_role (chain_id, address, factory, start_block) VALUES ($1, $2, $2, 0)",
            CHAIN,
            FACTORY,
        )
        await self.add_brand(BRAND, ISSUER)

    async def add_brand(self, name: str, issuer: bytes) -> None:
        await self.conn.execute(
            "INSERT INTO indexer.brand (name, configured_at, unmatched_since) VALUES ($1, to_timestamp($2), to_timestamp($2))",
            name,
            BASE_MS / 1000 - 86_400,
        )
        await self.conn.execute("INSERT INTO indexer.issuer (address, brand) VALUES ($1, $2)", issuer, name)

    # ------------------------------------------------------------------ the brand's side

    def leg(self, **given: Any) -> dict[str, Any]:
        leg = {
            "kind": "loyfin.redemption",
            "chainId": str(CHAIN),
            "issuer": hexa(ISSUER),
            "holder": hexa(HOLDER),
            "loyaltyId": hexa(LOYALTY_ID),
            "amount": "250",
        } | given
        return {key: value for key, value in leg.items() if value is not None}

    def nonce(self) -> bytes:
        return digest("nonce", next(self.numbers))

    async def register(self, *legs: dict[str, Any], reference: str | None = None, **given: Any) -> UUID:
        request = {"brand": BRAND, "reference": reference or f"op-{next(self.numbers)}", "legs": list(legs)} | given
        return UUID((await self.conn.fetchval("SELECT loyalty.register_operation($1)", request))["id"])

    async def fulfil(self, operation: UUID, generation: int) -> str:
        found = await self.conn.fetchval("SELECT loyalty.fulfil($1, $2, '{}')", operation, generation)
        return str(found["outcome"])

    async def cancel(self, operation: UUID) -> Any:
        return await self.conn.fetchval("SELECT loyalty.cancel($1)", operation)

    async def decide(self, operation: UUID, evidence: UUID | str, accept: bool) -> None:
        await self.conn.fetchval(
            "SELECT loyalty.resolve($1, $2, $3, 'looked into it', 'anna')", operation, UUID(str(evidence)), accept
        )

    # ------------------------------------------------------------------ the chain's side

    async def event(
        self,
        block: int,
        leg: dict[str, Any],
        *,
        fork: str = "a",
        index: int = 0,
        canonical: bool = True,
        **changed: Any,
    ) -> None:
        """The event that a leg's action would leave in a block, with terms changed at will."""
        terms = leg | changed
        nonce = terms.get("nonce") or hexa(self.nonce())
        operation_hash = terms.get("operationHash")
        await self.conn.execute(
            """
            INSERT INTO indexer.movement (chain_id, block_number, log_index, block_hash, block_time_ms, tx_hash, tx_index, emitter,
                canonical, kind, factory, issuer, loyalty_id, loyalty, holder, bucket, amount, nonce, operation_hash, data)
            VALUES ($1,$2,$3,$4,$5,$6,0,$7,$8,$9,$10,$11,$12,$13,$14,$15,$16,$17,$18,'')
            ON CONFLICT (chain_id, block_number, log_index, block_hash) DO UPDATE SET canonical = excluded.canonical
            """,
            CHAIN, block, index, digest(fork, block), BASE_MS + 200 * block, digest("tx", nonce), bytes.fromhex(terms.get("emitter", hexa(FACTORY))[2:]),
            canonical, terms["kind"], bytes.fromhex(terms.get("factory", hexa(FACTORY))[2:]), bytes.fromhex(terms["issuer"][2:]),
            bytes.fromhex(terms["loyaltyId"][2:]), TOKEN, bytes.fromhex(terms["holder"][2:]), int(terms.get("expiresAt", "0")), int(terms["amount"]),
            bytes.fromhex(nonce[2:]), bytes.fromhex(operation_hash[2:]) if operation_hash else None,
        )  # fmt: skip
        await self.touch_blocks(block, block)

    async def orphan(self, above: int) -> None:
        await self.conn.execute(
            "UPDATE indexer.movement SET canonical = false WHERE chain_id = $1 AND block_number > $2", CHAIN, above
        )
        await self.conn.execute(
            "UPDATE indexer.chain SET safe_number = least(safe_number, $2) WHERE chain_id = $1", CHAIN, above
        )
        await self.touch_blocks(above + 1, above + 10_000)

    async def touch_blocks(self, low: int, high: int) -> None:
        await self.conn.execute(
            "INSERT INTO indexer.touched_blocks (chain_id, from_block, to_block) VALUES ($1, $2, $3)", CHAIN, low, high
        )

    async def heads(self, head: int | None = None, safe: int | None = None, finalized: int | None = None) -> None:
        """Moves the heads and stores a header at each, so that finalized history has times."""
        for number in (head, safe, finalized):
            if number is not None:
                await self.conn.execute(
                    "INSERT INTO indexer.block (chain_id, number, hash, parent_hash, time_ms) VALUES ($1, $2, $3, $3, $4) ON CONFLICT DO NOTHING",
                    CHAIN, number, digest("a", number), BASE_MS + 200 * number,
                )  # fmt: skip
        await self.conn.execute(
            """
            UPDATE indexer.chain SET head_number = coalesce($2, head_number), head_time_ms = coalesce($3, head_time_ms),
                safe_number = coalesce($4, safe_number), finalized_number = coalesce($5, finalized_number),
                finalized_time_ms = coalesce($6, finalized_time_ms) WHERE chain_id = $1
            """,
            CHAIN, head, None if head is None else BASE_MS + 200 * head, safe, finalized, None if finalized is None else BASE_MS + 200 * finalized,
        )  # fmt: skip

    async def cover(self, low: int, high: int, verdict: str = "gate") -> None:
        await self.conn.execute(
            """
            INSERT INTO indexer.coverage AS c (chain_id, emitter, verdict, blocks) VALUES ($1, '', $2, int8multirange(int8range($3, $4, '[]')))
            ON CONFLICT (chain_id, emitter, verdict) DO UPDATE SET blocks = c.blocks + excluded.blocks
            """,
            CHAIN, verdict, low, high,
        )  # fmt: skip

    # ------------------------------------------------------------------ settling

    async def settle(self) -> list[str]:
        """Passes until nothing is left to do, and one more that must change nothing. Returns the new signals' types."""
        told: list[str] = []
        for _ in range(50):
            async with self.conn.transaction():
                done = await reconcile(self.conn, self.rules, {})
            told += [signal.type for signal in done.signals]
            if not done.operations and not done.backlog:
                break
        else:
            raise AssertionError("the reconciler does not come to rest")
        await self.conn.execute("INSERT INTO indexer.touched_operation (operation_id) SELECT id FROM indexer.operation")
        async with self.conn.transaction():
            again = await reconcile(self.conn, self.rules, {})
        assert not again.signals and not again.transitions, "a second pass over the same facts changed something"
        return told

    async def unmatched(self, quiet_ms: int = 0, limit: int = 500) -> int:
        async with self.conn.transaction():
            return (await tell_unmatched(self.conn, quiet_ms, limit)).signals

    async def operation(self, operation: UUID) -> asyncpg.Record:
        row = await self.conn.fetchrow("SELECT * FROM indexer.operation WHERE id = $1", operation)
        assert row is not None
        return row

    async def state(self, operation: UUID) -> str:
        return str((await self.operation(operation))["state"])

    async def walked(self, operation: UUID) -> list[str]:
        rows = await self.conn.fetch(
            "SELECT to_state FROM indexer.history WHERE operation_id = $1 ORDER BY id", operation
        )
        return [row["to_state"] for row in rows]

    async def trace(self, operation: UUID) -> list[str]:
        rows = await self.conn.fetch(
            "SELECT type FROM indexer.outbox WHERE aggregateid = $1 ORDER BY position", operation
        )
        return [row["type"].removeprefix("operation.") for row in rows]

    async def conflicting(self, operation: UUID) -> str:
        detail = (await self.operation(operation))["detail"]
        return str(detail["conflicts"][0]["evidenceId"])


def problem(error: asyncpg.PostgresError) -> tuple[str, dict[str, Any]]:
    return str(error.sqlstate), json.loads(error.detail or "{}")
