"""A message that carries a trace context is seen in its trace: spans to a real collector, and names in the logs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from secrets import token_hex
from typing import Any

import psycopg
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.integration.scenario import OUTBOX, Tap, one, set_up
from tests.services import Database, Kafka, Process, eventually

Start = Callable[..., Process]

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Collector:
    """Takes spans by OTLP over HTTP, as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        spans: list[tuple[str, Span]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                for resource in request.resource_spans:
                    (service,) = [
                        attribute.value.string_value
                        for attribute in resource.resource.attributes
                        if attribute.key == "service.name"
                    ]
                    spans.extend((service, span) for scope in resource.scope_spans for span in scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.spans = spans
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def variables(self) -> dict[str, str]:
        """What a process is told of it."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector that listens."""
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def connection(connector_env: dict[str, str], database: Database) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """A pipeline that is set up, by its database."""
    set_up(connector_env)
    with database.connect() as connection:
        yield connection


def enqueue(
    connection: psycopg.Connection[tuple[Any, ...]], topic: str, headers: dict[str, str] | None, **payload: Any
) -> int:
    """Enqueue a message with these headers, and no more than two attempts; return its id."""
    document = {"user_id": 7, "chat_id": "chat", "message_content": "hello", **payload}
    return int(
        one(
            connection,
            "select outbox_enqueue('chat_history_persist', %s, 'a key', %s::jsonb, 2, %s::jsonb)",
            [topic, json.dumps(document), None if headers is None else json.dumps(headers)],
        )
    )


def attributes(span: Span) -> dict[str, object]:
    """Return a span's attributes as Python has them."""
    return {a.key: getattr(a.value, a.value.WhichOneof("value") or "") for a in span.attributes}


def test_a_traced_message_has_a_span_for_its_publishing_and_one_for_each_attempt_to_store_it(
    connection: psycopg.Connection[tuple[Any, ...]], kafka: Kafka, topic: str, connector: Start, collector: Collector
) -> None:
    """Both are children of the application's span; what fails says so; headers travel as they are; others have none."""
    plain = enqueue(connection, topic, None)
    good = enqueue(connection, topic, {"traceparent": TRACEPARENT, "tracestate": "vendor=1"})
    bad = enqueue(connection, topic, {"traceparent": TRACEPARENT}, chat_id="x" * 40)
    enqueue(connection, topic, {"traceparent": "no trace context", "other": "header"})
    reader = connector("reader", **collector.variables)
    sink = connector("sink", **collector.variables, OTEL_SERVICE_NAME="ours")
    eventually(
        lambda: one(connection, f"select bool_and(status in ('consumed', 'dead')) from {OUTBOX}"),
        within=40,
        what="the settling of every message",
    )
    assert reader.stop() == 0
    assert sink.stop() == 0

    seen = [(service, span, attributes(span)) for service, span in collector.spans]
    assert {(span.trace_id.hex(), span.parent_span_id.hex()) for _, span, _ in seen} == {(TRACE, PARENT)}
    assert {a["messaging.message.id"] for _, _, a in seen} == {str(good), str(bad)}
    assert {a["messaging.kafka.message.key"] for _, _, a in seen} == {"a key"}

    published = [(span, a) for service, span, a in seen if service == "outbox-connector-reader"]
    assert {(span.name, span.kind) for span, _ in published} == {(f"publish {topic}", Span.SPAN_KIND_PRODUCER)}
    assert sorted(str(a["messaging.message.id"]) for _, a in published) == sorted(map(str, [good, bad, bad]))
    (own,) = [a for _, a in published if a["messaging.message.id"] == str(good)]
    with Tap(kafka, topic) as tap:
        sent = {message.outbox_id: message for message in tap.has([plain, good, bad])}
    assert (own["messaging.destination.partition.id"], own["messaging.kafka.offset"]) == (
        str(sent[good].partition),
        sent[good].offset,
    )
    assert dict(sent[good].headers) == {"traceparent": TRACEPARENT.encode(), "tracestate": b"vendor=1"}

    processed = [(span, a) for service, span, a in seen if service == "ours"]
    assert {(span.name, span.kind) for span, _ in processed} == {(f"process {topic}", Span.SPAN_KIND_CONSUMER)}
    (stored,) = [(span, a) for span, a in processed if a["messaging.message.id"] == str(good)]
    assert stored[1]["outbox.outcome"] == "stored"
    assert stored[0].status.code == Status.STATUS_CODE_UNSET
    assert 0 < stored[0].start_time_unix_nano < stored[0].end_time_unix_nano
    failed = [(span, a) for span, a in processed if a["messaging.message.id"] == str(bad)]
    assert [a["error.type"] for _, a in failed] == ["refused_by_database"] * 2
    assert {span.status.code for span, _ in failed} == {Status.STATUS_CODE_ERROR}
    assert all("too long" in span.status.message for span, _ in failed)

    for event in ("retry_scheduled", "message_dead"):
        line = sink.wait_for_log(event)
        assert (line["outbox_id"], line["key"], line["trace_id"]) == (bad, "a key", TRACE)


def test_a_message_that_kafka_refuses_is_named_in_the_readers_log_and_its_span_says_so(
    connection: psycopg.Connection[tuple[Any, ...]],
    complete_kafka: Kafka,
    connector: Start,
    collector: Collector,
) -> None:
    """The event carries outbox id, key and trace, whether librdkafka refuses the message at once or Kafka later.

    Without a trace context there is no trace, and no null either.
    """
    with complete_kafka.topic(config={"max.message.bytes": "2000"}) as narrow:
        large = enqueue(connection, narrow, {"traceparent": TRACEPARENT}, message_content=token_hex(5_000))
        traced = enqueue(connection, "no such topic!", {"traceparent": TRACEPARENT})
        plain = enqueue(connection, "nor this one!", None)
        reader = connector("reader", **collector.variables)
        for refused in (large, traced):
            line = reader.wait_for_log("message_dead", outbox_id=refused)
            assert (line["key"], line["trace_id"]) == ("a key", TRACE)
        line = reader.wait_for_log("message_dead", outbox_id=plain)
    assert line["key"] == "a key"
    assert "trace_id" not in line
    assert reader.stop() == 0
    assert {span.status.code for _, span in collector.spans} == {Status.STATUS_CODE_ERROR}
    assert {attributes(span)["messaging.message.id"] for _, span in collector.spans} == {str(large), str(traced)}


def test_a_collector_that_is_away_keeps_nobody_from_working_or_stopping(
    connection: psycopg.Connection[tuple[Any, ...]], topic: str, connector: Start, collector: Collector
) -> None:
    """Spans are dropped; messages are stored, and the processes end with 0."""
    collector.close()
    reader = connector("reader", **collector.variables)
    sink = connector("sink", **collector.variables)
    enqueue(connection, topic, {"traceparent": TRACEPARENT})
    eventually(
        lambda: one(connection, f"select bool_and(status = 'consumed') from {OUTBOX}"),
        within=40,
        what="the storing of the message",
    )
    assert reader.stop(20) == 0
    assert sink.stop(20) == 0


def test_nothing_of_opentelemetry_is_imported_while_tracing_is_off() -> None:
    """Without its variables, or turned off by them, it costs no import."""
    away = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    off = [
        {},
        {"OTEL_SERVICE_NAME": "x"},
        {**away, "OTEL_TRACES_EXPORTER": "none"},
        {**away, "OTEL_SDK_DISABLED": "true"},
    ]
    program = (
        "import sys, connector.cli, connector.reader, connector.sink, connector.observability.tracing as t;"
        f"print([t.tracing('reader', variables) for variables in {off!r}],"
        " [name for name in sys.modules if 'opentelemetry' in name])"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout == "[None, None, None, None] []\n"


def test_an_exporter_that_is_not_installed_is_a_configuration_error(connector: Start) -> None:
    """The variable is named, and the exit code is 78."""
    sink = connector("sink", OTEL_TRACES_EXPORTER="jaeger")
    assert sink.wait(30) == 78
    assert "OTEL_TRACES_EXPORTER" in sink.stderr.splitlines()[-1]
