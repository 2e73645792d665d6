"""Rule 4 for partner legs: which of a partner's records settles which leg, by wallet, direction, amount, token and time.

Promises: one to one; nothing of another brand, direction, wallet or amount touches a leg; the pairing is a function of legs,
records, decisions and the claims that are final, and never of the order in which records were read. A whole group is paired at
once; a claim is final once a `ready` has left on it. `undated` records settle by decision alone.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from uuid import UUID

from indexer.model.evidence import Check, PartnerTransfer, Status
from indexer.model.matching import Claim, Conflict, Decision, Failure, Matching, WalletRules
from indexer.model.operation import PartnerLeg
from indexer.model.pairing import paired, rivalry

Account = tuple[str, str]  # brand, partner
OFFERS = 20  # of one leg: a person needs no more to choose from


def match_partners(
    legs: Sequence[PartnerLeg],
    transfers: Iterable[PartnerTransfer],
    stored: Sequence[Claim] = (),
    decisions: Sequence[Decision] = (),
    rules: Mapping[Account, WalletRules] | None = None,
) -> Matching:
    """Pairs partner legs and records. `stored` claims may name records that are gone or changed: those are dropped."""
    table = _Table(legs, transfers, decisions, rules or {})
    table.keep_stored(stored)
    table.by_decision()
    for group in table.groups():
        table.pair(group)
    return table.result


class _Table:
    """One run over one neighbourhood. `taken` are the records that some leg holds, here or elsewhere."""

    def __init__(
        self,
        legs: Sequence[PartnerLeg],
        transfers: Iterable[PartnerTransfer],
        decisions: Sequence[Decision],
        rules: Mapping[Account, WalletRules],
    ) -> None:
        self.result = Matching()
        self.legs = {leg.key: leg for leg in sorted(legs, key=lambda leg: leg.age)}
        self.transfers = {t.id: t for t in transfers if not t.withdrawn}
        self.in_group: dict[object, list[PartnerTransfer]] = defaultdict(list)
        for transfer in sorted(self.transfers.values(), key=lambda t: t.order):
            self.in_group[(*transfer.lane, transfer.wallet, transfer.amount)].append(transfer)
        self.rules = rules
        self.verdicts = {(d.operation_id, d.evidence_id): d for d in decisions}  # the last one counts
        self.taken: set[UUID] = set()
        self.drawn: Counter[object] = Counter()  # transfers on a chain that what is taken stands for
        self.judged = {d.operation_id for d in decisions}
        self.disputed: set[UUID] = set()  # sides of ties that wait for a person

    def dismissed(self, leg: PartnerLeg, transfer: PartnerTransfer) -> bool:
        verdict = self.verdicts.get((leg.operation_id, transfer.id))
        return verdict is not None and not verdict.accept

    def settle(self, claim: Claim) -> None:
        self.result.claims[claim.leg] = claim
        self.take(claim.evidence_id)

    def take(self, evidence_id: UUID) -> None:
        if evidence_id not in self.taken:
            self.taken.add(evidence_id)
            if (transfer := self.transfers.get(evidence_id)) is not None:
                self.drawn.update(transfer.drawn)

    def keep_stored(self, stored: Sequence[Claim]) -> None:
        """What stands: decisions, and what a `ready` has left on, while the record counts and still says the same."""
        for claim in sorted(stored, key=lambda c: (c.leg[0].bytes, c.leg[1])):
            leg, transfer = self.legs.get(claim.leg), self.transfers.get(claim.evidence_id)
            if leg is None:  # a leg outside this neighbourhood holds it
                self.take(claim.evidence_id)
            elif transfer is None or not transfer.counts or transfer.id in self.taken or self.dismissed(leg, transfer):
                continue
            elif leg.lane != transfer.lane or leg.differences(transfer):
                continue  # it says something else now
            elif claim.basis == "decision" or claim.final:
                self.settle(claim)

    def by_decision(self) -> None:
        """A person's word goes before the rules, in the lane of the leg it names."""
        for decision in self.verdicts.values():
            leg = self.legs.get((decision.operation_id, decision.leg))
            transfer = self.transfers.get(decision.evidence_id)
            if not decision.accept or leg is None or transfer is None or not transfer.counts:
                continue
            if leg.lane != transfer.lane or leg.differences(transfer):
                continue
            standing = self.result.claims.get(leg.key)
            if standing is None and transfer.id not in self.taken and transfer.left_by(self.drawn):
                self.settle(Claim(leg.key, transfer.id, "decision"))
            elif standing is not None and standing.evidence_id == transfer.id:
                self.settle(Claim(leg.key, transfer.id, "decision", final=standing.final))

    def groups(self) -> list[list[PartnerLeg]]:
        """The legs without a claim, by group, each in the order of pairing: who states a token chooses first.

        Legs of closed operations are groups of their own, and come last: they take what nobody else could.
        """
        found: dict[object, list[PartnerLeg]] = defaultdict(list)
        for leg in self.legs.values():
            if leg.key not in self.result.claims:
                found[(leg.released, leg.group)].append(leg)
        for legs in found.values():
            legs.sort(key=lambda leg: (leg.token is None, *leg.age))
        return sorted(found.values(), key=lambda legs: legs[0].released)

    def fitting(self, leg: PartnerLeg, records: Sequence[PartnerTransfer], times: Sequence[int]) -> Sequence[int]:
        """Positions of the records in the leg's window that neither token nor decision speaks against.

        `records` are of the leg's group, dated, in order of their `times`.
        """
        rule = self.rules.get((leg.brand, leg.partner), WalletRules())
        window = range(
            bisect_left(times, leg.requested_at_ms - rule.skew_ms),
            bisect_right(times, leg.requested_at_ms + rule.window_ms),
        )
        if leg.token is None and leg.operation_id not in self.judged and not (leg.released and self.disputed):
            return window
        return [at for at in window if self.possible(leg, records[at])]

    def possible(self, leg: PartnerLeg, transfer: PartnerTransfer) -> bool:
        disputed = leg.released and transfer.id in self.disputed
        return not leg.differences(transfer) and not self.dismissed(leg, transfer) and not disputed

    def pairs(
        self, legs: Sequence[PartnerLeg], records: Sequence[PartnerTransfer]
    ) -> tuple[list[Sequence[int]], dict[int, int]]:
        """Which of the records fit each leg, and which leg gets which."""
        times = [record.time_ms for record in records]
        fitting = [self.fitting(leg, records, times) for leg in legs]
        return fitting, paired(fitting, len(records))

    def pair(self, legs: list[PartnerLeg]) -> None:
        """One group: what counts settles; what is left over is offered, under way or failed."""
        first = legs[0]
        around = [t for t in self.in_group[first.group] if t.id not in self.taken]
        dated = [t for t in around if not t.undated]
        counting = self.carried(legs, [t for t in dated if t.counts])
        hold = self.rules.get((first.brand, first.partner), WalletRules()).hold
        fitting, pairs = self.pairs(legs, counting)
        rivals = rivalry(fitting, len(counting))
        disputed: set[UUID] = set()
        for at, chosen in pairs.items():
            leg, choice = legs[at], counting[chosen]
            ambiguous = rivals[chosen] > 1 or len(fitting[at]) > 1
            if ambiguous and hold:
                self.result.held[leg.key] = Conflict(leg.key, choice, ())
                disputed |= {counting[record].id for record in fitting[at]}
            else:
                self.settle(Claim(leg.key, choice.id, "wallet_amount", ambiguous))
        self.disputed |= disputed
        undated = [t for t in around if (t.undated or t.dateless) and t.counts]
        waiting = [at for at, leg in enumerate(legs) if leg.key not in self.result.claims]
        for at in waiting:
            self.offer(legs[at], [counting[record] for record in fitting[at]] if hold else [], undated)
        live = [legs[at] for at in waiting if not legs[at].released and legs[at].key not in self.result.held]
        pending = [t for t in dated if t.status is Status.PENDING]
        _, under_way = self.pairs(live, pending)
        self.result.submitted |= {live[at].key: pending[record] for at, record in under_way.items()}
        self.failures([leg for leg in live if leg.key not in self.result.submitted], dated)

    def carried(self, legs: Sequence[PartnerLeg], records: Sequence[PartnerTransfer]) -> Sequence[PartnerTransfer]:
        """Of these, no more than the chain holds transfers for: two orders that name one transfer are one movement of value."""
        if not any(record.drawn for record in records):
            return records
        times = [record.time_ms for record in records]
        fitting = {at for leg in legs for at in self.fitting(leg, records, times)}
        drawn, found = Counter(self.drawn), []
        for at, record in enumerate(records):
            if at in fitting and record.left_by(drawn):
                drawn.update(record.drawn)
                found.append(record)
        return found

    def offer(self, leg: PartnerLeg, fitting: list[PartnerTransfer], undated: list[PartnerTransfer]) -> None:
        """What a person may accept for a leg: the other sides of a tie that is held, and records without a time of their own."""
        choice = self.result.held.get(leg.key)
        offers = [
            Conflict(leg.key, t, ())
            for t in [*fitting, *(t for t in undated if self.possible(leg, t) and self.may_be_of(leg, t))]
            if t.id not in self.taken and (choice is None or choice.evidence.id != t.id)
        ]
        if offers:
            self.result.offers[leg.key] = offers[:OFFERS]

    def may_be_of(self, leg: PartnerLeg, transfer: PartnerTransfer) -> bool:
        """Whether a record without a time of its own can have come within the leg's window: after the last look that lacked it, and
        before the first that showed it."""
        if transfer.undated:
            return True  # there at the first look: as old as anything
        rule = self.rules.get((leg.brand, leg.partner), WalletRules())
        early, late = leg.requested_at_ms - rule.skew_ms, leg.requested_at_ms + rule.window_ms
        return transfer.time_ms <= late and transfer.first_seen_ms >= early

    def failures(self, legs: list[PartnerLeg], dated: list[PartnerTransfer]) -> None:
        """Which legs a failed record may be about; for certain only where every leg that it can mean has one."""
        failed = [t for t in dated if t.status is Status.FAILED or t.check is Check.REFUTED]
        fitting, pairs = self.pairs(legs, failed)
        everyone = all(at in pairs for at, own in enumerate(fitting) if own)
        for at, record in pairs.items():
            certain = everyone and failed[record].status is Status.FAILED
            self.result.failed[legs[at].key] = Failure(failed[record], certain)
