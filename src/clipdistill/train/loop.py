"""The training loop: one pass through the steps, readable from top to bottom."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipdistill.data.ledger import BadSampleLedger
from clipdistill.data.loader import Batch
from clipdistill.errors import BudgetError, Preempted, StorageError
from clipdistill.objective import ObjectiveOutput
from clipdistill.runtime.distributed import (
    any_rank,
    average_gradients,
    gather_lists,
    is_main,
    on_main,
    rank,
    sum_over_ranks,
)
from clipdistill.runtime.signals import Interrupted, StopSignal
from clipdistill.train.capture import CAPTURED, capture
from clipdistill.train.checkpoint import save_checkpoint
from clipdistill.train.curve import curve_scores, warning_of_chance
from clipdistill.train.failures import Place
from clipdistill.train.logs import Display, Sink
from clipdistill.train.optimiser import set_learning_rate
from clipdistill.train.setup import Setup
from clipdistill.train.step import Statistics, captions_of, forward_backward


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


def train(
    setup: Setup,
    progress: Progress,
    folder: Path,
    sinks: list[Sink],
    display: Display,
    stop: StopSignal | None = None,
    place: Place | None = None,
) -> Progress:
    """Run the steps that remain. Raises Preempted after saving on a signal, BudgetError over a stated budget.

    stop: where signals arrive, when the caller listens already; place: told where the run is, for error messages.
    """
    if stop is None:
        with StopSignal() as stop:
            return train(setup, progress, folder, sinks, display, stop, place)
    config, device = setup.config.train, setup.device
    place = Place() if place is None else place
    place.step, place.doing = progress.step, "training"
    ledger = _open_ledger(setup, progress, folder)
    loader = setup.loader(start_step=progress.step)
    began = time.monotonic() - progress.seconds
    statistics = Statistics(setup.student.module)
    if progress.evaluation_due:
        _evaluate(setup, progress, folder, sinks, display, stop)
    waiting = time.monotonic()
    for batch in loader:
        waited = time.monotonic() - waiting
        if setup.masking is not None and progress.step >= setup.masking.config.prune_step:
            setup.prune()
            statistics = Statistics(setup.student.module)
            display.say(f"pruned at step {progress.step}: {setup.student.parameter_counts()['total']:,} parameters")
        statistics.keep()
        output, gradient_norm = _step(setup, progress.step, batch)
        finite = not any_rank(not (math.isfinite(gradient_norm) and output.total.isfinite().item()), device)
        rate = set_learning_rate(setup.optimiser, setup.learning_rate_factor(progress.step))
        if finite:
            setup.optimiser.step()
            _limit_logit_scale(setup)
            if setup.masking is not None:
                setup.masking.after_update()
        else:
            statistics.restore()
            _record_skipped(setup, progress, batch, folder, output, display)
        progress.step = place.step = progress.step + 1
        seen, bad, cut_student, cut_teacher = sum_over_ranks(
            (len(batch.keys), len(batch.problems), batch.truncated_student, batch.truncated_teacher), device
        )
        progress.samples += int(seen)
        progress.bad_samples += int(bad)
        progress.truncated_student += int(cut_student)
        progress.truncated_teacher += int(cut_teacher)
        problems = gather_lists(batch.problems) if bad else []
        ledger.record(problems, seen=int(seen + bad))
        progress.ledger = ledger.state()
        now = time.monotonic()
        step_seconds = now - waiting
        progress.seconds = now - began
        _accumulate(progress, output, gradient_norm, seen, waited, step_seconds, finite)
        line = None
        if progress.step % config.log_every == 0 or progress.step == setup.total_steps:
            line = _log_line(setup, progress, rate)
            for sink in sinks:
                sink.record("train", line)
        display.update(progress.step, line)
        finished = progress.step == setup.total_steps
        if _due(progress.step, config.evaluate_every) or (finished and config.evaluate_every):
            _evaluate(setup, progress, folder, sinks, display, stop)
        stopping = any_rank(stop.received is not None, device)
        if _due(progress.step, config.checkpoint_every) or finished or stopping:
            write_checkpoint(setup, progress, folder)
        if stopping and not finished:
            raise Preempted(
                f"stopped by {stop.received or 'a signal on another rank'} after step {progress.step}; saved: "
                "run the same command again to go on"
            )
        waiting = time.monotonic()
    return progress


def _open_ledger(setup: Setup, progress: Progress, folder: Path) -> BadSampleLedger:
    """The list of bad samples; every rank counts all of them, rank 0 writes."""
    path = folder / "bad_samples.jsonl" if is_main() else Path(os.devnull)
    ledger = BadSampleLedger(path, setup.config.data.bad_sample_budget, shard_of=setup.source.shard_of)
    if progress.ledger:
        ledger.restore(progress.ledger)
    else:
        ledger.record_opening(setup.source.problems, len(setup.source) + setup.source.problems.dropped)
    return ledger


def write_checkpoint(setup: Setup, progress: Progress, folder: Path) -> None:
    """Rank 0 writes; the others go on (what they hold is the same). Raises StorageError on all of them."""
    problems: list[str] = []
    if is_main():
        try:
            save_checkpoint(
                folder / "checkpoints",
                setup.student,
                setup.objective,
                setup.optimiser,
                {**vars(progress), "total_steps": setup.total_steps},
                keep=setup.config.train.keep_checkpoints,
                masks=None if setup.masking is None else setup.masking.state(),
            )
        except StorageError as error:
            problems.append(str(error))
    problems = gather_lists(problems)
    if problems:
        raise StorageError(problems[0])


def _step(setup: Setup, step: int, batch: Batch) -> tuple[ObjectiveOutput, float]:
    """Gradients of one step, averaged over ranks and clipped; returns the objective and the norm before clipping."""
    config = setup.config.train
    setup.optimiser.zero_grad(set_to_none=True)
    if setup.masking is not None:
        setup.masking.before_step(config.seed, step)
    output = forward_backward(
        setup.towers,
        setup.objective,
        batch.student_images.to(setup.device, non_blocking=True),
        captions_of(batch).to(setup.device, non_blocking=True),
        None if setup.teacher is None else setup.teacher(batch),
        micro_batch=config.micro_batch,
        precision=config.precision,
        seed=(config.seed, step, rank()),
    )
    average_gradients(setup.objective.parameters())
    if setup.masking is not None:
        setup.masking.after_backward(step)
    # bf16 needs no loss scaling, so the norm is that of the true gradients
    groups = [group for group in setup.optimiser.param_groups if group.get("clipped", True)]
    parameters = [p for group in groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad_norm or math.inf)
    others = [p.grad for g in setup.optimiser.param_groups if not g.get("clipped", True) for p in g["params"]]
    if not all(bool(gradient.isfinite().all()) for gradient in others if gradient is not None):
        return output, math.nan
    return output, float(norm)


def _limit_logit_scale(setup: Setup) -> None:
    with torch.no_grad():
        setup.student.module.logit_scale.clamp_(0, math.log(setup.config.train.max_logit_scale))


def _record_skipped(
    setup: Setup, progress: Progress, batch: Batch, folder: Path, output: ObjectiveOutput, display: Display
) -> None:
    """A step whose loss or gradient is not finite changes nothing; what led to it is kept for `clipdistill replay`."""
    progress.skipped_steps += 1
    captured = capture(setup, folder, progress.step, batch, output, dict(vars(progress)))
    display.say(
        f"step {progress.step}: the loss or its gradient is not finite, so the step is skipped ({captured}; "
        f"`clipdistill replay {folder}` says where it begins)"
    )
    if progress.skipped_steps > setup.config.train.max_skipped_steps:
        raise BudgetError(
            f"step {progress.step}: the loss or its gradient was not finite in {progress.skipped_steps} steps of this "
            f"run (train.max_skipped_steps={setup.config.train.max_skipped_steps}); the batches are in "
            f"{folder / CAPTURED} (`clipdistill replay {folder}` says where it begins); "
            "try a lower train.learning_rate, train.clip_grad_norm=1 or train.precision=fp32"
        )


def _accumulate(
    progress: Progress,
    output: ObjectiveOutput,
    gradient_norm: float,
    seen: float,
    waited: float,
    seconds: float,
    finite: bool,
) -> None:
    sums = progress.window
    values = {f"term/{name}": float(value) for name, value in output.terms.items()}
    values |= {"total": float(output.total.detach()), "gradient": gradient_norm}
    if finite:
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value
        sums["steps"] = sums.get("steps", 0.0) + 1
    for name, value in (("seen", seen), ("waited", waited), ("seconds", seconds)):
        sums[name] = sums.get(name, 0.0) + value


def _log_line(setup: Setup, progress: Progress, rate: float) -> dict[str, Any]:
    """Means since the last line; the window starts anew."""
    sums, progress.window = progress.window, {}
    count = max(sums.get("steps", 0.0), 1.0)
    masks = {} if setup.masking is None else {"sparsity": setup.masking.log(progress.step)}
    return {
        "step": progress.step,
        "epoch": round(progress.step / setup.steps_per_epoch, 4),
        "samples": progress.samples,
        "total": sums.get("total", math.nan) / count,
        "terms": {k.removeprefix("term/"): v / count for k, v in sums.items() if k.startswith("term/")},
        "learning_rate": rate,
        "grad_norm": sums.get("gradient", math.nan) / count,
        "logit_scale": float(setup.student.module.logit_scale.detach().float().exp()),
        "scales": setup.objective.effective_scales(),
        "samples_per_second": sums["seen"] / max(sums["seconds"], 1e-9),
        "data_wait": sums["waited"] / max(sums["seconds"], 1e-9),
        "skipped_steps": progress.skipped_steps,
        "bad_samples": progress.bad_samples,
        "seconds": round(progress.seconds, 3),
        **masks,
    }


def _evaluate(
    setup: Setup, progress: Progress, folder: Path, sinks: list[Sink], display: Display, stop: StopSignal
) -> None:
    """One point of the curve, on rank 0 (the others wait). A stop signal puts it off until the run goes on."""
    progress.evaluation_due = False
    if setup.validation is None:
        return

    def measured() -> dict[str, float] | None:
        try:
            with stop.at_once():
                return curve_scores(setup)
        except Interrupted:
            return None

    scores = on_main(measured, setup.config.train.rank_timeout)
    if not is_main():
        return
    if scores is None:
        progress.evaluation_due = True
        return
    for sink in sinks:
        sink.record("eval", {"step": progress.step, "samples": progress.samples, "scores": scores})
    display.say(
        f"  step {progress.step}: R@1 text-to-image {scores['t2i_R@1']:.1%}, image-to-text {scores['i2t_R@1']:.1%} "
        f"on {setup.validation.name}"
    )
    if warning := warning_of_chance(setup, folder, progress.step):
        display.say(f"  {warning}")


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
