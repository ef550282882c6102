"""`clipdistill train --dry-run`: ten steps in a folder that is thrown away, for speed, memory and the whole's time."""

from __future__ import annotations

import itertools
import resource
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipdistill.arguments import checked
from clipdistill.models.known import copies_held
from clipdistill.runs.folder import LOG, read_rows
from clipdistill.runtime.console import Shown, duration
from clipdistill.runtime.machine import pick_device
from clipdistill.train.config import RunConfig
from clipdistill.train.run import distill, from_mapping

STEPS = 10


@dataclass(frozen=True, repr=False)
class DryRun(Shown):
    """What a few steps tell of a run: the median seconds of a step, pairs a second, the share of the time that waits
    for data, seconds of the first step, bytes in use at the peak (of the GPU where there is one), and the whole run's
    steps and seconds, evaluation not counted."""

    steps: int
    step_seconds: float
    pairs_per_second: float
    waiting: float
    first_step_seconds: float
    peak_bytes: int
    on_gpu: bool
    total_steps: int

    @property
    def total_seconds(self) -> float:
        """Of all steps of the run."""
        return self.total_steps * self.step_seconds

    def __repr__(self) -> str:
        return (
            f"dry run of {self.steps} steps: {self.step_seconds:.3g} s a step, {self.pairs_per_second:,.0f} pairs/s, "
            f"{self.waiting:.0%} of it waiting for data; the first step took {self.first_step_seconds:.3g} s; "
            f"{self.peak_bytes / 2**30:.2f} GiB{' of the GPU' if self.on_gpu else ''} at the peak\n"
            f"all {self.total_steps:,} steps: about {duration(self.total_seconds)}, evaluation not counted"
        )


@checked
def dry_run(config: RunConfig | Mapping[str, Any], *, quiet: bool = False) -> DryRun:
    """Train ten steps as `config` says, without validation, and tell what the run would take. Nothing stays on disk.

    config: as in `distill`; it needs no `out`. quiet: no progress on the terminal.

    Returns a DryRun: seconds a step, pairs a second, peak memory, seconds of the whole run. Raises InputError for
    unusable input, as the run itself would.
    """
    if not isinstance(config, RunConfig):
        config = from_mapping({"out": tempfile.gettempdir(), **config})
    train = config.train.model_copy(
        update={"warmup_steps": min(config.train.warmup_steps, STEPS // 2)}
        | {"steps": STEPS, "epochs": None, "log_every": 1, "keep_best": None, "patience": None}
        | dict.fromkeys(("evaluate_every", "checkpoint_every"))
    )
    evaluation = config.evaluation.model_copy(update={"zero_shot": ()})
    with tempfile.TemporaryDirectory(prefix="clipdistill-dry-run-") as folder, copies_held():
        out = Path(folder, "run")
        changes = {"train": train, "evaluation": evaluation, "validation": None, "out": out}
        distill(config.model_copy(update=changes), quiet=quiet)
        lines = read_rows(out / LOG)
    ends = [0.0, *(line["seconds"] for line in lines)]
    each = [after - before for before, after in itertools.pairwise(ends)]
    a_step = statistics.median(each[2:] or each)
    per_epoch = lines[-1]["step"] / lines[-1]["epoch"]
    device = pick_device(config.device)
    on_gpu = device.type == "cuda"
    return DryRun(
        steps=len(lines),
        step_seconds=a_step,
        pairs_per_second=lines[-1]["samples"] / lines[-1]["step"] / a_step,
        waiting=statistics.mean(line["data_wait"] for line in lines[2:] or lines),
        first_step_seconds=each[0],
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else _largest(),
        on_gpu=on_gpu,
        total_steps=config.train.steps or max(round((config.train.epochs or 0) * per_epoch), 1),
    )


def _largest() -> int:
    """Bytes of this process at its peak; the system counts in KiB, Apple's in bytes."""
    counted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return counted if sys.platform == "darwin" else 1024 * counted
