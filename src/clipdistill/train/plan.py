"""What a run will do, as `--explain` shows it: the settings of the recipe worked out for this data and machine."""

from __future__ import annotations

from clipdistill.cache.names import is_cached
from clipdistill.runtime.console import TextTable
from clipdistill.runtime.distributed import world_size
from clipdistill.train.config import RunConfig
from clipdistill.train.task import Task


def planned(config: RunConfig, task: Task) -> TextTable:
    """Rows of setting and value: data, batch, steps, rates, precision, workers, curve, checkpoints."""
    train, total = config.train, task.total_steps
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
        ["batch", f"{train.batch_size:,} pairs{ranks}{parts}"],
        ["steps", f"{total:,}: {epochs:.3g} epochs of {task.steps_per_epoch:,}, {total * train.batch_size:,} pairs"],
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
            f"{points} points on {task.validation_name}" if task.validation_name and points else "at the end only",
        ],
        ["checkpoints", f"{saved}, the newest {train.keep_checkpoints} kept"],
        ["seed", f"{train.seed}" + (", deterministic" if train.deterministic else "")],
    ]
    return table


def idle(config: RunConfig, total_steps: int) -> list[str]:
    """A sentence for each setting that is not at its default and that nothing in this run reads; for a long warm-up.

    They are said, not refused: recipes and plans share settings.
    """
    train, terms = config.train, config.objective
    alone = is_cached(config.teachers)
    measured = config.validation is not None
    goes_with = {
        "train.final_learning_rate": ("a train.schedule that falls", train.schedule != "constant"),
        "train.prompt_depth": ("train.image_prompts", train.image_prompts),
        "train.classes": ("the term class_kd", terms.needs_classes),
        "train.bank_samples": ("a term that compares with the whole set", terms.needs_bank),
        "train.stored_views": ("train.views=stored without a cache", train.views == "stored" and not alone),
        "train.teacher_logit_scale": (
            "a term that reads a teacher, and not with train.fixed_logit_scale",
            (terms.needs_teacher or train.curation) and train.fixed_logit_scale is None,
        ),
        "train.logit_bias_init": ("the term sigmoid", "sigmoid" in terms.active_terms),
        "train.evaluate_every": ("--validation", measured),
        "evaluation.curve_images": ("train.evaluate_every", measured and train.evaluate_every is not None),
        "evaluation.protocol": ("--validation", measured),
        "evaluation.teacher": ("--validation or --zero-shot", measured or config.evaluation.zero_shot),
    }
    found = []
    for name, (other, read) in goes_with.items():
        section, key = name.split(".")
        part = getattr(config, section)
        if not read and getattr(part, key) != type(part).model_fields[key].default:
            found.append(f"{name} is not read in this run: it goes with {other}")
    if train.warmup_steps > total_steps / 2:
        found.append(
            f"warning: the rate rises over train.warmup_steps={train.warmup_steps:,} steps, and the run has "
            f"{total_steps:,}: a tenth is usual, train.warmup_steps={max(total_steps // 10, 1)}"
        )
    return found + [f"objective.{name} is not read in this run: no term of it has a weight" for name in terms.idle]
