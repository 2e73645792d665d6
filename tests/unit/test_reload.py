"""What of a configuration that is read again takes effect at once, and what is refused, with its place and a reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from indexer.config import Config, contradictions
from indexer.daemon import _Works
from indexer.reload import adopt
from indexer.telemetry import Metrics

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


def test_partners_are_adopted_with_their_keys_and_restart_their_own_unit_alone() -> None:
    def partners(**given: Any) -> Config:
        keyban = {"api_key": "first-key", "network": "StellarTestnet", "poll": 5.0} | given
        return config(brands=[{"name": "bloom", "issuers": [FACTORY], "keyban": keyban}])

    def restarted(old: Config, new: Config) -> set[str]:
        """Units that a daemon would begin anew, as `Units.become` compares them."""
        adopted = adopt(old, new)
        assert not adopted.refused and adopted.config.brands == new.brands
        before, after = works.units(old), works.units(adopted.config)
        return {
            name
            for name in before | after
            if name not in before or name not in after or before[name].settings != after[name].settings
        }

    works = _Works(None, None, Metrics(), None, None, None)  # type: ignore[arg-type]  # made, not opened
    old = partners()
    assert restarted(old, partners()) == set()
    assert restarted(old, partners(api_key="second-key")) == {"partners"}
    assert restarted(old, partners(poll=1.0)) == {"partners"}
    assert restarted(old, partners(window=60.0)) == {"partners", "settle"}  # a rule of settling too
    # its transactions are looked up on a chain that is followed: that chain's unit has a loop more
    assert restarted(old, partners(network="chain2")) == {"partners", "chain:2"}
    assert restarted(old, config(brands=[{"name": "bloom", "issuers": [FACTORY]}])) == {"partners", "settle"}
    other = {
        "name": "bloom",
        "issuers": [FACTORY],
        "keyban": old.brands[0].keyban,
        "policies": [{"confidence": "included"}],
    }
    assert restarted(old, config(brands=[other])) == {"settle"}


def test_a_new_value_that_contradicts_a_kept_one_is_found() -> None:
    hook = {"name": "shop", "url": "https://shop.example", "secrets": ["A" * 32], "timeout_seconds": 20}
    brands = [{"name": "bloom", "webhooks": [hook]}]
    new = config(brands=brands, database={"url": OLD.database.url, "lease_seconds": 30})
    assert not contradictions(new)
    (problem,) = contradictions(adopt(OLD, new).config)
    assert problem.where == "brands[0].webhooks[0].timeout_seconds"
