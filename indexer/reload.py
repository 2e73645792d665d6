"""What of a configuration that was read again takes effect at once, and what waits for a restart, with the reason.

`adopt` is pure: it makes one tree out of the one in effect and the one that was read. A file that cannot be used as a whole
changes nothing. Reading files, and putting a tree into effect, is the daemon's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from indexer.config import Chain, Config, Problem

# What of a chain is read by its loops alone: they begin anew with it. The rest is what stored facts were made under.
_FIXED = {
    "name": "logs, metrics and tables go by the old one",
    "factories": "what is followed is decided when the daemon starts",
    "inferred_events": "which events are read is decided when the daemon starts",
}
_RESTART = "restart the daemon"


@dataclass(frozen=True, slots=True)
class Adopted:
    """The tree that is in effect now, and what of the new one it leaves out: `where`, why (`what`), and what to do."""

    config: Config
    refused: tuple[Problem, ...]


def adopt(old: Config, new: Config) -> Adopted:
    """Brands, webhooks, policies, retention and the endpoints of chains of `new`; the rest of `old`."""
    refused: list[Problem] = []
    if new.state_dir != old.state_dir:
        refused.append(Problem("state_dir", "the folder is in use", _RESTART))
    for key in type(old.database).model_fields:
        if getattr(new.database, key) != getattr(old.database, key):
            refused.append(Problem(f"database.{key}", "connections and leases were opened with the old one", _RESTART))
    if new.http != old.http:
        refused.append(Problem("http.listen", "the server listens already", _RESTART))
    chains = _chains(old.chains, new.chains, refused)
    kept = {"state_dir": old.state_dir, "database": old.database, "http": old.http, "chains": chains}
    return Adopted(new.model_copy(update=kept), tuple(refused))


def _chains(old: Sequence[Chain], new: Sequence[Chain], refused: list[Problem]) -> tuple[Chain, ...]:
    given = {chain.chain_id: (f"chains[{index}]", chain) for index, chain in enumerate(new)}
    kept = []
    for chain in old:
        if chain.chain_id not in given:
            refused.append(Problem("chains", f"{chain.name} is not left out while it is followed", _RESTART))
            kept.append(chain)
            continue
        where, wanted = given.pop(chain.chain_id)
        refused += [
            Problem(f"{where}.{key}", why, _RESTART)
            for key, why in _FIXED.items()
            if getattr(wanted, key) != getattr(chain, key)
        ]
        kept.append(wanted.model_copy(update={key: getattr(chain, key) for key in _FIXED}))
    refused += [
        Problem(where, "a new chain is not taken up while the daemon runs", _RESTART) for where, _ in given.values()
    ]
    return tuple(kept)


def _instant(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


@dataclass
class Reading:
    """The last time that the configuration was read, as `/v1/status` tells it. Places of the file, never their values."""

    read_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    applied_at: datetime = field(default_factory=lambda: datetime.now(UTC))  # the tree in effect is of this reading
    refused: Sequence[Problem] = ()
    problems: Sequence[Problem] = ()  # for which the reading as a whole came to nothing

    def applied(self, refused: Sequence[Problem]) -> None:
        self.read_at = self.applied_at = datetime.now(UTC)
        self.refused, self.problems = refused, ()

    def failed(self, problems: Sequence[Problem]) -> None:
        self.read_at, self.problems = datetime.now(UTC), problems

    def told(self) -> dict[str, object]:
        return {
            "readAt": _instant(self.read_at),
            "appliedAt": _instant(self.applied_at),
            "refused": [{"where": problem.where, "reason": problem.what} for problem in self.refused],
            "problems": [problem.where for problem in self.problems],
        }
