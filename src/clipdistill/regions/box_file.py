"""Boxes from files: Parquet or JSON rows keyed by image, COCO instances, and what `proposals` caches.

Rows (Parquet columns, objects of a JSON list, or JSON lines):
    key (or file_name)  the image, as the data set names it, or the name of its file
    boxes               list of [left, top, right, bottom] in pixels
    confidences         list of numbers in [0, 1] (optional: 1)
    labels              list of names (optional)
    width, height       of the image the boxes were drawn on (optional: the image's own)
COCO instances: boxes [left, top, width, height], crowds left out, `score` as confidence where detections have one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from clipdistill.data.files import read_json
from clipdistill.errors import InputError
from clipdistill.regions.boxes import Boxes

_PARQUET = (".parquet", ".pq")
_LINES = (".jsonl", ".ndjson")
_ASPECT = 0.02
"""Relative difference of aspect ratios up to which an image is taken for a resized copy of the one with the boxes."""


class BoxFile:
    """Boxes by image key, from a file or a folder of Parquet files.

    An image is found by its key, else by its file name where only one row has it. Boxes drawn on an image of another
    size are scaled, if the aspect ratio is the same.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self._rows: dict[str, dict[str, Any]] = {}
        self._by_file: dict[str, str | None] = {}
        files = _files(path)
        self._digest = hashlib.sha256(b"clipdistill boxes 1")
        for file in files:
            self._digest.update(hashlib.sha256(_read(file)).digest())
            for number, row in enumerate(_rows(file)):
                self._add(row, f"{file}: row {number}")
        if not self._rows:
            raise InputError(f"{path}: holds no boxes for any image")
        for key in self._rows:
            name = PurePosixPath(key).name
            self._by_file[name] = None if name in self._by_file else key

    def _add(self, row: Any, where: str) -> None:
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: expected an object with 'key' and 'boxes', got {type(row).__name__}")
        key = row.get("key", row.get("file_name"))
        if not isinstance(key, str) or not key:
            raise InputError(f"{where}: no image key (a text under 'key' or 'file_name')")
        if key in self._rows:
            raise InputError(f"{where}: the image '{key}' comes more than once")
        boxes = row.get("boxes")
        if not isinstance(boxes, list | tuple | np.ndarray):
            raise InputError(f"{where} ('{key}'): 'boxes' must be a list of [left, top, right, bottom]")
        self._rows[key] = {name: row.get(name) for name in ("boxes", "confidences", "labels", "width", "height")}
        try:  # a bad row is an error now, not later
            self.get(key, int(row.get("width") or 1), int(row.get("height") or 1))
        except InputError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{where} ('{key}'): not boxes with sizes and labels ({error})") from error

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: str) -> bool:
        return self._found(key) is not None

    def _found(self, key: str) -> str | None:
        return key if key in self._rows else self._by_file.get(PurePosixPath(key).name)

    def get(self, key: str, width: int, height: int) -> Boxes | None:
        """The boxes of an image in its own pixels; None when the file does not know it.

        Raises InputError when they were drawn on an image of another aspect ratio.
        """
        found = self._found(key)
        if found is None:
            return None
        row, where = self._rows[found], f"{self.path}: '{found}'"
        labels = [] if row["labels"] is None else list(row["labels"])
        corners = [list(box) for box in row["boxes"]]
        if any(len(box) != 4 for box in corners):
            raise InputError(f"{where}: a box has {next(len(b) for b in corners if len(b) != 4)} numbers instead of 4")
        drawn = (int(row["width"] or width), int(row["height"] or height))
        if min(drawn) < 1:
            raise InputError(f"{where}: width and height must be positive, got {drawn[0]} x {drawn[1]}")
        boxes = Boxes.of(*drawn, corners, row["confidences"], labels, where)
        ratio = (drawn[0] / drawn[1]) / (width / height)
        # a side rounded to whole pixels moves the ratio of a small copy
        if abs(ratio - 1) > _ASPECT + 1 / min(width, height):
            raise InputError(
                f"{where}: its boxes were drawn on {drawn[0]} x {drawn[1]} pixels, the image has {width} x {height}: "
                "another picture or another crop of it"
            )
        return boxes.scaled(width, height)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` without a row."""
        return [key for key in keys if key not in self]

    def require_some(self, keys: Iterable[str], data: str) -> list[str]:
        """`missing`, or InputError when the file knows none of the images."""
        keys = list(keys)
        missing = self.missing(keys)
        if keys and len(missing) == len(keys):
            raise InputError(
                f"{self.path}: holds boxes for none of the {len(keys)} images of {data} (its first is "
                f"'{next(iter(self._rows))}', the data's first is '{keys[0]}'): it belongs to other images"
            )
        return missing

    def fingerprint(self) -> str:
        return self._digest.hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in _PARQUET and not p.name.startswith("."))
        if not found:
            raise InputError(f"{path}: the folder holds no Parquet files of boxes")
        return found
    if not path.is_file():
        raise InputError(f"boxes '{path}': no such file")
    return [path]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _rows(path: Path) -> Iterator[Any]:
    if path.suffix.lower() in _PARQUET:
        yield from _parquet_rows(path)
    elif path.suffix.lower() in _LINES:
        for number, line in enumerate(_read(path).decode("utf-8", errors="replace").split("\n"), 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}, line {number}: not JSON ({error.msg})") from error
    else:
        content = read_json(path)
        if isinstance(content, Mapping) and "images" in content and "annotations" in content:
            yield from _coco_rows(content, path)
        elif isinstance(content, Mapping):
            for key, row in content.items():
                yield {"key": key, **row} if isinstance(row, Mapping) else {"key": key, "boxes": row}
        elif isinstance(content, list):
            yield from content
        else:
            raise InputError(f"{path}: neither rows with 'key' and 'boxes' nor COCO instances")


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: not readable as Parquet ({error})") from error
    names = {"key", "file_name", "boxes", "confidences", "labels", "width", "height"} & set(table.column_names)
    if "boxes" not in names or not names & {"key", "file_name"}:
        raise InputError(f"{path}: needs the columns 'key' and 'boxes', found {', '.join(table.column_names)}")
    yield from table.select(sorted(names)).to_pylist()


def _coco_rows(content: Mapping[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    """One row an image of COCO's instances; crowds are no objects and left out."""
    for part in ("images", "annotations"):
        if not isinstance(content[part], list):
            raise InputError(f"{path}: '{part}' is not a list")
    listed = content.get("categories")
    categories = [c for c in listed if isinstance(c, Mapping)] if isinstance(listed, list) else []
    names = {c.get("id"): c.get("name", "") for c in categories if isinstance(c.get("id"), int | str)}
    rows: dict[Any, dict[str, Any]] = {}
    for number, image in enumerate(content["images"]):
        named = isinstance(image, Mapping) and isinstance(image.get("file_name"), str)
        if not named or not isinstance(image.get("id"), int | str):
            raise InputError(f"{path}: images[{number}] has no 'id' and 'file_name'")
        size = {side: image.get(side) for side in ("width", "height")}
        rows[image["id"]] = {"key": image["file_name"], "boxes": [], "confidences": [], "labels": [], **size}
    if not rows:
        raise InputError(f"{path}: lists no images")
    for number, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, Mapping) or "bbox" not in annotation:
            hint = " (captions: take the file instances_*.json)" if "caption" in annotation else ""
            raise InputError(f"{path}: annotations[{number}] has no 'bbox'{hint}")
        try:
            row = rows.get(annotation.get("image_id"))
            if row is None or annotation.get("iscrowd"):
                continue
            left, top, width, height = (float(value) for value in annotation["bbox"])
            score, name = float(annotation.get("score", 1.0)), str(names.get(annotation.get("category_id"), ""))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{path}: annotations[{number}]: not an annotation with 'bbox' [left, top, width, height] ({error})"
            ) from error
        row["boxes"].append([left, top, left + width, top + height])
        row["confidences"].append(score)
        row["labels"].append(name)
    yield from rows.values()


def write_rows(path: Path, rows: Iterable[tuple[str, Boxes]], metadata: Mapping[str, str]) -> None:
    """Write boxes by key as one Parquet file that `BoxFile` reads, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("key", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("boxes", pa.list_(pa.list_(pa.float32()))),
            ("confidences", pa.list_(pa.float32())),
            ("labels", pa.list_(pa.string())),
        ],
        metadata=dict(metadata),
    )
    listed = [
        {
            "key": key,
            "width": boxes.width,
            "height": boxes.height,
            "boxes": boxes.corners.tolist(),
            "confidences": boxes.confidence.tolist(),
            "labels": list(boxes.labels),
        }
        for key, boxes in rows
    ]
    temporary = path.with_name(f".{path.name}.writing")
    pq.write_table(pa.Table.from_pylist(listed, schema=schema), temporary)
    temporary.replace(path)
