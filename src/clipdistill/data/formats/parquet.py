"""Parquet tables: a column of image paths, or of encoded images (bytes, or Hugging Face's struct of bytes and path).

Images inside the table are read a row group at a time and the latest groups are kept in memory, so tables for training
in random order should have small row groups (some megabytes), or be written as tars.
"""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.data.files import to_read
from clipdistill.data.formats import Place
from clipdistill.data.formats.forms import tables_of
from clipdistill.data.formats.rows import WITHOUT_IMAGE, Rows, find_columns
from clipdistill.data.pairs import DataConfig, IndexedPairs, PairSource
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError, first_line
from clipdistill.registry import wing

_KEPT_BYTES = 256 << 20  # of row groups, per process
_BATCH = 65536  # rows of captions converted at a time


def open_parquet(place: Place, config: DataConfig, default_split: str | None) -> PairSource:
    """The pairs of one or several Parquet files with the same columns, in their order.

    A caption column may hold strings or lists of strings. Columns with the usual names (image, caption, ...) are found
    by themselves. Raises InputError for damaged files, unknown columns, missing captions.
    """
    import pyarrow as pa

    files, where = tables_of(place), place.path
    tables = [_open(file) for file in files]
    labels = [file.stem for file in files]
    labels = labels if len(set(labels)) == len(labels) else [file.name for file in files]  # x.parquet beside x.pq
    try:
        names, schema = tables[0].schema_arrow.names, tables[0].schema_arrow
        for file, table in zip(files, tables):
            if table.schema_arrow.names != names:
                others = ", ".join(table.schema_arrow.names)
                raise InputError(f"'{file}' has other columns than '{files[0]}': {others}")
        image, caption = find_columns(config, names, where)
        split = "split" if "split" in names else None
        kind = schema.field(image).type
        in_cells = _holds_bytes(kind)
        if not in_cells and not _is_text(kind):
            raise InputError(
                f"'{where}': the column '{image}' holds {kind}, neither paths nor encoded images; set image_column"
            )
        if in_cells and config.image_root is not None:
            raise InputError(f"data.image_root={config.image_root} is not applied to '{where}', which holds its images")
        rows = Rows(where, config)
        place.count_unread(rows.problems, ".parquet", ".pq")
        for number, (file, table, name) in enumerate(zip(files, tables, labels)):
            beside = f" of {file.name}" if len(files) > 1 else ""
            if in_cells:
                lines = zip(_columns(table, (caption, split)), _places(table, file, image), strict=True)
                for line, ((texts, label), (group, row, null)) in enumerate(lines):
                    if null:
                        rows.problems.add(WITHOUT_IMAGE, f"{name}/{line}", dropped=True)
                    else:
                        rows.add_cell(f"{name}/{line}", texts, label, f"row {line}", (number, group, row))
            else:
                for line, (path, texts, label) in enumerate(_columns(table, (image, caption, split))):
                    rows.add(path, texts, label, f"row {line}{beside}")
        if not in_cells:
            return rows.source(default_split, split is not None)
        label, keys, captions, places = rows.cells(default_split, split is not None)
        return ParquetPairs(f"{where.stem}{label}", files, image, keys, captions, places, rows)
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column's name that is not UTF-8
        raise InputError(f"'{where}': damaged Parquet file ({first_line(error)})") from error


def _open(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        str(file).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"'{file}': pyarrow opens only files whose name is valid UTF-8: rename it") from None
    try:
        # mapped, and without pyarrow's read-ahead threads: both must survive the fork into workers
        table = pq.ParquetFile(to_read(file), memory_map=isinstance(file, Path), pre_buffer=False)
        _ = table.schema_arrow  # raises for damaged ones
        return table
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"'{file}': not a readable Parquet file ({first_line(error)})") from error


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind  # a category of pandas
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _columns(table: Any, names: Sequence[str | None]) -> Iterator[tuple[Any, ...]]:
    """Rows of the named columns (None for a missing one) as tuples."""
    wanted, rows = [name for name in names if name is not None], 0
    for batch in table.iter_batches(batch_size=_BATCH, columns=wanted, use_threads=False):
        values = {name: _to_python(batch.column(wanted.index(name))) for name in wanted}
        yield from zip(*([None] * batch.num_rows if name is None else values[name] for name in names))
        rows += batch.num_rows
    if rows != table.metadata.num_rows:  # a damaged footer can lose a row group
        raise ValueError(f"it holds {rows} rows and says {table.metadata.num_rows}")


