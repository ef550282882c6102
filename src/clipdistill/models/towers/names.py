"""How a pair of joined towers is named: `towers:` and what each tower is.

towers:image=timm:tf_efficientnet_lite0@lite0.safetensors,text=hf:minilm
towers:image=timm:resnet18.a1_in1k,text=hf:sentence-transformers/all-MiniLM-L6-v2,dim=512,head=linear
towers:image=timm:A@A.safetensors+timm:B@B.safetensors,text=hf:DIR,text_layers=2,size=96

image: timm networks, joined by '+' where several stand side by side (their features are concatenated); the weights come
from a file after '@', from the hub where the name has one of timm's tags, and are random otherwise. text: a Hugging
Face text encoder, a folder or owner/name. dim: the joint embedding (256). head: mlp (default) or linear. hidden: units
of the mlp (1024). size: side of the pictures in pixels (the network's own). text_layers: only the encoder's first
layers. pooling: mean, cls or end, instead of what the encoder was trained with. context: the longest caption in tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipdistill.errors import InputError, nearest
from clipdistill.models.known import near, timm_networks
from clipdistill.runtime.files import read_json

PREFIX = "towers:"
HEADS, POOLINGS = ("mlp", "linear"), ("mean", "cls", "end")
TEXT_KINDS = ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "distilbert", "t5")
"""Values of `model_type` in the config.json of the text encoders that can be a tower."""
_NUMBERS = {"dim": 65_536, "hidden": 65_536, "size": 4096, "text_layers": 1000, "context": 8192}
KEYS = ("image", "text", "head", "pooling", *_NUMBERS)


@dataclass(frozen=True)
class ImageTowerName:
    """A timm network, and the file of its weights where one is named."""

    network: str
    file: Path | None = None

    @property
    def base(self) -> str:
        return self.network.split(".")[0]


@dataclass(frozen=True)
class TowersName:
    """The parts of a name `towers:...`; None: as the tower itself says."""

    images: tuple[ImageTowerName, ...]
    text: str
    dim: int = 256
    head: str = "mlp"
    hidden: int = 1024
    size: int | None = None
    text_layers: int | None = None
    pooling: str | None = None
    context: int | None = None


def parse(name: str) -> TowersName:
    """The parts of `name`. Raises InputError for a missing tower, an unknown key and a value that cannot be."""
    given: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in name.removeprefix(PREFIX).split(","))):
        key, separator, value = item.partition("=")
        if not separator or not value:
            raise InputError(f"'{name}': '{item}' is no setting: write  key=value,  for example  dim=256")
        if key not in KEYS:
            raise InputError(f"'{name}': unknown key '{key}'{nearest(key, KEYS)}")
        if key in given:
            raise InputError(f"'{name}': '{key}' is given twice")
        given[key] = value
    for key, example in (("image", "image=timm:resnet18@weights.safetensors"), ("text", "text=hf:DIR")):
        if key not in given:
            raise InputError(f"'{name}': it has no {key} tower: add  {example}")
    for key, known in (("head", HEADS), ("pooling", POOLINGS)):
        if key in given and given[key] not in known:
            raise InputError(f"'{name}': {key} is {', '.join(known[:-1])} or {known[-1]}, not '{given[key]}'")
    numbers = {key: _number(given[key], key, name) for key in _NUMBERS if key in given}
    words = {key: given[key] for key in ("head", "pooling") if key in given}
    images = tuple(_image(part, name) for part in given["image"].split("+"))
    text = given["text"].removeprefix("hf:")
    if not given["text"].startswith("hf:") or not text:
        raise InputError(f"'{name}': a text tower is  text=hf:FOLDER  or  text=hf:owner/name")
    return TowersName(images, text, **words, **numbers)  # type: ignore[arg-type]


def _image(part: str, name: str) -> ImageTowerName:
    network, at, file = part.removeprefix("timm:").partition("@")
    if not part.startswith("timm:") or not network or (at and not file):
        raise InputError(f"'{name}': an image tower is  image=timm:NETWORK@FILE  or  image=timm:NETWORK.TAG")
    return ImageTowerName(network, Path(file).expanduser() if at else None)


def _number(text: str, key: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= _NUMBERS[key]:
        raise InputError(f"'{name}': {key} must be a whole number from 1 to {_NUMBERS[key]}, got '{text}'")
    return int(text)


def check_towers_name(name: str) -> None:
    """Raise InputError when `name` can be no pair of towers: networks, files and folders are looked for, not read."""
    wanted = parse(name)
    for image in wanted.images:
        if timm_networks() and image.base not in timm_networks():
            raise InputError(f"'{name}': timm has no architecture {image.base!r}{near(image.base, timm_networks())}")
        if image.file is not None and not image.file.is_file():
            raise InputError(f"{image.file}: no such file")
        if image.file is not None and image.file.suffix != ".safetensors":
            raise InputError(f"{image.file}: the weights of a tower are read from .safetensors files only")
    folder = Path(wanted.text).expanduser()
    if folder.is_dir():
        text_config(folder)
    elif wanted.text.count("/") != 1 or not all(wanted.text.split("/")):
        raise InputError(f"'{name}': {wanted.text} is no folder, and no name on the hub (owner/name)")


def text_config(folder: Path) -> dict[str, object]:
    """The config.json of a text encoder. Raises InputError for an encoder of another kind."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no text encoder: it holds no config.json")
    values: dict[str, object] = read_json(path)
    kind = values.get("model_type")
    if kind not in TEXT_KINDS:
        raise InputError(f"{path}: text encoders of the kind {kind!r:.50} cannot be a tower: {', '.join(TEXT_KINDS)}")
    return values


def split_models(names: str) -> tuple[str, ...]:
    """Names of models that stand in one text, separated by commas; the commas inside a name `towers:` are its own."""
    return tuple(_joined(names.split(",")))


def _joined(parts: Sequence[str]) -> Iterator[str]:
    current: str | None = None
    for part in parts:
        if current is not None and current.startswith(PREFIX) and part.partition("=")[0].strip() in KEYS:
            current = f"{current},{part}"
            continue
        if current is not None:
            yield current
        current = part
    if current is not None:
        yield current
