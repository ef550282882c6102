"""Images with one class label each, behind one interface, for zero-shot classification.

`open.open_labelled` finds the reader of a name. Classes may be sparse: a sample of 500 images of 1,000 classes is
scored against all 1,000 names.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipdistill.data.captions import require_legible
from clipdistill.data.class_names import KNOWN_SETS, Rule, deviation, is_wnids, read_labels, recognise
from clipdistill.data.files import read_json
from clipdistill.data.images import MAX_PIXELS
from clipdistill.data.pairs import Strings, images_fingerprint
from clipdistill.data.problems import BadSample, Problems, valid_text
from clipdistill.errors import InputError
from clipdistill.runtime.files import text_lines

__all__ = ["BadSample", "LabelledConfig", "LabelledSource", "Naming", "OwnNames", "read_class_file"]

Naming = Literal["readable", "stored"]
OwnNames = list[str] | dict[str, str] | None


def __getattr__(name: str) -> Any:
    """The openers are found here too; they live in open.py, which is built on this file."""
    if name in ("open_labelled", "is_labelled_name"):
        return getattr(importlib.import_module("clipdistill.data.open"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


@dataclass(frozen=True)
class LabelledConfig:
    """Which classification set to open and how: see open.open_labelled. known: the known set that was declared."""

    path: str
    known: str | None = None
    classes: OwnNames = None
    naming: Naming = "readable"
    split: str | None = None
    max_pixels: int = MAX_PIXELS

    @property
    def common(self) -> dict[str, Any]:
        """What every LabelledSource is made with."""
        return {"naming": self.naming, "known": self.known, "max_pixels": self.max_pixels}


class LabelledSource(ABC):
    """Random access to images with one label each. Picklable; keys are unique and stable.

    name: of the set, for tables; class_names: what prompts are made of, indexed by label; known: the known set it was
    recognised or declared as (see class_names.KNOWN_SETS); templates: name of the prompt templates that fit, or the
    templates themselves; metric: the customary headline number; problems: what opening found; several: (N, C) which
    classes an image has, of sets with several an image (None: one each; `labels` then holds the first of each).
    """

    several: NDArray[np.bool_] | None = None

    def __init__(
        self,
        name: str,
        keys: Sequence[str],
        labels: Sequence[int] | NDArray[np.int64],
        class_labels: Sequence[str],
        *,
        problems: Problems | None = None,
        naming: Naming = "readable",
        known: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """Raises InputError when there is no image or no class, or a label has no name."""
        self.name = valid_text(name)
        self.problems = problems or Problems()
        self.max_pixels = max_pixels
        self.labels: NDArray[np.int64] = np.asarray(labels, dtype=np.int64)
        self.class_labels = tuple(valid_text(label) for label in class_labels)
        self._keys = Strings.pack(valid_text(key) for key in keys)
        if not len(self.labels):
            found = self.problems.summary()
            raise InputError(f"{name}: no labelled image in it" + (f" ({found})" if found else ""))
        if not self.class_labels:
            raise InputError(f"{name}: no class names: give them as a file with classes=FILE")
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.class_labels)))
        if len(outside):
            first = int(outside[0])
            raise InputError(
                f"{name}: the label {self.labels[first]} of '{self._keys[first]}' (and of {len(outside) - 1} more) is "
                f"outside 0..{len(self.class_labels) - 1}: {len(self.class_labels)} class names are known"
            )
        self.known = known or recognise(self.class_labels, len(self.labels))
        self.class_names = read_labels(self.class_labels, self.known) if naming == "readable" else self.class_labels
        blank = next((label for label, text in enumerate(self.class_names) if not text.strip()), None)
        if blank is not None:
            raise InputError(f"{name}: class {blank} has an empty name")
        seen: set[str] = set()
        for text in self.class_names:
            require_legible(text, f"{name}, a class name")
            if text in seen:
                self.problems.add("repeated class name", text)
            seen.add(text)
        self.templates: str | tuple[str, ...] = KNOWN_SETS[self.known].templates if self.known else "imagenet"
        self.metric: Rule = KNOWN_SETS[self.known].metric if self.known else "accuracy"

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, i: int) -> int:
        """The class of image i, an index into `class_names`."""
        self._check(i)
        return int(self.labels[i])

    def key(self, i: int) -> str:
        """A name of image i, the same every time the set is opened."""
        return self._keys[i]

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        """The RGB picture (see images.decode for `at_least`). Raises BadSample."""
        from clipdistill.data.images import decode

        self._check(i)
        try:
            return decode(self._bytes(i), max_pixels=self.max_pixels, at_least=at_least)
        except BadSample as error:
            raise BadSample(error.reason, self.key(i)) from error

    @abstractmethod
    def _bytes(self, i: int) -> bytes:
        """The encoded image i. Raises BadSample."""

    def fingerprint(self) -> str:
        """SHA-256 over keys, labels and class names, and over the pixels where the keys are mere numbers."""
        digest = hashlib.sha256(b"clipdistill labelled 1")
        self._keys.hash_into(digest)
        digest.update(self.labels.astype("<i8").tobytes())
        Strings.pack(self.class_names).hash_into(digest)
        if self.several is not None:
            digest.update(self.several.tobytes())
        self._hash_content(digest)
        return digest.hexdigest()

    def images_fingerprint(self, count: int = 8) -> str:
        """As PairSource's."""
        return images_fingerprint(len(self), count, self._bytes, self.image)

    def _hash_content(self, digest: hashlib._Hash) -> None:  # noqa: B027 - most sources have nothing to add
        """What fingerprint() covers beyond keys, labels and names: nothing where the keys are file names."""

    def deviation(self) -> str | None:
        """How this set differs from the known set it claims or seems to be, in one sentence; None when it does not."""
        return deviation(self.known, len(self), len(self.class_names)) if self.known else None

    def _check(self, i: int) -> None:
        if not 0 <= i < len(self.labels):
            raise IndexError(f"image {i} of {len(self.labels)}")


