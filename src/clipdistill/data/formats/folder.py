"""A folder of images with a text file of the same name beside each, one caption a line."""

from __future__ import annotations

from pathlib import Path

from clipdistill.data.captions import MISSING, clean_all
from clipdistill.data.files import collect, read_image_file, refuse_split
from clipdistill.data.formats import Format, Place
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.problems import BadSample, Problems


def _has_captions(place: Place) -> bool:
    return any((place.path / image).with_suffix(".txt").is_file() for image in place.images)


def open_folder(place: Place, config: DataConfig, default_split: str | None) -> PairSource:
    """Pairs in the order of their paths, which are the keys."""
    folder, problems, entries = place.path, Problems(), []
    refuse_split(config.split, folder)
    for name in place.images:
        try:
            text = read_image_file(folder / Path(name).with_suffix(".txt"))
            lines = text.decode("utf-8-sig", errors="surrogateescape").splitlines()
        except BadSample:
            problems.add(MISSING, name)
            lines = []
        # blank lines separate captions, they are not captions
        entries.append((name, clean_all([line for line in lines if line.strip()], name, problems)))
    return collect(folder.resolve().name, entries, folder, problems, config.max_pixels, folder)


FORMAT = Format(_has_captions, open_folder)
