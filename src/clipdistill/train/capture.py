"""What is kept of a step whose loss or gradient is not finite.

skipped_steps/
    step-00000123-rank-0.json      keys, captions, seeds and terms of the rank's part of the batch
    state/step-00000123/           the run's state before that step, as a checkpoint
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipdistill.data.loader import Batch
from clipdistill.errors import StorageError
from clipdistill.objective import ObjectiveOutput
from clipdistill.runtime.distributed import is_main, rank, world_size
from clipdistill.runtime.files import write_json
from clipdistill.train.checkpoint import save_checkpoint
from clipdistill.train.config import RunConfig
from clipdistill.train.step import step_seed
from clipdistill.train.task import Task

CAPTURED = "skipped_steps"
STATE = "state"


def capture(task: Task, config: RunConfig, batch: Batch, output: ObjectiveOutput, progress: dict[str, Any]) -> str:
    """Write down this rank's part of the batch, and (rank 0) the state before the step; says what was written.

    The state needs as much room as a checkpoint; on a full disk it is left out rather than stopping the run.
    """
    step = progress["step"]
    seed = config.train.seed
    record = {
        "step": step,
        "rank": rank(),
        "ranks": world_size(),
        "seed": seed,
        "device_seed": step_seed(seed, step, rank(), 0),
        "epoch": batch.epoch,
        "keys": batch.keys,
        "indices": batch.indices.tolist(),
        "caption_indices": batch.caption_indices.tolist(),
        "captions": batch.captions,
        "views": [view.to_json() for view in batch.views],
        "terms": {name: float(value) for name, value in output.terms.items()},
    }
    path = config.out / CAPTURED / f"step-{step:08d}-rank-{rank()}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, record, checked=True)
    if not is_main():
        return "its batch is kept"
    try:
        save_checkpoint(
            path.parent / STATE,
            *task.checkpoint(),
            task.optimiser,
            {**progress, "total_steps": task.total_steps},
            keep=config.train.max_skipped_steps + 1,
        )
    except StorageError as error:
        return f"its batch is kept, its state is not: {error}"
    return "its batch and state are kept"


def captured_steps(folder: Path) -> list[int]:
    """The steps whose batch was kept in the run `folder`, rising."""
    names = (path.name.split("-")[1] for path in (folder / CAPTURED).glob("step-*-rank-*.json"))
    return sorted({int(name) for name in names if name.isascii() and name.isdecimal()})
