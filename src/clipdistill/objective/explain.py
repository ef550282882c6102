"""The objective in words and symbols, for people and for `--explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from clipdistill.objective.config import ObjectiveConfig
from clipdistill.objective.mix import Mix
from clipdistill.objective.term import Option
from clipdistill.registry import TERMS

_SYMBOLS = {"image": "k_i", "text": "k_t", "cross": "k_c", "fusion": "k_f"}
_LEGEND = (
    "A0, B0 student image, text; A, B the same in the teacher's space; u, v teacher image, text; rows of length 1.",
    "s, t the student's and teacher's multipliers; KL and CE are means over rows; the teacher is never trained.",
)


def explain(
    config: ObjectiveConfig,
    mix: Mix,
    scales: Mapping[str, float],
    widths: tuple[int, int],
    projected: Sequence[str],
    engine: str,
) -> str:
    """See `Objective.explain`. scales: effective multipliers; widths: student's, teacher's; projected: modalities."""
    weights = {name: config.weights[name] for name in config.active_terms}
    lines = ["L = " + " + ".join(f"{weight:g} {name}" for name, weight in weights.items()), ""]
    for name in weights:
        term = TERMS.get(name)
        lines.append(f"{name}: {term.title}".rstrip(": "))
        facts = [("", term.formula), ("gradient: ", term.gradient)]
        with TERMS.blaming(name):
            facts.append(("", term.remark(weights, mix.setting, widths[1]) if term.remark else ""))
        facts += [("released code: ", term.differs)]
        facts += [("option ", option_text(option, mix.setting[option])) for option in term.options]
        origin = TERMS.origin(name)
        source = "; ".join(part for part in (term.source, origin and f"registered by {origin}") if part)
        facts.append(("source: ", f"{source}; published weight {term.default_weight:g}" if not origin else source))
        lines += [f"    {label}{text}" for label, text in facts if text]
    lines += ["", *_LEGEND, "", _scales(config, scales), _projection(config, widths, projected)]
    lines += [
        f"schedule of {name}: " + ", ".join(f"{factor:g} times at {share:.0%}" for share, factor in points)
        for name, points in config.schedules.items()
        if name in weights or name == "teacher"
    ]
    lines += [f"settings: products={config.products}", engine, f"products of N x N: {len(mix.plan.pairings)}"]
    return "\n".join(lines)


def option_text(option: Option, value: Any) -> str:
    """'vrd_target=text (text or image): the modality that is copied, not trained'."""
    allowed = [str(choice) for choice in get_args(option.type) if isinstance(choice, str | int | bool)]
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    choices = f" ({' or '.join(allowed)})" if allowed else ""
    return f"{option.name}={shown}{choices}: {option.help}"


def _scales(config: ObjectiveConfig, effective: Mapping[str, float]) -> str:
    if not effective:
        return "scales: the mix has none of its own"
    listed = ", ".join(f"{_SYMBOLS.get(name, name)} = {value:.4f}" for name, value in effective.items())
    reading = "exp of the parameter" if config.scales == "exponential" else "the parameter itself, no exp"
    return f"scales ({config.scales}: {reading}): {listed}"


def _projection(config: ObjectiveConfig, widths: tuple[int, int], projected: Sequence[str]) -> str:
    student, teacher = widths
    if student == teacher:
        return f"projection: none, both widths are {student}"
    if not projected:
        return f"projection: none, no term compares rows across widths {student} and {teacher}"
    where = "all terms" if config.projection == "before-task" else "terms that meet the teacher's rows"
    return f"projection ({config.projection}): {' and '.join(projected)}, {student} -> {teacher}, seen by {where}"
