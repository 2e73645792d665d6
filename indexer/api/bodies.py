"""JSON in and out. A body is read as strict JSON: what two readers could understand differently (duplicate keys, NaN), or
what the store cannot hold (NUL, lone surrogates, numbers out of all measure), is refused before anything looks at it. What
the words mean is decided by the contract functions, which get the text as it came.
"""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec
from aiohttp import web

from indexer.api.problems import Problem

MAX_BODY = 64 * 1024  # bytes
BODY_SECONDS = 10.0  # for all of it to arrive
MAX_DEPTH = 32
MAX_DIGITS = 100  # of a number; a uint256 has 78
MAX_EXPONENT = 300


class _Refused(ValueError):
    """Valid as a grammar, and refused by us; the message says why."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the key {double[:60]!r} stands twice in one object")
    return found


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _Refused(f"a number has {len(text)} digits; at most {MAX_DIGITS} are read")
    return int(text)


def _fraction(text: str) -> float:
    if len(text) > MAX_DIGITS:
        raise _Refused(f"a number has {len(text)} digits; at most {MAX_DIGITS} are read")
    try:
        exponent = Decimal(text).adjusted()
    except InvalidOperation:
        raise _Refused("a number is out of range") from None
    if abs(exponent) > MAX_EXPONENT:
        raise _Refused("a number is out of range")
    return float(text)


def _constant(text: str) -> float:
    raise _Refused(f"{text} is not JSON")


def _check(value: Any, depth: int = 1) -> None:
    """Refuses nesting that a recursive reader could choke on, and text that PostgreSQL cannot hold."""
    if depth > MAX_DEPTH:
        raise _Refused(f"nested deeper than {MAX_DEPTH}")
    match value:
        case dict():
            for key, item in value.items():
                _check(key, depth)
                _check(item, depth + 1)
        case list():
            for item in value:
                _check(item, depth + 1)
        case str():
            if "\x00" in value:
                raise _Refused("a string contains NUL (\\u0000)")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise _Refused("a string contains half of a surrogate pair") from None


def parse(raw: bytes) -> tuple[Any, str]:
    """The value and its text, from bytes that a stranger sent. Raises Problem 400."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise Problem(400, f"the body is not UTF-8: byte {error.start + 1} belongs to no character") from None
    try:
        value = json.loads(
            text, object_pairs_hook=_pairs, parse_int=_integer, parse_float=_fraction, parse_constant=_constant
        )
        _check(value)
    except RecursionError:
        raise Problem(400, f"the body is nested deeper than {MAX_DEPTH}") from None
    except json.JSONDecodeError as error:
        raise Problem(400, f"the body is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except _Refused as error:
        raise Problem(400, f"the body cannot be taken: {error}") from None
    return value, text


async def read_object(request: web.Request, *, optional: bool = False) -> tuple[dict[str, Any], str]:
    """The body as a JSON object, and its text. `optional`: no body is an empty object. Raises Problem 400, 408, 415."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            raw = await request.read()
    except TimeoutError:
        raise Problem(
            408, f"the body did not arrive within {BODY_SECONDS:.0f} s", headers={"Connection": "close"}
        ) from None
    if not raw.strip() and optional:
        return {}, "{}"
    kind = request.content_type
    if kind != "application/json" and not kind.endswith("+json"):
        raise Problem(415, f"send the body with Content-Type: application/json, not {kind[:60]}")
    value, text = parse(raw)
    if not isinstance(value, dict):
        raise Problem(400, "the body is not a JSON object")
    return value, text


def refuse_unknown(body: dict[str, Any], *known: str) -> None:
    """A misspelt key must not be silently nothing. Raises Problem 422."""
    strange = sorted(set(body) - set(known))
    if strange:
        raise Problem(
            422,
            f"unknown field {', '.join(key[:60] for key in strange[:5])}; known are {', '.join(known)}",
            extra={"field": strange[0][:60]},
        )


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Structs in camelCase, times as RFC 3339 with Z. Answers speak of one moment: nobody may keep them."""
    return web.Response(
        status=status,
        body=msgspec.json.encode(value),
        content_type="application/json",
        headers={"Cache-Control": "no-store"} | (headers or {}),
    )
