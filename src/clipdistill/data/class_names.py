"""Names and expected sizes of the known classification sets.

Class labels as the sets store them are facts kept in class_labels.json (with their sources). How a label reads in a
prompt ("AnnualCrop" -> "annual crop") follows from the rule in `readable`; ImageNet's curated names come from open_clip
and its WordNet identifiers from timm.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from clipdistill.errors import InputError, nearest

Rule = Literal["accuracy", "mean-per-class"]


@dataclass(frozen=True)
class KnownSet:
    """What is expected of a known set: `counts` of images by split, number of classes, the customary metric.

    templates: name of the prompt set that fits it (see templates.py).
    """

    title: str
    classes: int
    counts: Mapping[str, int]
    templates: str
    metric: Rule = "accuracy"
    note: str = ""
    also_classes: Sequence[int] = ()

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {split}" for split, count in self.counts.items())
        return f"{self.title}: {self.classes} classes; {counts} images; {self.metric}" + (
            f"; {self.note}" if self.note else ""
        )


def stored_table(name: str) -> dict[str, Any]:
    """A table of facts that lies beside this file."""
    return json.loads(resources.files("clipdistill.data").joinpath(name).read_text(encoding="utf-8"))


_TABLE = stored_table("known_sets.json")
KNOWN_SETS = {name: KnownSet(**about) for name, about in _TABLE["sets"].items()}
OWN_TEMPLATES: dict[str, tuple[str, ...]] = {name: tuple(lines) for name, lines in _TABLE["templates"].items()}
"""Prompt templates written for this package."""

_WNID = re.compile(r"n\d{8}")


@functools.cache
def _stored() -> dict[str, list[str] | list[int]]:
    return {name: labels for name, labels in stored_table("class_labels.json").items() if not name.startswith("_")}


@functools.cache
def imagenet_wnids() -> tuple[str, ...]:
    """The WordNet identifiers of the 1,000 ImageNet classes in their usual order (timm's list)."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def imagenet_names() -> tuple[str, ...]:
    """The curated English names of the 1,000 ImageNet classes (open_clip's list), in the order of imagenet_wnids()."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


def class_labels(name: str) -> tuple[str, ...]:
    """The labels of a known set as it stores them: folder names, label files, or wnids for the ImageNet family."""
    if name not in KNOWN_SETS:
        raise InputError(f"unknown classification set '{name}'{nearest(name, KNOWN_SETS)}")
    stored = _stored().get(name)
    if stored is None:
        return imagenet_wnids()
    if name.startswith("imagenet"):
        return tuple(imagenet_wnids()[int(index)] for index in stored)
    return tuple(str(label) for label in stored)


def class_names(name: str) -> tuple[str, ...]:
    """The names of a known set's classes as they read in a prompt, in the order of class_labels(name)."""
    return read_labels(class_labels(name), name)


def read_labels(labels: Sequence[str], known: str | None = None) -> tuple[str, ...]:
    """How stored labels read in a prompt; wnids become ImageNet's names, `known` adds a set's own readings."""
    if is_wnids(labels):
        names = imagenet_names()
        return tuple(names[wnid_index()[label]] for label in labels)
    own = _TABLE["readings"].get(known or "", {})  # for labels of which the general rule makes a poor reading
    return tuple(own.get(label) or readable(label) for label in labels)


def is_wnids(labels: Collection[str]) -> bool:
    """Whether all labels are WordNet identifiers of ImageNet classes."""
    # the pattern first: looking them up imports timm
    return bool(labels) and all(_WNID.fullmatch(label) and label in wnid_index() for label in labels)


@functools.cache
def wnid_index() -> dict[str, int]:
    """ImageNet class index of each wnid."""
    return {wnid: index for index, wnid in enumerate(imagenet_wnids())}


def readable(label: str) -> str:
    """A stored label in plain words.

    'a/apartment_building/outdoor' -> 'outdoor apartment building' (SUN397: kind before place, letter dropped);
    'AnnualCrop' -> 'annual crop'; 'apple_pie' -> 'apple pie'. Spaces, hyphens and capitals of other labels stay.
    """
    parts = [part for part in label.split("/") if part]
    if len(parts) > 1 and len(parts[0]) == 1:
        parts = parts[1:]
    words = " ".join(reversed(parts)).replace("_", " ").strip()
    if re.fullmatch(r"(?:[A-Z][a-z]+){2,}", words) or re.fullmatch(r"[A-Z][a-z]+", words):
        words = " ".join(re.findall(r"[A-Z][a-z]+", words)).lower()
    return " ".join(words.split())


def recognise(labels: Collection[str], images: int) -> str | None:
    """The known set that has exactly these labels (and, in the ImageNet family, this many images), or None."""
    found = {_plain(label) for label in labels}
    if is_wnids(found):
        for name in ("imagenet-r", "imagenet-a"):
            if found == set(class_labels(name)):
                return name
        sizes = {"imagenet": 50_000, "imagenet-sketch": 50_889, "imagenet-v2": 10_000}
        return next((n for n, count in sizes.items() if len(found) == 1000 and images == count), None)
    for name in KNOWN_SETS:
        if name.startswith("imagenet"):
            continue
        for expected in (class_labels(name), class_names(name)):
            plain = {_plain(label) for label in expected}
            if found == plain or (name == "caltech101" and found == plain - {_plain(expected[0])}):
                return name
    return None


def _plain(label: str) -> str:
    """A label without the differences that writers of folders make: case, underscores, leading slash."""
    return label.strip("/").replace("_", " ").lower()


def deviation(known: str, images: int, classes: int, split: str | None = None) -> str | None:
    """How a set at hand differs from what is expected of the known set, in one sentence; None when it does not."""
    expected = KNOWN_SETS[known]
    complaints = []
    counts = expected.counts
    if split is not None and split in counts:
        if images != counts[split]:
            complaints.append(f"{images:,} images where the {split} split has {counts[split]:,}")
    elif images not in counts.values():
        options = " or ".join(f"{count:,} ({name})" for name, count in counts.items())
        complaints.append(f"{images:,} images where {options} are expected")
    if classes not in (expected.classes, *expected.also_classes):
        complaints.append(f"{classes} classes where {expected.classes} are expected")
    return f"{expected.title}: {' and '.join(complaints)}" if complaints else None
