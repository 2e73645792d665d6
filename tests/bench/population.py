"""A database that has been in use for a while, written set-based: what the cost of a pass and the plans of queries are seen on.

Movement `i` lies in block `1 + i // 2` and carries nonce `i`. One leg in ten is matched by wallet and amount, one by its
operation hash, the others by nonce. Of the operations, `idle` wait for evidence that has not come
(with the alarms that the reconciler gives them); the rest were settled by the movement of their number, fulfilled,
signalled and delivered long ago.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

import asyncpg

from indexer.model.evidence import evidence_id

CHAIN = 84_532
FACTORY = b"\xfa" * 20
ISSUER = b"\x15" * 20
TOKEN = b"\x70" * 20
LOYALTY_ID = b"\x1d" * 32
KIND = "loyfin.redemption"
BRAND = "bloom"
BASE_MS = 1_790_000_000_000
BLOCK_MS = 200

GROWING = (
    *("movement", "transfer", "programme_event", "raw_log", "block"),
    *("operation", "leg", "claim", "receipt", "history", "alarm", "touched_blocks", "touched_operation"),
    *("outbox", "delivery"),
    *("partner_record", "partner_transfer", "partner_wallet", "chain_lookup"),
)

# the same for every statement below, in SQL
_NONCE = "sha256(convert_to('nonce ' || i, 'UTF8'))"
_HASH = "sha256(convert_to('block ' || n, 'UTF8'))"
_HOLDER = "substr(sha256(convert_to('wallet ' || i % 5000, 'UTF8')), 1, 20)"
_OPERATION_HASH = "sha256(convert_to('correlation ' || i, 'UTF8'))"
_MATCH = "CASE i % 10 WHEN 0 THEN 'wallet_amount' WHEN 1 THEN 'operation_hash' ELSE 'nonce' END"
_OPERATION = "md5('operation ' || i)::uuid"


def nonce(i: int) -> bytes:
    return hashlib.sha256(b"nonce %d" % i).digest()


def wallet(i: int) -> bytes:
    return hashlib.sha256(b"wallet %d" % (i % 5000)).digest()[:20]


def basis(i: int) -> str:
    return {0: "wallet_amount", 1: "operation_hash"}.get(i % 10, "nonce")


def operation_id(i: int) -> UUID:
    return UUID(hashlib.md5(b"operation %d" % i, usedforsecurity=False).hexdigest())


def block_hash(n: int) -> bytes:
    return hashlib.sha256(b"block %d" % n).digest()


@asynccontextmanager
async def _bare(conn: asyncpg.Connection) -> AsyncIterator[None]:
    """Without the growing tables' indexes and foreign keys inside: built at once afterwards, they cost a third."""
    keys = await conn.fetch(
        """
        SELECT c.conrelid::regclass::text AS of, quote_ident(c.conname) AS name, pg_get_constraintdef(c.oid) AS said
        FROM pg_constraint c JOIN pg_class t ON t.oid = c.conrelid
        WHERE c.contype = 'f' AND t.relnamespace = 'indexer'::regnamespace AND t.relname = ANY ($1)
        """,
        GROWING,
    )
    indexes = await conn.fetch(
        """
        SELECT i.indexrelid::regclass::text AS name, pg_get_indexdef(i.indexrelid) AS said
        FROM pg_index i JOIN pg_class t ON t.oid = i.indrelid
        WHERE t.relnamespace = 'indexer'::regnamespace AND t.relname = ANY ($1)
          AND NOT EXISTS (SELECT FROM pg_constraint c WHERE c.conindid = i.indexrelid)
        """,
        GROWING,
    )
    for key in keys:
        await conn.execute(f"ALTER TABLE {key['of']} DROP CONSTRAINT {key['name']}")
    for index in indexes:
        await conn.execute(f"DROP INDEX {index['name']}")
    yield
    await conn.execute("SET maintenance_work_mem = '256MB'")
    for index in indexes:
        await conn.execute(index["said"])
    for key in keys:
        await conn.execute(f"ALTER TABLE {key['of']} ADD CONSTRAINT {key['name']} {key['said']}")


