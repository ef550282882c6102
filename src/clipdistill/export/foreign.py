"""`--to open_clip` and `--to hf`: folders that open_clip and transformers load without this package.

Weights are renamed, never approximated. What the other library cannot express is refused by name, and every folder is
loaded again, by that library where it is installed and by `load_model`, and compared before it gets its final name.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from clipdistill.errors import InputError, first_line
from clipdistill.export.folder import MARK, export_folder
from clipdistill.export.gate import Runner, Tolerance, compare, require
from clipdistill.export.tokenizer_json import FILE as TOKENIZER
from clipdistill.export.tokenizer_json import tokenizer_json
from clipdistill.export.transformers_js import write_transformers_js
from clipdistill.models.architecture import JOINED
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.hugging_face import rename_back
from clipdistill.models.known import BLOCK_SIZES, IMAGE_PROMPTS, OPEN_CLIP_CONFIG, is_own_module
from clipdistill.models.known import HUGGING_FACE_CONFIG as CONFIG
from clipdistill.models.load import load_model
from clipdistill.models.open_clip_models import SAFE_WEIGHTS
from clipdistill.models.tokenizers import ClipBpeTokenizer, HuggingFaceTokenizer, WordsTokenizer
from clipdistill.runtime.files import write_json

SENTENCE_TRANSFORMER = "modules.json"
_TOLERANCE = Tolerance(difference=1e-5, cosine=0.999999)
_VISION = {"image_size", "patch_size", "layers", "width", "head_width", "mlp_ratio", "norm_kwargs"}
_TEXT = {"context_length", "vocab_size", "layers", "width", "heads", "mlp_ratio", "norm_kwargs", "pool_type", "eos_id"}
# say nothing about what is computed
_TEXT_IGNORED = {"hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "pad_id"}


def export_foreign(model: ClipModel, out: Path, to: str) -> list[str]:
    """Write `model` as a folder for "open_clip" or "hf" (transformers, sentence-transformers, transformers.js).

    Returns what is not in it, in sentences. Raises InputError for what cannot be said.
    """
    if "exported" in model.architecture:
        raise InputError(f"'{model.name}' is an exported graph: name the model it was made from")
    if is_own_module(model.architecture):
        raise InputError(f"'{model.name}' is a module of your own, which {to} cannot build: export it with --to onnx")
    write = {"open_clip": write_open_clip, "hf": write_hugging_face}[to]
    notes: list[str] = []
    with export_folder(out) as folder:
        write(model, folder)
        _check_foreign(model, folder, to, out)
        back = load_model(folder, teacher=True)
        _require_equal(model, back, f"{out}, read again")
        if to == "hf" and all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
            notes = write_transformers_js(model, folder)
        elif to == "hf":
            notes = [
                "without onnx/ for transformers.js, which needs the extra export:  pip install 'clipdistill[export]'"
            ]
    return notes


def _require_equal(model: ClipModel, other: ClipModel, what: str) -> None:
    module = other.module

    def runner(encode: Any) -> Runner:
        return torch.inference_mode()(lambda values: encode(torch.from_numpy(values)).numpy())

    require(
        compare(model, {"image": runner(module.encode_image), "text": runner(module.encode_text)}), _TOLERANCE, what
    )
    captions = ["a photo of a dog", "the red car, 3 people"]
    if other.image != model.image or other.tokenizer(captions).tolist() != model.tokenizer(captions).tolist():
        raise InputError(f"{what}: the image preprocessing or the tokenizer is not the model's")


def _check_foreign(model: ClipModel, folder: Path, to: str, out: Path) -> None:
    """Load the folder by the library it is for and compare its embeddings with the model's."""
    if to == "open_clip":
        import open_clip

        try:
            module, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        except Exception as error:  # open_clip passes on whatever torch and timm raise
            raise InputError(f"{out}: open_clip cannot load the model ({first_line(error)})") from error
        _require_equal(model, dataclasses.replace(model, module=module.eval()), f"{out}, loaded by open_clip")
        return
    try:
        from transformers import CLIPModel
    except ImportError:
        return  # load_model reads the folder all the same
    theirs: Any = CLIPModel.from_pretrained(str(folder), local_files_only=True).eval()

    class Towers(torch.nn.Module):
        """transformers' projections behind open_clip's names."""

        def encode_image(self, images: torch.Tensor) -> torch.Tensor:
            return theirs.visual_projection(theirs.vision_model(pixel_values=images).pooler_output)

        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
            return theirs.text_projection(theirs.text_model(input_ids=tokens).pooler_output)

    _require_equal(model, dataclasses.replace(model, module=Towers()), f"{out}, loaded by transformers")


