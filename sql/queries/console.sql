-- What the console asks when somebody looks for a message, or at the dead ones. Each reads a bounded number of rows from the
-- end of an index. Times are text, since some of what a row may hold (infinity, years BC) fits no other type of ours.

-- name: message
select o.id, o.biz_type, o.topic, o.message_key, o.status, o.retry_count, o.max_retry, o.next_retry_at::text,
       o.last_error, o.created_at::text, o.published_at::text, o.consumed_at::text, o.updated_at::text,
       left(o.payload::text, %(longest)s), length(o.payload::text), left(o.headers::text, %(longest)s),
       case when isfinite(o.created_at) then extract(epoch from o.created_at)::double precision end,
       case when isfinite(o.published_at) then extract(epoch from o.published_at)::double precision end
  from {outbox} as o
 where o.id = %(id)s;

-- name: history
select h.id, h.user_id, h.chat_id, h.role, left(h.message_content, %(longest)s), length(h.message_content), h.created_at::text
  from {history} as h
 where h.outbox_id = %(id)s;

-- name: has_conversation_index
-- Whether history can be asked for a conversation by an index; `setup` makes none, but most applications have one.
select exists (
    select
      from pg_index as i
      join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
      join pg_class as c on c.oid = i.indexrelid
      join pg_am as m on m.oid = c.relam
     where i.indrelid = {history_name}::regclass and a.attname = 'chat_id' and m.amname in ('btree', 'hash')
       and i.indisvalid and i.indpred is null);

-- name: in_history
-- The latest rows of a conversation. Sorted by what is no column, or the primary key might be read through for a few rows.
select h.id, h.outbox_id, h.user_id, h.role, left(h.message_content, 200), h.created_at::text, o.message_key, o.status
  from {history} as h
  left join {outbox} as o on o.id = h.outbox_id
 where h.chat_id = %(chat_id)s and h.id < %(before)s
 order by h.id + 0 desc
 limit %(limit)s;

-- name: lately_in_history
-- The same without such an index: among so many rows below an id, by the primary key.
select h.id, h.outbox_id, h.user_id, h.role, left(h.message_content, 200), h.created_at::text, o.message_key, o.status
  from (select id, outbox_id, user_id, chat_id, role, message_content, created_at from {history}
         where id < %(before)s order by id desc limit %(rows)s) as h
  left join {outbox} as o on o.id = h.outbox_id
 where h.chat_id = %(chat_id)s
 order by h.id desc
 limit %(limit)s;

-- name: looked_down_to_in_history
-- The lowest id of those that `lately_in_history` has looked at; null where it came to the end of the table.
select id from {history} where id < %(before)s order by id desc limit 1 offset %(rows)s - 1;

-- name: not_in_history
-- The latest rows that are not stored, of a conversation that is not their key.
select o.id, o.biz_type, o.topic, o.message_key, o.status, o.retry_count, o.created_at::text, left(o.last_error, 300)
  from ((select * from {outbox} where status = 'pending' order by id desc limit %(rows)s)
        union all
        (select * from {outbox} where status = 'published' order by id desc limit %(rows)s)
        union all
        (select * from {outbox} where status = 'dead' order by id desc limit %(rows)s)) as o
 where o.payload ->> 'chat_id' = %(chat_id)s and o.message_key <> %(chat_id)s
 order by o.id desc
 limit %(limit)s;

-- name: waits_for
-- The first row of its key that is being retried or held: what a later one must wait for, where ordering is strict.
select e.id, e.status, e.next_retry_at::text
  from {outbox} as e
 where e.message_key = %(key)s and e.topic = %(topic)s and e.id < %(id)s
   and e.next_retry_at is not null and e.status in ('pending', 'published')
 order by e.id
 limit 1;

-- name: redrives
select r.redriven_at::text, extract(epoch from r.redriven_at)::double precision, r.redriven_by, r.reason, r.was, r.error, r.attempt
  from {redrives} as r
 where r.outbox_id = %(id)s and r.outbox_table = %(outbox)s
 order by r.id desc
 limit %(limit)s;

-- name: of_key
-- The latest rows of a key, among so many rows below an id: by the primary key, since no index is kept on keys.
select o.id, o.biz_type, o.topic, o.message_key, o.status, o.retry_count, o.created_at::text, left(o.last_error, 300)
  from (select id, biz_type, topic, message_key, status, retry_count, created_at, last_error from {outbox}
         where id < %(before)s order by id desc limit %(rows)s) as o
 where o.message_key = %(key)s
 limit %(limit)s;

-- name: looked_down_to
-- The lowest id of those that `of_key` has looked at; null where it came to the end of the table.
select id from {outbox} where id < %(before)s order by id desc limit 1 offset %(rows)s - 1;

-- name: unsettled_of_key
select o.id, o.biz_type, o.topic, o.message_key, o.status, o.retry_count, o.created_at::text, left(o.last_error, 300)
  from {outbox} as o
 where o.message_key = %(key)s and o.next_retry_at is not null and o.status in ('pending', 'published')
 order by o.id desc
 limit %(limit)s;

-- name: dead_of_key
select o.id, o.biz_type, o.topic, o.message_key, o.status, o.retry_count, o.created_at::text, left(o.last_error, 300)
  from (select * from {outbox} where status = 'dead' order by id desc limit %(rows)s) as o
 where o.message_key = %(key)s
 limit %(limit)s;

-- name: dead_by_reason
-- The latest dead rows, grouped by what they died of: their errors without what differs from row to row.
select {reason} as reason, d.biz_type, count(*), count(distinct d.message_key), min(d.id), max(d.id), max(d.updated_at)::text,
       (array_agg(left(d.last_error, 500) order by d.id desc))[1]
  from (select * from {outbox} where status = 'dead' order by id desc limit %(rows)s) as d
 group by reason, d.biz_type
 order by count(*) desc, max(d.id) desc
 limit %(limit)s;

-- name: dead_of_reason
-- The latest dead rows of one such group.
select d.id, d.biz_type, d.topic, d.message_key, d.status, d.retry_count, d.created_at::text, left(d.last_error, 300)
  from (select * from {outbox} where status = 'dead' order by id desc limit %(rows)s) as d
 where d.biz_type = %(biz_type)s and {reason} = %(reason)s
 limit %(limit)s;

-- name: reason
regexp_replace(regexp_replace(left(coalesce(d.last_error, ''), 300),
    '=\([^)]*\)|"[^"]*"|''[^'']*''', '…', 'g'), '[0-9]+', '#', 'g')
