"""The console answers what it is asked, changes nothing without its token, and outlives whatever it looks at."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from confluent_kafka import Producer

from connector import cli
from connector.cli import composition
from connector.demo.embedded import free_port
from tests.integration.letters import write_letter
from tests.integration.outbox_table import PAYLOAD, TABLES, OutboxTable
from tests.integration.scenario import Tap, is_streaming, metric, set_up
from tests.services import Database, Kafka, Process, eventually
from tests.services.console import TOKEN, Console
from tests.services.proxy import TcpProxy

Start = Callable[..., Process]

HOSTILE = [
    "<script>alert(1)</script>",
    "'; drop table agent_outbox_messages; --",
    "%00",
    "a\x00b",
    "\N{RIGHT-TO-LEFT OVERRIDE}",
    "漢字" * 400,
    "x" * 5_000,
    "../../etc/passwd",
    "%(key)s {outbox}",
    "-1",
    "99999999999999999999",
    "9223372036854775808",
    "\N{ARABIC-INDIC DIGIT ONE}",
    "1e3",
]


@pytest.fixture
def outbox(connector_env: dict[str, str], database: Database) -> Iterator[OutboxTable]:
    """The tables of a pipeline that is set up, and not running."""
    set_up(connector_env)
    table = OutboxTable(database)
    yield table
    table.close()


@pytest.fixture
def console(outbox: OutboxTable, connector: Start) -> Console:
    """A console that has the token."""
    return Console(connector("console", CONNECTOR_CONSOLE_TOKEN=TOKEN))


def died(outbox: OutboxTable, error: str, key: str = "key", biz_type: str = "chat_history_persist") -> int:
    """Add a row that is dead."""
    return outbox.new(key, status="dead", last_error=error, biz_type=biz_type, retry_count=2)


def test_a_running_pipeline_is_seen_and_its_message_told_from_creation_to_history(
    durable_kafka: Kafka, outbox: OutboxTable, topic: str, connector: Start, console: Console
) -> None:
    """The line has its parts running, and a message its copy's partition and offset, and its row of history."""
    is_streaming(connector("reader"))
    connector("sink")
    outbox_id = outbox.new("chat-1", topic)
    eventually(lambda: outbox.status(outbox_id) == "consumed", within=30, what="the storing of the message")
    now = eventually(
        lambda: (now := console.now())["slot"]["active"] and now["consumer"]["lag"] == 0 and now["latency"] and now,
        within=30,
        what="a look at all of the pipeline",
    )
    assert now["consumer"]["members"] == 1
    assert now["problems"] == []
    assert now["outbox"] == {"pending": 0, "published": 0, "consumed": 1, "dead": 0}
    points = console.ask("/api/pipeline?after=0").json()
    assert len(points["points"][-1]) == 9
    later = console.ask(f"/api/pipeline?after={points['number']}").json()
    assert len(later["points"]) <= later["number"] - points["number"]

    life = console.ask(f"/api/messages/{outbox_id}").json()
    assert life["message"]["id"] == str(outbox_id)
    assert json.loads(life["message"]["payload"]) == PAYLOAD
    assert life["message"]["status"] == "consumed"
    assert [row["content"] for row in life["history"]] == [PAYLOAD["message_content"]]
    assert life["untold"] == []
    with Tap(durable_kafka, topic) as tap:
        (sent,) = tap.has([outbox_id])
    copies = console.ask(f"/api/messages/{outbox_id}/copies").json()
    assert copies["complete"] is True
    assert [(copy["partition"], copy["offset"], copy["attempt"]) for copy in copies["copies"]] == [
        (sent.partition, sent.offset, 0)
    ]
    assert console.process.stop() == 0


