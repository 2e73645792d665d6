"""The chain's truth, read from a node without the product: what its canonical rows should say.

The rules of docs/events.md once more, with eth_abi and the ABI files alone, so that a defect in the product's decoding
cannot hide itself. Text that is not UTF-8 and rows that were cut are left to the tests of decoding.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from eth_abi.abi import decode as abi_decode
from eth_abi.exceptions import DecodingError
from eth_hash.auto import keccak

from tests.oracle import Facts


@dataclass(frozen=True)
class Contracts:
    """Who was configured: factories, and hubs with the factories that name them."""

    factories: frozenset[bytes]
    hubs: Mapping[bytes, frozenset[bytes]] = field(default_factory=dict)


async def read_truth(url: str, contracts: Contracts, abi: Path, up_to: int | None = None) -> Facts:
    """What a node's canonical chain holds of these contracts and of the tokens that they announced."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:

        async def logs_of(addresses: Collection[bytes]) -> list[dict[str, Any]]:
            if not addresses:
                return []
            wanted = {
                "fromBlock": "0x0",
                "toBlock": "latest" if up_to is None else hex(up_to),
                "address": sorted("0x" + address.hex() for address in addresses),
            }
            question = {"jsonrpc": "2.0", "id": 1, "method": "eth_getLogs", "params": [wanted]}
            async with session.post(url, json=question) as answer:
                body = await answer.json(content_type=None)
            if "result" not in body:
                raise AssertionError(f"eth_getLogs: {body.get('error')}")
            return list(body["result"])

        events = _load_events(abi)
        logs = await logs_of(contracts.factories | set(contracts.hubs))
        tokens = _announced(logs, events, contracts)
        logs += await logs_of(set(tokens) - contracts.factories - set(contracts.hubs))
    return facts_of(logs, events, contracts, tokens)


@dataclass(frozen=True)
class _Event:
    name: str
    inputs: tuple[tuple[str, str, bool], ...]  # name, type, indexed


def _load_events(abi: Path) -> dict[bytes, _Event]:
    events: dict[bytes, _Event] = {}
    for path in sorted(abi.glob("*.json")):
        for entry in json.loads(path.read_text()):
            if entry["type"] == "event" and not entry.get("anonymous"):
                inputs = tuple((i["name"], i["type"], i["indexed"]) for i in entry["inputs"])
                signature = f"{entry['name']}({','.join(kind for _, kind, _ in inputs)})"
                events.setdefault(keccak(signature.encode()), _Event(entry["name"], inputs))
    return events


def _raw(text: str) -> bytes:
    return bytes.fromhex(text[2:])


def _arguments(log: Mapping[str, Any], event: _Event) -> dict[str, Any]:
    """By name; addresses as bytes. Raises DecodingError."""
    topics, data = [_raw(topic) for topic in log["topics"]][1:], _raw(log["data"])
    indexed = [(name, kind) for name, kind, is_indexed in event.inputs if is_indexed]
    rest = [(name, kind) for name, kind, is_indexed in event.inputs if not is_indexed]
    if len(topics) != len(indexed):
        raise DecodingError(f"{event.name}: {len(topics)} indexed")
    values = {
        name: topic if kind in ("string", "bytes") or kind.endswith("]") else abi_decode([kind], topic)[0]
        for (name, kind), topic in zip(indexed, topics, strict=True)
    }
    values |= dict(zip([name for name, _ in rest], abi_decode([kind for _, kind in rest], data), strict=True))
    return {n: bytes.fromhex(str(values[n])[2:]) if kind == "address" else values[n] for n, kind, _ in event.inputs}


def _announced(
    logs: Iterable[Mapping[str, Any]], events: Mapping[bytes, _Event], contracts: Contracts
) -> dict[bytes, tuple[tuple[bytes, bytes, bytes], int]]:
    """token → (its programme, the block that announced it)."""
    tokens: dict[bytes, tuple[tuple[bytes, bytes, bytes], int]] = {}
    for log in sorted(logs, key=lambda log: (int(log["blockNumber"], 16), int(log["logIndex"], 16))):
        event = events.get(_raw(log["topics"][0])) if log["topics"] else None
        if event is not None and event.name == "LoyaltyProgramCreated":
            args = _arguments(log, event)
            if args["factory"] in _speaks_for(_raw(log["address"]), contracts):
                programme = (args["factory"], args["issuer"], args["loyaltyId"])
                tokens.setdefault(args["loyalty"], (programme, int(log["blockNumber"], 16)))
    return tokens


def _speaks_for(emitter: bytes, contracts: Contracts) -> frozenset[bytes]:
    own = frozenset([emitter]) & contracts.factories
    return own | (contracts.hubs.get(emitter, frozenset()) & contracts.factories)


