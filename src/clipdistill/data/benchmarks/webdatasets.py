"""CLIP_benchmark's WebDataset layout, in which the VTAB+ sets are given out (hub: clip-benchmark/wds_NAME).

    SET/classnames.txt, SET/zeroshot_classification_templates.txt, SET/test/nshards.txt, SET/test/0.tar, ...

Samples are a picture and its class (.cls); where SET/dataset_type.txt says 'multilabel', a picture and a .npy with 0 or
1 for each class; where it says 'retrieval', a picture and a .txt with one caption a line. Class names and templates are
used as they are written: they are what published scores were made with.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from clipdistill.data.class_names import KNOWN_SETS
from clipdistill.data.formats import Place
from clipdistill.data.formats.class_tars import open_class_tars
from clipdistill.data.formats.tar_index import LINES
from clipdistill.data.formats.tars import open_tars
from clipdistill.data.labelled import LabelledConfig, LabelledSource, read_class_file
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.templates import check_templates
from clipdistill.errors import InputError, nearest
from clipdistill.runtime.files import read_text, text_lines

_CLASSES, _TEMPLATES, _TYPE, _COUNT = (
    "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt", "nshards.txt",
)  # fmt: skip
_SPLITS = ("test", "val", "train")


def is_layout(folder: Path) -> bool:
    """Whether a folder is a set in this layout: a folder of a split with its number of shards."""
    return any((folder / split / _COUNT).is_file() for split in _SPLITS)


def is_retrieval(folder: Path) -> bool:
    """Whether the set is of image-caption pairs."""
    return _kind(folder) == "retrieval"


def _kind(folder: Path) -> str:
    return read_text(folder / _TYPE).strip().lower() if (folder / _TYPE).is_file() else "classification"


def _shards(folder: Path, asked: str | None) -> tuple[Place, str]:
    """(the shards of the split, its name). Raises InputError where the split or one of its shards is missing."""
    there = [split for split in _SPLITS if (folder / split / _COUNT).is_file()]
    split = asked or there[0]
    if split not in there:
        raise InputError(f"'{folder}' has no split '{split}'{nearest(split, there)}")
    counted = read_text(folder / split / _COUNT).strip()
    if not counted.isdecimal() or not 0 < int(counted) < 1_000_000:
        raise InputError(f"{folder / split / _COUNT}: {counted[:20]!r} is no number of shards")
    last = int(counted) - 1
    missing = next((k for k in range(last + 1) if not (folder / split / f"{k}.tar").is_file()), None)
    if missing is not None:
        raise InputError(f"'{folder / split}' is not whole: {counted} shards, and '{missing}.tar' is not there")
    return Place(str(folder / split / (f"{{0..{last}}}.tar" if last else "0.tar"))), split


def _name(folder: Path) -> str:
    return folder.resolve().name.removeprefix("wds_") if isinstance(folder, Path) else folder.name


def open_classes(place: Place, config: LabelledConfig) -> LabelledSource:
    """The pictures of one split (the test split, where none is named), with the set's own names and templates."""
    folder = place.path
    if (kind := _kind(folder)) not in ("classification", "multilabel"):
        raise InputError(f"'{folder}' is a {kind[:20]} set: classification, multilabel and retrieval sets are measured")
    shards, split = _shards(folder, config.split)
    own, naming = config.classes, config.naming
    if own is None and (folder / _CLASSES).is_file():
        own, naming = read_class_file(folder / _CLASSES), "stored"
    config = replace(config, path=str(shards), classes=own, naming=naming, split=None)
    source = open_class_tars(shards, config, several=kind == "multilabel")
    source.name = f"{_name(folder)}/{split}"
    if (folder / _TEMPLATES).is_file():
        source.templates = check_templates(text_lines(folder / _TEMPLATES), str(folder / _TEMPLATES))
    elif source.known:
        source.templates = KNOWN_SETS[source.known].templates
    return source


def open_retrieval(place: Place, config: DataConfig, default_split: str | None) -> PairSource:
    """The pairs of one split (test, where none is named), several captions a picture."""
    there = [split for split in _SPLITS if (place.path / split / _COUNT).is_file()]
    shards, split = _shards(place.path, config.split or (default_split if default_split in there else None))
    changes = {"path": str(shards), "split": None, "caption_column": LINES}
    source = open_tars(shards, config.model_copy(update=changes), None)
    source.name = f"{_name(place.path)}/{split}"
    return source
