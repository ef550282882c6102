"""What a run tells while it works: a callback is any object with some of the methods of `Callback`.

    class Printer(clipdistill.Callback):
        def on_step(self, run):
            print(run.step, run.losses["total"])

    clipdistill.distill(config, callbacks=[Printer()])

Callbacks run on rank 0, in the order given, after the built-in ones (console, log, curve). One that raises in
`on_start` stops the run before its first step. One that raises later is named in a warning and in run.json and is not
called again; the run goes on, so that days of training are not lost to a logger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from clipdistill.arguments import checked
from clipdistill.errors import ClipdistillError, InputError, nearest
from clipdistill.registry import CALLBACKS, describe
from clipdistill.runs.folder import CURVE, LOG, RunFolder, read_lines, read_rows
from clipdistill.train.config import RunConfig

Say = Callable[[str], None]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class RunView:
    """What a callback sees of a run; nothing in it can be changed.

    step: finished optimiser steps (on_start: those a resumed run begins with; on_checkpoint: those in the checkpoint,
    which may be complete some steps later); samples: pairs seen.
    losses: this step's "total" and each term, unweighted. line: the line of log.jsonl, where one is due at this step
    (means since the last one, learning rate, gradient norm, speed), else None.
    scores, images: the last point of the learning curve ({"t2i_R@1": 0.31, ...}) and the images it was measured on;
    top_share: the share of its captions that find one and the same picture first.
    checkpoint: the last checkpoint written. final_scores: {"dataset/metric": value} of the student, in on_end.
    status: "running"; in on_end "finished", "stopped" or "failed".
    """

    config: RunConfig
    folder: Path
    step: int
    total_steps: int
    samples: int = 0
    losses: Mapping[str, float] = field(default_factory=lambda: _NOTHING)
    line: Mapping[str, Any] | None = None
    scores: Mapping[str, float] = field(default_factory=lambda: _NOTHING)
    images: int = 0
    top_share: float = 0.0
    validation: str = ""
    checkpoint: Path | None = None
    final_scores: Mapping[str, float] = field(default_factory=lambda: _NOTHING)
    status: str = "running"


class Callback:
    """Base of callbacks; every method may be left out."""

    def on_start(self, run: RunView) -> None:
        """Before the first step of this process, after the pre-flight."""

    def on_step(self, run: RunView) -> None:
        """After every optimiser step."""

    def on_evaluation(self, run: RunView) -> None:
        """After every point of the learning curve."""

    def on_checkpoint(self, run: RunView) -> None:
        """After a checkpoint is complete on disk."""

    def on_end(self, run: RunView) -> None:
        """When the run ends in whatever way."""


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


@checked
def register_callback(name: str, make: Callable[[], Any]) -> None:
    """Give a callback a name for `--callback NAME` and recipes' `callbacks: [NAME]`.

    make: a class, or a function without arguments that makes one. Raises InputError for a `name` that is taken.
    """
    CALLBACKS.register(name, make)


class Callbacks:
    """The callbacks of a run: the built-in `own` ones, whose errors are the run's, and the user's `others` by name."""

    def __init__(self, own: Sequence[Callback], others: Iterable[tuple[str, Any]] = (), say: Say = print):
        self._own, self._others, self._say = list(own), list(others), say
        self.failed: list[str] = []
        """A sentence for each that was switched off."""

    def call(self, event: str, run: RunView) -> None:
        """One of EVENTS for all of them. Raises InputError for a user's callback that cannot start."""
        for callback in self._own:
            getattr(callback, event)(run)
        for name, callback in list(self._others):
            try:
                getattr(callback, event, lambda run: None)(run)
            except ClipdistillError as error:
                if event == "on_start":
                    raise
                self._switch_off(name, callback, f"callback '{name}' at step {run.step}: {error}")
            except Exception as error:
                where = f"callback '{name}'{_origin(name)} failed in {event} at step {run.step}: {describe(error)}"
                if event == "on_start":
                    raise InputError(where) from error
                self._switch_off(name, callback, where)

    def _switch_off(self, name: str, callback: Any, sentence: str) -> None:
        self._others = [entry for entry in self._others if entry[1] is not callback]
        self.failed.append(sentence)
        self._say(f"warning: {sentence}; the run goes on without it")


def _origin(name: str) -> str:
    origin = CALLBACKS.origin(name)
    return f" of {origin}" if origin else ""


