"""Multinomial logistic regression on frozen embeddings: the linear probe of CLIP (Radford et al. 2021, appendix A.3).

The loss is the mean cross entropy plus strength / 2 times the squared weights (not the biases), minimised by L-BFGS in
float64. The strength is the one of STRENGTHS that is best on pictures held out for it: a fifth of the training pictures
of each class, or, with K pictures a class, min(K, 4) others of each (as in CoOp, arXiv 2109.01134).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from clipdistill.arguments import checked
from clipdistill.data.labelled import LabelledSource
from clipdistill.data.open import open_labelled
from clipdistill.data.problems import BadSample
from clipdistill.embed.encode import Encoder
from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.load import as_model
from clipdistill.runtime.console import Shown, TextTable
from clipdistill.statistics.bootstrap import Interval, bootstrap, seed_interval

if TYPE_CHECKING:
    import torch

STRENGTHS = tuple(10.0**power for power in range(-7, 0))
USUAL = 1e-4
"""The strength where no picture is left to choose it on."""
_HELD_OUT = 0.2

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Classifier:
    """weights (C, D), biases (C,)."""

    weights: Array
    biases: Array

    def predict(self, features: Array) -> NDArray[np.int64]:
        """(N,) classes for features (N, D)."""
        return (features @ self.weights.T + self.biases).argmax(1)


@dataclass(frozen=True)
class ProbeResult:
    """Top-1 on the test pictures after training on `shots` pictures a class (None: on all of them).

    top1: with its 95 % interval, over the draws of training pictures, or over the test pictures where draws do not
    differ (one draw, or equal results); draws: top-1 of each; strengths: of the regularisation, one a draw; pictures:
    trained on; over: pictures measured on; left_out: (key, reason) of those of both sets that cannot be read.
    """

    shots: int | None
    top1: Interval
    draws: tuple[float, ...]
    strengths: tuple[float, ...]
    pictures: int
    over: int = 0
    left_out: tuple[tuple[str, str], ...] = ()


class ProbeResults(Shown, list[ProbeResult]):
    """One result a number of pictures a class; shows itself as a table with intervals. model, train, test: names."""

    model = train = test = ""

    def table(self) -> TextTable:
        """A row a result: top-1 in per cent with its 95 % interval, and what the interval is over."""
        table = TextTable(["model", "pictures a class", "top-1", "95 % interval", "over"], text=(0, 1, 4))
        table.title = f"{self.test}, trained on {self.train}"
        for result in self:
            top1, draws = result.top1, len(result.draws)
            over = f"{draws} draws" if len(set(result.draws)) > 1 else f"{result.over} pictures"
            bounds = f"{100 * top1.low:.1f} to {100 * top1.high:.1f}"
            table.rows.append([self.model, str(result.shots or "all"), f"{100 * top1.value:.1f}", bounds, over])
        return table

    def tables(self) -> list[TextTable]:
        return [self.table()]


def fit(features: Array, labels: NDArray[np.int64], classes: int, strength: float) -> Classifier:
    """The minimum of the loss for features (N, D) with labels (N,) in 0..classes-1."""
    from scipy.optimize import minimize

    count, width = features.shape
    rows = np.arange(count)

    def loss(flat: Array) -> tuple[float, Array]:
        matrix = flat.reshape(classes, width + 1)
        logits = features @ matrix[:, :-1].T + matrix[:, -1]  # (N, C)
        logits -= logits.max(1, keepdims=True)
        shares = np.exp(logits)
        sums = shares.sum(1, keepdims=True)
        value = float((np.log(sums[:, 0]) - logits[rows, labels]).mean() + strength / 2 * (matrix[:, :-1] ** 2).sum())
        shares /= sums
        shares[rows, labels] -= 1
        slope = np.empty_like(matrix)
        slope[:, :-1] = shares.T @ features / count + strength * matrix[:, :-1]
        slope[:, -1] = shares.mean(0)
        return value, slope.ravel()

    options = {"maxiter": 1000, "maxcor": 20, "ftol": 1e-12, "gtol": 1e-6}
    found = minimize(loss, np.zeros(classes * (width + 1)), jac=True, method="L-BFGS-B", options=options)
    matrix = found.x.reshape(classes, width + 1)
    return Classifier(matrix[:, :-1], matrix[:, -1])


def drawn(labels: NDArray[np.int64], most: int, generator: np.random.Generator) -> list[NDArray[np.int64]]:
    """For each class that occurs, at most `most` of its rows in random order."""
    return [generator.permutation(np.flatnonzero(labels == label))[:most] for label in np.unique(labels)]


def chosen_strength(
    features: Array, labels: NDArray[np.int64], train: NDArray[np.int64], held_out: NDArray[np.int64], classes: int
) -> float:
    """The strength that is right most often on the held-out rows; of equals the strongest."""
    if not len(held_out):
        return USUAL
    right = {
        strength: (
            fit(features[train], labels[train], classes, strength).predict(features[held_out]) == labels[held_out]
        ).mean()
        for strength in STRENGTHS
    }
    return max(right, key=lambda strength: (right[strength], strength))


def _alike(a: LabelledSource, b: LabelledSource, count: int = 8) -> bool:
    """Whether a few pictures, evenly spread, are the same bytes in both."""
    for i in {k * len(a) // count for k in range(count)}:
        with contextlib.suppress(BadSample):
            if a._bytes(i) != b._bytes(i):
                return False
    return True


@checked
def probe(
    model: str | Path | nn.Module | ClipModel | Encoder,
    train: str | Path | LabelledSource,
    test: str | Path | LabelledSource,
    *,
    shots: Sequence[int | None] = (None,),
    seeds: int = 5,
    train_split: str | None = None,
    test_split: str | None = None,
    classes: str | Path | None = None,
    batch_size: int = 256,
    workers: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ProbeResults:
    """Train on `train`'s pictures, measure on `test`'s: a result for each number of pictures a class.

    model: any name of a model, a loaded one, or an Encoder with settings of its own; train, test: labelled sets by name
    or opened; train_split, test_split: of those named; classes: a file with the class names of both. shots: pictures a
    class (None: all); seeds: draws for each number of shots. batch_size: pictures a forward pass; workers: processes
    that decode (None: measured); device: None is a GPU where there is one, and where a loaded model is. progress: a bar
    on the error stream.

    Returns ProbeResults, a list of ProbeResult: shots, top1 with its interval, draws, strengths, pictures. Raises
    InputError for sets of other classes, unreadable sets, and more shots than any class has pictures. Source: the
    linear probe of arXiv 2103.00020, appendix A.3.
    """
    if seeds < 1 or any(number is not None and number < 1 for number in shots):
        raise InputError("probe: shots and seeds must be at least 1")
    train, test = (
        open_labelled(part, classes=classes, split=split) if isinstance(part, str | Path) else part
        for part, split in ((train, train_split), (test, test_split))
    )
    settings: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": progress}
    encoder = model if isinstance(model, Encoder) else Encoder(as_model(model, device), device=device, **settings)
    names = list(train.class_labels)
    place = {name: number for number, name in enumerate(names)}
    for one in (train, test):
        if one.several is not None:
            raise InputError(f"probe: {one.name} has several classes a picture; a probe learns one: name another set")
        if len(set(one.class_labels)) < len(one.class_labels):
            raise InputError(f"probe: two classes of {one.name} have the same name: give them names of their own")
    other = next((name for name in test.class_labels if name not in place), None)
    if other is not None:
        raise InputError(
            f"probe: the class '{other}' of {test.name} is not among the classes of {train.name}: name two sets of the "
            "same classes"
        )
    if len(names) < 2:
        raise InputError(f"probe: {train.name} has one class, so there is nothing to tell apart")
    if len(train) == len(test) and train.fingerprint() == test.fingerprint() and _alike(train, test):
        raise InputError(f"probe: {test.name} is what is trained on: name other pictures to measure on")
    image, kept, unread = encoder.images(train)
    features, labels = image.double().numpy(), train.labels[kept]
    image, kept, missing = encoder.images(test)
    left_out = tuple((f"{part.name}/{k}", why) for part, bad in ((train, unread), (test, missing)) for k, why in bad)
    there = np.array([place[name] for name in test.class_labels])
    test_features, right = image.double().numpy(), there[test.labels[kept]]
    many = len(names)
    counts = np.bincount(labels, minlength=many)
    if not counts.all():
        first = names[int(np.flatnonzero(counts == 0)[0])]
        raise InputError(
            f"probe: {int((counts == 0).sum())} of {many} classes have no picture in {train.name} that can be read "
            f"(the first is '{first}'), so they cannot be learned: add some, or leave the classes out"
        )
    largest = int(counts.max())
    found = ProbeResults()
    found.model, found.train, found.test = encoder.model.name, train.name, test.name
    for number in shots:
        if number is not None and number > largest:
            raise InputError(f"probe: {number} shots, and no class of {train.name} has more than {largest} pictures")
        draws, strengths, hits, pictures = [], [], np.zeros(len(right)), 0
        for seed in range(seeds if number is not None else 1):
            generator = np.random.default_rng(seed)
            groups = drawn(labels, len(labels), generator)
            if number is None:
                cut = [max(1, round(_HELD_OUT * len(group))) if len(group) > 1 else 0 for group in groups]
                held_out = np.concatenate([group[:n] for group, n in zip(groups, cut)])
                part, rows = np.concatenate([group[n:] for group, n in zip(groups, cut)]), np.arange(len(labels))
            else:
                rows = part = np.concatenate([group[:number] for group in groups])
                held_out = np.concatenate([group[number : number + min(number, 4)] for group in groups])
            strength = chosen_strength(features, labels, part, held_out, many)
            hits = (fit(features[rows], labels[rows], many, strength).predict(test_features) == right).astype(float)
            draws.append(float(hits.mean()))
            strengths.append(strength)
            pictures = len(rows)
        interval = seed_interval(draws, share=True) if len(set(draws)) > 1 else bootstrap(hits)
        found.append(ProbeResult(number, interval, tuple(draws), tuple(strengths), pictures, len(right), left_out))
    return found
