"""Every provider error on record is read as the facts say, and none can send the range splitter into a loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from indexer.chain.rpc_errors import (
    Asked,
    BatchTooLarge,
    Kind,
    MethodMissing,
    PrunedHistory,
    RangeTooLarge,
    RateLimited,
    Refused,
    TooManyResults,
    Unreachable,
    classify,
    clean,
    error_for,
)

RECORDED = Path(__file__).parents[3] / "shared/facts/real_rpc/errors/provider_errors.json"
ENTRIES: list[dict[str, Any]] = json.loads(RECORDED.read_text())["errors"] if RECORDED.exists() else []


def _asked(entry: dict[str, Any]) -> Asked:
    request = entry.get("request", {})
    if "blockHash" in request:
        return "by hash"
    if "fromBlock" not in request:
        return None
    first, last = (int(str(request[key]), 0) for key in ("fromBlock", "toBlock"))
    return first, last


def _data(entry: dict[str, Any]) -> str:
    data = entry.get("data", "")
    return data if isinstance(data, str) else json.dumps(data)


def test_the_recorded_errors_are_there() -> None:
    if not ENTRIES:
        pytest.skip(f"NOT TESTED: no recorded provider errors at {RECORDED}")
    assert len(ENTRIES) == 91


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["id"])
def test_recorded_error_is_read_as_the_facts_say(entry: dict[str, Any]) -> None:
    found = classify(entry["message"], _data(entry), entry["code"], entry["http_status"], _asked(entry))
    assert found.kind == entry["class"]
    derive = entry.get("derive", {"kind": "halve"})
    if derive["kind"] == "halve":
        assert found.suggestion is None
    elif derive["kind"] == "max_blocks":
        assert found.suggestion is not None
        assert found.suggestion.span == derive["value"]
        assert found.suggestion.firm
    else:
        assert found.suggestion is not None
        assert found.suggestion.first == int(derive["from"], 16)
        assert found.suggestion.last == int(derive["to"], 16)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["id"])
@pytest.mark.parametrize("span", [1, 2, 7, 1000, 1001, 100_000])
def test_a_suggestion_is_always_a_step_forward(entry: dict[str, Any], span: int) -> None:
    asked = (0x3136000, 0x3136000 + span - 1)
    found = classify(entry["message"], _data(entry), entry["code"], entry["http_status"], asked)
    if found.suggestion is not None:
        assert 1 <= found.suggestion.span < span


@pytest.mark.parametrize(
    ("message", "asked"),
    [
        ("query exceeds max results 20000, retry with the range 6000509-6000000", (6000000, 6001000)),  # inverted
        ("query exceeds max results 20000, retry with the range 6000000-6001000", (6000000, 6001000)),  # itself
        ("query exceeds max results 20000, retry with the range 6000000-6002000", (6000000, 6001000)),  # larger
        ("query exceeds max results 20000, retry with the range 6000100-6000500", (6000000, 6001000)),  # not a prefix
        ("query exceeds max results 20000, retry with the range 5999000-6000500", (6000000, 6001000)),
    ],
)
def test_a_suggestion_that_is_no_strict_prefix_is_ignored(message: str, asked: tuple[int, int]) -> None:
    found = classify(message, code=-32602, asked=asked)
    assert (found.kind, found.suggestion) == (Kind.RESULTS, None)


def test_a_limit_that_the_request_kept_means_depth() -> None:
    found = classify("eth_getLogs is limited to a 2,000 range", code=-32614, asked=(100, 1099))
    assert found.kind is Kind.DEPTH


@pytest.mark.parametrize("span", [9_000, 5_000, 2_000, 1_001])
def test_drpc_speaks_of_ranges_and_means_depth(span: int) -> None:
    said = "ranges over 10000 blocks are not supported on free plan"
    assert classify(said, code=35, status=400, asked=(0, span - 1)).kind is Kind.DEPTH


def test_drpc_means_the_range_when_it_was_larger() -> None:
    said = "ranges over 10000 blocks are not supported on free plan"
    found = classify(said, code=35, status=400, asked=(0, 49_999))
    assert found.suggestion is not None
    assert found.suggestion.span == 10_000


def _error(message: str, code: int | None = None, status: int | None = None, asked: Asked = None) -> Exception:
    return error_for(message, "", code, status, endpoint="node", method="eth_getLogs", params="", asked=asked)


def test_each_error_has_the_class_that_says_what_to_do() -> None:
    assert isinstance(_error("over rate limit", -32016, 200), RateLimited)
    assert isinstance(_error("eth_getLogs is limited to a 10,000 range", -32614, 413), RangeTooLarge)
    assert isinstance(_error("Response is too big"), TooManyResults)
    assert isinstance(_error("logs are limited to a 10000 block range", -32602, asked="by hash"), MethodMissing)
    assert isinstance(_error("Archive requests require a personal token.", -32602), PrunedHistory)
    assert isinstance(_error("Request timeout on the free plan, please upgrade to paid plan", 30, 408), Unreachable)
    assert isinstance(_error("too many RPC calls in batch request", -32014, 413), BatchTooLarge)
    assert isinstance(_error("invalid block range params", -32602), Refused)
    assert isinstance(_error("", None, 402), Refused)
    assert _error("monthly quota exceeded", -32000, 402).kind is Kind.DENIED  # waiting does not pay the bill
    assert _error("monthly quota exceeded", -32000, 200).kind is Kind.RATE_LIMIT
    assert isinstance(_error("", None, 503), Unreachable)
    assert isinstance(_error("something new", -32000), Refused)


def test_a_message_for_people_names_the_host_the_call_and_the_way_out_but_no_key() -> None:
    error = error_for(
        "over rate limit, see https://user:pw@base.example/v2/SECRETKEY?token=SECRET\nnext line",
        "",
        -32016,
        429,
        endpoint="base.example",
        method="eth_getLogs",
        params="blocks 1 to 9, 3 addresses",
        retry_after=7,
    )
    said = str(error)
    assert "SECRET" not in said
    assert "pw" not in said
    assert "\n" not in said
    for part in ("base.example", "eth_getLogs", "blocks 1 to 9", "HTTP 429", "requests_per_second", "7 s"):
        assert part in said


def test_long_words_of_a_node_are_shortened() -> None:
    assert len(clean("x" * 100_000)) == 240
