-- Schema `loyalty`: the views, what other programs read. Stable: a column is added at the end or not at all.
-- Only canonical rows are shown; bytes are lower-case 0x text, chain amounts numeric, times timestamptz.
-- A view never writes and never locks; each comment below is the documentation that `\d+ loyalty.<view>` prints.
--
-- They run with their owner's rights, behind security_barrier, and show the rows of the caller's brand: `brand = ANY (…)`
-- rather than a choice, so that the indexes that begin with the brand serve a brand's login and a reader alike. A chain's
-- rows carry the brand of their issuer; those of no brand here are for readers and keepers.
--
-- A UNION ALL never stands at the top of such a view: PostgreSQL flattens it, its branches are no barriers, and a caller's own
-- function would be tried on rows of others. It stands in a subquery, and the brand is chosen around it.

-- The brands whose rows this session may see: its own, or all.
CREATE OR REPLACE VIEW indexer.visible_brand AS
    SELECT b.name AS brand FROM indexer.brand b, indexer.viewer v WHERE v.keeper OR v.reader OR b.name = v.brand;

-- ------------------------------------------------------------------------------------------------ balances, private

-- What each event added to or took from a holder's bucket, by the source that says so: sums must not mix the sources.
-- loyfin: PointsIssued, PointsRedeemed and LoyaltyTransfer, which may or may not repeat issues and redemptions as
-- transfers from and to the zero address: those are skipped. erc1155: TransferSingle and TransferBatch, mints and burns
-- included. A token and its factory may both log the same event; it counts once.
CREATE OR REPLACE VIEW indexer.balance_entry AS
    SELECT m.chain_id, m.loyalty, m.holder, m.bucket, 'loyfin'::text AS source,
           CASE m.kind WHEN 'loyfin.issuance' THEN m.amount ELSE -m.amount END AS delta
    FROM (
        SELECT DISTINCT chain_id, factory, kind, issuer, nonce, loyalty, holder, bucket, amount
        FROM indexer.movement WHERE canonical
    ) m
    UNION ALL
    SELECT t.chain_id, t.loyalty, t.sender, t.bucket, t.source, -t.amount
    FROM indexer.transfer t
    WHERE t.canonical AND t.sender <> '\x0000000000000000000000000000000000000000'
      AND (t.source = 'erc1155' OR t.recipient <> '\x0000000000000000000000000000000000000000')
      AND NOT (t.source = 'loyfin' AND t.emitter = t.loyalty AND EXISTS (
          SELECT 1 FROM indexer.transfer e -- transfer_pk
          WHERE e.chain_id = t.chain_id AND e.block_number = t.block_number AND e.block_hash = t.block_hash
            AND e.tx_hash = t.tx_hash AND e.source = 'loyfin' AND e.loyalty = t.loyalty AND e.emitter <> e.loyalty
            AND e.sender = t.sender AND e.recipient = t.recipient AND e.bucket = t.bucket AND e.amount = t.amount))
    UNION ALL
    SELECT t.chain_id, t.loyalty, t.recipient, t.bucket, t.source, t.amount
    FROM indexer.transfer t
    WHERE t.canonical AND t.recipient <> '\x0000000000000000000000000000000000000000'
      AND (t.source = 'erc1155' OR t.sender <> '\x0000000000000000000000000000000000000000')
      AND NOT (t.source = 'loyfin' AND t.emitter = t.loyalty AND EXISTS (
          SELECT 1 FROM indexer.transfer e -- transfer_pk
          WHERE e.chain_id = t.chain_id AND e.block_number = t.block_number AND e.block_hash = t.block_hash
            AND e.tx_hash = t.tx_hash AND e.source = 'loyfin' AND e.loyalty = t.loyalty AND e.emitter <> e.loyalty
            AND e.sender = t.sender AND e.recipient = t.recipient AND e.bucket = t.bucket AND e.amount = t.amount));

-- One source for each programme: ERC-1155's own events where the token has any, else Loyfin's. The sum is by holder and
-- bucket, so that a condition on the holder reaches the indexes (movement_holder_idx, transfer_sender_idx,
-- transfer_recipient_idx); the choice of the source comes after the sum, once a group. Negatives are not clamped.
CREATE OR REPLACE VIEW indexer.balance AS
    SELECT b.chain_id, b.loyalty, b.holder, b.bucket, b.source, b.balance
    FROM (
        SELECT chain_id, loyalty, holder, bucket, source, sum(delta) AS balance
        FROM indexer.balance_entry GROUP BY chain_id, loyalty, holder, bucket, source
    ) b
    WHERE b.balance <> 0
      AND b.source = CASE WHEN EXISTS (
              SELECT 1 FROM indexer.transfer x -- transfer_token_idx
              WHERE x.chain_id = b.chain_id AND x.loyalty = b.loyalty AND x.source = 'erc1155' AND x.canonical
          ) THEN 'erc1155' ELSE 'loyfin' END;

-- ------------------------------------------------------------------------------------------------ operations

CREATE OR REPLACE VIEW loyalty.operations WITH (security_barrier) AS
    SELECT o.id, o.brand, o.reference, o.state AS status, o.state_at AS status_at, o.generation,
           o.requested_at, o.registered_at, o.cancelled_at, o.metadata,
           o.request -> 'legs' AS legs,
           coalesce(o.detail -> 'evidence', '[]') AS evidence,
           coalesce(o.detail -> 'waitingFor', '[]') AS waiting_for,
           coalesce(o.detail -> 'conflicts', '[]') AS conflicts
    FROM indexer.operation o
    WHERE o.brand = ANY (ARRAY(SELECT v.brand FROM indexer.visible_brand v));
