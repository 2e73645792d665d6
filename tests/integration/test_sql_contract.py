"""Schema `loyalty`, frozen: a view, column, type, function or grant that differs from what stands here is a new version of the
contract. A column may be added at the end of a view, a function may be added; nothing else may change.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

VIEWS = {
    "balances": (
        "chain_id bigint, holder text, loyalty text, bucket numeric(78,0), balance numeric, source text, factory "
        "text, issuer text, loyalty_id text, name text, symbol text, brand text, history_complete boolean"
    ),
    "exposures": (
        "operation_id uuid, brand text, reference text, status text, status_at timestamptz, generation integer, "
        "fulfilled_generation integer, outcome text, fulfilled_at timestamptz, receipt jsonb"
    ),
    "issuances": (
        "brand text, chain_id bigint, block_number bigint, block_hash text, block_time timestamptz, tx_hash text, "
        "log_index integer, factory text, issuer text, loyalty_id text, loyalty text, holder text, bucket "
        "numeric(78,0), amount numeric(78,0), nonce text, operation_hash text, data text, operation_id uuid"
    ),
    "operations": (
        "id uuid, brand text, reference text, status text, status_at timestamptz, generation integer, requested_at "
        "timestamptz, registered_at timestamptz, cancelled_at timestamptz, metadata jsonb, legs jsonb, evidence "
        "jsonb, waiting_for jsonb, conflicts jsonb"
    ),
    "partner_orders": (
        "brand text, provider text, kind text, record_id text, wallet_id text, token text, amount numeric(78,0), "
        "amount_text text, status text, network text, chain_id bigint, block_number numeric(78,0), tx_hash text, "
        "record_time timestamptz, undated boolean, first_seen_at timestamptz, settled_at timestamptz, withdrawn_at "
        "timestamptz, evidence_id uuid, operation_id uuid, leg smallint, ambiguous boolean"
    ),
    "pending_fulfilments": (
        "operation_id uuid, brand text, reference text, generation integer, ready_at timestamptz, requested_at "
        "timestamptz, metadata jsonb, legs jsonb, consumer text, claimed_until timestamptz, held boolean"
    ),
    "programs": (
        "chain_id bigint, loyalty text, factory text, issuer text, loyalty_id text, brand text, name text, symbol "
        "text, media text, description text, contract_uri text, token_uri text, block_number bigint, created_at "
        "timestamptz, tx_hash text"
    ),
    "redemptions": (
        "brand text, chain_id bigint, block_number bigint, block_hash text, block_time timestamptz, tx_hash text, "
        "log_index integer, factory text, issuer text, loyalty_id text, loyalty text, holder text, bucket "
        "numeric(78,0), amount numeric(78,0), nonce text, operation_hash text, data text, operation_id uuid"
    ),
    "settlements": (
        "operation_id uuid, brand text, reference text, leg smallint, kind text, evidence_id uuid, basis text, "
        "ambiguous boolean, final boolean, claimed_at timestamptz, confidence text, chain_id bigint, block_number "
        "bigint, block_hash text, block_time timestamptz, tx_hash text, log_index integer, issuer text, loyalty_id "
        "text, holder text, bucket numeric(78,0), amount numeric(78,0), provider text, record_id text, wallet_id text, "
        "token text, network text"
    ),
    "signals": (
        "brand text, sequence bigint, id uuid, type text, operation_id uuid, generation integer, payload jsonb, "
        "supersedes uuid, superseded_by uuid, created_at timestamptz"
    ),
    "sync_status": (
        "chain_id bigint, name text, mode text, head_number bigint, head_time timestamptz, head_lag_seconds "
        "numeric, safe_number bigint, safe_time timestamptz, finalized_number bigint, finalized_time timestamptz, "
        "history_complete boolean, latched boolean, active boolean, stream uuid"
    ),
    "transfers": (
        "brand text, chain_id bigint, block_number bigint, block_hash text, block_time timestamptz, tx_hash text, "
        "log_index integer, item integer, source text, loyalty text, operator text, sender text, recipient text, "
        "bucket numeric(78,0), amount numeric(78,0)"
    ),
    "unmatched": (
        "brand text, kind text, chain_id bigint, block_number bigint, block_hash text, block_time timestamptz, "
        "tx_hash text, log_index integer, factory text, issuer text, loyalty_id text, holder text, bucket "
        "numeric(78,0), amount numeric(78,0), nonce text, operation_hash text, confidence text, "
        "before_unmatched_since boolean, provider text, record_id text, wallet_id text, token text, undated boolean"
    ),
}

FUNCTIONS = {
    "balances_of(wallet text)": "SETOF loyalty.balances",
    "cancel(operation_id uuid)": "jsonb",
    "claim_fulfilments(consumer text, max_count integer, lease interval)": (
        "TABLE(claim uuid, operation_id uuid, brand text, reference text, generation integer, claimed_until timestamptz, "
        "ready_at timestamptz, legs jsonb, metadata jsonb)"
    ),
    "fulfil(operation_id uuid, generation integer, receipt jsonb, claim uuid DEFAULT NULL::uuid)": "jsonb",
    "register_operation(request jsonb)": "jsonb",
    "release_claim(claim uuid)": "jsonb",
    "renew_claim(claim uuid, lease interval)": "jsonb",
    "resolve(operation_id uuid, evidence_id uuid, accept boolean, reason text, actor text)": "jsonb",
}

# Beside the owner, and the daemon, which may do all of it.
READ_BY_READERS_AND_BRANDS = set(VIEWS)
CALLED_BY_READERS = {"balances_of"}
CALLED_BY_BRANDS = {
    "balances_of", "register_operation", "cancel", "claim_fulfilments", "renew_claim", "release_claim", "fulfil",
}  # fmt: skip

# What the daemon may not do to tables of its own schema: the rest it may read and write.
DAEMON_MAY_NOT = {
    "alembic_version": {"INSERT", "UPDATE", "DELETE"},
    "brand_login": {"INSERT", "UPDATE", "DELETE"},
    "fulfilment_claim": {"INSERT", "UPDATE", "DELETE"},
    "decision": {"INSERT", "UPDATE", "DELETE"},
    "receipt": {"UPDATE", "DELETE"},
    "history": {"UPDATE", "DELETE"},
    "instance": {"INSERT", "DELETE"},
}


@pytest.fixture
async def owner(owner_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(owner_dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def test_views_functions_and_types_are_what_programs_rely_on(owner: asyncpg.Connection) -> None:
    views = await owner.fetch(
        """
        SELECT c.relname, string_agg(a.attname || ' ' || replace(format_type(a.atttypid, a.atttypmod), 'timestamp with time zone',
                                     'timestamptz'), ', ' ORDER BY a.attnum) AS columns
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.relnamespace = 'loyalty'::regnamespace GROUP BY c.relname
        """
    )
    assert {row["relname"]: row["columns"] for row in views} == VIEWS
    kinds = await owner.fetch("SELECT DISTINCT relkind FROM pg_class WHERE relnamespace = 'loyalty'::regnamespace")
    assert [bytes(row["relkind"]) for row in kinds] == [b"v"], "views alone: no table, no sequence"
    functions = await owner.fetch(
        """
        SELECT proname || '(' || pg_get_function_arguments(oid) || ')' AS name,
               replace(pg_get_function_result(oid), 'timestamp with time zone', 'timestamptz') AS result
        FROM pg_proc WHERE pronamespace = 'loyalty'::regnamespace
        """
    )
    assert {row["name"]: row["result"] for row in functions} == FUNCTIONS


async def test_every_view_column_and_function_is_documented(owner: asyncpg.Connection) -> None:
    silent = await owner.fetch(
        """
        SELECT c.relname || '.' || a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
        WHERE c.relnamespace = 'loyalty'::regnamespace AND col_description(c.oid, a.attnum) IS NULL
        UNION ALL
        SELECT relname FROM pg_class WHERE relnamespace = 'loyalty'::regnamespace AND obj_description(oid, 'pg_class') IS NULL
        UNION ALL
        SELECT proname FROM pg_proc WHERE pronamespace = 'loyalty'::regnamespace AND obj_description(oid, 'pg_proc') IS NULL
        """
    )
    assert [row[0] for row in silent] == []


async def test_who_may_read_and_call_what(owner: asyncpg.Connection) -> None:
    async def granted(role: str) -> tuple[set[str], set[str], set[str]]:
        """Views it may read, functions it may call, and anything else at all that it may do."""
        rows = await owner.fetch(
            """
            SELECT c.oid::regclass::text AS name, p.privilege FROM pg_class c
            CROSS JOIN unnest('{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}'::text[]) AS p (privilege)
            WHERE c.relnamespace IN ('loyalty'::regnamespace, 'indexer'::regnamespace) AND c.relkind IN ('r', 'v', 'm', 'p')
              AND has_table_privilege($1, c.oid, p.privilege)
            """,
            role,
        )
        calls = await owner.fetch(
            """
            SELECT n.nspname || '.' || p.proname FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
            WHERE n.nspname IN ('loyalty', 'indexer') AND has_function_privilege($1, p.oid, 'EXECUTE')
            """,
            role,
        )
        schemas = await owner.fetch(
            """
            SELECT n.nspname, p.privilege FROM pg_namespace n CROSS JOIN unnest('{USAGE,CREATE}'::text[]) AS p (privilege)
            WHERE n.nspname IN ('loyalty', 'indexer') AND has_schema_privilege($1, n.oid, p.privilege)
            """,
            role,
        )
        reads = {row["name"] for row in rows if row["privilege"] == "SELECT" and row["name"].startswith("loyalty.")}
        more = {f"{row['privilege']} {row['name']}" for row in rows} - {f"SELECT {name}" for name in reads}
        more |= {f"{row['privilege']} {row['nspname']}" for row in schemas}
        return {name.removeprefix("loyalty.") for name in reads}, {row[0] for row in calls}, more

    everyone: tuple[set[str], set[str], set[str]] = (set(), set(), set())
    assert await granted("public") == everyone
    for role, callable_ in (("loyalty_reader", CALLED_BY_READERS), ("loyalty_brand", CALLED_BY_BRANDS)):
        expected = READ_BY_READERS_AND_BRANDS, {f"loyalty.{name}" for name in callable_}, {"USAGE loyalty"}
        assert await granted(role) == expected, role

    reads, _, more = await granted("loyalty_daemon")
    assert reads == set(VIEWS)
    assert not {
        privilege for privilege in more if privilege.split()[0] in ("CREATE", "TRUNCATE", "REFERENCES", "TRIGGER")
    }
    tables = await owner.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'indexer'")
    denied = {
        name: missing
        for (name,) in tables
        if (missing := {p for p in ("SELECT", "INSERT", "UPDATE", "DELETE") if f"{p} indexer.{name}" not in more})
    }
    assert denied == DAEMON_MAY_NOT


async def test_views_and_functions_are_built_to_keep_brands_apart(owner: asyncpg.Connection) -> None:
    """What a new view or function must have, whatever it shows."""
    views = await owner.fetch(
        """
        SELECT c.relname, c.reloptions FROM pg_class c WHERE c.relnamespace = 'loyalty'::regnamespace
          AND NOT coalesce(c.reloptions, '{}') @> '{security_barrier=true}' OR c.relnamespace = 'loyalty'::regnamespace
          AND EXISTS (SELECT FROM unnest(c.reloptions) AS o (said) WHERE o.said LIKE 'security_invoker%')
        """
    )
    assert [tuple(row) for row in views] == []
    assert {name for name, columns in VIEWS.items() if "brand text" not in columns} == {"sync_status"}
    functions = await owner.fetch(
        """
        SELECT p.oid::regprocedure::text AS name, p.prosecdef, p.proconfig, p.proleakproof, p.prosrc, n.nspname
        FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname IN ('loyalty', 'indexer')
        """
    )
    for function in functions:
        assert function["proconfig"] == ["search_path=pg_catalog, pg_temp"], function["name"]
        assert not function["proleakproof"], function["name"]
        assert function["prosecdef"] or function["nspname"] == "indexer", function["name"]
    # who calls is session_user, and no setting decides anything
    for source in [
        *(function["prosrc"] for function in functions),
        *(
            row[0]
            for row in await owner.fetch("SELECT definition FROM pg_views WHERE schemaname IN ('loyalty', 'indexer')")
        ),
    ]:
        assert not {"current_setting", "current_user", "current_role"} & set(
            source.lower().replace("(", " ").split()
        ), source
        assert "pg_notify" not in source, "NOTIFY carries no data"
