-- What `setup` asks and writes.

-- name: lock_setup
-- One setup at a time in a database; released at the transaction's end.
select pg_advisory_xact_lock(hashtext('outbox_connector'), hashtext('setup'));

-- name: create_migrations
create table if not exists {migrations} (
    outbox_table text        not null,
    version      integer     not null,
    name         text        not null,
    applied_at   timestamptz not null default now(),
    primary key (outbox_table, version)
);

-- name: applied_migrations
select version from {migrations} where outbox_table = %(outbox)s;

-- name: record_migration
insert into {migrations} (outbox_table, version, name) values (%(outbox)s, %(version)s, %(name)s)
on conflict (outbox_table, version) do nothing;

-- name: state_of_indexes
-- Of each index by its name: whether it is there, whether it is valid, and whether its table has somebody building one.
select i.name, x.indexrelid is not null, coalesce(x.indisvalid, false),
       exists (select from pg_stat_progress_create_index as p where p.relid in ({outbox_name}::regclass, {history_name}::regclass))
  from unnest(%(names)s::text[], %(tables)s::text[]) as i (name, table_name)
  left join pg_index as x on x.indrelid = i.table_name::regclass
        and x.indexrelid = (select c.oid from pg_class as c
                             where c.relname = i.name
                               and c.relnamespace = (select t.relnamespace from pg_class as t
                                                      where t.oid = i.table_name::regclass));

-- name: enqueue_target
-- One row if applications can enqueue: the table that the function writes to as its source has it, null where that does not
-- tell; whether it is our outbox; and whether it is there, which is taken for granted of names that only U& can write.
select f.target,
       strpos(f.source, {outbox_as_written}) > 0 or coalesce(f.found = to_regclass({outbox_name}), false),
       f.target ~ 'U&"' or f.found is not null
  from (select p.prosrc, s.target, case when s.target !~ 'U&"' then to_regclass(s.target) end
          from pg_proc as p,
               lateral (select (regexp_match(p.prosrc, 'insert\s+into\s+((?:(?:(?:U&)?"(?:[^"]|"")+"|[[:alpha:]_]\w*)\s*\.\s*)?(?:(?:U&)?"(?:[^"]|"")+"|[[:alpha:]_]\w*))', 'i'))[1]) as s (target)
         where p.oid = to_regprocedure({enqueue_signature})) as f (source, target, found);

-- name: is_empty
select not exists (select from {outbox}) and not exists (select from {history});

-- name: drop_index
drop index {concurrently} {index};

-- name: create_publication
create publication {publication}
    for table {outbox} ({columns}) where (status = 'pending')
    with (publish = 'insert');

-- name: replace_publication_table
alter publication {publication} set table {outbox} ({columns}) where (status = 'pending');

-- name: publish_inserts_only
alter publication {publication} set (publish = 'insert');

-- name: publication_state
-- One line if there is such a publication: what it publishes, and the outbox's columns and row filter in it.
select p.pubinsert and not p.pubupdate and not p.pubdelete and not p.pubtruncate, t.attnames::text[], t.rowfilter,
       (select count(*) from pg_publication_tables as all_tables where all_tables.pubname = p.pubname)
  from pg_publication as p
  left join pg_class as c on c.oid = to_regclass(%(outbox)s)
  left join pg_namespace as n on n.oid = c.relnamespace
  left join pg_publication_tables as t
         on t.pubname = p.pubname and t.schemaname = n.nspname and t.tablename = c.relname
 where p.pubname = %(publication)s;
