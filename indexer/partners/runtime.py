"""The partners of a configuration at work in this process: clients, keys that are shared, and a task for each key.

Accounts with one key are polled under one lease, so that its budget holds however many replicas run; each account alone where
keys differ. A partner that is dead stops nobody: its errors stay in its poller.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Final

from indexer.config import Brand, Config, Keyban, Loyfin, Qiibee, followed_chain
from indexer.partners.account import Desk
from indexer.partners.client import Client, Observe
from indexer.partners.credential import Clock, Credential
from indexer.partners.exchange import Http
from indexer.partners.keyban import KeybanPoller
from indexer.partners.loyfin import LoyfinPoller
from indexer.partners.orders import Ledger
from indexer.partners.qiibee import QiibeePoller
from indexer.partners.transactions import Words
from indexer.store.leases import Lease, LeaseLost
from indexer.store.partner_accounts import Account
from indexer.store.wakeups import Wakeups
from indexer.telemetry import Metrics

Body = Callable[[Lease], Awaitable[None]]
KEY_HEADERS: Final = {"keyban": "X-Api-Key", "qiibee": "X-API-KEY"}


@dataclass(frozen=True, slots=True)
class Member:
    """One account: who it is of, how it is asked."""

    account: Account
    brand: Brand
    section: Loyfin | Keyban | Qiibee
    client: Client


def accounts_of(config: Config) -> list[tuple[Account, Brand, Loyfin | Keyban | Qiibee]]:
    """Every account that the configuration names."""
    return [
        (Account(brand.name, partner), brand, section)
        for brand in config.brands
        for partner, section in (("loyfin", brand.loyfin), ("keyban", brand.keyban), ("qiibee", brand.qiibee))
        if section is not None
    ]


def key_of(section: Loyfin | Keyban | Qiibee) -> str:
    """The API key; empty where there is none."""
    return "" if isinstance(section, Loyfin) else section.api_key.get_secret_value()


@asynccontextmanager
async def open_client(
    account: Account,
    section: Loyfin | Keyban | Qiibee,
    credential: Credential | None = None,
    *,
    clock: Clock,
    rng: Random,
    observe: Observe,
) -> AsyncIterator[Client]:
    """A client for one account; with a budget of its own where no credential is given."""
    key = key_of(section)
    async with Http(section.url, {KEY_HEADERS[account.partner]: key} if key else {}) as http:
        yield Client(
            f"{account.partner} account of {account.brand}",
            http,
            credential or Credential(section.requests_per_second, clock, rng),
            clock=clock,
            rng=rng,
            observe=observe,
            secrets=(key,) if key else (),
        )


class PartnerRuntime:
    """Made by `open`; `tasks` are bodies for the supervisor, by lease name."""

    def __init__(
        self, groups: Sequence[Sequence[Member]], config: Config, metrics: Metrics, wakeups: Wakeups, clock: Clock
    ) -> None:
        self._config, self._metrics, self._wakeups, self._clock = config, metrics, wakeups, clock
        self.tasks: dict[str, Body] = {}
        for group in groups:
            self.tasks[_task_of(group[0])] = self._body(group)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, config: Config, metrics: Metrics, wakeups: Wakeups, rng: Random, clock: Clock | None = None
    ) -> AsyncIterator[PartnerRuntime]:
        clock = clock or Clock()
        groups: dict[tuple[str, str, str], list[Member]] = {}
        credentials: dict[tuple[str, str, str], Credential] = {}
        async with AsyncExitStack() as stack:
            for account, brand, section in accounts_of(config):
                key = key_of(section)
                name = (account.partner, section.url, hashlib.sha256(key.encode()).hexdigest())
                credential = credentials.get(name)
                if credential is None:
                    credential = credentials[name] = Credential(section.requests_per_second, clock, rng)
                credential.slower(section.requests_per_second)
                observe = _observer(metrics, account)
                client = await stack.enter_async_context(
                    open_client(account, section, credential, clock=clock, rng=rng, observe=observe)
                )
                groups.setdefault(name, []).append(Member(account, brand, section, client))
            yield cls(list(groups.values()), config, metrics, wakeups, clock)

    def _body(self, group: Sequence[Member]) -> Body:
        async def poll(lease: Lease) -> None:
            group[0].client.credential.begin(lease.idle, lease.check)
            try:
                async with asyncio.TaskGroup() as tasks:
                    for member in group:
                        tasks.create_task(self._poller(member, lease).run(), name=f"poll {' '.join(member.account)}")
            except BaseExceptionGroup as errors:
                raise _cause(errors) from errors

        return poll

    def _poller(self, member: Member, lease: Lease) -> KeybanPoller | QiibeePoller | LoyfinPoller:
        desk = Desk(member.account, member.client, lease, self._wakeups, self._metrics, self._clock)
        section = member.section
        if isinstance(section, Loyfin):
            return LoyfinPoller(desk, member.brand.issuers, section.poll)
        if isinstance(section, Qiibee):
            return QiibeePoller(desk, section.poll, section.settle_after, words_of(section))
        return KeybanPoller(
            desk, ledger_of(member.brand.name, section, self._config), section.poll, keep=section.finalized_after or 0.0
        )


def _task_of(member: Member) -> str:
    """Of whoever uses that key, so that its budget is one whatever else is configured: a key is one brand's, no key is everybody's."""
    section = member.section
    whose = member.brand.name if key_of(section) else hashlib.sha256(section.url.encode()).hexdigest()[:8]
    return f"poll:{member.account.partner}:{whose}"


def _cause(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """What the supervisor should hear of a group that ended: the lost lease, where that is it, else the first error."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [errors]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending += error.exceptions
        else:
            leaves.append(error)
    return next((error for error in leaves if isinstance(error, LeaseLost)), leaves[0])


def ledger_of(brand: str, section: Keyban, config: Config) -> Ledger:
    """Where a brand's Keyban orders stand."""
    chain = followed_chain(section.network, config)
    return Ledger(brand, section.network, section.decimals, chain.chain_id if chain is not None else None)


def words_of(section: Qiibee) -> Words:
    """What the statuses of a brand's qiibee transactions mean."""
    return Words(section.success, section.pending, section.failed)


def asked_chains(config: Config) -> frozenset[int]:
    """Chains that a partner's transactions are looked up on."""
    found = (followed_chain(brand.keyban.network, config) for brand in config.brands if brand.keyban is not None)
    return frozenset(chain.chain_id for chain in found if chain is not None)


def _observer(metrics: Metrics, account: Account) -> Callable[[str, str, float], None]:
    def observe(endpoint: str, outcome: str, seconds: float) -> None:
        metrics.partner_requests.labels(account.brand, account.partner, endpoint, outcome).inc()
        metrics.partner_seconds.labels(account.partner, endpoint, outcome).observe(seconds)

    return observe
