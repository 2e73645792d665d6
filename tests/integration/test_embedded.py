"""The embedded PostgreSQL: what it promises when it is started, killed, started twice, or started from the wrong place.

Run as a program, this file starts one under the folder it is given, says so, and waits: a daemon to be killed.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import asyncpg
import pytest

from indexer.store.embedded import AlreadyRunning, EmbeddedPostgres, WrongMajor, url_of
from indexer.store.programs import EmbeddedError, Programs, find_folder

ROOT = Path(__file__).parents[2]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="about the account that root's server runs as")


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """Short, and open to the account that root's server runs as: pytest's tmp_path is neither."""
    folder = Path(tempfile.mkdtemp(prefix="indexer-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def fetchval(url: str, query: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def start_as_a_program(
    state_dir: Path, *, python: str = sys.executable, **options: object
) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        python, __file__, str(state_dir), stdout=asyncio.subprocess.PIPE, cwd=ROOT, **options
    )
    async with asyncio.timeout(60):
        assert (await process.stdout.readline()).startswith(b"postmaster")
    return process


def postmaster_of(state_dir: Path) -> int:
    return int((state_dir / "postgres" / "data" / "postmaster.pid").read_text().splitlines()[0])


async def test_a_disk_too_full_for_the_programs_is_told_in_a_line(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source, None, target)

    monkeypatch.setattr("os.link", full)
    monkeypatch.setattr("shutil.copyfile", full)
    programs = await Programs.find()
    with pytest.raises(EmbeddedError) as refused:
        programs.kept_in(state_dir)
    assert str(refused.value) == (
        f"cannot copy PostgreSQL's programs to {state_dir}: [Errno 28] No space left on device"
    )
    assert not (state_dir / "new").exists()


async def test_data_and_passwords_outlive_a_restart(state_dir: Path) -> None:
    async with EmbeddedPostgres(state_dir) as first:
        url = first.dsn("indexer_owner")
        await fetchval(url, "CREATE TABLE public.kept AS SELECT 7 AS number")
    assert not alive(first.pid)
    async with EmbeddedPostgres(state_dir) as second:
        assert await fetchval(url, "SELECT number FROM public.kept") == 7
        assert url_of(state_dir) == second.dsn()
        assert await fetchval(second.dsn(), "SHOW fsync") == "on"
        assert await fetchval(second.dsn(), "SHOW listen_addresses") == ""


async def test_nobody_gets_in_without_the_password_and_nobody_is_superuser(state_dir: Path) -> None:
    async with EmbeddedPostgres(state_dir, durable=False) as postgres:
        url = postgres.dsn()
        secret = json.loads((state_dir / "postgres" / "credentials.json").read_text())["indexer"]
        assert (state_dir / "postgres" / "credentials.json").stat().st_mode & 0o777 == 0o600
        for wrong in (url.replace(secret, "wrong"), url.replace("indexer:" + secret, "postgres:" + secret)):
            with pytest.raises(asyncpg.InvalidPasswordError):
                await asyncpg.connect(wrong)
        assert await fetchval(url, "SELECT bool_or(rolsuper) FROM pg_roles WHERE rolname LIKE 'indexer%'") is False
        assert (
            await fetchval(url, "SELECT rolcreaterole OR rolcreatedb FROM pg_roles WHERE rolname = 'indexer'") is False
        )
        for log in (state_dir / "postgres" / "log").iterdir():
            assert secret not in log.read_text()


async def test_tcp_is_open_only_on_request(state_dir: Path, unused_port: int) -> None:
    async with EmbeddedPostgres(state_dir, durable=False, tcp_port=unused_port) as postgres:
        secret = json.loads((state_dir / "postgres" / "credentials.json").read_text())["indexer"]
        url = f"postgresql://indexer:{secret}@127.0.0.1:{unused_port}/indexer"
        assert await fetchval(url, "SELECT 1") == 1
        assert await fetchval(postgres.dsn(), "SELECT 1") == 1


async def test_a_second_process_is_refused_with_the_first_ones_number(state_dir: Path) -> None:
    first = await start_as_a_program(state_dir)
    try:
        with pytest.raises(AlreadyRunning, match=str(first.pid)) as caught:
            await EmbeddedPostgres(state_dir).__aenter__()
        assert caught.value.pid == first.pid
    finally:
        first.kill()
        await first.communicate()


async def test_the_server_dies_with_its_parent_and_the_next_start_recovers(state_dir: Path) -> None:
    process = await start_as_a_program(state_dir)
    server = postmaster_of(state_dir)
    await fetchval(url_of(state_dir, "indexer_owner"), "CREATE TABLE public.kept AS SELECT 7 AS number")
    process.kill()
    await process.communicate()
    async with EmbeddedPostgres(state_dir) as postgres:  # at once: it waits for the one that is going
        assert not alive(server)
        assert await fetchval(postgres.dsn("indexer_owner"), "SELECT number FROM public.kept") == 7


async def test_a_killed_server_is_noticed_and_nothing_committed_is_lost(state_dir: Path) -> None:
    async with EmbeddedPostgres(state_dir) as postgres:
        await fetchval(postgres.dsn("indexer_owner"), "CREATE TABLE public.kept AS SELECT 7 AS number")
        os.kill(postgres.pid, signal.SIGKILL)
        assert await asyncio.wait_for(postgres.wait(), 10) == -signal.SIGKILL
    async with EmbeddedPostgres(state_dir) as postgres:
        assert await fetchval(postgres.dsn("indexer_owner"), "SELECT number FROM public.kept") == 7


async def test_a_number_that_another_process_inherited_does_not_stop_the_start(state_dir: Path) -> None:
    """In a container the postmaster has the same small number every time, or somebody else has it."""
    async with EmbeddedPostgres(state_dir, durable=False) as postgres:
        os.kill(postgres.pid, signal.SIGKILL)
        await postgres.wait()
    owner = (state_dir / "postgres" / "data").stat()
    bystander = subprocess.Popen(["/bin/sleep", "600"], user=owner.st_uid, group=owner.st_gid)
    try:
        path = state_dir / "postgres" / "data" / "postmaster.pid"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([str(bystander.pid), *lines[1:]]) + "\n")
        async with EmbeddedPostgres(state_dir, durable=False) as postgres:
            assert await fetchval(postgres.dsn(), "SELECT 1") == 1
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


async def test_a_first_start_that_was_killed_half_way_is_begun_anew(state_dir: Path) -> None:
    (state_dir / "postgres" / "data.new" / "base").mkdir(parents=True)
    (state_dir / "postgres" / "data.new" / "PG_VERSION").write_text("18\n")
    (state_dir / "postgres" / "programs" / "new").mkdir(parents=True)
    async with EmbeddedPostgres(state_dir, durable=False) as postgres:
        assert await fetchval(postgres.dsn(), "SELECT 1") == 1


async def test_another_major_version_is_refused_and_says_dump(state_dir: Path) -> None:
    data = state_dir / "postgres" / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("14\n")
    with pytest.raises(WrongMajor, match="dump before a major upgrade"):
        await EmbeddedPostgres(state_dir).__aenter__()
    async with EmbeddedPostgres(state_dir / "other", durable=False):  # and it holds no lock on anything
        pass


async def test_a_long_state_dir_puts_the_socket_elsewhere(state_dir: Path) -> None:
    long = state_dir / ("long-" * 20)
    async with EmbeddedPostgres(long, durable=False) as postgres:
        assert await fetchval(url_of(long), "SELECT 1") == 1
        assert postgres.dsn() == url_of(long)


async def test_programs_that_are_not_there_are_named(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDEXER_PG_BIN", str(state_dir))
    with pytest.raises(EmbeddedError, match="INDEXER_PG_BIN"):
        await EmbeddedPostgres(state_dir).__aenter__()


async def test_no_url_without_a_server(state_dir: Path) -> None:
    with pytest.raises(EmbeddedError, match="no embedded PostgreSQL"):
        url_of(state_dir)


@pytest.mark.parametrize(
    "folder", [pytest.param(p.parent, id=p.parts[-3]) for p in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
)
async def test_debians_programs_do_as_well(state_dir: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("INDEXER_PG_BIN", str(folder))
    async with EmbeddedPostgres(state_dir, durable=False) as postgres:
        assert (await fetchval(postgres.dsn(), "SHOW server_version")).startswith(folder.parts[-2])
        assert await fetchval(postgres.dsn(), "SELECT upper('é')") == "É"


@as_root
async def test_as_root_the_files_belong_to_an_unprivileged_account_and_the_secrets_do_not(state_dir: Path) -> None:
    async with EmbeddedPostgres(state_dir, durable=False):
        assert (state_dir / "postgres" / "data").stat().st_uid in (
            pwd.getpwnam("postgres").pw_uid if "postgres" in {p.pw_name for p in pwd.getpwall()} else -1,
            pwd.getpwnam("nobody").pw_uid,
        )
        for ours in ("", "credentials.json", "lock", "programs"):
            path = state_dir / "postgres" / ours
            assert not path.exists() or path.stat().st_uid == 0


@as_root
async def test_as_root_a_folder_that_the_account_cannot_reach_is_named_and_left_as_it_is(state_dir: Path) -> None:
    closed = state_dir / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(EmbeddedError, match=f"cannot pass through {closed}"):
        await EmbeddedPostgres(closed / "state").__aenter__()
    assert closed.stat().st_mode & 0o777 == 0o700


@as_root
async def test_it_works_for_a_user_who_is_not_root(state_dir: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    python = f"/usr/bin/python3.{sys.version_info.minor}"  # root's own may lie where nobody can reach
    site = Path(asyncpg.__file__).parents[1]
    if not Path(python).exists() or any(not p.stat().st_mode & 0o001 for p in (site, *site.parents)):
        pytest.skip("no Python with our packages that `nobody` can run")
    os.chown(state_dir, nobody.pw_uid, nobody.pw_gid)
    process = await start_as_a_program(
        state_dir,
        python=python,
        user=nobody.pw_uid,
        group=nobody.pw_gid,
        extra_groups=[],
        env={"PYTHONPATH": f"{ROOT}:{site}", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    try:
        assert await fetchval(url_of(state_dir), "SELECT 1") == 1
    finally:
        server = postmaster_of(state_dir)
        process.terminate()
        await process.communicate()
    await until(lambda: not alive(server))


async def test_the_found_programs_are_those_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_folder({})
    assert find_folder({"INDEXER_PG_BIN": str(found)}) == found


@pytest.fixture
async def unused_port() -> AsyncIterator[int]:
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    yield port


async def _run_until_killed(state_dir: Path) -> None:
    async with EmbeddedPostgres(state_dir, durable=False) as postgres:
        print("postmaster", postgres.pid, flush=True)
        await postgres.wait()


if __name__ == "__main__":
    asyncio.run(_run_until_killed(Path(sys.argv[1])))
