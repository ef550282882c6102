"""Embeddings in files that other programs read: .npy with keys beside it, Parquet, safetensors, a table of LanceDB."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.arguments import checked
from clipdistill.errors import InputError, first_line, nearest, needing
from clipdistill.runtime.files import new_file, new_folder, require_new_folder, require_place, sync

SUFFIXES = (".npy", ".parquet", ".safetensors", ".lance")
Part = tuple[np.ndarray, Sequence[dict[str, Any]]]
"""Rows (n, D) float32, and for each row its "key", of a text also "caption" (its number) and "text"."""


def require_suffix(path: Path) -> None:
    """Raise InputError for a file name whose ending is no form of embeddings."""
    if path.suffix not in SUFFIXES:
        hint = nearest(path.suffix or path.name, SUFFIXES)
        raise InputError(f"{path}: embeddings are written as {', '.join(SUFFIXES)}: end the name so{hint}")
    if path.suffix == ".parquet":
        with needing("pyarrow", "hf", "embeddings as Parquet"):
            import pyarrow  # noqa: F401
    if path.suffix == ".lance":
        with needing("lancedb", "lancedb", "a table of LanceDB"):
            import lancedb  # noqa: F401
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", path.stem):
            raise InputError(f"{path}: LanceDB names tables with letters, digits, '_', '-' and '.': take such a name")


def require_room(path: Path) -> None:
    """Raise InputError where embeddings cannot be written at `path`, before the work whose result they are."""
    if path.suffix == ".lance":
        require_new_folder(path, _is_table, "table of LanceDB")
    else:
        require_place(path, "embeddings")


def _is_table(folder: Path) -> bool:
    return (folder / "_versions").is_dir()


def _is_part(part: Path) -> bool:
    return part.parts[0] in ("data", "_versions", "_transactions", "_deletions", "_indices", "_refs")


def write_embeddings(
    path: Path, count: int, width: int, parts: Iterable[Part], about: Mapping[str, str] | None = None
) -> None:
    """Write `count` rows of `width` numbers, a part at a time, as the ending of `path` says; it appears when whole.

    about: notes that Parquet and LanceDB keep with the table's schema, such as the fingerprint of the model.
    """
    parts = (part for part in parts if len(part[0]))
    if path.suffix == ".lance":
        with new_folder(path, _is_table, "table of LanceDB", _is_part) as new:
            _lance(new, _batches(width, parts, about or {}))
        return
    writers: dict[str, Callable[..., None]] = {".npy": _npy, ".parquet": _parquet, ".safetensors": _safetensors}
    with new_file(path) as new:
        if path.suffix == ".parquet":
            parts = _batches(width, parts, about or {})
        writers[path.suffix](path, new, count, width, parts)


def keys_beside(path: Path) -> Path:
    """The JSON lines with the keys of an .npy file."""
    return path.with_suffix(".jsonl")


def _npy(path: Path, new: Path, count: int, width: int, parts: Iterable[Part]) -> None:
    with new.open("wb") as file, new_file(keys_beside(path)) as beside:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
        np.lib.format.write_array_header_1_0(file, header)
        with beside.open("w", encoding="utf-8") as lines:
            for rows, described in parts:
                file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
                lines.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in described)
        file.flush()
        sync(new)  # the keys take their name when the rows are on the disk


def _batches(width: int, parts: Iterable[Part], about: Mapping[str, str]) -> Iterator[Any]:
    """The parts as Arrow's record batches: what is known of a row, and "embedding", a list of `width` float32."""
    import pyarrow as pa

    for rows, described in parts:
        columns = {name: pa.array([entry[name] for entry in described]) for name in described[0]}
        flat = pa.array(np.ascontiguousarray(rows, dtype=np.float32).reshape(-1))
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, width)
        yield pa.RecordBatch.from_pydict(columns).replace_schema_metadata(dict(about))


