"""Bugs planted on purpose, one at a time, to see that some seed notices each.

A mutant rewrites a fragment of one function's source, or a constant, in the process that plays the seed; the product has no
switch for any of them. `SEEDS` of each are those that are known to catch it, tried first.
"""

from __future__ import annotations
import __future__ as future

import importlib
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mutant:
    name: str
    where: str  # module:function, module:Class.method, or module:CONSTANT
    changes: tuple[tuple[str, str], ...]  # what stands there, once, and what stands there instead
    seeds: tuple[int, ...] = ()  # that are known to notice it; none: it has not been shown
    also: tuple[tuple[str, str, str], ...] = ()  # other places: (where, what, instead)


def _m(
    name: str,
    where: str,
    *changes: tuple[str, str],
    seeds: tuple[int, ...] = (),
    also: tuple[tuple[str, str, str], ...] = (),
) -> Mutant:
    return Mutant(name, where, changes, seeds, also)


_BRANCH = "chain_id = $1 AND block_number > $2 AND canonical RETURNING block_number\n        ), t AS"

MUTANTS: tuple[Mutant, ...] = (
    _m("cursor_apart_from_facts", "indexer.store.facts:commit_step", (
        "    numbers = await store_events(",
        "    await conn.execute('UPDATE indexer.chain SET head_number = $2, head_hash = $3, head_time_ms = $4 WHERE chain_id = $1', chain_id, head.number, head.hash, head.time_ms)\n"
        "    await coverage.cover(conn, chain_id, [Covered(HEAD_LANE, a, b, verdict) for verdict, a, b in covered])\n"
        "    await chains.store_headers(conn, chain_id, headers)\n"
        "    await conn.execute('COMMIT')\n    await conn.execute('BEGIN')\n"
        "    numbers = await store_events(",
    ), seeds=(22,)),
    _m("second_fetch_forgotten", "indexer.chain.steps:Gatherer.by_headers", ("if not new:\n", "if True:\n"), seeds=(14,)),
    _m("new_tokens_not_followed", "indexer.chain.position:Position.commit", (
        "self.gatherer.filter = self.gatherer.filter | step.filter", "pass",
    ), seeds=(14,)),
    _m("linked_by_height", "indexer.chain.follower:_Follower._linked", (
        "self._heads[0].parent_hash == at.hash", "self._heads[0].number == at.number + 1",
    ), also=(("indexer.chain.follower:_Follower._gap", "if headers[0].parent_hash != cursor.hash:", "if False:"),)),
    _m("safe_of_one_node", "indexer.chain.witnesses:agreed", (
        "range(pool.quorum - 1, len(votes))", "range(0, len(votes))"), ("if len(same) >= pool.quorum:", "if True:"), seeds=(9,)),
    _m("one_node_undoes", "indexer.chain.position:Position.undone", ("if not pool.several or", "if True or")),
    _m("second_look_blind", "indexer.chain.second_look:SecondLook._store", ("rows=found.rows", "rows=facts.only(found.rows, ())"), seeds=(38,)),
    _m("rollback_leaves_an_event", "indexer.store.facts:_unconfirm", (_BRANCH, _BRANCH.replace("> $2", "> $2 + 1")), seeds=(6,)),
    _m("rollback_untold", "indexer.store.facts:commit_step", (
        "orphaned_blocks, orphaned_events, low, high = await", "orphaned_blocks, orphaned_events, _, _ = await"), seeds=(30,)),
    _m("safe_survives_rollback", "indexer.store.facts:_unconfirm", ("AND c.safe_number > $2", "AND c.safe_number < 0")),
    _m("lookalikes_believed", "indexer.chain.decode:_foreign", (
        'return "foreign_programme" if allowed is None else "foreign_factory"', "return None"), seeds=(20,)),
    _m("depth_ignored", "indexer.model.confidence:level_of", ("return Level.INCLUDED", "return Level.FINALIZED"), seeds=(109,)),
    _m("alarms_forgotten", "indexer.store.operations:ring_alarms", ("    status = await", "    return 0\n    status = await"), seeds=(20,)),
    _m("expired_before_finality", "indexer.settlement.desk:Desk._expired", (
        "heads.finalized_time_ms < after_ms", "heads.head_time_ms < after_ms"),
        ("if await certainly_expired(self.conn, operation, leg, heads, after_ms):", "if True:"), seeds=(20,)),
    _m("expires_beside_an_event", "indexer.settlement.desk:Desk._leg_facts", (
        "if contested is not None:  #", "if False:  #")),
    _m("pairs_greedily", "indexer.model.matching:_Table.by_wallet", (
        "if (m.lane, m.holder, m.loyalty_id, m.bucket, m.amount) == key", "if (m.lane, m.holder, m.loyalty_id, m.bucket) == key[:4]",
    ), also=(("indexer.store.neighbourhood:_movements_for", "AND m.bucket = w.bucket AND m.amount = w.amount", "AND m.bucket = w.bucket"),), seeds=(20,)),
    _m("receipts_believed", "indexer.chain.integrity:proven_logs", (
        "_run(RECEIPT_CHECKS, ReceiptsAnswer(header, receipts), Observed(noted) if isinstance(count, Observed) else noted)",
        'outcomes["receipts_root"] = Outcome.PASS'), seeds=(163,)),
    _m("one_witness_is_enough", "indexer.model.standing:Standing.doubt", ("held.witnesses < heads.quorum", "held.witnesses < 1"), seeds=(19,)),
    _m("gate_forgets_tokens", "indexer.chain.steps:Gate.admits", (
        "any(bloom & bits == bits for bits in self._topics) and any(", "False and any("), seeds=(30,)),
    _m("cancel_ignored", "indexer.settlement.desk:Desk.settle", ("cancelled=operation.cancelled, closed", "cancelled=False, closed"), seeds=(20,)),
    _m("terms_not_compared", "indexer.model.matching:_Table.by_nonce", (
        "if differences := leg.differences(movement):", "if differences := ():"), seeds=(20,)),
    _m("generation_dropped", "indexer.model.signal:signal_id", ('f"{generation}:{kind}:"', 'f"{kind}:"'), seeds=(131,)),
    _m("reverted_untold", "indexer.settlement.desk:Desk._enter", (
        'kind, supersedes, cause = signals.REVERTED, operation.standing_signal,', 'kind, supersedes, cause = None, operation.standing_signal,'), seeds=(6,)),
    _m("restored_as_ready", "indexer.settlement.desk:Desk._enter", (
        "kind = signals.RESTORED if restored", "kind = signals.READY if restored"), seeds=(6,)),
    _m("numbers_with_gaps", "indexer.store.signals:number", (
        "SELECT f.position, c.base + row_number()", "SELECT f.position, 1 + c.base + row_number()"), seeds=(20,)),
    _m("delivered_without_rereading", "indexer.store.deliveries:begin", (
        "WHEN type IN ($6, $7) AND superseded_by IS NOT NULL", "WHEN type IN ($6, $7) AND superseded_by IS NOT NULL AND false"), seeds=(30,)),
    _m("delivered_out_of_order", "indexer.store.deliveries:begin", (
        "ORDER BY h.sequence LIMIT 1", "ORDER BY h.sequence DESC LIMIT 1"), seeds=(30,)),
    _m("any_answer_is_taken", "indexer.signals.attempts:Reply.taken", ("return self.status is not None and 200", "return True or self.status is not None and 200"), seeds=(20,)),
    _m("an_id_for_each_attempt", "indexer.signals.attempts:Sender.headers", (
        '"webhook-id": str(signal_id)', '"webhook-id": str(uuid4())'), seeds=(20,)),
    _m("epoch_forgotten", "indexer.store.leases:_FENCE", (
        "SELECT 1 FROM indexer.lease WHERE task = $1 AND epoch = $2 AND holder = $3 FOR SHARE",
        "SELECT 1 WHERE $1::text IS NOT NULL AND $2::bigint IS NOT NULL AND $3::uuid IS NOT NULL",
    ), also=(
        ("indexer.store.leases:_END_SESSIONS", "a.pid = s.pid AND", "a.pid = s.pid AND false AND"),
        ("indexer.store.leases:Leases.acquire", "int(self.ttl * 400)", "int(self.ttl * 40000)"),
    ), seeds=(136,)),
)  # fmt: skip


