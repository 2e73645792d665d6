"""Each provider's words on record, one by one: what they are taken for, under which name, and what is done next.

The words are those of facts/rpc_errors.md, a row each; where the sheet's recordings lie beside the checkout, none of them may be missing here.
What is done next is looked at where it happens: a range is read from an endpoint that answers so once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from eth_hash.auto import keccak

from indexer.chain.rpc_errors import (
    Asked,
    BatchTooLarge,
    BeyondHead,
    Kind,
    MethodMissing,
    PrunedHistory,
    RangeTooLarge,
    RateLimited,
    Refused,
    RpcError,
    TooManyAddresses,
    TooManyResults,
    UnknownBlock,
    Unreachable,
    error_for,
)
from indexer.chain.spans import LogRange, SpanLimits, Topics
from indexer.chain.wire import RawHeader, RawLog, RawReceipt
from indexer.model.types import Hash32
from tests.fake_node import FakeChain, rlp

RECORDED = Path(__file__).parents[3] / "shared/facts/real_rpc/errors/provider_errors.json"

WIDE = (1_000_000, 1_199_999)  # wider than every limit on record
ONE = (1_000_000, 1_000_000)
HALF = 100_000

# What follows: the next request's span in blocks, or
ADDRESSES = "addresses"  # the same range, half of the addresses
RECEIPTS = "receipts"  # the block's receipts
ELSEWHERE = "elsewhere"  # the error reaches whoever holds several endpoints, at once


class Row(NamedTuple):
    message: str
    code: int | None
    status: int | None
    kind: Kind
    error: type[RpcError]
    then: int | str
    asked: Asked = WIDE
    data: str = ""


def row(
    message: str,
    code: int | None,
    kind: Kind,
    error: type[RpcError],
    then: int | str = ELSEWHERE,
    *,
    status: int | None = None,
    asked: Asked = WIDE,
    data: str = "",
) -> Row:
    return Row(message, code, status, kind, error, then, asked, data)


def wide(message: str, code: int | None, then: int, **more: Any) -> Row:
    return row(message, code, Kind.RANGE, RangeTooLarge, then, **more)


def full(message: str, code: int | None, then: int | str = HALF, **more: Any) -> Row:
    return row(message, code, Kind.RESULTS, TooManyResults, then, **more)


DRPC = "ranges over 10000 blocks are not supported on free plan"
BRACKET = "Based on your parameters, this block range should work: "
RETH = "query exceeds max results 20000, retry with the range "
PAYLOAD = (
    '{"error_id":"4ed94073-0317-4648-a167-107fba5f44b3","payload":"range 9009594 is bigger than range limit 2000"}'
)
DEDICATED = "order a dedicated full node here: https://www.allnodes.com/eth/host"
UNITS = "Your app has exceeded its compute units per second capacity. If you have retries enabled, you can ignore this message."

SPANS = [
    wide("eth_getLogs is limited to a 2,000 range", -32614, 2_000),
    wide("block range too large", None, 2_000),
    wide("please limit the query to at most 1000 blocks", -32005, 1_000),
    row(
        "ranges over 10000 blocks are not supported on freetier",
        35,
        Kind.RANGE_OR_DEPTH,
        RangeTooLarge,
        10_000,
        status=400,
    ),
    row(DRPC, 35, Kind.RANGE_OR_DEPTH, RangeTooLarge, 10_000, status=400),
    *(
        row(DRPC, 35, Kind.DEPTH, PrunedHistory, status=400, asked=(1_000_000, 999_999 + span))
        for span in (9_000, 5_000, 2_000, 1_001)
    ),
    wide(
        "invalid params",
        -32602,
        1_000,
        asked=(0x3136000, 0x31363E8),
        data="Block range too large for public access: maximum 1000 blocks. Try with this block range [0x3136000, 0x31363e8], or u",
    ),
    wide("invalid params", -32602, 2_000, asked=(0, 9_009_593), data=PAYLOAD),
    wide("query exceeds max block range 5000", -32602, 5_000),
    wide("query exceeds max block range 100000", None, 100_000),
    wide("block range greater than 1000 max", -32602, 1_000, status=400),
    wide(
        f"Under the Free tier plan, you can make eth_getLogs requests with up to a 10 block range. {BRACKET}[0x1180fca, 0x1180fd3]. "
        "Upgrade to PAYG for expanded block range.",
        -32600,
        10,
        asked=(0x1180FCA, 0x11813FF),
    ),
    wide(
        f"You can make eth_getLogs requests with up to a 500 block range. {BRACKET}[0x1a30dfd, 0x1a30ff0]",
        -32600,
        500,
        status=400,
        asked=(0x1A30DFD, 0x1A30FF1),
    ),
    wide("range 1000000 exceeds limit of 10000", -32602, 10_000),
    wide("eth_getLogs is limited to a 10,000 range", -32614, 10_000, status=413),
    wide("eth_getLogs is limited to a 100 range", -32614, 100),
    wide("requested range too large", -32012, HALF),
    wide("exceed maximum block range: 50000", -32701, 50_000),
    wide("block range is too wide", -32600, 3_000),
    wide("maximum [from, to] blocks distance: 10000", -32000, 10_000),
    wide("eth_getLogs is limited to a 1000 blocks range", -32000, 1_000),
    wide("eth_getLogs is limited to 1024 block range", -32602, 1_024),
    wide("Maximum allowed number of requested blocks is 1000", -32005, 1_000),
    wide("Invalid eth_getLogs request. 'fromBlock'-'toBlock' range too large. Max range: 800", -32047, 800),
    wide("Block range limit exceeded.", -32602, HALF),
    wide("eth_getLogs range is too large, max is 1k blocks", None, 1_000),
    wide("exceeds the range allowed for your plan (5000 > 3000)", None, 3_000),
    wide("block range is larger than max block range, block range = 5120, max block range = 5000", -32000, 5_000),
    wide("block range too large (2000), maximum allowed is 1000 blocks", None, 1_000),
    wide("exceed maximum block range: 5000", -32000, 5_000),
    wide("Block range is too large", None, HALF),
    # a limit that the request keeps, and one block that is too many: not the range
    row("eth_getLogs is limited to a 2,000 range", -32614, Kind.DEPTH, PrunedHistory, asked=(1_000_000, 1_000_999)),
    row("logs are limited to a 10000 block range", -32602, Kind.UNSUPPORTED, MethodMissing, asked="by hash"),
    row("limit exceeded", -32005, Kind.UNSUPPORTED, MethodMissing, asked=ONE),
    row("Block range is too large", None, Kind.RANGE, RangeTooLarge, asked=ONE),
]

RESULTS = [
    full(f"{RETH}25766988-25775072", -32602, 4_042, asked=(25766988, 25775072)),  # the refused range itself: halved
    full(f"{RETH}6000000-6000509", -32602, 510, asked=(6_000_000, 6_004_999)),
    full(f"{RETH}54325373-54326275", -32602, 903, asked=(54325373, 54327372)),
    full(f"{RETH}1199999-1000000", -32602),  # inverted
    full(f"{RETH}900000-1000100", -32602),  # begins before what was asked
    full(
        "Log response size exceeded. You can make eth_getLogs requests with up to a 2K block range and no limit on the response size, or you "
        f"can request any block range with a cap of 10K logs in the response. {BRACKET[:24]} and the response size limit, this block range "
        "should work: [0x0, 0xd043b8]",
        -32602,
        0xD043B9,
        asked=(0, 20_000_000),
    ),
    full(
        "query returned more than 10000 results. Try with this block range [0xBDE5F8, 0x102DBCC].",
        -32005,
        0x102DBCC - 0xBDE5F8 + 1,
        asked=(0xBDE5F8, 0x102DBCD),
        data='{"from":"0xBDE5F8","limit":10000,"to":"0x102DBCC"}',
    ),
    full("query returned more than 1000 results", -32005),
    full(
        "Query returned more than 10000 results. Try with this block range [0x118dc91, 0x1198cc3].",
        -32602,
        0x1198CC3 - 0x118DC91 + 1,
        asked=(0x118DC91, 0x1199FE0),
    ),
    full("More than 50000 logs returned", None),
    full("limit exceeded", -32005),
    row(
        "Response is too big",
        None,
        Kind.RESPONSE_SIZE,
        TooManyResults,
        HALF,
        data="Exceeded max limit of 167772160",
    ),
    row("backend response too large", -32020, Kind.RESPONSE_SIZE, TooManyResults, HALF, status=500),
    # one block holds too much: receipts, whatever the words
    full("query returned more than 10000 results", -32005, RECEIPTS, asked=ONE),
    full(f"{RETH}1000000-1000000", -32602, RECEIPTS, asked=ONE),
    full("More than 50000 logs returned", None, RECEIPTS, asked=ONE),
    row("Response is too big", None, Kind.RESPONSE_SIZE, TooManyResults, RECEIPTS, asked=ONE),
    row("backend response too large", -32020, Kind.RESPONSE_SIZE, TooManyResults, RECEIPTS, status=500, asked=ONE),
]

FILTERS = [
    row(
        "exceed max addresses or topics per search position", None, Kind.TOO_MANY_ADDRESSES, TooManyAddresses, ADDRESSES
    ),
    row(
        "This query contains 5006 filters. The current limit is 5000.",
        None,
        Kind.TOO_MANY_ADDRESSES,
        TooManyAddresses,
        ADDRESSES,
    ),
    row("Please, specify less number of addresses", None, Kind.TOO_MANY_ADDRESSES, TooManyAddresses, ADDRESSES),
    row(
        f"Please specify an address in your request or, to remove restrictions, {DEDICATED}",
        -32701,
        Kind.NEEDS_ADDRESS,
        Refused,
    ),
    row("Request is too big", -32701, Kind.CALLER_BUG, Refused, data="Exceeded max limit of 10485760"),
    row("request body too large", -32021, Kind.CALLER_BUG, Refused, status=413),
    row("invalid block range params", -32602, Kind.CALLER_BUG, Refused),
]

HISTORY = [
    row(
        "Archive requests require a personal token. Get one at: https://www.allnodes.com/publicnode",
        -32602,
        Kind.DEPTH,
        PrunedHistory,
    ),
    row(
        f"History has been pruned for this block. To remove restrictions, {DEDICATED}",
        -32701,
        Kind.DEPTH,
        PrunedHistory,
    ),
    row("pruned history unavailable: requested 1000, earliest available 20000000", 4444, Kind.DEPTH, PrunedHistory),
    row("missing trie node 8b1604e0d19d9be9 (path )", -32000, Kind.STATE_MISSING, PrunedHistory, asked=None),
    row(
        "required historical state unavailable (reexec=128)",
        -32000,
        Kind.STATE_MISSING,
        PrunedHistory,
        asked=None,
    ),
    row("Unknown state. First available state is 1", 27, Kind.STATE_MISSING, PrunedHistory, asked=None),
    row("rpc method is not whitelisted", -32601, Kind.UNSUPPORTED, MethodMissing, status=403),
]

LIMITS = [
    row("over rate limit", -32016, Kind.RATE_LIMIT, RateLimited, status=429),
    row("over rate limit", -32016, Kind.RATE_LIMIT, RateLimited, status=200),
    row("backend is over capacity", -32012, Kind.RATE_LIMIT, RateLimited, status=429),
    row("sender is over rate limit", -32017, Kind.RATE_LIMIT, RateLimited, status=429),
    row("too many requests", -32024, Kind.RATE_LIMIT, RateLimited, status=429),
    row(
        "You reached Public endpoint rate limit, please upgrade to paid plan",
        15,
        Kind.RATE_LIMIT,
        RateLimited,
        status=429,
    ),
    row(UNITS, 429, Kind.RATE_LIMIT, RateLimited, status=429),
    row("credits limited to 6000/sec", -32012, Kind.RATE_LIMIT, RateLimited),
    row("rate limit exceeded", -32005, Kind.RATE_LIMIT, RateLimited, status=200),
    row("", None, Kind.RATE_LIMIT, RateLimited, status=429),
    row("too many RPC calls in batch request", -32014, Kind.BATCH_TOO_LARGE, BatchTooLarge, status=413),
    row("", None, Kind.DENIED, Refused, status=402),
    row("", None, Kind.DENIED, Refused, status=403),
]

OVERLOAD = [
    row(
        "no backend is currently healthy to serve traffic",
        -32011,
        Kind.UNAVAILABLE_OR_RANGE,
        Unreachable,
        HALF,  # said of wide ranges on Base: halved twice, then it is the gateway
        status=503,
    ),
    row("no backend is currently healthy to serve traffic", -32011, Kind.UNAVAILABLE_OR_RANGE, Unreachable, asked=ONE),
    row("backend offline", -32010, Kind.UNAVAILABLE, Unreachable, status=503),
    row("backend is currently not healthy to serve traffic", -32018, Kind.UNAVAILABLE, Unreachable, status=503),
    row("backend returned an invalid response", -32013, Kind.TRANSIENT, Unreachable, status=500),
    row("Temporary internal error. Please retry, trace-id: 209ae775", 19, Kind.TRANSIENT, Unreachable, status=500),
    row("gateway timeout", -32015, Kind.TIMEOUT, Unreachable, HALF, status=504),
    row("gateway timeout", -32015, Kind.TIMEOUT, Unreachable, status=504, asked=ONE),
    row(
        "Request timeout on the free plan, please upgrade to paid plan",
        30,
        Kind.TIMEOUT,
        Unreachable,
        HALF,
        status=408,
    ),
    row(
        "Request timeout on the free tier, please upgrade your tier to the paid one",
        30,
        Kind.TIMEOUT,
        Unreachable,
        HALF,
        status=408,
    ),
    row("execution aborted (timeout = 5s)", -32000, Kind.TIMEOUT, Unreachable, HALF),
    row("", None, Kind.UNAVAILABLE, Unreachable, status=521),
    row("", None, Kind.UNAVAILABLE, Unreachable, status=525),
    row("", None, Kind.TIMEOUT, Unreachable, HALF, status=522),
]

HEADS = [
    row("header not found", -32000, Kind.BLOCK_NOT_FOUND, UnknownBlock, asked=None),
    row("block not found: 0x1770b2b", -32001, Kind.BLOCK_NOT_FOUND, UnknownBlock, asked=None),
    row("Unknown block", 26, Kind.BLOCK_NOT_FOUND, UnknownBlock, asked=None),
    row("Unknown block number", -32602, Kind.BLOCK_NOT_FOUND, UnknownBlock, asked=None),
    row("24578859 could not be found", -32000, Kind.BLOCK_NOT_FOUND, UnknownBlock, asked=None),
    row("28392580 could not be found", -32001, Kind.BLOCK_NOT_FOUND, UnknownBlock, asked=ONE),
    row("block 36077340 not found", -32000, Kind.BLOCK_NOT_FOUND, UnknownBlock),
    row("block range extends beyond current head block", -32602, Kind.BEYOND_HEAD, BeyondHead),
    row(
        "block range extends beyond current head block: requested 120, head 100",
        -32602,
        Kind.BEYOND_HEAD,
        BeyondHead,
    ),
    row("finalized block not found", -32000, Kind.FINALITY_UNKNOWN, UnknownBlock, asked=None),
    row("safe block not found", -32000, Kind.FINALITY_UNKNOWN, UnknownBlock, asked=None),
    row("Unknown block", -39001, Kind.FINALITY_UNKNOWN, UnknownBlock, asked=None),
    row(
        'block "finalized" not available (head block: 21459236)',
        None,
        Kind.FINALITY_UNKNOWN,
        UnknownBlock,
        asked=None,
    ),
    row("block not found: finalized", -32001, Kind.FINALITY_UNKNOWN, UnknownBlock, asked=None),
]

ROWS = [*SPANS, *RESULTS, *FILTERS, *HISTORY, *LIMITS, *OVERLOAD, *HEADS]


def _title(row: Row) -> str:
    span = row.asked[1] - row.asked[0] + 1 if isinstance(row.asked, tuple) else row.asked
    return f"{row.message[:40] or row.data[:40]} {row.code} {row.status} {span}"


every = pytest.mark.parametrize("row", ROWS, ids=_title)


def _error(row: Row) -> RpcError:
    return error_for(
        row.message,
        row.data,
        row.code,
        row.status,
        endpoint="node",
        method="eth_getLogs",
        params="",
        asked=row.asked,
    )


@every
def test_it_is_taken_for_what_it_is(row: Row) -> None:
    error = _error(row)
    assert (error.kind, type(error)) == (row.kind, row.error)


@every
def test_the_message_is_enough_where_it_says_anything(row: Row) -> None:
    """Code and status are looked at last: without them, words that mean one thing mean the same."""
    if row.message.strip(".").lower() in ("", "unknown block", "limit exceeded", "invalid params"):
        assert row.code is not None or row.status is not None or row.data
        return
    assert _error(row._replace(code=None, status=None)).kind == row.kind
    assert _error(row._replace(code=-32602, status=400)).kind == row.kind


class Endpoint:
    """Refuses once, in the row's words, and answers everything after that."""

    name = "node"

    def __init__(self, refusal: RpcError) -> None:
        self._refusal: RpcError | None = refusal
        self.asked: list[tuple[int, int]] = []  # addresses, blocks

    async def logs(
        self, addresses: Sequence[bytes], first: int, last: int, topics: Topics | None = None
    ) -> list[RawLog]:
        self.asked.append((len(addresses), last - first + 1))
        refusal, self._refusal = self._refusal, None
        if refusal is not None:
            raise refusal
        return []

    async def logs_beside(
        self, addresses: Sequence[bytes], first: int, last: int, topics: Topics | None, number: int
    ) -> tuple[list[RawLog], RawHeader | None]:
        return await self.logs(addresses, first, last, topics), None

    async def header(self, at: int) -> RawHeader | None:
        chain = FakeChain()
        chain.head.number = at
        chain.head.hash = keccak(rlp(list(chain._fields(chain.head).values())))
        return msgspec.convert(chain.header(chain.head), RawHeader)

    async def receipts(self, block_hash: Hash32) -> list[RawReceipt] | None:
        self.asked.append((0, 1))
        return []


