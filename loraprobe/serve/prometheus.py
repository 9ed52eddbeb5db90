"""What Prometheus is told. No label comes from a client.

Routes, error types and probe names are ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtra

if TYPE_CHECKING:
    from .results import Result

_SECONDS = (0.0005, *(step * 10**power for power in range(-3, 1) for step in (1, 2.5, 5)), 10, 30)
_BYTES = tuple(float(4**power) for power in range(5, 16))  # 1 KiB to 1 GiB


class Metrics:
    """The counters of one service, in a registry of its own.

    Attributes:
        in_flight: requests being answered now; whoever answers one counts it here.

    Raises:
        MissingExtra: prometheus_client is not installed.
    """

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError:
            raise MissingExtra("prometheus-client", "serve", "The scoring service") from None

        self.registry = registry = prometheus.CollectorRegistry()
        self.media_type: str = prometheus.CONTENT_TYPE_LATEST
        self._latest: Any = prometheus.generate_latest
        requests = prometheus.Counter(
            "loraprobe_requests", "Requests answered.", ("route", "status"), registry=registry
        )
        errors = prometheus.Counter(
            "loraprobe_errors",
            "Requests refused, by the type of the error.",
            ("type",),
            registry=registry,
        )
        verdicts = prometheus.Counter(
            "loraprobe_verdicts", "Verdicts given.", ("probe", "verdict"), registry=registry
        )
        self.in_flight = 0
        prometheus.Gauge(
            "loraprobe_in_flight", "Requests being answered now.", registry=registry
        ).set_function(lambda: self.in_flight)
        self._scoring_seconds = prometheus.Histogram(
            "loraprobe_scoring_seconds",
            "From a complete body to its scores.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._body_bytes = prometheus.Histogram(
            "loraprobe_body_bytes",
            "Bytes of the bodies that came in whole.",
            buckets=_BYTES,
            registry=registry,
        )
        self.held_bytes = prometheus.Gauge(
            "loraprobe_held_bytes", "Bytes of bodies in memory now.", registry=registry
        )
        prometheus.ProcessCollector(registry=registry)
        # Looked up once per combination, of which there are few: `labels` takes longer than
        # counting.
        self._requests = cache(lambda route, status: requests.labels(route, str(status)))
        self._errors = cache(errors.labels)
        self._verdicts = cache(verdicts.labels)

    def count_request(self, route: str, status: int, error: str | None = None) -> None:
        """One request that was answered, and the type of its error if it was refused."""
        self._requests(route, status).inc()
        if error is not None:
            self._errors(error).inc()

    def count_scored(self, size: int, seconds: float, results: Iterable[Result]) -> None:
        """One body: its bytes, how long it took to score, and the verdicts."""
        self._body_bytes.observe(size)
        self._scoring_seconds.observe(seconds)
        for result in results:
            self._verdicts(result.probe, result.verdict).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        shown: bytes = self._latest(self.registry)
        return shown
