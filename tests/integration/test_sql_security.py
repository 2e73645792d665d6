"""One brand's SQL login against another brand's rows: every view and function of the catalogue, and every trick of SQL.

Two brands with the same kinds of rows live in one database; whatever names one of them is a secret of the other's.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import asyncpg
import pytest
from typer.testing import CliRunner, Result

from indexer.cli import app
from indexer.commands.wiring import USAGE, Failure
from indexer.model.confidence import Level, Policy
from indexer.model.evidence import transfer_id
from indexer.model.matching import WalletRules
from indexer.settlement.rules import BrandRules, PartnerAccount
from indexer.store import schema, signals, sql_users
from indexer.store.database import Database
from indexer.store.leases import Leases
from indexer.store.wakeups import TOPICS, channel
from tests.conftest import Postgres
from tests.world import CHAIN, FACTORY, ISSUER, LOYALTY_ID, World, hexa

MINE, THEIRS = "bloom", "rose"
ISSUERS = {MINE: ISSUER, THEIRS: b"\x99" * 20}
TOKENS = {MINE: b"\x70" * 20, THEIRS: b"\x71" * 20}
HOLDERS = {MINE: b"\xa1" * 20, THEIRS: b"\xb2" * 20}
LOYALTY_IDS = {MINE: LOYALTY_ID, THEIRS: b"\x2d" * 32}
WALLETS = {MINE: "GDMINE4UZGJQ5TYW", THEIRS: "GDTHEIRS7XK2QLHB"}  # at partners
RECORDS = {MINE: "5c1f0a", THEIRS: "9e47bd"}  # their ids begin with it
HASHES = {MINE: "3f" * 32, THEIRS: "d8" * 32}
PARTNERS = {partner: PartnerAccount(WalletRules()) for partner in ("keyban", "qiibee")}
RULES = {brand: BrandRules((Policy(Level.INCLUDED),), partners=PARTNERS) for brand in ISSUERS}

# Facts of chains, the same for everybody.
OF_NO_BRAND = {"sync_status"}


@dataclass
class Estate:
    """A database in which both brands have something in every view."""

    world: World
    owner_dsn: str
    logins: dict[str, str] = field(default_factory=dict)  # brand, or "reader" → URL
    names: list[str] = field(default_factory=list)
    operations: dict[str, UUID] = field(default_factory=dict)  # of each brand, one that is ready
    open: dict[str, UUID] = field(default_factory=dict)  # … one that waits
    claims: dict[str, UUID] = field(default_factory=dict)

    def secrets_of(self, brand: str) -> re.Pattern[str]:
        """What must not be seen of a brand, in any spelling that a row, an error or a notice could have."""
        raw = (ISSUERS[brand], TOKENS[brand], HOLDERS[brand], LOYALTY_IDS[brand])
        words = [brand, WALLETS[brand], RECORDS[brand], HASHES[brand], *(value.hex() for value in raw)]
        words += [str(one[brand]) for one in (self.operations, self.open, self.claims)]
        return re.compile("|".join(words), re.IGNORECASE)

    async def add_login(self, brand: str | None) -> str:
        name = f"test_{secrets.token_hex(6)}"
        password = await sql_users.add(self.world.conn, name, brand)
        self.names.append(name)
        parts = urlsplit(self.owner_dsn)
        where = parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=f"{name}:{password}@{where}"))

    async def furnish(self, brand: str, block: int) -> None:
        """Rows of a brand for every view: ready and claimed, fulfilled and undone, conflicting, waiting, unmatched."""
        world, leg = self.world, self._leg
        await world.conn.execute(
            """
            INSERT INTO indexer.programme (chain_id, block_number, log_index, block_hash, block_time_ms, tx_hash, tx_index, emitter,
                factory, issuer, loyalty_id, loyalty, name, symbol, media, description, contract_uri, token_uri)
            VALUES ($1, $2, 9, sha256($3::text::bytea), 0, sha256($3::text::bytea), 0, $4, $4, $5, $6, $7, $3, $3, $3, $3, $3, $3)
            """,
            CHAIN, block, brand, FACTORY, ISSUERS[brand], LOYALTY_IDS[brand], TOKENS[brand],
        )  # fmt: skip
        await world.conn.execute(
            """
            INSERT INTO indexer.transfer (chain_id, block_number, log_index, item, block_hash, block_time_ms, tx_hash, tx_index, emitter,
                source, loyalty, operator, sender, recipient, bucket, amount)
            VALUES ($1, $2, 8, 0, sha256($3::text::bytea), 0, sha256($3::text::bytea), 0, $4, 'loyfin', $4, $5, $5, $4, 0, 3)
            """,
            CHAIN, block, brand, TOKENS[brand], HOLDERS[brand],
        )  # fmt: skip
        minted = await self._furnish_partners(brand)
        ready, undone, waiting = leg(brand), leg(brand, amount="7"), leg(brand, amount="8")
        issued = leg(brand, kind="loyfin.issuance", amount="1000")
        self.operations[brand] = await self._register(brand, "ready", ready)
        fulfilled = await self._register(brand, "undone", undone)
        self.open[brand] = await self._register(brand, "waiting", waiting)
        await self._register(brand, "issued", issued)
        for index, one in enumerate(
            (ready, issued, leg(brand, amount="11"), leg(brand, kind="loyfin.issuance", amount="12"))
        ):
            await world.event(block, one, index=index)
        await world.event(block + 1, undone)
        await world.settle()
        await world.fulfil(fulfilled, 1)
        await world.settle()
        await world.conn.execute(
            "UPDATE indexer.movement SET canonical = false WHERE block_number = $1", block + 1
        )  # the exposure
        await world.touch_blocks(block + 1, block + 1)
        await world.settle()
        await world.conn.execute(
            "UPDATE indexer.movement SET loyalty = $2 WHERE issuer = $1", ISSUERS[brand], TOKENS[brand]
        )
        claimed = await world.conn.fetch(
            "SELECT claim, operation_id FROM indexer.claim_fulfilments($1, $2, 10, '1 hour')",
            brand,
            f"worker of {brand}",
        )
        self.claims[brand] = next(row["claim"] for row in claimed if row["operation_id"] == self.operations[brand])
        assert minted in {row["operation_id"] for row in claimed}

    async def _furnish_partners(self, brand: str) -> UUID:
        """What pollers leave of a brand's accounts: a mint that an operation waits for, and one of qiibee's that nobody does."""
        conn = self.world.conn
        minted = await self._register(brand, "minted", partner_leg(brand))
        for kind in ("keyban.mint", "qiibee.credit"):
            partner, record = kind.partition(".")[0], f"{RECORDS[brand]}-{kind}"
            await conn.execute(
                """
                INSERT INTO indexer.partner_transfer (id, brand, partner, kind, record_id, wallet, token, amount, amount_text, time_ms, status,
                    network, tx_hash, tx_hashes, block_number, settled_at)
                VALUES ($1, $2, $3, $4, $5, $6, $6, 250, '250', extract(epoch FROM clock_timestamp()) * 1000, 'succeeded', 'StellarTestnet',
                    $7, ARRAY[$7], 7, clock_timestamp())
                """,
                transfer_id(partner, kind, record, WALLETS[brand]), brand, partner, kind, record, WALLETS[brand], HASHES[brand],
            )  # fmt: skip
            await conn.execute(
                "INSERT INTO indexer.partner_record (brand, partner, record_id, version, raw, wallet) VALUES ($1, $2, $3, 1, $4, $5)",
                brand, partner, record, {"id": record, "wallet": WALLETS[brand]}, WALLETS[brand],
            )  # fmt: skip
            await conn.execute(
                "INSERT INTO indexer.partner_wallet (brand, partner, wallet) VALUES ($1, $2, $3)",
                brand, partner, WALLETS[brand],
            )  # fmt: skip
        return minted

    def _leg(self, brand: str, **given: Any) -> dict[str, Any]:
        return self.world.leg(
            issuer=hexa(ISSUERS[brand]), holder=hexa(HOLDERS[brand]), loyaltyId=hexa(LOYALTY_IDS[brand]),
            nonce=hexa(self.world.nonce()), **given,
        )  # fmt: skip

    async def _register(self, brand: str, reference: str, leg: dict[str, Any]) -> UUID:
        return await self.world.register(leg, reference=f"{brand}-{reference}", brand=brand, metadata={"of": brand})


def partner_leg(brand: str, **given: Any) -> dict[str, Any]:
    return {"kind": "keyban.mint", "walletId": WALLETS[brand], "amount": "250"} | given


@pytest.fixture
async def estate(owner_dsn: str) -> AsyncIterator[Estate]:
    async with World.at(owner_dsn, RULES) as world:
        await world.add_brand(THEIRS, ISSUERS[THEIRS])
        await world.conn.executemany(
            "INSERT INTO indexer.partner_account (brand, partner) VALUES ($1, $2)",
            [(brand, partner) for brand in ISSUERS for partner in PARTNERS],
        )
        made = Estate(world, owner_dsn)
        try:
            for block, brand in ((100, MINE), (200, THEIRS)):
                await made.furnish(brand, block)
                made.logins[brand] = await made.add_login(brand)
            made.logins["reader"] = await made.add_login(None)
            async with world.conn.transaction():
                await signals.number(world.conn)
            yield made
        finally:
            for name in made.names:
                await sql_users.remove(world.conn, name)


@pytest.fixture
async def mine(estate: Estate) -> AsyncIterator[asyncpg.Connection]:
    """A session of the first brand's login."""
    connection = await asyncpg.connect(estate.logins[MINE])
    try:
        yield connection
    finally:
        await connection.close()


