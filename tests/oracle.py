"""The oracle of every ring: what must hold at the end of any run, whatever happened on the way.

Pure judges over plain data; each returns what is wrong in sentences, and nothing when all is well. The readers at the end
fetch that data from a database; what a chain really holds is read in `truth.py`. A daemon that slept through a reorganisation rightly says less: traces are never compared with
those of an undisturbed run.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import asyncpg

READY, REVERTED, RESTORED = "operation.ready", "operation.reverted", "operation.restored"
FULFILLED, FINALIZED = "operation.fulfilled", "operation.finalized"
# Signals whose state excludes a standing `ready`, and the state that each announces.
WITHOUT_READY = {f"operation.{state}": state for state in ("expired", "incomplete", "conflict", "cancelled")}
STATUS_OF = WITHOUT_READY | {
    READY: "ready",
    REVERTED: "reverted",
    RESTORED: "fulfilled",
    FULFILLED: "fulfilled",
    "operation.submitted": "submitted",
    "operation.confirming": "confirming",
}


# --------------------------------------------------------------------------- signals


@dataclass(frozen=True)
class Told:
    """One signal as the outbox holds it. Times in Unix seconds; None where the source does not say."""

    id: UUID
    type: str
    operation: UUID
    generation: int = 0
    supersedes: UUID | None = None
    sequence: int | None = None
    brand: str = ""
    status: str | None = None
    at: float | None = None


@dataclass(frozen=True)
class Handed:
    """A receipt: for which generation, and when it was recorded."""

    generation: int
    at: float | None = None


@dataclass(frozen=True)
class Final:
    """Where an operation stands at the end."""

    state: str
    generation: int
    receipts: tuple[Handed, ...] = ()


def judge_trace(trace: Sequence[Told], final: Final) -> list[str]:
    """Whether one operation's signals, in order, are a word of the state machine that ends in its final state."""
    wrong: list[str] = []
    standing: Told | None = None  # the `ready` or `restored` that no `reverted` took back
    handed_since = closed = False
    generation = 0
    for told in trace:
        name = f"{told.type} {told.id}"
        if told.status is not None and told.type in STATUS_OF and told.status != STATUS_OF[told.type]:
            wrong.append(f"{name} says the operation is {told.status}")
        if told.type in (READY, RESTORED):
            if standing is not None:
                wrong.append(f"{name} follows {standing.type} {standing.id}, which nothing has taken back")
            if told.generation != generation + 1:
                wrong.append(f"{name} is generation {told.generation}, after {generation}")
            if closed:
                wrong.append(f"{name} follows expired or cancelled without a conflict between them")
            handed_before = [
                receipt
                for receipt in final.receipts
                if receipt.generation < told.generation and _not_after(receipt.at, told.at)
            ]
            if told.type == RESTORED and not handed_before:
                wrong.append(f"{name} without an earlier receipt: there was nothing to restore")
            if told.type == READY and any(receipt.at is not None and told.at is not None for receipt in handed_before):
                wrong.append(f"{name} asks for goods that were handed over already")
            standing, generation, handed_since = told, told.generation, False
        elif told.type == REVERTED:
            if standing is None:
                wrong.append(f"{name} takes back what does not stand")
            elif told.supersedes != standing.id:
                wrong.append(f"{name} names {told.supersedes}, and {standing.id} stands")
            standing = None
        elif told.type == FULFILLED:
            if standing is None or not final.receipts:
                wrong.append(f"{name} without a standing ready and a receipt")
            handed_since = True
        elif told.type == FINALIZED and standing is None:
            wrong.append(f"{name} while nothing is ready")
        elif told.type in WITHOUT_READY and standing is not None:
            wrong.append(f"{name} while {standing.type} {standing.id} stands: no reverted came first")
        if told.type != REVERTED and told.supersedes is not None:
            wrong.append(f"{name} supersedes something")
        closed = told.type in ("operation.expired", "operation.cancelled") or (
            closed and told.type not in WITHOUT_READY
        )
    wrong += _repeats(trace)
    numbers = [told.sequence for told in trace if told.sequence is not None]
    if numbers != sorted(set(numbers)):
        wrong.append(f"numbers out of order: {numbers}")
    return wrong + _judge_end(trace, standing, handed_since, generation, final)


def _not_after(first: float | None, second: float | None) -> bool:
    return first is None or second is None or first <= second


