-- What `doctor` and `status` ask of the catalogs. It names tables by their text, never as a regclass, so that it answers
-- about a table that is missing or forbidden too.

-- name: server
-- A limit that is not set, or that an older server does not know, is null.
select current_setting('server_version_num')::integer,
       current_setting('server_version'),
       current_setting('wal_level'),
       pg_is_in_recovery(),
       current_setting('max_replication_slots')::integer,
       (select count(*) from pg_replication_slots)::integer,
       current_setting('max_wal_senders')::integer,
       (select count(*) from pg_stat_get_wal_senders())::integer,
       (select setting::bigint * 1024 * 1024 from pg_settings
         where name = 'max_slot_wal_keep_size' and setting::bigint >= 0),
       (select setting::bigint from pg_settings
         where name = 'idle_replication_slot_timeout' and setting::bigint > 0),
       current_database()::text,
       (select system_identifier::text from pg_control_system());

-- name: role
-- Amazon RDS lets nobody have the attribute; it has a role for it.
select r.rolname::text, r.rolsuper,
       r.rolsuper or r.rolreplication
       or exists (select from pg_roles as managed
                   where managed.rolname = 'rds_replication' and pg_has_role(r.oid, managed.oid, 'member'))
  from pg_roles as r
 where r.rolname = current_user;

-- name: other_roles
-- Whether another role may serve the reader, and the sink: one that can log in, by what it was granted (a superuser may do
-- anything, and says nothing of what is meant), or one that does so now. It takes the tables' oids.
with others as materialized (
    select r.oid,
           r.rolreplication
           or exists (select from pg_roles as managed
                       where managed.rolname = 'rds_replication' and pg_has_role(r.oid, managed.oid, 'member')) as replicates
      from pg_roles as r
     where r.rolcanlogin and not r.rolsuper and r.rolname <> current_user
       and has_table_privilege(r.oid, %(outbox)s::oid, 'SELECT')
       and has_table_privilege(r.oid, %(outbox)s::oid, 'UPDATE')
),
at_work as materialized (
    select a.application_name as name from pg_stat_activity as a
     where a.datname = current_database() and a.usename <> current_user
)
select exists (select from others where replicates)
       or exists (select from at_work where starts_with(name, 'outbox-connector reader')),
       exists (select from others where has_table_privilege(oid, %(history)s::oid, 'INSERT'))
       or exists (select from at_work where name = 'outbox-connector sink');

-- name: remember
select set_config('outbox_connector.doctor', %(token)s, false);

-- name: backend
-- The server process that answers, and what the session remembers.
select pg_backend_pid(), coalesce(current_setting('outbox_connector.doctor', true), '');

-- name: clock
select extract(epoch from clock_timestamp())::double precision;

-- name: relation
select c.oid::bigint,
       c.relkind::text,
       c.relpersistence::text,
       c.relreplident::text,
       row_security_active(c.oid),
       (select count(*) from pg_policy as p where p.polrelid = c.oid)::integer,
       coalesce((select jsonb_object_agg(a.attname, format_type(a.atttypid, null))
                   from pg_attribute as a
                  where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped), '{{}}'),
       has_schema_privilege(n.oid, 'USAGE'),
       array_remove(array[case when has_table_privilege(c.oid, 'SELECT') then 'select' end,
                          case when has_table_privilege(c.oid, 'INSERT') then 'insert' end,
                          case when has_table_privilege(c.oid, 'UPDATE') then 'update' end], null),
       -- Sequences of serial columns; those of identity columns need no grant.
       array(select format('%%I.%%I', sn.nspname, s.relname)
               from pg_depend as d
               join pg_class as s on s.oid = d.objid
               join pg_namespace as sn on sn.oid = s.relnamespace
              where d.refobjid = c.oid and d.classid = 'pg_class'::regclass and d.deptype = 'a'
                and case when s.relkind = 'S' then not has_sequence_privilege(s.oid, 'USAGE') end)
  from pg_class as c
  join pg_namespace as n on n.oid = c.relnamespace
 where n.nspname = %(schema)s and c.relname = %(name)s;

-- name: triggers
select t.tgname::text, t.tgenabled::text, (t.tgtype & 2) <> 0, (t.tgtype & 4) <> 0, (t.tgtype & 16) <> 0
  from pg_trigger as t
 where t.tgrelid = %(oid)s and not t.tgisinternal
 order by t.tgname;

-- name: rules
select r.rulename::text,
       case r.ev_type when '2' then 'update' when '3' then 'insert' when '4' then 'delete' else 'select' end
  from pg_rewrite as r
 where r.ev_class = %(oid)s and r.rulename <> '_RETURN' and r.ev_enabled <> 'D'
 order by r.rulename;

-- name: indexes
select c.relname::text,
       i.indisvalid and i.indisready,
       i.indisunique and i.indpred is null,
       array(select a.attname::text
               from unnest(i.indkey::smallint[]) with ordinality as k (number, place)
               join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = k.number
              order by k.place)
  from pg_index as i
  join pg_class as c on c.oid = i.indexrelid
 where i.indrelid = %(oid)s
 order by c.relname;

-- name: slot
-- Columns that an older server lacks are null.
select s.slot_type, s.active, (to_jsonb(s) ->> 'failover')::boolean, to_jsonb(s) ->> 'invalidation_reason'
  from pg_replication_slots as s
 where s.slot_name = %(slot)s;

-- name: system_identifier
select system_identifier::text from pg_control_system();

-- name: waiting_topics
-- The topics of the oldest rows that wait.
select topic from (select topic from {outbox} where status = 'pending' order by id limit %(bound)s) as pending
union
select topic from (select topic from {outbox} where status = 'published' order by id limit %(bound)s) as published
order by topic;
