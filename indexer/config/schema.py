"""The JSON schema of the configuration, and what it knows about a place: its type, its keys, the key that was meant."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from indexer.config.tree import Config

Place = tuple[str | int, ...]

_TABLES = {
    "Database": "database",
    "Http": "http",
    "Retention": "retention",
    "Chain": "[chains]",
    "Endpoint": "chains.rpc",
    "Factory": "chains.factories",
    "Brand": "[brands]",
    "Policy": "brands.policies",
    "Webhook": "[brands.webhooks]",
    "Loyfin": "brands.loyfin",
    "Keyban": "brands.keyban",
    "Qiibee": "brands.qiibee",
}


def json_schema() -> dict[str, Any]:
    """The JSON schema of `indexer.toml`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


class Schema:
    """The schema, asked about one place of the tree. Unknown places have no type, no keys and no description."""

    def __init__(self) -> None:
        self.root = json_schema()

    def types(self, place: Place) -> set[str]:
        kind = self.node(place).get("type", ())
        return {kind} if isinstance(kind, str) else set(kind)

    def node(self, place: Place) -> dict[str, Any]:
        """The schema at a place; empty where nothing is known."""
        node: dict[str, Any] = self.root
        for key in place:
            node = self._resolve(node)
            node = node.get("items", {}) if isinstance(key, int) else node.get("properties", {}).get(key, {})
        return self._resolve(node)

    def _resolve(self, node: dict[str, Any]) -> dict[str, Any]:
        described = {"description": node["description"]} if "description" in node else {}
        if "anyOf" in node:
            node = next(option for option in node["anyOf"] if option.get("type") != "null")
        if "$ref" in node:
            node = self.root["$defs"][node["$ref"].rpartition("/")[2]]
        return {**node, **described}

    def properties(self, place: Place) -> dict[str, Any]:
        properties: dict[str, Any] = self.node(place).get("properties", {})
        return properties

    def description(self, place: Place) -> str:
        description: str = self.node(place).get("description", "")
        return description

    def nearest(self, place: Place) -> str:
        key, known = str(place[-1]), sorted(self.properties(place[:-1]))
        near = get_close_matches(key, known, 1, 0.6)
        if near:
            return f"did you mean `{near[0]}`?"
        homes = sorted({home for home in self._homes(key)})
        if homes:
            return f"`{key}` belongs in {' or '.join(homes)}"
        return f"nearest is `{get_close_matches(key, known, 1, 0)[0]}`; known here: {', '.join(known)}"

    def _homes(self, key: str) -> Iterator[str]:
        for name, definition in self.root["$defs"].items():
            if key in definition.get("properties", {}):
                yield f"[{_TABLES[name]}]"
