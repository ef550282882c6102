"""The student registry: published small CLIPs by name, and small ones for a CPU.

list_students()                              # rows for a table
build_student("ViT-T-16", seed=0)            # random weights, a function of the name and the seed alone
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from clipdistill.config import as_dict, build
from clipdistill.data.views import ImageSpec
from clipdistill.errors import InputError, nearest
from clipdistill.models.architecture import build_module, check_architecture, check_timm_name, image_size
from clipdistill.models.clip_model import ClipModel, count_parameters
from clipdistill.models.hub import fetch
from clipdistill.models.hugging_face import tokenizer_for
from clipdistill.models.save import require_equal_shapes
from clipdistill.models.tokenizers import ClipBpeTokenizer, Tokenizer, build_words_tokenizer, tokenizer_from_dict

_CLIP_VOCABULARY = 49_408


@dataclass(frozen=True)
class Student:
    """One registered student. `tokenizer`: "clip-bpe", or "words" where the vocabulary comes from training captions."""

    name: str
    source: str
    architecture: dict[str, Any]
    tokenizer: str = "clip-bpe"


def _text(width: int, layers: int, context_length: int = 77, vocab_size: int = _CLIP_VOCABULARY) -> dict[str, Any]:
    return {
        "context_length": context_length,
        "vocab_size": vocab_size,
        "width": width,
        "heads": width // 64,
        "layers": layers,
    }


def _vit(width: int, layers: int, patch_size: int, image_size: int = 224) -> dict[str, Any]:
    return {"image_size": image_size, "layers": layers, "width": width, "patch_size": patch_size}


def _resnet(width: int) -> dict[str, Any]:
    return {"image_size": 224, "layers": [3, 4, 6, 3], "width": width, "patch_size": None}


def timm_vision(name: str, image_size: int = 224) -> dict[str, Any]:
    """Vision configuration of a timm network with its own pooling and a linear projection to the embedding."""
    # networks whose classifier is more than one layer (MobileNetV3, ...) project with that classifier instead:
    # open_clip's linear projection is sized for the features before it
    projection = "" if _has_deep_head(name) else "linear"
    return {
        "timm_model_name": name,
        "timm_pool": "avg" if projection == "" else "",
        "timm_proj": projection,
        "image_size": image_size,
    }


@functools.cache
def _has_deep_head(name: str) -> bool:
    import timm
    import torch

    with torch.device("meta"):
        network = timm.create_model(name, pretrained=False)
    return getattr(network, "head_hidden_size", None) not in (None, network.num_features)


def _students() -> list[Student]:
    clip_kd = "CLIP-KD (Yang et al., CVPR 2024)"
    clip_rd = "CLIP-RD (2026)"
    tiny = "TinyCLIP (Wu et al., ICCV 2023)"
    own = "clipdistill, for a CPU"
    text = _text(384, 12)

    def entry(
        name: str, source: str, vision: dict[str, Any], text: dict[str, Any], embed_dim: int = 512, words: bool = False
    ) -> Student:
        architecture = {"embed_dim": embed_dim, "quick_gelu": False, "vision_cfg": vision, "text_cfg": dict(text)}
        return Student(name, source, architecture, "words" if words else "clip-bpe")

    def published_timm(name: str, network: str) -> Student:
        return entry(name, clip_kd, {"timm": network}, text)

    return [
        entry("ViT-T-16", f"{clip_kd}; {clip_rd}", _vit(192, 12, 16), text),
        entry("ViT-S-16", f"{clip_rd}, embedding 384", _vit(384, 12, 16), text, embed_dim=384),
        entry("ViT-S-16-512", "ViT-S/16 with the embedding of ViT-B/16", _vit(384, 12, 16), text),
        published_timm("MobileViT-S", "mobilevit_s"),
        published_timm("Swin-T", "swin_tiny_patch4_window7_224"),
        published_timm("MobileNetV3-S", "mobilenetv3_small_100"),
        published_timm("EfficientNet-B0", "efficientnet_b0"),
        published_timm("ResNet-18", "resnet18"),
        entry("TinyCLIP-ViT-8M-16-Text-3M", tiny, _vit(256, 10, 16), _text(256, 3)),
        entry("TinyCLIP-ViT-39M-16-Text-19M", tiny, _vit(512, 12, 16), _text(512, 6)),
        entry("TinyCLIP-ViT-40M-32-Text-19M", tiny, _vit(512, 12, 32), _text(512, 6)),
        entry("TinyCLIP-ViT-61M-32-Text-29M", tiny, _vit(640, 12, 32), _text(512, 9)),
        entry("TinyCLIP-ResNet-19M-Text-19M", tiny, _resnet(44), _text(512, 6), embed_dim=1024),
        entry("TinyCLIP-ResNet-30M-Text-29M", tiny, _resnet(56), _text(512, 9), embed_dim=1024),
        entry("scenes-teacher", own, _vit(128, 4, 8, image_size=64), _text(128, 2, 40, 512), embed_dim=128, words=True),
        entry("scenes-student", own, _vit(64, 3, 8, image_size=64), _text(64, 2, 40, 512), embed_dim=64, words=True),
        entry(
            "flickr-teacher",
            own,
            {"timm": "resnet10t", "image_size": 112},
            _text(192, 3, 32, 8192),
            embed_dim=256,
            words=True,
        ),
        entry(
            "flickr-student",
            own,
            {"timm": "test_resnet", "image_size": 112},
            _text(128, 2, 32, 8192),
            embed_dim=256,
            words=True,
        ),
        entry(
            "flickr-student-vit",
            own,
            _vit(64, 3, 8, image_size=64),
            _text(64, 2, 32, 8192),
            embed_dim=128,
            words=True,
        ),
    ]


@functools.cache
def registry() -> dict[str, Student]:
    """Every registered student by name."""
    return {student.name: student for student in _students()}


def student_architecture(name: str) -> dict[str, Any]:
    """The architecture dictionary of a registered student. Raises InputError with the nearest name."""
    if name not in registry():
        raise InputError(f"unknown student '{name}'{nearest(name, registry())}")
    architecture = copy.deepcopy(registry()[name].architecture)
    vision = architecture["vision_cfg"]
    if "timm" in vision:
        architecture["vision_cfg"] = timm_vision(vision["timm"], vision.get("image_size", 224))
    return check_architecture(architecture, f"student '{name}'")


def needs_vocabulary(name: str) -> bool:
    """Whether `name` is a registered student that must be given a tokenizer made from its training captions."""
    return name in registry() and registry()[name].tokenizer == "words"


@dataclass(frozen=True)
class StudentRow:
    """One line of the table of students; parameter counts by the rule of ClipModel.parameter_counts."""

    name: str
    image_size: int
    embed_dim: int
    tokenizer: str
    image_parameters: int
    text_parameters: int
    total_parameters: int
    source: str


@functools.cache
def list_students() -> tuple[StudentRow, ...]:
    """One row per registered student. `text_parameters` counts the transformer blocks alone, as the papers do.

    The totals of "words" students are with the vocabulary size of their registered configuration.
    """
    rows = []
    for student in registry().values():
        architecture = student_architecture(student.name)
        module = build_module(architecture, device="meta")
        counts = count_parameters(module)
        rows.append(
            StudentRow(
                name=student.name,
                image_size=image_size(module),
                embed_dim=architecture["embed_dim"],
                tokenizer=student.tokenizer,
                image_parameters=counts["image"],
                text_parameters=counts["text_transformer"],
                total_parameters=counts["total"],
                source=student.source,
            )
        )
    return tuple(rows)


def build_student(
    name_or_architecture: str | Mapping[str, Any],
    *,
    seed: int,
    tokenizer: Tokenizer | str | Mapping[str, Any] | None = None,
    captions: Iterable[str] | None = None,
    image_size: int | None = None,
) -> ClipModel:
    """A student with random weights from a generator of its own: equal for equal arguments, whatever ran before.

    `name_or_architecture`: a registered name, an architecture name of open_clip, or an architecture dictionary.
    `tokenizer`: a Tokenizer, its dictionary or "clip-bpe"; it sets the vocabulary size and context length of the text
    tower. `captions`: read only for a student with a vocabulary of its own (see `needs_vocabulary`) and no `tokenizer`:
    the words come from them. Raises InputError for an unknown name, a missing tokenizer, or an architecture that cannot
    be built.
    """
    if isinstance(name_or_architecture, str):
        name, architecture = name_or_architecture, named_architecture(name_or_architecture)
    else:
        name, architecture = "custom", check_architecture(name_or_architecture)
    chosen = _chosen_tokenizer(name, architecture, tokenizer, captions)
    architecture["text_cfg"]["vocab_size"] = chosen.vocab_size
    architecture["text_cfg"]["context_length"] = chosen.context_length
    if image_size is not None:
        architecture["vision_cfg"]["image_size"] = image_size
    return assemble(name, architecture, chosen, seed=seed)


def near(name: str, options: Iterable[str]) -> str:
    """' (did you mean ...?)', or nothing: unlike errors.nearest it never prints some 160 names."""
    lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f" (did you mean '{lower[close[0]]}'?)" if close else ""


@functools.cache
def known_architectures() -> tuple[str, ...]:
    """Names of the registered students and of open_clip's architectures; a name in both means the student."""
    import open_clip

    return (*registry(), *(name for name in open_clip.list_models() if name not in registry()))