COMMENT ON VIEW loyalty.operations IS 'Everything the brands registered, with its present status. Look one up by id, or by brand and reference.';
COMMENT ON COLUMN loyalty.operations.id IS 'Derived from brand and reference: the same registration has the same id anywhere';
COMMENT ON COLUMN loyalty.operations.brand IS 'Whose operation it is';
COMMENT ON COLUMN loyalty.operations.reference IS 'The brand''s own name for it, unique in the brand';
COMMENT ON COLUMN loyalty.operations.status IS 'pending, submitted, confirming, ready, fulfilled, reverted, expired, incomplete, conflict or cancelled';
COMMENT ON COLUMN loyalty.operations.status_at IS 'When it came into this status';
COMMENT ON COLUMN loyalty.operations.generation IS 'How often it has become ready or been restored; name it when you fulfil';
COMMENT ON COLUMN loyalty.operations.requested_at IS 'When the customer asked, as the brand stated; else the registration';
COMMENT ON COLUMN loyalty.operations.registered_at IS 'When it was registered here';
COMMENT ON COLUMN loyalty.operations.cancelled_at IS 'When the brand asked to cancel it; null if never';
COMMENT ON COLUMN loyalty.operations.metadata IS 'The brand''s own words, returned as they came';
COMMENT ON COLUMN loyalty.operations.legs IS 'The movements of value that it consists of, normalised';
COMMENT ON COLUMN loyalty.operations.evidence IS 'What settles its legs, with basis and confidence';
COMMENT ON COLUMN loyalty.operations.waiting_for IS 'What is still missing, leg by leg';
COMMENT ON COLUMN loyalty.operations.conflicts IS 'Evidence that does not agree with the terms of a leg: resolve it by its evidenceId';

CREATE OR REPLACE VIEW loyalty.pending_fulfilments WITH (security_barrier) AS
    SELECT o.id AS operation_id, o.brand, o.reference, o.generation, o.state_at AS ready_at, o.requested_at, o.metadata,
           o.request -> 'legs' AS legs, c.consumer, c.claimed_until,
           EXISTS (SELECT 1 FROM indexer.held h WHERE h.operation_id = o.id) AS held
    FROM indexer.operation o -- operation_ready_idx
    LEFT JOIN indexer.fulfilment_claim c ON c.operation_id = o.id AND c.ended_at IS NULL -- fulfilment_claim_open_idx
                                        AND c.claimed_until > clock_timestamp() AND c.generation = o.generation
    WHERE o.state = 'ready' AND NOT EXISTS (SELECT 1 FROM indexer.receipt r WHERE r.operation_id = o.id)
      AND NOT EXISTS (SELECT 1 FROM indexer.held h WHERE h.operation_id = o.id)
      AND NOT EXISTS (SELECT 1 FROM indexer.in_doubt d WHERE d.operation_id = o.id)
      AND o.brand = ANY (ARRAY(SELECT v.brand FROM indexer.visible_brand v));
COMMENT ON VIEW loyalty.pending_fulfilments IS 'Ready, and not yet handed over: what a brand has to do now. An operation with any receipt is never here, nor one that is held since a backup was put back, nor one whose chain is latched or not followed just now.';
COMMENT ON COLUMN loyalty.pending_fulfilments.operation_id IS 'The operation: the first argument of loyalty.fulfil';
COMMENT ON COLUMN loyalty.pending_fulfilments.brand IS 'Who has to hand over';
COMMENT ON COLUMN loyalty.pending_fulfilments.reference IS 'The brand''s own name for it';
COMMENT ON COLUMN loyalty.pending_fulfilments.generation IS 'The second argument of loyalty.fulfil';
COMMENT ON COLUMN loyalty.pending_fulfilments.ready_at IS 'Since when it is ready';
COMMENT ON COLUMN loyalty.pending_fulfilments.requested_at IS 'When the customer asked';
COMMENT ON COLUMN loyalty.pending_fulfilments.metadata IS 'The brand''s own words';
COMMENT ON COLUMN loyalty.pending_fulfilments.legs IS 'The movements of value that settled';
COMMENT ON COLUMN loyalty.pending_fulfilments.consumer IS 'Who has claimed it and is at it now; null: nobody';
COMMENT ON COLUMN loyalty.pending_fulfilments.claimed_until IS 'Until when that claim lasts';
COMMENT ON COLUMN loyalty.pending_fulfilments.held IS 'Always false: what is held since a backup was put back is not shown';

CREATE OR REPLACE VIEW loyalty.settlements WITH (security_barrier) AS
    SELECT s.* FROM (
        SELECT c.operation_id, o.brand, o.reference, c.leg, m.kind, c.evidence_id, c.basis, c.ambiguous, c.final, c.claimed_at,
               CASE WHEN c.block_number <= h.finalized_number THEN 'finalized' WHEN c.block_number <= h.safe_number THEN 'safe'
                    ELSE 'included' END AS confidence,
               c.chain_id, c.block_number, '0x' || encode(c.block_hash, 'hex') AS block_hash,
               to_timestamp(m.block_time_ms / 1000.0) AS block_time, '0x' || encode(m.tx_hash, 'hex') AS tx_hash, c.log_index,
               '0x' || encode(m.issuer, 'hex') AS issuer, '0x' || encode(m.loyalty_id, 'hex') AS loyalty_id,
               '0x' || encode(m.holder, 'hex') AS holder, m.bucket, m.amount,
               'loyfin'::text AS provider, NULL::text AS record_id, NULL::text AS wallet_id, NULL::text AS token, NULL::text AS network
        FROM indexer.claim c
        JOIN indexer.operation o ON o.id = c.operation_id
        JOIN indexer.chain h ON h.chain_id = c.chain_id
        JOIN indexer.movement m ON m.chain_id = c.chain_id AND m.block_number = c.block_number AND m.log_index = c.log_index
                               AND m.block_hash = c.block_hash AND m.canonical
        UNION ALL
        SELECT c.operation_id, o.brand, o.reference, c.leg, t.kind, c.evidence_id, c.basis, c.ambiguous, c.final, c.claimed_at,
               (SELECT e ->> 'confidence' FROM jsonb_array_elements(o.detail -> 'evidence') AS e WHERE (e ->> 'leg')::int = c.leg LIMIT 1),
               c.chain_id, coalesce(c.block_number, CASE WHEN t.block_number < 9223372036854775808 THEN t.block_number::bigint END),
               '0x' || encode(c.block_hash, 'hex'), to_timestamp(coalesce(t.time_ms / 1000.0, extract(epoch FROM t.first_seen_at))),
               t.tx_hash, NULL, NULL, NULL, NULL, NULL::numeric(78, 0), t.amount, t.partner, t.record_id, t.wallet, t.token, t.network
        FROM indexer.claim c
        JOIN indexer.operation o ON o.id = c.operation_id
        JOIN indexer.partner_transfer t ON t.id = c.evidence_id AND t.brand = o.brand
    ) s
    WHERE s.brand = ANY (ARRAY(SELECT v.brand FROM indexer.visible_brand v));
