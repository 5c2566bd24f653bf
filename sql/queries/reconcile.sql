-- What `reconcile` and the sink's own proof ask. Nothing here writes, locks a row, or keeps a snapshot for longer than
-- one bounded range of ids.

-- name: only_read
-- Begins each transaction: it cannot write, and is no heavier on the server than it must be. The plan that suits a range
-- depends on the range. Nothing is set for the session, which behind a pooler somebody else may have next.
set transaction read only;
set local plan_cache_mode = force_custom_plan;
set local max_parallel_workers_per_gather = 0;
set local jit = off;

-- name: span
-- The first and the last id there is, and the time.
select (select min(id) from {outbox}), (select max(id) from {outbox}),
       extract(epoch from clock_timestamp())::double precision;

-- name: newest_of
-- The latest creation among the rows that follow an id.
select extract(epoch from max(few.created_at)::timestamptz)::double precision
  from (select o.created_at from {outbox} as o
         where o.id >= %(from)s and isfinite(o.created_at) order by o.id limit 200) as few;

-- name: messages
-- Rows of the outbox, each beside what history holds of it, as one snapshot shows both: one line for each history row,
-- or one with nulls. A history that was there before may have times without a zone: they are those of the session's, as they were
-- when the sink stored them.
select o.id, o.status, o.biz_type, o.topic, o.message_key, hashtextextended(o.message_key, hashtext(o.topic)),
       extract(epoch from o.created_at::timestamptz)::double precision,
       extract(epoch from statement_timestamp())::double precision
           - extract(epoch from case o.status when 'published' then coalesce(o.published_at::timestamptz, o.updated_at)
                                              when 'pending' then coalesce(o.next_retry_at, o.updated_at)
                                end)::double precision,
       o.retry_count, extract(epoch from o.consumed_at::timestamptz)::double precision,
       case when h.id is not null then o.payload::text end,
       h.id, h.user_id, h.chat_id::text, h.message_content, h.role::text,
       case when isfinite(h.created_at) then (extract(epoch from h.created_at::timestamptz) * 1000000)::bigint end
  from (select *
          from {outbox}
         where {which}) as o
  -- Bounded on this side as well, or the whole of history might seem cheaper to read than to look up.
  left join (select * from {history} where {which_history}) as h on h.outbox_id = o.id
 order by o.id;

-- name: in_range
id > %(after)s and id <= %(through)s and created_at >= to_timestamp(%(since)s)

-- name: in_range_of_history
outbox_id > %(after)s and outbox_id <= %(through)s

-- name: of_ids
id = any (%(ids)s::bigint[])

-- name: of_ids_in_history
outbox_id = any (%(ids)s::bigint[])

-- name: end_of_range
-- The id at which a range of so many rows ends.
select max(few.id)
  from (select o.id from {outbox} as o
         where o.id > %(after)s and o.id <= %(through)s order by o.id limit %(limit)s) as few;

-- name: places
-- Where history has the messages of a range, for those keys whose hash ends in certain bits.
select hashtextextended(o.message_key, hashtext(o.topic)), o.id, min(h.id)
  from {outbox} as o
  join {history} as h on h.outbox_id = o.id
 where o.id > %(after)s and o.id <= %(through)s and o.created_at >= to_timestamp(%(since)s)
   and h.outbox_id > %(after)s and h.outbox_id <= %(through)s
   and hashtextextended(o.message_key, hashtext(o.topic)) & %(mask)s = %(bits)s
 group by o.id
 order by o.id;

-- name: stragglers
-- Messages by their place in history, each with a later one of its key that is stored before it.
with suspects as materialized (
    select early.id, late.id as overtaker, early.topic, early.message_key, early.retry_count,
           extract(epoch from least(early.created_at, late.created_at)::timestamptz)::double precision as created
      from unnest(%(places)s::bigint[], %(overtakers)s::bigint[]) as i (place, overtaker)
      join {history} as h on h.id = i.place
      join {outbox} as early on early.id = h.outbox_id
      join {outbox} as late on late.id = i.overtaker
     where early.topic = late.topic and early.message_key = late.message_key and early.id < late.id
),
stored as materialized (
    select h.outbox_id, min(h.id) as place
      from {history} as h
     where h.outbox_id in (select id from suspects union select overtaker from suspects)
     group by h.outbox_id
)
select s.id, s.overtaker, s.topic, s.message_key, s.retry_count, s.created
  from suspects as s
  join stored as early on early.outbox_id = s.id
  join stored as late on late.outbox_id = s.overtaker
 where early.place > late.place
 order by s.id;

-- name: end_of_history_range
-- Where a range of so many rows of history ends, by `outbox_id`. What lies up to where `prune` has been has lost its rows, and what
-- was enqueued since the walk began is left to the next one; ids that the outbox has never given have no end to look up to.
with ends as (
    select coalesce((select max(p.through_id) from {pruned} as p where p.outbox_table = {outbox_name}), 0) as pruned,
           coalesce((select max(id) from {outbox}), 0) as last
)
select max(few.outbox_id)
  from (select * from (select h.outbox_id from {history} as h
                        where h.outbox_id > %(after)s and h.outbox_id < 1
                        order by h.outbox_id limit %(limit)s) as never_given
        union all
        select * from (select h.outbox_id from {history} as h
                        where h.outbox_id > greatest(%(after)s, (select pruned from ends)) and h.outbox_id <= %(through)s
                        order by h.outbox_id limit %(limit)s) as within
        union all
        select * from (select h.outbox_id from {history} as h
                        where h.outbox_id > greatest(%(after)s, (select greatest(pruned, last, %(through)s) from ends))
                        order by h.outbox_id limit %(limit)s) as beyond
        order by 1 limit %(limit)s) as few;

