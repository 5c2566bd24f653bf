-- What /metrics and `status` ask. None of these costs more as the table grows.

-- name: outbox_size
select pg_table_size(%(outbox)s::regclass)::bigint;

-- name: count_by_status
-- Exact; asked only where the table is small.
select status, count(*) from {outbox} group by status;

-- name: count_live_rows
-- From the partial indexes, each counted up to a bound, or all of it where that is null.
select (select count(*) from (select from {outbox} where status = 'pending' limit %(bound)s) as p),
       (select count(*) from (select from {outbox} where status = 'published' limit %(bound)s) as p),
       (select count(*) from (select from {outbox} where status = 'dead' limit %(bound)s) as p);

-- name: limit_counting
select set_config('statement_timeout', %(milliseconds)s, true);

-- name: estimate_rows_of_status
-- What the planner makes of the statistics.
explain (format json) select from {outbox} where status = {status};

-- name: estimate_all_rows
-- The planner's own way: rows per page when last analyzed, times the pages there are now; until it was, as many as fit into them,
-- for no row takes less than 96 bytes. There are never more rows than ids.
select least(ids.span, case when c.reltuples > 0 and c.relpages > 0
            then c.reltuples::double precision / c.relpages * (pg_relation_size(c.oid) / current_setting('block_size')::bigint)
            else pg_relation_size(c.oid) / 96 end)
  from pg_class as c, (select max(id)::double precision - min(id) + 1 as span from {outbox}) as ids
 where c.oid = %(outbox)s::regclass;

-- name: oldest_unconsumed_age
-- Of the lowest ids of either status, up to a bound: a row may be older than one with a lower id, but not by much.
select extract(epoch from statement_timestamp() - min(created_at))::double precision
  from (select * from (select created_at from {outbox} where status = 'pending' order by id limit %(bound)s) as pending
         union all
        select * from (select created_at from {outbox} where status = 'published' order by id limit %(bound)s) as published
       ) as waiting
 where isfinite(created_at);

-- name: count_held
-- Rows that wait only because an earlier row of their key does, counted up to a bound.
select count(*)
  from (select
          from {outbox} as o
         where o.status = 'pending'
           and o.next_retry_at is not null
           and exists (select
                         from {outbox} as e
                        where e.message_key = o.message_key
                          and e.topic = o.topic
                          and e.id < o.id
                          and e.next_retry_at is not null
                          and e.status in ('pending', 'published'))
         limit %(bound)s) as held;

-- name: slot_gauges
-- One row; the slot's columns are null where there is no such slot, and on a standby, which has no WAL of its own to pin.
select server.standby,
       s.slot_name is not null,
       s.wal_status,
       case when not server.standby then pg_wal_lsn_diff(pg_current_wal_lsn(), s.confirmed_flush_lsn)::bigint end,
       case when not server.standby then pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn)::bigint end
  from (select pg_is_in_recovery() as standby) as server
  left join pg_replication_slots as s on s.slot_name = %(slot)s;

-- name: latest_id
select coalesce(max(id), 0) from {outbox};

-- name: retries
-- Rows that wait for an attempt, up to a bound, those that are due, and the seconds to the next of the others.
select count(*), count(*) filter (where next_retry_at <= statement_timestamp()),
       extract(epoch from min(next_retry_at) filter (where next_retry_at > statement_timestamp() and isfinite(next_retry_at))
                          - statement_timestamp())::double precision
  from (select next_retry_at from {outbox} where status = 'pending' and next_retry_at is not null
         order by next_retry_at, id limit %(bound)s) as waiting;

-- name: latency
-- How long messages took that were stored lately, of the latest ones: both bounds are of rows, by the primary key.
select count(*), percentile_cont(0.5) within group (order by took), percentile_cont(0.99) within group (order by took)
  from (select extract(epoch from consumed_at - created_at)::double precision as took
          from (select status, created_at, consumed_at from {outbox} order by id desc limit %(bound)s) as latest
         where status = 'consumed' and consumed_at > statement_timestamp() - %(seconds)s * interval '1 second'
           and isfinite(created_at) and isfinite(consumed_at)
         limit %(sample)s) as stored;

-- name: deaths
-- The rows that died last, among the latest dead ones. A row's last change is its death.
select id, biz_type, message_key, retry_count, coalesce(left(last_error, 300), ''),
       case when isfinite(updated_at) then extract(epoch from statement_timestamp() - updated_at)::double precision end
  from (select * from {outbox} where status = 'dead' order by id desc limit %(bound)s) as dead
 order by updated_at desc
 limit %(limit)s;
