"""The world around the daemon: a real Anvil with Loyfin on it, a shop that receives webhooks, and daemons as processes.

Nothing here reaches into the daemon: it is started by its console script with a file of configuration, heard through its
log, HTTP, webhooks and tables, and stopped by signals. Whether what it did was right is for the oracle to say.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import asyncpg
from aiohttp import web
from standardwebhooks import Webhook as Verifier
from standardwebhooks.webhooks import WebhookVerificationError

from indexer.model.types import Hash32, hex0x
from indexer.sandbox.actions import Issuance, Metadata, Redemption, Signed, sign
from indexer.sandbox.anvil import Anvil
from indexer.sandbox.contracts import decode_logs
from indexer.sandbox.loyfin import WEALTH, Deployment, Loyfin, burst, create_program, deploy_burst_factory
from indexer.sandbox.transactions import Party
from indexer.store import tokens
from indexer.store.database import Database
from tests import movements, oracle, truth

BRAND = "bloom"
CHAIN_ID = 84532
BLOCK_SECONDS = 0.2
EPOCH = 20  # safe is so many blocks behind the head, finalized twice as many
LEASE_SECONDS = 2.0
LOYALTY_ID = Hash32(b"\x1d" * 32)
SMALL = 100  # amounts up to this settle as soon as they are included, larger ones at safe
PATIENCE = 90.0  # seconds for whatever a daemon should do: others may be busy on the machine
SECRET = "whsec_" + base64.b64encode(b"a secret of the acceptance tests").decode()
ABI = Path(__file__).parents[2] / "contracts_abi"
CONSOLE = (str(Path(sys.executable).parent / "indexer"),)

# Starts the program in argv[2:] so that the kernel kills it when the test dies, however that dies.
_DIES_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


async def until(
    condition: Callable[[], Awaitable[Any]],
    what: str | Callable[[], object],
    *,
    seconds: float = PATIENCE,
    pause: float = 0.05,
) -> Any:
    """The first true answer of `condition`; after so many seconds an AssertionError that says what was waited for."""
    deadline = time.monotonic() + seconds
    while not (found := await condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what() if callable(what) else what}")
        await asyncio.sleep(pause)
    return found


# --------------------------------------------------------------------------- the chain


@dataclass
class Ledger:
    """Loyfin on an Anvil with blocks of 200 ms; every customer holds points to redeem."""

    anvil: Anvil
    loyfin: Loyfin
    brand: Party
    customers: Sequence[Party]
    relayers: Iterator[Party]  # each serves one transaction: nobody's waits for a nonce that a reorganisation took back
    bursting: Deployment | None = None
    nonces: Iterator[int] = field(default_factory=lambda: itertools.count(1, 100_000))

    @classmethod
    @asynccontextmanager
    async def running(cls, *, seed: int = 1, relayers: int = 40, with_burst: bool = False) -> AsyncIterator[Ledger]:
        brand = Party(BRAND)
        customers = [Party(f"customer {n}") for n in range(3)]
        couriers = [Party(f"courier {n}") for n in range(relayers)]
        async with Anvil(chain_id=CHAIN_ID, block_time=BLOCK_SECONDS, slots_in_an_epoch=EPOCH) as anvil:
            loyfin = await Loyfin.deploy(anvil, rng=random.Random(seed))
            for courier in couriers:
                await anvil.set_balance(courier.address, WEALTH)
            await loyfin.welcome(brand, *customers)
            funding = [await loyfin.issue(brand, one.address, 10**6, loyalty_id=LOYALTY_ID) for one in customers]
            for submitted in funding:
                assert (await loyfin.wait(submitted.tx_hash)).succeeded
            bursting = None
            if with_burst:
                bursting = await deploy_burst_factory(loyfin.submitter)
                await create_program(loyfin.submitter, bursting.factory, brand, Metadata(loyalty_id=LOYALTY_ID))
            yield cls(anvil, loyfin, brand, customers, iter(couriers), bursting)

    @property
    def factories(self) -> list[tuple[bytes, int]]:
        """Address and first block of each, as the configuration wants them."""
        return [(d.factory, d.block_number) for d in (self.loyfin.deployment, self.bursting) if d is not None]

    async def time(self) -> int:
        """The head's, in Unix seconds."""
        return int((await self.anvil.block())["timestamp"], 16)

    async def depth_of(self, tx_hash: Hash32) -> int | None:
        """How many blocks a reorganisation would have to replace now to undo it; None where it is not mined."""
        receipt = await self.loyfin.submitter.receipt(tx_hash)
        return None if receipt is None else await self.anvil.block_number() - receipt.block_number + 1

    async def burst(self, count: int) -> None:
        """So many events at once, in one block, of no operation."""
        assert self.bursting is not None
        said = await burst(
            self.loyfin.submitter,
            self.bursting.factory,
            self.brand,
            loyalty_id=LOYALTY_ID,
            count=count,
            first_nonce=next(self.nonces),
        )
        assert (await self.loyfin.wait(said)).succeeded

    async def mine_on(self, blocks: int) -> None:
        """Waits for so many blocks more."""
        target = await self.anvil.block_number() + blocks

        async def reached() -> bool:
            return await self.anvil.block_number() >= target

        await until(reached, f"block {target}")


