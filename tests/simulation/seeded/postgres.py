"""A real PostgreSQL behind the virtual clock: statements are sent one at a time, in the seed's order, and awaited for real.

To asyncpg a `Link` is a transport. What it writes waits until the loop chooses it; then the bytes go to the server and we block
until its answer is whole, or until the server says that it waits for somebody's lock. Answer and delivery are two steps: between
them a process may die with its COMMIT stored and unacknowledged. The server's clock is ours (`SimulatedPostgres`).
"""

from __future__ import annotations

import asyncio
import random
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextvars import copy_context
from typing import Any

import asyncpg

from indexer.store.embedded import EmbeddedPostgres
from indexer.store.programs import Programs
from tests.simulation.seeded.loop import EPOCH, PROCESS, Process, VirtualLoop

MOST_PATIENCE = 30.0  # real seconds for one statement

# The virtual clock in the place of the server's own: the functions that SQL asks for the time are other ones in this cluster,
# whatever a search_path says. A sequence, because it is read and set past all transactions. Microseconds.
_CLOCK = """
ALTER FUNCTION pg_catalog.clock_timestamp() RENAME TO real_clock_timestamp;
ALTER FUNCTION pg_catalog.now() RENAME TO real_now;
GRANT pg_monitor, pg_signal_backend TO indexer_owner;
CREATE SCHEMA simulation;
GRANT USAGE ON SCHEMA simulation TO PUBLIC;
CREATE SEQUENCE simulation.clock START 1790000000000000;
GRANT ALL ON SEQUENCE simulation.clock TO PUBLIC;
SELECT nextval('simulation.clock');
CREATE FUNCTION pg_catalog.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE AS $$ SELECT pg_catalog.to_timestamp(pg_catalog.pg_sequence_last_value('simulation.clock'::regclass) / 1000000.0) $$;
CREATE FUNCTION pg_catalog.now() RETURNS timestamptz LANGUAGE sql STABLE PARALLEL SAFE AS $$ SELECT pg_catalog.to_timestamp(pg_catalog.pg_sequence_last_value('simulation.clock'::regclass) / 1000000.0) $$;
"""


class SimulatedPostgres(EmbeddedPostgres):
    """The embedded server with another clock: for databases made after its start, since it lives in template1."""

    async def _initialise(self, programs: Programs) -> None:
        await super()._initialise(programs)
        await self._run(
            programs, "postgres", "--single", "-j", "-D", str(self._folder / "data"), "-cexit_on_error=on",
            "-callow_system_table_mods=on", "-cfsync=off", "template1",
            stdin=_CLOCK.strip().replace(";\n", ";\n\n") + "\n\n",
        )  # fmt: skip


def messages(data: bytes | bytearray, start: int = 0) -> Iterator[tuple[int, int, int]]:
    """(type, start, end) of each whole message."""
    while start + 5 <= len(data):
        end = start + 1 + int.from_bytes(data[start + 1 : start + 5], "big")
        if end > len(data):
            return
        yield data[start], start, end
        start = end


def failure(code: str, text: str) -> bytes:
    """A statement that the server refuses with this code."""
    sql = f"DO $$ BEGIN RAISE EXCEPTION SQLSTATE '{code}' USING MESSAGE = '{text}'; END $$"
    body = sql.encode() + b"\0"
    return b"Q" + struct.pack("!i", 4 + len(body)) + body


