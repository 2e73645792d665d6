"""The first schema: `indexer` as `indexer/store/tables.py` declares it, `loyalty` as `indexer/store/contract/*.sql` does.

Revision ID: 0001
Revises:

Written by `python -m tests.regenerate_migration`: run it after a change of tables.py, as long as version 1 is not released.
"""

from __future__ import annotations

from importlib.resources import files

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Groups, shared by all databases of the server: what the daemon may do, what readers and brands may see.
ROLES = ("loyalty_daemon", "loyalty_reader", "loyalty_brand")

# In this order: views may call functions, and grants come last.
CONTRACT = ("functions.sql", "restoration.sql", "fulfilment.sql", "views.sql", "grants.sql")

CREATE_ROLE = """
DO $$
BEGIN
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN
    CREATE ROLE {role};
    GRANT {role} TO CURRENT_USER;
  END IF;
EXCEPTION
  WHEN duplicate_object OR unique_violation THEN NULL;  -- another database of this server, at the same moment
  WHEN insufficient_privilege THEN
    RAISE EXCEPTION 'this user may not create roles (it has no CREATEROLE): let a superuser run  CREATE ROLE loyalty_daemon; CREATE ROLE loyalty_reader; CREATE ROLE loyalty_brand; GRANT loyalty_brand, loyalty_reader TO % WITH ADMIN OPTION;  and migrate again', quote_ident(current_user)
      USING ERRCODE = 'insufficient_privilege';
END $$
"""

# The contract keeps views and functions of its own beside the tables.
DROP_BESIDE = """
DO $$
DECLARE one text;
BEGIN
  FOR one IN SELECT unnest(array_agg(c.oid::regclass::text)) FROM pg_class c WHERE c.relnamespace = 'indexer'::regnamespace AND c.relkind = 'v' LOOP
    EXECUTE format('DROP VIEW IF EXISTS %s CASCADE', one);
  END LOOP;
  FOR one IN SELECT unnest(array_agg(p.oid::regprocedure::text)) FROM pg_proc p WHERE p.pronamespace = 'indexer'::regnamespace LOOP
    EXECUTE format('DROP ROUTINE IF EXISTS %s CASCADE', one);
  END LOOP;
END $$
"""


def execute_script(sql: str) -> None:
    """Many statements at once, dollar quotes and all: only the driver's simple protocol takes them."""
    connection = op.get_bind().connection.dbapi_connection
    connection.run_async(lambda driver: driver.execute(sql))


