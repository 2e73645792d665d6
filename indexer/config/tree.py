"""The tree that a valid configuration becomes: frozen, typed, every key described where it is declared.

Promises that nothing unknown is in it and nothing changes later; secrets are hidden from `repr`. Where the values come from
is left to `load.py`, and whether tables agree with each other to `checks.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationInfo,
    field_validator,
)

from indexer.config.values import (
    AbsolutePath,
    AddressHex,
    AmountText,
    Basis,
    Confidence,
    Count,
    DatabaseUrl,
    Days,
    Delay,
    Event,
    HashHex,
    Hours,
    HttpUrl,
    Kind,
    Listen,
    Name,
    Network,
    Rate,
    Seconds,
    SocketUrl,
    StatusWord,
    WebhookSecret,
    refuse,
)

INT8_MAX = 2**63 - 1  # what PostgreSQL's bigint holds: chain ids and block numbers are stored as that


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: `where` (`chains[0].factories[1].address`), `what`, and `hint`: what to do about it."""

    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text} ({self.hint})" if self.hint else text


class ConfigProblems(Exception):
    """The configuration cannot be used. Carries every problem, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


def _file_keys(schema: dict[str, Any]) -> None:
    """Publishes `<key>_file` beside each key that may hold a secret, as `load.py` reads them."""
    properties = schema["properties"]
    for key in [key for key in properties if properties[key].pop("secret", False)]:
        plural = key == "secrets"
        spelled = "secret_files" if plural else f"{key}_file"
        path: dict[str, Any] = {"type": "string"}
        properties[spelled] = {
            "description": f"Path of a file that holds {'one of them' if plural else 'it'}, instead of `{key}`.",
            **({"type": "array", "items": path} if plural else path),
        }
        if key in schema.get("required", []):
            schema["required"].remove(key)
            schema.setdefault("allOf", []).append({"oneOf": [{"required": [key]}, {"required": [spelled]}]})
            if not schema["required"]:
                del schema["required"]


class Section(BaseModel):
    """A table of the file: nothing unknown, nothing changed later, nothing secret in error texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, json_schema_extra=_file_keys)


_SECRET: dict[str, Any] = {"secret": True}  # may hold a key or a password: hidden from repr, and also read from a file


class Database(Section):
    url: DatabaseUrl = Field(
        default="",
        repr=False,
        json_schema_extra=_SECRET,
        description="postgresql:// URL; needed unless the process runs with --embedded.",
    )
    direct_url: DatabaseUrl | None = Field(
        default=None,
        repr=False,
        json_schema_extra=_SECRET,
        description="postgresql:// URL that bypasses the pooler, for LISTEN and leased sessions; default: url.",
    )
    pool_size: Count = Field(
        default=10, ge=1, le=500, description="Pooled connections of this process (leased sessions come on top)."
    )
    lease_seconds: Seconds = Field(default=15.0, ge=2, le=600, description="How long a task's lease lasts unrenewed.")


class Http(Section):
    listen: Listen = Field(
        default="127.0.0.1:8080", description="host:port of the HTTP server; port 0 takes a free one."
    )

    @property
    def host(self) -> str:
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.listen.rpartition(":")[2])


class Endpoint(Section):
    url: HttpUrl = Field(repr=False, json_schema_extra=_SECRET, description="JSON-RPC URL, https:// or http://.")
    requests_per_second: Rate | None = Field(
        default=None, description="What the plan allows; default: paced by what the endpoint bears."
    )

    role: Literal["primary", "fallback", "archive"] | None = Field(
        default=None,
        description="primary: asked first; fallback: when no primary can be; archive: history first, the head last. "
        "Default: the first endpoint is primary, the others fallback.",
    )

    @property
    def name(self) -> str:
        """Host (and port): the only part of the URL that logs and metrics may show."""
        return urlsplit(self.url).netloc.rpartition("@")[2].lower()


class Factory(Section):
    address: AddressHex = Field(description="The Loyfin factory, 0x and 40 hex digits.")
    start_block: Count = Field(
        ge=0, le=INT8_MAX, description="The block that the factory was created in, or one before it."
    )
    event_hub: AddressHex | None = Field(
        default=None, description="The hub that emits for the factory's programmes, where there is one."
    )