def _to_python(column: Any) -> list[Any]:
    import pyarrow as pa

    if _is_text(column.type):  # lenient: a string that is no UTF-8 must not end the reading
        if column.type not in (pa.string(), pa.large_string()):  # those are taken apart, or copied into one piece
            column = column.cast(pa.large_string())
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw]
    return column.to_pylist()


def _places(table: Any, file: Path, column: str) -> Iterator[tuple[int, int, bool]]:
    """(row group, row in it, whether the image's cell is null) of every row.

    The cells themselves are read only where the file's statistics do not say that none is null.
    """
    row_groups = wing("clipdistill.data.formats.parquet_footer:row_groups")
    known = row_groups(file, {column, f"{column}.bytes"}) if row_groups else []
    for group in range(table.num_row_groups):
        rows, counts = known[group] if len(known) == table.num_row_groups else (-1, [])
        if counts and all(count == 0 for count in counts):
            nulls: Any = itertools.repeat(False, rows)
        else:
            nulls = _read_cells(table, group, column).is_null().to_pylist()
            if rows >= 0 and len(nulls) != rows:
                raise ValueError(f"row group {group} holds {len(nulls)} images and says {rows}")
        for row, null in enumerate(nulls):
            yield group, row, null


def _read_cells(table: Any, group: int, column: str) -> Any:
    """The encoded images of a row group, as a (chunked) array of bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    cells = table.read_row_group(group, columns=[column], use_threads=False).column(0)
    while pa.types.is_struct(cells.type):
        cells = pc.struct_field(cells, "bytes")  # the path beside it may be no text
    return cells


class ParquetPairs(IndexedPairs):
    """Pairs whose encoded images are cells of Parquet files; keys are '<file>/<row>'."""

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        column: str,
        keys: Sequence[str],
        captions: Sequence[Sequence[str]],
        places: Sequence[tuple[int, ...]],
        rows: Rows,
    ) -> None:
        """places: file, row group and row of each image."""
        super().__init__(name, keys, captions, rows.problems, rows.config.max_pixels)
        self._paths = list(files)
        self._column = column
        self._places = np.array(places, dtype=np.int64)
        self._forget_files()

    def _forget_files(self) -> None:
        self._process = os.getpid()
        self._tables: dict[int, Any] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_process", "_tables", "_sizes", "_groups")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_files()

    def shard_of(self, key: str) -> str | None:
        stem = key.rpartition("/")[0]
        return next((str(path) for path in self._paths if stem in (path.stem, path.name)), None)

    def image_bytes(self, i: int) -> bytes:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        file, group, row = (int(v) for v in self._places[i])
        cells = self._group(file, group)
        if row >= len(cells):
            raise BadSample(f"missing row: row group {group} of {self._paths[file].name} holds {len(cells)} images")
        value: bytes | None = cells[row].as_py()
        if value is None:
            raise BadSample("empty image file")
        return value

    def _group(self, file: int, group: int) -> Any:
        import pyarrow as pa

        if self._process != os.getpid():
            self._forget_files()
        self._require_whole(file)
        cells = self._groups.get((file, group))
        if cells is None:
            try:
                if file not in self._tables:
                    self._tables[file] = _open(self._paths[file])
                    self._sizes[file] = _identity(self._paths[file])
                cells = _read_cells(self._tables[file], group, self._column)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise BadSample(f"unreadable row group: {self._paths[file].name}: {first_line(error)}") from error
            self._groups[file, group] = cells
            while len(self._groups) > 1 and sum(c.nbytes for c in self._groups.values()) > _KEPT_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end((file, group))
        return cells

    def _require_whole(self, file: int) -> None:
        """A mapped file that was cut since it was opened is told: reading behind its end would kill the process."""
        number, size = self._sizes.get(file, (0, 0))
        now, left = _identity(self._paths[file]) if size else (0, 0)
        if size and now == number and left < size:
            raise BadSample(f"unreadable shard: {self._paths[file]} is shorter than when it was opened")


def _identity(file: Path) -> tuple[int, int]:
    """(number, bytes) of a file that is mapped; zeros for one that is not, or gone: what is mapped of it stays."""
    with suppress(OSError):
        status = file.stat() if isinstance(file, Path) else None
        return (0, 0) if status is None else (status.st_ino, status.st_size)
    return 0, 0