class Observer:
    """Writes down the truth while it happens: the node's heads and the factory's events, about ten times a second."""

    def __init__(self, ledger: Ledger) -> None:
        self.moments: list[oracle.Moment] = []
        self._ledger = ledger
        self._events: dict[tuple[bytes, int], oracle.Event] = {}
        self._before = 0.0  # when the last look began: what a look finds may have been so since then
        self._looking = asyncio.Lock()

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[Observer]:
        await self.look()
        task = asyncio.create_task(self._watch())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            await self.look()

    async def look(self) -> None:
        """Before a reorganisation too: what it undoes must have been seen."""
        async with self._looking:
            began, anvil = time.time(), self._ledger.anvil
            head, safe, finalized = [await anvil.block(tag) for tag in ("latest", "safe", "finalized")]
            low = max(0, int(head["number"], 16) - 2 * EPOCH) if self._events else 0
            question = {"address": hex0x(self._ledger.loyfin.factory), "fromBlock": hex(low), "toBlock": "latest"}
            logs = await anvil.rpc("eth_getLogs", question)
            kept = {key: event for key, event in self._events.items() if event.block_number < low}
            for log in logs:
                key = (bytes.fromhex(log["blockHash"][2:]), int(log["logIndex"], 16))
                if (event := self._events.get(key) or _movement(log)) is not None:
                    kept[key] = event
            self._events = kept
            self.moments.append(
                oracle.Moment(
                    at=self._before or began,
                    events=kept,
                    head_time_ms=int(head["timestamp"], 16) * 1000,
                    safe_number=int(safe["number"], 16),
                    finalized_number=int(finalized["number"], 16),
                )
            )
            self._before = began


def _movement(log: Mapping[str, Any]) -> oracle.Event | None:
    """An issuance or redemption by the names that a registration uses."""
    (found,) = decode_logs([dict(log)]) or (None,)
    if found is None or found.name not in ("PointsIssued", "PointsRedeemed"):
        return None
    issued, fields = found.name == "PointsIssued", found.fields
    terms = {
        "kind": "loyfin.issuance" if issued else "loyfin.redemption",
        "factory": hex0x(fields["factory"]),
        "issuer": hex0x(fields["issuer"]),
        "holder": hex0x(fields["to" if issued else "from"]),
        "loyaltyId": hex0x(fields["loyaltyId"]),
        "amount": str(fields["amount"]),
        "expiresAt": str(fields["tokenId"]),
        "nonce": hex0x(fields["nonce"]),
    }
    return oracle.Event(found.block_hash, found.log_index, found.block_number, 0, terms)


# --------------------------------------------------------------------------- the brand's shop


@dataclass(frozen=True)
class Received:
    """One request at the shop's webhook, in the order of arrival."""

    id: UUID
    type: str
    body: Mapping[str, Any]
    at: float  # Unix seconds

    @property
    def operation(self) -> str:
        """The reference; of an unmatched signal the evidence's id."""
        data = self.body["data"]
        return str(data["operation"]["reference"] if "operation" in data else data["evidence"][0]["evidenceId"])

    @property
    def sequence(self) -> int:
        return int(self.body["data"]["sequence"])

    @property
    def generation(self) -> int:
        return int(self.body["data"]["generation"])


