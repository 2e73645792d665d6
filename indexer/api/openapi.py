"""The OpenAPI 3.1 document, made from the declared endpoints and their types, and served without a token at `/openapi.json`.

Nothing is written down twice: what stands here is what the routes were registered with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import groupby
from typing import Any

import msgspec
from aiohttp import web

from indexer.api.contract import Answer, Call, Endpoint, NoQuery
from indexer.api.problems import CONTENT_TYPE, Kind, ProblemBody

_REFERENCE = "#/components/schemas/{name}"
_PATH_PARAMETER = re.compile(r"\{(\w+)\}")
_HEADERS = {
    "X-Request-Id": "The request's own id, or one that was made: the log carries it.",
    "Location": "The path of the operation.",
    "Allow": "The methods that the resource knows.",
    "Retry-After": "Seconds after which to repeat the request.",
    "WWW-Authenticate": "How to authenticate.",
}


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The whole document as JSON values."""
    shapes = [
        answer.shape for endpoint in endpoints for answer in endpoint.answers.values() if answer.shape is not None
    ]
    shapes += [endpoint.body for endpoint in endpoints if endpoint.body is not None]
    queries = [endpoint.query for endpoint in endpoints]
    _, components = msgspec.json.schema_components([*shapes, *queries, ProblemBody], ref_template=_REFERENCE)
    parameters = {query: _query_parameters(components.pop(query.__name__)) for query in dict.fromkeys(queries)}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, parameters[endpoint.query])
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Loyalty settlement indexer",
            "version": version("loyalty-settlement-indexer"),
            "description": "Registers operations that loyalty ledgers settle, tells when they may be fulfilled, and takes that back.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(components.items())),
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "A token of `indexer tokens add`."}
            },
        },
    }


def endpoint(others: Sequence[Endpoint]) -> Endpoint:
    """The endpoint that serves the document, itself included."""
    body = b""

    async def serve(call: Call[NoQuery, None]) -> web.Response:
        return web.Response(body=body, content_type="application/json", headers={"Cache-Control": "max-age=300"})

    own = Endpoint(
        method="GET",
        path="/openapi.json",
        name="document",
        summary="This document",
        handler=serve,
        answers={200: Answer("OpenAPI 3.1.", dict[str, Any])},
    )
    body = msgspec.json.encode(document([*others, own]))
    return own


def _operation(endpoint: Endpoint, query: list[dict[str, Any]]) -> dict[str, Any]:
    entry: dict[str, Any] = {"operationId": endpoint.name, "summary": endpoint.summary}
    if endpoint.scope is not None:
        entry["description"] = f"Scope of the token: `{endpoint.scope}`."
        entry["security"] = [{"token": []}]
    path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "format": "uuid"}}
        for name in _PATH_PARAMETER.findall(endpoint.path)
    ]
    if path or query:
        entry["parameters"] = path + query
    if endpoint.body is not None:
        schema = {"$ref": _REFERENCE.format(name=endpoint.body.__name__)}
        media: dict[str, Any] = {"schema": schema}
        if endpoint.example is not None:
            media["example"] = endpoint.example
        entry["requestBody"] = {"required": not endpoint.body_optional, "content": {"application/json": media}}
    entry["responses"] = {str(status): _answer(answer) for status, answer in endpoint.answers.items()}
    for status, kinds in groupby(endpoint.kinds, key=lambda kind: kind.status):
        entry["responses"][str(status)] = _problem(list(kinds))
    return entry


def _answer(answer: Answer) -> dict[str, Any]:
    (schema,) = (
        msgspec.json.schema_components([answer.shape], ref_template=_REFERENCE)[0]
        if answer.shape
        else ({"type": "string"},)
    )
    entry: dict[str, Any] = {
        "description": answer.when,
        "headers": _headers(answer.headers),
        "content": {answer.content_type: {"schema": schema}},
    }
    if answer.links:
        entry["links"] = {
            name: {"operationId": name, "parameters": dict(parameters)} for name, parameters in answer.links.items()
        }
    return entry


def _problem(kinds: Sequence[Kind]) -> dict[str, Any]:
    types = {"properties": {"type": {"enum": [kind.type for kind in kinds]}, "status": {"const": kinds[0].status}}}
    return {
        "description": ". ".join(f"`{kind.slug}`: {kind.title}" for kind in kinds) + ".",
        "headers": _headers({header for kind in kinds for header in kind.headers}),
        "content": {CONTENT_TYPE: {"schema": {"allOf": [{"$ref": _REFERENCE.format(name="ProblemBody")}, types]}}},
    }


def _headers(names: Iterable[str]) -> dict[str, Any]:
    stated = {
        name: {"description": _HEADERS[name], "required": True, "schema": {"type": "string"}} for name in sorted(names)
    }
    return {
        "X-Request-Id": {"description": _HEADERS["X-Request-Id"], "required": True, "schema": {"type": "string"}}
    } | stated


def _query_parameters(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A struct's properties as parameters of the query; a list travels as one value, parted by commas."""
    found = []
    for name, property_schema in schema["properties"].items():
        shape = {key: value for key, value in property_schema.items() if key != "description"}
        entry: dict[str, Any] = {"name": name, "in": "query", "required": name in schema["required"]}
        if "description" in property_schema:
            entry["description"] = property_schema["description"]
        if shape.get("type") == "array":
            entry |= {"style": "form", "explode": False}
        found.append(entry | {"schema": shape})
    return found
