"""What an operator relies on: numbers that keep growing while a loop stands still, and logs without a secret in them."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from indexer.telemetry import HIDDEN, Metrics, configure_logging, redact


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def declared(metrics: Metrics) -> dict[str, Counter | Gauge | Histogram]:
    kinds = (Counter, Gauge, Histogram)
    return {name: metric for name, metric in vars(metrics).items() if isinstance(metric, kinds)}


def value(metrics: Metrics, sample: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(sample, labels)


# --------------------------------------------------------------------------- metrics


def test_every_metric_has_the_prefix_a_text_and_a_base_unit() -> None:
    metrics = Metrics()
    for name, metric in declared(metrics).items():
        (family,) = metric.describe()
        assert family.name.startswith("loyalty_"), name
        assert family.documentation, name
        assert not family.name.endswith(("_ms", "_milliseconds", "_kb", "_minutes")), name


def test_two_processes_worth_of_metrics_live_side_by_side() -> None:
    one, two = Metrics(), Metrics()
    one.lookalikes.labels("base", "emitter").inc()
    assert value(one, "loyalty_lookalikes_total", chain="base", reason="emitter") == 1
    assert value(two, "loyalty_lookalikes_total", chain="base", reason="emitter") is None


def test_the_exposition_is_readable_with_every_metric_touched() -> None:
    metrics = Metrics()
    for metric in declared(metrics).values():
        labelled = metric.labels(*("x" for _ in metric._labelnames)) if metric._labelnames else metric
        labelled.observe(1) if isinstance(metric, Histogram) else labelled.inc()
    families = {family.name for family in text_string_to_metric_families(metrics.exposition().decode())}
    assert {"loyalty_settlement_latency_seconds", "loyalty_head_lag_seconds", "loyalty_rpc_lies"} <= families
    assert "process_resident_memory_bytes" in families


def test_lag_grows_while_nothing_is_followed() -> None:
    clock = Clock(1000.0)
    metrics = Metrics(clock)
    metrics.saw_head("base", "safe", 7, 990_000)
    assert value(metrics, "loyalty_head_block_number", chain="base", level="safe") == 7
    assert value(metrics, "loyalty_head_lag_seconds", chain="base", level="safe") == 10
    clock.now = 1100.0
    assert value(metrics, "loyalty_head_lag_seconds", chain="base", level="safe") == 110
    metrics.saw_head("base", "safe", 8, 1_099_800)
    assert value(metrics, "loyalty_head_lag_seconds", chain="base", level="safe") == pytest.approx(0.2)
    metrics.saw_head("base", "safe", 9, 1_101_000)  # a chain's clock ahead of ours
    assert value(metrics, "loyalty_head_lag_seconds", chain="base", level="safe") == 0


def test_ages_grow_and_end_with_what_they_are_of() -> None:
    clock = Clock(1000.0)
    metrics = Metrics(clock)
    metrics.saw_oldest_open("bloom", 400.0)
    metrics.saw_oldest_unsent("bloom", 999.0)
    clock.now = 1001.0
    assert value(metrics, "loyalty_oldest_open_age_seconds", brand="bloom") == 601
    assert value(metrics, "loyalty_oldest_unsent_age_seconds", brand="bloom") == 2
    metrics.saw_oldest_open("bloom", None)
    assert value(metrics, "loyalty_oldest_open_age_seconds", brand="bloom") == 0
    metrics.saw_oldest_open("bloom", 1000.0)
    assert value(metrics, "loyalty_oldest_open_age_seconds", brand="bloom") == 1


def test_latency_is_clamped_at_zero_and_late_registrations_are_counted() -> None:
    metrics = Metrics()
    metrics.observe_latency("bloom", "loyfin.redemption", "registered_to_included", -5.0)
    metrics.observe_latency("bloom", "loyfin.redemption", "registered_to_included", 0.4)
    labels = {"brand": "bloom", "kind": "loyfin.redemption"}
    latency = {**labels, "stage": "registered_to_included"}
    assert value(metrics, "loyalty_settlement_latency_seconds_count", **latency) == 2
    assert value(metrics, "loyalty_settlement_latency_seconds_sum", **latency) == 0.4
    assert value(metrics, "loyalty_late_registrations_total", **labels) == 1


def test_a_replica_without_the_lease_reports_nothing_of_the_database() -> None:
    metrics = Metrics(Clock(10.0))
    metrics.operations.labels("bloom", "pending").set(3)
    metrics.saw_oldest_open("bloom", 1.0)
    metrics.saw_head("base", "head", 1, 9000)
    metrics.forget_database()
    text = metrics.exposition().decode()
    assert "loyalty_operations{" not in text and "loyalty_oldest_open_age_seconds{" not in text
    assert value(metrics, "loyalty_head_lag_seconds", chain="base", level="head") == 1
    metrics.saw_oldest_open("bloom", 4.0)
    assert value(metrics, "loyalty_oldest_open_age_seconds", brand="bloom") == 6


def test_no_metric_is_declared_that_nobody_moves() -> None:
    sources = [path.read_text() for path in sorted((Path(__file__).parents[2] / "indexer").rglob("*.py"))]
    text = re.sub(r"self\.\w+ = self\._(counter|gauge|histogram)\(", "", "\n".join(sources))
    metrics = [name for name, metric in vars(Metrics()).items() if isinstance(metric, MetricWrapperBase)]
    assert metrics and not [name for name in metrics if not re.search(rf"\.{name}\b", text)]


# --------------------------------------------------------------------------- redaction


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://base.example/v2/aBcDeFgHiJkLmNoPqRsT0123", "https://base.example/…"),
        ("https://base.example/0123456789abcdef0123456789abcdef/", "https://base.example/…"),
        ("wss://base.example/ws?apikey=abc", "wss://base.example/…"),
        ("https://user:pass@base.example/x", "https://base.example/x"),
        (
            "https://d3b07384-d113-4ec6-a7d8-1b4b2a4a1a1a.base.example",
            "https://d3b07384-d113-4ec6-a7d8-1b4b2a4a1a1a.base.example",
        ),
        ("https://base.example/d3b07384-d113-4ec6-a7d8-1b4b2a4a1a1a", "https://base.example/…"),
        ("cannot reach https://base.example:8545.", "cannot reach https://base.example:8545."),
        ("postgresql://indexer:p@ss/w0rd@db.internal:5432/indexer", "postgresql://db.internal:5432/indexer"),
        ("postgresql://db/indexer?password=abc&sslmode=require", "postgresql://db/…"),
        ("https://scan.example/tx/0x" + "ab" * 32, "https://scan.example/tx/0x" + "ab" * 32),
        ("https://docs.example/guide/errors", "https://docs.example/guide/errors"),
        ("(see https://k:v@a.example/x)", "(see https://a.example/x)"),
        ("http://[::1", f"http://{HIDDEN}"),
        ("signed with whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", f"signed with whsec_{HIDDEN}"),
        ("Authorization: Bearer abc.def-ghi", f"Authorization: Bearer {HIDDEN}"),
        ("{'X-API-KEY': 'abc123'}", f"{{'X-API-KEY': '{HIDDEN}'}}"),
        ("host=db password=hunter2 user=x", f"host=db password={HIDDEN} user=x"),
        ("block 0x" + "cd" * 32 + " at 7", "block 0x" + "cd" * 32 + " at 7"),
        ("registered redemption-8841", "registered redemption-8841"),
    ],
)
def test_a_text_is_shown_without_what_may_be_a_key(text: str, expected: str) -> None:
    assert redact(text) == expected


@given(st.text())
def test_redaction_bears_any_text_and_is_done_after_once(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


@given(st.text(st.characters(categories=["L", "N"], max_codepoint=127), min_size=16, max_size=64))
def test_no_long_path_segment_survives(key: str) -> None:
    assert key not in redact(f"https://rpc.example/v2/{key}") and key not in redact(f"wss://rpc.example/{key}/ws")


# --------------------------------------------------------------------------- logs


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def stream(restored_logging: None) -> io.StringIO:
    return io.StringIO()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_log_line_is_one_json_object(stream: io.StringIO) -> None:
    configure_logging(True, stream=stream)
    structlog.get_logger("indexer.chain").info("head stored", chain="base", number=7, hash=b"\xab\xcd", token=b"\x01")
    (line,) = lines(stream)
    assert line.pop("timestamp")
    assert line == {
        "event": "head stored",
        "level": "info",
        "logger": "indexer.chain",
        "chain": "base",
        "number": 7,
        "hash": "0xabcd",
        "token": "0x01",
    }


def test_logs_of_libraries_take_the_same_way(stream: io.StringIO) -> None:
    configure_logging(True, stream=stream)
    logging.getLogger("asyncpg").warning("lost %s", "postgresql://u:hunter2@db/x", extra={"api_key": "abc"})
    (line,) = lines(stream)
    assert (line["event"], line["logger"], line["level"]) == ("lost postgresql://db/x", "asyncpg", "warning")
    assert line["api_key"] == HIDDEN


def test_no_secret_reaches_a_line_however_it_is_wrapped(stream: io.StringIO) -> None:
    secret = "hunter2-hunter2"
    configure_logging(True, stream=stream, secrets=[secret, ""])
    log = structlog.get_logger("indexer")

    class Holder:
        def __repr__(self) -> str:
            return f"Holder(https://x.example/{secret})"

    log.info(f"in the event {secret}", value=secret, nested={"list": [secret, {"deep": (secret,)}]}, holder=Holder())
    log.info(
        "by key", secret="abc", password="abc", api_key="abc", headers={"Authorization": "abc", "X-API-KEY": "abc"}
    )
    log.info("typed", key=SecretStr(secret), error=ValueError(f"https://u:{secret}@x.example"))
    try:
        raise RuntimeError(f"cannot open postgresql://u:{secret}@db/x")
    except RuntimeError:
        log.exception("failed")
        logging.getLogger("library").exception("failed too")
    text = stream.getvalue()
    assert secret not in text and '"abc"' not in text
    assert "cannot open postgresql://db/x" in text
    assert len(lines(stream)) == 5


def test_below_the_level_nothing_is_written(stream: io.StringIO) -> None:
    configure_logging(True, "warning", stream=stream)
    structlog.get_logger("a").info("quiet")
    logging.getLogger("b").info("quiet")
    structlog.get_logger("a").warning("loud")
    assert [line["event"] for line in lines(stream)] == ["loud"]


def test_configuring_again_replaces_and_never_doubles(stream: io.StringIO) -> None:
    configure_logging(True, stream=io.StringIO())
    configure_logging(True, stream=stream, secrets=["a-new-secret"])
    structlog.get_logger("a").info("one a-new-secret")
    assert [line["event"] for line in lines(stream)] == [f"one {HIDDEN}"]


def test_a_person_at_a_terminal_reads_text(stream: io.StringIO) -> None:
    configure_logging(False, stream=stream)
    try:
        raise RuntimeError("https://u:hunter2@x.example/y")
    except RuntimeError:
        structlog.get_logger("a").exception("it failed", brand="bloom")
    text = stream.getvalue()
    assert "it failed" in text and "brand=bloom" in text and "https://x.example/y" in text and "hunter2" not in text