def _require_open_clip(model: ClipModel) -> None:
    if JOINED in model.architecture:
        raise InputError(f"'{model.name}' is joined of towers that no other library builds: export it with --to onnx")


def write_open_clip(model: ClipModel, folder: Path) -> None:
    """open_clip_config.json and weights, for  open_clip.create_model_and_transforms("local-dir:...")."""
    _require_open_clip(model)
    if BLOCK_SIZES in model.architecture:
        raise InputError(f"'{model.name}' has blocks of several sizes ('{BLOCK_SIZES}'), which open_clip cannot build")
    if IMAGE_PROMPTS in model.architecture:
        raise InputError(f"'{model.name}' has prompts ('{IMAGE_PROMPTS}'), unknown to open_clip: use --to onnx")
    architecture = copy.deepcopy(model.architecture)
    text = architecture["text_cfg"]
    tokenizer = model.tokenizer
    for key in ("hf_tokenizer_name", "tokenizer_kwargs"):
        text.pop(key, None)
    if isinstance(tokenizer, ClipBpeTokenizer):
        if tokenizer.clean != "lower":
            text["tokenizer_kwargs"] = {"clean": tokenizer.clean}
    else:
        # open_clip reads the folder's own tokenizer files; the name only says that there are some
        text["hf_tokenizer_name"] = "tokenizer.json"
        text["tokenizer_kwargs"] = {"clean": getattr(tokenizer, "clean", None) or "whitespace"}
        if getattr(tokenizer, "blank", None) is not None:
            text["tokenizer_kwargs"]["strip_sep_token"] = True
        _write_tokenizer(model, folder, clean=False)
    write_json(
        folder / OPEN_CLIP_CONFIG,
        {
            "model_cfg": architecture,
            "preprocess_cfg": {
                "size": [model.image.size, model.image.size],
                "mean": list(model.image.mean),
                "std": list(model.image.std),
                "interpolation": model.image.interpolation,
                "resize_mode": model.image.resize_mode,
            },
        },
    )
    save_file(_tensors(model.module.state_dict()), folder / SAFE_WEIGHTS, metadata=MARK)


def write_hugging_face(model: ClipModel, folder: Path) -> None:
    """config.json, model.safetensors, preprocessor_config.json and tokenizer files, for transformers.CLIPModel.

    modules.json makes the same files a SentenceTransformer.
    """
    write_json(folder / CONFIG, hugging_face_config(model))
    write_json(folder / "preprocessor_config.json", _preprocessor(model))
    tensors = {name.removeprefix("text."): t for name, t in model.module.state_dict().items() if name != "attn_mask"}
    tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    save_file(_tensors(rename_back(tensors)), folder / "model.safetensors", metadata=MARK)
    _write_tokenizer(model, folder, clean=True)
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.CLIPModel"}
    write_json(folder / SENTENCE_TRANSFORMER, [module])


