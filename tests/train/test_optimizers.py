"""Optimisers by name, float16 with a loss scale, activations computed again: each continues to the bit, and does it."""

import copy
import json
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from clipdistill.errors import BudgetError, InputError
from clipdistill.models import build_student
from clipdistill.models.parameters import checkpoint_gradients
from clipdistill.objective import Objective
from clipdistill.train import loss_scale
from clipdistill.train.checkpoint import Checkpoint, restore, save_checkpoint
from clipdistill.train.config import OptimizerName, TrainConfig, resolve
from clipdistill.train.loss_scale import LossScale
from clipdistill.train.run import distill
from clipdistill.train.setup import build_optimiser
from clipdistill.train.step import Towers, forward_backward
from tests.models.conftest import tiny_architecture


class Plain(nn.Module):
    """Two matrices and a vector, some of which decay."""

    def __init__(self):
        super().__init__()
        self.visual, self.text = nn.Linear(6, 4), nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return (self.visual(x) * self.text(x)).sum()


def steps(module, optimiser, numbers):
    for k in numbers:
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * (1 - k / 20)
        optimiser.zero_grad(set_to_none=True)
        module(torch.randn(8, 6, generator=torch.Generator().manual_seed(k))).backward()
        optimiser.step()


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_a_checkpoint_holds_all_of_an_optimiser(name, tmp_path):
    objective = Objective.from_recipe("clip", student_dim=4, teacher_dim=4)
    config = TrainConfig(optimizer=name)
    torch.manual_seed(0)
    whole = Plain()
    optimiser = build_optimiser(whole, objective, config)
    before = [p.detach().clone() for p in whole.parameters()]
    steps(whole, optimiser, range(5))
    assert any(not torch.equal(a, b) for a, b in zip(before, whole.parameters()))
    state = {"step": 5, "total_steps": 9, "samples": 0}
    folder = save_checkpoint(tmp_path, None, {"towers": copy.deepcopy(whole)}, optimiser, state, 1)
    steps(whole, optimiser, range(5, 9))
    torch.manual_seed(1)
    resumed = Plain()
    again = build_optimiser(resumed, objective, config)
    restore(Checkpoint(folder, json.loads((folder / "state.json").read_text())), None, {"towers": resumed}, again)
    steps(resumed, again, range(5, 9))
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


def test_an_unknown_optimiser_is_told_at_once(tmp_path):
    with pytest.raises(InputError, match=r"train.optimizer"):
        resolve("clip", {"out": str(tmp_path / "r")}, size="debug", assignments=["train.optimizer=adamv"])


def debug(out, *more, recipe="clip-rd"):
    assignments = ["train.steps=6", "train.log_every=1", "train.checkpoint_every=3", "train.keep_checkpoints=9", *more]
    return resolve(recipe, {"out": str(out)}, size="debug", assignments=assignments)


def weights(run):
    return load_file(run.student / "model.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["train.precision=fp16", "train.batch_size=8", "train.micro_batch=4"], marks=pytest.mark.slow),
        ["train.optimizer=lamb"],
    ],
)
def test_a_continued_run_goes_on_to_the_bit(options, tmp_path):
    whole = distill(debug(tmp_path / "whole", *options), quiet=True)
    part = distill(debug(tmp_path / "part", *options), quiet=True)
    for step in ("00000006",):
        for path in sorted((part.folder / "checkpoints" / f"step-{step}").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    part = distill(debug(tmp_path / "part", *options), quiet=True)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(part)[name]), name


@pytest.mark.slow
def test_float16_overflows_lower_the_scale_and_are_no_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**30)
    run = distill(debug(tmp_path / "run", "train.precision=fp16", "train.batch_size=8", "train.steps=16"), quiet=True)
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    scales = [line["loss_scale"] for line in lines]
    assert scales[0] == 2.0**29
    assert scales == sorted(scales, reverse=True)
    assert lines[-1]["skipped_steps"] == 0
    assert lines[-1]["grad_norm"] < 1e4  # of the true gradients


def test_what_the_scale_cannot_help_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "FIRST", 1.0)
    monkeypatch.setattr(
        LossScale,
        "take_out",
        lambda self, parameters: [p.grad.fill_(torch.nan) for p in parameters if p.grad is not None],
    )
    with pytest.raises(BudgetError):
        distill(debug(tmp_path / "run", "train.precision=fp16", "train.max_skipped_steps=1"), quiet=True)


def test_the_scale_doubles_after_so_many_steps(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWS_AFTER", 3)
    scale = LossScale()
    found = []
    for updated in (True, True, True, True, False, True, True, True):
        scale.follow(updated)
        found.append(float(scale.factor) / loss_scale.FIRST)
    assert found == [1, 1, 2, 2, 1, 1, 1, 2]


def gradients(module, recompute):
    torch.manual_seed(0)
    module = copy.deepcopy(module).train()
    if recompute:
        checkpoint_gradients(module)
    objective = Objective.from_recipe("clip", student_dim=24, teacher_dim=24)
    images, tokens = torch.randn(6, 3, 32, 32), torch.randint(1, 30, (6, 8))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        forward_backward(
            Towers(module), objective, images, tokens, None, micro_batch=None, precision="fp32", seed=(0, 0, 0)
        )
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, sum(saved)


def test_activations_computed_again_give_the_same_gradients_from_less_memory():
    module = build_student(tiny_architecture(), seed=0, captions=["a b"]).module
    kept, memory = gradients(module, False)
    again, less = gradients(module, True)
    assert kept.keys() == again.keys()
    for name in kept:
        assert torch.equal(kept[name], again[name]), name
    assert less < memory


def test_students_that_cannot_compute_again_are_refused(tmp_path):
    with pytest.raises(InputError, match="no part of the student"):
        checkpoint_gradients(Plain())
    with pytest.raises(InputError, match="1 batch normalisations twice"):
        checkpoint_gradients(nn.Sequential(nn.BatchNorm1d(3)).train())


def test_what_an_optimiser_has_no_use_for_is_told(tmp_path, capsys):
    for name, told in (("sgd", True), ("adamw", False), ("lamb", False)):
        changes = ("train.steps=1", f"train.optimizer={name}", "train.epsilon=1e-3")
        distill(resolve("clip", {"out": str(tmp_path / name)}, size="debug", assignments=changes))
        said = capsys.readouterr().err
        assert ("train.optimizer=sgd has no use for train.betas and train.epsilon" in said) == told
        assert told or "has no use for" not in said
