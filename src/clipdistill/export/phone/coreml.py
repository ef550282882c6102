"""Core ML: .mlpackage folders by coremltools, which converts on Linux too and runs them on macOS alone.

Elsewhere the gate compares what is handed to the converter, so the conversion itself stays unverified, and that is
said. Sixteen bits are weights and arithmetic, what Apple's neural engine computes in; eight bits are weights on top of
that, with one scale for each output channel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipdistill.errors import InputError, first_line, needing
from clipdistill.export.phone.parts import in_rows, muted, program_of
from clipdistill.export.towers import OUTPUTS
from clipdistill.models.exported import Runner

PACKAGES = ("coremltools",)
NOT_RUN = (
    "converted, not run: Core ML runs on macOS only, so what was compared with the model is the program handed to "
    "coremltools; on a Mac  clipdistill eval coreml:DIR  measures the export itself"
)


def runs_here() -> bool:
    """Whether this machine has Core ML."""
    return sys.platform == "darwin"


def program(module: nn.Module, example: Tensor) -> Any:
    """What is handed to coremltools: decomposed, without the aliases that it does not know, tokens in int32."""
    given = example if example.is_floating_point() else example.int()
    found = program_of(module, given).run_decompositions({})
    for node in list(found.graph.nodes):
        if node.op == "call_function" and str(node.target).startswith("aten.alias"):
            node.replace_all_uses_with(node.args[0])
            found.graph.erase_node(node)
    return found


def convert(module: nn.Module, example: Tensor, path: Path, precision: str, good: Callable[[], bool]) -> None:
    """Write `module`, which takes inputs of the shape of `example`, to `path`; one of parts.PRECISIONS."""
    with needing("coremltools", "coreml", "the export to Core ML"):
        import coremltools
    made = coremltools.convert(
        program(module, example),
        convert_to="mlprogram",
        compute_precision=getattr(coremltools.precision, "FLOAT32" if precision == "float32" else "FLOAT16"),
        minimum_deployment_target=coremltools.target.iOS16,
    )
    if precision == "int8":
        from coremltools.optimize import coreml as optimise

        weights = optimise.OpLinearQuantizerConfig(mode="linear_symmetric")
        made = optimise.linear_quantize_weights(made, optimise.OptimizationConfig(global_config=weights))
    spec = made.get_spec()
    name = OUTPUTS["image" if example.is_floating_point() else "text"]
    coremltools.utils.rename_feature(spec, spec.description.output[0].name, name)
    coremltools.models.MLModel(spec, weights_dir=made.weights_dir, skip_model_load=True).save(str(path))


def handed_over(module: nn.Module, example: Tensor) -> Runner:
    """What `convert` hands to coremltools, as a function on arrays."""
    run = program(module, example).module()

    @torch.inference_mode()
    def one(row: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(row if example.is_floating_point() else row.astype(np.int32))
        (found,) = run(given).values()
        return np.asarray(found.numpy())

    return in_rows(one)


def load(path: Path) -> Runner:
    """An .mlpackage folder as a function on arrays. Raises InputError where there is no Core ML."""
    if not runs_here():
        raise InputError(f"{path}: Core ML runs on macOS only: evaluate this export on a Mac")
    with needing("coremltools", "coreml", f"'{path.name}'"):
        import coremltools
    try:
        with muted():
            model = coremltools.models.MLModel(str(path))
            name = model.get_spec().description.input[0].name
    except Exception as error:  # its errors share no base class
        raise InputError(f"{path}: Core ML cannot load it ({first_line(error)})") from error
    kind = np.float32 if name == "image" else np.int32

    def one(row: np.ndarray) -> np.ndarray:
        (found,) = model.predict({name: row.astype(kind, copy=False)}).values()
        return np.asarray(found)

    return in_rows(one)