def _judge_end(
    trace: Sequence[Told], standing: Told | None, handed_since: bool, generation: int, final: Final
) -> list[str]:
    wrong = []
    if (standing is not None) != (final.state in ("ready", "fulfilled")):
        last = "nothing" if standing is None else f"{standing.type} {standing.id}"
        wrong.append(f"the operation is {final.state}, and {last} stands")
    elif standing is not None and (standing.type == RESTORED or handed_since) != (final.state == "fulfilled"):
        wrong.append(f"the operation is {final.state} after {standing.type}, fulfilled told: {handed_since}")
    if final.state == "reverted" and not any(told.type == REVERTED for told in trace):
        wrong.append("the operation is reverted, and nobody was told")
    if final.state in WITHOUT_READY.values() and f"operation.{final.state}" not in {told.type for told in trace}:
        wrong.append(f"the operation is {final.state}, and nobody was told")
    if generation != final.generation:
        wrong.append(f"generation {final.generation}, and the last one told is {generation}")
    return wrong


def _repeats(told: Iterable[Told]) -> list[str]:
    times = Counter(signal.id for signal in told)
    return [f"signal {id} was told {count} times" for id, count in times.items() if count > 1]


def judge_signals(told: Sequence[Told], finals: Mapping[UUID, Final]) -> list[str]:
    """All signals of an outbox, in order of position: each operation's trace, and each brand's numbers."""
    wrong = _repeats(told)
    traces: dict[UUID, list[Told]] = defaultdict(list)
    numbers: dict[str, list[int | None]] = defaultdict(list)
    for signal in told:
        numbers[signal.brand].append(signal.sequence)
        if signal.type.startswith("operation."):
            traces[signal.operation].append(signal)
    for operation, final in finals.items():
        wrong += [f"operation {operation}: {what}" for what in judge_trace(traces.pop(operation, []), final)]
    wrong += [f"signals of an unknown operation {operation}" for operation in traces]
    for brand, given in numbers.items():
        known = sorted(number for number in given if number is not None)
        if known != list(range(1, len(known) + 1)):
            wrong.append(f"brand {brand}: numbers have a gap or repeat: {_short(known)}")
    return wrong


def judge_received(received: Sequence[tuple[UUID, UUID, int]], known: Collection[UUID]) -> list[str]:
    """What one endpoint received, in order, as (signal, operation, sequence): at least once, first times in order."""
    wrong: list[str] = []
    last: dict[UUID, int] = defaultdict(int)
    seen: set[UUID] = set()
    for signal, operation, sequence in received:
        if signal not in known:
            wrong.append(f"signal {signal} was received, and is not in the outbox")
        if signal not in seen and sequence <= last[operation]:
            wrong.append(f"signal {signal}, number {sequence}, came after {last[operation]} of the same operation")
        seen.add(signal)
        last[operation] = max(last[operation], sequence)
    return wrong


@dataclass(frozen=True)
class Delivery:
    """What the dispatcher says became of a signal at one endpoint. `begun`: of the attempts that it wrote down, Unix seconds."""

    signal: UUID
    operation: UUID
    sequence: int
    type: str
    state: str  # pending | delivered | superseded | dropped | dead
    attempts: int
    begun: tuple[float, ...] = ()
    last_begun: float | None = None  # also of one that was cut off


