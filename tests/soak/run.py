"""A run: the pipeline behind proxies, the load, the faults as they are drawn, and what was seen of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import psycopg

from tests.services import Database, Kafka, Postgres, Process, TcpProxy, environment
from tests.soak.fleet import EXPECTED_ENDS, Supervised
from tests.soak.load import TABLES, Load
from tests.soak.plot import Mark, Sample, svg
from tests.soak.proof import Connection, Proof, prove
from tests.soak.schedule import Fault, Kind, draw

TURN_SECONDS: Final = 0.05
SAMPLE_SECONDS: Final = 1.0
STUCK_SECONDS: Final = 120.0
"""How long nothing may move, once every fault is over, before the run counts as stuck."""
MEMORY_LIMIT_MB: Final = 150
_SLOT_SECONDS: Final = 15.0
_LEAVE_SECONDS: Final = 40.0
# One thread that stays: a server dies with the thread that has started it.
_SERVERS: Final = ThreadPoolExecutor(1)
_OUTAGES: Final = frozenset({Kind.KILL_BROKER, Kind.CRASH_DATABASE})


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is told: its seed, the minutes in which faults come, and the messages to be written meanwhile."""

    seed: int
    minutes: float
    messages: int


@dataclass(slots=True)
class Report:
    """What a run has shown."""

    options: Options
    proof: Proof
    faults: dict[str, int]
    seconds: float
    drained_seconds: float
    largest_mb: dict[str, float]
    trouble: list[str]
    samples: list[Sample] = field(repr=False)
    marks: list[Mark] = field(repr=False)

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.proof.wrong and not self.trouble

    @property
    def kills(self) -> int:
        """How many SIGKILLs the two processes got."""
        return self.faults.get(Kind.KILL_READER, 0) + self.faults.get(Kind.KILL_SINK, 0)

    def plot(self) -> str:
        """Return the plot as SVG."""
        result = "nothing lost, doubled, reordered or stuck" if self.passed else f"WRONG: {self.proof.wrong}"
        return svg(f"seed {self.options.seed}: {self.proof.written:,} messages, {result}", self.samples, self.marks)

    def lines(self) -> list[str]:
        """Return what there is to say, for people."""
        proof = asdict(self.proof)
        samples = proof.pop("samples")
        return [
            f"{self.seconds:.0f} s of faults, {self.drained_seconds:.0f} s until everything was settled",
            *(f"{name:>24}: {count}" for name, count in sorted(self.faults.items())),
            *(f"{name.replace('_', ' '):>18}: {count:,}" for name, count in proof.items()),
            *(f"{name} for example: {ids}" for name, ids in samples.items()),
            *(f"peak memory of {name}: {megabytes:.0f} MB" for name, megabytes in self.largest_mb.items()),
            *(f"TROUBLE: {trouble}" for trouble in self.trouble),
            "PASSED" if self.passed else f"FAILED: repeat it with --seed {self.options.seed}",
        ]


def soak(options: Options, postgres: Postgres, kafka: Kafka, say: Callable[[str], None]) -> Report:
    """Run load and faults, let everything settle, and prove the result."""
    with ExitStack() as stack:
        proxy = stack.enter_context(kafka.proxy())
        database = stack.enter_context(postgres.database())
        topic = stack.enter_context(kafka.topic())
        # What the faults have stopped must answer again before database and topic can be dropped.
        stack.callback(kafka.start)
        stack.callback(postgres.start)
        stack.callback(Process.end_all)
        return _Run(options, database, kafka, topic, proxy, say=say).run(stack)


