"""One attempt at one webhook: the signed request, what the answer means, and when to try again.

Follows Standard Webhooks (https://www.standardwebhooks.com): the id stays the same over all attempts, the timestamp is
the attempt's, and the signature covers exactly the bytes sent. Which attempt may be made when is `webhooks.py`'s business.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from uuid import UUID, uuid4

import aiohttp
import msgspec
from standardwebhooks import Webhook as Signer

from indexer.signals.targets import Guard, Lookup, Network, TargetRefused, check_url, open_session
from indexer.store.deliveries import Attempt, Outcome

# Seconds from one attempt to the next: thirteen attempts over a little more than three days.
SCHEDULE: tuple[float, ...] = (5, 30, 120, 600, 1800, 3600, 7200, 18000, 36000, 50400, 72000, 86400)
JITTER = 0.2  # of the pause, either way: receivers that fell together should not be met by everything together
LONGEST_RETRY_AFTER = 86400.0  # seconds; a receiver may slow us down, not silence us

DRAIN_BYTES = 65536  # of an answer's body, read so that the connection can serve the next attempt
DRAIN_SECONDS = 0.5
ANSWER_BYTES = 512  # of it, kept with the attempt


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A webhook as configured. `secrets` are whsec_… strings, the first signs alone until there are several."""

    brand: str
    name: str
    url: str = field(repr=False)  # its path may be a secret
    secrets: tuple[str, ...] = field(repr=False)
    events: tuple[str, ...] = ("operation.*",)
    allow: tuple[Network, ...] = ()
    timeout: float = 10.0
    pause_after: float = 259_200.0  # seconds of nothing but failures


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back after so many `seconds`: a status and the first bytes of the body, or the reason why there is none."""

    status: int | None
    error: str | None = None
    retry_after: str | None = None
    answer: bytes = b""
    seconds: float = 0.0

    @property
    def taken(self) -> bool:
        """2xx, whatever the body says; nothing else."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def reason(self) -> str | None:
        """Why it was not taken; None when it was."""
        return None if self.taken else self.error or _meaning(self.status)


def judge(attempt: Attempt, reply: Reply, *, schedule: Sequence[float], rng: random.Random, now: datetime) -> Outcome:
    """What a reply means for the delivery. Before a schedule is exhausted, nothing but 410 is an end."""
    status, error = reply.status, reply.reason
    outcome = partial(
        Outcome, attempt, status=status, error=error, seconds=reply.seconds, answer=printable(reply.answer) or None
    )
    if reply.taken:
        return outcome(state="delivered")
    if status == 410:
        return outcome(state="pending", gone=True)
    if attempt.number > len(schedule):
        return outcome(state="dead")
    pause = schedule[attempt.number - 1] * rng.uniform(1 - JITTER, 1 + JITTER)
    if status in (429, 503):
        pause = max(pause, retry_after(reply.retry_after, now))
    return outcome(state="pending", retry_in=pause)


def printable(answer: bytes) -> str:
    """A body's first bytes as text that neither a terminal nor the database trips over: what is no plain character is
    escaped, so an answer can paint nothing, and hide nothing.
    """
    text = answer[:ANSWER_BYTES].decode("utf-8", "backslashreplace")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _meaning(status: int | None) -> str:
    if status == 410:
        return "the endpoint answered 410 Gone"
    if status is not None and 300 <= status < 400:
        return f"HTTP {status}: redirects are not followed"
    return f"HTTP {status}"


def retry_after(value: str | None, now: datetime) -> float:
    """Seconds that a Retry-After asks for, in either form (RFC 9110, 10.2.3); 0 for none or nonsense, and capped."""
    if value is None:
        return 0.0
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:12]), LONGEST_RETRY_AFTER)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return min(max(0.0, (moment - now).total_seconds()), LONGEST_RETRY_AFTER)


