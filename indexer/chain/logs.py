"""From a node's raw answers to logs that may be decoded: parsed, checked, and with a time for each block.

Promises that every log is well-formed, belongs to what was asked for, and comes once, in chain order; a Lie otherwise.
Where the logs come from is the caller's; that nothing was left out is the gate's and the second look's to find.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from indexer.chain.integrity import Count, Lie, Outcome, verify_header, verify_logs
from indexer.chain.linkage import Unsettled
from indexer.chain.rpc import Rpc
from indexer.chain.wire import BadLog, Log, RawLog, parse_log, quantity
from indexer.model.types import Header, Schedule


def timed(
    raws: Sequence[RawLog], schedule: Schedule | None, headers: Mapping[int, Header], count: Count | None = None
) -> list[Log]:
    """Parses logs; their time from the schedule, else a header of the block, else the log's own seconds.

    Raises Lie for a malformed log; KeyError for a block that has no time (see `untimed`).
    """
    logs = []
    at: str | None = None  # the block that time_ms is of
    time_ms = 0
    try:
        for raw in raws:
            if raw.block_number != at or at is None:
                at = raw.block_number or ""
                time_ms = _time_ms(quantity(at), raw, schedule, headers)
            logs.append(parse_log(raw, time_ms))
    except BadLog as error:
        raise malformed(str(error), count) from None
    except ValueError as error:
        raise malformed(f"block number or time: {error}", count) from None
    return logs


def malformed(what: str, count: Count | None) -> Lie:
    """The lie of a log that cannot be read at all, counted as the checks count theirs."""
    if count is not None:
        count("logs_parse", Outcome.FAIL)
    return Lie("logs_parse", what)


def _time_ms(number: int, raw: RawLog, schedule: Schedule | None, headers: Mapping[int, Header]) -> int:
    if schedule is not None:
        return schedule.time_ms(number)
    if (header := headers.get(number)) is not None:
        return header.time_ms
    if raw.block_timestamp is not None:
        return 1000 * quantity(raw.block_timestamp)
    raise KeyError(number)


def untimed(raws: Sequence[RawLog], schedule: Schedule | None) -> list[int]:
    """Blocks whose headers must be asked for, since neither a schedule nor the logs say their time."""
    if schedule is not None:
        return []
    return sorted({quantity(raw.block_number or "") for raw in raws if raw.block_timestamp is None})


async def headers_of(
    rpc: Rpc, numbers: Sequence[int], schedule: Schedule | None, count: Count | None = None
) -> list[Header]:
    """Verified headers at these heights, in order. Raises Unsettled where the node has none, Lie."""
    answers = await rpc.headers(numbers)
    headers = []
    for raw, number in zip(answers, numbers, strict=True):
        if raw is None:
            raise Unsettled(f"{rpc.name} does not know block {number}")
        headers.append(verify_header(raw, schedule, number, count=count))
    return headers


def checked(
    logs: Sequence[Log],
    low: int,
    high: int,
    addresses: Collection[bytes],
    held: Mapping[int, Header],
    count: Count | None,
) -> list[Log]:
    """The logs of an answer in chain order, each once, bound to the headers in `held`. Raises Lie."""
    return verify_logs(
        logs, from_block=low, to_block=high, addresses=frozenset(addresses), held=dict(held), count=count
    )
