"""Paints the backgrounds of the built-in `scenes` pictures: flat colours, ramps, surfaces, outdoors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from clipdistill.scenes.world import BACKGROUNDS, Colour, Dice

Palette = tuple[Colour, ...]
# grey value -> opacity: clouds only where the noise is high; specks only where it is very high
_CLOUDS = [min(255, max(0, (value - 110) * 4)) for value in range(256)]
_SPECKS = [min(255, max(0, (value - 170) * 2)) for value in range(256)]


class Canvas:
    """A picture being painted: its side in pixels, the dice, and a source of noise that follows from the dice."""

    def __init__(self, pixels: int, dice: Dice) -> None:
        self.pixels = pixels
        self.dice = dice
        # only raw bits are used: unlike numpy's distributions, they are the same in every version
        self._bits = np.random.PCG64(dice.below(2**32))
        self.image = Image.new("RGB", (pixels, pixels))

    def noise(self, columns: int, rows: int, size: tuple[int, int], smooth: bool = True) -> Image.Image:
        """Random grey values on a (columns, rows) grid, stretched to `size`."""
        values = self._bits.random_raw((columns * rows + 7) // 8).tobytes()[: columns * rows]
        grid = Image.frombytes("L", (columns, rows), values)
        return grid.resize(size, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)

    def jitter(self, colour: Colour, amount: int = 6) -> Colour:
        """The colour, a little lighter or darker."""
        change = self.dice.below(2 * amount + 1) - amount
        red, green, blue = (min(255, max(0, channel + change)) for channel in colour)
        return red, green, blue

    def fill(self, colour: Colour, box: tuple[int, int, int, int] | None = None) -> None:
        """Paint a region, or everything, in one colour."""
        self.image.paste(colour, box or (0, 0, self.pixels, self.pixels))


def paint_background(canvas: Canvas, name: str) -> None:
    """Paint the background `name` over the whole canvas."""
    palette = BACKGROUNDS[name]
    painter = _PAINTERS.get(name)
    if painter is not None:
        painter(canvas, palette)
    elif " to " in name:
        _ramp(canvas, palette)
    else:
        canvas.fill(canvas.jitter(palette[0]))


def _ramp(canvas: Canvas, palette: Palette) -> None:
    """From the first colour to the second, downwards, upwards or sideways."""
    side = canvas.pixels
    ramp = Image.linear_gradient("L").resize((side, side), Image.Resampling.BILINEAR)
    turn = canvas.dice.below(4)
    if turn:
        ramp = ramp.transpose(
            (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)[turn - 1]
        )
    canvas.fill(palette[0])
    canvas.image.paste(palette[1], (0, 0), ramp)


def _bricks(canvas: Canvas, palette: Palette) -> None:
    side = canvas.pixels
    canvas.fill(palette[1])
    pen = ImageDraw.Draw(canvas.image)
    height, width, joint = 0.125 * side, 0.25 * side, max(1, round(0.016 * side))
    start_x, start_y = canvas.dice.random() * width, canvas.dice.random() * height
    for row in range(-1, 9):
        top = row * height + start_y
        for column in range(-2, 5):
            left = column * width + start_x + (row % 2) * width / 2
            if left < side and left + width > 0 and top < side:
                box = (int(left), int(top), int(left + width) - joint - 1, int(top + height) - joint - 1)
                pen.rectangle(box, fill=canvas.jitter(palette[0], 12))


def _wood(canvas: Canvas, palette: Palette) -> None:
    side = canvas.pixels
    canvas.fill(palette[0])
    canvas.image.paste(palette[1], (0, 0), canvas.noise(3, 28, (side, side)))
    pen = ImageDraw.Draw(canvas.image)
    start = canvas.dice.random() * 0.25
    for plank in range(4):
        y = int((start + plank * 0.25) * side)
        pen.line((0, y, side, y), fill=(84, 52, 26), width=max(1, side // 64))


def _sand(canvas: Canvas, palette: Palette, top: int = 0) -> None:
    side = canvas.pixels
    canvas.fill(canvas.jitter(palette[0]), (0, top, side, side))
    specks = canvas.noise(48, 48, (side, side - top), smooth=False).point(_SPECKS)
    canvas.image.paste((190, 160, 106), (0, top), specks)


def _grass(canvas: Canvas, palette: Palette, top: int = 0) -> None:
    side = canvas.pixels
    canvas.fill(palette[0], (0, top, side, side))
    canvas.image.paste(palette[1], (0, top), canvas.noise(48, 12, (side, side - top)))


def _water(canvas: Canvas, palette: Palette) -> None:
    side = canvas.pixels
    canvas.fill(palette[0])
    canvas.image.paste(palette[1], (0, 0), canvas.noise(7, 22, (side, side)).point(_CLOUDS))


def _night(canvas: Canvas, palette: Palette) -> None:
    side, dice = canvas.pixels, canvas.dice
    canvas.fill(canvas.jitter(palette[0], 4))
    pen = ImageDraw.Draw(canvas.image)
    for _ in range(26):
        x, y = dice.below(side), dice.below(side)
        spread = dice.below(2) * side // 64
        light = 150 + dice.below(100)
        pen.rectangle((x, y, x + spread, y + max(0, side // 64 - 1)), fill=(light, light, light - 20))


def _sky(canvas: Canvas, palette: Palette) -> None:
    side = canvas.pixels
    canvas.fill(palette[0])
    clouds = canvas.noise(5, 7, (side, side)).point(_CLOUDS)
    canvas.image.paste((238, 242, 250), (0, 0), clouds)


def _tiles(canvas: Canvas, palette: Palette) -> None:
    side = canvas.pixels
    canvas.fill(palette[0])
    pen = ImageDraw.Draw(canvas.image)
    step = side / 5
    start_x, start_y = (canvas.dice.random() * step for _ in range(2))
    for row in range(-1, 5):
        for column in range(-1, 5):
            left, top = int(column * step + start_x), int(row * step + start_y)
            fill = palette[(row + column) % 2]
            pen.rectangle((left, top, int(left + step), int(top + step)), fill=fill, outline=(140, 146, 148))


def _paper(canvas: Canvas, palette: Palette) -> None:
    side = canvas.pixels
    canvas.fill(palette[0])
    pen = ImageDraw.Draw(canvas.image)
    step = side / 9
    start_x, start_y = (canvas.dice.random() * step for _ in range(2))
    for k in range(9):
        x, y = int(start_x + k * step), int(start_y + k * step)
        pen.line((x, 0, x, side), fill=(160, 196, 232), width=max(1, side // 64))
        pen.line((0, y, side, y), fill=(160, 196, 232), width=max(1, side // 64))


def _meadow(canvas: Canvas, palette: Palette) -> None:
    horizon = int(canvas.dice.between(0.42, 0.6) * canvas.pixels)
    canvas.fill(palette[0])
    _grass(canvas, BACKGROUNDS["grass"], top=horizon)


def _beach(canvas: Canvas, palette: Palette) -> None:
    side = canvas.pixels
    shore = int(canvas.dice.between(0.52, 0.66) * side)
    canvas.fill(palette[0])
    canvas.fill(palette[2], (0, shore - round(0.16 * side), side, shore))
    _sand(canvas, palette[1:2], top=shore)


_PAINTERS: dict[str, Callable[[Canvas, Palette], None]] = {
    "brick wall": _bricks,
    "wooden board": _wood,
    "sand": _sand,
    "grass": _grass,
    "water": _water,
    "night sky": _night,
    "cloudy sky": _sky,
    "tiled floor": _tiles,
    "graph paper": _paper,
    "meadow": _meadow,
    "beach": _beach,
}
