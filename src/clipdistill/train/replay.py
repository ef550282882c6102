"""`clipdistill replay RUN`: run a captured step again and find, term by term, the first value that is not finite.

A batch is a function of (seed, step), and the state before the step was kept with it, so the step can be run again
exactly: samples, pixels, weights, embeddings, every term, every gradient are looked at in the order in which they are
made. Runs of several ranks are replayed by one process with the whole batch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipdistill.config import build, read_yaml
from clipdistill.data.loader import Batch
from clipdistill.errors import InputError
from clipdistill.objective import Embeddings
from clipdistill.runtime.machine import pick_device
from clipdistill.train.capture import CAPTURED, STATE, captured_steps
from clipdistill.train.checkpoint import Checkpoint, read_checkpoint
from clipdistill.train.checks import one_term
from clipdistill.train.config import RunConfig
from clipdistill.train.setup import Setup
from clipdistill.train.setup import build as build_setup
from clipdistill.train.step import (
    Towers,
    autocast,
    captions_of,
    forward_backward,
    frozen_batch_statistics,
    step_seed,
    student_embeddings,
)

Say = Callable[[str], None]
_HUGE = 1e6
"""No weight of a model that still works is larger."""


@dataclass
class Finding:
    """One value of the step: how much of it is not finite, and which samples that concerns."""

    what: str
    bad: int
    total: int
    largest: float
    keys: list[str] = field(default_factory=list)
    samples: int = 0

    def __str__(self) -> str:
        if not self.bad:
            return f"{self.what:<44} finite, largest {self.largest:.4g}"
        rows = f", in {', '.join(self.keys[:4])}{', ...' if len(self.keys) > 4 else ''}" if self.keys else ""
        if self.keys and len(self.keys) == self.samples:
            rows = ", in every sample"
        return f"{self.what:<44} NOT FINITE: {self.bad} of {self.total} numbers{rows}"


@dataclass
class Replay:
    """What running a step again found, in the order of its making; `first` is where it begins."""

    step: int
    findings: list[Finding]
    advice: str = ""

    @property
    def first(self) -> Finding | None:
        return next((finding for finding in self.findings if finding.bad), None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and which of its captured steps."""
    parser.add_argument("run", type=Path, help="folder of a run whose step was skipped")
    parser.add_argument("--step", type=int, help="which captured step (default: the newest)")
    parser.add_argument("--device", help="cpu, cuda (default: the run's)")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; exit code 0, whatever it is."""
    replay(arguments.run, arguments.step, device=arguments.device, say=print)
    return 0


def replay(folder: Path, step: int | None = None, *, device: str | None = None, say: Say = lambda _: None) -> Replay:
    """Run the captured step `step` (default: the newest) of the run in `folder` again; `say` gets each line.

    Raises InputError when there is no such run or step, or the data no longer gives the samples of that step.
    """
    config = _config(folder, device)
    step = _captured(folder, step)
    records = _records(folder, step)
    setup = build_setup(config, pick_device(config.device))
    checkpoint = _state(folder, step)
    if checkpoint is None:
        say(f"the state before step {step} was not kept: weights are those the run began with")
    else:
        setup.resume(checkpoint)
    batch = next(iter(setup.loader(start_step=step, steps=step + 1)))
    _require_same_samples(folder, step, batch, records)
    say(
        f"step {step} of {folder}: {len(batch.keys)} samples, seed {config.train.seed}, {config.train.precision}, "
        f"captured on {len(records)} rank{'s' if len(records) > 1 else ''}"
    )
    found = Replay(step, [])
    for finding in _look(setup, batch, step, config.train.precision):
        found.findings.append(finding)
        say(f"  {finding}")
    found.advice = _advice(setup, batch, step, found)
    say(found.advice)
    return found


def _config(folder: Path, device: str | None) -> RunConfig:
    stored = folder / "recipe.yaml"
    if not stored.is_file():
        raise InputError(f"{folder}: holds no run (there is no recipe.yaml in it)")
    config = build(RunConfig, read_yaml(stored), str(stored))
    # the folder may have been moved; compiled graphs have no modules to look into
    train = config.train.model_copy(update={"compile": False, "workers": 0})
    return config.model_copy(update={"out": folder, "device": device or config.device, "train": train})


def _captured(folder: Path, step: int | None) -> int:
    steps = captured_steps(folder)
    if not steps:
        raise InputError(f"{folder}: no step of this run was skipped, so there is nothing to replay")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise InputError(f"{folder}: step {step} was not captured; captured: {', '.join(map(str, steps))}")
    return step


def _records(folder: Path, step: int) -> list[dict[str, Any]]:
    """What each rank wrote about the step, in the order of the ranks."""
    found = []
    for path in (folder / CAPTURED).glob(f"step-{step:08d}-rank-*.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found.append((int(record["rank"]), record))
            _ = [*record["keys"], *record["captions"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not the record of a captured step ({error})") from error
    return [record for _, record in sorted(found, key=lambda item: item[0])]


def _state(folder: Path, step: int) -> Checkpoint | None:
    path = folder / CAPTURED / STATE / f"step-{step:08d}"
    return read_checkpoint(path) if path.is_dir() else None


def _require_same_samples(folder: Path, step: int, batch: Batch, records: Sequence[dict[str, Any]]) -> None:
    captured = [pair for record in records for pair in zip(record["keys"], record["captions"])]
    for number, (before, now) in enumerate(zip(captured, zip(batch.keys, batch.captions))):
        if before != now:
            raise InputError(
                f"{folder}: the data now gives another batch for step {step}: sample {number} was '{before[0]}' with "
                f"'{before[1][:60]}' and is '{now[0]}' with '{now[1][:60]}': replay it with the data of the run"
            )
    if len(captured) != len(batch.keys):
        raise InputError(
            f"{folder}: step {step} had {len(captured)} samples and now has {len(batch.keys)}: a rank's record is "
            "missing, or samples can no longer be read"
        )


def _look(setup: Setup, batch: Batch, step: int, precision: str) -> Iterator[Finding]:
    """Every value of the step, in the order of its making."""
    keys = batch.keys
    images, tokens = batch.student_images.to(setup.device), captions_of(batch).to(setup.device)
    yield _rows("pixels", batch.student_images, keys)
    towers = setup.bare_towers
    if setup.masking is not None:
        setup.masking.before_step(setup.config.train.seed, step)
    yield from _parameters("weights", towers, setup.objective)
    teacher = None if setup.teacher is None else setup.teacher(batch)
    if teacher is not None:
        yield _rows("teacher, image embeddings", teacher.image, keys)
        yield _rows("teacher, text embeddings", teacher.text, keys)
        yield _values("teacher, logit scale", teacher.logit_scale)
    image, text, scale, bias, modules = _encode(setup, images, tokens, step, precision)
    yield from modules
    yield _rows("student, image embeddings", image, keys)
    yield _rows("student, text embeddings", text, keys)
    yield _values("student, logit scale", scale)
    if bias is not None:
        yield _values("student, logit bias", bias)
    leaves = [tensor.detach().requires_grad_() for tensor in (image, text)]
    student = student_embeddings(leaves[0], leaves[1], scale.detach(), bias)
    for name in setup.objective.weights:
        alone = one_term(setup, name)
        output = alone(student, teacher)
        yield _values(f"term {name}", output.terms[name])
        gradients = torch.autograd.grad(output.total, leaves, allow_unused=True)
        for tower, gradient in zip(("image", "text"), gradients):
            if gradient is not None:
                yield _rows(f"term {name}, gradient at the {tower}s", gradient, keys)
    yield from _gradients(setup, images, tokens, teacher, step, precision)


def _parts(setup: Setup, images: Tensor, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    size = setup.config.train.micro_batch or max(len(images), 1)
    return list(zip(images.split(size), tokens.split(size), strict=True))


def _encode(
    setup: Setup, images: Tensor, tokens: Tensor, step: int, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, list[Finding]]:
    """The student's raw features as in training, and the first module that makes finite input something else."""
    towers: Towers = setup.bare_towers
    found: list[Finding] = []
    encoded = []
    with _Watched(towers.module, found), torch.no_grad(), frozen_batch_statistics(towers):
        for index, (part_images, part_tokens) in enumerate(_parts(setup, images, tokens)):
            torch.manual_seed(step_seed(setup.config.train.seed, step, 0, index))
            with autocast(setup.device, precision):
                encoded.append(towers(part_images, part_tokens))
    image, text = (torch.cat([part[i] for part in encoded]) for i in (0, 1))
    _, _, scale, bias = encoded[0]
    return image, text, scale, bias, found[:1]


