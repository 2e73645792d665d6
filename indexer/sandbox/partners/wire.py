"""What passes between a client and a simulated partner: a request, and a reply with its delays and defects spelled out.

Nothing here sends anything: `app.py` plays a reply out over a socket, a simulation reads it where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

JSON = "application/json"
PROBLEM = "application/problem+json"

_encoder = msgspec.json.Encoder(decimal_format="number")


def encoded(document: object) -> bytes:
    """JSON; a Decimal becomes a number, digit by digit."""
    return _encoder.encode(document)


@dataclass(frozen=True, slots=True)
class Request:
    """`path` without the query, as it was sent; names of `headers` in lower case."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def document(self) -> Any:
        """The body's JSON; None where it is none."""
        try:
            return msgspec.json.decode(self.body)
        except msgspec.DecodeError:
            return None

    def whole(self, name: str, default: int) -> int | None:
        """A whole number of the query; None where something else was sent."""
        text = self.query.get(name, str(default))
        return int(text) if text.isascii() and text.isdigit() else None


@dataclass(frozen=True, slots=True)
class Reply:
    """`delay`: seconds before its first byte. `padding`: bytes of white space after the body, never held in memory.
    `fate`: silent ones never come, dropped ones end in a closed connection."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    padding: int = 0
    fate: Literal["answered", "silent", "dropped"] = "answered"

    def document(self) -> Any:
        return msgspec.json.decode(self.body)


def answer(document: object, status: int = 200, content_type: str = JSON, **headers: str) -> Reply:
    """A JSON reply; underscores in header names become hyphens."""
    named = {name.replace("_", "-").title(): value for name, value in headers.items()}
    return Reply(status, encoded(document), {"Content-Type": content_type, **named})