class Shop:
    """Receives webhooks as the docs ask receivers to: checks the signature, ignores what its sequence says is old."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.forged: list[str] = []
        self.overlaps: list[str] = []  # operations of which two attempts were under way at once
        self.taken: dict[str, Received] = {}  # by operation, the last one acted upon
        self.on_ready: Callable[[Received], None] | None = None  # told once per ready or restored that is taken
        self.pause = 0.0  # seconds until the shop answers
        self.url = ""
        self._verifier = Verifier(SECRET)
        self._under_way: Counter[str] = Counter()

    @classmethod
    @asynccontextmanager
    async def open(cls) -> AsyncIterator[Shop]:
        shop = cls()
        app = web.Application()
        app.router.add_post("/", shop._receive)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            shop.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
            yield shop
        finally:
            await runner.cleanup()

    async def _receive(self, request: web.Request) -> web.Response:
        text = await request.text()
        try:
            self._verifier.verify(text, {name.lower(): value for name, value in request.headers.items()})
        except WebhookVerificationError as error:
            self.forged.append(f"{error}: {text[:200]}")
            return web.Response(status=401)
        body = json.loads(text)
        got = Received(UUID(request.headers["webhook-id"]), body["type"], body, time.time())
        self._under_way[got.operation] += 1
        if self._under_way[got.operation] > 1:
            self.overlaps.append(f"{got.operation}: {got.type} ({got.sequence})")
        try:
            self.received.append(got)
            last = self.taken.get(got.operation)
            if last is None or got.sequence > last.sequence:
                self.taken[got.operation] = got
                if got.type in ("operation.ready", "operation.restored") and self.on_ready is not None:
                    self.on_ready(got)
            await asyncio.sleep(self.pause)
        finally:
            self._under_way[got.operation] -= 1
        return web.Response(text="thank you")

    def heard(self, operation: str, kind: str) -> list[Received]:
        """What arrived of an operation, of one type; repetitions too."""
        return [got for got in self.received if got.operation == operation and got.type == f"operation.{kind}"]

    async def hears(self, operation: str, kind: str, *, seconds: float = PATIENCE) -> Received:
        """Waits for the first such signal."""

        async def arrived() -> list[Received]:
            return self.heard(operation, kind)

        def so_far() -> str:
            return f"{operation} {kind}; so far {[(r.operation, r.type) for r in self.received[-20:]]}"

        return (await until(arrived, so_far, seconds=seconds, pause=0.02))[0]


# --------------------------------------------------------------------------- the daemon


class Daemon:
    """One process of `indexer run`, with its log in a file of its own."""

    _numbers = itertools.count(1)

    def __init__(self, process: asyncio.subprocess.Process, log: Path, started: float) -> None:
        self.process, self.log, self.started = process, log, started

    @classmethod
    async def start(
        cls,
        config: Path,
        *,
        program: Sequence[str] = CONSOLE,
        environ: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> Daemon:
        log = config.parent / f"daemon-{next(cls._numbers)}.log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("INDEXER_")}
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _DIES_WITH_PARENT, str(os.getpid())),
                *(*program, "run", "--config", str(config), *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=inherited | dict(environ or {}),
                cwd=Path(__file__).parents[2],
                # the kernel wakes stopped processes of a group whose parent has left, with SIGHUP and SIGCONT
                start_new_session=True,
            )
        return cls(process, log, time.monotonic())

    @classmethod
    @asynccontextmanager
    async def running(cls, config: Path, **how: Any) -> AsyncIterator[Daemon]:
        daemon = await cls.start(config, **how)
        try:
            yield daemon
        finally:
            await daemon.kill()

    # ---- signals

    def send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL; nothing when it is dead already."""
        if self.process.returncode is None:
            self.send(signal.SIGKILL)
            await self.process.wait()

    async def stop(self, *, seconds: float = PATIENCE) -> int:
        """SIGTERM, and its exit code."""
        self.send(signal.SIGTERM)
        return await self.ended(seconds=seconds)

    async def ended(self, *, seconds: float = PATIENCE) -> int:
        try:
            async with asyncio.timeout(seconds):
                return await self.process.wait()
        except TimeoutError:
            raise AssertionError(f"did not end within {seconds:g} s:\n{self.last_words()}") from None

    async def stopped(self, *, seconds: float = PATIENCE) -> None:
        """Waits until the process stands still (SIGSTOP)."""

        async def still() -> bool:
            return state_of(self.process.pid) == "T"

        await until(
            still, lambda: f"process {self.process.pid} stands still; {self.last_words()}", seconds=seconds, pause=0.01
        )

    # ---- what it says

    def entries(self) -> list[dict[str, Any]]:
        """Its log so far; lines that are no JSON as the event of an entry."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"event": line, "plain": True}
            found.append(entry if isinstance(entry, dict) else {"event": line, "plain": True})
        return found

    def said(self, event: str, **fields: object) -> list[dict[str, Any]]:
        return [
            entry
            for entry in self.entries()
            if entry.get("event") == event and all(entry.get(name) == value for name, value in fields.items())
        ]

    async def says(self, event: str, *, seconds: float = PATIENCE, **fields: object) -> dict[str, Any]:
        """Waits for an entry of its log. AssertionError when the process ends without it, or time does."""

        async def told() -> list[dict[str, Any]]:
            found = self.said(event, **fields)
            if not found and self.process.returncode is not None and not (found := self.said(event, **fields)):
                raise AssertionError(f"ended with {self.process.returncode} before {event!r}:\n{self.last_words()}")
            return found

        return (await until(told, lambda: f"{event!r} {fields}; {self.last_words()}", seconds=seconds))[0]

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    @property
    def base(self) -> str | None:
        """Where it serves HTTP; None while it does not."""
        if self.process.returncode is not None or not (found := self.said("listening")):
            return None
        return f"http://{found[0]['host']}:{found[0]['port']}"


def state_of(pid: int) -> str:
    """One letter of proc(5): T stands still, X is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


