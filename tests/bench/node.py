"""A node that is never the bottleneck: the whole history as JSON in memory, an answer is a slice of it.

A process of its own (`python -m tests.bench.node '{"blocks": …}'`), which prints its port when it is ready (and that of a second
endpoint, which leaves logs out, where the shape says so) and counts what it is asked. It knows just what reading history takes; `tests/fake_node.py` is the truthful one.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from typing import Any, ClassVar

import msgspec

from tests.bench.history import BLOCK_S, CHAIN_ID, Shape, digest, header, logs_of, time_s

_HEAD = b'{"jsonrpc":"2.0","id":'


class History:
    """All logs in chain order, joined by commas, and where each begins, what block it is of, and who logged it."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self._began = shape, time.monotonic()
        self.starts: list[int] = []
        self.blocks: list[int] = []
        self.keys: list[tuple[str, str]] = []  # emitter, topic0
        self.emitters: dict[str, int] = {}  # → its first block
        self.headers: list[dict[str, str]] = []
        parts: list[bytes] = []
        at = 0
        block_hash, shown_header = header(0, bytes(32), [])
        self.headers.append(shown_header)
        for number, events in logs_of(shape):
            block_hash, shown_header = header(number, block_hash, events)
            self.headers.append(shown_header)
            tail = f'"blockNumber":"{hex(number)}","blockHash":"0x{block_hash.hex()}"'
            tail += f',"blockTimestamp":"{hex(time_s(number))}"'
            for index, (emitter, topics, data) in enumerate(events):
                address, shown = "0x" + emitter.hex(), ["0x" + topic.hex() for topic in topics]
                text = (
                    f'{{"address":"{address}","topics":{json.dumps(shown, separators=(",", ":"))},"data":"0x{data.hex()}",'
                    f'{tail},"transactionHash":"0x{digest("tx", number, index).hex()}","transactionIndex":"{hex(index)}",'
                    f'"logIndex":"{hex(index)}","removed":false}},'
                ).encode()
                self.starts.append(at)
                self.blocks.append(number)
                self.keys.append((address, shown[0]))
                self.emitters.setdefault(address, number)
                parts.append(text)
                at += len(text)
        self.starts.append(at)
        self.text = memoryview(b"".join(parts))

    @property
    def last(self) -> int:
        grown = int((time.monotonic() - self._began) / BLOCK_S)
        return self.shape.blocks - max(0, self.shape.growing - grown)

    def withholds(self, at: int) -> bool:
        """Whether the second endpoint leaves out this log."""
        return at % self.shape.withheld == self.shape.withheld // 2

    def logs(self, query: dict[str, Any], *, whole: bool = True) -> list[bytes | memoryview]:
        first = bisect_left(self.blocks, int(query["fromBlock"], 16))
        last = bisect_right(self.blocks, min(self.last, int(query["toBlock"], 16)))
        if first >= last:
            return []
        addresses, topics = _several(query.get("address")), _several((query.get("topics") or [None])[0])
        missing = {e for e, born in self.emitters.items() if born <= self.blocks[last - 1]} - (addresses or set())
        if whole and topics is None and (addresses is None or not missing):
            return [self.text[self.starts[first] : self.starts[last] - 1]]
        found: list[bytes | memoryview] = [
            self.text[self.starts[at] : self.starts[at + 1]]
            for at in range(first, last)
            if (addresses is None or self.keys[at][0] in addresses)
            and (topics is None or self.keys[at][1] in topics)
            and (whole or not self.withholds(at))
        ]
        if found:
            found[-1] = found[-1][:-1]
        return found


def _several(wanted: Any) -> set[str] | None:
    if wanted is None:
        return None
    return {wanted.lower()} if isinstance(wanted, str) else {each.lower() for each in wanted}


class Node(asyncio.Protocol):
    """One connection: HTTP/1.1 with Content-Length, kept alive."""

    history: History
    calls: ClassVar[Counter[str]] = Counter()
    whole: ClassVar[bool] = True

    def __init__(self) -> None:
        self._got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._got += data
        while (end := self._got.find(b"\r\n\r\n")) >= 0:
            size = 0
            for line in self._got[:end].split(b"\r\n")[1:]:
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    size = int(value)
            if len(self._got) < end + 4 + size:
                return
            body = self._got[end + 4 : end + 4 + size]
            self._got = self._got[end + 4 + size :]
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        asked = msgspec.json.decode(body)
        parts: list[bytes | memoryview] = []
        if isinstance(asked, list):
            parts.append(b"[")
            for place, call in enumerate(asked):
                parts += [b","] if place else []
                parts += self._call(call)
            parts.append(b"]")
        else:
            parts += self._call(asked)
        length = sum(len(part) for part in parts)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % length
        self._transport.writelines([head, *parts])

    def _call(self, call: dict[str, Any]) -> list[bytes | memoryview]:
        method, params = call["method"], call.get("params") or []
        if method != "bench_calls":
            self.calls[method] += 1
        head = _HEAD + msgspec.json.encode(call.get("id"))
        match method:
            case "eth_getLogs":
                return [head, b',"result":[', *self.history.logs(params[0], whole=self.whole), b"]}"]
            case "eth_getBlockByNumber":
                result: Any = self._header(params[0])
            case "eth_chainId" | "net_version":
                result = hex(CHAIN_ID)
            case "eth_blockNumber":
                result = hex(self.history.last)
            case "eth_getCode":
                result = "0x" if params[1] == "0x0" else "0x6001"
            case "bench_calls":
                result = dict(self.calls)
                self.calls.clear()
            case _:
                error = {"code": -32601, "message": f"the method {method} does not exist/is not available"}
                return [head, b',"error":', msgspec.json.encode(error), b"}"]
        return [head, b',"result":', msgspec.json.encode(result), b"}"]

    def _header(self, at: str) -> dict[str, str] | None:
        number = self.history.last if at in ("latest", "safe", "finalized") else int(at, 16)
        return self.history.headers[number] if number <= self.history.last else None


class Withholding(Node):
    whole = False


async def serve(shape: Shape) -> None:
    Node.history = History(shape)
    kinds = (Node, Withholding) if shape.withheld else (Node,)
    servers = [await asyncio.get_running_loop().create_server(kind, "127.0.0.1", 0) for kind in kinds]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await servers[0].serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(msgspec.json.decode(sys.argv[1], type=Shape)))
