"""`indexer demo` as a newcomer meets it: it ends by itself with a verdict, and leaves nothing behind, interrupted or not."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from indexer.sandbox.receiver import Receiver
from indexer.sandbox.shop import End, Order, Shop
from indexer.sandbox.verdict import judge
from indexer.signals.attempts import Endpoint, send_test
from indexer.signals.targets import networks, system_lookup

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(400)]

MARK = "DEMO_TEST_MARK"


@dataclass(frozen=True)
class Place:
    """A folder for temporary files, and a mark that every process started here inherits."""

    folder: Path
    mark: str

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", "from indexer.cli import main; main()", "demo", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(self.folder), MARK: self.mark},
        )

    def processes(self) -> list[str]:
        """Command lines of what still runs of it."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                line = (process / "cmdline").read_bytes()
                if self.mark.encode() in (process / "environ").read_bytes() or str(self.folder).encode() in line:
                    found.append(line.replace(b"\0", b" ").decode(errors="replace"))
            except OSError:  # gone meanwhile, or somebody else's
                continue
        return [line for line in found if line]

    def left(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.name.startswith("indexer-demo-"))


@pytest.fixture
def place() -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="demo-"))  # short, and open to the account that runs PostgreSQL
    folder.chmod(0o711)
    try:
        yield Place(folder, secrets.token_hex(16))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def test_an_operation_that_ends_elsewhere_fails_the_demo() -> None:
    orders = {"one": Order("one", "a story", "issuance", 5, [], End("fulfilled"), status="fulfilled", generation=1)}
    async with Shop("bloom", orders, lambda evidence: None, lambda order, signal: None) as shop:
        receiver = Receiver("whsec_" + "A" * 32, shop.take)
        receiver.duplicates, shop.streams = 1, {"a stream"}
        truth = {"reference": "one", "status": "ready", "generation": 1}

        verdict = judge(shop, receiver, [truth], 0, [])
        assert not verdict.ok
        assert verdict.document()["ok"] is False
        assert verdict.document()["operations"] == {"ready": 1}
        assert verdict.failures == [
            "one (a story): status should be fulfilled, is ready",
            "one (a story): signals should be ready, fulfilled, is none",
            "one (a story): finalized signals should be 1, is 0",
        ]

        orders["one"].end = End("ready", 1, ())
        assert judge(shop, receiver, [truth], 0, []).ok
        assert not judge(shop, receiver, [truth], 0, ["a story: did not end"]).ok
        assert not judge(shop, receiver, [], 0, []).ok


async def test_the_shop_takes_the_test_that_the_command_line_sends() -> None:
    secret = "whsec_" + "A" * 32
    with ThreadPoolExecutor(1) as threads:
        async with Shop("bloom", {}, lambda evidence: None, lambda order, signal: None) as shop:
            async with Receiver(secret, shop.take) as receiver:
                endpoint = Endpoint("bloom", "shop", receiver.url, (secret,), allow=networks(["127.0.0.0/8"]))
                reply = await send_test(endpoint, system_lookup(threads), time.time)
            assert (reply.status, shop.strange, receiver.verified) == (204, [], 1)


async def test_the_demo_tells_every_story_to_its_expected_end(place: Place) -> None:
    process = await place.start("--json")
    out, progress = await process.communicate()

    assert process.returncode == 0, progress.decode()[-6000:]
    assert out.count(b"\n") == 1
    said = json.loads(out)
    assert said.keys() == {"operations", "signals", "webhooks", "reorganisations", "latency_ms", "alerts", "ok"}
    assert said["ok"] is True

    operations = said["operations"]
    assert sum(operations.values()) >= 70
    assert operations.keys() == {
        "fulfilled",
        "expired",
        "cancelled",
        "conflict",
        "incomplete",
        "pending",
        "submitted",  # a mint that is under way for ever: old, and no failure
    }

    signals = said["signals"]
    # what qiibee took back may have been final on its word
    assert signals["operation.finalized"] - operations["fulfilled"] in (0, 1)
    assert signals["operation.expired"] == operations["expired"]
    assert signals["operation.reverted"] >= 4
    assert signals["operation.restored"] >= 1
    assert signals["operation.conflict"] >= 3
    assert signals["operation.submitted"] >= 2
    assert signals["operation.rejected"] >= 2
    assert "settlement.unmatched" not in signals

    webhooks = said["webhooks"]
    assert webhooks["received"] == webhooks["verified"] == sum(signals.values()) + webhooks["duplicates"]
    assert webhooks["duplicates"] >= 1
    assert said["reorganisations"] >= 3
    latency = said["latency_ms"]["included_to_received"]
    assert 0 <= latency["p50"] <= latency["p99"]
    by_kind = said["latency_ms"]["by_kind"]
    assert by_kind.keys() == {
        f"{partner}.{kind}"
        for partner, kinds in (
            ("loyfin", ("issuance", "redemption")),
            ("keyban", ("mint", "burn")),
            ("qiibee", ("credit", "debit")),
        )
        for kind in kinds
    }
    assert all(0 <= each["p50"] <= each["p99"] for each in by_kind.values())
    (alert,) = said["alerts"]
    assert alert.startswith("the oldest open operation is")

    assert place.left() == []
    assert place.processes() == []


async def test_an_interrupted_demo_leaves_nothing_behind(place: Place) -> None:
    process = await place.start("--json")
    assert process.stderr is not None
    async with asyncio.timeout(180):
        async for line in process.stderr:
            if b"the shop is open" in line:
                break
        assert len(place.processes()) > 3  # the demo, Anvil, the daemon, PostgreSQL

        process.send_signal(signal.SIGTERM)
        out, _ = await process.communicate()

    assert process.returncode == 128 + signal.SIGTERM
    assert out == b""
    assert place.left() == []
    assert place.processes() == []
