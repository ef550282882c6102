"""Models from outside: any nn.Module with encode_image and encode_text becomes a ClipModel, as student or teacher.

What a module does not say about itself (see `clip_model_of`) is found by trying, and said. Its weights are saved as
those of any model; its code is not, so a model folder names the registered student that builds it again, or its class.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipdistill.config import as_dict, build
from clipdistill.data.views import ImageSpec
from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.known import HELD, OWN_EMBEDDINGS, held, offered
from clipdistill.models.parameters import evaluation_mode
from clipdistill.models.tokenizers import (
    CLIP_CONTEXT_LENGTH,
    ClipBpeTokenizer,
    HuggingFaceTokenizer,
    OwnTokenizer,
    Tokenizer,
)
from clipdistill.registry import STUDENTS, TEACHERS, describe

logger = logging.getLogger("clipdistill")
_SIZES = (224, 64, 32, 96, 112, 128, 160, 192, 240, 256, 288, 299, 320, 336, 378, 384, 448, 512)
_IMAGE_FIELDS = {"mean": ("image_mean", "mean"), "std": ("image_std", "std")}


def build_registered(
    name: str, *, seed: int, tokenizer: Tokenizer | None, captions: Iterable[str] | None, quiet: bool = False
) -> Any:
    """What the registered student `name` builds: a ClipModel, or the open_clip architecture that it returned.

    A mistake in it is an InputError that names the plug-in.
    """
    make = STUDENTS.get(name)
    given = {"seed": seed, "tokenizer": tokenizer, "captions": captions or ()}
    with STUDENTS.blaming(name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        declared = inspect.signature(make).parameters
        built = make(**{key: value for key, value in given.items() if key in declared})
        if isinstance(built, ClipModel | Mapping):
            return built
        if not isinstance(built, nn.Module):
            raise InputError(f"it returned {type(built).__name__}, expected a torch.nn.Module")
        return clip_model_of(built, name, tokenizer=tokenizer, student=name, quiet=quiet)


def takes_tokenizer(name: str) -> bool:
    """Whether the registered student `name` is built around a given tokenizer."""
    return name in STUDENTS and "tokenizer" in inspect.signature(STUDENTS.get(name)).parameters


def teacher_of_kind(kind: str, name: str) -> ClipModel:
    """What the teacher kind `kind` of a plug-in (registry.TEACHERS) opens under `name`: a module or a ClipModel."""
    with TEACHERS.blaming(kind):
        opened = TEACHERS.get(kind)(name)
        return opened if isinstance(opened, ClipModel) else clip_model_of(opened, f"{kind}:{name}")


def held_model(name: str) -> ClipModel:
    """The ClipModel of a module that a configuration holds (known.hold); the module itself is trained, not a copy."""
    module = held(name)
    return module if isinstance(module, ClipModel) else clip_model_of(module, name)


def clip_model_of(
    module: Any,
    name: str | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    student: str | None = None,
    quiet: bool = False,
) -> ClipModel:
    """The ClipModel of any nn.Module with `encode_image` (B, 3, H, W) -> (B, D) and `encode_text` (B, L) -> (B, D).

    Attributes of it that are used: image_size, image_mean, image_std (or open_clip's visual.preprocess_cfg), tokenizer
    (anything that maps a list of captions to ids (n, L)), context_length, embed_dim, and logit_scale, the logarithm of
    the multiplier. Without: the first usual size that encode_image takes, CLIP's normalisation and tokenizer, a
    logit_scale of ln(1 / 0.07), which is added to the module as a parameter. A teacher may lack encode_text (its images
    then stand for their captions), or have `teacher_embeddings(batch)` instead of both (docs/extending.md). `student`:
    the registered name that builds it again; `quiet`: what is found by trying is known already. Raises InputError, one
    sentence, for a module that cannot be used.
    """
    label = name or f"{HELD}{type(module).__name__}"
    if not isinstance(module, nn.Module) or not (hasattr(module, "encode_image") or hasattr(module, OWN_EMBEDDINGS)):
        raise InputError(f"'{label}': a model is a torch.nn.Module with the methods encode_image and encode_text")
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters()):
        logger.warning("%s: its half-precision weights are used in float32", label)
        module.float()
    said: list[str] = []
    kept = tokenizer if getattr(module, "tokenizer", None) is None else _tokenizer(module, label)
    if kept is None:
        kept = ClipBpeTokenizer(_whole(module, "context_length") or CLIP_CONTEXT_LENGTH)
        if hasattr(module, "encode_text"):
            said.append(f"CLIP's tokenizer with {kept.context_length} ids")
    if _add_logit_scale(module, label):
        said.append("a logit scale of ln(1 / 0.07)")
    with torch.random.fork_rng(devices=[]):
        image, widths, counts = _try(module, label, kept, said)
    if said and hasattr(module, "encode_image") and not quiet:
        logger.warning("%s does not say, so it gets %s", label, ", ".join(said))
    embed_dim = _whole(module, "embed_dim") or widths.get("image")
    if embed_dim is None:
        raise InputError(f"'{label}': give it an attribute embed_dim, the width of what {OWN_EMBEDDINGS} returns")
    if any(width != embed_dim for width in widths.values()):
        raise InputError(
            f"'{label}': encode_image and encode_text give rows of {' and '.join(map(str, widths.values()))} numbers"
            + (f", and embed_dim is {embed_dim}" if _whole(module, "embed_dim") else "")
            + ": all must be of one width"
        )
    architecture = {"module": f"{type(module).__module__}.{type(module).__qualname__}", "student": student}
    return ClipModel(label, module, image, kept, embed_dim, kept.context_length, architecture, counts)


def rebuilt(architecture: Mapping[str, Any], name: str, where: str, tokenizer: Tokenizer | None) -> ClipModel:
    """The model of a folder that holds a module from outside, built again, with weights of its own.

    From the module that was offered for it; by its registered student; else from the module of that name which this
    program holds (copied). Raises InputError that says what to do where none is at hand.
    """
    if offered() is not None:
        return clip_model_of(offered(), name, tokenizer=tokenizer, quiet=True)
    student, plugin = architecture.get("student"), architecture.get("plugin")
    if student is not None:
        if student not in STUDENTS:
            loaded = f"--plugin {plugin}" if plugin else "the program or --plugin FILE.py that registers it"
            raise InputError(f"{where}: the model is the registered student '{student}': load it with  {loaded}")
        built = build_registered(student, seed=0, tokenizer=tokenizer, captions=None, quiet=True)
        assert isinstance(built, ClipModel)
        return built
    try:
        module = copy.deepcopy(held(name))
    except InputError:
        raise InputError(
            f"{where}: the model is a module of the class {architecture.get('module')}, which cannot be built from a "
            "file: give it, load_student(FOLDER, module=MODULE), or register what builds it before training"
        ) from None
    return clip_model_of(module, name, tokenizer=tokenizer, quiet=True)


def require_saveable(model: ClipModel) -> None:
    """Raise InputError for a student whose state holds more than tensors, before it is trained."""
    for name, value in model.module.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"'{model.name}': its state_dict holds '{name}', a {type(value).__name__}, and only tensors are saved"
            )


def plugin_of(student: str) -> str | None:
    """Name of the file in which a registered student is built, for the model folder to say."""
    with contextlib.suppress(TypeError, InputError):
        file = inspect.getsourcefile(STUDENTS.get(student))
        return None if file is None else Path(file).name
    return None


def _tokenizer(module: nn.Module, label: str) -> Tokenizer:
    own: Any = module.tokenizer
    if isinstance(own, Tokenizer):
        return own
    if hasattr(own, "backend_tokenizer"):  # of transformers
        limit = _whole(module, "context_length") or min(int(own.model_max_length), CLIP_CONTEXT_LENGTH)
        return HuggingFaceTokenizer.from_transformers(own, limit)
    if not callable(own):
        raise InputError(f"'{label}': its tokenizer must map a list of captions to ids, and is a {type(own).__name__}")
    return OwnTokenizer(own, f"{label}.tokenizer")


def _whole(module: nn.Module, name: str) -> int | None:
    value = getattr(module, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _spec(module: nn.Module, label: str, said: list[str]) -> tuple[dict[str, Any], int | None]:
    """Fields of the image specification that the module gives, and its size where it says one."""
    known = getattr(module, "preprocess_cfg", None) or getattr(getattr(module, "visual", None), "preprocess_cfg", None)
    values: dict[str, Any] = dict(known) if isinstance(known, Mapping) else {}
    values = {key: value for key, value in values.items() if key in ImageSpec.model_fields and value is not None}
    for field, names in _IMAGE_FIELDS.items():
        given = next((getattr(module, name) for name in names if hasattr(module, name)), None)
        if given is not None and not callable(given):
            values[field] = given.flatten().tolist() if isinstance(given, Tensor) else tuple(given)
    for owner in (module, getattr(module, "visual", None)):
        if getattr(owner, "image_size", None) is not None:
            values["size"] = owner.image_size  # type: ignore[union-attr]
            break
    if {"mean", "std"} - values.keys():
        said.append("CLIP's image mean and std")
    size = values.pop("size", None)
    if isinstance(size, tuple | list):
        if len(set(size)) != 1:
            raise InputError(f"'{label}': its images are {size}, and only square ones are supported")
        size = size[0]
    return values, size


def _try(
    module: Any, label: str, tokenizer: Tokenizer, said: list[str]
) -> tuple[ImageSpec, dict[str, int], dict[str, int]]:
    """(image specification, width of each tower's rows, parameter counts), by encoding two pictures and captions."""
    spec, size = _spec(module, label, said)
    device = next((tensor.device for tensor in module.state_dict().values() if isinstance(tensor, Tensor)), "cpu")
    trained = [p for p in module.parameters() if not isinstance(p, nn.parameter.UninitializedParameter)]
    flags = [p.requires_grad for p in trained]
    rows: dict[str, Tensor] = {}
    try:
        for parameter in trained:
            parameter.requires_grad_(parameter.is_floating_point())
        with evaluation_mode(module), torch.inference_mode(False), torch.enable_grad():
            if hasattr(module, "encode_image"):
                rows["image"], size = _image_rows(module, label, size, device, said)
            if hasattr(module, "encode_text") and "image" in rows:
                ids = tokenizer(["a photo of a cat", "a dog"]).to(device)
                rows["text"] = _rows(lambda: module.encode_text(ids), label, "encode_text", f"ids {tuple(ids.shape)}")
            counts = _counts(module, rows)
    finally:
        for parameter, flag in zip(trained, flags, strict=True):
            parameter.requires_grad_(flag)
    image = build(ImageSpec, {**as_dict(ImageSpec()), **spec, "size": size or 224}, f"'{label}': images")
    return image, {tower: row.shape[1] for tower, row in rows.items()}, counts


def _image_rows(module: Any, label: str, size: int | None, device: Any, said: list[str]) -> tuple[Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    error: InputError | None = None
    for side in _SIZES if size is None else (size,):
        pictures = torch.randn(2, 3, side, side, generator=generator).to(device)
        try:
            rows = _rows(lambda x=pictures: module.encode_image(x), label, "encode_image", f"images {side} x {side}")  # type: ignore[misc]
        except InputError as failed:
            error = error or failed
            continue
        if size is None:
            said.append(f"images of {side} x {side}")
        return rows, side
    assert error is not None
    raise InputError(f"{error}: give the module an attribute image_size" if size is None else str(error))


def _rows(call: Callable[[], Any], label: str, method: str, given: str) -> Tensor:
    """What an encoder made of two rows, checked."""
    try:
        rows = call()
    except Exception as error:
        raise InputError(f"'{label}': {method} failed for {given} ({describe(error)})") from error
    if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != 2 or not rows.is_floating_point():
        found = f"a tensor {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise InputError(f"'{label}': {method} gave {found} for two rows, expected a floating-point tensor (2, D)")
    if not torch.isfinite(rows).all():
        raise InputError(f"'{label}': {method} gave NaN or infinity for {given}")
    return rows


def _counts(module: nn.Module, rows: Mapping[str, Tensor]) -> dict[str, int]:
    """Parameters by tower: those that the image rows depend on, and the others but the scales."""
    parameters = dict(module.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    scales = sum(p.numel() for name, p in parameters.items() if name in ("logit_scale", "logit_bias"))
    live = [p for p in parameters.values() if p.requires_grad]
    image = 0
    if live and "image" in rows and rows["image"].requires_grad:
        found = torch.autograd.grad(rows["image"].float().sum(), live, allow_unused=True)
        image = sum(p.numel() for p, gradient in zip(live, found, strict=True) if gradient is not None)
    text = total - image - scales
    return {"image": image, "text_transformer": text, "text_total": text, "total": total}


def _add_logit_scale(module: nn.Module, label: str) -> bool:
    """Make `logit_scale` a tensor of one number; returns whether the module had none."""
    scale = getattr(module, "logit_scale", None)
    if isinstance(scale, Tensor) and scale.numel() == 1 and scale.is_floating_point():
        return False
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise InputError(f"'{label}': its logit_scale must be one number or a parameter, and is {type(scale).__name__}")
    value = math.log(1 / 0.07) if scale is None else float(scale)
    try:
        if scale is not None:
            delattr(module, "logit_scale")
        device = next((p.device for p in module.parameters()), None)
        module.register_parameter("logit_scale", nn.Parameter(torch.tensor(value, device=device)))
    except (AttributeError, KeyError) as error:
        raise InputError(
            f"'{label}': give it a parameter logit_scale, because one cannot be added ({error})"
        ) from error
    return scale is None
