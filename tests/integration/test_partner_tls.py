"""A partner behind TLS that cannot be trusted: said clearly, and the key is not sent."""

from __future__ import annotations

import random
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from aiohttp import web

from indexer.partners.client import Client, Unavailable
from indexer.partners.credential import Clock, Credential
from indexer.partners.exchange import Http

KEY = "a-key-that-must-not-leak"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
async def test_a_certificate_that_is_not_valid_is_named_and_nothing_is_sent(tmp_path: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "-1", "-subj", "/CN=localhost", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
    )  # fmt: skip
    if not (
        tmp_path / "cert.pem"
    ).exists():  # newer openssl makes none that has expired already: an unknown issuer then
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost", "-keyout", "key.pem", "-out", "cert.pem"],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    served: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        served.append(request.headers.get("X-Api-Key", ""))
        return web.json_response({"data": []})

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        outcomes: list[str] = []

        async def skip(_: float) -> None:
            pass

        clock, rng = Clock(sleep=skip), random.Random(1)
        port = runner.addresses[0][1]
        async with Http(f"https://localhost:{port}", {"X-Api-Key": KEY}) as http:
            client = Client(
                "keyban account of bloom",
                http,
                Credential(1000, clock, rng),
                clock=clock,
                rng=rng,
                observe=lambda _endpoint, outcome, _seconds: outcomes.append(outcome),
                secrets=(KEY,),
            )
            with pytest.raises(Unavailable, match="TLS certificate is not valid") as told:
                await client.get("orders", "/v1/loyalty/orders")
        assert set(outcomes) == {"tls"} and KEY not in str(told.value) and served == []
        assert client.health.problem is not None and "certificate" in client.health.problem
    finally:
        await runner.cleanup()
