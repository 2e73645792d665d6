"""JSON in and out. A body is read as strict JSON: what two readers could understand differently (duplicate keys, NaN), or
what the store cannot hold (NUL, lone surrogates, numbers out of all measure), is refused before anything looks at it. What
the words mean is decided by the contract functions, which get the text as it came.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from indexer.api.problems import BAD_REQUEST, NOT_JSON, TIMEOUT, UNPROCESSABLE, Kind, Problem

MAX_BODY = 64 * 1024  # bytes
BODY_SECONDS = 10.0  # for all of it to arrive
MAX_DEPTH = 32
MAX_DIGITS = 100  # of a number; a uint256 has 78
MAX_EXPONENT = 300
_FIELD = re.compile(r"field `([^`]*)`")


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


def _fraction(text: str) -> float | int:
    if len(text) > MAX_DIGITS:
        raise _Refused(f"a number has {len(text)} digits; at most {MAX_DIGITS} are read")
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise _Refused("a number is out of range") from None
    if abs(number.adjusted()) > MAX_EXPONENT:
        raise _Refused("a number is out of range")
    # 1.0 is an integer (RFC 8259 knows one kind of number, and so does JSON Schema)
    return int(number) if number == number.to_integral_value() else float(text)


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
        raise Problem(BAD_REQUEST, f"the body is not UTF-8: byte {error.start + 1} belongs to no character") from None
    try:
        value = json.loads(
            text, object_pairs_hook=_pairs, parse_int=_integer, parse_float=_fraction, parse_constant=_constant
        )
        _check(value)
    except RecursionError:
        raise Problem(BAD_REQUEST, f"the body is nested deeper than {MAX_DEPTH}") from None
    except json.JSONDecodeError as error:
        raise Problem(
            BAD_REQUEST, f"the body is not JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except _Refused as error:
        raise Problem(BAD_REQUEST, f"the body cannot be taken: {error}") from None
    return value, text


async def read_object(request: web.Request, *, optional: bool = False) -> tuple[dict[str, Any], str]:
    """The body as a JSON object, and its text. `optional`: no body is an empty object. Raises Problem 400, 408, 415."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            raw = await request.read()
    except TimeoutError:
        raise Problem(
            TIMEOUT, f"the body did not arrive within {BODY_SECONDS:.0f} s", headers={"Connection": "close"}
        ) from None
    except web.RequestPayloadError:
        raise Problem(
            BAD_REQUEST, "the body is not encoded as its headers say", headers={"Connection": "close"}
        ) from None
    if not raw.strip() and optional:
        return {}, "{}"
    kind = request.content_type
    if kind != "application/json" and not kind.endswith("+json"):
        raise Problem(NOT_JSON, f"send the body with Content-Type: application/json, not {kind[:60]}")
    value, text = parse(raw)
    if not isinstance(value, dict):
        raise Problem(BAD_REQUEST, "the body is not a JSON object")
    return value, text


T = TypeVar("T", bound=msgspec.Struct)


def shaped(value: Mapping[str, Any], shape: type[T], *, refusal: Kind = UNPROCESSABLE, strict: bool = True) -> T:
    """A parsed object as the struct that the contract declares. Unknown and misspelt fields are refused.

    Not `strict`: values are text (a query's), and numbers are read from it. Raises Problem of the kind `refusal`.
    """
    try:
        return msgspec.convert(value, shape, strict=strict)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").removeprefix(".") or None
        if field is None and (named := _FIELD.search(what)) is not None:
            field = named[1]
        extra = {"field": field[:60]} if field else {}
        raise Problem(refusal, f"{extra['field']}: {what[:200]}" if extra else what[:200], extra=extra) from None


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Structs in camelCase, times as RFC 3339 with Z. Answers speak of one moment: nobody may keep them."""
    return web.Response(
        status=status,
        body=msgspec.json.encode(value),
        content_type="application/json",
        headers={"Cache-Control": "no-store"} | (headers or {}),
    )
