"""Several stores into one: shares of the same data filled on different machines, or stores of different data."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipdistill.cache.blocks import write_block
from clipdistill.cache.fingerprint import differences
from clipdistill.cache.manifest import Manifest, SyntheticEntry, TeacherEntry, write_manifest
from clipdistill.cache.samples import write_samples
from clipdistill.cache.sizes import check_space
from clipdistill.cache.store import CacheStore
from clipdistill.cache.stored_views import pack_views
from clipdistill.cache.synthetic import synthetic_fingerprint
from clipdistill.config import as_dict
from clipdistill.errors import InputError
from clipdistill.runtime.files import new_folder

_OWN = ("segments", "samples", "data", "synthetic", "block")


def merge(out: Path, folders: Sequence[Path]) -> CacheStore:
    """Write the store `out` from others with the same teachers and settings.

    Shares of the same data (equal fingerprints) are put together block by block. Stores of different data must be
    complete and share no key; their samples follow each other, so that the result fits the data sets joined in this
    order. Raises InputError that names the field in which two stores differ.
    """
    if len(folders) < 2:
        raise InputError("merge: name the folder to write and at least two caches to read")
    stores = [CacheStore(folder) for folder in folders]
    first = stores[0]
    for store in stores[1:]:
        pair = (_settings(first.manifest), _settings(store.manifest))
        changed = next(differences(*pair), None)
        if changed is not None or (first.manifest.synthetic is None) != (store.manifest.synthetic is None):
            raise InputError(f"merge: {first.folder} and {store.folder} differ in {changed or 'synthetic captions'}")
    same = all(s.manifest.data.fingerprint == first.manifest.data.fingerprint for s in stores[1:])
    with new_folder(out, lambda _: False, "merged cache") as folder:  # a kill leaves nothing under the name
        check_space(folder, sum(int(s.manifest.pair_bytes() * len(s)) for s in stores), out)
        (_join_shares if same else _append)(folder, stores)
    return CacheStore(out)


def _settings(manifest: Manifest) -> dict[str, Any]:
    values = {name: value for name, value in as_dict(manifest).items() if name not in _OWN}
    values["teachers"] = {str(n): teacher.identity() for n, teacher in enumerate(manifest.teachers)}
    return values


def _teachers(stores: list[CacheStore]) -> tuple[TeacherEntry, ...]:
    """The first store's, with the engines of all ("openvino + torch") and the least agreement."""
    found = []
    for own in zip(*(store.manifest.teachers for store in stores), strict=True):
        towers = sorted({tower for entry in own for tower in (*entry.engines, *entry.agreement)})
        names = {tower: sorted({entry.engines.get(tower, "torch") for entry in own}) for tower in towers}
        cosines = {tower: [entry.agreement[tower] for entry in own if tower in entry.agreement] for tower in towers}
        engines = {tower: " + ".join(several) for tower, several in names.items() if several != ["torch"]}
        agreement = {tower: min(values) for tower, values in cosines.items() if values}
        found.append(own[0].model_copy(update={"engines": engines, "agreement": agreement}))
    return tuple(found)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _copy_tokenizers(out: Path, store: CacheStore) -> None:
    for number in range(len(store.dims)):
        _copy(store.folder / f"teacher-{number}" / "tokenizer.json", out / f"teacher-{number}" / "tokenizer.json")


def _join_shares(out: Path, stores: list[CacheStore]) -> None:
    first = stores[0]
    if len({store.manifest.data.pictures for store in stores} - {None}) > 1:
        raise InputError("merge: the shares were filled from other pictures under the same names and captions")
    for store in stores[1:]:
        if store.layout != first.layout or store.manifest.samples != first.manifest.samples:
            raise InputError(
                f"merge: {first.folder} and {store.folder} cut the same data into blocks differently: fill the "
                "shares with the same --block"
            )
    _copy_tokenizers(out, first)
    for part, teacher in first.parts():
        for block in range(len(first.layout)):
            holder = next((s for s in stores if s.path(part, teacher, block).exists()), None)
            if holder is not None:  # what no share has yet can be filled later
                holder.block(part, teacher, block).verify()
                _copy(
                    holder.path(part, teacher, block),
                    out / holder.path(part, teacher, block).relative_to(holder.folder),
                )
    _copy(first.folder / first.manifest.samples, out / first.manifest.samples)
    write_manifest(out, first.manifest.model_copy(update={"teachers": _teachers(stores)}))


def _append(out: Path, stores: list[CacheStore]) -> None:
    """Blocks are made anew from rows, so that only the last of each store's may be short."""
    records: list[dict[str, Any]] = []
    seen: dict[str, Path] = {}
    fingerprints = []
    for store in stores:
        store.require_complete()
        if store.manifest.data.fingerprint in fingerprints:
            raise InputError(f"merge: {store.folder} holds the same data as another of the caches")
        fingerprints.append(store.manifest.data.fingerprint)
        offset = len(records)
        for record in store.samples.records():
            if record["key"] in seen:
                raise InputError(
                    f"merge: the key '{record['key']}' is in {seen[record['key']]} and in {store.folder}; "
                    "keys must differ"
                )
            seen[record["key"]] = store.folder
            records.append({**record, "row": record["row"] + offset})
    first = stores[0].manifest
    synthetic = None
    if first.synthetic is not None:
        captions = [tuple(record["synthetic"]) for record in records]
        synthetic = SyntheticEntry(
            fingerprint=synthetic_fingerprint([r["key"] for r in records], captions), captions=sum(map(len, captions))
        )
    ends: list[int] = []
    for store in stores:
        ends.append((ends[-1] if ends else 0) + len(store))
    data = first.data.model_copy(
        update={
            "name": " + ".join(s.manifest.data.name for s in stores),
            "path": ",".join(s.manifest.data.path for s in stores),
            # stands for the joined data until that is opened itself and compared sample by sample
            "fingerprint": "+".join(fingerprints),
            "samples": len(records),
            "captions": sum(record["captions"] for record in records),
            "pictures": None,
        }
    )
    manifest = first.model_copy(
        update={
            "segments": tuple(ends),
            "samples": write_samples(out, records),
            "data": data,
            "synthetic": synthetic,
            "teachers": _teachers(stores),
        }
    )
    _copy_tokenizers(out, stores[0])
    write_manifest(out, manifest)
    merged = CacheStore(out)
    for number in range(len(merged.layout)):
        begin, end = merged.layout.bounds(number)
        which = next(n for n, stop in enumerate(ends) if begin < stop)
        store, offset = stores[which], ends[which] - len(stores[which])
        rows = store.samples.in_row_order[begin - offset : end - offset].tolist()
        for part, teacher in merged.parts():
            metadata = merged.block_metadata(part, teacher, number)
            if part == "views":
                count = merged.manifest.views
                tensors, extra = pack_views([[store.view(i, n) for n in range(1, count + 1)] for i in rows], count)
                metadata |= extra
            else:
                tensors = _rows(store, part, teacher, rows)
                if part == "synthetic":
                    metadata["synthetic"] = merged.synthetic_digest(number)
            write_block(merged.path(part, teacher, number), tensors, metadata)


def _rows(store: CacheStore, part: Any, teacher: int, indices: list[int]) -> dict[str, Tensor]:
    """The stored values of some samples as the tensors of a block."""
    samples = [store.stored(part, teacher, index) for index in indices]
    tensors = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
    counts = [0, *(len(sample["text"]) for sample in samples)]
    return tensors | {"text_start": torch.tensor(counts, dtype=torch.int64).cumsum(0)}
