"""For tests of following: Loyfin events as logs of a FakeChain, a follower on a real database, and the truth to compare with.

The truth is read from the fake chain alone: which logs stand in its canonical blocks, of emitters that a canonical block
announced. What is stored as canonical must equal it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
from eth_abi.abi import encode
from eth_hash.auto import keccak

from indexer.chain.backfill import fill_history
from indexer.chain.decode import Decoder
from indexer.chain.follower import follow
from indexer.chain.heads import HeadStream
from indexer.chain.integrity import Outcome
from indexer.chain.pool import Node, Pool
from indexer.chain.rpc import Rpc
from indexer.chain.runtime import counting_checks, counting_requests
from indexer.config import Chain
from indexer.store import chains, coverage
from indexer.store.database import Database
from indexer.store.leases import Leases
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics
from tests.fake_node import FakeChain, FakeNode, LogSpec

FACTORY = b"\xfa" * 20
FACTORY2 = b"\xfb" * 20
ISSUER = b"\x15" * 20
STRANGER = b"\x66" * 20
DECODER = Decoder.from_abi()
EVENT_TABLES = ("programme", "movement", "transfer", "programme_event", "raw_log")


def address_word(address: bytes) -> bytes:
    return address.rjust(32, b"\0")


def token_of(n: int, factory: bytes = FACTORY) -> bytes:
    return hashlib.sha256(b"token%d" % n + factory).digest()[:20]


def loyalty_id(n: int) -> bytes:
    return n.to_bytes(32, "big")


_CREATED = keccak(b"LoyaltyProgramCreated(address,address,bytes32,address,string,string,string,string,string,string)")
_POINTS = b"(address,address,bytes32,address,address,uint256,uint256,bytes32,bytes32,bytes)"
_ISSUED, _REDEEMED = keccak(b"PointsIssued" + _POINTS), keccak(b"PointsRedeemed" + _POINTS)
_TRANSFER = keccak(b"LoyaltyTransfer(address,address,address,address,uint256,uint256)")


def created(n: int, factory: bytes = FACTORY) -> LogSpec:
    """Programme `n` of the factory, announced by it."""
    data = encode(["address"] + ["string"] * 6, ["0x" + token_of(n, factory).hex(), f"P{n}", "P", "", "", "", ""])
    return (factory, [_CREATED, address_word(factory), address_word(ISSUER), loyalty_id(n)], data)


def issued(
    nonce: int,
    n: int = 1,
    amount: int = 10,
    factory: bytes = FACTORY,
    emitter: bytes | None = None,
    redeem: bool = False,
    *,
    holder: bytes = b"\x40" * 20,
    operation_hash: bytes | None = None,
    bucket: int = 0,
) -> LogSpec:
    data = encode(
        ["address", "address", "uint256", "uint256", "bytes32", "bytes32", "bytes"],
        [
            "0x" + token_of(n, factory).hex(),
            "0x" + holder.hex(),
            bucket,
            amount,
            nonce.to_bytes(32, "big"),
            hashlib.sha256(b"op%d" % nonce).digest() if operation_hash is None else operation_hash,
            b"",
        ],
    )
    topic = _REDEEMED if redeem else _ISSUED
    return (emitter or factory, [topic, address_word(factory), address_word(ISSUER), loyalty_id(n)], data)


def transferred(n: int = 1, amount: int = 5, factory: bytes = FACTORY) -> LogSpec:
    """A transfer that the token itself logs."""
    token = token_of(n, factory)
    data = encode(["address", "uint256", "uint256"], ["0x" + "41" * 20, 0, amount])
    return (token, [_TRANSFER, address_word(token), address_word(b"\x40" * 20), address_word(b"\x40" * 20)], data)


def noise(n: int = 0) -> LogSpec:
    return (STRANGER, [_ISSUED, address_word(FACTORY), address_word(ISSUER), loyalty_id(n)], b"")


# --------------------------------------------------------------------------- the truth, and what is stored

Place = tuple[int, bytes, int]


def truth(chain: FakeChain, factories: tuple[bytes, ...] = (FACTORY,)) -> set[Place]:
    """(number, hash, log index) of every canonical log that should be stored."""
    tokens: dict[bytes, int] = {}
    for number in chain.loud:
        for address, topics, encoded in chain.canonical[number].entries:
            if address in factories and topics and topics[0] == _CREATED and topics[1][12:] == address:
                token = bytes.fromhex(msgspec.json.decode(encoded)["data"][2:])[12:32]
                tokens.setdefault(token, number)
    places = set()
    for number in chain.loud:
        block = chain.canonical[number]
        for address, _, encoded in block.entries:
            if address in factories or number >= tokens.get(address, 1 << 62):
                places.add((number, block.hash, int(msgspec.json.decode(encoded)["logIndex"], 16)))
    return places


async def stored(database: Database) -> set[Place]:
    """The same, as it is stored canonical; fails on a second canonical block at a height."""
    rows: set[Place] = set()
    for table in EVENT_TABLES:
        found = await database.pool.fetch(
            f"SELECT block_number, block_hash, log_index FROM indexer.{table} WHERE canonical"
        )
        rows |= {tuple(row) for row in found}
    hashes: dict[int, bytes] = {}
    for number, block_hash, _ in rows:
        assert hashes.setdefault(number, block_hash) == block_hash
    return rows


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float = 60.0, what: str = "") -> None:
    """Waits until the condition holds; fails after the deadline."""
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.01)


async def head_of(database: Database) -> tuple[int, bytes] | None:
    row = await database.pool.fetchrow("SELECT head_number, head_hash FROM indexer.chain")
    return None if row is None or row[0] is None else (row[0], row[1])


async def caught_up(database: Database, node: FakeNode, seconds: float = 60.0) -> None:
    """Waits until our head is the node's."""

    async def there() -> bool:
        block = node.chain.canonical[node.head]
        return await head_of(database) == (block.number, block.hash)

    await eventually(there, seconds)


