"""Turns an event's ABI into straight-line Python that decodes its topics and data.

Promises the value that eth_abi's strict decoder gives, or a refusal where it refuses, more than ten times faster: one
`struct` call splits the head, checks are plain comparisons. Static words, `bytes`, `string` and arrays of static words
are generated; an event with any other type in its data is left to eth_abi itself. Knows nothing of what events mean.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eth_abi.codec import ABIDecoder
from eth_abi.decoding import AddressDecoder, StringDecoder
from eth_abi.registry import registry as standard_registry
from eth_hash.auto import keccak

Values = tuple[Any, ...]

_STATIC = frozenset(
    ["address", "bool", *(f"bytes{size}" for size in range(1, 33))]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in range(8, 257, 8)]
)


DOCUMENTED = "loyfin_events.json"
INFERRED = "loyfin_events_inferred.json"


class Undecodable(ValueError):
    """The payload is not an encoding of the event; the message names the argument."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event of an ABI and its decoder.

    `decode(topics, data)` takes all topics (topic0 included, 32 bytes each) and gives the arguments in the ABI's order:
    address → 20 bytes, bytesN → N bytes, bytes → bytes, (u)int → int, bool → bool, string → str with U+FFFD for what is
    not UTF-8, arrays → tuples. An indexed argument of dynamic type is its 32-byte hash. Raises Undecodable.
    """

    name: str
    signature: str
    topic0: bytes
    arguments: tuple[str, ...]
    types: tuple[str, ...]
    topic_count: int
    decode: Callable[[Sequence[bytes], bytes], Values]


def compile_event(abi: Mapping[str, Any]) -> Event:
    """The Event of one `{"type": "event", …}` entry of an ABI. Raises ValueError for what is no event ABI."""
    if abi.get("type") != "event" or not abi.get("name"):
        raise ValueError(f"not an event: {str(abi)[:120]}")
    inputs = list(abi["inputs"])
    types = tuple(_canonical(item) for item in inputs)
    arguments = tuple(item.get("name") or f"arg{position}" for position, item in enumerate(inputs))
    indexed = [position for position, item in enumerate(inputs) if item["indexed"]]
    signature = f"{abi['name']}({','.join(types)})"
    return Event(
        name=abi["name"],
        signature=signature,
        topic0=keccak(signature.encode()),
        arguments=arguments,
        types=types,
        topic_count=len(indexed) + 1,
        decode=_compile(arguments, types, indexed),
    )


def abi_directory() -> Path:
    """Where the ABI files lie: inside the installed package, else beside it in the checkout. Raises FileNotFoundError."""
    package = Path(__file__).resolve().parents[1]
    for directory in (package / "contracts_abi", package.parent / "contracts_abi"):
        if (directory / DOCUMENTED).is_file():
            return directory
    raise FileNotFoundError(f"{DOCUMENTED}: neither in {package}/contracts_abi nor in {package.parent}/contracts_abi")


def load_events(path: Path) -> list[Event]:
    """The events of one ABI file; its functions and anonymous events are passed over. Raises ValueError naming the file."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list):
            raise ValueError("expected an array")
        return [
            compile_event(entry) for entry in entries if entry.get("type") == "event" and not entry.get("anonymous")
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not an ABI: {error}") from error


def _canonical(item: Mapping[str, Any]) -> str:
    """The type as it enters the signature: `uint` is uint256, a tuple is its components."""
    kind = str(item["type"])
    base, _, rest = kind.partition("[")
    brackets = "[" + rest if rest else ""
    if base == "tuple":
        return "(" + ",".join(_canonical(part) for part in item["components"]) + ")" + brackets
    return {"uint": "uint256", "int": "int256", "byte": "bytes1"}.get(base, base) + brackets


class _RawAddressDecoder(AddressDecoder):
    """20 bytes instead of hex text: addresses are bytes inside."""

    decoder_fn = staticmethod(bytes)  # type: ignore[assignment]


def _lenient_codec() -> ABIDecoder:
    # strict in lengths, pointers and padding; lenient only in UTF-8, which contracts do not promise (loyfin.md 5.21)
    registry = standard_registry.copy()  # type: ignore[no-untyped-call]
    registry.unregister_decoder("address")
    registry.register_decoder("address", _RawAddressDecoder, label="address")
    registry.unregister_decoder("string")
    registry.register_decoder("string", StringDecoder("replace"), label="string")  # type: ignore[no-untyped-call]
    return ABIDecoder(registry)


class _Word:
    """How one static 32-byte word is split, checked and read: a struct format, a test that refuses, an expression."""

    def __init__(self, kind: str, name: str) -> None:
        self.value = name
        self.refuse: str | None = None
        if kind == "address":
            self.format, self.targets, self.refuse = "12s20s", [f"{name}p", name], f"{name}p != ZERO12"
        elif kind == "bool":
            self.format, self.targets, self.refuse = "31sB", [f"{name}p", name], f"{name}p != ZERO31 or {name} > 1"
            self.value = f"{name} == 1"
        elif kind.startswith("uint"):
            size = int(kind[4:]) // 8
            self.format, self.targets, self.value = f"{size}s", [name], f"from_bytes({name}, 'big')"
            if size < 32:
                self.format, self.targets = f"{32 - size}s{size}s", [f"{name}p", name]
                self.refuse = f"{name}p != ZERO{32 - size}"
        elif kind.startswith("int"):
            self.format, self.targets = "32s", [name]
            self.value = f"from_bytes({name}, 'big', signed=True)"
            if (bits := int(kind[3:])) < 256:
                self.refuse = f"not -{1 << bits - 1} <= {self.value} < {1 << bits - 1}"
        else:  # bytesN
            size = int(kind[5:])
            self.format, self.targets = f"{size}s", [name]
            if size < 32:
                self.format, self.targets = f"{size}s{32 - size}s", [name, f"{name}p"]
                self.refuse = f"{name}p != ZERO{32 - size}"


def _compile(
    arguments: Sequence[str], types: Sequence[str], indexed: Sequence[int]
) -> Callable[[Sequence[bytes], bytes], Values]:
    """Source text out of types alone: nothing that the ABI file says but validated types and quoted names gets in."""
    body = [position for position in range(len(types)) if position not in indexed]
    scope: dict[str, Any] = {"Undecodable": Undecodable, "from_bytes": int.from_bytes}
    scope |= {f"ZERO{size}": bytes(size) for size in range(1, 32)}
    values = [f"v{position}" for position in range(len(types))]
    lines = [
        f"if len(topics) != {len(indexed) + 1}:",
        f"    raise Undecodable(f'expected {len(indexed) + 1} topics, got {{len(topics)}}')",
    ]
    for place, position in enumerate(indexed):
        # an indexed string, array or tuple is present as its hash only
        kind = types[position] if types[position] in _STATIC else "bytes32"
        word = _Word(kind, f"v{position}")
        if word.targets == [f"v{position}"]:
            lines.append(f"v{position} = topics[{place + 1}]")
        else:
            scope[f"topic{place + 1}"] = struct.Struct(">" + word.format).unpack
            lines.append(f"{', '.join(word.targets)} = topic{place + 1}(topics[{place + 1}])")
        lines += _refusal(word.refuse, arguments[position], "does not fit its type")
        values[position] = word.value

    element = {position: types[position].removesuffix("[]") for position in body}
    generated = all(types[p] in ("bytes", "string") or element[p] in _STATIC for p in body)
    if not generated:
        scope |= {"codec": _lenient_codec(), "kinds": [types[position] for position in body]}
        targets = "".join(f"v{position}, " for position in body)
        lines += [
            "try:",
            f"    {targets}= codec.decode(kinds, data)",
            "except Exception as error:",
            "    raise Undecodable(f'{type(error).__name__}: {error}') from None",
        ]
    elif body:
        lines += _head(arguments, types, body, scope, values)
    lines.append(f"return ({''.join(value + ', ' for value in values)})")
    source = "def decode(topics, data):\n" + "".join(f"    {line}\n" for line in lines)
    exec(compile(source, "<generated event decoder>", "exec"), scope)  # noqa: S102
    decode: Callable[[Sequence[bytes], bytes], Values] = scope["decode"]
    return decode


def _head(
    arguments: Sequence[str], types: Sequence[str], body: Sequence[int], scope: dict[str, Any], values: list[str]
) -> list[str]:
    size = 32 * len(body)
    formats, targets, checks, tails = "", [], [], []
    for position in body:
        name, kind = f"v{position}", types[position]
        if kind in _STATIC:
            word = _Word(kind, name)
            formats += word.format
            targets += word.targets
            checks += _refusal(word.refuse, arguments[position], "does not fit its type")
            values[position] = word.value
        else:
            formats += "32s"
            targets.append(f"{name}o")
            tails += _tail(name, arguments[position], kind, size, scope)
    scope["head"] = struct.Struct(">" + formats).unpack_from
    return [
        "size = len(data)",
        f"if size < {size}:",
        f"    raise Undecodable(f'expected at least {size} bytes of data, got {{size}}')",
        f"{''.join(target + ', ' for target in targets)}= head(data)",
        *checks,
        *tails,
    ]


def _tail(name: str, argument: str, kind: str, head: int, scope: dict[str, Any]) -> list[str]:
    # a pointer into the head is refused, as eth_abi does: such a payload reads one word as two things
    lines = [
        f"at = from_bytes({name}o, 'big')",
        *_refusal(f"at < {head} or at + 32 > size", argument, "points outside the payload"),
        "count = from_bytes(data[at : at + 32], 'big')",
        "start = at + 32",
    ]
    if kind in ("bytes", "string"):
        lines += [
            "stop = start + count",
            "padded = stop + -count % 32",
            *_refusal("padded > size", argument, "longer than the payload"),
            *_refusal("stop != padded and data[stop:padded].strip(b'\\0')", argument, "not padded with zeros"),
            f"{name} = data[start:stop]" + (".decode('utf-8', 'replace')" if kind == "string" else ""),
        ]
        return lines
    item = _Word(kind.removesuffix("[]"), "item")
    scope[f"{name}_words"] = struct.Struct(">" + item.format).iter_unpack
    names = ", ".join(item.targets) + ("," if len(item.targets) == 1 else "")
    lines += [
        "stop = start + 32 * count",
        *_refusal("stop > size", argument, "longer than the payload"),
        f"words = list({name}_words(data[start:stop]))",
    ]
    if item.refuse is not None:
        lines += _refusal(f"any({item.refuse} for {names} in words)", argument, "holds an item that does not fit")
    lines.append(f"{name} = tuple([{item.value} for {names} in words])")
    return lines


def _refusal(condition: str | None, argument: str, why: str) -> list[str]:
    return [] if condition is None else [f"if {condition}:", f"    raise Undecodable({f'{argument}: {why}'!r})"]
