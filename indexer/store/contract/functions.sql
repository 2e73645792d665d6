-- Schema `loyalty`: the functions, the only writers of operations, receipts, wishes and decisions. Claims and receipts are in
-- fulfilment.sql, who may call what in grants.sql. HTTP and the command line call them too. They record facts and ask the
-- reconciler to look (indexer.touched_operation); no state changes here.
--
-- Who calls is session_user, which no SET and no SET ROLE changes: never current_user, never a setting. SECURITY DEFINER with
-- a pinned search_path, pg_temp last: where it is not named, PostgreSQL looks for tables and types there first.
--
-- Errors carry SQLSTATE LY400 (malformed), LY403 (not yours), LY404 (no such thing), LY409 (conflict) or LY422 (cannot be
-- what it says), a MESSAGE for people and a JSON object in DETAIL. Another brand's operation does not exist: LY404.

SET LOCAL search_path = pg_catalog, pg_temp; -- for names in views and defaults, which are looked up now

-- ------------------------------------------------------------------------------------------------ who calls

-- The login behind this session. `keeper`: the daemon, the owner, a superuser, for whom there are no brands.
CREATE OR REPLACE VIEW indexer.viewer AS
    SELECT (SELECT l.brand FROM indexer.brand_login l WHERE l.login = session_user::text) AS brand, -- brand_login_pk
           pg_has_role(session_user, 'loyalty_daemon', 'MEMBER') OR pg_has_role(session_user, n.nspowner, 'MEMBER') AS keeper,
           pg_has_role(session_user, 'loyalty_reader', 'MEMBER') AS reader
    FROM pg_namespace n WHERE n.nspname = 'loyalty';

-- The brand in whose name the caller acts; null for keepers, who act for every one. Raises LY403 for anybody else.
CREATE OR REPLACE FUNCTION indexer.acting_brand() RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v record;
BEGIN
    SELECT w.brand, w.keeper INTO v FROM indexer.viewer w;
    IF v.brand IS NULL AND NOT v.keeper THEN
        PERFORM indexer.refuse('LY403', format('login %s is tied to no brand: the owner of the database does that (indexer sql-user add)', session_user));
    END IF;
    RETURN v.brand;
END $$;

-- ------------------------------------------------------------------------------------------------ derived identifiers

-- SHA-1 (RFC 3174), so that UUIDv5 needs no extension that a managed PostgreSQL may lack.
CREATE OR REPLACE FUNCTION indexer.sha1(message bytea) RETURNS bytea
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    padded bytea;
    words bigint[];
    h0 bigint := 1732584193; h1 bigint := 4023233417; h2 bigint := 2562383102; h3 bigint := 271733878; h4 bigint := 3285377520;
    a bigint; b bigint; c bigint; d bigint; e bigint; f bigint; k bigint; t bigint;
    mask constant bigint := 4294967295;
    chunk int; i int;
