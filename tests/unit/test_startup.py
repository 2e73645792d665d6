"""A start of the daemon waits for nothing that only migrations need; what is written out for that agrees with them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from alembic.script import ScriptDirectory

from indexer.store import schema, tables
from indexer.store.event_tables import EVENT_TABLES


@pytest.mark.parametrize("field", EVENT_TABLES)
def test_columns_and_keys_are_the_declared_ones(field: str) -> None:
    written = EVENT_TABLES[field]
    declared = tables.metadata.tables[f"indexer.{written.name}"]
    assert written.columns == tuple(column.name for column in declared.columns)
    assert written.key == tuple(column.name for column in declared.primary_key)


def test_the_daemon_starts_without_what_only_migrations_need() -> None:
    found = subprocess.run(
        [sys.executable, "-c", "import sys, indexer.cli, indexer.daemon; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"sqlalchemy", "alembic", "web3", "eth_account", "py_ecc"} & set(found)


def test_the_revisions_are_alembics() -> None:
    scripts = ScriptDirectory.from_config(schema._config())
    assert schema._revisions() == tuple(script.revision for script in scripts.walk_revisions())
    assert schema._revisions()


def test_a_ctrl_c_while_the_rooms_are_imported_is_no_traceback() -> None:
    interrupted = """
import sys
class CtrlC:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, CtrlC())
from indexer.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
