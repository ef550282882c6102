"""What a run tells while it works: JSON lines on disk, a live line on the terminal, TensorBoard and wandb if asked.

Only rank 0 writes. Lines after the step a run resumes from are removed first, so a log has no repeats and no gaps.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from clipdistill.errors import MissingExtraError

console = Console(stderr=True, highlight=False)


class Sink(Protocol):
    """Somewhere numbers go: `record` takes one line of the log, flat or nested."""

    def record(self, kind: str, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`log.jsonl` (training) and `eval.jsonl` (curve) in the run folder, one JSON object a line."""

    def __init__(self, folder: Path, resume_step: int, evaluation_due: bool = False) -> None:
        self.paths = {"train": folder / "log.jsonl", "eval": folder / "eval.jsonl"}
        for kind, path in self.paths.items():
            if path.exists():
                _keep_until(path, resume_step - int(evaluation_due and kind == "eval"))

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        with self.paths[kind].open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        """Nothing is held open between lines."""


class TensorBoard:
    """Scalars for TensorBoard in `tensorboard/` of the run folder (extra `tensorboard`)."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tensorboard", "tensorboard: true") from error
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        for name, value in flatten(values).items():
            self.writer.add_scalar(f"{kind}/{name}", value, int(values["step"]))

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A wandb run with the identity kept in the run folder, so that a resumed run continues it (extra `wandb`)."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError("wandb", "wandb", f"wandb: {project}") from error
        identity = folder / "wandb-id.txt"
        known = identity.read_text(encoding="utf-8").strip() if identity.exists() else None
        self.run = wandb.init(
            project=project, name=name, id=known, resume="allow", config=dict(config), dir=str(folder)
        )
        identity.write_text(self.run.id, encoding="utf-8")

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        self.run.log({f"{kind}/{k}": v for k, v in flatten(values).items()}, step=int(values["step"]))

    def close(self) -> None:
        self.run.finish()


class Display(AbstractContextManager["Display"]):
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
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[numbers]}"),
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
                print(f"{self.title}  step {step}/{self.total}  {summary(line)}  left {left:.0f} s", file=sys.stderr)

    def say(self, text: str) -> None:
        """A line above the live one."""
        if self.enabled:
            console.print(text)


def summary(line: Mapping[str, Any]) -> str:
    """A log line for people: total, each term, speed, share of time spent waiting for data."""
    terms = "  ".join(f"{name} {value:.3g}" for name, value in line["terms"].items())
    speed = f"{line['samples_per_second']:.0f} pairs/s  wait {line['data_wait']:.0%}"
    return f"loss {line['total']:.4g}  ({terms})  {speed}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested mappings under joined names."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = float(value)
    return flat


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; a line cut short by a crash is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return lines


def _keep_until(path: Path, step: int) -> None:
    kept = "".join(json.dumps(line) + "\n" for line in read_lines(path) if line.get("step", 0) <= step)
    if kept == path.read_text(encoding="utf-8"):
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(kept, encoding="utf-8")
    temporary.replace(path)
