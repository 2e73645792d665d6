"""A PostgreSQL of our own under `state_dir`, for trials and small shops: initialised, started, watched and stopped here.

Promises: durable unless told otherwise, one process per directory, no superuser for anybody once it is set up, and no
server left behind when the process that started it dies. It leaves the schema to `schema.py`, and dumps and major
upgrades to people (facts/dependencies.md, section 1).
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pwd
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Literal
from urllib.parse import quote, urlencode

from indexer.store.programs import EmbeddedError, Programs, kept_folder

Role = Literal["indexer", "indexer_owner"]
DATABASE: Final = "indexer"
PORT: Final = 5432  # names the socket's file; TCP is open only where `tcp_port` asks for it
LONGEST_SOCKET_PATH: Final = 107  # sun_path, less its closing zero

# For tests only: what a crash of the machine could lose.
_FORGETFUL = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}

# Becomes the account and asks to die with its parent, then becomes the program. A process of its own rather than
# `preexec_fn`, which may deadlock in a process with threads; and after setuid, which clears the request to die.
_LAUNCHER = """
import ctypes, os, sys
uid, gid, parent, death, *command = sys.argv[1:]
if int(uid) >= 0:
    os.setgroups([]); os.setgid(int(gid)); os.setuid(int(uid))
ctypes.CDLL(None).prctl(1, int(death))
if os.getppid() != int(parent):
    sys.exit(1)
