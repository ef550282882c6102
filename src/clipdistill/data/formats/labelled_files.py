"""Classification sets in files: a folder per class, numpy .npz archives, tars with .cls members."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipdistill.data.class_names import class_labels, imagenet_wnids
from clipdistill.data.files import IMAGE_SUFFIXES, is_there, local_path, read_image_file
from clipdistill.data.formats.folder import list_images
from clipdistill.data.formats.tar_headers import DamagedTar, Member, looks_like_tar, members
from clipdistill.data.labelled import LabelledSource, Naming, read_class_file
from clipdistill.data.pairs import Strings
from clipdistill.data.problems import BadSample, Problems
from clipdistill.errors import InputError, nearest

OwnNames = list[str] | dict[str, str] | None
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_IMAGES = ("jpg", "jpeg", "png", "webp")
_CLASS_FILES = ("classes.json", "classnames.json", "classnames.txt", "classes.txt")


def open_files(
    path: str, known: str | None, own_names: OwnNames, naming: Naming, split: str | None, max_pixels: int
) -> LabelledSource:
    """See labelled.open_labelled."""
    place = local_path(path)
    there = is_there(place)
    if not there and "{" in path:
        from clipdistill.data.formats.tars import expand_braces

        shards = [local_path(name) for name in expand_braces(path)]
        return _open_tars(shards, place.name, known, own_names, naming, split, max_pixels)
    if not there:
        raise InputError(f"labelled data '{path}': no such file or folder")
    if place.is_dir():
        tars = sorted(entry for entry in place.iterdir() if entry.suffix.lower() == ".tar")
        if tars:
            return _open_tars(tars, place.name, known, own_names, naming, split, max_pixels)
        return _open_folder(place, known, own_names, naming, split, max_pixels)
    if zipfile.is_zipfile(place):
        _refuse_split(split, place)
        return ArrayLabels(place, known, own_names, naming)
    with place.open("rb") as file:
        head = file.read(512)
    if looks_like_tar(head):
        return _open_tars([place], place.stem, known, own_names, naming, split, max_pixels)
    raise InputError(
        f"labelled data '{path}': expected a folder per class, a numpy .npz archive or a tar with .cls members"
    )


def looks_labelled(name: str) -> bool:
    """Whether a path holds a classification set, as far as a quick look tells; False for what does not exist."""
    try:
        place = local_path(name)
        if "{" in name and not place.exists():
            from clipdistill.data.formats.tars import expand_braces

            place = local_path(expand_braces(name)[0])
        if place.is_dir():
            tars = sorted(entry for entry in place.iterdir() if entry.suffix.lower() == ".tar")
            return _has_classes(tars[0]) if tars else _is_class_folder(place)
        if not place.is_file():
            return False
        if zipfile.is_zipfile(place):
            with zipfile.ZipFile(place) as archive:
                return {"images.npy", "labels.npy"} <= set(archive.namelist())
        return _has_classes(place)
    except Exception:  # zipfile raises almost any type on damaged archives
        return False


def _has_classes(path: Path) -> bool:
    """Whether one of an archive's first members is a .cls file."""
    with path.open("rb") as file:
        if not looks_like_tar(file.read(512)):
            return False
        try:
            return any(m.name.endswith(".cls") for m, _ in zip(members(file, path.stat().st_size), range(20)))
        except DamagedTar:
            return False