class Server:
    """Everything that speaks to the database, in one place: links, the clock, and a way of one's own to ask."""

    def __init__(self, loop: VirtualLoop, seed: int) -> None:
        self.loop = loop
        self.rng = random.Random(f"postgres {seed}")
        self.links: dict[Link, None] = {}
        self.zombies: list[Link] = []  # cut while the server still worked for them
        self.round_trips = 0
        self.clock_at = -1.0
        self._numbers: dict[str, int] = {}
        self._side: socket.socket | None = None
        self._keep: asyncpg.Connection | None = None
        # (link, bytes to be sent) → None, or what is to happen instead: "lost" (never arrives, and the session ends),
        # "unacknowledged" (arrives, and the session ends), or a statement to send instead
        self.meddle: Callable[[Link, str], str | bytes | None] = lambda _link, _sql: None
        self.after: Callable[[Link, str], None] = lambda _link, _sql: None

    async def open(self, url: str) -> None:
        """The way of one's own: asyncpg logs in, and its socket is taken over."""
        self._keep = await asyncpg.connect(url)
        link = next(iter(self.links))
        del self.links[link]
        self._side = link.sock
        self.ask("SET application_name = 'simulation'")

    def connect(self, factory: Callable[[], Any], path: str) -> tuple[Link, Any]:
        link = Link(self, factory(), path)
        link.protocol.connection_made(link)
        return link, link.protocol

    def ask(self, sql: str) -> list[list[str | None]]:
        """A statement past all links, at once: rows of text. For the world, never for the product."""
        assert self._side is not None
        body = sql.encode() + b"\0"
        self._side.sendall(b"Q" + struct.pack("!i", 4 + len(body)) + body)
        data, rows = bytearray(), []
        at = 0
        while True:
            data += self._side.recv(65_536)
            for kind, start, end in messages(data, at):
                at = end
                if kind == 68:  # D
                    rows.append(_row(data[start + 5 : end]))
                elif kind == 69:
                    raise AssertionError(f"{sql}: {bytes(data[start + 5 : end])!r}")
                elif kind == 90:  # Z
                    return rows

    def set_clock(self) -> None:
        if self.clock_at != self.loop.now and self._side is not None:
            self.clock_at = self.loop.now
            self.ask(f"SELECT setval('simulation.clock', {round((EPOCH + self.loop.now) * 1_000_000)})")

    def blocked(self, pid: int) -> bool:
        return bool(
            self.ask(
                f"SELECT FROM pg_stat_activity WHERE pid = {pid} AND wait_event_type = 'Lock' AND cardinality(pg_blocking_pids({pid})) > 0"
            )
        )

    def freed(self) -> None:
        """Locks were given back: who waited for them goes on."""
        for link in [*self.links, *self.zombies]:
            if link.waits:
                link.collect()
        for link in [zombie for zombie in self.zombies if not zombie.waits]:
            self.zombies.remove(link)
            link.drain()
            self.freed()
            return

    def spread(self) -> None:
        """Notifications that were committed reach the listeners' sessions; when they are read is the loop's choice."""
        for link in list(self.links):
            if link.listens and not link.out and not link.waits and link.status == "I":
                link.flush()

    def end(self, pid: int, why: str = "terminated") -> None:
        """pg_terminate_backend from outside; returns when the session is gone."""
        self.ask(f"SELECT pg_terminate_backend({pid})")
        self.ended(pid, why)

    def ended(self, pid: int, why: str) -> None:
        for link in [*self.links, *self.zombies]:
            if link.pid == pid:
                self.loop.note(link.name, why)
                link.read_to_end()
        self.freed()


def _row(data: bytes | bytearray) -> list[str | None]:
    count, at, row = int.from_bytes(data[:2], "big"), 2, []
    for _ in range(count):
        size = int.from_bytes(data[at : at + 4], "big", signed=True)
        at += 4
        row.append(None if size < 0 else bytes(data[at : at + size]).decode(errors="replace"))
        at += max(size, 0)
    return row


