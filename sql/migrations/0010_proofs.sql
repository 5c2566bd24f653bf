-- The last proof of each kind: by `reconcile`, and by the sinks. The console shows them.
create table if not exists {proofs} (
    outbox_table  text             not null,
    prover        text             not null,
    proved_at     timestamptz      not null default clock_timestamp(),
    database_role text             not null default session_user,
    proved_by     text             not null,
    seconds       double precision not null,
    -- Which messages were compared, in words.
    covers        text             not null,
    damaged       bigint           not null,
    -- How many messages are damaged in which way, and some of them.
    kinds         jsonb            not null,
    samples       jsonb            not null,
    primary key (outbox_table, prover)
) with (fillfactor = 50);
