"""Operations on a rendered picture: colour jitter and RandAugment, each one a name and a magnitude that can be stored.

Drawing and applying are apart: a drawn operation applied to the same picture gives the same bits, so a stored view can
be rendered again, and teacher and student get the same operation at their own resolution (shifts are fractions
of the size).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from clipdistill.errors import InputError, nearest

FILL = (128, 128, 128)  # what geometric operations uncover
_BINS = 30  # RandAugment's magnitudes 0 to 30


def _affine(picture: Image.Image, coefficients: Sequence[float]) -> Image.Image:
    return picture.transform(
        picture.size, Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BILINEAR, fillcolor=FILL
    )


def _shear_x(picture: Image.Image, slope: float) -> Image.Image:
    return _affine(picture, (1, slope, -slope * picture.height / 2, 0, 1, 0))


def _shear_y(picture: Image.Image, slope: float) -> Image.Image:
    return _affine(picture, (1, 0, 0, slope, 1, -slope * picture.width / 2))


def _rotate(picture: Image.Image, degrees: float) -> Image.Image:
    return picture.rotate(degrees, resample=Image.Resampling.BILINEAR, fillcolor=FILL)


def _hue(picture: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = picture.convert("HSV").split()
    shifted = np.asarray(hue).astype(np.int16) + round(turn * 255)
    hue = Image.fromarray((shifted % 256).astype(np.uint8))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


_OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": lambda picture, factor: ImageEnhance.Brightness(picture).enhance(factor),
    "contrast": lambda picture, factor: ImageEnhance.Contrast(picture).enhance(factor),
    "saturation": lambda picture, factor: ImageEnhance.Color(picture).enhance(factor),
    "sharpness": lambda picture, factor: ImageEnhance.Sharpness(picture).enhance(factor),
    "hue": _hue,
    "posterize": lambda picture, bits: ImageOps.posterize(picture, int(bits)),
    "solarize": lambda picture, threshold: ImageOps.solarize(picture, round(threshold)),
    "autocontrast": lambda picture, _: ImageOps.autocontrast(picture),
    "equalize": lambda picture, _: ImageOps.equalize(picture),
    "rotate": _rotate,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": lambda picture, part: _affine(picture, (1, 0, part * picture.width, 0, 1, 0)),
    "translate_y": lambda picture, part: _affine(picture, (1, 0, 0, 0, 1, part * picture.height)),
}

# how RandAugment turns a magnitude m in [0, 1] into each operation's own unit; the sign is drawn for the first group
_SIGNED: dict[str, Callable[[float], float]] = {
    "shear_x": lambda m: 0.3 * m,
    "shear_y": lambda m: 0.3 * m,
    "translate_x": lambda m: 0.45 * m,
    "translate_y": lambda m: 0.45 * m,
    "rotate": lambda m: 30 * m,
    "brightness": lambda m: 0.9 * m,
    "saturation": lambda m: 0.9 * m,
    "contrast": lambda m: 0.9 * m,
    "sharpness": lambda m: 0.9 * m,
}
_UNSIGNED: dict[str, Callable[[float], float]] = {
    "posterize": lambda m: 8 - round(4 * m),
    "solarize": lambda m: 255 * (1 - m),
    "autocontrast": lambda m: 0.0,
    "equalize": lambda m: 0.0,
}
_FACTORS = ("brightness", "saturation", "contrast", "sharpness")  # 1 leaves the picture as it is
_RANDAUGMENT = ("identity", *_SIGNED, *_UNSIGNED)


def sample_operations(
    color_jitter: float, randaugment_ops: int, randaugment_magnitude: int, rng: np.random.Generator
) -> tuple[tuple[str, float], ...]:
    """Draw the operations of one view: colour jitter of strength `color_jitter` in random order, then RandAugment."""
    drawn: list[tuple[str, float]] = []
    if color_jitter > 0:
        factors = {name: rng.uniform(1 - color_jitter, 1 + color_jitter) for name in _FACTORS[:3]}
        factors["hue"] = rng.uniform(-color_jitter, color_jitter) / 4
        names = tuple(factors)
        drawn.extend((names[i], float(factors[names[i]])) for i in np.argsort(rng.random(len(names)), kind="stable"))
    strength = randaugment_magnitude / _BINS
    for _ in range(randaugment_ops):
        name = _RANDAUGMENT[int(rng.integers(len(_RANDAUGMENT)))]
        sign = 1.0 if rng.random() < 0.5 else -1.0
        if name in _SIGNED:
            drawn.append((name, sign * _SIGNED[name](strength) + (name in _FACTORS)))
        elif name in _UNSIGNED:
            drawn.append((name, float(_UNSIGNED[name](strength))))
    return tuple(drawn)


def apply_operations(picture: Image.Image, operations: Sequence[tuple[str, float]]) -> Image.Image:
    """`picture` (RGB) after the operations in order. InputError for an unknown name (a stored view may be damaged)."""
    for name, magnitude in operations:
        if name not in _OPERATIONS:
            raise InputError(f"unknown image operation '{name}'{nearest(name, _OPERATIONS)}")
        picture = _OPERATIONS[name](picture, magnitude)
    return picture
