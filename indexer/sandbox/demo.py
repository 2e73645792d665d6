"""`indexer demo`: a chain, partners, a database, the daemon and a shop on this machine alone, and a story of some eighty operations.

Promises to end by itself with a verdict that its exit status follows, and to leave nothing running or lying about unless asked
to (`--keep`) or something failed. What happens in between is told in `story.py`, `partner_story.py` and `reorganisations.py`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from indexer.model.types import hex0x
from indexer.sandbox.anvil import Anvil, AnvilFailed, NoAnvil, RpcRefused
from indexer.sandbox.author import CONFIRMED_UP_TO, INCLUDED_UP_TO, Draft
from indexer.sandbox.client import Answered, Client
from indexer.sandbox.ledger import BLOCK_SECONDS, BLOOM, CHAIN_ID, ORCHIDS, SLOTS, Ledger, Refused
from indexer.sandbox.partner_story import PartnerStories
from indexer.sandbox.partners.accounts import KEYBAN_KEY, QIIBEE_KEY, Accounts, PartnerRefused
from indexer.sandbox.receiver import Receiver
from indexer.sandbox.reorganisations import Reorganisations
from indexer.sandbox.service import Service, ServiceFailed, free_port
from indexer.sandbox.shop import HINTS, Disappointed, Order, Shop
from indexer.sandbox.table import Screen
from indexer.sandbox.transactions import Refused as ContractRefused
from indexer.sandbox.verdict import Verdict, judge

BRAND = "bloom"
STORY_SECONDS = 180.0  # for all stories together, on the slowest machine
POLL_SECONDS = 0.5
REQUESTS_PER_SECOND = 20
SHOP_SCOPES = ("operations:read", "operations:write", "fulfil", "resolve", "status")


def configuration(ledger: Ledger, accounts: Accounts, folder: Path, port: int, webhook: str) -> str:
    """The indexer.toml of the demo: every policy once, a chain that is final within ten seconds, all three partners."""
    # the first one's block for both: the hub is older than its factory, and history is to be whole for it too
    start = ledger.plain.deployment.block_number
    factories = ",\n    ".join(
        "{ "
        + f'address = "{hex0x(d.factory)}", start_block = {start}'
        + (f', event_hub = "{hex0x(d.event_hub)}"' if d.event_hub else "")
        + " }"
        for d in (ledger.plain.deployment, ledger.hub.deployment)
    )
    hints = ", ".join(json.dumps(hint) for hint in sorted(HINTS))
    return f"""\
state_dir = {json.dumps(str(folder / "state"))}

[http]
listen = "127.0.0.1:{port}"

[[chains]]
name = "anvil"
chain_id = {CHAIN_ID}
rpc = [ {{ url = "{ledger.node.url}" }} ]
websocket = "{ledger.node.websocket_url}"
factories = [
    {factories},
]
tags_seconds = 0.5
second_look_seconds = 1
verify_calls_per_second = 50

[[brands]]
name = "{BRAND}"
issuers = ["{hex0x(BLOOM.address)}"]
policies = [
    {{ loyalty_id = "{hex0x(ORCHIDS.loyalty_id)}", kind = "loyfin.redemption", confidence = "finalized" }},
    {{ max_amount = "{INCLUDED_UP_TO}", confidence = "included" }},
    {{ max_amount = "{CONFIRMED_UP_TO}", confidence = "confirmed", seconds = 1 }},
    {{ confidence = "safe" }},
]

[brands.loyfin]
url = "{accounts.loyfin_url}"
poll = {POLL_SECONDS}
requests_per_second = {REQUESTS_PER_SECOND}

[brands.keyban]
url = "{accounts.keyban_url}"
api_key_file = "keyban.key"
network = "{accounts.keyban.network}"
poll = {POLL_SECONDS}
requests_per_second = {REQUESTS_PER_SECOND}

[brands.qiibee]
url = "{accounts.qiibee_url}"
api_key_file = "qiibee.key"
poll = {POLL_SECONDS}
requests_per_second = {REQUESTS_PER_SECOND}
settle_after = 1

