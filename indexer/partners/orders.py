"""Keyban's orders, read: which value moved to or from a wallet, how far it is, and when (facts/keyban.md, sections 4 and 10).

Pure and lenient: several spellings of a field, several nodes of an order, strings for numbers. An order settles at most one leg
per direction; its nodes sum up, it has succeeded when all have, and failed when any has. What cannot be read is no evidence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from indexer.model.evidence import KEYBAN, transfer_id
from indexer.partners.reading import (
    Drift,
    amount,
    base_units,
    flag,
    identifier,
    instant,
    plain_decimal,
    table,
    text,
    whole,
)
from indexer.store.partners import TransferRow

MINT: Final = "keyban.mint"
BURN: Final = "keyban.burn"
_HASH = re.compile(r"(?:0x)?([0-9a-fA-F]{64})")


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where a brand's Keyban orders stand. `decimals` None: amounts are compared as received. `chain_id`: one that we follow."""

    brand: str
    network: str
    decimals: int | None = None
    chain_id: int | None = None


@dataclass(frozen=True, slots=True)
class Page:
    rows: Sequence[Any]
    total: int | None


class Unusable(ValueError):
    """A row, or a whole answer, that nothing can be made of."""


def page_of(document: Any, drift: Drift) -> Page:
    """The rows of `{data: […], total}`, or of a bare list. Raises Unusable."""
    rows = document if isinstance(document, list) else table(document).get("data")
    if isinstance(rows, dict):
        rows = rows.get("nodes")
    if not isinstance(rows, list):
        raise Unusable("an answer without a list of orders in `data`")
    total = table(document).get("total")
    if isinstance(total, str):
        drift["type"] += 1
    return Page(rows, whole(total, Drift()))


def order_id(row: Any) -> str:
    """The id of an order. Raises Unusable: without it nothing can be told apart."""
    found = identifier(table(row).get("id"))
    if found is None:
        raise Unusable("an order without an id")
    return found


def same_wallet(one: str | None, other: str) -> bool:
    """Hex addresses are compared without case; a Stellar strkey's case is part of it."""
    if one is None:
        return False
    return one == other or (one[:2] in ("0x", "0X") and one.lower() == other.lower())


@dataclass(frozen=True, slots=True)
class _Node:
    sender: str | None
    recipient: str | None
    directed: bool  # says where it came from or went to
    value: Decimal | None
    decimals: int | None
    token: str | None
    tx_hash: str | None
    block: int | None
    success: bool | None
    time_ms: int | None
    named: str | None  # the transfer's own id
    doubtful: bool  # whom it concerns, amount, transaction, block or success is there, and cannot be read


def _party(transfer: Any, name: str, drift: Drift) -> tuple[bool, str | None]:
    """(said, address) of `from` or `to`, as a string, an object with an id, or `fromId`; null stands for nobody."""
    for key in (f"{name}Id", name):
        if key in transfer:
            value = transfer[key]
            if isinstance(value, dict):
                value = value.get("id", value.get("address", value))
            return True, text(value, drift)
    return False, None


def _node(node: Any, drift: Drift) -> _Node:
    vital: Drift = Drift()
    transfer = _object(_object(node, vital).get("assetTransfer"), vital)
    said = transfer.get("transaction", table(node).get("transaction"))
    tx = table(said) if isinstance(said, str) else _object(said, vital)
    sent, sender = _party(transfer, "from", vital)
    received, recipient = _party(transfer, "to", vital)
    tx_hash = tx.get("id") or tx.get("hash") or transfer.get("transactionId")
    if tx_hash is None and isinstance(said, str):
        tx_hash = said
    token = transfer.get("tokenId")
    if token is None:
        token = table(transfer.get("token")).get("id")
    decimals = transfer.get("decimals", table(transfer.get("token")).get("decimals"))
    value, tx_hash = amount(transfer.get("value"), vital), text(tx_hash, vital)
    block = whole(tx.get("blockNumber", transfer.get("transactionBlockNumber")), vital)
    success = flag(tx.get("success"), vital)
    drift.update(vital)
    return _Node(
        sender,
        recipient,
        # one side alone says it when the wallet is on it; a mint's sender or a burn's recipient may be nobody
        directed=sent or received,
        value=value,
        decimals=whole(decimals, drift) if decimals is not None else None,
        token=text(token, drift),
        tx_hash=tx_hash,
        block=block,
        success=success,
        time_ms=instant(tx.get("date", tx.get("createdAt")), drift),
        named=identifier(transfer.get("id")),
        doubtful=bool(vital["unreadable"]),
    )


def _object(value: Any, vital: Drift) -> Any:
    """An object, or an empty one for nothing; for anything else too, which is noted."""
    vital["unreadable"] += value is not None and not isinstance(value, dict)
    return table(value)


def _nodes(row: Any) -> list[Any]:
    """What an order consists of; nothing while it is queued. Raises Unusable where it says something else."""
    found = table(row).get("orderTransactions")
    if isinstance(found, dict):
        edges = found.get("edges")
        found = [table(edge).get("node") for edge in edges] if isinstance(edges, list) else found.get("nodes")
    if found is not None and not isinstance(found, list):
        raise Unusable(f"order {order_id(row)[:60]} has transactions that are no list")
    return found or []


