"""Every recipe's objective, and input that fits it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from clipdistill.objective import TERMS, Embeddings, Objective
from clipdistill.objective.config import ObjectiveConfig
from clipdistill.recipes import load_recipe, recipe_names
from tests.objective.plain import random_bank, random_embeddings, unit

EVERYTHING = "every term"


def mix_names() -> list[str]:
    """The recipes, one of those with the same objective, and a mix of all terms that go with a single teacher."""
    distinct = {repr(sorted(settings_of(name).items())): name for name in reversed(recipe_names())}
    return [*reversed(distinct.values()), EVERYTHING]


def batch_terms() -> list[str]:
    """The terms that compare the rows of a batch alone: no bank and no classes are needed."""
    return [name for name in TERMS.names() if not (TERMS.get(name).bank or TERMS.get(name).classes)]


def settings_of(mix: str) -> dict[str, Any]:
    """The objective's settings under a mix's name."""
    if mix == EVERYTHING:
        return {"weights": {name: 10.0 if name == "fd" else 1.0 for name in batch_terms()}}
    settings: dict[str, Any] = load_recipe(mix)["objective"]
    return settings


def make_objective(mix: str, student: int, teacher: int, engine: str, dtype: torch.dtype = torch.float64) -> Objective:
    """The mix's objective, with the same random parameters each time."""
    torch.manual_seed(7)
    config = ObjectiveConfig(**{**settings_of(mix), "engine": engine})
    return Objective.from_config(config, student, teacher).to(dtype)


def make_input(
    mix: str, rows: int, student: int, teacher: int, dtype: torch.dtype = torch.float64
) -> tuple[Embeddings, Embeddings]:
    """Student and teacher embeddings; ensembles and synthetic captions for reinforced recipes."""
    ours = random_embeddings(rows, student, 12.0, 1, trained=True, dtype=dtype)
    theirs = random_embeddings(rows, teacher, 30.0, 2, dtype=dtype)
    ours = replace(ours, logit_bias=torch.tensor(-2.0, dtype=dtype, requires_grad=True))
    if "reinforced" in settings_of(mix)["weights"]:
        synthetic = random_embeddings(rows, student, 1.0, 3, trained=True, dtype=dtype).text
        ours = replace(ours, synthetic_text=synthetic)
        theirs = replace(theirs, synthetic_text=random_embeddings(rows, teacher, 1.0, 4, dtype=dtype).text)
        if mix != EVERYTHING:
            theirs = replace(theirs, blocks=(teacher - 3, 3), logit_scale=(30.0, 20.0))
    if ObjectiveConfig(**settings_of(mix)).needs_bank:
        theirs = replace(theirs, bank=random_bank(rows, teacher, 5, dtype=dtype))
    if ObjectiveConfig(**settings_of(mix)).needs_classes:
        theirs = replace(theirs, classes=unit(random_embeddings(4, teacher, 1.0, 6, dtype=dtype).text))
    return ours, theirs


def leaves(student: Embeddings, objective: Objective) -> dict[str, torch.Tensor]:
    """Everything that may receive a gradient, by name."""
    found = {
        part: getattr(student, part)
        for part in ("image", "text", "synthetic_text", "logit_scale", "logit_bias")
        if isinstance(getattr(student, part), torch.Tensor)
    }
    return found | dict(objective.named_parameters())


def gradients(total: torch.Tensor, of: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """d total / d each; zeros where it does not depend."""
    wanted = {name: leaf for name, leaf in of.items() if leaf.requires_grad}
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(wanted.items(), found)
    }
