"""The JSON-RPC client against a node on real sockets: true answers, every lie of the transport, every limit."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest

from indexer.chain import rpc as endpoint
from indexer.chain.heads import HeadStream, Silent
from indexer.chain.rpc_errors import (
    BadAnswer,
    BeyondHead,
    Kind,
    MethodMissing,
    RangeTooLarge,
    RateLimited,
    Refused,
    RpcError,
    TooManyResults,
    UnknownBlock,
    Unreachable,
)
from indexer.chain.runtime import counting_requests
from indexer.chain.spans import Learned
from indexer.model.types import Hash32
from indexer.telemetry import Metrics
from tests.fake_node import FakeChain, FakeNode


class Rpc(endpoint.Rpc):
    """Counts what it meets as the daemon does."""

    def __init__(self, url: str, **how: Any) -> None:
        super().__init__(url, **{"observe": counting_requests(Metrics())} | how)


FACTORY = b"\x11" * 20
HUB = b"\x22" * 20
TOPIC = b"\x33" * 32
OTHER = b"\x44" * 32


def log(index: int = 0, address: bytes = FACTORY, topic: bytes = TOPIC) -> tuple[bytes, list[bytes], bytes]:
    return address, [topic, index.to_bytes(32, "big")], index.to_bytes(32, "big") * 3


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        await asyncio.sleep(0.01)


@contextmanager
def raises(kind: type[RpcError], why: Kind | None = None) -> Iterator[pytest.ExceptionInfo[RpcError]]:
    with pytest.raises(kind) as caught:
        yield caught
    assert type(caught.value) is kind
    if why is not None:
        assert caught.value.kind is why


# ── questions and answers ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_node_is_asked_for_all_that_following_needs() -> None:
    async with FakeNode(chain_id=84532) as node, Rpc(node.url) as rpc:
        node.mine([log(1), [log(2), log(3, HUB)]], blocks=5)
        node.set_tags(safe=3, finalized=2)
        assert await rpc.chain_id() == 84532
        assert await rpc.genesis_hash() == node.chain.canonical[0].hash
        head = await rpc.header("latest")
        assert head is not None and head.number == "0x5"
        assert head.hash == "0x" + node.chain.head.hash.hex()
        for tag, number in (("safe", "0x3"), ("finalized", "0x2")):
            found = await rpc.header(tag)  # type: ignore[arg-type]
            assert found is not None and found.number == number
        by_hash = await rpc.header(Hash32(node.chain.canonical[1].hash))
        assert by_hash is not None and by_hash.number == "0x1"
        assert await rpc.header(6) is None
        assert await rpc.header(Hash32(b"\x01" * 32)) is None
        assert [each and each.number for each in await rpc.headers([4, 2, 9])] == ["0x4", "0x2", None]
        assert len(await rpc.logs([FACTORY, HUB], 0, 5)) == 3
        assert len(await rpc.logs([HUB], 0, 5)) == 1
        assert await rpc.logs([FACTORY], 0, 5, [OTHER]) == []
        assert len(await rpc.logs([FACTORY], 0, 5, [[OTHER, TOPIC], (1).to_bytes(32, "big")])) == 1
        block = Hash32(node.chain.canonical[1].hash)
        assert len(await rpc.logs_of(block, [FACTORY])) == 2
        receipts = await rpc.receipts(block)
        assert receipts is not None and [len(each.logs) for each in receipts] == [1, 2]
        assert await rpc.receipts(Hash32(b"\x01" * 32)) is None
        with raises(UnknownBlock):
            await rpc.logs_of(Hash32(b"\x01" * 32), [FACTORY])
        node.chain.code[FACTORY] = 3
        assert not await rpc.has_code(FACTORY, 2)
        assert await rpc.has_code(FACTORY, "latest")


async def test_reorganised_blocks_are_still_known_by_hash() -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        node.mine(blocks=5)
        old = node.chain.head
        node.reorganise(3, [[log(1)], []])
        head = await rpc.header("latest")
        assert head is not None and head.number == "0x4"
        orphan = await rpc.header(Hash32(old.parent_hash))
        assert orphan is not None and orphan.number == "0x4" and orphan.hash != head.hash


async def test_polling_takes_one_request() -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        node.mine([log(1)], blocks=10)
        found = await rpc.poll(0, 8, [FACTORY])
        assert node.requests == 1
        assert found.latest.number == "0xa"
        assert found.cursor is not None and found.cursor.number == "0x0"
        assert found.end is not None and found.end.number == "0x8"
        assert len(found.logs) == 1


@pytest.mark.parametrize("answer", ["empty", "error"])
async def test_polling_beyond_the_head_brings_no_end_and_no_logs(answer: str) -> None:
    async with FakeNode(beyond_head=answer) as node, Rpc(node.url) as rpc:
        node.mine([log(1)], blocks=3)
        found = await rpc.poll(0, 8, [FACTORY])
        assert found.end is None
        assert found.logs == []


@pytest.mark.parametrize("missing", ["null", "-32000", "-32001", "-39001"])
async def test_a_node_without_finality_answers_none(missing: str) -> None:
    async with FakeNode(missing_tag=missing) as node, Rpc(node.url) as rpc:
        node.set_tags(safe=None, finalized=None)
        assert await rpc.header("safe") is None
        assert await rpc.header("finalized") is None


async def test_a_node_that_does_not_know_the_tag_answers_none() -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        node.fail("eth_getBlockByNumber", -32602, "invalid argument 0: hex string without 0x prefix")
        assert await rpc.header("safe") is None


async def test_a_sick_node_is_not_a_node_without_finality() -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        node.fail("eth_getBlockByNumber", -32011, "no backend is currently healthy to serve traffic", status=503)
        with raises(Unreachable):
            await rpc.header("safe")


async def test_logs_of_everybody_are_never_asked_for() -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        with pytest.raises(ValueError, match="everybody"):
            await rpc.logs([], 0, 1)
        with pytest.raises(ValueError, match="not a range"):
            await rpc.logs([FACTORY], 2, 1)
        assert node.requests == 0


async def test_missing_methods_are_told_from_refusals() -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        node.fail("eth_getBlockReceipts", -32601, "rpc method is not whitelisted", status=403)
        with raises(MethodMissing):
            await rpc.receipts(Hash32(node.chain.head.hash))


# ── answers that are not to the question ──────────────────────────────────────────────────────────────────────────────


async def test_an_answer_to_another_request_is_thrown_away() -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        node.reply("eth_chainId", '{"jsonrpc":"2.0","id":99999,"result":"0x1"}')
        with raises(BadAnswer) as caught:
            await rpc.chain_id()
        assert "another request" in str(caught.value)


async def test_another_block_than_the_one_asked_for_is_thrown_away() -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        node.mine(blocks=3)
        node.lie("eth_getBlockByNumber", lambda _, block: block | {"number": "0x1"})
        with raises(BadAnswer):
            await rpc.header(2)
        node.lie("eth_getBlockByHash", lambda _, block: block | {"hash": "0x" + "00" * 32})
        with raises(BadAnswer):
            await rpc.header(Hash32(node.chain.head.hash))


@pytest.mark.parametrize(
    "body",
    [
        '{"jsonrpc":"2.0","id":1}',
        '{"jsonrpc":"2.0","id":1,"result":null}',
        '{"jsonrpc":"2.0","id":1,"result":{"no":"list"}}',
        '{"jsonrpc":"2.0","id":1,"result":[{"address":"0x"}]}',
        '{"jsonrpc":"2.0","id":1,"result":[1]}',
        '{"jsonrpc":"2.0","id":null,"result":[]}',
        "[]",
        '{"jsonrpc":"2.0","id":1,"result":[7,{}]}',
        "7",
        "null",
    ],
)
async def test_json_of_the_wrong_shape_is_a_bad_answer(body: str) -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        node.reply("eth_getLogs", body)
        with raises(BadAnswer):
            await rpc.logs([FACTORY], 0, 1)


# ── transport ─────────────────────────────────────────────────────────────────────────────────────────────────────────

Inject = Callable[[FakeNode], Any]


@pytest.mark.parametrize(
    ("inject", "why"),
    [
        (lambda node: node.hang("eth_chainId"), Kind.TIMEOUT),
        (lambda node: node.drip("eth_chainId"), Kind.TIMEOUT),
        (lambda node: node.reset("eth_chainId"), Kind.UNREACHABLE),
        (lambda node: node.bad_gzip("eth_chainId"), Kind.UNREACHABLE),
        (lambda node: node.truncate("eth_chainId"), Kind.NOT_JSON),
        (lambda node: node.reply("eth_chainId", ""), Kind.NOT_JSON),
        (lambda node: node.reply("eth_chainId", "<html>Just a moment…</html>"), Kind.NOT_JSON),
        (lambda node: node.reply("eth_chainId", "<html>no such page</html>", status=404), Kind.NOT_JSON),
        (lambda node: node.reply("eth_chainId", "<!DOCTYPE html>", status=521), Kind.UNAVAILABLE),
        (lambda node: node.reply("eth_chainId", "<html>Bad gateway</html>", status=502), Kind.UNAVAILABLE),
        (lambda node: node.reply("eth_chainId", "", status=504), Kind.TIMEOUT),
        (lambda node: node.fail("eth_chainId", -32015, "gateway timeout", status=504), Kind.TIMEOUT),
        (lambda node: node.reply("eth_chainId", b"\xff\xfe\x00"), Kind.NOT_JSON),
        (lambda node: node.reply("eth_chainId", "[" * 1_000_000), Kind.NOT_JSON),
    ],
    ids=[
        *("hang", "slow drip", "reset", "broken gzip", "truncated", "empty", "html 200", "html 404", "html 521"),
        *("html 502", "empty 504", "json 504", "bytes", "nested"),
    ],
)
async def test_a_sick_transport_is_unreachable_and_gets_well(inject: Inject, why: Kind) -> None:
    async with FakeNode() as node, Rpc(node.url, timeout=2.0) as rpc:  # a busy machine answers within it
        inject(node)
        with raises(Unreachable, why):
            await rpc.chain_id()
        assert await rpc.chain_id() == 84532


async def test_a_compressed_answer_is_read() -> None:
    async with FakeNode(gzip=True) as node, Rpc(node.url) as rpc:
        node.mine([log(i) for i in range(50)])
        assert len(await rpc.logs([FACTORY], 0, 1)) == 50


async def test_a_node_that_went_away_and_came_back_is_reached_again() -> None:
    async with FakeNode() as node, Rpc(node.url, timeout=2) as rpc:
        assert await rpc.chain_id() == 84532
        await node.stop()
        with raises(Unreachable) as caught:
            await rpc.chain_id()
        assert "refused" in str(caught.value).lower()
        await node.start()
        assert await rpc.chain_id() == 84532


@pytest.mark.parametrize("announce", [False, True])
async def test_a_body_of_200_mb_is_refused_without_being_read(announce: bool) -> None:
    async with FakeNode() as node, Rpc(node.url, max_body=2**20) as rpc:
        node.flood("eth_getBlockReceipts", total=200 * 2**20, announce=announce)
        with raises(BadAnswer, Kind.RESPONSE_SIZE):
            await rpc.receipts(Hash32(node.chain.head.hash))
        assert node.flooded < 20 * 2**20  # what fits into the sockets' buffers, and no more
        assert await rpc.chain_id() == 84532


async def test_too_large_a_body_of_logs_asks_for_a_smaller_range() -> None:
    async with FakeNode() as node, Rpc(node.url, max_body=2**20) as rpc:
        node.flood("eth_getLogs", total=2**22)
        with raises(TooManyResults, Kind.RESPONSE_SIZE):
            await rpc.logs([FACTORY], 0, 0)


async def test_a_compressed_bomb_counts_in_its_full_size() -> None:
    async with FakeNode() as node, Rpc(node.url, max_body=2**20) as rpc:
        node.reply("eth_chainId", gzip.compress(b" " * 2**25), headers={"Content-Encoding": "gzip"})
        with raises(BadAnswer, Kind.RESPONSE_SIZE):
            await rpc.chain_id()


async def test_redirects_are_refused() -> None:
    async with FakeNode() as node, FakeNode() as elsewhere, Rpc(node.url) as rpc:
        node.reply("eth_chainId", "", status=307, headers={"Location": elsewhere.url})
        with raises(Refused, Kind.REDIRECT) as caught:
            await rpc.chain_id()
        assert "edirect" in str(caught.value)
        assert elsewhere.requests == 0


async def test_a_proxy_of_the_environment_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    async with FakeNode() as node, Rpc(node.url) as rpc:
        assert await rpc.chain_id() == 84532


async def test_no_error_shows_the_key_in_the_url() -> None:
    async def every_way_to_fail(node: FakeNode, rpc: Rpc) -> list[RpcError]:
        errors: list[RpcError] = []
        for inject in (
            lambda: node.reply("eth_chainId", "<html>"),
            lambda: node.reply("eth_chainId", "", status=403),
            lambda: node.reply("eth_chainId", "", status=302, headers={"Location": "/SECRET"}),
            lambda: node.reset("eth_chainId"),
            lambda: node.hang("eth_chainId"),
            lambda: node.fail("eth_chainId", -32000, f"no route {url} here"),
            lambda: node.bad_gzip("eth_chainId"),
        ):
            inject()
            with pytest.raises(RpcError) as caught:
                await rpc.chain_id()
            errors.append(caught.value)
        return errors

    async with FakeNode() as node:
        url = f"http://SECRETUSER:SECRETWORD@127.0.0.1:{node.port}/v2/SECRETPATH?apikey=SECRETQUERY"
        async with Rpc(url, timeout=2) as rpc:
            errors = await every_way_to_fail(node, rpc)
            await node.stop()
            with pytest.raises(RpcError) as caught:
                await rpc.chain_id()
            errors.append(caught.value)
            assert "SECRET" not in repr(rpc)
    for error in errors:
        chain: BaseException | None = error
        while chain is not None and not chain.__suppress_context__:
            assert "SECRET" not in f"{chain} {chain!r}"
            chain = chain.__context__
        assert "SECRET" not in f"{error} {error!r}"
        assert f"127.0.0.1:{node.port}" in str(error)


async def test_an_untrusted_certificate_is_refused(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("NOT TESTED: no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=127.0.0.1 -days 2"
    made = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, *request.split(), *made], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.read(1))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    async with server, Rpc(f"https://127.0.0.1:{port}/SECRET") as rpc:
        with raises(Unreachable) as caught:
            await rpc.chain_id()
        assert "certificate" in str(caught.value) and "SECRET" not in str(caught.value)
    assert not any(asked)


async def test_a_name_that_does_not_resolve_is_unreachable() -> None:
    async with Rpc("http://node.invalid/KEY") as rpc:
        with raises(Unreachable) as caught:
            await rpc.chain_id()
        assert "node.invalid" in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://host/SECRET", "SECRET", "http://:SECRET@/x", "http://[SECRET"])
def test_a_useless_url_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ValueError) as caught:
        Rpc(url)
    assert "SECRET" not in str(caught.value)


# ── rate limits and pace ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_rate_limit_under_status_200_is_a_rate_limit() -> None:
    async with FakeNode() as node, Rpc(node.url, timeout=0.8) as rpc:
        node.fail("eth_chainId", -32016, "over rate limit")
        with raises(RateLimited):
            await rpc.chain_id()
        # a second of quiet is longer than the patience for one call: it is refused at home
        with raises(RateLimited):
            await rpc.chain_id()
        assert node.requests == 1


@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_retry_after_is_read_in_both_its_forms(form: str) -> None:
    now = datetime.now(UTC)
    later = "120" if form == "seconds" else format_datetime(now + timedelta(seconds=120), usegmt=True)
    headers = {"Retry-After": later, "Date": format_datetime(now, usegmt=True)}
    async with FakeNode() as node, Rpc(node.url) as rpc:
        node.reply("eth_chainId", "<html>slow down</html>", status=429, headers=headers)
        with raises(RateLimited) as caught:
            await rpc.chain_id()
        assert caught.value.retry_after == 120
        with raises(RateLimited) as again:
            await rpc.chain_id()
        assert again.value.retry_after is not None and again.value.retry_after > 100
        assert node.requests == 1


async def test_a_short_quiet_is_waited_out() -> None:
    async with FakeNode() as node, Rpc(node.url, timeout=5, rng=Random(1)) as rpc:
        node.reply("eth_chainId", "{}", status=429, headers={"Retry-After": "0.2"})
        with raises(RateLimited):
            await rpc.chain_id()
        started = time.monotonic()
        assert await rpc.chain_id() == 84532
        assert time.monotonic() - started > 0.15


async def test_a_rate_limit_in_a_batch_is_one_of_the_whole_batch() -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        node.fail("eth_getBlockByNumber", -32012, "credits limited to 6000/sec", times=None)
        with raises(RateLimited):
            await rpc.headers([0] * 50)
        node.heal()
        started = time.monotonic()  # fifty refusals in one answer are one refusal
        assert await rpc.chain_id() == 84532
        assert time.monotonic() - started < 10


async def test_the_pace_counts_the_items_of_a_batch() -> None:
    async with FakeNode() as node, Rpc(node.url, requests_per_second=20) as rpc:
        started = time.monotonic()
        await rpc.headers([0] * 20)
        await rpc.headers([0] * 8)
        assert 0.3 < time.monotonic() - started < 30


async def test_a_range_is_read_at_the_pace_that_the_node_lets_through() -> None:
    async with FakeNode(max_rate=30, max_span=2) as node, Rpc(node.url) as rpc:
        fill(node, 150)
        started = time.monotonic()
        logs = await rpc.logs_adaptive([FACTORY], 0, 150)
        assert len(logs) == 150  # without an error: what the node refused was asked again, slower
        assert 1 <= node.limited <= 4
        assert time.monotonic() - started < 60
        await rpc.headers(range(30))
        assert max(node.batches) < 30  # a batch of more than it takes in a second would be refused for ever


async def test_a_pace_below_one_a_second_is_possible() -> None:
    async with FakeNode() as node, Rpc(node.url, requests_per_second=0.5) as rpc:
        assert await rpc.chain_id() == 84532


async def test_concurrency_is_bounded() -> None:
    async with FakeNode() as node, Rpc(node.url, concurrency=3) as rpc:
        node.delay("eth_chainId", 0.02, times=None)
        await asyncio.gather(*(rpc.chain_id() for _ in range(12)))
        assert node.answering_most == 3


async def test_every_request_is_observed() -> None:
    seen: list[tuple[str, str, str]] = []

    def observe(endpoint: str, method: str, outcome: str, seconds: float | None) -> None:
        assert seconds is not None and seconds >= 0
        seen.append((endpoint, method, outcome))

    async with FakeNode() as node, Rpc(node.url, name="mine", observe=observe, timeout=2) as rpc:
        await rpc.chain_id()
        await rpc.headers([0, 0])
        node.hang("eth_chainId")
        with raises(Unreachable):
            await rpc.chain_id()
        node.fail("eth_getLogs", -32614, "eth_getLogs is limited to a 5 range")
        with raises(RangeTooLarge):
            await rpc.logs([FACTORY], 0, 9)
    assert seen == [
        ("mine", "eth_chainId", "ok"),
        ("mine", "batch", "ok"),
        ("mine", "eth_chainId", "timeout"),
        ("mine", "eth_getLogs", "range"),
    ]


async def test_what_is_wrong_with_an_answer_is_told_beside_the_request_that_went_well() -> None:
    seen: list[tuple[str, str]] = []

    def observe(endpoint: str, method: str, outcome: str, seconds: float | None) -> None:
        if seconds is None:
            seen.append((method, outcome))

    async with FakeNode() as node, Rpc(node.url, observe=observe) as rpc:
        node.mine(blocks=9)
        await rpc.headers([1, 2, 3])
        assert seen == []
        assert await rpc.header(99) is None
        assert await rpc.header(Hash32(b"\1" * 32)) is None
        assert await rpc.receipts(Hash32(b"\1" * 32)) is None
        assert seen == [
            ("eth_getBlockByNumber", "block_not_found"),
            ("eth_getBlockByHash", "block_not_found"),
            ("eth_getBlockReceipts", "block_not_found"),
        ]
        seen.clear()
        node.safe, node.missing_tag = None, "null"
        assert await rpc.header("safe") is None
        node.lie("eth_getBlockByNumber", lambda _, header: header | {"number": "0x5"}, times=1)
        with raises(BadAnswer, Kind.MISFIT):
            await rpc.header(4)
        assert seen == [("eth_getBlockByNumber", "finality_unknown"), ("eth_getBlockByNumber", "misfit")]
        seen.clear()
        node.batch_lie = lambda answers: answers[1:]
        await rpc.headers([1, 2])
        assert seen == [("eth_getBlockByNumber", "left_out")]


async def test_a_cancelled_call_leaves_the_endpoint_usable() -> None:
    async with FakeNode() as node, Rpc(node.url, concurrency=1) as rpc:
        node.hang("eth_chainId")
        call = asyncio.create_task(rpc.chain_id())
        await until(lambda: node.requests == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await rpc.chain_id() == 84532


# ── batches ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def numbers(rpc: Rpc, count: int) -> list[int]:
    found = await rpc.headers(range(count))
    return [int(each.number or "", 16) for each in found if each is not None]


@pytest.mark.parametrize(
    "lie",
    [
        lambda items: items[::-1],
        lambda items: items[:-2],
        lambda items: items[3:],
        lambda items: [*items[1:], items[0] | {"id": 12345}],
        lambda items: [*items, {"jsonrpc": "2.0", "id": 777, "result": None}],
        lambda items: {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "Invalid Request"}},
        lambda items: {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "batching is disabled"}},
        lambda items: [{"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "no batches"}}],
        lambda items: [*items, items[0]],
        lambda items: [],
        lambda items: {"jsonrpc": "2.0", "id": None, "result": None},
    ],
    ids=[
        *("reordered", "end missing", "start missing", "foreign id", "one too many", "single error", "disabled"),
        *("array of one error", "one twice", "empty", "single null"),
    ],
)
async def test_a_mangled_batch_still_brings_every_header(lie: Callable[[list[Any]], Any]) -> None:
    async with FakeNode(batch_lie=lie) as node, Rpc(node.url) as rpc:
        node.mine(blocks=20)
        assert await numbers(rpc, 10) == list(range(10))
        assert (await rpc.poll(0, 9, [FACTORY])).end is not None


async def test_a_node_without_batches_is_asked_one_by_one_from_then_on() -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        node.mine(blocks=20)
        node.reply("eth_getBlockByNumber", "<html>Bad Request</html>", status=400)
        assert await numbers(rpc, 5) == list(range(5))
        batches = len(node.batches)
        assert await numbers(rpc, 5) == list(range(5))
        assert len(node.batches) == batches
        assert not rpc.learned.batching


async def test_the_size_of_a_batch_is_learnt() -> None:
    async with FakeNode(max_batch=10) as node, Rpc(node.url) as rpc:
        node.mine(blocks=60)
        assert await numbers(rpc, 60) == list(range(60))
        assert 1 < rpc.learned.max_batch <= 10
        before = len(node.batches)
        await numbers(rpc, 60)
        assert max(list(node.batches)[before:]) <= 10


async def test_one_item_in_error_is_that_item_s_error() -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        node.mine([log(1)], blocks=9)
        node.fail("eth_getLogs", -32602, "query exceeds max block range 4")
        with raises(RangeTooLarge) as caught:
            await rpc.poll(0, 8, [FACTORY])
        assert caught.value.suggested == 4
        node.fail("eth_getBlockByNumber", -32000, "header not found", when=lambda params: params[0] == "0x8")
        assert (await rpc.poll(0, 8, [FACTORY])).end is None


async def test_an_unreachable_node_is_not_asked_item_by_item() -> None:
    async with FakeNode() as node, Rpc(node.url, timeout=1) as rpc:
        node.hang("*", times=None)
        with raises(Unreachable):
            await rpc.headers(range(50))
        assert node.requests == 1


# ── ranges ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def fill(node: FakeNode, blocks: int, each: int = 1) -> None:
    for number in range(blocks):
        node.mine([log(number * 100 + i) for i in range(each)])


def places(logs: list[Any]) -> list[tuple[int, int]]:
    return [(int(each.block_number, 16), int(each.log_index, 16)) for each in logs]


async def test_a_span_limit_is_learnt_once_and_kept() -> None:
    async with FakeNode(max_span=7) as node:
        fill(node, 40)
        async with Rpc(node.url) as rpc:
            logs = await rpc.logs_adaptive([FACTORY], 0, 40)
            assert places(logs) == [(number, 0) for number in range(1, 41)]
            assert rpc.learned.max_span == 7
            assert node.calls["eth_getLogs"] == 1 + 6
            kept = rpc.learned
        async with Rpc(node.url) as rpc:
            rpc.learned = kept
            await rpc.logs_adaptive([FACTORY], 0, 40)
            assert node.calls["eth_getLogs"] == 7 + 6


async def test_a_span_limit_without_a_number_is_found_by_halving() -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        fill(node, 40)

        def wide(params: list[Any]) -> bool:
            return int(params[0]["toBlock"], 16) - int(params[0]["fromBlock"], 16) >= 6

        node.fail("eth_getLogs", -32602, "Block range limit exceeded.", times=None, when=wide)
        assert len(await rpc.logs_adaptive([FACTORY], 0, 40)) == 40
        assert rpc.learned.max_span is not None and rpc.learned.max_span <= 6


async def test_density_shrinks_the_range_and_lets_it_grow_back() -> None:
    async with FakeNode(max_results=20) as node, Rpc(node.url) as rpc:
        fill(node, 20, each=5)
        fill(node, 300)
        node.mine(blocks=400)
        logs = await rpc.logs_adaptive([FACTORY], 0, node.head)
        assert len(logs) == 400
        assert places(logs) == sorted(places(logs))
        assert rpc.learned.max_span is None
        small = min(
            int(params[0]["toBlock"], 16) - int(params[0]["fromBlock"], 16) + 1
            for method, params in node.asked
            if method == "eth_getLogs"
        )
        assert small <= 4 < max(rpc.learned.dense_spans.values(), default=1000)


async def test_a_single_overfull_block_comes_from_its_receipts() -> None:
    async with FakeNode(max_results=10) as node, Rpc(node.url) as rpc:
        fill(node, 3)
        node.mine([[log(i), log(i, HUB), log(i, topic=OTHER)] for i in range(12)])
        fill(node, 3)
        logs = await rpc.logs_adaptive([FACTORY], 0, node.head, [[TOPIC]])
        assert len(logs) == 3 + 12 + 3
        assert {each.address for each in logs} == {"0x" + FACTORY.hex()}
        assert node.calls["eth_getBlockReceipts"] == 1


async def test_an_overfull_block_without_receipts_is_the_node_s_limit() -> None:
    async with FakeNode(max_results=10) as node, Rpc(node.url) as rpc:
        node.mine([log(i) for i in range(12)])
        node.fail("eth_getBlockReceipts", -32601, "method not found", times=None)
        with raises(MethodMissing):
            await rpc.logs_adaptive([FACTORY], 0, node.head)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (-32602, "query exceeds max results 20000, retry with the range {first}-{last}"),
        (-32602, "query exceeds max results 20000, retry with the range {last}-{first}"),
        (-32005, "query returned more than 10000 results. Try with this block range [{first:#x}, {last:#x}]."),
        (-32602, "Block range too large for public access: maximum 1000 blocks. Try [{first:#x}, {last:#x}]"),
        (-32614, "eth_getLogs is limited to a 2,000 range"),
        (35, "ranges over 10000 blocks are not supported on free plan"),
        (-32005, "limit exceeded"),
        (-32000, "Block range is too large"),
    ],
)
async def test_a_node_that_refuses_whatever_is_asked_ends_in_an_error_and_not_in_a_loop(
    code: int, message: str
) -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        fill(node, 30)

        def refuse(params: list[Any], _: Any) -> Any:
            raise AssertionError

        for first in range(31):
            for last in range(first, 31):
                node.fail(
                    "eth_getLogs",
                    code,
                    message.format(first=first, last=last),
                    times=None,
                    when=lambda params, a=first, b=last: (
                        params[0]["fromBlock"] == hex(a) and params[0]["toBlock"] == hex(b)
                    ),
                )
        node.fail("eth_getBlockReceipts", -32601, "method not found", times=None)
        with pytest.raises(RpcError):
            await rpc.logs_adaptive([FACTORY], 0, 30)
        assert node.calls["eth_getLogs"] <= 12


async def test_a_suggested_prefix_is_followed() -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        fill(node, 30)
        node.fail("eth_getLogs", -32602, "query exceeds max results 20000, retry with the range 0-11")
        parts = [(part.from_block, part.to_block) async for part in rpc.log_ranges([FACTORY], 0, 30)]
        assert parts[0] == (0, 11)
        assert [a for a, _ in parts[1:]] == [b + 1 for _, b in parts[:-1]]
        assert parts[-1][1] == 30


async def test_long_address_lists_are_cut_and_put_back_in_order() -> None:
    async with FakeNode(max_addresses=60) as node, Rpc(node.url) as rpc:
        addresses = [i.to_bytes(20, "big") for i in range(1, 251)]
        for i in range(5):
            node.mine([log(j, addresses[(j * 83 + i) % 250]) for j in range(6)])
        logs = await rpc.logs_adaptive(addresses, 0, node.head)
        assert places(logs) == [(block, index) for block in range(1, 6) for index in range(6)]
        assert rpc.learned.max_addresses == 50
        assert max(len(p[0]["address"]) for m, p in list(node.asked)[1:] if m == "eth_getLogs") == 50


async def test_a_heavy_range_that_times_out_is_asked_in_smaller_parts() -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        fill(node, 40)

        def wide(params: list[Any]) -> bool:
            return int(params[0]["toBlock"], 16) - int(params[0]["fromBlock"], 16) >= 12

        node.fail("eth_getLogs", 30, "Request timeout on the free plan", status=408, times=None, when=wide)
        assert len(await rpc.logs_adaptive([FACTORY], 0, 40)) == 40


async def test_a_node_that_always_times_out_is_given_up_soon() -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        fill(node, 40)
        node.fail("eth_getLogs", 30, "Request timeout on the free plan", status=408, times=None)
        with raises(Unreachable, Kind.TIMEOUT):
            await rpc.logs_adaptive([FACTORY], 0, 40)
        assert node.calls["eth_getLogs"] == 3


async def test_history_that_the_endpoint_does_not_have_is_not_split() -> None:
    async with FakeNode() as node, Rpc(node.url) as rpc:
        node.mine(blocks=10)
        node.fail("eth_getLogs", -32602, "Archive requests require a personal token.", times=None)
        with pytest.raises(RpcError):
            await rpc.logs_adaptive([FACTORY], 0, 10)
        assert node.calls["eth_getLogs"] == 1
        with raises(BeyondHead):
            node.heal()
            await rpc.logs_adaptive([FACTORY], 0, 99)


def test_learned_limits_travel_as_json() -> None:
    import msgspec

    learned = Learned(2000, {"1": 300}, 50, 10, False)
    assert msgspec.json.decode(msgspec.json.encode(learned), type=Learned) == learned


# ── heads ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def next_head(heads: HeadStream) -> str | None:
    return (await asyncio.wait_for(anext(heads), 5)).number


async def test_heads_come_as_the_node_sends_them() -> None:
    async with FakeNode() as node, HeadStream(node.ws_url) as heads:
        await until(lambda: node.subscribers == 1)
        node.mine(blocks=2)
        node.repeat_head()
        node.reorganise(1)
        assert [await next_head(heads) for _ in range(4)] == ["0x1", "0x2", "0x2", "0x2"]


async def test_a_silent_socket_is_told_by_its_seconds() -> None:
    async with FakeNode(silent=True) as node, HeadStream(node.ws_url, silent_seconds=0.2) as heads:
        await until(lambda: node.subscribers == 1)
        node.mine()
        with pytest.raises(Silent) as caught:
            await anext(heads)
        assert caught.value.seconds == 0.2
        assert isinstance(caught.value, Unreachable)


async def test_garbage_is_no_head_and_does_not_end_the_silence() -> None:
    async with FakeNode() as node, HeadStream(node.ws_url, silent_seconds=0.3) as heads:
        await until(lambda: node.subscribers == 1)
        for text in (
            "not json",
            "[]",
            "{}",
            '{"jsonrpc":"2.0","method":"eth_subscription","params":{"subscription":"0x1"}}',
            '{"jsonrpc":"2.0","method":"eth_subscription","params":{"subscription":"0x1","result":{"number":"0x9"}}}',
            '{"jsonrpc":"2.0","method":"eth_subscription","params":{"subscription":"0x1","result":"0xabc"}}',
        ):
            node.send_raw(text)
        node.mine()
        assert await next_head(heads) == "0x1"
        assert heads.discarded == 6
        node.send_raw("more of it")
        with pytest.raises(Silent):
            await anext(heads)


async def test_a_head_under_another_subscription_is_still_a_head() -> None:
    async with FakeNode() as node, HeadStream(node.ws_url) as heads:
        await until(lambda: node.subscribers == 1)
        for socket in node.sockets:
            node.subscriptions[socket] = "0xffff"
        node.mine()
        assert await next_head(heads) == "0x1"


async def test_a_closed_socket_is_unreachable() -> None:
    async with FakeNode() as node, HeadStream(node.ws_url) as heads:
        await until(lambda: node.subscribers == 1)
        node.mine()
        assert await next_head(heads) == "0x1"
        await node.close_sockets()
        with raises(Unreachable) as caught:
            await anext(heads)
        assert "1001" in str(caught.value)


async def test_a_cut_socket_is_unreachable() -> None:
    async with FakeNode() as node, HeadStream(node.ws_url) as heads:
        await until(lambda: node.subscribers == 1)
        await node.abort_sockets()
        with raises(Unreachable):
            await anext(heads)


async def test_a_message_that_is_too_large_closes_the_socket() -> None:
    async with FakeNode() as node, HeadStream(node.ws_url, max_message=10_000) as heads:
        await until(lambda: node.subscribers == 1)
        node.send_raw("x" * 20_000)
        with raises(Unreachable):
            await anext(heads)


async def refused_by(inject: Callable[[FakeNode], Any]) -> RpcError:
    async with FakeNode() as node:
        inject(node)
        with pytest.raises(RpcError) as caught:
            async with HeadStream(node.ws_url + "/SECRET", timeout=0.5):
                pass
        return caught.value


async def test_a_socket_that_offers_no_heads_says_why() -> None:
    refusal = await refused_by(lambda node: node.fail("eth_subscribe", -32601, "method not found"))
    assert isinstance(refusal, MethodMissing)
    slow = await refused_by(lambda node: node.delay("eth_subscribe", 3))
    assert isinstance(slow, Unreachable) and slow.kind is Kind.TIMEOUT
    assert "SECRET" not in f"{refusal}{slow}"
    limited = await refused_by(lambda node: node.reply("websocket", "", status=429))
    assert isinstance(limited, RateLimited)
    plain = await refused_by(lambda node: node.reply("websocket", "<html>"))
    assert isinstance(plain, Refused)


async def test_a_redirected_websocket_is_refused() -> None:
    async with FakeNode() as elsewhere:
        to = {"Location": elsewhere.url + "ws"}
        refusal = await refused_by(lambda node: node.reply("websocket", "", status=302, headers=to))
        assert refusal.kind is Kind.REDIRECT
        assert elsewhere.requests == 0 and not elsewhere.sockets


async def test_no_websocket_there_is_an_error_of_the_endpoint() -> None:
    async with FakeNode() as node:
        url = node.ws_url
    with pytest.raises(Unreachable):
        async with HeadStream(url):
            pass


# ── the fake itself ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_fake_s_hashes_are_those_of_the_rlp_library() -> None:
    import rlp
    from eth_hash.auto import keccak

    for style, fields in (("op", 21), ("london", 16)):
        chain = FakeChain(style=style, deposits=style == "op")
        chain.mine([log(1), log(2)])
        values = list(chain._fields(chain.head).values())
        assert len(values) == fields
        assert chain.head.hash == keccak(rlp.encode(values))


def test_the_fake_goes_from_a_branch_to_another_and_back() -> None:
    chain = FakeChain()
    chain.mine([log(1)], blocks=3)
    ours = chain.head.hash
    theirs = chain.reorganise(3, [[log(2)], []]).hash
    assert chain.head.number == 2
    chain.switch_to(ours)
    assert (chain.head.number, chain.loud) == (3, [1])
    chain.switch_to(theirs)
    assert (chain.head.number, chain.loud) == (2, [1])


@pytest.mark.parametrize("code", ["9" * 5000, "\u00b2", "--5", "-32016"])
async def test_a_code_that_is_no_number_is_an_error_like_another(code: str) -> None:
    async with FakeNode() as node, Rpc(node.url, timeout=5) as rpc:
        node.reply(
            "eth_chainId", json.dumps({"id": 1, "error": {"code": code, "message": "over rate limit"}}), times=None
        )
        with pytest.raises(RpcError) as refused:
            await rpc.chain_id()
        assert refused.value.code == (-32016 if code == "-32016" else None)
