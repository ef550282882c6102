"""Boxes from files: Parquet or JSON rows keyed by image, COCO instances, and what detectors found, kept in a folder.

Rows (Parquet columns, objects of a JSON list, or JSON lines):
    key (or file_name)  the image, as the data set names it, or the name of its file
    boxes               list of [left, top, right, bottom] in pixels
    confidences         list of numbers in [0, 1] (optional: 1)
    labels              list of names (optional)
    width, height       of the image the boxes were drawn on (optional: the image's own)
COCO instances: boxes [left, top, width, height], crowds left out, `score` as confidence where detections have one.
A detector's boxes: Parquet files; `proposals.json` names the detector and the data by fingerprint, others are refused.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from clipdistill.data.files import is_there
from clipdistill.data.pairs import PairSource
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError
from clipdistill.regions.boxes import Boxes, Detector
from clipdistill.runtime.console import Shown
from clipdistill.runtime.files import (
    first_other,
    make_folder,
    new_file,
    parse_json,
    read_json,
    write_json,
)

_log = logging.getLogger("clipdistill")
_PARQUET = (".parquet", ".pq")
_LINES = (".jsonl", ".ndjson")
PROPOSALS = "proposals.json"
_FORMAT = 1
_IMAGES = 512
"""Of which a detector's boxes are in one file: what an interruption loses at most."""
_FIELDS = ("key", "file_name", "boxes", "confidences", "labels", "width", "height")
_ASPECT = 0.02
"""Relative difference of aspect ratios up to which an image is taken for a resized copy of the one with the boxes."""


class BoxFile(Shown):
    """Boxes by image key, from a file or a folder of Parquet files.

    An image is found by its key, else by its file name where only one row has it. Boxes drawn on an image of another
    size are scaled, if the aspect ratio is the same.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self._rows: dict[str, Boxes] = {}  # of the size that was drawn on, 0 where the row does not say
        self._by_file: dict[str, str | None] = {}
        digest = hashlib.sha256(b"clipdistill boxes 1")
        for file in _files(path):
            content = _read(file)
            digest.update(hashlib.sha256(content).digest())
            for number, row in enumerate(_rows(file, content)):
                self._add(row, f"{file}: row {number}")
        self._fingerprint = digest.hexdigest()
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
        where = f"{where} ('{key}')"
        try:
            corners = [[float(side) for side in box] for box in row["boxes"]]
            width, height = (int(row.get(side) or 0) for side in ("width", "height"))
            labels = [str(label) for label in row.get("labels") or ()]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{where}: not boxes of four numbers with sizes and labels ({error!r})") from error
        for box in corners:
            if len(box) != 4:
                raise InputError(f"{where}: a box has {len(box)} numbers instead of 4")
        if min(width, height) < 0:
            raise InputError(f"{where}: width and height must be positive, got {width} x {height}")
        self._rows[key] = Boxes.of(width, height, corners, row.get("confidences"), labels, where)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        boxes = sum(len(row.corners) for row in self._rows.values())
        return f"{boxes:,} boxes of {len(self):,} images: {self.name}"

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
        drawn = row.width or width, row.height or height
        ratio = (drawn[0] / drawn[1]) / (width / height)
        # a side rounded to whole pixels moves the ratio of a small copy
        if abs(ratio - 1) > _ASPECT + 1 / min(width, height):
            raise InputError(
                f"{where}: its boxes were drawn on {drawn[0]} x {drawn[1]} pixels, the image has {width} x {height}: "
                "another picture or another crop of it"
            )
        return replace(row, width=drawn[0], height=drawn[1]).scaled(width, height)

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
        return self._fingerprint


def _files(path: Path) -> list[Path]:
    if not is_there(path) or not (path.is_dir() or path.is_file()):
        raise InputError(f"boxes '{path}': no such file")
    if path.is_file():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in _PARQUET and not p.name.startswith("."))
    if not found:
        raise InputError(f"{path}: the folder holds no Parquet files of boxes")
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _rows(path: Path, content: bytes) -> Iterator[Any]:
    if path.suffix.lower() in _PARQUET:
        yield from _parquet_rows(path, content)
    elif path.suffix.lower() in _LINES:
        for number, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                yield parse_json(line, f"{path}, line {number}")
    else:
        values = parse_json(content, str(path))
        if isinstance(values, Mapping) and "images" in values and "annotations" in values:
            yield from _coco_rows(values, path)
        elif isinstance(values, Mapping):
            for key, row in values.items():
                yield {"key": key, **row} if isinstance(row, Mapping) else {"key": key, "boxes": row}
        elif isinstance(values, list):
            yield from values
        else:
            raise InputError(f"{path}: neither rows with 'key' and 'boxes' nor COCO instances")


def _parquet_rows(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(content))
        table.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: not readable as Parquet ({' '.join(str(error).split())[:200]})") from error
    names = set(_FIELDS) & set(table.column_names)
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
        if image["id"] in rows:
            raise InputError(f"{path}: the image id {image['id']!r:.50} comes more than once")
        size = {side: image.get(side) for side in ("width", "height")}
        rows[image["id"]] = {"key": image["file_name"], "boxes": [], "confidences": [], "labels": [], **size}
    if not rows:
        raise InputError(f"{path}: lists no images")
    unknown = 0
    for number, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, Mapping) or "bbox" not in annotation:
            hint = " (captions: take the file instances_*.json)" if "caption" in annotation else ""
            raise InputError(f"{path}: annotations[{number}] has no 'bbox'{hint}")
        try:
            row = rows.get(annotation.get("image_id"))
            if row is None or annotation.get("iscrowd"):
                unknown += row is None
                continue
            left, top, width, height = (float(value) for value in annotation["bbox"])
            score, name = float(annotation.get("score", 1.0)), str(names.get(annotation.get("category_id"), ""))
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{path}: annotations[{number}]: not an annotation with 'bbox' [left, top, width, height] ({error})"
            ) from error
        row["boxes"].append([left, top, left + width, top + height])
        row["confidences"].append(score)
        row["labels"].append(name)
    if unknown:
        _log.warning("%s: %d boxes are of images that it does not list, and left out", path, unknown)
    yield from rows.values()


def write_rows(path: Path, rows: Iterable[tuple[str, Boxes]], metadata: Mapping[str, str]) -> None:
    """Write boxes by key as one Parquet file that `BoxFile` reads, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    floats = pa.list_(pa.float32())
    types = (pa.string(), pa.int32(), pa.int32(), pa.list_(floats), floats, pa.list_(pa.string()))
    names = ("key", "width", "height", "boxes", "confidences", "labels")
    listed = [(key, b.width, b.height, b.corners.tolist(), b.confidence.tolist(), list(b.labels)) for key, b in rows]
    schema = pa.schema(list(zip(names, types, strict=True)), metadata=dict(metadata))
    table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in listed], schema=schema)
    with new_file(path) as temporary:
        pq.write_table(table, temporary)


