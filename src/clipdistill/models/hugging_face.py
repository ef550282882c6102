"""CLIP models in Hugging Face form (config.json, model.safetensors), converted to the equal open_clip architecture.

The weights are renamed, never approximated: embeddings equal those of transformers.CLIPModel up to rounding. What
open_clip cannot express (two activations, another model type) is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clipdistill.errors import InputError, first_line, needing
from clipdistill.models.architecture import build_module, check_architecture, image_size
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.hub import cached, require_network
from clipdistill.models.known import HUGGING_FACE_CONFIG as CONFIG
from clipdistill.models.known import table
from clipdistill.models.tokenizers import CLIP_CONTEXT_LENGTH, ClipBpeTokenizer, HuggingFaceTokenizer, Tokenizer
from clipdistill.models.weights import fit, read_state_dict
from clipdistill.runtime.files import read_json

INDEX = "model.safetensors.index.json"
WEIGHT_FILES = ("model.safetensors", INDEX, "pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "vocab.txt")
PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# transformers writes only what differs from the values of CLIPTextConfig and CLIPVisionConfig; names: theirs -> ours
_TABLES = table("hugging_face")
_WHOLE_NAMES, _TOWER_PREFIXES, _BLOCK_NAMES = (_TABLES[key] for key in ("names", "tower_prefixes", "block_names"))
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


def read_hugging_face(folder: Path, name: str) -> ClipModel:
    """The CLIP model in a Hugging Face folder. Raises InputError when it is not one or open_clip cannot express it."""
    from clipdistill.config import as_dict, build
    from clipdistill.data.views import ImageSpec

    config = read_json(folder / CONFIG)
    architecture = check_architecture(architecture_from(config, str(folder / CONFIG)), str(folder / CONFIG))
    module = build_module(architecture)
    tensors = rename(_read_weights(folder))
    module.load_state_dict(fit(tensors, module, str(folder), f"the model in {CONFIG}"))
    values = {**as_dict(ImageSpec()), **_preprocessing(folder), "size": image_size(module)}
    image = build(ImageSpec, values, f"{folder}: image preprocessing")
    tokenizer = _read_tokenizer(folder, architecture["text_cfg"])
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.require_fits(architecture["text_cfg"]["vocab_size"], str(folder))
    return ClipModel(name, module, image, tokenizer, architecture["embed_dim"], tokenizer.context_length, architecture)


def architecture_from(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The open_clip architecture equal to a transformers CLIPConfig (the content of config.json)."""
    if config.get("model_type") != "clip":
        raise InputError(f"{where}: the model type is {config.get('model_type')!r}; only 'clip' can be read")
    text = {**_TABLES["text_defaults"], **_section(config, "text", where)}
    vision = {**_TABLES["vision_defaults"], **_section(config, "vision", where)}
    activation = text["hidden_act"]
    if activation != vision["hidden_act"] or activation not in ("quick_gelu", "gelu"):
        raise InputError(
            f"{where}: activations {activation!r} (text) and {vision['hidden_act']!r} (vision) are not open_clip's: "
            "both must be 'quick_gelu' or both 'gelu'"
        )
    if vision["num_channels"] != 3 or vision["hidden_size"] % vision["num_attention_heads"]:
        raise InputError(f"{where}: the vision tower (channels, heads) has no open_clip equivalent")
    vision_cfg = {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "layers": vision["num_hidden_layers"],
        "width": vision["hidden_size"],
        "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
    }
    text_cfg = {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "layers": text["num_hidden_layers"],
        "width": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
    }
    for part, values in ((vision_cfg, vision), (text_cfg, text)):
        if values["layer_norm_eps"] != 1e-5:
            part["norm_kwargs"] = {"eps": values["layer_norm_eps"]}
    # 2 is a historical mistake in config files, which transformers answers with the largest id of the row, as open_clip
    # does
    if text["eos_token_id"] not in (2, text["vocab_size"] - 1):
        text_cfg |= {"pool_type": "eos", "eos_id": text["eos_token_id"]}
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
    }


