"""Image-caption pairs behind one interface, whatever the files look like; `open_pairs` finds the reader by content.

A source gives random access: key, captions and image bytes of sample i. It can be sent to worker processes.
Classification sets are in labelled.py.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from clipdistill.config import Config
from clipdistill.data.problems import BadSample, Problems
from clipdistill.data.strings import Strings, valid_text

__all__ = ["BadSample", "DataConfig", "IndexedPairs", "PairSource", "Problems", "open_pairs"]


class DataConfig(Config):
    """Which pairs to open and how.

    path: a file or folder, a brace pattern of tars, `hf:owner/name`, or `scenes`, `scenes:val`, ...;
    image_root: folder of the images, where it is not found by itself; image_column, caption_column: of tables;
    separator: of CSV/TSV files (None: found from the header); missing_captions: what a table's blank caption does;
    size, seed: of `scenes`; bad_sample_budget: fraction of samples seen that may be bad before the run stops;
    max_pixels: images with more are refused before they are decoded.
    """

    path: str
    split: str | None = None
    image_root: str | None = None
    image_column: str = "filepath"
    caption_column: str = "title"
    separator: str | None = None
    missing_captions: Literal["error", "skip"] = "error"
    size: int | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)
    bad_sample_budget: float = Field(default=0.001, ge=0, le=1)
    max_pixels: int = Field(default=64_000_000, gt=0)


class PairSource(ABC):
    """Random access to images with captions. Picklable; `key(i)` is unique and stable, `captions(i)` never empty."""

    name: str
    problems: Problems
    max_pixels: int = 64_000_000

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

    def fingerprint(self) -> str:
        """SHA-256 over all keys and captions in order: two sources with the same value hold the same pairs."""
        captions = [self.captions(i) for i in range(len(self))]
        keys = Strings.pack(self.key(i) for i in range(len(self)))
        return fingerprint(keys, Strings.pack(c for group in captions for c in group), [len(c) for c in captions])


def fingerprint(keys: Strings, captions: Strings, captions_per_key: Sequence[int] | np.ndarray) -> str:
    """SHA-256 (hex) of keys, flat captions and the number of captions of each key."""
    digest = hashlib.sha256(b"clipdistill pairs 1")
    keys.hash_into(digest)
    digest.update(np.asarray(captions_per_key, dtype="<i8").tobytes())
    captions.hash_into(digest)
    return digest.hexdigest()


class IndexedPairs(PairSource):
    """Base of the readers: keys and captions in flat arrays, so that millions of pairs cost little and fork freely."""

    def __init__(
        self, name: str, keys: Iterable[str], captions: Sequence[Sequence[str]], problems: Problems, max_pixels: int
    ) -> None:
        self.name = valid_text(name)
        self.problems = problems
        self.max_pixels = max_pixels
        self._keys = Strings.pack(valid_text(key) for key in keys)
        self._captions = Strings.pack(c for group in captions for c in group)
        self._starts = np.zeros(len(captions) + 1, dtype=np.int64)
        np.cumsum([len(c) for c in captions], out=self._starts[1:])
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


def open_pairs(data: str | DataConfig, *, split: str | None = None, default_split: str | None = None) -> PairSource:
    """Open image-caption pairs by name.

    `split` overrides the configuration's; it is an error where the data has no splits. `default_split` is what to
    take when nobody named a split and the data has several. Raises InputError with what is wrong and what to do.
    """
    from clipdistill.data.open import open_by_content

    config = DataConfig(path=data) if isinstance(data, str) else data
    if split is not None:
        config = config.model_copy(update={"split": split})
    return open_by_content(config, default_split)
