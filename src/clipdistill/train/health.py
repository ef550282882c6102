"""Warnings about a run that is ill, each said once: what is seen, and what to try."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from clipdistill.models.parameters import is_new_head, tower_of
from clipdistill.runs.folder import CURVE, LOG, read_rows
from clipdistill.train.callbacks import Callback, RunView, Say

LINES = 5
"""Lines of the log in a row that must show a loss at chance."""
POINTS = 3
"""Points of the curve, or lines of the log, in a row that must show a fall."""
SAME_PICTURE = 0.5
"""Share of the captions that find one and the same picture first."""
MOVED = 0.5
"""Movement of a pretrained tower's matrices, as a share of their own size, at which little of it is left."""


class Health(Callback):
    """Looks at every line of the log and every point of the curve, those of before an interruption included."""

    def __init__(self, say: Say = print) -> None:
        self._say, self._said = say, set[str]()
        self._lines: list[Any] = []
        self._points: list[Any] = []

    def on_start(self, run: RunView) -> None:
        self._lines, self._points = read_rows(run.folder / LOG), read_rows(run.folder / CURVE)

    def on_step(self, run: RunView) -> None:
        if run.line is not None:
            self._lines.append(run.line)
            self._tell(run, "the loss is at chance", self._at_chance)
            self._tell(run, "a tower is destroyed", self._destroyed)

    def on_evaluation(self, run: RunView) -> None:
        self._points.append({"step": run.step, "scores": run.scores, "images": run.images, "top_share": run.top_share})
        self._tell(run, "one picture", self._one_picture)
        self._tell(run, "validation falls", self._by_heart)

    def _tell(self, run: RunView, illness: str, look: Any) -> None:
        sentence = None if illness in self._said else look(run)
        if sentence:
            self._said.add(illness)
            self._say(f"  warning: {sentence}")

    def _at_chance(self, run: RunView) -> str | None:
        chance = math.log(max(run.samples / max(run.step, 1), 2))
        after = [line for line in self._lines if _number(line, "step") > run.config.train.warmup_steps]
        losses = [_number(line, "terms", "task") for line in after[-LINES:]]
        if len(losses) < LINES or not all(abs(loss - chance) < 0.01 * chance for loss in losses):
            return None
        return (
            f"the contrastive loss has sat at ln(batch) = {chance:.3g} for {LINES} lines of the log up to step "
            f"{run.step}: pairs are told apart no better than by guessing. Try another train.learning_rate (higher if "
            "the loss never moved, lower if it came back), more train.warmup_steps, and look at captions and pictures"
        )

    def _destroyed(self, run: RunView) -> str | None:
        moved = self._lines[-1].get("moved")
        if not isinstance(moved, Mapping) or not moved:
            return None
        tower = max(moved, key=lambda name: _number(moved, name))
        first, last = ([_number(line, "total") for line in part] for part in (self._lines[:1], self._lines[-POINTS:]))
        if len(self._lines) > POINTS and min(last) > 1.5 * first[0]:
            seen = f"the loss has risen from {first[0]:.3g} to {last[-1]:.3g}"
        elif _number(moved, tower) > MOVED:
            seen = f"the matrices of the {tower} tower have moved by {_number(moved, tower):.0%} of their size"
        else:
            return None
        return (
            f"a pretrained tower is being destroyed by the rate: at step {run.step} {seen}. Try a tenth of "
            f"train.learning_rate, train.learning_rate_{tower}=0.1, train.layer_decay=0.8, or train.lock_{tower}"
        )

    def _one_picture(self, run: RunView) -> str | None:
        shares = [_number(point, "top_share") for point in self._points[-POINTS:]]
        if len(shares) < POINTS or not min(shares) > SAME_PICTURE or shares[-1] < shares[0]:  # young students do that
            return None
        return (
            f"{shares[-1]:.0%} of the captions find the same picture first (step {run.step}): the embeddings have "
            "collapsed. Try a lower train.learning_rate, more train.warmup_steps, a larger batch or another seed"
        )

    def _by_heart(self, run: RunView) -> str | None:
        curve = [_number(point, "scores", "t2i_R@10") for point in self._points]
        if len(curve) <= POINTS or any(map(math.isnan, curve)):
            return None
        best = max(curve)
        top = self._points[curve.index(best)]
        error = math.sqrt(2 * best * (1 - best) / max(_number(top, "images"), 1))
        then = [_number(line, "total") for line in self._lines if _number(line, "step") <= _number(top, "step")]
        now = _number(self._lines[-1], "total") if self._lines else math.nan
        if not then or not now < then[-1] or max(curve[-POINTS:]) >= best - 3 * error:
            return None
        return (
            f"validation falls while training improves: text-to-image R@10 {best:.1%} at step {top['step']}, "
            f"{curve[-1]:.1%} at step {run.step}, loss {then[-1]:.3g} and {now:.3g}: the student learns its pairs by "
            "heart. Try fewer train.epochs, train.keep_best=t2i_R@10, stronger views (train.view), or more pairs"
        )


def _number(row: Any, *keys: str) -> float:
    """The number under nested keys; NaN, which no comparison finds, where there is none."""
    for key in keys:
        row = row.get(key) if isinstance(row, Mapping) else None
    return float(row) if isinstance(row, int | float) else math.nan


class Movement:
    """How far the trained matrices of pretrained towers have moved since they began, as a share of their own size.

    Of each matrix at most 4,096 entries, evenly chosen, are kept and compared. New heads are left out.
    """

    ENTRIES = 4096

    def __init__(self, module: nn.Module, pretrained: bool) -> None:
        self._start = {
            name: self._sample(parameter)
            for name, parameter in (module.named_parameters() if pretrained else ())
            if parameter.requires_grad and parameter.ndim > 1 and not is_new_head(module, name)
        }

    def __call__(self, module: nn.Module) -> dict[str, float]:
        """Movement by tower, "image" and "text"; empty where nothing pretrained trains, or where parts were pruned."""
        changed, size = dict[str, float](), dict[str, float]()
        for name, parameter in module.named_parameters() if self._start else ():
            start = self._start.get(name)
            if start is None:
                continue
            now = self._sample(parameter)
            if len(now) != len(start):
                return {}
            tower = tower_of(name)
            changed[tower] = changed.get(tower, 0.0) + float((now - start).square().sum())
            size[tower] = size.get(tower, 0.0) + float(start.square().sum())
        return {tower: round(math.sqrt(changed[tower] / max(size[tower], 1e-30)), 4) for tower in changed}

    def _sample(self, parameter: nn.Parameter) -> torch.Tensor:
        flat = parameter.detach().reshape(-1)
        return flat[:: -(-len(flat) // self.ENTRIES)].float().clone()  # (at most ENTRIES,)
