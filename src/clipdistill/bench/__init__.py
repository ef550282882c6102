"""Measuring what a model costs: throughput, latency, memory, size.

The package can be called: `clipdistill.bench(...)` is the function in measure.py.
"""

from clipdistill.registry import callable_package

callable_package(__name__, "clipdistill.bench.measure:bench")
