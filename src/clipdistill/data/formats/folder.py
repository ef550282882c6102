"""A folder of images with a text file of the same name beside each, one caption a line."""

from __future__ import annotations

import os
from pathlib import Path

from clipdistill.data.captions import MISSING, clean_all
from clipdistill.data.files import IMAGE_SUFFIXES, collect, read_image_file
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.problems import BadSample, Problems
from clipdistill.errors import InputError


def list_images(folder: Path) -> list[str]:
    """Paths of the image files below `folder`, relative to it, sorted."""
    found = []
    for current, folders, files in os.walk(folder):
        folders.sort()
        found += [Path(current, file).relative_to(folder).as_posix() for file in files if _is_image(file)]
    return sorted(found)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")  # noqa: PTH122


def open_folder(folder: Path, images: list[str], config: DataConfig) -> PairSource:
    """Pairs in the order of their paths, which are the keys."""
    if config.split not in (None, "all"):
        raise InputError(f"{folder} is a plain folder without splits: leave split='{config.split}' out")
    problems = Problems()
    entries = []
    for name in images:
        text = folder / Path(name).with_suffix(".txt")
        try:
            lines = read_image_file(text).decode("utf-8-sig", errors="surrogateescape").splitlines()
        except BadSample:
            problems.add(MISSING, name)
            lines = []
        # blank lines separate captions, they are not captions
        entries.append((name, clean_all([line for line in lines if line.strip()], name, problems)))
    return collect(folder.resolve().name, entries, folder, problems, config.max_pixels, folder)
