"""Classification sets by name ('cifar10', 'wds/cars'), and folders in torchvision's or CLIP_benchmark's layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from clipdistill.data.benchmarks.places import absent, folder_of, named, source_of, sources
from clipdistill.data.benchmarks.webdatasets import is_layout, is_retrieval, open_classes, open_retrieval
from clipdistill.data.files import one_split
from clipdistill.data.formats import Format, Place
from clipdistill.data.labelled import LabelledConfig, LabelledSource
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.errors import InputError


def _torchvision(folder: Path) -> str | None:
    """The set whose files, as torchvision lays them out, are in the folder."""
    return next((n for n, about in sources().items() if about.holds and (folder / about.holds).exists()), None)


def _arrays(place: Place) -> list[Path]:
    """The .npz files of a folder that holds nothing else to read (no pictures, tars or tables)."""
    found = place.with_ending(".npz")
    return found if found and not any(entry.is_dir() for entry in place.path.iterdir()) else []


def _is_labelled(place: Place) -> bool:
    if place.is_folder:
        if is_layout(place.path):
            return not is_retrieval(place.path)
        return bool(_torchvision(place.path) or _arrays(place))
    asked = None if place.there else named(place)
    return asked is not None and not (folder_of(asked[0]).is_dir() and is_retrieval(folder_of(asked[0])))


def _folder(name: str) -> Path:
    """The folder of a named set. Raises InputError that says how to bring it where it is not there."""
    folder = folder_of(name)
    if not folder.is_dir() or not any(e.is_dir() or e.suffix in (".npz", ".tar") for e in folder.iterdir()):
        raise absent(name)
    return folder


def _check(place: Place) -> None:
    if asked := named(place):
        _folder(asked[0])


def open_named(place: Place, config: LabelledConfig) -> LabelledSource:
    """The set of this name or in this folder; a split is named behind a colon, else it is the test split."""
    folder, known = place.path, config.known
    if not place.there:
        name, split = named(place) or (str(place), None)
        folder, known = _folder(name), known or (name if name in sources() else None)
        config = replace(config, path=str(folder), known=known, split=one_split(config.split, split, str(place)))
        place = Place(str(folder))
    if is_layout(folder):
        return open_classes(place, config)
    if of_torchvision := _torchvision(folder):
        from clipdistill.data.formats.labelled_libraries import open_torchvision

        return open_torchvision(Place(f"torchvision:{source_of(of_torchvision).torchvision}@{folder}"), config)
    if arrays := _arrays(place):
        return _open_arrays(arrays, config, folder)
    from clipdistill.data.formats.class_folders import FORMAT as FOLDERS
    from clipdistill.data.formats.class_tars import FORMAT as TARS

    reader: Any = TARS if TARS.matches(place) else FOLDERS
    if reader is FOLDERS and config.split is None:  # the split that is measured on, where there are several
        below = {entry.name for entry in folder.iterdir() if entry.is_dir()}
        config = replace(config, split=next((split for split in ("test", "val") if split in below), None))
    return reader.open(place, config)


def _open_arrays(files: list[Path], config: LabelledConfig, folder: Path) -> LabelledSource:
    """The one archive, or the one with the split in its name."""
    from clipdistill.data.formats.arrays import FORMAT

    split = config.split or "test"
    fitting = [file for file in files if split in file.stem.lower()] if len(files) > 1 or config.split else files
    if len(fitting) != 1:
        listed = ", ".join(file.name for file in files)
        raise InputError(f"'{folder}' holds {listed}: {len(fitting)} of them are called '{split}', name the file")
    return FORMAT.open(Place(str(fitting[0])), replace(config, split=None))


def _is_pairs(place: Place) -> bool:
    if place.is_folder:
        return is_layout(place.path) and is_retrieval(place.path)
    asked = None if place.there else named(place)
    return asked is not None and folder_of(asked[0]).is_dir() and is_retrieval(folder_of(asked[0]))


def open_named_pairs(place: Place, config: DataConfig, default_split: str | None) -> PairSource:
    """The image-caption pairs of a set of CLIP_benchmark's tars, by name or by folder."""
    if not place.there:
        name, split = named(place) or (str(place), None)
        place = Place(str(folder_of(name)))
        config = config.model_copy(update={"split": one_split(config.split, split, name)})
    return open_retrieval(place, config, default_split)


LABELLED = Format(_is_labelled, open_named, check=_check)
PAIRS = Format(_is_pairs, open_named_pairs)
