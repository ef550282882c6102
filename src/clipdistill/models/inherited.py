"""How an inherited student is named: `inherit:` and what of the teacher it keeps.

inherit:all                                         every layer and channel of the teacher
inherit:ViT-39M/16+19M                              a published configuration of TinyCLIP
inherit:ViT-T-16                                    the sizes of any registered student or open_clip architecture
inherit:layers=6,width=384,text_layers=6,text_width=256,embed=256
inherit:ViT-39M/16+19M,depth=even,channels=importance,from=ViT-B-16/laion400m_e32

Keys: layers, width, heads, mlp (units of each MLP) of the image tower, the same with text_ before them for the text
tower, embed (the joint embedding). What is not named stays as in the teacher, and heads and MLP units follow their
tower's width. A ResNet's layers are written 3-4-6-3. `depth` is released (the default) or even, `channels` leading (the
default) or importance; `weights=random` takes the sizes alone, the control experiment of every inheritance. `from`
names the model to inherit from and comes last; without it that is the run's teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clipdistill.errors import InputError, listed, nearest
from clipdistill.models.known import architecture_values, known_architectures, near

PREFIX = "inherit:"
PUBLISHED = {
    "ViT-8M/16+3M": "TinyCLIP-ViT-8M-16-Text-3M",
    "ViT-39M/16+19M": "TinyCLIP-ViT-39M-16-Text-19M",
    "ViT-40M/32+19M": "TinyCLIP-ViT-40M-32-Text-19M",
    "ViT-61M/32+29M": "TinyCLIP-ViT-61M-32-Text-29M",
    "RN-19M+19M": "TinyCLIP-ResNet-19M-Text-19M",
    "RN-30M+29M": "TinyCLIP-ResNet-30M-Text-29M",
}
"""TinyCLIP's names of its manually inherited models, and the students that have those sizes."""
_AUTOMATIC = {"auto-63M/32+31M": 0.25, "auto-45M/32+18M": 0.5, "auto-22M/32+10M": 0.75}
_SIZES = ("layers", "width", "heads", "mlp")
_KEYS = (*_SIZES, *(f"text_{key}" for key in _SIZES), "embed", "depth", "channels", "weights", "from")
_CHOICES = {"depth": ("released", "even"), "channels": ("leading", "importance"), "weights": ("inherited", "random")}


@dataclass(frozen=True)
class TowerSizes:
    """Sizes asked for in one tower; None: as in the teacher. `layers` is a tuple for a ResNet's stages."""

    layers: int | tuple[int, ...] | None = None
    width: int | None = None
    heads: int | None = None
    mlp: int | None = None

    @property
    def whole(self) -> bool:
        return self == TowerSizes()


@dataclass(frozen=True)
class Inheritance:
    """What a student keeps of its teacher, as its name says; `patch_size` is only compared with the teacher's."""

    image: TowerSizes = field(default_factory=TowerSizes)
    text: TowerSizes = field(default_factory=TowerSizes)
    embed: int | None = None
    depth: str = "released"
    channels: str = "leading"
    weights: str = "inherited"
    source: str | None = None
    name: str = "all"
    patch_size: int | None = None


