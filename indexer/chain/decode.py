"""From a node's logs to rows: which contract may say what, and how its events are stored.

A configured factory or hub may speak for its programmes, a programme's token only for itself; anything else that looks
like Loyfin is counted and dropped (facts/loyfin.md 5.1). No log of a known emitter is lost: what cannot be read becomes
a `raw_log` row. Pure: nothing is fetched or stored, and the Speakers are changed by the caller, after its commit.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from indexer.chain.codegen import (
    DOCUMENTED,
    INFERRED,
    Event,
    Undecodable,
    Values,
    abi_directory,
    compile_event,
    load_events,
)
from indexer.chain.wire import BadLog, Log, parse_log
from indexer.model.types import ZERO_HASH

__all__ = ["COLUMNS", "BadLog", "Decoded", "Decoder", "Log", "Speakers", "Token", "parse_log"]

Row = tuple[Any, ...]

# Caps of our own: the contract's limits are claims (facts/loyfin.md 5.21). What is cut is kept whole in `raw_log`.
MAX_TEXT = 4096  # characters
MAX_DATA = 4096  # bytes
MAX_ITEMS = 4096  # of an array in a programme event's arguments; batch transfers are never cut

_WHERE = (
    "chain_id",
    "block_number",
    "log_index",
    "block_hash",
    "block_time_ms",
    "tx_hash",
    "tx_index",
    "emitter",
    "canonical",
)
# The rows' columns, in the order of `indexer.store.tables` (a test compares them): ready for COPY.
COLUMNS: dict[str, tuple[str, ...]] = {
    "programme": (
        *_WHERE,
        *("factory", "issuer", "loyalty_id", "loyalty"),
        *("name", "symbol", "media", "description", "contract_uri", "token_uri"),
    ),
    "movement": (
        *_WHERE,
        *("kind", "factory", "issuer", "loyalty_id", "loyalty", "holder"),
        *("bucket", "amount", "nonce", "operation_hash", "data"),
    ),
    "transfer": (
        *_WHERE,
        *("item", "source", "loyalty", "operator", "sender", "recipient", "bucket", "amount"),
    ),
    "programme_event": (*_WHERE, "loyalty", "event", "args"),
    "raw_log": (*_WHERE, "topics", "data", "reason", "error"),
}


_REASON = COLUMNS["raw_log"].index("reason")


# ------------------------------------------------------------------------------------------------ who may speak


class Token(NamedTuple):
    """A programme's token contract as a factory announced it."""

    token: bytes
    factory: bytes
    issuer: bytes
    loyalty_id: bytes
    block_number: int


class Speakers:
    """The contracts of one chain that are listened to: configured factories and hubs, and tokens that they announced.

    `hubs` gives each hub the factories that name it. Decoding reads this and never writes: the caller learns the tokens
    of a `Decoded` once they are committed, and builds new Speakers from the store after a reorganisation.
    """

    def __init__(
        self,
        chain_id: int,
        factories: Iterable[bytes],
        hubs: Mapping[bytes, Collection[bytes]] | None = None,
        tokens: Mapping[bytes, tuple[bytes, bytes, bytes]] | None = None,
    ) -> None:
        self.chain_id = chain_id
        self.factories = frozenset(factories)
        self.hubs = {hub: frozenset(named) for hub, named in (hubs or {}).items()}
        # token address → (factory, issuer, loyalty_id)
        self.tokens: dict[bytes, tuple[bytes, bytes, bytes]] = dict(tokens or {})
        # configured address → the factories it may speak for; an address may be factory and hub at once
        self.speaks_for: dict[bytes, frozenset[bytes]] = {factory: frozenset([factory]) for factory in self.factories}
        for hub, named in self.hubs.items():
            self.speaks_for[hub] = self.speaks_for.get(hub, frozenset()) | (named & self.factories)

    @property
    def addresses(self) -> frozenset[bytes]:
        """Everyone whose logs are asked for."""
        return frozenset(self.speaks_for) | frozenset(self.tokens)

    def learn(self, token: Token) -> None:
        """From now on the token may speak for itself. A second announcement of a token changes nothing."""
        self.tokens.setdefault(token.token, (token.factory, token.issuer, token.loyalty_id))


# ------------------------------------------------------------------------------------------------ rows


