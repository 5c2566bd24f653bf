"""The console's page in a real browser: what a person sees and does there, and what hostile rows cannot do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from confluent_kafka import Producer

from connector.store.proofs import Unproved, Verdict, record_proof
from tests.integration.letters import write_letter
from tests.integration.outbox_table import PAYLOAD, TABLES, OutboxTable
from tests.integration.scenario import is_streaming, set_up
from tests.services import Database, Kafka, Process, eventually
from tests.services.chromium import Chromium
from tests.services.console import TOKEN, Console

Start = Callable[..., Process]

HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    "</pre></article>'\"`${document.title='owned'}` javascript:alert(1) \N{RIGHT-TO-LEFT OVERRIDE}reversed \x1b[31m"
)

ACCESSIBILITY = (Path(__file__).parent / "accessibility.js").read_text("utf-8")
FOCUSED = "(document.activeElement.id || document.activeElement.textContent)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    """One browser for all the tests of this file."""
    with Chromium() as chromium:
        yield chromium


@pytest.fixture
def page(browser: Chromium) -> Chromium:
    """The browser as it is at first, and with nothing noted."""
    browser.open("about:blank")
    browser.resize(1280, 900)
    browser.prefer(color_scheme="light")
    browser.complaints.clear()
    browser.requested.clear()
    return browser


@pytest.fixture
def running(durable_kafka: Kafka, outbox: OutboxTable, connector: Start) -> None:
    """A reader and a sink that work."""
    is_streaming(connector("reader"))
    connector("sink")


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


def shows(page: Chromium, text: str) -> None:
    """Wait until the page shows a text."""
    page.wait_for(f"document.body.innerText.includes({text!r})", within=30)


def is_drawn(page: Chromium) -> None:
    """Wait until the live part of the page is there: what is below it moves no more."""
    page.wait_for("document.querySelectorAll('svg.chart path').length === 8", within=30)


def test_a_message_is_followed_through_a_running_pipeline_by_keyboard_alone(
    outbox: OutboxTable, running: None, topic: str, console: Console, page: Chromium
) -> None:
    """The line shows its parts at work; a search from the keyboard tells a message's life up to its row of history."""
    outbox_id = outbox.new("chat-1", topic)
    eventually(lambda: outbox.status(outbox_id) == "consumed", within=30, what="the storing of the message")
    page.open(console.url)
    page.wait_for("document.querySelectorAll('#stages li').length === 6")
    shows(page, "reads the slot")
    shows(page, "1 running")
    stages = page.run("[...document.querySelectorAll('#stages strong')].map((e) => e.textContent)")
    assert stages == ["Outbox", "WAL", "Reader", "Kafka", "Sink", "History"]
    is_drawn(page)
    assert page.run("document.querySelector('svg.chart').getAttribute('aria-label')").startswith("Rate over the last")

    order = []
    for _ in range(8):
        page.press("Tab")
        order.append(page.run(FOCUSED))
    links = ["Pipeline", "Find a message", "Dead messages", "Dead letters", "Proof"]
    assert order == ["Skip to the content", *links, "what", "Find"]
    page.run("document.getElementById('what').focus()")
    page.type(str(outbox_id))
    page.press("Enter")
    shows(page, "partition ")
    life = page.run("document.getElementById('message').innerText")
    for words in (
        "created in the outbox",
        "as attempt 0",
        "offset 0",
        "stored and marked consumed",
        "row 1 of history",
    ):
        assert words in life
    assert PAYLOAD["message_content"] in life
    assert page.run(FOCUSED) == "message"
    assert page.run("location.hash") == f"#message/{outbox_id}"

    page.run("document.getElementById('what').select()")
    page.run("document.getElementById('what').focus()")
    page.type("chat-1")
    page.press("Enter")
    shows(page, "Messages with the key")
    shows(page, "History of the conversation")
    links = page.run("[...document.querySelectorAll('#found tbody a')].map((e) => e.textContent)")
    assert links == [f"#{outbox_id}"] * 2
    outbox.connection.execute("delete from agent_outbox_messages")
    name = str(TABLES.outbox)
    outbox.connection.execute("insert into outbox_connector_pruned values (%s, %s)", [name, outbox_id])
    page.click("#found tbody a")
    shows(page, f"prune has removed settled rows up to #{outbox_id}")
    assert "row 1 of history" in page.run("document.getElementById('message').innerText")
    assert page.complaints == []
    assert {urlsplit(url).netloc for url in page.requested if url.startswith("http")} == {f"127.0.0.1:{console.port}"}


