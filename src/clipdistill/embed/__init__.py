"""Pictures and captions to embeddings: the one encoder and the workers that prepare for it.

The package can be called: `clipdistill.embed(...)` is the function in api.py.
"""

from clipdistill.registry import callable_package

callable_package(__name__, "clipdistill.api:embed")