def judge_deliveries(
    deliveries: Sequence[Delivery],
    received: Collection[UUID],
    taken_back: Mapping[UUID, float],
    *,
    most_attempts: int,
    cut_off: int = 0,
    dead_allowed: bool,
    taken: Collection[UUID] | None = None,
) -> list[str]:
    """One endpoint at rest, against what arrived there. `taken_back`: by when a signal's supersession had surely committed;
    `cut_off`: how often a dispatcher may have died in the middle of an attempt, which is then made once more; `taken`: what was
    answered with success, where that is known.
    """
    wrong: list[str] = []
    for one in deliveries:
        name = f"{one.type} {one.signal}, number {one.sequence}"
        if one.state == "pending":
            wrong.append(f"{name} is still waiting")
        if one.state == "delivered" and one.signal not in received:
            wrong.append(f"{name} counts as delivered, and never arrived")
        elif one.state == "delivered" and taken is not None and one.signal not in taken:
            wrong.append(f"{name} counts as delivered, and was refused each time")
        if one.state in ("superseded", "dropped") and one.last_begun is None and one.signal in received:
            wrong.append(f"{name} was {one.state} without an attempt, and arrived")
        if one.state == "dropped" and STATUS_OF.get(one.type) not in ("submitted", "confirming"):
            wrong.append(f"{name} was dropped, and is no hint")
        if one.state == "superseded" and one.type in (READY, RESTORED) and one.signal not in taken_back:
            wrong.append(f"{name} counts as superseded, and nothing took it back")
        if one.state == "dead" and (not dead_allowed or one.attempts < most_attempts):
            wrong.append(f"{name} is a dead letter after {one.attempts} attempts")
        if one.attempts > most_attempts + cut_off:
            wrong.append(f"{name} was attempted {one.attempts} times")
        late = [at for at in (*one.begun, one.last_begun) if at is not None and at > taken_back.get(one.signal, at)]
        if late and one.type in (READY, RESTORED):
            wrong.append(f"an attempt of {name} began {late[0] - taken_back[one.signal]:.3f} s after it was taken back")
    return wrong


def settled_after(told: Iterable[Told]) -> bool:
    """Whether the operation is settled, as far as someone knows who took these signals by the receivers' rule: what is not
    above the last number taken is ignored, and the last one's status counts.
    """
    last: Told | None = None
    for signal in told:
        if signal.sequence is not None and (last is None or last.sequence is None or signal.sequence > last.sequence):
            last = signal
    return last is not None and last.status in ("ready", "fulfilled")


def judge_states(expected: Mapping[str, str | Collection[str]], actual: Mapping[str, str]) -> list[str]:
    """Each operation's final state by reference; where the truth leaves a choice, several are given."""
    wrong = [f"{reference} was never asked about" for reference in actual.keys() - expected.keys()]
    for reference, wanted in expected.items():
        allowed = {wanted} if isinstance(wanted, str) else set(wanted)
        if actual.get(reference) not in allowed:
            wrong.append(f"{reference} is {actual.get(reference, 'missing')}, expected {' or '.join(sorted(allowed))}")
    return sorted(wrong)


# --------------------------------------------------------------------------- ready


@dataclass(frozen=True)
class Event:
    """A movement on the true chain. Terms as the registration states them, by its names."""

    block_hash: bytes
    log_index: int
    block_number: int
    time_ms: int
    terms: Mapping[str, Any]


@dataclass(frozen=True)
class Moment:
    """The truth from `at` on (Unix seconds): which events are canonical, and how far the heads are."""

    at: float
    events: Mapping[tuple[bytes, int], Event]
    head_time_ms: int
    safe_number: int
    finalized_number: int


@dataclass(frozen=True)
class Demand:
    """What a leg's policy asks for."""

    confidence: str = "safe"  # included | confirmed | safe | finalized
    seconds: float = 0.0


@dataclass(frozen=True)
class Basis:
    """One leg of a `ready`: what it waited for, what is said to settle it, and how deep that had to be."""

    terms: Mapping[str, Any]  # those that the leg states
    block_hash: bytes
    log_index: int
    demand: Demand = field(default_factory=Demand)
    decided: bool = False  # accepted by a person: other terms are their business


@dataclass(frozen=True)
class Ready:
    """A `ready` or `restored` as it was told."""

    reference: str
    at: float
    legs: tuple[Basis, ...]


def judge_ready(told: Sequence[Ready], truth: Sequence[Moment], *, grace: float) -> list[str]:
    """Promise 1: at some moment of the last `grace` seconds the truth held all the evidence, deep enough.

    `grace` covers what no observer can know at once: a node's answer, a commit. Moments are in order of time.
    """
    wrong = []
    used: dict[tuple[bytes, int], str] = {}
    for ready in told:
        moments = [
            moment
            for moment, following in zip(truth, [*truth[1:], None], strict=True)
            if moment.at <= ready.at and (following is None or following.at >= ready.at - grace)
        ]
        faults = [_faults(ready, moment) for moment in moments]
        if not faults:
            wrong.append(f"{ready.reference} was ready before the truth begins")
        elif all(faults):
            wrong.append(f"{ready.reference} was ready too early: {'; '.join(faults[-1])}")
        for leg in ready.legs:
            holder = used.setdefault((leg.block_hash, leg.log_index), ready.reference)
            if holder != ready.reference:
                wrong.append(f"one event made both {holder} and {ready.reference} ready")
        if len({(leg.block_hash, leg.log_index) for leg in ready.legs}) < len(ready.legs):
            wrong.append(f"{ready.reference}: one event settles two legs")
    return wrong


