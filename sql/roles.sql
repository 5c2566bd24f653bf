-- Four roles with the least privilege that works: for a database administrator to read, and to run after `setup`.
-- `outbox-connector setup --print-sql` ends with this script, with the configured tables in place of the names in braces.
-- Then give each role a password or a certificate, and its URL to the process that runs as it.

do $roles$
begin
    if not exists (select from pg_roles where rolname = 'outbox_reader') then
        create role outbox_reader login replication;
    end if;
    if not exists (select from pg_roles where rolname = 'outbox_sink') then
        create role outbox_sink login;
    end if;
    if not exists (select from pg_roles where rolname = 'outbox_operator') then
        create role outbox_operator login;
    end if;
    if not exists (select from pg_roles where rolname = 'outbox_auditor') then
        create role outbox_auditor login;
    end if;
end
$roles$;

-- The reader: the replication stream, and its marks on the outbox. It never sees history.
grant usage on schema {outbox_schema} to outbox_reader;
grant select, update on {outbox} to outbox_reader;
grant select, insert, update on {slot_progress} to outbox_reader;

-- The sink: its marks on the outbox, and new rows of history. It reads no history, and changes none.
grant usage on schema {outbox_schema}, {history_schema} to outbox_sink;
grant select, update on {outbox} to outbox_sink;
grant insert on {history} to outbox_sink;
grant select, insert, update on {sink_offsets}, {proofs} to outbox_sink;
-- To let it prove all the time that history has what the outbox says (docs/guides/prove.md), which has it read history:
-- grant select on {history} to outbox_sink;

-- A history table that was there before may take its ids from a sequence that is not the column's own.
do $sequence$
begin
    if exists (select from pg_attribute
                where attrelid = {history_name}::regclass and attname = 'id' and attidentity = ''
                  and pg_get_serial_sequence({history_name}, 'id') is not null) then
        execute 'grant usage on sequence ' || pg_get_serial_sequence({history_name}, 'id') || ' to outbox_sink';
    end if;
end
$sequence$;

-- The operator, for `redrive` and `prune`: it puts rows back, removes settled ones, and adds to the record of redrives,
-- which it cannot change.
grant usage on schema {outbox_schema} to outbox_operator;
grant select, delete on {outbox} to outbox_operator;
grant update (status, retry_count, max_retry, next_retry_at, updated_at) on {outbox} to outbox_operator;
grant select, insert on {redrives} to outbox_operator;
grant select, insert, delete on {letters_under_way} to outbox_operator;
grant select, insert, update on {pruned} to outbox_operator;

-- The auditor, for `reconcile` and to look by the console: it reads what is to agree, and writes nothing but its verdict.
grant usage on schema {outbox_schema}, {history_schema} to outbox_auditor;
grant select on {outbox}, {history}, {redrives}, {pruned}, {slot_progress} to outbox_auditor;
grant select, insert, update on {proofs} to outbox_auditor;

-- Who is on call needs both: a login of their own that is a member of outbox_operator and of outbox_auditor. The record of
-- redrives then names them.

-- All: what `outbox-connector doctor` compares with what it knows.
grant select on {migrations} to outbox_reader, outbox_sink, outbox_operator, outbox_auditor;
