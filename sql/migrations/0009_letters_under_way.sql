-- Dead letters that are being sent back this moment: written before Kafka is given them, removed with the record of the
-- redrive. What an interrupted run leaves here is looked for in its topic before it is sent again.
create table if not exists {letters_under_way} (
    letter_topic     text        not null,
    letter_partition integer     not null,
    letter_offset    bigint      not null,
    letter_time      bigint      not null,
    since            timestamptz not null default clock_timestamp(),
    -- Where the partitions of the topic that it goes to ended before, by number.
    ends             jsonb       not null,
    primary key (letter_topic, letter_partition, letter_offset, letter_time)
);