COMMENT ON VIEW loyalty.settlements IS 'Which evidence settles which leg: one to one.';
COMMENT ON COLUMN loyalty.settlements.operation_id IS 'The operation';
COMMENT ON COLUMN loyalty.settlements.brand IS 'Whose operation it is';
COMMENT ON COLUMN loyalty.settlements.reference IS 'The brand''s own name for it';
COMMENT ON COLUMN loyalty.settlements.leg IS 'Position of the leg in the operation, from 0';
COMMENT ON COLUMN loyalty.settlements.kind IS 'loyfin.issuance, loyfin.redemption, keyban.mint, keyban.burn, qiibee.credit or qiibee.debit';
COMMENT ON COLUMN loyalty.settlements.evidence_id IS 'Identity of the evidence, whatever block it is in';
COMMENT ON COLUMN loyalty.settlements.basis IS 'Why they belong together: nonce, operation_hash, wallet_amount or decision';
COMMENT ON COLUMN loyalty.settlements.ambiguous IS 'There were several candidates, and the rules chose';
COMMENT ON COLUMN loyalty.settlements.final IS 'A ready has left on it';
COMMENT ON COLUMN loyalty.settlements.claimed_at IS 'When the pairing was made';
COMMENT ON COLUMN loyalty.settlements.confidence IS 'included, safe or finalized: where the evidence stands now; null while a partner''s transfer is not found on its chain';
COMMENT ON COLUMN loyalty.settlements.chain_id IS 'Chain of the evidence; null on a ledger that is not followed here';
COMMENT ON COLUMN loyalty.settlements.block_number IS 'Block of the evidence, or its place on the partner''s ledger';
COMMENT ON COLUMN loyalty.settlements.block_hash IS 'Hash of that block, 0x text';
COMMENT ON COLUMN loyalty.settlements.block_time IS 'Time of that block, or of the partner''s record';
COMMENT ON COLUMN loyalty.settlements.tx_hash IS 'Transaction of the evidence: 0x text, or as the partner spells it';
COMMENT ON COLUMN loyalty.settlements.log_index IS 'Position of the log in its block';
COMMENT ON COLUMN loyalty.settlements.issuer IS 'Issuer in the event, 0x text';
COMMENT ON COLUMN loyalty.settlements.loyalty_id IS 'Programme in the event, 0x text';
COMMENT ON COLUMN loyalty.settlements.holder IS 'Wallet in the event, 0x text';
COMMENT ON COLUMN loyalty.settlements.bucket IS 'Expiry bucket: Unix seconds, 0 never expires';
COMMENT ON COLUMN loyalty.settlements.amount IS 'Points moved';
COMMENT ON COLUMN loyalty.settlements.provider IS 'Whose ledger or records: loyfin, keyban or qiibee';
COMMENT ON COLUMN loyalty.settlements.record_id IS 'The partner''s own id of its record; null for loyfin';
COMMENT ON COLUMN loyalty.settlements.wallet_id IS 'Wallet or user at the partner; null for loyfin';
COMMENT ON COLUMN loyalty.settlements.token IS 'The partner''s id of the token, where it has one';
COMMENT ON COLUMN loyalty.settlements.network IS 'The partner''s name of the network';

CREATE OR REPLACE VIEW loyalty.exposures WITH (security_barrier) AS
    SELECT o.id AS operation_id, o.brand, o.reference, o.state AS status, o.state_at AS status_at, o.generation,
           r.generation AS fulfilled_generation, r.outcome, r.recorded_at AS fulfilled_at, r.receipt
    FROM indexer.operation o
    CROSS JOIN LATERAL (
        SELECT f.generation, f.outcome, f.recorded_at, f.receipt FROM indexer.receipt f -- receipt_pk
        WHERE f.operation_id = o.id ORDER BY f.generation DESC LIMIT 1
    ) r
    WHERE o.generation > 0 AND o.state NOT IN ('ready', 'fulfilled')
      AND o.brand = ANY (ARRAY(SELECT v.brand FROM indexer.visible_brand v));
COMMENT ON VIEW loyalty.exposures IS 'Handed out, and no longer settled: what a brand stands to lose, until the evidence returns.';
COMMENT ON COLUMN loyalty.exposures.operation_id IS 'The operation';
COMMENT ON COLUMN loyalty.exposures.brand IS 'Who handed over';
COMMENT ON COLUMN loyalty.exposures.reference IS 'The brand''s own name for it';
COMMENT ON COLUMN loyalty.exposures.status IS 'What it is now';
COMMENT ON COLUMN loyalty.exposures.status_at IS 'Since when';
COMMENT ON COLUMN loyalty.exposures.generation IS 'The generation it had reached';
COMMENT ON COLUMN loyalty.exposures.fulfilled_generation IS 'The last generation that has a receipt';
COMMENT ON COLUMN loyalty.exposures.outcome IS 'What that receipt was answered with: fulfilled, reverted or claim_lapsed';
COMMENT ON COLUMN loyalty.exposures.fulfilled_at IS 'When that receipt was recorded';
COMMENT ON COLUMN loyalty.exposures.receipt IS 'The receipt, as the brand gave it';

-- ------------------------------------------------------------------------------------------------ chain facts

