-- How far `prune` has come, by id. A message of Kafka without a row is nobody's damage up to here.
create table if not exists {pruned} (
    outbox_table text        primary key,
    through_id   bigint      not null,
    pruned_at    timestamptz not null default clock_timestamp()
);
