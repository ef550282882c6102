"""`teacher=cache:PATH`: a teacher during training whose embeddings come with the batch, with no model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from clipdistill.cache.blocks import CACHE_REMEDY
from clipdistill.cache.check import check_store, require_data
from clipdistill.cache.fingerprint import text_digest
from clipdistill.cache.manifest import MANIFEST, TeacherEntry
from clipdistill.cache.names import PREFIX
from clipdistill.cache.plain import SUFFIXES, PlainEmbeddings
from clipdistill.cache.store import CacheStore
from clipdistill.cache.stored import DescribedEmbeddings, StoredEmbeddings, StoredRows, pick_views
from clipdistill.cache.tars import ShardEmbeddings, is_shard_folder
from clipdistill.data.loader import Batch
from clipdistill.data.pairs import PairSource
from clipdistill.errors import InputError, nearest
from clipdistill.models import Tokenizer
from clipdistill.models.tokenizers import tokenizer_from_dict
from clipdistill.objective import Embeddings
from clipdistill.runtime.files import digest_of, read_json


@dataclass(frozen=True)
class CacheUse:
    """How a run wants to use a cache; see TrainConfig for the meaning. random_policy: the recipe draws random views."""

    views: Literal["auto", "live", "fixed", "stored"] = "auto"
    caption: Literal["random", "first"] = "random"
    random_policy: bool = False
    logit_scale: float | Sequence[float] | None = None
    samples: int = 32
    allow_versions: bool = False


@dataclass(eq=False)
class CachedTeacher:
    """The teacher of the training loop (train.teacher.Teacher) over stored embeddings."""

    name: str
    embeddings: StoredEmbeddings
    stored: StoredRows
    scales: list[float]
    device: torch.device
    tokenizer: Tokenizer | None
    notes: list[str]
    model = None  # nothing to render or tokenise for

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(self.embeddings.dims[number] for number in self.stored.teachers)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of what this teacher serves; cheap. A run that goes on compares it."""
        served = {"scales": self.scales, "teachers": list(self.stored.teachers)}
        return digest_of({"embeddings": self.embeddings.fingerprint(), **served})

    def __call__(self, batch: Batch) -> Embeddings:
        """The stored rows that the loader read for this batch: (B, sum of D_k) each."""
        assert batch.stored is not None, "the loader was not told of the stored teacher"
        rows = {name: values.to(self.device, non_blocking=True) for name, values in batch.stored.items()}
        single = len(self.scales) == 1
        scale = torch.tensor(self.scales[0] if single else self.scales, device=self.device)
        return Embeddings(
            rows["image"],
            rows["text"],
            scale,
            synthetic_text=rows.get("synthetic_text"),
            blocks=None if single else self.blocks,
        )


def open_cached_teacher(
    name: str, source: PairSource, device: torch.device, use: CacheUse, *, check: bool = True
) -> CachedTeacher:
    """The teacher `cache:PATH` for training on `source`: a store, tars beside data tars, or a table of vectors.

    `cache:PATH?teacher=NAME` takes one member of a stored ensemble (its name or number). check: compare blocks,
    versions and a sample of embeddings too (one rank is enough). Raises InputError when it does not fit.
    """
    text, _, choice = name.removeprefix(PREFIX).partition("?teacher=")
    path = Path(text).expanduser()
    if path.suffix in SUFFIXES:
        return _plain(path, source, device, use)
    if not path.exists():
        raise InputError(f"teacher '{name}': {path} does not exist; fill it with `clipdistill cache`")
    if is_shard_folder(path):
        shards = ShardEmbeddings(path, source)
        notes = [f"cache: tars beside data tars in {path}, {len(shards)} samples; embeddings not computed again"]
        return _assemble(shards, choice, use, device, path, None, notes)
    if not (path / MANIFEST).exists():
        raise InputError(
            f"teacher '{name}': {path} holds no {MANIFEST}, so it is no cache; fill it with `clipdistill cache`"
        )
    store = CacheStore(path)
    require_data(store, source)
    store.require_complete()
    notes = check_store(store, source, device, use.samples, use.allow_versions) if check else []
    tokenizer = path / "teacher-0" / "tokenizer.json"
    values = read_json(tokenizer, CACHE_REMEDY) if tokenizer.exists() else None
    manifest = store.manifest
    if values is not None and text_digest(tokenizer.read_text(encoding="utf-8")) != manifest.teachers[0].tokenizer:
        raise InputError(f"{tokenizer}: tokenizer: not the one of the manifest: {CACHE_REMEDY}")
    return _assemble(store, choice, use, device, path, values, notes)


def _assemble(
    embeddings: DescribedEmbeddings,
    choice: str,
    use: CacheUse,
    device: torch.device,
    path: Path,
    tokenizer: dict | None,
    notes: list[str],
) -> CachedTeacher:
    entries = embeddings.manifest.teachers
    if embeddings.manifest.captions == "first" and use.caption != "first":
        raise InputError(f"cache {path}: it holds each image's first caption only: set train.caption=first")
    numbers = _chosen(entries, choice, path)
    name, scales = " + ".join(entries[n].name for n in numbers), [entries[n].logit_scale for n in numbers]
    return _teacher(name, embeddings, numbers, scales, use, device, tokenizer, notes)


def _plain(path: Path, source: PairSource, device: torch.device, use: CacheUse) -> CachedTeacher:
    embeddings = PlainEmbeddings(path)
    embeddings.match(source, use.caption)
    notes = [f"cache: {path}, {len(embeddings.keys)} embeddings matched by key; they cannot be computed again here"]
    return _teacher(path.stem, embeddings, (0,), [embeddings.logit_scale], use, device, None, notes)


def _teacher(
    name: str,
    embeddings: StoredEmbeddings,
    numbers: tuple[int, ...],
    scales: list[float],
    use: CacheUse,
    device: torch.device,
    tokenizer: dict | None,
    notes: list[str],
) -> CachedTeacher:
    views, note = pick_views(use.views, embeddings.view_count, use.random_policy)
    return CachedTeacher(
        name=name,
        embeddings=embeddings,
        stored=StoredRows(embeddings, views, numbers),
        scales=_scales(scales, use.logit_scale),
        device=device,
        tokenizer=None if tokenizer is None else tokenizer_from_dict(tokenizer),
        notes=notes + ([note] if note else []),
    )


def _chosen(entries: Sequence[TeacherEntry], choice: str, path: Path) -> tuple[int, ...]:
    if not choice:
        return tuple(range(len(entries)))
    names = [entry.name for entry in entries]
    if choice in names:
        return (names.index(choice),)
    if choice.isdecimal() and int(choice) < len(entries):
        return (int(choice),)
    raise InputError(f"cache {path}: it holds no teacher '{choice}'{nearest(choice, names)}")


def _scales(own: list[float], given: float | Sequence[float] | None) -> list[float]:
    if given is None:
        return own
    if isinstance(given, int | float):
        return [float(given)] * len(own)
    if len(given) != len(own):
        raise InputError(f"train.teacher_logit_scale: {len(given)} values for {len(own)} stored teachers")
    return [float(scale) for scale in given]
