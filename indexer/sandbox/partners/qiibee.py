"""qiibee's Points Bank: credits and debits accepted with 202 and nothing else, a history by offset, balances in two shapes.

As the fact sheet has it: newest first by whole seconds with an unstable order within one, personal data in every row, a token's
status beside the row's own, ids and addresses of tokens written differently from place to place.
"""

from __future__ import annotations

import hashlib
import math
import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Literal
from urllib.parse import unquote

from indexer.sandbox.partners.faults import Frailty
from indexer.sandbox.partners.movement import AT_ONCE, Course, Movement, Pace, movement
from indexer.sandbox.partners.partner import Partner
from indexer.sandbox.partners.wire import Reply, Request, answer

MOST_PER_PAGE = 100
BASE = "/api/admin"
ROWS = ("data", "transactions", "*")
FRAILTY = Frailty(
    optional=(
        ("data", "total_tx_count"),
        (*ROWS, "tx_hash"),
        (*ROWS, "token"),
        (*ROWS, "inserted_at"),
        (*ROWS, "loyalty_event_type"),
        (*ROWS, "code"),
        (*ROWS, "user", "metadata"),
        (*ROWS, "user_to", "email"),
    ),
    numbers=(
        ("data", "total_tx_count"),
        (*ROWS, "id"),
        (*ROWS, "amount_received"),
        (*ROWS, "points_burned"),
        (*ROWS, "token", "id"),
    ),
    words={
        (*ROWS, "status"): "awaiting_settlement",
        (*ROWS, "loyalty_event_type"): "seasonal_bonus",
        (*ROWS, "token", "type"): "stablecoin",
        (*ROWS, "token", "status"): "sunset",
    },
)
FIRST_NAMES = ("Ada", "Ben", "Cleo", "Dina", "Egon", "Frida")


@dataclass(eq=False, slots=True)
class User:
    """A member. `auth_id` is what requests name; the rest is personal and must stay out of every index."""

    auth_id: str
    person: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Token:
    """A programme's points. `id` as requests write it."""

    id: int
    address: str  # 40 hex digits in mixed case
    name: str
    symbol: str


