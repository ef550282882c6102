"""Embeddings in, named normalised matrices out: what every engine and every term reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdistill.errors import InputError


@dataclass(frozen=True)
class Embeddings:
    """What one model made of a batch.

    image, text: (N, D), rows need not be normalised; None for a modality that the step does not have: the terms that
        read it are left out. With an ensemble of K teachers the blocks lie side by side,
        (N, D_1 + ... + D_K), and `blocks` = (D_1, ..., D_K).
    logit_scale: the multiplier itself (already exponentiated), a number or 0-dimensional tensor; for an ensemble (K,).
    logit_bias: added to the logits by sigmoid losses; a number or tensor of the shape of logit_scale.
    synthetic_text: (N, D), embeddings of one generated caption per image (MobileCLIP).
    bank: a teacher's embeddings of the whole training set (clipdistill.bank), for the terms that compare with them.
    classes: (C, D), a teacher's class vectors, of length 1, for the terms that classify by them.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor | float | Sequence[float]
    logit_bias: Tensor | float | Sequence[float] | None = None
    synthetic_text: Tensor | None = None
    blocks: Sequence[int] | None = None
    bank: Any = None
    classes: Tensor | None = None

    @property
    def any(self) -> Tensor:
        """The rows of a modality that is there."""
        return self.text if self.image is None else self.image


@dataclass(frozen=True)
class Features:
    """Local rows and scalars by name; see `plan.py` for the names.

    matrices: (n_local, D), L2-normalised, all of one floating type (float32 or float64).
    scales: 0-dimensional tensors of the same type: multipliers and biases.
    """

    matrices: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]


def check(who: str, embeddings: Embeddings, width: int) -> int:
    """The number of rows, or an InputError that names what does not fit together."""
    rows = len(embeddings.any)
    for part in ("image", "text", "synthetic_text"):
        matrix = getattr(embeddings, part)
        if matrix is None:
            continue
        if not isinstance(matrix, Tensor):
            raise InputError(f"the {who}'s {part} embeddings must be a torch.Tensor, got {type(matrix).__name__}")
        if matrix.ndim != 2 or tuple(matrix.shape) != (rows, width):
            raise InputError(
                f"the {who}'s {part} embeddings have shape {tuple(matrix.shape)}, expected ({rows}, {width}): "
                f"{'student_dim' if who == 'student' else 'teacher_dim'} of the objective is {width}"
            )
        if not matrix.is_floating_point():
            raise InputError(f"the {who}'s {part} embeddings are of type {matrix.dtype}, expected floating point")
    if embeddings.blocks is not None and sum(embeddings.blocks) != width:
        raise InputError(
            f"the {who}'s blocks {tuple(embeddings.blocks)} add up to {sum(embeddings.blocks)}, not {width}"
        )
    return rows


def working_dtype(*embeddings: Embeddings | None) -> torch.dtype:
    """The precision of the similarity arithmetic: float64 if anything given is, float32 otherwise."""
    dtype = torch.float32
    for given in embeddings:
        for matrix in () if given is None else (given.image, given.text):
            dtype = dtype if matrix is None else torch.promote_types(dtype, matrix.dtype)
    return dtype


def normalised(matrix: Tensor) -> Tensor:
    """Rows divided by their Euclidean length."""
    return F.normalize(matrix, dim=-1)


def project(layer: torch.nn.Linear, matrix: Tensor) -> Tensor:
    """layer(matrix) in the precision of `matrix`, whatever the layer's own."""
    bias = None if layer.bias is None else layer.bias.to(matrix.dtype)
    return F.linear(matrix, layer.weight.to(matrix.dtype), bias)


def scalars(name: str, value: Tensor | float | Sequence[float], count: int, like: Tensor) -> list[Tensor]:
    """`count` 0-dimensional tensors of the type and place of `like` from a number, tensor or list.

    A single number serves all; any other length is an InputError.
    """
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    flat = tensor.to(device=like.device, dtype=like.dtype).reshape(-1)
    if len(flat) not in (1, count):
        raise InputError(
            f"{name} has {len(flat)} values for {count} teacher{'s' if count > 1 else ''}: give one, or one each"
        )
    return [flat[k if len(flat) > 1 else 0] for k in range(count)]


def blocks_of(embeddings: Embeddings) -> tuple[int, ...]:
    """Widths of the ensemble's blocks; one block when none are stated."""
    return tuple(embeddings.blocks) if embeddings.blocks else (embeddings.any.shape[1],)


def is_matrix(name: str) -> bool:
    """Whether `name` is a matrix of rows rather than a multiplier or bias."""
    return ":" not in name and "=" not in name and ("_image" in name or "_text" in name)


