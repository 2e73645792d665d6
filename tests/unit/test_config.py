"""What a person who writes `indexer.toml` relies on: it is read as written, and what is wrong is said, all of it, at once."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from indexer.config import Config, ConfigProblems, Problem, followed_chain, json_schema, load

ROOT = Path(__file__).parents[2]
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
DATABASE = '[database]\nurl = "postgresql://indexer:s3cr3t-pa55@db.internal/indexer"\n'
CHAIN = '[[chains]]\nname = "base"\nchain_id = 8453\nrpc = [{ url = "https://one.example" }, { url = "https://two.example" }]\n'
FACTORY = 'factories = [{ address = "0x1000000000000000000000000000000000000001", start_block = 7 }]\n'
BRAND = '[[brands]]\nname = "bloom"\nissuers = ["0x2000000000000000000000000000000000000001"]\n'
WEBHOOK = f'[[brands.webhooks]]\nname = "shop"\nurl = "https://shop.example/hook"\nsecrets = ["{SECRET}"]\n'

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*parts: str) -> Path:
        path = tmp_path / "indexer.toml"
        path.write_text("\n".join(parts))
        return path

    return write


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without a configuration in it."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def problems(
    path: Path | None, environ: dict[str, str] | None = None, *, embedded: bool = False
) -> tuple[Problem, ...]:
    with pytest.raises(ConfigProblems) as caught:
        load(path, environ or {}, embedded=embedded)
    return caught.value.problems


def only(found: tuple[Problem, ...]) -> Problem:
    assert len(found) == 1, "\n".join(map(str, found))
    return found[0]


# --------------------------------------------------------------------------- reading


def test_the_example_file_loads_with_its_secret_files(tmp_path: Path) -> None:
    text = (ROOT / "indexer.example.toml").read_text()
    (tmp_path / "indexer.toml").write_text(text)
    (tmp_path / "secrets").mkdir()
    for name in re.findall(r'"secrets/([^"]+)"', text):
        value = "https://two.example/v2/the-key" if name == "base-rpc-url" else f"{SECRET}\n"
        (tmp_path / "secrets" / name).write_text(value)

    config = load(tmp_path / "indexer.toml", {})

    assert config.warnings == ()
    (chain,), (brand,) = config.chains, config.brands
    assert (chain.name, chain.chain_id, chain.quorum, chain.follow) == ("base", 8453, 2, "auto")
    assert [endpoint.url for endpoint in chain.rpc] == [
        "https://base.provider-one.example",
        "https://two.example/v2/the-key",
    ]
    assert chain.rpc[1].name == "two.example"
    assert chain.factories[0].address == bytes.fromhex("10" + "00" * 18 + "01")
    assert chain.factories[0].start_block == 29_000_000
    assert brand.issuers == (bytes.fromhex("20" + "00" * 18 + "01"),)
    assert [(p.max_amount, p.confidence, p.seconds) for p in brand.policies] == [
        (1000, "confirmed", 10.0),
        (None, "safe", None),
    ]
    assert brand.unmatched_since == datetime(2026, 1, 1, tzinfo=UTC)
    assert brand.keyban is not None and brand.keyban.api_key.get_secret_value() == SECRET
    assert [len(hook.secrets) for hook in brand.webhooks] == [1, 2]
    assert brand.webhooks[1].allow == ("10.20.0.0/16",)
    assert (config.http.host, config.http.port) == ("127.0.0.1", 8080)


def test_what_is_left_out_has_a_default(write: Write) -> None:
    config = load(write(DATABASE, CHAIN, FACTORY, BRAND, WEBHOOK), {})
    chain, brand = config.chains[0], config.brands[0]
    assert (config.database.pool_size, config.database.lease_seconds, config.database.direct_url) == (10, 15.0, None)
    assert (chain.poll_seconds, chain.tags_seconds, chain.silent_seconds) == (1.0, 5.0, 5.0)
    assert (chain.inferred_events, chain.second_look_seconds, chain.witnesses) == (True, 60.0, None)
    assert (brand.ambiguous, brand.policies, brand.unmatched_since, brand.loyfin) == ("settle", (), None, None)
    assert (brand.webhooks[0].events, brand.webhooks[0].timeout_seconds) == (("operation.*",), 10.0)


def test_the_tree_cannot_be_changed(write: Write) -> None:
    config = load(write(DATABASE), {})
    with pytest.raises(ValidationError):
        config.database.url = "postgresql://elsewhere/x"
    assert config.with_database("postgresql://other/y").database.url == "postgresql://other/y"
    assert config.database.url.endswith("@db.internal/indexer")


def test_two_readings_of_one_file_are_equal(write: Write) -> None:
    path = write(DATABASE, CHAIN, BRAND, WEBHOOK)
    assert load(path, {}) == load(path, {})
    assert load(path, {}) != load(path, {"INDEXER_DATABASE__POOL_SIZE": "11"})


def test_the_state_folder_follows_systemd_then_the_account(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(DATABASE)
    assert load(path, {"STATE_DIRECTORY": "/var/lib/private/indexer:/x"}).state_dir == Path("/var/lib/private/indexer")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert load(path, {"HOME": "/home/ann"}).state_dir == Path("/var/lib/indexer")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert load(path, {"HOME": "/home/ann"}).state_dir == Path("/home/ann/.local/state/indexer")
    assert load(path, {"INDEXER_STATE_DIR": "/srv/state", "HOME": "/x"}).state_dir == Path("/srv/state")


def test_the_file_is_looked_for_where_the_documents_say(write: Write, elsewhere: Path) -> None:
    named = write(DATABASE, '[http]\nlisten = "127.0.0.1:1"')
    by_variable = elsewhere / "variable.toml"
    by_variable.write_text(DATABASE + '[http]\nlisten = "127.0.0.1:2"')
    assert load(named, {"INDEXER_CONFIG": str(by_variable)}).http.port == 1
    assert load(None, {"INDEXER_CONFIG": str(by_variable)}).http.port == 2
    (elsewhere / "indexer.toml").write_text(DATABASE + '[http]\nlisten = "127.0.0.1:3"')
    assert load(None, {}).http.port == 3


def test_without_a_file_the_environment_alone_will_do(elsewhere: Path) -> None:
    config = load(None, {"INDEXER_DATABASE__URL": "postgresql://db/x", "INDEXER_HTTP__LISTEN": "[::]:80"})
    assert (config.database.url, config.http.host, config.http.port) == ("postgresql://db/x", "::", 80)
    assert only(tuple(config.warnings)).what.startswith("no chains and no brands")


def test_without_a_file_and_without_settings_it_says_where_it_looked(elsewhere: Path) -> None:
    found = problems(None, {"PATH": "/bin", "INDEXER_PORT": "tcp://10.0.0.1:80"})
    assert "neither ./indexer.toml nor /etc/indexer/indexer.toml exists" in found[0].what


# --------------------------------------------------------------------------- the environment


def test_variables_win_over_the_file(write: Write) -> None:
    brands = json.dumps([{"name": "other", "webhooks": []}])
    config = load(
        write(DATABASE, CHAIN, BRAND),
        {"INDEXER_DATABASE__POOL_SIZE": "33", "INDEXER_BRANDS": brands, "INDEXER_HTTP__LISTEN": ""},
    )
    assert config.database.pool_size == 33
    assert [brand.name for brand in config.brands] == ["other"]
    assert config.http.listen == "127.0.0.1:8080"  # an empty variable is one that is not set
    assert config.database.url.startswith("postgresql://indexer:")


def test_a_secret_file_from_the_environment_replaces_the_secret_of_the_file(write: Write, tmp_path: Path) -> None:
    (tmp_path / "url").write_text("postgresql://u:p@new/x\n")
    config = load(write(DATABASE), {"INDEXER_DATABASE__URL_FILE": str(tmp_path / "url")})
    assert config.database.url == "postgresql://u:p@new/x"


@pytest.mark.parametrize(
    ("variable", "value", "where", "what"),
    [
        ("INDEXER_DATABASE__POOLSIZE", "3", "database.poolsize (from INDEXER_DATABASE__POOLSIZE)", "no such key"),
        ("INDEXER_DATABSE__URL", "x", "databse (from INDEXER_DATABSE__URL)", "no such key"),
        ("INDEXER_STATEDIR", "/x", "statedir (from INDEXER_STATEDIR)", "no such key"),
        ("INDEXER_CHAINS", "[{", "INDEXER_CHAINS", "not valid JSON"),
        ("INDEXER_CHAINS", "[" * 100_000, "INDEXER_CHAINS", "not valid JSON"),
        ("INDEXER_CHAINS__0__NAME", "x", "INDEXER_CHAINS__0__NAME", "chains is a list"),
        ("INDEXER_CHAINS", '{"name": "x"}', "chains (from INDEXER_CHAINS)", "should be a valid tuple"),
        ("INDEXER_DATABASE__POOL_SIZE", "many", "database.pool_size (from INDEXER_DATABASE__POOL_SIZE)", "integer"),
        ("INDEXER_DATABASE__URL__X", "y", "INDEXER_DATABASE__URL__X", "database.url is not a table"),
    ],
)
def test_a_wrong_variable_is_named(write: Write, variable: str, value: str, where: str, what: str) -> None:
    found = only(problems(write(DATABASE), {variable: value}))
    assert found.where == where and what in found.what


def test_variables_of_other_programs_are_no_errors(write: Write) -> None:
    links = {
        "INDEXER_SERVICE_HOST": "10.0.0.1",
        "INDEXER_SERVICE_PORT": "80",
        "INDEXER_SERVICE_PORT_HTTP": "80",
        "INDEXER_PORT": "tcp://10.0.0.1:80",
        "INDEXER_PORT_80_TCP": "tcp://10.0.0.1:80",
        "INDEXER_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert load(write(DATABASE, CHAIN), links).warnings == ()
    warned = load(write(DATABASE, CHAIN), {"INDEXER_COLOUR": "blue"}).warnings
    assert only(warned).where == "INDEXER_COLOUR"


# --------------------------------------------------------------------------- what is wrong, one by one


def in_brand(line: str) -> str:
    return DATABASE + BRAND + line


def in_webhook(url: str, more: str = "", secrets: str = f'secrets = ["{SECRET}"]') -> str:
    return in_brand(f'[[brands.webhooks]]\nname = "shop"\nurl = "{url}"\n{secrets}\n{more}')


def in_chain(more: str, rpc: str = '[{ url = "https://one.example" }, { url = "https://two.example" }]') -> str:
    return f'{DATABASE}[[chains]]\nname = "base"\nchain_id = 8453\nrpc = {rpc}\n{more}'


@pytest.mark.parametrize(
    ("text", "where", "what"),
    ids=lambda value: value.strip().splitlines()[-1][-40:] if value else "any",
    argvalues=[
        (DATABASE + "[htpp]\nlisten = 'x:1'", "htpp", "no such key"),
        (DATABASE + "[http]\npool_size = 3", "http.pool_size", "no such key"),
        ("database = 3", "database", "should be a valid dictionary"),
        ('[database]\nurl = "mysql://u:pw@h/d"', "database.url", "postgresql://"),
        ('[database]\nurl = "postgresql://u:p/w@h/d"', "database.url", "not a URL"),
        ('[database]\nurl = "postgresql://h:99999/d"', "database.url", "the port is malformed"),
        ('[database]\nurl = "postgresql://h:0/d"', "database.url", "port 0"),
        (DATABASE + "pool_size = 0", "database.pool_size", "greater than or equal to 1"),
        (DATABASE + f"pool_size = {2**256}", "database.pool_size", "less than or equal to 500"),
        (DATABASE + "pool_size = true", "database.pool_size", "got true or false"),
        (DATABASE + "lease_seconds = nan", "database.lease_seconds", "less than or equal to 600"),
        (DATABASE + '[http]\nlisten = "8080"', "http.listen", "host:port"),
        (DATABASE + '[http]\nlisten = "::1:8080"', "http.listen", "host:port"),
        (DATABASE + '[http]\nlisten = "127.0.0.1:70000"', "http.listen", "0 to 65535"),
        (DATABASE + '[http]\nlisten = "127.0.0.1:80\\u0000"', "http.listen", "control character"),
        ('state_dir = "here"\n' + DATABASE, "state_dir", "absolute path"),
        (
            DATABASE + '[[chains]]\nname = "a b"\nchain_id = 1\nrpc = [{ url = "https://x" }]',
            "chains[0].name",
            "a name",
        ),
        (
            DATABASE + '[[chains]]\nname = "a"\nchain_id = 0\nrpc = [{ url = "https://x" }]',
            "chains[0].chain_id",
            "or equal",
        ),
        (
            f'{DATABASE}[[chains]]\nname = "a"\nchain_id = {2**63}\nrpc = [{{ url = "https://x" }}]',
            "chains[0].chain_id",
            "less than or equal",
        ),
        (in_chain("", "[]"), "chains[0].rpc", "at least 1 item"),
        (in_chain("", '[{ url = "one.example" }]'), "chains[0].rpc[0].url", "begins with https:// or http://"),
        (in_chain("", '["https://one.example"]'), "chains[0].rpc[0]", "valid dictionary"),
        (
            in_chain("", '[{ url = "https://a.b" , requests_per_second = 0 }]'),
            "chains[0].rpc[0].requests_per_second",
            "",
        ),
        (
            in_chain("", '[{ url = "https://a.b" }, { url = "https://a.b" }]'),
            "chains[0].rpc[1].url",
            "witness for itself",
        ),
        (in_chain('websocket = "https://one.example"'), "chains[0].websocket", "wss:// or ws://"),
        (in_chain("witnesses = 3"), "chains[0].witnesses", "3 witnesses are demanded of 2"),
        (in_chain('follow = "all"'), "chains[0].follow", "'auto' or 'every-header'"),
        (in_chain("poll_seconds = -1"), "chains[0].poll_seconds", "greater than 0"),
        (
            in_chain('factories = [{ address = "0x12", start_block = 1 }]'),
            "chains[0].factories[0].address",
            "0x and 40",
        ),
        (
            in_chain(FACTORY[:-2] + ', { address = "0x1000000000000000000000000000000000000001", start_block = 9 }]'),
            "chains[0].factories[1].address",
            "has this factory already",
        ),
        (
            in_chain(f'factories = [{{ address = "0x{"0" * 40}", start_block = 1 }}]'),
            "chains[0].factories[0].address",
            "zero address",
        ),
        (
            in_chain('factories = [{ address = "0xd8dA6BF26964aF9D7eEd9e03E53415D37aA96046", start_block = 1 }]'),
            "chains[0].factories[0].address",
            "EIP-55",
        ),
        (in_chain("") + CHAIN.replace('"base"', '"other"'), "chains[1].chain_id", "another chain has this chain id"),
        (in_chain("") + CHAIN.replace("8453", "1"), "chains[1].name", "another chain has this name"),
        (in_brand(BRAND.replace("2000", "3000")), "brands[1].name", "another brand has this name"),
        (in_brand(BRAND.replace("bloom", "other")), "brands[1].issuers[0]", "belongs to one brand"),
        (in_brand('policies = [{ confidence = "confirmed" }]'), "brands[0].policies[0].seconds", "needs it"),
        (in_brand('policies = [{ confidence = "sure" }]'), "brands[0].policies[0].confidence", "'finalized'"),
        (in_brand('policies = [{ confidence = "safe", bases = [] }]'), "brands[0].policies[0].bases", "at least 1"),
        (in_brand('policies = [{ confidence = "safe", bases = ["name"] }]'), "brands[0].policies[0].bases[0]", "nonce"),
        (
            in_brand('policies = [{ confidence = "safe", kind = "loyfin.mint" }]'),
            "brands[0].policies[0].kind",
            "loyfin.",
        ),
        (
            in_brand(f'policies = [{{ confidence = "safe", max_amount = "{2**256}" }}]'),
            "brands[0].policies[0].max_amount",
            "2^256-1",
        ),
        (
            in_brand('policies = [{ confidence = "safe", max_amount = "1.5" }]'),
            "brands[0].policies[0].max_amount",
            "digits",
        ),
        (in_brand("unmatched_since = 2026-01-01T00:00:00"), "brands[0].unmatched_since", "timezone"),
        (in_brand('ambiguous = "perhaps"'), "brands[0].ambiguous", "'settle' or 'hold'"),
        (in_brand('[brands.keyban]\nnetwork = "StellarMainnet"'), "brands[0].keyban.api_key", "missing"),
        (in_brand('[brands.keyban]\nnetwork = "X"\napi_key = "k"\ndecimals = 78'), "brands[0].keyban.decimals", "77"),
        (
            in_brand('[brands.qiibee]\napi_key = "k"\nsettle_after = -1'),
            "brands[0].qiibee.settle_after",
            "or equal to 0",
        ),
        (in_webhook("http://shop.example/x"), "brands[0].webhooks[0].url", "plain http"),
        (in_webhook("http://10.0.0.1/x", 'allow = ["192.168.0.0/16"]'), "brands[0].webhooks[0].url", "private"),
        (in_webhook("https://169.254.169.254/"), "brands[0].webhooks[0].url", "private"),
        (in_webhook("https://localhost/"), "brands[0].webhooks[0].url", "private"),
        (in_webhook("https://LOCALHOST./"), "brands[0].webhooks[0].url", "private"),
        (in_webhook("https://[::ffff:10.0.0.1]/"), "brands[0].webhooks[0].url", "private"),
        (in_webhook("https://user:pass@shop.example/"), "brands[0].webhooks[0].url", "user or password"),
        (in_webhook("https://@shop.example/"), "brands[0].webhooks[0].url", "user or password"),
        (in_webhook("https://2130706433/"), "brands[0].webhooks[0].url", "is a number"),
        (in_webhook("https://127.1/"), "brands[0].webhooks[0].url", "is a number"),
        (in_webhook("https://0x7f.0.0.0x1/"), "brands[0].webhooks[0].url", "is a number"),
        (in_webhook("https://010.0.0.1/", 'allow = ["10.0.0.0/8"]'), "brands[0].webhooks[0].url", "is a number"),
        (
            in_webhook("https://x.example/", "pause_after_hours = 0"),
            "brands[0].webhooks[0].pause_after_hours",
            "equal to 1",
        ),
        (
            in_webhook("https://x.example/", 'allow = ["10.0.0.1/8"]'),
            "brands[0].webhooks[0].allow[0]",
            "beyond its prefix",
        ),
        (in_webhook("https://x.example/", 'allow = ["intranet"]'), "brands[0].webhooks[0].allow[0]", "not a network"),
        (
            in_webhook("https://x.example/", 'events = ["operation.redy"]'),
            "brands[0].webhooks[0].events[0]",
            "no signal",
        ),
        (
            in_webhook("https://x.example/", "timeout_seconds = 15"),
            "brands[0].webhooks[0].timeout_seconds",
            "not shorter",
        ),
        (in_webhook("https://x.example/", secrets="secrets = []"), "brands[0].webhooks[0].secrets", "at least 1 item"),
        (in_webhook("https://x.example/", secrets=""), "brands[0].webhooks[0].secrets", "missing"),
        (
            in_webhook("https://x.example/", secrets='secrets = ["c2hvcnQ="]'),
            "brands[0].webhooks[0].secrets[0]",
            "24 random",
        ),
        (in_webhook("https://x.example/", WEBHOOK), "brands[0].webhooks[1].name", "webhook of this name"),
        (DATABASE + ".".join("a" * 500) + " = 1", "database", "nested too deep"),
    ],
)
def test_a_wrong_value_is_named_by_its_place(write: Write, text: str, where: str, what: str) -> None:
    found = only(problems(write(text)))
    assert (found.where, what in found.what) == (where, True), str(found)


def test_every_problem_is_reported_at_once(write: Write) -> None:
    path = write(
        'statedir = "/x"',
        '[http]\nlisten = "x"',
        '[[chains]]\nname = "base"\nchain_id = "eight"\nwitnesses = 4\nrpc = [{ url = "ftp://x" }]',
        'factories = [{ address = "0x12", start_blok = 1 }]',
        BRAND,
        'policies = [{ confidence = "confirmed" }, { confidence = "sure" }]',
        '[[brands.webhooks]]\nname = "shop"\nurl = "http://shop.example"\nsecrets = ["c2hvcnQ="]\ntimeout_seconds = 99',
        BRAND,
    )
    assert {problem.where for problem in problems(path)} == {
        "statedir",
        "http.listen",
        "database.url",
        "chains[0].chain_id",
        "chains[0].witnesses",
        "chains[0].rpc[0].url",
        "chains[0].factories[0].address",
        "chains[0].factories[0].start_blok",
        "chains[0].factories[0].start_block",
        "brands[0].policies[0].seconds",
        "brands[0].policies[1].confidence",
        "brands[0].webhooks[0].url",
        "brands[0].webhooks[0].secrets[0]",
        "brands[0].webhooks[0].timeout_seconds",
        "brands[1].name",
        "brands[1].issuers[0]",
    }


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (DATABASE + "[http]\nlistn = 'x:1'", "did you mean `listen`?"),
        (DATABASE + "[http]\nlease_seconds = 3", "`lease_seconds` belongs in [database]"),
        (DATABASE + "[http]\nxyz = 3", "nearest is `listen`; known here: listen"),
        (in_webhook("https://x.example/", 'secret_file = "x"'), "did you mean `secret_files`?"),
        (DATABASE + 'url_fil = "x"', "did you mean `url_file`?"),
        (in_webhook("https://x.example/", 'events = ["operation.redy"]'), 'did you mean "operation.ready"?'),
        (in_webhook("https://x.example/", 'allow = ["10.0.0.1/8"]'), 'did you mean "10.0.0.0/8"?'),
    ],
)
def test_the_nearest_right_spelling_is_named(write: Write, text: str, hint: str) -> None:
    assert only(problems(write(text))).hint == hint


def test_an_address_is_read_with_its_checksum_or_in_lower_case(write: Write) -> None:
    good = in_chain('factories = [{ address = "0xd8dA6BF26964aF9D7eEd9e03E53415D37aA96045", start_block = 1 }]')
    assert load(write(good), {}).chains[0].factories[0].address.hex().startswith("d8da6bf2")
    assert load(write(good.lower()), {}).chains[0].factories[0].address.hex().startswith("d8da6bf2")


# --------------------------------------------------------------------------- files that are not right


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"[database\nurl = 1", "at line 1, column 10"),
        (b'[http]\nlisten = "a:1"\nlisten = "b:2"\n\n', "Cannot overwrite a value (at line 3, column 15)"),
        (b"x = \xff\xfe", "not UTF-8: byte 5"),
        (b"x = " + b"9" * 5000, "a number, a nesting"),
        (b"x = " + b"[" * 5000, "a number, a nesting"),
        (b"#" * 5_000_000, "larger than"),
    ],
)
def test_a_broken_file_is_said_to_be_broken_and_where(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    found = only(problems(path))
    assert found.where == str(path) and what in found.what


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "indexer.toml"
    path.write_text("\ufeff" + DATABASE)
    assert load(path, {}).database.url


def test_a_file_that_is_not_there_or_not_a_file(tmp_path: Path) -> None:
    assert "does not exist" in only(problems(tmp_path / "none.toml")).what
    assert "cannot be read: Is a directory" in only(problems(tmp_path)).what


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(write: Write) -> None:
    path = write(DATABASE)
    path.chmod(0)
    assert "may not be read" in only(problems(path)).what


@pytest.mark.parametrize(
    ("content", "what"),
    [
        pytest.param(None, "does not exist", id="missing"),
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"two\nlines", "more than one line", id="lines"),
        pytest.param(b"\xff\xfe", "not text", id="binary"),
        pytest.param(b"a" * 70_000, "more than one line", id="huge"),
    ],
)
def test_a_secret_file_that_is_of_no_use_is_named(
    write: Write, tmp_path: Path, content: bytes | None, what: str
) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    path = write(DATABASE, BRAND, '[brands.qiibee]\napi_key_file = "key"')
    found = only(problems(path))
    assert found.where == "brands[0].qiibee.api_key_file" and what in found.what and str(tmp_path / "key") in found.what


def test_a_named_pipe_as_a_secret_file_holds_nobody_up(write: Write, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key")
    found = only(problems(write(DATABASE, BRAND, '[brands.qiibee]\napi_key_file = "key"')))
    assert found.where == "brands[0].qiibee.api_key_file" and "is not a regular file" in found.what


def test_a_state_dir_that_is_no_text_is_told_in_plain_words(write: Write) -> None:
    found = only(problems(write("state_dir = 5", DATABASE)))
    assert found.where == "state_dir" and "pathlib" not in str(found) and "path" in str(found)


def test_a_secret_and_its_file_exclude_each_other(write: Write, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k")
    both = write(DATABASE, BRAND, '[brands.qiibee]\napi_key = "k"\napi_key_file = "key"')
    assert only(problems(both)).what == "both api_key and api_key_file are given"
    text = in_webhook("https://x.example", 'secret_files = ["key"]')
    assert only(problems(write(text))).what == "both secrets and secret_files are given"
    text = in_webhook("https://x.example", "", "secret_files = []")
    assert only(problems(write(text))).where == "brands[0].webhooks[0].secret_files"


def test_a_bad_secret_of_several_files_is_named(write: Write, tmp_path: Path) -> None:
    (tmp_path / "good").write_text(SECRET)
    path = write(in_webhook("https://x.example", "", 'secret_files = ["good", "none"]'))
    assert only(problems(path)).where == "brands[0].webhooks[0].secret_files[1]"


# --------------------------------------------------------------------------- secrets stay secret


@pytest.mark.parametrize("partner", ["keyban", "qiibee"])
def test_one_account_is_one_brands(write: Write, partner: str) -> None:
    network = 'network = "StellarMainnet"' if partner == "keyban" else ""
    section = f'[brands.{partner}]\napi_key = "key-of-both"\n{network}'
    rose = BRAND.replace("bloom", "rose").replace("0001", "0002")
    path = write(BRAND, section, rose, section)
    with pytest.raises(ConfigProblems) as caught:
        load(path, {}, embedded=True)
    (problem,) = caught.value.problems
    assert problem.where == f"brands[1].{partner}.api_key" and "another brand" in problem.what
    assert "key-of-both" not in str(problem)


def test_no_problem_repeats_a_secret(write: Write) -> None:
    hidden = ["hunter2", "sk_live_9f8e7d6c5b4a", "whsec_c2hvcnQ", "c2hvcnQ", "rpc-key-0123456789", "kb-0123456789"]
    path = write(
        f'[database]\nurl = "postgres://indexer:{hidden[0]}@h:99999/db"\ndirect_url = "mysql://u:{hidden[0]}@h/db"',
        '[[chains]]\nname = "base"\nchain_id = 1\nwebsocket = "https://x.example/rpc-key-0123456789"',
        'rpc = [{ url = "ftp://x.example/rpc-key-0123456789" }, { url = "https:///rpc-key-0123456789" }]',
        BRAND,
        '[brands.keyban]\nurl = "kb-0123456789"\napi_key = 12345678901\nnetwork = "X"',
        f'[[brands.webhooks]]\nname = "shop"\nurl = "http://u:{hidden[1]}@shop.example/{hidden[1]}"',
        'secrets = ["whsec_c2hvcnQ="]',
        f'[[brands.webhooks]]\nname = "twin"\nurl = "{hidden[1]}"\nsecrets = "{hidden[2]}"',
    )
    with pytest.raises(ConfigProblems) as caught:
        load(path, {"INDEXER_DATABASE__POOL_SIZE": "hunter2", "INDEXER_CHAIN": "[hunter2"})
    assert len(caught.value.problems) >= 10
    for secret in [*hidden, "12345678901"]:
        assert secret not in str(caught.value)
        assert secret not in repr(caught.value)


def test_the_printed_tree_holds_no_secret(write: Write) -> None:
    chain = in_chain('websocket = "wss://one.example/rpc-key-1"', '[{ url = "https://one.example/rpc-key-1" }]')
    brand = BRAND + '[brands.qiibee]\napi_key = "qb-key-1"\n' + WEBHOOK.replace("/hook", "/hook-key-1")
    config = load(write(chain, brand), {})
    assert config.brands[0].qiibee is not None
    for secret in ("s3cr3t-pa55", "rpc-key-1", "qb-key-1", "hook-key-1", SECRET):
        assert secret not in repr(config)


def test_the_tree_knows_its_secrets_for_the_logs(write: Write) -> None:
    rpc = '[{ url = "https://one.example/v2/rpc-key-0123456789" }, { url = "https://two.example/v2?k=query-key-0123456789" }]'
    brand = (
        BRAND + '[brands.qiibee]\napi_key = "qb-key-1"\n' + WEBHOOK.replace("/hook", "/services/hook-key-0123456789")
    )
    config = load(write(in_chain("", rpc).replace("s3cr3t-pa55", "s3cr3t%2Fpa55"), brand), {})
    wanted = {"s3cr3t%2Fpa55", "s3cr3t/pa55", "rpc-key-0123456789", "query-key-0123456789", "qb-key-1"}
    assert set(config.secrets()) == wanted | {SECRET, SECRET.removeprefix("whsec_"), "hook-key-0123456789"}
    embedded = config.with_database("postgresql://indexer:pw-of-today@/indexer?host=/var/lib/indexer/postgres/socket")
    assert "pw-of-today" in embedded.secrets() and not [part for part in embedded.secrets() if "socket" in part]


# --------------------------------------------------------------------------- the embedded database


def test_a_database_is_needed_unless_the_process_brings_one(write: Write) -> None:
    path = write(CHAIN)
    assert only(problems(path)).where == "database.url"
    assert load(path, {}, embedded=True).database.url == ""
    assert "brings its own" in only(problems(write(DATABASE), embedded=True)).what
    assert only(problems(write('[database]\nurl = ""'))).where == "database.url"


# --------------------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("text", "where", "what"),
    ids=lambda value: value.strip().splitlines()[-1][-40:] if value else "any",
    argvalues=[
        (in_chain("", '[{ url = "https://one.example" }]'), "chains[0].rpc", "one witness"),
        (
            in_chain("", '[{ url = "https://x.example/a" }, { url = "https://x.example/b" }]'),
            "chains[0].rpc",
            "one host",
        ),
        (
            in_chain("", '[{ url = "https://one.example" }, { url = "http://two.example" }]'),
            "chains[0].rpc[1].url",
            "plain",
        ),
        (
            in_brand('policies = [{ confidence = "safe", seconds = 3 }]') + "\n" + CHAIN + FACTORY,
            ".seconds",
            "no effect",
        ),
        (
            in_brand('policies = [{ confidence = "safe" }, { confidence = "included", max_amount = "5" }]\n')
            + CHAIN
            + FACTORY,
            "brands[0].policies[1]",
            "policies[0] matches first",
        ),
        (in_brand('policies = [{ confidence = "safe", kind = "qiibee.debit" }]'), "policies[0]", "no [brands.qiibee]"),
        (in_brand('policies = [{ confidence = "safe", kind = "loyfin.issuance" }]'), "policies[0]", "no chain has"),
        (
            in_brand(
                'policies = [{ confidence = "finalized", kind = "keyban.mint" }]\n'
                '[brands.keyban]\nnetwork = "StarknetMainnet"\napi_key = "k"'
            ),
            "policies[0]",
            "without finalized_after",
        ),
        (
            in_brand(
                'policies = [{ confidence = "finalized", kind = "keyban.mint", bases = ["nonce"] }]\n'
                '[brands.keyban]\nnetwork = "StellarMainnet"\napi_key = "k"'
            ),
            "policies[0]",
            "matched by wallet and amount",
        ),
        (
            in_brand(f'policies = [{{ confidence = "safe", issuer = "0x{"3" * 40}" }}]\n') + CHAIN + FACTORY,
            "policies[0]",
            "not one of the brand's",
        ),
        (in_webhook("https://x.example", 'allow = ["0.0.0.0/0"]'), "webhooks[0].allow", "every address"),
        (
            in_brand('[brands.keyban]\nurl = "http://k.example"\nnetwork = "Stellar"\napi_key = "k"'),
            "keyban.url",
            "plain",
        ),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(write: Write, text: str, where: str, what: str) -> None:
    warned = only(tuple(load(write(text), {}).warnings))
    assert where in warned.where and what in warned.what, str(warned)


def test_a_reachable_policy_is_not_warned_of(write: Write) -> None:
    keyban = '[brands.keyban]\nnetwork = "{}"\napi_key = "k"\n{}'
    policies = 'policies = [{ confidence = "finalized", kind = "keyban.mint" }]\n'
    token = f'token = "0x{"ab" * 20}"'
    for network, more in (
        ("StellarTestnet", ""),
        ("BaseMainnet", token),
        ("base", token),
        ("Other", "finalized_after = 60"),
    ):
        config = load(write(in_brand(policies + keyban.format(network, more) + "\n" + CHAIN + FACTORY)), {})
        assert config.warnings == (), network
    assert followed_chain("BaseMainnet", config) is config.chains[0]
    assert followed_chain("BaseSepolia", config) is None


def test_keyban_on_a_followed_chain_without_its_token_is_warned_of(write: Write) -> None:
    keyban = '[brands.keyban]\nnetwork = "BaseMainnet"\napi_key = "k"\nfinalized_after = 60\n'
    for policies in ("", 'policies = [{ confidence = "included", kind = "keyban.mint" }]\n'):
        config = load(write(in_brand(policies + keyban + CHAIN + FACTORY)), {})
        assert "keyban.token" in config.warnings[0].where and "points token" in config.warnings[0].what
        assert bool(policies) is any("no source can reach it" in warned.what for warned in config.warnings)


# --------------------------------------------------------------------------- the schema, and anything at all


def test_signals_do_not_go_before_their_deliveries(write: Write) -> None:
    assert load(write(DATABASE + "[retention]\nsignals_days = 90\n"), {}).retention.signals_days == 90
    refused = only(problems(write(DATABASE + "[retention]\nsignals_days = 30\n")))
    assert refused.where == "retention.signals_days"


def test_the_schema_describes_every_key_and_the_documents_name_it() -> None:
    schema = json_schema()
    documents = (ROOT / "docs" / "configuration.md").read_text()
    tables = {"Config": schema, **schema["$defs"]}
    for name, table in tables.items():
        for key, value in table["properties"].items():
            assert value.get("description"), f"{name}.{key}"
            if not key.endswith(("_file", "secret_files")):
                assert f"`{key}`" in documents, f"docs/configuration.md does not name {name}.{key}"
        assert table["additionalProperties"] is False
    assert {"url_file", "direct_url_file"} <= set(schema["$defs"]["Database"]["properties"])
    assert {"secret_files", "secrets", "url_file"} <= set(schema["$defs"]["Webhook"]["properties"])
    assert json.loads(json.dumps(schema)) == schema


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
names = st.sampled_from(
    ["database", "http", "chains", "brands", "rpc", "url", "url_file", "name", "webhooks", "secrets"]
)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["DATABASE", "HTTP", "CHAINS", "BRANDS", "STATE_DIR"]), trees, min_size=1))
def test_whatever_is_written_the_answer_is_a_tree_or_problems(tree: dict[str, Any]) -> None:
    environ = {f"INDEXER_{key}": json.dumps(value) for key, value in tree.items()} | {"INDEXER_CONFIG": "/dev/null"}
    try:
        assert isinstance(load(None, environ), Config)
    except ConfigProblems as error:
        assert error.problems and all(problem.what for problem in error.problems)
