"""The WebDataset form: beside each data tar one of the same name with its samples' embeddings, for streaming.

    OUT/manifest.json                     the store's manifest, kind "clipdistill cache shards"
    OUT/<shard>.tar                       for each sample of the data tar, in its order:
        <sample>.teacher.safetensors      K.image (1 + views, D), K.text (captions, D), K.synthetic_text for teacher K
                                          (int8: also K.image_scale, ...)
        <sample>.teacher.json             valid, views, synthetic (captions), digest of key and captions

`read_shard` goes through one tar from its beginning; `ShardEmbeddings` gives the training loop random access.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from clipdistill.cache.blocks import map_file, require_uncut
from clipdistill.cache.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from clipdistill.cache.rows import scaled
from clipdistill.cache.store import CacheStore
from clipdistill.cache.stored import DescribedEmbeddings
from clipdistill.data.formats.tar_headers import DamagedTar, members
from clipdistill.data.pairs import PairSource
from clipdistill.data.views import View
from clipdistill.errors import InputError
from clipdistill.runtime.files import make_folder, new_file, read_json, require_place

SHARD_KIND = "clipdistill cache shards"
_RECENT = 512  # decoded samples kept: a batch asks for each several times
_END = 1 << 20
_TENSORS, _DESCRIPTION = ".teacher.safetensors", ".teacher.json"


@dataclass(frozen=True)
class ShardSample:
    """One sample of a tar. image (1 + views, D), text (captions, D), synthetic_text: float32, one for each teacher."""

    name: str
    valid: bool
    views: tuple[View, ...]
    image: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    synthetic_text: tuple[Tensor, ...]
    synthetic: tuple[str, ...]


def is_shard_folder(folder: Path) -> bool:
    """Whether a folder holds tars of embeddings."""
    try:
        return read_json(folder / MANIFEST).get("kind") == SHARD_KIND
    except InputError:
        return False


def shard_label(source: PairSource, key: str) -> str:
    """The data tar's name in a sample's key ('<shard>/<sample>'). Raises InputError for data that is not in tars."""
    shard = source.shard_of(key)
    if shard is None:
        raise InputError(f"'{source.name}' does not lie in tars, so there is nothing to write tars beside")
    parts = key.split("/")
    # names of shards and samples may both hold '/': the label is the shortest head that leads to the same shard
    heads = ("/".join(parts[:n]) for n in range(1, len(parts)))
    return next(head for head in heads if source.shard_of(f"{head}/x") == shard)


def export_shards(store: CacheStore, source: PairSource, out: Path) -> list[Path]:
    """Write the tars of a complete store whose data lies in tars. Each appears whole; those that exist are replaced."""
    store.require_complete()
    groups: dict[str, list[int]] = {}
    for index in range(len(source)):
        groups.setdefault(shard_label(source, source.key(index)), []).append(index)
    make_folder(out, "tars of embeddings")
    places = {label: out / f"{label}.tar" for label in groups}
    for path in places.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        require_place(path, "embeddings", (_TENSORS.encode(),))  # the data's own tars have these names
    written = []
    for label, indices in groups.items():
        path = places[label]
        with new_file(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for index in indices:
                stem = source.key(index)[len(label) + 1 :]
                tensors, described = safetensors.torch.save(_tensors(store, index)), _describe(store, index)
                described["crc32"] = _checksum(tensors, described)
                _add(tar, stem + _TENSORS, tensors)
                _add(tar, stem + _DESCRIPTION, json.dumps(described, ensure_ascii=False).encode())
        written.append(path)
    write_manifest(out, store.manifest.model_copy(update={"kind": SHARD_KIND}))
    return written


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _checksum(tensors: bytes, described: dict[str, Any]) -> str:
    """CRC-32 of both members of a sample, the description without this field."""
    return f"{zlib.crc32(json.dumps(described, sort_keys=True).encode(), zlib.crc32(tensors)):08x}"


def _tensors(store: CacheStore, index: int) -> dict[str, Tensor]:
    """The stored values of one sample, exactly as they are in the blocks."""
    found: dict[str, Tensor] = {}
    for teacher in range(len(store.dims)):
        for name, rows in store.stored("pairs", teacher, index).items():
            if name != "valid":
                found[f"{teacher}.{name}"] = rows[0] if name.startswith("image") else rows
        if store.has_synthetic:
            for name, rows in store.stored("synthetic", teacher, index).items():
                found[f"{teacher}.synthetic_{name}"] = rows
    return found


def _describe(store: CacheStore, index: int) -> dict[str, Any]:
    return {
        "valid": store.valid(index),
        "views": [store.view(index, number).to_json() for number in range(1, store.view_count + 1)],
        "synthetic": list(store.synthetic(index)),
        "digest": store.samples.digests[index].tobytes().hex(),
    }


def _decode(name: str, tensors: bytes, description: bytes, teachers: int, where: str) -> ShardSample:
    try:
        values = safetensors.torch.load(tensors)
        described = json.loads(description)
        checksum = described.pop("crc32", None)  # missing in tars of earlier versions
        if checksum is not None and checksum != _checksum(tensors, described):
            raise ValueError("its checksum does not match its content")

        def rows(what: str) -> tuple[Tensor, ...]:
            found = []
            for teacher in range(teachers):
                row = values[f"{teacher}.{what}"].float()
                scale = values.get(f"{teacher}.{what}_scale")
                found.append(row if scale is None else scaled(row, scale))
            return tuple(found)

        return ShardSample(
            name=name,
            valid=bool(described["valid"]),
            views=tuple(View.from_json(view) for view in described["views"]),
            image=rows("image"),
            text=rows("text"),
            synthetic_text=rows("synthetic_text") if "0.synthetic_text" in values else (),
            synthetic=tuple(str(caption) for caption in described["synthetic"]),
        )
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: '{name}' is damaged ({error!r}): export the shard again") from error


def read_shard(path: Path) -> Iterator[ShardSample]:
    """The samples of one tar in order, reading forward only. Raises InputError for a damaged tar."""
    manifest = _manifest_above(path)
    waiting: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                if not member.isreg():
                    continue  # links are not followed
                content = tar.extractfile(member)
                assert content is not None
                if member.name.endswith(_TENSORS):
                    waiting = {member.name.removesuffix(_TENSORS): content.read()}
                elif (name := member.name.removesuffix(_DESCRIPTION)) in waiting:
                    yield _decode(name, waiting.pop(name), content.read(), len(manifest.teachers), str(path))
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{path}: not readable as a tar of embeddings ({error})") from error


def _manifest_above(path: Path) -> Manifest:
    folder = next((parent for parent in path.parents if is_shard_folder(parent)), None)
    if folder is None:
        raise InputError(f"{path}: no {MANIFEST} of tars of embeddings in its folder or above")
    return read_manifest(folder, SHARD_KIND)


class ShardEmbeddings(DescribedEmbeddings):
    """Random access to the tars beside the data tars of `source` (stored.StoredEmbeddings). Picklable."""

    def __init__(self, folder: Path, source: PairSource) -> None:
        self.folder = folder
        super().__init__(read_manifest(folder, SHARD_KIND))
        if source.fingerprint() != self.manifest.data.fingerprint:
            raise InputError(
                f"{folder}: data: the tars were written for '{self.manifest.data.name}' with other keys, order "
                f"or captions than '{source.name}': export them again"
            )
        self._shards: list[str] = []
        found: list[tuple[int, int, int, int, int]] = []
        known: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {}
        for index in range(len(source)):
            key = source.key(index)
            label = shard_label(source, key)
            if label not in known:
                known[label] = (len(self._shards), _index(folder / f"{label}.tar"))
                self._shards.append(str(folder / f"{label}.tar"))
            number, places = known[label]
            stem = key[len(label) + 1 :]
            try:
                found.append((number, *places[stem + _TENSORS], *places[stem + _DESCRIPTION]))
            except KeyError:
                raise InputError(
                    f"{folder / label}.tar: data keys: no embeddings for '{key}': export the shard again"
                ) from None
        self._places = np.asarray(found, dtype=np.int64).reshape(-1, 5)  # shard, then offset and size of both members
        self._maps: dict[int, mmap.mmap] = {}
        self._recent: dict[int, ShardSample] = {}

    def contents(self) -> list[Any]:
        """Size and ends of every tar: these have no checksums."""
        found = []
        for shard in self._shards:
            with Path(shard).open("rb") as file:
                size, first = os.fstat(file.fileno()).st_size, file.read(_END)
                file.seek(max(size - _END, 0))
                found.append([size, hashlib.sha256(first + file.read()).hexdigest()])
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_recent": {}}

    def __len__(self) -> int:
        return len(self._places)

    def sample(self, index: int) -> ShardSample:
        """Everything stored for one sample."""
        if index not in self._recent:
            shard, *places = self._places[index].tolist()
            if shard not in self._maps:
                self._maps[shard] = map_file(Path(self._shards[shard]))
            content = self._maps[shard]
            require_uncut(content, self._shards[shard])
            tensors, described = (content[places[i] : places[i] + places[i + 1]] for i in (0, 2))
            if len(self._recent) >= _RECENT:
                self._recent.clear()
            self._recent[index] = _decode(str(index), tensors, described, len(self.dims), self._shards[shard])
        return self._recent[index]

    def valid(self, index: int) -> bool:
        return self.sample(index).valid

    def view(self, index: int, number: int) -> View:
        return View() if number == 0 else self.sample(index).views[number - 1]

    def synthetic(self, index: int) -> tuple[str, ...]:
        return self.sample(index).synthetic

    def read(
        self, teacher: int, indices: Sequence[int], captions: Sequence[int], views: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        if not len(indices):
            return torch.zeros(0, self.dims[teacher]), torch.zeros(0, self.dims[teacher])
        none = torch.zeros(self.dims[teacher])
        rows = [
            (
                self.sample(index).image[teacher][view],
                none if caption < 0 else self.sample(index).text[teacher][caption],
            )
            for index, caption, view in zip(indices, captions, views, strict=True)
        ]
        return torch.stack([image for image, _ in rows]), torch.stack([text for _, text in rows])

    def read_synthetic(self, teacher: int, indices: Sequence[int], captions: Sequence[int]) -> Tensor:
        if not len(indices):
            return torch.zeros(0, self.dims[teacher])
        pairs = zip(indices, captions, strict=True)
        return torch.stack([self.sample(index).synthetic_text[teacher][caption] for index, caption in pairs])


def _index(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of every member."""
    try:
        with path.open("rb") as file:
            return {member.name: (member.offset, member.size) for member in members(file, path.stat().st_size)}
    except FileNotFoundError:
        raise InputError(f"{path}: the tar of embeddings is missing: export the cache again") from None
    except (OSError, DamagedTar) as error:
        raise InputError(f"{path}: not readable as a tar of embeddings ({error}): export the shard again") from error