class Owner(Protocol):
    """What of the objective the features depend on: its layers, scales and their reading."""

    @property
    def projection(self) -> str: ...

    @property
    def scales(self) -> str: ...

    image_projection: torch.nn.Linear | None
    text_projection: torch.nn.Linear | None
    image_fusion: torch.nn.Linear | None
    text_fusion: torch.nn.Linear | None
    own_scales: torch.nn.ParameterDict


class FeatureBuilder:
    """Makes the named matrices and scalars of one step, each once and only when a term reads it."""

    def __init__(self, owner: Owner, student: Embeddings, teacher: Embeddings | None, teachers: int) -> None:
        self.owner, self.student, self.teacher, self.teachers = owner, student, teacher, teachers
        self.dtype = working_dtype(student, teacher)
        self.like = torch.empty(0, dtype=self.dtype, device=student.any.device)
        self.made: dict[str, Tensor] = {}

    def features(self, names: Iterable[str]) -> Features:
        """Everything in `names`: matrices and scalars."""
        matrices: dict[str, Tensor] = {}
        scales: dict[str, Tensor] = {}
        # sorted, because every rank must send its matrices in the same order
        for name in sorted(names):
            if is_matrix(name):
                matrices[name] = self.matrix(name)
            else:
                scales[name] = self.scalar(name)
        return Features(matrices, scales)

    def matrix(self, name: str) -> Tensor:
        """The normalised rows called `name`."""
        if name not in self.made:
            who, _, rest = name.partition("_")
            make = {
                "student": self._student,
                "projected": self._projected,
                "fused": self._fused,
                "teacher": self._teacher,
            }
            self.made[name] = make[who](rest)
        return self.made[name]

    def _layer(self, part: str) -> torch.nn.Linear | None:
        return self.owner.image_projection if part == "image" else self.owner.text_projection

    def _student(self, part: str) -> Tensor:
        raw = getattr(self.student, part)
        if raw is None:
            raise InputError("objective: a term reads a synthetic caption, and the student's embeddings carry none")
        raw = raw.to(self.dtype)
        layer = self._layer(part) if self.owner.projection == "before-task" else None
        return normalised(raw if layer is None else project(layer, raw))

    def _projected(self, part: str) -> Tensor:
        layer = self._layer(part)
        if layer is None or self.owner.projection == "before-task":
            return self.matrix(f"student_{part}")  # the same tensor, so that it is exchanged once
        return normalised(project(layer, getattr(self.student, part).to(self.dtype)))

    def _fused(self, part: str) -> Tensor:
        layer = self.owner.image_fusion if part == "image" else self.owner.text_fusion
        assert layer is not None
        both = torch.cat([self.matrix(f"projected_{part}"), self.matrix(f"teacher_{part}")], dim=1)
        return normalised(project(layer, both))

    def _teacher(self, rest: str) -> Tensor:
        assert self.teacher is not None
        part, _, number = rest.rpartition("_") if rest[-1].isdigit() else (rest, "", "")
        whole = getattr(self.teacher, part).detach().to(self.dtype)
        if number:
            widths = blocks_of(self.teacher)
            whole = whole.split(list(widths), dim=1)[int(number)]
        return normalised(whole)

    def scalar(self, name: str) -> Tensor:
        """The multiplier or bias called `name`, 0-dimensional, in the working precision."""
        if name == "student":
            return scalars("the student's logit_scale", self.student.logit_scale, 1, self.like)[0]
        if name == "student_bias":
            bias = 0.0 if self.student.logit_bias is None else self.student.logit_bias
            return scalars("the student's logit_bias", bias, 1, self.like)[0]
        if name.startswith("="):
            return self.like.new_tensor(float(name[1:]))
        if name.startswith("teacher") and ":" not in name:
            assert self.teacher is not None
            index = int(name.rpartition("_")[2]) if name[-1].isdigit() else 0
            if name.startswith("teacher_bias"):
                bias = 0.0 if self.teacher.logit_bias is None else self.teacher.logit_bias
                return scalars("the teacher's logit_bias", bias, self.teachers, self.like)[index].detach()
            return scalars("the teacher's logit_scale", self.teacher.logit_scale, self.teachers, self.like)[
                index
            ].detach()
        own = self.owner.own_scales[name] if ":" in name else getattr(self.owner, f"{name}_scale")
        parameter: Tensor = own.to(device=self.like.device, dtype=self.dtype)
        return parameter.exp() if self.owner.scales == "exponential" else parameter
