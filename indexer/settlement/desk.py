"""One pass over one neighbourhood: what the facts say of each operation, the steps it takes, and what has to be written.

Promises that a change of state and its signal are noted together, that claims stay one to one with what neighbours still hold,
and that the same facts change nothing twice. Reading and writing is the reconciler's; words are the teller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from indexer.model import signal as signals
from indexer.model.confidence import Alarm, Level, Policy, demanded
from indexer.model.evidence import Movement
from indexer.model.matching import Claim, Matching
from indexer.model.operation import AnyLeg, Leg, LegFacts, PartnerLeg, Situation, State, situation, steps
from indexer.model.signal import Signal
from indexer.model.standing import AnyEvidence, Standing
from indexer.settlement.expiry import certainly_expired
from indexer.settlement.rules import NO_RULES, BrandRules
from indexer.settlement.telling import Claims, Teller, where
from indexer.store import neighbourhood
from indexer.store.connection import Connection
from indexer.store.neighbourhood import Neighbourhood
from indexer.store.operations import Changes, HistoryRow, Operation, StoredClaim

RETRY_MS = 3_000  # a deadline has passed, and its coverage is not there yet
REJECTIONS_KEPT = 64
AGREE_RETRY_MS = 2_000  # too few endpoints of a chain agree
LATCH_RETRY_MS = 30_000  # a chain is latched: its operations wait for a person


@dataclass(slots=True)
class Pass:
    """What one pass did, for the observer and the loop."""

    operations: int = 0
    backlog: bool = False
    transitions: list[tuple[Operation, State, list[AnyEvidence]]] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)
    repeated: list[Movement] = field(default_factory=list)
    asked: bool = False  # blocks that somebody must vouch for
    now_ms: int = 0


class Desk:
    """One pass over one neighbourhood: everything an operation's turn needs at hand."""

    def __init__(
        self,
        conn: Connection,
        rules: Mapping[str, BrandRules],
        explorers: Mapping[int, str],
        standing: Standing,
        around: Neighbourhood,
        matching: Matching,
        changes: Changes,
        done: Pass,
    ) -> None:
        self.conn, self.rules, self.standing = conn, rules, standing
        self.around, self.matching, self.changes, self.done = around, matching, changes, done
        first: dict[UUID, AnyEvidence] = {transfer.id: transfer for transfer in around.transfers}
        for movement in sorted(around.movements, key=lambda m: m.position):
            first.setdefault(movement.id, movement)
        self.known = first
        self.stored = {claim.leg: claim for claim in around.claims}
        self.held_elsewhere = {claim.evidence_id for claim in around.claims if claim.leg[0] not in around.operations}
        self.teller = Teller(matching, first, around.hints, standing, explorers)

    async def settle(self, operation: Operation) -> None:
        """Recomputes one operation and notes what changes."""
        claims = {leg.index: self._claim(leg) for leg in operation.legs}
        evidence = [self.known[claim.evidence_id] for claim in claims.values() if claim is not None]
        chains = {leg.chain_id for leg in operation.legs if isinstance(leg, Leg)} | _chains(evidence)
        if any(self.standing.on(chain).latched for chain in chains):
            # a finality violation: nothing moves and nothing is signalled until a person has decided
            self.changes.alarms[operation.id] = [Alarm(0, "clock_ms", self.done.now_ms + LATCH_RETRY_MS)]
            return
        alarms: list[Alarm] = []
        facts = [await self._leg_facts(operation, leg, claims[leg.index], alarms) for leg in operation.legs]
        closed = any(leg.released for leg in operation.legs)
        says = situation(facts, cancelled=operation.cancelled, closed=closed)
        late = says is Situation.CONFLICT and not any(fact.conflict for fact in facts)
        self._note_claims(operation, claims)
        self._walk(operation, says, late, claims, evidence, alarms)
        self._finalized(operation, evidence, claims, alarms)
        self._rejected(operation, claims)
        policies = {
            leg.index: self._policy(leg, claim.basis if (claim := claims[leg.index]) else None)
            for leg in operation.legs
        }
        self.teller.describe(operation, late, claims, policies)
        self.changes.alarms[operation.id] = alarms
        self.changes.operations.append(operation)

    def _claim(self, leg: AnyLeg) -> Claim | None:
        claim = self.matching.claims.get(leg.key)
        if claim is None or claim.evidence_id not in self.held_elsewhere:
            return claim
        # a neighbour still holds the evidence and must let go first: touched, it will be looked at before us
        return None

    def _policy(self, leg: AnyLeg, basis: str | None) -> Policy:
        rule = self.rules.get(leg.brand, NO_RULES)
        issuer, loyalty_id = (leg.issuer, leg.loyalty_id) if isinstance(leg, Leg) else (None, None)
        return demanded(rule.policies, leg.kind, issuer, loyalty_id, leg.amount, basis)

    async def _leg_facts(self, operation: Operation, leg: AnyLeg, claim: Claim | None, alarms: list[Alarm]) -> LegFacts:
        if claim is not None:
            evidence, policy = self.known[claim.evidence_id], self._policy(leg, claim.basis)
            self._counts(evidence)
            settled = self.standing.reached(policy, evidence) or self._stands(operation, evidence)
            if not settled:
                alarms += self.standing.alarms(policy, evidence)
            return LegFacts(evidence=True, settled=settled, decided=claim.basis == "decision")
        contested = self.matching.conflicts.get(leg.key)
        # what is not proven may be one endpoint's invention: a person is told of it when it is
        conflict = contested is not None and self._counts(contested.evidence, Level.SAFE)
        # for a person's decision, or by a neighbour that must let go of it first
        held = leg.key in self.matching.held or leg.key in self.matching.claims
        if conflict or held or operation.cancelled or leg.released:
            return LegFacts(conflict=conflict, contested=held)
        if isinstance(leg, PartnerLeg):  # never expires: silence of a partner is age, not failure
            failure = self.matching.failed.get(leg.key)
            return LegFacts(
                submitted=leg.key in self.matching.submitted, failed=failure is not None and failure.certain
            )
        submitted = any(hint.status in ("submitted", "mined") for hint in self.teller.about(leg))
        if contested is not None:  # its time did not pass without an event: somebody looks who holds the one there is
            return LegFacts(contested=True, submitted=submitted)
        return LegFacts(dead=await self._expired(operation, leg, alarms), submitted=submitted)

    def _counts(self, evidence: AnyEvidence, level: Level = Level.INCLUDED) -> bool:
        """Whether as much speaks for the evidence's block as must at this rung; what is not known of it yet is asked."""
        if (block := self.standing.to_ask(evidence)) is not None:
            self.changes.asked.add(block)
        return self.standing.doubt(evidence, level) is None

    def _stands(self, operation: Operation, evidence: AnyEvidence) -> bool:
        """Whether a promise that nothing has taken back rests on this very log, or on this record as it is. Rules decide when to
        promise; a stricter policy, or a head that a reorganisation further up made shorter, takes nothing back."""
        if operation.state not in (State.READY, State.FULFILLED) or self.standing.depth(evidence) is None:
            return False
        return str(evidence.id) in (operation.detail.get("standing") or []) and where(evidence) in [
            {key: held.get(key) for key in where(evidence)} for held in operation.detail.get("blocks") or []
        ]

    async def _expired(self, operation: Operation, leg: Leg, alarms: list[Alarm]) -> bool:
        """Whether the leg's time has passed without the event, for certain."""
        heads = self.standing.on(leg.chain_id)
        last = leg.last_second
        if last is None:
            return False
        after_ms = (last + 1) * 1000  # strictly after that second: five blocks share it
        if not heads.agreed:
            alarms.append(Alarm(0, "clock_ms", self.done.now_ms + AGREE_RETRY_MS))
            return False
        if heads.finalized_time_ms < after_ms:
            alarms.append(Alarm(leg.chain_id, "finalized_time_ms", after_ms))
            return False
        if await certainly_expired(self.conn, operation, leg, heads, after_ms):
            # coverage is committed with the events that it speaks for, but we read those before it: once more, after it
            if not await neighbourhood.evidence_beside(
                self.conn, leg, [*self.around.movements, *self.around.set_aside]
            ):
                return True
            self.changes.touched.add(operation.id)
            return False
        alarms.append(Alarm(0, "clock_ms", self.done.now_ms + RETRY_MS))
        return False

    # ------------------------------------------------------------------ claims

    def _note_claims(self, operation: Operation, claims: Claims) -> None:
        for leg in operation.legs:
            before, now = self.stored.get(leg.key), claims[leg.index]
            if before is not None and (now is None or now.evidence_id != before.evidence_id):
                self.changes.unclaimed.append(leg.key)
            if now is not None:
                self.changes.claimed.append(StoredClaim(now, self.known[now.evidence_id].place))

    def touch_neighbours(self) -> None:
        """Neighbours whose claims or conflicts are no longer what the facts say: theirs is the next turn, not ours."""
        legs = {leg.key for leg in self.around.legs} | {leg.key for leg in self.around.partner_legs}
        holder = {claim.evidence_id: claim.leg for claim in self.matching.claims.values()}
        for claim in self.around.claims:
            # only where we see the whole picture: the leg is here, and its evidence is canonical
            ours = claim.leg[0] in self.around.operations
            if (
                not ours
                and claim.leg in legs
                and claim.evidence_id in self.known
                and holder.get(claim.evidence_id) != claim.leg
            ):
                self.changes.touched.add(claim.leg[0])
        for key, claim in self.matching.claims.items():
            waits = claim.evidence_id in self.held_elsewhere
            if waits if key[0] in self.around.operations else key not in self.stored:
                self.changes.touched.add(key[0])
        contested = {
            (key[0], key[1], conflict.evidence.id)
            for found in (self.matching.conflicts, self.matching.held)
            for key, conflict in found.items()
            if key[0] not in self.around.operations
        } | {
            (key[0], key[1], offer.evidence.id)
            for key, offers in self.matching.offers.items()
            for offer in offers
            if key[0] not in self.around.operations
        }
        recorded = {entry for entry in self.around.contested if entry[:2] in legs}
        self.changes.touched |= {entry[0] for entry in contested ^ recorded}

    def spoken_for(self) -> set[UUID]:
        """Evidence that a claim or a conflict on record names; to be asked before the operations are settled."""
        named = {claim.evidence_id for claim in self.around.claims} | {entry[2] for entry in self.around.contested}
        for operation in self.around.operations.values():
            named |= {UUID(conflict["evidenceId"]) for conflict in operation.detail.get("conflicts") or []}
        return named

    def freed(self, spoken_for: set[UUID]) -> list[Movement]:
        """Of that evidence, what is canonical still and nobody's any more: it is unmatched now, and may never have been told."""
        found = [*self.matching.conflicts.values(), *self.matching.held.values()]
        taken = {claim.evidence_id for claim in self.matching.claims.values()} | {one.evidence.id for one in found}
        return [m for m in self.around.movements if m.id in spoken_for and m.id not in taken]

    # ------------------------------------------------------------------ states

    def _walk(
        self,
        operation: Operation,
        says: Situation,
        late: bool,
        claims: Claims,
        evidence: list[AnyEvidence],
        alarms: list[Alarm],
    ) -> None:
        identities = sorted(str(piece.id) for piece in evidence)
        standing = operation.detail.get("standing") or []
        # what a `reverted` lost, or would lose now: its blocks may be below finalized already
        lost = operation.detail.get("lost" if operation.state is State.REVERTED else "blocks") or []
        # what a partner has withdrawn or changed is gone at once: it took two sweeps to be sure
        gone = all(
            self.standing.on(int(block["chainId"])).finalized_number >= int(block["blockNumber"])
            for block in lost
            if "chainId" in block
        )
        had_receipt = bool(operation.receipts)
        path = steps(
            operation.state,
            says,
            receipt=had_receipt,
            same_evidence=identities == standing,
            gone_for_good=bool(lost) and gone,
        )
        waited = {chain for chain in _chains(evidence) if not self.standing.on(chain).live}
        if waited:
            # nobody has looked whether these blocks still stand: a `ready` can wait, a false one cannot be unsaid
            kept = _before_promise(operation.state, path)
            if len(kept) < len(path):
                # the next head that a follower links is what makes a chain live; endpoints agree again when they do
                alarms += [
                    Alarm(chain, "head_time_ms", self.standing.on(chain).head_time_ms + 1)
                    if self.standing.on(chain).agreed
                    else Alarm(0, "clock_ms", self.done.now_ms + AGREE_RETRY_MS)
                    for chain in waited
                ]
            path = kept
        for position, state in enumerate(path):
            before, operation.state = operation.state, state
            self.changes.moved.add(operation.id)
            passing = position + 1 < len(path)
            self._enter(operation, before, state, passing, path, had_receipt, late, claims, evidence)
        if operation.state is State.REVERTED and not had_receipt:
            alarms += [
                Alarm(int(block["chainId"]), "finalized_number", int(block["blockNumber"]))
                for block in operation.detail.get("lost") or []
                if "chainId" in block
                and self.standing.on(int(block["chainId"])).finalized_number < int(block["blockNumber"])
            ]

    def _enter(
        self,
        operation: Operation,
        before: State,
        state: State,
        passing: bool,
        path: list[State],
        had_receipt: bool,
        late: bool,
        claims: Claims,
        evidence: list[AnyEvidence],
    ) -> None:
        causes: list[object] = [piece.id for piece in evidence]
        kind: str | None = None
        supersedes: UUID | None = None
        cause = "evidence"
        match state:
            case State.READY:
                operation.generation += 1
                # goods are never asked for twice: with a receipt on record this passes on to fulfilled, as `restored`
                kind = None if had_receipt else signals.READY
                cause = "settled"
                self._stand(operation, evidence)
            case State.FULFILLED:
                if before is State.REVERTED:
                    operation.generation += 1
                    self._stand(operation, evidence)
                restored = before is State.REVERTED or (before is State.READY and State.READY in path)
                kind = signals.RESTORED if restored else signals.FULFILLED
                cause = "restored" if restored else "receipt"
                if not restored:
                    causes = [f"receipt {max(operation.receipts)}"]
            case State.REVERTED:
                kind, supersedes, cause = signals.REVERTED, operation.standing_signal, "evidence gone"
                causes = [supersedes]
                operation.detail = {**operation.detail, "lost": operation.detail.get("blocks") or [], "standing": []}
                operation.standing_signal = None
            case State.EXPIRED | State.CANCELLED:
                kind, cause = (
                    signals.OF_STATE[state],
                    "deadline passed" if state is State.EXPIRED else "the brand's wish",
                )
                causes = [state.value, *self._decided(operation)]
                if not all(leg.released for leg in operation.legs):
                    self.changes.released.append(operation.id)
                    self.changes.touched.add(operation.id)  # once more: whoever waits beside it may be the only one now
            case State.CONFLICT:
                late = late or passing  # passed through: a person has accepted what settled after all
                kind, cause = signals.OF_STATE[state], "settled after it was closed" if late else "terms differ"
                causes += self._decided(operation)
                causes += [
                    self.matching.conflicts[leg.key].evidence.id
                    for leg in operation.legs
                    if leg.key in self.matching.conflicts
                ]
            case State.INCOMPLETE:
                kind, cause = signals.OF_STATE[state], "a leg can no longer settle"
                causes += self._decided(operation)
            case State.SUBMITTED | State.CONFIRMING:
                kind = None if passing else signals.OF_STATE[state]
            case State.PENDING:
                cause = "evidence gone"
        self.changes.history.append(
            HistoryRow(
                operation.id,
                before,
                state,
                operation.generation,
                cause,
                {"evidence": [str(piece.id) for piece in evidence]},
            )
        )
        self.done.transitions.append((operation, state, evidence))
        if kind is None:
            return
        signal = self.teller.signal(operation, kind, state, causes, claims, supersedes)
        if kind in (signals.READY, signals.RESTORED):
            operation.standing_signal = signal.id
        self.done.signals.append(signal)

    def _decided(self, operation: Operation) -> list[str]:
        """The decisions behind an operation's state: told once more after each, though the evidence is the same."""
        return [
            f"{decision.evidence_id} {'accepted' if decision.accept else 'dismissed'}"
            for decision in self.around.decisions
            if decision.operation_id == operation.id
        ]

    def _stand(self, operation: Operation, evidence: list[AnyEvidence]) -> None:
        """Remembers what the `ready` or `restored` rests on; claims become final with it."""
        operation.detail = {
            **operation.detail,
            "standing": sorted(str(piece.id) for piece in evidence),
            "lost": [],
        }
        own = {leg.key for leg in operation.legs}
        self.changes.claimed = [
            StoredClaim(Claim(c.claim.leg, c.claim.evidence_id, c.claim.basis, c.claim.ambiguous, True), c.place)
            if c.claim.leg in own
            else c
            for c in self.changes.claimed
        ]

    def _finalized(
        self, operation: Operation, evidence: list[AnyEvidence], claims: Claims, alarms: list[Alarm]
    ) -> None:
        """All evidence finalized: books may close. Once per generation."""
        if (
            operation.state not in (State.READY, State.FULFILLED)
            or operation.finalized_generation >= operation.generation
        ):
            return
        waiting = [piece for piece in evidence if self.standing.level(piece) is not Level.FINALIZED]
        if waiting:
            for piece in waiting:
                alarms += self.standing.alarms(_FINAL, piece)
            return
        operation.finalized_generation = operation.generation
        causes = [piece.id for piece in evidence]
        self.done.signals.append(self.teller.signal(operation, signals.FINALIZED, operation.state, causes, claims))

    def _rejected(self, operation: Operation, claims: Claims) -> None:
        """A hint, once for each record: a partner rejected, cancelled or failed what a leg waits for. It ends nothing."""
        if operation.state not in (State.PENDING, State.SUBMITTED, State.CONFIRMING, State.INCOMPLETE):
            return
        told = list(operation.detail.get("rejected") or [])
        for leg in operation.legs:
            if claims[leg.index] is not None:
                continue
            for entry in self.teller.rejections(leg):
                cause = f"{entry['leg']} {entry['provider']} {entry['recordId']}"
                if cause in told:
                    continue
                told.append(cause)
                self.done.signals.append(
                    self.teller.signal(
                        operation, signals.REJECTED, operation.state, [cause], claims, final=False, **entry
                    )
                )
        operation.detail = {**operation.detail, "rejected": told[-REJECTIONS_KEPT:]}


_FINAL = Policy(Level.FINALIZED)


def _chains(evidence: Sequence[AnyEvidence]) -> set[int]:
    """The chains that this evidence stands on."""
    return {place.chain_id for piece in evidence if (place := piece.place) is not None}


def _before_promise(state: State, path: list[State]) -> list[State]:
    """The part of the path before the first step that sends `ready` or `restored`."""
    for position, (here, there) in enumerate(zip([state, *path], path, strict=False)):
        if there is State.READY or (here, there) == (State.REVERTED, State.FULFILLED):
            return path[:position]
    return path