class Sender:
    """Makes requests to one endpoint, over connections that the endpoint's guard has passed."""

    def __init__(self, endpoint: Endpoint, lookup: Lookup, clock: Callable[[], float], *, connections: int) -> None:
        self.endpoint = endpoint
        self._lookup, self._clock, self._connections = lookup, clock, connections
        self._signers = [Signer(secret) for secret in endpoint.secrets]
        self._session: aiohttp.ClientSession | None = None

    def headers(self, signal_id: UUID, body: str) -> dict[str, str]:
        """The three headers of an attempt made now; one signature per secret, so that a receiver may hold either."""
        stamp = int(self._clock())
        moment = datetime.fromtimestamp(stamp, UTC)
        return {
            "webhook-id": str(signal_id),
            "webhook-timestamp": str(stamp),
            "webhook-signature": " ".join(signer.sign(str(signal_id), moment, body) for signer in self._signers),
        }

    async def post(self, signal_id: UUID, body: str, *, deadline: float) -> Reply:
        """One request, over by `deadline` (the loop's time) whatever the receiver does. Never raises for its sake."""
        started = asyncio.get_running_loop().time()
        reply = await self._exchange(signal_id, body, deadline)
        return replace(reply, seconds=asyncio.get_running_loop().time() - started)

    async def _exchange(self, signal_id: UUID, body: str, deadline: float) -> Reply:
        reply: Reply | None = None
        try:
            async with asyncio.timeout_at(deadline):
                url = check_url(self.endpoint.url, self.endpoint.allow)
                if self._session is None:
                    guard = Guard(self.endpoint.allow, plain_http=url.scheme == "http")
                    self._session = open_session(guard, self._lookup, connections=self._connections)
                async with self._session.post(
                    url, data=body.encode(), headers=self.headers(signal_id, body), allow_redirects=False
                ) as response:
                    reply = Reply(response.status, retry_after=response.headers.get("Retry-After"))
                    reply = replace(reply, answer=await _drain(response))
        except TimeoutError:
            return reply or Reply(None, f"no answer within {self.endpoint.timeout:g} s")
        except (aiohttp.ClientError, TargetRefused, OSError, ValueError) as error:
            return reply or Reply(None, _reason(error))
        return reply

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


async def _drain(response: aiohttp.ClientResponse) -> bytes:
    """Reads the rest of a short body, and returns its beginning; a long or slow one costs its connection, and the status
    stands.
    """
    size, beginning = 0, b""
    with suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(DRAIN_SECONDS):
            async for chunk in response.content.iter_any():
                size += len(chunk)
                beginning += chunk[: ANSWER_BYTES - len(beginning)]
                if size > DRAIN_BYTES:
                    break
    return beginning


def _reason(error: Exception) -> str:
    """Why there was no answer, in words that repeat neither path nor query of the URL."""
    match error:
        case TargetRefused():
            return f"refused to connect to {error}"
        case aiohttp.ClientConnectorCertificateError():
            return f"the certificate is not valid: {error.certificate_error}"[:300]
        case aiohttp.ClientConnectorSSLError():
            return "the TLS handshake failed"
        case aiohttp.ClientConnectorDNSError():
            return f"the name {error.host} could not be resolved"
        case aiohttp.ClientConnectorError():
            return f"cannot connect to {error.host}: {error.os_error.strerror or type(error.os_error).__name__}"
        case aiohttp.ServerDisconnectedError():
            return "the connection was closed without an answer"
        case aiohttp.ClientResponseError():
            return "the answer was not HTTP"
        case OSError():
            return error.strerror or type(error).__name__
    return type(error).__name__


async def send_test(endpoint: Endpoint, lookup: Lookup, clock: Callable[[], float]) -> Reply:
    """Sends a signed `webhook.test`, which belongs to no operation and leaves no trace in the store."""
    now = datetime.fromtimestamp(int(clock()), UTC).isoformat().replace("+00:00", "Z")
    signal_id = uuid4()
    body = msgspec.json.encode(
        {
            "type": "webhook.test",
            "timestamp": now,
            "data": {"id": str(signal_id), "brand": endpoint.brand, "webhook": endpoint.name},
        }
    ).decode()
    sender = Sender(endpoint, lookup, clock, connections=1)
    try:
        return await sender.post(signal_id, body, deadline=asyncio.get_running_loop().time() + endpoint.timeout)
    finally:
        await sender.close()
