"""Before and after fine-tuning: retrieval gained, zero-shot accuracy kept, both with paired intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipdistill.evaluate.evaluate import Data, evaluate
from clipdistill.models.clip_model import ClipModel
from clipdistill.runtime.console import TextTable
from clipdistill.statistics.bootstrap import bootstrap_ratio, paired_bootstrap
from clipdistill.statistics.scores import Scores

MARKS = ("R@1", "R@5", "R@10", "MRR", "mAP@10", "top1", "top5", "mean_per_class")


@dataclass(frozen=True)
class Change:
    """One metric before and after, fractions; `difference` after - before, `kept` after / before, with 95 % intervals.

    p: two-sided, from paired permutations of the same queries. kept is None where the score before is 0.
    """

    data: str
    metric: str
    before: float
    after: float
    difference: tuple[float, float, float]
    p: float
    kept: tuple[float, float, float] | None


def before_after(
    before: str | Path | ClipModel,
    after: str | Path | ClipModel,
    data: Data | Sequence[Data],
    *,
    device: torch.device | str | None = None,
    batch_size: int = 256,
    protocol: str = "standard",
) -> tuple[list[Change], Scores]:
    """Both models on the same pairs and labelled sets; the changes, and the scores ("student" after, "teacher" before).

    Retrieval gives R@K, MRR (which DCLIP's paper prints as MAP) and mAP@10 over all positives; labelled sets accuracy.
    """
    scores = evaluate(
        after, data, teacher=before, protocol=protocol, batch_size=batch_size, device=device, progress=False
    )
    changes = []
    for question in scores.protocols():
        key = question.question()
        own, base = scores.queries["student", key], scores.queries["teacher", key]
        for metric in own.values:
            if not metric.endswith(MARKS):
                continue
            clusters = own.clusters.get(metric)
            pair = (own.values[metric], base.values[metric], clusters)
            found = paired_bootstrap(*pair)
            kept = bootstrap_ratio(*pair) if base.values[metric].mean() > 0 else None
            changes.append(
                Change(
                    data=question.dataset + (f"/{question.split}" if question.split else ""),
                    metric=metric,
                    before=float(base.values[metric].mean()),
                    after=float(own.values[metric].mean()),
                    difference=(found.value, found.low, found.high),
                    p=found.p,
                    kept=None if kept is None else (kept.value, kept.low, kept.high),
                )
            )
    return changes, scores


def table(changes: Sequence[Change]) -> TextTable:
    """The changes in percent; MRR is what DCLIP prints as MAP."""
    result = TextTable(
        ("data", "metric", "before", "after", "difference", "p", "kept"),
        title="before and after, percent, 95 % intervals of paired differences",
        text=(0, 1),
    )
    for change in changes:
        value, low, high = (100 * number for number in change.difference)
        kept = "" if change.kept is None else f"{100 * change.kept[0]:.1f} %"
        scores = f"{100 * change.before:.1f}", f"{100 * change.after:.1f}"
        difference = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
        result.rows.append((change.data, change.metric, *scores, difference, f"{change.p:.3f}", kept))
    return result


def to_json(changes: Sequence[Change]) -> dict[str, Any]:
    """Plain values for a file."""
    return {"format": 1, "changes": [vars(change) for change in changes]}