async def views_of(conn: asyncpg.Connection) -> list[str]:
    rows = await conn.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = 'loyalty'::regnamespace ORDER BY relname"
    )
    return [row["relname"] for row in rows]


async def everything(conn: asyncpg.Connection) -> dict[str, list[asyncpg.Record]]:
    """Every row of every view that the session can get."""
    return {view: await conn.fetch(f"SELECT * FROM loyalty.{view}") for view in await views_of(conn)}


def text_of(found: Any) -> str:
    return str([[str(value) for value in row.values()] for rows in found.values() for row in rows])


async def check_sight(estate: Estate, conn: asyncpg.Connection, where: str) -> None:
    """The session sees all of its own brand and nothing of the other's."""
    seen = await everything(conn)
    assert not estate.secrets_of(THEIRS).search(text_of(seen)), where
    assert [view for view, rows in seen.items() if not rows] == [], f"{where}: its own rows are gone"


async def test_a_reader_sees_both_brands_in_every_view_and_can_do_nothing_else(estate: Estate) -> None:
    conn = await asyncpg.connect(estate.logins["reader"])
    try:
        seen = await everything(conn)
        for brand in (MINE, THEIRS):
            blind = {view for view, rows in seen.items() if not any(brand == row.get("brand") for row in rows)}
            assert blind == OF_NO_BRAND, "put rows of both brands for these views into the estate of this test"
        assert len(await conn.fetch("SELECT * FROM loyalty.balances_of($1)", hexa(HOLDERS[THEIRS]))) == 1
        for call in (
            "SELECT loyalty.register_operation('{}')",
            f"SELECT loyalty.cancel('{estate.open[MINE]}')",
            f"SELECT loyalty.fulfil('{estate.operations[MINE]}', 1, '{{}}')",
            f"SELECT loyalty.resolve('{estate.operations[MINE]}', '{estate.operations[MINE]}', true, 'because', 'me')",
            "SELECT loyalty.claim_fulfilments('w', 1, '1 minute')",
            f"SELECT loyalty.renew_claim('{estate.claims[MINE]}', '1 minute')",
            f"SELECT loyalty.release_claim('{estate.claims[MINE]}')",
            "SELECT * FROM indexer.operation", "SELECT * FROM indexer.visible_brand", "SELECT indexer.acting_brand()",
            "UPDATE loyalty.operations SET status = 'ready'", "DELETE FROM loyalty.operations",
            "CREATE TABLE loyalty.mine ()", "CREATE TABLE indexer.mine ()",
            "SET ROLE loyalty_daemon", "SET ROLE loyalty_brand",
        ):  # fmt: skip
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await conn.execute(call)
    finally:
        await conn.close()


