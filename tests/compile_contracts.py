"""Compiles the sandbox's Solidity into the committed artefacts: `python -m tests.compile_contracts`.

The compiler is the soljson.js of the npm package `solc`, run in V8 from a wheel, so neither Node nor a native solc is needed to run it.
The bytes depend on sources, compiler version and the settings below alone. Not needed at run time.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from py_mini_racer import MiniRacer

from indexer.sandbox.node_packages import install

TESTS = Path(__file__).resolve().parent
CONTRACTS = TESTS.parent / "indexer" / "sandbox" / "contracts"
WANTED = ("Loyfin", "BurstFactory", "LoyfinHub", "LoyaltyToken", "LookAlike", "TestUSD")
SETTINGS: dict[str, Any] = {
    "optimizer": {"enabled": True, "runs": 200},
    "viaIR": False,
    "evmVersion": "cancun",
    # neither hash nor CBOR tail: comments and paths do not reach the bytecode
    "metadata": {"bytecodeHash": "none", "appendCBOR": False},
}
_OUTPUT = {"*": {"*": ["abi", "evm.bytecode.object", "evm.deployedBytecode.object"]}}
CODE_SIZE_LIMIT = 24_576  # EIP-170


class DoesNotCompile(Exception):
    pass


def compile_contracts() -> dict[str, str]:
    """The text of each artefact by file name. Raises DoesNotCompile."""
    sources = {path.name: {"content": path.read_text(encoding="utf-8")} for path in sorted(CONTRACTS.glob("*.sol"))}
    request = {"language": "Solidity", "sources": sources, "settings": {**SETTINGS, "outputSelection": _OUTPUT}}
    version, answer = _solc(json.dumps(request))
    if problems := [e["formattedMessage"] for e in answer.get("errors", []) if e["severity"] != "info"]:
        raise DoesNotCompile("\n".join(problems))
    contracts = {name: found for file in answer["contracts"].values() for name, found in file.items()}
    artefacts = {}
    for name in WANTED:
        code = contracts[name]["evm"]
        if (size := len(code["deployedBytecode"]["object"]) // 2) > CODE_SIZE_LIMIT:
            raise DoesNotCompile(f"{name} has {size} bytes of code, more than the {CODE_SIZE_LIMIT} of EIP-170")
        artefact = {
            "contractName": name,
            "compiler": {"version": version, "settings": SETTINGS},
            "abi": contracts[name]["abi"],
            "bytecode": "0x" + code["bytecode"]["object"],
        }
        artefacts[f"{name}.json"] = json.dumps(artefact, indent=1) + "\n"
    return artefacts


def _solc(request: str) -> tuple[str, dict[str, Any]]:
    soljson = install(TESTS / "chain-tools") / "solc" / "soljson.js"
    with MiniRacer() as v8:
        # soljson prints a notice about SMT solvers to the console
        v8.eval("var self = globalThis; var console = {log() {}, warn() {}, error() {}}; var Module = {};")
        v8.eval(soljson.read_text(encoding="utf-8"))
        deadline = time.monotonic() + 30
        while not v8.eval("!!Module.calledRun"):  # WebAssembly starts asynchronously
            if time.monotonic() > deadline:
                raise DoesNotCompile("the compiler did not start within 30 s")
            time.sleep(0.02)
        v8.eval("var REQUEST = " + json.dumps(request))
        version = str(v8.eval("Module.cwrap('solidity_version', 'string', [])()"))
        call = "Module.cwrap('solidity_compile', 'string', ['string', 'number', 'number'])(REQUEST, 0, 0)"
        return version, json.loads(str(v8.eval(call)))


def main() -> int:
    try:
        artefacts = compile_contracts()
    except DoesNotCompile as error:
        print(error, file=sys.stderr)
        return 1
    for name, text in artefacts.items():
        path = CONTRACTS / name
        changed = not path.exists() or path.read_text(encoding="utf-8") != text
        path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {'written' if changed else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
