"""The reconciler: facts in, transitions and signals out, level-triggered as a Kubernetes controller is.

It takes the operations that something touched, recomputes each one's state as a pure function of facts (the model's), and
writes claims, transition, history and signals in one leased transaction. Run twice it changes nothing the second time; a
missed wake-up costs latency only. Following chains and delivering signals are others' work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import UUID

from indexer.model import signal as signals
from indexer.model.confidence import Alarm, Heads, Level, Policy, alarms_for, demanded, level_of, reached
from indexer.model.evidence import Movement
from indexer.model.matching import Claim, Conflict, Matching, WalletRules, match
from indexer.model.operation import Leg, LegFacts, Situation, State, situation, steps
from indexer.model.signal import Signal
from indexer.model.types import hex0x
from indexer.settlement.expiry import certainly_expired
from indexer.store import operations as store
from indexer.store.connection import Connection
from indexer.store.operations import Changes, HistoryRow, Neighbourhood, Operation, StoredClaim
from indexer.store.signals import append

RETRY_MS = 3_000  # a deadline has passed, and its coverage is not there yet
LATCH_RETRY_MS = 30_000  # a chain is latched: its operations wait for a person


@dataclass(frozen=True)
class BrandRules:
    """What the configuration says about settling a brand's operations."""

    policies: tuple[Policy, ...] = ()
    wallet: WalletRules = field(default_factory=WalletRules)


class Observer(Protocol):
    """Told after the commit, once per transition. Times in Unix milliseconds by the database's clock and the chain's."""

    def transition(self, operation: Operation, to: State, movements: Sequence[Movement], now_ms: int) -> None: ...

    def signalled(self, signal: Signal) -> None: ...

    def repeated(self, movement: Movement) -> None: ...


@dataclass(slots=True)
class Pass:
    """What one pass did, for the observer and the loop."""

    operations: int = 0
    backlog: bool = False
    transitions: list[tuple[Operation, State, list[Movement]]] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)
    repeated: list[Movement] = field(default_factory=list)
    now_ms: int = 0


async def reconcile(
    conn: Connection, rules: Mapping[str, BrandRules], explorers: Mapping[int, str], *, batch: int = 200
) -> Pass:
    """One pass inside the caller's leased transaction: at most `batch` operations, oldest touch first."""
    done = Pass(now_ms=await store.now_ms(conn))
    heads = await store.heads(conn)
    ranges = await store.spread_touched_blocks(conn)
    rung = await store.ring_alarms(conn, heads.values(), done.now_ms)
    ids = await store.take_touched(conn, batch)
    done.operations = len(ids)
    done.backlog = len(ids) == batch or ranges > 0 or rung > 0
    if not ids:
        return done
    around = await store.load(conn, ids)
    # Commits come in between these statements. Heads of before a reorganisation say nothing of blocks after it, nor the other
    # way round: of facts that were read between two looks, only what both looks say holds.
    since = await store.heads(conn)
    heads = {chain: seen.least(since[chain]) for chain, seen in heads.items() if chain in since}
    matching = match(
        around.legs,
        around.movements,
        around.claims,
        around.decisions,
        {brand: rule.wallet for brand, rule in rules.items()},
    )
    done.repeated = matching.repeated
    changes = Changes()
    desk = _Desk(conn, rules, explorers, heads, around, matching, changes, done)
    spoken_for = desk.spoken_for()
    for operation in around.operations.values():
        await desk.settle(operation)
    desk.touch_neighbours()
    await store.store(conn, changes)
    await store.look_again(conn, desk.freed(spoken_for))
    await append(conn, done.signals)
    return done


