-- How an application enqueues a message, in its own transaction.
create or replace function {enqueue}(
    biz_type    text,
    topic       text,
    message_key text,
    payload     jsonb,
    max_retry   integer default 20,
    headers     jsonb default null
) returns bigint
language sql
volatile
as $enqueue$
    insert into {outbox} (biz_type, topic, message_key, payload, max_retry, headers)
    values ($1, $2, $3, $4, case when $5 > 0 then $5 else 20 end, $6)
    returning id
$enqueue$;