def test_a_message_is_found_by_its_key_however_long_ago_it_failed(outbox: OutboxTable, console: Console) -> None:
    """The messages of a key come the latest first, fifty at a time, and name what they wait for."""
    first = died(outbox, "too bad", "mine")
    waiting = outbox.in_retry("mine")
    behind = outbox.new("mine", status="published")
    outbox.new("other")
    page = console.ask("/api/messages?key=mine").json()
    assert [message["id"] for message in page["messages"]] == [str(behind), str(waiting), str(first)]
    assert page["further_id"] is None
    assert page["messages"][2]["error"] == "too bad"
    older = console.ask(f"/api/messages?key=mine&before={waiting}").json()
    assert [message["id"] for message in older["messages"]] == [str(first)]
    assert console.ask(f"/api/messages/{behind}").json()["waits_for"]["id"] == str(waiting)
    assert console.ask("/api/messages/4711").status == 404

    ids = [str(outbox.new("many", status="consumed")) for _ in range(120)]
    seen: list[str] = []
    before = ""
    while True:
        page = console.ask(f"/api/messages?key=many{before}").json()
        seen += [message["id"] for message in page["messages"]]
        if page["further_id"] is None:
            break
        assert len(page["messages"]) == 50
        before = f"&before={page['further_id']}"
    assert seen == ids[::-1]


@pytest.mark.parametrize("indexed", [False, True])
def test_a_message_is_found_by_its_conversation_whatever_its_key_and_when_its_row_is_gone(
    outbox: OutboxTable, console: Console, *, indexed: bool
) -> None:
    """History is asked, by an index if it has one, and what is not stored yet; what is pruned is told from history."""
    if indexed:
        outbox.connection.execute("create index on chat_histories (chat_id, created_at)")
    payload = {**PAYLOAD, "chat_id": "talk"}
    ids = [outbox.new("its-key", payload=payload, status="consumed") for _ in range(60)]
    outbox.connection.execute(
        "insert into chat_histories (user_id, chat_id, message_content, outbox_id)"
        " select 7, payload ->> 'chat_id', 'hello', id from agent_outbox_messages order by id"
    )
    dead, waiting = (outbox.new("its-key", payload=payload, status=status) for status in ("dead", "published"))
    outbox.new("talk", payload=payload)
    pruned, kept = ids[0], ids[-1]
    outbox.connection.execute("delete from agent_outbox_messages where id <= %s", [pruned])
    name = str(TABLES.outbox)
    outbox.connection.execute("insert into outbox_connector_pruned values (%s, %s)", [name, pruned])

    page = console.ask("/api/conversations?chat_id=talk").json()
    assert [message["id"] for message in page["waiting"]] == [str(waiting), str(dead)]
    assert page["stored"][0] == {
        "id": "60",
        "outbox_id": str(kept),
        "user_id": "7",
        "role": None,
        "content": "hello",
        "created_at": page["stored"][0]["created_at"],
        "key": "its-key",
        "status": "consumed",
    }
    further = console.ask(f"/api/conversations?chat_id=talk&before={page['further_id']}").json()
    seen = [row["outbox_id"] for row in [*page["stored"], *further["stored"]]]
    assert seen == [str(outbox_id) for outbox_id in reversed(ids)]
    assert (further["waiting"], further["further_id"], further["stored"][-1]["status"]) == ([], None, None)
    none = console.ask("/api/conversations?chat_id=its-key").json()
    assert none == {"stored": [], "waiting": [], "further_id": None}

    life = console.ask(f"/api/messages/{pruned}").json()
    assert (life["message"], life["pruned_through_id"], life["untold"]) == (None, str(pruned), [])
    assert [row["content"] for row in life["history"]] == ["hello"]
    assert console.ask(f"/api/messages/{pruned}/copies").status == 404


def test_the_dead_are_grouped_by_their_reason(outbox: OutboxTable, console: Console) -> None:
    """Errors that differ in what they quote, and in numbers, are one reason; kinds are kept apart."""
    one = [died(outbox, f'Key (chat_id)=(chat-{n}) is not present in table "chats"', f"key-{n}") for n in range(3)]
    other = died(outbox, "no handler", biz_type="unknown")
    groups = console.ask("/api/dead").json()["groups"]
    assert [(group["rows"], group["keys"], group["biz_type"]) for group in groups] == [
        (3, 3, "chat_history_persist"),
        (1, 1, "unknown"),
    ]
    query = f"reason={quote(groups[0]['reason'])}&biz_type=chat_history_persist"
    rows = console.ask(f"/api/dead/rows?{query}").json()["rows"]
    assert [int(row["id"]) for row in rows] == one[::-1]
    assert groups[1]["last_id"] == str(other)


