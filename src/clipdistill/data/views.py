"""One view of an image: which region, mirrored or not, which colour operations; rendered for any model.

A `View` is drawn once, in pixels of the source image, and rendered for each model at its own resolution and
normalisation, so that teacher and student look at the same region. The evaluation view (no box) gives the bits of
open_clip's `image_transform(is_train=False)`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from pydantic import Field, model_validator

from clipdistill.config import Config
from clipdistill.errors import InputError, nearest

if TYPE_CHECKING:
    import torch

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

Triple = tuple[float, float, float]


class ImageSpec(Config):
    """What a model wants to be fed: square size in pixels, normalisation, and how the evaluation view is resized."""

    size: int = Field(default=224, gt=0, le=4096)
    mean: Triple = OPENAI_MEAN
    std: Triple = OPENAI_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"

    @model_validator(mode="after")
    def _positive_std(self) -> ImageSpec:
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0 in every channel, got {self.std}")
        return self


class ViewPolicy(Config):
    """How training views are drawn."""

    kind: Literal["evaluation", "crop"] = "evaluation"
    """The deterministic evaluation view, or random crops with the changes below."""
    scale: tuple[float, float] = (0.9, 1.0)
    """Area of the crop as a fraction of the image, from and to."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of the crop, from and to."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of mirroring."""
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Strength s: brightness, contrast, saturation times [1 - s, 1 + s], hue +- s / 4."""
    randaugment_ops: int = Field(default=0, ge=0, le=16)
    """Operations of RandAugment on each picture (Cubuk et al. 2020)."""
    randaugment_magnitude: int = Field(default=9, ge=0, le=30)
    """Strength of RandAugment's operations."""

    @model_validator(mode="after")
    def _ranges(self) -> ViewPolicy:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be two fractions with 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be two numbers with 0 < low <= high, got {self.ratio}")
        return self

    @property
    def random(self) -> bool:
        """Whether two draws can differ."""
        return self.kind == "crop"


@dataclass(frozen=True)
class View:
    """One view: `box` = (top, left, height, width) in source pixels (None: the evaluation view), mirrored or not,
    colour operations as (name, magnitude) in the order in which they are applied."""

    box: tuple[int, int, int, int] | None = None
    flip: bool = False
    operations: tuple[tuple[str, float], ...] = ()

    def to_json(self) -> list[Any]:
        """[box or null, flip, [[name, magnitude], ...]]."""
        return [list(self.box) if self.box else None, self.flip, [[name, value] for name, value in self.operations]]

    @classmethod
    def from_json(cls, values: Any) -> View:
        """The inverse of `to_json`; InputError when `values` is something else."""
        try:
            box, flip, operations = values
            box = None if box is None else tuple(int(v) for v in box)
            if box is not None and (len(box) != 4 or min(box[0], box[1]) < 0 or min(box[2], box[3]) < 1):
                raise ValueError(f"the box {box} is not (top, left, height, width)")
            drawn = tuple((str(name), float(value)) for name, value in operations)
            if not all(math.isfinite(value) for _, value in drawn):
                raise ValueError("a magnitude is not a finite number")
            return cls(box, bool(flip), drawn)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{values!r:.200} is not a stored view: {error}") from error


EVALUATION_VIEW = View()


def sample_view(policy: ViewPolicy, width: int, height: int, rng: np.random.Generator) -> View:
    """Draw a view of an image of `width` x `height` pixels; the same generator state gives the same view."""
    if policy.kind == "evaluation":
        return EVALUATION_VIEW
    box = _sample_box(policy, width, height, rng)
    flip = bool(rng.random() < policy.flip)
    operations = sample_operations(policy.color_jitter, policy.randaugment_ops, policy.randaugment_magnitude, rng)
    return View(box, flip, operations)


