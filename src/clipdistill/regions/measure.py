"""How good a region teacher is, and how much of that is the caption it was given.

The published meta-teacher makes the image embedding from the image and a caption. Looking for that caption among others
with it is then no retrieval. All conditions here use the first caption of each image, one positive both ways:

    clip             the frozen CLIP on whole images
    mean of regions  the mean of the CLIP's region embeddings: what the network starts from
    own caption      g(image, its first caption) against the first captions: what the released training measures
    other caption    g(image, its second caption) against the first captions: no query is in its own answer
    wrong caption    g(image, the next image's caption): is the image found, or the caption?
    every pair       score(i, j) = cos(g(image i, caption j), caption j): the one honest use of the published form,
                     a forward pass for every pair (with the CLIP's scores on the same images)
    regions alone    the caption-free forms
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdistill.data.pairs import PairSource
from clipdistill.embed.encode import encode_pairs
from clipdistill.evaluate.retrieval import retrieval
from clipdistill.regions.meta_teacher import MetaTeacher
from clipdistill.regions.store import RegionBatch, RegionStore
from clipdistill.runtime.console import Shown, TextTable

METRICS = ("i2t_R@1", "i2t_R@5", "t2i_R@1", "t2i_R@5", "i2t_MRR", "t2i_MRR")
_BATCH = 128


@dataclass(repr=False)
class Measured(Shown):
    """Scores by condition; `images` is how many were scored in each. Fractions."""

    teacher: str
    data: str
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {"format": 1, **vars(self)}

    def table(self) -> TextTable:
        """The scores in percent."""
        rows: list[Sequence[str]] = [
            [name, str(self.images[name]), *(f"{100 * scores[m]:.1f}" if m in scores else "" for m in METRICS)]
            for name, scores in self.scores.items()
        ]
        title = f"{self.teacher} on {self.data}, first captions, percent"
        return TextTable(("image embedding", "images", *METRICS), rows, title)

    def tables(self) -> list[TextTable]:
        return [self.table()]


@torch.no_grad()
def measure(
    teacher: MetaTeacher,
    source: PairSource,
    store: RegionStore,
    *,
    pairs: int = 200,
    device: torch.device | str = "cpu",
) -> Measured:
    """Score every condition that the teacher's form allows on `source`; `pairs`: images of the condition every pair."""
    device = torch.device(device)
    teacher.to(device)
    teacher.network.eval()
    readable = torch.nonzero(store.readable()).flatten().tolist()
    measured = Measured(teacher.name, source.name)
    encoded = encode_pairs(teacher.clip, source, captions="first", device=device, progress=False)
    firsts = [source.captions(i)[0] for i in readable]
    conditions = _Conditions(teacher, store, readable, device)
    sentences = conditions.sentences(firsts)

    def add(name: str, images: Tensor, texts: Tensor) -> None:
        found = retrieval(images.cpu(), texts.cpu(), torch.arange(len(images)), ks=(1, 5, 10))
        measured.scores[name], measured.images[name] = {k: float(v) for k, v in found.items()}, len(images)

    add("clip", encoded.image, encoded.text)
    add("mean of regions", conditions.means(), sentences)
    if teacher.config.caption_free:
        add("regions alone", conditions.embed(None), sentences)
        return measured
    add("own caption", conditions.embed(firsts), sentences)
    seconds = [captions[min(1, len(captions) - 1)] for captions in map(source.captions, readable)]
    if any(one != two for one, two in zip(firsts, seconds)):
        add("other caption", conditions.embed(seconds), sentences)
    wrong = conditions.embed(firsts[1:] + firsts[:1])
    add("wrong caption: the image", wrong, sentences)
    add("wrong caption: the caption", wrong, sentences.roll(-1, 0))
    count = min(pairs, len(readable))
    chosen = [i * len(readable) // count for i in range(count)]
    add("every pair's images: clip", encoded.image[chosen], encoded.text[chosen])
    measured.scores["every pair"] = matrix_scores(conditions.every_pair(chosen, [firsts[i] for i in chosen]))
    measured.images["every pair"] = count
    return measured


class _Conditions:
    """Image embeddings of the readable images of a store under different captions."""

    def __init__(self, teacher: MetaTeacher, store: RegionStore, readable: Sequence[int], device: torch.device) -> None:
        self.teacher, self.store, self.readable, self.device = teacher, store, readable, device

    def sentences(self, captions: Sequence[str]) -> Tensor:
        """Unit-length sentence embeddings (N, D)."""
        return self._batched(len(captions), lambda part: self._text(captions[part])[0])

    def means(self) -> Tensor:
        """Mean region embedding (N, D) of each image."""

        def mean(part: slice) -> Tensor:
            regions = self._regions(part)
            count = regions.mask.sum(1, keepdim=True).clamp(min=1)
            return (F.normalize(regions.embeddings, dim=-1) * regions.mask[..., None]).sum(1) / count

        return self._batched(len(self.readable), mean)

    def embed(self, captions: Sequence[str] | None) -> Tensor:
        """Unit-length image embeddings (N, D), image i given captions[i]."""

        def images(part: slice) -> Tensor:
            if captions is None:
                return self.teacher.image(self._regions(part))
            _, states, mask = self._text(captions[part])
            return self.teacher.image(self._regions(part), states, mask)

        return self._batched(len(self.readable), images)

    def every_pair(self, chosen: Sequence[int], captions: Sequence[str]) -> Tensor:
        """Scores (n, n): row i column j is cos(g(image i, caption j), caption j)."""
        sentences, states, mask = self._text(captions)
        whole = self.store.read([self.readable[i] for i in chosen]).to(self.device)
        rows = []
        for i in range(len(chosen)):
            one = RegionBatch(*(t[i : i + 1] for t in (whole.embeddings, whole.mask, whole.areas, whole.confidences)))
            scores = []
            for begin in range(0, len(captions), _BATCH):
                part = slice(begin, begin + _BATCH)
                count = len(states[part])
                many = RegionBatch(
                    *(t.expand(count, *t.shape[1:]) for t in (one.embeddings, one.mask, one.areas, one.confidences))
                )
                images = self.teacher.image(many, states[part], mask[part])
                scores.append(F.cosine_similarity(images, sentences[part], dim=1))
            rows.append(torch.cat(scores))
        return torch.stack(rows)

    def _text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        return self.teacher.text(captions)

    def _regions(self, part: slice) -> RegionBatch:
        return self.store.read(self.readable[part]).to(self.device)

    def _batched(self, count: int, make: Callable[[slice], Tensor]) -> Tensor:
        parts = [make(slice(begin, begin + _BATCH)).float().cpu() for begin in range(0, count, _BATCH)]
        return F.normalize(torch.cat(parts), dim=-1)


def matrix_scores(scores: Tensor) -> dict[str, float]:
    """R@1, R@5, R@10 and MRR in both directions from a square matrix of scores, positives on the diagonal.

    Tied candidates are in random order, and each value is the expectation over it (as in evaluate.retrieval).
    """
    result: dict[str, float] = {}
    for direction, matrix in (("i2t", scores), ("t2i", scores.T)):
        own = matrix.diagonal()[:, None]
        ahead, level = (matrix > own).sum(1).double(), (matrix == own).sum(1).double() - 1
        for k in (1, 5, 10):
            share = ((k - ahead) / (level + 1)).clamp(0, 1)
            result[f"{direction}_R@{k}"] = float(share.mean())
        places = [(1 / (a + 1 + torch.arange(int(n) + 1))).mean() for a, n in zip(ahead, level, strict=True)]
        result[f"{direction}_MRR"] = float(torch.stack(places).double().mean())
    return result
