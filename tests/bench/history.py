"""A made-up history of one Loyfin factory, the same in every run: blocks with movements, and programmes created on the way.

`Shape` says how much of it; `logs_of` gives the events of one block. Both sides of a comparison read the same bytes, and
nothing here is measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from eth_abi.abi import encode
from eth_hash.auto import keccak

from tests.fake_node import EMPTY_ROOT, EMPTY_UNCLES, bloom_of, rlp

CHAIN_ID = 31_337  # no schedule is built in for it: times come with the logs
START_S = 1_790_000_000
BLOCK_S = 2
FACTORY = b"\xfa" * 20
ISSUERS = tuple(bytes([0x15, issuer]) * 10 for issuer in range(4))
WALLETS = 20_000

_POINTS = b"(address,address,bytes32,address,address,uint256,uint256,bytes32,bytes32,bytes)"
ISSUED, REDEEMED = keccak(b"PointsIssued" + _POINTS), keccak(b"PointsRedeemed" + _POINTS)
CREATED = keccak(b"LoyaltyProgramCreated(address,address,bytes32,address,string,string,string,string,string,string)")

Event = tuple[bytes, tuple[bytes, ...], bytes]  # emitter, topics, data


def digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


@dataclass(frozen=True, slots=True)
class Shape:
    """`blocks` blocks after block 0, each with `per_block` movements; `programmes` are announced in the first tenth.

    The last `growing` of them come one by one while the node runs. `withheld`: a second endpoint leaves out one log in so many.
    """

    blocks: int = 100_000
    per_block: int = 2
    programmes: int = 8
    growing: int = 0
    withheld: int = 0

    @property
    def events(self) -> int:
        return self.blocks * self.per_block + self.programmes

    def announced_in(self, programme: int) -> int:
        return 1 + programme * max(1, self.blocks // 10) // self.programmes


def token_of(programme: int) -> bytes:
    return digest("token", programme)[:20]


def issuer_of(programme: int) -> bytes:
    return ISSUERS[programme % len(ISSUERS)]


def loyalty_id_of(programme: int) -> bytes:
    return digest("loyalty", programme)


def time_s(number: int) -> int:
    return START_S + BLOCK_S * number


def header(number: int, parent: bytes, events: list[Event]) -> tuple[bytes, dict[str, str]]:
    """A block's hash, and its header as a node shows it: linked, and true but for its roots."""
    fields: dict[str, bytes | int] = {
        "parentHash": parent,
        "sha3Uncles": EMPTY_UNCLES,
        "miner": bytes(20),
        "stateRoot": EMPTY_ROOT,
        "transactionsRoot": EMPTY_ROOT,
        "receiptsRoot": EMPTY_ROOT,
        "logsBloom": bloom_of(events),
        "difficulty": 0,
        "number": number,
        "gasLimit": 40_000_000,
        "gasUsed": 60_000 * len(events),
        "timestamp": time_s(number),
        "extraData": b"",
        "mixHash": bytes(32),
        "nonce": bytes(8),
        "baseFeePerGas": 5_000_000,
    }
    own = keccak(rlp(list(fields.values())))
    shown = {name: "0x" + value.hex() if isinstance(value, bytes) else hex(value) for name, value in fields.items()}
    return own, shown | {"hash": "0x" + own.hex()}


def word(address: bytes) -> bytes:
    return address.rjust(32, b"\0")


def announcement(programme: int) -> Event:
    texts = [
        f"Rewards {programme}",
        f"RWD{programme}",
        "ipfs://bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi/logo.png",
        "Points for every purchase, good for vouchers, coffee and flights.",
        "https://example.org/programme.json",
        "https://example.org/token/{id}.json",
    ]
    data = encode(["address"] + ["string"] * 6, ["0x" + token_of(programme).hex(), *texts])
    topics = (CREATED, word(FACTORY), word(issuer_of(programme)), loyalty_id_of(programme))
    return FACTORY, topics, data


def movement(number: int, programme: int) -> Event:
    """Movement `number` of the whole history: one in eight is logged by the programme's token, the rest by the factory;
    four in ten redeem; half carry the shop's correlation hash, every fourth 48 bytes of data, every third expires."""
    seed = digest("movement", number)
    wallet = digest("wallet", int.from_bytes(seed[:4], "big") % WALLETS)[:20]
    bucket = START_S + 31_536_000 * (1 + seed[4] % 3) if seed[5] % 3 == 0 else 0
    amount = 1 + int.from_bytes(seed[6:9], "big") % 500_000
    operation_hash = digest("operation", number) if seed[9] % 2 else bytes(32)
    extra = b'{"order":"%d","shop":"bloom"}' % (10_000_000_000_000 + number) if seed[10] % 4 == 0 else b""
    # what eth_abi.encode gives, without its fifty microseconds: six words, an offset, a length, the padded bytes
    data = b"".join(
        (
            word(token_of(programme)),
            word(wallet),
            bucket.to_bytes(32, "big"),
            amount.to_bytes(32, "big"),
            digest("nonce", number),
            operation_hash,
            (224).to_bytes(32, "big"),
            len(extra).to_bytes(32, "big"),
            extra.ljust(-(-len(extra) // 32) * 32, b"\0"),
        )
    )
    topic0 = REDEEMED if seed[11] % 10 < 4 else ISSUED
    emitter = token_of(programme) if seed[12] % 8 == 0 else FACTORY
    return emitter, (topic0, word(FACTORY), word(issuer_of(programme)), loyalty_id_of(programme)), data


def logs_of(shape: Shape) -> Iterator[tuple[int, list[Event]]]:
    """Every block with its events, lowest first."""
    announced = {shape.announced_in(programme): programme for programme in range(shape.programmes)}
    known, number = 0, 0
    for block in range(1, shape.blocks + 1):
        events = []
        if block in announced:
            events.append(announcement(announced[block]))
            known = announced[block] + 1
        for _ in range(shape.per_block):
            events.append(movement(number, number % known))
            number += 1
        yield block, events
