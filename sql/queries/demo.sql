-- What the demo adds to a database, watches in it, and proves from it.

-- name: create_chats
-- Conversations, so that a message may arrive before the one it belongs to.
create table {chats} (chat_id varchar(36) primary key, user_id bigint not null, created_at timestamptz not null default now());

-- name: refer_to_chats
alter table {history} add foreign key (chat_id) references {chats} (chat_id);

-- name: open_chat
insert into {chats} (chat_id, user_id) values (%(chat_id)s, %(user_id)s);

-- name: server_settings
select current_setting('server_version_num')::integer, current_setting('wal_level');

-- name: create_database
create database {database};

-- name: end_slot_users
select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = %(slot)s and active;

-- name: drop_slot
select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = %(slot)s;

-- name: drop_database
drop database if exists {database} with (force);

-- name: watch
-- The rows that are not consumed, from the partial indexes, and how long the latest messages took that neither failed
-- nor waited for one that did.
with latest as (
    select status, extract(epoch from consumed_at - created_at)::double precision as took,
           max(retry_count) over (partition by message_key) = 0 as undisturbed
      from {outbox}
     where id > (select coalesce(max(id), 0) from {outbox}) - 2000
),
undisturbed as (
    select took from latest where undisturbed and status = 'consumed'
)
select (select count(*) from {outbox} where status = 'pending' and next_retry_at is null),
       (select count(*) from {outbox} where status = 'pending' and next_retry_at is not null),
       (select count(*) from {outbox} where status = 'published'),
       (select count(*) from {outbox} where status = 'dead'),
       (select percentile_cont(0.5) within group (order by took) from undisturbed),
       (select percentile_cont(0.99) within group (order by took) from undisturbed);

-- name: dead
select id, retry_count, coalesce(last_error, '') from {outbox} where status = 'dead' order by id;

-- name: proof
-- One line over everything that was enqueued and everything that was stored. A message that is dead is to be stored
-- nowhere, any other one once: in the order of the outbox within its conversation, just as it was enqueued.
with message as materialized (
    select o.id, o.status, o.retry_count, extract(epoch from o.consumed_at - o.created_at)::double precision as took,
           max(o.retry_count) over (partition by o.message_key) = 0 as undisturbed,
           h.id as place, h.chat_id, o.status is distinct from 'dead' as wanted,
           (h.user_id, h.chat_id, h.message_content, h.role) is distinct from
               ((o.payload ->> 'user_id')::bigint, (o.payload ->> 'chat_id')::varchar,
                o.payload ->> 'message_content', (o.payload ->> 'role')::varchar) as altered
      from {outbox} as o
      left join {history} as h on h.outbox_id = o.id
),
neighbours as (
    select id < lag(id) over (partition by chat_id order by place) as backwards
      from message
     where place is not null
)
select count(distinct m.id),
       count(distinct m.id) filter (where m.place is not null),
       count(distinct m.id) filter (where m.retry_count > 0),
       coalesce(array_agg(distinct m.id) filter (where m.status = 'dead'), '{{}}'),
       count(*) filter (where m.wanted and m.place is null),
       -- Rows of history beyond one for each message that is to be stored: second ones, and those of no message.
       (select count(*) from {history}) - count(distinct m.id) filter (where m.wanted and m.place is not null),
       (select count(*) from neighbours where backwards),
       count(*) filter (where m.place is not null and m.altered),
       count(distinct m.id) filter (where m.wanted and m.status <> 'consumed'),
       percentile_cont(0.5) within group (order by m.took) filter (where m.undisturbed and m.status = 'consumed'),
       percentile_cont(0.99) within group (order by m.took) filter (where m.undisturbed and m.status = 'consumed')
  from message as m;
