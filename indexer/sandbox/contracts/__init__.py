"""The sandbox's contracts as committed artefacts (ABI and bytecode), and the encoding of calls, logs and refusals by them.

The Solidity sources lie beside them; a test recompiles and compares. What to call, and when, is left to the drivers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from eth_abi.abi import decode, encode
from eth_hash.auto import keccak

from indexer.model.types import Address, Hash32, address, hash32

ContractName = Literal["Loyfin", "BurstFactory", "LoyfinHub", "LoyaltyToken", "LookAlike", "TestUSD"]
NAMES: tuple[ContractName, ...] = ("Loyfin", "BurstFactory", "LoyfinHub", "LoyaltyToken", "LookAlike", "TestUSD")

_Json = dict[str, Any]


def _type_of(parameter: _Json) -> str:
    """The canonical type: a struct is written as the tuple of its members."""
    kind: str = parameter["type"]
    if not kind.startswith("tuple"):
        return kind
    return f"({','.join(_type_of(member) for member in parameter['components'])}){kind[5:]}"


def _types(parameters: Sequence[_Json]) -> list[str]:
    return [_type_of(parameter) for parameter in parameters]


def _signature(entry: _Json) -> str:
    return f"{entry['name']}({','.join(_types(entry['inputs']))})"


@dataclass(frozen=True, slots=True)
class Event:
    """A decoded log. Addresses and hashes are bytes, numbers int."""

    name: str
    emitter: Address
    fields: Mapping[str, Any]
    block_number: int
    block_hash: Hash32
    tx_hash: Hash32
    log_index: int


@dataclass(frozen=True)
class Artefact:
    """One compiled contract. Within a contract no function, event or error is overloaded."""

    name: str
    compiler: str
    bytecode: bytes
    functions: Mapping[str, _Json]
    events: Mapping[str, _Json]
    errors: Mapping[str, _Json]
    constructor: Sequence[_Json]

    def creation(self, *arguments: object) -> bytes:
        """The data of the transaction that deploys it."""
        return self.bytecode + encode(_types(self.constructor), arguments)

    def call(self, function: str, *arguments: object) -> bytes:
        """The data of a call."""
        entry = self.functions[function]
        return keccak(_signature(entry).encode())[:4] + encode(_types(entry["inputs"]), arguments)

    def result(self, function: str, data: bytes) -> Any:
        """The value of a function that returns one; addresses as bytes."""
        (output,) = self.functions[function]["outputs"]
        kind = _type_of(output)
        return _plain(kind, decode([kind], data)[0])

    def log(self, event: str, **fields: object) -> tuple[list[bytes], bytes]:
        """Topics and data of a log, for `speak`. A string may be given as bytes, so that it need not be valid UTF-8."""
        entry = self.events[event]
        topics, kinds, values = [keccak(_signature(entry).encode())], [], []
        for parameter in entry["inputs"]:
            kind, value = _type_of(parameter), fields.pop(parameter["name"])
            if kind == "string" and isinstance(value, bytes):
                kind = "bytes"  # the same encoding, without the check of the text
            if parameter["indexed"]:
                topics.append(encode([kind], [value]))
            else:
                kinds.append(kind)
                values.append(value)
        if fields:
            raise TypeError(f"{event} has no field {', '.join(fields)}")
        return topics, encode(kinds, values)


@cache
def artefact(name: ContractName) -> Artefact:
    """The committed artefact of a contract."""
    found = json.loads(resources.files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8"))

    def named(kind: str) -> dict[str, _Json]:
        return {entry["name"]: entry for entry in found["abi"] if entry["type"] == kind}

    constructor: list[_Json] = next((entry["inputs"] for entry in found["abi"] if entry["type"] == "constructor"), [])
    return Artefact(
        name=found["contractName"],
        compiler=found["compiler"]["version"],
        bytecode=bytes.fromhex(found["bytecode"][2:]),
        functions=named("function"),
        events=named("event"),
        errors=named("error"),
        constructor=constructor,
    )


def decode_logs(logs: Sequence[_Json]) -> list[Event]:
    """The logs of a JSON-RPC answer that the sandbox's contracts declare, whoever emitted them, in the given order.

    Strict: data that do not fit the declaration raise eth_abi's errors. Undeclared topics are left out.
    """
    return [event for log in logs if (event := _decode(log)) is not None]


def _decode(log: _Json) -> Event | None:
    topics = [bytes.fromhex(topic[2:]) for topic in log["topics"]]
    # ERC-20's and ERC-721's Transfer share a topic: the number of indexed fields tells them apart
    entry = _events_by_topic().get((topics[0], len(topics))) if topics else None
    if entry is None:
        return None
    body = [parameter for parameter in entry["inputs"] if not parameter["indexed"]]
    words = iter(topics[1:])
    tail = iter(decode(_types(body), bytes.fromhex(log["data"][2:])))
    fields = {}
    for parameter in entry["inputs"]:
        kind = _type_of(parameter)
        value = decode([kind], next(words))[0] if parameter["indexed"] else next(tail)
        fields[parameter["name"]] = _plain(kind, value)
    return Event(
        name=entry["name"],
        emitter=address(log["address"]),
        fields=fields,
        block_number=int(log["blockNumber"], 16),
        block_hash=hash32(log["blockHash"]),
        tx_hash=hash32(log["transactionHash"]),
        log_index=int(log["logIndex"], 16),
    )


def error_of(data: bytes) -> str:
    """What a revert's data say, as `NonceUsed(…)`; plain hex where no contract of the sandbox declares it."""
    entry = _errors_by_selector().get(data[:4])
    if entry is None:
        return "0x" + data.hex()
    values = [
        "0x" + value.hex() if isinstance(value, bytes) else str(value)
        for value in decode(_types(entry["inputs"]), data[4:])
    ]
    return f"{entry['name']}({', '.join(values)})"


@cache
def _events_by_topic() -> dict[tuple[bytes, int], _Json]:
    return {
        (keccak(_signature(entry).encode()), 1 + sum(p["indexed"] for p in entry["inputs"])): entry
        for name in NAMES
        for entry in artefact(name).events.values()
    }


@cache
def _errors_by_selector() -> dict[bytes, _Json]:
    return {keccak(_signature(entry).encode())[:4]: entry for name in NAMES for entry in artefact(name).errors.values()}


def _plain(kind: str, value: Any) -> Any:
    return bytes.fromhex(value[2:]) if kind == "address" else value