CREATE OR REPLACE VIEW loyalty.unmatched WITH (security_barrier) AS
    SELECT u.* FROM (
        SELECT i.brand, m.kind, m.chain_id, m.block_number, '0x' || encode(m.block_hash, 'hex') AS block_hash,
               to_timestamp(m.block_time_ms / 1000.0) AS block_time, '0x' || encode(m.tx_hash, 'hex') AS tx_hash, m.log_index,
               '0x' || encode(m.factory, 'hex') AS factory, '0x' || encode(m.issuer, 'hex') AS issuer,
               '0x' || encode(m.loyalty_id, 'hex') AS loyalty_id, '0x' || encode(m.holder, 'hex') AS holder, m.bucket, m.amount,
               '0x' || encode(m.nonce, 'hex') AS nonce, '0x' || encode(m.operation_hash, 'hex') AS operation_hash,
               CASE WHEN m.block_number <= h.finalized_number THEN 'finalized' WHEN m.block_number <= h.safe_number THEN 'safe'
                    ELSE 'included' END AS confidence,
               to_timestamp(m.block_time_ms / 1000.0) < b.unmatched_since AS before_unmatched_since,
               'loyfin'::text AS provider, NULL::text AS record_id, NULL::text AS wallet_id, NULL::text AS token, false AS undated
        FROM indexer.movement m
        JOIN indexer.issuer i ON i.address = m.issuer
        JOIN indexer.brand b ON b.name = i.brand
        JOIN indexer.chain h ON h.chain_id = m.chain_id
        WHERE m.canonical AND NOT EXISTS (
            SELECT 1 FROM indexer.claim c -- claim_log_idx
            WHERE c.chain_id = m.chain_id AND c.block_number = m.block_number AND c.log_index = m.log_index AND c.block_hash = m.block_hash)
        UNION ALL
        SELECT t.brand, t.kind, t.chain_id, CASE WHEN t.block_number < 9223372036854775808 THEN t.block_number::bigint END, NULL,
               to_timestamp(coalesce(t.time_ms / 1000.0, extract(epoch FROM t.first_seen_at))), t.tx_hash, NULL, NULL, NULL, NULL, NULL,
               NULL::numeric(78, 0), t.amount, NULL, NULL, t.status, coalesce(to_timestamp(t.time_ms / 1000.0), t.first_seen_at) < b.unmatched_since,
               t.partner, t.record_id, t.wallet, t.token, t.undated
        FROM indexer.partner_transfer t
        JOIN indexer.brand b ON b.name = t.brand
        WHERE t.status IN ('included', 'succeeded') AND t.withdrawn_at IS NULL AND NOT EXISTS (
            SELECT 1 FROM indexer.claim c WHERE c.evidence_id = t.id) -- claim_evidence_id_key
    ) u
    WHERE u.brand = ANY (ARRAY(SELECT v.brand FROM indexer.visible_brand v));
COMMENT ON VIEW loyalty.unmatched IS 'Issues and redemptions of the brands'' issuers, and transfers in their partners'' records, that settle no operation, history included.';
COMMENT ON COLUMN loyalty.unmatched.brand IS 'Brand of the issuer, or of the account at the partner';
COMMENT ON COLUMN loyalty.unmatched.kind IS 'loyfin.issuance, loyfin.redemption, keyban.mint, keyban.burn, qiibee.credit or qiibee.debit';
COMMENT ON COLUMN loyalty.unmatched.chain_id IS 'Chain of the event; null on a ledger that is not followed here';
COMMENT ON COLUMN loyalty.unmatched.block_number IS 'Block of the event, or its place on the partner''s ledger';
COMMENT ON COLUMN loyalty.unmatched.block_hash IS 'Hash of that block, 0x text';
COMMENT ON COLUMN loyalty.unmatched.block_time IS 'Time of that block, or of the partner''s record';
COMMENT ON COLUMN loyalty.unmatched.tx_hash IS 'Transaction: 0x text, or as the partner spells it';
COMMENT ON COLUMN loyalty.unmatched.log_index IS 'Position of the log in its block';
COMMENT ON COLUMN loyalty.unmatched.factory IS 'Factory in the event, 0x text';
COMMENT ON COLUMN loyalty.unmatched.issuer IS 'Issuer in the event, 0x text';
COMMENT ON COLUMN loyalty.unmatched.loyalty_id IS 'Programme in the event, 0x text';
COMMENT ON COLUMN loyalty.unmatched.holder IS 'Wallet in the event, 0x text';
COMMENT ON COLUMN loyalty.unmatched.bucket IS 'Expiry bucket: Unix seconds, 0 never expires';
COMMENT ON COLUMN loyalty.unmatched.amount IS 'Points moved';
COMMENT ON COLUMN loyalty.unmatched.nonce IS 'Nonce of the signed action, 0x text';
COMMENT ON COLUMN loyalty.unmatched.operation_hash IS 'The brand''s correlation hash, 0x text; null when zero';
COMMENT ON COLUMN loyalty.unmatched.confidence IS 'included, safe or finalized: where the block is now; of a partner''s record included or succeeded, its own word';
COMMENT ON COLUMN loyalty.unmatched.before_unmatched_since IS 'Older than the brand''s unmatched_since: never signalled';
COMMENT ON COLUMN loyalty.unmatched.provider IS 'Whose ledger or records: loyfin, keyban or qiibee';
COMMENT ON COLUMN loyalty.unmatched.record_id IS 'The partner''s own id of its record; null for loyfin';
COMMENT ON COLUMN loyalty.unmatched.wallet_id IS 'Wallet or user at the partner; null for loyfin';
COMMENT ON COLUMN loyalty.unmatched.token IS 'The partner''s id of the token, where it has one';
COMMENT ON COLUMN loyalty.unmatched.undated IS 'Without a time of its own and there at the first look: never signalled, settles by decision alone';

-- ------------------------------------------------------------------------------------------------ partners

CREATE OR REPLACE VIEW loyalty.partner_orders WITH (security_barrier) AS
    SELECT t.brand, t.partner AS provider, t.kind, t.record_id, t.wallet AS wallet_id, t.token, t.amount, t.amount_text, t.status,
           t.network, t.chain_id, t.block_number, t.tx_hash, to_timestamp(t.time_ms / 1000.0) AS record_time, t.undated,
           t.first_seen_at, t.settled_at, t.withdrawn_at, t.id AS evidence_id, c.operation_id, c.leg, c.ambiguous
    FROM indexer.partner_transfer t
    LEFT JOIN indexer.claim c ON c.evidence_id = t.id -- claim_evidence_id_key
    WHERE t.brand = ANY (ARRAY(SELECT v.brand FROM indexer.visible_brand v));
