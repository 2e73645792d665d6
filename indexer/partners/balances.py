"""What a holder has at Keyban and qiibee, asked for on demand: for people to look at, never for settling.

Promises a row or the reason why there is none, for each account that was asked; nothing is stored. Keyban's own figure is
optimistic and says so; the sum over its orders stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from decimal import Decimal
from random import Random
from typing import Any
from urllib.parse import quote

from indexer.config import Config, Keyban, Qiibee
from indexer.partners.client import Client, PartnerError, Refused
from indexer.partners.credential import Clock
from indexer.partners.orders import MINT, Ledger, Page, Unusable, page_of, transfers_of
from indexer.partners.reading import Drift, amount, identifier, plain_decimal, table
from indexer.partners.runtime import accounts_of, ledger_of, open_client
from indexer.partners.walk import Walker


@dataclass(frozen=True, slots=True)
class PartnerBalance:
    """One figure. `balance` as the partner writes it, in points; None with the `problem` that there is instead."""

    brand: str
    partner: str
    holder: str
    token: str | None
    balance: str | None
    source: str
    problem: str | None = None


async def partner_balances(
    config: Config, *, keyban: str | None = None, qiibee: str | None = None, brand: str | None = None
) -> list[PartnerBalance]:
    """`keyban` is a walletId, `qiibee` an auth_id; asked at every account of the configuration, or at `brand`'s alone."""
    found: list[PartnerBalance] = []
    async with AsyncExitStack() as stack:
        for account, owner, section in accounts_of(config):
            holder = {"keyban": keyban, "qiibee": qiibee}.get(account.partner)
            if holder is None or brand not in (None, owner.name):
                continue
            client = await stack.enter_async_context(
                open_client(account, section, clock=Clock(), rng=Random(), observe=lambda *_: None)  # noqa: S311
            )
            try:
                if isinstance(section, Keyban):
                    found += await _keyban(client, ledger_of(owner.name, section, config), holder)
                elif isinstance(section, Qiibee):
                    found += await _qiibee(client, owner.name, holder)
            except (PartnerError, Unusable) as error:
                found.append(PartnerBalance(owner.name, account.partner, holder, None, None, "", str(error)))
    return found


async def _keyban(client: Client, ledger: Ledger, wallet: str) -> list[PartnerBalance]:
    async def fetch(page: int, size: int) -> Page:
        params = {"walletId": wallet, "currentPage": str(page), "pageSize": str(size)}
        return page_of(await client.get("orders", "/v1/loyalty/orders", params), Drift())

    walk = await Walker().walk(fetch)
    sums: dict[str | None, Decimal] = {}
    unread = len(walk.unusable)
    for row in walk.rows.values():
        try:
            transfers = transfers_of(row, wallet, ledger, undated=False, drift=Drift())
        except ValueError:
            unread += 1
            continue
        for transfer in transfers:
            if transfer.status in ("included", "succeeded") and transfer.amount_text is not None:
                value = Decimal(transfer.amount_text)
                sums[transfer.token] = sums.get(transfer.token, Decimal(0)) + (
                    value if transfer.kind == MINT else -value
                )
    note = None if walk.complete and not unread else f"not all of it: {unread} orders could not be read"
    rows = [
        PartnerBalance(ledger.brand, "keyban", wallet, token, plain_decimal(total), "orders", note)
        for token, total in (sums or {None: Decimal(0)}).items()
    ]
    try:
        document = await client.get("account", f"/v1/loyalty/account/{quote(wallet, safe='')}")
    except Refused:
        return rows  # no page describes how accounts are read: where this is not the way, the orders have to do
    hoped = identifier(table(table(document).get("loyalty")).get("optimisticBalance"))
    return rows if hoped is None else [*rows, PartnerBalance(ledger.brand, "keyban", wallet, None, hoped, "optimistic")]


async def _qiibee(client: Client, brand: str, auth_id: str) -> list[PartnerBalance]:
    document = await client.get("balances", f"/users/{quote(auth_id, safe='')}/balances")
    entries: Any = table(document).get("data")
    if not isinstance(entries, list):
        raise Unusable("an answer without a list in `data`")
    return _fungible(entries, brand, auth_id)


def _fungible(entries: Sequence[Any], brand: str, auth_id: str) -> list[PartnerBalance]:
    """Entries with a balance; collectibles have none (facts/qiibee.md, section 5). A holder without any has nothing."""
    rows = []
    for entry in entries:
        value = amount(table(entry).get("balance"), Drift(), number=True)
        token = table(table(entry).get("token"))
        name = identifier(token.get("symbol")) or identifier(token.get("id"))
        if value is not None:
            rows.append(PartnerBalance(brand, "qiibee", auth_id, name, plain_decimal(value), "provider"))
    return rows or [PartnerBalance(brand, "qiibee", auth_id, None, "0", "provider")]
