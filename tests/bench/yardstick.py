"""The other side: the plain script that one would write first, with web3's get_logs and process_log and ORM inserts.

Nothing in it is slow on purpose: a row is stored once, in a table with the product's columns and indexes, a session per
range of blocks, one commit each. It reads a sample, since the whole would take minutes; the report extrapolates.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import msgspec
from sqlalchemy import BigInteger, Index, Integer, LargeBinary, MetaData, Numeric
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from web3 import Web3

from indexer.chain.codegen import DOCUMENTED, abi_directory
from tests.bench.history import CHAIN_ID, CREATED, FACTORY, ISSUED, REDEEMED
from tests.bench.measure import own_cpu, own_peak_mb

RANGE = 500  # blocks of one eth_getLogs


class Task(msgspec.Struct):
    node: str
    database: str  # of a role that may create a schema
    blocks: int


class Base(DeclarativeBase):
    metadata = MetaData(schema="yardstick")


class Log:
    chain_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    block_number: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    log_index: Mapped[int] = mapped_column(Integer, primary_key=True)
    block_hash: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    block_time_ms: Mapped[int] = mapped_column(BigInteger)
    tx_hash: Mapped[bytes]
    tx_index: Mapped[int]
    emitter: Mapped[bytes]
    canonical: Mapped[bool]
    factory: Mapped[bytes]
    issuer: Mapped[bytes]
    loyalty_id: Mapped[bytes]
    loyalty: Mapped[bytes]


class Programme(Log, Base):
    __tablename__ = "programme"
    name: Mapped[str]
    symbol: Mapped[str]


class Movement(Log, Base):
    __tablename__ = "movement"
    kind: Mapped[str]
    holder: Mapped[bytes]
    bucket: Mapped[int] = mapped_column(Numeric(78, 0))
    amount: Mapped[int] = mapped_column(Numeric(78, 0))
    nonce: Mapped[bytes] = mapped_column(LargeBinary, index=True)
    operation_hash: Mapped[bytes | None] = mapped_column(LargeBinary, index=True)
    data: Mapped[bytes]
    __table_args__ = (Index("movement_holder_idx", "holder", "loyalty"),)


def _address(text: str) -> bytes:
    return bytes.fromhex(text[2:])


def _seconds(stamp: int | str) -> int:
    return int(stamp, 16) if isinstance(stamp, str) else stamp


def _row(readers: dict[bytes, Any], log: Any) -> Base:
    topic = bytes(log["topics"][0])
    event = readers[topic].process_log(log)
    args = event["args"]
    common = {
        "chain_id": CHAIN_ID,
        "block_number": event["blockNumber"],
        "log_index": event["logIndex"],
        "block_hash": bytes(event["blockHash"]),
        "block_time_ms": 1000 * _seconds(log["blockTimestamp"]),
        "tx_hash": bytes(event["transactionHash"]),
        "tx_index": event["transactionIndex"],
        "emitter": _address(event["address"]),
        "canonical": True,
        "factory": _address(args["factory"]),
        "issuer": _address(args["issuer"]),
        "loyalty_id": bytes(args["loyaltyId"]),
        "loyalty": _address(args["loyalty"]),
    }
    if topic == CREATED:
        return Programme(**common, name=args["name"], symbol=args["symbol"])
    return Movement(
        **common,
        kind="loyfin.issuance" if topic == ISSUED else "loyfin.redemption",
        holder=_address(args["to"] if topic == ISSUED else args["from"]),
        bucket=args["tokenId"],
        amount=args["amount"],
        nonce=bytes(args["nonce"]),
        operation_hash=bytes(args["operationHash"]) if any(args["operationHash"]) else None,
        data=bytes(args["data"]),
    )


async def run(task: Task) -> dict[str, float]:
    w3 = Web3(Web3.HTTPProvider(task.node))
    abi = json.loads((abi_directory() / DOCUMENTED).read_text())
    factory = Web3.to_checksum_address("0x" + FACTORY.hex())
    contract = w3.eth.contract(address=factory, abi=abi)
    readers = {
        CREATED: contract.events.LoyaltyProgramCreated(),
        ISSUED: contract.events.PointsIssued(),
        REDEEMED: contract.events.PointsRedeemed(),
    }
    url = make_url(task.database).set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.exec_driver_sql("CREATE SCHEMA yardstick")
        await connection.run_sync(Base.metadata.create_all)
    addresses, events = [factory], 0
    began, cpu = time.perf_counter(), own_cpu()
    for start in range(1, task.blocks + 1, RANGE):
        query: Any = {"fromBlock": start, "toBlock": min(start + RANGE - 1, task.blocks)}
        logs = w3.eth.get_logs(query | {"address": addresses})
        rows = [_row(readers, log) for log in logs]
        tokens = [Web3.to_checksum_address(row.loyalty) for row in rows if isinstance(row, Programme)]
        if tokens:
            rows += [_row(readers, log) for log in w3.eth.get_logs(query | {"address": tokens})]
            addresses += tokens
        async with AsyncSession(engine) as session:
            session.add_all(rows)
            await session.commit()
        events += len(rows)
    seconds, cpu = time.perf_counter() - began, own_cpu() - cpu
    await engine.dispose()
    return {"events": events, "seconds": seconds, "cpu": cpu, "whole_cpu": own_cpu(), "peak_mb": own_peak_mb()}


if __name__ == "__main__":
    answer = asyncio.run(run(msgspec.json.decode(sys.argv[1], type=Task)))
    sys.stdout.write(msgspec.json.encode(answer).decode())
