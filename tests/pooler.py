"""Connection poolers before a PostgreSQL: a small relay of our own, everywhere, and PgBouncer where it is installed.

The relay pools transactions as unkindly as a real one may: each transaction goes to the session that has been idle for
longest, so a client that counts on anything of its last session (a prepared statement, a setting, a LISTEN, a lock) trips.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlencode, urlsplit, urlunsplit

import pytest

SSL_REQUEST, GSS_REQUEST, CANCEL_REQUEST = 80877103, 80877104, 80877102
# What PgBouncer takes at the start of a session; it refuses all else, and so do we.
STARTUP = {
    b"user",
    b"database",
    b"application_name",
    b"client_encoding",
    b"datestyle",
    b"timezone",
    b"standard_conforming_strings",
}


class Pooler(Protocol):
    def url(self, direct: str) -> str:
        """The same database by way of the pooler."""
        ...


def _place(url: str) -> tuple[str, int]:
    """Host (a folder of sockets, where it begins with a slash) and port of a PostgreSQL URL."""
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    host = unquote(parts.hostname or "") or query.get("host", ["localhost"])[0]
    return host, int(parts.port or query.get("port", ["5432"])[0])


def _by_way_of(url: str, port: int) -> str:
    parts = urlsplit(url)
    account = parts.netloc.rpartition("@")[0]
    query = {key: values[0] for key, values in parse_qs(parts.query).items() if key not in ("host", "port")}
    return urlunsplit(parts._replace(netloc=f"{account}@127.0.0.1:{port}", query=urlencode(query)))


# --------------------------------------------------------------------------- our own relay


async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """A message's type, and all of it."""
    head = await reader.readexactly(5)
    return head[:1], head + await reader.readexactly(int.from_bytes(head[1:], "big") - 4)


