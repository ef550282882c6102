"""Every N x N logit matrix the published terms use, by name.

A0, B0: student image and text rows as the task sees them; A, B: the same in the teacher's space (projected when the
sizes differ); u, v the teacher's rows; F, G the fused rows of AFD. All rows are L2-normalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clipdistill.objective.plan import CrossEntropy, Divergence, Pairing, Primitive


@dataclass(frozen=True)
class Setting:
    """What a term's form depends on beside its weight.

    teachers: number of teachers in the ensemble (1: a single one).
    synthetic: the step carries a synthetic caption for each image.
    sigmoid_targets: "pairs" (SigLIP) or "teacher" (distilled).
    vrd_target: the modality that is copied, not trained, by vrd_kl.
    feature_units: "released" (mean over N and D) or "cosine" (1 - cos).
    gd_temperature: "released" (inverted) or "fixed".
    reinforced_lambda: MobileCLIP's share of distillation inside `reinforced`; the rest is the contrastive loss.
    """

    teachers: int = 1
    synthetic: bool = False
    sigmoid_targets: Literal["pairs", "teacher"] = "pairs"
    vrd_target: Literal["text", "image"] = "text"
    feature_units: Literal["released", "cosine"] = "released"
    gd_temperature: Literal["released", "fixed"] = "released"
    reinforced_lambda: float = 1.0


def teacher_names(setting: Setting, synthetic: bool = False) -> tuple[str, ...]:
    """Names of the teacher's own logit matrices, one per teacher of the ensemble."""
    if synthetic:
        return tuple(f"teacher_synthetic_{k}" for k in range(setting.teachers))
    return ("teacher",) if setting.teachers == 1 else tuple(f"teacher_{k}" for k in range(setting.teachers))


def all_pairings(setting: Setting) -> dict[str, Pairing]:
    """Every pairing that can be named under `setting`."""
    found = [
        Pairing("student", "student_image", "student_text", "student"),
        Pairing("student_sigmoid", "student_image", "student_text", "student", bias="student_bias"),
        Pairing("student_synthetic", "student_image", "student_synthetic_text", "student"),
        Pairing("student_synthetic_sigmoid", "student_image", "student_synthetic_text", "student", bias="student_bias"),
        Pairing("image", "teacher_image", "projected_image", "image"),
        Pairing("text", "teacher_text", "projected_text", "text"),
        Pairing("image_text", "teacher_image", "projected_text", "cross"),
        Pairing("text_image", "teacher_text", "projected_image", "cross"),
        Pairing("student_image_teacher_text", "projected_image", "teacher_text", "cross"),
        Pairing("fusion", "fused_image", "fused_text", "fusion"),
    ]
    for k in range(setting.teachers):
        suffix = "" if setting.teachers == 1 else f"_{k}"
        image, scale, bias = f"teacher_image{suffix}", f"teacher{suffix}", f"teacher_bias{suffix}"
        text, synthetic = f"teacher_text{suffix}", f"teacher_synthetic_text{suffix}"
        found += [
            Pairing(f"teacher{suffix}", image, text, scale, trained=False),
            Pairing(f"teacher_sigmoid{suffix}", image, text, scale, bias=bias, trained=False),
            Pairing(f"teacher_synthetic_{k}", image, synthetic, scale, trained=False),
            Pairing(f"teacher_synthetic_sigmoid_{k}", image, synthetic, scale, bias=bias, trained=False),
        ]
    return {pairing.name: pairing for pairing in found}


def named_logits(primitive: Primitive) -> tuple[str, ...]:
    """Every pairing a primitive reads."""
    if isinstance(primitive, CrossEntropy):
        return (primitive.logits,)
    if isinstance(primitive, Divergence):
        return (primitive.target, primitive.logits)
    return (primitive.logits, *primitive.targets)
