"""Measuring what a model costs: throughput, latency, memory, size."""

from clipdistill.bench import exported as _exported  # noqa: F401  (registers its back ends)