def read_class_file(path: Path, *, wnids: bool = False) -> list[str] | dict[str, str]:
    """Class names from a file: a list in label order, or a mapping from stored label to name (see open_labelled).

    wnids: where every entry also has a WordNet identifier ('wnid'), return those instead of the names.
    """
    found = _read_class_file(path, wnids)
    for text in (*found, *(found.values() if isinstance(found, dict) else ())):
        require_legible(text, f"class names '{path}'")
    return found


def _read_class_file(path: Path, wnids: bool) -> list[str] | dict[str, str]:
    if not path.is_file():
        raise InputError(f"class names '{path}': no such file")
    if path.suffix.lower() != ".json":
        lines = text_lines(path, f"class names '{path}'")
        while lines and not lines[-1].strip():
            lines.pop()
        blank = next((number for number, line in enumerate(lines, start=1) if not line.strip()), None)
        if blank is not None:
            raise InputError(f"class names '{path}': line {blank} is empty, one name a line is expected")
        names = [line.strip() for line in lines]
    else:
        content = read_json(path)
        if isinstance(content, dict):
            return _mapping(content, path)
        names = _listed(content, path, wnids)
    if not names:
        raise InputError(f"class names '{path}': no name in it")
    return names


def _mapping(content: Mapping[str, Any], path: Path) -> list[str] | dict[str, str]:
    if content and all(isinstance(value, int) and not isinstance(value, bool) for value in content.values()):
        return _in_order([(index, name) for name, index in content.items()], path)
    if not content or not all(isinstance(value, str) for value in content.values()):
        raise InputError(f"class names '{path}': expected class names as texts, got {json.dumps(content)[:60]}")
    if all(key.isdecimal() for key in content):
        return _in_order([(int(key), value) for key, value in content.items()], path)
    return dict(content)


def _listed(content: Any, path: Path, wnids: bool) -> list[str]:
    if not isinstance(content, list):
        raise InputError(f"class names '{path}': expected a list or a mapping of names")
    if all(isinstance(entry, str) for entry in content):
        return list(content)
    key = "name"
    try:
        if wnids and is_wnids([str(entry.get("wnid")) for entry in content]):
            key = "wnid"
        found = [(entry["index"], entry[key]) for entry in content]
        if not all(type(index) is int and isinstance(name, str) for index, name in found):
            raise TypeError
    except (TypeError, KeyError, AttributeError):
        raise InputError(
            f"class names '{path}': expected texts, or entries with a whole number 'index' and a text '{key}'"
        ) from None
    return _in_order(found, path)


def _in_order(found: Sequence[tuple[int, str]], path: Path) -> list[str]:
    names = dict(found)
    if len(names) < len(found):
        twice = next(index for index, _ in found if [other for other, _ in found].count(index) > 1)
        raise InputError(f"class names '{path}': more than one class has the index {twice}")
    missing = next((index for index in range(len(names)) if index not in names), None)
    if missing is not None:
        raise InputError(f"class names '{path}': {len(names)} classes, but none has the index {missing}")
    return [names[index] for index in range(len(names))]
