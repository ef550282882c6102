"""WebDataset shards (img2dataset's layout) with random access: indexed once, read by offset, nothing ever extracted.

A shard that is no tar, or is cut, is counted under its name; its whole samples are used. Several shards are given as a
folder or a brace pattern ('cc3m/{00000..00331}.tar').
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.data.files import IMAGE_SUFFIXES, is_url, nothing_usable
from clipdistill.data.formats import Place
from clipdistill.data.formats.forms import shards_of
from clipdistill.data.formats.tar_index import DUPLICATE, ShardIndex, index_shard
from clipdistill.data.pairs import DataConfig, GrowingStrings, IndexedPairs, Strings, narrow
from clipdistill.data.problems import BadSample, Problems, valid_text
from clipdistill.errors import InputError
from clipdistill.runtime.machine import return_freed_memory

_OPEN_FILES = 64  # per process
_log = logging.getLogger(__name__)


class TarPairs(IndexedPairs):
    """Pairs inside tar shards; keys are '<shard>/<sample>'. Safe in forked and spawned workers and in threads."""

    def __init__(
        self,
        name: str,
        shards: Sequence[Path],
        labels: Sequence[str],
        indexes: Iterable[ShardIndex],
        problems: Problems,
        max_pixels: int,
    ) -> None:
        keys, captions, numbers = GrowingStrings(), GrowingStrings(), []
        for label, index in zip(labels, indexes):
            problems.merge(index.problems)
            keys.add(Strings.pack(f"{label}/{stem}" for stem in index.stems))
            captions.add(index.captions)
            numbers.append([narrow(each) for each in (index.offsets, index.sizes, index.counts)])
        self._ends = np.cumsum([len(offsets) for offsets, _, _ in numbers])
        self._offset, self._size, counts = (np.concatenate(each) for each in zip(*numbers))
        del numbers, index
        super().__init__(name, keys.whole(), (captions.whole(), counts), problems, max_pixels)
        self._shards: list[Any] = [path if is_url(path) else str(path) for path in shards]
        self._labels = {label: str(path) for label, path in zip(labels, shards)}
        self._lengths = [path.stat().st_size for path in shards]
        self._forget_files()

    def _forget_files(self) -> None:
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_files", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_files()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def shard_of(self, key: str) -> str | None:
        # labels may hold '/' themselves: the longest one that fits is the shard
        parts = key.split("/")
        heads = ("/".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        return next((self._labels[head] for head in heads if head in self._labels), None)

    def image_bytes(self, i: int) -> bytes:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard, size = int(np.searchsorted(self._ends, i, side="right")), int(self._size[i])
        if is_url(self._shards[shard]):
            return self._shards[shard].read_range(int(self._offset[i]), size)
        try:
            data = self._read(shard, int(self._offset[i]), size)
        except OSError as error:
            raise BadSample(f"unreadable shard: {self._shards[shard]}: {error.strerror or error}") from error
        if len(data) < size:
            raise BadSample(f"unreadable shard: {self._shards[shard]} is shorter than when it was indexed")
        return data

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        # held while reading, so that no other thread closes the file as the oldest; a read of one image is short
        with self._lock:
            descriptor = self._files.get(shard)
            if descriptor is None:
                descriptor = self._open(shard)
            else:
                self._files.move_to_end(shard)
            # pread has no position that forked processes could share
            return os.pread(descriptor, size, offset)

    def _open(self, shard: int) -> int:
        descriptor = os.open(self._shards[shard], os.O_RDONLY)
        if os.fstat(descriptor).st_size != self._lengths[shard]:
            os.close(descriptor)
            raise OSError("its size changed since it was indexed")
        self._files[shard] = descriptor
        if len(self._files) > _OPEN_FILES:
            _, oldest = self._files.popitem(last=False)
            os.close(oldest)
        return descriptor


def open_tars(place: Place, config: DataConfig, default_split: str | None) -> TarPairs:
    """The pairs of these shards in their order. InputError when a shard is missing or none holds a usable pair."""
    shards = shards_of(place)
    if place.is_folder:
        name = place.path.resolve().name
    elif place.there:
        name = place.path.stem
    else:
        name = place.path.name if is_url(place.path) or Path(place).parent == Path() else str(place)
    if config.split not in (None, "all"):
        raise InputError(f"tars have no splits: leave split='{config.split}' out and name the shards of that split")
    column = (
        None
        if config.caption_column == DataConfig.model_fields["caption_column"].default
        else config.caption_column or ""
    )
    run: Any = shards[0].in_parallel if is_url(shards[0]) else map  # type: ignore[attr-defined]
    missing = [path for path, there in zip(shards, run(type(shards[0]).is_file, shards)) if not there]
    if missing:
        raise InputError(f"{len(missing)} of {len(shards)} shards do not exist, the first is '{missing[0]}'")
    labels = shard_labels(shards)
    problems = Problems()
    for image in place.with_ending(*IMAGE_SUFFIXES):
        problems.add("image beside the shards", image.name)
    place.count_unread(problems, ".tar")
    indexes = run(index_shard, shards, labels, itertools.repeat(column))
    pairs = TarPairs(name, shards, labels, indexes, problems, config.max_pixels)
    return_freed_memory()  # of the shards' own indexes
    if problems.counts[DUPLICATE]:
        first = next(key for key, reason in problems.rows if reason == DUPLICATE)
        _log.warning(
            "%s: %d duplicate member names (the first: %s); each repetition is taken as a sample of its own",
            name,
            problems.counts[DUPLICATE],
            first,
        )
    if not len(pairs):
        raise nothing_usable(name, problems, f"no usable image-caption pair in {len(shards)} shards")
    return pairs


def shard_labels(shards: Sequence[Path]) -> list[str]:
    """A short unique name for each shard: its stem, or its path below the common folder where stems repeat."""
    stems = [valid_text(path.stem) for path in shards]
    if len(set(stems)) == len(stems):
        return stems
    paths = [os.path.abspath(str(path)) for path in shards]  # noqa: PTH100 - links are to stay as they are named
    common = os.path.commonpath(paths)
    labels = [valid_text(os.path.relpath(path, common)) for path in paths]
    if len(set(labels)) < len(labels):
        repeated = next(path for path, label in zip(shards, labels) if labels.count(label) > 1)
        raise InputError(f"the shard '{repeated}' is named more than once")
    return labels
