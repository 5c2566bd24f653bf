-- Every redrive, one line a message: who put it back, when, why, and what it was until then. Lines are only ever added.
create table if not exists {redrives} (
    id             bigint generated always as identity primary key,
    run            uuid        not null,
    redriven_at    timestamptz not null default clock_timestamp(),
    database_role  text        not null default session_user,
    redriven_by    text        not null,
    reason         text,
    outbox_table   text        not null,
    -- Null for a dead letter, which names no row.
    outbox_id      bigint,
    was            text        not null
                   constraint redrive_source_known check (was in ('dead', 'published', 'dead letter')),
    error          text,
    retry_count    integer,
    -- The retry_count it was put back with: copies of earlier attempts are stale from here on.
    attempt        integer,
    topic          text        not null,
    message_key    text,
    -- Where a dead letter lies, and when it was written: a topic that is made anew counts its offsets from 0 again.
    letter_topic   text,
    letter_partition integer,
    letter_offset  bigint,
    letter_time    bigint
);

-- What was done to a message before.
create index if not exists outbox_connector_redrives_message_idx on {redrives} (outbox_id, id);

-- A dead letter is sent back once.
create unique index if not exists outbox_connector_redrives_letter_key
    on {redrives} (letter_topic, letter_partition, letter_offset, letter_time);
