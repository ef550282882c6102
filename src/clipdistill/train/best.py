"""The best student by a measure of the learning curve, kept beside the last; the end of a run that learns no more."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from clipdistill.models import ClipModel, save_model
from clipdistill.models.save import read_model

BEST, LAST = "best", "last"


def judge(best: Mapping[str, Any], scores: Mapping[str, float], metric: str, step: int) -> dict[str, Any]:
    """The record of the best point, {"step", "value", "metric", "since": later points}, after one more point.

    Of equal points the first stays.
    """
    if scores[metric] > best.get("value", -math.inf):
        return {"step": step, "metric": metric, "value": scores[metric], "since": 0}
    return {**best, "since": best["since"] + 1}


def keep(student: ClipModel, out: Path, step: int, average: Any = None) -> None:
    """Write the student of `step`, or its `average`. Earlier ones stay until a checkpoint knows the better one."""
    _save(student, out / BEST / f"{step:08d}", average)


def forget_before(out: Path, best: Mapping[str, Any]) -> None:
    """Remove students of earlier steps than the best one."""
    for folder in (out / BEST).glob("*"):
        if folder.name.isdigit() and int(folder.name) < best.get("step", 0):
            shutil.rmtree(folder, ignore_errors=True)


def take(student: ClipModel, out: Path, best: Mapping[str, Any], step: int, average: Any = None) -> str:
    """Turn `student`, that of the last `step`, into the best; the last is written as OUT/last.

    Returns a sentence that says which it is. Raises InputError when the best one is damaged or gone.
    """
    shown = f"{best['metric']} {best['value']:.4g} on the validation set"
    if best["step"] == step:
        return f"the student of the last step is the best: {shown}"
    found = read_model(out / BEST / f"{best['step']:08d}")
    _save(student, out / LAST, average)
    student.module.load_state_dict(found.module.state_dict())
    if average is not None:
        average.become()
    return f"the student is that of step {best['step']}, the best: {shown}; that of step {step} is {out / LAST}"


def _save(student: ClipModel, folder: Path, average: Any) -> None:
    with nullcontext() if average is None else average.applied():
        save_model(student, folder)
