"""The ladder of confidence, and which rung a brand demands for a leg.

`included` < `confirmed` (so many seconds of chain on top) < `safe` < `finalized`: each is a comparison of a block with
the chain's heads, so nothing has to be promoted row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import ceil

from indexer.model.evidence import Movement


class Level(IntEnum):
    INCLUDED = 1
    CONFIRMED = 2
    SAFE = 3
    FINALIZED = 4

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Heads:
    """How far a chain is, as our store holds it. Numbers are -1 and times 0 where nothing is known yet."""

    chain_id: int
    head_number: int = -1
    head_time_ms: int = 0  # of the highest block that enough endpoints hold
    safe_number: int = -1
    finalized_number: int = -1
    finalized_time_ms: int = 0
    latched: bool = False
    live: bool = True  # a follower has linked a new head not long ago: what is stored has not been undone unseen
    agreed: bool = True  # as many endpoints as are needed were seen to hold what we hold
    quorum: int = 1  # endpoints that must hold a block before evidence in it counts
    proof: str = "off"  # required | where_possible | off: what evidence needs besides, to count above `included`

    def least(self, other: Heads) -> Heads:
        """What two looks at one chain agree on: all that may be said of facts that were read between them."""
        return Heads(
            self.chain_id,
            min(self.head_number, other.head_number),
            min(self.head_time_ms, other.head_time_ms),
            min(self.safe_number, other.safe_number),
            min(self.finalized_number, other.finalized_number),
            min(self.finalized_time_ms, other.finalized_time_ms),
            self.latched or other.latched,
            self.live and other.live,
            self.agreed and other.agreed,
            max(self.quorum, other.quorum),
            other.proof,
        )


@dataclass(frozen=True, slots=True)
class Policy:
    """One line of a brand's `policies`: what it applies to, and what it demands. Amounts in base units."""

    level: Level = Level.SAFE
    seconds: float = 0.0  # for CONFIRMED: seconds of chain on top
    max_amount: int | None = None
    kind: str | None = None
    issuer: bytes | None = None
    loyalty_id: bytes | None = None
    bases: frozenset[str] | None = None

    def applies(
        self, kind: str, issuer: bytes | None, loyalty_id: bytes | None, amount: int, basis: str | None
    ) -> bool:
        return (
            (self.max_amount is None or amount <= self.max_amount)
            and (self.kind is None or self.kind == kind)
            and (self.issuer is None or self.issuer == issuer)
            and (self.loyalty_id is None or self.loyalty_id == loyalty_id)
            and (self.bases is None or basis in self.bases)
        )


DEFAULT_POLICY = Policy()


def demanded(
    policies: Sequence[Policy],
    kind: str,
    issuer: bytes | None,
    loyalty_id: bytes | None,
    amount: int,
    basis: str | None,
) -> Policy:
    """The first policy that applies; `safe` where none does."""
    for policy in policies:
        if policy.applies(kind, issuer, loyalty_id, amount, basis):
            return policy
    return DEFAULT_POLICY


def level_of(evidence: Movement, heads: Heads) -> Level:
    """The rung that evidence in a canonical block stands on. CONFIRMED depends on a policy's seconds: see `reached`."""
    if evidence.block_number <= heads.finalized_number:
        return Level.FINALIZED
    if evidence.block_number <= heads.safe_number:
        return Level.SAFE
    return Level.INCLUDED


def reached(policy: Policy, evidence: Movement, heads: Heads) -> bool:
    """Whether evidence in a canonical block is as final as the policy demands."""
    if policy.level is Level.CONFIRMED:
        # a higher rung is deep enough, whatever the clock of the chain says
        deep = level_of(evidence, heads) >= Level.SAFE
        return deep or heads.head_time_ms - evidence.time_ms >= policy.seconds * 1000
    return level_of(evidence, heads) >= policy.level


@dataclass(frozen=True, slots=True)
class Alarm:
    """Look again when `axis` of the chain (0: the database's clock) passes `threshold`."""

    chain_id: int
    axis: str  # head_time_ms | safe_number | finalized_number | finalized_time_ms | clock_ms
    threshold: int


def alarms_for(policy: Policy, evidence: Movement) -> list[Alarm]:
    """When evidence that has not reached its policy should be looked at again: at the first of these."""
    match policy.level:
        case Level.CONFIRMED:
            # rounded up: an alarm before its time would ring again and again
            due_ms = evidence.time_ms + ceil(policy.seconds * 1000)
            return [
                Alarm(evidence.chain_id, "head_time_ms", due_ms),
                Alarm(evidence.chain_id, "safe_number", evidence.block_number),
            ]
        case Level.FINALIZED:
            return [Alarm(evidence.chain_id, "finalized_number", evidence.block_number)]
        case _:
            return [Alarm(evidence.chain_id, "safe_number", evidence.block_number)]
