"""Checkpoint files of unknown origin: read without running code, renamed to open_clip's names, compared."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from clipdistill.errors import InputError, first_line
from clipdistill.models.save import require_equal_shapes
from clipdistill.runtime.files import require_readable

# wrappers of DDP, torch.compile and TinyCLIP, which split the model in three
_PREFIXES = ("module.", "_orig_mod.", "_image_encoder.", "_text_encoder.", "_logit_scale.")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# numbers and masks that OpenAI's, old open_clip's and transformers' files carry beside the weights
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask")


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file: safetensors, or a PyTorch file that holds nothing but data.

    Recognised by content. A 'state_dict' inside and the prefixes of DDP, torch.compile and TinyCLIP are unwrapped.
    Raises InputError for files that cannot be read, and for pickles with anything but data in them: unpickling those
    can run code.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    content: Any = load_safetensors(path) if _is_safetensors(path) else _load_pytorch(path)
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {
        _bare(str(name)): value for name, value in content.items() if isinstance(value, torch.Tensor)
    } if isinstance(content, Mapping) else {}  # fmt: skip
    tensors = {n: t for n, t in tensors.items() if n not in _NOT_WEIGHTS and not n.endswith("position_ids")}
    if not tensors:
        raise InputError(f"{path}: holds no tensors by name, so it is not a checkpoint of a model")
    return tensors


def _bare(name: str) -> str:
    """`name` without the prefixes of wrappers, however nested."""
    while True:
        prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
        if prefix is None:
            return name
        name = name[len(prefix) :]


def _is_safetensors(path: Path) -> bool:
    """A safetensors file starts with the length of its header, then the header, a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. Raises InputError when it is not one."""
    require_readable(path)
    try:
        return load_file(path)
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise InputError(
            f"{path}: not readable as safetensors ({error}): the file is cut short or is something else"
        ) from error


def _load_pytorch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():  # torch names the class or function that was to be imported
            raise InputError(
                f"{path}: refused, because it holds Python objects besides tensors and unpickling them could run code: "
                "save the state dictionary alone, best as safetensors, where you trust the file"
            ) from error
        raise InputError(f"{path}: not readable as a checkpoint (no file of torch.save)") from error
    except Exception as error:  # torch.load raises many kinds for damaged files
        if zipfile.is_zipfile(path) and "TorchScript" in str(error):
            raise InputError(
                f"{path}: refused, because it is a TorchScript archive, which holds code: save its state dictionary"
            ) from error
        reason = first_line(error) if zipfile.is_zipfile(path) else "no file of torch.save, or cut short"
        raise InputError(f"{path}: not readable as a checkpoint ({reason})") from error


def fit(tensors: Mapping[str, torch.Tensor], module: nn.Module, where: str, what: str) -> dict[str, torch.Tensor]:
    """`tensors` under the names and shapes of the module's state dictionary, in its number formats.

    Known differences between writers are settled: MobileCLIP's names, the text tower flat or under 'text.', a logit
    scale of shape (1,), a missing logit bias (zero). Raises InputError listing the first tensors that still differ;
    `where` names the file, `what` the model.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    result = dict(convert_state_dict(module, dict(tensors)))
    if hasattr(module, "text"):
        result = convert_to_custom_text_state_dict(result)
    else:
        result = {name.removeprefix("text."): tensor for name, tensor in result.items()}
    expected = module.state_dict()
    for name in ("logit_scale", "logit_bias"):
        if name in result and name in expected and result[name].numel() == 1:
            result[name] = result[name].reshape(expected[name].shape)
    if "logit_bias" in expected and "logit_bias" not in result and "logit_scale" in result:
        result["logit_bias"] = torch.zeros_like(expected["logit_bias"], device="cpu")
    for name, tensor in expected.items():  # written by newer versions of torch only
        if name.endswith("num_batches_tracked") and name not in result:
            result[name] = torch.zeros((), dtype=tensor.dtype)
    require_equal_shapes(
        {n: t.shape for n, t in result.items()}, {n: t.shape for n, t in expected.items()}, where, what
    )
    return {name: tensor.to(expected[name].dtype) for name, tensor in result.items()}


def resize_positions(tensors: dict[str, torch.Tensor], grid: tuple[int, int]) -> None:
    """Interpolate an image tower's position embeddings in place to a grid (rows, columns); open_clip's rule.

    Works on vision transformers and on the attention pool of CLIP's ResNets; others have none and are left alone.
    """
    from open_clip.model import resize_pos_embed

    for name in ("visual.positional_embedding", "visual.attnpool.positional_embedding"):
        if name in tensors:
            part = {"visual.positional_embedding": tensors[name]}
            resize_pos_embed(part, SimpleNamespace(visual=SimpleNamespace(grid_size=grid)))
            tensors[name] = part["visual.positional_embedding"]