COMMENT ON VIEW loyalty.partner_orders IS 'What the partners'' records say: Keyban orders and qiibee transactions, each with the leg that it settles.';
COMMENT ON COLUMN loyalty.partner_orders.brand IS 'Whose account at the partner';
COMMENT ON COLUMN loyalty.partner_orders.provider IS 'keyban or qiibee';
COMMENT ON COLUMN loyalty.partner_orders.kind IS 'keyban.mint, keyban.burn, qiibee.credit or qiibee.debit';
COMMENT ON COLUMN loyalty.partner_orders.record_id IS 'The partner''s own id of the order or transaction';
COMMENT ON COLUMN loyalty.partner_orders.wallet_id IS 'Wallet or user at the partner';
COMMENT ON COLUMN loyalty.partner_orders.token IS 'The partner''s id of the token, where it has one';
COMMENT ON COLUMN loyalty.partner_orders.amount IS 'Base units; null while it is not known';
COMMENT ON COLUMN loyalty.partner_orders.amount_text IS 'The amount as received';
COMMENT ON COLUMN loyalty.partner_orders.status IS 'pending, included, succeeded or failed';
COMMENT ON COLUMN loyalty.partner_orders.network IS 'The partner''s name of the network';
COMMENT ON COLUMN loyalty.partner_orders.chain_id IS 'The chain, where it is one that is followed here';
COMMENT ON COLUMN loyalty.partner_orders.block_number IS 'Its place on the ledger, in the partner''s words';
COMMENT ON COLUMN loyalty.partner_orders.tx_hash IS 'Its transaction, in the partner''s spelling';
COMMENT ON COLUMN loyalty.partner_orders.record_time IS 'The record''s own time; null when it has none';
COMMENT ON COLUMN loyalty.partner_orders.undated IS 'Without a time of its own and there at the first look: settles by decision alone';
COMMENT ON COLUMN loyalty.partner_orders.first_seen_at IS 'When it was first read';
COMMENT ON COLUMN loyalty.partner_orders.settled_at IS 'Since when it has been on the ledger unchanged';
COMMENT ON COLUMN loyalty.partner_orders.withdrawn_at IS 'When it had been missing from two full sweeps; null while it is there';
COMMENT ON COLUMN loyalty.partner_orders.evidence_id IS 'Its identity as evidence: what `operations resolve` names';
COMMENT ON COLUMN loyalty.partner_orders.operation_id IS 'The operation that it settles; null for none';
COMMENT ON COLUMN loyalty.partner_orders.leg IS 'Position of that leg, from 0';
COMMENT ON COLUMN loyalty.partner_orders.ambiguous IS 'There were several candidates, and the rules chose';

-- ------------------------------------------------------------------------------------------------ chain facts, continued

CREATE OR REPLACE VIEW loyalty.programs WITH (security_barrier) AS
    SELECT DISTINCT ON (p.chain_id, p.loyalty)
           p.chain_id, '0x' || encode(p.loyalty, 'hex') AS loyalty, '0x' || encode(p.factory, 'hex') AS factory,
           '0x' || encode(p.issuer, 'hex') AS issuer, '0x' || encode(p.loyalty_id, 'hex') AS loyalty_id, i.brand,
           p.name, p.symbol, p.media, p.description, p.contract_uri, p.token_uri,
           p.block_number, to_timestamp(p.block_time_ms / 1000.0) AS created_at, '0x' || encode(p.tx_hash, 'hex') AS tx_hash
    FROM indexer.programme p -- programme_token_idx
    LEFT JOIN indexer.issuer i ON i.address = p.issuer
    WHERE p.canonical
      AND (i.brand = ANY (ARRAY(SELECT v.brand FROM indexer.visible_brand v)) OR (SELECT v.keeper OR v.reader FROM indexer.viewer v))
    ORDER BY p.chain_id, p.loyalty, p.block_number, p.log_index;
COMMENT ON VIEW loyalty.programs IS 'Loyalty programmes, each as its first announcement described it. The texts are the issuer''s: do not trust them.';
COMMENT ON COLUMN loyalty.programs.chain_id IS 'Chain of the programme';
COMMENT ON COLUMN loyalty.programs.loyalty IS 'The programme''s token contract, 0x text';
COMMENT ON COLUMN loyalty.programs.factory IS 'The factory that made it, 0x text';
COMMENT ON COLUMN loyalty.programs.issuer IS 'Who signs its issues and redemptions, 0x text';
COMMENT ON COLUMN loyalty.programs.loyalty_id IS 'Its id at the factory and issuer, 0x text';
COMMENT ON COLUMN loyalty.programs.brand IS 'Brand of the issuer; null when no brand here has it';
COMMENT ON COLUMN loyalty.programs.name IS 'Name at creation';
COMMENT ON COLUMN loyalty.programs.symbol IS 'Symbol at creation';
COMMENT ON COLUMN loyalty.programs.media IS 'Picture at creation: untrusted text';
COMMENT ON COLUMN loyalty.programs.description IS 'Description at creation';
COMMENT ON COLUMN loyalty.programs.contract_uri IS 'Contract URI at creation; empty: generated metadata';
COMMENT ON COLUMN loyalty.programs.token_uri IS 'Token URI at creation; empty: generated metadata';
COMMENT ON COLUMN loyalty.programs.block_number IS 'Block of its creation';
COMMENT ON COLUMN loyalty.programs.created_at IS 'Time of that block';
COMMENT ON COLUMN loyalty.programs.tx_hash IS 'Transaction of its creation, 0x text';

CREATE OR REPLACE VIEW loyalty.issuances WITH (security_barrier) AS
    SELECT i.brand, m.chain_id, m.block_number, '0x' || encode(m.block_hash, 'hex') AS block_hash,
           to_timestamp(m.block_time_ms / 1000.0) AS block_time, '0x' || encode(m.tx_hash, 'hex') AS tx_hash, m.log_index,
           '0x' || encode(m.factory, 'hex') AS factory, '0x' || encode(m.issuer, 'hex') AS issuer,
           '0x' || encode(m.loyalty_id, 'hex') AS loyalty_id, '0x' || encode(m.loyalty, 'hex') AS loyalty,
           '0x' || encode(m.holder, 'hex') AS holder, m.bucket, m.amount, '0x' || encode(m.nonce, 'hex') AS nonce,
           '0x' || encode(m.operation_hash, 'hex') AS operation_hash, '0x' || encode(m.data, 'hex') AS data, o.id AS operation_id
    FROM indexer.movement m
    LEFT JOIN indexer.issuer i ON i.address = m.issuer
    LEFT JOIN indexer.claim c ON c.chain_id = m.chain_id AND c.block_number = m.block_number
                             AND c.log_index = m.log_index AND c.block_hash = m.block_hash
    -- an issuer may have come from another brand: whose operations its old events settled is not the new one's to know
    LEFT JOIN indexer.operation o ON o.id = c.operation_id AND o.brand = ANY (ARRAY(SELECT v.brand FROM indexer.visible_brand v))
    WHERE m.canonical AND m.kind = 'loyfin.issuance'
      AND (i.brand = ANY (ARRAY(SELECT v.brand FROM indexer.visible_brand v)) OR (SELECT v.keeper OR v.reader FROM indexer.viewer v));