def _faults(ready: Ready, moment: Moment) -> list[str]:
    faults = []
    for number, leg in enumerate(ready.legs):
        event = moment.events.get((leg.block_hash, leg.log_index))
        if event is None:
            faults.append(f"leg {number}: its event is not on the chain")
            continue
        differs = [term for term, value in leg.terms.items() if event.terms.get(term) != value]
        if differs and not leg.decided:
            faults.append(f"leg {number}: {', '.join(differs)} differ")
        if not _deep_enough(leg.demand, event, moment):
            faults.append(f"leg {number}: block {event.block_number} is not {leg.demand.confidence}")
    return faults


def _deep_enough(demand: Demand, event: Event, moment: Moment) -> bool:
    safe, finalized = (event.block_number <= head for head in (moment.safe_number, moment.finalized_number))
    on_top = moment.head_time_ms - event.time_ms >= demand.seconds * 1000
    return {"included": True, "confirmed": on_top or safe, "safe": safe or finalized, "finalized": finalized}[
        demand.confidence
    ]


# --------------------------------------------------------------------------- expired


@dataclass(frozen=True)
class Expiry:
    """An `expired` or `incomplete` as it was told: `until` is the last second in which a leg without evidence could be executed."""

    reference: str
    at: float
    until: int | None


def judge_expired(told: Sequence[Expiry], truth: Sequence[Moment], time_ms: Callable[[int], int]) -> list[str]:
    """Promise 6: finalized blocks had passed the deadline before it was told. `time_ms`: of a block. Moments are in order of time."""
    wrong = []
    for expiry in told:
        finalized = max((moment.finalized_number for moment in truth if moment.at <= expiry.at), default=0)
        if expiry.until is None:
            wrong.append(f"{expiry.reference} has expired, and had no deadline")
        elif time_ms(finalized) < (expiry.until + 1) * 1000:
            early = expiry.until + 1 - time_ms(finalized) / 1000
            wrong.append(
                f"{expiry.reference} has expired {early:.1f} s before finalized blocks had passed its deadline"
            )
    return wrong


# --------------------------------------------------------------------------- facts

FactKey = tuple[str, bytes, int, int]  # table, block hash, log index, item of a batch
Facts = dict[FactKey, dict[str, Any]]


def judge_facts(truth: Facts, stored: Facts) -> list[str]:
    """Whether the canonical rows are the chain's truth: nothing missing, nothing made up, nothing changed."""
    wrong = [f"missing: {_fact(key, truth[key])}" for key in truth.keys() - stored.keys()]
    wrong += [f"made up: {_fact(key, stored[key])}" for key in stored.keys() - truth.keys()]
    for key in truth.keys() & stored.keys():
        names = sorted(name for name in truth[key] if truth[key][name] != stored[key].get(name))
        wrong += [
            f"changed: {_fact(key, truth[key])}: {n} is {_plain(stored[key].get(n))}, {_plain(truth[key][n])} in truth"
            for n in names
        ]
    return sorted(wrong)


def _fact(key: FactKey, fields: Mapping[str, Any]) -> str:
    table, block_hash, log_index, item = key
    return f"{table} in block {fields.get('block_number')} {_plain(block_hash)[:10]}, log {log_index}, item {item}"


def _plain(value: object) -> str:
    return "0x" + value.hex() if isinstance(value, bytes) else repr(value)


def _short(things: Sequence[object]) -> str:
    return str(things) if len(things) <= 20 else f"{str(things[:20])[:-1]}, … {len(things)} in all]"


# --------------------------------------------------------------------------- reading a database


async def read_signals(conn: asyncpg.Connection) -> list[Told]:
    rows = await conn.fetch(
        """
        SELECT id, type, aggregateid, generation, supersedes, sequence, brand, payload #>> '{data,operation,status}' AS status,
               extract(epoch FROM created_at)::float8 AS at
        FROM indexer.outbox ORDER BY position
        """
    )
    return [
        Told(row["id"], row["type"], row["aggregateid"], row["generation"], row["supersedes"], row["sequence"], row["brand"],
             row["status"], row["at"])
        for row in rows
    ]  # fmt: skip


