-- Handing over: claims, which keep two workers of a brand from giving out the same goods, and receipts, which say that it
-- was done. Schema `loyalty` acts for the caller's brand. The twins in `indexer`, which only the daemon may call, are told for
-- which (null: every one) and who speaks.
--
-- An operation's row is locked before its claims and receipts are looked at, here as in the reconciler; who only searches
-- passes over what is locked. A claim is live while it has not ended, is in time, and is of the generation that is ready now:
-- a reverted operation's claim is void.

CREATE OR REPLACE FUNCTION indexer.check_lease(lease interval) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF lease IS NULL OR lease < interval '1 second' OR lease > interval '1 hour' THEN
        PERFORM indexer.refuse('LY422', 'lease: expected 1 second to 1 hour', '{"field": "lease"}');
    END IF;
END $$;

-- ------------------------------------------------------------------------------------------------ claims

-- Gives the consumer up to `max_count` operations that are ready, have no receipt of any generation, are under no live claim
-- are not held since a backup was put back (restoration.sql) and rest on no chain in doubt, oldest ready first. operation_ready_idx and
-- operation_any_ready_idx give the order, receipt_pk, fulfilment_claim_open_idx and brand_pk the rest.
CREATE OR REPLACE FUNCTION indexer.claim_fulfilments(for_brand text, consumer text, max_count int, lease interval)
RETURNS TABLE (claim uuid, operation_id uuid, brand text, reference text, generation int, claimed_until timestamptz,
               ready_at timestamptz, legs jsonb, metadata jsonb)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    free uuid[];
BEGIN
    IF coalesce(length(claim_fulfilments.consumer), 0) NOT BETWEEN 1 AND 200 OR claim_fulfilments.consumer ~ '[\u0001-\u001f\u007f-\u009f]' THEN
        PERFORM indexer.refuse('LY422', 'consumer: expected 1 to 200 characters without control characters', '{"field": "consumer"}');
    END IF;
    IF coalesce(max_count, 0) NOT BETWEEN 1 AND 1000 THEN
        PERFORM indexer.refuse('LY422', 'max_count: expected 1 to 1000', '{"field": "max_count"}');
    END IF;
    PERFORM indexer.check_lease(lease);
    LOOP
        IF for_brand IS NOT NULL THEN
            free := ARRAY(
                SELECT o.id FROM indexer.operation o
                WHERE o.brand = for_brand AND o.state = 'ready'
                  AND NOT EXISTS (SELECT FROM indexer.receipt r WHERE r.operation_id = o.id)
                  AND NOT EXISTS (SELECT FROM indexer.fulfilment_claim c WHERE c.operation_id = o.id AND c.ended_at IS NULL
                                  AND c.claimed_until > clock_timestamp() AND c.generation = o.generation)
                  AND NOT (EXISTS (SELECT FROM indexer.brand b WHERE b.name = o.brand AND b.held_before IS NOT NULL)
                           AND EXISTS (SELECT FROM indexer.held h WHERE h.operation_id = o.id))
                  AND NOT EXISTS (SELECT FROM indexer.in_doubt d WHERE d.operation_id = o.id)
                ORDER BY o.state_at, o.id LIMIT max_count FOR NO KEY UPDATE OF o SKIP LOCKED);
        ELSE
            free := ARRAY(
                SELECT o.id FROM indexer.operation o
                WHERE o.state = 'ready'
                  AND NOT EXISTS (SELECT FROM indexer.receipt r WHERE r.operation_id = o.id)
                  AND NOT EXISTS (SELECT FROM indexer.fulfilment_claim c WHERE c.operation_id = o.id AND c.ended_at IS NULL
                                  AND c.claimed_until > clock_timestamp() AND c.generation = o.generation)
                  AND NOT (EXISTS (SELECT FROM indexer.brand b WHERE b.name = o.brand AND b.held_before IS NOT NULL)
                           AND EXISTS (SELECT FROM indexer.held h WHERE h.operation_id = o.id))
                  AND NOT EXISTS (SELECT FROM indexer.in_doubt d WHERE d.operation_id = o.id)
                ORDER BY o.state_at, o.id LIMIT max_count FOR NO KEY UPDATE OF o SKIP LOCKED);
        END IF;
        EXIT WHEN free = '{}';
        -- From here on under the locks, and in statements of their own: they see what was committed during the search.
        -- Where the caller's isolation keeps them from it, fulfilment_claim_open_idx makes the transaction fail (40001).
        UPDATE indexer.fulfilment_claim c SET ended_at = clock_timestamp(), outcome = 'superseded'
        FROM indexer.operation o
        WHERE o.id = ANY (free) AND c.operation_id = o.id AND c.ended_at IS NULL
          AND (c.claimed_until <= clock_timestamp() OR c.generation <> o.generation);
        RETURN QUERY
            WITH made AS (
                INSERT INTO indexer.fulfilment_claim AS c (operation_id, generation, consumer, claimed_until)
                SELECT o.id, o.generation, claim_fulfilments.consumer, clock_timestamp() + lease FROM indexer.operation o
                WHERE o.id = ANY (free) AND o.state = 'ready' AND NOT EXISTS (SELECT FROM indexer.receipt r WHERE r.operation_id = o.id)
                ON CONFLICT DO NOTHING
                RETURNING c.id, c.operation_id, c.claimed_until
            )
            SELECT m.id, o.id, o.brand, o.reference, o.generation, m.claimed_until, o.state_at, o.request -> 'legs', o.metadata
            FROM made m JOIN indexer.operation o ON o.id = m.operation_id
            ORDER BY o.state_at, o.id;
        EXIT WHEN FOUND; -- else others were quicker with all of them: search again
    END LOOP;
