"""A detector's boxes of a data set, computed once: a folder of Parquet files that `BoxFile` reads.

    detect(source, detector, folder)     looks at the images that are not there yet; an interrupted call is continued

`proposals.json` names the detector and the data by fingerprint; another detector, or other images, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipdistill.data.pairs import PairSource
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError
from clipdistill.regions.box_file import BoxFile, write_rows
from clipdistill.regions.boxes import Boxes, Detector
from clipdistill.runtime.files import make_folder, read_json, remove_leftovers, write_json

FORMAT = 1
MANIFEST = "proposals.json"
_PART = 512
"""Images a file: what an interruption loses at most."""


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
    wanted = {"format": FORMAT, "detector": detector.name, "detector_sha256": detector.fingerprint()}
    open_folder(folder, source, wanted)
    parts = [range(start, min(start + _PART, len(source))) for start in range(0, len(source), _PART)]
    for number, part in enumerate(parts):
        path = folder / f"part-{number:05d}.parquet"
        if path.exists():
            continue
        remove_leftovers(folder, path.name)
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
    path = folder / MANIFEST
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
    if any(folder.iterdir()):
        raise InputError(f"{folder}: the folder is not empty and holds no proposals; give a new one")
    write_json(path, described)
