-- Who may do what. Three groups beside the owner: loyalty_daemon writes facts and settles; loyalty_reader sees every view and
-- nothing else; loyalty_brand sees and acts for the brand that indexer.brand_login ties its login to. PUBLIC may do nothing.
--
-- Views and functions are named one by one, so that a new one is granted by a decision. The script may run again.

REVOKE ALL ON SCHEMA indexer, loyalty FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA indexer, loyalty FROM PUBLIC, loyalty_daemon, loyalty_reader, loyalty_brand;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA indexer, loyalty FROM PUBLIC, loyalty_daemon, loyalty_reader, loyalty_brand;

-- ------------------------------------------------------------------------------------------------ the daemon

GRANT USAGE ON SCHEMA indexer, loyalty TO loyalty_daemon;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA indexer TO loyalty_daemon;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA indexer TO loyalty_daemon;
GRANT SELECT ON ALL TABLES IN SCHEMA loyalty TO loyalty_daemon;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA indexer, loyalty TO loyalty_daemon;
ALTER DEFAULT PRIVILEGES IN SCHEMA indexer GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO loyalty_daemon;
-- the schema's version and who speaks for which brand are the owner's; what brands and people said, the functions write
REVOKE INSERT, UPDATE, DELETE ON indexer.alembic_version, indexer.brand_login, indexer.fulfilment_claim, indexer.decision FROM loyalty_daemon;
REVOKE UPDATE, DELETE ON indexer.receipt, indexer.history FROM loyalty_daemon;
REVOKE INSERT, DELETE ON indexer.instance FROM loyalty_daemon;

-- ------------------------------------------------------------------------------------------------ readers and brands

GRANT USAGE ON SCHEMA loyalty TO loyalty_reader, loyalty_brand;
GRANT SELECT ON loyalty.operations, loyalty.pending_fulfilments, loyalty.settlements, loyalty.exposures, loyalty.unmatched,
    loyalty.programs, loyalty.issuances, loyalty.redemptions, loyalty.transfers, loyalty.balances, loyalty.partner_orders,
    loyalty.signals, loyalty.sync_status
    TO loyalty_reader, loyalty_brand;
GRANT EXECUTE ON FUNCTION loyalty.balances_of(text) TO loyalty_reader, loyalty_brand;
GRANT EXECUTE ON FUNCTION
    loyalty.register_operation(jsonb),
    loyalty.cancel(uuid),
    loyalty.claim_fulfilments(text, int, interval),
    loyalty.renew_claim(uuid, interval),
    loyalty.release_claim(uuid),
    loyalty.fulfil(uuid, int, jsonb, uuid)
    TO loyalty_brand;
