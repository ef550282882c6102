"""`clipdistill train --dry-run`: ten steps in a folder that is thrown away, for speed, memory and the whole's time."""

from __future__ import annotations

import itertools
import resource
import statistics
import tempfile
from pathlib import Path

import torch

from clipdistill.runs.folder import LOG, read_rows
from clipdistill.runtime.console import duration
from clipdistill.runtime.machine import pick_device
from clipdistill.train.config import RunConfig
from clipdistill.train.run import distill

STEPS = 10


def dry_run(config: RunConfig) -> str:
    """Train ten steps as `config` says, without validation, and tell what the run would take. Nothing stays on disk.

    Raises InputError for unusable input, as the run itself would.
    """
    train = config.train.model_copy(
        update={"steps": STEPS, "epochs": None, "log_every": 1, "keep_best": None, "patience": None}
        | dict.fromkeys(("evaluate_every", "checkpoint_every"))
    )
    evaluation = config.evaluation.model_copy(update={"zero_shot": ()})
    with tempfile.TemporaryDirectory(prefix="clipdistill-dry-run-") as folder:
        out = Path(folder, "run")
        distill(config.model_copy(update={"train": train, "evaluation": evaluation, "validation": None, "out": out}))
        lines = read_rows(out / LOG)
    ends = [0.0, *(line["seconds"] for line in lines)]
    each = [after - before for before, after in itertools.pairwise(ends)]
    a_step = statistics.median(each[2:] or each)
    per_epoch = lines[-1]["step"] / lines[-1]["epoch"]
    total = config.train.steps or max(round((config.train.epochs or 0) * per_epoch), 1)
    device = pick_device(config.device)
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of the GPU"
    else:
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    wait = statistics.mean(line["data_wait"] for line in lines[2:] or lines)
    return (
        f"dry run of {len(lines)} steps: {a_step:.3g} s a step, {config.train.batch_size / a_step:,.0f} pairs/s, "
        f"{wait:.0%} of it waiting for data; the first step took {each[0]:.3g} s; {memory} at the peak\n"
        f"all {total:,} steps: about {duration(total * a_step)}, evaluation not counted"
    )
