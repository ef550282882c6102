"""What the three forms for a phone share: towers with names, a program of one row, rows in turn, silence."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipdistill.export.towers import OUTPUTS, Tower
from clipdistill.models.exported import Runner

PRECISIONS = ("float32", "float16", "int8")


class ImageTower(nn.Module):
    """An image tower whose input and output have names: converters take them from here."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.inner = tower

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """image (B, 3, H, W) -> {"image_embedding": (B, D)}."""
        return {OUTPUTS["image"]: self.inner(image)}


class TextTower(nn.Module):
    """The same for a text tower."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.inner = tower

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens (B, L) -> {"text_embedding": (B, D)}."""
        return {OUTPUTS["text"]: self.inner(tokens)}


def named(module: Any, tower: str, normalised: bool) -> nn.Module:
    """The tower `tower` of a plain copy of a CLIP module."""
    kind = ImageTower if tower == "image" else TextTower
    return kind(Tower(module, tower, normalised)).eval()


def program_of(module: nn.Module, example: Tensor) -> Any:
    """torch.export's program of a module for inputs of the shape of `example`."""
    return torch.export.export(module, (example,), strict=False)


def in_rows(one: Callable[[np.ndarray], np.ndarray]) -> Runner:
    """A function of one row (1, ...) -> (1, D) as one of any batch; callers on several threads wait for each other."""
    busy = threading.Lock()

    def run(values: np.ndarray) -> np.ndarray:
        with busy:
            rows = [np.array(one(values[i : i + 1]), dtype=np.float32) for i in range(len(values))]
        return np.concatenate(rows)

    return run


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Within, nothing reaches the terminal: these libraries write to it from C, and draw bars."""
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        with contextlib.suppress(OSError):  # a process without a terminal has nothing to restore
            null = os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, null)
            for number in (1, 2):
                saved = os.dup(number)
                stack.callback(os.close, saved)
                stack.callback(os.dup2, saved, number)
                os.dup2(null, number)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