END $$;

CREATE OR REPLACE FUNCTION loyalty.claim_fulfilments(consumer text, max_count int, lease interval)
RETURNS TABLE (claim uuid, operation_id uuid, brand text, reference text, generation int, claimed_until timestamptz,
               ready_at timestamptz, legs jsonb, metadata jsonb)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY SELECT c.claim, c.operation_id, c.brand, c.reference, c.generation, c.claimed_until, c.ready_at, c.legs, c.metadata
        FROM indexer.claim_fulfilments(indexer.acting_brand(), claim_fulfilments.consumer, max_count, lease) c;
END $$;

-- Locks the claim's operation and returns the claim as it is then. Raises LY404.
CREATE OR REPLACE FUNCTION indexer.lock_claim(for_brand text, claim uuid) RETURNS indexer.fulfilment_claim
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    found_claim indexer.fulfilment_claim;
BEGIN
    PERFORM FROM indexer.operation o WHERE (for_brand IS NULL OR o.brand = for_brand)
        AND o.id = (SELECT c.operation_id FROM indexer.fulfilment_claim c WHERE c.id = claim) FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM indexer.refuse('LY404', 'no such claim', jsonb_build_object('claim', claim));
    END IF;
    SELECT c.* INTO found_claim FROM indexer.fulfilment_claim c WHERE c.id = claim;
    RETURN found_claim;
END $$;

CREATE OR REPLACE FUNCTION indexer.renew_claim(for_brand text, claim uuid, lease interval) RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    c indexer.fulfilment_claim;
    o record;
    outcome text;
    until timestamptz;
