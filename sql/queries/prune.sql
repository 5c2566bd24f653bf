-- What `prune` asks and writes. It goes through the primary key a window at a time: rows that may be removed are at its
-- beginning, so no index of their own is needed. Identity values rise with time, nearly; `young` tells that a whole
-- window was enqueued too late to hold anything that may be removed.

-- name: settled_since
case o.status when 'consumed' then coalesce(o.consumed_at, o.updated_at) else o.updated_at end

-- name: remove_window
-- Rows that somebody holds locked are left to the next run: a sink that has a copy of one looks at it just now.
with looked as materialized (
    select o.id, o.created_at
      from {outbox} as o
     where o.id > %(after)s
     order by o.id
     limit %(window)s
),
chosen as materialized (
    select o.id, o.status
      from {outbox} as o
     where o.id > %(after)s
       and o.id <= (select max(l.id) from looked as l)
       and o.status = any (%(statuses)s::text[])
       and {since} <= %(started_at)s::timestamptz - %(older_than)s::double precision * interval '1 second'
       for update of o skip locked
),
removed as (
    delete from {outbox} as o where o.id = any (array(select c.id from chosen as c))
),
noted as (
    insert into {pruned} as p (outbox_table, through_id)
    select {outbox_name}, max(c.id) from chosen as c having count(*) > 0
    on conflict (outbox_table) do update
       set through_id = greatest(p.through_id, excluded.through_id), pruned_at = excluded.pruned_at
)
select (select max(l.id) from looked as l),
       (select count(*) from looked as l),
       (select bool_and(l.created_at > %(started_at)s::timestamptz - %(older_than)s::double precision * interval '1 second')
          from looked as l),
       (select count(*) from chosen as c where c.status = 'consumed'),
       (select count(*) from chosen as c where c.status = 'dead');

-- name: count_window
with looked as materialized (
    select o.id, o.created_at, o.status, {since} as since
      from {outbox} as o
     where o.id > %(after)s
     order by o.id
     limit %(window)s
),
chosen as (
    select l.status
      from looked as l
     where l.status = any (%(statuses)s::text[])
       and l.since <= %(started_at)s::timestamptz - %(older_than)s::double precision * interval '1 second'
)
select (select max(l.id) from looked as l),
       (select count(*) from looked as l),
       (select bool_and(l.created_at > %(started_at)s::timestamptz - %(older_than)s::double precision * interval '1 second')
          from looked as l),
       (select count(*) from chosen as c where c.status = 'consumed'),
       (select count(*) from chosen as c where c.status = 'dead');