class Chain(Section):
    name: Name = Field(description="How logs, metrics and the console call the chain.")
    chain_id: Count = Field(ge=1, le=INT8_MAX, description="EIP-155 chain id, checked against each endpoint.")
    rpc: tuple[Endpoint, ...] = Field(
        min_length=1, max_length=16, description="Endpoints, best first; two or more witness for each other."
    )
    websocket: SocketUrl | None = Field(
        default=None,
        repr=False,
        json_schema_extra=_SECRET,
        description="wss:// or ws:// URL for newHeads; default: polling.",
    )
    factories: tuple[Factory, ...] = Field(default=(), max_length=64, description="Loyfin factories to follow.")
    witnesses: Count | None = Field(
        default=None, ge=1, le=16, description="Endpoints that must hold a block; default: 1 with one endpoint, else 2."
    )
    follow: Literal["auto", "every-header"] = Field(
        default="auto", description="every-header: ask for each header when there is no socket."
    )
    proof: Literal["required", "where_possible", "off"] = Field(
        default="required",
        description="Before evidence counts above included, its block's receipts are proven. where_possible: what cannot be "
        "proven at all counts all the same, and says so; off: nothing is proven.",
    )
    integrity: Literal["enforce", "observe"] = Field(
        default="enforce",
        description="observe: answers that fail a check are counted and used all the same; for a chain whose rules have changed.",
    )
    explorer: HttpUrl | None = Field(
        default=None, description="Base URL of a block explorer, for explorerUrl in signals (https://basescan.org)."
    )
    verify_calls_per_second: Rate = Field(
        default=10.0, description="Budget of witnesses and proofs, and of the second look and repairs."
    )
    poll_seconds: Seconds = Field(default=1.0, description="Pause between batches while polling.")
    tags_seconds: Seconds = Field(default=5.0, description="Pause between looks at safe and finalized.")
    silent_seconds: Seconds = Field(
        default=5.0, description="A socket without a head for so long is replaced by polling."
    )
    inferred_events: bool = Field(
        default=True, description="Also read the events whose signatures were inferred, not documented."
    )
    second_look_seconds: Delay = Field(
        default=60.0, description="Finalized history is read again so long after the first reading."
    )

    @property
    def endpoint_names(self) -> list[str]:
        """What logs and metrics call the endpoints: by host; further ones on the same host are told apart by their place."""
        hosts = [endpoint.name for endpoint in self.rpc]
        return [host if host not in hosts[:place] else f"{host}#{place + 1}" for place, host in enumerate(hosts)]

    @property
    def socket_name(self) -> str | None:
        """What they call the websocket: a witness of its own, whoever serves it."""
        return None if self.websocket is None else urlsplit(self.websocket).netloc.rpartition("@")[2].lower()

    def role_of(self, place: int) -> Literal["primary", "fallback", "archive"]:
        return self.rpc[place].role or ("primary" if place == 0 else "fallback")

    @property
    def quorum(self) -> int:
        """How many endpoints must hold a block before it counts."""
        return self.witnesses or min(2, len(self.rpc))


class Policy(Section):
    """What evidence must reach before a leg counts as settled. The first policy whose conditions hold decides."""

    max_amount: AmountText | None = Field(default=None, description="Holds for amounts up to this, in base units.")
    kind: Kind | None = Field(default=None, description="Holds for legs of this kind.")
    issuer: AddressHex | None = Field(default=None, description="Holds for legs of this issuer.")
    loyalty_id: HashHex | None = Field(default=None, description="Holds for legs of this programme.")
    bases: tuple[Basis, ...] | None = Field(
        default=None, min_length=1, description="Accepts only claims made on these bases."
    )
    confidence: Confidence = Field(description="included < confirmed < safe < finalized.")
    seconds: Seconds | None = Field(
        default=None, description="For confirmed: so many seconds of chain on top of the block."
    )


