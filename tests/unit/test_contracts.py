"""The committed artefacts of the sandbox's contracts: made from the committed sources, and declaring what is documented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from indexer.sandbox.actions import AdminAction, Issuance, Metadata, Redemption, Struct
from indexer.sandbox.contracts import NAMES, artefact
from tests.compile_contracts import CONTRACTS, WANTED, compile_contracts

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(300)
def test_artefacts_are_what_the_sources_compile_to() -> None:
    compiled = compile_contracts()
    committed = {path.name: path.read_text(encoding="utf-8") for path in CONTRACTS.glob("*.json")}
    assert committed.keys() == compiled.keys()
    stale = [name for name, text in compiled.items() if committed[name] != text]
    assert not stale, f"{stale} differ from their sources: run `python -m tests.compile_contracts`"


def test_every_artefact_can_be_loaded() -> None:
    assert NAMES == WANTED
    assert all(artefact(name).bytecode for name in NAMES)


@pytest.mark.parametrize("listing", ["loyfin_events.json", "loyfin_events_inferred.json"])
def test_events_have_the_listed_names_types_and_indexed_fields(listing: str) -> None:
    ours = {_shape(event): name for name in NAMES for event in artefact(name).events.values()}
    listed = json.loads((ROOT / "contracts_abi" / listing).read_text(encoding="utf-8"))
    # neither ERC-4906 event is emitted: the sandbox announces metadata by LoyaltyMetadataUpdated and URI
    optional = {"MetadataUpdate", "BatchMetadataUpdate"}
    missing = {event["name"] for event in listed if _shape(event) not in ours}
    assert missing <= optional


def _shape(event: dict[str, object]) -> str:
    # an ERC-1155 event's names of ids and values are no part of any rule
    inputs = event["inputs"]
    assert isinstance(inputs, list)
    standard = event["name"] in {"TransferSingle", "TransferBatch", "ApprovalForAll", "URI"}
    return json.dumps(
        [
            event["name"],
            [(None if standard else i["name"], i["type"], i["indexed"]) for i in inputs],
            event["anonymous"],
        ]
    )


@pytest.mark.parametrize(
    ("struct", "source"),
    [(Metadata, "Loyfin"), (Issuance, "Loyfin"), (Redemption, "Loyfin"), (AdminAction, "LoyaltyToken")],
)
def test_signed_structs_are_those_of_the_contracts(struct: type[Struct], source: str) -> None:
    encoded = ",".join(f"{kind} {name}" for name, kind in struct.TYPES.items())
    text = (CONTRACTS / f"{source}.sol").read_text(encoding="utf-8")
    # Solidity joins adjacent literals
    joined = "".join(line.strip() for line in text.splitlines()).replace('""', "")
    assert f"{struct.__name__}({encoded})" in joined


@pytest.mark.parametrize("folder", ["indexer/sandbox/chain_tools", "tests/chain-tools"])
def test_locked_packages_name_no_registry(folder: str) -> None:
    for name in ("package.json", "package-lock.json", ".npmrc"):
        text = (ROOT / folder / name).read_text(encoding="utf-8")
        assert 'resolved"' not in text and "registry=" not in text
    packages = json.loads((ROOT / folder / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    assert all(package["integrity"].startswith("sha512-") for path, package in packages.items() if path)
