"""The oracle's reading of a real chain against the product's: two decoders that share nothing, one Anvil, look-alikes and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from indexer.chain.decode import COLUMNS, Decoder, Speakers, parse_log
from indexer.chain.wire import RawLog
from indexer.sandbox import loyfin as drive
from indexer.sandbox.anvil import Anvil
from indexer.sandbox.loyfin import Loyfin
from indexer.sandbox.transactions import Party
from tests.oracle import Facts, judge_facts
from tests.truth import Contracts, read_truth

ABI = Path(__file__).resolve().parents[2] / "contracts_abi"
BRAND, ALICE, BOB = Party("bloom"), Party("alice"), Party("bob")


def as_facts(decoded: Any) -> Facts:
    facts: Facts = {}
    for table, attribute in [(t, t + "s") for t in COLUMNS]:
        for row in getattr(decoded, attribute):
            fields = dict(zip(COLUMNS[table], row, strict=True))
            if "args" in fields:
                fields["args"] = msgspec.json.decode(fields["args"])
            facts[(table, fields["block_hash"], fields["log_index"], fields.get("item", 0))] = fields
    return facts


@pytest.mark.parametrize("with_hub", [False, True])
async def test_two_readings_of_one_chain_agree(with_hub: bool) -> None:
    async with Anvil() as anvil:
        loyfin = await Loyfin.deploy(anvil, with_hub=with_hub)
        await loyfin.welcome(BRAND, ALICE, BOB)
        loyalty_id = drive.operation_hash("truth")
        for amount in (100, 7):
            issued = await loyfin.issue(BRAND, ALICE.address, amount, loyalty_id=loyalty_id, data=b"\x01\x02")
            assert (await loyfin.wait(issued.tx_hash)).succeeded
        redeemed = await loyfin.redeem(BRAND, ALICE.address, 30, loyalty_id=loyalty_id, operation_hash=loyalty_id)
        assert (await loyfin.wait(redeemed.tx_hash)).succeeded
        loyalty = await loyfin.loyalty(BRAND.address, loyalty_id)
        assert loyalty is not None
        for sent in (
            await loyfin.transfer(ALICE, BOB.address, 7, loyalty=loyalty, token_id=0),
            await loyfin.batch_transfer(ALICE, BOB.address, {0: 4}, loyalty=loyalty),
            await loyfin.act(BRAND, loyalty, "setRoyaltyBps", 250),
        ):
            assert (await loyfin.wait(sent)).succeeded

        deployed = loyfin.deployment
        hubs = {deployed.event_hub: frozenset([deployed.factory])} if deployed.event_hub else {}
        truth = await read_truth(anvil.url, Contracts(frozenset([deployed.factory]), hubs), ABI)
        raw = await anvil.rpc("eth_getLogs", {"fromBlock": "0x0", "toBlock": "latest"})
        logs = [parse_log(msgspec.convert(log, RawLog), 0) for log in raw]
        decoded = Decoder.from_abi().decode(logs, Speakers(84532, [deployed.factory], hubs))
        assert judge_facts(truth, as_facts(decoded)) == []
        assert {key[0] for key in truth} >= {"programme", "movement", "transfer", "programme_event"}
