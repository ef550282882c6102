"""Before and after fine-tuning: retrieval gained, zero-shot accuracy kept, both with paired intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipdistill.arguments import checked
from clipdistill.evaluate.evaluate import Data, evaluate
from clipdistill.models.clip_model import ClipModel
from clipdistill.runtime.console import Shown, TextTable
from clipdistill.statistics.judge import Verdict, decide
from clipdistill.statistics.records import records_of
from clipdistill.statistics.scores import Scores

MARKS = ("R@1", "R@5", "R@10", "MRR", "mAP@10", "top1", "top5", "mean_per_class")


@dataclass(frozen=True)
class Change:
    """One metric before and after, fractions; `difference` after - before, `kept` after / before, with 95 % intervals.

    p: two-sided, on the same queries (statistics.judge). kept is None where the score before is 0.
    """

    data: str
    metric: str
    before: float
    after: float
    difference: tuple[float, float, float]
    p: float
    kept: tuple[float, float, float] | None


class Changes(Shown, list[Change]):
    """What `before_after` found, one change a metric; shows itself as a table in percent.

    scores: all that was measured ("student" after, "teacher" before).
    """

    scores: Scores

    def table(self) -> TextTable:
        """A row a metric, with the paired difference; MRR is what DCLIP prints as MAP."""
        result = TextTable(
            ("data", "metric", "before", "after", "difference", "p", "kept"),
            title="before and after, percent, 95 % intervals of paired differences",
            text=(0, 1),
        )
        for change in self:
            value, low, high = (100 * number for number in change.difference)
            kept = "" if change.kept is None else f"{100 * change.kept[0]:.1f} %"
            scores = f"{100 * change.before:.1f}", f"{100 * change.after:.1f}"
            difference = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
            result.rows.append((change.data, change.metric, *scores, difference, f"{change.p:.3f}", kept))
        return result

    def tables(self) -> list[TextTable]:
        return [self.table()]

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {"format": 1, "changes": [vars(change) for change in self]}


@checked
def before_after(
    before: str | Path | ClipModel,
    after: str | Path | ClipModel,
    data: Data | Sequence[Data],
    *,
    device: torch.device | str | None = None,
    batch_size: int = 256,
    protocol: str = "standard",
) -> Changes:
    """What fine-tuning changed: retrieval gained and zero-shot accuracy kept, with intervals over the same queries.

    before, after: two models, by name or loaded. data: one set or several of pairs (R@K, mAP@10 and MRR, which DCLIP's
    paper prints as MAP) and labelled sets (accuracy), as in `evaluate`. device: None is a GPU where there is one;
    batch_size: images a forward pass; protocol: of retrieval (docs/protocols.md).

    Returns Changes, a list: data, metric, before, after, difference, p, kept, in fractions. Raises InputError for
    unusable input.
    """
    scores = evaluate(
        after, data, teacher=before, protocol=protocol, batch_size=batch_size, device=device, progress=False
    )
    changes = Changes()
    changes.scores = scores
    records = {(r.role, r.metric, r.question): r for r in records_of(scores, "after", None)}
    for (role, metric, question), own in records.items():
        if role == "teacher" or own.per_query is None or not metric.endswith(MARKS):
            continue
        base = records["teacher", metric, question]
        found = decide([own], [base])
        kept = decide([own], [base], measure="ratio", threshold=1.0) if base.value > 0 else None
        split = dict(question)["split"]
        changes.append(
            Change(
                data=f"{own.dataset}/{split}" if split else str(own.dataset),
                metric=metric,
                before=base.value,
                after=own.value,
                difference=_interval(found),
                p=1.0 if found.p is None else found.p,
                kept=None if kept is None else _interval(kept),
            )
        )
    return changes


def _interval(verdict: Verdict) -> tuple[float, float, float]:
    values = verdict.effect, verdict.low, verdict.high
    return tuple(math.nan if value is None else value for value in values)  # type: ignore[return-value]
