"""Back ends: how a model is made ready to run. Eager and torch.compile here, exported graphs in export/backends.py.

A back end turns a ClipModel into callables for its towers. The benchmark knows nothing else about it, so an exported
model measured by another runtime only has to offer the same `load`, and to be registered (registry.BACKENDS).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from clipdistill.errors import InputError, nearest
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.parameters import evaluation_mode
from clipdistill.registry import BACKENDS

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Number formats that torch back ends run in, by their full names."""

_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


@dataclass
class Loaded:
    """A model ready to run: tower name -> callable that takes a batch on the device and returns embeddings (B, D).

    weight_bytes: memory the weights take while running. size_bytes: what is stored on disk, None if not a file.
    close: releases what the back end holds (and undoes what it changed on the caller's model).
    """

    towers: Mapping[str, Callable[[Tensor], object]]
    weight_bytes: int
    size_bytes: int | None = None
    close: Callable[[], None] = field(default=lambda: None)


class Backend(Protocol):
    """One way to run a model. `dtypes`: the number formats it can run in; `visible`: torch sees what it allocates."""

    name: str
    dtypes: tuple[str, ...]
    visible: bool

    def load(self, model: ClipModel, device: torch.device, dtype: str) -> Loaded: ...


class Eager:
    """Plain torch, as after `load_student`: evaluation mode, weights converted to the number format."""

    name = "eager"
    dtypes: tuple[str, ...] = tuple(DTYPES)
    visible = True

    def load(self, model: ClipModel, device: torch.device, dtype: str) -> Loaded:
        """The towers of `model` on `device`. The caller's module is used as it is where nothing must be converted."""
        module, restore = _ready(model.module, device, DTYPES[dtype])

        def encode_image(images: Tensor) -> object:
            return module.encode_image(images)  # type: ignore[operator]

        def encode_text(tokens: Tensor) -> object:
            return module.encode_text(tokens)  # type: ignore[operator]

        towers = {"image": encode_image, "text": encode_text}
        return Loaded(towers, tensor_bytes(module), close=restore)


class Compiled(Eager):
    """torch.compile over each tower, one graph per input shape. The first call compiles and is part of the warm-up."""

    name = "compile"
    visible = False

    def load(self, model: ClipModel, device: torch.device, dtype: str) -> Loaded:
        """As Eager, with both towers compiled."""
        loaded = super().load(model, device, dtype)
        towers = {name: torch.compile(tower, dynamic=False) for name, tower in loaded.towers.items()}
        return Loaded(towers, loaded.weight_bytes, close=loaded.close)


EAGER, COMPILED = Eager(), Compiled()


def find_backend(name: str) -> Backend:
    """The back end called `name`, or an InputError with the nearest one."""
    return BACKENDS.get(name)


def find_dtype(name: str) -> str:
    """The full name of a number format ("bf16" is "bfloat16"), or an InputError with the nearest one."""
    full = _SHORT.get(name, name)
    known = {*DTYPES, *(dtype for backend in BACKENDS.names() for dtype in find_backend(backend).dtypes)}
    if full not in known:
        raise InputError(f"unknown number format '{name}'{nearest(name, known)}")
    return full


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's distinct parameters and stored buffers."""
    seen: dict[int, int] = {}
    for tensor in module.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor):
            seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def _ready(module: nn.Module, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Callable[[], None]]:
    """The module in evaluation mode on a device in a dtype, and how to undo it; a copy if it must be converted."""
    floating = [p for p in module.parameters() if p.is_floating_point()]
    if all(p.dtype == dtype for p in floating) and all(p.device == device for p in module.parameters()):
        stack = contextlib.ExitStack()
        stack.enter_context(evaluation_mode(module))
        return module, stack.close
    return copy.deepcopy(module).to(device=device, dtype=dtype).eval(), lambda: None
