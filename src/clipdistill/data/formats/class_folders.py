"""Classification sets as a folder per class: ImageNet's family, SUN397, EuroSAT, Caltech-101, own ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipdistill.data.class_names import class_labels, imagenet_wnids
from clipdistill.data.files import IMAGE_SUFFIXES, UNREAD, is_url, read_image_file, refuse_split, unread_ending, walk
from clipdistill.data.formats import Format, Place
from clipdistill.data.labelled import LabelledConfig, LabelledSource, OwnNames
from clipdistill.data.pairs import Strings
from clipdistill.data.problems import Problems
from clipdistill.errors import InputError, nearest

_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def _is_class_folder(place: Place) -> bool:
    """Folders that all hold images, none of them in the folder itself, without caption files."""
    splits = {alias for aliases in _SPLITS.values() for alias in aliases}
    found = 0
    for entry in sorted(place.path.iterdir()):
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if entry.is_file() and entry.suffix.lower() in IMAGE_SUFFIXES | {".csv", ".tsv", ".parquet", ".jsonl"}:
            return False
        # what cannot be listed is told when the set is opened
        if entry.is_dir() and (is_url(place.path) or os.access(entry, os.R_OK | os.X_OK)):
            first = _first_image(entry)
            if first is None or first.with_suffix(".txt").exists():
                return False
            # train/0001.jpg is a split of something else (as is images/0001.jpg), train/cat/0001.jpg a class in a split
            if entry.name.lower() in {*splits, "images"} and first.parent == entry:
                return False
            found += 1
    return found > 0


def _first_image(folder: Path) -> Path | None:
    found = ((here, file) for here, _, files in walk(folder) for file in files)
    return next((folder / here / file for here, file in found if Path(file).suffix.lower() in IMAGE_SUFFIXES), None)


class FolderLabels(LabelledSource):
    """Image files in folders named after their classes; keys are paths below `root`."""

    def __init__(
        self, root: Path, paths: Sequence[str], labels: Sequence[int], class_labels: Sequence[str], **rest: Any
    ):
        super().__init__(root.name, paths, labels, class_labels, **rest)
        self._root = root if is_url(root) else str(root)
        self._paths = Strings.pack(paths)

    def _bytes(self, i: int) -> bytes:
        root = self._root
        return read_image_file(f"{root}/{self._paths[i]}" if isinstance(root, str) else root / self._paths[i])


def open_folders(place: Place, config: LabelledConfig) -> FolderLabels:
    """The images of the class folders (of one split, where the folders above are named after splits)."""
    root = _split_folder(place.path, config.split)
    below = Place(root)
    images = below.images
    if not images:
        raise InputError(f"labelled data '{root}': the folder holds no images")
    if not any("/" in image for image in images):
        raise InputError(f"labelled data '{root}': the {len(images)} images lie in no class folders")
    if below.unlisted:
        raise InputError(f"labelled data '{root}': {below.unlisted}: a set without one of its classes is another set")
    problems = Problems()
    below.count_passed_over(problems)
    tops = {image.split("/", 1)[0] for image in images if "/" in image}
    # SUN397 sorts its classes into folders of one letter: a/abbey, a/apartment_building/outdoor
    lettered = all(len(top) == 1 and top.isalpha() for top in tops)
    kept, folders = [], []
    for image in images:
        if "/" not in image:
            problems.add("image outside the class folders", image, dropped=True)
        elif unread_ending(image):
            problems.add(f"{UNREAD}: {unread_ending(image)}", image, dropped=True)
        else:
            kept.append(image)
            folders.append(image.rsplit("/", 1)[0] if lettered else image.split("/", 1)[0])
    for entry in sorted(root.iterdir()):
        if entry.name not in tops and entry.is_dir() and not entry.is_symlink() and entry.name[0] not in "._":
            problems.add("class folder without images", entry.name)
    index, names = _match_folders(sorted(set(folders)), config.known, config.classes, root)
    return FolderLabels(root, kept, [index[folder] for folder in folders], names, problems=problems, **config.common)


def _split_folder(root: Path, split: str | None) -> Path:
    """The folder of the asked split, where folders are named after splits."""
    folders = {entry.name.lower(): entry for entry in sorted(root.iterdir()) if entry.is_dir()}
    by_split = {name: folders[alias] for name, aliases in _SPLITS.items() for alias in aliases if alias in folders}
    if not by_split or len(by_split) < len(folders):
        refuse_split(split, root)
        return root
    if split is None and len(by_split) == 1:
        return next(iter(by_split.values()))
    if split is None:
        raise InputError(
            f"labelled data '{root}' holds the splits {', '.join(by_split)}: name one with split=, or its folder"
        )
    if split not in by_split:
        raise InputError(f"labelled data '{root}' has no split '{split}'{nearest(split, by_split)}")
    return by_split[split]


def _match_folders(
    stored: Sequence[str], known: str | None, own_names: OwnNames, root: Path
) -> tuple[dict[str, int], list[str]]:
    """(label of each folder, class labels or names in label order) for the class folders found."""
    numbered = all(folder.isdecimal() for folder in stored)
    if isinstance(own_names, dict):
        missing = next((folder for folder in stored if folder not in own_names), None)
        if missing is not None:
            raise InputError(f"the class names have none for the folder '{missing}' of '{root}'")
        order = list(own_names)
        return {folder: order.index(folder) for folder in stored}, list(own_names.values())
    if own_names is None and known is not None:
        expected = class_labels(known)
        if numbered:
            return _by_number(stored, list(expected), root)
        alike = {label.strip("/").lower(): k for k, label in enumerate(expected)}
        if known == "caltech101" and "BACKGROUND_Google" not in stored:
            expected = expected[1:]
            alike = {label.lower(): k for k, label in enumerate(expected)}
        unknown = next((folder for folder in stored if folder.lower() not in alike), None)
        if unknown is not None:
            raise InputError(f"'{root}': the folder '{unknown}' is no class of {known}{nearest(unknown, expected)}")
        return {folder: alike[folder.lower()] for folder in stored}, list(expected)
    if own_names is None:
        if numbered and len(stored) == 1000:
            # ImageNet-V2 names its folders by class number
            return _by_number(stored, list(imagenet_wnids()), root)
        return {folder: k for k, folder in enumerate(stored)}, list(stored)
    if numbered:
        return _by_number(stored, own_names, root)
    if len(own_names) != len(stored):
        raise InputError(
            f"'{root}' has {len(stored)} class folders, but {len(own_names)} class names are given: a list must name "
            "each folder in sorted order; a JSON mapping of folder to name is safer"
        )
    return {folder: k for k, folder in enumerate(stored)}, own_names


def _by_number(stored: Sequence[str], names: list[str], root: Path) -> tuple[dict[str, int], list[str]]:
    outside = next((folder for folder in stored if int(folder) >= len(names)), None)
    if outside is not None:
        raise InputError(f"'{root}': the folder '{outside}' is beyond the {len(names)} class names")
    return {folder: int(folder) for folder in stored}, names


FORMAT = Format(lambda place: place.is_folder, open_folders, surely=_is_class_folder)