@dataclass(eq=False)
class _Server:
    """A session of the real server, and the client that has it now."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    key: bytes = b""  # BackendKeyData, for cancelling
    client: _Client | None = None


@dataclass(eq=False)
class _Client:
    writer: asyncio.StreamWriter
    key: bytes = b""
    server: _Server | None = None
    last: _Server | None = None
    owed: int = 0  # answers that end with ReadyForQuery and have not come
    free: asyncio.Event = field(default_factory=asyncio.Event)


class Relay:
    """Who logs in does so at the server itself; the session then belongs to everybody with the same login, transaction by
    transaction. With `whole_sessions` a client keeps its session, as it would without a pooler.
    """

    def __init__(self, target: str, *, size: int, whole_sessions: bool) -> None:
        self.target, self.size, self.whole_sessions = target, size, whole_sessions
        self.refusing = False  # nobody new gets in
        self.transactions = self.changes = 0  # … and how many went to another session than the client's one before
        self.most_sessions = 0
        self._port = 0
        self._idle: dict[bytes, deque[_Server]] = {}
        self._waiting: dict[bytes, deque[asyncio.Future[_Server]]] = {}
        self._sessions: dict[bytes, set[_Server]] = {}
        self._clients: set[_Client] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def url(self, direct: str) -> str:
        return _by_way_of(direct, self._port)

    @classmethod
    @asynccontextmanager
    async def before(cls, target: str, *, size: int = 4, whole_sessions: bool = False) -> AsyncIterator[Relay]:
        relay = cls(target, size=size, whole_sessions=whole_sessions)
        # tasks of our own: one that asyncio's streams made says so to the log when it is cancelled
        server = await asyncio.start_server(lambda r, w: relay._spawn(relay._serve(r, w)), "127.0.0.1", 0)
        relay._port = server.sockets[0].getsockname()[1]
        try:
            yield relay
        finally:
            server.close()
            for task in relay._tasks:
                task.cancel()
            await asyncio.gather(*relay._tasks, return_exceptions=True)
            for one in (*relay._clients, *(s for pool in relay._sessions.values() for s in pool)):
                one.writer.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cut(self) -> None:
        """Breaks every connection that there is."""
        for client in self._clients:
            client.writer.transport.abort()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = _place(self.target)
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = _Client(writer)
        self._clients.add(client)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                login = await self._login(client, reader)
                while login is not None:
                    kind, message = await _message(reader)
                    if kind == b"X":
                        break
                    server = client.server or await self._assign(client, login)
                    client.owed += kind in (b"Q", b"S")
                    server.writer.write(message)
                    await server.writer.drain()
        finally:
            self._clients.discard(client)
            if client.server is not None:  # it left in the middle of a transaction: so must the session
                client.server.writer.close()
            writer.close()

    async def _login(self, client: _Client, reader: asyncio.StreamReader) -> bytes | None:
        """Passes on what is said until the session is ready. None: there is no session."""
        while True:
            size = int.from_bytes(await reader.readexactly(4), "big")
            body = await reader.readexactly(size - 4)
            code = int.from_bytes(body[:4], "big")
            if code in (SSL_REQUEST, GSS_REQUEST):
                client.writer.write(b"N")
                continue
            break
        if code == CANCEL_REQUEST:
            await self._cancel(body[4:])
            return None
        words = body[4:].split(b"\0")
        unknown = {name.lower() for name in words[0:-2:2]} - STARTUP
        if self.refusing or (unknown and not self.whole_sessions):
            why = b"no more connections" if self.refusing else b"unsupported startup parameter: " + b", ".join(unknown)
            fields = b"SFATAL\0C08P01\0M" + why + b"\0\0"
            client.writer.write(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)
            return None
        server = _Server(*await self._open())
        server.writer.write(size.to_bytes(4, "big") + body)
        while True:
            kind, message = await _message(server.reader)
            if kind == b"K":
                server.key = client.key = message[5:]
            client.writer.write(message)
            if kind == b"Z":
                break
            # of what the server asks while it lets somebody in, these three want no answer
            if kind == b"E" or (kind == b"R" and int.from_bytes(message[5:9], "big") not in (0, 12)):
                if kind == b"E":
                    server.writer.close()
                    return None
                server.writer.write((await _message(reader))[1])
        pool = self._sessions.setdefault(body, set())
        pool.add(server)
        self._spawn(self._pump(server, body))
        if self.whole_sessions:
            server.client, client.server = client, server
        elif len(pool) > self.size:
            server.writer.close()
        else:
            self._release(server, body)
        self.most_sessions = max(self.most_sessions, len(pool))
        return body

    async def _assign(self, client: _Client, login: bytes) -> _Server:
        idle = self._idle.setdefault(login, deque())
        if idle:
            server = idle.popleft()
        else:
            waiting: asyncio.Future[_Server] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(login, deque()).append(waiting)
            server = await waiting
        self.transactions += 1
        self.changes += client.last not in (None, server)
        client.server = client.last = server
        server.client = client
        return server

    def _release(self, server: _Server, login: bytes) -> None:
        if server.client is not None:
            server.client.server = None
        server.client = None
        waiting = self._waiting.setdefault(login, deque())
        while waiting:
            if not (first := waiting.popleft()).done():
                return first.set_result(server)
        self._idle.setdefault(login, deque()).append(server)

    async def _pump(self, server: _Server, login: bytes) -> None:
        """What the server says goes to whoever has the session; what it says to nobody is lost, as notifications are."""
        try:
            while True:
                kind, message = await _message(server.reader)
                client = server.client
                if client is None:
                    continue
                client.writer.write(message)
                with suppress(ConnectionError):
                    await client.writer.drain()
                if kind == b"Z":
                    client.owed -= 1
                    if message[5:] == b"I" and client.owed == 0 and not self.whole_sessions:
                        self._release(server, login)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._sessions[login].discard(server)
            with suppress(ValueError):
                self._idle.get(login, deque()).remove(server)
            if server.client is not None:
                server.client.server = None
                server.client.writer.close()
            server.writer.close()

    async def _cancel(self, key: bytes) -> None:
        for client in self._clients:
            if client.key == key and client.server is not None:
                _, writer = await self._open()
                writer.write((16).to_bytes(4, "big") + CANCEL_REQUEST.to_bytes(4, "big") + client.server.key)
                await writer.drain()
                writer.close()


# --------------------------------------------------------------------------- PgBouncer


def pgbouncer() -> str | None:
    """Where PgBouncer is installed."""
    return shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


@dataclass(frozen=True)
class PgBouncer:
    port: int

    def url(self, direct: str) -> str:
        return _by_way_of(direct, self.port)

    @classmethod
    @asynccontextmanager
    async def before(cls, target: str, *, size: int = 4) -> AsyncIterator[PgBouncer]:
        """PgBouncer with `pool_mode = transaction` and what it comes with."""
        program = pgbouncer()
        assert program is not None
        parts, (host, port) = urlsplit(target), _place(target)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            free = probe.getsockname()[1]
        folder = Path(tempfile.mkdtemp(prefix="pgbouncer-"))
        folder.chmod(0o755)
        (folder / "users").write_text(f'"{unquote(parts.username or "")}" "{unquote(parts.password or "")}"\n')
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host={host} port={port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {free}\n"
            f"unix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {folder}/users\npool_mode = transaction\n"
            f"default_pool_size = {size}\nlogfile = {folder}/log\n"
        )
        (folder / "log").touch()
        (folder / "log").chmod(0o666)
        # it refuses to run as root
        account = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
        process = await asyncio.create_subprocess_exec(
            program,
            "-q",
            str(folder / "pgbouncer.ini"),
            stderr=asyncio.subprocess.DEVNULL,
            **account,  # type: ignore[arg-type]
        )
        try:
            await _listens(free, lambda: process.returncode is None, folder / "log")
            yield cls(free)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            shutil.rmtree(folder, ignore_errors=True)


async def _listens(port: int, alive: Callable[[], bool], log: Path) -> None:
    async with asyncio.timeout(60):
        while True:
            assert alive(), f"PgBouncer ended: {log.read_text()}"
            with suppress(OSError):
                (await asyncio.open_connection("127.0.0.1", port))[1].close()
                return
            await asyncio.sleep(0.02)


POOLERS = [
    "relay",
    pytest.param(
        "pgbouncer",
        marks=pytest.mark.skipif(
            pgbouncer() is None, reason="PgBouncer is not installed: the relay alone stands for it"
        ),
    ),
]


@asynccontextmanager
async def opened(kind: str, target: str, *, size: int = 4) -> AsyncIterator[Pooler]:
    """A pooler of one of POOLERS before the server of a URL; so many sessions for all transactions."""
    async with Relay.before(target, size=size) if kind == "relay" else PgBouncer.before(target, size=size) as pooler:
        yield pooler
