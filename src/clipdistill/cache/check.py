"""Does a store belong to this data, this teacher and this machine (asked before step 0), and is it whole (`verify`)?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from clipdistill.cache.blocks import require_whole_table
from clipdistill.cache.fingerprint import require_same_teacher, require_versions, teacher_entry, text_digest
from clipdistill.cache.rows import COSINE_FLOOR
from clipdistill.cache.samples import find_difference
from clipdistill.cache.store import CacheStore, Part
from clipdistill.cache.synthetic import synthetic_fingerprint
from clipdistill.data.pairs import BadSample, PairSource
from clipdistill.data.views import render
from clipdistill.embed.encode import Encoder
from clipdistill.errors import InputError
from clipdistill.models import load_model
from clipdistill.runtime.console import file_size

_BF16_FLOOR = 0.998
"""A bf16 forward pass differs between processors by more than the number formats round."""
CHECKED_BYTES = 4_000_000_000
"""Blocks up to this size together are read and compared with their checksums at every start (a few seconds)."""
_SEED = 0
_UNIT = 0.02  # how far the length of a stored row may be from 1: bf16 and int8 round it


def require_data(store: CacheStore, source: PairSource) -> None:
    """Raises InputError that names what differs unless keys, order and captions are those of the store."""
    if source.fingerprint() == store.manifest.data.fingerprint:
        return
    difference = find_difference(store.samples, source)
    if difference is None:  # a merged store knows its samples one by one only
        return
    raise InputError(
        f"cache {store.folder}: {difference}: it was filled from other data than '{source.name}'; run "
        "`clipdistill cache` with this data to bring it up to date (only new samples are computed), or fill another"
    )


def check_store(
    store: CacheStore, source: PairSource, device: torch.device, samples: int, allow_versions: bool
) -> list[str]:
    """Fields of every block, library versions, and `samples` embeddings computed again where the teacher is at hand.

    Returns sentences on what was found; raises InputError when the store is wrong.
    """
    where = f"cache {store.folder}"
    size = store.require_fields()
    require_versions(store.manifest, where, allow_versions, "train.cache_allow_versions=true")
    notes = []
    if size <= CHECKED_BYTES:
        store.verify_blocks()
    else:
        notes.append(
            f"cache: {file_size(size)} were not compared with their checksums; `clipdistill cache verify` does it"
        )
    if samples:
        notes += [_recompute(store, source, number, device, samples) for number in range(len(store.dims))]
    return notes


def _recompute(store: CacheStore, source: PairSource, number: int, device: torch.device, samples: int) -> str:
    entry = store.manifest.teachers[number]
    where = f"cache {store.folder}"
    try:
        with only_local_files():
            model = load_model(entry.name, teacher=True)
    except InputError as error:
        return (
            f"cache: teacher '{entry.name}' is not on this machine, so its embeddings were not computed again ({error})"
        )
    require_same_teacher(entry, teacher_entry(model, entry.name, entry.precision), where)
    model.module.requires_grad_(False).eval().to(device)
    encoder = Encoder(model, device=device, dtype=entry.precision)
    worst, count = 1.0, 0
    for index, view, caption, synthetic in _probes(store, samples):
        try:
            image = source.image(index)
        except BadSample:
            continue
        texts = list(source.captions(index)[caption:][:1])
        stored = [*store.read(number, [index], [caption], [view])][: 1 + len(texts)]
        if synthetic is not None:
            texts.append(store.synthetic(index)[synthetic])
            stored.append(store.read_synthetic(number, [index], [synthetic]))
        image_row = encoder.encode_images(render(image, store.view(index, view), model.image)[None]).cpu()
        found = [image_row, *(encoder.encode_tokens(model.tokenizer(texts)).cpu().split(1) if texts else ())]
        for what, a, b in zip(("image", "caption", "added caption"), found, stored):
            cosine = float(torch.nn.functional.cosine_similarity(a, b).item())
            floor = COSINE_FLOOR[store.manifest.dtype] if entry.precision == "fp32" else _BF16_FLOOR
            if not cosine >= floor:
                raise InputError(
                    f"{where}: teacher '{entry.name}' now gives another embedding for the {what} of "
                    f"'{source.key(index)}' (view {view}): cosine {cosine:.4f} with the stored one, at least {floor} "
                    "expected: the images have changed or the cache is wrong; fill it again"
                )
            worst = min(worst, cosine)
        count += 1
    return f"cache: {count} embeddings of '{entry.name}' computed again, least cosine {worst:.5f}"


def _probes(store: CacheStore, samples: int) -> Iterator[tuple[int, int, int, int | None]]:
    """(sample, view, caption, added caption) spread over the store, the same every time; every stored view is met."""
    rng = np.random.default_rng(_SEED)
    chosen = np.linspace(0, len(store) - 1, num=min(samples, len(store))).round().astype(int)
    for order, index in enumerate(np.unique(chosen).tolist()):
        if store.valid(index):
            captions = int(store.samples.captions[index])
            caption = int(rng.integers(captions)) if captions else -1
            added = len(store.synthetic(index)) if store.has_synthetic else 0
            yield index, order % (1 + store.view_count), caption, int(rng.integers(added)) if added else None


@contextmanager
def only_local_files() -> Iterator[None]:
    """While open, nothing is fetched from the network: a teacher that is not here is simply not compared."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