def named_architecture(name: str) -> dict[str, Any]:
    """The architecture of a registered student or of open_clip. Raises InputError with the nearest name."""
    if name in registry():
        return student_architecture(name)
    if name not in known_architectures():
        raise InputError(f"unknown student or architecture '{name}'{near(name, known_architectures())}")
    import open_clip

    return check_architecture(open_clip.get_model_config(name), f"architecture '{name}'")


def _chosen_tokenizer(
    name: str,
    architecture: dict[str, Any],
    tokenizer: Tokenizer | str | Mapping[str, Any] | None,
    captions: Iterable[str] | None,
) -> Tokenizer:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    text = architecture["text_cfg"]
    context_length = text.get("context_length", 77)
    if isinstance(tokenizer, str):
        if tokenizer != "clip-bpe":
            raise InputError(
                f"unknown tokenizer '{tokenizer}': give 'clip-bpe', or a tokenizer made by build_words_tokenizer"
            )
        return ClipBpeTokenizer(context_length)
    if tokenizer is not None:
        return tokenizer_from_dict(tokenizer)
    if needs_vocabulary(name):
        if captions is None:
            raise InputError(
                f"the student '{name}' takes its vocabulary from its training captions: give captions or a tokenizer"
            )
        return build_words_tokenizer(captions, context_length, max_size=text["vocab_size"] - 4)
    return tokenizer_for(architecture, name)