@dataclass(slots=True)
class Decoded:
    """Rows in the order of COLUMNS, and what was noticed on the way.

    `lookalikes` counts by reason: 'unknown_emitter', 'foreign_factory', 'foreign_programme', 'foreign_token'.
    `tokens` are those that the Speakers did not know yet, by first announcement.
    """

    programmes: list[Row] = field(default_factory=list)
    movements: list[Row] = field(default_factory=list)
    transfers: list[Row] = field(default_factory=list)
    programme_events: list[Row] = field(default_factory=list)
    raw_logs: list[Row] = field(default_factory=list)
    lookalikes: Counter[str] = field(default_factory=Counter)
    tokens: list[Token] = field(default_factory=list)

    @property
    def quarantined(self) -> Counter[str]:
        """The raw rows by reason: 'unknown_topic', 'undecodable', 'oversized'."""
        return Counter(row[_REASON] for row in self.raw_logs)


# What the events mean is tied to the whole signature: an event of another shape is another event.
_CREATED = "LoyaltyProgramCreated(address,address,bytes32,address,string,string,string,string,string,string)"
_POINTS = "(address,address,bytes32,address,address,uint256,uint256,bytes32,bytes32,bytes)"
_MOVEMENTS = {"PointsIssued" + _POINTS: "loyfin.issuance", "PointsRedeemed" + _POINTS: "loyfin.redemption"}
# A reader turns the values of one admitted log into rows: (out, where, emitter, values) → was anything cut?
Reader = Callable[[Decoded, Row, bytes, Values], bool]


@dataclass(frozen=True, slots=True)
class _Reading:
    """What to do with one topic0: its shapes by number of topics, whom it speaks of, and the rows it becomes."""

    name: str
    shapes: dict[int, Callable[[Sequence[bytes], bytes], Values]]
    # 'programme': (factory, issuer, loyaltyId, loyalty) lead · 'token': `loyalty` leads · 'emitter': whoever logs it
    about: str
    read: Reader
    read_configured: Reader  # the same from a factory or hub, of its own state
    creates: bool = False