BEGIN
    PERFORM indexer.check_lease(lease);
    c := indexer.lock_claim(for_brand, claim);
    SELECT p.state, p.generation INTO o FROM indexer.operation p WHERE p.id = c.operation_id;
    outcome := CASE WHEN EXISTS (SELECT FROM indexer.receipt r WHERE r.operation_id = c.operation_id AND r.generation = c.generation) THEN 'fulfilled'
                    WHEN c.generation <> o.generation OR o.state <> 'ready' THEN 'reverted'
                    WHEN c.outcome = 'released' THEN 'released'
                    WHEN c.ended_at IS NOT NULL OR c.claimed_until <= clock_timestamp() THEN 'claim_lapsed' END;
    IF outcome IS NOT NULL THEN
        PERFORM indexer.refuse('LY409', CASE outcome
                WHEN 'fulfilled' THEN 'this operation has been handed over'
                WHEN 'reverted' THEN format('the operation is %s, generation %s: do not hand over', o.state, o.generation)
                WHEN 'released' THEN 'this claim was released'
                ELSE 'this claim has lapsed: another worker may have it' END,
            jsonb_build_object('outcome', outcome, 'status', o.state, 'generation', o.generation));
    END IF;
    UPDATE indexer.fulfilment_claim f SET claimed_until = clock_timestamp() + lease WHERE f.id = c.id RETURNING f.claimed_until INTO until;
    RETURN jsonb_build_object('outcome', 'renewed', 'claimedUntil', to_char(until AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'));
END $$;

CREATE OR REPLACE FUNCTION loyalty.renew_claim(claim uuid, lease interval) RETURNS jsonb
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT indexer.renew_claim(indexer.acting_brand(), claim, lease)
$$;

CREATE OR REPLACE FUNCTION indexer.release_claim(for_brand text, claim uuid) RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    c indexer.fulfilment_claim;
BEGIN
    c := indexer.lock_claim(for_brand, claim);
    IF c.ended_at IS NULL AND c.claimed_until > clock_timestamp() THEN
        UPDATE indexer.fulfilment_claim f SET ended_at = clock_timestamp(), outcome = 'released' WHERE f.id = c.id;
        RETURN jsonb_build_object('outcome', 'released');
    END IF;
    RETURN jsonb_build_object('outcome', 'ended');
END $$;

CREATE OR REPLACE FUNCTION loyalty.release_claim(claim uuid) RETURNS jsonb
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT indexer.release_claim(indexer.acting_brand(), claim)
$$;

-- ------------------------------------------------------------------------------------------------ receipts

-- Records that the brand handed over. A receipt of a generation that was taken back is recorded too, and returned as
-- outcome `reverted`, one under a claim that was not live as `claim_lapsed`: an exception would roll the record back.
-- Idempotent by (operation, generation); who comes second with another claim than the one on record is told `claim_lapsed`,
-- and what it said is kept with its claim: the goods may have left twice.
CREATE OR REPLACE FUNCTION indexer.fulfil(for_brand text, operation_id uuid, generation int, receipt jsonb, claim uuid, actor text) RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    o record;
    known record;
    c indexer.fulfilment_claim;
    verdict text;
BEGIN
    PERFORM indexer.check_document(coalesce(receipt, '{}'), 'receipt');
    IF coalesce(length(actor), 0) NOT BETWEEN 1 AND 200 THEN
        PERFORM indexer.refuse('LY422', 'actor: expected 1 to 200 characters', '{"field": "actor"}');
    END IF;
    SELECT p.id, p.state, p.generation INTO o FROM indexer.operation p
    WHERE p.id = fulfil.operation_id AND (for_brand IS NULL OR p.brand = for_brand) FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM indexer.refuse('LY404', 'no such operation');
    END IF;
    IF claim IS NOT NULL THEN
        SELECT f.* INTO c FROM indexer.fulfilment_claim f WHERE f.id = claim AND f.operation_id = o.id;
        IF NOT FOUND THEN
            PERFORM indexer.refuse('LY404', 'no such claim', jsonb_build_object('claim', claim));
        END IF;
    END IF;
    SELECT r.outcome, r.claim INTO known FROM indexer.receipt r WHERE r.operation_id = o.id AND r.generation = fulfil.generation;
    IF FOUND THEN
        verdict := known.outcome;
        IF claim IS NOT NULL AND claim IS DISTINCT FROM known.claim THEN
            verdict := CASE verdict WHEN 'fulfilled' THEN 'claim_lapsed' ELSE verdict END;
            UPDATE indexer.fulfilment_claim f SET second_receipt = coalesce(receipt, '{}') WHERE f.id = claim AND f.second_receipt IS NULL;
        END IF;
        RETURN jsonb_build_object('outcome', verdict, 'generation', generation, 'repeated', true);
    END IF;
    IF generation IS NULL OR generation < 1 OR generation > o.generation THEN
        PERFORM indexer.refuse('LY409', format('generation %s was never ready; the operation is %s, generation %s', coalesce(generation::text, 'null'), o.state, o.generation),
                               jsonb_build_object('status', o.state, 'generation', o.generation));
    END IF;
    verdict := CASE WHEN generation <> o.generation OR o.state NOT IN ('ready', 'fulfilled') THEN 'reverted'
                    WHEN claim IS NOT NULL AND (c.ended_at IS NOT NULL OR c.claimed_until <= clock_timestamp() OR c.generation <> generation) THEN 'claim_lapsed'
                    ELSE 'fulfilled' END;
    INSERT INTO indexer.receipt (operation_id, generation, outcome, receipt, claim, actor)
    VALUES (o.id, generation, verdict, coalesce(receipt, '{}'), claim, actor);
    -- the row changes, so that a claim from a snapshot of before fails (40001) and does not hand out what is handed out
    UPDATE indexer.operation p SET state = p.state WHERE p.id = o.id;
    -- with a receipt there is nothing left to claim, whoever held it
    UPDATE indexer.fulfilment_claim f SET ended_at = clock_timestamp(), outcome = CASE WHEN f.id = claim THEN verdict ELSE 'superseded' END
    WHERE f.operation_id = o.id AND f.ended_at IS NULL;
    INSERT INTO indexer.touched_operation (operation_id) VALUES (o.id);
    NOTIFY indexer_registered;
    RETURN jsonb_build_object('outcome', verdict, 'generation', generation, 'repeated', false);
END $$;

CREATE OR REPLACE FUNCTION loyalty.fulfil(operation_id uuid, generation int, receipt jsonb, claim uuid DEFAULT NULL) RETURNS jsonb
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT indexer.fulfil(indexer.acting_brand(), operation_id, generation, receipt, claim, session_user::text)
$$;

COMMENT ON FUNCTION loyalty.claim_fulfilments(text, int, interval) IS 'Gives a worker (1 to 200 characters) up to so many (1 to 1000) operations to hand over, oldest ready first, that are nobody else''s for the lease (1 second to 1 hour)';
COMMENT ON FUNCTION loyalty.renew_claim(uuid, interval) IS 'Holds a claim for so long from now. Returns {"outcome": "renewed", "claimedUntil": time}; LY409 when it has ended: stop, do not hand over';
COMMENT ON FUNCTION loyalty.release_claim(uuid) IS 'Gives a claimed operation back at once. Returns {"outcome": "released"}, or "ended" where the claim had ended before';
COMMENT ON FUNCTION loyalty.fulfil(uuid, int, jsonb, uuid) IS 'Records that the brand has handed over, with its receipt (an object of at most 8 kB). Idempotent by operation and generation. Returns {"outcome": "fulfilled" | "reverted" | "claim_lapsed", "generation": int, "repeated": bool}; it is recorded in every case';
