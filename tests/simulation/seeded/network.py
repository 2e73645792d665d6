"""TCP in memory: what is written arrives whole and in order, later, unless somebody dies or the seed breaks the line.

aiohttp runs on it unchanged, client and server: so the product's own HTTP code, the fake nodes, the partners' simulators and
the receivers of webhooks are what they are in every other ring.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import random
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Any

from tests.simulation.seeded.loop import PROCESS, Process, VirtualLoop

Address = tuple[str, int]


class Network:
    """All listeners, and the weather between them: `slow` is the share of deliveries that take `latency` seconds."""

    def __init__(self, loop: VirtualLoop, seed: int, *, slow: float = 0.3, latency: float = 0.004) -> None:
        self.loop, self.slow, self.latency = loop, slow, latency
        self.rng = random.Random(f"network {seed}")
        self._listeners: dict[Address, _Listener] = {}
        self._ports = itertools.count(20_000)
        self._clients = itertools.count(40_000)
        self._going: dict[int, Address] = {}
        self._names: dict[str, int] = {}

    def listen(self, factory: Callable[[], Any], host: str, port: int) -> _Listener:
        address = (host, port or next(self._ports))
        if address in self._listeners:
            raise OSError(errno.EADDRINUSE, f"{address} is taken")
        listener = self._listeners[address] = _Listener(self, factory, address)
        return listener

    async def connect(self, sock: Any, address: Address) -> None:
        if self.rng.random() < self.slow:
            await asyncio.sleep(self.rng.expovariate(1 / self.latency))
        if address[:2] not in self._listeners:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        self._going[sock.fileno()] = address[:2]

    def connected(self, factory: Callable[[], Any], sock: Any) -> tuple[Wire, Any]:
        address = self._going.pop(sock.fileno())
        sock.close()
        listener = self._listeners.get(address)
        if listener is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        own = ("127.0.0.1", next(self._clients))
        name = f"{PROCESS.get().name if PROCESS.get() else 'world'}→{address[1]}"  # type: ignore[union-attr]
        self._names[name] = self._names.get(name, 0) + 1
        name += f"#{self._names[name]}"
        client = Wire(self, factory(), name, own, address, copy_context())
        server = Wire(
            self, listener.context.copy().run(listener.factory), "…" + name, address, own, listener.context.copy()
        )
        client.peer, server.peer = server, client
        client.protocol.connection_made(client)
        server.context.run(server.protocol.connection_made, server)
        listener.wires[server] = None
        return client, client.protocol

    def close(self, address: Address) -> None:
        self._listeners.pop(address, None)


class _Socket:
    def __init__(self, address: Address) -> None:
        self._address = address

    def getsockname(self) -> Address:
        return self._address


class _Listener(asyncio.AbstractServer):
    def __init__(self, network: Network, factory: Callable[[], Any], address: Address) -> None:
        self.network, self.factory, self.address = network, factory, address
        self.context: Context = copy_context()
        self.wires: dict[Wire, None] = {}
        self.sockets = [_Socket(address)]
        self.process = PROCESS.get()
        if self.process is not None:
            self.process.connections[self] = None

    def close(self) -> None:
        self.network.close(self.address)

    cut = close

    def frozen(self) -> None:
        return

    async def wait_closed(self) -> None:
        return

    def is_serving(self) -> bool:
        return self.address in self.network._listeners


class Wire(asyncio.Transport):
    """One end of a connection."""

    peer: Wire

    def __init__(
        self, network: Network, protocol: Any, name: str, own: Address, other: Address, context: Context
    ) -> None:
        super().__init__({"sockname": own, "peername": other})
        self.network, self.protocol, self.name, self.context = network, protocol, name, context
        self._loop = network.loop
        self._inbox: list[bytes] = []
        self._end: BaseException | bool = False  # True: the peer closed; an error: it broke
        self._paused = self._closing = self._lost = self._waiting = False
        self._process: Process | None = context.get(PROCESS)
        if self._process is not None:
            self._process.connections[self] = None

    # ------------------------------------------------------------------ arriving

    def arrives(self, data: bytes) -> None:
        if self._lost or self._closing:
            return
        self._inbox.append(data)
        self._schedule()

    def ends(self, how: BaseException | bool) -> None:
        if not self._lost and not self._end:
            self._end = how
            self._schedule()

    def _schedule(self) -> None:
        if self._waiting or self in self._loop.outstanding:
            return
        network = self.network
        if network.rng.random() < network.slow:
            self._waiting = True
            context = copy_context()
            context.run(PROCESS.set, None)
            self._loop.call_later(network.rng.expovariate(1 / network.latency), self._due, context=context)
        else:
            self._loop.outstanding[self] = None

    def _due(self) -> None:
        self._waiting = False
        if not self._lost:
            self._loop.outstanding[self] = None

    def ready(self) -> bool:
        return not self._paused and (self._process is None or self._process.runs)

    def step(self) -> None:
        """Everything that has arrived is read at once."""
        del self._loop.outstanding[self]
        if self._lost:
            return
        if self._inbox:
            data, self._inbox = b"".join(self._inbox), []
            self._loop.note(self.name, len(data))
            self._loop.call_soon(self._read, data, context=self.context)
            if self._end:
                self._loop.outstanding[self] = None
        elif self._end:
            self._loop.note(self.name, "ends")
            if self._end is True:
                self._loop.call_soon(self._read_end, context=self.context)
            else:
                self._lose(self._end if isinstance(self._end, Exception) else None)

    def _read(self, data: bytes) -> None:
        if not self._lost and not self._closing:
            self.protocol.data_received(data)

    def _read_end(self) -> None:
        if self._lost or self._closing:
            return
        if not self.protocol.eof_received():
            self.close()

    def _lose(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._lost = self._closing = True
        self._loop.outstanding.pop(self, None)
        if self._process is not None:
            self._process.connections.pop(self, None)
        self._loop.call_soon(self.protocol.connection_lost, error, context=self.context)

    # ------------------------------------------------------------------ what a protocol calls

    def write(self, data: Any) -> None:
        if not self._closing and data:
            self.peer.arrives(bytes(data))

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self.peer.ends(True)
            self._lose(None)

    def abort(self) -> None:
        if not self._lost:
            self._closing = True
            self.peer.ends(ConnectionResetError(errno.ECONNRESET, "reset"))
            self._lose(None)

    def cut(self) -> None:
        """Its process was killed: the kernel closes."""
        self._lost = self._closing = True
        self._loop.outstanding.pop(self, None)
        self.peer.ends(ConnectionResetError(errno.ECONNRESET, "reset"))

    def frozen(self) -> None:
        return

    def is_closing(self) -> bool:
        return self._closing

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_protocol(self) -> Any:
        return self.protocol

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False

    def is_reading(self) -> bool:
        return not self._paused and not self._closing

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return (0, 65_536)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        return
