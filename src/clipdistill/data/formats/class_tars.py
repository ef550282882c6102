"""Classification sets in tars: WebDataset samples of an image and a .cls member with the number of its class.

Where an image has several classes, a .npy member holds 0 or 1 for each (CLIP_benchmark's multilabel sets).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipdistill.data.class_names import class_labels
from clipdistill.data.files import is_url, refuse_split
from clipdistill.data.formats import Format, Place
from clipdistill.data.formats.forms import shards_of
from clipdistill.data.formats.tar_headers import members
from clipdistill.data.formats.tar_index import samples_of
from clipdistill.data.formats.tars import shard_labels
from clipdistill.data.labelled import LabelledConfig, LabelledSource, Naming, OwnNames, read_class_file
from clipdistill.data.problems import BadSample, Problems
from clipdistill.errors import InputError

_CLASS_FILES = ("classes.json", "classnames.json", "classnames.txt", "classes.txt")
_LABELS = ("cls", "cls.txt")


def _has_classes(place: Place) -> bool:
    """Whether one of the first members of the first archive is a .cls file."""
    path = shards_of(place)[0]
    with path.open("rb") as file:
        return any(m.name.endswith(".cls") for m, _ in zip(members(file, path.stat().st_size), range(20)))


class TarLabels(LabelledSource):
    """Samples of tars: an image and a .cls each; keys are '<shard>/<sample>'."""

    def __init__(self, shards: Sequence[Path], places: Sequence[tuple[int, int, int]], *arguments: Any, **rest: Any):
        super().__init__(*arguments, **rest)
        self._shards: list[Any] = [shard if is_url(shard) else str(shard) for shard in shards]
        self._places = np.array(places, dtype=np.int64).reshape(-1, 3)

    def _bytes(self, i: int) -> bytes:
        shard, offset, size = (int(value) for value in self._places[i])
        if is_url(self._shards[shard]):
            return self._shards[shard].read_range(offset, size)
        try:
            with open(self._shards[shard], "rb") as file:  # noqa: PTH123 - a Path costs more than the read
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise BadSample(f"unreadable shard: {self._shards[shard]}: {error.strerror or error}") from error


def open_class_tars(place: Place, config: LabelledConfig, *, several: bool = False) -> TarLabels:
    """The labelled samples of the shards, in their order; keys are '<shard>/<sample>' where there are several shards.

    several: the samples have a .npy with 0 or 1 for each class.
    """
    shards = shards_of(place)
    name = place.path.stem if place.there and not place.is_folder else place.path.name
    refuse_split(config.split, name)
    names, naming = config.classes, config.naming
    if names is None:
        names, naming = _names_beside(shards[0], config.known, naming)
    if not isinstance(names, list):
        raise InputError(f"{name}: class names of tars are a list in label order, not a mapping of folders")
    problems = Problems()
    keys: list[str] = []
    labels: list[Any] = []
    kinds, most = (("npy",), 1 << 16) if several else (_LABELS, 32)
    places: list[tuple[int, int, int]] = []
    for number, (shard, label) in enumerate(zip(shards, shard_labels(shards))):
        if not shard.is_file():
            raise InputError(f"labelled data: the shard '{shard}' does not exist")
        prefix = f"{label}/" if len(shards) > 1 else ""
        with shard.open("rb") as file:
            seen: dict[str, int] = {}
            for sample in samples_of(file, shard.stat().st_size, label, kinds, problems):
                seen[sample.stem] = seen.get(sample.stem, 0) + 1
                key = f"{prefix}{sample.stem}" + (f"#{seen[sample.stem]}" if seen[sample.stem] > 1 else "")
                cls, image = next((sample.components[c] for c in kinds if c in sample.components), None), sample.image
                if cls is None and image is None:
                    continue  # files beside the samples
                if cls is None or image is None or cls.size > most:
                    reason = sample.why_no_image if image is None else "sample without label"
                    problems.add(reason, key, dropped=True)
                    continue
                file.seek(cls.offset)
                read = _classes_of if several else _class_of
                labels.append(read(file.read(cls.size), f"'{shard}': the label of '{sample.stem}'", len(names)))
                keys.append(key)
                places.append((number, image.offset, image.size))
    rest = {**config.common, "naming": naming}
    first = [int(row.argmax()) for row in labels] if several else labels
    source = TarLabels(shards, places, name, keys, first, names, problems=problems, **rest)
    source.several = np.stack(labels) if several else None
    return source


def _class_of(content: bytes, what: str, classes: int) -> int:
    text = content.decode("ascii", errors="replace").strip()
    try:
        return int(np.int64(int(text)))
    except (ValueError, OverflowError):
        raise InputError(f"{what} is {text[:20]!r}, not a whole number") from None


def _classes_of(content: bytes, what: str, classes: int) -> NDArray[np.bool_]:
    try:
        row = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # numpy raises many types on damaged arrays
        raise InputError(f"{what} is no array of numpy's ({error})") from None
    if row.shape != (classes,) or row.dtype.kind not in "biuf" or not np.isin(row, (0, 1)).all():
        raise InputError(f"{what} must hold 0 or 1 for each of the {classes} classes, and is {row.dtype} {row.shape}")
    return row.astype(bool)


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


FORMAT = Format(lambda place: bool(shards_of(place)), open_class_tars, surely=_has_classes)