class _Desk:
    """One pass over one neighbourhood: everything an operation's turn needs at hand."""

    def __init__(
        self,
        conn: Connection,
        rules: Mapping[str, BrandRules],
        explorers: Mapping[int, str],
        heads: Mapping[int, Heads],
        around: Neighbourhood,
        matching: Matching,
        changes: Changes,
        done: Pass,
    ) -> None:
        self.conn, self.rules, self.explorers, self.heads = conn, rules, explorers, heads
        self.around, self.matching, self.changes, self.done = around, matching, changes, done
        first: dict[UUID, Movement] = {}
        for movement in sorted(around.movements, key=lambda m: m.position):
            first.setdefault(movement.id, movement)
        self.movements = first
        self.stored = {claim.leg: claim for claim in around.claims}
        self.held_elsewhere = {claim.evidence_id for claim in around.claims if claim.leg[0] not in around.operations}

    async def settle(self, operation: Operation) -> None:
        """Recomputes one operation and notes what changes."""
        chains = [self.heads.get(leg.chain_id, Heads(leg.chain_id)) for leg in operation.legs]
        if any(chain.latched for chain in chains):
            # a finality violation: nothing moves and nothing is signalled until a person has decided
            self.changes.alarms[operation.id] = [Alarm(0, "clock_ms", self.done.now_ms + LATCH_RETRY_MS)]
            return
        alarms: list[Alarm] = []
        claims = {leg.index: self._claim(leg) for leg in operation.legs}
        facts = [await self._leg_facts(operation, leg, claims[leg.index], alarms) for leg in operation.legs]
        closed = any(leg.released for leg in operation.legs)
        says = situation(facts, cancelled=operation.cancelled, closed=closed)
        late = says is Situation.CONFLICT and not any(fact.conflict for fact in facts)
        evidence = [self.movements[claim.evidence_id] for claim in claims.values() if claim is not None]
        self._note_claims(operation, claims)
        self._walk(operation, says, late, claims, evidence, alarms)
        self._finalized(operation, evidence, claims, alarms)
        self._describe(operation, says, late, claims)
        self.changes.alarms[operation.id] = alarms
        self.changes.operations.append(operation)

    def _claim(self, leg: Leg) -> Claim | None:
        claim = self.matching.claims.get(leg.key)
        if claim is None or claim.evidence_id not in self.held_elsewhere:
            return claim
        # a neighbour still holds the evidence and must let go first: touched, it will be looked at before us
        return None

    def _policy(self, leg: Leg, basis: str | None) -> Policy:
        rule = self.rules.get(leg.brand, BrandRules())
        return demanded(rule.policies, leg.kind, leg.issuer, leg.loyalty_id, leg.amount, basis)

    async def _leg_facts(self, operation: Operation, leg: Leg, claim: Claim | None, alarms: list[Alarm]) -> LegFacts:
        heads = self.heads.get(leg.chain_id, Heads(leg.chain_id))
        if claim is not None:
            movement, policy = self.movements[claim.evidence_id], self._policy(leg, claim.basis)
            settled = reached(policy, movement, heads) or self._stands(operation, movement)
            if not settled:
                alarms += alarms_for(policy, movement)
            return LegFacts(evidence=True, settled=settled, decided=claim.basis == "decision")
        conflict = leg.key in self.matching.conflicts
        if conflict or leg.key in self.matching.held or operation.cancelled or leg.released:
            return LegFacts(conflict=conflict)
        last = leg.last_second
        if last is None:
            return LegFacts()
        after_ms = (last + 1) * 1000  # strictly after that second: five blocks share it
        if heads.finalized_time_ms < after_ms:
            alarms.append(Alarm(leg.chain_id, "finalized_time_ms", after_ms))
            return LegFacts()
        if await certainly_expired(self.conn, operation, leg, heads, after_ms):
            # coverage is committed with the events that it speaks for, but we read those before it: once more, after it
            if not await store.evidence_beside(self.conn, leg, self.around.movements):
                return LegFacts(dead=True)
            self.changes.touched.add(operation.id)
            return LegFacts()
        alarms.append(Alarm(0, "clock_ms", self.done.now_ms + RETRY_MS))
        return LegFacts()

    def _stands(self, operation: Operation, movement: Movement) -> bool:
        """Whether a promise that nothing has taken back rests on this very log. Rules decide when to promise; a stricter policy,
        or a head that a reorganisation further up made shorter, takes nothing back."""
        if operation.state not in (State.READY, State.FULFILLED):
            return False
        block = {"chainId": str(movement.chain_id), "blockHash": hex0x(movement.block_hash)}
        return str(movement.id) in (operation.detail.get("standing") or []) and any(
            block.items() <= held.items() for held in operation.detail.get("blocks") or []
        )

    # ------------------------------------------------------------------ claims

    def _note_claims(self, operation: Operation, claims: Mapping[int, Claim | None]) -> None:
        for leg in operation.legs:
            before, now = self.stored.get(leg.key), claims[leg.index]
            if before is not None and (now is None or now.evidence_id != before.evidence_id):
                self.changes.unclaimed.append(leg.key)
            if now is not None:
                self.changes.claimed.append(StoredClaim(now, self.movements[now.evidence_id]))

    def touch_neighbours(self) -> None:
        """Neighbours whose claims or conflicts are no longer what the facts say: theirs is the next turn, not ours."""
        legs = {leg.key for leg in self.around.legs}
        holder = {claim.evidence_id: claim.leg for claim in self.matching.claims.values()}
        for claim in self.around.claims:
            # only where we see the whole picture: the leg is here, and its evidence is canonical
            ours = claim.leg[0] in self.around.operations
            if (
                not ours
                and claim.leg in legs
                and claim.evidence_id in self.movements
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
        claims: Mapping[int, Claim | None],
        evidence: list[Movement],
        alarms: list[Alarm],
    ) -> None:
        identities = sorted(str(movement.id) for movement in evidence)
        standing = operation.detail.get("standing") or []
        # what a `reverted` lost, or would lose now: its blocks may be below finalized already
        lost = operation.detail.get("lost" if operation.state is State.REVERTED else "blocks") or []
        gone = all(
            self.heads.get(int(block["chainId"]), Heads(0)).finalized_number >= int(block["blockNumber"])
            for block in lost
        )
        had_receipt = bool(operation.receipts)
        path = steps(
            operation.state,
            says,
            receipt=had_receipt,
            same_evidence=identities == standing,
            gone_for_good=bool(lost) and gone,
        )
        if not all(self.heads[m.chain_id].live for m in evidence):
            # nobody has looked whether these blocks still stand: a `ready` can wait, a false one cannot be unsaid
            kept = _before_promise(operation.state, path)
            if len(kept) < len(path):
                waited = {m.chain_id for m in evidence if not self.heads[m.chain_id].live}
                # the next head that a follower links is what makes a chain live
                alarms += [Alarm(chain, "head_time_ms", self.heads[chain].head_time_ms + 1) for chain in waited]
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
                if self.heads.get(int(block["chainId"]), Heads(0)).finalized_number < int(block["blockNumber"])
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
        claims: Mapping[int, Claim | None],
        evidence: list[Movement],
    ) -> None:
        causes: list[object] = [movement.id for movement in evidence]
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
                operation.id, before, state, operation.generation, cause, {"evidence": [str(m.id) for m in evidence]}
            )
        )
        self.done.transitions.append((operation, state, evidence))
        if kind is None:
            return
        signal = self._signal(operation, kind, state, causes, claims, evidence, supersedes)
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

    def _stand(self, operation: Operation, evidence: list[Movement]) -> None:
        """Remembers what the `ready` or `restored` rests on; claims become final with it."""
        operation.detail = {
            **operation.detail,
            "standing": sorted(str(movement.id) for movement in evidence),
            "lost": [],
        }
        own = {leg.key for leg in operation.legs}
        self.changes.claimed = [
            StoredClaim(Claim(c.claim.leg, c.claim.evidence_id, c.claim.basis, c.claim.ambiguous, True), c.movement)
            if c.claim.leg in own
            else c
            for c in self.changes.claimed
        ]

    def _finalized(
        self, operation: Operation, evidence: list[Movement], claims: Mapping[int, Claim | None], alarms: list[Alarm]
    ) -> None:
        """All evidence finalized: books may close. Once per generation."""
        if (
            operation.state not in (State.READY, State.FULFILLED)
            or operation.finalized_generation >= operation.generation
        ):
            return
        waiting = [m for m in evidence if m.block_number > self.heads[m.chain_id].finalized_number]
        if waiting:
            alarms += [Alarm(m.chain_id, "finalized_number", m.block_number) for m in waiting]
            return
        operation.finalized_generation = operation.generation
        causes = [movement.id for movement in evidence]
        self.done.signals.append(
            self._signal(operation, signals.FINALIZED, operation.state, causes, claims, evidence, None)
        )

    # ------------------------------------------------------------------ telling

    def _signal(
        self,
        operation: Operation,
        kind: str,
        state: State,
        causes: Sequence[object],
        claims: Mapping[int, Claim | None],
        evidence: list[Movement],
        supersedes: UUID | None,
    ) -> Signal:
        extra: dict[str, Any] = {}
        conflicts = self._conflicts(operation)
        if state is State.CONFLICT:
            extra["conflicts"] = conflicts
        if kind == signals.REVERTED:
            extra["lost"] = operation.detail.get("lost") or []
        return signals.operation_signal(
            kind=kind,
            operation_id=operation.id,
            brand=operation.brand,
            reference=operation.reference,
            status=state.value,
            generation=operation.generation,
            now_ms=self.done.now_ms,
            causes=causes,
            legs=operation.request["legs"],
            metadata=operation.metadata,
            evidence=self._evidence(claims),
            supersedes=supersedes,
            extra=extra,
        )

    def _evidence(self, claims: Mapping[int, Claim | None]) -> list[dict[str, Any]]:
        told = []
        for index, claim in sorted(claims.items()):
            if claim is None:
                continue
            movement = self.movements[claim.evidence_id]
            level = level_of(movement, self.heads.get(movement.chain_id, Heads(movement.chain_id)))
            explorer = self.explorers.get(movement.chain_id)
            told.append(signals.evidence_json(movement, index, claim.basis, claim.ambiguous, level, explorer))
        return told

    def _conflicts(self, operation: Operation) -> list[dict[str, Any]]:
        told = []
        for leg in operation.legs:
            for conflict in (self.matching.conflicts.get(leg.key), self.matching.held.get(leg.key)):
                if conflict is not None:
                    told.append(_conflict_json(leg, conflict))
        return told

    def _describe(self, operation: Operation, says: Situation, late: bool, claims: Mapping[int, Claim | None]) -> None:
        """What a person reads in `GET /v1/operations/{id}`: evidence, conflicts, and what is waited for."""
        evidence = self._evidence(claims)
        conflicts = self._conflicts(operation)
        if late:  # evidence that settled after the operation was closed: a person accepts or dismisses it
            conflicts += [{**entry, "differences": [], "late": True} for entry in evidence]
        operation.detail = {
            "evidence": evidence,
            "conflicts": conflicts,
            "waitingFor": self._waiting(operation, claims),
            "standing": operation.detail.get("standing") or [],
            "lost": operation.detail.get("lost") or [],
            "blocks": [
                {"chainId": entry["chainId"], "blockNumber": entry["blockNumber"], "blockHash": entry["blockHash"]}
                for entry in evidence
            ],
        }

    def _waiting(self, operation: Operation, claims: Mapping[int, Claim | None]) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        for leg in operation.legs:
            claim = claims[leg.index]
            policy = self._policy(leg, claim.basis if claim else None)
            demand: dict[str, Any] = {"leg": leg.index, "confidence": policy.level.word}
            if policy.level is Level.CONFIRMED:
                demand["seconds"] = policy.seconds
            if claim is None:
                told.append(
                    {
                        **demand,
                        "for": "decision"
                        if leg.key in self.matching.held or leg.key in self.matching.conflicts
                        else "evidence",
                    }
                )
            elif operation.state not in (State.READY, State.FULFILLED) and not reached(
                policy, self.movements[claim.evidence_id], self.heads.get(leg.chain_id, Heads(leg.chain_id))
            ):
                told.append({**demand, "for": "confidence"})
        return told


def _conflict_json(leg: Leg, conflict: Conflict) -> dict[str, Any]:
    return {
        "leg": leg.index,
        **signals.movement_json(conflict.evidence),
        "differences": [
            {"term": term, "expected": ours, "found": theirs} for term, ours, theirs in conflict.differences
        ],
        "ambiguous": not conflict.differences,
    }


def _before_promise(state: State, path: list[State]) -> list[State]:
    """The part of the path before the first step that sends `ready` or `restored`."""
    for position, (here, there) in enumerate(zip([state, *path], path, strict=False)):
        if there is State.READY or (here, there) == (State.REVERTED, State.FULFILLED):
            return path[:position]
    return path
