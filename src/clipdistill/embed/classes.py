"""Class vectors: one row a class name, from a text tower and prompt templates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipdistill.data.templates import check_templates, fill, templates
from clipdistill.embed.encode import Encoder


def class_weights(encoder: Encoder, class_names: Sequence[str], lines: Sequence[str]) -> Tensor:
    """Unit-length class vectors (C, D): the normalised mean over templates of normalised text embeddings."""
    texts = [fill(line, name) for name in class_names for line in lines]
    features = encoder.texts(texts, f"{len(class_names)} class names in {len(lines)} templates")
    means = features.view(len(class_names), len(lines), -1).double().mean(dim=1)
    return torch.nn.functional.normalize(means, dim=1).float()


def choose_templates(prompts: str | Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """(name for the protocol, templates) of a set's name, a file, or a list of templates."""
    if isinstance(prompts, str):
        lines = templates(prompts)
        return f"{prompts} ({len(lines)})", lines
    lines = check_templates(prompts, "the given templates")
    return f"given ({len(lines)})", lines
