-- The indexes of both tables. On a table that has rows `setup` builds them concurrently, so that nobody waits for them.

-- name: outbox_pending_idx
-- Rows not published yet, by id: the catch-up, the safety sweep, the count of the backlog.
create index {concurrently} if not exists {outbox_pending_idx} on {outbox} (id) where status = 'pending';

-- name: outbox_published_idx
-- Rows published and not consumed yet: the count of the backlog, its oldest row.
create index {concurrently} if not exists {outbox_published_idx} on {outbox} (id) where status = 'published';

-- name: outbox_due_idx
-- Rows that wait for their next attempt, by due time. Empty while nothing fails.
create index {concurrently} if not exists {outbox_due_idx} on {outbox} (next_retry_at, id)
    where status = 'pending' and next_retry_at is not null;

-- name: outbox_unsettled_idx
-- Rows of a key that were retried or held back and are not settled: what later rows of the key must wait for.
-- The due time stays on a row that is published again, until it is consumed or dead. Empty while nothing fails.
create index {concurrently} if not exists {outbox_unsettled_idx} on {outbox} (message_key, id)
    where next_retry_at is not null and status in ('pending', 'published');

-- name: outbox_dead_idx
-- Dead rows, for the operator.
create index {concurrently} if not exists {outbox_dead_idx} on {outbox} (id) where status = 'dead';

-- name: history_outbox_id_key
-- The database itself refuses a second row for one message.
create unique index {concurrently} if not exists {history_outbox_id_key} on {history} (outbox_id);
