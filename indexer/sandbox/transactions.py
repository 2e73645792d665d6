"""Accounts of the sandbox, and how their transactions are signed, sent, sent again, and waited for.

Promises that each transaction keeps its hash when it is sent again after a reorganisation dropped it, and that one party's nonces
have neither gaps nor repetitions while this process alone sends for it. What the transactions mean is left to the drivers.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from eth_hash.auto import keccak

from indexer.model.types import Address, Hash32, address, hash32, hex0x
from indexer.sandbox.anvil import JsonRpc, RpcRefused
from indexer.sandbox.contracts import error_of

if TYPE_CHECKING:
    from eth_account.messages import SignableMessage
    from eth_account.signers.local import LocalAccount

GAS = 2_000_000  # covers the creation of a programme; given, not estimated, so that a refused call is mined as refused
_REMEMBERED = 2_000  # transactions that a reorganisation can be undone for; each costs a request when it is
_FEES = {"maxFeePerGas": 10**11, "maxPriorityFeePerGas": 10**9}  # wei


class Refused(Exception):
    """The contract refuses the call; `reason` is its error, as `NonceUsed(…)`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Party:
    """Someone with a key: a brand, a customer, a relayer. Sandbox keys are public by construction and worth nothing."""

    name: str

    @cached_property
    def _account(self) -> LocalAccount:
        from eth_account import Account  # a second of imports, paid by those who sign

        account: LocalAccount = Account.from_key(keccak(b"loyalty indexer sandbox: " + self.name.encode()))
        return account

    @cached_property
    def address(self) -> Address:
        return address(self._account.address)

    def sign_message(self, message: SignableMessage) -> bytes:
        """65 bytes: r, s, v."""
        return bytes(self._account.sign_message(message).signature)

    def sign_transaction(self, fields: dict[str, Any]) -> tuple[bytes, Hash32]:
        signed = self._account.sign_transaction(fields)
        return bytes(signed.raw_transaction), Hash32(bytes(signed.hash))


@dataclass(frozen=True, slots=True)
class Transaction:
    """A signed transaction: as often as it is sent, it has this hash."""

    raw: bytes
    hash: Hash32
    sender: Address
    nonce: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """How a transaction ended. `to` is the created contract where it created one."""

    hash: Hash32
    succeeded: bool
    block_number: int
    block_hash: Hash32
    gas_used: int
    created: Address | None
    logs: Sequence[dict[str, Any]]


