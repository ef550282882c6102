"""Several sets with weights as one: each batch is of one set, and the sets take turns as their weights say."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pydantic
from PIL import Image

from clipdistill.config import build
from clipdistill.data.pairs import DataConfig, DerivedPairs, PairSource, Subset
from clipdistill.data.problems import BadSample, Problems
from clipdistill.data.sampler import StepSampler
from clipdistill.errors import InputError


class SetConfig(DataConfig):
    """One of several sets (`data.sets`): where it lies and how it is read, as `data:` itself, and what is taken."""

    path: str
    name: str | None = pydantic.Field(default=None, min_length=1)
    """What logs call it (None: as the set itself)."""
    weight: float | None = pydantic.Field(default=None, gt=0, le=1e9)
    """Its share of the steps, beside the others' (None: for all sets, their numbers of samples)."""
    caption: Literal["random", "first", "none"] | None = None
    """Which of a sample's captions a step takes (None: as train.caption; none: its captions are left aside)."""


class OneSet(DerivedPairs):
    """A set under its name in the mixture, with its caption rule."""

    def __init__(self, source: PairSource, name: str, rule: str | None) -> None:
        super().__init__(source, name, source.problems)
        self.rule = None if rule == "none" else rule
        self.captioned = source.captioned and rule != "none"

    def captions(self, i: int) -> tuple[str, ...]:
        return self.source.captions(i) if self.captioned else ()

    def fingerprint(self) -> str:
        return self.source.fingerprint() if self.captioned == self.source.captioned else super().fingerprint()

    def part(self, i: int) -> PairSource:
        return self