@dataclass
class VerifyReport:
    """What was found. `problems` are sentences; `missing` blocks are not an error of what is there."""

    blocks: int = 0
    missing: int = 0
    bytes: int = 0
    invalid_samples: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.problems and not self.missing


def verify(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> VerifyReport:
    """Check the table of samples, the tokenizers and every byte of every block of the store in `folder`.

    Raises InputError only when there is no store to check; everything else is listed in the report.
    """
    store = CacheStore(folder, whole_table=False)  # a damaged one is listed with the rest
    report = VerifyReport()
    _check_tables(store, report)
    work = [(part, teacher, block) for part, teacher in store.parts() for block in range(len(store.layout))]
    for done, (part, teacher, number) in enumerate(work, 1):
        path = store.path(part, teacher, number)
        if not path.exists():
            report.missing += 1
        else:
            try:
                report.bytes += path.stat().st_size
                report.invalid_samples += _check_block(store, part, teacher, number)
            except InputError as error:
                report.problems.append(str(error))
        report.blocks += 1
        progress(done, len(work))
    return report


def _check_tables(store: CacheStore, report: VerifyReport) -> None:
    path = store.samples.path
    try:
        require_whole_table(path)
    except InputError as error:
        report.problems.append(str(error))
    rows = np.sort(store.samples.rows)
    if not np.array_equal(rows, np.arange(len(rows))):
        report.problems.append(f"{path}: damaged: its rows are not 0 to {len(rows) - 1}")
    synthetic = store.manifest.synthetic
    if synthetic is not None:
        keys = store.samples.keys()
        captions = (store.samples.synthetic(index) for index in range(len(keys)))
        if synthetic_fingerprint(keys, captions) != synthetic.fingerprint:
            report.problems.append(f"{path}: synthetic: the added captions are not those of the manifest")
    for number, entry in enumerate(store.manifest.teachers):
        tokenizer = store.folder / f"teacher-{number}" / "tokenizer.json"
        found = tokenizer.read_text(encoding="utf-8") if tokenizer.exists() else ""
        if text_digest(found) != entry.tokenizer:
            report.problems.append(f"{tokenizer}: tokenizer: missing, or not the one of the manifest")


def _check_block(store: CacheStore, part: Part, teacher: int, number: int) -> int:
    """Raises InputError for a bad block; returns how many of its samples hold no image."""
    block = store.block(part, teacher, number)
    block.verify()
    path = store.path(part, teacher, number)
    if part == "views":
        return 0
    arrays = block.arrays
    starts = arrays["text_start"]
    if starts[0] != 0 or starts[-1] != len(arrays["text"]) or (starts[1:] < starts[:-1]).any():
        raise InputError(f"{path}: 'text_start' does not rise from 0 to {len(arrays['text'])}")
    if part == "synthetic":
        if block.metadata.get("synthetic") != store.synthetic_digest(number):
            raise InputError(f"{path}: synthetic: the block belongs to other added captions")
        return 0
    first, last = store.layout.bounds(number)
    indices = store.samples.in_row_order[first:last]
    if not np.array_equal(np.diff(starts), store.samples.captions[indices]):
        raise InputError(f"{path}: captions: their numbers are not those of the table of samples")
    valid = arrays["valid"].astype(bool)
    good = indices[valid].tolist()
    if good:
        views = [number % (1 + store.view_count) for number in range(len(good))]
        firsts = np.minimum(store.samples.captions[good], 1) - 1  # -1 for a picture without captions
        for name, rows in zip(("image", "text"), store.read(teacher, good, firsts.tolist(), views)):
            off = (rows.norm(dim=-1) - 1).abs() > _UNIT
            wrong = (off & torch.from_numpy((firsts == 0) | (name == "image"))).nonzero().flatten().tolist()
            if wrong:
                raise InputError(
                    f"{path}: the {name} row of '{store.samples.key(good[wrong[0]])}' is not of unit length"
                )
    return int((~valid).sum()) if teacher == 0 else 0