class Submitter:
    """Signs and sends transactions of any party to one node.

    A reorganisation that drops a party's transaction leaves a gap in its nonces: what the party sends afterwards waits in the pool
    until `restore_dropped` closes the gap. `abandon_dropped` gives up what was dropped, and its nonces with it.
    """

    def __init__(self, node: JsonRpc, chain_id: int) -> None:
        self.node, self.chain_id = node, chain_id
        self._turns: defaultdict[Address, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._next_nonce: defaultdict[Address, int] = defaultdict(int)
        self._sent: OrderedDict[Hash32, Transaction] = OrderedDict()

    async def prepare(
        self, party: Party, to: Address | None, data: bytes, *, value: int = 0, gas: int = GAS, nonce: int | None = None
    ) -> Transaction:
        """A signed transaction that is not sent, as `Anvil.reorg` takes it. Without `nonce`: the party's next one.

        None as `to` creates a contract.
        """
        if nonce is None:
            # the node's own count is too low after a reorganisation: it would give a dropped transaction's nonce to another one
            known = int(await self.node.rpc("eth_getTransactionCount", hex0x(party.address), "pending"), 16)
            nonce = max(known, self._next_nonce[party.address])
        fields = {
            "type": 2,
            "chainId": self.chain_id,
            "nonce": nonce,
            "to": b"" if to is None else to,
            "value": value,
            "gas": gas,
            "data": data,
            **_FEES,
        }
        raw, tx_hash = party.sign_transaction(fields)
        return Transaction(raw, tx_hash, party.address, nonce)

    async def send(self, party: Party, to: Address | None, data: bytes, *, value: int = 0, gas: int = GAS) -> Hash32:
        """Signs with the party's next nonce and sends. Being in the pool is not being mined."""
        async with self._turns[party.address]:
            transaction = await self.prepare(party, to, data, value=value, gas=gas)
            await self.node.rpc("eth_sendRawTransaction", hex0x(transaction.raw))
            self._next_nonce[party.address] = transaction.nonce + 1
            self._sent[transaction.hash] = transaction
        if len(self._sent) > _REMEMBERED:
            self._sent.popitem(last=False)
        return transaction.hash

    async def resend(self, tx_hash: Hash32) -> bool:
        """Sends the same signed transaction again, if the node no longer knows it; says whether it did.

        KeyError: not sent from here, or long ago. RpcRefused: its nonce is taken by another transaction by now.
        """
        transaction = self._sent[tx_hash]
        async with self._turns[transaction.sender]:
            if await self.knows(tx_hash):
                return False
            await self.node.rpc("eth_sendRawTransaction", hex0x(transaction.raw))
            return True

    async def restore_dropped(self, *, timeout: float = 30) -> set[Hash32]:
        """Sends again whatever a reorganisation dropped, until all that was sent is mined; says what that took.

        Once is not enough where blocks come by themselves: Anvil throws away what waited in its pool behind a dropped transaction
        when it builds the next block, after the reorganisation. Raises TimeoutError.
        """
        restored: set[Hash32] = set()
        async with asyncio.timeout(timeout):
            while True:
                restored.update(await self.resend_dropped())
                if all([await self.receipt(tx_hash) for tx_hash in list(self._sent)]):
                    return restored
                await asyncio.sleep(0.05)

    async def resend_dropped(self) -> list[Hash32]:
        """Sends again whatever the node has forgotten by now, lowest nonces first; says which.

        What can never come back, since another transaction took its nonce, is forgotten here too.
        """
        resent = []
        for transaction in sorted(self._sent.values(), key=lambda t: (t.sender, t.nonce)):
            try:
                if await self.resend(transaction.hash):
                    resent.append(transaction.hash)
            except RpcRefused as error:
                if "nonce too low" not in error.message:
                    raise
                del self._sent[transaction.hash]
        return resent

    async def abandon_dropped(self) -> list[Hash32]:
        """Forgets whatever the node has forgotten, so that its nonces are used again; says which."""
        dropped = [tx_hash for tx_hash in list(self._sent) if not await self.knows(tx_hash)]
        for tx_hash in dropped:
            del self._sent[tx_hash]
        self._next_nonce.clear()
        return dropped

    async def knows(self, tx_hash: Hash32) -> bool:
        """Whether the node has the transaction, mined or in its pool."""
        return await self.node.rpc("eth_getTransactionByHash", hex0x(tx_hash)) is not None

    def sent(self, tx_hash: Hash32) -> Transaction:
        """The signed transaction behind a hash that `send` returned."""
        return self._sent[tx_hash]

    async def receipt(self, tx_hash: Hash32) -> Receipt | None:
        """None: not mined, or not any more."""
        found = await self.node.rpc("eth_getTransactionReceipt", hex0x(tx_hash))
        if found is None:
            return None
        return Receipt(
            hash=tx_hash,
            succeeded=found["status"] == "0x1",
            block_number=int(found["blockNumber"], 16),
            block_hash=hash32(found["blockHash"]),
            gas_used=int(found["gasUsed"], 16),
            created=address(found["contractAddress"]) if found.get("contractAddress") else None,
            logs=found["logs"],
        )

    async def wait(self, tx_hash: Hash32, *, timeout: float = 30) -> Receipt:
        """The receipt, once there is one: even with a block for each transaction Anvil mines after it has answered. Raises TimeoutError."""
        async with asyncio.timeout(timeout):
            pause = 0.002
            while (receipt := await self.receipt(tx_hash)) is None:
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, 0.05)
        return receipt

    async def execute(
        self, party: Party, to: Address | None, data: bytes, *, value: int = 0, gas: int = GAS
    ) -> Receipt:
        """Sends and waits. Raises Refused where the contract refused, with its reason."""
        receipt = await self.wait(await self.send(party, to, data, value=value, gas=gas))
        if not receipt.succeeded:
            if to is not None:
                await self.view(to, data, sender=party.address, value=value, gas=gas)
            raise Refused(f"refused at block {receipt.block_number} after {receipt.gas_used} gas, and not any more")
        return receipt

    async def view(
        self, to: Address, data: bytes, *, sender: Address | None = None, value: int = 0, gas: int | None = None
    ) -> bytes:
        """What a call would return now. Raises Refused."""
        call = {"to": hex0x(to), "data": hex0x(data), "value": hex(value)}
        if sender is not None:
            call["from"] = hex0x(sender)
        if gas is not None:
            call["gas"] = hex(gas)
        try:
            return bytes.fromhex((await self.node.rpc("eth_call", call, "latest"))[2:])
        except RpcRefused as error:
            if not error.data:
                raise
            raise Refused(error_of(error.data)) from error