def choose(config: RunConfig, given: Sequence[Any] = ()) -> list[tuple[str, Any]]:
    """The user's callbacks with their names: those of the configuration (`callbacks`, `tensorboard`, `wandb`,
    `mlflow`), then `given`, objects or registered names. Raises InputError for what is no callback.
    """
    names = [name for name in ("tensorboard", "wandb", "mlflow") if getattr(config, name)]
    names += [name for name in config.callbacks if name not in names]
    found: list[tuple[str, Any]] = []
    for entry in (*names, *given):
        name, callback = (entry, None) if isinstance(entry, str) else (type(entry).__name__, entry)
        if callback is None:
            with CALLBACKS.blaming(name):
                callback = CALLBACKS.get(name)()
        methods = [method for method in dir(callback) if method.startswith("on_")]
        if isinstance(callback, type) or not methods:
            raise InputError(
                f"{callback!r:.80} is no callback: give an object with methods {', '.join(EVENTS)}"
                + (f", such as {callback.__name__}()" if isinstance(callback, type) else "")
            )
        for method in methods:
            if method not in EVENTS and callable(getattr(callback, method)):
                raise InputError(f"callback '{name}': there is no event '{method}'{nearest(method, EVENTS)}")
        found.append((name, callback))
    return found


class Log(Callback):
    """log.jsonl: lines after the step a run resumes from are removed first, so a log has no repeats and no gaps."""

    def on_start(self, run: RunView) -> None:
        _keep_until(RunFolder(run.folder), LOG, run.step)

    def on_step(self, run: RunView) -> None:
        if run.line is not None:
            RunFolder(run.folder).append(LOG, run.line)


class Curve(Callback):
    """eval.jsonl, the learning curve, with a line on the terminal and a warning when it stays at chance."""

    POINTS = 3
    """Points in a row that must be at chance before that is said."""

    def __init__(self, say: Say = print) -> None:
        self._say = say
        self._written: set[int] = set()
        self._scale = float("nan")

    def on_start(self, run: RunView) -> None:
        self._written = _keep_until(RunFolder(run.folder), CURVE, run.step)

    def on_step(self, run: RunView) -> None:
        if run.line is not None:
            self._scale = run.line.get("logit_scale", self._scale)

    def on_evaluation(self, run: RunView) -> None:
        if run.step not in self._written:  # a point put off by a signal may have been measured before a crash
            line = {"step": run.step, "samples": run.samples, "scores": dict(run.scores), "images": run.images}
            RunFolder(run.folder).append(CURVE, {**line, "top_share": run.top_share})
        shown = (("t2i_R@1", "text-to-image"), ("i2t_R@1", "image-to-text"))
        listed = ", ".join(f"{words} {run.scores[name]:.1%}" for name, words in shown if name in run.scores)
        self._say(f"  step {run.step}: R@1 {listed} among {run.images} images of {run.validation}")
        if warning := self._warning_of_chance(run):
            self._say(f"  {warning}")

    def _warning_of_chance(self, run: RunView) -> str | None:
        """A sentence when the last points of the curve, all after the warm-up, are no better than guessing."""
        train = run.config.train
        lines = [line for line in RunFolder(run.folder).curve() if line["step"] > train.warmup_steps]
        chance = 1 / max(run.images, 1)
        limit = chance + 3 * (chance * (1 - chance) / max(run.images, 1)) ** 0.5  # a coin stays below three errors
        last = [line["scores"].get("t2i_R@1", 1.0) for line in lines[-self.POINTS :]]
        if len(last) < self.POINTS or max(last) > limit:
            return None
        return (
            f"warning: R@1 has been at chance ({chance:.2%}) for {self.POINTS} evaluations up to step {run.step} "
            f"(logit scale {self._scale:.3g}, limit {train.max_logit_scale:g}): the student may have collapsed; "
            "try a lower train.learning_rate, more train.warmup_steps or another seed"
        )


def _keep_until(folder: RunFolder, name: str, step: int) -> set[int]:
    """Remove the lines of a log after `step`; returns the steps that are left."""
    rows = read_rows(folder / name)
    kept = [row for row in rows if isinstance(row.get("step"), int) and row["step"] <= step]
    if len(kept) < len(rows) or read_lines(folder / name).cut:
        folder.rewrite(name, kept)
    return {row["step"] for row in kept}