def _sample_box(policy: ViewPolicy, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A region of area and aspect drawn as in Inception's crop (Szegedy et al. 2015): ten tries, then the centre."""
    low, high = math.log(policy.ratio[0]), math.log(policy.ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(*policy.scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            return top, left, h, w
    ratio = min(max(width / height, policy.ratio[0]), policy.ratio[1])
    w = max(1, min(width, round(height * ratio)))
    h = max(1, min(height, round(width / ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


def render(image: Image.Image, view: View, spec: ImageSpec, *, exact: bool = True) -> torch.Tensor:
    """`image` (RGB) as the model sees it: float32 (3, size, size), normalised. See `render_pixels`."""
    import torch  # here and below: describing a view must not wait for it

    return normalise(torch.from_numpy(render_pixels(image, view, spec, exact=exact)), spec)


def render_pixels(image: Image.Image, view: View, spec: ImageSpec, *, exact: bool = True) -> np.ndarray:
    """The view before normalisation: uint8 (size, size, 3). Crop, resize, mirror, colour operations, in this order.

    exact: resize as Pillow does (open_clip's bits). Otherwise by torch's integer kernel, several times faster, whose
    values differ from Pillow's by rounding (mostly 0 or 1 of 255) and may differ between kinds of processors.
    An image decoded at reduced size (images.decode with `at_least`) is understood: the box stays in source pixels.
    """
    box, target, (left, top) = _plan(image, view, spec)
    if exact:
        # Pillow fills what a crop takes from outside with black
        picture = _pillow_resize(image, target, spec.interpolation, box)
        picture = picture.crop((left, top, left + spec.size, top + spec.size))
    else:
        pixels = _window(_torch_resize(image, target, spec.interpolation, box), left, top, spec.size)
        if not view.operations:
            return pixels[:, ::-1] if view.flip else pixels
        picture = Image.fromarray(np.ascontiguousarray(pixels))
    if view.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(apply_operations(picture, view.operations))


def normalise(pixels: torch.Tensor, spec: ImageSpec, out: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 (..., H, W, 3) to float32 (..., 3, H, W): torchvision's ToTensor and Normalize to the bit, anywhere.

    `out` takes the result where it is given.
    """
    import torch

    planes = pixels.movedim(-1, -3)
    if out is None:
        out = torch.empty(planes.shape, dtype=torch.float32, device=pixels.device)
    mean, std, whole = _constants(spec.mean, spec.std, pixels.device)
    # the divisor is a tensor: CUDA would multiply by the reciprocal of a plain number, one bit off
    return out.copy_(planes).div_(whole).sub_(mean).div_(std)


@functools.lru_cache(maxsize=16)
def _constants(mean: Triple, std: Triple, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    def column(values: Triple) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]

    return column(mean), column(std), torch.full((1,), 255.0, device=device)


_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_MOST_PIXELS = (
    1 << 26
)  # a resized picture larger than this is never made: a strip of 1 x 100 000 would become gigabytes

Box = tuple[float, float, float, float]


def _plan(image: Image.Image, view: View, spec: ImageSpec) -> tuple[Box | None, tuple[int, int], tuple[int, int]]:
    """What part of `image` to resize (None: all), to which (width, height), and where the final square begins in that.

    The evaluation view has open_clip's geometry: 'shortest' resizes the shorter side and crops the centre, 'longest'
    resizes the longer one and pads (the square begins outside), 'squash' changes the aspect ratio.
    """
    size, (width, height) = spec.size, image.info.get("source_size", image.size)
    whole = image.info.get("source_box")
    if view.box is not None:
        return _scaled_box(image, view.box), (size, size), (0, 0)
    if spec.resize_mode == "squash":
        return whole, (size, size), (0, 0)
    if spec.resize_mode == "longest":
        ratio = max(height, width) / size
        target = (max(1, round(width / ratio)), max(1, round(height / ratio)))
        return whole, target, (-((size - target[0]) // 2), -((size - target[1]) // 2))
    long = int(size * max(width, height) / min(width, height))
    target = (size, long) if width <= height else (long, size)
    if target[0] * target[1] > _MOST_PIXELS:
        side = min(width, height)
        return _scaled_box(image, ((height - side) // 2, (width - side) // 2, side, side)), (size, size), (0, 0)
    return whole, target, (round((target[0] - size) / 2), round((target[1] - size) / 2))


def _scaled_box(image: Image.Image, box: tuple[int, int, int, int]) -> Box:
    """(left, top, right, bottom) in pixels of `image`, which may have been decoded at reduced size."""
    top, left, height, width = box
    source_width, source_height = image.info.get("source_size", image.size)
    if top < 0 or left < 0 or left + width > source_width or top + height > source_height:
        raise InputError(
            f"the view's box (top {top}, left {left}, {height} x {width}) lies outside the image of "
            f"{source_height} x {source_width}: the view was stored for another image"
        )
    begin_x, begin_y, end_x, end_y = image.info.get("source_box", (0, 0, *image.size))
    x, y = (end_x - begin_x) / source_width, (end_y - begin_y) / source_height
    return begin_x + left * x, begin_y + top * y, begin_x + (left + width) * x, begin_y + (top + height) * y


def _pillow_resize(image: Image.Image, size: tuple[int, int], interpolation: str, box: Box | None) -> Image.Image:
    if box is not None and all(edge == int(edge) for edge in box):
        # a whole-pixel region is cut out first, as torchvision does: its neighbours do not leak into the border
        image, box = image.crop(tuple(int(edge) for edge in box)), None  # type: ignore[arg-type]
    if box is None and image.size == size:
        return image
    return image.resize(size, _FILTERS[interpolation], box)


def _torch_resize(image: Image.Image, size: tuple[int, int], interpolation: str, box: Box | None) -> np.ndarray:
    """The resized pixels (height, width, 3), read-only where they are the image's own."""
    import torch

    pixels = _pixels_of(image)
    if box is not None:
        # whole pixels only: of a picture decoded at reduced size, a view may shift by half a pixel
        left, top = min(round(box[0]), image.width - 1), min(round(box[1]), image.height - 1)
        right, bottom = max(left + 1, round(box[2])), max(top + 1, round(box[3]))
        pixels = pixels[top:bottom, left:right]
    if pixels.shape[:2] != size[::-1]:
        planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        planes = torch.nn.functional.interpolate(planes, size=size[::-1], mode=interpolation, antialias=True)
        pixels = planes[0].permute(1, 2, 0).numpy()
    return pixels[:, :, :3]


# the view of Pillow's memory below is only read
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)


def _pixels_of(image: Image.Image) -> np.ndarray:
    """uint8 (height, width, 4) that is Pillow's own memory (the fourth value is unused), else a copy with 3 values."""
    if hasattr(image, "__arrow_c_array__"):  # Pillow 11.2 and later
        import pyarrow as pa

        try:
            buffer = pa.array(image).buffers()[-1]
            return np.frombuffer(buffer, dtype=np.uint8).reshape(image.height, image.width, 4)
        except ValueError:
            pass  # a large image in several blocks of memory
    return np.array(image)


def _window(pixels: np.ndarray, left: int, top: int, size: int) -> np.ndarray:
    """The square of `size` that begins at (left, top), black where it reaches outside."""
    height, width = pixels.shape[:2]
    if left >= 0 and top >= 0 and left + size <= width and top + size <= height:
        return pixels[top : top + size, left : left + size]
    square = np.zeros((size, size, 3), dtype=np.uint8)
    square[-top : height - top, -left : width - left] = pixels
    return square


# --- operations on a rendered picture: drawn and applied apart, so that teacher and student get the same ones

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
