"""Image-caption pairs behind one interface, whatever they are stored as: the contract that every reader keeps.

A source gives random access: key, captions and image bytes of sample i. It can be sent to worker processes.
`open.open_pairs` finds the reader of a name; classification sets are in labelled.py.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from clipdistill.config import Config, read_yaml
from clipdistill.data.problems import BadSample, Problems, valid_text
from clipdistill.data.sampler import StepSampler
from clipdistill.errors import InputError

__all__ = ["BadSample", "DataConfig", "IndexedPairs", "PairSource", "Problems", "Strings", "Subset"]


def __getattr__(name: str) -> Any:
    """`open_pairs` is found here too; it lives in open.py, which is built on this file."""
    if name == "open_pairs":
        return importlib.import_module("clipdistill.data.open").open_pairs
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


class DataConfig(Config):
    """Which pairs to open and how."""

    path: str = ""
    """A file or folder, a brace pattern of tars, hf:owner/name, scenes, scenes:val, ..."""
    sets: tuple[dict[str, Any], ...] = ()
    """Instead of a path: several sets with weights, for training and caches (docs/unlabelled.md). A path that ends in
    .yaml is a file of them."""
    split: str | None = None
    """Split to read, where the format has splits (None: that of the purpose, train or val)."""
    image_root: str | None = None
    """Folder of the images, where it is not found by itself."""
    image_column: str = "filepath"
    """Column of a table with the image's path."""
    caption_column: str | None = "title"
    """Column of a table with the caption, or key of a tar's .json (None: pictures without captions)."""
    separator: str | None = None
    """Of CSV and TSV files (None: found from the header)."""
    missing_captions: Literal["error", "skip"] = "error"
    """What a table's blank caption does: stop, or be skipped and counted."""
    size: int | None = Field(default=None, gt=0, lt=2**63)
    """Number of images of scenes."""
    seed: int = Field(default=0, ge=0)
    """Of scenes."""
    bad_sample_budget: float = Field(default=0.001, ge=0, le=1)
    """Share of the samples seen that may be bad before the run stops."""
    max_pixels: int = Field(default=64_000_000, gt=0)
    """Images with more pixels are refused before they are decoded."""

    @model_validator(mode="before")
    @classmethod
    def _read_sets(cls, values: Any) -> Any:
        path = values.get("path") if isinstance(values, Mapping) else None
        if isinstance(path, str) and path.endswith((".yaml", ".yml")) and Path(path).is_file():
            values = {**values, "path": "", **read_yaml(Path(path))}
            if not isinstance(values.get("sets"), list):
                raise InputError(
                    f"{path}: no file of sets: it must hold  sets:  with a list of them (docs/unlabelled.md)"
                )
        if not isinstance(values, Mapping) or not isinstance(values.get("sets"), list | tuple):
            return values
        return {**values, "sets": [{"path": each} if isinstance(each, str) else each for each in values["sets"]]}


class Strings:
    """An immutable sequence of str held as UTF-8 bytes (uint8) and n + 1 offsets (uint32; int64 beyond 4 GB).

    File names that are not UTF-8 (str with surrogates) come back as they went in.
    """

    def __init__(self, buffer: np.ndarray, offsets: np.ndarray) -> None:
        self.buffer = buffer
        self.offsets = offsets

    @classmethod
    def pack(cls, texts: Iterable[str]) -> Strings:
        buffer, lengths = bytearray(), array("q")  # no object of Python's own is kept for a text
        for text in texts:
            encoded = text.encode("utf-8", "surrogatepass")
            buffer += encoded
            lengths.append(len(encoded))
        return cls(np.frombuffer(bytes(buffer), dtype=np.uint8), ends_of(np.frombuffer(lengths, dtype=np.int64)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"index {i} of {len(self)} strings")
        return self.buffer[self.offsets[i] : self.offsets[i + 1]].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        data = self.buffer.tobytes()
        bounds = self.offsets.tolist()
        return (data[a:b].decode("utf-8", "surrogatepass") for a, b in itertools.pairwise(bounds))

    def hash_into(self, digest: hashlib._Hash) -> None:
        """Feed lengths and contents to a hashlib object: equal only for equal sequences."""
        digest.update(np.diff(self.offsets).astype("<i8").tobytes())
        digest.update(self.buffer.tobytes())


class GrowingStrings:
    """Strings that parts are added to, put together once: each part is given up when it is copied."""

    def __init__(self) -> None:
        self._parts: list[Strings] = []

    def add(self, part: Strings) -> None:
        """Append the texts of a part."""
        self._parts.append(part)

    def whole(self) -> Strings:
        """All texts; nothing can be added after."""
        lengths = [np.zeros(0, dtype=np.uint32), *(narrow(np.diff(part.offsets)) for part in self._parts)]
        buffer = np.empty(sum(len(part.buffer) for part in self._parts), dtype=np.uint8)
        end = len(buffer)
        while self._parts:
            part = self._parts.pop().buffer
            buffer[end - len(part) : end] = part
            end -= len(part)
        return Strings(buffer, ends_of(np.concatenate(lengths)))


def ends_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """0 and the running sums of `lengths` (n + 1), in as few bytes as hold them."""
    ends = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=ends[1:])
    return narrow(ends)