class Webhook(Section):
    name: Name = Field(description="Unique within the brand: deliveries are kept under it.")
    allow: tuple[Network, ...] = Field(
        default=(), description="Networks that it may reach although they are private, or by plain http."
    )
    url: HttpUrl = Field(  # after allow, which it is judged by
        repr=False,
        json_schema_extra=_SECRET,
        description="Where signals are posted; https, or http to an allowed network.",
    )
    secrets: tuple[WebhookSecret, ...] = Field(
        min_length=1,
        max_length=8,
        json_schema_extra=_SECRET,
        description="Signing secrets; several while they rotate, the newest first.",
    )
    events: tuple[Event, ...] = Field(
        default=("operation.*",), min_length=1, description="Types of signals, or operation.*, settlement.*, *."
    )
    timeout_seconds: Seconds = Field(
        default=10.0, description="Time limit of one attempt; shorter than database.lease_seconds."
    )
    pause_after_hours: Hours = Field(
        default=72.0, description="An endpoint at which everything has failed for so long is paused."
    )

    @field_validator("url")
    @classmethod
    def _reachable(cls, url: str, info: ValidationInfo) -> str:
        if "allow" not in info.data:  # wrong itself, and reported
            return url
        allow, parts = info.data["allow"], urlsplit(url)
        if "@" in parts.netloc:
            refuse(
                "a user or password in a webhook's URL is not supported: its signature authenticates",
                "take user:password@ out; where the receiver needs a key besides, put it in the path",
            )
        host = (parts.hostname or "").removesuffix(".")
        host = "127.0.0.1" if host == "localhost" or host.endswith(".localhost") else host
        try:
            target = ip_address(host)
        except ValueError:
            if re.fullmatch(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)", host):
                refuse(
                    "the host is a number, which systems read as an address in different ways",
                    "write an address as four decimal numbers: 192.0.2.7",
                )
            covered, private = bool(allow), False  # a name: its addresses are judged whenever it is resolved
        else:
            covered, private = any(target in ip_network(network) for network in allow), not target.is_global
        if private and not covered:
            refuse(
                "the address is private, and no network in allow holds it", 'add its network: allow = ["10.0.0.0/8"]'
            )
        if parts.scheme == "http" and not covered:
            refuse(
                "plain http goes only to networks named in allow", "use https, or add the receiver's network to allow"
            )
        return url


class Loyfin(Section):
    url: HttpUrl = Field(
        default="https://api.loyfin.com",
        json_schema_extra=_SECRET,
        repr=False,
        description="Base URL of Loyfin's API: hints and a cross-check only.",
    )
    poll: Seconds = Field(default=15.0, description="Fastest pause between looks at one operation, in seconds.")
    requests_per_second: Rate = Field(
        default=1.0,
        description="What may arrive in any second with the key; accounts with one key share it, and the lowest counts.",
    )


class Keyban(Section):
    url: HttpUrl = Field(
        default="https://api.prod.keyban.io",
        json_schema_extra=_SECRET,
        repr=False,
        description="Base URL of Keyban's API.",
    )
    api_key: SecretStr = Field(min_length=1, json_schema_extra=_SECRET, description="The API key.")
    network: Annotated[str, Field(min_length=1, max_length=64)] = Field(
        description="Keyban's name of the network (StellarMainnet, BaseMainnet …) or the name of a chain above."
    )
    token: AddressHex | None = Field(
        default=None,
        description="The points token's contract, needed where the network is a chain above: no other transfer counts there.",
    )
    decimals: Count | None = Field(
        default=None, ge=0, le=77, description="Decimals of the points token; unset: amounts are compared as received."
    )
    poll: Seconds = Field(default=5.0, description="Fastest pause between looks at one account, in seconds.")
    requests_per_second: Rate = Field(
        default=1.0,
        description="What may arrive in any second with the key; accounts with one key share it, and the lowest counts.",
    )
    window: Seconds = Field(
        default=3600.0, description="An order belongs to an operation up to so many seconds after requestedAt."
    )
    skew: Delay = Field(default=60.0, description="… and from so many seconds before it: clocks differ.")
    require_success: bool = Field(
        default=False, description="Insist on success = true before anything counts as finalized."
    )
    finalized_after: Delay | None = Field(
        default=None,
        description="On a network that is neither Stellar nor followed: seconds until finalized; unset: never.",
    )


class Qiibee(Section):
    url: HttpUrl = Field(
        default="https://bwaapi.qiibee.com/api/admin",
        json_schema_extra=_SECRET,
        repr=False,
        description="Base URL of qiibee's API.",
    )
    api_key: SecretStr = Field(min_length=1, json_schema_extra=_SECRET, description="The API key.")
    poll: Seconds = Field(default=10.0, description="Fastest pause between looks, in seconds.")
    requests_per_second: Rate = Field(
        default=1.0,
        description="What may arrive in any second with the key; accounts with one key share it, and the lowest counts.",
    )
    settle_after: Delay = Field(default=60.0, description="Seconds that a successful transaction must stand unchanged.")
    success: tuple[StatusWord, ...] = Field(
        default=("success",),
        min_length=1,
        description="A row's status that means done, once it has a hash; a final * stands for any ending.",
    )
    pending: tuple[StatusWord, ...] = Field(
        default=("pending*", "process*", "submitted", "created", "queued", "requested", "in_progress*"),
        description="… that means under way. A word of no list counts as this too, and is warned of.",
    )
    failed: tuple[StatusWord, ...] = Field(
        default=("failed", "failure", "rejected", "reverted", "cancelled", "canceled", "error", "declined"),
        description="… that means failed for certain; a word of several lists means this first.",
    )


