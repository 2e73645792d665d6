-- After a backup was put back: which operations a restoration holds, and the end of the claims that it brought back.

-- Ready, without a receipt, and settled by evidence that stood on its ledger before the restoration: it may have been handed
-- over by a receipt that the backup does not hold. Nobody is given these to claim until a person releases the brand
-- (`indexer restored --release`). What is not shown to be newer counts as older. The evidence's own time tells, not the
-- registration: an operation that was lost and registered anew is as old as its evidence. Nor do we look at when we read a
-- partner's record, or since when it has stood: what came between the backup and the restoration is read again, or for the
-- first time, after it. The record's own time, or the last complete look that did not hold it, is what it cannot be older
-- than (five minutes for the partner's clock); on a chain that we follow, its block tells as any other's does.
-- operation_ready_idx; claim_pk, movement_pk, partner_transfer_pk, block_pk.
CREATE OR REPLACE VIEW indexer.held AS
    SELECT o.id AS operation_id, o.brand, o.reference, o.generation, o.state_at AS ready_at
    FROM indexer.brand b
    JOIN indexer.operation o ON o.brand = b.name AND o.state = 'ready'
    WHERE b.held_before IS NOT NULL
      AND NOT EXISTS (SELECT FROM indexer.receipt r WHERE r.operation_id = o.id)
      AND NOT EXISTS (
          SELECT FROM indexer.claim c
          JOIN indexer.movement m ON m.chain_id = c.chain_id AND m.block_number = c.block_number AND m.log_index = c.log_index
                                 AND m.block_hash = c.block_hash
          WHERE c.operation_id = o.id AND m.canonical AND m.block_time_ms > extract(epoch FROM b.held_before) * 1000)
      AND NOT EXISTS (
          SELECT FROM indexer.claim c
          JOIN indexer.partner_transfer t ON t.id = c.evidence_id
          LEFT JOIN indexer.block k ON k.chain_id = c.chain_id AND k.number = c.block_number AND k.hash = c.block_hash AND k.canonical
          WHERE c.operation_id = o.id AND t.withdrawn_at IS NULL AND (
              k.time_ms > extract(epoch FROM b.held_before) * 1000
              OR (t.first_seen_at > b.held_before AND t.time_ms > extract(epoch FROM b.held_before + interval '5 minutes') * 1000)));

-- Ends every claim: their workers may have handed over since the backup, or be gone. Returns how many there were.
CREATE OR REPLACE FUNCTION indexer.void_claims() RETURNS int
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH ended AS (
        UPDATE indexer.fulfilment_claim c SET ended_at = clock_timestamp(), outcome = 'superseded' WHERE c.ended_at IS NULL RETURNING 1)
    SELECT count(*)::int FROM ended
$$;
