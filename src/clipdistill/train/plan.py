"""What a run will do, as `--explain` shows it: the settings of the recipe worked out for this data and machine."""

from __future__ import annotations

from clipdistill.data.sampler import pairs_a_step
from clipdistill.runtime.console import TextTable
from clipdistill.runtime.distributed import world_size
from clipdistill.train.config import RunConfig
from clipdistill.train.task import Task


def planned(config: RunConfig, task: Task) -> TextTable:
    """Rows of setting and value: data, batch, steps, rates, precision, workers, curve, checkpoints."""
    train, total, rows = config.train, task.total_steps, pairs_a_step(task.source, config.train.batch_size)
    epochs = total / task.steps_per_epoch
    ranks = f" over {world_size()} ranks" if world_size() > 1 else ""
    parts = f", encoded {train.micro_batch} at a time" if train.micro_batch else ""
    rise = f", rising over {train.warmup_steps:,} steps" if train.warmup_steps else ""
    fall = f"; then {train.schedule}" + ("" if train.schedule == "constant" else f" to {train.final_learning_rate:g}")
    points = 0 if train.evaluate_every is None else -(-total // train.evaluate_every)
    saved = 1 if train.checkpoint_every is None else -(-total // train.checkpoint_every)
    betas = ", ".join(f"{beta:g}" for beta in train.betas)
    table = TextTable(["setting", "value"], title=f"recipe {config.recipe}, worked out", text=(0, 1))
    table.rows = [
        ["data", f"{task.source.name}: {len(task.source):,} pictures, views {train.views}, caption {train.caption}"],
        ["student", config.student + (f", from {config.student_weights}" if config.student_weights else "")],
        ["teacher", ", ".join(config.teachers) or "none"],
        ["batch", f"{rows:,} pairs{ranks}{parts}"],
        ["steps", f"{total:,}: {epochs:.3g} epochs of {task.steps_per_epoch:,}, {total * rows:,} pairs"],
        ["learning rate", f"{train.learning_rate:g}{rise}{fall}"],
        [
            "optimiser",
            f"{train.optimizer}, betas {betas}, epsilon {train.epsilon:g}, weight decay {train.weight_decay:g}",
        ],
        ["gradient norm", f"at most {train.clip_grad_norm:g}" if train.clip_grad_norm else "not limited"],
        ["precision", f"{train.precision}, attention {train.attention}, compiled {str(train.compile).lower()}"],
        ["workers", f"{train.workers} a rank" if train.workers else "none: decoded in the training process"],
        [
            "curve",
            f"{points} points on {task.validation_name}"
            if task.validation_name and points
            else "at the end only"
            if task.validation_name
            else "none: no validation set",
        ],
        ["checkpoints", f"{saved}, the newest {train.keep_checkpoints} kept"],
        ["seed", f"{train.seed}" + (", deterministic" if train.deterministic else "")],
    ]
    return table