def create_tables() -> None:
    op.create_table('attestation',
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('number', sa.BigInteger(), nullable=False),
    sa.Column('hash', sa.LargeBinary(), nullable=False),
    sa.Column('witnesses', postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'::text[]"), nullable=False),
    sa.Column('proof', sa.Text(), nullable=True),
    sa.Column('reason', sa.Text(), nullable=True),
    sa.Column('attempts', sa.Integer(), server_default=sa.text('0'), nullable=False),
    sa.Column('next_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('chain_id', 'number', 'hash', name=op.f('attestation_pk')),
    schema='indexer'
    )
    op.create_index('attestation_due_idx', 'attestation', ['chain_id', 'next_at'], unique=False, schema='indexer', postgresql_where=sa.text('next_at IS NOT NULL'))
    op.create_table('block',
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('number', sa.BigInteger(), nullable=False),
    sa.Column('hash', sa.LargeBinary(), nullable=False),
    sa.Column('parent_hash', sa.LargeBinary(), nullable=False),
    sa.Column('time_ms', sa.BigInteger(), nullable=False),
    sa.Column('canonical', sa.Boolean(), server_default=sa.text('true'), nullable=False),
    sa.PrimaryKeyConstraint('chain_id', 'number', 'hash', name=op.f('block_pk')),
    schema='indexer'
    )
    op.create_index('block_canonical_idx', 'block', ['chain_id', 'number'], unique=True, schema='indexer', postgresql_where=sa.text('canonical'))
    op.create_index('block_orphan_idx', 'block', ['chain_id', 'number'], unique=False, schema='indexer', postgresql_where=sa.text('NOT canonical'))
    op.create_table('brand',
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('configured_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('unmatched_since', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('last_sequence', sa.BigInteger(), server_default=sa.text('0'), nullable=False),
    sa.Column('active', sa.Boolean(), server_default=sa.text('true'), nullable=False),
    sa.Column('forgotten_sequence', sa.BigInteger(), server_default=sa.text('0'), nullable=False),
    sa.Column('held_before', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('rules', sa.Text(), nullable=True),
    sa.PrimaryKeyConstraint('name', name=op.f('brand_pk')),
    schema='indexer'
    )
    op.create_table('chain',
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('genesis_hash', sa.LargeBinary(), nullable=True),
    sa.Column('head_number', sa.BigInteger(), nullable=True),
    sa.Column('head_hash', sa.LargeBinary(), nullable=True),
    sa.Column('head_time_ms', sa.BigInteger(), nullable=True),
    sa.Column('head_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('safe_number', sa.BigInteger(), nullable=True),
    sa.Column('safe_hash', sa.LargeBinary(), nullable=True),
    sa.Column('safe_time_ms', sa.BigInteger(), nullable=True),
    sa.Column('safe_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('finalized_number', sa.BigInteger(), nullable=True),
    sa.Column('finalized_hash', sa.LargeBinary(), nullable=True),
    sa.Column('finalized_time_ms', sa.BigInteger(), nullable=True),
    sa.Column('finalized_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('mode', sa.Text(), nullable=True),
    sa.Column('linked_epoch', sa.BigInteger(), nullable=True),
    sa.Column('schedule', postgresql.JSONB(), nullable=True),
    sa.Column('quorum', sa.Integer(), server_default=sa.text('1'), nullable=False),
    sa.Column('proof', sa.Text(), server_default=sa.text("'off'"), nullable=False),
    sa.Column('agreed_number', sa.BigInteger(), nullable=True),
    sa.Column('agreed_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('endpoints', postgresql.JSONB(), nullable=True),
    sa.Column('latch', postgresql.JSONB(), nullable=True),
    sa.Column('unmatched_cursor', sa.BigInteger(), nullable=True),
    sa.Column('history_complete', sa.Boolean(), server_default=sa.text('false'), nullable=False),
    sa.Column('active', sa.Boolean(), server_default=sa.text('true'), nullable=False),
    sa.PrimaryKeyConstraint('chain_id', name=op.f('chain_pk')),
    sa.UniqueConstraint('name', name=op.f('chain_name_key')),
    schema='indexer'
    )
    op.create_table('chain_lookup',
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('tx_hash', sa.LargeBinary(), nullable=False),
    sa.Column('asked_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('answered_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('block_number', sa.BigInteger(), nullable=True),
    sa.Column('block_hash', sa.LargeBinary(), nullable=True),
    sa.Column('success', sa.Boolean(), nullable=True),
    sa.Column('transfer', postgresql.JSONB(), nullable=True),
    sa.Column('final', sa.Boolean(), server_default=sa.text('false'), nullable=False),
    sa.PrimaryKeyConstraint('chain_id', 'tx_hash', name=op.f('chain_lookup_pk')),
    schema='indexer'
    )
    op.create_index('chain_lookup_open_idx', 'chain_lookup', ['chain_id', 'answered_at'], unique=False, schema='indexer', postgresql_where=sa.text('NOT final'))
    op.create_table('coverage',
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('emitter', sa.LargeBinary(), nullable=False),
    sa.Column('verdict', sa.Text(), nullable=False),
    sa.Column('blocks', postgresql.INT8MULTIRANGE(), nullable=False),
    sa.PrimaryKeyConstraint('chain_id', 'emitter', 'verdict', name=op.f('coverage_pk')),
    schema='indexer'
    )
    op.create_table('delivery',
    sa.Column('brand', sa.Text(), nullable=False),
    sa.Column('webhook', sa.Text(), nullable=False),
    sa.Column('signal_id', sa.UUID(), nullable=False),
    sa.Column('aggregateid', sa.UUID(), nullable=False),
    sa.Column('sequence', sa.BigInteger(), nullable=False),
    sa.Column('type', sa.Text(), nullable=False),
    sa.Column('state', sa.Text(), server_default=sa.text("'pending'"), nullable=False),
    sa.Column('attempts', sa.Integer(), server_default=sa.text('0'), nullable=False),
    sa.Column('next_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('begun_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('ended_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('status', sa.Integer(), nullable=True),
    sa.Column('error', sa.Text(), nullable=True),
    sa.Column('awaits', sa.Text(), nullable=True),
    sa.PrimaryKeyConstraint('brand', 'webhook', 'signal_id', name=op.f('delivery_pk')),
    schema='indexer'
    )
    op.create_index('delivery_awaits_idx', 'delivery', ['awaits'], unique=False, schema='indexer', postgresql_where=sa.text('awaits IS NOT NULL'))
    op.create_index('delivery_due_idx', 'delivery', ['brand', 'webhook', 'next_at'], unique=False, schema='indexer', postgresql_where=sa.text("state = 'pending' AND awaits IS NULL"))
    op.create_index('delivery_ended_idx', 'delivery', ['state', 'ended_at'], unique=False, schema='indexer', postgresql_where=sa.text("state <> 'pending'"))
    op.create_index('delivery_order_idx', 'delivery', ['brand', 'webhook', 'aggregateid', 'sequence'], unique=False, schema='indexer', postgresql_where=sa.text("state = 'pending'"))
    op.create_index('delivery_signal_idx', 'delivery', ['signal_id'], unique=False, schema='indexer')
    op.create_index('delivery_waiting_idx', 'delivery', ['brand', 'webhook', 'sequence'], unique=False, schema='indexer', postgresql_where=sa.text("state = 'pending' AND sequence > 0"))
    op.create_table('delivery_attempt',
    sa.Column('id', sa.BigInteger(), sa.Identity(always=True), nullable=False),
    sa.Column('brand', sa.Text(), nullable=False),
    sa.Column('webhook', sa.Text(), nullable=False),
    sa.Column('signal_id', sa.UUID(), nullable=False),
    sa.Column('number', sa.Integer(), nullable=False),
    sa.Column('begun_at', postgresql.TIMESTAMP(timezone=True), nullable=False),
    sa.Column('seconds', sa.Double(), nullable=False),
    sa.Column('status', sa.Integer(), nullable=True),
    sa.Column('error', sa.Text(), nullable=True),
    sa.Column('answer', sa.Text(), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('delivery_attempt_pk')),
    schema='indexer'
    )
    op.create_index('delivery_attempt_signal_idx', 'delivery_attempt', ['signal_id'], unique=False, schema='indexer')
    op.create_table('emitter',
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('address', sa.LargeBinary(), nullable=False),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('factory', sa.LargeBinary(), nullable=False),
    sa.Column('start_block', sa.BigInteger(), nullable=False),
    sa.Column('followed_from', sa.BigInteger(), nullable=True),
    sa.Column('active', sa.Boolean(), server_default=sa.text('true'), nullable=False),
    sa.PrimaryKeyConstraint('chain_id', 'address', name=op.f('emitter_pk')),
    schema='indexer'
    )
    op.create_table('emitter_role',
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('factory', sa.LargeBinary(), nullable=False),
    sa.Column('address', sa.LargeBinary(), nullable=False),
    sa.Column('start_block', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('chain_id', 'factory', 'address', name=op.f('emitter_role_pk')),
    schema='indexer'
    )
    op.create_table('endpoint_limits',
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('fingerprint', sa.LargeBinary(), nullable=False),
    sa.Column('endpoint', sa.Text(), nullable=False),
    sa.Column('limits', postgresql.JSONB(), nullable=False),
    sa.Column('firm_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.PrimaryKeyConstraint('chain_id', 'fingerprint', name=op.f('endpoint_limits_pk')),
    schema='indexer'
    )
    op.create_table('first_reading',
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('endpoint', sa.Text(), nullable=False),
    sa.Column('blocks', postgresql.INT8MULTIRANGE(), nullable=False),
    sa.PrimaryKeyConstraint('chain_id', 'endpoint', name=op.f('first_reading_pk')),
    schema='indexer'
    )
    op.create_table('forgotten_signal',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('forgotten_signal_pk')),
    schema='indexer'
    )
    op.create_table('instance',
    sa.Column('one', sa.Boolean(), server_default=sa.text('true'), nullable=False),
    sa.Column('stream', sa.UUID(), nullable=False),
    sa.Column('created_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.PrimaryKeyConstraint('one', name=op.f('instance_pk')),
    schema='indexer'
    )
    op.create_table('lease',
    sa.Column('task', sa.Text(), nullable=False),
    sa.Column('holder', sa.UUID(), nullable=True),
    sa.Column('epoch', sa.BigInteger(), server_default=sa.text('0'), nullable=False),
    sa.Column('sessions', postgresql.JSONB(), server_default=sa.text("'[]'::jsonb"), nullable=False),
    sa.Column('until', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('released_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('task', name=op.f('lease_pk')),
    schema='indexer'
    )
    op.create_table('movement',
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('block_number', sa.BigInteger(), nullable=False),
    sa.Column('log_index', sa.Integer(), nullable=False),
    sa.Column('block_hash', sa.LargeBinary(), nullable=False),
    sa.Column('block_time_ms', sa.BigInteger(), nullable=False),
    sa.Column('tx_hash', sa.LargeBinary(), nullable=False),
    sa.Column('tx_index', sa.Integer(), nullable=False),
    sa.Column('emitter', sa.LargeBinary(), nullable=False),
    sa.Column('canonical', sa.Boolean(), server_default=sa.text('true'), nullable=False),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('factory', sa.LargeBinary(), nullable=False),
    sa.Column('issuer', sa.LargeBinary(), nullable=False),
    sa.Column('loyalty_id', sa.LargeBinary(), nullable=False),
    sa.Column('loyalty', sa.LargeBinary(), nullable=False),
    sa.Column('holder', sa.LargeBinary(), nullable=False),
    sa.Column('bucket', sa.Numeric(precision=78, scale=0), nullable=False),
    sa.Column('amount', sa.Numeric(precision=78, scale=0), nullable=False),
    sa.Column('nonce', sa.LargeBinary(), nullable=False),
    sa.Column('operation_hash', sa.LargeBinary(), nullable=True),
    sa.Column('data', sa.LargeBinary(), nullable=False),
    sa.PrimaryKeyConstraint('chain_id', 'block_number', 'log_index', 'block_hash', name=op.f('movement_pk')),
    schema='indexer'
    )
    op.create_index('movement_holder_idx', 'movement', ['holder', 'loyalty'], unique=False, schema='indexer')
    op.create_index('movement_nonce_idx', 'movement', ['nonce'], unique=False, schema='indexer')
    op.create_index('movement_operation_hash_idx', 'movement', ['operation_hash'], unique=False, schema='indexer', postgresql_where=sa.text('operation_hash IS NOT NULL'))
    op.create_index('movement_orphan_idx', 'movement', ['chain_id', 'block_number'], unique=False, schema='indexer', postgresql_where=sa.text('NOT canonical'))
    op.create_table('outbox',
    sa.Column('position', sa.BigInteger(), sa.Identity(always=True), nullable=False),
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('brand', sa.Text(), nullable=False),
    sa.Column('aggregatetype', sa.Text(), nullable=False),
    sa.Column('aggregateid', sa.UUID(), nullable=False),
    sa.Column('type', sa.Text(), nullable=False),
    sa.Column('payload', postgresql.JSONB(), nullable=False),
    sa.Column('generation', sa.Integer(), server_default=sa.text('0'), nullable=False),
    sa.Column('supersedes', sa.UUID(), nullable=True),
    sa.Column('superseded_by', sa.UUID(), nullable=True),
    sa.Column('sequence', sa.BigInteger(), nullable=True),
    sa.Column('created_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.PrimaryKeyConstraint('position', name=op.f('outbox_pk')),
    sa.UniqueConstraint('id', name=op.f('outbox_id_key')),
    schema='indexer'
    )
    op.create_index('outbox_aggregate_idx', 'outbox', ['aggregateid', 'position'], unique=False, schema='indexer')
    op.create_index('outbox_sequence_idx', 'outbox', ['brand', 'sequence'], unique=True, schema='indexer')
    op.create_index('outbox_unnumbered_idx', 'outbox', ['position'], unique=False, schema='indexer', postgresql_where=sa.text('sequence IS NULL'))
    op.create_table('partner_record',
    sa.Column('brand', sa.Text(), nullable=False),
    sa.Column('partner', sa.Text(), nullable=False),
    sa.Column('record_id', sa.Text(), nullable=False),
    sa.Column('version', sa.Integer(), nullable=False),
    sa.Column('raw', postgresql.JSONB(), nullable=False),
    sa.Column('seen_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('current', sa.Boolean(), server_default=sa.text('true'), nullable=False),
    sa.Column('wallet', sa.Text(), server_default=sa.text("''"), nullable=False),
    sa.Column('time_ms', sa.BigInteger(), nullable=True),
    sa.Column('after_ms', sa.BigInteger(), nullable=True),
    sa.Column('missing', sa.SmallInteger(), server_default=sa.text('0'), nullable=False),
    sa.Column('swept', sa.BigInteger(), server_default=sa.text('0'), nullable=False),
    sa.PrimaryKeyConstraint('brand', 'partner', 'record_id', 'version', name=op.f('partner_record_pk')),
    schema='indexer'
    )
    op.create_index('partner_record_age_idx', 'partner_record', ['seen_at'], unique=False, schema='indexer', postgresql_where=sa.text('NOT current'))
    op.create_index('partner_record_current_idx', 'partner_record', ['brand', 'partner', 'record_id'], unique=True, schema='indexer', postgresql_where=sa.text('current'))
    op.create_index('partner_record_wallet_idx', 'partner_record', ['brand', 'partner', 'wallet', 'time_ms'], unique=False, schema='indexer', postgresql_where=sa.text('current'))
    op.create_table('partner_wallet',
    sa.Column('brand', sa.Text(), nullable=False),
    sa.Column('partner', sa.Text(), nullable=False),
    sa.Column('wallet', sa.Text(), nullable=False),
    sa.Column('first_look_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('last_look_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('swept_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('active_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('next_look_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('brand', 'partner', 'wallet', name=op.f('partner_wallet_pk')),
    schema='indexer'
    )
    op.create_index('partner_wallet_due_idx', 'partner_wallet', ['brand', 'partner', 'next_look_at'], unique=False, schema='indexer', postgresql_where=sa.text('next_look_at IS NOT NULL'))
    op.create_table('programme',
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('block_number', sa.BigInteger(), nullable=False),
    sa.Column('log_index', sa.Integer(), nullable=False),
    sa.Column('block_hash', sa.LargeBinary(), nullable=False),
    sa.Column('block_time_ms', sa.BigInteger(), nullable=False),
    sa.Column('tx_hash', sa.LargeBinary(), nullable=False),
    sa.Column('tx_index', sa.Integer(), nullable=False),
    sa.Column('emitter', sa.LargeBinary(), nullable=False),
    sa.Column('canonical', sa.Boolean(), server_default=sa.text('true'), nullable=False),
    sa.Column('factory', sa.LargeBinary(), nullable=False),
    sa.Column('issuer', sa.LargeBinary(), nullable=False),
    sa.Column('loyalty_id', sa.LargeBinary(), nullable=False),
    sa.Column('loyalty', sa.LargeBinary(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('symbol', sa.Text(), nullable=False),
    sa.Column('media', sa.Text(), nullable=False),
    sa.Column('description', sa.Text(), nullable=False),
    sa.Column('contract_uri', sa.Text(), nullable=False),
    sa.Column('token_uri', sa.Text(), nullable=False),
    sa.PrimaryKeyConstraint('chain_id', 'block_number', 'log_index', 'block_hash', name=op.f('programme_pk')),
    schema='indexer'
    )
    op.create_index('programme_issuer_idx', 'programme', ['chain_id', 'issuer', 'loyalty_id'], unique=False, schema='indexer')
    op.create_index('programme_orphan_idx', 'programme', ['chain_id', 'block_number'], unique=False, schema='indexer', postgresql_where=sa.text('NOT canonical'))
    op.create_index('programme_token_idx', 'programme', ['chain_id', 'loyalty'], unique=False, schema='indexer')
    op.create_table('programme_event',
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('block_number', sa.BigInteger(), nullable=False),
    sa.Column('log_index', sa.Integer(), nullable=False),
    sa.Column('block_hash', sa.LargeBinary(), nullable=False),
    sa.Column('block_time_ms', sa.BigInteger(), nullable=False),
    sa.Column('tx_hash', sa.LargeBinary(), nullable=False),
    sa.Column('tx_index', sa.Integer(), nullable=False),
    sa.Column('emitter', sa.LargeBinary(), nullable=False),
    sa.Column('canonical', sa.Boolean(), server_default=sa.text('true'), nullable=False),
    sa.Column('loyalty', sa.LargeBinary(), nullable=False),
    sa.Column('event', sa.Text(), nullable=False),
    sa.Column('args', postgresql.JSONB(), nullable=False),
    sa.PrimaryKeyConstraint('chain_id', 'block_number', 'log_index', 'block_hash', name=op.f('programme_event_pk')),
    schema='indexer'
    )
    op.create_index('programme_event_orphan_idx', 'programme_event', ['chain_id', 'block_number'], unique=False, schema='indexer', postgresql_where=sa.text('NOT canonical'))
    op.create_index('programme_event_token_idx', 'programme_event', ['chain_id', 'loyalty', 'event'], unique=False, schema='indexer')
    op.create_table('raw_log',
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('block_number', sa.BigInteger(), nullable=False),
    sa.Column('log_index', sa.Integer(), nullable=False),
    sa.Column('block_hash', sa.LargeBinary(), nullable=False),
    sa.Column('block_time_ms', sa.BigInteger(), nullable=False),
    sa.Column('tx_hash', sa.LargeBinary(), nullable=False),
    sa.Column('tx_index', sa.Integer(), nullable=False),
    sa.Column('emitter', sa.LargeBinary(), nullable=False),
    sa.Column('canonical', sa.Boolean(), server_default=sa.text('true'), nullable=False),
    sa.Column('topics', postgresql.ARRAY(sa.LargeBinary()), nullable=False),
    sa.Column('data', sa.LargeBinary(), nullable=False),
    sa.Column('reason', sa.Text(), nullable=False),
    sa.Column('error', sa.Text(), nullable=True),
    sa.PrimaryKeyConstraint('chain_id', 'block_number', 'log_index', 'block_hash', name=op.f('raw_log_pk')),
    schema='indexer'
    )
    op.create_index('raw_log_orphan_idx', 'raw_log', ['chain_id', 'block_number'], unique=False, schema='indexer', postgresql_where=sa.text('NOT canonical'))
    op.create_table('reread',
    sa.Column('id', sa.UUID(), server_default=sa.text('gen_random_uuid()'), nullable=False),
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('from_block', sa.BigInteger(), nullable=False),
    sa.Column('to_block', sa.BigInteger(), nullable=True),
    sa.Column('abi', sa.LargeBinary(), nullable=True),
    sa.Column('state', sa.Text(), server_default=sa.text("'waiting'"), nullable=False),
    sa.Column('next_block', sa.BigInteger(), nullable=True),
    sa.Column('report', postgresql.JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
    sa.Column('trouble', sa.Text(), nullable=True),
    sa.Column('requested_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('begun_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('ended_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('reread_pk')),
    schema='indexer'
    )
    op.create_index('reread_ended_idx', 'reread', ['ended_at'], unique=False, schema='indexer', postgresql_where=sa.text('ended_at IS NOT NULL'))
    op.create_index('reread_open_idx', 'reread', ['chain_id', 'requested_at'], unique=False, schema='indexer', postgresql_where=sa.text("state IN ('waiting', 'running')"))
    op.create_table('touched_blocks',
    sa.Column('id', sa.BigInteger(), sa.Identity(always=True), nullable=False),
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('from_block', sa.BigInteger(), nullable=False),
    sa.Column('to_block', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('touched_blocks_pk')),
    schema='indexer'
    )
    op.create_table('touched_operation',
    sa.Column('id', sa.BigInteger(), sa.Identity(always=True), nullable=False),
    sa.Column('operation_id', sa.UUID(), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('touched_operation_pk')),
    schema='indexer'
    )
    op.create_index('touched_operation_operation_idx', 'touched_operation', ['operation_id'], unique=False, schema='indexer')
    op.create_table('transfer',
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('block_number', sa.BigInteger(), nullable=False),
    sa.Column('log_index', sa.Integer(), nullable=False),
    sa.Column('block_hash', sa.LargeBinary(), nullable=False),
    sa.Column('block_time_ms', sa.BigInteger(), nullable=False),
    sa.Column('tx_hash', sa.LargeBinary(), nullable=False),
    sa.Column('tx_index', sa.Integer(), nullable=False),
    sa.Column('emitter', sa.LargeBinary(), nullable=False),
    sa.Column('canonical', sa.Boolean(), server_default=sa.text('true'), nullable=False),
    sa.Column('item', sa.Integer(), nullable=False),
    sa.Column('source', sa.Text(), nullable=False),
    sa.Column('loyalty', sa.LargeBinary(), nullable=False),
    sa.Column('operator', sa.LargeBinary(), nullable=False),
    sa.Column('sender', sa.LargeBinary(), nullable=False),
    sa.Column('recipient', sa.LargeBinary(), nullable=False),
    sa.Column('bucket', sa.Numeric(precision=78, scale=0), nullable=False),
    sa.Column('amount', sa.Numeric(precision=78, scale=0), nullable=False),
    sa.PrimaryKeyConstraint('chain_id', 'block_number', 'log_index', 'item', 'block_hash', name=op.f('transfer_pk')),
    schema='indexer'
    )
    op.create_index('transfer_orphan_idx', 'transfer', ['chain_id', 'block_number'], unique=False, schema='indexer', postgresql_where=sa.text('NOT canonical'))
    op.create_index('transfer_recipient_idx', 'transfer', ['recipient', 'loyalty'], unique=False, schema='indexer')
    op.create_index('transfer_sender_idx', 'transfer', ['sender', 'loyalty'], unique=False, schema='indexer')
    op.create_index('transfer_token_idx', 'transfer', ['chain_id', 'loyalty', 'source'], unique=False, schema='indexer')
    op.create_table('api_token',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('hash', sa.LargeBinary(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('brand', sa.Text(), nullable=True),
    sa.Column('scopes', postgresql.ARRAY(sa.Text()), nullable=False),
    sa.Column('created_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('revoked_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.ForeignKeyConstraint(['brand'], ['indexer.brand.name'], name=op.f('api_token_brand_fk')),
    sa.PrimaryKeyConstraint('id', name=op.f('api_token_pk')),
    sa.UniqueConstraint('hash', name=op.f('api_token_hash_key')),
    schema='indexer'
    )
    op.create_table('brand_login',
    sa.Column('login', sa.Text(), nullable=False),
    sa.Column('brand', sa.Text(), nullable=False),
    sa.Column('created_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.ForeignKeyConstraint(['brand'], ['indexer.brand.name'], name=op.f('brand_login_brand_fk')),
    sa.PrimaryKeyConstraint('login', name=op.f('brand_login_pk')),
    schema='indexer'
    )
    op.create_table('issuer',
    sa.Column('address', sa.LargeBinary(), nullable=False),
    sa.Column('brand', sa.Text(), nullable=False),
    sa.ForeignKeyConstraint(['brand'], ['indexer.brand.name'], name=op.f('issuer_brand_fk')),
    sa.PrimaryKeyConstraint('address', name=op.f('issuer_pk')),
    schema='indexer'
    )
    op.create_table('operation',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('brand', sa.Text(), nullable=False),
    sa.Column('reference', sa.Text(), nullable=False),
    sa.Column('request', postgresql.JSONB(), nullable=False),
    sa.Column('metadata', postgresql.JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
    sa.Column('requested_at', postgresql.TIMESTAMP(timezone=True), nullable=False),
    sa.Column('requested_at_stated', sa.Boolean(), nullable=False),
    sa.Column('registered_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('state', sa.Text(), server_default=sa.text("'pending'"), nullable=False),
    sa.Column('state_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('generation', sa.Integer(), server_default=sa.text('0'), nullable=False),
    sa.Column('cancelled_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('detail', postgresql.JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
    sa.Column('standing_signal', sa.UUID(), nullable=True),
    sa.Column('finalized_generation', sa.Integer(), server_default=sa.text('0'), nullable=False),
    sa.ForeignKeyConstraint(['brand'], ['indexer.brand.name'], name=op.f('operation_brand_fk')),
    sa.PrimaryKeyConstraint('id', name=op.f('operation_pk')),
    sa.UniqueConstraint('brand', 'reference', name=op.f('operation_brand_reference_key')),
    schema='indexer'
    )
    op.create_index('operation_any_ready_idx', 'operation', ['state_at', 'id'], unique=False, schema='indexer', postgresql_where=sa.text("state = 'ready'"))
    op.create_index('operation_open_idx', 'operation', ['state', 'registered_at'], unique=False, schema='indexer', postgresql_where=sa.text("state IN ('pending','submitted','confirming','incomplete','ready','reverted','conflict')"))
    op.create_index('operation_page_idx', 'operation', ['brand', 'registered_at', 'id'], unique=False, schema='indexer')
    op.create_index('operation_ready_idx', 'operation', ['brand', 'state_at', 'id'], unique=False, schema='indexer', postgresql_where=sa.text("state = 'ready'"))
    op.create_index('operation_state_idx', 'operation', ['brand', 'state', 'registered_at'], unique=False, schema='indexer')
    op.create_index('operation_undone_idx', 'operation', ['brand', 'state_at'], unique=False, schema='indexer', postgresql_where=sa.text("generation > 0 AND state NOT IN ('ready', 'fulfilled')"))
    op.create_table('partner_account',
    sa.Column('brand', sa.Text(), nullable=False),
    sa.Column('partner', sa.Text(), nullable=False),
    sa.Column('active', sa.Boolean(), server_default=sa.text('true'), nullable=False),
    sa.Column('state', postgresql.JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
    sa.Column('stopped_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('stopped_reason', sa.Text(), nullable=True),
    sa.Column('polled_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('problem', sa.Text(), nullable=True),
    sa.ForeignKeyConstraint(['brand'], ['indexer.brand.name'], name=op.f('partner_account_brand_fk')),
    sa.PrimaryKeyConstraint('brand', 'partner', name=op.f('partner_account_pk')),
    schema='indexer'
    )
    op.create_table('partner_hint',
    sa.Column('brand', sa.Text(), nullable=False),
    sa.Column('partner', sa.Text(), nullable=False),
    sa.Column('record_id', sa.Text(), nullable=False),
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('factory', sa.LargeBinary(), nullable=False),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('issuer', sa.LargeBinary(), nullable=False),
    sa.Column('nonce', sa.LargeBinary(), nullable=False),
    sa.Column('operation_hash', sa.LargeBinary(), nullable=True),
    sa.Column('status', sa.Text(), nullable=False),
    sa.Column('reason', sa.Text(), nullable=True),
    sa.Column('relay_tx_hash', sa.LargeBinary(), nullable=True),
    sa.Column('seen_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.ForeignKeyConstraint(['brand'], ['indexer.brand.name'], name=op.f('partner_hint_brand_fk')),
    sa.PrimaryKeyConstraint('brand', 'partner', 'record_id', name=op.f('partner_hint_pk')),
    schema='indexer'
    )
    op.create_index('partner_hint_nonce_idx', 'partner_hint', ['nonce'], unique=False, schema='indexer')
    op.create_index('partner_hint_operation_hash_idx', 'partner_hint', ['operation_hash'], unique=False, schema='indexer', postgresql_where=sa.text('operation_hash IS NOT NULL'))
    op.create_table('partner_transfer',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('brand', sa.Text(), nullable=False),
    sa.Column('partner', sa.Text(), nullable=False),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('record_id', sa.Text(), nullable=False),
    sa.Column('wallet', sa.Text(), nullable=False),
    sa.Column('token', sa.Text(), nullable=True),
    sa.Column('amount', sa.Numeric(precision=78, scale=0), nullable=True),
    sa.Column('amount_text', sa.Text(), nullable=True),
    sa.Column('time_ms', sa.BigInteger(), nullable=True),
    sa.Column('after_ms', sa.BigInteger(), nullable=True),
    sa.Column('undated', sa.Boolean(), server_default=sa.text('false'), nullable=False),
    sa.Column('status', sa.Text(), nullable=False),
    sa.Column('network', sa.Text(), nullable=True),
    sa.Column('chain_id', sa.BigInteger(), nullable=True),
    sa.Column('tx_hash', sa.Text(), nullable=True),
    sa.Column('tx_hashes', postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'::text[]"), nullable=False),
    sa.Column('block_number', sa.Numeric(precision=78, scale=0), nullable=True),
    sa.Column('transfers', postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'::text[]"), nullable=False),
    sa.Column('first_seen_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('settled_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('seen_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('missing', sa.SmallInteger(), server_default=sa.text('0'), nullable=False),
    sa.Column('withdrawn_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('checked', postgresql.JSONB(), nullable=True),
    sa.Column('unmatched_look_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=True),
    sa.ForeignKeyConstraint(['brand'], ['indexer.brand.name'], name=op.f('partner_transfer_brand_fk')),
    sa.PrimaryKeyConstraint('id', name=op.f('partner_transfer_pk')),
    schema='indexer'
    )
    op.create_index('partner_transfer_named_idx', 'partner_transfer', ['transfers'], unique=False, schema='indexer', postgresql_using='gin', postgresql_where=sa.text("transfers <> '{}'::text[]"))
    op.create_index('partner_transfer_page_idx', 'partner_transfer', ['brand', 'first_seen_at', 'id'], unique=False, schema='indexer')
    op.create_index('partner_transfer_record_idx', 'partner_transfer', ['brand', 'partner', 'record_id'], unique=False, schema='indexer')
    op.create_index('partner_transfer_tx_idx', 'partner_transfer', ['tx_hashes'], unique=False, schema='indexer', postgresql_using='gin', postgresql_where=sa.text('chain_id IS NOT NULL'))
    op.create_index('partner_transfer_unmatched_idx', 'partner_transfer', ['unmatched_look_at'], unique=False, schema='indexer', postgresql_where=sa.text('unmatched_look_at IS NOT NULL'))
    op.create_index('partner_transfer_wallet_idx', 'partner_transfer', ['brand', 'wallet', 'amount', 'kind'], unique=False, schema='indexer')
    op.create_table('webhook',
    sa.Column('brand', sa.Text(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('events', postgresql.ARRAY(sa.Text()), nullable=False),
    sa.Column('active', sa.Boolean(), server_default=sa.text('true'), nullable=False),
    sa.Column('after_sequence', sa.BigInteger(), server_default=sa.text('0'), nullable=False),
    sa.Column('disabled_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('disabled_as', sa.Text(), nullable=True),
    sa.Column('disabled_reason', sa.Text(), nullable=True),
    sa.Column('failing_since', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('failures', sa.Integer(), server_default=sa.text('0'), nullable=False),
    sa.ForeignKeyConstraint(['brand'], ['indexer.brand.name'], name=op.f('webhook_brand_fk')),
    sa.PrimaryKeyConstraint('brand', 'name', name=op.f('webhook_pk')),
    schema='indexer'
    )
    op.create_table('alarm',
    sa.Column('operation_id', sa.UUID(), nullable=False),
    sa.Column('chain_id', sa.BigInteger(), nullable=False),
    sa.Column('axis', sa.Text(), nullable=False),
    sa.Column('threshold', sa.BigInteger(), nullable=False),
    sa.ForeignKeyConstraint(['operation_id'], ['indexer.operation.id'], name=op.f('alarm_operation_id_fk')),
    sa.PrimaryKeyConstraint('operation_id', 'chain_id', 'axis', name=op.f('alarm_pk')),
    schema='indexer'
    )
    op.create_index('alarm_due_idx', 'alarm', ['chain_id', 'axis', 'threshold'], unique=False, schema='indexer')
    op.create_table('claim',
    sa.Column('operation_id', sa.UUID(), nullable=False),
    sa.Column('leg', sa.SmallInteger(), nullable=False),
    sa.Column('evidence_id', sa.UUID(), nullable=False),
    sa.Column('chain_id', sa.BigInteger(), nullable=True),
    sa.Column('block_number', sa.BigInteger(), nullable=True),
    sa.Column('log_index', sa.Integer(), nullable=True),
    sa.Column('block_hash', sa.LargeBinary(), nullable=True),
    sa.Column('basis', sa.Text(), nullable=False),
    sa.Column('ambiguous', sa.Boolean(), server_default=sa.text('false'), nullable=False),
    sa.Column('final', sa.Boolean(), server_default=sa.text('false'), nullable=False),
    sa.Column('claimed_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.ForeignKeyConstraint(['operation_id'], ['indexer.operation.id'], name=op.f('claim_operation_id_fk')),
    sa.PrimaryKeyConstraint('operation_id', 'leg', name=op.f('claim_pk')),
    sa.UniqueConstraint('evidence_id', name=op.f('claim_evidence_id_key')),
    schema='indexer'
    )
    op.create_index('claim_log_idx', 'claim', ['chain_id', 'block_number', 'log_index', 'block_hash'], unique=True, schema='indexer')
    op.create_table('decision',
    sa.Column('id', sa.UUID(), server_default=sa.text('gen_random_uuid()'), nullable=False),
    sa.Column('operation_id', sa.UUID(), nullable=False),
    sa.Column('evidence_id', sa.UUID(), nullable=False),
    sa.Column('leg', sa.SmallInteger(), server_default=sa.text('0'), nullable=False),
    sa.Column('accept', sa.Boolean(), nullable=False),
    sa.Column('reason', sa.Text(), nullable=False),
    sa.Column('actor', sa.Text(), nullable=False),
    sa.Column('decided_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.ForeignKeyConstraint(['operation_id'], ['indexer.operation.id'], name=op.f('decision_operation_id_fk')),
    sa.PrimaryKeyConstraint('id', name=op.f('decision_pk')),
    schema='indexer'
    )
    op.create_index('decision_evidence_idx', 'decision', ['evidence_id'], unique=False, schema='indexer')
    op.create_index('decision_operation_idx', 'decision', ['operation_id'], unique=False, schema='indexer')
    op.create_table('fulfilment_claim',
    sa.Column('id', sa.UUID(), server_default=sa.text('gen_random_uuid()'), nullable=False),
    sa.Column('operation_id', sa.UUID(), nullable=False),
    sa.Column('generation', sa.Integer(), nullable=False),
    sa.Column('consumer', sa.Text(), nullable=False),
    sa.Column('claimed_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.Column('claimed_until', postgresql.TIMESTAMP(timezone=True), nullable=False),
    sa.Column('ended_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('outcome', sa.Text(), nullable=True),
    sa.Column('second_receipt', postgresql.JSONB(), nullable=True),
    sa.ForeignKeyConstraint(['operation_id'], ['indexer.operation.id'], name=op.f('fulfilment_claim_operation_id_fk')),
    sa.PrimaryKeyConstraint('id', name=op.f('fulfilment_claim_pk')),
    schema='indexer'
    )
    op.create_index('fulfilment_claim_open_idx', 'fulfilment_claim', ['operation_id'], unique=True, schema='indexer', postgresql_where=sa.text('ended_at IS NULL'))
    op.create_table('history',
    sa.Column('id', sa.BigInteger(), sa.Identity(always=True), nullable=False),
    sa.Column('operation_id', sa.UUID(), nullable=False),
    sa.Column('from_state', sa.Text(), nullable=True),
    sa.Column('to_state', sa.Text(), nullable=False),
    sa.Column('generation', sa.Integer(), nullable=False),
    sa.Column('cause', sa.Text(), nullable=False),
    sa.Column('detail', postgresql.JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
    sa.Column('at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.ForeignKeyConstraint(['operation_id'], ['indexer.operation.id'], name=op.f('history_operation_id_fk')),
    sa.PrimaryKeyConstraint('id', name=op.f('history_pk')),
    schema='indexer'
    )
    op.create_index('history_operation_idx', 'history', ['operation_id', 'id'], unique=False, schema='indexer')
    op.create_table('leg',
    sa.Column('operation_id', sa.UUID(), nullable=False),
    sa.Column('leg', sa.SmallInteger(), nullable=False),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('match', sa.Text(), nullable=False),
    sa.Column('chain_id', sa.BigInteger(), nullable=True),
    sa.Column('factory', sa.LargeBinary(), nullable=True),
    sa.Column('issuer', sa.LargeBinary(), nullable=True),
    sa.Column('holder', sa.LargeBinary(), nullable=True),
    sa.Column('loyalty_id', sa.LargeBinary(), nullable=True),
    sa.Column('bucket', sa.Numeric(precision=78, scale=0), nullable=True),
    sa.Column('amount', sa.Numeric(precision=78, scale=0), nullable=False),
    sa.Column('deadline', sa.Numeric(precision=78, scale=0), nullable=True),
    sa.Column('nonce', sa.LargeBinary(), nullable=True),
    sa.Column('operation_hash', sa.LargeBinary(), nullable=True),
    sa.Column('wallet_id', sa.Text(), nullable=True),
    sa.Column('token', sa.Text(), nullable=True),
    sa.Column('requested_at', postgresql.TIMESTAMP(timezone=True), nullable=False),
    sa.Column('released', sa.Boolean(), server_default=sa.text('false'), nullable=False),
    sa.ForeignKeyConstraint(['operation_id'], ['indexer.operation.id'], name=op.f('leg_operation_id_fk')),
    sa.PrimaryKeyConstraint('operation_id', 'leg', name=op.f('leg_pk')),
    schema='indexer'
    )
    op.create_index('leg_any_nonce_idx', 'leg', ['nonce'], unique=False, schema='indexer', postgresql_where=sa.text('nonce IS NOT NULL'))
    op.create_index('leg_nonce_idx', 'leg', ['chain_id', 'factory', 'kind', 'issuer', 'nonce'], unique=True, schema='indexer', postgresql_where=sa.text('nonce IS NOT NULL AND NOT released'))
    op.create_index('leg_operation_hash_idx', 'leg', ['operation_hash'], unique=False, schema='indexer', postgresql_where=sa.text('operation_hash IS NOT NULL'))
    op.create_index('leg_partner_idx', 'leg', ['wallet_id', 'amount', 'kind'], unique=False, schema='indexer', postgresql_where=sa.text('wallet_id IS NOT NULL'))
    op.create_index('leg_wallet_idx', 'leg', ['holder', 'amount'], unique=False, schema='indexer', postgresql_where=sa.text("match = 'wallet_amount'"))
    op.create_table('receipt',
    sa.Column('operation_id', sa.UUID(), nullable=False),
    sa.Column('generation', sa.Integer(), nullable=False),
    sa.Column('outcome', sa.Text(), nullable=False),
    sa.Column('receipt', postgresql.JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
    sa.Column('claim', sa.UUID(), nullable=True),
    sa.Column('actor', sa.Text(), nullable=False),
    sa.Column('recorded_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('clock_timestamp()'), nullable=False),
    sa.ForeignKeyConstraint(['operation_id'], ['indexer.operation.id'], name=op.f('receipt_operation_id_fk')),
    sa.PrimaryKeyConstraint('operation_id', 'generation', name=op.f('receipt_pk')),
    schema='indexer'
    )


def drop_tables() -> None:
    op.drop_table('receipt', schema='indexer')
    op.drop_table('leg', schema='indexer')
    op.drop_table('history', schema='indexer')
    op.drop_table('fulfilment_claim', schema='indexer')
    op.drop_table('decision', schema='indexer')
    op.drop_table('claim', schema='indexer')
    op.drop_table('alarm', schema='indexer')
    op.drop_table('webhook', schema='indexer')
    op.drop_table('partner_transfer', schema='indexer')
    op.drop_table('partner_hint', schema='indexer')
    op.drop_table('partner_account', schema='indexer')
    op.drop_table('operation', schema='indexer')
    op.drop_table('issuer', schema='indexer')
    op.drop_table('brand_login', schema='indexer')
    op.drop_table('api_token', schema='indexer')
    op.drop_table('transfer', schema='indexer')
    op.drop_table('touched_operation', schema='indexer')
    op.drop_table('touched_blocks', schema='indexer')
    op.drop_table('reread', schema='indexer')
    op.drop_table('raw_log', schema='indexer')
    op.drop_table('programme_event', schema='indexer')
    op.drop_table('programme', schema='indexer')
    op.drop_table('partner_wallet', schema='indexer')
    op.drop_table('partner_record', schema='indexer')
    op.drop_table('outbox', schema='indexer')
    op.drop_table('movement', schema='indexer')
    op.drop_table('lease', schema='indexer')
    op.drop_table('instance', schema='indexer')
    op.drop_table('forgotten_signal', schema='indexer')
    op.drop_table('first_reading', schema='indexer')
    op.drop_table('endpoint_limits', schema='indexer')
    op.drop_table('emitter_role', schema='indexer')
    op.drop_table('emitter', schema='indexer')
    op.drop_table('delivery_attempt', schema='indexer')
    op.drop_table('delivery', schema='indexer')
    op.drop_table('coverage', schema='indexer')
    op.drop_table('chain_lookup', schema='indexer')
    op.drop_table('chain', schema='indexer')
    op.drop_table('brand', schema='indexer')
    op.drop_table('block', schema='indexer')
    op.drop_table('attestation', schema='indexer')


def upgrade() -> None:
    for role in ROLES:
        op.execute(CREATE_ROLE.format(role=role))
    create_tables()
    op.execute("INSERT INTO indexer.instance (stream) VALUES (gen_random_uuid())")
    op.execute("CREATE SCHEMA loyalty")
    contract = files("indexer.store").joinpath("contract")
    for name in CONTRACT:
        execute_script(contract.joinpath(name).read_text(encoding="utf-8"))


def downgrade() -> None:
    # the roles stay: other databases of the server may use them
    op.execute("DROP SCHEMA loyalty CASCADE")
    op.execute(DROP_BESIDE)
    op.execute("ALTER DEFAULT PRIVILEGES IN SCHEMA indexer REVOKE ALL ON TABLES FROM loyalty_daemon")
    drop_tables()
