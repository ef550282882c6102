"""Reading a store from end to end: is every byte what was written, and does everything fit together?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clipdistill.cache.blocks import require_whole_table
from clipdistill.cache.fingerprint import text_digest
from clipdistill.cache.store import CacheStore, Part
from clipdistill.cache.synthetic import synthetic_fingerprint
from clipdistill.errors import InputError

_UNIT = 0.02  # how far the length of a stored row may be from 1: bf16 and int8 round it


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
    if starts[0] != 0 or starts[-1] != len(arrays["text"]) or (np.diff(starts) < 0).any():
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
        for name, rows in zip(("image", "text"), store.read(teacher, good, [0] * len(good), views)):
            wrong = ((rows.norm(dim=-1) - 1).abs() > _UNIT).nonzero().flatten().tolist()
            if wrong:
                raise InputError(
                    f"{path}: the {name} row of '{store.samples.key(good[wrong[0]])}' is not of unit length"
                )
    return int((~valid).sum()) if teacher == 0 else 0
