"""Writes migrations/versions/0001_first.py anew from `indexer/store/tables.py`: `python -m tests.regenerate_migration`.

For use until version 1 is released; from then on a change is a migration of its own.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

from alembic.autogenerate import produce_migrations, render_python_code
from alembic.migration import MigrationContext
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine

from indexer.store.database import open_session
from indexer.store.embedded import EmbeddedPostgres
from indexer.store.schema import migrations_folder
from indexer.store.tables import metadata

HEAD = '''"""The first schema: `indexer` as `indexer/store/tables.py` declares it, `loyalty` as `indexer/store/contract/*.sql` does.

Revision ID: 0001
Revises:

Written by `python -m tests.regenerate_migration`: run it after a change of tables.py, as long as version 1 is not released.
"""

from __future__ import annotations

from importlib.resources import files

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Groups, shared by all databases of the server: what the daemon may do, what readers and brands may see.
ROLES = ("loyalty_daemon", "loyalty_reader", "loyalty_brand")

# In this order: views may call functions, and grants come last.
CONTRACT = ("functions.sql", "restoration.sql", "fulfilment.sql", "views.sql", "grants.sql")

CREATE_ROLE = """
DO $$
BEGIN
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN
    CREATE ROLE {role};
    GRANT {role} TO CURRENT_USER;
  END IF;
EXCEPTION
  WHEN duplicate_object OR unique_violation THEN NULL;  -- another database of this server, at the same moment
  WHEN insufficient_privilege THEN
    RAISE EXCEPTION 'this user may not create roles (it has no CREATEROLE): let a superuser run  CREATE ROLE loyalty_daemon; CREATE ROLE loyalty_reader; CREATE ROLE loyalty_brand; GRANT loyalty_brand, loyalty_reader TO % WITH ADMIN OPTION;  and migrate again', quote_ident(current_user)
      USING ERRCODE = 'insufficient_privilege';
END $$
"""

# The contract keeps views and functions of its own beside the tables.
DROP_BESIDE = """
DO $$
DECLARE one text;
BEGIN
  FOR one IN SELECT unnest(array_agg(c.oid::regclass::text)) FROM pg_class c WHERE c.relnamespace = 'indexer'::regnamespace AND c.relkind = 'v' LOOP
    EXECUTE format('DROP VIEW IF EXISTS %s CASCADE', one);
  END LOOP;
  FOR one IN SELECT unnest(array_agg(p.oid::regprocedure::text)) FROM pg_proc p WHERE p.pronamespace = 'indexer'::regnamespace LOOP
    EXECUTE format('DROP ROUTINE IF EXISTS %s CASCADE', one);
  END LOOP;
END $$
"""


def execute_script(sql: str) -> None:
    """Many statements at once, dollar quotes and all: only the driver's simple protocol takes them."""
    connection = op.get_bind().connection.dbapi_connection
    connection.run_async(lambda driver: driver.execute(sql))

'''

TAIL = """

def upgrade() -> None:
    for role in ROLES:
        op.execute(CREATE_ROLE.format(role=role))
    create_tables()
    op.execute("INSERT INTO indexer.instance (stream) VALUES (gen_random_uuid())")
    op.execute("CREATE SCHEMA loyalty")
    contract = files("indexer.store").joinpath("contract")
    for name in CONTRACT:
        execute_script(contract.joinpath(name).read_text(encoding="utf-8"))


def downgrade() -> None:
    # the roles stay: other databases of the server may use them
    op.execute("DROP SCHEMA loyalty CASCADE")
    op.execute(DROP_BESIDE)
    op.execute("ALTER DEFAULT PRIVILEGES IN SCHEMA indexer REVOKE ALL ON TABLES FROM loyalty_daemon")
    drop_tables()
"""


def render(connection: Connection) -> str:
    context = MigrationContext.configure(
        connection,
        opts={
            "target_metadata": metadata,
            "include_schemas": True,
            "include_name": lambda name, kind, _parents: kind != "schema" or name == "indexer",
        },
    )
    script = produce_migrations(context, metadata)
    assert script.upgrade_ops is not None and script.downgrade_ops is not None
    parts = []
    for name, operations in (("create_tables", script.upgrade_ops), ("drop_tables", script.downgrade_ops)):
        code = render_python_code(operations, alembic_module_prefix="op.", sqlalchemy_module_prefix="sa.")
        # an index goes with its table
        lines = [line for line in code.splitlines() if not line.strip().startswith(("# ###", "op.drop_index"))]
        parts.append(f"\ndef {name}() -> None:\n" + "\n".join(["    " + lines[0].strip(), *lines[1:]]).rstrip() + "\n")
    code = HEAD + "\n".join(parts) + TAIL
    # Alembic forgets the prefix of a type within a type
    return code.replace("JSONB(astext_type=Text())", "JSONB()").replace("ARRAY(", "ARRAY(sa.")


async def main() -> None:
    state = Path(tempfile.mkdtemp(prefix="indexer-"))
    state.chmod(0o711)
    try:
        async with EmbeddedPostgres(state, durable=False) as postgres:
            url = postgres.dsn("indexer_owner")
            engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda: open_session(url, "regenerate"))
            async with engine.connect() as connection:
                code = await connection.run_sync(render)
            await engine.dispose()
    finally:
        shutil.rmtree(state, ignore_errors=True)
    target = migrations_folder() / "versions" / "0001_first.py"
    target.write_text(code)
    print(f"written: {target}")


if __name__ == "__main__":
    asyncio.run(main())