COMMENT ON VIEW loyalty.issuances IS 'Points issued, as the chain says (PointsIssued), of every issuer that the factories serve.';
COMMENT ON COLUMN loyalty.issuances.brand IS 'Brand of the issuer; null when no brand here has it';
COMMENT ON COLUMN loyalty.issuances.chain_id IS 'Chain of the event';
COMMENT ON COLUMN loyalty.issuances.block_number IS 'Block of the event';
COMMENT ON COLUMN loyalty.issuances.block_hash IS 'Hash of that block, 0x text';
COMMENT ON COLUMN loyalty.issuances.block_time IS 'Time of that block';
COMMENT ON COLUMN loyalty.issuances.tx_hash IS 'Transaction, 0x text';
COMMENT ON COLUMN loyalty.issuances.log_index IS 'Position of the log in its block';
COMMENT ON COLUMN loyalty.issuances.factory IS 'Factory in the event, 0x text';
COMMENT ON COLUMN loyalty.issuances.issuer IS 'Issuer in the event, 0x text';
COMMENT ON COLUMN loyalty.issuances.loyalty_id IS 'Programme in the event, 0x text';
COMMENT ON COLUMN loyalty.issuances.loyalty IS 'The programme''s token contract, 0x text';
COMMENT ON COLUMN loyalty.issuances.holder IS 'Wallet that received them, 0x text';
COMMENT ON COLUMN loyalty.issuances.bucket IS 'Expiry bucket: Unix seconds, 0 never expires';
COMMENT ON COLUMN loyalty.issuances.amount IS 'Points issued';
COMMENT ON COLUMN loyalty.issuances.nonce IS 'Nonce of the signed action, 0x text';
COMMENT ON COLUMN loyalty.issuances.operation_hash IS 'The brand''s correlation hash, 0x text; null when zero';
COMMENT ON COLUMN loyalty.issuances.data IS 'Bytes signed along, 0x text: untrusted';
COMMENT ON COLUMN loyalty.issuances.operation_id IS 'The operation that it settles; null for none';

CREATE OR REPLACE VIEW loyalty.redemptions WITH (security_barrier) AS
    SELECT i.brand, m.chain_id, m.block_number, '0x' || encode(m.block_hash, 'hex') AS block_hash,
           to_timestamp(m.block_time_ms / 1000.0) AS block_time, '0x' || encode(m.tx_hash, 'hex') AS tx_hash, m.log_index,
           '0x' || encode(m.factory, 'hex') AS factory, '0x' || encode(m.issuer, 'hex') AS issuer,
           '0x' || encode(m.loyalty_id, 'hex') AS loyalty_id, '0x' || encode(m.loyalty, 'hex') AS loyalty,
           '0x' || encode(m.holder, 'hex') AS holder, m.bucket, m.amount, '0x' || encode(m.nonce, 'hex') AS nonce,
           '0x' || encode(m.operation_hash, 'hex') AS operation_hash, '0x' || encode(m.data, 'hex') AS data, o.id AS operation_id
    FROM indexer.movement m
    LEFT JOIN indexer.issuer i ON i.address = m.issuer
    LEFT JOIN indexer.claim c ON c.chain_id = m.chain_id AND c.block_number = m.block_number
                             AND c.log_index = m.log_index AND c.block_hash = m.block_hash
    -- an issuer may have come from another brand: whose operations its old events settled is not the new one's to know
    LEFT JOIN indexer.operation o ON o.id = c.operation_id AND o.brand = ANY (ARRAY(SELECT v.brand FROM indexer.visible_brand v))
    WHERE m.canonical AND m.kind = 'loyfin.redemption'
      AND (i.brand = ANY (ARRAY(SELECT v.brand FROM indexer.visible_brand v)) OR (SELECT v.keeper OR v.reader FROM indexer.viewer v));
COMMENT ON VIEW loyalty.redemptions IS 'Points redeemed, as the chain says (PointsRedeemed), of every issuer that the factories serve.';
COMMENT ON COLUMN loyalty.redemptions.brand IS 'Brand of the issuer; null when no brand here has it';
COMMENT ON COLUMN loyalty.redemptions.chain_id IS 'Chain of the event';
COMMENT ON COLUMN loyalty.redemptions.block_number IS 'Block of the event';
COMMENT ON COLUMN loyalty.redemptions.block_hash IS 'Hash of that block, 0x text';
COMMENT ON COLUMN loyalty.redemptions.block_time IS 'Time of that block';
COMMENT ON COLUMN loyalty.redemptions.tx_hash IS 'Transaction, 0x text';
COMMENT ON COLUMN loyalty.redemptions.log_index IS 'Position of the log in its block';
COMMENT ON COLUMN loyalty.redemptions.factory IS 'Factory in the event, 0x text';
COMMENT ON COLUMN loyalty.redemptions.issuer IS 'Issuer in the event, 0x text';
COMMENT ON COLUMN loyalty.redemptions.loyalty_id IS 'Programme in the event, 0x text';
COMMENT ON COLUMN loyalty.redemptions.loyalty IS 'The programme''s token contract, 0x text';
COMMENT ON COLUMN loyalty.redemptions.holder IS 'Wallet that gave them, 0x text';
COMMENT ON COLUMN loyalty.redemptions.bucket IS 'Expiry bucket: Unix seconds, 0 never expires';
COMMENT ON COLUMN loyalty.redemptions.amount IS 'Points redeemed';
COMMENT ON COLUMN loyalty.redemptions.nonce IS 'Nonce of the signed action, 0x text';
COMMENT ON COLUMN loyalty.redemptions.operation_hash IS 'The brand''s correlation hash, 0x text; null when zero';
COMMENT ON COLUMN loyalty.redemptions.data IS 'Bytes signed along, 0x text: untrusted';
COMMENT ON COLUMN loyalty.redemptions.operation_id IS 'The operation that it settles; null for none';

