"""Architectures: the plain dictionary that describes a model, its checks, and the open_clip module it builds.

The dictionary is open_clip's own model configuration (`embed_dim`, `vision_cfg`, `text_cfg`, ...) with `quick_gelu`
always written out, because a wrong activation changes every result and raises no error. It may come from a file of
unknown origin, so it can name values only: sizes are bounded, keys are known ones, nothing in it downloads or runs
code. Two keys are not open_clip's: `block_sizes`, for towers whose layers differ in size (models/sized.py), and
`image_prompts` (models/prompts.py). Joined towers of other libraries are described by a dictionary of their own
(models/towers/modules.py).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from clipdistill.errors import InputError, first_line, nearest
from clipdistill.models.blocks import lean
from clipdistill.models.derived import Derived, derives
from clipdistill.models.known import BLOCK_SIZES, IMAGE_PROMPTS, near, table
from clipdistill.models.text_length import any_length
from clipdistill.registry import needed_wing

JOINED = "towers"
"""The key of an architecture that joins towers of other libraries."""
_TABLES = table("architecture")
_TOP_KEYS = {*_TABLES["keys"]}
_LIMITS: dict[str, int] = _TABLES["limits"]
"""The largest values in any published model are far below; beyond them a description is hostile or broken."""


def check_architecture(values: Mapping[str, Any], where: str = "architecture") -> dict[str, Any]:
    """A checked deep copy of an architecture dictionary, `quick_gelu` filled in.

    Raises InputError naming `where` for unknown keys, missing parts, sizes out of bounds, and model names that are not
    local.
    """
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected a mapping with embed_dim, vision_cfg and text_cfg, got {values!r:.200}")
    if JOINED in values:
        from clipdistill.models.towers.modules import check_towers

        return check_towers(values, where, check_architecture)
    result: dict[str, Any] = copy.deepcopy(dict(values))
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in result:
            raise InputError(f"{where}: the key '{key}' is missing")
    _check_keys(result, _TOP_KEYS, where)
    for key, known in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        if not isinstance(result[key], dict):
            raise InputError(f"{where}: '{key}' must be a mapping, got {result[key]!r:.200}")
        _check_keys(result[key], {field.name for field in dataclasses.fields(known)}, f"{where}: {key}")
        _check_sizes(result[key], f"{where}: {key}")
    _check_sizes(result, where)
    _check_tower_names(result, where)
    if BLOCK_SIZES in result:
        check_block_sizes = _wing_of(BLOCK_SIZES, "sized:check_block_sizes")
        check_block_sizes(result[BLOCK_SIZES], result["vision_cfg"], result["text_cfg"], where)
    if IMAGE_PROMPTS in result:
        _wing_of(IMAGE_PROMPTS, "prompts:check_prompts")(result[IMAGE_PROMPTS], where)
    result["quick_gelu"] = bool(result.get("quick_gelu", False))
    return result


def _check_keys(values: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise InputError(f"{where}: unknown key '{key}'{nearest(str(key), known)}")


def _check_sizes(values: Mapping[str, Any], where: str) -> None:
    for key, limit in _LIMITS.items():
        value = values.get(key)
        if value is None:
            continue
        for number in value if isinstance(value, list | tuple) else [value]:
            fits = isinstance(number, int | float) and not isinstance(number, bool) and 0 < number <= limit
            if not fits or (key != "mlp_ratio" and not isinstance(number, int)):
                raise InputError(f"{where}: '{key}' must be a number from 1 to {limit}, got {value!r:.200}")


def _check_tower_names(architecture: dict[str, Any], where: str) -> None:
    """timm towers by registered name and without a download; Hugging Face text towers by plain 'owner/name'."""
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    name = vision.get("timm_model_name")
    if name is not None:
        check_timm_name(name, where)
        vision["timm_model_pretrained"] = False
    if text.get("hf_model_name") is not None:
        text["hf_model_pretrained"] = False


def check_timm_name(name: Any, where: str) -> None:
    """Raise InputError unless `name` is an architecture registered in timm (no 'hf-hub:' and no path)."""
    import timm

    base = name.split(".")[0] if isinstance(name, str) else ""
    if not base or not timm.is_model(base):
        raise InputError(f"{where}: timm has no architecture {name!r:.200}{near(str(name), timm.list_models())}")


def build_module(architecture: Mapping[str, Any], *, seed: int | None = None, device: str = "cpu") -> nn.Module:
    """The open_clip module of a checked architecture, fp32, in training mode.

    `seed` set: initialised under a generator of its own, the same weights whatever ran before. `device` "meta": shapes
    only. Returns a CLIP, CustomTextCLIP or CoCa; encode_image and encode_text give raw (not normalised) embeddings (B,
    embed_dim).
    """
    if JOINED in architecture:
        from clipdistill.models.towers.modules import build_joined

        return build_joined(architecture, build_module, seed=seed, device=device)
    if "vision_cfg" not in architecture:
        raise InputError(
            "only open_clip's architectures can be built, cut or pruned, not an export or a module of your own"
        )
    arguments: dict[str, Any] = copy.deepcopy(dict(architecture))
    block_sizes: dict[str, Any] = {}
    if BLOCK_SIZES in architecture:
        arguments, block_sizes = _wing_of(BLOCK_SIZES, "sized:split_block_sizes")(architecture)
    prompted = arguments.pop(IMAGE_PROMPTS, None)
    custom_text = arguments.pop("custom_text", False) or arguments["text_cfg"].get("hf_model_name") is not None
    text_model = arguments["text_cfg"].get("hf_model_name")
    if text_model is not None:  # said beforehand, because building the tower would fetch it silently
        from clipdistill.models.hub import fetch

        fetch(text_model, ("config.json",), f"the configuration of the text tower {text_model}")
    build = _module_class(custom_text, "multimodal_cfg" in arguments)
    try:
        with torch.random.fork_rng(devices=[], enabled=seed is not None), torch.device(device):
            if seed is not None:
                torch.manual_seed(seed)
            module = build(**arguments)
            _match_trunk_size(module)
            text: Any = text_tower(module)
            if text is not module:
                kind: Any = type(text)
                text.__class__ = any_length(kind)
            if block_sizes:
                _wing_of(BLOCK_SIZES, "sized:size_blocks")(module, block_sizes)
            lean(module)
            if prompted is not None:
                _wing_of(IMAGE_PROMPTS, "prompts:put_prompts")(module.visual, prompted)
            return _channels_last(module)
    except InputError:
        raise
    except Exception as error:  # open_clip and timm raise whatever an impossible size leads to
        raise InputError(f"this architecture cannot be built: {first_line(error)}") from error


def _wing_of(key: str, place: str) -> Any:
    return needed_wing(f"clipdistill.models.{place}", f"an architecture with '{key}' is")


def _channels_last(module: nn.Module) -> nn.Module:
    """Convolutional image towers with their weights in channels-last order, which every device runs faster.

    Training steps of the small ResNets took 0.62 to 0.80 of the time on one CPU core. A patch embedding, whose windows
    do not overlap, gains nothing; values and names stay the same, and `save_model` writes the plain order.
    """
    visual: Any = module.visual
    if any(isinstance(part, nn.Conv2d) and part.kernel_size > part.stride for part in visual.modules()):
        visual.to(memory_format=torch.channels_last)
    return module


def _match_trunk_size(module: nn.Module) -> None:
    """Make a timm transformer take the architecture's image size; open_clip builds it at timm's own."""
    trunk = getattr(module.visual, "trunk", None)
    native = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if native is not None and hasattr(trunk, "set_input_size") and native[0] != image_size(module):
        set_input_size: Any = module.get_submodule("visual").set_input_size
        set_input_size(image_size(module))


@derives
def _module_class(custom_text: bool, multimodal: bool) -> Any:
    from open_clip import CLIP, CoCa, CustomTextCLIP

    if not multimodal:
        return CustomTextCLIP if custom_text else any_length(CLIP)

    class RawCoCa(CoCa, metaclass=Derived):
        """CoCa whose encoders give raw embeddings unless asked otherwise, like those of the other classes."""

        def encode_image(self, images: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            return super().encode_image(images, normalize=normalize)

        def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            return super().encode_text(text, normalize=normalize)

    return RawCoCa


def text_sizes(architecture: Mapping[str, Any]) -> tuple[int, int | None]:
    """(size of the vocabulary, context length) of the text tower; None: it takes tokens of any length."""
    if JOINED in architecture:
        own = architecture[JOINED]["text"]
        return text_sizes(own["config"])[0] if own["kind"] == "clip" else int(
            own["config"].get("vocab_size", 1 << 20)
        ), None
    text = architecture["text_cfg"]
    return text.get("vocab_size", 49_408), text.get("context_length", 77)


def shapes(architecture: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Name and shape of every tensor in the state dictionary of an architecture, without allocating any."""
    return {name: tensor.shape for name, tensor in build_module(architecture, device="meta").state_dict().items()}


def text_tower(module: nn.Module) -> nn.Module:
    """The module that owns the text transformer: `module.text`, or the model itself where it lies flat in it."""
    return getattr(module, "text", module)


def image_size(module: nn.Module) -> int:
    """Side in pixels of the square image the image tower expects."""
    size = getattr(module.visual, "image_size", 224)
    return int(size[0] if isinstance(size, tuple | list) else size)