def detect(
    source: PairSource,
    detector: Detector,
    folder: Path,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BoxFile:
    """Every image's boxes in `folder`, from there or from the detector. Images that cannot be read have no row.

    Raises InputError when the folder holds something else, or boxes of another detector or other images.
    """
    wanted = {"format": _FORMAT, "detector": detector.name, "detector_sha256": detector.fingerprint()}
    open_folder(folder, source, wanted)
    parts = [range(start, min(start + _IMAGES, len(source))) for start in range(0, len(source), _IMAGES)]
    for number, part in enumerate(parts):
        path = folder / f"part-{number:05d}.parquet"
        if path.exists():
            continue
        metadata = {"clipdistill": "proposals", "detector": str(wanted["detector"])}
        write_rows(path, _detected(source, part, detector, batch_size), metadata)
        progress(part.stop, len(source))
    boxes = BoxFile(folder)
    boxes.name = f"{detector.name} ({folder})"
    return boxes


def _detected(source: PairSource, part: range, detector: Detector, batch_size: int) -> list[tuple[str, Boxes]]:
    rows: list[tuple[str, Boxes]] = []
    waiting: list[tuple[str, Any]] = []

    def look() -> None:
        found = detector([image for _, image in waiting])
        rows.extend((key, boxes) for (key, _), boxes in zip(waiting, found, strict=True))
        waiting.clear()

    for index in part:
        try:
            waiting.append((source.key(index), source.image(index)))
        except BadSample:
            continue  # the run that uses the boxes meets it again, and lists and counts it
        if len(waiting) == batch_size:
            look()
    if waiting:
        look()
    return rows


def open_folder(folder: Path, source: PairSource, wanted: dict[str, Any]) -> None:
    """Make the folder, or check that what is there belongs to this detector and data."""
    path = folder / PROPOSALS
    described = {**wanted, "data": source.name, "data_sha256": source.fingerprint(), "images": len(source)}
    if path.exists():
        stored = read_json(path, "give a new folder, or remove this one")
        what = {"format": "another format", "detector_sha256": "another detector", "data_sha256": "other data"}
        for key, other in what.items():
            if stored.get(key) != described[key]:
                raise InputError(
                    f"{folder}: holds proposals of {other} ({stored.get('detector')} on {stored.get('data')}): "
                    "give a new folder, or remove this one"
                )
        return
    make_folder(folder, "boxes")
    if first_other(folder):
        raise InputError(f"{folder}: the folder is not empty and holds no proposals; give a new one")
    write_json(path, described, checked=True)