class _Watched:
    """While open, modules that turn finite input into something else are listed, the innermost first."""

    def __init__(self, module: nn.Module, found: list[Finding]) -> None:
        self.module, self.found = module, found
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self.module.named_modules():
            if name:
                self.handles.append(module.register_forward_hook(self._look_at(name)))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _look_at(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
            outputs = [t for t in (made if isinstance(made, tuple) else (made,)) if isinstance(t, Tensor)]
            inputs = [t for t in given if isinstance(t, Tensor) and t.is_floating_point()]
            if all(_bad(t) == 0 for t in inputs) and any(_bad(t) for t in outputs):
                bad, total = sum(map(_bad, outputs)), sum(t.numel() for t in outputs)
                self.found.append(Finding(f"student, output of {name} ({type(module).__name__})", bad, total, 0.0))

        return hook


def _gradients(
    setup: Setup, images: Tensor, tokens: Tensor, teacher: Embeddings | None, step: int, precision: str
) -> Iterator[Finding]:
    """The gradients of the parameters, as the training step makes them."""
    train = setup.config.train
    setup.optimiser.zero_grad(set_to_none=True)
    towers = setup.bare_towers
    kept = {name: buffer.clone() for name, buffer in towers.named_buffers()}
    output = forward_backward(
        towers, setup.objective, images, tokens, teacher,
        micro_batch=train.micro_batch, precision=precision, seed=(train.seed, step, 0),
    )  # fmt: skip
    for name, buffer in towers.named_buffers():
        buffer.copy_(kept[name])
    yield _values("total", output.total)
    yield from _parameters("gradients", towers, setup.objective, of=lambda parameter: parameter.grad)
    setup.optimiser.zero_grad(set_to_none=True)


def _advice(setup: Setup, batch: Batch, step: int, found: Replay) -> str:
    """One sentence: where it begins, and what helps."""
    first = found.first
    if first is None:
        return (
            "all finite: the step does not fail again here, so it was not the data nor the weights; look at the "
            "hardware, other library versions, or another number of ranks"
        )
    begins = f"it begins at: {first.what}"
    if first.keys:
        begins += f", in {len(first.keys)} of {len(batch.keys)} samples (the first: '{first.keys[0]}')"
    if first.what.startswith("weights"):
        return f"{begins}: an earlier step made them so; go back to an earlier checkpoint with a lower learning rate"
    if first.what.startswith(("pixels", "teacher")):
        return f"{begins}: the student and the objective are not the cause; check the data and the teacher"
    weights = next((f for f in found.findings if f.what == "weights"), None)
    if weights is not None and weights.largest > _HUGE:
        return f"{begins}: weights have grown to {weights.largest:.3g}: go back and use a lower train.learning_rate"
    if setup.config.train.precision != "fp32":
        again = next((f for f in _look(setup, batch, step, "fp32") if f.bad), None)
        if again is None:
            return f"{begins}: with train.precision=fp32 the same step is finite"
        return f"{begins}: with train.precision=fp32 it is still not finite ({again.what})"
    term = first.what.split()[1].rstrip(",") if first.what.startswith("term") else None
    smaller = "" if term is None else f" or a smaller objective.weights.{term}"
    return f"{begins}: try a lower train.learning_rate, train.clip_grad_norm=1{smaller}"


def _bad(tensor: Tensor) -> int:
    return int(tensor.numel() - tensor.detach().isfinite().sum().item())


def _largest(tensor: Tensor) -> float:
    values = tensor.detach().float().abs()
    values = values[values.isfinite()]
    return float(values.max()) if values.numel() else 0.0


def _values(what: str, tensor: Tensor | float | Sequence[float]) -> Finding:
    tensor = torch.as_tensor(tensor)
    return Finding(what, _bad(tensor), tensor.numel(), _largest(tensor))


def _rows(what: str, tensor: Tensor, keys: Sequence[str]) -> Finding:
    """A tensor with a row for each sample."""
    good = tensor.detach().flatten(1).isfinite().all(1).tolist()
    bad = [key for key, fine in zip(keys, good) if not fine]
    return Finding(what, _bad(tensor), tensor.numel(), _largest(tensor), bad, len(keys))


def _parameters(
    what: str,
    *modules: nn.Module,
    of: Callable[[nn.Parameter], Tensor | None] = lambda parameter: parameter,
) -> Iterator[Finding]:
    """All parameters (or their gradients) in one line, or a line for each that is not finite (at most ten)."""
    named = [(name, of(p)) for module in modules for name, p in module.named_parameters()]
    present = [(name, tensor) for name, tensor in named if tensor is not None]
    bad = [Finding(f"{what}, {name}", _bad(t), t.numel(), _largest(t)) for name, t in present if _bad(t)]
    if not bad:
        total = sum(tensor.numel() for _, tensor in present)
        yield Finding(what, 0, total, max((_largest(t) for _, t in present), default=0.0))
    yield from bad[:10]
