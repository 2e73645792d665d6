"""Loyfin's API: signed actions as it stores them, their statuses, and the receipts of what the chain executed.

As the fact sheet has it: a POST stores and executes nothing, pages are cut by an opaque cursor, `mined` follows the chain at a
distance, and what was rejected or cancelled may be mined all the same. Whoever drives the chain tells it what happened there.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal

from indexer.sandbox.partners.faults import Frailty
from indexer.sandbox.partners.movement import LOST, Movement, movement
from indexer.sandbox.partners.partner import Partner
from indexer.sandbox.partners.wire import Reply, Request, answer

PAGE, MOST_PER_PAGE = 25, 100
ZERO_HASH = "0x" + "0" * 64
ITEMS = ("items", "*")
FRAILTY = Frailty(
    optional=(
        (*ITEMS, "metadata"),
        (*ITEMS, "relayTxHash"),
        (*ITEMS, "createdAt"),
        (*ITEMS, "operationHash"),
        (*ITEMS, "logIndex"),
        ("page", "hasMore"),
    ),
    numbers=(
        (*ITEMS, "id"),
        (*ITEMS, "chainId"),
        (*ITEMS, "amount"),
        (*ITEMS, "blockNumber"),
        (*ITEMS, "logIndex"),
        ("page", "limit"),
    ),
    words={(*ITEMS, "status"): "simulated", (*ITEMS, "kind"): "adjustment"},
)

Kind = Literal["issuance", "redemption"]
Status = Literal["pending", "submitted", "mined", "rejected", "cancelled"]


@dataclass(frozen=True, slots=True)
class Mined:
    """Where the chain holds an action's event. `number` of the block, `index` of the log in it."""

    tx_hash: str
    number: int
    index: int
    loyalty: str


@dataclass(eq=False, slots=True)
class Stored:
    """A signed action as the API keeps it: `action` as it was posted."""

    row: int
    kind: Kind
    action: Mapping[str, Any]
    signature: str
    created_at: float
    status: Status = "pending"
    relay_tx: str | None = None
    receipt: Mined | None = None
    moved: Movement = field(default_factory=lambda: movement("", "", "", Decimal(0), asked_at=0.0, course=LOST))

    @property
    def identity(self) -> tuple[str, ...]:
        return (
            self.kind,
            *(str(self.action[name]).lower() for name in ("chainId", "verifyingContract", "issuer", "nonce")),
        )

    @property
    def holder(self) -> str:
        return str(self.action["to" if self.kind == "issuance" else "from"])


