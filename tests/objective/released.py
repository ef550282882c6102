"""Reading the outputs of the released implementations, and running ours on the same input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdistill.objective import Embeddings, Objective, ObjectiveOutput
from tests.conftest import shared_folder

SETS = ("init", "alt")
SIZES = ((32, 32), (24, 32))
SCALE_KEYS = {name: f"{name}_logit_scale" for name in ("image", "text", "cross", "fusion")}
# our layer, the key of its weights as input, the key of their gradients
LAYERS = (
    ("image_projection", "proj_visual", "visual_proj"),
    ("text_projection", "proj_text", "text_proj"),
    ("image_fusion", "fusion_vf", "visual_fusion_proj"),
    ("text_fusion", "fusion_tf", "text_fusion_proj"),
)
TOLERANCE = 1e-10

Fixture = dict[str, Tensor]


def released(name: str) -> Fixture:
    """The numeric arrays of one fixture file (without .npz), as float64 tensors."""
    with np.load(shared_folder("fixtures") / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.tensor(file[key]) for key in file.files if file[key].dtype.kind in "fi"}


def clip(method: str, student: int, teacher: int, scales: str) -> Fixture:
    """The fixture of one method, size and scale set."""
    return released(f"{method}_N8_s{student}_t{teacher}_{scales}")


def run(
    fixture: Fixture, weights: Mapping[str, float], engine: str = "dense", **settings: Any
) -> tuple[ObjectiveOutput, dict[str, Tensor | None]]:
    """Our objective on a fixture's input: output, and d total / d input under the fixture's names."""
    width, teacher_width = fixture["a"].shape[1], fixture["u"].shape[1]
    objective = Objective(weights, width, teacher_width, engine=engine, **settings).double()
    objective.set_scales(**{name: float(fixture[key]) for name, key in SCALE_KEYS.items() if key in fixture})
    with torch.no_grad():
        for layer, weights_key, _ in LAYERS:
            module = getattr(objective, layer)
            if module is not None:
                module.weight.copy_(fixture[f"{weights_key}_w"])
                module.bias.copy_(fixture[f"{weights_key}_b"])
    leaves = {key: fixture[key].clone().requires_grad_() for key in ("a", "b", "logit_scale")}
    if "siglip_logit_bias" in fixture:
        leaves["logit_bias"] = fixture["siglip_logit_bias"].clone().requires_grad_()
    student = Embeddings(leaves["a"], leaves["b"], leaves["logit_scale"], logit_bias=leaves.get("logit_bias"))
    output = objective(student, Embeddings(fixture["u"], fixture["v"], fixture["t_logit_scale"]))
    output.total.backward()
    gradients: dict[str, Tensor | None] = {key: leaf.grad for key, leaf in leaves.items()}
    for name, key in SCALE_KEYS.items():
        parameter = getattr(objective, f"{name}_scale")
        gradients[key] = None if parameter is None else parameter.grad
    for layer, _, key in LAYERS:
        module = getattr(objective, layer)
        for part in ("weight", "bias"):
            gradients[f"{key}_{part}"] = None if module is None else getattr(module, part).grad
    return output, gradients


def assert_equal(ours: Tensor, reference: Tensor, what: str) -> None:
    """Equal to 1e-10 of the reference's largest element."""
    assert ours.shape == reference.shape, what
    scale = max(float(reference.abs().max()), 1e-300)
    assert float((ours - reference).abs().max()) <= TOLERANCE * scale, what


def assert_released(
    fixture: Fixture, key: str, weights: Mapping[str, float], *, value: Tensor | None = None, **settings: Any
) -> ObjectiveOutput:
    """Our total and all its gradients equal the released term `key`; where it does not depend, neither do we."""
    output, gradients = run(fixture, weights, **settings)
    assert_equal(output.total.detach(), fixture[f"loss_{key}"] if value is None else value, key)
    checked = 0
    for name, reference in fixture.items():
        if not name.startswith(f"grad_{key}__"):
            continue
        ours = gradients[name.partition("__")[2]]
        if reference.ndim == 0 and math.isnan(float(reference)):
            assert ours is None or not ours.any(), f"{name}: the released term does not depend on it"
        else:
            assert ours is not None, name
            assert_equal(ours, reference, name)
            checked += 1
    assert checked
    return output
