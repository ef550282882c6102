"""The live line of a run on the terminal; plain lines where there is none."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from clipdistill.train.callbacks import Callback, RunView

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
"""Text of the user is never taken for markup, and lines are wrapped by the terminal alone: a file gets them whole."""


class Display(Callback, AbstractContextManager["Display"]):
    """The live line: steps, losses, samples a second, data-wait share, time left. Plain lines when not a terminal."""

    def __init__(self, title: str, total: int, start: int, enabled: bool = True) -> None:
        self.enabled = enabled
        self.title = title
        self.total = total
        self.interactive = enabled and console.is_terminal
        self._last_plain = 0.0
        self._began, self._start = time.monotonic(), start
        self._task: TaskID | None = None
        self._progress: Progress | None = None
        if self.interactive:
            self._progress = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[numbers]}", markup=False),
                console=console,
            )
            self._task = self._progress.add_task(title, total=total, completed=start, numbers="")

    def __enter__(self) -> Display:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def on_step(self, run: RunView) -> None:
        self.update(run.step, run.line)

    def update(self, step: int, line: Mapping[str, Any] | None) -> None:
        """After `step` finished steps; `line` is the log line when one is due."""
        if self._progress is not None and self._task is not None:
            extra: dict[str, Any] = {} if line is None else {"numbers": summary(line)}
            self._progress.update(self._task, completed=step, **extra)
        elif self.enabled and line is not None:
            now = time.monotonic()
            if now - self._last_plain >= 5 or step >= self.total:
                self._last_plain = now
                left = (now - self._began) / max(step - self._start, 1) * (self.total - step)
                self.say(f"{self.title}  step {step}/{self.total}  {summary(line)}  left {left:.0f} s")

    def say(self, text: str) -> None:
        """A line above the live one."""
        if self.enabled:
            console.print(text)


def summary(line: Mapping[str, Any]) -> str:
    """A log line for people: total, each term, speed, share of time spent waiting for data."""
    terms = "  ".join(f"{name} {value:.3g}" for name, value in line["terms"].items())
    speed = f"{line['samples_per_second']:.0f} pairs/s  wait {line['data_wait']:.0%}"
    return f"loss {line['total']:.4g}  ({terms})  {speed}"
