"""Classification sets in one numpy archive."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipdistill.data.files import refuse_split, to_read
from clipdistill.data.formats import Format, Place
from clipdistill.data.labelled import LabelledConfig, LabelledSource
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError


class ArrayLabels(LabelledSource):
    """A numpy archive with `images` (N, H, W, 3) uint8, `labels` (N,) and `classnames`; `filenames` become the keys.

    The pixels are loaded when first asked for, once per process.
    """

    def __init__(self, path: Path, config: LabelledConfig) -> None:
        self._path = path
        self._pixels: NDArray[np.uint8] | None = None
        with self._archive() as archive:
            for wanted in ("images", "labels"):
                if wanted not in archive.files:
                    raise InputError(
                        f"'{path}': no array '{wanted}' in it (found {', '.join(archive.files) or 'nothing'})"
                    )
            labels = self._array(archive, "labels")
            names = config.classes
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
        super().__init__(path.stem, keys, labels, names, **config.common)
        shape = self._shape()
        if len(shape) != 4 or shape[0] != len(labels) or shape[3] != 3 or 0 in shape:
            raise InputError(f"'{path}': images must be uint8 of shape ({len(labels)}, height, width, 3), got {shape}")

    def _archive(self) -> Any:
        try:
            archive = np.load(to_read(self._path), allow_pickle=False)
            if len(set(archive.files)) < len(archive.files):  # one array alone has none
                raise ValueError("an array stands in it twice")
            return archive
        except Exception as error:  # zipfile and numpy raise almost any type on damaged archives
            raise InputError(f"'{self._path}': not readable as a numpy archive ({_words(error)})") from error

    def _array(self, archive: Any, name: str) -> NDArray[Any]:
        try:
            result: NDArray[Any] = archive[name]
        except Exception as error:  # as above; ValueError: an array of Python objects
            raise InputError(f"'{self._path}': the array '{name}' cannot be read ({_words(error)})") from error
        if not isinstance(result, np.ndarray):  # numpy gives the bytes of a member that is no array
            raise InputError(f"'{self._path}': '{name}' is no array")
        return result

    def _texts(self, archive: Any, name: str) -> list[str]:
        array = self._array(archive, name)
        if array.ndim != 1:
            raise InputError(f"'{self._path}': '{name}' must be texts in one row, got the shape {array.shape}")
        if array.dtype.kind not in "USiu":
            raise InputError(f"'{self._path}': '{name}' must be texts, got {array.dtype}")
        try:
            return [text.decode("utf-8") if isinstance(text, bytes) else str(text) for text in array.tolist()]
        except UnicodeDecodeError as error:
            raise InputError(f"'{self._path}': '{name}' holds bytes that are not UTF-8") from error

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


def open_arrays(place: Place, config: LabelledConfig) -> ArrayLabels:
    """The images and labels of an archive."""
    refuse_split(config.split, place)
    return ArrayLabels(place.path, config)


def _holds_labels(place: Place) -> bool:
    with zipfile.ZipFile(to_read(place.path)) as archive:
        return {"images.npy", "labels.npy"} <= set(archive.namelist())


FORMAT = Format(lambda at: bool(at.head) and zipfile.is_zipfile(to_read(at.path)), open_arrays, surely=_holds_labels)