def facts_of(
    logs: Iterable[Mapping[str, Any]],
    events: Mapping[bytes, _Event],
    contracts: Contracts,
    tokens: Mapping[bytes, tuple[tuple[bytes, bytes, bytes], int]],
) -> Facts:
    """The rows that these logs should have become: docs/events.md, read a second time."""
    facts: Facts = {}
    for log in logs:
        emitter, block = _raw(log["address"]), int(log["blockNumber"], 16)
        where = {
            "block_number": block,
            "tx_hash": _raw(log["transactionHash"]),
            "tx_index": int(log["transactionIndex"], 16),
        }
        where["emitter"] = emitter
        place = (_raw(log["blockHash"]), int(log["logIndex"], 16))
        programme, born = tokens.get(emitter, (None, 0))
        speaks_for = _speaks_for(emitter, contracts)
        own = programme if programme is not None and block >= born else None
        if not speaks_for and own is None:
            continue
        event = events.get(_raw(log["topics"][0])) if log["topics"] else None
        raw = where | {"topics": [_raw(topic) for topic in log["topics"]], "data": _raw(log["data"])}
        if event is None:
            facts[("raw_log", *place, 0)] = raw
            continue
        try:
            args = _arguments(log, event)
            if _may_say(emitter, args, speaks_for, own, tokens):
                for table, item, fields in _rows(event, args, emitter, is_token=own is not None):
                    facts[(table, *place, item)] = where | fields
        except DecodingError:
            facts[("raw_log", *place, 0)] = raw
    return facts


def _may_say(
    emitter: bytes,
    args: Mapping[str, Any],
    speaks_for: frozenset[bytes],
    own: tuple[bytes, bytes, bytes] | None,
    tokens: Mapping[bytes, tuple[tuple[bytes, bytes, bytes], int]],
) -> bool:
    if "factory" in args and "loyaltyId" in args:
        told = (args["factory"], args["issuer"], args["loyaltyId"])
        return args["factory"] in speaks_for or (told == own and args["loyalty"] == emitter)
    if next(iter(args), None) == "loyalty":
        known = tokens.get(args["loyalty"])
        return (own is not None and args["loyalty"] == emitter) or (
            bool(speaks_for) and (known is None or known[0][0] in speaks_for)
        )
    return True


def _rows(
    event: _Event, args: Mapping[str, Any], emitter: bytes, *, is_token: bool
) -> list[tuple[str, int, dict[str, Any]]]:
    a = dict(args)
    match event.name:
        case "LoyaltyProgramCreated":
            texts = {
                "media": "media",
                "description": "description",
                "contract_uri": "contractURI",
                "token_uri": "tokenURI",
            }
            named = {"loyalty_id": "loyaltyId", "name": "name", "symbol": "symbol"} | texts
            fields = {k: a[k] for k in ("factory", "issuer", "loyalty")} | {k: a[v] for k, v in named.items()}
            return [("programme", 0, fields)]
        case "PointsIssued" | "PointsRedeemed":
            issued = event.name == "PointsIssued"
            fields = {k: a[k] for k in ("factory", "issuer", "loyalty", "amount", "nonce", "data")} | {
                "kind": "loyfin.issuance" if issued else "loyfin.redemption",
                "holder": a["to" if issued else "from"],
                "loyalty_id": a["loyaltyId"],
                "bucket": a["tokenId"],
                "operation_hash": a["operationHash"] if any(a["operationHash"]) else None,
            }
            return [("movement", 0, fields)]
        case "LoyaltyTransfer" | "LoyaltyBatchTransfer":
            loyalty, source = a["loyalty"], "loyfin"
        case "TransferSingle" | "TransferBatch" if is_token:
            loyalty, source = emitter, "erc1155"
        case _:
            told = {name: _json(value) for name, value in a.items()}
            loyalty = a["loyalty"] if next(iter(a), None) == "loyalty" else emitter
            return [("programme_event", 0, {"event": event.name, "loyalty": loyalty, "args": told})]
    values = list(a.values())
    operator, sender, recipient, buckets, amounts = values[-5:]
    if not isinstance(buckets, tuple):
        buckets, amounts = (buckets,), (amounts,)
    if len(buckets) != len(amounts):
        raise DecodingError(f"{event.name}: {len(buckets)} buckets, {len(amounts)} amounts")
    parties = {"loyalty": loyalty, "source": source, "operator": operator, "sender": sender, "recipient": recipient}
    return [
        ("transfer", item, parties | {"item": item, "bucket": bucket, "amount": amount})
        for item, (bucket, amount) in enumerate(zip(buckets, amounts, strict=True))
    ]


def _json(value: Any) -> Any:
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, tuple):
        return [_json(item) for item in value]
    return value if isinstance(value, bool | str) else str(value)
