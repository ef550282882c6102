"""What the service counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ServiceMetrics:
    """Counters of one service, in a registry of their own. Labels have few values, whatever is sent."""

    def __init__(self, waiting: dict[str, Callable[[], float]]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "clipdistill_requests", "requests answered", ["path", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "clipdistill_request_seconds", "from the headers to the answer", ["path"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._rows = Histogram(
            "clipdistill_batch_rows", "rows of a batch", ["tower"], buckets=_ROWS, registry=self.registry
        )
        self._batches = Histogram(
            "clipdistill_batch_seconds", "of a tower for a batch", ["tower"], buckets=_SECONDS, registry=self.registry
        )
        gauge = Gauge("clipdistill_waiting", "pictures or texts on their way", ["tower"], registry=self.registry)
        for tower, count in waiting.items():
            gauge.labels(tower).set_function(count)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, tower: str) -> Callable[[int, float], None]:
        """What counts the batches of a tower."""
        rows, seconds = self._rows.labels(tower), self._batches.labels(tower)

        def count(number: int, took: float) -> None:
            rows.observe(number)
            seconds.observe(took)

        return count

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)
