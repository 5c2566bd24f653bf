-- The sink's statements.

-- name: missing_tables
select name from unnest(%(names)s::text[]) as name where to_regclass(name) is null;

-- name: has_insert_policy
-- Whether row level security lets this role add some rows to history, if not others.
select exists (select from pg_policy as p
                where p.polrelid = {history_name}::regclass and p.polpermissive and p.polcmd in ('a', '*')
                  and exists (select from unnest(p.polroles) as role
                               where role = 0 or pg_has_role(role, 'usage')));

-- name: rows_not_seen
-- Those of a batch that have no row as far as this session sees.
select i.id
  from unnest(%(ids)s::bigint[]) as i (id)
 where not exists (select from {outbox} as o where o.id = i.id);

-- name: writers
-- The transactions that have written to the outbox and not ended: they keep this lock until everybody sees their rows.
select l.virtualtransaction
  from pg_locks as l
 where l.locktype = 'relation'
   and l.database = (select d.oid from pg_database as d where d.datname = current_database())
   and l.relation = %(outbox)s::regclass
   and l.mode = 'RowExclusiveLock'
   and l.granted
   and l.pid is distinct from pg_backend_pid();

-- name: store_plain_batch
-- One batch of one handler, where nothing is amiss: every row is there and neither settled nor, perhaps, to be held back. Then
-- no row needs a lock before its update, which takes them in the order of the index on id, and all or none of them are stored.
-- It answers with the age of each row that it marked, in seconds; if that is not the whole batch, the transaction must be
-- undone, and `store_batch` tell the rows apart.
with consumed as (
    update {outbox} as o
       set status = 'consumed',
           published_at = coalesce(o.published_at, clock_timestamp()),
           consumed_at = clock_timestamp(),
           next_retry_at = null,
           updated_at = greatest(clock_timestamp(), o.updated_at + interval '1 microsecond')
     where o.id = any (%(outbox_ids)b::bigint[])
       and o.status in ('pending', 'published')
       -- No key of the batch has a row that is retried or held. As long as no key has, none is looked up.
       and (select case when not %(strict)s then true
                        when not exists (select from {outbox} as any_unsettled
                                          where any_unsettled.next_retry_at is not null
                                            and any_unsettled.status in ('pending', 'published')) then true
                        else not exists (select
                                           from {outbox} as b
                                           join {outbox} as e on e.message_key = b.message_key and e.topic = b.topic
                                          where b.id = any (%(outbox_ids)b::bigint[])
                                            and e.next_retry_at is not null
                                            and e.status in ('pending', 'published'))
                   end)
    returning o.created_at
),
accepted as (
    -- Row by row, where `unnest` as a table would first write all of them down.
    select unnest(%(outbox_ids)b::bigint[]) as outbox_id{handler_elements},
           generate_series(1, cardinality(%(outbox_ids)b::bigint[])) as place
     where (select count(*) from consumed) = cardinality(%(outbox_ids)b::bigint[])
),
stored as (
    {handler_statement}
)
select case when isfinite(c.created_at) then date_part('epoch', clock_timestamp() - c.created_at) end
  from consumed as c;

