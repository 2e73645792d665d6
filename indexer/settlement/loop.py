"""The settling loop: passes of the reconciler under the lease `settle`, and the hunt for unmatched evidence.

Woken by facts, heads and registrations, and by a sweep each second in case a wake-up was missed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import asyncpg
import structlog

from indexer.model import signal as signals
from indexer.model.confidence import Alarm, Heads, Level
from indexer.model.evidence import Movement, PartnerTransfer
from indexer.model.standing import Standing, block_of
from indexer.settlement.desk import Pass
from indexer.settlement.reconciler import Observer, reconcile
from indexer.settlement.reconsider import Reconsideration
from indexer.settlement.rules import BrandRules, standing_of, with_contracts
from indexer.store import attestations, operations, partner_evidence, unmatched
from indexer.store.connection import Connection
from indexer.store.leases import Lease
from indexer.store.operations import Changes
from indexer.store.signals import append
from indexer.store.wakeups import Wakeups

log = structlog.get_logger(__name__)

TASK = "settle"
SWEEP_SECONDS = 1.0
BATCH = 200  # operations of one pass
PUT_OFF_MS = 60_000
UNMATCHED_AT_ONCE = 500
# What a single operation may raise, and no broken connection or full disk does.
DEFECTS = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    ArithmeticError,
    AssertionError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
UNMATCHED_QUIET_MS = 600_000  # evidence younger than this may still find its registration
UNMATCHED_EVERY = 10  # sweeps
VOUCHED_AT_ONCE = 10  # blocks of unmatched evidence that are asked about: what is claimed goes first
LOOK_AGAIN_SECONDS = 600.0  # a partner's record that is not final yet, or that a person decides on


async def settle(
    lease: Lease,
    wakeups: Wakeups,
    rules: Mapping[str, BrandRules],
    explorers: Mapping[int, str],
    observer: Observer,
    *,
    unmatched_quiet_ms: int = UNMATCHED_QUIET_MS,
) -> None:
    """Runs until cancelled, or until the lease is lost (LeaseLost)."""
    idle, batch, careful = 0, BATCH, 0
    reconsideration = Reconsideration(rules)
    while True:
        done = Pass()
        try:
            async with lease.transaction() as conn:
                done = await reconcile(conn, rules, explorers, batch=batch)
        except asyncpg.DeadlockDetectedError:
            continue  # a poller and we waited for each other: it goes on, and we begin anew with what it stored
        except DEFECTS:
            # one operation that we cannot work out must not stop the others: find it, put it off, say so
            if batch == 1:
                log.exception("an operation cannot be settled, and is put off", operations=await _put_off(lease))
            batch, careful = 1, BATCH
            continue
        careful = max(0, careful - 1)
        batch = 1 if careful else BATCH
        if done.signals:
            wakeups.poke("settled")
        if done.asked:
            wakeups.poke("asked")
        for operation, state, evidence in done.transitions:
            observer.transition(operation, state, evidence, done.now_ms)
        for signal in done.signals:
            observer.signalled(signal)
        for movement in done.repeated:
            observer.repeated(movement)
        if done.backlog:
            continue
        if not reconsideration.done:  # only where nothing else waits: news goes first
            async with lease.transaction() as conn:
                await reconsideration.step(conn)
            continue
        if idle % UNMATCHED_EVERY == 0:
            async with lease.transaction() as conn:
                told = await tell_unmatched(conn, unmatched_quiet_ms)
                records = await tell_unmatched_records(conn, rules, unmatched_quiet_ms)
            if told.signals or records:
                wakeups.poke("settled")
            if told.more or records >= UNMATCHED_AT_ONCE:
                continue
        idle += 1
        await wakeups.wait(("facts", "heads", "registered"), SWEEP_SECONDS)


async def _put_off(lease: Lease) -> list[str]:
    """Takes the operation whose turn it is out of the queue, to be looked at again later."""
    async with lease.transaction() as conn:
        ids = await operations.take_touched(conn, 1)
        later = Alarm(0, "clock_ms", await operations.now_ms(conn) + PUT_OFF_MS)
        await operations.store(conn, Changes(alarms={operation: [later] for operation in ids}))
    return [str(operation) for operation in ids]


@dataclass(frozen=True, slots=True)
class Unmatched:
    """One look for evidence that nobody claims: how many signals it made, and whether another look finds more at once."""

    signals: int
    more: bool


async def tell_unmatched(conn: Connection, quiet_ms: int, limit: int = UNMATCHED_AT_ONCE) -> Unmatched:
    """Signals evidence of our issuers, safe and older than `quiet_ms`, that no operation claims."""
    clock_ms = await operations.now_ms(conn)
    told, more = 0, False
    for chain in (await operations.heads(conn)).values():
        if chain.latched or chain.safe_number < 0:
            continue
        found, cursor, unread = await unmatched.unmatched_due(conn, chain, clock_ms, quiet_ms, limit)
        if chain.quorum > 1 and found:
            found, cursor, waits = await _vouched(conn, chain, found, cursor, clock_ms)
            unread = unread and not waits
        spoken_for: set[UUID] = set()
        if found:
            spoken_for = await unmatched.contested(conn, [movement for _, movement in found])
            # a second event of an identity that has settled is no unmatched one
            spoken_for |= await unmatched.claimed(conn, [movement.id for _, movement in found])
        new = [signals.unmatched_signal(m, brand, clock_ms) for brand, m in found if m.id not in spoken_for]
        told += len(await append(conn, new))
        more = more or unread
        await unmatched.move_unmatched_cursor(conn, chain.chain_id, cursor)
    return Unmatched(told, more)


async def _vouched(
    conn: Connection, chain: Heads, found: list[tuple[str, Movement]], cursor: int, clock_ms: int
) -> tuple[list[tuple[str, Movement]], int, bool]:
    """Of unmatched evidence what enough endpoints hold and receipts were looked at for, up to the first block for which that is not
    known yet: it is asked, a few blocks at a time, and the cursor waits before it."""
    blocks = {block for _, movement in found if (block := block_of(movement)) is not None}
    standing = Standing({chain.chain_id: chain}, now_ms=clock_ms, attested=await attestations.load(conn, blocks))
    open_ones = sorted(
        movement.block_number
        for _, movement in found
        if (held := standing.attestation(movement)) is None
        or held.witnesses < chain.quorum
        or (chain.proof != "off" and held.proof is None)
    )
    if not open_ones:
        return found, cursor, False
    first = open_ones[0]
    asked = sorted({block for _, movement in found if (block := standing.to_ask(movement)) is not None})
    if asked:
        await attestations.ask(conn, asked[:VOUCHED_AT_ONCE])
    return [(brand, m) for brand, m in found if m.block_number < first], min(cursor, first - 1), True


async def tell_unmatched_records(
    conn: Connection, rules: Mapping[str, BrandRules], quiet_ms: int, limit: int = UNMATCHED_AT_ONCE
) -> int:
    """Signals partners' records of our wallets, safe and known for `quiet_ms`, that no operation claims. Returns how many."""
    clock_ms = await operations.now_ms(conn)
    standing = standing_of(await operations.heads(conn), rules, clock_ms)
    due = await unmatched.unmatched_transfers(conn, quiet_ms, limit)
    due = with_contracts(due, rules)
    found, idle = [t for t in due if t.counts], [t for t in due if not t.counts]
    decided = await unmatched.offered(conn, found) if found else set()
    deep = [t for t in found if t.id not in decided and (standing.level(t) or Level.INCLUDED) >= Level.SAFE]
    if any(transfer.drawn for transfer in deep):
        deep = await _movements_of_their_own(conn, deep, rules)
    told = {transfer.id for transfer in deep}
    await append(conn, [signals.unmatched_signal(transfer, transfer.brand, clock_ms) for transfer in deep])
    await unmatched.look_again(conn, list(told), None)
    await unmatched.look_again(conn, [t.id for t in [*found, *idle] if t.id not in told], LOOK_AGAIN_SECONDS)
    return len(told)


async def _movements_of_their_own(
    conn: Connection, transfers: Sequence[PartnerTransfer], rules: Mapping[str, BrandRules]
) -> list[PartnerTransfer]:
    """Without those that name a transfer which another record has settled by, was told for, or is told for now."""
    beside = with_contracts(await partner_evidence.spoken_for_beside(conn, transfers), rules)
    drawn, found = Counter[object](), list[PartnerTransfer]()
    for transfer in beside:
        drawn.update(transfer.drawn)
    for transfer in sorted(transfers, key=lambda transfer: transfer.order):
        if transfer.left_by(drawn):
            drawn.update(transfer.drawn)
            found.append(transfer)
    return found
