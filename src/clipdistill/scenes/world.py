"""What the built-in `scenes` pictures are made of, and how one is composed.

A scene is one to four flat shapes on a background. Every shape has a colour, a texture, a size and a place; pairs may
overlap or lie one inside the other. A scene is a pure function of (seed, split, index), and of nothing else: neither
the number of samples, nor the picture size, nor the order of access changes it.

Some (shape, colour) and (shape, texture) pairs never occur in the splits `train` and `val` (`held_out_colours`,
`held_out_textures`), so that recognising them is honest zero-shot work; `test` draws from all pairs.

Lengths are fractions of the picture's side; x runs right and y runs down.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

Colour = tuple[int, int, int]
Looks = tuple[str, str, str]
"""Shape, colour and texture of one thing."""
Item = TypeVar("Item")

WORLD_VERSION = 1
"""Part of every seed and fingerprint: a change of what a (seed, split, index) shows must raise it."""

SPLITS = ("train", "val", "test")
TABLES: dict[str, Any] = json.loads(resources.files("clipdistill.scenes").joinpath("world.json").read_text("utf-8"))


def _palette(name: str) -> dict[str, Colour]:
    return {key: (rgb[0], rgb[1], rgb[2]) for key, rgb in TABLES[name].items()}


SHAPES: tuple[str, ...] = tuple(TABLES["shapes"])
COLOURS = _palette("colours")
SECOND_COLOURS = _palette("second_colours")
"""The second colour of a textured thing: a darker or lighter one of the same hue, on under half of its area."""
TEXTURES: tuple[str, ...] = tuple(TABLES["textures"])
SIZES: dict[str, tuple[float, float]] = {name: (low, high) for name, (low, high) in TABLES["sizes"].items()}
"""Radius of the disc around a shape; the gaps between the classes keep "small" and "large" beyond dispute."""
BACKGROUNDS: dict[str, tuple[Colour, ...]] = {
    name: tuple((rgb[0], rgb[1], rgb[2]) for rgb in colours) for name, colours in TABLES["backgrounds"].items()
}
"""Every background with the colours that a shape on it must stand out from: flat ones, from one colour to another
("a to b"), surfaces and outdoors."""
CORES: dict[str, float] = TABLES["cores"]
"""Shapes full enough to overlap another recognisably, with the radius of a disc about the centre that lies inside."""
HOSTS: dict[str, float] = TABLES["hosts"]
"""Shapes that may hold a small one, with the radius of the room inside them (for the ring: its hole)."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape of a scene. `x`, `y`, `radius`: fractions of the picture's side; `angle`: radians."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in drawing order (later ones lie on top); `inside` and `in_front` are pairs of indices into `things`."""

    background: str
    things: tuple[Thing, ...]
    inside: tuple[tuple[int, int], ...] = ()
    in_front: tuple[tuple[int, int], ...] = ()

    def description(self) -> tuple[object, ...]:
        """What can be said of the scene in words, as one hashable value: two scenes with the same are not told apart.

        Attributes, the cell of a 3 x 3 grid each thing lies in, nesting and overlap, background.
        """
        things = tuple((t.shape, t.colour, t.texture, t.size, int(t.x * 3), int(t.y * 3)) for t in self.things)
        order = sorted(range(len(things)), key=things.__getitem__)
        rank = {index: place for place, index in enumerate(order)}
        pairs = [sorted((rank[a], rank[b]) for a, b in of) for of in (self.inside, self.in_front)]
        return (self.background, tuple(sorted(things)), *(tuple(p) for p in pairs))


class Dice:
    """Random draws that depend on their name alone, and stay the same on every Python version and platform.

    Only `random.Random.random` is used: its sequence for an integer seed is a documented guarantee.
    """

    def __init__(self, *name: object) -> None:
        text = "/".join(str(part) for part in ("scenes", WORLD_VERSION, *name))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        self.random = random.Random(int.from_bytes(digest, "big")).random

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.random() < probability

    def below(self, n: int) -> int:
        """An integer in 0..n-1."""
        return int(self.random() * n)

    def pick(self, items: Sequence[Item]) -> Item:
        """One of the items, each equally likely."""
        return items[int(self.random() * len(items))]

    def between(self, low: float, high: float) -> float:
        """A number between the two, uniformly."""
        return low + (high - low) * self.random()

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """The items in random order."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result


