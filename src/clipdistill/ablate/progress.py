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
    """Two bars on a terminal, plain lines elsewhere. Time left is reckoned from the runs done in this call."""

    def __init__(self, runs: Sequence[GridRun], done: int, enabled: bool = True) -> None:
        super().__init__("grid", len(runs) + done, done, enabled=enabled, clock=False, transient=False)
        self._seconds: list[float] = []
        self._run_began = time.monotonic()

    def begin(self, run: GridRun) -> None:
        """A run starts."""
        self._run_began = time.monotonic()
        self.say(f"[{self.done + 1}/{self.total}] {run.name}{self.left_in_words()}")

    def end(self, run: GridRun, result: Run, seconds: float) -> None:
        """It finished after `seconds`."""
        self._seconds.append(seconds)
        scores = {} if result.scores is None else {s.metric: s.value for s in result.scores if s.model == "student"}
        shown = ", ".join(f"{metric} {scores[metric]:.1%}" for metric in _SHOWN if metric in scores)
        self._step(f"[{self.done + 1}/{self.total}] {run.name}: {shown or 'finished'}  ({seconds:.0f} s)")

    def failed(self, run: GridRun, error: Exception) -> None:
        """It failed."""
        self._step(f"[{self.done + 1}/{self.total}] {run.name} FAILED: {error}")

    def passed_over(self, run: GridRun, why: str) -> None:
        """It is not trained here."""
        self._step(f"[{self.done + 1}/{self.total}] {run.name}: {why}")

    def left_in_words(self, share_of_run: float = 0.0) -> str:
        """', about 12 min left', once a run has shown how long one takes."""
        if self._seconds:
            mean = sum(self._seconds) / len(self._seconds)
        elif share_of_run > 0.05:
            mean = (time.monotonic() - self._run_began) / share_of_run
        else:
            return ""
        left = mean * ((self.total or 0) - self.done - share_of_run)
        return f", about {duration(max(left, 1))} left for the grid"

    def line(self, title: str, total: int, start: int, enabled: bool) -> Display:
        """The display of one run, for `distill`."""
        return _RunLine(self, title, total, start, enabled)

    def _step(self, text: str) -> None:
        self.say(text)
        self.done += 1
        self.set(self.done, note=self.left_in_words().lstrip(", "))


class _RunLine(Display):
    """One run's bar below the grid's; what the run says is left out after the first run, where it repeats."""

    def __init__(self, grid: GridDisplay, title: str, total: int, start: int, enabled: bool) -> None:
        super().__init__(title, total, start, enabled, within=grid)
        self.grid = grid
        self.talks = enabled and not grid._seconds

    def update(self, step: int, line: Mapping[str, Any] | None) -> None:
        self.set(step, note=None if line is None else summary(line))
        if line is not None and self.due(_PLAIN_EVERY):
            share = step / max(self.total or 0, 1)
            super().say(f"  {self.title}  step {step}/{self.total}  {summary(line)}{self.grid.left_in_words(share)}")

    def say(self, text: str) -> None:
        if self.talks:
            super().say(text)
