"""Model folders: `model.json` (what the model is) and `model.safetensors` (its weights), written whole or not at all.

The JSON holds everything that must never be guessed when the model is read again: architecture, activation, image
specification, tokenizer. Neither file can carry code.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clipdistill.config import as_dict, build
from clipdistill.data.views import ImageSpec
from clipdistill.errors import InputError, MissingExtraError
from clipdistill.models.architecture import build_module, check_architecture, image_size, shapes, text_sizes
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.known import is_own_module
from clipdistill.models.own import plugin_of, rebuilt
from clipdistill.models.tokenizers import OwnTokenizer, tokenizer_from_dict
from clipdistill.runtime.files import new_folder, read_json, require_readable, sha256, write_json

FORMAT = 1
DESCRIPTION, WEIGHTS = "model.json", "model.safetensors"
_LARGEST_DESCRIPTION = 256 << 20  # bytes; the largest published tokenizer takes 35 MB
_KEYS = {
    "format", "name", "architecture", "activation", "image", "tokenizer", "dtype", "weights_sha256", "parameters",
    "versions"
}  # fmt: skip


def save_model(model: ClipModel, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
    """Write `model` as a model folder, atomically: a reader sees the old folder, or the new one, never a part.

    `dtype` torch.float16 or torch.bfloat16 rounds floating-point weights to halve the file; None keeps them to the bit.
    Raises InputError when the destination is a file or a folder that is not a model folder.
    """
    model_writer(model, dtype)(Path(folder))


def model_writer(model: ClipModel, dtype: torch.dtype | None = None) -> Callable[[Path], None]:
    """A function that does what `save_model` does with the model as it is now, whatever becomes of it until then."""
    tensors, description = _stored_tensors(model, dtype), _description(model, dtype)

    def write(folder: Path) -> None:
        with new_folder(folder, lambda old: (old / DESCRIPTION).exists(), "model folder", made_here) as new:
            save_file(tensors, new / WEIGHTS)
            write_json(new / DESCRIPTION, {**description, "weights_sha256": sha256(new / WEIGHTS)}, checked=True)

    return write


def made_here(part: Path) -> bool:
    """Whether a part of a model folder, by its path in it, is its own, and nothing that the user has put beside it."""
    return str(part) in (DESCRIPTION, WEIGHTS, "ternary.safetensors", "ternary.json")


def _stored_tensors(model: ClipModel, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The state dictionary on the CPU, each tensor with storage of its own, as safetensors requires."""
    tensors = {}
    for name, tensor in model.module.state_dict().items():
        target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        tensors[name] = tensor.detach().to("cpu", target, copy=True).contiguous()
    return tensors


def _description(model: ClipModel, dtype: torch.dtype | None) -> dict[str, Any]:
    import open_clip
    import timm

    versions = {"torch": torch.__version__, "open_clip": open_clip.__version__, "timm": timm.__version__}
    architecture = dict(model.architecture)
    if architecture.get("student") is not None:
        architecture["plugin"] = plugin_of(architecture["student"])
    return {
        "format": FORMAT,
        "name": model.name,
        "architecture": architecture,
        "activation": activation(model.architecture),
        "image": as_dict(model.image),
        "tokenizer": model.tokenizer.to_dict(),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "weights_sha256": "",  # once they are written
        "parameters": model.parameter_counts(),
        "versions": versions,
    }


def activation(architecture: dict[str, Any]) -> str:
    """'quick_gelu' or 'gelu'; 'own' for a module from outside."""
    if is_own_module(architecture):
        return "own"
    return "quick_gelu" if architecture.get("quick_gelu") else "gelu"


