"""The encoder whose batches the workers of a Ray cluster encode: the same batches, so the same rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clipdistill.data.pairs import PairSource
from clipdistill.embed.encode import FULL_NAMES, EncodedPairs, Encoder, most_captions
from clipdistill.embed.engine import TowerEngine
from clipdistill.embed.names import check_engine
from clipdistill.embed.prepare import Pictures
from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.load import load_model
from clipdistill.ray_engine.cluster import connect
from clipdistill.ray_engine.names import RayEngine
from clipdistill.runtime.progress import Meter

_MOST = 4096
"""Pictures or texts of a task at most, so that a worker that dies loses little."""
Batch = tuple[Tensor, list[int], list[tuple[int, str]]]


def sendable(model: ClipModel) -> ClipModel | str:
    """The model, or the name of an export, whose session belongs to one process."""
    return model.name if "exported" in model.architecture else model


def arrived(model: ClipModel | str, device: str) -> ClipModel:
    """The model in the worker that got it."""
    return load_model(model, device=device, teacher=True) if isinstance(model, str) else model


@dataclass
class EncodeJob:
    """Encodes {"images": [index, ...]} of a source, {"texts": [[text, ...], ...]}, {"part": [text, ...]}."""

    model: ClipModel | str
    source: Pictures | None
    what: str
    batch_size: int
    dtype: str
    engine: str
    encoder: Encoder = field(init=False)

    def start(self, device: str) -> None:
        """Make the encoder of this worker."""
        model = arrived(self.model, device)
        settings: dict[str, Any] = {"batch_size": self.batch_size, "dtype": self.dtype, "engine": self.engine}
        self.encoder = Encoder(model, device=device, progress=False, **settings)

    def __call__(self, task: dict[str, list]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Rows (n, D), and which of the pictures they are."""
        rows: list[Tensor] = []
        notes: dict[str, Any] = {"found": [], "bad": []}
        if "images" in task:
            assert self.source is not None
            for own, found, bad in self.encoder.stream(self.source, task["images"]):
                rows.append(own)
                notes["found"] += found
                notes["bad"] += bad
        elif "texts" in task:
            rows += self.encoder.text_batches(task["texts"], self.what)
        else:
            _, own, notes["cut"] = next(self.encoder.text_parts([task["part"]], self.what))
            rows.append(own)
        notes["engines"] = {tower: [e.name, e.agreement] for tower, e in self.encoder.engines.items()}
        return {"rows": torch.cat(rows)}, notes


class RayEncoder(Encoder):
    """An `Encoder` that decodes and encodes on a cluster; what it gives is what one in this process gives."""

    def __init__(self, model: ClipModel, engine: RayEngine, *, workers: int | None = 0, **settings: Any) -> None:
        require_no_workers(workers)
        super().__init__(model, **settings)
        if self.world > 1:
            raise InputError("engine 'ray' shares the work out itself: start one process, without torchrun")
        self.cluster = connect(engine, engine.device, self.say)
        check_engine(engine.towers, FULL_NAMES.get(self.dtype, self.dtype), self.cluster.device)
        self.towers = engine.towers
        self._early: tuple[list[Batch], dict[str, Tensor]] | None = None

    def pairs(self, source: PairSource, captions: str = "all") -> EncodedPairs:
        """As `Encoder.pairs`; pictures and captions go out together."""
        most = most_captions(captions)
        listed = dict.fromkeys(text for i in range(len(source)) for text in source.captions(i)[:most])
        new = sorted((text for text in listed if text not in self._rows), key=len)
        texts = [new[i : i + self.batch_size] for i in range(0, len(new), self.batch_size)]
        pictures = self._picture_tasks(range(len(source)))
        groups = self._grouped(texts)
        tasks = pictures + [{"texts": group} for group in groups]
        batches: list[Batch] = []
        rows: dict[str, Tensor] = {}
        with Meter(f"images and captions of {source.name}", len(source) + len(new), enabled=self.progress) as meter:
            for number, own, notes in self._spread(source, f"captions of {source.name}", tasks):
                if number < len(pictures):
                    batches.append((own, notes["found"], [(i, why) for i, why in notes["bad"]]))
                    meter.advance(len(pictures[number]["images"]))
                else:
                    flat = [text for batch in groups[number - len(pictures)] for text in batch]
                    rows |= dict(zip(flat, own))
                    meter.advance(len(flat))
        self._early = sorted(batches, key=_first), rows
        try:
            return super().pairs(source, captions)
        finally:
            self._early = None

    def stream(
        self, source: Pictures, indices: Sequence[int], meanwhile: Iterator[Any] | None = None
    ) -> Iterator[Batch]:
        """As `Encoder.stream`, but in any order; `meanwhile` is left to its owner."""
        if self._early is not None:
            yield from self._early[0]
            return
        for _, rows, notes in self._spread(source, source.name, self._picture_tasks(indices)):
            yield rows, notes["found"], [(i, why) for i, why in notes["bad"]]

    def text_batches(self, batches: Sequence[Sequence[str]], what: str) -> Iterator[Tensor]:
        """As `Encoder.text_batches`."""
        if self._early is not None:
            yield from (torch.stack([self._early[1][text] for text in batch]) for batch in batches)
            return
        groups = self._grouped(batches)
        found = {n: rows for n, rows, _ in self._spread(None, what, [{"texts": group} for group in groups])}
        for number, group in enumerate(groups):
            yield from found[number].split([len(batch) for batch in group])

    def text_parts(self, parts: Iterable[Sequence[str]], what: str) -> Iterator[tuple[int, Tensor, int]]:
        """As `Encoder.text_parts`."""
        for number, rows, notes in self._spread(None, what, [{"part": list(texts)} for texts in parts]):
            yield number, rows, notes["cut"]

    def _picture_tasks(self, indices: Sequence[int]) -> list[dict[str, list]]:
        size = self.batch_size * self._batches_a_task(-(-len(indices) // self.batch_size))
        return [{"images": list(indices[i : i + size])} for i in range(0, len(indices), size)]

    def _grouped(self, batches: Sequence[Sequence[str]]) -> list[list[Sequence[str]]]:
        size = self._batches_a_task(len(batches))
        return [list(batches[i : i + size]) for i in range(0, len(batches), size)]

    def _batches_a_task(self, count: int) -> int:
        """Some tasks for each worker, none of them long."""
        return max(1, min(_MOST // self.batch_size, count // (4 * self.cluster.workers)))

    def _spread(
        self, source: Pictures | None, what: str, tasks: list[dict[str, Any]]
    ) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        job = EncodeJob(sendable(self.model), source, what, self.batch_size, self.dtype, self.towers)
        for number, tensors, notes in self.cluster.spread(job, tasks):
            for tower, (name, agreement) in notes["engines"].items():
                known = self.engines.setdefault(tower, TowerEngine(name, None, agreement))
                if known.name != name:
                    raise InputError(
                        f"the {tower} tower is run by {known.name} on one Ray worker and by {name} on another: "
                        "name an engine that runs on all, as in ray:torch"
                    )
            yield number, tensors["rows"], notes


def _first(batch: Batch) -> int:
    return min([*batch[1], *(i for i, _ in batch[2])])


def require_no_workers(workers: int | None) -> None:
    """Raise InputError where processes that decode were asked for beside Ray's."""
    if workers:
        raise InputError(
            f"engine 'ray': --workers {workers} are processes that decode, and each of Ray's workers decodes for "
            "itself: leave it out; ray:workers=8 says how many of those there are"
        )
