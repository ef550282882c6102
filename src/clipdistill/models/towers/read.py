"""Joined towers by name: the pretrained parts read and put together, heads at random."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipdistill.data.views import ImageSpec
from clipdistill.errors import InputError, first_line, nearest
from clipdistill.models import hub
from clipdistill.models.architecture import build_module, check_architecture
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.hugging_face import TOKENIZER_FILES, transformers_tokenizer
from clipdistill.models.known import known_architectures, near, shipped_models
from clipdistill.models.save import require_equal_shapes
from clipdistill.models.tokenizers import CLIP_CONTEXT_LENGTH, Tokenizer
from clipdistill.models.towers.modules import CONFIG_KEYS, KEY, LAYERS, JoinedTowers, take_part
from clipdistill.models.towers.names import CLIP, ImageTowerName, TowersName, parse, text_config
from clipdistill.models.weights import load_safetensors
from clipdistill.runtime.files import parse_json, read_json

logger = logging.getLogger("clipdistill")
_SENTENCE_FILES = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")
_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "end",
    "mean": "mean",
    "cls": "cls",
    "lasttoken": "end",
}
"""sentence-transformers' words for what can be done here."""
_UNUSED = ("pooler.", "cls.", "lm_head.", "decoder.", "vocab_", "qa_outputs.", "classifier.", "pre_classifier.")


def read_towers(name: str, load: Callable[..., ClipModel], *, seed: int = 0) -> ClipModel:
    """The model `towers:...`: its pretrained towers, and heads with random weights under `seed`.

    load: load_model, which reads the models whose towers are taken. Raises InputError, one sentence, for towers that
    are not there or do not fit.
    """
    wanted = parse(name)
    sources = {clip: load(clip) for clip in _clips(wanted)}
    parts = [_read_image(image, wanted.size, name, sources, load) for image in wanted.images]
    largest = max((description for description, _ in parts), key=lambda trunk: trunk["size"])
    image = {key: largest[key] for key in ("size", "mean", "std")}
    trunks = [{k: d[k] for k in ("clip", "network", "size", "mean", "std") if k in d} for d, _ in parts]
    whole = [sources[str(image.clip)] for image in wanted.images if image.whole]
    whole += [sources[wanted.text.removeprefix(CLIP)]] if wanted.whole_text else []
    scales = [getattr(model.module, "logit_scale", None) for model in whole]  # the multiplier goes with the embedding
    dims = {model.embed_dim for model in whole} | ({wanted.dim} if wanted.dim else set())
    if len(dims) > 1:
        raise InputError(
            f"'{name}': a whole tower keeps its own embedding, and here are several widths: {sorted(dims)}"
        )
    dim = dims.pop() if dims else 256
    if wanted.text.startswith(CLIP):
        folder, source = None, sources[wanted.text.removeprefix(CLIP)]
        text, tokenizer = _describe_clip_text(source, wanted)
    else:
        folder, source = _text_folder(wanted.text), None
        text, context = _describe_text(folder, wanted)
        tokenizer = transformers_tokenizer(str(folder), context, local=True)
        text["padding"] = tokenizer.to_dict()["padding"]
        if tokenizer.vocab_size > text["config"].get("vocab_size", tokenizer.vocab_size):
            raise InputError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the encoder fewer: not one model"
            )
    random = {clip for clip in sources if clip in known_architectures() and clip not in shipped_models()}
    for clip in sorted(random):
        logger.warning("%s: %s has random weights: name a model with weights", name, clip)
    pretrained = any(image.clip not in random and part[1] is not None for image, part in zip(wanted.images, parts))
    architecture = check_architecture(
        {
            "embed_dim": dim,
            "quick_gelu": False,
            KEY: {
                "head": wanted.head,
                "hidden": wanted.hidden,
                "image": {**image, "trunks": trunks, "pretrained": pretrained}
                | ({"whole": True} if wanted.images[0].whole else {}),
                "text": text | ({"whole": True} if wanted.whole_text else {}),
            },
        },
        f"'{name}'",
    )
    module: Any = build_module(architecture, seed=seed)
    for trunk, (description, tensors) in zip(module.visual.trunks, parts, strict=True):
        if tensors is None:
            logger.warning("%s: %s starts from random weights: name a file or a tag", name, description["network"])
        elif "clip" in description:
            trunk.load_state_dict(tensors)
        else:
            _fill_trunk(trunk, tensors, description)
    if folder is not None:
        _fill_text(module, folder, text)
    elif source is not None:
        module.text.transformer.tower.load_state_dict(take_part(source.module, "text").state_dict())
    if scales and scales[-1] is not None:
        module.logit_scale.data.copy_(scales[-1].detach())
    spec = ImageSpec(**image, interpolation=largest["interpolation"], resize_mode=largest["resize_mode"])
    return ClipModel(name, module, spec, tokenizer, dim, tokenizer.context_length, architecture)


