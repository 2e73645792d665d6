"""The state table of the design against `situation` and `steps`, over every combination of facts: there are few enough."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from indexer.model.operation import TRANSITIONS, LegFacts, Situation, State, situation, steps

P, S, C, R, F, V, E, I, X, K = (  # noqa: E741
    State.PENDING,
    State.SUBMITTED,
    State.CONFIRMING,
    State.READY,
    State.FULFILLED,
    State.REVERTED,
    State.EXPIRED,
    State.INCOMPLETE,
    State.CONFLICT,
    State.CANCELLED,
)
WHATEVER_THE_FACTS_SAY = {P, S, C, R, E, I, X, K}

# The design's table, row by row, but for "(registered)", which is `pending` before anybody has looked.
TABLE: list[tuple[set[State], set[State]]] = [
    ({P}, {S}),
    ({P, S}, {C}),
    ({C}, {P, S}),
    ({P, S, C}, {R}),
    ({P, S}, {E}),
    ({P, S, C}, {I}),
    ({P, S, C}, {K}),
    ({P, S, C, I}, {X}),  # from ready and fulfilled through `reverted`, which is signalled first
    ({I}, WHATEVER_THE_FACTS_SAY - {I}),
    ({E, K}, {X}),
    ({X}, WHATEVER_THE_FACTS_SAY - {X}),
    ({R}, {V, F}),
    ({F}, {V}),
    ({V}, {C, R}),
    ({V}, {F}),
    ({V}, {P, E, I, K, X}),
]


def rows() -> dict[State, set[State]]:
    table: dict[State, set[State]] = {state: set() for state in State}
    for sources, targets in TABLE:
        for source in sources:
            table[source] |= targets
    return table


def walks() -> Iterator[tuple[State, Situation, bool, bool, bool, list[State]]]:
    for state, facts, receipt, same, gone in product(State, Situation, *[(False, True)] * 3):
        path = steps(state, facts, receipt=receipt, same_evidence=same, gone_for_good=gone)
        yield state, facts, receipt, same, gone, path


def test_the_transitions_are_the_table_of_the_design() -> None:
    assert {state: set(targets) for state, targets in TRANSITIONS.items()} == rows()


def test_every_row_is_reached_by_some_facts_and_no_other_step_is_ever_made() -> None:
    made = {
        step for state, *_, path in walks() for step in zip([state, *path], path, strict=False)
    }  # BadTransition would end this
    assert made == {(source, target) for source, targets in TRANSITIONS.items() for target in targets}


def test_where_a_walk_ends_nothing_is_left_to_do() -> None:
    for state, facts, receipt, same, gone, path in walks():
        end, same = (path[-1], True) if path else (state, same)  # what was entered rests on today's evidence
        again = steps(end, facts, receipt=receipt, same_evidence=same, gone_for_good=gone)
        assert again == [], (state, facts, receipt, same, gone, path)


def test_where_it_ends_is_what_the_facts_say() -> None:
    for state, facts, receipt, _, _, path in walks():
        end = path[-1] if path else state
        if facts is Situation.SETTLED:
            assert end is State.FULFILLED or (end is State.READY and not receipt)
        else:
            assert end not in (State.READY, State.FULFILLED), "no evidence, no ready"
        if facts in (Situation.CONFLICT, Situation.INCOMPLETE):
            assert end == facts.value, (state, facts, path)


def test_goods_are_never_asked_for_twice() -> None:
    """`ready` is where a walk ends only without a receipt, and `fulfilled` only with one."""
    for state, facts, receipt, _, _, path in walks():
        if path:
            assert path[-1] is not State.READY or not receipt
            assert State.FULFILLED not in path or receipt
            if state is State.REVERTED and facts is Situation.SETTLED:
                assert path == ([State.FULFILLED] if receipt else [State.READY])


def test_ready_and_fulfilled_are_left_only_by_reverted_or_a_receipt() -> None:
    for state, facts, receipt, same, _, path in walks():
        if state is State.READY and not receipt:
            stays = facts is Situation.SETTLED and same
            assert path[:1] == ([] if stays else [State.REVERTED])
        if state is State.READY and receipt:
            assert path[0] is State.FULFILLED, "the goods are out, whatever the chain does next"
        if state is State.FULFILLED:
            assert path[:1] in ([], [State.REVERTED])


def test_expired_and_cancelled_are_left_only_through_conflict() -> None:
    for state, facts, _, _, _, path in walks():
        if state in (State.EXPIRED, State.CANCELLED):
            moved = facts in (Situation.CONFLICT, Situation.SETTLED, Situation.INCOMPLETE)
            assert path[:1] == ([State.CONFLICT] if moved else [])


def test_reverted_waits_for_finality_before_it_is_pending_again() -> None:
    for facts in (Situation.PENDING, Situation.SUBMITTED):
        assert steps(State.REVERTED, facts, receipt=False, gone_for_good=False) == []
        assert steps(State.REVERTED, facts, receipt=False, gone_for_good=True)[0] is State.PENDING
        assert steps(State.REVERTED, facts, receipt=True, gone_for_good=True) == [], "an exposure stays one"


def test_a_partners_silence_un_submits_nothing() -> None:
    assert steps(State.SUBMITTED, Situation.PENDING, receipt=False) == []


# --------------------------------------------------------------------------- what the facts say

LEG_FACTS = [
    LegFacts(evidence, settled, decided, conflict, dead, submitted)
    for evidence, settled, decided, conflict, dead, submitted in product((False, True), repeat=6)
    if not (settled and not evidence)
    and not (decided and not evidence)
    and not (evidence and (conflict or dead))  # a leg with evidence is not contested, and its time has not run out
]


def test_the_situation_of_every_pair_of_legs() -> None:
    for first, second, cancelled, closed in product(LEG_FACTS, LEG_FACTS, (False, True), (False, True)):
        legs = (first, second)
        says = situation(legs, cancelled=cancelled, closed=closed)
        settled = [leg.settled for leg in legs]
        late = (cancelled or closed) and any(leg.settled and not leg.decided for leg in legs)
        context = (legs, cancelled, closed, says)
        assert (says is Situation.CONFLICT) == (any(leg.conflict for leg in legs) or late), context
        if says is Situation.SETTLED:
            assert all(settled), context
        if says is Situation.EXPIRED:
            assert closed or any(leg.dead for leg in legs), context
            assert not any(settled), context
            assert closed or not any(leg.evidence for leg in legs), context
        if says is Situation.INCOMPLETE:
            assert any(settled) and not all(settled), context
            assert cancelled or closed or any(leg.dead for leg in legs), context
        if says is Situation.CANCELLED:
            assert cancelled and not any(settled), context
        if says is Situation.CONFIRMING:
            assert any(leg.evidence for leg in legs), context
        if not (cancelled or closed):
            assert says is not Situation.PENDING or not any(leg.evidence or leg.submitted for leg in legs), context
        assert situation((second, first), cancelled=cancelled, closed=closed) is says, "legs have no rank"


@pytest.mark.parametrize(
    ("legs", "wish", "says"),
    [
        ([LegFacts()], {}, Situation.PENDING),
        ([LegFacts(submitted=True), LegFacts()], {}, Situation.SUBMITTED),
        ([LegFacts(evidence=True), LegFacts()], {}, Situation.CONFIRMING),
        ([LegFacts(evidence=True, settled=True), LegFacts()], {}, Situation.CONFIRMING),
        ([LegFacts(evidence=True, settled=True)] * 2, {}, Situation.SETTLED),
        ([LegFacts(evidence=True, settled=True), LegFacts(dead=True)], {}, Situation.INCOMPLETE),
        ([LegFacts(evidence=True), LegFacts(dead=True)], {}, Situation.CONFIRMING),
        ([LegFacts(), LegFacts(dead=True)], {}, Situation.EXPIRED),
        ([LegFacts(contested=True), LegFacts(dead=True)], {}, Situation.PENDING),
        ([LegFacts(evidence=True, settled=True), LegFacts(contested=True)], {}, Situation.CONFIRMING),
        ([LegFacts(evidence=True)], {"cancelled": True}, Situation.CANCELLED),
        ([LegFacts(evidence=True, settled=True)], {"cancelled": True}, Situation.CONFLICT),
        ([LegFacts(evidence=True, settled=True, decided=True)], {"cancelled": True}, Situation.SETTLED),
        ([LegFacts(evidence=True, settled=True)], {"closed": True}, Situation.CONFLICT),
        ([LegFacts(evidence=True, settled=True, decided=True), LegFacts()], {"closed": True}, Situation.INCOMPLETE),
        ([LegFacts(conflict=True), LegFacts(evidence=True, settled=True)], {}, Situation.CONFLICT),
    ],
)
def test_what_the_facts_say(legs: list[LegFacts], wish: dict[str, bool], says: Situation) -> None:
    assert situation(legs, **({"cancelled": False, "closed": False} | wish)) is says


# --------------------------------------------------------------------------- the diagram

DOCS = Path(__file__).parents[2] / "docs" / "states.md"


def diagram() -> str:
    """The mermaid diagram of the docs, drawn from TRANSITIONS: states in their order, each with where it leads."""
    lines = ["stateDiagram-v2", "    [*] --> pending"]
    for state, targets in TRANSITIONS.items():
        lines += [f"    {state.value} --> {target.value}" for target in State if target in targets]
    return "\n".join(lines)


def test_the_diagram_in_the_docs_is_drawn_from_the_table() -> None:
    found = re.search(r"```mermaid\n(.*?)\n```", DOCS.read_text(), re.DOTALL)
    assert found and found[1] == diagram(), f"docs/states.md should hold:\n{diagram()}"


def test_the_docs_name_every_state() -> None:
    text = DOCS.read_text()
    assert not [state for state in State if f"`{state.value}`" not in text]
