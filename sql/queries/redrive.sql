-- What `redrive` asks and writes. `{selected}` and `{since}` are the blocks of those names, for dead or for published rows.

-- name: since_dead
o.updated_at

-- name: since_published
coalesce(o.published_at, o.updated_at)

-- name: selected
-- The rows that a selection means. They are gone through by id, each at most once in a run, also one that dies again.
o.status = {status}
       and o.id > %(after)s
       and o.id <= %(through)s
       and (%(ids)s::bigint[] is null or o.id = any (%(ids)s::bigint[]))
       and (%(key)s::text is null or o.message_key = %(key)s)
       and (%(biz_type)s::text is null or o.biz_type = %(biz_type)s)
       and (%(error_like)s::text is null or o.last_error ilike %(error_like)s)
       and (%(older_than)s::double precision is null
            or {since} <= %(started_at)s::timestamptz - %(older_than)s * interval '1 second')

-- name: clock
select clock_timestamp();

-- name: count
select count(*) from {outbox} as o where {selected};

-- name: reasons
-- Errors by their shape: without the values that differ from row to row.
select case when o.last_error is null then null
            else regexp_replace(regexp_replace(left(o.last_error, 300), '=\([^)]*\)', '=(…)', 'g'),
                                '(?<!SQLSTATE )\m\d+\M', 'N', 'g') end as shape,
       count(*)
  from {outbox} as o
 where {selected}
 group by shape
 order by count(*) desc, shape
 limit %(limit)s;

-- name: samples
select o.id, o.biz_type, o.message_key, o.retry_count,
       case when isfinite({since}) then extract(epoch from %(started_at)s::timestamptz - {since})::double precision end,
       left(o.last_error, 300)
  from {outbox} as o
 where {selected}
 order by o.id
 limit %(limit)s;

-- name: statuses
select o.id, o.status from {outbox} as o where o.id = any (%(ids)s::bigint[]);

-- name: redrive_batch
-- Put a batch back, lowest ids first, and record it. One due time for the whole run: the reader takes equal ones by id.
-- `retry_count` goes up and never back to 0, so that whatever comes late of an earlier copy is stale; `max_retry` goes
-- up with it, by as many attempts as the row was given when it was enqueued.
with chosen as materialized (
    select o.id, o.topic, o.message_key, o.retry_count, o.last_error,
           least(greatest(o.retry_count, 0)::bigint + 1, 2147483647)::integer as attempt,
           greatest(1, o.max_retry::bigint - coalesce(
               (select r.attempt
                  from {redrives} as r
                 where r.outbox_id = o.id and r.outbox_table = %(outbox)s
                   -- Else it is of another row, that had this id in a table that is gone.
                   and r.attempt <= o.retry_count
                 order by r.id desc
                 limit 1), 0)) as attempts
      from {outbox} as o
     where {selected}
     order by o.id
     limit %(limit)s
       for update of o
),
moved as (
    update {outbox} as o
       set status = 'pending',
           retry_count = c.attempt,
           max_retry = least(c.attempt + c.attempts, 2147483647),
           next_retry_at = %(started_at)s::timestamptz,
           updated_at = case when isfinite(o.updated_at)
                             then greatest(clock_timestamp(), o.updated_at + interval '1 microsecond')
                             else clock_timestamp() end
      from chosen as c
     where o.id = c.id
),
recorded as (
    insert into {redrives} (run, redriven_by, reason, outbox_table, outbox_id, was, error, retry_count, attempt, topic,
                            message_key)
    select %(run)s::uuid, %(redriven_by)s::text, %(reason)s::text, %(outbox)s::text, c.id, {status}, c.last_error, c.retry_count, c.attempt,
           c.topic, c.message_key
      from chosen as c
     order by c.id
)
select c.id from chosen as c order by c.id;

-- name: lock_letters
-- One command at a time sends letters back; released at the transaction's end, which is the process's own at the latest.
select pg_advisory_xact_lock(hashtext('outbox_connector'), hashtext('dead letters'));

-- name: letters_sent_back
-- Those of a batch that were sent back before.
select l.letter_partition, l.letter_offset
  from unnest(%(partitions)s::integer[], %(offsets)s::bigint[], %(times)s::bigint[])
       as l (letter_partition, letter_offset, letter_time)
  join {redrives} as r
    on r.letter_topic = %(letter_topic)s
   and r.letter_partition = l.letter_partition
   and r.letter_offset = l.letter_offset
   and r.letter_time = l.letter_time;

-- name: letters_under_way
-- Those of a batch that an interrupted run may have sent, and where their topic ended before.
select l.letter_partition, l.letter_offset, u.ends
  from unnest(%(partitions)s::integer[], %(offsets)s::bigint[], %(times)s::bigint[])
       as l (letter_partition, letter_offset, letter_time)
  join {letters_under_way} as u
    on u.letter_topic = %(letter_topic)s
   and u.letter_partition = l.letter_partition
   and u.letter_offset = l.letter_offset
   and u.letter_time = l.letter_time;

-- name: announce_letters
insert into {letters_under_way} (letter_topic, letter_partition, letter_offset, letter_time, ends)
select %(letter_topic)s::text, l.letter_partition, l.letter_offset, l.letter_time, l.ends::jsonb
  from unnest(%(partitions)s::integer[], %(offsets)s::bigint[], %(times)s::bigint[], %(ends)s::text[])
       as l (letter_partition, letter_offset, letter_time, ends);

-- name: forget_letters
delete from {letters_under_way} as u
 using unnest(%(partitions)s::integer[], %(offsets)s::bigint[], %(times)s::bigint[])
       as l (letter_partition, letter_offset, letter_time)
 where u.letter_topic = %(letter_topic)s
   and u.letter_partition = l.letter_partition
   and u.letter_offset = l.letter_offset
   and u.letter_time = l.letter_time;

-- name: record_letters
insert into {redrives} (run, redriven_by, reason, outbox_table, was, error, topic, message_key, letter_topic,
                        letter_partition, letter_offset, letter_time)
select %(run)s::uuid, %(redriven_by)s::text, %(reason)s::text, %(outbox)s::text, 'dead letter', l.error, l.topic,
       l.message_key, %(letter_topic)s::text, l.letter_partition, l.letter_offset, l.letter_time
  from unnest(%(errors)s::text[], %(topics)s::text[], %(keys)s::text[], %(partitions)s::integer[],
              %(offsets)s::bigint[], %(times)s::bigint[])
       as l (error, topic, message_key, letter_partition, letter_offset, letter_time);
