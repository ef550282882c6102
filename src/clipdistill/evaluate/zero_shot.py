"""Zero-shot classification with prompt ensembling: top-1, top-5, mean per class or mAP, and every sample's result.

A class weight is made from all templates: embed each filled template, normalise, average, normalise again. The class
with the largest cosine is predicted. Ties count as in retrieval: the exact expectation over random order, so a
collapsed model scores chance. Where an image has several classes, the images are ranked for each class by their cosine
with it, and mAP is the mean over the classes of the average precision, as in CLIP_benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clipdistill.data.labelled import LabelledSource
from clipdistill.data.templates import fill
from clipdistill.embed.classes import choose_templates, class_weights
from clipdistill.embed.encode import Encoder
from clipdistill.errors import InputError, nearest
from clipdistill.evaluate.tiles import TIE_TOLERANCE

if TYPE_CHECKING:
    from clipdistill.models.clip_model import ClipModel
    from clipdistill.models.tokenizers import Tokenizer

_CHUNK = 1024


@dataclass
class ZeroShotResult:
    """Results over n samples of C classes.

    top1, top5: (n,) probability that the right class is first, or among the first five (0 or 1 unless tied);
    labels: (n,) right classes; predictions: (n,) predicted classes; keys: n sample keys;
    class_names: of the classes that competed; template_name, template_list: the prompts; left_out: samples of classes
    outside the restriction; problems: (key, reason) of unreadable images; indistinct: (class, an earlier one) whose
    prompts are the same to the tokenizer, so that the model cannot tell them apart; precision: (n,) of sets with
    several classes an image, whose mean is mAP (`mean_average_precision`); top1 is then whether the first is one of
    them, and labels are (n, C).
    """

    top1: np.ndarray
    top5: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    keys: list[str]
    class_names: tuple[str, ...]
    template_name: str
    template_list: tuple[str, ...]
    left_out: int
    problems: list[tuple[str, str]]
    indistinct: list[tuple[str, str]]
    precision: np.ndarray | None = None

    def mean_per_class(self) -> float:
        """Mean over the classes that occur of the accuracy within each."""
        return float(self.per_class()[~np.isnan(self.per_class())].mean())

    def per_class(self) -> np.ndarray:
        """(C,) accuracy within each class; NaN for classes that do not occur."""
        classes = len(self.class_names)
        counts = np.bincount(self.labels, minlength=classes)
        hits = np.bincount(self.labels, weights=self.top1, minlength=classes)
        return np.divide(hits, counts, out=np.full(classes, np.nan), where=counts > 0)

    def scores(self) -> dict[str, float]:
        """The scores by name: top1, top5 (of more than five classes only), mean_per_class; or mAP alone."""
        if self.precision is not None:
            return {"mAP": float(self.precision.mean())}
        result = {"top1": float(self.top1.mean())}
        if len(self.class_names) > 5:
            result["top5"] = float(self.top5.mean())
        return result | {"mean_per_class": self.mean_per_class()}

    def queries(self) -> dict[str, np.ndarray]:
        """Name of a score -> (n,) results of the samples, whose mean is the score."""
        if self.precision is not None:
            return {"mAP": self.precision}
        # the mean per class, plus n times what it gains where the sample weighs more (as in mean_average_precision)
        share = np.bincount(self.labels, minlength=len(self.class_names))[self.labels].astype(np.float64)
        gain = (self.top1 - self.per_class()[self.labels]) * len(self.labels) / (share * len(np.unique(self.labels)))
        found = {"top1": self.top1, "top5": self.top5, "mean_per_class": self.mean_per_class() + gain}
        return {name: found[name] for name in self.scores()}


def zero_shot(
    model: ClipModel | Encoder,
    labelled: LabelledSource,
    prompts: str | Sequence[str] | None = None,
    *,
    classes: Sequence[int | str] | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    workers: int = 0,
    progress: bool = True,
    dtype: str = "float32",
) -> ZeroShotResult:
    """Classify every image of `labelled` among its class names.

    model: a ClipModel, or an Encoder (then the settings after `classes` are the encoder's).
    prompts: a template set's name, a file, or templates with one '{}' each; None: what the data set names as fitting.
    classes: only these classes compete (names or indices), and images of others are left out and counted.
    """
    encoder = (
        model
        if isinstance(model, Encoder)
        else Encoder(model, batch_size=batch_size, device=device, workers=workers, progress=progress, dtype=dtype)
    )
    name, lines = choose_templates(labelled.templates if prompts is None else prompts)
    chosen = _chosen_classes(labelled, classes)
    names = tuple(labelled.class_names[c] for c in chosen)
    if len(names) < 2:
        raise InputError(f"{labelled.name} has one class, '{names[0]:.80}', so there is nothing to tell it from")
    indistinct = indistinct_classes(encoder.model.tokenizer, names, lines)
    if len(names) - len(indistinct) < 2:
        raise InputError(
            f"{labelled.name}: all {len(names)} classes are the same to the tokenizer of {encoder.model.name} (it "
            "knows none of their words, or cuts them off), so there is nothing to classify by"
        )
    weights = class_weights(encoder, names, lines)
    image, kept, problems = encoder.images(labelled)
    if labelled.several is not None:
        right = labelled.several[kept][:, chosen]
        cosines = (image.double() @ weights.double().T).numpy()
        predictions = cosines.argmax(axis=1)
        hits = right[np.arange(len(right)), predictions].astype(float)
        keys, precision = [labelled.key(k) for k in kept], mean_average_precision(cosines, right)
        return ZeroShotResult(
            hits, hits, right, predictions, keys, names, name, lines, 0, problems, indistinct, precision
        )
    place = np.full(len(labelled.class_names), -1)
    place[chosen] = np.arange(len(chosen))
    labels = place[[labelled.label(i) for i in kept]]
    inside = labels >= 0
    if not inside.any():
        raise InputError(f"{labelled.name}: no image belongs to the {len(chosen)} classes that were chosen")
    rows = np.flatnonzero(inside)
    top1, top5, predictions = classify(image[rows], weights, labels[rows])
    return ZeroShotResult(
        top1=top1,
        top5=top5,
        labels=labels[rows],
        predictions=predictions,
        keys=[labelled.key(kept[row]) for row in rows],
        class_names=names,
        template_name=name,
        template_list=lines,
        left_out=int((~inside).sum()),
        problems=problems,
        indistinct=indistinct,
    )


def indistinct_classes(tokenizer: Tokenizer, class_names: Sequence[str], lines: Sequence[str]) -> list[tuple[str, str]]:
    """(class, an earlier one) whose ids are equal in every template; of equal names too."""
    seen: dict[bytes, str] = {}
    found = []
    for name in class_names:
        ids = tokenizer([fill(line, name) for line in lines]).numpy().tobytes()
        if ids in seen:
            found.append((name, seen[ids]))
        seen.setdefault(ids, name)
    return found


def classify(image: Tensor, weights: Tensor, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(top-1 (n,), top-5 (n,), predicted class (n,)) of unit-length images (n, D) against class vectors (C, D).

    The first two are probabilities over a random order of tied classes: with `above` classes scoring higher than the
    right one and `tied` as high (itself included), P(rank <= k) = clip(k - above, 0, tied) / tied.
    """
    classes = weights.double()
    hits: dict[int, list[np.ndarray]] = {1: [], 5: []}
    predictions = []
    for start in range(0, len(image), _CHUNK):
        scores = image[start : start + _CHUNK].double() @ classes.T
        right = scores.gather(1, torch.from_numpy(labels[start : start + _CHUNK])[:, None])
        above = (scores > right + TIE_TOLERANCE).sum(dim=1).numpy()
        tied = ((scores - right).abs() <= TIE_TOLERANCE).sum(dim=1).numpy()
        for k, found in hits.items():
            found.append(np.clip(k - above, 0, tied) / tied)
        predictions.append(scores.argmax(dim=1).numpy())
    return np.concatenate(hits[1]), np.concatenate(hits[5]), np.concatenate(predictions)


def mean_average_precision(cosines: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(n,) whose mean is mAP over the classes that occur, for cosines (n, C) and right (n, C), which are an image's.

    A class's average precision is the mean over its images of the share of them among the images at least as near; of
    equal cosines the exact expectation over their order. An image's number is mAP plus n times what mAP gains where the
    image weighs more (the infinitesimal jackknife), so resampling the numbers resamples images.
    """
    count, occurring = len(right), np.flatnonzero(right.any(axis=0))
    if not len(occurring):
        raise InputError("no image has any of the classes, so no precision is defined")
    total, gains, ranks = 0.0, np.zeros(count), np.arange(1, count + 1)
    for column in occurring:
        order = np.argsort(-cosines[:, column], kind="stable")
        ordered, true = cosines[order, column], right[order, column].astype(np.float64)
        # groups of equal cosines: where each begins, how many it holds and how many of them are right
        begins = np.flatnonzero(np.diff(ordered, prepend=np.inf) < -TIE_TOLERANCE)
        group = np.searchsorted(begins, np.arange(count), side="right") - 1
        sizes = np.diff([*begins, count])[group]
        positives = np.add.reduceat(true, begins)[group]
        before = np.concatenate([[0.0], true.cumsum()])[begins][group]
        # a right image of a group of T with P right ones stands at each of its places with probability 1 / T
        ahead = (ranks - 1 - begins[group]) * np.maximum(positives - 1, 0) / np.maximum(sizes - 1, 1)
        share = positives / sizes
        average = (share * (before + 1 + ahead) / ranks).sum() / true.sum()
        precision = true.cumsum() / ranks
        later = ((true / ranks)[::-1].cumsum())[::-1]
        behind = ((true * precision / ranks)[::-1].cumsum())[::-1]
        gain = true * (precision - average) + true * later - behind
        total += average
        gains[order] += count * (gain - gain.mean()) / true.sum()
    return (total + gains) / len(occurring)


def _chosen_classes(labelled: LabelledSource, classes: Sequence[int | str] | None) -> list[int]:
    names = labelled.class_names
    if classes is None:
        return list(range(len(names)))
    index = {name: i for i, name in enumerate(names)}
    chosen = []
    for entry in classes:
        if isinstance(entry, str) and entry not in index:
            raise InputError(f"{labelled.name} has no class '{entry}'{nearest(entry, names)}")
        if isinstance(entry, str) and names.count(entry) > 1:
            raise InputError(f"{labelled.name} has {names.count(entry)} classes '{entry}': choose by number")
        i = index[entry] if isinstance(entry, str) else int(entry)
        if not 0 <= i < len(names):
            raise InputError(f"{labelled.name} has no class {i}: its classes are numbered 0 to {len(names) - 1}")
        chosen.append(i)
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise InputError("a restriction needs at least two different classes")
    return chosen
