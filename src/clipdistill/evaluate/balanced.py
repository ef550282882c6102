"""Retrieval scores balanced by auxiliary prompts (BSAP, arXiv 2402.18400): another question than plain cosines ask.

Some images are near to every text. The balanced score of a text b and an image a is the text's share among it and
auxiliary prompts p_1 ... p_K, at the model's own logit multiplier k:

    q(a, b) = exp(k a.b) / (exp(k a.b) + Z(a)),   Z(a) = sum_j exp(k a.p_j)

For one text, q orders the images as a.b + beta(a) does, beta(a) = -log(Z(a)) / k. So the images get one number more and
a second one that makes all of equal length, the texts get 1 and 0, and the cosines of these rows rank as q does:
everything that counts ranks (tiles, ties, ranks of torch.distributed) stays as it is. For one image, beta is a
constant: image-to-text results are those of the plain scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clipdistill.data.captions import require_legible
from clipdistill.data.files import data_path
from clipdistill.errors import InputError
from clipdistill.runtime.files import text_lines
from clipdistill.statistics.protocol import digest

if TYPE_CHECKING:
    from torch import Tensor

    from clipdistill.embed.encode import EncodedPairs, Encoder

PROMPTS = ("a photo", "a picture", "an image", "a photo of something", "a photo of a scene")
"""Ours: the abstracts of the paper name none."""


def balanced(file: str) -> Callable[[Encoder, EncodedPairs], tuple[EncodedPairs, str, str]]:
    """A function that gives rows whose cosines rank as balanced scores do, the protocol's words, the prompts' hash.

    file: of auxiliary prompts, one a line; '' for `PROMPTS`. Raises InputError for a file without any, and the function
    for a model without a logit scale.
    """
    prompts = _read(file) if file else PROMPTS
    origin = f" of {Path(file).name}" if file else ""
    words = f"scores balanced by {len(prompts):,} auxiliary prompts{origin} (BSAP, not plain cosines)"

    def rescored(encoder: Encoder, encoded: EncodedPairs) -> tuple[EncodedPairs, str, str]:
        scale = getattr(encoder.model.module, "logit_scale", None)
        if scale is None:
            raise InputError(f"balanced scores need the model's logit scale, and '{encoder.model.name}' has none")
        others = encoder.texts(prompts, "auxiliary prompts")
        image, text = augmented(encoded.image, encoded.text, others, float(scale.detach().exp()))
        return replace(encoded, image=image, text=text), words, digest(prompts)

    return rescored


def augmented(image: Tensor, text: Tensor, prompts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(N, D), (M, D), (K, D) of length 1 and the logit multiplier -> (N, D + 2) and (M, D + 2), computed in float64."""
    import torch

    rows, others = image.double(), prompts.double()
    beta = -torch.logsumexp(scale * rows @ others.T, dim=1) / scale
    beta = beta - beta.mean()  # a shift of all changes no order, and small numbers keep the cosines apart
    room = (beta.square().max() - beta.square()).clamp(min=0).sqrt()
    ones = torch.ones(len(text), 1, dtype=torch.float64)
    images = torch.cat([rows, beta[:, None], room[:, None]], dim=1)
    return images.to(image.dtype), torch.cat([text.double(), ones, 0 * ones], dim=1).to(text.dtype)


def _read(file: str) -> tuple[str, ...]:
    lines = text_lines(data_path(file), f"auxiliary prompts '{file}'")
    found = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise InputError(f"auxiliary prompts '{file}': no prompt in it; give one a line")
    for text in found:
        require_legible(text, f"auxiliary prompts '{file}'")
    return found
