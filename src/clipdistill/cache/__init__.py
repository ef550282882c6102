"""Teacher embeddings on disk: computed once, fingerprinted, read by any number of runs (docs/cache.md).

The package can be called: `clipdistill.cache(...)` is the function in api.py.
"""

from clipdistill.registry import callable_package

callable_package(__name__, "clipdistill.api:cache")
