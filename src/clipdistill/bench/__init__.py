"""Measuring what a model costs: throughput, latency, memory, size."""
