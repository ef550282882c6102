"""ExecuTorch: .pte files whose products and convolutions run in XNNPACK, run here by ExecuTorch's own runtime.

Sixteen bits are weights and arithmetic. Eight bits are XNNPACK's dynamic quantisation of linear layers: weights with
one scale for each output channel, activations rounded row by row while it runs; the rest stays in float32.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipdistill.errors import InputError, first_line, needing
from clipdistill.export.phone.parts import in_rows, muted, program_of
from clipdistill.models.exported import Runner

PACKAGES = ("executorch", "torchao")


class HalfTower(nn.Module):
    """A tower that computes in sixteen bits, with float32 at both ends."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = copy.deepcopy(module).half()

    def forward(self, values: Tensor) -> Tensor:
        """(B, ...) -> (B, D) float32."""
        (found,) = self.inner(values.half() if values.is_floating_point() else values).values()
        return found.float()


def convert(module: nn.Module, example: Tensor, path: Path, precision: str, good: Callable[[], bool]) -> None:
    """Write `module`, which takes inputs of the shape of `example`, to `path`; one of parts.PRECISIONS."""
    with needing("executorch", "executorch", "the export to ExecuTorch"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    program = program_of(HalfTower(module) if precision == "float16" else module, example)
    if precision == "int8":
        program = program_of(_quantised(program.module(), example), example)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    path.write_bytes(lowered.buffer)


def _quantised(graph: Any, example: Tensor) -> Any:
    with needing("torchao", "executorch", "int8 for ExecuTorch"):
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    settings = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    prepared = prepare_pt2e(graph, xnnpack_quantizer.XNNPACKQuantizer().set_global(settings))
    prepared(example)
    return convert_pt2e(prepared)


def load(path: Path) -> Runner:
    """A .pte file as a function on arrays; threads as torch has them now. Raises InputError."""
    with needing("executorch", "executorch", f"'{path.name}'"), muted():
        from executorch.runtime import Runtime
    try:
        with muted():
            _use_threads(torch.get_num_threads())
            program = Runtime.get().load_program(path)  # the method does not keep it
            method = program.load_method("forward")
    except Exception as error:  # RuntimeError of its own kinds
        raise InputError(f"{path}: ExecuTorch cannot load it ({first_line(error)})") from error

    def one(row: np.ndarray, program: Any = program) -> np.ndarray:
        return method.execute([torch.from_numpy(np.ascontiguousarray(row))])[0].numpy()

    return in_rows(one)


def _use_threads(count: int) -> None:
    """Its pool belongs to the process and has as many threads as the machine until told otherwise."""
    with contextlib.suppress(ImportError, AttributeError):
        from executorch.extension.pybindings import portable_lib

        if portable_lib._threadpool_get_thread_count() != count:
            portable_lib._unsafe_reset_threadpool(count)