def test_hostile_rows_and_letters_are_text_and_nothing_else(
    outbox: OutboxTable, kafka: Kafka, topic: str, console: Console, page: Chromium
) -> None:
    """Markup, scripts and characters that turn text around, in keys, kinds, errors and payloads, are only shown."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0})
    write_letter(producer, HOSTILE, HOSTILE.encode(), HOSTILE, f"{topic}.dead", dead_letter_offset=HOSTILE)
    outbox_id = outbox.new(
        HOSTILE[:120], HOSTILE[:100], {"text": HOSTILE}, status="dead", last_error=HOSTILE, biz_type=HOSTILE[:60]
    )
    page.open(f"{console.url}/#message/{outbox_id}")
    shows(page, "given up: dead")
    shows(page, "1 dead messages")
    shows(page, "No copy is in Kafka")
    is_drawn(page)
    page.click("#dead-groups button.plain")
    page.wait_for("document.querySelectorAll('#dead-groups table table').length === 1")
    page.click("#letters-read")
    shows(page, "Looked at all 1 letters")
    page.click("#letters-groups button.plain")
    page.wait_for("document.querySelectorAll('#letters-groups table table').length === 1")
    assert page.run("document.querySelector('#letters-groups').innerText.split('onerror=').length") == 6
    page.click("#dead-groups button.danger")
    page.wait_for("document.getElementById('redrive').open")
    assert page.run("document.title") == "Outbox connector"
    assert page.run("document.querySelectorAll('img, main script, body > script').length") == 0
    assert "onerror=" in page.text()
    assert "\\u202e" in page.text()
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in page.text()
    assert page.complaints == []
    # Not even the page's own script could turn text into markup.
    refused = page.run("(() => { try { document.body.innerHTML = '<b>x</b>'; return false } catch { return true } })()")
    assert refused is True
    inline = "new Promise((done) => { const s = document.createElement('style'); s.textContent = 'main{display:none}';"
    inline += " document.head.append(s); done(getComputedStyle(document.querySelector('main')).display); })"
    assert page.run(inline) == "grid"


def test_dead_messages_are_put_back_after_a_confirmation_with_the_token(
    outbox: OutboxTable, console: Console, page: Chromium
) -> None:
    """A group is redriven only once its messages were shown, and with the right token; a wrong one is told."""
    ids = [outbox.new(f"key-{n}", status="dead", last_error=f"row {n} is bad") for n in range(3)]
    other = outbox.new(status="dead", last_error="other")
    page.open(console.url)
    shows(page, "4 dead messages")
    is_drawn(page)
    page.click("#dead-groups button.danger")
    page.wait_for("document.getElementById('redrive').open")
    shows(page, "3 messages will be put back")
    assert page.run("document.querySelectorAll('#redrive-rows li').length") == 3
    assert page.run(FOCUSED) == "redrive-reason"
    page.type("mended")
    page.press("Tab")
    page.type("wrong")
    page.press("Enter")
    shows(page, "that is not the token")
    assert all(outbox.status(outbox_id) == "dead" for outbox_id in ids)
    page.press("Escape")
    page.wait_for("!document.getElementById('redrive').open")

    page.click("#dead-groups button.danger")
    page.wait_for("document.getElementById('redrive').open")
    page.run("document.getElementById('redrive-token').select()")
    page.run("document.getElementById('redrive-token').focus()")
    page.type(TOKEN)
    page.click("#redrive-do")
    shows(page, "3 put back.")
    shows(page, "1 dead messages")
    assert [outbox.status(outbox_id) for outbox_id in [*ids, other]] == ["pending"] * 3 + ["dead"]
    outbox.change(ids[1], "last_error = 'bad again'")
    page.open(f"{console.url}/#message/{ids[1]}")
    shows(page, "put back from dead")
    life = page.run("[...document.querySelectorAll('.life li')].map((e) => e.innerText)")
    assert ["created" in life[0], "row 1 is bad" in life[1], "mended" in life[2], len(life)] == [True, True, True, 3]
    assert "bad again" in page.text()
    # A refused token is an answer like others; the browser notes it all the same.
    assert [text for text in page.complaints if "401" not in text] == []
    assert page.run("JSON.stringify([Object.keys(localStorage), Object.keys(sessionStorage), document.cookie])") == (
        '[[],[],""]'
    )


def test_dead_letters_are_read_on_request_and_put_back_after_the_same_confirmation(
    outbox: OutboxTable, kafka: Kafka, topic: str, console: Console, page: Chromium
) -> None:
    """Nothing is read before the button is pressed; all letters, or a group, go back once, with the token."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0})
    for number in range(3):
        write_letter(producer, topic, b"{" * number, f"not JSON, char {number}")
    write_letter(producer, topic, b"{}", "no `outbox_id`")
    page.open(console.url)
    is_drawn(page)
    assert not [url for url in page.requested if "letters" in url and not url.endswith(".js")]
    page.click("#letters-read")
    shows(page, "Looked at all 4 letters")
    page.click("#letters-groups tbody button.danger")
    page.wait_for("document.getElementById('redrive').open")
    shows(page, "3 letters will be put back")
    assert page.run("document.querySelectorAll('#redrive-rows li').length") == 3
    page.type("a new sink")
    page.press("Tab")
    page.type(TOKEN)
    page.press("Enter")
    shows(page, "3 put back.")
    page.press("Escape")
    shows(page, "3 were sent back before.")
    page.click("#letters-groups > p button.danger")
    shows(page, "1 letter will be put back")
    page.click("#redrive-do")
    shows(page, "1 put back.")
    page.wait_for("document.querySelectorAll('#letters-groups button.danger').length === 0")
    assert page.complaints == []


