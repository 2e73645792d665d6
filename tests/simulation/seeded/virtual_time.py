"""The clocks of Python's standard library, replaced before the product is imported: it takes `time.monotonic` as a default.

Outside a virtual loop they are what they always were. Import this first.
"""

from __future__ import annotations

import asyncio
import datetime as datetime_module
import random
import time
import uuid

_real = {name: getattr(time, name) for name in ("time", "monotonic", "perf_counter")}


def _virtual(name: str, wall: bool):  # type: ignore[no-untyped-def]
    def now() -> float:
        loop = asyncio._get_running_loop()
        if loop is not None and hasattr(loop, "wall"):
            return float(loop.wall if wall else loop.now)
        return float(_real[name]())

    return now


time.time, time.monotonic, time.perf_counter = (
    _virtual("time", True),
    _virtual("monotonic", False),
    _virtual("perf_counter", False),
)


_Random = random.Random
_source: random.Random | None = None  # of seeds for generators that were given none


class _Seeded(_Random):
    def __init__(self, x: object = None) -> None:
        super().__init__(_source.getrandbits(64) if x is None and _source is not None else x)  # type: ignore[arg-type]

    def __new__(cls, *_: object) -> _Seeded:
        return super().__new__(cls)


random.Random = _Seeded  # type: ignore[misc]


class Datetime(datetime_module.datetime):
    """`datetime.now(UTC)` by the virtual clock, for modules that are given it."""

    @classmethod
    def now(cls, tz: datetime_module.tzinfo | None = None) -> Datetime:
        return cls.fromtimestamp(time.time(), tz)


def seeded_identifiers(seed: int) -> None:
    """uuid4, the shared generator of `random`, and every generator that is made without a seed."""
    global _source
    rng = _source = _Random(f"uuid {seed}")
    uuid.uuid4 = lambda: uuid.UUID(int=rng.getrandbits(128), version=4)
    random.seed(seed)
