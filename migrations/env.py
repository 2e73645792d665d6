"""Alembic's environment: runs on the connection that `indexer.store.schema.migrate` hands over, each migration in its own
transaction."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection, text

from indexer.store.tables import metadata


def run(connection: Connection) -> None:
    if not connection.scalar(text("SELECT to_regnamespace('indexer') IS NOT NULL")):
        connection.execute(text("CREATE SCHEMA indexer"))  # the version's own table lives there
    connection.commit()
    context.configure(
        connection=connection,
        target_metadata=metadata,
        include_schemas=True,
        include_name=lambda name, kind, _parents: kind != "schema" or name == "indexer",
        version_table_schema="indexer",
        compare_type=True,
        compare_server_default=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()


run(context.config.attributes["connection"])
