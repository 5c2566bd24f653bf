"""Spans of what becomes of a message, for messages that carry a trace context in their headers.

On where OpenTelemetry is installed (the extra `tracing`) and configured by its own OTEL_ variables; otherwise nothing
of it is imported, and nothing is done for any message. Names and attributes follow OpenTelemetry's semantic conventions
for messaging; what travels in the headers is never changed.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final

from connector.errors import ConfigurationError
from connector.observability.logs import get_logger

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanKind

Headers = Iterable[tuple[str, str | bytes | None]]

_FLUSH_SECONDS: Final = 1.5
_ON: Final = ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_OTLP: Final = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")

_log = get_logger("tracing")


def trace_id(headers: Headers) -> str | None:
    """Return the trace that a message belongs to, by its `traceparent`, or None."""
    for name, value in headers:
        if name == "traceparent" and value is not None:
            found = _TRACEPARENT.fullmatch(_text(value).strip())
            return found[1] if found else None
    return None


def named(key: str, headers: Headers) -> dict[str, str]:
    """Return the fields by which a log event names its message, beside the outbox id."""
    trace = trace_id(headers)
    return {"key": key} if trace is None else {"key": key, "trace_id": trace}


@dataclass(frozen=True, slots=True)
class Subject:
    """The message that a span is about."""

    outbox_id: int
    topic: str
    key: str
    headers: Headers
    partition: int | None = None
    offset: int | None = None


class OpenSpans:
    """Spans of messages that were handed to Kafka together, until it has answered for each."""

    __slots__ = ("_spans", "_tracing")

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._spans: dict[int, Span] = {}

    def begin(self, subject: Subject) -> None:
        """Begin the span of a message, if it belongs to a trace."""
        span = self._tracing.publishing(subject)
        if span is not None:
            self._spans[subject.outbox_id] = span

    def end(self, outbox_id: int | None, partition: int | None, offset: int | None) -> None:
        """End it: Kafka has the message."""
        span = self._spans.pop(outbox_id or 0, None)
        if span is not None:
            self._tracing.published(span, partition, offset)

    def fail(self, outbox_id: int | None, reason: str, error: str) -> None:
        """End it: Kafka has refused the message."""
        span = self._spans.pop(outbox_id or 0, None)
        if span is not None:
            self._tracing.end_with_error(span, reason, error)


class Tracing:
    """Makes spans, and sends them in the background."""

    def __init__(self, provider: TracerProvider) -> None:
        """Use a provider with its exporter."""
        from opentelemetry import propagate, trace  # noqa: PLC0415 - nothing of it is imported while tracing is off

        self._provider = provider
        self._tracer = provider.get_tracer("outbox-connector")
        self._trace = trace
        self._extract = propagate.extract

    def publishing(self, subject: Subject) -> Span | None:
        """Begin the span of a message that is handed to Kafka; None where it belongs to no trace."""
        return self._begin("publish", "send", self._trace.SpanKind.PRODUCER, subject)

    def published(self, span: Span, partition: int | None, offset: int | None) -> None:
        """End it: Kafka has the message."""
        if partition is not None and offset is not None:
            span.set_attributes(_place(partition, offset))
        span.end()

    def processed(self, subject: Subject, began: int, group: str, outcome: str) -> None:
        """Record that the sink has settled a message: `began` in nanoseconds since 1970, and what became of it."""
        span = self._begin("process", "process", self._trace.SpanKind.CONSUMER, subject, began)
        if span is not None:
            span.set_attributes({"messaging.consumer.group.name": group, "outbox.outcome": outcome})
            span.end()

    def failed(self, subject: Subject, began: int, group: str, reason: str, error: str) -> None:
        """Record that a message could not be stored, by a short word and in full."""
        span = self._begin("process", "process", self._trace.SpanKind.CONSUMER, subject, began)
        if span is not None:
            span.set_attribute("messaging.consumer.group.name", group)
            self.end_with_error(span, reason, error)

    def end_with_error(self, span: Span, reason: str, error: str) -> None:
        """End a span of something that failed."""
        span.set_attribute("error.type", reason)
        span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, error))
        span.end()

    def _begin(
        self, operation: str, kind_of_operation: str, kind: SpanKind, subject: Subject, began: int | None = None
    ) -> Span | None:
        carrier = {name.lower(): _text(value) for name, value in subject.headers if value is not None}
        context = self._extract(carrier)
        if not self._trace.get_current_span(context).get_span_context().is_valid:
            return None
        attributes: dict[str, Any] = {
            "messaging.system": "kafka",
            "messaging.operation.name": operation,
            "messaging.operation.type": kind_of_operation,
            "messaging.destination.name": subject.topic,
            "messaging.message.id": str(subject.outbox_id),
            "messaging.kafka.message.key": subject.key,
        }
        if subject.partition is not None and subject.offset is not None:
            attributes |= _place(subject.partition, subject.offset)
        return self._tracer.start_span(
            f"{operation} {subject.topic}", context=context, kind=kind, attributes=attributes, start_time=began
        )

    def close(self) -> None:
        """Send what is left, within a moment: a collector that is away does not keep a process from ending."""
        sending = threading.Thread(target=self._provider.shutdown, name="tracing-shutdown", daemon=True)
        sending.start()
        sending.join(_FLUSH_SECONDS)
        if sending.is_alive():
            _log.warning("spans_dropped", error="the collector did not take them in time")


def tracing(role: str, environ: Mapping[str, str] = os.environ) -> Tracing | None:
    """Return what makes spans for a process in this role, or None where tracing is off.

    Raises:
        ConfigurationError: the exporter that the environment names is not installed.
    """
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    disabled = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if disabled or exporter == "none" or not any(environ.get(name, "").strip() for name in _ON):
        return None
    try:
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - only here is it known to be wanted
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        _log.warning("tracing_not_installed", error="run: pip install 'outbox-connector[tracing]'")
        return None
    name = exporter
    if exporter == "otlp":
        protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        name = _OTLP.get(protocol or "http/protobuf", "")
    found = next(iter(entry_points(group="opentelemetry_traces_exporter", name=name)), None)
    if found is None:
        raise ConfigurationError(
            [f"OTEL_TRACES_EXPORTER: exporter {name or exporter!r} is not installed; install it, or set it to none"]
        )
    service = environ.get("OTEL_SERVICE_NAME", "").strip() or f"outbox-connector-{role}"
    provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(found.load()()))
    _log.info("tracing_ready", exporter=name)
    return Tracing(provider)


def _place(partition: int, offset: int) -> dict[str, str | int]:
    return {"messaging.destination.partition.id": str(partition), "messaging.kafka.offset": offset}


def now() -> int:
    """Return the time as spans have it, in nanoseconds since 1970."""
    return time.time_ns()


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace")
