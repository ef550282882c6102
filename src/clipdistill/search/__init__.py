"""Search in a folder of photographs by text or image, the student beside its teacher (`clipdistill search`)."""

HIDDEN = ".clipdistill-search"
"""Name of the index inside the folder of photographs."""
KINDS = ("exact", "faiss", "usearch")
"""Kinds of index: how the nearest vectors are found."""