class Decoder:
    """Reads logs with the ABIs it was built from. One for all chains; holds no state between calls."""

    def __init__(self, events: Iterable[Event], guessed: Iterable[Event] = ()) -> None:
        """`guessed` events are not documented in full: a single flag is read indexed or not (loyfin.md 5.7)."""
        self._readings: dict[bytes, _Reading] = {}
        for event in events:
            self._add(event)
        for event in guessed:
            self._add(event)
            if event.types == ("bool",):
                other = compile_event(
                    {
                        "type": "event",
                        "name": event.name,
                        "inputs": [{"name": event.arguments[0], "type": "bool", "indexed": event.topic_count == 1}],
                    }
                )
                self._add(other)

    @classmethod
    def from_abi(cls, directory: Path | None = None, *, inferred: bool = True) -> Decoder:
        """The documented events, the inferred ones unless told otherwise, and those of any other *.json beside them.

        An event that has become known needs a file, not code: it is stored as a programme event under its name.
        """
        directory = directory or abi_directory()
        files = sorted(path for path in directory.glob("*.json") if path.name not in (DOCUMENTED, INFERRED))
        guessed = load_events(directory / INFERRED) if inferred else []
        return cls([*load_events(directory / DOCUMENTED), *(e for path in files for e in load_events(path))], guessed)

    @property
    def topics(self) -> frozenset[bytes]:
        """Every topic0 that is known by name."""
        return frozenset(self._readings)

    @property
    def fingerprint(self) -> bytes:
        """32 bytes that differ where another set of events, or of shapes of them, can be read."""
        known = sorted((topic0, reading.name, sorted(reading.shapes)) for topic0, reading in self._readings.items())
        return hashlib.sha256(repr(known).encode()).digest()

    def _add(self, event: Event) -> None:
        reading = self._readings.get(event.topic0)
        if reading is None:
            reading = self._readings[event.topic0] = _reading(event)
        reading.shapes.setdefault(event.topic_count, event.decode)

    def decode(self, logs: Sequence[Log], speakers: Speakers) -> Decoded:
        """Rows of the logs, any order, any number of blocks. Who speaks is settled before what is said (loyfin.md 5.5):
        a token may log before its announcement, in the same block. The Speakers are not changed.
        """
        tokens = self.discover(logs, speakers)
        out = Decoded(tokens=tokens)
        self.read(logs, speakers, tokens, out)
        return out

    def read(self, logs: Sequence[Log], speakers: Speakers, discovered: Sequence[Token], out: Decoded) -> None:
        """Adds the rows of the logs to `out`; `discovered` are the tokens that all logs at hand announce, not these alone.

        The second half of `decode`, for who has many logs and wants to come up for air between some of them and the next.
        """
        readings, speaks_for, tokens = self._readings, speakers.speaks_for, speakers.tokens
        born = {token.token: token.block_number for token in discovered}
        if born:
            tokens = tokens | {token.token: (token.factory, token.issuer, token.loyalty_id) for token in discovered}
        chain_id = speakers.chain_id
        for log in logs:
            emitter, topics = log.address, log.topics
            reading = readings.get(topics[0]) if topics else None
            allowed, own = speaks_for.get(emitter), tokens.get(emitter)
            if own is not None and born and log.block_number < born.get(emitter, 0):
                own = None
            if allowed is None and own is None:
                # events of one contract's own state carry no claim to be of a programme: half the chain emits them
                if reading is not None and reading.about != "emitter":
                    out.lookalikes["unknown_emitter"] += 1
                continue
            where = (
                chain_id,
                log.block_number,
                log.log_index,
                log.block_hash,
                log.block_time_ms,
                log.tx_hash,
                log.tx_index,
                emitter,
                True,
            )
            if reading is None:
                out.raw_logs.append((*where, list(topics), log.data, "unknown_topic", None))
                continue
            try:
                shape = reading.shapes.get(len(topics))
                if shape is None:
                    raise Undecodable(f"{reading.name} with {len(topics)} topics")
                values = shape(topics, log.data)
                lookalike = _foreign(reading, emitter, values, allowed, own, tokens)
                if lookalike is not None:
                    out.lookalikes[lookalike] += 1
                    continue
                read = reading.read if own is not None else reading.read_configured
                cut = read(out, where, emitter, values)
            except Undecodable as error:
                out.raw_logs.append((*where, list(topics), log.data, "undecodable", text(str(error))))
                continue
            if cut:
                out.raw_logs.append((*where, list(topics), log.data, "oversized", None))

    def discover(self, logs: Sequence[Log], speakers: Speakers) -> list[Token]:
        """Tokens that configured emitters announce in these logs and the Speakers do not know, by first announcement."""
        announced = []
        creating = {topic0: reading for topic0, reading in self._readings.items() if reading.creates}
        for log in logs:
            topics = log.topics
            if topics and topics[0] in creating and (allowed := speakers.speaks_for.get(log.address)) is not None:
                reading = creating[topics[0]]
                if len(topics) not in reading.shapes:
                    continue
                try:
                    factory, issuer, loyalty_id, loyalty = reading.shapes[len(topics)](topics, log.data)[:4]
                except Undecodable:
                    continue
                if factory in allowed and loyalty not in speakers.tokens:
                    at = (log.block_number, log.log_index)
                    announced.append((at, Token(loyalty, factory, issuer, loyalty_id, log.block_number)))
        first: dict[bytes, Token] = {}
        for _, token in sorted(announced):
            first.setdefault(token.token, token)
        return list(first.values())


def _foreign(
    reading: _Reading,
    emitter: bytes,
    values: Values,
    allowed: frozenset[bytes] | None,
    own: tuple[bytes, bytes, bytes] | None,
    tokens: Mapping[bytes, tuple[bytes, bytes, bytes]],
) -> str | None:
    """Why this emitter may not say this; None where it may. At least one of `allowed` and `own` is given."""
    if reading.about == "emitter":
        return None
    if reading.about == "programme":
        if allowed is not None and values[0] in allowed:
            return None
        if own is not None and values[:3] == own and values[3] == emitter:
            return None
        return "foreign_programme" if allowed is None else "foreign_factory"
    # `token`: a hub may be ahead of what we know of its programmes (history is filled behind the head), so a token that
    # nobody announced yet passes; it has a row, and no programme to show it under
    loyalty = values[0]
    if own is not None and loyalty == emitter:
        return None
    if allowed is None:
        return "foreign_token"
    known = tokens.get(loyalty)
    return None if known is None or known[0] in allowed else "foreign_factory"


# ------------------------------------------------------------------------------------------------ readers


