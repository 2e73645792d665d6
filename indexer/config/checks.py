"""Whether the sections of a configuration agree with each other: names, issuers, endpoints, limits, reachable policies.

`disagreements` works on the unvalidated tree, so that it reports beside the mistakes in single values, not after them;
`warnings` needs a valid `Config` and names what is allowed and probably not meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from indexer.config.tree import Brand, Chain, Config, Keyban, Policy, Problem

_PARTNER_BASES = {"wallet_amount", "decision"}  # a partner's record carries no nonce and no hash of ours


def disagreements(tree: dict[str, Any]) -> list[Problem]:
    """What contradicts itself across tables; values that are wrong by themselves are passed over."""
    chains, brands = list(_tables(tree, "chains")), list(_tables(tree, "brands"))
    problems = [
        *_repeated(((f"{at}.name", chain.get("name")) for at, chain in chains), "another chain has this name"),
        *_repeated(
            ((f"{at}.chain_id", chain.get("chain_id")) for at, chain in chains), "another chain has this chain id"
        ),
        *_repeated(((f"{at}.name", brand.get("name")) for at, brand in brands), "another brand has this name"),
        *_repeated(
            ((f"{at}.issuers[{i}]", _lower(issuer)) for at, brand in brands for i, issuer in _items(brand, "issuers")),
            "an issuer belongs to one brand, and stands once there",
        ),
    ]
    for partner in ("keyban", "qiibee"):
        keys = [(f"{at}.{partner}.api_key", _plain(_table(brand, partner).get("api_key"))) for at, brand in brands]
        problems += _repeated(keys, "another brand uses this account: one record would settle a leg of each")
    for at, chain in chains:
        endpoints = [(f"{at}.{where}.url", endpoint.get("url")) for where, endpoint in _tables(chain, "rpc")]
        problems += _repeated(endpoints, "the same endpoint twice: it would witness for itself")
        factories = [(f"{at}.{where}.address", _lower(f.get("address"))) for where, f in _tables(chain, "factories")]
        problems += _repeated(factories, "the chain has this factory already")
        witnesses, rpc = chain.get("witnesses"), chain.get("rpc")
        if isinstance(rpc, list | tuple) and rpc and _number(witnesses) > len(rpc):
            problems.append(
                Problem(
                    f"{at}.witnesses",
                    f"{witnesses} witnesses are demanded of {len(rpc)} endpoint(s): nothing could ever be signalled",
                    "add endpoints to rpc, or lower it",
                )
            )
    database = tree.get("database")
    lease = database.get("lease_seconds", 15.0) if isinstance(database, dict) else 15.0
    for at, brand in brands:
        for where, policy in _tables(brand, "policies"):
            if policy.get("confidence") == "confirmed" and "seconds" not in policy:
                problems.append(
                    Problem(
                        f"{at}.{where}.seconds", 'missing: confidence "confirmed" needs it', "add seconds = 10, say"
                    )
                )
        webhooks = list(_tables(brand, "webhooks"))
        problems += _repeated(
            ((f"{at}.{where}.name", hook.get("name")) for where, hook in webhooks),
            "the brand has a webhook of this name",
        )
        for where, hook in webhooks:
            timeout = hook.get("timeout_seconds", 10.0)
            if _number(timeout) >= _number(lease):
                problems.append(
                    Problem(
                        f"{at}.{where}.timeout_seconds",
                        f"an attempt of {timeout} s is not shorter than a lease of {lease} s: two replicas could send",
                        "lower it, or raise database.lease_seconds",
                    )
                )
    return problems + list(_of_retention(tree))


def _of_retention(tree: dict[str, Any]) -> Iterator[Problem]:
    retention = tree.get("retention")
    if not isinstance(retention, dict):
        return
    signals, deliveries = retention.get("signals_days"), retention.get("deliveries_days", 90.0)
    if _number(signals) < _number(deliveries):
        yield Problem(
            "retention.signals_days",
            f"signals of {signals} days would go before their deliveries, which are kept for {deliveries}",
            "raise it, or lower retention.deliveries_days",
        )


def contradictions(config: Config) -> list[Problem]:
    """The same of a tree whose values are right one by one: such as one put together of two readings."""
    return disagreements(config.model_dump())


def warnings(config: Config) -> list[Problem]:
    """What is allowed and probably not meant."""
    found: list[Problem] = []
    if not config.chains and not config.brands:
        found.append(
            Problem(
                "",
                "no chains and no brands: there is nothing to follow and nobody to signal",
                "add [[chains]] and [[brands]]",
            )
        )
    for c, chain in enumerate(config.chains):
        found += _of_chain(f"chains[{c}]", chain)
    for b, brand in enumerate(config.brands):
        found += _of_brand(f"brands[{b}]", brand, config)
    return found


def _of_chain(at: str, chain: Chain) -> Iterator[Problem]:
    hosts = [endpoint.name for endpoint in chain.rpc]
    if len(set(hosts)) < len(hosts):
        yield Problem(
            f"{at}.rpc", "two endpoints on one host are one witness in truth", "take the second from another provider"
        )
    if chain.quorum == 1:
        yield Problem(
            f"{at}.rpc", "one witness: nothing contradicts that endpoint when it errs", "add a second provider"
        )
    for i, endpoint in enumerate(chain.rpc):
        if urlsplit(endpoint.url).scheme == "http" and not _is_local(endpoint.url):
            yield Problem(f"{at}.rpc[{i}].url", "plain http to another machine can be altered on the way", "use https")


def _of_brand(at: str, brand: Brand, config: Config) -> Iterator[Problem]:
    for name in ("loyfin", "keyban", "qiibee"):
        section = getattr(brand, name)
        if section is not None and urlsplit(section.url).scheme == "http" and not _is_local(section.url):
            yield Problem(
                f"{at}.{name}.url", "plain http to another machine shows the key and can be altered", "use https"
            )
    if brand.keyban is not None and _token_missing(brand.keyban, config):
        yield Problem(
            f"{at}.keyban.token",
            f'"{brand.keyban.network}" is a chain that is followed here, and without the contract of the points token none of'
            " its orders can settle",
            'add token = "0x…"; Keyban shows it in the application\'s loyalty settings',
        )
    for h, hook in enumerate(brand.webhooks):
        for network in hook.allow:
            if ip_network(network).prefixlen == 0:
                yield Problem(
                    f"{at}.webhooks[{h}].allow", f"{network} allows every address", "name the receiver's network"
                )
    for p, policy in enumerate(brand.policies):
        where = f"{at}.policies[{p}]"
        if policy.seconds is not None and policy.confidence != "confirmed":
            yield Problem(
                f"{where}.seconds",
                f'has no effect with confidence "{policy.confidence}"',
                'remove it, or use "confirmed"',
            )
        shadow = next((i for i, earlier in enumerate(brand.policies[:p]) if _covers(earlier, policy)), None)
        if shadow is not None:
            yield Problem(
                where,
                f"never used: policies[{shadow}] matches first whatever this one matches",
                "put the narrower one first",
            )
        elif why := _unreachable(policy, brand, config):
            yield Problem(where, f"no source can reach it: {why}", "change the policy, or configure the source")


def _covers(earlier: Policy, later: Policy) -> bool:
    narrower = all(getattr(earlier, key) in (None, getattr(later, key)) for key in ("kind", "issuer", "loyalty_id"))
    return narrower and (
        earlier.max_amount is None or (later.max_amount is not None and later.max_amount <= earlier.max_amount)
    )


def _unreachable(policy: Policy, brand: Brand, config: Config) -> str | None:
    """Why no evidence can satisfy the policy, or None. A policy without a kind is reachable when any source is."""
    if policy.issuer is not None and policy.issuer not in brand.issuers:
        return "its issuer is not one of the brand's"
    sources = [policy.kind.partition(".")[0]] if policy.kind else ["loyfin", "keyban", "qiibee"]
    if policy.kind is None and (policy.issuer is not None or policy.loyalty_id is not None):
        sources = ["loyfin"]
    reasons = [_source_lacks(source, policy, brand, config) for source in sources]
    return None if None in reasons else "; ".join(dict.fromkeys(reason for reason in reasons if reason))


def _source_lacks(source: str, policy: Policy, brand: Brand, config: Config) -> str | None:
    if source == "loyfin":
        if not any(chain.factories for chain in config.chains):
            return "no chain has a Loyfin factory"
        return None if brand.issuers else "the brand has no issuers"
    if policy.bases is not None and not _PARTNER_BASES & set(policy.bases):
        return f"{source}'s records are matched by wallet and amount, and bases leaves that out"
    if source == "qiibee":
        return None if brand.qiibee else "the brand has no [brands.qiibee]"
    keyban = brand.keyban
    if keyban is None:
        return "the brand has no [brands.keyban]"
    if _token_missing(keyban, config):
        return "Keyban's network is followed here, and [brands.keyban] names no token"
    if (
        policy.confidence == "included"
        or keyban.network.lower().startswith("stellar")
        or keyban.finalized_after is not None
    ):
        return None
    if followed_chain(keyban.network, config) is not None:
        return None
    return "Keyban's network is neither Stellar nor followed here, so orders stay included without finalized_after"


def _token_missing(keyban: Keyban, config: Config) -> bool:
    return keyban.token is None and followed_chain(keyban.network, config) is not None


#: Keyban's names of EVM networks, by chain id (facts of its SDK); a chain of ours may also be named directly.
KEYBAN_NETWORKS = {"basemainnet": 8453, "basesepolia": 84532, "polygonamoy": 80002}


def followed_chain(network: str, config: Config) -> Chain | None:
    """The configured chain that Keyban's `network` is, if it is one that we follow."""
    wanted = KEYBAN_NETWORKS.get(network.lower())
    return next((chain for chain in config.chains if chain.chain_id == wanted or chain.name == network), None)


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return not ip_address(host).is_global
    except ValueError:
        return host == "localhost" or "." not in host


def _repeated(values: Any, what: str) -> Iterator[Problem]:
    first: dict[object, str] = {}
    for where, value in values:
        if not isinstance(value, str | int):
            continue
        if value in first:
            yield Problem(where, what, f"first at {first[value]}; keep one")
        else:
            first[value] = where


def _tables(node: dict[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, item in _items(node, key):
        if isinstance(item, dict):
            yield f"{key}[{index}]", item


def _table(node: dict[str, Any], key: str) -> dict[str, Any]:
    value = node.get(key)
    return value if isinstance(value, dict) else {}


def _plain(value: object) -> object:
    """A secret's text: it is compared, and never told."""
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _items(node: dict[str, Any], key: str) -> Iterator[tuple[int, Any]]:
    value = node.get(key)
    if isinstance(value, list | tuple):
        yield from enumerate(value)


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _number(value: object) -> float:
    """A number as the tree takes it (also from a variable's text); NaN, which compares with nothing, for what is none."""
    try:
        return float("nan") if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return float("nan")
