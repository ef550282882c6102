"""Decoded pictures kept in memory: worth it when the set is small and passed many times (train.keep_in_memory)."""

from __future__ import annotations

from PIL import Image

from clipdistill.data.labelled import LabelledSource
from clipdistill.data.pairs import DerivedPairs, PairSource
from clipdistill.data.sampler import StepSampler

BUDGET = 1 << 30


class _Kept:
    """The pictures of a source, each decoded (or drawn) once per process, until `budget` bytes are in use.

    They are the same to the bit. Each loader worker keeps its own, so this pays with few workers.
    """

    source: PairSource | LabelledSource

    def _keep(self, budget: int) -> None:
        self.budget = budget
        self._pictures: dict[int, tuple[tuple[int, int], bytes]] = {}
        self._used = 0

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

    def images_fingerprint(self, count: int = 8) -> str:
        return self.source.images_fingerprint(count)


class KeptInMemory(_Kept, DerivedPairs):
    """`source` with its pictures kept, and its captions."""

    source: PairSource

    def __init__(self, source: PairSource, budget: int = BUDGET) -> None:
        DerivedPairs.__init__(self, source, source.name, source.problems)
        self._keep(budget)
        self._captions: dict[int, tuple[str, ...]] = {}
        self._fingerprint: str | None = None

    def captions(self, i: int) -> tuple[str, ...]:
        if i not in self._captions:
            self._captions[i] = self.source.captions(i)
        return self._captions[i]

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = self.source.fingerprint()
        return self._fingerprint

    def sampler(self, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> StepSampler:
        return self.source.sampler(batch_size, seed, rank, world)


class KeptLabelled(_Kept, LabelledSource):
    """`source` with its pictures kept."""

    source: LabelledSource

    def __init__(self, source: LabelledSource, budget: int = BUDGET) -> None:
        # names, labels and what was found on opening are taken over as they are, not recognised again
        self.__dict__.update(source.__dict__)
        self.source = source
        self._keep(budget)

    def deviation(self) -> str | None:
        return self.source.deviation()

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def _bytes(self, i: int) -> bytes:
        return self.source._bytes(i)