async def read_finals(conn: asyncpg.Connection) -> dict[UUID, Final]:
    receipts: dict[UUID, list[Handed]] = defaultdict(list)
    for row in await conn.fetch(
        "SELECT operation_id, generation, extract(epoch FROM recorded_at)::float8 AS at FROM indexer.receipt ORDER BY recorded_at"
    ):
        receipts[row["operation_id"]].append(Handed(row["generation"], row["at"]))
    return {
        row["id"]: Final(row["state"], row["generation"], tuple(receipts[row["id"]]))
        for row in await conn.fetch("SELECT id, state, generation FROM indexer.operation")
    }


async def read_states(conn: asyncpg.Connection, brand: str | None = None) -> dict[str, str]:
    """Status by reference, as other programs see it."""
    rows = await conn.fetch(
        "SELECT reference, status FROM loyalty.operations WHERE $1::text IS NULL OR brand = $1", brand
    )
    return {row["reference"]: row["status"] for row in rows}


async def judge_database(conn: asyncpg.Connection) -> list[str]:
    """The traces and numbers of a whole database, and its claims."""
    return judge_signals(await read_signals(conn), await read_finals(conn)) + await judge_claims(conn)


async def judge_claims(conn: asyncpg.Connection) -> list[str]:
    """Each on evidence that is there, as it stands there: this needs no truth, and no finality."""
    strays = await conn.fetch(
        """
        SELECT c.operation_id, c.leg FROM indexer.claim c WHERE NOT EXISTS (
            SELECT 1 FROM indexer.movement m WHERE m.canonical AND m.chain_id = c.chain_id AND m.block_number = c.block_number
            AND m.log_index = c.log_index AND m.block_hash = c.block_hash)
        AND NOT EXISTS (
            SELECT 1 FROM indexer.partner_transfer t WHERE t.id = c.evidence_id AND t.withdrawn_at IS NULL
            AND t.status IN ('included', 'succeeded'))
        """
    )
    return [f"operation {row['operation_id']}, leg {row['leg']}: claims evidence that is gone" for row in strays]


_TABLES = {
    "programme": "factory issuer loyalty_id loyalty name symbol media description contract_uri token_uri",
    "movement": "kind factory issuer loyalty_id loyalty holder bucket amount nonce operation_hash data",
    "transfer": "item source loyalty operator sender recipient bucket amount",
    "programme_event": "loyalty event args",
    "raw_log": "topics data",
}
_WHERE = ("block_number", "tx_hash", "tx_index", "emitter")


async def read_facts(conn: asyncpg.Connection, chain_id: int, up_to: int | None = None) -> Facts:
    """Every canonical row of a chain up to a block."""
    facts: Facts = {}
    for table, columns in _TABLES.items():
        rows = await conn.fetch(
            f"SELECT * FROM indexer.{table} WHERE chain_id = $1 AND canonical AND ($2::bigint IS NULL OR block_number <= $2)",
            chain_id,
            up_to,
        )
        for row in rows:
            fields = {name: _value(name, row[name]) for name in (*_WHERE, *columns.split())}
            facts[(table, row["block_hash"], row["log_index"], fields.get("item", 0))] = fields
    return facts


def _value(name: str, value: Any) -> Any:
    if name in ("bucket", "amount"):
        return int(value)
    return json.loads(value) if name == "args" and isinstance(value, str) else value


async def read_deliveries(conn: asyncpg.Connection, webhook: str) -> list[Delivery]:
    """Of one endpoint, in the order of the numbers."""
    rows = await conn.fetch(
        """
        SELECT d.signal_id, d.aggregateid, d.sequence, d.type, d.state, d.attempts, extract(epoch FROM d.begun_at)::float8 AS last,
               ARRAY(SELECT extract(epoch FROM a.begun_at)::float8 FROM indexer.delivery_attempt a
                      WHERE a.signal_id = d.signal_id AND a.brand = d.brand AND a.webhook = d.webhook ORDER BY a.id) AS begun
        FROM indexer.delivery d WHERE d.webhook = $1 ORDER BY d.sequence
        """,
        webhook,
    )
    return [
        Delivery(row["signal_id"], row["aggregateid"], row["sequence"], row["type"], row["state"], row["attempts"],
                 tuple(row["begun"]), row["last"])
        for row in rows
    ]  # fmt: skip
