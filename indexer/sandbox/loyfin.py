"""Drives the sandbox's Loyfin contracts: deploys them, builds and signs what brands sign, submits through a relayer.

Promises the rules and events that Loyfin documents; names that it does not (admin verbs, EIP-712 types, the split of the fee) are
the sandbox's own. Hostile emitters are at the end. When and why to act is left to the demo and the tests.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self

from eth_hash.auto import keccak

from indexer.model.types import UINT256_MAX, ZERO_ADDRESS, Address, Hash32, hex0x
from indexer.sandbox.actions import (
    Action,
    AdminAction,
    AdminVerb,
    Issuance,
    Metadata,
    Redemption,
    Signed,
    admin_action,
    sign,
)
from indexer.sandbox.anvil import JsonRpc
from indexer.sandbox.contracts import ContractName, Event, artefact, decode_logs
from indexer.sandbox.transactions import Party, Receipt, Refused, Submitter, Transaction

WEALTH = 10**24  # wei: a million ether for everyone's gas
OPERATOR = Party("loyfin operator")
RELAYER = Party("relayer")
PROTOCOL = Party("loyfin protocol")
FIRST_HOLDER = Address(b"\x10" + bytes(19))


@dataclass(frozen=True, slots=True)
class Deployment:
    """Where the contracts are. `event_hub` None: the factory emits the public stream itself."""

    factory: Address
    event_hub: Address | None
    fee_token: Address
    block_number: int  # the factory's first block


@dataclass(frozen=True, slots=True)
class Submitted(Generic[Action]):
    """What was signed, and the hash of the transaction that carries it."""

    tx_hash: Hash32
    signed: Signed[Action]

    @property
    def action(self) -> Action:
        return self.signed.action


async def deploy_contract(
    submitter: Submitter, name: ContractName, *arguments: object, by: Party = OPERATOR
) -> Receipt:
    """Deploys one contract; its address is the receipt's `created`. Raises Refused."""
    return await submitter.execute(by, None, artefact(name).creation(*arguments), gas=12_000_000)


def _created(receipt: Receipt) -> Address:
    if receipt.created is None:
        raise Refused("the transaction created no contract")
    return receipt.created