def test_with_the_token_only_dead_messages_are_put_back_and_it_is_recorded(
    outbox: OutboxTable, console: Console
) -> None:
    """A redrive moves the dead ones among those it names, once, and its record says who asked and why."""
    dead, consumed = died(outbox, "too bad"), outbox.new(status="consumed")
    body = {"ids": [str(dead), str(consumed), "4711"], "reason": "mended <b>"}
    assert console.post("/api/redrive", body).json() == {"moved": 1}
    assert console.post("/api/redrive", body).json() == {"moved": 0}
    assert (outbox.status(dead), outbox.status(consumed)) == ("pending", "consumed")
    (redrive,) = console.ask(f"/api/messages/{dead}").json()["redrives"]
    assert (redrive["was"], redrive["reason"], redrive["error"]) == ("dead", "mended <b>", "too bad")
    assert "console, for 127.0.0.1" in redrive["by"]


def test_the_latest_dead_letters_are_shown_by_their_reason_and_put_back_once(
    outbox: OutboxTable, kafka: Kafka, topic: str, console: Console
) -> None:
    """Each group tells its topic and samples, and what cannot go back why; with the token the others go back, once."""
    assert console.ask("/api/letters").json() == {
        "topic": f"{topic}.dead",
        "held": 0,
        "looked_at": 0,
        "complete": True,
        "groups": [],
    }
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0})
    write_letter(producer, topic, b"\xff{" + b"x" * 500, "not JSON, char 1", dead_letter_partition="3")
    write_letter(producer, topic, HOSTILE[0].encode(), "not JSON, char 22", dead_letter_offset="7")
    write_letter(producer, "somebody.elses", b"{}", "no `outbox_id`", f"{topic}.dead")
    write_letter(producer, topic, None, "a large one", dead_letter_value_bytes="2000000")
    answer = console.ask("/api/letters").json()
    assert (answer["held"], answer["looked_at"], answer["complete"]) == (4, 4, True)
    bad, *others = answer["groups"]
    assert (bad["reason"], bad["topic"], bad["letters"], bad["sent_before"], bad["obstacle"]) == (
        "not JSON, char N",
        topic,
        2,
        0,
        None,
    )
    assert [(sample["value"], sample["size"], sample["origin"]) for sample in bad["samples"]] == [
        (HOSTILE[0], len(HOSTILE[0]), "/7"),
        ("\ufffd{" + "x" * 298, 502, "3/"),
    ]
    by_reason = {group["reason"]: group for group in others}
    foreign, large = by_reason["no `outbox_id`"], by_reason["a large one"]
    assert "CONNECTOR_TOPICS" in foreign["obstacle"]
    assert "too large" in large["obstacle"]
    assert (foreign["sendable"], large["sendable"], large["samples"][0]["size"]) == ([], [], 2_000_000)

    body = {"letters": bad["sendable"][:1], "reason": "a new sink"}
    assert console.post("/api/letters/redrive", body, "wrong").status == 401
    # Letters that nobody has: of another time, and of a place behind the end.
    (partition, offset, at), _ = bad["sendable"]
    others_time = {"letters": [[partition, offset, at - 1], [partition, 4711, at]]}
    assert console.post("/api/letters/redrive", others_time).json() == {"moved": 0}
    with Tap(kafka, topic) as tap:
        assert console.post("/api/letters/redrive", body).json() == {"moved": 1}
        body = {"letters": bad["sendable"]}
        assert console.post("/api/letters/redrive", body).json() == {"moved": 1}
        assert console.post("/api/letters/redrive", body).json() == {"moved": 0}
        sent = tap.until(lambda sent: len(sent) >= 2)
        assert [message.value for message in sent] == [HOSTILE[0].encode(), b"\xff{" + b"x" * 500]
    (bad,) = [group for group in console.ask("/api/letters").json()["groups"] if group["letters"] == 2]
    assert (bad["sent_before"], bad["sendable"]) == (2, [])
    (by, reason), _ = outbox.connection.execute(
        "select redriven_by, reason from outbox_connector_redrives order by id"
    ).fetchall()
    assert ("console, for 127.0.0.1" in by, reason) == (True, "a new sink")