async def test_a_brand_sees_its_own_rows_alone_in_every_view(estate: Estate, mine: asyncpg.Connection) -> None:
    await check_sight(estate, mine, "as it comes")
    for view in await views_of(mine):
        for change in (
            f"UPDATE loyalty.{view} SET brand = brand",
            f"DELETE FROM loyalty.{view}",
            f"TRUNCATE loyalty.{view}",
        ):
            with pytest.raises(asyncpg.PostgresError):  # no right to, no such column, or no view to be written
                await mine.execute(change)
    for hidden in ("indexer.operation", "indexer.visible_brand", "indexer.brand_login", "indexer.api_token"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="schema indexer"):
            await mine.fetch(f"SELECT * FROM {hidden}")
    assert await mine.fetchval("SELECT count(*) FROM pg_stats WHERE schemaname IN ('indexer', 'loyalty')") == 0


async def test_records_of_a_partner_are_seen_and_settle_in_their_own_brand_alone(
    estate: Estate, mine: asyncpg.Connection
) -> None:
    async def of_partners(conn: asyncpg.Connection) -> dict[str, set[tuple[str, str]]]:
        return {
            view: {
                (row["brand"], row["record_id"])
                for row in await conn.fetch(f"SELECT * FROM loyalty.{view}")
                if row["provider"] != "loyfin"
            }
            for view in ("partner_orders", "settlements", "unmatched")
        }

    def records(*brands: str) -> dict[str, set[tuple[str, str]]]:
        settles = {(brand, f"{RECORDS[brand]}-keyban.mint") for brand in brands}
        nobodys = {(brand, f"{RECORDS[brand]}-qiibee.credit") for brand in brands}
        return {"partner_orders": settles | nobodys, "settlements": settles, "unmatched": nobodys}

    assert await of_partners(estate.world.conn) == records(MINE, THEIRS)
    assert await of_partners(mine) == records(MINE)
    for table in (
        "partner_transfer",
        "partner_record",
        "partner_account",
        "partner_wallet",
        "partner_hint",
        "chain_lookup",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="schema indexer"):
            await mine.fetch(f"SELECT * FROM indexer.{table}")

    # who names the other's wallet and amount may wait for it for ever: their record is no evidence of ours
    request = {"brand": MINE, "reference": "greedy", "legs": [partner_leg(THEIRS, kind="qiibee.credit")]}
    made = json.loads(await mine.fetchval("SELECT loyalty.register_operation($1)", json.dumps(request)))
    await estate.world.settle()
    assert await estate.world.state(UUID(made["id"])) == "pending"
    assert await of_partners(estate.world.conn) == records(MINE, THEIRS)