def narrow(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 on as uint32 where they fit: half the memory for millions of pairs."""
    return numbers.astype(np.uint32) if not len(numbers) or int(numbers.max()) < 2**32 else numbers


class PairSource(ABC):
    """Random access to images with captions. Picklable; `key(i)` is unique and stable, `captions(i)` never empty."""

    name: str
    problems: Problems
    max_pixels: int = 64_000_000
    captioned: bool = True
    """False for pictures without captions (data/mixture/pictures.py), whose `captions` are empty."""
    pictured: bool = True
    """False for texts without pictures (data/mixture/texts.py)."""
    rule: str | None = None
    """Which of a sample's captions a step takes, where the set has a rule of its own: random or first."""
    uneven: bool = False
    """Some steps have pictures or captions, and others do not."""
    lacks: str = ""
    """What the reader of pairs said of a set that holds none."""
    parallel: bool = False
    """The captions of a sample are one text in several languages; a teacher reads the first."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, i: int) -> str:
        """A name of sample i that no other sample of this source has, the same every time the data is opened."""

    @abstractmethod
    def captions(self, i: int) -> tuple[str, ...]:
        """The cleaned captions of sample i in their stored order; at least one."""

    @abstractmethod
    def image_bytes(self, i: int) -> bytes:
        """The encoded image as stored. Raises BadSample when it cannot be read."""

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        """The decoded RGB image (see images.decode). Raises BadSample. Sources that draw their images override this."""
        from clipdistill.data.images import decode

        try:
            return decode(self.image_bytes(i), max_pixels=self.max_pixels, at_least=at_least)
        except BadSample as error:
            raise BadSample(error.reason, self.key(i)) from error

    def shard_of(self, key: str) -> str | None:
        """The archive that the sample with this key lies in, where there is one (for the list of bad samples)."""
        return None

    def part(self, i: int) -> PairSource:
        """The set that sample i belongs to, where there are several (data/mixture/mixed.py); a batch is of one."""
        return self

    def sampler(self, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> StepSampler:
        """The samples of each step of a training."""
        return StepSampler(len(self), batch_size, seed, rank, world)

    def subset(self, indices: Sequence[int]) -> PairSource:
        """The samples `indices` alone."""
        return Subset(self, indices=indices)

    def fingerprint(self) -> str:
        """SHA-256 over all keys and captions in order: two sources with the same value hold the same pairs."""
        captions = [one_or_several(self.captions(i)) for i in range(len(self))]
        keys = Strings.pack(self.key(i) for i in range(len(self)))
        return fingerprint(keys, Strings.pack(c for group in captions for c in group), [len(c) for c in captions])

    def images_fingerprint(self, count: int = 8) -> str:
        """SHA-256 over the stored images of `count` samples, evenly spread: enough to notice that a set was exchanged
        for another under the same names and captions, without reading all of it."""
        return images_fingerprint(len(self), count, self.image_bytes, self.image)


def images_fingerprint(
    length: int, count: int, encoded: Callable[[int], bytes], decoded: Callable[[int], Image.Image]
) -> str:
    """SHA-256 over `count` of `length` images, evenly spread: encoded as they are, else their pixels."""
    digest = hashlib.sha256()
    for i in sorted({k * length // count for k in range(count)}):
        try:
            data = encoded(i)
        except BadSample:
            try:
                data = decoded(i).tobytes()
            except BadSample:
                digest.update(b"no image")
                continue
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def one_or_several(captions: str | Sequence[str]) -> tuple[str, ...]:
    """Captions as a tuple; one text is a tuple of itself (a sequence of its letters would be captions, too)."""
    return (captions,) if isinstance(captions, str) else tuple(captions)


def fingerprint(keys: Strings, captions: Strings, captions_per_key: Sequence[int] | np.ndarray) -> str:
    """SHA-256 (hex) of keys, flat captions and the number of captions of each key."""
    digest = hashlib.sha256(b"clipdistill pairs 1")
    keys.hash_into(digest)
    digest.update(np.asarray(captions_per_key, dtype="<i8").tobytes())
    captions.hash_into(digest)
    return digest.hexdigest()


class IndexedPairs(PairSource):
    """Base of the readers: keys and captions in flat arrays, so that millions of pairs cost little and fork freely.

    captions: of each sample; with packed keys all of them packed, and how many each sample has.
    """

    def __init__(
        self,
        name: str,
        keys: Iterable[str],
        captions: Sequence[Sequence[str]] | tuple[Strings, np.ndarray],
        problems: Problems,
        max_pixels: int,
    ) -> None:
        if isinstance(keys, Strings):
            self._captions, counts = cast(tuple[Strings, np.ndarray], captions)
        else:
            groups = [one_or_several(group) for group in cast(Sequence[Sequence[str]], captions)]
            self._captions = Strings.pack(c for group in groups for c in group)
            counts = np.array([len(group) for group in groups])
        self.name = valid_text(name)
        self.problems = problems
        self.max_pixels = max_pixels
        self._keys = keys if isinstance(keys, Strings) else Strings.pack(valid_text(key) for key in keys)
        self.captioned = len(self._captions) > 0
        self._starts = ends_of(counts)
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        return self._keys[i]

    def captions(self, i: int) -> tuple[str, ...]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return tuple(self._captions[j] for j in range(int(self._starts[i]), int(self._starts[i + 1])))

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._keys, self._captions, np.diff(self._starts))
        return self._fingerprint


class DerivedPairs(PairSource):
    """Another source seen differently; what is not overridden is that source's own."""

    def __init__(self, source: PairSource, name: str, problems: Problems) -> None:
        self.source = source
        self.name = name
        self.problems = problems
        self.max_pixels = source.max_pixels
        self.captioned, self.pictured, self.parallel = source.captioned, source.pictured, source.parallel
        self.rule, self.uneven, self.lacks = source.rule, source.uneven, source.lacks

    def _at(self, i: int) -> int:
        """The number of sample i in the source."""
        return i

    def __len__(self) -> int:
        return len(self.source)

    def key(self, i: int) -> str:
        return self.source.key(self._at(i))

    def captions(self, i: int) -> tuple[str, ...]:
        return self.source.captions(self._at(i))

    def image_bytes(self, i: int) -> bytes:
        return self.source.image_bytes(self._at(i))

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        return self.source.image(self._at(i), at_least)

    def shard_of(self, key: str) -> str | None:
        return self.source.shard_of(key)

    def part(self, i: int) -> PairSource:
        inner = self.source.part(self._at(i))
        return self if inner is self.source else inner


class Subset(DerivedPairs):
    """`count` samples of `source`, evenly spread over it (every n-th, not the first), or the samples `indices`."""

    def __init__(self, source: PairSource, count: int | None = None, *, indices: Sequence[int] | None = None) -> None:
        if (count is None) == (indices is None):
            raise InputError("a subset needs either a number of samples or the samples' indices")
        if indices is None:
            assert count is not None
            if count < 1:
                raise InputError(f"a subset needs at least one sample, got {count}")
            count = min(count, len(source))
            chosen = np.arange(count, dtype=np.int64) * len(source) // count
        else:
            chosen = np.asarray(indices, dtype=np.int64)
            if chosen.size and not 0 <= chosen.min() <= chosen.max() < len(source):
                raise InputError(f"the subset's indices leave the {len(source)} samples of {source.name}")
        super().__init__(source, f"{source.name}[{len(chosen)} of {len(source)}]", Problems())
        self.indices = chosen

    def _at(self, i: int) -> int:
        return int(self.indices[i])

    def __len__(self) -> int:
        return len(self.indices)
