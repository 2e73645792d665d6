"""The indexer's HTTP interface, as a shop's back office would call it.

Every call can be repeated, as the contract says, so that a broken connection or a 503 costs time and nothing else. Nothing
here remembers anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

PATIENCE_SECONDS = 60.0  # for an answer, over all attempts


class Answered(RuntimeError):
    """The indexer refused: its problem document, with its status."""

    def __init__(self, what: str, status: int, problem: dict[str, Any]) -> None:
        super().__init__(f"{what}: {status} {problem.get('detail') or problem}")
        self.status, self.problem = status, problem


class Client:
    """An async context manager; `token` as `indexer tokens add` printed it."""

    def __init__(self, url: str, token: str) -> None:
        self._url, self._headers = url, {"Authorization": f"Bearer {token}"}
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(headers=self._headers, timeout=aiohttp.ClientTimeout(total=20))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._http is not None:
            await self._http.close()

    async def register(self, operation: dict[str, Any]) -> dict[str, Any]:
        return await self._call("POST", "/v1/operations", operation)

    async def operation(self, operation_id: str) -> dict[str, Any]:
        return await self._call("GET", f"/v1/operations/{operation_id}")

    async def operations(self) -> AsyncIterator[dict[str, Any]]:
        """All of them, page by page."""
        cursor: str | None = None
        while True:
            page = await self._call("GET", "/v1/operations?limit=100" + (f"&cursor={cursor}" if cursor else ""))
            for operation in page["data"]:
                yield operation
            cursor = page["nextCursor"]
            if cursor is None:
                return

    async def cancel(self, operation_id: str) -> dict[str, Any]:
        return await self._call("POST", f"/v1/operations/{operation_id}/cancel", {})

    async def fulfil(self, operation_id: str, generation: int, receipt: dict[str, Any]) -> dict[str, Any]:
        return await self._call(
            "POST", f"/v1/operations/{operation_id}/fulfil", {"generation": generation, "receipt": receipt}
        )

    async def resolve(self, operation_id: str, evidence_id: str, accept: bool, reason: str) -> dict[str, Any]:
        decision = {"evidenceId": evidence_id, "accept": accept, "reason": reason}
        return await self._call("POST", f"/v1/operations/{operation_id}/resolve", decision)

    async def status(self) -> dict[str, Any]:
        return await self._call("GET", "/v1/status")

    async def metric(self, name: str, **labels: str) -> float | None:
        """One value of `/metrics`; None while it isn't told."""
        assert self._http is not None
        async with self._http.get(f"{self._url}/metrics") as response:
            text = await response.text()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return None

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer's JSON. Raises Answered, TimeoutError."""
        assert self._http is not None
        pause = 0.1
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                try:
                    async with self._http.request(method, self._url + path, json=body) as response:
                        if response.status != 503:
                            answer: dict[str, Any] = await response.json(content_type=None)
                            if response.status >= 400:
                                raise Answered(f"{method} {path}", response.status, answer)
                            return answer
                except aiohttp.ClientConnectionError:
                    pass  # sent again, as the contract allows
                await asyncio.sleep(pause)
                pause = min(pause * 2, 2.0)
