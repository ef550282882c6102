"""A plain file of embeddings with keys as a teacher: .npz or Parquet, from any framework or an API.

.npz    keys (N,) text, image (N, D), text (N, D) or, with `captions` (N,) integers, (sum of captions, D);
        logit_scale, a number, is optional (100 when it is missing)
Parquet columns key, image (list of D numbers), text (list of D numbers, or a list of such lists, one a caption);
        the key-value metadata `logit_scale` is optional
Rows need not be normalised. No pickles: keys must be a text array, not an array of objects.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdistill.cache.stored import StoredEmbeddings
from clipdistill.config import LARGEST_SCALE
from clipdistill.data.pairs import PairSource
from clipdistill.errors import InputError, first_line

SUFFIXES = (".npz", ".parquet", ".pq")
DEFAULT_SCALE = 100.0


class PlainEmbeddings(StoredEmbeddings):
    """Embeddings from a file, matched to a data set by key (stored.StoredEmbeddings)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        read = _read_npz if path.suffix == ".npz" else _read_parquet
        try:
            self.keys, self.image, self.text, counts, scale = read(path)
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(f"{path}: no such file of embeddings") from None
        except Exception as error:  # zip, numpy and Arrow fail in their own ways on a damaged file
            kind = ".npz without pickles" if read is _read_npz else "Parquet"
            raise InputError(f"{path}: not readable as {kind} ({first_line(error)})") from error
        self.logit_scale = _scale(scale, path)
        self._check(counts)
        self.dims = (self.image.shape[1],)
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.rows = np.arange(len(self.keys))

    def _check(self, counts: np.ndarray) -> None:
        image, text, path = self.image, self.text, self.path
        if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
            raise InputError(f"{path}: image {image.shape} and text {text.shape} must be two tables of the same width")
        if not self.keys or not image.shape[1]:
            raise InputError(f"{path}: holds no embeddings ({len(self.keys)} keys, {image.shape[1]} columns)")
        if counts.ndim != 1 or counts.dtype.kind not in "iu":
            raise InputError(f"{path}: 'captions' must be a whole number a key, found {counts.dtype} {counts.shape}")
        if (
            len(image) != len(self.keys)
            or len(counts) != len(self.keys)
            or counts.min() < (1 if len(text) else 0)
            or len(text) != counts.sum(dtype=np.float64)
        ):
            raise InputError(
                f"{path}: {len(self.keys)} keys, {len(image)} image rows and {len(text)} text rows do not fit together"
            )
        if "" in self.keys:
            raise InputError(f"{path}: the key of row {self.keys.index('')} is empty")
        if len(set(self.keys)) != len(self.keys):
            key, times = Counter(self.keys).most_common(1)[0]
            raise InputError(f"{path}: some keys come more than once ('{key}' {times} times): keep one row a key")
        for name, matrix in (("image", image), ("text", text)):
            lengths = np.linalg.norm(matrix.astype(np.float32), axis=1)
            wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
            if wrong.size:
                raise InputError(f"{path}: {name} row {wrong[0]} is zero or not finite ({wrong.size} such rows)")

    def fingerprint(self) -> str:
        """sha256 of what training takes from the file: keys, rows and scale."""
        digest = hashlib.sha256(json.dumps([self.keys, self.starts.tolist(), self.logit_scale]).encode())
        for matrix in (self.image, self.text):
            digest.update(str(matrix.dtype).encode())
            digest.update(np.ascontiguousarray(matrix).data)
        return digest.hexdigest()

    def match(self, source: PairSource, captions: str) -> None:
        """Line the rows up with the samples of `source`; raises InputError when some are missing."""
        known = {key: row for row, key in enumerate(self.keys)}
        missing = [key for i in range(len(source)) if (key := source.key(i)) not in known]
        if missing:
            raise InputError(
                f"{self.path}: data keys: no embeddings for {len(missing)} of {len(source)} samples (the first is "
                f"'{missing[0]}', the file's first is '{self.keys[0]}')"
            )
        self.rows = np.asarray([known[source.key(i)] for i in range(len(source))], dtype=np.int64)
        if not len(self.text) and source.captioned:
            raise InputError(
                f"{self.path}: holds no text embeddings, and {source.name} has captions: leave them aside with "
                "data.caption_column=null where no term reads them"
            )
        if captions == "first" or not source.captioned:
            return
        counts = np.diff(self.starts)
        for index, row in enumerate(self.rows.tolist()):
            if counts[row] != len(source.captions(index)):
                raise InputError(
                    f"{self.path}: '{source.key(index)}' has {len(source.captions(index))} captions and {counts[row]} "
                    "text embeddings: give one for each caption in order, or set train.caption=first"
                )

    def __len__(self) -> int:
        return len(self.rows)

    def read(
        self, teacher: int, indices: Sequence[int], captions: Sequence[int], views: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """See StoredEmbeddings.read; rows as long as they are in the file."""
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        image = torch.from_numpy(self.image[rows]).float()
        if not len(self.text):
            return image, torch.zeros_like(image)
        texts = self.starts[rows] + np.maximum(np.asarray(captions, dtype=np.int64), 0)
        return image, torch.from_numpy(self.text[texts]).float()


_Table = tuple[list[str], np.ndarray, np.ndarray, np.ndarray, Any]
"""Keys, image rows, text rows, captions of each key, logit scale."""


def _read_npz(path: Path) -> _Table:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
        if len(arrays) < len(file.files):
            raise InputError(f"{path}: an array stands in it twice: only one of the two would be read")
    _require_names(path, "array", list(arrays), ("keys", "image"), ("text", "captions", "logit_scale"))
    keys, bare = arrays["keys"], "text" not in arrays
    if keys.ndim != 1 or keys.dtype.kind not in "US":
        raise InputError(f"{path}: 'keys' must be a one-dimensional array of text, found {keys.dtype} {keys.shape}")
    names = [key.decode("utf-8") if isinstance(key, bytes) else str(key) for key in keys.tolist()]
    counts = arrays.get("captions", np.full(len(names), int(not bare), dtype=np.int64))
    scale = arrays.get("logit_scale", np.asarray(DEFAULT_SCALE))
    if scale.ndim or scale.dtype.kind not in "iuf":
        raise InputError(f"{path}: 'logit_scale' must be one number, found {scale.dtype} {scale.shape}")
    image = _numbers(arrays["image"], path)
    return names, image, image[:0] if bare else _numbers(arrays["text"], path), counts, scale


def _read_parquet(path: Path) -> _Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    _require_names(path, "column", table.column_names, ("key", "image", "text"), ())
    if table["key"].null_count:
        raise InputError(f"{path}: {table['key'].null_count} keys are missing (null)")
    keys = [key.decode() if isinstance(key, bytes) else str(key) for key in table["key"].to_pylist()]
    counts = np.ones(len(keys), dtype=np.int64)
    text: Any = table["text"].combine_chunks() if table["text"].num_chunks != 1 else table["text"].chunk(0)
    if pa.types.is_nested(text.type) and pa.types.is_nested(text.type.value_type) and not text.null_count:
        counts = text.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        text = text.flatten()
    metadata = {name.decode(): value for name, value in (table.schema.metadata or {}).items()}
    scale = metadata.get("logit_scale", DEFAULT_SCALE)
    return keys, _matrix(table["image"], path, "image"), _matrix(text, path, "text"), counts, scale


def _require_names(path: Path, what: str, found: list[str], needed: Sequence[str], optional: Sequence[str]) -> None:
    """All that is needed is there, and nothing looks like a slip in a name: it would be left out silently."""
    missing = [name for name in needed if name not in found]
    if missing:
        raise InputError(f"{path}: the {what} '{missing[0]}' is missing (found {', '.join(found) or 'nothing'})")
    for name in found:
        close = difflib.get_close_matches(name, [*needed, *optional], n=1, cutoff=0.75)
        if close and close[0] != name and close[0] not in found:
            raise InputError(f"{path}: unknown {what} '{name}' (did you mean '{close[0]}'?)")


def _scale(value: Any, path: Path) -> float:
    try:
        scale = float(value)
    except ValueError:
        scale = math.nan
    if not 0 < scale <= LARGEST_SCALE:
        raise InputError(
            f"{path}: 'logit_scale' must be a positive number up to {LARGEST_SCALE:g} (the multiplier itself), "
            f"found {value!s:.80}"
        )
    return scale


def _numbers(array: np.ndarray, path: Path) -> np.ndarray:
    if array.dtype.kind != "f":
        raise InputError(f"{path}: embeddings must be floating point, found {array.dtype}")
    with np.errstate(over="ignore"):  # beyond float32 a row is not finite, and refused as such
        return array.astype(np.float32 if array.dtype.itemsize > 4 else array.dtype.newbyteorder("="))


def _matrix(column: Any, path: Path, name: str) -> np.ndarray:
    """A column of equally long lists of numbers as a matrix."""
    import pyarrow as pa

    whole = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) and column.chunks else column
    if not pa.types.is_nested(whole.type) or not pa.types.is_floating(whole.type.value_type):
        raise InputError(f"{path}: the column '{name}' must hold lists of floating-point numbers, found {whole.type}")
    if not len(whole):
        return np.empty((0, 0), dtype=np.float32)
    lengths = (
        {whole.type.list_size} if pa.types.is_fixed_size_list(whole.type) else set(whole.value_lengths().to_pylist())
    )
    if len(lengths) != 1 or None in lengths or whole.null_count:
        raise InputError(f"{path}: the rows of the column '{name}' are not all of the same length")
    flat = whole.flatten().to_numpy(zero_copy_only=False)
    return _numbers(flat.reshape(len(whole), lengths.pop()), path)
