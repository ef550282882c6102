"""The built-in image-caption set `scenes`: drawn on demand, any size, no files, no network.

`scenes`, `scenes:val`, `scenes:train?size=4000&seed=1&pixels=96` name it. What is drawn is in world.py, how it looks
in draw.py, what is said about it in captions.py; `scenes:zeroshot/...` is in zero_shot.py.
"""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass

from PIL import Image

from clipdistill.data.files import one_split, settings_of_name
from clipdistill.data.formats import Format, Place
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.problems import Problems
from clipdistill.errors import InputError, nearest
from clipdistill.scenes.captions import captions_of, scenes_vocabulary
from clipdistill.scenes.draw import draw_scene
from clipdistill.scenes.world import SPLITS, WORLD_VERSION, Dice, Scene, sample_scene

__all__ = ["DEFAULT_PIXELS", "DEFAULT_SIZES", "ScenePairs", "ScenesName", "open_scenes", "parse_scenes_name"]
__all__ += ["scenes_vocabulary"]

DEFAULT_SIZES = {"train": 20_000, "val": 1_000, "test": 1_000}
DEFAULT_PIXELS = 64
_SMALLEST, _LARGEST = 16, 1024
_SETTINGS = ("size", "seed", "pixels")


class ScenePairs(PairSource):
    """Scenes as a pair source: sample i is a pure function of (seed, split, i), its picture also of `pixels`."""

    def __init__(self, split: str, size: int, seed: int, pixels: int) -> None:
        self.name = f"scenes/{split}"
        self.split = split
        self.size = size
        self.seed = seed
        self.pixels = pixels
        self.problems = Problems()
        self._last: tuple[int, Scene] | None = None

    def __len__(self) -> int:
        return self.size

    def key(self, i: int) -> str:
        """For example 'scenes-val-0-000000017': split, seed, index."""
        self._check(i)
        return f"scenes-{self.split}-{self.seed}-{i:09d}"

    def scene(self, i: int) -> Scene:
        """The ground truth of sample i."""
        self._check(i)
        # picture and captions of a sample are asked for one after the other
        last = self._last
        if last is None or last[0] != i:
            last = self._last = (i, sample_scene(self.seed, self.split, i))
        return last[1]

    def captions(self, i: int) -> tuple[str, ...]:
        return captions_of(self.scene(i), Dice("captions", self.seed, self.split, i))

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        """The RGB picture of (pixels, pixels), drawn anew: nothing is encoded or decoded."""
        return draw_scene(self.scene(i), self.pixels, Dice("picture", self.seed, self.split, i))

    def image_bytes(self, i: int) -> bytes:
        """The picture as PNG."""
        buffer = io.BytesIO()
        self.image(i).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def fingerprint(self) -> str:
        """SHA-256 of what the samples follow from; unlike other sources', without making every caption."""
        text = f"clipdistill scenes {WORLD_VERSION} {self.split} {self.size} {self.seed} {self.pixels}"
        return hashlib.sha256(text.encode()).hexdigest()

    def images_fingerprint(self, count: int = 8) -> str:
        """The same as of the pairs: the pictures follow from it, too, whatever compresses them."""
        return self.fingerprint()

    def _check(self, i: int) -> None:
        if not 0 <= i < self.size:
            raise IndexError(f"sample {i} of {self.size}")


@dataclass(frozen=True)
class ScenesName:
    """A parsed name: `split` is 'train', 'val', 'test' or 'zeroshot/TASK'; None is what the name leaves open."""

    split: str | None = None
    size: int | None = None
    seed: int | None = None
    pixels: int | None = None


def open_scenes(
    split: str | None = None, size: int | None = None, seed: int | None = None, pixels: int | None = None
) -> ScenePairs:
    """The built-in set as image-caption pairs.

    Args:
        split: train, val (both without the held-out pairs of attributes) or test (all pairs); None is train.
        size: number of samples; None is 20,000 for train, else 1,000.
        seed: another seed is another set of pictures; None is 0.
        pixels: side of the pictures; None is 64.
    Raises: InputError for an unknown split or a value outside its range.
    """
    split = split or "train"
    if split.startswith("zeroshot"):
        raise InputError(f"scenes:{split} is a classification set, not image-caption pairs: name it as a labelled set")
    if split not in SPLITS:
        raise InputError(f"scenes has no split '{split}'{nearest(split, SPLITS)}")
    size, seed, pixels = check_settings(DEFAULT_SIZES[split] if size is None else size, seed, pixels)
    return ScenePairs(split, size, seed, pixels)


def check_settings(size: int, seed: int | None, pixels: int | None) -> tuple[int, int, int]:
    """(size, seed, pixels) with defaults filled in, each within its range; raises InputError."""
    seed, pixels = seed or 0, DEFAULT_PIXELS if pixels is None else pixels
    if not 1 <= size < 2**63:
        raise InputError(f"scenes: size is the number of samples and must be at least 1 and fit 63 bits, got {size}")
    if seed < 0:
        raise InputError(f"scenes: seed must be 0 or more, got {seed}")
    if not _SMALLEST <= pixels <= _LARGEST:
        raise InputError(f"scenes: pixels must be between {_SMALLEST} and {_LARGEST}, got {pixels}")
    return size, seed, pixels


def parse_scenes_name(text: str) -> ScenesName | None:
    """Read 'scenes', 'scenes:val', 'scenes:train?size=4000&seed=1'; None when the text names something else."""
    head, _, query = text.partition("?")
    name, colon, split = head.partition(":")
    if name != "scenes":
        return None
    if colon and not split:
        raise InputError(f"'{text}': a split is missing after 'scenes:'; known: {', '.join((*SPLITS, 'zeroshot'))}")
    settings: dict[str, int] = {}
    for key, value in settings_of_name(query, _SETTINGS, text).items():
        try:
            settings[key] = int(value)
        except ValueError:
            raise InputError(f"'{text}': pixels, size and seed are whole numbers, got {key}='{value}'") from None
    return ScenesName(split or None, **settings)


def _open(place: Place, config: DataConfig, default_split: str | None) -> ScenePairs:
    name = parse_scenes_name(place)
    assert name is not None
    for setting, asked, named in (("size", config.size, name.size), ("seed", config.seed or None, name.seed)):
        if asked is not None and named is not None and asked != named:
            raise InputError(f"data.{setting}={asked} contradicts the name '{place}': give one of them")
    size = config.size if name.size is None else name.size
    seed = config.seed if name.seed is None else name.seed
    return open_scenes(one_split(config.split, name.split, place) or default_split or "train", size, seed, name.pixels)


FORMAT = Format(
    lambda place: re.match(r"scenes(?:[:?].*)?$", place) is not None and not place.there,
    _open,
    frozenset({"size", "seed"}),
)