# For every function that a brand may call: calls with the other brand's things, and how each is refused. `None`: it answers,
# with nothing of the other's.
def attacks(estate: Estate) -> dict[str, list[tuple[str, str | None]]]:
    theirs, waiting, claim = estate.operations[THEIRS], estate.open[THEIRS], estate.claims[THEIRS]
    mine = estate.operations[MINE]
    leg = json.dumps(estate._leg(THEIRS))
    return {
        "balances_of": [(f"SELECT * FROM loyalty.balances_of('{hexa(HOLDERS[THEIRS])}')", None)],
        "register_operation": [
            (f"""SELECT loyalty.register_operation('{{"brand": "{THEIRS}", "reference": "a", "legs": [{leg}]}}')""", "LY403"),
            (f"""SELECT loyalty.register_operation('{{"brand": "no such", "reference": "a", "legs": [{leg}]}}')""", "LY403"),
            ("""SELECT loyalty.register_operation('{"reference": "a", "legs": []}')""", "LY403"),
            (f"""SELECT loyalty.register_operation('{{"brand": "{MINE}", "reference": "a", "legs": [{leg}]}}')""", "LY403"),
        ],
        "cancel": [(f"SELECT loyalty.cancel('{waiting}')", "LY404")],
        "claim_fulfilments": [("SELECT * FROM loyalty.claim_fulfilments('w', 1000, '1 second')", None)],
        "renew_claim": [(f"SELECT loyalty.renew_claim('{claim}', '1 minute')", "LY404")],
        "release_claim": [(f"SELECT loyalty.release_claim('{claim}')", "LY404")],
        "fulfil": [
            (f"SELECT loyalty.fulfil('{theirs}', 1, '{{}}')", "LY404"),
            (f"SELECT loyalty.fulfil('{theirs}', 1, '{{}}', '{claim}')", "LY404"),
            (f"SELECT loyalty.fulfil('{mine}', 1, '{{}}', '{claim}')", "LY404"),
        ],
    }  # fmt: skip


async def check_calls(estate: Estate, conn: asyncpg.Connection, where: str) -> None:
    callable_ = await conn.fetch(
        """
        SELECT proname FROM pg_proc WHERE pronamespace = 'loyalty'::regnamespace
          AND has_function_privilege(session_user, oid, 'EXECUTE')
        """
    )
    tried = attacks(estate)
    assert {row["proname"] for row in callable_} == set(tried), "say how this test attacks the new function"
    theirs = estate.secrets_of(THEIRS)
    for call, refusal in (each for calls in tried.values() for each in calls):
        try:
            found = {"": await conn.fetch(call)}
        except asyncpg.PostgresError as error:
            assert error.sqlstate == refusal, f"{where}: {call}: {error}"
            said = f"{error} {error.detail} {error.hint}"
            for given in theirs.findall(call):  # what the caller said itself may be said back
                said = said.replace(given, "")
            assert not theirs.search(said), where
        else:
            assert refusal is None and not theirs.search(text_of(found)), f"{where}: {call}"


