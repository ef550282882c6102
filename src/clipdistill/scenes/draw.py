"""Draws a scene of the built-in `scenes` set, anti-aliased, with numpy and Pillow.

Shapes are polygons filled at four times the resolution and averaged down; textures are masks made the same way.
Everything is in fractions of the picture's side, so a larger picture shows the same scene in more detail.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from clipdistill.scenes.backgrounds import Canvas, paint_background
from clipdistill.scenes.world import COLOURS, HOSTS, SECOND_COLOURS, SHAPES, TABLES, Colour, Dice, Scene, Thing

OVERSAMPLING = 4


def _regular(corners: int, turn: float, inner: float | None = None) -> list[tuple[float, float]]:
    """Corners of a regular polygon on the unit circle; with `inner`, of a star whose notches lie at that radius."""
    steps = corners if inner is None else 2 * corners
    radii = [1.0 if inner is None or k % 2 == 0 else inner for k in range(steps)]
    return [
        (r * math.cos(turn + 2 * math.pi * k / steps), r * math.sin(turn + 2 * math.pi * k / steps))
        for k, r in enumerate(radii)
    ]


def _heart() -> list[tuple[float, float]]:
    """The classical heart curve, scaled into the unit disc."""
    points = []
    for k in range(40):
        t = 2 * math.pi * k / 40
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 16.6, -(y + 2.5) / 16.6))
    return points


def _crescent() -> list[tuple[float, float]]:
    """A disc less a shifted smaller one; horns up and down, belly to the left, moved so that its mass is centred."""
    shift, bite = 0.46, 0.8
    horn_x = (1 + shift**2 - bite**2) / (2 * shift)
    horn_y = math.sqrt(1 - horn_x**2)
    outer, inner = math.atan2(horn_y, horn_x), math.atan2(horn_y, horn_x - shift)
    there = (outer + k * 2 * (math.pi - outer) / 36 for k in range(37))
    back = (2 * math.pi - inner - k * 2 * (math.pi - inner) / 28 for k in range(29))
    points = [(math.cos(a), math.sin(a)) for a in there]
    points += [(shift + bite * math.cos(a), bite * math.sin(a)) for a in back]
    return [(0.9 * (x + 0.3), 0.9 * y) for x, y in points]


_CURVES: dict[str, list[tuple[float, float]]] = {
    "circle": _regular(36, 0.0),
    "star": _regular(5, -math.pi / 2, 0.46),
    "heart": _heart(),
    "ring": _regular(36, 0.0),
    "crescent": _crescent(),
    "hexagon": _regular(6, 0.0),
    "semicircle": [(0.95 * math.cos(math.pi * k / 24), 0.45 - 0.95 * math.sin(math.pi * k / 24)) for k in range(25)],
}
OUTLINES: dict[str, NDArray[np.float64]] = {
    name: np.array(_CURVES[name] if name in _CURVES else TABLES["outlines"][name]) for name in SHAPES
}
"""Corners of every shape at angle 0 for radius 1; all lie within REACH of the centre."""
REACH = 1.1


def draw_scene(scene: Scene, pixels: int, dice: Dice) -> Image.Image:
    """An RGB picture of (pixels, pixels). The dice give what captions never speak of: texture phase, light, grain."""
    canvas = Canvas(pixels, dice)
    paint_background(canvas, scene.background)
    for thing in scene.things:
        _draw_thing(canvas, thing)
    return _expose(canvas)


def _draw_thing(canvas: Canvas, thing: Thing) -> None:
    """Paint one thing over the picture, with a thin darker edge so that it stands out from what lies behind."""
    pixels = canvas.pixels
    edge = 0.012 * pixels
    reach = math.ceil(thing.radius * pixels * REACH + edge) + 1
    left, top = int(thing.x * pixels) - reach, int(thing.y * pixels) - reach
    patch = _Patch(
        side=2 * reach + 1,
        x=(thing.x * pixels - left) * OVERSAMPLING,
        y=(thing.y * pixels - top) * OVERSAMPLING,
        radius=thing.radius * pixels * OVERSAMPLING,
        period=(0.05 + 0.15 * thing.radius) * pixels * OVERSAMPLING,
    )
    base = COLOURS[thing.colour]
    rim: Colour = (84, 84, 88) if thing.colour == "black" else (base[0] * 2 // 5, base[1] * 2 // 5, base[2] * 2 // 5)
    canvas.image.paste(rim, (left, top), _mask(thing, patch, edge * OVERSAMPLING))
    body = _mask(thing, patch, 0.0)
    if thing.texture == "plain":
        canvas.image.paste(base, (left, top), body)
    else:
        surface = Image.new("RGB", (patch.side, patch.side), base)
        surface.paste(SECOND_COLOURS[thing.colour], (0, 0), _TEXTURES[thing.texture](patch, canvas.dice))
        canvas.image.paste(surface, (left, top), body)


class _Patch(NamedTuple):
    """A square around one thing: `side` in pixels; the rest in oversampled pixels, counted from its corner."""

    side: int
    x: float
    y: float
    radius: float
    period: float

    def blank(self) -> Image.Image:
        return Image.new("L", (self.side * OVERSAMPLING, self.side * OVERSAMPLING))


def _mask(thing: Thing, patch: _Patch, grow: float) -> Image.Image:
    """How much of each pixel of the patch the shape, thickened by `grow`, covers: 0..255."""
    fine = patch.blank()
    pen = ImageDraw.Draw(fine)
    pen.polygon(_place(OUTLINES[thing.shape], thing.angle, patch, patch.radius + grow), fill=255)
    if thing.shape == "ring":
        pen.polygon(_place(OUTLINES["ring"], thing.angle, patch, HOSTS["ring"] * patch.radius - grow), fill=0)
    return fine.reduce(OVERSAMPLING)


def _place(outline: NDArray[np.float64], angle: float, patch: _Patch, radius: float) -> list[float]:
    """The outline's corners in the patch, as x, y, x, y, ..."""
    cosine, sine = radius * math.cos(angle), radius * math.sin(angle)
    return (outline @ np.array([[cosine, sine], [-sine, cosine]]) + (patch.x, patch.y)).ravel().tolist()


