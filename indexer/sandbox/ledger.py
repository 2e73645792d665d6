"""The chain side of the demo: two factories, customers with points, relayers, the heads as they come, and reorganisations.

Promises that what an honest relayer sent is sent again when a reorganisation drops it, that no reorganisation reaches deeper
than ten blocks, and that blocks can be held back, so that a slow machine plays the same story as a fast one. Which transactions
are unlucky is left to the story.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from indexer.model.types import Address, Hash32, hex0x
from indexer.sandbox.actions import Issuance, Metadata, Redemption, Signed
from indexer.sandbox.anvil import Anvil
from indexer.sandbox.loyfin import WEALTH, Loyfin, deploy_look_alike
from indexer.sandbox.transactions import Party, Receipt, Submitter

CHAIN_ID = 84532
BLOCK_SECONDS = 0.2
SLOTS = 20  # safe trails the head by so many blocks, finalized by twice as many
DEEPEST = 10  # blocks that a reorganisation replaces at most
PATIENCE_SECONDS = 60.0

BLOOM = Party("bloom")
COPYCAT = Party("copycat")
CUSTOMERS = {name: Party(name) for name in ("ana", "ben", "cleo")}
PETALS = Metadata(
    loyalty_id=Hash32(b"petals".ljust(32, b"\0")), name="Bloom Petals", symbol="PETAL", description="One for each euro"
)
ORCHIDS = Metadata(
    loyalty_id=Hash32(b"orchids".ljust(32, b"\0")), name="Bloom Orchids", symbol="ORCHID", description="For the best"
)


class Refused(RuntimeError):
    """A transaction of the story was mined and refused by the contracts."""


@dataclass(eq=False)
class Ledger:
    """`plain` emits by itself, `hub` through an event hub; both have Bloom as an issuer."""

    node: Anvil
    plain: Loyfin
    hub: Loyfin
    look_alike: Address
    rng: random.Random
    reorganisations: int = 0

    def __post_init__(self) -> None:
        self.arrivals: dict[str, float] = {}  # block hash → the loop's time at which our own socket told it
        self._unlucky = Submitter(self.node, CHAIN_ID)
        self._unlucky_ones = 0
        self._clock = asyncio.Lock()

    @classmethod
    async def open(cls, node: Anvil, seed: int) -> Ledger:
        """Deploys, and gives everyone gas, fee tokens and the fee's allowance."""
        rng = random.Random(seed)  # noqa: S311 - nonces of a sandbox
        plain = await Loyfin.deploy(node, rng=rng)
        with_hub = await Loyfin.deploy(node, with_hub=True, rng=rng)
        # one submitter for both: it keeps each party's nonces in order
        hub = Loyfin(plain.submitter, with_hub.deployment, relayer=Party("hub relayer"), rng=rng)
        await node.set_balance(hub.relayer.address, WEALTH)
        everyone = (*CUSTOMERS.values(), BLOOM, COPYCAT)
        look_alike, *_ = await asyncio.gather(
            deploy_look_alike(plain.submitter), plain.welcome(*everyone), hub.welcome(*everyone)
        )
        return cls(node, plain, hub, look_alike, rng)

    # ---- actions

    def issuance(
        self, holder: Party, amount: int, *, loyfin: Loyfin, programme: Metadata, by: Party = BLOOM, **terms: Any
    ) -> Issuance:
        return loyfin.issuance(by, holder.address, amount, loyalty_id=programme.loyalty_id, metadata=programme, **terms)

    def redemption(
        self, holder: Party, amount: int, *, loyfin: Loyfin, programme: Metadata, by: Party = BLOOM, **terms: Any
    ) -> Redemption:
        return loyfin.redemption(by, holder.address, amount, loyalty_id=programme.loyalty_id, **terms)

    def driver(self, signed: Signed[Any]) -> Loyfin:
        """The driver of the factory that the action was signed for."""
        return self.hub if signed.action.verifying_contract == self.hub.factory else self.plain

    async def submit(self, signed: Signed[Any]) -> Hash32:
        """Through an honest relayer: what a reorganisation drops is sent again."""
        return await self.driver(signed).submit(signed)

    async def submit_unlucky(self, signed: Signed[Any]) -> Hash32:
        """Through a relayer of its own, who sends it again only when asked to (`send_again`)."""
        self._unlucky_ones += 1
        relayer = Party(f"unlucky relayer {self._unlucky_ones}")
        await self.node.set_balance(relayer.address, WEALTH)
        loyfin = self.driver(signed)
        return await Loyfin(self._unlucky, loyfin.deployment, relayer=relayer).submit(signed)

    async def send_again(self, tx_hash: Hash32) -> None:
        """Its relayer is given gas again first: the reorganisation may have undone that too."""
        await self.node.set_balance(self._unlucky.sent(tx_hash).sender, WEALTH)
        await self._unlucky.resend(tx_hash)

    async def mined(self, tx_hash: Hash32) -> Receipt:
        """The receipt. Raises Refused, TimeoutError."""
        receipt = await self.plain.wait(tx_hash, timeout=PATIENCE_SECONDS)
        if not receipt.succeeded:
            raise Refused(f"{hex0x(tx_hash)} was refused in block {receipt.block_number}")
        return receipt

    async def now(self) -> int:
        """The head's time, Unix seconds."""
        return int((await self.node.block())["timestamp"], 16)

    async def until_after(self, second: int) -> None:
        """Once the head's time is beyond that Unix second."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                if await self.now() > second:
                    return
                await asyncio.sleep(BLOCK_SECONDS / 2)

    async def out_of_reach(self, block: int) -> None:
        """Once no reorganisation of ours replaces that block any more."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                if await self.node.block_number() > block + DEEPEST:
                    return
                await asyncio.sleep(BLOCK_SECONDS)

    # ---- blocks

    @asynccontextmanager
    async def mining(self) -> AsyncIterator[None]:
        """Blocks come from here instead of the node's own clock: while the body runs, save where they are held back."""
        await self.node.set_interval(0)
        mining = asyncio.create_task(self._mine())
        try:
            yield
        finally:
            mining.cancel()
            await asyncio.gather(mining, return_exceptions=True)

    async def _mine(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            async with self._clock:
                await self.node.mine_now()
            due = max(due + BLOCK_SECONDS, loop.time())  # what is late is not made up for
            await asyncio.sleep(due - loop.time())

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """While the body runs no block comes, save by `bury` and `reorganise`. Transactions wait in the pool."""
        async with self._clock:
            yield

    async def bury(self, tx_hashes: Sequence[Hash32], blocks: int) -> None:
        """Mines the transactions, and blocks on top until there are so many; only while blocks are held back. Raises Refused."""
        mined = 0
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not all(await asyncio.gather(*map(self._unlucky.receipt, tx_hashes))) or mined < blocks:
                await self.node.mine_now()
                mined += 1
                await asyncio.sleep(BLOCK_SECONDS / 4)
        for tx_hash in tx_hashes:
            await self.mined(tx_hash)

    async def reorganise(self, tx_hashes: Sequence[Hash32]) -> None:
        """Replaces the blocks that hold the transactions, and none below them; only while blocks are held back."""
        first = min([(await self.mined(tx_hash)).block_number for tx_hash in tx_hashes])
        depth = await self.node.block_number() - first + 1
        if depth > DEEPEST:
            raise Refused(f"a reorganisation {depth} blocks deep")
        await self.node.reorg(depth)
        self.reorganisations += 1
        # once is not enough: Anvil throws away what waits in its pool behind what was dropped when it builds the next block
        while await self.plain.submitter.resend_dropped():
            await self.node.mine_now()

    # ---- heads

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Notes when each block arrived, by a subscription of our own."""
        async with aiohttp.ClientSession() as http, http.ws_connect(self.node.websocket_url) as socket:
            await socket.send_json({"jsonrpc": "2.0", "id": 1, "method": "eth_subscribe", "params": ["newHeads"]})
            watching = asyncio.create_task(self._watch(socket))
            try:
                yield
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    def settled_at(self, evidence: Mapping[str, Any]) -> float | None:
        """The loop's time at which the block of a chain's event came to us; None for anything else."""
        return self.arrivals.get(str(evidence.get("blockHash")))

    async def _watch(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        loop = asyncio.get_running_loop()
        async for message in socket:
            at = loop.time()
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            head = json.loads(message.data).get("params", {}).get("result")
            if head:
                self.arrivals.setdefault(head["hash"], at)
