"""LiteRT (TensorFlow Lite): .tflite files by litert-torch, run here by ai-edge-litert's interpreter with XNNPACK.

Tokens are int32: the runtime has no argmax of int64. Eight bits are ai-edge-quantizer's dynamic range: weights in whole
numbers, one scale for each output channel, activations rounded row by row while it runs, so nothing is calibrated.
Where that is too coarse, convolutions of one channel each, and then all, keep sixteen bits. These are weights only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipdistill.errors import InputError, first_line, needing
from clipdistill.export.phone.parts import in_rows, muted
from clipdistill.models.exported import Runner

PACKAGES = ("litert-torch", "ai-edge-litert", "ai-edge-quantizer")


_SPARED: tuple[tuple[str, ...], ...] = ((), ("DEPTHWISE_CONV_2D",), ("DEPTHWISE_CONV_2D", "CONV_2D"))
"""Operators that keep sixteen bits, attempt by attempt."""


def convert(module: nn.Module, example: Tensor, path: Path, precision: str, good: Callable[[], bool]) -> None:
    """Write `module`, which takes inputs of the shape of `example`, to `path`; one of parts.PRECISIONS.

    good: whether the graph that lies at `path` is near enough to the model.
    """
    with needing("litert-torch", "litert", "the export to LiteRT"):
        import litert_torch
    name = "image" if example.is_floating_point() else "tokens"
    given = example if example.is_floating_point() else example.int()
    litert_torch.convert(module, sample_kwargs={name: given}).export(str(path))
    graph = path.read_bytes()
    for spared in _SPARED if precision == "int8" else _SPARED[:1] if precision == "float16" else ():
        path.write_bytes(_quantised(graph, precision, spared))
        if good():
            break


def _quantised(graph: bytes, precision: str, spared: tuple[str, ...]) -> bytes:
    with needing("ai-edge-quantizer", "litert", f"{precision} for LiteRT"):
        from ai_edge_quantizer import qtyping, quantizer, recipe
    work = quantizer.Quantizer(bytearray(graph))
    if precision == "int8":
        work.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    for name in spared if precision == "int8" else ("ALL_SUPPORTED",):
        weights = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
        work.update_quantization_recipe(
            regex=".*",
            operation_name=getattr(qtyping.TFLOperationName, name),
            op_config=qtyping.OpQuantizationConfig(
                weight_tensor_config=weights, compute_precision=qtyping.ComputePrecision.FLOAT
            ),
            algorithm_key="float_casting",
        )
    return bytes(work.quantize().quantized_model)


def load(path: Path) -> Runner:
    """A .tflite file as a function on arrays; threads as torch has them now. Raises InputError."""
    with needing("ai-edge-litert", "litert", f"'{path.name}'"), muted():
        from ai_edge_litert.interpreter import Interpreter
    try:
        with muted():
            interpreter = Interpreter(model_path=str(path), num_threads=torch.get_num_threads())
            signature: Any = interpreter.get_signature_runner()
            ((name, facts),) = signature.get_input_details().items()
            (output,) = signature.get_output_details()
    except Exception as error:  # ValueError, RuntimeError, and what a damaged file leads to
        raise InputError(f"{path}: LiteRT cannot load it ({first_line(error)})") from error

    def one(row: np.ndarray) -> np.ndarray:
        return signature(**{name: row.astype(facts["dtype"], copy=False)})[output]

    return in_rows(one)
