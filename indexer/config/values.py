"""Single values of the configuration: what an address, a URL, a signing secret or a duration must look like.

Each type promises that its value is usable by itself. A refusal says what was expected and never repeats the value: it may be
a secret, or stand where one was meant.
"""

from __future__ import annotations

import base64
import binascii
import re
from difflib import get_close_matches
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Literal, NoReturn
from urllib.parse import urlsplit

from eth_hash.auto import keccak
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, WithJsonSchema
from pydantic_core import PydanticCustomError

from indexer.model.types import ZERO_ADDRESS, Address, Amount, BadValue, Hash32, address, hash32, uint256

Confidence = Literal["included", "confirmed", "safe", "finalized"]
Kind = Literal["loyfin.issuance", "loyfin.redemption", "keyban.mint", "keyban.burn", "qiibee.credit", "qiibee.debit"]
Basis = Literal["nonce", "operation_hash", "wallet_amount", "decision"]

#: What a webhook may ask for by name; `operation.*` leaves out the hints unless they are named.
SIGNAL_TYPES = (
    "operation.ready",
    "operation.reverted",
    "operation.restored",
    "operation.expired",
    "operation.incomplete",
    "operation.conflict",
    "operation.cancelled",
    "operation.fulfilled",
    "operation.finalized",
    "operation.submitted",
    "operation.confirming",
    "operation.rejected",
    "settlement.unmatched",
)


def refuse(what: str, hint: str = "") -> NoReturn:
    raise PydanticCustomError("refused", "{what}", {"what": what, "hint": hint})


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        refuse("expected a number, got true or false")
    return value


def _address(value: object) -> Address:
    if isinstance(value, bytes) and len(value) == 20:
        return Address(value)
    try:
        raw = address(value)
    except BadValue:
        refuse(f"expected an address (0x and 40 hex digits), got {_shape(value)}")
    if raw == ZERO_ADDRESS:
        refuse("the zero address cannot be meant")
    digits = str(value)[2:]
    if digits not in (digits.lower(), digits.upper()):  # mixed case carries EIP-55's checksum
        ranks = keccak(digits.lower().encode()).hex()
        if any(c.isalpha() and c.isupper() != (int(ranks[i], 16) >= 8) for i, c in enumerate(digits)):
            refuse(
                "the EIP-55 checksum in the letters' case does not hold",
                "look for a typing error, or write it in lower case",
            )
    return raw


def _hash32(value: object) -> Hash32:
    if isinstance(value, bytes) and len(value) == 32:
        return Hash32(value)
    try:
        return hash32(value)
    except BadValue:
        refuse(f"expected 32 bytes (0x and 64 hex digits), got {_shape(value)}")


def _amount(value: object) -> Amount:
    try:
        return uint256(value)
    except BadValue:
        refuse(f"expected an amount in base units (0 … 2^256-1, digits only), got {_shape(value)}")


def _shape(value: object) -> str:
    return f"{len(value)} characters" if isinstance(value, str) else f"a value of type {type(value).__name__}"


def _url(value: str, schemes: tuple[str, ...], host_needed: bool = True) -> str:
    expected = " or ".join(f"{scheme}://" for scheme in schemes)
    if not value.isprintable() or " " in value or len(value) > 4096:
        refuse("a URL has no spaces or control characters in it and is at most 4096 characters long")
    try:
        parts = urlsplit(value)
        # a database URL may name several hosts: h1:5432,h2:5432
        hosts = [urlsplit(f"//{host}") for host in parts.netloc.rpartition("@")[2].split(",")]
        ports = [host.port for host in hosts]
    except ValueError:
        refuse(
            "not a URL: the host or the port is malformed",
            "a port is a number from 1 to 65535; in a password / # ? @ : [ ] are percent-encoded",
        )
    if parts.scheme not in schemes:
        refuse(f"expected a URL that begins with {expected}")
    if host_needed and not all(host.hostname for host in hosts):
        refuse("the URL names no host")
    if 0 in ports:
        refuse("port 0 cannot be connected to")
    return value


