"""Filling a store: claim a block, prepare its samples in the workers, run the teachers, write the block whole.

Any number of processes (or torchrun ranks, or machines that share the disk) may fill one store at a time, and one that
is killed loses at most the block it was working on. What is written does not depend on how the work was shared: batches
never cross the edge of a block.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from clipdistill.cache.blocks import write_block
from clipdistill.cache.config import CacheConfig
from clipdistill.cache.create import open_for_filling, require_cache_place
from clipdistill.cache.manifest import MANIFEST, TeacherEntry, read_manifest
from clipdistill.cache.names import Dtype
from clipdistill.cache.rows import pack
from clipdistill.cache.sizes import check_space
from clipdistill.cache.store import CacheStore, Part
from clipdistill.cache.stored_views import pack_views
from clipdistill.data.ledger import BadSampleLedger
from clipdistill.data.loader import geometry, prepared
from clipdistill.data.open import open_training
from clipdistill.data.pairs import PairSource
from clipdistill.embed.encode import Encoder
from clipdistill.embed.names import on_cluster
from clipdistill.embed.prepare import Item, Preparation, Prepared
from clipdistill.errors import InputError
from clipdistill.models import ClipModel, load_model
from clipdistill.runs.folder import read_lines
from clipdistill.runtime.console import Shown, file_size
from clipdistill.runtime.locks import Claims
from clipdistill.runtime.machine import pick_device

Say = Callable[[str], None]
T = TypeVar("T")


@dataclass
class FillReport(Shown):
    """What one process did: samples of finished blocks, seconds, samples whose image was bad, captions cut."""

    store: CacheStore
    samples: int = 0
    seconds: float = 0.0
    bad: int = 0
    truncated: int = 0

    def __repr__(self) -> str:
        return (
            f"{self.store.folder}: {self.samples:,} images embedded in {self.seconds:.1f} s "
            f"({self.rate:,.1f} images/s); {self.bad} could not be read; {self.truncated} captions cut"
        )

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.samples / max(self.seconds, 1e-9)


@dataclass
class BlockWork:
    """One block: what it lacks, and what has been computed of it so far."""

    number: int
    parts: list[tuple[Part, int]]
    indices: list[int]
    done: int = 0
    truncated: int = 0
    views: list[Any] = field(default_factory=list)
    problems: list[str | None] = field(default_factory=list)
    images: dict[int, list[Tensor]] = field(default_factory=dict)
    texts: dict[tuple[Part, int], list[Tensor]] = field(default_factory=dict)
    counts: dict[Part, list[int]] = field(default_factory=lambda: {"pairs": [], "synthetic": []})


def fill(
    config: CacheConfig,
    *,
    say: Say = lambda _: None,
    progress: Callable[[int, int, float], None] = lambda done, total, rate: None,
    source: PairSource | None = None,
    teachers: Sequence[ClipModel] | None = None,
    filling: Callable[..., Filling] | None = None,
) -> FillReport:
    """Fill the store that `config` describes and return when every block of this process's share is there.

    `source` and `teachers` may be given when they are already open. `progress` gets samples done and to do, and the
    rate in images a second. filling: what does the work, None for this process. Raises InputError for unusable input
    or a store that differs, ClipdistillError when the disk is too small, BudgetError above the budget of bad samples.
    """
    require_cache_place(config.out)
    cluster = on_cluster(config.engine)
    if cluster is not None:
        fill_there = import_module("clipdistill.ray_engine.filling").fill_on_ray
        return fill_there(config, cluster, say=say, progress=progress, source=source, teachers=teachers)
    source = open_training(config.data) if source is None else source
    texts = [own.name for own in getattr(source, "sets", [source]) if not own.pictured]
    if texts:
        raise InputError(f"{texts[0]}: texts without pictures: a cache is filled from pictures; take the teacher live")
    if source.problems:
        say(source.problems.sentence(source.name))
    device = pick_device(config.device)
    precision = config.precision if config.precision != "auto" else ("bf16" if device.type == "cuda" else "fp32")
    models = [load_model(name, teacher=True) for name in config.teachers] if teachers is None else list(teachers)
    for model in models:
        model.module.requires_grad_(False).eval().to(device)
    encoders = [Encoder(model, device=device, dtype=precision, engine=config.engine, say=say) for model in models]
    stored = read_manifest(config.out).teachers if (config.out / MANIFEST).exists() else ()
    workers = _choose(config, source, encoders, stored)
    store = open_for_filling(config, source, encoders, precision)
    _choose(config, source, encoders, store.manifest.teachers, again=True)  # another process may have made it meanwhile
    _announce(store, say)
    for encoder in encoders:
        say(f"teacher {encoder.model.name}: {encoder.describe()}")
    work = (filling or Filling)(config, store, source, encoders, workers, progress)
    try:
        return work.run()
    finally:
        work.claims.give_back_all()


def _choose(
    config: CacheConfig,
    source: PairSource,
    encoders: list[Encoder],
    stored: Sequence[TeacherEntry],
    again: bool = False,
) -> int:
    """Engines for the teachers, those of a store that is there (`stored`) where it has the teacher; the workers."""
    workers = config.workers
    for number, encoder in enumerate(encoders):
        kept = stored[number].engines if number < len(stored) else None
        if again and encoder.engine_names() == kept:
            continue
        found = encoder.prepare(source, 1 + config.views, 1 if config.captions == "first" else None, kept)
        workers = found if workers is None else workers
        if kept is not None and encoder.engine_names() != {t: name.split(" + ")[0] for t, name in kept.items()}:
            raise InputError(
                f"cache {config.out}: its teacher '{encoder.model.name}' was run by "
                f"{', '.join(f'{name} ({tower} tower)' for tower, name in kept.items())}, which does not run here: "
                "install it, or fill a new folder"
            )
    return workers or 0


def _announce(store: CacheStore, say: Say) -> None:
    """Size, what is left to do, and whether it fits; before anything is computed."""
    manifest, missing = store.manifest, store.missing_blocks()
    size = manifest.pair_bytes()
    rows = sum(stop - start for start, stop in (store.layout.bounds(block) for block in missing))
    extra = "" if manifest.synthetic is None else f" + {manifest.synthetic.captions} added"
    say(
        f"{store.folder}: {manifest.data.samples} images, {manifest.data.captions} captions{extra}, "
        f"{1 + manifest.views} view{'s' if manifest.views else ''}, {manifest.dtype}, "
        f"{' + '.join(f'{t.name} ({t.dim})' for t in manifest.teachers)}: {file_size(size)} an image, "
        f"{file_size(size * manifest.data.samples)} in all"
    )
    if len(missing) < len(store.layout):
        say(f"{len(store.layout) - len(missing)} of {len(store.layout)} blocks are there, {len(missing)} to fill")
    check_space(store.folder, int(size * rows))


class BlockEncoder:
    """Runs the teachers on the samples of blocks; knows nothing of a store. dtype: of the rows it gives; drawn: policy,
    number and seed of the views."""

    def __init__(
        self, source: PairSource, encoders: list[Encoder], batch_size: int, dtype: Dtype, drawn: tuple[Any, int, int]
    ) -> None:
        self.source, self.encoders, self.batch_size, self.dtype = source, encoders, batch_size, dtype
        models = [encoder.model for encoder in encoders]
        geometries = [geometry(model.image) for model in models]
        specs = {g: m.image for g, m in zip(geometries, models)}
        self.pixels_of = [list(specs).index(g) for g in geometries]
        tokenizers: list[Any] = []
        self.tokens_of = []
        for model in models:
            if model.tokenizer not in tokenizers:
                tokenizers.append(model.tokenizer)
            self.tokens_of.append(tokenizers.index(model.tokenizer))
        self.preparation = Preparation(source, list(specs.values()), tokenizers, *drawn)
        self.chunk = max(1, batch_size // (1 + drawn[1]))

    def cut(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """The samples of a block in batches: none goes beyond its edge."""
        return (items[first : first + self.chunk] for first in range(0, len(items), self.chunk))

    def encode(self, work: BlockWork, batch: Prepared) -> None:
        """Run the teachers on one batch of a block."""
        for part, teacher in work.parts:
            if part == "pairs":
                pixels = batch.pixels[self.pixels_of[teacher]]
                work.images.setdefault(teacher, []).append(
                    self.encoders[teacher].encode_images(pixels, at_once=self.batch_size)
                )
                work.texts.setdefault((part, teacher), []).append(self._encode_texts(teacher, batch.tokens))
            elif part == "synthetic":
                work.texts.setdefault((part, teacher), []).append(self._encode_texts(teacher, batch.synthetic))
        work.views.extend(batch.views)
        work.problems.extend(batch.problems)
        work.counts["pairs"].extend(len(item.texts) for item in batch.items)
        work.counts["synthetic"].extend(len(item.synthetic) for item in batch.items)
        work.done += len(batch.items)
        work.truncated += batch.truncated

    def _encode_texts(self, teacher: int, tokens: list[Tensor]) -> Tensor:
        """Unit rows (texts, D), on the device."""
        encoder = self.encoders[teacher]
        if not tokens:
            return torch.zeros(0, encoder.model.embed_dim, device=encoder.device)
        return encoder.encode_tokens(tokens[self.tokens_of[teacher]], at_once=4 * self.batch_size)

    def tensors(self, work: BlockWork, part: Part, teacher: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """One part of a block that is done, and what its metadata say of it.

        Image rows (n, 1 + views, D), text rows (texts, D) and where each sample's begin; or the views.
        """
        if part == "views":
            return pack_views(work.views, self.preparation.views)
        texts = torch.cat(work.texts[part, teacher])
        if not bool(texts.isfinite().all()):
            raise self._not_finite(teacher, "captions", work)
        values, scale = pack(texts, self.dtype)
        starts = np.concatenate([[0], np.cumsum(work.counts[part])]).astype(np.int64)
        tensors = {"text": values, "text_start": torch.from_numpy(starts)}
        if scale is not None:
            tensors["text_scale"] = scale
        if part == "pairs":
            good = torch.tensor([problem is None for problem in work.problems], dtype=torch.uint8)
            images = torch.cat(work.images[teacher]).reshape(len(good), -1, self.encoders[teacher].model.embed_dim)
            images = images * good.to(images.device)[:, None, None]  # nothing is stored for a picture that was not seen
            if not bool(images.isfinite().all()):
                raise self._not_finite(teacher, "images", work)
            tensors["image"], image_scale = pack(images, self.dtype)
            tensors["valid"] = good
            if image_scale is not None:
                tensors["image_scale"] = image_scale
        return tensors, {}

    def _not_finite(self, teacher: int, what: str, work: BlockWork) -> InputError:
        return InputError(
            f"teacher '{self.encoders[teacher].model.name}' gives NaN or infinite embeddings for {what} of block "
            f"{work.number} (samples from '{self.source.key(work.indices[0])}' on): check its weights, or try "
            "--precision fp32"
        )


class Filling:
    """The state of one process's work."""

    def __init__(
        self,
        config: CacheConfig,
        store: CacheStore,
        source: PairSource,
        encoders: list[Encoder],
        workers: int,
        progress: Callable[[int, int, float], None],
    ) -> None:
        self.config, self.store, self.source = config, store, source
        self.progress, self.workers = progress, workers
        self.claims = Claims(store.folder / "locks")
        self.queue: deque[BlockWork] = deque()
        self.report = FillReport(store)
        self.ledger = BadSampleLedger(
            store.folder / "bad_samples.jsonl", config.data.bad_sample_budget, source.shard_of
        )
        # what earlier processes found counts, so that starting again is no way around the budget
        self.ledger.bad = len(read_ledger(store))
        self.ledger.seen = len(store) - sum(self._size(block) for block in store.missing_blocks())
        manifest = store.manifest
        drawn = (manifest.view_policy, manifest.views, manifest.view_seed)
        self.blocks = BlockEncoder(source, encoders, config.batch_size, manifest.dtype, drawn)
        self.began = time.monotonic()
        self.to_do = 0

    def run(self) -> FillReport:
        """Work until nothing of this process's share is missing, taking over from processes that died."""
        while True:
            missing = self._mine()
            if not missing:
                break
            self.to_do = self.report.samples + sum(self._size(block) for block in missing)
            before = self.report.samples
            self.work_through(missing)
            if self.report.samples == before:
                time.sleep(1.0)  # the rest is claimed by others: wait for them, or for their claims to go stale
        self.report.seconds = time.monotonic() - self.began
        return self.report

    def _mine(self) -> list[int]:
        """The missing blocks of this process's share, beginning at a place of its own so that claims rarely collide."""
        share, of = self.config.share
        missing = [block for block in self.store.missing_blocks() if block % of == share]
        rank, world = int(os.environ.get("RANK", "0")), max(int(os.environ.get("WORLD_SIZE", "1")), 1)
        turn = len(missing) * (rank % world) // world
        return missing[turn:] + missing[:turn]

    def _size(self, block: int) -> int:
        start, stop = self.store.layout.bounds(block)
        return stop - start

    def indices(self, block: int) -> list[int]:
        start, stop = self.store.layout.bounds(block)
        return self.store.samples.in_row_order[start:stop].tolist()

    def work_through(self, missing: list[int]) -> None:
        """Fill these blocks, but for those that others have claimed."""
        with torch.inference_mode():
            for batch in prepared(self.blocks.preparation, self._plan(missing), self.workers):
                work = self.queue[0]
                self.blocks.encode(work, batch)
                self.claims.renew()
                if work.done == len(work.indices):
                    self.finish(work, self.blocks.tensors)
                    self.queue.popleft()
                self.told(self.queue[0].done if self.queue else 0)

    def told(self, begun: int = 0) -> None:
        """Say how far the work is. begun: samples of blocks that are not finished."""
        done = self.report.samples + begun
        self.progress(done, self.to_do, done / max(time.monotonic() - self.began, 1e-9))

    def _plan(self, missing: list[int]) -> Iterator[Sequence[Item]]:
        """Claim one block after the other, just ahead of the work, and cut each into batches."""
        for number in missing:
            if self.store.missing(number) and (work := self.claimed(number)) is not None:
                self.queue.append(work)
                for indices in self.blocks.cut(work.indices):
                    yield self.items(work, indices)

    def claimed(self, number: int) -> BlockWork | None:
        """What a block lacks, when this process may write it; None when another has claimed or finished it."""
        if not self.claims.take(f"{number:06d}"):
            return None
        parts = self.store.missing(number)  # its last owner may have finished it before we got the claim
        if not parts:
            self.claims.give_back(f"{number:06d}")
            return None
        return BlockWork(number, parts, self.indices(number))

    def items(self, work: BlockWork, indices: Sequence[int]) -> list[Item]:
        """What is to be prepared of these samples of a block."""
        kinds = {part for part, _ in work.parts}
        known = self.store.manifest.views > 0 and "views" not in kinds
        return [self._item(i, kinds, known) for i in indices]

    def _item(self, index: int, kinds: set[Part], views_known: bool) -> Item:
        views = None
        if views_known and "pairs" in kinds:
            views = tuple(self.store.view(index, n) for n in range(1, self.store.manifest.views + 1))
        texts: tuple[str, ...] = ()
        if "pairs" in kinds:
            texts = self.source.captions(index)[: int(self.store.samples.captions[index])]
        synthetic = self.store.samples.synthetic(index) if "synthetic" in kinds else ()
        return Item(index, views, bool(kinds & {"pairs", "views"}), texts, synthetic)

    def finish(self, work: BlockWork, tensors: Callable[[BlockWork, Part, int], tuple[dict, dict]]) -> None:
        """Write what the block lacked, give the claim back, record bad samples."""
        store, number = self.store, work.number
        bad = [
            (self.source.key(index), problem)
            for index, problem in zip(work.indices, work.problems)
            if problem is not None
        ]
        for part, teacher in work.parts:
            values, extra = tensors(work, part, teacher)
            if part == "synthetic":
                extra = {"synthetic": store.synthetic_digest(number)}
            write_block(store.path(part, teacher, number), values, store.block_metadata(part, teacher, number) | extra)
        self.claims.give_back(f"{number:06d}")
        self.report.samples += len(work.indices)
        self.report.bad += len(bad)
        self.report.truncated += work.truncated
        self.ledger.record(bad, seen=len(work.indices))


def read_ledger(store: CacheStore) -> list[dict[str, Any]]:
    """The samples whose image could not be read while filling; damaged lines are left out."""
    return [row for row in read_lines(store.folder / "bad_samples.jsonl").values if {"key", "reason"} <= {*row}]