def hugging_face_config(model: ClipModel) -> dict[str, Any]:
    """config.json of the equal transformers.CLIPModel. Raises InputError naming what CLIPModel has not."""
    architecture = model.architecture
    _require_open_clip(model)
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    refused = f"'{model.name}' cannot be a Hugging Face CLIPModel"
    for key in (BLOCK_SIZES, IMAGE_PROMPTS, "multimodal_cfg", "init_logit_bias"):
        if architecture.get(key) is not None:
            raise InputError(f"{refused}, because its architecture has '{key}': export it with --to open_clip or onnx")
    for key, kind in (("timm_model_name", "timm image tower"), ("hf_model_name", "Hugging Face text tower")):
        if vision.get(key) or text.get(key):
            raise InputError(
                f"{refused}, which has no {kind} ({vision.get(key) or text.get(key)}): use --to open_clip or onnx"
            )
    if not isinstance(vision.get("layers", 12), int):
        raise InputError(
            f"{refused}, whose image tower is a vision transformer and no ResNet: use --to open_clip or onnx"
        )
    _require_plain(vision, _VISION, set(), f"{refused}: its image tower has")
    _require_plain(text, _TEXT, _TEXT_IGNORED, f"{refused}: its text tower has")
    if text.get("pool_type", "argmax") not in ("argmax", "eos"):
        raise InputError(f"{refused}, because its text tower pools by '{text['pool_type']}'")
    end = text["eos_id"] if text.get("pool_type") == "eos" else int(model.tokenizer(["a"]).max())
    width, text_width = vision.get("width", 768), text.get("width", 512)

    def tower(kind: str, own: Mapping[str, Any], width: int, heads: int) -> dict[str, Any]:
        return {
            "model_type": f"clip_{kind}_model",
            "hidden_size": width,
            "intermediate_size": int(width * own.get("mlp_ratio", 4.0)),
            "num_hidden_layers": own.get("layers", 12),
            "num_attention_heads": heads,
            "hidden_act": "quick_gelu" if architecture["quick_gelu"] else "gelu",
            "layer_norm_eps": (own.get("norm_kwargs") or {}).get("eps", 1e-5),
            "projection_dim": model.embed_dim,
        }

    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.embed_dim,
        "logit_scale_init_value": 2.6592,
        "text_config": tower("text", text, text_width, text.get("heads", 8))
        | {
            "vocab_size": text.get("vocab_size", 49_408),
            "max_position_embeddings": text.get("context_length", 77),
            "bos_token_id": int(model.tokenizer(["a"])[0, 0]),
            "eos_token_id": end,
            "pad_token_id": end if isinstance(model.tokenizer, ClipBpeTokenizer) else 0,
        },
        "vision_config": tower("vision", vision, width, width // vision.get("head_width", 64))
        | {"image_size": model.image.size, "patch_size": vision.get("patch_size", 16), "num_channels": 3},
    }


def _require_plain(values: Mapping[str, Any], known: set[str], ignored: set[str], what: str) -> None:
    """Raise InputError for a setting that is not open_clip's default and not one that is translated."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    defaults = {f.name: f.default for kind in (CLIPVisionCfg, CLIPTextCfg) for f in dataclasses.fields(kind)}
    for key, value in values.items():
        if key in known and not (key == "norm_kwargs" and value and set(value) != {"eps"}):
            continue
        if key in ignored or value in (None, False, defaults.get(key)) or (key == "block_type" and value == "default"):
            continue
        raise InputError(f"{what} '{key}' {value!r}, which CLIPModel has not: use --to open_clip or onnx")


def _preprocessor(model: ClipModel) -> dict[str, Any]:
    image = model.image
    if image.resize_mode == "longest":
        raise InputError(
            f"'{model.name}' pads its images ('longest'), which CLIPImageProcessor does not: use --to onnx"
        )
    square = {"height": image.size, "width": image.size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image.size} if image.resize_mode == "shortest" else square,
        "resample": 3 if image.interpolation == "bicubic" else 2,
        "do_center_crop": image.resize_mode == "shortest",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


_HF_NAMES = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}


def _write_tokenizer(model: ClipModel, folder: Path, *, clean: bool) -> None:
    """tokenizer.json and tokenizer_config.json for transformers. `clean` False: open_clip cleans the text itself."""
    tokenizer = model.tokenizer
    definition = tokenizer_json(tokenizer)
    if isinstance(tokenizer, HuggingFaceTokenizer) and not clean:
        definition = dict(tokenizer.definition)
    definition |= {"truncation": None, "padding": None}  # transformers' own business
    names: dict[str, str] = {}
    if isinstance(tokenizer, ClipBpeTokenizer):
        text = json.dumps(definition, ensure_ascii=False)
        for ours, theirs in _HF_NAMES.items():
            text = text.replace(ours, theirs)
        definition = json.loads(text)
        # the end token fills the rows: the first one is where the text is read, so what follows does not matter
        names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        names["unk_token"] = "<|endoftext|>"
    elif isinstance(tokenizer, WordsTokenizer):
        names = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unknown>"}
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        vocabulary = tokenizer._fast.get_vocab(with_added_tokens=True)
        by_id = {number: token for token, number in vocabulary.items()}
        names = {"pad_token": by_id[tokenizer.to_dict()["padding"]]}
        if tokenizer.blank is not None:
            names["sep_token"] = by_id[tokenizer.blank]
    write_json(folder / TOKENIZER, definition)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokenizer.context_length}
    write_json(folder / "tokenizer_config.json", settings | {"clean_up_tokenization_spaces": False} | names)


def _tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, each with storage of its own, as safetensors requires."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
