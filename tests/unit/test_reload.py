"""What of a configuration that is read again takes effect at once, and what is refused, with its place and a reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from indexer.config import Config, contradictions
from indexer.reload import adopt

FACTORY, OTHER = ("0x" + byte * 20 for byte in ("11", "22"))


def chain(chain_id: int = 1, **given: Any) -> dict[str, Any]:
    return {
        "name": f"chain{chain_id}",
        "chain_id": chain_id,
        "rpc": [{"url": "https://one.example"}],
        "factories": [{"address": FACTORY, "start_block": 1}],
    } | given


def config(**given: Any) -> Config:
    tree: dict[str, Any] = {
        "state_dir": "/srv/indexer",
        "database": {"url": "postgresql://indexer@localhost/indexer"},
        "chains": [chain(1), chain(2)],
    }
    return Config.model_validate(tree | given)


OLD = config()


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"state_dir": "/srv/elsewhere"}, ["state_dir"]),
        ({"http": {"listen": "127.0.0.1:9"}}, ["http.listen"]),
        (
            {"database": {"url": "postgresql://elsewhere/indexer", "lease_seconds": 5}},
            ["database.url", "database.lease_seconds"],
        ),
        ({"chains": [chain(1)]}, ["chains"]),
        ({"chains": [chain(1), chain(2), chain(3)]}, ["chains[2]"]),
        ({"chains": [chain(2), chain(1, name="mainnet")]}, ["chains[1].name"]),
        ({"chains": [chain(1, factories=[{"address": OTHER, "start_block": 1}]), chain(2)]}, ["chains[0].factories"]),
        ({"chains": [chain(1), chain(2, inferred_events=False)]}, ["chains[1].inferred_events"]),
    ],
)
def test_what_is_fixed_is_refused_and_stays(given: Mapping[str, Any], where: list[str]) -> None:
    adopted = adopt(OLD, config(**given))
    assert [problem.where for problem in adopted.refused] == where
    assert all(problem.what and problem.hint for problem in adopted.refused)
    assert "elsewhere" not in "".join(map(str, adopted.refused))  # a URL may hold a password
    assert adopted.config == OLD


def test_the_rest_is_adopted_whatever_stands_beside_it() -> None:
    new = config(
        state_dir="/srv/elsewhere",
        chains=[
            chain(3),
            chain(
                2, rpc=[{"url": "https://two.example"}], witnesses=1, explorer="https://scan.example", name="renamed"
            ),
        ],
        brands=[{"name": "bloom", "policies": [{"confidence": "included"}]}],
        retention={"orphans_days": 7},
    )
    adopted = adopt(OLD, new)
    assert [problem.where for problem in adopted.refused] == ["state_dir", "chains", "chains[1].name", "chains[0]"]
    first, second = adopted.config.chains
    assert first == OLD.chains[0]
    assert (second.name, second.rpc[0].url, second.explorer) == (
        "chain2",
        "https://two.example",
        "https://scan.example",
    )
    assert adopted.config.brands == new.brands and adopted.config.retention == new.retention
    assert adopt(adopted.config, new).config == adopted.config  # once more changes nothing


def test_a_new_value_that_contradicts_a_kept_one_is_found() -> None:
    hook = {"name": "shop", "url": "https://shop.example", "secrets": ["A" * 32], "timeout_seconds": 20}
    brands = [{"name": "bloom", "webhooks": [hook]}]
    new = config(brands=brands, database={"url": OLD.database.url, "lease_seconds": 30})
    assert not contradictions(new)
    (problem,) = contradictions(adopt(OLD, new).config)
    assert problem.where == "brands[0].webhooks[0].timeout_seconds"