@every
async def test_and_this_is_done_next(row: Row) -> None:
    if not isinstance(row.asked, tuple):
        assert row.then == ELSEWHERE
        return
    low, high = row.asked
    endpoint = Endpoint(_error(row))
    addresses = [bytes([n]) * 20 for n in range(8)]
    parts = aiter(LogRange(endpoint, SpanLimits(), addresses, low, high))
    if row.kind is Kind.RATE_LIMIT:  # the same again: the transport keeps the pace that it wants
        await anext(parts)
        assert endpoint.asked == [(8, high - low + 1)] * 2
        return
    if row.then == ELSEWHERE:
        with pytest.raises(row.error):
            await anext(parts)
        assert endpoint.asked == [(8, high - low + 1)]
        return
    part = await anext(parts)
    assert part.from_block == low
    following = {RECEIPTS: (0, 1), ADDRESSES: (4, high - low + 1)}.get(str(row.then), (8, row.then))
    assert endpoint.asked[1] == following


def _shape(message: str, data: str) -> str:
    """What is left of the words without this one request's numbers, hashes and links."""
    text = f"{message} {data}" if message == "invalid params" else message
    return re.sub(r"0x[0-9a-f]+|\d[\d,.]*|[0-9a-f]{8,}|https?://\S+|\s", "#", text.lower())[:48]


@pytest.mark.skipif(not RECORDED.exists(), reason=f"NO RECORDED ERRORS: {RECORDED} is absent")
def test_no_recorded_words_are_missing_here() -> None:
    here = {_shape(row.message, row.data) for row in ROWS}
    missing = []
    for entry in json.loads(RECORDED.read_text())["errors"]:
        data = entry.get("data", "")
        text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
        if _shape(entry["message"], text) not in here:
            missing.append(entry["id"])
    assert not missing
