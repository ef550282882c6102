"""How a pair of joined towers is named: `towers:` and what each tower is.

towers:image=timm:tf_efficientnet_lite0@lite0.safetensors,text=hf:minilm
towers:image=timm:resnet18.a1_in1k,text=hf:sentence-transformers/all-MiniLM-L6-v2,dim=512,head=linear
towers:image=timm:A@A.safetensors+timm:B@B.safetensors,text=hf:DIR,text_layers=2,size=96

towers:image=clip:ViT-B-16/laion400m_e32,text=clip:runs/small

image: timm networks, joined by '+' where several stand side by side (their features are concatenated); the weights come
from a file after '@', from the hub where the name has one of timm's tags, and are random otherwise. text: a Hugging
Face text encoder, a folder or owner/name. Either is also clip: and any name of a model, whose tower with its projection
is taken; whole: and the name of a model takes the tower as it stands, without a head: its embedding is the joint one.
dim: the joint embedding (256; a whole tower has its own). head: mlp (default) or linear. hidden: units of the mlp
(1024). size: side of the pictures in pixels (the network's own). text_layers: only the encoder's first layers. pooling:
mean, cls or end, instead of what the encoder was trained with. context: the longest caption in tokens. Commas in a path
are part of it where the file or folder is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipdistill.errors import InputError, listed, nearest
from clipdistill.models.known import SUFFIX, near, timm_networks
from clipdistill.runtime.files import read_json

PREFIX, CLIP, WHOLE = "towers:", "clip:", "whole:"
HEADS, POOLINGS = ("mlp", "linear"), ("mean", "cls", "end")
TEXT_KINDS = ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "distilbert", "t5")
"""Values of `model_type` in the config.json of the text encoders that can be a tower."""
_NUMBERS = {"dim": 65_536, "hidden": 65_536, "size": 4096, "text_layers": 1000, "context": 8192}
KEYS = ("image", "text", "head", "pooling", *_NUMBERS)


@dataclass(frozen=True)
class ImageTowerName:
    """A timm network, and the file of its weights where one is named; or a model whose image tower is taken."""

    network: str
    file: Path | None = None
    clip: str | None = None
    whole: bool = False

    @property
    def base(self) -> str:
        return self.network.split(".")[0]


@dataclass(frozen=True)
class TowersName:
    """The parts of a name `towers:...`; None: as the tower itself says."""

    images: tuple[ImageTowerName, ...]
    text: str
    dim: int | None = None
    head: str = "mlp"
    hidden: int = 1024
    size: int | None = None
    text_layers: int | None = None
    pooling: str | None = None
    context: int | None = None
    whole_text: bool = False


def parse(name: str) -> TowersName:
    """The parts of `name`. Raises InputError for a missing tower, an unknown key and a value that cannot be."""
    given: dict[str, str] = {}
    for item in _items(name.removeprefix(PREFIX)):
        key, separator, value = (part.strip() for part in item.partition("="))
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
    images = tuple(_image(part, name) for part in re.split(r"\+(?=timm:|clip:|hf:|whole:)", given["image"]))
    if len(images) > 1 and any(image.whole for image in images):
        raise InputError(f"'{name}': a whole image tower stands alone: take it as  clip:  beside others")
    kind, _, text = given["text"].partition(":")
    if kind not in ("hf", "clip", "whole") or not text:
        wrong = " (timm: names an image tower)" if kind == "timm" else ""
        raise InputError(
            f"'{name}': a text tower is  text=hf:FOLDER,  text=hf:owner/name,  text=clip:MODEL  or  text=whole:MODEL"
            f"{wrong}"
        )
    whole = kind == "whole"
    if kind != "hf":
        for key, why in (("text_layers", "cut it with  inherit:"), ("pooling", "a CLIP's pooling is its own")):
            if key in given:
                raise InputError(f"'{name}': {key} is of  text=hf:  towers: {why}")
        text = f"{CLIP}{text}"
    return TowersName(images, text, whole_text=whole, **words, **numbers)  # type: ignore[arg-type]


def _items(text: str) -> Iterator[str]:
    """The settings of a name: split at its commas, but for those inside a path that is there."""
    parts = text.split(",")
    while parts:
        for n in range(len(parts), 1, -1):
            whole = ",".join(parts[:n])
            places = (whole[match.end() :].strip() for match in re.finditer("=hf:|clip:|whole:|@", parts[0]))
            if any(Path(place).expanduser().exists() for place in places):
                break
        else:
            n, whole = 1, parts[0]
        if whole.strip():
            yield whole.strip()
        elif text.strip():
            listed(text, f"'{PREFIX}...'")
        parts = parts[n:]


def _image(part: str, name: str) -> ImageTowerName:
    kind, _, rest = part.partition(":")
    if kind in ("clip", "whole") and rest:
        return ImageTowerName(rest, clip=rest, whole=kind == "whole")
    network, at, file = rest.partition("@")
    if kind != "timm" or not network or (at and not file):
        wrong = " (hf: names a text encoder)" if kind == "hf" else ""
        raise InputError(
            f"'{name}': an image tower is  image=timm:NETWORK@FILE,  image=timm:NETWORK.TAG,  image=clip:MODEL  or  "
            f"image=whole:MODEL{wrong}"
        )
    return ImageTowerName(network, Path(file).expanduser() if at else None)


def _number(text: str, key: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= _NUMBERS[key]:
        raise InputError(f"'{name}': {key} must be a whole number from 1 to {_NUMBERS[key]}, got '{text}'")
    return int(text)


def check_towers_name(name: str) -> list[str]:
    """Raise InputError when `name` can be no pair of towers: networks, files and folders are looked for, not read.

    Returns the names of the models whose towers are taken, for whoever checks those.
    """
    wanted = parse(name)
    models = [image.clip for image in wanted.images if image.clip is not None]
    for image in wanted.images:
        if image.clip is not None:
            continue
        if timm_networks() and image.base not in timm_networks():
            raise InputError(f"'{name}': timm has no architecture {image.base!r}{near(image.base, timm_networks())}")
        if image.file is not None and not image.file.is_file():
            wrong = "is a folder: name the file in it" if image.file.is_dir() else "no such file"
            raise InputError(f"{image.file}: {wrong}")
        if image.file is not None and image.file.suffix != ".safetensors":
            raise InputError(f"{image.file}: the weights of a tower are read from .safetensors files only")
    folder = Path(wanted.text).expanduser()
    if wanted.text.startswith(CLIP):
        models.append(wanted.text.removeprefix(CLIP))
    elif folder.is_dir():
        text_config(folder)
        if not (folder / "model.safetensors").is_file():
            raise InputError(
                f"{folder}: the weights of a text tower are read from model.safetensors, which is not there"
            )
    elif wanted.text.count("/") != 1 or not all(wanted.text.split("/")):
        raise InputError(f"'{name}': {wanted.text} is no folder, and no name on the hub (owner/name)")
    for model in models:
        if model.partition(":")[0] in (*SUFFIX, "module"):
            raise InputError(f"'{name}': no tower can be taken out of {model}: name the model that it was made from")
    return models


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
    """Names of models that stand in one text, separated by commas; the commas inside a name `towers:` are its own, and
    so are those of a path that is there."""
    found = tuple(name.strip() for name in _joined(names.split(",")))
    return found if all(found) else tuple(listed(names, "names of models"))


def _joined(parts: Sequence[str]) -> Iterator[str]:
    while parts:
        for n in range(len(parts), 1, -1):
            whole = ",".join(parts[:n])
            if whole.startswith(PREFIX):
                if all(re.match(r"\w+\s*=", item) for item in _items(whole.removeprefix(PREFIX))):
                    break
            elif ":" not in whole and Path(whole).expanduser().exists():
                break
        else:
            n, whole = 1, parts[0]
        yield whole
        parts = parts[n:]
