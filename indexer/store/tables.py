"""Schema `indexer`, declared once: what the daemon stores, and why each index exists.

Private to the product: other programs read schema `loyalty` (`contract/*.sql`). Addresses and hashes are `bytea`, chain
amounts `numeric(78,0)` (a uint256 has up to 78 digits), block times `bigint` milliseconds, machine times `timestamptz`.
Alembic's migrations are tested against this declaration.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, INT8MULTIRANGE, JSONB, TIMESTAMP, UUID

metadata = MetaData(
    schema="indexer",
    naming_convention={
        "pk": "%(table_name)s_pk",
        "fk": "%(table_name)s_%(column_0_N_name)s_fk",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    },
)

Uint256 = Numeric(78, 0)
Time = TIMESTAMP(timezone=True)
NOW = text("clock_timestamp()")


def _orphans(table: str) -> Index:
    """What a reorganisation undid, to be forgotten: next to nothing, so next to free."""
    return Index(f"{table}_orphan_idx", "chain_id", "block_number", postgresql_where=text("NOT canonical"))


def _log_columns() -> list[Column[object]]:
    """Where a log was seen: the columns that every table of decoded logs begins with."""
    return [
        Column("chain_id", BigInteger, nullable=False),
        Column("block_number", BigInteger, nullable=False),
        Column("log_index", Integer, nullable=False),
        Column("block_hash", LargeBinary, nullable=False),
        Column("block_time_ms", BigInteger, nullable=False),
        Column("tx_hash", LargeBinary, nullable=False),
        Column("tx_index", Integer, nullable=False),
        Column("emitter", LargeBinary, nullable=False),
        Column("canonical", Boolean, nullable=False, server_default=text("true")),
    ]


# --------------------------------------------------------------------------- the installation

instance = Table(
    "instance",
    metadata,
    Column("one", Boolean, primary_key=True, server_default=text("true")),
    Column("stream", UUID, nullable=False),  # renewed by `indexer restored`: cursors of another history answer 409
    Column("created_at", Time, nullable=False, server_default=NOW),
)

lease = Table(
    "lease",
    metadata,
    Column("task", Text, primary_key=True),
    Column("holder", UUID),
    Column("epoch", BigInteger, nullable=False, server_default=text("0")),
    # [{"pid": 123, "started": "…"}]: the backends that the holder writes with; a take-over terminates them first
    Column("sessions", JSONB, nullable=False, server_default=text("'[]'::jsonb")),
    Column("until", Time),
    Column("released_at", Time),  # by its last holder; null while it is held, and where it lapsed
)

brand = Table(
    "brand",
    metadata,
    Column("name", Text, primary_key=True),
    Column("configured_at", Time, nullable=False, server_default=NOW),
    Column("unmatched_since", Time, nullable=False, server_default=NOW),
    Column("last_sequence", BigInteger, nullable=False, server_default=text("0")),  # the sequencer's counter
    Column("active", Boolean, nullable=False, server_default=text("true")),  # still in the configuration
    # signals up to here may be gone: the floor that a retention of signals moves
    Column("forgotten_sequence", BigInteger, nullable=False, server_default=text("0")),
    # after `indexer restored`: what settles by evidence of before is not claimable until a person says so
    Column("held_before", Time),
    Column("rules", Text),  # fingerprint of the settling rules that its open operations were last looked at under
)

issuer = Table(
    "issuer",
    metadata,
    Column("address", LargeBinary, primary_key=True),  # an issuer belongs to one brand
    Column("brand", Text, ForeignKey("brand.name"), nullable=False),
)

api_token = Table(
    "api_token",
    metadata,
    Column("id", UUID, primary_key=True),
    Column("hash", LargeBinary, nullable=False, unique=True),  # sha256 of the token: the token itself is shown once
    Column("name", Text, nullable=False),
    Column("brand", Text, ForeignKey("brand.name")),  # null: every brand
    Column("scopes", ARRAY(Text), nullable=False),
    Column("created_at", Time, nullable=False, server_default=NOW),
    Column("revoked_at", Time),
)

# A SQL login of schema `loyalty` and the brand whose rows it sees: session_user is looked up here, and nothing else decides.
# Written by the owner (`indexer sql-user`), which makes the roles too; the daemon may only read it.
brand_login = Table(
    "brand_login",
    metadata,
    Column("login", Text, primary_key=True),
    Column("brand", Text, ForeignKey("brand.name"), nullable=False),
    Column("created_at", Time, nullable=False, server_default=NOW),
)

# --------------------------------------------------------------------------- facts: a chain

chain = Table(
    "chain",
    metadata,
    Column("chain_id", BigInteger, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("genesis_hash", LargeBinary),
    Column("head_number", BigInteger),  # the cursor: every block up to here, from `anchor` on, is in head coverage
    Column("head_hash", LargeBinary),
    Column("head_time_ms", BigInteger),
    Column("head_at", Time),
    Column("safe_number", BigInteger),
    Column("safe_hash", LargeBinary),
    Column("safe_time_ms", BigInteger),
    Column("safe_at", Time),
    Column("finalized_number", BigInteger),
    Column("finalized_hash", LargeBinary),
    Column("finalized_time_ms", BigInteger),
    Column("finalized_at", Time),
    Column("mode", Text),  # 'socket' | 'polling'
    # epoch of the follower's lease that last linked a head to what is stored: facts of an epoch before may be undone unseen; -1
    # while its endpoints do not agree
    Column("linked_epoch", BigInteger),
    Column("schedule", JSONB),  # {"l2_time": s, "first_fast_block": n} where blocks follow Base's schedule
    Column(
        "quorum", Integer, nullable=False, server_default=text("1")
    ),  # endpoints that must agree before a signal leaves
    # 'required' | 'where_possible' | 'off': what evidence needs, beside witnesses, to count above `included`
    Column("proof", Text, nullable=False, server_default=text("'off'")),
    Column("agreed_number", BigInteger),  # the highest block of ours that so many were seen to hold …
    Column("agreed_at", Time),  # … and when: with a quorum above one, signals wait while it is old
    Column("endpoints", JSONB),  # how each endpoint stood at the last look (`Pool.told`), and whether it leads
    Column("latch", JSONB),  # a finality violation, both sides; no signals while it is set
    Column("unmatched_cursor", BigInteger),  # evidence up to this block was looked at for settlement.unmatched
    Column("history_complete", Boolean, nullable=False, server_default=text("false")),
    Column("active", Boolean, nullable=False, server_default=text("true")),
)

# Headers above finalized (all of them when following a socket; range ends and blocks with our events when polling),
# those of blocks with our events, and a checkpoint every thousand below.
block = Table(
    "block",
    metadata,
    Column("chain_id", BigInteger, nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("parent_hash", LargeBinary, nullable=False),
    Column("time_ms", BigInteger, nullable=False),
    Column("canonical", Boolean, nullable=False, server_default=text("true")),
    PrimaryKeyConstraint("chain_id", "number", "hash"),
    Index("block_canonical_idx", "chain_id", "number", unique=True, postgresql_where=text("canonical")),
    Index("block_orphan_idx", "chain_id", "number", postgresql_where=text("NOT canonical")),
)

# What speaks for a block with claimed events: who was seen to hold it, and what its receipts prove.
attestation = Table(
    "attestation",
    metadata,
    Column("chain_id", BigInteger, nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("witnesses", ARRAY(Text), nullable=False, server_default=text("'{}'::text[]")),  # endpoints, by name
    Column("proof", Text),  # 'receipts_root' | 'cannot_verify'; null: not tried, or not yet with success
    Column("reason", Text),  # why it cannot be verified, or could not yet
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("next_at", Time),  # when to look at it; null: nobody asks, or all is known
    PrimaryKeyConstraint("chain_id", "number", "hash"),
    Index("attestation_due_idx", "chain_id", "next_at", postgresql_where=text("next_at IS NOT NULL")),
)

emitter = Table(
    "emitter",
    metadata,
    Column("chain_id", BigInteger, nullable=False),
    Column("address", LargeBinary, nullable=False),
    Column("kind", Text, nullable=False),  # 'factory' | 'hub' | 'token'
    Column("factory", LargeBinary, nullable=False),  # itself, for a factory
    Column("start_block", BigInteger, nullable=False),
    Column("followed_from", BigInteger),  # from this block on it is in the follower's filter; null: not yet
    Column("active", Boolean, nullable=False, server_default=text("true")),
    PrimaryKeyConstraint("chain_id", "address"),
)

# What was learnt of an endpoint's limits, kept over restarts. Known by a salted fingerprint of its URL: no key is in here.
endpoint_limits = Table(
    "endpoint_limits",
    metadata,
    Column("chain_id", BigInteger, nullable=False),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("endpoint", Text, nullable=False),  # the name that is shown
    Column("limits", JSONB, nullable=False),
    Column("firm_at", Time, nullable=False, server_default=NOW),  # when those that only tighten last changed
    PrimaryKeyConstraint("chain_id", "fingerprint"),
)

# For which factories a configured address may speak: a factory for itself, a hub for those that name it, one address for
# both. What is covered of an address is covered for all of its roles: a new role begins without coverage.
emitter_role = Table(
    "emitter_role",
    metadata,
    Column("chain_id", BigInteger, nullable=False),
    Column("factory", LargeBinary, nullable=False),
    Column("address", LargeBinary, nullable=False),
    Column("start_block", BigInteger, nullable=False),  # the factory's
    PrimaryKeyConstraint("chain_id", "factory", "address"),
)

# Which blocks were asked for, of whom, with which verdict. One row per verdict, the ranges as one multirange.
# emitter '\x' is the follower's lane: it speaks for each emitter from that emitter's `followed_from` on.
coverage = Table(
    "coverage",
    metadata,
    Column("chain_id", BigInteger, nullable=False),
    Column("emitter", LargeBinary, nullable=False),
    # 'receipts_root' | 'gate' | 'second_endpoint' | 'second_look' | 'unverified'
    Column("verdict", Text, nullable=False),
    Column("blocks", INT8MULTIRANGE, nullable=False),
    PrimaryKeyConstraint("chain_id", "emitter", "verdict"),
)

# Which endpoint the blocks of a chain were first read from: a second look at them asks another.
first_reading = Table(
    "first_reading",
    metadata,
    Column("chain_id", BigInteger, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("blocks", INT8MULTIRANGE, nullable=False),
    PrimaryKeyConstraint("chain_id", "endpoint"),
)

# What a person asked to have read again (audit, replay) or decoded again (redecode): history carries it out, a few windows
# at a time, and writes down how far it is in the transaction of what it stored.
reread = Table(
    "reread",
    metadata,
    Column("id", UUID, primary_key=True, server_default=text("gen_random_uuid()")),
    Column("chain_id", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),  # 'audit' | 'repair' (an audit that repairs) | 'replay' | 'redecode'
    Column("from_block", BigInteger, nullable=False),
    Column("to_block", BigInteger),  # null: finalized, as it is when the work begins
    Column("abi", LargeBinary),  # fingerprint of the events that the asker reads; null: whatever the daemon reads
    # 'waiting' | 'running' | 'done' | 'failed' | 'cancelled'
    Column("state", Text, nullable=False, server_default=text("'waiting'")),
    Column("next_block", BigInteger),  # all below it, from from_block on, is done
    Column("report", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("trouble", Text),  # why it failed, or what it waits for
    Column("requested_at", Time, nullable=False, server_default=NOW),
    Column("begun_at", Time),
    Column("ended_at", Time),
    Index("reread_open_idx", "chain_id", "requested_at", postgresql_where=text("state IN ('waiting', 'running')")),
    Index("reread_ended_idx", "ended_at", postgresql_where=text("ended_at IS NOT NULL")),  # retention
)

programme = Table(
    "programme",
    metadata,
    *_log_columns(),
    Column("factory", LargeBinary, nullable=False),
    Column("issuer", LargeBinary, nullable=False),
    Column("loyalty_id", LargeBinary, nullable=False),
    Column("loyalty", LargeBinary, nullable=False),  # the programme's token contract
    Column("name", Text, nullable=False),
    Column("symbol", Text, nullable=False),
    Column("media", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("contract_uri", Text, nullable=False),
    Column("token_uri", Text, nullable=False),
    PrimaryKeyConstraint("chain_id", "block_number", "log_index", "block_hash"),
    Index("programme_token_idx", "chain_id", "loyalty"),
    Index("programme_issuer_idx", "chain_id", "issuer", "loyalty_id"),
    _orphans("programme"),
)

# PointsIssued and PointsRedeemed: what settles a Loyfin leg.
movement = Table(
    "movement",
    metadata,
    *_log_columns(),
    Column("kind", Text, nullable=False),  # 'loyfin.issuance' | 'loyfin.redemption'
    Column("factory", LargeBinary, nullable=False),
    Column("issuer", LargeBinary, nullable=False),
    Column("loyalty_id", LargeBinary, nullable=False),
    Column("loyalty", LargeBinary, nullable=False),
    Column("holder", LargeBinary, nullable=False),
    Column("bucket", Uint256, nullable=False),  # tokenId in the event, expiresAt in the API: 0 never expires
    Column("amount", Uint256, nullable=False),
    Column("nonce", LargeBinary, nullable=False),
    Column("operation_hash", LargeBinary),  # null for the zero hash
    Column("data", LargeBinary, nullable=False),
    # the primary key serves ranges of blocks: what a commit or a reorganisation touched
    PrimaryKeyConstraint("chain_id", "block_number", "log_index", "block_hash"),
    Index("movement_nonce_idx", "nonce"),  # the event of a leg with a nonce
    Index("movement_operation_hash_idx", "operation_hash", postgresql_where=text("operation_hash IS NOT NULL")),
    Index("movement_holder_idx", "holder", "loyalty"),  # balances of a wallet, and matching by wallet and amount
    _orphans("movement"),
)

# LoyaltyTransfer, LoyaltyBatchTransfer (an item a row), and ERC-1155's own where a token emits them.
transfer = Table(
    "transfer",
    metadata,
    *_log_columns(),
    Column("item", Integer, nullable=False),  # position in a batch; 0 for a single transfer
    Column("source", Text, nullable=False),  # 'loyfin' | 'erc1155'
    Column("loyalty", LargeBinary, nullable=False),
    Column("operator", LargeBinary, nullable=False),
    Column("sender", LargeBinary, nullable=False),
    Column("recipient", LargeBinary, nullable=False),
    Column("bucket", Uint256, nullable=False),
    Column("amount", Uint256, nullable=False),
    PrimaryKeyConstraint("chain_id", "block_number", "log_index", "item", "block_hash"),
    Index("transfer_sender_idx", "sender", "loyalty"),
    Index("transfer_recipient_idx", "recipient", "loyalty"),
    Index("transfer_token_idx", "chain_id", "loyalty", "source"),
    _orphans("transfer"),
)

# Metadata, admin, royalty and capability events: by name, with their arguments.
programme_event = Table(
    "programme_event",
    metadata,
    *_log_columns(),
    Column("loyalty", LargeBinary, nullable=False),
    Column("event", Text, nullable=False),
    Column("args", JSONB, nullable=False),  # bytes as 0x hex, integers as decimal strings
    PrimaryKeyConstraint("chain_id", "block_number", "log_index", "block_hash"),
    Index("programme_event_token_idx", "chain_id", "loyalty", "event"),
    _orphans("programme_event"),
)

# Logs of known emitters that we could not read (yet), or only in part: `indexer redecode` reads them again.
raw_log = Table(
    "raw_log",
    metadata,
    *_log_columns(),
    Column("topics", ARRAY(LargeBinary), nullable=False),
    Column("data", LargeBinary, nullable=False),
    Column("reason", Text, nullable=False),  # 'unknown_topic' | 'undecodable' | 'oversized'
    Column("error", Text),
    PrimaryKeyConstraint("chain_id", "block_number", "log_index", "block_hash"),
    _orphans("raw_log"),
)

# --------------------------------------------------------------------------- facts: the partners

# The accounts at partners that the configuration names (for registration: no account, no leg), and each poller's own state.
partner_account = Table(
    "partner_account",
    metadata,
    Column("brand", Text, ForeignKey("brand.name"), nullable=False),
    Column("partner", Text, nullable=False),  # 'loyfin' | 'keyban' | 'qiibee'
    Column("active", Boolean, nullable=False, server_default=text("true")),  # still in the configuration
    Column("state", JSONB, nullable=False, server_default=text("'{}'::jsonb")),  # the poller's cursors and first looks
    Column("stopped_at", Time),  # the partner refused the credential (401, 403): not asked again until a restart
    Column("stopped_reason", Text),
    Column("polled_at", Time),  # last answer that could be used
    Column("problem", Text),  # what the last attempt met with; null: it went well
    PrimaryKeyConstraint("brand", "partner"),
)

# What a partner said, less its personal data, as often as it changed.
partner_record = Table(
    "partner_record",
    metadata,
    Column("brand", Text, nullable=False),
    Column("partner", Text, nullable=False),
    Column("record_id", Text, nullable=False),
    Column("version", Integer, nullable=False),  # from 1
    Column("raw", JSONB, nullable=False),  # scrubbed before it comes here
    Column("seen_at", Time, nullable=False, server_default=NOW),
    Column("current", Boolean, nullable=False, server_default=text("true")),  # the last version
    Column(
        "wallet", Text, nullable=False, server_default=text("''")
    ),  # whose listing holds it; '' is the whole account's
    Column("time_ms", BigInteger),  # the record's own time
    Column("after_ms", BigInteger),  # the last look that lacked it; null: it was there at the first
    Column("missing", SmallInteger, nullable=False, server_default=text("0")),  # full sweeps in a row that lacked it
    Column(
        "swept", BigInteger, nullable=False, server_default=text("0")
    ),  # the last long walk that showed it, by its number
    PrimaryKeyConstraint("brand", "partner", "record_id", "version"),
    # sweeps: what a listing should still hold
    Index("partner_record_wallet_idx", "brand", "partner", "wallet", "time_ms", postgresql_where=text("current")),
    Index("partner_record_current_idx", "brand", "partner", "record_id", unique=True, postgresql_where=text("current")),
    Index("partner_record_age_idx", "seen_at", postgresql_where=text("NOT current")),  # retention of old versions
)

# When each wallet was looked at, where a partner lists by wallet.
partner_wallet = Table(
    "partner_wallet",
    metadata,
    Column("brand", Text, nullable=False),
    Column("partner", Text, nullable=False),
    Column("wallet", Text, nullable=False),
    Column("first_look_at", Time),  # when the first complete look at it began
    Column("last_look_at", Time),  # … and the last
    Column("swept_at", Time),  # the last complete look that counted for what is missing
    Column(
        "active_at", Time, nullable=False, server_default=NOW
    ),  # last news of it: a new leg, a new or changed record
    Column("next_look_at", Time),  # with nothing open: when to look again all the same
    PrimaryKeyConstraint("brand", "partner", "wallet"),
    Index(
        "partner_wallet_due_idx", "brand", "partner", "next_look_at", postgresql_where=text("next_look_at IS NOT NULL")
    ),
)

# What settles a partner leg: a Keyban order, one side of a qiibee transaction. Written by the pollers, judged by the reconciler.
partner_transfer = Table(
    "partner_transfer",
    metadata,
    # model/evidence.py: of partner, kind, record and wallet, so that two brands that can read one record hold one piece of evidence
    Column("id", UUID, primary_key=True),
    Column("brand", Text, ForeignKey("brand.name"), nullable=False),
    Column("partner", Text, nullable=False),
    Column("kind", Text, nullable=False),  # 'keyban.mint' | 'keyban.burn' | 'qiibee.credit' | 'qiibee.debit'
    Column("record_id", Text, nullable=False),
    Column("wallet", Text, nullable=False),
    Column("token", Text),
    Column("amount", Uint256),  # base units; null: not known (queued, or a fraction without configured decimals)
    Column("amount_text", Text),  # as received
    Column("time_ms", BigInteger),  # the record's own time; null: it has none, and first_seen_at stands for it
    Column("after_ms", BigInteger),  # where it has no time of its own: time_ms is that of the last look that lacked it
    # without a time of its own and there at the first look at its wallet: settles only by a person's decision
    Column("undated", Boolean, nullable=False, server_default=text("false")),
    # 'pending' (no place on a ledger yet), 'included' (a place, and no word on success), 'succeeded', 'failed' (final: it says so)
    Column("status", Text, nullable=False),
    Column("network", Text),  # as the partner calls it
    Column(
        "chain_id", BigInteger
    ),  # the network is a chain that we follow: counts only after our own look (chain_lookup)
    Column("tx_hash", Text),  # as received; 0x lower case where chain_id is set
    Column(
        "tx_hashes", ARRAY(Text), nullable=False, server_default=text("'{}'::text[]")
    ),  # all, where there are several
    Column("block_number", Uint256),  # the partner's word
    # where chain_id is null: the transfers that it names there; what another record names too is one movement
    Column("transfers", ARRAY(Text), nullable=False, server_default=text("'{}'::text[]")),
    Column("first_seen_at", Time, nullable=False, server_default=NOW),
    Column("settled_at", Time),  # since when it is included or succeeded without a change of status, hash or amount
    Column(
        "seen_at", Time, nullable=False, server_default=NOW
    ),  # last read like this; kept up for what may not stand for long yet
    # of a record that another wallet's listing showed first: full sweeps of its own wallet in a row that lacked it
    Column("missing", SmallInteger, nullable=False, server_default=text("0")),
    Column("withdrawn_at", Time),  # missing from two full sweeps; null again when it returns
    Column("checked", JSONB),  # what a cross-check said
    Column(
        "unmatched_look_at", Time, server_default=NOW
    ),  # when to look again whether nothing claims it; null: told or settled
    Index("partner_transfer_record_idx", "brand", "partner", "record_id"),
    # matching: the records that could settle a leg
    Index("partner_transfer_wallet_idx", "brand", "wallet", "amount", "kind"),
    # a look-up's answer
    Index(
        "partner_transfer_tx_idx", "tx_hashes", postgresql_using="gin", postgresql_where=text("chain_id IS NOT NULL")
    ),
    # other records that name the same transfer
    Index(
        "partner_transfer_named_idx",
        "transfers",
        postgresql_using="gin",
        postgresql_where=text("transfers <> '{}'::text[]"),
    ),
    Index(
        "partner_transfer_unmatched_idx", "unmatched_look_at", postgresql_where=text("unmatched_look_at IS NOT NULL")
    ),
    Index("partner_transfer_page_idx", "brand", "first_seen_at", "id"),
)

# What Loyfin's API says of a signed action: a hint that ends nothing, since the action may still be mined.
partner_hint = Table(
    "partner_hint",
    metadata,
    Column("brand", Text, ForeignKey("brand.name"), nullable=False),
    Column("partner", Text, nullable=False),
    Column("record_id", Text, nullable=False),
    Column("chain_id", BigInteger, nullable=False),
    Column("factory", LargeBinary, nullable=False),  # the action's verifyingContract
    Column("kind", Text, nullable=False),
    Column("issuer", LargeBinary, nullable=False),
    Column("nonce", LargeBinary, nullable=False),
    Column("operation_hash", LargeBinary),  # null for none or zero
    Column("status", Text, nullable=False),  # 'pending' | 'submitted' | 'mined' | 'rejected'
    Column("reason", Text),  # of a rejection; 'cancelled' where the partner calls it that
    Column("relay_tx_hash", LargeBinary),
    Column("seen_at", Time, nullable=False, server_default=NOW),
    PrimaryKeyConstraint("brand", "partner", "record_id"),
    Index("partner_hint_nonce_idx", "nonce"),
    Index("partner_hint_operation_hash_idx", "operation_hash", postgresql_where=text("operation_hash IS NOT NULL")),
)

# Questions that pollers have about a transaction of a chain that we follow, and the chain room's answers.
# Above finalized an answer is looked at again until the block is final: it may be another one by then, or none.
chain_lookup = Table(
    "chain_lookup",
    metadata,
    Column("chain_id", BigInteger, nullable=False),
    Column("tx_hash", LargeBinary, nullable=False),
    Column("asked_at", Time, nullable=False, server_default=NOW),
    Column("answered_at", Time),  # null: not yet
    Column("block_number", BigInteger),  # null in an answer: the chain does not hold it (now)
    Column("block_hash", LargeBinary),
    Column("success", Boolean),
    # every ERC-20 Transfer of the receipt: [{"token": "0x…", "from": "0x…", "to": "0x…", "value": "250"}]
    Column("transfer", JSONB),
    Column(
        "final", Boolean, nullable=False, server_default=text("false")
    ),  # its block is finalized: not looked at again
    PrimaryKeyConstraint("chain_id", "tx_hash"),
    Index("chain_lookup_open_idx", "chain_id", "answered_at", postgresql_where=text("NOT final")),
)

# --------------------------------------------------------------------------- operations

operation = Table(
    "operation",
    metadata,
    Column("id", UUID, primary_key=True),  # UUIDv5 of (brand, reference)
    Column("brand", Text, ForeignKey("brand.name"), nullable=False),
    Column("reference", Text, nullable=False),
    Column("request", JSONB, nullable=False),  # the registration after normalising: the same again is idempotent
    Column("metadata", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("requested_at", Time, nullable=False),
    Column("requested_at_stated", Boolean, nullable=False),
    Column("registered_at", Time, nullable=False, server_default=NOW),
    Column("state", Text, nullable=False, server_default=text("'pending'")),
    Column("state_at", Time, nullable=False, server_default=NOW),
    Column("generation", Integer, nullable=False, server_default=text("0")),
    Column("cancelled_at", Time),  # the brand's wish, a fact; the reconciler makes the transition
    # written by the reconciler with each transition: evidence, conflicting evidence, what is waited for
    Column("detail", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("standing_signal", UUID),  # the last `ready` or `restored` that no `reverted` superseded
    Column("finalized_generation", Integer, nullable=False, server_default=text("0")),
    UniqueConstraint("brand", "reference"),
    Index("operation_state_idx", "brand", "state", "registered_at"),
    Index(
        "operation_open_idx",
        "state",
        "registered_at",
        postgresql_where=text(
            "state IN ('pending','submitted','confirming','incomplete','ready','reverted','conflict')"
        ),
    ),
    # what was ready once and is not settled now: exposures
    Index(
        "operation_undone_idx",
        "brand",
        "state_at",
        postgresql_where=text("generation > 0 AND state NOT IN ('ready', 'fulfilled')"),
    ),
    Index("operation_page_idx", "brand", "registered_at", "id"),
    # what may be claimed, oldest ready first: of one brand, and of all
    Index("operation_ready_idx", "brand", "state_at", "id", postgresql_where=text("state = 'ready'")),
    Index("operation_any_ready_idx", "state_at", "id", postgresql_where=text("state = 'ready'")),
)

leg = Table(
    "leg",
    metadata,
    Column("operation_id", UUID, ForeignKey("operation.id"), nullable=False),
    Column("leg", SmallInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("match", Text, nullable=False),  # 'nonce' | 'operation_hash' | 'wallet_amount'
    Column("chain_id", BigInteger),
    Column("factory", LargeBinary),
    Column("issuer", LargeBinary),
    Column("holder", LargeBinary),
    Column("loyalty_id", LargeBinary),
    Column("bucket", Uint256),  # the brand's expiresAt
    Column("amount", Uint256, nullable=False),
    Column("deadline", Uint256),
    Column("nonce", LargeBinary),
    Column("operation_hash", LargeBinary),  # null for none or zero
    Column("wallet_id", Text),  # partner legs: the partner's own name of the wallet or user, compared as it is
    Column("token", Text),  # partner legs, where the brand states one: qiibee's token id
    Column("requested_at", Time, nullable=False),  # the operation's: the window of wallet_amount
    # an expired or cancelled operation gives its nonce free; it is still watched
    Column("released", Boolean, nullable=False, server_default=text("false")),
    PrimaryKeyConstraint("operation_id", "leg"),
    Index(
        "leg_nonce_idx",
        "chain_id",
        "factory",
        "kind",
        "issuer",
        "nonce",
        unique=True,
        postgresql_where=text("nonce IS NOT NULL AND NOT released"),
    ),
    Index("leg_any_nonce_idx", "nonce", postgresql_where=text("nonce IS NOT NULL")),
    Index("leg_operation_hash_idx", "operation_hash", postgresql_where=text("operation_hash IS NOT NULL")),
    Index("leg_wallet_idx", "holder", "amount", postgresql_where=text("match = 'wallet_amount'")),
    # partner legs: what a partner's record could settle, and whose wallets are looked at
    Index("leg_partner_idx", "wallet_id", "amount", "kind", postgresql_where=text("wallet_id IS NOT NULL")),
)

# The stored pairing of one piece of evidence and one leg: unique on both sides (promise 2).
claim = Table(
    "claim",
    metadata,
    Column("operation_id", UUID, ForeignKey("operation.id"), nullable=False),
    Column("leg", SmallInteger, nullable=False),
    Column("evidence_id", UUID, nullable=False, unique=True),  # UUIDv5 of the evidence's identity
    # where a movement's event is; of a partner's transfer on a chain that we follow, the block; else null
    Column("chain_id", BigInteger),
    Column("block_number", BigInteger),
    Column("log_index", Integer),
    Column("block_hash", LargeBinary),
    Column("basis", Text, nullable=False),  # 'nonce' | 'operation_hash' | 'wallet_amount' | 'decision'
    Column("ambiguous", Boolean, nullable=False, server_default=text("false")),
    Column("final", Boolean, nullable=False, server_default=text("false")),  # `ready` has left
    Column("claimed_at", Time, nullable=False, server_default=NOW),
    PrimaryKeyConstraint("operation_id", "leg"),
    Index("claim_log_idx", "chain_id", "block_number", "log_index", "block_hash", unique=True),
)

# A person's word on a conflicting or ambiguous piece of evidence: a recorded fact.
decision = Table(
    "decision",
    metadata,
    Column("id", UUID, primary_key=True, server_default=text("gen_random_uuid()")),
    Column("operation_id", UUID, ForeignKey("operation.id"), nullable=False),
    Column("evidence_id", UUID, nullable=False),
    Column("leg", SmallInteger, nullable=False, server_default=text("0")),
    Column("accept", Boolean, nullable=False),
    Column("reason", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("decided_at", Time, nullable=False, server_default=NOW),
    Index("decision_operation_idx", "operation_id"),
    Index("decision_evidence_idx", "evidence_id"),
)

# The brand's word that it handed over: kept whatever became of the generation meanwhile.
receipt = Table(
    "receipt",
    metadata,
    Column("operation_id", UUID, ForeignKey("operation.id"), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("outcome", Text, nullable=False),  # 'fulfilled' | 'reverted' | 'claim_lapsed'
    Column("receipt", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("claim", UUID),
    Column("actor", Text, nullable=False),
    Column("recorded_at", Time, nullable=False, server_default=NOW),
    PrimaryKeyConstraint("operation_id", "generation"),
)

# Who is handing an operation over just now. A claim lasts until `claimed_until`, an end, or another generation.
fulfilment_claim = Table(
    "fulfilment_claim",
    metadata,
    Column("id", UUID, primary_key=True, server_default=text("gen_random_uuid()")),
    Column("operation_id", UUID, ForeignKey("operation.id"), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("consumer", Text, nullable=False),
    Column("claimed_at", Time, nullable=False, server_default=NOW),
    Column("claimed_until", Time, nullable=False),
    Column("ended_at", Time),
    # 'released' | 'superseded' (another took it, or its generation went) | 'fulfilled' | 'reverted' | 'claim_lapsed'
    Column("outcome", Text),
    # what its worker said when a receipt of the generation was there already: the goods may have left twice
    Column("second_receipt", JSONB),
    # whatever the isolation of those who compete: one claim of an operation at a time
    Index("fulfilment_claim_open_idx", "operation_id", unique=True, postgresql_where=text("ended_at IS NULL")),
)

history = Table(
    "history",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("operation_id", UUID, ForeignKey("operation.id"), nullable=False),
    Column("from_state", Text),  # null: registered
    Column("to_state", Text, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("cause", Text, nullable=False),
    Column("detail", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("at", Time, nullable=False, server_default=NOW),
    Index("history_operation_idx", "operation_id", "id"),
)

# --------------------------------------------------------------------------- the reconciler's queues

# Blocks whose facts came or went: written in the transaction of the facts, spread to operations by the reconciler.
touched_blocks = Table(
    "touched_blocks",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("chain_id", BigInteger, nullable=False),
    Column("from_block", BigInteger, nullable=False),
    Column("to_block", BigInteger, nullable=False),
)

# Operations to look at again. Not unique on purpose: an open transaction that put one here must not stop another.
touched_operation = Table(
    "touched_operation",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("operation_id", UUID, nullable=False),
    Index("touched_operation_operation_idx", "operation_id"),
)

# What an operation waits for: looked at again when the axis of its chain passes the threshold.
alarm = Table(
    "alarm",
    metadata,
    Column("operation_id", UUID, ForeignKey("operation.id"), nullable=False),
    Column("chain_id", BigInteger, nullable=False),  # 0 for the clock
    # 'head_time_ms' | 'safe_number' | 'finalized_number' | 'finalized_time_ms' | 'clock_ms'
    Column("axis", Text, nullable=False),
    Column("threshold", BigInteger, nullable=False),
    PrimaryKeyConstraint("operation_id", "chain_id", "axis"),
    Index("alarm_due_idx", "chain_id", "axis", "threshold"),
)

# --------------------------------------------------------------------------- signals

# Debezium's outbox columns (id, aggregatetype, aggregateid, type, payload) and ours.
outbox = Table(
    "outbox",
    metadata,
    Column("position", BigInteger, Identity(always=True), primary_key=True),
    Column("id", UUID, nullable=False, unique=True),
    Column("brand", Text, nullable=False),
    Column("aggregatetype", Text, nullable=False),  # 'operation' | 'evidence'
    Column("aggregateid", UUID, nullable=False),
    Column("type", Text, nullable=False),
    Column("payload", JSONB, nullable=False),  # the sequencer writes data.sequence into it
    Column("generation", Integer, nullable=False, server_default=text("0")),
    Column("supersedes", UUID),
    Column("superseded_by", UUID),
    Column("sequence", BigInteger),  # gapless per brand; null: not numbered yet, so not visible outside
    Column("created_at", Time, nullable=False, server_default=NOW),
    Index("outbox_unnumbered_idx", "position", postgresql_where=text("sequence IS NULL")),
    Index("outbox_sequence_idx", "brand", "sequence", unique=True),
    Index("outbox_aggregate_idx", "aggregateid", "position"),
)

# Signals that a retention deleted: to compute one again must not send it again.
forgotten_signal = Table(
    "forgotten_signal",
    metadata,
    Column("id", UUID, primary_key=True),
)

webhook = Table(
    "webhook",
    metadata,
    Column("brand", Text, ForeignKey("brand.name"), nullable=False),
    Column("name", Text, nullable=False),
    Column("events", ARRAY(Text), nullable=False),
    Column("active", Boolean, nullable=False, server_default=text("true")),  # still in the configuration
    Column("after_sequence", BigInteger, nullable=False, server_default=text("0")),  # a new endpoint starts at now
    Column("disabled_at", Time),
    # 'paused' by a person | 'failing' for too long: deliveries go on being made, and wait | 'gone' (410): none are made
    Column("disabled_as", Text),
    Column("disabled_reason", Text),
    Column("failing_since", Time),  # every attempt since then has failed; null: the last one arrived
    Column("failures", Integer, nullable=False, server_default=text("0")),  # … and how many those are
    PrimaryKeyConstraint("brand", "name"),
)

delivery = Table(
    "delivery",
    metadata,
    Column("brand", Text, nullable=False),
    Column("webhook", Text, nullable=False),
    Column("signal_id", UUID, nullable=False),
    Column("aggregateid", UUID, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("type", Text, nullable=False),
    # 'pending' | 'delivered' | 'superseded' | 'dropped' (a hint that came too late) | 'dead'
    Column("state", Text, nullable=False, server_default=text("'pending'")),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("next_at", Time, nullable=False, server_default=NOW),
    Column("begun_at", Time),  # of the last attempt
    Column("ended_at", Time),
    Column("status", Integer),  # HTTP status of the last attempt
    Column("error", Text),
    # 'latch:8453' | 'live:8453': what that chain must be rid of, or be, before this is looked at again; null: time alone decides
    Column("awaits", Text),
    PrimaryKeyConstraint("brand", "webhook", "signal_id"),
    Index(
        "delivery_due_idx",
        "brand",
        "webhook",
        "next_at",
        postgresql_where=text("state = 'pending' AND awaits IS NULL"),
    ),
    Index("delivery_awaits_idx", "awaits", postgresql_where=text("awaits IS NOT NULL")),
    Index(
        "delivery_order_idx", "brand", "webhook", "aggregateid", "sequence", postgresql_where=text("state = 'pending'")
    ),
    # the oldest that waits at an endpoint, and how many do. All are above 0: only the queries that this index is meant for say
    # so, since others would read all that waits by it where the statistics know of nothing pending.
    Index(
        "delivery_waiting_idx",
        "brand",
        "webhook",
        "sequence",
        postgresql_where=text("state = 'pending' AND sequence > 0"),
    ),
    Index("delivery_signal_idx", "signal_id"),
    # dead letters, what became of the latest deliveries, and which of them are old enough to be forgotten
    Index("delivery_ended_idx", "state", "ended_at", postgresql_where=text("state <> 'pending'")),
)

# Attempts whose end was recorded. One that is missing between two numbers was cut off with its dispatcher.
delivery_attempt = Table(
    "delivery_attempt",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),  # in the order of recording: the oldest go first
    Column("brand", Text, nullable=False),
    Column("webhook", Text, nullable=False),
    Column("signal_id", UUID, nullable=False),
    Column("number", Integer, nullable=False),  # begins at 1 again when a delivery is asked for again
    Column("begun_at", Time, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("status", Integer),
    Column("error", Text),
    Column("answer", Text),  # the first bytes of the body, controls escaped
    Index("delivery_attempt_signal_idx", "signal_id"),
)
