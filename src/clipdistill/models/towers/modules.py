"""The module of joined towers, and the plain dictionary that describes it (`architecture` of a ClipModel).

    {"embed_dim": 256, "quick_gelu": false, "towers": {
        "head": "mlp", "hidden": 1024,
        "image": {"size": 224, "mean": [...], "std": [...], "trunks": [{"network": "tf_efficientnet_lite0",
                  "size": 224, "mean": [...], "std": [...]}], "pretrained": true},
        "text": {"kind": "bert", "config": {...}, "pooling": "mean", "padding": 0}}}

A tower out of a CLIP has that model's own architecture: "clip" in the place of a trunk's network, "config" of a text
tower of the kind "clip" (whose pooling is its own, "end" here). "whole": true beside them: no head, the tower's own
embedding is the joint one. The dictionary may come from a file of unknown origin:
it names values only, networks that timm has and the text encoders below, with sizes that are bounded. Nothing is
fetched and no code of theirs is run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipdistill.errors import InputError, first_line, nearest, needing
from clipdistill.models.known import near
from clipdistill.models.towers.names import HEADS, POOLINGS, TEXT_KINDS

KEY = "towers"
Build = Callable[..., nn.Module]
"""architecture.build_module, which builds joined towers too and therefore hands itself down."""
_SMALLEST: dict[str, dict[str, Any]] = {
    "vision_cfg": {"image_size": 8, "patch_size": 8, "layers": 1, "width": 8, "head_width": 8},
    "text_cfg": {"context_length": 3, "vocab_size": 4, "layers": 1, "width": 8, "heads": 1},
}
"""What is built in the place of a CLIP's other tower and dropped."""
_DEEPEST = 8
"""Towers out of joined towers out of joined towers: beyond, a description is hostile."""
_CLASSES = {
    "bert": ("BertConfig", "BertModel"),
    "roberta": ("RobertaConfig", "RobertaModel"),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel"),
    "camembert": ("CamembertConfig", "CamembertModel"),
    "mpnet": ("MPNetConfig", "MPNetModel"),
    "distilbert": ("DistilBertConfig", "DistilBertModel"),
    "t5": ("T5Config", "T5EncoderModel"),
}
_SIZES = {
    "vocab_size": 1 << 20,
    "max_position_embeddings": 1 << 16,
    "num_hidden_layers": 1000,
    "n_layers": 1000,
    "num_layers": 1000,
    **dict.fromkeys(("hidden_size", "intermediate_size", "dim", "hidden_dim", "d_model", "d_ff", "d_kv"), 1 << 16),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads", "type_vocab_size"), 1024),
    **dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), 1 << 16),
}
_OTHERS = (
    *("hidden_act", "activation", "feed_forward_proj", "position_embedding_type", "sinusoidal_pos_embds"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "dropout_rate"),
    *("layer_norm_eps", "layer_norm_epsilon", "pad_token_id", "bos_token_id", "eos_token_id"),
)
CONFIG_KEYS = (*_SIZES, *_OTHERS)
"""What of a text encoder's config.json decides its function."""
_TEXT = ("kind", "config", "pooling", "padding")
LAYERS = {"distilbert": "n_layers", "t5": "num_layers"}
"""The key that counts a kind's layers, where it is not num_hidden_layers."""


class JoinedTowers(nn.Module):
    """An image tower and a text tower of any origin, each with a head into one embedding of `embed_dim` numbers."""

    def __init__(self, architecture: Mapping[str, Any], build: Build) -> None:
        super().__init__()
        towers, dim = architecture[KEY], architecture["embed_dim"]
        self.visual = JoinedImages(towers["image"], dim, towers["head"], towers["hidden"], build)
        self.text = JoinedText(towers["text"], dim, towers["head"], towers["hidden"], build)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images, or (B, F) features of `visual.features` -> (B, D), not normalised."""
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) ids, or (B, F) features of `text.features` -> (B, D), not normalised."""
        return self.text(tokens)


class _Tower(nn.Module):
    """A tower whose frozen backbone stays in evaluation mode: what does not train is a fixed function."""

    def backbone(self) -> nn.Module:
        raise NotImplementedError

    def train(self, mode: bool = True) -> _Tower:
        super().train(mode)
        if self.locked:
            self.backbone().eval()
        return self

    @property
    def locked(self) -> bool:
        """Whether nothing but the head trains."""
        return not any(p.requires_grad for p in self.backbone().parameters())


