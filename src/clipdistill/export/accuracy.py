"""R@1 before and after: the same pairs through the model and through what was exported from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import DataConfig, PairSource, Subset
from clipdistill.embed.encode import EncodedPairs, encode_pairs
from clipdistill.errors import InputError
from clipdistill.evaluate.retrieval import retrieval
from clipdistill.models.clip_model import ClipModel
from clipdistill.statistics.protocol import captions_rule


@dataclass(frozen=True)
class Accuracy:
    """R@1 both ways (fractions), standard protocol, on so many images and captions of a set."""

    i2t: float
    t2i: float
    images: int
    captions: int
    data: str

    @property
    def mean(self) -> float:
        """The mean of both directions, in points (hundredths)."""
        return 50 * (self.i2t + self.t2i)

    def to_json(self) -> dict[str, Any]:
        """Metric names as everywhere, with what they were measured on."""
        return {
            "i2t_R@1": self.i2t,
            "t2i_R@1": self.t2i,
            "protocol": f"retrieval, standard: {self.data}, {self.images:,} images, {self.captions:,} captions",
        }

    def text(self) -> str:
        """'41.2 / 30.1' in percent."""
        return f"{100 * self.i2t:.1f} / {100 * self.t2i:.1f}"


def open_test(data: str, split: str | None = None, limit: int | None = None) -> PairSource:
    """The pairs R@1 is measured on: the test split, else val; `limit` images spread evenly over it."""
    config = DataConfig(path=data)
    try:
        source = open_pairs(config, split=split, default_split="test")
    except InputError:
        source = open_pairs(config, split=split, default_split="val")
    return source if limit is None or limit >= len(source) else Subset(source, limit)


def open_calibration(data: str, count: int) -> PairSource:
    """`count` pairs to calibrate on: of the training split where there is one, as test pairs must not shape a model."""
    config = DataConfig(path=data)
    try:
        source = open_pairs(config, split=None, default_split="train")
    except InputError:
        source = open_pairs(config, split=None, default_split="val")
    return Subset(source, min(count, len(source)))


def embed(model: ClipModel, source: PairSource, batch_size: int = 32, progress: bool = False) -> EncodedPairs:
    """Embeddings of all images and of the captions that the standard protocol scores."""
    return encode_pairs(
        model, source, batch_size=batch_size, captions=captions_rule("standard", source.name), progress=progress
    )


def accuracy(image: EncodedPairs, text: EncodedPairs, data: str) -> Accuracy:
    """R@1 with the images of one encoding and the captions of another of the same pairs."""
    found = retrieval(image.image, text.text, image.text_to_image, ks=(1,))
    return Accuracy(float(found["i2t_R@1"]), float(found["t2i_R@1"]), len(image.image), len(text.text), data)


def calibration_arrays(model: ClipModel, source: PairSource) -> dict[str, np.ndarray]:
    """tower -> inputs of the given pairs: images (N, 3, H, W) float32, first captions (N, L) int64."""
    from clipdistill.data.problems import BadSample
    from clipdistill.data.views import EVALUATION_VIEW, render

    images, captions = [], []
    for i in range(len(source)):
        try:
            images.append(render(source.image(i), EVALUATION_VIEW, model.image).numpy())
        except BadSample:
            continue
        captions.append(source.captions(i)[0])
    if not images:
        raise InputError(f"{source.name}: none of its images can be read, so there is nothing to calibrate on")
    return {"image": np.stack(images), "text": model.tokenizer(captions).numpy()}