def assemble(
    name: str, architecture: dict[str, Any], tokenizer: Tokenizer, *, seed: int, image: Mapping[str, Any] | None = None
) -> ClipModel:
    """A ClipModel with random weights from parts that agree; `image` overrides fields of its image specification."""
    architecture = check_architecture(architecture, f"architecture '{name}'")
    module = build_module(architecture, seed=seed)
    spec = build(ImageSpec, {**as_dict(ImageSpec()), **(image or {}), "size": image_size(module)})
    return ClipModel(name, module, spec, tokenizer, architecture["embed_dim"], tokenizer.context_length, architecture)


def timm_student(
    name: str, *, seed: int, tokenizer: Tokenizer | None = None, captions: Iterable[str] | None = None
) -> ClipModel:
    """A timm network as image tower, at its own resolution, and the default text tower (12 x 384, embedding 512).

    'resnet18' has random weights; with one of timm's tags ('resnet18.a1_in1k') the image tower starts from those
    weights and gets their normalisation. Raises InputError for an unknown network or tag, or weights that are out of
    reach.
    """
    import timm

    check_timm_name(name, f"'timm:{name}'")
    base, _, tag = name.partition(".")
    if tag and tag not in (known := [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")]):
        raise InputError(f"'timm:{name}': timm has no weights '{tag}' for {base}{nearest(tag, known)}")
    settings: Any = timm.get_pretrained_cfg(name if tag else base)
    vision = timm_vision(name, int(settings.input_size[-1]))
    architecture = {"embed_dim": 512, "quick_gelu": False, "vision_cfg": vision, "text_cfg": _text(384, 12)}
    model = build_student(architecture, seed=seed, tokenizer=tokenizer, captions=captions)
    image = model.image
    if tag:
        repository = settings.hf_hub_id + name if settings.hf_hub_id.endswith("/") else settings.hf_hub_id
        fetch(repository, _TIMM_FILES, f"the weights of timm:{name}")
        _copy_trunk(timm.create_model(name, pretrained=True), model.module.get_submodule("visual.trunk"), name)
        interpolation = settings.interpolation if settings.interpolation in ("bicubic", "bilinear") else "bicubic"
        image = build(
            ImageSpec, {**as_dict(image), "mean": settings.mean, "std": settings.std, "interpolation": interpolation}
        )
    return dataclasses.replace(model, name=f"timm:{name}", image=image)


_TIMM_FILES = ("model.safetensors", "pytorch_model.bin")


def _copy_trunk(source: Any, trunk: nn.Module, name: str) -> None:
    """Copy all of `source` but its classifier into `trunk`."""
    tensors, expected = source.state_dict(), trunk.state_dict()
    classifier = tuple(f"{part}." for part in _as_tuple(source.default_cfg["classifier"]))
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(classifier)}
    wanted = {key: tensor.shape for key, tensor in expected.items() if not key.startswith(classifier)}
    require_equal_shapes({key: t.shape for key, t in kept.items()}, wanted, f"timm:{name}", "the image tower")
    trunk.load_state_dict(kept, strict=False)


def _as_tuple(value: Any) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