@dataclass(frozen=True, slots=True)
class Population:
    """How many of each; the last `idle` operations wait."""

    operations: int = 100_000
    idle: int = 50_000
    movements: int = 100_000
    transfers: int = 100_000

    @property
    def settled(self) -> int:
        return self.operations - self.idle

    @property
    def head(self) -> int:
        return self.movements // 2 + 1_000

    async def write(self, conn: asyncpg.Connection) -> None:
        """Fills an empty, migrated database, and does what autovacuum would have done long ago. `conn` is the owner's."""
        async with _bare(conn):
            for statement in self._statements():
                await conn.execute(statement)
            await self._claims(conn)
        await conn.execute("VACUUM ANALYZE")

    def _statements(self) -> Sequence[str]:
        factory, issuer, token, loyalty_id = (rf"'\x{raw.hex()}'" for raw in (FACTORY, ISSUER, TOKEN, LOYALTY_ID))
        time_ms = f"{BASE_MS} + {BLOCK_MS}::bigint * n"
        finalized = self.head - 500
        head_ms, finalized_ms = BASE_MS + BLOCK_MS * self.head, BASE_MS + BLOCK_MS * finalized
        since = f"to_timestamp({BASE_MS / 1000})"
        settled, operations = self.settled, self.operations
        waits = f"(i >= {settled})::int * 1000000000"
        where = f"{CHAIN}, n, i % 2, {_HASH}, {time_ms}, {_NONCE}, 0, {factory}, true"
        legs = f"""jsonb_build_array(jsonb_build_object('kind', '{KIND}', 'match', {_MATCH}, 'chainId', '{CHAIN}',
            'factory', '0x{FACTORY.hex()}', 'issuer', '0x{ISSUER.hex()}', 'holder', '0x' || encode({_HOLDER}, 'hex'),
            'loyaltyId', '0x{LOYALTY_ID.hex()}', 'amount', (1 + i)::text, 'expiresAt', '0', 'deadline', '{2**33}',
            'nonce', '0x' || encode({_NONCE}, 'hex')))"""
        payload = "jsonb_build_object('type', kind, 'data', jsonb_build_object('sequence', sequence, 'reference', 'op-' || i))"
        return (
            f"""INSERT INTO indexer.chain (chain_id, name, head_number, head_hash, head_time_ms, head_at, safe_number, safe_hash,
                    safe_time_ms, finalized_number, finalized_hash, finalized_time_ms, unmatched_cursor)
                SELECT {CHAIN}, 'bench', {self.head}, '\\x01', {head_ms}, clock_timestamp() + interval '1 day', {self.head - 100}, '\\x02',
                    {head_ms - 100 * BLOCK_MS},
                    {finalized}, '\\x03', {finalized_ms}, {self.head - 200}""",
            f"""INSERT INTO indexer.emitter (chain_id, address, kind, factory, start_block, followed_from) VALUES
                ({CHAIN}, {factory}, 'factory', {factory}, 0, 0), ({CHAIN}, {token}, 'token', {factory}, 1, 1)""",
            f"INSERT INTO indexer.emitter_role (chain_id, address, factory, start_block) VALUES ({CHAIN}, {factory}, {factory}, 0)",
            f"""INSERT INTO indexer.coverage (chain_id, emitter, verdict, blocks)
                VALUES ({CHAIN}, '', 'gate', int8multirange(int8range(0, {self.head}, '[]')))""",
            f"INSERT INTO indexer.brand (name, configured_at, unmatched_since) VALUES ('{BRAND}', {since}, {since}), ('other', {since}, {since})",
            f"INSERT INTO indexer.issuer (address, brand) VALUES ({issuer}, '{BRAND}')",
            f"INSERT INTO indexer.webhook (brand, name, events) VALUES ('{BRAND}', 'shop', ARRAY['operation.*'])",
            f"""INSERT INTO indexer.block (chain_id, number, hash, parent_hash, time_ms)
                SELECT {CHAIN}, n, {_HASH}, sha256(convert_to('block ' || n - 1, 'UTF8')), {time_ms}
                FROM generate_series(0, {self.head}) AS n""",
            f"""INSERT INTO indexer.programme (chain_id, block_number, log_index, block_hash, block_time_ms, tx_hash, tx_index, emitter,
                    canonical, factory, issuer, loyalty_id, loyalty, name, symbol, media, description, contract_uri, token_uri)
                SELECT {CHAIN}, n, 8 + i % 2, {_HASH}, {time_ms}, {_NONCE}, 0, {factory}, true, {factory}, {issuer},
                    CASE i WHEN 0 THEN {loyalty_id}::bytea ELSE sha256(convert_to('p' || i, 'UTF8')) END,
                    CASE i WHEN 0 THEN {token}::bytea ELSE substr(sha256(convert_to('t' || i, 'UTF8')), 1, 20) END, 'P', 'P', '', '', '', ''
                FROM generate_series(0, 99) AS i, LATERAL (SELECT 1 + i / 2) AS b (n)""",
            f"""INSERT INTO indexer.movement (chain_id, block_number, log_index, block_hash, block_time_ms, tx_hash, tx_index, emitter,
                    canonical, kind, factory, issuer, loyalty_id, loyalty, holder, bucket, amount, nonce, operation_hash, data)
                SELECT {where}, '{KIND}', {factory}, {issuer}, {loyalty_id}, {token}, {_HOLDER}, 0, 1 + i, {_NONCE},
                    CASE WHEN i % 2 = 1 THEN {_OPERATION_HASH} END, ''
                FROM generate_series(0, {self.movements - 1}) AS i, LATERAL (SELECT 1 + i / 2) AS b (n)""",
            f"""INSERT INTO indexer.transfer (chain_id, block_number, log_index, block_hash, block_time_ms, tx_hash, tx_index, emitter,
                    canonical, item, source, loyalty, operator, sender, recipient, bucket, amount)
                SELECT {CHAIN}, n, 2 + i % 2, {_HASH}, {time_ms}, {_NONCE}, 0, {token}, true, 0, 'loyfin', {token}, {_HOLDER}, {_HOLDER},
                    substr(sha256(convert_to('wallet ' || i % 4999, 'UTF8')), 1, 20), 0, 5
                FROM generate_series(0, {self.transfers - 1}) AS i, LATERAL (SELECT 1 + i / 2) AS b (n)""",
            f"""INSERT INTO indexer.programme_event (chain_id, block_number, log_index, block_hash, block_time_ms, tx_hash, tx_index,
                    emitter, canonical, loyalty, event, args)
                SELECT {CHAIN}, n, 4 + i % 2, {_HASH}, {time_ms}, {_NONCE}, 0, {token}, true, {token}, 'LoyaltyUpdated', '{{}}'
                FROM generate_series(0, {self.transfers // 2}) AS i, LATERAL (SELECT 1 + i / 2) AS b (n)""",
            f"""INSERT INTO indexer.raw_log (chain_id, block_number, log_index, block_hash, block_time_ms, tx_hash, tx_index,
                    emitter, canonical, topics, data, reason)
                SELECT {CHAIN}, n, 6 + i % 2, {_HASH}, {time_ms}, {_NONCE}, 0, {token}, true, ARRAY[{_NONCE}], '', 'unknown_topic'
                FROM generate_series(0, {self.transfers // 2}) AS i, LATERAL (SELECT 1 + i / 2) AS b (n)""",
            f"""INSERT INTO indexer.operation (id, brand, reference, request, requested_at, requested_at_stated, registered_at, state, state_at,
                    generation, finalized_generation)
                SELECT {_OPERATION}, '{BRAND}', 'op-' || i, jsonb_build_object('legs', {legs}), {since}, true,
                    {since} + i * interval '1 ms', CASE WHEN i < {settled} THEN 'fulfilled' ELSE 'pending' END, {since},
                    (i < {settled})::int, (i < {settled})::int
                FROM generate_series(0, {operations - 1}) AS i""",
            f"""INSERT INTO indexer.leg (operation_id, leg, kind, match, chain_id, factory, issuer, holder, loyalty_id, bucket, amount, deadline,
                    nonce, operation_hash, requested_at)
                SELECT {_OPERATION}, 0, '{KIND}', {_MATCH}, {CHAIN}, {factory}, {issuer}, {_HOLDER}, {loyalty_id}, 0, 1 + i + {waits}, {2**33},
                    CASE {_MATCH} WHEN 'nonce' THEN CASE WHEN {waits} = 0 THEN {_NONCE} ELSE sha256(convert_to('waits ' || i, 'UTF8')) END END,
                    CASE {_MATCH} WHEN 'operation_hash' THEN
                        CASE WHEN {waits} = 0 THEN {_OPERATION_HASH} ELSE sha256(convert_to('waits ' || i, 'UTF8')) END END, {since}
                FROM generate_series(0, {operations - 1}) AS i""",
            f"""INSERT INTO indexer.receipt (operation_id, generation, outcome, actor)
                SELECT {_OPERATION}, 1, 'fulfilled', '{BRAND}' FROM generate_series(0, {settled - 1}) AS i""",
            f"""INSERT INTO indexer.history (operation_id, to_state, generation, cause)
                SELECT {_OPERATION}, state, 0, 'evidence'
                FROM generate_series(0, {operations - 1}) AS i, unnest(ARRAY['pending', 'ready']) AS state""",
            f"""INSERT INTO indexer.alarm (operation_id, chain_id, axis, threshold)
                SELECT {_OPERATION}, {CHAIN}, axis, {2**33 + 1}000
                FROM generate_series({settled}, {operations - 1}) AS i, unnest(ARRAY['finalized_time_ms', 'safe_number']) AS axis""",
            f"""INSERT INTO indexer.outbox (id, brand, aggregatetype, aggregateid, type, payload, generation, sequence)
                SELECT md5(kind || i)::uuid, '{BRAND}', 'operation', {_OPERATION}, kind, {payload}, 1, sequence
                FROM generate_series(0, {settled - 1}) AS i,
                     LATERAL (VALUES ('operation.ready', 2 * i + 1), ('operation.fulfilled', 2 * i + 2)) AS s (kind, sequence)""",
            f"UPDATE indexer.brand SET last_sequence = {2 * settled} WHERE name = '{BRAND}'",
            """INSERT INTO indexer.delivery (brand, webhook, signal_id, aggregateid, sequence, type, state, attempts, begun_at, ended_at, status)
                SELECT brand, 'shop', id, aggregateid, sequence, type, 'delivered', 1, created_at, created_at, 200 FROM indexer.outbox""",
        )

    async def _claims(self, conn: asyncpg.Connection) -> None:
        await conn.copy_records_to_table(
            "claim",
            schema_name="indexer",
            columns=[
                *("operation_id", "leg", "evidence_id", "chain_id", "block_number", "log_index", "block_hash"),
                *("basis", "ambiguous", "final"),
            ],
            records=[
                (
                    *(operation_id(i), 0, evidence_id(CHAIN, FACTORY, KIND, ISSUER, nonce(i))),
                    *(CHAIN, 1 + i // 2, i % 2, block_hash(1 + i // 2), basis(i), False, True),
                )
                for i in range(min(self.settled, self.movements))
            ],
        )