def parse(student: str) -> Inheritance:
    """The parts of a name `inherit:...`. Raises InputError for unknown names and keys, and values that are no sizes."""
    body = student.removeprefix(PREFIX)
    body, source = _split_source(body, student)
    items = listed(body, f"'{student}'") if body.strip() else []
    given: dict[str, str] = {}
    name = "all"
    for position, item in enumerate(items):
        key, separator, value = item.partition("=")
        if not separator and position == 0:
            name = item
            continue
        if not separator:
            raise InputError(f"'{student}': '{item}' is not a size: write  key=value,  for example  width=384")
        if key not in _KEYS:
            raise InputError(f"'{student}': unknown key '{key}'{nearest(key, _KEYS)}")
        if key in given:
            raise InputError(f"'{student}': '{key}' is given twice")
        given[key] = value
    if not items:
        raise InputError(
            f"'{student}': say what to inherit: 'inherit:all', a name such as 'inherit:ViT-39M/16+19M', or sizes such "
            "as 'inherit:layers=6,width=384'"
        )
    base = _named(name, student)
    for key, choices in _CHOICES.items():
        if given.get(key, choices[0]) not in choices:
            raise InputError(f"'{student}': {key} is {' or '.join(choices)}, not '{given[key]}'")
    return Inheritance(
        image=_tower(base.image, given, "", student),
        text=_tower(base.text, given, "text_", student),
        embed=_number(given["embed"], "embed", student) if "embed" in given else base.embed,
        depth=given.get("depth", "released"),
        channels=given.get("channels", "leading"),
        weights=given.get("weights", "inherited"),
        source=source,
        name=name if items and "=" not in items[0] else "custom",
        patch_size=base.patch_size,
    )


def _split_source(body: str, student: str) -> tuple[str, str | None]:
    """The sizes and the model named after `from=`, whose name may itself hold commas and equal signs."""
    if body.startswith("from="):
        return "all", body.removeprefix("from=")
    sizes, separator, source = body.partition(",from=")
    if separator and not source:
        raise InputError(f"'{student}': name a model after 'from='")
    return sizes, source if separator else None


def _named(name: str, student: str) -> Inheritance:
    """The sizes that a name without a key stands for."""
    if name == "all":
        return Inheritance()
    if name in _AUTOMATIC:
        raise InputError(
            f"'{student}': {name} is found by training masks, not by name: use  --recipe tinyclip-auto  with "
            f"train.masks.sparsity={_AUTOMATIC[name]}"
        )
    architecture = PUBLISHED.get(name, name)
    if architecture not in known_architectures():
        raise InputError(
            f"'{student}': '{name}' is no published configuration and no student"
            f"{near(name, [*PUBLISHED, *known_architectures()])}"
        )
    return sizes_of(architecture_values(architecture), name)


def sizes_of(architecture: Mapping[str, Any], name: str) -> Inheritance:
    """The sizes of an architecture, for a student that inherits them. Raises InputError for towers without widths."""
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    if vision.get("timm") or vision.get("timm_model_name") or text.get("hf_model_name"):
        raise InputError(f"'{PREFIX}{name}': {name} has a tower of another library, whose sizes cannot be inherited")
    layers = vision.get("layers", 12)
    resnet = not isinstance(layers, int)
    width, text_width = vision.get("width", 768), text.get("width", 512)
    return Inheritance(
        image=TowerSizes(
            layers=tuple(layers) if resnet else layers,
            width=width,
            mlp=None if resnet else int(width * vision.get("mlp_ratio", 4.0)),
        ),
        text=TowerSizes(text.get("layers", 12), text_width, None, int(text_width * text.get("mlp_ratio", 4.0))),
        embed=architecture["embed_dim"],
        name=name,
        patch_size=None if resnet else vision.get("patch_size", 16),
    )


def _tower(base: TowerSizes, given: Mapping[str, str], prefix: str, student: str) -> TowerSizes:
    values: dict[str, Any] = {key: getattr(base, key) for key in _SIZES}
    if f"{prefix}width" in given:
        values |= {"heads": None, "mlp": None}  # a width of its own brings its own heads and MLP
    for key in _SIZES:
        text = given.get(f"{prefix}{key}")
        if text is None:
            continue
        if key == "layers" and "-" in text:
            values[key] = tuple(_number(part, f"{prefix}layers", student) for part in text.split("-"))
        else:
            values[key] = _number(text, f"{prefix}{key}", student)
    return TowerSizes(**values)


def _number(text: str, key: str, student: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise InputError(f"'{student}': {key} must be a whole number from 1 on, got '{text}'")
    return int(text)
