"""Images that must not be trained on: a test split, found in the training data by name or by picture.

DCLIP's released script takes the first images of COCO train2017 and of Flickr30k's list, which contain images of the
Karpathy test splits it is later measured on. The same photograph has several file names (`000000391895.jpg` in 2017,
`COCO_val2014_000000391895.jpg` in Karpathy's file), so names are compared without folder, prefix and ending.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from clipdistill.config import Config
from clipdistill.data.formats import Place
from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.problems import BadSample, Problems
from clipdistill.errors import InputError
from clipdistill.registry import FORMATS
from clipdistill.runtime.files import text_lines

_COCO = re.compile(r"^COCO_(?:train|val|test)\d{4}_")
_SIDE = 16
SAME_PICTURE = 0.985
"""Correlation of 16 x 16 grey thumbnails from which two pictures count as one (resized or compressed anew)."""


class HeldOutConfig(Config):
    """A split that training data must not contain."""

    data: str
    """Its pairs, a Karpathy file whose pictures need not be there, or a text file of image names, one a line."""
    split: str = "test"
    """Split of that data."""
    compare: Literal["names", "pictures"] = "names"
    """File names, or pictures too (bytes and thumbnails; reads every image of both once)."""
    action: Literal["error", "drop"] = "error"
    """What an image in both does: stop, or drop it from training and count it."""


def without_held_out(source: PairSource, config: HeldOutConfig) -> PairSource:
    """`source` without the images of the held-out split. Raises InputError for overlap where `action` is "error"."""
    names = {plain_name(name) for name in held_out_names(config)}
    shared = {i for i in range(len(source)) if plain_name(source.key(i)) in names}
    if config.compare == "pictures":
        shared |= _same_pictures(source, open_pairs(DataConfig(path=config.data), split=_split(config)), shared)
    if not shared:
        return source
    where = f"{config.data} ({config.split})"
    first = source.key(min(shared))
    if config.action == "error":
        raise InputError(
            f"{len(shared)} of {len(source)} training images of {source.name} are in the held-out {where}, the first "
            f"is '{first}': scores on that split would not be held out; held_out.action=drop leaves them out"
        )
    if len(shared) == len(source):
        raise InputError(f"every image of {source.name} is in the held-out {where}: nothing is left to train on")
    kept = source.subset([i for i in range(len(source)) if i not in shared])
    kept.name = f"{source.name} without {config.split}"
    kept.problems = Problems()
    kept.problems.merge(source.problems)
    for index in sorted(shared):
        kept.problems.add("image of the held-out split", source.key(index))
    return kept


def held_out_names(config: HeldOutConfig) -> list[str]:
    """Keys or file names of the held-out images. Raises InputError when there are none."""
    place = Place(config.data)
    path, names = place.path, list[str]()
    if path.is_file() and path.suffix == ".txt":
        names = [line.strip() for line in text_lines(path, f"held-out images '{path}'") if line.strip()]
    elif path.suffix == ".json" and FORMATS.get("karpathy").matches(place):
        entries = [entry for entry in place.document["images"] if isinstance(entry, dict)]
        names = [str(entry.get("filename")) for entry in entries if str(entry.get("split")) == config.split]
        if not names:
            splits = sorted({str(entry.get("split")) for entry in entries})
            raise InputError(f"held_out: {path} has no split '{config.split}'; it holds {', '.join(splits)}")
    if not names:
        source = open_pairs(DataConfig(path=config.data), split=_split(config))
        names = [source.key(i) for i in range(len(source))]
    return names


def _split(config: HeldOutConfig) -> str | None:
    """The split to open: none where the data is one whole (a COCO captions file, tars, a folder)."""
    place = Place(config.data)
    if place.path.suffix == ".json" and place.there and not FORMATS.get("karpathy").matches(place):
        return None
    return None if place.is_folder or place.path.suffix == ".tar" or "{" in place else config.split


def plain_name(key: str) -> str:
    """'000000391895' for 'val2014/COCO_val2014_000000391895.jpg': what is left of a name in every distribution."""
    return _COCO.sub("", unicodedata.normalize("NFC", PurePosixPath(key).stem))


def _same_pictures(source: PairSource, held_out: PairSource, known: set[int]) -> set[int]:
    """Indices of the images of `source` (those `known` aside) that show a picture of `held_out`."""
    digests, thumbnails = _pictures(held_out, range(len(held_out)))
    wanted = set(digests)
    rest = [i for i in range(len(source)) if i not in known]
    own_digests, own = _pictures(source, rest)
    found = {index for index, digest in zip(rest, own_digests, strict=True) if digest in wanted}
    for begin in range(0, len(rest), 4096):
        close = (own[begin : begin + 4096] @ thumbnails.T).max(axis=1, initial=-1.0) > SAME_PICTURE
        found |= {rest[begin + i] for i in np.flatnonzero(close).tolist()}
    return found


def _pictures(source: PairSource, indices: Sequence[int]) -> tuple[list[str], np.ndarray]:
    """SHA-256 of the bytes, and the normalised thumbnail (256 numbers), of each image; unreadable: no match."""
    digests, thumbnails = [], np.zeros((len(indices), _SIDE * _SIDE), dtype=np.float32)
    for row, index in enumerate(indices):
        try:
            picture: Any = source.image(index)
            digests.append(_digest(source, index))
        except BadSample:
            digests.append(f"unreadable {row}")
            continue
        values = np.asarray(picture.convert("L").resize((_SIDE, _SIDE)), dtype=np.float32).ravel()
        values -= values.mean()
        length = float(np.linalg.norm(values))
        # a plain area has no pattern to compare
        thumbnails[row] = values / length if length > _SIDE else 0
    return digests, thumbnails


def _digest(source: PairSource, index: int) -> str:
    return hashlib.sha256(source.image_bytes(index)).hexdigest()
