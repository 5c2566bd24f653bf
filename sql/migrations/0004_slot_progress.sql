-- How far the reader has confirmed each slot, written before the server is told, and whether it owes a catch-up from
-- the table. A slot that is further than this was moved by somebody else, and is not trusted.
create table if not exists {slot_progress} (
    slot_name         text primary key,
    system_identifier text        not null,
    confirmed_lsn     pg_lsn      not null,
    catch_up_owed     boolean     not null default false,
    -- The catch-up covers rows up to this id; null covers whatever is there when it starts.
    catch_up_through  bigint,
    catch_up_reason   text,
    updated_at        timestamptz not null default now()
);
