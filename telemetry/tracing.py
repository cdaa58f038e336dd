"""Traces by OpenTelemetry: one trace of a request, its job and the phases of its engine, over all processes.

Off until `start`: then every function here does nothing, and the SDK is not imported. Where the spans go is said by
OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER and so on). A span holds ids, names and
numbers; never the text of an error, a query or a set.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import Span as RecordedSpan
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.trace import Span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

TRACEPARENT = "traceparent"
EXIT_SECONDS = 2.0
"""What a process that ends waits for its last spans to be taken."""
_provider: TracerProvider | None = None


class TracingError(Exception):
    """Tracing was asked for and cannot be had."""


def start(service: str) -> None:
    """Send spans from this process, as `service` unless OTEL_SERVICE_NAME says otherwise. Once a process.

    After a fork, never before: the thread that sends does not cross one. TracingError without the library.
    """
    global _provider
    if _provider is not None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingError(
            "SEUF_TRACING is on, but OpenTelemetry's SDK is not installed. Install seuf[tracing], or unset it."
        ) from error
    named = {"service.version": version("seuf")}
    if not os.environ.get("OTEL_SERVICE_NAME"):
        named["service.name"] = service
    _provider = TracerProvider(
        resource=Resource.create(named), shutdown_on_exit=False
    )  # it would wait for half a minute
    atexit.register(finish, EXIT_SECONDS)
    _provider.add_span_processor(_without_query())
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))


def _without_query() -> SpanProcessor:
    from opentelemetry.sdk.trace import SpanProcessor

    class WithoutQuery(SpanProcessor):
        """A query may hold what a customer wrote; FastAPI puts it into the span of the request."""

        def on_start(self, span: RecordedSpan, parent_context: Context | None = None) -> None:  # noqa: ARG002
            if "url.query" in (span.attributes or {}):
                span.set_attribute("url.query", "REDACTED")

    return WithoutQuery()


def _propagator() -> TraceContextTextMapPropagator:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()


def provider() -> TracerProvider | None:
    """What makes this process's spans; None when tracing is off."""
    return _provider


def current() -> str | None:
    """The span that is open now as a W3C traceparent, for another process to go on from; None when there is none."""
    if _provider is None:
        return None
    carrier: dict[str, str] = {}
    _propagator().inject(carrier)
    return carrier.get(TRACEPARENT)


@contextmanager
def span(
    name: str, parent: str | None = None, attributes: Mapping[str, str | int] | None = None
) -> Iterator[None]:
    """A span around the block, below `parent` (a traceparent) or below the one that is open.

    It ends as an error when the block raises.
    """
    if _provider is None:
        yield
        return
    from opentelemetry.trace import StatusCode

    above = _propagator().extract({TRACEPARENT: parent}) if parent else None
    with _provider.get_tracer("seuf").start_as_current_span(
        name, above, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as opened:
        try:
            yield
        except BaseException as error:
            opened.set_attribute("error.type", type(error).__qualname__)
            opened.set_status(StatusCode.ERROR)
            raise


class Spans:
    """Spans one after the other below `parent`, for what has no block: the next one ends the one before."""

    def __init__(self, parent: str | None) -> None:
        self._parent = parent
        self._open: Span | None = None

    def begin(self, name: str) -> None:
        """The next one."""
        self.end()
        if _provider is not None:
            above = _propagator().extract({TRACEPARENT: self._parent}) if self._parent else None
            self._open = _provider.get_tracer("seuf").start_span(name, above)

    def end(self) -> None:
        """No next one, for now."""
        if self._open is not None:
            self._open.end()
            self._open = None


def finish(seconds: float) -> None:
    """Send what is left, for at most so long: a collector that is away holds nobody up."""
    if _provider is not None:
        sending = threading.Thread(target=_provider.shutdown, daemon=True)
        sending.start()
        sending.join(seconds)
