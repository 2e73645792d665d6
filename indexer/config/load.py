"""From `indexer.toml` and INDEXER_* to one `Config`: finds the file, lays the environment over it, reads secret files.

Promises to report every problem at once, each with its place and what to do, and never to repeat a secret. What the
tables hold is declared in `tree.py`; whether they agree with each other is checked by `checks.py`.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from indexer.config.checks import disagreements, warnings
from indexer.config.schema import Place, Schema
from indexer.config.tree import Config, ConfigProblems, Problem

PREFIX = "INDEXER_"
SYSTEM_FILE = Path("/etc/indexer/indexer.toml")
SECRET_KEYS = ("url", "direct_url", "websocket", "api_key")  # each also as <key>_file
MAX_FILE_BYTES = 4_194_304
MAX_SECRET_BYTES = 65_536
MAX_DEPTH = 16

# Ours, but not settings of the tree.
NOT_SETTINGS = frozenset({"CONFIG", "PG_BIN"})
# Kubernetes adds these to every pod beside a Service that is called `indexer`.
SERVICE_LINK = re.compile(r"(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$")


def load(path: str | Path | None = None, environ: Mapping[str, str] | None = None, *, embedded: bool = False) -> Config:
    """Reads the configuration: `path`, else INDEXER_CONFIG, else ./indexer.toml, else /etc/indexer/indexer.toml.

    Without any file the environment alone will do. `embedded` says that the process brings its own database. Raises
    ConfigProblems.
    """
    environ = os.environ if environ is None else environ
    return _Loading(environ, embedded).load(path)


class _Loading:
    """One reading: the tree as it grows, which place came from which source, and what was wrong on the way."""

    def __init__(self, environ: Mapping[str, str], embedded: bool) -> None:
        self.environ = environ
        self.embedded = embedded
        self.schema = Schema()
        self.tree: dict[str, Any] = {}
        self.in_file: set[Place] = set()
        self.sources: dict[Place, str] = {}  # place → the variable or file key it came from
        self.problems: list[Problem] = []
        self.reported: set[Place] = set()
        self.notes: list[Problem] = []
        self.folder = Path.cwd()  # relative secret files are looked up beside the configuration file

    def load(self, path: str | Path | None) -> Config:
        found = self._find(path)
        if found is not None:
            self.folder = found.absolute().parent
            self.tree = self._parse(found)
            self.in_file = {(key,) for key in self.tree}
        layered = self._environment()
        if found is None and not layered and not self.problems:
            self._problem(
                (),
                "no configuration: neither ./indexer.toml nor /etc/indexer/indexer.toml exists",
                "name one with --config or INDEXER_CONFIG; indexer.example.toml is a start",
            )
        if self.problems and not self.tree:
            raise ConfigProblems(self.problems)
        for place, value in _leaves(self.tree):
            if len(place) > MAX_DEPTH:  # before anything here walks the tree by recursion
                self._problem(place[:1], "tables or lists nested too deep", "the deepest key has seven parts")
                raise ConfigProblems(self.problems)
            if _has_controls(value):
                self._problem(place, "holds a control character (NUL, newline, tab …)", "remove it")
        self._secret_files(self.tree, ())
        self.tree.setdefault("state_dir", _default_state_dir(self.environ))
        config = self._validate()
        self._database()
        self.problems += disagreements(self.tree)
        if config is None or self.problems:
            raise ConfigProblems(self.problems)
        config._warnings = (*self.notes, *warnings(config))
        return config

    def _problem(self, place: Place, what: str, hint: str = "") -> None:
        where = spell(place)
        source = next((self.sources[place[:n]] for n in range(len(place), 0, -1) if place[:n] in self.sources), None)
        if source is None and place not in self.in_file:  # a table that only the environment speaks of
            source = next((variable for at, variable in self.sources.items() if at[: len(place)] == place), None)
        self.problems.append(Problem(f"{where} (from {source})" if source else where, what, hint))
        self.reported.add(place)

    # ----------------------------------------------------------------- the file

    def _find(self, path: str | Path | None) -> Path | None:
        if path is not None:
            return Path(path)
        if self.environ.get("INDEXER_CONFIG"):
            return Path(self.environ["INDEXER_CONFIG"])
        return next(
            (candidate for candidate in (Path("indexer.toml"), SYSTEM_FILE) if os.path.lexists(candidate)), None
        )

    def _parse(self, path: Path) -> dict[str, Any]:
        def fail(what: str, hint: str) -> dict[str, Any]:
            self.problems.append(Problem(str(path), what, hint))
            return {}

        try:
            with path.open("rb") as stream:
                raw = stream.read(MAX_FILE_BYTES + 1)
            if len(raw) > MAX_FILE_BYTES:
                return fail(f"larger than {MAX_FILE_BYTES} bytes", "name the configuration file")
            return tomllib.loads(raw.decode().removeprefix("\ufeff"))
        except FileNotFoundError:
            return fail("the configuration file does not exist", "check --config and INDEXER_CONFIG")
        except PermissionError:
            return fail(
                "the configuration file may not be read by this user",
                f"chown or chmod it; this process runs as uid {os.geteuid()}",
            )
        except OSError as error:
            return fail(f"the configuration file cannot be read: {error.strerror}", "name a regular file")
        except UnicodeDecodeError as error:
            return fail(f"not UTF-8: byte {error.start + 1} is no part of a character", "save the file as UTF-8")
        except tomllib.TOMLDecodeError as error:
            return fail(f"not valid TOML: {error}", "strings need quotes; each key may stand once in its table")
        except (ValueError, RecursionError):  # digits beyond Python's limit, brackets beyond its stack, NUL in the path
            return fail("not readable as TOML: a number, a nesting or the path itself is absurd", "correct the file")

    # ----------------------------------------------------------------- the environment

    def _environment(self) -> bool:
        """Lays INDEXER_SECTION__KEY over the tree; true when any variable was a setting."""
        layered = False
        for variable in sorted(name for name in self.environ if name.startswith(PREFIX)):
            rest, text = variable[len(PREFIX) :], self.environ[variable]
            if rest in NOT_SETTINGS or SERVICE_LINK.match(rest):
                continue
            if not text:  # how compose files pass "not set"
                continue
            place: Place = tuple(rest.lower().split("__"))
            known = sorted(self.schema.properties(()))
            if len(place) == 1 and place[0] not in known:
                near = get_close_matches(str(place[0]), known, 1, 0.75)
                if not near:  # some other program's variable, perhaps
                    self.notes.append(
                        Problem(variable, "no setting is called so; ignored", f"top-level settings: {', '.join(known)}")
                    )
                    continue
            layered = True
            self._lay(variable, place, text)
        return layered

    def _lay(self, variable: str, place: Place, text: str) -> None:
        table: Any = self.tree
        for depth, key in enumerate(place[:-1], 1):
            if "array" in self.schema.types(place[:depth]):
                whole = f"{PREFIX}{'__'.join(map(str, place[:depth])).upper()}"
                self.problems.append(
                    Problem(variable, f"{spell(place[:depth])} is a list", f"give the whole list as JSON in {whole}")
                )
                return
            table = table.setdefault(key, {}) if isinstance(table, dict) else None
        if not isinstance(table, dict):
            self.problems.append(
                Problem(variable, f"{spell(place[:-1])} is not a table in the file", "correct the file")
            )
            return
        value: Any = text
        if {"array", "object"} & self.schema.types(place):
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                position = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
                self.problems.append(
                    Problem(variable, f"not valid JSON{position}", "lists and tables are given as JSON")
                )
                self.reported.add(place)
                return
        key = str(place[-1])
        for other in (f"{key}_file", key.removesuffix("_file")):  # the environment's url replaces the file's url_file
            if other != key and other.removesuffix("_file") in SECRET_KEYS and (*place[:-1], other) not in self.sources:
                table.pop(other, None)
        table[key] = value
        self.sources[place] = variable

    # ----------------------------------------------------------------- secrets

    def _secret_files(self, node: Any, place: Place) -> None:
        """Replaces each `<key>_file` and `secret_files` by what the files hold."""
        if isinstance(node, list):
            for index, item in enumerate(node):
                self._secret_files(item, (*place, index))
        if not isinstance(node, dict):
            return
        for key in SECRET_KEYS:
            if f"{key}_file" in node and key in self.schema.properties(place):
                self._one_secret_file(node, place, key)
        if "secret_files" in node and "secrets" in self.schema.properties(place):
            self._many_secret_files(node, place)
        for key, child in node.items():
            self._secret_files(child, (*place, key))

    def _one_secret_file(self, node: dict[str, Any], place: Place, key: str) -> None:
        source = (*place, f"{key}_file")
        path = node.pop(f"{key}_file")
        if key in node:
            self._problem(source, f"both {key} and {key}_file are given", "keep one of them")
            return
        value = self._read_secret(path, source)
        self.sources[(*place, key)] = f"{key}_file"
        if value is None:
            self.reported.add((*place, key))
        else:
            node[key] = value

    def _many_secret_files(self, node: dict[str, Any], place: Place) -> None:
        paths = node.pop("secret_files")
        source = (*place, "secret_files")
        if not isinstance(paths, list) or not paths:
            self._problem(source, "expected a list of at least one path", 'secret_files = ["/run/secrets/shop"]')
            self.reported.add((*place, "secrets"))
            return
        if "secrets" in node:
            self._problem(source, "both secrets and secret_files are given", "keep one of them")
            return
        values = [self._read_secret(path, (*source, index)) for index, path in enumerate(paths)]
        self.sources[(*place, "secrets")] = "secret_files"
        if None in values:
            self.reported.add((*place, "secrets"))
        else:
            node["secrets"] = values

    def _read_secret(self, path: object, place: Place) -> str | None:
        if not isinstance(path, str) or not path:
            self._problem(place, "expected the path of a file")
            return None
        if _has_controls(path):
            return None  # already reported
        file = self.folder / path
        try:
            # not blocking: a named pipe that nobody writes to would hold us up for ever
            with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as stream:
                if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                    self._problem(
                        place, f"{file} is not a regular file", "write the secret into one: it is read again on SIGHUP"
                    )
                    return None
                raw = stream.read(MAX_SECRET_BYTES + 1)
            text = raw.decode().strip()
        except FileNotFoundError:
            self._problem(place, f"the file {file} does not exist", "create it, or correct the path")
        except PermissionError:
            self._problem(
                place, f"the file {file} may not be read by this user", f"this process runs as uid {os.geteuid()}"
            )
        except OSError as error:
            self._problem(place, f"the file {file} cannot be read: {error.strerror}")
        except UnicodeDecodeError:
            self._problem(place, f"the file {file} is not text", "it holds the secret alone, as one line")
        else:
            if text and len(raw) <= MAX_SECRET_BYTES and not _has_controls(text):
                return text
            self._problem(
                place, f"the file {file} is empty, or more than one line", "it holds the secret alone, as one line"
            )
        return None

    # ----------------------------------------------------------------- validation

    def _validate(self) -> Config | None:
        try:
            return Config.model_validate(self.tree)
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False)
            for detail in details:
                place: Place = detail["loc"]
                if detail["type"] == "too_short" and any(
                    len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in details
                ):
                    continue  # its items were refused, and are reported
                if any(place[:n] in self.reported for n in range(1, len(place) + 1)):
                    continue
                self._explain(place, detail["type"], detail["msg"], detail.get("ctx", {}))
        return None

    def _explain(self, place: Place, kind: str, message: str, context: Mapping[str, Any]) -> None:
        if kind == "extra_forbidden":
            self._problem(place, "no such key", self.schema.nearest(place))
        elif kind == "missing":
            key = str(place[-1])
            spelled = {"secrets": "`secrets` or `secret_files`"}.get(
                key, f"`{key}` or `{key}_file`" if key in SECRET_KEYS else f"`{key}`"
            )
            self._problem(place, "missing", f"add {spelled}: {self.schema.description(place)}".removesuffix(": "))
        elif kind == "refused":
            self._problem(place, context["what"], context["hint"] or self.schema.description(place))
        else:
            self._problem(
                place,
                message.replace("Input should", "should")
                .replace("Value error, ", "")
                .replace(
                    "Input is not a valid path for <class 'pathlib.Path'>", "should be the path of a folder, as text"
                ),
                self.schema.description(place),
            )

    def _database(self) -> None:
        database = self.tree.get("database", {})
        place: Place = ("database", "url")
        if not isinstance(database, dict) or place in self.reported:
            return
        given = bool(database.get("url"))
        if not given and not self.embedded:
            self._problem(place, "missing", "set it, url_file or INDEXER_DATABASE__URL, or run with --embedded")
        elif given and self.embedded:
            self._problem(place, "--embedded brings its own database, and another is configured", "drop one of the two")


def spell(place: Place) -> str:
    """`('chains', 0, 'rpc')` as a person writes it: `chains[0].rpc`."""
    parts = (f"[{key}]" if isinstance(key, int) else f".{_printable(key)}" for key in place)
    return "".join(parts).removeprefix(".")


def _printable(key: str) -> str:
    shown = "".join(c if c.isprintable() else "\ufffd" for c in key[:60])
    return shown + "…" if len(key) > 60 else shown


def _has_controls(value: object) -> bool:
    return isinstance(value, str) and any(ord(c) < 32 or ord(c) == 127 for c in value)


def _leaves(tree: dict[str, Any]) -> Iterator[tuple[Place, object]]:
    """Every value that is no table or list, and those that are empty or nested beyond MAX_DEPTH."""
    stack: list[tuple[Place, object]] = [((), tree)]
    while stack:
        place, node = stack.pop()
        if isinstance(node, dict | list) and len(place) <= MAX_DEPTH:
            children = node.items() if isinstance(node, dict) else enumerate(node)
            stack.extend(((*place, key), child) for key, child in children)
        else:
            yield place, node


def _default_state_dir(environ: Mapping[str, str]) -> str:
    if environ.get("STATE_DIRECTORY"):  # systemd: colon-separated, the first is ours
        return environ["STATE_DIRECTORY"].split(":")[0]
    if os.geteuid() == 0:
        return "/var/lib/indexer"
    return str(Path(environ.get("HOME") or Path.home()) / ".local/state/indexer")