def _stripes(patch: _Patch, dice: Dice) -> Image.Image:
    """Parallel bars, upright, level or slanting."""
    fine = patch.blank()
    pen = ImageDraw.Draw(fine)
    angle = dice.below(4) * math.pi / 4 + dice.between(-0.1, 0.1)
    step, phase, length = patch.period * 1.15, dice.random(), 1.5 * patch.radius
    along, across = (math.cos(angle) * length, math.sin(angle) * length), (-math.sin(angle), math.cos(angle))
    count = int(length / step) + 1
    for k in range(-count, count + 1):
        x, y = (origin + (k + phase) * step * unit for origin, unit in zip((patch.x, patch.y), across))
        line = (x - along[0], y - along[1], x + along[0], y + along[1])
        pen.line(line, fill=255, width=max(1, round(0.45 * step)))
    return fine.reduce(OVERSAMPLING)


def _dots(patch: _Patch, dice: Dice) -> Image.Image:
    """Round dots in rows, every other row shifted by half a step."""
    fine = patch.blank()
    pen = ImageDraw.Draw(fine)
    step, dot = patch.period * 1.1, patch.period * 0.36
    phase_x, phase_y = dice.random(), dice.random()
    count = int(1.1 * patch.radius / step) + 1
    for row in range(-count, count + 1):
        y = patch.y + (row + phase_y - 0.5) * step
        for column in range(-count, count + 1):
            x = patch.x + (column + phase_x - 0.5 + row % 2 / 2) * step
            pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=255)
    return fine.reduce(OVERSAMPLING)


def _checks(patch: _Patch, dice: Dice) -> Image.Image:
    """A chessboard."""
    fine = patch.blank()
    pen = ImageDraw.Draw(fine)
    step = patch.period * 0.8
    phase_x, phase_y = dice.random(), dice.random()
    count = int(1.1 * patch.radius / step) + 2
    for row in range(-count, count):
        top = patch.y + (row + phase_y) * step
        for column in range(-count + row % 2, count, 2):
            left = patch.x + (column + phase_x) * step
            pen.rectangle((left, top, left + step - 1, top + step - 1), fill=255)
    return fine.reduce(OVERSAMPLING)


def _bands(patch: _Patch, dice: Dice) -> Image.Image:
    """Concentric rings about the middle."""
    fine = patch.blank()
    pen = ImageDraw.Draw(fine)
    step = patch.period * 1.15
    radius = (int(1.1 * patch.radius / step) + dice.between(0.2, 0.8)) * step
    while radius > 0:
        for edge, value in ((radius, 255), (radius - 0.45 * step, 0)):
            if edge > 0:
                pen.ellipse((patch.x - edge, patch.y - edge, patch.x + edge, patch.y + edge), fill=value)
        radius -= step
    return fine.reduce(OVERSAMPLING)


def _shade(patch: _Patch, dice: Dice) -> Image.Image:
    """From the first colour to the second, over the whole width, in one of eight directions."""
    return _ramps()[dice.below(8)].resize((patch.side, patch.side), Image.Resampling.BILINEAR)


@functools.cache
def _ramps() -> list[Image.Image]:
    """Eight ramps from 0 to 255, the first colour on the larger part."""
    axis = np.linspace(-1, 1, 64)
    result = []
    for k in range(8):
        slope = math.cos(k * math.pi / 4) * axis[None, :] + math.sin(k * math.pi / 4) * axis[:, None]
        result.append(Image.fromarray((255 * np.clip(0.38 + 0.75 * slope, 0, 1)).astype(np.uint8)))
    return result


_TEXTURES: dict[str, Callable[[_Patch, Dice], Image.Image]] = {
    "striped": _stripes,
    "dotted": _dots,
    "checked": _checks,
    "banded": _bands,
    "shaded": _shade,
}


@functools.cache
def _grain() -> NDArray[np.float32]:
    """A tile of noise, -4..4 grey values, that repeats every 128 pixels."""
    raw = np.random.PCG64(20240229).random_raw(128 * 128 // 8)
    values = raw.view(np.uint8).reshape(128, 128).astype(np.float64)
    return ((values / 255 - 0.5) * 8).astype(np.float32)


def _expose(canvas: Canvas) -> Image.Image:
    """The picture a little darker or lighter, with camera-like grain from a random place of one fixed tile."""
    dice, tile = canvas.dice, _grain()
    rows = (np.arange(canvas.pixels) + dice.below(128)) % 128
    columns = (np.arange(canvas.pixels) + dice.below(128)) % 128
    pixels = np.asarray(canvas.image, dtype=np.float32) * np.float32(dice.between(0.9, 1.05))
    pixels += tile[rows[:, None], columns[None, :]][:, :, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