-- name: without_a_message
-- Rows of history that name a message of which the outbox has no row, though `prune` has not been there.
select h.outbox_id, h.chat_id::text
  from (select * from {history} where {which_history}) as h
 where (h.outbox_id < 1 or h.outbox_id > (select coalesce(max(p.through_id), 0) from {pruned} as p
                                           where p.outbox_table = {outbox_name}))
   and not exists (select from {outbox} as o where o.id = h.outbox_id)
 order by h.outbox_id;

-- name: rows_without_id
-- How many rows of history name no message, counted up to a limit; and how many blocks history takes.
select (select count(*) from (select from {history} where outbox_id is null limit %(limit)s) as few),
       pg_relation_size(%(history)s::regclass) / current_setting('block_size')::bigint;

-- name: count_without_id
-- How many of them are in some blocks, and which of them is the newest, in microseconds since 1970.
select count(*), max(extract(epoch from h.created_at::timestamptz) * 1000000) filter (where isfinite(h.created_at))::bigint
  from {history} as h
 where h.outbox_id is null and h.ctid >= %(first)s::tid and h.ctid < %(end)s::tid;

-- name: content_without_id
-- Those of them that are no older than the first message: a hash of what is in each, when it was made, and its id.
select {content}, (extract(epoch from h.created_at::timestamptz) * 1000000)::bigint, h.id
  from {history} as h
 where h.outbox_id is null and h.ctid >= %(first)s::tid and h.ctid < %(end)s::tid
   and isfinite(h.created_at) and h.created_at >= to_timestamp(%(since)s);

-- name: content
hashtextextended(row(h.user_id, h.chat_id, h.message_content, h.role)::text, 0)

-- name: content_of_range
-- The same of the messages of a range.
select {content}, (extract(epoch from h.created_at::timestamptz) * 1000000)::bigint, h.outbox_id
  from {history} as h
 where h.outbox_id > %(after)s and h.outbox_id <= %(through)s and isfinite(h.created_at);

-- name: redriven
-- Those of a few messages that somebody has put back: they are stored behind what came after them, and may be.
select distinct r.outbox_id from {redrives} as r
 where r.outbox_id = any (%(ids)s::bigint[]) and r.outbox_table = %(outbox)s;

-- name: pruned_through
select coalesce(max(p.through_id), 0) from {pruned} as p where p.outbox_table = {outbox_name};

-- name: without_a_trace
-- Those of a few ids that neither the outbox nor history has.
select i.id
  from unnest(%(ids)s::bigint[]) as i (id)
 where not exists (select from {outbox} as o where o.id = i.id)
   and not exists (select from {history} as h where h.outbox_id = i.id)
 order by i.id;

-- name: in_recovery
select pg_is_in_recovery();

-- name: unsettled
-- Where the sink's own proof begins: the last id there is, and the messages that are not settled yet.
select (select coalesce(max(id), 0) from {outbox}),
       array(select id from {outbox} where status = 'pending' order by id limit %(most)s)
       || array(select id from {outbox} where status = 'published' order by id limit %(most)s);

-- name: first_stored
-- The first message that can be expected in history: what an outbox had consumed before the connector took it over is not.
select greatest(o.first, h.first)
  from (select min(id) as first from {outbox}) as o, (select min(outbox_id) as first from {history}) as h
 where o.first is not null and h.first is not null;

-- name: last_id
select coalesce(max(id), 0) from {outbox};

-- name: untimely
-- Whether a row of history has another time than its message's payload, or where that has none, than the transaction that stored
-- it. Written out as text, since a cast may fail; a time that is written otherwise is left to `reconcile`.
case when m.payload ->> 'created_at' is null
     then h.created_at not between least(m.created_at, m.consumed_at) - interval '1 minute'
                               and m.consumed_at + interval '1 minute'
     when m.payload ->> 'created_at'
          ~ '^\d{{4}}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d{{1,6}})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)?$'
     then to_char((h.created_at::timestamptz at time zone 'UTC')
                  + coalesce(substring(m.payload ->> 'created_at' from '[+-]\d\d:\d\d$'), '0')::interval,
                  'YYYY-MM-DD HH24:MI:SS.US')
          is distinct from
          replace(left(m.payload ->> 'created_at', 19), 'T', ' ') || '.'
              || rpad(coalesce(substring(m.payload ->> 'created_at' from '\.(\d+)'), ''), 6, '0')
     else false
end

-- name: unproved
-- Of a range of ids, and of a few others, those that are not proved, each with why; and where the range ends.
with fresh as materialized (
    select id, biz_type, status, payload, created_at, consumed_at
      from {outbox}
     where id > %(after)s and id <= %(through)s
     order by id
     limit %(limit)s
),
message as (
    select * from fresh
    union all
    select id, biz_type, status, payload, created_at, consumed_at from {outbox} where id = any (%(again)s::bigint[])
),
judged as (
    select m.id,
           case when m.status in ('pending', 'published') then 'unsettled'
                when h.rows > 1 then 'duplicated'
                when m.status = 'consumed' and h.rows = 0 and m.biz_type = any (%(biz_types)s) then 'missing'
                when m.status <> 'consumed' and h.rows > 0 then 'differing'
                when h.differing and m.biz_type = any (%(biz_types)s) then 'differing'
           end as why
      from message as m
      cross join lateral (
          select count(*) as rows,
                 coalesce(bool_or((h.user_id::text, h.chat_id::text, h.message_content, h.role::text) is distinct from
                                  (m.payload ->> 'user_id', m.payload ->> 'chat_id', m.payload ->> 'message_content',
                                   m.payload ->> 'role')
                                  or {untimely}), false) as differing
            from {history} as h
           where h.outbox_id = m.id
      ) as h
)
select id, why from judged where why is not null
union all
select max(id), 'end' from fresh;
