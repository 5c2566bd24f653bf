-- The reader's statements. Copies of rows carry times as microseconds since 2000-01-01 UTC, as the stream does.

-- name: mark_published
-- Mark rows whose message Kafka has acknowledged. A row that anything has changed since its copy was read keeps what it
-- has, and a row that the sink holds locked is about to be consumed: both are left alone.
with seen as (
    select s.id, s.retry_count,
           timestamptz '2000-01-01 00:00:00+00' + s.updated_at * interval '1 microsecond' as updated_at,
           timestamptz '2000-01-01 00:00:00+00' + s.next_retry_at * interval '1 microsecond' as next_retry_at
      from unnest(%(ids)s::bigint[], %(retry_counts)s::integer[], %(updated_ats)s::bigint[],
                  %(next_retry_ats)s::bigint[]) as s (id, retry_count, updated_at, next_retry_at)
),
standing as materialized (
    select o.id
      from seen
      join {outbox} as o using (id)
     where o.status = 'pending'
       and o.retry_count = seen.retry_count
       and o.updated_at = seen.updated_at
       and o.next_retry_at is not distinct from seen.next_retry_at
       for update of o skip locked
)
update {outbox} as o
   set status = 'published',
       published_at = clock_timestamp(),
       updated_at = greatest(clock_timestamp(), o.updated_at + interval '1 microsecond')
  from standing
 where o.id = standing.id;

-- name: due_rows
-- Rows whose next attempt is due, in the order in which they must reach Kafka. A time that is infinite comes as null.
select o.id, o.biz_type, o.topic, convert_to(o.message_key, 'UTF8'), convert_to(o.payload::text, 'UTF8'),
       convert_to(o.headers::text, 'UTF8'), o.retry_count,
       case when isfinite(o.updated_at)
            then (extract(epoch from o.updated_at - timestamptz '2000-01-01 00:00:00+00') * 1000000)::bigint end,
       case when isfinite(o.next_retry_at)
            then (extract(epoch from o.next_retry_at - timestamptz '2000-01-01 00:00:00+00') * 1000000)::bigint end
  from {outbox} as o
 where o.status = 'pending' and o.next_retry_at is not null and o.next_retry_at <= statement_timestamp()
   -- A row that nothing has changed was enqueued with its due time, and the stream may not have come to it yet: it must not
   -- overtake what was enqueued before it and is still to be published.
   and (o.updated_at <> o.created_at
        or o.id < coalesce((select min(e.id) from {outbox} as e
                             where e.status = 'pending' and e.next_retry_at is null and isfinite(e.updated_at)),
                           9223372036854775807))
 order by o.next_retry_at, o.id
 limit %(limit)s;

-- name: make_times_finite
-- Somebody has set times by hand that no copy could be fenced with: these rows are due now.
update {outbox} as o
   set next_retry_at = statement_timestamp(), updated_at = statement_timestamp()
 where o.id = any (%(ids)s::bigint[])
   and o.status = 'pending'
   and not (isfinite(o.next_retry_at) and isfinite(o.updated_at));

-- name: seconds_to_next_due
-- How long until the next attempt of any row is due; null where none waits.
select case when isfinite(o.next_retry_at)
            then extract(epoch from o.next_retry_at - statement_timestamp())::double precision else 0 end
  from {outbox} as o
 where o.status = 'pending' and o.next_retry_at is not null and o.next_retry_at < 'infinity'
 order by o.next_retry_at, o.id
 limit 1;

-- name: overlooked_rows
-- Pending rows that nothing will bring: a mark lost in a crash, or a row that an operator put back by hand.
select o.id, o.biz_type, o.topic, convert_to(o.message_key, 'UTF8'), convert_to(o.payload::text, 'UTF8'),
       convert_to(o.headers::text, 'UTF8'), o.retry_count,
       (extract(epoch from o.updated_at - timestamptz '2000-01-01 00:00:00+00') * 1000000)::bigint,
       null::bigint
  from {outbox} as o
 where o.status = 'pending' and o.next_retry_at is null
   and isfinite(o.updated_at)
   and o.updated_at < statement_timestamp() - %(quiet_seconds)s * interval '1 second'
 order by o.id
 limit %(limit)s;

-- name: catch_up_rows
-- Every pending row that no retry will bring, oldest first, up to an id. An infinite time comes as the stream sends it.
select o.id, o.biz_type, o.topic, convert_to(o.message_key, 'UTF8'), convert_to(o.payload::text, 'UTF8'),
       convert_to(o.headers::text, 'UTF8'), o.retry_count,
       case when isfinite(o.updated_at)
            then (extract(epoch from o.updated_at - timestamptz '2000-01-01 00:00:00+00') * 1000000)::bigint
            else 9223372036854775807 end,
       null::bigint
  from {outbox} as o
 where o.status = 'pending' and o.next_retry_at is null and o.id <= %(through)s
 order by o.id;

-- name: highest_pending_id
select max(o.id) from {outbox} as o where o.status = 'pending' and o.next_retry_at is null;

-- name: read_progress
select system_identifier, confirmed_lsn, catch_up_owed, catch_up_through, catch_up_reason,
       extract(epoch from published_since)::double precision, timeline
  from {slot_progress}
 where slot_name = %(slot)s;

-- name: record_progress
-- Written before the server is told: the slot is never further than this by our own doing.
update {slot_progress}
   set confirmed_lsn = %(lsn)s::pg_lsn,
       published_since = to_timestamp(%(published_since)s), timeline = %(timeline)s,
       updated_at = clock_timestamp()
 where slot_name = %(slot)s and confirmed_lsn <= %(lsn)s::pg_lsn;

-- name: owe_catch_up
-- Written before the slot is made, moved or given up, so that a crash half-way cannot forget it.
insert into {slot_progress} as p
       (slot_name, system_identifier, confirmed_lsn, catch_up_owed, catch_up_through, catch_up_reason)
values (%(slot)s, %(system_identifier)s, %(lsn)s::pg_lsn, true, %(through)s, %(reason)s)
on conflict (slot_name) do update
   set system_identifier = excluded.system_identifier,
       confirmed_lsn = excluded.confirmed_lsn,
       catch_up_owed = true,
       catch_up_through = excluded.catch_up_through,
       catch_up_reason = excluded.catch_up_reason,
       updated_at = clock_timestamp();

-- name: catch_up_done
update {slot_progress}
   set catch_up_owed = false, catch_up_through = null, catch_up_reason = null, updated_at = clock_timestamp()
 where slot_name = %(slot)s;

-- name: outbox_oid
select to_regclass(%(outbox)s)::oid::bigint;

-- name: slot_state
select s.active_pid, s.wal_status, s.confirmed_flush_lsn::text, s.restart_lsn::text, s.plugin, s.database,
       case when pg_is_in_recovery() then null else pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn)::bigint end
  from pg_replication_slots as s
 where s.slot_name = %(slot)s;

-- name: current_wal_lsn
select pg_current_wal_lsn()::text;

-- name: drop_slot
select pg_drop_replication_slot(%(slot)s);

-- name: end_walsender
select pg_terminate_backend(%(pid)s);
