"""The configuration: `indexer.toml` and INDEXER_* become one frozen, validated tree (`load`), or a list of problems.

A leaf: it knows the words of `model.types` and nothing else of the product. What a setting does is left to the room that
reads it.
"""

from __future__ import annotations

from indexer.config.checks import contradictions, followed_chain
from indexer.config.load import load
from indexer.config.schema import json_schema
from indexer.config.tree import (
    Brand,
    Chain,
    Config,
    ConfigProblems,
    Database,
    Endpoint,
    Factory,
    Http,
    Keyban,
    Loyfin,
    Policy,
    Problem,
    Qiibee,
    Retention,
    Webhook,
)
from indexer.config.values import SIGNAL_TYPES

__all__ = [
    "SIGNAL_TYPES",
    "Brand",
    "Chain",
    "Config",
    "ConfigProblems",
    "Database",
    "Endpoint",
    "Factory",
    "Http",
    "Keyban",
    "Loyfin",
    "Policy",
    "Problem",
    "Qiibee",
    "Retention",
    "Webhook",
    "contradictions",
    "followed_chain",
    "json_schema",
    "load",
]