def test_nothing_is_changed_without_the_token_in_its_header(outbox: OutboxTable, console: Console) -> None:
    """No other token, no cookie and nothing that a form could send puts a message back."""
    dead = died(outbox, "too bad")
    body = json.dumps({"ids": [str(dead)]}).encode()
    asked: list[tuple[str | None, dict[str, str], int]] = [
        (None, {}, 401),
        (TOKEN.upper(), {}, 401),
        ("tök\xa0en", {}, 401),
        (None, {"Cookie": f"token={TOKEN}", "Authorization": f"Basic {TOKEN}"}, 401),
        (TOKEN, {"Content_Type": "text/plain"}, 415),
        (TOKEN, {"Content_Type": "application/x-www-form-urlencoded"}, 415),
    ]
    for token, headers, status in asked:
        answer = console.post("/api/redrive", body, token, **headers)
        assert (answer.status, TOKEN in answer.text) == (status, False), (token, headers)
    assert outbox.status(dead) == "dead"
    assert console.post("/api/redrive", body, Content_Type="application/json").json() == {"moved": 1}


def test_without_a_token_set_it_is_read_only(outbox: OutboxTable, connector: Start) -> None:
    """Whoever asks for a redrive is told what is not set, and nothing changes."""
    dead = died(outbox, "too bad")
    console = Console(connector("console"))
    answer = console.post("/api/redrive", {"ids": [str(dead)]}, "")
    assert answer.status == 403
    assert "CONNECTOR_CONSOLE_TOKEN" in answer.text
    assert console.ask("/api/pipeline").json()["writable"] is False
    assert outbox.status(dead) == "dead"


def test_wrong_questions_are_refused_and_none_fails(outbox: OutboxTable, console: Console) -> None:
    """Whatever is asked gets an answer in JSON that is no failure of the console's, with the same safe headers."""
    questions = [
        *(f"/api/messages?key={quote(text)}" for text in HOSTILE),
        *(f"/api/conversations?chat_id={quote(text)}" for text in HOSTILE),
        *(f"/api/messages/{quote(text, safe='')}" for text in HOSTILE),
        *(f"/api/dead/rows?reason={quote(text)}&biz_type={quote(text)}" for text in HOSTILE),
        *(f"/api/pipeline?after={quote(text)}" for text in HOSTILE),
        "/api/messages?key=x&before=y",
        "/api/messages",
        "/nowhere",
    ]
    for question in questions:
        answer = console.ask(question)
        assert answer.status in {200, 400, 404}, (question, answer)
        assert answer.headers["content-type"].startswith("application/json")
        assert "script-src 'self'" in answer.headers["content-security-policy"]
    many = [*range(1, 502)]
    bodies = [b"", b"{", b"[" * 60_000, b"[]", {"ids": []}, {"ids": many}, {"ids": ["x"]}, {"ids": [None]}, {"ids": 1}]
    for body in [*bodies, {"ids": [1], "reason": 5}, {"ids": [1], "reason": "a\0b"}, {"ids": [1], "reason": "\ud800"}]:
        answer = console.post("/api/redrive", body, Content_Type="application/json")
        assert answer.status == 400, (body, answer)
    letters = [[], [1], [[1, 2]], [[1, 2, -1]], [[True, 2, 3]], [["1", 2, 3]], [[1 << 31, 2, 3]], [[0, 0, 0]] * 1_001]
    for wrong in [*letters, {}, None]:
        assert console.post("/api/letters/redrive", {"letters": wrong}).status == 400, wrong
    assert console.post("/api/redrive", b"x" * 70_000, Content_Type="application/json").status == 413
    assert console.ask("/", method="DELETE").status == 405
    assert not [event for event in console.process.events if event["level"] in {"error", "critical"}]


def test_odd_rows_are_shown_as_they_are(outbox: OutboxTable, console: Console) -> None:
    """Times that are none, huge ids, long payloads and null content are told, within bounds."""
    odd = 9_007_199_254_740_993
    outbox.connection.execute(
        "insert into agent_outbox_messages (id, biz_type, topic, message_key, payload, status, created_at, updated_at,"
        " published_at) overriding system value values (%s, 'x', 'no such topic', 'k', to_jsonb(repeat('漢', 50000)),"
        " 'dead', 'infinity', '-infinity', '4713-01-01 BC')",
        [odd],
    )
    life = console.ask(f"/api/messages/{odd}").json()
    assert life["message"]["id"] == str(odd)
    assert (life["message"]["created_at"], life["message"]["updated_at"]) == ("infinity", "-infinity")
    assert (len(life["message"]["payload"]), life["message"]["payload_length"]) == (20_000, 50_002)
    assert console.ask(f"/api/messages/{odd}/copies").json()["copies"] == []
    assert console.ask("/api/dead").json()["groups"][0]["last_id"] == str(odd)
    assert console.now()["deaths"][0]["age"] is None


