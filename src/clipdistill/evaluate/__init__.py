"""Retrieval, zero-shot classification, geometry, protocols and statistics of models and their scores.

The package can be called: `clipdistill.evaluate(model, data, ...)` is the function in evaluate.py.
"""

from clipdistill.registry import callable_package

callable_package(__name__, "clipdistill.evaluate.evaluate:evaluate")