class LoyfinApi(Partner):
    """`keys` are usually none: no page of the documentation shows an authorization."""

    key_header = "X-Api-Key"

    def __init__(
        self, *, seed: int, clock: Callable[[], float], keys: Iterable[str] = (), latency: float = 0.0
    ) -> None:
        super().__init__(seed=seed, clock=clock, keys=keys, latency=latency)
        self.operations: dict[str, Stored] = {}
        self.newest_first = True  # the order is not documented
        self._by_identity: dict[tuple[str, ...], Stored] = {}

    # ---- what happens

    def store(self, kind: Kind, action: Mapping[str, Any], signature: str = "0x") -> tuple[Stored, bool]:
        """The stored action, and whether it had been stored before. Raises ValueError about an action that is none."""
        prefix = "to" if kind == "issuance" else "from"
        names = (prefix, "issuer", "loyaltyId", "amount", "nonce", "chainId", "verifyingContract")
        for name in names:
            if name not in action:
                raise ValueError(f"{name} is missing")
        if not re.fullmatch(r"[1-9][0-9]*", str(action["amount"])):
            raise ValueError("amount must be greater than zero")
        stored = Stored(len(self.operations) + 128, kind, dict(action), signature, self.clock())
        if known := self._by_identity.get(stored.identity):
            return known, True
        stored.moved = movement(
            str(stored.row),
            f"loyfin.{kind}",
            stored.holder,
            Decimal(str(action["amount"])),
            asked_at=stored.created_at,
            course=LOST,
        )
        stored.moved.appears_at = stored.created_at
        self.operations[stored.moved.id] = self._by_identity[stored.identity] = stored
        self.movements[stored.moved.id] = stored.moved
        return stored, False

    def submitted(self, stored: Stored, tx_hash: str) -> None:
        """A relayer sent it; after a rejection too, since a stored signature stays good."""
        stored.status, stored.relay_tx, stored.receipt = "submitted", tx_hash, None
        stored.moved.sent_at, stored.moved.settles_at = self.clock(), None

    def mined(self, stored: Stored, receipt: Mined) -> None:
        stored.status, stored.relay_tx, stored.receipt = "mined", receipt.tx_hash, receipt
        stored.moved.settles_at = self.clock()

    def ended(self, stored: Stored, status: Literal["rejected", "cancelled"]) -> None:
        """By the API's word alone: nothing on chain stops the action."""
        stored.status = status

    def stranger(self) -> Movement:
        """Another brand's issuance."""
        action = {
            "issuer": "0x" + self.rng.randbytes(20).hex(),
            "to": "0x" + self.rng.randbytes(20).hex(),
            "loyaltyId": "0x" + self.rng.randbytes(32).hex(),
            "amount": str(self.rng.randint(1, 500)),
            "nonce": "0x" + self.rng.randbytes(32).hex(),
            "chainId": "84532",
            "verifyingContract": "0x" + self.rng.randbytes(20).hex(),
        }
        return self.store("issuance", action)[0].moved

    # ---- what is answered

    def route(self, request: Request) -> Reply:
        path, reads = request.path, request.method == "GET"
        if request.method == "POST" and path in ("/issuances", "/redemptions"):
            return self._post("issuance" if path == "/issuances" else "redemption", request)
        if reads and path == "/operations":
            return self._page(request, self._operations(request.query), self._operation)
        if reads and path in ("/issuances", "/redemptions"):
            kind: Kind = "issuance" if path == "/issuances" else "redemption"
            return self._page(request, self._receipts(kind, request.query), self._receipt)
        if reads and path.startswith("/operations/"):
            stored = self.operations.get(path.rpartition("/")[2])
            if stored is None or stored.moved.deleted(self.clock()):
                return self._error(404, "operation not found")
            document = {"items": [self._operation(stored)]}
            return answer(self.weather.drifted(document, FRAILTY)["items"][0])
        return self._error(404, "not found")

    def unauthorized(self, *, missing: bool) -> Reply:
        return self._error(401, "unauthorized")

    def _post(self, kind: Kind, request: Request) -> Reply:
        body = request.document()
        action = body.get(kind) if isinstance(body, dict) else None
        if not isinstance(action, dict):
            return self._error(400, f"{kind} is missing")
        try:
            stored, duplicate = self.store(kind, action, str(body.get("signature", "0x")))
        except ValueError as error:
            return self._error(400, str(error))
        return answer({"operation": self._operation(stored), "duplicate": duplicate}, 200 if duplicate else 201)

    def _operations(self, query: Mapping[str, str]) -> list[Stored]:
        def fits(each: Stored) -> bool:
            shown = {
                "kind": each.kind,
                "status": each.status,
                "loyaltyId": str(each.action["loyaltyId"]),
                "issuer": str(each.action["issuer"]),
            }
            return all(shown[name].lower() == query[name].lower() for name in shown if name in query)

        return [each for each in self.operations.values() if fits(each)]

    def _receipts(self, kind: Kind, query: Mapping[str, str]) -> list[Stored]:
        wanted = query.get("operationHash")
        return [
            each
            for each in self.operations.values()
            if each.kind == kind
            and each.receipt is not None
            and (wanted is None or str(each.action.get("operationHash", ZERO_HASH)).lower() == wanted.lower())
        ]

    def _page(self, request: Request, found: Sequence[Stored], shown: Callable[[Stored], dict[str, Any]]) -> Reply:
        limit, after = request.whole("limit", PAGE), _row_of(request.query.get("cursor"))
        if not limit or limit > MOST_PER_PAGE:
            return self._error(400, f"limit must be from 1 to {MOST_PER_PAGE}")
        if after is None:
            return self._error(400, "cursor is invalid")
        self.drift(1 + ("cursor" in request.query))
        now = self.clock()
        stored = {each.moved.id: each for each in found if not each.moved.deleted(now)}
        # a cursor names a row: rows that come meanwhile shift nothing
        rows = sorted(stored.values(), key=lambda each: each.row, reverse=self.newest_first)
        beyond = [each for each in rows if not after or (each.row < after if self.newest_first else each.row > after)]
        cut, more = beyond[:limit], len(beyond) > limit
        listed = self.listed([each.moved for each in cut])
        document = {
            "items": [shown(stored[each.id]) for each in listed],
            "page": {"limit": limit, "nextCursor": _cursor(cut[-1].row) if more else None, "hasMore": more},
        }
        self.served(listed)
        return answer(self.weather.drifted(document, FRAILTY))

    def _operation(self, each: Stored) -> dict[str, Any]:
        action = each.action
        status = "rejected" if each.moved.turned(self.clock()) else each.status
        return {
            "id": each.moved.id,
            "kind": each.kind,
            "status": status,
            "chainId": str(action["chainId"]),
            "verifyingContract": action["verifyingContract"],
            "issuer": action["issuer"],
            "holder": each.holder,
            "loyaltyId": action["loyaltyId"],
            "nonce": action["nonce"],
            "operationHash": action.get("operationHash", ZERO_HASH),
            "amount": str(action["amount"]),
            "expiresAt": str(action.get("expiresAt", "0")),
            "deadline": str(action.get("deadline", "0")),
            "signature": each.signature,
            "data": action.get("data", "0x"),
            "metadata": action.get("metadata") if each.kind == "issuance" else None,
            "relayTxHash": each.relay_tx,
            "createdAt": self._iso(each.created_at),
        }

    def _receipt(self, each: Stored) -> dict[str, Any]:
        assert each.receipt is not None
        action = each.action
        side = "to" if each.kind == "issuance" else "from"
        return {
            "id": each.moved.id,
            "chainId": str(action["chainId"]),
            "txHash": each.receipt.tx_hash,
            "logIndex": each.receipt.index,
            "loyaltyAddress": each.receipt.loyalty,
            "issuer": action["issuer"],
            side: each.holder,
            "loyaltyId": action["loyaltyId"],
            "amount": str(action["amount"]),
            "expiresAt": str(action.get("expiresAt", "0")),
            "nonce": action["nonce"],
            "operationHash": action.get("operationHash", ZERO_HASH),
            "data": action.get("data", "0x"),
            "blockNumber": str(each.receipt.number + each.moved.inclusion),
            "createdAt": self._iso(each.moved.settles_at or each.created_at),
        }

    def _iso(self, at: float) -> str:
        return (
            datetime.fromtimestamp(self.weather.time(at), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        )

    @staticmethod
    def _error(status: int, message: str) -> Reply:
        return answer({"error": message, "details": {}}, status)


def _cursor(row: int) -> str:
    return base64.urlsafe_b64encode(f"row:{row}".encode()).decode()


def _row_of(cursor: str | None) -> int | None:
    """The row after which a page begins: 0 without a cursor, None for a cursor that nobody gave out."""
    if cursor is None:
        return 0
    try:
        found = re.fullmatch(r"row:([0-9]+)", base64.urlsafe_b64decode(cursor).decode())
    except ValueError:
        return None
    return int(found[1]) if found else None
