-- What is behind the confirmed position was sent since then, on that timeline: after a crash Kafka is searched from there on for
-- what need not be sent again. Null after a clean end.
alter table {slot_progress}
    add column if not exists published_since timestamptz,
    add column if not exists timeline integer;
