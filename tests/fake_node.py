"""A scriptable JSON-RPC node on real sockets of 127.0.0.1: a chain in memory, and lies and faults on demand.

What it serves without a fault is true: header hashes, receipts roots and blooms can be recomputed, reorganised blocks
stay known by hash. What it leaves out is execution: transactions are only hashes, the state and transactions roots mean
nothing. Several nodes may share one `FakeChain`, each with its own lag and its own faults.
"""

from __future__ import annotations

import asyncio
import gzip
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web
from eth_hash.auto import keccak

LogSpec = tuple[bytes, Sequence[bytes], bytes]  # address, topics, data
TxSpec = LogSpec | list[LogSpec]  # a log alone is the only log of its transaction

EMPTY_ROOT = bytes.fromhex("56e81f171bcc55a6ff8345e692c0f86e5b48e01b996cadc001622fb5e363b421")
EMPTY_UNCLES = bytes.fromhex("1dcc4de8dec75d7aab85b567b6ccd41ad312451b948a7413f0a142fd40d49347")
EMPTY_REQUESTS = bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
ZERO_BLOOM = bytes(256)
JOVIAN_EXTRA = bytes.fromhex("01000003e80000000500000000004c4b40")
DEPOSITOR = bytes.fromhex("deaddeaddeaddeaddeaddeaddeaddeaddead0001")
L1_BLOCK = bytes.fromhex("4200000000000000000000000000000000000015")
BASE_TIME = bytes.fromhex("4200000000000000000000000000000000000030")