def _clips(wanted: TowersName) -> set[str]:
    """Names of the models whose towers are taken."""
    named = {image.clip for image in wanted.images if image.clip is not None}
    return named | ({wanted.text.removeprefix(CLIP)} if wanted.text.startswith(CLIP) else set())


def _read_clip_image(model: ClipModel, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(description of the image tower of a model, its tensors)."""
    if not (KEY in model.architecture or "vision_cfg" in model.architecture):
        raise InputError(f"'{name}': no tower can be taken out of {model.name}, whose code is its own")
    description = {
        "clip": model.architecture,
        "size": model.image.size,
        "mean": list(model.image.mean),
        "std": list(model.image.std),
        "interpolation": model.image.interpolation,
        "resize_mode": model.image.resize_mode,
    }
    return description, model.module.visual.state_dict()


def _describe_clip_text(model: ClipModel, wanted: TowersName) -> tuple[dict[str, Any], Tokenizer]:
    """(description of the text tower of a model, its tokenizer)."""
    if not (KEY in model.architecture or "text_cfg" in model.architecture):
        raise InputError(f"no tower can be taken out of {model.name}, whose code is its own")
    tokenizer = model.tokenizer
    if wanted.context is not None and wanted.context != model.context_length:
        if wanted.context > model.context_length or not model.reads_only_text:
            raise InputError(f"{model.name}: its captions have {model.context_length} tokens, not {wanted.context}")
        tokenizer = tokenizer.with_context_length(wanted.context)
    return {
        "kind": "clip",
        "config": model.architecture,
        "pooling": "end",
        "padding": tokenizer.to_dict().get("padding", 0),
    }, tokenizer


def _read_image(
    image: ImageTowerName, size: int | None, name: str, sources: Mapping[str, ClipModel], load: Callable[..., ClipModel]
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """(description of one trunk, its tensors or None)."""
    import timm

    if image.clip is not None:
        source = sources[image.clip]
        return _read_clip_image(source if size is None else load(source, image_size=size), name)
    base, _, tag = image.network.partition(".")
    if not timm.is_model(base):
        raise InputError(f"'{name}': timm has no architecture {base!r}{near(base, timm.list_models())}")
    if tag and tag not in (known := [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")]):
        raise InputError(f"'{name}': timm has no weights '{tag}' for {base}{nearest(tag, known)}")
    settings: Any = timm.get_pretrained_cfg(image.network)
    description = {
        "network": base,
        "size": size or int(settings.input_size[-1]),
        "native": int(settings.input_size[-1]),
        "mean": list(settings.mean),
        "std": list(settings.std),
        "interpolation": settings.interpolation if settings.interpolation in ("bicubic", "bilinear") else "bicubic",
        "resize_mode": "shortest",
        "file": str(image.file or f"timm:{image.network}"),
    }
    if image.file is not None:
        return description, load_safetensors(image.file)
    if not tag:
        return description, None
    repository = settings.hf_hub_id
    repository += image.network if repository.endswith("/") else ""
    path = hub.fetch(repository, ("model.safetensors",), f"the weights of timm:{image.network}")
    return description, load_safetensors(path)


def _fill_trunk(trunk: nn.Module, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Load a network's weights but its classifier, position embeddings carried over to the tower's size."""
    import timm

    network = description["network"]
    source: nn.Module = trunk
    resized = description["size"] != description["native"]
    if resized and {n: t.shape for n, t in trunk.state_dict().items() if n in tensors} != {
        n: tensors[n].shape for n in trunk.state_dict() if n in tensors
    }:
        source = timm.create_model(network, pretrained=False, num_classes=0)
    expected = source.state_dict()
    parts: Any = source.default_cfg["classifier"]  # type: ignore[index]
    classifiers = tuple(f"{part}." for part in (parts if isinstance(parts, list | tuple) else (parts,)))
    kept = {n: t for n, t in tensors.items() if n in expected or not n.startswith(classifiers)}
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):
            kept.setdefault(name, torch.zeros((), dtype=tensor.dtype))
    require_equal_shapes(
        {n: t.shape for n, t in kept.items()},
        {n: t.shape for n, t in expected.items()},
        description["file"],
        f"timm's {network}",
    )
    source.load_state_dict({n: t.to(expected[n].dtype) for n, t in kept.items()})
    if source is not trunk:
        size = description["size"]
        try:
            source.set_input_size(img_size=size)  # type: ignore[operator]
            trunk.load_state_dict(source.state_dict())
        except Exception as error:  # timm's networks assert
            raise InputError(f"{network} cannot take images of {size} pixels ({first_line(error)})") from error