def held_out_colours(shape: str) -> tuple[str, str]:
    """The two colours in which this shape never occurs in `train` and `val`; each colour is held out of two shapes."""
    k, names = SHAPES.index(shape), tuple(COLOURS)
    return names[(5 * k + 1) % 12], names[(7 * k + 4) % 12]


def held_out_texture(shape: str) -> str:
    """The texture in which this shape never occurs in `train` and `val`; each texture is held out of two shapes."""
    return TEXTURES[(SHAPES.index(shape) * 5 + 2) % 6]


def _distance(a: Colour, b: Colour) -> float:
    """How different two colours look: the "redmean" weighting of RGB differences, 0..765."""
    mean_red = (a[0] + b[0]) / 2
    weights = (2 + mean_red / 256, 4.0, 2 + (255 - mean_red) / 256)
    return math.sqrt(sum(w * (x - y) ** 2 for w, x, y in zip(weights, a, b)))


_STANDS_OUT = {
    background: tuple(name for name, rgb in COLOURS.items() if all(_distance(rgb, other) > 150 for other in palette))
    for background, palette in BACKGROUNDS.items()
}


def colours_on(background: str) -> tuple[str, ...]:
    """The colours that stand out from a background; no thing on it has another one."""
    return _STANDS_OUT[background]


def sample_scene(seed: int, split: str, index: int) -> Scene:
    """Scene number `index` of a split (`train`, `val`, `test`): a pure function of its arguments."""
    return compose(Dice("scene", seed, split, index), everything=split == "test")


def compose(
    dice: Dice, *, everything: bool, count: int | None = None, background: str | None = None, looks: Looks | None = None
) -> Scene:
    """One scene from the dice.

    Args:
        dice: where the draws come from.
        everything: draw from all pairs of attributes, held-out ones too.
        count: number of things; None draws 1 to 4.
        background: its name; None draws one (on which the given `looks` stand out).
        looks: (shape, colour, texture) of the first thing, instead of a draw.
    """
    if background is None:
        names = tuple(BACKGROUNDS)
        background = dice.pick(names)
        while looks is not None and looks[1] not in _STANDS_OUT[background]:
            background = dice.pick(names)
    if count is None:
        roll = dice.random()
        count = 1 if roll < 0.18 else 2 if roll < 0.53 else 3 if roll < 0.82 else 4
    kinds: list[Looks] = [looks] if looks is not None else []
    while len(kinds) < count:
        kind = _draw_looks(dice, background, everything)
        if all(kind[:2] != other[:2] for other in kinds):
            kinds.append(kind)

    arrangement = dice.random()
    # things that lie on one another differ in colour, so that both stay visible
    pairs = [(a, b) for a in kinds for b in kinds if a[1] != b[1]]
    if arrangement < 0.4:
        pairs = [(outer, inner) for outer, inner in pairs if outer[0] in HOSTS]
        if pairs:
            return _nested(dice, background, kinds, dice.pick(pairs))
    elif arrangement < 0.75:
        pairs = [(back, front) for back, front in pairs if back[0] in CORES and front[0] in CORES]
        if pairs:
            return _overlapping(dice, background, kinds, dice.pick(pairs))
    return Scene(background, tuple(_scatter(dice, kinds, [])))


def _draw_looks(dice: Dice, background: str, everything: bool) -> Looks:
    """(shape, colour, texture) of one thing that stands out from the background."""
    shape = dice.pick(SHAPES)
    forbidden = () if everything else held_out_colours(shape)
    colour = dice.pick([c for c in _STANDS_OUT[background] if c not in forbidden])
    textures = [t for t in TEXTURES if everything or t != held_out_texture(shape)]
    # plain about twice as often as any other texture
    texture = "plain" if "plain" in textures and dice.chance(0.15) else dice.pick(textures)
    return shape, colour, texture