-- name: store_batch
-- One batch of one handler: lock its rows in id order, let through those that are neither settled nor held back by an
-- earlier message of their key, store them with the handler's own statement, and mark them consumed. It answers with
-- each row's outcome.
with incoming as materialized (
    select *
      from unnest(%(outbox_ids)b::bigint[]{handler_parameters}) with ordinality
           as i (outbox_id{handler_columns}, place)
),
locked as materialized (
    select o.id, o.topic, o.message_key, o.status, o.created_at
      from {outbox} as o
     where o.id = any (%(outbox_ids)b::bigint[])
     order by o.id
       for update of o
),
unsettled as materialized (
    -- Rows of these keys that wait for a retry, or behind one; `place` is theirs in this batch. Whether there are any at all is
    -- asked once a batch: on a good day there are none, and nothing else here is looked at.
    select e.id, e.topic, e.message_key, e.next_retry_at as due, ahead.place
      from (select distinct l.topic, l.message_key from locked as l) as k
      join {outbox} as e on e.message_key = k.message_key and e.topic = k.topic
      left join incoming as ahead on ahead.outbox_id = e.id
     where %(strict)s
       and (select exists (select from {outbox} as any_unsettled
                            where any_unsettled.next_retry_at is not null
                              and any_unsettled.status in ('pending', 'published')))
       and e.next_retry_at is not null
       and e.status in ('pending', 'published')
),
waiting as materialized (
    -- Rows with an earlier one of their key that is unsettled, and elsewhere or behind them in this batch.
    select line.id, max(line.due) as due
      from (select along.id, along.ours, max(along.due) over (partition by along.topic, along.message_key order by along.id) as due
              from (select u.id, u.topic, u.message_key, u.due, false as ours from unsettled as u where u.place is null
                    union all
                    select l.id, l.topic, l.message_key, null, true from locked as l
                     where l.status in ('pending', 'published') and (select exists (select from unsettled))) as along
            union all
            select l.id, true, u.due
              from unsettled as u
              join locked as l on l.message_key = u.message_key and l.topic = u.topic and l.id > u.id
              join incoming as i on i.outbox_id = l.id and i.place < u.place
             where l.status in ('pending', 'published')) as line
     where line.ours and line.due is not null
     group by line.id
),
held as materialized (
    -- What waits holds back all that follow it in its key, also those that are in this batch with it.
    select along.id, along.due
      from (select l.id, l.status, max(w.due) over (partition by l.topic, l.message_key order by l.id) as due
              from locked as l
              left join waiting as w on w.id = l.id
             where (select exists (select from waiting))) as along
     where along.due is not null and along.status in ('pending', 'published')
),
accepted as materialized (
    select i.*
      from incoming as i
      join locked as l on l.id = i.outbox_id
     where l.status in ('pending', 'published')
       and not exists (select from held as h where h.id = i.outbox_id)
     order by i.place
),
stored as (
    {handler_statement}
),
consumed as (
    update {outbox} as o
       set status = 'consumed',
           published_at = coalesce(o.published_at, clock_timestamp()),
           consumed_at = clock_timestamp(),
           next_retry_at = null,
           updated_at = greatest(clock_timestamp(), o.updated_at + interval '1 microsecond')
      from accepted as a
     where o.id = a.outbox_id
),
held_back as (
    update {outbox} as o
       set status = 'pending',
           -- One due time for all of a key, among which the reader then takes the lower id first.
           next_retry_at = least(greatest(h.due, statement_timestamp() + interval '1 second'),
                                 statement_timestamp() + interval '1 day'),
           updated_at = greatest(clock_timestamp(), o.updated_at + interval '1 microsecond')
      from held as h
     where o.id = h.id
    returning o.id, o.next_retry_at
)
select i.outbox_id,
       case
           when l.id is null then 'missing'
           when h.id is not null then 'held'
           when l.status in ('pending', 'published') then 'stored'
           else l.status
       end,
       case when isfinite(l.created_at) then extract(epoch from clock_timestamp() - l.created_at)::double precision end,
       extract(epoch from h.next_retry_at - clock_timestamp())::double precision
  from incoming as i
  left join locked as l on l.id = i.outbox_id
  left join held_back as h on h.id = i.outbox_id;