async def test_a_brand_acts_on_its_own_operations_alone(estate: Estate, mine: asyncpg.Connection) -> None:
    before = await everything(estate.world.conn)
    await check_calls(estate, mine, "as it comes")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await mine.execute(
            f"SELECT loyalty.resolve('{estate.operations[MINE]}', gen_random_uuid(), true, 'because', 'me')"
        )
    after = await everything(estate.world.conn)
    for view, rows in before.items():
        theirs = [row for row in rows if row.get("brand") == THEIRS]
        assert [row for row in after[view] if row.get("brand") == THEIRS] == theirs, view
    # and what is its own, it may
    done = await mine.fetchval("SELECT loyalty.fulfil($1, 1, '{}', $2)", estate.operations[MINE], estate.claims[MINE])
    assert json.loads(done)["outcome"] == "fulfilled"
    assert "accepted" in await mine.fetchval("SELECT loyalty.cancel($1)", estate.open[MINE])
    actor = await estate.world.conn.fetchval(
        "SELECT actor FROM indexer.receipt WHERE operation_id = $1", estate.operations[MINE]
    )
    assert actor == urlsplit(estate.logins[MINE]).username


# Each leaves the session as it found it, or is the last of its test.
TRICKS = {
    "settings": """
        SET loyalty.brand = 'rose'; SET indexer.brand = 'rose'; SET row_security = off; SET application_name = 'rose';
        SET plan_cache_mode = force_generic_plan
    """,
    "the group": "SET ROLE loyalty_brand",
    "tables that shadow": """
        CREATE TEMP TABLE brand_login AS SELECT session_user::text AS login, 'rose'::text AS brand;
        CREATE TEMP TABLE brand AS SELECT 'rose'::text AS name;
        CREATE TEMP TABLE viewer AS SELECT NULL::text AS brand, true AS keeper, true AS reader;
        CREATE TEMP TABLE visible_brand AS SELECT 'rose'::text AS brand;
        SET search_path = pg_temp, loyalty, pg_catalog
    """,
    "types that shadow": "CREATE TYPE pg_temp.text AS ENUM ('rose'); CREATE DOMAIN pg_temp.uuid AS text; SET search_path = pg_temp, pg_catalog",
    "functions and operators that shadow": """
        CREATE FUNCTION pg_temp.pg_has_role(name, unknown, unknown) RETURNS boolean LANGUAGE sql AS 'SELECT true';
        CREATE FUNCTION pg_temp.pg_has_role(name, text, text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
        CREATE FUNCTION pg_temp.always(text, text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT true';
        CREATE OPERATOR pg_temp.= (LEFTARG = text, RIGHTARG = text, FUNCTION = pg_temp.always);
        SET search_path = pg_temp, pg_catalog, loyalty
    """,
}  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS)
async def test_no_trick_of_the_session_changes_what_a_brand_sees(
    estate: Estate, mine: asyncpg.Connection, trick: str
) -> None:
    # pg_has_role(name, unknown, …) cannot be declared on every version: what a session may not make, it cannot use
    for statement in filter(None, map(str.strip, TRICKS[trick].split(";"))):
        try:
            await mine.execute(statement)
        except asyncpg.PostgresError as error:
            assert "unknown" in statement, f"{statement}: {error}"
    await check_sight(estate, mine, trick)
    await check_calls(estate, mine, trick)


async def test_no_other_identity_can_be_taken(estate: Estate, mine: asyncpg.Connection) -> None:
    theirs = urlsplit(estate.logins[THEIRS]).username
    owner = await estate.world.conn.fetchval("SELECT session_user::text")
    for role in (theirs, owner, "loyalty_reader", "loyalty_daemon", "postgres"):
        for how in (f'SET ROLE "{role}"', f'SET SESSION AUTHORIZATION "{role}"', f'GRANT "{role}" TO SESSION_USER'):
            with pytest.raises(
                (asyncpg.InsufficientPrivilegeError, asyncpg.InvalidParameterValueError, asyncpg.UndefinedObjectError)
            ):
                await mine.execute(how)
    await check_sight(estate, mine, "after trying to be somebody else")


async def test_a_leaky_condition_sees_no_other_brands_row(estate: Estate, mine: asyncpg.Connection) -> None:
    """security_barrier: a cheap function of the caller's is not tried on rows that the view keeps from it."""
    told: list[str] = []
    mine.add_log_listener(lambda _conn, message: told.append(str(message)))
    await mine.execute(
        """
        CREATE FUNCTION pg_temp.leak(said text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001 AS
        $$ BEGIN RAISE NOTICE '%', said; RETURN true; END $$
        """
    )
    theirs = estate.secrets_of(THEIRS)
    for view in await views_of(mine):
        columns = await mine.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0", f"loyalty.{view}"
        )
        for said in ("v::text", *(f"v.{name}::text" for (name,) in columns)):
            await mine.fetch(f"SELECT * FROM loyalty.{view} v WHERE pg_temp.leak({said})")
        try:  # an error's words quote the value that could not be read
            await mine.fetch(f"SELECT * FROM loyalty.{view} v WHERE (v::text)::int > 0")
        except asyncpg.PostgresError as error:
            told.append(str(error))
        if view not in OF_NO_BRAND:
            assert await mine.fetch(f"SELECT 1 / (brand <> '{THEIRS}')::int FROM loyalty.{view}")
    assert told and [said for said in told if theirs.search(said)] == []


