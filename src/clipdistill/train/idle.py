"""Settings of a run that nothing in it reads, and a warm-up that is longer than half of it."""

from __future__ import annotations

from clipdistill.cache.names import is_cached
from clipdistill.train.config import RunConfig


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
            config.needs_teacher and train.fixed_logit_scale is None,
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
