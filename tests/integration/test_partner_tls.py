"""A partner behind TLS that cannot be trusted: said clearly, and the key is not sent."""

from __future__ import annotations

import random
import shutil
import ssl
import subprocess
from pathlib import Path

import aiohttp.connector
import pytest
from aiohttp import web

from indexer.partners.client import Client, Unavailable
from indexer.partners.credential import Clock, Credential
from indexer.partners.exchange import Http

KEY = "a-key-that-must-not-leak"


def _expired(folder: Path) -> None:
    """`cert.pem`: a month of 2020, by an authority of its own, `ca.pem`."""

    def run(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    (folder / "ca.cnf").write_text(
        "[ca]\ndefault_ca = own\n[own]\ndatabase = index.txt\nserial = serial\nnew_certs_dir = .\ndefault_md = sha256\npolicy = any\n"
        "x509_extensions = names\n[any]\ncommonName = supplied\n[names]\nsubjectAltName = DNS:localhost\n"
    )
    (folder / "index.txt").write_text("")
    (folder / "serial").write_text("01\n")
    new = ("req", "-newkey", "rsa:2048", "-nodes", "-subj")
    run(*new, "/CN=an authority", "-x509", "-days", "30", "-keyout", "ca.key", "-out", "ca.pem")
    run(*new, "/CN=localhost", "-keyout", "key.pem", "-out", "asked.pem")
    run(
        "ca", "-config", "ca.cnf", "-batch", "-notext", "-cert", "ca.pem", "-keyfile", "ca.key", "-in", "asked.pem",
        "-startdate", "20200101000000Z", "-enddate", "20200201000000Z", "-out", "cert.pem",
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
async def test_a_certificate_that_has_expired_is_named_and_nothing_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _expired(tmp_path)
    trusting = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", trusting)  # as if the authority were a public one
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
            with pytest.raises(Unavailable, match="its TLS certificate is not valid: certificate has expired") as told:
                await client.get("orders", "/v1/loyalty/orders")
        assert set(outcomes) == {"tls"} and KEY not in str(told.value) and served == []
        assert client.health.problem is not None and "certificate" in client.health.problem
    finally:
        await runner.cleanup()