async def test_prepared_statements_and_cursors_keep_to_the_login(estate: Estate, mine: asyncpg.Connection) -> None:
    await mine.execute("SET plan_cache_mode = force_generic_plan")
    theirs = estate.secrets_of(THEIRS)
    for view in set(await views_of(mine)) - OF_NO_BRAND:
        prepared = await mine.prepare(f"SELECT * FROM loyalty.{view} WHERE brand = $1")
        assert await prepared.fetch(THEIRS) == []
        assert not theirs.search(text_of({view: await prepared.fetch(MINE)}))
        async with mine.transaction():
            cursor = await mine.cursor(f"SELECT * FROM loyalty.{view}")
            await mine.execute("SET LOCAL ROLE loyalty_brand")
            assert not theirs.search(text_of({view: await cursor.fetch(1000)}))


async def test_notifications_carry_no_data(estate: Estate, mine: asyncpg.Connection, database: Database) -> None:
    heard: list[tuple[str, str]] = []
    for topic in TOPICS:
        await mine.add_listener(channel(topic), lambda _c, _p, name, payload: heard.append((name, payload)))
    other = await asyncpg.connect(estate.logins[THEIRS])
    try:
        await other.execute("SELECT loyalty.fulfil($1, 1, '{}')".replace("$1", f"'{estate.operations[THEIRS]}'"))
        await estate.world.settle()
        async with database.pool.acquire() as conn, conn.transaction():
            await signals.number(conn)
        async with asyncio.timeout(60):
            while {name for name, _ in heard} < {channel("registered"), channel("settled"), channel("numbered")}:
                await mine.fetchval("SELECT 1")
                await asyncio.sleep(0.02)
    finally:
        await other.close()
    assert {payload for _, payload in heard} == {""}


async def test_the_daemons_sessions_name_no_brand(mine: asyncpg.Connection, database: Database) -> None:
    # anybody may read how the sessions of others call themselves
    async with Leases(database).hold(f"poll:keyban:{THEIRS}"), Leases(database).hold("follow:8453"):
        names = await mine.fetch("SELECT application_name FROM pg_stat_activity WHERE datname = current_database()")
    told = {row["application_name"] for row in names}
    assert {"indexer:poll:keyban", "indexer:follow:8453"} <= told
    assert not [name for name in told if THEIRS in name]


async def test_a_login_that_is_tied_to_no_brand_sees_and_does_nothing(estate: Estate) -> None:
    url = await estate.add_login(MINE)
    conn = await asyncpg.connect(url)
    try:
        assert await conn.fetchval("SELECT count(*) FROM loyalty.operations")
        await estate.world.conn.execute("DELETE FROM indexer.brand_login WHERE login = $1", urlsplit(url).username)
        seen = await everything(conn)
        assert {view for view, rows in seen.items() if rows} == OF_NO_BRAND
        assert await conn.fetch("SELECT * FROM loyalty.balances_of($1)", hexa(HOLDERS[MINE])) == []
        for call in (
            f"SELECT loyalty.cancel('{estate.open[MINE]}')",
            "SELECT * FROM loyalty.claim_fulfilments('w', 1, '1 minute')",
            f"SELECT loyalty.fulfil('{estate.operations[MINE]}', 1, '{{}}')",
            f"""SELECT loyalty.register_operation('{{"brand": "{MINE}", "reference": "a", "legs": []}}')""",
        ):
            with pytest.raises(asyncpg.PostgresError) as refused:
                await conn.execute(call)
            assert refused.value.sqlstate == "LY403"
        await estate.world.conn.execute(
            "INSERT INTO indexer.brand_login (login, brand) VALUES ($1, $2)", urlsplit(url).username, MINE
        )
    finally:
        await conn.close()


# --------------------------------------------------------------------------- hostile words


HOSTILE = [
    "x'; DROP TABLE indexer.operation; --", '"; DELETE FROM loyalty.operations; --', "$$; SELECT 1; $$", "%s %I %n {0}",
    "\\u0000 \\x00 \\", "' OR brand <> '", "☃ \U0001f600 \u202e", "a/b/../c", "$1",
]  # fmt: skip


