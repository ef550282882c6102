"""Settings of a run that nothing in it reads, a warm-up that is longer than half of it, bfloat16 without hardware."""

from __future__ import annotations

import platform

import torch

from clipdistill.cache.names import is_cached
from clipdistill.runtime.machine import pick_device
from clipdistill.train.config import RunConfig


def idle(config: RunConfig, total_steps: int) -> list[str]:
    """A sentence for each setting that is not at its default and that nothing in this run reads; for a long warm-up;
    for bfloat16 on a processor that has none.

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
    if train.precision == "bf16" and pick_device(config.device).type == "cpu" and emulates_bfloat16():
        found.append(
            "warning: train.precision=bf16: this processor has no bfloat16, so torch computes it number by number, "
            "convolutions many times slower than in float32: train.precision=auto takes what is fast here"
        )
    return found + [f"objective.{name} is not read in this run: no term of it has a weight" for name in terms.idle]


def emulates_bfloat16() -> bool:
    """Whether this processor has neither bfloat16 nor the wide vectors that stand in for it."""
    return platform.machine() in ("x86_64", "AMD64") and not torch.backends.cpu.get_cpu_capability().startswith(
        "AVX512"
    )
