"""Progress over a whole grid: which run of how many, the run's own steps, the time left for all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from clipdistill.ablate.grid import GridRun
from clipdistill.runtime.console import duration
from clipdistill.runtime.progress import Meter
from clipdistill.train.display import Display, summary
from clipdistill.train.run import Run

_SHOWN = ("t2i_R@1", "i2t_R@1", "top1")
_PLAIN_EVERY = 30.0
"""Seconds between lines within a run where the output is no terminal."""


class GridDisplay(Meter):
    """Two bars on a terminal, plain lines elsewhere. Time left is reckoned from the runs done in this call, each by its
    length: a run of 1,000 steps takes ten times as long as one of 100, and of one that goes on only the rest counts."""

    def __init__(self, runs: Sequence[GridRun], done: int, enabled: bool = True) -> None:
        super().__init__("grid", len(runs) + done, done, enabled=enabled, clock=False, transient=False)
        self._left = _lengths(runs)
        self._done_length, self._seconds = 0.0, 0.0
        self._run, self._run_began, self._went_on_at = "", time.monotonic(), 0.0

    def begin(self, run: GridRun) -> None:
        """A run starts."""
        self._run, self._run_began, self._went_on_at = run.name, time.monotonic(), 0.0
        self.say(f"[{self.done + 1}/{self.total}] {run.name}{self.left_in_words()}")

    def end(self, run: GridRun, result: Run, seconds: float) -> None:
        """It finished after `seconds`."""
        self._seconds += seconds
        self._done_length += self._left.get(run.name, 0.0) * (1 - self._went_on_at)
        scores = {} if result.scores is None else {s.metric: s.value for s in result.scores if s.model == "student"}
        shown = ", ".join(f"{metric} {scores[metric]:.1%}" for metric in _SHOWN if metric in scores)
        self._step(f"[{self.done + 1}/{self.total}] {run.name}: {shown or 'finished'}  ({seconds:.0f} s)", run)

    def failed(self, run: GridRun, error: Exception) -> None:
        """It failed."""
        self._step(f"[{self.done + 1}/{self.total}] {run.name} FAILED: {error}", run)

    def passed_over(self, run: GridRun, why: str) -> None:
        """It is not trained here."""
        self._step(f"[{self.done + 1}/{self.total}] {run.name}: {why}", run)

    def left_in_words(self, share: float = 0.0) -> str:
        """', about 12 min left', once a run has shown how long one takes; `share` of this one is done."""
        length = self._left.get(self._run, 0.0)
        here = share - self._went_on_at
        if self._done_length:
            pace = self._seconds / self._done_length
        elif here > 0.05 and length:
            pace = (time.monotonic() - self._run_began) / (here * length)
        else:
            return ""
        left = pace * (sum(self._left.values()) - share * length)
        return f", about {duration(max(left, 1))} left for the grid"

    def line(self, title: str, total: int, start: int, enabled: bool) -> Display:
        """The display of one run, for `distill`."""
        self._went_on_at = start / max(total, 1)
        return _RunLine(self, title, total, start, enabled)

    def _step(self, text: str, run: GridRun) -> None:
        self.say(text)
        self.done += 1
        self._left.pop(run.name, None)
        self.set(self.done, note=self.left_in_words().lstrip(", "))


def _lengths(runs: Sequence[GridRun]) -> dict[str, float]:
    """Name of each run -> how much it trains: its pairs where all runs have steps, its passes over the data where all
    have epochs, else 1."""
    trains = {run.name: run.config.train for run in runs}
    if all(train.epochs is None and train.steps for train in trains.values()):
        return {name: float((train.steps or 1) * train.batch_size) for name, train in trains.items()}
    if all(train.epochs for train in trains.values()):
        return {name: float(train.epochs or 1) for name, train in trains.items()}
    return dict.fromkeys(trains, 1.0)


class _RunLine(Display):
    """One run's bar below the grid's; what the run says is left out after the first run, where it repeats."""

    def __init__(self, grid: GridDisplay, title: str, total: int, start: int, enabled: bool) -> None:
        super().__init__(title, total, start, enabled, within=grid)
        self.grid = grid
        self.talks = enabled and not grid._done_length

    def update(self, step: int, line: Mapping[str, Any] | None) -> None:
        self.set(step, note=None if line is None else summary(line))
        if line is not None and self.due(_PLAIN_EVERY):
            left = self.grid.left_in_words(step / max(self.total or 0, 1))
            super().say(f"  {self.title}  step {step}/{self.total}  {summary(line)}{left}")

    def say(self, text: str) -> None:
        if self.talks:
            super().say(text)
