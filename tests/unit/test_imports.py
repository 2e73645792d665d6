"""The direction of imports, read from the source: arrows point one way, and only the store speaks SQL.

cli → daemon → {chain, partners, settlement, signals, api} → store → model; `config` and `telemetry` are leaves that any
room but `model` may use; `sandbox` meets the product only through its public contract.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "indexer"
MODULES = sorted(PACKAGE.rglob("*.py"))

MIDDLE = frozenset({"chain", "partners", "settlement", "signals", "api"})
LEAVES = frozenset({"config", "telemetry"})
INNER = frozenset({"store", "model"}) | LEAVES

# From each room of the package to those that it may import; itself always.
ALLOWED: dict[str, frozenset[str]] = {
    "": frozenset(),  # indexer/__init__.py
    "model": frozenset(),
    "config": frozenset({"model.types"}),
    "telemetry": frozenset({"model.types"}),
    "store": frozenset({"model"}) | LEAVES,
    **dict.fromkeys(MIDDLE, INNER),
    "supervision": INNER,  # keeps loops running, whatever they do
    "observation": INNER,  # what loops report, as metrics
    "maintenance": INNER,  # what is over is forgotten
    "reload": INNER,  # what of another configuration takes effect at once
    "daemon": MIDDLE | INNER | {"supervision", "observation", "maintenance", "reload"},
    "terminal": INNER,  # what the commands print
    "commands": MIDDLE | INNER | {"daemon", "terminal", "sandbox"},  # what the command line does, by subject
    "cli": MIDDLE | INNER | {"daemon", "terminal", "sandbox", "commands"},
    "__main__": frozenset({"cli"}),
    "sandbox": frozenset({"model.types", "store.embedded"}),
}

# A statement, not a sentence: SQL verbs are followed by what they need.
SQL = re.compile(
    r"^\s*(--[^\n]*\n\s*)*(SELECT\s+\S+|INSERT\s+INTO\s|UPDATE\s+\S+\s+SET\s|DELETE\s+FROM\s|MERGE\s+INTO\s"
    r"|WITH\s+\w+\s+AS\s*(NOT\s+MATERIALIZED\s*)?\(|(CREATE|ALTER|DROP)\s+(TABLE|ROLE|SCHEMA|INDEX|FUNCTION|VIEW)\s"
    r"|NOTIFY\s+\w+|LISTEN\s+\w+|LOCK\s+TABLE\s|COPY\s+\w+[\s(].*\b(FROM|TO)\s)"
)


def module_name(path: Path) -> str:
    """`indexer.chain.rpc` of indexer/chain/rpc.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything of ours that a module imports, also inside functions and TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "indexer":
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            if base.partition(".")[0] == "indexer":
                for alias in node.names:
                    yield node.lineno, f"{base}.{alias.name}"


def allowed(importer: str, imported: str) -> bool:
    """Whether module `importer` may import the name `imported` (both absolute)."""
    room, inside = room_of(importer), imported.partition(".")[2]
    names = {inside, *(inside[:i] for i, c in enumerate(inside) if c == ".")}
    return inside == "" or room in names or bool(ALLOWED[room] & names) or inside == "__version__"


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    tree = ast.parse(source)
    return [
        f"{module}:{line} imports {name}"
        for line, name in imports(tree, module, is_package)
        if not allowed(module, name)
    ]


def sql_literals(source: str) -> list[int]:
    """Lines of the string literals (and f-strings) that are SQL statements; docstrings are prose."""
    tree = ast.parse(source)
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in prose
        and SQL.match(node.value)
    ]


# --------------------------------------------------------------------------- the package


def test_every_room_has_its_place_in_the_direction() -> None:
    assert {room_of(module_name(path)) for path in MODULES} <= set(ALLOWED)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    assert violations(path.read_text(), module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    "path", [path for path in MODULES if room_of(module_name(path)) not in ("store", "sandbox")], ids=module_name
)
def test_only_the_store_speaks_sql(path: Path) -> None:
    assert [f"{path.name}:{line}" for line in sql_literals(path.read_text())] == []


def test_the_sandbox_reads_only_the_public_schema() -> None:
    for path in PACKAGE.glob("sandbox/**/*.py"):
        source = path.read_text()
        lines = source.splitlines()
        for line in sql_literals(source):
            assert not re.search(r"\bindexer\.\w+", lines[line - 1]), f"{path}:{line} names a private table"


def test_the_model_is_pure() -> None:
    """No I/O, no clock, no SQL, no framework: of the standard library only what computes."""
    pure = {
        "__future__", "abc", "bisect", "collections", "dataclasses", "datetime", "decimal", "enum", "functools", "hashlib",
        "heapq", "itertools", "json", "math", "operator", "re", "types", "typing", "uuid",
    }  # fmt: skip
    for path in PACKAGE.glob("model/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                assert name.partition(".")[0] in pure | {"indexer"}, f"{path.name}:{node.lineno} imports {name}"


# --------------------------------------------------------------------------- the rules see what they should


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("indexer.model.types", "import indexer.config"),
        ("indexer.model.types", "from indexer.store import facts"),
        ("indexer.chain.rpc", "from indexer.signals.webhooks import X"),
        ("indexer.chain.rpc", "def f():\n    import indexer.api.server"),
        ("indexer.chain.rpc", "from ..partners import client"),
        ("indexer.api.server", "from indexer import daemon"),
        ("indexer.store.facts", "from indexer.chain.decode import Log"),
        ("indexer.config.load", "from indexer.model.operation import State"),
        ("indexer.telemetry", "from indexer.config import Config"),
        ("indexer.sandbox.demo", "from indexer.store.database import Database"),
        ("indexer.sandbox.demo", "from indexer.config import load"),
        ("indexer.daemon", "from indexer.cli import main"),
        ("indexer.signals.sequencer", "from indexer.settlement import reconciler"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("indexer.model.matching", "from indexer.model.types import Address"),
        ("indexer.model.matching", "from .types import Address"),
        ("indexer.chain.rpc", "from indexer.chain.wire import RawLog\nfrom indexer.model.types import Hash32"),
        ("indexer.chain.follower", "from indexer.store import facts\nfrom indexer.config import Chain\nimport asyncio"),
        ("indexer.config.tree", "from indexer.model.types import address"),
        (
            "indexer.sandbox.demo",
            "from indexer.store.embedded import EmbeddedPostgres\nfrom indexer.model import types",
        ),
        ("indexer.daemon", "from indexer.signals import sequencer"),
        ("indexer.cli", "from indexer import __version__, daemon"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


@pytest.mark.parametrize(
    "source",
    [
        'q = "SELECT 1"',
        'q = "insert into x values (1)"'.replace("insert into", "INSERT INTO"),
        'q = """\n-- why\nUPDATE indexer.lease SET until = now()"""',
        'q = f"DELETE FROM {table} WHERE x"',
        'q = "WITH due AS (SELECT 1) SELECT * FROM due"',
        'q = "LISTEN indexer_facts"',
    ],
)
def test_sql_is_recognised(source: str) -> None:
    assert sql_literals(source)


@pytest.mark.parametrize(
    "source",
    ['"""SELECT is a word"""', 'm = "select an endpoint"', 'm = "Update the file"', 'm = "WITH care"', 'm = "DELETE"'],
)
def test_prose_is_no_sql(source: str) -> None:
    assert not sql_literals(source)