CREATE OR REPLACE VIEW loyalty.transfers WITH (security_barrier) AS
    SELECT i.brand, t.chain_id, t.block_number, '0x' || encode(t.block_hash, 'hex') AS block_hash,
           to_timestamp(t.block_time_ms / 1000.0) AS block_time, '0x' || encode(t.tx_hash, 'hex') AS tx_hash, t.log_index, t.item, t.source,
           '0x' || encode(t.loyalty, 'hex') AS loyalty, '0x' || encode(t.operator, 'hex') AS operator,
           '0x' || encode(t.sender, 'hex') AS sender, '0x' || encode(t.recipient, 'hex') AS recipient, t.bucket, t.amount
    FROM indexer.transfer t
    LEFT JOIN LATERAL (
        SELECT p.issuer FROM indexer.programme p -- programme_token_idx
        WHERE p.chain_id = t.chain_id AND p.loyalty = t.loyalty AND p.canonical
        ORDER BY p.block_number, p.log_index LIMIT 1
    ) p ON true
    LEFT JOIN indexer.issuer i ON i.address = p.issuer
    WHERE t.canonical
      AND (i.brand = ANY (ARRAY(SELECT v.brand FROM indexer.visible_brand v)) OR (SELECT v.keeper OR v.reader FROM indexer.viewer v));
COMMENT ON VIEW loyalty.transfers IS 'Points passed between wallets, an item of a batch a row. Sources overlap: never add up rows of two sources.';
COMMENT ON COLUMN loyalty.transfers.brand IS 'Brand of the programme''s issuer; null when no brand here has it';
COMMENT ON COLUMN loyalty.transfers.chain_id IS 'Chain of the event';
COMMENT ON COLUMN loyalty.transfers.block_number IS 'Block of the event';
COMMENT ON COLUMN loyalty.transfers.block_hash IS 'Hash of that block, 0x text';
COMMENT ON COLUMN loyalty.transfers.block_time IS 'Time of that block';
COMMENT ON COLUMN loyalty.transfers.tx_hash IS 'Transaction, 0x text';
COMMENT ON COLUMN loyalty.transfers.log_index IS 'Position of the log in its block';
COMMENT ON COLUMN loyalty.transfers.item IS 'Position in a batch; 0 for a single transfer';
COMMENT ON COLUMN loyalty.transfers.source IS 'loyfin (LoyaltyTransfer, LoyaltyBatchTransfer) or erc1155 (TransferSingle, TransferBatch)';
COMMENT ON COLUMN loyalty.transfers.loyalty IS 'The programme''s token contract, 0x text';
COMMENT ON COLUMN loyalty.transfers.operator IS 'Who made the transfer, 0x text';
COMMENT ON COLUMN loyalty.transfers.sender IS 'Wallet that gave, 0x text; zero for a mint';
COMMENT ON COLUMN loyalty.transfers.recipient IS 'Wallet that received, 0x text; zero for a burn';
COMMENT ON COLUMN loyalty.transfers.bucket IS 'Expiry bucket: Unix seconds, 0 never expires';
COMMENT ON COLUMN loyalty.transfers.amount IS 'Points passed on';

-- A balance with the words of its programme; `wallet` is the holder again, as bytes, for the indexes.
CREATE OR REPLACE VIEW indexer.holding AS
    SELECT b.holder AS wallet, b.chain_id, '0x' || encode(b.holder, 'hex') AS holder, '0x' || encode(b.loyalty, 'hex') AS loyalty,
           b.bucket, b.balance, b.source, '0x' || encode(p.factory, 'hex') AS factory, '0x' || encode(p.issuer, 'hex') AS issuer,
           '0x' || encode(p.loyalty_id, 'hex') AS loyalty_id, p.name, p.symbol, i.brand, h.history_complete
    FROM indexer.balance b
    JOIN indexer.chain h ON h.chain_id = b.chain_id
    LEFT JOIN LATERAL (
        SELECT q.factory, q.issuer, q.loyalty_id, q.name, q.symbol FROM indexer.programme q -- programme_token_idx
        WHERE q.chain_id = b.chain_id AND q.loyalty = b.loyalty AND q.canonical
        ORDER BY q.block_number, q.log_index LIMIT 1
    ) p ON true
    LEFT JOIN indexer.issuer i ON i.address = p.issuer;

CREATE OR REPLACE VIEW loyalty.balances WITH (security_barrier) AS
    SELECT b.chain_id, b.holder, b.loyalty, b.bucket, b.balance, b.source, b.factory, b.issuer, b.loyalty_id, b.name, b.symbol, b.brand,
           b.history_complete
    FROM indexer.holding b
    WHERE (b.brand = ANY (ARRAY(SELECT v.brand FROM indexer.visible_brand v)) OR (SELECT v.keeper OR v.reader FROM indexer.viewer v));
COMMENT ON VIEW loyalty.balances IS 'What each wallet holds in each programme and bucket, where it is not zero. For one wallet use loyalty.balances_of(wallet).';
COMMENT ON COLUMN loyalty.balances.chain_id IS 'Chain of the programme';
COMMENT ON COLUMN loyalty.balances.holder IS 'Wallet, 0x text';
COMMENT ON COLUMN loyalty.balances.loyalty IS 'The programme''s token contract, 0x text';
COMMENT ON COLUMN loyalty.balances.bucket IS 'Expiry bucket: Unix seconds, 0 never expires. An expired bucket keeps its balance on the chain';
COMMENT ON COLUMN loyalty.balances.balance IS 'Points; negative when history is missing, and not hidden';
COMMENT ON COLUMN loyalty.balances.source IS 'The events it is the sum of: erc1155 where the token emits them, else loyfin';
COMMENT ON COLUMN loyalty.balances.factory IS 'The factory that made the programme, 0x text';
COMMENT ON COLUMN loyalty.balances.issuer IS 'Issuer of the programme, 0x text';
COMMENT ON COLUMN loyalty.balances.loyalty_id IS 'The programme''s id at the factory and issuer, 0x text';
COMMENT ON COLUMN loyalty.balances.name IS 'Name of the programme: untrusted text';
COMMENT ON COLUMN loyalty.balances.symbol IS 'Symbol of the programme: untrusted text';
COMMENT ON COLUMN loyalty.balances.brand IS 'Brand of the issuer; null when no brand here has it';
COMMENT ON COLUMN loyalty.balances.history_complete IS 'Whether every block from the factories'' start is in: false means that the sum may lack something';