class MixedPairs(PairSource):
    """The samples of several sets one after the other; keys are '<set>/<key>'."""

    def __init__(self, sets: Sequence[OneSet], weights: Sequence[float]) -> None:
        self.sets, self.weights = list(sets), list(weights)
        self.name = " : ".join(f"{weight:g} {each.name}" for each, weight in zip(sets, weights))
        self.starts = np.cumsum([0, *(len(each) for each in sets)])
        self.max_pixels = max(each.max_pixels for each in sets)
        self.captioned = any(each.captioned for each in sets)
        self.pictured = any(each.pictured for each in sets)
        self.uneven = len({(each.captioned, each.pictured) for each in sets}) > 1
        self.problems = Problems()
        for each in sets:
            own = copy.deepcopy(each.problems)
            own.rows = [(f"{each.name}/{key}", reason) for key, reason in own.rows]
            self.problems.merge(own)

    def _find(self, i: int) -> tuple[OneSet, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        number = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.sets[number], i - int(self.starts[number])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def key(self, i: int) -> str:
        own, j = self._find(i)
        return f"{own.name}/{own.key(j)}"

    def captions(self, i: int) -> tuple[str, ...]:
        own, j = self._find(i)
        return own.captions(j)

    def image_bytes(self, i: int) -> bytes:
        return self._of(i, lambda own, j: own.image_bytes(j))

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        return self._of(i, lambda own, j: own.image(j, at_least))

    def _of(self, i: int, read: Callable[[OneSet, int], Any]) -> Any:
        try:
            return read(*self._find(i))
        except BadSample as error:
            raise BadSample(error.reason, self.key(i)) from error

    def shard_of(self, key: str) -> str | None:
        for own in self.sets:
            if key.startswith(f"{own.name}/"):
                return own.shard_of(key[len(own.name) + 1 :])
        return None

    def part(self, i: int) -> PairSource:
        return self._find(i)[0]

    def sampler(self, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> StepSampler:
        return TurnSampler([len(each) for each in self.sets], self.weights, batch_size, seed, rank, world)

    def subset(self, indices: Sequence[int]) -> PairSource:
        chosen, kept = np.asarray(indices), []
        for number, own in enumerate(self.sets):
            first, last = self.starts[number : number + 2]
            inside = chosen[(chosen >= first) & (chosen < last)] - first
            if not len(inside):
                raise InputError(f"nothing is left of the set {own.name}: leave it out of data.sets")
            kept.append(OneSet(Subset(own.source, indices=inside.tolist()), own.name, own.rule))
            kept[-1].captioned = own.captioned
        return MixedPairs(kept, self.weights)

    def fingerprint(self) -> str:
        """SHA-256 of the sets' names and contents; weights are no content."""
        return hashlib.sha256(str([(each.name, each.fingerprint()) for each in self.sets]).encode()).hexdigest()

    def images_fingerprint(self, count: int = 8) -> str:
        return hashlib.sha256(str([each.images_fingerprint(count) for each in self.sets]).encode()).hexdigest()


class TurnSampler(StepSampler):
    """Whose turn each step is, and which of its samples: a function of (seed, step), the same for any number of ranks.

    sizes, weights: of the sets. After t steps a set of share w has had its turn w t times, to within one. Within a set
    order and tail are those of a StepSampler over its own steps; an epoch is that of the set.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], batch_size: int, seed: int, rank: int, world: int
    ) -> None:
        super().__init__(sum(sizes), batch_size, seed, rank, world)
        self._own = [StepSampler(size, batch_size, seed, rank, world) for size in sizes]
        self._first = np.cumsum([0, *sizes])
        self._shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        self._turns: tuple[np.ndarray, np.ndarray] = (np.zeros(0, np.int32), np.zeros(0, np.int64))

    @property
    def local_batch_size(self) -> int:
        return max(own.local_batch_size for own in self._own)

    @property
    def dropped_per_epoch(self) -> int:
        return sum(own.dropped_per_epoch for own in self._own)

    def turn(self, step: int) -> tuple[int, int]:
        """(the set, which of its own steps) of global step `step`."""
        if step >= len(self._turns[0]):
            self._turns = self._line_up(max(1024, 2 * step))
        return int(self._turns[0][step]), int(self._turns[1][step])

    def _line_up(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """The turns of the first `steps` steps: a set's own step j is due at (j + 1/2) / share."""
        counts = [int(np.ceil(steps * share)) + 2 for share in self._shares]
        sets = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        own = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
        order = np.lexsort((sets, (own + 0.5) / self._shares[sets]))[:steps]
        return sets[order], own[order]

    def epoch(self, step: int) -> int:
        number, own = self.turn(step)
        return self._own[number].epoch(own)

    def indices(self, step: int) -> np.ndarray:
        number, own = self.turn(step)
        return self._own[number].indices(own) + self._first[number]


def require_no_sets(each: SetConfig, number: int) -> None:
    """Raise InputError where one of several sets is several itself."""
    if each.sets:
        raise InputError(f"data.sets[{number}]: it is a file of sets itself: name them here")


def open_mixture(config: DataConfig, open_one: Callable[[DataConfig], PairSource]) -> MixedPairs:
    """The sets of `config.sets`, each opened by `open_one`. Raises InputError that names the set."""
    for name, field in DataConfig.model_fields.items():
        value = getattr(config, name)
        if name not in ("sets", "bad_sample_budget") and value != field.default:
            raise InputError(f"data.{name}={value} is not applied to several sets: give it in each of data.sets")
    described = [build(SetConfig, values, f"data.sets[{n}]") for n, values in enumerate(config.sets)]
    weights = [each.weight for each in described]
    if None in weights and any(weights):
        raise InputError("data.sets: some have a weight and some have none: give all of them one, or none")
    sets: list[OneSet] = []
    for number, each in enumerate(described):
        require_no_sets(each, number)
        if each.bad_sample_budget != DataConfig.model_fields["bad_sample_budget"].default:
            raise InputError(f"data.sets[{number}]: the budget is one for all sets: set data.bad_sample_budget")
        try:
            source = open_one(each)
        except InputError as error:
            raise InputError(f"data.sets[{number}]: {error}") from error
        if each.caption in ("random", "first") and not source.captioned:
            raise InputError(f"data.sets[{number}]: caption={each.caption}, and {source.name} has no captions")
        name = (each.name or source.name).replace("/", "-")
        if any(other.name == name for other in sets):
            raise InputError(f"data.sets[{number}]: two sets are called '{name}': give one of them another name")
        sets.append(OneSet(source, name, each.caption))
    if len(sets) == 1:
        raise InputError("data.sets: one set alone needs no weights: name it as data.path")
    return MixedPairs(sets, [len(own) if weight is None else weight for own, weight in zip(sets, weights)])
