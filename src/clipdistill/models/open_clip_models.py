"""open_clip's architectures and pretrained weights by name, open_clip folders, and plain checkpoints of either."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipdistill.config import as_dict, build
from clipdistill.data.views import ImageSpec
from clipdistill.errors import InputError
from clipdistill.models.architecture import build_module, check_architecture, image_size
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.hub import fetch, require_network
from clipdistill.models.hugging_face import tokenizer_for
from clipdistill.models.known import (
    OPEN_CLIP_CONFIG,
    architecture_values,
    known_architectures,
    needs_vocabulary,
    require_pretrained,
)
from clipdistill.models.students import named_architecture
from clipdistill.models.tokenizers import HuggingFaceTokenizer, Tokenizer
from clipdistill.models.weights import fit, read_state_dict
from clipdistill.registry import STUDENTS
from clipdistill.runtime.files import read_json

SAFE_WEIGHTS, PICKLED_WEIGHTS = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"


def read_pretrained(architecture_name: str, tag: str) -> ClipModel:
    """One of open_clip's pretrained models, with the activation, normalisation and resizing of its tag.

    Raises InputError for an unknown architecture or tag, and when the weights are neither cached nor within reach.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    name = f"{architecture_name}/{tag}"
    require_pretrained(architecture_name, tag)
    settings = get_pretrained_cfg(architecture_name, tag)
    # open_clip's own architecture of that name, even where a student of ours shares it
    architecture = check_architecture(
        open_clip.get_model_config(architecture_name), f"architecture '{architecture_name}'"
    )
    # the tag knows which activation its weights were trained with; the plain architecture says 'gelu' for all of them
    architecture["quick_gelu"] = architecture["quick_gelu"] or bool(settings.get("quick_gelu", False))
    tokenizer = tokenizer_for(architecture, name)
    path = _weights_path(settings, name)
    preprocessing = {key: settings[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in settings}
    return _with_weights(name, architecture, path, tokenizer, preprocessing)


def _weights_path(settings: Mapping[str, Any], name: str) -> Path:
    """The local file of a pretrained tag, fetched when needed."""
    what = f"the weights of {name}"
    if settings.get("hf_hub"):
        repository, _, filename = settings["hf_hub"].rpartition("/")
        if not filename:
            return fetch(repository, (SAFE_WEIGHTS, PICKLED_WEIGHTS), what)
        safe = filename.rsplit(".", 1)[0] + ".safetensors"
        return fetch(repository, (safe, filename) if safe != filename else (filename,), what)
    from open_clip.pretrained import download_pretrained_from_url

    target = Path("~/.cache/clip").expanduser() / Path(settings["url"]).name
    if not target.is_file():
        require_network(what, settings["url"])
    return Path(download_pretrained_from_url(settings["url"]))


def _with_weights(
    name: str,
    architecture: dict[str, Any],
    path: Path,
    tokenizer: Tokenizer,
    preprocessing: Mapping[str, Any] | None = None,
) -> ClipModel:
    module = build_module(architecture)
    module.load_state_dict(fit(read_state_dict(path), module, str(path), f"the architecture of {name}"))
    return _assembled(name, architecture, module, tokenizer, preprocessing)


def _assembled(
    name: str,
    architecture: dict[str, Any],
    module: nn.Module,
    tokenizer: Tokenizer,
    preprocessing: Mapping[str, Any] | None,
) -> ClipModel:
    values = {**as_dict(ImageSpec()), **(preprocessing or {}), "size": image_size(module)}
    image = build(ImageSpec, values, f"{name}: image preprocessing")
    return ClipModel(name, module, image, tokenizer, architecture["embed_dim"], tokenizer.context_length, architecture)


def read_open_clip_folder(folder: Path, name: str) -> ClipModel:
    """A model in open_clip's own folder form: open_clip_config.json and weights beside it."""
    config = read_json(folder / OPEN_CLIP_CONFIG)
    where = str(folder / OPEN_CLIP_CONFIG)
    if "model_cfg" not in config:
        raise InputError(f"{where}: the key 'model_cfg' is missing")
    architecture = check_architecture(config["model_cfg"], where)
    tokenizer = tokenizer_for(architecture, name, folder)
    if isinstance(tokenizer, HuggingFaceTokenizer) and not architecture["text_cfg"].get("hf_model_name"):
        tokenizer.require_fits(architecture["text_cfg"].get("vocab_size", 49_408), str(folder))
    path = next(
        (folder / f for f in (SAFE_WEIGHTS, PICKLED_WEIGHTS, "model.safetensors") if (folder / f).is_file()), None
    )
    if path is None:
        raise InputError(f"{folder}: has {OPEN_CLIP_CONFIG} but neither {SAFE_WEIGHTS} nor {PICKLED_WEIGHTS}")
    known = config.get("preprocess_cfg") or {}
    preprocessing = {
        key: known[key] for key in ("mean", "std", "interpolation", "resize_mode") if known.get(key) is not None
    }
    return _with_weights(name, architecture, path, tokenizer, preprocessing)


def read_checkpoint(path: Path, architecture_name: str | None = None) -> ClipModel:
    """A bare checkpoint file (.safetensors, .pt, ...) of a registered student or an open_clip architecture.

    Without a name the architecture is found by comparing every tensor's shape with the known ones. Shapes do not tell
    the activation: where architectures that differ only in it fit, the choice is the user's, and so it is where a
    student's words are not in the file.
    """
    tensors = read_state_dict(path)
    if architecture_name is None:
        architecture_name = _architecture_by_shapes(tensors, path)
    if needs_vocabulary(architecture_name):
        raise InputError(
            f"{path}: '{architecture_name}' has words that a bare checkpoint does not hold: give its model folder"
        )
    architecture = named_architecture(architecture_name)
    tokenizer = tokenizer_for(architecture, architecture_name)
    module = build_module(architecture)
    module.load_state_dict(fit(tensors, module, str(path), f"the architecture '{architecture_name}'"))
    return _assembled(architecture_name, architecture, module, tokenizer, None)


def _architecture_by_shapes(tensors: Mapping[str, torch.Tensor], path: Path) -> str:
    """The one known architecture whose tensors have these names and shapes."""
    fitting: list[str] = []
    for name in known_architectures():
        if not _could_be(name, tensors):
            continue
        module = build_module(named_architecture(name), device="meta")
        try:
            fit(tensors, module, str(path), name)
        except InputError:
            continue
        fitting.append(name)
    if not fitting:
        raise InputError(
            f"{path}: its tensors fit no known architecture: name it, as in  ViT-B-16@{path.name},  to see what differs"
        )
    if len({json.dumps(named_architecture(name), sort_keys=True) for name in fitting}) > 1:
        raise InputError(
            f"{path}: its tensors fit {', '.join(fitting)}, which differ in what they compute: name the right one, "
            f"as in  {fitting[0]}@{path.name}"
        )
    logging.getLogger("clipdistill").info("%s: recognised as %s by the shapes of its tensors", path, fitting[0])
    return fitting[0]


def _could_be(name: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """A quick comparison of a few sizes, so that only likely architectures are built."""
    if name in STUDENTS:
        return False  # whatever code of others builds
    values = architecture_values(name)
    text = values["text_cfg"]
    if text.get("hf_model_name") is not None:
        return False  # building those reads configurations from the hub
    words = _first(tensors, "token_embedding.weight", "text.token_embedding.weight")
    positions = _first(tensors, "positional_embedding", "text.positional_embedding")
    if words is None or positions is None:
        return "image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight" in tensors and name.startswith("MobileCLIP")
    if tuple(words.shape) != (text.get("vocab_size", 49_408), text.get("width", 512)):
        return False
    vision = values["vision_cfg"]
    has_timm = any(key.startswith("visual.trunk.") for key in tensors)
    if has_timm != ("timm_model_name" in vision or "timm" in vision):
        return False
    stem = tensors.get("visual.conv1.weight")
    if has_timm or stem is None:
        return True
    width = vision.get("width", 768)
    return stem.shape[0] == (width // 2 if isinstance(vision.get("layers"), list) else width)


def _first(tensors: Mapping[str, torch.Tensor], *names: str) -> torch.Tensor | None:
    return next((tensors[name] for name in names if name in tensors), None)