def rlp(item: bytes | int | list[Any] | tuple[Any, ...]) -> bytes:
    if isinstance(item, int):
        item = item.to_bytes((item.bit_length() + 7) // 8, "big")
    if isinstance(item, bytes):
        if len(item) == 1 and item[0] < 0x80:
            return item
        return _length(len(item), 0x80) + item
    body = b"".join([rlp(each) for each in item])
    return _length(len(body), 0xC0) + body


def _length(size: int, offset: int) -> bytes:
    if size < 56:
        return bytes((offset + size,))
    raw = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((offset + 55 + len(raw),)) + raw


def trie_root(items: Sequence[bytes]) -> bytes:
    """The root of the trie {rlp(index): item}, as receipts and transactions are bound to a header."""
    if not items:
        return EMPTY_ROOT
    pairs = sorted(([n for byte in rlp(i) for n in (byte >> 4, byte & 15)], item) for i, item in enumerate(items))
    return keccak(rlp(_trie_node(pairs, 0)))


def _trie_node(pairs: list[tuple[list[int], bytes]], at: int) -> list[Any]:
    first, last = pairs[0][0], pairs[-1][0]
    if len(pairs) == 1:
        return [_compact(first[at:], leaf=True), pairs[0][1]]
    end = at
    while end < min(len(first), len(last)) and first[end] == last[end]:
        end += 1
    if end > at:
        return [_compact(first[at:end], leaf=False), _trie_ref(_trie_node(pairs, end))]
    branch: list[Any] = []
    for nibble in range(16):
        below = [pair for pair in pairs if len(pair[0]) > at and pair[0][at] == nibble]
        branch.append(_trie_ref(_trie_node(below, at + 1)) if below else b"")
    branch.append(next((value for key, value in pairs if len(key) == at), b""))
    return branch


def _trie_ref(node: list[Any]) -> Any:
    encoded = rlp(node)
    return node if len(encoded) < 32 else keccak(encoded)


def _compact(nibbles: list[int], *, leaf: bool) -> bytes:
    flag = 2 if leaf else 0
    full = [flag + 1, *nibbles] if len(nibbles) % 2 else [flag, 0, *nibbles]
    return bytes(full[i] << 4 | full[i + 1] for i in range(0, len(full), 2))


@lru_cache(maxsize=65_536)
def bloom_bits(item: bytes) -> int:
    digest, bits = keccak(item), 0
    for i in (0, 2, 4):
        bits |= 1 << (int.from_bytes(digest[i : i + 2], "big") & 2047)
    return bits


def bloom_of(logs: Iterable[LogSpec]) -> bytes:
    bits = 0
    for address, topics, _ in logs:
        bits |= bloom_bits(address)
        for topic in topics:
            bits |= bloom_bits(topic)
    return bits.to_bytes(256, "big") if bits else ZERO_BLOOM


def hx(raw: bytes) -> str:
    return "0x" + raw.hex()


class Block:
    """One block. Its logs are kept as the JSON that a node would send; everything else follows from these fields."""

    __slots__ = ("bloom", "entries", "gas_used", "hash", "number", "parent_hash", "receipts_root", "salt", "txs")

    number: int
    hash: bytes
    parent_hash: bytes
    salt: int
    bloom: bytes
    receipts_root: bytes
    gas_used: int
    txs: tuple[tuple[bytes, int], ...]  # hash, number of logs; deposits first
    entries: tuple[tuple[bytes, tuple[bytes, ...], bytes], ...]  # address, topics, JSON of the log


class FakeChain:
    """Blocks with true hashes, `block_ms` apart; with `first_fast_block`, 2 s before it and 200 ms from it on.

    `style` "op" gives the 21 header fields of Jovian, "london" the 16 of old; `deposits` puts the OP stack's system
    deposits (type 0x7e) in front of every block.
    """

    def __init__(
        self,
        chain_id: int = 84532,
        *,
        time_s: int = 1_790_000_000,
        block_ms: int = 2000,
        first_fast_block: int | None = None,
        style: str = "op",
        deposits: bool = False,
        salt: int = 0,
    ) -> None:
        self.chain_id, self.time_s, self.block_ms = chain_id, time_s, block_ms
        self.first_fast_block, self.style, self.deposits = first_fast_block, style, deposits
        self.canonical: list[Block] = []
        self.by_hash: dict[bytes, Block] = {}
        self.loud: list[int] = []  # numbers of canonical blocks with logs, ascending
        self.safe: int | None = 0
        self.finalized: int | None = 0
        self.code: dict[bytes, int] = {}  # address → block of its creation
        self.followers: list[Callable[[Block], None]] = []
        self._salt = salt
        self._append((), salt)

    @property
    def head(self) -> Block:
        return self.canonical[-1]

    def time_ms(self, number: int) -> int:
        if self.first_fast_block is None:
            return 1000 * self.time_s + self.block_ms * number
        slow = min(number, self.first_fast_block)
        return 1000 * self.time_s + 2000 * slow + 200 * (number - slow)

    def mine(self, logs: Sequence[TxSpec] = (), blocks: int = 1) -> Block:
        """`blocks` new blocks, the first of them with the logs. Returns the first."""
        first = self._append(logs, self._salt)
        for _ in range(blocks - 1):
            self._append((), self._salt)
        return first

    def reorganise(self, depth: int, blocks: Sequence[Sequence[TxSpec]] | None = None) -> Block:
        """Replace the `depth` newest blocks by `blocks` (default: as many empty ones). Returns the new head."""
        assert 0 < depth < len(self.canonical), "genesis stays"
        self._salt += 1
        self._cut(len(self.canonical) - depth)
        for logs in [()] * depth if blocks is None else blocks:
            self._append(logs, self._salt)
        return self.head

    def switch_to(self, head_hash: bytes) -> Block:
        """Make a known block the head again, whatever branch it is on (A → B → A)."""
        branch, block = [], self.by_hash[head_hash]
        while block.number >= len(self.canonical) or self.canonical[block.number] is not block:
            branch.append(block)
            block = self.by_hash[block.parent_hash]
        self._cut(block.number + 1)
        for each in reversed(branch):
            self._push(each)
        return self.head

    def fork(self) -> FakeChain:
        """Another chain that shares the blocks so far and goes its own way: a node on a minority fork."""
        other = FakeChain(
            self.chain_id,
            time_s=self.time_s,
            block_ms=self.block_ms,
            first_fast_block=self.first_fast_block,
            style=self.style,
            deposits=self.deposits,
            salt=self._salt,
        )
        other.canonical, other.loud = list(self.canonical), list(self.loud)
        other.by_hash, other.code = dict(self.by_hash), dict(self.code)
        other.safe, other.finalized = self.safe, self.finalized
        other._salt = self._salt + 1_000_003
        return other

    def logs(
        self, from_block: int, to_block: int, addresses: frozenset[bytes] | None, topics: list[Any]
    ) -> list[bytes]:
        found: list[bytes] = []
        for at in range(bisect_left(self.loud, from_block), len(self.loud)):
            number = self.loud[at]
            if number > to_block:
                break
            found += self.logs_in(self.canonical[number], addresses, topics)
        return found

    @staticmethod
    def logs_in(block: Block, addresses: frozenset[bytes] | None, topics: list[Any]) -> list[bytes]:
        return [
            encoded
            for address, log_topics, encoded in block.entries
            if (addresses is None or address in addresses) and (not topics or _topics_match(log_topics, topics))
        ]

    def header(self, block: Block, *, full: bool = False, transactions: bool = True) -> dict[str, Any]:
        """The block as eth_getBlockByNumber (or, without transactions, newHeads) shows it."""
        shown: dict[str, Any] = {
            name: hx(value) if isinstance(value, bytes) else hex(value) for name, value in self._fields(block).items()
        }
        shown |= {"hash": hx(block.hash), "size": "0x400", "uncles": []}
        if self.style == "op":
            shown["withdrawals"] = []
            if self.first_fast_block is not None and block.number >= self.first_fast_block:
                shown["timestampMs"] = hex(self.time_ms(block.number))
        if transactions:
            shown["transactions"] = (
                [self._transaction(block, i) for i in range(len(block.txs))]
                if full
                else [hx(tx) for tx, _ in block.txs]
            )
        return shown

    def receipts(self, block: Block) -> list[dict[str, Any]]:
        logs = [msgspec.json.decode(encoded) for _, _, encoded in block.entries]
        receipts, taken = [], 0
        deposits = self._deposit_count(block.number)
        for index, (tx_hash, count) in enumerate(block.txs):
            own = logs[taken : taken + count]
            taken += count
            specs = [
                (bytes.fromhex(each["address"][2:]), [bytes.fromhex(t[2:]) for t in each["topics"]], b"")
                for each in own
            ]
            receipt = {
                "transactionHash": hx(tx_hash),
                "transactionIndex": hex(index),
                "blockHash": hx(block.hash),
                "blockNumber": hex(block.number),
                "type": "0x7e" if index < deposits else "0x2",
                "status": "0x1",
                "cumulativeGasUsed": hex(_gas(index)),
                "gasUsed": hex(50_000),
                "logsBloom": hx(bloom_of(specs)),
                "logs": own,
                "from": hx(DEPOSITOR),
                "to": own[0]["address"] if own else hx(L1_BLOCK),
                "contractAddress": None,
                "effectiveGasPrice": "0x1",
            }
            if index < deposits:
                receipt |= {"depositNonce": hex(_deposit_nonce(block.number, index)), "depositReceiptVersion": "0x1"}
            receipts.append(receipt)
        return receipts

    def _deposit_count(self, number: int) -> int:
        if not self.deposits or number == 0:
            return 0
        return 2 if self.first_fast_block is not None and number >= self.first_fast_block else 1

    def _transaction(self, block: Block, index: int) -> dict[str, Any]:
        deposit = index < self._deposit_count(block.number)
        return {
            "hash": hx(block.txs[index][0]),
            "type": "0x7e" if deposit else "0x2",
            "transactionIndex": hex(index),
            "blockHash": hx(block.hash),
            "blockNumber": hex(block.number),
            "from": hx(DEPOSITOR),
            "to": hx((L1_BLOCK, BASE_TIME)[index]) if deposit else hx(DEPOSITOR),
            "input": "0x",
        }

    def _fields(self, block: Block) -> dict[str, bytes | int]:
        """The hashed fields in their order (facts/base.md, section 2)."""
        salted = block.salt.to_bytes(8, "big") + block.number.to_bytes(24, "big")
        fields: dict[str, bytes | int] = {
            "parentHash": block.parent_hash,
            "sha3Uncles": EMPTY_UNCLES,
            "miner": bytes.fromhex("4200000000000000000000000000000000000011"),
            "stateRoot": salted,
            "transactionsRoot": EMPTY_ROOT if not block.txs else b"".join(tx[:4] for tx, _ in block.txs[:8]).ljust(32),
            "receiptsRoot": block.receipts_root,
            "logsBloom": block.bloom,
            "difficulty": 0,
            "number": block.number,
            "gasLimit": 40_000_000,
            "gasUsed": block.gas_used,
            "timestamp": self.time_ms(block.number) // 1000,
            "extraData": JOVIAN_EXTRA if self.style == "op" else b"",
            "mixHash": salted,
            "nonce": bytes(8),
            "baseFeePerGas": 5_000_000,
        }
        if self.style == "op":
            fields |= {
                "withdrawalsRoot": EMPTY_ROOT,
                "blobGasUsed": block.gas_used,
                "excessBlobGas": 0,
                "parentBeaconBlockRoot": bytes(32),
                "requestsHash": EMPTY_REQUESTS,
            }
        return fields

    def _append(self, txs: Sequence[TxSpec], salt: int) -> Block:
        block = Block()
        block.number, block.salt = len(self.canonical), salt
        block.parent_hash = self.canonical[-1].hash if self.canonical else bytes(32)
        block.entries, block.bloom, block.receipts_root, block.gas_used, block.txs = (), ZERO_BLOOM, EMPTY_ROOT, 0, ()
        groups = [list(tx) if isinstance(tx, list) else [tx] for tx in txs]
        deposits = self._deposit_count(block.number)
        if groups or deposits:
            self._fill(block, groups, deposits)
        block.hash = keccak(rlp(list(self._fields(block).values())))
        if groups:
            block.entries = self._entries(block, groups, deposits)
        self.by_hash[block.hash] = block
        self._push(block)
        return block

    def _fill(self, block: Block, groups: list[list[LogSpec]], deposits: int) -> None:
        seen: Counter[bytes] = Counter()
        hashes: list[tuple[bytes, int]] = [
            (keccak(b"deposit" + bytes([i]) + block.number.to_bytes(8, "big") + block.parent_hash), 0)
            for i in range(deposits)
        ]
        receipts = [
            b"\x7e" + rlp([1, _gas(i), ZERO_BLOOM, [], _deposit_nonce(block.number, i), 1]) for i in range(deposits)
        ]
        for index, group in enumerate(groups, deposits):
            # the same logs in another block are the same transaction, included again
            content = b"".join(address + b"".join(topics) + data for address, topics, data in group)
            hashes.append((keccak(content + bytes([seen[content]])), len(group)))
            seen[content] += 1
            logs = [[address, list(topics), data] for address, topics, data in group]
            receipts.append(b"\x02" + rlp([1, _gas(index), bloom_of(group), logs]))
        block.txs = tuple(hashes)
        block.bloom = bloom_of([log for group in groups for log in group])
        block.receipts_root = trie_root(receipts)
        block.gas_used = _gas(len(hashes) - 1)

    def _entries(
        self, block: Block, groups: list[list[LogSpec]], deposits: int
    ) -> tuple[tuple[bytes, tuple[bytes, ...], bytes], ...]:
        time_ms = self.time_ms(block.number)
        tail = f'"blockNumber":"{hex(block.number)}","blockHash":"{hx(block.hash)}"'
        tail += f',"blockTimestamp":"{hex(time_ms // 1000)}"'
        if self.first_fast_block is not None and block.number >= self.first_fast_block:
            tail += f',"blockTimestampMs":"{hex(time_ms)}"'
        entries = []
        for tx_index, group in enumerate(groups, deposits):
            bound = f'{tail},"transactionHash":"{hx(block.txs[tx_index][0])}","transactionIndex":"{hex(tx_index)}"'
            for address, topics, data in group:
                shown = ",".join([f'"{hx(topic)}"' for topic in topics])
                text = (
                    f'{{"address":"{hx(address)}","topics":[{shown}],"data":"{hx(data)}",{bound},'
                    f'"logIndex":"{hex(len(entries))}","removed":false}}'
                )
                entries.append((address, tuple(topics), text.encode()))
        return tuple(entries)

    def _push(self, block: Block) -> None:
        self.canonical.append(block)
        if block.entries:
            self.loud.append(block.number)
        for follow in self.followers:
            follow(block)

    def _cut(self, length: int) -> None:
        del self.canonical[length:]
        del self.loud[bisect_left(self.loud, length) :]


def _gas(index: int) -> int:
    return 50_000 * (index + 1)


def _deposit_nonce(number: int, index: int) -> int:
    return 2 * number + 3 + index


def _topics_match(log_topics: tuple[bytes, ...], wanted: list[Any]) -> bool:
    for at, choice in enumerate(wanted):
        if choice is None:
            continue
        if at >= len(log_topics) or log_topics[at] not in choice:
            return False
    return True


class RpcFailure(Exception):
    def __init__(self, code: int, message: str, data: object = None) -> None:
        super().__init__(message)
        self.error: dict[str, Any] = {"code": code, "message": message} | ({} if data is None else {"data": data})


Act = Callable[[web.Request, bytes], Awaitable[web.StreamResponse]]


@dataclass
class Fault:
    """What happens to a call of `method` ("*": any), at most `times` times (None: always), where `when(params)`."""

    method: str
    times: int | None = 1
    when: Callable[[list[Any]], bool] | None = None
    error: RpcFailure | None = None
    status: int = 200
    lie: Callable[[list[Any], Any], Any] | None = None
    seconds: float = 0.0
    transport: Act | None = None  # answers the whole HTTP request in place of the node; gets the true body
    hits: int = 0

    def takes(self, method: str, params: list[Any]) -> bool:
        if self.method not in ("*", method) or self.times == 0 or (self.when and not self.when(params)):
            return False
        self.hits += 1
        if self.times is not None:
            self.times -= 1
        return True


@dataclass
class FakeNode:
    """One endpoint on a chain: `async with FakeNode() as node:`, then node.url, node.mine(…), node.fail(…)."""

    chain_id: int = 84532
    chain: FakeChain = None  # type: ignore[assignment]  # made in __post_init__ unless it is shared
    options: dict[str, Any] = field(default_factory=dict)  # of FakeChain

    lag: int = 0  # blocks that this node is behind its chain
    safe: int | None = -1  # -1: what the chain says
    finalized: int | None = -1
    max_span: int | None = None  # blocks of one eth_getLogs, inclusive
    max_results: int | None = None
    max_batch: int | None = None
    max_addresses: int | None = None
    max_rate: int | None = None  # calls in any second; the rest is refused with status 429
    beyond_head: str = "error"  # or "empty", as proxyd answers
    missing_tag: str = "null"  # or "-32000", "-32001", "-39001": how an unset safe or finalized is answered
    batch_lie: Callable[[list[Any]], Any] | None = None  # the list of answers → what is sent
    silent: bool = False  # the websocket accepts, and says nothing more
    gzip: bool = False

    def __post_init__(self) -> None:
        if self.chain is None:
            self.chain = FakeChain(self.chain_id, **self.options)
        self.chain_id = self.chain.chain_id
        self.faults: list[Fault] = []
        self.calls: Counter[str] = Counter()
        self.requests = 0
        self.asked: deque[tuple[str, list[Any]]] = deque(maxlen=10_000)
        self.batches: deque[int] = deque(maxlen=10_000)  # sizes
        self.limited = 0  # requests that were refused for being too many
        self._taken: deque[float] = deque()
        self.answering = self.answering_most = 0
        self.sockets: set[web.WebSocketResponse] = set()
        self._heads: dict[web.WebSocketResponse, asyncio.Queue[bytes]] = {}
        self.subscriptions: dict[web.WebSocketResponse, str] = {}
        self._subscription = 0
        self._closing = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self.port = 0

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def __aenter__(self) -> FakeNode:
        await self.start()
        self.chain.followers.append(self._announce)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.chain.followers.remove(self._announce)
        await self.stop()

    def move_to(self, chain: FakeChain) -> None:
        """From now on it is a node of that chain."""
        self.chain.followers.remove(self._announce)
        self.chain = chain
        chain.followers.append(self._announce)

    async def start(self) -> None:
        """Listen; after `stop`, again on the same port."""
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._closing = asyncio.Event()
        self._runner = web.AppRunner(app, shutdown_timeout=0.5, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def stop(self) -> None:
        """Refuse connections from now on, and drop the open ones."""
        self._closing.set()
        for socket in list(self.sockets):
            await socket.close(code=WSCloseCode.GOING_AWAY)
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    # ── the chain ─────────────────────────────────────────────────────────────────────────────────────────────────

    def mine(self, logs: Sequence[TxSpec] = (), blocks: int = 1) -> Block:
        return self.chain.mine(logs, blocks)

    def reorganise(self, depth: int, blocks: Sequence[Sequence[TxSpec]] | None = None) -> Block:
        return self.chain.reorganise(depth, blocks)

    def set_tags(self, *, safe: int | None, finalized: int | None) -> None:
        """The chain's tags, for all of its nodes; None: no such block yet."""
        self.chain.safe, self.chain.finalized = safe, finalized

    @property
    def head(self) -> int:
        """The height that this node knows."""
        return max(0, self.chain.head.number - self.lag)

    # ── faults ────────────────────────────────────────────────────────────────────────────────────────────────────

    def fault(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def heal(self) -> None:
        self.faults.clear()
        self.batch_lie = None
        self.silent = False

    def fail(
        self,
        method: str,
        code: int,
        message: str,
        data: object = None,
        *,
        status: int = 200,
        times: int | None = 1,
        when: Callable[[list[Any]], bool] | None = None,
    ) -> Fault:
        return self.fault(Fault(method, times, when, error=RpcFailure(code, message, data), status=status))

    def lie(
        self,
        method: str,
        lie: Callable[[list[Any], Any], Any],
        *,
        times: int | None = 1,
        when: Callable[[list[Any]], bool] | None = None,
    ) -> Fault:
        """`lie(params, true result)` is the result."""
        return self.fault(Fault(method, times, when, lie=lie))

    def hide_logs(self, *, times: int | None = 1) -> Fault:
        return self.lie("eth_getLogs", lambda _, __: [], times=times)

    def drop_log(self, at: int = 0, *, times: int | None = 1) -> Fault:
        return self.lie("eth_getLogs", lambda _, logs: logs[:at] + logs[at + 1 :], times=times)

    def delay(self, method: str, seconds: float, *, times: int | None = 1) -> Fault:
        return self.fault(Fault(method, times, seconds=seconds))

    def reply(
        self,
        method: str,
        body: bytes | str,
        *,
        status: int = 200,
        headers: dict[str, str] | None = None,
        times: int | None = 1,
    ) -> Fault:
        """This body instead of the node's, for the whole HTTP request."""
        raw = body.encode() if isinstance(body, str) else body

        async def act(_: web.Request, __: bytes) -> web.StreamResponse:
            return web.Response(body=raw, status=status, headers={"Content-Type": "text/html"} | (headers or {}))

        return self.fault(Fault(method, times, transport=act))

    def hang(self, method: str, *, times: int | None = 1) -> Fault:
        async def act(_: web.Request, __: bytes) -> web.StreamResponse:
            await self._closing.wait()
            return web.Response(status=503)

        return self.fault(Fault(method, times, transport=act))

    def drip(self, method: str, *, every: float = 0.05, times: int | None = 1) -> Fault:
        """The true answer, a byte at a time."""

        async def act(request: web.Request, body: bytes) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            for at in range(len(body)):
                await response.write(body[at : at + 1])
                try:
                    await asyncio.wait_for(self._closing.wait(), every)
                    break
                except TimeoutError:
                    continue
            return response

        return self.fault(Fault(method, times, transport=act))

    def reset(self, method: str, *, after: int = 20, times: int | None = 1) -> Fault:
        """Drop the connection after so many bytes of a body that promised more."""

        async def act(request: web.Request, body: bytes) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Length": str(len(body) + after)})
            await response.prepare(request)
            await response.write(body[:after])
            assert request.transport is not None
            request.transport.abort()
            return response

        return self.fault(Fault(method, times, transport=act))

    def truncate(self, method: str, *, keep: float = 0.5, times: int | None = 1) -> Fault:
        """A body that ends too early and looks whole to HTTP."""

        async def act(_: web.Request, body: bytes) -> web.StreamResponse:
            return web.Response(body=body[: int(len(body) * keep)], content_type="application/json")

        return self.fault(Fault(method, times, transport=act))

    def bad_gzip(self, method: str, *, times: int | None = 1) -> Fault:
        async def act(_: web.Request, body: bytes) -> web.StreamResponse:
            broken = bytearray(gzip.compress(body))
            broken[12:20] = b"\xff" * 8
            return web.Response(body=bytes(broken), headers={"Content-Encoding": "gzip"})

        return self.fault(Fault(method, times, transport=act))

    def flood(self, method: str, *, total: int = 200 * 2**20, announce: bool = False, times: int | None = 1) -> Fault:
        """A body of `total` bytes; `node.flooded` counts those that were written before the client hung up."""

        async def act(request: web.Request, _: bytes) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Length": str(total)} if announce else None)
            await response.prepare(request)
            chunk = b" " * 2**18
            try:
                while self.flooded < total:
                    await response.write(chunk[: total - self.flooded])
                    self.flooded += len(chunk)
            except ConnectionError:
                pass
            return response

        self.flooded = 0
        return self.fault(Fault(method, times, transport=act))

    flooded: int = 0

    # ── websocket ─────────────────────────────────────────────────────────────────────────────────────────────────

    def send_raw(self, text: str | bytes) -> None:
        """Any text, to all subscribers of newHeads."""
        for queue in self._heads.values():
            queue.put_nowait(text.encode() if isinstance(text, str) else text)

    def repeat_head(self) -> None:
        self._announce(self.chain.head)

    async def abort_sockets(self) -> None:
        """Cut the websockets without a closing handshake."""
        for socket in list(self.sockets):
            assert socket._req is not None and socket._req.transport is not None
            socket._req.transport.abort()

    async def close_sockets(self, code: int = 1001) -> None:
        for socket in list(self.sockets):
            await socket.close(code=code)

    @property
    def subscribers(self) -> int:
        return len(self._heads)

    def _announce(self, block: Block) -> None:
        if self.silent or not self._heads:
            return
        shown = self.chain.canonical[max(0, block.number - self.lag)]
        result = self.chain.header(shown, transactions=False)
        for socket, queue in self._heads.items():
            note = {"subscription": self.subscriptions[socket], "result": result}
            queue.put_nowait(msgspec.json.encode({"jsonrpc": "2.0", "method": "eth_subscription", "params": note}))

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets.add(socket)
        sender: asyncio.Task[None] | None = None
        try:
            async for message in socket:
                if message.type is not WSMsgType.TEXT:
                    continue
                call = msgspec.json.decode(message.data)
                answer = await self._answer(call)
                if call["method"] == "eth_subscribe" and "result" in answer:
                    self._subscription += 1
                    answer["result"] = self.subscriptions[socket] = hex(self._subscription)
                    await socket.send_str(msgspec.json.encode(answer).decode())
                    queue: asyncio.Queue[bytes] = asyncio.Queue()
                    self._heads[socket] = queue
                    sender = asyncio.create_task(self._send_heads(socket, queue))
                else:
                    await socket.send_str(msgspec.json.encode(answer).decode())
        finally:
            self._heads.pop(socket, None)
            self.subscriptions.pop(socket, None)
            self.sockets.discard(socket)
            if sender:
                sender.cancel()
        return socket

    @staticmethod
    async def _send_heads(socket: web.WebSocketResponse, queue: asyncio.Queue[bytes]) -> None:
        while not socket.closed:
            text = await queue.get()
            try:
                await socket.send_str(text.decode())
            except ConnectionError:
                return

    # ── HTTP ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() == "websocket":
            for fault in self.faults:
                if fault.transport and fault.takes("websocket", []):
                    return await fault.transport(request, b"")
            return await self._socket(request)
        self.requests += 1
        self.answering += 1
        self.answering_most = max(self.answering_most, self.answering)
        try:
            return await self._post(request)
        finally:
            self.answering -= 1

    def _takes(self, calls: int) -> bool:
        now = asyncio.get_running_loop().time()
        while self._taken and self._taken[0] < now - 1:
            self._taken.popleft()
        if self.max_rate is not None and len(self._taken) + calls > self.max_rate:
            return False
        self._taken.extend([now] * calls)
        return True

    async def _post(self, request: web.Request) -> web.StreamResponse:
        asked = msgspec.json.decode(await request.read())
        calls = asked if isinstance(asked, list) else [asked]
        if not self._takes(len(calls)):
            self.limited += 1
            error = {"code": -32016, "message": "over rate limit"}
            return web.json_response({"jsonrpc": "2.0", "id": None, "error": error}, status=429)
        acts = [
            fault.transport
            for call in calls
            for fault in self.faults
            if fault.transport and fault.takes(call["method"], call.get("params", []))
        ][:1]
        status, answer = 200, None
        if isinstance(asked, list):
            self.batches.append(len(asked))
            if self.max_batch is not None and len(asked) > self.max_batch:
                error = {"code": -32014, "message": "too many RPC calls in batch request"}
                answer = {"jsonrpc": "2.0", "id": None, "error": error}
                status = 413
            else:
                answer = [await self._answer(call) for call in asked]
                if self.batch_lie:
                    answer = self.batch_lie(answer)
        else:
            answer = await self._answer(asked)
            status = answer.pop("status", 200)
        if isinstance(answer, list):
            for each in answer:
                each.pop("status", None)
        body = msgspec.json.encode(answer)
        if acts:
            return await acts[0](request, body)
        response = web.Response(body=body, status=status, content_type="application/json")
        if self.gzip:
            response.enable_compression(web.ContentCoding.gzip)
        return response

    async def _answer(self, call: dict[str, Any]) -> dict[str, Any]:
        method, params = call["method"], call.get("params", [])
        self.calls[method] += 1
        self.asked.append((method, params))
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": call.get("id")}
        faults = [fault for fault in self.faults if not fault.transport and fault.takes(method, params)]
        for fault in faults:
            if fault.seconds:
                await asyncio.sleep(fault.seconds)
            if fault.error:
                return answer | {"error": fault.error.error, "status": fault.status}
        try:
            result = self._result(method, params)
        except RpcFailure as failure:
            return answer | {"error": failure.error}
        for fault in faults:
            if fault.lie:
                result = fault.lie(params, msgspec.json.decode(msgspec.json.encode(result)))
        return answer | {"result": result}

    # ── methods ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _result(self, method: str, params: list[Any]) -> Any:
        match method:
            case "eth_chainId":
                return hex(self.chain_id)
            case "eth_blockNumber":
                return hex(self.head)
            case "eth_subscribe":
                return "0x0"
            case "eth_getBlockByNumber" | "eth_getHeaderByNumber":
                return self._shown(self._by_number(params[0]), params)
            case "eth_getBlockByHash" | "eth_getHeaderByHash":
                return self._shown(self._by_hash(params[0]), params)
            case "eth_getLogs":
                return self._logs(params[0])
            case "eth_getBlockReceipts":
                at = params[0].get("blockHash") if isinstance(params[0], dict) else params[0]
                block = self._by_hash(at) if len(at) == 66 else self._by_number(at)
                return None if block is None else self.chain.receipts(block)
            case "eth_getTransactionReceipt":
                wanted = bytes.fromhex(params[0][2:])
                for block in reversed(self.chain.canonical[: self.head + 1]):
                    for index, (tx_hash, _) in enumerate(block.txs):
                        if tx_hash == wanted:
                            return self.chain.receipts(block)[index]
                return None
            case "eth_getCode":
                created = self.chain.code.get(bytes.fromhex(params[0][2:]))
                at_block = self._by_number(params[1])
                if at_block is None:
                    raise RpcFailure(-32000, "header not found")
                return "0x" if created is None or at_block.number < created else "0x6001"
        raise RpcFailure(-32601, f"the method {method} does not exist/is not available")

    def _shown(self, block: Block | None, params: list[Any]) -> dict[str, Any] | None:
        return None if block is None else self.chain.header(block, full=len(params) > 1 and bool(params[1]))

    def _by_hash(self, text: str) -> Block | None:
        block = self.chain.by_hash.get(bytes.fromhex(text[2:]))
        return block if block is not None and block.number <= self.head else None

    def _by_number(self, at: str) -> Block | None:
        if at in ("safe", "finalized"):
            own = self.safe if at == "safe" else self.finalized
            number = (self.chain.safe if at == "safe" else self.chain.finalized) if own == -1 else own
            if number is None:
                if self.missing_tag != "null":
                    text = {"-32001": f"block not found: {at}", "-39001": "Unknown block"}
                    raise RpcFailure(int(self.missing_tag), text.get(self.missing_tag, f"{at} block not found"))
                return None
        else:
            number = {"latest": self.head, "pending": self.head, "earliest": 0}.get(at)
            if number is None:
                number = int(at, 16)
        return self.chain.canonical[number] if 0 <= number <= self.head else None

    def _logs(self, query: dict[str, Any]) -> list[msgspec.Raw]:
        wanted = query.get("address")
        addresses = None
        if wanted is not None:
            several = [wanted] if isinstance(wanted, str) else wanted
            if self.max_addresses is not None and len(several) > self.max_addresses:
                raise RpcFailure(-32602, "exceed max addresses or topics per search position")
            addresses = frozenset(bytes.fromhex(each[2:]) for each in several)
        topics = [
            None if t is None else frozenset(bytes.fromhex(x[2:]) for x in ([t] if isinstance(t, str) else t))
            for t in query.get("topics") or []
        ]
        if "blockHash" in query:
            block = self._by_hash(query["blockHash"])
            if block is None:
                raise RpcFailure(-32000, "unknown block")
            return [msgspec.Raw(log) for log in self.chain.logs_in(block, addresses, topics)]
        start, end = (self._height(query.get(key, "latest")) for key in ("fromBlock", "toBlock"))
        if start > end:
            raise RpcFailure(-32602, "invalid block range params")
        if end > self.head:
            if self.beyond_head == "empty":
                return []
            raise RpcFailure(-32602, "block range extends beyond current head block")
        if self.max_span is not None and end - start + 1 > self.max_span:
            raise RpcFailure(-32614, f"eth_getLogs is limited to a {self.max_span:,} range")
        found = self.chain.logs(start, end, addresses, topics)
        if self.max_results is not None and len(found) > self.max_results:
            raise RpcFailure(-32005, f"query returned more than {self.max_results} results")
        return [msgspec.Raw(log) for log in found]

    def _height(self, at: str) -> int:
        if at.startswith("0x"):
            return int(at, 16)
        block = self._by_number(at)
        if block is None:
            raise RpcFailure(-32000, f"{at} block not found")
        return block.number
