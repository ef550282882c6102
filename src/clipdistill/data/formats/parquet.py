"""Parquet tables: a column of image paths, or of encoded images (bytes, or Hugging Face's struct of bytes and path).

Images inside the table are read a row group at a time and the latest groups are kept in memory, so tables for training
in random order should have small row groups (some megabytes), or be written as tars.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.data.captions import clean_all
from clipdistill.data.files import choose_splits
from clipdistill.data.formats.rows import CAPTION_NAMES, IMAGE_NAMES, Rows, guessed_column
from clipdistill.data.pairs import DataConfig, IndexedPairs, PairSource
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError

_KEPT_BYTES = 256 << 20  # of row groups, per process
_BATCH = 65536  # rows of captions converted at a time


def open_parquet(files: Sequence[Path], where: Path, config: DataConfig, default_split: str | None) -> PairSource:
    """The pairs of one or several Parquet files with the same columns, in their order.

    A caption column may hold strings or lists of strings. Columns with the usual names (image, caption, ...) are found
    by themselves. Raises InputError for damaged files, unknown columns, missing captions.
    """
    import pyarrow as pa

    opened = [_open(file) for file in files]
    tables, schema = [table for table, _ in opened], opened[0][1]
    for file, (_, other) in zip(files, opened):
        if other.names != schema.names:
            raise InputError(f"'{file}' has other columns than '{files[0]}': {', '.join(other.names)}")
    image = guessed_column(config.image_column, "filepath", IMAGE_NAMES, schema.names, "image_column", str(where))
    caption = guessed_column(config.caption_column, "title", CAPTION_NAMES, schema.names, "caption_column", str(where))
    split = "split" if "split" in schema.names else None
    kind = schema.field(image).type
    try:
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return _open_paths(files, tables, where, (image, caption, split), config, default_split)
        if _holds_bytes(kind):
            return _open_bytes(files, tables, where, (image, caption, split), config, default_split)
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column's name that is not UTF-8
        raise InputError(f"'{where}': damaged Parquet file ({_first_line(error)})") from error
    raise InputError(
        f"'{where}': the column '{image}' holds {kind}, neither paths nor encoded images; set image_column"
    )


def _open(file: Path) -> tuple[Any, Any]:
    """The file and its schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        str(file).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"'{file}': pyarrow opens only files whose name is valid UTF-8: rename it") from None
    try:
        # mapped, and without pyarrow's read-ahead threads: both must survive the fork into workers
        table = pq.ParquetFile(file, memory_map=True, pre_buffer=False)
        return table, table.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column's name that is not UTF-8
        raise InputError(f"'{file}': not a readable Parquet file ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _columns(table: Any, names: Sequence[str | None]) -> Any:
    """Rows of the named columns (None for a missing one) as tuples."""
    wanted = [name for name in names if name is not None]
    for batch in table.iter_batches(batch_size=_BATCH, columns=wanted, use_threads=False):
        # lenient: a string that is no UTF-8 must not end the reading
        values = {name: _to_python(batch.column(wanted.index(name))) for name in wanted}
        yield from zip(*([None] * batch.num_rows if name is None else values[name] for name in names))


def _to_python(column: Any) -> list[Any]:
    import pyarrow as pa

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw]
    return column.to_pylist()


def _captions(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | np.ndarray) else [value]


def _open_paths(
    files: Sequence[Path],
    tables: Sequence[Any],
    where: Path,
    columns: tuple[str, str, str | None],
    config: DataConfig,
    default_split: str | None,
) -> PairSource:
    image, caption, split = columns
    rows = Rows(where, config)
    for file, table in zip(files, tables):
        for number, (path, texts, label) in enumerate(_columns(table, (image, caption, split))):
            rows.add(
                path, _captions(texts), label, f"row {number} of {file.name}" if len(files) > 1 else f"row {number}"
            )
    return rows.source(default_split, has_splits=split is not None)


def _open_bytes(
    files: Sequence[Path],
    tables: Sequence[Any],
    where: Path,
    columns: tuple[str, str, str | None],
    config: DataConfig,
    default_split: str | None,
) -> PairSource:
    image, caption, split = columns
    rows = Rows(where, config)
    found: list[tuple[str, str, list[str], int, int, int]] = []
    for number, (file, table) in enumerate(zip(files, tables)):
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        places = ((group, row) for group, size in enumerate(sizes) for row in range(size))
        for line, ((texts, label), (group, row)) in enumerate(zip(_columns(table, (caption, split)), places)):
            key = f"{file.stem}/{line}"
            values = rows.present(_captions(texts), key, f"row {line}")
            captions = clean_all(values, key, rows.problems)
            found.append((key, "" if label is None else str(label), captions, number, group, row))
            rows.splits[found[-1][1]] += 1
    rows.refuse_missing()
    chosen, label = choose_splits(config.split, default_split, rows.splits if split is not None else {}, str(where))
    kept = []
    for entry in found:
        if chosen is None or entry[1] in chosen:
            if entry[2]:
                kept.append(entry)
            else:
                rows.problems.add("image without caption", entry[0], dropped=True)
    if not kept:
        summary = rows.problems.summary()
        raise InputError(f"{where}: no usable image-caption pair" + (f" ({summary})" if summary else ""))
    return ParquetPairs(f"{where.stem}{label}", files, image, kept, rows, config.max_pixels)


class ParquetPairs(IndexedPairs):
    """Pairs whose encoded images are cells of Parquet files; keys are '<file>/<row>'."""

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        column: str,
        kept: Sequence[tuple[str, str, list[str], int, int, int]],
        rows: Rows,
        max_pixels: int,
    ) -> None:
        super().__init__(name, (k[0] for k in kept), [k[2] for k in kept], rows.problems, max_pixels)
        self._paths = [Path(file) for file in files]
        self._column = column
        self._places = np.array([k[3:] for k in kept], dtype=np.int64)
        self._forget_files()

    def _forget_files(self) -> None:
        self._process = os.getpid()
        self._tables: dict[int, Any] = {}
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_process", "_tables", "_groups")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_files()

    def shard_of(self, key: str) -> str | None:
        stem = key.rpartition("/")[0]
        return next((str(path) for path in self._paths if path.stem == stem), None)

    def image_bytes(self, i: int) -> bytes:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        file, group, row = (int(v) for v in self._places[i])
        value = self._group(file, group)[row].as_py()
        if value is None:
            raise BadSample("empty image file")
        return value

    def _group(self, file: int, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc

        if self._process != os.getpid():
            self._forget_files()
        cells = self._groups.get((file, group))
        if cells is None:
            try:
                if file not in self._tables:
                    self._tables[file] = _open(self._paths[file])[0]
                cells = self._tables[file].read_row_group(group, columns=[self._column], use_threads=False).column(0)
                while pa.types.is_struct(cells.type):
                    cells = pc.struct_field(cells, "bytes")  # the path beside it may be no text
            except (pa.ArrowException, OSError, ValueError) as error:
                raise BadSample(f"unreadable row group: {self._paths[file].name}: {_first_line(error)}") from error
            self._groups[file, group] = cells
            while len(self._groups) > 1 and sum(c.nbytes for c in self._groups.values()) > _KEPT_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end((file, group))
        return cells
