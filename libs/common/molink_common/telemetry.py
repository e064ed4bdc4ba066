"""Traces: OpenTelemetry over OTLP/HTTP, off without a configured endpoint.

A request is one trace: the gateway's span is its root, and every stage adds a span for each step of a sampled
sequence. The context travels as a W3C ``traceparent`` in `SubmitSequence`, `StartSequence` and in the frames
of sampled sequences only.
"""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from molink_common import __version__

_PROPAGATOR = TraceContextTextMapPropagator()

AttributeValue = str | int | float | bool


class Telemetry:
    """Makes spans, or does nothing at no cost when tracing is off."""

    def __init__(self, provider: TracerProvider | None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("molink", __version__) if provider else None

    @property
    def is_on(self) -> bool:
        """Whether anything is exported."""
        return self._tracer is not None

    def start_request(
        self, name: str, *, parent: str | None, attributes: Mapping[str, AttributeValue]
    ) -> trace.Span | None:
        """The root span of a request, or a child of the client's own `parent` (``traceparent``)."""
        if self._tracer is None:
            return None
        context = _PROPAGATOR.extract({"traceparent": parent}) if parent else None
        return self._tracer.start_span(name, context=context, kind=trace.SpanKind.SERVER, attributes=dict(attributes))

    def record(
        self, name: str, *, parent: str, start_ns: int, end_ns: int, attributes: Mapping[str, AttributeValue]
    ) -> None:
        """A span that has happened already, under `parent`. Times are nanoseconds since 1970."""
        if self._tracer is None:
            return
        span = self._tracer.start_span(
            name,
            context=_PROPAGATOR.extract({"traceparent": parent}),
            start_time=start_ns,
            attributes=dict(attributes),
        )
        span.end(end_time=end_ns)

    def close(self) -> None:
        """Export what is left; waits at most five seconds."""
        if self._provider is not None:
            self._provider.force_flush(timeout_millis=5000)
            self._provider.shutdown()


def traceparent(span: trace.Span | None) -> str | None:
    """The span's context for a message, or None when it is not sampled."""
    if span is None or not span.get_span_context().trace_flags.sampled:
        return None
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context=trace.set_span_in_context(span))
    return carrier.get("traceparent")


def open_telemetry(*, service: str, instance: str, endpoint: str | None, trace_share: float) -> Telemetry:
    """Tracing to `endpoint` (the collector's base URL), or off when there is none."""
    if endpoint is None:
        return Telemetry(None)
    provider = TracerProvider(
        resource=Resource.create(
            {
                "service.name": f"molink-{service}",
                "service.instance.id": instance,
                "service.version": __version__,
            }
        ),
        sampler=ParentBased(TraceIdRatioBased(trace_share)),
    )
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=8192))
    return Telemetry(provider)