[[brands.webhooks]]
name = "shop"
url = "{webhook}"
secret_files = ["shop.secret"]
events = ["operation.*", {hints}, "settlement.unmatched"]
allow = ["127.0.0.0/8"]
"""


@dataclass(frozen=True, slots=True)
class World:
    """Everything that runs."""

    ledger: Ledger
    receiver: Receiver
    service: Service
    shop: Shop
    stories: Reorganisations
    accounts: Accounts
    at_partners: PartnerStories
    openings: list[Draft]
    token: str


@asynccontextmanager
async def _world(folder: Path, screen: Screen, orders: dict[str, Order], seed: int) -> AsyncIterator[World]:
    """Starts chain, shop and daemon; stops them in reverse."""
    async with AsyncExitStack() as stack:
        screen.step("starting Anvil")
        node = await stack.enter_async_context(
            Anvil(chain_id=CHAIN_ID, block_time=BLOCK_SECONDS, slots_in_an_epoch=SLOTS, log=folder / "anvil.log")
        )
        screen.step("deploying two Loyfin factories, one with an event hub")
        ledger = await Ledger.open(node, seed)
        await stack.enter_async_context(ledger.watching())
        await stack.enter_async_context(ledger.mining())
        accounts = await stack.enter_async_context(Accounts.open(seed))

        def settled_at(evidence: Mapping[str, Any]) -> float | None:
            return accounts.settled_at(evidence) or ledger.settled_at(evidence)

        shop = await stack.enter_async_context(Shop(BRAND, orders, settled_at, screen.signal))
        secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
        receiver = await stack.enter_async_context(Receiver(secret, shop.take))
        stories = Reorganisations(shop, ledger, seed)
        openings = stories.opening_drafts()
        sent = [await ledger.submit(draft.signed) for draft in openings]

        screen.step("starting PostgreSQL and the daemon: indexer run --embedded")
        port = free_port()
        config = folder / "indexer.toml"
        for name, text in (("shop.secret", secret), ("keyban.key", KEYBAN_KEY), ("qiibee.key", QIIBEE_KEY)):
            (folder / name).touch(mode=0o600)
            (folder / name).write_text(text + "\n")
        config.write_text(configuration(ledger, accounts, folder, port, receiver.url))
        service = await stack.enter_async_context(Service(config, port))
        token = await service.token("shop", SHOP_SCOPES, BRAND)
        shop.open(await stack.enter_async_context(Client(service.url, token)))
        for tx_hash in sent:
            await ledger.mined(tx_hash)
        yield World(
            ledger, receiver, service, shop, stories, accounts, PartnerStories(stories, accounts), openings, token
        )


async def _tell(world: World) -> list[str]:
    """Tells all stories side by side; answers with those that went wrong, and why."""
    told, partners = world.stories, world.at_partners
    failed: list[str] = []

    async def tell(name: str, story: Coroutine[Any, Any, None]) -> None:
        try:
            await story
        except (
            Disappointed,
            Refused,
            Answered,
            RpcRefused,
            PartnerRefused,
            TimeoutError,
            aiohttp.ClientError,
        ) as error:
            failed.append(f"{name}: {error or type(error).__name__}")

    stories: dict[str, Coroutine[Any, Any, None]] = {
        "never": partners.never(),  # first: nothing that stays open is older
        "included": told.quick(),
        "confirmed": told.confirmed(),
        "amount mismatch": told.mismatch(),
        "registered after its event": told.openings(world.openings),
        "deadline": told.deadline(),
        "retry": told.retry(),
        "incomplete": told.half(),
        "foreign issuer": told.copied_hash(),
        "look-alike": told.look_alike(),
        "rogue token": told.rogue_token(),
        "issuances": told.issuances(),
        "hub": told.through_the_hub(),
        "finalized": told.orchids(),
        "two buckets": told.two_buckets(),
        "twins": told.twins(),
        "cancelled": told.cancelled(),
        "cancelled and executed": told.cancelled_and_executed(),
        "wallet and amount": told.by_wallet(),
        "lost answer": told.lost_answer(),
        "reorganisations": told.reorganisations(),
        "Keyban mints": partners.keyban_mints(),
        "Keyban burns": partners.keyban_burns(),
        "qiibee": partners.qiibee_points(),
        "two ledgers": partners.across(),
        "two transfers": partners.two_transfers(),
        "minted before": partners.minted_before(),
        "undated": partners.undated(),
        "two equal mints": partners.twins(),
        "failed transfer": partners.failed(),
        "reversed": partners.reversed(),
        "relayed": partners.relayed(),
        "rejected and mined": partners.rejected_and_mined(),
        "bad days": partners.bad_days(),
    }
    try:
        async with asyncio.timeout(STORY_SECONDS), asyncio.TaskGroup() as group:
            for name, story in stories.items():
                group.create_task(tell(name, story), name=name)
    except TimeoutError:
        failed.append(f"the stories took more than {STORY_SECONDS:.0f} s")
    return failed


async def _watched(world: World) -> list[str]:
    """The stories, given up at once when the daemon ends by itself. Raises ServiceFailed."""
    telling = asyncio.create_task(_tell(world))
    ending = asyncio.create_task(world.service.ended())
    try:
        await asyncio.wait((telling, ending), return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            await ending
        return await telling
    finally:
        for task in (telling, ending):
            task.cancel()
        await asyncio.gather(telling, ending, return_exceptions=True)


class Interruption:
    """SIGINT and SIGTERM: the first ends what runs, in order; while something is kept it only ends the waiting."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._task = asyncio.current_task()
        self._kept = asyncio.Event()
        self._keeping = False
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._came, number)

    def _came(self, number: int) -> None:
        self._kept.set()
        if not self._keeping and self.number is None and self._task is not None:
            self.number = number
            self._task.cancel()

    async def wait(self) -> None:
        self._keeping = True
        await self._kept.wait()


