-- How far each partition is settled, written with the batch itself. After a failover the database may have forgotten
-- batches whose offsets Kafka still knows: the sink then goes back to what is written here.
create table if not exists {sink_offsets} (
    group_id    text    not null,
    topic       text    not null,
    partition   integer not null,
    next_offset bigint  not null,
    -- The cluster and the timeline on which everything before `next_offset` was settled.
    timeline    text    not null,
    primary key (group_id, topic, partition)
) with (fillfactor = 50);
