"""Cursors: where a page ended, as an opaque word that only fits the question it was the answer to.

A cursor carries the position and a digest of the question (its kind, brand and filters). It guards nothing: whoever forges
one reads what he may read anyway. It says clearly when it is used where it makes no sense.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from functools import lru_cache
from typing import Any, TypeVar

import msgspec

P = TypeVar("P", bound=msgspec.Struct)
_DIGEST = 8  # bytes: against mistakes, not against people
MAX_LENGTH = 1024  # characters; ours have far fewer


class BadCursor(ValueError):
    """A `cursor` that no answer to this question contained."""


def _digest(question: tuple[Any, ...]) -> bytes:
    return hashlib.sha256(msgspec.json.encode(question)).digest()[:_DIGEST]


@lru_cache(maxsize=16)
def _decoder(shape: type[P]) -> msgspec.msgpack.Decoder[P]:
    return msgspec.msgpack.Decoder(shape)


def write(question: tuple[Any, ...], position: msgspec.Struct) -> str:
    """The word for `position` in the answers to `question`, safe in a URL without escaping."""
    return base64.urlsafe_b64encode(_digest(question) + msgspec.msgpack.encode(position)).rstrip(b"=").decode()


def read(question: tuple[Any, ...], cursor: str, shape: type[P]) -> P:
    """The position. Raises BadCursor."""
    decoder = _decoder(shape)
    try:
        if not 0 < len(cursor) <= MAX_LENGTH:
            raise BadCursor("this cursor is not one of ours")
        raw = base64.b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        position: P = decoder.decode(raw[_DIGEST:])
    except (binascii.Error, UnicodeError, msgspec.DecodeError, OverflowError):
        raise BadCursor("this cursor is not one of ours") from None
    if raw[:_DIGEST] != _digest(question):
        raise BadCursor("this cursor belongs to another question: keep brand and filters while you page")
    return position
