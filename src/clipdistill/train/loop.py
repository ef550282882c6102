"""The training loop: one pass through the steps of a task, readable from top to bottom."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from clipdistill.data.ledger import BadSampleLedger
from clipdistill.data.loader import Batch
from clipdistill.errors import BudgetError, Preempted, StorageError
from clipdistill.objective import ObjectiveOutput
from clipdistill.runs.folder import BAD_SAMPLES, CHECKPOINTS
from clipdistill.runtime.distributed import any_rank, gather_lists, is_main, on_main, sum_over_ranks
from clipdistill.runtime.signals import Interrupted, StopSignal
from clipdistill.train.callbacks import Callbacks, RunView, Say
from clipdistill.train.checkpoint import CheckpointWriter
from clipdistill.train.config import RunConfig, TrainConfig
from clipdistill.train.failures import Whereabouts
from clipdistill.train.task import Point, Task

T = TypeVar("T")


@dataclass
class Progress:
    """The counters of a run; what a checkpoint stores beside weights."""

    step: int = 0
    samples: int = 0
    skipped_steps: int = 0
    bad_samples: int = 0
    truncated_student: int = 0
    truncated_teacher: int = 0
    seconds: float = 0.0
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last log line, so that a resumed log continues as if never interrupted."""
    ledger: dict[str, Any] = field(default_factory=dict)
    """Counters of the bad-sample ledger."""
    evaluation_due: bool = False
    """The curve's point of this step is still to be measured: a signal came before or while it was."""
    best: dict[str, Any] = field(default_factory=dict)
    """The best point of the curve so far (train.best), where train.keep_best asks for one."""
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of several sets: samples so far and, in "window", sums since the last log line, by name."""
    towers: dict[str, Any] = field(default_factory=dict)
    """How the towers are computed (train.tune), so that a resumed run rounds as before."""


@dataclass
class Loop:
    """A run under way: what is trained, how far it is, who is told."""

    config: RunConfig
    task: Task
    progress: Progress
    callbacks: Callbacks
    say: Say
    stop: StopSignal
    place: Whereabouts
    view: RunView

    def __post_init__(self) -> None:
        self.writer = CheckpointWriter(self.config.out / CHECKPOINTS, self.config.train.keep_checkpoints)
        self.saved = {"step": 0, "samples": 0}  # of the checkpoint that is being written

    def tell(self, event: str, **changes: Any) -> None:
        """Call the callbacks (on rank 0) with the run as it is now."""
        now = {"step": self.progress.step, "samples": self.progress.samples}
        self.view = replace(self.view, **{**now, **changes})
        if is_main():
            self.callbacks.call(event, self.view)


def train(loop: Loop) -> None:
    """Run the steps that remain. Raises Preempted after saving on a signal, BudgetError over a stated budget."""
    try:
        _train(loop)
    finally:  # whatever ended the steps, the folder is left with nothing being written in it
        with contextlib.suppress(Exception):
            loop.writer.finished()


def _train(loop: Loop) -> None:
    config, task, progress, place = loop.config.train, loop.task, loop.progress, loop.place
    device, stop = task.device, loop.stop
    place.step, place.doing = progress.step, "training"
    ledger = _open_ledger(loop)
    began = time.monotonic() - progress.seconds
    loop.tell("on_start")
    if progress.evaluation_due:
        _evaluate(loop)
        if any_rank(progress.evaluation_due, device):  # put off again: a step more, and it would be of other weights
            raise _stopped(loop)
    waiting = time.monotonic()
    for batch in task.loader(progress.step) if not _learns_no_more(loop) else ():
        waited = time.monotonic() - waiting
        if said := task.before_step(progress.step):
            loop.say(said)
        output, gradient_norm = task.gradients(progress.step, batch)
        finite = not any_rank(not (math.isfinite(gradient_norm) and output.total.isfinite().item()), device)
        rate = set_learning_rate(task.optimiser, learning_rate_factor(*task.schedule(progress.step), config))
        if finite:
            task.optimiser.step()
        expected = task.after_step(finite)
        if not finite and not expected:
            _record_skipped(loop, batch, output)
        progress.step = place.step = progress.step + 1
        counts = (len(batch.keys), len(batch.problems), batch.truncated_student, batch.truncated_teacher)
        seen, bad, cut_student, cut_teacher, written = sum_over_ranks((*counts, loop.writer.done), device)
        progress.samples += int(seen)
        progress.bad_samples += int(bad)
        progress.truncated_student += int(cut_student)
        progress.truncated_teacher += int(cut_teacher)
        problems = gather_lists(batch.problems) if bad else []
        ledger.record(problems, seen=int(seen + bad))
        progress.ledger = ledger.state()
        now = time.monotonic()
        progress.seconds = now - began
        losses = {"total": float(output.total.detach()), **{k: float(v) for k, v in output.terms.items()}}
        if batch.part:
            own = progress.sets.setdefault(batch.part, {"samples": 0, "bad_samples": 0, "window": {}})
            own["samples"], own["bad_samples"] = own["samples"] + int(seen), own["bad_samples"] + int(bad)
            _add(own["window"], {**losses, "steps": 1} if finite else {})
        _accumulate(progress, losses, gradient_norm, finite, seen=seen, waited=waited, seconds=now - waiting)
        finished = progress.step == task.total_steps
        line = _log_line(loop, rate) if progress.step % config.log_every == 0 or finished else None
        loop.tell("on_step", losses=MappingProxyType(losses), line=line)
        if _due(progress.step, config.evaluate_every) or (finished and config.evaluate_every):
            _evaluate(loop)
        stopping = any_rank(stop.received is not None, device)
        early = not finished and _due(progress.step, config.evaluate_every) and _learns_no_more(loop)
        if written:
            _checkpoint_done(loop)
        if _due(progress.step, config.checkpoint_every) or finished or stopping or early:
            _write_checkpoint(loop)
        if finished or stopping or early:
            _checkpoint_done(loop)
        if early:
            loop.say(f"no better {config.keep_best} in {config.patience} points: the run ends at step {progress.step}")
            return
        if stopping and not finished:
            raise _stopped(loop)
        waiting = time.monotonic()


def _stopped(loop: Loop) -> Preempted:
    return Preempted(
        f"stopped by {loop.stop.received or 'a signal on another rank'} after step {loop.progress.step}; saved: "
        "run the same command again to go on"
    )


def _open_ledger(loop: Loop) -> BadSampleLedger:
    """The list of bad samples; every rank counts all of them, rank 0 writes."""
    source = loop.task.source
    path = loop.config.out / BAD_SAMPLES if is_main() else Path(os.devnull)
    ledger = BadSampleLedger(path, loop.config.data.bad_sample_budget, shard_of=source.shard_of)
    if loop.progress.ledger:
        ledger.restore(loop.progress.ledger)
    else:
        ledger.record_opening(source.problems, len(source) + source.problems.dropped)
    return ledger


def _write_checkpoint(loop: Loop) -> None:
    """Rank 0 writes, behind the steps that follow; what the other ranks hold is the same."""
    _checkpoint_done(loop)
    task = loop.task
    loop.saved = {"step": loop.progress.step, "samples": loop.progress.samples}

    def start() -> None:
        state = {**vars(loop.progress), "total_steps": task.total_steps}
        loop.writer.start(*task.checkpoint(), task.optimiser, state)

    _told_to_all(start)


def _checkpoint_done(loop: Loop) -> None:
    """Wait for the checkpoint that is being written, if any, and tell the callbacks."""
    folder = _told_to_all(loop.writer.finished)
    if folder is not None:
        if loop.progress.best:
            from clipdistill.train.best import forget_before

            forget_before(loop.config.out, loop.progress.best)
        loop.tell("on_checkpoint", checkpoint=folder, **loop.saved)


def _told_to_all(work: Callable[[], T]) -> T | None:
    """`work()` on rank 0. Raises its StorageError on all ranks."""
    problems: list[str] = []
    result: T | None = None
    if is_main():
        try:
            result = work()
        except StorageError as error:
            problems.append(str(error))
    problems = gather_lists(problems)
    if problems:
        raise StorageError(problems[0])
    return result


def _record_skipped(loop: Loop, batch: Batch, output: ObjectiveOutput) -> None:
    """A step whose loss or gradient is not finite changes nothing; what led to it is kept for `clipdistill replay`."""
    from clipdistill.train.capture import CAPTURED, capture

    progress, folder, most = loop.progress, loop.config.out, loop.config.train.max_skipped_steps
    progress.skipped_steps += 1
    captured = capture(loop.task, loop.config, batch, output, dict(vars(progress)))
    loop.say(
        f"step {progress.step}: the loss or its gradient is not finite, so the step is skipped ({captured}; "
        f"`clipdistill replay {folder}` says where it begins)"
    )
    if progress.skipped_steps > most:
        raise BudgetError(
            f"step {progress.step}: the loss or its gradient was not finite in {progress.skipped_steps} steps of this "
            f"run (train.max_skipped_steps={most}); the batches are in "
            f"{folder / CAPTURED} (`clipdistill replay {folder}` says where it begins); "
            "try a lower train.learning_rate, train.clip_grad_norm=1 or train.precision=fp32"
        )


def _accumulate(
    progress: Progress, losses: dict[str, float], gradient_norm: float, finite: bool, **times: float
) -> None:
    values = dict(times)
    if finite:
        values |= {name if name == "total" else f"term/{name}": value for name, value in losses.items()}
        values |= {f"count/{name}": 1 for name in losses if name != "total"}  # not every step has every term
        values |= {"gradient": gradient_norm, "steps": 1}
    _add(progress.window, values)


def _add(sums: dict[str, float], values: dict[str, float]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


def _log_line(loop: Loop, rate: float) -> dict[str, Any]:
    """Means since the last line; the window starts anew."""
    progress = loop.progress
    sums, progress.window = progress.window, {}
    count = max(sums.get("steps", 0.0), 1.0)
    return {
        "step": progress.step,
        "epoch": round(progress.step / loop.task.steps_per_epoch, 4),
        "samples": progress.samples,
        "total": sums.get("total", math.nan) / count,
        "terms": {k[5:]: v / sums.get(f"count/{k[5:]}", count) for k, v in sums.items() if k.startswith("term/")},
        **({"sets": {name: _of_set(own) for name, own in progress.sets.items()}} if progress.sets else {}),
        "learning_rate": rate,
        "grad_norm": sums.get("gradient", math.nan) / count,
        **loop.task.numbers(progress.step),
        "samples_per_second": sums["seen"] / max(sums["seconds"], 1e-9),
        "data_wait": sums["waited"] / max(sums["seconds"], 1e-9),
        "skipped_steps": progress.skipped_steps,
        "bad_samples": progress.bad_samples,
        "seconds": round(progress.seconds, 3),
    }


def _of_set(own: dict[str, Any]) -> dict[str, Any]:
    """What the log tells of one of several sets; its window starts anew."""
    sums, own["window"] = own["window"], {}
    steps = sums.pop("steps", 0)
    counts = {name: own[name] for name in ("samples", "bad_samples")}
    return {**counts, "steps": steps, **{name: value / steps for name, value in sums.items()}}


def _evaluate(loop: Loop) -> None:
    """One point of the curve, on rank 0 (the others wait). A stop signal puts it off until the run goes on."""
    loop.progress.evaluation_due = False
    if not loop.task.validation_name:
        return
    _checkpoint_done(loop)  # no process is forked while it is written

    def measured() -> Point | None:
        try:
            with loop.stop.at_once():
                return loop.task.evaluate()
        except Interrupted:
            return None

    point = on_main(measured, loop.config.train.rank_timeout)
    if not is_main():
        return
    if point is None:
        loop.progress.evaluation_due = True
        return
    scores, metric = MappingProxyType(point.scores), loop.config.train.keep_best
    if metric is not None:
        from clipdistill.train.best import judge, keep

        loop.progress.best = judge(loop.progress.best, scores, metric, loop.progress.step)
        student, modules = loop.task.checkpoint()
        if loop.progress.best["since"] == 0 and student is not None:
            keep(student, loop.config.out, loop.progress.step, modules.get("average"))
    loop.tell("on_evaluation", scores=scores, images=point.images, top_share=point.top_share)


def _learns_no_more(loop: Loop) -> bool:
    """Whether train.patience is over; rank 0 knows the curve, the others ask it."""
    patience = loop.config.train.patience
    return patience is not None and any_rank(loop.progress.best.get("since", 0) >= patience, loop.task.device)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def learning_rate_factor(step: int, total: int, warmup: int, config: TrainConfig) -> float:
    """The share of the peak learning rate at optimiser step `step` (0-based) of `total`: linear rise, then as set."""
    warmup = min(warmup, max(total - 1, 0))
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    floor = config.final_learning_rate / config.learning_rate
    if config.schedule == "wsd":
        decay = max(round(total * config.decay_share), 1)
        return 1 - (1 - floor) * min(max(step - (total - decay), 0) / decay, 1)
    progress = (step - warmup) / max(total - warmup, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimiser: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group's own peak rate; returns the first group's rate."""
    for group in optimiser.param_groups:
        if group.get("scheduled", True):
            group["lr"] = group["initial_lr"] * factor
    return float(optimiser.param_groups[0]["lr"])