def _thing(looks: Looks, size: str, x: float, y: float, radius: float, dice: Dice) -> Thing:
    shape, colour, texture = looks
    turn = {"arrow": math.pi / 2, "semicircle": math.pi / 2, "crescent": math.pi / 4}.get(shape, 0.0)
    tilt = 0.1 if shape in ("diamond", "square", "cross") else 0.25
    angle = dice.between(-tilt, tilt) + (turn * dice.below(8) if turn else 0.0)
    return Thing(shape, colour, texture, size, x, y, radius, angle)


def _nested(dice: Dice, background: str, kinds: list[Looks], pair: tuple[Looks, Looks]) -> Scene:
    """A large host with a small thing in it; the others are scattered around."""
    outer_radius = dice.between(0.24, SIZES["large"][1])
    inner_radius = dice.between(*SIZES["small"])
    x, y = (dice.between(outer_radius + 0.02, 0.98 - outer_radius) for _ in range(2))
    slack = max(0.0, HOSTS[pair[0][0]] * outer_radius - inner_radius)
    turn, away = dice.between(0, 2 * math.pi), dice.between(0, slack)
    outer = _thing(pair[0], "large", x, y, outer_radius, dice)
    inner = _thing(pair[1], "small", x + away * math.cos(turn), y + away * math.sin(turn), inner_radius, dice)
    rest = _scatter(dice, [k for k in kinds if k not in pair], [outer])
    return Scene(background, (outer, *rest, inner), inside=((1 + len(rest), 0),))


def _overlapping(dice: Dice, background: str, kinds: list[Looks], pair: tuple[Looks, Looks]) -> Scene:
    """Two things of which the second covers a part of the first; the others are scattered around."""
    sizes = [dice.pick(("medium", "large")), dice.pick(("small", "medium"))]
    radii = [dice.between(*SIZES[size]) for size in sizes]
    cores = [CORES[looks[0]] * radius for looks, radius in zip(pair, radii)]
    # near enough that the cores overlap, so the shapes certainly do; else as far as that, to leave the back one visible
    apart = min(max(0.85 * sum(cores), 0.75 * radii[0]), 0.95 * sum(cores))
    while True:
        x, y = (dice.between(radii[0] + 0.02, 0.98 - radii[0]) for _ in range(2))
        turn = dice.between(0, 2 * math.pi)
        front_x, front_y = x + apart * math.cos(turn), y + apart * math.sin(turn)
        if all(radii[1] + 0.02 <= v <= 0.98 - radii[1] for v in (front_x, front_y)):
            break
    back = _thing(pair[0], sizes[0], x, y, radii[0], dice)
    front = _thing(pair[1], sizes[1], front_x, front_y, radii[1], dice)
    rest = _scatter(dice, [k for k in kinds if k not in pair], [back, front])
    return Scene(background, (back, *rest, front), in_front=((1 + len(rest), 0),))


def _scatter(dice: Dice, kinds: Sequence[Looks], placed: Sequence[Thing]) -> list[Thing]:
    """Things at free places, none touching another; one that finds no room even when small is left out."""
    result: list[Thing] = []
    for looks in kinds:
        crowded = len(kinds) + len(placed) > 2 or any(t.size == "large" for t in (*placed, *result))
        size = dice.pick(("small", "medium") if crowded else ("small", "medium", "large"))
        for attempt in range(48):
            if attempt == 24:
                size = "small"
            radius = dice.between(*SIZES[size])
            x, y = dice.between(radius + 0.02, 0.98 - radius), dice.between(radius + 0.02, 0.98 - radius)
            if all(math.hypot(t.x - x, t.y - y) > t.radius + radius + 0.03 for t in (*placed, *result)):
                result.append(_thing(looks, size, x, y, radius, dice))
                break
    return result
