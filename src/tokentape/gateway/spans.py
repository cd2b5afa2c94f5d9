"""A turn as OpenTelemetry spans, where an SDK is set up: `opentelemetry-instrument tokentape serve …`.

Without one, or without the package, this costs a look and records nothing.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

try:
    from opentelemetry import context, trace
except ImportError:  # the extra `otel`
    context = trace = None


def here() -> Any:
    """The context that a turn's span belongs to: the request's, where the HTTP server is instrumented."""
    return None if context is None else context.get_current()


def record(
    where: Any,
    stages: Sequence[tuple[str, float, float]],
    attributes: Mapping[str, Any],
    error: Exception | None = None,
) -> None:
    """Record a span for the first of the `stages`, and one inside it for each of the others.

    A stage has a name, its beginning and its end on `time.monotonic()`; spans have wall-clock times.
    """
    if trace is None or isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return
    behind = time.time() - time.monotonic()

    def ns(at: float) -> int:
        return int(1e9 * (at + behind))

    tracer = trace.get_tracer("tokentape")
    (name, began, ended), *inner = stages
    given = {f"tokentape.{key}": value for key, value in attributes.items() if value is not None}
    whole = tracer.start_span(name, where, start_time=ns(began), attributes=given)
    if error is not None:
        whole.set_status(trace.StatusCode.ERROR, f"{type(error).__name__}: {error}")
    inside = trace.set_span_in_context(whole, where)
    for part, start, end in inner:
        tracer.start_span(part, inside, start_time=ns(start)).end(ns(end))
    whole.end(ns(ended))