class JoinedImages(_Tower):
    """timm networks and image towers of CLIPs side by side, and a head over their features."""

    def __init__(self, values: Mapping[str, Any], dim: int, head: str, hidden: int, build: Build) -> None:
        super().__init__()
        self.image_size = int(values["size"])
        self.trunks = nn.ModuleList(_trunk(trunk, build) for trunk in values["trunks"])
        self._inputs = [_input_of(trunk, values) for trunk in values["trunks"]]
        widths = [_feature_width(trunk, v) for trunk, v in zip(self.trunks, values["trunks"])]
        self.head = Whole(widths) if values.get("whole") else Head(widths, dim, head, hidden)

    def backbone(self) -> nn.Module:
        return self.trunks

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, F): each network's pooled features, one after the other."""
        found = []
        for trunk, (size, factor, shift) in zip(self.trunks, self._inputs, strict=True):
            own = images
            if size != images.shape[-1]:
                own = nn.functional.interpolate(own, (size, size), mode="bicubic", antialias=size < images.shape[-1])
            if factor is not None:
                own = own * images.new_tensor(factor).view(3, 1, 1) + images.new_tensor(shift).view(3, 1, 1)
            found.append(_first(trunk(own)))
        return torch.cat(found, dim=-1) if len(found) > 1 else found[0]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), or features (B, F) -> (B, D)."""
        return self.head(images if images.ndim == 2 else self.features(images))


class JoinedText(_Tower):
    """A text encoder of transformers with its pooling, or the text tower of a CLIP, and a head."""

    def __init__(self, values: Mapping[str, Any], dim: int, head: str, hidden: int, build: Build) -> None:
        super().__init__()
        self.pooling, self.padding = values["pooling"], int(values["padding"])
        if values["kind"] == "clip":
            self.transformer: Any = ClipText(clip_part(values["config"], "text", build))
            width = values["config"]["embed_dim"]
        else:
            self.transformer = _encoder(values["kind"], values["config"])
            width = self.transformer.config.hidden_size
        self.head = Whole([int(width)]) if values.get("whole") else Head([int(width)], dim, head, hidden)

    def backbone(self) -> nn.Module:
        return self.transformer

    def features(self, tokens: Tensor) -> Tensor:
        """(B, L) ids -> (B, F), pooled over the places that hold no padding."""
        if isinstance(self.transformer, ClipText):
            return self.transformer(tokens)
        mask = (tokens != self.padding).long()
        states: Tensor = self.transformer(input_ids=tokens, attention_mask=mask).last_hidden_state  # (B, L, F)
        if self.pooling == "cls":
            return states[:, 0]
        if self.pooling == "end":
            last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
            return states.gather(1, last[:, :, None].expand(-1, -1, states.shape[-1])).squeeze(1)
        weights = mask[:, :, None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) ids, or features (B, F) -> (B, D)."""
        return self.head(tokens if tokens.is_floating_point() else self.features(tokens))


class Head(nn.Module):
    """Features to the joint embedding: a linear map, or one with a two-layer perceptron beside it.

    Each network's features are brought to mean 0 and deviation 1 first, so that none drowns another. While training,
    normal `noise` is added to them, and a share `dropout` of them and of the hidden units is hidden.
    """

    noise = dropout = 0.0

    def __init__(self, widths: list[int], dim: int, kind: str, hidden: int) -> None:
        super().__init__()
        self.widths = widths
        width = sum(widths)
        self.linear = nn.Linear(width, dim)
        self.mlp = None
        if kind == "mlp":
            self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, features: Tensor) -> Tensor:
        """(B, sum of widths) -> (B, dim)."""
        parts = features.split(self.widths, dim=-1) if len(self.widths) > 1 else (features,)
        even = torch.cat([nn.functional.layer_norm(part, part.shape[-1:]) for part in parts], dim=-1)
        if self.training and self.noise:
            even = even + self.noise * torch.randn_like(even)
        even = nn.functional.dropout(even, self.dropout, self.training)
        output: Tensor = self.linear(even)
        if self.mlp is None:
            return output
        first, activation, last = self.mlp
        return output + last(nn.functional.dropout(activation(first(even)), self.dropout, self.training))


class Whole(nn.Module):
    """In the place of a head behind a tower that keeps its own embedding."""

    noise = dropout = 0.0

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.widths = widths

    def forward(self, features: Tensor) -> Tensor:
        """(B, D), as they came."""
        return features