# --------------------------------------------------------------------------- all of it


def configuration(
    folder: Path, dsn: str, ledger: Ledger, shop: Shop, *, lease_seconds: float = LEASE_SECONDS, more: str = ""
) -> Path:
    """Writes a file of configuration. `more` follows on the brand's table: policies are set, tables may be added."""
    folder.mkdir(parents=True, exist_ok=True)
    secret, path = folder / "secret", folder / "indexer.toml"
    secret.write_text(SECRET)
    factories = ", ".join(f'{{ address = "{hex0x(a)}", start_block = {block} }}' for a, block in ledger.factories)
    path.write_text(
        f"""
state_dir = "{folder}"
[database]
url = "{dsn}"
pool_size = 6
lease_seconds = {lease_seconds}
[http]
listen = "127.0.0.1:0"
[[chains]]
name = "sandbox"
chain_id = {ledger.anvil.chain_id}
rpc = [ {{ url = "{ledger.anvil.url}" }} ]
websocket = "{ledger.anvil.websocket_url}"
factories = [ {factories} ]
poll_seconds = 0.2
tags_seconds = 0.5
silent_seconds = 2
second_look_seconds = 1
verify_calls_per_second = 50
[[brands]]
name = "{BRAND}"
issuers = ["{hex0x(ledger.brand.address)}"]
policies = [ {{ max_amount = "{SMALL}", confidence = "included" }}, {{ confidence = "safe" }} ]
[[brands.webhooks]]
name = "shop"
url = "{shop.url}"
secret_files = ["{secret}"]
events = ["operation.*", "settlement.*"]
allow = ["127.0.0.0/8"]
timeout_seconds = 1
{more}"""
    )
    return path


