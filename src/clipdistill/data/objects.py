"""Objects of the user's program as image-caption pairs: a list, a torch Dataset, or anything with the methods of one.

An object has a length and gives either items, (image, caption or captions) or {"image": ..., "caption" or "captions"
or "text": ..., "key": ...}, or the methods `key(i)`, `captions(i)` and `image(i)` or `image_bytes(i)` of a PairSource.
A DataFrame is its rows, with such columns. An image is a picture of PIL, a uint8 array (H, W), (H, W, 3) or (H, W, 4),
a uint8 torch tensor (C, H, W), the bytes of an image file, or its path.

Captions and keys are read once, when the object is given, and make its fingerprint, which is a part of its name: a run
that is continued with an object of other captions is refused. Images are asked for again whenever they are needed.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from clipdistill.data.captions import clean_all
from clipdistill.data.files import read_image_file
from clipdistill.data.formats import Place
from clipdistill.data.formats.forms import OBJECT_PREFIX
from clipdistill.data.images import MAX_PIXELS, as_rgb, decode
from clipdistill.data.pairs import DataConfig, IndexedPairs, PairSource
from clipdistill.data.problems import BadSample, Problems
from clipdistill.errors import ClipdistillError, InputError
from clipdistill.registry import describe

_PROBES = 8  # items that are asked for a second time
_CAPTIONS = ("captions", "caption", "text")
_held: dict[str, PairSource] = {}
"""Objects of this process by the name that stands for them in a DataConfig."""


class _NoItem(ValueError):
    """What an object gave is no item; the text says what it is."""


def hold(data: Any) -> str:
    """The name by which `open_pairs` finds this object as long as the process lives ('object:MyPairs@3f2a...').

    It ends in the object's fingerprint, so it is the same in another process for the same captions and keys.
    Raises InputError for an object that is no set of image-caption pairs.
    """
    source = as_pairs(data)
    name = f"{OBJECT_PREFIX}{source.name}@{source.fingerprint()[:16]}"
    _held[name] = source
    return name


def open_held(place: Place, config: DataConfig, default_split: str | None) -> PairSource:
    """The object of this process that goes by this name. Raises InputError in a process that does not have it."""
    if place not in _held:
        name = place.removeprefix(OBJECT_PREFIX).partition("@")[0]
        raise InputError(
            f"'{place}' was an object of the program that named it ({name}): give the same object again, as in  "
            f"clipdistill.distill({{..., 'data': {name.lower()}}}),  or register a format that opens it by its name"
        )
    return _limited(_held[place], config.max_pixels)


def _limited(source: PairSource, max_pixels: int) -> PairSource:
    """The source with this limit of the run's settings; the program's own object stays as it is."""
    if source.max_pixels == max_pixels:
        return source
    limited = copy.copy(source)
    limited.max_pixels = max_pixels
    return limited


def as_pairs(data: Any, name: str | None = None) -> PairSource:
    """An object as a PairSource (see the module's text). name: what messages and tables call it.

    Raises InputError that names the object: it has no length, is empty, gives no usable item, gives other captions or
    keys when it is asked twice, or the same key for two items.
    """
    if isinstance(data, PairSource):
        return data
    name = name or _name_of(data)
    if isinstance(data, Mapping | str | bytes | type):
        raise InputError(f"data: {type(data).__name__} {str(data)[:60]!r} is no set of image-caption pairs")
    if hasattr(data, "iterrows"):  # a DataFrame: a row an item
        data = data.to_dict("records")
    try:
        count = len(data)
    except Exception as error:
        raise InputError(
            f"data object {name}: it has no length ({describe(error)}): give a sequence, for example list(...) of what "
            "can only be passed through once"
        ) from error
    read = _from_methods if hasattr(data, "captions") and hasattr(data, "key") else _from_items
    problems = Problems()
    keys: list[str] = []
    captions: list[list[str]] = []
    places: list[int] = []
    fault = ""
    for i in range(count):
        try:
            key, texts, image = read(data, i)
        except ClipdistillError:
            raise
        except Exception as error:
            fault = fault or f"item {i}: {_words(error)}"
            problems.add(f"error of the data object: {_words(error)}", f"item {i}", dropped=True)
            continue
        found = clean_all(texts, key, problems)
        wrong = None if read is _from_methods else no_image(image)
        if wrong or not found:
            problems.add(wrong or "image without caption", key, dropped=True)
            fault = fault or f"item {i}: {wrong or 'no caption'}"
            continue
        keys.append(key)
        captions.append(found)
        places.append(i)
    if not keys:
        raise InputError(
            f"data object {name}: none of its {count} items is an image with a caption{f' ({fault})' if fault else ''}"
            ': give (image, caption) or {"image": ..., "caption": ...}'
        )
    _check_keys(name, keys, places)
    for position in sorted({round(p) for p in np.linspace(0, len(keys) - 1, min(_PROBES, len(keys)))}):
        i = places[position]
        key, texts, _ = read(data, i)
        if key != keys[position] or clean_all(texts, key, Problems()) != captions[position]:
            raise InputError(
                f"data object {name}: item {i} has another key or caption when it is asked for again: they must stay "
                "the same (give all captions of an image; training draws one of them)"
            )
    return ObjectPairs(name, data, keys, captions, places, problems)


class ObjectPairs(IndexedPairs):
    """The pairs of an object; see `as_pairs`."""

    def __init__(
        self,
        name: str,
        data: Any,
        keys: Sequence[str],
        captions: Sequence[Sequence[str]],
        places: Sequence[int],
        problems: Problems,
    ) -> None:
        super().__init__(name, keys, captions, problems, MAX_PIXELS)
        self._data = data
        self._places = np.array(places, dtype=np.int64)

    def _image(self, i: int) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        place = int(self._places[i])
        try:
            for method in ("image", "image_bytes"):
                if hasattr(self._data, method) and hasattr(self._data, "key"):
                    return getattr(self._data, method)(place)
            return _parts(self._data[place])[0]
        except BadSample as error:
            raise BadSample(error.reason, self.key(i)) from error
        except Exception as error:
            raise BadSample(f"error of the data object: {_words(error)}", self.key(i)) from error

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        found = self._image(i)
        try:
            return as_picture(found, self.max_pixels, at_least)
        except BadSample as error:
            raise BadSample(error.reason, self.key(i)) from error

    def image_bytes(self, i: int) -> bytes:
        """The file's bytes where the object gives these or a path, else the picture's pixels as they are."""
        found = self._image(i)
        if isinstance(found, str | os.PathLike):
            return read_image_file(os.fspath(found))
        return bytes(found) if isinstance(found, bytes | bytearray | memoryview) else self.image(i).tobytes()


def as_picture(given: Any, max_pixels: int = MAX_PIXELS, at_least: int | None = None) -> Image.Image:
    """An image of a program (see the module's text), upright, in RGB. Raises BadSample."""
    if isinstance(given, str | os.PathLike):
        given = read_image_file(os.fspath(given))
    if isinstance(given, bytes | bytearray | memoryview):
        return decode(bytes(given), max_pixels=max_pixels, at_least=at_least)
    if wrong := no_image(given):
        raise BadSample(wrong)
    return as_rgb(given if isinstance(given, Image.Image) else _picture(given), max_pixels)


def _from_methods(data: Any, i: int) -> tuple[str, Any, Any]:
    return str(data.key(i)), data.captions(i), None


def _from_items(data: Any, i: int) -> tuple[str, Any, Any]:
    """(key, captions, image) of item i; the key is its number where it has none."""
    image, captions, key = _parts(data[i])
    return str(i) if key is None else str(key), captions, image


def _parts(item: Any) -> tuple[Any, Any, Any]:
    """(image, captions, key) of an item."""
    if isinstance(item, Mapping):
        named = next((name for name in _CAPTIONS if name in item), None)
        if "image" not in item or named is None:
            raise _NoItem(f"no 'image' with 'caption', but {', '.join(sorted(map(str, item)))[:80]}")
        return item["image"], _texts(item[named]), item.get("key")
    if isinstance(item, Sequence) and not isinstance(item, str | bytes) and len(item) >= 2:
        return item[0], _texts(item[1]), None
    raise _NoItem(f"{type(item).__name__}, not (image, caption)")


def _texts(captions: Any) -> Any:
    if isinstance(captions, str | bytes) or (
        isinstance(captions, Sequence) and all(isinstance(caption, str | bytes) for caption in captions)
    ):
        return captions
    raise _NoItem(f"a caption of the type {type(captions).__name__}, not text")


def no_image(image: Any) -> str | None:
    """Why this can be no image; None when it can."""
    if isinstance(image, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
        return None
    shape, kind = tuple(getattr(image, "shape", ())), str(getattr(image, "dtype", ""))
    channels = shape[0] if kind.startswith("torch.") and len(shape) == 3 else shape[-1] if len(shape) == 3 else 1
    if kind.endswith("uint8") and len(shape) in (2, 3) and channels in (1, 3, 4) and 0 not in shape:
        return None
    about = f" {kind} {shape}" if kind else ""
    return f"no image: {type(image).__name__}{about}, expected a PIL picture, a uint8 array, bytes or a path"


def _picture(array: Any) -> Image.Image:
    if str(array.dtype).startswith("torch."):
        array = array.numpy() if array.ndim == 2 else array.permute(1, 2, 0).numpy()
    pixels = np.asarray(array)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


def _check_keys(name: str, keys: Sequence[str], places: Sequence[int]) -> None:
    first: dict[str, int] = {}
    for key, place in zip(keys, places):
        if key in first:
            raise InputError(
                f"data object {name}: items {first[key]} and {place} have the same key '{key}': keys must be unique"
            )
        first[key] = place


def _name_of(data: Any) -> str:
    given = getattr(data, "name", None)
    name = given if isinstance(given, str) and given else type(data).__name__
    return "".join(c if c.isalnum() or c in "-_./" else "_" for c in name)[:80]


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, _NoItem) else describe(error)
