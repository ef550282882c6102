"""Making a store's manifest and table of samples, or bringing an existing one up to date with its data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.cache.config import CacheConfig
from clipdistill.cache.fingerprint import (
    differences,
    library_versions,
    require_same_teacher,
    require_versions,
    teacher_entry,
    tokenizer_text,
)
from clipdistill.cache.manifest import MANIFEST, DataEntry, Manifest, SyntheticEntry, TeacherEntry, write_manifest
from clipdistill.cache.rows import row_bytes
from clipdistill.cache.samples import SampleTable, find_difference, write_samples
from clipdistill.cache.store import CacheStore
from clipdistill.cache.synthetic import matched, read_synthetic, synthetic_fingerprint
from clipdistill.config import as_dict
from clipdistill.data.pairs import PairSource
from clipdistill.embed.encode import Encoder
from clipdistill.embed.prepare import sample_digest
from clipdistill.errors import InputError
from clipdistill.models import ClipModel
from clipdistill.runtime.files import first_other, make_folder, refuse_links, write_text
from clipdistill.runtime.locks import Claims

_BLOCK_BYTES = 64_000_000
_PATIENCE = 900.0
_PICTURES = 64
"""Pictures whose bytes tell whether a set is still the one that a store was begun with."""


def require_cache_place(folder: Path) -> None:
    """Raise InputError where no cache can be kept: among other files, through links, where nothing can be written."""
    if folder.is_dir():
        other = first_other(folder, ".", "samples-", "samples.arrow", "teacher-", "locks")
        if other and not (folder / MANIFEST).exists():
            raise InputError(f"{folder}: holds other files ('{other}') and no cache; give a new folder")
        refuse_links(folder, "cache")
    make_folder(folder, "cache")


def open_for_filling(
    config: CacheConfig, source: PairSource, encoders: Sequence[Encoder], precision: str
) -> CacheStore:
    """The store in `config.out`: made if it is not there, else checked against the request and grown if the data grew.

    One process at a time does this; the others wait and then find the store. Raises InputError that names the first
    field in which an existing store differs from the request.
    """
    folder = config.out
    require_cache_place(folder)
    teachers = [encoder.model for encoder in encoders]
    named = zip(teachers, config.teachers, encoders, strict=True)
    entries = [teacher_entry(model, name, precision, encoder) for model, name, encoder in named]
    claims = Claims(folder / "locks")
    began = time.monotonic()
    while not claims.take("manifest"):
        if time.monotonic() - began > _PATIENCE:
            raise InputError(f"{folder}: another process has been changing the cache for too long; look at locks/")
        time.sleep(0.1)
    try:
        if (folder / MANIFEST).exists():
            return _update(config, source, entries, teachers)
        return _create(config, source, entries, teachers)
    finally:
        claims.give_back("manifest")


def _create(
    config: CacheConfig, source: PairSource, entries: list[TeacherEntry], teachers: Sequence[ClipModel]
) -> CacheStore:
    folder = config.out
    records = _records(source, config.captions, range(len(source)))
    synthetic = _add_synthetic(records, config.synthetic)
    total = sum(record["captions"] for record in records)
    data = DataEntry(
        name=source.name,
        path=config.data.path,
        fingerprint=source.fingerprint(),
        samples=len(source),
        captions=total,
        pictures=source.images_fingerprint(_PICTURES),
    )
    extra = 0 if synthetic is None else synthetic.captions
    bytes_each = (1 + config.views + (total + extra) / len(source)) * max(
        row_bytes(config.dtype, e.dim) for e in entries
    )
    manifest = Manifest(
        dtype=config.dtype,
        views=config.views,
        view_policy=config.view if config.views else None,
        view_seed=config.view_seed if config.views else 0,
        captions=config.captions,
        block=config.block or block_size(len(source), bytes_each),
        segments=(len(source),),
        samples=write_samples(folder, records),
        data=data,
        synthetic=synthetic,
        teachers=tuple(entries),
        versions=library_versions(config.teachers),
    )
    _write_tokenizers(folder, teachers, range(len(teachers)))
    write_manifest(folder, manifest)
    return CacheStore(folder)


def block_size(samples: int, bytes_each: float) -> int:
    """Samples a block: a power of two from 64 to 4096, at most 64 MB, and some thirty blocks even for small data."""
    size = 4096
    while size > 64 and (size * bytes_each > _BLOCK_BYTES or size > samples / 32):
        size //= 2
    return size


def _update(
    config: CacheConfig, source: PairSource, entries: list[TeacherEntry], teachers: Sequence[ClipModel]
) -> CacheStore:
    """Check the request against the store that is there; add new samples, teachers and captions to it."""
    store = CacheStore(config.out)
    old = store.manifest
    where = f"cache {config.out}"
    requested = {
        "dtype": config.dtype,
        "views": config.views,
        "captions": config.captions,
        "view_policy": as_dict(config.view) if config.views else None,
        "view_seed": config.view_seed if config.views else 0,
    }
    stored = {name: as_dict(old)[name] for name in requested}
    if config.block is not None:
        stored["block"], requested["block"] = old.block, config.block
    changed = next(differences(stored, requested), None)
    if changed is not None:
        raise InputError(f"{where}: {changed}: this was filled with other settings; give the same ones or a new folder")
    require_versions(old, where, config.allow_versions, "--allow-versions")
    for number, entry in enumerate(old.teachers):
        if number >= len(entries):
            raise InputError(f"{where}: teachers: it also holds '{entry.name}'; name it too (in this order)")
        require_same_teacher(entry, entries[number], where)
    manifest = old
    if len(entries) > len(old.teachers):
        # the old entries stay as they are: a teacher may have been moved to another path since
        manifest = manifest.model_copy(update={"teachers": (*old.teachers, *entries[len(old.teachers) :])})
        _write_tokenizers(config.out, teachers, range(len(old.teachers), len(entries)))
    if source.fingerprint() != old.data.fingerprint:
        manifest = _grown(config, manifest, store.samples, source)
    elif old.data.pictures not in (None, source.images_fingerprint(_PICTURES)):
        raise InputError(
            f"{where}: the pictures of {source.name} are not those that it was begun with, under the same names and "
            "captions: bring them back, or give a new folder"
        )
    elif config.synthetic is not None:
        manifest = _with_captions(config, manifest, store.samples)
    if manifest != old:
        write_manifest(config.out, manifest)
    return CacheStore(config.out)


def _grown(config: CacheConfig, manifest: Manifest, table: SampleTable, source: PairSource) -> Manifest:
    """The manifest for data that has all the stored samples, unchanged, and more (or the same in another order)."""
    where = f"cache {config.out}"
    known = {key: index for index, key in enumerate(table.keys())}
    records = _records(source, manifest.captions, np.full(len(source), -1))
    kept = 0
    for record in records:
        index = known.get(record["key"])
        if index is None:
            continue
        if record["digest"] != table.digests[index].tobytes():
            raise InputError(f"{where}: {find_difference(table, source)}: stored samples must stay as they were")
        record["row"], kept = int(table.rows[index]), kept + 1
        record["synthetic"] = list(table.synthetic(index)) or None
    if kept < len(table):
        raise InputError(
            f"{where}: {find_difference(table, source)}: a cache can grow and not lose samples; fill a new one"
        )
    new = [record for record in records if record["row"] < 0]
    for row, record in enumerate(new, len(table)):
        record["row"] = row
    synthetic = manifest.synthetic
    if synthetic is not None:
        if new and config.synthetic is None:
            raise InputError(
                f"{where}: it holds added captions, so the {len(new)} new samples need some: give --synthetic"
            )
        synthetic = _add_synthetic(new, config.synthetic)
        whole = [tuple(record["synthetic"]) for record in records]
        keys = [record["key"] for record in records]
        synthetic = SyntheticEntry(fingerprint=synthetic_fingerprint(keys, whole), captions=sum(map(len, whole)))
    elif config.synthetic is not None:
        synthetic = _add_synthetic(records, config.synthetic)
    data = manifest.data.model_copy(
        update={
            "name": source.name,
            "path": config.data.path,
            "fingerprint": source.fingerprint(),
            "samples": len(records),
            "captions": sum(record["captions"] for record in records),
            "pictures": source.images_fingerprint(_PICTURES),
        }
    )
    segments = (*manifest.segments, len(records)) if new else manifest.segments
    samples = write_samples(config.out, records)
    return manifest.model_copy(update={"data": data, "segments": segments, "samples": samples, "synthetic": synthetic})


def _with_captions(config: CacheConfig, manifest: Manifest, table: SampleTable) -> Manifest:
    """Added captions for a store that has none; those it has must be the same."""
    records = table.records()
    synthetic = _add_synthetic(records, config.synthetic)
    assert synthetic is not None
    if manifest.synthetic is None:
        return manifest.model_copy(update={"synthetic": synthetic, "samples": write_samples(config.out, records)})
    if manifest.synthetic != synthetic:
        raise InputError(
            f"cache {config.out}: synthetic: {config.synthetic} is not the file of captions it was filled with; "
            "give the same one or a new folder"
        )
    return manifest


def _records(source: PairSource, captions: str, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
    """One record of the table of samples for each sample, in the order of the data, without added captions."""
    found = []
    for index in range(len(source)):
        key, texts = source.key(index), source.captions(index)
        found.append(
            {
                "key": key,
                "row": int(rows[index]),
                "captions": min(len(texts), 1) if captions == "first" else len(texts),
                "digest": sample_digest(key, texts),
                "synthetic": None,
            }
        )
    return found


def _add_synthetic(records: list[dict[str, Any]], path: Path | None) -> SyntheticEntry | None:
    if path is None:
        return None
    keys = [record["key"] for record in records]
    captions = matched(read_synthetic(path), keys, path)
    for record, texts in zip(records, captions):
        record["synthetic"] = list(texts)
    fingerprint = synthetic_fingerprint(keys, captions)
    return SyntheticEntry(fingerprint=fingerprint, captions=max(sum(map(len, captions)), 1))


def _write_tokenizers(folder: Path, teachers: Sequence[ClipModel], numbers: range) -> None:
    for number in numbers:
        path = folder / f"teacher-{number}" / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, tokenizer_text(teachers[number]))