class Loyfin:
    """One deployed factory with its fee token, and its hub if it has one."""

    def __init__(
        self,
        submitter: Submitter,
        deployment: Deployment,
        *,
        relayer: Party = RELAYER,
        rng: random.Random | None = None,
    ) -> None:
        self.submitter, self.deployment, self.relayer = submitter, deployment, relayer
        self.factory, self.fee_token = deployment.factory, deployment.fee_token
        self._random = rng or random.SystemRandom()

    @classmethod
    async def deploy(
        cls,
        node: JsonRpc,
        *,
        with_hub: bool = False,
        event_hub: Address | None = None,
        required_fee: int = 50_000,
        relayer: Party = RELAYER,
        rng: random.Random | None = None,
    ) -> Self:
        """A new factory on an Anvil. `event_hub`: one that an earlier deployment made, to be shared. The fee is in base units of
        a token with six decimals (50000: five cents)."""
        submitter = Submitter(node, int(await node.rpc("eth_chainId"), 16))
        await _enrich(node, OPERATOR, relayer)
        fee_token = _created(await deploy_contract(submitter, "TestUSD"))
        if with_hub and event_hub is None:
            event_hub = _created(await deploy_contract(submitter, "LoyfinHub"))
        receipt = await deploy_contract(
            submitter, "Loyfin", fee_token, required_fee, PROTOCOL.address, event_hub or ZERO_ADDRESS
        )
        factory = _created(receipt)
        if event_hub is not None:
            await submitter.execute(OPERATOR, event_hub, artefact("LoyfinHub").call("admit", factory))
        return cls(submitter, Deployment(factory, event_hub, fee_token, receipt.block_number), relayer=relayer, rng=rng)

    # ---- people

    async def welcome(self, *parties: Party, fee_allowance: int = UINT256_MAX) -> None:
        """Gives each party gas money and fee tokens, and lets the factory take the fee, as customers must before anything else."""
        token = artefact("TestUSD")
        await _enrich(self.submitter.node, *parties)
        hashes = []
        for party in parties:
            mint = token.call("mint", party.address, 10**12)
            hashes.append(await self.submitter.send(OPERATOR, self.fee_token, mint))
            approve = token.call("approve", self.factory, fee_allowance)
            hashes.append(await self.submitter.send(party, self.fee_token, approve))
        for tx_hash in hashes:
            await self.submitter.wait(tx_hash)

    async def allow_fee(self, holder: Party, allowance: int) -> None:
        approve = artefact("TestUSD").call("approve", self.factory, allowance)
        await self.submitter.execute(holder, self.fee_token, approve)

    async def fee_balance(self, holder: Address) -> int:
        """Base units of the fee token."""
        return int(await self._read("TestUSD", self.fee_token, "balanceOf", holder))

    # ---- issue and redeem

    def issuance(
        self,
        brand: Party,
        to: Address,
        amount: int,
        *,
        loyalty_id: Hash32,
        metadata: Metadata | None = None,
        **terms: Any,
    ) -> Issuance:
        """Unsigned. `terms`: expires_at, deadline, nonce (default: random), operation_hash, data, and any other field to be wrong about."""
        return Issuance(
            **{
                "issuer": brand.address,
                "to": to,
                "amount": amount,
                "loyalty_id": loyalty_id,
                "metadata": metadata or Metadata(loyalty_id=loyalty_id),
                **self._target(),
                **terms,
            }
        )

    def redemption(self, brand: Party, holder: Address, amount: int, *, loyalty_id: Hash32, **terms: Any) -> Redemption:
        """Unsigned; `terms` as for `issuance`."""
        return Redemption(
            **{
                "issuer": brand.address,
                "from_": holder,
                "amount": amount,
                "loyalty_id": loyalty_id,
                **self._target(),
                **terms,
            }
        )

    async def issue(
        self,
        brand: Party,
        to: Address,
        amount: int,
        *,
        loyalty_id: Hash32,
        metadata: Metadata | None = None,
        **terms: Any,
    ) -> Submitted[Issuance]:
        """Signs as the brand and submits through the relayer. The first issuance creates the programme."""
        signed = sign(self.issuance(brand, to, amount, loyalty_id=loyalty_id, metadata=metadata, **terms), brand)
        return Submitted(await self.submit(signed), signed)

    async def redeem(
        self, brand: Party, holder: Address, amount: int, *, loyalty_id: Hash32, **terms: Any
    ) -> Submitted[Redemption]:
        """Signs as the brand and submits through the relayer; the holder signs nothing but the fee's allowance."""
        signed = sign(self.redemption(brand, holder, amount, loyalty_id=loyalty_id, **terms), brand)
        return Submitted(await self.submit(signed), signed)

    async def submit(self, signed: Signed[Any], *, relayer: Party | None = None) -> Hash32:
        """Sends the signed action; a refused one is mined too, with a receipt that says so. The hash is the transaction's."""
        return await self.submitter.send(relayer or self.relayer, *self.call(signed))

    async def prepare(
        self, signed: Signed[Any], *, relayer: Party | None = None, nonce: int | None = None
    ) -> Transaction:
        """The relayer's signed transaction, not sent: for `Anvil.reorg`, or to be sent later by hand."""
        return await self.submitter.prepare(relayer or self.relayer, *self.call(signed), nonce=nonce)

    async def refusal(self, signed: Signed[Any], *, relayer: Party | None = None) -> str | None:
        """Why the contracts would refuse the action now, as `NonceUsed(…)`; None if they would not."""
        to, data = self.call(signed)
        try:
            await self.submitter.view(to, data, sender=(relayer or self.relayer).address)
        except Refused as refused:
            return refused.reason
        return None

    def call(self, signed: Signed[Any]) -> tuple[Address, bytes]:
        """The contract that takes the action, and the call's data. Loyfin's real selectors are unknown."""
        action = signed.action
        arguments = (action.arguments(), signed.signature)
        match action:
            case Issuance():
                return self.factory, artefact("Loyfin").call("issue", *arguments)
            case Redemption():
                return self.factory, artefact("Loyfin").call("redeem", *arguments)
            case _:
                return action.verifying_contract, artefact("LoyaltyToken").call("executeAdmin", *arguments)

    # ---- programmes

    async def loyalty(self, issuer: Address, loyalty_id: Hash32) -> Address | None:
        """The programme's token; None before its first issuance."""
        found = await self._read("Loyfin", self.factory, "getLoyalty", issuer, loyalty_id)
        return None if found == ZERO_ADDRESS else Address(found)

    async def balance(self, loyalty: Address, holder: Address, token_id: int = 0) -> int:
        return int(await self.read(loyalty, "balanceOf", holder, token_id))

    async def read(self, loyalty: Address, view: str, *arguments: object) -> Any:
        """A view of a programme's token: owner, adminEpoch, transferable, uri, …"""
        return await self._read("LoyaltyToken", loyalty, view, *arguments)

    async def act(self, party: Party, loyalty: Address, function: str, *arguments: object) -> Hash32:
        """A direct transaction to a programme's token: transferOwnership, setRoyaltyBps, setApprovalForAll, withdrawRoyalties, …"""
        return await self.submitter.send(party, loyalty, artefact("LoyaltyToken").call(function, *arguments))

    async def transfer(self, holder: Party, to: Address, amount: int, *, loyalty: Address, token_id: int = 0) -> Hash32:
        return await self.act(holder, loyalty, "safeTransferFrom", holder.address, to, token_id, amount, b"")

    async def batch_transfer(self, holder: Party, to: Address, amounts: dict[int, int], *, loyalty: Address) -> Hash32:
        """`amounts` by bucket; all or nothing."""
        ids, values = list(amounts), list(amounts.values())
        return await self.act(holder, loyalty, "safeBatchTransferFrom", holder.address, to, ids, values, b"")

    async def administer(self, owner: Party, loyalty: Address, verb: AdminVerb, **terms: Any) -> Submitted[AdminAction]:
        """Signs an admin action as the owner and submits it through the relayer. `terms`: flag, account, royalty_bps, token_id, uri, …"""
        action = AdminAction(
            **{
                "owner": owner.address,
                "admin_epoch": await self.read(loyalty, "adminEpoch"),
                "loyalty_id": await self.read(loyalty, "loyaltyId"),
                "action": admin_action(verb),
                **self._target(),
                "verifying_contract": loyalty,
                **terms,
            }
        )
        signed = sign(action, owner)
        return Submitted(await self.submit(signed), signed)

    async def pay_royalty(self, payer: Party, loyalty: Address, wei: int) -> Hash32:
        """What a marketplace does after a resale."""
        return await self.submitter.send(payer, loyalty, b"", value=wei)

    # ---- what happened

    async def wait(self, tx_hash: Hash32, *, timeout: float = 30) -> Receipt:
        return await self.submitter.wait(tx_hash, timeout=timeout)

    async def events(self, tx_hash: Hash32, *, timeout: float = 30) -> list[Event]:
        """The decoded logs of a transaction, once it is mined; those of the fee token included. Raises Refused where it was reverted."""
        receipt = await self.wait(tx_hash, timeout=timeout)
        if not receipt.succeeded:
            raise Refused(f"reverted in block {receipt.block_number}")
        return decode_logs(receipt.logs)

    def _target(self) -> dict[str, Any]:
        return {
            "nonce": Hash32(self._random.randbytes(32)),
            "chain_id": self.submitter.chain_id,
            "verifying_contract": self.factory,
        }

    async def _read(self, name: ContractName, contract: Address, view: str, *arguments: object) -> Any:
        abi = artefact(name)
        return abi.result(view, await self.submitter.view(contract, abi.call(view, *arguments)))


