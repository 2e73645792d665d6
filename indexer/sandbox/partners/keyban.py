"""Keyban's loyalty API: mint requests with their optimistic balance, and the orders that show what became of them.

As the fact sheet has it: an order begins without a node, gets one without a transaction, then a transaction with a block number
and `success`. What the sheet leaves open (total, ordering, units, several nodes, the shape of `errors`) can be set.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal

from indexer.sandbox.partners.faults import Frailty
from indexer.sandbox.partners.movement import AT_ONCE, Course, Movement, Pace, movement
from indexer.sandbox.partners.partner import Partner
from indexer.sandbox.partners.wire import PROBLEM, Reply, Request, answer

MOST_PER_PAGE = 100
LEDGER_SECONDS = 5.0  # a Stellar ledger
NODE_SECONDS = 0.5  # between the inclusions of one order's nodes
NODES = ("data", "*", "orderTransactions", "nodes", "*", "assetTransfer")
FRAILTY = Frailty(
    optional=(
        ("total",),
        (*NODES, "id"),
        (*NODES, "type"),
        (*NODES, "fromId"),
        (*NODES, "value"),
        (*NODES, "transaction", "success"),
        (*NODES, "transaction", "date"),
        (*NODES, "transaction", "blockHash"),
        ("data", "*", "orderTransactions", "nodes"),
    ),
    numbers=(("total",), (*NODES, "value"), (*NODES, "transaction", "blockNumber")),
    words={(*NODES, "type"): "soroban", ("data", "*", "status"): "ARCHIVED_V2"},
)


@dataclass(eq=False, slots=True)
class Account:
    """A customer's. `id` is Keyban's, for minting; `wallet` the address, for reading orders; `promised` in points."""

    id: str
    wallet: str
    promised: Decimal = Decimal(0)


class Keyban(Partner):
    """One application. `scale`: decimals by which orders show values scaled up; 0 shows points, as the tutorial reads them."""

    key_header = "X-Api-Key"

    def __init__(
        self,
        *,
        seed: int,
        clock: Callable[[], float],
        keys: Iterable[str] = (),
        latency: float = 0.0,
        network: str = "StellarTestnet",
        scale: int = 0,
        pace: Pace | None = None,
    ) -> None:
        super().__init__(seed=seed, clock=clock, keys=keys, latency=latency)
        self.network, self.scale, self.pace = network, scale, pace or Pace()
        self.stellar = network.startswith("Stellar")
        self.accounts: dict[str, Account] = {}
        self.tells_total = self.tells_success = True
        self.needs_wallet = False  # whether a listing without walletId is refused
        self.dateless: set[str] = set()  # orders whose transactions tell no date
        self.order: Literal["newest", "oldest", "shuffled"] = "newest"
        self._nodes: dict[str, tuple[Decimal, ...]] = {}
        self._placed: dict[
            str, list[tuple[str, int, str]]
        ] = {}  # by order: transaction, block, block hash of each node
        self._by_wallet: dict[str, list[Movement]] = {}
        self._problems = 0
        self.issuer = self._address()

    # ---- what happens

    def open_account(self) -> Account:
        account = Account(str(uuid.UUID(bytes=self.rng.randbytes(16), version=4)), self._address())
        self.accounts[account.id] = account
        return account

    def mint(
        self,
        account: Account,
        amount: Decimal | int,
        course: Course | None = None,
        *,
        reference: str | None = None,
        nodes: Sequence[Decimal | int] = (),
    ) -> Movement:
        """Points to the account's wallet, in one transfer or in the given `nodes`, which sum up to the amount."""
        account.promised += amount
        return self._moved("keyban.mint", account.wallet, amount, course, reference, nodes)

    def burn(
        self, account: Account, amount: Decimal | int, course: Course | None = None, *, reference: str | None = None
    ) -> Movement:
        """Points from the wallet, signed by its owner: no request of the partner's API does this."""
        account.promised -= amount
        return self._moved("keyban.burn", account.wallet, amount, course, reference, ())

    def listed_for(self, account: Account) -> bool:
        """Whether somebody has read the orders of its wallet."""
        return any(call.status == 200 and account.wallet in call.query for call in self.calls)

    def stranger(self) -> Movement:
        """A welcome bonus in a wallet that nobody asked about."""
        return self.mint(self.open_account(), self.rng.randint(1, 50), AT_ONCE)

    def place(self, order: str, transactions: Sequence[tuple[str, int, str]]) -> None:
        """For an EVM network: the transactions (id, block, block hash) that really hold the order's transfers, as of now."""
        self._placed[order] = list(transactions)
        moved = self.movements[order]
        moved.sent_at = moved.settles_at = self.clock()
        moved.appears_at = min(moved.appears_at or moved.sent_at, moved.sent_at)

    def _moved(
        self,
        kind: Literal["keyban.mint", "keyban.burn"],
        wallet: str,
        amount: Decimal | int,
        course: Course | None,
        reference: str | None,
        nodes: Sequence[Decimal | int],
    ) -> Movement:
        made = movement(
            str(uuid.UUID(bytes=self.rng.randbytes(16), version=4)),
            kind,
            wallet,
            Decimal(amount),
            asked_at=self.clock(),
            course=course or self.pace.draw(self.rng),
            reference=reference,
        )
        parts = tuple(map(Decimal, nodes)) or (made.amount,)
        if sum(parts) != made.amount:
            raise ValueError(f"nodes of {sum(parts)} points for a transfer of {made.amount}")
        self.movements[made.id], self._nodes[made.id] = made, parts
        self._by_wallet.setdefault(wallet, []).append(made)
        return made

    # ---- what is answered

    def route(self, request: Request) -> Reply:
        if request.method == "GET" and request.path == "/health/ready":
            return answer({"status": "ok"})
        if request.method == "GET" and request.path == "/v1/loyalty/orders":
            return self._orders(request)
        mint = re.fullmatch(r"/v1/loyalty/account/([^/]+)/mint", request.path)
        if request.method == "POST" and mint is not None:
            return self._mint(mint[1], request)
        return self._problem(404, "Not Found", "no such route", request)

    def unauthorized(self, *, missing: bool) -> Reply:
        detail = "the X-Api-Key header is missing" if missing else "unknown API key"
        return answer({"type": "about:blank", "title": "Unauthorized", "status": 401, "detail": detail}, 401, PROBLEM)

    def _mint(self, account_id: str, request: Request) -> Reply:
        account = self.accounts.get(account_id)
        if account is None:
            return self._problem(404, "Not Found", "no such account", request)
        body = request.document()
        amount = body.get("amount") if isinstance(body, dict) else None
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not math.isfinite(amount) or amount < 1:
            return self._problem(
                422, "Validation failed", "amount: must be >= 1", request, ("amount", "min_value", "must be >= 1")
            )
        self.mint(account, Decimal(str(amount)))
        return answer({"newamount": account.promised}, 201)

    def _orders(self, request: Request) -> Reply:
        page, size = request.whole("currentPage", 1), request.whole("pageSize", 10)
        if not page:
            return self._problem(400, "Bad Request", "currentPage", request, ("currentPage", "min_value", ">= 1"))
        if not size or size > MOST_PER_PAGE:
            wrong = ("pageSize", "max_value", f"must be <= {MOST_PER_PAGE}")
            return self._problem(400, "Bad Request", f"pageSize: must be <= {MOST_PER_PAGE}", request, wrong)
        if strange := sorted(set(request.query) - {"walletId", "currentPage", "pageSize"}):
            return self._problem(
                400, "Bad Request", f"{strange[0]} is not allowed here", request, (strange[0], "unknown", "not allowed")
            )
        wallet = request.query.get("walletId")
        if wallet is None and self.needs_wallet:
            return self._problem(400, "Bad Request", "walletId", request, ("walletId", "required", "is required"))
        self.drift(page)
        orders = self.listed(self._shown(wallet))
        cut = orders[(page - 1) * size : page * size]
        document: dict[str, Any] = {"data": [self._order(each) for each in cut]}
        if self.tells_total:
            document["total"] = len({each.id for each in orders})
        self.served(cut)
        return answer(self.weather.drifted(document, FRAILTY))

    def _shown(self, wallet: str | None) -> list[Movement]:
        """Orders that exist now, in the listing's order."""
        now = self.clock()
        of_wallet = self.movements.values() if wallet is None else self._by_wallet.get(wallet, ())
        orders = [each for each in of_wallet if each.begun(now) and not each.deleted(now)]
        if self.order == "shuffled":
            return self.rng.sample(orders, len(orders))
        return sorted(orders, key=lambda each: (each.appears_at, each.id), reverse=self.order == "newest")

    def _order(self, order: Movement) -> dict[str, Any]:
        now = self.clock()
        nodes = [self._node(order, number, now) for number in range(len(self._nodes[order.id]))]
        return {"id": order.id, "orderTransactions": {"nodes": nodes if order.under_way(now) else []}}

    def _node(self, order: Movement, number: int, now: float) -> dict[str, Any]:
        parts = self._nodes[order.id]
        transaction = None
        if order.settles_at is not None and order.begun(now):
            # the nodes of one order are included one after the other; the last settles it
            at = order.settles_at - (len(parts) - 1 - number) * NODE_SECONDS
            transaction = self._transaction(order, number, at) if at <= now else None
        value = parts[number].scaleb(self.scale)
        from_wallet = order.kind == "keyban.burn"
        return {
            "assetTransfer": {
                "id": f"{transaction['id']}:0" if transaction else None,
                "type": "erc20",
                "value": f"{value:f}" if value % 1 else str(int(value)),
                "fromId": order.wallet if from_wallet else self.issuer,
                "toId": self.issuer if from_wallet else order.wallet,
                "transaction": transaction,
            }
        }

    def _transaction(self, order: Movement, number: int, at: float) -> dict[str, Any]:
        seed = f"{order.id}/{number}/{order.inclusion}"
        block = int(at // LEDGER_SECONDS) + order.inclusion
        identity, block_hash = _digest(seed, self.stellar), _digest(f"block {block}", self.stellar)
        if placed := self._placed.get(order.id):
            identity, block, block_hash = placed[min(number, len(placed) - 1)]
        date = datetime.fromtimestamp(self.weather.time(at), UTC)
        transaction: dict[str, Any] = {
            "id": identity,
            "blockNumber": str(block),
            "blockHash": block_hash,
            "date": date.strftime("%Y-%m-%dT%H:%M:%S.") + f"{date.microsecond // 1000:03}",  # UTC, without saying so
        }
        if order.id in self.dateless:
            del transaction["date"]
        if self.tells_success:
            transaction["success"] = not (order.fails or order.turned(self.clock()))
        return transaction

    def _problem(
        self, status: int, title: str, detail: str, request: Request, wrong: tuple[str, str, str] | None = None
    ) -> Reply:
        """Problem+json; by turns with both shapes of `errors` that were seen."""
        document: dict[str, Any] = {
            "type": "about:blank",
            "title": title,
            "status": status,
            "detail": detail,
            "instance": request.path,
        }
        if wrong is not None:
            path, code, message = wrong
            self._problems += 1
            guide = {"path": path, "code": code, "message": message}
            document["errors"] = [guide if self._problems % 2 else {"field": path, "message": message}]
        return answer(document, status, PROBLEM)

    def _address(self) -> str:
        """A wallet's address as its network writes it."""
        return strkey(self.rng.randbytes(32)) if self.stellar else "0x" + self.rng.randbytes(20).hex()


def _digest(text: str, stellar: bool) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return digest if stellar else f"0x{digest}"


def strkey(public_key: bytes) -> str:
    """A Stellar account's address (SEP-23): version byte, ed25519 key, CRC-16/XModem, in base32."""
    payload = bytes((6 << 3,)) + public_key
    crc = 0
    for byte in payload:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xFFFF
    return base64.b32encode(payload + crc.to_bytes(2, "little")).decode()
