"""Pictures without captions behind the interface of pairs: `captions(i)` is empty and `captioned` False."""

from __future__ import annotations

from PIL import Image

from clipdistill.data.files import collect
from clipdistill.data.formats import Place
from clipdistill.data.labelled import LabelledSource
from clipdistill.data.open import is_labelled_name, open_labelled, open_pairs
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.problems import Problems


class LabelledPictures(PairSource):
    """The pictures of a classification set, whose labels are left aside."""

    captioned = False

    def __init__(self, source: LabelledSource) -> None:
        self.source, self.name, self.problems, self.max_pixels = source, source.name, source.problems, source.max_pixels

    def __len__(self) -> int:
        return len(self.source)

    def key(self, i: int) -> str:
        return self.source.key(i)

    def captions(self, i: int) -> tuple[str, ...]:
        return ()

    def image_bytes(self, i: int) -> bytes:
        return self.source._bytes(i)

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        return self.source.image(i, at_least)


def open_bare(config: DataConfig, split: str | None = None) -> PairSource | None:
    """The pictures of a classification set, or of a folder without captions; None for anything else."""
    place, split = Place(config.path), split or config.split
    if is_labelled_name(config.path):
        return LabelledPictures(open_labelled(config.path, split=split, max_pixels=config.max_pixels))
    if split is not None or not place.is_folder or not place.images:
        return None
    if any((place.path / image).with_suffix(".txt").is_file() for image in place.images):
        return None
    if place.with_ending(".json", ".csv", ".tsv", ".parquet", ".pq", ".tar"):
        return None
    problems, names = Problems(), place.images
    place.count_passed_over(problems)
    entries: list[tuple[str, list[str]]] = [(name, []) for name in names]
    return collect(place.path.resolve().name, entries, place.path, problems, config.max_pixels, place.path, bare=True)


def open_pictures(data: str | DataConfig, *, split: str | None = None, default_split: str | None = None) -> PairSource:
    """Pairs, as `open_pairs` opens them, or the pictures of a folder or classification set that has no captions.

    Raises InputError for what holds neither.
    """
    config = DataConfig(path=data) if isinstance(data, str) else data
    bare = open_bare(config, split)
    return open_pairs(config, split=split, default_split=default_split) if bare is None else bare