def _is_class_folder(place: Path) -> bool:
    """Folders that all hold images, none of them in the folder itself, without caption files."""
    splits = {alias for aliases in _SPLITS.values() for alias in aliases}
    found = 0
    for entry in sorted(place.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_file() and entry.suffix.lower() in IMAGE_SUFFIXES | {".csv", ".tsv", ".parquet"}:
            return False
        if entry.is_dir():
            first = _first_image(entry)
            if first is None or first.with_suffix(".txt").exists():
                return False
            # train/0001.jpg is a split of something else, train/cat/0001.jpg is a class in a split
            if entry.name.lower() in splits and first.parent == entry:
                return False
            found += 1
    return found > 0


def _first_image(folder: Path) -> Path | None:
    for current, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            if Path(file).suffix.lower() in IMAGE_SUFFIXES:
                return Path(current, file)
    return None


def _refuse_split(split: str | None, where: Path | str) -> None:
    if split not in (None, "all"):
        raise InputError(f"{where} has no splits: leave split='{split}' out")


class FolderLabels(LabelledSource):
    """Image files in folders named after their classes; keys are paths below `root`."""

    def __init__(
        self, root: Path, paths: Sequence[str], labels: Sequence[int], class_labels: Sequence[str], **rest: Any
    ):
        super().__init__(root.name, paths, labels, class_labels, **rest)
        self._root = str(root)
        self._paths = Strings.pack(paths)

    def _bytes(self, i: int) -> bytes:
        return read_image_file(f"{self._root}/{self._paths[i]}")


def _open_folder(
    root: Path, known: str | None, own_names: OwnNames, naming: Naming, split: str | None, max_pixels: int
) -> FolderLabels:
    root = _split_folder(root, split)
    images = list_images(root)
    if not images:
        raise InputError(f"labelled data '{root}': the folder holds no images")
    if not any("/" in image for image in images):
        raise InputError(f"labelled data '{root}': the {len(images)} images lie in no class folders")
    problems = Problems()
    tops = {image.split("/", 1)[0] for image in images if "/" in image}
    # SUN397 sorts its classes into folders of one letter: a/abbey, a/apartment_building/outdoor
    lettered = all(len(top) == 1 and top.isalpha() for top in tops)
    kept, folders = [], []
    for image in images:
        if "/" not in image:
            problems.add("image outside the class folders", image, dropped=True)
            continue
        kept.append(image)
        folders.append(image.rsplit("/", 1)[0] if lettered else image.split("/", 1)[0])
    stored = sorted(set(folders))
    index, class_names_ = _match_folders(stored, known, own_names, root)
    if own_names is not None:
        naming = "stored"
    labels = [index[folder] for folder in folders]
    return FolderLabels(
        root, kept, labels, class_names_, problems=problems, naming=naming, known=known, max_pixels=max_pixels
    )


def _split_folder(root: Path, split: str | None) -> Path:
    """The folder of the asked split, where folders are named after splits."""
    folders = {entry.name.lower(): entry for entry in sorted(root.iterdir()) if entry.is_dir()}
    by_split = {name: folders[alias] for name, aliases in _SPLITS.items() for alias in aliases if alias in folders}
    if not by_split or len(by_split) < len(folders):
        _refuse_split(split, root)
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


class ArrayLabels(LabelledSource):
    """A numpy archive with `images` (N, H, W, 3) uint8, `labels` (N,) and `classnames`; `filenames` become the keys.

    The pixels are loaded when first asked for, once per process.
    """

    def __init__(self, path: Path, known: str | None, own_names: OwnNames, naming: Naming) -> None:
        self._path = path
        self._pixels: NDArray[np.uint8] | None = None
        with self._archive() as archive:
            for wanted in ("images", "labels"):
                if wanted not in archive.files:
                    raise InputError(
                        f"'{path}': no array '{wanted}' in it (found {', '.join(archive.files) or 'nothing'})"
                    )
            labels = self._array(archive, "labels")
            names = own_names
            if names is None and "classnames" in archive.files:
                names = self._texts(archive, "classnames")
            has_files = "filenames" in archive.files
            keys = self._texts(archive, "filenames") if has_files else []
        if not isinstance(names, list):
            raise InputError(f"'{path}': no class names (array 'classnames'): give them as a list with classes=FILE")
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise InputError(f"'{path}': labels must be whole numbers in one row, got {labels.dtype} {labels.shape}")
        if has_files and len(set(keys)) != len(labels):
            raise InputError(f"'{path}': {len(labels)} labels but {len(set(keys))} different filenames")
        self._numbered = not has_files
        keys = keys or [f"{k:06d}" for k in range(len(labels))]
        super().__init__(path.stem, keys, labels, names, naming=naming, known=known)
        shape = self._shape()
        if len(shape) != 4 or shape[0] != len(labels) or shape[3] != 3 or 0 in shape:
            raise InputError(f"'{path}': images must be uint8 of shape ({len(labels)}, height, width, 3), got {shape}")

    def _archive(self) -> Any:
        try:
            return np.load(self._path, allow_pickle=False)
        except Exception as error:  # zipfile and numpy raise almost any type on damaged archives
            raise InputError(f"'{self._path}': not readable as a numpy archive ({_words(error)})") from error

    def _array(self, archive: Any, name: str) -> NDArray[Any]:
        try:
            result: NDArray[Any] = archive[name]
        except Exception as error:  # as above; ValueError: an array of Python objects
            raise InputError(f"'{self._path}': the array '{name}' cannot be read ({_words(error)})") from error
        return result

    def _texts(self, archive: Any, name: str) -> list[str]:
        array = self._array(archive, name)
        if array.ndim != 1:
            raise InputError(f"'{self._path}': '{name}' must be texts in one row, got the shape {array.shape}")
        return [str(text) for text in array.tolist()]

    def _shape(self) -> tuple[int, ...]:
        return self._load().shape if self._load().dtype == np.uint8 else ()

    def _load(self) -> NDArray[np.uint8]:
        if self._pixels is None:
            with self._archive() as archive:
                self._pixels = self._array(archive, "images")
        return self._pixels

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        self._check(i)
        return Image.fromarray(self._load()[i])

    def _bytes(self, i: int) -> bytes:
        raise BadSample("pixels are stored as they are, not encoded", self.key(i))

    def _hash_content(self, digest: hashlib._Hash) -> None:
        if self._numbered:
            digest.update(np.ascontiguousarray(self._load()).data)


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class TarLabels(LabelledSource):
    """Samples of tars: an image and a .cls each; keys are '<shard>/<sample>'."""

    def __init__(self, shards: Sequence[Path], places: Sequence[tuple[int, int, int]], *arguments: Any, **rest: Any):
        super().__init__(*arguments, **rest)
        self._shards = [str(shard) for shard in shards]
        self._places = np.array(places, dtype=np.int64).reshape(-1, 3)

    def _bytes(self, i: int) -> bytes:
        shard, offset, size = (int(value) for value in self._places[i])
        try:
            with open(self._shards[shard], "rb") as file:  # noqa: PTH123 - a Path costs more than the read
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise BadSample(f"unreadable shard: {self._shards[shard]}: {error.strerror or error}") from error


def _open_tars(
    shards: Sequence[Path],
    name: str,
    known: str | None,
    own_names: OwnNames,
    naming: Naming,
    split: str | None,
    max_pixels: int,
) -> TarLabels:
    _refuse_split(split, name)
    if own_names is None:
        own_names, naming = _names_beside(shards[0], known, naming)
    if not isinstance(own_names, list):
        raise InputError(f"{name}: class names of tars are a list in label order, not a mapping of folders")
    problems = Problems()
    keys: list[str] = []
    labels: list[int] = []
    places: list[tuple[int, int, int]] = []
    for number, shard in enumerate(shards):
        if not shard.is_file():
            raise InputError(f"labelled data: the shard '{shard}' does not exist")
        prefix = shard.stem if len(shards) > 1 else ""
        for stem, components, cls in _samples(shard, problems):
            key = f"{prefix}/{stem}" if prefix else stem
            image = next((components[kind] for kind in _IMAGES if kind in components), None)
            if image is None or cls is None:
                problems.add("sample without image" if image is None else "sample without label", key, dropped=True)
                continue
            try:
                label = int(np.int64(int(cls)))
            except (ValueError, OverflowError):
                raise InputError(f"'{shard}': the label of '{stem}' is {cls[:20]!r}, not a whole number") from None
            keys.append(key)
            labels.append(label)
            places.append((number, image.offset, image.size))
    return TarLabels(
        *(shards, places, name, keys, labels, own_names),
        problems=problems,
        naming=naming,
        known=known,
        max_pixels=max_pixels,
    )


def _samples(shard: Path, problems: Problems) -> list[tuple[str, dict[str, Member], str | None]]:
    """(name, members by component, text of the .cls member) of every sample, in the order of their first members."""
    samples: dict[str, dict[str, Member]] = {}
    with shard.open("rb") as file:
        try:
            for member in members(file, shard.stat().st_size):
                folder, _, file_name = member.name.rpartition("/")
                stem, _, component = file_name.partition(".")
                samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[component.lower()] = member
        except DamagedTar as error:
            problems.add(str(error), shard.name)
        result = []
        for stem, components in samples.items():
            cls = components.get("cls") or components.get("cls.txt")
            text = None
            if cls is not None and cls.size <= 32:
                file.seek(cls.offset)
                text = file.read(cls.size).decode("ascii", errors="replace").strip()
            if cls is not None or any(kind in components for kind in _IMAGES):
                result.append((stem, components, text))
    return result


def _names_beside(shard: Path, known: str | None, naming: Naming) -> tuple[OwnNames, Naming]:
    """Class names for tars: of the declared set, else from a file beside the shard or one folder above."""
    if known is not None:
        return list(class_labels(known)), naming
    for folder in (shard.parent, shard.parent.parent):
        for name in _CLASS_FILES:
            if (folder / name).is_file():
                return read_class_file(folder / name, wnids=naming == "readable"), naming
    raise InputError(
        f"'{shard}': no class names: neither {' nor '.join(_CLASS_FILES)} lies beside it; give them with classes=FILE"
    )