async def test_hostile_words_are_words(estate: Estate, mine: asyncpg.Connection) -> None:
    for word in HOSTILE:
        request = {"brand": MINE, "reference": word, "metadata": {word: word}, "legs": [estate._leg(MINE)]}
        made = json.loads(await mine.fetchval("SELECT loyalty.register_operation($1)", json.dumps(request)))
        row = await mine.fetchrow("SELECT id, metadata FROM loyalty.operations WHERE reference = $1", word)
        assert row is not None and str(row["id"]) == made["id"] and json.loads(row["metadata"]) == {word: word}
        assert await mine.fetch("SELECT * FROM loyalty.claim_fulfilments($1, 1, '1 second')", word) == []
        with pytest.raises(asyncpg.PostgresError, match="0x and 40 hex digits"):
            await mine.fetch("SELECT * FROM loyalty.balances_of($1)", word)
    await check_sight(estate, mine, "after hostile words")


async def test_what_is_too_long_or_no_text_is_refused_in_words(estate: Estate, mine: asyncpg.Connection) -> None:
    megabyte = "x" * 1_000_000
    good = {"brand": MINE, "reference": "a", "legs": [estate._leg(MINE)]}
    for change, code in (
        ({"reference": megabyte}, "LY422"), ({"reference": ""}, "LY422"), ({"reference": "a\nb"}, "LY422"), ({"reference": 7}, "LY422"),
        ({"brand": megabyte}, "LY403"), ({"metadata": {"a": megabyte}}, "LY422"), ({megabyte: 1}, "LY422"),
        ({"requestedAt": megabyte}, "LY422"), ({"legs": [estate._leg(MINE)] * 17}, "LY422"), ({"legs": megabyte}, "LY422"),
        ({"legs": [estate._leg(MINE) | {"nonce": "0x" + megabyte}]}, "LY422"), ({"legs": [{megabyte: 1}]}, "LY422"),
        ({"legs": [estate._leg(MINE) | {"amount": "9" * 1_000_000}]}, "LY422"), ({"legs": [estate._leg(MINE) | {"kind": megabyte}]}, "LY422"),
    ):  # fmt: skip
        with pytest.raises(asyncpg.PostgresError) as refused:
            await mine.fetchval("SELECT loyalty.register_operation($1)", json.dumps(good | change))
        assert refused.value.sqlstate == code, change.keys()
        assert len(str(refused.value)) < 500
    for receipt in (json.dumps({"a": megabyte}), "[]", '"text"', "7"):
        with pytest.raises(asyncpg.PostgresError) as refused:
            await mine.fetchval("SELECT loyalty.fulfil($1, 1, $2)", estate.operations[MINE], receipt)
        assert refused.value.sqlstate == "LY422"
    for nothing in ("null", "[]", "7", '"text"'):
        with pytest.raises(asyncpg.PostgresError) as refused:
            await mine.fetchval("SELECT loyalty.register_operation($1)", nothing)
        assert refused.value.sqlstate == "LY400"
    # a NUL is no text in PostgreSQL: refused before any function of ours
    with pytest.raises(asyncpg.UntranslatableCharacterError, match="Unicode escape"):
        await mine.fetchval("SELECT loyalty.register_operation($1)", json.dumps(good | {"reference": "a\0b"}))
    with pytest.raises(asyncpg.CharacterNotInRepertoireError):
        await mine.fetchval("SELECT * FROM loyalty.claim_fulfilments($1, 1, '1 second')", "a\0b")


# --------------------------------------------------------------------------- making and ending logins


async def test_logins_are_made_listed_and_ended(estate: Estate, database: Database) -> None:
    owner = estate.world.conn
    url = await estate.add_login(THEIRS)
    name = str(urlsplit(url).username)
    conn = await asyncpg.connect(url)
    assert {(user.name, user.brand) for user in await sql_users.list_users(owner)} >= {
        (name, THEIRS),
        (str(urlsplit(estate.logins["reader"]).username), None),
    }
    limits = await owner.fetchrow("SELECT rolconnlimit, rolcreaterole, rolsuper FROM pg_roles WHERE rolname = $1", name)
    assert tuple(limits or ()) == (sql_users.CONNECTIONS, False, False)
    for wrong, brand, said in (
        (name, THEIRS, "already"), ("test_" + secrets.token_hex(4), "violet", "no brand"), ("Robert'); --", MINE, "no name"),
        ("pg_" + secrets.token_hex(4), MINE, "pg_"), ("x" * 64, MINE, "no name"),
    ):  # fmt: skip
        with pytest.raises(sql_users.BadSqlUser, match=said):
            await sql_users.add(owner, wrong, brand)
    async with database.pool.acquire() as daemon:
        with pytest.raises(sql_users.BadSqlUser, match="owner"):
            await sql_users.add(daemon, "test_" + secrets.token_hex(4), MINE)
    for other in ("postgres", "indexer", "nobody"):
        with pytest.raises(sql_users.BadSqlUser):
            await sql_users.remove(owner, other)
    await sql_users.remove(owner, name)
    estate.names.remove(name)
    with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError, asyncpg.InterfaceError)):
        await conn.fetchval("SELECT 1")
    await conn.close()
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
        await asyncpg.connect(url)


