"""A model as a service: embeddings and zero-shot classification over HTTP, requests answered in common batches.

The package can be called: `clipdistill.serve(...)` is the function in ask.py.
"""

from clipdistill.registry import callable_package

callable_package(__name__, "clipdistill.serve.ask:serve")