def _section(config: Mapping[str, Any], tower: str, where: str) -> dict[str, Any]:
    """A tower's part of the configuration; early files keep it under '<tower>_config_dict'."""
    section = config.get(f"{tower}_config_dict") or config.get(f"{tower}_config") or {}
    if not isinstance(section, dict):
        raise InputError(f"{where}: '{tower}_config' is not a mapping")
    return {key: value for key, value in section.items() if value is not None}


def rename(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a transformers CLIPModel under open_clip's names: q, k, v stacked, projections transposed."""
    result: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name in _WHOLE_NAMES:
            renamed = _WHOLE_NAMES[name]
            result[renamed] = tensor.t().contiguous() if renamed in ("visual.proj", "text_projection") else tensor
            continue
        block = name
        for theirs, ours in _TOWER_PREFIXES.items():
            block = block.replace(theirs, ours) if block.startswith(theirs) else block
        for theirs, ours in _BLOCK_NAMES.items():
            block = block.replace(theirs, ours)
        head, letter, kind = _projection(block)
        if letter:
            parts.setdefault(f"{head}.attn.in_proj_{kind}", {})[letter] = tensor
        else:
            result[block] = tensor
    for name, by_letter in parts.items():
        if len(by_letter) == 3:
            result[name] = torch.cat([by_letter[letter] for letter in "qkv"])
    return result


def rename_back(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `rename`: open_clip's tensors (text tower flat) under the names of a transformers CLIPModel."""
    whole = {ours: theirs for theirs, ours in _WHOLE_NAMES.items()}
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name in whole:
            transposed = name in ("visual.proj", "text_projection")
            result[whole[name]] = tensor.t().contiguous() if transposed else tensor
            continue
        block = name
        for theirs, ours in _TOWER_PREFIXES.items():
            block = theirs + block.removeprefix(ours) if block.startswith(ours) else block
        for theirs, ours in _BLOCK_NAMES.items():
            block = block.replace(ours, theirs)
        head, found, kind = block.partition(".attn.in_proj_")
        if found:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{head}.self_attn.{letter}_proj.{kind}"] = part.contiguous()
        else:
            result[block] = tensor
    return result


def _projection(name: str) -> tuple[str, str, str]:
    """('x.0', 'q', 'weight') for 'x.0.self_attn.q_proj.weight'; empty strings for another name."""
    head, found, tail = name.partition(".self_attn.")
    letter, is_projection, kind = tail.partition("_proj.")
    return (head, letter, kind) if found and is_projection and letter in ("q", "k", "v") else ("", "", "")


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    for filename in WEIGHT_FILES:
        path = folder / filename
        if not path.is_file():
            continue
        if filename != INDEX:
            return read_state_dict(path)
        shards = sorted(set(read_json(path).get("weight_map", {}).values()))
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise InputError(f"{path}: does not list weight files of its own folder")
        return {name: tensor for shard in shards for name, tensor in read_state_dict(folder / shard).items()}
    raise InputError(f"{folder}: has {CONFIG} but none of {', '.join(WEIGHT_FILES)}")


def _preprocessing(folder: Path) -> dict[str, Any]:
    """Mean, std, interpolation, resize mode from a preprocessor configuration; empty where there is none."""
    path = next((folder / name for name in PREPROCESSOR_FILES if (folder / name).is_file()), None)
    if path is None:
        return {}
    values = read_json(path)
    values = values.get("image_processor", values)
    result: dict[str, Any] = {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in values:
            result[ours] = values[theirs]
    resample = values.get("resample", 3)
    if resample not in _INTERPOLATIONS:
        raise InputError(f"{path}: interpolation {resample!r} is not supported (2 is bilinear, 3 bicubic)")
    result["interpolation"] = _INTERPOLATIONS[resample]
    size = values.get("size", {})
    squashes = (
        isinstance(size, dict)
        and "shortest_edge" not in size
        and "height" in size
        and not values.get("do_center_crop", True)
    )
    result["resize_mode"] = "squash" if squashes else "shortest"
    return result


def _read_tokenizer(folder: Path, text_cfg: Mapping[str, Any]) -> Tokenizer:
    """CLIP's own vocabulary where the files hold that one or hold none; else the folder's tokenizer."""
    context_length = text_cfg["context_length"]
    vocabulary = _vocabulary(folder)
    clip = ClipBpeTokenizer(context_length)
    if vocabulary is None:
        if text_cfg["vocab_size"] != clip.vocab_size:
            raise InputError(
                f"{folder}: holds no tokenizer ({', '.join(TOKENIZER_FILES[:2])}), and its vocabulary of "
                f"{text_cfg['vocab_size']} ids is not CLIP's"
            )
        return clip
    if vocabulary == _clip_entries():
        return clip
    return transformers_tokenizer(str(folder), context_length, local=True)


def _clip_entries() -> dict[str, int]:
    """CLIP's vocabulary as Hugging Face's vocab.json writes it."""
    from open_clip.tokenizer import SimpleTokenizer

    encoder = dict(SimpleTokenizer().encoder)
    for ours, theirs in (("<start_of_text>", "<|startoftext|>"), ("<end_of_text>", "<|endoftext|>")):
        encoder[theirs] = encoder.pop(ours)
    return encoder


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Token to id from the folder's tokenizer files, or None where there are none."""
    if (folder / "vocab.json").is_file():
        return read_json(folder / "vocab.json")
    if (folder / "tokenizer.json").is_file():
        model = read_json(folder / "tokenizer.json").get("model", {})
        return dict(model["vocab"]) if isinstance(model, dict) and isinstance(model.get("vocab"), dict) else {}
    return None


def transformers_tokenizer(
    source: str,
    context_length: int = CLIP_CONTEXT_LENGTH,
    *,
    local: bool,
    clean: str | None = None,
    strip_sep_token: bool = False,
) -> Tokenizer:
    """The tokenizer of a folder or hub repository, storable; read by transformers, never with code of theirs."""
    files = (*TOKENIZER_FILES[:2], *_SENTENCEPIECE_FILES)
    if Path(source).is_dir() and not any((Path(source) / file).is_file() for file in files):
        # transformers would make an empty vocabulary, to which every word is unknown
        raise InputError(f"{source}: holds no tokenizer ({', '.join(files)}): copy those files beside the weights")
    with needing("transformers", "hf", f"the tokenizer of {source}"):
        from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for files it cannot use
        raise InputError(f"{source}: the tokenizer cannot be read ({first_line(error)})") from error
    return HuggingFaceTokenizer.from_transformers(tokenizer, context_length, clean, strip_sep_token)


def tokenizer_for(architecture: Mapping[str, Any], name: str, folder: Path | None = None) -> Tokenizer:
    """The tokenizer an open_clip architecture was made for, from `folder`, the hub's cache or the hub."""
    text = architecture["text_cfg"]
    context_length = text.get("context_length", 77)
    settings = text.get("tokenizer_kwargs") or {}
    repository = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    if repository is None:
        return ClipBpeTokenizer(context_length, settings.get("clean", "lower"))
    if text.get("tokenizer_mode"):
        raise InputError(f"{name}: the tokenizer mode {text['tokenizer_mode']!r} is not supported")
    options = {"clean": settings.get("clean", "whitespace"), "strip_sep_token": settings.get("strip_sep_token", False)}
    if folder is not None and any((folder / file).is_file() for file in TOKENIZER_FILES[:2]):
        return transformers_tokenizer(str(folder), context_length, local=True, **options)
    local = any(cached(repository, file) is not None for file in (*TOKENIZER_FILES[:2], *_SENTENCEPIECE_FILES))
    if not local:
        require_network(f"the tokenizer of {name}", repository)
    return transformers_tokenizer(repository, context_length, local=local, **options)