class _Run:
    def __init__(
        self,
        options: Options,
        database: Database,
        kafka: Kafka,
        topic: str,
        kafka_proxy: TcpProxy,
        *,
        say: Callable[[str], None],
    ) -> None:
        self._options = options
        self._database = database
        self._kafka = kafka
        self._topic = topic
        self._say = say
        url = urlsplit(database.url)
        self._kafka_proxy = kafka_proxy
        self._database_proxy = TcpProxy(url.hostname or "127.0.0.1", url.port or 5432)
        proxied = url._replace(netloc=f"{url.username}@127.0.0.1:{self._database_proxy.port}")
        self._direct = environment(database, kafka, topic)
        self._env = self._direct | {
            "CONNECTOR_DATABASE_URL": urlunsplit(proxied),
            "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{kafka_proxy.port}",
        }
        self._reader = Supervised("reader", partial(self._start, "reader"))
        self._sink = Supervised("sink", partial(self._start, "sink", CONNECTOR_POD_NAME="sink-0"))
        self._guests: list[Supervised] = []
        self._leaving: list[tuple[float, Process]] = []
        self._under_way: list[Future[None]] = []
        self._ends: list[tuple[float, Callable[[], None]]] = []
        self._broken: dict[TcpProxy, list[Fault]] = {self._kafka_proxy: [], self._database_proxy: []}
        self._began = 0.0
        self._counts: Counter[str] = Counter()
        self._marks: list[Mark] = []
        self._samples: list[Sample] = []
        self._trouble: list[str] = []
        self._watcher: Connection | None = None
        self._stored_id = self._written_id = 0
        self._sampled_at = 0.0

    def run(self, stack: ExitStack) -> Report:
        stack.callback(self._database_proxy.close)
        stack.callback(self._forget_watcher)
        assert Process("setup", env=self._direct).start().wait() == 0
        with self._database.connect() as connection:
            connection.execute(TABLES)
        options = self._options
        load = Load(self._database.url, self._topic, options.seed, options.messages, options.minutes * 60)
        self._began = self._sampled_at = time.monotonic()
        load.start()
        stack.callback(load.close)
        try:
            self._go_through(draw(options.seed, options.minutes), load)
        finally:
            load.close()
        faults_end = self._now()
        settled = self._drain()
        drained = self._now() - faults_end
        self._stop_processes()
        with self._database.connect() as connection:
            proof = prove(connection, self._kafka.bootstrap_servers, self._topic)
        if proof.written < load.committed:
            self._trouble.append(f"{load.committed} messages were committed, and {proof.written} are there")
        if proof.written < options.messages:
            self._trouble.append(f"{options.messages} messages were to be written, and {proof.written} are there")
        if not settled:
            self._trouble.append(f"nothing moved for {STUCK_SECONDS:.0f} s, and not everything was settled")
        return Report(
            options,
            proof,
            dict(self._counts),
            faults_end,
            drained,
            {one.name: one.largest_mb for one in (self._reader, self._sink, *self._guests)},
            self._trouble,
            self._samples,
            self._marks,
        )

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _go_through(self, faults: list[Fault], load: Load) -> None:
        coming = faults[::-1]
        while coming or self._ends or self._under_way or not load.done:
            while coming and coming[-1].at <= self._now():
                self._commit(coming.pop())
            self._turn()

    def _turn(self) -> None:
        for one in (self._reader, self._sink, *self._guests):
            one.tend()
        due = [end for at, end in self._ends if at <= self._now()]
        self._ends = [(at, end) for at, end in self._ends if at > self._now()]
        for end in due:
            end()
        for future in [future for future in self._under_way if future.done()]:
            self._under_way.remove(future)
            future.result()
        self._see_guests_off()
        if time.monotonic() >= self._sampled_at + SAMPLE_SECONDS:
            self._sample()
        time.sleep(TURN_SECONDS)

    def _drain(self) -> bool:
        """Wait until everything is settled; False if nothing moves any more and not everything is."""
        last, moved_at = -1, time.monotonic()
        while time.monotonic() < moved_at + STUCK_SECONDS:
            self._turn()
            live = self._live()
            if live == 0:
                return True
            if live is not None and live != last:
                last, moved_at = live, time.monotonic()
        return False

    def _stop_processes(self) -> None:
        for one in (self._reader, self._sink):
            code = one.stop()
            if code not in {0, None}:
                self._trouble.append(f"{one.name} ended with code {code} when it was asked to stop")
            self._trouble += one.trouble
            if one.largest_mb > MEMORY_LIMIT_MB:
                self._trouble.append(f"{one.name} took {one.largest_mb:.0f} MB, more than {MEMORY_LIMIT_MB}")

    # --- faults ------------------------------------------------------------------------------------------------------

    def _commit(self, fault: Fault) -> None:
        """Do what a fault says. It counts only where it was really done: what is down already cannot be killed."""
        if self._do(fault):
            self._happened(fault)

    def _happened(self, fault: Fault) -> None:
        self._counts[fault.kind] += 1
        self._marks.append(Mark(self._now(), fault.seconds, fault.kind, fault.kind in _OUTAGES))
        self._say(f"{self._now():7.1f} s  {fault.kind} ({fault.seconds:.1f} s)")

    def _do(self, fault: Fault) -> bool:
        match fault.kind:
            case Kind.KILL_READER:
                return self._reader.kill(fault.seconds)
            case Kind.KILL_SINK:
                return self._sink.kill(fault.seconds)
            case Kind.FREEZE_READER | Kind.FREEZE_SINK:
                thaw = (self._reader if fault.kind is Kind.FREEZE_READER else self._sink).freeze()
                if thaw is None:
                    return False
                self._at_its_end(fault, thaw)
            case Kind.KILL_BROKER | Kind.CRASH_DATABASE:
                self._under_way.append(_SERVERS.submit(self._restart, fault))
                return False  # the thread tells when it has happened
            case Kind.DROP_SLOT:
                self._under_way.append(_SERVERS.submit(self._drop_slot, fault))
                return False
            case Kind.SECOND_SINK | Kind.SECOND_READER:
                self._receive(fault)
            case _:
                self._break_network(fault)
        return True

    def _at_its_end(self, fault: Fault, end: Callable[[], None]) -> None:
        self._ends.append((self._now() + fault.seconds, end))

    def _restart(self, fault: Fault) -> None:
        self._happened(fault)
        if fault.kind is Kind.KILL_BROKER:
            self._kafka.kill()
            time.sleep(fault.seconds)
            self._kafka.start()
        else:
            self._database.server.stop("immediate")
            time.sleep(fault.seconds)
            self._database.server.start()

    def _drop_slot(self, fault: Fault) -> None:
        """Take the slot from the reader and drop it, as an operator might in an emergency."""
        slot = self._env["CONNECTOR_SLOT_NAME"]
        until = time.monotonic() + _SLOT_SECONDS
        while time.monotonic() < until:
            with suppress(psycopg.Error), self._database.connect() as connection:
                connection.execute(
                    "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = %s", [slot]
                )
                connection.execute("select pg_drop_replication_slot(%s)", [slot])
                self._happened(fault)
                return
            time.sleep(0.01)

    def _break_network(self, fault: Fault) -> None:
        of_kafka = fault.kind in {Kind.CUT_KAFKA, Kind.SILENCE_KAFKA, Kind.UNPLUG_KAFKA, Kind.SLOW_KAFKA}
        proxy = self._kafka_proxy if of_kafka else self._database_proxy
        self._broken[proxy].append(fault)
        _apply(proxy, fault)

        def mend() -> None:
            self._broken[proxy].remove(fault)
            proxy.restore()
            for other in self._broken[proxy]:
                _apply(proxy, other)

        self._at_its_end(fault, mend)

    def _receive(self, fault: Fault) -> None:
        """Let a second process in, which leaves again after a while."""
        command = "sink" if fault.kind is Kind.SECOND_SINK else "reader"
        number = len(self._guests) + 1
        variables = {"CONNECTOR_POD_NAME": f"sink-{number}"} if command == "sink" else {}
        guest = Supervised(f"second {command}", partial(self._start, command, **variables))
        self._guests.append(guest)

        def leave() -> None:
            self._guests.remove(guest)
            self._trouble += guest.trouble
            if guest.process is not None and guest.process.returncode is None:
                guest.process.terminate()
                self._leaving.append((time.monotonic() + _LEAVE_SECONDS, guest.process))

        self._at_its_end(fault, leave)

    def _see_guests_off(self) -> None:
        for at, process in list(self._leaving):
            if process.returncode is not None:
                self._leaving.remove((at, process))
                # A signal in an outage ends in a drain that overruns its time: 1.
                if process.returncode not in {0, 1, *EXPECTED_ENDS}:
                    self._trouble.append(f"{process.name} ended with code {process.returncode} when it was to stop")
            elif time.monotonic() > at:
                self._leaving.remove((at, process))
                self._trouble.append(f"{process.name} did not stop within {_LEAVE_SECONDS:.0f} s")
                process.kill()

    def _start(self, command: str, **variables: str) -> Process:
        return Process(command, env=self._env | variables).start()

    # --- what is seen ------------------------------------------------------------------------------------------------

    def _ask(self, query: str, *arguments: object) -> tuple[Any, ...] | None:
        """Ask the database past the proxy; None while it is down."""
        try:
            if self._watcher is None:
                self._watcher = psycopg.connect(self._database.url, autocommit=True, connect_timeout=2)
            return self._watcher.execute(query, arguments).fetchone()
        except psycopg.OperationalError:
            self._forget_watcher()
            return None

    def _forget_watcher(self) -> None:
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None

    def _live(self) -> int | None:
        record = self._ask("select count(*) from agent_outbox_messages where status in ('pending', 'published')")
        return None if record is None else int(record[0])

    def _sample(self) -> None:
        now = time.monotonic()
        passed, self._sampled_at = now - self._sampled_at, now
        record = self._ask(
            "select (select count(*) from chat_histories where id > %s), (select max(id) from chat_histories),"
            " (select count(*) from agent_outbox_messages where id > %s),"
            " (select max(id) from agent_outbox_messages),"
            # Those that were never tried: what waits for a conversation waits by plan.
            " (select extract(epoch from clock_timestamp() - min(created_at))::float from agent_outbox_messages"
            "   where status in ('pending', 'published') and next_retry_at is null)",
            self._stored_id,
            self._written_id,
        )
        if record is None:
            self._samples.append(Sample(self._now(), 0, 0, self._samples[-1].lag + passed if self._samples else 0))
            return
        stored, stored_id, written, written_id, lag = record
        self._stored_id, self._written_id = stored_id or 0, written_id or 0
        self._samples.append(Sample(self._now(), stored / passed, written / passed, lag or 0.0))


def _apply(proxy: TcpProxy, fault: Fault) -> None:
    if fault.kind in {Kind.CUT_DATABASE, Kind.CUT_KAFKA}:
        proxy.cut()
    elif fault.kind in {Kind.SILENCE_DATABASE, Kind.SILENCE_KAFKA}:
        proxy.black_hole()
    elif fault.kind in {Kind.UNPLUG_DATABASE, Kind.UNPLUG_KAFKA}:
        proxy.unplug()
    else:
        proxy.delay(0.05)