def parties_of(row: Any) -> set[str]:
    """Every address that an order moves value from or to; of one that cannot be read none."""
    try:
        nodes = [_node(each, Drift()) for each in _nodes(row)]
    except Unusable:
        return set()
    return {party for node in nodes for party in (node.sender, node.recipient) if party is not None}


def order_time(row: Any, drift: Drift) -> int | None:
    """Unix milliseconds of the first transaction of an order, else of the order itself. Raises Unusable."""
    times = [node.time_ms for node in (_node(each, Drift()) for each in _nodes(row)) if node.time_ms is not None]
    own = table(row).get("createdAt", table(row).get("created_at"))
    return min(times) if times else instant(own, drift)


def transfers_of(row: Any, wallet: str, ledger: Ledger, *, undated: bool, drift: Drift) -> tuple[TransferRow, ...]:
    """What the order moves to and from the wallet; empty while it is queued. Raises Unusable where it does not say whither.

    `undated`: a transfer without a time of its own settles only by a person's decision.
    """
    said = text(table(row).get("network"), Drift())
    if said and ledger.chain_id is None and said.lower() != ledger.network.lower():
        # one host and one address serve test and main networks: another ledger's order settles nothing here
        raise Unusable(f"order {order_id(row)[:60]} is of network {said[:40]}, not {ledger.network}")
    nodes = [_node(each, drift) for each in _nodes(row)]
    moving = [n for n in nodes if n.directed or n.doubtful or n.value is not None or n.tx_hash is not None]
    if not moving:
        return ()
    record, time_ms = order_id(row), order_time(row, Drift())
    found = []
    for kind in (MINT, BURN):
        side = [node for node in moving if _kind(node, wallet) == kind]
        if not side:
            continue
        units, said = _sum(side, ledger)
        found.append(
            TransferRow(
                id=transfer_id(KEYBAN, kind, record, wallet),
                kind=kind,
                record_id=record,
                wallet=wallet,
                token=next((node.token for node in side if node.token), None),
                amount=units,
                amount_text=said,
                time_ms=time_ms,
                undated=undated and time_ms is None,
                status=_status(nodes),
                network=text(table(row).get("network"), Drift()) or ledger.network,
                chain_id=ledger.chain_id,
                tx_hashes=_hashes(side, ledger),
                block_number=max((node.block for node in side if node.block is not None), default=None),
                doubtful=any(node.doubtful for node in nodes),
                transfers=() if ledger.chain_id is not None else _named(side),
            )
        )
    told = all((node.sender is not None or node.recipient is not None) and not node.doubtful for node in moving)
    if not found and not told:
        raise Unusable(f"order {record[:60]} does not say from whom or to whom")
    return tuple(found)


def _kind(node: _Node, wallet: str) -> str | None:
    gives, takes = same_wallet(node.sender, wallet), same_wallet(node.recipient, wallet)
    if gives is takes:
        return None  # somebody else's, or to itself
    return MINT if takes else BURN


def _status(nodes: Sequence[_Node]) -> str:
    """Inclusion is a block number; success is said apart (facts/keyban.md, consequence 1)."""
    if any(node.success is False for node in nodes):
        return "failed"
    if any(node.block is None for node in nodes):
        return "pending"
    return "succeeded" if all(node.success for node in nodes) else "included"


def _sum(side: Sequence[_Node], ledger: Ledger) -> tuple[int | None, str | None]:
    """(base units, as received) over the nodes of one direction; units None where they are not known for certain.

    A node that states `decimals` states its value in base units, as the indexer behind the API does; else the configured
    decimals scale it; without them a whole number is taken as it is.
    """
    values = [node.value for node in side if node.value is not None]
    if len(values) < len(side):
        return None, None
    said = plain_decimal(sum(values, Decimal(0)))
    if len({(node.token, node.decimals) for node in side}) > 1:
        return None, said  # of different tokens: not to be summed
    stated = side[0].decimals
    if stated is not None and ledger.decimals is not None and stated != ledger.decimals:
        return None, said  # the configuration and the record disagree about the unit
    scale = 0 if stated is not None or ledger.decimals is None else ledger.decimals
    each = [base_units(value, scale) for value in values]
    units = [value for value in each if value is not None]
    return (sum(units) if len(units) == len(each) else None), said


def _hashes(side: Sequence[_Node], ledger: Ledger) -> tuple[str, ...]:
    """Distinct transactions by height; on a chain that we follow as 0x and lower case."""
    ordered = sorted((node for node in side if node.tx_hash), key=lambda n: (n.block or 0, n.tx_hash or ""))
    found = (node.tx_hash for node in ordered if node.tx_hash)
    if ledger.chain_id is not None:
        found = (("0x" + match[1].lower()) if (match := _HASH.fullmatch(tx)) else tx for tx in found)
    return tuple(dict.fromkeys(found))


def _named(side: Sequence[_Node]) -> tuple[str, ...]:
    """The transfers that an order names, by which another order may name them too: by transaction, and by their own id; where they
    have none, by what they move."""
    return tuple(dict.fromkeys(f"{n.tx_hash}/{n.named or n.value}" for n in side if n.tx_hash is not None))


def questions_of(transfers: Sequence[TransferRow]) -> list[tuple[int, bytes]]:
    """(chain id, transaction hash) that the chain room should look at."""
    return [
        (transfer.chain_id, bytes.fromhex(match[1]))
        for transfer in transfers
        if transfer.chain_id is not None
        for tx in transfer.tx_hashes
        if (match := _HASH.fullmatch(tx))
    ]