def test_without_a_token_set_nothing_offers_a_change(outbox: OutboxTable, connector: Start, page: Chromium) -> None:
    """A console that is read-only says so, and shows no button that would change anything."""
    outbox_id = outbox.new(status="dead", last_error="bad")
    page.open(f"{Console(connector('console')).url}/#message/{outbox_id}")
    shows(page, "read-only")
    shows(page, "given up: dead")
    shows(page, "1 dead messages")
    assert page.run("[...document.querySelectorAll('.danger')].some((e) => e.getClientRects().length)") is False


def test_the_page_says_that_the_console_is_away_and_goes_on_once_it_is_back(
    outbox: OutboxTable, connector: Start, console: Console, page: Chromium
) -> None:
    """While the console is stopped the page says since when; it needs no reload when another one takes its place."""
    page.open(console.url)
    page.wait_for("document.querySelectorAll('#stages li').length === 6")
    assert page.run("document.getElementById('problems').hidden") is True
    assert console.process.stop() == 0
    page.wait_for("document.getElementById('problems').textContent.includes('does not answer')")
    assert page.run("document.getElementById('problems').getAttribute('aria-live')") == "polite"
    Console(connector("console", CONNECTOR_HTTP_PORT=str(console.port)))
    page.wait_for("document.getElementById('problems').hidden", within=30)
    shows(page, "read-only")


def test_everybody_can_read_it(outbox: OutboxTable, kafka: Kafka, topic: str, console: Console, page: Chromium) -> None:
    """In light and dark, on a telephone too: contrast, names, labels, headings, and nothing wider than the screen."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0})
    write_letter(producer, topic, b"x" * 300, "not JSON")
    outbox.new(status="published")
    outbox.in_retry()
    outbox_id = outbox.new(status="dead", last_error="x" * 300)
    found = Verdict(1.5, "3 messages", 1, {"differing": 1}, [Unproved(outbox_id, HOSTILE)])
    record_proof(outbox.connection, TABLES, "reconcile", "somebody@here", found)
    page.open(f"{console.url}/#message/{outbox_id}")
    shows(page, "given up: dead")
    shows(page, "1 dead messages")
    is_drawn(page)
    page.click("#prove")
    shows(page, "By this console: outbox and history agree")
    shows(page, "Not proved by reconcile: 1 messages do not agree (1 differing).")
    assert page.run("document.querySelector('#proof-shown li a').textContent") == f"#{outbox_id}"
    page.click("#letters-read")
    shows(page, "Looked at all 1 letters")
    page.click("#letters-groups button.plain")
    page.click("#message .danger")
    page.wait_for("document.getElementById('redrive').open")
    for scheme in ("light", "dark"):
        page.prefer(color_scheme=scheme, reduced_motion="reduce")
        for width in (1280, 360):
            page.resize(width, 800)
            assert page.run(ACCESSIBILITY) == []
    assert page.run("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    assert page.complaints == []


def test_every_view_is_there_as_soon_over_many_rows(outbox: OutboxTable, console: Console, page: Chromium) -> None:
    """With 200,000 messages, 5,000 of them dead, the page, a message, a key, the dead and the proof take no longer."""

    def write(messages: range) -> None:
        outbox.connection.execute(
            f"""
            insert into agent_outbox_messages
              (biz_type, topic, message_key, payload, status, last_error, published_at, consumed_at)
            select 'chat_history_persist', 'topic', 'chat-' || n % 1000,
              jsonb_build_object('message_content', repeat('x', 300)),
              case when n % 40 = 0 then 'dead' else 'consumed' end,
              case when n % 40 = 0 then 'no such conversation' end, now(), case when n % 40 > 0 then now() end
            from generate_series({messages[0]}, {messages[-1]}) as n
            """
        )
        outbox.connection.execute("analyze")

    def drawn(where: str, script: str) -> float:
        page.open("about:blank")
        began = time.monotonic()
        page.open(f"{console.url}/{where}")
        page.wait_for(script, within=30)
        return time.monotonic() - began

    def answered(path: str) -> float:
        began = time.monotonic()
        assert console.ask(path).status == 200
        return time.monotonic() - began

    def fastest(message: int, dead: str) -> list[float]:
        told = "document.getElementById('message').innerText.includes('stored and marked consumed')"
        views = {
            "": "document.querySelectorAll('#stages li').length === 6",
            f"#message/{message}": told,
            "#dead": f"document.body.innerText.includes('{dead} dead messages')",
        }
        paths = ("/api/pipeline", "/api/messages?key=chat-7", f"/api/messages/{message}", "/api/dead", "/api/proof")
        return [min(drawn(where, script) for _ in range(3)) for where, script in views.items()] + [
            min(answered(path) for _ in range(3)) for path in paths
        ]

    console.now()
    write(range(1, 81))
    over_few = fastest(41, "2")
    write(range(81, 200_001))
    over_many = fastest(123_456, "5,000")
    assert all(many < 3 * few + 1 for few, many in zip(over_few, over_many, strict=True)), (over_few, over_many)
    files = {url for url in page.requested if url.startswith(console.url) and "/api/" not in url}
    assert sum(len(console.ask(url.removeprefix(console.url)).text) for url in files) < 100_000
