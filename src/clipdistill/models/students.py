"""Students built by name: those of models/students/*.json, open_clip's architectures, timm's networks, registered ones.

build_student("ViT-T-16", seed=0)            # random weights, a function of the name and the seed alone
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from clipdistill.config import as_dict, build
from clipdistill.data.views import ImageSpec
from clipdistill.errors import InputError, nearest
from clipdistill.models.architecture import build_module, check_architecture, check_timm_name, image_size
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.known import HELD, architecture_values, needs_vocabulary, students
from clipdistill.models.own import build_registered, held_model, require_saveable
from clipdistill.models.save import require_equal_shapes
from clipdistill.models.tokenizers import ClipBpeTokenizer, Tokenizer, build_words_tokenizer, tokenizer_from_dict
from clipdistill.registry import STUDENTS


def timm_vision(name: str, image_size: int = 224) -> dict[str, Any]:
    """Vision configuration of a timm network with its own pooling and a linear projection to the embedding."""
    # networks whose classifier is more than one layer (MobileNetV3, ...) project with that classifier instead:
    # open_clip's linear projection is sized for the features before it
    projection = "" if _has_deep_head(name) else "linear"
    pool = "avg" if projection == "" else ""
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": projection, "image_size": image_size}


@functools.cache
def _has_deep_head(name: str) -> bool:
    import timm
    import torch

    with torch.device("meta"):
        network = timm.create_model(name, pretrained=False)
    return getattr(network, "head_hidden_size", None) not in (None, network.num_features)


def named_architecture(name: str) -> dict[str, Any]:
    """The architecture of a student or of open_clip, checked. Raises InputError with the nearest name."""
    architecture = architecture_values(name)
    vision = architecture["vision_cfg"]
    if "timm" in vision:
        architecture["vision_cfg"] = timm_vision(vision["timm"], vision.get("image_size", 224))
    return check_architecture(architecture, f"{'student' if name in students() else 'architecture'} '{name}'")


def build_student(
    name_or_architecture: str | Mapping[str, Any],
    *,
    seed: int,
    tokenizer: Tokenizer | str | Mapping[str, Any] | None = None,
    captions: Iterable[str] | None = None,
    image_size: int | None = None,
) -> ClipModel:
    """A student with random weights from a generator of its own: equal for equal arguments, whatever ran before.

    `name_or_architecture`: a student's name, an architecture name of open_clip, an architecture dictionary, or the name
    of a module that the program holds, which keeps its weights. `tokenizer`: a Tokenizer, its dictionary or "clip-bpe";
    it sets the vocabulary size and context length of the text tower. `captions`: read only for a student with a
    vocabulary of its own (see `needs_vocabulary`) and no `tokenizer`: the words come from them.
    Raises InputError for an unknown name, a missing tokenizer, or an architecture that cannot be built.
    """
    name, given = "custom", name_or_architecture
    if isinstance(given, str):
        name = given
        if name.startswith(HELD) or name in STUDENTS:
            own = held_model(name) if name.startswith(HELD) else None
            if own is None:
                given_tokenizer = None if tokenizer is None else _given_tokenizer(tokenizer, 77)
                own = build_registered(name, seed=seed, tokenizer=given_tokenizer, captions=captions)
            if isinstance(own, ClipModel):
                require_saveable(own)
                return own
            given = own
    architecture = named_architecture(given) if isinstance(given, str) else check_architecture(given)
    chosen = _chosen_tokenizer(name, architecture, tokenizer, captions)
    architecture["text_cfg"]["vocab_size"] = chosen.vocab_size
    architecture["text_cfg"]["context_length"] = chosen.context_length
    if image_size is not None:
        architecture["vision_cfg"]["image_size"] = image_size
    return assemble(name, architecture, chosen, seed=seed)


def _given_tokenizer(tokenizer: Tokenizer | str | Mapping[str, Any], context_length: int) -> Tokenizer:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if not isinstance(tokenizer, str):
        return tokenizer_from_dict(tokenizer)
    if tokenizer != "clip-bpe":
        raise InputError(
            f"unknown tokenizer '{tokenizer}': give 'clip-bpe', or a tokenizer made by build_words_tokenizer"
        )
    return ClipBpeTokenizer(context_length)


def _chosen_tokenizer(
    name: str,
    architecture: dict[str, Any],
    tokenizer: Tokenizer | str | Mapping[str, Any] | None,
    captions: Iterable[str] | None,
) -> Tokenizer:
    text = architecture["text_cfg"]
    context_length = text.get("context_length", 77)
    if tokenizer is not None:
        return _given_tokenizer(tokenizer, context_length)
    if not needs_vocabulary(name):
        from clipdistill.models.hugging_face import tokenizer_for

        return tokenizer_for(architecture, name)
    if captions is None:
        raise InputError(
            f"the student '{name}' takes its vocabulary from its training captions: give captions or a tokenizer"
        )
    return build_words_tokenizer(captions, context_length, max_size=text["vocab_size"] - 4)


def assemble(name: str, architecture: dict[str, Any], tokenizer: Tokenizer, *, seed: int) -> ClipModel:
    """A ClipModel with random weights from parts that agree."""
    architecture = check_architecture(architecture, f"architecture '{name}'")
    module = build_module(architecture, seed=seed)
    spec = build(ImageSpec, {**as_dict(ImageSpec()), "size": image_size(module)})
    return ClipModel(name, module, spec, tokenizer, architecture["embed_dim"], tokenizer.context_length, architecture)


def timm_student(name: str, *, seed: int, tokenizer: Tokenizer | None = None) -> ClipModel:
    """A timm network as image tower, at its own resolution, and the default text tower (12 x 384, embedding 512).

    'resnet18' has random weights; with one of timm's tags ('resnet18.a1_in1k') the image tower starts from those
    weights and gets their normalisation. Raises InputError for an unknown network or tag, or weights that are out of
    reach.
    """
    import timm

    from clipdistill.models.hub import fetch

    check_timm_name(name, f"'timm:{name}'")
    base, _, tag = name.partition(".")
    if tag and tag not in (known := [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")]):
        raise InputError(f"'timm:{name}': timm has no weights '{tag}' for {base}{nearest(tag, known)}")
    settings: Any = timm.get_pretrained_cfg(name if tag else base)
    architecture = {**architecture_values("ViT-T-16"), "vision_cfg": timm_vision(name, int(settings.input_size[-1]))}
    model = build_student(architecture, seed=seed, tokenizer=tokenizer)
    image = model.image
    if tag:
        repository = settings.hf_hub_id + name if settings.hf_hub_id.endswith("/") else settings.hf_hub_id
        fetch(repository, ("model.safetensors", "pytorch_model.bin"), f"the weights of timm:{name}")
        _copy_trunk(timm.create_model(name, pretrained=True), model.module.get_submodule("visual.trunk"), name)
        interpolation = settings.interpolation if settings.interpolation in ("bicubic", "bilinear") else "bicubic"
        image = build(
            ImageSpec, {**as_dict(image), "mean": settings.mean, "std": settings.std, "interpolation": interpolation}
        )
    return dataclasses.replace(model, name=f"timm:{name}", image=image)


def _copy_trunk(source: Any, trunk: nn.Module, name: str) -> None:
    """Copy all of `source` but its classifier into `trunk`."""
    tensors, expected = source.state_dict(), trunk.state_dict()
    parts = source.default_cfg["classifier"]
    classifier = tuple(f"{part}." for part in (parts if isinstance(parts, list | tuple) else (parts,)))
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(classifier)}
    wanted = {key: tensor.shape for key, tensor in expected.items() if not key.startswith(classifier)}
    require_equal_shapes({key: t.shape for key, t in kept.items()}, wanted, f"timm:{name}", "the image tower")
    trunk.load_state_dict(kept, strict=False)
