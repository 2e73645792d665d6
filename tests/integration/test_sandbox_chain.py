"""The sandbox's chain, for real: Anvil, the contracts, the driver. What Loyfin documents is what the sandbox must do."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from eth_abi.abi import decode
from eth_hash.auto import keccak

from indexer.model.types import ZERO_ADDRESS, Address, Hash32, hex0x
from indexer.sandbox import loyfin as drive
from indexer.sandbox.actions import Metadata, parse_request, request_body, sign
from indexer.sandbox.anvil import Anvil, AnvilFailed, NoAnvil, ensure_anvil
from indexer.sandbox.contracts import Event, artefact, decode_logs
from indexer.sandbox.loyfin import Loyfin
from indexer.sandbox.transactions import Party, Submitter

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTED = {event["name"]: event for event in json.loads((ROOT / "contracts_abi/loyfin_events.json").read_text())}
PUBLIC_STREAM = {
    "LoyaltyProgramCreated",
    "PointsIssued",
    "PointsRedeemed",
    "LoyaltyTransfer",
    "LoyaltyBatchTransfer",
    "LoyaltyMetadataUpdated",
    "LoyaltyAdminOperation",
}
FEE = 50_000
BRAND = Party("bloom")
ALICE, BOB, STRANGER = Party("alice"), Party("bob"), Party("stranger")


@pytest.fixture(scope="module")
async def anvil() -> AsyncIterator[Anvil]:
    async with Anvil() as node:
        yield node


@pytest.fixture(scope="module")
async def own_stream(anvil: Anvil) -> Loyfin:
    """A factory that emits the public stream itself."""
    return await _open(anvil, with_hub=False)


@pytest.fixture(scope="module")
async def hub_stream(anvil: Anvil) -> Loyfin:
    """A factory whose public stream comes from a hub."""
    return await _open(anvil, with_hub=True)


@pytest.fixture(params=["own_stream", "hub_stream"])
def loyfin(request: pytest.FixtureRequest, own_stream: Loyfin, hub_stream: Loyfin) -> Loyfin:
    return own_stream if request.param == "own_stream" else hub_stream


async def _open(anvil: Anvil, *, with_hub: bool) -> Loyfin:
    opened = await Loyfin.deploy(anvil, with_hub=with_hub, required_fee=FEE)
    await opened.welcome(BRAND, ALICE, BOB, STRANGER)
    return opened


async def _now(loyfin: Loyfin) -> int:
    return int((await loyfin.submitter.node.block())["timestamp"], 16)


async def _programme(loyfin: Loyfin, name: str) -> tuple[Hash32, Address]:
    """A programme in which Alice holds 1,000 points that never expire."""
    loyalty_id = drive.operation_hash(name)
    issued = await loyfin.issue(BRAND, ALICE.address, 1000, loyalty_id=loyalty_id)
    assert (await loyfin.wait(issued.tx_hash)).succeeded
    loyalty = await loyfin.loyalty(BRAND.address, loyalty_id)
    assert loyalty is not None
    return loyalty_id, loyalty


def _named(events: list[Event], name: str) -> Event:
    (found,) = [event for event in events if event.name == name]
    return found


async def test_every_documented_event_is_emitted_by_the_contract_that_speaks_for_it(loyfin: Loyfin) -> None:
    loyalty_id = drive.operation_hash("all events")
    metadata = Metadata(loyalty_id=loyalty_id, name="Bloom ☀", symbol="BLM", media="ipfs://m", token_uri="ipfs://t")
    bucket = await _now(loyfin) + 86_400
    terms: dict[str, Any] = {"loyalty_id": loyalty_id, "expires_at": bucket}
    hashes = []

    async def did(tx_hash: Hash32) -> None:
        assert (await loyfin.wait(tx_hash)).succeeded
        hashes.append(tx_hash)

    issued = await loyfin.issue(BRAND, ALICE.address, 100, metadata=metadata, data=b"\x01\x02", **terms)
    await did(issued.tx_hash)
    loyalty = await loyfin.loyalty(BRAND.address, loyalty_id)
    assert loyalty is not None
    redeemed = await loyfin.redeem(BRAND, ALICE.address, 30, operation_hash=drive.operation_hash("r-1"), **terms)
    await did(redeemed.tx_hash)
    await did((await loyfin.issue(BRAND, ALICE.address, 5, loyalty_id=loyalty_id)).tx_hash)
    await did(await loyfin.transfer(ALICE, BOB.address, 7, loyalty=loyalty, token_id=bucket))
    await did(await loyfin.batch_transfer(ALICE, BOB.address, {bucket: 3, 0: 4}, loyalty=loyalty))
    admin = await loyfin.administer(BRAND, loyalty, "SET_CONTRACT_URI", uri="ipfs://c")
    await did(admin.tx_hash)
    await did(await loyfin.act(BRAND, loyalty, "setRoyaltyBps", 250))
    refuser = await drive.deploy_look_alike(loyfin.submitter)
    await did(await loyfin.act(BRAND, loyalty, "setRoyaltyReceiver", refuser))
    await did(await loyfin.pay_royalty(STRANGER, loyalty, 1000))
    await did(await loyfin.act(STRANGER, loyalty, "withdrawRoyalties"))
    await did(await loyfin.act(BRAND, loyalty, "setTransferable", False))
    await did(await loyfin.act(BRAND, loyalty, "setRedeemable", False))
    await did(await loyfin.act(BRAND, loyalty, "setIssuable", False))
    await did(await loyfin.act(BRAND, loyalty, "transferOwnership", BOB.address))
    await did(await loyfin.act(BOB, loyalty, "renounceOwnership"))

    logs = [log for tx_hash in hashes for log in (await loyfin.wait(tx_hash)).logs]
    speaks_for_all = loyfin.deployment.event_hub or loyfin.factory
    seen = set()
    for log in logs:
        for name, fields in _decode_as_documented(log):
            seen.add(name)
            assert log["address"] == hex0x(speaks_for_all if name in PUBLIC_STREAM else loyalty)
            assert fields.get("loyalty", hex0x(loyalty)) == hex0x(loyalty)
            assert fields.get("factory", hex0x(loyfin.factory)) == hex0x(loyfin.factory)
    assert seen == set(DOCUMENTED)

    events = decode_logs(logs)
    created = _named(events, "LoyaltyProgramCreated")
    assert (created.fields["name"], created.fields["tokenURI"]) == ("Bloom ☀", "ipfs://t")
    assert created.fields["issuer"] == BRAND.address
    first = next(event for event in events if event.name == "PointsIssued")
    assert created.tx_hash == first.tx_hash and created.log_index < first.log_index
    assert first.fields["nonce"] == issued.action.nonce and first.fields["data"] == b"\x01\x02"
    assert (first.fields["to"], first.fields["tokenId"], first.fields["amount"]) == (ALICE.address, bucket, 100)
    burnt = _named(events, "PointsRedeemed").fields
    assert (burnt["from"], burnt["nonce"], burnt["amount"]) == (ALICE.address, redeemed.action.nonce, 30)
    assert burnt["operationHash"] == drive.operation_hash("r-1")
    assert _named(events, "LoyaltyBatchTransfer").fields["amounts"] == (3, 4)
    assert _named(events, "AdminOperationExecuted").fields["nonce"] == admin.action.nonce
    failed, paid = _named(events, "RoyaltyWithdrawalFailed"), _named(events, "RoyaltiesWithdrawn")
    assert failed.fields == {"receiver": refuser, "amount": 900}
    assert (paid.fields["issuerAmount"], paid.fields["protocolAmount"]) == (0, 100)
    assert [e.fields["adminEpoch"] for e in events if e.name == "AdminEpochUpdated"] == [1, 2]
    assert {"IssuableUpdated", "RedeemableUpdated", "TransferableUpdated", "TransferSingle"} <= {e.name for e in events}

    assert await loyfin.balance(loyalty, ALICE.address, bucket) == 100 - 30 - 7 - 3
    assert await loyfin.balance(loyalty, BOB.address) == 4
    assert await loyfin.read(loyalty, "owner") == ZERO_ADDRESS


def _decode_as_documented(log: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """By the documented ABI alone, not by the artefacts."""
    found = []
    for name, event in DOCUMENTED.items():
        signature = f"{name}({','.join(i['type'] for i in event['inputs'])})"
        if bytes.fromhex(log["topics"][0][2:]) != keccak(signature.encode()):
            continue
        words = [i for i in event["inputs"] if i["indexed"]]
        body = [i for i in event["inputs"] if not i["indexed"]]
        assert len(log["topics"]) == 1 + len(words)
        values = dict(
            zip(
                (i["name"] for i in body),
                decode([i["type"] for i in body], bytes.fromhex(log["data"][2:])),
                strict=True,
            )
        )
        for word, topic in zip(words, log["topics"][1:], strict=True):
            values[word["name"]] = decode([word["type"]], bytes.fromhex(topic[2:]))[0]
        found.append((name, values))
    return found


async def test_a_token_speaks_before_its_factory_announces_it(loyfin: Loyfin) -> None:
    issued = await loyfin.issue(BRAND, ALICE.address, 1, loyalty_id=drive.operation_hash("early token"))
    events = [e for e in await loyfin.events(issued.tx_hash) if e.emitter != loyfin.fee_token]
    assert [e.name for e in events][:2] == ["OwnershipTransferred", "LoyaltyProgramCreated"]
    assert events[0].emitter == _named(events, "LoyaltyProgramCreated").fields["loyalty"]


async def test_the_deadline_second_itself_is_still_valid(anvil: Anvil, loyfin: Loyfin) -> None:
    loyalty_id, _ = await _programme(loyfin, "deadlines")
    deadline = await _now(loyfin) + 1000
    in_time, late = (
        sign(loyfin.redemption(BRAND, ALICE.address, 1, loyalty_id=loyalty_id, deadline=deadline), BRAND)
        for _ in range(2)
    )
    await anvil.set_next_timestamp(deadline)
    assert (await loyfin.wait(await loyfin.submit(in_time))).succeeded
    await anvil.set_next_timestamp(deadline + 1)
    assert not (await loyfin.wait(await loyfin.submit(late))).succeeded
    assert (await loyfin.refusal(late) or "").startswith(f"DeadlinePassed({deadline}, ")


async def test_an_expired_bucket_is_neither_issued_redeemed_nor_transferred(anvil: Anvil, loyfin: Loyfin) -> None:
    loyalty_id, loyalty = await _programme(loyfin, "buckets")
    bucket = await _now(loyfin) + 1000
    terms: dict[str, Any] = {"loyalty_id": loyalty_id, "expires_at": bucket}
    assert (await loyfin.wait((await loyfin.issue(BRAND, ALICE.address, 50, **terms)).tx_hash)).succeeded
    await anvil.set_next_timestamp(bucket)
    await anvil.mine()
    for action in (
        loyfin.issuance(BRAND, ALICE.address, 1, **terms),
        loyfin.redemption(BRAND, ALICE.address, 1, **terms),
    ):
        signed = sign(action, BRAND)
        assert (await loyfin.refusal(signed) or "").startswith(f"BucketExpired({bucket}, ")
        assert not (await loyfin.wait(await loyfin.submit(signed))).succeeded
    batch = await loyfin.batch_transfer(ALICE, BOB.address, {0: 1, bucket: 1}, loyalty=loyalty)
    assert not (await loyfin.wait(batch)).succeeded
    assert await loyfin.balance(loyalty, ALICE.address) == 1000
    assert await loyfin.balance(loyalty, ALICE.address, bucket) == 50


async def test_a_nonce_is_used_once_per_issuer(loyfin: Loyfin) -> None:
    loyalty_id, _ = await _programme(loyfin, "nonces")
    done = await loyfin.redeem(BRAND, ALICE.address, 1, loyalty_id=loyalty_id)
    assert (await loyfin.wait(done.tx_hash)).succeeded
    assert not (await loyfin.wait(await loyfin.submit(done.signed))).succeeded
    assert (await loyfin.refusal(done.signed) or "").startswith("NonceUsed(")
    other_brand = Party("nectar")
    issuance = loyfin.issuance(other_brand, ALICE.address, 1, loyalty_id=loyalty_id, nonce=done.action.nonce)
    assert await loyfin.refusal(sign(issuance, other_brand)) is None


async def test_only_the_issuers_signature_of_exactly_this_action_counts(loyfin: Loyfin) -> None:
    loyalty_id, _ = await _programme(loyfin, "signatures")
    action = loyfin.redemption(BRAND, ALICE.address, 1, loyalty_id=loyalty_id)
    assert (await loyfin.refusal(sign(action, STRANGER)) or "").startswith("BadSignature(")
    right = sign(action, BRAND)
    assert await loyfin.refusal(right) is None
    changes: tuple[dict[str, Any], ...] = ({"amount": 2}, {"nonce": Hash32(bytes(32))}, {"data": b"x"})
    for wrong in changes:
        changed = loyfin.redemption(
            BRAND, ALICE.address, **{"amount": 1, "loyalty_id": loyalty_id, "nonce": action.nonce, **wrong}
        )
        forged = type(right)(changed, right.signature)
        assert (await loyfin.refusal(forged) or "").startswith("BadSignature(")
    elsewhere = loyfin.redemption(BRAND, ALICE.address, 1, loyalty_id=loyalty_id, chain_id=8453)
    assert (await loyfin.refusal(sign(elsewhere, BRAND)) or "").startswith("WrongTarget(")
    for refused in (sign(action, STRANGER), sign(elsewhere, BRAND)):
        assert not (await loyfin.wait(await loyfin.submit(refused))).succeeded


async def test_the_customer_pays_the_fee_or_nothing_happens(loyfin: Loyfin) -> None:
    loyalty_id, loyalty = await _programme(loyfin, "fees")
    relayer = Party("fee relayer")
    await loyfin.welcome(relayer)
    await loyfin.allow_fee(ALICE, FEE - 1)
    signed = sign(loyfin.redemption(BRAND, ALICE.address, 1, loyalty_id=loyalty_id), BRAND)
    assert (await loyfin.refusal(signed) or "").startswith("AllowanceTooLow(")
    assert not (await loyfin.wait(await loyfin.submit(signed, relayer=relayer))).succeeded
    assert await loyfin.balance(loyalty, ALICE.address) == 1000

    await loyfin.allow_fee(ALICE, 10 * FEE)
    parties = (ALICE, BRAND, relayer, drive.PROTOCOL)
    before = [await loyfin.fee_balance(party.address) for party in parties]
    assert (await loyfin.wait(await loyfin.submit(signed, relayer=relayer))).succeeded
    after = [await loyfin.fee_balance(party.address) for party in parties]
    assert [b - a for a, b in zip(before, after, strict=True)] == [-FEE, 10_000, 25_000, 15_000]


async def test_closed_capabilities_refuse_and_reopen_by_a_signed_admin_action(loyfin: Loyfin) -> None:
    loyalty_id, loyalty = await _programme(loyfin, "capabilities")
    signed = sign(loyfin.redemption(BRAND, ALICE.address, 1, loyalty_id=loyalty_id), BRAND)
    closing = await loyfin.administer(BRAND, loyalty, "SET_REDEEMABLE", flag=False)
    assert (await loyfin.wait(closing.tx_hash)).succeeded
    assert await loyfin.refusal(signed) == "NotRedeemable()"
    assert (await loyfin.refusal(closing.signed) or "").startswith("NonceUsed(")
    stale = await loyfin.administer(BRAND, loyalty, "SET_REDEEMABLE", flag=True, admin_epoch=7)
    assert not (await loyfin.wait(stale.tx_hash)).succeeded
    assert (await loyfin.refusal(stale.signed) or "").startswith("StaleEpoch(7, 0)")
    opening = await loyfin.administer(BRAND, loyalty, "SET_REDEEMABLE", flag=True)
    assert (await loyfin.wait(opening.tx_hash)).succeeded
    assert await loyfin.refusal(signed) is None
    closing_transfers = await loyfin.administer(BRAND, loyalty, "SET_TRANSFERABLE", flag=False)
    assert (await loyfin.wait(closing_transfers.tx_hash)).succeeded
    assert not (await loyfin.wait(await loyfin.transfer(ALICE, BOB.address, 1, loyalty=loyalty))).succeeded


async def test_a_request_body_of_the_api_carries_a_signed_action_unharmed(own_stream: Loyfin) -> None:
    issuance = own_stream.issuance(BRAND, ALICE.address, 2**255, loyalty_id=drive.operation_hash("json"), data=b"\0x")
    redemption = own_stream.redemption(BRAND, ALICE.address, 1, loyalty_id=drive.operation_hash("json"))
    for signed in (sign(issuance, BRAND), sign(redemption, BRAND)):
        body = json.loads(json.dumps(request_body(signed)))
        assert parse_request(body) == signed


async def test_two_factories_share_a_hub(anvil: Anvil, hub_stream: Loyfin) -> None:
    second = await Loyfin.deploy(anvil, event_hub=hub_stream.deployment.event_hub)
    await second.welcome(ALICE)
    issued = await second.issue(BRAND, ALICE.address, 1, loyalty_id=drive.operation_hash("shared"))
    event = _named(await second.events(issued.tx_hash), "PointsIssued")
    assert event.emitter == hub_stream.deployment.event_hub
    assert event.fields["factory"] == second.factory != hub_stream.factory


async def test_anyone_can_be_made_to_say_anything(own_stream: Loyfin) -> None:
    submitter = own_stream.submitter
    _, token = await _programme(own_stream, "rogue")
    look_alike = await drive.deploy_look_alike(submitter)
    fields: dict[str, Any] = {
        "factory": own_stream.factory,
        "issuer": STRANGER.address,
        "loyaltyId": b"\xff" * 32,
        "loyalty": BOB.address,
        "from": ALICE.address,
        "tokenId": 2**256 - 1,
        "amount": 2**256 - 1,
        "nonce": b"\xff" * 32,
        "operationHash": b"\xff" * 32,
        "data": bytes(100),
    }
    topics, data = artefact("Loyfin").log("PointsRedeemed", **fields)
    for speaker in (look_alike, token):
        (event,) = await own_stream.events(await drive.speak(submitter, speaker, topics, data))
        assert event.emitter == speaker
        assert event.fields == fields

    strings = {name: b"\xff\xfe" for name in ("name", "symbol", "media", "description", "contractURI", "tokenURI")}
    topics, data = artefact("Loyfin").log(
        "LoyaltyProgramCreated",
        factory=look_alike,
        issuer=STRANGER.address,
        loyaltyId=bytes(32),
        loyalty=token,
        **strings,
    )
    receipt = await own_stream.wait(await drive.speak(submitter, look_alike, topics, data))
    assert receipt.logs[0]["data"] == hex0x(data)


async def test_a_name_of_four_megabytes(own_stream: Loyfin) -> None:
    look_alike = await drive.deploy_look_alike(own_stream.submitter)
    said = await drive.speak_long_name(
        own_stream.submitter,
        look_alike,
        issuer=BRAND.address,
        loyalty_id=Hash32(bytes(32)),
        loyalty=BOB.address,
        size=4 << 20,
    )
    receipt = await own_stream.wait(said, timeout=60)
    assert receipt.succeeded
    created = _named(decode_logs(receipt.logs), "LoyaltyProgramCreated")
    assert created.fields["name"] == "A" * (4 << 20)
    assert created.fields["tokenURI"] == ""


async def test_a_burst_has_distinct_nonces(own_stream: Loyfin) -> None:
    submitter = own_stream.submitter
    factory = (await drive.deploy_burst_factory(submitter)).factory
    loyalty_id = drive.operation_hash("burst")
    made = await drive.create_program(submitter, factory, BRAND, Metadata(loyalty_id=loyalty_id))
    loyalty = _named(decode_logs(made.logs), "LoyaltyProgramCreated").fields["loyalty"]
    for issued, name, holder in ((True, "PointsIssued", "to"), (False, "PointsRedeemed", "from")):
        said = await drive.burst(
            submitter, factory, BRAND, loyalty_id=loyalty_id, count=500, first_nonce=7, issued=issued, holders=3
        )
        events = await own_stream.events(said)
        assert {e.name for e in events} == {name} and {e.emitter for e in events} == {factory}
        assert [int.from_bytes(e.fields["nonce"]) for e in events] == list(range(7, 507))
        assert {e.fields["loyalty"] for e in events} == {loyalty}
        assert len({e.fields[holder] for e in events}) == 3
        assert events[0].fields["operationHash"] == keccak(events[0].fields["nonce"])


async def test_concurrent_submissions_all_arrive_in_spite_of_a_reorganisation() -> None:
    async with Anvil(block_time=0.2) as node:
        loyfin = await Loyfin.deploy(node)
        await loyfin.welcome(ALICE)
        await node.mine(5)  # the reorganisation stays above the deployment
        loyalty_id = drive.operation_hash("concurrent")
        half: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def issue(n: int) -> Hash32:
            issued = await loyfin.issue(BRAND, ALICE.address, n + 1, loyalty_id=loyalty_id)
            if n == 30:
                half.set_result((await loyfin.wait(issued.tx_hash)).block_number)
            return issued.tx_hash

        async def reorganise() -> set[Hash32]:
            included = await half
            await node.reorg(await node.block_number() - included + 3)
            return await loyfin.submitter.restore_dropped()

        async with asyncio.TaskGroup() as group:
            reorganising = group.create_task(reorganise())
            issuing = [group.create_task(issue(n)) for n in range(60)]
        hashes = [task.result() for task in issuing]
        assert reorganising.result() & set(hashes)
        receipts = await asyncio.gather(*(loyfin.wait(tx_hash) for tx_hash in hashes))
        assert all(receipt.succeeded for receipt in receipts)
        loyalty = await loyfin.loyalty(BRAND.address, loyalty_id)
        assert loyalty is not None
        assert await loyfin.balance(loyalty, ALICE.address) == 60 * 61 // 2


async def test_reorganisations_do_not_set_the_chain_back_in_time() -> None:
    async with Anvil(block_time=1) as node:
        await node.mine(20)
        ahead = int((await node.block())["timestamp"], 16)
        for _ in range(3):
            await node.reorg(10)
        await node.mine()
        assert int((await node.block())["timestamp"], 16) >= ahead


async def test_what_is_given_up_leaves_its_nonce_to_others() -> None:
    async with Anvil() as node:
        submitter = Submitter(node, node.chain_id)
        await node.set_balance(ALICE.address, 10**18)
        lost = await submitter.send(ALICE, BOB.address, b"", value=1, gas=21_000)
        await submitter.wait(lost)
        await node.reorg(1)
        assert await submitter.abandon_dropped() == [lost]
        next_one = await submitter.send(ALICE, BOB.address, b"", value=2, gas=21_000)
        assert submitter.sent(next_one).nonce == 0
        assert (await submitter.wait(next_one)).succeeded


async def test_a_reorganisation_drops_a_transaction_which_comes_back_under_the_same_hash() -> None:
    async with Anvil(slots_in_an_epoch=1) as node:
        loyfin = await Loyfin.deploy(node)
        await loyfin.welcome(ALICE)
        loyalty_id, loyalty = await _programme(loyfin, "reorganised")
        redeemed = await loyfin.redeem(BRAND, ALICE.address, 10, loyalty_id=loyalty_id)
        first = await loyfin.wait(redeemed.tx_hash)
        await node.mine(2)
        head = await node.block_number()

        await node.reorg(3)
        assert await node.block_number() == head
        assert (await node.block(first.block_number))["hash"] != hex0x(first.block_hash)
        assert await loyfin.submitter.receipt(redeemed.tx_hash) is None
        assert await loyfin.balance(loyalty, ALICE.address) == 1000

        assert await loyfin.submitter.resend_dropped() == [redeemed.tx_hash]
        again = await loyfin.wait(redeemed.tx_hash)
        assert again.succeeded and again.block_hash != first.block_hash
        assert await loyfin.balance(loyalty, ALICE.address) == 990

        # the same signed transaction put into the replacing branch, one block later than it was
        await node.mine(2)
        raw = loyfin.submitter.sent(redeemed.tx_hash).raw
        await node.reorg(3, [(raw, 1)])
        moved = await loyfin.wait(redeemed.tx_hash)
        assert moved.succeeded and moved.block_number == again.block_number + 1

        # a prepared transaction that replaces another one of the same relayer
        last = await loyfin.redeem(BRAND, ALICE.address, 1, loyalty_id=loyalty_id)
        await loyfin.wait(last.tx_hash)
        rival = sign(loyfin.redemption(BRAND, ALICE.address, 2, loyalty_id=loyalty_id), BRAND)
        nonce = loyfin.submitter.sent(last.tx_hash).nonce
        prepared = await loyfin.prepare(rival, nonce=nonce)
        await node.reorg(1, [(prepared.raw, 0)])
        assert (await loyfin.wait(prepared.hash)).succeeded
        assert await loyfin.submitter.receipt(last.tx_hash) is None
        assert await loyfin.balance(loyalty, ALICE.address) == 988


async def test_a_longer_branch_grows_from_a_snapshot() -> None:
    async with Anvil() as node:
        await node.mine(3)
        snapshot = await node.snapshot()
        await node.mine(2)
        old = (await node.block(5))["hash"]
        await node.revert(snapshot)
        assert await node.block_number() == 3
        await node.mine(4, seconds_apart=7)
        assert await node.block_number() == 7
        assert (await node.block(5))["hash"] != old


async def test_safe_and_finalized_trail_the_head() -> None:
    async with Anvil(slots_in_an_epoch=3) as node:
        await node.mine(20)
        numbers = [int((await node.block(tag))["number"], 16) for tag in ("latest", "safe", "finalized")]
        assert numbers == [20, 17, 14]


async def test_mining_waits_for_demand() -> None:
    async with Anvil() as node:
        await node.set_automine(False)
        submitter = Submitter(node, node.chain_id)
        await node.set_balance(ALICE.address, 10**18)
        sent = await submitter.send(ALICE, BOB.address, b"", value=1, gas=21_000)
        assert await submitter.receipt(sent) is None
        await node.mine()
        assert (await submitter.wait(sent)).succeeded


async def test_anvil_that_cannot_start_says_why(anvil: Anvil) -> None:
    taken = int(anvil.url.rpartition(":")[2])
    with pytest.raises(AnvilFailed, match=r"(?i)address already in use"):
        async with Anvil(port=taken):
            pass


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="the locked package is for this one"
)
async def test_anvil_is_installed_without_node_on_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANVIL_BIN", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    cache = tmp_path / "cache"
    installed = await asyncio.gather(*(asyncio.to_thread(ensure_anvil, cache) for _ in range(2)))
    assert installed[0] == installed[1] and installed[0].is_relative_to(cache)
    async with Anvil(chain_id=8453, binary=installed[0]) as node:
        assert int(await node.rpc("eth_chainId"), 16) == 8453


def test_an_unusable_anvil_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "anvil"
    old.write_text("#!/bin/sh\necho 'anvil Version: 1.6.9-stable'\n")
    old.chmod(0o755)
    monkeypatch.setenv("ANVIL_BIN", str(old))
    with pytest.raises(NoAnvil, match=r"is Anvil 1\.6\.9; Anvil 1\.7\.0 or newer is needed"):
        ensure_anvil()
    monkeypatch.setenv("ANVIL_BIN", str(tmp_path / "nothing"))
    with pytest.raises(NoAnvil, match="nothing is not an Anvil that starts"):
        ensure_anvil()


@pytest.mark.skipif(sys.platform != "linux", reason="relies on prctl")
async def test_anvil_dies_with_its_parent() -> None:
    script = (
        "import asyncio\n"
        "from indexer.sandbox.anvil import Anvil\n"
        "async def main():\n"
        "    async with Anvil() as node:\n"
        "        print(node.pid, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = int(await asyncio.to_thread(parent.stdout.readline))
        assert _alive(child)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    async with asyncio.timeout(60):
        while _alive(child):
            await asyncio.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # the state follows the name, which may hold anything
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False