# ---- emitters without a conscience


async def deploy_look_alike(submitter: Submitter) -> Address:
    """A stranger's contract: anyone can make it emit anything with `speak`, and it refuses to be paid."""
    return _created(await deploy_contract(submitter, "LookAlike"))


async def deploy_burst_factory(submitter: Submitter) -> Deployment:
    """A factory for volume, without fees or signatures, that can also `speak`: configure its address as a factory."""
    receipt = await deploy_contract(submitter, "BurstFactory")
    return Deployment(_created(receipt), None, ZERO_ADDRESS, receipt.block_number)


async def speak(
    submitter: Submitter, speaker: Address, topics: Sequence[bytes], data: bytes, *, by: Party = RELAYER
) -> Hash32:
    """Emits a log from `speaker`: a look-alike, a burst factory, or any programme's token. `Artefact.log` builds topics and data."""
    call = artefact("LookAlike").call("speak", list(topics), data)
    return await submitter.send(by, speaker, call, gas=200_000 + 60 * len(data))


async def speak_at_length(
    submitter: Submitter,
    speaker: Address,
    topics: Sequence[bytes],
    head: bytes,
    size: int,
    fill: bytes = b"A",
    *,
    by: Party = RELAYER,
) -> Hash32:
    """As `speak`, with `head` followed by `size` times the byte `fill` as data: megabytes at the price of a small request."""
    words = (len(head) + size) // 32 + 2
    gas = 300_000 + 60 * len(head) + 9 * size + 6 * words + words * words // 512
    call = artefact("LookAlike").call("speakAtLength", list(topics), head, size, fill)
    return await submitter.send(by, speaker, call, gas=gas)