class World:
    """One test's: a ledger, a shop, a database, and the daemons that were started on it."""

    def __init__(self, ledger: Ledger, shop: Shop, database: Database, config: Path, token: str) -> None:
        self.ledger, self.shop, self.database, self.config = ledger, shop, database, config
        self.daemons: list[Daemon] = []
        self.operations: dict[str, UUID] = {}
        self.legs: dict[str, dict[str, str]] = {}  # as registered, by reference
        self.observer = Observer(ledger)
        self._headers = {"Authorization": f"Bearer {token}"}

    @classmethod
    @asynccontextmanager
    async def of(
        cls, ledger: Ledger, database: Database, folder: Path, *, lease_seconds: float = LEASE_SECONDS, more: str = ""
    ) -> AsyncIterator[World]:
        async with Shop.open() as shop:
            config = configuration(folder, database.url, ledger, shop, lease_seconds=lease_seconds, more=more)
            async with database.pool.acquire() as conn:
                token, _ = await tokens.add(conn, "acceptance", None, tokens.SCOPES)
            world = cls(ledger, shop, database, config, token)
            try:
                async with world.observer.watching():
                    yield world
            finally:
                for daemon in world.daemons:
                    await world.measure(daemon)
                    await daemon.kill()

    async def start(self, **how: Any) -> Daemon:
        """A daemon more; it is killed with the world."""
        daemon = await Daemon.start(self.config, **how)
        self.daemons.append(daemon)
        return daemon

    # ---- HTTP

    async def request(self, method: str, path: str, *, json: Any = None, seconds: float = PATIENCE) -> tuple[int, Any]:
        """Status and body, from whichever daemon answers: asked again until one does, as a brand's shop must."""
        deadline = time.monotonic() + seconds
        reason: object = "no daemon listens"
        async with aiohttp.ClientSession(headers=self._headers, timeout=aiohttp.ClientTimeout(total=5)) as http:
            while time.monotonic() < deadline:
                for daemon in reversed(self.daemons):
                    if (base := daemon.base) is None or state_of(daemon.process.pid) == "T":
                        continue
                    try:
                        async with http.request(method, base + path, json=json) as response:
                            body = await response.json(content_type=None)
                            if response.status < 500:
                                return response.status, body
                            reason = (response.status, body)
                    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                        reason = error
                await asyncio.sleep(0.05)
        raise AssertionError(f"{method} {path} was not answered within {seconds:g} s: {reason!r}")

    async def status(self, daemon: Daemon) -> dict[str, Any]:
        """/v1/status of one process."""
        async with aiohttp.ClientSession(headers=self._headers) as http:
            async with http.get(f"{daemon.base}/v1/status") as response:
                assert response.status == 200, await response.text()
                found: dict[str, Any] = await response.json()
            await self.measure(daemon)
            return found

    async def measure(self, daemon: Daemon) -> None:
        """Its metrics, for whoever watches them (tests/movements.py); nothing of one that stands still or is gone."""
        if movements.current is None or daemon.base is None or state_of(daemon.process.pid) == "T":
            return
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http:
            with suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with http.get(f"{daemon.base}/metrics") as response:
                    movements.current.scrape(await response.text(), daemon)

    # ---- the brand's side

    def action(self, amount: int, *, redeem: bool = False, customer: int = 0, **terms: Any) -> Signed[Any]:
        """A signed action of the brand, not submitted."""
        ledger, holder = self.ledger, self.ledger.customers[customer].address
        make = ledger.loyfin.redemption if redeem else ledger.loyfin.issuance
        return sign(make(ledger.brand, holder, amount, loyalty_id=LOYALTY_ID, **terms), ledger.brand)

    async def register(self, reference: str, action: Issuance | Redemption, **given: Any) -> UUID:
        """Registers one leg that is to be settled by the action; `given` members replace the leg's."""
        leg = {
            "kind": "loyfin.issuance" if isinstance(action, Issuance) else "loyfin.redemption",
            "chainId": str(action.chain_id),
            "factory": hex0x(action.verifying_contract),
            "issuer": hex0x(action.issuer),
            "holder": hex0x(action.holder),
            "loyaltyId": hex0x(action.loyalty_id),
            "amount": str(action.amount),
            "expiresAt": str(action.expires_at),
            "deadline": str(action.deadline),
            "nonce": hex0x(action.nonce),
        } | given
        body = {"brand": BRAND, "reference": reference, "requestedAt": datetime.now(UTC).isoformat(), "legs": [leg]}
        code, answer = await self.request("POST", "/v1/operations", json=body)
        assert code in (200, 201), (code, answer)  # 200: an earlier attempt was recorded and its answer lost
        self.operations[reference], self.legs[reference] = UUID(answer["id"]), leg
        return self.operations[reference]

    async def fulfil(self, reference: str, generation: int) -> str:
        """Acknowledges; the recorded outcome: fulfilled, or reverted."""
        path = f"/v1/operations/{self.operations[reference]}/fulfil"
        code, answer = await self.request("POST", path, json={"generation": generation, "receipt": {"by": "the shop"}})
        assert code in (200, 409), (code, answer)
        return str(answer["outcome"])

    async def submit(self, signed: Signed[Any]) -> Hash32:
        """By a courier of its own."""
        return await self.ledger.loyfin.submit(signed, relayer=next(self.ledger.relayers))

    async def settles(self, reference: str, amount: int = 50, *, seconds: float = PATIENCE, **terms: Any) -> Received:
        """Registers, submits, and waits until the shop is told that it is ready."""
        signed = self.action(amount, **terms)
        await self.register(reference, signed.action)
        await self.submit(signed)
        return await self.shop.hears(reference, "ready", seconds=seconds)

    # ---- the tables

    async def holders(self) -> dict[str, UUID | None]:
        """Who holds each task's lease now."""
        rows = await self.database.pool.fetch(
            "SELECT task, CASE WHEN until > clock_timestamp() THEN holder END AS holder FROM indexer.lease"
        )
        return {row["task"]: row["holder"] for row in rows}

    async def states(self) -> dict[str, str]:
        rows = await self.database.pool.fetch("SELECT reference, state FROM indexer.operation")
        return {row["reference"]: row["state"] for row in rows}

    async def unsent(self) -> list[asyncpg.Record]:
        """Signals without a number, and deliveries that wait."""
        rows: list[asyncpg.Record] = await self.database.pool.fetch(
            "SELECT type, 'unnumbered' AS why FROM indexer.outbox WHERE sequence IS NULL"
            " UNION ALL SELECT type, coalesce(error, 'pending') FROM indexer.delivery WHERE state = 'pending'"
        )
        return rows

    async def comes_to_rest(
        self, expected: Callable[[], Awaitable[Mapping[str, str]]], *, finalized: bool, seconds: float = PATIENCE
    ) -> None:
        """Waits until each operation is in the state expected, its evidence finalized if so asked, and everything sent."""
        seen: dict[str, Any] = {}

        async def resting() -> bool:
            wanted, states = await expected(), await self.states()
            open_books = await self.database.pool.fetch(
                "SELECT reference FROM indexer.operation"
                " WHERE state IN ('ready', 'fulfilled') AND finalized_generation < generation"
            )
            seen["wrong"] = {
                name: (states.get(name), state) for name, state in wanted.items() if states.get(name) != state
            }
            seen["not finalized"] = [row["reference"] for row in open_books if finalized]
            seen["unsent"] = [tuple(row) for row in await self.unsent()]
            return not any(seen.values())

        def lacking() -> str:
            words = "\n".join(daemon.last_words() for daemon in self.daemons[-2:])
            return f"came to rest: (is, should be) {seen}\n{words}"

        await until(resting, lacking, seconds=seconds, pause=0.1)

    # ---- the judgement

    async def judge(
        self,
        expected: Mapping[str, str] | Callable[[], Awaitable[Mapping[str, str]]],
        *,
        finalized: bool = False,
        grace: float = 5.0,
    ) -> None:
        """Once everything is at rest, the oracle: facts, states, traces, ready, and what the shop received."""

        async def given() -> Mapping[str, str]:
            return expected if isinstance(expected, Mapping) else await expected()

        await self.comes_to_rest(given, finalized=finalized)
        wrong = await self._misplaced()
        await self.observer.look()  # the last event may be younger than the last look
        async with self.database.pool.acquire() as conn:
            wrong += await oracle.judge_database(conn)
            wrong += oracle.judge_states(await given(), await oracle.read_states(conn, BRAND))
        wrong += oracle.judge_ready(await self._told_ready(), self.observer.moments, grace=grace)
        misdelivered: list[str] = []

        async def delivered() -> bool:
            misdelivered[:] = await self._misdelivered()
            return not misdelivered

        with suppress(AssertionError):  # what became final since it came to rest is still on its way
            await until(delivered, "all is delivered")
        wrong += misdelivered
        assert not wrong, "\n".join(wrong)

    async def _misplaced(self, *, seconds: float = PATIENCE) -> list[str]:
        """What is wrong with the stored facts, once head and history have passed the node's present head."""
        head, pool = await self.ledger.anvil.block_number(), self.database.pool
        contracts = truth.Contracts(frozenset(address for address, _ in self.ledger.factories))
        wanted = await truth.read_truth(self.ledger.anvil.url, contracts, ABI, head)
        wrong: list[str] = []

        async def stored() -> bool:
            if (await pool.fetchval("SELECT head_number FROM indexer.chain WHERE chain_id = $1", CHAIN_ID) or 0) < head:
                return False
            async with pool.acquire() as conn:
                wrong[:] = oracle.judge_facts(wanted, await oracle.read_facts(conn, CHAIN_ID, head))
            return not wrong

        with suppress(AssertionError):
            await until(stored, "the facts are the truth", seconds=seconds, pause=0.2)
        if not await stored() and not wrong:
            return [f"the head did not reach block {head}"]
        held = await pool.fetch(
            "SELECT number, hash FROM indexer.block WHERE chain_id = $1 AND canonical AND number <= $2", CHAIN_ID, head
        )
        for row in held:
            if (await self.ledger.anvil.block(row["number"]))["hash"] != hex0x(row["hash"]):
                wrong.append(f"block {row['number']} is held as {hex0x(row['hash'])}, and the chain has another")
        return wrong

    async def _told_ready(self) -> list[oracle.Ready]:
        """Every ready and restored, with what its operation waited for."""
        rows = await self.database.pool.fetch(
            "SELECT payload, extract(epoch FROM created_at)::float8 AS at FROM indexer.outbox"
            " WHERE type IN ('operation.ready', 'operation.restored') ORDER BY position"
        )
        told = []
        for row in rows:
            data = row["payload"]["data"]
            reference = data["operation"]["reference"]
            leg = self.legs[reference]
            terms = {
                name: leg[name]
                for name in ("kind", "factory", "issuer", "holder", "loyaltyId", "amount", "expiresAt", "nonce")
            }
            demand = oracle.Demand("included" if int(leg["amount"]) <= SMALL else "safe")
            legs = tuple(
                oracle.Basis(terms, bytes.fromhex(found["blockHash"][2:]), found["logIndex"], demand)
                for found in data["evidence"]
            )
            told.append(oracle.Ready(reference, row["at"], legs))
        return told

    async def _misdelivered(self) -> list[str]:
        """What is wrong with what the shop received: signatures, order, anything missing."""
        shop, pool = self.shop, self.database.pool
        known = {row["id"]: row["type"] for row in await pool.fetch("SELECT id, type FROM indexer.outbox")}
        received = [
            (got.id, UUID(got.body["data"]["operation"]["id"]), got.sequence)
            for got in shop.received
            if "operation" in got.body["data"]
        ]
        wrong = oracle.judge_received(received, known.keys())
        wrong += [f"not signed by us: {what}" for what in shop.forged]
        wrong += [f"two attempts at once: {what}" for what in shop.overlaps]
        arrived = {got.id for got in shop.received}
        for row in await pool.fetch("SELECT signal_id, type, state FROM indexer.delivery"):
            if row["state"] == "delivered" and row["signal_id"] not in arrived:
                wrong.append(f"{row['type']} {row['signal_id']} counts as delivered, and never arrived")
            if row["state"] not in ("delivered", "superseded", "dropped"):
                wrong.append(f"{row['type']} {row['signal_id']} is {row['state']}")
        queued = {row["signal_id"] for row in await pool.fetch("SELECT signal_id FROM indexer.delivery")}
        hints = {"operation.confirming", "operation.submitted", "operation.rejected"}
        return wrong + [
            f"{kind} {id} was never queued" for id, kind in known.items() if id not in queued and kind not in hints
        ]