def test_the_proof_names_messages_that_history_lacks(outbox: OutboxTable, console: Console) -> None:
    """A proof on request tells what is stored wrongly, and is shown to whoever looks next."""
    assert console.ask("/api/proof").json() == {"proof": None, "recorded": []}
    missing = outbox.new(status="consumed")
    outbox.new()
    assert console.ask("/api/proof", method="POST", body=b"x=1").status == 415
    proof = console.post("/api/proof", {}, None).json()["proof"]
    assert (proof["damaged"], proof["unsettled"], proof["samples"]) == (1, 1, [{"id": str(missing), "why": "missing"}])
    assert console.ask("/api/proof").json()["proof"] == proof


def test_the_last_proofs_of_reconcile_and_of_the_sinks_are_shown(
    durable_kafka: Kafka, outbox: OutboxTable, topic: str, connector: Start, console: Console
) -> None:
    """What was compared, when, by whom and what was found, the latest of each; a proof of less does not hide more."""
    is_streaming(connector("reader"))
    sink = connector("sink", CONNECTOR_PROOF_SECONDS="0.2", CONNECTOR_POD_NAME="sink-0")
    eventually(lambda: metric(sink, "last_proof_timestamp"), within=20, what="the sink's first proof")
    outbox_id = outbox.new("chat-1", topic)
    lost = outbox.new("chat-2", topic)
    outbox.connection.execute("update agent_outbox_messages set status = 'consumed' where id = %s", [lost])
    eventually(lambda: outbox.status(outbox_id) == "consumed", within=30, what="the storing of the message")
    outbox.connection.execute("delete from chat_histories where outbox_id = %s", [lost])

    def recorded() -> dict[str, Any]:
        return {proof["prover"]: proof for proof in console.ask("/api/proof").json()["recorded"]}

    eventually(lambda: recorded()["sink"]["damaged"], within=20, what="the sink's finding the damage")
    by_sink = recorded()["sink"]
    assert (by_sink["kinds"], by_sink["samples"]) == ({"missing": 1}, [{"id": str(lost), "why": "missing"}])
    assert by_sink["by"].endswith("@sink-0")
    assert connector("reconcile", "--since", "2h").wait(60) == 1
    proof = recorded()["reconcile"]
    assert (proof["damaged"], proof["covers"]) == (1, "2 messages, those of the last 2h")
    assert proof["samples"] == [{"id": str(lost), "why": "missing: consumed, and not in history"}]

    other = connector("sink", CONNECTOR_PROOF_SECONDS="0.2", CONNECTOR_POD_NAME="sink-1")
    other.wait_for_log("partitions_assigned")
    eventually(lambda: metric(other, "last_proof_timestamp"), within=20, what="a proof by a sink that came later")
    assert recorded()["sink"]["damaged"] == 1
    outbox.connection.execute(
        "insert into chat_histories (user_id, chat_id, message_content, role, outbox_id)"
        " select user_id, chat_id, message_content, role, %s from chat_histories where outbox_id = %s",
        [lost, outbox_id],
    )
    eventually(lambda: recorded()["sink"]["damaged"] == 0, within=20, what="a proof that finds nothing")
    assert connector("reconcile").wait(60) == 0
    assert (recorded()["reconcile"]["damaged"], recorded()["reconcile"]["covers"]) == (0, "2 messages")