-- The balances of one wallet, by way of the indexes: a condition on the view's text column cannot use them.
CREATE OR REPLACE FUNCTION loyalty.balances_of(wallet text) RETURNS SETOF loyalty.balances
LANGUAGE plpgsql STABLE STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    raw bytea;
BEGIN
    IF wallet !~ '^0[xX][0-9a-fA-F]{40}$' THEN
        RAISE EXCEPTION USING ERRCODE = 'LY422', MESSAGE = 'wallet: expected 0x and 40 hex digits', DETAIL = '{"field": "wallet"}';
    END IF;
    raw := decode(substr(wallet, 3), 'hex');
    RETURN QUERY
        SELECT b.chain_id, b.holder, b.loyalty, b.bucket, b.balance, b.source, b.factory, b.issuer, b.loyalty_id, b.name, b.symbol,
               b.brand, b.history_complete
        FROM indexer.holding b WHERE b.wallet = raw
          AND (b.brand = ANY (ARRAY(SELECT v.brand FROM indexer.visible_brand v)) OR (SELECT v.keeper OR v.reader FROM indexer.viewer v));
END $$;
COMMENT ON FUNCTION loyalty.balances_of(text) IS 'Rows of loyalty.balances of one wallet (0x text, any case), by way of the indexes';

-- ------------------------------------------------------------------------------------------------ signals and state

CREATE OR REPLACE VIEW loyalty.signals WITH (security_barrier) AS
    SELECT s.brand, s.sequence, s.id, s.type, o.id AS operation_id, s.generation, s.payload, s.supersedes, s.superseded_by, s.created_at
    FROM indexer.outbox s -- outbox_sequence_idx
    -- by a join, so that a condition on the operation reaches outbox_aggregate_idx; who does not ask for it does not pay for it
    LEFT JOIN indexer.operation o ON o.id = s.aggregateid AND s.aggregatetype = 'operation'
    WHERE s.sequence IS NOT NULL AND s.brand = ANY (ARRAY(SELECT v.brand FROM indexer.visible_brand v));
COMMENT ON VIEW loyalty.signals IS 'What was signalled, in order and without gaps within a brand. Read it by ranges of the sequence: above the last one you took, up to so many more.';
COMMENT ON COLUMN loyalty.signals.brand IS 'To whom';
COMMENT ON COLUMN loyalty.signals.sequence IS 'Position in the brand''s stream, from 1';
COMMENT ON COLUMN loyalty.signals.id IS 'Identity of the signal: the webhook-id';
COMMENT ON COLUMN loyalty.signals.type IS 'Such as operation.ready';
COMMENT ON COLUMN loyalty.signals.operation_id IS 'The operation; null for settlement.unmatched';
COMMENT ON COLUMN loyalty.signals.generation IS 'The operation''s generation that it speaks of';
COMMENT ON COLUMN loyalty.signals.payload IS 'The body of the webhook';
COMMENT ON COLUMN loyalty.signals.supersedes IS 'The earlier signal that this one takes back';
COMMENT ON COLUMN loyalty.signals.superseded_by IS 'The later signal that takes this one back';
COMMENT ON COLUMN loyalty.signals.created_at IS 'When the change of state was committed';

CREATE OR REPLACE VIEW loyalty.sync_status WITH (security_barrier) AS
    SELECT c.chain_id, c.name, c.mode, c.head_number, to_timestamp(c.head_time_ms / 1000.0) AS head_time,
           round(greatest(extract(epoch FROM clock_timestamp()) - c.head_time_ms / 1000.0, 0), 3) AS head_lag_seconds,
           c.safe_number, to_timestamp(c.safe_time_ms / 1000.0) AS safe_time,
           c.finalized_number, to_timestamp(c.finalized_time_ms / 1000.0) AS finalized_time,
           c.history_complete, c.latch IS NOT NULL AS latched, c.active, i.stream
    FROM indexer.chain c LEFT JOIN indexer.instance i ON true;
COMMENT ON VIEW loyalty.sync_status IS 'How far each chain has been read. Before you trust an absence, look here.';
COMMENT ON COLUMN loyalty.sync_status.chain_id IS 'The chain';
COMMENT ON COLUMN loyalty.sync_status.name IS 'Its name in the configuration';
COMMENT ON COLUMN loyalty.sync_status.mode IS 'How it is followed: socket or polling; null before the first start';
COMMENT ON COLUMN loyalty.sync_status.head_number IS 'Last block taken in';
COMMENT ON COLUMN loyalty.sync_status.head_time IS 'Time of that block';
COMMENT ON COLUMN loyalty.sync_status.head_lag_seconds IS 'Seconds between that time and now';
COMMENT ON COLUMN loyalty.sync_status.safe_number IS 'Last safe block';
COMMENT ON COLUMN loyalty.sync_status.safe_time IS 'Time of that block';
COMMENT ON COLUMN loyalty.sync_status.finalized_number IS 'Last finalized block';
COMMENT ON COLUMN loyalty.sync_status.finalized_time IS 'Time of that block';
COMMENT ON COLUMN loyalty.sync_status.history_complete IS 'Whether every block from the factories'' start is in';
COMMENT ON COLUMN loyalty.sync_status.latched IS 'A finality violation was seen: no signals for this chain until a person resumes it';
COMMENT ON COLUMN loyalty.sync_status.active IS 'Still in the configuration';
COMMENT ON COLUMN loyalty.sync_status.stream IS 'Identity of this history of signals: a cursor belongs to one';
