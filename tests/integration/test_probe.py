"""Endpoints tried before a daemon relies on them: what they are, and clear words for what fails."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from indexer.chain.decode import Decoder
from indexer.chain.probe import Probe, probe
from tests.fake_node import FakeNode
from tests.following import FACTORY, chain_config, created, issued

DECODER = Decoder.from_abi()


async def probed(node: FakeNode, timeout: float = 5.0, **settings: Any) -> Probe:
    return await probe(chain_config(node, **settings), DECODER, timeout=timeout)


async def test_a_good_endpoint() -> None:
    async with FakeNode(max_span=2000) as node:
        node.mine([created(1)])
        node.mine([issued(1)], 3000)
        node.set_tags(safe=2990, finalized=2900)
        mining = asyncio.create_task(mine_on(node))
        try:
            found = await probed(node)
        finally:
            mining.cancel()
        (seen,) = found.endpoints
        assert found.problems == []
        assert (seen.chain_id, seen.safe, seen.finalized) == (84532, 2990, 2900)
        assert seen.head is not None and seen.head >= 3001 and seen.genesis == "0x" + node.chain.canonical[0].hash.hex()
        assert (seen.receipts, seen.batches, seen.largest_span) == (True, True, 2000)
        assert found.websocket is not None and found.websocket.first_head_seconds is not None
        assert found.seconds_per_block == 2.0
        # a poll is four calls; the socket costs nothing for blocks that hold nothing of ours; every header costs each block
        assert found.calls_per_day["polling"] == 4 * 86_400 * 20 + 2 * 86_400 * 10
        assert found.calls_per_day["socket"] == 2 * 86_400 * 10
        assert found.calls_per_day["every-header"] > 86_400 / 2
        assert found.history_calls == 4


async def mine_on(node: FakeNode) -> None:
    while True:
        await asyncio.sleep(0.05)
        node.mine()


async def test_each_endpoint_is_told_its_part_of_the_calls() -> None:
    async with FakeNode() as node, FakeNode(chain=node.chain, max_span=10) as other:
        node.mine([created(1)], 300)
        node.set_tags(safe=290, finalized=280)
        endpoints = [
            {"url": other.url, "role": "fallback"},
            {"url": node.url, "requests_per_second": 50, "role": "primary"},
        ]
        found = await probed(node, socket=False, rpc=endpoints)
        assert found.problems == []
        witness, lead = found.endpoints
        looks = 6 * 86_400 * 10
        assert (witness.calls_per_day["polling"], lead.calls_per_day["polling"]) == (looks, looks + 4 * 86_400 * 20)
        assert found.calls_per_day["polling"] == 2 * looks + 4 * 86_400 * 20
        assert any("140.0 calls a second, requests_per_second allows 50" in remark for remark in lead.remarks)
        assert any("answers for 20 s of chain at once" in remark for remark in witness.remarks)


async def test_what_fails_is_said(tmp_path: Path) -> None:
    async with FakeNode(max_span=100) as node:
        node.mine([created(1)], 300)
        node.set_tags(safe=290, finalized=None)
        node.fail("eth_getBlockReceipts", -32601, "the method does not exist", times=None)
        node.silent = True
        found = await probed(node, timeout=0.5)
        (seen,) = found.endpoints
        assert (seen.receipts, seen.largest_span, seen.finalized) == (False, 100, None)
        assert len(found.problems) == 2
        assert "knows no finalized block: nothing becomes finalized" in found.problems[0]
        assert "no new head for 0.5 s" in found.problems[1]
        assert any("no eth_getBlockReceipts" in remark for remark in seen.remarks)
        wrong = await probed(node, socket=False, chain_id=8453)
        assert len(wrong.problems) == 1 and "serves chain 84532, not 8453: correct chain_id" in wrong.problems[0]
        assert wrong.endpoints[0].head is None
        config = tmp_path / "indexer.toml"
        async with FakeNode(options={"salt": 5}) as other:
            other.mine(blocks=20)
            other.set_tags(safe=10, finalized=5)
            config.write_text(
                f"""
                [database]
                url = "postgresql://nobody@127.0.0.1:1/none"
                [[chains]]
                name = "fake"
                chain_id = 84532
                rpc = [{{ url = "{other.url}" }}, {{ url = "{node.url}" }}, {{ url = "http://127.0.0.1:1/" }}]
                factories = [{{ address = "0x{FACTORY.hex()}", start_block = 0 }}]
                """
            )
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", "from indexer.cli import main; main()"),
                *("config", "check", "--online", "--json", "--config", str(config)),
                stdout=asyncio.subprocess.PIPE,
            )
            out, _ = await process.communicate()
        document = json.loads(out)
        assert (process.returncode, document["ok"]) == (1, False)
        assert any("the endpoints are of different chains" in problem for problem in document["problems"])
        assert any("cannot" in problem or "refused" in problem for problem in document["problems"][-2:])
        assert [len(chain["endpoints"]) for chain in document["chains"]] == [3]


async def test_a_head_without_blocks_below_it() -> None:
    """A gateway that answers `latest`, and holds no block by its number."""
    async with FakeNode() as node:
        node.mine([created(1)], 150)
        node.lie(
            "eth_getBlockByNumber", lambda params, raw: raw if params[0] in ("latest", "0x0") else None, times=None
        )
        (seen,) = (await probed(node, socket=False)).endpoints
        assert any("shows no block below it" in problem for problem in seen.problems), seen