def _http_url(value: str) -> str:
    return _url(value, ("https", "http"))


def _socket_url(value: str) -> str:
    return _url(value, ("wss", "ws"))


def _database_url(value: str) -> str:
    return _url(value, ("postgresql", "postgres"), host_needed=False)


def _listen(value: str) -> str:
    host, colon, port = value.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or any(c.isspace() for c in bare) or (":" in bare and bare == host):
        refuse("expected host:port", 'such as "127.0.0.1:8080" or "[::]:8080"')
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        refuse("the port is not a number from 0 to 65535")
    return value


def _network(value: str) -> str:
    try:
        return str(ip_network(value))
    except ValueError:
        try:
            nearest = ip_network(value, strict=False)
        except ValueError:
            refuse("not a network", 'write it with its prefix, such as "10.0.0.0/8"')
        refuse("the address has bits set beyond its prefix", f'did you mean "{nearest}"?')


def _event(value: str) -> str:
    known = ("operation.*", "settlement.*", *SIGNAL_TYPES)
    if value not in (*known, "*"):
        near = get_close_matches(value, known, 1)
        refuse("no signal has this type", f'did you mean "{near[0]}"?' if near else f"known: *, {', '.join(known)}")
    return value


def _webhook_secret(value: SecretStr) -> SecretStr:
    text = value.get_secret_value().removeprefix("whsec_")
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) < 24:
        refuse(
            "not a signing secret: expected whsec_ and base64, or base64 alone, of at least 24 random bytes",
            "make one with: printf 'whsec_%s\\n' \"$(head -c 32 /dev/urandom | base64)\"",
        )
    return value


def _path(value: Path) -> Path:
    if not value.is_absolute():
        refuse("expected an absolute path")
    return value


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", value):
        refuse("a name has 1 to 63 letters, digits, - and _, and begins with a letter or digit")
    return value


def _hex_schema(size: int) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": f"^0[xX][0-9a-fA-F]{{{size * 2}}}$"})


Name = Annotated[str, AfterValidator(_name)]
AddressHex = Annotated[Address, BeforeValidator(_address), _hex_schema(20)]
HashHex = Annotated[Hash32, BeforeValidator(_hash32), _hex_schema(32)]
AmountText = Annotated[Amount, BeforeValidator(_amount), WithJsonSchema({"type": ["string", "integer"]})]
Count = Annotated[int, BeforeValidator(_not_bool)]
Seconds = Annotated[float, BeforeValidator(_not_bool), Field(gt=0, le=31_622_400, allow_inf_nan=False)]
Delay = Annotated[float, BeforeValidator(_not_bool), Field(ge=0, le=31_622_400, allow_inf_nan=False)]
Hours = Annotated[float, BeforeValidator(_not_bool), Field(ge=1, le=8_784, allow_inf_nan=False)]
Days = Annotated[float, BeforeValidator(_not_bool), Field(ge=1, le=36_500, allow_inf_nan=False)]
Rate = Annotated[float, BeforeValidator(_not_bool), Field(gt=0, le=100_000, allow_inf_nan=False)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
SocketUrl = Annotated[str, AfterValidator(_socket_url)]
DatabaseUrl = Annotated[str, AfterValidator(_database_url)]


def _status_word(value: str) -> str:
    word = value.strip().lower()
    if not word.rstrip("*") or "*" in word[:-1]:
        refuse("expected a word, or the beginning of one and a final *")
    return word


StatusWord = Annotated[str, Field(max_length=64), AfterValidator(_status_word)]
Listen = Annotated[str, AfterValidator(_listen)]
Network = Annotated[str, AfterValidator(_network)]
Event = Annotated[str, AfterValidator(_event)]
WebhookSecret = Annotated[SecretStr, AfterValidator(_webhook_secret)]
AbsolutePath = Annotated[Path, AfterValidator(_path)]