def _text_folder(name: str) -> Path:
    """The folder of a text encoder; one of the hub is fetched, what is missing said beforehand."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    config = hub.fetch(name, ("config.json",), f"the text tower {name}")
    hub.fetch(name, ("model.safetensors",), f"the weights of the text tower {name}")
    wanted = {*TOKENIZER_FILES, *_SENTENCE_FILES, "vocab.txt", "sentencepiece.bpe.model", "spiece.model"}
    if not any(hub.cached(name, file) for file in TOKENIZER_FILES):
        for file in sorted(wanted & set(hub.list_files(name, f"the text tower {name}"))):
            hub.fetch(name, (file,), f"{file} of the text tower {name}")
    return config.parent


def _describe_text(folder: Path, wanted: TowersName) -> tuple[dict[str, Any], int]:
    """(description of the text tower, context length)."""
    values = text_config(folder)
    kind = str(values["model_type"])
    config = {key: values[key] for key in CONFIG_KEYS if key in values}
    layers = LAYERS.get(kind, "num_hidden_layers")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(f"{folder}: an encoder with {config['position_embedding_type']} positions cannot be a tower")
    whole = config.setdefault(layers, 6 if kind in ("distilbert", "t5") else 12)  # where the file leaves it out
    if wanted.text_layers is not None:
        if not isinstance(whole, int) or wanted.text_layers > whole:
            raise InputError(f"{folder}: the encoder has {whole} layers, and text_layers={wanted.text_layers}")
        config[layers] = wanted.text_layers
    pooling, longest = _sentence_settings(folder)
    if wanted.pooling is None and pooling is None:
        logger.info("%s does not say how it is pooled: the mean over its tokens is taken", folder)
    positions = config.get("max_position_embeddings", 1 << 16)
    limit = int(positions) - 2 if kind in ("roberta", "xlm-roberta", "camembert", "mpnet") else int(positions)  # type: ignore[call-overload]
    if wanted.context is not None and wanted.context > limit:
        raise InputError(f"{folder}: the encoder has places for {limit} tokens, and context={wanted.context}")
    context = wanted.context or min(longest or CLIP_CONTEXT_LENGTH, CLIP_CONTEXT_LENGTH, limit)
    return {"kind": kind, "config": config, "pooling": wanted.pooling or pooling or "mean", "padding": 0}, context


def _sentence_settings(folder: Path) -> tuple[str | None, int | None]:
    """(pooling, longest text) of sentence-transformers' files; None where there are none."""
    path = folder / "1_Pooling" / "config.json"
    if (folder / "modules.json").is_file():
        modules = parse_json((folder / "modules.json").read_bytes(), str(folder / "modules.json"))
        parts = [part for part in modules if isinstance(part, dict)]
        pools = [str(part.get("path", "")) for part in parts if str(part.get("type", "")).endswith("Pooling")]
        if pools and Path(pools[0]).name == pools[0]:
            path = folder / pools[0] / "config.json"
        if any(str(part.get("type", "")).endswith("Dense") for part in parts):
            logger.warning("%s: its dense layer is left out: the head takes its place", folder)
    pooling = None
    if path.is_file():
        values = read_json(path)
        on = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
        chosen = str(values["pooling_mode"]) if "pooling_mode" in values else "+".join(on)
        if chosen not in _POOLINGS:
            raise InputError(f"{path}: pooling by {chosen or 'nothing'} is not supported: give  pooling=mean|cls|end")
        pooling = _POOLINGS[chosen]
    settings = folder / "sentence_bert_config.json"
    longest = read_json(settings).get("max_seq_length") if settings.is_file() else None
    return pooling, longest if isinstance(longest, int) and longest > 2 else None


def _fill_text(module: JoinedTowers, folder: Path, text: Mapping[str, Any]) -> None:
    """Load the encoder's weights: those of its layers that are there, without heads of other tasks."""
    encoder = module.text.transformer
    expected = encoder.state_dict()
    path = folder / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{folder}: the weights of a text tower are read from model.safetensors, which is not there")
    found = load_safetensors(path)
    prefixes = {name.partition(".")[0] for name in found} - {name.partition(".")[0] for name in expected}
    base = str(getattr(encoder, "base_model_prefix", ""))
    if base in prefixes and text["kind"] != "t5":
        found = {name.removeprefix(f"{base}."): tensor for name, tensor in found.items()}
    if "encoder.embed_tokens.weight" in expected and "shared.weight" in found:
        found["encoder.embed_tokens.weight"] = found["shared.weight"]
    kept = {name: tensor for name, tensor in found.items() if name in expected}
    left = [name for name in found if name not in expected and not name.startswith(_UNUSED)]
    layers = int(text["config"][LAYERS.get(text["kind"], "num_hidden_layers")])
    foreign = [name for name in left if "position_ids" not in name and not _beyond(name, layers)]
    if foreign:
        raise InputError(f"{path}: holds {foreign[0]}, which is no part of a {text['kind']} encoder")
    require_equal_shapes(
        {n: t.shape for n, t in kept.items()},
        {n: t.shape for n, t in expected.items()},
        str(path),
        "the encoder in config.json",
    )
    encoder.load_state_dict({n: t.to(expected[n].dtype) for n, t in kept.items()})


def _beyond(name: str, layers: int) -> bool:
    """Whether a tensor belongs to a layer that `text_layers` leaves out."""
    number = next((int(part) for part in name.split(".") if part.isdigit()), -1)
    return number >= layers
