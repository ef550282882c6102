"""The protocol of a score: everything that must be known before two numbers may be compared.

A `Protocol` is carried by every score, printed above every table and stored in every file. Two scores share a column
only if `comparable` says so. The two retrieval protocols in use:

  standard       all captions; image-to-text counts a hit when any caption of the image is found
  first-caption  only the first caption of each image, one positive both ways (the released CLIP-KD and CLIP-RD)

The same model scores some 20 points differently under the two (docs/protocols.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Literal

from clipdistill.config import Config
from clipdistill.data.views import ImageSpec
from clipdistill.errors import InputError, nearest
from clipdistill.registry import RETRIEVAL_SCORES

RETRIEVAL_PROTOCOLS = ("standard", "first-caption")
TIES = "expected over random order"

# what belongs to the model that was measured, and not to the question it was asked; and what older scores lack
_OF_THE_MODEL = frozenset({"model_fingerprint", "transform", "pictures_sha256"})

_DIGESTS = {
    "keys_sha256": "other samples, captions or labels under that name",
    "prompts_sha256": "other prompts or class names",
}

# Published test sets: (data set, split) -> (images, captions allowed). COCO's file holds 25,010 captions, as some
# images have six or seven; the common protocol keeps the first five of each image, 25,000 in all.
KNOWN_PAIRS: dict[tuple[str, str], tuple[int, tuple[int, ...]]] = {
    ("flickr8k", "val"): (1000, (5000,)),
    ("flickr8k", "test"): (1000, (5000,)),
    ("flickr30k", "test"): (1000, (5000,)),
    ("coco", "test"): (5000, (25_000, 25_010)),
}
_FIVE_CAPTIONS = ("coco",)
# a data set is recognised by the exact name of its annotation file, as Karpathy distributes them, never by a part
_ALIASES = {f"dataset_{name}": name for name, _ in KNOWN_PAIRS} | {name: name for name, _ in KNOWN_PAIRS}


class Protocol(Config):
    """How a score was measured. Absent fields do not apply to the task.

    name: "standard", "first-caption" or "zero-shot"; after a comma what plain cosines were replaced by. images,
    captions: numbers scored. captions_per_image: "all", "first" or "first 5". positives, ties: the rules of retrieval.
    classes, templates: of zero-shot classification. prompts_sha256: of templates and class names, or of the prompts of
    balanced scores. transform, dtype: how the model was fed. keys_sha256: over sample keys with captions or labels.
    deviation: how the set differs from the published one it is named after. pictures_sha256: over some of the pictures
    themselves; the judge compares it where it was recorded.
    """

    name: str
    task: Literal["retrieval", "zero-shot", "matching"]
    dataset: str
    split: str | None = None
    images: int
    captions: int | None = None
    captions_per_image: str | None = None
    positives: str | None = None
    ties: str = TIES
    classes: int | None = None
    templates: str | None = None
    prompts_sha256: str | None = None
    transform: str
    dtype: str
    keys_sha256: str
    model_fingerprint: str
    deviation: str | None = None
    pictures_sha256: str | None = None

    def label(self) -> str:
        """One line for a table's title: 'retrieval, standard: flickr8k/val, 1,000 images, 5,000 captions (all)'."""
        where = self.dataset + (f"/{self.split}" if self.split else "")
        parts = [where, f"{self.images:,} images"]
        if self.captions is not None:
            parts.append(f"{self.captions:,} captions ({self.captions_per_image})")
        if self.classes is not None:
            parts.append(f"{self.classes:,} classes, templates {self.templates}")
        if self.dtype != "float32":
            parts.append(self.dtype)
        if self.deviation:
            parts.append(f"NOT the published set: {self.deviation}")
        kind = self.task if self.name == self.task else f"{self.task}, {self.name}"
        return f"{kind}: {', '.join(parts)}"

    def question(self) -> tuple[tuple[str, Any], ...]:
        """Hashable: everything except the model; equal for scores that may stand in one column."""
        return tuple(sorted((k, v) for k, v in self.model_dump().items() if k not in _OF_THE_MODEL))


def comparable(a: Protocol, b: Protocol) -> bool:
    """Whether scores under the two may be compared: all but the measured model (and its image size) is the same."""
    return a.question() == b.question()


def difference(a: Protocol, b: Protocol) -> str:
    """What keeps two protocols apart, for messages: "captions_per_image: all / first"; '' when comparable."""
    other = dict(b.question())
    found = {k: f"{k}: {v} / {other[k]}" for k, v in a.question() if other[k] != v}
    return ", ".join({k: _DIGESTS.get(k, text) for k, text in found.items()}.values())


def check_retrieval_protocol(name: str) -> None:
    """InputError with the nearest name unless `name` is a retrieval protocol."""
    if name not in RETRIEVAL_PROTOCOLS:
        raise InputError(f"unknown retrieval protocol '{name}'{nearest(name, RETRIEVAL_PROTOCOLS)}")


def retrieval_scoring(score: str) -> Any:
    """What ranks in the place of plain cosines, for WAY or WAY:ARGUMENT. Raises InputError for what is none."""
    way, _, argument = score.partition(":")
    return RETRIEVAL_SCORES.get(way)(argument)


def captions_rule(protocol: str, source_name: str) -> str:
    """Which captions of an image count under a protocol: "all", "first" or "first 5" (COCO, as is customary)."""
    check_retrieval_protocol(protocol)
    if protocol == "first-caption":
        return "first"
    return "first 5" if known_name(source_name)[0] in _FIVE_CAPTIONS else "all"


def known_name(source_name: str) -> tuple[str, str | None]:
    """('flickr8k', 'val') for 'dataset_flickr8k/val'; a name that is not a published set's is kept as it is."""
    dataset, slash, split = source_name.rpartition("/")
    if not slash:
        dataset, split = source_name, ""
    return _ALIASES.get(dataset, dataset), split or None


def check_known_pairs(source_name: str, images: int, captions: int, rule: str, *, strict: bool) -> str | None:
    """Compare a published set with its expected counts; returns the deviation in words, None when it is whole.

    Raises InputError when strict and the counts differ: a number over part of a test set is not that set's number.
    """
    name, split = known_name(source_name)
    expected = KNOWN_PAIRS.get((name, split or ""))
    if expected is None:
        return None
    full_images, full_captions = expected
    if rule == "first":
        full_captions = (full_images,)
    if images == full_images and captions in full_captions:
        return None
    counts = " or ".join(f"{n:,}" for n in full_captions)
    found = f"{images:,} images and {captions:,} captions of {full_images:,} and {counts}"
    if strict:
        raise InputError(
            f"{name}/{split} holds {found}: complete the set, or score it under a name of its own with any_counts"
        )
    return found


def digest(parts: Iterable[Any]) -> str:
    """SHA-256 (hex) over a sequence of texts and numbers, each told apart from the next."""
    sha = hashlib.sha256(b"clipdistill protocol 1")
    for part in parts:
        data = str(part).encode("utf-8", "surrogatepass")
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()


def describe_transform(image: ImageSpec) -> str:
    """The evaluation view in words: '224 px, shortest, bicubic, mean 0.481 0.458 0.408, std 0.269 0.261 0.276'."""
    mean, std = (" ".join(f"{v:.3f}" for v in values) for values in (image.mean, image.std))
    return f"{image.size} px, {image.resize_mode}, {image.interpolation}, mean {mean}, std {std}"
