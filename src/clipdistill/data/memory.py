"""Decoded pictures kept in memory: worth it when the set is small and passed many times (train.keep_in_memory)."""

from __future__ import annotations

from PIL import Image

from clipdistill.data.labelled import LabelledSource
from clipdistill.data.pairs import PairSource

BUDGET = 1 << 30


class KeptInMemory(PairSource):
    """`source` with each picture decoded (or drawn) once per process, until `budget` bytes are in use.

    The pictures are the same to the bit. Each loader worker keeps its own, so this pays with few workers.
    """

    def __init__(self, source: PairSource, budget: int = BUDGET) -> None:
        self.source = source
        self.budget = budget
        self.name = source.name
        self.problems = source.problems
        self.max_pixels = source.max_pixels
        self._pictures: dict[int, tuple[tuple[int, int], bytes]] = {}
        self._captions: dict[int, tuple[str, ...]] = {}
        self._used = 0
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.source)

    def key(self, i: int) -> str:
        return self.source.key(i)

    def captions(self, i: int) -> tuple[str, ...]:
        if i not in self._captions:
            self._captions[i] = self.source.captions(i)
        return self._captions[i]

    def image_bytes(self, i: int) -> bytes:
        return self.source.image_bytes(i)

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        """The picture in full: `at_least` allows a smaller decoding, and what is kept must serve every size."""
        kept = self._pictures.get(i)
        if kept is not None:
            return Image.frombytes("RGB", *kept)
        picture = self.source.image(i)
        size = 3 * picture.width * picture.height
        if self._used + size <= self.budget:
            self._pictures[i] = (picture.size, picture.tobytes())
            self._used += size
        return picture

    def shard_of(self, key: str) -> str | None:
        return self.source.shard_of(key)

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = self.source.fingerprint()
        return self._fingerprint


class KeptLabelled(LabelledSource):
    """`source` with each picture decoded (or drawn) once, until `budget` bytes are in use; see KeptInMemory."""

    def __init__(self, source: LabelledSource, budget: int = BUDGET) -> None:
        # names, labels and what was found on opening are taken over as they are, not recognised again
        self.__dict__.update(source.__dict__)
        self.source = source
        self.budget = budget
        self._pictures: dict[int, tuple[tuple[int, int], bytes]] = {}
        self._used = 0

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        """The picture in full."""
        kept = self._pictures.get(i)
        if kept is not None:
            return Image.frombytes("RGB", *kept)
        picture = self.source.image(i)
        size = 3 * picture.width * picture.height
        if self._used + size <= self.budget:
            self._pictures[i] = (picture.size, picture.tobytes())
            self._used += size
        return picture

    def deviation(self) -> str | None:
        return self.source.deviation()

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def _bytes(self, i: int) -> bytes:
        return self.source._bytes(i)
