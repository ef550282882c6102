"""Zero-shot classification with prompt ensembling: top-1, top-5, mean per class, and every sample's result.

A class weight is made from all templates: embed each filled template, normalise, average, normalise again. The class
with the largest cosine is predicted. Ties count as in retrieval: the exact expectation over random order, so a
collapsed model scores chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clipdistill.data.labelled import LabelledSource
from clipdistill.data.templates import check_templates, fill, templates
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
    prompts are the same to the tokenizer, so that the model cannot tell them apart.
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
        """The scores by name: top1, top5 (of more than five classes only), mean_per_class."""
        result = {"top1": float(self.top1.mean())}
        if len(self.class_names) > 5:
            result["top5"] = float(self.top5.mean())
        return result | {"mean_per_class": self.mean_per_class()}


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
    indistinct = indistinct_classes(encoder.model.tokenizer, names, lines)
    if len(names) - len(indistinct) < 2:
        raise InputError(
            f"{labelled.name}: all {len(names)} classes are the same to the tokenizer of {encoder.model.name} (it "
            "knows none of their words, or cuts them off), so there is nothing to classify by"
        )
    weights = class_weights(encoder, names, lines)
    image, kept, problems = encoder.images(labelled)
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


def class_weights(encoder: Encoder, class_names: Sequence[str], lines: Sequence[str]) -> Tensor:
    """Unit-length class vectors (C, D): the normalised mean over templates of normalised text embeddings."""
    texts = [fill(line, name) for name in class_names for line in lines]
    features = encoder.texts(texts, f"{len(class_names)} class names in {len(lines)} templates")
    means = features.view(len(class_names), len(lines), -1).double().mean(dim=1)
    return torch.nn.functional.normalize(means, dim=1).float()


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


def choose_templates(prompts: str | Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """(name for the protocol, templates) of a set's name, a file, or a list of templates."""
    if isinstance(prompts, str):
        lines = templates(prompts)
        return f"{prompts} ({len(lines)})", lines
    lines = check_templates(prompts, "the given templates")
    return f"given ({len(lines)})", lines


def _chosen_classes(labelled: LabelledSource, classes: Sequence[int | str] | None) -> list[int]:
    names = labelled.class_names
    if classes is None:
        return list(range(len(names)))
    index = {name: i for i, name in enumerate(names)}
    chosen = []
    for entry in classes:
        if isinstance(entry, str) and entry not in index:
            raise InputError(f"{labelled.name} has no class '{entry}'{nearest(entry, names)}")
        i = index[entry] if isinstance(entry, str) else int(entry)
        if not 0 <= i < len(names):
            raise InputError(f"{labelled.name} has no class {i}: its classes are numbered 0 to {len(names) - 1}")
        chosen.append(i)
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise InputError("a restriction needs at least two different classes")
    return chosen
