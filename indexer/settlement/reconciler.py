"""The reconciler: facts in, transitions and signals out, level-triggered as a Kubernetes controller is.

It takes the operations that something touched, recomputes each one's state as a pure function of facts (the model's), and
writes claims, transition, history and signals in one leased transaction. Run twice it changes nothing the second time; a
missed wake-up costs latency only. What is told of an operation is put into words in `telling.py`; following chains, asking
partners and delivering signals are others' work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol
from uuid import UUID

from indexer.model.confidence import Heads, Level
from indexer.model.evidence import Movement
from indexer.model.matching import Matching, match
from indexer.model.operation import State
from indexer.model.partner_matching import match_partners
from indexer.model.signal import Signal
from indexer.model.standing import AnyEvidence, Attestation, Block, Standing, block_of
from indexer.settlement.desk import Desk, Pass
from indexer.settlement.rules import BrandRules, standing_of, with_contracts
from indexer.store import attestations, neighbourhood, operations, partner_evidence, unmatched
from indexer.store.connection import Connection
from indexer.store.neighbourhood import Neighbourhood
from indexer.store.operations import Changes, Operation
from indexer.store.signals import append


class Observer(Protocol):
    """Told after the commit, once per transition. Times in Unix milliseconds by the database's clock and the chain's."""

    def transition(self, operation: Operation, to: State, evidence: Sequence[AnyEvidence], now_ms: int) -> None: ...

    def signalled(self, signal: Signal) -> None: ...

    def repeated(self, movement: Movement) -> None: ...


async def reconcile(
    conn: Connection, rules: Mapping[str, BrandRules], explorers: Mapping[int, str], *, batch: int = 200
) -> Pass:
    """One pass inside the caller's leased transaction: at most `batch` operations, oldest touch first."""
    done = Pass(now_ms=await operations.now_ms(conn))
    heads = await operations.heads(conn)
    ranges = await operations.spread_touched_blocks(conn)
    rung = await operations.ring_alarms(conn, heads.values(), done.now_ms)
    ids = await operations.take_touched(conn, batch)
    done.operations = len(ids)
    done.backlog = len(ids) == batch or ranges > 0 or rung > 0
    if not ids:
        return done
    around = await neighbourhood.load(conn, ids)
    around.transfers = with_contracts(around.transfers, rules)
    # Commits come in between these statements. Heads of before a reorganisation say nothing of blocks after it, nor the other
    # way round: of facts that were read between two looks, only what both looks say holds.
    since = await operations.heads(conn)
    heads = {chain: seen.least(since[chain]) for chain, seen in heads.items() if chain in since}
    standing = standing_of(heads, rules, done.now_ms, await _attested(conn, heads, around))
    changes = Changes()
    around.movements, around.set_aside = _without_pretenders(around.movements, standing)
    changes.asked |= {block for movement in around.set_aside if (block := standing.to_ask(movement)) is not None}
    matching = await _matched(conn, around, rules)
    done.repeated = matching.repeated
    desk = Desk(conn, rules, explorers, standing, around, matching, changes, done)
    spoken_for = desk.spoken_for()
    for operation in around.operations.values():
        await desk.settle(operation)
    desk.touch_neighbours()
    done.asked = bool(changes.asked)
    await operations.store(conn, changes)
    await unmatched.step_back(conn, desk.freed(spoken_for))
    await append(conn, done.signals)
    return done


def _without_pretenders(movements: Sequence[Movement], standing: Standing) -> tuple[list[Movement], list[Movement]]:
    """The movements, and apart from them those that stand before another of their identity for which more speaks: an event that one
    endpoint made up in an old block must not take the place of the true one. Somebody looks at them."""
    groups: dict[UUID, list[Movement]] = {}
    for movement in movements:
        groups.setdefault(movement.id, []).append(movement)

    def order(movement: Movement) -> tuple[bool, bool, tuple[int, int]]:
        doubted = standing.doubt(movement) is not None
        return doubted, doubted or standing.doubt(movement, Level.SAFE) is not None, movement.position

    firsts = {of: min(group, key=order).position for of, group in groups.items() if len(group) > 1}
    aside = [m for m in movements if m.id in firsts and m.position < firsts[m.id]]
    return [m for m in movements if m not in aside] if aside else list(movements), aside


async def _attested(conn: Connection, heads: Mapping[int, Heads], around: Neighbourhood) -> dict[Block, Attestation]:
    """What speaks for the blocks of all evidence at hand, where anything must. That of movements was read with them."""
    found = [block_of(transfer) for transfer in around.transfers]
    demanding = {chain for chain, seen in heads.items() if seen.quorum > 1 or seen.proof != "off"}
    blocks = {block for block in found if block is not None and block[0] in demanding}
    return (await attestations.load(conn, blocks) if blocks else {}) | around.attested


async def _matched(conn: Connection, around: Neighbourhood, rules: Mapping[str, BrandRules]) -> Matching:
    """The matching whose new claims on partners' records hold: what another brand is having meanwhile is no evidence here."""
    stored = {(claim.leg, claim.evidence_id) for claim in around.claims}
    while True:
        matching = _match(around, rules)
        brands = {transfer.id: transfer.brand for transfer in around.transfers}
        wanted = {
            claim.evidence_id: brands[claim.evidence_id]
            for key, claim in matching.claims.items()
            if key[0] in around.operations and claim.evidence_id in brands and (key, claim.evidence_id) not in stored
        }
        held = await partner_evidence.hold(conn, wanted) if wanted else set()
        if held == wanted.keys():
            return matching
        lost = wanted.keys() - held
        around.transfers = [transfer for transfer in around.transfers if transfer.id not in lost]


def _match(around: Neighbourhood, rules: Mapping[str, BrandRules]) -> Matching:
    wallets = {brand: rule.wallet for brand, rule in rules.items()}
    accounts = {
        (brand, partner): account.wallet for brand, rule in rules.items() for partner, account in rule.partners.items()
    }
    claims, decisions = around.claims, around.decisions
    return match(around.legs, around.movements, claims, decisions, wallets) | match_partners(
        around.partner_legs, around.transfers, claims, decisions, accounts
    )
