"""Zero-shot classification on the built-in `scenes`: single things whose looks never occurred together in training.

`scenes:zeroshot` is the task shape-colour; `scenes:zeroshot/shapes?size=600` names another task and a size.
In every task but `backgrounds` and `counts` each picture shows one thing in a (shape, colour) or (shape, texture) pair
that the splits train and val never show, so a student cannot have memorised it.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

from PIL import Image

from clipdistill.data.files import refuse_split
from clipdistill.data.formats import Format, Place
from clipdistill.data.labelled import LabelledConfig, LabelledSource
from clipdistill.errors import InputError, nearest
from clipdistill.scenes.captions import TEMPLATES, WORDS, with_article
from clipdistill.scenes.draw import draw_scene
from clipdistill.scenes.pairs import check_settings, parse_scenes_name
from clipdistill.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    TEXTURES,
    WORLD_VERSION,
    Dice,
    Looks,
    Scene,
    compose,
    held_out_colours,
    held_out_texture,
)

_NEW_COLOURS = tuple((shape, colour) for shape in SHAPES for colour in held_out_colours(shape))
_NEW_TEXTURES = tuple((shape, held_out_texture(shape)) for shape in SHAPES)
_ALL_COLOURS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
DEFAULT_TASK = "shape-colour"


@dataclass(frozen=True)
class ClassTask:
    """Class names, templates, and which classes the pictures show (all, but for the task with distractors)."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    shown: tuple[int, ...]
    what: str


def _task(names: tuple[str, ...], templates: str, what: str, shown: tuple[int, ...] | None = None) -> ClassTask:
    return ClassTask(
        names, tuple(TEMPLATES["prompt"][templates]), tuple(range(len(names))) if shown is None else shown, what
    )


TASKS: dict[str, ClassTask] = {
    "shape-colour": _task(
        tuple(with_article(f"{colour} {shape}") for shape, colour in _NEW_COLOURS),
        "thing",
        "which of the 24 held-out pairs of shape and colour",
    ),
    "shape-colour-all": _task(
        tuple(with_article(f"{colour} {shape}") for shape, colour in _ALL_COLOURS),
        "thing",
        "the same pictures, among all 144 pairs of shape and colour: seen pairs are distractors",
        tuple(_ALL_COLOURS.index(pair) for pair in _NEW_COLOURS),
    ),
    "shape-texture": _task(
        tuple(with_article(f"{texture} {shape}") for shape, texture in _NEW_TEXTURES),
        "thing",
        "which of the 12 held-out pairs of shape and texture",
    ),
    "shapes": _task(tuple(map(with_article, SHAPES)), "thing", "the shape of a thing in a colour it never had"),
    "colours": _task(
        tuple(with_article(f"{colour} shape") for colour in COLOURS), "thing", "the colour of a thing that never had it"
    ),
    "textures": _task(
        tuple(f"a {texture} shape" for texture in TEXTURES), "thing", "the texture of a thing that never had it"
    ),
    "backgrounds": _task(tuple(phrases[0] for phrases in WORDS["ground"].values()), "ground", "the background"),
    "counts": _task(
        tuple(f"{WORDS['number'][str(n)][0]} shapes" for n in (2, 3, 4)), "count", "how many things: two, three or four"
    ),
}


class SceneLabels(LabelledSource):
    """Pictures of one task; picture i shows class i mod (number of shown classes), so every size is balanced."""

    def __init__(self, task: str, size: int, seed: int, pixels: int) -> None:
        self.task = task
        # the task with distractors shows the pictures of the plain one
        self._shown = "shape-colour" if task == "shape-colour-all" else task
        self.seed = seed
        self.pixels = pixels
        about = TASKS[task]
        labels = [about.shown[i % len(about.shown)] for i in range(size)]
        keys = [f"scenes-{task}-{seed}-{i:07d}" for i in range(size)]
        super().__init__(f"scenes/zeroshot/{task}", keys, labels, about.names, naming="stored")
        self.known = None  # a world of its own, whatever its class names look like
        self.templates = about.templates
        self.metric = "accuracy"

    def scene(self, i: int) -> Scene:
        """The ground truth of picture i: a pure function of (seed, task, i)."""
        task = self._shown
        dice = Dice("zeroshot", self.seed, task, i)
        label = self.label(i)
        if task == "backgrounds":
            return compose(dice, everything=True, background=tuple(BACKGROUNDS)[label])
        if task == "counts":
            while True:  # a crowded scene may leave a thing out
                scene = compose(dice, everything=True, count=label + 2)
                if len(scene.things) == label + 2:
                    return scene
        return compose(dice, everything=True, count=1, looks=self._looks(task, label, dice))

    def _looks(self, task: str, label: int, dice: Dice) -> Looks:
        """(shape, colour, texture) of the one thing of a picture: what the class leaves open is drawn."""
        if task == "shape-texture":
            shape, texture = _NEW_TEXTURES[label]
        elif task == "textures":
            shape, texture = dice.pick([pair for pair in _NEW_TEXTURES if pair[1] == TEXTURES[label]])
        else:
            if task == "shapes":
                options = [pair for pair in _NEW_COLOURS if pair[0] == SHAPES[label]]
            elif task == "colours":
                options = [pair for pair in _NEW_COLOURS if pair[1] == tuple(COLOURS)[label]]
            else:
                options = [_NEW_COLOURS[label] if self.task == "shape-colour" else _ALL_COLOURS[label]]
            shape, colour = dice.pick(options)
            return shape, colour, dice.pick(TEXTURES)
        return shape, dice.pick(tuple(COLOURS)), texture

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        return draw_scene(self.scene(i), self.pixels, Dice("zeroshot picture", self.seed, self._shown, i))

    def _bytes(self, i: int) -> bytes:
        buffer = io.BytesIO()
        self.image(i).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def images_fingerprint(self, count: int = 8) -> str:
        """Of what the pictures follow from, whatever compresses them."""
        return self.fingerprint()

    def _hash_content(self, digest: hashlib._Hash) -> None:
        digest.update(f"{WORLD_VERSION} {self.pixels}".encode())


def open_scenes_zeroshot(name: str) -> SceneLabels:
    """The task that a name like 'scenes:zeroshot/colours?size=600&seed=1&pixels=96' stands for.

    size: number of pictures (default: 40 of each shown class, at most 960); seed (0) and pixels (64) as in scenes.
    """
    parsed = parse_scenes_name(name)
    if parsed is None or parsed.split is None or parsed.split.partition("/")[0] != "zeroshot":
        raise InputError(f"'{name}' is not a classification set of scenes: write scenes:zeroshot/TASK")
    task = (parsed.split.partition("/")[2] or DEFAULT_TASK).replace("color", "colour")
    if task not in TASKS:
        raise InputError(f"scenes:zeroshot has no task '{task}'{nearest(task, TASKS)}")
    shown = len(TASKS[task].shown)
    size = shown * min(40, 960 // shown) if parsed.size is None else parsed.size
    return SceneLabels(task, *check_settings(size, parsed.seed, parsed.pixels))


def _open(place: Place, config: LabelledConfig) -> SceneLabels:
    refuse_split(config.split, place)
    return open_scenes_zeroshot(place)


FORMAT = Format(
    lambda place: place.split("?")[0].split("/")[0] == "scenes:zeroshot",
    _open,
)