def test_the_page_outlives_an_outage_of_the_database_and_recovers(
    outbox: OutboxTable, database: Database, connector: Start
) -> None:
    """While PostgreSQL is away everything says so, without its password; afterwards all is as before."""
    parts = urlsplit(database.url)
    with TcpProxy(parts.hostname or "", parts.port or 5432) as proxy:
        proxy.cut()
        url = parts._replace(netloc=f"{parts.username}:tell-nobody@127.0.0.1:{proxy.port}").geturl()
        console = Console(connector("console", CONNECTOR_DATABASE_URL=url))
        assert console.ask("/").status == 200
        now = console.now()
        assert now["outbox"] is None
        assert now["consumer"]["lag"] == 0
        assert "PostgreSQL" in now["problems"][0]
        answer = console.ask("/api/dead")
        assert (answer.status, "PostgreSQL" in answer.text) == (503, True)
        proxy.restore()
        eventually(lambda: console.now()["problems"] == [], within=30, what="the recovery")
        assert console.now()["outbox"] is not None
        assert console.ask("/api/dead").json() == {"groups": []}
    assert "tell-nobody" not in json.dumps(now) + answer.text + console.process.stderr


@pytest.mark.slow
def test_the_page_outlives_an_outage_of_kafka(outbox: OutboxTable, connector: Start) -> None:
    """While Kafka is away the database's part is shown, and a message without its copies."""
    outbox_id = outbox.new()
    away = {"CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{free_port()}", "CONNECTOR_CONSOLE_TOKEN": TOKEN}
    console = Console(connector("console", **away))
    assert console.ask(f"/api/messages/{outbox_id}").status == 200
    assert console.ask(f"/api/messages/{outbox_id}/copies").status == 503
    assert console.ask("/api/letters").status == 503
    assert console.post("/api/letters/redrive", {"letters": [[0, 0, 0]]}).status == 503
    now = console.now()
    assert (now["outbox"]["pending"], now["consumer"]["lag"]) == (1, None)
    assert "Kafka" in now["problems"][0]
    assert console.ask("/livez").status == 200


def test_before_setup_the_page_names_setup(connector: Start) -> None:
    """On an empty database it says what to run instead of ending; Ctrl-C ends it with 0."""
    console = Console(connector("console"))
    assert "outbox-connector setup" in console.now()["problems"][0]
    assert "outbox-connector setup" in console.ask("/api/dead").text
    assert "outbox-connector setup" in console.ask("/api/letters").text
    os.kill(console.process.pid, signal.SIGINT)
    assert console.process.wait(20) == 0


def test_only_names_of_this_machine_reach_a_console_that_serves_only_it(
    connector_env: dict[str, str], connector: Start
) -> None:
    """A page on the internet cannot have its own name lead here; where all addresses are served any name may."""
    console = Console(connector("console"))
    for name in ("localhost", "127.0.0.1:1", "[::1]:8080", "LOCALHOST:80"):
        assert console.ask("/", Host=name).status == 200
    for name in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", ""):
        answer = console.ask("/api/dead", Host=name)
        assert (answer.status, "CONNECTOR_CONSOLE_HOST" in answer.text) == (421, True)
    everywhere = Console(connector("console", CONNECTOR_CONSOLE_HOST="0.0.0.0"))  # noqa: S104 - what is tested
    assert everywhere.ask("/", Host="console.example").status == 200


@pytest.fixture
def ended(
    connector_env: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str]]:
    """Run the command in this process, where it ends at once; gives its exit code and what it says."""

    def run(**variables: str) -> tuple[object, str]:
        for name, value in (connector_env | variables).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(composition, "configure_logging", lambda *_: None)
        with pytest.raises(SystemExit) as end:
            cli.main(["console"])
        return end.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CONNECTOR_CONSOLE_TOKEN", "tell-nobody"),
        ("CONNECTOR_HTTP_PORT", "taken"),
        ("CONNECTOR_CONSOLE_HOST", "192.0.2.1"),
        ("CONNECTOR_CONSOLE_HOST", "no such host"),
    ],
)
def test_wrong_settings_end_it_with_78(ended: Callable[..., tuple[object, str]], name: str, value: str) -> None:
    """A token that is too short, a port that is taken and an address of elsewhere are told by their variables."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        code, said = ended(**{name: str(other.getsockname()[1]) if value == "taken" else value})
    assert (code, name in said, "tell-nobody" in said) == (78, True, False)


def test_without_its_extra_it_says_what_to_install(
    ended: Callable[..., tuple[object, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Starlette or uvicorn is not installed, the command that installs them is told, with exit code 78."""
    monkeypatch.setattr(cli.console, "find_spec", lambda _: None)
    code, said = ended()
    assert (code, "pip install 'outbox-connector[console]'" in said) == (78, True)