async def test_the_command_makes_a_login_that_works_and_says_what_is_wrong(
    estate: Estate, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "indexer.toml"
    config.write_text(f'state_dir = "{tmp_path}"\n[[brands]]\nname = "{MINE}"\nissuers = ["{hexa(ISSUER)}"]\n')

    async def run(*words: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, app, ["sql-user", *words, "--config", str(config)])

    name = f"test_{secrets.token_hex(6)}"
    monkeypatch.setenv("INDEXER_DATABASE__URL", dsn)
    as_daemon = await run("add", name, "--brand", MINE)
    assert isinstance(as_daemon.exception, Failure) and "as it: INDEXER_DATABASE__URL=" in str(as_daemon.exception)
    # an owner who stands in the query: none of that is in what the brand is given
    parts = urlsplit(estate.owner_dsn)
    owner, _, word = parts.netloc.rpartition("@")[0].partition(":")
    said = "&".join(filter(None, (f"user={owner}", f"pass%77ord={word}" if word else "", parts.query)))
    spelled = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=said))
    monkeypatch.setenv("INDEXER_DATABASE__URL", spelled)
    for neither in ((), ("--brand", MINE, "--reader")):
        wrong = await run("add", name, *neither)
        assert isinstance(wrong.exception, Failure) and wrong.exception.code == USAGE
    made = await run("add", name, "--brand", MINE, "--connections", "1", "--json")
    estate.names.append(name)
    assert made.exit_code == 0, made.output
    url = json.loads(made.stdout)["url"]
    assert owner not in url and (not word or word not in url)
    conn = await asyncpg.connect(url)
    try:
        await check_sight(estate, conn, "made by the command")
        with pytest.raises(asyncpg.TooManyConnectionsError):
            await asyncpg.connect(url)
    finally:
        await conn.close()
    listed = json.loads((await run("list", "--json")).stdout)["data"]
    assert {"name": name, "brand": MINE} in [{"name": row["name"], "brand": row["brand"]} for row in listed]
    assert (await run("remove", name)).exit_code == 0
    estate.names.remove(name)


# --------------------------------------------------------------------------- three roles


async def test_an_owner_who_may_not_create_roles_migrates_where_the_groups_are(postgres: Postgres) -> None:
    """What a managed PostgreSQL gives: a database of one's own, groups that somebody else made, and nothing more."""
    plain = f"test_{secrets.token_hex(6)}"
    async with postgres.fresh_database(migrated=False) as name:
        owner = await asyncpg.connect(postgres.owner_url(name))
        try:
            await owner.execute(f"CREATE ROLE {plain} LOGIN PASSWORD 'plain'; GRANT {plain} TO CURRENT_USER")
            await owner.execute(f"GRANT CREATE ON DATABASE {name} TO {plain}")
            parts = urlsplit(postgres.owner_url(name))
            url = urlunsplit(parts._replace(netloc=f"{plain}:plain@{parts.netloc.rpartition('@')[2]}"))
            await schema.migrate(url)
            conn = await asyncpg.connect(url)
            try:
                await conn.execute(f"INSERT INTO indexer.brand (name) VALUES ('{MINE}')")
                request = {"brand": MINE, "reference": "a", "legs": []}
                with pytest.raises(
                    asyncpg.PostgresError, match="1 to 16"
                ):  # it acts for every brand, and no further than its words
                    await conn.execute("SELECT loyalty.register_operation($1::jsonb)", json.dumps(request))
                assert await conn.fetchval("SELECT keeper FROM indexer.viewer")
                with pytest.raises(sql_users.BadSqlUser, match="CREATEROLE"):
                    await sql_users.add(conn, f"test_{secrets.token_hex(6)}", MINE)
                # and where the groups are not, it is told what it needs
                module = spec_from_file_location("first", schema.migrations_folder() / "versions" / "0001_first.py")
                assert module is not None and module.loader is not None
                first = module_from_spec(module)
                module.loader.exec_module(first)
                with pytest.raises(
                    asyncpg.InsufficientPrivilegeError, match=f"CREATEROLE.*superuser.*TO {plain} WITH ADMIN"
                ):
                    await conn.execute(first.CREATE_ROLE.format(role=f"test_{secrets.token_hex(6)}"))
            finally:
                await conn.close()
            await owner.execute(f"DROP OWNED BY {plain} CASCADE; DROP ROLE {plain}")
        finally:
            await owner.close()
