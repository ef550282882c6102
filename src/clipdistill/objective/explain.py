"""The objective in words and symbols, for people and for `--explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from clipdistill.objective.engines.engine import dense_bytes
from clipdistill.objective.terms import find_term

if TYPE_CHECKING:
    from clipdistill.objective.objective import Objective

_SYMBOLS = {"image": "k_i", "text": "k_t", "cross": "k_c", "fusion": "k_f"}


def explain(objective: Objective, n: int | None, device: torch.device, world_size: int) -> str:
    """See `Objective.explain`."""
    lines = ["L = " + " + ".join(f"{weight:g} {name}" for name, weight in objective.weights.items()), ""]
    for name in objective.weights:
        term = find_term(name)
        lines += [f"{name}: {term.title}", f"    {term.formula}", f"    gradient: {term.gradient}"]
        if name == "fd":
            lines.append(f"    {_feature_units(objective)}")
        if name == "vrd_kl" and "vrd_ce" not in objective.weights:
            lines.append("    note: without vrd_ce its trivial minimum, both distributions uniform, is not excluded")
        if term.differs:
            lines.append(f"    released code: {term.differs}")
        lines.append(f"    source: {term.source}; published weight {term.default_weight:g}")
    lines += [
        "",
        "A0, B0 student image, text; A, B the same in the teacher's space; u, v teacher image, text; rows of length 1.",
    ]
    lines.append(
        "s, t the student's and teacher's multipliers; KL and CE are means over rows; the teacher is never trained."
    )
    lines += ["", _scales(objective), _projection(objective), _settings(objective)]
    if n is not None:
        engine, reason = objective.choose(n, device, world_size=world_size)
        lines.append(f"engine for N={n}: {engine} ({reason})")
    else:
        lines.append(f"engine: {objective.engine}")
    lines.append(f"products of N x N: {len(objective.mix(objective.setting).plan.pairings)}")
    return "\n".join(line for line in lines if line is not None)


def estimate_bytes(objective: Objective, n: int, device: torch.device, world_size: int) -> int:
    """See `Objective.estimate_bytes`."""
    mix = objective.mix(objective.setting)
    widths = [
        objective.student_dim if name.startswith("student") else objective.teacher_dim
        for name in mix.reads
        if "_" in name
    ]
    # rows of all ranks, their gradients, and the normalised copies
    linear = 3 * 4 * n * sum(widths)
    engine, _ = objective.choose(n, device, world_size=world_size)
    if engine == "dense":
        return linear + dense_bytes(n, mix.all_primitives, world_size=world_size)
    stripe = 512
    return linear + 4 * stripe * n * (len(mix.plan.pairings) + 2)


def _feature_units(objective: Objective) -> str:
    weight, width = objective.weights["fd"], objective.teacher_dim
    if objective.setting.feature_units == "cosine":
        return f"units: cosine, so {weight:g} here is {weight * width / 2:g} in released units at D={width}"
    return f"units: released, so {weight:g} here is {2 * weight / width:g} (1 - cos) at D={width}"


def _scales(objective: Objective) -> str:
    effective = objective.effective_scales()
    if not effective:
        return "scales: the mix has none of its own"
    listed = ", ".join(f"{_SYMBOLS[name]} = {value:.4f}" for name, value in effective.items())
    reading = "exp of the parameter" if objective.scales == "exponential" else "the parameter itself, no exp"
    return f"scales ({objective.scales}: {reading}): {listed}"


def _projection(objective: Objective) -> str:
    if objective.student_dim == objective.teacher_dim:
        return f"projection: none, both widths are {objective.student_dim}"
    layers = [name for name in ("image", "text") if getattr(objective, f"{name}_projection") is not None]
    if not layers:
        return (
            f"projection: none, no term compares rows across widths {objective.student_dim} and {objective.teacher_dim}"
        )
    where = "all terms" if objective.projection == "before-task" else "terms that meet the teacher's rows"
    return (
        f"projection ({objective.projection}): {' and '.join(layers)}, "
        f"{objective.student_dim} -> {objective.teacher_dim}, seen by {where}"
    )


def _settings(objective: Objective) -> str:
    setting = objective.setting
    chosen = []
    if "gd" in objective.weights:
        chosen.append(f"gd_temperature={setting.gd_temperature}")
    if "sigmoid" in objective.weights:
        chosen.append(f"sigmoid_targets={setting.sigmoid_targets}")
    if "vrd_kl" in objective.weights:
        chosen.append(f"vrd_target={setting.vrd_target}")
    if "reinforced" in objective.weights:
        chosen.append(f"reinforced_lambda={setting.reinforced_lambda:g}")
    chosen.append(f"products={objective.options.products}")
    return "settings: " + ", ".join(chosen)
