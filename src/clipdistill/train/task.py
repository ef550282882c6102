"""What the training loop trains: the protocol between the loop and a task (a distillation, a region teacher, ...)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from clipdistill.data.loader import Batch
from clipdistill.data.pairs import PairSource
from clipdistill.models import ClipModel
from clipdistill.objective import Embeddings, ObjectiveOutput
from clipdistill.statistics.scores import Scores

Say = Callable[[str], None]


class Task(Protocol):
    """Made from (configuration, device, sources, say) by the class that registry.TASKS names.

    Everything random in it is a function of (seed, step, rank), so that a resumed run goes on to the bit.
    """

    device: torch.device
    source: PairSource
    total_steps: int
    steps_per_epoch: int
    validation_name: str | None

    @property
    def optimiser(self) -> torch.optim.Optimizer: ...

    def preflight(self, say: Say, explain: bool, check: Callable[[Embeddings, str], str]) -> None:
        """Say what will be trained. `check` returns a sentence about a teacher's embeddings of distinct pairs, and
        raises InputError when they are no better than guessing. Raises InputError when training cannot work.
        """
        ...

    def tune(self, known: dict[str, Any] | None, say: Say) -> dict[str, Any]:
        """Choose how the towers are computed (attention, compiled), or take up what `known`, a checkpoint's record of
        it, says. Returns the record; empty where there is nothing to choose.
        """
        ...

    def loader(self, start_step: int, steps: int | None = None) -> Iterable[Batch]:
        """This rank's batches of steps `start_step` to `steps` - 1 (None: the last)."""
        ...

    def before_step(self, step: int) -> str | None:
        """Called before each step; a sentence when what is trained was changed (pruned), else None."""
        ...

    def gradients(self, step: int, batch: Batch) -> tuple[ObjectiveOutput, float]:
        """The step's gradients, averaged over ranks and clipped; the objective and the norm before clipping."""
        ...

    def after_step(self, updated: bool) -> bool:
        """The optimiser has taken its step, or (False) it was left out and nothing may stay of the forward pass.

        Returns whether a step left out is nothing to report: the loss scale of fp16 was too high and is lower now.
        """
        ...

    def schedule(self, step: int) -> tuple[int, int, int]:
        """(step, total steps, warm-up steps) that the learning rate of `step` follows from."""
        ...

    def numbers(self, step: int) -> dict[str, Any]:
        """What the log tells beside losses and speeds after `step` steps: the logit scale, ..."""
        ...

    def evaluate(self) -> Point | None:
        """A point of the learning curve; None without validation data. Called on rank 0 alone."""
        ...

    def finish(self, folder: Path, say: Say) -> Outcome:
        """Write the trained model as `folder`/student and the final scores. Called on rank 0 alone."""
        ...

    def end(self) -> None:
        """After the last step, on every rank."""
        ...

    def checkpoint(self) -> tuple[ClipModel | None, Mapping[str, torch.nn.Module]]:
        """What a checkpoint holds: the student as a model folder, and other modules by file name."""
        ...

    def resume(self, folder: Path, files: Iterable[str]) -> None:
        """Before `restore`: make ready for what the checkpoint in `folder`, with these files, holds (pruned?)."""
        ...

    def identity(self) -> dict[str, str]:
        """Fingerprints of what the run began with, by part: compared when it is continued."""
        ...

    def facts(self) -> dict[str, Any]:
        """What run.json tells about this task."""
        ...

    def trace(self, step: int, batch: Batch, precision: str) -> Iterator[Traced]:
        """Every value of a step in the order of its making, to find the first that is not finite."""
        ...


class Point(NamedTuple):
    """A point of the learning curve: scores (fractions) over so many images.

    top_share: the share of captions that find one and the same picture first.
    """

    scores: dict[str, float]
    images: int
    top_share: float = 0.0


class Outcome(NamedTuple):
    """What a finished run has: scores where there was something to measure, the fingerprint of its student."""

    scores: Scores | None
    fingerprint: str


class Traced(NamedTuple):
    """A value of a step, or several by name. keys: the samples that its rows belong to, where they do."""

    what: str
    value: torch.Tensor | Mapping[str, torch.Tensor]
    keys: list[str] | None = None
