"""Progress over a whole grid: which run of how many, the run's own steps, the time left for all."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from clipdistill.ablate.grid import GridRun
from clipdistill.train.display import Display, console, summary
from clipdistill.train.run import Run

_SHOWN = ("t2i_R@1", "i2t_R@1", "top1")
_PLAIN_EVERY = 30.0
"""Seconds between lines within a run where the output is no terminal."""


class GridDisplay(AbstractContextManager["GridDisplay"]):
    """Two bars on a terminal, plain lines elsewhere. Time left is reckoned from the runs done in this call."""

    def __init__(self, runs: Sequence[GridRun], done: int, enabled: bool = True) -> None:
        self.enabled = enabled
        self.total = len(runs) + done
        self.position = done
        self.interactive = enabled and console.is_terminal
        self._left = len(runs)
        self._seconds: list[float] = []
        self._began = time.monotonic()
        self._progress: Progress | None = None
        self._grid: TaskID | None = None
        if self.interactive:
            self._progress = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[numbers]}", markup=False),
                console=console,
            )
            self._grid = self._progress.add_task("grid", total=self.total, completed=done, numbers="")

    def __enter__(self) -> GridDisplay:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begin(self, run: GridRun) -> None:
        """A run starts."""
        self._began = time.monotonic()
        self.say(f"[{self.position + 1}/{self.total}] {run.name}{self.left_in_words()}")

    def end(self, run: GridRun, result: Run, seconds: float) -> None:
        """It finished after `seconds`."""
        self._seconds.append(seconds)
        scores = {} if result.scores is None else {s.metric: s.value for s in result.scores if s.model == "student"}
        shown = ", ".join(f"{metric} {scores[metric]:.1%}" for metric in _SHOWN if metric in scores)
        self._step(f"[{self.position + 1}/{self.total}] {run.name}: {shown or 'finished'}  ({seconds:.0f} s)")

    def failed(self, run: GridRun, error: Exception) -> None:
        """It failed."""
        self._step(f"[{self.position + 1}/{self.total}] {run.name} FAILED: {error}")

    def passed_over(self, run: GridRun, why: str) -> None:
        """It is not trained here."""
        self._step(f"[{self.position + 1}/{self.total}] {run.name}: {why}")

    def left_in_words(self, share_of_run: float = 0.0) -> str:
        """', about 12 min left', once a run has shown how long one takes."""
        if self._seconds:
            mean = sum(self._seconds) / len(self._seconds)
        elif share_of_run > 0.05:
            mean = (time.monotonic() - self._began) / share_of_run
        else:
            return ""
        left = mean * (self._left - share_of_run)
        return f", about {duration(left)} left for the grid"

    def line(self, title: str, total: int, start: int, enabled: bool) -> Display:
        """The display of one run, for `distill`."""
        return _RunLine(self, title, total, start, enabled)

    def say(self, text: str) -> None:
        """A line above the bars."""
        if self.enabled:
            console.print(text, markup=False)

    def _step(self, text: str) -> None:
        self.position += 1
        self._left -= 1
        self.say(text)
        if self._progress is not None and self._grid is not None:
            self._progress.update(self._grid, completed=self.position, numbers=self.left_in_words().lstrip(", "))


class _RunLine(Display):
    """One run's bar below the grid's; what the run says is left out after the first run, where it repeats."""

    def __init__(self, grid: GridDisplay, title: str, total: int, start: int, enabled: bool) -> None:
        super().__init__(title, total, start, enabled=False)
        self.grid = grid
        self.talks = enabled and not grid._seconds
        self.shows = enabled
        self._last_line = time.monotonic()
        self._row: TaskID | None = None

    def __enter__(self) -> _RunLine:
        if self.grid._progress is not None and self.shows:
            self._row = self.grid._progress.add_task(self.title, total=self.total, completed=self._start, numbers="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._row is not None and self.grid._progress is not None:
            self.grid._progress.remove_task(self._row)

    def update(self, step: int, line: Mapping[str, Any] | None) -> None:
        if self._row is not None and self.grid._progress is not None:
            extra: dict[str, Any] = {} if line is None else {"numbers": summary(line)}
            self.grid._progress.update(self._row, completed=step, **extra)
        elif self.shows and line is not None and time.monotonic() - self._last_line >= _PLAIN_EVERY:
            self._last_line = time.monotonic()
            share = step / max(self.total, 1)
            text = f"  {self.title}  step {step}/{self.total}  {summary(line)}{self.grid.left_in_words(share)}"
            print(text, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self.talks:
            console.print(text)


def duration(seconds: float) -> str:
    """'45 s', '12 min', '3 h 20 min'."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