class Brand(Section):
    name: Name = Field(description="The brand's name: part of every operation's identity, so never change it.")
    issuers: tuple[AddressHex, ...] = Field(default=(), description="The brand's issuer addresses on the ledgers.")
    policies: tuple[Policy, ...] = Field(default=(), description="First match decides; without a match: safe.")
    unmatched_since: AwareDatetime | None = Field(
        default=None,
        description="settlement.unmatched only for evidence newer than this; default: when the brand was first seen.",
    )
    ambiguous: Literal["settle", "hold"] = Field(
        default="settle", description="What to do when several equal legs fit one piece of evidence."
    )
    match_window: Seconds = Field(
        default=86_400.0, description='"match": "wallet_amount": evidence up to so many seconds after requestedAt.'
    )
    match_skew: Delay = Field(default=60.0, description="… and from so many seconds before it.")
    loyfin: Loyfin | None = Field(default=None, description="Loyfin's API.")
    keyban: Keyban | None = Field(default=None, description="A Keyban account.")
    qiibee: Qiibee | None = Field(default=None, description="A qiibee account.")
    webhooks: tuple[Webhook, ...] = Field(default=(), max_length=64, description="Where the brand's signals go.")


class Retention(Section):
    """For how many days what is over is kept. Operations, their history, receipts and decisions stay."""

    deliveries_days: Days = Field(
        default=90.0, description="Attempts at webhooks, and deliveries that have ended; dead letters too."
    )
    orphans_days: Days = Field(
        default=30.0,
        description="Blocks and events that a reorganisation undid, once finalized history has passed them.",
    )
    signals_days: Days | None = Field(
        default=None,
        description="Signals that every endpoint is done with; unset: for ever. The pull stream begins there.",
    )
    versions_days: Days = Field(
        default=90.0, description="Earlier versions of partners' records, once another has taken their place."
    )
    questions_days: Days = Field(
        default=90.0,
        description="Re-readings that have ended, and looks at transactions that no partner's record names any more.",
    )


class Config(Section):
    """The whole configuration. Equal when every value is equal, wherever it came from."""

    _warnings: tuple[Problem, ...] = PrivateAttr(())

    state_dir: AbsolutePath = Field(
        description="Folder of the embedded database (see docs/configuration.md for the default)."
    )
    database: Database = Field(default=Database(), description="PostgreSQL.")
    http: Http = Field(default=Http(), description="The HTTP server.")
    retention: Retention = Field(default=Retention(), description="How long what is over is kept.")
    chains: tuple[Chain, ...] = Field(default=(), max_length=32, description="EVM chains to follow.")
    brands: tuple[Brand, ...] = Field(default=(), max_length=1000, description="Brands to settle for.")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """What is allowed and probably not meant."""
        return self._warnings

    def secrets(self) -> list[str]:
        """Every secret value of the tree: what logs must never show."""
        urls = [self.database.url, self.database.direct_url or ""]
        for chain in self.chains:
            urls += [endpoint.url for endpoint in chain.rpc] + [chain.websocket or ""]
        for brand in self.brands:
            urls += [webhook.url for webhook in brand.webhooks]
            urls += [account.url for account in (brand.loyfin, brand.keyban, brand.qiibee) if account is not None]
        found = [part for url in urls for part in _secret_parts(url)]
        for brand in self.brands:
            signing = [secret.get_secret_value() for webhook in brand.webhooks for secret in webhook.secrets]
            found += [spelled for secret in signing for spelled in (secret, secret.removeprefix("whsec_"))]
            for account in (brand.keyban, brand.qiibee):
                if account is not None:
                    found.append(account.api_key.get_secret_value())
        return found

    def with_database(self, url: str, direct_url: str | None = None) -> Config:
        """The same configuration on another database: how `--embedded` fills in its own. The URLs are not checked."""
        database = self.database.model_copy(update={"url": url, "direct_url": direct_url})
        return self.model_copy(update={"database": database})


def _secret_parts(url: str) -> list[str]:
    """What of a URL may be a secret: its password, and long parts of its path and query, where providers put keys."""
    parts = urlsplit(url)
    pieces = [*parts.path.split("/"), *(pair.partition("=")[2] for pair in parts.query.split("&"))]
    # a socket's folder is no key, nor is a short word
    keys = [p for p in pieces if "/" not in p and (len(p) >= 16 or (len(p) >= 8 and any(map(str.isdigit, p))))]
    password = parts.password or ""
    return [*keys, *filter(None, {password, unquote(password)})]