def read_model(folder: Path) -> ClipModel:
    """Read a model folder; weights are compared with the architecture before any memory is allocated.

    Raises InputError for a missing file, an unknown format, a description or weights that do not fit, and damaged
    content.
    """
    where = folder / DESCRIPTION
    values = read_description(where)
    described = values["architecture"]
    if isinstance(described, dict) and is_own_module(described):
        return _read_own(folder, values)
    architecture = check_architecture(described, f"{where}: architecture")
    if values["activation"] != activation(architecture):
        raise InputError(
            f"{where}: '{values['activation']!s:.50}' contradicts the architecture ('{activation(architecture)}'): "
            "the file was edited or damaged, and guessing would change every result"
        )
    tensors = _weights(folder, values, shapes(architecture), f"the architecture in {DESCRIPTION}")
    with blaming_file(where):
        tokenizer = tokenizer_from_dict(values["tokenizer"])
    image = build(ImageSpec, values["image"], f"{where}: image")
    module = build_module(architecture)
    module.load_state_dict(tensors)
    vocabulary, context_length = text_sizes(architecture)
    if vocabulary < tokenizer.vocab_size or context_length not in (None, tokenizer.context_length):
        raise InputError(f"{where}: the tokenizer does not fit the text tower (vocabulary or context length differ)")
    if image.size != image_size(module):
        raise InputError(f"{where}: the image size {image.size} is not that of the image tower, {image_size(module)}")
    return ClipModel(
        values["name"], module, image, tokenizer, architecture["embed_dim"], tokenizer.context_length, architecture
    )


def _read_own(folder: Path, values: dict[str, Any]) -> ClipModel:
    """A module from outside, built again by its own code and filled with the stored weights."""
    where = folder / DESCRIPTION
    known = values["tokenizer"]
    stored = isinstance(known, dict) and known.get("kind") != OwnTokenizer.kind
    with blaming_file(where):
        tokenizer = tokenizer_from_dict(known) if stored else None
    model = rebuilt(values["architecture"], values["name"], str(where), tokenizer)
    tensors = _weights(folder, values, {n: t.shape for n, t in model.module.state_dict().items()}, "the module")
    model.module.load_state_dict(tensors)
    image = build(ImageSpec, values["image"], f"{where}: image")
    return dataclasses.replace(model, image=image, name=values["name"])


def _weights(
    folder: Path, values: dict[str, Any], expected: dict[str, torch.Size], what: str
) -> dict[str, torch.Tensor]:
    """The folder's tensors, compared with `expected` shapes of `what` and the recorded checksum."""
    tensors = read_safetensors(folder / WEIGHTS, expected, what)
    if sha256(folder / WEIGHTS) != values["weights_sha256"]:
        raise InputError(f"{folder / WEIGHTS}: the content is not what {DESCRIPTION} recorded: copy the folder again")
    return tensors


def read_description(path: Path) -> dict[str, Any]:
    """The checked top level of a model.json; raises InputError for anything that is not one of this format."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, so this is not a model folder")
    if path.stat().st_size > _LARGEST_DESCRIPTION:
        raise InputError(f"{path}: too large for a model description ({path.stat().st_size >> 20} MB)")
    values = read_json(path)
    if "format" not in values:
        raise InputError(f"{path}: not a model description (it has no 'format')")
    if values["format"] != FORMAT:
        raise InputError(
            f"{path}: format {values['format']!r:.50} is not known here (this version reads {FORMAT}): "
            "update clipdistill"
        )
    missing = sorted(_KEYS - values.keys())
    if missing:
        raise InputError(f"{path}: the key '{missing[0]}' is missing")
    if not isinstance(values["name"], str):
        raise InputError(f"{path}: 'name' must be text, got {values['name']!r:.200}")
    return values


@contextlib.contextmanager
def blaming_file(path: Path) -> Iterator[None]:
    """Within, an InputError begins with the file in which the trouble was read."""
    try:
        yield
    except MissingExtraError:
        raise
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_safetensors(path: Path, expected: dict[str, torch.Size], what: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, whose names and shapes must be those `expected` of `what`."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    require_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            require_equal_shapes(found, expected, str(path), what)
            return {name: file.get_tensor(name) for name in found}
    except SafetensorError as error:
        raise InputError(
            f"{path}: not readable as safetensors ({error}): the file is cut short or is something else"
        ) from error


def require_equal_shapes(found: dict[str, torch.Size], expected: dict[str, torch.Size], where: str, what: str) -> None:
    """Raise InputError listing the first differences when names or shapes of `found` are not those `expected`."""
    differences = [
        f"{name} is {_size(found.get(name))} instead of {_size(expected.get(name))}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise InputError(f"{where}: the weights are not those of {what}: {'; '.join(differences[:5])}{more}")


def _size(shape: torch.Size | None) -> str:
    return "absent" if shape is None else f"({', '.join(str(n) for n in shape)})"