async def speak_long_name(
    submitter: Submitter, speaker: Address, *, issuer: Address, loyalty_id: Hash32, loyalty: Address, size: int
) -> Hash32:
    """LoyaltyProgramCreated with a name of `size` bytes (a multiple of 32)."""
    if size % 32:
        raise ValueError(f"size must be a multiple of 32, not {size}")
    topics, data = artefact("Loyfin").log(
        "LoyaltyProgramCreated",
        factory=speaker,
        issuer=issuer,
        loyaltyId=loyalty_id,
        loyalty=loyalty,
        **{field: "" for field in ("name", "symbol", "media", "description", "contractURI", "tokenURI")},
    )
    # seven words of head; the second one becomes the offset of a string that begins where the empty ones end
    head = data[:32] + len(data).to_bytes(32) + data[64:] + size.to_bytes(32)
    return await speak_at_length(submitter, speaker, topics, head, size)


async def create_program(submitter: Submitter, factory: Address, issuer: Party, metadata: Metadata) -> Receipt:
    """A programme of `issuer` at a burst factory, without an issuance."""
    await _enrich(submitter.node, issuer)
    return await submitter.execute(issuer, factory, artefact("BurstFactory").call("create", metadata.arguments()))


async def burst(
    submitter: Submitter,
    factory: Address,
    issuer: Party,
    *,
    loyalty_id: Hash32,
    count: int,
    first_nonce: int,
    issued: bool = True,
    first_holder: Address = FIRST_HOLDER,
    holders: int = 1,
    token_id: int = 0,
    amount: int = 1,
) -> Hash32:
    """`count` PointsIssued (or PointsRedeemed) in one transaction, at about 5,500 gas each.

    Nonces count up from `first_nonce`; each operation hash is the keccak256 of its nonce; holders follow on `first_holder`.
    Balances do not change. A block's gas holds about 150,000 of them.
    """
    request = (issued, loyalty_id, count, first_nonce, first_holder, holders, token_id, amount)
    call = artefact("BurstFactory").call("burst", request)
    return await submitter.send(issuer, factory, call, gas=200_000 + 6_000 * count)


def operation_hash(reference: str) -> Hash32:
    """As Loyfin suggests: keccak256 of the brand's own id of the operation."""
    return Hash32(keccak(reference.encode()))


async def _enrich(node: JsonRpc, *parties: Party) -> None:
    for party in parties:
        await node.rpc("anvil_setBalance", hex0x(party.address), hex(WEALTH))
