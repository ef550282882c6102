"""The live line of a run on the terminal; plain lines where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipdistill.runtime.progress import Meter
from clipdistill.train.callbacks import Callback, RunView


class Display(Meter, Callback):
    """The live line: steps, losses, samples a second, data-wait share, time left. Plain lines when not a terminal."""

    def __init__(self, title: str, total: int, start: int, enabled: bool = True, within: Meter | None = None) -> None:
        super().__init__(title, total, start, enabled=enabled, within=within, transient=False)

    def on_step(self, run: RunView) -> None:
        self.update(run.step, run.line)

    def update(self, step: int, line: Mapping[str, Any] | None) -> None:
        """After `step` finished steps; `line` is the log line when one is due."""
        self.set(step, note=None if line is None else summary(line))
        if line is not None and self.due(5, at_once=True):
            self.say(f"{self.title}  step {step}/{self.total}  {summary(line)}  left {self.left():.0f} s")


def summary(line: Mapping[str, Any]) -> str:
    """A log line for people: total, each term, speed, share of time spent waiting for data."""
    terms = "  ".join(f"{name} {value:.3g}" for name, value in line["terms"].items())
    speed = f"{line['samples_per_second']:.0f} pairs/s  wait {line['data_wait']:.0%}"
    return f"loss {line['total']:.4g}  ({terms})  {speed}"
