"""Pictures without captions behind the interface of pairs: `captions(i)` is empty and `captioned` False."""

from __future__ import annotations

from PIL import Image

from clipdistill.data.files import FilePairs
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


def open_pictures(data: str | DataConfig, *, split: str | None = None, default_split: str | None = None) -> PairSource:
    """Pairs, as `open_pairs` opens them, or the pictures of a folder or classification set that has no captions.

    Raises InputError for what holds neither.
    """
    config = DataConfig(path=data) if isinstance(data, str) else data
    place = Place(config.path)
    if is_labelled_name(config.path):
        split = split or config.split
        return LabelledPictures(open_labelled(config.path, split=split, max_pixels=config.max_pixels))
    if (
        place.is_folder
        and place.images
        and not any((place.path / i).with_suffix(".txt").is_file() for i in place.images)
    ):
        bare = not place.with_ending(".json", ".csv", ".tsv", ".parquet", ".pq", ".tar")
        if bare and split is None and config.split is None:
            folder, names = place.path, place.images
            source = FilePairs(folder.resolve().name, folder, names, [()] * len(names), Problems(), config.max_pixels)
            source.captioned = False
            return source
    return open_pairs(config, split=split, default_split=default_split)