def _parquet(path: Path, new: Path, count: int, width: int, batches: Iterable[Any]) -> None:
    import pyarrow.parquet as pq

    writer: Any = None
    for batch in batches:
        writer = writer or pq.ParquetWriter(new, batch.schema)
        writer.write_batch(batch)
    if writer is not None:
        writer.close()


def _lance(new: Path, batches: Iterator[Any]) -> None:
    """A folder NAME.lance is a table NAME of the database that its parent folder is; nothing in it names the place."""
    import lancedb
    import pyarrow as pa

    first = next(batches)
    whole = pa.RecordBatchReader.from_batches(first.schema, itertools.chain([first], batches))
    lancedb.connect(new / "new").create_table("rows", data=whole)
    for part in (new / "new" / "rows.lance").iterdir():
        part.rename(new / part.name)
    shutil.rmtree(new / "new")


def _safetensors(path: Path, new: Path, count: int, width: int, parts: Iterable[Part]) -> None:
    """Tensors "embedding" (N, D) float32 and "keys": uint8, JSON lines in UTF-8, one an embedding."""
    with new.open("wb") as file:
        lines: list[bytes] = []
        file.write(b"\0" * _HEADER)
        for rows, described in parts:
            file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
            lines += [json.dumps(entry, ensure_ascii=False).encode() + b"\n" for entry in described]
        keys = b"".join(lines)
        file.write(keys)
        end = 4 * count * width
        header = {
            "embedding": {"dtype": "F32", "shape": [count, width], "data_offsets": [0, end]},
            "keys": {"dtype": "U8", "shape": [len(keys)], "data_offsets": [end, end + len(keys)]},
        }
        text = json.dumps(header).encode().ljust(_HEADER - 8)
        file.seek(0)
        file.write(len(text).to_bytes(8, "little") + text)


_HEADER = 512


@checked
def read_embeddings(path: str | Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """What `clipdistill embed` wrote into the file `path`.

    Returns rows (N, D) float32 of length 1, and for each row its "key" (and "caption", "text" of a text). Raises
    InputError for a file that is none of that.
    """
    path = Path(path)
    require_suffix(path)
    if not (path.is_dir() if path.suffix == ".lance" else path.is_file()):
        raise InputError(f"{path}: no such {'table' if path.suffix == '.lance' else 'file'}")
    try:
        if path.suffix in (".parquet", ".lance"):
            table = _table(path)
            rows = np.stack(table["embedding"].to_numpy()) if len(table) else np.zeros((0, 0), dtype=np.float32)
            return _checked(rows, table.drop(["embedding"]).to_pylist())
        if path.suffix == ".npy":
            return _checked(np.load(path, allow_pickle=False), _lines(keys_beside(path).read_bytes()))
        from safetensors.numpy import load_file

        tensors = load_file(path)
        return _checked(tensors["embedding"], _lines(tensors["keys"].tobytes()))
    except Exception as error:  # each library raises errors of its own
        raise InputError(f"{path}: holds no embeddings of clipdistill embed ({first_line(error)})") from error


def _checked(rows: np.ndarray, entries: list[Any]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The rows in this machine's order of bytes, and what is known of each. Raises ValueError for what is neither."""
    if rows.ndim != 2 or rows.dtype.kind != "f" or len(rows) != len(entries):
        raise ValueError(f"{len(entries)} keys, and {rows.dtype} numbers of shape {rows.shape}")
    if not all(isinstance(entry, dict) and isinstance(entry.get("key"), str | int) for entry in entries):
        raise ValueError("a row without its key")
    with np.errstate(over="ignore"):
        rows = rows.astype(np.float32, copy=False)
    lengths = np.linalg.norm(rows, axis=1)
    wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(wrong):
        raise ValueError(f"row {wrong[0]} is zero or not finite ({len(wrong)} such rows)")
    return rows, entries


def _table(path: Path) -> Any:
    if path.suffix == ".lance":
        import lancedb

        return lancedb.connect(path.parent).open_table(path.stem).to_arrow()
    import pyarrow.parquet as pq

    return pq.read_table(path)


def _lines(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.decode().split("\n") if line]
