"""`clipdistill replay RUN`: run a captured step again and find, term by term, the first value that is not finite.

A batch is a function of (seed, step), and the state before the step was kept with it, so the step can be run again
exactly: samples, pixels, weights, embeddings, every term, every gradient are looked at in the order in which they are
made. Runs of several ranks are replayed by one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipdistill.arguments import checked
from clipdistill.config import build
from clipdistill.data.loader import Batch
from clipdistill.errors import InputError
from clipdistill.runs.folder import RECIPE, RunFolder
from clipdistill.runtime.console import Shown
from clipdistill.runtime.files import read_json
from clipdistill.runtime.machine import pick_device
from clipdistill.train.capture import CAPTURED, STATE, captured_steps
from clipdistill.train.checkpoint import Checkpoint, read_checkpoint
from clipdistill.train.config import RunConfig
from clipdistill.train.run import make_task, resume
from clipdistill.train.task import Say, Task

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


@dataclass(repr=False)
class Replay(Shown):
    """What running a step again found, in the order of its making; `first` is where it begins."""

    step: int
    findings: list[Finding]
    advice: str = ""

    @property
    def first(self) -> Finding | None:
        """The first finding with a number that is not finite (None: all are)."""
        return next((finding for finding in self.findings if finding.bad), None)

    def __repr__(self) -> str:
        return "\n".join([f"step {self.step}", *(f"  {finding}" for finding in self.findings), self.advice])


@checked
def replay(
    folder: str | Path, step: int | None = None, *, device: str | torch.device | None = None, say: Say | None = None
) -> Replay:
    """Run a captured step again and find where the first value that is not finite was made.

    folder: of a run that skipped a step. step: which (None: the newest). device: None is the run's. say: a function
    that gets each line as it is found, `print` for one.

    Returns a Replay: findings in the order of their making, first, advice. Raises InputError when there is no such run
    or step, or the data no longer gives the samples of that step.
    """
    folder, say = Path(folder), say or (lambda _: None)
    config = _config(folder, device)
    step = _captured(folder, step)
    records = _records(folder, step)
    task = make_task(config, pick_device(config.device))
    checkpoint = _state(folder, step)
    if checkpoint is None:
        say(f"the state before step {step} was not kept: weights are those the run began with")
    else:
        task.tune(resume(task, checkpoint).towers, say)
    batch = next(iter(task.loader(step, step + 1)))
    _require_same_samples(folder, step, batch, records)
    say(
        f"step {step} of {folder}: {len(batch.keys)} samples, seed {config.train.seed}, {config.train.precision}, "
        f"captured on {len(records)} rank{'s' if len(records) > 1 else ''}"
    )
    found = Replay(step, [])
    for finding in _findings(task, batch, step, config.train.precision):
        found.findings.append(finding)
        say(f"  {finding}")
    found.advice = _advice(task, config, batch, step, found)
    say(found.advice)
    return found


def _config(folder: Path, device: str | torch.device | None) -> RunConfig:
    run = RunFolder(folder)
    if not (run / RECIPE).is_file():
        raise InputError(f"{folder}: holds no run (there is no {RECIPE} in it)")
    run.load_plugins()
    config = build(RunConfig, run.settings(), str(run / RECIPE))
    # the folder may have been moved; compiled graphs have no modules to look into
    train = config.train.model_copy(update={"compile": False, "workers": 0})
    return config.model_copy(
        update={"out": folder, "device": config.device if device is None else str(device), "train": train}
    )


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
        record = read_json(path, "not the record of a captured step")
        try:
            found.append((int(record["rank"]), record))
            _ = [*record["keys"], *record["captions"]]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(f"{path}: not the record of a captured step ({error})") from error
    return [record for _, record in sorted(found, key=lambda item: item[0])]


def _state(folder: Path, step: int) -> Checkpoint | None:
    path = folder / CAPTURED / STATE / f"step-{step:08d}"
    return read_checkpoint(path) if path.is_dir() else None


def _require_same_samples(folder: Path, step: int, batch: Batch, records: Sequence[dict[str, Any]]) -> None:
    captured = [pair for record in records for pair in _pairs(record["keys"], record["captions"])]
    for number, (before, now) in enumerate(zip(captured, _pairs(batch.keys, batch.captions))):
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


def _pairs(keys: Sequence[str], captions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Keys with their captions; '' where the batch has none."""
    return zip(keys, captions or [""] * len(keys))


def _findings(task: Task, batch: Batch, step: int, precision: str) -> Iterator[Finding]:
    """Every value of the step, in the order of its making."""
    for what, value, keys in task.trace(step, batch, precision):
        if isinstance(value, Tensor):
            yield _finding(what, value, keys)
            continue
        # parameters, or their gradients: all in one line, or a line for each that is not finite (at most ten)
        bad = [_finding(f"{what}, {name}", tensor) for name, tensor in value.items() if _bad(tensor)]
        if not bad:
            largest = max((_largest(tensor) for tensor in value.values()), default=0.0)
            yield Finding(what, 0, sum(tensor.numel() for tensor in value.values()), largest)
        yield from bad[:10]


def _advice(task: Task, config: RunConfig, batch: Batch, step: int, found: Replay) -> str:
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
    if config.train.precision != "fp32":
        again = next((f for f in _findings(task, batch, step, "fp32") if f.bad), None)
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


def _finding(what: str, tensor: Tensor, keys: Sequence[str] | None = None) -> Finding:
    """keys: the samples that the rows belong to."""
    bad: list[str] = []
    if keys:
        good = tensor.detach().flatten(1).isfinite().all(1).tolist()
        bad = [key for key, fine in zip(keys, good) if not fine]
    return Finding(what, _bad(tensor), tensor.numel(), _largest(tensor), bad, len(keys or ()))
