-- What /metrics and `status` ask. None of these costs more as the table grows.

-- name: outbox_size
select pg_table_size(%(outbox)s::regclass)::bigint;

-- name: count_by_status
-- Exact; asked only where the table is small.
select status, count(*) from {outbox} group by status;

-- name: count_live_rows
-- From the partial indexes, each counted up to a bound.
select (select count(*) from (select from {outbox} where status = 'pending' limit %(bound)s) as p),
       (select count(*) from (select from {outbox} where status = 'published' limit %(bound)s) as p),
       (select count(*) from (select from {outbox} where status = 'dead' limit %(bound)s) as p);

-- name: estimate_all_rows
-- The planner's own way: rows per page when last analyzed, times the pages there are now.
select (case when c.relpages > 0 and c.reltuples > 0 then c.reltuples / c.relpages else 0 end
        * (pg_relation_size(c.oid) / current_setting('block_size')::bigint))::bigint
  from pg_class as c
 where c.oid = %(outbox)s::regclass;

-- name: oldest_unconsumed_age
select extract(epoch from statement_timestamp() - least(
           (select created_at from {outbox} where status = 'pending' order by id limit 1),
           (select created_at from {outbox} where status = 'published' order by id limit 1)))::double precision;

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
