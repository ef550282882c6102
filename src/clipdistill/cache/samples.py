"""The table of samples: key, place, digest and added captions of each, in the order of the data.

An uncompressed Arrow IPC file, memory-mapped: a store of ten million samples opens at once and costs no memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipdistill.cache.blocks import read_table, require_uncut, write_table
from clipdistill.data.pairs import PairSource
from clipdistill.embed.prepare import DIGEST_BYTES, sample_digest
from clipdistill.errors import InputError

_SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("row", pa.int64()),
        ("captions", pa.int32()),
        ("digest", pa.binary(DIGEST_BYTES)),
        ("synthetic", pa.large_list(pa.large_string())),
    ]
)


class SampleTable:
    """The samples of a store by data index. Picklable: another process maps the file anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read, self._map = read_table(
            path, _SCHEMA, "table of samples", "the cache cannot be used without it: fill it again"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleTable, (self.path,)

    def __len__(self) -> int:
        return int(self._read.num_rows)

    @property
    def _table(self) -> Any:
        require_uncut(self._map, self.path)
        return self._read

    def key(self, index: int) -> str:
        return str(self._table["key"][index].as_py())

    def keys(self) -> list[str]:
        """All keys in the order of the data."""
        return self._table["key"].to_pylist()

    @cached_property
    def rows(self) -> np.ndarray:
        """(N,) int64: the row of each sample in the store. Raises InputError unless each row is there once."""
        rows = self._table["row"].to_numpy().copy()  # no longer of the mapped file
        seen = np.zeros(len(rows), dtype=np.bool_)
        inside = rows[(rows >= 0) & (rows < len(rows))]
        seen[inside] = True
        if not seen.all():
            raise InputError(
                f"{self.path}: damaged: its column 'row' does not name each of the {len(rows)} rows once; "
                "`clipdistill cache verify` says what else is"
            )
        return rows

    @cached_property
    def captions(self) -> np.ndarray:
        """(N,) int32: number of stored captions of each sample."""
        return self._table["captions"].to_numpy().copy()

    @cached_property
    def digests(self) -> np.ndarray:
        """(N, 16) uint8: digest of each sample's key and captions."""
        chunks = []
        for chunk in self._table["digest"].chunks:
            flat = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)
            chunks.append(flat[chunk.offset * DIGEST_BYTES : (chunk.offset + len(chunk)) * DIGEST_BYTES])
        return np.concatenate(chunks).reshape(-1, DIGEST_BYTES)

    @cached_property
    def in_row_order(self) -> np.ndarray:
        """(N,) int64: the data index of each row."""
        order = np.empty(len(self), dtype=np.int64)
        order[self.rows] = np.arange(len(self))
        return order

    def synthetic(self, index: int) -> tuple[str, ...]:
        """The added captions of a sample; empty when there are none."""
        return tuple(self._table["synthetic"][index].as_py() or ())

    def records(self) -> list[dict[str, Any]]:
        """Every sample as a dictionary of the columns (for merging and growing)."""
        return self._table.to_pylist()


def write_samples(folder: Path, records: Iterable[Mapping[str, Any]]) -> str:
    """Write a table and return its file name, which carries the content's sha256."""
    return write_table(folder, "samples", _SCHEMA, records)


def find_difference(table: SampleTable, source: PairSource) -> str | None:
    """A clause that names the first difference between data and the samples of a store; None when there is none."""
    known = {key: index for index, key in enumerate(table.keys())}
    keys = [source.key(i) for i in range(len(source))]
    new = [key for key in keys if key not in known]
    gone = len(known) - (len(keys) - len(new))
    if new and gone:
        return (
            f"data keys: {len(new)} are not in the cache (the first is '{new[0]}') and {gone} of the cache's are gone"
        )
    if new:
        return f"data keys: {len(new)} are not in the cache (the first is '{new[0]}')"
    if gone:
        present = set(keys)
        first = next(key for key in known if key not in present)
        return f"data keys: the cache has {gone} that the data has not (the first is '{first}')"
    for index, key in enumerate(keys):
        if sample_digest(key, source.captions(index)) != table.digests[known[key]].tobytes():
            return f"data captions: those of '{key}' have changed"
    moved = next((key for index, key in enumerate(keys) if known[key] != index), None)
    if moved is None:
        return None
    return f"data order: the keys are the same in another order (the first out of place is '{moved}')"