def plant(name: str) -> None:
    """Puts one mutant into this process. Raises AssertionError where its fragment is not there any more."""
    mutant = next(each for each in MUTANTS if each.name == name)
    _rewrite(mutant.where, mutant.changes)
    for where, old, new in mutant.also:
        _rewrite(where, ((old, new),))


def _rewrite(where: str, changes: tuple[tuple[str, str], ...]) -> None:
    module_name, _, path = where.partition(":")
    module = importlib.import_module(module_name)
    holder: Any = module
    *outer, last = path.split(".")
    for part in outer:
        holder = getattr(holder, part)
    found = inspect.getattr_static(holder, last)
    if isinstance(found, str):
        setattr(holder, last, _changed(found, where, changes))
        return
    while isinstance(found, property | classmethod | staticmethod):
        found = found.fget if isinstance(found, property) else found.__func__
    inner = inspect.unwrap(found)
    lines = textwrap.dedent(inspect.getsource(inner)).splitlines(keepends=True)
    while lines[0].startswith("@"):  # a decorator is applied already
        lines.pop(0)
    names = dict(vars(module))
    code = compile(_changed("".join(lines), where, changes), "<mutant>", "exec", future.annotations.compiler_flag)
    exec(code, names)
    fresh = names[last]
    assert fresh.__code__.co_freevars == inner.__code__.co_freevars, f"{where} is a closure"
    inner.__code__ = fresh.__code__  # whoever imported it has it too


def _changed(text: str, where: str, changes: tuple[tuple[str, str], ...]) -> str:
    for old, new in changes:
        assert text.count(old) == 1, f"{where} holds {text.count(old)} times {old!r}"
        text = text.replace(old, new)
    return text
