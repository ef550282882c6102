"""Search in a folder of photographs by text or image, the student beside its teacher (`clipdistill search`).

The package can be called: `clipdistill.search(...)` is the function in ask.py.
"""

from clipdistill.registry import callable_package

HIDDEN = ".clipdistill-search"
"""Name of the index inside the folder of photographs."""
KINDS = ("exact", "faiss", "usearch")
"""Kinds of index: how the nearest vectors are found."""

callable_package(__name__, "clipdistill.search.ask:search")
