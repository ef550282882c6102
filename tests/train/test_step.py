"""Micro-batches by gradient caching give the whole batch's gradients, for every recipe."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from clipdistill.config import build
from clipdistill.objective import Embeddings, Objective
from clipdistill.objective.config import ObjectiveConfig
from clipdistill.recipes import load_recipe, recipe_names
from clipdistill.train.step import Towers, forward_backward
from tests.objective.plain import random_bank

ROWS, STUDENT, TEACHER = 10, 6, 8


class TinyClip(nn.Module):
    """Two linear towers with the interface of a CLIP module, in float64."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(12, STUDENT).double(), nn.Embedding(20, STUDENT).double()
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64)) if bias else None

    def encode_image(self, images):
        return self.image(images.flatten(1))

    def encode_text(self, tokens):
        return self.text(tokens).mean(1)


class DoubleTowers(Towers):
    """The towers without the rounding to float32, so that equality can be asked for to 1e-10."""

    def forward(self, images, tokens):
        scale = (
            self.module.logit_scale.exp()
            if self.fixed_logit_scale is None
            else torch.tensor(float(self.fixed_logit_scale))
        )
        return self.module.encode_image(images), self.module.encode_text(tokens), scale, self.module.logit_bias


def gradients(recipe: str, micro_batch: int | None) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    values = load_recipe(recipe)
    config = build(ObjectiveConfig, values["objective"])
    objective = Objective.from_config(config, STUDENT, TEACHER).double()
    towers = DoubleTowers(TinyClip(bias="sigmoid" in config.active_terms), values["train"].get("fixed_logit_scale"))
    images = torch.randn(ROWS, 3, 2, 2, dtype=torch.float64)
    tokens = torch.randint(0, 20, (ROWS, 5))
    teacher = Embeddings(torch.randn(ROWS, TEACHER).double(), torch.randn(ROWS, TEACHER).double(), 30.0)
    if config.needs_bank:
        teacher = replace(teacher, bank=random_bank(ROWS, TEACHER, 5))
    if config.needs_classes:
        teacher = replace(teacher, classes=torch.nn.functional.normalize(torch.randn(3, TEACHER).double(), dim=1))
    output = forward_backward(
        towers,
        objective,
        images,
        tokens,
        teacher if config.needs_teacher else None,
        micro_batch=micro_batch,
        precision="fp32",
        seed=(0, 0, 0),
    )
    named = [*towers.named_parameters(), *objective.named_parameters()]
    return output.total.item(), {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("recipe", recipe_names())
def test_micro_batches_keep_the_whole_batch(recipe):
    whole_value, whole = gradients(recipe, None)
    assert whole
    for micro_batch in (1, 4, 9):
        value, cached = gradients(recipe, micro_batch)
        assert value == pytest.approx(whole_value, rel=1e-12)
        assert cached.keys() == whole.keys()
        for name in whole:
            torch.testing.assert_close(cached[name], whole[name], rtol=1e-10, atol=1e-12, msg=f"{recipe} {name}")


def test_plain_accumulation_would_be_wrong():
    """The check above can fail: halves of the batch on their own are another objective."""
    whole, _ = gradients("clip", None)
    torch.manual_seed(0)
    objective = Objective.from_recipe("clip", student_dim=STUDENT, teacher_dim=TEACHER).double()
    towers = DoubleTowers(TinyClip(bias=False))
    images, tokens = torch.randn(ROWS, 3, 2, 2, dtype=torch.float64), torch.randint(0, 20, (ROWS, 5))
    halves = 0.0
    for part in (slice(0, 5), slice(5, 10)):
        image, text, scale, _ = towers(images[part], tokens[part])
        halves += float(objective(Embeddings(image, text, scale)).total) / 2
    assert abs(halves - whole) > 0.1


def test_batch_statistics_are_updated_once():
    """The first, graph-free pass of gradient caching leaves batch-norm's running statistics alone."""
    from clipdistill.train.step import frozen_batch_statistics

    layer = nn.BatchNorm1d(3)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with torch.no_grad(), frozen_batch_statistics(layer):
        layer(torch.randn(8, 3))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    layer(torch.randn(8, 3))
    assert int(layer.num_batches_tracked) == 1
    assert not torch.equal(layer.running_mean, before["running_mean"])
