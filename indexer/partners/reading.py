"""Lenient readers of what partners send: text or number, this name or that, with or without a zone, or not there at all.

Promises exact amounts and times in Unix milliseconds, and never an exception: what cannot be read is None, and every liberty
taken is noted in a `Drift`, since it is how a changed API shows first. What a row means is left to each partner's module.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Context, Decimal, Inexact, InvalidOperation, localcontext
from typing import Any, Final

from indexer.model.types import UINT256_MAX

MOST_DIGITS: Final = 100  # of an amount, on either side of the point: a uint256 has 78
MOST_TEXT: Final = 512  # characters of an identifier
MOST_DEPTH: Final = 12
_INT8 = 2**63


class Drift(Counter[str]):
    """What was not as documented, by kind: 'type', 'missing', 'word', 'unreadable'. `gone`: names of the fields that are missing."""

    def __init__(self) -> None:
        super().__init__()
        self.gone: set[str] = set()


def text(value: Any, drift: Drift) -> str | None:
    """An identifier, from a string or a whole number."""
    if isinstance(value, str):
        cut = value.strip().replace("\0", "")
        return cut if 0 < len(cut) <= MOST_TEXT else None
    if isinstance(value, int) and not isinstance(value, bool):
        drift["type"] += 1
        return str(value)
    if value is not None:
        drift["unreadable"] += 1
    return None


def identifier(value: Any) -> str | None:
    """As `text`, where a number is as good as a string."""
    return text(value, Drift())


def amount(value: Any, drift: Drift, *, number: bool = False) -> Decimal | None:
    """An exact amount, not negative. `number`: the API documents a number; a string is drift then."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        drift["unreadable"] += 1
        return None
    if isinstance(value, str) is number:
        drift["type"] += 1
    try:
        found = Decimal(value.strip()) if isinstance(value, str) else Decimal(value)
    except (InvalidOperation, ValueError):
        drift["unreadable"] += 1
        return None
    usable = found.is_finite() and found >= 0 and len(found.as_tuple().digits) <= MOST_DIGITS
    if not usable or not -MOST_DIGITS < found.adjusted() < MOST_DIGITS:
        drift["unreadable"] += 1
        return None
    return found


def base_units(value: Decimal, decimals: int) -> int | None:
    """`value` times 10^decimals, exactly; None where a fraction of a unit is left, or no uint256 holds it."""
    with localcontext(Context(prec=400, traps=[Inexact, InvalidOperation])):
        scaled = value.scaleb(decimals)
        if scaled != scaled.to_integral_value():
            return None
        units = int(scaled)
    return units if 0 <= units <= UINT256_MAX else None


def plain_decimal(value: Decimal) -> str:
    """As a person writes it: no exponent."""
    return format(value, "f")


def whole(value: Any, drift: Drift) -> int | None:
    """A whole number from a string or a number, such as a height; None where there is none."""
    found = amount(value, drift)
    return base_units(found, 0) if found is not None else None


def flag(value: Any, drift: Drift) -> bool | None:
    """True or false, also in the words that a retyped API uses."""
    if value is None or isinstance(value, bool):
        return value
    drift["type"] += 1
    word = str(value).strip().lower()
    if word in ("true", "1", "success", "ok"):
        return True
    if word in ("false", "0", "failed"):
        return False
    drift["unreadable"] += 1
    return None


def instant(value: Any, drift: Drift) -> int | None:
    """Unix milliseconds of an ISO 8601 time (UTC where it names no zone), or of Unix seconds or milliseconds."""
    if value is None:
        return None
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        drift["type"] += 1
        number = int(value) if -(10**15) < value < 10**15 else 0
        number = number if number > 10**11 else number * 1000
        return number if 0 < number < 10**14 else None
    if isinstance(value, str):
        try:
            found = datetime.fromisoformat(value.strip())
        except ValueError:
            drift["unreadable"] += 1
            return None
        found = found.replace(tzinfo=UTC) if found.tzinfo is None else found
        return int(found.timestamp()) * 1000 + found.microsecond // 1000
    drift["unreadable"] += 1
    return None


def table(value: Any) -> Mapping[str, Any]:
    """An object, or an empty one for anything else."""
    return value if isinstance(value, dict) else {}


# ------------------------------------------------------------------------------------------------ raw records

_PERSONAL = re.compile(
    r"^(user|customer|person|profile|member)(_?to)?$|e-?mail|phone|birth|street|postal|zip_?code|ip_?address"
    r"|(first|last|second|full|given|family|customer|user|display|nick|owner|contact)_?name|mobile|^contact$",
    re.IGNORECASE,
)


def without_people(value: Any) -> Any:
    """A document without the fields that hold, or may hold, what is known of a person."""
    if isinstance(value, dict):
        return {key: without_people(child) for key, child in value.items() if not _PERSONAL.search(key)}
    return [without_people(child) for child in value] if isinstance(value, list) else value


def storable(value: Any, depth: int = 0) -> Any:
    """The same document as jsonb can hold it: no NUL, numbers beyond 63 bits and fractions as exact text."""
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    if isinstance(value, Decimal):
        return plain_decimal(value) if -MOST_DIGITS < value.adjusted() < MOST_DIGITS else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value if -_INT8 <= value < _INT8 else str(value)
    if depth >= MOST_DEPTH and isinstance(value, dict | list):
        return None
    if isinstance(value, dict):
        return {key.replace("\0", "\ufffd"): storable(child, depth + 1) for key, child in value.items()}
    if isinstance(value, list):
        return [storable(child, depth + 1) for child in value]
    return value


def completed(new: Any, known: Any, drift: Drift) -> Any:
    """`new` with what it leaves out taken from what was known: a field that is not there says nothing, a null does.

    What carries another id is another thing, and takes nothing over: a transaction's block is not its successor's.
    """
    if isinstance(new, dict) and isinstance(known, dict):
        if any(
            key in new and key in known and str(new[key]) != str(known[key]) for key in ("id", "hash", "transactionId")
        ):
            return new
        missing = known.keys() - new.keys()
        drift["missing"] += len(missing)
        drift.gone |= missing
        merged = {key: completed(child, known.get(key), drift) for key, child in new.items()}
        return merged | {key: known[key] for key in missing}
    if isinstance(new, list) and isinstance(known, list) and len(new) == len(known):
        return [completed(child, was, drift) for child, was in zip(new, known, strict=True)]
    return new


def alike(one: Any, other: Any) -> bool:
    """Whether two documents say the same, be a number written as one or as a string."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(child, other[key]) for key, child in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(alike(a, b) for a, b in zip(one, other, strict=True))
    if one == other and isinstance(one, bool) is isinstance(other, bool):
        return True
    if isinstance(one, str | int) and isinstance(other, str | int) and not isinstance(one, bool | type(other)):
        if isinstance(other, bool):
            return False
        quiet = Drift()
        first = amount(one, quiet)
        return first is not None and first == amount(other, quiet)
    return False