class Link(asyncio.Transport):
    """One session, as asyncpg's transport."""

    def __init__(self, server: Server, protocol: Any, path: str) -> None:
        super().__init__()
        self.server, self.protocol, self.context = server, protocol, copy_context()
        self.process: Process | None = self.context.get(PROCESS)
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.out = bytearray()
        self.status = "?"  # of the session: I(dle), T(ransaction), E(rror in it)
        self.pid = 0
        self.listens = False
        self.waits = False  # the server waits for a lock, and we for its answer
        self.application = ""
        self.idle_limit = 0.0  # seconds in a transaction without a statement, as its settings say
        self.since = 0.0  # of the last answer
        self._path = path
        self._answer = bytearray()  # as far as it has come
        self._parsed = 0
        self._inbox: list[bytes] = []
        self._lost = self._closing = self._paused = self._eof = False
        self._started = False
        self._statements: dict[bytes, str] = {}
        self._sql = ""
        self._expected = 0
        self._flushed = False  # a Parse and Describe without Sync: the description ends the answer, or an error does
        who = self.process.name if self.process else "world"
        server._numbers[who] = server._numbers.get(who, 0) + 1
        self.name = f"{who}/db{server._numbers[who]}"
        server.links[self] = None
        if self.process is not None:
            self.process.connections[self] = None

    # ------------------------------------------------------------------ the loop's side

    def ready(self) -> bool:
        if self.out and not self.waits:
            return True
        return bool(self._inbox or self._eof) and not self._paused and (self.process is None or self.process.runs)

    def step(self) -> None:
        if self.out and not self.waits:
            self._send()
        else:
            self._deliver()
        self._stay()

    def _stay(self) -> None:
        if (self.out or self._inbox or self._eof) and not self._lost:
            self.server.loop.outstanding[self] = None
        else:
            self.server.loop.outstanding.pop(self, None)

    def _deliver(self) -> None:
        if self._inbox:
            data, self._inbox = b"".join(self._inbox), []
            self.server.loop.call_soon(self._read, data, context=self.context)
        elif self._eof:
            self.server.loop.note(self.name, "eof")
            self._lose(None)

    def _read(self, data: bytes) -> None:
        if not self._lost:
            self.protocol.data_received(data)

    def _send(self) -> None:
        server = self.server
        out, self.out = bytes(self.out), bytearray()
        if not self._started:
            if out[4:8] == struct.pack("!i", 80877102):
                self._cancel(out)
                return
            self._start(out)
            return
        sql, expected, ended = self._understand(out)
        if expected and self.process is not None:
            deed = server.meddle(self, sql)
            if deed == "lost" or self._eof:
                server.loop.note(self.name, "lost before", _short(sql))
                self.fail()
                return
            if isinstance(deed, bytes) and not self._flushed:  # a Parse without Sync has no answer that ends
                server.loop.note(self.name, "refused", _short(sql))
                out, expected = deed, 1
            elif deed == "unacknowledged":
                server.loop.note(self.name, "unacknowledged", _short(sql))
                self._exchange(out, expected, sql)
                self._inbox.clear()
                self.fail()
                return
        self._exchange(out, expected, sql)
        if ended:
            self.read_to_end()
            return
        server.after(self, sql)

    def _start(self, out: bytes) -> None:
        self._started = True
        words = out[8:].split(b"\0")
        given = {key.decode(): value.decode() for key, value in zip(words[::2], words[1::2], strict=False) if key}
        self.application = given.get("application_name", "")
        limit = given.get("idle_in_transaction_session_timeout")
        if limit:
            self.idle_limit = (
                float(limit.removesuffix("ms")) / 1000 if limit.endswith("ms") else float(limit.removesuffix("s"))
            )
            given["idle_in_transaction_session_timeout"] = "0"  # it would be real time
        body = out[4:8] + b"".join(f"{key}\0{value}\0".encode() for key, value in given.items()) + b"\0"
        self._exchange(struct.pack("!i", len(body) + 4) + body, 1, "startup")

    def _understand(self, out: bytes) -> tuple[str, int, bool]:
        """(the statement in words, how many answers end this, whether it says goodbye)."""
        expected, ended, letters = 0, False, ""
        for kind, start, end in messages(out):
            letter = chr(kind)
            if letter == "Q":
                self._sql = out[start + 5 : end - 1].decode()
                self.listens |= "LISTEN " in self._sql and "UNLISTEN" not in self._sql
            elif letter == "P":
                name, text = out[start + 5 : end].split(b"\0", 2)[:2]
                self._statements[name] = self._sql = text.decode()
            elif letter == "B":
                self._sql = self._statements.get(out[start + 5 : end].split(b"\0", 2)[1], self._sql)
            letters += letter
            expected += letter in "QScfp"
            ended |= letter == "X"
        self._flushed = "H" in letters[letters.rfind("S") + 1 :]
        expected += self._flushed
        return self._sql, expected, ended

    def _exchange(self, out: bytes, expected: int, sql: str) -> None:
        self.server.set_clock()
        self.server.round_trips += bool(expected)
        self._sql = sql
        try:
            self.sock.sendall(out)
        except OSError:
            self.read_to_end()
            return
        if expected:
            self._expected = expected
            self.collect()

    def collect(self) -> None:
        """Reads until the answer is whole, or the server waits for a lock."""
        was, self.waits = self.status, False
        patience, waited = 0.02, 0.0
        while self._expected > 0:
            for kind, start, end in messages(self._answer, self._parsed):
                self._parsed = end
                letter = chr(kind)
                if letter == "Z":
                    self.status = chr(self._answer[start + 5])
                    self._expected -= 1
                elif letter == "K":
                    self.pid = int.from_bytes(self._answer[start + 5 : start + 9], "big")
                elif (
                    (letter == "R" and int.from_bytes(self._answer[start + 5 : start + 9], "big") in (3, 5, 10, 11))
                    or letter == "G"
                    or (letter in "TnE" and self._flushed)
                ):
                    self._expected -= 1
                if not self._expected:
                    break
            if self._expected <= 0:
                break
            if not select.select([self.sock], [], [], patience)[0]:
                if self.pid and self.server.blocked(self.pid):
                    self.server.loop.note(self.name, "waits for a lock", _short(self._sql))
                    self.waits = True
                    return
                waited += patience
                patience = 0.005
                if waited > MOST_PATIENCE:
                    raise AssertionError(
                        f"no answer to {self._sql!r}: {self._expected} more are expected after "
                        f"{[chr(kind) for kind, _, _ in messages(self._answer)]}"
                    )
                continue
            try:
                data = self.sock.recv(1 << 18)
            except ConnectionError:
                data = b""
            if not data:
                self._expected, self._eof = 0, True
            self._answer += data
        answer, self._answer, self._parsed = bytes(self._answer), bytearray(), 0
        self.since = self.server.loop.now
        rows = 0
        tags = []
        gone: list[int] = []
        for kind, start, end in messages(answer):
            if kind == 68:  # D
                rows += 1
                if "pg_terminate_backend" in self._sql and answer[start + 7 : start + 11] == b"\0\0\0\4":
                    gone.append(int.from_bytes(answer[start + 11 : start + 15], "big"))
            elif kind == 67:  # C
                tags.append(answer[start + 5 : end - 1].decode())
            elif kind == 69:  # E
                fields = answer[start + 5 : end].split(b"\0")
                tags += [field.decode(errors="replace") for field in fields if field[:1] in (b"C",)]
        self.server.loop.note(self.name, _short(self._sql), rows, ",".join(tags), self.status)
        if answer and not self._closing:
            self._inbox.append(answer)
        self._stay()
        for pid in gone:
            self.server.ended(pid, "ended by a successor")
        if self.status != "T" and (was == "T" or tags):
            if was == "T":
                self.server.freed()
            self.server.spread()

    def flush(self) -> None:
        """What is there for a listener, read with an empty statement of ours."""
        self.sock.sendall(b"Q\0\0\0\5\0")
        data, at, notes = bytearray(), 0, []
        while True:
            data += self.sock.recv(65_536)
            for kind, start, end in messages(data, at):
                at = end
                if kind == 65:  # A
                    notes.append(bytes(data[start:end]))
                elif kind == 90:  # Z
                    if notes:
                        self.server.loop.note(self.name, "notified", len(notes))
                        self._inbox += notes
                        self._stay()
                    return

    def _cancel(self, out: bytes) -> None:
        """A request to cancel: it hits what waits for a lock, or what has not arrived yet, or comes too late."""
        pid = int.from_bytes(out[8:12], "big")
        target = next((link for link in self.server.links if link.pid == pid), None)
        hit = "nobody"
        if target is not None and target.waits:
            hit = target.name
            self.sock.sendall(out)
            while target.waits:
                target.collect()
            self.read_to_end()
        elif (
            target is not None
            and target.out
            and target._started
            and self.server.rng.random() < 0.5
            and target._understand(bytes(target.out))[1] == 1
            and not target._flushed
        ):
            hit = target.name
            target.out = bytearray(failure("57014", "canceling statement due to user request"))
        self.server.loop.note(self.name, "cancels", hit)
        self._eof = True

    # ------------------------------------------------------------------ ends

    def read_to_end(self) -> None:
        """The server ends this session."""
        data = bytearray(self._answer)
        self._answer, self._parsed, self._expected, self.waits = bytearray(), 0, 0, False
        while True:
            try:
                part = self.sock.recv(65_536)
            except ConnectionError:
                part = b""
            if not part:
                break
            data += part
        if data and not self._closing:
            self._inbox.append(bytes(data))
        self.out.clear()
        self._eof = True
        self._stay()

    def drain(self) -> None:
        """Closes our end, and waits until the server's is gone with its locks; a zombie where it waits for one itself."""
        if self.waits:
            self.server.zombies.append(self)
            return
        try:
            self.sock.shutdown(socket.SHUT_WR)
            while self.sock.recv(65_536):
                pass
        except OSError:
            pass
        self.sock.close()

    def _gone(self) -> None:
        self.server.links.pop(self, None)
        self.server.loop.outstanding.pop(self, None)
        if self.process is not None:
            self.process.connections.pop(self, None)
        self.drain()
        self.server.freed()
        self.server.spread()

    def fail(self) -> None:
        """The line breaks, and both ends notice."""
        self.out.clear()
        self._eof = True
        self.drain()
        self.server.freed()
        self._stay()

    def _lose(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._lost = self._closing = True
        self._gone()
        self.server.loop.call_soon(self.protocol.connection_lost, error, context=self.context)

    def close(self) -> None:
        if self._lost or self._closing:
            return
        if self.out and self._started and not self.waits and not self._eof:
            _, expected, _ = self._understand(bytes(self.out))
            out, self.out = bytes(self.out), bytearray()
            self._closing = True
            self._exchange(out, expected, self._sql)
        self._lose(None)

    def abort(self) -> None:
        """What was written may have reached the server, and may not."""
        if self._lost:
            return
        self._perhaps()
        self._lose(None)

    def cut(self) -> None:
        """The same, of a process that was killed."""
        if not self._lost:
            self._perhaps()
            self._lost = self._closing = True
            self._gone()

    def _perhaps(self) -> None:
        out, self.out = bytes(self.out), bytearray()
        self._closing = True
        if not out or self.waits or self._eof or not self._started:
            return
        sql, expected, _ = self._understand(out)
        arrives = self.server.rng.random() < 0.5
        self.server.loop.note(self.name, "cut", "after" if arrives else "before", _short(sql))
        if arrives:
            self._exchange(out, expected, sql)

    def frozen(self) -> None:
        """Its process stands still: in a transaction, the server ends it when its limit is over."""
        if self.status in "TE" and self.idle_limit and not self.out:
            stamp = self.since
            context = copy_context()
            context.run(PROCESS.set, None)
            self.server.loop.call_at(stamp + self.idle_limit, self._idled, stamp, context=context)

    def _idled(self, stamp: float) -> None:
        if (
            not self._lost
            and not self._eof
            and self.since == stamp
            and self.status in "TE"
            and self.process
            and not self.process.runs
        ):
            self.server.end(self.pid, "idle in a transaction for too long")

    # ------------------------------------------------------------------ what asyncpg calls

    def write(self, data: Any) -> None:
        if not self._closing and not self._eof:
            self.out += data
            self.server.loop.outstanding[self] = None

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.sock if name == "socket" else default

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

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        return


def _short(sql: str) -> str:
    return " ".join(sql.split())[:60]