async def run_demo(*, as_json: bool, keep: bool, seed: int) -> int:
    """The whole demo; returns the exit status. Progress goes to standard error where standard output is for JSON."""
    interruption = Interruption()
    folder = _new_folder()
    orders: dict[str, Order] = {}
    screen = Screen(sys.stderr if as_json else sys.stdout, orders)
    verdict = Verdict()
    leave = False
    try:
        async with AsyncExitStack() as stack:
            with screen.live():
                world = await stack.enter_async_context(_world(folder, screen, orders, seed))
                screen.step("the shop is open")
                failed = await _watched(world)
                truths = [truth async for truth in world.shop.client.operations()]
            verdict = judge(
                world.shop, world.receiver, truths, world.ledger.reorganisations, failed, world.at_partners.alerts
            )
            if not verdict.ok:
                screen.summary(f"daemon's log     {error}" for error in world.service.errors())
            _report(verdict, screen, as_json)
            leave = not verdict.ok
            if keep:
                _tell_urls(world, folder, screen)
                await interruption.wait()
    except asyncio.CancelledError:
        if interruption.number is None:
            raise
        screen.console.print("interrupted", markup=False)
        return 128 + interruption.number
    except (
        NoAnvil,
        AnvilFailed,
        ServiceFailed,
        ContractRefused,
        RpcRefused,
        Refused,
        Answered,
        TimeoutError,
        OSError,
    ) as error:
        leave = True
        verdict = Verdict(failures=[f"{type(error).__name__}: {error}"])
        _report(verdict, screen, as_json)
    finally:
        if leave:
            screen.console.print(f"logs and state are left in {folder}", markup=False)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if verdict.ok else 1


def _new_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="indexer-demo-"))
    folder.chmod(0o711)  # the account that PostgreSQL runs as must get through
    return folder


def _report(verdict: Verdict, screen: Screen, as_json: bool) -> None:
    screen.summary(verdict.lines(screen.seconds))
    if as_json:
        sys.stdout.write(json.dumps(verdict.document()) + "\n")
        sys.stdout.flush()


def _tell_urls(world: World, folder: Path, screen: Screen) -> None:
    """What a brand's engineer needs to point a staging shop at this."""
    plain, hub = world.ledger.plain.deployment, world.ledger.hub.deployment
    customer, member = world.accounts.keyban.open_account(), world.accounts.qiibee.enrol()
    token = world.accounts.qiibee.token.id
    screen.summary(
        [
            "",
            "everything is left running until Ctrl-C:",
            f"  API       {world.service.url}",
            f"  token     {world.token}",
            f"  metrics   {world.service.url}/metrics",
            f"  webhooks  {world.receiver.url} (the shop's; change it in the configuration)",
            f"  RPC       {world.ledger.node.url}",
            f"  socket    {world.ledger.node.websocket_url}",
            f"  factory   {hex0x(plain.factory)}",
            f"  factory   {hex0x(hub.factory)}, with the hub {hex0x(hub.event_hub or b'')}",
            f"  issuer    {hex0x(BLOOM.address)}",
            f"  Keyban    {world.accounts.keyban_url}, key {KEYBAN_KEY}, account {customer.id}, wallet {customer.wallet}",
            f"  qiibee    {world.accounts.qiibee_url}, key {QIIBEE_KEY}, auth_id {member.auth_id}, token {token}",
            f"  Loyfin    {world.accounts.loyfin_url}",
            f"  commands  indexer status --embedded --config {folder / 'indexer.toml'}",
            f"  database  under {folder / 'state'}; psql through the socket that postgres/address.json names",
            f"  log       {world.service.log}",
        ]
    )