def _reading(event: Event) -> _Reading:
    signature, name = event.signature, event.name
    of_token = event.arguments[:1] == ("loyalty",) and event.types[0] == "address"
    as_event = _programme_event_reader(name, event.arguments, of_token)
    if signature == _CREATED:
        return _Reading(name, {}, "programme", _read_programme, _read_programme, creates=True)
    if signature in _MOVEMENTS:
        read = _movement_reader(_MOVEMENTS[signature])
        return _Reading(name, {}, "programme", read, read)
    if signature in _TRANSFERS:
        read = _TRANSFERS[signature]
        return _Reading(name, {}, "token", read, read)
    if signature in _TRANSFERS_1155:  # of a factory or hub it moves nothing of a programme
        return _Reading(name, {}, "emitter", _TRANSFERS_1155[signature], as_event)
    return _Reading(name, {}, "token" if of_token else "emitter", as_event, as_event)


def _read_programme(out: Decoded, where: Row, emitter: bytes, values: Values) -> bool:
    texts = values[4:]
    out.programmes.append((*where, *values[:4], *[text(value) for value in texts]))
    return any(len(value) > MAX_TEXT for value in texts)


def _movement_reader(kind: str) -> Reader:
    def read(out: Decoded, where: Row, emitter: bytes, values: Values) -> bool:
        factory, issuer, loyalty_id, loyalty, holder, bucket, amount, nonce, operation_hash, data = values
        known = operation_hash if operation_hash != ZERO_HASH else None
        terms = (kind, factory, issuer, loyalty_id, loyalty, holder, bucket, amount, nonce, known, data[:MAX_DATA])
        out.movements.append(where + terms)
        return len(data) > MAX_DATA

    return read


def _read_transfer(out: Decoded, where: Row, emitter: bytes, values: Values) -> bool:
    out.transfers.append((*where, 0, "loyfin", *values))
    return False


def _read_single_1155(out: Decoded, where: Row, emitter: bytes, values: Values) -> bool:
    out.transfers.append((*where, 0, "erc1155", emitter, *values))
    return False


def _read_batch(out: Decoded, where: Row, emitter: bytes, values: Values) -> bool:
    return _items(out, where, "loyfin", values[:4], values[4], values[5])


def _read_batch_1155(out: Decoded, where: Row, emitter: bytes, values: Values) -> bool:
    return _items(out, where, "erc1155", (emitter, *values[:3]), values[3], values[4])


def _items(out: Decoded, where: Row, source: str, parties: Values, buckets: Values, amounts: Values) -> bool:
    if len(buckets) != len(amounts):
        raise Undecodable(f"{len(buckets)} token ids and {len(amounts)} amounts")
    pairs = enumerate(zip(buckets, amounts, strict=True))
    out.transfers += [(*where, item, source, *parties, bucket, amount) for item, (bucket, amount) in pairs]
    return False


_TRANSFERS: dict[str, Reader] = {
    "LoyaltyTransfer(address,address,address,address,uint256,uint256)": _read_transfer,
    "LoyaltyBatchTransfer(address,address,address,address,uint256[],uint256[])": _read_batch,
}
_TRANSFERS_1155: dict[str, Reader] = {
    "TransferSingle(address,address,address,uint256,uint256)": _read_single_1155,
    "TransferBatch(address,address,address,uint256[],uint256[])": _read_batch_1155,
}


def _programme_event_reader(name: str, arguments: Sequence[str], of_token: bool) -> Reader:
    def read(out: Decoded, where: Row, emitter: bytes, values: Values) -> bool:
        args = {text(argument): _json(value) for argument, value in zip(arguments, values, strict=True)}
        loyalty = values[0] if of_token else emitter
        out.programme_events.append((*where, loyalty, name, msgspec.json.encode(args).decode()))
        return any(_oversized(value) for value in values)

    return read


def _json(value: Any) -> Any:
    """As JSONB keeps it: bytes as 0x hex, integers as decimal strings, everything within the caps."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, bytes):
        return "0x" + value[:MAX_DATA].hex()
    if isinstance(value, tuple):
        return [_json(item) for item in value[:MAX_ITEMS]]
    return value if isinstance(value, bool) else str(value)


def _oversized(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) > MAX_ITEMS or any(_oversized(item) for item in value)
    return (isinstance(value, str) and len(value) > MAX_TEXT) or (isinstance(value, bytes) and len(value) > MAX_DATA)


def text(value: str) -> str:
    """As PostgreSQL can hold it: without NUL, within the cap. (Decoding left no half of a surrogate pair in it.)"""
    return value[:MAX_TEXT].replace("\0", "\ufffd")