-- name: schedule_retries
-- Write down failures: each row that still waits for the attempt that failed gets its next due time, or is dead once
-- its attempts are used up. A stale copy's failure changes nothing. `delays` are the seconds after the 1st, 2nd, … failure;
-- `costs` are 0 for what failed with another message's fault: it is tried again, as the same attempt.
with failed as (
    select *
      from unnest(%(ids)s::bigint[], %(attempts)s::integer[], %(errors)s::text[], %(costs)s::integer[])
           as f (id, attempt, error, cost)
),
standing as materialized (
    select o.id, failed.error, least(o.retry_count::bigint + failed.cost, 2147483647) as retry_count,
           failed.cost > 0 and o.retry_count::bigint + failed.cost >= o.max_retry as used_up
      from {outbox} as o
      join failed using (id)
     where o.status in ('pending', 'published') and failed.attempt >= o.retry_count
     order by o.id
       for update of o
)
update {outbox} as o
   set retry_count = standing.retry_count,
       status = case when standing.used_up then 'dead' else 'pending' end,
       next_retry_at = case
           when standing.used_up then null
           else clock_timestamp() + interval '1 second'
                * (%(delays)s::integer[])[greatest(1, least(standing.retry_count, cardinality(%(delays)s::integer[])))]
       end,
       last_error = standing.error,
       updated_at = greatest(clock_timestamp(), o.updated_at + interval '1 microsecond')
  from standing
 where o.id = standing.id
returning o.id, o.status, o.retry_count, extract(epoch from o.next_retry_at - clock_timestamp())::double precision;

-- name: mark_dead
-- Give up on rows at once: no retry could help. A stale copy's failure changes nothing: the row may have been mended and
-- put back since.
with failed as (
    select * from unnest(%(ids)s::bigint[], %(attempts)s::integer[], %(errors)s::text[]) as f (id, attempt, error)
),
standing as materialized (
    select o.id, failed.error
      from {outbox} as o
      join failed using (id)
     where o.status in ('pending', 'published') and failed.attempt >= o.retry_count
     order by o.id
       for update of o
)
update {outbox} as o
   set status = 'dead',
       next_retry_at = null,
       last_error = standing.error,
       updated_at = greatest(clock_timestamp(), o.updated_at + interval '1 microsecond')
  from standing
 where o.id = standing.id
returning o.id;

-- name: mark_already_stored
-- The destination holds this message already: only its mark was missing.
update {outbox} as o
   set status = 'consumed',
       published_at = coalesce(o.published_at, clock_timestamp()),
       consumed_at = clock_timestamp(),
       next_retry_at = null,
       updated_at = greatest(clock_timestamp(), o.updated_at + interval '1 microsecond')
 where o.id = %(id)s and o.status in ('pending', 'published');

-- name: wake_reader
-- A hint, sent with the transaction's commit: something falls due in so many milliseconds.
select pg_logical_emit_message(true, %(prefix)s, %(milliseconds)s::text);

-- name: may_keep_offsets
-- Whether this is a standby, and whether this role may keep offsets.
select pg_is_in_recovery(),
       coalesce(has_table_privilege(t.oid, 'select') and has_table_privilege(t.oid, 'insert')
                and has_table_privilege(t.oid, 'update'), false)
  from to_regclass(%(offsets)s) as t (oid);

-- name: timeline
-- Which cluster this is, and on which timeline; null on a standby.
select case when pg_is_in_recovery() then null
            else (select system_identifier from pg_control_system()) || '/'
                 || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)
       end;

-- name: read_offsets
select topic, partition, next_offset, timeline from {sink_offsets} where group_id = %(group)s;

-- name: keep_offsets
-- Written with the batch, and only on the timeline that the sink believes to be on: behind a pooler a failover shows
-- nowhere else. In the order of the partitions, so that two sinks that have a partition in common do not deadlock.
insert into {sink_offsets} (group_id, topic, partition, next_offset, timeline)
select %(group)s, k.topic, k.partition, k.next_offset, k.timeline
  from unnest(%(topics)s::text[], %(partitions)s::integer[], %(next_offsets)s::bigint[], %(timelines)s::text[])
       as k (topic, partition, next_offset, timeline)
 where substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) = split_part(%(believed)s, '/', 2)
 order by k.topic, k.partition
    on conflict (group_id, topic, partition) do update
   set next_offset = excluded.next_offset, timeline = excluded.timeline;

-- name: rows_as_enqueued
select o.id, o.biz_type, o.payload::text from {outbox} as o where o.id = any (%(ids)s::bigint[]);