BEGIN
    padded := message || '\x80'::bytea || decode(repeat('00', (119 - octet_length(message) % 64) % 64), 'hex')
              || int8send(octet_length(message)::bigint * 8);
    FOR chunk IN 0 .. octet_length(padded) / 64 - 1 LOOP
        -- operators of PostgreSQL other than arithmetic share one precedence: hence the parentheses
        words := ARRAY(SELECT (get_byte(padded, chunk * 64 + j * 4)::bigint << 24) | (get_byte(padded, chunk * 64 + j * 4 + 1)::bigint << 16)
                            | (get_byte(padded, chunk * 64 + j * 4 + 2)::bigint << 8) | get_byte(padded, chunk * 64 + j * 4 + 3)::bigint
                       FROM generate_series(0, 15) AS j);
        FOR i IN 17 .. 80 LOOP
            t := words[i - 3] # words[i - 8] # words[i - 14] # words[i - 16];
            words[i] := ((t << 1) | (t >> 31)) & mask;
        END LOOP;
        a := h0; b := h1; c := h2; d := h3; e := h4;
        FOR i IN 1 .. 80 LOOP
            IF i <= 20 THEN f := (b & c) | ((mask # b) & d); k := 1518500249;
            ELSIF i <= 40 THEN f := b # c # d; k := 1859775393;
            ELSIF i <= 60 THEN f := (b & c) | (b & d) | (c & d); k := 2400959708;
            ELSE f := b # c # d; k := 3395469782;
            END IF;
            t := ((((a << 5) | (a >> 27)) & mask) + f + e + k + words[i]) & mask;
            e := d; d := c; c := ((b << 30) | (b >> 2)) & mask; b := a; a := t;
        END LOOP;
        h0 := (h0 + a) & mask; h1 := (h1 + b) & mask; h2 := (h2 + c) & mask; h3 := (h3 + d) & mask; h4 := (h4 + e) & mask;
    END LOOP;
    RETURN decode(lpad(to_hex(h0), 8, '0') || lpad(to_hex(h1), 8, '0') || lpad(to_hex(h2), 8, '0')
                  || lpad(to_hex(h3), 8, '0') || lpad(to_hex(h4), 8, '0'), 'hex');
END $$;

-- UUIDv5 (RFC 9562, 5.5) of a name in a namespace.
CREATE OR REPLACE FUNCTION indexer.uuid5(namespace uuid, name text) RETURNS uuid
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    digest bytea := substring(indexer.sha1(uuid_send(namespace) || convert_to(name, 'UTF8')) FROM 1 FOR 16);
BEGIN
    digest := set_byte(digest, 6, (get_byte(digest, 6) & 15) | 80);
    digest := set_byte(digest, 8, (get_byte(digest, 8) & 63) | 128);
    RETURN encode(digest, 'hex')::uuid;
END $$;

-- An operation's id, of its brand and reference: the same registration anywhere gives the same id.
-- The namespace is model/operation.py's NAMESPACE_OPERATION; a brand's name holds no slash.
CREATE OR REPLACE FUNCTION indexer.operation_id(brand text, reference text) RETURNS uuid
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
    SELECT indexer.uuid5('6f7d6b1c-6d0f-5a8e-9c55-0b6b3f6a9e01', brand || '/' || reference)
$$;

-- ------------------------------------------------------------------------------------------------ a chain's liveness

-- Whether as many endpoints as are needed were seen, in the last 30 seconds, to hold what we hold. One endpoint is its own witness.
CREATE OR REPLACE FUNCTION indexer.is_agreed(c indexer.chain) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT c.quorum = 1 OR coalesce(c.agreed_at > clock_timestamp() - interval '30 seconds', false)
$$;

-- Whether the chain's follower, under the lease it holds now, has linked a head to what is stored in the last 30 seconds, while the
-- endpoints agreed on it. If not, stored blocks may have been undone unseen: facts go on, signals of readiness wait.
CREATE OR REPLACE FUNCTION indexer.is_live(c indexer.chain) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(c.head_at > clock_timestamp() - interval '30 seconds', false)
       AND l.epoch IS NOT DISTINCT FROM c.linked_epoch AND (l.task IS NULL OR coalesce(l.until > clock_timestamp(), false))
    FROM (SELECT 1) AS one LEFT JOIN indexer.lease l ON l.task = 'follow:' || c.chain_id
$$;

-- Operations that rest on a chain of which nobody knows whether its blocks still stand: latched, or not live (as is_live says,
-- written out since a view's functions run with its reader's rights). None of them is handed out.
CREATE OR REPLACE VIEW indexer.in_doubt AS
    SELECT e.operation_id
    FROM (
        SELECT l.operation_id, l.chain_id FROM indexer.leg l
        UNION ALL
        SELECT k.operation_id, k.chain_id FROM indexer.claim k -- a partner's record on a chain that is followed
    ) e
    JOIN indexer.chain c ON c.chain_id = e.chain_id
    LEFT JOIN indexer.lease t ON t.task = 'follow:' || c.chain_id
    WHERE c.latch IS NOT NULL
       OR NOT (coalesce(c.head_at > clock_timestamp() - interval '30 seconds', false)
               AND t.epoch IS NOT DISTINCT FROM c.linked_epoch AND (t.task IS NULL OR coalesce(t.until > clock_timestamp(), false)));

-- ------------------------------------------------------------------------------------------------ reading a request

CREATE OR REPLACE FUNCTION indexer.refuse(code text, message text, detail jsonb DEFAULT '{}') RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = code, MESSAGE = message, DETAIL = detail::text;
END $$;

-- 0x hex of `size` bytes from a JSON string; null when absent. Raises LY422.
CREATE OR REPLACE FUNCTION indexer.read_bytes(object jsonb, key text, size int, place text) RETURNS bytea
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    value text := object ->> key;
BEGIN
    IF value IS NULL THEN RETURN NULL; END IF;
    IF jsonb_typeof(object -> key) <> 'string' OR value !~ '^0[xX][0-9a-fA-F]*$' OR length(value) <> 2 + 2 * size THEN
        PERFORM indexer.refuse('LY422', format('%s.%s: expected 0x and %s hex digits', place, key, 2 * size),
                               jsonb_build_object('field', place || '.' || key));
    END IF;
    RETURN decode(substr(value, 3), 'hex');
END $$;

-- A uint256 from a decimal string or a JSON integer; null when absent. Raises LY422.
CREATE OR REPLACE FUNCTION indexer.read_uint256(object jsonb, key text, place text) RETURNS numeric
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    value text := object ->> key;
BEGIN
    IF value IS NULL THEN RETURN NULL; END IF;
    IF jsonb_typeof(object -> key) NOT IN ('string', 'number') OR value !~ '^[0-9]{1,78}$'
       OR value::numeric > 115792089237316195423570985008687907853269984665640564039457584007913129639935 THEN
        PERFORM indexer.refuse('LY422', format('%s.%s: expected a decimal string between 0 and 2^256 - 1', place, key),
                               jsonb_build_object('field', place || '.' || key));
    END IF;
    RETURN value::numeric;
END $$;

CREATE OR REPLACE FUNCTION indexer.hex0x(value bytea) RETURNS text
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$ SELECT '0x' || encode(value, 'hex') $$;

-- Refuses keys that the contract does not know, naming them: a misspelt deadline must not be silently none.
CREATE OR REPLACE FUNCTION indexer.only_keys(object jsonb, known text[], place text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    strange text;
BEGIN
    SELECT string_agg(key, ', ' ORDER BY key) INTO strange FROM jsonb_object_keys(object) AS key WHERE key <> ALL (known);
    IF strange IS NOT NULL THEN
        PERFORM indexer.refuse('LY422', format('%s: unknown field %s; known are %s', place, left(strange, 200), array_to_string(known, ', ')),
                               jsonb_build_object('field', place));
    END IF;
END $$;

-- A time from an RFC 3339 string with its offset; null when absent. Raises LY422.
CREATE OR REPLACE FUNCTION indexer.read_time(object jsonb, key text, place text) RETURNS timestamptz
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    value text := object ->> key;
BEGIN
    IF value IS NULL THEN RETURN NULL; END IF;
    IF jsonb_typeof(object -> key) <> 'string' OR value !~ '^\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)$' THEN
        PERFORM indexer.refuse('LY422', format('%s.%s: expected an RFC 3339 time with its offset, such as 2026-11-21T10:00:00Z', place, key),
                               jsonb_build_object('field', place || '.' || key));
    END IF;
    IF value::timestamptz NOT BETWEEN '1970-01-01Z' AND '9999-12-31Z' THEN
        PERFORM indexer.refuse('LY422', format('%s.%s: expected a time from 1970 to 9999', place, key), jsonb_build_object('field', place || '.' || key));
    END IF;
    RETURN value::timestamptz;
EXCEPTION WHEN data_exception THEN
    PERFORM indexer.refuse('LY422', format('%s.%s: no such time', place, key), jsonb_build_object('field', place || '.' || key));
END $$;

-- An object of a brand's own that every reader can read again: not too long, too deep, or with numbers beyond a float.
CREATE OR REPLACE FUNCTION indexer.check_document(document jsonb, field text) RETURNS void
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF jsonb_typeof(document) <> 'object' OR octet_length(document::text) > 8192 THEN
        PERFORM indexer.refuse('LY422', field || ': expected an object of at most 8 kB', jsonb_build_object('field', field));
    END IF;
    IF jsonb_path_exists(document, '$.**{33 to last}') THEN
        PERFORM indexer.refuse('LY422', field || ': nested more than 32 deep', jsonb_build_object('field', field));
    END IF;
    IF jsonb_path_exists(document, 'strict $.** ? (@.type() == "number" && (@ > 1e100 || @ < -1e100))') THEN
        PERFORM indexer.refuse('LY422', field || ': a number of more than 100 digits', jsonb_build_object('field', field));
    END IF;
END $$;

-- One partner leg, normalised. Nothing names its record beforehand: wallet, amount, token and time are all that can match it.
CREATE OR REPLACE FUNCTION indexer.normalise_partner_leg(given jsonb, brand text, place text) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    kind text := given ->> 'kind';
    provider text := split_part(given ->> 'kind', '.', 1); -- no column's name
    wallet text := given ->> 'walletId';
    token text := given ->> 'token';
    amount numeric; requested timestamptz;
BEGIN
    IF kind NOT IN ('keyban.mint', 'keyban.burn', 'qiibee.credit', 'qiibee.debit') THEN
        PERFORM indexer.refuse('LY422', format('%s.kind: %s is no kind of leg; those of partners are keyban.mint, keyban.burn, qiibee.credit and qiibee.debit', place, quote_literal(left(kind, 60))),
                               jsonb_build_object('field', place || '.kind'));
    END IF;
    PERFORM indexer.only_keys(given, CASE provider WHEN 'qiibee' THEN ARRAY['kind', 'walletId', 'amount', 'token', 'requestedAt', 'match']
                                                  ELSE ARRAY['kind', 'walletId', 'amount', 'requestedAt', 'match'] END, place);
    IF NOT EXISTS (SELECT 1 FROM indexer.partner_account a WHERE a.brand = normalise_partner_leg.brand AND a.partner = provider AND a.active) THEN
        PERFORM indexer.refuse('LY422', format('%s.kind: brand %s has no %s account configured here', place, brand, provider), jsonb_build_object('field', place || '.kind'));
    END IF;
    IF jsonb_typeof(given -> 'walletId') IS DISTINCT FROM 'string' OR length(wallet) NOT BETWEEN 1 AND 200 OR wallet ~ '[\u0001-\u0020\u007f-\u009f]' THEN
        PERFORM indexer.refuse('LY422', format('%s.walletId: expected 1 to 200 characters without spaces and control characters', place), jsonb_build_object('field', place || '.walletId'));
    END IF;
    IF wallet ~ '^0[xX][0-9a-fA-F]+$' THEN -- hex has no case; a Stellar address and a partner's own id have
        wallet := lower(wallet);
    END IF;
    IF given ? 'token' AND given -> 'token' <> 'null' AND (jsonb_typeof(given -> 'token') NOT IN ('string', 'number') OR length(token) NOT BETWEEN 1 AND 100 OR token ~ '[\u0001-\u0020\u007f-\u009f]') THEN
        PERFORM indexer.refuse('LY422', format('%s.token: expected qiibee''s id of the token', place), jsonb_build_object('field', place || '.token'));
    END IF;
    IF given ? 'match' AND given ->> 'match' IS DISTINCT FROM 'wallet_amount' THEN
        PERFORM indexer.refuse('LY422', format('%s.match: a partner leg is matched by wallet_amount alone', place), jsonb_build_object('field', place || '.match'));
    END IF;
    amount := indexer.read_uint256(given, 'amount', place);
    IF amount IS NULL OR amount = 0 THEN
        PERFORM indexer.refuse('LY422', format('%s.amount: must be given and above zero, in base units', place), jsonb_build_object('field', place || '.amount'));
    END IF;
    requested := indexer.read_time(given, 'requestedAt', place);
    RETURN jsonb_build_object('kind', kind, 'match', 'wallet_amount', 'walletId', wallet, 'amount', amount::text)
           || CASE WHEN token IS NULL THEN '{}' ELSE jsonb_build_object('token', token) END
           || CASE WHEN requested IS NULL THEN '{}' ELSE jsonb_build_object('requestedAt', to_char(requested AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')) END;
END $$;

-- One leg, normalised; a Loyfin leg with every field present, bytes in lower case, numbers as decimal strings.
CREATE OR REPLACE FUNCTION indexer.normalise_leg(given jsonb, brand text, place text) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    kind text := given ->> 'kind';
    chain numeric; factory bytea; issuer bytea; holder bytea; loyalty_id bytea; nonce bytea; operation_hash bytea;
    amount numeric; bucket numeric; deadline numeric; match text := given ->> 'match'; factories bytea[];
BEGIN
    IF jsonb_typeof(given) <> 'object' THEN
        PERFORM indexer.refuse('LY422', place || ': expected an object', jsonb_build_object('field', place));
    END IF;
    IF kind ~ '^(keyban|qiibee)\.' THEN
        RETURN indexer.normalise_partner_leg(given, brand, place);
    END IF;
    IF kind IS NULL OR kind NOT IN ('loyfin.issuance', 'loyfin.redemption') THEN
        PERFORM indexer.refuse('LY422', format('%s.kind: expected loyfin.issuance, loyfin.redemption, keyban.mint, keyban.burn, qiibee.credit or qiibee.debit, not %s', place, coalesce(left(kind, 60), 'nothing')),
                               jsonb_build_object('field', place || '.kind'));
    END IF;
    PERFORM indexer.only_keys(given, ARRAY['kind', 'chainId', 'factory', 'issuer', 'holder', 'loyaltyId', 'amount', 'expiresAt', 'deadline', 'nonce', 'operationHash', 'match'], place);

    chain := indexer.read_uint256(given, 'chainId', place);
    IF chain IS NULL OR NOT EXISTS (SELECT 1 FROM indexer.chain c WHERE c.chain_id = chain AND c.active) THEN
        PERFORM indexer.refuse('LY422', format('%s.chainId: chain %s is not followed here', place, coalesce(chain::text, '(none given)')), jsonb_build_object('field', place || '.chainId'));
    END IF;
    factory := indexer.read_bytes(given, 'factory', 20, place);
    SELECT array_agg(e.address) INTO factories FROM indexer.emitter e WHERE e.chain_id = chain AND e.kind = 'factory' AND e.active;
    IF factory IS NULL AND array_length(factories, 1) = 1 THEN
        factory := factories[1];
    ELSIF factory IS NULL THEN
        PERFORM indexer.refuse('LY422', format('%s.factory: chain %s has %s factories, say which', place, chain, coalesce(array_length(factories, 1), 0)), jsonb_build_object('field', place || '.factory'));
    ELSIF factories IS NULL OR factory <> ALL (factories) THEN
        PERFORM indexer.refuse('LY422', format('%s.factory: %s is not a factory of chain %s here', place, indexer.hex0x(factory), chain), jsonb_build_object('field', place || '.factory'));
    END IF;

    issuer := indexer.read_bytes(given, 'issuer', 20, place);
    holder := indexer.read_bytes(given, 'holder', 20, place);
    loyalty_id := indexer.read_bytes(given, 'loyaltyId', 32, place);
    amount := indexer.read_uint256(given, 'amount', place);
    bucket := coalesce(indexer.read_uint256(given, 'expiresAt', place), 0);
    deadline := coalesce(indexer.read_uint256(given, 'deadline', place), 0);
    nonce := indexer.read_bytes(given, 'nonce', 32, place);
    operation_hash := nullif(indexer.read_bytes(given, 'operationHash', 32, place), decode(repeat('00', 32), 'hex'));
    IF issuer IS NULL OR holder IS NULL OR loyalty_id IS NULL OR amount IS NULL THEN
        PERFORM indexer.refuse('LY422', place || ': issuer, holder, loyaltyId and amount are needed', jsonb_build_object('field', place));
    END IF;
    IF amount = 0 THEN
        PERFORM indexer.refuse('LY422', place || '.amount: must be above zero', jsonb_build_object('field', place || '.amount'));
    END IF;
    IF NOT EXISTS (SELECT 1 FROM indexer.issuer i WHERE i.address = issuer AND i.brand = normalise_leg.brand) THEN
        PERFORM indexer.refuse('LY403', format('%s.issuer: %s is not an issuer of brand %s', place, indexer.hex0x(issuer), brand), jsonb_build_object('field', place || '.issuer'));
    END IF;
    IF match IS NULL THEN
        match := CASE WHEN nonce IS NOT NULL THEN 'nonce' WHEN operation_hash IS NOT NULL THEN 'operation_hash' END;
    END IF;
    IF match IS NULL OR match NOT IN ('nonce', 'operation_hash', 'wallet_amount')
       OR (match = 'nonce') <> (nonce IS NOT NULL) OR (match = 'operation_hash' AND operation_hash IS NULL) THEN
        PERFORM indexer.refuse('LY422', place || ': needs a nonce, a non-zero operationHash, or "match": "wallet_amount"', jsonb_build_object('field', place));
    END IF;
    RETURN jsonb_build_object(
        'kind', kind, 'match', match, 'chainId', chain::text, 'factory', indexer.hex0x(factory), 'issuer', indexer.hex0x(issuer),
        'holder', indexer.hex0x(holder), 'loyaltyId', indexer.hex0x(loyalty_id), 'amount', amount::text, 'expiresAt', bucket::text,
        'deadline', deadline::text, 'nonce', indexer.hex0x(nonce), 'operationHash', indexer.hex0x(operation_hash));
END $$;

-- ------------------------------------------------------------------------------------------------ the contract

-- Registers what a brand waits for. Idempotent by (brand, reference): {"id": uuid, "created": bool}.
CREATE OR REPLACE FUNCTION loyalty.register_operation(request jsonb) RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    brand text := request ->> 'brand';
    reference text := request ->> 'reference';
    acting text := indexer.acting_brand();
    metadata jsonb := coalesce(nullif(request -> 'metadata', 'null'), '{}');
    requested timestamptz;
    legs jsonb := '[]';
    normal jsonb;
    new_id uuid;
    known record;
    holder record;
    i int;
BEGIN
    IF request IS NULL OR jsonb_typeof(request) <> 'object' THEN
        PERFORM indexer.refuse('LY400', 'the registration must be a JSON object');
    END IF;
    PERFORM indexer.only_keys(request, ARRAY['brand', 'reference', 'requestedAt', 'metadata', 'legs'], 'operation');
    IF acting IS NOT NULL AND brand IS DISTINCT FROM acting THEN -- before anything tells which brands there are
        PERFORM indexer.refuse('LY403', format('brand: this login registers operations of %s alone', acting), '{"field": "brand"}');
    END IF;
    IF jsonb_typeof(request -> 'brand') IS DISTINCT FROM 'string' OR NOT EXISTS (SELECT 1 FROM indexer.brand b WHERE b.name = brand AND b.active) THEN
        PERFORM indexer.refuse('LY422', format('brand: %s is not configured here', coalesce(quote_literal(left(brand, 60)), 'none given')), '{"field": "brand"}');
    END IF;
    IF jsonb_typeof(request -> 'reference') IS DISTINCT FROM 'string' OR length(reference) NOT BETWEEN 1 AND 200 OR reference ~ '[\u0001-\u001f\u007f-\u009f]' THEN
        PERFORM indexer.refuse('LY422', 'reference: expected 1 to 200 characters without control characters', '{"field": "reference"}');
    END IF;
    PERFORM indexer.check_document(metadata, 'metadata');
    IF request ? 'requestedAt' AND request -> 'requestedAt' <> 'null' THEN
        IF jsonb_typeof(request -> 'requestedAt') <> 'string'
           OR request ->> 'requestedAt' !~ '^\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)$' THEN
            PERFORM indexer.refuse('LY422', 'requestedAt: expected an RFC 3339 time with its offset, such as 2026-11-21T10:00:00Z', '{"field": "requestedAt"}');
        END IF;
        BEGIN
            requested := (request ->> 'requestedAt')::timestamptz;
            IF requested NOT BETWEEN '1970-01-01Z' AND '9999-12-31Z' THEN
                PERFORM indexer.refuse('LY422', 'requestedAt: expected a time from 1970 to 9999', '{"field": "requestedAt"}');
            END IF;
        EXCEPTION WHEN data_exception THEN
            PERFORM indexer.refuse('LY422', 'requestedAt: no such time', '{"field": "requestedAt"}');
        END;
    END IF;
    IF jsonb_typeof(request -> 'legs') IS DISTINCT FROM 'array' OR jsonb_array_length(request -> 'legs') NOT BETWEEN 1 AND 16 THEN
        PERFORM indexer.refuse('LY422', 'legs: expected 1 to 16 of them', '{"field": "legs"}');
    END IF;
    FOR i IN 0 .. jsonb_array_length(request -> 'legs') - 1 LOOP
        legs := legs || jsonb_build_array(indexer.normalise_leg(request -> 'legs' -> i, brand, format('legs[%s]', i)));
    END LOOP;
    normal := jsonb_build_object('brand', brand, 'reference', reference, 'metadata', metadata, 'legs', legs)
              || CASE WHEN requested IS NULL THEN '{}' ELSE jsonb_build_object('requestedAt', to_char(requested AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')) END;
    new_id := indexer.operation_id(brand, reference);

    INSERT INTO indexer.operation AS o (id, brand, reference, request, metadata, requested_at, requested_at_stated)
    VALUES (new_id, brand, reference, normal, metadata, coalesce(requested, clock_timestamp()), requested IS NOT NULL)
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        SELECT o.request, o.state INTO known FROM indexer.operation o WHERE o.id = new_id;
        IF known.request = normal THEN
            RETURN jsonb_build_object('id', new_id, 'created', false);
        END IF;
        PERFORM indexer.refuse('LY409', format('reference %s is registered already, with other terms', quote_literal(reference)),
            jsonb_build_object('id', new_id, 'reference', reference, 'differs',
                (SELECT jsonb_agg(key ORDER BY key) FROM jsonb_object_keys(normal || known.request) AS key WHERE normal -> key IS DISTINCT FROM known.request -> key)));
    END IF;
    BEGIN
        INSERT INTO indexer.leg (operation_id, leg, kind, match, chain_id, factory, issuer, holder, loyalty_id, bucket, amount, deadline, nonce, operation_hash, requested_at, wallet_id, token)
        SELECT new_id, n - 1, l ->> 'kind', l ->> 'match', (l ->> 'chainId')::bigint, decode(substr(l ->> 'factory', 3), 'hex'), decode(substr(l ->> 'issuer', 3), 'hex'),
               decode(substr(l ->> 'holder', 3), 'hex'), decode(substr(l ->> 'loyaltyId', 3), 'hex'), (l ->> 'expiresAt')::numeric, (l ->> 'amount')::numeric,
               (l ->> 'deadline')::numeric, decode(substr(l ->> 'nonce', 3), 'hex'), decode(substr(l ->> 'operationHash', 3), 'hex'),
               coalesce((l ->> 'requestedAt')::timestamptz, requested, clock_timestamp()), l ->> 'walletId', l ->> 'token'
        FROM jsonb_array_elements(legs) WITH ORDINALITY AS given (l, n);
    EXCEPTION WHEN unique_violation THEN
        -- leg_nonce_idx: one signed action, one open leg
        SELECT o.id, o.brand, o.reference, l ->> 'nonce' AS nonce INTO holder
        FROM jsonb_array_elements(legs) AS given (l)
        JOIN indexer.leg g ON g.chain_id = (l ->> 'chainId')::bigint AND g.factory = decode(substr(l ->> 'factory', 3), 'hex') AND g.kind = l ->> 'kind'
                          AND g.issuer = decode(substr(l ->> 'issuer', 3), 'hex') AND g.nonce = decode(substr(l ->> 'nonce', 3), 'hex') AND NOT g.released
        JOIN indexer.operation o ON o.id = g.operation_id
        LIMIT 1;
        IF NOT FOUND THEN
            PERFORM indexer.refuse('LY422', 'legs: two legs of one operation name the same nonce', '{"field": "legs"}');
        END IF;
        PERFORM indexer.refuse('LY409', format('nonce %s is stated by another operation%s', holder.nonce, CASE WHEN holder.brand = brand THEN ': ' || quote_literal(holder.reference) ELSE '' END),
            jsonb_build_object('nonce', holder.nonce) || CASE WHEN holder.brand = brand THEN jsonb_build_object('reference', holder.reference, 'id', holder.id) ELSE '{}' END);
    END;
    INSERT INTO indexer.history (operation_id, from_state, to_state, generation, cause) VALUES (new_id, NULL, 'pending', 0, 'registered');
    INSERT INTO indexer.touched_operation (operation_id) VALUES (new_id);
    NOTIFY indexer_registered;
    RETURN jsonb_build_object('id', new_id, 'created', true);
END $$;

-- The last second at which some leg's signed action can still be executed; null when nothing bounds it.
CREATE OR REPLACE FUNCTION indexer.executable_until(operation uuid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    -- a leg's bound is the smaller non-zero of deadline and bucket; beyond 2^40 is never (design 5, Expiry)
    SELECT CASE WHEN bool_or(bound IS NULL) THEN NULL ELSE max(bound)::text END
    FROM (SELECT least(CASE WHEN deadline BETWEEN 1 AND 1099511627776 THEN deadline END, CASE WHEN bucket BETWEEN 1 AND 1099511627776 THEN bucket END) AS bound
          FROM indexer.leg WHERE operation_id = operation) AS bounds
$$;

-- Records the brand's wish. The signed action may still be executed until `executableUntil`, and is watched.
CREATE OR REPLACE FUNCTION loyalty.cancel(operation_id uuid) RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    acting text := indexer.acting_brand();
    o record;
BEGIN
    SELECT p.id, p.state, p.cancelled_at INTO o FROM indexer.operation p
    WHERE p.id = cancel.operation_id AND (acting IS NULL OR p.brand = acting) FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM indexer.refuse('LY404', 'no such operation');
    END IF;
    IF o.cancelled_at IS NULL AND o.state NOT IN ('pending', 'submitted', 'confirming') THEN
        PERFORM indexer.refuse('LY409', format('an operation that is %s cannot be cancelled', o.state), jsonb_build_object('status', o.state));
    END IF;
    IF o.cancelled_at IS NULL THEN
        UPDATE indexer.operation p SET cancelled_at = clock_timestamp() WHERE p.id = o.id;
        INSERT INTO indexer.touched_operation (operation_id) VALUES (o.id);
        NOTIFY indexer_registered;
    END IF;
    RETURN jsonb_build_object('outcome', 'accepted', 'executableUntil', indexer.executable_until(o.id));
END $$;

-- Records a person's decision on evidence that does not agree with its leg, or is ambiguous. Not granted to brands.
CREATE OR REPLACE FUNCTION loyalty.resolve(operation_id uuid, evidence_id uuid, accept boolean, reason text, actor text) RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    o record;
    acting text := indexer.acting_brand();
    at_leg int;
BEGIN
    IF accept IS NULL OR coalesce(length(trim(reason)), 0) NOT BETWEEN 1 AND 500 OR coalesce(length(trim(actor)), 0) NOT BETWEEN 1 AND 200 THEN
        PERFORM indexer.refuse('LY422', 'resolve: accept, a reason (1 to 500 characters) and an actor are needed', '{"field": "reason"}');
    END IF;
    SELECT p.id, p.state, p.detail INTO o FROM indexer.operation p
    WHERE p.id = resolve.operation_id AND (acting IS NULL OR p.brand = acting) FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM indexer.refuse('LY404', 'no such operation');
    END IF;
    IF o.state = 'fulfilled' THEN
        PERFORM indexer.refuse('LY409', 'a fulfilled operation is not decided again', jsonb_build_object('status', o.state));
    END IF;
    SELECT (e ->> 'leg')::int INTO at_leg
    FROM jsonb_array_elements(coalesce(o.detail -> 'conflicts', '[]') || coalesce(o.detail -> 'evidence', '[]')) AS e
    WHERE (e ->> 'evidenceId')::uuid = resolve.evidence_id LIMIT 1;
    IF NOT FOUND THEN
        PERFORM indexer.refuse('LY404', 'this evidence does not concern the operation; GET the operation shows the ids', jsonb_build_object('evidenceId', evidence_id));
    END IF;
    IF EXISTS (SELECT 1 FROM indexer.claim c WHERE c.evidence_id = resolve.evidence_id AND c.operation_id <> o.id) THEN
        PERFORM indexer.refuse('LY409', 'this evidence settles another operation', jsonb_build_object('evidenceId', evidence_id));
    END IF;
    INSERT INTO indexer.decision (operation_id, evidence_id, leg, accept, reason, actor)
    VALUES (o.id, evidence_id, at_leg, accept, reason, actor);
    INSERT INTO indexer.touched_operation (operation_id) VALUES (o.id);
    NOTIFY indexer_registered;
    RETURN jsonb_build_object('outcome', 'recorded');
END $$;

COMMENT ON SCHEMA loyalty IS 'What programs may rely on: views to read, functions to write. docs/sql.md';
COMMENT ON SCHEMA indexer IS 'Private to the indexer: it may change with every version';
COMMENT ON FUNCTION loyalty.register_operation(jsonb) IS 'Registers what a brand waits for. Idempotent by brand and reference. Returns {"id": uuid, "created": bool}';
COMMENT ON FUNCTION loyalty.cancel(uuid) IS 'Records that the brand no longer wants an operation that is not ready yet. Returns {"outcome": "accepted", "executableUntil": Unix seconds as text, or null}: until then its signed action may still be executed';
COMMENT ON FUNCTION loyalty.resolve(uuid, uuid, boolean, text, text) IS 'Records a person''s decision on evidence that conflicts or is ambiguous. Returns {"outcome": "recorded"}. Not granted to brands';
