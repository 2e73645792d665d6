"""The actions that brands and owners sign in the sandbox: their fields, their JSON as the Loyfin API takes it, their signatures.

Fields and JSON are documented by Loyfin. The EIP-712 domain and type strings are not: those here are the sandbox's own
(`LoyfinSandbox`, version `1`) and are worth nothing elsewhere. Submitting is left to the driver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, Literal, TypeVar

from eth_hash.auto import keccak

from indexer.model.types import ZERO_ADDRESS, ZERO_HASH, Address, BadValue, Hash32, address, hash32, hex0x, uint256
from indexer.sandbox.transactions import Party

DOMAIN_NAME = "LoyfinSandbox"
DOMAIN_VERSION = "1"

AdminVerb = Literal[
    "SET_ISSUABLE",
    "SET_REDEEMABLE",
    "SET_TRANSFERABLE",
    "SET_ROYALTY_BPS",
    "SET_ROYALTY_RECEIVER",
    "SET_TOKEN_URI",
    "SET_CONTRACT_URI",
    "TRANSFER_OWNERSHIP",
    "RENOUNCE_OWNERSHIP",
]


def admin_action(verb: AdminVerb) -> Hash32:
    """The word that stands for an admin action on chain: keccak256 of its name, one of the two encodings thinkable for Loyfin's."""
    return Hash32(keccak(verb.encode()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Struct:
    """Members of an EIP-712 struct, in its order; `TYPES` are their types, by JSON name."""

    TYPES: ClassVar[Mapping[str, str]] = {}

    def members(self) -> list[tuple[str, str, Any]]:
        """JSON name, type, value."""
        values = (getattr(self, field.name) for field in fields(self))
        return [(name, kind, value) for (name, kind), value in zip(self.TYPES.items(), values, strict=True)]

    def arguments(self) -> tuple[Any, ...]:
        """As the contract's function takes it."""
        return tuple(value.arguments() if isinstance(value, Struct) else value for _, _, value in self.members())

    def message(self) -> dict[str, Any]:
        return {name: value.message() if isinstance(value, Struct) else value for name, _, value in self.members()}

    def json(self) -> dict[str, Any]:
        """As the API shows it: addresses and bytes as 0x hex, integers as decimal strings."""
        return {name: _to_json(value) for name, _, value in self.members()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata(Struct):
    """What a programme is born with; signed with every issuance, and used by the first."""

    TYPES: ClassVar[Mapping[str, str]] = {
        "loyaltyId": "bytes32",
        "name": "string",
        "symbol": "string",
        "media": "string",
        "description": "string",
        "contractURI": "string",
        "tokenURI": "string",
    }
    loyalty_id: Hash32
    name: str = "Sandbox points"
    symbol: str = "PTS"
    media: str = ""
    description: str = ""
    contract_uri: str = ""
    token_uri: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuance(Struct):
    """`expires_at` names the bucket, `deadline` the last second for execution; Unix seconds, 0 for none."""

    TYPES: ClassVar[Mapping[str, str]] = {
        "issuer": "address",
        "to": "address",
        "loyaltyId": "bytes32",
        "amount": "uint256",
        "expiresAt": "uint256",
        "deadline": "uint256",
        "nonce": "bytes32",
        "chainId": "uint256",
        "verifyingContract": "address",
        "operationHash": "bytes32",
        "metadata": "Metadata",
        "data": "bytes",
    }
    issuer: Address
    to: Address
    loyalty_id: Hash32
    amount: int
    expires_at: int = 0
    deadline: int = 0
    nonce: Hash32
    chain_id: int
    verifying_contract: Address
    operation_hash: Hash32 = ZERO_HASH
    metadata: Metadata
    data: bytes = b""

    @property
    def holder(self) -> Address:
        return self.to


@dataclass(frozen=True, slots=True, kw_only=True)
class Redemption(Struct):
    """Burns from the bucket `expires_at` of `from_`; `deadline` is the last second for execution. Unix seconds, 0 for none."""

    TYPES: ClassVar[Mapping[str, str]] = {
        "issuer": "address",
        "from": "address",
        "loyaltyId": "bytes32",
        "amount": "uint256",
        "expiresAt": "uint256",
        "deadline": "uint256",
        "nonce": "bytes32",
        "chainId": "uint256",
        "verifyingContract": "address",
        "operationHash": "bytes32",
        "data": "bytes",
    }
    issuer: Address
    from_: Address
    loyalty_id: Hash32
    amount: int
    expires_at: int = 0
    deadline: int = 0
    nonce: Hash32
    chain_id: int
    verifying_contract: Address
    operation_hash: Hash32 = ZERO_HASH
    data: bytes = b""

    @property
    def holder(self) -> Address:
        return self.from_


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminAction(Struct):
    """One flat shape for all of an owner's actions; each reads only its own fields. The verifying contract is the token."""

    TYPES: ClassVar[Mapping[str, str]] = {
        "owner": "address",
        "adminEpoch": "uint256",
        "loyaltyId": "bytes32",
        "nonce": "bytes32",
        "chainId": "uint256",
        "verifyingContract": "address",
        "deadline": "uint256",
        "action": "bytes32",
        "tokenId": "uint256",
        "uri": "string",
        "account": "address",
        "royaltyBps": "uint96",
        "flag": "bool",
        "data": "bytes",
    }
    owner: Address
    admin_epoch: int
    loyalty_id: Hash32
    nonce: Hash32
    chain_id: int
    verifying_contract: Address
    deadline: int = 0
    action: Hash32
    token_id: int = 0
    uri: str = ""
    account: Address = ZERO_ADDRESS
    royalty_bps: int = 0
    flag: bool = False
    data: bytes = b""


Action = TypeVar("Action", bound=Issuance | Redemption | AdminAction)


@dataclass(frozen=True, slots=True)
class Signed(Generic[Action]):
    """An action with its signature: what anyone may submit."""

    action: Action
    signature: bytes


def sign(action: Action, signer: Party) -> Signed[Action]:
    """Signs for the contract and the chain that the action names, whether or not the signer is the one they expect."""
    from eth_account.messages import encode_typed_data  # a second of imports, paid by those who sign

    domain = {
        "name": DOMAIN_NAME,
        "version": DOMAIN_VERSION,
        "chainId": action.chain_id,
        "verifyingContract": action.verifying_contract,
    }
    structs: list[type[Struct]] = [type(action), *([Metadata] if isinstance(action, Issuance) else [])]
    types = {
        struct.__name__: [{"name": name, "type": kind} for name, kind in struct.TYPES.items()] for struct in structs
    }
    message = encode_typed_data(domain_data=domain, message_types=types, message_data=action.message())
    return Signed(action, signer.sign_message(message))


def request_body(signed: Signed[Issuance] | Signed[Redemption]) -> dict[str, Any]:
    """The body of `POST /issuances` or `POST /redemptions` of the Loyfin API."""
    kind = "issuance" if isinstance(signed.action, Issuance) else "redemption"
    return {kind: signed.action.json(), "signature": hex0x(signed.signature)}


def parse_request(body: object) -> Signed[Issuance] | Signed[Redemption]:
    """The signed action in such a body; the signature is not checked, the contract does that. Raises BadValue."""
    if not isinstance(body, Mapping):
        raise BadValue("body", "expected an object")
    signature = _bytes(body.get("signature"), "signature")
    if "issuance" in body:
        return Signed(_parse(Issuance, body["issuance"], "issuance"), signature)
    if "redemption" in body:
        return Signed(_parse(Redemption, body["redemption"], "redemption"), signature)
    raise BadValue("body", "expected a member issuance or redemption")


_OPTIONAL: Mapping[str, str] = {"operationHash": hex0x(ZERO_HASH), "data": "0x"}
_S = TypeVar("_S", bound=Struct)


def _parse(struct: type[_S], found: object, what: str) -> _S:
    if not isinstance(found, Mapping):
        raise BadValue(what, "expected an object")
    values: dict[str, Any] = {}
    for field, (name, kind) in zip(fields(struct), struct.TYPES.items(), strict=True):
        value = found.get(name, _OPTIONAL.get(name))
        where = f"{what}.{name}"
        match kind:
            case "address":
                values[field.name] = address(value, where)
            case "bytes32":
                values[field.name] = hash32(value, where)
            case "uint256":
                values[field.name] = int(uint256(value, where))
            case "bytes":
                values[field.name] = _bytes(value, where)
            case "Metadata":
                values[field.name] = _parse(Metadata, value, where)
            case _ if isinstance(value, str):
                values[field.name] = value
            case _:
                raise BadValue(where, "expected a string")
    return struct(**values)


def _bytes(value: object, what: str) -> bytes:
    if not isinstance(value, str) or not value.startswith("0x"):
        raise BadValue(what, "expected 0x and hex digits")
    try:
        return bytes.fromhex(value[2:])
    except ValueError:
        raise BadValue(what, "not hexadecimal") from None


def _to_json(value: Any) -> Any:
    match value:
        case Struct():
            return value.json()
        case bytes():
            return hex0x(value)
        case bool() | str():
            return value
        case _:
            return str(value)