def _input_of(trunk: Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[int, list[float] | None, list[float]]:
    """(size, factor, shift) that turn pictures normalised for the model into what one network was trained on."""
    if list(trunk["mean"]) == list(shared["mean"]) and list(trunk["std"]) == list(shared["std"]):
        return int(trunk["size"]), None, []
    channels = list(zip(trunk["mean"], trunk["std"], shared["mean"], shared["std"], strict=True))
    return int(trunk["size"]), [s / t for _, t, _, s in channels], [(m - n) / t for n, t, m, _ in channels]


class ClipText(nn.Module):
    """The text tower of a CLIP, its projection included."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) ids -> (B, embed_dim of the CLIP)."""
        call: Any = getattr(self.tower, "encode_text", self.tower)
        return _first(call(tokens))


def clip_part(architecture: Mapping[str, Any], tower: str, build: Build) -> nn.Module:
    """The image or text tower of a CLIP's architecture, built alone. A text tower that lies flat in its model is that
    model without the rest."""
    values = copy.deepcopy(dict(architecture))
    if KEY not in values:
        other = "text_cfg" if tower == "image" else "vision_cfg"
        values[other] = dict(_SMALLEST[other])
        if tower == "text":
            values.pop("image_prompts", None)
        values.get("block_sizes", {}).pop("text" if tower == "image" else "image", None)
        if values.pop("multimodal_cfg", None) is not None:
            values["custom_text"] = True
    device = torch.get_default_device().type
    return take_part(build(values, device=device), tower)


def take_part(module: Any, tower: str) -> nn.Module:
    """The same, taken out of a model, which is of no use afterwards."""
    if tower == "image":
        return module.visual
    if hasattr(module, "text"):
        return module.text
    for name in ("visual", "logit_scale", "logit_bias"):
        if getattr(module, name, None) is not None:
            delattr(module, name)
    return module


def _first(output: Any) -> Tensor:
    """The pooled embedding; CoCa's towers give their tokens behind it."""
    return output[0] if isinstance(output, tuple) else output


def _trunk(values: Mapping[str, Any], build: Build) -> nn.Module:
    import timm

    if "clip" in values:
        return clip_part(values["clip"], "image", build)
    settings: Any = timm.get_pretrained_cfg(values["network"])
    fixed = settings is not None and settings.fixed_input_size
    return timm.create_model(
        values["network"], pretrained=False, num_classes=0, **({"img_size": values["size"]} if fixed else {})
    )


def _feature_width(trunk: nn.Module, values: Mapping[str, Any]) -> int:
    """Width of what the network returns, asked of it without computing."""
    if "clip" in values:
        return int(values["clip"]["embed_dim"])
    size = int(values["size"])
    shadow = copy.deepcopy(trunk).to("meta").eval()
    with torch.no_grad():
        return int(shadow(torch.empty(1, 3, size, size, device="meta")).shape[-1])


def _encoder(kind: str, values: Mapping[str, Any]) -> Any:
    with needing("transformers", "hf", "a text tower of Hugging Face"):
        import transformers
    config_class, model_class = (getattr(transformers, name) for name in _CLASSES[kind])
    config = config_class(**values)
    config._attn_implementation = "eager" if kind in ("t5", "mpnet") else "sdpa"
    extra = {} if kind in ("t5", "distilbert") else {"add_pooling_layer": False}
    return model_class(config, **extra)


def check_towers(
    values: Mapping[str, Any], where: str, check: Callable[[Mapping[str, Any], str], dict[str, Any]]
) -> dict[str, Any]:
    """A checked deep copy of the architecture of joined towers. Raises InputError naming `where`.

    `check` is architecture.check_architecture, for the CLIPs whose towers it holds.
    """
    import timm

    if where.count(": the CLIP of the ") > _DEEPEST:
        raise InputError(f"{where[:100]}...: towers out of towers, more than {_DEEPEST} times")
    result: dict[str, Any] = copy.deepcopy(dict(values))
    _require_keys(result, {"embed_dim", "quick_gelu", KEY}, where)
    towers = _mapping(result[KEY], f"{where}: {KEY}")
    _require_keys(towers, {"image", "text", "head", "hidden"}, f"{where}: {KEY}")
    image, text = (_mapping(towers[tower], f"{where}: {tower}") for tower in ("image", "text"))
    for part, keys in ((image, {"size", "mean", "std", "trunks", "pretrained"}), (text, {*_TEXT})):
        _require_keys(part, keys | ({"whole"} & part.keys()), f"{where}: {'text' if part is text else 'image'}")
        if part.get("whole", True) is not True:
            raise InputError(f"{where}: 'whole' is true or left out, got {part['whole']!r:.100}")
    for value, limit, what in (
        (result["embed_dim"], 1 << 16, "embed_dim"),
        (towers["hidden"], 1 << 16, "hidden"),
        (image["size"], 4096, "size"),
    ):
        _require_number(value, limit, f"{where}: {what}")
    if towers["head"] not in HEADS or text["pooling"] not in POOLINGS or text["kind"] not in (*TEXT_KINDS, "clip"):
        raise InputError(f"{where}: unknown head, pooling or kind of text encoder")
    if not isinstance(image["trunks"], list) or not 1 <= len(image["trunks"]) <= 16:
        raise InputError(f"{where}: image.trunks must list one to sixteen networks")
    for trunk in image["trunks"]:
        kind = "clip" if "clip" in _mapping(trunk, f"{where}: trunks") else "network"
        _require_keys(trunk, {kind, "size", "mean", "std"}, f"{where}: trunks")
        _require_number(trunk["size"], 4096, f"{where}: size")
        if kind == "clip":
            trunk["clip"] = check(_mapping(trunk["clip"], f"{where}: clip"), f"{where}: the CLIP of the image tower")
            continue
        name = trunk["network"]
        if not isinstance(name, str) or "." in name or ":" in name or not timm.is_model(name):
            raise InputError(f"{where}: timm has no architecture {name!r:.200}{near(str(name), timm.list_models())}")
    for part in (image, *image["trunks"]):
        for key in ("mean", "std"):
            numbers = part[key]
            if not isinstance(numbers, list) or len(numbers) != 3 or not all(_finite(n) for n in numbers):
                raise InputError(f"{where}: '{key}' must be three numbers, got {numbers!r:.200}")
            if key == "std" and min(numbers) <= 0:
                raise InputError(f"{where}: 'std' must be above 0, got {numbers!r:.200}")
    config = _mapping(text["config"], f"{where}: text.config")
    if text["kind"] == "clip":
        text["config"] = check(config, f"{where}: the CLIP of the text tower")
        config = {}
    for part, inner in ((image, [trunk.get("clip") for trunk in image["trunks"]]), (text, [text["config"]])):
        if "whole" in part and [dict(clip or {}).get("embed_dim") for clip in inner] != [result["embed_dim"]]:
            raise InputError(f"{where}: a whole tower is one of a CLIP of the same embed_dim, {result['embed_dim']}")
    for key, value in config.items():
        if key not in CONFIG_KEYS:
            raise InputError(f"{where}: text.config: unknown key '{key!s:.100}'{nearest(str(key), CONFIG_KEYS)}")
        if key in _SIZES:
            _require_number(value, _SIZES[key], f"{where}: text.config.{key}")
        elif not isinstance(value, str | int | float | bool | type(None)):
            raise InputError(f"{where}: text.config.{key} must be one value, got {value!r:.200}")
    if not isinstance(text["padding"], int) or text["padding"] < 0:
        raise InputError(f"{where}: text.padding must be the id of the padding token, got {text['padding']!r:.100}")
    return result


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a mapping, got {value!r:.200}")
    return value


def _require_keys(values: Mapping[str, Any], keys: set[str], where: str) -> None:
    if set(values) != keys:
        wrong = sorted(map(str, set(values) ^ keys))[0]
        raise InputError(f"{where}: the key '{wrong:.100}' is {'missing' if wrong in keys else 'unknown'}")


def _require_number(value: Any, limit: int, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise InputError(f"{where} must be a whole number from 1 to {limit}, got {value!r:.200}")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def build_joined(architecture: Mapping[str, Any], build: Build, *, seed: int | None, device: str) -> JoinedTowers:
    """The module of a checked architecture, fp32, in training mode, its weights drawn under a generator of its own.

    `build` is architecture.build_module, for the towers of CLIPs.
    """
    try:
        with torch.random.fork_rng(devices=[], enabled=seed is not None), torch.device(device):
            if seed is not None:
                torch.manual_seed(seed)
            module = JoinedTowers(architecture, build)
            if device != "meta":
                module.visual.to(memory_format=torch.channels_last)
            return module.train()
    except InputError:
        raise
    except Exception as error:  # timm and transformers raise whatever an impossible size leads to
        raise InputError(f"these towers cannot be built: {first_line(error)}") from error
