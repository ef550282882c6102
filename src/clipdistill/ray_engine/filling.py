"""Filling a cache on a Ray cluster: workers encode whole blocks, this process writes them.

The store needs no disk that the workers see. A block holds the same bytes as one filled here: the same batches, by
the same engine, on the same number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clipdistill.cache.config import CacheConfig
from clipdistill.cache.fill import BlockEncoder, BlockWork, Filling, FillReport, fill
from clipdistill.cache.store import Part
from clipdistill.data.loader import prepared
from clipdistill.data.pairs import PairSource
from clipdistill.data.views import View
from clipdistill.embed.encode import Encoder
from clipdistill.embed.prepare import Item
from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel
from clipdistill.ray_engine.cluster import Cluster, connect
from clipdistill.ray_engine.encoder import arrived, require_no_workers, sendable
from clipdistill.ray_engine.names import RayEngine
from clipdistill.runtime.locks import FolderLock


def fill_on_ray(
    config: CacheConfig, engine: RayEngine, *, teachers: Sequence[ClipModel] | None, **given: Any
) -> FillReport:
    """`cache.fill.fill` on the cluster at RAY_ADDRESS, or one started here; see there."""
    require_no_workers(config.workers)
    cluster = connect(engine, engine.device or config.device, given["say"])
    precision = config.precision if config.precision != "auto" else ("bf16" if cluster.device == "cuda" else "fp32")
    # the driver may have no GPU: the first device it has will do for looking at the teachers
    own = {"engine": engine.towers, "precision": precision, "workers": 0, "device": None}
    return fill(
        config.model_copy(update=own), teachers=teachers, filling=functools.partial(RayFilling, cluster), **given
    )


@dataclass
class FillJob:
    """Encodes a block: {"block", "parts": [[part, teacher], ...], "indices", "views": known ones, "synthetic": added
    captions}, each of the last two None or a list with an entry a sample."""

    source: PairSource
    models: list[ClipModel | str]
    engines: list[dict[str, str]]
    config: CacheConfig
    precision: str
    dtype: Any
    most: int | None
    drawn: tuple[Any, int, int]
    blocks: BlockEncoder = field(init=False)

    def start(self, device: str) -> None:
        """Make the encoders of this worker, with the engines of the store."""
        encoders = []
        for spec, kept in zip(self.models, self.engines):
            model = arrived(spec, device)
            model.module.requires_grad_(False).eval().to(device)
            encoder = Encoder(model, device=device, dtype=self.precision, engine=self.config.engine, progress=False)
            if kept:
                encoder.prepare(self.source, 1 + self.drawn[1], self.most, kept)
            if encoder.engine_names() != kept:
                raise InputError(f"teacher '{model.name}': its engines {kept} do not run on the Ray workers")
            encoders.append(encoder)
        self.blocks = BlockEncoder(self.source, encoders, self.config.batch_size, self.dtype, self.drawn)

    def __call__(self, task: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of each part as "PART TEACHER NAME", and notes: problems, truncated, metadata."""
        parts = [(part, teacher) for part, teacher in task["parts"]]
        work = BlockWork(task["block"], parts, _listed(task["indices"]))
        with torch.inference_mode():
            for batch in prepared(self.blocks.preparation, self.blocks.cut(self._items(work, task)), 0):
                self.blocks.encode(work, batch)
            found: dict[str, Tensor] = {}
            extras: dict[str, dict[str, str]] = {}
            for part, teacher in parts:
                tensors, extras[f"{part} {teacher}"] = self.blocks.tensors(work, part, teacher)
                found |= {f"{part} {teacher} {name}": tensor.cpu().contiguous() for name, tensor in tensors.items()}
        return found, {"problems": work.problems, "truncated": work.truncated, "extras": extras}

    def _items(self, work: BlockWork, task: dict[str, Any]) -> list[Item]:
        kinds = {part for part, _ in work.parts}
        items = []
        for place, index in enumerate(work.indices):
            views = None if task["views"] is None else tuple(map(View.from_json, task["views"][place]))
            texts = tuple(self.source.captions(index)[: self.most]) if "pairs" in kinds else ()
            added = tuple(task["synthetic"][place]) if "synthetic" in kinds else ()
            items.append(Item(index, views, bool(kinds & {"pairs", "views"}), texts, added))
        return items


class RayFilling(Filling):
    """A filling whose blocks are encoded elsewhere."""

    def __init__(self, cluster: Cluster, *given: Any) -> None:
        super().__init__(*given)
        self.cluster = cluster

    def run(self) -> FillReport:
        """As `Filling.run`; one driver at a time, since each would have all blocks encoded."""
        lock = self.store.folder / "locks" / f"ray-{'of'.join(map(str, self.config.share))}.lock"
        with FolderLock(lock, f"{self.store.folder} is being filled on Ray"):
            return super().run()

    def work_through(self, missing: list[int]) -> None:
        """Have these blocks encoded, and write each as it comes."""
        manifest = self.store.manifest
        encoders = self.blocks.encoders
        job = FillJob(
            self.source, [sendable(encoder.model) for encoder in encoders], [e.engine_names() for e in encoders],
            self.config, encoders[0].dtype, manifest.dtype, 1 if manifest.captions == "first" else None,
            (manifest.view_policy, manifest.views, manifest.view_seed),
        )  # fmt: skip
        tasks = [self._task(number) for number in missing]
        for number, tensors, notes in self.cluster.spread(job, tasks):
            self._write(missing[number], tensors, notes)
            self.told()

    def _task(self, number: int) -> dict[str, Any]:
        """A block for a worker; what only the store knows goes with it."""
        work = BlockWork(number, self.store.missing(number), self.indices(number))
        items = self.items(work, work.indices)
        stored = work.parts and any(item.views is not None for item in items)
        added = any(item.synthetic for item in items)
        return {
            "block": number,
            "parts": work.parts,
            "indices": _short(work.indices),
            "views": [[view.to_json() for view in item.views or ()] for item in items] if stored else None,
            "synthetic": [item.synthetic for item in items] if added else None,
        }

    def _write(self, number: int, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Write a block, unless another process has it or is at it."""
        work = self.claimed(number)
        if work is None:
            return
        work.problems, work.truncated = notes["problems"], notes["truncated"]

        def arrived_part(work: BlockWork, part: Part, teacher: int) -> tuple[dict[str, Tensor], dict[str, str]]:
            prefix = f"{part} {teacher} "
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            return own, notes["extras"][prefix.strip()]

        self.finish(work, arrived_part)


def _short(indices: list[int]) -> dict[str, int] | list[int]:
    """{"first", "stop"} of numbers that follow each other."""
    first, stop = indices[0], indices[-1] + 1
    return {"first": first, "stop": stop} if indices == list(range(first, stop)) else indices


def _listed(indices: dict[str, int] | list[int]) -> list[int]:
    return list(range(indices["first"], indices["stop"])) if isinstance(indices, dict) else indices