# --------------------------------------------------------------------------- running


def chain_config(
    node: FakeNode, *, socket: bool = True, factories: tuple[bytes, ...] = (FACTORY,), **more: Any
) -> Chain:
    settings: dict[str, Any] = {
        "name": "fake",
        "chain_id": node.chain_id,
        "rpc": [{"url": node.url}],
        "factories": [{"address": "0x" + factory.hex(), "start_block": 0} for factory in factories],
        "poll_seconds": 0.05,
        "tags_seconds": 0.1,
        "silent_seconds": 0.5,
    } | more
    if socket:
        settings.setdefault("websocket", node.ws_url)
    return Chain.model_validate(settings)


def _pool(chain: Chain, rpc: Rpc, metrics: Metrics, checks: list[tuple[str, str]] | None) -> Pool:
    """One endpoint, counted as the daemon counts; `checks` hears of each check too."""
    counted = counting_checks(metrics)

    def count(endpoint: str, check: str, outcome: Outcome) -> None:
        counted(endpoint, check, outcome)
        if checks is not None:
            checks.append((check, str(outcome)))

    return Pool(chain.name, chain.chain_id, [Node(rpc)], count=count, metrics=metrics)


@asynccontextmanager
async def following(
    database: Database,
    node: FakeNode,
    chain: Chain | None = None,
    *,
    checks: list[tuple[str, str]] | None = None,
    fails: type[Exception] | None = None,
    **more: Any,
) -> AsyncIterator[asyncio.Task[None]]:
    """A follower that runs for the body, under a real lease; killed (cancelled) at the end. `fails`: what it may end with."""
    chain = chain or chain_config(node)
    metrics = more.setdefault("metrics", Metrics())
    rpc = Rpc(chain.rpc[0].url, timeout=5, observe=counting_requests(metrics))
    socket = chain.websocket
    heads = None if socket is None else lambda: HeadStream(socket, silent_seconds=chain.silent_seconds)

    async def run() -> None:
        async with rpc, Leases(database, ttl=15).hold(f"follow:{chain.chain_id}") as lease:
            source = _pool(chain, rpc, metrics, checks).source()
            await follow(chain, source, heads, lease, Wakeups(), DECODER, **more)

    task = asyncio.create_task(run())
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, *([fails] if fails else [])):
            await task


@asynccontextmanager
async def filling(
    database: Database,
    node: FakeNode,
    chain: Chain | None = None,
    *,
    checks: list[tuple[str, str]] | None = None,
    ttl: float = 15,
    **more: Any,
) -> AsyncIterator[asyncio.Task[None]]:
    """History being filled for the body; killed at the end."""
    chain = chain or chain_config(node)
    metrics = more.setdefault("metrics", Metrics())
    rpc = Rpc(chain.rpc[0].url, timeout=5, observe=counting_requests(metrics))

    async def run() -> None:
        async with rpc, Leases(database, ttl=ttl).hold(f"history:{chain.chain_id}") as lease:
            source = _pool(chain, rpc, metrics, checks).source("history")
            await fill_history(chain, source, lease, Wakeups(), DECODER, **more)

    task = asyncio.create_task(run())
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def history_filled(database: Database, chain_id: int, seconds: float = 60.0) -> None:
    """Waits until no active emitter misses a block up to finalized."""
    session = await database.session("test")
    try:
        async with asyncio.timeout(seconds):
            while True:
                state = await chains.load_chain(session, chain_id)
                upto = None if state is None or state.finalized is None else state.finalized.number
                if upto is not None and not await coverage.gaps(session, chain_id, upto):
                    return
                await asyncio.sleep(0.02)
    finally:
        await session.close()
