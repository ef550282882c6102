"""Linear and few-shot probes: what a classifier on a model's picture embeddings reaches.

The package can be called: `clipdistill.probe(...)` is the function in linear.py.
"""

from clipdistill.registry import callable_package

callable_package(__name__, "clipdistill.probe.linear:probe")
