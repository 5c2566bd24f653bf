-- What is kept of proofs.

-- name: record_proof
-- A sink does not write over what another one has found and finds still.
insert into {proofs} as p (outbox_table, prover, proved_by, seconds, covers, damaged, kinds, samples)
values (%(outbox)s, %(prover)s, %(proved_by)s, %(seconds)s, %(covers)s, %(damaged)s, %(kinds)s, %(samples)s)
on conflict (outbox_table, prover) do update
   set (proved_at, database_role, proved_by, seconds, covers, damaged, kinds, samples)
     = (excluded.proved_at, excluded.database_role, excluded.proved_by, excluded.seconds, excluded.covers,
        excluded.damaged, excluded.kinds, excluded.samples)
 where excluded.damaged >= p.damaged or excluded.proved_by = p.proved_by
    or p.proved_at < excluded.proved_at - %(holds)s * interval '1 second';

-- name: last_proofs
select p.prover, extract(epoch from p.proved_at)::double precision, p.proved_by, p.seconds, p.covers, p.damaged,
       p.kinds, p.samples
  from {proofs} as p
 where p.outbox_table = %(outbox)s
 order by p.proved_at desc;
