"""A folder of photographs that can be asked: one or two models, each with its index, answering the same query."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clipdistill.data.captions import require_legible
from clipdistill.data.files import read_image_file
from clipdistill.data.images import decode
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError
from clipdistill.runtime.files import is_inside
from clipdistill.search.encoder import SearchModel
from clipdistill.search.find import Finder, make_finder
from clipdistill.search.photographs import printable
from clipdistill.search.store import SearchIndex

_ROUNDS = (5, 15)
_SECONDS = 0.2
"""A query is answered at least five times, at most fifteen while this lasts: one call alone says little about time."""


@dataclass(frozen=True)
class Hit:
    """One photograph found: its path, cosine with the query, its number in the collection, and whether the other
    model found it as well."""

    path: str
    score: float
    number: int
    shared: bool = False


@dataclass(frozen=True)
class Answer:
    """What one model found, best first. encode_ms: preparing and encoding the query; search_ms: finding
    the nearest; both are medians of a few calls, in which the models take turns.
    note: what keeps the answer from meaning all that was asked. rounds_ms: both times together, call by call."""

    model: str
    role: str
    encode_ms: float
    search_ms: float
    hits: tuple[Hit, ...]
    note: str = ""
    rounds_ms: tuple[float, ...] = ()

    @property
    def total_ms(self) -> float:
        """Encoding and searching together."""
        return self.encode_ms + self.search_ms


def times_as_fast(first: Answer, second: Answer) -> float | None:
    """How many times as fast `first` answered (median over rounds); None when the rounds do not agree on who is faster.

    A busy machine can delay a call by more than it takes; one round in five may say otherwise.
    """
    ratios = [b / max(a, 1e-9) for a, b in zip(first.rounds_ms, second.rounds_ms, strict=True)]
    ahead = sum(ratio > 1 for ratio in ratios)
    return float(np.median(ratios)) if ratios and 5 * min(ahead, len(ratios) - ahead) <= len(ratios) else None


@dataclass
class Side:
    """A model with its index."""

    model: SearchModel
    index: SearchIndex
    finder: Finder


class Collection:
    """The photographs of `folder` that are in the index of at least one model; `sides` has the student first.

    `paths[number]` is a photograph; the numbers hold as long as this object. left_out: path -> reason of the files that
    are in no index, and of those that could not be listed (`unlisted`).
    """

    def __init__(
        self,
        folder: Path,
        models: Sequence[tuple[SearchModel, SearchIndex]],
        kind: str = "exact",
        unlisted: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.left_out = {path: bad[2] for _, index in models for path, bad in sorted(index.bad.items())}
        self.left_out |= unlisted or {}
        self.sides: list[Side] = []
        for model, index in models:
            if not index.entries:
                few = "; ".join(f"{printable(path)}: {why}" for path, why in list(self.left_out.items())[:3])
                raise InputError(f"{folder}: holds no photograph that can be read{f' ({few})' if few else ''}")
            self.sides.append(Side(model, index, make_finder(kind, index)))
            model.warm_up()
        self.paths = sorted({path for side in self.sides for path in side.index.entries})
        self._numbers = {path: number for number, path in enumerate(self.paths)}
        self._by_row = [{e.row: e.path for e in side.index.entries.values()} for side in self.sides]
        for side in self.sides:  # the first pass over memory-mapped vectors reads them from the disk
            side.finder.search(np.zeros(side.index.dimension, dtype=np.float32), 1)

    def __len__(self) -> int:
        return len(self.paths)

    def sha256(self, number: int) -> str:
        """The content of a photograph when it was indexed."""
        path = self.paths[number]
        return next(side.index.entries[path].sha256 for side in self.sides if path in side.index.entries)

    def ask_text(self, text: str, top: int = 10) -> list[Answer]:
        """Each model's nearest photographs to a text; none from a model that knows none of its words.

        Raises InputError when no model does.
        """
        text = " ".join(text.split())
        if not text:
            raise InputError("the query is empty")
        require_legible(text, "the query")
        known = [side.model.knows(text) for side in self.sides]
        if not any(known):
            raise InputError("the query holds no word that the model knows, so nothing can be found: try other words")
        answers = self._ask([functools.partial(side.model.text, text) for side in self.sides], top)
        for place, side in enumerate(self.sides):
            if not known[place]:
                note = "this model knows none of the words of the query, so its answer is withheld"
                answers[place] = replace(answers[place], note=note, hits=())
            elif side.model.cut(text):
                note = "the query is longer than this model reads; its end was not used"
                answers[place] = replace(answers[place], note=note)
        return answers

    def ask_image(self, data: bytes, top: int = 10) -> list[Answer]:
        """Each model's nearest photographs to an encoded image. Raises InputError when it cannot be decoded."""
        try:
            picture = decode(data, at_least=max(side.model.at_least() for side in self.sides))
        except BadSample as error:
            raise InputError(f"the query image cannot be read: {error.reason}") from error
        return self._ask([functools.partial(side.model.image, picture) for side in self.sides], top)

    def ask_like(self, number: int, top: int = 10) -> list[Answer]:
        """Each model's nearest photographs to one of the collection. Raises BadSample when its file is gone."""
        return self.ask_image(self.read(number), top)

    def read(self, number: int) -> bytes:
        """The file of a photograph as it is now. Raises BadSample when it is gone or lies outside the folder."""
        path = self.folder / self.paths[number]
        if not is_inside(self.folder, path):
            raise BadSample("unreadable image file: a link leads out of the folder")
        return read_image_file(path)

    def _ask(self, encoders: Sequence[Callable[[], np.ndarray]], top: int) -> list[Answer]:
        if top < 1:
            raise InputError(f"top must be at least 1, got {top}")
        milliseconds: list[list[np.ndarray]] = [[] for _ in self.sides]
        nearest = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))] * len(self.sides)
        deadline = time.monotonic() + _SECONDS
        for number in range(_ROUNDS[1]):
            if number >= _ROUNDS[0] and time.monotonic() > deadline:
                break
            # the models take turns, so that a busy moment does not fall on one of them
            for place, (side, encode) in enumerate(zip(self.sides, encoders, strict=True)):
                began = time.perf_counter()
                query = encode()
                encoded = time.perf_counter()
                nearest[place] = side.finder.search(query, min(top, len(side.index.entries)))
                milliseconds[place].append(1000 * np.diff([began, encoded, time.perf_counter()]))
        paths = [[self._by_row[place][row] for row in rows.tolist()] for place, (rows, _) in enumerate(nearest)]
        answers = []
        for place, side in enumerate(self.sides):
            others = {path for other in (*paths[:place], *paths[place + 1 :]) for path in other}
            hits = tuple(
                Hit(path, score, self._numbers[path], path in others)
                for path, score in zip(paths[place], nearest[place][1].tolist(), strict=True)
            )
            encode_ms, search_ms = np.median(milliseconds[place], axis=0).tolist()
            rounds = tuple(np.sum(milliseconds[place], axis=1).tolist())
            answers.append(Answer(side.model.name, side.model.role, encode_ms, search_ms, hits, "", rounds))
        return answers