class Qiibee(Partner):
    """One brand's account; `base` is the path that its URL ends with."""

    key_header = "X-API-KEY"

    def __init__(
        self,
        *,
        seed: int,
        clock: Callable[[], float],
        keys: Iterable[str] = (),
        latency: float = 0.0,
        brand: str = "bloom",
        pace: Pace | None = None,
    ) -> None:
        super().__init__(seed=seed, clock=clock, keys=keys, latency=latency)
        self.brand, self.pace = brand, pace or Pace()
        self.base = BASE
        self.users: dict[str, User] = {}
        self.token = self.issue_token("BLOOM POINT", "BLM")
        self.other = self.issue_token("BERG MILES", "BRG")
        #: What a row says before it is settled, once under way, when settled, and when it failed: an open vocabulary.
        self.words = {
            "new": "pending",
            "sent": "pending",
            "settled": "success",
            "failed": "failed",
            "turned": "reverted",
        }
        self.shows_pending = True  # the sheet leaves open whether rows are seen before they are mined
        self._tokens: dict[str, Token] = {}
        self._rows = 1200
        self._complaints = 0

    # ---- what happens

    def issue_token(self, name: str, symbol: str) -> Token:
        mixed = "".join(self.rng.choice((c, c.upper())) for c in self.rng.randbytes(20).hex())
        return Token(self.rng.randint(100_000, 9_999_999), mixed, name, symbol)

    def enrol(self, auth_id: str | None = None) -> User:
        """A new member; brands may choose the auth_id."""
        identity = auth_id or str(uuid.UUID(bytes=self.rng.randbytes(16), version=4))
        first = self.rng.choice(FIRST_NAMES)
        person = {
            "auth_id": identity,
            "country_ISO": "che",
            "email": f"{first.lower()}.{self.rng.randrange(10**6)}@example.test",
            "first_name": first,
            "second_name": "Muster",
            "id": f"{self.rng.randbytes(4).hex()}-{self.rng.randbytes(2).hex()}",
            "language": "en",
            "metadata": self.rng.choice((None, {"opts_newsletter": True})),
        }
        self.users[identity] = User(identity, person)
        return self.users[identity]

    def credit(
        self,
        user: User,
        amount: Decimal | int,
        course: Course | None = None,
        *,
        token: Token | None = None,
        reference: str | None = None,
    ) -> Movement:
        return self._moved("qiibee.credit", user, amount, course, token, reference)

    def debit(
        self,
        user: User,
        amount: Decimal | int,
        course: Course | None = None,
        *,
        token: Token | None = None,
        reference: str | None = None,
    ) -> Movement:
        return self._moved("qiibee.debit", user, amount, course, token, reference)

    def other_event(
        self, kind: Literal["exchange", "points_to_rewards"], user: User, amount: Decimal | int
    ) -> Movement:
        """What no leg waits for; it burns points all the same."""
        return self._moved(kind, user, amount, AT_ONCE, None, None)

    def stranger(self) -> Movement:
        """A member whom nobody asked about earns points."""
        return self.credit(self.enrol(), self.rng.randint(1, 50), AT_ONCE)

    def balance(self, user: User, token: Token | None = None) -> Decimal:
        """Points that the member has by now, by the truth."""
        wanted = token or self.token
        total = Decimal(0)
        for each in self.standing():
            if each.wallet == user.auth_id and self._tokens[each.id] == wanted:
                total += each.amount if each.kind == "qiibee.credit" else -each.amount
        return total

    def _moved(
        self,
        kind: str,
        user: User,
        amount: Decimal | int,
        course: Course | None,
        token: Token | None,
        reference: str | None,
    ) -> Movement:
        self._rows += 1
        made = movement(
            str(self._rows),
            kind,
            user.auth_id,
            Decimal(amount),
            asked_at=self.clock(),
            course=course or self.pace.draw(self.rng),
            reference=reference,
        )
        self.movements[made.id], self._tokens[made.id] = made, token or self.token
        return made

    # ---- what is answered

    def route(self, request: Request) -> Reply:
        path = request.path.removeprefix(self.base)
        if path == "/transactions":
            return self._history(request) if request.method == "GET" else self._transact(request)
        balances = re.fullmatch(r"/users/([^/]+)/balances", path)
        if request.method == "GET" and balances is not None:
            user = self.users.get(unquote(balances[1]))
            return self._complaint(404, "not found") if user is None else self._balances(user)
        return self._complaint(404, "not found")

    def unauthorized(self, *, missing: bool) -> Reply:
        return self._complaint(401, "Missing x-api-key header" if missing else "Invalid API Key")

    def _transact(self, request: Request) -> Reply:
        body = request.document()
        wish = body.get("transaction") if isinstance(body, dict) else None
        if not isinstance(wish, dict):
            return self._complaint(400, "transaction is missing")
        user = self.users.get(str(wish.get("user_auth_id")))
        token = next((t for t in (self.token, self.other) if str(t.id) == str(wish.get("token_id"))), None)
        if user is None or token is None:
            return self._complaint(404, "not found")
        try:
            amount = Decimal(str(wish.get("amount")))
        except InvalidOperation:
            return self._complaint(400, "amount is invalid")
        if not amount.is_finite() or amount <= 0:
            return self._complaint(400, "amount must be greater than 0")
        if wish.get("type") == "credit_points":
            self.credit(user, amount, token=token)
        elif wish.get("type") == "debit_points":
            if amount > self.balance(user, token):
                return self._complaint(400, "insufficient balance")
            self.debit(user, amount, token=token)
        else:
            return self._complaint(400, "unknown transaction type")
        return answer({}, 202)

    def _history(self, request: Request) -> Reply:
        limit, offset = request.whole("limit", MOST_PER_PAGE), request.whole("offset", 0)
        if limit is None or offset is None:
            return self._complaint(400, "limit and offset are whole numbers")
        limit = min(limit, MOST_PER_PAGE)  # the older API capped silently
        self.drift(1 + (offset > 0))
        rows = self._matching(request)
        if rows is None:
            return self._complaint(404, "not found")
        listed = self.listed(rows)
        cut = listed[offset : offset + limit]
        document = {
            "data": {
                "limit": limit,
                "offset": offset,
                "total_tx_count": len({each.id for each in listed}),
                "transactions": [self._row(each) for each in cut],
            }
        }
        self.served(cut)
        return answer(self.weather.drifted(document, FRAILTY))

    def _matching(self, request: Request) -> list[Movement] | None:
        """The rows that the query names, newest first; None for a user who doesn't exist."""
        now, auth_id, token = self.clock(), request.query.get("user_auth_id"), request.query.get("token_id")
        if auth_id is not None and auth_id not in self.users:
            return None
        since, until = _time(request.query.get("from_time")), _time(request.query.get("to_time"))
        found = []
        for each in self.movements.values():
            if not each.begun(now) or each.deleted(now) or (auth_id is not None and each.wallet != auth_id):
                continue
            if not self.shows_pending and not each.included(now):
                continue
            inserted = math.floor(self.weather.time(each.appears_at or 0.0))
            if token in (None, str(self._tokens[each.id].id)) and not (inserted < since or inserted > until):
                found.append((inserted, each))
        # nothing promises an order within a second: every answer has its own
        ordered = sorted(found, key=lambda pair: (-pair[0], self.rng.random()))
        return [each for _, each in ordered]

    def _row(self, each: Movement) -> dict[str, Any]:
        now = self.clock()
        incoming = each.kind == "qiibee.credit"
        user = self.users[each.wallet].person
        brand: dict[str, Any] = {"brand_config": None, "id": self.brand, "locations": [], "name": self.brand.title()}
        other: dict[str, Any] = {"brand_config": None, "id": "bergflug", "locations": [], "name": "Bergflug"}
        exchange = each.kind == "exchange"
        amount = f"{each.amount:.5f}"
        settled = each.included(now) and not each.fails
        digest = hashlib.sha256(f"{self.brand}/{each.id}/{each.inclusion}".encode()).hexdigest()
        return {
            "amount_received": amount if incoming or exchange else None,
            "brand": None if incoming else brand,
            "brand_to": brand if incoming else other if exchange else None,
            "code": None,
            "exchange_provider": "miles_and_more" if exchange else None,
            "id": int(each.id),
            "inserted_at": _naive(self.weather.time(each.appears_at or 0.0)),
            "loyalty_event_type": {"qiibee.credit": "credit_points", "qiibee.debit": "debit_points"}.get(
                each.kind, each.kind
            ),
            "points_burned": None if incoming else amount,
            "reward_id": 311 if each.kind == "points_to_rewards" else None,
            "status": self._status(each, now),
            "token": self._token(self._tokens[each.id]),
            "token_to": self._token(self.other) if exchange else None,
            "tx_hash": f"0x{digest}" if settled else None,
            "user": None if incoming else user,
            "user_to": user if incoming else None,
        }

    def _status(self, each: Movement, now: float) -> str:
        if each.turned(now):
            return self.words["turned"]
        if each.included(now):
            return self.words["failed" if each.fails else "settled"]
        return self.words["sent" if each.under_way(now) else "new"]

    def _token(self, token: Token, *, in_row: bool = True) -> dict[str, Any]:
        """In a row an address has no 0x, and a status of another vocabulary than in balances."""
        return {
            "id": str(token.id),
            "address": token.address if in_row else f"0x{token.address}",
            "metadata": {},
            "name": token.name,
            "estimated_member_count_lower": 1000,
            "estimated_member_count_higher": 5000,
            "symbol": token.symbol,
            "type": "erc20",
            "countries": ["CHE", "DEU"],
            "onramp": "24.2",
            "offramp": "23.5",
            # drifts by itself: it says nothing of the row
            "status": self.rng.choice(
                ("active", "paused", "pending", "stopped", None) if in_row else ("approved", None)
            ),
        }

    def _balances(self, user: User) -> Reply:
        owned = {
            self._tokens[each.id]: self._tokens[each.id] for each in self.standing() if each.wallet == user.auth_id
        }
        entries: list[dict[str, Any]] = [
            {"balance": self.balance(user, token), "token": self._token(token, in_row=False)} for token in owned
        ]
        entries.append(
            {
                "nfts": [
                    {"personalised_data": {"engraving": user.person["first_name"]}, "status": None, "user_nft_id": 86}
                ],
                "token": {
                    "address": "0x77d04e0b2c9f4a1d8be35f60a1c2d3e4f5061728",
                    "id": 150,
                    "metadata": {},
                    "name": f"{self.brand.upper()} BADGE",
                    "onramp": None,
                    "offramp": None,
                    "symbol": "BADGE",
                    "type": "erc721",
                },
            }
        )
        return answer({"data": entries})

    def _complaint(self, status: int, message: str) -> Reply:
        """An error in one of the shapes that nobody documented."""
        self._complaints += 1
        shapes = ({"message": message}, {"error": message}, {"errors": {"detail": message}})
        return answer(shapes[self._complaints % 3], status)


def _naive(at: float) -> str:
    """Whole seconds of UTC, without saying so."""
    return datetime.fromtimestamp(math.floor(at), UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _time(text: str | None) -> float:
    """Unix seconds of an ISO time; of nothing, and of what is none, a time that excludes nothing."""
    if text is None:
        return math.nan
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        return math.nan
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