os.execv(command[0], command)
"""


class AlreadyRunning(EmbeddedError):
    """Another process holds the directory: `pid`."""

    def __init__(self, folder: Path, pid: int) -> None:
        super().__init__(
            f"the embedded PostgreSQL in {folder} is in use by process {pid}: stop it, or give this one another state_dir"
        )
        self.pid = pid


class WrongMajor(EmbeddedError):
    """The files were written by another major version than the programs at hand."""

    def __init__(self, folder: Path, written: int, installed: int, kept: Path | None) -> None:
        how = (
            f"start once more with the kept programs (INDEXER_PG_BIN={kept})"
            if kept
            else f"start once more with programs of PostgreSQL {written} (INDEXER_PG_BIN=…/bin)"
        )
        super().__init__(
            f"the data in {folder} is PostgreSQL {written}, the installed programs are {installed}: dump before a major "
            f"upgrade; {how}, pg_dump, move the folder away, restore"
        )
        self.written, self.installed = written, installed


@dataclass(frozen=True, slots=True)
class Account:
    """The account that the server runs as; `None` stands for our own."""

    name: str
    uid: int
    gid: int


def url_of(state_dir: Path, role: Role = "indexer") -> str:
    """The URL of the embedded PostgreSQL that another process runs under `state_dir`. Raises EmbeddedError."""
    folder = state_dir.absolute() / "postgres"
    try:
        address = json.loads((folder / "address.json").read_text())
        password = json.loads((folder / "credentials.json").read_text())[role]
        return _url(role, password, DATABASE, address["socket"], address["port"])
    except (OSError, ValueError, KeyError) as error:
        raise EmbeddedError(f"no embedded PostgreSQL to talk to in {folder} ({type(error).__name__})") from None


def _url(role: str, password: str, database: str, socket: str, port: int) -> str:
    where = urlencode({"host": socket, "port": port})
    return f"postgresql://{role}:{quote(password)}@/{quote(database)}?{where}"


def _unprivileged_account() -> Account | None:
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            found = pwd.getpwnam(name)
            return Account(name, found.pw_uid, found.pw_gid)
    raise EmbeddedError(
        "PostgreSQL refuses to run as root, and there is no account `postgres` or `nobody` to run it as"
    )


class EmbeddedPostgres:
    """A PostgreSQL server under `state_dir/postgres`, as an async context manager.

    The folder itself, the lock and the passwords stay ours; as root, `data`, `log` and `socket` belong to an
    unprivileged account, which therefore cannot lead us astray by a symbolic link. Roles: `indexer_owner` owns the
    database and migrates it, `indexer` is the daemon's; the superuser has no password that anyone knows.

    `durable=False` switches fsync off. `tcp_port` adds 127.0.0.1. `settings` are added to postgresql's.
    Raises EmbeddedError (AlreadyRunning, WrongMajor) on entry.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        durable: bool = True,
        tcp_port: int | None = None,
        settings: Mapping[str, str] | None = None,
        start_seconds: float = 60.0,
    ) -> None:
        self._folder = state_dir.absolute() / "postgres"
        self._durable = durable
        self._tcp = tcp_port is not None
        self._port = tcp_port or PORT
        self._settings = dict(settings or {})
        self._start_seconds = start_seconds
        self._lock: IO[str] | None = None
        self._account: Account | None = None
        self._passwords: dict[str, str] = {}
        self._socket = self._folder / "socket"
        self._server: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        assert self._server is not None, "not started"
        return self._server.pid

    def dsn(self, role: Role = "indexer", database: str = DATABASE) -> str:
        """A URL for asyncpg and libpq, with the password: never to be logged."""
        return _url(role, self._passwords[role], database, str(self._socket), self._port)

    async def wait(self) -> int:
        """Until the server has ended, asked or not; its exit status."""
        assert self._server is not None, "not started"
        return await self._server.wait()

    async def __aenter__(self) -> EmbeddedPostgres:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Fast shutdown (sessions end, a checkpoint is written); harder when that does not help."""
        server = self._server
        try:
            if server is not None:
                for hint, seconds in ((signal.SIGINT, 60.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0)):
                    if server.returncode is not None:
                        break
                    with suppress(ProcessLookupError):
                        server.send_signal(hint)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(seconds):
                            await server.wait()
        finally:
            if self._socket.parent != self._folder:
                shutil.rmtree(self._socket, ignore_errors=True)
                self._socket = self._folder / "socket"
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    # ------------------------------------------------------------------ starting

    async def _start(self) -> None:
        self._account = _unprivileged_account()
        self._take_directory()
        installed = await Programs.find()
        self._check_major(installed.major)
        programs = await asyncio.to_thread(installed.kept_in, self._folder / "programs")
        self._read_or_make_passwords()
        if not (self._folder / "data").exists():
            await self._initialise(programs)
        await self._wait_for_leftovers()
        self._choose_socket_folder()
        await self._start_server(programs)

    def _take_directory(self) -> None:
        """Make the folder and lock it: the lock falls with our process, however that ends."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._folder.chmod(0o711)
            lock = (self._folder / "lock").open("a+")
        except OSError as error:
            raise EmbeddedError(f"cannot write to {self._folder}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip()
            lock.close()
            raise AlreadyRunning(self._folder, int(holder) if holder.isdigit() else 0) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock
        for name in ("log", "socket"):
            (self._folder / name).mkdir(exist_ok=True, mode=0o755)
            self._give_away(self._folder / name)
        if self._account is not None:
            closed = [p for p in (self._folder, *self._folder.parents) if not p.stat().st_mode & 0o001]
            if closed:
                raise EmbeddedError(
                    f"as root PostgreSQL runs as account `{self._account.name}`, which cannot pass through {closed[-1]}: "
                    "choose a state_dir that others may pass through, as /var/lib/indexer"
                )

    def _give_away(self, path: Path) -> None:
        if self._account is not None:
            os.chown(path, self._account.uid, self._account.gid, follow_symlinks=False)

    def _check_major(self, installed: int) -> None:
        with suppress(FileNotFoundError):
            # as root this reads a folder of the account; as the account, our own
            written = int((self._folder / "data" / "PG_VERSION").read_text().strip())
            if written != installed:
                kept = kept_folder(self._folder / "programs", written)
                raise WrongMajor(self._folder / "data", written, installed, kept)

    def _read_or_make_passwords(self) -> None:
        path = self._folder / "credentials.json"
        if not path.exists():
            # written whole and synced before the cluster that they open
            fresh = path.with_suffix(".new")
            fresh.unlink(missing_ok=True)
            roles: tuple[Role, ...] = ("indexer", "indexer_owner")
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump({role: secrets.token_urlsafe(24) for role in roles}, file)
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(path)
        self._passwords = json.loads(path.read_text())

    async def _initialise(self, programs: Programs) -> None:
        """A cluster with our roles and database, made beside its place and moved there when whole."""
        fresh = self._folder / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)  # of a start that was killed
        fresh.mkdir(mode=0o700)
        self._give_away(fresh)
        # initdb wants a password for its superuser when passwords are demanded; this one is thrown away
        with tempfile.NamedTemporaryFile("w", prefix="indexer-", suffix=".once") as once:
            once.write(secrets.token_urlsafe(24))
            once.flush()
            self._give_away(Path(once.name))
            locale = ["--locale=C.UTF-8", *(["--locale-provider=builtin"] if programs.major >= 17 else [])]
            await self._run(
                programs, "initdb", "-D", str(fresh), "-U", "postgres", "--auth=scram-sha-256", f"--pwfile={once.name}",
                "--encoding=UTF8", *locale, "--no-instructions", *([] if self._durable else ["--no-sync"]),
            )  # fmt: skip
        # single-user mode: the only moment anyone is superuser. -j: a statement ends with a semicolon and an empty line
        statements = [
            f"CREATE ROLE indexer_owner LOGIN CREATEROLE CREATEDB PASSWORD '{self._passwords['indexer_owner']}'",
            f"CREATE ROLE indexer LOGIN PASSWORD '{self._passwords['indexer']}'",
            "CREATE ROLE loyalty_daemon",
            "CREATE ROLE loyalty_reader",
            "CREATE ROLE loyalty_brand",
            "GRANT loyalty_daemon, loyalty_reader TO indexer_owner WITH ADMIN OPTION",
            "GRANT loyalty_brand TO indexer_owner WITH ADMIN OPTION",
            "GRANT loyalty_daemon, loyalty_reader TO indexer",
            f"CREATE DATABASE {DATABASE} OWNER indexer_owner",
        ]
        await self._run(
            programs, "postgres", "--single", "-j", "-D", str(fresh), "-cexit_on_error=on",
            *([] if self._durable else ["-cfsync=off"]), "postgres",
            stdin="".join(f"{s};\n\n" for s in statements),
        )  # fmt: skip
        fresh.rename(self._folder / "data")

    def _launch(self, death: signal.Signals, program: Path, arguments: tuple[str, ...]) -> list[str]:
        uid, gid = (self._account.uid, self._account.gid) if self._account else (-1, -1)
        start = [sys.executable, "-I", "-S", "-c", _LAUNCHER]
        return [*start, str(uid), str(gid), str(os.getpid()), str(int(death)), str(program), *arguments]

    def _environment(self) -> dict[str, str]:
        # nothing of ours: PGOPTIONS, PGPORT and the secrets of the daemon are not the server's business
        return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "TZ": "UTC"}

    async def _run(self, programs: Programs, name: str, *arguments: str, stdin: str = "") -> None:
        process = await asyncio.create_subprocess_exec(
            *self._launch(signal.SIGKILL, programs.folder / name, arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd="/",
            env=self._environment(),
        )
        try:
            async with asyncio.timeout(self._start_seconds):
                output = (await process.communicate(stdin.encode()))[0].decode(errors="replace")
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        if process.returncode:
            for password in self._passwords.values():
                output = output.replace(password, "***")
            raise EmbeddedError(f"{name} failed with status {process.returncode}: {output[-2000:].strip()}")

    def _choose_socket_folder(self) -> None:
        longest = len(os.fsencode(self._folder / "socket" / f".s.PGSQL.{self._port}.lock"))
        if longest > LONGEST_SOCKET_PATH:
            self._socket = Path(tempfile.mkdtemp(prefix="indexer-pg-"))
            self._socket.chmod(0o755)
            self._give_away(self._socket)
        (self._folder / "address.json").write_text(json.dumps({"socket": str(self._socket), "port": self._port}))

    def _leftover(self) -> int | None:
        """The process of this folder's last server, if it lives. One that merely inherited its number is disarmed."""
        path = self._folder / "data" / "postmaster.pid"
        try:
            lines = path.read_text().splitlines()
            pid = int(lines[0])
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError, ValueError, IndexError):
            return None  # PostgreSQL judges what is left of the file itself
        if os.fsencode(self._folder / "data") in command.split(b"\0"):
            return pid
        # In a container the number soon belongs to somebody else, and PostgreSQL would refuse to start. Our own number
        # in its place is one that PostgreSQL knows for stale; the rest stays, for the check of the shared memory.
        path.write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")
        return None

    async def _wait_for_leftovers(self) -> None:
        """We hold the lock, so a server that still runs here is an orphan that was told to end when its parent died."""
        deadline = asyncio.get_running_loop().time() + self._start_seconds
        while (pid := self._leftover()) is not None:
            if asyncio.get_running_loop().time() > deadline:
                raise EmbeddedError(
                    f"a PostgreSQL left behind, process {pid}, does not end: stop it (kill -QUIT {pid})"
                )
            await asyncio.sleep(0.05)

    async def _start_server(self, programs: Programs) -> None:
        settings = {
            "port": str(self._port),
            "listen_addresses": "127.0.0.1" if self._tcp else "",
            "unix_socket_directories": str(self._socket),
            "password_encryption": "scram-sha-256",
            "max_connections": "100",
            "timezone": "UTC",
            # a week of logs, overwritten in turn
            "logging_collector": "on",
            "log_destination": "stderr",
            "log_directory": str(self._folder / "log"),
            "log_filename": "postgresql-%a.log",
            "log_rotation_age": "1d",
            "log_rotation_size": "0",
            "log_truncate_on_rotation": "on",
            **({} if self._durable else _FORGETFUL),
            **self._settings,
        }
        flags = tuple(f"-c{name}={value}" for name, value in settings.items())
        deadline = asyncio.get_running_loop().time() + self._start_seconds
        while True:
            with (self._folder / "start.log").open("wb") as log:
                self._server = await asyncio.create_subprocess_exec(
                    *self._launch(
                        signal.SIGINT, programs.folder / "postgres", ("-D", str(self._folder / "data"), *flags)
                    ),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env=self._environment(),
                    start_new_session=True,  # Ctrl-C is for us: we stop the server when our sessions are closed
                )
            if await self._ready(deadline):
                return
            said = (self._folder / "start.log").read_text(errors="replace")[-2000:].strip()
            # the sessions of a server that was killed may outlive it for a moment
            if "pre-existing shared memory block" in said and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(0.2)
                continue
            raise EmbeddedError(f"PostgreSQL did not start in {self._folder}: {said} (see also {self._folder / 'log'})")

    async def _ready(self, deadline: float) -> bool:
        """Line 8 of postmaster.pid says `ready`; line 1 must be our child, or the file is of a server that was killed."""
        assert self._server is not None
        while self._server.returncode is None and asyncio.get_running_loop().time() < deadline:
            with suppress(OSError, IndexError, ValueError):
                lines = (self._folder / "data" / "postmaster.pid").read_text().splitlines()
                if int(lines[0]) == self._server.pid and lines[7].strip() == "ready":
                    return True
            await asyncio.sleep(0.01)
        return False
