"""The vectors of an index in a file or table that other programs read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clipdistill.search.collection import Collection
from clipdistill.vectors.files import Part, write_embeddings

_PART = 8192


def write_vectors(collection: Collection, path: Path) -> int:
    """Write the student's vectors, in the order of the photographs' names; returns how many.

    Each row has the "key" (the path below the folder) and the "sha256" of its file. The ending of `path` decides, as in
    `clipdistill embed`; Parquet and LanceDB also keep the fingerprint of the model.
    """
    side = collection.sides[0]
    entries = [side.index.entries[name] for name in sorted(side.index.entries)]

    def parts() -> Iterator[Part]:
        for start in range(0, len(entries), _PART):
            chosen = entries[start : start + _PART]
            rows = np.stack([side.index.vector(entry.row) for entry in chosen])
            yield rows, [{"key": entry.path, "sha256": entry.sha256} for entry in chosen]

    about = {"clipdistill.model": str(side.model.fingerprint)}
    write_embeddings(path, len(entries), side.index.dimension, parts(), about)
    return len(entries)
